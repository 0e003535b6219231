"""The request bodies of Ollama's API.

    body  ->  messages, parameters, form  ->  ChatRequest or TextRequest

A result need not name its call: it is matched to a waiting call by id, by name or in order. Fields without effect
are accepted and named in `x-ignored-params`.

Elsewhere: answers are `ollama.py`; lists of models are `ollama_models.py`; fields shared by dialects are
`serve/answer/fields.py`.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError, PydanticKnownError

from argosy.config import Grammar, SamplingParams
from argosy.errors import UsageError
from argosy.serve.answer.embedding import MOST_TEXTS
from argosy.serve.answer.fields import (
    MAX_ITEMS,
    MAX_TOKENS,
    WHOLE,
    Dimensions,
    Effort,
    Flag,
    FreeObject,
    KeepAlive,
    Lenient,
    Many,
    MinP,
    MinusOne,
    NoEffect,
    Noted,
    NumBest,
    NumTokens,
    ObjectSchema,
    Penalty,
    Repetition,
    Seed,
    Share,
    Short,
    SomeText,
    Stop,
    Strict,
    Temperature,
    Text,
    TokenId,
    ToolName,
    Tools,
    TopK,
    few,
    limit_of,
    schema_form,
    strays,
    without_effect,
)
from argosy.serve.answer.media_parts import Data, Intake, MediaPart, Piece, content_of
from argosy.serve.answer.replaced import last_asked
from argosy.serve.answer.request import ChatRequest, TextRequest
from argosy.serve.answer.rules import any_of, given
from argosy.serve.answer.sampling_fields import Sampling

_ZERO_TIME = re.compile(r"0+(\.0*)?(ns|us|µs|ms|s|m|h)?")
_MOST_PICTURES = 256  # per message

ModelName = Annotated[str, Field(max_length=256)]


def _empty(reason: str) -> BeforeValidator:
    """Refuse any non-empty value, giving the reason."""

    def check(value: object) -> object:
        if value:
            raise PydanticCustomError("not_empty", "nothing, because {reason}", {"reason": reason})
        return value

    return BeforeValidator(check)


class Picture(MediaPart):
    """A picture: base64, without its type."""

    KIND = "picture"
    REMEDY = "send the picture itself, as base64"

    type: Literal["image"] = "image"
    base64: str

    def data(self) -> Data:
        return Data(self.base64, None)

    def drop(self) -> int:
        dropped, self.base64 = self.base64, ""
        return len(dropped)


def _as_part(value: object) -> object:
    if not isinstance(value, str):
        raise PydanticKnownError("string_type")
    return {"base64": value}


Pictures = Annotated[
    list[
        Annotated[
            Picture,
            BeforeValidator(_as_part),
            WithJsonSchema({"type": "string", "contentEncoding": "base64", "description": Picture.__doc__}),
        ]
    ],
    few(_MOST_PICTURES),
]
NoPictures = Annotated[list[Any], few(0)]


class MadeFunction(Noted):
    index: NoEffect[NumTokens] = None
    name: Short
    arguments: FreeObject | Text = Field(default_factory=dict)


class MadeCall(Noted):
    id: Short | None = None
    type: Literal["function"] = "function"
    function: MadeFunction


class SystemTurn(Noted):
    role: Literal["system"]
    content: Text = ""
    images: NoPictures | None = None


class UserTurn(Noted):
    role: Literal["user"]
    content: Text = ""
    images: Pictures | None = None


class RepliedTurn(Noted):
    role: Literal["assistant"]
    content: Text = ""
    thinking: Text | None = None
    tool_calls: Many[MadeCall] | None = None
    images: NoPictures | None = None


class ResultTurn(Noted):
    """The result of a call: of the one with the id or else the name, or else of the first that waits for a result."""

    role: Literal["tool"]
    content: Text = ""
    tool_name: Short | None = None
    name: Short | None = Field(None, description="An older name of `tool_name`.")
    tool_call_id: Short | None = None
    images: Pictures | None = None


AnyTurn = SystemTurn | UserTurn | RepliedTurn | ResultTurn


def sent(turns: Sequence[AnyTurn], intake: Intake) -> list[dict[str, Any]]:
    """Convert turns to messages; calls and their results get ids.

    Raises:
        UsageError: a result matches no call, or a picture is refused.
    """
    made: list[dict[str, Any]] = []
    waiting = _Waiting()
    asked_now = last_asked(turn.role for turn in turns)
    for at, turn in enumerate(turns):
        pictures = turn.images if isinstance(turn, UserTurn | ResultTurn) else None
        content = _content(turn.content, pictures, intake, f"messages.{at}.images", is_new=at == asked_now)
        message: dict[str, Any] = {"role": turn.role, "content": content}
        match turn:
            case RepliedTurn():
                calls = [
                    (call.id or f"call_{at}_{number}", call)
                    for number, call in enumerate(turn.tool_calls or ())
                ]
                for call_id, call in calls:
                    waiting.add(call_id, call.function.name)
                message |= {"reasoning_content": turn.thinking} if turn.thinking else {}
                message |= {"tool_calls": [_call(*one) for one in calls]} if calls else {}
            case ResultTurn():
                message["tool_call_id"] = _answered(turn, waiting, f"message {at}")
        made.append(message)
    return made


def _content(
    text: str, pictures: Sequence[Picture] | None, intake: Intake, where: str, *, is_new: bool
) -> str | list[dict[str, Any]]:
    """Pictures come before the text, as in Ollama's prompts."""
    pieces: list[Piece] = [
        intake.piece(picture, f"{where}.{number}", is_new=is_new)
        for number, picture in enumerate(pictures or ())
    ]
    return content_of([*pieces, text] if text else pieces, between="\n")


def _call(call_id: str, call: MadeCall) -> dict[str, Any]:
    function = {"name": call.function.name, "arguments": call.function.arguments}
    return {"id": call_id, "type": "function", "function": function}


class _Waiting:
    """Calls without a result, in order. Every method takes constant time."""

    def __init__(self) -> None:
        self._name_of: OrderedDict[str, str] = OrderedDict()  # by id
        self._ids_of: dict[str, deque[str]] = {}  # by name; may contain ids of calls that no longer wait

    def add(self, call_id: str, name: str) -> None:
        self._name_of[call_id] = name
        self._ids_of.setdefault(name, deque()).append(call_id)

    def take(self, call_id: str | None, name: str | None) -> str | None:
        """Take the waiting call with this id, otherwise the first with this name; return its id, or None if there
        is none.
        """
        found = call_id if call_id in self._name_of else self._first(name)
        if found is not None:
            del self._name_of[found]
        return found

    def _first(self, name: str | None) -> str | None:
        if name is None:
            return next(iter(self._name_of), None)
        ids = self._ids_of.get(name, deque())
        while ids and self._name_of.get(ids[0]) != name:
            ids.popleft()
        return ids[0] if ids else None


def _answered(turn: ResultTurn, waiting: _Waiting, where: str) -> str:
    """The id of the call to which a result belongs; the call then no longer waits."""
    name = turn.tool_name or turn.name
    found = waiting.take(turn.tool_call_id, name)
    if found is None:
        of = "" if name is None else f" of '{name}'"
        raise UsageError(
            f"{where}: a tool result, but no earlier call{of} waits for one",
            hint="send the assistant's message with its tool_calls before the results",
        )
    return found


class ToolFunction(Noted):
    name: ToolName
    description: Text | None = None
    parameters: ObjectSchema | None = None


class OllamaTool(Noted):
    type: Literal["function"] = "function"
    function: ToolFunction


class OllamaOptions(Lenient):
    """How to choose tokens, and when to stop. Any other option has no effect, and `x-ignored-params` names it."""

    num_predict: (
        Annotated[
            int,
            Field(
                ge=-2,
                le=MAX_TOKENS,
                strict=True,
                description="Most tokens of the answer; 0, -1 and -2: as many as the context holds.",
            ),
            WHOLE,
        ]
        | None
    ) = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    repeat_penalty: Repetition | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Seed | MinusOne | None = None
    stop: Stop | Annotated[list[Stop], few(64)] | None = None
    num_ctx: NoEffect[NumTokens] = None  # the server plans its context when it starts

    def params(self) -> dict[str, Any]:
        """Arguments of `SamplingParams`."""
        names = OllamaOptions.model_fields.keys() & Sampling.model_fields.keys()
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or ()
        given = Sampling(**{name: getattr(self, name) for name in names}).sampling(stops)
        limit = None if self.num_predict is None else self.num_predict if self.num_predict > 0 else -1
        return {**given, "max_tokens": limit_of(limit)}


class OllamaBody(Strict):
    """The fields that /api/chat and /api/generate share."""

    model: ModelName | None = None
    stream: Flag | None = True
    think: Flag | Effort | None = None
    format: Literal["", "json"] | FreeObject | None = Field(
        None, description="The answer is JSON, or follows this JSON schema."
    )
    options: OllamaOptions | None = None
    logprobs: Flag | None = None
    top_logprobs: NumBest | None = None
    keep_alive: Annotated[
        NoEffect[KeepAlive],
        Field(
            description="0 without a prompt or messages unloads the model, if no request uses it and the server may "
            "load it again. Otherwise accepted, but has no effect."
        ),
    ] = None
    truncate: NoEffect[Flag] = None  # a prompt that does not fit is always refused
    shift: NoEffect[Flag] = None

    @property
    @abstractmethod
    def is_empty(self) -> bool:
        """Whether the request has nothing to answer."""

    @property
    def unloads(self) -> bool:
        """Whether the request unloads the model."""
        kept = self.keep_alive
        is_zero = _ZERO_TIME.fullmatch(kept) is not None if isinstance(kept, str) else kept == 0
        return self.is_empty and is_zero

    @property
    def needs_model(self) -> bool:
        return not self.unloads

    def params(self, *, form: Grammar | None = None) -> SamplingParams:
        options = OllamaOptions() if self.options is None else self.options
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return SamplingParams(logprobs=logprobs, grammar=form, **options.params())

    def form(self) -> Grammar | None:
        """The requested form of the answer."""
        if self.format is None or self.format == "":
            return None
        return Grammar(kind="json_object") if self.format == "json" else schema_form(self.format)

    def ignored(self) -> list[str]:
        """The names of given fields and options without effect."""
        return [*dict.fromkeys(without_effect(self)), *strays("options", (self.options,))]

    def asked(self, messages: Sequence[Mapping[str, Any]], intake: Intake, **more: Any) -> ChatRequest:
        """Convert to the request to answer a conversation."""
        return ChatRequest(
            messages=messages, params=self.params(), form=self.form(), replaced=intake.replaced, ignored=self.ignored(),
            effort=self.think if isinstance(self.think, str) else None, effort_field="think",
            thinks=self.think if isinstance(self.think, bool) else None, thinks_fields=("think",), **more,
        )  # fmt: skip


class OllamaChatBody(OllamaBody):
    messages: (
        Annotated[
            list[Annotated[AnyTurn, Field(discriminator="role")]], Field(max_length=MAX_ITEMS, fail_fast=True)
        ]
        | None
    ) = Field(None, examples=[[{"role": "user", "content": "Hello"}]])
    tools: Annotated[list[OllamaTool], Tools] | None = None

    @property
    def is_empty(self) -> bool:
        return not self.messages

    def request(self, intake: Intake) -> ChatRequest:
        tools = [
            {"type": "function", "function": tool.function.model_dump(exclude_unset=True)}
            for tool in self.tools or ()
        ]
        return self.asked(sent(self.messages or (), intake), intake, tools=tools)


class GenerateBody(OllamaBody):
    RULES = (
        any_of(
            {"properties": {"raw": {"enum": [False, None]}, "suffix": {"enum": ["", None]}}},
            {"properties": {"system": {"enum": ["", None]}, "images": {"enum": [[], None]}}},
        ),
    )

    prompt: Text | None = Field(None, examples=["Once upon a time"])
    system: Text | None = None
    images: Pictures | None = None
    raw: Flag | None = None
    suffix: Text | None = Field(
        None, description="The text behind the gap that the model fills in; an empty one is ignored."
    )
    template: Annotated[str, Field(max_length=0), _empty("a request cannot bring a template")] | None = None
    context: Annotated[list[TokenId], few(0), _empty("/api/chat takes a conversation")] | None = None

    @property
    def is_empty(self) -> bool:
        return not (self.prompt or self.images or self.suffix)

    @property
    def is_text(self) -> bool:
        """Whether the prompt is a text to continue or to fill in rather than a message."""
        return bool(self.raw or self.suffix)

    def request(self, intake: Intake) -> ChatRequest | TextRequest:
        if self.is_text:
            if self.system or self.images:
                field, what = ("raw", "raw prompt") if self.raw else ("suffix", "prompt with a suffix")
                raise UsageError(f"{field}: a {what} has no place for system or images", param=field)
            idle = [] if self.think is None else ["think"]
            return TextRequest(
                prompt=self.prompt or "", params=self.params(form=self.form()), suffix=self.suffix or None,
                ignored=[*self.ignored(), *idle],
            )  # fmt: skip
        content = _content(self.prompt or "", self.images, intake, "images", is_new=True)
        first = [{"role": "system", "content": self.system}] if self.system else []
        return self.asked([*first, {"role": "user", "content": content}], intake)


class EmbedBody(Strict):
    """Texts to embed, as they are."""

    model: ModelName | None = None
    input: Text | Annotated[list[SomeText], few(MOST_TEXTS)] | None = Field(None, examples=["Hello"])
    dimensions: Dimensions | None = None
    truncate: Flag | None = Field(
        None,
        description="Unless false, of a text that does not fit the context its beginning is embedded, and "
        "`x-truncated-texts` counts such texts. With false it is refused.",
    )
    options: NoEffect[FreeObject] = None
    keep_alive: NoEffect[KeepAlive] = None

    @property
    def texts(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) and self.input else list(self.input or ())


class OldEmbedBody(Strict):
    """A text to embed, as it is."""

    model: ModelName | None = None
    prompt: Text | None = Field(
        None,
        examples=["Hello"],
        description="If it does not fit the context, its beginning is embedded; `x-truncated-texts` says so.",
    )
    options: NoEffect[FreeObject] = None
    keep_alive: NoEffect[KeepAlive] = None


class ShowBody(Strict):
    RULES = (any_of(given("model"), given("name")),)

    model: ModelName | None = Field(None, examples=["demo"])
    name: ModelName | None = Field(None, description="An older name of `model`.")
    verbose: NoEffect[Flag] = None

    @model_validator(mode="after")
    def _take_older_name(self) -> Self:
        self.model = self.name if self.model is None else self.model
        return self

    @property
    def needs_model(self) -> bool:
        return False
