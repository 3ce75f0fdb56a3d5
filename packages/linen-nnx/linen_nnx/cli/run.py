"""`run`: a checkpoint translated to another form."""

from typing import Any

from linen_nnx.cli.models import rules_of, runs_named
from linen_nnx.cli.output import print_json, progress, say, summary


def run(
    ckpt: str,
    out: str,
    to: str,
    as_json: bool,
    twin: str | None,
    rules: str | None,
    runs: str | None,
    **options: Any,
) -> int:
    """Writes `out`. `options`: those of `convert`."""
    from linen_nnx.disk.convert import convert

    options |= {**rules_of(twin, to, rules), "runs": runs_named(runs)}
    with progress() as tell:
        result = convert(ckpt, out, to, progress=tell, **options)
    reports = []
    for report in result.reports:
        # What the way back needs to know of the source's tree is long, and for `convert` alone.
        reports.append({key: value for key, value in report.items() if key != "origin"})
    if as_json:
        said = {"status": result.status, "out": str(result.out), "notes": result.notes}
        print_json({**said, "reports": reports})
        return 0
    for report in reports:
        say(summary(report))
    for note in result.notes:
        say(f"note     {note}")
    done = "was there already and is equal" if result.status == "equal" else "is complete"
    say(f"{result.out} {done}")
    return 0
