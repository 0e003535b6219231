"""Run a native program on an emulated processor, for instruction sets that this machine lacks.

    python tests/emulated/run.py build/module/test_kernels_matmul        on a processor with AVX-512 and AMX
    python tests/emulated/run.py --cpu arrow_lake PROGRAM ARGUMENTS      with AVX-VNNI, without AVX-512

Bochs interprets every instruction of a PC that boots Debian's kernel from a disc and runs the program, on one core and
as root. The program's output appears here, and its exit status is this command's; 125 means that the machine failed.
It boots in ten seconds, and then takes about a hundred times as long as a real one. Its clock says nothing about speed.

Elsewhere: `make test-emulated` runs the kernel tests of native/tests; `emulator.py` finds the kernel and Bochs.
"""

from __future__ import annotations

import argparse
import gzip
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.emulated.emulator import (
    BIOS,
    BOOT_LOADER,
    VGA_BIOS,
    check_packages,
    fail,
    find_bochs,
    find_kernel,
    run,
)

# With ACPI, Bochs fails in system management mode. After a panic the kernel resets the processor, which ends Bochs.
_KERNEL_ARGUMENTS = "console=ttyS0,115200 loglevel=1 acpi=off panic=-1 reboot=t"
# The serial port is slow, so the machine stays on until its last line has arrived.
_INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin HOME=/tmp
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
stty -onlcr
{command}
echo "{end}$?"
while true; do sleep 1000; done
"""
_BOOT_MENU = """default linux
label linux
  kernel /vmlinuz
  append initrd=/initrd {arguments}
"""
_SETTINGS = """display_library: nogui
romimage: file={bios}
vgaromimage: file={vga_bios}
cpu: model={cpu}, ips=50000000, reset_on_triple_fault=0
memory: guest={memory_mib}, host={memory_mib}
clock: sync=none
ata0-master: type=cdrom, path={disc}, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=/dev/fd/{serial}
speaker: enabled=0
panic: action=fatal
error: action=ignore
info: action=ignore
"""


def main() -> int:
    parser = argparse.ArgumentParser(description="Run a native program on an emulated processor.")
    parser.add_argument("--cpu", default="sapphire_rapids", help="one of the models that Bochs has")
    parser.add_argument("--memory-mib", type=int, default=1024, help="memory of the emulated machine")
    parser.add_argument(
        "--limit-s", type=float, default=7200, help="stop the machine after this many seconds"
    )
    parser.add_argument("program", type=Path)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the program")
    options = parser.parse_args()
    if not options.program.is_file() or not os.access(options.program, os.X_OK):
        parser.error(f"{options.program} is not an executable file")
    check_packages()
    end = f"exit status {secrets.token_hex(8)}: "
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        disc = _make_disc(folder, options.program, options.arguments, end)
        return _boot(folder, disc, end, options.cpu, options.memory_mib, options.limit_s)


def _make_disc(folder: Path, program: Path, arguments: list[str], end: str) -> Path:
    """Write a disc that boots, runs the program, and prints `end` and the program's exit status."""
    root = folder / "root"
    for name in ("bin", "proc", "sys", "dev", "tmp"):
        (root / name).mkdir(parents=True)
    busybox = Path(shutil.which("busybox") or "")
    shutil.copy(busybox, root / "bin" / "busybox")
    shutil.copy(program, root / "program")
    for library in _libraries(busybox) | _libraries(program):
        copy = root / library.relative_to("/")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, copy)
    init = root / "init"
    init.write_text(_INIT.format(command=shlex.join(["/program", *arguments]), end=end))
    init.chmod(0o755)
    names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
    command = ["cpio", "--create", "--format=newc", "--quiet"]
    archive = subprocess.run(
        command, cwd=root, input=names.encode(), stdout=subprocess.PIPE, check=True
    ).stdout

    disc = folder / "disc"
    disc.mkdir()
    (disc / "initrd").write_bytes(gzip.compress(archive, compresslevel=1))
    shutil.copy(find_kernel(), disc / "vmlinuz")
    for part in BOOT_LOADER:
        shutil.copy(part, disc)
    (disc / "isolinux.cfg").write_text(_BOOT_MENU.format(arguments=_KERNEL_ARGUMENTS))
    image = folder / "disc.iso"
    boot = "-b isolinux.bin -c boot.cat -no-emul-boot -boot-load-size 4 -boot-info-table"
    run(["xorriso", "-as", "mkisofs", "-quiet", "-o", image, *boot.split(), disc])
    return image


def _libraries(program: Path) -> set[Path]:
    """Return the loader and the shared libraries of a program; none if it is static."""
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
    return {Path(found) for found in re.findall(r"(/\S+) \(0x", listed)}


def _boot(folder: Path, disc: Path, end: str, cpu: str, memory_mib: int, limit_s: float) -> int:
    """Boot the disc, print what the machine writes to its serial port, and return the status after `end`."""
    bochs = find_bochs()
    received, serial = os.pipe()
    settings, log = folder / "bochsrc", folder / "bochs.log"
    settings.write_text(
        _SETTINGS.format(
            bios=BIOS, vga_bios=VGA_BIOS, cpu=cpu, memory_mib=memory_mib, disc=disc, serial=serial
        )
    )
    with log.open("wb") as output:
        machine = subprocess.Popen(
            [bochs, "-q", "-f", settings],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=[serial],
        )
    os.close(serial)
    timer = threading.Timer(limit_s, machine.kill)
    timer.start()
    try:
        with os.fdopen(received, "rb") as lines:
            for line in lines:
                before, found, status = line.partition(end.encode())
                sys.stdout.buffer.write(before)
                sys.stdout.flush()
                if found:
                    return int(status)
        if machine.wait() == -signal.SIGKILL:
            fail(f"the program had not finished after {limit_s:g} s")
        fail(f"the machine stopped before the program finished:\n{log.read_text(errors='replace')[-2000:]}")
    finally:
        timer.cancel()
        machine.kill()
        machine.wait()


if __name__ == "__main__":
    sys.exit(main())
