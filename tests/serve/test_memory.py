"""The budget of a running server: who asks for another one, and limits that change while it runs."""

from __future__ import annotations

import asyncio
import errno
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from argosy.cli.commands.memory import memory as memory_command
from argosy.engine.engine import Engine
from argosy.errors import DoesNotFit, Overloaded, ServerNotUsable
from argosy.guard.keys import KeyRing
from argosy.observe.live import LiveCache
from argosy.observe.recorder import Recorder
from argosy.serve.admin import memory as memory_module
from argosy.serve.admin.memory import MemoryWatch
from argosy.serve.answer.service import Service
from argosy.serve.app import make_app
from tests.serve.conftest import only, start

FLOOR, ASKED = 300, 1000


class Budget:
    """Models that only have a budget."""

    def __init__(self) -> None:
        self.budget_bytes = ASKED
        self.tried: list[int] = []
        self.is_loading = False
        self.floor = FLOOR

    async def resize(self, budget_bytes: int) -> None:
        self.tried.append(budget_bytes)
        if self.is_loading:
            raise Overloaded("a model is being loaded", retry_after_s=1)
        if budget_bytes < self.floor:
            raise DoesNotFit("needs more", needed_bytes=self.floor, budget_bytes=budget_bytes)
        self.budget_bytes = budget_bytes
        await asyncio.sleep(0.01)  # experts move


def test_the_budget_follows_a_limit_that_falls_and_rises_again() -> None:
    limit, models = 5000, Budget()
    watch = MemoryWatch(models, limit=lambda: limit)  # type: ignore[arg-type]

    def look(new_limit: int) -> int:
        nonlocal limit
        limit = new_limit
        asyncio.run(watch.look())
        return models.budget_bytes

    assert look(5000) == ASKED
    assert models.tried == []  # nothing changed
    assert look(600) == 600
    assert look(600) == 600
    assert look(800) == 800
    assert look(5000) == ASKED
    assert look(200) == ASKED  # below what answers need
    assert models.tried == [600, 800, ASKED, 200]
    assert look(400) == 400
    assert look(200) == 400
    models.is_loading = True
    assert look(500) == 400
    models.is_loading = False
    assert look(500) == 500
    asyncio.run(watch.ask(450))
    assert look(5000) == 450  # what was asked for last


def test_a_limit_that_answers_do_not_leave_room_for_is_followed_when_they_have_ended(
    caplog: pytest.LogCaptureFixture,
) -> None:
    models = Budget()
    watch = MemoryWatch(models, limit=lambda: 200)  # type: ignore[arg-type]

    async def look(num_times: int) -> int:
        for _ in range(num_times):
            await watch.look()
        return models.budget_bytes

    assert asyncio.run(look(3)) == ASKED
    models.floor = 100
    assert asyncio.run(look(1)) == 200
    assert [one.levelname for one in caplog.records].count("ERROR") == 1  # said once


def test_a_look_does_not_undo_a_change_that_is_being_made() -> None:
    models = Budget()
    watch = MemoryWatch(models, limit=lambda: 5000)  # type: ignore[arg-type]

    async def ask_and_look() -> None:
        asking = asyncio.create_task(watch.ask(400))
        while not models.tried:
            await asyncio.sleep(0)
        await watch.look()
        await asking

    asyncio.run(ask_and_look())
    assert models.tried == [400]


def test_whoever_is_refused_changes_nothing() -> None:
    models = Budget()
    watch = MemoryWatch(models, limit=lambda: 5000)  # type: ignore[arg-type]
    with pytest.raises(DoesNotFit):
        asyncio.run(watch.ask(100))
    assert watch.asked_bytes == models.budget_bytes == ASKED


def test_looks_that_fail_are_logged_once_and_are_not_the_last(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    models = Budget()
    looks = iter(["no file", "no file", "broken", "broken", 800, "no file", "no file"])

    def limit() -> int:
        found = next(looks, 700)
        if found == "no file":
            raise OSError(errno.EMFILE, "too many open files", "/sys/fs/cgroup/memory.max")
        if found == "broken":
            raise ValueError("looked twice")
        return int(found)

    async def watching() -> None:
        task = asyncio.create_task(MemoryWatch(models, limit=limit).run())  # type: ignore[arg-type]
        while models.budget_bytes != 700:
            await asyncio.sleep(0)
        task.cancel()

    monkeypatch.setattr(memory_module, "LOOK_S", 0.0)
    asyncio.run(asyncio.wait_for(watching(), 30))
    errors = [one.getMessage() for one in caplog.records if one.levelname == "ERROR"]
    unread = "memory: the limits of the machine cannot be read (Too many open files); the budget stays"
    assert [one.partition("\n")[0] for one in errors] == [unread, "memory: ValueError", unread]


@pytest.fixture(scope="module")
def server(service: Service) -> Iterator[str]:
    yield from start(make_app(only(service), KeyRing(None), block_tokens=16, max_sequences=8))


def test_free_memory_is_given_back_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    num_looks, given_back_at = 0, list[int]()
    monkeypatch.setattr(memory_module, "LOOK_S", 0)
    monkeypatch.setattr(memory_module, "give_memory_back", lambda: given_back_at.append(num_looks))

    def limit() -> int:
        nonlocal num_looks
        num_looks += 1
        if num_looks == 250:
            raise asyncio.CancelledError
        return ASKED

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(MemoryWatch(Budget(), limit=limit).run())  # type: ignore[arg-type]
    assert given_back_at == [119, 239]


@pytest.mark.parametrize(
    ("asked", "status", "told"),
    [
        ("1MiB", 409, "needs"),
        ("100TiB", 409, "there are"),
        ("8 parsecs", 400, "memory"),
        ("", 400, "memory"),
        ("0", 400, "memory"),
        ("100", 400, "memory"),  # without a unit
        ("1 B", 409, "needs"),
        ("0.0GiB", 400, "memory"),
        ("101%", 400, "memory"),
        ("0.001k", 409, "needs"),
        (0, 400, "memory"),
        (True, 400, "memory"),
        (None, 400, "memory"),
        ("9" * 400, 400, "memory"),
    ],
)
def test_a_budget_that_cannot_be_is_refused_with_the_reason(
    server: str, asked: Any, status: int, told: str
) -> None:
    answer = httpx.post(f"{server}/v1/engine/memory", json={"memory": asked})
    assert answer.status_code == status
    assert told in answer.json()["error"]["message"]


def test_the_command_asks_for_a_budget_and_prints_what_it_is_used_for(server: str) -> None:
    runner = CliRunner()
    asked = runner.invoke(memory_command, ["1GiB", "--url", server], catch_exceptions=False)
    assert asked.output.startswith("budget 1.0 GiB\n  process")
    assert "expert cache" in asked.output
    found = json.loads(runner.invoke(memory_command, ["2GiB", "--url", server, "--json"]).output)
    assert found["budget_bytes"] == 2 << 30
    with pytest.raises(ServerNotUsable, match=r"needs .* of memory"):
        runner.invoke(memory_command, ["1MiB", "--url", server], catch_exceptions=False)


def test_the_answer_has_the_budget_and_what_it_is_used_for(server: str) -> None:
    before = httpx.get(f"{server}/v1/engine/state").json()["memory"]
    answer = httpx.post(f"{server}/v1/engine/memory", json={"memory": before["budget_bytes"] - 4096})
    assert answer.status_code == 200
    after = answer.json()
    assert after["budget_bytes"] == before["budget_bytes"] - 4096
    assert [line["name"] for line in after["lines"]] == [line["name"] for line in before["lines"]]
    assert httpx.get(f"{server}/v1/engine/state").json()["memory"]["budget_bytes"] == after["budget_bytes"]
    lines = (line.split() for line in httpx.get(f"{server}/metrics").text.splitlines())
    metrics = {line[0]: line[1] for line in lines if len(line) == 2}
    assert float(metrics["argosy_budget_bytes"]) == after["budget_bytes"]
    assert float(metrics["argosy_expert_slots"]) > 0
    assert (
        httpx.post(f"{server}/v1/engine/memory", json={"memory": before["budget_bytes"]}).status_code == 200
    )


def seen_contexts(url: str) -> set[int]:
    """The context of the model as each dialect says it."""
    (listed,) = httpx.get(f"{url}/v1/models").json()["data"]
    state = httpx.get(f"{url}/v1/engine/state").json()
    props = httpx.get(f"{url}/props").json()
    shown = httpx.post(f"{url}/api/show", json={"model": listed["id"]}).json()["model_info"]
    lengths = [value for key, value in shown.items() if key.endswith(".context_length")]
    return {
        listed["max_model_len"], state["model"]["context_tokens"], props["default_generation_settings"]["n_ctx"],
        *lengths,
    }  # fmt: skip


def test_clients_see_the_context_that_a_smaller_budget_leaves(
    server: str, service: Service, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, facts = engine.plan, service.model
    smaller = replace(opened, slots=replace(opened.slots, own=3), context_tokens=opened.context_tokens // 2)
    recorder = Recorder(engine.config, engine.settings, keeps_recent=True)
    recent = LiveCache(recorder, num_experts=engine.config.num_experts, num_slots=opened.slots_in_decode())
    monkeypatch.setattr(service, "recent_cache", recent)
    assert seen_contexts(server) == {opened.context_tokens}
    for plan in (smaller, opened):
        monkeypatch.setattr(engine, "resize", lambda budget_bytes, plan=plan, **_: plan)
        assert httpx.post(f"{server}/v1/engine/memory", json={"memory": "1GiB"}).status_code == 200
        assert seen_contexts(server) == {plan.context_tokens}
        assert recent.num_slots == plan.slots_in_decode()
    assert service.model == facts
