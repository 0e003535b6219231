"""Fields that several dialects have, and the bounds of every number in a request: one table.

Elsewhere: what only one dialect has is in its file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

MAX_TOKENS = 1 << 20
MAX_ANSWERS = 8
Tokens = Annotated[int, Field(ge=1, le=MAX_TOKENS, strict=True)]
Flag = Annotated[bool, Field(strict=True)]  # not 1, not "yes"
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


class Strict(BaseModel):
    """Unknown fields are refused by name."""

    model_config = ConfigDict(extra="forbid")


class StreamOptions(Strict):
    include_usage: Flag = False
    include_obfuscation: Flag | None = None


class Sampling(Strict):
    """How tokens are chosen, as all OpenAI-like dialects spell it."""

    model: str | None = Field(None, max_length=256)
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    repetition_penalty: Repetition | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    logit_bias: dict[str, Bias] | None = Field(None, max_length=1024)
    n: NumAnswers | None = None
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    timings: Flag | None = None
    return_progress: Flag | None = None
    user: str | None = Field(None, max_length=512)

    def sampling(self) -> dict[str, Any]:
        """Arguments of `SamplingParams`, those that were given; a temperature that was not is 1, as clients expect."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
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


def _biases(given: Mapping[str, float]) -> dict[int, float]:
    from argosy.errors import UsageError

    biases = {}
    for name, bias in given.items():
        if not (name.isascii() and name.isdecimal() and len(name) < 10):
            raise UsageError("logit_bias: keys are token ids", param="logit_bias")
        biases[int(name)] = bias
    return biases
