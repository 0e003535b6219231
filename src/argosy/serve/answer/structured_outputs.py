"""The form of an answer in vLLM's spelling: `structured_outputs` of Chat Completions and Completions.

    {"json": schema} | {"choice": texts} | {"regex": text} | {"grammar": text}  ->  asked  ->  Grammar
    guided_json | guided_choice | guided_regex | guided_grammar: older names of the same fields

A regular expression or a grammar needs a key with the scope `grammar`: its cost is bounded, but higher than that of a
schema. A choice costs no more than a schema.

Elsewhere: bounds are `engine/grammar/grammar_bounds.py`; combining a form with thoughts and tool calls is
`prompt/formats/`.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import Field

from argosy.config import Grammar
from argosy.engine.grammar.grammar_bounds import MAX_CALLERS_CHARACTERS, MAX_REGEX_CHARACTERS, require_plain
from argosy.errors import GrammarError, UsageError
from argosy.prompt.json_text import read_json
from argosy.serve.answer.fields import FreeObject, Strict, Text, few, schema_form
from argosy.serve.answer.rules import exactly_one
from argosy.serve.http.caller import Caller

_NAME = "structured_outputs"

Schema = Annotated[
    FreeObject | Text,
    Field(description="The answer is JSON that follows this schema. The schema may be given as JSON text."),
]
Choices = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=1024)]],
    few(512, at_least=1, description="The answer is one of these texts."),
]
Expression = Annotated[
    str,
    Field(
        min_length=1,
        max_length=MAX_REGEX_CHARACTERS,
        description="This regular expression matches the whole answer. The syntax is that of Rust's regex crate.",
    ),
]
Rules = Annotated[
    str,
    Field(
        min_length=1,
        max_length=MAX_CALLERS_CHARACTERS,
        description="The answer follows this grammar: rules in Lark's syntax, one of them named `start`.",
    ),
]


class StructuredOutputs(Strict):
    """Set exactly one field. `regex` and `grammar` need a key with the scope `grammar`."""

    RULES = (exactly_one("json", "choice", "regex", "grammar"),)

    json_: Schema | None = Field(None, alias="json")
    choice: Choices | None = None
    regex: Expression | None = None
    grammar: Rules | None = None


class Formed(Strict):
    """Forms that a request may ask for, in addition to those of its dialect."""

    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_choice: Choices | None = None
    guided_regex: Expression | None = None
    guided_grammar: Rules | None = None

    def form_name(self) -> str | None:
        """The name of the field that requests a form, or None.

        Raises:
            UsageError: several fields request a form.
        """
        given = [name for name in Formed.model_fields if getattr(self, name) is not None]
        if len(given) > 1:
            raise UsageError(
                f"an answer can have only one form: leave out {given[0]}, or {' and '.join(given[1:])}",
                param=given[1],
            )
        return next(iter(given), None)

    def form(self, own: Grammar | None, caller: Caller) -> Grammar | None:
        """The requested form, from these fields or from the dialect's `own` field.

        Raises:
            Refused: the caller's key lacks the scope for the form.
            UsageError: two fields request a form, or a caller may not use this grammar.
        """
        name = self.form_name()
        if name is None:
            return own
        if own is not None:
            raise UsageError(
                f"an answer can have only one form: leave out response_format or {name}", param=name
            )
        value = getattr(self, name)
        if not isinstance(value, StructuredOutputs):
            return _asked(name.removeprefix("guided_"), name, value, caller)
        given = {kind.rstrip("_"): part for kind, part in value if part is not None}
        if len(given) != 1:
            raise UsageError(
                f"{name} needs exactly one of json, choice, regex and grammar, found {len(given)}",
                param=name,
            )
        ((kind, part),) = given.items()
        return _asked(kind, f"{name}.{kind}", part, caller)


def _asked(kind: str, name: str, value: Any, caller: Caller) -> Grammar:
    """The value for `ChatRequest.form`; `name` is the name of the request's field."""
    if kind == "json":
        return schema_form(_schema(name, value))
    if kind == "choice":
        # A single terminal, so that any number of choices becomes one automaton.
        return Grammar(kind="lark", text=f"start: ONE\nONE: {' | '.join(map(_literal, value))}")
    caller.require("grammar", name)
    if kind == "regex":
        return Grammar(kind="regex", text=value)
    try:
        require_plain(value)
    except GrammarError as error:
        raise GrammarError(error.message, param=name) from None
    return Grammar(kind="lark", text=value)


def _schema(name: str, value: dict[str, Any] | str) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    try:
        read = read_json(value)
    except ValueError as error:
        raise UsageError(f"{name}: the text is not JSON: {error}", param=name) from None
    if not isinstance(read, dict):
        raise UsageError(f"{name}: expected the JSON text of an object", param=name)
    return read


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
