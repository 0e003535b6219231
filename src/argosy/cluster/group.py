"""A group: this machine and the workers that run experts for it.

    with Group(["10.0.0.2:7070", "10.0.0.3:7070"], key=read_key(path)) as group:
        engine = Engine.open("Kimi-K2.pack", memory="64GiB", experts=group)

    hosts  ─ hello ─>  members (offers)  ─ placement ─>  owners of every expert  ─>  ClusterRunner, layer by layer

The engine's thread runs layers. A thread of the group maintains the connections: it reconnects to workers that went
away, detects silent ones, and reassigns owners when a worker is added, drained, or away for long. A plan is
replaced as a whole, between two steps. A worker without files copies them from here in a thread of its own, then
becomes an owner.

Elsewhere: `runner.py` sends rows and handles failures within a layer; `member.py` describes a worker; `owners.py`
assigns experts; `worker.py` is the other side.
"""

from __future__ import annotations

import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from importlib.metadata import version
from types import TracebackType
from typing import Self

from argosy import _native
from argosy._native import Owner, Owners
from argosy.checkpoint.files import ModelFiles
from argosy.cluster import hello, secure
from argosy.cluster.copy_source import COPY_BYTES, Pace
from argosy.cluster.copying import MOST_COPIES, Copying
from argosy.cluster.hello import MOST_ROWS, Facts, Refusal
from argosy.cluster.identity import fingerprint
from argosy.cluster.member import LOOK_S, MOST_PAUSE_S, Member, parse_host
from argosy.cluster.owners import AWAY_S, Here, plan_owners, shards_to_copy
from argosy.cluster.placement import Host
from argosy.cluster.runner import ClusterRunner, most_verification_bytes
from argosy.cluster.worker_plan import num_experts_by_layer
from argosy.errors import PeerNotUsable, PeerRefused, UsageError
from argosy.experts.runner import ExpertRunner
from argosy.experts.workers import WorkerStatus
from argosy.machine import probes

log = logging.getLogger("argosy.cluster")

MOST_HOSTS = 64
_MORE_HOSTS = 4  # hosts that may be added while the group runs, within the planned memory
LOCAL = "here"  # the name of this machine among the owners
_CONNECT_S = 2.0
_SILENCE_S = 3.0  # a worker that owes an answer and is silent for this long is taken for dead
_COPY_BYTES_PER_S = 50e6  # shared by all copies while the engine answers a request
_BUSY_S = 5.0  # the engine counts as answering for this long after a step begins
_MEMBER_BYTES = 64 << 10  # the Python objects of one member
_OWNER_BYTES = 16  # per owner of an expert: in the table in use, in the next one, and while building that
_REMEMBERED_BYTES = 8  # per expert and host that may have it in memory


class Group:
    """Workers that run experts for one engine, which calls `open`.

    Args:
        hosts: addresses of workers, HOST:PORT.
        replicas: how many hosts own each expert, if there are that many.
        key: the shared key (`hello.read_key`); empty for none.
        tls: the TLS context (`secure.client_context`); None for plain connections.
        verify: the fraction of answers, from 0 to 1, that a second owner also computes.
        local: whether this machine also runs experts.
        disk_bytes_per_s: the rate of this machine's drive; None: `open` measures it.
        copy_bytes_per_s: the rate at which workers may copy files from here while the engine answers a request.
        tell: called with a line about the workers that `open` is waiting for.

    Raises:
        UsageError: an argument is invalid.
    """

    def __init__(
        self,
        hosts: Sequence[str],
        *,
        replicas: int = 2,
        key: bytes = b"",
        tls: ssl.SSLContext | None = None,
        verify: float = 0.0,
        local: bool = True,
        disk_bytes_per_s: float | None = None,
        copy_bytes_per_s: float = _COPY_BYTES_PER_S,
        tell: Callable[[str], None] = log.info,
    ) -> None:
        if not 1 <= replicas <= MOST_HOSTS:
            raise UsageError(f"replicas must be 1 to {MOST_HOSTS}, found {replicas}")
        if not 0.0 <= verify <= 1.0:
            raise UsageError(f"the share of answers to verify must be 0% to 100%, found {verify:.0%}")
        if copy_bytes_per_s < 1:
            raise UsageError(f"the copy rate must be at least 1 byte per second, found {copy_bytes_per_s:g}")
        if not hosts or len(hosts) > MOST_HOSTS:
            raise UsageError(f"a group has 1 to {MOST_HOSTS} workers, found {len(hosts)}")
        self._replicas = replicas
        self._key, self._tls = key, tls
        self._verify, self._runs_here = verify, local
        self._disk_bytes_per_s = disk_bytes_per_s
        self._tell = tell
        self._members: dict[str, Member] = {}  # in the order they were named
        self._changes = threading.RLock()  # guards members and the assignment of owners
        self._stop = threading.Event()
        self._keeper: threading.Thread | None = None
        self._exchange: _native.Exchange | None = None
        self._facts: Facts | None = None
        self._layout: Owners | None = None
        self._here: Here | None = None
        self._model: ModelFiles | None = None
        self._runner: ClusterRunner | None = None
        pace = Pace(copy_bytes_per_s, self._is_busy)
        self._copying = Copying(pace, self._changes, self._stop, self._shards_to_copy)
        for name in hosts:
            self._new_member(name)
        self._most_members = min(MOST_HOSTS, len(self._members) + _MORE_HOSTS)

    def _new_member(self, name: str) -> Member:
        address = parse_host(name)
        if name in self._members:
            raise UsageError(f"{name} is already in the group")
        member = Member(name, address, Owner(name))
        self._members[name] = member
        return member

    # ── what an engine calls ────────────────────────────────────────────────────────────────────────────────────

    @property
    def most_rows(self) -> int:
        """The most tokens in a step that workers accept."""
        return MOST_ROWS

    @property
    def runs_here(self) -> bool:
        """Whether this machine also runs experts."""
        return self._runs_here

    def nbytes(self, files: ModelFiles) -> int:
        """The most bytes that the group takes in the engine's process: buffers, and tables of experts."""
        config = files.config
        buffers = _native.exchange_bytes(
            hidden=config.expert_hidden,
            num_experts=num_experts_by_layer(config),
            most_rows=MOST_ROWS,
            most_assignments=MOST_ROWS * config.experts_per_token,
            num_peers=len(self._members) + _MORE_HOSTS,
        )
        num_hosts = len(self._members) + _MORE_HOSTS + 1
        of_expert = self._replicas * _OWNER_BYTES + num_hosts * _REMEMBERED_BYTES
        known = config.num_layers * config.num_experts * of_expert
        each = _MEMBER_BYTES + (secure.BUFFER_BYTES if self._tls else 0)
        verification = most_verification_bytes(config) if self._verify else 0
        copies = MOST_COPIES * COPY_BYTES
        return buffers + known + (len(self._members) + _MORE_HOSTS) * each + verification + copies

    def open(
        self,
        files: ModelFiles,
        local: ExpertRunner,
        *,
        instruction_set: str,
        cache_bytes: int,
        step_tokens: int,
    ) -> ExpertRunner:
        """Connect to every worker and return the runner of a model's experts.

        Args:
            local: runs experts in this process, including those that no worker can run, unless the group forbids
                it.
            instruction_set: that of the engine's runtime.
            cache_bytes: memory for experts in the local runner.
            step_tokens: the most tokens of a step.

        Raises:
            UsageError: the group already has an engine, or steps are too long for workers.
            PeerRefused: a worker refuses; the message says why.
            PeerNotUsable: no worker answers.
        """
        if self._exchange is not None:
            raise UsageError("this group already has an engine", hint="make a Group for each engine")
        if step_tokens > MOST_ROWS:
            raise UsageError(
                f"a step of this engine has up to {step_tokens} tokens, and workers accept {MOST_ROWS}",
                hint="smaller pictures or fewer concurrent sequences make steps shorter",
            )
        config = files.config
        most_assignments = step_tokens * config.experts_per_token
        self._facts = Facts(
            version=version("argosy"),
            kernel=hello.kernel_of(instruction_set, files.expert_format.split("+")),
            sources=bytes.fromhex(_native.sources_hash()),
            model=fingerprint(files),
            most_rows=step_tokens,
            most_assignments=most_assignments,
            hidden=config.expert_hidden,
            num_layers=config.num_layers,
            num_experts=config.num_experts,
        )
        self._model = files
        self._copying.open(files)
        self._exchange = exchange = _native.Exchange(
            hidden=config.expert_hidden,
            num_experts=num_experts_by_layer(config),
            most_rows=step_tokens,
            most_assignments=most_assignments,
        )
        record_bytes = max(run.record.nbytes for run in files.records.runs())
        if self._runs_here:
            rate = self._disk_bytes_per_s
            if rate is None:
                rate = 0.0
                with suppress(OSError, RuntimeError, ValueError):
                    some = next(iter(files.experts.values()))
                    rate = probes.drive_rate(some.pieces[0].path, some.nbytes)
            owner = Owner(LOCAL)
            owner.set_rates(record_bytes, rate)
            self._remember(owner, cache_bytes // max(1, record_bytes))
            owner.is_resident = local.resident is not None
            self._here = Here(owner, Host(name=LOCAL, cache_bytes=cache_bytes, disk_bytes_per_s=rate))
        self._record_bytes = record_bytes
        try:
            self._connect_all()
            self._copying.all_met()
            self._plan_owners()
        except BaseException:
            self.close()
            raise
        self._keeper = threading.Thread(target=self._keep, name="argosy-group", daemon=True)
        self._keeper.start()
        here = None if self._here is None else self._here.owner
        self._runner = ClusterRunner(self, exchange, local, here=here, verify=self._verify)
        return self._runner

    def _remember(self, owner: Owner, num_slots: int) -> None:
        """Start tracking which experts an owner has in memory."""
        assert self._model is not None
        config = self._model.config
        owner.remember(num_slots, num_layers=config.num_layers, num_experts=config.num_experts)

    # ── what the runner calls ───────────────────────────────────────────────────────────────────────────────────

    @property
    def layout(self) -> Owners:
        """The current owners of experts."""
        assert self._layout is not None
        return self._layout

    def lost(self, owner: Owner, why: str) -> None:
        """Note that a worker's connection has ended; the keeper reconnects in the background."""
        with self._changes:
            member = self._members.get(owner.name)
            if member is None or owner.peer is None:
                return
            assert self._exchange is not None
            stats = self._exchange.stats(owner.peer)
            for at, count in enumerate((stats.bytes_out, stats.bytes_in, stats.num_late)):
                member.ended_bytes[at] += count
            self._exchange.remove(owner.peer)
            owner.peer = None
            owner.forget()
            member.why, member.away_since = why, time.monotonic()
            member.pause_s, member.tried_at = LOOK_S, 0.0
        if not self._stop.is_set() and not member.drained:
            log.warning("cluster: %s is away: %s", owner.name, why)

    def set_aside(self, owner: Owner, why: str) -> None:
        """Stop using a worker whose outputs differ from the others', until it is added again."""
        with self._changes:
            owner.is_set_aside = True
            member = self._members.get(owner.name)
            if member is not None:
                member.why = why
        log.error("cluster: %s is set aside: %s", owner.name, why)

    # ── members ─────────────────────────────────────────────────────────────────────────────────────────────────

    def add(self, host: str) -> None:
        """Add a worker, or restore one that was drained or set aside. Owners are reassigned; requests do not
        notice.

        If the worker cannot be used, its state does not change.

        Raises:
            UsageError: the address is invalid, the group is full, or has no engine yet.
            PeerNotUsable: the worker cannot be used.
        """
        self._require_engine()
        with self._changes:
            member = self._members.get(host)
            is_new = member is None
            if member is None:
                self._forget_drained()
                if len(self._members) >= self._most_members:
                    raise UsageError(
                        f"the group already has {self._most_members} workers, and memory was planned for no more"
                    )
                member = self._new_member(host)
            owner = member.owner
            before = member.drained, member.refusal, owner.is_set_aside, member.why
            member.drained = member.refusal = owner.is_set_aside = False
        try:
            if owner.peer is None:
                self._connect(member)
        except PeerNotUsable:
            with self._changes:
                if is_new:
                    del self._members[host]
                else:
                    member.drained, member.refusal, owner.is_set_aside, member.why = before
            raise
        self._plan_owners()
        log.info("cluster: %s was added", host)

    def _forget_drained(self) -> None:
        """Make room for another member if the group is full."""
        for name, member in list(self._members.items()):
            if len(self._members) < self._most_members:
                break
            if member.drained and member.owner.peer is None:
                del self._members[name]

    def drain(self, host: str) -> None:
        """Take a worker out of the group: it owns nothing from now on and is disconnected once it has answered.

        Raises:
            UsageError: the group has no such worker, or no engine yet.
        """
        self._require_engine()
        with self._changes:
            member = self._members.get(host)
            if member is None:
                raise UsageError(
                    f"{host} is not in the group", hint=f"its workers are {', '.join(self._members)}"
                )
            member.drained, member.why = True, "drained"
            member.end_copy()
        self._plan_owners()
        log.info("cluster: %s is drained", host)

    def _require_engine(self) -> None:
        if self._layout is None:
            raise UsageError(
                "this group has no engine yet", hint="open one with Engine.open(..., experts=group)"
            )

    def status(self) -> list[WorkerStatus]:
        """Every worker, in the order they were named."""
        with self._changes:
            return [member.status(self._exchange) for member in self._members.values()]

    # ── connections ─────────────────────────────────────────────────────────────────────────────────────────────

    def _connect_all(self) -> None:
        """Connect to all workers at once.

        Raises:
            PeerRefused: a worker refuses for good.   PeerNotUsable: no worker can be used now.
        """

        def attempt(member: Member) -> PeerNotUsable | None:
            try:
                self._connect(member)
            except PeerNotUsable as error:
                return error
            return None

        num_wanted, num_ready = len(self._members), 0
        with ThreadPoolExecutor(min(8, num_wanted), "argosy-hello") as pool:
            self._tell(f"waiting for workers: 0 of {num_wanted} ready")
            attempts = [pool.submit(attempt, member) for member in self._members.values()]
            for num_left, done in zip(reversed(range(num_wanted)), as_completed(attempts), strict=True):
                error = done.result(timeout=0)
                num_ready += error is None
                if num_left:
                    failed = "" if error is None else f"; {error.message}"
                    self._tell(f"waiting for workers: {num_ready} of {num_wanted} ready{failed}")
        errors = [error for done in attempts if (error := done.result(timeout=0)) is not None]
        for error in errors:
            if isinstance(error, PeerRefused) and (_is_lasting(error) or len(errors) == len(self._members)):
                raise error
        if len(errors) == len(self._members):
            raise PeerNotUsable(
                f"no worker of the group answers: {errors[0].message}",
                hint="`argosy worker MODEL --bind HOST:PORT` starts one on another machine",
                host=errors[0].facts.get("host"),
            )
        for error in errors:
            log.warning("cluster: %s", error.message)

    def _connect(self, member: Member) -> None:
        """Connect to a worker and make it an owner.

        Raises:
            PeerRefused: it refuses.   PeerNotUsable: it does not answer.
        """
        assert self._facts is not None
        assert self._exchange is not None
        member.tried_at = time.monotonic()
        try:
            connection = socket.create_connection(member.address, timeout=_CONNECT_S)
        except OSError as error:
            raise self._unanswered(member, error) from None
        try:
            hello.prepare(connection)
            if self._tls is not None:
                connection = secure.wrap(connection, self._tls, name=member.address[0])
            _, offer, copy_key = hello.connect(connection, self._key, self._facts, host=member.name)
            if copy_key is not None:
                if not self._key:
                    raise PeerNotUsable(
                        f"{member.name} requests the model's files, and this group has no key",
                        hint="give every machine a copy of the same key file",
                        host=member.name,
                    )
                self._copying.begin(member, connection, offer, copy_key)
                return
            descriptor = secure.plain_end(connection).detach()
        except OSError as error:
            connection.close()
            raise self._unanswered(member, error) from None
        except BaseException as error:
            connection.close()
            if isinstance(error, PeerNotUsable):
                member.why = error.message
            raise
        with self._changes:
            # the group was closed, or another thread was faster
            if self._stop.is_set() or member.owner.peer is not None:
                socket.socket(fileno=descriptor).close()
                return
            owner = member.owner
            member.offer, member.refusal, member.why, member.copy_offer = offer, False, "", None
            member.num_connections += 1
            owner.set_rates(self._record_bytes, offer.disk_bytes_per_s)
            owner.is_resident = offer.is_resident
            self._remember(owner, offer.num_slots)
            owner.is_slow = False
            owner.peer = self._exchange.add(descriptor)

    @staticmethod
    def _unanswered(member: Member, error: OSError) -> PeerNotUsable:
        if isinstance(error, ssl.SSLCertVerificationError):
            why = f"its certificate is not trusted: {error.verify_message}"
        else:
            why = error.strerror or str(error) or type(error).__name__
        member.why = why
        return PeerNotUsable(f"{member.name} does not answer: {why}", host=member.name)

    def _keep(self) -> None:
        """Maintain the connections until the group is closed."""
        while not self._stop.wait(LOOK_S):
            try:
                self._look_after()
            except Exception:  # this thread must survive; the next round tries again
                log.exception("cluster: a check of the connections failed")

    def _look_after(self) -> None:
        exchange = self._exchange
        assert exchange is not None
        with self._changes:
            members = list(self._members.values())
            by_peer = {member.owner.peer: member for member in members if member.owner.peer is not None}
        for peer, why in exchange.tend(round(_SILENCE_S * 1e6)):
            if (member := by_peer.get(peer)) is not None:
                self.lost(member.owner, why)
        is_changed = False
        now = time.monotonic()
        for member in members:
            owner, connected = member.owner, member.owner.peer
            if connected is not None:
                with suppress(ValueError):  # the engine's thread has just reported it lost
                    if not exchange.stats(connected).num_outstanding:
                        owner.is_slow = False  # it has caught up
                        if member.drained:
                            self.lost(owner, "drained")
                continue
            is_copying = member.copy_connection is not None
            is_wanted = not (member.drained or owner.is_set_aside or member.is_trying or is_copying)
            if is_wanted and now - member.tried_at >= member.pause_s:
                # A stopped worker takes seconds to time out; the others must not wait for it.
                member.is_trying = True
                try:
                    threading.Thread(
                        target=self._try_again, args=(member,), name="argosy-hello", daemon=True
                    ).start()
                except RuntimeError:  # the system cannot start another thread; the next round tries again
                    member.is_trying = False
            if member.offer is not None and now - member.away_since > AWAY_S:
                is_changed |= member.num_owned > 0
        if is_changed:
            self._plan_owners()

    def _try_again(self, member: Member) -> None:
        """Reconnect; reassign owners if the worker's offer has changed."""
        was_owner, offer = member.num_owned > 0, member.offer
        try:
            self._connect(member)
        except PeerRefused as error:
            if not member.refusal and not self._stop.is_set():
                log.error("cluster: %s", error)
            member.refusal, member.pause_s = _is_lasting(error), MOST_PAUSE_S
            is_changed = was_owner and member.refusal
        except PeerNotUsable:
            member.pause_s = min(2 * member.pause_s, MOST_PAUSE_S)
            is_changed = False
        else:
            if not self._stop.is_set() and member.copy_connection is None:
                log.info("cluster: %s is back", member.name)
            is_changed = not was_owner or member.offer != offer
        finally:
            member.is_trying = False
        if is_changed:
            self._plan_owners()

    # ── copies ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _is_busy(self) -> bool:
        runner = self._runner
        return runner is not None and time.monotonic() - runner.last_run_at < _BUSY_S

    def _shards_to_copy(self, member: Member) -> int:
        assert self._model is not None
        members = list(self._members.values())
        return shards_to_copy(member, members, self._here, self._model, replicas=self._replicas)

    def _plan_owners(self) -> None:
        """Assign owners to all experts and replace the current plan."""
        assert self._model is not None
        with self._changes:
            members = list(self._members.values())
            self._layout = plan_owners(members, self._here, self._model, replicas=self._replicas)

    def close(self) -> None:
        """End all connections. The engine should be closed first. Closing twice is harmless."""
        self._stop.set()
        with self._changes:
            for member in self._members.values():
                member.end_copy()
        if self._keeper is not None:
            self._keeper.join()
            self._keeper = None
        with self._changes:
            if self._exchange is not None:
                for member in self._members.values():
                    member.owner.peer = None
                self._exchange.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _is_lasting(error: PeerRefused) -> bool:
    """Whether a worker would refuse again, because it is neither full nor about to end."""
    return error.facts.get("reason") not in (Refusal.busy.name, Refusal.draining.name)
