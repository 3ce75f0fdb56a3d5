"""The command line of the translator. Exit code 0: done; 1: refused, with every reason; 2: usage.

Imports nothing heavy before a command needs it.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

_CKPT = "a run directory, a CheckpointManager's root or step, an Orbax directory, or a file"
_TARGET = (
    "linen or nnx: the layout that stock Flax restores; or, of this template's own runs, a stage "
    "(a whole run directory goes to a stage, also for linen and nnx)"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    options = vars(_parser().parse_args(arguments))
    command: Callable[..., int] = options.pop("command")
    try:
        return command(**options)
    except (ValueError, OSError) as error:
        refusals = ("RuleError", "StoreError", "TargetError", "DigestError", "Mismatch")
        if isinstance(error, OSError) or type(error).__name__ in refusals:
            print(f"refused: {error}", file=sys.stderr)
            return 1
        raise


def program() -> int:
    """`main` in a process of its own, whose memory and time it may tune."""
    gc.disable()  # a short life with many small objects and few cycles of them: 15 % faster
    with contextlib.suppress(OSError, AttributeError):
        # M_ARENA_MAX: else glibc keeps the freed buffers of streamed leaves once for each thread.
        ctypes.CDLL(None).mallopt(-8, 1)
    try:
        return main()
    finally:
        gc.freeze()  # nor look for cycles at the end


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="convert.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, command: Callable[..., int], text: str, *names: str) -> Any:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        for positional in names:
            sub.add_argument(positional, metavar=positional.upper(), help=_HELP[positional])
        sub.add_argument(
            "--json", dest="as_json", action="store_true", help="print a machine-readable result"
        )
        sub.add_argument("--step", type=int, help="which step of a root (default: the latest)")
        sub.add_argument("--item", help="which item of a step holds the state, if several may")
        return sub

    def add_rules(sub: Any) -> None:
        sub.add_argument("--rules", metavar="FILE", help="rule book (default: the checkpoint's)")
        reset = "leave the optimizer's state out"
        sub.add_argument("--reset-optimizer", action="store_true", help=reset)

    add("inspect", _inspect, "show the tree: paths, shapes, dtypes, bytes, layout", "ckpt")
    for name, command, text, names in (
        ("plan", _plan, "show what would be done to every leaf; writes nothing", ["ckpt"]),
        ("run", _run, "translate to OUT, which must not exist; atomic", ["ckpt", "out"]),
    ):
        sub = add(name, command, text, *names)
        sub.add_argument("--to", required=True, metavar="TARGET", help=_TARGET)
        sub.add_argument("--like", metavar="CKPT", help="a checkpoint that OUT must equal in form")
        add_rules(sub)
    sub.add_argument("--link", action="store_true", help="hard-link data files, do not copy them")
    sub.add_argument("--digest", action="store_true", help="hash linked files, too")
    sub = add("verify", _verify, "prove OUT right against CKPT", "ckpt", "out")
    sub.add_argument("--to", metavar="TARGET", help="what OUT is (default: what its report says)")
    add_rules(sub)
    return parser


_HELP = {
    "ckpt": _CKPT,
    "out": "what to create, or what was created; *.msgpack, *.safetensors: a file",
}


def _inspect(ckpt: str, as_json: bool, step: int | None, item: str | None) -> int:
    from linen_nnx.rules import RuleBook
    from linen_nnx.sources import find
    from linen_nnx.state import Form, guess_side, read_state

    source = find(ckpt, step, item)
    leaves = source.leaves
    form = (
        Form("linen", source.run["stage"]) if source.run else Form(guess_side(leaves, RuleBook([])))
    )
    layout = read_state(leaves, form, RuleBook([])).layout
    if as_json:
        content = [
            {"path": leaf.path, "spec": _spec(leaf), "bytes": leaf.nbytes, "type": leaf.value_type}
            for leaf in leaves
        ]
        return _print_json({"found": str(source), "layout": layout, "leaves": content})
    _table([(leaf.path, _spec(leaf), _bytes(leaf.nbytes)) for leaf in leaves])
    total = sum(leaf.nbytes for leaf in leaves)
    print(f"\n{source}: {layout}\n{len(leaves)} leaves, {_bytes(total)}")
    return 0


def _plan(ckpt: str, to: str, as_json: bool, **options: Any) -> int:
    from linen_nnx.planning import plan_conversion

    conversion = plan_conversion(ckpt, to, **options)
    jobs = [
        {
            "engine": job.engine if job.change.sources or job.engine == "drop" else "fill",
            "from": [leaf.path for leaf in job.change.sources],
            "to": [leaf.path for leaf in job.targets],
            "specs": [_spec(leaf) for leaf in job.targets],
            "bytes": job.nbytes,
        }
        for job in conversion.jobs
    ]
    if as_json:
        return _print_json({**conversion.summary(), "jobs": jobs})
    _table(
        (job["engine"], _few(job["from"]), "->", _few(job["to"]), _few(job["specs"]))
        for job in jobs
    )
    print(_summary(conversion.summary()))
    return 0


def _run(ckpt: str, out: str, to: str, as_json: bool, **options: Any) -> int:
    from linen_nnx.convert import convert

    result = convert(ckpt, out, to, progress=_progress(), **options)
    reports = [{k: v for k, v in report.items() if k != "origin"} for report in result.reports]
    if as_json:
        return _print_json({"status": result.status, "out": str(result.out), "reports": reports})
    for report in reports:
        print(_summary(report))
    done = "was there already and is equal" if result.status == "equal" else "is complete"
    print(f"{result.out} {done}")
    return 0


def _verify(ckpt: str, out: str, to: str | None, as_json: bool, **options: Any) -> int:
    from linen_nnx.verify import verify

    checks = verify(ckpt, out, to, progress=_progress(), **options)
    failed = any(check.passed is False for check in checks)
    if as_json:
        content = [{"name": c.name, "passed": c.passed, "details": c.details} for c in checks]
        _print_json({"passed": not failed, "checks": content})
        return int(failed)
    words = {True: "ok", False: "FAILED", None: "nothing to check"}
    for check in checks:
        print(f"{words[check.passed]:18}{check.name}")
        for detail in check.details:
            print(f"{'':18}  {detail}")
    return int(failed)


def _summary(report: dict[str, Any]) -> str:
    lines = [
        f"found    {report['found']}",
        f"writes   {report['to']}",
        "leaves   " + ", ".join(f"{count} {engine}" for engine, count in report["leaves"].items()),
        f"bytes    {_bytes(report['bytes'])}, {_bytes(report['bytes_streamed'])} of them streamed",
        f"memory   about {_bytes(report['peak_memory'])} at the peak",
    ]
    lines += [f"{key:9}{', '.join(report[key])}" for key in ("dropped", "filled") if report[key]]
    lines += [f"note     {note}" for note in report["notes"]]
    if report.get("fell_back"):
        lines.append(f"note     copied, as hard links are not possible here: {report['fell_back']}")
    if report.get("digests") is False:
        lines.append("note     no digests: the source has none, and links are not read (--digest)")
    return "\n".join(lines)


def _progress() -> Callable[[str], None]:
    """A line that is rewritten on a terminal, and nothing elsewhere."""
    if not sys.stderr.isatty():
        return lambda text: None
    return lambda text: print(f"\r\033[K{text}", end="\r", file=sys.stderr, flush=True)


def _print_json(content: Any) -> int:
    print(json.dumps(content))
    return 0


def _spec(leaf: Any) -> str:
    return str(leaf.spec) if leaf.zarr is not None else leaf.value_type


def _few(texts: Sequence[str]) -> str:
    return ", ".join(texts[:3]) + (f", ... ({len(texts)})" if len(texts) > 3 else "") or "-"


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _table(rows: Iterable[tuple[str, ...]]) -> None:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    sys.stdout.write("".join(f"{line}\n" for line in lines))
