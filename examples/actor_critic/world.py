"""A point in a plane that is to be steered to the middle; and moves in it, drawn at random."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from configs.build import Count
from training import datasets
from training.datasets import Dataset, Rows, digest

PUSHES = np.array([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]], np.float32)


@dataclass(frozen=True)
class Options(datasets.Options):
    """See `configs/data/actor_critic.yaml` for meanings."""

    moves: Count


def move(place: Any, action: Any) -> tuple[Any, Any]:
    """Places (B, 4), a position and a speed, and actions (B,) -> the next ones; rewards (B,)."""
    position, speed = place[..., :2], place[..., 2:]
    speed = 0.8 * speed + 0.2 * jnp.asarray(PUSHES)[action]
    position = jnp.clip(position + 0.3 * speed, -1, 1)
    return jnp.concatenate([position, speed], axis=-1), -jnp.abs(position).sum(axis=-1)


def load(options: Options) -> Dataset:
    """place (4,) float32, action () int32, reward () float32, next (4,) float32."""
    random = np.random.default_rng(options.seed)
    place = random.uniform(-1, 1, (options.moves, 4)).astype(np.float32)
    action = random.integers(0, len(PUSHES), options.moves, dtype=np.int32)
    after, reward = map(np.asarray, move(place, action))
    arrays = {"place": place, "action": action, "reward": reward, "next": after}
    count = options.moves // 10
    return Dataset(
        options,
        train=Rows({name: array[count:] for name, array in arrays.items()}),
        validation=Rows({name: array[:count] for name, array in arrays.items()}),
        description=f"{options.moves} moves at random in a plane",
        digest=digest(*arrays.values()),
    )
