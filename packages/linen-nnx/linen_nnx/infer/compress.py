"""Makes a list of rules short: one rule with captures where many differ by an index or a name.

    params/Block_0/Dense_0/kernel <-> blocks/0/up/kernel
    params/Block_0/Dense_0/bias   <-> blocks/0/up/bias      =>  params/Block_{i}/Dense_0/{leaf}
    params/Block_1/...                                          <-> blocks/{i}/up/{leaf}

Rules are merged only where the shorter one matches exactly the leaves of the rules it stands for.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from linen_nnx.book.grammar import Rule
from linen_nnx.book.ops import Op, Stack
from linen_nnx.book.patterns import Pattern
from linen_nnx.infer.found import FoundRule

_LETTERS = "ijklmnopqrstuvwxyz"
_NAMES = ("name", "part", "piece", "element")
Texts = tuple[tuple[str, ...], tuple[str, ...]]


def _texts(found: FoundRule) -> Texts:
    """The patterns of both sides, as text."""
    linen = tuple(pattern.text for pattern in found.rule.linen)
    return linen, tuple(pattern.text for pattern in found.rule.nnx)


def compress(
    items: Sequence[FoundRule], linen: Iterable[str], nnx: Iterable[str]
) -> list[FoundRule]:
    """Fewer rules for the same leaves, in the order of the first of each.

    Args:
      items: rules without notes, whose patterns match no leaf in common.
      linen, nnx: the paths of all leaves of the two models.
    """
    leaves = (tuple(linen), tuple(nnx))
    groups: dict[Any, list[FoundRule]] = {}
    for item in items:
        groups.setdefault((_mapped(_texts(item), r"\d+", "#"), item.rule.ops), []).append(item)
    result = [merged for group in groups.values() for merged in _indexed(group, leaves)]
    while len(shorter := _named(result, leaves)) < len(result):
        result = shorter
    place = {path: number for number, item in enumerate(items) for path in item.linen}
    return sorted(result, key=lambda item: min(place[path] for path in item.linen))


def _indexed(items: list[FoundRule], leaves: tuple[Sequence[str], ...]) -> list[FoundRule]:
    """Items that differ by integers alone, merged where these are the same on both sides."""
    if len(items) == 1:
        return items
    numbers = [re.findall(r"\d+", _flat(_texts(item))) for item in items]
    columns = list(zip(*numbers, strict=True))
    varying = [k for k, column in enumerate(columns) if len(set(column)) > 1]
    used = set(re.findall(r"\{(\w)\}", _flat(_texts(items[0])))) | _stacked(items[0].rule.ops)
    free = iter(letter for letter in _LETTERS if letter not in used)
    captures = {column: next(free) for column in dict.fromkeys(columns[k] for k in varying)}
    filled = iter([f"{{{captures[c]}}}" if c in captures else c[0] for c in columns])
    texts = _mapped(_texts(items[0]), r"\d+", lambda _: next(filled))
    merged = _merged(items, texts, leaves)
    if merged is not None:
        return [merged]
    # First apart where only one side counts: `Dense_0` is `up1` and `Dense_1` is `down2`.
    left = len(re.findall(r"\d+", "\n".join(_texts(items[0])[0])))
    sides = [{other < left for other in varying if columns[other] == columns[k]} for k in varying]
    alone = [k for k, side in zip(varying, sides, strict=True) if len(side) == 1]
    apart: dict[str, list[FoundRule]] = {}
    for item, row in zip(items, numbers, strict=True):
        apart.setdefault(row[(alone or varying)[0]], []).append(item)
    return [result for part in apart.values() for result in _indexed(part, leaves)]


def _named(items: list[FoundRule], leaves: tuple[Sequence[str], ...]) -> list[FoundRule]:
    """Items that differ by one path element, the same on both sides, merged; one round."""
    groups: dict[Any, dict[str, int]] = {}
    for number, item in enumerate(items):
        elements = [set(text.split("/")) for side in _texts(item) for text in side]
        roots = {text.split("/")[0] for text in _texts(item)[1]}
        for word in set.intersection(*elements) - roots:  # a root names a half of the model
            if "{" not in word:
                groups.setdefault((_renamed(_texts(item), word), item.rule.ops), {})[word] = number
    result: dict[int, FoundRule] = dict(enumerate(items))
    for (texts, _), members in sorted(groups.items(), key=lambda group: -len(group[1])):
        numbers = sorted(set(members.values()) & set(result))
        if len(numbers) > 1 and all(result[k] is items[k] for k in numbers):
            merged = _merged([items[k] for k in numbers], texts, leaves)
            if merged is not None:
                for number in numbers[1:]:
                    del result[number]
                result[numbers[0]] = merged
    return list(result.values())


def _merged(
    items: list[FoundRule], texts: Texts, leaves: tuple[Sequence[str], ...]
) -> FoundRule | None:
    """One item for all, if its patterns match their leaves and no others."""
    try:
        rule = Rule(tuple(map(Pattern, texts[0])), tuple(map(Pattern, texts[1])), items[0].rule.ops)
    except ValueError:
        return None
    linen = frozenset[str]().union(*(item.linen for item in items))
    nnx = frozenset[str]().union(*(item.nnx for item in items))
    for patterns, paths, due in ((rule.linen, leaves[0], linen), (rule.nnx, leaves[1], nnx)):
        hits = [path for pattern in patterns for path in paths if pattern.match(path) is not None]
        if len(hits) != len(due) or set(hits) != due:
            return None
    evidence = tuple(found for item in items for found in item.evidence)
    reasons = dict.fromkeys(reason for item in items for reason in item.reasons)
    return FoundRule(rule, linen, nnx, evidence, tuple(reasons))


def _renamed(texts: Texts, word: str) -> Texts:
    """The texts with a capture in place of a path element: `{leaf}` at the end, `{name}` before."""
    last = all(text.split("/")[-1] == word for side in texts for text in side)
    taken = _flat(texts)
    name = "leaf" if last else next((n for n in _NAMES if f"{{{n}}}" not in taken), word)
    return _mapped(texts, rf"(?<![^/]){re.escape(word)}(?![^/])", f"{{{name}}}")


def _mapped(texts: Texts, pattern: str, replacement: Any) -> Texts:
    linen, nnx = (tuple(re.sub(pattern, replacement, text) for text in side) for side in texts)
    return linen, nnx


def _flat(texts: Texts) -> str:
    return "\n".join((*texts[0], *texts[1]))


def _stacked(ops: tuple[Op, ...]) -> set[str]:
    return {op.capture for op in ops if isinstance(op, Stack)}
