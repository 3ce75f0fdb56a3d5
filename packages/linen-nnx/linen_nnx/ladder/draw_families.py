"""Writes pairs of draws that differ in a number alone as one: a rule book then fits any depth.

    dropout/Block_0/Dropout_0   blocks/0/drop/rngs
    dropout/Block_1/Dropout_0   blocks/1/drop/rngs     ->  dropout/Block_{i}/Dropout_0
    dropout/Block_2/Dropout_0   blocks/2/drop/rngs         blocks/{i}/drop/rngs

A number in the text of the Linen draw is captured together with an equal number in the text of the
nnx draw. Two pairs or more that become the same text are a family, unless the text would also stand
for a draw that is paired otherwise or not at all.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import replace

from linen_nnx.book.draws import Draw, Family, Pair, Pairing
from linen_nnx.book.patterns import Pattern

# Without leading zeros, which a number loses when it is captured.
_NUMBER = re.compile(r"(?<!\d)(?:0|[1-9]\d*)(?!\d)")
_CAPTURE = "{i}"


def in_families(pairing: Pairing, linen: Collection[Draw]) -> Pairing:
    """The same pairing with as few pairs as there can be.

    Args:
      pairing: each pair by itself.
      linen: all draws that the Linen model makes in this kind of call.

    Example:
      >>> draws = [Draw(f"dropout/Block_{n}/Dropout_0") for n in range(3)]
      >>> pairs = tuple(Pair(draw, Draw(f"blocks/{n}/drop")) for n, draw in enumerate(draws))
      >>> found = in_families(Pairing("__call__", {}, pairs), draws)
      >>> found.pairs, [(family.linen.text, family.nnx.text) for family in found.families]
      ((), [('dropout/Block_{i}/Dropout_0', 'blocks/{i}/drop')])
    """
    left = dict.fromkeys(pairing.pairs)
    families = list(pairing.families)
    known = set(pairing.pairs)
    # `blocks/{i}/drop[0]` of twelve blocks goes before `blocks/0/drop[{i}]` of two lanes.
    for family, members in _largest_first(pairing.pairs):
        covered = [pair for pair in map(family.pair, linen) if pair is not None]
        if set(covered) <= known and all(pair in left for pair in members):
            families.append(family)
            for pair in members:
                del left[pair]
    return replace(pairing, pairs=tuple(left), families=tuple(families))


def _largest_first(pairs: Collection[Pair]) -> list[tuple[Family, list[Pair]]]:
    """The families of two pairs or more, with their pairs, the one with most pairs first."""
    groups: dict[tuple[str, str], list[Pair]] = {}
    for pair in pairs:
        for texts in _captured(str(pair.linen), str(pair.nnx)):
            groups.setdefault(texts, []).append(pair)
    found: list[tuple[Family, list[Pair]]] = []
    for (linen, nnx), members in groups.items():
        if len(members) > 1:
            found.append((Family(Pattern(linen), Pattern(nnx)), members))
    return sorted(found, key=lambda entry: -len(entry[1]))


def _captured(linen: str, nnx: str) -> Iterator[tuple[str, str]]:
    """Both texts with one number captured in each, for all that are equal."""
    for one in _NUMBER.finditer(linen):
        for two in _NUMBER.finditer(nnx):
            if one[0] == two[0]:
                yield _with_capture(linen, one), _with_capture(nnx, two)


def _with_capture(text: str, number: re.Match[str]) -> str:
    return text[: number.start()] + _CAPTURE + text[number.end() :]
