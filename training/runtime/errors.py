"""The error that ends a run with a message and without a traceback."""

from linen_nnx.errors import Refusal


class Refused(Refusal):
    """The run was asked for something that it will not do.

    The message says what, where, and what to do instead. `training.runtime.cli.run` reports it with
    exit code 1, as every `Refusal`.
    """


def refuse(problems: list[str]) -> None:
    """Raises one `Refused` with every problem, if there is any."""
    if problems:
        raise Refused("\n".join(problems))
