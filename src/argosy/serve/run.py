"""Start and stop the server. On SIGTERM it refuses new requests, waits for running ones, then ends the rest.

    bind  ->  (the engine is opened)  ->  serve: listen, answer, drain

This file alone knows uvicorn. It relies on members that uvicorn does not document and may change in any minor release,
so `pyproject.toml` bounds its version:

    Server       startup, shutdown, capture_signals, handle_exit, should_exit, force_exit, server_state.connections
    H11Protocol  its module, its arguments, app_state, connections, cycle.response_complete, loop, transport
    Config       `http` as a function that makes a protocol

Elsewhere: the application is `app.py`; options are `cli/serve.py`.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import ipaddress
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from argosy.config import KV_BLOCK_TOKENS
from argosy.engine.loop import EngineLoop
from argosy.engine.verification import compare_decode
from argosy.errors import UsageError
from argosy.guard.keys import KeyFile, KeyRing
from argosy.guard.limits import Limits, UseFile
from argosy.observe.live import LiveCache
from argosy.prompt.replay import ReplayMemory
from argosy.serve.app import make_app
from argosy.serve.core import ModelFacts, Service
from argosy.serve.gate import NO_ROOM, Gate
from argosy.serve.kept_items import KeptItems
from argosy.serve.key_watch import KeyWatch
from argosy.serve.log import LogWriter, where_it_failed
from argosy.serve.media_hosts import MediaHosts

if TYPE_CHECKING:
    from argosy.engine.engine import Engine
    from argosy.engine.forecast import Speeds

log = logging.getLogger("argosy.serve")

MAX_CONNECTIONS = 512
# This many connections beyond the limit get an error; any more are closed without an answer.
_TOLD_CONNECTIONS = 64
_OTHER_FILES = 256  # open files besides connections: for prompts, for the usage of keys
_BACKLOG = 1024  # connections that the kernel queues for the server
_SAID_EVERY_S = 60.0  # how often to log that connections cannot be accepted
KEEP_ALIVE_S = 15  # longest idle time of a connection
HEADER_S = 15.0  # longest time for the head of a request
STUCK_S = 60.0  # a client that reads nothing of its answer for this long is disconnected
_LAST_WORDS_S = 0.5  # after the second signal, for answers to send their end
_LOOK_S = 0.05  # how often to check for a second signal
# The kernel's buffer for a client that does not read; the default is megabytes.
_SEND_BUFFER_BYTES = 128 << 10


def require_keys(host: str, keys: Path | None) -> None:
    """Allow a server without keys on loopback addresses only.

    Raises:
        UsageError: other machines could send requests without a key.
    """
    try:
        is_local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = False
    if keys is None and not is_local:
        raise UsageError(
            f"listening on {host} admits other machines, and there are no keys",
            hint="`argosy keys add NAME --keys FILE`, then `argosy serve ... --keys FILE`; or --host 127.0.0.1",
        )


def make_room_for_files(max_connections: int) -> None:
    """Raise the limit on open files to its maximum: a server at that limit cannot accept a connection.

    Called before the model is opened, because each part of a model takes two files, and again afterwards.

    Raises:
        UsageError: the maximum is too low for `max_connections` in addition to the files already open.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    needed = _num_open_files() + max_connections + _TOLD_CONNECTIONS + _OTHER_FILES
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UsageError(
            f"{max_connections} connections need {needed} open files, and the limit is {hard}",
            hint=f"`ulimit -Hn {needed}`, or --max-connections {max(1, hard - needed + max_connections)}",
        )


def _num_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


class _Listener(socket.socket):
    """A socket from which asyncio accepts connections one at a time.

    asyncio accepts as many connections in a row as the backlog it asks for. At the limit on open files, it would fail,
    report and schedule a retry for each of them.
    """

    def listen(self, backlog: int = 1, /) -> None:
        super().listen(_BACKLOG)


@contextmanager
def bind(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Bind sockets to all addresses of `host`, without listening yet.

    They are bound before the model is loaded, so that a port in use is reported at once. They listen only after it is
    loaded. Until then connections are refused, so that no client waits for minutes, or for an answer that never comes.

    Raises:
        UsageError: the address is in use, or does not belong to this machine.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise UsageError(
            f"--host {host} is not an address: {error.strerror}",
            hint="use --host 127.0.0.1, or 0.0.0.0 for all addresses",
        ) from None
    with ExitStack() as stack:
        sockets: list[socket.socket] = []
        fault: OSError | None = None
        for family, kind, protocol, _, address in dict.fromkeys(found):
            try:
                one = stack.enter_context(_Listener(family, kind, protocol))
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                one.bind((address[0], sockets[0].getsockname()[1] if sockets else port, *address[2:]))
            except OSError as error:  # `localhost` has an IPv6 address even if IPv6 is disabled
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise _cannot_listen(error, host, port) from None
                fault = error
            else:
                sockets.append(one)
        if not sockets:
            assert fault is not None
            raise _cannot_listen(fault, host, port) from None
        yield sockets


def _cannot_listen(error: OSError, host: str, port: int) -> UsageError:
    match error.errno:
        case errno.EADDRINUSE:
            told, hint = (
                f"port {port} of {host} is in use",
                f"use --port {port % 65535 + 1}, or --port 0 for any free port",
            )
        case errno.EACCES:
            told, hint = f"this user may not listen on port {port}", "use --port 8080, or another above 1023"
        case _:
            told = f"{host} is not an address of this machine: {error.strerror}"
            hint = "use --host 127.0.0.1"
    return UsageError(told, hint=hint)


class TimedProtocol(H11Protocol):
    """HTTP/1.1 that disconnects slow clients: those whose request head takes HEADER_S, and those that do not read.

    Beyond `max_connections` the gate refuses a connection's request in its own dialect, and closes the connection.
    The next part of an answer is made only after the client took the last one. A client that reads nothing for STUCK_S
    is disconnected, even if its answer is complete and only the end of the connection is pending.
    """

    _head_timer: asyncio.TimerHandle | None = None
    _stuck_timer: asyncio.TimerHandle | None = None

    def __init__(self, *args: Any, max_connections: int, **more: Any) -> None:
        super().__init__(*args, **more)
        self._max_connections = max_connections

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        beyond = len(self.connections) - self._max_connections
        if beyond > _TOLD_CONNECTIONS:
            transport.abort()
            return
        if beyond > 0:
            self.app_state = {**self.app_state, NO_ROOM: True}
        transport.set_write_buffer_limits(high=0)  # writing is paused whenever data is pending
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._expect_head()
        elif self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._stuck_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client reads too slowly: watch it from now on."""
        super().pause_writing()
        self._expect_reading()

    def resume_writing(self) -> None:
        if self._stuck_timer is not None:
            self._stuck_timer.cancel()
        super().resume_writing()

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEADER_S, self.transport.close)

    def _expect_reading(self) -> None:
        unread = self.transport.get_write_buffer_size()

        def check() -> None:
            if self.transport.get_write_buffer_size() < unread:
                self._expect_reading()
            else:
                self.transport.abort()

        self._stuck_timer = self.loop.call_later(STUCK_S, check)


class _Server(uvicorn.Server):
    """uvicorn with our own start, signals and shutdown.

    Args:
        started: called when the server listens.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        loop: EngineLoop,
        drain_s: float,
        started: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._service, self._loop, self._drain_s, self._started = service, loop, drain_s, started
        self._said_at: float | None = None
        self._is_told_twice = False

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Keep our signal handlers to the end: uvicorn would restore the old ones, and a late signal would kill us."""

        def handle_with(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
            if threading.current_thread() is threading.main_thread():
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, handler)

        handle_with(self.handle_exit)
        try:
            yield
        finally:
            # Everything is closed, and Python handlers stop working before the interpreter exits.
            handle_with(signal.SIG_IGN)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second ends the server. Both lead to exit code 0."""
        self._is_told_twice = self.should_exit
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(self._report)
        await super().startup(sockets)
        self._started()

    def _report(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log a failure outside any request. The message that asyncio prints would quote the objects involved."""
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            now = time.monotonic()  # asyncio retries every second
            if self._said_at is None or now - self._said_at >= _SAID_EVERY_S:
                self._said_at = now
                log.error("connections wait, because the limit on open files is reached: %s", error.strerror)
        elif error is not None:
            log.error("event loop: %s", where_it_failed(error))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.is_draining = True

        ending = asyncio.create_task(self._end_answers())
        await super().shutdown(sockets)
        ending.cancel()
        await asyncio.to_thread(self._loop.close)

    async def _end_answers(self) -> None:
        """Let answers finish within `drain_s`, then end the rest with an error.

        A second signal ends them at once, and closes the remaining connections half a second later.
        """
        until = time.monotonic() + self._drain_s
        while not self._is_told_twice and time.monotonic() < until:
            if await asyncio.to_thread(self._loop.drain, _LOOK_S):
                break
        await asyncio.to_thread(self._loop.close)  # running requests get an error
        while not self._is_told_twice:
            await asyncio.sleep(_LOOK_S)
        await asyncio.sleep(_LAST_WORDS_S)
        for connection in list(self.server_state.connections):
            connection.transport.abort()  # otherwise uvicorn would wait for it
        self.force_exit = True


def uvicorn_config(app: Gate, *, grace_s: float, max_connections: int = MAX_CONNECTIONS) -> uvicorn.Config:
    """Configure uvicorn to run `app` without logs and server headers, and with short timeouts."""
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # its tracebacks could quote content
    return uvicorn.Config(
        app,
        http=functools.partial(TimedProtocol, max_connections=max_connections),  # type: ignore[arg-type]
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        h11_max_incomplete_event_size=32 << 10,
        timeout_graceful_shutdown=int(grace_s),
        backlog=1,  # see _Listener
    )


def serve(
    engine: Engine,
    name: str,
    sockets: Sequence[socket.socket],
    *,
    host: str,
    keys: Path | None = None,
    hosts: Collection[str] = (),
    drain_s: float = 30.0,
    max_connections: int = MAX_CONNECTIONS,
    keep_billing_line: bool = False,
    any_model: bool = False,
    media_hosts: MediaHosts | None = None,
    recent_cache: LiveCache | None = None,
    speeds: Speeds | None = None,
    expectation: str | None = None,
) -> None:
    """Serve `engine` until a signal; keep answers for replay as far as the memory plan has room.

    After the first signal, no signal ends the process before everything is closed; the exit code stays 0.

    Args:
        sockets: from `bind`.
        host: the host to print in the address of the server.
        recent_cache: tells the hit rate of the last minutes; None: it is not known.
        speeds: predictions for `/metrics`; None: there are none.
        expectation: a line to print below the address.

    Raises:
        UsageError: another process has started to listen there in the meantime.
    """
    require_keys(host, keys)
    make_room_for_files(max_connections)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would compete with the model's
    ring = KeyRing(None if keys is None else KeyFile(keys))
    counts = None if keys is None else UseFile(keys.with_name(keys.name + ".use"))
    limits = Limits(file=counts, known=ring.ids)
    if keys is not None:
        engine.forget_others(["", *ring.ids])  # drops tenants whose keys were revoked while no server ran
    writer = LogWriter(sys.stderr.fileno())
    log.setLevel(logging.INFO)
    log.handlers = [writer]
    config = engine.config
    model = ModelFacts(
        id=name,
        family=config.family,
        context_tokens=engine.plan.context_tokens,
        num_layers=len(config.layers),
        num_experts=config.num_experts,
        experts_per_token=config.experts_per_token,
        vocab_size=config.vocab_size,
        media_kinds=engine.media_kinds,
        hears=engine.hears,
    )
    # A quarter is for items that clients refer to; the rest is for tokens of answers.
    kept_bytes = engine.plan.replay_bytes // 4
    prompts = engine.prompts.remembering(ReplayMemory(max_bytes=engine.plan.replay_bytes - kept_bytes))
    try:
        with EngineLoop(engine, report=lambda error: log.error("engine: %s", where_it_failed(error))) as loop:
            service = Service(
                loop, prompts, engine.tokenizer, model, keep_billing_line=keep_billing_line, any_model=any_model,
                kept=KeptItems(max_bytes=kept_bytes), media_hosts=media_hosts, ears=engine.ears,
            )  # fmt: skip
            app = make_app(
                service,
                ring,
                block_tokens=KV_BLOCK_TOKENS,
                max_sequences=engine.settings.max_sequences,
                hosts=hosts,
                limits=limits,
                recent_cache=recent_cache,
                compare=None if speeds is None else functools.partial(compare_decode, speeds, engine.plan),
            )
            settings = uvicorn_config(app, grace_s=drain_s + 5, max_connections=max_connections)
            port = sockets[0].getsockname()[1]
            shown = f"[{host}]" if ":" in host else host

            def started() -> None:
                print(f"serving {name} at http://{shown}:{port}", file=sys.stderr, flush=True)
                if expectation is not None:
                    print(expectation, file=sys.stderr, flush=True)

            with KeyWatch(ring, limits, service.revoke):
                try:
                    _Server(settings, service, loop, drain_s, started).run(list(sockets))
                except OSError as error:
                    if error.errno != errno.EADDRINUSE:
                        raise
                    raise _cannot_listen(error, host, port) from None
    finally:
        try:
            limits.close()
        finally:
            writer.close()
