"""The grammar of a rule: what may be written in a rule book, read into `Rule` and written back.

A rule is a mapping with `linen:` and/or `nnx:` (patterns, see `patterns.py`), optional `ops:` and
an optional `note:` for the reader. Linen paths start with their collection (`params/a/kernel`),
nnx paths are attribute paths (`a/0/kernel`). Without ops a rule renames:

    - linen: params/Block_{i}/Dense_0/kernel
      nnx: blocks/{i}/up/kernel

Ops are listed in the Linen -> nnx order, each with its arguments; going back they run inverted in
reverse. Several may be composed.

    - {op: stack, capture: i, axis: 0}      one side lacks `{i}` and holds all i stacked on `axis`
    - {op: concat, axis: -1, sizes: [8, 4]} one side is a *list* of patterns, the other holds its
                                            parts joined along `axis`; equal parts without sizes
    - {op: transpose, perm: [1, 0]}         nnx axis k is Linen axis perm[k]
    - {op: reshape, linen: [-1, 4, 8], nnx: [-1, 32]}   one -1 on each side stands for any length
    - {op: scale, factor: 0.5}              nnx = factor x Linen: changes values
    - {op: copy}                            one side is a *list* of patterns, its homes: each is
                                            equal to the one leaf of the other side, which is
                                            checked on the way back; `perms: [null, [1, 0]]` for
                                            homes that hold its axes in another order
    - {op: drop}                            alone; one side only: no home on the other, and meant
    - {op: init, fill: normal, stddev: 0.02, seed: 0, shape: [8], dtype: float32}
                                            alone; one side only: filled on the way there (zeros,
                                            ones, normal), dropped on the way back; shape and
                                            dtype are needed only where no target tree is given
    - {op: init, fill: constructor, shape: [8], dtype: float32, data: eJxjYA...}
                                            the same, with the numbers that the model's own
                                            constructor gave it (`suggest` writes them);
                                            `collection` names what is no parameter: no optimizer
                                            keeps anything of it

Both sides name the same captures, save those that a `stack` takes away.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

from linen_nnx.book.actions import Filling
from linen_nnx.book.ops import Concat, Copy, Drop, Init, Op, Scale, Stack
from linen_nnx.book.packing import unpacked
from linen_nnx.book.patterns import Pattern, is_integer
from linen_nnx.book.specs import Side

# `Concat` is written `op: concat`.
OPS: dict[str, type[Op]] = {kind.__name__.lower(): kind for kind in get_args(Op)}


@dataclass(frozen=True)
class Rule:
    """One rule. Each side holds no pattern (one-sided rule), one, or the parts of a concat.

    Raises `ValueError`, with every reason, for captures, lists and ops that do not fit.

    Example:
      >>> rule = parse_rule({"linen": "params/fc/kernel", "nnx": "fc/kernel"})
      >>> print(rule, rule.lossless)
      `params/fc/kernel` <-> `fc/kernel` True
    """

    linen: tuple[Pattern, ...]
    nnx: tuple[Pattern, ...]
    ops: tuple[Op, ...] = ()
    note: str | None = None

    def __post_init__(self) -> None:
        problems = _misfits(self)
        if problems:
            raise ValueError("; ".join(problems))

    def side(self, side: Side) -> tuple[Pattern, ...]:
        """The patterns of one side."""
        return self.linen if side == "linen" else self.nnx

    @property
    def lossless(self) -> bool:
        """Whether the rule keeps every bit, there and back."""
        return not any(isinstance(op, Scale | Drop | Init) for op in self.ops)

    @property
    def init(self) -> Init | None:
        """The op that fills a one-sided leaf, if the rule has one."""
        return next((op for op in self.ops if isinstance(op, Init)), None)

    def __str__(self) -> str:
        sides = []
        for patterns in (self.linen, self.nnx):
            if patterns:
                sides.append(" + ".join([f"`{pattern.text}`" for pattern in patterns]))
        return " <-> ".join(sides)


def did_you_mean(word: str, known: Collection[str]) -> str:
    """`; did you mean ...?` where a known word is near, else nothing.

    Example:
      >>> did_you_mean("kernal", ["kernel", "bias"])
      '; did you mean `kernel`?'
    """
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean `{near[0]}`?" if near else ""


def unknown(entry: Mapping[Any, Any], known: Collection[str], what: str) -> list[str]:
    """A problem for each key of a mapping that is not known."""
    problems = []
    for key in entry:
        if key not in known:
            problems.append(f"{what} `{key}`{did_you_mean(str(key), known)}")
    return problems


@contextmanager
def noting(problems: list[str], where: str) -> Iterator[None]:
    """Adds the text of a `ValueError` to `problems` and goes on behind the block.

    So one reading of a book finds all of its faults, and not the first alone.
    """
    try:
        yield
    except ValueError as error:
        problems.append(f"{where}{error}")


def parse_rule(entry: Any) -> Rule:
    """A `Rule` from its mapping. Raises `ValueError`, with every reason."""
    _mapping(entry)
    problems = unknown(entry, _READERS, "unknown key")
    parsed: dict[str, Any] = {"linen": (), "nnx": ()}
    for key, read in _READERS.items():
        if key in entry:
            with noting(problems, f"`{key}`: "):
                parsed[key] = read(entry[key])
    if problems:
        raise ValueError("; ".join(problems))
    return Rule(**parsed)


def rule_to_dict(rule: Rule) -> dict[str, Any]:
    """The mapping of a rule, the inverse of `parse_rule`."""
    entry: dict[str, Any] = {}
    for side, patterns in (("linen", rule.linen), ("nnx", rule.nnx)):
        if patterns:
            texts = [pattern.text for pattern in patterns]
            entry[side] = texts[0] if len(texts) == 1 else texts
    if rule.ops:
        entry["ops"] = [_op_to_dict(op) for op in rule.ops]
    if rule.note is not None:
        entry["note"] = rule.note
    return entry


def _op_to_dict(op: Op) -> dict[str, Any]:
    entry: dict[str, Any] = {"op": type(op).__name__.lower()}
    for argument in dataclasses.fields(op):
        value = getattr(op, argument.name)
        # An argument at its default would only make the book longer.
        if argument.default is dataclasses.MISSING or value != argument.default:
            entry[argument.name] = _plain(value)
    return entry


def _plain(value: Any) -> Any:
    """Tuples as the lists that YAML has."""
    return list(map(_plain, value)) if isinstance(value, tuple) else value


def _patterns(value: Any) -> tuple[Pattern, ...]:
    if isinstance(value, list):
        # Of two equal parts nothing would say which leaf is which.
        if len(value) < 2 or len(set(map(str, value))) < len(value):
            raise ValueError(f"a list holds two or more different parts, got {value!r}")
        return tuple([Pattern(_text(part)) for part in value])
    return (Pattern(_text(value)),)


def _ops(value: Any) -> tuple[Op, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"expected a list such as [{{op: drop}}], got {value!r}")
    return tuple(map(_op, value))


def _op(entry: Any) -> Op:
    if not isinstance(entry, Mapping) or "op" not in entry:
        raise ValueError(f"an op is a mapping such as {{op: drop}}, got {entry!r}")
    name = str(entry["op"])
    if name not in OPS:
        near = did_you_mean(name, OPS)
        raise ValueError(f"unknown op `{name}`, known: {', '.join(OPS)}{near}")
    # The fields of the class are the arguments: a new op needs a reader for each, and no more here.
    fields = dataclasses.fields(OPS[name])
    known = ["op", *[field.name for field in fields]]
    problems = unknown(entry, known, f"op `{name}`: unknown argument")
    arguments = {}
    for field in fields:
        key = field.name
        if key in entry:
            with noting(problems, f"op `{name}`: `{key}` "):
                arguments[key] = _ARGUMENTS[key](entry[key])
        elif field.default is dataclasses.MISSING:
            problems.append(f"op `{name}` needs `{key}`")
    if ("shape" in entry) != ("dtype" in entry):
        problems.append("op `init`: give `shape` and `dtype` both, or neither")
    if problems:
        raise ValueError("; ".join(problems))
    op = OPS[name](**arguments)
    if isinstance(op, Init):
        _check_data(op)
    return op


def _check_data(init: Init) -> None:
    """Raises `ValueError` where the numbers of a constructor are missing, or are no such array."""
    if (init.fill == "constructor") != (init.data is not None):
        raise ValueError("op `init`: `fill: constructor` and `data` belong together")
    if init.data is None:
        return
    if init.spec is None:
        raise ValueError("op `init`: `data` needs `shape` and `dtype`")
    # `data` is a text that somebody may have made to unpack to gigabytes: it stops at `due`.
    due = init.spec.size * init.spec.dtype.itemsize
    try:
        size = len(unpacked(init.data, limit=due))
    except ValueError as error:
        raise ValueError(f"op `init`: `data` holds {error}, expected {due} bytes") from None
    if size != due:
        raise ValueError(f"op `init`: `data` holds {size} bytes, {init.spec} has {due}")


def _misfits(rule: Rule) -> list[str]:
    """Every reason why patterns and ops of a rule do not go together."""
    if not rule.linen and not rule.nnx:
        return ["a rule needs `linen` or `nnx`"]
    is_alone = any(isinstance(op, Drop | Init) for op in rule.ops)
    if not (rule.linen and rule.nnx):
        return _misfits_of_one_side(rule, is_alone)
    if is_alone:
        return ["`drop` and `init` are for rules with one side only"]
    return _misfits_of_captures(rule) + _misfits_of_lists(rule)


def _misfits_of_one_side(rule: Rule, is_alone: bool) -> list[str]:
    """The reasons where only one side has patterns."""
    if len(rule.linen + rule.nnx) > 1:
        return ["a one-sided rule takes one pattern, no list"]
    if len(rule.ops) != 1 or not is_alone:
        other = "nnx" if rule.linen else "linen"
        return [f"no `{other}` pattern: such a rule needs exactly one op, `drop` or `init`"]
    return []


def _misfits_of_captures(rule: Rule) -> list[str]:
    """The reasons why the captures of both sides do not go together.

    A capture stands on both sides, or on one side and in a `stack`, which holds all that it counts.
    """
    problems = []
    names: dict[str, set[str]] = {}
    for side, patterns in (("linen", rule.linen), ("nnx", rule.nnx)):
        names[side] = set(patterns[0].captures)
        if any(set(pattern.captures) != names[side] for pattern in patterns):
            problems.append(f"the parts of `{side}` must name the same captures")
    on_one_side = names["linen"] ^ names["nnx"]
    stacked = [op.capture for op in rule.ops if isinstance(op, Stack)]
    for name in sorted(on_one_side):
        if stacked.count(name) != 1:
            lacking = "nnx" if name in names["linen"] else "linen"
            # Only integers count from 0 without a gap, as an axis does.
            fix = "one `stack` op for it" if is_integer(name) else "it on both sides"
            problems.append(f"capture `{{{name}}}` is missing on the {lacking} side: needs {fix}")
    for name in sorted(set(stacked) - on_one_side):
        problems.append(f"`stack` of `{name}` needs `{{{name}}}` on exactly one side")
    return problems


def _misfits_of_lists(rule: Rule) -> list[str]:
    """The reasons why a list of parts and the ops do not go together."""
    problems = []
    lists = (len(rule.linen) > 1) + (len(rule.nnx) > 1)
    joining = sum(isinstance(op, Concat | Copy) for op in rule.ops)
    if lists == 2 or lists != joining:
        problems.append("a list of parts on one side and one `concat` or `copy` op belong together")
    parts = max(len(rule.linen), len(rule.nnx))
    for op in rule.ops:
        if isinstance(op, Copy) and op.perms and len(op.perms) != parts:
            problems.append(f"`copy` has {len(op.perms)} perms for {parts} homes")
        if isinstance(op, Concat) and op.sizes and len(op.sizes) != parts:
            problems.append(f"`concat` has {len(op.sizes)} sizes for {parts} parts")
    return problems


def _check(test: Callable[[Any], bool], expected: str) -> Callable[[Any], Any]:
    """A reader that returns its value (a list as a tuple) or raises with what was expected."""

    def read(value: Any) -> Any:
        if not test(value):
            raise ValueError(f"must be {expected}, got {value!r}")
        return tuple(value) if isinstance(value, list) else value

    return read


def _is_int(value: Any) -> bool:
    # YAML reads `yes` as true, which is an int of Python.
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_int(value) or isinstance(value, float)) and math.isfinite(value)


def _is_ints(value: Any, least: int) -> bool:
    return isinstance(value, list) and all(_is_int(size) and size >= least for size in value)


def _is_perm(value: Any) -> bool:
    return _is_ints(value, 0) and sorted(value) == list(range(len(value)))


def _is_perms(value: Any) -> bool:
    return isinstance(value, list) and all(perm is None or _is_perm(perm) for perm in value)


def _read_perms(value: Any) -> Any:
    """Like the other readers, for a list whose members become tuples, too."""
    perms = _perms(value)
    return tuple([None if perm is None else tuple(perm) for perm in perms])


def _is_dtype(value: Any) -> bool:
    import ml_dtypes  # noqa: F401
    import numpy as np

    # `np.dtype` takes many things, such as a class, and makes an object of what it does not know.
    try:
        return isinstance(value, str) and np.dtype(value).kind != "O"
    except TypeError:
        return False


_mapping = _check(lambda value: isinstance(value, Mapping), "a mapping with `linen` and/or `nnx`")
_text = _check(lambda value: isinstance(value, str), "a text")
# What may stand in a rule: key and reader, in the order in which faults are named.
_READERS: dict[str, Callable[[Any], Any]] = {
    "linen": _patterns,
    "nnx": _patterns,
    "ops": _ops,
    "note": _text,
}
_perms = _check(_is_perms, "a list with a permutation of 0..n-1, or null, for each home")
_shape = _check(
    lambda v: _is_ints(v, -1) and v.count(-1) <= 1, "a list of lengths, with at most one -1"
)
# What may stand in an op. Arguments of one name read alike, whichever op they belong to.
_ARGUMENTS: dict[str, Callable[[Any], Any]] = {
    "capture": _check(
        lambda v: isinstance(v, str) and len(v) == 1 and v.islower() and v.isascii(),
        "the letter of an integer capture",
    ),
    "axis": _check(_is_int, "an integer"),
    "sizes": _check(lambda v: _is_ints(v, 1) and len(v) > 1, "a list of two or more lengths"),
    "perm": _check(_is_perm, "a permutation of 0..n-1"),
    "perms": _read_perms,
    "linen": _shape,
    "nnx": _shape,
    "factor": _check(lambda v: _is_number(v) and v != 0, "a finite number other than 0"),
    "fill": _check(lambda v: v in get_args(Filling), " or ".join(get_args(Filling))),
    "stddev": _check(lambda v: _is_number(v) and v >= 0, "a number, 0 or more"),
    "seed": _check(lambda v: _is_int(v) and v >= 0, "an integer, 0 or more"),
    "shape": _check(lambda v: _is_ints(v, 0), "a list of lengths"),
    "collection": _check(lambda v: isinstance(v, str) and bool(v), "the name of a collection"),
    "data": _check(lambda v: isinstance(v, str), "packed bytes, as `suggest` writes them"),
    "dtype": _check(_is_dtype, "the name of a dtype, such as float32"),
}
