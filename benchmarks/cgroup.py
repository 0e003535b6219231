"""Run a command inside a memory cgroup whose limit is the budget, and report what the kernel counted.

    run_capped([...], limit_bytes=512 << 20)  ->  exit code, output, peak with page cache, limit hits, kills, swap
    with capped([...], limit_bytes=...) as (process, counts): ...   the same counts for a running command, as a server

Both hierarchies are tried (v1 `memory`, v2 `unified`), at their root and below this process's own group. Swap is
forbidden inside, so a process that needs more than the limit is killed instead of slowed down. The peak is the kernel's
own: anonymous memory, the page cache filled by the command's reads, and kernel memory such as page tables. Only the
standard library is used, so that tests can import this file.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

_POLL_S = 0.05
_numbers = itertools.count(1)


class NoMemoryCap(Exception):
    """No memory cgroup can be made here; `str()` gives the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CappedRun:
    """The result of a command, and what the kernel counted while it ran."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float
    hierarchy: str  # "v1" or "v2"
    limit_bytes: int
    peak_bytes: int  # includes page cache and kernel memory; never above the limit
    peak_anonymous_bytes: int  # sampled: memory that cannot be dropped to make room
    num_limit_hits: int  # times the kernel had to reclaim page cache, or kill, to stay below the limit
    num_oom_kills: int
    peak_swap_bytes: int  # sampled


@dataclass(frozen=True, slots=True)
class _Hierarchy:
    """Names of the same files in the two hierarchies."""

    version: str
    root: Path
    own: Path
    limit: str
    usage: str
    peak: str

    def parents(self) -> Iterator[Path]:
        """Groups that may allow a child: the root, then from this process's own group upwards."""
        yield self.root
        if self.own != self.root:
            yield self.own
            yield from (parent for parent in self.own.parents if self.root in parent.parents)


@contextlib.contextmanager
def capped(
    command: Sequence[str],
    *,
    limit_bytes: int,
    stdout: int | IO[bytes] = subprocess.DEVNULL,
    stderr: int | IO[bytes] = subprocess.DEVNULL,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Iterator[tuple[subprocess.Popen[bytes], Counts]]:
    """Run a command in a fresh memory cgroup and count what the kernel reports; at the end everything in it is killed.

    Raises:
        NoMemoryCap: no memory cgroup can be made here.
    """
    with _fresh_group(limit_bytes) as (hierarchy, group):
        # The shell moves itself into the group before it becomes the command, so nothing is charged elsewhere.
        enter = f'echo $$ > "{group}/cgroup.procs" && exec "$@"'
        process = subprocess.Popen(
            ["/bin/sh", "-c", enter, "sh", *map(str, command)],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=None if env is None else dict(env),
            cwd=cwd,
        )
        counts = Counts(hierarchy, group)
        try:
            yield process, counts
        finally:
            counts.stop()
            _kill_all(group)
            process.communicate()


def run_capped(
    command: Sequence[str],
    *,
    limit_bytes: int,
    timeout_s: float = 600,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> CappedRun:
    """Run `command` in a fresh memory cgroup to its end; its child processes stay inside too.

    Raises:
        NoMemoryCap: no memory cgroup can be made here.
        TimeoutError: the command took longer and was killed.
    """
    started = time.monotonic()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with capped(command, limit_bytes=limit_bytes, env=env, cwd=cwd, **pipes) as (process, counts):
        try:
            stdout, stderr = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            shown = " ".join(map(str, command))
            raise TimeoutError(f"{shown}: still running after {timeout_s} s") from None
        counts.stop()
        return CappedRun(
            returncode=process.returncode,
            stdout=stdout.decode(errors="replace"),
            stderr=stderr.decode(errors="replace"),
            seconds=time.monotonic() - started,
            hierarchy=counts.hierarchy,
            limit_bytes=limit_bytes,
            peak_bytes=counts.peak_bytes,
            peak_anonymous_bytes=counts.peak_anonymous_bytes,
            num_limit_hits=counts.num_limit_hits,
            num_oom_kills=counts.num_oom_kills,
            peak_swap_bytes=counts.peak_swap_bytes,
        )


def why_no_cap() -> str | None:
    """None where `run_capped` works, otherwise the reason, for a test's skip."""
    try:
        with _fresh_group(64 << 20):
            return None
    except NoMemoryCap as reason:
        return str(reason)


# ── making a group ──────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def _fresh_group(limit_bytes: int) -> Iterator[tuple[_Hierarchy, Path]]:
    reasons: list[str] = []
    for hierarchy in _hierarchies(reasons):
        for parent in hierarchy.parents():
            group = parent / f"argosy-{os.getpid()}-{next(_numbers)}"
            try:
                _make(hierarchy, parent, group, limit_bytes)
            except OSError as error:
                reasons.append(f"{hierarchy.version} at {parent}: {error.strerror or error}")
                _remove(group)
                continue
            try:
                yield hierarchy, group
            finally:
                _kill_all(group)
                _remove(group)
            return
    raise NoMemoryCap("no memory cgroup can be made here: " + "; ".join(reasons))


def _make(hierarchy: _Hierarchy, parent: Path, group: Path, limit_bytes: int) -> None:
    if hierarchy.version == "v2" and "memory" not in (parent / "cgroup.subtree_control").read_text().split():
        (parent / "cgroup.subtree_control").write_text("+memory")
    group.mkdir()
    (group / hierarchy.limit).write_text(str(limit_bytes))
    # Swap accounting may be off; then any swap that the machine has shows in the samples.
    with contextlib.suppress(OSError):
        if hierarchy.version == "v1":
            (group / "memory.memsw.limit_in_bytes").write_text(str(limit_bytes))  # memory and swap together
        else:
            (group / "memory.swap.max").write_text("0")


def _hierarchies(reasons: list[str]) -> Iterator[_Hierarchy]:
    own = _own_groups()
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        place, (kind, _, options) = Path(left.split()[4]), right.split(maxsplit=2)
        if kind == "cgroup" and "memory" in options.split(","):
            yield _Hierarchy(
                "v1",
                place,
                place / own.get("memory", "/").lstrip("/"),
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "memory.max_usage_in_bytes",
            )
        elif kind == "cgroup2":
            if "memory" not in (place / "cgroup.controllers").read_text().split():
                reasons.append(f"v2 at {place}: no memory controller")
                continue
            yield _Hierarchy(
                "v2",
                place,
                place / own.get("", "/").lstrip("/"),
                "memory.max",
                "memory.current",
                "memory.peak",
            )


def _own_groups() -> dict[str, str]:
    """Maps each controller to this process's group; the v2 hierarchy has no controller name."""
    groups: dict[str, Any] = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        groups |= dict.fromkeys(controllers.split(","), path)
    return groups


def _kill_all(group: Path) -> None:
    """Kill everything left inside; only processes that `run_capped` started can be there."""
    for _ in range(100):
        try:
            pids = [int(pid) for pid in (group / "cgroup.procs").read_text().split()]
        except OSError:
            return
        if not pids:
            return
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_S)


def _remove(group: Path) -> None:
    for _ in range(100):
        with contextlib.suppress(OSError):
            (group / "memory.force_empty").write_text("0")  # v1: drop the page cache charged to it
        try:
            group.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(_POLL_S)
        else:
            return


# ── counting ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Counts:
    """The kernel's counts for a group; values without a kernel peak are sampled a few times a second."""

    def __init__(self, hierarchy: _Hierarchy, group: Path) -> None:
        self._hierarchy, self._group = hierarchy, group
        self._sampled_peak_bytes = self.peak_anonymous_bytes = self.peak_swap_bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def hierarchy(self) -> str:
        return self._hierarchy.version

    @property
    def peak_bytes(self) -> int:
        return _read_int(self._group / self._hierarchy.peak) or self._sampled_peak_bytes

    @property
    def held_bytes(self) -> int:
        """The memory that is charged to the group now, page cache included."""
        return _read_int(self._group / self._hierarchy.usage)

    @property
    def num_limit_hits(self) -> int:
        if self._hierarchy.version == "v1":
            return _read_int(self._group / "memory.failcnt")
        return _read_table(self._group / "memory.events").get("max", 0)

    @property
    def num_oom_kills(self) -> int:
        file = "memory.oom_control" if self._hierarchy.version == "v1" else "memory.events"
        return _read_table(self._group / file).get("oom_kill", 0)

    def stop(self) -> None:
        """Stop sampling. Stopping twice is harmless."""
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        anonymous = "rss" if self._hierarchy.version == "v1" else "anon"
        while not self._done.wait(_POLL_S):
            stat = _read_table(self._group / "memory.stat")
            self.peak_anonymous_bytes = max(self.peak_anonymous_bytes, stat.get(anonymous, 0))
            swap = stat.get("swap", 0) or _read_int(self._group / "memory.swap.current")
            self.peak_swap_bytes = max(self.peak_swap_bytes, swap)
            usage = _read_int(self._group / self._hierarchy.usage)
            self._sampled_peak_bytes = max(self._sampled_peak_bytes, usage)


def _read_int(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


def _read_table(path: Path) -> dict[str, int]:
    try:
        rows = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) == 2}
