"""Rule books as YAML: a module of its own, as yaml is not light and not always needed."""

from typing import Any

import yaml

# libyaml's parser where it is there: a book of 5000 rules takes 0.4 s instead of 4 s.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def parse(text: str) -> Any:
    """The content of YAML. Raises `ValueError` for what is none."""
    try:
        return yaml.load(text, Loader=_LOADER)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def write(book: dict[str, Any]) -> str:
    """The YAML of a rule book's mapping: its ops and candidates take one line each."""
    for entry in book["rules"]:
        if "ops" in entry:
            entry["ops"] = _OneLine(entry["ops"])
    for entry in book.get("unassigned", ()):
        entry["candidates"] = _OneLine(entry["candidates"])
    return yaml.dump(book, Dumper=_Dumper, sort_keys=False, width=1000)


class _OneLine(list[Any]):
    """A list that YAML writes on one line."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(
    _OneLine,
    lambda dumper, ops: dumper.represent_sequence("tag:yaml.org,2002:seq", ops, flow_style=True),
)
