"""Reads the files of a run as what anybody may have written: a refusal names the file.

A run directory may come from another machine, another version, a damaged disk or a careless editor.
Whatever is wrong with a file is one `Refused` that says which file and what.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from linen_nnx.book.reading import open_file, parse_json, read_bytes, read_text
from linen_nnx.book.yaml_io import parse

from training.runtime.errors import Refused

LIMIT = 1 << 24  # bytes of a YAML or JSON file of a run: the longest has some 20 kB
BLOCK = 1 << 20  # bytes of a longer file read at a time
SCANNER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@contextmanager
def named(path: Path, hint: str = "") -> Iterator[None]:
    """Whatever is wrong with the content of a file, or with reading it, is refused by its name.

    Args:
        path: the file.
        hint: a sentence that says what to do.
    """
    try:
        yield
    except (OSError, ValueError) as error:  # a `Refusal` is a ValueError
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        more = f" {hint}" if hint else ""
        raise Refused(f"{path} cannot be read: {reason.rstrip('.')}.{more}") from None


def yaml_mapping(path: Path) -> dict[str, Any]:
    """The content of a YAML file that holds a mapping. Raises OSError, ValueError: see `named`."""
    # A file that is no file of ours may be of any size.
    text = read_text(path, LIMIT)
    value = parse(text)
    # With `*name` for what stands elsewhere, ten lines can mean gigabytes. No run writes that.
    tokens = yaml.scan(text, Loader=SCANNER)
    if any(isinstance(token, yaml.AliasToken) for token in tokens):
        raise ValueError("it has an alias (*name), which a run never writes")
    return _mapping(value)


def json_mapping(path: Path) -> dict[str, Any]:
    """The same of a JSON file."""
    return _mapping(parse_json(read_bytes(path, LIMIT)))


def whole_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file with their ends, without a last one that was not written to its end."""
    with open_file(path) as file:
        # Without its end a line was not written to the end, whatever it looks like: a kill can cut
        # a number in two, and `0.12` of `0.1234` is a number as well.
        rest = b""
        while block := file.read(BLOCK):
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                yield line + b"\n"


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, expected a mapping")
    return value
