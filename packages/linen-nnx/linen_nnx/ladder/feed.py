"""Gives the streams of an nnx model the keys that its Linen twin would draw.

Which draw is which stands in a `Pairing`, of the rule book or found by `search`; the Linen keys
come from a `Program`. A draw without a partner gets keys of its own: a function of the keys of the
call and of its stream's path alone, so that a run that is repeated or resumed draws them again.
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
from linen_nnx.ladder.calls import Call
from linen_nnx.ladder.program import LinenDraw

if TYPE_CHECKING:
    from linen_nnx.ladder.ladder import Ladder

Streams = dict[str, tuple[int, ...]]
Name = tuple[str, int]


def feed(
    ladder: "Ladder", forms: Forms, call: Call, pairing: Pairing
) -> dict[str, dict[str, Array]]:
    """`{part: {stream: typed keys}}` of a call: `(*lanes, draws)`, or plain where none is paired.

    A stream of which the pairing says nothing has no entry: to draw from it is an error.

    Raises:
      DrawError: when a draw is paired twice, or a stream of its own has no key.
      Whatever Linen raises for the call.
    """
    streams = streams_of(ladder, forms)
    own = {draw.path for draw in pairing.own}
    idle = {draw.path for draw in pairing.idle}
    pairs: dict[Draw, Draw] = {}
    known: dict[Name, Array] = {}
    if pairing.pairs or pairing.families:
        program = ladder.program(call)
        found = _fitting(program.draws, pairing, pairing.kind in ladder.searched)
        pairs = {pair.nnx: pair.linen for pair in found if pair.nnx.path in streams}
        known = program.keys(call.rngs) if pairs else {}
    result: dict[str, Array] = {}
    for path, lanes in streams.items():
        if path in own and not call.rngs:
            raise DrawError(f"the nnx stream {path} needs PRNG: pass `rngs={{...}}` to apply")
        plain = own_key(call.rngs, path, lanes)
        mine = {draw: linen for draw, linen in pairs.items() if draw.path == path}
        if mine:
            result[path] = _stacked(mine, lanes, known, plain)
        elif path in own or path in idle:
            result[path] = plain
    return by_part(forms, result)


def by_part(parts: Collection[str], keys: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
    """`{part/stream: keys}` as `{part: {stream: keys}}`."""
    result: dict[str, dict[str, Array]] = {part: {} for part in parts}
    for path, key in keys.items():
        part, _, inner = (WHOLE, "", path) if WHOLE in parts else path.partition("/")
        result[part][inner] = key
    return result


def streams_of(ladder: "Ladder", forms: Forms) -> Streams:
    """`{path: lanes}` of the streams of all parts in nnx form."""
    found = {}
    for part, form in forms.items():
        for path, lanes in ladder.ports[part].streams.items() if form == "nnx" else ():
            found[f"{part}/{path}" if part else path] = lanes
    return found


def own_key(rngs: Mapping[str, Any], path: str, lanes: tuple[int, ...]) -> Array:
    """Keys that are a stream's own, of the shape `lanes`."""
    root = typed(rngs[min(rngs)]) if rngs else jax.random.key(0)
    key = jax.random.fold_in(root, zlib.crc32(path.encode()))
    return jax.random.split(key, lanes) if lanes else key


def _stacked(
    pairs: Mapping[Draw, Draw], lanes: tuple[int, ...], known: Mapping[Name, Array], plain: Array
) -> Array:
    """The keys of one stream, `(*lanes, draws)`."""
    columns = []
    for count in range(1 + max(draw.count for draw in pairs)):
        linen = {draw.lane: partner for draw, partner in pairs.items() if draw.count == count}
        names = {(draw.path, draw.count) for draw in linen.values()}
        whole = known[names.pop()] if len(names) == 1 else None
        # Where both sides loop over layers, the keys of all layers are one array already.
        in_place = all(lane == draw.lane for lane, draw in linen.items())
        if whole is not None and whole.shape == lanes and len(linen) == prod(lanes) and in_place:
            columns.append(whole)
            continue
        keys = []
        for lane in np.ndindex(*lanes):
            partner = linen.get(lane)
            if partner is None:
                keys.append(jax.random.fold_in(plain[lane], count))
            else:
                keys.append(known[partner.path, partner.count][partner.lane])
        columns.append(jnp.stack(keys).reshape(lanes))
    return jnp.stack(columns, -1)


def _fitting(found: tuple[LinenDraw, ...], pairing: Pairing, is_new: bool) -> list[Pair]:
    """The pairs of a pairing whose draws the Linen model makes.

    A stream of which one pair names another draw has changed since it was paired (a rate that was
    set to 0, a layer less): it gets no keys, and is paired anew if it is drawn from. So is every
    stream where Linen makes a draw that no pair names (a layer more), for any stream may be drawn
    from once more than there are keys; unless the pairing `is_new`, and knows of that draw.
    """
    made = set()
    for draw in found:
        if not draw.problem:
            made |= {Draw(draw.path, draw.count, lane) for lane in np.ndindex(draw.lanes)}
    pairs = pairing.among(made)
    if twice := named_twice(pair.nnx for pair in pairs):
        raise DrawError(f"The rule book pairs nnx draws twice in {pairing.kind}: {twice}.")
    if not is_new and made - {pair.linen for pair in pairs}:
        return []
    changed = {pair.nnx.path for pair in pairs if pair.linen not in made}
    return [pair for pair in pairs if pair.nnx.path not in changed]
