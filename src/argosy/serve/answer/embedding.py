"""Embed the texts of a request, for every dialect that has embeddings.

The vectors are charged to the memory for requests before the first text is read. All are computed before the first
is sent, so that a refused text gets a status. They are written piece by piece, because their JSON is several times
their size.

Elsewhere: `engine/pooling.py` pools hidden states; `side_by_side.py` runs the texts; the dialects are
`serve/dialects/openai_embeddings.py` and `serve/dialects/ollama.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from argosy.engine.pooling import shortened
from argosy.engine.sequence import Result
from argosy.errors import CheckpointError, PromptTooLong, UsageError
from argosy.serve.answer.check import check_of
from argosy.serve.answer.service import Service
from argosy.serve.answer.side_by_side import Deliver, run_parts
from argosy.serve.http.caller import Caller
from argosy.serve.http.failures import Refused

MOST_TEXTS = 2048  # per request, as with OpenAI
_TEXT_BYTES = 512  # Python's objects for a running text and for its vector
_PIECE_BYTES = 64 << 10  # bytes of vectors written as JSON at a time


@dataclass(slots=True)
class Embedded:
    """The embeddings of a request.

    vectors: float32 [texts, dimensions].   num_tokens: over all texts.   cut: indices of the texts that were cut.
    """

    vectors: NDArray[np.float32]
    num_tokens: int = 0
    cut: list[int] = field(default_factory=list)

    def header(self) -> dict[str, str]:
        """The header that counts the texts embedded only in part."""
        return {"x-truncated-texts": str(len(self.cut))} if self.cut else {}


async def embed(
    service: Service,
    caller: Caller,
    texts: Sequence[str | Sequence[int]],
    *,
    dimensions: int | None = None,
    param: str = "input",
    cuts: bool = False,
) -> Embedded:
    """Embed texts or lists of token ids, each unchanged.

    Args:
        dimensions: keep only this many leading dimensions of a vector; None: all.
        param: the field with the texts, for errors.
        cuts: whether to cut a text that is longer than the context and embed its beginning.

    Raises:
        UsageError: a text is empty or too long (unless it is cut), or the model has fewer dimensions.
        Refused: the model cannot embed texts, or the vectors exceed the memory for all requests.
        Overloaded: there is currently no room for the vectors or for another text.
    """
    most = service.model.hidden_size
    size = most if dimensions is None else dimensions
    if size > most:
        raise UsageError(
            f"dimensions must be from 1 to {most} with this model, found {size}", param="dimensions"
        )
    num_bytes, share = len(texts) * (size * 4 + _TEXT_BYTES), caller.held.share
    if num_bytes > share.max_bytes:
        raise Refused(
            413,
            f"these embeddings take {num_bytes} bytes of memory, and there are {share.max_bytes} for requests",
            hint="send fewer texts in a request",
        )
    share.hold(num_bytes)
    texts = await check_of(caller).passed(texts, service, caller, cuts=cuts)
    made = Embedded(np.empty((len(texts), size), np.float32))

    def submit(number: int, deliver: Deliver) -> Any:
        text = texts[number]
        queue = partial(
            service.loop.submit_embedding,
            tenant=caller.tenant,
            name=caller.request_id,
            adapter=service.adapter,
        )
        try:
            try:
                return queue(text, deliver)
            except PromptTooLong:
                if not cuts or not isinstance(text, str):
                    raise
                start = service.prompts.start_of_text(text)
                made.cut.append(number)
                return queue(start, deliver)
        except CheckpointError as error:  # the pooling that the checkpoint declares is unknown
            raise Refused(400, error.message, hint=error.hint, param="model") from None

    def take(number: int, result: Result) -> None:
        assert result.embedding is not None
        made.vectors[number] = shortened(result.embedding, size)
        made.num_tokens += result.usage["prompt_tokens"]

    def place(number: int) -> str:
        return param if len(texts) == 1 else f"{param}.{number}"

    await run_parts(service, caller, len(texts), max(map(len, texts)), submit, take, param=place)
    return made


def json_items(
    vectors: NDArray[np.float32], item: Callable[[int, NDArray[np.float32]], str]
) -> Iterator[bytes]:
    """Yield the items of a JSON list, a few at a time.

    Args:
        vectors: float32 [texts, dimensions].
        item: writes the item for the vector with this index.
    """
    at_once = max(1, _PIECE_BYTES // (vectors.shape[1] * vectors.itemsize))
    for start in range(0, len(vectors), at_once):
        items = [item(number, vectors[number]) for number in range(start, min(start + at_once, len(vectors)))]
        yield (b"," if start else b"") + ",".join(items).encode()


def json_numbers(vector: NDArray[np.float32]) -> str:
    """Write nine digits, from which every float32 reads back exactly."""
    return "[" + ",".join(map("%.9g".__mod__, vector.tolist())) + "]"
