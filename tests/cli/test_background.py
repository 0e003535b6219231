"""`argosy up`, `ps`, `logs` and `stop`: a server that is this user's, and no other process."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from argosy.cli.commands import background
from argosy.cli.main import main
from argosy.cli.shared import own_server
from argosy.cli.shared.remote import DEFAULT_URL, default_url
from argosy.directory import Directory
from argosy.errors import ServerNotUsable
from tests.cluster.rigs import wait_until
from tests.helpers.command import run_argosy
from tests.helpers.forks import ForkedArgosy
from tests.helpers.guides import shown_after

Captured = pytest.CaptureFixture[str]
WAIT_S = 120


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory of the server; a server that a test leaves is ended."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    # A developer's own systemd is left alone.
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.delenv("DBUS_SESSION_BUS_ADDRESS", raising=False)
    path = tmp_path / "state" / "argosy"
    yield path
    if path.is_dir():
        path.chmod(0o700)
        if (process := own_server.running()) is not None:
            os.kill(process.pid, signal.SIGKILL)


def up_command(model: Path, *options: str) -> list[str]:
    return ["up", str(model), "--memory", "1GiB", "--threads", "1", "--port", "0", *options]


def up(model: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return run_argosy(*up_command(model, *options), timeout_s=WAIT_S)


def here() -> own_server.Process:
    process = own_server.running()
    assert process is not None
    return process


def test_up_starts_a_server_that_ps_logs_top_and_stop_find(
    chat_model: Path, state: Path, capfd: Captured
) -> None:
    done = up(chat_model)
    assert done.returncode == 0, done.stderr
    process = here()
    assert done.stdout == f"the server runs at {process.address}, pid {process.pid}\n"
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", process.address)

    # It has a session of its own, and nothing of the command that started it.
    assert os.getsid(process.pid) == process.pid
    opened = [os.readlink(f"/proc/{process.pid}/fd/{number}") for number in range(3)]
    assert opened == [os.devnull, str(state / own_server.LOG), str(state / own_server.LOG)]
    modes = {path.name: stat.S_IMODE(path.lstat().st_mode) for path in [state, *state.iterdir()]}
    assert modes.pop("argosy") == 0o700
    assert {"server.sock", "server.json", "server.log"} <= modes.keys()
    assert set(modes.values()) == {0o600}

    # Our own commands use the socket file.
    assert default_url() == f"unix:{state / 'server.sock'}"
    assert main(["ps"]) == 0
    assert re.search(
        rf"server    {process.address}, pid {process.pid}, since .*\nmemory .* of 1.0 GiB\n"
        r"requests  0 running, 0 waiting, at most 16 at once\nMODEL +STATE +MEMORY +REQUESTS +UNLOADS\nmodel +ready ",
        capfd.readouterr().out,
    )
    assert main(["ps", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["process"]["pid"] == process.pid
    assert main(["connect", "aider"]) == 0  # other programs use the port
    assert process.address in capfd.readouterr().out
    assert main(["logs"]) == 0
    log = capfd.readouterr().out
    assert f"serving model at {process.address}" in log

    # The guide shows what was printed.
    def of_guide(command: str) -> list[str]:
        text = "\n".join(shown_after("serving.md", command))
        for example, ours in (
            ("http://127.0.0.1:8080", process.address),
            ("pid 4711", f"pid {process.pid}"),
            ("Qwen3-30B-A3B", "model"),
        ):
            text = text.replace(example, ours)
        return text.splitlines()

    assert done.stdout.splitlines() == of_guide("argosy up Qwen3-30B-A3B --memory 16GiB")
    assert {*of_guide("argosy serve ./Qwen3-30B-A3B --memory 16GiB")} <= {*log.splitlines()}
    assert main(["memory", "900MiB"]) == 0
    size = re.compile(r" *[0-9.]+ (?:MiB|GiB)")
    said = size.sub(" SIZE", capfd.readouterr().out).splitlines()
    assert said[:2] == size.sub(" SIZE", "\n".join(of_guide("argosy memory 8GiB"))).splitlines()[:2]

    # A second one starts nothing, and options that it cannot have are an error.
    assert main(["up"]) == 0
    assert main(["up", "--memory", "2GiB"]) == 2
    assert "the server is running, with the options that it was started with" in capfd.readouterr().err
    assert here() == process

    assert main(["stop", "--now"]) == 0
    assert own_server.running() is None
    assert sorted(path.name for path in state.iterdir()) == ["server.log"]
    assert main(["stop"]) == 1
    assert "no server is running for this user\nhint: `argosy up` starts one" in capfd.readouterr().err


def test_two_that_start_at_once_start_one_server(chat_model: Path) -> None:
    both = [
        ForkedArgosy[str](up_command(chat_model), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [one.communicate(timeout=WAIT_S) for one in both]
    # The later one finds a server, and was given options for another.
    assert sorted(one.returncode for one in both) == [0, 2], said
    (told,) = (out for out, _ in said if out)
    assert f"pid {here().pid}\n" in told


@pytest.mark.parametrize(
    ("command", "hint"), [("exit 1", "its log is empty"), ("echo why; exit 1", "the lines above are its log")]
)
def test_only_a_log_with_lines_is_said_to_be_above(command: str, hint: str, tmp_path: Path) -> None:
    with Directory(tmp_path) as folder, pytest.raises(ServerNotUsable, match="exit code 1") as refused:
        background._start(folder, ["sh", "-c", command])
    assert refused.value.hint is not None
    assert hint in refused.value.hint


def test_a_server_that_cannot_start_says_why_and_leaves_no_process(chat_model: Path, state: Path) -> None:
    with socket.socket() as stranger:  # owns the port first
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        port = stranger.getsockname()[1]
        done = up(chat_model, "--port", str(port))
    assert done.returncode == 1
    assert f"port {port} of 127.0.0.1 is in use" in done.stderr
    assert "the server ended with exit code 2 before it was ready" in done.stderr
    assert sorted(path.name for path in state.iterdir()) == ["server.log"]


def test_a_killed_server_is_replaced(chat_model: Path) -> None:
    assert up(chat_model).returncode == 0
    first = here()
    os.kill(first.pid, signal.SIGKILL)
    wait_until(lambda: own_server.running() is None)  # whoever adopted it learns of its end
    done = up(chat_model)
    assert done.returncode == 0, done.stderr
    assert here().pid != first.pid


# The first thread ends and another goes on, as in a killed server whose threads have not all ended.
FIRST_THREAD_ENDS = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(600,)).start()
ctypes.CDLL(None).pthread_exit(None)
"""


def test_a_killed_process_runs_until_its_last_thread_has_ended() -> None:
    with subprocess.Popen([sys.executable, "-c", FIRST_THREAD_ENDS]) as ending:
        try:
            status = Path(f"/proc/{ending.pid}/status")
            wait_until(lambda: "State:\tZ" in status.read_text())
            started = own_server._started(ending.pid)
            assert started is not None
            process = own_server.Process(ending.pid, started, 0.0, "http://127.0.0.1:1")
            assert own_server.is_running(process)
            ending.kill()
            wait_until(lambda: "Threads:\t1\n" in status.read_text())
            assert not own_server.is_running(process)
        finally:
            ending.kill()


def test_a_later_process_with_the_servers_id_is_never_stopped(state: Path, capfd: Captured) -> None:
    with subprocess.Popen(["sleep", "600"]) as victim:
        try:
            state.mkdir(parents=True, mode=0o700)
            facts = {
                "pid": victim.pid, "started": 1, "since": 1.0, "address": "http://127.0.0.1:1",
                "is_ending": False,
            }  # fmt: skip
            (state / "server.json").write_text(json.dumps(facts))
            assert own_server.running() is None
            assert default_url() == DEFAULT_URL
            assert main(["stop", "--now"]) == 1
            assert "no server is running" in capfd.readouterr().err
            assert victim.poll() is None
        finally:
            victim.kill()


def test_a_server_that_ends_before_it_is_stopped_has_stopped(
    monkeypatch: pytest.MonkeyPatch, capfd: Captured
) -> None:
    with subprocess.Popen(["true"]) as ended:
        pass
    own_server.open_state().close()
    process = own_server.Process(ended.pid, 1, 0.0, "http://127.0.0.1:1")
    with monkeypatch.context() as patched:
        patched.setattr(own_server, "running", lambda: process)
        assert main(["stop"]) == 0
    assert capfd.readouterr().out == "the server has stopped\n"


SIGNALS = """
import signal, sys
kinds = [signal.SIGTERM, signal.SIGINT]
signal.pthread_sigmask(signal.SIG_BLOCK, kinds)
print("ready", flush=True)
found = [signal.sigwaitinfo(kinds)]
while (more := signal.sigtimedwait(kinds, 0.7)) is not None:
    found.append(more)
print(*sorted(signal.Signals(one.si_signo).name for one in found))
"""


@contextmanager
def noted(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that is noted as the server."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            started = own_server._started(child.pid)
            assert started is not None
            with own_server.open_state() as opened:
                own_server._note(opened, own_server.Process(child.pid, started, 1.0, "http://127.0.0.1:1"))
            yield child
        finally:
            child.kill()


@pytest.mark.parametrize(("options", "sent"), [([], "SIGTERM"), (["--now"], "SIGINT SIGTERM")])
def test_stop_sends_each_signal_once(options: list[str], sent: str, capfd: Captured) -> None:
    with noted([sys.executable, "-c", SIGNALS]) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        assert main(["stop", *options]) == 0
        assert child.stdout.read() == f"{sent}\n"
    said = f"the server, pid {child.pid}, does not answer; it is told to end\n"
    assert capfd.readouterr() == ("the server has stopped\n", "" if options else said)


def test_a_second_stop_ends_no_answers_and_a_frozen_server_is_killed_only_when_asked(
    monkeypatch: pytest.MonkeyPatch, capfd: Captured
) -> None:
    from argosy.cli.commands import background

    monkeypatch.setattr(background, "_SILENT_S", 0.3)
    monkeypatch.setattr(background, "_STOP_S", 0.3)
    with noted(["sleep", "600"]) as child:
        child.send_signal(signal.SIGSTOP)
        for said in ("does not answer; it is told to end", "was told to end, and finishes its answers"):
            assert main(["stop"]) == 1
            told = capfd.readouterr().err
            assert said in told
            assert (
                f"pid {child.pid}, was told to end, and has not reacted for 0 s\nhint: `argosy stop --kill`"
                in told
            )
            with open(f"/proc/{child.pid}/status") as status:
                pending = re.search(r"ShdPnd:\s*([0-9a-f]+)", status.read())
            assert pending is not None
            assert int(pending[1], 16) == 1 << signal.SIGTERM - 1
        assert main(["ps"]) == 1
        assert "finishes its answers and ends" in capfd.readouterr().err
        assert main(["up"]) == 2
        assert "hint: `argosy stop` waits for it" in capfd.readouterr().err
        assert main(["stop", "--kill"]) == 0
    assert child.returncode == -signal.SIGKILL


def test_a_full_drive_keeps_no_server_from_being_stopped(
    monkeypatch: pytest.MonkeyPatch, capfd: Captured
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with noted(["sleep", "600"]) as child, monkeypatch.context() as patched:
        patched.setattr(Directory, "put", refuse)
        assert main(["stop"]) == 0
        assert capfd.readouterr().out == "the server has stopped\n"
    assert child.returncode == -signal.SIGTERM


def test_stop_says_what_the_server_does_before_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    from argosy.cli.commands import background

    state = {"models": [{"running": 1, "waiting": 0}], "running": [{"seconds": 40.4}, {"seconds": 3}, None]}
    monkeypatch.setattr(background, "_own", lambda timeout_s: SimpleNamespace(state=lambda: state))
    process = own_server.Process(1, 1, 0.0, "")
    assert background._why_wait(process)[0].startswith(
        "1 request is running, 40 s so far, and may finish within the time of --drain (30 s); `argosy stop --now` ends"
    )
    state["models"] = []
    assert background._why_wait(process)[0] == "the server is told to end"


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{", '{"pid": 1}', '{"pid": true, "started": 1, "address": ""}', "9" * 5000,
     '{"pid": -1, "started": 1, "address": ""}', '{"pid": 1, "started": 1.0, "address": "x"}',
     '{"pid": 1, "started": 1, "since": 1e999, "address": "x", "is_ending": 1}'],
)  # fmt: skip
def test_damaged_facts_are_no_server(text: str, state: Path) -> None:
    state.mkdir(parents=True, mode=0o700)
    (state / "server.json").write_text(text)
    assert own_server.running() is None


def test_a_directory_that_others_can_change_is_refused(state: Path, capfd: Captured) -> None:
    state.mkdir(parents=True)
    state.chmod(0o755)
    for command in (["up"], ["stop"], ["logs"], ["ps"]):
        assert main(command) == 2
        assert "would hold the server's socket, but other users can access it" in capfd.readouterr().err
    # Commands that do without a server go by its port.
    assert (own_server.found(), default_url()) == (None, DEFAULT_URL)


def test_a_link_in_the_place_of_the_log_is_not_followed(state: Path, tmp_path: Path, capfd: Captured) -> None:
    state.mkdir(parents=True, mode=0o700)
    (tmp_path / "victim").write_text("keep")
    (state / "server.log").symlink_to(tmp_path / "victim")
    for command in (["up"], ["logs"]):
        assert main(command) == 2
        assert "it is a symbolic link, and none is followed here" in capfd.readouterr().err
    assert (tmp_path / "victim").read_text() == "keep"


def test_without_a_home_the_error_says_so(
    monkeypatch: pytest.MonkeyPatch, capfd: Captured, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(
        "XDG_STATE_HOME", str(tmp_path / "file")
    )  # no directory can be made there, even by root
    assert main(["up"]) == 2
    assert "cannot be used as XDG_STATE_HOME" in capfd.readouterr().err


def test_options_of_services_and_wrong_ones_are_refused_before_anything_starts(
    state: Path, capfd: Captured
) -> None:
    for options, told in (
        (["--listen", "unix:x"], "--listen is for a server that an operator runs"),
        (["--base-path", "/x"], "--base-path is for a server that an operator runs"),
        (["--host", "0.0.0.0"], "there are no keys"),
        (["--momory", "1GiB"], "no such option"),
    ):
        assert main(["up", *options]) == 2
        assert told in capfd.readouterr().err
    assert not (state / "server.log").exists()


def test_the_log_is_printed_without_what_a_terminal_would_obey(state: Path, capfd: Captured) -> None:
    state.mkdir(parents=True, mode=0o700)
    (state / "server.log").write_text("one\ntwo \x1b[2J\nthree\n")
    assert main(["logs", "-n", "2"]) == 0
    assert capfd.readouterr().out == "two ?[2J\nthree\n"


def test_a_log_whose_older_half_is_dropped_is_read_on_and_not_again(state: Path) -> None:
    from argosy.cli.commands.background import _LogReader

    state.mkdir(parents=True, mode=0o700)
    path = state / "server.log"
    path.write_text("".join(f"line {number}\n" for number in range(1000)))
    with path.open("rb") as log:
        reader = _LogReader(log.fileno(), path.stat().st_size)
        path.write_text("".join(f"line {number}\n" for number in range(900, 1002)))
        assert reader.new() == "line 1000\nline 1001\n"
        path.write_text("other\n")
        assert reader.new() == "other\n"
        path.write_text("other\nmore\n")
        assert (reader.new(), reader.new()) == ("more\n", "")


def test_the_limit_of_the_log_is_the_users_if_there_is_one(chat_model: Path, capfd: Captured) -> None:
    for options, limit in (([], "8MiB"), (["--log-limit", "1MiB"], "1MiB")):
        assert main(["up", str(chat_model), "--print", *options]) == 0
        assert re.findall(r'"--log-limit" "(\w+)"', capfd.readouterr().out) == [limit]


def test_a_directory_that_is_too_long_for_a_socket_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Captured
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / ("long" * 25)))
    assert main(["up"]) == 2
    told = capfd.readouterr().err
    assert "server.sock is too long: a socket's path may have 107 bytes" in told
    assert "hint: `export XDG_STATE_HOME=DIR` names a shorter directory" in told


def test_a_command_waits_for_the_models_of_a_server_that_is_starting(
    capfd: Captured,
) -> None:
    from argosy.cli.shared import server_model

    with ExitStack() as opened:
        listener = opened.enter_context(socket.socket(socket.AF_UNIX))
        with noted(["sleep", "600"]) as child:
            listener.bind(str(own_server.socket_path()))
            asked = SimpleNamespace(num=0)

            def models() -> list[dict[str, str]]:
                asked.num += 1
                if asked.num == 1:
                    raise ServerNotUsable("nothing answers", is_absent=True)
                listener.listen()
                return [{"id": "one"}]

            process = own_server.running()
            server = SimpleNamespace(models=models)
            assert server_model._models_of(server, process, "one") == [{"id": "one"}]  # type: ignore[arg-type]
            assert capfd.readouterr().err.startswith(
                "waiting for the server of `argosy up`, which is starting"
            )
            asked.num = 0
            with pytest.raises(ServerNotUsable):  # it listens, so it has started
                server_model._models_of(server, process, "one")  # type: ignore[arg-type]
            assert child.poll() is None
        listener.close()
        own_server.socket_path().unlink()
        asked.num = 0
        with pytest.raises(ServerNotUsable):  # it has ended
            server_model._models_of(server, process, "one")  # type: ignore[arg-type]


def test_a_server_listens_on_a_file_and_a_port_if_both_are_named(tmp_path: Path) -> None:
    import click

    from argosy.cli.commands.serve import serve

    for options, expected in (
        (["--listen", "unix:s"], (Path("s"), None)),
        (["--listen", "unix:s", "--port", "1"], (Path("s"), 1)),
        (["--port", "1"], (None, 1)),
    ):
        from argosy.cli.commands.listening import ListeningOptions, listening_of
        from argosy.config.option import declarations

        with ExitStack() as entered:
            context = entered.enter_context(serve.make_context("serve", list(options)))
            assert isinstance(context, click.Context)
            given = {name: context.params[name] for name in declarations(ListeningOptions)}
            found = listening_of(ListeningOptions(**given))
        assert (found.path, found.port) == expected
