"""Models without experts: everything is in memory, a budget below that is refused, and packs hold them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from argosy import Engine, SamplingParams
from argosy.checkpoint.pack import pack
from argosy.cli.main import main
from argosy.config import MIB
from argosy.errors import DoesNotFit, UsageError
from argosy.model.families import open_model
from tests.families.published_dense import qwen3 as qwen3_8b
from tests.models.references import LARGEST_DIFFERENCE, REFERENCES, difference
from tests.models.tiny import prompt_ids, write_model
from tests.models.tiny_dense import gemma3, llama, mistral, qwen3

GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Dense weights of some size, so that a budget can be too small for them alone.
    config = qwen3(hidden_size=512, intermediate_size=1536, vocab_size=1024, max_position_embeddings=1024)
    return write_model(tmp_path_factory.mktemp("dense"), config, seed=3)


def test_everything_is_in_memory_and_there_is_no_expert_cache(model: Path) -> None:
    with Engine.open(model, memory="1GiB", threads=1) as engine:
        plan = engine.plan
        assert (plan.slots.num_experts, plan.slots.own, plan.expert_bytes) == (0, 0, 0)
        assert plan.dense_bytes >= open_model(model).dense_bytes
        assert "expert cache" not in [label for label, _, _ in plan.lines()]
        result = engine.generate(prompt_ids(qwen3(), 5), GREEDY)
        assert len(result.token_ids) == 8
        with pytest.raises(DoesNotFit, match="nothing of it can leave while it runs"):
            engine.resize(plan.total_bytes - MIB)


def test_a_budget_below_the_weights_is_refused_with_what_is_needed(model: Path) -> None:
    with pytest.raises(DoesNotFit) as refused:
        Engine.open(model, memory="64MiB", threads=1)
    needed = refused.value.facts["needed_bytes"]
    assert isinstance(needed, int)
    # The process grows between two measurements, by less than this.
    with Engine.open(model, memory=f"{needed // MIB + 8}MiB", threads=1) as engine:
        assert engine.plan.total_bytes <= engine.plan.budget_bytes
        assert engine.generate(prompt_ids(qwen3(), 5), GREEDY).token_ids


@pytest.mark.parametrize("config", [qwen3(), llama(), mistral(), gemma3()], ids=lambda one: one["model_type"])
@pytest.mark.parametrize("format", ["source", "bf16"])
def test_a_pack_answers_as_its_source(config: dict[str, object], format: str, tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", dict(config), seed=3)
    pack(open_model(source), tmp_path / "packed", format=format)
    logits = []
    for place in (source, tmp_path / "packed"):
        with Engine.open(place, memory="1GiB", threads=1) as engine:
            logits.append(engine.logits(prompt_ids(dict(config), 5)))
    np.testing.assert_array_equal(*logits)


def test_the_networks_of_a_pack_have_its_format(model: Path, tmp_path: Path) -> None:
    pack(open_model(model), tmp_path / "q4", format="q4")
    dense = open_model(tmp_path / "q4").dense
    formats = {
        name: dense[f"layers.1.{name}"].format for name in ("q", "o", "gate", "up", "down", "attn_norm")
    }
    assert formats == {"q": "q8", "o": "q8", "gate": "q4", "up": "q4", "down": "q4", "attn_norm": "f32"}
    logits = []
    for place in (model, tmp_path / "q4"):
        with Engine.open(place, memory="1GiB", threads=1) as engine:
            logits.append(engine.logits(prompt_ids(qwen3(), 5)))
    assert 0 < difference(logits[1], logits[0]) < 0.2


def test_plan_and_show_say_that_nothing_streams(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(qwen3_8b()))
    assert main(["plan", str(tmp_path), "--machine", "box:desktop-64"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        "fits      yes, with all weights in memory, because it has no experts that could stream; "
    )
    assert "assumed to be packed as q8+q4" in out
    assert "8.2 B parameters, 7.6 B active; no experts, weights q8+q4" in out
    assert "expert cache" not in out
    assert "hit rate:" not in out
    assert main(["plan", str(tmp_path), "--machine", "box:desktop-64", "--memory", "4GiB"]) == 3
    assert "no: it needs 6.0 GiB" in capsys.readouterr().out
    assert main(["show", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert (
        "  layers        36, none with routed experts\n  experts       none: all weights stay in memory\n"
        in out
    )


def test_an_expert_cache_can_neither_be_sized_nor_recorded(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match="has no routed experts, so expert_slots has no meaning"):
        Engine.open(model, memory="1GiB", threads=1, expert_slots=4)
    text = model / "text.txt"
    text.write_text("some text")
    assert main(["routes", str(model), str(text), "--memory", "1GiB"]) == 2
    assert "has no routed experts" in capsys.readouterr().err


def test_references_in_a_batch_equal_those_alone() -> None:
    reference = next(one for one in REFERENCES if one.name == "gemma3_scaled")
    with Engine.open(reference.directory, memory="1GiB", threads=1, kv_dtype="f32") as engine:
        assert difference(engine.logits(reference.input_ids), reference.logits) <= LARGEST_DIFFERENCE
        prompts = [reference.input_ids[:n] for n in (5, 17, 32)]
        alone = [engine.generate(prompt, GREEDY).token_ids for prompt in prompts]
        assert [one.token_ids for one in engine.generate_batch(prompts, GREEDY)] == alone
