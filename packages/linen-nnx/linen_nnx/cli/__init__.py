"""The command line of the translator. Exit code 0: done; 1: refused, with every reason; 2: usage.

`program` is a process of its own (`linen-nnx`, `convert.py`); `main` runs one command inside
another program, such as a test. Each command is one module:

    inspect   suggest   plan   run   verify   bisect

They share `parser` (which words there are), `output` (tables, JSON, progress), `models` (what a
name on the command line stands for) and `stopping` (Ctrl-C). A command imports what it needs when
it runs, so that `--help` takes hardly longer than Python.
"""

import sys
from collections.abc import Sequence

from linen_nnx.cli import stopping


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

    Raises:
      SystemExit: with code 2 for words that are no command, and 0 after `--help` or `--version`.

    Example:
      >>> from linen_nnx.cli import main
      >>> main(["inspect", "no/such/place"])
      1
    """
    # The import is inside: it takes longer than all that is above it, so a Ctrl-C often meets it.
    try:
        from linen_nnx.cli.parser import parsed

        options = vars(parsed(sys.argv[1:] if arguments is None else arguments, name, runs, build))
        code = options.pop("command")(**options)
        sys.stdout.flush()  # while it can still be said in one line that nobody reads it
        return code
    except BaseException as error:
        # The test comes first, as an interruption may arrive as another error: a module of C++
        # that is interrupted while it is imported raises ImportError.
        number = stopping.signal_behind(error)
        if number is not None:
            stopping.ignore()
            print(f"{stopping.WORDS[number]}: nothing was left behind", file=sys.stderr)
            return 128 + number  # as a shell says of a program that a signal has ended
        return _refused(error)


def _refused(error: BaseException) -> int:
    """Says in one message why a command was refused; raises what is no refusal."""
    from linen_nnx.cli.output import complain
    from linen_nnx.errors import Refusal

    # `inspect X | head` is no mistake: nothing is said.
    if isinstance(error, BrokenPipeError):
        return stopping.without_reader()
    if isinstance(error, OSError):
        # Not `str(error)`, which begins with the number of the error.
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        complain(f"{' to '.join(names)}: {error.strerror}" if names else str(error))
    elif isinstance(error, Refusal):
        complain(str(error))
    else:
        # A bug of this library, which keeps its traceback; or the end of the parser.
        raise error
    return 1


def program(name: str = "linen-nnx", *, runs: str | None = None, build: str | None = None) -> int:
    """`main` in a process of its own, whose signals, memory and time it may tune."""
    # Before anything is imported that takes time.
    stopping.listen()
    import contextlib
    import ctypes
    import gc
    import io

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file may have any bytes as its name
    gc.disable()  # a short life with many small objects and few cycles of them: 15 % faster
    with contextlib.suppress(OSError, AttributeError):
        # M_ARENA_MAX: else glibc keeps the freed buffers of streamed leaves once for each thread.
        ctypes.CDLL(None).mallopt(-8, 1)
    try:
        code = main(name=name, runs=runs, build=build)
        if code > 128:
            stopping.end(code)
        return code
    finally:
        gc.freeze()  # nor look for cycles at the end
        stopping.leave()
