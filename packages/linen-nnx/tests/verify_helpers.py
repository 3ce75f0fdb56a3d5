"""A port with a trained checkpoint, as a stranger brings them, and checks by name.

Twelve equal blocks with square kernels, a BatchNorm, and a LayerNorm: all that a fault can hide in.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training.train_state import TrainState
from pairs import gru_cells

from linen_nnx import RuleBook, Twin

WIDTH, DEPTH = 8, 12
# No norm over leaves: a sum in the order of their names rounds otherwise on each side.
TX = optax.chain(optax.clip(1.0), optax.adamw(1e-2))
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, WIDTH)), jnp.float32)


class LinenPort(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, name="bn")(x)
        for i in range(DEPTH):
            x = x + nn.tanh(nn.Dense(WIDTH, name=f"blk_{i}")(x))
        return nn.Dense(3, name="out")(nn.LayerNorm(name="ln")(x))


class NnxPort(nnx.Module):
    def __init__(self, rngs, epsilon=1e-6):
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(DEPTH)])
        self.last = nnx.LayerNorm(WIDTH, epsilon=epsilon, rngs=rngs)
        self.out = nnx.Linear(WIDTH, 3, rngs=rngs)

    def __call__(self, x):
        x = self.norm(x)
        for block in self.blocks:
            x = x + nnx.tanh(block(x))
        return self.out(self.last(x))


def in_evaluation(model, x):
    model.eval()
    return model(x)


def port(**options):
    """The twin; `options` go to the nnx model."""
    return Twin(
        linen=LinenPort,
        nnx=lambda rngs: NnxPort(rngs, **options),
        inputs=lambda: (X,),
        call_nnx=in_evaluation,
        optimizer=TX,
    )


twin = port()

gru = gru_cells().twin  # nnx has no home for one of its biases: that leaf stays open


def rename(linen, nnx, **more):
    return {"linen": linen, "nnx": nnx, **more}


RULES = {
    f"block {i}": rename(f"params/blk_{i}/{{leaf}}", f"blocks/{i}/{{leaf}}") for i in range(12)
}
RULES |= {
    "scale": rename("params/bn/scale", "norm/scale"),
    "shift": rename("params/bn/bias", "norm/bias"),
    "mean": rename("batch_stats/bn/mean", "norm/mean"),
    "var": rename("batch_stats/bn/var", "norm/var"),
    "last": rename("params/ln/{leaf}", "last/{leaf}"),
    "out": rename("params/out/kernel", "out/kernel"),
    "out bias": rename("params/out/bias", "out/bias"),
}


def book(**changes):
    """The true rule book, with some of its rules in another form (a list: several for one)."""
    rules = {**RULES, **{name.replace("_", " "): rule for name, rule in changes.items()}}
    flat = [
        rule for entry in rules.values() for rule in (entry if type(entry) is list else [entry])
    ]
    return RuleBook.from_dict({"version": 1, "rules": flat})


class Trained(TrainState):
    batch_stats: object


@jax.jit
def _step(state, x):
    def loss(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        y, updates = state.apply_fn(variables, x, train=True, mutable=["batch_stats"])
        return jnp.mean((y - x[:, :3] ** 2) ** 2), updates["batch_stats"]

    grads, stats = jax.grad(loss, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads).replace(batch_stats=stats)


def trained():
    """A Linen training state after five steps."""
    model = LinenPort()
    variables = model.init(jax.random.key(0), X)
    state = Trained.create(apply_fn=model.apply, tx=TX, **variables)
    for step in range(5):
        state = _step(state, X + step)
    return state
