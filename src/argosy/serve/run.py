"""Start and stop a server. On SIGTERM it refuses new requests, waits for running ones, then ends the rest.

    bind  ->  (open an engine, or prepare models)  ->  serve: listen, answer, drain

Elsewhere: the application is `app.py`; `http/server.py` runs it; sockets, TLS and proxies are `http/listen.py`; options
are `cli/commands/serve.py`.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from argosy.config import KV_BLOCK_TOKENS, SERVED_AT_ONCE
from argosy.errors import UsageError
from argosy.guard.keys import KeyFile, KeyRing
from argosy.guard.limits import Limits, UseFile
from argosy.serve.admin.cluster import Workers
from argosy.serve.admin.key_watch import KeyWatch
from argosy.serve.admin.memory import MemoryWatch
from argosy.serve.admin.state import watch_prompts
from argosy.serve.answer.kept_items import KEPT_S, KeptItems
from argosy.serve.answer.media_hosts import MediaHosts
from argosy.serve.answer.service import Common
from argosy.serve.answer.work import Work
from argosy.serve.app import GUARDS, make_app
from argosy.serve.claims import KEPT_BYTES
from argosy.serve.governance import Governance
from argosy.serve.http.listen import Front, Listener
from argosy.serve.http.log import LogFormat, LogWriter
from argosy.serve.http.server import Endpoint, make_room_for_files, run_app
from argosy.serve.models.entry import Entry, Offer, Offers, Recording
from argosy.serve.models.models import Models, Presets

if TYPE_CHECKING:
    from argosy.guard.audit import AuditSettings
    from argosy.serve.guards.guarding import Guarding

log = logging.getLogger("argosy.serve")


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
            f"listening on {host} admits other machines, but there are no keys",
            hint="`argosy keys add NAME --keys FILE`, then `argosy serve ... --keys FILE`; or --host 127.0.0.1",
        )


def require_keys_behind_proxy(front: Front, keys: Path | None) -> None:
    """Require keys where a proxy admits other machines.

    Raises:
        UsageError: a proxy is named but there are no keys.
    """
    if keys is None and front.proxies:
        raise UsageError(
            "--forwarded-from names a proxy, which admits other machines, but there are no keys",
            hint="`argosy keys add NAME --keys FILE`, then `argosy serve ... --keys FILE`",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """The settings of a server that do not depend on its models.

    endpoint: where and to whom it answers.
    store: keep responses in memory, for clients that refer to them, until `store_s` after their last use.
    rerank: the reranker's prompt form, by its name in `RERANK_FORMS`; None: the models do not rank documents.
    workers: run experts for the model; None: it runs alone.
    idle_unload_s: unload a model after this long without requests; None: only if its memory is needed.
    preload: names of models to load before the server listens.
    audit: where requests are recorded; None: they are not.
    co2_grams_per_kwh: emissions of the electricity used, for `/metrics`.
    guarding: policies and stops; None: there are none.
    has_watermark: the engines mark what they sample.
    prefix_files_s: how long prefixes are kept in files; None: they are not kept.
    presets: further names of the models; None for none.
    default: the model for requests that name none; None: the first one.
    lora_dir: the directory from which an admin may load adapters; None: from nowhere.
    """

    endpoint: Endpoint
    keep_billing_line: bool = False
    any_model: bool = False
    store: bool = True
    store_s: float = KEPT_S
    rerank: str | None = None
    media_hosts: MediaHosts | None = None
    guarding: Guarding | None = None
    workers: Workers | None = None
    max_sequences: int = SERVED_AT_ONCE
    idle_unload_s: float | None = None
    preload: Sequence[str] = ()
    audit: AuditSettings | None = None
    co2_grams_per_kwh: float | None = None
    has_watermark: bool = False
    prefix_files_s: float | None = None
    presets: Presets | None = None
    default: str | None = None
    lora_dir: Path | None = None

    def __post_init__(self) -> None:
        if GUARDS is None and self.audit is not None:
            raise UsageError(
                "this installation is without `argosy.serve.guards`, so it records no requests",
                hint="install the whole of argosy, or leave out --audit",
            )

    @contextmanager
    def governance(self) -> Iterator[Governance]:
        """Govern the server until it ends."""
        if GUARDS is None:
            yield Governance()
            return
        practice = GUARDS.Practice(
            has_watermark=self.has_watermark, responses_s=self.store_s if self.store else None,
            prefix_files_s=self.prefix_files_s, audit=self.audit,
        )  # fmt: skip
        with GUARDS.governing(self.guarding, practice, policy_sha256=self.policy_sha256) as governance:
            yield governance

    @property
    def keeps_content(self) -> bool:
        """Whether the audit keeps what requests say."""
        return self.audit is not None and self.audit.with_content

    @property
    def policy_sha256(self) -> str:
        """SHA-256 of the settings that govern requests and what is kept of them."""
        deciding = {
            "keys": self.endpoint.keys is not None, "any_model": self.any_model, "rerank": self.rerank,
            "media_hosts": [] if self.media_hosts is None else sorted(self.media_hosts.names),
            "store_s": self.store_s if self.store else 0,
            "audit_content": self.keeps_content, "watermark": self.has_watermark,
        }  # fmt: skip
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()

    def common(self, ring: KeyRing) -> Common:
        """The parts that all models of the server share."""
        return Common(
            ring=None if self.endpoint.keys is None else ring,
            kept=KeptItems(max_bytes=KEPT_BYTES if self.store else 0, kept_s=self.store_s),
            work=Work(),
            keep_billing_line=self.keep_billing_line,
            any_model=self.any_model,
            media_hosts=self.media_hosts,
            rerank=self.rerank,
            lora_dir=self.lora_dir,
        )


def serve(
    offers: Sequence[Offer] | Callable[[], Offers],
    sockets: Sequence[Listener],
    settings: ServerSettings,
    *,
    budget_bytes: int,
    process_bytes: int,
    record: Callable[[], Recording] | None = None,
    note_use: Callable[[str], None] | None = None,
    expectation: str | None = None,
) -> None:
    """Serve models until a signal, keeping answers for replay within the memory plan.

    After the first signal, no signal ends the process before everything is closed; the exit code stays 0.

    Args:
        offers: the models; or what finds those of a library.
        sockets: from `bind`, `bind_file` or `passed_sockets`.
        process_bytes: what the process takes of the budget beside its models.
        record: makes what records the routing of a model while it is open; None: nothing is recorded.
        note_use: called with the name of each model that is opened, in a thread.
        expectation: a line to print below the address.

    Raises:
        UsageError: another process has started to listen there meanwhile.
        ArgosyError: a preloaded model cannot be opened or does not fit.
    """
    with _keyed(settings) as (ring, limits, governance):
        common = settings.common(ring)
        models = Models(
            offers, partial(Entry, common=common, record=record, note_use=note_use), common,
            budget_bytes=budget_bytes, process_bytes=process_bytes, idle_unload_s=settings.idle_unload_s,
            presets=settings.presets, default=settings.default,
        )  # fmt: skip
        try:
            _run(models, ring, limits, sockets, settings, governance, expectation=expectation)
        finally:
            for service in models.services():
                service.loop.close()


@contextmanager
def _keyed(settings: ServerSettings) -> Iterator[tuple[KeyRing, Limits, Governance]]:
    """The keys and limits of a server, its log and its governance, until it ends."""
    endpoint, keys = settings.endpoint, settings.endpoint.keys
    require_keys(endpoint.host, keys)
    require_keys_behind_proxy(endpoint.front, keys)
    make_room_for_files(endpoint.max_connections)
    ring = KeyRing(None if keys is None else KeyFile(keys))
    counts = None if keys is None else UseFile(keys.with_name(keys.name + ".use"))
    limits = Limits(file=counts, known=ring.ids)
    with logging_to_stderr(endpoint.log_format, endpoint.log_bytes), ExitStack() as closing:
        closing.callback(limits.close)
        yield ring, limits, closing.enter_context(settings.governance())


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


def _run(
    models: Models,
    ring: KeyRing,
    limits: Limits,
    sockets: Sequence[Listener],
    settings: ServerSettings,
    governance: Governance,
    *,
    expectation: str | None,
) -> None:
    watch = MemoryWatch(models)
    app = make_app(
        models,
        ring,
        memory_watch=watch,
        block_tokens=KV_BLOCK_TOKENS,
        max_sequences=settings.max_sequences,
        site=settings.endpoint.site,
        limits=limits,
        governance=governance,
        workers=settings.workers,
        co2_grams_per_kwh=settings.co2_grams_per_kwh,
    )

    def started(address: str) -> None:
        name = "the library" if models.has_library else ", ".join(models.names)
        if settings.endpoint.log_format == "json":
            log.info("serving", extra={"facts": {"event": "started", "model": name, "address": address}})
            return
        # A single write, because another thread writes log lines.
        sys.stderr.write(f"serving {name} at {address}\n")
        if expectation is not None:
            print(expectation, file=sys.stderr, flush=True)

    async def beside() -> None:
        await asyncio.gather(watch.run(), watch_prompts(models))

    with KeyWatch(ring, limits, app.running, models.revoke):
        run_app(
            app, models, sockets, settings.endpoint, started, preload=settings.preload, beside=beside,
            reload=None if settings.guarding is None else governance.reload,
        )  # fmt: skip
