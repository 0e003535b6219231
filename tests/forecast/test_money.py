"""Prices follow from seconds and dollars; each example is worked out by hand."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path
from typing import Any

import pytest

from argosy.errors import UsageError
from argosy.forecast.machines import COLUMNS, TABLE, find_machine, read_machines
from argosy.forecast.money import ApiPrice, Owner, cost, look_up_price, parse_price, sentence

API = ApiPrice("moonshotai/kimi-k2", 0.6, 2.5)


def test_a_rented_machine_costs_its_rent_for_every_second() -> None:
    # 3.02 $/h, 5 tok/s: 200,000 s for a million tokens, 55.6 h, 167.8 $. A prompt of 1024 tokens takes 40 s.
    found = cost(Owner(usd_per_hour=3.02), prompt_s=40.0, tokens_per_s=5.0, api=API)

    assert found.usd_per_m_out == pytest.approx(167.78, abs=0.01)
    assert found.usd_per_m_in == pytest.approx(40 / 1024 * 1e6 / 3600 * 3.02)  # 32.77
    assert found.request_usd == pytest.approx((40 + 256 / 5) / 3600 * 3.02)  # 0.0765
    assert API.request_usd() == pytest.approx((1024 * 0.6 + 256 * 2.5) / 1e6)  # 0.001254
    assert found.times == pytest.approx(0.076507 / 0.0012544, rel=1e-3)  # 61
    assert found.break_even == pytest.approx(found.times)
    assert found.energy_wh is None
    assert found.electricity_usd_per_m_out is None
    assert sentence(found).startswith("The API is 61 times cheaper, even if")


def test_an_owned_machine_costs_its_price_always_and_electricity_while_it_answers() -> None:
    # 1800 $ over 4 years of 8766 h: 0.0513 $/h. 150 W at 0.15 $/kWh: 0.0225 $/h.
    owner = Owner(usd=1800, watts=150)
    assert owner.fixed_usd_per_hour == pytest.approx(0.051335, abs=1e-6)
    assert owner.running_usd_per_hour == pytest.approx(0.0225)
    found = cost(owner, prompt_s=4.0, tokens_per_s=20.0, api=ApiPrice("x", 1.0, 10.0))

    # A request takes 16.8 s: 214.3 in an hour, for which the API asks 214.3 * 0.003584 = 0.768 $.
    assert found.energy_wh == pytest.approx(150 * 16.8 / 3600)
    assert found.electricity_usd_per_m_out == pytest.approx(0.0225 / 3600 / 20 * 1e6)  # 0.31
    assert found.break_even == pytest.approx(0.051335 / (0.768 - 0.0225), rel=1e-3)  # 6.9 %
    assert sentence(found) == "Running it here is cheaper if the machine answers more than 7% of all hours."


def test_a_machine_whose_electricity_alone_costs_more_never_breaks_even() -> None:
    found = cost(Owner(watts=1000), prompt_s=100.0, tokens_per_s=1.0, api=API)
    assert found.break_even == float("inf")
    assert "times cheaper" in sentence(found)


def test_rent_includes_electricity() -> None:
    assert Owner(usd_per_hour=1.0, watts=500).running_usd_per_hour == 0.0


@pytest.mark.parametrize("text", ["", "1", "a:b", "-1:2", "1:2:3", "nan:1", "1:inf", "1e9:1"])
def test_a_price_has_two_numbers(text: str) -> None:
    with pytest.raises(UsageError, match="IN:OUT"):
        parse_price(text)
    assert parse_price("0.6:2.5").request_usd() == API.request_usd()


def test_prices_of_apis_come_from_genai_prices() -> None:
    found = look_up_price("moonshotai/kimi-k2-0905-preview")
    assert found is not None
    assert 0 < found.usd_per_m_in < found.usd_per_m_out < 100
    assert look_up_price("moonshotai/no-such-model") is None
    assert look_up_price("no-such-provider/x") is None


def test_without_genai_prices_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name == "genai_prices":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.delitem(sys.modules, "genai_prices", raising=False)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UsageError, match="genai-prices") as refusal:
        look_up_price("a/b")
    assert "install 'genai-prices" in str(refusal.value)


# ── machines ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_machine_of_the_table_is_found_and_has_a_source() -> None:
    table = read_machines(TABLE)
    assert len(table) >= 18
    for machine in table:
        assert find_machine(machine.name) == machine
        assert "2026" in machine.source
        assert machine.rates().drive[0][1] == pytest.approx((machine.drive_gb_per_s or 2) * 1e9)
        assert "unknown processor" not in machine.rates().source


def test_a_file_of_ones_own_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(
        "name,cpu,cores,memory_gib,watts\nnas,Intel(R) Xeon(R) Gold 6130,16,64,\nbig,AMD EPYC 9654,96,768,400\n"
    )
    assert find_machine(f"{path}:big").watts == 400
    assert find_machine(f"{path}:nas").watts is None
    with pytest.raises(UsageError, match="2 machines of that name"):
        find_machine(str(path))
    with pytest.raises(UsageError, match="did you mean aws:i7i"):
        find_machine("aws:i7i.8xlarg")
    with pytest.raises(UsageError, match="unknown machine"):
        find_machine("4*aws:i7i.8xlarge")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "the header has nothing"),
        ("name,cpu,cores\n", "the header has name, cpu, cores"),
        ("name,cpu,cores,memory_gib,colour\n", "colour"),
        ("name,cpu,cores,memory_gib\n", "no machine below"),
        ("name,cpu,cores,memory_gib\na,b,,4\n", "line 2: cores is empty"),
        ("name,cpu,cores,memory_gib\na,b,1.5,4\n", "cores must be a whole number"),
        ("name,cpu,cores,memory_gib\na,b,1,nan\n", "memory_gib must be a number"),
        ("name,cpu,cores,memory_gib\na,b,1,-4\n", "memory_gib must be a number"),
        ("name,cpu,cores,memory_gib\na,b,1,4,5\n", "more fields"),
        ("name,cpu,cores,memory_gib\na,b,1\n", "memory_gib is empty"),
        ("name,cpu,cores,memory_gib,name\n", "the header has"),
        ('name,cpu,cores,memory_gib\n"a', "not a CSV file"),
        ("x" * (2 << 20), "larger than"),
    ],
)
def test_a_malformed_file_is_refused_by_line(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(text)
    with pytest.raises(UsageError, match=problem):
        find_machine(str(path))
    assert set(COLUMNS) >= {"name", "cpu", "cores"}
