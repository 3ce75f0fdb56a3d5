"""Every layout and format of checkpoints, as data: who writes it, an example, and what it holds.

`docs/formats.md` shows this table: `python tests/formats_table.py` writes it there. The tests
convert every example and compare what was read with what the libraries that wrote it read.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"
PAGE = Path(__file__).parents[1] / "docs" / "formats.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->"
WHOLE, ALONE = "whole state", "model alone"


@dataclass(frozen=True)
class Format:
    """One row of the table."""

    name: str
    look: str
    """What lies on disk."""
    writer: str
    sample: str
    """Which versions wrote the example that the tests convert."""
    holds: str
    make: Callable[[Path, dict[str, Any]], Path]
    """Gives the path of an example, of the given tree if it writes one itself."""
    found: str
    """What `inspect` calls it."""
    written: str = ""
    """How it is written by a conversion, if it is."""


def kept(name: str) -> Callable[[Path, dict[str, Any]], Path]:
    """An example that an old version wrote."""
    return lambda folder, tree: DATA / name


def _standard(folder: Path, tree: dict[str, Any]) -> Path:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "item", tree)
    return folder / "item"


def _pytree(**options: Any) -> Callable[[Path, dict[str, Any]], Path]:
    def make(folder: Path, tree: dict[str, Any]) -> Path:
        import orbax.checkpoint as ocp

        handler = ocp.PyTreeCheckpointHandler(**options)
        ocp.Checkpointer(handler).save(folder / "item", tree)
        return folder / "item"

    return make


def _manager(folder: Path, tree: dict[str, Any]) -> Path:
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(folder / "root") as manager:
        for step in (3, 10):
            manager.save(step, args=ocp.args.StandardSave(tree))
    return folder / "root"


def _items(folder: Path, tree: dict[str, Any]) -> Path:
    import orbax.checkpoint as ocp

    items = {name: ocp.args.StandardSave(tree[name]) for name in tree if name != "step"}
    with ocp.CheckpointManager(folder / "root") as manager:
        manager.save(3, args=ocp.args.Composite(**items))
    return folder / "root" / "3"


def _v1(folder: Path, tree: dict[str, Any]) -> Path:
    import orbax.checkpoint.experimental.v1 as v1

    v1.save(folder / "item", tree)
    return folder / "item"


def _flax_directory(folder: Path, tree: dict[str, Any]) -> Path:
    from flax.training import checkpoints

    checkpoints.save_checkpoint(folder / "root", tree, step=3)
    return folder / "root"


def _msgpack(folder: Path, tree: dict[str, Any]) -> Path:
    from flax.serialization import to_bytes

    (folder / "state.msgpack").write_bytes(to_bytes(tree))
    return folder / "state.msgpack"


def _flat(tree: dict[str, Any], separator: str) -> dict[str, Any]:
    from flax.traverse_util import flatten_dict

    model = {name: tree[name] for name in ("params", "batch_stats")}
    return flatten_dict(model, sep=separator)


def _safetensors(folder: Path, tree: dict[str, Any]) -> Path:
    from safetensors.flax import save_file

    save_file(_flat(tree, "."), folder / "model.safetensors")
    return folder / "model.safetensors"


def _npz(folder: Path, tree: dict[str, Any]) -> Path:
    import numpy as np

    np.savez(folder / "model.npz", **_flat(tree, "/"))
    return folder / "model.npz"


def shards(folder: Path, flat: dict[str, Any], kind: str, save: Callable[[Any, Path], Any]) -> Path:
    """A folder of two shards and their index, as Hugging Face lays them out."""
    stem = {"msgpack": "flax_model", "safetensors": "model"}[kind]
    names = list(flat)
    weights = {}
    for number, part in enumerate((names[:2], names[2:]), start=1):
        shard = folder / f"{stem}-0000{number}-of-00002.{kind}"
        save({name: flat[name] for name in part}, shard)
        weights |= dict.fromkeys(part, shard.name)
    index = {"metadata": {"total_size": 0}, "weight_map": weights}
    whole = f"{stem}.{kind}.index.json"
    (folder / whole).write_text(json.dumps(index))
    return folder


def _msgpack_shards(folder: Path, tree: dict[str, Any]) -> Path:
    from flax.serialization import to_bytes
    from flax.traverse_util import unflatten_dict

    def save(flat: Any, path: Path) -> None:
        path.write_bytes(to_bytes(unflatten_dict(flat, sep="/")))

    return shards(folder, _flat(tree, "/"), "msgpack", save)


def _safetensors_shards(folder: Path, tree: dict[str, Any]) -> Path:
    from safetensors.flax import save_file

    return shards(folder, _flat(tree, "."), "safetensors", save_file)


def _t5x(folder: Path, tree: dict[str, Any]) -> Path:
    """As T5X lays it out: an index whose leaves are specs, and zarr directories with gzip."""
    from flax.serialization import msgpack_serialize
    from flax.traverse_util import flatten_dict, unflatten_dict

    target, specs = folder / "checkpoint_3", {}
    for name, array in flatten_dict(tree["params"], sep=".").items():
        spec = {
            "driver": "zarr",
            "dtype": "float32",
            "kvstore": {"driver": "file", "path": f"target.{name}"},
            "metadata": {"compressor": {"id": "gzip"}, "shape": list(array.shape)},
        }
        specs[name] = spec
        write_zarr(target / f"target.{name}", array, {"id": "gzip", "level": 1})
    # A parameter that is small enough stands in the index itself.
    import numpy as np

    specs["out.bias"] = np.asarray(tree["params"]["out"]["bias"])
    state = {"step": np.int32(3), "param_states": {"fc": {"kernel": {"v_row": np.zeros(2)}}}}
    optimizer = {"target": unflatten_dict(specs, sep="."), "state": state}
    mutables = {"batch_stats": _numpy(tree["batch_stats"])}
    index = {"version": 3, "optimizer": optimizer, "flax_mutables": mutables}
    (target / "checkpoint").write_bytes(msgpack_serialize(index))
    return folder


def _numpy(tree: Any) -> Any:
    import jax
    import numpy as np

    return jax.tree.map(np.asarray, tree)


def write_zarr(folder: Path, array: Any, compressor: dict[str, Any]) -> None:
    """A zarr directory that tensorstore writes."""
    import numpy as np
    import tensorstore as ts

    array = np.asarray(array)
    metadata = {"compressor": compressor, "shape": array.shape, "dtype": array.dtype.str}
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{folder}/"},
        "metadata": {**metadata, "chunks": array.shape},
        "create": True,
    }
    ts.open(spec).result().write(array).result()


_NOW = "orbax 0.12.8"
FORMATS = [
    Format("Orbax Standard", "`_METADATA`, `manifest.ocdbt`, `d/`", "`StandardCheckpointer`",
           _NOW, WHOLE, _standard, "Orbax item", "the source's own kind of store"),
    Format("Orbax PyTree", "the same", "`PyTreeCheckpointer`",
           _NOW, WHOLE, _pytree(), "Orbax item", "as above"),
    Format("Orbax with zarr3", "the same, arrays in `zarr.json`", "`use_zarr3=True`",
           _NOW, WHOLE, _pytree(use_zarr3=True), "Orbax item", "as above"),
    Format("Orbax without OCDBT", "`_METADATA`, a zarr directory for each array",
           "`use_ocdbt=False`", _NOW, WHOLE, _pytree(use_ocdbt=False), "Orbax item", "as above"),
    Format("Orbax v1", "`state/` with such an item", "`ocp.v1.save`",
           _NOW, WHOLE, _v1, "step, item state", "as above"),
    Format("CheckpointManager", "`<step>/<item>/`, any `step_prefix`", "`CheckpointManager`",
           _NOW, WHOLE, _manager, "CheckpointManager root, step 10, item default", "as above"),
    Format("CheckpointManager, a state in several items", "`<step>/params/`, `<step>/opt_state/`",
           "`Composite(params=..., opt_state=...)`", _NOW, WHOLE, _items,
           "step, item params + batch_stats + opt_state", "one item `state`"),
    Format("Flax over Orbax", "`checkpoint_<step>/` with an item", "`flax.training.checkpoints`",
           f"flax 0.12.8, {_NOW}", WHOLE, _flax_directory,
           "CheckpointManager root, step checkpoint_3, Orbax item", "as above"),
    Format("Orbax 0.4 Standard", "`_METADATA` beside an index `checkpoint`; plain `_sharding`",
           "`StandardCheckpointHandler` of 0.4, whose saves no later Orbax restores",
           "orbax 0.4.1", WHOLE, kept("orbax_0.4.1_standard"), "Orbax item", "as Orbax of today"),
    Format("Orbax 0.4 PyTree", "an index `checkpoint` (msgpack), `manifest.ocdbt`, `d/`",
           "`PyTreeCheckpointer` of 0.4", "orbax 0.4.1", WHOLE, kept("orbax_0.4.1_pytree"),
           "Orbax item with an index", "as Orbax of today"),
    Format("Orbax 0.4 CheckpointManager", "`<step>/default/` with such an item",
           "`CheckpointManager` of 0.4", "orbax 0.4.1", WHOLE, kept("orbax_0.4.1_manager"),
           "CheckpointManager root, step 10, item default with an index", "as Orbax of today"),
    Format("Orbax 0.2 PyTree", "an index `checkpoint`, a zarr directory for each array",
           "`PyTreeCheckpointer` of 0.2", "orbax 0.2.6", WHOLE, kept("orbax_0.2.6_pytree"),
           "Orbax item with an index", "as Orbax of today"),
    Format("Orbax 0.2 CheckpointManager", "`<step>/default/` with such an item",
           "`CheckpointManager` of 0.2", "orbax 0.2.6", WHOLE, kept("orbax_0.2.6_manager"),
           "CheckpointManager root, step 10, item default with an index", "as Orbax of today"),
    Format("Flax over Orbax 0.4, aggregated", "`checkpoint_<step>/checkpoint`, one msgpack file",
           "`flax.training.checkpoints`", "flax 0.8.0, orbax 0.4.1", WHOLE,
           kept("flax_0.8.0_over_orbax_0.4.1"), "step checkpoint_3, Flax checkpoint as Orbax",
           "as Orbax of today"),
    Format("Flax over Orbax 0.2, aggregated", "the same", "`flax.training.checkpoints`",
           "flax 0.6.11, orbax 0.2.6", WHOLE, kept("flax_0.6.11_over_orbax_0.2.6"),
           "step checkpoint_3, Flax checkpoint as Orbax", "as Orbax of today"),
    Format("Flax file", "`checkpoint_<step>`, one msgpack file",
           "`flax.training.checkpoints` without Orbax", "flax 0.6.11", WHOLE,
           kept("flax_0.6.11_file"), "step checkpoint_10, Flax checkpoint file (msgpack)",
           "`OUT.msgpack`"),
    Format("Flax file, later", "the same", "the same", "flax 0.8.0", WHOLE,
           kept("flax_0.8.0_file"), "step checkpoint_10, Flax checkpoint file (msgpack)",
           "`OUT.msgpack`"),
    Format("Flax file, large arrays in chunks", "the same", "the same, for arrays over 1 GiB",
           "flax 0.6.11", WHOLE, kept("flax_0.6.11_chunked"), "Flax checkpoint file (msgpack)",
           "`OUT.msgpack`"),
    Format("Flax file, later, in chunks", "the same", "the same",
           "flax 0.8.0", WHOLE, kept("flax_0.8.0_chunked"), "Flax checkpoint file (msgpack)",
           "`OUT.msgpack`"),
    Format("msgpack", "`*.msgpack`", "`flax.serialization.to_bytes`, Hugging Face",
           "flax 0.12.8", WHOLE, _msgpack, "msgpack file", "`OUT.msgpack`"),
    Format("msgpack in shards", "`*-00001-of-00002.msgpack`, `*.msgpack.index.json`",
           "Hugging Face", "laid out by the tests", ALONE, _msgpack_shards,
           "msgpack file in shards"),
    Format("safetensors", "`*.safetensors`", "safetensors, Hugging Face", "safetensors 0.8.0",
           ALONE, _safetensors, "safetensors file", "`OUT.safetensors`"),
    Format("safetensors in shards", "`*-00001-of-00002.safetensors`, `*.safetensors.index.json`",
           "Hugging Face", "laid out by the tests, safetensors 0.8.0", ALONE,
           _safetensors_shards, "safetensors file in shards"),
    Format("npz", "`*.npz`, flat names", "numpy; big_vision, ViT", "numpy 2.4.6", ALONE, _npz,
           "npz file"),
    Format("T5X", "an index `checkpoint`, zarr directories `target.*` (gzip)", "T5X",
           "laid out by the tests", ALONE, _t5x, "Orbax item with an index, as T5X writes"),
]  # fmt: skip


def page() -> str:
    """The rows of the table as Markdown."""
    rows = ["| layout | what lies there | who writes it | example by | holds | is written |"]
    rows.append("|---|---|---|---|---|---|")
    for one in FORMATS:
        cells = (one.name, one.look, one.writer, one.sample, one.holds, one.written or "no")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def main() -> int:
    """Writes the table into the page."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + page() + END + rest.partition(END)[2])
    return 0


if __name__ == "__main__":
    sys.exit(main())
