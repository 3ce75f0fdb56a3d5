"""One Optax transformation over all parts of the model, built from the configuration.

    clip_norm -> chain -> weight_decay -> lr_factor of each part -> schedule        of each update

Around it: a frozen part is left out, and `accumulate` batches are averaged. The chain is the
configuration's (`training/chains.py`), or a Python function of one's own.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import optax
from optax.contrib import ScheduleFreeState, schedule_free_eval_params

from configs.build import ConfigError, did_you_mean, refuse
from configs.schema import Optimizer, Part
from training import chains
from training.runtime.names import named, path_name
from training.runtime.view import View

Schedule = Callable[[Any], Any]
Own = Callable[[Optimizer, Schedule, View], optax.GradientTransformation]

NEEDS_MORE = (
    "An update gets the gradients, the parameters and value=, the loss. What needs more, such as "
    "a line search (value_fn) or a perturbed gradient, takes a training step of its own; lbfgs "
    "does without: {lbfgs: {linesearch: null}}."
)


def schedule(cfg: Optimizer, steps: int) -> Schedule:
    """The learning rate as a function of the number of updates done, int32 -> float32.

    Args:
        cfg: warm-up is linear from 0 and counted in updates.
        steps: length of the run in batches; a batch is 1/`accumulate` of an update.
    """
    # optax counts updates, and the run counts batches: a schedule in batches would end too early by
    # the factor `accumulate`.
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


def check(mapping: Mapping[str, Any], parts: Sequence[str]) -> None:
    """Looks at the `optimizer` group of a configuration; `parts` are those of its model.

    Raises:
        configs.build.ConfigError: naming everything wrong with `chain` and `weight_decay`.
    """
    chain = mapping.get("chain")
    if not isinstance(chain, list):
        return  # null, or a wrong type, of which the schema speaks
    # Nothing of the model is known yet. Any mask will do, for the factories are only built, so that
    # a mistyped argument is answered before data and model are loaded.
    everything: Any = partial(jax.tree.map, lambda _: True)
    masks = dict.fromkeys(("matrices", "rest", "all", *parts), everything)
    chains.build(chain, _anywhere(masks))
    _check_settings(chain, mapping.get("weight_decay"), mapping.get("ema"))


def shown_rate(cfg: Optimizer, steps: int) -> Schedule:
    """The learning rate for `metrics.jsonl`: one that the chain itself gives, else the run's."""
    return own_rate(cfg) or schedule(cfg, steps)


def own_rate(cfg: Optimizer) -> Schedule | None:
    """The learning rate that the chain itself gives, if it does."""
    return None if cfg.chain is None else chains.own_rate(cfg.chain, _anywhere({}))


def _anywhere(masks: Mapping[str, chains.Mask]) -> chains.Surroundings:
    """What a chain is built with where no model is at hand."""
    rate = optax.constant_schedule(1.0)
    return chains.Surroundings(rate, masks, lambda names: lambda params: params, optax.tree.norm)


def create(
    cfg: Optimizer, steps: int, view: View, own: Own | None = None
) -> optax.GradientTransformationExtraArgs:
    """The transformation that a run trains with; its `update` also takes `value`, the loss.

    Weight decay acts on leaves of rank 2 and more that are not biases, judged on the nnx form of
    the parameters and so alike at each stage. A frozen part has no moments, takes no part in the
    clipping norm and gets updates of exactly zero.

    Args:
        cfg: the `optimizer` group of the configuration.
        steps: length of the run in batches.
        view: the parameters, free of the names that a stage gives them.
        own: what stands in for the chain where `cfg.chain` is null. It is called with `cfg`, the
            schedule and `view`, and applies the learning rate itself.

    Raises:
        configs.build.ConfigError: for what does not fit the model; also by the transformation,
            when the chain needs more in an update than it gets.
    """
    _check_parts(cfg, view.parts)
    _check_settings(cfg.chain, cfg.weight_decay, cfg.ema)
    # A frozen part would otherwise still weigh in the norm, and how hard the others are clipped
    # would depend on gradients that nobody uses.
    trained = [part for part in view.parts if not _is_frozen(cfg, part)]
    rate = schedule(cfg, steps)
    norm = partial(view.norm, parts=trained)
    parts = [] if cfg.clip_norm is None else [chains.clip_by_norm(cfg.clip_norm, norm)]
    if cfg.chain is not None:
        parts += chains.build(
            cfg.chain, chains.Surroundings(rate, _masks(view), partial(_named, view), norm)
        )
    elif own is not None:
        parts.append(own(cfg, rate, view))
    else:
        text = "got null; this model family has no function `optimizer` to stand in for it"
        raise ConfigError({"optimizer.chain": text})
    # adamw applies the rate itself, scale_by_adam does not. Applied twice, an update would be about
    # a thousand times too small, and the run would only seem to learn slowly.
    takes_rate = cfg.chain is None or chains.takes_rate(cfg.chain)
    # After the chain and before the rate, as in optax.adamw: the decay is decoupled from the
    # moments, and follows the schedule.
    if cfg.weight_decay:
        parts.append(optax.add_decayed_weights(cfg.weight_decay, _masks(view)["matrices"]))
    for part in trained:
        factor = cfg.parts[part].lr_factor if part in cfg.parts else 1
        if factor != 1:
            parts.append(optax.masked(optax.scale(factor), _masks(view)[part]))
    if not takes_rate:
        parts.append(optax.scale_by_learning_rate(rate))
    transformation = optax.chain(*parts)
    # Not a factor of 0: then the moments of a frozen part would be computed, and kept in each
    # checkpoint.
    if len(trained) < len(view.parts):
        labels = {part: "trained" if part in trained else "frozen" for part in view.parts}
        transformation = optax.partition(
            {"trained": transformation, "frozen": optax.set_to_zero()}, labels
        )
    if cfg.accumulate > 1:
        averaged = optax.MultiSteps(transformation, cfg.accumulate)
        update: Any = averaged.update  # its own gradient_transformation() would lose `value`
        transformation = optax.GradientTransformationExtraArgs(averaged.init, update)
    return _explained(optax.with_extra_args_support(transformation))


def evaluated(opt_state: Any, params: Any) -> Any:
    """The parameters to evaluate: those of `schedule_free` are not the ones that it trains.

    Args:
        opt_state: of the transformation that `create` made.
        params: the parameters that training has come to.
    """
    states: dict[str, ScheduleFreeState] = {}  # for each parameter that has one
    for node in jax.tree.leaves(opt_state, is_leaf=_is_free):
        if _is_free(node):
            # Each parameter has the state of its own `masked` chain, of which there may be several.
            states |= {name: node._replace(z=fast) for name, fast in named(node.z).items()}

    def average(path: Any, leaf: jax.Array) -> jax.Array:
        state = states.get(path_name(path))
        return leaf if state is None else schedule_free_eval_params(state, leaf)

    return jax.tree_util.tree_map_with_path(average, params) if states else params


def _is_free(node: Any) -> bool:
    return isinstance(node, ScheduleFreeState)


def _check_settings(chain: list[Any] | None, weight_decay: Any, ema: Any) -> None:
    problems = {}
    # The decay stands behind the chain. Where that has applied the rate already, nothing would
    # scale the decay, which at 0.05 would halve the weights in 14 steps.
    if (chain is None or chains.takes_rate(chain)) and weight_decay:
        problems["optimizer.weight_decay"] = (
            f"got {weight_decay}, with a chain that applies the learning rate itself: give it "
            "there as an argument, and set 0 here"
        )
    averages = [name for name in chains.names(chain or []) if name.startswith("schedule_free")]
    if averages and ema is not None:
        problems["optimizer.ema"] = f"got {ema}; {averages[0]} keeps an average itself: set null"
    refuse(problems)


def _is_frozen(cfg: Optimizer, part: str) -> bool:
    return part in cfg.parts and cfg.parts[part].freeze


def _check_parts(cfg: Optimizer, parts: Sequence[str]) -> None:
    known = ", ".join(parts)
    problems = {
        f"optimizer.parts.{part}": f"the model has no such part; it has {known}"
        for part, asked in cfg.parts.items()
        if part not in parts and asked != Part()  # config.yaml lists encoder and head for everyone
    }
    if all(_is_frozen(cfg, part) for part in parts):
        problems["optimizer.parts"] = f"freeze all there is ({known}): nothing would be trained"
    refuse(problems)


def _masks(view: View) -> dict[str, Callable[[Any], Any]]:
    """Which parameters a `mask` of the configuration means, by its name."""
    # Judged on the nnx form: Linen's attention has biases of rank 2, (heads, features), and a stack
    # of layers gives each leaf one axis more.
    matrices = view.mask(lambda path, rank: rank >= 2 and not path.endswith("bias"))
    rest = {path: not is_matrix for path, is_matrix in matrices.items()}
    by_leaf = {"matrices": matrices, "rest": rest, "all": dict.fromkeys(matrices, True)}
    for part in view.parts:
        by_leaf[part] = {path: view.part_of(path) == part for path in matrices}
    return {name: partial(_tree_of, mask) for name, mask in by_leaf.items()}


def _named(view: View, leaves: list[str]) -> chains.Mask:
    """The parameters whose last name is one of these, in the nnx form, as `kernel`.

    Raises:
        ConfigError: for a name that no parameter has.
    """
    # Collected while the mask is made, so that a mistyped name is answered with those there are.
    known: set[str] = set()

    def is_one(path: str, rank: int) -> bool:
        name = path.rpartition("/")[2]
        known.add(name)
        return name in leaves

    mask = view.mask(is_one)
    unknown = {
        f".{at}": f"got '{name}', which no parameter is called{did_you_mean(name, known)}"
        for at, name in enumerate(leaves)
        if name not in known
    }
    refuse(unknown)
    return partial(_tree_of, mask)


def _tree_of(mask: Mapping[str, bool], params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: mask[path_name(path)], params)


def _explained(
    transformation: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """The same, whose errors (raised while tracing, once) say which setting they are about."""

    def init(params: Any) -> Any:
        try:
            return transformation.init(params)
        except (TypeError, ValueError, AttributeError) as error:
            raise _unfit("cannot begin", error) from error

    def update(updates: Any, state: Any, params: Any = None, **more: Any) -> Any:
        try:
            return transformation.update(updates, state, params, **more)
        except (TypeError, ValueError, AttributeError) as error:
            raise _unfit("cannot make an update", error) from error

    return optax.GradientTransformationExtraArgs(init, update)


def _unfit(what: str, error: Exception) -> ConfigError:
    line = str(error).splitlines()[0]
    return ConfigError({"optimizer.chain": f"{what} with this model: {line}. {NEEDS_MORE}"})
