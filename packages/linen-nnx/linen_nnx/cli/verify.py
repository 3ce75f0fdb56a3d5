"""`verify`: a converted checkpoint proved right, check by check."""

import gc
from typing import Any

from linen_nnx.cli.models import loaded, named, runs_named
from linen_nnx.cli.output import print_json, progress, say

_WORDS = {True: "ok", False: "FAILED", None: "not proved"}
_COLUMN = 12  # of a check's name


def verify(
    ckpt: str,
    out: str,
    to: str | None,
    as_json: bool,
    twin: str | None,
    runs: str | None,
    build: str | None,
    **options: Any,
) -> int:
    """Shows each check as soon as it is known. Returns 1 if one has failed."""
    from linen_nnx.proof.verify import verdict, verify

    def built(said: Any) -> Any:
        gc.enable()  # as in `models.loaded`
        return named(build or "")(said)

    with progress() as tell:

        def show(check: Any) -> None:
            if as_json:
                return
            tell("")  # makes room on the terminal's line
            word = "close" if check.close else _WORDS[check.passed]
            print(f"{word:{_COLUMN}}{check.name}", flush=True)
            for detail in check.details:
                say(f"{'':{_COLUMN + 2}}{detail}")

        checks = verify(
            ckpt,
            out,
            to,
            progress=tell,
            report=show,
            twin=loaded(twin) if twin else None,
            build=built if build else None,
            runs=runs_named(runs),
            **options,
        )
    failed = any(check.passed is False for check in checks)
    if as_json:
        print_json({"passed": not failed, "checks": [vars(check) for check in checks]})
        return int(failed)
    # The bytes prove that the rules were followed, and not that the rules are right.
    if not any(check.name.endswith("by an output") for check in checks):
        why = "the checks above come first" if twin else "--twin TWIN"
        say(f"The models were not run, and so the rule book is taken at its word: {why}")
    say(verdict(checks))
    return int(failed)
