"""Makes a list of rules short: one rule with captures where many differ by an index or a name.

    params/Block_0/Dense_0/kernel <-> blocks/0/up/kernel
    params/Block_0/Dense_0/bias   <-> blocks/0/up/bias      =>  params/Block_{i}/Dense_0/{leaf}
    params/Block_1/Dense_0/kernel <-> blocks/1/up/kernel        <-> blocks/{i}/up/{leaf}
    params/Block_1/Dense_0/bias   <-> blocks/1/up/bias

    >>> from linen_nnx.infer.found import rule_of
    >>> rules = []
    >>> for block, leaf in (("0", "kernel"), ("0", "bias"), ("1", "kernel"), ("1", "bias")):
    ...     linen, nnx = [f"params/Block_{block}/Dense_0/{leaf}"], [f"blocks/{block}/up/{leaf}"]
    ...     rules.append(
    ...         FoundRule(rule_of(linen, nnx, ()), frozenset(linen), frozenset(nnx), ())
    ...     )
    >>> leaves = [[path for each in rules for path in each.linen]]
    >>> leaves.append([path for each in rules for path in each.nnx])
    >>> [str(found.rule) for found in compress(rules, *leaves)]
    ['`params/Block_{i}/Dense_0/{leaf}` <-> `blocks/{i}/up/{leaf}`']

Integers are merged first, then names. Rules are merged only where the shorter one matches exactly
the leaves of the rules that it stands for: were there a `params/Block_2/Dense_0/kernel` without a
rule, the four rules above would stay four.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from linen_nnx.book.ops import Op, Stack
from linen_nnx.book.patterns import Pattern
from linen_nnx.infer.assign import Pair
from linen_nnx.infer.found import FoundRule, rule_of

_LETTERS = "ijklmnopqrstuvwxyz"
_NAMES = ("name", "part", "piece", "element")
Texts = tuple[tuple[str, ...], tuple[str, ...]]
"""The patterns of a rule's Linen and nnx side, as text."""
AllPaths = tuple[Sequence[str], Sequence[str]]
"""The paths of all Linen leaves and of all nnx leaves."""


def compress(
    rules: Sequence[FoundRule], linen: Iterable[str], nnx: Iterable[str]
) -> list[FoundRule]:
    """Merges rules that differ by an index or a name; the example above shows how.

    Args:
      rules: rules without notes, whose patterns match no leaf in common.
      linen, nnx: the paths of all leaves of the two models.

    Returns:
      rules for the same leaves, in the order of the first leaf of each.
    """
    leaves = tuple(linen), tuple(nnx)
    groups: dict[Any, list[FoundRule]] = {}
    for found in rules:
        alike = _replaced(_texts(found), r"\d+", "#"), found.rule.ops
        groups.setdefault(alike, []).append(found)
    result: list[FoundRule] = []
    for group in groups.values():
        result += _merged_by_number(group, leaves)
    # Each round merges by one path element; `{name}/{leaf}` takes two.
    while len(shorter := _merged_by_name(result, leaves)) < len(result):
        result = shorter
    place: dict[str, int] = {}
    for number, found in enumerate(rules):
        place |= dict.fromkeys(found.linen, number)
    return sorted(result, key=lambda found: min(place[path] for path in found.linen))


def _texts(found: FoundRule) -> Texts:
    """The patterns of a rule as text."""
    linen = tuple(pattern.text for pattern in found.rule.linen)
    nnx = tuple(pattern.text for pattern in found.rule.nnx)
    return linen, nnx


# By number


def _merged_by_number(rules: list[FoundRule], leaves: AllPaths) -> list[FoundRule]:
    """Rules that differ by integers alone, merged where these are the same on both sides."""
    if len(rules) == 1:
        return rules
    # One row for each rule, one column for each place where an integer stands.
    rows = [re.findall(r"\d+", _joined(_texts(found))) for found in rules]
    columns = list(zip(*rows, strict=True))
    varying = [k for k, column in enumerate(columns) if len(set(column)) > 1]
    merged = _merged(rules, _captured(rules[0], columns, varying), leaves)
    if merged is not None:
        return [merged]
    # They cannot all be one rule. So they are parted by one of their integers, and each part is
    # tried again.
    by = _number_to_part_by(rules[0], columns, varying)
    parts: dict[str, list[FoundRule]] = {}
    for found, row in zip(rules, rows, strict=True):
        parts.setdefault(row[by], []).append(found)
    result: list[FoundRule] = []
    for part in parts.values():
        result += _merged_by_number(part, leaves)
    return result


def _captured(
    found: FoundRule, columns: Sequence[tuple[str, ...]], varying: Sequence[int]
) -> Texts:
    """The patterns of a rule with a capture for each integer that varies.

    Integers that vary alike get one letter: it is the same index, on both sides.
    """
    texts = _texts(found)
    used = set(re.findall(r"\{(\w)\}", _joined(texts))) | _stacked(found.rule.ops)
    free = iter(letter for letter in _LETTERS if letter not in used)
    letters: dict[tuple[str, ...], str] = {}
    for k in varying:
        if columns[k] not in letters:
            letters[columns[k]] = next(free)
    filled: list[str] = []
    for column in columns:
        filled.append(f"{{{letters[column]}}}" if column in letters else column[0])
    # `re.sub` comes by the integers in the order of the columns.
    rest = iter(filled)
    return _replaced(texts, r"\d+", lambda _: next(rest))


def _number_to_part_by(
    found: FoundRule, columns: Sequence[tuple[str, ...]], varying: Sequence[int]
) -> int:
    """The column of integers by which rules are parted that cannot be merged.

    First by one that varies on one side alone: where `Dense_0` is `up1` and `Dense_1` is `down2`,
    no capture can say so, but within either all blocks have one rule. Parting by block first would
    give each block rules of its own (40 rules for a convnet that needs 22).
    """
    on_linen = len(re.findall(r"\d+", "\n".join(_texts(found)[0])))
    for k in varying:
        sides: set[bool] = set()
        for other in varying:
            if columns[other] == columns[k]:
                sides.add(other < on_linen)
        if len(sides) == 1:
            return k
    return varying[0]


# By name


def _merged_by_name(rules: list[FoundRule], leaves: AllPaths) -> list[FoundRule]:
    """Rules that differ by one path element, the same on both sides, merged; one round."""
    # By what a rule is once a word is a capture: the words, and the number of each one's rule.
    groups: dict[Any, dict[str, int]] = {}
    for number, found in enumerate(rules):
        for word in _shared_words(_texts(found)):
            alike = _with_capture(_texts(found), word), found.rule.ops
            groups.setdefault(alike, {})[word] = number
    result: dict[int, FoundRule] = dict(enumerate(rules))
    for (texts, _), members in sorted(groups.items(), key=lambda group: -len(group[1])):
        numbers = sorted(set(members.values()) & set(result))
        # A rule that was merged in this round no longer has the word that it was grouped by.
        if len(numbers) < 2 or any(result[k] is not rules[k] for k in numbers):
            continue
        merged = _merged([rules[k] for k in numbers], texts, leaves)
        if merged is not None:
            for number in numbers[1:]:
                del result[number]
            result[numbers[0]] = merged
    return list(result.values())


def _shared_words(texts: Texts) -> set[str]:
    """The path elements that stand in every pattern of a rule, on both sides.

    But for the root of an nnx path: it may name a part of the model, and rules of different parts
    are told apart.
    """
    shared = set(texts[0][0].split("/"))
    for text in (*texts[0], *texts[1]):
        shared &= set(text.split("/"))
    for text in texts[1]:
        root, _, _ = text.partition("/")
        shared.discard(root)
    return {word for word in shared if "{" not in word}


def _with_capture(texts: Texts, word: str) -> Texts:
    """The texts with a capture in place of a path element: `{leaf}` at the end, `{name}` before."""
    is_last = all(text.split("/")[-1] == word for text in (*texts[0], *texts[1]))
    name = "leaf" if is_last else _free_name(_joined(texts), word)
    return _replaced(texts, rf"(?<![^/]){re.escape(word)}(?![^/])", f"{{{name}}}")


def _free_name(taken: str, word: str) -> str:
    """A name for a capture that no pattern has yet; the word itself if there is none left."""
    for name in _NAMES:
        if f"{{{name}}}" not in taken:
            return name
    return word


# Both


def _merged(rules: list[FoundRule], texts: Texts, leaves: AllPaths) -> FoundRule | None:
    """One rule for all, if its patterns match their leaves and no others."""
    try:
        rule = rule_of(*texts, rules[0].rule.ops)
    except ValueError:
        return None
    linen, nnx = set[str](), set[str]()
    evidence: list[Pair] = []
    reasons: dict[str, None] = {}  # each once, in order
    for found in rules:
        linen |= found.linen
        nnx |= found.nnx
        evidence += found.evidence
        reasons |= dict.fromkeys(found.reasons)
    if not _matches(rule.linen, leaves[0], linen) or not _matches(rule.nnx, leaves[1], nnx):
        return None
    return FoundRule(rule, frozenset(linen), frozenset(nnx), tuple(evidence), tuple(reasons))


def _matches(patterns: Iterable[Pattern], paths: Iterable[str], due: set[str]) -> bool:
    """Whether some patterns match the paths that are due, each once, and no others."""
    hits: list[str] = []
    for path in paths:
        for pattern in patterns:
            if pattern.match(path) is not None:
                hits.append(path)
    return len(hits) == len(due) and set(hits) == due


def _replaced(texts: Texts, pattern: str, new: str | Callable[[Any], str]) -> Texts:
    """The texts of both sides after `re.sub`, Linen first."""
    linen = tuple(re.sub(pattern, new, text) for text in texts[0])
    return linen, tuple(re.sub(pattern, new, text) for text in texts[1])


def _joined(texts: Texts) -> str:
    """All patterns in one text, line by line."""
    return "\n".join((*texts[0], *texts[1]))


def _stacked(ops: tuple[Op, ...]) -> set[str]:
    """The letters that a rule's stacks count by."""
    return {op.capture for op in ops if isinstance(op, Stack)}
