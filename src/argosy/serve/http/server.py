"""Run an ASGI application on uvicorn until a signal, with our own start, timeouts and shutdown.

Only this file knows uvicorn. It relies on undocumented members that may change in any minor release, so
`pyproject.toml` bounds uvicorn's version:

    Server       startup, main_loop, shutdown, capture_signals, handle_exit, should_exit, force_exit,
                 server_state.connections
    H11Protocol  its module, its arguments, app_state, client, conn, connections, cycle.response_complete,
                 flow.resume_reading, loop, scheme, transport
    Config       `http` as a function that makes a protocol

Elsewhere: sockets, TLS and proxies are `listen.py`; systemd's sockets are `systemd.py`; a server of models is
`serve/run.py`.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import gc
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from argosy.errors import UsageError
from argosy.serve.http.gate import NO_ROOM, Gate
from argosy.serve.http.listen import SOCKET_CLIENT, Certificate, Front, Listener, address_of, cannot_listen
from argosy.serve.http.log import LogFormat, where_it_failed
from argosy.serve.http.origins import Origins, Site
from argosy.serve.http.running import Running
from argosy.serve.http.systemd import Notifier
from argosy.serve.http.work import Threads

log = logging.getLogger("argosy.serve")

MAX_CONNECTIONS = 512
# This many connections beyond the limit get an error response; any more are closed without one.
_TOLD_CONNECTIONS = 64
_OTHER_FILES = 256  # open files other than connections, such as prompts and the usage of keys
_SAID_EVERY_S = 60.0  # how often to log that connections cannot be accepted
KEEP_ALIVE_S = 15  # longest idle time of a connection
HEADER_S = 15.0  # longest time for the head of a request
_MOST_AHEAD_BYTES = 64 << 10  # bytes of pipelined requests that are read while another is answered
STUCK_S = 60.0  # a client that reads nothing of its answer for this long is disconnected
# How long another thread may hold the interpreter before the event loop continues. The loop may wait this long
# after every system call, and a request makes a dozen; Python's default is ten times as long.
_SWITCH_S = 0.0005
_LAST_WORDS_S = 0.5  # after the second signal, time for answers to send their end
_LOOK_S = 0.05  # how often to check for a second signal
# The kernel's buffer for a client that does not read; the default is megabytes.
_SEND_BUFFER_BYTES = 128 << 10
SWEEP_S = 1.0  # how often the server drops what has expired


def make_room_for_files(max_connections: int) -> None:
    """Raise the limit on open files to its maximum, because a server at the limit cannot accept connections.

    Called before the model is opened, because each of its files takes two descriptors, and again afterwards.

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


class TimedProtocol(H11Protocol):
    """HTTP/1.1 that disconnects slow clients: those whose request head takes over HEADER_S, and those that do not
    read.

    Beyond `max_connections` the gate refuses a connection's request in its own dialect and closes the connection.
    The next part of an answer is made only after the client has taken the last one. A client that reads nothing for
    STUCK_S is disconnected, even if its answer is complete and only the close of the connection is pending.
    """

    _head_timer: asyncio.TimerHandle | None = None
    _stuck_timer: asyncio.TimerHandle | None = None

    def __init__(self, *args: Any, max_connections: int, **more: Any) -> None:
        super().__init__(*args, **more)
        self._max_connections = max_connections

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if transport.get_extra_info("socket").family == socket.AF_UNIX:
            self.client = (SOCKET_CLIENT, 0)
        beyond = len(self.connections) - self._max_connections
        if beyond > _TOLD_CONNECTIONS:
            transport.abort()
            return
        if beyond > 0:
            self.app_state = {**self.app_state, NO_ROOM: True}
        # Writing pauses whenever data is pending. asyncio pauses above the limit, or with TLS at the limit.
        transport.set_write_buffer_limits(high=1 if self.scheme == "https" else 0)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._expect_head()
        elif self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        # uvicorn stops reading while another request waits behind this answer, and would not notice that the client
        # leaves.
        if self.conn.their_state is h11.DONE and len(self.conn.trailing_data[0]) < _MOST_AHEAD_BYTES:
            self.flow.resume_reading()

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


class Lifecycle(Protocol):
    """The parts that a server opens before it listens and ends before it stops.

    is_draining: no new requests are taken.
    """

    is_draining: bool

    async def preload(self, names: Sequence[str]) -> None: ...

    def drop_expired(self) -> None:
        """Free expired data kept for clients; called every SWEEP_S."""

    async def stop(self) -> None: ...

    async def close(self) -> None: ...


class WokenServer(uvicorn.Server):
    """uvicorn that sleeps until it is told to end, instead of looking ten times a second whether it is."""

    _told: asyncio.Event | None = None

    async def main_loop(self) -> None:
        self._events, self._told = asyncio.get_running_loop(), asyncio.Event()
        if not self.should_exit:
            await self._told.wait()

    def end(self) -> None:
        """Shut down; may be called in any thread and in a signal handler, at any time before the server has ended."""
        self.should_exit = True
        if self._told is not None:
            self._events.call_soon_threadsafe(self._told.set)


class Server(WokenServer):
    """uvicorn with our own start, signals and shutdown.

    Args:
        models: or the servers of a router.
        running: the requests that run.
        preload: names of models to load before the server listens.
        started: called when the server listens.
        certificate: read again on SIGHUP; None: the server has none.
        reload: reads further files again on SIGHUP, in a thread.
        beside: runs while the server listens, until it is cancelled; None: nothing does.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        models: Lifecycle,
        running: Running,
        drain_s: float,
        started: Callable[[], None],
        preload: Sequence[str],
        certificate: Certificate | None = None,
        reload: Callable[[], None] | None = None,
        beside: Callable[[], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        super().__init__(config)
        self._notifier = Notifier()
        self._beside = beside
        self._running_beside: asyncio.Task[None] | None = None
        self._reload_more = reload
        self._models, self._running, self._drain_s = models, running, drain_s
        self._started, self._preload = started, preload
        self._certificate = certificate
        self._sweep: asyncio.TimerHandle | None = None
        self._said_at: float | None = None
        self._is_told_twice = False

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Keep our signal handlers to the end: uvicorn would restore the old ones, and a late signal would kill the
        process.
        """

        def handle_with(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
            if threading.current_thread() is threading.main_thread():
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, handler)

        handle_with(self.handle_exit)
        self._handle_hangup_with(self._handle_hangup)
        try:
            yield
        finally:
            # By now everything is closed, and Python's handlers stop working before the interpreter exits.
            handle_with(signal.SIG_IGN)
            self._handle_hangup_with(signal.SIG_IGN)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second ends the server. Both lead to exit code 0."""
        self._is_told_twice = self.should_exit
        self.end()

    def _handle_hangup_with(self, handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
        """Install the SIGHUP handler, unless there is nothing to read again."""
        has_files = self._certificate is not None or self._reload_more is not None
        if has_files and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGHUP, handler)

    def _handle_hangup(self, sig: int, frame: FrameType | None) -> None:
        """Schedule the reload, because a signal handler must not write to the log, whose queue may be locked."""
        asyncio.get_running_loop().call_soon_threadsafe(self._reload)

    def _reload(self) -> None:
        if self._certificate is not None:
            try:
                self._certificate.reload()
            except UsageError as error:
                log.error("tls: the certificate in use stays: %s", error)
            else:
                log.info("tls: the certificate was read again")
        if self._reload_more is not None:
            threading.Thread(target=self._reload_more, daemon=True).start()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        events = asyncio.get_running_loop()
        events.set_exception_handler(self._report)
        events.set_default_executor(Threads(thread_name_prefix="argosy-calls"))
        if self._certificate is not None:  # uvicorn would allow a slow TLS handshake a minute
            events.create_server = functools.partial(  # type: ignore[method-assign]
                events.create_server, ssl_handshake_timeout=HEADER_S
            )
        try:
            await self._load_first()
            if not self.should_exit:
                await super().startup(sockets)
                self._drop_expired()
                if self._beside is not None:
                    self._running_beside = asyncio.create_task(self._beside())
                self._started()
                self._notifier.tell("READY=1")
        except BaseException:
            await self._models.close()
            raise
        if self.should_exit:  # uvicorn would exit without a shutdown
            await self._models.close()

    def _drop_expired(self) -> None:
        """Free expired data periodically, even if no request comes."""
        self._models.drop_expired()
        self._sweep = asyncio.get_running_loop().call_later(SWEEP_S, self._drop_expired)

    async def _load_first(self) -> None:
        """Load the requested models; a signal interrupts that."""
        loading = asyncio.create_task(self._models.preload(self._preload))
        while not loading.done():
            await asyncio.wait([loading], timeout=_LOOK_S)
            if self.should_exit:
                await self._models.stop()
                await asyncio.wait([loading])
                return
        loading.result()

    def _report(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log a failure outside any request. asyncio's own message would quote the objects involved."""
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            now = time.monotonic()  # asyncio retries every second
            if self._said_at is None or now - self._said_at >= _SAID_EVERY_S:
                self._said_at = now
                log.error("connections wait, because the limit on open files is reached: %s", error.strerror)
        elif error is not None:
            log.error("event loop: %s", where_it_failed(error))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._models.is_draining = True
        self._notifier.tell("STOPPING=1")
        if self._sweep is not None:
            self._sweep.cancel()
        if self._running_beside is not None:
            self._running_beside.cancel()
        ending = asyncio.create_task(self._end_answers())
        await super().shutdown(sockets)
        ending.cancel()
        await self._models.close()

    async def _end_answers(self) -> None:
        """Let answers finish within `drain_s`, then end the rest with an error.

        A second signal ends them at once, and closes the remaining connections half a second later.
        """
        until = time.monotonic() + self._drain_s
        while len(self._running) and not self._is_told_twice and time.monotonic() < until:
            await asyncio.sleep(_LOOK_S)
        self._running.stop()  # running requests get an error
        await self._models.stop()
        while not self._is_told_twice:
            await asyncio.sleep(_LOOK_S)
        await asyncio.sleep(_LAST_WORDS_S)
        for connection in list(self.server_state.connections):
            connection.transport.abort()  # otherwise uvicorn would wait for the client
        self.force_exit = True


def uvicorn_config(
    app: Gate, *, grace_s: float, max_connections: int = MAX_CONNECTIONS, front: Front | None = None
) -> uvicorn.Config:
    """Configure uvicorn to run `app` without logs or server headers, and with short timeouts."""
    front = front or Front()
    certificate = front.certificate
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
        proxy_headers=bool(front.proxies),
        forwarded_allow_ips=list(front.proxies),
        ssl_context_factory=None if certificate is None else lambda config, default: certificate.context,
        timeout_keep_alive=KEEP_ALIVE_S,
        h11_max_incomplete_event_size=32 << 10,
        timeout_graceful_shutdown=int(grace_s),
        backlog=1,  # see `Listener`
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where and to whom a server or a router answers.

    host: the host to show in its address.
    keys: the file with the API keys of clients; None: no key is needed.
    front: TLS, proxies, and the base path.
    drain_s: how long running answers may take after the first signal.
    log_bytes: the size limit of a log file; None: no limit.
    """

    host: str
    keys: Path | None = None
    hosts: Collection[str] = ()
    origins: Origins = field(default_factory=Origins)
    front: Front = field(default_factory=Front)
    drain_s: float = 30.0
    max_connections: int = MAX_CONNECTIONS
    log_format: LogFormat = "text"
    log_bytes: int | None = None

    @property
    def site(self) -> Site:
        """The names and paths under which it is reached."""
        return Site(hosts=self.hosts, origins=self.origins, base_path=self.front.base_path)


def run_app(
    app: Gate,
    lifecycle: Lifecycle,
    sockets: Sequence[Listener],
    endpoint: Endpoint,
    started: Callable[[str], None],
    *,
    preload: Sequence[str] = (),
    reload: Callable[[], None] | None = None,
    beside: Callable[[], Coroutine[Any, Any, None]] | None = None,
) -> None:
    """Serve `app` until a signal.

    Args:
        sockets: from `bind`, `bind_file` or `passed_sockets`.
        started: called with the address once the server listens.
        preload: names for `lifecycle` to load before the server listens.
        reload: reads files other than the certificate again on SIGHUP, in a thread; None: there are none.
        beside: runs while the server listens, until it is cancelled; None: nothing does.

    Raises:
        UsageError: another process has started to listen there meanwhile.
    """
    front, max_connections, drain_s = endpoint.front, endpoint.max_connections, endpoint.drain_s
    config = uvicorn_config(app, grace_s=drain_s + 5, max_connections=max_connections, front=front)
    if front.certificate is not None:
        for one in sockets:
            one.limit(max_connections + _TOLD_CONNECTIONS)
    address = address_of(sockets[0], endpoint.host, front)
    sys.setswitchinterval(_SWITCH_S)
    # The objects that exist now will stay. Scanning them for garbage would stall all requests for a fifth of a
    # second each time.
    gc.freeze()
    try:
        server = Server(
            config,
            lifecycle,
            app.running,
            drain_s,
            lambda: started(address),
            preload,
            front.certificate,
            reload,
            beside,
        )
        server.run(list(sockets))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise cannot_listen(error, endpoint.host, sockets[0].getsockname()[1]) from None
    finally:
        gc.unfreeze()  # engines are in reference cycles and must be freed before the process ends
