"""A stand-in for Google Cloud Storage's XML interface, in as much as obstore asks of it.

Written after https://cloud.google.com/storage/docs/xml-api/reference-methods, as no emulator speaks
it. What it shows is which requests are made and that they do together what is wanted; that Google
answers them so, its documentation says.
"""

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

_WHEN = "2026-01-01T00:00:00.000Z"
_NOT_THERE = b"<Error><Code>NoSuchKey</Code></Error>"
_CONDITION = b"<Error><Code>PreconditionFailed</Code></Error>"


class GcsDouble:
    """Objects by bucket and key, each with its generation; `with` serves them."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.requests: list[str] = []
        self._uploads: dict[str, dict[int, bytes]] = {}
        self._generation = 0
        self._lock = threading.Lock()

    def __enter__(self) -> "GcsDouble":
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self) -> dict[str, str]:
        url = f"http://127.0.0.1:{self._server.server_port}"
        return {"GOOGLE_BASE_URL": url, "GOOGLE_BEARER_TOKEN": "test", "NO_GCE_CHECK": "true"}

    def answer(self, method: str, path: str, headers: Any, body: bytes) -> tuple[int, bytes, int]:
        """Status, body, and the generation of the object."""
        name = unquote(urlsplit(path).path).lstrip("/")
        query = {key: one[0] for key, one in parse_qs(urlsplit(path).query, True).items()}
        with self._lock:
            self.requests.append(f"{method} {name}")
            if "list-type" in query:
                return 200, self._list(name, query), 0
            if method == "PUT" and "partNumber" in query:
                self._uploads[query["uploadId"]][int(query["partNumber"])] = body
                return 200, b"", 1
            if method == "POST":
                return self._multipart(name, query)
            if method == "PUT":
                return self._put(name, headers, body)
            if name not in self.objects:
                return 404, _NOT_THERE, 0
            if method == "DELETE":
                del self.objects[name]
                return 204, b"", 0
            content, generation = self.objects[name]
            if match := re.fullmatch(r"bytes=(\d+)-(\d+)", headers.get("Range", "")):
                return 206, content[int(match[1]) : int(match[2]) + 1], generation
            return 200, content, generation

    def _put(self, name: str, headers: Any, body: bytes) -> tuple[int, bytes, int]:
        expected = headers.get("x-goog-if-generation-match")
        there = self.objects[name][1] if name in self.objects else 0
        if expected is not None and int(expected) != there:
            return 412, _CONDITION, 0
        if (source := headers.get("x-goog-copy-source")) is not None:
            body = self.objects[unquote(source)][0]
        return 200, b"", self._keep(name, body)

    def _keep(self, name: str, body: bytes) -> int:
        self._generation += 1
        self.objects[name] = (body, self._generation)
        return self._generation

    def _multipart(self, name: str, query: dict[str, str]) -> tuple[int, bytes, int]:
        if "uploads" in query:
            self._uploads[name] = {}
            xml = f"<InitiateMultipartUploadResult><UploadId>{escape(name)}</UploadId>"
            return 200, f"{xml}</InitiateMultipartUploadResult>".encode(), 0
        parts = self._uploads.pop(query["uploadId"])
        generation = self._keep(name, b"".join(parts[number] for number in sorted(parts)))
        xml = f'<CompleteMultipartUploadResult><ETag>"{generation}"</ETag>'
        return 200, f"{xml}</CompleteMultipartUploadResult>".encode(), generation

    def _list(self, bucket: str, query: dict[str, str]) -> bytes:
        prefix, found, folders = query.get("prefix", ""), [], set()
        for name, (content, generation) in sorted(self.objects.items()):
            key = name.removeprefix(f"{bucket}/")
            if not name.startswith(f"{bucket}/") or not key.startswith(prefix):
                continue
            folder, slash, _ = key.removeprefix(prefix).partition("/")
            if slash and "delimiter" in query:
                folders.add(f"{prefix}{folder}/")
                continue
            said = f"<Key>{escape(key)}</Key><LastModified>{_WHEN}</LastModified>"
            said += f'<ETag>"{generation}"</ETag><Size>{len(content)}</Size>'
            found.append(f"<Contents>{said}</Contents>")
        for folder in sorted(folders):
            found.append(f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>")
        return f"<ListBucketResult>{''.join(found)}</ListBucketResult>".encode()


def _handler(double: GcsDouble) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            arguments = self.command, self.path, self.headers, body
            status, content, generation = double.answer(*arguments)
            self.send_response_only(status)
            self.send_header("ETag", f'"{generation}"')
            self.send_header("x-goog-generation", str(generation))
            self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
            if status == 206:
                first = self.headers["Range"].removeprefix("bytes=").partition("-")[0]
                last = int(first) + len(content) - 1
                self.send_header("Content-Range", f"bytes {first}-{last}/{last + 1}")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: `requests` keeps the log."""

    return Handler
