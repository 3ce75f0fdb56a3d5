"""Looks for the pairs of a kind of call: both models are run on an example, and compared.

`pairing` compares two models that are functions of the keys of their draws. Here the two functions
are made. For a twin of two layers of dropout, which Linen draws as `a` and `b`:

    Linen   program.keys({"dropout": k})   gives the keys [ka, kb] that it draws from k
            the call is run with k, and each key that is drawn is looked up among [ka, kb]:
            it is the second one, so the second new key takes its place

    nnx     the port is traced with its draws tagged; each stream is drawn from so and so often:
            u/rngs twice, say, in three layers: 6 draws, numbers 0 to 5
            the port is filled with the new keys as the keys of its streams, `(*lanes, draws)`:
            [[0, 1], [2, 3], [4, 5]] says which draw of which layer gets which of the new keys

A Linen key is known by its value and not by its name, as inside a loop one place in the code draws
the keys of all layers.

The example is the twin's own where it fits the call, and small; the variables are random:

    >>> from linen_nnx import Ladder, RuleBook, Twin
    >>> from flax import nnx
    >>> class Linen(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         a = nn.Dropout(0.5, deterministic=False, name="a")(x)
    ...         return a - 2 * nn.Dropout(0.5, deterministic=False, name="b")(x)
    >>> class Nnx(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.u = nnx.Dropout(0.5, deterministic=False, rngs=rngs.fork())
    ...         self.v = nnx.Dropout(0.5, deterministic=False, rngs=rngs.fork())
    ...     def __call__(self, x):
    ...         return self.v(x) - 2 * self.u(x)
    >>> ladder = Ladder(Twin(Linen, Nnx, lambda: (jnp.ones((4, 8)),)), RuleBook([]))
    >>> found = search(ladder, Call(args=(jnp.ones((4, 8)),)))
    >>> for pair in found.pairing.pairs:
    ...     print(pair.linen, "is", pair.nnx)
    dropout/b is u/rngs
    dropout/a is v/rngs
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
from linen_nnx.infer.arguments import flat_outputs
from linen_nnx.infer.float64 import UNOPTIMISED
from linen_nnx.infer.keys import DrawError, aside, is_mutable, probing, typed, watching
from linen_nnx.ladder.call import Call
from linen_nnx.ladder.feed import Streams, by_part, own_key, streams_of
from linen_nnx.ladder.pairing import KeyedModel, Match, match
from linen_nnx.ladder.port import Leaves, values
from linen_nnx.ladder.program import totals

if TYPE_CHECKING:
    from linen_nnx.ladder.ladder import Ladder


class Findings(NamedTuple):
    """The draws of a kind of call.

    problem: why the draws in `pairing.own` have no partner, or empty. linen: every draw of the
    Linen model.
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

    Args:
      ladder: whose rules are known, so that both models can be run on the same variables.
      call: one call of that kind; of its arrays shape and dtype count.

    Raises:
      DrawError: when a model cannot be run.
    """
    function = ladder.entry(call.method)
    kind = call.kind(function)

    def compare() -> tuple[Match, Sequence[Draw]]:
        with probing():
            return _match(ladder, _with_keys(ladder, call.example(function, ladder.inputs)))

    try:
        # The call that asks may itself be under `jax.jit`; these runs must not be.
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
    # A call that names its streams keeps them: it has been traced with these, and the trace is
    # looked up by their names.
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
            return flat_outputs(ladder.run_linen(variables, call.joined(arrays, rngs)))

    # Linen falls back to the stream `params` where it is given no other, so this one will do.
    start = dict.fromkeys({"params", *call.rngs}, _a_key())
    jax.eval_shape(traced, unflatten(ladder.linen_specs), call.arrays, start)
    return asked


def _a_key() -> Any:
    """A typed key as `jax.ShapeDtypeStruct`."""
    return jax.eval_shape(lambda: jax.random.key(0))


def _match(ladder: "Ladder", call: Call) -> tuple[Match, Sequence[Draw]]:
    """What corresponds, and all draws of the Linen model."""
    variables = sample_variables(ladder)
    linen, unknown = _linen_model(ladder, call, variables)
    translated = ladder.translate(variables, "linen", "nnx")
    leaves = {**ladder.book.filled(ladder.forms("nnx")), **translated}
    nnx, uncounted = _nnx_model(ladder, call, leaves)
    found = match(linen, nnx)
    # A Linen draw whose key is not known explains why a draw of the port finds no partner.
    reasons = [found.problem]
    if found.own or uncounted:
        reasons.append(unknown)
    problem = "; ".join(filter(None, reasons)) or "drawn inside a loop of unknown length"
    own = (*found.own, *map(Draw, uncounted))
    return found._replace(own=own, problem=problem), linen.draws


def _linen_model(ladder: "Ladder", call: Call, variables: Leaves) -> tuple[KeyedModel, str]:
    """The Linen model as a function of its draws' keys; and which keys are not known, and why."""
    program = ladder.program(call)
    draws: list[Draw] = []
    problems: list[str] = []
    for draw in program.draws:
        if draw.problem:
            problems.append(f"{draw.path}: {draw.problem}")
        else:
            draws += [Draw(draw.path, draw.count, lane) for lane in np.ndindex(*draw.lanes)]
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
            return flat_outputs(out)
        outputs, updates = out
        specs = ladder.book.specs["linen"]
        after = {n: leaf for n, leaf in flatten(nn.unbox(updates)).items() if n in specs}
        return [*flat_outputs(outputs), *_in_order(ladder.translate(after, "linen", "nnx"))]

    def own_keys(seeds: Any) -> Array:
        """The keys that the model draws from these seeds, `(len(draws), words)`."""
        keys = program.keys(_named_keys(call, seeds))
        flat = [jax.random.key_data(key).reshape(-1, words) for key in keys.values()]
        return jnp.concatenate(flat)

    compiled = _quick(run)
    # Of a model that draws nothing one row stands for all, since an argmax of none is an error.
    no_keys = np.zeros((1, words), np.uint32)
    known = _quick(own_keys)(seeds) if draws else no_keys
    tree = unflatten(variables)

    def outputs(new: Any) -> list[Any]:
        given = new if draws else no_keys
        return compiled(given, tree, call.arrays, seeds, known)

    return KeyedModel(draws, outputs, words), "; ".join(problems)


def _nnx_model(ladder: "Ladder", call: Call, leaves: Leaves) -> tuple[KeyedModel, list[str]]:
    """The nnx model as a function of its draws' keys; and the streams that no trace can count."""
    forms = ladder.forms("nnx")
    streams = streams_of(ladder, forms)

    def run(keys: Mapping[str, Array], leaves: Any, arrays: Any, mode: str) -> Any:
        root = ladder.nnx_root(forms, leaves, call, by_part(ladder.parts, keys), mode)
        outputs = ladder.run_nnx(root, call.joined(arrays, {}))
        found, types = values(root)
        updates: Leaves = {}
        for path, leaf in found.items():
            name = ladder.book.name(types[path], path)
            if is_mutable(name.split("/")[0], call.mutable):
                updates[name] = leaf
        return [*flat_outputs(outputs), *_in_order(updates)]

    def tagged(leaves: Any, arrays: Any) -> Any:
        return run(_plain_keys(streams), leaves, arrays, "tag")

    sizes, uncounted = totals(jax.make_jaxpr(tagged)(leaves, call.arrays))
    draws: list[Draw] = []
    places: dict[str, np.ndarray] = {}  # of the keys of each stream, among all
    for path, lanes in streams.items():
        # The tag counts the keys of all lanes together; each lane draws equally often.
        count = sizes[path] // max(prod(lanes), 1)
        if count and path not in uncounted:
            numbers = np.arange(len(draws), len(draws) + prod(lanes) * count)
            places[path] = numbers.reshape(*lanes, count)
            draws += [Draw(path, at[-1], at[:-1]) for at in np.ndindex(*lanes, count)]

    def given(new: Array, leaves: Any, arrays: Any) -> Any:
        own = jax.random.wrap_key_data(new)
        keys = _plain_keys(streams)
        for path, numbers in places.items():
            keys[path] = own[numbers]
        return run(keys, leaves, arrays, "plain")

    compiled = _quick(given)
    model = KeyedModel(draws, lambda new: compiled(new, leaves, call.arrays), _words())
    return model, sorted(uncounted & set(streams))


def _in_order(updates: Leaves) -> list[Array]:
    """What a call has updated, to be compared beside its outputs.

    A mask on an output that nobody uses shows in the statistics of the norm behind it alone.
    """
    return [updates[name] for name in sorted(updates)]


def _named_keys(call: Call, seeds: Array) -> dict[str, Array]:
    return {name: jax.random.wrap_key_data(seeds[k]) for k, name in enumerate(call.rngs)}


def _plain_keys(streams: Streams) -> dict[str, Array]:
    """For each stream keys of its own, of the shape `lanes`."""
    return {path: own_key({}, path, lanes) for path, lanes in streams.items()}


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
        if len(spec.shape) < 2 or not name.startswith("params/"):
            # Scales, biases, variances: near 1, as a negative variance has no root.
            numbers = random.uniform(0.5, 1.5, spec.shape)
        else:
            # Kernels: as large as keeps the size of what goes through them.
            numbers = random.normal(size=spec.shape) / np.sqrt(prod(spec.shape[:-1]))
        result[name] = np.asarray(numbers, spec.dtype)
    return result
