"""Five hundred clients that vanish, each in its own way and at its own moment, leave nothing behind.

The clients use every dialect, streamed or not. They disconnect inside the request, before the answer or inside it, by a
close or a reset. Their prompts share prefixes, and experts come from the drive. A request is released when neither the
engine nor the limits know of its tenant any more: at most a step or RELEASE_S after the client hangs up, even while
1500 tokens come as fast as a tiny model makes them.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from argosy import Engine, SamplingParams
from argosy.engine.loop import AnswerEnd, AnswerToken, EngineLoop
from argosy.engine.sequence import Result, TokenEvent
from argosy.experts.cache import CachedRunner, ExpertCache
from argosy.guard.keys import KeyFile, KeyRing
from argosy.guard.limits import Limits
from argosy.prompt.builder import PromptBuilder
from argosy.prompt.prompt import Prompt, Trace
from argosy.prompt.replay import ReplayMemory
from argosy.serve.answer.answers import Answers, Ended
from argosy.serve.answer.facts import ModelFacts
from argosy.serve.answer.service import Service
from argosy.serve.answer.tool_use import ToolUse
from argosy.serve.app import make_app
from argosy.serve.http.listen import bind
from argosy.serve.http.server import WokenServer, uvicorn_config
from tests.cli.tiny_chat_model import write_chat_model
from tests.serve.conftest import only

NUM_CLIENTS = 5
CONTEXT_TOKENS, MOST_TOKENS = 2048, 1500
RELEASE_S = 0.25  # or one step, whichever is longer
SHARED = "What all of these begin with, and some more of it. " * 3
GOES_ON = {"logit_bias": {"2": -100, "0": -100}}  # forbids the tokens that end an answer
ASK = {"prompt": SHARED, "max_tokens": 12, "temperature": 0}


def wait_for(is_so: Callable[[], bool], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.005)


class Server:
    """A server in a thread of this process, so that the test can inspect everything it holds."""

    def __init__(self, engine: Engine, keys: KeyFile) -> None:
        self.engine, self.limits = engine, Limits()
        self.longest_step_s = 0.0
        step = engine.step

        def timed() -> Any:
            began = time.perf_counter()
            events = step()
            self.longest_step_s = max(self.longest_step_s, time.perf_counter() - began)
            return events

        engine.step = timed  # type: ignore[method-assign]
        facts = ModelFacts(
            id="tiny", family="", context_tokens=CONTEXT_TOKENS, num_layers=1, num_experts=1, experts_per_token=1,
            vocab_size=512,
        )  # fmt: skip
        self.prompts = PromptBuilder(engine.tokenizer, vocab_size=512, memory=ReplayMemory())
        self.loop = EngineLoop(engine)
        service = Service(self.loop, self.prompts, engine.tokenizer, facts)
        app = make_app(only(service), KeyRing(keys), block_tokens=16, max_sequences=4, limits=self.limits)
        self._server = WokenServer(uvicorn_config(app, grace_s=5))
        self._bound = ExitStack()
        sockets = self._bound.enter_context(bind("127.0.0.1", 0))
        self.port = sockets[0].getsockname()[1]
        self._thread = threading.Thread(target=self._server.run, args=[sockets])
        self._thread.start()
        wait_for(lambda: self._server.started)

    def close(self) -> None:
        self._server.end()
        self._thread.join()
        self._bound.close()
        self.loop.close()
        self.prompts.close()

    def knows(self, tenant: str) -> bool:
        """Whether any request of a tenant is under way."""
        return tenant in self.limits._running or any(
            one.tenant == tenant for one in list(self.engine._sequences)
        )

    def num_connections(self) -> int:
        return len(self._server.server_state.connections)

    def tasks(self) -> int:
        events = self._server.servers[0].get_loop()
        counted = asyncio.run_coroutine_threadsafe(_num_tasks(), events)  # type: ignore[arg-type]
        return counted.result(10) - 1


async def _num_tasks() -> int:
    return len(asyncio.all_tasks())


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[KeyFile, list[tuple[str, str]]]:
    file = KeyFile(tmp_path_factory.mktemp("keys") / "keys.json")
    return file, [(key.id, secret) for key, secret in (file.add(str(n)) for n in range(NUM_CLIENTS))]


@pytest.fixture
def server(tmp_path: Path, keys: tuple[KeyFile, Any]) -> Iterator[Server]:
    model = write_chat_model(tmp_path / "model", context_tokens=CONTEXT_TOKENS)
    with Engine.open(
        model, memory="2GiB", threads=1, expert_slots=4, chunk_tokens=32, max_sequences=4, grammars=True,
        kv_dir=tmp_path / "kv",
    ) as engine:  # fmt: skip
        server = Server(engine, keys[0])
        yield server
        server.close()


def body_of(rng: random.Random) -> tuple[str, bytes]:
    """A path, and a random body for it."""
    text = SHARED[: rng.randrange(1, len(SHARED))] + str(rng.random())
    tokens, stream = rng.randrange(1, MOST_TOKENS), rng.random() < 0.6
    common: dict[str, Any] = {"temperature": rng.choice([0, 1]), "stream": stream}
    texts = {"prompt": rng.choice([text, text, [text, text]]), "max_tokens": tokens} | common
    chat = {"messages": [{"role": "user", "content": text}], "max_tokens": tokens} | common
    path, body = rng.choice(
        [
            ("/v1/completions", texts | GOES_ON),
            ("/v1/chat/completions", chat | GOES_ON | {"n": rng.choice([1, 1, 3])}),
            ("/v1/chat/completions", chat | {"response_format": {"type": "json_object"}}),
            ("/v1/responses", {"input": text, "max_output_tokens": max(16, tokens)} | common),
            ("/v1/messages", chat),
        ]
    )  # fmt: skip
    return path, json.dumps(body).encode()


def ask_and_vanish(port: int, secret: str, rng: random.Random) -> None:
    """Send one request, and end its connection at a random moment."""
    path, body = body_of(rng)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {secret}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    whole = head.encode() + body
    with socket.create_connection(("127.0.0.1", port)) as connection:
        if rng.random() < 0.5:  # a reset instead of a close
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        moment = rng.random()
        if moment < 0.1:
            connection.sendall(whole[: rng.randrange(len(whole))])
            return
        connection.sendall(whole)
        if moment < 0.5:
            time.sleep(rng.random() * 0.06)
            return
        connection.settimeout(rng.random() * 0.2)
        wanted = rng.randrange(1, 6000)
        try:
            while wanted > 0 and (part := connection.recv(wanted)):
                wanted -= len(part)
        except TimeoutError:
            pass


def seconds_to_release(server: Server, tenant: str) -> float:
    """Seconds until nothing is known of a tenant whose client just vanished; its request may still be arriving."""
    began = last_seen = time.perf_counter()
    while (now := time.perf_counter()) - last_seen < 0.03:
        assert now - began < 20
        if server.knows(tenant):
            last_seen = now
        time.sleep(0.002)
    return last_seen - began


def leased_slots(experts: ExpertCache) -> set[tuple[int, int]]:
    pinned = {key for policy in experts.slots.policies for key in policy.pinned()}
    return pinned - {*experts.core.kept, *experts.core.early}


def held(server: Server) -> dict[str, Any]:
    """All resources that requests hold, by name."""
    facts, runner = server.engine.facts(), server.engine._started.model.experts
    assert isinstance(runner, CachedRunner)
    experts = runner.cache
    return {
        "sequences": facts.num_running + facts.num_waiting,
        "KV blocks": facts.kv_blocks_held,
        "queued reads": server.engine._started.store.pending(),
        "open lease": experts.core.is_open,
        "leased slots": len(leased_slots(experts)),
        "live requests": len(server.loop._live) + server.loop._num_live,
        "requests of keys": dict(server.limits._running),
        "tasks": server.tasks(),
        "descriptors": len([name for name in os.listdir("/proc/self/fd") if is_socket(name)]),
    }


def left_behind(server: Server, before: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What is held now and was not held before; a socket of an earlier test may be closed in between."""
    now = held(server)
    now["descriptors"] = max(now["descriptors"], before["descriptors"])
    return {name: (before[name], now[name]) for name in before if before[name] != now[name]}


def is_socket(descriptor: str) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:")
    except OSError:
        return False


def num_children() -> int:
    """The number of child processes, each a renderer of chat templates."""
    found = set[str]()  # a child goes to another thread when its own ends
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError):  # a thread that has just ended
            found.update((task / "children").read_text().split())
    return len(found)


@pytest.mark.parametrize("num_disconnects", [50, pytest.param(500, marks=pytest.mark.full)])
def test_clients_that_vanish_leave_nothing_behind(
    server: Server, keys: tuple[KeyFile, list[tuple[str, str]]], num_disconnects: int
) -> None:
    secret = keys[1][0][1]
    headers = {"Authorization": f"Bearer {secret}"}

    def answer() -> list[Any]:
        chat = {"messages": [{"role": "user", "content": SHARED}], "max_tokens": 12, "temperature": 0}
        url = f"http://127.0.0.1:{server.port}/v1"
        whole = [httpx.post(f"{url}/completions", json=ASK, headers=headers).json()]
        whole.append(httpx.post(f"{url}/chat/completions", json=chat, headers=headers).json())
        return [one["choices"] for one in whole]

    def client(number: int) -> list[float]:
        rng, (tenant, secret) = random.Random(number), keys[1][number]
        taken = []
        for _ in range(num_disconnects // NUM_CLIENTS):
            ask_and_vanish(server.port, secret, rng)
            taken.append(seconds_to_release(server, tenant))
        return taken

    expected = answer()
    gc.collect()  # sockets that tests before this one left in circles
    wait_for(lambda: not server.limits._running and not server.num_connections())
    before = held(server)
    num_before = most_children = num_children()
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        running = [pool.submit(client, number) for number in range(NUM_CLIENTS)]
        while not all(one.done() for one in running):
            most_children = max(most_children, num_children())
            time.sleep(0.05)
    taken = sorted(seconds for one in running for seconds in one.result())
    with suppress(AssertionError):
        wait_for(lambda: not left_behind(server, before))
    assert left_behind(server, before) == {}
    assert before["KV blocks"] == before["queued reads"] == before["leased slots"] == before["sequences"] == 0
    # The clients got real answers; how many tokens depends on the machine.
    assert server.engine.facts().totals.new_tokens > 2 * num_disconnects
    assert most_children <= num_before + 1  # a second one starts when the first is busy
    assert answer() == expected
    p50, p99 = taken[len(taken) // 2], taken[len(taken) * 99 // 100 - 1]
    print(
        f"released after {1e3 * p50:.1f} ms (p50), {1e3 * p99:.1f} ms (p99), {1e3 * taken[-1]:.1f} ms at most;"
        f" longest step {1e3 * server.longest_step_s:.1f} ms"
    )
    assert p99 <= max(RELEASE_S, server.longest_step_s)


def test_reading_a_finished_answer_and_remembering_it_do_not_block_other_tasks() -> None:
    num_tokens, token_s, remember_s = 3000, 0.0001, 10.0
    wake_ups, remembered, turns, turns_before = [], [], 0, []

    class Loop:
        def submit(self, prompt: Prompt, params: Any, on_event: Callable[[Any], None], **_: Any) -> None:
            for number in range(num_tokens):
                on_event(AnswerToken(0, TokenEvent(number, "a", None, None, None)))
            ledger: Any = None
            on_event(AnswerEnd(0, Result("", list(range(num_tokens)), "length", None, {}, 0, ledger)))

    class Prompts:
        is_reasoning = False

        def parser(self, *_: Any) -> Prompts:
            return self

        def push(self, token_id: int, text: str) -> list[Any]:
            turns_before.append(turns)
            time.sleep(token_s)
            return []

        def finish(self, *, is_cut: bool) -> list[Any]:
            return []

        def remember(self, tenant: str, prompt: Prompt, token_ids: list[int], *_: Any) -> None:
            end, before = time.monotonic() + remember_s, turns
            while turns < before + 3 and time.monotonic() < end:
                time.sleep(token_s)
            turns_before.append(before)
            remembered.append(token_ids)

    async def ask() -> list[Any]:
        async def others() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0.001)
                turns += 1

        events = asyncio.get_running_loop()
        wake_up = events.call_soon_threadsafe

        def counted(*args: Any) -> Any:
            wake_ups.append(args)
            return wake_up(*args)

        events.call_soon_threadsafe = counted  # type: ignore[method-assign]
        other = asyncio.ensure_future(others())
        await asyncio.sleep(0)
        caller: Any = SimpleNamespace(
            tenant="",
            request_id="req",
            count=lambda **_: None,
            watches=[],
            work=lambda call: call(),
        )
        loop: Any = Loop()
        prompts: Any = Prompts()
        prompt = Prompt((1,), "x", trace=Trace(1, b"", b"", b""))
        answers = Answers(loop, prompts, caller, events)
        answers.add(prompt, SamplingParams(), ToolUse(), 1)
        num_wake_ups = len(wake_ups)
        steps = [step async for step in answers.steps()]
        other.cancel()
        assert num_wake_ups == 1
        assert isinstance(steps[-1], Ended)
        assert remembered == [list(range(num_tokens))]  # before the end is reported
        return steps

    steps = asyncio.run(ask())
    assert len(steps) == num_tokens + 1
    assert turns_before[-2] >= turns_before[0] + 3  # while tokens are read
    assert turns >= turns_before[-1] + 3  # while they are remembered


def test_an_answer_that_is_added_after_its_client_left_ends_at_once() -> None:
    cancelled: list[object] = []
    loop: Any = SimpleNamespace(submit=lambda *_, **__: "request", cancel=cancelled.append)
    caller: Any = SimpleNamespace(tenant="", request_id="req", count=lambda **_: None, watches=[])
    answers = Answers(loop, Any, caller, Any)  # type: ignore[arg-type]
    answers.cancel()
    answers.add(Prompt((1,), ""), SamplingParams(), ToolUse(), 1)
    assert cancelled == ["request"]
