"""Data sets by name: a data set is a module of this folder, found by its file's name.

One elsewhere is named by its module, as in `data.name: examples.sums.data`. Such a module holds
`Options`, a frozen dataclass of the keys in `configs/data/<name>.yaml`, and `load(options)`, which
returns a `Dataset`. It may hold `example(options)`, a batch made without the files that `options`
names; else the first batch of the data is the example. What is read in which order is
`training/data.py`. Nothing here imports jax or Grain.
"""

import hashlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from configs.build import Count, Natural, build, module_of
from training.runtime.errors import Refused

Batch = Any  # a pytree of arrays, rows first: a dict, a tuple, nested


@dataclass(frozen=True)
class Options:
    """What every data set has; its own options are a subclass.

    Attributes:
        name: of the module.
        batch: rows of a batch, over all processes.
        seed: of the order, and of a split.
    """

    name: str
    batch: Count
    seed: Natural


class Source(Protocol):
    """Examples that can be read in any order, many at a time."""

    def __len__(self) -> int: ...

    def take(self, indices: np.ndarray) -> Batch:
        """Reads the examples at `indices` (rows,) as one batch, in that order."""
        ...


@dataclass(frozen=True)
class Rows:
    """Examples that are the rows of arrays.

    Attributes:
        arrays: by name, (examples, ...) each.

    >>> Rows({"inputs": np.arange(10), "length": np.ones(10)}).take(np.array([3, 1]))
    {'inputs': array([3, 1]), 'length': array([1., 1.])}
    """

    arrays: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def take(self, indices: np.ndarray) -> Batch:
        return {name: array[indices] for name, array in self.arrays.items()}


@dataclass(frozen=True)
class Dataset:
    """What there is to learn from, and what a report needs to know of it.

    `train` and `validation` are one of these:

    - a `Source`, such as `Rows`, or anything with `len(x)` and `x[i]` that gives single examples, a
      Grain `MapDataset` or a list among them. It is shuffled anew in each epoch, and batched.
    - a stream of whole batches, of all processes together: anything for which `iter(x)` returns an
      iterator with `get_state()` and `set_state(state)`, a Grain `IterDataset` among them. It is
      read as it is, and must give the same batches whenever it is read. To train on, it should not
      end; to validate with, it must, and needs no state.

    Attributes:
        options: what `load` was called with.
        train: the examples to learn from.
        validation: the examples that training never sees.
        description: one line for people: where the data is from, how much, how split.
        digest: names the exact data, whatever its path; saved with a position in it.
        baselines: scores of models that need no training, on the whole validation split.
        classes: how many values a target can have (256 of a byte, 10 of a digit); None where it is
            a number.
    """

    options: Options
    train: Any
    validation: Any
    description: str
    digest: str
    baselines: dict[str, float] = field(default_factory=dict)
    classes: int | None = None


def create(mapping: Mapping[str, Any]) -> Options:
    """The options of the data set that `mapping["name"]` names.

    Raises:
        configs.build.ConfigError: for an unknown data set or option, naming every problem.
    """
    return build(_module(mapping.get("name")).Options, mapping, at="data")


def load(options: Options) -> Dataset:
    """Reads the data set.

    Raises:
        Refused: the options do not fit the data, or its files cannot be used; the message names
            every reason.
    """
    dataset: Dataset = _module(options.name).load(options)
    train = dataset.train
    # A stream has no length, and gives batches as they are.
    if hasattr(train, "__len__") and options.batch > len(train):
        raise Refused(
            f"data.batch is {options.batch}, more than the {len(train)} training examples of "
            f"{options.name}: a batch would hold an example twice. Choose a smaller data.batch."
        )
    return dataset


def example(options: Options) -> Batch | None:
    """A batch of `options.batch` rows that needs no files; None where the data set has none."""
    make = getattr(_module(options.name), "example", None)
    return None if make is None else make(options)


def digest(*arrays: np.ndarray) -> str:
    """A short name for the exact contents of arrays."""
    found = hashlib.sha256()
    for array in arrays:
        # Else the same bytes in another shape, 64 images of 8 x 8 or one of 64 x 64, were the same
        # data.
        found.update(f"{array.dtype.str}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()[:16]


def _module(name: Any) -> Any:
    known = [module.name for module in pkgutil.iter_modules(__path__)]
    return module_of("data.name", name, __name__, known)
