"""Erase the data kept for a key: DELETE /v1/engine/data/KEY.

Elsewhere: stored responses are `serve/answer/kept_items.py`; the audit is `serve/guards/audited.py`.
"""

from __future__ import annotations

from typing import Literal

from starlette.requests import Request

from argosy.guard.keys import is_key_id
from argosy.serve.governance import Governance
from argosy.serve.http.closed import Closed
from argosy.serve.http.failures import Refused
from argosy.serve.models.models import models_of


class Erasure(Closed):
    """The data that were erased for a key.

    key: its id.
    responses: stored responses and their items.
    answers: answers that were kept for replay.
    audit_contents: contents of requests in the audit; null if the server has no audit.
    """

    object: Literal["erasure"]
    key: str
    responses: int
    answers: int
    audit_contents: int | None


async def erase_data(request: Request) -> Erasure:
    """Erase the data kept for a key, by its id or name: stored responses, answers, prefixes, and contents of the
    audit.

    Its running requests end. The key itself and its counts stay; revoking the key also removes those.
    """
    state, given = request.app.state, request.path_params["key"]
    key_id = state.ring.id_of(given)
    if key_id is None and is_key_id(given):  # a revoked key, of which the audit may still have contents
        key_id = given
    if key_id is None:  # only a key's id may get into the audit
        raise Refused(404, "there is no key with this id or name", hint="name a revoked key by its id")
    found = models_of(request)
    governance: Governance = state.governance

    def erase() -> tuple[int, int, int | None]:
        return *found.erase(key_id), governance.erase(key_id)

    responses, answers, contents = await state.running.erase(key_id, erase)
    return {
        "object": "erasure", "key": key_id, "responses": responses, "answers": answers, "audit_contents": contents,
    }  # fmt: skip
