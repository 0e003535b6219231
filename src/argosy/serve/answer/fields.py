"""Fields common to several dialects, and the bounds of every number in a request, in one table.

    null for an optional field                       ->  treated as absent            (`Strict`, `Lenient`)
    a field that cannot change the answer            ->  accepted, and named in `x-ignored-params`    (`NoEffect`)
    an unsupported field that would change it        ->  refused by name                              (`Strict`)

`/openapi.json` shows the same models that validate requests, and the types of answers.

Elsewhere: fields of a single dialect are in that dialect's file.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, PydanticKnownError, core_schema

from argosy.config import Grammar
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
    """The token limit that `max_tokens` means; None if it is absent, for a preset to fill in."""
    return _NO_LIMIT if given == -1 else given


NumAnswers = Annotated[int, Field(ge=1, le=MAX_ANSWERS, strict=True), WHOLE]
NumBest = Annotated[int, Field(ge=0, le=20, strict=True), WHOLE]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False, strict=True)]
BIASES = Field(json_schema_extra={"propertyNames": {"pattern": "^[0-9]{1,9}$"}})
Stop = Annotated[str, Field(min_length=1, max_length=1024)]
Dimensions = Annotated[int, Field(ge=1, le=1 << 16, strict=True), WHOLE]  # the length of an embedding
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
# Every list in a request has a bound, and validation stops at the first invalid item, because a report on every
# item would take a thousand times the memory of the body. `tests/serve/test_bounds.py` finds lists and objects
# without a bound.
Item = TypeVar("Item")
MAX_ITEMS = 4096
MAX_FIELDS = 256  # per object with known fields; a larger object is refused as a whole
Messages = Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)
Tools = Field(max_length=512, fail_fast=True)


def _without_bound(schema: dict[str, Any]) -> None:
    """Hide a bound from fuzzers, which test one item beyond each bound: nested lists would take gigabytes."""
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
        """The person behind the request, if the client names one."""
        return None

    @property
    def persons(self) -> Collection[str]:
        """All names that may mean the person behind the request, which is refused if any of them is stopped."""
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
    """The names of the fields in `given` and its parts that have no effect."""
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
    """The header that lists fields without effect; a client's own names appear only if they are plain identifiers."""
    safe = [name for name in dict.fromkeys(names) if name.isascii() and name.replace(".", "").isidentifier()]
    return {"x-ignored-params": ", ".join(safe[:32])} if safe else {}


def strays(where: str, parts: Iterable[object]) -> list[str]:
    """The names of unknown fields in `parts`."""
    return sorted({
        f"{where}.{name}" for part in parts if isinstance(part, Lenient) for name in part.model_extra or ()
        if len(name) <= 64
    })  # fmt: skip
