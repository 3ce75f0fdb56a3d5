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

from linen_nnx.book.draws import Draw, Pairing
from linen_nnx.ladder.calls import Call
from linen_nnx.ladder.forms import WHOLE, Forms
from linen_nnx.ladder.keys import DrawError, typed
from linen_nnx.ladder.program import LinenDraw

if TYPE_CHECKING:
    from linen_nnx.ladder.ladder import Ladder

Streams = dict[str, tuple[int, ...]]
Name = tuple[str, int]


def feed(
    ladder: "Ladder", forms: Forms, call: Call, pairing: Pairing
) -> dict[str, dict[str, Array]]:
    """`{part: {stream: typed keys}}` of a call: `(*lanes, draws)`, or plain where none is paired.

    Raises:
      DrawError: when the pairing does not fit the Linen model, or a stream of its own has no key.
      Whatever Linen raises for the call.
    """
    streams = streams_of(ladder, forms)
    pairs = {pair.nnx: pair.linen for pair in pairing.pairs if pair.nnx.path in streams}
    own = {draw.path for draw in pairing.own if draw.path in streams}
    known: dict[Name, Array] = {}
    if pairs:
        program = ladder.program(call)
        _check_fit(program.draws, pairing)
        known = program.keys(call.rngs)
    result: dict[str, Array] = {}
    for path, lanes in streams.items():
        if path in own and not call.rngs:
            raise DrawError(f"the nnx stream {path} needs PRNG: pass `rngs={{...}}` to apply")
        plain = own_key(call.rngs, path, lanes)
        mine = {draw: linen for draw, linen in pairs.items() if draw.path == path}
        result[path] = _stacked(mine, lanes, known, plain) if mine else plain
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


def _check_fit(found: tuple[LinenDraw, ...], pairing: Pairing) -> None:
    """Refuses a pairing that names draws which the Linen model does not make, or not so."""
    lanes = {(draw.path, draw.count): draw.lanes for draw in found if not draw.problem}
    wrong = []
    for pair in pairing.pairs:
        shape = lanes.get((pair.linen.path, pair.linen.count))
        if shape is None or not _inside(pair.linen.lane, shape):
            wrong.append(str(pair.linen))
    if wrong:
        drawn = ", ".join(f"{path}#{count}{list(shape)}" for (path, count), shape in lanes.items())
        raise DrawError(
            f"The rule book pairs draws that the Linen model does not make in {pairing.kind}: "
            f"{', '.join(wrong)}. It makes: {drawn or 'none'}. Delete that entry of `draws:`; "
            "it will be found again."
        )


def _inside(lane: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return len(lane) == len(shape) and all(k < n for k, n in zip(lane, shape, strict=True))
