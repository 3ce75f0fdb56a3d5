"""Loggers beside TensorBoard: a CSV file, Weights & Biases, MLflow.

The last two import their package when a run asks for it; `training.config` has refused before that
what is not installed. Without a server both keep what they get in the run directory.
"""

import csv
import hashlib
import html
import os
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from training.runtime.vouching import flat

HEADING = ("step", "name", "value")
MOST = 100  # metrics or settings that MLflow takes at once


class Csv:
    """`metrics.csv`: a line `step,name,value` for each number, for not all rows have the same."""

    def __init__(self, run_dir: Path, step: int) -> None:
        """Keeps the lines up to `step`, which is what the run goes on from."""
        path = run_dir / "metrics.csv"
        self.is_new = not path.exists()
        kept: list[list[str]] = []
        if not self.is_new:
            with path.open(newline="") as file:
                # Of a run that was killed between two saves: it draws those steps again.
                kept = [line for line in list(csv.reader(file))[1:] if int(line[0]) <= step]
        self._file = path.open("w", newline="")
        self._writer = csv.writer(self._file)
        self._writer.writerows([HEADING, *kept])

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._writer.writerows((step, name, value) for name, value in values.items())
        self._file.flush()

    def histograms(self, step: int, leaves: Mapping[str, np.ndarray]) -> None:
        """None: a table of numbers has no place for them, nor for texts and images."""

    def text(self, step: int, name: str, value: str) -> None: ...

    def image(self, step: int, name: str, value: np.ndarray) -> None: ...

    def close(self, finished: bool) -> None:
        self._file.close()


class WandB:
    """A run of Weights & Biases; with WANDB_MODE=offline kept in `wandb/`, for `wandb sync`."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any], project: str) -> None:
        wandb: Any = import_module("wandb")
        self._wandb = wandb
        was_here = (run_dir / "wandb").exists()  # offline no server says that it knows the run
        self._run: Any = wandb.init(
            project=project,
            name=run_dir.name,
            id=_identity(run_dir),
            resume="allow",
            dir=str(run_dir),
            config=dict(config),
            settings=wandb.Settings(silent=True, console="off"),
        )
        self.is_new = not self._run.resumed and not was_here
        # Steps of its own only grow. A run that was killed goes on from an earlier step, whose rows
        # would be dropped: so the step is a value like the others, and the axis of them all.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def histograms(self, step: int, leaves: Mapping[str, np.ndarray]) -> None:
        made = {f"params/{path}": self._wandb.Histogram(leaf) for path, leaf in leaves.items()}
        self._run.log({"step": step, **made})

    def text(self, step: int, name: str, value: str) -> None:
        self._run.log({"step": step, name: self._wandb.Html(f"<pre>{html.escape(value)}</pre>")})

    def image(self, step: int, name: str, value: np.ndarray) -> None:
        self._run.log({"step": step, name: self._wandb.Image(value)})

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class MLflow:
    """A run of MLflow: of MLFLOW_TRACKING_URI, else of `mlruns/` in the run directory."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any], experiment: str) -> None:
        mlflow: Any = import_module("mlflow")
        entities: Any = import_module("mlflow.entities")
        self._metric = entities.Metric
        # MLflow would rather have a database, which needs more packages; for one run files do.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        local = (run_dir / "mlruns").absolute().as_uri()
        self._client: Any = mlflow.MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", local))
        known = self._client.get_experiment_by_name(experiment)
        number = known.experiment_id if known else self._client.create_experiment(experiment)
        tags = {"mlflow.runName": run_dir.name, "run": _identity(run_dir)}
        # MLflow chooses its own ids, so the run is found again by a tag.
        earlier = self._client.search_runs([number], f"tags.run = '{tags['run']}'")
        self.is_new = not earlier
        run = earlier[0] if earlier else self._client.create_run(number, tags=tags)
        self._id = run.info.run_id
        self._client.update_run(self._id, status="RUNNING")
        if self.is_new:
            settings = [entities.Param(key, str(value)) for key, value in flat(config).items()]
            for begin in range(0, len(settings), MOST):
                self._client.log_batch(self._id, params=settings[begin : begin + MOST])

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(name, value, now, step) for name, value in values.items()]
        for begin in range(0, len(metrics), MOST):
            self._client.log_batch(self._id, metrics=metrics[begin : begin + MOST])

    def histograms(self, step: int, leaves: Mapping[str, np.ndarray]) -> None:
        """None: MLflow has no such chart."""

    def text(self, step: int, name: str, value: str) -> None:
        self._client.log_text(self._id, value, f"{name}/{step}.txt")

    def image(self, step: int, name: str, value: np.ndarray) -> None:
        self._client.log_image(self._id, value, f"{name}/{step}.png")

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")


def _identity(run_dir: Path) -> str:
    """The same for the same run directory, so that a run that goes on is one there as well."""
    return hashlib.sha256(str(run_dir.absolute()).encode()).hexdigest()[:16]
