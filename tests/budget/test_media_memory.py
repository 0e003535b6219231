"""The memory of pictures and sounds is lent to experts while there are none, and taken back before it is needed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy import Engine, SamplingParams
from argosy.budget.allowances import lendable_bytes
from argosy.budget.expert_memory import ExpertMemory
from argosy.budget.footprint import ModelFootprint
from argosy.budget.media_memory import IDLE_S, MediaMemory
from argosy.budget.memory_plan import MemoryPlan
from argosy.budget.planner import plan_memory
from argosy.config import MIB, Budget, EngineConfig, ExpertSlots
from argosy.engine import start
from argosy.engine.media.prompt_media import PromptMedia
from argosy.engine.turns import Turns
from argosy.errors import DoesNotFit, UsageError
from argosy.machine.resources import page_table_bytes
from argosy.media.parts import Image, RequestMedia
from argosy.model.families import open_model
from argosy.prompt.prompt import Prompt

NUM_SLOTS, LENT_SLOTS, SLOT_BYTES = 10, 30, 1 * MIB


class Slots:
    """An expert cache that notes how many slots it has."""

    def __init__(self) -> None:
        self.noted = [NUM_SLOTS]

    def resize(self, num_slots: int, *, held: int | None = None) -> None:
        self.noted.append(num_slots if held is None else held)


class Lender:
    """A `MediaMemory` with a clock and a cache of the test's own."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.cache, self.lock = Slots(), Turns()
        self.cleared: list[int] = []
        self.experts = ExpertMemory(
            self.cache,  # type: ignore[arg-type]
            ExpertSlots(own=NUM_SLOTS, lent=LENT_SLOTS, num_experts=1000, slot_bytes=SLOT_BYTES),
            lock=self.lock,
            clock=lambda: self.now,
        )
        self.memory = MediaMemory(
            lambda: self.cleared.append(self.cache.noted[-1]),
            experts=self.experts,
            nbytes=LENT_SLOTS * SLOT_BYTES,
            lock=self.lock,
            clock=lambda: self.now,
        )


def test_it_is_lent_until_a_picture_comes_and_again_after_a_minute_without() -> None:
    lender = Lender()
    lender.memory.settle()
    assert lender.experts.num_slots == NUM_SLOTS + LENT_SLOTS
    with lender.memory.use():
        assert not lender.memory.is_lent
        assert lender.experts.num_slots == NUM_SLOTS
        assert lender.cache.noted == [NUM_SLOTS, NUM_SLOTS + LENT_SLOTS, NUM_SLOTS]
        lender.now += 10 * IDLE_S
        lender.memory.settle()  # it is still used
    lender.now += IDLE_S - 1
    lender.memory.settle()
    with lender.memory.use():
        pass
    lender.now += IDLE_S - 1
    lender.memory.settle()
    assert lender.cache.noted[2:] == [NUM_SLOTS]
    assert not lender.cleared
    lender.now += 1
    lender.memory.settle()
    assert lender.cleared == [NUM_SLOTS]  # before experts have it
    assert lender.cache.noted[2:] == [NUM_SLOTS, NUM_SLOTS + LENT_SLOTS]


def test_a_picture_from_another_thread_waits_for_the_end_of_a_step_and_no_longer() -> None:
    lender = Lender()
    has_begun, has_memory = threading.Event(), threading.Event()

    def picture() -> None:
        has_begun.set()
        with lender.memory.use():
            has_memory.set()

    with lender.lock:  # a step
        thread = threading.Thread(target=picture)
        thread.start()
        has_begun.wait()
        assert not has_memory.wait(0.05)
        assert lender.cache.noted[-1] == NUM_SLOTS + LENT_SLOTS
        while not lender.memory._num_users:
            pass
        lender.memory.settle()  # before the next step
        assert lender.cache.noted[-1] == NUM_SLOTS
    with lender.lock:  # goes to the picture first, which has waited longer
        assert has_memory.wait(5)
    thread.join()


def test_a_picture_takes_it_back_itself_if_no_step_runs() -> None:
    lender = Lender()
    thread = threading.Thread(target=lambda: lender.memory.use().__enter__())
    thread.start()
    thread.join(5)
    assert lender.cache.noted[-1] == NUM_SLOTS


@pytest.mark.parametrize("is_lent", [True, False])
def test_a_picture_that_comes_when_the_engine_closes_is_refused(is_lent: bool) -> None:
    lender = Lender()
    if not is_lent:
        with lender.memory.use():
            pass
    lender.memory.close()
    with pytest.raises(UsageError, match="the engine is closed"), lender.memory.use():
        pass
    assert lender.memory._num_users == 0


# ── whole engines ───────────────────────────────────────────────────────────────────────────────────────────────────

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
TEXTS = [[5, 9, 12, 40], [7] * 9, [20, 21, 22]]


@pytest.fixture(scope="module")
def model(seeing: Path) -> Path:
    return seeing


def planned(model: Path, budget_bytes: int) -> MemoryPlan:
    files = open_model(model)
    config = EngineConfig(budget=Budget(ram_bytes=budget_bytes), threads=1, image_tokens=64, chunk_tokens=16)
    return plan_memory(ModelFootprint(files, config), config, process_bytes=50 * MIB)


def test_a_plan_lends_what_media_take_only_while_they_are_there(model: Path) -> None:
    everything = planned(model, 1 << 40)
    assert everything.slots.is_resident
    assert everything.slots.lent == 0  # nothing is left to lend to
    for missing in (1, everything.slots.num_experts // 2, everything.slots.num_experts - 4):
        tight = planned(model, everything.total_bytes - missing * everything.slots.slot_bytes)
        assert tight.slots.own < everything.slots.num_experts
        assert tight.slots.own + tight.slots.lent == everything.slots.num_experts
        assert tight.slots.lent * tight.slots.slot_bytes <= lendable_bytes(tight.encoder_bytes)
        assert tight.total_bytes <= tight.budget_bytes
        mapped = tight.total_bytes - 50 * MIB - tight.page_table_bytes
        assert tight.page_table_bytes >= page_table_bytes(mapped + tight.slots.lent * tight.slots.slot_bytes)
        assert tight.as_dict()["lent_expert_slots"] == tight.slots.lent
        assert f", {everything.slots.num_experts} while there are no pictures" in tight.parts()[-1].note
    config = EngineConfig(budget=Budget(ram_bytes=1 << 40), threads=1, expert_slots=6)
    fixed = plan_memory(ModelFootprint(open_model(model), config), config, process_bytes=50 * MIB)
    assert (fixed.slots.own, fixed.slots.lent) == (6, 0)  # whoever fixes the number gets it


def open_with(model: Path, budget_bytes: int, **options: Any) -> Engine:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "held_bytes", lambda: 50 * MIB)
        patch.setattr(start, "process_bytes", lambda tokenizer: 50 * MIB)
        return Engine.open(
            model, memory=budget_bytes, threads=1, image_tokens=64, chunk_tokens=16, context=64, **options
        )


def test_a_budget_without_room_for_media_runs_text_and_says_why_it_sees_nothing(model: Path) -> None:
    with pytest.raises(DoesNotFit) as refused:
        open_with(model, 1 * MIB, media=True)
    floor, without = refused.value.facts["needed_bytes"], refused.value.facts["plan"]["encoder_bytes"]
    with open_with(model, floor) as engine:
        assert engine.media.kinds[0] == "picture"
        assert not engine.media.faults
    with pytest.raises(DoesNotFit, match=r"needs .* of memory, and the budget is"):
        open_with(model, floor - MIB, media=True)
    with open_with(model, floor - MIB) as engine:
        assert engine.plan.encoder_bytes == 0
        assert engine.media.kinds == ()
        fault = engine.media.faults["picture"]
        assert fault.message.startswith("the memory budget has no room for pictures and sound: with them")
        assert fault.facts["needed_bytes"] == floor
        assert engine.media.faults["video"] is fault
        assert engine.generate(TEXTS[0], GREEDY).token_ids
        assert isinstance(engine.media, PromptMedia)
        with pytest.raises(DoesNotFit, match="no room for pictures and sound"):
            engine.media.read(Image(np.zeros((8, 8, 3), np.uint8)))
    with pytest.raises(DoesNotFit, match=r"needs .* of memory, and the budget is"):
        open_with(model, floor - without - 4 * MIB)  # text alone does not fit either


@contextmanager
def tight_engine(model: Path, num_missing: int) -> Iterator[Engine]:
    """An engine whose budget is so small that some experts have room only in the memory for pictures."""
    everything = planned(model, 1 << 40)
    budget = everything.total_bytes - num_missing * everything.slots.slot_bytes
    options: dict[str, Any] = {"threads": 1, "image_tokens": 64, "chunk_tokens": 16, "prefix_reuse": False}
    with pytest.MonkeyPatch.context() as patch:  # the size of a test process varies
        patch.setattr(start, "held_bytes", lambda: 50 * MIB)
        patch.setattr(start, "process_bytes", lambda tokenizer: 50 * MIB)
        with Engine.open(model, memory=f"{budget // MIB}MiB", **options) as engine:
            assert 0 < engine.plan.slots.own < engine.plan.slots.num_experts - num_missing // 2
            yield engine


def prompt_of(engine: Engine, seed: int) -> Prompt:
    assert isinstance(engine.media, PromptMedia)
    pixels = np.random.default_rng(seed).integers(0, 256, (80, 60, 3), np.uint8)
    segments = engine.media.segments(engine.media.read(Image(pixels)), "", RequestMedia())
    return Prompt.of([3, 5], *segments, [30, 31])


def answers(engine: Engine, seed: int | None = None) -> list[list[int]]:
    prompts: list[Any] = [*TEXTS] if seed is None else [*TEXTS, prompt_of(engine, seed)]
    return [result.token_ids for result in engine.generate_batch(prompts, GREEDY)]


def test_answers_are_the_same_while_memory_is_lent_taken_back_and_lent_again(model: Path) -> None:
    with Engine.open(model, memory="3GiB", threads=1, image_tokens=64, prefix_reuse=False) as engine:
        assert engine.plan.slots.is_resident
        expected = [answers(engine, seed) for seed in range(3)]
    with tight_engine(model, num_missing=40) as engine:
        assert isinstance(engine.media, PromptMedia)
        memory, plan, cache = engine.media.memory, engine.plan, engine._started.model.experts.cache  # type: ignore[union-attr]
        now = 0.0
        memory._clock = lambda: now
        for seed in range(3):
            assert engine.facts().expert_slots == plan.slots.own + plan.slots.lent
            assert answers(engine) == expected[seed][:-1]
            assert engine.facts().num_resident > plan.slots.own
            assert not engine.media._encoders._open
            assert answers(engine, seed) == expected[seed]
            assert engine.facts().expert_slots == plan.slots.own >= engine.facts().num_resident
            assert cache._arena.nbytes == plan.slots.own * plan.slots.slot_bytes
            assert engine.media._encoders._open
            now += IDLE_S
            engine.generate(TEXTS[0], GREEDY)
            assert not engine.media._encoders._open


def test_a_picture_that_comes_while_a_text_is_answered_changes_no_token(model: Path) -> None:
    """The cache loses most of its slots, and later gets them back, in the middle of an answer."""
    long = replace(GREEDY, max_tokens=60)
    with Engine.open(model, memory="3GiB", threads=1, image_tokens=64, prefix_reuse=False) as engine:
        expected = engine.generate(TEXTS[0], long).token_ids
        seen = engine.generate(prompt_of(engine, 0), GREEDY).token_ids
    with tight_engine(model, num_missing=44) as engine:
        assert isinstance(engine.media, PromptMedia)
        now = 0.0
        engine.media.memory._clock = lambda: now
        talker = engine.submit(TEXTS[0], long)
        while len(talker.new_ids) < 10:
            engine.step()
        picture = engine.submit(prompt_of(engine, 0), GREEDY)
        assert not engine.media.memory.is_lent
        while picture.result is None:
            engine.step()
        now += IDLE_S
        engine.step()
        assert engine.media.memory.is_lent
        while talker.result is None:
            engine.step()
        assert talker.result.token_ids == expected
        assert picture.result.token_ids == seen
