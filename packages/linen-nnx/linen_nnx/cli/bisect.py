"""`bisect`: the first layer at which two models part."""

from linen_nnx.cli.models import loaded, runs_named
from linen_nnx.cli.output import print_json, progress, say, table
from linen_nnx.cli.stopping import whole_file


def bisect(
    twin: str,
    checkpoints: list[str],
    rules: str | None,
    png: str | None,
    training: bool,
    as_json: bool,
    runs: str | None,
) -> int:
    """Compares a twin layer by layer. Returns 1 if the two models part."""
    from linen_nnx.proof import show
    from linen_nnx.proof.bisect import bisect

    # Both models are traced, compiled and run in float64 as well, which takes minutes.
    with progress() as tell:
        tell(f"importing {twin}")
        found = bisect(loaded(twin), rules, checkpoints, runs_named(runs), training, tell)
    if png is not None:
        with whole_file(png) as part:
            show.plot(found, part)
    if as_json:
        print_json(show.content(found))
    else:
        rows: list[tuple[str, ...]] = []
        # Mark and Linen name in one column: the two names then stand on one line of 80 columns.
        for mark, linen, nnx, *others in show.table(found):
            rows.append((f"{mark:3}  {linen}", nnx, *others))
        table(rows, long=2)
        print()
        for line in show.conclusion(found):
            say(line)
    return int(found.first is not None)
