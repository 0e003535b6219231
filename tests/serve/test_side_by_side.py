"""Many small parts of one request: a few at a time, all of them or an error, and none left behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest

from argosy.engine.ledger import Ledger
from argosy.engine.loop import AnswerEnd, AnswerToken, Event
from argosy.engine.sequence import Result, TokenEvent
from argosy.errors import ArgosyError, Overloaded, UsageError
from argosy.serve.answer.service import Service
from argosy.serve.answer.side_by_side import AT_ONCE, run_parts
from argosy.serve.http.caller import Caller, Watch


@dataclass(eq=False)
class FakeRequest:
    number: int
    deliver: Callable[[Event], None]
    prompt_ids: list[int] = field(default_factory=lambda: [1, 2])


class FakeEngine:
    """Takes at most `room` parts at a time; a thread ends the oldest of them, one after another."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.most = 0
        self.cancelled: list[int] = []
        self._live: list[FakeRequest] = []
        self._changed = threading.Condition()
        self._is_over = False
        self.is_held = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def submit(self, number: int, deliver: Callable[[Event], None]) -> FakeRequest:
        with self._changed:
            if len(self._live) >= self.room:
                raise Overloaded("no room", retry_after_s=1)
            request = FakeRequest(number, deliver)
            self._live.append(request)
            self.most = max(self.most, len(self._live))
            self._changed.notify_all()
        return request

    def cancel(self, request: FakeRequest) -> None:
        with self._changed:
            self.cancelled.append(request.number)
            if request in self._live:
                self._live.remove(request)

    @property
    def num_live(self) -> int:
        return len(self._live)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_over or (self._live and not self.is_held), 10)
                if self._is_over:
                    return
                request = self._live.pop(0)
            request.deliver(AnswerEnd(0, result_of(request.number)))

    def close(self) -> None:
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        self._thread.join()


def result_of(number: int) -> Result:
    return Result(
        text=str(number), token_ids=[], finish_reason="stop", logprobs=None, usage={}, seed=0, ledger=Ledger()
    )


class FakeService:
    def __init__(self, engine: FakeEngine) -> None:
        self.loop, self.work = engine, self
        self.model, self.digests = SimpleNamespace(id="fake"), dict[str, str]()

    async def run(self, caller: Caller, call: Callable[[], Any]) -> Any:
        return await asyncio.to_thread(call)


def run(engine: FakeEngine, num_parts: int, submit: Callable[..., Any] | None = None) -> dict[int, str]:
    taken: dict[int, str] = {}

    def take(number: int, result: Result) -> None:
        assert number not in taken
        taken[number] = result.text

    service = cast(Service, FakeService(engine))
    work = run_parts(
        service, Caller(), num_parts, 1, submit or engine.submit, take, param=lambda at: f"input.{at}"
    )
    try:
        asyncio.run(work)
    finally:
        engine.close()
    return taken


@pytest.mark.parametrize("room", [1, 3, 100])
def test_every_part_runs_once_however_little_room_there_is(room: int) -> None:
    engine = FakeEngine(room)
    assert run(engine, 50) == {number: str(number) for number in range(50)}
    assert engine.most <= min(room, AT_ONCE)


def test_without_room_for_a_single_part_the_request_is_refused() -> None:
    engine = FakeEngine(0)
    with pytest.raises(Overloaded):
        run(engine, 50)


def test_an_error_names_its_part_and_ends_the_others() -> None:
    engine = FakeEngine(100)
    engine.is_held = True

    def submit(number: int, deliver: Callable[[Event], None]) -> Any:
        if number == 5:
            raise UsageError("too long")
        return engine.submit(number, deliver)

    with pytest.raises(UsageError) as error:
        run(engine, 50, submit)
    assert error.value.facts["param"] == "input.5"
    assert engine.num_live == 0
    assert len(engine.cancelled) == len(set(engine.cancelled))


def test_a_part_that_was_cancelled_elsewhere_is_an_error() -> None:
    engine = FakeEngine(100)

    def submit(number: int, deliver: Callable[[Event], None]) -> Any:
        made = Result(
            text="", token_ids=[], finish_reason="cancelled", logprobs=None, usage={}, seed=0, ledger=Ledger()
        )
        deliver(AnswerEnd(0, made))
        return FakeRequest(number, deliver)

    with pytest.raises(ArgosyError, match="the answer was cancelled"):
        run(engine, 1, submit)


def test_a_part_ends_with_an_error_if_a_watch_fails() -> None:
    class Failing(Watch):
        def count(self, *, prompt: int, new: int) -> None:
            if new:
                raise RuntimeError

    def submit(number: int, deliver: Callable[[Event], None]) -> FakeRequest:
        def tell() -> None:
            with suppress(RuntimeError):  # the loop delivers nothing more then
                deliver(AnswerToken(0, TokenEvent(1, "a", None, None, None)))

        threading.Thread(target=tell).start()
        return FakeRequest(number, deliver)

    engine = FakeEngine(1)
    work = run_parts(
        cast(Service, FakeService(engine)), Caller(watches=[Failing()]), 1, 1, submit,
        lambda number, result: None, param=lambda at: "input",
    )  # fmt: skip
    try:
        with pytest.raises(RuntimeError):
            asyncio.run(asyncio.wait_for(work, 5))
    finally:
        engine.close()
