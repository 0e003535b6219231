"""Find and start workers with Ray, and react when machines join or leave.

    ray.nodes()  ->  an actor on each node with the resource  ->  `argosy worker`, its child  ->  HOST:PORT
                                                                                                    │
    a node dies  ->  a spare worker, which is already running  ->  Members.add, drain  <────────────┘

Ray is only the control plane. A worker is the ordinary process, bound to its node's address, and hidden states
travel between it and the coordinator without Ray: no token costs a Ray call. If Ray's head dies, workers continue
and only changes wait. The key comes from the driver's memory and reaches the worker through an unnamed file.

A worker that ends is restarted on its node. While waiting for the first workers, the caller is told how many are
ready, and the last output of any that failed to start. After three failed starts of a required worker, the wait
ends.

Ray notices a dead node after about 15 seconds by default, and after 1.5 with the settings in
docs/guides/cluster-ray.md; then a spare worker is added. Until then the other owners answer: the group itself
notices within milliseconds, by its connections.

Elsewhere: connections and owners are `group.py`; a worker is `worker.py`; decision 60 says why Ray.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any, Protocol, Self

from argosy.errors import ArgosyError, UsageError
from argosy.installed import command_for_extra

log = logging.getLogger("argosy.cluster")

RESOURCE = "argosy_expert"
START_S = 600.0  # a worker reads its experts before it is ready
SAID_S = 60.0  # how often to report while waiting for workers
_MOST_FAILED = 3  # consecutive failed starts of a worker
_LOOK_S = 0.25
_CALL_S = 5.0  # an actor that does not answer for this long is gone
_MOST_PAUSE_S = 10.0  # between two starts of a worker that keeps ending
_AWAY_S = 10.0  # a worker that is not back after this long is replaced by a spare, if there is one
_LONGEST_LINE = 4096
_LAST_WORDS = 2000  # characters of a worker's errors
_LAST_LINES = 8  # how many of the last lines are shown
# Starts a worker that the kernel kills when the thread that started it ends (PR_SET_PDEATHSIG).
_AS_CHILD = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
os.execv(sys.executable, [sys.executable, "-m", "argosy", "worker", *sys.argv[1:]])
"""


class Members(Protocol):
    """The group to notify of workers, such as `argosy.cluster.group.Group`."""

    def add(self, host: str) -> None: ...

    def drain(self, host: str) -> None: ...


class NoWorkers(ArgosyError):
    """Ray cannot be used, or has no node for a worker."""

    http_status = 503


def launch(arguments: Sequence[str], key: bytes, on_ready: Callable[[str], None]) -> subprocess.Popen[bytes]:
    """Start `argosy worker` and call `on_ready` with its address once it is ready.

    The worker ends when this process ends, for whatever reason.

    Args:
        arguments: for the command, without the key.
        key: empty for none.

    Raises:
        RuntimeError: it ended before it was ready; the message contains its last output.
    """
    command = [sys.executable, "-c", _AS_CHILD, *arguments]
    descriptors: tuple[int, ...] = ()
    if key:
        hidden = os.memfd_create("argosy-key")
        os.fchmod(hidden, 0o600)
        os.write(hidden, key)
        command += ["--key-file", f"/proc/self/fd/{hidden}"]
        descriptors = (hidden,)
    try:
        worker = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, bufsize=0,
            pass_fds=descriptors,
        )  # fmt: skip
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    said = _Said(worker)
    address = said.address()
    if address is None:
        worker.kill()
        worker.wait()
        raise RuntimeError(said.last_words())
    on_ready(address)
    return worker


class _Said:
    """A worker's output: the address from its stdout; everything else goes to our stderr."""

    def __init__(self, worker: subprocess.Popen[bytes]) -> None:
        self._worker = worker
        self._errors = ""

    def address(self) -> str | None:
        """Wait until the worker is ready and return its address; None if it ends first."""
        out, errors = self._worker.stdout, self._worker.stderr
        assert out is not None
        assert errors is not None
        said = b""
        until = time.monotonic() + START_S
        with selectors.DefaultSelector() as ready:
            ready.register(out, selectors.EVENT_READ)
            ready.register(errors, selectors.EVENT_READ)
            while len(ready.get_map()) and time.monotonic() < until:
                for key, _ in ready.select(timeout=1.0):
                    data = os.read(key.fd, 65536)
                    if not data:
                        ready.unregister(key.fileobj)
                    elif key.fileobj is errors:
                        self._note(data)
                    else:
                        said = (said + data)[-_LONGEST_LINE:]
                for line in said.decode("utf-8", "replace").splitlines(keepends=True):
                    if line.startswith("ready at ") and line.endswith("\n"):
                        threading.Thread(target=self._pass_on, args=(out,), daemon=True).start()
                        threading.Thread(target=self._pass_on, args=(errors,), daemon=True).start()
                        return line.removeprefix("ready at ").split(": ")[0]
        return None

    def last_words(self) -> str:
        return self._errors.strip()[-_LAST_WORDS:] or "the worker ended and said nothing"

    def _note(self, data: bytes) -> None:
        text = data.decode("utf-8", "replace")
        self._errors = (self._errors + text)[-2 * _LAST_WORDS :]
        print(text, end="", file=sys.stderr, flush=True)

    def _pass_on(self, stream: Any) -> None:
        with contextlib.suppress(OSError, ValueError):
            while data := os.read(stream.fileno(), 65536):
                self._note(data)


class WorkerKeeper:
    """The actor on a node, which keeps one worker running.

    Args:
        arguments: for `argosy worker`, without address and key.
        key: empty for none.
    """

    def __init__(self, arguments: Sequence[str], key: bytes) -> None:
        self._arguments, self._key = list(arguments), key
        self._changes = threading.Lock()
        self._worker: subprocess.Popen[bytes] | None = None
        self._address = ""
        self._fault = ""
        self._num_starts = 0
        self._num_failed = 0  # failed starts since the worker was last ready
        threading.Thread(target=self._keep, daemon=True).start()

    def where(self) -> str:
        """The address of this node."""
        return str(_import_ray().util.get_node_ip_address())

    def state(self) -> tuple[str, str, int, int, int]:
        """The worker's state.

        Returns:
            Its address, empty until it is ready; the last fault; how often it was started; its process id; the
            number of failed starts since it was last ready.
        """
        with self._changes:
            worker = self._worker
            is_running = worker is not None and worker.poll() is None
            return (
                self._address if is_running else "", self._fault, self._num_starts, worker.pid if worker else 0,
                self._num_failed,
            )  # fmt: skip

    def _keep(self) -> None:
        """Start the worker, and restart it whenever it ends."""
        pause_s = _LOOK_S
        host = self.where()
        port = "0"
        while True:
            began = time.monotonic()
            ready: list[str] = []
            try:
                with self._changes:
                    self._num_starts += 1
                shown = f"[{host}]" if ":" in host else host
                worker = launch([*self._arguments, "--bind", f"{shown}:{port}"], self._key, ready.append)
                with self._changes:
                    self._worker, self._address, self._fault = worker, ready[0], ""
                    self._num_failed = 0
                port = ready[0].rpartition(":")[2]  # the group knows the worker by its address
                code = worker.wait()
                fault = f"the worker ended with {code}"
            except (OSError, RuntimeError) as error:
                fault, port = str(error), "0"
            with self._changes:
                self._worker, self._fault = None, fault
                self._num_failed += not ready
            print(fault, file=sys.stderr, flush=True)
            pause_s = _LOOK_S if time.monotonic() - began > _MOST_PAUSE_S else min(_MOST_PAUSE_S, 2 * pause_s)
            time.sleep(pause_s)


@dataclass(slots=True, eq=False)
class _Node:
    """A node of the Ray cluster and its actor.

    where: its address, for people.
    is_member: its worker is, or will be, in the group; otherwise it is a spare.
    host: its worker's address; empty until the worker is ready.
    last_host: its worker's address when last ready; the group reconnects to it by itself.
    lost_at: when its worker was last ready.
    num_failed, fault: failed starts of its worker since it was last ready, and the last output of the latest.
    """

    id: str
    actor: Any
    where: str = ""
    is_member: bool = False
    host: str = ""
    last_host: str = ""
    lost_at: float = 0.0
    num_failed: int = 0
    fault: str = ""
    call: Any = None
    called_at: float = field(default_factory=time.monotonic)

    @property
    def name(self) -> str:
        return f"{self.id[:8]} ({self.where})" if self.where else self.id[:8]


class RayWorkers:
    """Workers on nodes of a Ray cluster.

        with RayWorkers(["Kimi-K2.pack", "--memory", "56GiB"], key=key) as workers:
            with Group(workers.hosts(), key=key) as group:
                workers.follow(group)
                engine = Engine.open("Kimi-K2.pack", experts=group)

    Args:
        arguments: for `argosy worker`: the model and its options, without address and key.
        key: the shared key; empty: none.
        num_workers: how many workers the group gets; those of other nodes are spares. None: all of them, without
            spares.
        address: the Ray cluster's address; None: the cluster that this process is connected to, or the one on this
            machine.

    Raises:
        NoWorkers: Ray is not installed, or there is no cluster.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        key: bytes = b"",
        num_workers: int | None = None,
        address: str | None = None,
    ) -> None:
        if num_workers is not None and num_workers < 1:
            raise UsageError(f"there must be 1 worker or more, found {num_workers}")
        self._ray = ray = _import_ray()
        self._has_connected = not ray.is_initialized()
        if self._has_connected:
            try:
                ray.init(address=address or "auto", log_to_driver=False, namespace="argosy")
            except (ConnectionError, ValueError) as error:
                raise NoWorkers(
                    f"there is no Ray cluster: {error}", hint="`ray start --head` on one machine begins one"
                ) from None
        self._arguments, self._key, self._num_workers = list(arguments), key, num_workers
        self._nodes: dict[str, _Node] = {}
        self._changes = threading.Condition()
        self._group: Members | None = None
        self._told: set[str] = set()  # hosts that the group has been told of
        self._stop = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="argosy-ray", daemon=True)
        self._keeper.start()

    def hosts(self, *, timeout_s: float = START_S, tell: Callable[[str], None] = log.info) -> list[str]:
        """Wait until the group's workers are ready, and return their addresses.

        Args:
            tell: called with a line at once and every SAID_S, and with the last output of workers that failed to
                start.

        Raises:
            NoWorkers: no worker is ready in time, or a required one does not start.
        """
        until, telling = time.monotonic() + timeout_s, _Telling(tell)
        with _sigterm_as_exit(), self._changes:
            while True:
                nodes = list(self._nodes.values())
                ready = [node.host for node in nodes if node.is_member and node.host]
                num_wanted = self._num_workers or len(nodes)
                if len(ready) >= max(1, num_wanted) or time.monotonic() > until:
                    break
                telling.look(nodes, len(ready), num_wanted)
                failed = [node for node in nodes if not node.host and node.num_failed >= _MOST_FAILED]
                if failed and len(nodes) - len(failed) < num_wanted:
                    raise NoWorkers(
                        f"the worker on node {failed[0].name} did not start, {failed[0].num_failed} times in a row:\n"
                        + _last_lines(failed[0].fault),
                        hint="workers inherit the environment of `ray start` on their node: "
                        "use a model path that is the same on all nodes",
                    )
                self._changes.wait(_LOOK_S)
            if not ready:
                raise NoWorkers(
                    f"no worker is ready after {timeout_s:.0f} s on {len(self._nodes)} nodes with {RESOURCE}",
                    hint=f"start nodes with `ray start --address=HEAD --resources='{{\"{RESOURCE}\": 1}}'`",
                )
            self._told.update(ready)
            return ready

    def follow(self, group: Members) -> None:
        """From now on, tell `group` of workers that come and go."""
        with self._changes:
            self._group = group

    def close(self) -> None:
        """End all workers."""
        self._stop.set()
        self._keeper.join(_CALL_S)  # wait no longer: Ray's head may be away
        for node in list(self._nodes.values()):
            with contextlib.suppress(Exception):  # the node may be gone
                self._ray.kill(node.actor)
        if self._has_connected and not self._keeper.is_alive():
            # Otherwise Ray would end with the interpreter, and print a stack trace if a thread were inside it.
            self._ray.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ── the keeper's thread ─────────────────────────────────────────────────────────────────────────────────────

    def _keep(self) -> None:
        is_away = False
        while not self._stop.wait(_LOOK_S):
            try:
                self._look()
            except Exception as error:  # Ray's head may be away; the workers continue without it
                if not is_away:
                    log.warning("cluster: Ray does not answer: %s", type(error).__name__)
                is_away = True
            else:
                is_away = False

    def _look(self) -> None:
        """Compare the cluster's nodes with the known ones, and its workers with the wanted number."""
        alive = {
            node["NodeID"]: str(node.get("NodeManagerAddress", ""))
            for node in self._ray.nodes()
            if node["Alive"] and node["Resources"].get(RESOURCE, 0) >= 1
        }
        for name in sorted(alive - self._nodes.keys()):
            actor = self._actor_on(name)
            with self._changes:
                self._nodes[name] = _Node(name, actor, alive[name])
        for node in list(self._nodes.values()):
            if node.id not in alive:
                self._forget(node, "its node is gone")
            else:
                self._ask(node)
        self._choose()
        self._tell()

    def _actor_on(self, node_id: str) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        keeper = self._ray.remote(
            num_cpus=0, resources={RESOURCE: 1}, max_restarts=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        )(WorkerKeeper)  # fmt: skip
        return keeper.remote(self._arguments, self._key)

    def _ask(self, node: _Node) -> None:
        """Poll an actor's state; forget a node whose actor has died or is silent."""
        if node.call is None:
            node.call, node.called_at = node.actor.state.remote(), time.monotonic()
            return
        done, _ = self._ray.wait([node.call], timeout=0)
        if not done:
            if node.host and time.monotonic() - node.called_at > _CALL_S:
                self._forget(node, "its actor does not answer")
            return
        try:
            host, fault, _, _, num_failed = self._ray.get(node.call)
        except self._ray.exceptions.RayError:
            self._forget(node, "its actor died")
            return
        node.call = None
        with self._changes:
            node.num_failed, node.fault = num_failed, fault
        if host != node.host:
            log.info(
                "cluster: the worker on node %s is %s",
                node.id[:8],
                f"at {host}" if host else fault or "starting",
            )
            with self._changes:
                node.host, node.last_host, node.lost_at = host, host or node.last_host, time.monotonic()
                self._changes.notify_all()

    def _forget(self, node: _Node, reason: str) -> None:
        """Note that a node is lost. Its actor is created again if Ray still has the node."""
        log.warning("cluster: node %s is lost: %s", node.id[:8], reason)
        # A silent actor would hold on to the node's resource.
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.kill(node.actor)
        with self._changes:
            del self._nodes[node.id]

    def _choose(self) -> None:
        """Promote spare workers until the group has the number it wants."""
        with self._changes:
            members = [node for node in self._nodes.values() if node.is_member]
            spares = [node for node in self._nodes.values() if node.host and not node.is_member]
            lost = [node for node in members if not node.host and time.monotonic() - node.lost_at > _AWAY_S]
            for node, _ in zip(lost, spares, strict=False):
                node.is_member = False
                members.remove(node)
            num_wanted = len(self._nodes) if self._num_workers is None else self._num_workers
            for node in spares[: max(0, num_wanted - len(members))]:
                node.is_member = True
            self._changes.notify_all()

    def _tell(self) -> None:
        """Tell the group about changes."""
        with self._changes:
            group = self._group
            members = [node for node in self._nodes.values() if node.is_member]
            ready = {node.host for node in members if node.host}
            kept = {node.last_host for node in members}
        if group is None:
            return
        for host in ready - self._told:
            try:
                group.add(host)
            except ArgosyError as error:
                log.warning("cluster: %s cannot be added: %s", host, error.message)
            else:
                self._told.add(host)
        for host in self._told - kept:
            with contextlib.suppress(ArgosyError):
                group.drain(host)
            self._told.discard(host)


class _Telling:
    """Reports on a wait for workers."""

    def __init__(self, tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._tell, self._clock = tell, clock
        self._said: tuple[float, int, int] | None = None  # the time and numbers of the last report
        self._failed: set[str] = set()  # nodes whose first failed start has been reported

    def look(self, nodes: Sequence[_Node], num_ready: int, num_wanted: int) -> None:
        for node in nodes:
            if node.num_failed and not node.host and node.id not in self._failed:
                self._failed.add(node.id)
                self._tell(f"the worker on node {node.name} did not start:\n{_last_lines(node.fault)}")
        now = self._clock()
        if self._said is None or self._said[1:] != (num_ready, num_wanted) or now - self._said[0] >= SAID_S:
            self._said = now, num_ready, num_wanted
            ready = (
                f"{num_ready} of {num_wanted} nodes ready" if num_wanted else f"no node has {RESOURCE} yet"
            )
            self._tell(f"waiting for workers: {ready}")


def _last_lines(text: str) -> str:
    """The last lines of a worker's output, safe for a terminal."""
    lines = [line for line in text[-_LAST_WORDS:].splitlines() if line.strip()][-_LAST_LINES:]
    shown = (
        "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in line) for line in lines
    )
    return "\n".join(f"  {line}" for line in shown)


@contextlib.contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """Make SIGTERM end the process in order: Ray's own handler prints a stack trace and kills it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _import_ray() -> Any:
    try:
        import ray
    except ImportError:
        raise NoWorkers(
            "Ray is not installed",
            hint=f"`{command_for_extra('cluster')}`, or name the workers: --cluster HOST:PORT,...",
        ) from None
    return ray
