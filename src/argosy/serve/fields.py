"""Fields that several dialects have, and the bounds of every number in a request: one table.

The models that check a request are the ones that `/openapi.json` shows, and so are the types of answers.

Elsewhere: what only one dialect has is in its file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, with_config
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from argosy.config import Grammar
from argosy.prompt.formats.lark import without_annotations

MAX_TOKENS = 1 << 20
MAX_ANSWERS = 8
LEAST_LOGPROB = -9999.0  # JSON has no number for the logarithm of nothing
Tokens = Annotated[int, Field(ge=1, le=MAX_TOKENS, strict=True)]
Flag = Annotated[bool, Field(strict=True)]  # not 1, not "yes"


def _only_false(value: object) -> object:
    if value is not False:  # 0 is equal to it
        raise PydanticCustomError("literal_error", "Input should be false")
    return value


NoFlag = Annotated[Literal[False], BeforeValidator(_only_false)]
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False, strict=True)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False, strict=True)]
MinP = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, strict=True)]
TopK = Annotated[int, Field(ge=-1, le=MAX_TOKENS, strict=True)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False, strict=True)]
Repetition = Annotated[float, Field(gt=0, le=10, allow_inf_nan=False, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=1 << 63, strict=True)]
NumAnswers = Annotated[int, Field(ge=1, le=MAX_ANSWERS, strict=True)]
NumBest = Annotated[int, Field(ge=0, le=20, strict=True)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False, strict=True)]
Stop = Annotated[str, Field(min_length=1, max_length=1024)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31, strict=True)]
# Of a chat template's variable: an effort, a switch, a number of tokens.
Setting = (
    Flag | Annotated[int, Field(ge=0, le=MAX_TOKENS, strict=True)] | Annotated[str, Field(max_length=64)]
)
Short = Annotated[str, Field(min_length=1, max_length=256)]  # a name, an id
Text = Annotated[str, Field(max_length=4 << 20)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
ToolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
Messages = Field(min_length=1, max_length=4096)
Tools = Field(max_length=512)

closed = with_config(ConfigDict(extra="forbid"))  # of an answer: nothing but what its type says


class Strict(BaseModel):
    """Unknown fields are refused by name."""

    model_config = ConfigDict(extra="forbid")


class Nullable(BaseModel):
    """Unknown fields are refused, unless they are null: clients send whole objects of theirs."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, None]

    def sent(self) -> dict[str, Any]:
        """As the client sent it, nulls left out."""
        return {
            name: value for name, value in self.model_dump(exclude_unset=True).items() if value is not None
        }


class Lenient(BaseModel):
    """Unknown fields have no effect, and are listed as such."""

    model_config = ConfigDict(extra="allow")


class ObjectSchema(Lenient):
    """A JSON schema of an object."""

    type: Literal["object"] = "object"
    properties: dict[str, Any] | None = None


class FreeForm(Strict):
    """An answer in any form, or any JSON object."""

    type: Literal["text", "json_object"]

    def asked(self) -> Grammar | None:
        """As `ChatRequest.form` has it."""
        return Grammar(kind="json_object") if self.type == "json_object" else None


def schema_form(schema: object) -> Grammar:
    """JSON of `schema`."""
    return Grammar(kind="json_schema", text=json.dumps(without_annotations(schema)))


def ignored_header(names: Iterable[str]) -> dict[str, str]:
    """The header that lists what was accepted and has no effect; what a client wrote only where it is a plain name."""
    safe = [name for name in dict.fromkeys(names) if name.isascii() and name.replace(".", "").isidentifier()]
    return {"x-ignored-params": ", ".join(safe[:32])} if safe else {}


def strays(where: str, parts: Iterable[object]) -> list[str]:
    """Names of unknown fields in `parts`."""
    return sorted({
        f"{where}.{name}" for part in parts if isinstance(part, Lenient) for name in part.model_extra or ()
        if len(name) <= 64
    })  # fmt: skip


@closed
class CachedTokens(TypedDict):
    cached_tokens: int


@closed
class ThoughtTokens(TypedDict):
    reasoning_tokens: int


@closed
class Timings(TypedDict):
    """The ledger of an answer; null: it cannot be said."""

    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    wall_s: float
    time_to_first_token_s: float | None
    prefill_tok_per_s: float | None
    decode_tok_per_s: float | None
    lookups: int
    hits: int
    hit_rate: float | None
    bytes_read: int
    peak_bytes: int
    parts: dict[str, float]


@closed
class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


@closed
class ReadOfPrompt(TypedDict):
    """How far a prompt is computed, in the words of llama.cpp."""

    processed: int
    total: int
    cache: int


class StreamOptions(Strict):
    include_usage: Flag = False
    include_obfuscation: Flag | None = None


class Sampling(Strict):
    """How tokens are chosen, in every dialect: what its own clients do not know of, others send all the same."""

    model: str | None = Field(None, max_length=256)
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    repetition_penalty: Repetition | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Seed | None = None
    logit_bias: dict[str, Bias] | None = Field(None, max_length=1024)
    stream: Flag | None = None

    IGNORED: ClassVar[tuple[str, ...]] = ()  # accepted and without effect

    def ignored(self) -> list[str]:
        """What was given and has no effect."""
        return [name for name in self.IGNORED if getattr(self, name) is not None]

    def sampling(self, stop: Sequence[str] = ()) -> dict[str, Any]:
        """Arguments of `SamplingParams`, those that were given; a temperature that was not is 1, as clients expect."""
        given: dict[str, Any] = {
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(0, self.top_k),
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "seed": self.seed,
            "stop": tuple(stop) or None,
            "logit_bias": _biases(self.logit_bias or {}) or None,
        }
        return {name: value for name, value in given.items() if value is not None}


class OpenAISampling(Sampling):
    """What Chat Completions and Completions have beside that."""

    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    n: NumAnswers | None = None
    stream_options: StreamOptions | None = None
    timings: Flag | None = None
    return_progress: Flag | None = None
    user: str | None = Field(None, max_length=512)

    @property
    def stops(self) -> Sequence[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


def _biases(given: Mapping[str, float]) -> dict[int, float]:
    from argosy.errors import UsageError

    biases = {}
    for name, bias in given.items():
        if not (name.isascii() and name.isdecimal() and len(name) < 10):
            raise UsageError("logit_bias: keys are token ids", param="logit_bias")
        biases[int(name)] = bias
    return biases
