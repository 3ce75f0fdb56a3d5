"""Handwritten digits that ship with scikit-learn: 1797 images of 8 x 8, ten classes."""

from dataclasses import dataclass

import numpy as np

from configs.build import Fraction
from training import datasets
from training.datasets import Dataset, Rows, digest
from training.runtime.errors import Refused


@dataclass(frozen=True)
class Options(datasets.Options):
    """See `configs/data/digits.yaml` for meanings and units."""

    val_fraction: Fraction


def load(options: Options) -> Dataset:
    """Inputs (8, 8, 1) float32 from 0 to 1, targets () int32.

    The split keeps the share of each class. Baseline, as accuracy: `majority`.

    Raises:
        Refused: one side of the split would lack a digit.
    """
    from sklearn.datasets import load_digits

    pixels, labels = map(np.asarray, load_digits(return_X_y=True))
    inputs = (pixels / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    targets = labels.astype(np.int32)
    order = np.random.default_rng(options.seed).permutation(len(targets))
    in_validation = np.zeros(len(targets), bool)
    for label in range(10):
        members = order[targets[order] == label]
        count = round(options.val_fraction * len(members))
        if count in (0, len(members)):
            raise Refused(
                f"data.val_fraction is {options.val_fraction}: of the {len(members)} images of "
                f"digit {label}, {count} would be validation, and both sides need every digit. "
                "Choose a value nearer to 0.1."
            )
        in_validation[members[:count]] = True
    train, validation = np.flatnonzero(~in_validation), np.flatnonzero(in_validation)
    majority = np.bincount(targets[train]).argmax()
    return Dataset(
        options=options,
        train=Rows({"inputs": inputs[train], "targets": targets[train]}),
        validation=Rows({"inputs": inputs[validation], "targets": targets[validation]}),
        description=(
            f"scikit-learn's bundled handwritten digits of 8 x 8 pixels: {len(train)} to "
            f"train on, {len(validation)} to validate with"
        ),
        baselines={"majority": float(np.mean(targets[validation] == majority))},
        classes=10,
        digest=digest(inputs, targets),
    )
