"""`argosy bench`: five lines and their facts, from a tiny model that runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from argosy import Engine, __version__
from argosy.cli.main import main
from argosy.config import MIB
from argosy.forecast import bench
from argosy.machine import neighbours, probes
from tests.helpers.forks import Forked
from tests.models.tiny import qwen3_moe, write_model

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _small_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "MEMORY_BYTES", 8 * MIB)


class Measuring(Forked[str]):
    """The process that measures, without the second that its imports take."""

    def _execute_child(self, args: Any, *rest: Any) -> None:
        super()._execute_child((bench._main,), *rest)


@pytest.fixture
def _measures_in_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": Measuring}))


@pytest.mark.usefixtures("_measures_in_a_fork")
def test_the_lines_name_version_machine_model_rates_two_budgets_and_neighbours(
    tmp_path: Path, capsys: Captured
) -> None:
    bare = write_model(
        tmp_path / "bare", qwen3_moe(), seed=1
    )  # without a tokenizer: prompts of random tokens
    assert main(["bench", str(bare), "--threads", "1", "--memory", "1GiB"]) == 0
    out = capsys.readouterr().out
    speed = r"decode [\d.]+ tok/s, hit rate (\d\.\d\d), ([\d.]+) MB read a token; prefill [\d.]+ tok/s of 64;"
    found = re.fullmatch(
        rf"argosy {re.escape(__version__)}( \(\w+\+?\))?, 1 threads on \d+ cores of .+, \w+, [\d.]+ GiB\n"
        r"bare: qwen3_moe, [\d.]+ \wiB, bf16 experts, 2 of 6 a token\n"
        r"memory [\d.]+ GB/s, drive not measured: the model's largest file has less than 64\.0 MiB\n"
        rf"[\d.]+ MiB, 100 % of experts: {speed} first token [\d.]+ s after 16\n"
        rf"[\d.]+ MiB, 50 % of experts: {speed} first token [\d.]+ s after 16\n"
        r"load [\d.]+, others used [\d.]+ cores.*\n",
        out,
    )
    assert found is not None, out
    _, all_hits, all_read, half_hits, half_read = found.groups()
    assert (all_hits, all_read) == ("1.00", "0.0")
    assert 0.2 < float(half_hits) < 1.0
    assert float(half_read) >= 0.0


def test_json_has_the_same_facts_and_plans_that_differ_in_experts_alone(
    chat_model: Path, capsys: Captured
) -> None:
    assert (
        main(["bench", str(chat_model), "--threads", "1", "--memory", "1GiB", "--context", "64", "--json"])
        == 0
    )
    facts = json.loads(capsys.readouterr().out)
    first, second = facts["budgets"]
    assert (facts["model"], facts["version"], facts["threads"]) == ("model", __version__, 1)
    assert first["plan"]["context_tokens"] == 64
    assert second["plan"]["expert_slots"] == first["plan"]["expert_slots"] // 2
    assert second["plan"]["expert_cache_bytes"] < first["plan"]["expert_cache_bytes"]
    for part in ("chunk_tokens", "context_tokens", "kv_bytes", "dense_bytes", "budget_bytes"):
        assert second["plan"][part] == first["plan"][part]
    assert first["num_decoded"] == 3 * 47  # three answers after the warm-up, as long as fits
    assert first["prefill_prompt_tokens"] == 32
    assert second["hits"] < second["lookups"]
    assert second["bytes_read_per_token"] > 0
    assert facts["others"] is not None


@pytest.mark.usefixtures("_measures_in_a_fork")
def test_an_error_of_the_process_that_measures_is_that_of_the_command(
    chat_model: Path, capsys: Captured
) -> None:
    assert main(["bench", str(chat_model), "--memory", "2MiB"]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: needs ")
    assert "hint: " in captured.err


def test_a_process_that_ends_early_is_an_error(
    chat_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert main(["bench", str(chat_model)]) == 1
    assert "the process that measures ended with code 1" in capsys.readouterr().err


def test_what_the_bench_prints_is_what_the_engine_counted(chat_model: Path) -> None:
    options = {"memory": "1GiB", "threads": 1, "max_sequences": 1, "prefix_reuse": False}
    with Engine.open(chat_model, **options, expert_slots=9) as engine:  # type: ignore[arg-type]
        first, *others = bench.prompts(engine.tokenizer, engine.config.vocab_size, bench.SHORT_TOKENS)
        assert len({tuple(prompt) for prompt in (first, *others)}) == bench.NUM_PROMPTS
        speed = bench.measure(engine)
        totals = engine.ledger
    assert speed.num_decoded == len(others) * bench.ANSWER_TOKENS
    lookups_of_a_token = 3 * 2  # layers with experts, experts of a token
    assert speed.lookups == speed.num_decoded * lookups_of_a_token
    assert 0 < speed.hits < speed.lookups
    assert 0 < speed.bytes_read < totals.bytes_read
    assert speed.hit_rate == speed.hits / speed.lookups


def test_a_slow_machine_measures_less(chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_LIMIT_S", 0.0)
    with Engine.open(chat_model, memory="1GiB", threads=1, max_sequences=1, prefix_reuse=False) as engine:
        speed = bench.measure(engine)
    assert speed.num_decoded == bench._FEWEST_NEW
    assert speed.long_tokens == bench._FEWEST_LONG


def test_other_processes_are_named_and_our_own_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    own, ticks = os.getpid(), os.sysconf("SC_CLK_TCK")
    parents = {
        1: ("init", 0),
        own: ("python", 1),
        70: ("child", own),
        71: ("grandchild", 70),
        72: ("other", 1),
    }
    spent = iter([0, ticks])
    assert neighbours._processes()[own][1] == os.getppid()

    def processes() -> dict[int, tuple[str, int, int]]:
        more = next(spent)
        return {pid: (name, parent, 5 + more * (pid != 1)) for pid, (name, parent) in parents.items()}

    monkeypatch.setattr(neighbours, "_processes", processes)
    with neighbours.Neighbours() as others:
        pass
    assert others.other_cores * others.seconds == pytest.approx(1.0)  # a second of processor time
    assert others.others.split()[0] == "other"
    assert "child" not in str(others)
    assert f"others used {others.other_cores:.2f} cores (other" in str(others)
