"""The error that ends a run with a message and without a traceback."""


class Refused(Exception):
    """The run was asked for something that it will not do: the message says what, where, and what
    to do instead. Reported by `training.cli.run` with exit code 1."""
