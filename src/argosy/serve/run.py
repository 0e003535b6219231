"""From a model to a listening socket, and back on SIGTERM: nothing new, time for what runs, then the rest ends.

Elsewhere: the application is `app.py`; options are `cli/serve.py`.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import logging
import resource
import socket
import sys
from collections.abc import Collection
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

MAX_CONNECTIONS = 512
# So many beyond the bound still hear that there is no room; more are closed without a word.
_TOLD_CONNECTIONS = 64
_OTHER_FILES = 256  # that may be open beside connections: of the model, of prompts
KEEP_ALIVE_S = 15  # a connection may be idle for so long
HEADER_S = 15.0  # a client has so long for the head of a request
STUCK_S = 60.0  # one that takes nothing of an answer for so long is gone
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


def _make_room_for_files(max_connections: int) -> None:
    """A server that cannot open one more file accepts nobody, and says nothing: see to it before it starts."""
    needed = max_connections + _TOLD_CONNECTIONS + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UsageError(
            f"{max_connections} connections need {needed} open files, and {hard} are allowed",
            hint=f"`ulimit -Hn {needed}`, or --max-connections {max(1, hard - needed + max_connections)}",
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


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
    def __init__(self, config: uvicorn.Config, service: Service, loop: EngineLoop, drain_s: float) -> None:
        super().__init__(config)
        self._service, self._loop, self._drain_s = service, loop, drain_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second ends. Both end in exit code 0, so uvicorn does not get to raise them."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.is_draining = True

        async def drain() -> None:
            await asyncio.to_thread(self._loop.drain, self._drain_s)
            await asyncio.to_thread(self._loop.close)  # what still runs hears that it ends

        draining = asyncio.create_task(drain())
        await super().shutdown(sockets)
        if self.force_exit:
            await asyncio.to_thread(self._loop.close)
        await draining


def uvicorn_config(
    app: Gate, *, host: str, port: int, grace_s: float, max_connections: int = MAX_CONNECTIONS
) -> uvicorn.Config:
    """How uvicorn is to run `app`: it logs nothing, says nothing of itself, and waits for nobody for long."""
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # it would log what failed with what it held
    return uvicorn.Config(
        app,
        host=host,
        port=port,
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
        backlog=1024,
    )


def serve(
    engine: Engine,
    name: str,
    *,
    host: str,
    port: int,
    keys: Path | None = None,
    hosts: Collection[str] = (),
    drain_s: float = 30.0,
    max_connections: int = MAX_CONNECTIONS,
    keep_billing_line: bool = False,
) -> None:
    """Serve `engine` until a signal says otherwise; answers are replayed as far as its plan has room for them."""
    require_keys(host, keys)
    _make_room_for_files(max_connections)
    ring = KeyRing(None if keys is None else KeyFile(keys))
    counts = None if keys is None else UseFile(keys.with_name(keys.name + ".use"))
    limits = Limits(file=counts, known=ring.ids)
    if keys is not None:
        engine.forget_others(["", *ring.ids])  # of keys that were revoked while nobody served
    writer = LogWriter(sys.stderr.fileno())
    log = logging.getLogger("argosy.serve")
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
                loop, prompts, engine.tokenizer, model,
                keep_billing_line=keep_billing_line, kept=KeptItems(max_bytes=kept_bytes),
            )  # fmt: skip
            app = make_app(
                service,
                ring,
                block_tokens=KV_BLOCK_TOKENS,
                max_sequences=engine.settings.max_sequences,
                hosts=hosts,
                limits=limits,
            )
            settings = uvicorn_config(
                app, host=host, port=port, grace_s=drain_s + 5, max_connections=max_connections
            )
            shown = f"[{host}]" if ":" in host else host
            print(f"serving {name} at http://{shown}:{port}", file=sys.stderr, flush=True)
            with KeyWatch(ring, limits, service.revoke):
                _Server(settings, service, loop, drain_s).run()
    finally:
        try:
            limits.close()
        finally:
            writer.close()
