r"""Reads the tree of an OCDBT store: the bytes that each key has, or where those bytes lie.

OCDBT is the database in files that Orbax keeps arrays in, through tensorstore. `manifest.ocdbt`
names the root of a B-tree; its nodes lie in data files, and so do values too long for a node. The
format is described under "Storage format" at https://google.github.io/tensorstore/kvstore/ocdbt/
and in tensorstore's `kvstore/ocdbt/format/*codec*`; names here are those of that page.

A tree of four leaves, two arrays with a metadata text and a chunk of 400 bytes each:

    >>> tree = {
    ...     "a": {".zarray": b"{}", "0": Ref("d/f", 0, 400)},
    ...     "b": {".zarray": b"{}", "0": Ref("d/f", 400, 400)},
    ... }

It fits in one node, which lists its entries by column. A key is written as the number of bytes that
it shares with the key before it, and the bytes that follow:

    height          0                                  a leaf node: its entries are values
    files           d/f                                what the file numbers below count
    entries         4
    keys            a/.zarray  a/0  b/.zarray  b/0
      shared                   2    0          2       (the first shares nothing, and is left out)
      own           9          1    9          1
      text          a/.zarray  0    b/.zarray  0
    values
      length        2          400  2          400
      kind          0          1    0          1       0: in this node, 1: in a data file
      file number              0               0
      offset                   0               400
      text          {}              {}

What is written so is read back:

    >>> import tempfile
    >>> from linen_nnx.disk.ocdbt_writing import write
    >>> folder = Path(tempfile.mkdtemp())
    >>> write(folder, tree)
    >>> read(folder) == tree
    True
    >>> fetch(folder, tree["a"][".zarray"])
    b'{}'

A larger tree has inner nodes above such leaf nodes; their values are references to nodes. An inner
node also says how much of each key all keys of the child share, and the child leaves that out:

    inner node      keys  layers/0/a   layers/1/a      common  9  9
      child 0       keys  a  b  c                      for  layers/0/a  layers/0/b  layers/0/c

A re-key reads one tree and writes another, and needs no more than that of tensorstore, whose
import takes longer than all the rest. Raises `ValueError` or `OSError` for what cannot be read.

A damaged or malicious tree is refused, whatever its bytes: a checksum proves only that somebody
computed it. Every count is compared with the bytes that are left before anything is made of it. A
node that refers to itself, or that two nodes refer to, would take for ever; no writer makes one.
What a tree decodes to is counted while it is read: 10 kB of zstd may hold gigabytes, and a key
repeats the beginning of the one before it (a million keys may each repeat a megabyte).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import google_crc32c
from backports import zstd

from linen_nnx.book.reading import read_bytes, read_range

MANIFEST = "manifest.ocdbt"
MANIFEST_MAGIC, NODE_MAGIC = bytes.fromhex("0cdb3a2a"), bytes.fromhex("0cdb20de")
NOWHERE = 2**64 - 1
"""The offset and the length of the root of an empty tree."""
MOST_ENTRIES = 1 << 20
"""Entries of one node: tensorstore refuses more."""
_FRAME = 18  # bytes of a manifest or a node around its content
_HEIGHT = 64  # levels of nodes: with two entries in each, 2**64 keys
_NODE_BYTES = 100 << 20  # decoded, of a node or a manifest: Orbax sets a limit of 100 MB
_TREE_BYTES = 1 << 28  # decoded, of all nodes and keys: a million arrays take 150 MB


class Ref(NamedTuple):
    """Bytes in a data file, whose path is relative to the store."""

    file: str
    offset: int
    length: int


Value = bytes | Ref
Tree = dict[str, dict[str, Value]]
"""Values by the first element of their keys (the name of an array), then by the rest."""


class Child(NamedTuple):
    """A reference to a node, and the statistics of the tree below it."""

    ref: Ref
    base: str = ""
    """The folder that the paths in the node are relative to."""
    keys: int = 0
    tree_bytes: int = 0
    value_bytes: int = 0


def read(folder: Path) -> Tree:
    """The newest version of a store's tree. Raises as the module says."""
    left = _Budget()
    content = read_bytes(folder / MANIFEST, _NODE_BYTES)
    root, height = _newest_version(_Body(content, MANIFEST_MAGIC, left))
    tree: Tree = {}
    if root.ref.offset != NOWHERE:
        _Reading(folder, left, tree).add(root, height, b"")
    # A tree that lost a node in a way that every check missed still has too few keys.
    found = sum(map(len, tree.values()))
    if found != root.keys:
        raise ValueError(f"the tree has {found} keys, expected {root.keys} by its manifest")
    return tree


def _newest_version(body: "_Body") -> tuple[Child, int]:
    """The root that a manifest names last, and the height of the tree below it."""
    body.take(16)  # uuid
    # A manifest of another kind would name its versions in further files. Orbax writes kind 0.
    if kind := body.byte():
        raise ValueError(f"{MANIFEST} has manifest_kind {kind}, expected 0 (a single file)")
    body.varints(2)  # max_inline_value_bytes, max_decoded_node_bytes
    body.byte()  # version_tree_arity_log2
    compression = body.varints(1)
    if compression == [1]:
        body.take(4)  # the level of zstd
    files = body.files("")
    count = body.count()
    if not count:
        raise ValueError(f"{MANIFEST} has no version of the tree")
    body.varints(count)  # generation_number, which rises
    heights = body.take(count)
    *_, root = body.children(files, count)
    return root, heights[-1]


def fetch(folder: Path, value: Value, limit: int = _NODE_BYTES) -> bytes:
    """The bytes of a value, which may be at most `limit`.

    Raises:
      ValueError: for a longer value, and for one that ends behind its file's end.
      OSError: for a data file that is not there.
    """
    length = len(value) if isinstance(value, bytes) else value.length
    if length > limit:
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
    """One reading of a tree: the keys of each node are added to `tree`."""

    def __init__(self, folder: Path, left: _Budget, tree: Tree) -> None:
        self.folder, self.left, self.tree = folder, left, tree
        self.seen: set[Ref] = set()

    def add(self, node: Child, height: int, prefix: bytes) -> None:
        """Adds the keys of a node and of all nodes below it. All of them begin with `prefix`."""
        # Sixty levels whose nodes each refer twice to one child are 2**60 paths through 60 nodes.
        if node.ref in self.seen:
            raise ValueError(f"two nodes refer to the node at byte {node.ref.offset}")
        self.seen.add(node.ref)
        if height > _HEIGHT:
            raise ValueError(f"a node has height {height}, expected at most {_HEIGHT}")
        body = _Body(fetch(self.folder, node.ref, _NODE_BYTES), NODE_MAGIC, self.left)
        if (own_height := body.byte()) != height:
            raise ValueError(f"a node has height {own_height}, expected {height} by its parent")
        files = body.files(node.base)
        count = body.count()
        if count > MOST_ENTRIES:
            raise ValueError(f"a node has {count} entries, expected at most {MOST_ENTRIES}")
        keys, common = body.keys(count, inner=height > 0)
        # Each key is about to be joined to the prefix, which may be long and the keys many.
        self.left.spend(count * len(prefix))
        if height == 0:
            self._add_values(body, files, [prefix + key for key in keys])
            return
        children = body.children(files, count)
        for key, same, child in zip(keys, common, children, strict=True):
            self.add(child, height - 1, prefix + key[:same])

    def _add_values(
        self, body: "_Body", files: Sequence[tuple[str, str]], keys: list[bytes]
    ) -> None:
        """Adds the values of a leaf node."""
        lengths, kinds = body.varints(len(keys)), body.take(len(keys))
        in_files = kinds.count(1)
        if in_files + kinds.count(0) != len(keys):
            raise ValueError(f"a node has values of kinds {sorted(set(kinds))}, expected 0 and 1")
        # The columns of places have an entry for each value in a file, and none for the others.
        paths = [_entry(files, number)[0] for number in body.varints(in_files)]
        places = zip(paths, body.varints(in_files), strict=True)
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
    """The content of a node that zstd has compressed."""
    decoder = zstd.ZstdDecompressor()
    try:
        # One byte more than is allowed tells a node of the limit's size from a longer one.
        content = decoder.decompress(data, max_length=_NODE_BYTES + 1)
    except zstd.ZstdError as error:
        raise ValueError(f"a node is malformed: {error}") from None
    if len(content) > _NODE_BYTES:
        raise ValueError(f"a node decodes to more than {_NODE_BYTES} bytes")
    if not decoder.eof or decoder.unused_data:
        raise ValueError("a node is malformed: its compressed bytes end too early or too late")
    return content


class _Body:
    """The content of a manifest or a node, read from the front.

    Around the content there are 18 bytes: 4 of magic, 8 of length, 1 of version, 1 that says how it
    is compressed, and a checksum of 4 at the end.
    """

    def __init__(self, data: bytes, magic: bytes, left: _Budget) -> None:
        what = MANIFEST if magic == MANIFEST_MAGIC else "a node"
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
        """The next numbers, each in groups of seven bits, the lowest group first.

        All groups but a number's last have the eighth bit: 400 = 3 * 128 + 16 is `90 03`.
        """
        data, at = self._data, self._at
        if at + count > len(data):
            raise ValueError("a node ends too early")
        # Numbers below 128 take a byte each, as in most columns: then the bytes are the numbers.
        if data[at : at + count].isascii():
            return list(self.take(count))
        numbers = []
        for _ in range(count):
            number = shift = 0
            while at < len(data) and (byte := data[at]) > 127 and shift < 63:
                number |= (byte & 127) << shift
                shift += 7
                at += 1
            # Nine groups make 63 bits, so the tenth may hold one bit more.
            if at >= len(data) or data[at] > 127 or (shift == 63 and data[at] > 1):
                raise ValueError("a node has a number that ends too early, or takes over 64 bits")
            numbers.append(number | data[at] << shift)
            at += 1
        self._at = at
        return numbers

    def texts(self, shared: Sequence[int], own: Sequence[int]) -> list[bytes]:
        """The next texts, each of which begins as the one before it does.

        Args:
          shared: how many bytes each has in common with the one before it.
          own: how many bytes of its own follow:

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
        """A data file table: each file's path, and the base of the paths in nodes that it holds.

        A store that was merged from those of several processes, as Orbax does it, has a file
        `ocdbt.process_0/d/f`. The nodes in that file write `d/g` for `ocdbt.process_0/d/g`: their
        base is `ocdbt.process_0/`.
        """
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

    def children(self, files: Sequence[tuple[str, str]], count: int) -> Iterator[Child]:
        """References to nodes, written as six columns: file, offset, length, and statistics."""
        columns = [self.varints(count) for _ in range(6)]
        for number, offset, length, *statistics in zip(*columns, strict=True):
            path, base = _entry(files, number)
            yield Child(Ref(path, offset, length), base, *statistics)
