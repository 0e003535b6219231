"""Processes that are forks of one that has imported the engine and the server: they start in a fraction of a second."""

from __future__ import annotations

import atexit
import fcntl
import multiprocessing
import os
import subprocess
import sys
import tempfile
import termios
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.forkserver import get_inherited_fds  # type: ignore[attr-defined]
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from threading import Barrier
from typing import Any, AnyStr, NoReturn

Surroundings = tuple[str, dict[str, str]]

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "tests.model.open_parts", "tests.route.serving", "tests.abuse.kills", "pytest", "argosy.media.worker",
        "argosy.prompt.template_worker",
    ]
)  # fmt: skip


def call_in_fork(function: Callable[..., Any], *arguments: Any, **named: Any) -> tuple[Any, str]:
    """Call a function of a module in a process of its own; return what it returns, and what it printed.

    Raises:
        AssertionError: it raised an error, or its process ended; the text is what it printed.
    """
    ours, theirs = FORKS.Pipe(duplex=False)
    with ours, tempfile.TemporaryFile("w+") as screen:
        process = FORKS.Process(
            target=_call,
            args=(theirs, _Descriptor(screen.fileno()), _surroundings(), function, arguments, named),
        )
        process.start()
        theirs.close()
        try:
            result = ours.recv()
        except EOFError:
            screen.seek(0)
            raise AssertionError(screen.read()) from None
        finally:
            process.join()
        screen.seek(0)
        return result, screen.read()


def call_at_once(function: Callable[..., Any], calls: Sequence[Sequence[Any]]) -> list[int | None]:
    """Call a function with each of these arguments in processes of their own, all at once; return the exit codes."""
    all_started = FORKS.Barrier(len(calls))
    processes = [
        FORKS.Process(target=_call_with, args=(all_started, _surroundings(), function, *given))
        for given in calls
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


class Forked(subprocess.Popen[AnyStr]):
    """`Popen` of a function of strings, [function, *arguments], which may return an exit code.

    With `start_new_session`, a terminal that is its stdin becomes its own, whose ^C is a signal.
    """

    _fork: BaseProcess

    def _execute_child(self, args: Any, *rest: Any) -> None:
        function, *arguments = args
        _, _, _, _, cwd, env, _, _, _, *pipes = rest[:15]
        ends = [number if end == -1 else end for number, end in enumerate((pipes[0], pipes[3], pipes[5]))]
        self._fork = FORKS.Process(
            target=_run,
            args=(
                function, [str(each) for each in arguments], _surroundings(cwd, env),
                [_Descriptor(end) for end in ends], rest[20],
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


def argosy_command(*arguments: str) -> int:
    from argosy.cli.main import main

    sys.argv = ["argosy", *arguments]
    return main(arguments)


class ForkedArgosy(Forked[AnyStr]):
    """`Popen` of `argosy` with these arguments, without the second that importing it takes.

    What `argosy` is called, where its interpreter comes from and what it imports when, other tests check.
    """

    def _execute_child(self, args: Any, *rest: Any) -> None:
        super()._execute_child((argosy_command, *args), *rest)


class ForkedWorker(Forked[bytes]):
    """`Popen` of a `ConfinedProcess`: `python -I -S -X utf8 -c CODE`, where only CODE counts."""

    def _execute_child(self, args: Any, *rest: Any) -> None:
        super()._execute_child((exec, args[-1]), *rest)


class _Descriptor:
    """A descriptor that arrives in the process that takes it as an argument."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> Any:
        return _number_there, (DupFd(self.number),)


def _number_there(descriptor: Any) -> int:
    return int(descriptor.detach())


def _surroundings(cwd: Any = None, env: Mapping[str, str] | None = None) -> Surroundings:
    """The directory and the environment of a fork. Its server has those of the test that started it."""
    return str(cwd or os.getcwd()), dict(os.environ if env is None else env)


def _enter(surroundings: Surroundings) -> None:
    directory, environment = surroundings
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)


def _call_with(
    all_started: Barrier, surroundings: Surroundings, function: Callable[..., Any], *given: Any
) -> None:
    _enter(surroundings)
    all_started.wait(60)
    function(*given)


def _write_to(descriptors: Sequence[int]) -> None:
    """Take these as stdout and stderr."""
    for number, descriptor in enumerate(descriptors, 1):
        os.dup2(descriptor, number)
    sys.stdout = open(1, "w")  # noqa: SIM115 - to the end of the process
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace")  # noqa: SIM115


def _call(
    told: Connection,
    screen: int,
    surroundings: Surroundings,
    function: Callable[..., Any],
    arguments: Any,
    named: dict[str, Any],
) -> None:
    _enter(surroundings)
    _write_to([screen, screen])
    result = function(*arguments, **named)
    sys.stdout.flush()
    told.send(result)


def _run(
    function: Callable[..., int | None],
    arguments: Sequence[str],
    surroundings: Surroundings,
    descriptors: Sequence[int],
    has_own_session: bool,
) -> NoReturn:
    _enter(surroundings)
    os.dup2(descriptors[0], 0)
    _write_to(descriptors[1:])
    for descriptor in get_inherited_fds():
        os.close(descriptor)
    sys.stdin = open(0)  # noqa: SIM115 - to the end of the process
    if has_own_session:
        os.setsid()
        if os.isatty(0):
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    code: int | None = 1
    try:
        code = function(*arguments)
    finally:
        atexit._run_exitfuncs()
    sys.exit(code)
