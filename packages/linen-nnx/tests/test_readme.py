"""README.md does what it says, in a stranger's project with the installed package alone."""

from pathlib import Path

import orbax.checkpoint as ocp
import pytest
from convert_helpers import bits
from pages import ROOT, Block, Shell, blocks, follow

INSTALL = "pip install linen-nnx"
PIP = "python -m pip install -q --no-index --no-deps --no-build-isolation"
MINE = {
    "mine/linen_model.py": """
import flax.linen as nn

class MyLinen(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.relu(nn.Dense(self.width, name="hidden")(x)))
""",
    "mine/nnx_model.py": """
from flax import nnx

class MyNnx(nnx.Module):
    def __init__(self, width, rngs):
        self.first = nnx.Linear(16, width, rngs=rngs)
        self.last = nnx.Linear(width, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.first(x)))
""",
    "mine/train.py": """
from pathlib import Path
import jax, jax.numpy as jnp, optax, orbax.checkpoint as ocp
from flax.training.train_state import TrainState
from mine.linen_model import MyLinen

TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))

if __name__ == "__main__":
    model, x = MyLinen(width=64), jnp.ones((2, 16))
    state = TrainState.create(
        apply_fn=model.apply, params=model.init(jax.random.key(0), x)["params"], tx=TX
    )
    for _ in range(3):
        grads = jax.grad(lambda p: (model.apply({"params": p}, x) ** 2).sum())(state.params)
        state = state.apply_gradients(grads=grads)
    with ocp.CheckpointManager(Path("checkpoints").absolute()) as manager:
        manager.save(3, args=ocp.args.StandardSave(state))
""",
}


@pytest.mark.slow
def test_the_library_alone_takes_a_strangers_checkpoint_to_nnx_and_back(tmp_path: Path) -> None:
    mine, site = tmp_path / "mine", tmp_path / "site"
    for name, content in MINE.items():
        (mine / name).parent.mkdir(parents=True, exist_ok=True)
        (mine / name).write_text(content)
    shell = Shell(mine, site / "bin")
    shell.env["PYTHONPATH"] = str(site)
    shell.run("python -m mine.train")
    before = "from mine.nnx_model import MyNnx\nfrom mine.train import TX as tx\n"
    page = [
        Block(b.section, b.language, b.text.replace("/absolute/path", str(mine)), b.file)
        for b in blocks(ROOT / "README.md")
    ]
    copy = tmp_path / "library"
    instead = {INSTALL: f"cp -r {ROOT} {copy} && {PIP} --target {site} {copy}"}

    follow(page, shell, instead, before=before)

    trees = []
    for name in ("checkpoints", "back"):
        with ocp.CheckpointManager(mine / name) as manager:
            trees.append(bits(manager.restore(3, args=ocp.args.StandardRestore())))
    assert trees[0] == trees[1]


def test_the_example_of_the_rules_page() -> None:
    follow(blocks(ROOT / "docs" / "rules.md"), Shell(ROOT))
