"""The model of each experiment as a twin, for `convert.py suggest`, `bisect` and `verify --twin`.

    python convert.py suggest training.twins:diabetes -o model/mlp/rules.yaml

It is called as the family's `inputs` say, in evaluation.
"""

import model
from linen_nnx import Twin
from training import compose, data, datasets
from training.runtime.cli import CONFIGS

ROWS = 4  # of an example batch; two would do, and what is traced is the same for any number


def __getattr__(experiment: str) -> Twin:
    """The twin of an experiment.

    Raises:
        AttributeError: when there is none of that name.
        ConfigError: when its configuration is wrong.
    """
    if not (CONFIGS / "experiment" / f"{experiment}.yaml").is_file():
        raise AttributeError(f"there is no configs/experiment/{experiment}.yaml")
    cfg = compose(f"experiment={experiment}")
    rows = min(ROWS, cfg.data["batch"])
    batch = data.example(datasets.create({**cfg.data, "batch": rows}))
    return model.create(cfg.model).ladder(batch, None).twin
