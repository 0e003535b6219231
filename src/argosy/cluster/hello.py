"""Introduce a coordinator and a worker before any row travels: both need the same engine, weights, sums and key.

    worker:       greeting (nonce)                  ──>
    coordinator:                                    <──  introduction (nonce, facts, proof)
    worker:       verdict (code, facts, proof)      ──>

Every message has a fixed size, so a stranger cannot decide how much is read. A proof is HMAC-SHA256 with the shared
key over both nonces and all facts exchanged so far, so a recorded introduction proves nothing on another
connection. The coordinator proves itself first: a stranger learns neither the model nor the version. Without a key
both sides use an empty one, and anyone who can reach the port may use the worker.

The proof covers only the introduction. TLS (`secure.py`) or the network must keep out an attacker who can alter
packets between the machines.

A worker without files answers `copying`, then copies them over the same connection under a separate key.

Elsewhere: frames with rows are native (`native/cluster`); `copy_link.py` carries files; `identity.py` says what a
model's fingerprint covers.
"""

from __future__ import annotations

import enum
import hmac
import os
import secrets
import socket
import stat
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from argosy.directory import read_named
from argosy.errors import PeerNotUsable, PeerRefused, UsageError

PROTOCOL = 2
MOST_ROWS = 640  # per step: a chunk of a prompt plus the sequences that decode alongside it
HELLO_S = 5.0  # time limit for an introduction
_MAGIC = b"ARGOSYHI"
_NONCE_BYTES, _PROOF_BYTES = 32, 32
_SHORTEST_KEY, _LONGEST_KEY = 16, 4096  # bytes of a key file

_GREETING = struct.Struct("<8sHxx32s")  # magic, protocol, nonce
# engine version, kernel, sources, model; rows, assignments, hidden size, layers, experts per layer.
_FACTS = struct.Struct("<32s16s32s32sIIIII")
# slots, their bytes, the drive's bytes per second, bytes of the share's experts, shards; flags.
_OFFER = struct.Struct("<QQdQQI")
_INTRODUCTION = struct.Struct(f"<8sHxx{_NONCE_BYTES}s{_FACTS.size}s{_PROOF_BYTES}s")
_VERDICT = struct.Struct(f"<8sHH{_FACTS.size}s{_OFFER.size}s{_PROOF_BYTES}s")
_IS_RESIDENT = 1
NO_MODEL = bytes(32)  # the fingerprint of a worker without files
_SPLIT_FORMATS = frozenset({"bf16", "f8"})
_MOST_COUNT = 1 << 48  # no honest worker has more slots or cache bytes


class Refusal(enum.IntEnum):
    """Why a worker does not serve a coordinator; the numbers go over the wire. `copying`: it needs files first."""

    none = 0
    protocol = 1
    key = 2
    version = 3
    model = 4
    kernel = 5
    limits = 6
    busy = 7
    draining = 8
    sources = 9
    copying = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """The facts that must be equal on both sides, and the most a coordinator sends at once.

    version: the engine's version.   kernel: the instruction set; sums depend on it.
    sources: 32 bytes, `_native.sources_hash`.   model: 32 bytes, `identity.fingerprint`, or NO_MODEL.
    most_rows, most_assignments: limits of one request.   num_layers, num_experts: layers, and experts per layer.
    """

    version: str
    kernel: str
    sources: bytes
    model: bytes
    most_rows: int
    most_assignments: int
    hidden: int
    num_layers: int
    num_experts: int

    def pack(self) -> bytes:
        return _FACTS.pack(
            self.version.encode()[:32], self.kernel.encode()[:16], self.sources, self.model, self.most_rows,
            self.most_assignments, self.hidden, self.num_layers, self.num_experts,
        )  # fmt: skip

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        version, kernel, sources, model, *counts = _FACTS.unpack(data)
        names = ("most_rows", "most_assignments", "hidden", "num_layers", "num_experts")
        return cls(
            version=_text(version), kernel=_text(kernel), sources=sources, model=model,
            **dict(zip(names, counts, strict=True)),
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """The resources that a worker offers.

    num_slots, cache_bytes: the size of its expert cache, or of all its experts if they are resident.
    disk_bytes_per_s: measured when it started; 0 if unknown.
    share_bytes: the size of the experts in its files.   shards: bit i is set if it has shard i.

    For a worker that copies, cache_bytes is its whole budget, share_bytes the free space on its drive, and `shards`
    those that it wants, or 0 to let the coordinator choose.
    """

    num_slots: int
    cache_bytes: int
    disk_bytes_per_s: float
    share_bytes: int
    shards: int
    is_resident: bool

    def pack(self) -> bytes:
        return _OFFER.pack(
            self.num_slots, self.cache_bytes, self.disk_bytes_per_s, self.share_bytes, self.shards,
            _IS_RESIDENT if self.is_resident else 0,
        )  # fmt: skip

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        slots, cache_bytes, rate, share_bytes, shards, flags = _OFFER.unpack(data)
        # A worker with the key is trusted to compute, but nonsense must not enter a plan.
        if max(slots, cache_bytes, share_bytes) > _MOST_COUNT or not 0 <= rate < 1e15:
            raise ValueError("it makes an impossible offer")
        return cls(
            num_slots=slots, cache_bytes=cache_bytes, disk_bytes_per_s=rate, share_bytes=share_bytes,
            shards=shards, is_resident=bool(flags & _IS_RESIDENT),
        )  # fmt: skip


class Introduced(NamedTuple):
    """A worker's answer to a coordinator. `copy_key` is set if it copies files over this connection."""

    facts: Facts
    offer: Offer
    copy_key: bytes | None


def kernel_of(instruction_set: str, formats: Iterable[str]) -> str:
    """The instruction set whose sums experts in these formats get when run on this one.

    On `amx`, products with bfloat16 and FP8 weights have their own sums; all others equal those of `avx512`.
    """
    has_own_sums = not _SPLIT_FORMATS.isdisjoint(formats)
    return "avx512" if instruction_set == "amx" and not has_own_sums else instruction_set


def prepare(connection: socket.socket) -> None:
    """Send small messages at once, and detect within half a minute that the other machine is gone or stuck."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, 10),  # seconds
        (socket.TCP_KEEPINTVL, 5),
        (socket.TCP_KEEPCNT, 3),
        (socket.TCP_USER_TIMEOUT, 25_000),  # milliseconds
    ):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def read_key(path: Path) -> bytes:
    """Read a shared key.

    Raises:
        UsageError: the file cannot be read, others can access it, or its size is not that of a key.
    """

    def inspect(facts: os.stat_result) -> None:
        if facts.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise UsageError(f"other users can access {path}", hint=f"chmod 600 {path}")

    try:
        key = read_named(path, _LONGEST_KEY + 1, inspect=inspect).strip()
    except OSError as error:
        raise UsageError(
            f"the key file {path} cannot be read: {error.strerror}",
            hint=f"`openssl rand -hex 32 > {path}; chmod 600 {path}` makes one; copy it to every machine",
        ) from None
    if not _SHORTEST_KEY <= len(key) <= _LONGEST_KEY:
        raise UsageError(
            f"a key has {_SHORTEST_KEY} to {_LONGEST_KEY} bytes, and {path} has {len(key)}",
            hint=f"`openssl rand -hex 32 > {path}` makes one",
        )
    return key


def accept(
    connection: socket.socket, key: bytes, facts: Facts, offer: Offer, *, refusal: Refusal = Refusal.none
) -> Facts:
    """Introduce a worker to the coordinator that has just connected; return the coordinator's facts.

    Args:
        facts: the worker's facts; its limits are the most that it accepts in one frame.
        refusal: `busy` or `draining`, to refuse a coordinator that would otherwise be served.

    Raises:
        PeerNotUsable: the other side is gone, too slow, or speaks another protocol.
        PeerRefused: the coordinator was refused and told why.
    """
    return _introduce(connection, key, facts, offer, refusal)[0]


def accept_copy(
    connection: socket.socket, key: bytes, facts: Facts, offer: Offer, *, refusal: Refusal = Refusal.copying
) -> tuple[Facts, bytes]:
    """Introduce a worker without files; return the coordinator's facts and the key of the copy.

    Args:
        facts: the worker's facts, with NO_MODEL.   refusal: `copying`, or why it cannot copy now.

    Raises:
        The same errors as `accept`.
    """
    return _introduce(connection, key, facts, offer, refusal)


def _introduce(
    connection: socket.socket, key: bytes, facts: Facts, offer: Offer, refusal: Refusal
) -> tuple[Facts, bytes]:
    until = time.monotonic() + HELLO_S
    nonce = secrets.token_bytes(_NONCE_BYTES)
    _send(connection, _GREETING.pack(_MAGIC, PROTOCOL, nonce), until)
    data = _receive(connection, _INTRODUCTION.size, until)
    magic, protocol, their_nonce, their_facts, proof = _INTRODUCTION.unpack(data)
    if magic != _MAGIC:
        raise PeerNotUsable("a connection did not begin with an introduction")
    told = b""
    if protocol != PROTOCOL:
        found = Refusal.protocol
    elif not hmac.compare_digest(proof, _proof(key, b"coordinator", nonce, their_nonce, their_facts)):
        found = Refusal.key
    else:
        theirs = Facts.unpack(their_facts)
        found = _mismatch(facts, theirs) or refusal
        told = facts.pack()  # only for those who have the key
        data = told + offer.pack()
        verdict = _proof(key, b"worker", their_nonce, nonce, their_facts, bytes([found]), data)
        _send(connection, _VERDICT.pack(_MAGIC, PROTOCOL, found, facts.pack(), offer.pack(), verdict), until)
        if found in (Refusal.none, Refusal.copying):
            return theirs, _copy_key(key, nonce, their_nonce)
    if not told:
        _send(connection, _VERDICT.pack(_MAGIC, PROTOCOL, found, b"", b"", b""), until)
    raise PeerRefused(f"a coordinator was refused: {_SAID[found]}", reason=found.name)


def connect(connection: socket.socket, key: bytes, facts: Facts, *, host: str) -> Introduced:
    """Introduce a coordinator to a worker that it has just connected to; return its answer.

    Raises:
        PeerNotUsable: the other side is gone, too slow, or not a worker.
        PeerRefused: the worker refuses, or it does not have the key.
    """
    until = time.monotonic() + HELLO_S
    try:
        magic, protocol, their_nonce = _GREETING.unpack(_receive(connection, _GREETING.size, until))
        if magic != _MAGIC:
            raise PeerNotUsable(f"{host} is not an Argosy worker", host=host)
        if protocol != PROTOCOL:
            raise PeerRefused(
                f"{host} speaks version {protocol} of the protocol, and this engine version {PROTOCOL}",
                hint="install the same version of argosy on every machine",
                host=host,
                reason=Refusal.protocol.name,
            )
        nonce, ours = secrets.token_bytes(_NONCE_BYTES), facts.pack()
        proof = _proof(key, b"coordinator", their_nonce, nonce, ours)
        _send(connection, _INTRODUCTION.pack(_MAGIC, PROTOCOL, nonce, ours, proof), until)
        data = _receive(connection, _VERDICT.size, until)
    except PeerNotUsable as error:
        if "host" in error.facts:
            raise
        raise PeerNotUsable(f"{host}: {error.message}", host=host) from None
    magic, _, code, their_facts, offer, proof = _VERDICT.unpack(data)
    if magic != _MAGIC or code > max(Refusal):
        raise PeerNotUsable(f"{host} is not an Argosy worker", host=host)
    found = Refusal(code)
    if found in (Refusal.key, Refusal.protocol):
        raise _refused(host, found, facts, None)
    expected = _proof(key, b"worker", nonce, their_nonce, ours, bytes([code]), their_facts + offer)
    if not hmac.compare_digest(proof, expected):
        raise PeerRefused(
            f"{host} does not have the key of this group", hint=_KEY_HINT, host=host, reason=Refusal.key.name
        )
    theirs = Facts.unpack(their_facts)
    if found not in (Refusal.none, Refusal.copying):
        raise _refused(host, found, facts, theirs)
    copy_key = _copy_key(key, their_nonce, nonce) if found is Refusal.copying else None
    try:
        return Introduced(theirs, Offer.unpack(offer), copy_key)
    except ValueError as error:
        raise PeerNotUsable(f"{host}: {error}", host=host) from None


_KEY_HINT = "give every machine a copy of the same key file"
_SAID = {
    Refusal.protocol: "it speaks another version of the protocol",
    Refusal.key: "it does not have the key",
    Refusal.version: "it is another version of argosy",
    Refusal.sources: "its arithmetic was compiled from other sources",
    Refusal.model: "it runs other weights",
    Refusal.kernel: "it uses another instruction set",
    Refusal.limits: "it would send larger requests than this worker has memory for",
    Refusal.busy: "this worker serves as many coordinators as it can",
    Refusal.draining: "this worker is shutting down",
}


def _refused(host: str, found: Refusal, ours: Facts, theirs: Facts | None) -> PeerRefused:
    """The coordinator's error for a named refusal."""
    hint: str | None = None
    message = f"{host} refuses: "
    if found is Refusal.version and theirs is not None:
        message += f"it is argosy {theirs.version}, and this is {ours.version}"
        hint = "install the same version on every machine"
    elif found is Refusal.sources:
        message += "its arithmetic was compiled from other sources, so its sums may differ in their last bits"
        hint = "install the same build of argosy on every machine"
    elif found is Refusal.kernel and theirs is not None:
        message += f"its sums are those of {theirs.kernel}, and this engine's those of {ours.kernel}"
        hint = "set `--instruction-set NAME` on every machine to one that all of them have"
    elif found is Refusal.model:
        message += "it has other weights, or the same weights in a different format"
        hint = "copy the files of this model to every machine, or start the worker with --copy and a new directory"
    elif found is Refusal.limits and theirs is not None:
        message += (
            f"it takes at most {theirs.most_rows} rows and {theirs.most_assignments} assignments at once, and "
            f"this engine sends {ours.most_rows} and {ours.most_assignments}"
        )
    elif found is Refusal.key:
        message, hint = f"{host} refuses the key", _KEY_HINT
    else:
        message += {
            Refusal.busy: "it serves as many coordinators as it can",
            Refusal.draining: "it is shutting down",
        }.get(found, "it speaks another version of the protocol")
    return PeerRefused(message, hint=hint, host=host, reason=found.name)


def _mismatch(worker: Facts, coordinator: Facts) -> Refusal | None:
    """The first reason why they cannot work together."""
    if coordinator.version != worker.version:
        return Refusal.version
    if coordinator.sources != worker.sources:
        return Refusal.sources
    if worker.model == NO_MODEL:
        # A worker on `amx` cannot know yet which sums its experts will have.
        either = {worker.kernel, kernel_of(worker.kernel, ())}
        return None if coordinator.kernel in either else Refusal.kernel
    shapes = [(facts.hidden, facts.num_layers, facts.num_experts) for facts in (worker, coordinator)]
    if not hmac.compare_digest(coordinator.model, worker.model) or shapes[0] != shapes[1]:
        return Refusal.model
    if coordinator.kernel != worker.kernel:
        return Refusal.kernel
    is_within = 1 <= coordinator.most_rows <= worker.most_rows
    if not (is_within and 1 <= coordinator.most_assignments <= worker.most_assignments):
        return Refusal.limits
    return None


def _proof(key: bytes, role: bytes, *parts: bytes) -> bytes:
    return hmac.digest(key, b"argosy " + role + b"\0" + b"".join(parts), "sha256")


def _copy_key(key: bytes, worker_nonce: bytes, coordinator_nonce: bytes) -> bytes:
    """A key that only these two sides know, for this connection only."""
    return hmac.digest(key, b"argosy copy\0" + worker_nonce + coordinator_nonce, "sha256")


def _text(field: bytes) -> str:
    """A stranger's text, reduced to printable ASCII."""
    return "".join(chr(byte) if 32 <= byte < 127 else "?" for byte in field.rstrip(b"\0"))


def _send(connection: socket.socket, data: bytes, until: float) -> None:
    try:
        connection.settimeout(max(0.001, until - time.monotonic()))
        connection.sendall(data)
    except OSError as error:
        raise PeerNotUsable(_gone(error)) from None


def _receive(connection: socket.socket, nbytes: int, until: float) -> bytes:
    """Receive exactly `nbytes` before `until`, so that a slow stranger does not hold a thread for long."""
    received = bytearray()
    while len(received) < nbytes:
        left = until - time.monotonic()
        if left <= 0:
            raise PeerNotUsable(f"the introduction took longer than {HELLO_S:.0f} s")
        try:
            connection.settimeout(left)
            part = connection.recv(nbytes - len(received))
        except TimeoutError:
            continue
        except OSError as error:
            raise PeerNotUsable(_gone(error)) from None
        if not part:
            raise PeerNotUsable("the connection was closed during the introduction")
        received += part
    return bytes(received)


def _gone(error: OSError) -> str:
    return f"the connection failed during the introduction: {error.strerror or error}"
