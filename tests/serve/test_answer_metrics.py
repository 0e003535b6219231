"""Times and tokens of answers as Prometheus sees them, by model and key, without content."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from argosy.engine.ledger import Ledger
from argosy.engine.sequence import FinishReason, Result
from argosy.guard.keys import KeyFile, KeyRing
from argosy.serve.admin.answer_metrics import MOST_KEYS, AnswerMetrics
from argosy.serve.admin.state import Metrics
from argosy.serve.answer.service import Service
from argosy.serve.app import make_app
from tests.serve.conftest import only, start


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def result(reason: FinishReason, **ledger: Any) -> Result:
    return Result(
        text="", token_ids=[], finish_reason=reason, logprobs=None, usage={}, seed=0, ledger=Ledger(**ledger)
    )


def values(text: str) -> dict[str, float]:
    """Each sample by its name and labels."""
    return {
        sample.name
        + "".join(f" {name}={value}" for name, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_times_of_an_answer_are_observed_once_each() -> None:
    registry, clock = CollectorRegistry(), Clock()
    metrics = AnswerMetrics(registry, clock)
    watch = metrics.watch("m", "chat", 98.0)
    for now in (101.0, 101.25, 102.0):
        clock.now = now
        watch.token()
    clock.now = 103.0
    watch.end(result("stop", queue_s=0.5, prompt_tokens=20, new_tokens=3))
    found = values(generate_latest(registry).decode())
    of = " model=m operation=chat"
    for name, total, count in (
        ("queue_seconds", 0.5, 1),
        ("first_token_seconds", 3.0, 1),
        ("inter_token_seconds", 1.0, 2),
        ("token_seconds", 0.5, 1),
        ("answer_seconds", 5.0, 1),
        ("answer_prompt_tokens", 20, 1),
        ("answer_new_tokens", 3, 1),
    ):
        assert (found[f"argosy_{name}_sum{of}"], found[f"argosy_{name}_count{of}"]) == (total, count), name
    assert found["argosy_answers_total finish=stop model=m"] == 1


def test_an_answer_that_fails_counts_by_its_end_and_not_among_the_durations() -> None:
    registry = CollectorRegistry()
    metrics = AnswerMetrics(registry)
    metrics.watch("m", "chat", 0.0).end(result("cancelled"))
    metrics.watch("m", "chat", 0.0).end(result("error", queue_s=0.25))
    found = values(generate_latest(registry).decode())
    assert found["argosy_answers_total finish=cancelled model=m"] == 1
    assert found["argosy_answers_total finish=error model=m"] == 1
    assert found["argosy_queue_seconds_count model=m operation=chat"] == 1
    assert not any("answer_seconds_count" in name for name in found)


def test_three_histograms_also_have_opentelemetrys_names() -> None:
    registry, clock = CollectorRegistry(), Clock()
    metrics = AnswerMetrics(registry, clock)
    watch = metrics.watch("m", "text_completion", 99.0)
    watch.token()
    watch.token()
    watch.end(result("length", new_tokens=2))
    found = values(generate_latest(registry).decode())
    ours = " model=m operation=text_completion"
    theirs = " gen_ai_operation_name=text_completion gen_ai_provider_name=argosy gen_ai_response_model=m"
    for own, other in (
        ("argosy_answer_seconds", "gen_ai_server_request_duration_seconds"),
        ("argosy_first_token_seconds", "gen_ai_server_time_to_first_token_seconds"),
        ("argosy_token_seconds", "gen_ai_server_time_per_output_token_seconds"),
    ):
        for part in ("_count", "_sum"):
            assert found[other + part + theirs] == found[own + part + ours]
        buckets = [name for name in found if name.startswith(f"{other}_bucket")]
        assert len(buckets) == len([name for name in found if name.startswith(f"{own}_bucket")]) > 10


def test_the_number_of_keys_among_the_labels_is_bounded() -> None:
    registry = CollectorRegistry()
    metrics = AnswerMetrics(registry)
    for number in range(MOST_KEYS + 50):
        metrics.count_tokens("m", f"key-{number}", prompt=1, new=2)
        metrics.count_request("m", f"key-{number}")
    metrics.count_tokens("m", "key-0", prompt=1, new=0)
    found = values(generate_latest(registry).decode())
    assert found["argosy_key_prompt_tokens_total key=key-0 model=m"] == 2
    assert found["argosy_key_prompt_tokens_total key=other model=m"] == 50
    assert found["argosy_key_requests_total key=other model=m"] == 50
    assert len({name for name in found if name.startswith("argosy_key_new_tokens_total")}) == MOST_KEYS + 1


# ── of a server ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def keyed(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, str]]:
    keys = KeyFile(tmp_path_factory.mktemp("keys") / "keys.json")
    key, secret = keys.add("canary-name", scopes=("infer", "metrics"))
    for url in start(make_app(only(service), KeyRing(keys), block_tokens=16, max_sequences=8)):
        yield url, key.id, secret


def test_a_servers_metrics_have_models_and_key_ids_and_no_content(keyed: tuple[str, str, str]) -> None:
    url, key_id, secret = keyed
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {secret}"}, timeout=60) as client:
        ask = {"messages": [{"role": "user", "content": "canary-71d"}], "max_tokens": 4, "ignore_eos": True}
        usage = client.post("/v1/chat/completions", json=ask | {"n": 2}).json()["usage"]
        client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 3, "ignore_eos": True})
        assert client.post("/v1/embeddings", json={"input": "abc"}).status_code == 200
        assert client.post("/v1/chat/completions", json=ask | {"model": "canary-model"}).status_code == 404
        text = client.get("/metrics").text
    found = values(text)
    assert found["argosy_answers_total finish=length model=tiny"] == 3
    assert found["argosy_answer_new_tokens_sum model=tiny operation=chat"] == usage["completion_tokens"] == 8
    assert found["argosy_answer_new_tokens_sum model=tiny operation=text_completion"] == 3
    assert found["argosy_inter_token_seconds_count model=tiny operation=chat"] == 6
    assert found["argosy_queue_seconds_count model=tiny operation=chat"] == 2
    assert found[f"argosy_key_requests_total key={key_id} model=tiny"] == 3
    assert f"argosy_key_prompt_tokens_total key={key_id} model=" not in found  # no tokens of no model
    assert found[f"argosy_key_new_tokens_total key={key_id} model=tiny"] == 11
    assert found["process_resident_memory_bytes"] > 0
    assert re.search(r'argosy_build_info\{python="3[^"]+",version="[^"]+"\} 1', text)
    assert "canary" not in text
    assert secret not in text


def test_the_dashboard_shows_metrics_that_exist(keyed: tuple[str, str, str]) -> None:
    import json

    url, _, secret = keyed
    text = httpx.get(f"{url}/metrics", headers={"Authorization": f"Bearer {secret}"}).text
    names = {family.name for family in text_string_to_metric_families(text)}
    dashboard = json.loads((Path(__file__).parents[2] / "deploy" / "grafana.json").read_text())
    asked = set(re.findall(r"\b(?:argosy|process)_\w+", " ".join(
        target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())
    )))  # fmt: skip
    assert len(asked) >= 8
    assert {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in asked} <= names


def test_energy_is_a_metric_where_it_is_measured_and_nowhere_else(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(**measured: Any) -> dict[str, float]:
        facts = service.loop.snapshot()
        totals = replace(facts.engine.totals, **measured)
        shown = replace(facts, engine=replace(facts.engine, totals=totals))
        with monkeypatch.context() as patch:
            patch.setattr(service.loop, "snapshot", lambda: shown)
            registry = Metrics(only(service), co2_grams_per_kwh=360.0).registry
            text = values(generate_latest(registry).decode())
        return {name: value for name, value in text.items() if "energy" in name or "co2" in name}

    assert found(energy_j=None, drive_energy_j=None) == {}
    assert found(energy_j=1e4, drive_energy_j=(0.0, 1e4)) == {
        "argosy_energy_joules_total": 1e4,
        "argosy_drive_energy_joules_total bound=low": 0.0,
        "argosy_drive_energy_joules_total bound=high": 1e4,
        "argosy_co2_grams_total bound=low": 1.0,
        "argosy_co2_grams_total bound=high": 2.0,
    }
