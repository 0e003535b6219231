"""Committed adapters give the logits of transformers with peft, whatever experts are in memory.

`tests/models/make_adapters.py` writes them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from argosy import SamplingParams
from tests.helpers.adapters import open_adapted
from tests.models.references import ADAPTERS, DIRECTORY, LARGEST_DIFFERENCE, Reference, difference
from tests.models.runnable import runnable

GREEDY = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
REFERENCES = tuple(Reference(directory) for directory in sorted(ADAPTERS.iterdir()))


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda reference: reference.name)
@pytest.mark.parametrize("expert_slots", [None, 4])
def test_logits_and_tokens_are_those_of_peft(
    reference: Reference, expert_slots: int | None, tmp_path: Path
) -> None:
    base = runnable(DIRECTORY / reference.name, tmp_path)
    with open_adapted(base, {"own": reference.directory}, expert_slots=expert_slots) as engine:
        logits = engine.logits(reference.input_ids, adapter="own")
        tokens = engine.generate(reference.input_ids, GREEDY, adapter="own").token_ids
    assert difference(logits, reference.logits) <= LARGEST_DIFFERENCE
    assert tokens == reference.greedy


def test_without_the_adapter_the_answer_is_another(tmp_path: Path) -> None:
    for reference in REFERENCES:
        own = Reference(DIRECTORY / reference.name)
        base = runnable(own.directory, tmp_path)
        with open_adapted(base, {"own": reference.directory}) as engine:
            assert difference(engine.logits(own.input_ids), own.logits) <= LARGEST_DIFFERENCE
            assert engine.generate(own.input_ids, GREEDY).token_ids == own.greedy
            assert difference(engine.logits(own.input_ids, adapter="own"), own.logits) > 0.1
