"""The adapters of one engine: names for requests, and numbers for steps.

    load: files -> memory -> number, between two steps        use: name, prompt -> AdapterUse, for a sequence
    drop: the name goes at once; the memory and the number go when the last request that uses them has ended

An activated adapter (aLoRA, arXiv:2504.12397) changes tokens from the first token of the last appearance of its
invocation tokens in the prompt on, as in PEFT (`calculate_alora_offsets`). llama-server begins a token earlier, and
overlooks an appearance that its own last tokens follow. Positions before it are the base's, and so are their keys and
values, which other requests reuse. A prompt without these tokens is answered by the base.

Elsewhere: `reading.py` reads files; `loaded.py` brings them into memory; `kept/chain.py` names blocks, with
`AdapterUse.mark` among their content.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from argosy import _native
from argosy.adapters.files import AdapterFiles
from argosy.adapters.loaded import load_adapter
from argosy.adapters.needs import adapter_needs, total_needs
from argosy.adapters.parts import PartFile, load_parts
from argosy.adapters.reading import open_adapter
from argosy.adapters.wanted import MOST_ADAPTERS, require_factor, require_name
from argosy.checkpoint.files import ModelFiles
from argosy.config import AdapterNeeds
from argosy.config.engine import ExpertColumns
from argosy.errors import UsageError
from argosy.model.model import LoadedAdapter, Model


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterUse:
    """An adapter as one sequence uses it.

    number: in `Step.adapters`.   first: the first position whose token it changes.
    identity: 32 bytes that differ if any key or value may differ.
    """

    name: str
    number: int
    first: int
    identity: bytes

    def numbers(self, order: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return the number for each of these positions, -1 before `first`."""
        return np.where(order < self.first, np.int32(-1), np.int32(self.number)).astype(np.int32)

    def mark(self, start: int, count: int) -> bytes:
        """What the adapter adds to the content of a block of these positions: nothing before `first`."""
        if start + count <= self.first:
            return b""
        return b"adapter" + self.identity + max(0, self.first - start).to_bytes(8, "little")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFacts:
    """An adapter for people and clients.

    rank: the largest of its pairs.   nbytes: its memory.   num_requests: sequences that run or wait with it.
    is_activated: it changes only the tokens from its invocation on.
    """

    name: str
    path: Path
    factor: float
    kind: str
    rank: int
    nbytes: int
    sha256: str
    is_activated: bool
    notes: tuple[str, ...]
    num_requests: int


class Room(Protocol):
    """Gives adapters memory, and takes it back (`engine/resizing.py`)."""

    def make_room(self, needs: AdapterNeeds) -> None: ...

    def give_back(self, needs: AdapterNeeds) -> None: ...


class Started(Protocol):
    """What an engine has started (`engine/start.py`)."""

    model: Model
    store: _native.Store

    @property
    def lock(self) -> Lock: ...

    def require_open(self) -> None: ...


class Lock(Protocol):
    """Held for each step, and for each call between two steps."""

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class HasAdapter(Protocol):
    """A sequence of an engine."""

    adapter: AdapterUse | None


@dataclass(slots=True, eq=False)
class _Adapter:
    """`number` is -1 if it changes nothing."""

    name: str
    path: Path
    factor: float
    number: int
    nbytes: int
    kind: str
    rank: int
    digest: bytes
    invocation_tokens: tuple[int, ...]
    needs: AdapterNeeds
    notes: tuple[str, ...] = ()
    identity: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.identity = blake3(self.digest + repr(float(self.factor)).encode()).digest()


class Adapters:
    """The adapters of one engine. Safe from any thread.

    Args:
        files: the base model's.
        sequences: those of the engine, which changes the list with its lock.
    """

    def __init__(
        self, started: Started, files: ModelFiles, sequences: Sequence[HasAdapter], room: Room
    ) -> None:
        self._room, self._part_file = room, PartFile(started.store)
        self._started, self._files, self._sequences = started, files, sequences
        self._reading = (
            threading.Lock()
        )  # one at a time: what is read counts in memory only when it has a number
        self._named: dict[str, _Adapter] = {}  # replaced, never changed: other threads read it
        self._leaving: list[_Adapter] = []  # dropped, and still used by requests

    def load(
        self,
        name: str,
        path: str | Path,
        factor: float = 1.0,
        columns: ExpertColumns = "expert_fastest",
        *,
        replaces: bool = False,
        is_planned: bool = False,
    ) -> AdapterFacts:
        """Read an adapter and give it a name, while requests go on; steps wait only while it gets its number.

        Args:
            columns: see `open_adapter`.
            replaces: an adapter of this name leaves when its requests have ended; both take memory until then.
            is_planned: the plan has counted it already.

        Raises:
            DoesNotFit: there is no memory for it.   DiskFull: nor room for its experts' pairs on the drive.
            UsageError: the name or the factor is invalid, the name is taken, or there are too many adapters.
            CheckpointError, UnsupportedModel: `open_adapter` refuses the files.
        """
        require_name(name)
        require_factor(factor)
        with self._reading:
            self._require_room(name, replaces=replaces)
            files = open_adapter(path, self._files, columns=columns)
            needs = adapter_needs(files, self._files) if factor else AdapterNeeds()
            if not is_planned and factor:
                self._room.make_room(needs.joined(self._needs()))
            loaded: LoadedAdapter | None = None
            try:
                loaded = self._loaded(name, files, factor)
                with self._started.lock:
                    self._started.require_open()
                    self.settle()
                    self._require_room(name, replaces=replaces)
                    made = _Adapter(
                        name=name,
                        path=files.path,
                        factor=factor,
                        number=-1 if loaded is None else self._free_number(),
                        nbytes=0 if loaded is None else loaded.nbytes,
                        kind=files.kind,
                        rank=_rank(files),
                        digest=files.digest,
                        invocation_tokens=files.invocation_tokens,
                        notes=files.notes,
                        needs=needs,
                    )
                    if loaded is not None:
                        self._started.model.set_adapter(made.number, loaded)
                    replaced = self._named.get(name)
                    self._named = {**self._named, name: made}
                    self._leave(replaced)
            except BaseException:
                self._undo(loaded, gives_back=not is_planned)
                raise
        return self._facts(made)

    def _undo(self, loaded: LoadedAdapter | None, *, gives_back: bool) -> None:
        """Free what an adapter took that did not get a number."""
        if loaded is not None and loaded.experts is not None:
            loaded.experts.close()
        if gives_back:
            with self._started.lock, suppress(UsageError):  # a closed engine has freed everything
                self._started.require_open()
                self._room.give_back(self._needs())

    def drop(self, name: str) -> None:
        """Take an adapter's name away. Requests that have begun with it end with it.

        Raises:
            UsageError: there is no such adapter.
        """
        with self._started.lock:
            self._started.require_open()
            dropped = self._find(name)
            self._named = {key: one for key, one in self._named.items() if one is not dropped}
            self._leave(dropped)

    def _leave(self, one: _Adapter | None) -> None:
        if one is not None and one.number >= 0:
            self._leaving.append(one)
        self.settle()

    def settle(self) -> None:
        """Free the adapters that were dropped and that no sequence uses any more. Call it with the lock, between two
        steps.
        """
        if not self._leaving:
            return
        used = {one.adapter.number for one in self._sequences if one.adapter is not None}
        for one in [one for one in self._leaving if one.number not in used]:
            with suppress(ValueError):  # a step that failed still has it, until the next one begins
                self._started.model.set_adapter(one.number, None)
                self._leaving.remove(one)
                self._room.give_back(self._needs())

    def _needs(self) -> AdapterNeeds:
        return total_needs(one.needs for one in (*self._named.values(), *self._leaving))

    def use(self, name: str, prompt_ids: Sequence[int]) -> AdapterUse | None:
        """Return how a prompt uses an adapter; None if the adapter changes nothing.

        Raises:
            UsageError: there is no such adapter.
        """
        found = self._find(name)
        first = last_appearance(found.invocation_tokens, prompt_ids)
        if found.number < 0 or first is None:
            return None
        return AdapterUse(name=name, number=found.number, first=first, identity=found.identity)

    def require(self, use: AdapterUse) -> None:
        """Check again what `use` returned, when its sequence gets into the engine: with the lock.

        Raises:
            UsageError: the adapter was dropped meanwhile.
        """
        found = self._find(use.name)
        if (found.number, found.identity) != (use.number, use.identity):
            raise UsageError(
                f"the adapter {use.name} was replaced while the request was prepared", hint="try again"
            )

    def facts(self) -> tuple[AdapterFacts, ...]:
        """All adapters that have a name, in the order of loading."""
        return tuple(map(self._facts, self._named.values()))

    def _facts(self, one: _Adapter) -> AdapterFacts:
        uses = [sequence.adapter for sequence in list(self._sequences)]
        return AdapterFacts(
            name=one.name,
            path=one.path,
            factor=one.factor,
            kind=one.kind,
            rank=one.rank,
            nbytes=one.nbytes,
            sha256=one.digest.hex(),
            is_activated=bool(one.invocation_tokens),
            notes=one.notes,
            num_requests=sum(use is not None and use.number == one.number for use in uses),
        )

    def _find(self, name: str) -> _Adapter:
        named = self._named
        if (found := named.get(name)) is None:
            raise UsageError(f"unknown adapter {name[:80]!a}; this model has: {', '.join(named) or 'none'}")
        return found

    def _require_room(self, name: str, *, replaces: bool) -> None:
        if name in self._named and not replaces:
            raise UsageError(
                f"there is already an adapter {name}", hint="drop it first, or choose another name"
            )
        if len(self._named) + len(self._leaving) >= MOST_ADAPTERS:
            raise UsageError(
                f"there are {MOST_ADAPTERS} adapters, and an engine has no more", hint="drop one first"
            )

    def _free_number(self) -> int:
        taken = {one.number for one in (*self._named.values(), *self._leaving)}
        return next(number for number in range(MOST_ADAPTERS) if number not in taken)

    def _loaded(self, name: str, files: AdapterFiles, factor: float) -> LoadedAdapter | None:
        if factor == 0:
            return None
        model = self._started.model
        dense = load_adapter(files, self._files.own_config, model.weights, factor=factor)
        parts = load_parts(
            files, self._files, self._part_file, name=name, factor=factor, is_packed=model.is_packed
        )
        return replace(dense, experts=parts)


def last_appearance(tokens: Sequence[int], prompt_ids: Sequence[int]) -> int | None:
    """Return where `tokens` begin in the prompt for the last time: 0 if there are none, None if they never do."""
    count, wanted = len(tokens), list(tokens)
    if not count:
        return 0
    for start in range(len(prompt_ids) - count, -1, -1):
        if prompt_ids[start] == wanted[0] and list(prompt_ids[start : start + count]) == wanted:
            return start
    return None


def _rank(files: AdapterFiles) -> int:
    ranks: Iterable[int] = (
        *(pair.rank for pairs in files.dense.values() for pair in pairs),
        *(rank for part in files.experts.values() for rank in part.ranks),
        *(() if files.embedding is None else (len(files.embedding.up),)),
    )
    return max(ranks, default=0)
