"""Tell people that a machine answers them and how the server treats their texts: GET /v1/engine/transparency.

Every answer from a model also carries the header `gate.GENERATED`, and the page says the same in words.

Elsewhere: the settings are `run.ServerSettings`; retention is `guard/stores.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from starlette.requests import Request

from argosy.guard.audit import AuditSettings
from argosy.serve.guards.guarding import Guarding
from argosy.serve.http.caller import Caller
from argosy.serve.http.closed import Closed
from argosy.serve.models.models import models_of

NOTICE = "Answers of this server are written by AI models, not by people. They may be wrong."


@dataclass(frozen=True, slots=True, kw_only=True)
class Practice:
    """How a server treats texts.

    has_watermark: sampled text carries a watermark.
    responses_s: how long unused responses are kept in memory; None: they are not kept.
    prefix_files_s: how long keys and values of prompts are kept in files; None: they are not kept.
    audit: None if requests are not recorded.
    """

    has_watermark: bool = False
    responses_s: float | None = None
    prefix_files_s: float | None = None
    audit: AuditSettings | None = None


class WatermarkPractice(Closed):
    """Whether answers to this key carry a watermark, by what method, and where they do not."""

    is_on: bool
    method: Literal["tournament sampling (SynthID-Text)"]
    not_marked: list[str]


class AuditPractice(Closed):
    """How long the audit keeps envelopes and contents, in seconds; null: envelopes forever, contents not at all."""

    keeps_envelopes_s: float | None
    keeps_contents: bool
    keeps_contents_s: float | None


class KeptPractice(Closed):
    """How long data is kept, in seconds; null if it is not kept.

    responses_s: responses in memory, after they were last used.
    prefix_files_s: keys and values of prompts and answers in files; they reveal the text.
    """

    logs_content: bool
    responses_s: float | None
    prefix_files_s: float | None
    audit: AuditPractice | None


class ChecksPractice(Closed):
    """The content policy of the key, and whether it looks at requests and answers."""

    policy: str
    sha256: str
    checks_requests: bool
    checks_answers: bool


class Transparency(Closed):
    """Facts about a server for the people who use it.

    checks: null if nothing looks at texts.
    """

    object: Literal["transparency"]
    notice: str
    is_ai_generated: bool
    models: list[str]
    watermark: WatermarkPractice
    kept: KeptPractice
    checks: ChecksPractice | None


_NOT_MARKED = [
    "greedy answers (temperature 0)", "tool calls", "answers in a required form, such as JSON",
    "tokens without a choice", "the first tokens of an answer",
]  # fmt: skip


async def transparency(request: Request) -> Transparency:
    """Say that a machine answers, whether answers are marked, how long data is kept, and which policy holds."""
    practice: Practice = request.app.state.governance.practice
    guarding: Guarding = request.app.state.governance.guarding
    caller: Caller = request.state.caller
    in_force = guarding.in_force(caller.key)
    audit = practice.audit
    return {
        "object": "transparency", "notice": NOTICE, "is_ai_generated": True, "models": models_of(request).names,
        "watermark": {
            "is_on": practice.has_watermark and (in_force is None or in_force.policy.watermark),
            "method": "tournament sampling (SynthID-Text)", "not_marked": _NOT_MARKED,
        },
        "kept": {
            "logs_content": False, "responses_s": practice.responses_s, "prefix_files_s": practice.prefix_files_s,
            "audit": None if audit is None else {
                "keeps_envelopes_s": audit.keep_s, "keeps_contents": audit.with_content,
                "keeps_contents_s": audit.content_keep_s if audit.with_content else None,
            },
        },
        "checks": None if in_force is None else {
            "policy": in_force.policy.name, "sha256": in_force.digest,
            "checks_requests": in_force.policy.checks_requests, "checks_answers": in_force.policy.checks_answers,
        },
    }  # fmt: skip
