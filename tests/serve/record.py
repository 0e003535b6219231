"""Record transcripts of each dialect: a request and its whole answer, from a real engine whose model speaks a script.

    CASES  ->  a fresh server, one after the other  ->  ids numbered, times zero  ->  transcripts/NAME.json

    python -m tests.serve.record    writes them again, unless one breaks a rule of `wire_rules.py`

Elsewhere: replaying is `test_transcripts.py`; the scripts are in `speaking.py`.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.serve.dialects import PATHS, TOOLS, greedy
from tests.serve.speaking import ANSWER_SCHEMA

FOLDER = Path(__file__).parent / "transcripts"
HEADERS = ("content-type", "x-ignored-params", "retry-after", "cache-control", "x-accel-buffering")
_ID = re.compile(r"(chatcmpl-|cmpl-|resp_|msg_|rs_|fc_|call_)[0-9A-Za-z]{20,}")
Transcript = dict[str, Any]


def _asked(dialect: str, said: str, **more: Any) -> dict[str, Any]:
    """A request body; options that all dialects share are spelled in this dialect's way."""
    given = {"model": "tiny"} | greedy(dialect, said, more.pop("max_tokens", 200))
    if more.pop("tools", False):
        given["tools"] = TOOLS[dialect]
    if more.pop("schema", False):
        named = {"name": "answer", "schema": ANSWER_SCHEMA}
        given |= {
            "chat": {"response_format": {"type": "json_schema", "json_schema": named}},
            "responses": {"text": {"format": {"type": "json_schema", **named}}},
            "messages": {"output_config": {"format": {"type": "json_schema", "schema": ANSWER_SCHEMA}}},
        }[dialect]  # fmt: skip
    if more.pop("logprobs", False):
        given |= {
            "chat": {"logprobs": True, "top_logprobs": 1},
            "completions": {"logprobs": 1},
            "responses": {"include": ["message.output_text.logprobs"], "top_logprobs": 1},
        }[dialect]
    if (stop := more.pop("stop", None)) is not None:
        given["stop_sequences" if dialect == "messages" else "stop"] = stop
    return given | more


def _second_turn(dialect: str) -> dict[str, Any]:
    """The request that a client sends after running the tools."""
    calls = (("call_a", '{"city": "Oslo"}'), ("call_b", '{"city": "Rome", "days": 2}'))
    asked = _asked(dialect, "#weather", tools=True)
    if dialect == "chat":
        made = [
            {"id": name, "type": "function", "function": {"name": "get_weather", "arguments": text}}
            for name, text in calls
        ]
        asked["messages"] += [
            {"role": "assistant", "content": "Let me look.", "tool_calls": made},
            *({"role": "tool", "tool_call_id": name, "content": "#sunny"} for name, _ in calls),
        ]
    elif dialect == "responses":
        asked["input"] = [
            {"role": "user", "content": "#weather"},
            *(
                {"type": "function_call", "call_id": n, "name": "get_weather", "arguments": text}
                for n, text in calls
            ),
            *({"type": "function_call_output", "call_id": name, "output": "#sunny"} for name, _ in calls),
        ]
    else:
        used = [
            {"type": "tool_use", "id": n, "name": "get_weather", "input": json.loads(text)}
            for n, text in calls
        ]
        results = [{"type": "tool_result", "tool_use_id": name, "content": "#sunny"} for name, _ in calls]
        asked["messages"] += [{"role": "assistant", "content": used}, {"role": "user", "content": results}]
    return asked


def _asked_of_ollama(
    said: str, *, is_chat: bool = True, max_tokens: int = 200, stop: list[str] | None = None, tools: bool = False,
    schema: bool = False, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """A request body of Ollama for a whole answer."""
    options = {"temperature": 0, "num_predict": max_tokens} | ({} if stop is None else {"stop": stop})
    given: dict[str, Any] = {"model": "tiny:latest", "stream": False, "options": options}
    given |= {"messages": [{"role": "user", "content": said}]} if is_chat else {"prompt": said}
    given |= {"tools": TOOLS["chat"]} if tools else {}
    given |= {"format": ANSWER_SCHEMA} if schema else {}
    return given | more


def _cases_of_ollama() -> Iterator[tuple[str, dict[str, Any]]]:
    second = _asked_of_ollama("#weather", tools=True)
    arguments = ({"city": "Oslo"}, {"city": "Rome", "days": 2})
    second["messages"] += [
        {
            "role": "assistant", "content": "Let me look.",
            "tool_calls": [{"function": {"name": "get_weather", "arguments": given}} for given in arguments],
        },
        *({"role": "tool", "tool_name": "get_weather", "content": "#sunny"} for _ in arguments),
    ]  # fmt: skip
    both: dict[str, dict[str, Any]] = {
        "plain": {"said": "#plain"},
        "thoughts": {"said": "#think"},
        "tools": {"said": "#weather", "tools": True},
        "thoughtful_tools": {"said": "#thoughtful", "tools": True},
        "interleaved": {"said": "#interleaved"},
        "schema": {"said": "#json", "schema": True},
        "json": {"said": "#json", "format": "json"},
        "logprobs": {"said": "#quote", "logprobs": True, "top_logprobs": 1},
        "stop": {"said": "#plain", "stop": ["thank"]},
        "length": {"said": "#long", "max_tokens": 5},
        "empty": {"said": "#empty"},
        "failed": {"said": "#fail"},
        # Cut in the arguments of the second call, and before the name of a call is known.
        "cut_call": {"said": "#thoughtful", "tools": True, "max_tokens": 125},
        "cut_name": {"said": "#weather", "tools": True, "max_tokens": 16},
        "generate_plain": {"said": "#plain", "is_chat": False},
        "generate_thoughts": {"said": "#think", "is_chat": False, "system": "Be brief."},
        "generate_raw": {"said": "A raw #plain", "is_chat": False, "raw": True},
        "generate_schema": {"said": "#json", "schema": True, "is_chat": False},
        "generate_length": {"said": "#long", "max_tokens": 5, "is_chat": False},
        "generate_failed": {"said": "#fail", "is_chat": False},
    }
    bodies = {name: _asked_of_ollama(**options) for name, options in both.items()} | {"second_turn": second}
    for name, body in bodies.items():
        yield f"ollama_{name}", body
        yield f"ollama_{name}_stream", {key: value for key, value in body.items() if key != "stream"}
    ignored = _asked_of_ollama("#plain", keep_alive="5m", think="high")
    ignored["options"] |= {"num_ctx": 4096, "num_gpu": 1, "mirostat": 2}
    yield "ollama_ignored", ignored
    yield "ollama_load", {"model": "tiny", "messages": []}
    yield "ollama_generate_load", {"model": "tiny"}
    yield "ollama_unknown_field", _asked_of_ollama("#plain", frobnicate=1)
    yield "ollama_too_long", _asked_of_ollama("Ω" * 5000)
    yield "ollama_generate_unload", {"model": "tiny", "keep_alive": 0}
    yield "ollama_embed", {"model": "tiny", "input": ["How are you?", "Well."], "dimensions": 4}
    yield (
        "ollama_embed_one",
        {"model": "tiny:latest", "input": "How are you?", "dimensions": 4, "truncate": True},
    )
    yield "ollama_embed_none", {"model": "tiny", "input": "", "keep_alive": "5m"}
    yield "ollama_embed_too_long", {"model": "tiny", "input": ["Hi", "Ω" * 5000], "truncate": False}
    yield "ollama_embeddings", {"model": "tiny", "prompt": "How are you?", "options": {"num_ctx": 4096}}
    yield "ollama_embeddings_none", {"model": "tiny"}
    yield "ollama_generate_template", _asked_of_ollama("#plain", is_chat=False, template="{{ .Prompt }}")


def _path(name: str) -> str:
    if name.startswith("ollama_"):
        route = name.split("_")[1]
        return f"/api/{route if route in ('generate', 'embed', 'embeddings') else 'chat'}"
    return PATHS[name.partition("_")[0]]


def _cases() -> Iterator[tuple[str, dict[str, Any]]]:
    both: dict[str, dict[str, Any]] = {
        "plain": {"said": "#plain"},
        "thoughts": {"said": "#think"},
        "tools": {"said": "#weather", "tools": True},
        "thoughtful_tools": {"said": "#thoughtful", "tools": True},
        "schema": {"said": "#json", "schema": True},
        "logprobs": {"said": "#quote", "logprobs": True},
        "stop": {"said": "#plain", "stop": ["thank"]},
        "length": {"said": "#long", "max_tokens": 5},
        "empty": {"said": "#empty"},
        "ignored": {"said": "#plain", "user": "someone"},
        "failed": {"said": "#fail"},
    }
    for dialect in PATHS:
        for name, options in both.items():
            cannot = {
                "completions": ("thoughts", "tools", "thoughtful_tools", "schema"),
                "responses": ("stop",),
                "messages": ("logprobs", "ignored"),
            }
            if name in cannot.get(dialect, ()):
                continue
            asked = _asked(dialect, **options)
            yield f"{dialect}_{name}", asked
            yield f"{dialect}_{name}_stream", asked | {"stream": True}
        if dialect != "completions":
            yield f"{dialect}_second_turn", _second_turn(dialect)
            yield f"{dialect}_second_turn_stream", _second_turn(dialect) | {"stream": True}
        yield f"{dialect}_unknown_field", _asked(dialect, "#plain", frobnicate=1)
        yield f"{dialect}_too_long", _asked(dialect, "Ω" * 5000)
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    for dialect in ("chat", "completions"):
        yield f"{dialect}_usage_stream", _asked(dialect, "#think", **usage)
        yield f"{dialect}_several", _asked(dialect, "#plain", n=2)
        yield f"{dialect}_several_stream", _asked(dialect, "#plain", n=2, **usage)
    yield (
        "chat_one_call_stream",
        _asked("chat", "#weather", tools=True, parallel_tool_calls=False, stream=True),
    )
    functions = {"functions": [TOOLS["chat"][0]["function"]]}
    yield "chat_functions", _asked("chat", "#weather", **functions)
    yield "chat_functions_stream", _asked("chat", "#weather", **functions, stream=True)
    always = {"include_usage": True, "continuous_usage_stats": True}
    yield "chat_usage_always_stream", _asked("chat", "#plain", stream=True, stream_options=always)
    yield "chat_idle_fields", _asked("chat", "#plain", cache_prompt=True, stop_token_ids=None, min_tokens=2)
    yield "responses_too_long_stream", _asked("responses", "Ω" * 5000, stream=True)
    yield "chat_progress_stream", _asked("chat", "#plain", return_progress=True, stream=True)
    yield "completions_echo", _asked("completions", "The quick #plain", echo=True, logprobs=True)
    for dialect in ("chat", "responses", "messages"):
        for name, asked in {
            "interleaved": _asked(dialect, "#interleaved"),
            # Cut in the arguments of the second call.
            "cut_call": _asked(dialect, "#thoughtful", tools=True, max_tokens=125),
            # Cut before the name of a call is known.
            "cut_name": _asked(dialect, "#weather", tools=True, max_tokens=16),
        }.items():
            yield f"{dialect}_{name}", asked
            yield f"{dialect}_{name}_stream", asked | {"stream": True}
    yield "responses_state", _asked("responses", "#plain", previous_response_id="resp_1")


CASES = dict([*_cases(), *_cases_of_ollama()])


def record(client: httpx.Client, name: str) -> Transcript:
    """Send the request, and record the answer."""
    request = {"method": "POST", "path": _path(name), "body": CASES[name]}
    answer = client.request(request["method"], request["path"], json=request["body"])
    headers = {header: answer.headers[header] for header in HEADERS if header in answer.headers}
    made: Transcript = {"request": request, "status": answer.status_code, "headers": headers}
    if headers["content-type"].startswith("text/event-stream"):
        made["events"] = list(read_events(answer.text))
    elif headers["content-type"] == "application/x-ndjson":
        made["events"] = [{"event": None, "data": json.loads(line)} for line in read_lines(answer.text)]
    else:
        made["body"] = answer.json()
    return made | _Normal().of({key: made[key] for key in ("events", "body") if key in made})


def read_events(text: str) -> Iterator[dict[str, Any]]:
    """Parse the events of a stream strictly: each has at most a name, one line of data, and an empty line."""
    assert text.endswith("\n\n")
    for block in text[:-2].split("\n\n"):
        lines = block.split("\n")
        if lines == [": keep-alive"]:
            continue
        event = lines.pop(0).removeprefix("event: ") if lines[0].startswith("event: ") else None
        assert len(lines) == 1, block
        assert lines[0].startswith("data: "), block
        data = lines[0].removeprefix("data: ")
        yield {"event": event, "data": data if data == "[DONE]" else json.loads(data)}


def read_lines(text: str) -> list[str]:
    """The lines of a stream of JSON lines: each has an end, and none is empty."""
    assert text.endswith("\n")
    lines = text[:-1].split("\n")
    assert all(lines)
    return lines


_TIMES = ("created", "created_at", "total_duration", "prompt_eval_duration", "eval_duration")


class _Normal:
    """Numbers ids in order of appearance, and sets times to zero."""

    def __init__(self) -> None:
        self._ids: dict[str, str] = {}

    def of(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: _zero(part) if key in _TIMES else self.of(part) for key, part in value.items()}
        if isinstance(value, list):
            return [self.of(part) for part in value]
        if isinstance(value, float):
            return round(value, 4)
        if isinstance(value, str) and (found := _ID.fullmatch(value)):
            return self._ids.setdefault(value, f"{found[1]}{len(self._ids)}")
        return value


def _zero(time: float | str) -> int | str:
    return "1970-01-01T00:00:00.000000Z" if isinstance(time, str) else 0


def _written(transcript: Transcript) -> str:
    """JSON with one line for each part and one for each event."""
    parts = []
    for key, part in transcript.items():
        if key == "events":
            lines = ",\n".join(f"  {json.dumps(event, ensure_ascii=False)}" for event in part)
            parts.append(f' "events": [\n{lines}\n ]')
        else:
            parts.append(f" {json.dumps(key)}: {json.dumps(part, ensure_ascii=False)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def load(name: str) -> Transcript:
    made: Transcript = json.loads((FOLDER / f"{name}.json").read_text())
    return made


@contextmanager
def own_server() -> Iterator[httpx.Client]:
    """Run a fresh server, so that prefix-cache hits are always the same."""
    from argosy.guard.keys import KeyRing
    from argosy.open.engine import Engine
    from argosy.serve.app import make_app
    from tests.serve.conftest import only, serving, start
    from tests.serve.speaking import speaking, write_speaking_model

    with tempfile.TemporaryDirectory() as folder, speaking():
        model = write_speaking_model(Path(folder) / "model")
        with (
            Engine.open(model, memory="2GiB", threads=2, grammars=True) as engine,
            serving(engine) as service,
        ):
            for url in start(make_app(only(service), KeyRing(None), block_tokens=16, max_sequences=8)):
                with httpx.Client(base_url=url, timeout=60) as client:
                    yield client


def main() -> None:
    from tests.serve.wire_rules import require_rules

    FOLDER.mkdir(exist_ok=True)
    with own_server() as client:
        made = {name: record(client, name) for name in CASES}
    for name, transcript in made.items():
        require_rules(name, transcript, made)
    for old in FOLDER.glob("*.json"):
        old.unlink()
    for name, transcript in made.items():
        (FOLDER / f"{name}.json").write_text(_written(transcript), encoding="utf-8")
    print(f"{len(made)} transcripts")


if __name__ == "__main__":
    main()
