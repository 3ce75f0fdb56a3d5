"""Gives the streams of an nnx model the keys that its Linen twin would draw.

A pairing says which draw is which. It stands in the rule book, or `search` has found it. A program
computes the Linen keys. For a port of two layers that draws from one stream in each layer:

    pairing    layers/drop/rngs[0] is dropout/Block_0/Dropout_0
               layers/drop/rngs[1] is dropout/Block_1/Dropout_0
    program    {("dropout/Block_0/Dropout_0", 0): k0, ("dropout/Block_1/Dropout_0", 0): k1}
    fed        {"layers/drop/rngs": [[k0], [k1]]}, of the shape (lanes, draws) = (2, 1)

A draw without a partner gets keys of its own. They are a function of the keys of the call and of
the path of the stream alone, so that a run that is repeated or resumed draws them again:

    >>> one = own_key({"dropout": jax.random.key(3)}, "drop/rngs", ())
    >>> two = own_key({"dropout": jax.random.key(3)}, "drop/rngs", ())
    >>> bool(one == two)
    True
"""

import zlib
from collections.abc import Collection, Mapping
from math import prod
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from linen_nnx.book.draws import Draw, Pair, Pairing, named_twice
from linen_nnx.book.stages import WHOLE, Forms
from linen_nnx.infer.keys import DrawError, typed
from linen_nnx.ladder.call import Call
from linen_nnx.ladder.program import LinenDraw

if TYPE_CHECKING:
    from linen_nnx.ladder.ladder import Ladder

Streams = dict[str, tuple[int, ...]]
DrawName = tuple[str, int]
"""The path of a Linen draw, and its number among those with that path."""


def feed(
    ladder: "Ladder", forms: Forms, call: Call, pairing: Pairing
) -> dict[str, dict[str, Array]]:
    """The keys of a call's streams.

    Args:
      ladder: the model; `forms`: the form of each part.
      call: the call, with its keys.
      pairing: what is known of the draws of its kind.

    Returns:
      `{part: {stream: typed keys}}`: of the shape `(*lanes, draws)` where draws are paired, else of
      the shape `lanes`, which nnx draws from by itself. A stream of which the pairing says nothing
      has no entry: to draw from it is an error.

    Raises:
      DrawError: when a draw is paired twice, or a stream of its own has no key.
      Whatever Linen raises for the call.
    """
    streams = streams_of(ladder, forms)
    own = {draw.path for draw in pairing.own}
    idle = {draw.path for draw in pairing.idle}
    pairs: dict[Draw, Draw] = {}
    known: dict[DrawName, Array] = {}
    # Without pairs the Linen model need not be traced, which takes as long as tracing the port.
    if pairing.pairs or pairing.families:
        program = ladder.program(call)
        found = _fitting(program.draws, pairing, pairing.kind in ladder.searched)
        pairs = {pair.nnx: pair.linen for pair in found if pair.nnx.path in streams}
        known = program.keys(call.rngs) if pairs else {}
    result: dict[str, Array] = {}
    for path, lanes in streams.items():
        # Without a key of the call each step would draw the same mask, and nobody would see it.
        if path in own and not call.rngs:
            raise DrawError(f"the nnx stream {path} needs PRNG: pass `rngs={{...}}` to apply")
        plain = own_key(call.rngs, path, lanes)
        mine = {draw: linen for draw, linen in pairs.items() if draw.path == path}
        if mine:
            # Also where others of its draws have no partner: one stream has keys of one shape.
            result[path] = _stacked(mine, lanes, known, plain)
        elif path in own or path in idle:
            result[path] = plain
    return by_part(forms, result)


def by_part(parts: Collection[str], keys: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
    """`{part/stream: keys}` as `{part: {stream: keys}}`.

    Example:
      >>> by_part(["body", "head"], {"head/drop/rngs": "key"})
      {'body': {}, 'head': {'drop/rngs': 'key'}}
    """
    result: dict[str, dict[str, Array]] = {part: {} for part in parts}
    for path, key in keys.items():
        part, _, inner = (WHOLE, "", path) if WHOLE in parts else path.partition("/")
        result[part][inner] = key
    return result


def streams_of(ladder: "Ladder", forms: Forms) -> Streams:
    """`{path: lanes}` of the streams of all parts in nnx form."""
    found: Streams = {}
    for part, form in forms.items():
        if form == "nnx":
            for path, lanes in ladder.ports[part].streams.items():
                found[f"{part}/{path}" if part else path] = lanes
    return found


def own_key(rngs: Mapping[str, Any], path: str, lanes: tuple[int, ...]) -> Array:
    """Keys that are a stream's own, of the shape `lanes`."""
    # The first by name: `dropout` before `params`. Without keys, only idle draws ask for any.
    root = typed(rngs[min(rngs)]) if rngs else jax.random.key(0)
    # Not `hash`, which differs from process to process.
    key = jax.random.fold_in(root, zlib.crc32(path.encode()))
    return jax.random.split(key, lanes) if lanes else key


def _stacked(
    pairs: Mapping[Draw, Draw],
    lanes: tuple[int, ...],
    known: Mapping[DrawName, Array],
    plain: Array,
) -> Array:
    """The keys of one stream, `(*lanes, draws)`.

    pairs: `{draw of the stream: Linen draw}`. known: the keys of the Linen draws, each of its own
    lanes. plain: the stream's own keys, for draws without a partner.
    """
    columns: list[Array] = []
    for count in range(1 + max([draw.count for draw in pairs])):
        linen = {draw.lane: partner for draw, partner in pairs.items() if draw.count == count}
        whole = _whole(linen, lanes, known)
        if whole is not None:
            columns.append(whole)
            continue
        keys: list[Array] = []
        for lane in np.ndindex(*lanes):
            partner = linen.get(lane)
            if partner is None:
                keys.append(jax.random.fold_in(plain[lane], count))
            else:
                keys.append(known[partner.path, partner.count][partner.lane])
        columns.append(jnp.stack(keys).reshape(lanes))
    return jnp.stack(columns, -1)


def _whole(
    linen: Mapping[tuple[int, ...], Draw], lanes: tuple[int, ...], known: Mapping[DrawName, Array]
) -> Array | None:
    """The keys of all lanes, where they are one array of Linen's already; else None.

    They are where both models loop over layers. Taken lane by lane, the keys of 12 layers would be
    12 slices in each compiled step.
    """
    names = {(draw.path, draw.count) for draw in linen.values()}
    if len(names) != 1 or len(linen) != prod(lanes):
        return None
    keys = known[names.pop()]
    in_place = all(lane == draw.lane for lane, draw in linen.items())
    return keys if in_place and keys.shape == lanes else None


def _fitting(found: tuple[LinenDraw, ...], pairing: Pairing, is_new: bool) -> list[Pair]:
    """The pairs of a pairing that still hold.

    The model may have changed since its draws were paired. What no longer holds is left out; then a
    stream has no keys, and if it is drawn from, its draws are paired anew.

    found: the draws that the Linen model makes now. is_new: whether the pairing was found in this
    process, and so for this model.
    """
    made: set[Draw] = set()
    for draw in found:
        if not draw.problem:
            made.update([Draw(draw.path, draw.count, lane) for lane in np.ndindex(draw.lanes)])
    pairs = pairing.among(made)
    twice = named_twice([pair.nnx for pair in pairs])
    if twice:
        raise DrawError(f"The rule book pairs nnx draws twice in {pairing.kind}: {twice}.")
    # Linen makes a draw that no pair names: a layer more, say. Any stream may then be drawn from
    # once more than it has keys, and jax would clamp the index to the last key without a word.
    if not is_new and made - {pair.linen for pair in pairs}:
        return []
    # A pair names a draw that Linen does not make: a rate was set to 0, or there is a layer less.
    changed = {pair.nnx.path for pair in pairs if pair.linen not in made}
    return [pair for pair in pairs if pair.nnx.path not in changed]
