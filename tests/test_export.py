"""The exported model is the one that evaluation uses, in ordinary nnx and in safetensors."""

import re

import numpy as np
import pytest
from conftest import Train
from flax import nnx
from safetensors.numpy import load_file

from training import compose, export, moving
from training.assemble import prepare
from training.runtime import checkpoints


@pytest.mark.sampled(1)
@pytest.mark.parametrize("experiment", ["digits", "lm"])
def test_the_lines_that_it_prints_restore_the_model(
    train: Train, experiment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # Statistics of BatchNorm, an average of the parameters, a Linen stage: all of it counts.
    options = ("stage=linen", "steps=3", "optimizer.warmup=0", "optimizer.ema=0.5")
    run_dir = train(experiment, *options)
    # A run that has changed stage names the one that it came from still.
    other = f"init_from={run_dir / 'elsewhere'}"
    cfg = compose(f"experiment={experiment}", "mode=export", f"run_dir={run_dir}", other)
    capsys.readouterr()

    export.export(cfg)

    said = capsys.readouterr().out
    scope: dict[str, object] = {}
    exec("\n".join(re.findall(r"^  (.*)$", said, re.MULTILINE)), scope)
    net = scope["net"]
    assert isinstance(net, nnx.Module)
    net.eval()
    saved = checkpoints.find(run_dir)
    setup = prepare(export.setup_of(cfg, saved, stage="nnx").cfg)
    state = moving.moved(setup, saved)
    variables = setup.collections(state) | {"params": state["ema"]}
    inputs = setup.family.module.inputs(setup.example)
    np.testing.assert_array_equal(
        net(*inputs, train=False), setup.stage.apply(variables, *inputs, train=False)
    )
    arrays = load_file(run_dir / "export" / "3" / "model.safetensors")
    for name, leaf in setup.view.leaves(state["ema"]).items():
        np.testing.assert_array_equal(arrays[name], leaf)
