"""From a model to a listening socket, and back on SIGTERM: nothing new, time for what runs, then the rest ends.

    bind  ->  (the engine is opened)  ->  serve: listen, answer, drain

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

from argosy.engine.loop import EngineLoop
from argosy.engine.memory_plan import KV_BLOCK_TOKENS
from argosy.errors import UsageError
from argosy.guard.keys import KeyFile, KeyRing
from argosy.guard.limits import Limits, UseFile
from argosy.prompt.replay import ReplayMemory
from argosy.serve.app import make_app
from argosy.serve.core import ModelFacts, Service
from argosy.serve.gate import NO_ROOM, Gate
from argosy.serve.kept_items import KeptItems
from argosy.serve.key_watch import KeyWatch
from argosy.serve.log import LogWriter, where_it_failed

if TYPE_CHECKING:
    from argosy.engine.engine import Engine

log = logging.getLogger("argosy.serve")

MAX_CONNECTIONS = 512
# So many beyond the bound still hear that there is no room; more are closed without a word.
_TOLD_CONNECTIONS = 64
_OTHER_FILES = 256  # that may be opened beside connections: by prompts, by the log of what keys have used
_BACKLOG = 1024  # connections that the system takes before the server has
_SAID_EVERY_S = 60.0  # that connections cannot be taken
KEEP_ALIVE_S = 15  # a connection may be idle for so long
HEADER_S = 15.0  # a client has so long for the head of a request
STUCK_S = 60.0  # one that takes nothing of an answer for so long is gone
_LAST_WORDS_S = 0.5  # for answers to say that they end, after the second signal
_LOOK_S = 0.05  # between two looks for a second signal
# What the system keeps for a client that does not read; its own choice is megabytes.
_SEND_BUFFER_BYTES = 128 << 10


def require_keys(host: str, keys: Path | None) -> None:
    """Without keys only this machine may ask.

    Raises:
        UsageError: others could.
    """
    try:
        is_local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = False
    if keys is None and not is_local:
        raise UsageError(
            f"listening on {host} lets other machines in, and there are no keys",
            hint="`argosy keys add NAME --keys FILE`, then `argosy serve ... --keys FILE`; or --host 127.0.0.1",
        )


def make_room_for_files(max_connections: int) -> None:
    """Raise the limit on open files as far as it goes: a server that cannot open one more accepts no connection.

    Called before the model is opened, because each part of a model takes two files, and again once those are open.

    Raises:
        UsageError: it does not go far enough for `max_connections` beside what is open already.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    needed = _num_open_files() + max_connections + _TOLD_CONNECTIONS + _OTHER_FILES
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UsageError(
            f"{max_connections} connections need {needed} open files, and {hard} are allowed",
            hint=f"`ulimit -Hn {needed}`, or --max-connections {max(1, hard - needed + max_connections)}",
        )


def _num_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


class _Listener(socket.socket):
    """A socket whose connections asyncio takes one by one.

    It takes as many in a row as it lets wait, and where no more files may be open it fails, reports and plans another
    try for each of them.
    """

    def listen(self, backlog: int = 1, /) -> None:
        super().listen(_BACKLOG)


@contextmanager
def bind(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Sockets at all addresses of `host`, not yet listening.

    They are bound before the model is loaded, so that a port in use is reported at once. They listen only after it is
    loaded: until then connections are refused, so that no client waits for minutes, or for an answer that never comes.

    Raises:
        UsageError: the address is in use, or is none of this machine's.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise UsageError(
            f"--host {host} is no address: {error.strerror}", hint="--host 127.0.0.1, or 0.0.0.0 for all"
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
            except OSError as error:  # `localhost` has an address of IPv6 also where that is switched off
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
                f"--port {port % 65535 + 1}, or --port 0 for any that is free",
            )
        case errno.EACCES:
            told, hint = f"port {port} is not open to this user", "--port 8080, or another above 1023"
        case _:
            told, hint = f"{host} is no address of this machine: {error.strerror}", "--host 127.0.0.1"
    return UsageError(told, hint=hint)


class TimedProtocol(H11Protocol):
    """HTTP/1.1 whose request heads have to come within HEADER_S, and whose answers are read, or it hangs up.

    Beyond `max_connections` a connection's request is refused by the gate, in its own dialect, and it is closed.
    What a client does not take waits: the answer's next part is not made before the last is gone. One that takes
    nothing of it for STUCK_S is hung up on, also when its answer is whole and only the connection's end waits.
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
        transport.set_write_buffer_limits(high=0)  # paused is: something waits
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
        """The client takes less than there is: from here on it is watched."""
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
        started: called when it listens.
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
        """Signals are ours until the process has ended: uvicorn would give them back, and a late one would kill it."""

        def handle_with(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
            if threading.current_thread() is threading.main_thread():
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, handler)

        handle_with(self.handle_exit)
        try:
            yield
        finally:
            handle_with(signal.SIG_IGN)  # all has ended; a handler in Python goes before the interpreter does

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second ends. Both end in exit code 0."""
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
            now = time.monotonic()  # asyncio tries again every second
            if self._said_at is None or now - self._said_at >= _SAID_EVERY_S:
                self._said_at = now
                log.error("connections wait, because no more files may be open: %s", error.strerror)
        elif error is not None:
            log.error("event loop: %s", where_it_failed(error))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.is_draining = True

        ending = asyncio.create_task(self._end_answers())
        await super().shutdown(sockets)
        ending.cancel()
        await asyncio.to_thread(self._loop.close)

    async def _end_answers(self) -> None:
        """Let answers finish within `drain_s`, then end the others with an error.

        A second signal ends them at once, and closes the connections that are still open half a second later.
        """
        until = time.monotonic() + self._drain_s
        while not self._is_told_twice and time.monotonic() < until:
            if await asyncio.to_thread(self._loop.drain, _LOOK_S):
                break
        await asyncio.to_thread(self._loop.close)  # what still runs hears that it ends
        while not self._is_told_twice:
            await asyncio.sleep(_LOOK_S)
        await asyncio.sleep(_LAST_WORDS_S)
        for connection in list(self.server_state.connections):
            connection.transport.abort()  # otherwise uvicorn would wait for it
        self.force_exit = True


def uvicorn_config(app: Gate, *, grace_s: float, max_connections: int = MAX_CONNECTIONS) -> uvicorn.Config:
    """How uvicorn is to run `app`: it logs nothing, says nothing of itself, and waits for nobody for long."""
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # it would log what failed with what it held
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
) -> None:
    """Serve `engine` until a signal says otherwise; answers are replayed as far as its plan has room for them.

    From the first signal on, none ends the process before it has closed everything; its exit code stays 0.

    Args:
        sockets: of `bind`.
        host: where others find it, for the line that says so.

    Raises:
        UsageError: another process has begun to listen there meanwhile.
    """
    require_keys(host, keys)
    make_room_for_files(max_connections)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would compete with the model's
    ring = KeyRing(None if keys is None else KeyFile(keys))
    counts = None if keys is None else UseFile(keys.with_name(keys.name + ".use"))
    limits = Limits(file=counts, known=ring.ids)
    if keys is not None:
        engine.forget_others(["", *ring.ids])  # of keys that were revoked while nobody served
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
    )
    kept_bytes = engine.plan.replay_bytes // 4  # for items that clients name; the rest for tokens of answers
    prompts = engine.prompts.remembering(ReplayMemory(max_bytes=engine.plan.replay_bytes - kept_bytes))
    try:
        with EngineLoop(engine, report=lambda error: log.error("engine: %s", where_it_failed(error))) as loop:
            service = Service(
                loop, prompts, engine.tokenizer, model, keep_billing_line=keep_billing_line, any_model=any_model,
                kept=KeptItems(max_bytes=kept_bytes),
            )  # fmt: skip
            app = make_app(
                service,
                ring,
                block_tokens=KV_BLOCK_TOKENS,
                max_sequences=engine.settings.max_sequences,
                hosts=hosts,
                limits=limits,
            )
            settings = uvicorn_config(app, grace_s=drain_s + 5, max_connections=max_connections)
            port = sockets[0].getsockname()[1]
            shown = f"[{host}]" if ":" in host else host

            def started() -> None:
                print(f"serving {name} at http://{shown}:{port}", file=sys.stderr, flush=True)

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
