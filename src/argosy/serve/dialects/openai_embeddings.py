"""OpenAI's Embeddings: POST /v1/embeddings.

Elsewhere: `serve/answer/embedding.py` computes the vectors; the pooling is `engine/pooling.py`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Discriminator, Field, Tag
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from argosy.serve.answer.embedding import MOST_TEXTS, Embedded, embed, json_items, json_numbers
from argosy.serve.answer.fields import (
    MAX_TOKENS,
    Dimensions,
    Name,
    NoEffect,
    SomeText,
    Strict,
    TokenId,
    few,
    ignored_header,
    without_effect,
)
from argosy.serve.answer.service import service_of
from argosy.serve.http.caller import Caller
from argosy.serve.http.closed import Closed
from argosy.serve.http.route import post_route
from argosy.serve.http.streams import answer_whole

Ids = Annotated[list[TokenId], few(MAX_TOKENS, at_least=1)]


def _kind(given: object) -> str:
    """Which kind of `input` this is, so that an error is about that kind."""
    if not isinstance(given, list):
        return "text"
    first = given[0] if given else ""
    return "texts" if isinstance(first, str) else "lists of ids" if isinstance(first, list) else "ids"


class EmbeddingsBody(Strict):
    """Texts to embed, as they are: an instruction that the model expects is part of the text."""

    input: Annotated[
        Annotated[SomeText, Tag("text")]
        | Annotated[Ids, Tag("ids")]
        | Annotated[list[SomeText], few(MOST_TEXTS, at_least=1), Tag("texts")]
        | Annotated[list[Ids], few(MOST_TEXTS, at_least=1), Tag("lists of ids")],
        Discriminator(_kind),
    ] = Field(examples=["Hello"])
    model: str | None = Field(None, max_length=256)
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Dimensions | None = None
    user: NoEffect[Name] = None

    @property
    def person(self) -> str | None:
        return self.user or None

    @property
    def texts(self) -> Sequence[str | Sequence[int]]:
        if isinstance(self.input, str) or isinstance(self.input[0], int):
            return [self.input]
        return self.input


class Embedding(Closed):
    """A vector of length 1: numbers, or the base64 of its values as little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Closed):
    prompt_tokens: int
    total_tokens: int


class Embeddings(Closed):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


async def embeddings(body: EmbeddingsBody, request: Request) -> Response:
    """Embed texts."""
    service = service_of(request)
    caller: Caller = request.state.caller
    headers = ignored_header(without_effect(body))

    async def answer() -> Response:
        made = await embed(service, caller, body.texts, dimensions=body.dimensions)
        written = _written(made, service.model.id, is_base64=body.encoding_format == "base64")
        return StreamingResponse(written, media_type="application/json", headers=headers)

    return await answer_whole(answer(), caller, dialect="openai", headers=headers)


async def _written(made: Embedded, model: str, *, is_base64: bool) -> AsyncIterator[bytes]:
    """The JSON of `Embeddings`, piece by piece."""
    shown = _base64 if is_base64 else json_numbers
    yield b'{"object":"list","data":['
    for piece in json_items(
        made.vectors,
        lambda at, vector: f'{{"object":"embedding","index":{at},"embedding":{shown(vector)}}}',
    ):
        yield piece
    usage: EmbeddingUsage = {"prompt_tokens": made.num_tokens, "total_tokens": made.num_tokens}
    yield f'],"model":{json.dumps(model)},"usage":{json.dumps(usage)}}}'.encode()


def _base64(vector: NDArray[np.float32]) -> str:
    return '"' + base64.b64encode(vector.astype("<f4").tobytes()).decode() + '"'


ROUTES = (
    post_route("/v1/embeddings", embeddings, Embeddings, screens="texts"),
)  # fmt: skip
