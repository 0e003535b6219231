"""Socket files, TLS, proxies and base paths: who is let in, and what is believed."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from argosy.directory import Directory
from argosy.errors import UsageError
from argosy.guard.keys import KeyFile, KeyRing
from argosy.guard.strangers import PER_MINUTE
from argosy.serve.answer.service import Service
from argosy.serve.app import make_app
from argosy.serve.http.listen import Certificate, Front, Listener, bind_file
from argosy.serve.http.origins import Site
from argosy.serve.run import require_keys_behind_proxy
from tests.cli.tiny_chat_model import write_chat_model
from tests.helpers.forks import ForkedArgosy
from tests.serve.conftest import only, start

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")


def make_certificate(folder: Path, name: str, *more: str) -> tuple[Path, Path]:
    """A certificate for localhost that signs itself, and its key."""
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-days", "2", *more,
         "-subj", f"/CN={name}", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
         "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    return certificate, key


# ── socket files ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_socket_file_has_its_mode_from_the_start_and_is_removed_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    for mode in (0o600, 0o660):
        with bind_file(path, mode) as sockets:
            assert stat.S_IMODE(path.stat().st_mode) == mode
            sockets[0].listen()
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(path))
        assert list(tmp_path.iterdir()) == []


def test_a_socket_file_never_has_another_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chmod by its path would come too late, and follow a link that has taken its place."""
    modes, bind = [], socket.socket.bind

    def bind_and_look(self: socket.socket, path: Any) -> None:
        bind(self, path)
        modes.append(stat.S_IMODE(os.stat(path).st_mode))

    monkeypatch.setattr(Listener, "bind", bind_and_look)
    before = os.umask(0)
    try:
        for mode in (0o600, 0o660, 0o666):
            with bind_file(tmp_path / "a.sock", mode):
                assert stat.S_IMODE((tmp_path / "a.sock").stat().st_mode) == mode
        assert os.umask(0) == 0  # as it was
    finally:
        os.umask(before)
    assert modes == [0o600, 0o660, 0o666]


@pytest.mark.parametrize("name", ["a.sock", ".a.sock.lock"])
def test_a_link_in_the_place_of_a_socket_or_its_lock_is_refused(tmp_path: Path, name: str) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"keep")
    before = victim.stat().st_mtime_ns, victim.stat().st_mode
    (tmp_path / name).symlink_to(victim)
    with (
        pytest.raises(UsageError, match=r"is not a socket|is a symbolic link"),
        bind_file(tmp_path / "a.sock", 0o666),
    ):
        pass
    assert (victim.stat().st_mtime_ns, victim.stat().st_mode) == before
    assert victim.read_bytes() == b"keep"
    assert (tmp_path / name).is_symlink()


def test_a_socket_that_nobody_answers_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    with bind_file(path, 0o600) as sockets:
        sockets[0].listen()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


def test_a_socket_that_may_not_be_removed_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is another user's, in a directory such as /tmp."""

    def refuse(directory: Directory, name: str) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(tmp_path / "a.sock"))
    monkeypatch.setattr(Directory, "remove", refuse)
    with (
        pytest.raises(UsageError, match=r"a\.sock cannot be replaced: Operation not permitted"),
        bind_file(tmp_path / "a.sock", 0o600),
    ):
        pass


def test_a_socket_in_use_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen(0)
        with pytest.raises(UsageError, match="another server listens on"), bind_file(path, 0o600):
            pass
        waiting = [socket.socket(socket.AF_UNIX) for _ in range(2)]
        for one in waiting:  # its queue is full
            one.setblocking(False)
            one.connect_ex(str(path))
        with pytest.raises(UsageError, match="another server listens on"), bind_file(path, 0o600):
            pass
        for one in waiting:
            one.close()
    assert path.is_socket()


def test_a_server_that_loads_its_model_keeps_its_socket_file(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with bind_file(path, 0o600):
        with pytest.raises(UsageError, match="or is about to"), bind_file(path, 0o600):
            pass
        assert path.is_socket()
        path.unlink()
        path.write_text("another program's")
    assert path.read_text() == "another program's"


@pytest.mark.parametrize(
    ("name", "fault"),
    [("file", "exists and is not a socket"), ("x" * 120, "is too long"), ("none/a.sock", "no socket can be made in")],
)  # fmt: skip
def test_a_path_that_cannot_be_a_socket_is_refused(tmp_path: Path, name: str, fault: str) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UsageError, match=fault), bind_file(tmp_path / name, 0o600):
        pass
    assert (tmp_path / "file").read_text() == "precious"


def test_connections_beyond_a_listeners_limit_are_closed(tmp_path: Path) -> None:
    with bind_file(tmp_path / "a.sock", 0o600) as (listener,):
        listener.listen()
        listener.limit(2)
        clients = [socket.socket(socket.AF_UNIX) for _ in range(4)]
        for client in clients:
            client.connect(str(tmp_path / "a.sock"))
        taken = [listener.accept()[0] for _ in range(2)]
        with pytest.raises(ConnectionAbortedError):
            listener.accept()
        assert clients[2].recv(1) == b""
        taken.pop().close()
        taken.append(listener.accept()[0])
        for one in (*clients, *taken):
            one.close()


# ── TLS ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@needs_openssl
def test_a_certificate_is_refused_with_the_reason(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, "one", "-nodes")
    _, other_key = make_certificate(tmp_path, "two", "-nodes")
    _, locked_key = make_certificate(tmp_path, "three", "-passout", "pass:secret")
    context = Certificate(certificate, key).context
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    for mode in (0o604, 0o620, 0o644):
        key.chmod(mode)
        with pytest.raises(UsageError, match=f"other users can access the key .*: its mode is {mode:04o}"):
            Certificate(certificate, key)
    key.chmod(0o640)
    Certificate(certificate, key)
    with pytest.raises(UsageError, match="are not a certificate and its key: key values mismatch"):
        Certificate(certificate, other_key)
    with pytest.raises(UsageError, match="is encrypted, and the server cannot ask"):
        Certificate(tmp_path / "three.pem", locked_key)
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        Certificate(tmp_path / "none.pem", key)
    with pytest.raises(UsageError, match="is not a PEM file"):
        Certificate(tmp_path, key)
    (tmp_path / "text.pem").write_text("no certificate")
    with pytest.raises(UsageError, match="are not a certificate and its key"):
        Certificate(tmp_path / "text.pem", key)


# ── proxies and base paths ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_proxy_needs_keys() -> None:
    with pytest.raises(UsageError, match="names a proxy, which admits other machines, but there are no keys"):
        require_keys_behind_proxy(Front(proxies=("127.0.0.1",)), None)
    require_keys_behind_proxy(Front(), None)
    require_keys_behind_proxy(Front(proxies=("unix",)), Path("keys.json"))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[KeyFile, str]:
    keys = KeyFile(tmp_path_factory.mktemp("keys") / "keys.json")
    return keys, keys.add("one", scopes=("infer", "metrics"))[1]


@pytest.fixture(scope="module")
def proxied(service: Service, keys: tuple[KeyFile, str]) -> Iterator[httpx.Client]:
    """A server that believes 127.0.0.1, where its client is."""
    front = Front(proxies=("127.0.0.1", "10.0.0.0/8"), base_path="/argosy")
    app = make_app(
        only(service),
        KeyRing(keys[0]),
        block_tokens=16,
        max_sequences=8,
        site=Site(base_path=front.base_path),
    )
    for url in start(app, front=front):
        with httpx.Client(base_url=url) as client:
            yield client


def statuses(client: httpx.Client, num: int, **headers: str) -> list[int]:
    found = {name.replace("_", "-"): value for name, value in headers.items()}
    return [client.get("/argosy/v1/models", headers=found).status_code for _ in range(num)]


def test_strangers_behind_a_proxy_are_limited_each_by_their_own_address(
    proxied: httpx.Client, keys: tuple[KeyFile, str]
) -> None:
    num = PER_MINUTE + 10
    found = statuses(proxied, num, x_forwarded_for="198.51.100.1, 10.0.0.9")
    assert found[:PER_MINUTE] == [401] * PER_MINUTE
    assert found[-1] == 429
    assert statuses(proxied, 1, x_forwarded_for="198.51.100.2, 10.0.0.9") == [401]
    # The address before it is what the client said of itself.
    assert statuses(proxied, 1, x_forwarded_for="203.0.113.5, 198.51.100.1") == [429]
    refused = proxied.get("/argosy/v1/models", headers={"x-forwarded-for": "198.51.100.1"})
    assert refused.headers["connection"] == "close"
    assert int(refused.headers["retry-after"]) > 0
    valid = {"authorization": f"Bearer {keys[1]}", "x_forwarded_for": "198.51.100.1"}
    assert statuses(proxied, 1, **valid) == [200]


def test_a_client_that_is_no_proxy_is_not_believed(service: Service, keys: tuple[KeyFile, str]) -> None:
    app = make_app(only(service), KeyRing(keys[0]), block_tokens=16, max_sequences=8)
    for url in start(app, front=Front(proxies=("10.0.0.0/8",))):
        with httpx.Client(base_url=url) as client:
            told = {"x-forwarded-for": "198.51.100.7"}
            found = [client.get("/v1/models", headers=told).status_code for _ in range(PER_MINUTE + 5)]
            assert set(found) == {401}  # those of an address of this machine are not limited


def test_pages_of_another_scheme_are_refused_where_the_proxy_speaks_tls(
    proxied: httpx.Client, keys: tuple[KeyFile, str]
) -> None:
    headers = {"authorization": f"Bearer {keys[1]}", "host": "localhost", "x-forwarded-proto": "https"}

    def status(origin: str, **more: str) -> int:
        sent = headers | {"origin": origin} | {name.replace("_", "-"): value for name, value in more.items()}
        return proxied.post("/argosy/tokenize", json={"content": "a"}, headers=sent).status_code

    assert status("https://localhost") == 200
    assert status("http://localhost") == 403
    assert status("http://localhost", x_forwarded_proto="http") == 200


def test_every_path_begins_with_the_base_path(proxied: httpx.Client, keys: tuple[KeyFile, str]) -> None:
    headers = {"authorization": f"Bearer {keys[1]}"}
    assert proxied.get("/argosy/health").status_code == 200
    assert proxied.get("/argosy/v1/models", headers=headers).status_code == 200
    for path in ("/health", "/", "/argosyx/health", "/argosy/argosy/health"):
        assert proxied.get(path).status_code == 404
    answer = proxied.get("/argosy", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (308, "/argosy/")
    assert proxied.post("/argosy", json={}).status_code == 404
    document = proxied.get("/argosy/openapi.json").json()
    assert document["servers"] == [{"url": "/argosy"}]
    assert "/v1/models" in document["paths"]
    error = proxied.post("/argosy/v1/messages", json={}).json()
    assert error["type"] == "error"  # the dialect follows the path on the server
    assert 'route="/health"' in proxied.get("/argosy/metrics", headers=headers).text


def test_the_page_loads_its_files_from_below_its_own_address(proxied: httpx.Client) -> None:
    page = proxied.get("/argosy/").text
    links = re.findall(r'(?:src|href)="([^"#]+)"', page)
    assert len(links) >= 4
    for link in links:
        assert not link.startswith("/")
        assert proxied.get(f"/argosy/{link}").status_code == 200


# ── a whole server ──────────────────────────────────────────────────────────────────────────────────────────────────


@needs_openssl
def test_a_server_of_a_file_of_settings_speaks_tls_on_a_socket_file_and_logs_json(tmp_path: Path) -> None:
    write_chat_model(tmp_path / "model")
    make_certificate(tmp_path, "first", "-nodes")
    make_certificate(tmp_path, "second", "-nodes")
    path, live = tmp_path / "a.sock", [tmp_path / "live.pem", tmp_path / "live.key"]

    def use(name: str) -> None:
        for target, source in zip(live, (f"{name}.pem", f"{name}.key"), strict=True):
            shutil.copy(tmp_path / source, target)
            target.chmod(0o600)

    use("first")
    (tmp_path / "serve.toml").write_text(
        'models = ["./model"]\nmemory = "1GiB"\nlisten = "unix:a.sock"\nsocket-mode = "0660"\nbase-path = "/llm"\n'
        'tls-cert = "live.pem"\ntls-key = "live.key"\nlog-format = "json"\nmax-connections = 4\n'
        'policy = "policy.toml"\n'
    )
    policy = tmp_path / "policy.toml"
    policy.write_text('default = "a"\n[policies.a]\npii-input = "block"\n')
    process = ForkedArgosy[str](
        ["serve", "--config", tmp_path / "serve.toml"], stderr=subprocess.PIPE, text=True
    )
    timer = threading.Timer(240, process.kill)
    timer.start()
    assert process.stderr is not None
    try:
        lines = [process.stderr.readline()]
        assert json.loads(lines[0])["address"] == f"unix:{path}/llm", lines

        def ask(name: str, path_of_route: str = "/tokenize", **body: str) -> int:
            """Ask with the certificate `name` as the only one that is trusted."""
            trust = ssl.create_default_context(cafile=str(tmp_path / f"{name}.pem"))
            with httpx.Client(
                transport=httpx.HTTPTransport(uds=str(path), verify=trust), timeout=60
            ) as client:
                asked = body or {"content": "canary"}
                return client.post(f"https://localhost/llm{path_of_route}", json=asked).status_code

        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert ask("first") == 200
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            ask("second")
        live[0].write_text("damaged")
        process.send_signal(signal.SIGHUP)
        lines.append(process.stderr.readline())  # of the request
        lines.append(process.stderr.readline())
        assert "the certificate in use stays" in json.loads(lines[-1])["message"]
        lines.append(process.stderr.readline())
        assert "the policies were read again, sha256 " in json.loads(lines[-1])["message"]
        assert ask("first") == 200
        lines.append(process.stderr.readline())
        use("second")
        policy.write_text('default = "b"\n')
        process.send_signal(signal.SIGHUP)
        lines.append(process.stderr.readline())
        assert "read again" in json.loads(lines[-1])["message"]
        lines.append(process.stderr.readline())
        assert "policy: the policies in use stay: " in json.loads(lines[-1])["message"]
        assert ask("second") == 200
        lines.append(process.stderr.readline())
        assert ask("second", "/v1/completions", prompt="to canary@example.com") == 400
        process.send_signal(signal.SIGTERM)
        lines += process.communicate()[1].splitlines()
        assert process.returncode == 0
    finally:
        timer.cancel()
        process.kill()
        process.wait()
        process.stderr.close()
    assert not path.exists()
    told = [json.loads(line) for line in lines]
    assert all(line["time"].endswith("+00:00") and line["level"] in ("info", "error") for line in told)
    requests = [line for line in told if line["event"] == "request"]
    assert [(line["route"], line["status"], line["key"]) for line in requests] == [
        *[("/tokenize", 200, "local")] * 3, ("/v1/completions", 400, "local"),
    ]  # fmt: skip
    assert "canary" not in "".join(lines)
