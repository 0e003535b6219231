"""A loopback server that speaks the hub's API and range requests, and can be told to lie.

Files are bytes, followed by zeros up to their size; nothing is kept for the zeros. Weights are redirected once, as the
hub redirects them to its storage. The list of files has sizes and digests, unless a file is too long to be hashed here.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

REPOSITORY = "owner/model"
REVISION = "a" * 40
_MOST_HASHED = 64 << 20


@dataclass
class Served:
    """A repository, and what was asked of it.

    repository: its name, OWNER/NAME.
    refusal: a status, headers (an empty one is left out) and a body that answer every request.
    models: the answer to a search.
    lies: response headers by file name that replace the true ones; "status" replaces the status, and "stall" keeps the
        body back.
    cuts: by file name, the byte before which the connection ends, once.
    holds: by file name, the byte before which the server waits until `is_held` is cleared.
    sent_instead: contents by file name that are sent, with the digests of the true ones.
    branches: other branches and tags, by name; they are served without redirects.
    """

    files: dict[str, tuple[bytes, int]]
    repository: str = REPOSITORY
    refusal: tuple[int, dict[str, str], bytes] | None = None
    models: Any = None
    lies: dict[str, dict[str, str]] = field(default_factory=dict)
    answers_ranges: bool = True
    token: str | None = None
    redirect_to: str | None = None  # instead of this server's own storage
    listing: Any = None  # instead of the true list
    listing_from: str | None = None  # where the list is redirected to
    cuts: dict[str, int] = field(default_factory=dict)
    holds: dict[str, int] = field(default_factory=dict)
    sent_instead: dict[str, bytes] = field(default_factory=dict)
    is_held: threading.Event = field(default_factory=threading.Event)  # set: held no longer
    bytes_sent: int = 0
    ranges: list[tuple[str, int, int]] = field(default_factory=list)  # name, first and last byte
    tokens: list[tuple[str, str | None]] = field(default_factory=list)  # path, Authorization
    url: str = ""
    revision: str = REVISION
    branches: dict[str, Served] = field(default_factory=dict)

    def at(self, revision: str) -> Served | None:
        """The files of a branch, a tag or a commit; None if there is none of that name."""
        of = {"": self, "main": self, self.revision: self, **self.branches}
        return {**of, **{one.revision: one for one in self.branches.values()}}.get(revision)


def true_listing(what: Served) -> dict[str, Any]:
    """The hub's listing of the repository, with `blobs=true`."""
    siblings = []
    for name, (beginning, size) in what.files.items():
        entry: dict[str, Any] = {"rfilename": name, "size": size}
        if size <= _MOST_HASHED:
            content = beginning + bytes(size - len(beginning))
            entry["blobId"] = hashlib.sha1(b"blob %d\0" % size + content).hexdigest()
            if name.endswith((".safetensors", ".gguf")):
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": sha256, "size": size, "pointerSize": 134}
        siblings.append(entry)
    return {"sha": what.revision, "siblings": siblings, "cardData": {"license": "apache-2.0"}}


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
            if what.refusal is not None:
                status, headers, body = what.refusal
                return self._send(status, body, headers)
            is_known = what.token is None or self.headers.get("Authorization") == f"Bearer {what.token}"
            if not is_known and not self.path.startswith("/storage/"):
                return self._send(401, b"")
            address, _, query = self.path.partition("?")
            if address == "/api/models" and what.models is not None:
                return self._send(200, json.dumps(what.models).encode())
            if asked := re.fullmatch(rf"/api/models/{what.repository}(?:/revision/([^/]+))?", address):
                assert query == "blobs=true"
                if (at := what.at(urllib.parse.unquote(asked[1] or ""))) is None:
                    return self._send(404, b"")
                if what.listing_from is not None:
                    return self._send(302, b"", {"Location": f"{what.listing_from}{self.path}"})
                listing = true_listing(at) if what.listing is None else what.listing
                return self._send(200, json.dumps(listing).encode())
            of_branch = re.fullmatch(rf"/{what.repository}/resolve/([0-9a-f]+)/(.+)", self.path)
            at = what.at(of_branch[1]) if of_branch is not None else None
            if of_branch is not None and at is not None and at is not what:
                return self._file(of_branch[2], at)
            found = re.fullmatch(rf"/(?:{what.repository}/resolve/{REVISION}|storage)/(.+)", self.path)
            if found is None or found[1] not in what.files:
                return self._send(404, b"")
            if not self.path.startswith("/storage/") and found[1].endswith((".safetensors", ".gguf")):
                return self._send(
                    302, b"", {"Location": what.redirect_to or f"{what.url}/storage/{found[1]}"}
                )
            return self._file(found[1])

        def _file(self, name: str, at: Served = what) -> None:
            beginning, size = at.files[name]
            beginning = what.sent_instead.get(name, beginning)
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            lie = what.lies.get(name, {})
            if asked is None or not what.answers_ranges:
                first, last, status, headers = 0, size - 1, 200, dict[str, str]()
            else:
                first, last = int(asked[1]), min(int(asked[2]), size - 1)
                status, headers = 206, {"Content-Range": f"bytes {first}-{last}/{size}"}
            headers |= {key: value for key, value in lie.items() if key not in ("status", "stall")}
            what.ranges.append((name, first, last))
            part = beginning[first : last + 1]
            if first < what.holds.get(name, 0) <= last:
                return self._held(status, part, headers, what.holds[name] - first)
            if first < what.cuts.get(name, 0) <= last:
                part = part[: what.cuts.pop(name) - first]
                self._send(status, part, headers, last + 1 - first, has_zeros=False)
                self.close_connection = True
                return None
            if "stall" in lie:
                self._send(status, b"", headers, 0)
                time.sleep(1.0)
                return None
            return self._send(int(lie.get("status", status)), part, headers, last + 1 - first)

        def _held(self, status: int, part: bytes, headers: Mapping[str, str], before: int) -> None:
            self._send(status, part[:before], headers, len(part), has_zeros=False)
            what.is_held.wait(30)
            try:
                self.wfile.write(part[before:])
                what.bytes_sent += len(part) - before
            except OSError:
                self.close_connection = True

        def _send(
            self, status: int, body: bytes, headers: Mapping[str, str] | None = None, size: int | None = None,
            *, has_zeros: bool = True,
        ) -> None:  # fmt: skip
            size = len(body) if size is None else size
            self.send_response(status)
            for key, value in ({"Content-Length": str(size)} | dict(headers or {})).items():
                if value:
                    self.send_header(key, value)
            self.end_headers()
            try:
                self.wfile.write(body)
                what.bytes_sent += len(body)
                while has_zeros and size > len(body):  # zeros, until the client has had enough
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
