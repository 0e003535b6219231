"""`argosy routes` reads texts with a real, tiny model, and says what its experts chose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from argosy import Engine
from argosy.cli.main import main
from argosy.observe.report import BUDGETS

Captured = pytest.CaptureFixture[str]

TEXTS = {
    "prose": "The sea is wide and the ship is small. " * 12,
    "sums": "1 + 1 = 2. 2 + 2 = 4. 3 + 4 = 7. " * 12,
}


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    for name, text in TEXTS.items():
        (tmp_path / f"{name}.txt").write_text(text)
    return [str(tmp_path / f"{name}.txt") for name in TEXTS]


def routes(capsys: Captured, model: Path, *arguments: str) -> dict[str, Any]:
    command = [
        "routes",
        str(model),
        *arguments,
        "--memory",
        "2GiB",
        "--threads",
        "1",
        "--tokens",
        "128",
        "--json",
    ]
    assert main(command) == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    return facts


def test_shares_and_perplexities_are_those_of_the_model(
    chat_model: Path, files: list[str], capsys: Captured
) -> None:
    facts = routes(capsys, chat_model, *files)
    heard: dict[int, list[Any]] = {}

    def observe(layer: int, ids: Any) -> None:
        heard.setdefault(layer, []).append(ids.copy())

    with Engine.open(chat_model, memory="2GiB", threads=1, observe_routes=observe) as engine:
        window = engine.plan.context_tokens - 1
        assert engine.tokenizer is not None
        for domain, found in zip(TEXTS, facts["domains"], strict=True):
            ids = engine.tokenizer.encode(TEXTS[domain])[:128]
            losses: list[float] = []
            heard.clear()
            for at in range(0, len(ids), window):
                part = ids[at : at + window]
                logits = engine.logits(part)[:-1].astype(np.float64)
                logits -= logits.max(axis=1, keepdims=True)
                chosen = logits[np.arange(len(part) - 1), part[1:]]
                losses += (np.log(np.exp(logits).sum(axis=1)) - chosen).tolist()
            assert found["name"] == domain
            assert found["tokens"] == len(ids)
            assert found["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)
            for layer, shares in zip(facts["layers"], found["shares"], strict=True):
                uses = np.bincount(np.concatenate(heard[layer]).ravel(), minlength=facts["num_experts"])
                np.testing.assert_allclose(shares, uses / uses.sum(), atol=1e-5)


def test_removals_change_perplexities_and_a_forbidden_choice_is_undone(
    chat_model: Path, files: list[str], capsys: Captured
) -> None:
    facts = routes(capsys, chat_model, *files, "--ablate", "0:1,*:2,1:0", "--ablate-tokens", "64")
    removed = facts["removed"]
    assert [(one["removed"], one["domain"]) for one in removed] == [
        (name, domain) for name in ("0:1", "*:2", "1:0") for domain in TEXTS
    ]
    assert any(one["rise"] for one in removed)
    alone = routes(capsys, chat_model, *files, "--ablate", "1:0", "--ablate-tokens", "64")["removed"]
    assert alone == removed[-2:]  # what was removed before is back
    every = routes(capsys, chat_model, files[0], "--ablate", "all", "--ablate-tokens", "64")["removed"]
    assert len(every) == len(facts["layers"]) * facts["num_experts"]


def test_caches_of_several_sizes_stand_beside_the_engine_s_own(
    chat_model: Path, files: list[str], capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = routes(capsys, chat_model, *files)
    assert facts["engine"] is None  # every expert is resident
    assert len(facts["caches"]) <= len(BUDGETS)
    plain = Engine.open.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(
        Engine, "open", classmethod(lambda cls, *given, **named: plain(cls, *given, expert_slots=5, **named))
    )
    facts = routes(capsys, chat_model, *files)
    engine = facts["engine"]
    assert engine["slots"] == 5
    assert engine["slots"] in [cache["slots"] for cache in facts["caches"]]
    assert 0 < engine["engine"] < 1
    assert engine["lru"] <= engine["optimum"]


def test_the_report_as_text_and_as_a_picture(
    chat_model: Path, files: list[str], capsys: Captured, tmp_path: Path
) -> None:
    picture = tmp_path / "experts.svg"
    assert (
        main(
            ["routes", str(chat_model), *files, "--memory", "2GiB", "--svg", str(picture), "--ablate", "0:1"]
        )
        == 0
    )
    said = capsys.readouterr().out
    for part in ("model    ", "texts    prose", "domains  ", "layer  balance", "needed   ", "cache ", "0:1 "):
        assert part in said
    texts = [
        one.text for one in ElementTree.parse(picture).getroot().iter("{http://www.w3.org/2000/svg}text")
    ]
    assert {"prose", "sums"} <= set(texts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ablate", "99:0"], "--ablate names layer 99"),
        (["--ablate", "x"], "--ablate cannot be read at 'x'"),
        (["--tokens", "1"], "--tokens"),
    ],
)
def test_a_wrong_option_is_named(
    chat_model: Path, files: list[str], capsys: Captured, arguments: list[str], message: str
) -> None:
    assert main(["routes", str(chat_model), *files, "--memory", "2GiB", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_text_too_short_to_say_anything_is_refused(
    chat_model: Path, capsys: Captured, tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("a")
    assert main(["routes", str(chat_model), str(tmp_path / "short.txt"), "--memory", "2GiB"]) == 2
    assert "the domain 'short' has fewer than two tokens" in capsys.readouterr().err
