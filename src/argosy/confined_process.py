"""A process that reads what strangers wrote, and is killed and replaced when it exceeds a limit.

    ConfinedProcess("argosy.media.worker", ...)  ->  its `main`: "ready", then an answer to each request, over pipes

The child sees our package, the packages that it is given, and no variable of the environment but those that find
shared libraries. Every write and read has a deadline. The caller decides what an ended or late process means.

Elsewhere: `confine.py` has the limits that the child sets on itself.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import select
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

from argosy.errors import ArgosyError

START_SECONDS = 30.0  # starting an interpreter with numpy and Pillow takes 0.3 s on an idle machine
_EXIT_SECONDS = 5.0  # until a process that was killed is gone
# An interpreter may need these to find its shared libraries. All other variables, keys and tokens among them, are
# withheld.
_PASSED = ("LD_LIBRARY_PATH", "NIX_LD", "NIX_LD_LIBRARY_PATH")


class Gone(Exception):
    """The process ended, or must be ended.

    Args:
        returncode: how it ended; None: it still runs, or broke the protocol.
        is_late: no answer came in time.
        is_early: it ended before it had read all of the request.
    """

    def __init__(
        self, returncode: int | None = None, *, is_late: bool = False, is_early: bool = False
    ) -> None:
        super().__init__(returncode)
        self.returncode, self.is_late, self.is_early = returncode, is_late, is_early


class ConfinedProcess:
    """One process; it is killed when the object is dropped.

    Args:
        module: of ours; its `main` runs in the process.
        packages: that the module imports.
        purpose: what needs the process, for errors.
        environment: further variables.

    Raises:
        ArgosyError: there is no interpreter, or a package is missing.
    """

    def __init__(
        self,
        module: str,
        packages: Sequence[str],
        *,
        purpose: str,
        hint: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        paths = _paths(packages, purpose, hint)
        code = f"import sys; sys.path[:0] = {paths!r}; from {module} import main; main()"
        passed = {name: os.environ[name] for name in _PASSED if name in os.environ}
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-X", "utf8", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**(environment or {}), **passed},
            cwd="/",
            bufsize=0,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._sink, self._source = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._sink, False)
        self._is_ready = False
        self._stop = weakref.finalize(self, _end, self._process)

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        self._stop()

    def await_ready(self) -> None:
        """Wait until it has started. Raises Gone: it did not."""
        if not self._is_ready:
            line, _ = self.read_line(64, time.monotonic() + START_SECONDS)
            if line != b"ready\n":
                raise Gone
            self._is_ready = True

    def write(self, data: bytes, deadline: float) -> None:
        """Raises Gone."""
        view = memoryview(data)
        while view:
            self._wait(self._sink, select.POLLOUT, deadline)
            try:
                view = view[os.write(self._sink, view) :]
            except BlockingIOError:
                continue
            except OSError:
                raise Gone(is_early=True) from None

    def read_line(self, most_bytes: int, deadline: float) -> tuple[bytes, bytes]:
        """Read a line, and whatever came with it. Raises Gone, also for a longer line."""
        read, searched = bytearray(), 0
        while (end := read.find(b"\n", searched) + 1) == 0:
            searched = len(read)
            if searched > most_bytes:
                raise Gone
            self._wait(self._source, select.POLLIN, deadline)
            piece = os.read(self._source, 1 << 16)
            if not piece:
                raise self._gone()
            read += piece
        if end > most_bytes:
            raise Gone
        return bytes(read[:end]), bytes(read[end:])

    def read(self, nbytes: int, first: bytes, deadline: float) -> bytearray:
        """Read exactly `nbytes`, of which `first` were read before. Raises Gone."""
        if len(first) > nbytes:
            raise Gone
        payload = bytearray(nbytes)
        payload[: len(first)] = first
        view = memoryview(payload)[len(first) :]
        while view:
            self._wait(self._source, select.POLLIN, deadline)
            count = os.readv(self._source, [view])
            if not count:
                raise self._gone()
            view = view[count:]
        return payload

    @staticmethod
    def _wait(descriptor: int, event: int, deadline: float) -> None:
        ready = select.poll()  # select() cannot wait for descriptors above 1023, which a server can reach
        ready.register(descriptor, event)
        left = deadline - time.monotonic()
        if left <= 0 or not ready.poll(1000 * left):
            raise Gone(is_late=True)

    def _gone(self) -> Gone:
        """Say how the process ended, now that its pipe is closed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        return Gone(self._process.returncode)


def _paths(packages: Sequence[str], purpose: str, hint: str | None) -> list[str]:
    """The directories that the process imports from."""
    if not sys.executable:
        raise ArgosyError(f"{purpose} need a Python interpreter to start", hint=hint)
    paths = [str(Path(__file__).resolve().parents[1])]
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ArgosyError(f"{purpose} need the package {package}", hint=hint)
        path = Path(spec.origin).parents[1 if spec.submodule_search_locations else 0]
        if str(path) not in paths:
            paths.append(str(path))
    return paths


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and close its pipes."""
    with contextlib.suppress(OSError):
        process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):  # a device may hold it: then it is reaped later
        process.wait(_EXIT_SECONDS)
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
