"""A worker: runs experts for coordinators, on the rows they send, from its own cache and files.

    connection ─ hello ─>  WorkerLink  ─ request: experts, rows ─>  the runner of one machine  ─ groups of outputs ─>

A worker keeps only its cache between two requests, so a coordinator loses nothing if a worker dies. It runs experts
with the runners of a single machine (`experts/cache.py`, `experts/resident.py`), so its outputs cannot differ.
Experts in memory are answered at once, the others as they land. If the whole share is in memory, native code serves
a connection without Python.

One request computes at a time; other coordinators wait for it. On `drain`, the current requests are answered and
then the connections end: a coordinator sends the rest to the other owners.

Elsewhere: frames are native (`native/cluster`); `worker_plan.py` divides the budget; `runner.py` is the other side.
"""

from __future__ import annotations

import functools
import ipaddress
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from importlib.metadata import version

from argosy import _native
from argosy.checkpoint.files import ExpertRecord, ModelFiles
from argosy.checkpoint.shards import shard_of
from argosy.cluster import door, hello, secure
from argosy.cluster.hello import MOST_ROWS, Facts, Offer, Refusal
from argosy.cluster.identity import fingerprint
from argosy.cluster.member import format_host
from argosy.cluster.worker_plan import (
    WorkerPlan,
    WorkerSettings,
    biases_of,
    instruction_set_of,
    num_experts_by_layer,
    plan_worker,
    share_of,
)
from argosy.errors import CheckpointError, PeerNotUsable, ReadFailed, UsageError
from argosy.experts.cache import CachedRunner, ExpertCache
from argosy.experts.files import ExpertFiles, Key
from argosy.experts.resident import Progress, load_resident
from argosy.experts.runner import ExpertRunner
from argosy.machine import probes, tuning
from argosy.machine.resources import held_bytes, peak_bytes
from argosy.model.layers import describe_experts
from argosy.model.weights import DenseWeights, load_dense

log = logging.getLogger("argosy.cluster")

_TICK_S = 0.5  # how often the numbers in pongs are updated
_LONGEST_MESSAGE = 300  # characters of an error sent to a coordinator
REFUSED_READ, REFUSED_SHARD = 1, 2  # codes of refused requests: a read failed; an expert is not in the share


def bind(host: str, port: int, *, has_key: bool) -> socket.socket:
    """Bind a socket to an address of this machine. It does not listen yet, so no client waits while experts are
    read.

    Raises:
        UsageError: the address covers every interface and there is no key, or it cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or "0.0.0.0", port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise UsageError(f"{host} is not an address of this machine: {error.strerror}") from None
    if ipaddress.ip_address(str(address[0]).partition("%")[0]).is_unspecified and not has_key:
        raise UsageError(
            f"{host or '0.0.0.0'} is open to every network of this machine, and there is no key",
            hint="bind to the address of one interface, or give every machine a key: `--key-file FILE`",
        )
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise UsageError(f"cannot listen on {format_host(host, port)}: {error.strerror}") from None
    return listener


def share_to_run(files: ModelFiles, shards: int) -> Mapping[Key, ExpertRecord]:
    """The experts that a worker runs.

    Raises:
        UsageError: there are none, or they cannot be run from these files.
    """
    if files.has_strided_experts:
        raise UsageError(
            f"{files.path} keeps its experts transposed, and they cannot be read row by row",
            hint=f"run `argosy pack {files.path} DIR --format source`, then use DIR",
        )
    return share_of(files, shards)


class Worker:
    """Runs the experts of one model for coordinators, which `serve` accepts until `drain`.

    Raises:
        DoesNotFit: the budget is too small.
        UsageError, and `CheckpointError` and related errors: see `errors`.
    """

    def __init__(
        self, files: ModelFiles, settings: WorkerSettings, *, progress: Progress | None = None
    ) -> None:
        share = share_to_run(files, settings.shards)
        instruction_set = instruction_set_of(settings)
        threads = settings.threads or tuning.measured_threads(instruction_set)
        model = fingerprint(files)
        self._settings = settings
        rate = settings.disk_bytes_per_s
        self.disk_bytes_per_s = _measured_drive(share) if rate is None else rate
        if settings.most_disk_bytes_per_s is not None:
            self.disk_bytes_per_s = min(
                self.disk_bytes_per_s or settings.most_disk_bytes_per_s, settings.most_disk_bytes_per_s
            )
        room_bytes = settings.budget_bytes - held_bytes()
        choices = tuning.choose(threads, instruction_set, room_bytes=room_bytes)
        tunings = choices.tunings(settings.ask_ahead)
        _native.trim_heap()
        self.plan: WorkerPlan = plan_worker(files, share, settings, threads)
        config = files.config
        self._num_experts = num_experts_by_layer(config)
        with ExitStack() as undo:
            most = settings.most_disk_bytes_per_s
            self._store = _native.Store(settings.readers, bytes_per_s=None if most is None else int(most))
            undo.callback(self._store.close)
            self._runtime = _native.Runtime(threads, tunings, settings.instruction_set)
            undo.callback(self._runtime.close)
            self.runner = self._open(files, share, progress)
            undo.pop_all()
        self._facts = Facts(
            version=version("argosy"),
            kernel=hello.kernel_of(self._runtime.instruction_set, files.expert_format.split("+")),
            sources=bytes.fromhex(_native.sources_hash()),
            model=model,
            most_rows=MOST_ROWS,
            most_assignments=MOST_ROWS * config.experts_per_token,
            hidden=config.expert_hidden,
            num_layers=config.num_layers,
            num_experts=config.num_experts,
        )
        self._offer = Offer(
            num_slots=self.plan.num_slots or self.plan.num_experts,
            cache_bytes=self.plan.expert_bytes,
            disk_bytes_per_s=self.disk_bytes_per_s,
            share_bytes=sum(record.nbytes for record in share.values()),
            shards=settings.shards,
            is_resident=self.plan.num_slots is None,
        )
        self._turn = threading.Lock()  # the runner takes one request at a time
        self._changes = threading.Lock()  # guards what follows
        self._links: dict[threading.Thread, _native.WorkerLink] = {}
        self._is_draining = threading.Event()

    def _open(
        self, files: ModelFiles, share: Mapping[Key, ExpertRecord], progress: Progress | None
    ) -> ExpertRunner:
        open_file = functools.cache(self._store.open)
        biases = biases_of(files)
        weights = (
            load_dense(self._store, biases, open_file=open_file)
            if biases
            else DenseWeights({}, {}, _native.Arena(1))
        )
        arithmetic = describe_experts(files.config, weights)
        experts = ExpertFiles(self._store, files.experts, open_file=open_file, share=share)
        if self.plan.num_slots is None:
            return load_resident(self._store, experts, self._runtime, arithmetic, progress=progress)
        cache = ExpertCache(
            experts,
            num_slots=self.plan.num_slots,
            experts_per_token=files.config.experts_per_token,
            arithmetic=arithmetic,
        )
        return CachedRunner(self._runtime, cache)

    # ── connections ─────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def has_key(self) -> bool:
        """Whether coordinators need a key."""
        return bool(self._settings.key)

    def serve(self, listener: socket.socket, *, started: Callable[[], None] | None = None) -> None:
        """Accept coordinators until `drain`; return when the last connection has ended.

        Args:
            started: called when coordinators can connect.
        """
        ticker = threading.Thread(target=self._tick, name="argosy-ticker", daemon=True)
        ticker.start()
        listener.listen(door.MOST_STRANGERS)
        if started is not None:
            started()
        door.admit(listener, self._meet, self._is_draining)
        while True:
            with self._changes:
                threads = list(self._links)
            if not threads:
                break
            threads[0].join()
        ticker.join()

    def drain(self) -> None:
        """Accept no more coordinators, answer the current requests, then end every connection. Safe in a signal
        handler.
        """
        self._is_draining.set()

    def close(self) -> None:
        """Free everything; no connection may be left."""
        self._is_draining.set()
        self._store.close()
        self.runner.close()
        self._runtime.close()

    def _meet(self, connection: socket.socket, address: str, is_known: Callable[[], None]) -> None:
        """Introduce a connection, then serve it."""
        link: _native.WorkerLink | None = None
        try:
            link = self._introduce(connection, address)
            is_known()
            if link is not None:
                self._serve_link(link, address)
        finally:
            if link is not None:
                link.close()
            with self._changes:
                self._links.pop(threading.current_thread(), None)

    def _introduce(self, connection: socket.socket, address: str) -> _native.WorkerLink | None:
        settings = self._settings
        try:
            hello.prepare(connection)
            if settings.tls is not None:
                connection = secure.wrap(connection, settings.tls, name=None)
            with self._changes:
                is_full = len(self._links) >= settings.most_coordinators
            refusal = Refusal.busy if is_full else Refusal.none
            if self._is_draining.is_set():
                refusal = Refusal.draining
            theirs = hello.accept(connection, settings.key, self._facts, self._offer, refusal=refusal)
        except PeerNotUsable as error:
            connection.close()
            log.warning("worker: %s: %s", address, error.message)
            return None
        except OSError as error:
            connection.close()
            log.warning(
                "worker: %s: the connection failed: %s", address, error.strerror or type(error).__name__
            )
            return None
        link = _native.WorkerLink(
            secure.plain_end(connection).detach(),
            hidden=theirs.hidden,
            num_experts=self._num_experts,
            most_rows=theirs.most_rows,
            most_assignments=theirs.most_assignments,
        )
        with self._changes:
            if len(self._links) >= settings.most_coordinators:  # another one was faster
                link.close()
                return None
            self._links[threading.current_thread()] = link
        log.info("worker: serving a coordinator at %s", address)
        return link

    def _serve_link(self, link: _native.WorkerLink, address: str) -> None:
        link.status = self._status()
        try:
            while not self._is_draining.is_set():
                table = self.runner.resident
                if table is not None and not link.serve_resident(self._runtime, table):
                    break
                if self._is_draining.is_set():
                    break
                request = link.next()
                if request is None:
                    break
                if isinstance(request, _native.WorkerRequest):
                    with self._turn:
                        self._run(link, request)
                elif isinstance(request, _native.WorkerGuess):
                    with self._turn:
                        if self.runner.wants_guess(is_sweep=request.is_sweep):
                            self.runner.guess(request.layer, request.by_rank, is_sweep=request.is_sweep)
        except _native.LinkError as error:
            log.warning("worker: %s: %s", address, error)
        log.info("worker: the coordinator at %s is gone", address)

    def _run(self, link: _native.WorkerLink, request: _native.WorkerRequest) -> None:
        """Answer a request: experts in memory first, then each group of experts as it lands."""
        layer, dispatch = request.layer, request.dispatch
        foreign = [e for e in dispatch.experts if not self._settings.shards >> shard_of(layer, e) & 1]
        if foreign:
            link.refuse(
                REFUSED_SHARD, f"layer {layer}, expert {foreign[0]} is not in the shards of this worker"
            )
            return
        try:
            with self.runner.run(layer, dispatch, request.rows, request.out) as groups:
                for group in groups:
                    link.answer(group)
                    if link.is_cancelled:
                        break
        except (CheckpointError, ReadFailed) as error:
            log.error("worker: %s", error.message)
            link.refuse(REFUSED_READ, error.message[:_LONGEST_MESSAGE])

    # ── numbers for coordinators ────────────────────────────────────────────────────────────────────────────────

    def _status(self) -> bytes:
        stats = self.runner.stats
        return json.dumps(
            {
                "lookups": stats.lookups,
                "hits": stats.hits,
                "bytes_read": stats.bytes_read,
                "resident": self.runner.num_resident,
                "slots": self._offer.num_slots,
                "peak_bytes": peak_bytes() or 0,
                "budget_bytes": self.plan.budget_bytes,
            }
        ).encode()

    def _tick(self) -> None:
        """Update the numbers in pongs; on `drain`, wake the links that wait for a request."""
        while True:
            is_last = self._is_draining.wait(_TICK_S)
            with self._changes:
                links = list(self._links.values())
            if is_last and not links:
                return
            status = self._status()
            for link in links:
                link.status = status
                if is_last:
                    link.interrupt()
            if is_last:
                time.sleep(0.05)


def _measured_drive(share: Mapping[Key, ExpertRecord]) -> float:
    """The measured read rate of the share's files in bytes per second; 0 if the file system has no direct reads."""
    record = next(iter(share.values()))
    with suppress(OSError, RuntimeError, ValueError):
        return probes.drive_rate(record.pieces[0].path, record.nbytes)
    return 0.0
