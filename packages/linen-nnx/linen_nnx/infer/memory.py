"""Hands freed memory back to the system, where it is known how."""

import ctypes
from functools import lru_cache
from typing import Any


def give_back() -> None:
    """Hands back what was freed, between two steps that each take several times a model's size.

    glibc keeps freed arrays of up to 32 MB, in one pool for each thread. The next step would take
    its own beside them: twice the memory, for a model of 64 MB.

    Source: malloc_trim(3), and M_MMAP_THRESHOLD in mallopt(3).

    Example:
        >>> give_back()
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@lru_cache(maxsize=1)
def _malloc_trim() -> Any:
    """glibc's function of that name; None with another C library."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # musl and macOS, Windows
        return None
