"""With a slot for every expert, a cache reads the experts that nobody asked for, and native code takes over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy import Engine, SamplingParams
from argosy.engine.shared import Ready, make_ready
from argosy.open.models import configure, open_files
from tests.cli.tiny_chat_model import write_chat_model

# A short context and short steps, so that little of their memory can be lent to experts.
OPTIONS: dict[str, Any] = {
    "memory": "2GiB", "threads": 1, "context": 64, "chunk_tokens": 16, "max_sequences": 1,
}  # fmt: skip
PARAMS = SamplingParams(max_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("fill") / "model")


@pytest.fixture(scope="module")
def ready(path: Path) -> Ready:
    files = open_files(path)
    (ready,), _ = make_ready(
        [("model", files, configure(path, files, **OPTIONS))],
        claims=(),
        recorder=None,
    )
    return ready


def test_a_cache_with_all_experts_runs_like_a_resident_model_and_counts_the_same(
    path: Path, ready: Ready
) -> None:
    prompts = [np.random.default_rng(seed).integers(0, 400, 9).tolist() for seed in range(4)]
    with Engine.open(path, memory="2GiB", threads=1) as resident:
        expected = [resident.generate(prompt, PARAMS).token_ids for prompt in prompts]
        lookups = resident.ledger.lookups
    engine = ready.open(ready.most_bytes)
    assert engine._started.model.experts is not None
    assert engine._started.model.experts.resident is None  # nothing was read yet
    engine.generate(prompts[0], SamplingParams(max_tokens=4, ignore_eos=True))
    stats, num_here = engine._started.model.experts.stats, engine.facts().num_resident
    assert num_here > stats.lookups - stats.hits  # more than tokens asked for
    assert [engine.generate(prompt, PARAMS).token_ids for prompt in prompts] == expected
    facts = engine.facts()
    assert facts.num_resident == facts.num_experts == ready.plan.slots.num_experts
    assert engine._started.model.experts.resident is not None
    assert engine.ledger.lookups > lookups
    before = engine.ledger
    assert engine.generate(prompts[0], PARAMS).token_ids == expected[0]
    after = engine.ledger
    assert after.lookups - before.lookups == after.hits - before.hits > 0
    # With one slot less, steps ask again.
    slot_bytes, lent_slots = ready.plan.slots.slot_bytes, ready.plan.slots.lent + ready.plan.slots.idle
    own_slots = ready.plan.slots.num_experts - ready.plan.slots.own - lent_slots - 1
    plan = engine.resize(ready.budget_bytes(own_slots * slot_bytes + slot_bytes // 2), is_share=True)
    assert plan.slots.reachable == ready.plan.slots.num_experts - 1
    assert engine._started.model.experts.resident is None
    assert [engine.generate(prompt, PARAMS).token_ids for prompt in prompts] == expected
    assert engine._started.model.experts.resident is None
    ready.close(engine)
