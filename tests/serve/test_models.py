"""Several models on one server: loads, unloads and moving memory, with models that only count what they take."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from argosy.budget.shares import IN_USE_S
from argosy.errors import ArgosyError, CheckpointError, DoesNotFit, Overloaded
from argosy.guard.stops import Stopped
from argosy.serve.answer.facts import ModelFacts
from argosy.serve.answer.service import Common
from argosy.serve.guards.guarding import Guarding
from argosy.serve.http.caller import Caller
from argosy.serve.http.failures import Refused
from argosy.serve.http.running import Running
from argosy.serve.models import loading
from argosy.serve.models import models as models_module
from argosy.serve.models.entry import Entry, Offer, Offers, Progress
from argosy.serve.models.models import Models, use_model

BUDGET, PROCESS = 1000, 100


class Meter:
    """The memory of all fake models, which never exceeds the budget."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.held = PROCESS
        self.budget = BUDGET
        self.most = 0

    def add(self, nbytes: int) -> None:
        with self._lock:
            self.held += nbytes
            self.most = max(self.most, self.held)
            assert self.held <= self.budget, f"{self.held} of {self.budget}"


class FakeLoop:
    engine = SimpleNamespace(adapters=())

    def __init__(self) -> None:
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


class FakeService:
    def __init__(self, facts: ModelFacts) -> None:
        self.model, self.loop = facts, FakeLoop()
        self.revoked: list[str] = []

    def revoke(self, tenant: str) -> None:
        self.revoked.append(tenant)


class FakeModel:
    """Open: takes its floor, with two slots, and its share of the memory for experts, of 10 bytes each."""

    def __init__(self, entry: FakeEntry, share_bytes: int) -> None:
        self._entry = entry
        self.share_bytes = share_bytes
        entry.meter.add(entry.floor_bytes + share_bytes)

    @property
    def num_slots(self) -> int:
        return 2 + self.share_bytes // 10

    def resize(self, share_bytes: int) -> None:
        time.sleep(self._entry.resize_s)
        self._entry.meter.add(share_bytes - self.share_bytes)
        self.share_bytes = share_bytes
        self._entry.resizes.append(self.num_slots)

    def close(self) -> None:
        entry = self._entry
        entry.meter.add(-entry.floor_bytes - self.share_bytes)
        entry.num_closed += 1
        entry.opened = None


def facts_of(name: str, num_experts: int = 42) -> ModelFacts:
    return ModelFacts(
        id=name, family="fake", context_tokens=16, num_layers=1, num_experts=num_experts, experts_per_token=2,
        vocab_size=8,
    )  # fmt: skip


class FakeEntry(Entry):
    """A model without an engine."""

    floor_bytes = most_bytes = 0

    def __init__(self, meter: Meter, name: str, floor_bytes: int, most_slots: int) -> None:
        super().__init__(Offer(facts=facts_of(name, most_slots), key=self), Common())
        self.meter, self.floor_bytes, self.most_bytes = meter, floor_bytes, 10 * (most_slots - 2)
        self.opened: FakeModel | None = None
        self.num_opened = self.num_closed = 0
        self.resizes: list[int] = []
        self.forgotten: list[str] = []
        self.error: Exception | None = None
        self.can_open = threading.Event()
        self.can_open.set()
        self.has_told = threading.Event()
        self.resize_s = 0.0
        self.prepared: list[bool] = []  # a True for each `prepare`, and a False for each `release`
        self.unready: Exception | None = None

    def prepare(self, budget_bytes: int) -> None:
        self.prepared.append(True)
        self.budget_bytes = budget_bytes
        if self.unready is not None:
            raise self.unready

    def release(self) -> None:
        assert self.opened is None
        self.prepared.append(False)

    @property
    def num_slots(self) -> int:
        return 0 if self.opened is None else self.opened.num_slots

    def open(self, share_bytes: int, progress: Progress) -> Any:
        while not self.can_open.wait(0.005):
            progress("reading experts", 0.5)
            self.has_told.set()
        if self.error is not None:
            raise self.error
        self.num_opened += 1
        self.opened = FakeModel(self, share_bytes)
        return FakeService(self.facts)

    def resize(self, share_bytes: int) -> None:
        assert self.opened is not None
        self.opened.resize(share_bytes)

    def close(self) -> None:
        assert self.opened is not None
        self.opened.close()

    def forget(self, tenant: str) -> None:
        self.forgotten.append(tenant)


def fake_entry(offer: Offer) -> Entry:
    assert isinstance(offer.key, FakeEntry)
    return offer.key


class Rig:
    """Three models: two small ones, and one whose floor fits beside one of them only."""

    def __init__(self, *, any_model: bool = False, **options: Any) -> None:
        self.now = 1000.0
        self.meter = Meter()
        self.a = FakeEntry(self.meter, "a", 200, 42)
        self.b = FakeEntry(self.meter, "b", 200, 42)
        self.big = FakeEntry(self.meter, "big", 600, 12)
        self.models = Models(
            [one.offer for one in (self.a, self.b, self.big)], fake_entry, Common(any_model=any_model),
            budget_bytes=BUDGET, process_bytes=PROCESS, clock=lambda: self.now, **options,
        )  # fmt: skip

    @asynccontextmanager
    async def using(self, name: str | None) -> AsyncIterator[Any]:
        with ExitStack() as used:
            yield await self.models.use(name, used)

    async def ask(self, name: str | None) -> str:
        async with self.using(name) as service:
            found: str = service.model.id
            return found

    async def look(self) -> None:
        async with self.models.loader._moving:
            await self.models.loader._look_once()

    def states(self) -> dict[str, str]:
        return {one.facts.id: one.state for one in self.models.facts()}


def run(test: Callable[[Rig], Coroutine[Any, Any, None]], **options: Any) -> None:
    async def whole() -> None:
        rig = Rig(**options)
        try:
            await test(rig)
        finally:
            await rig.models.close()
        assert rig.meter.held == PROCESS  # everything was given back

    asyncio.run(whole())


def test_a_model_is_loaded_when_it_is_first_used_and_once_for_all_who_wait() -> None:
    async def test(rig: Rig) -> None:
        assert rig.states() == {"a": "unloaded", "b": "unloaded", "big": "unloaded"}
        rig.b.can_open.clear()
        waiting = [asyncio.create_task(rig.ask("b")) for _ in range(5)]
        await asyncio.to_thread(rig.b.has_told.wait)
        assert rig.states()["b"] == "loading"
        rig.b.can_open.set()
        assert await asyncio.gather(*waiting) == ["b"] * 5
        assert rig.states() == {"a": "unloaded", "b": "ready", "big": "unloaded"}
        assert rig.b.num_opened == 1
        assert await rig.ask(None) == "a"

    run(test)


def test_those_who_wait_for_a_model_are_told_of_with_the_share_that_is_read() -> None:
    async def test(rig: Rig) -> None:
        def waits() -> list[tuple[str, str, str, float | None]]:
            return [(model, one.name, one.why, one.share_done) for model, one in rig.models.waits()]

        rig.b.can_open.clear()
        with ExitStack() as used:
            waiting = [asyncio.create_task(rig.models.use("b", used, f"req_{n}")) for n in (1, 2)]
            await asyncio.to_thread(rig.b.has_told.wait)
            assert waits() == [("b", "req_1", "model", 0.5), ("b", "req_2", "model", 0.5)]
            # The experts of b leave no room for the floor of another one until b is read.
            other = asyncio.create_task(rig.models.use("big", used, "req_3"))
            while ("big", "req_3", "room", None) not in waits():
                await asyncio.sleep(0)
            rig.b.can_open.set()
            await asyncio.gather(*waiting, other)
            assert waits() == []

    run(test)


def test_a_model_that_is_stopped_or_that_nobody_waits_for_any_more_is_not_loaded() -> None:
    async def test(rig: Rig) -> None:
        guarding = Guarding()
        guarding.stops.set("model", "big", is_stopped=True)
        await rig.ask("a")
        await rig.ask("b")
        caller = Caller(running=Running(guarding.why_not))
        app = SimpleNamespace(state=SimpleNamespace(models=rig.models))
        request: Any = SimpleNamespace(state=SimpleNamespace(caller=caller), app=app)
        with pytest.raises(Stopped), caller.ending:
            await use_model(request, "big")
        async with rig.models.loader._moving:
            waiting = asyncio.create_task(rig.ask("big"))
            await asyncio.sleep(0.02)
            waiting.cancel()
        await asyncio.sleep(0.02)
        assert rig.states() == {"a": "ready", "b": "ready", "big": "unloaded"}
        assert (rig.big.num_opened, rig.a.num_closed, rig.b.num_closed) == (0, 0, 0)

    run(test)


def test_nobody_waits_for_a_model_of_others() -> None:
    async def test(rig: Rig) -> None:
        await rig.ask("a")
        rig.b.can_open.clear()
        loading = asyncio.create_task(rig.ask("b"))
        await asyncio.sleep(0.02)
        for _ in range(3):
            assert await asyncio.wait_for(rig.ask("a"), 1) == "a"
        assert not loading.done()
        rig.b.can_open.set()
        assert await loading == "b"

    run(test)


def test_two_models_are_read_at_the_same_time() -> None:
    async def test(rig: Rig) -> None:
        rig.a.can_open.clear()
        slow = asyncio.create_task(rig.ask("a"))
        await asyncio.sleep(0.02)
        assert await asyncio.wait_for(rig.ask("b"), 1) == "b"
        rig.a.can_open.set()
        await slow

    run(test)


@pytest.mark.parametrize("is_readable", [True, False])
def test_a_model_waits_while_experts_of_one_that_is_being_read_are_in_its_way(is_readable: bool) -> None:
    async def test(rig: Rig) -> None:
        rig.a.can_open.clear()
        first = asyncio.create_task(rig.ask("a"))  # of 900, its floor of 200 and experts of 400
        await asyncio.sleep(0.02)
        second = asyncio.create_task(rig.ask("big"))  # a floor of 600
        await asyncio.sleep(0.02)
        assert rig.states() == {"a": "loading", "b": "unloaded", "big": "unloaded"}
        assert rig.models.held_bytes == PROCESS + 600
        if not is_readable:
            rig.a.error = CheckpointError("damaged")
        rig.a.can_open.set()
        assert await second == "big"
        if is_readable:
            assert await first == "a"
            assert (rig.a.num_slots, rig.big.num_slots) == (7, 7)
        else:
            with pytest.raises(CheckpointError):
                await first
            assert rig.big.num_slots == 12

    run(test)


def test_models_in_use_share_and_an_idle_one_gives_its_experts_first() -> None:
    async def test(rig: Rig) -> None:
        async with rig.using("a"):
            assert rig.a.num_slots == 42  # all of its experts
            async with rig.using("b"):
                # 900 - 2 * 200 are for experts beyond the floors' two each
                assert (rig.a.num_slots, rig.b.num_slots) == (27, 27)
            rig.now += IN_USE_S - 1
            await rig.look()
            assert (rig.a.num_slots, rig.b.num_slots) == (27, 27)
            rig.now += 2
            await rig.look()
            assert (rig.a.num_slots, rig.b.num_slots) == (42, 12)
            assert rig.states()["b"] == "ready"
            async with rig.using("b"):
                await rig.look()
                assert (rig.a.num_slots, rig.b.num_slots) == (27, 27)

    run(test)


def test_idle_models_are_unloaded_if_a_floor_does_not_fit_the_least_recently_used_first() -> None:
    async def test(rig: Rig) -> None:
        await rig.ask("a")
        rig.now += 5
        await rig.ask("b")
        rig.now += 5
        await rig.ask("big")
        assert rig.states() == {"a": "unloaded", "b": "ready", "big": "ready"}
        assert (rig.b.num_slots, rig.big.num_slots) == (7, 7)
        await rig.ask("a")  # the big one was used last, so b goes; then there is room
        assert rig.states() == {"a": "ready", "b": "unloaded", "big": "ready"}

    run(test)


def test_a_model_that_does_not_fit_beside_models_that_answer_is_refused_with_numbers() -> None:
    async def test(rig: Rig) -> None:
        async with rig.using("a"), rig.using("b"):
            with pytest.raises(Overloaded) as caught:
                await rig.ask("big")
            assert str(caught.value) == (
                "big needs 600 B, and models that answer now leave 500 B of the budget of 1000 B\n"
                "  a 200 B  +  b 200 B  (without experts)\n"
                "hint: try again when a or b has answered, or start the server with `--memory 1MiB`"
            )
            assert caught.value.retry_after_s > 0
            assert rig.states() == {"a": "ready", "b": "ready", "big": "unloaded"}
            assert (rig.a.num_slots, rig.b.num_slots) == (27, 27)  # nothing was taken
        assert await rig.ask("big") == "big"

    run(test)


def test_a_model_that_the_budget_has_become_too_small_for_is_refused_with_what_would_be_enough() -> None:
    async def test(rig: Rig) -> None:
        await rig.models.resize(PROCESS + 150)
        with pytest.raises(Overloaded) as caught:
            await rig.ask("a")
        assert str(caught.value) == (
            f"a needs 200 B, and the budget of {PROCESS + 150} B leaves 150 B for models\n"
            "hint: start the server with `--memory 1MiB`"
        )

    run(test)


def test_a_model_is_unloaded_after_a_while_without_requests() -> None:
    async def test(rig: Rig) -> None:
        async with rig.using("a"):
            await rig.ask("b")
            rig.now += 599
            await rig.look()
            assert rig.states()["b"] == "ready"
            rig.now += 1
            await rig.look()
            assert rig.states() == {"a": "ready", "b": "unloaded", "big": "unloaded"}
        await rig.ask("b")  # and is loaded again
        assert rig.b.num_opened == 2

    run(test, idle_unload_s=600.0)


def test_a_server_looks_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "LOOK_S", 0.01)

    async def test(rig: Rig) -> None:
        await rig.ask("a")
        rig.now += 600
        for _ in range(200):
            if rig.states()["a"] == "unloaded":
                return
            await asyncio.sleep(0.01)
        raise AssertionError("it was not unloaded")

    run(test, idle_unload_s=600.0)


def test_the_time_until_a_model_is_unloaded_is_told() -> None:
    async def test(rig: Rig) -> None:
        await rig.ask("b")
        rig.now += 100
        async with rig.using("a"):
            rig.now += 20
            a, b = rig.models.standing("a"), rig.models.standing("b")
            assert (a.unloads_in_s, b.unloads_in_s) == (600, 480)

    async def never(rig: Rig) -> None:
        await rig.ask("a")
        assert [one.unloads_in_s for one in rig.models.facts()] == [None] * 3

    run(test, idle_unload_s=600.0)
    run(never)


def test_a_model_is_unloaded_on_request_unless_it_is_in_use() -> None:
    async def test(rig: Rig) -> None:
        assert await rig.models.unload("a")  # it was not in memory
        async with rig.using("a"), rig.using("b"):
            pass
        async with rig.using("a"):
            assert not await rig.models.unload("a")
            assert await rig.models.unload("b")
        assert rig.states() == {"a": "ready", "b": "unloaded", "big": "unloaded"}
        assert rig.meter.held == rig.models.held_bytes
        assert await rig.ask("b") == "b"
        rig.b.can_open.clear()
        await rig.models.unload("b")
        reading = asyncio.create_task(rig.ask("b"))
        while rig.states()["b"] != "loading":
            await asyncio.sleep(0)
        assert not await rig.models.unload("b")  # somebody waits for it
        rig.b.can_open.set()
        assert await reading == "b"
        with pytest.raises(Refused, match='"x" does not exist'):
            await rig.models.unload("x")

    run(test)


def test_an_unload_is_finished_if_the_client_that_asked_for_it_leaves() -> None:
    async def test(rig: Rig) -> None:
        await rig.ask("a")
        asked = asyncio.create_task(rig.models.unload("a"))
        while rig.states()["a"] == "ready":
            await asyncio.sleep(0)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert await rig.ask("a") == "a"
        assert (rig.a.num_opened, rig.a.num_closed) == (2, 1)

    run(test)


def test_a_name_is_found_with_and_without_the_tag_latest() -> None:
    async def test(rig: Rig) -> None:
        tagged = FakeEntry(rig.meter, "b:latest", 200, 42)
        models = Models(
            [rig.a.offer, tagged.offer], fake_entry, Common(), budget_bytes=BUDGET, process_bytes=PROCESS
        )
        for name, found in (("a", "a"), ("a:latest", "a"), ("b", "b:latest"), ("b:latest", "b:latest")):
            assert models.standing(name).facts.id == found
        for name in ("a:30b", "A:latest", ":latest", ""):
            with pytest.raises(Refused):
                models.standing(name)
        await models.close()

    run(test)


def test_who_asks_for_a_model_that_is_leaving_gets_it_again() -> None:
    async def test(rig: Rig) -> None:
        await rig.ask("a")
        rig.now += 600
        leaving = asyncio.create_task(rig.look())
        while rig.states()["a"] == "ready":
            await asyncio.sleep(0)
        assert await rig.ask("a") == "a"
        await leaving
        assert (rig.a.num_opened, rig.a.num_closed) == (2, 1)

    run(test, idle_unload_s=600.0)


def test_a_model_that_cannot_be_opened_fails_alone_and_is_tried_again_later() -> None:
    async def test(rig: Rig) -> None:
        rig.b.error = CheckpointError("the file is damaged")
        for _ in range(2):
            with pytest.raises(CheckpointError, match="damaged"):
                await rig.ask("b")
        assert rig.states() == {"a": "unloaded", "b": "failed", "big": "unloaded"}
        assert rig.models.held_bytes == PROCESS
        rig.b.error = None
        with pytest.raises(CheckpointError):  # not at once: each try may read gigabytes
            await rig.ask("b")
        rig.now += 11
        assert await rig.ask("b") == "b"
        rig.a.error = MemoryError()
        with pytest.raises(ArgosyError, match="cannot be opened"):
            await rig.ask("a")

    run(test)


def test_unknown_names_are_refused_or_mean_the_first_model() -> None:
    async def strict(rig: Rig) -> None:
        with pytest.raises(Refused, match='the model "x" does not exist; this server has: a, b, big'):
            await rig.ask("x")

    async def lenient(rig: Rig) -> None:
        assert await rig.ask("x") == "a"
        assert await rig.ask("b") == "b"

    run(strict)
    run(lenient, any_model=True)


def test_a_revoked_tenant_is_forgotten_by_models_in_memory_and_in_files() -> None:
    async def test(rig: Rig) -> None:
        async with rig.using("a") as service:
            rig.models.revoke("mallory")
            assert service.revoked == ["mallory"]  # type: ignore[attr-defined]
            assert (rig.a.forgotten, rig.b.forgotten) == ([], ["mallory"])
        async with rig.using("b") as later:  # a request may have waited for the model
            assert later.revoked == ["mallory"]

    run(test)


def test_items_of_a_revoked_tenant_are_deleted_while_no_model_is_in_memory() -> None:
    async def test(rig: Rig) -> None:
        for tenant in ("mallory", "ann"):
            rig.models.kept.keep(tenant, "resp_1", None, [{"id": "msg_1"}], [])
        rig.models.revoke("mallory")
        assert rig.models.kept.conversation("ann", "resp_1") == [{"id": "msg_1"}]
        with pytest.raises(Refused, match="not found"):
            rig.models.kept.conversation("mallory", "resp_1")

    run(test)


def test_a_server_loads_models_for_running_requests_until_it_ends_them() -> None:
    async def test(rig: Rig) -> None:
        rig.models.is_draining = True
        await rig.ask("a")
        rig.b.can_open.clear()
        waiting = asyncio.create_task(rig.ask("b"))
        await asyncio.sleep(0.02)
        await rig.models.stop()
        with pytest.raises(Overloaded, match="stopping"):
            await asyncio.wait_for(waiting, 2)
        with pytest.raises(Overloaded, match="stopping"):
            await rig.ask("big")

    run(test)


@pytest.mark.parametrize("seed", range(6))
def test_the_sum_of_all_models_never_exceeds_the_budget(seed: int) -> None:
    """The fakes raise if it does, while models are read, shrink, grow and leave."""
    dice = random.Random(seed)

    async def client(rig: Rig) -> int:
        num_refused = 0
        for _ in range(12):
            try:
                async with rig.using(dice.choice(["a", "b", "big"])) as service:
                    await asyncio.sleep(dice.random() / 500)
                    assert not service.loop.is_closed
            except Overloaded:
                num_refused += 1
            rig.now += dice.choice([0, 0, 1, 30, 90])
            if dice.random() < 0.3:
                await rig.look()
        return num_refused

    async def test(rig: Rig) -> None:
        rig.a.resize_s = rig.b.resize_s = 0.001
        await asyncio.gather(*(client(rig) for _ in range(4)))
        assert rig.models.held_bytes == rig.meter.held
        assert rig.meter.most > 0.9 * BUDGET
        assert rig.big.num_opened > 0

    run(test, idle_unload_s=80.0)


# ── one model ──────────────────────────────────────────────────────────────────────────────────────────────────────


class OnlyService(FakeService):
    ears = None
    budget_bytes = BUDGET

    def resize(self, budget_bytes: int) -> None:
        if budget_bytes < 500:
            raise DoesNotFit("needs 500 B of memory now")
        self.budget_bytes = budget_bytes


def test_the_only_model_of_a_server_stays_in_memory_and_has_all_of_the_budget() -> None:
    async def test() -> None:
        service: Any = OnlyService(facts_of("only"))
        offer = Offer(facts=service.model, key=service, serve=lambda _: service)
        models = Models(
            [offer], partial(Entry, common=Common()), Common(), budget_bytes=BUDGET, process_bytes=0
        )
        try:
            with ExitStack() as used:
                assert await models.use(None, used) is service
            assert await models.unload("only") is False
            await models.loader._look_once()
            (standing,) = models.facts()
            assert (standing.state, standing.service, standing.unloads_in_s) == ("ready", service, None)
            assert (models.has_one, models.held_bytes, models.hearing()) == (True, 0, None)
            await models.resize(700)
            with pytest.raises(DoesNotFit, match="needs 500 B"):
                await models.resize(400)
            assert service.budget_bytes == models.budget_bytes == 700  # type: ignore[attr-defined]
            models.revoke("mallory")
            assert service.revoked == ["mallory"]  # type: ignore[attr-defined]
        finally:
            await models.close()
        assert service.loop.is_closed  # type: ignore[attr-defined]

    asyncio.run(test())


# ── another budget ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_smaller_budget_takes_experts_first_then_idle_models_and_a_larger_one_brings_experts_back() -> None:
    async def test(rig: Rig) -> None:
        async with rig.using("b"):
            await rig.ask("a")
            assert (rig.a.num_slots, rig.b.num_slots) == (27, 27)
            await rig.models.resize(700)
            assert (rig.a.num_slots, rig.b.num_slots) == (12, 12)
            assert rig.meter.held == rig.models.held_bytes == rig.models.budget_bytes == 700
            await rig.models.resize(450)
            assert rig.states() == {"a": "unloaded", "b": "ready", "big": "unloaded"}
            assert rig.b.num_slots == 17
            with pytest.raises(DoesNotFit, match="models that answer now need 300 B of memory") as refused:
                await rig.models.resize(250)
            assert refused.value.facts == {"needed_bytes": 300, "budget_bytes": 250}
            assert (rig.models.budget_bytes, rig.b.num_slots) == (450, 17)
            with pytest.raises(DoesNotFit, match="the budget is"):
                await rig.models.resize(1 << 60)
            await rig.models.resize(1000)
            assert rig.b.num_slots == 42

    run(test)


def test_the_budget_stays_while_a_model_is_read() -> None:
    async def test(rig: Rig) -> None:
        rig.a.can_open.clear()
        loading = asyncio.create_task(rig.ask("a"))
        await asyncio.sleep(0.02)
        with pytest.raises(Overloaded, match="a model is being loaded"):
            await rig.models.resize(700)
        assert rig.models.budget_bytes == BUDGET
        rig.a.can_open.set()
        await loading

    run(test)


# ── a library ───────────────────────────────────────────────────────────────────────────────────────────────────────


class FakeLibrary:
    """A library whose models a test puts there and takes away."""

    def __init__(self, *entries: FakeEntry) -> None:
        self.entries = {entry.name: entry for entry in entries}
        self.others: dict[str, str] = {}
        self.faults: dict[str, str] = {}
        self.num_looks = 0

    def look(self) -> Offers:
        self.num_looks += 1
        offers = [entry.offer for entry in self.entries.values()]
        return Offers(offers=offers, others=self.others, faults=self.faults)


class LibraryRig(Rig):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.library = FakeLibrary(self.a, self.b)
        self.models = Models(
            self.library.look, fake_entry, Common(), budget_bytes=BUDGET, process_bytes=PROCESS,
            clock=lambda: self.now, **options,
        )  # fmt: skip

    async def ask(self, name: str | None) -> str:
        self.now += models_module.LIBRARY_S
        if name is not None:
            await self.models.look(name)
        return await super().ask(name)


def run_library(test: Callable[[LibraryRig], Coroutine[Any, Any, None]], **options: Any) -> None:
    async def whole() -> None:
        rig = LibraryRig(**options)
        try:
            await test(rig)
        finally:
            await rig.models.close()
        assert rig.meter.held == PROCESS

    asyncio.run(whole())


def test_a_model_that_came_into_the_library_is_found_when_it_is_asked_for_and_one_that_left_is_not() -> None:
    async def test(rig: LibraryRig) -> None:
        assert await rig.ask("a") == "a"
        with pytest.raises(Refused, match=r'the model "big" does not exist; this server has: a, b\n'):
            await rig.ask("big")
        rig.library.entries["big"] = rig.big
        assert await rig.ask("big") == "big"
        del rig.library.entries["a"], rig.library.entries["b"]
        await rig.models.unload("a")  # one in memory stays
        with pytest.raises(Refused, match="this server has: big"):
            await rig.ask("c")
        assert rig.models.names == ["big"]

    run_library(test)


def test_a_model_that_is_not_in_memory_is_looked_up_before_it_is_loaded() -> None:
    async def test(rig: LibraryRig) -> None:
        await rig.models.look()
        new = FakeEntry(rig.meter, "a", 200, 42)
        rig.library.entries["a"] = new  # its files were replaced
        assert await rig.ask("a") == "a"
        assert (rig.a.num_opened, new.num_opened) == (0, 1)
        num_looks = rig.library.num_looks
        await rig.ask("a")
        assert rig.library.num_looks == num_looks
        del rig.library.entries["b"]  # they are damaged
        rig.library.faults["b"] = "a tensor ends beyond the file"
        with pytest.raises(Refused, match="cannot run: a tensor ends beyond the file"):
            await rig.ask("b")

    run_library(test)


def test_a_model_of_the_library_is_planned_in_the_present_budget() -> None:
    async def test(rig: LibraryRig) -> None:
        await rig.ask("a")
        assert rig.a.budget_bytes == BUDGET
        await rig.models.unload("a")
        await rig.models.resize(700)
        await rig.ask("a")
        assert rig.a.budget_bytes == 700
        rig.b.unready = DoesNotFit("b needs 800 B, and the budget is 700 B")
        with pytest.raises(DoesNotFit):
            await rig.ask("b")
        await rig.models.resize(BUDGET)
        rig.b.unready = None
        assert await rig.ask("b") == "b"  # at once: what was too small is over

    run_library(test)


def test_a_model_in_memory_stays_when_its_files_are_replaced_and_the_next_load_has_the_new_ones() -> None:
    async def test(rig: LibraryRig) -> None:
        new = FakeEntry(rig.meter, "a", 200, 42)
        await rig.models.look()
        async with rig.using("a"):
            rig.library.entries["a"] = new
            with pytest.raises(Refused):
                await rig.ask("c")
            await rig.ask("a")
            assert (rig.a.num_opened, new.num_opened) == (1, 0)
        await rig.models.unload("a")
        with pytest.raises(Refused):
            await rig.ask("c")
        await rig.ask("a")
        assert (rig.a.num_opened, new.num_opened) == (1, 1)

    run_library(test)


def test_a_model_of_a_library_is_ready_only_while_it_is_in_memory() -> None:
    async def test(rig: LibraryRig) -> None:
        await rig.models.look()
        assert rig.a.prepared == []
        await rig.ask("a")
        assert rig.a.prepared[-1] is True
        await rig.models.unload("a")
        assert rig.a.prepared[-1] is False
        rig.b.unready = DoesNotFit("b needs more")
        with pytest.raises(DoesNotFit, match="b needs more"):
            await rig.ask("b")
        assert rig.b.prepared == [True, False]
        with pytest.raises(DoesNotFit, match="b needs more"):  # and is not read again at once
            await rig.ask("b")
        assert rig.b.prepared.count(True) == 1

    run_library(test)


def test_a_request_without_a_name_means_the_model_used_last_or_the_only_one() -> None:
    async def test(rig: LibraryRig) -> None:
        await rig.models.look()
        with pytest.raises(Refused, match="no model is named; this server has: a, b"):
            await rig.ask(None)
        await rig.ask("b")
        await rig.ask("a")
        assert await rig.ask(None) == "a"
        await rig.models.unload("a")
        assert await rig.ask(None) == "b"
        await rig.models.unload("b")
        del rig.library.entries["a"]
        with pytest.raises(Refused):
            await rig.ask("c")
        assert await rig.ask(None) == "b"

    run_library(test)


def test_other_names_mean_the_whole_one_and_a_model_that_cannot_run_says_why() -> None:
    async def test(rig: LibraryRig) -> None:
        rig.library.others = {"short": "a", "gone": "c"}
        rig.library.faults = {"c": "c.gguf is cut off"}
        for name in ("short", "Short", "a:latest", "SHORT:latest"):
            assert await rig.ask(name) == "a"
        with pytest.raises(
            Refused, match=r'the model "c" cannot run: c.gguf is cut off; this server has: a, b'
        ):
            await rig.ask("c")
        with pytest.raises(Refused, match=r'the model "gone" does not exist'):
            await rig.ask("gone")

    run_library(test)


def test_unknown_names_look_at_the_library_once_a_second_and_an_error_lists_few_names() -> None:
    async def test(rig: LibraryRig) -> None:
        for number in range(50):
            source = FakeEntry(rig.meter, f"m{number}", 200, 42)
            rig.library.entries[source.facts.id] = source
        for number in range(100):
            await rig.models.look(f"unknown{number}")
        assert rig.library.num_looks == 1
        with pytest.raises(Refused, match=r"m17, 32 more\n"):
            rig.models.id_of("unknown")

    run_library(test)


def test_an_empty_library_says_so() -> None:
    async def test(rig: LibraryRig) -> None:
        rig.library.entries = {}
        with pytest.raises(Refused, match="this server has: none yet") as refused:
            await rig.ask("a")
        assert "`argosy search WORDS`" in str(refused.value.hint)
        assert (rig.models.facts(), rig.models.shown(), rig.models.hearing()) == ([], None, None)

    run_library(test)


def test_budgets_that_are_asked_for_at_once_apply_one_after_another() -> None:
    async def test(rig: Rig) -> None:
        async with rig.using("b"):
            rig.meter.budget = 2000
            await rig.ask("a")
            await asyncio.gather(rig.models.resize(700), rig.models.resize(450))
            assert rig.states() == {"a": "unloaded", "b": "ready", "big": "unloaded"}
            assert rig.meter.held <= rig.models.budget_bytes == 450
            await rig.models.resize(1000)
            growing = asyncio.create_task(rig.models.resize(2000))
            with pytest.raises(DoesNotFit, match="need 300 B"):
                await rig.models.resize(250)
            await growing
            assert rig.models.budget_bytes == 2000

    run(test)


def test_a_model_whose_client_left_while_it_was_read_is_unloaded_after_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loading, "LOOK_S", 0.001)

    async def test(rig: Rig) -> None:
        rig.a.can_open.clear()
        asking = asyncio.create_task(rig.ask("a"))
        await asyncio.to_thread(rig.a.has_told.wait)
        asking.cancel()
        rig.a.can_open.set()
        async with asyncio.timeout(30):
            while rig.states()["a"] != "ready":
                await asyncio.sleep(0.001)
            rig.now += 600
            while rig.states()["a"] != "unloaded":
                await asyncio.sleep(0.001)

    run(test, idle_unload_s=600.0)


def test_idle_models_stay_usable_if_one_cannot_be_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(rig: Rig) -> None:
        await rig.ask("a")
        await rig.ask("b")
        submit = loading.Threads.submit

        def refuse(threads: Any, call: Any, /, *args: Any, **named: Any) -> Any:
            if "close" in repr(call):
                raise Overloaded("no thread", retry_after_s=1)
            return submit(threads, call, *args, **named)

        with monkeypatch.context() as patched:
            patched.setattr(loading.Threads, "submit", refuse)
            with pytest.raises(Overloaded, match="no thread"):
                await rig.models.resize(150)
        assert rig.states() == {"a": "ready", "b": "ready", "big": "unloaded"}
        await rig.ask("b")
        assert rig.b.num_opened == 1

    run(test)
