"""Proposes a rule book for a twin: rules for its leaves, and the pairs of its random draws.

    book = suggest(twin)
    book.save("rules.yaml")      # each rule with its evidence; what is open, with its candidates

The rules are those of `infer.suggest`. With them known, both models are run with dropout on, and
their draws paired (`pairing.py`): for the twin's own call in training, and in evaluation where a
model draws there, too.
"""

from linen_nnx.book.rules import RuleBook
from linen_nnx.errors import Refusal
from linen_nnx.infer import suggest as rules
from linen_nnx.infer.twin import Twin
from linen_nnx.ladder.alike import in_families
from linen_nnx.ladder.calls import Call
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
    """
    book = rules.suggest(twin, say, progress)
    if book.unassigned:
        book = _seen_in_training(twin, book)
    if book.unassigned:
        return book  # the port cannot be filled yet
    notes: list[str] = []
    ladder = ladder_of(twin).with_rules(book, notes.append)
    for trains in (True, False):
        progress(f"pairing draws in {'training' if trains else 'evaluation'}")
        try:
            call = own_call(ladder, trains)
            if not _known(ladder, call) and draws_in(ladder, call):
                found = ladder.find_draws(call)
                ladder.pairings[found.pairing.kind] = in_families(found.pairing, found.linen)
        except Refusal as refusal:
            notes.append(f"no draws are paired: {refusal}")
        except Exception as error:  # the user's own model: whatever it raises is the reason
            mode = "training" if trains else "evaluation"
            notes.append(f"no draws are paired: in {mode}, {type(error).__name__}: {error}")
    return RuleBook(book.rules, book.unassigned, ladder.pairings.values(), [*book.notes, *notes])


def _seen_in_training(twin: Twin, book: RuleBook) -> RuleBook:
    """The rules that training proves, where evaluation leaves more of them open.

    A head whose output nobody uses still updates the statistics of its norms, but in training only.
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
    if len(found.unassigned) >= len(book.unassigned):
        return book
    count = len(book.unassigned) - len(found.unassigned)
    note = f"{count} leaves that no output sees in evaluation are proven by what training updates"
    return RuleBook(found.rules, found.unassigned, (), [*found.notes, note])


def _known(ladder: Ladder, call: Call) -> bool:
    """Whether its draws are paired: a model without flags has one call for both."""
    return call.kind(ladder.entry(None)).kind in ladder.pairings
