"""Whether a stored chunk is as long as its own encoding says, without decoding it.

A file that was cut off while it was copied is shorter than that. Codecs state their lengths in
different places: zstd in front of every block, blosc in front, gzip at the end, and a zarr3 shard
in the index at its end.

    zstd    magic, header | length, block | length, block | ... | last length, block | checksum
    blosc   16 bytes, of which 12 to 15 are the length | ...
    gzip    magic | ... | checksum, decoded length
    shard   chunk | chunk | ... | offset, length of each chunk | checksum
"""

import os
from io import FileIO
from typing import Any

import google_crc32c

_ZSTD = bytes.fromhex("28b52ffd")
# Decoded bytes for one that is stored: zstd takes 4 bytes for 128 KiB of zeros, others take more.
_SWELLING = 1 << 15
_NO_CHUNK = 2**64 - 1  # offset and length of a chunk that a shard leaves out
_PLAIN_INDEX = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]


def check_length(file: FileIO, metadata: dict[str, Any], nbytes: int) -> None:
    """Compares the length of a chunk's file with what its encoding says.

    Args:
      file: the chunk, open.
      metadata: the zarr metadata of its array.
      nbytes: the bytes that the chunk holds when decoded.

    Raises:
      ValueError: for a file that is too short or too long, or does not begin as its codec does.
    """
    size = os.fstat(file.fileno()).st_size
    check_swelling(size, nbytes)
    if metadata["zarr_format"] == 3:
        _check_zarr3(file, size, metadata, nbytes)
        return
    codec = (metadata["compressor"] or {}).get("id")
    if codec is None and not metadata["filters"]:
        _expect(size, nbytes)
    elif codec == "zstd":
        _check_zstd(file, size)
    elif codec == "gzip":
        # A filter may change the length before gzip sees the bytes.
        _check_gzip(file, size, None if metadata["filters"] else nbytes)
    elif codec == "blosc":
        _expect(size, int.from_bytes(_read(file, 12, 4), "little"))
    elif not size:
        # Of a codec that is not known here, no encoding is empty.
        raise ValueError("it is empty")


def check_size(size: int, metadata: dict[str, Any], nbytes: int) -> None:
    """Compares a chunk's length alone with its array, where no byte of the chunk is to be read.

    A chunk that is stored as it is must be as long as its array says. Of a compressed one only two
    things are known: it is not empty, and codecs do not make chunks that much smaller.

    Raises:
      ValueError: for a chunk of another length than these allow.

    Example:
      >>> plain = {"zarr_format": 2, "compressor": None, "filters": None}
      >>> check_size(12, plain, nbytes=16)
      Traceback (most recent call last):
      ValueError: it has 12 bytes, expected 16
    """
    check_swelling(size, nbytes)
    if _is_plain(metadata):
        _expect(size, nbytes)
    elif not size:
        raise ValueError("it is empty")


def _is_plain(metadata: dict[str, Any]) -> bool:
    """Whether chunks are stored as they are, neither compressed nor filtered."""
    if metadata["zarr_format"] == 3:
        return [codec["name"] for codec in metadata["codecs"]] == ["bytes"]
    return metadata["compressor"] is None and not metadata["filters"]


def check_swelling(size: int, nbytes: int) -> None:
    """Compares the stored and the decoded length of a chunk, which no codec makes so different.

    What a damaged shape asks for would be allocated, and tensorstore ends the process where that
    fails.

    Raises:
      ValueError: for a chunk that would decode to more than 32,768 times its size.

    Example:
      >>> check_swelling(size=100, nbytes=1 << 20)
      >>> check_swelling(size=100, nbytes=1 << 40)
      Traceback (most recent call last):
      ValueError: its 100 bytes cannot hold a chunk of 1099511627776
    """
    # 32 bytes of frame, so that a tiny chunk may be all frame.
    if nbytes > _SWELLING * (size + 32):
        raise ValueError(f"its {size} bytes cannot hold a chunk of {nbytes}")


def _check_zarr3(file: FileIO, size: int, metadata: dict[str, Any], nbytes: int) -> None:
    codecs = metadata["codecs"]
    # The last codec is the one that wrote the bytes in the file.
    last = codecs[-1]["name"] if codecs else ""
    if last == "sharding_indexed":
        shard = metadata["chunk_grid"]["configuration"]["chunk_shape"]
        _check_shard(file, size, shard, codecs[-1]["configuration"])
    elif last == "zstd":
        _check_zstd(file, size)
    elif last == "gzip":
        _check_gzip(file, size, nbytes)
    elif last == "bytes":
        _expect(size, nbytes)
    elif not size:
        raise ValueError("it is empty")


def _expect(size: int, expected: int) -> None:
    if size != expected:
        raise ValueError(f"it has {size} bytes, expected {expected}")


def _read(file: FileIO, start: int, count: int) -> bytes:
    """Bytes at a place, all of them."""
    data = os.pread(file.fileno(), count, start)
    if len(data) != count:
        raise ValueError(f"it ends before byte {start + count}")
    return data


def _check_zstd(file: FileIO, size: int) -> None:
    """Follows the blocks of each frame from length to length, up to the end."""
    end = 0
    # An empty file has no frame and is an error too, so the first frame is always read.
    while end < size or not end:
        end = _zstd_frame(file, end)
    _expect(size, end)


def _zstd_frame(file: FileIO, start: int) -> int:
    """The byte at which a frame ends. The format is RFC 8878, section 3.1.1."""
    magic = _read(file, start, 4)
    if magic != _ZSTD:
        raise ValueError(f"it is no zstd: it begins with {magic.hex()}")
    (flags,) = _read(file, start + 4, 1)
    single_segment, checksum = flags >> 5 & 1, flags >> 2 & 1
    # The header's optional fields, each of a length that the flags choose.
    window = 0 if single_segment else 1
    dictionary = (0, 1, 2, 4)[flags & 3]
    content_size = (single_segment, 2, 4, 8)[flags >> 6]
    at = start + 5 + window + dictionary + content_size
    is_last = 0
    while not is_last:
        # 3 bytes in front of a block: bit 0 says that it is the last, bits 1 and 2 its type, and
        # the rest its length. Of type 1, the block is one byte that is repeated so often.
        header = int.from_bytes(_read(file, at, 3), "little")
        is_last, repeated, length = header & 1, header >> 1 & 3 == 1, header >> 3
        at += 3 + (1 if repeated else length)
    return at + 4 * checksum


def _check_gzip(file: FileIO, size: int, nbytes: int | None) -> None:
    """Compares the decoded length, which ends a gzip file, modulo 2**32."""
    if _read(file, 0, 2) != b"\x1f\x8b":
        raise ValueError("it is no gzip")
    stated = int.from_bytes(_read(file, max(size - 4, 0), 4), "little")
    if nbytes is not None and stated != nbytes % 2**32:
        raise ValueError(f"it ends with the length {stated}, expected {nbytes}: it was cut off")


def _check_shard(file: FileIO, size: int, shard: list[int], settings: dict[str, Any]) -> None:
    """Compares the places in a shard's index, which is at its end and has a checksum."""
    plain = settings.get("index_codecs", _PLAIN_INDEX) == _PLAIN_INDEX
    if not plain or settings.get("index_location", "end") != "end":
        # No writer of Orbax's makes such an index, and where it ends is not known.
        if not size:
            raise ValueError("it is empty")
        return
    # 16 bytes for each chunk of the shard: its offset and its length.
    chunks = 1
    for whole, part in zip(shard, settings["chunk_shape"], strict=True):
        chunks *= -(-whole // part)  # rounded up
    length = 16 * chunks
    if size < length + 4:
        raise ValueError(f"it has {size} bytes, and its index alone needs {length + 4}")
    index = _read(file, size - length - 4, length + 4)
    if google_crc32c.value(index[:-4]) != int.from_bytes(index[-4:], "little"):
        raise ValueError("the index at its end is damaged, or was cut off")
    for at in range(0, length, 16):
        offset = int.from_bytes(index[at : at + 8], "little")
        count = int.from_bytes(index[at + 8 : at + 16], "little")
        if offset != _NO_CHUNK and offset + count > size - length - 4:
            raise ValueError(f"its index names byte {offset + count} of {size}")
