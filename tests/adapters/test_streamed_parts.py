"""Experts with the parts of adapters give equal bits at every number of slots, and drops give everything back."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from argosy import _native
from argosy.adapters import parts as module
from argosy.adapters.files import AdapterFiles
from argosy.adapters.loaded import load_adapter
from argosy.adapters.parts import ExpertParts, PartFile, load_parts
from argosy.checkpoint.files import ModelFiles
from argosy.errors import CheckpointError, DiskFull, ReadFailed, UnsupportedModel
from argosy.experts.cache import CachedRunner, ExpertCache
from argosy.experts.files import ExpertFiles
from argosy.experts.resident import load_resident
from argosy.machine.resources import Drive
from argosy.model.clock import PartClock
from argosy.model.decoder import Decoder
from argosy.model.families import open_model
from argosy.model.layers import describe_experts, kv_shapes
from argosy.model.weights import load_dense
from tests.adapters.random_adapter import random_adapter
from tests.model.open_parts import Run, decode, make_steps
from tests.models.tiny import gpt_oss, qwen3_moe, write_model
from tests.native import _native_testing

Logits = list[NDArray[np.float32]]
STEPS = [[Run(0, 7)], [Run(1, 9), Run(2, 3)], [decode(0), decode(1), decode(2)], [decode(0), decode(2)]]
NUMBER_OF_SEQUENCE = np.array([4, -1, 9], np.int32)  # adapters of the sequences
BLOCKS, BLOCK_TOKENS = 24, 16
IN_MEMORY = Drive("tmpfs", "tmpfs", "/tmp", None)


class Rig:
    """A tiny model whose experts are all in memory, or in a cache, and two adapters."""

    def __init__(self, files: ModelFiles, *, slots: int | None, store: _native.Store | None = None) -> None:
        self.files, self.config = files, files.own_config
        self.store = store or _native.Store(2)
        self.runtime = _native.Runtime(1)
        ids: dict[str, int] = {}
        open_file = lambda path: ids[path] if path in ids else ids.setdefault(path, self.store.open(path))  # noqa: E731
        self.weights = load_dense(self.store, files.dense, open_file=open_file, norm_offset=0.0)
        expert_files = ExpertFiles(self.store, files.experts, open_file=open_file)
        arithmetic = describe_experts(files.config, self.weights)
        self.cache: ExpertCache | None = None
        if slots is None:
            self.experts = load_resident(self.store, expert_files, self.runtime, arithmetic)
        else:
            self.cache = ExpertCache(
                expert_files,
                num_slots=slots,
                most=len(files.experts),
                experts_per_token=files.config.experts_per_token,
                arithmetic=arithmetic,
            )
            self.experts = CachedRunner(self.runtime, self.cache)  # type: ignore[assignment]
        self.part_file = PartFile(self.store)
        self.decoder = Decoder(
            files.config,
            self.weights,
            self.experts,
            _native.KvCache(kv_shapes(files.config), BLOCKS, BLOCK_TOKENS, "f32"),
            self.runtime,
            64,
            clock=PartClock(),
        )

    def parts(self, adapter: AdapterFiles) -> ExpertParts:
        found = load_parts(adapter, self.files, self.part_file, is_packed=self.cache is None)
        assert found is not None
        return found

    def set(self, number: int, adapter: AdapterFiles | None) -> None:
        stack = None if adapter is None else load_adapter(adapter, self.config, self.weights).stack
        self.decoder.set_adapter(number, stack)
        self.experts.set_adapter(number, None if adapter is None else self.parts(adapter))

    def set_both(self) -> None:
        for number in (4, 9):
            self.set(number, adapter_of(self.files, number))

    def run(self, between: Callable[[], None] = lambda: None) -> Logits:
        found = []
        for step in make_steps(self.files.config, STEPS):
            between()
            found.append(
                self.decoder.forward(step._replace(adapters=NUMBER_OF_SEQUENCE[step.sequence])).copy()
            )
        return found

    def run_base(self) -> Logits:
        return [self.decoder.forward(step).copy() for step in make_steps(self.files.config, STEPS)]

    def close(self) -> None:
        self.store.close()
        self.experts.close()


def adapter_of(files: ModelFiles, seed: int) -> AdapterFiles:
    return random_adapter(files.own_config, seed=seed, rank=2, targets={"experts", "q"})


@pytest.fixture(scope="module", params=[qwen3_moe, gpt_oss], ids=lambda make: make.__name__)
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return open_model(write_model(tmp_path_factory.mktemp("model"), request.param(), seed=0, dtype="F32"))


@contextmanager
def rig(files: ModelFiles, slots: int | None, store: _native.Store | None = None) -> Iterator[Rig]:
    made = Rig(files, slots=slots, store=store)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def expected(files: ModelFiles) -> Logits:
    with rig(files, None) as resident:
        base = resident.run_base()
        resident.set_both()
        found = resident.run()
    assert not np.array_equal(base[0], found[0])
    assert np.array_equal(base[1][-1], base[1][-1])
    return found


def same(found: Logits, expected: Logits) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


def test_logits_are_equal_at_every_number_of_slots(files: ModelFiles, expected: Logits) -> None:
    fewest, most = files.config.experts_per_token, len(files.experts)
    for slots in sorted({fewest, fewest + 1, most // 4, most // 2, most - 1, most}):
        with rig(files, slots) as cached:
            cached.set_both()
            assert same(cached.run(), expected), slots
            assert same(cached.run(), expected), slots  # with what is in memory now


def test_logits_stay_while_the_cache_changes_its_size(files: ModelFiles, expected: Logits) -> None:
    fewest, most = files.config.experts_per_token, len(files.experts)
    with rig(files, most // 2) as cached:
        assert cached.cache is not None
        cached.set_both()
        sizes = iter([fewest, most, most // 3, most - 1] * 3)
        for _ in range(3):
            assert same(cached.run(lambda: cached.cache.resize(next(sizes))), expected)  # type: ignore[union-attr]


def test_a_part_that_cannot_be_read_ends_the_step_and_the_next_one_is_right(
    files: ModelFiles, expected: Logits
) -> None:
    fewest = files.config.experts_per_token
    counting = _native_testing.FaultyFileSystem(1 << 40, "eio")
    with rig(files, fewest, _native.Store(1, counting)) as cached:
        cached.set_both()
        num_opening = counting.num_reads
    whose = set()
    for nth in range(1, 12):
        faults = _native_testing.FaultyFileSystem(num_opening + nth, "eio")
        with rig(files, fewest, _native.Store(1, faults)) as cached:
            cached.set_both()
            with pytest.raises(ReadFailed, match="layer 0") as raised:
                cached.run()
            assert {"layer", "expert"} <= set(raised.value.facts)
            whose.add("adapter" in raised.value.facts)
            assert same(cached.run(), expected)
    assert whose == {True, False}


def test_adapters_come_and_go_and_leave_nothing(files: ModelFiles, expected: Logits) -> None:
    with rig(files, len(files.experts) // 2) as cached:
        for _ in range(10):
            cached.set_both()
            assert same(cached.run(), expected)
            cached.set(4, None)
            cached.set(9, None)
            assert os.fstat(cached.part_file._descriptor).st_size == 0
        assert len(os.listdir("/proc/self/fd")) < 200


def test_a_full_drive_and_parts_that_do_not_fit_are_refused(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapter_of(files, 1)
    layer, part = next(iter(adapter.experts.items()))
    with rig(files, files.config.experts_per_token) as cached:
        with pytest.raises(UnsupportedModel, match="experts of layer 77"):
            cached.parts(replace(adapter, experts={77: part}))
        with pytest.raises(CheckpointError, match="are for"):
            cached.parts(replace(adapter, experts={layer: replace(part, width=part.width + 32)}))
        with pytest.raises(CheckpointError, match="has 3 bytes"):
            cached.parts(replace(adapter, read_expert=lambda layer, expert: b"abc"))
        monkeypatch.setattr(module, "free_disk_bytes", lambda path: 5)
        with pytest.raises(DiskFull, match="5 B are free"):
            cached.parts(adapter)
        monkeypatch.undo()
        cached.set_both()


def test_a_directory_in_memory_is_refused(
    files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "drive_of", lambda path: IN_MEMORY if "/var" not in str(path) else None)
    assert module._directory_on_a_drive() == Path("/var/tmp")
    monkeypatch.setattr(module, "drive_of", lambda path: IN_MEMORY)
    with pytest.raises(DiskFull, match="is in memory"):
        module._directory_on_a_drive()
