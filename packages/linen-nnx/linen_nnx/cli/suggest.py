"""`suggest`: a rule book for a twin, each rule with its evidence."""

import os
from typing import Any

from linen_nnx.cli.models import suggested
from linen_nnx.cli.output import few, print_json, rule_lines, rule_texts, say
from linen_nnx.cli.stopping import whole_file

_COLUMN = 40  # the widest column of Linen sides behind which the arrows are aligned


def suggest(twin: str, out: str | None, as_json: bool) -> int:
    """Proposes a rule book, writes it to `out`, and shows it. Returns 1 if leaves are open."""
    # Before the search, which may take minutes.
    if out is not None and os.path.exists(out):
        raise FileExistsError(f"{out} exists: choose another file")
    book = suggested(twin)
    if out is not None:
        with whole_file(out) as part:
            book.save(part)
    if as_json:
        print_json({"complete": not book.unassigned, "out": out, **book.to_dict()})
    else:
        _show(book, out)
    return int(bool(book.unassigned))


def _show(book: Any, out: str | None) -> None:
    sides = [rule_texts(rule)[0] for rule in book.rules]
    width = min(_COLUMN, max(map(len, sides), default=0))
    for rule in book.rules:
        for line in rule_lines(rule, width):
            print(line)
        say(f"    {rule.note or ''}")
    for leaf, known in book.unassigned.items():
        print(f"UNASSIGNED {known.side} {leaf}")
        say(f"    {known.reason}")
        print(f"    candidates: {few(known.candidates)}")
        if known.likely is not None:
            linen, nnx, ops = rule_texts(known.likely)
            print(f"    likely, not proven: {'  '.join([f'{linen} -> {nnx}', *ops])}")
    for note in book.notes:
        say(f"\nnote     {note}")
    print(f"\n{len(book.rules)} rules, {len(book.unassigned)} leaves unassigned")
    for pairing in book.draws:
        for pair in pairing.to_dict()["pairs"]:
            print(f"draw {pair['linen']}  ->  {pair['nnx']}")
            print(f"    in {pairing.kind}")
    if book.unassigned:
        say("write rules for those by hand; until then the book translates nothing")
        if out is not None and any(known.likely for known in book.unassigned.values()):
            say(f"{out} has the likely ones as comments: uncomment those that are right")
    if out is not None:
        say(f"{out} is written")
