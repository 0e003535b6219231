"""Nothing that clients send reaches logs, metrics, the audit or files, whatever happens to their requests.

Elsewhere: figure R24 (`tests/abuse/figures.py`) sends canaries to a server in its own process, and kills it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from argosy.guard.audit import Audit, AuditSettings
from argosy.guard.keys import KeyFile, KeyRing
from argosy.serve.answer.service import Service
from argosy.serve.app import make_app
from argosy.serve.guards.audited import Auditor
from argosy.serve.guards.governing import Governing
from argosy.serve.http.gate import Gate
from argosy.serve.http.log import LogWriter
from tests.abuse.figures import PATHS, body_of, request_with
from tests.serve.conftest import only

AT_ONCE = 16


def leave(app: Gate, canary: str, secret: str) -> Any:
    """Send a request whose client disconnects before the answer."""
    body = json.dumps(body_of("chat", canary, 400, stream=True)).encode()
    parts = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        return parts.pop() if parts else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        await asyncio.sleep(0)

    headers = {"host": "localhost", "content-type": "application/json", "authorization": f"Bearer {secret}"}
    scope = {
        "type": "http", "method": "POST", "path": PATHS["chat"], "raw_path": PATHS["chat"].encode(),
        "query_string": b"", "scheme": "http", "http_version": "1.1", "client": ("127.0.0.1", 1),
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }  # fmt: skip
    return app(scope, receive, send)


@pytest.mark.parametrize("num_requests", [250, pytest.param(1000, marks=pytest.mark.full)])
def test_canaries_leave_no_trace(
    num_requests: int, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    keys = KeyFile(tmp_path / "keys.json")
    _, secret = keys.add("one", scopes=("infer", "metrics", "admin", "grammar"))
    log = logging.getLogger("argosy.serve")
    handlers, level = log.handlers, log.level
    with (tmp_path / "log").open("wb") as file:
        writer = LogWriter(file.fileno(), log_format="json")
        log.handlers = [writer]
        log.setLevel(logging.INFO)
        audit = Audit(AuditSettings(directory=tmp_path / "audit"), facts={})
        try:
            seen, statuses, metrics = asyncio.run(
                _send_all(num_requests, service, keys, secret, audit, monkeypatch)
            )
        finally:
            audit.close()
            writer.close()
            log.handlers, log.level = handlers, level
    texts = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} | {
        "metrics": metrics
    }
    assert (
        sum(len(text.splitlines()) for name, text in texts.items() if name.endswith("/log")) >= num_requests
    )
    assert sum(b'"kind":"request"' in text for text in texts.values()) == 1
    for where, text in texts.items():
        assert [canary for canary in seen if canary.encode() in text] == [], where
        assert secret.encode() not in text, where
    assert {"200", "400", "401", "404", "500", "left"} <= statuses.keys(), statuses
    assert min(statuses["500"], statuses["left"]) >= num_requests // 33


async def _send_all(
    num_requests: int,
    service: Service,
    keys: KeyFile,
    secret: str,
    audit: Audit,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[list[str], Counter[str], bytes]:
    app = make_app(
        only(service),
        KeyRing(keys),
        block_tokens=16,
        max_sequences=8,
        governance=Governing(auditor=Auditor(audit, policy="")),
    )
    build = service.prompts.build

    def failing(messages: Any, *args: Any, **named: Any) -> Any:
        if "crash" in str(messages):
            raise RuntimeError(f"an unexpected failure that quotes {messages}")
        return build(messages, *args, **named)

    monkeypatch.setattr(service.prompts, "build", failing)
    rng, statuses = random.Random(0), Counter[str]()
    seen = [f"canary{rng.getrandbits(64):016x}" for _ in range(num_requests)]
    room = asyncio.Semaphore(AT_ONCE)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:

        async def send(number: int, canary: str) -> None:
            async with room:
                if number % 20 == 0:
                    await leave(app, canary, secret)
                    statuses["left"] += 1
                    return
                asked = request_with(random.Random(canary), canary, secret)
                if number % 20 == 1:
                    asked |= {"method": "POST", "url": PATHS["chat"], "content": None}
                    asked |= {
                        "json": body_of("chat", f"crash {canary}", 4),
                        "headers": {"Authorization": f"Bearer {secret}"},
                    }
                answer = await client.request(**asked)
                statuses[str(answer.status_code)] += 1

        await asyncio.gather(*(send(number, canary) for number, canary in enumerate(seen)))
        got = await client.get("/metrics", headers={"Authorization": f"Bearer {secret}"})
        assert got.status_code == 200
    return seen, statuses, got.content


def test_the_search_finds_a_canary(tmp_path: Path) -> None:
    """The audit's envelope has no field that a client fills: the test above would see it if it had one."""
    audit = Audit(AuditSettings(directory=tmp_path / "audit"), facts={})
    audit.record({"key": "k", "request_id": "r", "user": "canary-1"})
    audit.close()
    found = [path for path in (tmp_path / "audit").iterdir() if b"canary-1" in path.read_bytes()]
    assert [os.path.basename(path) for path in found] == ["audit-000001.jsonl"]
