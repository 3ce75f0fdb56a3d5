"""Actor and critic over one torso, with a target network and two optimizers: a step of its own."""

from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array
from linen_nnx import Part

from configs.build import Count, Fraction, Positive, Share
from examples.actor_critic import world
from examples.actor_critic.step import Step
from model import Applied, Batch, Metrics, Rngs

__all__ = ["Options", "Step", "forward", "inputs", "loss", "methods", "parts"]


@dataclass(frozen=True)
class Options:
    """Options of agent and step; see `configs/model/actor_critic.yaml` for meanings."""

    family: Literal["examples.actor_critic"]
    width: Count
    discount: Fraction
    target_rate: Fraction
    actor_lr_factor: Positive
    entropy: Share


def parts(cfg: Options) -> dict[str, Part]:
    """Three parts, of which the torso is ported first."""
    from examples.actor_critic import linen, nnx

    return {
        "torso": Part(linen.Torso(cfg.width), lambda rngs: nnx.Torso(cfg.width, rngs=rngs)),
        "actor": Part(linen.Actor(), lambda rngs: nnx.Actor(cfg.width, rngs=rngs)),
        "critic": Part(linen.Critic(), lambda rngs: nnx.Critic(cfg.width, rngs=rngs)),
    }


def forward(parts: Any, places: Array) -> tuple[Array, Array]:
    """Places (B, 4) -> the actor's logits and the critic's values, (B, actions) each."""
    features = parts.torso(places)
    return parts.actor(features), parts.critic(features)


def methods(cfg: Options) -> dict[str, Any]:
    """The logits alone, from features that the actor's gradient does not reach."""
    return {"act": lambda parts, places: parts.actor(parts.torso(places))}


def inputs(batch: Batch) -> tuple[Any, ...]:
    """The places of the transitions."""
    return (batch["place"],)


def loss(model: Applied, batch: Batch, rngs: Rngs) -> Metrics:
    """What evaluation measures: the mean distance over some moves by the actor's first choice."""
    place, distances = batch["place"], []
    for _ in range(10):
        place, reward = world.move(place, model(place, method="act").argmax(-1))
        distances.append(-reward)
    return {"loss": jnp.stack(distances).mean(axis=0)}
