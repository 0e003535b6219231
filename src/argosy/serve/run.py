"""Start and stop the server. On SIGTERM it refuses new requests, waits for running ones, then ends the rest.

    bind  ->  (the engine is opened)  ->  serve: listen, answer, drain
          ->  (models are made ready)  ->  serve_several: the same

This file alone knows uvicorn. It relies on members that uvicorn does not document and may change in any minor release,
so `pyproject.toml` bounds its version:

    Server       startup, shutdown, capture_signals, handle_exit, should_exit, force_exit, server_state.connections
    H11Protocol  its module, its arguments, app_state, client, conn, connections, cycle.response_complete,
                 flow.resume_reading, loop, scheme, transport
    Config       `http` as a function that makes a protocol

Elsewhere: the application is `app.py`; socket files, TLS and proxies are `http/listen.py`; sockets of systemd are
`http/systemd.py`; options are `cli/commands/serve.py`.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import gc
import hashlib
import ipaddress
import json
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from argosy.config import KV_BLOCK_TOKENS
from argosy.errors import UsageError
from argosy.guard.audit import Audit, AuditSettings
from argosy.guard.chain import Head
from argosy.guard.keys import KeyFile, KeyRing
from argosy.guard.limits import Limits, UseFile
from argosy.observe.recorder import Recorder
from argosy.serve.admin.cluster import Workers
from argosy.serve.admin.key_watch import KeyWatch
from argosy.serve.admin.memory import MemoryWatch
from argosy.serve.admin.state import watch_prompts
from argosy.serve.admin.transparency import Practice
from argosy.serve.answer.kept_items import KEPT_S, SWEEP_S, KeptItems
from argosy.serve.answer.media_hosts import MediaHosts
from argosy.serve.answer.running import Running
from argosy.serve.answer.work import Work
from argosy.serve.app import make_app
from argosy.serve.guards.audited import Auditor
from argosy.serve.guards.screening import Guarding
from argosy.serve.http.gate import NO_ROOM, Gate
from argosy.serve.http.listen import SOCKET_CLIENT, Certificate, Front, Listener
from argosy.serve.http.log import LogFormat, LogWriter, where_it_failed
from argosy.serve.http.origins import Origins
from argosy.serve.http.systemd import Notifier
from argosy.serve.http.work import Threads
from argosy.serve.models.models import Memory, Models, Presets
from argosy.serve.models.opened import (
    Common,
    EngineSource,
    LibraryShelf,
    Offers,
    Recording,
    facts_of,
    service_for,
)

if TYPE_CHECKING:
    from argosy.engine.engine import Engine
    from argosy.engine.shared import ReadyModel
    from argosy.forecast.forecast import Speeds

log = logging.getLogger("argosy.serve")

MAX_CONNECTIONS = 512
# This many connections beyond the limit get an error; any more are closed without an answer.
_TOLD_CONNECTIONS = 64
_OTHER_FILES = 256  # open files besides connections: for prompts, for the usage of keys
_SAID_EVERY_S = 60.0  # how often to log that connections cannot be accepted
KEEP_ALIVE_S = 15  # longest idle time of a connection
HEADER_S = 15.0  # longest time for the head of a request
_MOST_AHEAD_BYTES = 64 << 10  # of further requests, while one is answered
STUCK_S = 60.0  # a client that reads nothing of its answer for this long is disconnected
# How long another thread may compute in Python before the event loop goes on. It waits for this after every system
# call, and a request takes a dozen of those; Python's default is ten times as long.
_SWITCH_S = 0.0005
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


def require_keys_behind_proxy(front: Front, keys: Path | None) -> None:
    """Require keys where a proxy admits other machines.

    Raises:
        UsageError: a proxy is named, and there are no keys.
    """
    if keys is None and front.proxies:
        raise UsageError(
            "--forwarded-from names a proxy, which admits other machines, and there are no keys",
            hint="`argosy keys add NAME --keys FILE`, then `argosy serve ... --keys FILE`",
        )


def address_of(listener: Listener, host: str, front: Front) -> str:
    """The address of a server, for people."""
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}{front.base_path}"
    shown = f"[{host}]" if ":" in host else host
    return f"{front.scheme}://{shown}:{listener.getsockname()[1]}{front.base_path}"


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


@contextmanager
def bind(host: str, port: int) -> Iterator[list[Listener]]:
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
        sockets: list[Listener] = []
        fault: OSError | None = None
        for family, kind, protocol, _, address in dict.fromkeys(found):
            try:
                one = stack.enter_context(Listener(family, kind, protocol))
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
        if transport.get_extra_info("socket").family == socket.AF_UNIX:
            self.client = (SOCKET_CLIENT, 0)
        beyond = len(self.connections) - self._max_connections
        if beyond > _TOLD_CONNECTIONS:
            transport.abort()
            return
        if beyond > 0:
            self.app_state = {**self.app_state, NO_ROOM: True}
        # Writing is paused whenever data is pending. asyncio pauses above the limit, but with TLS already at the limit.
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
        # uvicorn reads no further while another request waits for this answer, and would not notice that the client
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
        """Free what was kept for clients and is too old; called every SWEEP_S."""

    async def stop(self) -> None: ...

    async def close(self) -> None: ...


class _Server(uvicorn.Server):
    """uvicorn with our own start, signals and shutdown.

    Args:
        models: or the servers of a router.
        running: the requests that run.
        preload: names of models that are loaded before the server listens.
        started: called when the server listens.
        certificate: is read again on SIGHUP; None: the server has none.
        guarding: its policies are read again on SIGHUP.
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
        guarding: Guarding | None = None,
        beside: Callable[[], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        super().__init__(config)
        self._notifier = Notifier()
        self._beside = beside
        self._running_beside: asyncio.Task[None] | None = None
        self._guarding = guarding
        self._models, self._running, self._drain_s = models, running, drain_s
        self._started, self._preload = started, preload
        self._certificate = certificate
        self._sweep: asyncio.TimerHandle | None = None
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
        self._handle_hangup_with(self._handle_hangup)
        try:
            yield
        finally:
            # Everything is closed, and Python handlers stop working before the interpreter exits.
            handle_with(signal.SIG_IGN)
            self._handle_hangup_with(signal.SIG_IGN)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second ends the server. Both lead to exit code 0."""
        self._is_told_twice = self.should_exit
        self.should_exit = True

    def _handle_hangup_with(self, handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
        """Without anything to read again, SIGHUP keeps its meaning."""
        has_files = self._certificate is not None or self._guarding is not None
        if has_files and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGHUP, handler)

    def _handle_hangup(self, sig: int, frame: FrameType | None) -> None:
        """Reload later, because the log must not be written in a signal handler: its queue may be locked."""
        asyncio.get_running_loop().call_soon_threadsafe(self._reload)

    def _reload(self) -> None:
        if self._certificate is not None:
            try:
                self._certificate.reload()
            except UsageError as error:
                log.error("tls: the certificate in use stays: %s", error)
            else:
                log.info("tls: the certificate was read again")
        if self._guarding is not None:
            threading.Thread(target=self._reload_policies, args=[self._guarding], daemon=True).start()

    def _reload_policies(self, guarding: Guarding) -> None:
        try:
            guarding.reload()
        except UsageError as error:
            log.error("policy: the policies in use stay: %s", error)
        else:
            log.info("policy: the policies were read again, sha256 %s", guarding.digest)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        events = asyncio.get_running_loop()
        events.set_exception_handler(self._report)
        events.set_default_executor(Threads(thread_name_prefix="argosy-calls"))
        if self._certificate is not None:  # uvicorn leaves a minute to clients that shake hands slowly
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
        if self.should_exit:  # uvicorn ends without a shutdown then
            await self._models.close()

    def _drop_expired(self) -> None:
        """Now and then, free what is too old, even if no request comes."""
        self._models.drop_expired()
        self._sweep = asyncio.get_running_loop().call_later(SWEEP_S, self._drop_expired)

    async def _load_first(self) -> None:
        """Load the models that were asked for; a signal ends that."""
        loading = asyncio.create_task(self._models.preload(self._preload))
        while not loading.done():
            await asyncio.wait([loading], timeout=_LOOK_S)
            if self.should_exit:
                await self._models.stop()
                await asyncio.wait([loading])
                return
        loading.result()

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
            connection.transport.abort()  # otherwise uvicorn would wait for it
        self.force_exit = True


def uvicorn_config(
    app: Gate, *, grace_s: float, max_connections: int = MAX_CONNECTIONS, front: Front | None = None
) -> uvicorn.Config:
    """Configure uvicorn to run `app` without logs and server headers, and with short timeouts."""
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
        backlog=1,  # see Listener
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Settings of a server that do not depend on its models.

    host: the host to print in the address of the server.
    keys: the file with the API keys of clients; None: nobody needs a key.
    store: keep responses in memory, for clients that refer to them, for `store_s` after they were last used.
    rerank: the form of a reranker's prompt, by its name in `RERANK_FORMS`; None: the models rank no documents.
    front: TLS, proxies, and the base path.
    log_bytes: the most that a log in a file may have; None: it grows without end.
    workers: run experts for the model; None: it runs alone.
    audit: where requests are recorded; None: nowhere.
    co2_grams_per_kwh: emissions of the electricity here, for `/metrics`.
    guarding: policies, and what is stopped; None: there are none.
    has_watermark: the engines mark what they sample.
    prefix_files_s: how long they keep prefixes in files; None: they do not.
    presets: further names of the models; None: there are none.
    default: the name that a request means that names no model; None: the first model.
    """

    host: str
    keys: Path | None = None
    hosts: Collection[str] = ()
    origins: Origins | None = None
    drain_s: float = 30.0
    max_connections: int = MAX_CONNECTIONS
    keep_billing_line: bool = False
    any_model: bool = False
    store: bool = True
    store_s: float = KEPT_S
    rerank: str | None = None
    media_hosts: MediaHosts | None = None
    front: Front = field(default_factory=Front)
    guarding: Guarding | None = None
    log_format: LogFormat = "text"
    log_bytes: int | None = None
    workers: Workers | None = None
    audit: AuditSettings | None = None
    co2_grams_per_kwh: float | None = None
    has_watermark: bool = False
    prefix_files_s: float | None = None
    presets: Presets | None = None
    default: str | None = None

    @property
    def practice(self) -> Practice:
        """How the server treats texts, as it tells its users."""
        return Practice(
            has_watermark=self.has_watermark, responses_s=self.store_s if self.store else None,
            prefix_files_s=self.prefix_files_s, audit=self.audit,
        )  # fmt: skip

    @property
    def keeps_content(self) -> bool:
        """Whether the audit has what requests say."""
        return self.audit is not None and self.audit.with_content

    @property
    def policy_sha256(self) -> str:
        """SHA-256 of the settings that decide what requests may do and what is kept of them."""
        deciding = {
            "keys": self.keys is not None, "any_model": self.any_model, "rerank": self.rerank,
            "media_hosts": [] if self.media_hosts is None else sorted(self.media_hosts.names),
            "store_s": self.store_s if self.store else 0,
            "audit_content": self.keeps_content, "watermark": self.has_watermark,
        }  # fmt: skip
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()

    def common(self, ring: KeyRing, *, kept_bytes: int) -> Common:
        """The parts that all models of the server share; `kept_bytes` is memory for items that clients refer to."""
        return Common(
            ring=None if self.keys is None else ring,
            kept=KeptItems(max_bytes=kept_bytes if self.store else 0, kept_s=self.store_s),
            work=Work(),
            keep_billing_line=self.keep_billing_line,
            any_model=self.any_model,
            media_hosts=self.media_hosts,
            rerank=self.rerank,
        )


def serve(
    engine: Engine,
    name: str,
    sockets: Sequence[Listener],
    settings: ServerSettings,
    *,
    recorder: Recorder | None = None,
    speeds: Speeds | None = None,
    expectation: str | None = None,
) -> None:
    """Serve `engine` until a signal; keep answers for replay as far as the memory plan has room.

    After the first signal, no signal ends the process before everything is closed; the exit code stays 0.

    Args:
        sockets: from `bind`, `bind_file` or `passed_sockets`.
        recorder: has the choices of recent tokens; None: nothing is recorded.
        speeds: predictions for `/metrics`; None: there are none.
        expectation: a line to print below the address.

    Raises:
        UsageError: another process has started to listen there in the meantime.
    """
    facts = facts_of(
        name, engine.config, engine.plan, num_parameters=engine.num_parameters, media_kinds=engine.media.kinds,
        hears=engine.media.hears, fingerprint=engine.fingerprint, sampling=engine.sampling,
    )  # fmt: skip
    # A quarter is for items that clients refer to; the rest is for tokens of answers.
    replay_bytes = engine.plan.claimed["replay_bytes"]
    kept_bytes = replay_bytes // 4 if settings.store else 0
    with _keyed(settings) as (ring, limits, auditor):
        service = service_for(
            engine, facts, settings.common(ring, kept_bytes=kept_bytes),
            replay_bytes=replay_bytes - kept_bytes, recorder=recorder, speeds=speeds,
        )  # fmt: skip
        try:
            _run(
                Models.of(service, presets=settings.presets, default=settings.default), ring, limits, sockets, settings,
                max_sequences=engine.settings.max_sequences,
                expectation=expectation, auditor=auditor,
            )  # fmt: skip
        finally:
            service.loop.close()


def serve_several(
    models: Sequence[ReadyModel] | Callable[[], Offers],
    memory: Memory,
    sockets: Sequence[Listener],
    settings: ServerSettings,
    *,
    kept_bytes: int,
    record: Callable[[], Recording] | None,
    speeds: Mapping[str, Speeds],
    idle_unload_s: float | None,
    max_sequences: int,
    preload: Sequence[str] = (),
    note_use: Callable[[str], None] | None = None,
) -> None:
    """Serve models that share a budget until a signal, as `serve` does one.

    Args:
        models: from `make_ready`; or what finds those of a library.
        kept_bytes: memory for items that clients refer to.
        record: makes what records the routing of a model while it is open; None: nothing is recorded.
        speeds: predictions for `/metrics`, by model.
        idle_unload_s: unload a model after so long without requests; None: only if its memory is needed.
        preload: names of models to load before the server listens.
        note_use: called with the name of each model that is opened, in a thread.

    Raises:
        UsageError: another process has started to listen there in the meantime.
        ArgosyError: a model that is loaded first cannot be opened, or does not fit.
    """
    with _keyed(settings) as (ring, limits, auditor):
        common = settings.common(ring, kept_bytes=kept_bytes)

        def to_source(ready: ReadyModel, expected: Speeds | None) -> EngineSource:
            return EngineSource(ready, common, record=record, speeds=expected, note_use=note_use)

        shared = Models.sharing(
            [] if callable(models) else [to_source(ready, speeds.get(ready.name)) for ready in models], memory,
            any_model=settings.any_model, idle_unload_s=idle_unload_s, work=common.work, kept=common.kept,
            shelf=LibraryShelf(models, to_source) if callable(models) else None,
            presets=settings.presets, default=settings.default,
        )  # fmt: skip
        _run(
            shared, ring, limits, sockets, settings, max_sequences=max_sequences, preload=preload, auditor=auditor,
        )  # fmt: skip


@contextmanager
def _keyed(settings: ServerSettings) -> Iterator[tuple[KeyRing, Limits, Auditor | None]]:
    """The keys and limits of a server, its log and its audit, until it ends."""
    keys = settings.keys
    require_keys(settings.host, keys)
    require_keys_behind_proxy(settings.front, keys)
    make_room_for_files(settings.max_connections)
    ring = KeyRing(None if keys is None else KeyFile(keys))
    counts = None if keys is None else UseFile(keys.with_name(keys.name + ".use"))
    limits = Limits(file=counts, known=ring.ids)
    with logging_to_stderr(settings.log_format, settings.log_bytes), ExitStack() as closing:
        closing.callback(limits.close)
        auditor = None
        if settings.audit is not None:
            audit = _open_audit(settings.audit, settings.policy_sha256)
            closing.callback(audit.close)
            auditor = Auditor(audit, policy=settings.policy_sha256)
        yield ring, limits, auditor


@contextmanager
def logging_to_stderr(log_format: LogFormat, most_bytes: int | None = None) -> Iterator[None]:
    """Write the log of a server to stderr until it ends."""
    writer = LogWriter(sys.stderr.fileno(), log_format=log_format, most_bytes=most_bytes)
    log.setLevel(logging.INFO)
    log.handlers = [writer]
    try:
        yield
    finally:
        writer.close()


def _open_audit(settings: AuditSettings, policy: str) -> Audit:
    def announce(head: Head) -> None:
        log.info("audit anchor %s", head, extra={"facts": {"event": "audit_anchor", "anchor": str(head)}})

    facts = {"version": version("argosy"), "policy": policy}
    return Audit(settings, facts=facts, report=lambda text: log.error("%s", text), announce=announce)


def _run(
    models: Models,
    ring: KeyRing,
    limits: Limits,
    sockets: Sequence[Listener],
    settings: ServerSettings,
    *,
    max_sequences: int,
    preload: Sequence[str] = (),
    expectation: str | None = None,
    auditor: Auditor | None = None,
) -> None:
    watch = MemoryWatch(models)
    app = make_app(
        models,
        ring,
        memory_watch=watch,
        block_tokens=KV_BLOCK_TOKENS,
        max_sequences=max_sequences,
        hosts=settings.hosts,
        origins=settings.origins,
        limits=limits,
        base_path=settings.front.base_path,
        workers=settings.workers,
        auditor=auditor,
        co2_grams_per_kwh=settings.co2_grams_per_kwh,
        guarding=settings.guarding,
        practice=settings.practice,
    )

    def started(address: str) -> None:
        name = "the library" if models.has_shelf else ", ".join(models.names)
        if settings.log_format == "json":
            log.info("serving", extra={"facts": {"event": "started", "model": name, "address": address}})
            return
        # In one write, because another thread writes log lines.
        sys.stderr.write(f"serving {name} at {address}\n")
        if expectation is not None:
            print(expectation, file=sys.stderr, flush=True)

    async def beside() -> None:
        await asyncio.gather(watch.run(), watch_prompts(models))

    with KeyWatch(ring, limits, app.running, models.revoke):
        run_app(
            app, models, sockets, started, host=settings.host, front=settings.front, drain_s=settings.drain_s,
            max_connections=settings.max_connections, preload=preload, guarding=settings.guarding, beside=beside,
        )  # fmt: skip


def run_app(
    app: Gate,
    lifecycle: Lifecycle,
    sockets: Sequence[Listener],
    started: Callable[[str], None],
    *,
    host: str,
    front: Front,
    drain_s: float,
    max_connections: int = MAX_CONNECTIONS,
    preload: Sequence[str] = (),
    guarding: Guarding | None = None,
    beside: Callable[[], Coroutine[Any, Any, None]] | None = None,
) -> None:
    """Serve `app` until a signal.

    Args:
        started: is called with the address once the server listens.
        host: the host in that address.
        preload: for `lifecycle`, before the server listens.
        guarding: its policies are read again on SIGHUP; None: there are none.
        beside: runs while the server listens, until it is cancelled; None: nothing does.

    Raises:
        UsageError: another process has started to listen there in the meantime.
    """
    config = uvicorn_config(app, grace_s=drain_s + 5, max_connections=max_connections, front=front)
    if front.certificate is not None:
        for one in sockets:
            one.limit(max_connections + _TOLD_CONNECTIONS)
    address = address_of(sockets[0], host, front)
    sys.setswitchinterval(_SWITCH_S)
    # What is here now stays. Looking through it for garbage would hold all requests for a fifth of a second each time.
    gc.freeze()
    try:
        server = _Server(
            config,
            lifecycle,
            app.running,
            drain_s,
            lambda: started(address),
            preload,
            front.certificate,
            guarding,
            beside,
        )
        server.run(list(sockets))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise _cannot_listen(error, host, sockets[0].getsockname()[1]) from None
    finally:
        gc.unfreeze()  # engines are in cycles, and have to go before the process ends
