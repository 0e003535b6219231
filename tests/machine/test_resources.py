"""Facts about made-up machines: each test writes the kernel files that it needs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from argosy.config import GIB, MIB
from argosy.errors import UsageError
from argosy.machine import resources
from argosy.machine.resources import MappingLimit, MemoryLimit

KB = 1024


class FakeMachine:
    """A root directory with 16 GiB of memory, of which 10 GiB are available."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write(
            "proc/meminfo",
            f"MemTotal: {16 * GIB // KB} kB\nMemAvailable: {10 * GIB // KB} kB\nSwapTotal: 2048 kB\n",
        )
        self.write(
            "proc/self/status",
            f"Name:\tpython\nVmSize:\t{900 * KB} kB\n"
            f"VmHWM:\t{400 * KB} kB\nVmRSS:\t{300 * KB} kB\nRssAnon:\t{200 * KB} kB\n"
            f"RssFile:\t{90 * KB} kB\nRssShmem:\t{10 * KB} kB\nVmPTE:\t{2 * KB} kB\nThreads:\t3\n",
        )

    def write(self, path: str, text: str) -> None:
        place = self.root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)

    def put_in_cgroup_v2(self, path: str = "/user.slice/app", inner_path: str = "/") -> None:
        self.write("proc/self/cgroup", f"0::{path}\n")
        self.write(
            "proc/self/mountinfo",
            f"24 1 0:22 {inner_path} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n",
        )

    def put_in_cgroup_v1(self, path: str = "/docker/abc") -> None:
        self.write("proc/self/cgroup", f"9:name=systemd:/\n4:memory:{path}\n3:cpu,cpuacct:{path}\n0::/\n")
        self.write(
            "proc/self/mountinfo",
            "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
            "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
            "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
            "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
        )


@pytest.fixture
def fake(tmp_path: Path) -> FakeMachine:
    return FakeMachine(tmp_path)


OWN_BYTES = 200 * MIB  # RssAnon of the fake process


def test_without_a_cgroup_the_machine_is_the_limit(fake: FakeMachine) -> None:
    assert resources.memory_limit(fake.root) == MemoryLimit(16 * GIB, 10 * GIB + OWN_BYTES, "machine")
    assert resources.swap_bytes(fake.root) == 2 * MIB


def test_the_cgroup_v2_limit_is_found_and_its_page_cache_counts_as_free(fake: FakeMachine) -> None:
    fake.put_in_cgroup_v2()
    fake.write("sys/fs/cgroup/user.slice/app/memory.max", f"{4 * GIB}\n")
    fake.write("sys/fs/cgroup/user.slice/app/memory.current", f"{3 * GIB}\n")
    fake.write(
        "sys/fs/cgroup/user.slice/app/memory.stat",
        f"anon {GIB}\ninactive_file {GIB}\nactive_file {GIB // 2}\n",
    )
    limit = resources.memory_limit(fake.root)
    assert limit == MemoryLimit(4 * GIB, 4 * GIB - 3 * GIB // 2 + OWN_BYTES, "cgroup v2 /user.slice/app")
    assert str(limit) == "2.7 GiB free of 4.0 GiB (cgroup v2 /user.slice/app)"


def test_the_smallest_limit_of_all_parents_applies(fake: FakeMachine) -> None:
    fake.put_in_cgroup_v2()
    for group, limit_text, used in (("user.slice/app", "max", 10), ("user.slice", str(2 * GIB), 50 * MIB)):
        fake.write(f"sys/fs/cgroup/{group}/memory.max", limit_text + "\n")
        fake.write(f"sys/fs/cgroup/{group}/memory.current", f"{used}\n")
    limit = resources.memory_limit(fake.root)
    # Free memory never exceeds the limit.
    assert limit == MemoryLimit(2 * GIB, 2 * GIB, "cgroup v2 /user.slice")


def test_memory_high_is_a_limit_like_memory_max(fake: FakeMachine) -> None:
    fake.put_in_cgroup_v2()
    group = "sys/fs/cgroup/user.slice/app"
    fake.write(f"{group}/memory.max", "max\n")
    fake.write(f"{group}/memory.high", f"{3 * GIB}\n")
    fake.write(f"{group}/memory.current", f"{GIB}\n")
    expected = MemoryLimit(3 * GIB, 2 * GIB + OWN_BYTES, "cgroup v2 /user.slice/app")
    assert resources.memory_limit(fake.root) == expected

    fake.write(f"{group}/memory.max", f"{4 * GIB}\n")  # the smaller one applies
    assert resources.memory_limit(fake.root) == expected
    fake.write(f"{group}/memory.max", f"{2 * GIB}\n")
    assert resources.memory_limit(fake.root).total_bytes == 2 * GIB
    fake.write(f"{group}/memory.high", "max\n")
    assert resources.memory_limit(fake.root).total_bytes == 2 * GIB

    fake.write("sys/fs/cgroup/user.slice/memory.max", "max\n")  # a parent's limit applies too
    fake.write("sys/fs/cgroup/user.slice/memory.high", f"{GIB}\n")
    fake.write("sys/fs/cgroup/user.slice/memory.current", "0\n")
    assert resources.memory_limit(fake.root) == MemoryLimit(GIB, GIB, "cgroup v2 /user.slice")


def test_the_cgroup_v1_limit_is_found_and_a_huge_one_is_no_limit(fake: FakeMachine) -> None:
    fake.put_in_cgroup_v1()
    memory = "sys/fs/cgroup/memory"
    fake.write(f"{memory}/memory.limit_in_bytes", "9223372036854771712\n")
    fake.write(f"{memory}/memory.usage_in_bytes", f"{9 * GIB}\n")
    assert resources.memory_limit(fake.root).source == "machine"

    fake.write(f"{memory}/docker/abc/memory.limit_in_bytes", f"{GIB}\n")
    fake.write(f"{memory}/docker/abc/memory.usage_in_bytes", f"{800 * MIB}\n")
    fake.write(
        f"{memory}/docker/abc/memory.stat",
        f"inactive_file 1\ntotal_inactive_file {100 * MIB}\ntotal_active_file {50 * MIB}\n",
    )
    expected = GIB - 650 * MIB + OWN_BYTES
    assert resources.memory_limit(fake.root) == MemoryLimit(GIB, expected, "cgroup v1 /docker/abc")


def test_in_a_container_the_cgroup_path_may_lie_outside_the_mount(fake: FakeMachine) -> None:
    fake.put_in_cgroup_v2(
        path="/system.slice/docker-abc.scope/init", inner_path="/system.slice/docker-abc.scope"
    )
    fake.write("sys/fs/cgroup/memory.max", f"{3 * GIB}\n")
    fake.write("sys/fs/cgroup/memory.current", "0\n")
    assert resources.memory_limit(fake.root).total_bytes == 3 * GIB
    fake.put_in_cgroup_v2(path="/elsewhere", inner_path="/system.slice/docker-abc.scope")
    assert resources.memory_limit(fake.root).total_bytes == 3 * GIB


@pytest.mark.parametrize(
    ("free_bytes", "margin_bytes"),
    [(100 * GIB, 5 * GIB), (8 * GIB, 512 * MIB), (2 * GIB, 256 * MIB), (512 * MIB, 64 * MIB)],
)
def test_the_margin_is_a_twentieth_but_bounded_on_small_machines(free_bytes: int, margin_bytes: int) -> None:
    limit = MemoryLimit(200 * GIB, free_bytes, "machine")
    assert resources.default_budget(limit) == (free_bytes - margin_bytes, margin_bytes)


def test_the_footprint_is_what_the_kernel_counts(fake: FakeMachine) -> None:
    found = resources.process_footprint(fake.root)
    assert (found.resident_bytes, found.anonymous_bytes, found.file_bytes, found.peak_bytes) == tuple(
        n * MIB for n in (300, 200, 100, 400)
    )


def test_page_tables_are_what_the_kernel_counts(fake: FakeMachine) -> None:
    assert resources.process_footprint(fake.root).page_table_bytes == 2 * MIB


def test_mapping_limits_are_found_and_unlimited_ones_are_none(fake: FakeMachine) -> None:
    assert resources.address_space_limit(fake.root) is None  # the file is missing
    fake.write(
        "proc/self/limits",
        "Limit                     Soft Limit           Hard Limit           Units     \n"
        "Max data size             unlimited            unlimited            bytes     \n"
        "Max stack size            16777216             unlimited            bytes     \n"
        f"Max address space         {2 * GIB}           unlimited            bytes     \n",
    )
    assert resources.address_space_limit(fake.root) == MappingLimit("ulimit -v", 2 * GIB, 900 * MIB)
    assert resources.data_limit(fake.root) is None
    assert resources.thread_stack_bytes(fake.root) == 16 * MIB


def test_the_cgroup_peak_counts_only_if_the_process_is_alone(fake: FakeMachine) -> None:
    assert resources.cgroup_peak_bytes(fake.root) is None
    fake.put_in_cgroup_v2()
    group = "sys/fs/cgroup/user.slice/app"
    fake.write(f"{group}/memory.peak", f"{GIB}\n")
    fake.write(f"{group}/cgroup.procs", f"{os.getpid()}\n1\n")
    assert resources.cgroup_peak_bytes(fake.root) is None
    fake.write(f"{group}/cgroup.procs", f"{os.getpid()}\n")
    assert resources.cgroup_peak_bytes(fake.root) == GIB
    fake.put_in_cgroup_v1()
    fake.write("sys/fs/cgroup/memory/docker/abc/cgroup.procs", f"{os.getpid()}\n")
    fake.write("sys/fs/cgroup/memory/docker/abc/memory.max_usage_in_bytes", f"{2 * GIB}\n")
    assert resources.cgroup_peak_bytes(fake.root) == 2 * GIB


def test_usable_cores_are_the_affinity_mask_or_a_smaller_quota(
    fake: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert resources.usable_cores(fake.root) == 8
    fake.put_in_cgroup_v2()
    fake.write("sys/fs/cgroup/user.slice/app/cpu.max", "max 100000\n")
    fake.write("sys/fs/cgroup/user.slice/cpu.max", "250000 100000\n")
    assert resources.usable_cores(fake.root) == 2
    fake.write("sys/fs/cgroup/user.slice/cpu.max", "50000 100000\n")
    assert resources.usable_cores(fake.root) == 1
    fake.put_in_cgroup_v1()
    fake.write("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n")
    fake.write("sys/fs/cgroup/cpu/docker/abc/cpu.cfs_quota_us", "300000\n")
    fake.write("sys/fs/cgroup/cpu/docker/abc/cpu.cfs_period_us", "100000\n")
    assert resources.usable_cores(fake.root) == 3


def test_threads_of_one_core_count_once_as_physical_cores(
    fake: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.write("proc/self/cgroup", "0::/\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 4, 5})
    assert resources.physical_cores(fake.root) == 5  # nothing is known
    for cpu in range(6):
        siblings = f"{cpu % 3},{cpu % 3 + 3}\n"
        fake.write(f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", siblings)
    assert resources.physical_cores(fake.root) == 3


def test_the_drive_is_that_of_the_longest_matching_mount_point(fake: FakeMachine, tmp_path: Path) -> None:
    data = tmp_path / "data set"
    data.mkdir()
    escaped = str(data).replace(" ", "\\040")
    fake.write(
        "proc/self/mountinfo",
        "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n"
        f"28 27 259:2 / {escaped} rw shared:9 master:3 - xfs /dev/nvme0n1p2 rw\n"
        "29 27 0:44 / /elsewhere rw - tmpfs tmpfs rw\n",
    )
    fake.write("sys/class/bdi/254:0/read_ahead_kb", "8192\n")
    disk = fake.root / "sys/devices/nvme0n1"
    fake.write("sys/devices/nvme0n1/queue/read_ahead_kb", "128\n")
    (disk / "nvme0n1p2").mkdir()
    (fake.root / "sys/dev/block").mkdir(parents=True)
    (fake.root / "sys/dev/block/259:2").symlink_to(disk / "nvme0n1p2")

    found = resources.drive_of(data / "not" / "yet" / "there", fake.root)
    assert found == resources.Drive("xfs", "/dev/nvme0n1p2", str(data), 128)
    other = resources.drive_of(Path("/usr"), fake.root)
    assert other == resources.Drive("ext4", "/dev/vda", "/", 8192)


def test_the_processor_is_given_by_name_or_by_architecture(fake: FakeMachine) -> None:
    assert resources.cpu_model(fake.root) == os.uname().machine
    fake.write("proc/cpuinfo", "processor\t: 0\nmodel name\t: Some CPU 9000\n")
    assert resources.cpu_model(fake.root) == "Some CPU 9000"


def test_the_facts_of_this_machine_are_consistent() -> None:
    limit, footprint = resources.memory_limit(), resources.process_footprint()
    assert 0 < limit.free_bytes <= limit.total_bytes
    assert 0 < footprint.resident_bytes <= limit.total_bytes
    assert footprint.peak_bytes >= footprint.anonymous_bytes
    assert 1 <= resources.usable_cores() <= (os.cpu_count() or 1)
    assert resources.free_disk_bytes(Path("nothing") / "here") > 0


def test_a_peak_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    assert resources.peak_bytes(tmp_path) is None
    status = tmp_path / "proc/self/status"
    status.parent.mkdir(parents=True)
    status.write_text("VmSize:  1 kB\n")  # a kernel without VmHWM
    assert resources.peak_bytes(tmp_path) is None
    status.write_text("VmHWM:  8 kB\nRssAnon:  1 kB\nRssFile:  2 kB\nRssShmem:  3 kB\n")
    assert resources.peak_bytes(tmp_path) == 8192


@pytest.mark.parametrize("name", ["MemTotal", "MemAvailable"])
def test_a_machine_that_does_not_tell_its_memory_is_told(fake: FakeMachine, name: str) -> None:
    place = fake.root / "proc/meminfo"
    place.write_text(place.read_text().replace(f"{name}:", "Other:"))
    with pytest.raises(
        UsageError, match=f"proc/meminfo has no {name}, so the memory of this machine is unknown"
    ):
        resources.memory_limit(fake.root)
