"""Predicted seconds follow from bytes, operations and rates; each case is worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, get_args

import pytest

from argosy.config import KvDtype
from argosy.experts.hit_rate import WorkingSet
from argosy.forecast.speed import predict_decode, predict_prompt
from argosy.machine.rates import CPU_FAMILIES, GUESSED_SPREAD, NUM_TOKENS, Rates, guess, unhidden_waits
from argosy.model.work import Attention, Work
from argosy.strict_json import JsonError

GB = 10**9
MEASURED = replace(
    guess("AMD EPYC", 2, drive_bytes_per_s=2e9),
    memory_bytes_per_s=10e9,
    layer_s=1e-4,
    streamed_layer_s=2e-4,
    missing_layer_s=1e-4,
    missing_layer_s_per_byte=5e-11,
    miss_s=3e-5,
    step_s=1e-3,
    drive_latency_s=1e-4,
    spread=1.1,
    waits=dict.fromkeys(guess("", 1).waits, (1.25,) * len(NUM_TOKENS)),
    read_cpu_s_per_byte=1e-11,
    transcode_cpu_s_per_byte=4e-10,
    operations=dict.fromkeys(guess("", 1).operations, (1e11,) * len(NUM_TOKENS)),
    keys_values=dict.fromkeys(get_args(KvDtype), 0.5),
    attention_operations=dict.fromkeys(get_args(KvDtype), 1e11),
    prompt_attention_operations=dict.fromkeys(get_args(KvDtype), 1e11),
)
# Ten layers, 4 of 32 experts of 2 MB; dense weights of 100 MB.
WORK = Work(
    num_layers=10,
    num_moe_layers=10,
    num_experts=32,
    experts_per_token=4,
    dense={"q8": (100e6, 94e6)},
    head={},
    expert={"q4": (2e6, 3.6e6)},
    record_bytes=2e6,
    piece_bytes=2e6,
    attention=(Attention(0, 4000.0, 8000.0), Attention(128, 1000.0, 2000.0)),
)
PRIOR = WorkingSet.prior(range(10), num_experts=32, experts_per_token=4)
ALL = 320


def product_s(nbytes: float, parameters: float, tokens: float = 1) -> float:
    """Seconds of a product with the rates of MEASURED."""
    return 1.25 * nbytes / 10e9 + 2 * parameters * tokens / 1e11


DENSE_S, EXPERT_S = product_s(100e6, 94e6), product_s(2e6, 3.6e6)


def test_a_resident_token_reads_dense_weights_experts_and_keys_and_values() -> None:
    found = predict_decode(WORK, MEASURED, PRIOR, num_slots=ALL, context=1000)

    assert found.parts["dense weights"] == pytest.approx(DENSE_S)
    assert found.parts["experts in memory"] == pytest.approx(10 * 4 * EXPERT_S)
    assert found.parts["keys and values"] == pytest.approx((1000 * 4000 + 128 * 1000) / 5e9)
    assert found.parts["overhead"] == pytest.approx(10 * 1e-4 + 1e-3)
    assert found.parts["waiting for the drive"] == 0
    assert found.tokens_per_s.likely == pytest.approx(1 / sum(found.parts.values()))
    assert found.tokens_per_s.high == pytest.approx(1.1 * found.tokens_per_s.likely)
    assert (found.bound, found.hit_rate.likely) == ("dense weights", 1.0)
    assert found.drive_bytes_per_token.high == 0


def test_misses_wait_for_the_drive() -> None:
    found = predict_decode(WORK, MEASURED, PRIOR, num_slots=80, context=1)
    rate = PRIOR.hit_rate(80)

    assert found.hit_rate.likely == pytest.approx(rate)
    assert found.drive_bytes_per_token.likely == pytest.approx(40 * (1 - rate) * 2e6)
    # Each miss takes 1 ms on the drive; half of what can hide it does.
    before = (sum(found.parts[name] for name in ("dense weights", "keys and values"))) / 10
    missing = 1 - rate**4  # layers with a miss, the first of which takes 0.2 ms, and each further one 0.03 ms
    decisions = missing * (1e-4 + 2e6 * 5e-11) + (4 * (1 - rate) - missing) * 3e-5
    hidden = (before / 2 + 2e-4 + decisions + 3 * EXPERT_S) / 2
    expected = 0.0
    for misses, ways in ((1, 4), (2, 6), (3, 4), (4, 1)):
        chance = ways * (1 - rate) ** misses * rate ** (4 - misses)
        expected += 10 * chance * max(0.0, 1e-4 + misses * 1e-3 - hidden)
    assert found.parts["waiting for the drive"] == pytest.approx(expected)
    assert found.parts["overhead"] == pytest.approx(1e-3 + 10 * (1e-4 + 2e-4 + decisions))
    assert found.tokens_per_s.low < found.tokens_per_s.likely < found.tokens_per_s.high


def test_the_drive_bounds_a_small_cache_and_memory_a_large_one() -> None:
    slow = replace(MEASURED, drive=((1 << 20, 0.2e9),))
    assert predict_decode(WORK, slow, PRIOR, num_slots=40, context=1).bound == "waiting for the drive"
    assert predict_decode(WORK, slow, PRIOR, num_slots=ALL, context=1).bound == "dense weights"
    assert predict_decode(WORK, slow, PRIOR, num_slots=ALL, context=10**6).bound == "keys and values"


def test_heads_that_share_keys_take_the_time_of_their_arithmetic() -> None:
    slow = replace(MEASURED, attention_operations=MEASURED.attention_operations | {"f16": 4e9})  # type: ignore[operator]
    found = predict_decode(WORK, slow, PRIOR, num_slots=ALL, context=1000)
    assert found.parts["keys and values"] == pytest.approx((1000 * 8000 + 128 * 2000) / 4e9)
    other = predict_decode(replace(WORK, kv_dtype="f32"), slow, PRIOR, num_slots=ALL, context=1000)
    assert other.parts["keys and values"] == pytest.approx((1000 * 4000 + 128 * 1000) / 5e9)
    # A prompt's tokens share passes over keys, which has a rate of its own.
    prompts = (
        predict_prompt(WORK, rates, PRIOR, num_slots=ALL, num_tokens=64, chunk_tokens=64)
        for rates in (MEASURED, slow)
    )
    assert next(prompts) == next(prompts)


def test_a_machine_that_cannot_read_and_compute_at_once_waits_longer() -> None:
    alone, half, beside = (
        predict_decode(WORK, replace(MEASURED, overlap=overlap), PRIOR, num_slots=80, context=1)
        for overlap in (0.0, 0.5, 1.0)
    )
    assert alone.tokens_per_s.likely < half.tokens_per_s.likely < beside.tokens_per_s.likely
    missed = 40 * (1 - PRIOR.hit_rate(80))
    assert alone.parts["waiting for the drive"] == pytest.approx(
        missed * 1e-3 + 10 * (1 - PRIOR.hit_rate(80) ** 4) * 1e-4
    )
    # Records that are transcoded as they land have a rate of their own.
    packed = replace(MEASURED, overlap=1.0, transcoding_overlap=0.0)
    assert predict_decode(replace(WORK, is_transcoded=True), packed, PRIOR, num_slots=80, context=1) == alone
    assert predict_decode(WORK, packed, PRIOR, num_slots=80, context=1) == beside
    # The range has the other possibilities.
    assert alone.tokens_per_s.high > half.tokens_per_s.likely
    assert beside.tokens_per_s.low < half.tokens_per_s.likely


def test_rates_of_a_moment_change_arithmetic_and_memory_and_not_the_drive() -> None:
    rates = MEASURED
    slower = rates.at(rates.memory_bytes_per_s / 4, rates.int8_operations / 2)
    assert (slower.memory_bytes_per_s, slower.int8_operations) == (2.5e9, rates.int8_operations / 2)
    assert slower.product_s("q4", 2e6, 3.6e6, 1) == pytest.approx(1.25 * 2e6 / 2.5e9 + 2 * 3.6e6 / 5e10)
    assert slower.prompt_attention_s("q8", 1e9) == pytest.approx(2 * rates.prompt_attention_s("q8", 1e9))
    assert slower.misses_overhead_s(4, 2, 2e6) == pytest.approx(2 * rates.misses_overhead_s(4, 2, 2e6))
    assert slower.drive_rate(2e6) == rates.drive_rate(2e6)
    assert rates.at(rates.memory_bytes_per_s, rates.int8_operations) == rates


def test_several_streams_share_weights_and_not_keys_and_values() -> None:
    one, four = (
        predict_decode(WORK, MEASURED, PRIOR, num_slots=ALL, context=1000, streams=streams)
        for streams in (1, 4)
    )
    assert four.parts["dense weights"] == pytest.approx(product_s(100e6, 94e6, 4))
    assert four.parts["keys and values"] == pytest.approx(4 * one.parts["keys and values"])
    assert 1 < four.parts["experts in memory"] / one.parts["experts in memory"] < 4
    assert one.tokens_per_s.likely < four.tokens_per_s.likely < 4 * one.tokens_per_s.likely
    assert four.step_s.likely == pytest.approx(4 / four.tokens_per_s.likely)


def test_layers_with_a_reach_run_only_for_the_end_of_a_prompt() -> None:
    limited = replace(WORK, reaches=(0,) * 5 + (300,) * 5)
    assert limited.runs(512, 0) == {512: 0.5, 300: 0.5}
    assert limited.runs(512, 200) == {512: 0.5, 100: 0.5}
    assert limited.runs(512, 300) == {512: 0.5}
    whole, found = (
        predict_prompt(work, MEASURED, PRIOR, num_slots=160, num_tokens=2048, chunk_tokens=512)
        for work in (WORK, limited)
    )
    assert found.drive_bytes.likely == pytest.approx(whole.drive_bytes.likely * (5 * 4 + 5) / 40, rel=0.01)
    assert whole.seconds.likely / 2 < found.seconds.likely < 0.7 * whole.seconds.likely


def test_a_prompt_sweeps_once_for_each_chunk_and_reads_beside_its_products() -> None:
    sweep = WORK.num_moe_layers * WORK.num_experts * WORK.record_bytes
    for num_tokens, sweeps in ((1024, 1), (2048, 2)):
        found = predict_prompt(WORK, MEASURED, PRIOR, num_slots=160, num_tokens=num_tokens, chunk_tokens=1024)
        assert found.drive_bytes.likely == pytest.approx(sweeps * sweep / 2, rel=0.01)
    slow = replace(MEASURED, drive=((1 << 20, 0.01e9),))
    found = predict_prompt(WORK, slow, PRIOR, num_slots=160, num_tokens=64, chunk_tokens=64)
    assert found.bound == "waiting for the drive"
    assert found.seconds.likely == pytest.approx(sweep / 2 / 0.01e9, rel=0.05)
    beside = predict_prompt(WORK, MEASURED, PRIOR, num_slots=160, num_tokens=1024, chunk_tokens=1024)
    products = 2 * 1024 * (94e6 + 10 * 4 * 3.6e6) / 1e11 + sum(
        (8000 * 512.5 + 2000 * 128) / 1e11 for _ in range(1024)
    )
    products += 1.25 * (100e6 + 10 * 32 * 2e6) / 10e9
    reads = sweep / 2 / 2e9  # less than the products, which hide them
    decisions = 10 * (2e-4 + 2e-4 + 15 * 3e-5)
    lent = sweep / 2 * 1e-11 / 2  # of two cores
    expected = products + 2e-3 + decisions + lent
    assert reads < products
    assert beside.seconds.likely == pytest.approx(expected, rel=0.01)
    slow_end = 1.1 * (expected + reads / 2)  # hiding half of it
    assert beside.seconds.high == pytest.approx(slow_end, rel=0.02)
    transcoded = replace(WORK, is_transcoded=True)
    longer = predict_prompt(
        transcoded, MEASURED, PRIOR, num_slots=160, num_tokens=1024, chunk_tokens=1024
    ).seconds.likely
    assert longer - beside.seconds.likely == pytest.approx(sweep / 2 * (4e-10 - 1e-11) / 2)
    resident = predict_prompt(WORK, MEASURED, PRIOR, num_slots=ALL, num_tokens=4096, chunk_tokens=512)
    products = 2 * 4096 * (94e6 + 10 * 4 * 3.6e6) / 1e11 + 8 * 1.25 * (100e6 + 10 * 32 * 2e6) / 10e9
    attention = sum(8000 * n + 2000 * min(n, 128) for n in range(4096)) / 1e11
    assert resident.seconds.likely == pytest.approx(products + attention + 8 * 2e-3, rel=0.02)
    assert resident.seconds.low < resident.seconds.likely < resident.seconds.high


# Mid Q4_0 of benchmarks/make_checkpoint.py: 16 layers, 8 of 128 experts of 2.65 MB, 209 MB of dense weights. Two cores
# of Zen 5 read memory at 88 GB/s and the drive at 4.1 (docs/performance.md).
MID = Work(
    num_layers=16,
    num_moe_layers=16,
    num_experts=128,
    experts_per_token=8,
    dense={"q4": (209e6, 372e6)},
    head={},
    expert={"q4": (2.65e6, 4.72e6)},
    record_bytes=2.65e6,
    piece_bytes=2.65e6,
    attention=(Attention(0, 65_536.0, 131_072.0),),
    is_transcoded=True,
)
ZEN_5 = replace(
    guess("AMD EPYC", 2, drive_bytes_per_s=4.1e9),
    memory_bytes_per_s=88e9,
    operations=(_OPERATIONS := dict.fromkeys(guess("", 1).operations, (0.55 * 2.2e12,) * len(NUM_TOKENS))),
    waits=unhidden_waits(_OPERATIONS, 88e9),
)


@pytest.mark.parametrize(
    ("num_slots", "hit_rate", "measured"), [(2048, 1.0, 115.2), (1024, 0.852, 36.1), (512, 0.61, 24.0)]
)
def test_a_machine_measured_earlier_is_predicted(num_slots: int, hit_rate: float, measured: float) -> None:
    prior = WorkingSet.prior(range(16), num_experts=128, experts_per_token=8)
    found = predict_decode(MID, ZEN_5, prior, num_slots=num_slots, context=100, hit_rate=hit_rate)
    assert found.tokens_per_s.low < measured < found.tokens_per_s.high
    assert found.tokens_per_s.likely == pytest.approx(measured, rel=0.3)
    prompt = predict_prompt(MID, ZEN_5, prior, num_slots=512, num_tokens=512, chunk_tokens=512)
    assert 512 / prompt.seconds.likely == pytest.approx(346, rel=0.15)


def test_a_model_without_routed_experts_is_dense_weights_alone() -> None:
    dense = replace(WORK, num_moe_layers=0, num_experts=0, expert={})
    nothing = WorkingSet.prior((), num_experts=1, experts_per_token=1)
    found = predict_decode(dense, MEASURED, nothing, num_slots=0, context=1, streams=2)
    assert (found.hit_rate.likely, found.parts["experts in memory"]) == (1.0, 0.0)
    prompt = predict_prompt(dense, MEASURED, nothing, num_slots=0, num_tokens=100, chunk_tokens=50)
    assert prompt.drive_bytes == (0, 0, 0)


def test_products_compute_and_wait_for_memory_at_rates_of_their_number_of_tokens() -> None:
    rates = replace(
        MEASURED,
        operations={**MEASURED.operations, "q4": (1e9, 2e9, 4e9, 4e9, 4e9, 8e9)},
        waits={**MEASURED.waits, "q4": (0.8, 0.6, 0.4, 0.4, 0.4, 0.1)},
    )
    for tokens, operations, waits in (
        (1, 1e9, 0.8),
        (2**1.5, 3e9, 0.5),  # half way between 2 and 4
        (64, 8e9, 0.1),
        (256, 8e9, 0.1),
    ):
        seconds = tokens * 2e6 / operations + waits * 8e6 / 10e9
        assert rates.product_s("q4", 8e6, 1e6, tokens) == pytest.approx(seconds)
        # Memory that is twice as fast halves the waiting and nothing else.
        faster = replace(rates, memory_bytes_per_s=20e9)
        assert seconds - faster.product_s("q4", 8e6, 1e6, tokens) == pytest.approx(waits * 8e6 / 20e9)


def test_a_guess_hides_the_shorter_of_arithmetic_and_memory() -> None:
    rates = guess("AMD EPYC 7B13", 8)
    nbytes, parameters = 18e6, 32e6  # q4
    read_s = nbytes / 0.85 / rates.memory_bytes_per_s
    for tokens, operations in zip(NUM_TOKENS, rates.operations["q4"], strict=True):
        longer = max(read_s, 2 * parameters * tokens / operations)
        assert rates.product_s("q4", nbytes, parameters, tokens) == pytest.approx(longer, rel=1e-3)


def test_experts_differ_in_their_numbers_of_tokens() -> None:
    # Four of 32 experts for each of 8 tokens: an expert that is asked for has more than one in the mean.
    bent = replace(MEASURED, operations={**MEASURED.operations, "q4": (8e9, 8e9, 8e9, 8e9, 8e9, 8e9)})
    asked = float(PRIOR.distinct_in(8).mean())
    found = predict_prompt(WORK, bent, PRIOR, num_slots=ALL, num_tokens=8, chunk_tokens=8)
    of_means = 10 * asked * bent.product_s("q4", 2e6, 3.6e6, 32 / asked)
    likely = predict_prompt(
        WORK, replace(bent, spread=1.0), PRIOR, num_slots=ALL, num_tokens=8, chunk_tokens=8
    )
    # Bound by arithmetic, seconds are proportional to tokens, so their distribution does not matter.
    assert likely.seconds.likely == found.seconds.likely
    rest = predict_prompt(replace(WORK, expert={}), bent, PRIOR, num_slots=ALL, num_tokens=8, chunk_tokens=8)
    assert found.seconds.likely - rest.seconds.likely == pytest.approx(of_means, rel=1e-3)
    # Where some experts are bound by memory and others by arithmetic, it does: none is faster than both bounds.
    half = replace(bent, operations=(bound := {**MEASURED.operations, "q4": (50e9,) * len(NUM_TOKENS)}))
    half = replace(half, waits={**MEASURED.waits, "q4": unhidden_waits(bound, 10e9)["q4"]})
    found = predict_prompt(WORK, half, PRIOR, num_slots=ALL, num_tokens=8, chunk_tokens=8)
    of_means = 10 * asked * half.product_s("q4", 2e6, 3.6e6, 32 / asked)
    assert found.seconds.likely - rest.seconds.likely > 1.02 * of_means


def test_only_the_last_token_of_a_prompt_needs_the_head() -> None:
    with_head = replace(WORK, head={"q8": (80e6, 75e6)})
    seconds = product_s(80e6, 75e6)
    for tokens in (1, 100):
        prompts = [
            predict_prompt(
                work, MEASURED, PRIOR, num_slots=ALL, num_tokens=tokens, chunk_tokens=100
            ).seconds.likely
            for work in (with_head, WORK)
        ]
        assert prompts[0] - prompts[1] == pytest.approx(seconds)
    answers = [
        predict_decode(work, MEASURED, PRIOR, num_slots=ALL, context=1).parts["dense weights"]
        for work in (with_head, WORK)
    ]
    assert answers[0] - answers[1] == pytest.approx(seconds)


def test_small_records_do_not_reach_the_drives_rate() -> None:
    rates = replace(MEASURED, drive=((1 << 18, 1e9), (1 << 20, 2e9), (1 << 22, 3e9)))
    assert rates.drive_rate(1 << 17) == 0.5e9
    assert rates.drive_rate(1 << 20) == 2e9
    assert rates.drive_rate((1 << 20) + 3 * (1 << 19)) == 2.5e9
    assert rates.drive_rate(1 << 24) == 3e9


@pytest.mark.parametrize(
    ("cpu", "cores", "family"),
    [
        ("AMD EPYC 9654 96-Core Processor", 96, "AMD EPYC, Zen 4 or 5"),
        ("AMD EPYC 7B13", 8, "AMD EPYC, Zen 2 or 3"),
        ("Intel(R) Xeon(R) Platinum 8488C", 16, "Intel Xeon, Sapphire Rapids or later"),
        ("Intel(R) Xeon(R) Platinum 8375C CPU @ 2.90GHz", 16, "Intel Xeon, Ice Lake"),
        ("AMD Ryzen 9 7950X 16-Core Processor", 16, "AMD Ryzen 7000 or later"),
        ("AMD Ryzen AI MAX+ 395 w/ Radeon 8060S", 16, "AMD Ryzen AI Max"),
        ("AMD Ryzen 5 3600 6-Core Processor", 6, "AMD Ryzen, older"),
        ("13th Gen Intel(R) Core(TM) i7-13700K", 16, "Intel Core, 12th generation or later"),
        ("Intel(R) Core(TM) i7-8700 CPU @ 3.20GHz", 6, "Intel Core, older"),
        ("Neoverse-V2", 8, "AWS Graviton"),
        ("something else", 4, "an unknown processor"),
    ],
)
def test_a_guess_names_the_kind_of_processor_and_says_that_it_guesses(
    cpu: str, cores: int, family: str
) -> None:
    rates = guess(cpu, cores)
    assert family in rates.source
    assert rates.source.startswith("guessed")
    assert "drive unknown" in rates.source
    assert not rates.is_measured
    assert rates.spread == GUESSED_SPREAD
    assert rates.memory_bytes_per_s <= max(one.memory_gb_per_s for one in CPU_FAMILIES) * GB


def test_rates_are_read_back() -> None:
    assert Rates.from_value(json.loads(json.dumps(MEASURED.as_dict()))) == MEASURED


@pytest.mark.parametrize(
    "change",
    [
        {"format": "x"},
        {"cores": 0},
        {"memory_bytes_per_s": -1},
        {"memory_bytes_per_s": True},
        {"waits": {}},
        {"waits": dict.fromkeys(MEASURED.waits, (0.0,) * len(NUM_TOKENS))},
        {"operations": dict.fromkeys(MEASURED.operations, 1e11)},
        {"operations": dict.fromkeys(MEASURED.operations, (1e11,))},
        {"drive": []},
        {"drive": [[1, 2], [1, 3]]},
        {"drive": [[2, 1e9], [1, 1e9]]},
        {"drive": [[1]]},
        {"source": None},
        {"more": 1},
        {"step_s": 1e300},
        {"encoder_operations": 0},
        {"attention_operations": 1e11},
        {"attention_operations": {"f32": 1e11}},
        {"overlap": 1.5},
        {"overlap": -0.1},
        {"transcoding_overlap": None},
        {"missing_layer_s_per_byte": 0},
        {"int8_operations": 0},
        {"prompt_attention_operations": None},
        {"keys_values": dict.fromkeys(MEASURED.keys_values, 0)},
        {"transcode_cpu_s_per_byte": 0},
        {"drive_spread": 0},
        {"drive_source": None},
    ],
)
def test_wrong_rates_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(JsonError):
        Rates.from_value(json.loads(json.dumps(MEASURED.as_dict() | change)))
