"""`argosy up`, `ps`, `logs` and `stop`: the server that runs in the background for this user.

    up  ->  systemd listens and starts `argosy serve ... --listen unix:STATE/server.sock` on first use
        ->  without systemd, the same command in a session of its own, its log in STATE/server.log

Elsewhere: its process and directory are `cli/shared/own_server.py`; its systemd units are
`cli/shared/user_units.py`; its options are those of `serve.py`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from argosy.checkpoint.untrusted_file import quote
from argosy.cli.commands import completion
from argosy.cli.shared import own_server, user_units
from argosy.cli.shared.numbers import WholeNumber
from argosy.cli.shared.output import table_lines, time_span
from argosy.cli.shared.remote import TIMEOUT_S, entries, fields, number, server_options, whole
from argosy.config import MIB, counted, format_bytes
from argosy.errors import ServerNotUsable, UsageError

if TYPE_CHECKING:
    from argosy.cli.shared.own_server import Process
    from argosy.directory import Directory

# Longer than Ollama's five minutes, because a model on a drive takes minutes to load and loses its KV cache when
# unloaded. An idle model leaves earlier if another needs the memory.
_IDLE_UNLOAD = "15m"
_LOG_LIMIT = "8MiB"
_LOG_BYTES = 8 * MIB
_LAST_BYTES = 512  # the end of a log, by which its reader finds its place again
START_S = 600.0  # for a server to load its models
_STOP_S = 3700.0  # the longest `--drain`, and some more
_NOW_S = 15.0  # for a server told to end at once
_SILENT_S = 60.0  # for a server that did not answer before
_ASK_S = 2.0  # for a server to report its requests before it is told to end
_LOOK_S = 0.1
_OF_SERVICES = (
    "listen",
    "tls_cert",
    "base_path",
    "forwarded_from",
    "check",
)  # our commands would have to know these
_SAY_S = 1.0  # how long before a wait says what it is waiting for
_SAID_S = 10.0  # how often it says so again


def _is_up() -> UsageError:
    return UsageError(
        "the server is running, with the options that it was started with",
        hint="`argosy stop`, then `argosy up ...` starts it with others",
    )


@click.command("up", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument(
    "arguments", nargs=-1, type=click.UNPROCESSED, metavar="[MODEL]... [OPTIONS OF SERVE]",
    shell_complete=completion.models,
)  # fmt: skip
@click.option("--print", "shown", is_flag=True, help="Print the units of systemd, and install nothing.")
@click.option("--no-systemd", is_flag=True, help="Start a process in the background, without systemd.")
def up(arguments: tuple[str, ...], shown: bool, no_systemd: bool) -> None:
    """Start a server for this user: systemd starts it on first use, or it runs in the background.

    It takes the models and options of `argosy serve`. `argosy ps`, `argosy logs` and `argosy stop` belong to it.

    \b
    Examples:
      argosy up
      argosy up Qwen3-30B-A3B --memory 16GiB
    """
    # These options may also follow those of `serve`.
    shown, no_systemd = shown or "--print" in arguments, no_systemd or "--no-systemd" in arguments
    arguments = tuple(one for one in arguments if one not in ("--print", "--no-systemd"))
    command, options = _command(arguments)
    if shown:
        for name, text in _units(command, options, arguments).items():
            print(f"# {name}\n{text}")
        return
    with own_server.open_state() as state, _alone(state):
        process = own_server.running() or own_server.awaited()
        if process is not None and process.is_ending:
            raise UsageError(
                f"the server, pid {process.pid}, finishes its answers and ends",
                hint="`argosy stop` waits for it, then `argosy up` starts another",
            )
        if process is not None and arguments:
            raise _is_up()
        if process is None and not no_systemd and user_units.is_reachable():
            process = _install(state, _units(command, options, arguments), options)
        elif process is None:
            process = _start(state, command)
    if process.pid:
        print(f"the server runs at {process.address}, pid {process.pid}")
    else:
        print(f"systemd starts the server on first use, at {process.address}")
    print("`argosy ps` shows what it does, `argosy logs` its log, `argosy stop` ends it", file=sys.stderr)


def _command(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The server's command line, whose options `serve` accepts, and their values.

    Raises:
        UsageError, click.UsageError: `serve` rejects them.
    """
    from argosy.cli.commands.serve import serve
    from argosy.serve.http.listen import LONGEST_PATH

    if len(os.fsencode(own_server.socket_path())) > LONGEST_PATH:
        raise UsageError(
            f"{own_server.socket_path()} is too long: a socket's path may have {LONGEST_PATH} bytes",
            hint="`export XDG_STATE_HOME=DIR` names a shorter directory",
        )
    context = serve.make_context("argosy up", list(arguments))
    for name in _OF_SERVICES:
        if context.params[name]:
            raise UsageError(
                f"--{name.replace('_', '-')} is for a server that an operator runs",
                hint="`argosy serve` has it: docs/guides/deploying.md",
            )
    given = [] if context.params["models"] or context.params["library"] else ["--library"]
    if (given or context.params["library"]) and context.params["idle_unload"] is None:
        given += ["--idle-unload", _IDLE_UNLOAD]
    given += ["--listen", own_server.socket_url()]
    if context.params["log_limit"] is None:
        given += ["--log-limit", _LOG_LIMIT]
    given += ["--host", context.params["host"], "--port", str(context.params["port"])]
    checking = serve.make_context("argosy up", [*arguments, *given, "--check"])
    with contextlib.redirect_stdout(io.StringIO()):
        serve.invoke(checking)
    # -P, so that a folder `argosy` in the working directory is not taken for the program.
    return [sys.executable, "-P", "-m", "argosy", "serve", *arguments, *given], context.params


def _units(command: Sequence[str], options: dict[str, Any], arguments: Sequence[str]) -> dict[str, str]:
    """The systemd units for the server."""
    return user_units.texts(
        command, path=own_server.socket_path(), host=options["host"], port=options["port"],
        mode=options["socket_mode"], drain_s=options["drain"], directory=Path.cwd() if arguments else None,
        environment=os.environ,
    )  # fmt: skip


def _install(state: Directory, units: dict[str, str], options: dict[str, Any]) -> Process:
    """Let systemd listen for the server, and start it now if it names models.

    Raises:
        UsageError, ServerNotUsable: systemd or the server does not start.
    """
    user_units.install(units)
    shown = f"[{options['host']}]" if ":" in options["host"] else options["host"]
    own_server.note_awaited(state, f"http://{shown}:{options['port']}")
    _say(
        f"systemd listens for it, also after each login: {user_units.SOCKET} and {user_units.SERVICE} are written and "
        f"enabled; `argosy stop` and `systemctl --user disable {user_units.SOCKET}` undo that"
    )
    if options["models"]:
        _start_service()
    process = own_server.running() or own_server.awaited()
    if process is None:
        raise ServerNotUsable(
            f"systemd does not listen on {own_server.socket_path()}",
            hint="`systemctl --user status argosy.socket` says why; `argosy up --no-systemd` does without it",
        )
    return process


def _start_service() -> None:
    """Start the service now, so that problems with its models are reported."""
    starting = user_units.start()
    began = time.monotonic()
    try:
        while (code := _code_within(starting, _SAID_S)) is None:
            waited_s = time.monotonic() - began
            if waited_s > START_S:
                raise ServerNotUsable(
                    f"the server was not ready after {START_S:.0f} s", hint="`argosy logs` shows its log"
                )
            _say(f"waiting for the server: {waited_s:.0f} s")
        if code:
            sys.stderr.write(_printable(user_units.last_lines()))
            raise ServerNotUsable(
                "the server did not start", hint="the lines above are its log; `argosy logs` shows more"
            )
    except BaseException:  # even on ^C, because it would run on unnoticed
        starting.kill()
        starting.wait(timeout=_NOW_S)
        user_units.disable()
        user_units.stop_service()
        raise


def _code_within(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """The exit code of a process that ends in time."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(timeout=seconds)
    return None


@contextlib.contextmanager
def _alone(state: Directory) -> Iterator[None]:
    """Hold the lock for starting and stopping the server."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(state.locked(own_server.LOCK, wait_s=0.0))
        except TimeoutError:
            _say("another command starts or stops the server; waiting for it")
            try:
                held.enter_context(state.locked(own_server.LOCK, wait_s=START_S))
            except TimeoutError:
                raise UsageError(
                    "another command has been starting or stopping the server for too long"
                ) from None
        yield


def _start(state: Directory, command: Sequence[str]) -> Process:
    """Start the server and copy its log to stderr until it answers.

    Raises:
        ServerNotUsable: it does not start; its log says why.
    """
    log = state.open(own_server.LOG, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    try:
        os.set_blocking(log, True)
        reader = _LogReader(log, os.fstat(log).st_size)  # earlier lines are from earlier servers
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, umask=0o077
        )
        try:
            return _wait_until_ready(child, reader)
        except BaseException:  # even on ^C, because it would run on unnoticed
            _end(child)
            raise
    finally:
        os.close(log)


def _wait_until_ready(child: subprocess.Popen[bytes], log: _LogReader) -> Process:
    server = _own()
    began = said = time.monotonic()
    is_log_empty = True
    while time.monotonic() - began < START_S:
        has_ended = child.poll() is not None  # before its log is read, which then holds its last words
        new = log.new()
        sys.stderr.write(new)
        is_log_empty = is_log_empty and not new
        if has_ended:
            raise ServerNotUsable(
                f"the server ended with exit code {child.returncode} before it was ready",
                hint="its log is empty: is the drive of your home directory full? `argosy serve` shows why it ends"
                if is_log_empty
                else "the lines above are its log; `argosy logs` shows more",
                url=own_server.socket_url(),
            )
        process = own_server.running()
        if process is not None and process.pid == child.pid and server.is_ready():
            child.returncode = 0  # it runs on without us, so do not wait for it
            return process
        if time.monotonic() - said > _SAY_S:
            said += _SAID_S
            _say(f"waiting for the server: {time.monotonic() - began:.0f} s")
        time.sleep(_LOOK_S)
    raise ServerNotUsable(
        f"the server was not ready after {START_S:.0f} s", hint="`argosy logs` shows its log", url=server.url
    )


def _end(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(timeout=_NOW_S)
    except subprocess.TimeoutExpired:
        child.kill()


def _own(timeout_s: float = TIMEOUT_S) -> Any:
    from argosy.cli.shared.remote import RemoteServer
    from argosy.cli.shared.settings import api_key

    return RemoteServer(own_server.socket_url(), api_key(), timeout_s=timeout_s)


@click.command("ps")
@server_options
@click.option("--json", "as_json", is_flag=True, help="Print the same facts as JSON.")
def ps(url: str, key_file: Path | None, as_json: bool) -> None:
    """Show the server: its models, memory and requests.

    \b
    Examples:
      argosy ps
      argosy ps --url http://10.0.0.7:8080
    """
    from argosy.cli.shared.remote import RemoteServer
    from argosy.cli.shared.settings import api_key

    process = own_server.running() or own_server.awaited()
    if url != own_server.socket_url():
        process = None
    if process is not None and not process.pid:  # asking would start it
        if as_json:
            print(json.dumps({"process": process._asdict(), "models": None, "memory": None, "queue": None}))
        else:
            print(f"server    {quote(process.address)}, started by systemd on first use")
        return
    try:
        state = RemoteServer(url, api_key(key_file)).state()
    except ServerNotUsable as error:
        if process is None or not error.facts.get("is_absent"):
            raise
        raise ServerNotUsable(
            f"the server, pid {process.pid}, "
            + ("finishes its answers and ends" if process.is_ending else "is loading, or it hangs"),
            hint="`argosy logs -f` shows its log",
            is_absent=True,
        ) from None
    if as_json:
        process_facts = None if process is None else process._asdict()
        print(
            json.dumps(
                {"process": process_facts, **{key: state.get(key) for key in ("models", "memory", "queue")}}
            )
        )
        return
    if process is not None:
        print(f"server    {quote(process.address)}, pid {process.pid}, since {_ago(process.since)}")
    else:
        print(f"server    {url}")
    print("\n".join(_state_lines(state)))


def _state_lines(state: dict[str, Any]) -> Iterator[str]:
    memory, queue = fields(state.get("memory")), fields(state.get("queue"))
    used = sum(whole(line.get("bytes")) for line in entries(memory.get("lines")))
    yield f"memory    {format_bytes(used)} of {format_bytes(whole(memory.get('budget_bytes')))}"
    models = entries(state.get("models"))
    running, waiting = (sum(whole(one.get(key)) for one in models) for key in ("running", "waiting"))
    yield f"requests  {running} running, {waiting} waiting, at most {whole(queue.get('max_sequences'))} at once"
    here = [one for one in models if one.get("state") != "unloaded"]
    if others := len(models) - len(here):
        yield f"unloaded  {counted(others, 'model')}, loaded when a request names one (`argosy list`)"
    if not here:
        return
    rows = []
    for one in here:
        memory_bytes, unloads_in_s = whole(one.get("memory_bytes")), number(one.get("unloads_in_s"))
        is_ready = one.get("state") == "ready"
        unloads = f"in {time_span(unloads_in_s)}" if is_ready and unloads_in_s is not None else "-"
        requests = whole(one.get("running")) + whole(one.get("waiting"))
        size = format_bytes(memory_bytes or used * is_ready) if is_ready else "-"
        rows.append((quote(one.get("id")), quote(one.get("state")), size, str(requests), unloads))
    yield from table_lines(("MODEL", "STATE", "MEMORY", "REQUESTS", "UNLOADS"), rows)


@click.command("stop")
@click.argument("model", required=False, shell_complete=completion.models)
@click.option("--now", is_flag=True, help="End running answers, instead of waiting for them.")
@click.option("--kill", is_flag=True, help="Kill a server that does not react to --now.")
def stop(model: str | None, now: bool, kill: bool) -> None:
    """Stop the server, or unload MODEL from it. Running answers may finish first.

    \b
    Examples:
      argosy stop
      argosy stop Qwen3-30B-A3B
    """
    if model is not None:
        if now or kill:
            raise UsageError(
                f"{'--now' if now else '--kill'} is for the whole server",
                hint=f"`argosy stop {model}` unloads an idle model",
            )
        print(f"unloaded {_own().unload(model)}")
        return
    with contextlib.ExitStack() as opened:
        with own_server.open_state() as state, _alone(state):
            process, is_service = own_server.running(), user_units.is_active()
            if process is None and not is_service:
                raise _is_down()
            # before the server stops listening
            why = None if process is None or now or kill else _why_wait(process)
            if is_service:
                user_units.stop_listening()
            descriptor = None if process is None else _descriptor_of(process)
            if process is not None and descriptor is not None:
                opened.callback(os.close, descriptor)
                limit_s = _NOW_S
                if why is not None:
                    line, limit_s = why
                    _say(line)
                _tell_to_end(state, process, descriptor, now=now, kill=kill)
        # Without the lock, because `argosy stop --now` may come meanwhile.
        if process is not None and descriptor is not None:
            _wait_for_end(process, descriptor, limit_s)
    if is_service:
        user_units.stop_service()
    print("the server has stopped")
    if is_service and user_units.is_enabled():
        _say(
            "systemd listens for it again after the next login; "
            f"`systemctl --user disable {user_units.SOCKET}` ends that"
        )


def _descriptor_of(process: Process) -> int | None:
    """A descriptor for exactly this process, not a later one with the same id; None if it has just ended."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return None
    if own_server.is_running(process):
        return descriptor
    os.close(descriptor)
    return None


def _tell_to_end(state: Directory, process: Process, descriptor: int, *, now: bool, kill: bool) -> None:
    """Send each signal once."""
    if kill:
        _signal(descriptor, signal.SIGKILL)
        return
    if not process.is_ending:
        own_server.note_end(state, process)
        _signal(descriptor, signal.SIGTERM)
    if now:
        # The second signal ends answers. It is a different signal, because the kernel queues only one of each.
        _signal(descriptor, signal.SIGINT)


def _signal(descriptor: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        signal.pidfd_send_signal(descriptor, number)


def _why_wait(process: Process) -> tuple[str, float]:
    """What a server does before it ends, and how many seconds that may take."""
    if process.is_ending:
        return "the server was told to end, and finishes its answers; `argosy stop --now` ends them", _STOP_S
    try:
        state = _own(_ASK_S).state()
    except ServerNotUsable:
        return f"the server, pid {process.pid}, does not answer; it is told to end", _SILENT_S
    models = entries(state.get("models"))
    count = sum(whole(one.get(key)) for one in models for key in ("running", "waiting"))
    if not count:
        return "the server is told to end", _STOP_S
    longest = max((number(one.get("seconds")) or 0.0 for one in entries(state.get("running"))), default=0.0)
    return (
        f"{counted(count, 'request')} {'is' if count == 1 else 'are'} running, {longest:.0f} s so far, and may "
        "finish within the time of --drain (30 s); `argosy stop --now` ends answers, and ^C ends only this wait"
    ), _STOP_S


def _wait_for_end(process: Process, descriptor: int, limit_s: float) -> None:
    """Wait until a process has ended, reporting the wait from time to time.

    Raises:
        ServerNotUsable: it takes longer than `limit_s`.
    """
    began = time.monotonic()
    while own_server.is_running(process):
        waited_s = time.monotonic() - began
        if waited_s >= limit_s:
            raise ServerNotUsable(
                f"the server, pid {process.pid}, was told to end, and has not reacted for {limit_s:.0f} s",
                hint="`argosy stop --kill` kills it, and its running answers with it",
            )
        if waited_s >= _SAID_S:
            _say(f"waiting for the server to end: {waited_s:.0f} s")
        with selectors.DefaultSelector() as ended:  # the descriptor becomes readable when the process ends
            ended.register(descriptor, selectors.EVENT_READ)
            ended.select(min(_SAID_S, limit_s - waited_s))


@click.command("logs")
@click.option("-f", "--follow", is_flag=True, help="Go on with new lines until ^C.")
@click.option("-n", "--lines", default=100, show_default=True, type=WholeNumber(0), help="The last lines.")
def logs(follow: bool, lines: int) -> None:
    """Show the log of the server that `argosy up` started, which systemd keeps in its journal.

    \b
    Examples:
      argosy logs
      argosy logs -f
    """
    with own_server.open_state() as state:
        process = own_server.running()
        if user_units.is_installed() and (process is None or user_units.runs(process.pid)):
            user_units.show_log(follow=follow, lines=lines)
        try:
            log = state.open(own_server.LOG)
        except FileNotFoundError:
            if process is None:
                raise _is_down() from None
            raise UsageError("the server was not started by `argosy up`, and its log is elsewhere") from None
    try:
        reader = _LogReader(log, max(0, os.fstat(log).st_size - 2 * _LOG_BYTES))
        last = reader.new().splitlines(keepends=True)
        _print("".join(last[len(last) - lines :] if lines < len(last) else last))
        while follow:
            time.sleep(_LOOK_S)
            _print(reader.new())
    finally:
        os.close(log)


class _LogReader:
    """Reads additions to a log, whose older half the server drops when it is too large."""

    def __init__(self, descriptor: int, shown: int) -> None:
        self._descriptor, self._shown = descriptor, shown
        self._last = os.pread(descriptor, min(shown, _LAST_BYTES), max(0, shown - _LAST_BYTES))

    def new(self) -> str:
        is_shorter = os.fstat(self._descriptor).st_size < self._shown
        begin = 0 if is_shorter else self._shown
        new = os.pread(self._descriptor, 2 * _LOG_BYTES, begin)
        self._shown = begin + len(new)
        if is_shorter and self._last:
            new = new.rpartition(self._last)[2]
        self._last = (self._last + new)[-_LAST_BYTES:]
        return _printable(new.decode("utf-8", "replace"))


def _is_down() -> ServerNotUsable:
    return ServerNotUsable(
        "no server is running for this user", hint="`argosy up` starts one", is_absent=True
    )


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() or char == "\n" else "?" for char in text)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _ago(since: float) -> str:
    at = time.strftime("%Y-%m-%d %H:%M", time.localtime(since))
    return f"{at} ({time_span(time.time() - since)})"
