"""Results in buckets: claimed, copied by the server, and complete once their marks are there.

A bucket can neither lock nor rename. So the order of the puts is what makes a result absent or
complete, and Orbax reads it the same way, for it saves to buckets like that itself:

    1. the claim beside the target            nobody else writes here
    2. data files, copied by the server       no byte of them comes to this machine
    3. side files, rule book, report, digests
    4. manifest.ocdbt, then _METADATA         from here on it looks like a checkpoint
    5. commit_success.txt of each item, then of the step
    6. the claim is removed

Orbax takes nothing for a checkpoint before 5; this library takes nothing for one while a claim is
there and a mark is missing.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from linen_nnx.disk.claims import Claim, claim, claim_of, end_dead_claim
from linen_nnx.disk.complete import files_below
from linen_nnx.disk.conversion import Conversion
from linen_nnx.disk.digests import Digest, hash_file
from linen_nnx.disk.ocdbt import MANIFEST
from linen_nnx.disk.placing import Placer
from linen_nnx.disk.remote import Remote
from linen_nnx.disk.runs import Runs
from linen_nnx.disk.steps import COMMITTED
from linen_nnx.disk.targets import SPARE, refuse_inside
from linen_nnx.disk.transaction import TargetError, workspace
from linen_nnx.disk.transfers import copy_file, upload

_AT_ONCE = 16  # copies by the server, and small puts: most of each is waiting
_UPLOADS = 2  # of large files, each of which holds some parts of 8 MB in memory
_SMALL = 4 << 20  # bytes of a file that is put in one request, which must find no object there
_MOST_COPIED = 5 << 30  # bytes that one request to S3 copies
_LAST = (MANIFEST, "_METADATA", COMMITTED)  # in this order, behind all else


class BucketPlacer(Placer):
    """Puts the files of a source in place below a claimed prefix, by the server where it can."""

    def __init__(
        self, out: Remote, partial: Path, digest: bool, progress: Callable[[str], None]
    ) -> None:
        super().__init__(False, digest, progress, threads=_UPLOADS)
        self._out, self._partial = out, partial
        self._copiers = ThreadPoolExecutor(_AT_ONCE)
        self._copying: list[Future[None]] = []
        self.streamed: set[Path] = set()
        """What went through this machine, of another bucket or too large for one request."""

    def place(self, source: Path, target: Path) -> None:
        """Makes the object that the path `target` below `partial` stands for."""
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.name == COMMITTED:
            copy_file(source, target)  # is put at the end, with the others
            return
        self.placed[target] = source
        goal = self.goal(target)
        # From a disk, from another bucket, or too large for one request: through this machine.
        if not isinstance(source, Remote) or not self._is_copied(source):
            if isinstance(source, Remote):
                self.streamed.add(target)
            self._working[target] = self._pool.submit(upload, source, goal, self._has_stopped)
            return
        self.unread.add(target)
        # One of the server's own requests, which takes it a second for some hundred megabytes.
        self._copying.append(self._copiers.submit(source.bucket.copy, source.key, goal.key))
        if self.hash_links:
            self._working[target] = self._pool.submit(hash_file, source)

    def goal(self, target: Path) -> Remote:
        """The object that a path below `partial` stands for."""
        return self._out / target.relative_to(self._partial)

    def _is_copied(self, source: Remote) -> bool:
        """Whether the server can copy an object to the target in one request."""
        if source.bucket is not self._out.bucket:
            return False
        return source.scheme != "s3" or source.stat().st_size <= _MOST_COPIED

    def finish(self) -> dict[Path, Digest]:
        # The first that has failed ends the conversion; `__exit__` waits for those under way.
        for number, copied in enumerate(self._copying, start=1):
            self.progress(f"copying files in the bucket: {number} of {len(self._copying)}")
            copied.result()
        return super().finish()

    def put(self, files: Iterable[Path]) -> None:
        """Puts files of this machine, and returns when all are there."""
        working: list[Future[None]] = []
        for file in files:
            # A tree and side files are small. Streamed leaves lie in files of any size.
            if file.stat().st_size <= _SMALL:
                working.append(self._copiers.submit(self._create, file))
            else:
                working.append(self._pool.submit(self._upload, file))
        for one in working:
            one.result()

    def _create(self, file: Path) -> None:
        goal, content = self.goal(file), file.read_bytes()
        try:
            goal.bucket.create(goal.key, content)
        except FileExistsError:
            # The answer to a first try may have been lost, and obstore has asked once more.
            if goal.bucket.read(goal.key) != content:
                raise TargetError(f"{goal} was made by another process meanwhile") from None

    def _upload(self, file: Path) -> None:
        upload(file, self.goal(file), self._has_stopped)

    def __exit__(self, *arguments: object) -> None:
        super().__exit__(*arguments)
        self._copiers.shutdown(cancel_futures=True)


class InBucket:
    """A prefix of a bucket, or one object."""

    def __init__(
        self, out: Remote, link: bool, digest: bool, progress: Callable[[str], None]
    ) -> None:
        if not out.key:
            raise TargetError(f"{out} is a whole bucket: name a path in it")
        self._out, self._link, self._digest, self._progress = out, link, digest, progress
        self._claim: Claim | None = None
        self.notes: list[str] = []

    def is_there(self, relatives: Iterable[str]) -> bool:
        if not self._out.exists():
            return False
        if not claim_of(self._out).exists():
            return True
        if self._out.is_file():
            return True  # one put: it is complete
        # Another conversion may still be writing, or was killed: then nobody reads it yet.
        return all((self._out / relative / COMMITTED).is_file() for relative in relatives)

    def check(self, path: Path, conversions: Sequence[Conversion], runs: Runs) -> None:
        refuse_inside(self._out, path, conversions)
        # What the server copies, and what passes through, takes no room here.
        needed = SPARE
        for conversion in conversions:
            needed += sum(item.bytes_streamed for item in conversion.with_beside)
        scratch = tempfile.gettempdir()
        free = shutil.disk_usage(scratch).free
        if free < needed:
            raise TargetError(
                f"{scratch} has {free / 1e9:.2f} GB free, and what the conversion makes anew takes "
                f"{needed / 1e9:.2f} GB there on its way: make room, or set TMPDIR"
            )

    @contextmanager
    def writing(self) -> Iterator[tuple[Path, Placer]]:
        # The same name each time, so that the next conversion clears away what a killed one left.
        name = hashlib.sha256(str(self._out).encode()).hexdigest()[:16]
        scratch = Path(tempfile.gettempdir(), f"linen-nnx-{os.getuid()}-{name}{self._out.suffix}")
        with (
            claim(self._out, self._progress) as self._claim,
            workspace(scratch) as partial,
            BucketPlacer(self._out, partial, self._digest, self._progress) as placer,
        ):
            if self._link:
                placer.fell_back = f"a bucket has none: {self._out}"
            yield partial, placer

    def finish_checkpoint(self, folder: Path, is_step: bool) -> None:
        """Adds the marks that Orbax looks for, in each item and in the step that they make up."""
        # Every folder of a step is an item, also those that were carried along.
        marked = [folder]
        if is_step:
            marked += [child for child in folder.iterdir() if child.is_dir()]
        for one in marked:
            # Now, and not when it is put: the digests cover it.
            mark = one / COMMITTED
            if not mark.exists():
                mark.write_text(f"Checkpoint commit was successful to {self._out}\n")

    def publish(self, partial: Path, placer: Placer) -> None:
        assert isinstance(placer, BucketPlacer) and self._claim is not None
        self._progress("putting the side files")
        files = files_below(partial) if partial.is_dir() else [partial]
        last: dict[str, list[Path]] = {name: [] for name in _LAST}
        placer.put([file for file in files if file.name not in last])
        for file in files:
            if file.name in last:
                last[file.name].append(file)
        # From here on it looks like a checkpoint: nobody may have taken the target over.
        self._claim.confirm()
        for name in _LAST[:-1]:
            placer.put(last[name])
        # The deepest first: a step is complete when all of its items are.
        for mark in sorted(last[COMMITTED], key=lambda file: -len(file.parts)):
            placer.put([mark])
        self._say_how(placer, is_file=not partial.is_dir())

    def _say_how(self, placer: BucketPlacer, is_file: bool) -> None:
        if placer.streamed:
            self.notes.append(
                f"through this machine went {len(placer.streamed)} of the data files: the server "
                "copies within one bucket"
            )
        if self._out.scheme == "s3" and not is_file:
            self.notes.append(
                "Orbax opens no s3:// path: copy the result to a disk, or to gs://, to restore it"
            )

    def left_over(self) -> None:
        end_dead_claim(self._out)
