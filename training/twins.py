"""The model of each experiment as a twin, for `convert.py suggest`, `bisect` and `verify --twin`.

    python convert.py suggest training.twins:diabetes -o model/mlp/rules.yaml
    python convert.py suggest training.twins:examples/vae/configs/vae -o examples/vae/rules.yaml

An experiment of another folder (`train.py --config-dir`) has the folder before its name. The model
is called as the family's `inputs` say, in evaluation.
"""

from pathlib import Path

from linen_nnx import Twin

import model
from configs.build import did_you_mean
from training import compose, data
from training.runtime.cli import CONFIGS

ROWS = 4  # of an example batch; two would do, and what is traced is the same for any number


def __getattr__(experiment: str) -> Twin:
    """The twin of an experiment.

    Raises:
        AttributeError: when there is none of that name.
        ConfigError: when its configuration is wrong.
    """
    folder, slash, name = experiment.rpartition("/")
    path = Path(folder) if slash else CONFIGS
    if not (path / "experiment" / f"{name}.yaml").is_file():
        known = [file.stem for file in path.glob("experiment/*.yaml")]
        hint = did_you_mean(name, known) if known else ""
        raise AttributeError(f"there is no {path}/experiment/{name}.yaml{hint}")
    cfg = compose(f"experiment={name}", config_dir=path)
    return model.create(cfg.model).ladder(data.example(cfg.data, ROWS), None).twin
