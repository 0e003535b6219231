"""An expert runner whose experts are in another process: a socket carries rows and outputs, but no weights.

A request holds the layer, the tokens' choices and their rows. An answer has a frame for every few experts, in any
order: their ids, then a row for each of their assignments. A frame of 0 experts ends it; one of -1 experts is an error.
"""

from __future__ import annotations

import json
import os
import random
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from argosy import _native, errors
from argosy.errors import ArgosyError, RunnerFailed
from argosy.experts.runner import Rows, RunnerStats
from tests.helpers.forks import FORKS

REQUEST = struct.Struct("<5i")  # layer, tokens, experts per token, experts of a layer, hidden
COUNT = struct.Struct("<i")
TIMEOUT_S = 120.0  # for the other process to answer, which reads the model first


class Connection:
    """Send and receive whole messages over a socket, and count their bytes."""

    def __init__(self, to: socket.socket) -> None:
        self.socket = to
        self.sent_bytes = self.received_bytes = 0

    def send(self, *parts: bytes) -> None:
        for part in parts:
            self.socket.sendall(part)
            self.sent_bytes += len(part)

    def receive(self, nbytes: int) -> bytes:
        """Receive exactly `nbytes`; raise EOFError if the other side is gone."""
        parts = []
        while nbytes:
            part = self.socket.recv(nbytes)
            if not part:
                raise EOFError
            parts.append(part)
            nbytes -= len(part)
            self.received_bytes += len(part)
        return b"".join(parts)

    def array(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        return np.frombuffer(self.receive(int(np.prod(shape)) * np.dtype(dtype).itemsize), dtype).reshape(
            shape
        )

    def count(self) -> int:
        return int(COUNT.unpack(self.receive(COUNT.size))[0])


class ProcessRunner:
    """Starts the other process when it is first needed, and again after it dies.

    Args:
        residency: what the other process keeps in memory, as for `open_parts`.
        dies_in_run: the number of the request in whose answer the process ends midway; 0: never.
        deaths: how many of the processes do so.
    """

    resident = elsewhere = None

    def __init__(
        self,
        directory: Path,
        residency: str,
        *,
        num_experts: int,
        instruction_set: str | None = None,
        dies_in_run: int = 0,
        deaths: int = 1,
    ) -> None:
        self.stats = RunnerStats()
        self.num_resident = 0
        self.num_started = 0
        self._arguments = [str(directory), residency, instruction_set or _native.instruction_sets()[-1]]
        self._num_experts = num_experts
        self._dies_in_run, self._deaths = dies_in_run, deaths
        self._process: BaseProcess | None = None
        self.connection: Connection | None = None

    def _connected(self) -> Connection:
        if self.connection is not None:
            return self.connection
        ours, theirs = socket.socketpair()
        ours.settimeout(TIMEOUT_S)
        dies_in_run = self._dies_in_run if self.num_started < self._deaths else 0
        with theirs:
            self._process = FORKS.Process(target=run_experts, args=(theirs, dies_in_run, *self._arguments))
            self._process.start()
        self.num_started += 1
        self.connection = Connection(ours)
        return self.connection

    @contextmanager
    def run(
        self, layer: int, dispatch: _native.Dispatch, rows: Rows, out: Rows
    ) -> Iterator[Iterator[Sequence[int]]]:
        choices = dispatch.choices()
        # Tokens that chose no expert of `scan` yield the same `scan` as the decoding tokens.
        is_decode = ~np.isin(choices, dispatch.scan).any(axis=1)
        sizes = (layer, *choices.shape, self._num_experts, rows.shape[1])
        try:
            connection = self._connected()
            connection.send(REQUEST.pack(*sizes), choices.tobytes(), is_decode.tobytes(), rows.tobytes())
        except OSError as error:
            raise self._dead(layer) from error
        self.stats.lookups += len(dispatch.experts)
        answer = self._answer(connection, layer, dispatch, out)
        try:
            yield answer
        finally:
            with suppress(ArgosyError):
                for _ in answer:  # read the rest of an interrupted answer
                    pass

    def _answer(
        self, connection: Connection, layer: int, dispatch: _native.Dispatch, out: Rows
    ) -> Iterator[Sequence[int]]:
        try:
            while (count := connection.count()) > 0:
                experts = connection.array((count,), np.int32).tolist()
                where = [at for expert in experts for at in dispatch.assignments(expert)]
                out[where] = connection.array((len(where), out.shape[1]), np.float32)
                yield experts
            if count < 0:
                kind, message, facts = json.loads(connection.receive(connection.count()))
                raise getattr(errors, kind)(message, **facts)
        except (OSError, EOFError) as error:
            raise self._dead(layer) from error

    def _dead(self, layer: int) -> RunnerFailed:
        self.close()
        return RunnerFailed(f"layer {layer}: the process that runs its experts does not answer", layer=layer)

    def wants_guess(self, *, is_sweep: bool) -> bool:
        return False

    def guess(self, layer: int, by_rank: Sequence[Sequence[int]], *, is_sweep: bool) -> None:
        raise AssertionError("no guess was wanted")

    def close(self) -> None:
        if self.connection is not None:
            self.connection.socket.close()
            self.connection = None
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def serve(connection: Connection, runner: Any, dies_in_run: int) -> None:
    """Answer requests until the other side is gone."""
    draw = random.Random(0)
    num_runs = 0
    while True:
        layer, tokens, k, num_experts, hidden = REQUEST.unpack(connection.receive(REQUEST.size))
        choices = connection.array((tokens, k), np.int32)
        is_decode = connection.array((tokens,), np.bool_)
        rows = connection.array((tokens, hidden), np.float32)
        dispatch = _native.Dispatch(choices, is_decode, num_experts)
        out = np.empty((tokens * k, hidden), np.float32)
        num_runs += 1
        try:
            with runner.run(layer, dispatch, rows, out) as groups:
                for group in groups:
                    shuffled = draw.sample(group, k=len(group))
                    for at in range(0, len(group), 2):
                        experts = shuffled[at : at + 2]
                        where = [
                            assignment for expert in experts for assignment in dispatch.assignments(expert)
                        ]
                        ids = np.array(experts, np.int32)
                        connection.send(COUNT.pack(len(experts)), ids.tobytes(), out[where].tobytes())
                        if num_runs == dies_in_run:
                            os._exit(1)
            connection.send(COUNT.pack(0))
        except ArgosyError as error:
            facts = {name: value for name, value in error.facts.items() if isinstance(value, (int, str))}
            message = json.dumps([type(error).__name__, error.message, facts]).encode()
            connection.send(COUNT.pack(-1), COUNT.pack(len(message)), message)


def run_experts(
    to: socket.socket, dies_in_run: int, directory: str, residency: Any, instruction_set: str
) -> None:
    """What the other process does."""
    from tests.model.open_parts import open_parts  # imported here because it can also open this runner

    with (
        to,
        open_parts(Path(directory), residency, instruction_set=instruction_set) as parts,
        suppress(EOFError, ConnectionError),
    ):
        serve(Connection(to), parts.experts, dies_in_run)
