"""Writes the small samples beside this file with the versions of Flax and Orbax of their time.

Each of two environments with Python 3.11 writes its own; what is there already stays:

    python3.11 -m venv old && old/bin/pip install 'flax==0.6.11' 'orbax-checkpoint==0.2.6' \\
      'optax==0.1.5' 'jax==0.4.13' 'jaxlib==0.4.13' 'numpy<2' 'scipy<1.13'
    old/bin/python tests/data/write_old.py

and again with `flax==0.8.0 orbax-checkpoint==0.4.1 optax==0.1.8 jax==0.4.23 jaxlib==0.4.23`.
"""

from importlib.metadata import version
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax import serialization
from flax.training import checkpoints
from flax.training.train_state import TrainState

HERE = Path(__file__).parent
FLAX, ORBAX = version("flax"), version("orbax-checkpoint")


class State(TrainState):
    """A training state with statistics of its own, as many have."""

    batch_stats: dict


def make_state():
    """A state after one step of Adam: some leaves are zero in all elements, some are not."""
    params = {
        "fc": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.zeros(3)},
        "out": {"kernel": jnp.arange(3.0).reshape(3, 1) / 7, "bias": jnp.ones(1)},
    }
    state = State.create(
        apply_fn=None,
        params=params,
        tx=optax.chain(optax.clip(1.0), optax.adam(0.5)),
        batch_stats={"norm": {"mean": jnp.full(3, 0.25, jnp.bfloat16)}},
    )
    grads = jax.tree_util.tree_map(lambda x: x / 3, params)
    return state.apply_gradients(grads=grads)


def write(name, save):
    """Calls `save` with the path of a sample, unless it is there."""
    folder = HERE / name
    if folder.exists():
        return
    save(folder)
    print(folder.name)


def flax_file(folder):
    flax.config.update("flax_use_orbax_checkpointing", False)
    for step in (3, 10):
        checkpoints.save_checkpoint(folder, make_state(), step=step, keep=2)


def flax_chunked(folder):
    """Arrays of more than 1 GiB are cut into chunks; here, those of more than 16 bytes."""
    whole, serialization.MAX_CHUNK_SIZE = serialization.MAX_CHUNK_SIZE, 16
    folder.mkdir()
    (folder / "checkpoint_3").write_bytes(serialization.to_bytes(make_state()))
    serialization.MAX_CHUNK_SIZE = whole


def flax_over_orbax(folder):
    flax.config.update("flax_use_orbax_checkpointing", True)
    checkpoints.save_checkpoint(folder, make_state(), step=3)


def orbax_pytree(folder):
    ocp.PyTreeCheckpointer().save(folder, make_state())


def orbax_sharded(folder):
    """Only arrays on a mesh have their sharding written."""
    mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    params = jax.device_put(make_state().params, split)
    ocp.PyTreeCheckpointer().save(folder, {"params": params})


def orbax_manager(folder):
    manager = ocp.CheckpointManager(folder, ocp.PyTreeCheckpointer())
    manager.save(10, make_state())


def orbax_standard(folder):
    checkpointer = ocp.Checkpointer(ocp.StandardCheckpointHandler())
    checkpointer.save(folder, serialization.to_state_dict(make_state()))


write(f"flax_{FLAX}_file", flax_file)
write(f"flax_{FLAX}_chunked", flax_chunked)
write(f"flax_{FLAX}_over_orbax_{ORBAX}", flax_over_orbax)
write(f"orbax_{ORBAX}_pytree", orbax_pytree)
write(f"orbax_{ORBAX}_manager", orbax_manager)
if hasattr(ocp, "StandardCheckpointHandler"):
    write(f"orbax_{ORBAX}_sharded", orbax_sharded)
    write(f"orbax_{ORBAX}_standard", orbax_standard)
