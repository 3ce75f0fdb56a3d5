"""The errors that end a run with a message and without a traceback."""


class Refused(Exception):
    """The run was asked for something that it will not do: the message says what, where, and what
    to do instead. Reported by `training.cli.run` with exit code 1."""


class DataError(Refused, ValueError):
    """Data that cannot be used as asked."""


def refuse_data(problems: list[str]) -> None:
    """Raise one `DataError` with every problem, if there is any."""
    if problems:
        raise DataError("\n".join(problems))
