"""Bytes of an array as text in a rule book, and back: a constructor's own numbers (`op: init`)."""

import base64
import zlib


def packed(data: bytes) -> str:
    """Bytes as text for a rule book: compressed, in base64.

    Example:
      >>> unpacked(packed(b"12345678"))
      b'12345678'
    """
    return base64.b64encode(zlib.compress(data, 9)).decode()


def unpacked(text: str, limit: int | None = None) -> bytes:
    """The bytes of such text. Raises `ValueError` for what is none, or longer than `limit`."""
    # One byte more than is allowed tells data of the limit's length from longer data, and a text
    # that would unpack to gigabytes stops there.
    most = 0 if limit is None else limit + 1
    try:
        stream = zlib.decompressobj()
        data = stream.decompress(base64.b64decode(text, validate=True), most)
    except (ValueError, zlib.error) as error:
        raise ValueError(f"no packed bytes: {error}") from None
    is_longer = limit is not None and len(data) > limit
    if not stream.eof or stream.unused_data or is_longer:
        raise ValueError("packed bytes of another length")
    return data
