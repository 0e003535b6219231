"""The resources that this machine allows one process: memory, cores, drive.

    /proc, /sys, cgroups  ->  facts  ->  memory plan, `argosy doctor`

Facts come from kernel files, below a `root` that tests can replace. A fact that cannot be read is None, never a
guess. This module measures nothing: `cli/commands/doctor.py` measures.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from argosy.config import KIB, MIB, format_bytes
from argosy.errors import UsageError

_ROOT = Path("/")
# How much any of our processes grows after its memory is planned: allowances, above the measured values.
PROCESS_GROWTH_BYTES = 4 * MIB  # first use of code and libraries, objects of the engine, the allocator: 3 MiB
THREAD_BYTES = 32 * KIB  # stacks of a thread: 12 KiB of its own, and 16 KiB in the kernel


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """The memory that this process may use, and how much of it no other process uses."""

    total_bytes: int
    free_bytes: int  # includes memory that this process holds
    source: str  # "machine", or the cgroup with the smallest limit

    def __str__(self) -> str:
        return f"{format_bytes(self.free_bytes)} free of {format_bytes(self.total_bytes)} ({self.source})"


@dataclass(frozen=True, slots=True)
class Footprint:
    """The memory of this process: current and peak."""

    resident_bytes: int
    anonymous_bytes: int
    file_bytes: int  # mapped files and shared memory
    peak_bytes: int
    page_table_bytes: int  # held by the kernel, also charged to the cgroup


@dataclass(frozen=True, slots=True)
class MappingLimit:
    """How many bytes of address space this process may map, whether used or not, and how many it has mapped."""

    command: str  # the command that shows and raises the limit: "ulimit -v"
    limit_bytes: int
    mapped_bytes: int


@dataclass(frozen=True, slots=True)
class Drive:
    """The drive that holds a path."""

    file_system: str  # "ext4"
    device: str  # "/dev/nvme0n1p2"
    mount_point: str
    read_ahead_kb: int | None


@dataclass(frozen=True, slots=True)
class _Cgroup:
    path: Path
    version: int
    name: str  # "cgroup v2 /user.slice"


def memory_limit(root: Path = _ROOT) -> MemoryLimit:
    """Return the smallest of the machine's memory and the limits of this process's cgroup and its parents.

    In cgroup v2, the limit is `memory.max` or `memory.high`, whichever is smaller.
    """
    facts = _meminfo(root)
    total, free, source = facts["MemTotal"], facts["MemAvailable"], "machine"
    for group in _cgroups(root, "memory"):
        limit, used = _cgroup_memory(group)
        if limit is None or limit >= facts["MemTotal"]:
            continue
        free = min(free, max(0, limit - used))
        if limit < total:
            total, source = limit, group.name
    own_bytes = process_footprint(root).anonymous_bytes
    return MemoryLimit(total, min(total, free + own_bytes), source)


def default_budget(limit: MemoryLimit) -> tuple[int, int]:
    """Return (budget_bytes, margin_bytes) for a process that was given no budget.

    The margin is for programs that start later: 5 %, at least 512 MiB, but at most an eighth on a small machine.
    """
    margin_bytes = min(max(limit.free_bytes // 20, 512 * MIB), limit.free_bytes // 8)
    return limit.free_bytes - margin_bytes, margin_bytes


def swap_bytes(root: Path = _ROOT) -> int:
    return _meminfo(root).get("SwapTotal", 0)


def process_footprint(root: Path = _ROOT) -> Footprint:
    status = _sizes(root / "proc/self/status")
    anonymous_bytes = status["RssAnon"]
    file_bytes = status["RssFile"] + status["RssShmem"]
    resident_bytes = anonymous_bytes + file_bytes
    return Footprint(resident_bytes, anonymous_bytes, file_bytes, status["VmHWM"], status["VmPTE"])


def held_bytes() -> int:
    """Bytes that this process holds now, page tables included."""
    footprint = process_footprint()
    return footprint.resident_bytes + footprint.page_table_bytes


def page_table_bytes(mapped_bytes: int, num_mappings: int = 16) -> int:
    """Bound the page-table bytes of `mapped_bytes` in `num_mappings` places of the address space.

    A table is a page, and an entry takes 8 bytes: 1/512 of memory mapped in 4 KiB pages. Huge pages save nothing: the
    kernel keeps a spare table for each one, in case it has to split that page (measured on Linux 6.18). A mapping may
    begin and end inside a table at each level.
    """
    entries = mmap.PAGESIZE // 8
    nbytes, span = 0, mmap.PAGESIZE
    while span < max(mapped_bytes, mmap.PAGESIZE) * entries:
        span *= entries  # one table of this level maps this much
        nbytes += (-(-mapped_bytes // span) + num_mappings) * mmap.PAGESIZE
    return nbytes


def address_space_limit(root: Path = _ROOT) -> MappingLimit | None:
    """RLIMIT_AS, see getrlimit(2); None if there is no limit."""
    return _mapping_limit(root, "Max address space", "ulimit -v", "VmSize")


def data_limit(root: Path = _ROOT) -> MappingLimit | None:
    """RLIMIT_DATA: like `address_space_limit`, for private writable memory."""
    return _mapping_limit(root, "Max data size", "ulimit -d", "VmData")


def may_reserve(root: Path = _ROOT) -> bool:
    """Whether address space may be reserved freely: neither a `ulimit` nor strict overcommit counts unused mappings."""
    is_strict = _number(root / "proc/sys/vm/overcommit_memory") == 2
    return not is_strict and address_space_limit(root) is None and data_limit(root) is None


def thread_stack_bytes(root: Path = _ROOT) -> int:
    """Return the bytes that a new thread's stack maps: RLIMIT_STACK, or 8 MiB if there is no limit."""
    return _process_limit(root, "Max stack size") or 8 * MIB


def _mapping_limit(root: Path, name: str, command: str, used: str) -> MappingLimit | None:
    limit_bytes = _process_limit(root, name)
    if limit_bytes is None:
        return None
    return MappingLimit(command, limit_bytes, _sizes(root / "proc/self/status")[used])


def _process_limit(root: Path, name: str) -> int | None:
    """The soft limit in a line of /proc/self/limits, in bytes; None if it is unlimited or unknown."""
    for line in (_read(root / "proc/self/limits") or "").splitlines():
        if line.startswith(name):
            soft = line.removeprefix(name).split()[0]
            return int(soft) if soft.isdigit() else None
    return None


def peak_bytes(root: Path = _ROOT) -> int | None:
    """Return this process's peak memory, or None if it cannot be read: perhaps too many files are open."""
    try:
        return _sizes(root / "proc/self/status").get("VmHWM")
    except OSError:
        return None


def reset_peak(root: Path = _ROOT) -> bool:
    """Restart `peak_bytes` from what this process holds now; return whether the kernel supports that."""
    try:
        (root / "proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def cgroup_peak_bytes(root: Path = _ROOT) -> int | None:
    """Return the peak of the memory cgroup, page cache included; None unless this process is alone in it."""
    group = next(_cgroups(root, "memory"), None)
    if group is None:
        return None
    if (_read(group.path / "cgroup.procs") or "").split() != [str(os.getpid())]:
        return None
    return _number(group.path / ("memory.peak" if group.version == 2 else "memory.max_usage_in_bytes"))


def usable_cores(root: Path = _ROOT) -> int:
    """Return how many cores this process may use: its affinity mask, or a cgroup's CPU quota if that is less."""
    cores = len(os.sched_getaffinity(0))
    for group in _cgroups(root, "cpu"):
        if (quota := _cpu_quota(group)) is not None:
            cores = min(cores, max(1, int(quota)))
    return cores


def physical_cores(root: Path = _ROOT) -> int:
    """Return the number of physical cores among `usable_cores`: hardware threads of one core count once."""
    cpus = os.sched_getaffinity(0)
    topology = root / "sys/devices/system/cpu"
    shared = {_read(topology / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in cpus}
    return min(len(shared), usable_cores(root))


def cpu_model(root: Path = _ROOT) -> str:
    for line in (_read(root / "proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return os.uname().machine


def drive_of(path: Path, root: Path = _ROOT) -> Drive | None:
    """Find the mount that holds `path`, or its nearest parent that exists."""
    place = nearest_existing(path)
    best: Drive | None = None
    for mount in _mounts(root):
        if not place.is_relative_to(mount.mount_point):
            continue
        if best is not None and len(mount.mount_point) < len(best.mount_point):
            continue
        block = root / "sys/dev/block" / mount.device_number
        ahead = _first_number(
            root / "sys/class/bdi" / mount.device_number / "read_ahead_kb",
            block / "queue/read_ahead_kb",
            block.resolve().parent / "queue/read_ahead_kb",  # a partition uses its drive's queue
        )
        best = Drive(mount.file_system, mount.device, mount.mount_point, ahead)
    return best


def free_disk_bytes(path: Path) -> int:
    """Return the bytes that an ordinary user can still write where `path` is or will be."""
    facts = os.statvfs(nearest_existing(path))
    return facts.f_bavail * facts.f_frsize


def nearest_existing(path: Path) -> Path:
    place = path.expanduser().absolute()
    while not place.exists():
        place = place.parent
    return place.resolve()


@dataclass(frozen=True, slots=True)
class _Mount:
    device_number: str  # "259:2"
    inner_path: str  # the mounted part of the file system
    mount_point: str
    file_system: str
    device: str
    options: tuple[str, ...]  # the file system's options; for cgroup v1, its controllers


def _mounts(root: Path) -> Iterator[_Mount]:
    """Parse /proc/self/mountinfo, see proc_pid_mountinfo(5)."""
    for line in (_read(root / "proc/self/mountinfo") or "").splitlines():
        mount, _, file_system = line.partition(" - ")
        fields, rest = mount.split(), file_system.split()
        if len(fields) >= 5 and len(rest) >= 2:
            options = tuple(rest[2].split(",")) if len(rest) > 2 else ()
            yield _Mount(fields[2], _unescape(fields[3]), _unescape(fields[4]), rest[0], rest[1], options)


def _unescape(text: str) -> str:
    for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, char)
    return text


def _cgroups(root: Path, controller: str) -> Iterator[_Cgroup]:
    """List this process's cgroup for a controller, then its parents up to the mount; v1 if it has the controller."""
    memberships: dict[str, str] = {}
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for name in controllers.split(","):
            memberships[name] = path  # v2 has no controller names: ""
    version = 1 if controller in memberships else 2
    own_path = memberships.get(controller if version == 1 else "")
    if own_path is None:
        return
    for mount in _mounts(root):
        if mount.file_system != ("cgroup" if version == 1 else "cgroup2"):
            continue
        if version == 1 and controller not in mount.options:
            continue
        top = root / mount.mount_point.lstrip("/")
        # In a container, the mount may show only part of the tree, and the path may lead outside it.
        own = Path(own_path)
        inside = own.relative_to(mount.inner_path) if own.is_relative_to(mount.inner_path) else Path()
        for part in (inside, *inside.parents):
            yield _Cgroup(top / part, version, f"cgroup v{version} {Path('/') / part}")
        return


def _cgroup_memory(group: _Cgroup) -> tuple[int | None, int]:
    """Return (limit or None, bytes in use that cannot simply be reclaimed).

    Above `memory.high` the kernel stalls a process until it has reclaimed memory, and weights cannot be reclaimed: in
    effect `memory.high` is a limit, like `memory.max`.
    """
    if group.version == 2:
        limits = [_number(group.path / name) for name in ("memory.max", "memory.high")]
        limit = min((found for found in limits if found is not None), default=None)
        used = _number(group.path / "memory.current")
        prefix = ""
    else:
        limit, used = (
            _number(group.path / "memory.limit_in_bytes"),
            _number(group.path / "memory.usage_in_bytes"),
        )
        prefix = "total_"  # including child groups
    if limit is None or used is None:
        return None, 0
    cache_bytes = 0
    for line in (_read(group.path / "memory.stat") or "").splitlines():
        name, _, value = line.partition(" ")
        if name in (f"{prefix}inactive_file", f"{prefix}active_file"):
            cache_bytes += int(value)
    return limit, max(0, used - cache_bytes)


def _cpu_quota(group: _Cgroup) -> float | None:
    if group.version == 2:
        quota, _, period = (_read(group.path / "cpu.max") or "max").partition(" ")
        return None if quota.strip() == "max" else int(quota) / int(period)
    quota_us = _number(group.path / "cpu.cfs_quota_us")
    period_us = _number(group.path / "cpu.cfs_period_us")
    return None if not period_us or quota_us is None or quota_us <= 0 else quota_us / period_us


def _meminfo(root: Path) -> dict[str, int]:
    sizes = _sizes(path := root / "proc/meminfo")
    for name in ("MemTotal", "MemAvailable"):
        if name not in sizes:
            raise UsageError(f"{path} has no {name}, so the memory of this machine is unknown")
    return sizes


def _sizes(path: Path) -> dict[str, int]:
    """Parse `Name:  123 kB` lines into bytes."""
    sizes: dict[str, int] = {}
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        words = value.split()
        if len(words) == 2 and words[1] == "kB":
            sizes[name] = int(words[0]) * 1024
    return sizes


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def _first_number(*paths: Path) -> int | None:
    return next((number for path in paths if (number := _number(path)) is not None), None)


def _number(path: Path) -> int | None:
    text = (_read(path) or "").strip()
    return int(text) if text.lstrip("-").isdigit() else None
