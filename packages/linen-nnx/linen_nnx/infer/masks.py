"""Sets of small numbers as the bits of one integer.

    >>> mask = mask_of([0, 2])            # 0b101
    >>> holds_bit(mask, 2), holds_bit(mask, 1)
    (True, False)
    >>> unpacked([mask, 0], 3)
    array([[1., 0., 1.],
           [0., 0., 0.]], dtype=float32)

`dataflow.py` joins such a set at every equation of a model. A union of two sets of 1,500 numbers
takes 80 microseconds as Python sets and 0.1 as integers.
"""

from collections.abc import Iterable, Mapping

import numpy as np


def mask_of(numbers: Iterable[int]) -> int:
    """The set of some numbers, which may repeat."""
    mask = 0
    for number in numbers:
        mask |= 1 << int(number)  # a numpy integer would overflow at 64
    return mask


def holds_bit(mask: int, number: int) -> bool:
    """Whether a number is in a set."""
    return bool(mask >> number & 1)


def renamed(mask: int, names: Mapping[int, int]) -> int:
    """The set with some numbers replaced, old to new.

    Example:
        >>> renamed(mask_of([1, 2]), {1: 5, 3: 6}) == mask_of([5, 2])
        True
    """
    for old, new in names.items():
        if holds_bit(mask, old):
            mask = mask & ~(1 << old) | 1 << new
    return mask


def unpacked(masks: list[int], count: int) -> np.ndarray:
    """(masks, count) float32: 1 where a set holds a number, else 0."""
    # All masks in one buffer, so that numpy unpacks them at once.
    width = (count + 7) // 8
    data = b"".join(mask.to_bytes(width, "little") for mask in masks)
    bytes_of = np.frombuffer(data, np.uint8).reshape(len(masks), width)
    bits = np.unpackbits(bytes_of, axis=1, bitorder="little")
    return bits[:, :count].astype(np.float32)
