"""What an answer has to look like, as vLLM spells it: `structured_outputs` of Chat Completions and Completions.

    {"json": schema} | {"choice": texts} | {"regex": text} | {"grammar": text}  ->  asked  ->  Grammar

An expression and a grammar need a key with the scope `grammar`: what they ask of the server is bounded, but more
than a schema asks. A choice is no more than a schema.

Elsewhere: bounds are `engine/grammar_bounds.py`; how a form goes together with thoughts and calls is `prompt/formats/`.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import Field

from argosy.config import Grammar
from argosy.engine.grammar_bounds import MAX_CALLERS_CHARACTERS, MAX_REGEX_CHARACTERS, require_plain
from argosy.errors import GrammarError, UsageError
from argosy.serve.fields import Strict, schema_form
from argosy.serve.gate import Caller

_NAME = "structured_outputs"


class StructuredOutputs(Strict):
    """Exactly one of these. `regex` and `grammar` need a key with the scope `grammar`."""

    json_: dict[str, Any] | None = Field(None, alias="json", description="JSON of this schema.")
    choice: list[Annotated[str, Field(min_length=1, max_length=1024)]] | None = Field(
        None, min_length=1, max_length=512, description="One of these texts."
    )
    regex: str | None = Field(
        None, min_length=1, max_length=MAX_REGEX_CHARACTERS,
        description="Text that this expression matches as a whole; the syntax is that of Rust's regex.",
    )  # fmt: skip
    grammar: str | None = Field(
        None, min_length=1, max_length=MAX_CALLERS_CHARACTERS,
        description="Text of this grammar: rules in Lark's syntax, one of them `start`.",
    )  # fmt: skip

    def asked(self, caller: Caller) -> Grammar:
        """As `ChatRequest.form` has it.

        Raises:
            Refused: the caller's key has no scope for it.
            UsageError: it is none of them or several, or nothing that a caller's grammar may be.
        """
        given = {name: value for name, value in self if value is not None}
        if len(given) != 1:
            raise UsageError(
                f"{_NAME} takes exactly one of json, choice, regex and grammar, and has {len(given)}",
                param=_NAME,
            )
        if self.json_ is not None:
            return schema_form(self.json_)
        if self.choice is not None:
            # A terminal, so that it is one automaton, however many they are.
            return Grammar(kind="lark", text=f"start: ONE\nONE: {' | '.join(map(_literal, self.choice))}")
        caller.require("grammar", f"{_NAME}.{next(iter(given))}")
        if self.regex is not None:
            return Grammar(kind="regex", text=self.regex)
        assert self.grammar is not None
        try:
            require_plain(self.grammar)
        except GrammarError as error:
            raise GrammarError(error.message, param=f"{_NAME}.grammar") from None
        return Grammar(kind="lark", text=self.grammar)


def form_of(given: StructuredOutputs | None, other: Grammar | None, caller: Caller) -> Grammar | None:
    """The form that a request asks for, in `structured_outputs` or in its dialect's own way.

    Raises:
        UsageError: in both. Others as `StructuredOutputs.asked`.
    """
    if given is None:
        return other
    if other is not None:
        raise UsageError(f"an answer has one form: leave out response_format, or {_NAME}", param=_NAME)
    return given.asked(caller)


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
