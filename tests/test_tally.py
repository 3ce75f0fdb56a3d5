"""Digests of rows tell which row is missing, changed or extra, in a list that stays short."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.runtime.tally import BLOCKS, Tally, check, differences

ROWS = st.lists(st.binary(max_size=8), max_size=40)


def numbered(lines: list[bytes]) -> list[tuple[bytes, int]]:
    """Rows as of a run that writes one every ten steps; no two alike."""
    return [(b"%d %b" % (number, line), 10 * number) for number, line in enumerate(lines, 1)]


def noted(rows: list[tuple[bytes, int]]) -> dict[str, object]:
    tally = Tally()
    for row in rows:
        tally.add(*row)
    return tally.noted()


@given(ROWS, ROWS)
def test_rows_are_found_equal_if_and_only_if_they_are(lines: list[bytes], others: list[bytes]):
    assert (differences(noted(numbered(lines)), numbered(others)) == []) == (lines == others)


@given(ROWS.filter(bool), st.data())
def test_a_row_that_is_missing_changed_or_extra_is_named(lines: list[bytes], data: st.DataObject):
    rows = numbered(lines)
    index = data.draw(st.integers(0, len(rows) - 1))
    before, (line, step), after = rows[:index], rows[index], rows[index + 1 :]
    name = f"row {index + 1} (step {step})"

    assert differences(noted(rows), before + after)[0] == f"{name} is missing"
    changed = [*before, (line + b"!", step), *after]
    assert differences(noted(rows), changed) == [f"{name} was changed"]
    extra = [*before, (b"!", 0), (line, step), *after]
    assert differences(noted(rows), extra)[0] == f"row {index + 1} (step 0) of the file is extra"


@pytest.mark.parametrize("count", [BLOCKS - 1, BLOCKS, 2 * BLOCKS + 1, 5 * BLOCKS + 3])
def test_a_long_run_notes_a_short_list_and_names_the_few_rows_of_a_block(count: int) -> None:
    rows = numbered([b""] * count)
    kept = noted(rows)
    assert len(kept["digests"]) == len(kept["steps"]) <= BLOCKS
    assert differences(kept, rows) == []

    for index in (0, count // 2, count - 1):
        changed = list(rows)
        changed[index] = (b"!", rows[index][1])
        (text,) = differences(kept, changed)
        numbers = [int(word.strip("()")) for word in text.split() if word.strip("()").isdigit()]
        assert numbers[0] <= index + 1 <= numbers[0] + kept["size"]

    text = " ".join(differences(kept, rows[:-2] + rows[-1:]))
    assert f"{count - 1} rows up to that step, where {count} were saved" in text


@given(ROWS)
def test_what_a_tally_notes_is_accepted_and_nothing_that_lacks_a_part(lines: list[bytes]):
    kept = noted(numbered(lines))
    check(kept)
    wrong = [{**kept, "rows": len(lines) + 1}, {**kept, "size": 3}, {**kept, "size": True}, None]
    wrong += [{**kept, "digests": [1] * len(lines)}, {**kept, "steps": None}]
    wrong += [{key: value for key, value in kept.items() if key != gone} for gone in kept]
    for other in wrong:
        if lines or other != kept:
            with pytest.raises(ValueError, match="rows"):
                check(other)
