"""A twin in training: its own call with dropout on, and what its models draw in it.

    twin.inputs: (x,)      def __call__(self, x, train=False)      the call is (x, train=True)

In evaluation most models draw nothing. So draws are compared in training. `check_draws` says
whether a rule book pairs the right ones. `in_training` makes a twin whose draws all have one key:
then even layers behind a dropout can be compared one by one, whichever draw is whose.
"""

import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import jax

from linen_nnx.book.rules import RuleBook
from linen_nnx.book.tree import flatten
from linen_nnx.errors import Refusal
from linen_nnx.infer.arguments import flat_outputs
from linen_nnx.infer.calls import EVALUATION
from linen_nnx.infer.keys import Undrawn, probing, watching
from linen_nnx.infer.twin import Twin, TwinError
from linen_nnx.ladder.call import Call, is_array
from linen_nnx.ladder.forms import collections_of
from linen_nnx.ladder.ladder import Ladder, WholeTwin
from linen_nnx.ladder.search import Findings, asked_for, search


class DrawCheck(NamedTuple):
    """Whether the draws of a kind of call are those that a rule book pairs.

    passed: None where that was not tried; `notes` say why, or what is wrong.
    """

    kind: str
    passed: bool | None
    notes: tuple[str, ...]


def ladder_of(twin: Twin) -> Ladder:
    """The ladder that a twin of several parts was made of; else a new one over the twin."""
    given = twin.ladder if isinstance(twin, WholeTwin) else None
    return given or Ladder(twin)


def says_its_calls(twin: Twin) -> bool:
    """Whether a twin says itself how its models are called, and so in which mode they are."""
    # `Ladder.twin` gives calls, too, but these leave the mode open.
    return not isinstance(twin, WholeTwin) and bool(twin.call_linen or twin.call_nnx)


def check_draws(twin: Twin, book: RuleBook) -> Iterator[DrawCheck]:
    """Finds the draws of the twin's own call anew, and compares them with the pairs of a book.

    Args:
      twin: both models; they are called in training, and in evaluation where that is another call.
      book: a rule book with `draws`.

    Yields:
      A check for each of these kinds of call in which a model draws. Other kinds that the book
      pairs are yielded as not tried.
    """
    ladder = ladder_of(twin).with_rules(book, lambda text: None)
    tried: set[str] = set()
    # A model without flags has one call for both: the second is not tried again.
    for trains in (True, False):
        kind = "the twin's own call"  # until its arguments are known
        try:
            call = own_call(ladder, trains)
            kind = call.kind(ladder.entry(None)).kind
            if kind not in tried and draws_in(ladder, call):
                yield _compared(ladder, kind, search(ladder, call))
        except Exception as error:  # a rule drops a leaf, say, or the user's own models do not run
            what = "" if isinstance(error, Refusal) else f"{type(error).__name__}: "
            if kind not in tried:
                yield DrawCheck(kind, None, (f"not compared: {what}{error}",))
        tried.add(kind)
    for kind in ladder.pairings:
        if kind not in tried:
            yield DrawCheck(kind, None, ("this is not the twin's own call",))


def _compared(ladder: Ladder, kind: str, found: Findings) -> DrawCheck:
    written = ladder.pairings.get(kind)
    if written is None:
        text = "the rule book pairs no draws of this call: `suggest` writes the pairs"
        return DrawCheck(kind, None, (text,))
    said = {pair.nnx: pair.linen for pair in written.among(found.linen)}
    right = {pair.nnx: pair.linen for pair in found.pairing.pairs}
    wrong: list[str] = []
    for draw in sorted({*said, *right}):
        # A draw that changes nothing may be paired with any.
        if said.get(draw) != right.get(draw) and draw not in found.pairing.idle:
            is_, was = right.get(draw, "no draw of Linen's"), said.get(draw, "nothing")
            wrong.append(f"{draw} is {is_}; the rule book says {was}")
    return DrawCheck(kind, not wrong, tuple(wrong) or (f"{len(right)} draws",))


def in_training(twin: Twin) -> Twin:
    """The twin with both models called in training, each draw of both sides with one key.

    Raises:
      TwinError: when the twin has calls of its own, which say themselves in which mode they are.
    """
    if says_its_calls(twin):
        raise TwinError(
            "this twin says itself how its models are called (call_linen, call_nnx): let these "
            "calls train, or leave them out"
        )
    ladder = ladder_of(twin)
    call = own_call(ladder, True)
    key = jax.random.key(0)  # the one that `infer.trace` gives to each stream of nnx
    # One key for every draw: it gives masks of one shape the same bits on both sides.
    rngs = dict.fromkeys({"params", *asked_for(ladder, call)}, key)

    def call_linen(module: Any, variables: Any, *inputs: Any) -> Any:
        with watching(lambda name, drawn: key):
            return ladder.run_linen(variables, call.joined(_arrays(inputs), rngs))

    def call_nnx(model: Any, *inputs: Any) -> Any:
        return ladder.run_nnx(model, call.joined(_arrays(inputs), {}))

    return replace(twin, call_linen=call_linen, call_nnx=call_nnx)


def _arrays(inputs: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(inputs) if is_array(leaf)]


def own_call(ladder: Ladder, trains: bool) -> Call:
    """The twin's own call in training or in evaluation.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import linen as nn, nnx
      >>> from linen_nnx import Ladder, RuleBook, Twin
      >>> twin = Twin(lambda: nn.Dropout(0.5), lambda rngs: nnx.Dropout(0.5, rngs=rngs),
      ...             lambda: (jnp.ones((4, 2)),))
      >>> own_call(Ladder(twin, RuleBook([])), trains=True).kwargs
      {}
      >>> own_call(Ladder(twin, RuleBook([])), trains=True).args[1:]
      (False,)
    """
    function = ladder.entry(None)
    bound = inspect.signature(function).bind_partial(None, *ladder.inputs)
    for name in _flags(function):
        bound.arguments[name] = EVALUATION[name] is not trains
    # A model in training updates its statistics, which Linen refuses where they are not mutable.
    mutable: Any = statistics(ladder) or False
    return Call(None, bound.args[1:], dict(bound.kwargs), {}, mutable)


def statistics(ladder: Ladder) -> list[str]:
    """The collections that a call in training may update beside the parameters, sorted."""
    return collections_of(ladder.linen_specs)


def draws_in(ladder: Ladder, call: Call) -> bool:
    """Whether one of the models draws in a call; both are traced, neither is run."""
    # Either side may draw alone: a port may have a dropout that Linen lacks.
    if asked_for(ladder, call) - {"params"}:
        return True
    forms = ladder.forms("nnx")
    leaves = flatten(ladder.at("nnx").abstract())

    def run(leaves: Any, arrays: Any) -> Any:
        # Without keys: to draw is an error.
        root = ladder.nnx_root(forms, leaves, call, {part: {} for part in forms})
        return flat_outputs(ladder.run_nnx(root, call.joined(arrays, {})))

    try:
        with probing():
            jax.eval_shape(run, leaves, call.arrays)
    except Undrawn:
        return True
    return False


def _flags(function: Any) -> Iterator[str]:
    """The arguments that say whether a call trains."""
    return (name for name in inspect.signature(function).parameters if name in EVALUATION)
