"""Disease progression of 442 patients from ten measurements; ships with scikit-learn."""

from dataclasses import dataclass

import numpy as np

from configs.build import Fraction
from training import datasets
from training.datasets import Dataset, Rows, digest
from training.runtime.errors import Refused


@dataclass(frozen=True)
class Options(datasets.Options):
    """See `configs/data/diabetes.yaml` for meanings and units."""

    val_fraction: Fraction


def load(options: Options) -> Dataset:
    """Inputs (10,) and targets (1,) float32, standardised by the statistics of the training split.

    Baseline, as mean squared error: `mean`.

    Raises:
        Refused: one training example alone has no spread to standardise by.
    """
    from sklearn.datasets import load_diabetes

    features, progression = map(np.asarray, load_diabetes(return_X_y=True, scaled=False))
    progression = progression[:, None]
    order = np.random.default_rng(options.seed).permutation(len(features))
    count = min(max(round(options.val_fraction * len(order)), 1), len(order) - 1)
    validation, train = order[:count], order[count:]
    if len(train) < 2:
        raise Refused(
            f"data.val_fraction is {options.val_fraction}: {len(train)} training example of "
            "diabetes has no spread to standardise by. Choose a value nearer to 0.1."
        )

    def standardised(values: np.ndarray) -> np.ndarray:
        return ((values - values[train].mean(0)) / values[train].std(0)).astype(np.float32)

    inputs, targets = standardised(features), standardised(progression)
    return Dataset(
        options=options,
        train=Rows({"inputs": inputs[train], "targets": targets[train]}),
        validation=Rows({"inputs": inputs[validation], "targets": targets[validation]}),
        description=(
            f"scikit-learn's bundled diabetes records, 10 features each: {len(train)} to "
            f"train on, {len(validation)} to validate with"
        ),
        # Standardised targets have a training mean of 0: predicting it leaves the target itself.
        baselines={"mean": float(np.mean(targets[validation].astype(np.float64) ** 2))},
        digest=digest(features, progression),
    )
