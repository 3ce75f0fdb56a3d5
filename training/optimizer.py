"""One Optax transformation over both halves of the model, built from the configuration."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from configs.schema import Optimizer
from model.stages import HALVES
from training.leaves import View, path_name

Schedule = Callable[[Any], Any]


def schedule(cfg: Optimizer, steps: int) -> Schedule:
    """The learning rate as a function of the number of updates done, int32 -> float32.

    Args:
        cfg: warm-up is linear from 0 and counted in updates.
        steps: length of the run in batches; a batch is 1/`accumulate` of an update.
    """
    updates = max(1, steps // cfg.accumulate)
    decay = max(1, updates - cfg.warmup)
    end = cfg.lr * cfg.end_lr_factor
    after = {
        "cosine": optax.cosine_decay_schedule(cfg.lr, decay, alpha=cfg.end_lr_factor),
        "linear": optax.linear_schedule(cfg.lr, end, decay),
        "constant": optax.constant_schedule(cfg.lr),
    }[cfg.schedule]
    if not cfg.warmup:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(0.0, cfg.lr, cfg.warmup), after], [cfg.warmup]
    )


def create(cfg: Optimizer, steps: int, view: View) -> optax.GradientTransformation:
    """Clipping, the update rule, decoupled weight decay, per-half factors, schedule; accumulated.

    Weight decay acts on leaves of rank 2 and more that are not biases, judged on the nnx form of
    the parameters and so alike at each stage. A frozen half has no moments, takes no part in the
    clipping norm and gets updates of exactly zero.
    """
    frozen = {half: getattr(cfg, half).freeze for half in HALVES}
    trained = [half for half in HALVES if not frozen[half]]
    parts = []
    if cfg.clip_norm is not None:
        parts.append(_clip(cfg.clip_norm, view, trained))
    parts.append(_rule(cfg))
    if cfg.weight_decay:
        parts.append(optax.add_decayed_weights(cfg.weight_decay, _decays(view)))
    for half in trained:
        factor = getattr(cfg, half).lr_factor
        if factor != 1:
            parts.append(optax.masked(optax.scale(factor), {h: h == half for h in HALVES}))
    parts.append(optax.scale_by_learning_rate(schedule(cfg, steps)))
    transformation = optax.chain(*parts)
    if any(frozen.values()):
        labels = {half: "frozen" if frozen[half] else "trained" for half in HALVES}
        transformation = optax.partition(
            {"trained": transformation, "frozen": optax.set_to_zero()}, labels
        )
    if cfg.accumulate > 1:
        transformation = optax.MultiSteps(transformation, cfg.accumulate).gradient_transformation()
    return transformation


def _rule(cfg: Optimizer) -> optax.GradientTransformation:
    # The schema has made sure that an optimizer's settings are there, and that others are null.
    settings = {"b1": cfg.b1, "b2": cfg.b2, "eps": cfg.eps}
    given: dict[str, Any] = {key: value for key, value in settings.items() if value is not None}
    match cfg.name:
        case "adamw":
            return optax.scale_by_adam(**given)
        case "lion":
            return optax.scale_by_lion(**given)
        case "adafactor":
            parts = [
                optax.scale_by_factored_rms(epsilon=given["eps"]),
                optax.clip_by_block_rms(1.0),
                optax.scale_by_param_block_rms(),
            ]
            if cfg.momentum is not None:
                parts.append(optax.ema(cfg.momentum, debias=False))
            return optax.chain(*parts)
        case "sgd":
            return optax.identity() if cfg.momentum is None else optax.trace(cfg.momentum)


def _decays(view: View) -> Callable[[Any], Any]:
    decays = view.mask(lambda path, rank: rank >= 2 and not path.endswith("bias"))
    return partial(jax.tree_util.tree_map_with_path, lambda path, _: decays[path_name(path)])


def _clip(max_norm: float, view: View, halves: list[str]) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` with a norm that does not depend on the order of names."""

    def clip(updates: Any, params: Any = None) -> Any:
        norm = view.norm(updates, halves)
        scale = jnp.where(norm < max_norm, 1.0, max_norm / norm)
        return jax.tree.map(lambda u: u * scale.astype(u.dtype), updates)

    return optax.stateless(clip)
