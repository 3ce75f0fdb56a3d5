"""Saves, restores or compares a sharded state in a process with so many simulated devices.

python sharded.py save|check DEVICES PATH
"""

import os
import sys

if __name__ == "__main__":
    action, devices, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    import jax
    import numpy as np
    import orbax.checkpoint as ocp
    from jax.sharding import NamedSharding, PartitionSpec

    def value(i):
        return np.arange(64, dtype=np.float32).reshape(8, 8) + i

    if action == "save":
        mesh = jax.make_mesh((2, 2), ("x", "y"))
        spec = NamedSharding(mesh, PartitionSpec("x", "y"))
        layers = {f"blk_{i}": {"kernel": jax.device_put(value(i), spec)} for i in range(13)}
        tree = {"params": layers}
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, tree)
    else:
        mesh = jax.make_mesh((devices,), ("x",))
        spec = NamedSharding(mesh, PartitionSpec("x"))
        like = {"value": jax.ShapeDtypeStruct((8, 8), np.float32, sharding=spec)}
        target = {"blocks": {str(i): {"kernel": like} for i in range(13)}}
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(path, target)
        for i in range(13):
            array = restored["blocks"][str(i)]["kernel"]["value"]
            assert array.sharding == spec
            assert (np.asarray(array) == value(i)).all()
