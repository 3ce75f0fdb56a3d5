"""Finds which draw of an nnx model is which draw of its Linen twin, and proves it.

The order of draws is no evidence: a port of a VAE that draws its noise before its dropout was
paired in silence, and wrongly. What is evidence is how a draw acts. Take two dropout layers, called
`a` and `b` on one side, `u` and `v` on the other:

    all draws get one key k0         both models give y0
    a alone gets another key, k1     y1      u alone: y2
    b alone gets it                  y2      v alone: y1       so a is v, and b is u
    then each draw a key of its own  equal outputs, or the pairing is wrong

With one key for all, the outputs are equal whichever draw is whose; with k1 at a single place, they
tell where it acts. Where `nn.scan` does not split a stream, one Linen key acts in every layer, and
the draws of the port's layers are its partners together: they are given k1 together.

A mask of few elements may be the same under k0 and under k1: of rate 0.1 and 8 elements, it is so
every fifth time. So a draw that seems to do nothing is tried with more keys, and with one that
tells, all draws are run once more. The proof is repeated with other keys for the same reason.

How far two outputs may be apart is measured, not set: a rounding error is small beside the effect
of the weakest draw.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from linen_nnx.book.draws import Draw, Pair

Array = np.ndarray
_SHARED, _OTHER = 1_000_001, 1_000_002  # seeds of keys
_TRIES = 32  # other keys that a draw is tried with, before it is taken for idle
_PROOFS = 4  # runs with a key of its own for each draw
_SAME = 0.3  # of a draw's effect: two effects that differ by less are one


class Side(NamedTuple):
    """One model: its draws, and its outputs as a function of their keys.

    run: raw keys, `(len(draws), words) uint32`, to the outputs. words: of one key.
    """

    draws: Sequence[Draw]
    run: Callable[[Array], Sequence[Any]]
    words: int

    def keys(self, *numbers: int) -> Array:
        """Raw keys: the first for each draw, or, given as many numbers, one for each."""
        count = len(self.draws)
        rows = numbers if len(numbers) == count else numbers[:1] * count
        random = [np.random.default_rng(number) for number in rows]
        return np.array(
            [each.integers(0, 2**32, self.words, np.uint32) for each in random], np.uint32
        ).reshape(count, self.words)


class Match(NamedTuple):
    """What was found; `problem` says why draws of the port that act are left in `own`."""

    pairs: tuple[Pair, ...] = ()
    idle: tuple[Draw, ...] = ()
    own: tuple[Draw, ...] = ()
    problem: str = ""


class _Effects(NamedTuple):
    """The outputs with one key for all draws, and how each draw moves them with other keys.

    seeds: of the other keys; moves: for each draw, those with each of the keys in one vector.
    """

    base: Array
    moves: list[Array]
    seeds: Sequence[int]

    @property
    def acting(self) -> list[int]:
        return [k for k, move in enumerate(self.moves) if move.any()]


def match(linen: Side, nnx: Side) -> Match:
    """Pairs the draws of two models by how they act, and proves the pairs: see the module."""
    two = _effects(nnx, [_OTHER])
    if more := _telling(nnx, two):
        two = _effects(nnx, [_OTHER, *more])
    one = _effects(linen, two.seeds)
    idle = tuple(nnx.draws[k] for k in range(len(nnx.draws)) if k not in two.acting)
    acting = tuple(nnx.draws[k] for k in two.acting)
    if not acting:
        return Match(idle=idle)
    found = _partners(nnx, one, two)
    if isinstance(found, str):
        return Match(idle=idle, own=acting, problem=found)
    lost = tuple(nnx.draws[k] for k in two.acting if k not in found)
    if problem := _disproof(linen, nnx, one, two, found):
        return Match(idle=idle, own=acting, problem=problem)
    pairs = tuple(Pair(linen.draws[a], nnx.draws[b]) for b, a in sorted(found.items()))
    problem = "no draw of the Linen model acts as they do" if lost else ""
    return Match(pairs, idle, lost, problem)


def _effects(side: Side, seeds: Sequence[int]) -> _Effects:
    base = _flat(side.run(side.keys(_SHARED)))
    moves = [_move(side, base, [number], seeds) for number in range(len(side.draws))]
    return _Effects(base, moves, seeds)


def _move(side: Side, base: Array, numbers: Sequence[int], seeds: Sequence[int]) -> Array:
    """How the outputs move when some draws get another key together, for each of the keys."""
    moves = []
    for seed in seeds:
        keys, other = side.keys(_SHARED), side.keys(seed)
        keys[numbers] = other[numbers]
        moves.append(_flat(side.run(keys)) - base)
    return np.concatenate(moves)


def _telling(side: Side, effects: _Effects) -> list[int]:
    """The seeds of keys with which draws act that do nothing with those tried so far."""
    found: list[int] = []
    for number in range(len(side.draws)):
        if number in effects.acting:
            continue
        for seed in range(_OTHER + 1, _OTHER + _TRIES):
            if _move(side, effects.base, [number], [seed]).any():
                found.append(seed)
                break
    return sorted({*found})


def _partners(nnx: Side, one: _Effects, two: _Effects) -> dict[int, int] | str:
    """`{nnx draw: Linen draw}` of those that act alike, or why none can be told."""
    if one.base.shape != two.base.shape:
        return f"the outputs have {one.base.size} and {two.base.size} elements"
    gap = _size(one.base - two.base)
    weakest = min((_size(two.moves[k]) for k in two.acting), default=0.0)
    if not gap < _SAME * weakest:
        return (
            f"with one key for all draws the outputs differ by {gap:.1e}, the weakest draw moves "
            f"them by {weakest:.1e}: a draw is missing, or has another shape, rate or place"
        )
    found: dict[int, int] = {}
    free = one.acting
    for number in two.acting:
        move = two.moves[number]
        alike = [k for k in free if _size(one.moves[k] - move) < _SAME * _size(move)]
        if alike:
            nearest = min(alike, key=lambda k, move=move: _size(one.moves[k] - move))
            found[number] = nearest
            free.remove(nearest)
    return {**found, **_shared(nnx, one, two, found)}


def _shared(nnx: Side, one: _Effects, two: _Effects, found: Mapping[int, int]) -> dict[int, int]:
    """Partners of the Linen draws that act as several draws of the port, in several layers, do."""
    groups: dict[Any, list[int]] = {}
    for number in two.acting:
        if number not in found:
            draw = nnx.draws[number]
            groups.setdefault((re.sub(r"\d+", "*", draw.path), draw.count), []).append(number)
    result: dict[int, int] = {}
    for members in groups.values():
        if len(members) > 1:
            move = _move(nnx, two.base, members, two.seeds)
            for k in set(one.acting) - {*found.values(), *result.values()}:
                if _size(one.moves[k] - move) < _SAME * _size(move):
                    result.update(dict.fromkeys(members, k))
    return result


def _disproof(linen: Side, nnx: Side, one: _Effects, two: _Effects, found: dict[int, int]) -> str:
    """What is wrong with a pairing when each pair gets a key of its own; empty if nothing is."""
    if not found:
        return "no draw of the Linen model acts as they do"
    weakest = min(_size(two.moves[b]) for b in found)
    for proof in range(_PROOFS):
        left, right = linen.keys(_SHARED), nnx.keys(_SHARED)
        first = proof * len(linen.draws)
        own = linen.keys(*range(first, first + len(linen.draws)))
        for b, a in found.items():
            left[a] = right[b] = own[a]
        gap = _size(_flat(linen.run(left)) - _flat(nnx.run(right)))
        if not gap < _SAME * weakest:
            return f"with a key of its own for each draw the outputs differ by {gap:.1e}"
    return ""


def _flat(outputs: Sequence[Any]) -> Array:
    """All outputs in one vector."""
    arrays = [np.asarray(out).astype(np.float64).ravel() for out in outputs]
    return np.nan_to_num(np.concatenate(arrays)) if arrays else np.zeros(0)


def _size(array: Array) -> float:
    return float(np.linalg.norm(array))
