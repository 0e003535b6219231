"""The guide's table of other servers' fields says which dialects take them, and the schemas agree."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from argosy.serve.admin.openapi import document
from argosy.serve.app import ROUTES

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "serving.md"
OPENAI = {
    "Chat Completions": "/v1/chat/completions",
    "Completions": "/v1/completions",
    "Responses": "/v1/responses",
}
DIALECTS = OPENAI | {"Messages": "/v1/messages", "filling in": "/infill"}
OLLAMAS = {"/api/chat", "/api/generate"}
ROWS = [
    (re.findall(r"`(\w+)", fields), dialects)
    for fields, dialects in re.findall(
        r"^\| (`.*) \| (.*) \|$",
        GUIDE.read_text(encoding="utf-8")
        .partition("\n## Fields of other servers\n")[2]
        .partition("\n## ")[0],
        flags=re.MULTILINE,
    )
]


def fields_of(path: str, described: dict[str, Any]) -> set[str]:
    def names(schema: dict[str, Any]) -> set[str]:
        if "$ref" in schema:
            return names(described["components"]["schemas"][schema["$ref"].rpartition("/")[2]])
        return set(schema["properties"])

    return names(described["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"])


@pytest.mark.parametrize(("fields", "dialects"), ROWS, ids=[row[0][0] for row in ROWS])
def test_the_named_dialects_take_a_field_and_others_do_not(fields: list[str], dialects: str) -> None:
    described = document(ROUTES, "0", base_path="")
    match dialects:
        case "all but Ollama's":
            named, others = set(DIALECTS.values()), OLLAMAS
        case "OpenAI's":
            named, others = set(OPENAI.values()), OLLAMAS
        case _:
            named = {OPENAI[one] for one in dialects.split(", ")}
            others = {*OPENAI.values(), *OLLAMAS} - named
    for field in fields:
        assert {path for path in named | others if field in fields_of(path, described)} == named, field


def test_the_table_is_there() -> None:
    assert len(ROWS) >= 5
