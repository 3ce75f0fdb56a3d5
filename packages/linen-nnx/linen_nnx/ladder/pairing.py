"""Finds which draw of an nnx model is which draw of its Linen twin, and proves it.

A draw is one use of a random key: one dropout mask, one sample of noise. The order of draws is no
evidence for a pair: a port of a VAE that draws its noise before its dropout was paired by order,
without an error, and wrongly (its outputs were 10.0 off). Evidence is how a draw acts on the
outputs. Take two layers of dropout, called `a` and `b` in Linen, `u` and `v` in nnx:

    all draws get one key k0         both models give y0
    a alone gets another key, k1     Linen gives y1      u alone: nnx gives y2
    b alone gets k1                  Linen gives y2      v alone: nnx gives y1
                                                         so a is v, and b is u
    each draw gets a key of its own  the outputs are equal, or the pairing is wrong

With one key for all draws the two models agree whichever draw is whose, which is why the search can
start without knowing it. The same as a program, with two models that are a line each:

    >>> linen = KeyedModel((Draw("dropout/a"), Draw("dropout/b")),
    ...                    lambda keys: [keys[0] % 100, 7 * (keys[1] % 100)], words=2)
    >>> nnx = KeyedModel((Draw("u"), Draw("v")),
    ...                  lambda keys: [keys[1] % 100, 7 * (keys[0] % 100)], words=2)
    >>> for pair in match(linen, nnx).pairs:
    ...     print(pair.linen, "is", pair.nnx)
    dropout/b is u
    dropout/a is v

Two cases need more. Where `nn.scan` does not split a stream, one Linen key acts in every layer, and
the draws of the port's layers are its partners together: they are given k1 together. And a mask of
few elements may be the same under k0 and under k1: at rate 0.1 and with 8 elements this happens
every fifth time. So a draw that seems to do nothing is tried with more keys, and the proof is made
with several keys.

How far two outputs may be apart is measured and not set: a rounding error is small beside the
effect of the weakest draw.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from linen_nnx.book.draws import Draw, Pair

Array = np.ndarray
_SHARED, _OTHER = 1_000_001, 1_000_002  # seeds of the keys k0 and k1
_TRIES = 32  # other keys that a draw is tried with, before it is taken for idle
# Runs with a key of its own for each draw. Two masks of 8 elements at rate 0.1 are equal with a
# chance of 0.2, and are so in four runs with one of 0.002.
_PROOFS = 4
_SAME = 0.3  # of a draw's effect: two effects that differ by less are one


class KeyedModel(NamedTuple):
    """One model as a function of the keys of its draws.

    draws: what it draws. run: from raw keys, `(len(draws), words) uint32`, to its outputs.
    words: the length of one raw key.
    """

    draws: Sequence[Draw]
    run: Callable[[Array], Sequence[Any]]
    words: int

    def keys(self, *seeds: int) -> Array:
        """Raw keys for all draws: one key for each from its own seed, or one seed's key for all."""
        count = len(self.draws)
        rows = seeds if len(seeds) == count else seeds[:1] * count
        keys = np.empty((count, self.words), np.uint32)
        for row, seed in enumerate(rows):
            keys[row] = np.random.default_rng(seed).integers(0, 2**32, self.words, np.uint32)
        return keys


class Match(NamedTuple):
    """Which draws were paired.

    pairs: the proven ones. idle: draws of the port that change no output. own: draws of the port
    that act and have no partner; `problem` says why.
    """

    pairs: tuple[Pair, ...] = ()
    idle: tuple[Draw, ...] = ()
    own: tuple[Draw, ...] = ()
    problem: str = ""


class _Effects(NamedTuple):
    """How each draw of a model moves its outputs.

    base: the outputs with one key for all draws. moves: for each draw, how far the outputs move
    when this draw gets another key; the moves for all keys of `seeds` are one vector.
    """

    base: Array
    moves: list[Array]
    seeds: Sequence[int]

    @property
    def acting(self) -> list[int]:
        """The numbers of the draws that move an output at all."""
        return [number for number, move in enumerate(self.moves) if move.any()]


def match(linen: KeyedModel, nnx: KeyedModel) -> Match:
    """Pairs the draws of two models by how they act, and proves the pairs.

    Args:
      linen: the Linen model; `nnx`: its port, on the same variables and inputs.

    Returns:
      The pairs, and what becomes of every other draw of the port. If the proof fails, there are no
      pairs: one wrong pair among many would not show in training.
    """
    port = _effects(nnx, [_OTHER])
    telling = _telling_seeds(nnx, port)
    if telling:
        port = _effects(nnx, [_OTHER, *telling])
    # With the seeds of the port, so that the effects of both models can be compared.
    original = _effects(linen, port.seeds)

    acting = tuple([nnx.draws[number] for number in port.acting])
    idle = tuple([draw for number, draw in enumerate(nnx.draws) if number not in port.acting])
    if not acting:
        return Match(idle=idle)
    problem = _apart(original, port)
    if problem:
        return Match(idle=idle, own=acting, problem=problem)
    found = _partners(nnx, original, port)
    problem = _disproof(linen, nnx, port, found)
    if problem:
        return Match(idle=idle, own=acting, problem=problem)
    pairs = [Pair(linen.draws[found[number]], nnx.draws[number]) for number in sorted(found)]
    lost = tuple([nnx.draws[number] for number in port.acting if number not in found])
    problem = "no draw of the Linen model acts as they do" if lost else ""
    return Match(tuple(pairs), idle, lost, problem)


def _effects(model: KeyedModel, seeds: Sequence[int]) -> _Effects:
    base = _flat(model.run(model.keys(_SHARED)))
    moves = [_move(model, base, [number], seeds) for number in range(len(model.draws))]
    return _Effects(base, moves, seeds)


def _move(model: KeyedModel, base: Array, numbers: Sequence[int], seeds: Sequence[int]) -> Array:
    """How the outputs move when some draws get another key together, for each seed of a key."""
    moves = []
    for seed in seeds:
        keys = model.keys(_SHARED)
        keys[numbers] = model.keys(seed)[numbers]
        moves.append(_flat(model.run(keys)) - base)
    return np.concatenate(moves)


def _telling_seeds(model: KeyedModel, effects: _Effects) -> list[int]:
    """The seeds of keys with which draws act that do nothing with the keys tried so far."""
    found: set[int] = set()
    for number in range(len(model.draws)):
        if number in effects.acting:
            continue
        # At rate 0.1 and with 8 elements, a mask keeps everything with a chance of 0.43; that it
        # does so with all 33 keys has a chance of 1e-12.
        for seed in range(_OTHER + 1, _OTHER + _TRIES):
            if _move(model, effects.base, [number], [seed]).any():
                found.add(seed)
                break
    return sorted(found)


def _apart(linen: _Effects, nnx: _Effects) -> str:
    """Why the outputs of the two models cannot be compared; empty if they can."""
    if linen.base.shape != nnx.base.shape:
        return f"the outputs have {linen.base.size} and {nnx.base.size} elements"
    gap = _size(linen.base - nnx.base)
    # A missing draw, or another rate, changes the outputs by as much as a draw does; rounding by
    # far less.
    weakest = min([_size(nnx.moves[number]) for number in nnx.acting])
    # Not `>=`: where the outputs hold no number, nothing is less than anything.
    if not gap < _SAME * weakest:
        return (
            f"with one key for all draws the outputs differ by {gap:.1e}, the weakest draw moves "
            f"them by {weakest:.1e}: a draw is missing, or has another shape, rate or place"
        )
    return ""


def _partners(nnx: KeyedModel, linen: _Effects, port: _Effects) -> dict[int, int]:
    """`{number of an nnx draw: number of the Linen draw}` of those that act alike."""
    found: dict[int, int] = {}
    free = linen.acting
    for number in port.acting:
        move = port.moves[number]
        alike = [other for other in free if _is_same(linen.moves[other], move)]
        if not alike:
            continue
        # Draws that commute (two masks on one array) act alike: either choice is right.
        nearest = min(alike, key=lambda other, move=move: _size(linen.moves[other] - move))
        found[number] = nearest
        free.remove(nearest)
    return {**found, **_shared(nnx, linen, port, found)}


def _shared(
    nnx: KeyedModel, linen: _Effects, port: _Effects, found: Mapping[int, int]
) -> dict[int, int]:
    """Partners of the Linen draws that act as several draws of the port do, in several layers."""
    # Draws of one place in several layers: their paths differ in numbers alone.
    layers: dict[tuple[str, int], list[int]] = {}
    for number in port.acting:
        if number not in found:
            draw = nnx.draws[number]
            place = re.sub(r"\d+", "*", draw.path)
            layers.setdefault((place, draw.count), []).append(number)

    result: dict[int, int] = {}
    for members in layers.values():
        if len(members) == 1:
            continue
        move = _move(nnx, port.base, members, port.seeds)
        for other in linen.acting:
            is_taken = other in found.values() or other in result.values()
            if not is_taken and _is_same(linen.moves[other], move):
                result.update(dict.fromkeys(members, other))
    return result


def _disproof(linen: KeyedModel, nnx: KeyedModel, port: _Effects, found: Mapping[int, int]) -> str:
    """Why a pairing is wrong, seen when each pair gets a key of its own; empty if it is right."""
    if not found:
        return "no draw of the Linen model acts as they do"
    weakest = min([_size(port.moves[number]) for number in found])
    count = len(linen.draws)
    for proof in range(_PROOFS):
        own = linen.keys(*range(proof * count, (proof + 1) * count))
        left, right = linen.keys(_SHARED), nnx.keys(_SHARED)
        for number, other in found.items():
            left[other] = right[number] = own[other]
        gap = _size(_flat(linen.run(left)) - _flat(nnx.run(right)))
        if not gap < _SAME * weakest:
            return f"with a key of its own for each draw the outputs differ by {gap:.1e}"
    return ""


def _is_same(move: Array, wanted: Array) -> bool:
    return _size(move - wanted) < _SAME * _size(wanted)


def _flat(outputs: Sequence[Any]) -> Array:
    """All outputs in one float64 vector."""
    if not outputs:
        return np.zeros(0)
    arrays = [np.asarray(out).astype(np.float64).ravel() for out in outputs]
    # Logits behind a mask may be infinite, and the difference of two infinities is no number.
    return np.nan_to_num(np.concatenate(arrays))


def _size(array: Array) -> float:
    return float(np.linalg.norm(array))
