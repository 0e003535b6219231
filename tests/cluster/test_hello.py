"""Introductions: what must be the same, what a stranger learns, and what bounds it."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from argosy.cluster import hello
from argosy.cluster.hello import Facts, Offer, Refusal
from argosy.errors import PeerNotUsable, PeerRefused, UsageError

KEY = b"a key of this group, 32 bytes ..."
FACTS = Facts(
    version="0.1.0", kernel="avx2", sources=bytes(range(32, 64)), model=bytes(range(32)), most_rows=256,
    most_assignments=2048, hidden=64, num_layers=4, num_experts=32,
)  # fmt: skip
OFFER = Offer(
    num_slots=40, cache_bytes=1 << 20, disk_bytes_per_s=2.5e9, share_bytes=1 << 24, shards=(1 << 64) - 1,
    is_resident=False,
)  # fmt: skip


def test_experts_on_amx_have_the_sums_of_avx512_unless_their_activations_are_split() -> None:
    names = ("plain", "avx2", "avx512", "amx")
    assert [hello.kernel_of(name, ["q4", "f16"]) for name in names] == ["plain", "avx2", "avx512", "avx512"]
    for formats in (["bf16"], ["q4_k", "f8"]):
        assert [hello.kernel_of(name, formats) for name in names] == list(names)


@pytest.mark.parametrize(
    ("worker", "coordinator", "fits"),
    [
        ("amx", "amx", True), ("amx", "avx512", True), ("avx512", "amx", False), ("avx512", "avx2", False),
    ],
)  # fmt: skip
def test_a_worker_without_files_may_turn_out_to_have_either_sums_of_amx(
    worker: str, coordinator: str, fits: bool
) -> None:
    theirs, ours = (replace(FACTS, kernel=kernel) for kernel in (worker, coordinator))
    found = hello._mismatch(replace(theirs, model=hello.NO_MODEL), ours)
    assert found is (None if fits else Refusal.kernel)
    assert (hello._mismatch(theirs, ours) is None) == (worker == coordinator)


@contextmanager
def accepting(key: bytes = KEY, **more: Any) -> Iterator[tuple[socket.socket, list[object]]]:
    """A worker that accepts one connection in a thread; yields the other end, and what came of it."""
    ours, theirs = socket.socketpair()
    found: list[object] = []

    def accept() -> None:
        try:
            found.append(hello.accept(theirs, key, FACTS, OFFER, **more))
        except PeerNotUsable as error:
            found.append(error)

    thread = threading.Thread(target=accept)
    thread.start()
    with ours, theirs:
        try:
            yield ours, found
        finally:
            ours.close()
            thread.join()


def test_each_side_learns_what_the_other_brings() -> None:
    asked = replace(FACTS, most_rows=16)
    with accepting() as (connection, found):
        assert hello.connect(connection, KEY, asked, host="w:1") == (FACTS, OFFER, None)
    assert found == [asked]


def test_without_a_key_both_sides_use_an_empty_one() -> None:
    with accepting(b"") as (connection, found):
        assert hello.connect(connection, b"", FACTS, host="w:1").offer == OFFER
    assert found == [FACTS]


@pytest.mark.parametrize(
    ("changes", "reason", "says"),
    [
        ({"version": "0.2.0"}, "version", "w:1 refuses: it is argosy 0.1.0, and this is 0.2.0"),
        ({"sources": bytes(32)}, "sources", "its arithmetic was compiled from other sources"),
        ({"model": bytes(32)}, "model", "it has other weights"),
        ({"hidden": 65}, "model", "it has other weights"),
        ({"kernel": "avx512"}, "kernel", "its sums are those of avx2, and this engine's those of avx512"),
        ({"most_rows": 257}, "limits", "it takes at most 256 rows and 2048 assignments"),
        ({"most_assignments": 2049}, "limits", "it takes at most 256 rows and 2048 assignments"),
        ({"most_rows": 0}, "limits", "it takes at most 256 rows"),
    ],
)
def test_a_mismatch_is_refused_by_name(changes: dict[str, Any], reason: str, says: str) -> None:
    with accepting() as (connection, found), pytest.raises(PeerRefused, match=says) as refused:
        hello.connect(connection, KEY, replace(FACTS, **changes), host="w:1")
    assert refused.value.facts["reason"] == reason
    assert isinstance(found[0], PeerRefused)
    assert found[0].facts["reason"] == reason


@pytest.mark.parametrize("refusal", [Refusal.busy, Refusal.draining])
def test_a_worker_may_have_no_room(refusal: Refusal) -> None:
    with accepting(refusal=refusal) as (connection, _), pytest.raises(PeerRefused) as refused:
        hello.connect(connection, KEY, FACTS, host="w:1")
    assert refused.value.facts["reason"] == refusal.name


def test_a_wrong_key_is_refused_and_learns_nothing_of_the_model() -> None:
    with accepting() as (connection, found):
        relay, end = socket.socketpair()
        heard = bytearray()

        def listen() -> None:  # between the two: what the worker says, byte by byte
            for size in (hello._GREETING.size, hello._VERDICT.size):
                data = connection.recv(size, socket.MSG_WAITALL)
                heard.extend(data)
                relay.sendall(data)
                if size == hello._GREETING.size:
                    connection.sendall(relay.recv(hello._INTRODUCTION.size, socket.MSG_WAITALL))

        thread = threading.Thread(target=listen)
        thread.start()
        with relay, end, pytest.raises(PeerRefused, match="w:1 refuses the key"):
            hello.connect(end, b"another key, just as long as that", FACTS, host="w:1")
        thread.join()
    assert isinstance(found[0], PeerRefused)
    assert found[0].facts["reason"] == "key"
    assert FACTS.model not in heard
    assert b"avx2" not in heard


def test_a_worker_without_the_key_is_not_believed() -> None:
    """A machine in the worker's place that accepts any proof cannot answer the coordinator's challenge."""
    with accepting(b"") as (connection, _), pytest.raises(PeerRefused):
        hello.connect(connection, KEY, FACTS, host="w:1")

    ours, theirs = socket.socketpair()

    def pretend() -> None:
        theirs.sendall(hello._GREETING.pack(b"ARGOSYHI", hello.PROTOCOL, bytes(32)))
        theirs.recv(hello._INTRODUCTION.size, socket.MSG_WAITALL)
        theirs.sendall(
            hello._VERDICT.pack(b"ARGOSYHI", hello.PROTOCOL, 0, FACTS.pack(), OFFER.pack(), bytes(32))
        )

    thread = threading.Thread(target=pretend)
    thread.start()
    with ours, theirs, pytest.raises(PeerRefused, match="does not have the key"):
        hello.connect(ours, KEY, FACTS, host="w:1")
    thread.join()


def test_a_replayed_introduction_is_refused() -> None:
    recorded: list[bytes] = []

    class Recording(socket.socket):
        def sendall(self, data: Any, flags: int = 0) -> None:
            recorded.append(bytes(data))
            super().sendall(data, flags)

    with (
        accepting() as (connection, found),
        Recording(fileno=os.dup(connection.fileno())) as recording,
    ):
        hello.connect(recording, KEY, FACTS, host="w:1")
    assert found == [FACTS]

    with accepting() as (connection, found):
        connection.recv(hello._GREETING.size, socket.MSG_WAITALL)
        connection.sendall(recorded[0])
        verdict = hello._VERDICT.unpack(connection.recv(hello._VERDICT.size, socket.MSG_WAITALL))
    assert verdict[2] == Refusal.key
    assert isinstance(found[0], PeerRefused)


def test_the_version_of_the_protocol_comes_first() -> None:
    with accepting() as (connection, found):
        connection.recv(hello._GREETING.size, socket.MSG_WAITALL)
        connection.sendall(
            hello._INTRODUCTION.pack(
                b"ARGOSYHI", hello.PROTOCOL + 1, bytes(32), bytes(hello._FACTS.size), bytes(32)
            )
        )
        verdict = hello._VERDICT.unpack(connection.recv(hello._VERDICT.size, socket.MSG_WAITALL))
    assert verdict[2] == Refusal.protocol
    assert isinstance(found[0], PeerRefused)


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\n\r\n", bytes(10_000), b"ARGOSYHI" * 300])
def test_a_stranger_is_not_served(sent: bytes) -> None:
    with accepting() as (connection, found):
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
    assert isinstance(found[0], PeerNotUsable)


def test_a_coordinator_does_not_believe_a_stranger() -> None:
    for sent in (b"", b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(100)):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(sent)
            theirs.shutdown(socket.SHUT_WR)
            with pytest.raises(PeerNotUsable, match="w:1"):
                hello.connect(ours, KEY, FACTS, host="w:1")


def test_a_slow_stranger_holds_a_thread_for_a_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hello, "HELLO_S", 0.05)
    with accepting() as (connection, found):
        connection.sendall(b"A")  # and nothing more
        for _ in range(200):
            if found:
                break
            threading.Event().wait(0.01)
    assert isinstance(found[0], PeerNotUsable)
    assert "longer than" in found[0].message


def test_every_single_flipped_bit_of_an_introduction_is_refused() -> None:
    nonce = bytes(32)
    good = FACTS.pack()
    proof = hello._proof(KEY, b"coordinator", nonce, nonce, good)
    for bit in range(0, 8 * len(good), 37):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        assert hello._proof(KEY, b"coordinator", nonce, nonce, bytes(bad)) != proof


def test_an_offer_that_cannot_be_true_is_refused() -> None:
    for changes in ({"num_slots": 1 << 60}, {"disk_bytes_per_s": float("nan")}, {"disk_bytes_per_s": -1.0}):
        with pytest.raises(ValueError, match="an impossible offer"):
            Offer.unpack(replace(OFFER, **changes).pack())  # type: ignore[arg-type]


def test_text_of_a_stranger_is_made_printable() -> None:
    packed = replace(FACTS, version="\x1b[31mred").pack()
    assert Facts.unpack(packed).version == "?[31mred"


@pytest.fixture
def key_file(tmp_path: Path) -> Callable[[bytes, int], Path]:
    def make(content: bytes, mode: int) -> Path:
        path = tmp_path / "key"
        path.write_bytes(content)
        path.chmod(mode)
        return path

    return make


def test_a_key_file_is_read(key_file: Callable[[bytes, int], Path]) -> None:
    assert hello.read_key(key_file(b"0123456789abcdef\n", 0o600)) == b"0123456789abcdef"


@pytest.mark.parametrize(
    ("content", "mode", "says"),
    [
        (b"0123456789abcdef", 0o640, "other users can access"),
        (b"short\n", 0o600, "a key has 16 to 4096 bytes, and .* has 5"),
        (b"x" * 5000, 0o600, "a key has 16 to 4096 bytes"),
    ],
)
def test_a_bad_key_file_is_refused(
    key_file: Callable[[bytes, int], Path], content: bytes, mode: int, says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        hello.read_key(key_file(content, mode))


def test_a_missing_key_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="openssl rand"):
        hello.read_key(tmp_path / "none")
