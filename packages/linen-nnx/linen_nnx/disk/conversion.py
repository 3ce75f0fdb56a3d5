"""A planned conversion: what every leaf becomes, by which job, and what that needs."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from linen_nnx.book.ops import Side
from linen_nnx.book.rules import RuleBook
from linen_nnx.disk import checked, ocdbt
from linen_nnx.disk.leaves import Leaf
from linen_nnx.disk.rekey import Job, kept
from linen_nnx.disk.sources import Source
from linen_nnx.disk.state import Form, State
from linen_nnx.disk.store import INDEX

REPORT, RULES = "report.json", "rules.yaml"
# Measured: Python, and what each leaf takes; tensorstore, and the batch being committed.
_BASE_MEMORY, _LEAF_MEMORY, _STREAM_MEMORY = 22 << 20, 5 << 10, 68 << 20
_COPIES = 5  # of a streamed change: sources, targets, and both encoded and on their way


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
    """The options that a report keeps. Raises `ValueError` for one of another type."""
    options = {}
    for name, kind in zip(Options._fields, _OPTION_TYPES, strict=True):
        value = report.get(name)
        if value is None:
            continue
        if not isinstance(value, kind):
            raise ValueError(f"`{name}` is {checked.shown(value)}")
        options[name] = [checked.text(one) for one in value] if isinstance(value, list) else value
    return options


@dataclass(frozen=True)
class Conversion:
    """One checkpoint's way to another form: which job does what."""

    source: Source
    state: State
    to: Form
    book: RuleBook
    jobs: tuple[Job, ...]
    target: str
    """The form as it was asked for."""
    options: Options
    as_they_are: tuple[str, ...]
    """The arrays that mirror no parameter, and go along as they are."""
    notes: tuple[str, ...]
    """What a person should know."""
    suffix: str
    """Of the file to be written; empty if it is none."""
    beside: Mapping[str, "Conversion | None"] = field(default_factory=dict)
    """Of other items of the step that are not taken along as they are: their own conversions, or
    None for those that are left out."""

    @property
    def parts(self) -> list["Conversion"]:
        """This one, and those of the items beside it."""
        return [self, *filter(None, self.beside.values())]

    @property
    def dropped(self) -> list[str]:
        """Source leaves without a target (empty nodes, which hold nothing, aside)."""
        gone = (leaf for job in self.jobs if not job.targets for leaf in job.change.sources)
        return [leaf.path for leaf in gone if not leaf.empty]

    @property
    def filled(self) -> list[str]:
        """Target leaves with data and without a source."""
        new = (job for job in self.jobs if not job.change.sources)
        return [leaf.path for job in new for leaf in job.targets if leaf.zarr]

    @property
    def bytes_streamed(self) -> int:
        return sum(job.nbytes for job in self.jobs if job.engine == "stream")

    @property
    def bytes_stored(self) -> int:
        """Bytes that a copy takes over from the source as they are."""
        items = self.source.items
        if not (items and items[0].ocdbt):
            return sum(job.nbytes for job in self.jobs if job.engine in ("name", "chunks"))
        return sum(
            file.stat().st_size
            for number, item in enumerate(items)
            for file in item.data_files(kept(self.jobs, number))
        )

    @property
    def peak_memory(self) -> int:
        """An estimate, in bytes."""
        largest = max((job.nbytes for job in self.jobs if job.engine == "stream"), default=0)
        more = _STREAM_MEMORY + _COPIES * largest if largest else 0
        if self.suffix:  # held whole, and once more the leaf that is being written
            sizes = [job.nbytes for job in self.jobs]
            more = max(more, _STREAM_MEMORY) + sum(sizes) + 2 * max(sizes, default=0)
        return _BASE_MEMORY + _LEAF_MEMORY * len(self.jobs) + more

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything that the result depends on, the source's bytes included."""
        state = xxhash.xxh3_128()
        for path in self.source.bytes_of():
            # The names of data files are random, and a manifest leads to all that it needs.
            small = path.name.startswith(("_", ocdbt.MANIFEST)) or path.name == INDEX
            state.update(path.read_bytes() if small else _stamp(path))
        jobs = []
        for job in self.jobs:
            read = [(leaf.item, leaf.stored) for leaf in job.change.sources]
            jobs.append((read, [leaf.form for leaf in job.targets], job.change.actions))
        state.update(f"{jobs}{self.to} {self.source.kind}".encode())
        for name, one in self.beside.items():
            state.update(f"{name} {one and one.fingerprint}".encode())
        return state.hexdigest()

    def summary(self) -> dict[str, Any]:
        """For reports: what was found, what is written, how much by which engine."""
        engines = Counter(job.engine for job in self.jobs for _ in job.targets)
        return {
            "source": str(self.source.path),
            "found": f"{self.source}: {self.state.layout}",
            "to": str(self.to),
            "target": self.target,
            **self.options._asdict(),
            "leaves": dict(sorted(engines.items())),
            "dropped": self.dropped,
            "filled": self.filled,
            "as_they_are": list(self.as_they_are),
            "bytes": sum(job.nbytes for job in self.jobs),
            "bytes_streamed": self.bytes_streamed,
            "peak_memory": max(part.peak_memory for part in self.parts),
            "notes": list(self.notes),
            "beside": {name: one and one.summary() for name, one in self.beside.items()},
        }

    def origin(self) -> dict[str, Any] | None:
        """What the way back needs to know of the source's tree, in plain JSON values."""
        if self.state.form.stage:
            return None
        beside = {name: one.origin() for name, one in self.beside.items() if one is not None}
        return {
            "side": self.state.form.side,
            "leaves": [
                (*leaf.form, str(leaf.spec.dtype) if _is_scalar(leaf) else None)
                for leaf in self.source.leaves
            ],
            "beside": beside,
        }


def _stamp(path: Path) -> bytes:
    stat = path.stat()
    return f"{path} {stat.st_size} {stat.st_mtime_ns}".encode()


def _is_scalar(leaf: Leaf) -> bool:
    return leaf.zarr is not None and not leaf.zarr["shape"] and not leaf.extension
