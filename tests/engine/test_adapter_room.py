"""Adapters take memory from experts and give it back; what does not fit is refused, and nothing changes."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy import Engine, SamplingParams
from argosy.adapters.needs import adapter_needs
from argosy.adapters.parts import ExpertParts
from argosy.adapters.peft import WEIGHTS_FILE as WEIGHTS
from argosy.adapters.reading import open_adapter
from argosy.budget.footprint import ModelFootprint
from argosy.config import AdapterNeeds
from argosy.errors import DoesNotFit
from argosy.model.model import LoadedAdapter, Model
from argosy.open.models import configure, open_files
from tests.models.references import ADAPTERS, DIRECTORY, Reference
from tests.models.runnable import runnable
from tests.models.safetensors_file import read_safetensors, write_safetensors

GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
NAME = "qwen3_moe_plain"
OPTIONS = {"context": 64, "chunk_tokens": 16, "threads": 1, "max_sequences": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runnable(DIRECTORY / NAME, tmp_path_factory.mktemp("base"))


def test_a_plan_counts_adapters_and_a_slot_has_room_for_its_parts(base: Path) -> None:
    files = open_files(base)
    config = configure(base, files, memory="1GiB", **OPTIONS)
    needs = adapter_needs(open_adapter(ADAPTERS / NAME, files), files)
    assert needs.part_bytes > 0
    without, footprint = ModelFootprint(files, config), ModelFootprint(files, config).with_adapters(needs)
    assert footprint.kv_dtype == without.kv_dtype
    assert footprint.num_experts * footprint.part_bytes >= needs.part_bytes
    assert footprint.slot_bytes - without.slot_bytes == footprint.part_bytes
    wanted = ModelFootprint(
        files, configure(base, files, memory="1GiB", loras={"one": ADAPTERS / NAME}, **OPTIONS)
    )
    assert wanted.adapters == needs
    assert (
        ModelFootprint(
            files, configure(base, files, loras={"one": (ADAPTERS / NAME, 0.0)}, **OPTIONS)
        ).adapters
        == AdapterNeeds()
    )


@pytest.mark.parametrize("fraction", [0.0, 0.5, 2.0])
def test_adapters_that_come_and_go_leave_the_memory_as_it_was(base: Path, fraction: float) -> None:
    prompt = Reference(DIRECTORY / NAME).input_ids[:8]
    with Engine.open(base, memory="2GiB", loras={"own": ADAPTERS / NAME}, **OPTIONS) as whole:
        expected = whole.generate(prompt, GREEDY, adapter="own").token_ids
        base_answer = whole.generate(prompt, GREEDY).token_ids
        plan = whole.plan
    least = plan.total_bytes - plan.expert_bytes
    memory = least + int(plan.expert_bytes * fraction) + (4 << 20)
    with Engine.open(base, memory=memory, **OPTIONS) as engine:
        before = engine.plan
        for _ in range(5):
            engine.load_adapter("own", ADAPTERS / NAME)
            assert engine.plan.adapter_bytes > 0
            assert engine.plan.total_bytes <= memory
            assert engine.generate(prompt, GREEDY, adapter="own").token_ids == expected
            assert engine.generate(prompt, GREEDY).token_ids == base_answer
            engine.drop_adapter("own")
            assert engine.plan.adapter_bytes == 0
        assert engine.plan.slots.own == before.slots.own
        assert engine.generate(prompt, GREEDY).token_ids == base_answer


def test_an_adapter_that_does_not_fit_is_refused_with_numbers(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine.open(base, memory="1GiB", **OPTIONS) as engine:
        before = replace(engine.plan)
        from argosy.adapters import registry

        monkeypatch.setattr(registry, "adapter_needs", lambda files, model: AdapterNeeds(2 << 30, 0, 0))
        with pytest.raises(DoesNotFit, match=r"adapters 2\.0 GiB"):
            engine.load_adapter("own", ADAPTERS / NAME)
        assert engine.plan == before
        assert engine.adapters == ()
        monkeypatch.undo()
        engine.load_adapter("own", ADAPTERS / NAME)


def test_an_adapter_that_gets_no_number_leaves_nothing(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Model, number: int, loaded: LoadedAdapter | None) -> None:
        taken.append(loaded)
        raise RuntimeError("no number")

    taken: list[LoadedAdapter | None] = []
    with Engine.open(base, memory="1GiB", **OPTIONS) as engine:
        before = engine.plan
        monkeypatch.setattr(Model, "set_adapter", refuse)
        with pytest.raises(RuntimeError, match="no number"):
            engine.load_adapter("own", ADAPTERS / NAME)
        monkeypatch.undo()
        (loaded,) = taken
        assert loaded is not None
        assert isinstance(loaded.experts, ExpertParts)
        with pytest.raises(ValueError, match="closed"):
            loaded.experts._arena.array()
        assert engine.plan == before
        assert engine.adapters == ()


def test_an_adapter_with_its_columns_in_the_other_order_answers_as_the_first(
    base: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(ADAPTERS / NAME, tmp_path / "slowest"))
    num_experts = open_files(base).config.num_experts
    changed = {}
    for name, given in read_safetensors(other / WEIGHTS).items():
        is_fused = ".experts." in name and "lora_B" in name
        by_expert = given.reshape(len(given), -1, num_experts) if is_fused else given
        changed[name] = ("BF16", by_expert.swapaxes(1, 2).reshape(len(given), -1) if is_fused else given)
    write_safetensors(other / WEIGHTS, changed)
    prompt, answers = Reference(DIRECTORY / NAME).input_ids[:8], []
    for path, columns in ((ADAPTERS / NAME, None), (other, "expert_slowest"), (other, None)):
        options: Any = {**OPTIONS, "loras": {"own": path}, "lora_columns": columns}
        with Engine.open(base, memory="2GiB", **options) as engine:
            answers.append(engine.logits(prompt, adapter="own"))
            engine.drop_adapter("own")
            engine.load_adapter("own", path, columns=columns or "expert_fastest")
            np.testing.assert_array_equal(engine.logits(prompt, adapter="own"), answers[-1])
    np.testing.assert_array_equal(answers[0], answers[1])
    assert not np.array_equal(answers[0], answers[2])
