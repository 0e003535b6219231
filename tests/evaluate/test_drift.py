"""Drift of real, tiny models: none between equal ones, more in a tighter format, and broken packs are flagged."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy import Engine, SamplingParams
from argosy.checkpoint.manifest import verify_pack
from argosy.cli.main import main
from argosy.config import MIB
from argosy.config.engine import WantedAdapter
from argosy.errors import ArgosyError, DiskFull, DoesNotFit, UsageError
from argosy.evaluate import row_file
from argosy.evaluate.drift import _shown, compare
from argosy.evaluate.intervals import Estimate
from argosy.evaluate.material import Material
from argosy.evaluate.measure import DriftReport, measure_drift
from argosy.evaluate.questions import Question
from argosy.evaluate.row_file import RowFile
from argosy.evaluate.scoring import Scores, Tokens, score
from argosy.machine import resources
from tests.adapters.adapter_files import pair, write_peft
from tests.evaluate.small_models import (
    few_texts,
    in_two_bits,
    packed,
    without_an_expert,
    write_sharp_model,
)
from tests.models.tiny import qwen3_moe, write_model

Captured = pytest.CaptureFixture[str]
OPTIONS = {"memory": "1GiB", "threads": 1}
QUESTIONS = [
    Question("Two met.\nWho?\nAnswer:", ("the tall one", "the short one", "not known"), label, condition)
    for label, condition in ((0, "ambig"), (1, "disambig"), (2, "ambig"))
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ARGOSY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint, packs of it, and two packs that are broken."""
    root = tmp_path_factory.mktemp("forms")
    source = write_sharp_model(root / "source")
    lost = write_sharp_model(root / "lost", without_an_expert)
    coarse = write_sharp_model(root / "coarse", in_two_bits)
    return {
        "source": source,
        "q8": packed(source, root / "q8", "q8"),
        "q4": packed(source, root / "q4", "q4"),
        "no expert 0": packed(lost, root / "no-expert-0", "q8"),
        "2 bits": packed(coarse, root / "two-bits", "q8"),
    }


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> Material:
    """A real run reads 2,500 sentences; these are 64."""
    material = few_texts()
    monkeypatch.setattr("argosy.evaluate.material.read_material", lambda languages=(): material)
    return material


def drift_of(reference: Path, candidate: Path, *questions: Question, **settings: Any) -> dict[str, Any]:
    report = measure_drift(
        reference, candidate, few_texts(), questions, options=OPTIONS, candidate_settings=settings
    )
    return report.as_dict()


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [one for item in value.values() for one in numbers(item)]
    if isinstance(value, list):
        return [one for item in value for one in numbers(item)]
    return [value] if isinstance(value, float) else []


def test_the_same_pack_twice_and_a_pack_that_keeps_every_bit_are_exactly_equal(
    forms: dict[str, Path], tmp_path: Path
) -> None:
    same = packed(forms["source"], tmp_path / "same", "source")
    for reference, candidate in ((forms["q4"], forms["q4"]), (forms["source"], same)):
        found = drift_of(reference, candidate, *QUESTIONS)
        assert found["verdict"] == {"level": "none", "reasons": ["every number is equal"]}
        for one in found["text"]:
            assert numbers(one["kl_nats"]) == numbers(one["perplexity_rise"]) == [0.0] * 3
            assert numbers(one["agreement"]) == [1.0] * 3
            assert one["perplexity_reference"] == one["perplexity_candidate"]
        assert numbers(found["gaps"]["change_nats"]) == [0.0] * 3
        for one in found["groups"]:
            assert numbers([one["shift_nats"], one["loss_rise_nats"]]) == [0.0] * 6
        for one in found["questions"]:
            assert numbers([one["accuracy_change"], one["answers_changed"]]) == [0.0] * 6


def test_a_tighter_format_drifts_more_and_broken_packs_are_flagged(forms: dict[str, Path]) -> None:
    found = {name: drift_of(forms["source"], path) for name, path in forms.items() if name != "source"}
    kl = {name: one["text"][0]["kl_nats"]["value"] for name, one in found.items()}
    gaps = {name: one["gaps"]["change_nats"]["value"] for name, one in found.items()}
    assert 0 < kl["q8"] < kl["q4"] < kl["2 bits"]
    assert 0 < gaps["q8"] < gaps["q4"] < gaps["2 bits"]
    for broken in ("no expert 0", "2 bits"):
        assert found[broken]["verdict"]["level"] == "large", found[broken]["verdict"]
        assert found[broken]["verdict"]["reasons"][0].startswith("KL is ")
    for one in found["q4"]["text"]:
        assert one["kl_nats"]["low"] <= one["kl_nats"]["value"] <= one["kl_nats"]["high"]


def test_another_setting_of_the_same_model_is_compared(forms: dict[str, Path]) -> None:
    found = drift_of(forms["q8"], forms["q8"], kv_dtype="f16")
    assert found["candidate"]["settings"] == {"kv_dtype": "f16"}
    assert found["reference"]["identity"] == found["candidate"]["identity"]
    assert 0 < found["text"][0]["kl_nats"]["value"] < 0.01


def test_no_budget_number_of_threads_or_batch_changes_a_digit(forms: dict[str, Path]) -> None:
    def measured(**options: Any) -> dict[str, Any]:
        material = few_texts()
        report = measure_drift(
            forms["source"], forms["q4"], material, QUESTIONS,
            options={**OPTIONS, **options}, candidate_settings={},
        )  # fmt: skip
        return report.as_dict()

    assert measured() == measured(threads=2, expert_slots=3, chunk_tokens=16)


def test_the_numbers_are_those_of_the_models_logits(forms: dict[str, Path]) -> None:
    """A second computation, from whole arrays."""
    material = few_texts()
    found = drift_of(forms["source"], forms["q4"])

    def log_softmax(logits: Any) -> Any:
        shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))

    passages, favours = [], []
    for name in ("source", "q4"):
        with Engine.open(forms[name], **OPTIONS) as engine:
            assert engine.tokenizer is not None
            ids = [engine.tokenizer.encode(text) for text in material.passages]
            logits = [log_softmax(engine.logits(one)[:-1]) for one in ids]
            passages.append(logits)
            scores = []
            for text in material.texts():
                one = engine.tokenizer.encode(text)
                rows = log_softmax(engine.logits(one)[:-1])
                scores.append(rows[np.arange(len(one) - 1), one[1:]].sum())
            ends = np.array(scores).reshape(len(material.templates), len(material.groups), 2)
            favours.append(ends[:, :, 0] - ends[:, :, 1])
    p, q = (np.concatenate(one) for one in passages)
    whole = found["text"][0]
    assert whole["num_tokens"] == len(p)
    assert whole["kl_nats"]["value"] == pytest.approx((np.exp(p) * (p - q)).sum(axis=1).mean(), rel=1e-9)
    assert whole["agreement"]["value"] == pytest.approx((p.argmax(axis=1) == q.argmax(axis=1)).mean())
    change = favours[1] - favours[0]
    for first, second in ((0, 1), (2, 3)):
        expected = (change[:, first] - change[:, second]).mean() / 2
        for number, sign in ((first, 1), (second, -1)):
            shift = found["groups"][number]["shift_nats"]["value"]
            assert shift == pytest.approx(sign * expected, abs=1e-4)  # float32 sums of log-probabilities
    gaps = np.abs(np.stack([change[:, 0] - change[:, 1], change[:, 2] - change[:, 3]]))
    assert found["gaps"]["change_nats"]["value"] == pytest.approx(gaps.mean(), abs=1e-4)


# ── adapters ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of attention, and of the experts' down_proj."""
    modules = {
        f"model.layers.{layer}.self_attn.{name}_proj": pair(
            *((64, 32) if name == "q" else (32, 64)), seed=layer
        )
        for layer in (0, 1)
        for name in ("q", "o")
    }
    modules |= {
        f"model.layers.1.mlp.experts.{expert}.down_proj": pair(32, 24, seed=expert) for expert in range(6)
    }
    return write_peft(tmp_path_factory.mktemp("adapter") / "ship", modules, lora_alpha=1)


def adapted(model: Path, *sides: WantedAdapter | None, **options: Any) -> dict[str, Any]:
    return measure_drift(
        model, model, few_texts(), QUESTIONS, options={**OPTIONS, **options}, candidate_settings={}, adapters=sides
    ).as_dict()  # fmt: skip


def test_an_adapter_with_scale_zero_changes_no_number(forms: dict[str, Path], adapter: Path) -> None:
    found = adapted(forms["q4"], None, WantedAdapter("ship", adapter, 0.0))
    assert found["verdict"] == {"level": "none", "reasons": ["every number is equal"]}


def test_the_drift_of_an_adapter_is_that_of_the_models_logits_at_every_budget(
    forms: dict[str, Path], adapter: Path
) -> None:
    wanted = WantedAdapter("ship", adapter, 0.5)
    found = adapted(forms["source"], None, wanted)
    assert found == adapted(forms["source"], None, wanted, threads=2, expert_slots=3, chunk_tokens=16)
    with Engine.open(forms["source"], loras={"ship": (adapter, 0.5)}, **OPTIONS) as engine:
        assert engine.tokenizer is not None
        divergences = []
        for text in few_texts().passages:
            ids = engine.tokenizer.encode(text)
            p, q = (
                logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
                for logits in (
                    engine.logits(ids, adapter=name)[:-1].astype(np.float64) for name in (None, "ship")
                )
            )
            divergences.append((np.exp(p) * (p - q)).sum(axis=1))
    expected = np.concatenate(divergences).mean()
    assert expected > 1e-3
    assert found["text"][0]["kl_nats"]["value"] == pytest.approx(expected, rel=1e-9)
    base, with_it = found["reference"], found["candidate"]
    assert (base["name"], with_it["name"]) == ("source", "source:ship")
    assert with_it["settings"] == {"lora_scale": 0.5}
    # A card of the base must not take this report for one about the base.
    assert with_it["identity"].startswith(base["identity"] + "+lora:")


def test_an_activated_adapter_is_refused_before_a_text_is_read(
    forms: dict[str, Path], tmp_path: Path
) -> None:
    modules = {"model.layers.0.self_attn.q_proj": pair(64, 32)}
    path = write_peft(tmp_path / "activated", modules, alora_invocation_tokens=[5, 6])
    with pytest.raises(UsageError, match="changes a text only from its invocation tokens on"):
        adapted(forms["source"], None, WantedAdapter("one", path))


def scores_with(
    sentences: np.ndarray, answers: np.ndarray, divergences: Sequence[float] = (0.0,) * 4
) -> Scores:
    """Scores of two passages with two blocks each; `divergences` has one value for each block."""
    blocks = [np.full(32, value) for value in divergences]
    return Scores(
        [np.ones(64), np.ones(64)], sentences.reshape(-1), np.full(sentences.size, 9), answers.reshape(-1),
        [np.concatenate(blocks[:2]), np.concatenate(blocks[2:])], [np.ones(64, np.bool_)] * 2,
    )  # fmt: skip


def test_a_group_that_is_favoured_more_and_worse_answers_are_reasons(few: Material) -> None:
    random = np.random.default_rng(3)
    before = random.normal(size=(8, 4, 2))
    after = before + random.normal(scale=1e-3, size=before.shape)
    after[:, 2, 0] += 0.8  # tall: better ends
    answers = np.zeros((60, 3))
    answers[:, 2] = 1.0
    worse = answers.copy()
    worse[:30, 0] = 2.0
    questions = [Question("?", ("a", "b", "c"), 2, "ambig")] * 60
    verdict = compare(few, questions, scores_with(before, answers), scores_with(after, worse)).verdict
    assert verdict.level == "large"
    said = "\n".join(verdict.reasons)
    assert "size: tall is favoured more than before, by 0.4 nats" in said
    assert "size: short is favoured less than before" in said
    assert "accuracy (all) changes by -50 %" in said
    assert "colour" not in said
    assert "KL" not in said


@pytest.mark.parametrize(
    ("divergences", "level"),
    [
        ((0.02,) * 4, "small"),
        ((0.5,) * 4, "large"),
        ((0.0, 1.0, 0.0, 1.0), "notable"),  # the same mean, and no certainty
        ((0.0, 0.0, 0.0, 0.12), "notable"),  # a small mean, and no certainty either
    ],
)
def test_a_level_is_claimed_for_a_whole_interval(
    few: Material, divergences: tuple[float, ...], level: str
) -> None:
    sentences, answers = np.zeros((8, 4, 2)), np.zeros((0, 3))
    before, after = (scores_with(sentences, answers, own) for own in ((0.0,) * 4, divergences))
    assert compare(few, [], before, after).verdict.level == level


@pytest.mark.parametrize(("swing", "is_certain"), [(0.0, True), (8.0, False)])
def test_a_group_reads_less_likely_only_if_that_is_certain(
    few: Material, swing: float, is_certain: bool
) -> None:
    before, answers = np.zeros((8, 4, 2)), np.zeros((0, 3))
    after = before.copy()
    after[::2, 2], after[1::2, 2] = -3.0 - swing, -3.0 + swing  # the same mean
    reasons = compare(few, [], scores_with(before, answers), scores_with(after, answers)).verdict.reasons
    assert any("reads less likely than before" in reason for reason in reasons) == is_certain


def test_gaps_that_change_in_both_ways_are_large_drift_that_favours_nobody(few: Material) -> None:
    before, answers = np.zeros((8, 4, 2)), np.zeros((0, 3))
    after = before.copy()
    after[::2, 2, 0], after[1::2, 2, 0] = 4.0, -4.0
    verdict = compare(few, [], scores_with(before, answers), scores_with(after, answers)).verdict
    assert verdict.level == "large"
    assert verdict.reasons == ("a gap between two groups changes by 2 nats (2 to 2)",)


def test_models_with_other_tokens_are_refused(forms: dict[str, Path], tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", qwen3_moe(vocab_size=600), seed=1)
    with pytest.raises(UsageError, match="their vocabularies have 512 and 600 tokens"):
        drift_of(forms["source"], other)
    bare = write_model(tmp_path / "bare", qwen3_moe(vocab_size=512), seed=1)
    with pytest.raises(UsageError, match="has no tokenizer"):
        drift_of(forms["source"], bare)
    split = write_sharp_model(tmp_path / "split")
    path = split / "tokenizer.json"
    read = json.loads(path.read_text())
    read["model"]["merges"] = []
    path.write_text(json.dumps(read))
    with pytest.raises(UsageError, match="split the same text in different ways"):
        drift_of(forms["source"], split)


def test_a_text_that_does_not_fit_the_context_is_refused(forms: dict[str, Path]) -> None:
    long = Question("word " * 1000, ("a", "b", "c"), 0, "all")
    with pytest.raises(UsageError, match="the model's context holds 512"):
        drift_of(forms["source"], forms["q8"], long)


def test_logits_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    class Broken:
        def read_logits(self, ids: Any, take: Any, adapter: str | None) -> None:
            take(0, np.full((len(ids), 8), np.nan, np.float32))

    with RowFile(tmp_path, 8, 8) as rows, pytest.raises(ArgosyError, match="not finite numbers"):
        score(Broken(), Tokens([np.arange(4)], [], []), rows, is_reference=True)  # type: ignore[arg-type]


def test_rows_come_back_as_they_went_and_leave_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_file, "_WRITTEN_BYTES", 64)
    rows = np.random.default_rng(2).normal(size=(50, 7)).astype(np.float32)
    with RowFile(tmp_path / "made", 50, 7) as kept:
        for start in range(0, 50, 6):
            kept.append(rows[start : start + 6])
        assert list((tmp_path / "made").iterdir()) == []
        for start, count in ((0, 1), (1, 20), (21, 29)):
            np.testing.assert_array_equal(kept.take(count), rows[start : start + count])
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be written"):
        RowFile(tmp_path / "file" / "beside", 1, 1)
    monkeypatch.setattr(resources, "free_disk_bytes", lambda path: 100 * MIB)
    with pytest.raises(DiskFull, match=r"take 320 MB"):
        RowFile(tmp_path, 1000, 80_000)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with (
        RowFile(tmp_path, 50, 7) as kept,
        pytest.raises(DiskFull, match="no room for the reference's logits"),
    ):
        kept.append(rows)


# ── the command line ────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_command_says_the_verdict_first_and_saves_the_same_facts(
    forms: dict[str, Path], tmp_path: Path, capsys: Captured
) -> None:
    questions = tmp_path / "bbq.jsonl"
    lines = [
        {"context": "Two met.", "question": "Who?", "ans0": "A", "ans1": "B", "ans2": "?", "label": 2, **more}
        for more in ({"context_condition": "ambig"}, {"context_condition": "disambig"}, {})
    ]
    questions.write_text("\n".join(map(json.dumps, lines)))
    command = [
        "eval",
        "drift",
        str(forms["source"]),
        str(forms["2 bits"]),
        "--memory",
        "1GiB",
        "--threads",
        "1",
    ]
    saved = tmp_path / "report.json"
    assert main([*command, "--bbq", str(questions), "--save", str(saved)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "reference  source, experts f32, rest f32"
    assert said[1].startswith("candidate  two-bits, experts q8, rest ")
    assert said[2].startswith("drift      large: KL is ")
    facts = json.loads(saved.read_text())
    assert [one["condition"] for one in facts["questions"]] == ["all", "ambig", "disambig", "unstated"]
    for part in ("passages", "pairs of groups: 2 in 8 templates", "groups", "  colour", "questions"):
        assert any(line.startswith(part) for line in said), part
    assert main([*command, "--bbq", str(questions), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == facts
    assert main([*command, "--bbq", str(tmp_path / "none")]) == 2


def test_a_refusal_names_no_option_of_another_command(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*models: Any, **options: Any) -> DriftReport:
        hint = "`--memory 200MiB` works; `--memory 176MiB --kv q8 --context 512` is the least"
        raise DoesNotFit("needs 199 MiB", hint=hint, needed_bytes=199 * MIB, budget_bytes=MIB, plan={})

    monkeypatch.setattr("argosy.evaluate.measure.measure_drift", refuse)
    assert main(["eval", "drift", "a.gguf", "b.gguf", "--memory", "150MiB"]) == 3
    said = capsys.readouterr().err
    assert "needs 199 MiB" in said
    assert said.splitlines()[-1] == "hint: `--memory 201MiB` works"


def test_a_pack_with_a_report_keeps_it_and_stays_a_pack(
    forms: dict[str, Path], tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[DriftReport] = []

    def once(*models: Any, **options: Any) -> DriftReport:
        if not measured:
            measured.append(measure_drift(*models, **options))
        return measured[0]

    with monkeypatch.context() as patch:
        patch.setattr("argosy.evaluate.measure.measure_drift", once)
        target = tmp_path / "packed"
        command = [
            "pack",
            str(forms["source"]),
            str(target),
            "--format",
            "q8",
            "--report",
            "--memory",
            "1GiB",
        ]
        assert main(command) == 0
        said = capsys.readouterr().out
        assert said.startswith(f"packed   {target} as q8")
        assert "\ndrift      notable: " in said
        assert json.loads((target / "drift.json").read_text())["reference"]["name"] == "source"
        assert verify_pack(target).num_files > 2
        assert main(["pack", *command[1:2], str(tmp_path / "again"), *command[3:], "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["drift"] == measured[0].as_dict()
    assert main(["pack", "--verify", str(target), "--report"]) == 2
    assert main([*command[:2], str(tmp_path / "other"), "--format", "q8", "--memory", "1GiB"]) == 2
    capsys.readouterr()
    assert main(["pack", *command[1:2], str(tmp_path / "small"), *command[3:6], "--memory", "1MiB"]) == 3
    assert "the pack is complete, and `argosy eval drift" in capsys.readouterr().err
    with Engine.open(tmp_path / "small", **OPTIONS) as engine:
        assert engine.generate("a", SamplingParams(max_tokens=1)).token_ids


def test_a_share_of_nearly_all_tokens_is_written_as_a_number() -> None:
    assert _shown(Estimate(0.997, 0.985, 1.0), percent=True) == "100 % (98 to 100)"
    assert _shown(Estimate(0.0123, 0.0, 0.02), "nats") == "0.012 nats (0 to 0.02)"
