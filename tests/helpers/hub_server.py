"""A loopback server that speaks the hub's API and range requests, and can be told to lie.

Files are bytes, followed by zeros up to their size; nothing is kept for the zeros. Weights are redirected once, as the
hub redirects them to its storage.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

REPOSITORY = "owner/model"
REVISION = "a" * 40


@dataclass
class Served:
    """A repository, and what was asked of it.

    lies: response headers by file name that replace the true ones; "status" replaces the status, and "stall" keeps the
        body back.
    """

    files: dict[str, tuple[bytes, int]]
    lies: dict[str, dict[str, str]] = field(default_factory=dict)
    answers_ranges: bool = True
    token: str | None = None
    redirect_to: str | None = None  # instead of this server's own storage
    listing: Any = None  # instead of the true list
    bytes_sent: int = 0
    tokens: list[tuple[str, str | None]] = field(default_factory=list)  # path, Authorization
    url: str = ""


def directory_files(directory: Path) -> dict[str, tuple[bytes, int]]:
    return {
        path.name: (path.read_bytes(), path.stat().st_size) for path in directory.iterdir() if path.is_file()
    }


@contextmanager
def served(files: Mapping[str, tuple[bytes, int]], **options: Any) -> Iterator[Served]:
    what = Served(dict(files), **options)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            what.tokens.append((self.path, self.headers.get("Authorization")))
            is_known = what.token is None or self.headers.get("Authorization") == f"Bearer {what.token}"
            if not is_known and not self.path.startswith("/storage/"):
                return self._send(401, b"")
            if self.path == f"/api/models/{REPOSITORY}":
                true = {"sha": REVISION, "siblings": [{"rfilename": name} for name in what.files]}
                return self._send(200, json.dumps(true if what.listing is None else what.listing).encode())
            found = re.fullmatch(rf"/(?:{REPOSITORY}/resolve/{REVISION}|storage)/(.+)", self.path)
            if found is None or found[1] not in what.files:
                return self._send(404, b"")
            if not self.path.startswith("/storage/") and found[1].endswith((".safetensors", ".gguf")):
                return self._send(
                    302, b"", {"Location": what.redirect_to or f"{what.url}/storage/{found[1]}"}
                )
            return self._file(found[1])

        def _file(self, name: str) -> None:
            beginning, size = what.files[name]
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            lie = what.lies.get(name, {})
            if asked is None or not what.answers_ranges:
                first, last, status, headers = 0, size - 1, 200, {}
            else:
                first, last = int(asked[1]), min(int(asked[2]), size - 1)
                status, headers = 206, {"Content-Range": f"bytes {first}-{last}/{size}"}
            headers |= {key: value for key, value in lie.items() if key not in ("status", "stall")}
            part = beginning[first : last + 1]
            if "stall" in lie:
                self._send(status, b"", headers, 0)
                time.sleep(1.0)
                return
            self._send(int(lie.get("status", status)), part, headers, last + 1 - first)

        def _send(
            self, status: int, body: bytes, headers: Mapping[str, str] | None = None, size: int | None = None
        ) -> None:
            size = len(body) if size is None else size
            self.send_response(status)
            for key, value in ({"Content-Length": str(size)} | dict(headers or {})).items():
                self.send_header(key, value)
            self.end_headers()
            try:
                self.wfile.write(body)
                what.bytes_sent += len(body)
                while size > len(body):  # zeros, until the client has had enough
                    zeros = bytes(min(size - len(body), 1 << 16))
                    self.wfile.write(zeros)
                    what.bytes_sent += len(zeros)
                    size -= len(zeros)
            except OSError:
                self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    what.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield what
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
