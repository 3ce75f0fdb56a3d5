"""What a conversion would do to every leaf, decided before anything is written."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from linen_nnx.book.grammar import did_you_mean
from linen_nnx.book.ops import Side, Spec
from linen_nnx.book.plan import RuleError
from linen_nnx.book.reading import read_json
from linen_nnx.book.rules import RuleBook
from linen_nnx.disk import checked, ocdbt
from linen_nnx.disk.carry import Carried, carry
from linen_nnx.disk.checked import StoreError
from linen_nnx.disk.complete import check_complete
from linen_nnx.disk.layouts import lay_out
from linen_nnx.disk.rekey import Job, choose, kept
from linen_nnx.disk.sides import guess_side
from linen_nnx.disk.sources import Source, find
from linen_nnx.disk.state import STAGES, Form, State, read_state
from linen_nnx.disk.store import DICT, INDEX, SEQUENCE, Leaf, fresh_metadata, make_key

REPORT, RULES = "report.json", "rules.yaml"
# Measured: Python, and what each leaf takes; tensorstore, and the batch being committed.
_BASE_MEMORY, _LEAF_MEMORY, _STREAM_MEMORY = 22 << 20, 5 << 10, 68 << 20
_COPIES = 5  # of a streamed change: sources, targets, and both encoded and on their way
MODEL_ALONE = (".safetensors", ".npz")
"""The formats of files that hold arrays by flat names, and so no training state."""


class Options(NamedTuple):
    """What was asked of a conversion beside its target, as a report keeps it for `verify`."""

    reset_optimizer: bool = False
    model_only: bool = False
    side: Side | None = None
    item: str | None = None
    step: int | None = None
    prefix: tuple[str, ...] = ()


_OPTION_TYPES = (bool, bool, str, str, int, list)


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
        jobs = [
            ([(leaf.item, leaf.stored) for leaf in old], [leaf.form for leaf in new], actions)
            for (old, _, actions, _), _, new, _ in self.jobs
        ]
        state.update(f"{jobs}{self.to} {self.source.kind}".encode())
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
            "peak_memory": self.peak_memory,
            "notes": list(self.notes),
        }

    def origin(self) -> dict[str, Any] | None:
        """What the way back needs to know of the source's tree, in plain JSON values."""
        if self.state.form.stage:
            return None
        return {
            "side": self.state.form.side,
            "leaves": [
                (*leaf.form, str(leaf.spec.dtype) if _is_scalar(leaf) else None)
                for leaf in self.source.leaves
            ],
        }


def _stamp(path: Path) -> bytes:
    stat = path.stat()
    return f"{path} {stat.st_size} {stat.st_mtime_ns}".encode()


def _is_scalar(leaf: Leaf) -> bool:
    return leaf.zarr is not None and not leaf.zarr["shape"] and not leaf.extension


def plan_conversion(
    path: str | Path,
    to: str,
    rules: str | Path | RuleBook | None = None,
    step: int | None = None,
    item: str | None = None,
    like: str | Path | Source | None = None,
    reset_optimizer: bool = False,
    suffix: str = "",
    part: str = "checkpoints",
    prefix: Sequence[str] = (),
    model_only: bool = False,
    side: Side | None = None,
    specs: Mapping[str, Any] | None = None,
) -> Conversion:
    """Plans the conversion of the checkpoint at `path`.

    Args:
      path: a run directory, a CheckpointManager's root or step, an Orbax item, or a file.
      to: `linen` or `nnx` for stock layouts; a stage's name for this template's own runs. For a
        whole run directory `linen` and `nnx` are the stages of that name.
      rules: the rule book, or its file; runs and converted checkpoints have one with them.
      step: which step of a root, if not the latest.
      item: which item of a step holds the state, if several may.
      like: a checkpoint that the result must equal in all but values.
      reset_optimizer: leave the optimizer's state out.
      suffix: of the file to be written, if it is one.
      part: the folder of a run directory, `checkpoints` or `best`.
      prefix: which group of steps, where a folder has several: see `sources.find`.
      model_only: leave out all but the model.
      side: which side the checkpoint is of, where neither it nor the rule book tells.
      specs: the shape and dtype of each leaf of the target's model by path, where they are known.

    Raises:
      StoreError: if there is no checkpoint, or it cannot be read.
      RuleError: with everything that does not fit.
    """
    options = Options(reset_optimizer, model_only, side, item, step, tuple(prefix))
    source = find(path, step, item, part, prefix)
    form, target = _forms(source, to)
    book = _rule_book(source, rules)
    if form is None:
        form = Form(_side(source, book, target.side, side))
    state = _chosen(read_state(source.leaves, form, book), suffix, model_only)
    wanted = None
    if like is not None:
        given = like if isinstance(like, Source) else find(like)
        wanted = read_state(given.leaves, target, book)
    origin = _origin(source, target, book)
    if model_only:
        wanted, origin = (s and State(s.form, s.layout, s.model) for s in (wanted, origin))
    carried = carry(state, target, book, wanted, reset_optimizer, origin, specs)
    changes = lay_out(carried.moves, state.form, target, wanted, origin)
    items = source.items
    zarr3 = bool(items) and items[0].zarr3
    jobs = tuple(choose(change, zarr3) for change in changes)
    notes = [*source.notes, *check_complete(source.items), *carried.notes]
    notes += _notes(carried, state, target, settled=bool(wanted or origin))
    as_they_are = tuple(carried.as_they_are)
    return Conversion(
        source, state, target, book, jobs, to, options, as_they_are, tuple(notes), suffix
    )


def _side(source: Source, book: RuleBook, target: Side, given: Side | None) -> Side:
    """The side that a stock checkpoint is of: as it was given, or as it looks."""
    side = given or guess_side(source.leaves, book)
    if side is None:
        raise RuleError(
            f"{source.path} may be of either form",
            ["names and rule book fit both: say which with --from linen or --from nnx"],
        )
    if side == target:
        how = "is said to be in" if given else "looks like"
        hint = "" if given else "; if it is not, say so with --from"
        text = f"it {how} {side} form already{hint}"
        raise RuleError(f"{source.path} cannot go to {target}", [text])
    return side


def _chosen(state: State, suffix: str, model_only: bool) -> State:
    """The part of a state that was asked for. Refuses what a file's format cannot hold."""
    lost = [leaf.path for leaf in state.rest.values() if not leaf.empty]
    if model_only:
        return State(state.form, f"{state.layout} (the model alone)", state.model)
    if lost and suffix in MODEL_ALONE:
        shown = ", ".join(f"`{path}`" for path in lost[:3])
        more = ", ..." if len(lost) > 3 else ""
        raise RuleError(
            f"a {suffix} file holds the model alone",
            [
                f"{len(lost)} leaves would be lost ({shown}{more}): write a directory or a "
                ".msgpack file, or leave them out with --model-only"
            ],
        )
    return state


def _notes(carried: Carried, state: State, target: Form, settled: bool) -> list[str]:
    """What a person should know of the result.

    settled: whether a tree is known that the result must be restored into.
    """
    notes: list[str] = []
    optimizer = any(place.in_optimizer for move in carried.moves for place in move.targets)
    if target.flat and not state.form.flat and optimizer and not settled:
        notes.append(
            "nnx form lacks the empty states of an optimizer chain, which a restore into a "
            "TrainState needs: save a fresh TrainState of the same model and optimizer with "
            "Orbax, and convert again with --like and its path"
        )
    if not target.flat:
        notes.append(
            "Linen keeps no random state: a model that has some is restored into "
            "`nnx.state(model, nnx.All(nnx.Variable, nnx.Not(nnx.RngState)))`"
        )
    return notes


def _forms(source: Source, to: str) -> tuple[Form | None, Form]:
    """The source's form, if it is known, and the target's."""
    form, known = None, {"linen": Form("linen"), "nnx": Form("nnx")}
    if source.run is not None:
        stage = source.run["stage"]
        if stage not in STAGES:
            raise RuleError("unknown stage", [f"the run is at stage `{stage}`"])
        form = Form("linen", stage)
        stages = {name: Form("linen", name) for name in STAGES}
        known = stages if source.kind == "run" else stages | known
    if to not in known:
        hint = "; stages are for this template's own runs" if to in STAGES else ""
        text = f"known: {', '.join(known)}{hint}{did_you_mean(to, known)}"
        raise RuleError(f"unknown target `{to}`", [text])
    return form, known[to]


def _rule_book(source: Source, rules: str | Path | RuleBook | None) -> RuleBook:
    if isinstance(rules, RuleBook):
        return rules
    if rules is not None:
        return RuleBook.load(rules)
    if source.run is not None:
        return RuleBook.from_dict(source.run["rules"], name=f"the rule book of {source.path}")
    own = source.folder / RULES
    if own.is_file():
        return RuleBook.load(own)
    raise RuleError(f"{source.path} has no rule book with it", ["give one with --rules FILE"])


def _origin(source: Source, to: Form, book: RuleBook) -> State | None:
    """The tree that a converted checkpoint came from, if it goes back there.

    Raises `StoreError` for a report that is damaged: without it the way back would end elsewhere.
    """
    path = source.folder / REPORT
    if not path.is_file():
        return None
    try:
        report = read_json(path)
        origin = report.get("origin") if isinstance(report, dict) else None
        if origin is None or to.stage or checked.field(origin, "side") != to.side:
            return None
        leaves = [_origin_leaf(e) for e in checked.sequence(checked.field(origin, "leaves"))]
    except ValueError as error:
        fix = "delete it, and give the tree of the result with --like"
        raise StoreError(f"{path} is damaged ({error}): {fix}") from None
    return read_state(leaves, to, book)


def _origin_leaf(entry: Any) -> Leaf:
    """A leaf as `Conversion.origin` describes it."""
    if len(checked.sequence(entry)) != 4:
        raise ValueError(f"a leaf has {len(entry)} values, expected 4")
    path, kinds, value_type, dtype = entry
    names = [checked.name(name) for name in checked.text(path).split("/")]
    if len(checked.sequence(kinds)) != len(names):
        raise ValueError(f"{checked.shown(path)} has {len(kinds)} kinds of keys")
    keys = [
        make_key(name, checked.integer(kind, SEQUENCE, DICT))
        for name, kind in zip(names, kinds, strict=True)
    ]
    metadata = None
    if dtype is not None:
        metadata = fresh_metadata(Spec((), checked.dtype_name(dtype)), zarr3=False)
    return Leaf(tuple(keys), checked.text(value_type), zarr=metadata)
