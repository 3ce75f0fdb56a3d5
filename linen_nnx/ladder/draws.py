"""Gives the streams of an nnx model the keys that its Linen twin would draw.

Which draw is which stands in a `Pairing`, of the rule book or found by `find` (`pairing.py`); the
Linen keys come from a `Program`. A draw without a partner gets keys of its own: a function of the
keys of the call and of its stream's path alone, so that a run that is repeated or resumed draws
them again.
"""

import time
import zlib
from collections.abc import Collection, Mapping
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from linen_nnx.book.draws import Draw, Pairing
from linen_nnx.book.tree import unflatten
from linen_nnx.ladder.calls import Call
from linen_nnx.ladder.forms import WHOLE, Forms, Leaves
from linen_nnx.ladder.keys import DrawError, aside, probing, typed, watching
from linen_nnx.ladder.pairing import Match, Side, match
from linen_nnx.ladder.program import LinenDraw, totals

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
        plain = _own_key(call.rngs, path, lanes)
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


def _own_key(rngs: Mapping[str, Any], path: str, lanes: tuple[int, ...]) -> Array:
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


def find(ladder: "Ladder", call: Call) -> tuple[Pairing, str]:
    """The draws of a kind of call, and a line that says what was found.

    Both models are run on the twin's example, or on random arrays of the call's shapes.
    """
    start = time.monotonic()
    function = ladder.entry(call.method)
    kind = call.kind(function)

    def search() -> Match:
        with probing():
            return _match(ladder, _with_keys(ladder, call.example(function, ladder.inputs)))

    found = aside(search)
    seconds = time.monotonic() - start
    pairing = replace(kind, pairs=found.pairs, idle=found.idle, own=found.own)
    line = f"{kind.kind}: {len(found.pairs)} draws paired with those of the Linen model"
    if found.own:
        some = ", ".join(map(str, found.own[:4])) + (", ..." if len(found.own) > 4 else "")
        line += f"; {len(found.own)} have streams of their own ({found.problem}): {some}"
    return pairing, f"{line} ({seconds:.1f} s)"


def _with_keys(ladder: "Ladder", call: Call) -> Call:
    """The call with a key for each stream that it names or that the Linen model asks for."""
    asked: set[str] = {"params", *call.rngs}

    def note(name: str, key: Array) -> Array:
        asked.add(name.split("/")[0])
        return key

    def traced(variables: Any, arrays: list[Any], rngs: Any) -> Any:
        with watching(note):
            return ladder.run_linen(variables, call.joined(arrays, rngs))

    start = dict.fromkeys({"params", *call.rngs}, _a_key())
    jax.eval_shape(traced, ladder.at("linen").abstract(), call.arrays, start)
    return replace(call, rngs=dict.fromkeys(sorted(asked), _a_key()))


def _a_key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))


def _match(ladder: "Ladder", call: Call) -> Match:
    variables = sample_variables(ladder)
    one, lost = _linen_side(ladder, call, variables)
    two, uncounted = _nnx_side(ladder, call, ladder.translate(variables, "linen", "nnx"))
    found = match(one, two)
    problem = "; ".join(filter(None, [found.problem, lost if found.own or uncounted else ""]))
    own = (*found.own, *(Draw(path) for path in uncounted))
    return found._replace(own=own, problem=problem or "drawn inside a loop of unknown length")


def _linen_side(ladder: "Ladder", call: Call, variables: Leaves) -> tuple[Side, str]:
    """The Linen model with its draws replaced; and which draws are not to be had, and why."""
    program = ladder.program(call)
    fine = [draw for draw in program.draws if not draw.problem]
    draws = [Draw(d.path, d.count, lane) for d in fine for lane in np.ndindex(*d.lanes)]
    words = _words()
    seeds = np.random.default_rng(0).integers(0, 2**32, (len(call.rngs), words), np.uint32)

    def run(new: Array, variables: Any, arrays: Any, seeds: Any, known: Array) -> Any:
        def swap(_: str, key: Array) -> Array:
            # By its value, as a loop's body has one place for the keys of all layers.
            hits = (jax.random.key_data(typed(key))[None] == known).all(-1)
            return jax.random.wrap_key_data(new[jnp.argmax(hits)])

        with watching(swap):
            out = ladder.run_linen(variables, call.joined(arrays, _named_keys(call, seeds)))
        return out if call.mutable is False else out[0]

    def own(seeds: Any) -> Array:
        keys = program.keys(_named_keys(call, seeds))
        flat = [jax.random.key_data(key).reshape(-1, words) for key in keys.values()]
        return jnp.concatenate(flat)

    compiled = _quick(run)
    known = _quick(own)(seeds) if draws else np.zeros((1, words), np.uint32)
    tree = unflatten(variables)

    def outputs(new: Any) -> list[Any]:
        new = new if draws else np.zeros((1, words), np.uint32)
        return jax.tree.leaves(compiled(new, tree, call.arrays, seeds, known))

    lost = "; ".join(f"{draw.path}: {draw.problem}" for draw in program.draws if draw.problem)
    return Side(draws, outputs, words), lost


def _nnx_side(ladder: "Ladder", call: Call, leaves: Leaves) -> tuple[Side, list[str]]:
    """The nnx model with its draws replaced; and the streams whose draws no trace counts."""
    streams = streams_of(ladder, ladder.forms("nnx"))

    def run(keys: Mapping[str, Array], leaves: Any, arrays: Any, mode: str) -> Any:
        feed = by_part(ladder.parts, keys)
        root = ladder.nnx_root(ladder.forms("nnx"), leaves, call, feed, mode)
        return jax.tree.leaves(ladder.run_nnx(root, call.joined(arrays, {})))

    def tagged(leaves: Any, arrays: Any) -> Any:
        return run(_plain_keys({}, streams), leaves, arrays, "tag")

    sizes, uncounted = totals(jax.make_jaxpr(tagged)(leaves, call.arrays))
    draws: list[Draw] = []
    places: dict[str, np.ndarray] = {}
    for path, lanes in streams.items():
        count = sizes[path] // max(prod(lanes), 1)
        if count and path not in uncounted:
            numbers = np.arange(len(draws), len(draws) + prod(lanes) * count)
            places[path] = numbers.reshape(*lanes, count)
            draws += [Draw(path, at[-1], at[:-1]) for at in np.ndindex(*lanes, count)]

    def given(new: Array, leaves: Any, arrays: Any) -> Any:
        keys = jax.random.wrap_key_data(new)
        feed = {path: keys[numbers] for path, numbers in places.items()}
        return run({**_plain_keys({}, streams), **feed}, leaves, arrays, "plain")

    compiled = _quick(given)
    side = Side(draws, lambda new: compiled(new, leaves, call.arrays), _words())
    return side, sorted(uncounted & set(streams))


def _named_keys(call: Call, seeds: Array) -> dict[str, Array]:
    return {name: jax.random.wrap_key_data(seeds[k]) for k, name in enumerate(call.rngs)}


def _plain_keys(rngs: Mapping[str, Any], streams: Streams) -> dict[str, Array]:
    return {path: _own_key(rngs, path, lanes) for path, lanes in streams.items()}


def _words() -> int:
    """The number of words in a key of the kind that is in use."""
    return jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape[-1]


def _quick(function: Any) -> Any:
    """The function compiled with the least effort: it runs a few dozen times on a small example."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def sample_variables(ladder: "Ladder") -> Leaves:
    """Variables to try draws with: random numbers, so that no layer that starts at 0 hides them.

    What is no float (a mask, a counter) is as the Linen model's init has it.
    """
    specs = ladder.book.specs["linen"]
    fixed = [name for name, spec in specs.items() if not jnp.issubdtype(spec.dtype, jnp.floating)]
    result: Leaves = {}
    if fixed:

        def start() -> Leaves:
            leaves = ladder.first_leaves()
            return {name: leaves[name] for name in fixed}

        result.update(_quick(start)())
    random = np.random.default_rng(0)
    for name, spec in specs.items():
        if name in result:
            continue
        if len(spec.shape) < 2 or not name.startswith("params/"):  # scales, biases, variances
            values = random.uniform(0.5, 1.5, spec.shape)
        else:
            values = random.normal(size=spec.shape) / np.sqrt(prod(spec.shape[:-1]))
        result[name] = np.asarray(values, spec.dtype)
    return result
