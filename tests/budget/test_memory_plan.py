"""The budget is divided before anything is loaded; one that is too small is refused with the numbers."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from argosy import _native
from argosy.budget.allowances import GRAMMAR_BYTES
from argosy.budget.footprint import ModelFootprint, kv_bytes
from argosy.budget.memory_plan import MemoryPlan
from argosy.budget.planner import experts_read, plan_memory
from argosy.budget.requirements import require_memory
from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.landing import Transcoded
from argosy.config import GIB, MIB, Budget, Claim, EngineConfig, KvDir, KvDtype, claimed, parse_size
from argosy.errors import DoesNotFit, UsageError
from argosy.experts.files import bookkeeping_bytes, resident_bookkeeping_bytes, resident_bytes
from argosy.experts.policy import CachePolicy
from argosy.forecast.assumed import assume_pack
from argosy.kept.prefix_files import buffer_bytes
from argosy.machine.resources import MemoryLimit, held_bytes, page_table_bytes
from argosy.model.families import FAMILIES, open_model
from tests.families.published import PUBLISHED
from tests.models.tiny import qwen3_moe, write_model

PROCESS_BYTES = 50 * MIB


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    directory = tmp_path_factory.mktemp("plan") / "model"
    write_model(directory, qwen3_moe(max_position_embeddings=4096), seed=3)
    return open_model(directory)


def plan(
    files: ModelFiles, ram_bytes: int, *, context: int | None = None, chunk_tokens: int | None = 256
) -> MemoryPlan:
    budget = Budget(ram_bytes=ram_bytes, context_tokens=context)
    config = EngineConfig(budget=budget, threads=2, chunk_tokens=chunk_tokens)
    return plan_memory(ModelFootprint(files, config), config, process_bytes=PROCESS_BYTES)


def smallest_budget(files: ModelFiles, context: int | None = None) -> int:
    with pytest.raises(DoesNotFit) as refused:
        plan(files, 1 * MIB, context=context)
    needed = refused.value.facts["needed_bytes"]
    assert isinstance(needed, int)
    return needed


@pytest.mark.parametrize("more_bytes", range(0, 100 << 10, 10 << 10))
def test_the_need_that_a_refusal_prints_is_enough(files: ModelFiles, more_bytes: int) -> None:
    config = EngineConfig(budget=Budget(ram_bytes=1 * MIB), threads=2)
    footprint = ModelFootprint(files, config)
    with pytest.raises(DoesNotFit) as refused:
        plan_memory(footprint, config, process_bytes=PROCESS_BYTES + more_bytes)
    printed = re.match(r"needs (.*) of memory, and the budget is", refused.value.message)
    assert printed is not None
    enough = replace(config, budget=Budget(ram_bytes=parse_size(printed[1])))
    plan_memory(footprint, enough, process_bytes=PROCESS_BYTES + more_bytes)


def test_a_plan_counts_the_scratch_of_products_that_use_it(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On `amx`, products with float weights of this model use it; elsewhere only those with quantised weights do."""
    monkeypatch.setattr(_native, "instruction_sets", lambda: ["avx2", "amx", "avx512"])
    monkeypatch.setattr(_native, "product_scratch_bytes", lambda num_threads, name: num_threads << 20)
    footprints = {
        name: ModelFootprint(files, EngineConfig(budget=Budget(ram_bytes=1), threads=2, instruction_set=name))
        for name in (None, "avx512", "amx")
    }
    found = {name: footprint.buffer_bytes(64) for name, footprint in footprints.items()}
    split = footprints["amx"]._stack_sizes.scratch_bytes(64, 2, True, has_act_order=False)
    as_floats = footprints["avx512"]._stack_sizes.scratch_bytes(64, 2, False)
    assert found[None] == found["avx512"] == found["amx"] - (2 << 20) - (split - as_floats)


def test_the_parts_of_a_plan_sum_to_its_total_and_stay_within_the_budget(files: ModelFiles) -> None:
    for ram_bytes in range(smallest_budget(files), 200 * MIB, 3 * MIB):
        planned = plan(files, ram_bytes)
        assert sum(nbytes for _, nbytes, _ in planned.lines()) == planned.total_bytes <= ram_bytes


def test_the_smallest_budget_that_a_refusal_names_works_and_a_byte_less_does_not(files: ModelFiles) -> None:
    needed = smallest_budget(files)
    assert plan(files, needed).slots.own == files.config.experts_per_token
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
        "--kv q8",
    ):
        assert word in sentence


def test_a_refusal_names_options_with_which_the_budget_is_enough(files: ModelFiles) -> None:
    footprints = {}

    def needed(context: int, kv_dtype: KvDtype = "f32") -> int:
        """The smallest budget with these options."""
        return refusal(1, context, kv_dtype)[0]

    def refusal(ram_bytes: int, context: int, kv_dtype: KvDtype = "f32") -> tuple[int, str]:
        budget = Budget(ram_bytes=ram_bytes, context_tokens=context)
        config = EngineConfig(budget=budget, threads=2, chunk_tokens=16, kv_dtype=kv_dtype)
        footprint = footprints.setdefault(kv_dtype, ModelFootprint(files, config))
        with pytest.raises(DoesNotFit) as refused:
            plan_memory(footprint, config, process_bytes=PROCESS_BYTES)
        found = refused.value.facts["needed_bytes"]
        assert isinstance(found, int)
        return found, str(refused.value.hint)

    def says(ram_bytes: int) -> str:
        return refusal(ram_bytes, 4096)[1].split("; ")[1]

    both = needed(512, "q8")
    assert both < needed(512) < needed(1024) < needed(4096, "q8")
    assert needed(4096, "q8") < needed(2048) < needed(4096, "f16") < needed(4096)
    assert says(needed(4096, "f16")) == "this budget is enough with `--kv f16` or with `--context 2048`"
    assert says(needed(4096, "f16") - 1) == "this budget is enough with `--kv q8` or with `--context 2048`"
    assert says(needed(4096, "q8") - 1) == "this budget is enough with `--context 1024`"
    assert says(needed(2048) - 1) == "this budget is enough with `--kv q8` or with `--context 1024`"
    assert says(needed(512)) == "this budget is enough with `--context 512`"
    assert says(needed(512) - 1) == "this budget is enough with `--kv q8 --context 512`"
    least = re.fullmatch(r"`--memory (\d+)MiB --kv q8 --context 512` is the least", says(both - 1))
    assert least is not None
    assert 0 <= int(least[1]) * MIB - both < 4 * MIB


def test_the_format_of_keys_and_values_follows_from_the_model_alone(files: ModelFiles) -> None:
    """f16 where float32 would take more than a twentieth of the smallest budget, and otherwise f32."""

    def formats(files: ModelFiles, **options: Any) -> set[str]:
        found = set()
        for ram_bytes, context in itertools.product((20 * GIB, 500 * GIB), (None, 512, 4096)):
            budget = Budget(ram_bytes=ram_bytes, context_tokens=context)
            config = EngineConfig(budget=budget, threads=2, **options)
            planned = plan_memory(ModelFootprint(files, config), config, process_bytes=PROCESS_BYTES)
            assert planned.kv_bytes == kv_bytes(files.config, planned.context_tokens, planned.kv_dtype)
            assert planned.model_sizes(config).kv_dtype == planned.kv_dtype
            found.add(planned.kv_dtype)
        return found

    raw = next(model.config for model in PUBLISHED if model.name == "Qwen3-30B-A3B")
    large = assume_pack(FAMILIES["qwen3_moe"].parse_config(raw), "q4", Path("config.json"))
    assert formats(large) == {"f16"}
    assert formats(files) == {"f32"}
    for kv_dtype in get_args(KvDtype):
        assert formats(large, kv_dtype=kv_dtype) == formats(files, kv_dtype=kv_dtype) == {kv_dtype}
    shared = ModelFootprint(large, EngineConfig(budget=Budget(ram_bytes=1), threads=2))
    dense_bytes = 19 * kv_bytes(large.config, 8192, "f32") - 96 * MIB - 8 * shared.slot_bytes
    for more, expected in ((0, "f32"), (-20, "f16")):
        footprint = ModelFootprint(large, EngineConfig(budget=Budget(ram_bytes=1), threads=2))
        footprint.dense_bytes = dense_bytes + more
        assert footprint.kv_dtype == expected
    with pytest.raises(UsageError, match="kv_dtype must be f32, f16 or q8, found 'q4'"):
        EngineConfig(budget=Budget(ram_bytes=1), threads=2, kv_dtype="q4")  # type: ignore[arg-type]


def test_a_plan_that_takes_more_than_the_machine_has_is_refused(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def require(total_bytes: int) -> None:
        limit = MemoryLimit(total_bytes, total_bytes, "a test")
        monkeypatch.setattr("argosy.budget.requirements.resources.memory_limit", lambda: limit)
        config = EngineConfig(budget=Budget(ram_bytes=64 * GIB), threads=2)
        require_memory(ModelFootprint(files, config), config)

    require(held_bytes() + 512 * MIB)  # the budget is larger, and most of it stays unused
    with pytest.raises(DoesNotFit, match=r"of the budget of 64.0 GiB, and there are .* \(a test\)"):
        require(held_bytes())


def test_a_requested_context_is_kept_or_refused_never_shrunk(files: ModelFiles) -> None:
    needed = smallest_budget(files, context=3000)
    assert plan(files, needed, context=3000).context_tokens == 3000
    assert plan(files, needed).context_tokens >= 512


def test_buffers_for_transcoding_are_planned_when_a_file_has_blocks(files: ModelFiles) -> None:
    name, ref = next((name, ref) for name, ref in files.dense.items() if name.endswith(".q"))
    shape = {"rows": 32, "cols": 64}
    blocks = replace(ref, format="q4", landing=Transcoded("Q4_0"), nbytes=32 * 36, **shape)
    with_blocks = replace(files, dense={**files.dense, name: blocks})
    roomy = Budget(ram_bytes=1024 * MIB)
    for readers in (1, 4):
        config = EngineConfig(budget=roomy, threads=2, readers=readers)
        planned = plan_memory(ModelFootprint(with_blocks, config), config, process_bytes=PROCESS_BYTES)
        assert planned.staging_bytes == _native.Store(readers).staging_bytes
        assert ("staging", planned.staging_bytes, "buffers for transcoding") in planned.lines()
    assert plan(files, 1024 * MIB).staging_bytes == 0


def test_resident_experts_take_their_own_bytes_and_not_slots_of_the_largest(files: ModelFiles) -> None:
    everything = plan(files, 1024 * MIB)
    fits = 1024 * MIB - (everything.budget_bytes - everything.total_bytes)
    exact = plan(files, fits, context=everything.context_tokens)
    assert exact.slots.is_resident
    assert exact.expert_bytes == resident_bytes(files.experts)
    assert (
        not plan(files, fits - 1, context=everything.context_tokens, chunk_tokens=256).total_bytes > fits - 1
    )


def test_experts_get_the_memory_that_the_rest_leaves(files: ModelFiles) -> None:
    roomy = plan(files, 1024 * MIB)
    assert roomy.slots.is_resident
    assert roomy.context_tokens == files.config.context_tokens
    assert roomy.kv_bytes == kv_bytes(files.config, 4096, "f32")
    assert roomy.chunk_tokens == 256


def large_model(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    """16 experts of 0.4 MB in each of 8 layers: large enough for working buffers to cost a few of them."""
    directory = tmp_path_factory.mktemp("plan") / "large"
    config = qwen3_moe(
        max_position_embeddings=4096,
        hidden_size=128,
        moe_intermediate_size=512,
        num_experts=16,
        num_experts_per_tok=2,
        num_hidden_layers=8,
    )
    write_model(directory, config, seed=3)
    return open_model(directory)


def test_the_chunk_that_reads_the_fewest_experts_is_chosen(tmp_path_factory: pytest.TempPathFactory) -> None:
    files = large_model(tmp_path_factory)
    all_in_memory = plan(files, 4096 * MIB, chunk_tokens=None)
    assert all_in_memory.slots.is_resident
    assert all_in_memory.chunk_tokens == 512
    for share in (0.05, 0.1, 0.2, 0.5, 0.8):
        budget = all_in_memory.total_bytes - int((1 - share) * all_in_memory.expert_bytes)
        chosen = plan(files, budget, context=4096, chunk_tokens=None)
        least = experts_read(files.config, chosen)
        for chunk in (16, 64, 256, 512, 1024, 2048):
            try:
                other = plan(files, budget, context=4096, chunk_tokens=chunk)
            except DoesNotFit:
                continue
            assert least <= experts_read(files.config, other)


def test_a_long_chunk_pays_off_while_its_buffers_cost_few_slots(files: ModelFiles) -> None:
    """10 B parameters at 4 bits: 2048 experts of 2.65 MB; working buffers of 0.2 MB a token."""
    model = replace(files.config, num_experts=128, experts_per_token=8, layers=files.config.layers[:1] * 16)
    some = plan(files, 1024 * MIB)

    def best_chunk(share: float) -> int:
        def read(chunk: int) -> float:
            own = int(2048 * share - chunk * 0.2 / 2.65)
            slots = replace(some.slots, own=own, num_experts=2048)
            return experts_read(model, replace(some, slots=slots, chunk_tokens=chunk))

        return min((128, 256, 512, 1024, 2048), key=read)

    assert [best_chunk(share) for share in (0.75, 0.5, 0.25, 0.12)] == [1024, 1024, 1024, 512]


def test_layers_that_run_for_the_end_of_a_prompt_alone_read_few_experts(files: ModelFiles) -> None:
    full, seen = (
        replace(files.config.layers[0], mixer=replace(files.config.attention, sliding_window=window))
        for window in (0, 5)
    )
    some = plan(files, 1024 * MIB)
    some = replace(some, slots=replace(some.slots, own=64, num_experts=2048), chunk_tokens=128)
    read = [
        experts_read(replace(files.config, num_experts=128, layers=layers), some)
        for layers in ((full,) * 16, (full,) * 8 + (seen,) * 8)
    ]
    assert read[1] < 0.7 * read[0]  # 65 sweeps of a layer instead of 128, and the answer


def test_a_requested_chunk_is_never_exceeded(files: ModelFiles) -> None:
    for ram_bytes in range(smallest_budget(files), 200 * MIB, 7 * MIB):
        assert plan(files, ram_bytes, chunk_tokens=40).chunk_tokens <= 40


def test_grammars_and_prompt_files_have_room_in_the_plan(files: ModelFiles, tmp_path: Path) -> None:
    def planned(**options: Any) -> MemoryPlan:
        budget = Budget(ram_bytes=1024 * MIB)
        config = EngineConfig(budget=budget, threads=2, chunk_tokens=64, **options)
        return plan_memory(ModelFootprint(files, config), config, process_bytes=PROCESS_BYTES)

    plain = planned()
    assert planned(grammars=True).process_bytes - plain.process_bytes == GRAMMAR_BYTES
    with_files = planned(kv_dir=KvDir(path=tmp_path))
    block_bytes = kv_bytes(files.config, 1, "f32")
    assert with_files.working_bytes - plain.working_bytes == buffer_bytes(block_bytes, 0) > 5 * block_bytes


def kimi_k2(files: ModelFiles) -> ModelFiles:
    """Return a model with 61 layers of 384 experts, each as small as those of `files`."""
    model = files.config
    layers = tuple(model.layers[i % len(model.layers)] for i in range(61))
    records = list(files.experts.values())
    keys = itertools.product(range(61), range(384))
    experts = dict(zip(keys, itertools.cycle(records), strict=False))
    return replace(files, config=replace(model, num_experts=384, layers=layers), experts=experts)


def test_the_bookkeeping_of_experts_is_planned(files: ModelFiles) -> None:
    many = kimi_k2(files)
    needed = smallest_budget(many)
    for ram_bytes in (needed, needed + 50 * MIB, 4096 * MIB):
        planned = plan(many, ram_bytes)
        slots = min(planned.slots.own, planned.slots.num_experts - 1)
        policy_bytes = CachePolicy.bytes(num_slots=slots, num_layers=61, num_experts=384)
        assert planned.bookkeeping_bytes > 10 * MIB
        if planned.slots.is_resident:
            assert planned.bookkeeping_bytes >= resident_bookkeeping_bytes(many.experts)
        else:
            assert planned.bookkeeping_bytes >= bookkeeping_bytes(many.experts) + policy_bytes
        assert ("expert records", planned.bookkeeping_bytes) in [line[:2] for line in planned.lines()]
        assert planned.as_dict()["expert_record_bytes"] == planned.bookkeeping_bytes


def test_page_tables_of_all_mapped_memory_are_planned(files: ModelFiles) -> None:
    for context in (512, 4096):
        planned = plan(files, 1024 * MIB, context=context)
        mapped = planned.total_bytes - PROCESS_BYTES - planned.page_table_bytes
        assert planned.page_table_bytes == page_table_bytes(mapped)
    for mapped in (1, 64 * GIB, 1024 * GIB):
        assert mapped / 512 < page_table_bytes(mapped) < mapped / 500 + MIB


def test_one_more_slot_would_not_fit(files: ModelFiles) -> None:
    needed = smallest_budget(files)
    for ram_bytes in range(needed, needed + MIB, 40_000):
        planned = plan(files, ram_bytes, context=512, chunk_tokens=16)
        if not planned.slots.is_resident:
            assert ram_bytes - planned.total_bytes < planned.slots.slot_bytes + 16 * 1024


def test_answers_kept_for_replay_are_in_the_total_and_in_the_refusal(
    files: ModelFiles,
) -> None:
    def planned(ram_bytes: int, replay_bytes: int) -> MemoryPlan:
        config = EngineConfig(
            budget=Budget(ram_bytes=ram_bytes), threads=2, claims=(Claim("replay_bytes", replay_bytes),)
        )
        return plan_memory(ModelFootprint(files, config), config, process_bytes=PROCESS_BYTES)

    needed = smallest_budget(files)
    assert not any(name == "replay" for name, _, _ in planned(needed, 0).lines())
    with pytest.raises(DoesNotFit, match=r"\+  replay 5\.0 MiB") as refused:
        planned(needed, 5 * MIB)
    with_replay = refused.value.facts["needed_bytes"]
    assert isinstance(with_replay, int)
    with_room = planned(with_replay, 5 * MIB)
    more_tables = with_room.page_table_bytes - planned(needed, 0).page_table_bytes
    assert with_replay - needed == 5 * MIB + more_tables
    assert with_room.total_bytes == with_replay == sum(nbytes for _, nbytes, _ in with_room.lines())
    assert ("replay", 5 * MIB) in [line[:2] for line in with_room.lines()]
    assert with_room.as_dict()["replay_bytes"] == 5 * MIB


def test_invalid_settings_are_refused_by_name(tmp_path: Path) -> None:
    budget, kv_dir = Budget(ram_bytes=MIB), KvDir(path=tmp_path)
    for values, sentence in (
        ({"max_waiting": -1}, "max_waiting must be at least 0, found -1"),
        ({"draft_tokens": -1}, "draft_tokens must be at least 0, found -1"),
        ({"threads": 10**11}, "threads must be at most 1024, found 100000000000"),
        ({"max_sequences": 10**11}, "max_sequences must be at most 1024, found 100000000000"),
        ({"threads": "2"}, "threads must be a whole number, found '2'"),
        ({"readers": None}, "readers must be a whole number, found None"),
        ({"chunk_tokens": 1.5}, "chunk_tokens must be a whole number, found 1.5"),
        (
            {"kv_dir": kv_dir, "prefix_reuse": False},
            "kv_dir keeps prefixes for reuse, and prefix_reuse is off",
        ),
    ):
        with pytest.raises(UsageError, match=sentence):
            EngineConfig(**{"budget": budget, "threads": 1, **values})
    for values, sentence in (
        ({"ttl_s": 0}, "ttl_s must be above zero"),
        ({"ttl_s": float("nan")}, "ttl_s must be above zero"),
        ({"max_bytes": 0}, "max_bytes must be at least 1"),
    ):
        with pytest.raises(UsageError, match=sentence):
            KvDir(path=tmp_path, **values)


def test_claims_on_a_part_are_added_up_for_what_the_model_takes() -> None:
    claims = (
        Claim("request_bytes", 5),
        Claim("request_bytes", 20, when="media"),
        Claim("request_bytes", 300, when="video"),
        Claim("group_bytes", 7000),
    )
    assert claimed(claims, "request_bytes") == 5
    assert claimed(claims, "request_bytes", takes_media=True) == 25
    assert claimed(claims, "request_bytes", takes_media=True, takes_video=True) == 325
    assert [claimed(claims, part) for part in ("group_bytes", "routing_bytes")] == [7000, 0]


def test_a_claim_names_a_part_of_the_budget_and_no_negative_size() -> None:
    with pytest.raises(UsageError, match="replay_bytes must be at least 0, found -1"):
        Claim("replay_bytes", -1)
    with pytest.raises(
        UsageError, match="no part of the budget is named requests; known: replay_bytes, request"
    ):
        Claim("requests", 1)


def test_a_claim_of_the_process_is_part_of_the_process(
    files: ModelFiles,
) -> None:
    def planned(*claims: Claim) -> MemoryPlan:
        config = EngineConfig(budget=Budget(ram_bytes=GIB), threads=2, claims=claims)
        return plan_memory(ModelFootprint(files, config), config, process_bytes=PROCESS_BYTES)

    assert planned(Claim("process_bytes", MIB)).process_bytes == planned().process_bytes + MIB
