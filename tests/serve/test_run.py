"""`argosy serve` in its own process."""

from __future__ import annotations

import fcntl
import gc
import importlib
import json
import re
import resource
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from argosy.errors import UsageError
from argosy.guard.chain import verify
from argosy.guard.keys import KeyFile
from argosy.model.clock import PARTS
from argosy.open.engine import Engine
from argosy.prompt.replay import ReplayMemory
from argosy.serve.claims import TEXT_BYTES
from argosy.serve.guards.audited import AUDIT_BYTES
from argosy.serve.http import server as http_server
from argosy.serve.http.held import BODY_BYTES
from argosy.serve.http.listen import bind
from argosy.serve.http.running import Running
from argosy.serve.http.server import Endpoint
from tests.cli.tiny_chat_model import write_chat_model
from tests.helpers.command import run_argosy
from tests.helpers.forks import Forked, ForkedArgosy, argosy_command, call_in_fork


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("run") / "model")


def argosy_with(constants: str, *arguments: str) -> int:
    """Run `argosy` with other values of constants, given as JSON: so tests need not wait as long as users."""
    for name, value in json.loads(constants).items():
        module, _, constant = name.rpartition(".")
        found = importlib.import_module(module)
        assert hasattr(found, constant)
        setattr(found, constant, value)
    return argosy_command(*arguments)


@contextmanager
def served(
    model: Path, *options: str, constants: Mapping[str, float] | None = None
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run a server, with other `constants` if any are given; yield its address and process once it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        "serve", str(model), "--memory", "1GiB", "--port", str(port), "--max-sequences", "3",
    ]  # fmt: skip
    process = Forked[str](
        [argosy_with, json.dumps(constants or {}), *command, *options], stderr=subprocess.PIPE, text=True
    )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(3000):
            try:
                assert httpx.get(f"{url}/ready").status_code == 200
                break
            except httpx.TransportError:
                assert process.poll() is None
                time.sleep(0.01)
        yield url, process
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def until_refused(url: str) -> None:
    """Wait until a server that is shutting down refuses connections."""
    with suppress(httpx.TransportError):
        for _ in range(600):
            httpx.get(f"{url}/health")
        raise AssertionError("connections are still taken")


def end(process: subprocess.Popen[str]) -> str:
    """Wait for a process to end, and return its log."""
    timer = threading.Timer(30, process.kill)
    timer.start()
    log = process.communicate()[1]
    timer.cancel()
    return log


def test_a_served_model_answers_and_sigterm_lets_a_stream_finish(model: Path) -> None:
    with served(model) as (url, process):
        state = httpx.get(f"{url}/v1/engine/state").json()
        assert state["queue"]["max_sequences"] == 3
        assert ("replay", 16 << 20) in [(line["name"], line["bytes"]) for line in state["memory"]["lines"]]
        ask = {
            "messages": [{"role": "user", "content": "canary"}], "max_tokens": 150, "stream": True,
            "temperature": 0, "logit_bias": {"2": -100, "0": -100},
        }  # fmt: skip
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=ask, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] in ("stop", "length")
        log = end(process)
        assert process.returncode == 0
        assert "POST /v1/chat/completions 200" in log
        assert "canary" not in log


def test_metrics_have_predictions_beside_what_decode_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARGOSY_CACHE", str(tmp_path / "cache"))  # this machine may have been calibrated
    # Counters are sampled ten times a second. What lies between two samples counts if it has no prompt tokens.
    model = write_chat_model(tmp_path / "model", context_tokens=4096)
    ask = {
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 4000,
        "temperature": 0,
        "ignore_eos": True,
    }
    with served(model) as (url, process):
        before = httpx.get(f"{url}/metrics").text
        assert "argosy_expected{" not in before  # nothing was decoded yet
        after, answers = before, 0
        while "argosy_expected{" not in after and answers < 20:
            assert httpx.post(f"{url}/v1/chat/completions", json=ask, timeout=60).status_code == 200
            after, answers = httpx.get(f"{url}/metrics").text, answers + 1
        process.send_signal(signal.SIGTERM)
        log = end(process)

    def value(name: str, **labels: str) -> float:
        inner = ",".join(f'{key}="{value}"' for key, value in labels.items())
        (found,) = re.findall(rf"^{re.escape(f'{name}{{{inner}}}')} (\S+)$", after, re.MULTILINE)
        return float(found)

    spent = {part: value("argosy_seconds_total", part=part) for part in PARTS}
    assert min(spent.values()) >= 0
    assert spent["attention_and_dense"] > 0
    decode = {
        kind: value("argosy_expected", quantity="decode", unit="tok/s", value=kind)
        for kind in ("low", "likely", "high", "measured")
    }
    assert 0 < decode["low"] < decode["likely"] < decode["high"]
    assert decode["measured"] > 0
    for part in ("attention and dense", "expert compute", "waiting for reads", "overhead"):
        for kind in ("predicted", "measured"):
            assert 0 <= value("argosy_decode_step_seconds", part=part, value=kind) < 1
    (line,) = [line for line in log.splitlines() if line.startswith("expects ")]
    assert re.match(
        r"expects \S+ to \S+ tok/s for one answer, bound by .*; first token of a prompt of \d+ after", line
    )
    assert "(rates are guessed from the kind of processor: `argosy plan " in line


def test_a_server_with_an_unread_log_answers_and_ends(model: Path) -> None:
    with served(model, constants={"argosy.serve.http.log._CLOSE_S": 0.2}) as (url, process):
        assert process.stderr is not None
        size = fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, 4096)
        with httpx.Client(timeout=20) as client:
            for _ in range(size // 40):  # a log line has more than 40 bytes
                assert client.get(f"{url}/health").status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_conversations_are_rendered_by_the_engines_own_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise AssertionError(
            "another process for chat templates is started, which the memory plan does not count"
        )

    with Engine.open(write_chat_model(tmp_path / "model"), memory="2GiB", threads=1) as engine:
        monkeypatch.setattr("argosy.prompt.chat.Worker", refuse)
        prompts = engine.prompts.remembering(ReplayMemory())
        assert prompts.build([{"role": "user", "content": "hi"}], tenant="a").token_ids
        assert engine.prompts.build([{"role": "user", "content": "hi"}]).token_ids


def test_a_restart_restores_no_quota_and_a_revoked_key_leaves_no_file(model: Path, tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    headers = {}
    for name in ("spent", "revoked", "revoked meanwhile"):
        headers[name] = {"Authorization": f"Bearer {keys.add(name, tokens_per_day=20)[1]}"}

    def ask(url: str, name: str) -> int:
        body = {"prompt": name * 6, "max_tokens": 8}
        return httpx.post(f"{url}/v1/completions", json=body, headers=headers[name]).status_code

    def num_tenants() -> int:
        try:
            return len({path.parent for path in tmp_path.glob("kv/*/*.kv")})
        except FileNotFoundError:  # a folder went while it was listed
            return -1

    def wait_for(num: int) -> None:
        for _ in range(300):
            if num_tenants() == num:
                return
            time.sleep(0.02)
        raise AssertionError(f"{num_tenants()} tenants have files, expected {num}")

    options = ("--keys", str(keys.path), "--kv-dir", str(tmp_path / "kv"))
    often = {"argosy.guard.keys._LOOK_AGAIN_S": 0.05, "argosy.serve.admin.key_watch.LOOK_S": 0.05}
    with served(model, *options, constants=often) as (url, process):
        assert [ask(url, name) for name in headers] == [200, 200, 200]
        wait_for(3)
        assert run_argosy("keys", "revoke", "revoked", "--keys", keys.path).returncode == 0
        wait_for(2)
        assert ask(url, "revoked") == 401
        process.send_signal(signal.SIGTERM)
        assert "is revoked" in end(process)
    keys.revoke("revoked meanwhile")
    with served(model, *options) as (url, _):
        assert [ask(url, name) for name in headers] == [429, 401, 401]
        wait_for(1)


def test_an_audit_survives_a_kill_and_a_running_server_erases_a_key(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    key, secret = keys.add("laptop")
    admin = keys.add("admin", scopes=("admin",))[1]
    headers = {"Authorization": f"Bearer {secret}"}
    directory = tmp_path / "audit"
    body = {"prompt": "something said", "max_tokens": 4}

    options = ("--keys", str(keys.path), "--audit", str(directory), "--audit-content", "--log-format", "json")
    with served(model, *options) as (url, process):
        for _ in range(3):
            assert httpx.post(f"{url}/v1/completions", json=body, headers=headers).status_code == 200
        for _ in range(300):
            if verify(directory, None).kinds["request"] == 3:
                break
            time.sleep(0.02)
        process.kill()
    with served(model, *options) as (url, process):
        monkeypatch.setenv("ARGOSY_API_KEY", admin)
        erased = run_argosy("data", "erase", "--key", "laptop", "--url", url, is_fork=False)
        assert erased.returncode == 0, erased.stderr
        assert f"key               {key.id}" in erased.stdout
        assert "audit contents    3 erased" in erased.stdout
        state = httpx.get(f"{url}/v1/engine/state", headers={"Authorization": f"Bearer {admin}"}).json()
        requests = next(line["bytes"] for line in state["memory"]["lines"] if line["name"] == "requests")
        assert requests == BODY_BYTES + TEXT_BYTES + AUDIT_BYTES
        process.send_signal(signal.SIGTERM)
        log = [json.loads(line) for line in end(process).splitlines() if line.startswith("{")]
    anchors = [line["anchor"] for line in log if line["event"] == "audit_anchor"]
    assert len(anchors) == 2  # at the start and at the end
    found = run_argosy(
        "audit", "verify", directory, "--anchor", anchors[0], "--anchor", anchors[1], is_fork=False
    )
    assert found.returncode == 0, found.stdout
    assert "0 kept, 3 erased" in found.stdout


# ── the address ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_port_in_use_is_reported_before_the_model_is_opened(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = run_argosy("serve", tmp_path / "no-model", "--port", str(port))
    assert done.returncode == 2
    assert done.stderr == (
        f"error: port {port} of 127.0.0.1 is in use\nhint: use --port {port + 1}, or --port 0 for any free port\n"
    )


def test_another_server_that_listens_first_is_also_reported(model: Path, tmp_path: Path) -> None:
    """Two servers that start at once may both bind, but only one of them can listen."""
    with bind("127.0.0.1", 0) as mine:
        port = mine[0].getsockname()[1]
        process = ForkedArgosy[str](
            ["serve", model, "--memory", "1GiB", "--port", port], stderr=subprocess.PIPE, text=True
        )
        mine[0].listen()
        log = end(process)
    assert process.returncode == 2
    assert f"port {port} of 127.0.0.1 is in use" in log
    assert "serving" not in log


@pytest.mark.parametrize(
    ("host", "fault"),
    [("192.0.2.1", "192.0.2.1 is not an address of this machine"), ("nowhere.invalid", "is not an address")],
)
def test_an_address_that_is_not_this_machines_is_an_error(host: str, fault: str) -> None:
    with pytest.raises(UsageError, match=fault), bind(host, 0):
        pass


def test_what_was_here_before_a_server_is_collected_after_it() -> None:
    (before, while_serving, after), _ = call_in_fork(frozen_objects)  # those of this process stay frozen
    assert before < while_serving
    assert after == 0


def frozen_objects() -> list[int]:
    """Count them before, while and after a server runs."""
    counts: list[int] = []
    with pytest.MonkeyPatch.context() as patch, bind("localhost", 0) as sockets:
        patch.setattr(http_server, "gc", gc)
        patch.setattr(http_server.Server, "run", lambda *_: counts.append(gc.get_freeze_count()))
        counts.append(gc.get_freeze_count())
        http_server.run_app(
            SimpleNamespace(running=Running()),  # type: ignore[arg-type]
            None,  # type: ignore[arg-type]
            sockets,
            Endpoint(host="localhost", drain_s=0.0),
            lambda address: None,
        )
    return [*counts, gc.get_freeze_count()]


def test_sockets_are_bound_at_once_and_listen_later() -> None:
    with bind("localhost", 0) as sockets:
        ports = {one.getsockname()[1] for one in sockets}
        assert len(ports) == 1
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", *ports), timeout=5)
        for one in sockets:
            one.listen()
        socket.create_connection(("127.0.0.1", *ports), timeout=5).close()


def test_the_server_answers_as_soon_as_it_prints_its_address(model: Path) -> None:
    command = ["serve", model, "--memory", "1GiB", "--port", 0, "--name", "a/b"]
    process = ForkedArgosy[str](command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        said = process.stderr.readline()
        found = re.fullmatch(r"serving a/b at (http://127\.0\.0\.1:\d+)\n", said)
        assert found, said
        assert httpx.get(f"{found[1]}/ready").status_code == 200
    finally:
        process.kill()
        process.communicate()


# ── the shutdown ────────────────────────────────────────────────────────────────────────────────────────────────────


# One handler takes both signals.
@pytest.mark.parametrize(
    ("number", "pause_s"), [(signal.SIGTERM, 0.0), (signal.SIGINT, 0.003), (signal.SIGTERM, 0.05)]
)
def test_signals_at_any_moment_of_the_shutdown_end_the_server_with_0(
    model: Path, number: signal.Signals, pause_s: float
) -> None:
    with served(model) as (_, process):
        deadline = time.monotonic() + 30
        while process.poll() is None:
            assert time.monotonic() < deadline
            process.send_signal(number)
            time.sleep(pause_s)
        assert process.returncode == 0


def test_a_request_of_many_parts_is_finished_after_a_signal(model: Path) -> None:
    texts = ["something to embed " * 12] * 600
    with served(model) as (url, process), ThreadPoolExecutor(1) as thread:
        answer = thread.submit(httpx.post, f"{url}/v1/embeddings", json={"input": texts}, timeout=60)
        while "argosy_prompt_tokens_total 0.0\n" in httpx.get(f"{url}/metrics").text:
            assert not answer.done()
        process.send_signal(signal.SIGTERM)
        assert len(answer.result().json()["data"]) == len(texts)
        assert process.wait(20) == 0


def test_a_second_signal_ends_every_stream_with_an_error_event(tmp_path: Path) -> None:
    model = write_chat_model(tmp_path / "model", context_tokens=64_000)
    asks = {"prompt": "on", "max_tokens": 15_000, "stream": True, "logit_bias": {"2": -100, "0": -100}}
    with served(model) as (url, process), ExitStack() as stack:
        answers = [
            stack.enter_context(httpx.stream("POST", f"{url}/v1/completions", json=asks, timeout=60))
            for _ in range(3)
        ]
        lines = [answer.iter_lines() for answer in answers]
        for one in lines:
            next(one)
        # The server does not wait for this client, which reads nothing of its answer.
        host, _, port = url.removeprefix("http://").partition(":")
        unread = stack.enter_context(socket.create_connection((host, int(port))))
        body = json.dumps(asks | {"n": 2, "logprobs": 5}).encode()
        unread.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%s" % (len(body), body)
        )
        process.send_signal(signal.SIGTERM)
        until_refused(url)  # two pending signals would arrive as one
        process.send_signal(signal.SIGTERM)
        ends = [[line for line in one if line][-1] for one in lines]
        assert ['"error":{' in end for end in ends] == [True] * 3, ends
        assert process.wait(20) == 0


# ── open files ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_at_the_limit_on_open_files_connections_wait_and_the_log_says_it_once(model: Path) -> None:
    retry = {"asyncio.constants.ACCEPT_RETRY_DELAY": 0.2}
    with served(model, constants=retry) as (url, process), ExitStack() as stack:
        assert process.stderr is not None
        while "serving" not in process.stderr.readline():  # it is ready before it has opened all its files
            assert process.poll() is None
        soft, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        assert soft == hard  # the server raises its limit as far as it can
        num_open = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (num_open, hard))
        host, _, port = url.removeprefix("http://").partition(":")
        waiting = [
            stack.enter_context(socket.create_connection((host, int(port)), timeout=20)) for _ in range(20)
        ]
        for connection in waiting:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        time.sleep(0.5)  # the server tries twice more
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (hard, hard))
        for connection in waiting:
            assert connection.makefile("rb").read().startswith(b"HTTP/1.1 200")
        process.send_signal(signal.SIGTERM)
        log = end(process)
    assert log.count("the limit on open files is reached") == 1
    assert "Traceback" not in log
    assert len(log.splitlines()) < 40
