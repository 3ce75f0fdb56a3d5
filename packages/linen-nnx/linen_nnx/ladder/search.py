"""Looks for the pairs of a kind of call: both models run on an example, `pairing` compares.

The example is the twin's own where it fits the call, and small; the variables are random.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from linen_nnx.book.draws import Draw, Pairing
from linen_nnx.book.tree import flatten, unflatten
from linen_nnx.infer.float64 import UNOPTIMISED
from linen_nnx.infer.keys import DrawError, aside, is_mutable, probing, typed, watching
from linen_nnx.ladder.calls import Call
from linen_nnx.ladder.feed import Streams, by_part, own_key, streams_of
from linen_nnx.ladder.forms import Leaves
from linen_nnx.ladder.pairing import Match, Side, match
from linen_nnx.ladder.port import values
from linen_nnx.ladder.program import totals

if TYPE_CHECKING:
    from linen_nnx.ladder.ladder import Ladder


class Findings(NamedTuple):
    """The draws of a kind of call.

    problem: why the draws in `pairing.own` have no partner, or empty. linen: all draws of Linen's.
    """

    pairing: Pairing
    problem: str
    linen: tuple[Draw, ...]

    @property
    def own(self) -> str:
        """The draws without a partner, by name, and why."""
        return f"{', '.join(map(str, self.pairing.own))}: {self.problem}"


def search(ladder: "Ladder", call: Call) -> Findings:
    """The draws of a kind of call.

    Raises:
      DrawError: when a model cannot be run.
    """
    function = ladder.entry(call.method)
    kind = call.kind(function)

    def compare() -> tuple[Match, Sequence[Draw]]:
        with probing():
            return _match(ladder, _with_keys(ladder, call.example(function, ladder.inputs)))

    try:
        found, linen = aside(compare)
    except Exception as error:  # the user's own models: whatever they raise, say when
        raise DrawError(
            f"The draws of {kind.kind} cannot be paired, as the models do not run on an example of "
            f"the call: {type(error).__name__}: {error}"
        ) from error
    pairing = replace(kind, pairs=found.pairs, idle=found.idle, own=found.own)
    return Findings(pairing, found.problem if found.own else "", tuple(linen))


def _with_keys(ladder: "Ladder", call: Call) -> Call:
    """The call with a key for each stream that it names; else for each that Linen asks for."""
    # With the streams that a call is given, so that its own trace serves both.
    asked = set(call.rngs) or {"params", *asked_for(ladder, call)}
    return replace(call, rngs=dict.fromkeys(sorted(asked), _a_key()))


def asked_for(ladder: "Ladder", call: Call) -> set[str]:
    """The streams that the Linen model draws from in a call; it is traced, not run."""
    asked: set[str] = set()

    def note(name: str, key: Array) -> Array:
        asked.add(name.split("/")[0])
        return key

    def traced(variables: Any, arrays: list[Any], rngs: Any) -> Any:
        with watching(note):
            return ladder.run_linen(variables, call.joined(arrays, rngs))

    start = dict.fromkeys({"params", *call.rngs}, _a_key())
    jax.eval_shape(traced, unflatten(ladder.linen_specs), call.arrays, start)
    return asked


def _a_key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))


def _match(ladder: "Ladder", call: Call) -> tuple[Match, Sequence[Draw]]:
    """What corresponds, and all draws of the Linen model."""
    variables = sample_variables(ladder)
    one, lost = _linen_side(ladder, call, variables)
    two, uncounted = _nnx_side(ladder, call, ladder.translate(variables, "linen", "nnx"))
    found = match(one, two)
    problem = "; ".join(filter(None, [found.problem, lost if found.own or uncounted else ""]))
    own = (*found.own, *(Draw(path) for path in uncounted))
    problem = problem or "drawn inside a loop of unknown length"
    return found._replace(own=own, problem=problem), one.draws


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
        if call.mutable is False:
            return out
        specs = ladder.book.specs["linen"]
        after = {n: leaf for n, leaf in flatten(nn.unbox(out[1])).items() if n in specs}
        return out[0], _in_order(ladder.translate(after, "linen", "nnx"))

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
        out = ladder.run_nnx(root, call.joined(arrays, {}))
        found, types = values(root)
        after = {ladder.book.name(types[path], path): leaf for path, leaf in found.items()}
        kept = {n: leaf for n, leaf in after.items() if is_mutable(n.split("/")[0], call.mutable)}
        return jax.tree.leaves((out, _in_order(kept)))

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


def _in_order(updates: Leaves) -> list[Array]:
    """What a call has updated, beside its outputs: a mask that statistics alone see shows there."""
    return [updates[name] for name in sorted(updates)]


def _named_keys(call: Call, seeds: Array) -> dict[str, Array]:
    return {name: jax.random.wrap_key_data(seeds[k]) for k, name in enumerate(call.rngs)}


def _plain_keys(rngs: Mapping[str, Any], streams: Streams) -> dict[str, Array]:
    return {path: own_key(rngs, path, lanes) for path, lanes in streams.items()}


def _words() -> int:
    """The number of words in a key of the kind that is in use."""
    return jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape[-1]


def _quick(function: Any) -> Any:
    """The function compiled with the least effort: it runs a few dozen times on a small example."""
    return jax.jit(function, compiler_options=UNOPTIMISED)


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
