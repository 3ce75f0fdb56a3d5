"""Says what of a draft does not fit: its moves against each other, the book and the target tree.

Every problem is a sentence that names a leaf, with a suggestion where one is near: the pattern that
almost matches, the collection that is missing, the letter that should be a name.
"""

import difflib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from linen_nnx.book.grammar import did_you_mean
from linen_nnx.book.index import Hit
from linen_nnx.book.moves import Move
from linen_nnx.book.patterns import Pattern, is_integer
from linen_nnx.book.plan_draft import Draft
from linen_nnx.book.specs import Spec
from linen_nnx.errors import quoted

# Names compared for suggestions, which takes difflib about two seconds. A book that is for quite
# another model would compare thousands of leaves with thousands of patterns.
_COMPARED = 50_000


def check(draft: Draft, partial: bool) -> None:
    """Adds the problems of a draft whose moves are all made.

    Args:
      draft: the draft.
      partial: whether leaves may be left over on either side, and rules match nothing.
    """
    suggestions = _Suggestions(draft)
    written: dict[str, Spec] = {}
    for move in draft.moves:
        for path, spec in zip(move.targets, move.specs, strict=True):
            _check_target(draft, suggestions, move, path, spec, is_written=path in written)
            written[path] = spec
    draft.report_ambiguous()
    if partial:
        return
    unfilled = [path for path in draft.target or () if path not in written]
    suggestions.report_unmatched(unfilled)
    _report_unused(draft)
    _report_unfilled(draft, draft.target or {}, unfilled)


def _check_target(
    draft: Draft,
    suggestions: "_Suggestions",
    move: Move[str, str],
    path: str,
    spec: Spec,
    is_written: bool,
) -> None:
    if not path:
        draft.problems.append(f"{_origin(move)} would get an empty path from {move.rule}")
        return
    if is_written:
        draft.problems.append(f"two sources for `{path}`: the second is {_origin(move)}")
    # On the way back two rules would match it.
    hits = draft.hits(draft.to, path)
    if len(hits) > 1:
        draft.note_ambiguous(draft.to, path, hits)
    if draft.target is None:
        return
    due = draft.target.get(path)
    if due is None:
        near = suggestions.target_near(path, draft.target)
        draft.problems.append(f"{_origin(move)} becomes `{path}`, which the target lacks{near}")
    elif not due.same(spec):
        draft.problems.append(
            f"`{path}` would be {spec} (from {_origin(move)}), but the target wants {due}"
        )


def _origin(move: Move[str, str]) -> str:
    """The first sources of a move, for a message."""
    return quoted(move.sources[:3]) or "an init rule"


def _report_unused(draft: Draft) -> None:
    busy = draft.used | draft.broken
    for number, rule in enumerate(draft.rules):
        here = rule.side(draft.side)
        # A rule that drops a leaf of the other side has nothing to do on this way.
        if number not in busy and (here or rule.init):
            side = draft.side if here else draft.to
            draft.problems.append(f"{draft.name(number)} matches no {side} leaf")


def _report_unfilled(draft: Draft, target: Mapping[str, Spec], unfilled: list[str]) -> None:
    for path in unfilled:
        hits = draft.hits(draft.to, path)
        if any(hit.rule in draft.broken for hit in hits):
            continue
        what = f"nothing fills the {draft.to} leaf `{path}` ({target[path]})"
        whys = [_why_idle(draft, hit) for hit in hits] or ["no rule matches it"]
        draft.problems += [f"{what}: {why}" for why in whys]


def _why_idle(draft: Draft, hit: Hit) -> str:
    """Why a rule fills nothing, though it matches the target leaf."""
    parts = draft.rules[hit.rule].side(draft.side)
    if not parts:
        return f"rule {hit.rule + 1} drops it; use `init` if it is to be filled on this way"
    missing = " + ".join([f"`{_format_known(part.text, hit.captures)}`" for part in parts])
    return f"rule {hit.rule + 1} would, but the source has no {missing}"


def _format_known(text: str, captures: Mapping[str, str]) -> str:
    """A pattern with the captures that are known filled in; a stacked one stays: `l_{i}/kernel`."""
    for name, value in captures.items():
        text = text.replace(f"{{{name}}}", value).replace(f"{{{name}...}}", value)
    return text


class _Suggestions:
    """Suggestions for the leaves that do not fit, as far as there is time to look for them."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._compared = 0

    def _may_compare(self, names: Collection[Any]) -> bool:
        """Whether a suggestion from so many names is still to be had in reasonable time."""
        self._compared += len(names)
        return self._compared <= _COMPARED

    def target_near(self, path: str, target: Collection[str]) -> str:
        """The leaf of the target that a path may have been meant for."""
        return did_you_mean(path, target) if self._may_compare(target) else ""

    def report_unmatched(self, unfilled: list[str]) -> None:
        """Adds a problem for each source leaf that no rule matches."""
        draft = self._draft
        if not draft.unmatched:
            return
        hint = self._collection_hint()
        patterns: list[Pattern] = []
        for number, rule in enumerate(draft.rules):
            if number not in draft.used:
                patterns += rule.side(draft.side)
        for path in draft.unmatched:
            near = hint
            if not hint and self._may_compare([*patterns, *unfilled]):
                near = _letter_for_a_name(path, patterns) or self._nearest(path, patterns, unfilled)
            draft.problems.append(
                f"no rule matches the {draft.side} leaf `{path}` ({draft.source[path]}){near}"
            )

    def _collection_hint(self) -> str:
        """Whether all unmatched Linen leaves would match with a collection added or removed."""
        draft = self._draft
        if draft.side != "linen":
            return ""
        heads = set()
        for rule in draft.rules:
            heads.update([pattern.text.split("/")[0] for pattern in rule.linen])
        for head in sorted(heads):
            if all(draft.hits("linen", f"{head}/{path}") for path in draft.unmatched):
                return f"; with the level `{head}` in front it would match: is it missing?"
        if all("/" in p and draft.hits("linen", p.split("/", 1)[1]) for p in draft.unmatched):
            return "; without its first level it would match: is there one too many?"
        return ""

    def _nearest(self, path: str, patterns: list[Pattern], unfilled: list[str]) -> str:
        """The nearest idle pattern of this side, else the nearest open leaf of the other."""
        draft = self._draft
        texts = [pattern.text for pattern in patterns]
        if near := difflib.get_close_matches(path, texts, n=1):
            return f"; the nearest idle pattern is `{near[0]}`"
        target, spec = draft.target or {}, draft.source[path]
        fits = [open_path for open_path in unfilled if target[open_path].same(spec)]
        # Names of the two frameworks differ more than a typing error does.
        near = difflib.get_close_matches(path, fits, n=1, cutoff=0.4)
        return f"; the nearest open {draft.to} leaf is `{near[0]}`" if near else ""


def _letter_for_a_name(path: str, patterns: Iterable[Pattern]) -> str:
    """Whether an idle pattern would match, were its captures of one letter names."""
    for pattern in patterns:
        letters = [name for name in pattern.captures if is_integer(name)]
        if not letters:
            continue
        longer = pattern.text
        for name in letters:
            longer = longer.replace(f"{{{name}}}", f"{{{name}_name}}")
        # Two letters in one element would be two names in one, which no pattern may have.
        try:
            fits = Pattern(longer).match(path) is not None
        except ValueError:
            continue
        if fits:
            shown = " and ".join([f"`{{{name}}}`" for name in letters])
            name = letters[0]
            return (
                f"; `{pattern.text}` would match it, but {shown}, one letter, matches integers "
                f"only: write `{{{name}{name}}}`, or a longer name, for a path element"
            )
    return ""
