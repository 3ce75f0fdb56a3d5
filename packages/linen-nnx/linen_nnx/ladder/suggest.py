"""Proposes a rule book for a twin: rules for its leaves, and the pairs of its random draws.

    book = suggest(twin)
    book.save("rules.yaml")      # each rule with its evidence; what is open, with its candidates

The rules are those of `infer.suggest`. With them both models can be run on the same variables with
dropout on, and their draws be paired (`search`): for the twin's own call in training, and for the
one in evaluation where a model draws there, too.
"""

from linen_nnx.book.rules import RuleBook
from linen_nnx.errors import Refusal
from linen_nnx.infer import suggest as rules
from linen_nnx.infer.twin import Twin
from linen_nnx.ladder.call import Call
from linen_nnx.ladder.draw_families import in_families
from linen_nnx.ladder.ladder import Ladder
from linen_nnx.ladder.training import (
    draws_in,
    in_training,
    ladder_of,
    own_call,
    says_its_calls,
    statistics,
)


def suggest(
    twin: Twin, say: rules.Say = rules.silent, progress: rules.Say = rules.silent
) -> RuleBook:
    """The rules and the pairs of draws that the evidence proves; the rest in `unassigned`.

    Args:
      twin: both models, and an example of their inputs.
      say: is told, before the work starts, how much memory it will take, from 1 GB on.
      progress: is told what is being done, a few words each time.

    Raises:
      TwinError: when a part of the twin cannot be built or called.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import linen as nn, nnx
      >>> from linen_nnx import Twin
      >>> twin = Twin(lambda: nn.Dense(3), lambda rngs: nnx.Linear(2, 3, rngs=rngs),
      ...             lambda: (jnp.ones((1, 2)),))
      >>> [str(rule) for rule in suggest(twin).rules]
      ['`params/kernel` <-> `kernel`', '`params/bias` <-> `bias`']
    """
    book = rules.suggest(twin, say, progress)
    if book.unassigned:
        book = _seen_in_training(twin, book)
    if book.unassigned:
        # Without a rule for each leaf the port has no weights, and cannot be run beside Linen.
        return book
    notes: list[str] = []
    ladder = ladder_of(twin).with_rules(book, notes.append)
    for trains in (True, False):
        progress(f"pairing draws in {'training' if trains else 'evaluation'}")
        try:
            call = own_call(ladder, trains)
            if not _known(ladder, call) and draws_in(ladder, call):
                found = ladder.find_draws(call)
                # Short, so that the book fits a model of another depth as well.
                ladder.pairings[found.pairing.kind] = in_families(found.pairing, found.linen)
        # The rules hold whatever becomes of the draws, so nothing here ends the search.
        except Refusal as refusal:
            notes.append(f"no draws are paired: {refusal}")
        except Exception as error:  # the user's own model: whatever it raises is the reason
            mode = "training" if trains else "evaluation"
            notes.append(f"no draws are paired: in {mode}, {type(error).__name__}: {error}")
    return RuleBook(book.rules, book.unassigned, ladder.pairings.values(), [*book.notes, *notes])


def _seen_in_training(twin: Twin, book: RuleBook) -> RuleBook:
    """The rules that training proves, where evaluation leaves more leaves open.

    A head whose output nobody uses updates the statistics of its norms all the same, and these are
    compared; but it does so in training alone.
    """
    if says_its_calls(twin):
        return book
    try:
        if not statistics(ladder_of(twin)):
            return book
        found = rules.suggest(in_training(twin))
    except Exception as error:  # the user's own model: whatever it raises is the reason
        note = f"in training nothing more is proven: {type(error).__name__}: {error}"
        return RuleBook(book.rules, book.unassigned, (), [*book.notes, note])
    # Rules come from one call or the other, never from both: their evidence must fit together.
    if len(found.unassigned) >= len(book.unassigned):
        return rules.with_updates(in_training(twin), book)
    count = len(book.unassigned) - len(found.unassigned)
    note = f"{count} leaves that no output sees in evaluation are proven by what training updates"
    return RuleBook(found.rules, found.unassigned, (), [*found.notes, note])


def _known(ladder: Ladder, call: Call) -> bool:
    """Whether its draws are paired: a model without flags has one call for both."""
    return call.kind(ladder.entry(None)).kind in ladder.pairings
