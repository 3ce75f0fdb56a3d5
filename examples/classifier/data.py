"""Sentences of made-up words, to be told good or bad; `not` turns the word after it round."""

from dataclasses import dataclass

import numpy as np

from configs.build import Count
from training import datasets
from training.datasets import Dataset, Rows, digest

GOOD, BAD, NOT = range(1, 10), range(10, 19), 19  # 0 fills up; from 20 on, words without a weight


@dataclass(frozen=True)
class Options(datasets.Options):
    """See `configs/data/classifier.yaml` for meanings."""

    sentences: Count
    length: Count
    vocab: Count


def load(options: Options) -> Dataset:
    """Words (length,) int32, filled up with 0; lengths () int32; labels () int32."""
    random = np.random.default_rng(options.seed)
    shape = options.sentences, options.length
    words = random.integers(1, options.vocab, shape, dtype=np.int32)
    lengths = random.integers(options.length // 4, options.length + 1, len(words), dtype=np.int32)
    words *= np.arange(options.length) < lengths[:, None]
    weight = np.isin(words, GOOD).astype(int) - np.isin(words, BAD)
    weight[:, 1:] *= np.where(words[:, :-1] == NOT, -1, 1)
    labels = (weight.sum(axis=1) > 0).astype(np.int32)
    arrays = {"words": words, "lengths": lengths, "labels": labels}
    count = options.sentences // 5
    train = Rows({name: array[count:] for name, array in arrays.items()})
    validation = Rows({name: array[:count] for name, array in arrays.items()})
    share = float(labels[:count].mean())
    return Dataset(
        options,
        train,
        validation,
        f"{options.sentences} made-up sentences of {options.length // 4} to {options.length} words",
        digest=digest(words, lengths, labels),
        baselines={"majority": max(share, 1 - share)},
        classes=2,
    )
