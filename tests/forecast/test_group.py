"""A group of machines on paper: the speeds that were computed for it elsewhere, and its limits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from argosy.errors import UsageError
from argosy.experts.hit_rate import WorkingSet
from argosy.forecast.group import Network, parse_count, parse_network, predict_group
from argosy.machine.rates import NUM_TOKENS, guess
from argosy.model.work import Attention, Work

# Equal desktops: memory 60 GB/s, drive 6 GB/s, 10 GbE; no other overhead.
DESKTOP = replace(
    guess("", 16, drive_bytes_per_s=6e9),
    memory_bytes_per_s=60e9,
    operations=dict.fromkeys(guess("", 1).operations, (1e14,) * len(NUM_TOKENS)),
    waits=dict.fromkeys(guess("", 1).waits, (1.0,) * len(NUM_TOKENS)),
    layer_s=1e-9,
    streamed_layer_s=1e-9,
    missing_layer_s=1e-9,
    missing_layer_s_per_byte=1e-18,
    miss_s=1e-9,
    step_s=1e-9,
)
TEN_GBE = Network(bytes_per_s=10e9 / 8)
KIMI_K2 = Work(
    num_layers=61,
    num_moe_layers=60,
    num_experts=384,
    experts_per_token=8,
    dense={"q8": (12.3e9, 11.6e9)},
    head={},
    expert={"q4": (24.8e6, 44.0e6)},
    record_bytes=24.8e6,
    piece_bytes=24.8e6,
    attention=(Attention(0, 70_000.0, 1e5),),
)
QWEN3_235B = replace(
    KIMI_K2,
    num_layers=94,
    num_moe_layers=94,
    num_experts=128,
    dense={"q8": (8.4e9, 7.9e9)},
    head={},
    expert={"q4": (10.6e6, 18.9e6)},
    record_bytes=10.6e6,
    piece_bytes=10.6e6,
)
PRIOR = WorkingSet.prior(range(60), num_experts=384, experts_per_token=8)


# Computed independently, layer by layer, with the less loaded of two owners. One sum came back from each machine there;
# here one output comes back from each expert, which takes a few milliseconds of a token longer.
@pytest.mark.parametrize(
    ("work", "hidden_size", "num_machines", "hit_rate", "tokens_per_s"),
    [
        (KIMI_K2, 7168, 1, 0.54, 0.90),
        (KIMI_K2, 7168, 2, 0.67, 1.66),
        (KIMI_K2, 7168, 4, 0.85, 2.38),
        (KIMI_K2, 7168, 8, 0.99, 3.46),
        (QWEN3_235B, 4096, 1, 0.64, 1.60),
        (QWEN3_235B, 4096, 2, 0.79, 2.97),
        (QWEN3_235B, 4096, 4, 0.97, 4.40),
    ],
)
def test_speeds_are_those_computed_elsewhere(
    work: Work, hidden_size: int, num_machines: int, hit_rate: float, tokens_per_s: float
) -> None:
    found = predict_group(
        work, DESKTOP, PRIOR, num_machines=num_machines, num_slots=1, hidden_size=hidden_size, network=TEN_GBE,
        context=1, hit_rate=hit_rate,
    )  # fmt: skip
    assert found.tokens_per_s.likely == pytest.approx(tokens_per_s, rel=0.1)
    assert found.network_share < 0.1


def test_more_machines_hold_more_experts_and_dense_weights_bound_the_gain() -> None:
    found = [
        predict_group(
            KIMI_K2, DESKTOP, PRIOR, num_machines=count, num_slots=count * 2000, hidden_size=7168, network=TEN_GBE,
            context=1,
        )
        for count in (1, 2, 4, 8)
    ]  # fmt: skip
    speeds = [one.tokens_per_s.likely for one in found]
    assert speeds == sorted(speeds)
    assert found[0].speed_up == pytest.approx(1.0)
    assert found[0].network_share == 0.0
    assert [one.hit_rate for one in found] == sorted(one.hit_rate for one in found)
    assert 1 / speeds[-1] > 12.3e9 / 60e9
    assert 1.3 < found[1].speed_up < found[3].speed_up < 8
    assert found[1].tokens_per_s.low < speeds[1] < found[1].tokens_per_s.high


def test_rows_go_once_to_a_machine_and_outputs_come_from_every_expert() -> None:
    def share(hidden_size: int) -> float:
        found = predict_group(
            KIMI_K2, DESKTOP, PRIOR, num_machines=2, num_slots=4000, hidden_size=hidden_size, network=TEN_GBE,
            context=1,
        )  # fmt: skip
        return found.network_share / found.tokens_per_s.likely

    per_layer_s = (share(7168) - share(0)) / KIMI_K2.num_moe_layers
    rows, outputs = 1 - 0.5**8, 8 * 0.5
    assert per_layer_s == pytest.approx((rows + outputs) * 4 * 7168 / TEN_GBE.bytes_per_s)
    assert share(0) == pytest.approx(KIMI_K2.num_moe_layers * 2 * 50e-6)


def test_a_slow_network_costs_more() -> None:
    shares = [
        predict_group(
            KIMI_K2,
            DESKTOP,
            PRIOR,
            num_machines=4,
            num_slots=8000,
            hidden_size=7168,
            network=parse_network(name),
            context=1,
        ).network_share
        for name in ("100GbE", "25GbE", "10GbE", "1GbE")
    ]
    assert shares == sorted(shares)
    assert shares[-1] > 0.1


@pytest.mark.parametrize("text", ["", "x", "0GbE", "-1", "1e3", "9999GbE", "10 miles"])
def test_a_network_is_gigabits_a_second(text: str) -> None:
    with pytest.raises(UsageError, match="--network takes gigabits"):
        parse_network(text)


def test_a_machine_may_come_several_times() -> None:
    assert parse_count("aws:i7i.8xlarge") == (1, "aws:i7i.8xlarge")
    assert parse_count("4*box:desktop-64") == (4, "box:desktop-64")
    for text in ("*x", "0*x", "65*x", "4*", "-1*x", "a*b"):
        with pytest.raises(UsageError, match=r"N\*NAME"):
            parse_count(text)
