"""A planned conversion: what every leaf becomes, by which engine, and what that needs.

`planning.plan_conversion` makes one, `convert.convert` carries it out, and `verify` compares what
it says with what lies on disk. Nothing here writes.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from linen_nnx.book.moves import Move
from linen_nnx.book.rules import RuleBook
from linen_nnx.book.specs import Side
from linen_nnx.disk import checked, ocdbt
from linen_nnx.disk.engines import KEPT, STREAMED, done_by, engine_of, nbytes_of
from linen_nnx.disk.item import INDEX
from linen_nnx.disk.leaves import Leaf
from linen_nnx.disk.rekey import kept_names
from linen_nnx.disk.sources import Source
from linen_nnx.disk.state import Form, State

REPORT, RULES = "report.json", "rules.yaml"
"""The files that a conversion leaves in each folder that it has written, beside the digests."""

# Measured, in bytes: Python with what is imported; what the plan takes for each leaf; tensorstore
# with the batch that is being committed, 68 MiB with Python 3.11 and 94 with 3.13.
_BASE_MEMORY, _LEAF_MEMORY, _STREAM_MEMORY = 22 << 20, 5 << 10, 80 << 20
# A streamed move is in memory as sources and targets, and as encoded bytes of both the batch that
# is being filled and the one that is on its way to disk; some actions copy once more.
_COPIES = 5


class Options(NamedTuple):
    """What was asked of a conversion beside its target, as a report keeps it for `verify`."""

    reset_optimizer: bool = False
    model_only: bool = False
    side: Side | None = None
    item: str | None = None
    step: float | None = None
    prefix: tuple[str, ...] = ()


_OPTION_TYPES = (bool, bool, str, str, (int, float), list)


def options_in(report: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a report keeps. Raises `ValueError` for one of another type.

    Example:
      >>> options_in({"model_only": True, "item": None, "prefix": ["model-"]})
      {'model_only': True, 'prefix': ['model-']}
    """
    options = {}
    for name, kind in zip(Options._fields, _OPTION_TYPES, strict=True):
        value = report.get(name)
        if value is None:
            continue
        if not isinstance(value, kind):
            raise ValueError(f"`{name}` is {checked.shown(value)}")
        if isinstance(value, list):
            value = [checked.text(one) for one in value]
        options[name] = value
    return options


@dataclass(frozen=True)
class Conversion:
    """The way of one checkpoint to another form, settled to the last leaf."""

    source: Source
    state: State
    to: Form
    book: RuleBook
    moves: tuple[Move[Leaf, Leaf], ...]
    """Each is settled, so that `engine_of` tells which engine writes its targets."""
    target: str
    """The form as it was asked for."""
    options: Options
    as_they_are: tuple[str, ...]
    """The arrays that mirror no parameter, and go along as they are."""
    notes: tuple[str, ...]
    """What a person should know."""
    suffix: str
    """The suffix of the file to be written; empty if a directory is."""
    beside: Mapping[str, "Conversion | None"] = field(default_factory=dict)
    """The other items of the step that do not go along as they are: the conversion of each, or
    None for one that is left out."""

    @property
    def with_beside(self) -> list["Conversion"]:
        """This conversion, and those of the items beside it."""
        return [self, *filter(None, self.beside.values())]

    @property
    def dropped(self) -> list[str]:
        """The source leaves that have no target. Empty nodes hold nothing, and are not named."""
        paths = []
        for move in self.moves:
            if not move.targets:
                paths += [leaf.path for leaf in move.sources if not leaf.empty]
        return paths

    @property
    def filled(self) -> list[str]:
        """The target leaves that have data and no source."""
        paths = []
        for move in self.moves:
            if not move.sources:
                paths += [leaf.path for leaf in move.targets if leaf.zarr]
        return paths

    @property
    def bytes_streamed(self) -> int:
        """Bytes of the arrays that are read, transformed and written."""
        return sum(map(nbytes_of, done_by(STREAMED, self.moves)))

    @property
    def bytes_stored(self) -> int:
        """Bytes that a copy takes over from the source as they are."""
        items = self.source.items
        if not (items and items[0].ocdbt):
            # No tree says how long the stored chunks are. Decoded they are no shorter, so that the
            # disk is not found full on the way.
            return sum(map(nbytes_of, done_by(KEPT, self.moves)))
        count = 0
        for number, item in enumerate(items):
            files = item.data_files(kept_names(self.moves, number))
            count += sum(file.stat().st_size for file in files)
        return count

    @property
    def peak_memory(self) -> int:
        """An estimate of the most memory that carrying it out takes, in bytes."""
        largest = max(map(nbytes_of, done_by(STREAMED, self.moves)), default=0)
        more = _STREAM_MEMORY + _COPIES * largest if largest else 0
        if self.suffix:
            # A file is written from the whole tree in memory, and its writer holds the leaf that it
            # is at once more, and again encoded.
            sizes = list(map(nbytes_of, self.moves))
            more = max(more, _STREAM_MEMORY) + sum(sizes) + 2 * max(sizes, default=0)
        return _BASE_MEMORY + _LEAF_MEMORY * len(self.moves) + more

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything that the result depends on, the source's bytes included.

        A report keeps it: a conversion to a target that is there finds its own result by it. So it
        must come out the same in every later version for the same source, book and target.
        """
        state = xxhash.xxh3_128()
        for path in self.source.bytes_of():
            # The names of data files are random, and a manifest leads to all that it needs: it is
            # read. Data files are gigabytes: of these name, size and time stand for the bytes.
            small = path.name.startswith(("_", ocdbt.MANIFEST)) or path.name == INDEX
            state.update(path.read_bytes() if small else _stamp(path))
        described = []
        for move in self.moves:
            stored = [(leaf.item, leaf.stored) for leaf in move.sources]
            described.append((stored, [leaf.entry for leaf in move.targets], move.actions))
        state.update(f"{described}{self.to} {self.source.kind}".encode())
        for name, one in self.beside.items():
            state.update(f"{name} {one and one.fingerprint}".encode())
        return state.hexdigest()

    def summary(self) -> dict[str, Any]:
        """For reports: what was found, what is written, how much by which engine."""
        leaves = Counter[str]()
        for move in self.moves:
            if move.targets:
                leaves[engine_of(move)] += len(move.targets)
        return {
            "source": str(self.source.path),
            "found": f"{self.source}: {self.state.layout}",
            "to": str(self.to),
            "target": self.target,
            **self.options._asdict(),
            "leaves": dict(sorted(leaves.items())),
            "dropped": self.dropped,
            "filled": self.filled,
            "as_they_are": list(self.as_they_are),
            "bytes": sum(map(nbytes_of, self.moves)),
            "bytes_streamed": self.bytes_streamed,
            "peak_memory": max(one.peak_memory for one in self.with_beside),
            "notes": list(self.notes),
            "beside": {name: one and one.summary() for name, one in self.beside.items()},
        }

    def origin(self) -> dict[str, Any] | None:
        """What the way back needs to know of the source's tree, in plain JSON values.

        A stage needs none: its tree is that of its run, and the same at all four. `origin.py` reads
        this back.
        """
        if self.state.form.stage:
            return None
        leaves = []
        for leaf in self.source.leaves:
            # The dtype of a scalar alone is kept: a step is int32 in one layout and int64 or uint32
            # in another, while arrays keep theirs on both ways.
            dtype = str(leaf.spec.dtype) if _is_scalar(leaf) else None
            leaves.append((*leaf.entry, dtype))
        beside = {}
        for name, one in self.beside.items():
            if one is not None:
                beside[name] = one.origin()
        return {"side": self.state.form.side, "leaves": leaves, "beside": beside}


def _stamp(path: Path) -> bytes:
    """What stands for the bytes of a large file: its path, its size, when it was written."""
    stat = path.stat()
    return f"{path} {stat.st_size} {stat.st_mtime_ns}".encode()


def _is_scalar(leaf: Leaf) -> bool:
    return leaf.zarr is not None and not leaf.zarr["shape"] and not leaf.extension
