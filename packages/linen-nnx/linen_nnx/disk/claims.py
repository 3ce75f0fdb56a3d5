"""Who may write a target in a bucket, where there is no lock and no rename.

    gs://bucket/runs/.nnx.converting      made by a put that fails where there is one already
    gs://bucket/runs/nnx/...              the result, which is complete when its marks are there

The object beside the target says which process writes, and is renewed every few seconds. Of two
conversions to one target one gets it, and the other is told. A process that was killed renews no
more: the next one sees that, takes the claim over, and clears away what was left below the target.
Every renewal replaces exactly the version that was written before, so that a process which was
taken for dead, and was not, learns of it.

The prefix is listed between the two states of a claim, so that nothing is ever cleared away that
had been there before:

    claimed    the prefix is not known to be empty: take the claim over, and look
    writing    it was empty: whatever lies there now, the conversion has written
"""

import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from linen_nnx.book.reading import parse_json
from linen_nnx.disk.checked import StoreError
from linen_nnx.disk.remote import Remote
from linen_nnx.disk.transaction import TargetError

_MADE_BY = "linen-nnx"
_BEAT = 10.0  # seconds between renewals
_LEASE = 60.0  # seconds without one, after which a process of another machine is taken for dead
_POLL = 2.0  # seconds between two looks at another's claim
_TRIES = 10  # at a claim that others make and remove: each try needs another one that ended
_LIVE: set[str] = set()
"""The claims of this process whose conversions have not ended."""


class Claim:
    """The right to write one target. `claim` makes it."""

    def __init__(self, out: Remote, progress: Callable[[str], None]) -> None:
        self.out, self._progress = out, progress
        self._bucket, self._key = out.bucket, claim_of(out).key
        # For the person who finds it, and for the process that asks whether this one still runs.
        self._said: dict[str, Any] = {
            "made_by": _MADE_BY,
            "what": "A conversion is being written here, or was and did not end.",
            "target": str(out),
            "id": uuid.uuid4().hex,
            "machine": _machine(),
            "process": os.getpid(),
            "started": _started(os.getpid()),
        }
        self._state, self._count = "claimed", 0
        self._version: dict[str, str] = {}
        self._lost = False
        self._guard = threading.Lock()
        self._ended = threading.Event()
        # A daemon: after an error that nobody expected it must not keep the process.
        self._beating = threading.Thread(target=self._beat, daemon=True)

    def take(self) -> None:
        """Gets the target, or raises `TargetError`: it is another's, or something is there."""
        self._get()
        _LIVE.add(self._said["id"])
        # Before anything else: clearing away what another has left may take minutes.
        self._beating.start()
        is_left = self._state == "writing"
        try:
            if is_left:
                self._progress("clearing away what a killed conversion left")
                self._bucket.remove_below(self.out.key)
                is_left = False
            elif not self._bucket.is_empty(self.out.key):
                raise TargetError(f"{self.out} was made by another process meanwhile")
            # Only from here on is whatever lies below the target this conversion's own.
            self._state = "writing"
            self.confirm()
        except BaseException:
            self._stop()
            # What could not be cleared away is still to be: that claim stays.
            if not (is_left or self._lost):
                with suppress(StoreError, OSError):
                    self._bucket.remove([self._key])
            raise

    def _get(self) -> None:
        """Makes the claim, or takes over that of a process which has died."""
        for _ in range(_TRIES):
            with suppress(FileExistsError):
                self._version = self._bucket.create(self._key, self._content())
                return
            try:
                content, version = self._bucket.read_version(self._key)
            except FileNotFoundError:
                continue  # its conversion has just ended
            found = self._read(content)
            if found.get("id") == self._said["id"]:
                # The answer to the first try was lost, and obstore has asked once more.
                self._version = version
                return
            if self._is_alive(found, version):
                raise TargetError(f"another conversion is writing {self.out} now")
            self._state = "writing" if found.get("state") == "writing" else "claimed"
            # Another may be doing the same: one of the two finds the version that it has read.
            with suppress(FileExistsError):
                self._version = self._bucket.replace(self._key, self._content(), version)
                return
            self._state = "claimed"
        raise TargetError(f"other conversions are writing {self.out} now")

    def _content(self) -> bytes:
        # The count makes each renewal another version: the tag of an object is a hash of it.
        self._count += 1
        return json.dumps({**self._said, "state": self._state, "renewed": self._count}).encode()

    def _read(self, content: bytes) -> dict[str, Any]:
        """What a claim says. Raises `TargetError` for an object that is none."""
        try:
            found = parse_json(content)
        except ValueError:
            found = None
        if not isinstance(found, dict) or found.get("made_by") != _MADE_BY:
            name = self._bucket.url(self._key)
            raise TargetError(f"{name} is in the way, and no claim of a conversion: move it")
        return found

    def _is_alive(self, found: dict[str, Any], version: dict[str, str]) -> bool:
        """Whether the process that holds a claim still runs."""
        if found.get("machine") == _machine():
            if found.get("process") == os.getpid():
                # One that ended while the bucket could not be reached is still named there.
                return found.get("id") in _LIVE
            return found.get("started") == _started(found.get("process"))
        # Clocks of two machines differ; whether a version changes, both see alike.
        until = time.monotonic() + _LEASE
        while time.monotonic() < until:
            left = until - time.monotonic()
            self._progress(f"waiting {left:.0f} s for a sign of the conversion that has {self.out}")
            time.sleep(_POLL)
            try:
                if self._bucket.read_version(self._key)[1] != version:
                    return True
            except FileNotFoundError:
                return False
        return False

    def confirm(self) -> None:
        """Renews the claim. Raises `TargetError` if another process has taken it over."""
        with self._guard:
            if not self._lost:
                try:
                    content = self._content()
                    self._version = self._bucket.replace(self._key, content, self._version)
                except FileExistsError:
                    self._lost = not self._is_ours()
            if self._lost:
                raise TargetError(
                    f"{self.out}: this conversion stood still for so long that another one has "
                    "taken its place, and writes there now"
                )

    def _is_ours(self) -> bool:
        """Whether the claim is this one, renewed by a try whose answer was lost."""
        try:
            content, version = self._bucket.read_version(self._key)
        except FileNotFoundError:
            return False
        self._version = version
        return self._read(content).get("id") == self._said["id"]

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT):
            # Without a network for some seconds, the next renewal may be in time.
            with suppress(TargetError, StoreError, OSError):
                self.confirm()

    def _stop(self) -> None:
        """Ends the renewals: none may come behind the removal of the claim."""
        self._ended.set()
        self._beating.join()
        _LIVE.discard(self._said["id"])

    def end(self, clear: bool) -> None:
        """Gives the target free; `clear` deletes first what lies there, as it is not complete."""
        self._stop()
        if self._lost:
            return  # both the claim and what lies there are another's
        if clear:
            self._bucket.remove_below(self.out.key)
        self._bucket.remove([self._key])


@contextmanager
def claim(out: Remote, progress: Callable[[str], None]) -> Iterator[Claim]:
    """The right to write `out`, where nothing is; at an error nothing is left there.

    Raises:
      TargetError: while another conversion writes there, or if something is there.
    """
    made = Claim(out, progress)
    made.take()
    try:
        yield made
    except BaseException:
        # If the bucket cannot be reached, the next conversion clears what this one leaves.
        with suppress(StoreError, OSError):
            made.end(clear=True)
        raise
    made.end(clear=False)


def claim_of(out: Remote) -> Remote:
    """The object that says who writes a target."""
    return out.parent / f".{out.name}.converting"


def end_dead_claim(out: Remote) -> None:
    """Removes the claim on a target that is complete, if its process of this machine has died."""
    # Another machine's is left alone: nobody waits a minute for what is complete anyway.
    key = claim_of(out).key
    with suppress(FileNotFoundError, ValueError):
        found = parse_json(out.bucket.read(key))
        here = isinstance(found, dict) and found.get("machine") == _machine()
        if here and found.get("started") != _started(found.get("process")):
            out.bucket.remove([key])


def _machine() -> str:
    """What tells this machine, and on it this group of process numbers, from all others.

    A container has process numbers of its own: another's with the same host name are not ours.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux: every process is another machine's, and is waited for
        return uuid.uuid4().hex


def _started(process: Any) -> str | None:
    """When a process of this machine began, which its number alone does not tell; None if none."""
    try:
        text = Path(f"/proc/{int(process)}/stat").read_text()
    except (OSError, ValueError, TypeError):
        return None
    # The name stands in parentheses and may hold anything; the 22nd field is the start.
    state, *rest = text.rpartition(")")[2].split()
    return None if state == "Z" else rest[18]
