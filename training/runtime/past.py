"""What lies behind a run that goes on from another: the stages it went through, and its rows.

    runs/old   stage linen   rows 1 to 300      {"0": "linen"}
    runs/new   stage nnx     rows 1 to 600      {"0": "linen", "300": "nnx"}

The 300 rows of the first are taken along where both are the same experiment in all but its stage.
So the curve of `runs/new` is the whole one, and `eval.patience` and the best checkpoint are those
of a run that never moved. Where a setting differs that bends the curve, the new one begins its own.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.runtime import metrics, reading, vouching
from training.runtime.checkpoints import Saved
from training.runtime.terminal import say

MOVING = ("stage", "ported", "name")  # what may differ between two parts of one curve
SHOWN = 3  # differences that are named


def stages(saved: Saved | None, stage: str) -> dict[str, str]:
    """The stage of a run from which step on; the steps are text, as keys of JSON are."""
    if saved is None or saved.foreign is not None:
        return {"0": stage}
    before: dict[str, str] = saved.run.get("stages") or {"0": saved.run["stage"]}
    # As numbers: as text "1000" comes before "300".
    latest = before[max(before, key=int)]
    return before if latest == stage else {**before, str(saved.step): stage}


def take(saved: Saved, config: Mapping[str, Any], before: Mapping[str, Any], run_dir: Path) -> None:
    """Puts the rows of another run, up to the checkpoint's step, into `metrics.jsonl`.

    Args:
        saved: a checkpoint of the other run.
        config: the configuration of this run.
        before: that of the other one, in today's keys.
        run_dir: where this run is.
    """
    rows: list[bytes] = []
    if reason := _parted(saved, config, before):
        say(f"The curve begins at step {saved.step}, without that of {saved.path}: {reason}")
    elif saved.run_dir is not None and (source := saved.run_dir / metrics.FILE).exists():
        with reading.named(source):
            lines = reading.whole_lines(source)
            rows = [line for line in lines if (metrics.step_of(line) or 0) <= saved.step]
    (run_dir / metrics.FILE).write_bytes(b"".join(rows))


def _parted(saved: Saved, config: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    """Why the other run is not the beginning of this one; nothing where it is."""
    if saved.foreign is not None:
        return "it is none of this template's."
    changed = [
        f"{key} was {was}, is {is_}"
        for key, (was, is_) in vouching.changes(before, config).items()
        if not vouching.is_free(key) and key not in MOVING
    ]
    if changed:
        more = f"; and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        return "; ".join(changed[:SHOWN]) + f"{more}."
    # A curve with a hole is refused where a run goes on with it. Here the state is sound, and is
    # taken.
    if saved.run_dir is None:
        return "its run directory is not known. Given as init_from, that brings its rows along."
    with reading.named(saved.run_dir / metrics.FILE):
        lost = vouching.lost_rows(saved.run_dir, saved.step, saved.run)
    return f"its {metrics.FILE} is not as it was saved: {'; '.join(lost)}." if lost else ""
