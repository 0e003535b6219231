"""A forecast reuses the engine's own memory plan, and its verdicts, budgets and speeds fit together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from argosy.budget.footprint import ModelFootprint, kv_bytes
from argosy.budget.planner import plan_memory, plan_with_media, quarter_of_experts
from argosy.config import DEMO, GIB, Budget, EngineConfig
from argosy.errors import DoesNotFit, UsageError
from argosy.experts.hit_rate import ReuseGaps, WorkingSet
from argosy.experts.recording import OpenRecorder
from argosy.forecast import planning
from argosy.forecast.assumed import assume_pack
from argosy.forecast.forecast import Forecaster
from argosy.machine.rates import guess
from argosy.model.encoders.reading import EncoderFiles
from argosy.model.families import FAMILIES, open_model
from argosy.model.work import work_of
from argosy.observe.recorder import Recorder
from argosy.open.models import configure
from tests.families.published import PUBLISHED

REFERENCE = Path(__file__).parents[1] / "models" / "reference"
PROCESS_BYTES = 100 << 20


def config(threads: int = 16, **options: object) -> EngineConfig:
    return EngineConfig(budget=Budget(ram_bytes=1), threads=threads, **options)  # type: ignore[arg-type]


def forecaster(name: str = "Qwen3-30B-A3B", working_set: WorkingSet | None = None) -> Forecaster:
    raw = next(model.config for model in PUBLISHED if model.name == name)
    files = assume_pack(FAMILIES[raw["model_type"]].parse_config(raw), "q4", Path("config.json"))
    rates = guess("AMD Ryzen 9 7950X", 16, drive_bytes_per_s=6e9)
    return Forecaster(files, config(), rates, working_set=working_set, process_bytes=PROCESS_BYTES)


@pytest.fixture(scope="module")
def qwen() -> Forecaster:
    return forecaster()


def test_memory_is_that_of_the_engines_plan(qwen: Forecaster) -> None:
    found = qwen.forecast(12 * GIB, with_curve=False).plan
    raw = next(model.config for model in PUBLISHED if model.name == "Qwen3-30B-A3B")
    files = assume_pack(FAMILIES["qwen3_moe"].parse_config(raw), "q4", Path("config.json"))
    same = replace(config(), budget=Budget(ram_bytes=12 * GIB))
    assert found == plan_memory(ModelFootprint(files, same), same, process_bytes=PROCESS_BYTES)


def test_the_smallest_budget_fits_and_one_byte_less_does_not(qwen: Forecaster) -> None:
    smallest = qwen.forecast(1, with_curve=False).smallest_bytes
    assert qwen.plan(smallest).total_bytes <= smallest
    with pytest.raises(DoesNotFit):
        qwen.plan(smallest - 1)


def test_rows_of_tables_take_a_part_of_each_budget() -> None:
    deepseek = forecaster("DeepSeek-V4.1-Flash")
    found = deepseek.forecast(1, with_curve=False)
    assert deepseek.plan(found.smallest_bytes).table_cache_bytes > 0
    assert deepseek.plan(found.resident_bytes).slots.is_resident
    assert found.resident_bytes < 325e9


def test_verdicts_follow_the_budget() -> None:
    kimi = forecaster("Kimi-K2")
    found = {gib: kimi.forecast(gib * GIB, with_curve=False) for gib in (8, 16, 64, 700)}

    assert [one.verdict for one in found.values()] == ["no", "thrashes", "streams", "resident"]
    assert found[8].plan is None
    assert found[8].decode == ()
    assert found[8].refusal is not None
    # The experts of one token: 60 layers of 8.
    assert found[16].plan is not None
    assert found[16].plan.slots.own < 480
    assert found[16].decode[0].hit_rate.likely < 0.1
    speeds = [one.decode[0].tokens_per_s.likely for one in found.values() if one.decode]
    assert speeds == sorted(speeds)
    assert all(one.resident_bytes == found[8].resident_bytes for one in found.values())


def test_the_knee_is_the_smallest_budget_with_nine_tenths_of_the_speed() -> None:
    found = forecaster("DeepSeek-V3").forecast(64 * GIB)
    speeds = {point.budget_bytes: point.tokens_per_s for point in found.curve}
    budgets = list(speeds)
    assert budgets == sorted(budgets)
    assert (budgets[0], budgets[-1]) == (found.smallest_bytes, found.resident_bytes)
    assert found.knee_bytes is not None
    assert speeds[found.knee_bytes] >= 0.9 * speeds[budgets[-1]]
    assert all(speed < 0.9 * speeds[budgets[-1]] for at, speed in speeds.items() if at < found.knee_bytes)
    assert found.knee_bytes < found.resident_bytes


def test_prompts_longer_than_the_context_are_named(qwen: Forecaster) -> None:
    found = qwen.forecast(12 * GIB, with_curve=False)
    assert found.plan is not None
    assert found.plan.context_tokens == 8192
    assert [one.num_tokens for one in found.prompts] == [64, 1024]
    assert found.longer_prompts == (16_384,)
    assert found.prompts[0].seconds.likely < found.prompts[1].seconds.likely


def test_a_recorded_working_set_replaces_the_prior(qwen: Forecaster) -> None:
    gaps = ReuseGaps(48, 128)
    gaps.count(np.tile(np.arange(8), (100, 48, 1)))  # the same eight experts again and again
    recorded = WorkingSet.of([gaps], layers=range(48), num_experts=128, experts_per_token=8)
    found = forecaster(working_set=recorded).forecast(4 * GIB, with_curve=False)
    typical = qwen.forecast(4 * GIB, with_curve=False)
    assert found.decode[0].hit_rate.likely == pytest.approx(1.0, abs=0.01)
    assert typical.decode[0].hit_rate.likely < 0.8
    assert found.decode[0].tokens_per_s.likely > typical.decode[0].tokens_per_s.likely


def test_work_counts_what_a_token_reads() -> None:
    files = open_model(REFERENCE / "deepseek_v3_plain")
    work, model = work_of(files, "q8"), files.config
    assert work.num_moe_layers == len(model.moe_layers)
    embedding = files.dense["embed"]
    assert work.dense_bytes == sum(ref.landed_bytes for ref in files.dense.values()) - embedding.landed_bytes
    assert work.record_bytes * len(files.experts) == files.expert_bytes
    bytes_at_100, _ = work.keys_values(100)
    assert bytes_at_100 == 100 * kv_bytes(model, 1600, "q8") / 1600


def test_layers_with_windows_read_no_more_than_their_window() -> None:
    raw = next(model.config for model in PUBLISHED if model.name == "gpt-oss-20b")
    files = assume_pack(FAMILIES["gpt_oss"].parse_config(raw), "q4", Path("config.json"))
    work = work_of(files, "f32")
    near, far = (work.keys_values(context)[0] for context in (128, 1280))
    assert far / near == pytest.approx((10 + 1) / 2)  # half of the layers see 128 positions


def test_a_picture_is_encoded_and_then_read_as_a_prompt() -> None:
    files = open_model(REFERENCE.parent / "reference_seeing" / "qwen3_vl_moe")
    rates = replace(guess("AMD Ryzen 9 7950X", 16), encoder_operations=1e9)
    settings = config(image_tokens=256)
    found = Forecaster(files, settings, rates, process_bytes=PROCESS_BYTES)
    plan = found.plan(4 * GIB)
    picture = found.picture(plan)

    assert picture is not None
    towers = found._footprint.encoders["picture"]
    assert isinstance(towers, EncoderFiles)
    work = found._footprint.picture_work(768, 1024)
    assert work is not None
    assert picture.num_positions == work[0] <= 256
    assert picture.encoder_s == work[1] / 1e9
    prompt = found.prompt(plan, picture.num_positions + 32)
    assert picture.seconds.likely == pytest.approx(picture.encoder_s + prompt.seconds.likely)
    assert picture.seconds.low < picture.seconds.likely < picture.seconds.high
    assert picture.bound == "encoder"
    assert found.forecast(4 * GIB, with_curve=False).picture == picture
    text_only = Forecaster(files, config(media=False), rates, process_bytes=PROCESS_BYTES)
    assert text_only.forecast(4 * GIB, with_curve=False).picture is None


def test_the_demo_model_is_planned_as_it_runs_without_a_budget() -> None:
    files = open_model(REFERENCE / "qwen3_moe_plain")
    subject = planning.Subject(name=DEMO, files=files, place="files", local_bytes=PROCESS_BYTES)
    place = planning.find_place(planning.HERE)
    found, budget_bytes = planning.forecaster(subject, place)
    forecast = found.forecast(budget_bytes)

    settings = configure(DEMO, files)
    _, runs = plan_with_media(ModelFootprint(files, settings), settings, process_bytes=PROCESS_BYTES)
    assert forecast.plan is not None
    assert forecast.plan.slots.own == runs.slots.own == quarter_of_experts(files) < len(files.experts)
    assert forecast.plan.context_tokens == runs.context_tokens
    assert forecast.plan.chunk_tokens == runs.chunk_tokens
    assert forecast.expert_slots == runs.slots.own
    assert forecast.smallest_bytes < forecast.plan.total_bytes < forecast.resident_bytes
    assert forecast.curve[-1].num_slots == len(files.experts)

    given, budget_bytes = planning.forecaster(subject, place, memory="4GiB")
    assert given.forecast(budget_bytes, with_curve=False).verdict == "resident"


def test_a_recorder_is_planned_if_there_is_one() -> None:
    files = open_model(REFERENCE / "qwen3_moe_plain")
    subject = planning.Subject(name="x", files=files, place="files", local_bytes=PROCESS_BYTES)

    def routing_bytes(recorder: OpenRecorder | None) -> int:
        found, budget_bytes = planning.forecaster(
            subject, planning.find_place(planning.HERE), memory="2GiB", recorder=recorder
        )
        return found.plan(budget_bytes).claimed["routing_bytes"]

    assert routing_bytes(None) == 0
    assert routing_bytes(lambda files, config: Recorder(files.config, config)) > 1000


def test_a_working_set_of_another_model_is_refused() -> None:
    files = open_model(REFERENCE / "mixtral_plain")
    other = WorkingSet.prior([0, 1], num_experts=64, experts_per_token=2)
    with pytest.raises(UsageError, match="working set belongs to a model with 2 layers of 64 experts"):
        planning.forecaster(
            planning.Subject(name="x", files=files, place="assumed"),
            planning.find_place(planning.HERE),
            working_set=other,
        )


def test_servers_have_the_limits_and_the_speed_of_the_plan(qwen: Forecaster) -> None:
    plan = qwen.plan(12 * GIB)
    fast, likely, slow = qwen.servers(plan)
    assert (likely.chunk_tokens, likely.context_tokens) == (plan.chunk_tokens, plan.context_tokens)
    assert (likely.max_sequences, likely.max_waiting, likely.block_tokens) == (8, None, 16)
    for streams in (1, 4, 8):
        low, middle, high = qwen.decode(plan, streams, context=480).step_s
        found = [one.step_times.decode_s(streams, 480) for one in (fast, likely, slow)]
        assert found == pytest.approx([low, middle, high], rel=0.05)


def test_a_server_runs_no_more_sequences_than_have_a_recurrent_state() -> None:
    next_model = forecaster("Qwen3-Next-80B-A3B")
    smallest = next_model.forecast(1, with_curve=False).smallest_bytes
    plan = next_model.plan(smallest)
    assert plan.num_states == 1
    assert next_model.servers(plan)[1].max_sequences == 1
