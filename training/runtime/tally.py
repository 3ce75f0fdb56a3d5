"""Digests of the rows of `metrics.jsonl`, so that a checkpoint can say which rows have changed.

A checkpoint notes the digest of every row up to its step:

    row  step    noted   found
    1    1       a4      a4
    2    2       7f      03      row 2 (step 2) was changed
    3    3       c1              row 3 (step 3) is missing
    4    4       90      90

So that a long run does not write a long list, there is one digest for a block of rows, and when
there are `BLOCKS` of them, each two become one: rows 1 and 2 under hash(a4 7f), and so on. A run of
up to 1,023 rows can tell each row, one of 100,000 rows each 128th part of a thousand. Adding a row
takes some microseconds, however many there are.
"""

from collections.abc import Iterable, Mapping
from difflib import SequenceMatcher
from typing import Any

import xxhash

BLOCKS = 1024


class Tally:
    """The digests of the rows so far.

    Example:
      >>> tally = Tally()
      >>> tally.add(b'{"step": 1}', 1)
      >>> tally.noted()
      {'rows': 1, 'size': 1, 'digests': ['d01fdd0d8e76c4a5'], 'steps': [1]}
    """

    def __init__(self, size: int = 1, most: int | None = BLOCKS) -> None:
        """
        Args:
            size: rows in a block, to begin with; a power of two.
            most: blocks at which each two become one; None: never.
        """
        self._rows, self._size, self._most = 0, size, most
        self._digests: list[str] = []  # of whole blocks
        self._steps: list[int] = []  # of the last row of each of them
        # What is not yet a block: digests of 2^k rows, the larger before the smaller.
        self._open: list[tuple[int, str]] = []
        self._step = 0

    def add(self, line: bytes, step: int) -> None:
        """Takes the next row, as its bytes are, with its step."""
        self._rows, self._step = self._rows + 1, step
        count, digest = 1, _hash(line)
        # As in a binary counter: two digests of 2^k rows carry over into one of 2^(k+1).
        while self._open and self._open[-1][0] == count:
            _, before = self._open.pop()
            count, digest = 2 * count, _joined(before, digest)
        self._open.append((count, digest))
        if count == self._size:
            self._open.pop()
            self._digests.append(digest)
            self._steps.append(step)
        if len(self._digests) == self._most:
            self._halve()

    def noted(self) -> dict[str, Any]:
        """What a checkpoint keeps, as plain values: rows, rows in a block, and for each block its
        digest and the step of its last row. The last block may have fewer rows."""
        digests, steps = list(self._digests), list(self._steps)
        if self._open:
            digests.append(_joined(*(digest for _, digest in self._open)))
            steps.append(self._step)
        return {"rows": self._rows, "size": self._size, "digests": digests, "steps": steps}

    def _halve(self) -> None:
        pairs = zip(self._digests[::2], self._digests[1::2], strict=True)
        self._digests = [_joined(*pair) for pair in pairs]
        self._steps = self._steps[1::2]
        self._size *= 2


def check(noted: Any) -> None:
    """Raises `ValueError` for what no `Tally.noted` has returned."""
    if not isinstance(noted, dict) or noted.keys() != {"rows", "size", "digests", "steps"}:
        raise ValueError("its digests of rows are no mapping of rows, size, digests and steps")
    rows, size = noted["rows"], noted["size"]
    if type(rows) is not int or rows < 0:
        raise ValueError("its number of rows is no whole number")
    if type(size) is not int or size < 1 or size & (size - 1):
        raise ValueError("its number of rows in a block is no power of two")
    for name, kind in (("digests", str), ("steps", int)):
        values = noted[name]
        if not isinstance(values, list) or any(type(value) is not kind for value in values):
            raise ValueError(f"its {name} of rows are no list of {kind.__name__}")
        if len(values) != -(-rows // size):
            raise ValueError(f"it has {len(values)} {name} for {rows} rows, {size} in a block")


def differences(noted: Mapping[str, Any], rows: Iterable[tuple[bytes, int]]) -> list[str]:
    """Which rows are missing, changed or extra, in words; none if all are as they were noted.

    Args:
        noted: what `Tally.noted` returned.
        rows: the bytes and the step of each row that is there now.

    Example:
      >>> tally, rows = Tally(), [(b"a", 1), (b"b", 2), (b"c", 3)]
      >>> for row in rows:
      ...     tally.add(*row)
      >>> differences(tally.noted(), rows[:1] + rows[2:])
      ['row 2 (step 2) is missing']
    """
    size = noted["size"]
    now = Tally(size, most=None)
    for line, step in rows:
        now.add(line, step)
    found = now.noted()
    if found == noted:
        return []
    # A row that is lost moves all later ones up by one: compared one by one, all would have
    # changed.
    matcher = SequenceMatcher(None, noted["digests"], found["digests"], autojunk=False)
    words = []
    for kind, begin, end, new_begin, new_end in matcher.get_opcodes():
        if kind == "equal":
            continue
        here, there = _span(noted, begin, end), _span(found, new_begin, new_end)
        one = (end - begin) * size == 1
        if kind == "delete":
            words.append(f"{here} {'is' if one else 'are'} missing")
        elif kind == "insert":
            words.append(f"{there} of the file {'is' if new_end - new_begin == 1 else 'are'} extra")
        elif end - begin == new_end - new_begin:
            words.append(f"{here} {'was' if one else 'were'} changed")
        else:
            words.append(f"{here} {'was' if one else 'were'} changed: now {there}")
    if noted["rows"] != found["rows"]:
        words.append(f"{found['rows']} rows up to that step, where {noted['rows']} were saved")
    return words


def _span(noted: Mapping[str, Any], begin: int, end: int) -> str:
    """Blocks as the rows and the steps that they hold, both counted from 1."""
    if begin == end:
        return "none"
    size, steps = noted["size"], noted["steps"]
    first, last = begin * size + 1, min(end * size, noted["rows"])
    # A block of several rows knows its last step alone: it begins after the block before.
    lowest = steps if size == 1 else [1, *steps]
    if first == last:
        return f"row {first} (step {steps[begin]})"
    return f"rows {first} to {last} (steps {lowest[begin]} to {steps[end - 1]})"


def _hash(line: bytes) -> str:
    return xxhash.xxh3_64(line).hexdigest()


def _joined(*digests: str) -> str:
    return _hash("".join(digests).encode())
