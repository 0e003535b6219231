"""Answers share the energy of the steps that they ran in, by tokens; where nothing measures it, there is none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from argosy import Engine, SamplingParams
from argosy.cli.shared.output import ledger_lines
from argosy.engine import energy
from argosy.engine.energy import EnergyShares, Metered, co2_grams, drive_joules
from argosy.engine.ledger import Ledger
from argosy.machine import energy as counters
from argosy.machine.energy import EnergyMeter
from tests.cli.tiny_chat_model import write_chat_model
from tests.machine.powercap import Zones, write_zones


class Ran(NamedTuple):
    sequences: list[Answer]
    counts: list[int] | None


class Answer:
    metered: Metered | None = None


class Machine:
    """An engine's meter on a machine whose package has used what `advance` says."""

    def __init__(self, root: Path) -> None:
        self.zones = write_zones(root, {"package-0": 0, "dram": 0})
        self.now, self.bytes_read = 0.0, 0
        self.shares = EnergyShares(EnergyMeter.find(root), lambda: self.bytes_read, clock=lambda: self.now)

    def answer(self) -> Answer:
        one = Answer()
        self.shares.start(one)
        return one

    def pause(self, joules: float) -> None:
        self.zones.advance("package-0", int(joules * 1e6))

    def step(
        self, tokens: dict[Answer, int], joules: float, *, seconds: float = 1.0, num_bytes: int = 0
    ) -> None:
        self.shares.begin()
        self.now += seconds
        self.bytes_read += num_bytes
        self.zones.advance("dram", int(joules * 1e6))
        counts = list(tokens.values())
        self.shares.note(Ran(list(tokens), None if set(counts) == {1} else counts))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def joules_of(answer: Answer) -> float:
    assert answer.metered is not None
    return answer.metered.joules


def test_answers_share_a_step_by_tokens(machine: Machine) -> None:
    prompt, one, other = machine.answer(), machine.answer(), machine.answer()
    machine.step({prompt: 30, one: 1, other: 1}, 32.0, num_bytes=320)
    assert [joules_of(answer) for answer in (prompt, one, other)] == pytest.approx([30, 1, 1])
    assert prompt.metered is not None
    assert prompt.metered.drive_bytes == pytest.approx(300)
    machine.step({one: 1, other: 1}, 3.0)
    assert [joules_of(answer) for answer in (prompt, one, other)] == pytest.approx([30, 2.5, 2.5])


def test_short_steps_share_one_reading_and_an_end_takes_one(machine: Machine) -> None:
    one, other = machine.answer(), machine.answer()
    machine.step({one: 1}, 0.0, seconds=1.0)
    machine.step({one: 1}, 1.0, seconds=0.01)
    machine.step({one: 1, other: 1}, 2.0, seconds=0.01)
    assert joules_of(one) == 0
    machine.shares.settle()  # one of them ends
    assert [joules_of(answer) for answer in (one, other)] == pytest.approx([2, 1])


def test_pauses_belong_to_nobody_and_shares_sum_to_the_total(machine: Machine) -> None:
    answers = [machine.answer() for _ in range(3)]
    for number in range(20):
        machine.pause(1000.0)
        machine.step(
            {answer: 1 + number * at for at, answer in enumerate(answers)}, 1.0 + number, num_bytes=7
        )
    assert machine.shares.total is not None
    assert machine.shares.total.joules == pytest.approx(sum(1.0 + number for number in range(20)))
    assert sum(map(joules_of, answers)) == pytest.approx(machine.shares.total.joules)
    assert machine.shares.total.drive_bytes == 140


def test_a_counter_that_goes_away_leaves_no_energy_rather_than_too_little(
    machine: Machine, tmp_path: Path
) -> None:
    one = machine.answer()
    machine.step({one: 1}, 1.0)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    machine.step({one: 1}, 1.0)
    assert machine.shares.total is None
    assert one.metered is None
    machine.step({one: 1}, 1.0)
    assert machine.answer().metered is None


def test_without_a_meter_nothing_is_shown() -> None:
    shares = EnergyShares(None, lambda: 5)
    answer = Answer()
    shares.start(answer)
    shares.begin()
    shares.note(Ran([answer], None))
    shares.settle()
    assert answer.metered is shares.total is None
    assert Ledger().total_energy_j is Ledger().j_per_token is None
    assert not [line for line in ledger_lines(Ledger()) if line.startswith("energy")]


def test_the_drive_is_an_estimate_with_a_range_beside_what_is_measured() -> None:
    ledger = Ledger(new_tokens=10, energy_j=50.0, drive_energy_j=drive_joules(10e9))
    assert ledger.drive_energy_j == pytest.approx((3, 80))
    assert ledger.total_energy_j == pytest.approx((53, 130))
    assert ledger.j_per_token == pytest.approx((5.3, 13))
    assert co2_grams((3.6e6, 7.2e6), 400.0) == (400.0, 800.0)
    (line,) = [line for line in ledger_lines(ledger, co2_grams_per_kwh=360.0) if line.startswith("energy")]
    assert (
        line
        == "energy   50 J measured, drive about 3 to 80 J, 5.3 to 13 J for each token, 0.0053 to 0.013 g CO2"
    )


class Burning(Zones):
    """Counters that use one joule at each reading."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(root, {"package-0": counters_start})
        read = EnergyMeter.read

        def burn(meter: EnergyMeter) -> float | None:
            self.advance("package-0", 1_000_000)
            return read(meter)

        monkeypatch.setattr(EnergyMeter, "read", burn)


counters_start = 262_143_328_850 - 3_500_000  # wraps after three readings


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("energy") / "model")


@pytest.fixture
def engine(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setattr(counters, "POWERCAP", tmp_path)
    monkeypatch.setattr(energy, "_READ_EVERY_S", 0.0)
    Burning(tmp_path, monkeypatch)
    with Engine.open(model, memory="1GiB", threads=1) as engine:
        yield engine


def test_a_ledger_has_the_energy_of_its_answer(engine: Engine) -> None:
    alone = engine.generate("abc", SamplingParams(max_tokens=5, ignore_eos=True)).ledger
    assert alone.energy_j == pytest.approx(5, abs=1)  # a joule for each step
    assert engine.ledger.energy_j == pytest.approx(alone.energy_j)
    both = [engine.submit("abc", SamplingParams(max_tokens=5, ignore_eos=True)) for _ in range(2)]
    while engine.has_work:
        engine.step()
    ledgers = [sequence.result.ledger for sequence in both if sequence.result is not None]
    assert len(ledgers) == 2
    assert engine.ledger.energy_j is not None
    shares = [ledger.energy_j for ledger in ledgers]
    assert sum(share for share in shares if share is not None) == pytest.approx(
        engine.ledger.energy_j - alone.energy_j
    )
    as_dict = ledgers[0].as_dict()
    assert as_dict["energy_j"] == shares[0]
    assert as_dict["drive_energy_j"] == list(ledgers[0].drive_energy_j or ())
