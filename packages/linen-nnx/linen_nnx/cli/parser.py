"""The words of the command line: which commands there are, and which options each of them has."""

import argparse
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from linen_nnx.cli import bisect, inspect, plan, run, suggest, verify

TWIN = "path/to/file.py:NAME or package.module:NAME"
CKPT = (
    "a run directory, a CheckpointManager's root or step, an Orbax directory, or a file; on a "
    "disk, or in a bucket as gs://BUCKET/PATH or s3://BUCKET/PATH"
)
OUT = "what to create, or what was created; *.msgpack, *.safetensors: a file"
TARGET = (
    "linen or nnx: the layout that stock Flax restores; or, of a checkpoint that says the form of "
    "its parts, a stage (a whole run directory goes to a stage, also for linen and nnx)"
)
# Words that people bring from other programs.
_OTHER_COMMANDS = {
    "check": "verify", "compare": "bisect", "convert": "run", "diff": "bisect", "export": "run",
    "infer": "suggest", "list": "inspect", "ls": "inspect", "migrate": "run", "preview": "plan",
    "show": "inspect", "translate": "run", "validate": "verify",
}  # fmt: skip
_OTHER_OPTIONS = {
    "--book": "--rules", "--dry-run": "plan", "--form": "--to", "--mapping": "--rules",
    "--model": "--twin", "--output": "-o", "--plot": "--png", "--reference": "--like",
    "--source": "--from", "--stage": "--to", "--symlink": "--link", "--target": "--to",
    "--verbose": "--leaves", "--weights-only": "--model-only",
}  # fmt: skip


def parsed(
    words: Sequence[str], name: str, runs: str | None, build: str | None
) -> argparse.Namespace:
    """The command that the words ask for, as `command`, and what to call it with.

    Args:
      words: the words of the command line.
      name: what the program is called; `runs`, `build`: see `cli.main`.

    Raises:
      SystemExit: with code 2, after a message, for a word that is mistyped.
    """
    text = "Translates checkpoints between Flax Linen and Flax NNX, bit for bit."
    parser = argparse.ArgumentParser(prog=name, description=text)
    parser.add_argument("--version", action=_Version, help="show the version of the library")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(command: Callable[..., int], word: str, text: str, **settings: Any) -> Any:
        sub = commands.add_parser(word, help=text, description=text)
        sub.set_defaults(command=command, **settings)
        text = "print a machine-readable result"
        sub.add_argument("--json", dest="as_json", action="store_true", help=text)
        return sub

    # In the order in which they are used; `--help` lists them so.
    text = "show the tree: paths, shapes, dtypes, bytes, layout"
    sub = add(inspect.inspect, "inspect", text, runs=runs)
    add_checkpoint(sub)

    text = "propose a rule book, with its evidence"
    sub = add(suggest.suggest, "suggest", text)
    sub.add_argument("twin", type=twin_name, metavar="TWIN", help=TWIN)
    sub.add_argument("-o", dest="out", metavar="RULES", help="write it to this file, a new one")

    text = "show what would be done to every leaf; writes nothing"
    sub = add(plan.plan, "plan", text, runs=runs)
    add_checkpoint(sub)
    add_conversion(sub)
    text = "show each leaf by itself, not each rule"
    sub.add_argument("--leaves", dest="by_leaf", action="store_true", help=text)

    text = "translate to OUT, which must not exist; atomic"
    sub = add(run.run, "run", text, runs=runs)
    add_checkpoint(sub)
    sub.add_argument("out", metavar="OUT", help=OUT)
    add_conversion(sub)
    sub.add_argument("--link", action="store_true", help="hard-link data files, do not copy them")
    sub.add_argument("--digest", action="store_true", help="hash linked files, too")

    sub = add(verify.verify, "verify", "prove OUT right against CKPT", runs=runs, build=build)
    add_checkpoint(sub)
    sub.add_argument("out", metavar="OUT", help=OUT)
    sub.add_argument("--to", metavar="TARGET", help="what OUT is (default: what its report says)")
    add_rules(sub, "run both models, too")

    text = "run both twins layer by layer, show the first divergence (then exit code 1)"
    sub = add(bisect.bisect, "bisect", text, runs=runs)
    sub.add_argument("twin", type=twin_name, metavar="TWIN", help=TWIN)
    text = "weights of either form, or one of each (default: random ones)"
    sub.add_argument("checkpoints", metavar="CKPT", nargs="*", help=text)
    sub.add_argument("--rules", metavar="FILE", help="rule book (default: what suggest finds)")
    sub.add_argument("--png", metavar="FILE", help="where to plot the error of each layer")
    text = "call both in training: dropout on, statistics of the batch"
    sub.add_argument("--train", dest="training", action="store_true", help=text)

    _check_spelling(parser, commands.choices, words)
    return parser.parse_args(words)


def add_checkpoint(sub: Any) -> None:
    """CKPT, and which step and item of it."""
    sub.add_argument("ckpt", metavar="CKPT", help=CKPT)
    text = "which step of a root (default: the latest)"
    sub.add_argument("--step", type=step_number, help=text)
    sub.add_argument("--item", help="which item of a step holds the state, if several may")
    text = "which series of steps, as `model-` of `model-100`; repeated: together one state"
    # Several, as some scripts save the optimizer beside the model: `model-100`, `optimizer-100`.
    sub.add_argument("--prefix", action="append", default=[], help=text)


def add_conversion(sub: Any) -> None:
    """What `plan` and `run` are told of the result."""
    sub.add_argument("--to", required=True, metavar="TARGET", help=TARGET)
    sub.add_argument("--like", metavar="CKPT", help="a checkpoint that OUT must equal in form")
    add_rules(sub, "suggest the rule book, or with --rules the shapes that it fills")


def add_rules(sub: Any, use_of_twin: str) -> None:
    """By which rules, and what of the checkpoint is left out."""
    sub.add_argument("--rules", metavar="FILE", help="rule book (default: the checkpoint's)")
    text = f"{TWIN}: {use_of_twin}"
    sub.add_argument("--twin", type=twin_name, metavar="TWIN", help=text)
    text = "leave the optimizer's state out"
    sub.add_argument("--reset-optimizer", action="store_true", help=text)
    text = "leave all but the model's parameters and collections out"
    sub.add_argument("--model-only", action="store_true", help=text)
    text = "the form of CKPT, where its names and the rule book do not tell"
    sub.add_argument("--from", dest="side", choices=("linen", "nnx"), help=text)


def step_number(text: str) -> float:
    """The number of `--step`."""
    from linen_nnx.disk.steps import number_in

    try:
        return number_in(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None


def twin_name(text: str) -> str:
    """The text of TWIN, which `Twin.load` reads."""
    # Checked here and not when the twin is loaded: a name without a colon is a mistake of usage.
    if not all(text.rpartition(":")):
        raise argparse.ArgumentTypeError(f"expected {TWIN}, got {text!r}")
    return text


class _Version(argparse.Action):
    """Prints the version. It is looked up only then, which takes longer than parsing."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from linen_nnx import __version__

        print(f"{parser.prog} (linen-nnx {__version__})")
        parser.exit()


def _check_spelling(
    parser: argparse.ArgumentParser,
    commands: Mapping[str, argparse.ArgumentParser],
    words: Sequence[str],
) -> None:
    """Refuses an unknown command or option, as argparse does, and says what it may have been."""
    # argparse itself says `invalid choice` with the list of all, and the word that was meant is not
    # seen among them.
    command = next(iter(words), "-")
    if command.startswith("-"):
        return  # `--help`, say
    if command not in commands:
        hint = _near(command, commands, _OTHER_COMMANDS)
        parser.error(f"unknown command `{command}`{hint}")
    known: list[str] = []
    for action in commands[command]._actions:
        known += action.option_strings
    # Behind a bare `--` everything is a name, as that of a checkpoint called `--old`.
    for word in itertools.takewhile("--".__ne__, words):
        option = word.partition("=")[0]
        # argparse takes the beginning of an option for the whole of it.
        if option.startswith("--") and not any(name.startswith(option) for name in known):
            hint = _near(option, known, _OTHER_OPTIONS)
            commands[command].error(f"unknown option `{option}`{hint}")


def _near(word: str, known: Iterable[str], others: Mapping[str, str]) -> str:
    """What a mistyped word may have been: a near one, or one of the same meaning; else all."""
    from linen_nnx.book.grammar import did_you_mean

    meant = others.get(word)
    if meant is not None and (meant in known or not meant.startswith("-")):
        return f"; did you mean `{meant}`?"
    return did_you_mean(word, list(known)) or f"; known: {', '.join(known)}"
