"""A local hub: the part of huggingface.co's protocol that a download uses, with fault injection."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = ".safetensors", ".gguf"  # stored in LFS, with a SHA-256


@dataclass
class Hub:
    """The files of one model, and faults.

    Attributes:
        repo: ``organisation/name``.
        files: contents by name.
        breaks: by file name, the number of bytes after which each response is cut off.
        damaged: files that are sent with the last byte changed.
        refusal: status and X-Error-Code of every response.
        requests: file name and start of the range of every request.
        endpoint: URL.
    """

    repo: str
    files: dict[str, bytes]
    breaks: dict[str, int] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)
    refusal: tuple[int, str] | None = None
    requests: list[tuple[str, int]] = field(default_factory=list)
    endpoint: str = ""

    def listing(self) -> dict[str, Any]:
        siblings = []
        for name, data in self.files.items():
            blob = hashlib.sha1(f"blob {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest()
            entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": blob}
            if name.endswith(LARGE):
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            siblings.append(entry)
        return {"id": self.repo, "modelId": self.repo, "sha": COMMIT, "private": False, "siblings": siblings}


@contextmanager
def serve(repo: str, folder: Path | dict[str, bytes]) -> Iterator[Hub]:
    """Serve one model: the files of a folder, or contents by name."""
    files = folder if isinstance(folder, dict) else {p.name: p.read_bytes() for p in sorted(folder.iterdir())}
    hub = Hub(repo, dict(files))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            if hub.refusal is not None:
                self._answer(hub.refusal[0], b"{}", {"X-Error-Code": hub.refusal[1]})
            elif path.startswith(f"/api/models/{hub.repo}/revision/"):
                self._answer(200, json.dumps(hub.listing()).encode(), {"Content-Type": "application/json"})
            elif path.startswith(f"/{hub.repo}/resolve/{COMMIT}/"):
                self._file(path.rpartition("/")[2])
            else:
                self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        def _file(self, name: str) -> None:
            data = hub.files[name]
            if name in hub.damaged:
                data = data[:-1] + bytes([data[-1] ^ 1])
            byte_range = self.headers.get("Range", "")
            start = int(byte_range.removeprefix("bytes=").partition("-")[0]) if byte_range else 0
            hub.requests.append((name, start))
            headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if byte_range else {}
            self._answer(206 if byte_range else 200, data[start:], headers, stop=hub.breaks.get(name))

        def _answer(self, status: int, body: bytes, headers: dict[str, str], stop: int | None = None) -> None:
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body[:stop])
            if stop is not None:
                self.wfile.flush()
                self.close_connection = True  # the rest is not sent

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
