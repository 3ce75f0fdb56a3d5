"""Which device holds what, when several compute a run.

The devices form a grid of `mesh.data` x `mesh.fsdp`. Each has its rows of a batch. Parameters,
optimizer state and averages are cut along `fsdp` into parts; a step puts the parameters together
for the forward and backward pass, and updates the parts. The model's code knows nothing of it.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from training.runtime.errors import Refused, refuse
from training.runtime.names import named, path_name

LISTED = 6  # arrays that cannot be divided, in the opening words


class Layout:
    """A mesh of devices, and where each array of a run lies on it.

    Attributes:
        mesh: axes `data` and `fsdp`; neighbours along `fsdp` are of one process where it has room.
        rows: the sharding of a batch: rows over all devices.
        whole: the sharding of what every device holds all of.
        ranks: `{path: rank in nnx form}` of the parameters; set when the model is known. Only so
            many of the last axes are cut, so that a stack of layers lies as its layers do at
            another stage.
        collections: the entries of a state beside the parameters that every device holds whole.
    """

    def __init__(self, data: int, fsdp: int) -> None:
        """The first `data * fsdp` devices, those of a process side by side."""
        # Neighbours along fsdp exchange parameters twice a step: let them be of one machine.
        devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
        grid = np.array(devices[: data * fsdp]).reshape(data, fsdp)
        self.mesh = Mesh(grid, ("data", "fsdp"))
        self.rows = NamedSharding(self.mesh, PartitionSpec(("data", "fsdp")))
        self.whole = NamedSharding(self.mesh, PartitionSpec())
        self.ranks: dict[str, int] = {}
        self.collections: list[str] = []
        # Compiled once for all: a new lambda at each call would be compiled at each call.
        self._gather = jax.jit(lambda tree: tree, out_shardings=self.whole)

    def batch(self, batch: Any) -> Any:
        """The global batch, a pytree of arrays, of which each process gives its own rows.

        Raises:
            Refused: the rows cannot be shared out evenly, as may happen with a stream of batches.
        """
        rows = len(jax.tree.leaves(batch)[0]) * jax.process_count()
        if rows % self.mesh.size:
            raise Refused(
                f"A batch has {rows} rows, which {self.mesh.size} devices cannot share evenly: let "
                f"the data give multiples of {self.mesh.size}, or use fewer devices (mesh.data)."
            )
        return jax.tree.map(
            lambda array: jax.make_array_from_process_local_data(self.rows, array), batch
        )

    def shapes(self, batch: Any) -> Any:
        """What `batch` returns, without values, from a batch that has the rows of all processes."""
        return jax.tree.map(
            lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=self.rows), batch
        )

    def fetch(self, tree: Any) -> Any:
        """The whole of each array as numpy, in every process; to be called by all of them."""
        return jax.device_get(self._gather(tree))

    def gather(self, params: Any) -> Any:
        """Parameters put together on every device, for a forward and backward pass."""
        return jax.lax.with_sharding_constraint(params, self.whole)

    def scatter(self, grads: Any) -> Any:
        """A tree like the parameters, each leaf cut as its parameter is."""

        def cut(path: Any, leaf: Any) -> Any:
            return jax.lax.with_sharding_constraint(leaf, self._place(path_name(path), leaf))

        return jax.tree_util.tree_map_with_path(cut, grads)

    def state(self, abstract: Any) -> Any:
        """The shapes of a state with shardings: what mirrors a parameter is cut as it is."""

        def placed(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
            place = self._place(path_name(path), leaf)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

        return jax.tree_util.tree_map_with_path(placed, abstract)

    def jit(self, function: Callable[..., Any], out: Any, donate: tuple[int, ...] = ()) -> Any:
        """`function` compiled, with its results laid out as `out` says."""
        return jax.jit(function, donate_argnums=donate, out_shardings=out)

    def _place(self, name: str, leaf: Any) -> NamedSharding:
        """Where a leaf of the state lies: `opt_state/0/mu/encoder/kernel` as `encoder/kernel`."""
        names = name.split("/")
        # The moments of a parameter end with its path, whatever stands before it: so optimizers
        # that nobody has thought of are cut as well.
        for start in range(len(names)):
            rank = self.ranks.get("/".join(names[start:]))
            if rank is not None and names[0] not in self.collections:
                return self._cut(leaf.shape, rank)
        return self.whole

    def _cut(self, shape: tuple[int, ...], rank: int) -> NamedSharding:
        """Parts along the largest (last, of equals) of the last `rank` axes that `fsdp` divides."""
        parts = self.mesh.shape["fsdp"]
        axes = range(max(0, len(shape) - rank), len(shape))
        fitting = [axis for axis in axes if shape[axis] and shape[axis] % parts == 0]
        if parts == 1 or not fitting:
            return self.whole
        axis = max(fitting, key=lambda axis: (shape[axis], axis))
        return NamedSharding(self.mesh, PartitionSpec(*[None] * axis, "fsdp"))

    def describe(self, state: Any) -> str:
        """How the state (arrays, or shapes with shardings) lies on the devices, in words."""
        text = f"{self.mesh.size} devices, data {self.mesh.shape['data']}"
        text += f" x fsdp {self.mesh.shape['fsdp']}"
        if jax.process_count() > 1:
            text += f", in {jax.process_count()} processes"
        if self.mesh.size < jax.device_count():
            text += f", of {jax.device_count()}"
        if self.mesh.shape["fsdp"] == 1:
            return text
        leaves = jax.tree.leaves(state)
        total = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        held = sum(
            np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves
        )
        odd = [
            f"{path} {list(leaf.shape)}"
            for path, leaf in named(state["params"]).items()
            if leaf.sharding.is_fully_replicated
        ]
        text += f"; each holds {held / 1e3:,.0f} of the state's {total / 1e3:,.0f} kB"
        if odd:
            more = f" and {len(odd) - LISTED} more" if len(odd) > LISTED else ""
            text += f", and all of what cannot be divided: {', '.join(odd[:LISTED])}{more}"
        return text


class OneDevice:
    """A run on one device: the same interface, and everything lies where it is."""

    def __init__(self) -> None:
        self.ranks: dict[str, int] = {}
        self.collections: list[str] = []
        self.whole = SingleDeviceSharding(jax.devices()[0])

    def batch(self, batch: Any) -> Any:
        return batch

    def shapes(self, batch: Any) -> Any:
        return batch

    def fetch(self, tree: Any) -> Any:
        return jax.device_get(tree)

    def gather(self, params: Any) -> Any:
        return params

    def scatter(self, grads: Any) -> Any:
        return grads

    def state(self, abstract: Any) -> Any:
        # With its place, for a compiled step to be found again by its first call.
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self.whole), abstract
        )

    def jit(self, function: Callable[..., Any], out: Any, donate: tuple[int, ...] = ()) -> Any:
        return jax.jit(function, donate_argnums=donate)

    def describe(self, state: Any) -> str:
        count = jax.device_count()
        return f"1 device of {count}; mesh.data=-1 uses all" if count > 1 else ""


def create(data: int, fsdp: int, batch: int) -> Layout | OneDevice:
    """The layout that the configuration asks for.

    Args:
        data, fsdp: the keys of the group `mesh`; -1 stands for the rest of the devices.
        batch: rows of a batch.

    Raises:
        Refused: naming everything that does not fit the devices or the batch.
    """
    count = jax.device_count()
    asked = f"mesh.data={data} mesh.fsdp={fsdp}"
    given = abs(data * fsdp)  # with one of them -1: the other
    if count % given:
        raise Refused(f"{asked}: {given} does not divide the {count} devices there are.")
    data = count // given if data == -1 else data
    fsdp = count // given if fsdp == -1 else fsdp
    # All faults at once: on a cluster each try costs a place in the queue.
    size, problems = data * fsdp, []
    if jax.process_count() > 1 and size < count:
        problems.append(
            f"{asked} uses {size} of the {count} devices of {jax.process_count()} processes, "
            "which must all take part: set one of them to -1."
        )
    if batch % size:
        problems.append(
            f"data.batch is {batch}, which {size} devices ({asked}) cannot share evenly: choose "
            f"a multiple of {size}."
        )
    refuse(problems)
    return OneDevice() if size == 1 else Layout(data, fsdp)
