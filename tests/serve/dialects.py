"""The same question in each API dialect."""

from __future__ import annotations

from typing import Any

from tests.serve.speaking import WEATHER

DIALECTS = ("chat", "completions", "responses", "messages")
PATHS = {name: f"/v1/{name}" for name in DIALECTS} | {"chat": "/v1/chat/completions"}
MAX_TOKENS = dict.fromkeys(DIALECTS, "max_tokens") | {"responses": "max_output_tokens"}
TOOLS: dict[str, Any] = {
    "chat": [{"type": "function", "function": WEATHER}],
    "responses": [{"type": "function", **WEATHER}],
    "messages": [
        {
            "name": WEATHER["name"],
            "description": WEATHER["description"],
            "input_schema": WEATHER["parameters"],
        }
    ],
}


def greedy(dialect: str, said: str, max_tokens: int) -> dict[str, Any]:
    """A body that asks for the greedy answer to `said`."""
    given: dict[str, Any] = {"temperature": 0, MAX_TOKENS[dialect]: max_tokens}
    if dialect == "completions":
        given["prompt"] = said
    elif dialect == "responses":
        given["input"] = said
    else:
        given["messages"] = [{"role": "user", "content": said}]
    return given
