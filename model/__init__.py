"""Model families: one folder each, found by its name, and what a family has to give.

`model.family: mlp` is the folder `model/mlp/`; a family elsewhere is named by its module, as in
`model.family: examples.vae`. It gives:

    Options                       a frozen dataclass: the keys of `configs/model/<family>.yaml`
    parts(options)                `{name: Part}`, each part written in Linen and in nnx; or one Part
    forward(parts, ...)           several parts put together; it runs under a Linen and an nnx root
    inputs(batch)                 the arguments of an example call of the model
    loss(model, batch, rngs)      `{metric: values}` with "loss" among them; see `Metrics`
    rules.yaml                    which Linen leaf is which nnx leaf (convert.py suggest finds it)

and, where it needs them:

    STREAMS                       names of the random streams that model and loss draw from
    rules(options)                the name of its rule book, if options choose between several
    methods(options)              more entries like `forward`, by name
    derived(means)                metrics that are no mean of examples: perplexity, F1
    optimizer(cfg, schedule, view)       an Optax transformation in place of `optimizer.chain`
    Step                          a class in place of `training/step.py`'s: several optimizers, a
                                  target network; `examples/actor_critic/step.py` is one
    show(setup, state, board)     samples to look at, as `training/samples.py` shows text and images
    misfits(options, batch, classes)     options that the data does not fit, by key

`model/mlp/` is the smallest example; docs/family.md builds one from the start.
"""

import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from flax import nnx
from jax import Array
from linen_nnx import Ladder, Part, RuleBook, Twin

from configs.build import build, module_of, refuse, show

Batch = Any
"""A pytree of arrays with the examples along their first axes."""

Rngs = Mapping[str, Array]
"""Typed keys by the name of their stream, another set for each step."""

Metrics = dict[str, Array | tuple[Array, Array]]
"""By metric: values of the examples, (batch,) float32, whose mean counts; or values and weights of
one shape, (batch, ...) float32, of which the sum of products over the sum of weights counts."""


class Applied(Protocol):
    """The model with the variables at hand, as a loss calls it; collections go on by themselves."""

    train: bool
    """Whether this is a training step: then `loss` asks for dropout, batch statistics and so on."""

    def __call__(
        self, *args: Any, method: str | None = None, rngs: Rngs | None = None, **kwargs: Any
    ) -> Any:
        """Runs `forward`, or another method. By default with the keys of the step: a second call
        that is to draw other masks needs keys of its own."""
        ...


class Whole(nnx.Module):
    """The parts of a model as one nnx module: `whole.encoder`, `whole.head`, `whole(x)`."""

    def __init__(self, parts: Mapping[str, Any], forward: Callable[..., Any]) -> None:
        # `forward` stays a function and becomes no method: it is written for whatever has the
        # parts, a Linen root as well.
        self._forward = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`forward` takes its parts as attributes, which this module has."""
        return self._forward(self, *args, **kwargs)


@dataclass(frozen=True)
class Family:
    """A model family with one setting of its options."""

    name: str
    options: Any
    module: ModuleType

    @property
    def streams(self) -> tuple[str, ...]:
        """The random streams that model and loss draw from."""
        return getattr(self.module, "STREAMS", ("dropout",))

    @cached_property
    def rules_path(self) -> Path:
        """Where the family's rule book is, if it has one."""
        choose = getattr(self.module, "rules", lambda options: "rules.yaml")
        return Path(self.module.__path__[0]) / choose(self.options)

    def ladder(
        self, batch: Batch, rules: RuleBook | None, ported: Sequence[str] | None = None
    ) -> Ladder:
        """The family's model at all stages.

        Args:
            batch: an example, of any number of rows.
            rules: its rule book; None: what the models' code proves.
            ported: the parts that are nnx at both hybrid stages; None: the first.
        """
        parts = self.module.parts(self.options)
        if isinstance(parts, Part):
            inputs = partial(self.module.inputs, batch)
            return Ladder(Twin(parts.module, parts.nnx, inputs), rules)
        more = getattr(self.module, "methods", lambda options: {})
        return Ladder(
            parts=parts,
            forward=self.module.forward,
            inputs=lambda: self.module.inputs(batch),
            methods=more(self.options),
            ported=ported,
            rules=rules,
        )

    def in_nnx(self, rngs: nnx.Rngs) -> nnx.Module:
        """The whole model as an ordinary nnx module, which knows nothing of stages.

        A model of several parts has them as attributes, and `forward` is its call.
        """
        parts = self.module.parts(self.options)
        if isinstance(parts, Part):
            return parts.nnx(rngs)
        # One Rngs for all parts, in their order, as one would write the model by hand.
        made = {name: part.nnx(rngs) for name, part in parts.items()}
        return Whole(made, self.module.forward)

    @property
    def parts(self) -> list[str]:
        """The names of its parts; none of a model of one part."""
        parts = self.module.parts(self.options)
        return [] if isinstance(parts, Part) else list(parts)

    def check_ported(self, ported: Sequence[str] | None) -> None:
        """Refuses names of parts that the model does not have.

        Raises:
            configs.build.ConfigError: naming each.
        """
        known = ", ".join(self.parts) or "none, as it is one part"
        unknown = ", ".join(show(name) for name in ported or () if name not in self.parts)
        refuse({"ported": f"got {unknown}; the model's parts: {known}"} if unknown else {})

    def check_data(self, batch: Batch, classes: int | None) -> None:
        """Compares the options with the data, which else would broadcast, or index out of bounds.

        Args:
            batch: one batch of the data.
            classes: how many values a target can have; None where it is a number.

        Raises:
            configs.build.ConfigError: naming every option that does not fit.
        """
        misfits = getattr(self.module, "misfits", lambda options, batch, classes: {})
        found = misfits(self.options, batch, classes)
        refuse({f"model.{key}": text for key, text in found.items()})


def create(model: Mapping[str, Any]) -> Family:
    """The family that `model["family"]` names, with its options.

    Raises:
        configs.build.ConfigError: for an unknown family or option, naming every problem.
    """
    known = [module.name for module in pkgutil.iter_modules(__path__) if module.ispkg]
    module = module_of("model.family", model.get("family"), __name__, known)
    return Family(model["family"], build(module.Options, model, at="model"), module)
