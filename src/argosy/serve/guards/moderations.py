"""OpenAI's moderation endpoint: POST /v1/moderations, answered by the checks of the key's policy.

The checks are those that the policy applies to what a client sends; a model's tokens count for the key. Categories
are OpenAI's where they fit; a check may add its own. A category that no check knows is not flagged and scores 0,
which says nothing about the text.

Elsewhere: checks run in `serve/guards/checks.py`; docs/guides/responsible-use.md says what they can find.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Literal

from pydantic import Field
from starlette.requests import Request

from argosy.guard.verdict import CATEGORIES, Verdict
from argosy.serve.answer.fields import Strict, Text, few
from argosy.serve.guards.screening import screening_of
from argosy.serve.http.caller import Caller
from argosy.serve.http.closed import Closed
from argosy.serve.http.failures import Refused

_MOST_INPUTS = 256
# prefixes of the names that OpenAI's client sends
_OPENAI_PREFIXES = ("omni-moderation-", "text-moderation-")


class TextInput(Strict):
    type: Literal["text"]
    text: Text


class ModerationBody(Strict):
    """Texts to judge. Pictures are not judged here."""

    input: (
        Text
        | Annotated[list[Text], few(_MOST_INPUTS, at_least=1)]
        | Annotated[list[TextInput], few(_MOST_INPUTS, at_least=1)]
    ) = Field(examples=["Hello"])
    model: str | None = Field(
        None,
        max_length=256,
        description="The name of a check; without one, or with one of OpenAI's names: all.",
    )

    @property
    def needs_model(self) -> bool:
        return False

    @property
    def texts(self) -> list[str]:
        given = [self.input] if isinstance(self.input, str) else self.input
        return [one if isinstance(one, str) else one.text for one in given]


class Judged(Closed):
    flagged: bool
    categories: dict[str, bool]
    category_scores: dict[str, float]
    category_applied_input_types: dict[str, list[str]]


class Moderated(Closed):
    id: str
    model: str
    results: list[Judged]


async def moderations(body: ModerationBody, request: Request) -> Moderated:
    """Judge texts by the checks of the server's policy."""
    caller: Caller = request.state.caller
    screening = screening_of(caller)
    names = [] if screening is None else [check.name for check in screening.policy.input]
    if screening is None or not names:
        raise Refused(
            404,
            "this server judges no texts",
            hint="start it with `--policy FILE`, with checks of the input in the policy of the key",
        )
    name = None if body.model is None or body.model.startswith(_OPENAI_PREFIXES) else body.model
    if name is not None and name not in names:
        raise Refused(
            404,
            f"there is no such check; the policy has: {', '.join(names)}",
            param="model",
            code="model_not_found",
        )

    def count(model: str, num_prompt: int, num_new: int) -> None:
        caller.answered_by(model)
        caller.count(prompt=num_prompt, new=num_new)

    results = [_judged(await screening.moderate(text, name, count)) for text in body.texts]
    return {"id": "modr-" + secrets.token_hex(12), "model": name or "+".join(names), "results": results}


def _judged(verdict: Verdict) -> Judged:
    scores = {**dict.fromkeys(CATEGORIES, 0.0), **verdict.scores}
    found = verdict.categories
    return {
        "flagged": verdict.is_flagged,
        "categories": {name: name in found for name in scores},
        "category_scores": scores,
        "category_applied_input_types": {name: ["text"] for name in scores},
    }
