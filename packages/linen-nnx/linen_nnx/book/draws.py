"""The section `draws:` of a rule book: which draw of the nnx model is which draw of its Linen twin.

A draw is one key that a module asks for. Two dropout layers, of which the port calls the second
`late` and applies it through a list, draw twice in a call with `train=True`:

    draws:
      - call: __call__
        given: {train: true}
        pairs:
          - {linen: dropout/Dropout_0, nnx: early/rngs}
          - {linen: dropout/Dropout_1, nnx: layers/0/late/rngs}

A Linen draw is named by the stream that was asked for and the path of the module that asked; an nnx
draw by the path of its `nnx.RngStream`. `#1` is the second draw of that name (the first has no
number), `[2]` the one of layer 2 where layers are looped over: `dropout/Layers/Dropout_0#1[2]`.

A pair may stand for many, as a rule may: what is captured of a Linen draw names its nnx draw.
Twelve blocks, looped over in Linen and a list in nnx, take one line:

          - {linen: "dropout/Layers/Dropout_0[{i}]", nnx: "layers/{i}/drop/rngs"}

`idle` are draws of the port that change no output. `own` are draws that have no partner: they have
streams of their own.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from linen_nnx.book.patterns import Pattern

_TEXT = re.compile(r"([^#\[\]]+)(?:#(\d+))?(?:\[(\d+(?:,\d+)*)\])?")
_KEYS = ("call", "given", "pairs", "idle", "own")


class Draw(NamedTuple):
    """One key that a model asks for.

    Example:
      >>> Draw.parse("dropout/Layers/Dropout_0#1[2]")
      Draw(path='dropout/Layers/Dropout_0', count=1, lane=(2,))
      >>> str(Draw("drop/rngs"))
      'drop/rngs'
    """

    path: str
    count: int = 0
    """How many draws of this path come before it, in this lane."""
    lane: tuple[int, ...] = ()
    """Its place in the loops or stacks of layers around it."""

    @classmethod
    def parse(cls, text: Any) -> "Draw":
        """The draw of a text. Raises `ValueError` for a text that is none."""
        # Of YAML, where a name of digits is a number.
        found = _TEXT.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            raise ValueError(f"a draw is a text such as `drop/rngs#1[2]`, got {text!r}")
        path, count, lanes = found.groups()
        lane = tuple(map(int, lanes.split(","))) if lanes else ()
        return cls(path, int(count or 0), lane)

    def __str__(self) -> str:
        count = f"#{self.count}" if self.count else ""
        lane = f"[{','.join(map(str, self.lane))}]" if self.lane else ""
        return f"{self.path}{count}{lane}"


class Pair(NamedTuple):
    """Two draws that are one: the nnx draw gets the key that the Linen draw would have got."""

    linen: Draw
    nnx: Draw


class Family(NamedTuple):
    """Pairs that differ in what is captured alone: `blocks_{i}/drop` and `blocks/{i}/drop/rngs`."""

    linen: Pattern
    nnx: Pattern

    def pair(self, linen: Draw) -> Pair | None:
        """The pair that a Linen draw is one half of, if it is of this family.

        Example:
          >>> family = Family(Pattern("dropout/Layers/Drop[{i}]"), Pattern("layers/{i}/rngs"))
          >>> str(family.pair(Draw.parse("dropout/Layers/Drop[2]")).nnx)
          'layers/2/rngs'
        """
        captures = self.linen.match(str(linen))
        return None if captures is None else Pair(linen, Draw.parse(self.nnx.format(captures)))


@dataclass(frozen=True)
class Pairing:
    """The draws of one kind of call. Its method and its arguments that are no arrays make the kind.

    Attributes:
      call: the name of the method.
      given: `{argument: value}` of every argument that is no array.
      pairs, idle, own: see the module.
      families: the pairs that stand for many.

    Example:
      >>> given = {"linen": "dropout/Layers/Drop[{i}]", "nnx": "layers/{i}/rngs"}
      >>> pairing = parse_pairing({"call": "__call__", "given": {"train": True}, "pairs": [given]})
      >>> pairing.kind
      '__call__(train=True)'
      >>> [str(pair.nnx) for pair in pairing.among([Draw("dropout/Layers/Drop", lane=(1,))])]
      ['layers/1/rngs']
    """

    call: str
    given: Mapping[str, Any]
    pairs: tuple[Pair, ...] = ()
    idle: tuple[Draw, ...] = ()
    own: tuple[Draw, ...] = ()
    families: tuple[Family, ...] = ()

    def among(self, draws: Iterable[Draw]) -> tuple[Pair, ...]:
        """All pairs, where `draws` are those that the Linen model makes."""
        found = list(self.pairs)
        for draw in draws:
            for family in self.families:
                if (pair := family.pair(draw)) is not None:
                    found.append(pair)
        return tuple(found)

    @property
    def kind(self) -> str:
        """The kind of call in one line, `__call__(train=True)`: equal for equal kinds."""
        given = ", ".join(f"{name}={value!r}" for name, value in sorted(self.given.items()))
        return f"{self.call}({given})"

    def to_dict(self) -> dict[str, Any]:
        """The mapping that `parse_pairing` reads."""
        pairs = [{"linen": str(pair.linen), "nnx": str(pair.nnx)} for pair in self.pairs]
        for family in self.families:
            pairs.append({"linen": family.linen.text, "nnx": family.nnx.text})
        entry: dict[str, Any] = {"call": self.call, "given": dict(self.given), "pairs": pairs}
        for name in ("idle", "own"):
            if draws := getattr(self, name):
                entry[name] = list(map(str, draws))
        return entry


def parse_pairing(entry: Any) -> Pairing:
    """A `Pairing` from its mapping. Raises `ValueError` with the first thing that it is not."""
    if not isinstance(entry, Mapping) or not set(entry) <= set(_KEYS) or "call" not in entry:
        raise ValueError(f"expected a mapping with {', '.join(_KEYS)}, got {entry!r}")
    given = entry.get("given") or {}
    if not isinstance(entry["call"], str) or not isinstance(given, Mapping):
        raise ValueError(f"`call` is a text and `given` a mapping, got {entry!r}")
    pairs, families = [], []
    for pair in _list(entry, "pairs"):
        if not isinstance(pair, Mapping) or set(pair) != {"linen", "nnx"}:
            raise ValueError(f"a pair is a mapping such as {{linen: a, nnx: b}}, got {pair!r}")
        # A capture on either side makes it one of many, and `_family` says what the other lacks.
        if any("{" in text for text in pair.values() if isinstance(text, str)):
            families.append(_family(pair))
        else:
            pairs.append(Pair(Draw.parse(pair["linen"]), Draw.parse(pair["nnx"])))
    idle = tuple(map(Draw.parse, _list(entry, "idle")))
    own = tuple(map(Draw.parse, _list(entry, "own")))
    # A draw can get one key. A Linen draw may be the partner of several, if a port draws twice.
    if twice := named_twice([*(pair.nnx for pair in pairs), *idle, *own]):
        raise ValueError(f"nnx draws that stand there twice: {twice}")
    return Pairing(entry["call"], dict(given), tuple(pairs), idle, own, tuple(families))


def _family(pair: Mapping[str, Any]) -> Family:
    """The pairs of a mapping that holds captures. Raises `ValueError` if they do not fit."""
    family = Family(Pattern(pair["linen"]), Pattern(pair["nnx"]))
    one, two = set(family.linen.captures), set(family.nnx.captures)
    if one != two:
        raise ValueError(
            f"a pair captures the same on both sides, got {sorted(one)} of {pair['linen']!r} and "
            f"{sorted(two)} of {pair['nnx']!r}"
        )
    # What the pattern stands for has to be a draw, whatever is captured.
    for pattern in family:
        Draw.parse(pattern.format(dict.fromkeys(pattern.captures, "0")))
    return family


def named_twice(draws: Iterable[Draw]) -> str:
    """The draws that stand in a list more than once, in one text."""
    counts = Counter(draws)
    return ", ".join(sorted(str(draw) for draw, count in counts.items() if count > 1))


def _list(entry: Mapping[str, Any], name: str) -> list[Any]:
    # `idle:` with nothing below it is null in YAML.
    value = entry.get(name) or []
    if not isinstance(value, list):
        raise ValueError(f"`{name}` is a list, got {value!r}")
    return value
