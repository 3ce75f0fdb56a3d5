"""The command line of the translator. Exit code 0: done; 1: refused, with every reason; 2: usage.

Imports nothing heavy before a command needs it.
"""

import argparse
import contextlib
import ctypes
import gc
import io
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any, NoReturn

from linen_nnx.errors import Refusal

_HELP = {
    "twin": "path/to/file.py:NAME or package.module:NAME",
    "ckpt": "a run directory, a CheckpointManager's root or step, an Orbax directory, or a file",
    "out": "what to create, or what was created; *.msgpack, *.safetensors: a file",
}
_TARGET = (
    "linen or nnx: the layout that stock Flax restores; or, of a checkpoint that says the form of "
    "its parts, a stage (a whole run directory goes to a stage, also for linen and nnx)"
)


def main(
    arguments: Sequence[str] | None = None,
    *,
    name: str = "linen-nnx",
    runs: str | None = None,
    build: str | None = None,
) -> int:
    """Runs one command; returns the exit code.

    Args:
      arguments: the words of the command line.
      name: what the program is called.
      runs: the `module:NAME` of a `disk.runs.Runs`: what a training code says of its runs.
      build: the `module:function` that builds the models of its runs, for `verify` (see
        `proof.verify.Builder`). Both are imported when needed.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options = vars(_parser(name, runs, build, arguments).parse_args(arguments))
    command: Callable[..., int] = options.pop("command")
    try:
        return command(**options)
    except OSError as error:  # of whose own text the number is left out
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        reason = f"{' to '.join(names)}: {error.strerror}" if names else str(error)
    except KeyboardInterrupt:
        print("interrupted: nothing was left behind", file=sys.stderr)
        return 130  # as a shell says of a program that SIGINT has ended
    except Refusal as error:
        reason = str(error)
    print(f"refused: {reason}", file=sys.stderr)
    return 1


def program(name: str = "linen-nnx", *, runs: str | None = None, build: str | None = None) -> int:
    """`main` in a process of its own, whose memory and time it may tune."""
    signal.signal(signal.SIGINT, _interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file may have any bytes as its name
    gc.disable()  # a short life with many small objects and few cycles of them: 15 % faster
    with contextlib.suppress(OSError, AttributeError):
        # M_ARENA_MAX: else glibc keeps the freed buffers of streamed leaves once for each thread.
        ctypes.CDLL(None).mallopt(-8, 1)
    try:
        return main(name=name, runs=runs, build=build)
    finally:
        gc.freeze()  # nor look for cycles at the end


def _interrupt(*_: object) -> NoReturn:
    """Ends a command at the first Ctrl-C. A second one would end the clearing up of the first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def _parser(
    name: str, runs: str | None, build: str | None, words: Sequence[str]
) -> argparse.ArgumentParser:
    """The parser of all commands. Exits with code 2 if one of the `words` is mistyped."""
    parser = argparse.ArgumentParser(prog=name, description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, command: Callable[..., int], text: str, *names: str) -> Any:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        if name != "suggest":
            sub.set_defaults(runs=runs)
        for word in names:
            kind = _twin if word == "twin" else str
            sub.add_argument(word, type=kind, metavar=word.upper(), help=_HELP[word])
        text = "print a machine-readable result"
        sub.add_argument("--json", dest="as_json", action="store_true", help=text)
        if "ckpt" in names:
            text = "which step of a root (default: the latest)"
            sub.add_argument("--step", type=_step, help=text)
            sub.add_argument("--item", help="which item of a step holds the state, if several may")
            text = "which series of steps, as `model-` of `model-100`; repeated: together one state"
            sub.add_argument("--prefix", action="append", default=[], help=text)
        return sub

    def add_rules(sub: Any, twin: str) -> None:
        sub.add_argument("--rules", metavar="FILE", help="rule book (default: the checkpoint's)")
        sub.add_argument("--twin", type=_twin, metavar="TWIN", help=f"{_HELP['twin']}: {twin}")
        reset = "leave the optimizer's state out"
        sub.add_argument("--reset-optimizer", action="store_true", help=reset)
        alone = "leave all but the model's parameters and collections out"
        sub.add_argument("--model-only", action="store_true", help=alone)
        which = "the form of CKPT, where its names and the rule book do not tell"
        sub.add_argument("--from", dest="side", choices=("linen", "nnx"), help=which)

    add("inspect", _inspect, "show the tree: paths, shapes, dtypes, bytes, layout", "ckpt")
    sub = add("suggest", _suggest, "propose a rule book, with its evidence", "twin")
    sub.add_argument("-o", dest="out", metavar="RULES", help="write it to this file, a new one")
    for name, command, text, names in (
        ("plan", _plan, "show what would be done to every leaf; writes nothing", ["ckpt"]),
        ("run", _run, "translate to OUT, which must not exist; atomic", ["ckpt", "out"]),
    ):
        sub = add(name, command, text, *names)
        sub.add_argument("--to", required=True, metavar="TARGET", help=_TARGET)
        sub.add_argument("--like", metavar="CKPT", help="a checkpoint that OUT must equal in form")
        add_rules(sub, "suggest the rule book, or with --rules the shapes that it fills")
    sub.add_argument("--link", action="store_true", help="hard-link data files, do not copy them")
    sub.add_argument("--digest", action="store_true", help="hash linked files, too")
    sub = add("verify", _verify, "prove OUT right against CKPT", "ckpt", "out")
    sub.add_argument("--to", metavar="TARGET", help="what OUT is (default: what its report says)")
    add_rules(sub, "run both models, too")
    sub.set_defaults(build=build)
    text = "run both twins layer by layer, show the first divergence (then exit code 1)"
    sub = add("bisect", _bisect, text, "twin")
    weights = "weights of either form, or one of each (default: random ones)"
    sub.add_argument("checkpoints", metavar="CKPT", nargs="*", help=weights)
    sub.add_argument("--rules", metavar="FILE", help="rule book (default: what suggest finds)")
    sub.add_argument("--png", metavar="FILE", help="where to plot the error of each layer")
    train = "call both in training: dropout on, statistics of the batch"
    sub.add_argument("--train", dest="training", action="store_true", help=train)
    _check_spelling(parser, commands.choices, words)
    return parser


def _check_spelling(
    parser: argparse.ArgumentParser,
    commands: Mapping[str, argparse.ArgumentParser],
    words: Sequence[str],
) -> None:
    """Refuses an unknown command or option, as argparse does, and says what it may have been."""
    command = next(iter(words), "-")
    if command in commands:
        known = [o for action in commands[command]._actions for o in action.option_strings]
        for word in itertools.takewhile("--".__ne__, words):
            option = word.partition("=")[0]
            if option.startswith("--") and not any(name.startswith(option) for name in known):
                commands[command].error(f"unknown option `{option}`{_near(option, known)}")
    elif not command.startswith("-"):
        parser.error(f"unknown command `{command}`{_near(command, commands)}")


def _near(word: str, known: Iterable[str]) -> str:
    from linen_nnx.book.grammar import did_you_mean

    return did_you_mean(word, list(known)) or f"; known: {', '.join(known)}"


def _step(text: str) -> float:
    from linen_nnx.disk.steps import number_in

    try:
        return number_in(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None


def _twin(text: str) -> str:
    if not all(text.rpartition(":")):
        raise argparse.ArgumentTypeError(f"expected {_HELP['twin']}, got {text!r}")
    return text


def _inspect(
    ckpt: str,
    as_json: bool,
    step: float | None,
    item: str | None,
    prefix: list[str],
    runs: str | None,
) -> int:
    from linen_nnx.book.rules import RuleBook
    from linen_nnx.disk.beside import items_beside, source_of
    from linen_nnx.disk.describe import describe
    from linen_nnx.disk.sides import guess_side
    from linen_nnx.disk.sources import find
    from linen_nnx.disk.state import Form, read_state

    source = find(ckpt, step, item, prefix=prefix, runs=_runs(runs))
    leaves, book = source.leaves, RuleBook([])
    if source.said is None:
        described, form = describe(leaves), Form(guess_side(leaves, book) or "nnx")
    else:
        described, form = None, Form("linen", source.said.stage, source.said.forms)
    layout = described or read_state(leaves, form, book).layout
    beside = {
        name: len(source_of(source, path).leaves) for name, path in items_beside(source).items()
    }
    if as_json:
        content = [
            {"path": leaf.path, "spec": _spec(leaf), "bytes": leaf.nbytes, "type": leaf.value_type}
            for leaf in leaves
        ]
        found = {"found": str(source), "layout": layout, "notes": source.notes, "beside": beside}
        return _print_json({**found, "leaves": content})
    _table([(leaf.path, _spec(leaf), _bytes(leaf.nbytes)) for leaf in leaves])
    total = sum(leaf.nbytes for leaf in leaves)
    print(f"\n{source}: {layout}\n{len(leaves)} leaves, {_bytes(total)}")
    for name, count in beside.items():
        print(f"beside   item `{name}`, {count} leaves (--item {name} shows them)")
    for note in source.notes:
        print(f"note     {note}")
    return 0


def _suggest(twin: str, out: str | None, as_json: bool) -> int:
    if out is not None and os.path.exists(out):
        raise FileExistsError(f"{out} exists: choose another file")
    book = _suggested(twin)
    if out is not None:
        book.save(out)
    if as_json:
        _print_json({"complete": not book.unassigned, "out": out, **book.to_dict()})
        return int(bool(book.unassigned))
    rows = [_rule(entry) for entry in book.to_dict()["rules"]]
    width = min(60, max((len(linen) for linen, _, _ in rows), default=0))
    for linen, nnx, note in rows:
        print(f"{linen:{width}}  ->  {nnx}\n    {note}")
    for leaf, known in book.unassigned.items():
        print(f"UNASSIGNED {known.side} {leaf}\n    {known.reason}")
        print(f"    candidates: {_few(known.candidates)}")
        if known.likely is not None:
            print(f"    likely, not proven: {_one_rule(known.likely)}")
    print("".join(f"\nnote     {note}" for note in book.notes))
    print(f"{len(book.rules)} rules, {len(book.unassigned)} leaves unassigned")
    for pairing in book.draws:
        for pair in pairing.to_dict()["pairs"]:
            print(f"draw {pair['linen']}  ->  {pair['nnx']}\n    in {pairing.kind}")
    if book.unassigned:
        print("write rules for those by hand; until then the book translates nothing")
        if out is not None and any(known.likely for known in book.unassigned.values()):
            print(f"{out} has the likely ones as comments: uncomment those that are right")
    if out is not None:
        print(f"{out} is written")
    return int(bool(book.unassigned))


def _one_rule(rule: Any) -> str:
    """A rule on one line."""
    from linen_nnx.book.grammar import rule_to_dict

    linen, nnx, _ = _rule(rule_to_dict(rule))
    return f"{linen} -> {nnx}"


def _rule(entry: dict[str, Any]) -> tuple[str, str, str]:
    """How a rule is shown: its Linen side, its nnx side with the ops, its evidence."""
    sides = [entry.get(side, "(nothing)") for side in ("linen", "nnx")]
    linen, nnx = (side if isinstance(side, str) else " + ".join(side) for side in sides)
    for op in entry.get("ops", ()):
        shown = {key: value for key, value in op.items() if key not in ("op", "data")}
        settings = ", ".join(f"{key} {value}" for key, value in shown.items())
        nnx += f"  {op['op']}({settings})"
    return linen, nnx, entry.get("note", "")


def _suggested(twin: str) -> Any:
    """The rule book of a twin."""
    from linen_nnx.ladder.suggest import suggest

    return suggest(_loaded(twin), lambda text: print(text, file=sys.stderr))


def _loaded(twin: str) -> Any:
    """The twin; from here on there is work for the garbage collector, which `program` stops."""
    from linen_nnx.infer.twin import Twin

    gc.enable()
    return Twin.load(twin)


def _by_twin(twin: str | None, to: str, rules: str | None) -> dict[str, Any]:
    """What a twin adds to a conversion: the rule book, or beside one the shapes of the target."""
    if twin is None:
        return {"rules": rules}
    if rules is None:
        return {"rules": _suggested(twin)}
    from linen_nnx.infer.trace import trace_linen, trace_nnx

    trace = trace_linen if to == "linen" else trace_nnx
    return {"rules": rules, "specs": trace(_loaded(twin)).leaves}


def _plan(
    ckpt: str,
    to: str,
    as_json: bool,
    twin: str | None,
    rules: str | None,
    runs: str | None,
    **options: Any,
) -> int:
    from linen_nnx.disk.planning import plan_conversion

    options |= {**_by_twin(twin, to, rules), "runs": _runs(runs)}
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
        (job["engine"], _first(job["from"]), "->", _first(job["to"]), _first(job["specs"]))
        for job in jobs
    )
    print(_summary(conversion.summary()))
    if any(len(job[key]) > 1 for job in jobs for key in ("from", "to")):
        print("note     of several leaves the first is shown, and how many there are (--json: all)")
    return 0


def _run(
    ckpt: str,
    out: str,
    to: str,
    as_json: bool,
    twin: str | None,
    rules: str | None,
    runs: str | None,
    **options: Any,
) -> int:
    from linen_nnx.disk.convert import convert

    options |= {**_by_twin(twin, to, rules), "runs": _runs(runs)}
    result = convert(ckpt, out, to, progress=_progress(), **options)
    reports = [{k: v for k, v in report.items() if k != "origin"} for report in result.reports]
    if as_json:
        return _print_json({"status": result.status, "out": str(result.out), "reports": reports})
    for report in reports:
        print(_summary(report))
    done = "was there already and is equal" if result.status == "equal" else "is complete"
    print(f"{result.out} {done}")
    return 0


def _verify(
    ckpt: str,
    out: str,
    to: str | None,
    as_json: bool,
    twin: str | None,
    runs: str | None,
    build: str | None,
    **options: Any,
) -> int:
    from linen_nnx.proof.verify import verify

    def built(said: Any) -> Any:
        gc.enable()
        return _named(build)(said)

    progress = _progress()
    words = {True: "ok", False: "FAILED", None: "not proved"}

    def show(check: Any) -> None:
        if not as_json:
            progress("")  # makes room on the terminal's line
            details = (f"\n{'':14}{detail}" for detail in check.details)
            word = "close" if check.close else words[check.passed]
            print(f"{word:12}{check.name}", *details, sep="", flush=True)

    options |= {"twin": _loaded(twin) if twin else None, "build": built if build else None}
    options["runs"] = _runs(runs)
    checks = verify(ckpt, out, to, progress=progress, report=show, **options)
    failed = any(check.passed is False for check in checks)
    if as_json:
        content = [vars(check) for check in checks]
        _print_json({"passed": not failed, "checks": content})
        return int(failed)
    if not any(check.name.endswith("by an output") for check in checks):
        why = "the checks above come first" if twin else "--twin TWIN"
        print(f"The models were not run, and so the rule book is taken at its word: {why}")
    return int(failed)


def _runs(name: str | None) -> Any:
    """What a training code says of its runs, if one has given the name of that."""
    from linen_nnx.disk.runs import NO_RUNS

    return NO_RUNS if name is None else _named(name)


def _named(name: str | None) -> Any:
    """What is called `module:NAME`."""
    module, _, attribute = (name or "").partition(":")
    return getattr(import_module(module), attribute)


def _bisect(
    twin: str,
    checkpoints: list[str],
    rules: str | None,
    png: str | None,
    training: bool,
    as_json: bool,
    runs: str | None,
) -> int:
    from linen_nnx.proof import show
    from linen_nnx.proof.bisect import bisect

    found = bisect(_loaded(twin), rules, checkpoints, _runs(runs), training)
    if png is not None:
        show.plot(found, png)
    if as_json:
        _print_json(show.content(found))
    else:
        _table(show.table(found))
        print("\n" + "\n".join(show.conclusion(found)))
    return int(found.first is not None)


def _summary(report: dict[str, Any]) -> str:
    lines = [
        f"found    {report['found']}",
        f"writes   {report['to']}",
        "leaves   " + ", ".join(f"{count} {engine}" for engine, count in report["leaves"].items()),
        f"bytes    {_bytes(report['bytes'])}, {_bytes(report['bytes_streamed'])} of them streamed",
        f"memory   about {_bytes(report['peak_memory'])} at the peak",
    ]
    for word, key in (("dropped", "dropped"), ("filled", "filled"), ("as it is", "as_they_are")):
        if report.get(key):
            lines.append(f"{word:9}{', '.join(report[key])}")
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


def _first(texts: Sequence[str]) -> str:
    """The first of some texts, and how many there are if they differ."""
    count = len(set(texts))
    return texts[0] + (f", ... ({count})" if count > 1 else "") if texts else "-"


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
