"""`argosy up` lets systemd start the server on first use, and changes no unit of somebody else."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from argosy.cli.main import main
from argosy.cli.shared import own_server, user_units
from argosy.errors import UsageError

Captured = pytest.CaptureFixture[str]
# A stand-in for systemctl: it writes its calls down. The file `failing` has the call that fails.
SYSTEMCTL = """#!{python} -IS
import pathlib, sys
here, called = pathlib.Path({here!r}), " ".join(sys.argv[2:])
with open(here / "calls", "a") as calls:
    calls.write(called + "\\n")
if called == (here / "failing").read_text():
    sys.exit("it failed")
active, away, file = here / "active", here / "away", pathlib.Path({file!r})
match sys.argv[2]:
    case "is-system-running":
        print("degraded")
        sys.exit(1)
    case "enable":
        active.touch()
        away.rename(file)
    case "stop" | "disable":
        active.unlink(missing_ok=True)
        if file.exists():
            file.rename(away)
    case "is-active" | "is-enabled":
        sys.exit(0 if active.exists() or sys.argv[2] == "is-enabled" else 3)
"""


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A stand-in for the user's systemd: the socket file is there while it is active; the directory of its files."""
    for name in ("STATE", "CONFIG", "DATA", "CACHE"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name))
    here = tmp_path / "systemd"
    here.mkdir()
    (here / "failing").write_text("")
    for name, text in (
        (
            "systemctl",
            SYSTEMCTL.format(python=sys.executable, here=str(here), file=str(own_server.socket_path())),
        ),
        ("journalctl", '#!/bin/sh\necho "journal $*"\n'),
    ):
        (here / name).write_text(text)
        (here / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(here), prepend=os.pathsep)
    own_server.open_state().close()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(own_server.socket_path()))
        listening.listen()
        own_server.socket_path().rename(here / "away")
        yield here


def calls(systemd: Path) -> list[str]:
    """The calls since the last look, but for questions."""
    path = systemd / "calls"
    found = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [one for one in found if not one.startswith(("is-", "show"))]


def units(tmp_path: Path) -> Path:
    return tmp_path / "CONFIG" / "systemd" / "user"


def test_systemd_listens_and_the_other_commands_know_it(
    systemd: Path, tmp_path: Path, capfd: Captured
) -> None:
    assert main(["up", "--port", "8123"]) == 0
    out, err = capfd.readouterr()
    assert out == "systemd starts the server on first use, at http://127.0.0.1:8123\n"
    assert "`argosy stop` and `systemctl --user disable argosy.socket` undo that" in err
    assert calls(systemd) == ["daemon-reload", "enable --quiet --now argosy.socket"]
    assert sorted(one.name for one in units(tmp_path).iterdir()) == ["argosy.service", "argosy.socket"]

    # No command but one that needs the server starts it.
    found = own_server.found()
    assert found is not None
    assert (found.pid, found.address, own_server.running()) == (0, "http://127.0.0.1:8123", None)
    assert main(["ps"]) == 0
    assert capfd.readouterr().out == "server    http://127.0.0.1:8123, started by systemd on first use\n"
    assert main(["ps", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["process"]["pid"] == 0
    assert main(["up"]) == 0
    assert main(["up", "--port", "8124"]) == 2
    assert calls(systemd) == []
    capfd.readouterr()

    assert main(["stop"]) == 0
    out, err = capfd.readouterr()
    assert out == "the server has stopped\n"
    assert "systemd listens for it again after the next login" in err
    assert calls(systemd) == ["stop argosy.socket", "stop argosy.service"]
    assert main(["stop"]) == 1


def test_logs_are_those_of_the_journal(systemd: Path) -> None:
    assert main(["up"]) == 0
    command = [sys.executable, "-m", "argosy", "logs", "-n", "7", "-f"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith("journal --user --unit=argosy.service ")
    assert done.stdout.endswith(" --lines=7 --follow\n")


def test_the_service_runs_a_command_of_serve_and_finds_the_same_files(
    systemd: Path, tmp_path: Path, capfd: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    from argosy.cli.commands.serve import serve

    monkeypatch.setenv("ARGOSY_API_KEY", "secret")
    assert main(["up", "--memory", "1GiB", "--print"]) == 0
    shown = capfd.readouterr().out
    assert calls(systemd) == []
    assert not units(tmp_path).exists()
    assert "secret" not in shown
    lines = shown.splitlines()
    assert f'Environment="XDG_DATA_HOME={tmp_path / "DATA"}"' in lines
    assert {"ListenStream=127.0.0.1:8080", f"ListenStream={own_server.socket_path()}", "SocketMode=0600"} < {
        *lines
    }
    (command,) = (line.removeprefix("ExecStart=") for line in lines if line.startswith("ExecStart="))
    words = shlex.split(command)
    assert words[:5] == [f":{sys.executable}", "-P", "-m", "argosy", "serve"]
    options = serve.make_context("serve", words[5:]).params
    assert options["listen"] == own_server.socket_url()
    assert (options["library"], options["idle_unload"], options["port"]) == (True, "15m", 8080)


@pytest.mark.parametrize(
    "changed",
    ["edited", "link", *(pytest.param(name, marks=pytest.mark.full) for name in ("written", "binary"))],
)
def test_a_unit_of_somebody_else_stays(changed: str, systemd: Path, tmp_path: Path, capfd: Captured) -> None:
    assert main(["up"]) == 0
    assert main(["stop"]) == 0
    calls(systemd)
    unit, victim = units(tmp_path) / "argosy.service", tmp_path / "victim"
    victim.write_text(text := unit.read_text())
    match changed:
        case "edited":
            unit.write_text(text.replace("RestartSec=5", "RestartSec=6"))
        case "written":
            unit.write_text("[Service]\n")
        case "link":
            unit.unlink()
            unit.symlink_to(victim)
        case _:
            unit.write_bytes(b"\xff" * 100_000)
    before = unit.read_bytes()
    capfd.readouterr()
    assert main(["up", "--port", "8124"]) == 2
    assert f"{unit} was written or changed by somebody else, and stays as it is" in capfd.readouterr().err
    assert (unit.read_bytes(), unit.is_symlink()) == (before, changed == "link")
    assert "8124" not in (units(tmp_path) / "argosy.socket").read_text()
    assert calls(systemd) == []


def test_an_own_unit_is_replaced(systemd: Path, tmp_path: Path) -> None:
    for port in ("8123", "8124"):
        assert main(["up", "--port", port]) == 0
        assert f"ListenStream=127.0.0.1:{port}\n" in (units(tmp_path) / "argosy.socket").read_text()
        assert main(["stop"]) == 0


def test_a_server_that_does_not_start_is_told_now_and_leaves_nothing_on(
    systemd: Path, chat_model: Path, capfd: Captured
) -> None:
    (systemd / "failing").write_text("start argosy.service")
    assert main(["up", str(chat_model)]) == 1
    err = capfd.readouterr().err
    assert "journal --user --unit=argosy.service" in err
    assert "error: the server did not start\n" in err
    assert calls(systemd)[-3:] == [
        "start argosy.service",
        "disable --now argosy.socket",
        "stop argosy.service",
    ]


def test_what_systemd_refuses_is_told_and_undone(systemd: Path, capfd: Captured) -> None:
    (systemd / "failing").write_text("enable --quiet --now argosy.socket")
    assert main(["up"]) == 1
    assert (
        "`systemctl --user enable --quiet --now argosy.socket` failed: it failed\n" in capfd.readouterr().err
    )
    assert calls(systemd)[-1] == "disable --now argosy.socket"


def texts(tmp_path: Path, *options: str, host: str = "127.0.0.1", port: int = 8080) -> dict[str, str]:
    return user_units.texts(
        [sys.executable, *options], path=tmp_path / "100% $HOME" / "s", host=host, port=port, mode="0600",
        drain_s=30.5, directory=tmp_path, environment={"ARGOSY_X": options[0] if options else "", "PATH": "no"},
    )  # fmt: skip


def test_values_are_escaped_as_systemd_reads_them(tmp_path: Path) -> None:
    found = texts(tmp_path, 'a b%h$HOME"\\', "", ";")
    service = found["argosy.service"]
    assert f'ExecStart=":{sys.executable}" "a b%%h$HOME\\"\\\\" "" ";"\n' in service
    assert 'Environment="ARGOSY_X=a b%%h$HOME\\"\\\\"\n' in service
    assert "PATH" not in service
    assert "TimeoutStopSec=60\n" in service
    assert f"ListenStream={tmp_path}/100%% $HOME/s\n" in found["argosy.socket"]
    assert "ListenStream=[::1]:8080\n" in texts(tmp_path, host="::1")["argosy.socket"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_reads_the_units_without_a_complaint(tmp_path: Path) -> None:
    found = texts(tmp_path, 'a b%h$HOME"\\', "", ";")
    for name, text in found.items():
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "--user", "verify", "--man=no", *(str(tmp_path / name) for name in found)],
        capture_output=True, text=True, timeout=120, check=False, env=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)},
    )  # fmt: skip
    assert not [line for line in done.stderr.splitlines() if "argosy." in line]


@pytest.mark.parametrize("value", ["a\nExecStartPre=/bin/sh", "\x1b[2J", "\udcff", "\r"])
def test_a_value_that_would_begin_a_line_is_refused(value: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has characters that a systemd unit cannot hold"):
        texts(tmp_path, value)


def test_systemd_needs_an_address_and_a_port(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--host localhost is a name"):
        texts(tmp_path, host="localhost")
    with pytest.raises(UsageError, match="--port 0 is any free one"):
        texts(tmp_path, port=0)
