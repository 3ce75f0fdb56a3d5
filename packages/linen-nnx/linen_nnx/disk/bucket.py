"""One bucket: its objects listed, read, copied and written, by obstore.

obstore is one wheel without an event loop of ours, serves S3 and Google Cloud Storage alike, and
knows the two requests that everything here leans on: a put that fails where there is an object
already, and a copy that the server makes. Its import takes 0.04 s; that of s3fs takes 4 s.

Credentials and endpoints come from the environment, as obstore and the stores' own tools read it:

    s3    AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION,
          AWS_ENDPOINT_URL; else the role of the machine
    gs    GOOGLE_APPLICATION_CREDENTIALS, GOOGLE_SERVICE_ACCOUNT, GOOGLE_BASE_URL; else what
          `gcloud auth application-default login` has left; else the account of the machine

What the store raises becomes a `StoreError` of one sentence, or `FileNotFoundError`.
"""

import atexit
import errno
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

from linen_nnx.disk.checked import StoreError

_BLOCK = 8 << 20  # bytes in one piece of an object that is read whole
_PART = 8 << 20  # bytes in one part of an upload; a store takes 10,000 parts
_PARTS = 9_000
_AT_ONCE = 3  # parts of one upload under way, each in memory
# Six tries take about ten seconds; with obstore's own ten a missing key takes a minute to show.
_RETRIES: dict[str, Any] = {"max_retries": 6, "retry_timeout": timedelta(minutes=2)}
# Of one request, from its beginning to its last byte: a server copies gigabytes in that time.
# obstore's own 30 s would end the copy of a large data file.
_TIMEOUT = timedelta(minutes=10)
_INSTALL = "pip install 'linen-nnx[buckets]'"
_SHOWN = 200  # characters of an error of the store's that a message repeats

# What says where credentials are, or that the machine itself has none.
_KEYS = {
    "s3": (
        "AWS_ACCESS_KEY_ID",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
        "AWS_SKIP_SIGNATURE",
    ),
    "gs": (
        "GOOGLE_APPLICATION_CREDENTIALS",
        "GOOGLE_SERVICE_ACCOUNT",
        "GOOGLE_SERVICE_ACCOUNT_PATH",
        "GOOGLE_SERVICE_ACCOUNT_KEY",
        "GOOGLE_BEARER_TOKEN",
        "GOOGLE_SKIP_SIGNATURE",
    ),
}
_NO_MACHINE = {"s3": "AWS_EC2_METADATA_DISABLED", "gs": "NO_GCE_CHECK"}
_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
}
_HINTS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (of a profile: `aws configure "
    "export-credentials --format env`), or AWS_SKIP_SIGNATURE=true for a public bucket",
    "gs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS to "
    "a key's file, or GOOGLE_SKIP_SIGNATURE=true for a public bucket",
}


class Entry(NamedTuple):
    """What a bucket has under a name, in the words of `os.stat`."""

    is_folder: bool
    st_size: int = 0
    st_mtime_ns: int = 0


_FOLDER = Entry(is_folder=True)


class Bucket:
    """The objects of one bucket. What was listed is kept until it is looked at again.

    A key is an object's whole name, as `runs/1/state/_METADATA`. "Folder" is said of a name that
    others begin with and a slash: a bucket has no folders, and so none that is empty.
    """

    def __init__(self, scheme: str, name: str, store: Any = None) -> None:
        """`store` is an obstore store; by default the one that scheme and name mean."""
        # The store itself is made when it is first asked: naming a bucket takes no credentials.
        self.scheme, self.name = scheme, name
        if store is not None:
            self.store = store
        self._children: dict[str, dict[str, Entry]] = {}
        """What lies directly below each key that was listed."""
        self._roots: set[str] = set()
        """The keys that a user named: below them listing is allowed, above perhaps not."""
        self._whole: set[str] = set()
        """The keys below which everything was listed."""
        self._copies: dict[str, Path] = {}
        self._copying = threading.Lock()

    def url(self, key: str) -> str:
        """The name of an object as a person writes it."""
        return f"{self.scheme}://{self.name}/{key}".rstrip("/")

    @cached_property
    def store(self) -> Any:
        """The obstore store. Raises `StoreError` without obstore, or without credentials."""
        return _open(self.scheme, self.name)

    def missing(self, key: str) -> FileNotFoundError:
        """The error for an object that is not there."""
        return FileNotFoundError(errno.ENOENT, "there is no such object", self.url(key))

    # Listing.

    def look_again(self, key: str) -> None:
        """Forgets what is known of an object and of all below it, which a user has named."""
        self._roots.add(key)
        # Both what lies below it and what was listed from above it.
        for one in list(self._whole):
            if _is_at(one, key) or _is_at(key, one):
                self._whole.remove(one)
        # The folder above says whether there is such an object at all.
        above = key.rpartition("/")[0]
        for one in list(self._children):
            if _is_at(one, key) or one == above:
                del self._children[one]
        for one in list(self._copies):
            if _is_at(one, key):
                del self._copies[one]

    def look_below(self, key: str) -> None:
        """Lists everything below a key, by a request for each thousand objects."""
        if self._is_known(key):
            return
        # "a/b/c" of the key "a" is the folder `b` below "a", and the object `c` below "a/b".
        found: dict[str, dict[str, Entry]] = {key: {}}
        for entry in self.list_below(key):
            *folders, name = _below(entry["path"], key).split("/")
            here = key
            for folder in folders:
                # Where an object has the name of a folder, it is the folder that is meant.
                found[here][folder] = _FOLDER
                here = f"{here}/{folder}".lstrip("/")
                found.setdefault(here, {})
            found[here].setdefault(name, _entry(entry))
        self._children |= found
        self._whole.add(key)

    def list_below(self, key: str) -> Iterator[Any]:
        """What obstore says of each object whose name begins with a key and a slash."""
        with self._told(key):
            for some in _obstore().list(self.store, key or None):
                for entry in some:
                    # The mark that consoles leave for an empty folder has the folder's own name.
                    if entry["path"] != key:
                        yield entry

    def children(self, key: str) -> Mapping[str, Entry]:
        """What lies directly below a key, by name; nothing if nothing does."""
        if key in self._children:
            return self._children[key]
        if self._is_known(key):
            return {}
        with self._told(key):
            listed = _obstore().list_with_delimiter(self.store, key or None)
        found: dict[str, Entry] = {}
        for one in listed["objects"]:
            # As in `list_below`, the mark of an empty folder is none of its objects.
            if one["path"] != key:
                found[one["path"].rpartition("/")[2]] = _entry(one)
        # After the objects: where an object has the name of a folder, it is the folder that counts.
        for prefix in listed["common_prefixes"]:
            found[prefix.rpartition("/")[2]] = _FOLDER
        self._children[key] = found
        return found

    def find(self, key: str) -> Entry | None:
        """What there is under a key; None if nothing is."""
        if not key:
            return _FOLDER
        # One list of the folder above answers for all that lie in it. Above what a user has named
        # an account may not be allowed to list: there it is asked for the object itself.
        above, _, name = key.rpartition("/")
        may_list = any(_is_at(above, root) for root in self._roots)
        if may_list or above in self._children or self._is_known(above):
            return self.children(above).get(name)
        if self.children(key):
            return _FOLDER
        try:
            with self._told(key):
                return _entry(_obstore().head(self.store, key))
        except FileNotFoundError:
            return None

    def _is_known(self, key: str) -> bool:
        """Whether everything below a key was listed."""
        return any(_is_at(key, one) for one in self._whole)

    # Reading.

    def read(self, key: str) -> bytes:
        """All bytes of an object."""
        with self._told(key):
            return bytes(_obstore().get(self.store, key).bytes())

    def read_version(self, key: str) -> tuple[bytes, dict[str, str]]:
        """All bytes of an object, and its version, which `replace` takes."""
        with self._told(key):
            found = _obstore().get(self.store, key)
            return bytes(found.bytes()), version_of(found.meta)

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Some bytes of an object, which has them."""
        with self._told(key):
            return bytes(_obstore().get_range(self.store, key, start=start, length=length))

    def blocks(self, key: str) -> Iterator[Any]:
        """All bytes of an object, piece by piece."""
        found = self.find(key)
        if found is None:
            raise self.missing(key)
        # A request for each piece: one for the whole would have to end before the timeout, and
        # would begin anew where the connection is lost.
        for start in range(0, found.st_size, _BLOCK):
            yield self.read_range(key, start, min(_BLOCK, found.st_size - start))

    def local(self, key: str) -> Path:
        """A copy of an object on this machine, which is made once and gone when the process ends.

        Formats that are one file (npz, msgpack, safetensors) are read at many places.
        """
        with self._copying:
            if key not in self._copies:
                # The name is kept, as suffixes say what a file is.
                path = Path(tempfile.mkdtemp(dir=_scratch()), key.rpartition("/")[2])
                with path.open("xb") as file:
                    for block in self.blocks(key):
                        file.write(block)
                self._copies[key] = path
            return self._copies[key]

    # Writing.

    def create(self, key: str, content: bytes) -> dict[str, str]:
        """Puts a new object, and returns its version. Raises `FileExistsError` if there is one."""
        return self._put(key, content, "create")

    def replace(self, key: str, content: bytes, version: Mapping[str, str]) -> dict[str, str]:
        """Puts an object in place of the version that was read. Raises `FileExistsError` if
        another has come between."""
        return self._put(key, content, dict(version))

    def _put(self, key: str, content: bytes, mode: Any) -> dict[str, str]:
        with self._told(key):
            return version_of(
                _obstore().put(self.store, key, content, mode=mode, use_multipart=False)
            )

    def upload(self, key: str, blocks: Iterable[Any], size: int) -> None:
        """Puts an object of any size, piece by piece; it is there when all of it is.

        Stores know no condition for such an upload, so it may replace an object: write only where
        you have made sure that there is none.
        """
        part = max(_PART, -(-size // _PARTS))
        with self._told(key):
            # Not `put` with an iterator: what that iterates over may not ask a store for anything.
            writer = _obstore().open_writer(
                self.store, key, buffer_size=part, max_concurrency=_AT_ONCE
            )
            for block in blocks:
                writer.write(block)
            writer.close()  # after an error there is no object, as its parts are not joined

    def copy(self, old: str, new: str) -> None:
        """Lets the server copy an object: no byte of it comes here."""
        # Not `overwrite=False`: S3 knows no such copy. The prefix is claimed, and was empty.
        with self._told(old):
            _obstore().copy(self.store, old, new)

    def remove_below(self, key: str) -> None:
        """Deletes an object, and all whose names begin with its name and a slash."""
        self.remove(entry["path"] for entry in self.list_below(key))
        self.remove([key])

    def is_empty(self, key: str) -> bool:
        """Whether there is no object of that name, nor any below it; asked anew each time."""
        if any(True for _ in self.list_below(key)):
            return False
        try:
            with self._told(key):
                _obstore().head(self.store, key)
        except FileNotFoundError:
            return True
        return False

    def remove(self, keys: Iterable[str]) -> None:
        """Deletes objects; those that are not there do no harm."""
        names = list(keys)
        if names:  # an empty list is a request that stores refuse
            with self._told(names[0]), suppress(FileNotFoundError):
                _obstore().delete(self.store, names)

    @contextmanager
    def _told(self, key: str) -> Iterator[None]:
        """Turns what the store raises into an error that names the object and says what to do."""
        exceptions = _obstore().exceptions
        url = self.url(key)
        try:
            yield
        except FileNotFoundError:
            raise self.missing(key) from None
        except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
            raise FileExistsError(errno.EEXIST, "there is an object already", url) from None
        except (exceptions.BaseError, ValueError) as error:
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"{url}: {_reason(str(error), self.scheme)}") from None


def version_of(said: Mapping[str, Any]) -> dict[str, str]:
    """What tells a version of an object: its tag (s3), or its generation as well (gs)."""
    return {name: said[name] for name in ("e_tag", "version") if said.get(name) is not None}


def _reason(text: str, scheme: str) -> str:
    """What went wrong, out of a store's error, which is long and holds addresses."""
    # Where no key is named, obstore asks the machine's own account, at an address of every cloud.
    if "169.254." in text or "metadata.google" in text:
        return f"no credentials were found: {_HINTS[scheme]}"
    if re.search("PermanentRedirect|AuthorizationHeaderMalformed|configured region", text):
        return "the bucket lies in another region: set AWS_REGION to that"
    # Of every kind of network trouble the library says no more than this, after its retries.
    if "error sending request" in text:
        where = re.search(r"https?://[^/\s]+", text)
        named = "".join([f", or to {name}" for name in _ENDPOINTS[scheme] if os.environ.get(name)])
        at = f" at {where[0]}" if where is not None else ""
        return f"the store cannot be reached{at}: see to the network{named}"
    code = re.search(r"<Code>(\w+)</Code>", text)
    if code is not None and code[1] == "NoSuchBucket":
        return "there is no such bucket"
    status = re.search(r"status code: (\d+ [\w ]+)", text)
    if code is not None or status is not None:
        what = ", ".join(match[1].strip() for match in (status, code) if match is not None)
        denied = status is not None and status[1].startswith(("401", "403"))
        return f"the store says {what}" + (f". Check the credentials: {_HINTS[scheme]}" * denied)
    # Behind the sentence stands the error once more, as Rust shows its structure.
    text = re.sub(r"^Generic \w+ error: ", "", text.partition("Debug source:")[0].strip())
    if text.startswith("Missing "):
        return f"{text}: {_HINTS[scheme]}"
    return text if len(text) <= _SHOWN else f"...{text[-_SHOWN:]}"


def _entry(said: Mapping[str, Any]) -> Entry:
    when = said["last_modified"]
    # Whole microseconds, as a float holds no nanoseconds of today.
    return Entry(False, said["size"], int(when.timestamp() * 1_000_000) * 1000)


def _is_at(key: str, root: str) -> bool:
    """Whether a key is another, or lies below it."""
    return not root or key == root or key.startswith(f"{root}/")


def _below(path: str, key: str) -> str:
    """A whole name without the key above it."""
    return path[len(key) + 1 :] if key else path


_KNOWN: dict[tuple[str, str], Bucket] = {}


def bucket_of(scheme: str, name: str) -> Bucket:
    """The bucket of a name: there is one object for each, which keeps what was listed."""
    if (scheme, name) not in _KNOWN:
        _KNOWN[scheme, name] = Bucket(scheme, name)
    return _KNOWN[scheme, name]


def use_store(scheme: str, name: str, store: Any) -> None:
    """Lets a bucket be an obstore store that was made elsewhere, with credentials of any kind.

    Example:
      >>> from obstore.store import MemoryStore
      >>> from linen_nnx.disk.remote import as_path
      >>> use_store("s3", "in-memory", MemoryStore())
      >>> as_path("s3://in-memory/runs").exists()
      False
    """
    _KNOWN[scheme, name] = Bucket(scheme, name, store)


def _obstore() -> Any:
    """The library, which only those need who name a bucket."""
    try:
        import obstore.exceptions
        import obstore.store
    except ImportError:
        raise StoreError(f"buckets need obstore, which is not installed: {_INSTALL}") from None
    return obstore


def _open(scheme: str, name: str) -> Any:
    """The store of a bucket. Nothing is asked of it yet."""
    store = _obstore().store
    if _has_no_key(scheme):
        raise StoreError(f"{scheme}://{name}: no credentials were found: {_HINTS[scheme]}")
    endpoint = _endpoint(scheme)
    # Who names an endpoint without TLS wants none; by itself obstore refuses it.
    client: Any = {"allow_http": endpoint.startswith("http://"), "timeout": _TIMEOUT}
    options: dict[str, Any] = {"client_options": client, "retry_config": _RETRIES}
    try:
        if scheme == "s3":
            config = {"endpoint": endpoint} if endpoint else {}
            return store.S3Store(name, config=config, **options)
        config = {"base_url": endpoint} if endpoint else {}
        return store.GCSStore(name, config=config, **options)
    except Exception as error:  # of whatever the environment holds
        raise StoreError(f"{scheme}://{name}: {_reason(str(error), scheme)}") from None


def _endpoint(scheme: str) -> str:
    """The endpoint that the environment names; nothing where it names none."""
    for name in _ENDPOINTS[scheme]:
        found = os.environ.get(name, "")
        # With anything else obstore ends the process, in the first request.
        if found and not re.match(r"https?://[^/\s]", found):
            raise StoreError(f"{name} is {found!r}: expected http://HOST:PORT or https://HOST")
        if found:
            return found
    return ""


def _has_no_key(scheme: str) -> bool:
    """Whether the environment says that the machine has no account, and no other is named."""
    if any(os.environ.get(name) for name in _KEYS[scheme]):
        return False
    login = Path("~/.config/gcloud/application_default_credentials.json").expanduser()
    if scheme == "gs" and login.is_file():
        return False
    return os.environ.get(_NO_MACHINE[scheme], "").lower() == "true"


@cache
def _scratch() -> str:
    """A folder for copies of objects, removed when the process ends."""
    folder = tempfile.mkdtemp(prefix="linen-nnx-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
