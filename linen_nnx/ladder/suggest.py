"""Proposes a rule book for a twin: rules for its leaves, and the pairs of its random draws.

    book = suggest(twin)
    book.save("rules.yaml")      # each rule with its evidence; what is open, with its candidates

The rules are those of `infer.suggest`. With them known, both models are run with dropout on, and
their draws paired (`pairing.py`): for the twin's own call in training, and in evaluation where a
model draws there, too.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import jax

from linen_nnx.book.rules import RuleBook
from linen_nnx.book.tree import flatten
from linen_nnx.errors import Refusal
from linen_nnx.infer import suggest as rules
from linen_nnx.infer.calls import EVALUATION
from linen_nnx.infer.keys import Undrawn, probing
from linen_nnx.infer.twin import Twin
from linen_nnx.ladder.calls import Call
from linen_nnx.ladder.ladder import Ladder, WholeTwin
from linen_nnx.ladder.search import asked_for


def suggest(twin: Twin) -> RuleBook:
    """The rules and the pairs of draws that the evidence proves; the rest in `unassigned`.

    Raises:
      TwinError: when a part of the twin cannot be built or called.
    """
    book = rules.suggest(twin)
    if book.unassigned:
        return book  # the port cannot be filled yet
    notes: list[str] = []
    given = twin.ladder if isinstance(twin, WholeTwin) else None
    ladder = (given or Ladder(twin)).with_rules(book, notes.append)
    for trains in (True, False):
        try:
            call = _call(ladder, trains)
            if not _known(ladder, call) and _draws(ladder, call):
                ladder.find_draws(call)
        except Refusal as refusal:
            notes.append(f"no draws are paired: {refusal}")
        except Exception as error:  # the user's own model: whatever it raises is the reason
            mode = "training" if trains else "evaluation"
            notes.append(f"no draws are paired: in {mode}, {type(error).__name__}: {error}")
    return RuleBook(book.rules, book.unassigned, ladder.pairings.values(), [*book.notes, *notes])


def _call(ladder: Ladder, trains: bool) -> Call:
    """The twin's own call with dropout on or off."""
    function = ladder.entry(None)
    bound = inspect.signature(function).bind_partial(None, *ladder.inputs)
    for name in _flags(function):
        bound.arguments[name] = EVALUATION[name] is not trains
    mutable: Any = ladder.at("linen").mutable or False
    return Call(None, bound.args[1:], dict(bound.kwargs), {}, mutable)


def _draws(ladder: Ladder, call: Call) -> bool:
    """Whether one of the models draws in a call."""
    if asked_for(ladder, call) - {"params"}:
        return True
    forms = ladder.forms("nnx")
    leaves = flatten(ladder.at("nnx").abstract())

    def run(leaves: Any, arrays: Any) -> Any:
        root = ladder.nnx_root(forms, leaves, call, {part: {} for part in forms})
        return jax.tree.leaves(ladder.run_nnx(root, call.joined(arrays, {})))

    try:
        with probing():
            jax.eval_shape(run, leaves, call.arrays)
    except Undrawn:
        return True
    return False


def _known(ladder: Ladder, call: Call) -> bool:
    """Whether its draws are paired: a model without flags has one call for both."""
    return call.kind(ladder.entry(None)).kind in ladder.pairings


def _flags(function: Any) -> Iterator[str]:
    """The arguments that say whether a call trains."""
    return (name for name in inspect.signature(function).parameters if name in EVALUATION)
