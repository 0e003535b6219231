"""The recurrent state of delta-net layers: its place in the plan, a slot for each running sequence, and snapshots."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from argosy import Engine, SamplingParams, _native
from argosy.budget.footprint import ModelFootprint, kv_bytes, state_bytes
from argosy.budget.planner import plan_memory
from argosy.config import GIB, MIB, Budget, EngineConfig, format_bytes
from argosy.engine.sequence import Sequence
from argosy.errors import DoesNotFit
from argosy.experts.cache import CachedRunner
from argosy.kept.recurrent_state import StateSlots
from argosy.model.families import FAMILIES, open_model
from argosy.model.layers import state_shapes
from tests.engine.scheduling import Rig
from tests.families import published_mamba
from tests.families.published import lfm2_moe as published
from tests.families.published import minimax_m1
from tests.families.published_sparse import DEEPSEEK_V4_FLASH
from tests.models.tiny import RawConfig, prompt_ids, qwen3_moe, write_model
from tests.models.tiny_deepseek_v4 import deepseek_v4
from tests.models.tiny_delta import qwen3_5_moe_text, qwen3_next
from tests.models.tiny_kda import bailing_hybrid, kimi_linear
from tests.models.tiny_mamba import nemotron_h
from tests.models.tiny_minimax import minimax
from tests.models.tiny_recurrent import lfm2_moe

SMALL = _native.StateShape.delta_net((1, 1, 4, 4, 2))
GREEDY = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True, logprobs=2)
CONFIG = qwen3_next(max_position_embeddings=512)
PROMPT = prompt_ids(CONFIG, 1, 29)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("delta"), CONFIG, seed=1)


@pytest.fixture
def engine(model: Path) -> Iterator[Engine]:
    """Open an engine without prefix reuse: these tests choose where to resume."""
    with Engine.open(model, memory="4GiB", threads=1, chunk_tokens=8) as engine:
        engine._started.cache._is_on = False
        yield engine


def states_of(engine: Engine) -> StateSlots:
    assert engine._started.cache.states is not None
    return engine._started.cache.states


def step_until(engine: Engine, one: Sequence, num_computed: int) -> None:
    while one.num_computed < num_computed:
        engine.step()


# ── snapshots ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("at", [8, 16, 31], ids=["first chunk", "second chunk", "decode"])
def test_a_restored_snapshot_resumes_with_the_same_bits(engine: Engine, at: int) -> None:
    """Roll back to an earlier position: later keys and values are rewritten, and the state is restored."""
    one = engine.submit(PROMPT, GREEDY)
    step_until(engine, one, at)
    slot, num_new = one.state_slot, len(one.new_ids)
    assert slot is not None
    states_of(engine).snapshot(slot, b"here")
    assert states_of(engine).state.position(states_of(engine).slot_of(b"here")) == one.num_computed == at
    first = []
    for _ in range(3):
        first += [(event.token_id, event.logprob) for event in engine.step()]

    states_of(engine).restore(b"here", slot)
    one.num_computed = at
    del one.new_ids[num_new:]
    again = []
    for _ in range(3):
        again += [(event.token_id, event.logprob) for event in engine.step()]
    assert first
    assert again == first


def test_a_sequence_cannot_roll_back_without_its_snapshot(engine: Engine) -> None:
    one = engine.submit(PROMPT, GREEDY)
    step_until(engine, one, 16)
    one.num_computed = 8
    with pytest.raises(
        ValueError, match="token 0 is at position 8, but the recurrent state in slot 0 is at 16"
    ):
        engine.step()


def test_snapshots_are_bounded_and_the_least_recently_used_is_evicted() -> None:
    states = StateSlots(_native.RecurrentState(5, [SMALL]), 2)
    slot = states.take()
    for key in (b"a", b"b", b"c"):
        states.snapshot(slot, key)
    states.restore(b"a", slot)
    states.snapshot(slot, b"d")
    assert [states.has_snapshot(key) for key in (b"a", b"b", b"c", b"d")] == [True, False, True, True]
    states.forget(b"c")
    states.forget(b"never there")
    states.snapshot(slot, b"a")
    states.snapshot(slot, b"e")
    assert states.num_snapshots == states.most_snapshots == 3
    assert states.num_free == 1


@pytest.mark.parametrize("num_tokens", [301, pytest.param(4096, marks=pytest.mark.full)])
def test_a_prompt_in_chunks_of_any_size_has_the_same_bits(num_tokens: int, tmp_path: Path) -> None:
    """Of every token's logits, and of what follows; a chunk of 1 is a prompt token by token."""
    config = nemotron_h(max_position_embeddings=8192)
    model, prompt = write_model(tmp_path, config, seed=1), prompt_ids(config, 1, num_tokens)
    found = []
    for chunk in (num_tokens, 256, 7, 1):
        with Engine.open(model, memory="4GiB", threads=2, chunk_tokens=chunk) as engine:
            answer = engine.generate(prompt, GREEDY)
            found.append((engine.logits(prompt).tobytes(), answer.token_ids, answer.logprobs))
    assert all(one == found[0] for one in found)


# ── slots ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_more_sequences_than_slots_take_turns_and_answer_the_same(model: Path) -> None:
    prompts = [prompt_ids(CONFIG, seed, 3 + 5 * seed) for seed in range(5)]
    with Engine.open(model, memory="4GiB", threads=1) as engine:
        expected = [engine.generate(prompt, GREEDY) for prompt in prompts]
    with Engine.open(model, memory="4GiB", threads=2, max_sequences=2, chunk_tokens=4) as engine:
        assert engine.plan.num_states == 2
        found = engine.generate_batch(prompts, GREEDY)
        assert states_of(engine).num_free == 2
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.token_ids, ours.logprobs) == (theirs.token_ids, theirs.logprobs)


def test_a_cancelled_sequence_gives_its_slot_back_and_leaves_no_trace(engine: Engine) -> None:
    expected = engine.generate(PROMPT, GREEDY)
    one = engine.submit(prompt_ids(CONFIG, 9, 40), GREEDY)
    engine.step()
    taken = one.state_slot
    engine.cancel(one)
    assert one.state_slot is None
    two = engine.submit(PROMPT, GREEDY)
    engine.step()
    assert two.state_slot == taken
    while two.result is None:
        engine.step()
    assert (two.result.token_ids, two.result.logprobs) == (expected.token_ids, expected.logprobs)


def test_a_step_that_fails_midway_leaves_an_invalid_slot(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine.open(model, memory="4GiB", threads=1, expert_slots=2) as engine:
        expected = engine.generate(PROMPT, GREEDY)
        one = engine.submit(PROMPT, GREEDY)
        step_until(engine, one, len(PROMPT))
        slot = one.state_slot
        assert slot is not None
        states = states_of(engine)
        with monkeypatch.context() as patch:
            patch.setattr(CachedRunner, "elsewhere", None)
            patch.setattr(engine._started.model.experts, "run", interrupted)
            with pytest.raises(InterruptedError):
                engine.step()
        assert states.state.position(slot) == -1
        assert states.num_free == engine.plan.num_states
        with pytest.raises(ValueError, match="slot 0 is invalid: a step failed midway"):
            states.snapshot(slot, b"here")
        assert engine.generate(PROMPT, GREEDY).token_ids == expected.token_ids


def interrupted(*_: object) -> None:
    raise InterruptedError


def test_a_sequence_waits_for_a_slot_and_not_only_for_blocks() -> None:
    states = StateSlots(_native.RecurrentState(1, [SMALL]))
    rig = Rig(states=states)
    scheduler, first, second = rig.scheduler, rig.sequence(3), rig.sequence(3, first_id=50)
    scheduler.add(first)
    scheduler.add(second)
    step = scheduler.next_step().step
    assert step.state_slots is not None
    assert step.state_slots.tolist() == [0]
    assert second.state_slot is None
    scheduler.remove(first)
    assert scheduler.next_step().step.num_tokens == 3
    assert second.state_slot == 0


# ── memory ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_plan_has_a_line_for_states_and_counts_keys_and_values_only_for_attention(model: Path) -> None:
    files = open_model(model)
    config = EngineConfig(budget=Budget(ram_bytes=4 * GIB), threads=1, max_sequences=3)
    plan = plan_memory(ModelFootprint(files, config), config, process_bytes=0)
    assert plan.num_states == 3
    assert plan.state_bytes == _native.recurrent_state_bytes(3, state_shapes(files.config))
    assert ("recurrent state", plan.state_bytes, "3 sequences at once") in plan.lines()
    assert ("state snapshots", 2 * plan.state_bytes, "6 prompt prefixes") in plan.lines()
    assert plan.as_dict()["snapshot_bytes"] == plan.snapshot_bytes == 2 * plan.state_bytes
    assert plan.as_dict()["recurrent_state_bytes"] == plan.state_bytes
    one_layer = _native.kv_cache_bytes([_native.KvShape.keys_values(2, 16)], 512 // 16, 16, "f32")
    assert plan.kv_bytes == one_layer


def test_a_small_budget_has_fewer_states_and_a_refusal_counts_one(tmp_path: Path) -> None:
    sizes = {"linear_num_key_heads": 16, "linear_num_value_heads": 32}
    sizes |= {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
    files = open_model(write_model(tmp_path, qwen3_5_moe_text(**sizes, num_hidden_layers=2), seed=1))

    def plan(ram_bytes: int) -> tuple[int, int]:
        config = EngineConfig(budget=Budget(ram_bytes=ram_bytes), threads=1)
        found = plan_memory(ModelFootprint(files, config), config, process_bytes=0)
        assert found.total_bytes <= ram_bytes
        return found.num_states, found.state_bytes

    one = _native.recurrent_state_bytes(1, [_native.StateShape.delta_net((16, 32, 128, 128, 4))])
    assert plan(4 * GIB) == (8, 8 * one)
    assert plan(64 * one) == (4, 4 * one)
    with pytest.raises(DoesNotFit) as caught:
        plan(8 * MIB)
    assert f"+  recurrent state {format_bytes(one)}  +" in str(caught.value)
    assert plan(caught.value.facts["needed_bytes"])[0] == 1


def test_a_convolution_s_state_is_its_last_inputs(tmp_path: Path) -> None:
    files = open_model(write_model(tmp_path, lfm2_moe(), seed=1))
    config = EngineConfig(budget=Budget(ram_bytes=4 * GIB), threads=1, max_sequences=3)
    plan = plan_memory(ModelFootprint(files, config), config, process_bytes=0)
    assert plan.state_bytes == 3 * 2 * (3 - 1) * 28 * 4  # sequences, layers, positions, channels, bytes
    everywhere = FAMILIES["lfm2_moe"].parse_config(published((2, 6, 10, 14, 18, 21), 24, 32, 1792))
    assert state_bytes(everywhere, 1) == 18 * 2 * 2048 * 4


def test_a_mamba_mixer_s_state_is_a_matrix_per_head_and_its_last_inputs(tmp_path: Path) -> None:
    """Layers without a mixer keep nothing."""
    directory = write_model(tmp_path, nemotron_h(), seed=1)
    config = EngineConfig(budget=Budget(ram_bytes=4 * GIB), threads=1, max_sequences=3)
    plan = plan_memory(ModelFootprint(open_model(directory), config), config, process_bytes=0)
    floats = 6 * 6 * 12 + (4 - 1) * (6 * 6 + 2 * 2 * 12)  # heads, dimensions, state; positions, channels
    assert plan.state_bytes == pytest.approx(3 * 2 * floats * 4, rel=0.01)
    with Engine.open(directory, memory="4GiB", threads=1, max_sequences=3) as engine:
        state = engine._started.model.recurrent
        assert state is not None
        assert state.nbytes / state.num_slots == pytest.approx(plan.state_bytes / 3, rel=0.01)
    nano = FAMILIES["nemotron_h"].parse_config(published_mamba.nemotron_h())
    floats = 64 * 64 * 128 + 3 * (64 * 64 + 2 * 8 * 128)
    assert state_bytes(nano, 1) == pytest.approx(23 * floats * 4, rel=0.01)
    assert kv_bytes(nano, 1024, "f16") == pytest.approx(6 * 2 * 2 * 128 * 2 * 1024, rel=0.01)


@pytest.mark.parametrize(
    ("config", "heads", "dim"), [(kimi_linear(), 3, 10), (bailing_hybrid(), 3, 10)], ids=["kimi", "ling"]
)
def test_the_state_of_kimi_delta_attention_is_a_matrix_per_head_and_the_last_inputs(
    config: RawConfig, heads: int, dim: int, tmp_path: Path
) -> None:
    """Inputs of the convolutions of q, k and v, all of whose heads have the same dimensions."""
    directory = write_model(tmp_path, config, seed=1)
    budget = EngineConfig(budget=Budget(ram_bytes=4 * GIB), threads=1, max_sequences=3)
    plan = plan_memory(ModelFootprint(open_model(directory), budget), budget, process_bytes=0)
    floats = heads * dim * dim + (4 - 1) * 3 * heads * dim
    assert plan.state_bytes == pytest.approx(3 * 2 * floats * 4, rel=0.01)
    with Engine.open(directory, memory="4GiB", threads=1, max_sequences=3) as engine:
        state = engine._started.model.recurrent
        assert state is not None
        assert state.nbytes / state.num_slots == pytest.approx(plan.state_bytes / 3, rel=0.01)


def test_the_state_of_lightning_attention_is_a_matrix_for_each_head(tmp_path: Path) -> None:
    files = open_model(write_model(tmp_path, minimax(), seed=1))
    config = EngineConfig(budget=Budget(ram_bytes=4 * GIB), threads=1, max_sequences=3)
    plan = plan_memory(ModelFootprint(files, config), config, process_bytes=0)
    assert (
        plan.state_bytes == 3 * 2 * 4 * 6 * 6 * 4
    )  # sequences, layers, heads, key and value dimensions, bytes
    everywhere = FAMILIES["minimax"].parse_config(minimax_m1())
    assert state_bytes(everywhere, 1) == 70 * 64 * 128 * 128 * 4
    with Engine.open(tmp_path, memory="4GiB", threads=1, max_sequences=3) as engine:
        states = engine._started.cache.states
        assert states is not None
        assert engine.plan.state_bytes == plan.state_bytes
        planned = engine.plan.state_bytes + engine.plan.snapshot_bytes
        assert abs(states.state.nbytes - planned) <= planned / 100


def test_the_state_of_a_pool_is_three_sums_for_each_dimension(tmp_path: Path) -> None:
    """Largest score, weights and weighted vectors, of two groups if an entry joins both; and where a group began."""
    files = open_model(write_model(tmp_path, deepseek_v4(), seed=1))
    config = EngineConfig(budget=Budget(ram_bytes=4 * GIB), threads=1, max_sequences=3)
    plan = plan_memory(ModelFootprint(files, config), config, process_bytes=0)
    assert plan.state_bytes == 3 * 4 * (2 * (6 * (20 + 12) + 2 * 3) + 3 * 20 + 3)
    flash = FAMILIES["deepseek_v4"].parse_config(DEEPSEEK_V4_FLASH)
    assert state_bytes(flash, 1) == 4 * (21 * (6 * (512 + 128) + 2 * 3) + 20 * (3 * 512 + 3))
    with Engine.open(tmp_path, memory="4GiB", threads=1, max_sequences=3) as engine:
        states = states_of(engine)
        assert engine.plan.state_bytes == plan.state_bytes
        planned = engine.plan.state_bytes + engine.plan.snapshot_bytes
        assert abs(states.state.nbytes - planned) <= planned / 100


def test_a_model_without_delta_nets_has_no_states(tmp_path: Path) -> None:
    with Engine.open(write_model(tmp_path, qwen3_moe(), seed=1), memory="4GiB", threads=1) as engine:
        assert engine._started.cache.states is None
        assert engine.plan.state_bytes == engine.plan.num_states == 0
        assert "recurrent state" not in [what for what, _, _ in engine.plan.lines()]


def test_a_step_must_name_its_state_slots(engine: Engine) -> None:
    engine.submit(PROMPT, GREEDY)
    step = engine._scheduler.next_step().step
    logits = np.empty((len(step.wanted), engine.config.vocab_size), np.float32)
    arguments = (
        step.token_ids, step.sequence, step.slots, step.is_decode, step.block_table, step.order,
        step.wanted, logits,
    )  # fmt: skip
    stack = engine._started.model.decoder._stack
    with pytest.raises(ValueError, match="the step needs state_slots"):
        stack.begin(*arguments)
    with pytest.raises(ValueError, match=r"state_slots\[0\] is 24, expected 0 to 23"):
        stack.begin(*arguments, np.array([24], np.int32))
    stack.begin(*arguments, step.state_slots)
