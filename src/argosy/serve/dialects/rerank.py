"""Rerank documents, in the dialect of Jina and Cohere: POST /v1/rerank and /rerank.

A document's score is the probability of yes, given that the model answers yes or no. It follows from the
log-probabilities of the two words, each a single token after the same prompt. The second run reuses the keys and
values of the first.

Elsewhere: the prompt is `prompt/reranking.py`; `serve/answer/side_by_side.py` runs the parts.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from argosy.config import SamplingParams
from argosy.engine.sequence import Result
from argosy.prompt.reranking import Reranking
from argosy.serve.answer.check import check_of
from argosy.serve.answer.fields import WHOLE, Flag, Strict, Text, few
from argosy.serve.answer.service import Service, service_of
from argosy.serve.answer.side_by_side import Deliver, run_parts
from argosy.serve.http.caller import Caller
from argosy.serve.http.closed import Closed
from argosy.serve.http.failures import Refused
from argosy.serve.http.route import post_route
from argosy.serve.http.streams import answer_whole

_MOST_DOCUMENTS = 1024
_CERTAIN = 100.0  # a bias that outweighs any difference of logits


class Document(Strict):
    text: Text


class RerankBody(Strict):
    """Documents to rank by how well they answer a query."""

    query: Annotated[Text, Field(min_length=1)] = Field(examples=["What is a mixture of experts?"])
    documents: Annotated[list[Text | Document], few(_MOST_DOCUMENTS, at_least=1)]
    model: str | None = Field(None, max_length=256)
    top_n: Annotated[int, Field(ge=1, le=1 << 20, strict=True), WHOLE] | None = None
    return_documents: Flag | None = None

    @property
    def texts(self) -> list[str]:
        return [one if isinstance(one, str) else one.text for one in self.documents]


class RankedText(Closed):
    text: str


class Ranked(Closed):
    index: int
    relevance_score: float
    document: NotRequired[RankedText]


class RerankUsage(Closed):
    prompt_tokens: int
    total_tokens: int


class Reranked(Closed):
    """The documents, the best first."""

    id: str
    object: Literal["list"]
    model: str
    results: list[Ranked]
    usage: RerankUsage


async def rerank(body: RerankBody, request: Request) -> Response:
    """Rank documents by how well they answer a query."""
    return await answer_whole(_ranked(body, request), request.state.caller, dialect="openai")


async def _ranked(body: RerankBody, request: Request) -> Response:
    service = service_of(request)
    caller: Caller = request.state.caller
    texts = body.texts
    scores, num_tokens = await _scores(service, caller, body.query, texts)
    best = sorted(range(len(scores)), key=lambda index: (-scores[index], index))[: body.top_n]
    results: list[Ranked] = []
    for index in best:
        ranked: Ranked = {"index": index, "relevance_score": scores[index]}
        results.append({**ranked, "document": {"text": texts[index]}} if body.return_documents else ranked)
    made: Reranked = {
        "id": "rerank-" + secrets.token_hex(16), "object": "list", "model": service.model.id, "results": results,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }  # fmt: skip
    return JSONResponse(made)


async def _scores(
    service: Service, caller: Caller, query: str, documents: Sequence[str]
) -> tuple[list[float], int]:
    """The probability of yes for each document, and the tokens of all prompts."""
    reranking = _require(service.reranking)
    query, *documents = map(str, await check_of(caller).passed([query, *documents], service, caller))
    # For each document, the log-probabilities of yes and of no.
    found = [[0.0, 0.0] for _ in documents]
    words = (reranking.yes_id, reranking.no_id)
    num_tokens = 0

    def submit(number: int, deliver: Deliver) -> Any:
        document, word = divmod(number, len(words))
        params = SamplingParams(max_tokens=1, logprobs=0, logit_bias={words[word]: _CERTAIN})
        ids = reranking.prompt(query, documents[document])
        prompt = service.prompts.build(ids)
        return service.loop.submit(
            prompt, params, deliver, tenant=caller.tenant, name=caller.request_id, adapter=service.adapter
        )

    def take(number: int, result: Result) -> None:
        nonlocal num_tokens
        document, word = divmod(number, len(words))
        assert result.logprobs is not None
        found[document][word] = result.logprobs[0].logprob
        num_tokens += result.usage["prompt_tokens"] if word == 0 else 0

    def place(number: int) -> str:
        return f"documents.{number // len(words)}"

    longest = len(query) + max(map(len, documents))
    await run_parts(service, caller, len(words) * len(documents), longest, submit, take, param=place)
    return [1.0 / (1.0 + math.exp(min(no - yes, 700.0))) for yes, no in found], num_tokens


def _require(reranking: Reranking | None) -> Reranking:
    if reranking is None:
        raise Refused(
            404,
            "this server does not rerank",
            hint="start it with the form of the model's prompt: `argosy serve MODEL --rerank qwen3`",
        )
    return reranking


ROUTES = (
    post_route("/v1/rerank", rerank, Reranked, screens="texts", refusals=("404",)),
    post_route("/rerank", rerank, Reranked, screens="texts", refusals=("404",)),
)  # fmt: skip
