"""A fake server without a model, with the routes that the page, `top` and `connect` read.

Its answer depends on the last message: `think` reasons first, `slow` continues until it is stopped, `fail` is an error,
`break` one after half of the answer, `lost` ends there without an error, `nothing` reaches its maximum without text,
`busy` and `too long` are refused, `markdown` answers with every construct, `hostile` with markup that would do harm.
It records every request for the test.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "src" / "argosy" / "serve" / "page"
POLICY = "default-src 'self'; img-src 'self' data:; media-src 'self' data:; frame-ancestors 'none'"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
}
MODEL = "Qwen3-30B-A3B-Q4_K_M"
CONTEXT_TOKENS = 32_768
GIB = 2**30

MARKDOWN = """## Heading *two*

A paragraph with **bold**, *emphasis*, `code <b>`, ~~gone~~ and snake_case_name.
Second line, a [link](https://example.org/a_(b)), a bare https://example.org/x. And a [trap](javascript:alert(1)).

- one
- two
  - inner
- three

3. third
4. fourth

> quoted <script>alert(1)</script>

| name | size |
|:-----|-----:|
| a    |    1 |

```python
def f(x):
    return "<img src=x onerror=alert(1)>"
```

![picture](https://example.org/p.png) <img src=x onerror="alert(1)">"""


HOSTILE = """<script>alert(1)</script><img src=x onerror=alert(1)><svg onload=alert(1)>
<iframe src="https://example.org/"></iframe><style>body{display:none}</style><base href="https://example.org/">
<meta http-equiv="refresh" content="0;url=https://example.org/"><form action="https://example.org/"><input></form>

![a](https://example.org/a.png) ![b](data:image/svg+xml,<svg/onload=alert(1)>) [![c](https://example.org/c.png)](x)
[js](javascript:alert(1)) [JS](JaVaScRiPt:alert(1)) [data](data:text/html,<script>alert(1)</script>)
[v](vbscript:x) [quote](https://example.org/"onmouseover="alert(1)) <https://example.org/auto>
[ref]: https://example.org/ref [blob](blob:https://example.org/1) [file](file:///etc/passwd)
[own](/page/app.js) &lt;script&gt;

```html"><script>alert(1)</script>
</code></pre><script>alert(1)</script>
```

| <b>x</b> | ![d](https://example.org/d.png) |
|---|---|
| <img src=x onerror=alert(1)> | [y](javascript:alert(1)) |
"""


def text_of(message: dict[str, Any]) -> str:
    """The text of a message, whose content may have parts."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return " ".join(part.get("text", f"[{part['type']}]") for part in content)


class FakeServer(ThreadingHTTPServer):
    """The fake server; its attributes up to `running` may be changed while it runs."""

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.key: str | None = None
        self.base_path = ""
        self.shows_heat = True
        self.tools = "native"
        self.inputs = ["text"]
        self.has_watermark = False
        self.others: list[dict[str, Any]] = []  # further entries in /v1/models
        self.ignored = ""  # fields without effect
        self.refuses_media: tuple[int, str] | None = None  # status and message for a count of tokens
        self.token_s = 0.005
        self.tokens = 300
        self.expert_slots = 2480
        self.sharing: list[dict[str, Any]] = []  # `models` of the state, if there are several
        self.is_away = False  # the engine's states end, and are refused
        self.about: dict[str, Any] = {}  # more of the model's entry in /v1/models
        self.fills_context = False  # an answer ends because the context is full
        self.num_busy = 0  # requests for an answer that will be refused for a second
        self.running = 0
        self.prompts: list[dict[str, Any]] = []  # `running` of the state
        self.waits: list[dict[str, Any]] = []  # `waiting` of the state
        self.requests: list[tuple[str, Any]] = []
        self.disconnects = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}{self.base_path}"

    @property
    def conversations(self) -> list[list[dict[str, Any]]]:
        """The messages of each chat completion request."""
        return [body["messages"] for path, body in self.requests if path == "/v1/chat/completions"]

    def handle_error(self, request: object, client_address: object) -> None:
        """Print nothing: some tests disconnect on purpose."""

    def state(self) -> dict[str, Any]:
        experts = 128
        layers = [
            [
                self.tokens * 8 * ((expert * 37 + layer * 11) % experts + 1) // (experts * 64)
                for expert in range(experts)
            ]
            for layer in range(48)
        ]
        layers[12][5] += 2 * self.tokens
        slots = self.expert_slots
        resident = min(slots, 1200 + self.tokens)
        return {
            "models": self.sharing,
            "model": {
                "id": MODEL,
                "family": "qwen3_moe",
                "context_tokens": CONTEXT_TOKENS,
                "num_layers": 48,
                "num_experts": experts,
                "experts_per_token": 8,
            },
            "memory": {
                "budget_bytes": 12 * GIB,
                "peak_bytes": 9 * GIB + 4_000_000 * self.tokens,
                "lines": [
                    {"name": "process", "bytes": 150 * 2**20, "note": "interpreter, libraries, tokenizer"},
                    {"name": "dense weights", "bytes": int(1.1 * GIB), "note": ""},
                    {"name": "KV cache", "bytes": 3 * GIB, "note": "32768 tokens"},
                    {"name": "working buffers", "bytes": 300 * 2**20, "note": "512 tokens a step"},
                    {"name": "staging", "bytes": 32 * 2**20, "note": "buffers for transcoding"},
                    {"name": "expert cache", "bytes": int(6.9 * GIB), "note": "2480 of 6144 experts (40 %)"},
                ],
            },
            "speed": {"decode_tok_per_s": 11.4 if self.running else None, "prefill_tok_per_s": 148.0},
            "experts": {
                "total": 48 * experts,
                "slots": slots,
                "resident": resident,
                "hit_rate": 0.83,
                "bytes_read": 38_000_000 * self.tokens,
                "drive_bytes_per_s": 2.1e9 if self.running else 0.0,
            },
            "recent": {"tokens": 512, "hit_rate": 0.81, "lru": 0.79, "optimum": 0.9},
            "time": {
                "wall_s": 10.0,
                "parts": {"router": 0.5, "expert_compute": 6.25, "encoding": 0.0, "other": 3.25},
            },
            "queue": {"running": self.running, "waiting": 0, "max_sequences": 4},
            "running": self.prompts,
            "waiting": self.waits,
            "kv": {
                "blocks_total": 512,
                "blocks_used": min(512, self.tokens // 16),
                "blocks_cached": 40,
                "block_tokens": 64,
            },
            "heat": {"tokens": self.tokens, "layers": layers} if self.shows_heat else None,
            "privacy": {"logging": False, "traces": False},
        }


@contextmanager
def fake_server(port: int = 0) -> Iterator[FakeServer]:
    server = FakeServer(port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def stranger(answer: bytes) -> Iterator[str]:
    """Run a program that sends `answer` to every client, and yield its address."""

    class Handler(BaseHTTPRequestHandler):
        def handle(self) -> None:
            self.request.recv(65536)
            self.request.sendall(answer)

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.handle_request, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        thread.join(timeout=10)
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def log_message(self, format: str, *arguments: object) -> None:
        """Log nothing, so that pytest shows only the test's own output."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        is_within = path.startswith(f"{self.server.base_path}/")
        path = path.removeprefix(self.server.base_path)
        self.server.requests.append((path, None))
        if not is_within:
            self._refuse(404, f"there is nothing at {path}")
        elif path == "/":
            self._file("index.html")
        elif path.startswith("/page/"):
            self._file(path.removeprefix("/page/"))
        elif not self._has_key():
            self._refuse(401, "the key is missing or wrong")
        elif path == "/v1/models":
            entry = {"id": MODEL, "object": "model", "created": 0, "owned_by": "argosy"}
            about = {
                "context_length": CONTEXT_TOKENS,
                "architecture": {"input_modalities": self.server.inputs, "output_modalities": ["text"]},
                "capabilities": {"tools": self.server.tools},
            }
            self._json({"object": "list", "data": [entry | about | self.server.about, *self.server.others]})
        elif path == "/v1/engine/transparency":
            self._json({"object": "transparency", "watermark": {"is_on": self.server.has_watermark}})
        elif path == "/v1/engine/state":
            self._json(self.server.state())
        elif path == "/v1/engine/events" and self.server.is_away:
            self.close_connection = True
        elif path == "/v1/engine/events":
            self._stream()
            while not self.server.is_away:
                self._event(self.server.state())
                time.sleep(0.1)
        else:
            self._refuse(404, f"there is nothing at {path}")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, body))
        if not self._has_key():
            self._refuse(401, "the key is missing or wrong")
        elif self.path == "/tokenize":
            self._json({"count": len(body["content"].split())})
        elif self.path == "/v1/responses/input_tokens":
            self._count(body["input"][0]["content"][0])
        elif self.path != "/v1/chat/completions":
            self._refuse(404, f"there is nothing at {self.path}")
        elif "busy" in text_of(body["messages"][-1]):
            self._refuse(503, "all places are taken", {"Retry-After": "120"})
        elif self.server.num_busy > 0:
            self.server.num_busy -= 1
            self._refuse(429, "2 requests wait\nhint: try again later", {"Retry-After": "1"})
        elif "too long" in text_of(body["messages"][-1]):
            told = "the prompt has 9 tokens, and 4 fit\nhint: leave something out"
            self._refuse(400, told, code="context_length_exceeded")
        elif sum(text_of(said).startswith("long") for said in body["messages"]) > 2:
            self._refuse(400, "the conversation does not fit", code="context_length_exceeded")
        else:
            self.server.running += 1
            try:
                self._answer(body["messages"])
            except (BrokenPipeError, ConnectionResetError):
                self.server.disconnects += 1
            finally:
                self.server.running -= 1

    def _count(self, part: dict[str, Any]) -> None:
        if self.server.refuses_media is not None:
            self._refuse(*self.server.refuses_media)
            return
        counts = {
            "input_image": {"image_tokens": 256},
            "input_audio": {"audio_tokens": 13},
            "input_video": {"image_tokens": 600, "audio_tokens": 40},
        }[part["type"]]
        answer = {"object": "response.input_tokens", "input_tokens": sum(counts.values()) + 9}
        self._json(answer | {"input_tokens_details": counts})

    def _answer(self, messages: list[dict[str, Any]]) -> None:
        asked = text_of(messages[-1])
        self._stream()
        total = 400 if "slow" in asked else 40
        for processed in range(0, total + 1, total // 4):
            progress = {"processed": processed, "total": total, "cache": 7}
            progress |= {"encoded": 0.428} if processed == 0 else {}
            self._event({"choices": [], "prompt_progress": progress})
            time.sleep(10 * self.server.token_s)
        self._delta({"role": "assistant", "content": ""})
        if "think" in asked:
            for word in ("Let ", "me ", "think ", "about ", "it."):
                self._delta({"reasoning_content": word})
        if "lost" in asked or "break" in asked:
            self._delta({"content": "Half an "})
        if "lost" in asked:
            return
        if "fail" in asked or "break" in asked:
            self._event({"error": {"message": "the drive refused a read", "type": "server_error"}})
            return
        words = self._words(asked, len(messages))
        for word in words:
            self._delta({"content": word})
        reason = "length" if self.server.fills_context or not words else "stop"
        self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
        timings = {
            "prompt_tokens": total,
            "new_tokens": len(words),
            "wall_s": 4.45,
            "time_to_first_token_s": 0.42,
            "decode_tok_per_s": 11.4,
            "hit_rate": 0.83,
            "bytes_read": 1_340_000_000,
            "parts": {
                "router": 0.11,
                "attention_and_dense": 1.29,
                "expert_compute": 1.72,
                "waiting_for_reads": 1.16,
                "sampling": 0.04,
                "other": 0.13,
            },
        }
        tokens = CONTEXT_TOKENS if self.server.fills_context else total + len(words)
        usage = {"prompt_tokens": total, "completion_tokens": len(words), "total_tokens": tokens}
        self._event({"choices": [], "usage": usage, "timings": timings})
        self.wfile.write(b"data: [DONE]\n\n")

    def _words(self, asked: str, num_messages: int) -> list[str]:
        if "hostile" in asked:
            return [HOSTILE[at : at + 50] for at in range(0, len(HOSTILE), 50)]
        if "markdown" in asked:
            return [MARKDOWN[at : at + 7] for at in range(0, len(MARKDOWN), 7)]
        if "nothing" in asked:
            return []
        if "slow" in asked:
            return [f"word {number} " for number in range(3000)]
        return [
            f"You said: {asked} ",
            f"({num_messages} messages, ",
            f"answer {len(self.server.conversations)})",
        ]

    def _delta(self, delta: dict[str, str]) -> None:
        self.server.tokens += 1
        self._event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
        time.sleep(self.server.token_s)

    # Answers

    def _has_key(self) -> bool:
        return self.server.key is None or self.headers.get("Authorization") == f"Bearer {self.server.key}"

    def _file(self, name: str) -> None:
        path = PAGE / name
        if path.parent != PAGE or not path.is_file():
            self._refuse(404, f"there is no {name}")
            return
        self._send(200, path.read_bytes(), MEDIA_TYPES[path.suffix])

    def _json(self, facts: Any) -> None:
        self._send(200, json.dumps(facts).encode(), "application/json")

    def _refuse(
        self, status: int, message: str, headers: dict[str, str] | None = None, *, code: str | None = None
    ) -> None:
        body = {"error": {"message": message, "type": "error", "param": None, "code": code}}
        self._send(status, json.dumps(body).encode(), "application/json", headers)

    def _send(self, status: int, body: bytes, media_type: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _stream(self) -> None:
        self.send_response(200)
        if self.server.ignored:
            self.send_header("x-ignored-params", self.server.ignored)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(b": alive\n\n")

    def _event(self, facts: Any) -> None:
        self.wfile.write(f"data: {json.dumps(facts)}\n\n".encode())
