"""`argosy plan` answers first, from headers, wherever the model and the machine are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from argosy import Engine
from argosy.cli.main import main
from argosy.config import GIB, MIB
from argosy.errors import DoesNotFit
from argosy.experts.hit_rate import ReuseGaps, WorkingSet
from argosy.library.places import hub_cache
from argosy.machine import kept_rates
from argosy.machine.rates import guess
from argosy.machine.resources import usable_cores
from argosy.model.families import open_model
from argosy.observe import saved
from tests.families.published import PUBLISHED
from tests.helpers.hub_server import REPOSITORY, directory_files, served
from tests.models.tiny import write_model
from tests.models.tiny_dense import qwen2

REFERENCE = Path(__file__).parents[1] / "models" / "reference"
TINY = REFERENCE / "mixtral_plain"


@pytest.fixture(autouse=True)
def own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARGOSY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


def config_of(name: str, directory: Path) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps(next(model.config for model in PUBLISHED if model.name == name)))
    return path


@pytest.fixture
def kimi(tmp_path: Path) -> Path:
    return config_of("Kimi-K2", tmp_path)


@pytest.fixture
def gpt_oss(tmp_path: Path) -> Path:
    """Some 60 GiB, and planned in half the time."""
    return config_of("gpt-oss-120b", tmp_path)


def facts(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> dict[str, Any]:
    assert main(["plan", *map(str, arguments), "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["plan", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_the_verdict_comes_first_and_everything_fits_a_screen(
    kimi: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["plan", str(kimi), "--machine", "box:desktop-64", "--api", "moonshotai/kimi-k2-0905-preview"])
        == 0
    )
    lines = capsys.readouterr().out.splitlines()

    assert lines[0].startswith("fits      yes, it streams, ")
    assert lines[1].startswith("speed     ")
    assert "estimated" in lines[1]
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 150
    text = "\n".join(lines)
    for expected in (
        "1026.4 B parameters",
        "assumed to be packed as q4",
        "guessed: AMD Ryzen",
        "times cheaper",
        "Wh",
    ):
        assert expected in text


def test_numbers_and_text_say_the_same(kimi: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(capsys, kimi, "--machine", "box:desktop-64", "--memory", "50%", "--streams", "1,2")

    assert found["verdict"] == "streams"
    assert found["machine"]["memory_bytes"] == 64 * GIB
    assert found["plan"]["budget_bytes"] == 32 * GIB
    assert [one["streams"] for one in found["decode"]] == [1, 2]
    for one in found["decode"]:
        rate = one["tokens_per_s"]
        assert 0 < rate["low"] < rate["likely"] < rate["high"]
        assert sum(one["seconds"].values()) == pytest.approx(one["streams"] / rate["likely"])
        assert one["drive_bytes_per_day"] == pytest.approx(
            one["drive_bytes_per_token"]["likely"] * rate["likely"] * 86_400
        )
    assert found["smallest_bytes"] < found["knee_bytes"] < found["resident_bytes"]
    assert not found["machine"]["is_measured"]
    assert not found["hit_rate_is_recorded"]


def test_the_environment_speaks_of_this_machine_alone(
    gpt_oss: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ARGOSY_MEMORY", "2GiB")
    assert facts(capsys, gpt_oss, "--machine", "box:desktop-64")["plan"]["budget_bytes"] > 60 * GIB
    assert facts(capsys, TINY)["plan"]["budget_bytes"] == 2 * GIB


def test_a_model_that_does_not_fit_exits_with_3_and_says_what_would(
    kimi: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = facts(capsys, kimi, "--machine", "box:laptop-16", "--memory", "8GiB", code=3)
    assert (found["fits"], found["verdict"], found["decode"]) == (False, "no", [])
    assert found["smallest_bytes"] > 8 * GIB
    assert main(["plan", str(kimi), "--memory", "8GiB"]) == 3
    both = capsys.readouterr()
    assert both.out.startswith("fits      no: it needs ")
    assert "hint: `--memory" in both.err


def test_a_budget_beyond_the_machine_is_planned_and_said_not_to_fit_there(
    gpt_oss: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    budget = ("--machine", "box:laptop-16", "--memory", "32GiB")
    assert main(["plan", str(gpt_oss), *budget]) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith(
        "fits      not in this machine, which has 16.0 GiB. With the budget: yes, it streams, "
    )
    assert facts(capsys, gpt_oss, *budget)["exceeds_machine"]
    assert not facts(capsys, gpt_oss, "--machine", "box:laptop-16", "--memory", "15GiB")["exceeds_machine"]


def test_prompts_that_the_context_has_no_room_for_are_said(
    gpt_oss: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ("--machine", "box:desktop-64", "--context", "2048")
    assert facts(capsys, gpt_oss, *short)["prompts_longer_than_the_context"] == [16_384]
    assert main(["plan", str(gpt_oss), *short]) == 0
    assert "   16384 tokens  longer than the context" in capsys.readouterr().out.splitlines()
    long = facts(capsys, gpt_oss, "--machine", "box:desktop-64", "--context", "32768")
    assert long["prompts_longer_than_the_context"] == []


def test_the_first_token_after_a_picture_is_predicted_where_the_model_sees(
    capsys: pytest.CaptureFixture[str],
) -> None:
    seeing = REFERENCE.parent / "reference_seeing" / "qwen3_vl_moe"
    picture = facts(capsys, seeing, "--memory", "3GiB", "--image-tokens", "256")["picture"]
    assert (picture["width"], picture["height"]) == (1024, 768)
    assert 0 < picture["encoder_s"] < picture["seconds"]["likely"] < picture["seconds"]["high"]
    assert main(["plan", str(seeing), "--memory", "3GiB", "--image-tokens", "256"]) == 0
    assert f"1024 x 768 are {picture['num_positions']} positions" in capsys.readouterr().out
    assert facts(capsys, TINY, "--memory", "1GiB")["picture"] is None


def test_files_on_disk_are_planned_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(capsys, TINY, "--memory", "1GiB")
    assert found["model"]["place"] == "files"
    assert found["verdict"] == "resident"
    assert found["machine"]["name"] == "here"


def test_a_budget_without_room_for_pictures_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("argosy.forecast.planning.process_bytes", lambda tokenizer: 120 * MIB)
    seeing = REFERENCE.parent / "reference_seeing" / "qwen3_vl_moe"
    with_pictures = facts(capsys, seeing, "--memory", "3GiB", "--media")
    assert (with_pictures["fits"], with_pictures["is_text_only"]) == (True, False)
    assert main(["plan", str(seeing), "--memory", "400MiB"]) == 0
    assert "text only: there is no room for pictures" in capsys.readouterr().out.splitlines()[0]
    assert facts(capsys, seeing, "--memory", "400MiB", "--media", code=3)["verdict"] == "no"


def test_a_model_on_a_hub_is_planned_from_its_headers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(directory_files(TINY)) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        found = facts(capsys, REPOSITORY, "--memory", "1GiB")
        local = facts(capsys, TINY, "--memory", "1GiB")
        monkeypatch.setattr("argosy.machine.resources.free_disk_bytes", lambda path: 12_345)
        assert facts(capsys, REPOSITORY)["model"]["free_disk_bytes"] == 12_345
        assert main(["plan", REPOSITORY]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "not here: a download of" in said
        assert f"for which {hub_cache()} has no room: 12 kB are free" in said
    assert found["model"]["free_disk_bytes"] > 1 << 20
    assert local["model"]["free_disk_bytes"] is None
    assert found["model"]["place"] == "headers"
    assert found["model"]["download_bytes"] == (TINY / "model.safetensors").stat().st_size
    for name in ("num_parameters", "dense_bytes", "record_bytes", "expert_format"):
        assert found["model"][name] == local["model"][name]


def test_plan_remote_is_the_function_for_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    from argosy.checkpoint.hub import Source
    from argosy.forecast.planning import plan_remote

    with served(directory_files(TINY)) as server:
        headers, forecast = plan_remote(Source(server.url, REPOSITORY), memory="2GiB")
    assert headers.file_bytes == (TINY / "model.safetensors").stat().st_size
    assert forecast.verdict == "resident"


def test_measured_rates_of_this_machine_are_used(capsys: pytest.CaptureFixture[str]) -> None:
    from dataclasses import replace

    rates = replace(
        guess("AMD EPYC", usable_cores()), spread=1.1, source="measured 2026-11-27, a test", step_s=0.5
    )
    kept_rates.save(rates, TINY)
    found = facts(capsys, TINY, "--memory", "1GiB")
    assert found["machine"]["is_measured"]
    assert 1.8 < found["decode"][0]["tokens_per_s"]["likely"] < 2.0


def recorded(num_tokens: int) -> WorkingSet:
    """Routing of TINY that chooses the same experts again and again."""
    config = open_model(TINY).config
    num_layers = len(config.moe_layers)
    gaps = ReuseGaps(num_layers, config.num_experts)
    gaps.count(np.tile(np.arange(config.experts_per_token), (num_tokens, num_layers, 1)))
    return WorkingSet.of(
        [gaps],
        layers=config.moe_layers,
        num_experts=config.num_experts,
        experts_per_token=config.experts_per_token,
    )


def test_routing_of_earlier_runs_is_used_unless_a_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not facts(capsys, TINY, "--memory", "1GiB")["hit_rate_is_recorded"]
    kept = saved.path_of(open_model(TINY))
    kept.parent.mkdir(parents=True)
    kept.write_text(json.dumps(recorded(512).as_dict()))

    assert facts(capsys, TINY, "--memory", "1GiB")["hit_rate_tokens"] == 512
    assert main(["plan", str(TINY), "--memory", "1GiB"]) == 0
    assert "hit rate: from 512 tokens recorded on this machine, within 3 points" in capsys.readouterr().out
    named = tmp_path / "named.json"
    named.write_text(json.dumps(recorded(64).as_dict()))
    assert main(["plan", str(TINY), "--memory", "1GiB", "--working-set", str(named)]) == 0
    assert f"hit rate: from 64 tokens recorded in {named}, within" in capsys.readouterr().out

    with served(directory_files(TINY)) as server:  # headers alone do not tell which training it is
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        assert not facts(capsys, REPOSITORY, "--memory", "1GiB")["hit_rate_is_recorded"]


def test_a_damaged_record_of_earlier_runs_is_left_out_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    kept = saved.path_of(open_model(TINY))
    kept.parent.mkdir(parents=True)
    for damaged, problem in (
        ("{}", "working set cannot be read"),
        (
            json.dumps(recorded(64).as_dict() | {"num_experts": 99}),
            "belongs to a model with 3 layers of 99 experts",
        ),
    ):
        kept.write_text(damaged)
        assert main(["plan", str(TINY), "--memory", "1GiB"]) == 0
        printed = capsys.readouterr()
        assert "hit rate: typical of such models, within 10 points" in printed.out
        assert printed.err.startswith("note: routing recorded in earlier runs is not used: ")
        assert problem in printed.err


def test_recorded_routing_is_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "working-set.json"
    path.write_text(json.dumps(recorded(64).as_dict()))
    assert facts(capsys, TINY, "--memory", "1GiB", "--working-set", path)["hit_rate_is_recorded"]
    path.write_text("{}")
    assert "working set cannot be read" in refusal(capsys, TINY, "--working-set", path)
    assert "cannot be read: No such file" in refusal(capsys, TINY, "--working-set", tmp_path / "none")


def test_prices_and_break_even_are_printed(kimi: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(capsys, kimi, "--machine", "aws:i7i.8xlarge", "--api-price", "0.6:2.5")
    one = found["money"][0]
    speed = found["decode"][0]["tokens_per_s"]["likely"]
    assert one["usd_per_m_out"] == pytest.approx(3.02 / 3600 / speed * 1e6)
    assert one["times"] == pytest.approx(one["break_even"])
    assert one["times"] > 10
    owned = facts(capsys, kimi, "--machine", "box:desktop-64", "--price", 0, "--watts", 150)["money"][0]
    seconds = owned["energy_wh"] / 150 * 3600
    assert owned["request_usd"] == pytest.approx(seconds * 150 / 1000 * 0.15 / 3600)
    assert owned["api"] is None


def test_several_machines_are_planned_on_paper(kimi: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(capsys, kimi, "--machine", "4*box:desktop-64", "--network", "25GbE")
    group = found["group"]
    assert (group["num_machines"], found["machine"]["name"]) == (4, "box:desktop-64")
    assert 1.3 < group["speed_up"] < 4
    assert group["hit_rate"] > found["decode"][0]["hit_rate"]["likely"]
    assert main(["plan", str(kimi), "--machine", "4*box:desktop-64"]) == 0
    assert "4 such machines, one of which answers" in capsys.readouterr().out
    assert facts(capsys, TINY, "--machine", "box:desktop-64")["group"] is None


def test_a_plot_is_an_svg_with_a_line_and_the_knee(kimi: Path, tmp_path: Path) -> None:
    path = tmp_path / "kimi.svg"
    assert main(["plan", str(kimi), "--machine", "aws:i7i.8xlarge", "--plot", str(path)]) == 0
    root = ElementTree.parse(path).getroot()
    space = "{http://www.w3.org/2000/svg}"
    lines = root.findall(f"{space}polyline")
    texts = [node.text for node in root.iter(f"{space}text")]
    assert len(lines) == 2
    for line in lines:
        places = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
        assert len(places) == 17
        assert [x for x, _ in places] == sorted(x for x, _ in places)
    assert {"tok/s, one answer", "$ per million tokens out", "memory, GiB", "90 % of full speed"} <= set(
        texts
    )


def test_verify_runs_the_model_and_names_the_part_that_is_off() -> None:
    """In a process of its own, whose peak is that of the model."""
    command = [sys.executable, "-m", "argosy", "plan", str(TINY), "--memory", "1GiB", "--verify"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    assert "verified" in text
    assert "most of the difference is in: " in text
    rows = [
        line
        for line in text.splitlines()
        if line.startswith(("  decode, tok/s", "  first token", "  memory, peak"))
    ]
    assert len(rows) == 3
    peak = float(rows[2].split()[-2])
    assert 0 < peak < 1.1 * (GIB / MIB)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--streams", "0"], "--streams takes"),
        (["--streams", ""], "--streams takes"),
        (["--streams", "1,x"], "--streams takes"),
        (["--streams", ",".join(["1"] * 17)], "--streams takes"),
        (["--machine", "aws:nothing"], "unknown machine"),
        (["--machine", "box:laptop-16", "--calibrate"], "run on this machine"),
        (["--machine", "box:laptop-16", "--verify"], "run on this machine"),
        (["--machine", "0*box:laptop-16"], "takes N*NAME"),
        (["--network", "10GbE"], "--machine names one"),
        (["--machine", "2*box:laptop-16", "--network", "fast"], "gigabits"),
        (["--format", "q8"], "--format is for a config.json"),
        (["--api", "x/y", "--api-price", "1:2"], "exclude each other"),
        (["--api", "x/y"], "no price of 'x/y'"),
        (["--api-price", "1"], "IN:OUT"),
        (["--plot", "x.png"], "SVG"),
        (["--memory", "101%"], "more than all"),
        (["--context", "99999999"], "context of 99999999"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert problem in refusal(capsys, TINY, *arguments)


def test_verify_needs_files(kimi: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "its files are not here" in refusal(capsys, kimi, "--verify")


def test_an_address_that_is_not_read_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "must begin with https" in refusal(capsys, "http://example.org/a/b")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Qwen3-VL-30B-A3B", "text only, because it does not say what a picture takes"),
        ("Qwen3-Omni-30B-A3B", "text only, because it does not say what a picture or a sound takes"),
        ("Qwen3-30B-A3B", None),
    ],
)
def test_a_config_alone_says_what_its_plan_leaves_out(
    name: str, told: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = next(model.config for model in PUBLISHED if model.name == name)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    main(["plan", str(tmp_path / "config.json"), "--memory", "64GiB", "--machine", "box:desktop-128"])
    out = capsys.readouterr().out
    assert (told in " ".join(out.split())) if told else ("text only" not in out)


def test_a_model_without_experts_is_planned_without_hit_rates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config_of("Qwen2.5-0.5B", tmp_path)
    assert main(["plan", str(path), "--memory", "4GiB"]) == 0
    printed = capsys.readouterr().out
    assert "decode         tok/s in all" in printed
    for word in ("hit rate", "drive, GB/token", "TB/day", "experts in memory"):
        assert word not in printed
    directory = write_model(tmp_path / "model", qwen2(), seed=1)
    with pytest.raises(DoesNotFit) as refused, Engine.open(directory, memory="2MiB", threads=1):
        pass
    assert "makes the weights smaller" in str(refused.value)
    assert "experts" not in str(refused.value)
