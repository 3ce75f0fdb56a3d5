r"""Writes the tree of an OCDBT store, as `ocdbt.py` reads it. The values' data is in place before.

The node of the four leaves that are drawn there, before it is compressed:

    >>> node_content(0, [
    ...     (b"a/.zarray", b"{}"), (b"a/0", Ref("d/f", 0, 400)),
    ...     (b"b/.zarray", b"{}"), (b"b/0", Ref("d/f", 400, 400)),
    ... ])  # doctest: +NORMALIZE_WHITESPACE
    b'\x00\x01\x03\x00d/f\x04\x02\x00\x02\t\x01\t\x01a/.zarray0b/.zarray0\x02\x90\x03\x02\x90\x03\x00\x01\x00\x01\x00\x00\x00\x90\x03{}{}'

Taken apart:

    00                         height
    01 03 00 d/f               the data file table: one path of three bytes, whose base is empty
    04                         entries
    02 00 02                   bytes that each key shares with the one before it, but for the first
    09 01 09 01                bytes of its own
    a/.zarray 0 b/.zarray 0
    02 9003 02 9003            the values' lengths: 9003 is 400, in groups of seven bits
    00 01 00 01                their kinds: in this node, or in a file
    00 00   00 9003            of those in a file, the file's number and the offset
    {} {}                      the others

Entries that do not fit in one node get several, and a level of inner nodes above them; and so on,
until a level has one node. That one is the root.
"""

import itertools
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
from backports import zstd

from linen_nnx.disk.ocdbt import (
    MANIFEST,
    MANIFEST_MAGIC,
    MOST_ENTRIES,
    NODE_MAGIC,
    NOWHERE,
    Child,
    Ref,
    Value,
)

Entry = tuple[bytes, Any]
"""A key, with a `Value` in a leaf node and with a `Child` in an inner one."""
_ARITY = MOST_ENTRIES  # entries that end a node
_FULL = 64 << 20  # bytes of keys and values that end a node


def write(folder: Path, tree: Mapping[str, Mapping[str, Value]]) -> None:
    """Writes a tree, and a manifest in place of the one that may be there.

    All nodes lie in one new data file. The data files of the values are not touched.
    """
    level: list[Entry] = []
    for name, values in tree.items():
        for rest, value in values.items():
            level.append((f"{name}/{rest}".encode(), value))
    level.sort()
    root, height = Child(Ref("", NOWHERE, NOWHERE)), 0
    if level:
        data_file = f"d/{os.urandom(16).hex()}"
        nodes = bytearray()
        root, height = _add_levels(nodes, data_file, level)
        (folder / "d").mkdir(exist_ok=True)
        (folder / data_file).write_bytes(nodes)
    (folder / MANIFEST).write_bytes(_manifest(root, height))


def _add_levels(nodes: bytearray, data_file: str, level: list[Entry]) -> tuple[Child, int]:
    """Appends the nodes of all levels to `nodes`. Returns the root and its height."""
    for height in itertools.count():
        parents: list[Entry] = []
        for entries in _parts(level):
            content = node(height, entries)
            place = Ref(data_file, len(nodes), len(content))
            # An inner node knows its children by their first keys.
            parents.append((entries[0][0], _summed(place, height, entries)))
            nodes += content
        level = parents
        if len(level) == 1:
            _, root = level[0]
            return root, height
    raise AssertionError("`count` has no end")


def _summed(place: Ref, height: int, entries: Sequence[Entry]) -> Child:
    """The reference to a node, with the statistics of all that lies below it."""
    keys, tree_bytes, value_bytes = 0, place.length, 0
    for _, value in entries:
        if isinstance(value, Child):
            keys += value.keys
            tree_bytes += value.tree_bytes
            value_bytes += value.value_bytes
        elif isinstance(value, Ref):
            value_bytes += value.length
    return Child(
        place,
        keys=keys if height else len(entries),
        tree_bytes=tree_bytes,
        value_bytes=value_bytes,
    )


def _parts(level: Iterable[Entry]) -> list[list[Entry]]:
    """The entries of one level, cut into those of each node."""
    parts: list[list[Entry]] = []
    size = 0
    for key, value in level:
        size += len(key) + (len(value) if isinstance(value, bytes) else 0)
        if not parts or len(parts[-1]) == _ARITY or size > _FULL:
            parts.append([])
            size = 0
        parts[-1].append((key, value))
    return parts


def node(height: int, entries: Sequence[Entry]) -> bytes:
    """A node with `entries`, which are sorted: keys with values, or with children."""
    return sealed(NODE_MAGIC, node_content(height, entries))


def node_content(height: int, entries: Sequence[Entry]) -> bytes:
    """The content of a node, before it is compressed."""
    shared, texts = _key_columns(entries)
    values = [value for _, value in entries]
    refs = [value.ref if height else value for value in values if not isinstance(value, bytes)]
    files = sorted({ref.file for ref in refs})
    body = [
        bytes([height]),
        file_table(files),
        varints([len(entries)]),
        # The first shares nothing, and is left out.
        varints(shared[1:]),
        varints(list(map(len, texts))),
    ]
    if height:
        # subtree_common_prefix_length: 0, as children leave nothing out of their keys here.
        body.append(bytes(len(entries)))
        return b"".join([*body, *texts, children(values, files)])
    lengths, kinds, in_tree = [], [], []
    for value in values:
        if isinstance(value, bytes):
            lengths.append(len(value))
            kinds.append(0)
            in_tree.append(value)
        else:
            lengths.append(value.length)
            kinds.append(1)
    places = _places(refs, files)
    return b"".join([*body, *texts, varints(lengths), bytes(kinds), *places, *in_tree])


def _key_columns(entries: Iterable[Entry]) -> tuple[list[int], list[bytes]]:
    """How much each key shares with the one before it, and the rest of the key."""
    shared, texts = [], []
    before = b""
    for key, _ in entries:
        same = _common_length(before, key)
        shared.append(same)
        texts.append(key[same:])
        before = key
    return shared, texts


def children(nodes: Sequence[Child], files: Sequence[str]) -> bytes:
    """The six columns of references to nodes."""
    lengths, keys, tree_bytes, value_bytes = [], [], [], []
    for child in nodes:
        lengths.append(child.ref.length)
        keys.append(child.keys)
        tree_bytes.append(child.tree_bytes)
        value_bytes.append(child.value_bytes)
    places = _places([child.ref for child in nodes], files)
    columns = map(varints, [lengths, keys, tree_bytes, value_bytes])
    return b"".join([*places, *columns])


def _places(refs: Sequence[Ref], files: Sequence[str]) -> list[bytes]:
    """The columns of file numbers and offsets."""
    numbers = {file: number for number, file in enumerate(files)}
    return [varints([numbers[ref.file] for ref in refs]), varints([ref.offset for ref in refs])]


def file_table(files: Sequence[str]) -> bytes:
    """A data file table, whose paths share nothing and have no base."""
    paths = [file.encode() for file in files]
    none = bytes(len(paths))
    lengths = varints(list(map(len, paths)))
    return b"".join([varints([len(paths)]), none[1:], lengths, none, *paths])


def _manifest(root: Child, height: int) -> bytes:
    """A manifest with one version of the tree."""
    # As Orbax configures its stores: values up to 1 KB lie in the tree, which is one node. Then
    # kind 0, an arity of 16 and zstd at level 0.
    config = [os.urandom(16), b"\0", varints([1024, 100_000_000]), b"\4\1", bytes(4)]
    files = [root.ref.file]
    when = time.time_ns().to_bytes(8, "little")
    # One version, of generation 1; no version tree node above it.
    version = [b"\1\1", bytes([height]), children([root], files), when, b"\0"]
    return sealed(MANIFEST_MAGIC, b"".join([*config, file_table(files), *version]))


def _common_length(one: bytes, other: bytes) -> int:
    """How many bytes two keys have in common at their beginning.

    Example:
      >>> _common_length(b"a/.zarray", b"a/0")
      2
    """
    size = min(len(one), len(other))
    # As numbers, so that no byte is looked at in Python: the highest bit of their difference is in
    # the first byte that differs.
    differing = int.from_bytes(one[:size], "big") ^ int.from_bytes(other[:size], "big")
    return size - (differing.bit_length() + 7) // 8


def varints(numbers: Sequence[int]) -> bytes:
    """Numbers in groups of seven bits, the lowest first; all groups but the last have the eighth.

    Example:
      >>> varints([2, 400]).hex(" ")
      '02 90 03'
    """
    # The most frequent case first: a column of small numbers is its own bytes.
    if max(numbers, default=0) < 128:
        return bytes(numbers)
    data = bytearray()
    for number in numbers:
        while number > 127:
            data.append(number & 127 | 128)
            number >>= 7
        data.append(number)
    return bytes(data)


def sealed(magic: bytes, content: bytes) -> bytes:
    """The content of a manifest or a node with header and checksum around it."""
    compressed = b"\0\1" + zstd.compress(content)  # version 0, compression 1
    # The length is that of the whole: 4 bytes of magic, 8 of the length, 4 of the checksum.
    framed = magic + (len(compressed) + 16).to_bytes(8, "little") + compressed
    return framed + google_crc32c.value(framed).to_bytes(4, "little")
