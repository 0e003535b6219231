"""Experts in another process give the same bits, from rows and outputs alone; a process that dies is an error."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy import Engine, SamplingParams
from argosy.checkpoint.pack import pack
from argosy.errors import CorruptRecord, RunnerFailed
from argosy.model.clock import PartClock
from argosy.model.decoder import Decoder
from argosy.model.families import open_model
from tests.experts.process_runner import ProcessRunner
from tests.model.open_parts import Parts, Run, decode, make_steps, open_parts
from tests.models.tiny import RawConfig, prompt_ids, qwen3_moe, write_model

CONFIG: RawConfig = qwen3_moe(num_experts=12, num_experts_per_tok=4, max_position_embeddings=512)
PARAMS = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, logprobs=2)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("process"), CONFIG, seed=6)


def decoder_of(parts: Parts) -> Decoder:
    return Decoder(
        parts.config,
        parts.weights,
        parts.experts,
        parts.kv(),
        parts.runtime,
        40,
        clock=PartClock(),
    )


def test_a_layer_of_a_token_sends_one_row_and_receives_one_row_per_expert(directory: Path) -> None:
    with open_parts(directory, "another process") as parts:
        config, runner = parts.config, parts.experts
        assert isinstance(runner, ProcessRunner)
        decoder = decoder_of(parts)
        prompt, *tokens = make_steps(config, [[Run(0, 7)], [decode(0)], [decode(0)]])
        decoder.forward(prompt)
        connection = runner.connection
        assert connection is not None
        before = connection.sent_bytes + connection.received_bytes
        for step in tokens:
            decoder.forward(step)
        moved = connection.sent_bytes + connection.received_bytes - before
    k, layers = config.experts_per_token, len(config.moe_layers)
    per_layer = moved / (len(tokens) * layers)
    rows = 4 * config.hidden_size * (1 + k)
    assert rows < per_layer <= rows + 64 + 16 * k
    assert per_layer < sum(open_model(directory).experts[0, expert].nbytes for expert in range(k)) / 4


@pytest.fixture
def engine_with(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    """Make engines whose experts are in another process."""

    def make(model: Path = directory, residency: str = "smallest cache", **options: Any) -> Engine:
        def another_process(runtime: object, cache: Any) -> ProcessRunner:
            cache.close()
            return ProcessRunner(model, residency, num_experts=CONFIG["num_experts"], **options)

        monkeypatch.setattr("argosy.model.model.CachedRunner", another_process)
        return Engine.open(model, memory="2GiB", threads=1, expert_slots=4)

    return make


def visible(result: Any) -> tuple[Any, ...]:
    return result.token_ids, result.logprobs, result.finish_reason


def test_a_process_that_dies_in_the_middle_of_a_layer_changes_no_answer(
    directory: Path, engine_with: Callable[..., Engine]
) -> None:
    prompts = [prompt_ids(CONFIG, seed, 5 + 7 * seed) for seed in range(3)]
    with Engine.open(directory, memory="2GiB", threads=1) as engine:
        expected = [visible(result) for result in engine.generate_batch(prompts, PARAMS)]
    for dies_in_run in (1, 2, 8):
        with engine_with(dies_in_run=dies_in_run) as engine:
            assert [visible(result) for result in engine.generate_batch(prompts, PARAMS)] == expected
            runner = engine._started.model.experts
            assert isinstance(runner, ProcessRunner)
            assert runner.num_started == 2
            assert engine.facts().kv_blocks_held == 0
            runner.close()


def test_a_process_that_keeps_dying_ends_the_answer_with_an_error_without_hanging(
    engine_with: Callable[..., Engine],
) -> None:
    began = time.monotonic()
    with engine_with(dies_in_run=2, deaths=2) as engine:
        with pytest.raises(RunnerFailed, match="layer 1: the process that runs its experts does not answer"):
            engine.generate(prompt_ids(CONFIG, 1, 9), PARAMS)
        assert engine.facts().kv_blocks_held == 0
        assert len(engine.generate(prompt_ids(CONFIG, 1, 9), PARAMS).token_ids) == PARAMS.max_tokens
        assert engine._started.model.experts is not None
        engine._started.model.experts.close()
    assert time.monotonic() - began < 60


def test_a_damaged_expert_is_named_across_processes(
    directory: Path, tmp_path: Path, engine_with: Callable[..., Engine]
) -> None:
    pack(open_model(directory), tmp_path / "packed", format="bf16")
    records = open_model(tmp_path / "packed").experts
    data = np.memmap(tmp_path / "packed" / "experts.bin", np.uint8, "r+")
    for expert in range(CONFIG["num_experts"]):
        piece = records[1, expert].pieces[0]
        data[piece.offset + piece.nbytes // 2] ^= 1
    data.flush()
    with engine_with(tmp_path / "packed") as engine:
        with pytest.raises(CorruptRecord, match="layer 1, expert") as raised:
            engine.generate(prompt_ids(CONFIG, 1, 9), PARAMS)
        assert raised.value.facts["layer"] == 1
        assert raised.value.facts["expert"] in range(CONFIG["num_experts"])
        assert engine._started.model.experts is not None
        engine._started.model.experts.close()


def test_an_interrupted_run_leaves_the_next_one_intact(directory: Path) -> None:
    with open_parts(directory, "another process") as parts:
        decoder, runner = decoder_of(parts), parts.experts
        assert runner is not None
        (step,) = make_steps(parts.config, [[Run(0, 9)]])
        expected = decoder.forward(step)
        finish, stack = decoder._stack.finish_experts, decoder._stack

        class Interrupting:
            def __getattr__(self, name: str) -> Any:
                return getattr(stack, name)

            def finish_experts(self, experts: Any) -> None:
                finish(experts)
                raise KeyboardInterrupt

        decoder._stack = Interrupting()  # type: ignore[assignment]
        with pytest.raises(KeyboardInterrupt):
            decoder.forward(step)
        decoder._stack = stack
        np.testing.assert_array_equal(decoder.forward(step), expected)
