"""Every optimizer of optax on the same gradients, at stages that name and stack leaves otherwise.

`python -m tests.optimizers` prints the table of `docs/optimizers.md`, measured anew.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx
from linen_nnx import Ladder, Part, RuleBook
from linen_nnx.book.tree import flatten, unflatten

from configs.build import ConfigError
from configs.schema import Optimizer
from training import chains, optimizer
from training.runtime.view import View

# What a factory is called with, where it cannot do without; the others have their defaults.
ARGUMENTS = {
    "adaptive_grad_clip": {"clipping": 0.01},
    "add_noise": {"eta": 0.01, "gamma": 0.5, "seed": 0},
    "apply_if_finite": {"inner": "adam", "max_consecutive_errors": 3},
    "clip": {"max_delta": 0.1},
    "clip_by_block_rms": {"threshold": 0.1},
    "clip_by_global_norm": {"max_norm": 0.1},
    "ema": {"decay": 0.9},
    "flatten": {"inner": "adam"},
    "freeze": {"mask": "rest"},
    "lbfgs": {"linesearch": None},
    "masked": {"inner": "adam", "mask": "matrices"},
    "mechanize": {"base_optimizer": "adam"},
    "noisy_sgd": {"seed": 0},
    "sam": {"optimizer": "sgd", "adv_optimizer": ["normalize", "sgd"]},
    "scale": {"step_size": 0.5},
    "scale_by_rprop": {"learning_rate": 0.01},
    "scale_by_schedule": {
        "step_size_fn": {
            "linear_schedule": {"init_value": 1.0, "end_value": 0.5, "transition_steps": 4}
        }
    },
    "schedule_free": {"base_optimizer": "adam"},
    "selective_transform": {"optimizer": "adam", "freeze_mask": "rest"},
    "split_real_and_imaginary": {"inner": "adam"},
    "trace": {"decay": 0.9},
    "with_extra_args_support": {"tx": "adam"},
    "schedule_free_adamw": {"learning_rate": 0.1},
    "schedule_free_sgd": {"learning_rate": 0.1},
    "rprop": {"learning_rate": 0.1},
    "sm3": {"learning_rate": 0.1},
    "galore": {"rank": 2},
    "scale_by_galore": {"rank": 2},
}

# The same numbers in three forms. Renaming changes the order in which leaves are added up; what
# stacks two layers changes their shapes as well.
BOOKS = {
    "renamed": [
        {"linen": "params/encoder/z/{leaf}", "nnx": "encoder/layers/0/{leaf}"},
        {"linen": "params/encoder/y/{leaf}", "nnx": "encoder/layers/1/{leaf}"},
        {"linen": "params/head/x/{leaf}", "nnx": "head/last/{leaf}"},
        {"linen": "params/head/scale", "nnx": "head/a_scale"},
    ],
    "stacked": [
        {"linen": "params/encoder/Scan/{leaf}", "nnx": "encoder/layers/{i}/{leaf}",
         "ops": [{"op": "stack", "capture": "i", "axis": 0}]},
        {"linen": "params/head/x/{leaf}", "nnx": "head/last/{leaf}"},
        {"linen": "params/head/scale", "nnx": "head/a_scale"},
    ],
}  # fmt: skip
STEPS = 4
DRAWS = 6  # of parameters and gradients: one alone may add up to the same by luck


def tree(seed):
    """`{"params/half/path": array}` in nnx form."""
    rng = np.random.default_rng(seed)
    shapes = {"head/a_scale": (4,)}
    for path, shape in (("encoder/layers/0", (6, 5)), ("encoder/layers/1", (6, 5)),
                        ("head/last", (5, 4))):  # fmt: skip
        shapes |= {f"{path}/kernel": shape, f"{path}/bias": shape[1:]}
    return {
        f"params/{path}": jnp.asarray(rng.normal(size=shape), jnp.float32)
        for path, shape in shapes.items()
    }


class Affine(nn.Module):
    """A kernel and a bias, and nothing done with them."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self):
        self.param("kernel", nn.initializers.zeros, self.shape)
        self.param("bias", nn.initializers.zeros, (*self.shape[:-2], self.shape[-1]))


class LinenEncoder(nn.Module):
    stacked: bool

    @nn.compact
    def __call__(self, x):
        shapes = {"Scan": (2, 6, 5)} if self.stacked else {"z": (6, 5), "y": (6, 5)}
        for name, shape in shapes.items():
            Affine(shape, name=name)()
        return x


class LinenHead(nn.Module):
    @nn.compact
    def __call__(self, x):
        Affine((5, 4), name="x")()
        self.param("scale", nn.initializers.zeros, (4,))
        return x


class NnxEncoder(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(6, 5, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        return x


class NnxHead(nnx.Module):
    def __init__(self, rngs):
        self.last = nnx.Linear(5, 4, rngs=rngs)
        self.a_scale = nnx.Param(jnp.zeros(4))

    def __call__(self, x):
        return x


def ladder(form):
    """A model that has the leaves of `tree`, in Linen as a book of `BOOKS` says."""
    return Ladder(
        parts={
            "encoder": Part(LinenEncoder(form == "stacked"), NnxEncoder),
            "head": Part(LinenHead(), NnxHead),
        },
        forward=lambda parts, x: parts.head(parts.encoder(x)),
        inputs=lambda: (jnp.zeros(1),),
        rules=RuleBook.from_dict({"version": 1, "rules": BOOKS[form]}),
    )


def trained(name, stage, model):
    """The parameters of each draw, in nnx form, after some updates; raises `ConfigError`."""
    view = View(model.at(stage))
    cfg = Optimizer(
        name="named", chain=[{name: ARGUMENTS.get(name, {})}], lr=0.1, weight_decay=0.0,
        schedule="constant", warmup=0, end_lr_factor=1.0, clip_norm=None, accumulate=1, ema=None,
        parts={},
    )  # fmt: skip
    transformation = optimizer.create(cfg, STEPS, view)

    @jax.jit
    def step(params, state, grads, value):
        updates, state = transformation.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    found = {}
    for draw in range(DRAWS):
        first = 10 * draw
        params = unflatten(model.translate(tree(first), "nnx", stage))["params"]
        state = transformation.init(params)
        for index in range(STEPS):
            grads = unflatten(model.translate(tree(first + index + 1), "nnx", stage))["params"]
            params, state = step(params, state, grads, 1.0 / (index + 1))
        moved = model.translate(flatten({"params": params}), stage, "nnx")
        for path, leaf in moved.items():
            found[draw, path] = np.asarray(leaf)
    return found


def difference(name, form):
    """The largest difference between stages, as a share of how far a leaf moved; 0: same bits."""
    model = ladder(form)
    results = [trained(name, stage, model) for stage in ("nnx", "nnx_in_linen", "linen")]
    worst = 0.0
    for (draw, path), leaf in results[0].items():
        move = np.abs(leaf - tree(10 * draw)[path]).max()
        for other in results[1:]:
            if leaf.tobytes() != other[draw, path].tobytes():
                apart = np.abs(leaf - other[draw, path]).max()
                worst = max(worst, float(apart / max(move, 1e-30)))
    return worst


def measure(name):
    """A row of the table: what a factory does under renaming and under stacking, or why not."""
    try:
        return {form: difference(name, form) for form in BOOKS}
    except ConfigError as error:
        return next(iter(error.problems.values()))


if __name__ == "__main__":
    for name in sorted(chains.factories()):
        print(name, measure(name), flush=True)
