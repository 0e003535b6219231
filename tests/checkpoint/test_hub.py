"""What goes wrong between here and a hub is said in words, with what to do next."""

from __future__ import annotations

import errno
import http.client
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from argosy.checkpoint.hub import Hub, Source
from argosy.errors import ArgosyError, CheckpointError, FetchFailed
from tests.helpers.hub_server import REPOSITORY, directory_files, served, true_listing
from tests.library.caches import REFERENCE

SMALL = REFERENCE / "mixtral_head_dim_tied_sharded"


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE", "http_proxy", "https_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def said(url: str = "https://hub.example") -> str:
    """What is said of a list of files that cannot be had."""
    with pytest.raises(ArgosyError) as refusal:
        Hub(Source(url, REPOSITORY), most_bytes=1 << 20).list_files()
    assert isinstance(refusal.value, FetchFailed | CheckpointError)
    return str(refusal.value)


def certificate_fault() -> ssl.SSLCertVerificationError:
    fault = ssl.SSLCertVerificationError(1, "certificate verify failed")
    fault.verify_message = "self-signed certificate"
    return fault


NETWORK = "check the network, or set HF_ENDPOINT to a mirror"


@pytest.mark.parametrize(
    ("fault", "why", "hint"),
    [
        (socket.gaierror(-2, "Name or service not known"), "no such host", NETWORK),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "connection refused", NETWORK),
        (TimeoutError("timed out"), "no answer within 60 s", NETWORK),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), "network is unreachable", NETWORK),
        (ConnectionResetError(errno.ECONNRESET, "reset"), "the connection ended early", NETWORK),
        (http.client.BadStatusLine("SSH-2.0"), "it does not speak HTTP", NETWORK),
        (ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number"), "no TLS connection", NETWORK),
        (
            certificate_fault(),
            "its certificate is not trusted: self-signed certificate",
            "this machine's clock",
        ),
    ],
)
def test_a_hub_that_cannot_be_reached_is_named_with_the_reason_and_a_remedy(
    monkeypatch: pytest.MonkeyPatch, fault: Exception, why: str, hint: str
) -> None:
    def connect(connection: http.client.HTTPConnection) -> None:
        raise fault

    monkeypatch.setattr(http.client.HTTPSConnection, "connect", connect)
    sentence = said()
    assert sentence.startswith(f"cannot reach hub.example ({why}")
    assert hint in sentence.partition("\nhint: ")[2]


def test_a_mirror_that_cannot_be_reached_points_at_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"  # nothing listens there
        monkeypatch.setenv("HF_ENDPOINT", url)
        sentence = said(url)
    assert sentence.startswith(f"cannot reach {url[7:]} (connection refused)\n")
    assert "the address in HF_ENDPOINT" in sentence


@contextmanager
def proxy(answer: bytes) -> Iterator[str]:
    """A proxy that gives one answer and ends the connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def give() -> None:
            with listener.accept()[0] as connection:
                connection.recv(4096)
                connection.sendall(answer)

        thread = threading.Thread(target=give, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n", "Tunnel connection failed: 403 Forbidden"),
        (b"HTTP/1.1 407 Login\r\nContent-Length: 0\r\n\r\n", "Tunnel connection failed: 407 Login"),
    ],
)
def test_a_proxy_that_refuses_is_named_without_its_password(
    monkeypatch: pytest.MonkeyPatch, answer: bytes, why: str
) -> None:
    with proxy(answer) as address:
        monkeypatch.setenv("HTTPS_PROXY", f"http://me:secret@{address}/")
        sentence = said()
    assert sentence.startswith(f"cannot reach hub.example through the proxy {address} ({why})\n")
    assert "HTTPS_PROXY" in sentence
    assert "secret" not in sentence


PAGE = b"<!doctype html><title>Welcome to Hotel Wi-Fi</title>"


@pytest.mark.parametrize(
    ("refusal", "sentence", "hint"),
    [
        ((401, {}, b""), "owner/model is not public, or does not exist: {} answers 401", "set HF_TOKEN"),
        (
            (403, {}, b""),
            "owner/model is not public, or does not exist: {} answers 403",
            "check the spelling",
        ),
        (
            (403, {"X-Error-Code": "GatedRepo"}, b""),
            "owner/model is gated: its owner must let you read it",
            "request access at http://{}/owner/model",
        ),
        ((404, {}, b""), "the hub has no model owner/model: it answers 404", "`argosy search model`"),
        ((429, {}, b""), "{} answers 429: too many requests", "try again in a few minutes"),
        ((429, {"Retry-After": "30"}, b""), "{} answers 429: too many requests", "try again in 30 s"),
        ((429, {"Retry-After": "x" * 999}, b""), "{} answers 429: too many requests", "in a few minutes"),
        ((500, {}, b""), "{} has an internal fault: it answers 500", "try again later"),
        ((503, {}, PAGE), "{} has an internal fault: it answers 503", "HF_ENDPOINT names a mirror"),
        ((511, {}, PAGE), "{} answers with a web page instead of data", "log in with a browser"),
        (
            (200, {"Content-Type": "text/html; charset=utf-8"}, PAGE),
            "{} answers with a web page instead of data",
            "log in with a browser",
        ),
        ((200, {"Content-Type": "application/json"}, PAGE), "owner/model: its list of files is not", ""),
    ],
)
def test_a_refusal_of_the_hub_is_a_sentence_with_a_remedy(
    refusal: tuple[int, dict[str, str], bytes], sentence: str, hint: str
) -> None:
    with served({}, refusal=refusal) as server:
        host = server.url.removeprefix("http://")
        first, _, remedy = said(server.url).partition("\nhint: ")
    assert first.startswith(sentence.format(host))
    assert hint.format(host) in remedy


def test_a_token_that_is_refused_is_suspected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with served({}, token="another") as server:
        sentence = said(server.url)
    assert "that the token in HF_TOKEN is valid" in sentence
    assert "hf_secret" not in sentence


def test_a_list_without_a_length_is_read_to_its_end_and_no_further_than_its_bound() -> None:
    def body(data: bytes) -> bytes:
        return b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data)

    with served(directory_files(SMALL)) as server:
        whole = Hub(Source(server.url, REPOSITORY), most_bytes=1 << 20).list_files()
        data = json.dumps(true_listing(server)).encode()
        server.refusal = (200, {"Content-Length": "", "Transfer-Encoding": "chunked"}, body(data))
        assert Hub(Source(server.url, REPOSITORY), most_bytes=1 << 20).list_files() == whole
        server.refusal = (
            200,
            {"Content-Length": "", "Transfer-Encoding": "chunked"},
            body(data + b" " * (3 << 20)),
        )
        with pytest.raises(CheckpointError, match="bytes that are read"):
            Hub(Source(server.url, REPOSITORY), most_bytes=8 << 20).list_files()
