"""The budget is divided before anything is loaded, and refused with the numbers when it is too small."""

from __future__ import annotations

from dataclasses import replace

import pytest

from argosy import _native
from argosy.checkpoint.files import ModelFiles
from argosy.config import MIB, Budget, EngineConfig
from argosy.engine.memory_plan import MemoryPlan, kv_bytes, plan_memory
from argosy.errors import DoesNotFit
from argosy.experts.source import resident_bytes
from argosy.model.families import open_model
from tests.models.tiny import qwen3_moe, write_model

PROCESS_BYTES = 50 * MIB


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    directory = tmp_path_factory.mktemp("plan") / "model"
    write_model(directory, qwen3_moe(max_position_embeddings=4096), seed=3)
    return open_model(directory)


def plan(
    files: ModelFiles, ram_bytes: int, *, context: int | None = None, chunk_tokens: int = 256
) -> MemoryPlan:
    budget = Budget(ram_bytes=ram_bytes, context_tokens=context)
    config = EngineConfig(budget=budget, threads=2, chunk_tokens=chunk_tokens)
    return plan_memory(files, config, process_bytes=PROCESS_BYTES)


def smallest_budget(files: ModelFiles, context: int | None = None) -> int:
    with pytest.raises(DoesNotFit) as refused:
        plan(files, 1 * MIB, context=context)
    needed = refused.value.facts["needed_bytes"]
    assert isinstance(needed, int)
    return needed


def test_the_parts_of_a_plan_sum_to_its_total_and_stay_within_the_budget(files: ModelFiles) -> None:
    for ram_bytes in range(smallest_budget(files), 200 * MIB, 3 * MIB):
        planned = plan(files, ram_bytes)
        assert sum(nbytes for _, nbytes, _ in planned.lines()) == planned.total_bytes <= ram_bytes


def test_the_smallest_budget_that_is_named_works_and_a_byte_less_does_not(files: ModelFiles) -> None:
    needed = smallest_budget(files)
    assert plan(files, needed).num_slots == files.config.experts_per_token
    with pytest.raises(DoesNotFit):
        plan(files, needed - 1)


def test_a_refusal_says_what_was_needed_what_was_found_and_what_would_help(files: ModelFiles) -> None:
    with pytest.raises(DoesNotFit) as refused:
        plan(files, 20 * MIB, context=4096)
    sentence = str(refused.value)
    for word in (
        "the budget is 20.0 MiB",
        "dense weights",
        "KV cache",
        "4096 tokens",
        "--context",
        "--kv f16",
    ):
        assert word in sentence


def test_a_context_that_was_asked_for_is_kept_or_refused_never_shrunk(files: ModelFiles) -> None:
    needed = smallest_budget(files, context=3000)
    assert plan(files, needed, context=3000).context_tokens == 3000
    assert plan(files, needed).context_tokens >= 512


def test_what_readers_transcode_from_is_planned_where_a_file_has_blocks(files: ModelFiles) -> None:
    name, ref = next((name, ref) for name, ref in files.dense.items() if name.endswith(".q"))
    shape = {"rows": 32, "cols": 64}
    blocks = replace(ref, format="q4", block_type="Q4_0", nbytes=32 * 36, **shape)
    with_blocks = replace(files, dense={**files.dense, name: blocks})
    roomy = Budget(ram_bytes=1024 * MIB)
    for readers in (1, 4):
        config = EngineConfig(budget=roomy, threads=2, readers=readers)
        planned = plan_memory(with_blocks, config, process_bytes=PROCESS_BYTES)
        assert planned.staging_bytes == _native.Store(readers).staging_bytes
        assert ("staging", planned.staging_bytes, "to transcode from") in planned.lines()
    assert plan(files, 1024 * MIB).staging_bytes == 0


def test_all_experts_take_what_they_need_and_no_slot_of_the_largest(files: ModelFiles) -> None:
    everything = plan(files, 1024 * MIB)
    fits = 1024 * MIB - (everything.budget_bytes - everything.total_bytes)
    exact = plan(files, fits, context=everything.context_tokens)
    assert exact.is_resident
    assert exact.expert_bytes == resident_bytes(files.experts)
    assert (
        not plan(files, fits - 1, context=everything.context_tokens, chunk_tokens=256).total_bytes > fits - 1
    )


def test_experts_get_what_the_others_leave(files: ModelFiles) -> None:
    roomy = plan(files, 1024 * MIB)
    assert roomy.is_resident
    assert roomy.context_tokens == files.config.context_tokens
    assert roomy.kv_bytes == kv_bytes(files.config, 4096, "f32")
    assert roomy.chunk_tokens == 256
