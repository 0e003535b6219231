"""An adapter trained for a few steps computes the same in torch, in Argosy's recipe, and in PEFT's own model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from argosy import Engine
from argosy.adapters.making.mixture import Mixture
from argosy.adapters.making.peft_files import write_peft
from argosy.adapters.making.rows import Example
from argosy.adapters.making.training import batches, mean_loss, split, train
from argosy.adapters.making.weights import num_pair_values, read_weights
from argosy.cli.main import main
from argosy.errors import ArgosyError
from argosy.model.families import open_model
from tests.models.tiny import prompt_ids, qwen2_moe, write_model
from tests.prompt.tokenizers_for_tests import CHATML, byte_level_json, write_tokenizer

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("one_quiet_thread")]

LARGEST_DIFFERENCE = 3e-4
CONFIGS = {
    "renormalised, no biases": qwen2_moe(norm_topk_prob=True, qkv_bias=False, vocab_size=512),
    "plain weights, biases, own head": qwen2_moe(vocab_size=512, tie_word_embeddings=False),
}
STEPS = 3


def examples(count: int, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        ids = rng.integers(3, 512, 5 + number).astype(np.int64)
        is_learned = np.ones(len(ids), np.bool_)
        is_learned[: 1 + number % 3] = False
        found.append(Example(ids, is_learned))
    return found


def mixture(directory: Path, *, rank: int = 3) -> Mixture:
    files = open_model(directory)
    return Mixture(files.config, read_weights(files), rank=rank, alpha=2 * rank, seed=0)


def trained(model: Mixture, *, learning_rate: float = 0.05) -> Mixture:
    rows = examples(10)
    train(model, rows, rows[:1], steps=STEPS, learning_rate=learning_rate, seed=0, tell=lambda *_: None)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_before_training_torch_and_the_engine_agree(name: str, tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model", CONFIGS[name], seed=5, dtype="F32")
    ids = prompt_ids(CONFIGS[name], 1, 40)
    with Engine.open(directory, memory="1GiB", kv_dtype="f32", threads=1) as engine:
        expected = engine.logits(ids)
    assert np.abs(mixture(directory).logits(ids) - expected).max() < LARGEST_DIFFERENCE


@pytest.mark.parametrize("name", CONFIGS)
def test_peft_reads_the_directory_and_computes_the_same(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    import transformers

    directory = write_model(tmp_path / "model", CONFIGS[name], seed=5, dtype="F32")
    model = mixture(directory)
    ids = prompt_ids(CONFIGS[name], 1, 40)
    before = model.logits(ids)
    trained(model)
    write_peft(tmp_path / "made", model.trained(), base="model")
    base = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "made").eval()
    with torch.inference_mode():
        expected = theirs(torch.tensor([ids])).logits[0].numpy()
    found = model.logits(ids)
    assert np.abs(found - before).max() > 0.05  # it learned something
    assert np.abs(found - expected).max() < LARGEST_DIFFERENCE


def test_the_loss_falls_and_equal_seeds_give_equal_pairs(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model", CONFIGS["renormalised, no biases"], seed=5, dtype="F32")
    rows = examples(10)
    first, second = mixture(directory), mixture(directory)
    before = mean_loss(first, rows)
    for model in (first, second):
        trained(model)
    after = mean_loss(first, rows)
    assert before is not None
    assert after is not None
    assert after < before - 0.1
    for mine, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    made = first.trained()
    assert made.num_values == num_pair_values(first.config, 3)


def test_the_loss_is_that_of_torch(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model", CONFIGS["renormalised, no biases"], seed=5, dtype="F32")
    model, rows = mixture(directory), examples(6)
    total = count = 0.0
    for row in rows:
        logits = torch.from_numpy(model.logits(row.ids.tolist()))
        losses = torch.nn.functional.cross_entropy(
            logits[:-1], torch.from_numpy(row.ids[1:]), reduction="none"
        )
        total += float(losses[torch.from_numpy(row.is_learned[1:])].sum())
        count += row.is_learned.sum()
    together = model.loss(
        [torch.from_numpy(row.ids) for row in rows], [torch.from_numpy(row.is_learned) for row in rows]
    )
    assert together.item() == pytest.approx(total, rel=1e-5)
    assert mean_loss(model, rows) == pytest.approx(total / count, rel=1e-5)


def test_gradients_are_those_of_a_difference(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model", CONFIGS["renormalised, no biases"], seed=5, dtype="F32")
    model, rows = trained(mixture(directory)), examples(4)
    ids, marks = (
        [torch.from_numpy(row.ids) for row in rows],
        [torch.from_numpy(row.is_learned) for row in rows],
    )
    model.zero_grad()
    model.loss(ids, marks).backward()
    for name in ("0_q", "1_o", "0_gate_up", "1_down"):
        for values in (model.pairs[name].down, model.pairs[name].up):
            slope = values.grad
            step = 1e-2 * slope / slope.norm()
            with torch.no_grad():
                values.add_(step)
                above = model.loss(ids, marks).item()
                values.sub_(2 * step)
                below = model.loss(ids, marks).item()
                values.add_(step)
            assert (above - below) / 2e-2 == pytest.approx(float(slope.norm()), rel=0.03)


def test_a_loss_that_is_no_number_stops_it(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model", CONFIGS["renormalised, no biases"], seed=5, dtype="F32")
    with pytest.raises(ArgosyError, match="so training stopped and nothing was written"):
        trained(mixture(directory), learning_rate=1e30)


def test_rows_are_held_out_and_batches_repeat_none() -> None:
    rows = examples(25)
    learned, held_out = split(rows, 0)
    assert (len(learned), len(held_out)) == (23, 2)
    assert split(rows[:1], 0) == ([rows[0]], [])
    queue = batches(learned, 0)
    seen = [id(row) for _ in range(3) for row in next(queue)]
    assert len(set(seen)) == len(seen) == 23 or len(seen) == 24
    (first,) = next(batches(rows[:1], 0))
    assert first is rows[0]


def test_the_command_trains_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = write_model(tmp_path / "model", CONFIGS["renormalised, no biases"], seed=5)
    write_tokenizer(directory, byte_level_json(), {"eos_token": "<|im_end|>", "chat_template": CHATML})
    rows: list[dict[str, Any]] = [{"text": f"The quick brown fox number {number}"} for number in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    ask = [
        "adapt",
        str(directory),
        str(tmp_path / "rows.jsonl"),
        "-o",
        str(tmp_path / "made"),
        "--steps",
        "3",
    ]
    assert main([*ask, "--rank", "2", "--threads", "1"]) == 0
    told = capsys.readouterr()
    assert [line.split()[0] for line in told.out.splitlines()] == [
        "rows", "check", "pairs", "trained", "held", "memory", "adapter", "next",
    ]  # fmt: skip
    assert "step 3 of 3  loss" in told.err
    assert (tmp_path / "made" / "adapter_config.json").is_file()
    assert main(ask) == 2


def test_the_command_refuses_logits_that_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write_model(tmp_path / "model", CONFIGS["renormalised, no biases"], seed=5)
    write_tokenizer(directory, byte_level_json(), {"eos_token": "<|im_end|>", "chat_template": CHATML})
    (tmp_path / "rows.jsonl").write_text('{"text": "The quick brown fox"}\n')
    monkeypatch.setattr(Mixture, "_rotary", lambda self, lengths: (torch.ones(1), torch.zeros(1)))
    ask = [
        "adapt",
        str(directory),
        str(tmp_path / "rows.jsonl"),
        "-o",
        str(tmp_path / "made"),
        "--threads",
        "1",
    ]
    assert main(ask) != 0
    assert "torch computes other logits than the engine, so nothing was trained" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()
