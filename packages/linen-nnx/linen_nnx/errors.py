"""The error that everything refused has in common, and how messages name things."""

from collections.abc import Iterable


class Refusal(ValueError):
    """Something that this library will not do: the message says what, where, and what to do.

    On a command line each is one message and exit code 1. Its kinds:

        RuleError, Mismatch   a rule book that does not fit
        StoreError            a checkpoint that cannot be read
        DigestError           files that differ from their digests
        TargetError           a target that cannot be written
        TwinError             models that cannot be built or run
        VariablesError        variables that do not fit a stage of a ladder
        DrawError             random keys that cannot be given as Linen would give them

    Example:
      >>> from linen_nnx import Refusal, RuleBook
      >>> try:
      ...     RuleBook.from_dict({"version": 1, "rules": [{"linen": "params/{", "nnx": "a"}]})
      ... except Refusal as refusal:
      ...     print(type(refusal).__name__)
      RuleError
    """


def quoted(names: Iterable[str]) -> str:
    """Names as messages list them.

    Example:
      >>> quoted(["params/d/kernel", "params/d/bias"])
      '`params/d/kernel`, `params/d/bias`'
    """
    return ", ".join([f"`{name}`" for name in names])
