"""Buffers of prompts and KV blocks that hold nothing are lent to experts, and taken back before a step uses them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy import Engine, SamplingParams, _native
from argosy.budget.expert_memory import ExpertMemory
from argosy.budget.footprint import KvLayout, ModelFootprint, kv_blocks
from argosy.budget.idle_memory import IdleMemory
from argosy.budget.memory_plan import MemoryPlan
from argosy.budget.planner import plan_memory
from argosy.config import KV_BLOCK_TOKENS, MIB, Budget, EngineConfig, ExpertSlots
from argosy.engine import start
from argosy.engine.turns import Turns
from argosy.errors import DoesNotFit, PromptTooLong, UsageError
from argosy.experts.cache import CachedRunner
from argosy.kept.kv_cache import BlockContent, KvBlocks
from argosy.machine.resources import process_footprint
from argosy.model.families import open_model
from argosy.model.layers import kv_shapes
from tests.budget.conftest import CONTEXT

# ── with a cache that only counts ───────────────────────────────────────────────────────────────────────────────────

NUM_BLOCKS, SLOT_BYTES, BUFFER_BYTES = 1024, 1 * MIB, 64 * 1024  # buffers: for each token
STEP_TOKENS, DECODE_TOKENS = 512, 8
SLOTS = ExpertSlots(own=10, idle=990, num_experts=1000, slot_bytes=SLOT_BYTES)
SHAPES = [_native.KvShape.keys_values(4, 128)]  # keys and values of a block take 32 KiB each


class Lender:
    """Idle memory, and a cache and a decoder that note what they are told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []
        self.experts = ExpertMemory(self, SLOTS, lock=Turns())  # type: ignore[arg-type]
        self.kv = _native.KvCache(SHAPES, NUM_BLOCKS, 16, "f32")
        self.blocks = KvBlocks(NUM_BLOCKS, 16)
        self.memory = IdleMemory(
            self.experts,
            self.kv,
            self.blocks,
            Buffers(self.told),  # type: ignore[arg-type]
            buffer_bytes=lambda tokens: tokens * BUFFER_BYTES,
            step_tokens=STEP_TOKENS,
            decode_tokens=DECODE_TOKENS,
        )

    def resize(self, num_slots: int, *, held: int | None = None) -> None:
        assert held == num_slots  # steps take it at once
        self.told.append(("slots", num_slots))

    def decode(self, num_steps: int = 1) -> None:
        for _ in range(num_steps):
            self.memory.before_step(2, has_prompts=False)


class Buffers:
    def __init__(self, told: list[tuple[str, int]]) -> None:
        self._told = told

    def resize(self, max_tokens: int) -> None:
        self._told.append(("tokens", max_tokens))


def test_blocks_are_lent_until_they_are_used_and_again_when_nothing_holds_them() -> None:
    lender = Lender()
    assert lender.kv.nbytes == 64 * MIB
    assert lender.told == [("slots", 10 + 64)]
    held = lender.blocks.take(1)
    assert lender.told[1:] == [("slots", 10 + 60)]  # 32 blocks are 1 MiB of keys, and huge pages change hands
    held += lender.blocks.take(31)
    assert len(lender.told) == 2
    held += lender.blocks.take(100)
    assert lender.told[2:] == [("slots", 10 + 64 - 12)]
    lender.blocks.give_back(held)
    assert len(lender.told) == 3
    lender.decode(8)
    assert lender.told[3:] == [("tokens", 8), ("slots", 10 + 52 + 31), ("slots", 10 + 64 + 31)]


def test_prefixes_that_are_kept_keep_their_memory() -> None:
    lender = Lender()
    held = lender.blocks.take(64)
    lender.blocks.keep(held[40], BlockContent(b"1", b"0", bytes(64), ""))
    lender.blocks.give_back(held)
    lender.decode(8)
    assert lender.experts.num_slots == 10 + 64 - 4 + 31
    lender.blocks.forget("")
    lender.memory.before_step(2, has_prompts=True)
    lender.decode(8)
    assert lender.experts.num_slots == 10 + 64 + 31


def test_buffers_are_lent_after_steps_without_prompts_and_a_prompt_takes_what_it_needs() -> None:
    lender = Lender()
    lender.memory.before_step(512, has_prompts=True)
    lender.decode(7)
    lender.memory.before_step(30, has_prompts=True)
    lender.decode(7)
    assert lender.told[1:] == []  # prompts come too often
    lender.decode(1)
    assert lender.told[1:] == [
        ("tokens", 8),
        ("slots", 10 + 64 + 31),
    ]  # first the pages go, then experts come
    lender.decode(20)
    lender.memory.before_step(20, has_prompts=True)
    assert lender.told[3:] == [("slots", 10 + 64 + 30), ("tokens", 32)]  # experts go, then the buffers grow
    lender.memory.before_step(33, has_prompts=True)
    lender.memory.before_step(512, has_prompts=True)
    assert lender.told[5:] == [("slots", 102), ("tokens", 64), ("slots", 74), ("tokens", 512)]
    lender.decode(8)
    assert lender.experts.num_slots == 10 + 64 + 31


def test_the_memory_of_blocks_is_with_the_system_while_it_is_lent() -> None:
    kv = _native.KvCache(SHAPES, NUM_BLOCKS, 16, "f32")
    block = np.arange(kv.block_bytes, dtype=np.uint8)
    before = process_footprint().resident_bytes
    for number in range(NUM_BLOCKS):
        kv.copy_in(number, block)
    assert process_footprint().resident_bytes - before > 60 * MIB
    assert [kv.held_bytes(count) for count in (0, 1, 64, 65, NUM_BLOCKS)] == [
        0, 4 * MIB, 4 * MIB, 8 * MIB, 64 * MIB,
    ]  # fmt: skip
    kv.release(65)
    assert process_footprint().resident_bytes - before < 12 * MIB
    out = np.empty_like(block)
    for number in range(65):
        kv.copy_out(number, out)
        assert np.array_equal(out, block)
    kv.copy_out(NUM_BLOCKS - 1, out)
    assert not out.any()
    for wrong in (-1, NUM_BLOCKS + 1):
        with pytest.raises(ValueError, match="num_blocks"):
            kv.release(wrong)
        with pytest.raises(ValueError, match="num_blocks"):
            kv.held_bytes(wrong)


# ── whole engines ───────────────────────────────────────────────────────────────────────────────────────────────────

GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
PROMPTS = [list(range(3, 103)), [5, 9, 12], [7] * 40]
HELD, MISSING = 50 * MIB, 80


OPTIONS: dict[str, Any] = {"threads": 1, "context": CONTEXT, "chunk_tokens": 256, "max_sequences": 4}


def planned(model: Path, budget_bytes: int) -> MemoryPlan:
    config = EngineConfig(
        budget=Budget(ram_bytes=budget_bytes, context_tokens=CONTEXT),
        threads=1,
        chunk_tokens=256,
        max_sequences=4,
    )
    return plan_memory(ModelFootprint(open_model(model), config), config, process_bytes=HELD)


@pytest.fixture(scope="module")
def answers(model: Path) -> list[list[int]]:
    with Engine.open(model, memory="3GiB", prefix_reuse=False, **OPTIONS) as engine:
        assert engine.plan.slots.is_resident
        return [engine.generate(prompt, GREEDY).token_ids for prompt in PROMPTS]


@pytest.fixture
def tight(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """An engine whose budget has room for a quarter of the experts."""
    monkeypatch.setattr(start, "held_bytes", lambda: HELD)  # the size of a test process varies
    monkeypatch.setattr(start, "process_bytes", lambda tokenizer: HELD)
    everything = planned(model, 1 << 40)
    budget = everything.total_bytes - MISSING * everything.slots.slot_bytes
    with Engine.open(model, memory=budget, **OPTIONS) as engine:
        yield engine


def test_a_plan_counts_what_lending_takes(model: Path) -> None:
    everything = planned(model, 1 << 40)
    assert everything.slots.idle == 0
    tight = planned(model, everything.total_bytes - MISSING * everything.slots.slot_bytes)
    assert 0 < tight.slots.own < 24
    assert tight.total_bytes <= tight.budget_bytes
    idle = tight.idle_buffer_bytes + tight.kv_bytes
    assert tight.slots.own + tight.slots.idle == min(96, tight.slots.own + idle // tight.slots.slot_bytes)
    assert tight.slots_in_decode(CONTEXT) == tight.slots.own + min(
        tight.slots.idle, tight.idle_buffer_bytes // tight.slots.slot_bytes
    )
    assert tight.slots_in_decode(0) == tight.slots.own + tight.slots.idle
    assert tight.slots_in_decode(1) == tight.slots.own + min(
        tight.slots.idle,
        (tight.idle_buffer_bytes + tight.kv_layout.free_bytes(CONTEXT // 32)) // tight.slots.slot_bytes,
    )
    assert tight.as_dict()["idle_expert_slots"] == tight.slots.idle
    assert "in idle memory" in tight.parts()[-1].note


@pytest.mark.parametrize("window_blocks", [None, 24])
@pytest.mark.parametrize(
    "family", ["gpt_oss_plain", "qwen3_moe_plain", "deepseek_v2_lite", "qwen3_next_plain"]
)
def test_a_kv_cache_leaves_as_much_free_as_its_layout_says(family: str, window_blocks: int | None) -> None:
    config = open_model(Path(__file__).parents[1] / "models" / "reference" / family).config
    num_blocks = 1 << 15
    kv = _native.KvCache(kv_shapes(config), num_blocks, KV_BLOCK_TOKENS, "f16", window_blocks)
    layout = KvLayout.of(config, num_blocks * KV_BLOCK_TOKENS, "f16", window_blocks)
    for used in (0, 1, num_blocks // 32, num_blocks // 3, num_blocks - 1, num_blocks):
        free = layout.free_bytes(used * KV_BLOCK_TOKENS)
        # Values of odd sizes are padded, which moves the edge of a region by less than a page.
        assert abs(free - (kv.nbytes - kv.held_bytes(used))) <= len(layout.regions) * (2 << 20)
    assert layout.free_bytes(num_blocks // 3 * KV_BLOCK_TOKENS) < kv.nbytes * 2 // 3


def test_answers_are_the_same_while_memory_is_lent_and_taken_back(
    tight: Engine, answers: list[list[int]]
) -> None:
    plan, cache, buffers = tight.plan, tight._started.model.cache, tight._started.model.decoder._stack
    assert cache is not None
    most, fewest = (plan.idle_buffer_bytes // plan.slots.slot_bytes, plan.slots.own)
    assert most > 4
    whole = buffers.buffer_bytes
    for prompt, expected in zip(PROMPTS * 2, answers * 2, strict=True):
        sequence = tight.submit(prompt, GREEDY)
        seen = []
        while sequence.result is None:
            tight.step()
            seen.append((tight.facts().expert_slots, buffers.buffer_bytes))
            assert cache._arena.nbytes == seen[-1][0] * cache.slot_bytes
        assert sequence.new_ids == expected
        assert seen[-1][0] >= fewest + most
        assert seen[-1][1] < whole / 8
        if len(prompt) - (sequence.cached_tokens or 0) > 64:
            assert seen[0][0] < seen[-1][0]
            assert seen[0][1] > seen[-1][1]


def test_logits_at_every_position_need_the_buffers_of_a_whole_chunk(tight: Engine) -> None:
    tight.generate(PROMPTS[1], GREEDY)
    assert (
        tight._started.model.decoder._stack.buffer_bytes
        < tight._started.model.decoder._stack.sizes.buffer_bytes(256)
    )
    assert np.isfinite(tight.logits(list(range(3, 103)) * 3)).all()


# ── another budget ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_budget_may_change_in_the_middle_of_answers(
    tight: Engine, model: Path, answers: list[list[int]]
) -> None:
    opened = tight.plan
    slot = opened.slots.slot_bytes
    budgets = [
        opened.budget_bytes - 6 * slot, opened.budget_bytes + 20 * slot, opened.total_bytes - 8 * slot,
        opened.budget_bytes + 100 * slot, opened.budget_bytes,
    ]  # fmt: skip
    sequences = [tight.submit(prompt, GREEDY) for prompt in PROMPTS]
    seen = []
    while any(one.result is None for one in sequences):
        plan = tight.resize(budgets[len(seen) % len(budgets)])
        assert plan is tight.plan
        assert plan.total_bytes <= plan.budget_bytes
        assert not plan.slots.is_packed
        facts = tight.facts()
        assert facts.budget_bytes == plan.budget_bytes
        seen.append(facts.expert_slots)
        tight.step()
    assert [one.new_ids for one in sequences] == answers
    assert max(seen) == 96
    assert min(seen) < opened.slots.own + opened.slots.idle
    assert tight.resize(opened.budget_bytes).slots.own == opened.slots.own


def test_below_the_fewest_experts_kv_blocks_leave_that_no_answer_needs(
    tight: Engine, answers: list[list[int]]
) -> None:
    opened, blocks = tight.plan, tight._started.cache.blocks
    running = tight.submit(PROMPTS[0], GREEDY)
    waiting = [tight.submit(PROMPTS[2], GREEDY) for _ in range(6)]
    tight.step()
    with pytest.raises(
        DoesNotFit, match=r"needs .* of memory now, and the budget would be 1.0 MiB"
    ) as refused:
        tight.resize(1 * MIB)
    assert tight.plan is opened
    needed = refused.value.facts["needed_bytes"]
    assert isinstance(needed, int)
    assert needed < opened.total_bytes - opened.slots.own * opened.slots.slot_bytes
    plan = tight.resize(needed)
    assert plan.slots.own == 2
    assert blocks.num_blocks == kv_blocks(plan.context_tokens) < kv_blocks(CONTEXT)
    assert plan.context_tokens >= len(PROMPTS[0]) + 24
    with pytest.raises(PromptTooLong):
        tight.submit([3] * 60_000)
    while any(one.result is None for one in (running, *waiting)):
        tight.step()
    assert running.new_ids == answers[0]
    assert all(one.new_ids == answers[2] for one in waiting)
    tight.resize(opened.budget_bytes)
    assert blocks.num_blocks == kv_blocks(CONTEXT)
    assert tight.generate([3] * 600, SamplingParams(max_tokens=1)).token_ids


def test_a_request_that_was_made_for_a_longer_context_is_refused(tight: Engine) -> None:
    sequences = tight.requests.prepare([3] * 60_000)
    with pytest.raises(DoesNotFit) as refused:
        tight.resize(1 * MIB)
    tight.resize(refused.value.facts["needed_bytes"])  # type: ignore[arg-type]
    with pytest.raises(PromptTooLong):
        tight.enqueue(sequences)


def test_experts_leave_in_the_middle_of_a_step_that_a_smaller_budget_would_wait_for(
    tight: Engine, answers: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, opened = tight._started.model.cache, tight.plan
    assert cache is not None
    runner = tight._started.model.experts
    assert isinstance(runner, CachedRunner)
    run, seen, asked = runner.run, list[tuple[int, int]](), list[threading.Thread]()
    smaller = opened.total_bytes - 8 * opened.slots.slot_bytes
    steps = 0

    def ask_within(layer: int, *arguments: Any) -> Any:
        if steps == 1 and layer == 1 and not asked:
            asked.append(threading.Thread(target=tight.resize, args=(smaller,)))
            asked[0].start()
            while tight._started.model.decoder.between_layers is None:
                time.sleep(0.001)
        seen.append((steps, cache.slots.num_slots))
        return run(layer, *arguments)

    monkeypatch.setattr(CachedRunner, "elsewhere", None)  # a step stops at every layer
    monkeypatch.setattr(runner, "run", ask_within)
    sequence = tight.submit(PROMPTS[1], GREEDY)
    while sequence.result is None:
        steps += 1
        tight.step()
    asked[0].join()
    first = [slots for step, slots in seen if step == 1]
    assert first[0] - first[-1] == opened.slots.own - tight.plan.slots.own > 0
    assert tight.plan.budget_bytes == smaller
    assert sequence.new_ids == answers[1]
    assert tight._started.model.decoder.between_layers is None


LONG = [1 + number % 7 for number in range(192)]
TWO = SamplingParams(max_tokens=2, temperature=0)
# A step takes several times the 50 ms after which a native call lets others act between two of its layers.
SLOW: dict[str, Any] = {"instruction_set": "plain", "prefix_reuse": False, **OPTIONS}


def resize_within_a_step(
    engine: Engine, budget: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[int], bool, BaseException | None]:
    """Ask for a budget when the first step of a prompt has begun.

    Returns:
        The token ids of the answer, whether experts were in slots that hold some of them before the step ended, and the
        error of `resize` or None.
    """
    model, decoder, errors = engine._started.model, engine._started.model.decoder, list[BaseException]()
    use_experts, pause, has_left = decoder._use_experts, decoder._pause, list[bool]()

    def ask() -> None:
        try:
            engine.resize(budget)
        except (MemoryError, DoesNotFit) as error:
            errors.append(error)

    asked = threading.Thread(target=ask)

    def begin() -> None:
        use_experts()
        if asked.ident is None:
            asked.start()
            while decoder.between_layers is None:
                time.sleep(0.001)

    def note() -> None:
        pause()
        has_left.append(
            model.cache is not None and model.cache.slots.num_slots < engine.plan.slots.num_experts
        )

    with monkeypatch.context() as patch:
        patch.setattr(decoder, "_use_experts", begin)
        patch.setattr(decoder, "_pause", note)
        sequence = engine.submit(LONG, TWO)
        engine.step()
        is_early = any(has_left)
        while sequence.result is None:
            engine.step()
    asked.join()
    return sequence.new_ids, is_early, errors[0] if errors else None


@pytest.mark.parametrize("are_in_slots", [False, True], ids=["end to end", "in slots"])
def test_experts_leave_in_the_middle_of_a_step_that_is_one_native_call(
    model: Path, monkeypatch: pytest.MonkeyPatch, are_in_slots: bool
) -> None:
    with Engine.open(model, memory="3GiB", **SLOW) as engine:
        opened, smaller = engine.plan, engine.plan.total_bytes - MISSING * engine.plan.slots.slot_bytes
        expected = engine.generate(LONG, TWO).token_ids
        if are_in_slots:
            engine.resize(smaller)
            engine.resize(opened.budget_bytes)
            while engine._started.model.experts.resident is None:  # type: ignore[union-attr]
                engine.generate(LONG, TWO)
        assert engine._started.model.is_packed == (not are_in_slots)
        assert resize_within_a_step(engine, smaller, monkeypatch) == (expected, True, None)
        assert engine.plan.budget_bytes == smaller
        assert engine.facts().expert_slots < opened.slots.num_experts


def test_what_keeps_experts_from_leaving_within_a_step_fails_no_answer(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine.open(model, memory="3GiB", **SLOW) as engine:
        opened = engine.plan
        expected = engine.generate(LONG, TWO).token_ids

        def refuse(*_: object, **__: object) -> None:
            raise MemoryError("no addresses")

        monkeypatch.setattr(engine._started.model, "unpack", refuse)
        smaller = opened.total_bytes - MISSING * opened.slots.slot_bytes
        new_ids, is_early, error = resize_within_a_step(engine, smaller, monkeypatch)
        assert (new_ids, is_early) == (expected, False)
        assert isinstance(error, MemoryError)
        assert engine.plan is opened


def test_experts_that_lie_end_to_end_move_into_slots_when_the_budget_is_too_small_for_them(
    model: Path, answers: list[list[int]]
) -> None:
    with Engine.open(model, memory="3GiB", **OPTIONS) as engine:
        opened, model_ = engine.plan, engine._started.model
        assert opened.slots.is_packed
        assert engine.resize(opened.total_bytes).slots.is_packed
        sequences = [engine.submit(prompt, GREEDY) for prompt in PROMPTS]
        for _ in range(8):
            engine.step()
        before = engine.ledger
        assert before.lookups == before.hits > 0
        arena = model_.experts._arena  # type: ignore[union-attr]
        plan = engine.resize(opened.total_bytes - MISSING * opened.slots.slot_bytes)
        assert not arena.nbytes
        assert not plan.slots.is_packed
        assert 2 <= plan.slots.own < 24
        assert plan.slots.idle > 0
        assert plan.total_bytes <= plan.budget_bytes
        assert engine.facts().num_resident == 0
        assert engine.ledger.lookups == before.lookups
        assert engine.ledger.bytes_read == before.bytes_read
        while any(one.result is None for one in sequences):
            engine.step()
        assert [one.new_ids for one in sequences] == answers
        assert engine.ledger.hits < engine.ledger.lookups
        assert engine.facts().expert_slots == model_.cache._arena.nbytes // opened.slots.slot_bytes  # type: ignore[union-attr]
        assert engine.resize(opened.budget_bytes).slots.own == opened.slots.num_experts
        for prompt, expected in zip(PROMPTS * 2, answers * 2, strict=True):
            assert list(engine.generate(prompt, GREEDY).token_ids) == expected
        assert model_.experts is not None
        assert model_.experts.resident is not None  # native code runs them without asking again
        with pytest.raises(DoesNotFit, match=r"needs .* of memory now, and the budget would be 1.0 MiB"):
            engine.resize(1 * MIB)


def test_a_budget_that_is_too_small_even_for_slots_changes_nothing(model: Path) -> None:
    with Engine.open(model, memory="3GiB", **OPTIONS) as engine:
        opened = engine.plan
        with pytest.raises(DoesNotFit, match=r"needs .* of memory now, and the budget would be 1.0 MiB"):
            engine.resize(1 * MIB)
        assert engine.plan is opened
        assert engine._started.model.is_packed
        assert engine.generate(PROMPTS[0], GREEDY).token_ids
        with pytest.raises(DoesNotFit, match=r"the budget is .*, and there are"):
            engine.resize(1 << 60)


def test_an_engine_without_experts_has_nothing_that_could_leave(model: Path) -> None:
    refused = pytest.raises(DoesNotFit, match="nothing of it can leave while it runs")
    with Engine.open(model, memory="3GiB", experts_off=True, **OPTIONS) as engine, refused:
        engine.resize(engine.plan.total_bytes - 1)


def test_a_fixed_number_of_experts_stays_and_a_closed_engine_has_no_budget(model: Path) -> None:
    engine = Engine.open(model, memory="3GiB", expert_slots=6, **OPTIONS)
    with pytest.raises(UsageError, match="the number of experts in memory is fixed"):
        engine.resize(2 << 30)
    engine.close()
    engine = Engine.open(model, memory="3GiB", **OPTIONS)
    engine.close()
    with pytest.raises(UsageError, match="the engine is closed"):
        engine.resize(2 << 30)
