"""Layers with a sliding window keep what running sequences see and a few ends of prefixes, and answers are the same.

`test_scheduler.py` has the random requests, `test_identity.py` and `test_prefix.py` have models with such layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from argosy import Engine, SamplingParams, _native
from argosy.budget import planner
from argosy.budget.footprint import ModelFootprint, kv_bytes
from argosy.budget.planner import plan_memory
from argosy.config import Budget, EngineConfig, KvDir
from argosy.kept.kv_windows import NONE, KvWindows, WindowSizes, window_sizes
from argosy.model.families import open_model
from tests.engine.random_drafter import RandomDrafter
from tests.models.mxfp4_models import write_mxfp4_model
from tests.models.tiny import gpt_oss, prompt_ids, qwen3_moe, write_model
from tests.models.tiny_deepseek_v4 import deepseek_v4
from tests.models.tiny_flint import lara_mini

CONFIG = gpt_oss(
    max_position_embeddings=2048,
    hidden_size=96,
    intermediate_size=64,
    sliding_window=32,
    initial_context_length=2048,
    rope_scaling={"rope_type": "yarn", "factor": 8.0},
)
GREEDY = SamplingParams(max_tokens=20, ignore_eos=True, logprobs=2)


@dataclass(eq=False)
class Walker:
    """A sequence that only has blocks."""

    blocks: list[int] = field(default_factory=list)


def windows(
    num_blocks: int = 16, *, window: int = 9, num_window_blocks: int = 6, most_ends: int = 1
) -> KvWindows:
    return KvWindows(num_blocks, 4, WindowSizes(num_window_blocks, window, most_ends))


def walk(kept: KvWindows, walker: Walker, until: int, *, by: int = 1) -> None:
    for at in range(0, until, by):
        kept.reach(walker, at + by)
        kept.leave(walker, at + by)


def test_a_sequence_has_window_blocks_for_what_it_sees_and_others_stay_while_there_is_room() -> None:
    kept, walker = windows(), Walker(list(range(12)))
    kept.begin(walker, 0)
    walk(kept, walker, 40)
    # The token at 40 sees 32 to 39, which lie in blocks 8 and 9; six window blocks are in all.
    assert [block for block in range(16) if kept.has(block)] == [4, 5, 6, 7, 8, 9]
    assert kept.num_usable(walker.blocks[:10]) == 10
    assert kept.num_usable(walker.blocks[:6]) == 6  # sees 16 to 23, in blocks 4 and 5
    assert kept.num_usable(walker.blocks[:5]) == 0
    other = Walker([12, 13, 14, 15])
    kept.begin(other, 0)
    walk(kept, other, 16, by=4)
    assert [kept.has(block) for block in (8, 9, 12, 13, 14, 15)] == [True] * 6
    kept.end(walker)
    assert kept.num_usable(walker.blocks[:10]) == 10
    kept.drop(9)
    assert kept.num_usable(walker.blocks[:10]) == 0
    assert int(kept.of_block[9]) == NONE


def test_the_end_of_a_prefix_that_is_kept_outlives_what_was_used_later() -> None:
    kept, walker = windows(most_ends=1), Walker(list(range(10)))
    kept.begin(walker, 0)
    walk(kept, walker, 16)
    kept.keep_end(walker.blocks[:4])
    kept.end(walker)
    other = Walker([10, 11, 12, 13, 14, 15])
    kept.begin(other, 0)
    walk(kept, other, 24)
    assert kept.num_usable([0, 1, 2, 3]) == 4
    kept.keep_end(other.blocks)  # one end is kept at most
    kept.end(other)
    assert kept.num_usable([0, 1, 2, 3]) == 4  # while there is room
    again = Walker([4, 5, 6, 7])
    kept.begin(again, 0)
    walk(kept, again, 16)
    assert kept.num_usable([0, 1, 2, 3]) == 0
    assert kept.num_usable(other.blocks) == 6


@pytest.mark.parametrize(("speculate", "has_blocks"), [("off", True), ("lookup", True), ("mtp", False)])
def test_a_draft_layer_finds_every_position_so_no_window_blocks_are_planned_with_one(
    speculate: str, has_blocks: bool
) -> None:
    settings = EngineConfig(
        budget=Budget(ram_bytes=1),
        threads=1,
        speculate=speculate,  # type: ignore[arg-type]
        draft_tokens=0 if speculate == "off" else 3,
    )
    found = planner._windows(SimpleNamespace(window=32), settings, 8192, 512, 8)  # type: ignore[arg-type]
    assert (found is not None) == has_blocks


def test_no_window_blocks_are_planned_where_they_would_save_nothing(tmp_path: Path) -> None:
    sizes = window_sizes(num_blocks=1024, block_tokens=16, window=128, max_sequences=8, step_tokens=520)
    assert sizes == WindowSizes(24 * 9 + 8 + 33, 128, 16)
    assert window_sizes(num_blocks=257, block_tokens=16, window=128, max_sequences=8, step_tokens=520) is None
    everywhere = qwen3_moe(use_sliding_window=True, sliding_window=8, max_window_layers=0)
    models = {
        "mixed": CONFIG,
        "full": qwen3_moe(),
        "windows": everywhere,
        "delta": lara_mini(sliding_window=9),
    }
    found = {}
    for name, config in models.items():
        (write_mxfp4_model if name == "mixed" else write_model)(tmp_path / name, config, seed=1)
        settings = EngineConfig(budget=Budget(ram_bytes=1), threads=1)
        found[name] = ModelFootprint(open_model(tmp_path / name), settings).window
    assert found == {"mixed": 32, "full": 0, "windows": 0, "delta": 9}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("windows") / "model"
    write_mxfp4_model(path, CONFIG, seed=3)
    return path


def test_the_plan_counts_window_blocks_and_keeps_everything_for_files(
    directory: Path, tmp_path: Path
) -> None:
    files = open_model(directory)

    def planned(**options: object) -> tuple[int, int | None]:
        budget = Budget(ram_bytes=1 << 30, context_tokens=2048)
        config = EngineConfig(
            budget=budget,
            threads=1,
            chunk_tokens=64,
            max_sequences=2,
            **options,  # type: ignore[arg-type]
        )
        plan = plan_memory(ModelFootprint(files, config), config, process_bytes=50 << 20)
        assert ("in layers with a window" in plan.lines()[2][2]) == (plan.windows is not None)
        return plan.kv_bytes, plan.model_sizes(config).window_blocks

    sizes = window_sizes(num_blocks=128, block_tokens=16, window=32, max_sequences=2, step_tokens=66)
    assert sizes is not None
    nbytes, num = planned()
    assert num == sizes.num_window_blocks == 25
    full = kv_bytes(files.config, 2048, "f32")
    assert nbytes == kv_bytes(files.config, 2048, "f32", window_blocks=25)
    assert nbytes / full == pytest.approx((128 + 2 * 25) / (3 * 128))  # two of three layers have a window
    assert planned(kv_dir=KvDir(path=tmp_path)) == (full, None)


@pytest.fixture(scope="module", params=["attention", "pools", "delta"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with windows beside attention to all positions, pools or delta nets, which have a recurrent state."""
    path = tmp_path_factory.mktemp("model") / request.param
    if request.param == "attention":
        write_mxfp4_model(path, CONFIG, seed=3)
    else:
        family = {"pools": deepseek_v4, "delta": lara_mini}[request.param]
        write_model(path, family(max_position_embeddings=2048, sliding_window=32, vocab_size=112), seed=3)
    return path


def test_long_prompts_are_reused_where_they_ended_and_where_they_diverged(model: Path) -> None:
    shared, tails = prompt_ids(CONFIG, 1, 800), [prompt_ids(CONFIG, seed, 500) for seed in (2, 3, 4, 5)]
    options = {"memory": "4GiB", "threads": 1, "chunk_tokens": 64, "max_sequences": 2, "context": 2048}
    with Engine.open(model, prefix_reuse=False, kv_dtype="f32", **(options | {"max_sequences": 64})) as plain:
        assert plain.plan.windows is None
        expected = [plain.generate(shared + tail, GREEDY) for tail in tails]
    with Engine.open(model, kv_dtype="f32", **options) as engine:
        assert engine.plan.windows is not None
        results = [engine.generate(shared + tail, GREEDY) for tail in tails]
        again = engine.generate(shared + tails[-1], GREEDY)
    # The first prompt's view is gone when the second shows where they diverge; from then on it is kept.
    assert [one.usage["cached_tokens"] for one in (*results, again)] == [0, 0, 800, 800, 1296]
    for found, one in zip([*results, again], [*expected, expected[-1]], strict=True):
        assert (found.token_ids, found.logprobs) == (one.token_ids, one.logprobs)


def test_a_long_answer_takes_no_more_window_blocks_and_continues_from_its_last_snapshot(model: Path) -> None:
    """Alone, and beside another; after proposals that were rejected, and after it was preempted."""
    prompts, params = [prompt_ids(CONFIG, seed, 60) for seed in (1, 2)], replace(GREEDY, max_tokens=300)
    options = {"memory": "4GiB", "threads": 1, "chunk_tokens": 64, "context": 2048, "kv_dtype": "f32"}
    with Engine.open(model, max_sequences=64, prefix_reuse=False, **options) as plain:
        assert plain.plan.windows is None
        expected = [(one.token_ids, one.logprobs) for one in plain.generate_batch(prompts, params)]
    with Engine.open(model, max_sequences=2, speculate="lookup", **options) as engine:
        windows, sizes = engine._scheduler._windows, engine.plan.windows
        assert windows is not None
        assert sizes is not None
        engine._scheduler._governor = None
        engine._scheduler._drafter = RandomDrafter(1, 80, [prompts[0] + expected[0][0]])
        sequences = [engine.submit(prompt, params) for prompt in prompts]
        while engine.has_work:
            engine.step()
            assert all(len(used) <= 4 for used in windows._in_use.values())
            if len(sequences[0].new_ids) > 200 and not engine.facts().num_preempted:
                engine._scheduler.preempt(sequences[0])
                assert engine._scheduler._cache.find(sequences[0]).num_usable * 16 >= 60 + 200 - 64
        assert sizes.num_window_blocks < 32
        found = [one.result for one in sequences]
    assert [(one.token_ids, one.logprobs) for one in found if one is not None] == expected


def test_a_step_names_a_window_block_for_everything_it_sees(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KvWindows, "reach", lambda *_: None)
    with (
        Engine.open(directory, memory="4GiB", threads=1, chunk_tokens=64, max_sequences=2) as engine,
        pytest.raises(ValueError, match=r"window_blocks\[\d+\] is -1, expected 0 to 24"),
    ):
        engine.generate(prompt_ids(CONFIG, 1, 10), GREEDY)
    kv = _native.KvCache([_native.KvShape.keys_values(1, 8, is_windowed=True)], 4, 16, "f32", 2)
    assert kv.nbytes == 2 * 16 * (8 + 16) * 4
    assert kv.block_bytes == 0
    kv.copy_block(0, 1, is_windowed=True)
    with pytest.raises(ValueError, match="to_block is 2, expected 0 to 1"):
        kv.copy_block(0, 2, is_windowed=True)
