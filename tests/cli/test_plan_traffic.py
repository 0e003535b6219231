"""`argosy plan --rate`: how long clients wait, the machines that a target needs, and what they cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from argosy.cli.main import main
from argosy.forecast import simulation
from tests.families.published import PUBLISHED

TINY = str(Path(__file__).parents[1] / "models" / "reference" / "mixtral_plain")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARGOSY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("argosy.forecast.traffic.MOST_REQUESTS", 300)


@pytest.fixture
def qwen(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(next(model.config for model in PUBLISHED if model.name == "Qwen3-30B-A3B")))
    return str(path)


def facts(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", *arguments, "--machine", "aws:i7i.8xlarge", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)["traffic"]
    return found


def text(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments, "--machine", "aws:i7i.8xlarge"]) == 0
    out = capsys.readouterr().out
    return out[out.index("traffic ") :]


def test_times_and_machines_are_the_same_in_text_and_json(
    qwen: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [qwen, "--rate", "0.1", "--traffic", "prompt=300~2,answer=20~2", "--target", "first-token=30s"]
    found = facts(capsys, *options)
    assert found["likely"]["keeps_up"]
    first = found["likely"]["one_machine"]["first_token_s"]
    assert 0 < first["p50"] < first["p90"] < first["p99"]
    assert found["fast"]["one_machine"]["first_token_s"]["p50"] < first["p50"]
    assert found["likely"]["machines"] >= 1
    assert found["likely"]["usd_per_month"] == pytest.approx(found["likely"]["machines"] * 3.02 * 730.5)
    assert (found["seed"], found["target"]) == (0, {"what": "first-token", "seconds": 30.0})

    said = text(capsys, *options)
    assert (
        "0.1 requests/s at random (seed 0); prompts of 300~2 tokens, answers of 20~2; 300 simulated" in said
    )
    assert "one machine keeps up: " in said
    assert "a first token within 30 s in 99 of 100 requests" in said
    assert f"{found['likely']['usd_per_month']:.0f} $ a month" in said
    assert max(map(len, said.splitlines())) <= 150


def test_a_machine_that_cannot_keep_up_has_no_percentiles(
    qwen: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulation, "_MOST_COST", 1e4)  # some hundred requests
    found = facts(capsys, qwen, "--rate", "50", "--target", "token=50ms")
    for case in ("fast", "likely", "slow"):
        assert not found[case]["keeps_up"]
        assert found[case]["one_machine"]["first_token_s"] is None
        assert found[case]["one_machine"]["num_refused"] > 0
    said = text(capsys, qwen, "--rate", "50", "--target", "token=50ms")
    assert "one machine cannot keep up: it can do " in said
    assert "p99" not in said
    assert "100 such machines do not reach it" in said


def test_requests_of_a_file_come_as_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(
        "".join(f'{{"at_s": {at}, "prompt_tokens": 40, "answer_tokens": 1}}\n' for at in (0, 50, 100))
    )
    found = facts(capsys, TINY, "--traffic", str(path))
    assert (found["at_random"], found["seed"], found["target"]) == (False, None, None)
    assert found["rate_per_s"] == pytest.approx(0.02)
    assert found["likely"]["one_machine"]["token_s"] is None  # answers of one token have no further ones
    assert "requests/s as the file says" in text(capsys, TINY, "--traffic", str(path))
    assert (
        facts(capsys, TINY, "--traffic", str(path), "--rate", "0.01")["likely"]["one_machine"]["num_requests"]
        == 300
    )


def test_without_a_rate_nothing_is_simulated(capsys: pytest.CaptureFixture[str]) -> None:
    assert facts(capsys, TINY) is None


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--rate", "0"], "--rate takes"),
        (["--rate", "nan"], "'nan' is not a finite number"),
        (["--rate", "-1"], "--rate takes"),
        (["--rate", "1e300"], "--rate takes"),
        (["--traffic", "prompt=8,answer=4"], "when requests arrive"),
        (["--traffic", "nothing.jsonl"], "no file"),
        (["--target", "first-token=2s"], "--target needs"),
        (["--rate", "1", "--target", "2s"], "--target takes"),
        (["--rate", "1", "--traffic", "prompt=1"], "--traffic needs"),
        (["--rate", "1", "--machine", "2*box:desktop-64"], "names a group of 2"),
        (["--rate", "1", "--traffic", "prompt=9000000,answer=1"], "the shortest prompt has 9000000 tokens"),
    ],
)
def test_what_cannot_be_simulated_is_refused(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", TINY, "--machine", "box:desktop-64", *arguments]) == 2
    assert problem in capsys.readouterr().err


def test_with_verify_the_simulation_uses_measured_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths = ["--traffic", "prompt=16,answer=8"]
    assert (
        main(["plan", TINY, "--memory", "1GiB", "--context", "128", "--rate", "0.5", *lengths, "--verify"])
        == 0
    )
    assert "requests/s, by measured steps" in capsys.readouterr().out
