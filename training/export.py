"""The model of a checkpoint alone, for those who know nothing of this template (`mode=export`).

    RUN/export/600/nnx/                what Orbax and Flax restore, see below
    RUN/export/600/model.safetensors   the same arrays by name, for anything that reads them
    RUN/export/600/model.yaml          the options of the model

Whatever stage the checkpoint is of, the exported model is all nnx. Its parameters are those that
evaluation uses: the average, where the run keeps one.
"""

import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import yaml
from flax import nnx
from linen_nnx.book.tree import flatten
from linen_nnx.disk.remote import as_path
from safetensors.flax import save_file

from configs.schema import Config
from training import moving
from training.assemble import Setup
from training.evaluation import setup_of
from training.runtime import checkpoints, homes, processes
from training.runtime.errors import Refused
from training.runtime.terminal import show

RESTORE = """\
The model of step {step} is written. To restore it, here:
  import model, orbax.checkpoint as ocp, yaml
  from flax import nnx
  path = "{path}"
  options = yaml.safe_load(open(f"{{path}}/model.yaml"))
  net = model.create(options).in_nnx(nnx.Rngs(0))
  state = nnx.state(net, nnx.Not(nnx.RngState))
  nnx.update(net, ocp.StandardCheckpointer().restore(f"{{path}}/nnx", state))"""


def export(cfg: Config) -> None:
    """Writes the model of the newest checkpoint: of `run_dir`, or where that has none, `init_from`.

    Raises:
        Refusal: when there is no checkpoint, or one is damaged.
    """
    home = homes.home(cfg.run_dir, cfg.checkpoint.dir)
    # A run that has gone on from another one names that still, and is not the other one any more.
    if cfg.init_from is not None and not checkpoints.steps_of(home / "checkpoints"):
        saved = checkpoints.find(as_path(cfg.init_from))
    else:
        saved, _ = checkpoints.of_run(Path(cfg.run_dir), home)
    if cfg.checkpoint.verify:
        saved.intact()
    setup = setup_of(cfg, saved, stage="nnx")
    state = moving.moved(setup, saved)
    variables = setup.collections(state) | {"params": setup.steps.evaluated(state)}
    arrays: dict[str, Any] = {}
    for name, array in flatten(setup.program.fetch(variables)).items():
        # An nnx module has one tree for all collections: `params/encoder/w` is `encoder.w`.
        arrays[name.split("/", 1)[1]] = array
    if processes.first():
        path = Path(cfg.run_dir).absolute() / "export" / str(saved.step)
        _write(path, setup, arrays)
        show(RESTORE.format(step=saved.step, path=path))


def _write(path: Path, setup: Setup, arrays: dict[str, Any]) -> None:
    """All three files, under the path's name only when they are complete."""
    part = path.with_name(f".{path.name}.part")
    # An export of the same step is the same model, so it may be replaced.
    for old in (part, path):
        shutil.rmtree(old, ignore_errors=True)
    part.mkdir(parents=True)
    # The model itself gives the tree, so that what is restored into such a model fits by
    # construction.
    state = nnx.state(setup.family.in_nnx(nnx.Rngs(0)), nnx.Not(nnx.RngState))
    places = {"/".join(map(str, place)): leaf for place, leaf in nnx.to_flat_state(state)}
    if lacking := sorted(arrays.keys() - places.keys()):
        raise Refused(f"The nnx model has no {', '.join(lacking)}, which the stage has.")
    placed = {name: jax.numpy.asarray(array) for name, array in arrays.items()}
    for name, array in placed.items():
        places[name].set_value(array)
    with ocp.StandardCheckpointer() as writer:
        writer.save(part / "nnx", state)
    save_file(placed, part / "model.safetensors", {"format": "nnx", "step": path.name})
    (part / "model.yaml").write_text(yaml.safe_dump(setup.cfg.model, sort_keys=False))
    part.replace(path)
