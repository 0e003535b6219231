"""Remember which server has computed which prompt prefixes.

    parts of a request, in the order in which a model reads them  ->  marks, one per prefix  ->  a server

A server keeps prompt prefixes, so the next turn of a conversation costs it only the new part. A mark is a keyed
digest of a prefix. It covers the caller's key, so no caller learns what others asked, and texts are not kept.

Elsewhere: `servers.py` weighs marks against load; `engine/prefix.py` is how a server shares prefixes.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

MOST_MARKS = 1 << 16  # about 10 MB; the least recently used mark is forgotten first
_MOST_PARTS = 256  # per request; later ones get no marks
_PIECE_CHARS = 4096  # for a prompt that is a single text
# The fields in which the dialects put what precedes the conversation, then the conversation.
_BEFORE = ("tools", "system", "instructions")
_CONVERSATIONS = ("messages", "input", "prompt")


@dataclass(frozen=True, slots=True)
class Mark:
    """A prefix of a request.

    num_chars: the length of its parts as JSON.
    """

    digest: bytes
    num_chars: int


def parts_of(body: Mapping[str, Any]) -> Iterable[str]:
    """The parts of a request's prompt as JSON, in the order in which models read them."""
    yield from (json.dumps(body[key], sort_keys=True) for key in _BEFORE if body.get(key))
    for key in _CONVERSATIONS:
        said = body.get(key)
        if isinstance(said, str):
            yield from (said[at : at + _PIECE_CHARS] for at in range(0, len(said), _PIECE_CHARS))
        elif isinstance(said, list):
            yield from (json.dumps(one, sort_keys=True) for one in said)


class Prefixes:
    """Which server has which prefixes."""

    def __init__(self, *, most: int = MOST_MARKS) -> None:
        self._most = most
        self._secret = secrets.token_bytes(16)
        self._servers: OrderedDict[bytes, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._servers)

    def marks(self, tenant: bytes, model: str, parts: Iterable[str]) -> list[Mark]:
        """The marks of a request, from the shortest prefix to the longest.

        Args:
            tenant: the caller's key; empty if there is none.
        """
        digest = hashlib.blake2b(key=self._secret, digest_size=16)
        for name in (tenant, model.encode()):
            digest.update(len(name).to_bytes(4, "little") + name)
        marks, num_chars = [], 0
        for number, part in enumerate(parts):
            if number == _MOST_PARTS:
                break
            data = part.encode("utf-8", "replace")
            digest.update(len(data).to_bytes(8, "little") + data)
            num_chars += len(part)
            marks.append(Mark(digest.digest(), num_chars))
        return marks

    def known(self, marks: Iterable[Mark]) -> dict[int, int]:
        """For each server that has a prefix, the length of the longest in characters."""
        found: dict[int, int] = {}
        for mark in marks:
            server = self._servers.get(mark.digest)
            if server is not None:
                found[server] = mark.num_chars
        return found

    def note(self, marks: Iterable[Mark], server: int) -> None:
        """Note that `server` is computing this request."""
        for mark in marks:
            self._servers[mark.digest] = server
            self._servers.move_to_end(mark.digest)
        while len(self._servers) > self._most:
            self._servers.popitem(last=False)

    def forget(self, server: int) -> None:
        """Forget a dead server and everything it had computed."""
        for digest in [digest for digest, one in self._servers.items() if one == server]:
            del self._servers[digest]
