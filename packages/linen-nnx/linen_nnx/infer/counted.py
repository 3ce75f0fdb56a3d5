"""Arrays of numbers that count regularly, kept as a few steps.

The elements of a leaf are numbered, and a slot says which of them it uses. A product with a kernel
(3, 2) uses column by column what is stored row by row:

    kernel  [[0 1]        slot  [[0 2 4]       0 2 4 1 3 5:  3 steps of 2, then 2 steps of 1
             [2 3]               [1 3 5]]
             [4 5]]

However large a kernel is, its slot is two pairs of numbers. It is read like the digits of a clock,
the innermost fastest: `steps` has the outermost first.

    >>> slot = Counted.of(np.arange(6).reshape(3, 2).T)
    >>> slot.steps, slot.first, slot.shape
    (((2, 1), (3, 2)), 0, (2, 3))
    >>> slot.array()
    array([[0, 2, 4],
           [1, 3, 5]])

What is not regular (a kernel that was put together from two leaves) is kept as it is.
"""

from typing import NamedTuple

import numpy as np

Array = np.ndarray
Steps = tuple[tuple[int, int], ...]


class Counted(NamedTuple):
    """An array of integers.

    Attributes:
      shape: its shape.
      dtype: its dtype.
      first: its first element; 0 where it is empty.
      steps: (how many, how far apart) of each digit, the outermost first.
      whole: the array itself where it is not regular; then there are no steps.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    first: int
    steps: Steps
    whole: Array | None = None

    @classmethod
    def of(cls, array: Array) -> "Counted":
        """Keeps an array as steps if it is regular.

        Example:
            >>> Counted.of(np.array([4, 6, 8])).steps, Counted.of(np.array([4, 6, 9])).steps
            (((3, 2),), ())
        """
        flat = array.reshape(-1)
        first = int(flat[0]) if flat.size else 0
        steps = _steps(flat)
        if steps is None:
            return cls(array.shape, array.dtype, first, (), array)
        return cls(array.shape, array.dtype, first, steps)

    @property
    def bounds(self) -> tuple[int, int]:
        """Its smallest and its largest element.

        Example:
            >>> Counted.of(np.array([[5, 3], [9, 7]])).bounds
            (3, 9)
        """
        if self.whole is not None:
            return int(self.whole.min()), int(self.whole.max())
        low = high = self.first
        for count, step in self.steps:
            way = (count - 1) * step
            low, high = low + min(way, 0), high + max(way, 0)
        return low, high

    def array(self) -> Array:
        """The array, made anew where it is kept as steps."""
        if self.whole is not None:
            return self.whole
        return _counted(self.first, self.steps, self.dtype).reshape(self.shape)


def _steps(flat: Array) -> Steps | None:
    """The steps in which a vector counts; None if it does not count regularly."""
    steps: Steps = ()
    left = flat
    while left.size > 1:
        step = int(left[1]) - int(left[0])
        count = _run(left, step)
        if left.size % count:
            return None
        steps = ((count, step), *steps)
        left = left[::count]
    # So far only the beginning of each run was looked at.
    first = int(flat[0]) if flat.size else 0
    again = _counted(first, steps, flat.dtype) if flat.size else flat
    return steps if np.array_equal(again, flat) else None


def _run(numbers: Array, step: int) -> int:
    """How many numbers from the first on are one step apart.

    Looked for in pieces that double: most runs are far shorter than the vector.
    """
    length = 64
    while True:
        uneven = np.flatnonzero(np.diff(numbers[:length]) != step)
        if uneven.size:
            return int(uneven[0]) + 1
        if length >= numbers.size:
            return numbers.size
        length *= 2


def _counted(first: int, steps: Steps, dtype: np.dtype) -> Array:
    """The vector that starts at a number and counts in steps."""
    numbers = np.array([first], dtype)
    # From the innermost digit out: each one repeats what is counted so far, a step further on.
    for count, step in reversed(steps):
        start = np.arange(count, dtype=dtype) * step
        numbers = (start[:, None] + numbers).reshape(-1)
    return numbers
