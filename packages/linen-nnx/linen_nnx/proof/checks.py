"""What a verification says: one `Check` for each thing that was looked at."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One line of a verification.

    Attributes:
      name: what was looked at.
      passed: whether it is right; None where nothing was, or could be, proved.
      details: the measured figures, or every fault.
      close: passed, but not in every bit: what differs is of the size of rounding.

    Example:
        >>> Check("exact inverse", None, ("leaves are dropped",)).passed is None
        True
    """

    name: str
    passed: bool | None
    details: tuple[str, ...] = ()
    close: bool = False
