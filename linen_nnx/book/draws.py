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

`idle` are draws of the port that change no output, `own` those that have no partner: they have
streams of their own.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

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
        found = _TEXT.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            raise ValueError(f"a draw is a text such as `drop/rngs#1[2]`, got {text!r}")
        path, count, lane = found.groups()
        return cls(path, int(count or 0), tuple(map(int, lane.split(","))) if lane else ())

    def __str__(self) -> str:
        count = f"#{self.count}" if self.count else ""
        lane = f"[{','.join(map(str, self.lane))}]" if self.lane else ""
        return f"{self.path}{count}{lane}"


class Pair(NamedTuple):
    """Two draws that are one: the nnx draw gets the key that the Linen draw would have got."""

    linen: Draw
    nnx: Draw


@dataclass(frozen=True)
class Pairing:
    """What the draws of one kind of call are: its method and its arguments that are no arrays.

    Attributes:
      call: the name of the method.
      given: `{argument: value}` of every argument that is no array.
      pairs, idle, own: see the module.
    """

    call: str
    given: Mapping[str, Any]
    pairs: tuple[Pair, ...] = ()
    idle: tuple[Draw, ...] = ()
    own: tuple[Draw, ...] = ()

    @property
    def kind(self) -> str:
        """The kind of call in one line, `__call__(train=True)`: equal for equal kinds."""
        given = ", ".join(f"{name}={value!r}" for name, value in sorted(self.given.items()))
        return f"{self.call}({given})"

    def to_dict(self) -> dict[str, Any]:
        """The mapping that `parse_pairing` reads."""
        entry: dict[str, Any] = {"call": self.call, "given": dict(self.given)}
        entry["pairs"] = [{"linen": str(pair.linen), "nnx": str(pair.nnx)} for pair in self.pairs]
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
    pairs = []
    for pair in _list(entry, "pairs"):
        if not isinstance(pair, Mapping) or set(pair) != {"linen", "nnx"}:
            raise ValueError(f"a pair is a mapping such as {{linen: a, nnx: b}}, got {pair!r}")
        pairs.append(Pair(Draw.parse(pair["linen"]), Draw.parse(pair["nnx"])))
    idle, own = (tuple(map(Draw.parse, _list(entry, name))) for name in ("idle", "own"))
    named = [*(pair.nnx for pair in pairs), *idle, *own]
    if twice := sorted({str(draw) for draw in named if named.count(draw) > 1}):
        raise ValueError(f"nnx draws that stand there twice: {', '.join(twice)}")
    return Pairing(entry["call"], dict(given), tuple(pairs), idle, own)


def _list(entry: Mapping[str, Any], name: str) -> list[Any]:
    value = entry.get(name) or []
    if not isinstance(value, list):
        raise ValueError(f"`{name}` is a list, got {value!r}")
    return value
