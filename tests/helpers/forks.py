"""Processes that are forks of one that has imported the engine and the server: they start in a fraction of a second."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.forkserver import get_inherited_fds  # type: ignore[attr-defined]
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from typing import Any, AnyStr, NoReturn

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.model.open_parts", "tests.route.serving"])


class ForkedArgosy(subprocess.Popen[AnyStr]):
    """`Popen` of `argosy` with these arguments, without the second that importing it takes.

    What `argosy` is called, where its interpreter comes from and what it imports when, other tests check.
    """

    _fork: BaseProcess

    def _execute_child(self, args: Sequence[object], *rest: Any) -> None:
        _, _, _, _, cwd, env, _, _, _, *pipes = rest[:15]
        ends = [number if end == -1 else end for number, end in enumerate((pipes[0], pipes[3], pipes[5]))]
        self._fork = FORKS.Process(
            target=_run_command,
            args=(
                [str(each) for each in args], dict(os.environ if env is None else env), str(cwd or os.getcwd()),
                [_Descriptor(end) for end in ends],
            ),
        )  # fmt: skip
        self._fork.start()
        assert self._fork.pid is not None
        self.pid = self._fork.pid
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]

    def _internal_poll(self, _deadstate: object = None) -> int | None:
        if self.returncode is None:
            self.returncode = self._fork.exitcode
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        self._fork.join(timeout)
        if self._internal_poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode


class _Descriptor:
    """A descriptor that arrives in the process that takes it as an argument."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> Any:
        return _number_there, (DupFd(self.number),)


def _number_there(descriptor: Any) -> int:
    return int(descriptor.detach())


def _run_command(
    arguments: Sequence[str], environment: dict[str, str], directory: str, descriptors: Sequence[int]
) -> NoReturn:
    from argosy.cli.main import main

    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
    for descriptor in get_inherited_fds():
        os.close(descriptor)
    sys.stdin, sys.stdout = open(0), open(1, "w")  # noqa: SIM115 - to the end of the process
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace")  # noqa: SIM115
    sys.argv = ["argosy", *arguments]
    code = 1
    try:
        code = main(arguments)
    finally:
        atexit._run_exitfuncs()
    sys.exit(code)
