"""The systemd units that start this user's server on first use.

    argosy up  ->  argosy.socket, argosy.service in ~/.config/systemd/user
               ->  systemctl --user enable --now argosy.socket

A unit begins with the SHA-256 of its other lines, so a unit that somebody else wrote or changed is never replaced.

Elsewhere: the commands are `cli/commands/background.py`; `serve/http/systemd.py` takes the sockets.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from argosy.directory import Directory
from argosy.errors import ServerNotUsable, UsageError
from argosy.user_directories import home_directory

SOCKET, SERVICE = "argosy.socket", "argosy.service"
_MARK = "# Made by `argosy up`, which replaces it unless it was changed: "
_MOST_BYTES = 64 << 10
_ANSWER_S = 3.0  # time for the user's systemd to respond
_CHANGE_S = 90.0  # time for it to change a unit, after the service has ended
_READY = {"running", "degraded", "starting", "initializing"}
# Variables that decide where a server finds its files, plus our own; keys and tokens do not belong in a unit.
_KEPT = (
    "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "OLLAMA_MODELS", "XDG_CACHE_HOME", "XDG_DATA_HOME",
    "XDG_STATE_HOME",
)  # fmt: skip
_SECRET = ("ARGOSY_API_KEY",)

# Output without terminal control characters.
_LOG = ("journalctl", "--user", f"--unit={SERVICE}", "--output=short-iso", "--no-hostname", "--no-pager")
_LAST_LINES = 20  # shown of a server that does not start

_SOCKET_TEXT = """\
[Unit]
Description=Argosy listens for the server of this user

[Socket]
{listens}
SocketMode={mode}
DirectoryMode=0700
RemoveOnStop=yes

[Install]
WantedBy=sockets.target
"""
_SERVICE_TEXT = """\
[Unit]
Description=Argosy: the local models of this user
Wants=argosy.socket
After=argosy.socket

[Service]
Type=notify
{environment}{directory}ExecStart={command}
# The first SIGTERM lets running answers finish, for as long as `--drain` says.
KillSignal=SIGTERM
KillMode=mixed
TimeoutStartSec=10min
TimeoutStopSec={stop_s}
Restart=on-failure
RestartSec=5
# Wrong options do not become right.
RestartPreventExitStatus=2
UMask=0077
NoNewPrivileges=yes
"""


def is_reachable() -> bool:
    """Whether the user's systemd runs and answers."""
    done = _systemctl("is-system-running", wait_s=_ANSWER_S)
    return done is not None and done.stdout.strip() in _READY


def is_installed() -> bool:
    """Whether there is a unit for the server, from `argosy up` or from the user."""
    return any((_directory() / name).exists() for name in (SOCKET, SERVICE))


def is_active() -> bool:
    """Whether systemd listens for the server or runs it."""
    return is_installed() and _has_done(_systemctl("is-active", SOCKET, SERVICE, wait_s=_ANSWER_S))


def runs(pid: int) -> bool:
    """Whether a process belongs to the service."""
    done = _systemctl("show", SERVICE, "--property=MainPID", "--value", wait_s=_ANSWER_S)
    return done is not None and done.stdout.strip() == str(pid)


def texts(
    command: Sequence[str], *, path: Path, host: str, port: int, mode: str, drain_s: float, directory: Path | None,
    environment: Mapping[str, str],
) -> dict[str, str]:  # fmt: skip
    """The texts of a server's units, by name.

    Args:
        command: the server's command with its options.
        path: the socket file.
        mode: the mode of that file.
        drain_s: how long answers may take to finish when it stops.
        directory: the base of relative paths in the options; None if there are none.

    Raises:
        UsageError: systemd cannot listen there, or a value cannot be written to a unit.
    """
    try:
        shown = f"[{host}]" if ipaddress.ip_address(host).version == 6 else host
    except ValueError:
        raise UsageError(
            f"systemd listens on addresses, but --host {host} is a name",
            hint="--host 127.0.0.1, or `argosy up --no-systemd`",
        ) from None
    if not port:
        raise UsageError(
            "systemd listens on a fixed port, but --port 0 is any free one",
            hint="name a port, or `argosy up --no-systemd`",
        )
    kept = {
        name: value
        for name, value in sorted(environment.items())
        if (name.startswith("ARGOSY_") or name in _KEPT) and name not in _SECRET
    }
    listens = "\n".join(f"ListenStream={_plain(one)}" for one in (f"{shown}:{port}", str(path)))
    # With `:` systemd expands no variables, so `$` is literal.
    words = [f":{command[0]}", *command[1:]]
    parts = {
        SOCKET: _SOCKET_TEXT.format(listens=listens, mode=mode),
        SERVICE: _SERVICE_TEXT.format(
            environment="".join(f"Environment={_quoted(f'{name}={value}')}\n" for name, value in kept.items()),
            directory="" if directory is None else f"WorkingDirectory=-{_plain(str(directory))}\n",
            command=" ".join(map(_quoted, words)), stop_s=int(drain_s) + 30,
        ),
    }  # fmt: skip
    return {name: _mark(text) + text for name, text in parts.items()}


def _mark(text: str) -> str:
    return f"{_MARK}{hashlib.sha256(text.encode()).hexdigest()}\n"


def _plain(value: str) -> str:
    """A value that systemd takes literally, except for specifiers."""
    if not value.isprintable() or value != value.strip():
        raise UsageError(
            f"{value!r} has characters that a systemd unit cannot hold", hint="`argosy up --no-systemd`"
        )
    return value.replace("%", "%%")


def _quoted(value: str) -> str:
    """Quote a word."""
    if not value.isprintable():
        raise UsageError(
            f"{value!r} has characters that a systemd unit cannot hold", hint="`argosy up --no-systemd`"
        )
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'


def install(units: Mapping[str, str]) -> None:
    """Write the units and let systemd listen, now and after each login.

    Raises:
        UsageError: a unit of the same name is not ours, or the units cannot be written.
        ServerNotUsable: systemd rejects them.
    """
    path = _directory()
    try:
        with Directory(path, make=True, mode=0o755) as opened:
            for name in units:
                _require_ours(opened, name)
            for name, text in units.items():
                opened.put(name, text.encode(), 0o644)
    except OSError as error:
        raise UsageError(
            f"{error.filename or path} cannot be written: {error.strerror}", hint="`argosy up --no-systemd`"
        ) from None
    for arguments in (("daemon-reload",), ("enable", "--quiet", "--now", SOCKET)):
        done = _systemctl(*arguments, wait_s=_CHANGE_S)
        if not _has_done(done):
            said = (
                "it does not answer"
                if done is None
                else done.stderr.strip() or f"exit code {done.returncode}"
            )
            _systemctl("disable", "--now", SOCKET, wait_s=_CHANGE_S)
            raise ServerNotUsable(
                f"`systemctl --user {' '.join(arguments)}` failed: {said}",
                hint="another program may listen there: `systemctl --user status argosy.socket` says why; "
                "`argosy up --no-systemd` does without systemd",
            )


def _require_ours(opened: Directory, name: str) -> None:
    if opened.stat(name) is None:
        return
    try:
        first, _, rest = opened.read(name, _MOST_BYTES).decode().partition("\n")
    except (OSError, UnicodeDecodeError):  # a link, for example
        first, rest = "", ""
    if f"{first}\n" != _mark(rest):
        raise UsageError(
            f"{opened.path / name} was written or changed by somebody else, and stays as it is",
            hint=f"`systemctl --user start {name}` uses it; move it away, or `argosy up --no-systemd`",
        )


def start() -> subprocess.Popen[bytes]:
    """Begin starting the service; the process ends when the server is ready or has failed to start."""
    return subprocess.Popen(["systemctl", "--user", "start", SERVICE], stdin=subprocess.DEVNULL)


def stop_listening() -> None:
    """Stop listening, so that nothing starts the server again before the next login."""
    _require(_systemctl("stop", SOCKET, wait_s=_CHANGE_S))


def stop_service() -> None:
    """End what is left of the service, including a pending restart."""
    _require(_systemctl("stop", SERVICE, wait_s=_CHANGE_S))


def disable() -> None:
    _systemctl("disable", "--now", SOCKET, wait_s=_CHANGE_S)


def is_enabled() -> bool:
    """Whether systemd will listen again after the next login."""
    return is_installed() and _has_done(_systemctl("is-enabled", SOCKET, wait_s=_ANSWER_S))


def last_lines() -> str:
    """The end of the service's log, if it can be read."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(
            [*_LOG, f"--lines={_LAST_LINES}"], stdin=subprocess.DEVNULL, capture_output=True, text=True,
            errors="replace", timeout=_ANSWER_S, check=False,
        ).stdout  # fmt: skip
    return ""


def show_log(*, follow: bool, lines: int) -> None:
    """Replace this process by the command that shows the service's log.

    Raises:
        UsageError: there is no such command.
    """
    try:
        os.execvp(_LOG[0], [*_LOG, f"--lines={lines}", *(["--follow"] if follow else [])])
    except OSError as error:
        raise UsageError(
            f"the log is in systemd's journal, and journalctl cannot run: {error.strerror}"
        ) from None


def _directory() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or home_directory() / ".config") / "systemd" / "user"


def _systemctl(*arguments: str, wait_s: float) -> subprocess.CompletedProcess[str] | None:
    """Run systemctl and return its output, or None if systemd is missing or does not answer."""
    try:
        return subprocess.run(
            ["systemctl", "--user", *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True,
            errors="replace", timeout=wait_s, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None


def _has_done(done: subprocess.CompletedProcess[str] | None) -> bool:
    return done is not None and done.returncode == 0


def _require(done: subprocess.CompletedProcess[str] | None) -> None:
    if not _has_done(done):
        said = "it does not answer" if done is None else done.stderr.strip() or f"exit code {done.returncode}"
        raise ServerNotUsable(f"systemd failed: {said}", hint="`systemctl --user status argosy` shows more")
