"""`--memory` covers the whole process: a model of 4x the budget runs in a cgroup whose memory limit is the budget.

`benchmarks/memory.py` does the same on a larger scale and prints the figures.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from argosy.model.families import open_model
from cgroup import CappedRun, run_capped, why_no_cap
from make_checkpoint import raw_config, write_checkpoint

BUDGET_BYTES = 112 << 20
PROMPT_TOKENS, NEW_TOKENS = 520, 40

GENERATE = """
import json, random, sys
from argosy import Engine, SamplingParams
from argosy.machine.resources import process_footprint

model, memory, prompt_tokens, new_tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
prompt = random.Random(5).choices(range(1024), k=prompt_tokens)
options = json.loads(sys.argv[5])
tables_before = process_footprint().page_table_bytes
with Engine.open(model, memory=memory, threads=2, context=prompt_tokens + new_tokens, **options) as engine:
    result = engine.generate(prompt, SamplingParams(max_tokens=new_tokens, ignore_eos=True))
    plan = engine.plan
    tables = process_footprint().page_table_bytes - tables_before
    print(json.dumps([result.token_ids, result.ledger.as_dict(), {**plan.as_dict(), "page_tables_found": tables}]))
"""


def generate(
    model: Path, limit_bytes: int, **options: str
) -> tuple[CappedRun, list[int], dict[str, Any], dict[str, int]]:
    arguments = [str(model), str(limit_bytes), str(PROMPT_TOKENS), str(NEW_TOKENS), json.dumps(options)]
    # The first run measures how products run, within the same budget, and the others read that.
    env = os.environ | {"ARGOSY_TUNE": "on", "ARGOSY_CACHE": str(model.parent.parent / "cache")}
    run = run_capped(
        [sys.executable, "-c", GENERATE, *arguments], limit_bytes=limit_bytes, timeout_s=250, env=env
    )
    assert run.num_oom_kills == 0, "killed for memory"
    assert run.returncode == 0, run.stderr
    token_ids, ledger, plan = json.loads(run.stdout)
    return run, token_ids, ledger, plan


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Write 500 MiB in bf16; remove it right after the tests, because pytest keeps its directories for a while."""
    config = raw_config(
        hidden=512, layers=10, experts=64, width=256, heads=4, kv_heads=1, vocab=1024, context=2048
    )
    directory = tmp_path_factory.mktemp("memory") / "checkpoint"
    write_checkpoint(directory, config)
    yield directory
    shutil.rmtree(directory)


@pytest.mark.skipif(bool(why_no_cap()), reason=why_no_cap() or "")
def test_a_model_of_four_times_the_budget_runs_in_a_cgroup_of_the_budget(checkpoint: Path) -> None:
    files = open_model(checkpoint)
    assert files.dense_bytes + files.expert_bytes >= 4 * BUDGET_BYTES
    capped, token_ids, ledger, plan = generate(checkpoint, BUDGET_BYTES)

    assert capped.peak_bytes <= BUDGET_BYTES
    assert capped.peak_swap_bytes == 0
    assert plan["total_bytes"] <= BUDGET_BYTES
    assert plan["expert_slots"] < plan["experts"] / 4
    assert ledger["bytes_read"] > 4 * BUDGET_BYTES
    assert sum(ledger["parts"].values()) == pytest.approx(ledger["wall_s"], rel=1e-3)

    _, resident_ids, resident_ledger, resident_plan = generate(checkpoint, 1 << 30)
    assert resident_ledger["hits"] == resident_ledger["lookups"]
    assert len(token_ids) == NEW_TOKENS
    assert token_ids == resident_ids
    for planned, counted in ((plan, ledger), (resident_plan, resident_ledger)):
        # The context is filled, and so are the chunk and the expert cache: nearly all that is planned is used.
        peak_bytes = counted["peak_bytes"] + planned["page_tables_found"]
        assert 0 <= planned["total_bytes"] - peak_bytes < 16 << 20
        assert (
            planned["expert_cache_bytes"] // 512
            <= planned["page_tables_found"]
            <= planned["page_table_bytes"]
        )


@pytest.mark.full
@pytest.mark.skipif(bool(why_no_cap()), reason=why_no_cap() or "")
def test_prompts_that_are_written_to_files_and_read_again_stay_within_the_budget(
    checkpoint: Path, tmp_path: Path
) -> None:
    answers = []
    for cached_tokens in (0, PROMPT_TOKENS // 16 * 16):
        capped, token_ids, ledger, plan = generate(checkpoint, BUDGET_BYTES, kv_dir=str(tmp_path / "kv"))
        assert capped.peak_bytes <= BUDGET_BYTES
        assert capped.peak_swap_bytes == 0
        assert plan["total_bytes"] <= BUDGET_BYTES
        assert ledger["cached_tokens"] == cached_tokens
        answers.append(token_ids)
    assert answers[0] == answers[1]
