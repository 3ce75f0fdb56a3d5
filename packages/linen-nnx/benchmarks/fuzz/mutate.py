"""Damages bytes and values in the ways that break readers: one seed, one damage.

Each function takes a random generator and what is to be damaged, and returns it damaged. Bytes that
have a checksum or are compressed are damaged below it, so that the damage gets past the first test.
"""

import copy
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

_BIG = (2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**64, 10**30, -(2**63))
_ODD = (
    None, True, False, 0, 1, -1, 7, 255, *_BIG, 0.5, float("nan"), float("inf"), 1e308,
    "", ".", "..", "a/b", "\0", "\ud800", "é", "x" * 5000, "../../etc/passwd", "params", "value",
    [], {}, [[]], [-1], [2**62, 2**62], {"": ""}, [None], ["params"], {"a": {"b": 1}},
)  # fmt: skip
_LONG = 100_000  # of a nesting, or of a text, that is to be too long


Replacement = Callable[[Path], object]
"""What puts something else in the place of a file that was there."""


def strange(random: Random, data: bytes) -> Replacement:
    """No file, or something that is none; now and then a sparse file of a terabyte."""
    return random.choice((_nothing, os.mkfifo, os.mkdir, _device, _loop, _sparse))


def _nothing(path: Path) -> None:
    """A file that was lost."""


def _device(path: Path) -> None:
    path.symlink_to(f"/dev/{'zero' if len(path.name) % 2 else 'null'}")


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


def bytes_(random: Random, data: bytes) -> bytes:
    """Bytes with a few places changed, cut, repeated or filled."""
    content = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 5))):
        at = random.randrange(len(content) + 1)
        length = random.choice((1, 2, 4, 8, 64))
        match random.randrange(8):
            case 0 if at < len(content):
                content[at] ^= 1 << random.randrange(8)
            case 1:
                content[at : at + length] = random.randbytes(length)
            case 2:
                del content[at:]
            case 3:
                del content[at : at + length]
            case 4:
                content[at:at] = content[at : at + length] * random.choice((1, 3, 1000))
            case 5:
                content[at : at + length] = random.choice((b"\0", b"\xff", b"\x80")) * length
            case 6:
                number = random.choice(_BIG) % 2**64
                content[at : at + 8] = struct.pack(random.choice("<>") + "Q", number)
            case _:
                content[at:at] = random.randbytes(length)
    return bytes(content)


def value(random: Random, content: Any) -> Any:
    """A JSON value in which one node is another, is gone, has another name, or is there twice."""
    places = list(_places(content))
    if not places:
        return random.choice(_ODD)
    holder, key = random.choice(places)
    match random.randrange(6):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[random.choice([odd for odd in _ODD if isinstance(odd, str)])] = holder.pop(key)
        case 2 if isinstance(holder, list):
            holder.append(holder[key])
        case 3:
            other, there = random.choice(places)
            holder[key] = copy.deepcopy(other[there])  # which may hold the place itself
        case _:
            holder[key] = random.choice(_ODD)
    return content


def _places(content: Any) -> list[tuple[Any, Any]]:
    """Every place in a value, as what holds it and its key."""
    places, waiting = [], [content]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (dict, list)):
            keys = list(node) if isinstance(node, dict) else range(len(node))
            places += [(node, key) for key in keys]
            waiting += [node[key] for key in keys]
    return places


def json_(random: Random, data: bytes) -> bytes:
    """JSON that is well-formed and says something else; now and then, too deep or too long."""
    match random.randrange(30):
        case 0:
            return b"[" * _LONG
        case 1:
            return b'{"a":' * _LONG
        case 2:
            return b"9" * _LONG
    content = value(random, json.loads(data))
    if random.randrange(3) == 0:
        content = value(random, content)
    return json.dumps(content).encode()


def text(random: Random, data: bytes) -> bytes:
    """Text with a line or a sign moved, repeated or replaced, as YAML has them."""
    lines = data.decode().split("\n")
    at = random.randrange(len(lines))
    signs = ("&a ", "*a", "!!int ", "- ", "? ", "{", "}", "[", "]", ": ", "'", '"', "\t", "%", "|")
    match random.randrange(6):
        case 0:
            lines[at:at] = [lines[at]] * random.choice((1, 2, 500))
        case 1:
            del lines[at]
        case 2:
            lines[at] = random.choice(("[", "{a: ", "- ", "? ")) * random.choice((3, 50, _LONG))
        case 3:
            names = [
                f"{name}: &{name} [*{before}, *{before}, *{before}, *{before}]"
                for before, name in zip("abcdefghijklmnop", "bcdefghijklmnopq", strict=True)
            ]
            lines = ["a: &a [x]", *names[: random.randrange(17)]]
        case _:
            place = random.randrange(len(lines[at]) + 1)
            word = str(random.choice(_ODD)).encode(errors="replace").decode()
            odd = random.choice((*signs, word))
            lines[at] = lines[at][:place] + odd + lines[at][place + random.randrange(3) :]
    return "\n".join(lines).encode()
