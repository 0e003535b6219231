"""Pictures at addresses: nothing is fetched by default, and only from allowed hosts, at public addresses, in bounds."""

from __future__ import annotations

import asyncio
import gzip
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, Mock

import httpx
import pytest
from click.testing import CliRunner

from argosy.cli.commands.serve import serve
from argosy.errors import Overloaded, UsageError
from argosy.guard.keys import KeyRing
from argosy.media.parts import Image, MediaLimits
from argosy.open.engine import Engine
from argosy.serve.answer import media_hosts
from argosy.serve.answer.media_hosts import MOST_FILES, HttpsNetwork, MediaHosts, is_public
from argosy.serve.answer.service import Service
from argosy.serve.app import make_app
from argosy.serve.http.held import Files, Pool, PoolShare
from tests.media.samples import pattern, png
from tests.serve.conftest import only, serving, start
from tests.serve.dialects import MAX_TOKENS, PATHS, TOOLS
from tests.serve.seeing_model import write_seeing_model
from tests.serve.test_replaced import read_tool, text

HOST = "images.example.org"
CAT = png(pattern(40, 60))
PUBLIC = "93.184.215.14"


class FakeNetwork:
    """Records what is resolved and connected to; a connection leads to `port` of this machine."""

    def __init__(self, addresses: Sequence[str] = (PUBLIC,), port: int | None = None) -> None:
        self.addresses, self.port = addresses, port
        self.resolved: list[str] = []
        self.connected: list[tuple[str, str]] = []

    def resolve(self, host: str) -> Sequence[str]:
        self.resolved.append(host)
        if not self.addresses:
            raise socket.gaierror("unknown")
        return self.addresses

    def connect(self, host: str, address: str, timeout_s: float) -> socket.socket:
        self.connected.append((host, address))
        if self.port is None:
            raise ConnectionRefusedError
        return socket.create_connection(("127.0.0.1", self.port), timeout=timeout_s)


def hosts(network: FakeNetwork, **more: Any) -> MediaHosts:
    return MediaHosts([HOST], network=lambda: network, **more)


def fetch(one: MediaHosts, address: str, share: PoolShare | None = None) -> bytes | str:
    files = Files(wanted={address: None})
    asyncio.run(one.fetch(files, share or Pool().share(), ""))
    return files.found[address]


# Addresses

SCHEMES = (
    "http", "ftp", "file", "gopher", "dict", "ldap", "jar", "data", "blob", "javascript", "ws", "wss", "https+unix",
    "unix", "s3", "gs", "about", "view-source:https", "url:https", "HTTPS2", "htps", "httpsx", "git+https",
)  # fmt: skip
ELSEWHERE = (
    "127.0.0.1", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0", "0.0.0.0", "localhost", "localhost.",
    "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[fe80::1%25eth0]", "169.254.169.254", "[fd00:ec2::254]",
    "metadata.google.internal", "metadata", "10.0.0.1", "192.168.0.1", "172.16.0.1", "100.64.0.1", "1.1.1.1",
    "example.org", "evil.org", "images.example.org.evil.org", "evilimages.example.org", "a.images.example.org",
    "images.example.org.", ".images.example.org", "images..example.org", "images.example.com", "images-example.org",
    "imagesXexample.org", "127.0.0.1.nip.io", "xn--images-example-org", "images.example.orgevil.org", "-", "*",
    "images.example.org-evil.org", "images.example.or", "mages.example.org", "images.example", "",
)  # fmt: skip
DOTS = ("\u3002", "\uff0e", "\uff61", "\u2024", "%2e", "%252e")
LETTERS = (
    "\u0456",
    "\uff49",
    "\u2170",
    "\u0131",
    "\u1d62",
    "\u24d8",
    "%69",
    "i\u0307",
    "i\u200b",
    "i\u00ad",
    "i\u2060",
)
CONTROLS = (
    "\x00",
    "\t",
    "\n",
    "\r",
    "\r\n",
    " ",
    "\x0b",
    "\x0c",
    "\x1b",
    "\x7f",
    "\x85",
    "\xa0",
    "\u2028",
    "\ufeff",
)
OTHER = (
    f"https://user@{HOST}/a", f"https://user:word@{HOST}/a", f"https://{HOST}@evil.org/a", f"https://{HOST}:x@evil.org/a",
    f"https://evil.org@{HOST}/a", f"https://{HOST}%40evil.org/a", f"https://{HOST}%2f@evil.org/a",
    f"https://@{HOST}/a", f"https://:@{HOST}/a", f"https://{HOST}:443/a", f"https://{HOST}:80/a", f"https://{HOST}:22/a",
    f"https://{HOST}:/a", f"https://{HOST}:443@evil.org/", f"https://{HOST}:65536/a", f"https://{HOST}:-1/a",
    f"https://{HOST}:0443/a", f"https://{HOST}\\@evil.org/a", f"https://{HOST}\\.evil.org/a", f"https:\\\\{HOST}\\a",
    f"https:/\\{HOST}/a", f"https:\\/{HOST}/a", f"https://evil.org\\@{HOST}/a", f"https://evil.org#@{HOST}/a",
    f"https://evil.org?@{HOST}/a", f"https://evil.org/@{HOST}", f"https://evil.org/https://{HOST}/a",
    f"https://{HOST}#@evil.org/a", f"https://{HOST}/a#b", f"https://{HOST}#", f"https:///{HOST}/a", f"https:/{HOST}/a",
    f"https:{HOST}/a", f"https;//{HOST}/a", f"https//{HOST}/a", f"//{HOST}/a", f"/{HOST}/a", f"{HOST}/a", HOST,
    f"https://[{HOST}]/a", f"https://({HOST})/a", f"https://<{HOST}>/a", f"https://{HOST};evil.org/a",
    f"https://{HOST},evil.org/a", f"https://{HOST}|evil.org/a", f"https://{HOST}&evil.org/a", f"https://{HOST}$/a",
    f"https://{HOST}`/a", f"https://{HOST}^/a", f"https://{HOST}_/a", f"https://{{{HOST}}}/a", f"https://{HOST}%/a",
    f"https://{HOST}/%", f"https://{HOST}/%2", f"https://{HOST}/%zz", f"https://{HOST}/\\..\\a", f"https://{HOST}/<b>",
    f"https://{HOST}/{{a}}", f"https://{HOST}/a|b", f"https://{HOST}/a^b", f"https://{HOST}/a`b", f'https://{HOST}/a"b',
    f"https://{HOST}/\u00e9", f"https://{HOST}/a?\u00e9", f"https://{HOST}/?a[]=1", f"https://{HOST}/{'a' * 4100}",
    f"![a](https://{HOST}/a)", f"see https://{HOST}/a", f'<img src="https://{HOST}/a">', f"https://{HOST}/a HTTP/1.1",
    f"https://{HOST}/a\r\nHost: evil.org", f"https://{HOST} /a", f"https:// {HOST}/a", f"https://https://{HOST}/a",
)  # fmt: skip
TRICKS = sorted({
    *(f"{scheme}://{HOST}/a.png" for scheme in SCHEMES),
    *(f"https://{other}/a.png" for other in ELSEWHERE),
    *(f"https://images{dot}example.org/a.png" for dot in DOTS),
    *(f"https://{letter}mages.example.org/a.png" for letter in LETTERS),
    *(f"{control}https://{HOST}/a.png" for control in CONTROLS),
    *(f"https://{HOST}/a.png{control}" for control in CONTROLS),
    *(f"https://images{control}.example.org/a.png" for control in CONTROLS),
    *(f"https://{HOST}{control}/a.png" for control in CONTROLS),
    *(f"ht{control}tps://{HOST}/a.png" for control in CONTROLS),
    *OTHER,
})  # fmt: skip


def test_there_are_at_least_150_tricks() -> None:
    assert len(TRICKS) >= 150


def test_no_trick_opens_a_connection_or_looks_up_a_name() -> None:
    network = FakeNetwork()
    one = hosts(network)
    for trick in TRICKS:
        found = fetch(one, trick)
        assert isinstance(found, str), trick
        assert found.startswith(("an address must have the form", "its host is none of those")), trick
    assert (network.resolved, network.connected) == ([], [])


@pytest.mark.parametrize(
    ("address", "path"),
    [
        (f"https://{HOST}", "/"),
        (f"https://{HOST}/", "/"),
        (f"HTTPS://{HOST.upper()}/a.PNG", None),
        (f"https://{HOST}?size=1", "/?size=1"),
        (f"https://{HOST}/a/../b%20c.png?x=1&y=a/b?c@d:e", "/a/../b%20c.png?x=1&y=a/b?c@d:e"),
        (f"https://{HOST}/a@b:c;d=(e)!*'$,+~_-.png", "/a@b:c;d=(e)!*'$,+~_-.png"),
    ],
)
def test_an_address_of_the_one_form_is_requested_as_it_is(address: str, path: str | None) -> None:
    if path is None:
        address, path = address.replace("HTTPS", "https", 1), "/a.PNG"
    with answering(OK) as (port, requests):
        network = FakeNetwork(port=port)
        assert fetch(hosts(network), address) == CAT
    assert network.resolved == [HOST]
    assert network.connected == [(HOST, PUBLIC)]
    head = requests[0].decode().split("\r\n")
    assert head[0] == f"GET {path} HTTP/1.1"
    assert head[1] == f"Host: {HOST}"
    assert sorted(line.lower() for line in head[2:] if line) == [
        "accept-encoding: identity", "accept: image/*, audio/*, video/*", "connection: close",
    ]  # fmt: skip


PRIVATE = (
    "127.0.0.1", "127.255.255.254", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1",
    "169.254.169.254", "100.64.0.1", "192.0.0.1", "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1",
    "239.255.255.255", "240.0.0.1", "255.255.255.255", "::", "::1", "::ffff:127.0.0.1", "::ffff:93.184.215.14",
    "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::1", "100::1", "2001::1", "2001:db8::1", "2002:7f00:1::", "fc00::1",
    "fd00:ec2::254", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "3fff::1", "5f00::1", "not an address", "",
)  # fmt: skip


@pytest.mark.parametrize("private", PRIVATE)
def test_a_host_with_an_address_that_is_not_public_is_never_connected_to(private: str) -> None:
    assert not is_public(private)
    for addresses in ([private], [PUBLIC, private]):
        network = FakeNetwork(addresses)
        assert fetch(hosts(network), f"https://{HOST}/a") == f"{HOST}: it has an address that is not public"
        assert network.connected == []


def test_public_addresses_are_public() -> None:
    for address in (PUBLIC, "8.8.8.8", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"):
        assert is_public(address)


def test_the_name_is_resolved_once_and_the_next_address_is_tried() -> None:
    with answering(OK) as (port, _):
        network = FakeNetwork(["93.184.215.14", "8.8.8.8", "8.8.4.4"], port)
        connect = network.connect

        def refuse_first(host: str, address: str, timeout_s: float) -> socket.socket:
            if not network.connected:
                network.connected.append((host, address))
                raise ConnectionRefusedError
            return connect(host, address, timeout_s)

        network.connect = refuse_first  # type: ignore[method-assign]
        assert fetch(hosts(network), f"https://{HOST}/a") == CAT
    assert network.resolved == [HOST]
    assert network.connected == [(HOST, "93.184.215.14"), (HOST, "8.8.8.8")]


@pytest.mark.parametrize(
    "name",
    [
        "", "*", "*.example.org", "https://example.org", "example.org/a", "example.org:443", "user@example.org",
        "localhost", "127.0.0.1", "1.1.1.1", "0x7f.1", "1.0x7f", "[::1]", "ex ample.org", "example..org",
        ".example.org", "example.org.", "b\u00fccher.example", "-a.example.org", "a-.example.org",
        "a" * 64 + ".example.org", "example.org\n",
    ],
)  # fmt: skip
def test_an_allowed_host_is_a_plain_name(name: str) -> None:
    with pytest.raises(UsageError, match="--media-host must be a host name"):
        MediaHosts([name], network=FakeNetwork)


@pytest.mark.parametrize("names", [(), (HOST,), (HOST, "cdn.example.org"), ("localhost",)])
def test_the_command_line_names_the_hosts(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[MediaHosts | None] = []
    monkeypatch.setattr("argosy.cli.commands.serve.open_engine", lambda *_, **__: MagicMock())
    monkeypatch.setattr("argosy.serve.models.entry.facts_of_engine", Mock())
    monkeypatch.setattr("argosy.open.models.locate_model", Mock(side_effect=UsageError("no model")))
    monkeypatch.setattr(
        "argosy.serve.run.serve",
        lambda offers, sockets, settings, **_: given.append(settings.media_hosts),
    )
    options = [option for name in names for option in ("--media-host", name)]
    result = CliRunner().invoke(serve, ["model", "--port", "0", *options])
    if names == ("localhost",):
        assert isinstance(result.exception, UsageError)
        assert given == []
        return
    assert result.exception is None
    assert [one and one.names for one in given] == [frozenset(names) if names else None]


# Answers

Serve = Callable[[socket.socket], None]


def answer(status: str, *headers: str, body: bytes = b"") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""]).encode() + body


OK = answer("200 OK", f"Content-Length: {len(CAT)}", body=CAT)


@contextmanager
def answering(given: bytes | Serve) -> Iterator[tuple[int, list[bytes]]]:
    """A server that reads one request head per connection and answers; yields its port and the heads."""
    heads: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    head = b""
                    while b"\r\n\r\n" not in head and (part := connection.recv(4096)):
                        head += part
                    heads.append(head)
                    with suppress(OSError):
                        if isinstance(given, bytes):
                            connection.sendall(given)
                        else:
                            given(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1], heads
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(10)


CHUNKED = answer("200 OK", "Transfer-Encoding: chunked", body=b"%x\r\n" % len(CAT) + CAT + b"\r\n0\r\n\r\n")
SMALL = MediaLimits(file_bytes=10_000)
ANSWERS: dict[str, tuple[bytes, str | None]] = {
    "chunks": (CHUNKED, None),
    "no length": (answer("200 OK", body=CAT), None),
    "identity": (answer("200 OK", "Content-Encoding: identity", body=CAT), None),
    "a continue first": (answer("100 Continue") + OK, None),
    "a redirect": (answer("302 Found", "Location: http://127.0.0.1/"), "it answered with status 302"),
    "a permanent redirect": (answer("308 Moved", f"Location: https://{HOST}/b"), "it answered with status 308"),
    "not modified": (answer("304 Not Modified"), "it answered with status 304"),
    "a part": (answer("206 Partial Content", body=CAT), "it answered with status 206"),
    "not found": (answer("404 Not Found", body=b"secret page"), "it answered with status 404"),
    "gzip": (answer("200 OK", "Content-Encoding: gzip", body=gzip.compress(CAT)), "its answer is compressed"),
    "br": (answer("200 OK", "Content-Encoding: br", body=b"x"), "its answer is compressed"),
    "an announced large file": (answer("200 OK", "Content-Length: 10001"), "the file has more than 10,000 bytes"),
    "a large file": (answer("200 OK", body=b"x" * 10_001), "the file has more than 10,000 bytes"),
    "a larger file than announced": (
        answer("200 OK", "Content-Length: 5", "Transfer-Encoding: chunked", body=b"2711\r\n" + b"x" * 10_001),
        "the file has more than 10,000 bytes",
    ),
    "less than announced": (answer("200 OK", "Content-Length: 99", body=b"x"), "its answer is incomplete"),
    "a chunk too short": (answer("200 OK", "Transfer-Encoding: chunked", body=b"99\r\nx"), "the connection failed"),
    "a chunk of no size": (answer("200 OK", "Transfer-Encoding: chunked", body=b"zz\r\n"), "the connection failed"),
    "nothing": (b"", "the connection failed"),
    "no HTTP": (b"SSH-2.0-OpenSSH\r\n", "the connection failed"),
    "a long status": (b"HTTP/1.1 200 " + b"a" * 70_000 + b"\r\n", "the connection failed"),
    "many headers": (answer("200 OK", *["a: b"] * 200, body=CAT), "the connection failed"),
    "a long header": (answer("200 OK", "a: " + "b" * 70_000, body=CAT), "the connection failed"),
}  # fmt: skip


@pytest.mark.parametrize("what", ANSWERS)
def test_an_answer_is_taken_only_whole_plain_and_within_its_size(what: str) -> None:
    given, fault = ANSWERS[what]
    pool = Pool()
    with answering(given) as (port, requests):
        network = FakeNetwork(port=port)
        found = fetch(hosts(network, limits=SMALL), f"https://{HOST}/a", pool.share())
    assert found == (CAT if fault is None else f"{HOST}: {fault}")
    assert len(requests) == len(network.connected) == 1  # no redirect, no second try
    assert pool.peak_bytes <= 10_000 * 9 // 8 + media_hosts._READ_BYTES


def drip(byte: bytes) -> Serve:
    def serve(connection: socket.socket) -> None:
        for _ in range(500):
            connection.sendall(byte)
            time.sleep(0.02)

    return serve


def drip_body(connection: socket.socket) -> None:
    connection.sendall(answer("200 OK"))
    drip(b"x")(connection)


def drip_continues(connection: socket.socket) -> None:
    drip(answer("100 Continue"))(connection)


@pytest.mark.parametrize(
    "serve", [drip(b"H"), drip_body, drip_continues, lambda connection: connection.recv(1)]
)
def test_a_slow_host_is_left_after_the_time_for_one_file(serve: Serve) -> None:
    with answering(serve) as (port, _):
        began = time.monotonic()
        one = hosts(FakeNetwork(port=port), fetch_s=0.2)
        assert fetch(one, f"https://{HOST}/a") == f"{HOST}: it took more than 0.2 seconds"
        assert time.monotonic() - began < 3


def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with answering(OK) as (port, _):
        assert fetch(hosts(FakeNetwork(port=port)), f"https://{HOST}/a") == CAT


def test_a_fetched_file_is_charged_and_refused_if_there_is_no_room() -> None:
    pool = Pool(len(CAT) // 2)
    with answering(OK) as (port, _), pytest.raises(Overloaded):
        fetch(hosts(FakeNetwork(port=port)), f"https://{HOST}/a", pool.share())
    share = Pool().share()
    with answering(OK) as (port, _):
        fetch(hosts(FakeNetwork(port=port)), f"https://{HOST}/a", share)
    assert share.num_bytes >= len(CAT)


def test_few_files_are_fetched_at_once_and_a_request_names_few() -> None:
    lock, running, most = threading.Lock(), 0, 0

    class Slow(FakeNetwork):
        def resolve(self, host: str) -> Sequence[str]:
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
            time.sleep(0.1)
            with lock:
                running -= 1
            return [PUBLIC]

    one = hosts(Slow())
    files = Files(wanted=dict.fromkeys(f"https://{HOST}/{number}" for number in range(MOST_FILES)))
    asyncio.run(one.fetch(files, Pool().share(), ""))
    assert most == 4
    assert files.wanted == {}
    files.wanted[f"https://{HOST}/more"] = None
    with pytest.raises(UsageError, match="may name at most 16 files at other hosts"):
        asyncio.run(one.fetch(files, Pool().share(), ""))


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={HOST}",
         "-addext", f"subjectAltName=DNS:{HOST}", "-keyout", folder / "key.pem", "-out", folder / "cert.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    return folder


@pytest.mark.parametrize(
    ("name", "is_trusted", "expected"),
    [
        (HOST, True, CAT),
        (HOST, False, f"{HOST}: its certificate or its TLS is not accepted"),
        ("other.example.org", True, "other.example.org: its certificate or its TLS is not accepted"),
    ],
)
def test_the_host_proves_its_name_at_the_address_that_was_checked(
    certificate: Path, monkeypatch: pytest.MonkeyPatch, name: str, is_trusted: bool, expected: bytes | str
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    named: list[str | None] = []
    context.sni_callback = lambda _, name, __: named.append(name)

    def serve(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secured:
            secured.recv(4096)
            secured.sendall(OK)

    opened: list[Any] = []

    def create_connection(address: Any, timeout: float | None = None) -> socket.socket:
        opened.append(address)
        return connect(("127.0.0.1", port), timeout=timeout)

    network = HttpsNetwork()
    if is_trusted:
        network._context.load_verify_locations(certificate / "cert.pem")
    monkeypatch.setattr(network, "resolve", lambda host: [PUBLIC])
    connect = socket.create_connection
    with answering_raw(serve) as port:
        monkeypatch.setattr(socket, "create_connection", create_connection)
        assert fetch(MediaHosts([name], network=lambda: network), f"https://{name}/a") == expected
    assert opened == [(PUBLIC, 443)]
    assert named == [name]


@contextmanager
def answering_raw(serve: Serve) -> Iterator[int]:
    """A server that leaves a connection to `serve`."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            connection, _ = listener.accept()
            with connection, suppress(OSError):
                serve(connection)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
    thread.join(10)


# Requests


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    model = write_seeing_model(tmp_path_factory.mktemp("hosts") / "model")
    with Engine.open(model, memory="3GiB", threads=1, grammars=True) as engine, serving(engine) as made:
        yield made


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    yield from start(make_app(only(service), KeyRing(None), block_tokens=16, max_sequences=4))


@pytest.fixture
def prompts(service: Service, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = []
    submit = service.loop.submit

    def spied(prompt: Any, *given: Any, **more: Any) -> Any:
        found.append(prompt)
        return submit(prompt, *given, **more)

    monkeypatch.setattr(service.loop, "submit", spied)
    return found


def address_part(dialect: str, address: str) -> dict[str, Any]:
    return {
        "chat": {"type": "image_url", "image_url": {"url": address}},
        "responses": {"type": "input_image", "image_url": address},
        "messages": {"type": "image", "source": {"type": "url", "url": address}},
    }[dialect]


def converse(url: str, dialect: str, conversation: list[dict[str, Any]], **more: Any) -> httpx.Response:
    name = "input" if dialect == "responses" else "messages"
    body = {name: conversation, MAX_TOKENS[dialect]: 3, "temperature": 0} | more
    return httpx.post(url + PATHS[dialect], json=body, timeout=60)


every_dialect = pytest.mark.parametrize("dialect", ["chat", "responses", "messages"])


@pytest.fixture
def network_use(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Everything that this process looks up or connects to."""
    used: list[Any] = []
    connect, getaddrinfo = socket.socket.connect, socket.getaddrinfo

    def spied_connect(self: socket.socket, address: Any) -> None:
        used.append(address[0])
        connect(self, address)

    def spied_getaddrinfo(host: Any, *given: Any, **more: Any) -> Any:
        used.append(host)
        return getaddrinfo(host, *given, **more)

    monkeypatch.setattr(socket.socket, "connect", spied_connect)
    monkeypatch.setattr(socket, "getaddrinfo", spied_getaddrinfo)
    return used


@every_dialect
def test_by_default_no_address_is_opened(url: str, dialect: str, network_use: list[Any]) -> None:
    for address in (f"https://{HOST}/cat.png", "http://127.0.0.1:9/a", f"HTTPS://{HOST}"):
        refused = converse(url, dialect, [{"role": "user", "content": [address_part(dialect, address)]}])
        assert refused.status_code == 400
        assert "found an address" in refused.json()["error"]["message"]
        assert "this server opens no address and keeps no files; send" in refused.json()["error"]["message"]
    parts = [address_part(dialect, trick) for trick in TRICKS]
    noted = converse(url, dialect, read_tool(dialect, parts, []))
    assert "maximum" in noted.text  # all of them became notes, and these are more than the context holds
    assert set(network_use) == {"127.0.0.1"}  # the tests' own requests


@every_dialect
def test_a_picture_of_an_allowed_host_is_the_picture_itself(
    service: Service, url: str, prompts: list[Any], dialect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with answering(OK) as (port, requests):
        network = FakeNetwork(port=port)
        monkeypatch.setattr(service, "_media_hosts", hosts(network))
        part = address_part(dialect, f"https://{HOST}/cat.png")
        content = [text(dialect, "What is"), part, text(dialect, "and"), part]
        asked = converse(url, dialect, [{"role": "user", "content": content}])
        assert asked.status_code == 200, asked.text
        assert "x-replaced-blocks" not in asked.headers
        assert len(requests) == 1  # named twice, fetched once
        if dialect == "responses":  # the address is among the items that the server keeps
            more = {"previous_response_id": asked.json()["id"]}
            again = converse(url, dialect, [{"role": "user", "content": "And?"}], **more)
            assert again.status_code == 200, again.text
            assert len(requests) == 2
    digest = service.prompts.build([Image(CAT)]).spans[0][1].digest
    for prompt in prompts:
        assert [span.digest for _, span in prompt.spans] == [digest, digest]


@every_dialect
def test_what_cannot_be_fetched_is_refused_in_a_new_turn_and_a_note_in_the_result_of_a_tool(
    service: Service, url: str, prompts: list[Any], dialect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with answering(answer("404 Not Found", body=b"secret page")) as (port, _):
        monkeypatch.setattr(service, "_media_hosts", hosts(FakeNetwork(port=port)))
        part = address_part(dialect, f"https://{HOST}/cat.png")
        message = converse(url, dialect, [{"role": "user", "content": [part]}]).json()["error"]["message"]
        place = "input" if dialect == "responses" else "messages"
        sentence = f"the picture cannot be fetched: {HOST}: it answered with status 404"
        assert message.startswith(f"{place}.0.content.0: {sentence}\nhint: send ")
        assert "secret" not in message
        noted = converse(url, dialect, read_tool(dialect, [part], []), tools=TOOLS[dialect])
        assert noted.status_code == 200, noted.text
        assert f"[{part['type']} omitted: {sentence}]" in prompts[-1].text
        other = address_part(dialect, "https://evil.org/cat.png")
        message = converse(url, dialect, [{"role": "user", "content": [other]}]).json()["error"]["message"]
        assert "cannot be fetched: its host is none of those that this server may fetch from" in message
        assert HOST not in message


def test_routes_that_count_and_render_fetch_too(
    service: Service, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with answering(OK) as (port, requests):
        monkeypatch.setattr(service, "_media_hosts", hosts(FakeNetwork(port=port)))
        for path, name, dialect in (
            ("/v1/responses/input_tokens", "input", "responses"),
            ("/v1/messages/count_tokens", "messages", "messages"),
            ("/apply-template", "messages", "chat"),
        ):
            content = [address_part(dialect, f"https://{HOST}/cat.png")]
            found = httpx.post(url + path, json={name: [{"role": "user", "content": content}]}, timeout=60)
            assert found.status_code == 200, found.text
        assert len(requests) == 3


def test_an_address_in_a_text_is_only_text(
    service: Service, url: str, prompts: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = FakeNetwork()
    monkeypatch.setattr(service, "_media_hosts", hosts(network))
    said = f"![a](https://{HOST}/cat.png) <img src='https://{HOST}/cat.png'>"
    assert converse(url, "chat", [{"role": "user", "content": said}]).status_code == 200
    assert (network.resolved, network.connected, prompts[0].spans) == ([], [], ())


def test_fetched_bytes_are_given_back_once_the_prompt_is_built(
    service: Service, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    release = PoolShare.release

    def noted(share: PoolShare) -> None:
        held.append(share.num_bytes)
        release(share)

    large = png(pattern(300, 300))
    assert len(large) > 20_000
    with answering(answer("200 OK", body=large)) as (port, _):
        monkeypatch.setattr(service, "_media_hosts", hosts(FakeNetwork(port=port)))
        monkeypatch.setattr(PoolShare, "release", noted)
        part = address_part("chat", f"https://{HOST}/cat.png")
        assert converse(url, "chat", [{"role": "user", "content": [part]}]).status_code == 200
    until = time.monotonic() + 10
    while not held and time.monotonic() < until:
        time.sleep(0.01)
    assert held[0] < 20_000
