"""Numbers kept as steps come back as they were, and cost nothing where they are regular."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from linen_nnx.infer.counted import Counted

LENGTHS = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@given(LENGTHS, st.randoms(), st.integers(0, 9))
def test_every_turn_reshape_and_slice_of_a_leaf_is_kept_as_steps(lengths, random, start) -> None:
    numbers = np.arange(start, start + int(np.prod(lengths)), dtype=np.int32).reshape(lengths)
    turned = numbers.transpose(random.sample(range(numbers.ndim), numbers.ndim))
    for array in (turned, turned.reshape(turned.shape[0], -1), turned[::2], turned[..., ::-1]):
        counted = Counted.of(array)
        assert counted.whole is None
        _is_kept(counted, array)


@given(st.lists(st.integers(-1, 6), min_size=1, max_size=12))
def test_any_numbers_come_back(numbers) -> None:
    array = np.array(numbers)
    _is_kept(Counted.of(array), array)


def _is_kept(counted: Counted, array: np.ndarray) -> None:
    again = counted.array()
    assert (again.shape, again.dtype) == (array.shape, array.dtype)
    assert again.tobytes() == array.tobytes()
    assert counted.first == array.flat[0]
    assert counted.bounds == (array.min(), array.max())
