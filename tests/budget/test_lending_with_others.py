"""Models that share a budget lend idle memory to their own experts, too, while their shares shrink and grow."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy import Engine, SamplingParams
from argosy.budget.media_memory import IDLE_S
from argosy.budget.planner import grown
from argosy.config import MIB
from argosy.engine.media.prompt_media import PromptMedia
from argosy.engine.shared import Ready, make_ready
from argosy.media.parts import Image, RequestMedia
from argosy.open.models import configure, open_files
from argosy.prompt.prompt import Prompt
from cgroup import run_capped, why_no_cap
from make_checkpoint import raw_config, write_checkpoint
from tests.budget.conftest import CONTEXT

GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
PROMPTS = [list(range(3, 103)), [5, 9, 12], [7] * 40]
TEXT: dict[str, Any] = {"threads": 1, "context": CONTEXT, "chunk_tokens": 256, "max_sequences": 4}
MEDIA: dict[str, Any] = {"threads": 1, "image_tokens": 64, "chunk_tokens": 16, "prefix_reuse": False}


def made_ready(path: Path, *names: str, **options: Any) -> list[Ready]:
    files = open_files(path)
    wanted = [(name, files, configure(path, files, memory="3GiB", **options)) for name in names]
    ready, _ = make_ready(wanted, claims=(), recorder=None)
    return ready


@contextmanager
def opened(*ready: Ready, share_bytes: int) -> Iterator[list[Engine]]:
    engines = [one.open(share_bytes) for one in ready]
    yield engines
    for one, engine in zip(ready, engines, strict=True):
        one.close(engine)


@pytest.mark.parametrize("num_shares", [10, pytest.param(40, marks=pytest.mark.full)])
@pytest.mark.parametrize("which", ["model", "seeing"])
def test_a_plan_of_any_share_fits_in_it_and_counts_what_is_lent(
    which: str, num_shares: int, request: pytest.FixtureRequest
) -> None:
    options = TEXT if which == "model" else MEDIA
    (ready,) = made_ready(request.getfixturevalue(which), "one", **options)
    floor, fewest = ready.plan, ready.model.experts_per_token
    assert floor.slots.own == fewest
    assert floor.slots.lent > 0 if which == "seeing" else floor.slots.idle > 0
    before = 0
    for share_bytes in (*range(0, ready.most_bytes, ready.most_bytes // num_shares), ready.most_bytes):
        plan = grown(ready.footprint, floor, ready.budget_bytes(share_bytes))
        assert plan.total_bytes <= floor.total_bytes + share_bytes
        assert plan.left_bytes < 2 * plan.slots.slot_bytes or plan.slots.is_resident
        assert before <= plan.slots.own <= plan.slots.reachable <= plan.slots.num_experts
        assert plan.slots.own < plan.slots.reachable or plan.slots.is_resident
        assert plan.bookkeeping_bytes >= ready.footprint.record_bytes(plan.slots)
        before = plan.slots.own
    assert before == floor.slots.num_experts


def test_answers_are_the_same_while_two_models_lend_take_back_and_change_their_shares(model: Path) -> None:
    with Engine.open(model, memory="3GiB", **TEXT) as engine:
        expected = [engine.generate(prompt, GREEDY).token_ids for prompt in PROMPTS]
    ready = made_ready(model, "one", "two", **TEXT)
    slot_bytes = ready[0].plan.slots.slot_bytes
    shares = [20 * slot_bytes, 4 * slot_bytes, 40 * slot_bytes]
    with opened(*ready, share_bytes=shares[0]) as engines:
        for at, prompt in enumerate(PROMPTS * 2):
            sequences = [engine.submit(prompt, GREEDY) for engine in engines]
            seen: list[int] = []
            while any(sequence.result is None for sequence in sequences):
                for engine in engines:
                    engine.step()
                    cache, facts = engine._started.model.cache, engine.facts()
                    assert cache is not None
                    assert engine.plan.slots.own <= facts.expert_slots <= engine.plan.slots.reachable
                    assert cache._arena.nbytes == facts.expert_slots * cache.slot_bytes
                seen.append(facts.expert_slots)
                if len(seen) == 15:
                    for one, engine in zip(ready, engines, strict=True):
                        engine.resize(one.budget_bytes(shares[(at + 1) % 3]), is_share=True)
            assert [sequence.new_ids for sequence in sequences] == [expected[at % 3]] * 2
            assert seen[-1] > engines[1].plan.slots.own  # idle memory is lent
            if at == 0:
                assert seen[0] < seen[10]  # a prompt of a hundred tokens had taken its buffers


def test_a_picture_takes_its_memory_back_from_experts_of_a_model_beside_others(seeing: Path) -> None:
    def prompt(engine: Engine) -> Prompt:
        assert isinstance(engine.media, PromptMedia)
        pixels = np.random.default_rng(3).integers(0, 256, (80, 60, 3), np.uint8)
        segments = engine.media.segments(engine.media.read(Image(pixels)), "", RequestMedia())
        return Prompt.of([3, 5], *segments, [30, 31])

    def answers(engine: Engine, *, with_picture: bool) -> list[list[int]]:
        prompts: list[Any] = [[5, 9, 12, 40], [7] * 9]
        if with_picture:
            prompts.append(prompt(engine))
        return [result.token_ids for result in engine.generate_batch(prompts, GREEDY)]

    with Engine.open(seeing, memory="3GiB", **MEDIA) as engine:
        expected = answers(engine, with_picture=True)
    ready = made_ready(seeing, "one", "two", **MEDIA)
    with opened(*ready, share_bytes=4 * ready[0].plan.slots.slot_bytes) as (engine, other):
        assert isinstance(engine.media, PromptMedia)
        plan, now = engine.plan, 0.0
        engine.media.memory._clock = lambda: now
        for _ in range(2):
            assert engine.media.memory.is_lent
            assert engine.facts().expert_slots == plan.slots.own + plan.slots.lent
            assert answers(engine, with_picture=False) == expected[:2]
            assert answers(engine, with_picture=True) == expected
            assert not engine.media.memory.is_lent
            assert plan.slots.own <= engine.facts().expert_slots < plan.slots.own + plan.slots.lent
            assert other.facts().expert_slots == plan.slots.own + plan.slots.lent  # it has a loan of its own
            now += IDLE_S
            engine.generate([5, 9], GREEDY)


# ── within a cgroup ─────────────────────────────────────────────────────────────────────────────────────────────────

LIMIT_BYTES = 320 * MIB

SEVERAL = """
import json, sys
from pathlib import Path
from argosy import SamplingParams
from argosy.engine.media.prompt_media import PromptMedia
from argosy.open.models import configure, open_files
from argosy.engine.shared import make_ready

limit, prompts = int(sys.argv[2]), json.loads(sys.argv[3])
files = open_files(Path(sys.argv[1]))
config = configure(files.path, files, memory=limit, threads=2, context=8192, max_sequences=2)
ready, process = make_ready([(name, files, config) for name in ("one", "two")], claims=(), recorder=None)
half = (limit - process - sum(one.floor_bytes for one in ready)) // 2
engines = [one.open(half) for one in ready]
params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
told, most = [], 0
for at, prompt in enumerate(prompts):
    sequences = [engine.submit(prompt, params) for engine in engines]
    while any(sequence.result is None for sequence in sequences):
        for engine in engines:
            engine.step()
        most = max(most, sum(engine.facts().expert_slots for engine in engines))
    told.append([sequence.new_ids for sequence in sequences])
    less, more = at % 2, 1 - at % 2  # now one has three quarters, now the other
    engines[less].resize(ready[less].budget_bytes(half // 2), is_share=True)
    engines[more].resize(ready[more].budget_bytes(half + half // 2), is_share=True)
for one, engine in zip(ready, engines):
    one.close(engine)
print(json.dumps([told, most, [one.plan.slots.own + half // one.plan.slots.slot_bytes for one in ready]]))
"""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Iterator[Path]:
    """Write 500 MiB in bf16; remove it right after the test, because pytest keeps its directories for a while."""
    config = raw_config(
        hidden=512, layers=10, experts=64, width=256, heads=4, kv_heads=1, vocab=1024, context=8192
    )
    directory = tmp_path / "checkpoint"
    write_checkpoint(directory, config)
    yield directory
    shutil.rmtree(directory)


@pytest.mark.full
@pytest.mark.skipif(bool(why_no_cap()), reason=why_no_cap() or "")
def test_two_models_that_lend_their_idle_memory_stay_within_a_cgroup_of_their_budget(
    checkpoint: Path,
) -> None:
    prompts = [np.random.default_rng(seed).integers(0, 1024, 700 * seed).tolist() for seed in (1, 5, 2)]
    command = [sys.executable, "-c", SEVERAL, str(checkpoint), str(LIMIT_BYTES), json.dumps(prompts)]
    run = run_capped(command, limit_bytes=LIMIT_BYTES, timeout_s=250)
    assert run.num_oom_kills == 0, "killed for memory"
    assert run.returncode == 0, run.stderr
    told, most_slots, own_slots = json.loads(run.stdout)
    assert run.peak_bytes <= LIMIT_BYTES, run.peak_bytes
    assert run.peak_swap_bytes == 0
    assert most_slots > sum(own_slots)  # some of them were in idle memory
    with Engine.open(checkpoint, memory="2GiB", threads=2, context=8192, max_sequences=2) as engine:
        params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
        expected = [engine.generate(prompt, params).token_ids for prompt in prompts]
    assert told == [[one, one] for one in expected]
