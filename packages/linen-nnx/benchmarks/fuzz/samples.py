"""What is damaged: a checkpoint in each layout that is read, small, with its rule book beside it.

A sample is a folder with one or more files to damage, and the path to give to the converter.
"""

import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import google_crc32c
import ml_dtypes  # noqa: F401  (teaches numpy the name bfloat16)
import msgpack
import numpy as np
import tensorstore as ts
from backports import zstd

from benchmarks.fuzz import mutate
from linen_nnx import RuleBook
from linen_nnx.book.specs import Spec
from linen_nnx.book.stages import STAGES
from linen_nnx.disk import digests, ocdbt, ocdbt_writing
from linen_nnx.disk.convert import convert
from linen_nnx.disk.leaves import DICT, Key, Leaf
from linen_nnx.disk.side_files import write_side_files
from linen_nnx.disk.zarr_metadata import fresh_metadata

Damage = Callable[[Random, bytes], bytes | mutate.Replacement]
_BOOK = {
    "version": 1,
    "rules": [
        {"linen": "params/encoder/kernel", "nnx": "encoder/kernel",
         "ops": [{"op": "transpose", "perm": [1, 0]}]},
        {"linen": "params/encoder/bias", "nnx": "encoder/bias"},
        {"linen": "params/head/{i}/kernel", "nnx": "head/kernel",
         "ops": [{"op": "stack", "capture": "i", "axis": 0}], "note": "stacked"},
    ],
}  # fmt: skip
_STAGE = next(iter(STAGES))
_TREE = {
    "params": {
        "encoder": {
            "kernel": np.arange(600, dtype="float32").reshape(30, 20),
            "bias": np.ones(3, "bfloat16"),
        },
        "head": {str(i): {"kernel": np.full((2, 3), i, "float32")} for i in range(2)},
    },
    "step": np.int64(7),
}


@dataclass
class Sample:
    """A checkpoint on disk. `files` are those to damage, each with the ways to do so."""

    folder: Path
    path: Path
    files: dict[Path, tuple[Damage, ...]] = field(default_factory=dict)

    def add(self, path: Path, *damages: Damage) -> None:
        """Has a file damaged, among others byte by byte."""
        self.files[path] = (*damages, mutate.bytes_, mutate.strange)


def make(folder: Path) -> list[Sample]:
    """Every sample, each in a folder of its own."""
    stores = (_tree, _folders, _sharded_folders, _run, _index)
    files = (_msgpack, _safetensors, _npz, _shards)
    samples = []
    for maker in (*stores, *files):
        place = folder / maker.__name__.strip("_")
        place.mkdir()
        samples.append(maker(place))
        _save_book(samples[-1])
    samples.append(_result(folder, samples[0]))
    return samples


def _save_book(sample: Sample) -> None:
    path = sample.folder / "rules.yaml"
    RuleBook.from_dict(_BOOK).save(path)
    sample.add(path, mutate.text, mutate.text)
    as_json = sample.folder / "rules.json"
    as_json.write_text(json.dumps(_BOOK))
    sample.add(as_json, mutate.json_)


def _leaves(zarr3: bool = False, chunk: int | None = None) -> list[tuple[Leaf, Any]]:
    found = []
    for names, array in _walk(_TREE, ()):
        spec = Spec(tuple(array.shape), str(array.dtype))
        metadata = fresh_metadata(spec, zarr3)
        if chunk and not zarr3 and array.shape == (30, 20):
            metadata["chunks"] = [chunk, 20]
        keys = tuple(Key(name, DICT) for name in names)
        sharding = json.dumps({"sharding_type": "SingleDeviceSharding", "partition_spec": ["x"]})
        leaf = Leaf(keys, "jax.Array", metadata, sharding=sharding, write_shape=tuple(array.shape))
        found.append((leaf, array))
    return found


def _walk(tree: Any, names: tuple[str, ...]) -> list[tuple[tuple[str, ...], Any]]:
    if not isinstance(tree, dict):
        return [(names, np.asarray(tree))]
    return [found for key, value in tree.items() for found in _walk(value, (*names, key))]


def _item(folder: Path, in_tree: bool, zarr3: bool = False) -> None:
    """An item as Orbax saves it."""
    folder.mkdir(parents=True, exist_ok=True)
    base: Any = {"driver": "file", "path": f"{folder}/"}
    if in_tree:
        config = {"max_inline_value_bytes": 400}  # metadata, and no large array
        base = {"driver": "ocdbt", "base": base, "config": config}
    leaves = _leaves(zarr3, chunk=None if in_tree else 8)
    for leaf, array in leaves:
        spec = {"driver": "zarr3" if zarr3 else "zarr", "metadata": leaf.zarr}
        store = ts.KvStore.open(base).result() / f"{leaf.name}/"
        ts.open(spec, kvstore=store, create=True).result().write(array).result()
    header = {"use_ocdbt": in_tree, "use_zarr3": zarr3, "custom_metadata": {"a": [1, {"b": None}]}}
    write_side_files(folder, [leaf for leaf, _ in leaves], header)


def _side_files(sample: Sample, item: Path) -> None:
    for name in ("_METADATA", "_sharding", "array_metadatas/process_0"):
        sample.add(item / name, mutate.json_, mutate.json_)


def _tree(folder: Path) -> Sample:
    """A CheckpointManager's root whose step has an OCDBT item."""
    sample = Sample(folder, folder / "root")
    step = sample.path / "3"
    item = step / "default"
    _item(item, in_tree=True)
    ocdbt_writing.write(item, ocdbt.read(item))  # one node, in a file of its own
    root = _root(item)
    sample.add(item / root.ref.file, _node, _node, _node, _metadata_in_node, _metadata_in_node)
    for value in ocdbt.read(item)["params.encoder.kernel"].values():
        if isinstance(value, ocdbt.Ref):
            sample.add(item / value.file)
    sample.add(item / ocdbt.MANIFEST, _manifest, _manifest)
    _side_files(sample, item)
    meta = {"item_handlers": {"default": "x"}, "init_timestamp_nsecs": 1}
    meta |= {"commit_timestamp_nsecs": 2, "custom_metadata": {}}
    (step / "_CHECKPOINT_METADATA").write_text(json.dumps(meta))
    sample.add(step / "_CHECKPOINT_METADATA", mutate.json_)
    return sample


def _root(item: Path) -> Any:
    content = (item / ocdbt.MANIFEST).read_bytes()
    body = ocdbt._Body(content, ocdbt.MANIFEST_MAGIC, ocdbt._Budget())
    root, _ = ocdbt._newest_version(body)
    return root


def _opened(data: bytes) -> bytes:
    """The content of a node or of a manifest."""
    return zstd.decompress(data[14:-4])


def _sealed(magic: bytes, body: bytes, compress: bool = True) -> bytes:
    content = b"\0\1" + zstd.compress(body) if compress else b"\0\0" + body
    content = magic + (len(content) + 16).to_bytes(8, "little") + content
    return content + google_crc32c.value(content).to_bytes(4, "little")


def _node(random: Random, data: bytes) -> bytes:
    """A node damaged below its compression and its checksum."""
    body = mutate.bytes_(random, _opened(data))
    if random.randrange(20) == 0:
        body += bytes(random.choice((1 << 20, 1 << 27)))
    return _sealed(data[:4], body)


def _metadata_in_node(random: Random, data: bytes) -> bytes:
    """A node in which the zarr metadata of an array keep their length, and say something else."""
    body = _opened(data)
    at = body.find(b'{"chunks"')
    starts = []
    while at >= 0:
        starts.append(at)
        at = body.find(b'{"chunks"', at + 1)
    start = random.choice(starts)
    length = body.find(b'"zarr_format":2}', start) + 16 - start
    new = mutate.json_(random, body[start : start + length])[:length].ljust(length)
    return _sealed(data[:4], body[:start] + new + body[start + length :])


def _manifest(random: Random, data: bytes) -> bytes:
    return _sealed(data[:4], mutate.bytes_(random, _opened(data)))


def _folders(folder: Path) -> Sample:
    """A bare item with a folder for each array."""
    sample = Sample(folder, folder / "item")
    _item(sample.path, in_tree=False)
    _side_files(sample, sample.path)
    for file in sorted(sample.path.glob("*/*")):
        if file.name == ".zarray":
            sample.add(file, mutate.json_, mutate.json_)
        elif file.parent.name != "array_metadatas":
            sample.add(file, _recompressed)
    return sample


def _recompressed(random: Random, data: bytes) -> bytes:
    """A chunk with other content, and another length, in a frame that is right."""
    return zstd.compress(mutate.bytes_(random, zstd.decompress(data)))


def _sharded_folders(folder: Path) -> Sample:
    """The same in zarr3, whose chunks lie in shards."""
    sample = Sample(folder, folder / "item")
    _item(sample.path, in_tree=False, zarr3=True)
    for file in sorted(path for path in sample.path.rglob("*") if path.is_file()):
        if file.name == "zarr.json":
            sample.add(file, mutate.json_, mutate.json_, mutate.json_)
        elif "c" in file.parts[len(sample.path.parts) :]:
            sample.add(file, _resealed_shard)
    return sample


def _resealed_shard(random: Random, data: bytes) -> bytes:
    """A shard whose index is damaged below its checksum."""
    index = mutate.bytes_(random, data[-20:-4])[:16].ljust(16, b"\0")
    return data[:-20] + index + google_crc32c.value(index).to_bytes(4, "little")


def _run(folder: Path) -> Sample:
    """A run directory of this template, as far as the converter knows it."""
    sample = Sample(folder, folder / "run")
    step = sample.path / "checkpoints" / "7"
    _item(step / "default", in_tree=True)
    (step / "run").mkdir()
    run = {"config": {"stage": _STAGE, "seed": 0}, "rules": _BOOK, "stage": _STAGE}
    (step / "run" / "metadata").write_text(json.dumps(run))
    (sample.path / "config.yaml").write_text(f"seed: 0\nstage: {_STAGE}\n")
    (sample.path / "metrics.jsonl").write_text('{"step": 1, "split": "train", "loss": 0.5}\n' * 7)
    digests.write(step)
    sample.add(step / "run" / "metadata", mutate.json_, mutate.json_, mutate.json_)
    sample.add(step / "digests.json", mutate.json_, mutate.json_)
    sample.add(sample.path / "config.yaml", mutate.text)
    sample.add(sample.path / "metrics.jsonl")
    return sample


def _msgpack(folder: Path) -> Sample:
    sample = Sample(folder, folder / "model.msgpack")
    lists = [{"count": np.zeros((), "int32")}, None, [1.5, "text"]]
    tree = {"params": _TREE["params"], "step": 7, "opt_state": lists}
    sample.path.write_bytes(_packed(tree))
    sample.add(sample.path, _repacked, _repacked)
    return sample


def _repacked(random: Random, data: bytes) -> bytes:
    """msgpack that is well-formed and says something else, inside of its arrays, too."""
    content = msgpack.unpackb(data, strict_map_key=False, ext_hook=_Extension)
    if random.randrange(20) == 0:
        return b"\x81\xa1a" * random.choice((50, 100_000)) + b"\xc0"
    return _packed(mutate.value(random, content))


class _Extension(dict[str, Any]):
    """An extension of msgpack as a mapping, so that its parts are damaged as well."""

    def __init__(self, code: int, data: bytes) -> None:
        super().__init__(code=code, parts=msgpack.unpackb(data))


def _packed(content: Any) -> bytes:
    """msgpack as `flax.serialization` writes it, of whatever is in there."""
    packer = msgpack.Packer(
        default=_packable, strict_types=True, unicode_errors="surrogatepass", autoreset=False
    )
    packer.pack(content)
    return packer.bytes()


def _packable(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return msgpack.ExtType(1, _packed([list(value.shape), value.dtype.name, value.tobytes()]))
    if isinstance(value, _Extension):
        code = value.get("code")
        fits = isinstance(code, int) and not isinstance(code, bool) and 0 <= code < 128
        return msgpack.ExtType(code if fits else 1, _packed(value.get("parts")))
    return str(value)  # such as an integer of more than 64 bits


def _safetensors(folder: Path) -> Sample:
    from safetensors.numpy import save_file

    sample = Sample(folder, folder / "model.safetensors")
    arrays = {".".join(names): array for names, array in _walk(_TREE["params"], ("params",))}
    save_file(arrays, sample.path)
    sample.add(sample.path, _other_header, _other_header)
    return sample


def _other_header(random: Random, data: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = mutate.json_(random, data[8 : 8 + length])
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def _npz(folder: Path) -> Sample:
    sample = Sample(folder, folder / "model.npz")
    arrays = {"/".join(names): array for names, array in _walk(_TREE["params"], ("params",))}
    np.savez(sample.path, **arrays)
    sample.add(sample.path, _other_members, _other_members)
    return sample


def _other_members(random: Random, data: bytes) -> bytes:
    """An archive whose members are damaged below its checksums."""
    new = io.BytesIO()
    kind = random.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(new, "w", kind) as written:
        victim = random.choice(old.namelist())
        for name in old.namelist():
            content = old.read(name)
            if name == victim:
                content = mutate.bytes_(random, content[:128]) + content[128:]
            written.writestr(name, content)
    return new.getvalue()


def _shards(folder: Path) -> Sample:
    """A checkpoint of Hugging Face in two shards."""
    from safetensors.numpy import save_file

    sample = Sample(folder, folder / "sharded")
    sample.path.mkdir()
    places = {}
    for number, (names, array) in enumerate(_walk(_TREE["params"], ("params",))):
        name = f"model-0000{number % 2 + 1}-of-00002.safetensors"
        places.setdefault(name, {})[".".join(names)] = array
    for name, arrays in places.items():
        save_file(arrays, sample.path / name)
        sample.add(sample.path / name, _other_header)
    index = sample.path / "model.safetensors.index.json"
    weights = {array: name for name, arrays in places.items() for array in arrays}
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weights}))
    sample.add(index, mutate.json_, mutate.json_)
    return sample


def _index(folder: Path) -> Sample:
    """An item as Orbax 0.2 wrote it: an index in msgpack, and a folder for each array."""
    sample = Sample(folder, folder / "old")
    _item(sample.path, in_tree=False)
    for name in ("_METADATA", "_sharding"):
        (sample.path / name).unlink()
    tree: Any = {}
    for names, _ in _walk(_TREE, ()):
        node = tree
        for name in names[:-1]:
            node = node.setdefault(name, {})
        node[names[-1]] = f"PLACEHOLDER://{'.'.join(names)}"
    (sample.path / "checkpoint").write_bytes(_packed(tree))
    sample.add(sample.path / "checkpoint", _repacked, _repacked)
    sample.add(sample.path / "step" / ".zarray", mutate.json_)
    return sample


def _result(folder: Path, source: Sample) -> Sample:
    """What the converter has written, for the way back."""
    sample = Sample(folder / "result", folder / "result" / "nnx")
    sample.folder.mkdir()
    convert(source.path, sample.path, "nnx", rules=source.folder / "rules.yaml")
    step = sample.path / "3"
    sample.add(step / "report.json", mutate.json_, mutate.json_, mutate.json_)
    sample.add(step / "digests.json", mutate.json_, mutate.json_)
    sample.add(step / "rules.yaml", mutate.text)
    _save_book(sample)
    return sample
