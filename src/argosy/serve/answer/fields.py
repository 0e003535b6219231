"""Fields common to several dialects, and the bounds of every number in a request, in one table.

    null for an optional field                       ->  treated as absent            (`Strict`, `Lenient`)
    a field that cannot change the answer            ->  accepted, and named in `x-ignored-params`    (`NoEffect`)
    an unsupported field that would change it        ->  refused by its name                          (`Strict`)

`/openapi.json` shows the same models that check requests, and the types of answers.

Elsewhere: fields of a single dialect are in its file.
"""

from __future__ import annotations

import functools
import json
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NotRequired, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    model_validator,
    with_config,
)
from pydantic_core import CoreSchema, PydanticCustomError, PydanticKnownError, core_schema
from typing_extensions import TypedDict

from argosy.config import CHOOSING, Grammar
from argosy.errors import UsageError
from argosy.prompt.formats.lark import without_annotations


class _Whole:
    """Accept 3.0 as the whole number 3: JSON has one type of number, and JSON Schema calls 3.0 an integer."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        bounded = handler(source)
        whole = core_schema.float_schema(
            strict=True, multiple_of=1, ge=-(2**63), lt=2**63, allow_inf_nan=False
        )
        number = core_schema.union_schema(  # the integer first: a float cannot hold every seed
            [core_schema.int_schema(strict=True), whole], mode="left_to_right", custom_error_type="int_type"
        )
        return core_schema.chain_schema([number, {**bounded, "strict": False}])

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return handler(core["steps"][-1])


WHOLE = _Whole()
MAX_TOKENS = 1 << 20
MAX_ANSWERS = 8
MAX_STOP_IDS = 256
Tokens = Annotated[int, Field(ge=1, le=MAX_TOKENS, strict=True), WHOLE]
NumTokens = Annotated[int, Field(ge=0, le=MAX_TOKENS, strict=True), WHOLE]
Flag = Annotated[bool, Field(strict=True)]  # not 1, not "yes"


def _only_false(value: object) -> object:
    if value is not False:  # 0 == False
        raise PydanticCustomError("literal_error", "Input should be false")
    return value


def _only_true(value: object) -> object:
    if value is not True:  # 1 == True
        raise PydanticCustomError("literal_error", "Input should be true")
    return value


NoFlag = Annotated[Literal[False], BeforeValidator(_only_false)]
YesFlag = Annotated[Literal[True], BeforeValidator(_only_true)]
Zero = Annotated[float, Field(ge=0, le=0, allow_inf_nan=False, strict=True)]
One = Annotated[float, Field(ge=1, le=1, allow_inf_nan=False, strict=True)]
Off = Annotated[float, Field(ge=-1, le=0, allow_inf_nan=False, strict=True)]
Number = Annotated[float, Field(ge=-1e9, le=1e9, allow_inf_nan=False, strict=True)]
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False, strict=True)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False, strict=True)]
MinP = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, strict=True)]
TopK = Annotated[int, Field(ge=-1, le=MAX_TOKENS, strict=True), WHOLE]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False, strict=True)]
Repetition = Annotated[float, Field(gt=0, le=10, allow_inf_nan=False, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=1 << 63, strict=True), WHOLE]

# The value for "no limit" and "random seed" in llama.cpp and its clients.
MinusOne = Annotated[int, Field(ge=-1, le=-1, strict=True), WHOLE]
TokenLimit = Tokens | MinusOne


_NO_LIMIT = 1 << 40  # more than any context


def limit_of(given: int | None) -> int | None:
    """The token limit that `max_tokens` means; None is not given, which a preset may fill in."""
    return _NO_LIMIT if given == -1 else given


NumAnswers = Annotated[int, Field(ge=1, le=MAX_ANSWERS, strict=True), WHOLE]
NumBest = Annotated[int, Field(ge=0, le=20, strict=True), WHOLE]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False, strict=True)]
_BIASES = Field(json_schema_extra={"propertyNames": {"pattern": "^[0-9]{1,9}$"}})
Stop = Annotated[str, Field(min_length=1, max_length=1024)]
Dimensions = Annotated[int, Field(ge=1, le=1 << 16, strict=True), WHOLE]  # length of an embedding
TokenId = Annotated[int, Field(ge=0, lt=1 << 31, strict=True), WHOLE]
# The value of a chat template variable: an effort, a switch, a number of tokens.
Setting = (
    Flag
    | Annotated[int, Field(ge=0, le=MAX_TOKENS, strict=True), WHOLE]
    | Annotated[str, Field(max_length=64)]
)
# A request may set the template variables that say what the model should do, but not how its prompt is written.
TemplateVariable = Literal["clear_thinking", "enable_thinking", "reasoning_effort", "thinking"]
Short = Annotated[str, Field(min_length=1, max_length=256)]  # a name, an id
Name = Annotated[str, Field(max_length=512)]
Text = Annotated[str, Field(max_length=4 << 20)]
SomeText = Annotated[Text, Field(min_length=1)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
ToolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
# Every list in a request has a bound, and validation stops at its first invalid item: a report of every item would take
# a thousand times the memory of the body. `tests/serve/test_bounds.py` finds lists and objects without a bound.
Item = TypeVar("Item")
MAX_ITEMS = 4096
MAX_FIELDS = 256  # per object with known fields; a larger object is refused as a whole
Messages = Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)
Tools = Field(max_length=512, fail_fast=True)


def _without_bound(schema: dict[str, Any]) -> None:
    """Hide a bound from fuzzers: they test one item more than each bound, and nested lists would take gigabytes."""
    schema.pop("maxItems", None)
    schema.pop("maxProperties", None)


Many = Annotated[list[Item], Field(max_length=MAX_ITEMS, fail_fast=True, json_schema_extra=_without_bound)]
# An object with the caller's own content: a schema, arguments.
FreeObject = Annotated[dict[str, Any], Field(max_length=MAX_ITEMS, json_schema_extra=_without_bound)]


def few(num_items: int, *, at_least: int = 0, **described: Any) -> Any:
    """The bound of a list with at most `num_items`."""
    return Field(min_length=at_least or None, max_length=num_items, fail_fast=True, **described)


@dataclass(frozen=True, slots=True)
class MostEntries:
    """Refuses an object with more entries before checking any of them; the OpenAPI document states the bound."""

    number: int

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        assert schema["type"] == "dict"
        return core_schema.no_info_before_validator_function(
            self._check, {**schema, "max_length": self.number}
        )

    def _check(self, value: object) -> object:
        if isinstance(value, dict) and len(value) > self.number:
            raise PydanticKnownError(
                "too_long",
                {"field_type": "Dictionary", "max_length": self.number, "actual_length": len(value)},
            )
        return value


@with_config(ConfigDict(extra="forbid"))
class Closed(TypedDict):
    """An answer, or a part of one, has exactly the fields of its type."""


class _Part(BaseModel):
    """Part of a request. Null counts as absent, except for required fields, because clients send whole objects.

    RULES: schema of dependencies between fields (`rules.py`), in addition to those of its bases.
    """

    RULES: ClassVar[tuple[dict[str, Any], ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, given: object) -> object:
        if not isinstance(given, dict):
            return given
        if len(given) > MAX_FIELDS:
            raise PydanticCustomError("too_many_fields", f"an object with at most {MAX_FIELDS} fields")
        needed = _needed_names(cls)
        return {name: value for name, value in given.items() if value is not None or name in needed}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """The schema of the fields, with null allowed for optional fields."""
        shown = handler(core)
        schema = handler.resolve_ref_schema(shown)
        for name, field in schema.get("properties", {}).items():
            if name not in schema.get("required", ()) and {"type": "null"} not in field.get("anyOf", ()):
                schema["properties"][name] = {"anyOf": [field, {"type": "null"}]}
        if schema.get("additionalProperties") is False:
            schema["additionalProperties"] = {"type": "null"}
        if rules := [rule for kind in cls.__mro__ for rule in vars(kind).get("RULES", ())]:
            schema["allOf"] = rules
        return shown


@functools.cache
def _needed_names(kind: type[BaseModel]) -> frozenset[str]:
    fields = kind.model_fields.items()
    return frozenset(field.alias or name for name, field in fields if field.is_required())


class Strict(_Part):
    """Unknown fields are refused by name."""

    model_config = ConfigDict(extra="forbid")

    @property
    def needs_model(self) -> bool:
        """Whether a request with this body needs its model in memory."""
        return True

    @property
    def person(self) -> str | None:
        """The person behind the request, as its client names them; None: it does not."""
        return None

    @property
    def persons(self) -> Collection[str]:
        """All names that may mean the person behind the request: if one of them is stopped, it is refused."""
        return () if self.person is None else (self.person,)


class Lenient(_Part):
    """Unknown fields have no effect; `x-ignored-params` lists them."""

    model_config = ConfigDict(extra="allow")


KeepAlive = Short | Annotated[float, Field(ge=-1e9, le=1e9, strict=True)]
T = TypeVar("T")
_NO_EFFECT = object()
# A field that is accepted, does not change the answer, and is named in `x-ignored-params`.
NoEffect = Annotated[T | None, Field(description="Accepted, but has no effect.", exclude=True), _NO_EFFECT]


def without_effect(given: BaseModel, where: str = "") -> Iterator[str]:
    """Names of the fields in `given` and its parts that have no effect."""
    for name, field in type(given).model_fields.items():
        value = getattr(given, name)
        if value is None:
            continue
        if _NO_EFFECT in field.metadata:
            yield where + name
            continue
        for part in value if isinstance(value, list) else (value,):
            if isinstance(part, BaseModel):
                yield from without_effect(part, f"{where}{name}.")


def names_with_effect(model: type[BaseModel]) -> list[str]:
    fields = model.model_fields.items()
    return [field.alias or name for name, field in fields if _NO_EFFECT not in field.metadata]


class Noted(Strict):
    """A message, or a part of one, that may carry annotations of clients and proxies."""

    cache_control: NoEffect[FreeObject] = None
    provider_specific_fields: NoEffect[FreeObject] = None


class ObjectSchema(Lenient):
    """The JSON schema of an object."""

    type: Literal["object"] = "object"
    properties: FreeObject | None = None


class TextForm(Strict):
    """An answer in any form."""

    type: Literal["text"]

    def asked(self) -> None:
        """The value for `ChatRequest.form`."""


class ObjectForm(Strict):
    """Any JSON object, or JSON that follows `schema`, as llama.cpp and Together take it here."""

    type: Literal["json_object"]
    schema_: FreeObject | None = Field(None, alias="schema")

    def asked(self) -> Grammar:
        """The value for `ChatRequest.form`."""
        return Grammar(kind="json_object") if self.schema_ is None else schema_form(self.schema_)


def schema_form(schema: object) -> Grammar:
    """The form of JSON that follows `schema`."""
    return Grammar(kind="json_schema", text=json.dumps(without_annotations(schema)))


def ignored_header(names: Iterable[str]) -> dict[str, str]:
    """The header that lists fields without effect; names from the client appear only if they are plain identifiers."""
    safe = [name for name in dict.fromkeys(names) if name.isascii() and name.replace(".", "").isidentifier()]
    return {"x-ignored-params": ", ".join(safe[:32])} if safe else {}


def strays(where: str, parts: Iterable[object]) -> list[str]:
    """Names of unknown fields in `parts`."""
    return sorted({
        f"{where}.{name}" for part in parts if isinstance(part, Lenient) for name in part.model_extra or ()
        if len(name) <= 64
    })  # fmt: skip


class PromptTokens(Closed):
    """Breakdown of a prompt's tokens. Counts of pictures and sounds are left out if the prompt has none."""

    cached_tokens: int
    image_tokens: NotRequired[int]
    audio_tokens: NotRequired[int]


class ThoughtTokens(Closed):
    reasoning_tokens: int


class Timings(Closed):
    """The ledger of an answer; null means unknown.

    proposed_tokens, confirmed_tokens: drafts, if the server speculates; confirmed ones are among `new_tokens`.
    won_s: seconds that drafts saved, an estimate; null if the server does not speculate.
    energy_j: joules of processors and their memory, as measured, this answer's share of its steps.
    drive_energy_j: the least and the most of the drive for it, an estimate.
    """

    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    proposed_tokens: int
    confirmed_tokens: int
    won_s: float | None
    wall_s: float
    queue_s: float | None
    time_to_first_token_s: float | None
    prefill_tok_per_s: float | None
    decode_tok_per_s: float | None
    lookups: int
    hits: int
    hit_rate: float | None
    bytes_read: int
    peak_bytes: int | None
    energy_j: float | None
    drive_energy_j: list[float] | None
    parts: dict[str, float]


class Usage(Closed):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens


class ReadOfPrompt(Closed):
    """Progress of the prefill in tokens, with llama.cpp's field names.

    While a picture, sound or group of frames is encoded, `encoded` is the share of it that is done, 0 to 1.
    """

    processed: int
    total: int
    cache: int
    encoded: NotRequired[float]


class StreamOptions(Strict):
    include_usage: Flag = False
    continuous_usage_stats: Flag = False  # with include_usage: in every chunk
    include_obfuscation: Flag | None = None


class Neutral(Strict):
    """Settings of other servers, accepted with the values that change nothing.

    SillyTavern, KoboldAI Lite, the page of llama-server and others always send all that they know. A value that would
    change the answer is refused. A setting that only adjusts another one of these may have any value.
    """

    # Truncation and the shape of the distribution.
    typical_p: NoEffect[One] = None
    typical: NoEffect[One] = None
    typ_p: NoEffect[One] = None
    tfs: NoEffect[One] = None
    tfs_z: NoEffect[One] = None
    top_a: NoEffect[Zero] = None
    top_n_sigma: NoEffect[Off] = None
    nsigma: NoEffect[Off] = None
    epsilon_cutoff: NoEffect[Zero] = None
    eta_cutoff: NoEffect[Zero] = None
    skew: NoEffect[Zero] = None
    smoothing_factor: NoEffect[Zero] = None
    smoothing_curve: NoEffect[Number] = None
    dynamic_temperature: NoEffect[NoFlag] = None
    dynatemp_range: NoEffect[Zero] = None
    dynatemp_exponent: NoEffect[Number] = None
    xtc_probability: NoEffect[Zero] = None
    xtc_threshold: NoEffect[Number] = None
    mirostat: NoEffect[Zero] = None
    mirostat_mode: NoEffect[Zero] = None
    mirostat_tau: NoEffect[Number] = None
    mirostat_eta: NoEffect[Number] = None
    # Repetition.
    dry_multiplier: NoEffect[Zero] = None
    dry_base: NoEffect[Number] = None
    dry_allowed_length: NoEffect[Number] = None
    dry_penalty_last_n: NoEffect[Number] = None
    dry_sequence_breakers: NoEffect[Name | Annotated[list[Name], few(256)]] = None
    repeat_last_n: Annotated[
        NoEffect[Annotated[int, Field(ge=-1, le=MAX_TOKENS, strict=True), WHOLE]],
        Field(
            description="Penalties count the whole prompt and answer, so with one of them only -1 is accepted."
        ),
    ] = None
    repetition_penalty_range: NoEffect[NumTokens] = None  # of text-generation-webui, where 0 means all tokens
    rep_pen_range: NoEffect[NumTokens] = None
    rep_pen_slope: NoEffect[Number] = None
    encoder_repetition_penalty: NoEffect[One] = None
    no_repeat_ngram_size: NoEffect[Zero] = None
    penalty_alpha: NoEffect[Zero] = None
    # Beams, guidance, bans, order.
    use_beam_search: NoEffect[NoFlag] = None
    num_beams: NoEffect[One] = None
    length_penalty: NoEffect[One] = None
    early_stopping: NoEffect[NoFlag] = None
    guidance_scale: NoEffect[One] = None
    negative_prompt: NoEffect[Literal[""]] = None
    ban_eos_token: NoEffect[NoFlag] = None
    custom_token_bans: NoEffect[Literal[""]] = None
    banned_tokens: NoEffect[Literal[""] | Annotated[list[Any], few(0)]] = None
    banned_strings: NoEffect[Annotated[list[Any], few(0)]] = None
    min_length: NoEffect[Zero] = None
    priority: NoEffect[Zero] = None
    lora: NoEffect[Annotated[list[Any], few(0)]] = None
    include_stop_str_in_output: NoEffect[NoFlag] = None
    do_sample: NoEffect[YesFlag] = None
    add_bos_token: NoEffect[YesFlag] = None
    spaces_between_special_tokens: NoEffect[YesFlag] = None
    grammar_string: NoEffect[Literal[""]] = None
    max_tokens_second: NoEffect[Zero] = None
    # How another server works, and what it shows of that.
    samplers: NoEffect[Short | Annotated[list[Short], few(32)]] = None
    sampler_priority: NoEffect[Annotated[list[Short], few(32)]] = None
    sampler_order: NoEffect[Annotated[list[NumTokens], few(32)]] = None
    reasoning_format: NoEffect[Literal["auto", "deepseek"]] = None
    timings_per_token: NoEffect[Flag] = None
    keep_alive: NoEffect[KeepAlive] = None
    n_keep: NoEffect[Annotated[int, Field(ge=-1, le=MAX_TOKENS, strict=True), WHOLE]] = None
    n_probs: NoEffect[Zero] = None
    temperature_last: NoEffect[Flag] = None
    truncation_length: NoEffect[NumTokens] = None  # the client has already cut its prompt to it
    num_ctx: NoEffect[NumTokens] = None
    api_type: NoEffect[Name] = None
    api_server: NoEffect[Name] = None
    legacy_api: NoEffect[NoFlag] = None
    id_slot: NoEffect[Annotated[int, Field(ge=-1, le=MAX_TOKENS, strict=True), WHOLE]] = None


class Sampling(Neutral):
    """Sampling fields, accepted in every dialect, even those that its own clients do not know."""

    model: str | None = Field(None, max_length=256)
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    repetition_penalty: Repetition | None = None
    repeat_penalty: Repetition | None = Field(None, description="llama.cpp's name for `repetition_penalty`.")
    rep_pen: Repetition | None = Field(None, description="KoboldAI's name for `repetition_penalty`.")
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Seed | MinusOne | None = None
    sampler_seed: Seed | MinusOne | None = Field(None, description="KoboldAI's name for `seed`.")
    # An empty list is an empty object of a language that cannot tell them apart.
    logit_bias: (
        Annotated[dict[str, Bias], MostEntries(1024), _BIASES] | Annotated[list[Any], few(0)] | None
    ) = None
    min_tokens: NumTokens | None = None
    stop_token_ids: Annotated[list[TokenId], few(MAX_STOP_IDS)] | None = None
    ignore_eos: Flag | None = None
    skip_special_tokens: Flag | None = None
    stream: Flag | None = None

    def ignored(self) -> list[str]:
        """Names of given fields that have no effect."""
        return list(dict.fromkeys(without_effect(self)))

    def sampling(self, stop: Sequence[str] = ()) -> dict[str, Any]:
        """The given arguments of `SamplingParams`; what is not given of `CHOOSING` is left to the model."""
        self._require_penalties_of_all()
        seed = self.one_of("seed", "sampler_seed")
        given: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(0, self.top_k),
            "min_p": self.min_p,
            "repetition_penalty": self.one_of("repetition_penalty", "repeat_penalty", "rep_pen"),
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "seed": secrets.randbits(63) if seed == -1 else seed,  # -1 is given: it goes before a preset's
            "stop": tuple(stop) or None,
            "logit_bias": _biases(self.logit_bias if isinstance(self.logit_bias, dict) else {}) or None,
            "min_tokens": self.min_tokens,
            "stop_token_ids": tuple(self.stop_token_ids or ()) or None,
            "ignore_eos": self.ignore_eos,
            "skip_special_tokens": self.skip_special_tokens,
        }
        given = {name: value for name, value in given.items() if value is not None}
        return {**given, "left_to_model": frozenset(CHOOSING) - given.keys()}

    def _require_penalties_of_all(self) -> None:
        repetition = self.one_of("repetition_penalty", "repeat_penalty", "rep_pen")
        penalties = ((repetition or 1) - 1, self.presence_penalty, self.frequency_penalty)
        ranges = {"repetition_penalty_range": 0, "rep_pen_range": 0, "repeat_last_n": -1}
        if any(getattr(self, name) == 0 for name in ("repetition_penalty_range", "rep_pen_range")):
            ranges["repeat_last_n"] = 0  # SillyTavern sends one number by all three names
        for name, all_tokens in ranges.items():
            if getattr(self, name) not in (None, -1, all_tokens) and any(penalties):
                raise UsageError(
                    f"{name}: expected {all_tokens}, because penalties count the whole prompt and answer, found "
                    f"{getattr(self, name)}",
                    param=name,
                )

    def one_of(self, *names: str) -> Any:
        """The value of a setting with several names; None: it is not given.

        Raises:
            UsageError: it is given by two names with different values.
        """
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        first, *others = [*given] or [names[0]]
        for name in others:
            if given[name] != given[first]:
                raise UsageError(
                    f"{name} and {first} are two names for one setting, and their values differ",
                    param=name,
                    hint="leave one of them out",
                )
        return given.get(first)


class ForOpenAI(Strict):
    """Fields of OpenAI's dialects that clients send and that do not change the answer here."""

    # The client's own bookkeeping, and its OpenAI account.
    user: NoEffect[Name] = None
    metadata: NoEffect[FreeObject] = None
    client_metadata: NoEffect[FreeObject] = None
    safety_identifier: NoEffect[Name] = None
    service_tier: NoEffect[Short] = None
    store: NoEffect[Flag] = None
    # Prompt caching: the server decides by itself.
    prompt_cache_key: NoEffect[Name] = None
    prompt_cache_retention: NoEffect[Short] = None
    prompt_cache_options: NoEffect[FreeObject] = None
    cache_prompt: NoEffect[Flag] = None
    cache_control: NoEffect[FreeObject] = None
    prediction: NoEffect[FreeObject] = None
    # Features of other servers besides the answer, or different ways to make it.
    provider_specific_fields: NoEffect[FreeObject] = None
    web_search_options: NoEffect[FreeObject] = None
    max_tool_calls: NoEffect[Annotated[int, Field(ge=1, le=1 << 20, strict=True), WHOLE]] = None
    verbosity: NoEffect[Short] = None
    guided_decoding_backend: NoEffect[Short] = None

    @property
    def person(self) -> str | None:
        return self.safety_identifier or self.user or None

    @property
    def persons(self) -> Collection[str]:
        # OpenAI replaced `user` by the other two.
        return [name for name in (self.safety_identifier, self.user, self.prompt_cache_key) if name]


class ThinkingSwitch(Strict):
    """The switch for thinking in the spelling of GLM, DeepSeek and Anthropic."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: NoEffect[NumTokens] = None


class Thinking(Strict):
    """Whether the model thinks before it answers, and whether its thoughts are shown, as other servers spell it."""

    thinking: Flag | ThinkingSwitch | None = None
    enable_thinking: Flag | None = None
    include_reasoning: Flag | None = None

    def switches(self) -> list[str]:
        """Names of the given fields that switch thinking on or off."""
        return [name for name in ("thinking", "enable_thinking") if getattr(self, name) is not None]

    @property
    def thinks(self) -> bool | None:
        """Whether the model should think; None if the request does not say."""
        if self.enable_thinking is not None or self.thinking is None:
            return self.enable_thinking
        if isinstance(self.thinking, bool):
            return self.thinking
        return {"enabled": True, "disabled": False, "adaptive": None}[self.thinking.type]


class OpenAISampling(ForOpenAI, Sampling):
    """Further fields common to Chat Completions and Completions."""

    stop: Stop | Annotated[list[Stop], few(16)] | None = None
    n: NumAnswers | None = None
    stream_options: StreamOptions | None = None
    timings: Flag | None = None
    return_progress: Flag | None = None
    return_token_ids: Flag | None = Field(
        None,
        description="Tell the tokens of prompt and answer, as vLLM does; not where a policy changes answers.",
    )

    def ignored(self) -> list[str]:
        names, options = super().ignored(), self.stream_options
        if options is not None and options.continuous_usage_stats and not options.include_usage:
            names.append("stream_options.continuous_usage_stats")
        return names

    @property
    def tells_usage_always(self) -> bool:
        """Whether every chunk of a stream carries the usage so far."""
        options = self.stream_options
        return options is not None and options.include_usage and options.continuous_usage_stats

    @property
    def stops(self) -> Sequence[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


def _biases(given: Mapping[str, float]) -> dict[int, float]:
    biases = {}
    for name, bias in given.items():
        if not (name.isascii() and name.isdecimal() and len(name) < 10):
            raise UsageError("logit_bias: keys must be token ids", param="logit_bias")
        biases[int(name)] = bias
    return biases
