"""What commands print: tables within 80 columns, JSON, amounts, and a line of progress.

A table has the same lines on a terminal and in a file. Sentences are broken at 80 columns on a
terminal alone: in a pipe each stays on one line, where `grep` finds the whole of it.
"""

import json
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

WIDTH = 80
_INDENT = 8  # of what goes on below a line
_FEW = 3  # texts of a list that are shown


def say(text: str) -> None:
    """Prints lines for a person."""
    _print_wrapped(text, sys.stdout)


def complain(reason: str) -> None:
    """Prints why a command was refused."""
    _print_wrapped(f"refused: {reason}", sys.stderr)


def _print_wrapped(text: str, stream: TextIO) -> None:
    # Not the width of the terminal: on a wide one long lines are hard to read.
    if not stream.isatty():
        print(text, file=stream)
        return
    for line in text.split("\n"):
        print(wrapped(line), file=stream)


def wrapped(line: str) -> str:
    """A line broken at 80 columns; what follows is indented like its text.

    Example:
      >>> print(wrapped("note     " + "a word and another, " * 4 + "and no more than these"))
      note     a word and another, a word and another, a word and another, a word and
               another, and no more than these
    """
    start = len(line) - len(line.lstrip())
    word, gap, _ = line.strip().partition("  ")
    # `note     text` goes on below the text, `  - text` below its own first word.
    if gap and len(word) < 12:
        start = len(line) - len(line.strip().removeprefix(word).lstrip())
    elif word.startswith("- "):
        start += 2
    # A path that is too long stays whole, so that it can be copied.
    return textwrap.fill(
        line, WIDTH, subsequent_indent=" " * start, break_long_words=False, break_on_hyphens=False
    )


def print_json(content: Any) -> None:
    """Prints a result for another program, on one line."""
    print(json.dumps(content))


def table(rows: Iterable[Sequence[str]], long: int) -> None:
    """Prints rows in columns. Where they would be wider than 80 columns, each row becomes two lines
    or more: its first `long` cells, and below them the others.

    Example:
      >>> table([("a", "float32[3]"), ("b/kernel", "int8[]")], long=1)
      a         float32[3]
      b/kernel  int8[]
      >>> table([("a/" * 39, "float32[3]", "12 B"), ("b", "int8[]", "1 B")], long=1)
      a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/
              float32[3]  12 B
      b
              int8[]      1 B
    """
    rows = [tuple(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines: list[str] = []
    for row in rows:
        if _width(widths) <= WIDTH:
            lines.append(_columns(row, widths))
            continue
        if _width(widths[:long]) <= WIDTH:
            lines.append(_columns(row[:long], widths[:long]))
        else:
            lines += row[:long]
        if any(row[long:]):
            lines.append(" " * _INDENT + _columns(row[long:], widths[long:]))
    # One write for all of them, as a checkpoint may have 50,000 leaves.
    sys.stdout.write("".join([f"{line}\n" for line in lines]))


def _width(widths: Sequence[int]) -> int:
    return sum(widths) + 2 * (len(widths) - 1)


def _columns(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(map(str.ljust, cells, widths)).rstrip()


def spec_of(leaf: Any) -> str:
    """Dtype and shape of a leaf on disk; of one that is no array, its type."""
    return str(leaf.spec) if leaf.zarr is not None else leaf.value_type


def amount(count: float) -> str:
    """A number of bytes.

    Example:
      >>> amount(999), amount(123456)
      ('999 B', '123 KB')
    """
    # Powers of 1,000, as `ls --si` and the makers of disks count.
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def few(texts: Sequence[str]) -> str:
    """The first of some texts, and how many there are.

    Example:
      >>> few("abcde"), few([])
      ('a, b, c, ... (5)', '-')
    """
    more = f", ... ({len(texts)})" if len(texts) > _FEW else ""
    return ", ".join(texts[:_FEW]) + more or "-"


def first(texts: Sequence[str]) -> str:
    """The first of some texts, and how many there are if they differ."""
    if not texts:
        return "-"
    # Forty layers of one shape are one text.
    count = len(set(texts))
    return f"{texts[0]}, ... ({count})" if count > 1 else texts[0]


def counted(count: int, noun: str, plural: str) -> str:
    """A number with its noun.

    Example:
      >>> counted(1, "leaf", "leaves"), counted(3, "leaf", "leaves")
      ('1 leaf', '3 leaves')
    """
    return f"{count} {noun if count == 1 else plural}"


def summary(report: dict[str, Any]) -> str:
    """The report of a conversion, planned or done, for a person."""
    leaves = ", ".join([f"{count} {engine}" for engine, count in report["leaves"].items()])
    streamed = amount(report["bytes_streamed"])
    lines = [
        f"found    {report['found']}",
        f"writes   {report['to']}",
        f"leaves   {leaves}",
        f"bytes    {amount(report['bytes'])}, {streamed} of them streamed",
        f"memory   about {amount(report['peak_memory'])} at the peak",
    ]
    for word, key in (("dropped", "dropped"), ("filled", "filled"), ("as it is", "as_they_are")):
        if report.get(key):
            lines.append(f"{word:9}{', '.join(report[key])}")
    for note in report["notes"]:
        lines.append(f"note     {note}")
    if report.get("fell_back"):
        lines.append(f"note     copied, as hard links are not possible here: {report['fell_back']}")
    if report.get("digests") is False:
        unread = "what the server copies is" if report.get("server_copied") else "links are"
        lines.append(f"note     no digests: the source has none, and {unread} not read (--digest)")
    return "\n".join(lines)


def rule_lines(rule: Any, width: int = 0) -> list[str]:
    """A rule for a person: its Linen side, its nnx side, its ops, within 80 columns if they fit.

    width: of the column of Linen sides, where several rules are shown below each other.

    Example:
      >>> from linen_nnx.book.grammar import parse_rule
      >>> entry = {"linen": "params/table", "nnx": "out/kernel",
      ...          "ops": [{"op": "transpose", "perm": [1, 0]}]}
      >>> rule_lines(parse_rule(entry))
      ['params/table  ->  out/kernel  transpose(perm [1, 0])']
    """
    linen, nnx, ops = rule_texts(rule)
    whole = "  ".join([f"{linen:{width}}", "->", nnx, *ops])
    if len(whole) <= WIDTH:
        return [whole]
    # The arrow begins the second line, where it is found at a glance among many rules.
    right = "  ".join([f"    ->  {nnx}", *ops])
    if len(right) <= WIDTH:
        return [linen, right]
    return [linen, f"    ->  {nnx}", *[" " * _INDENT + op for op in ops]]


def rule_texts(rule: Any) -> tuple[str, str, list[str]]:
    """The Linen side of a rule, its nnx side and its ops, as texts."""
    from linen_nnx.book.grammar import rule_to_dict

    entry = rule_to_dict(rule)
    sides: list[str] = []
    for side in ("linen", "nnx"):
        patterns = entry.get(side, "(nothing)")
        sides.append(patterns if isinstance(patterns, str) else " + ".join(patterns))
    ops: list[str] = []
    for op in entry.get("ops", ()):
        settings: list[str] = []
        for key, value in op.items():
            if key not in ("op", "data"):  # `data` are the numbers themselves, in base64
                settings.append(f"{key} {value}")
        ops.append(f"{op['op']}({', '.join(settings)})")
    return sides[0], sides[1], ops


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A function that shows what is being done: on a terminal a line that is rewritten and is gone
    at the end, elsewhere nothing."""
    # In a log, a line that is rewritten would be a thousand lines.
    if not sys.stderr.isatty():
        yield lambda text: None
        return

    def tell(text: str) -> None:
        # A longer line would take two, of which the next one rewrites the second alone.
        print(f"\r\033[K{text[: WIDTH - 1]}", end="\r", file=sys.stderr, flush=True)

    try:
        yield tell
    finally:
        tell("")
