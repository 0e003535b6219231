"""A failed read is retried once; one that fails for good ends only the answers that need it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from argosy import Engine, SamplingParams, _native
from argosy.checkpoint.pack import pack
from argosy.engine import prompt_turns, scheduler, steps
from argosy.errors import ArgosyError, CorruptRecord, ReadFailed
from argosy.kept import kv_cache, kv_windows, recurrent_state
from argosy.model.families import open_model
from tests.models.runnable import runnable
from tests.models.tiny import RawConfig, gpt_oss, prompt_ids, qwen3_moe, write_model
from tests.models.tiny_delta import qwen3_next
from tests.native import _native_testing

PARAMS = SamplingParams(max_tokens=10, ignore_eos=True, logprobs=2)
CONFIGS: dict[str, RawConfig] = {
    "attention": qwen3_moe(num_experts=12, max_position_embeddings=512),
    "delta": qwen3_next(num_experts=12, max_position_embeddings=512),
}


@pytest.fixture(scope="module", params=list(CONFIGS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RawConfig]:
    root = tmp_path_factory.mktemp("recovery")
    config = CONFIGS[request.param]
    pack(open_model(write_model(root / "plain", config, seed=4)), root / "packed", format="bf16")
    return root / "packed", config


def open_engine(directory: Path, **options: Any) -> Engine:
    return Engine.open(
        directory, **{"memory": "2GiB", "threads": 1, "expert_slots": 4, "readers": 1} | options
    )


def prompts_of(config: RawConfig) -> list[list[int]]:
    return [prompt_ids(config, 1, 19), prompt_ids(config, 2, 5)]


def visible(result: Any) -> tuple[Any, ...]:
    return result.token_ids, result.logprobs, result.finish_reason


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> list[_native_testing.FaultyFileSystem]:
    """List file systems; the next engine opens with the last one."""
    file_systems: list[_native_testing.FaultyFileSystem] = []
    plain = _native.Store
    monkeypatch.setattr(_native, "Store", lambda readers, **rest: plain(readers, file_systems[-1], **rest))
    return file_systems


def num_reads(
    directory: Path, config: RawConfig, faults: list[_native_testing.FaultyFileSystem]
) -> tuple[int, int, Any]:
    """Count the reads of the start, and of the start and answers; return both, and the answers."""
    faults.append(_native_testing.FaultyFileSystem(1 << 40, "eio"))
    with open_engine(directory) as engine:
        started = faults[-1].num_reads
        results = [visible(result) for result in engine.generate_batch(prompts_of(config), PARAMS)]
    return started, faults[-1].num_reads, results


@pytest.mark.parametrize(
    ("kind", "every"),
    [
        ("eio", 23),
        ("truncated", 61),
        ("flip", 61),
        pytest.param("eio", 3, marks=pytest.mark.full),
        pytest.param("truncated", 29, marks=pytest.mark.full),
        pytest.param("flip", 29, marks=pytest.mark.full),
    ],
)
def test_any_read_may_fail_once_and_the_answers_are_the_same(
    model: tuple[Path, RawConfig], faults: list[_native_testing.FaultyFileSystem], kind: str, every: int
) -> None:
    directory, config = model
    first, last, expected = num_reads(directory, config, faults)
    assert last - first > 100
    for nth in range(first + 1, last + 1, every):
        faults.append(_native_testing.FaultyFileSystem(nth, kind))
        with open_engine(directory) as engine:
            results = engine.generate_batch(prompts_of(config), PARAMS)
            assert [visible(result) for result in results] == expected, f"read {nth}"
            assert engine.facts().kv_blocks_held == 0


def test_reads_that_keep_failing_end_answers_with_the_error_and_the_engine_continues(
    model: tuple[Path, RawConfig], faults: list[_native_testing.FaultyFileSystem]
) -> None:
    directory, config = model
    first, _, expected = num_reads(directory, config, faults)
    faults.append(_native_testing.FaultyFileSystem(first + 30, "eio", num_faults=200))
    with open_engine(directory) as engine:
        with pytest.raises(ReadFailed, match="layer"):
            engine.generate_batch(prompts_of(config), PARAMS)
        facts = engine.facts()
        assert (facts.num_running, facts.num_waiting, facts.kv_blocks_held, facts.states_held) == (0, 0, 0, 0)
        assert engine._started.store.pending() == 0
        while faults[-1].num_reads < first + 230:  # until the drive recovers
            with suppress(ArgosyError):
                engine.generate(prompts_of(config)[0], PARAMS)
        results = engine.generate_batch(prompts_of(config), PARAMS)
        assert [visible(result) for result in results] == expected


@pytest.mark.parametrize("chunk_tokens", [64, 2])  # 2: what starts again runs a step that succeeds first
def test_a_damaged_expert_ends_only_the_answers_that_need_it(
    model: tuple[Path, RawConfig], tmp_path: Path, chunk_tokens: int
) -> None:
    directory, config = model
    prompts = [prompt_ids(config, seed, 3) for seed in range(6)]
    uses: list[set[tuple[int, int]]] = []
    answers = []
    with open_engine(
        directory, observe_routes=lambda layer, ids: uses[-1].update((layer, int(e)) for e in ids.flat)
    ) as engine:
        for prompt in prompts:
            uses.append(set())
            answers.append(visible(engine.generate(prompt, PARAMS)))
    damaged, needing = next(
        (key, [i for i, used in enumerate(uses) if key in used])
        for key in sorted(set().union(*uses))
        if 0 < sum(key in used for used in uses) < 4
    )
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    piece = open_model(tmp_path).experts[damaged].pieces[0]
    data = np.memmap(tmp_path / "experts.bin", np.uint8, "r+")
    data[piece.offset + piece.nbytes // 2] ^= 1
    data.flush()

    with open_engine(tmp_path, chunk_tokens=chunk_tokens) as engine:
        sequences = [engine.submit(prompt, PARAMS) for prompt in prompts]
        for _ in range(500):
            engine.step()
        facts = engine.facts()
    assert (facts.kv_blocks_held, facts.states_held) == (0, 0)
    for at, (one, expected) in enumerate(zip(sequences, answers, strict=True)):
        assert one.result is not None
        if at in needing:
            assert one.result.finish_reason == "error"
            assert isinstance(one.result.error, CorruptRecord)
            assert (one.result.error.facts["layer"], one.result.error.facts["expert"]) == damaged
            assert one.result.token_ids == expected[0][: len(one.result.token_ids)]
        else:
            assert visible(one.result) == expected


# ── ^C ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

# Where blocks, window blocks and state slots change hands.
HANDS = {
    module.__file__ for module in (kv_cache, kv_windows, recurrent_state, prompt_turns, scheduler, steps)
}
Line = tuple[str, int]


def call_traced(call: Callable[[], object], at_line: Callable[[Line], None]) -> None:
    """Call with `at_line` before each line of `HANDS` that runs."""

    def note(frame: FrameType, event: str, _: object) -> Any:
        if event == "line":
            at_line((frame.f_code.co_filename, frame.f_lineno))
        return note

    sys.settrace(lambda frame, event, _: note if frame.f_code.co_filename in HANDS else None)
    try:
        call()
    finally:
        sys.settrace(None)


@pytest.mark.parametrize(
    "config", [qwen3_next(), gpt_oss(max_position_embeddings=1024)], ids=["delta", "windows"]
)
def test_an_interrupt_at_any_line_leaves_nothing_held_and_the_next_answers_the_same(
    config: RawConfig, tmp_path: Path
) -> None:
    directory = runnable(write_model(tmp_path / "model", config, seed=4), tmp_path)
    prompts = [prompt_ids(config, seed, 40) for seed in range(3)]
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    with Engine.open(directory, memory="2GiB", threads=1, max_sequences=2) as engine:
        assert (engine._started.cache.windows is None) == (engine._started.cache.states is not None)

        def answers() -> list[list[int]]:
            return [one.token_ids for one in engine.generate_batch(prompts, params)]

        expected = answers()
        lines: dict[Line, None] = {}
        call_traced(answers, lines.setdefault)
        assert len(lines) > 200
        for place in list(lines)[::4]:

            def interrupt(line: Line, place: Line = place) -> None:
                if line == place:
                    raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                call_traced(answers, interrupt)
            facts = engine.facts()
            assert (facts.kv_blocks_held, facts.num_running, facts.num_waiting) == (0, 0, 0), place
            assert facts.states_held == 0, place
            assert answers() == expected, place
