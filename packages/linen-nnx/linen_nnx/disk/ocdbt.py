"""The tree of an OCDBT store: the bytes that each key has, or where they lie.

OCDBT is the database in files that Orbax keeps arrays in, through tensorstore. `manifest.ocdbt`
names the root of a B-tree; its nodes lie in data files, and so do values too long for a node. The
format is described under "Storage format" at https://google.github.io/tensorstore/kvstore/ocdbt/
and in tensorstore's `kvstore/ocdbt/format/*codec*`; names here are those of that page.

A re-key reads one tree and writes another, and needs no more than that of tensorstore, whose
import takes longer than all the rest. Raises `ValueError` or `OSError` for what cannot be read.

A damaged or malicious tree is refused, whatever its bytes: a checksum proves only that somebody
computed it. Every count is compared with the bytes that are left before anything is made of it. A
node that refers to itself, or that two nodes refer to, would take for ever; no writer makes one.
What a tree decodes to is counted while it is read: 10 kB of zstd may hold gigabytes, and a key
repeats the beginning of the one before it (a million keys may each repeat a megabyte).
"""

import itertools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
from backports import zstd

from linen_nnx.book.reading import read_bytes, read_range

MANIFEST = "manifest.ocdbt"
_MANIFEST, _NODE = bytes.fromhex("0cdb3a2a"), bytes.fromhex("0cdb20de")  # `magic_value`
_FRAME = 18  # bytes of a manifest or a node around its content
_NOWHERE = 2**64 - 1  # offset and length of the root of an empty tree
_ENTRIES = 1 << 20  # in one node: tensorstore refuses more
_ARITY = _ENTRIES  # entries in a node that is written
_HEIGHT = 64  # levels of nodes: with two entries in each, 2**64 keys
_NODE_BYTES = 100 << 20  # decoded, of a node or a manifest: Orbax sets a limit of 100 MB
_FULL = 64 << 20  # bytes of keys and values that end a node that is written
_TREE_BYTES = 1 << 28  # decoded, of all nodes and keys: a million arrays take 150 MB


class Ref(NamedTuple):
    """Bytes in a data file, whose path is relative to the store."""

    file: str
    offset: int
    length: int


Value = bytes | Ref
Tree = dict[str, dict[str, Value]]
"""Values by the first element of their keys (the name of an array), then by the rest."""


class _Child(NamedTuple):
    """A reference to a node, and the statistics of the tree below it."""

    ref: Ref
    base: str = ""
    """What the node's own paths are relative to."""
    keys: int = 0
    tree_bytes: int = 0
    value_bytes: int = 0


def read(folder: Path) -> Tree:
    """The newest version of a store's tree."""
    left = _Budget()
    content = read_bytes(folder / MANIFEST, _NODE_BYTES)
    body = _Body(content, _MANIFEST, left)
    body.take(16)  # uuid
    if kind := body.byte():
        raise ValueError(f"{MANIFEST} has manifest_kind {kind}, expected 0 (a single file)")
    body.varints(2)  # max_inline_value_bytes, max_decoded_node_bytes
    body.byte()  # version_tree_arity_log2
    if body.varints(1) == [1]:
        body.take(4)  # the level of zstd
    files = body.files("")
    count = body.count()
    if not count:
        raise ValueError(f"{MANIFEST} has no version of the tree")
    body.varints(count)  # generation_number
    heights = body.take(count)
    root = list(body.children(files, count))[-1]
    tree: Tree = {}
    if root.ref.offset != _NOWHERE:
        _Reading(folder, left, tree).node(root, heights[-1], b"")
    found = sum(map(len, tree.values()))
    if found != root.keys:
        raise ValueError(f"the tree has {found} keys, expected {root.keys} by its manifest")
    return tree


def fetch(folder: Path, value: Value, limit: int = _NODE_BYTES) -> bytes:
    """The bytes of a value, which may be at most `limit`."""
    if len(value) > limit if isinstance(value, bytes) else value.length > limit:
        raise ValueError(f"a value is longer than {limit} bytes")
    if isinstance(value, bytes):
        return value
    try:
        return read_range(folder / value.file, value.offset, value.length)
    except ValueError as error:
        raise ValueError(f"{value.file}: {error}") from None


class _Budget:
    """How many bytes a tree may still decode to."""

    def __init__(self) -> None:
        self._left = _TREE_BYTES

    def spend(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise ValueError(f"the tree decodes to more than {_TREE_BYTES} bytes")


class _Reading:
    """One reading of a tree: what is found goes to `tree`."""

    def __init__(self, folder: Path, left: _Budget, tree: Tree) -> None:
        self.folder, self.left, self.tree = folder, left, tree
        self.seen: set[Ref] = set()

    def node(self, node: _Child, height: int, prefix: bytes) -> None:
        """Adds the keys of a node and of all below it, which begin with `prefix`."""
        if node.ref in self.seen:
            raise ValueError(f"two nodes refer to the node at byte {node.ref.offset}")
        self.seen.add(node.ref)
        if height > _HEIGHT:
            raise ValueError(f"a node has height {height}, expected at most {_HEIGHT}")
        body = _Body(fetch(self.folder, node.ref, _NODE_BYTES), _NODE, self.left)
        if (seen := body.byte()) != height:
            raise ValueError(f"a node has height {seen}, expected {height} by its parent")
        files = body.files(node.base)
        count = body.count()
        if count > _ENTRIES:
            raise ValueError(f"a node has {count} entries, expected at most {_ENTRIES}")
        keys, common = body.keys(count, inner=height > 0)
        self.left.spend(count * len(prefix))
        if height:
            children = body.children(files, count)
            for key, same, child in zip(keys, common, children, strict=True):
                self.node(child, height - 1, prefix + key[:same])
        else:
            self.values(body, files, [prefix + key for key in keys])

    def values(self, body: "_Body", files: Sequence[tuple[str, str]], keys: list[bytes]) -> None:
        """Adds the values of a leaf node."""
        lengths, kinds = body.varints(len(keys)), body.take(len(keys))
        far = kinds.count(1)
        if far + kinds.count(0) != len(keys):
            raise ValueError(f"a node has values of kinds {sorted(set(kinds))}, expected 0 and 1")
        paths = [_entry(files, number)[0] for number in body.varints(far)]
        places = zip(paths, body.varints(far), strict=True)
        for key, length, kind in zip(keys, lengths, kinds, strict=True):
            name, _, rest = key.decode().partition("/")
            value = Ref(*next(places), length) if kind else body.take(length)
            self.tree.setdefault(name, {})[rest] = value


def _entry(files: Sequence[tuple[str, str]], number: int) -> tuple[str, str]:
    """An entry of a data file table."""
    if number >= len(files):
        raise ValueError(f"a node refers to file {number} of {len(files)}")
    return files[number]


def _decoded(data: bytes) -> bytes:
    """What zstd has made smaller."""
    decoder = zstd.ZstdDecompressor()
    try:
        content = decoder.decompress(data, max_length=_NODE_BYTES + 1)
    except zstd.ZstdError as error:
        raise ValueError(f"a node is malformed: {error}") from None
    if len(content) > _NODE_BYTES:
        raise ValueError(f"a node decodes to more than {_NODE_BYTES} bytes")
    if not decoder.eof or decoder.unused_data:
        raise ValueError("a node is malformed: its compressed bytes end too early or too late")
    return content


class _Body:
    """What a manifest or a node holds, read from the front."""

    def __init__(self, data: bytes, magic: bytes, left: _Budget) -> None:
        what = MANIFEST if magic == _MANIFEST else "a node"
        if data[:4] != magic or int.from_bytes(data[4:12], "little") != len(data):
            raise ValueError(f"{what} begins with {data[:12].hex()}, of {len(data)} bytes")
        if google_crc32c.value(data[:-4]) != int.from_bytes(data[-4:], "little"):
            raise ValueError(f"{what} is damaged: its checksum differs")
        if len(data) < _FRAME:
            raise ValueError(f"{what} has {len(data)} bytes, expected {_FRAME} or more")
        version, compression = data[12:14]
        if version or compression > 1:
            seen = f"version {version} and compression {compression}"
            raise ValueError(f"{what} has format {seen}, known are 0 and 0 or 1")
        self._data = _decoded(data[14:-4]) if compression else data[14:-4]
        self._left = left
        left.spend(len(self._data))
        self._at = 0

    def take(self, count: int) -> bytes:
        """The next bytes."""
        start, self._at = self._at, self._at + count
        if self._at > len(self._data):
            raise ValueError("a node ends too early")
        return self._data[start : self._at]

    def byte(self) -> int:
        return self.take(1)[0]

    def count(self) -> int:
        """The next number, which says how many things follow: each takes a byte or more."""
        (number,) = self.varints(1)
        if number > len(self._data) - self._at:
            raise ValueError(f"a node lists {number} things in {len(self._data) - self._at} bytes")
        return number

    def varints(self, count: int) -> list[int]:
        """The next numbers, each in groups of seven bits, the lowest first."""
        data, at = self._data, self._at
        if at + count > len(data):
            raise ValueError("a node ends too early")
        if data[at : at + count].isascii():  # all small, as most columns are
            return list(self.take(count))
        numbers = []
        for _ in range(count):
            number = shift = 0
            while at < len(data) and (byte := data[at]) > 127 and shift < 63:
                number |= (byte & 127) << shift
                shift += 7
                at += 1
            if at >= len(data) or data[at] > 127 or (shift == 63 and data[at] > 1):
                raise ValueError("a node has a number that ends too early, or takes over 64 bits")
            numbers.append(number | data[at] << shift)
            at += 1
        self._at = at
        return numbers

    def texts(self, shared: Sequence[int], own: Sequence[int]) -> list[bytes]:
        """The next texts, each of which begins as the one before it does.

        `shared` says with how many bytes of that one, `own` how many bytes of its own follow:

            shared 0 3 3, own 5 1 2, bytes "a/b/0" "1" "10"   ->   "a/b/0" "a/b1" "a/b10"
        """
        self._left.spend(sum(shared))
        text, found = b"", []
        for same, more in zip(shared, own, strict=True):
            if same > len(text):
                raise ValueError(f"a text shares {same} bytes with one of {len(text)}")
            text = text[:same] + self.take(more)
            found.append(text)
        return found

    def keys(self, count: int, inner: bool) -> tuple[list[bytes], list[int]]:
        """The keys of a node and, of an inner one, how much of each its child leaves out."""
        shared = [0, *self.varints(count - 1)] if count else []
        own = self.varints(count)
        common = self.varints(count) if inner else []
        return self.texts(shared, own), common

    def files(self, base: str) -> list[tuple[str, str]]:
        """A data file table: each file's path, and the base of the paths in nodes that it holds."""
        count = self.count()
        shared = [0, *self.varints(count - 1)] if count else []
        own, bases = self.varints(count), self.varints(count)
        self._left.spend(count * len(base))
        found = []
        for path, length in zip(self.texts(shared, own), bases, strict=True):
            whole = base + path.decode()
            if whole.startswith("/") or ".." in whole.split("/") or "\0" in whole:
                raise ValueError(f"a node names {whole!r}, which lies outside of the store")
            found.append((whole, base + path[:length].decode()))
        return found

    def children(self, files: Sequence[tuple[str, str]], count: int) -> Iterator[_Child]:
        """References to nodes."""
        columns = [self.varints(count) for _ in range(6)]
        for number, offset, length, *statistics in zip(*columns, strict=True):
            path, base = _entry(files, number)
            yield _Child(Ref(path, offset, length), base, *statistics)


def write(folder: Path, tree: Mapping[str, Mapping[str, Value]]) -> None:
    """Writes a tree, and a manifest in place of the one that may be there."""
    level: list[tuple[bytes, Any]] = sorted(
        (f"{name}/{rest}".encode(), value)
        for name, values in tree.items()
        for rest, value in values.items()
    )
    name, nodes = f"d/{os.urandom(16).hex()}", bytearray()
    root, height = _Child(Ref("", _NOWHERE, _NOWHERE)), 0
    for height in itertools.count() if level else ():
        parts, level = _parts(level), []
        for part in parts:
            node = _node(height, part)
            below = [v for _, v in part if isinstance(v, _Child)]
            sizes = (value.length for _, value in part if isinstance(value, Ref))
            root = _Child(
                Ref(name, len(nodes), len(node)),
                keys=sum(child.keys for child in below) if height else len(part),
                tree_bytes=sum(child.tree_bytes for child in below) + len(node),
                value_bytes=sum(sizes) + sum(child.value_bytes for child in below),
            )
            level.append((part[0][0], root))
            nodes += node
        if len(level) == 1:
            break
    if nodes:
        (folder / "d").mkdir(exist_ok=True)
        (folder / name).write_bytes(nodes)
    # As Orbax configures its stores: values up to 1 KB lie in the tree, which is one node.
    config = [os.urandom(16), b"\0", _varints([1024, 100_000_000]), b"\4\1", bytes(4)]
    version = [b"\1\1", bytes([height]), _children([root], [root.ref.file])]
    when = time.time_ns().to_bytes(8, "little")
    body = [*config, _files([root.ref.file]), *version, when, b"\0"]
    (folder / MANIFEST).write_bytes(_sealed(_MANIFEST, body))


def _parts(level: list[tuple[bytes, Any]]) -> list[list[tuple[bytes, Any]]]:
    """The entries of one level, cut into those of each node."""
    parts, size = [], 0
    for number, (key, value) in enumerate(level):
        size += len(key) + (len(value) if isinstance(value, bytes) else 0)
        if not parts or len(parts[-1]) == _ARITY or size > _FULL:
            parts.append([])
            size = 0
        parts[-1].append(level[number])
    return parts


def _node(height: int, entries: Sequence[tuple[bytes, Any]]) -> bytes:
    """A node with `entries`, which are sorted: keys with values, or with children."""
    keys, values = zip(*entries, strict=True)
    shared = [0, *itertools.starmap(_shared, itertools.pairwise(keys))]
    texts = [key[same:] for key, same in zip(keys, shared, strict=True)]
    refs = [v.ref if height else v for v in values if not isinstance(v, bytes)]
    files = sorted({ref.file for ref in refs})
    body = [bytes([height]), _files(files), _varints([len(keys)])]
    body += [_varints(shared[1:]), _varints(list(map(len, texts)))]
    body += [bytes(len(keys) if height else 0), *texts]  # subtree_common_prefix_length
    if height:
        return _sealed(_NODE, [*body, _children(values, files)])
    body.append(_varints([len(v) if isinstance(v, bytes) else v.length for v in values]))
    body.append(bytes([not isinstance(value, bytes) for value in values]))
    body += _places(refs, files)
    return _sealed(_NODE, [*body, *(value for value in values if isinstance(value, bytes))])


def _children(children: Sequence[_Child], files: Sequence[str]) -> bytes:
    places = _places([child.ref for child in children], files)
    statistics = zip(*((c.ref.length, *c[2:]) for c in children), strict=True)
    return b"".join([*places, *map(_varints, statistics)])


def _places(refs: Sequence[Ref], files: Sequence[str]) -> list[bytes]:
    """The columns of file numbers and offsets."""
    numbers = {file: number for number, file in enumerate(files)}
    return [_varints([numbers[ref.file] for ref in refs]), _varints([ref.offset for ref in refs])]


def _files(files: Sequence[str]) -> bytes:
    """A data file table."""
    paths = [file.encode() for file in files]
    none = bytes(len(paths))
    lengths = _varints(list(map(len, paths)))
    return b"".join([_varints([len(paths)]), none[1:], lengths, none, *paths])


def _shared(one: bytes, other: bytes) -> int:
    """The length of the common beginning."""
    size = min(len(one), len(other))
    differing = int.from_bytes(one[:size], "big") ^ int.from_bytes(other[:size], "big")
    return size - (differing.bit_length() + 7) // 8


def _varints(numbers: Sequence[int]) -> bytes:
    if max(numbers, default=0) < 128:
        return bytes(numbers)
    data = bytearray()
    for number in numbers:
        while number > 127:
            data.append(number & 127 | 128)
            number >>= 7
        data.append(number)
    return bytes(data)


def _sealed(magic: bytes, body: Sequence[bytes]) -> bytes:
    """A manifest or a node with its header and its checksum."""
    content = b"\0\1" + zstd.compress(b"".join(body))
    content = magic + (len(content) + 16).to_bytes(8, "little") + content
    return content + google_crc32c.value(content).to_bytes(4, "little")
