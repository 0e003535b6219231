"""Sampling fields that several dialects share, and other servers' settings that change nothing.

Elsewhere: the types of fields and their bounds are `fields.py`.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from argosy.config import CHOOSING
from argosy.errors import UsageError
from argosy.serve.answer.fields import (
    BIASES,
    MAX_STOP_IDS,
    MAX_TOKENS,
    WHOLE,
    Bias,
    Flag,
    FreeObject,
    KeepAlive,
    MinP,
    MinusOne,
    MostEntries,
    Name,
    NoEffect,
    NoFlag,
    NumAnswers,
    Number,
    NumTokens,
    Off,
    One,
    Penalty,
    Repetition,
    Seed,
    Share,
    Short,
    Stop,
    Strict,
    Temperature,
    TokenId,
    TopK,
    YesFlag,
    Zero,
    few,
    without_effect,
)


class StreamOptions(Strict):
    include_usage: Flag = False
    continuous_usage_stats: Flag = False  # with include_usage, report usage in every chunk
    include_obfuscation: Flag | None = None


def _no_adapters(value: object) -> object:
    if isinstance(value, list) and value:  # llama-server's, by number and with a scale of its own
        said = "no adapters here, because `model` names the adapter as MODEL:ADAPTER, with the scale it is loaded with"
        raise PydanticCustomError("adapters", said)
    return value


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
    repetition_penalty_range: NoEffect[NumTokens] = None  # text-generation-webui's, where 0 means all tokens
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
    lora: NoEffect[Annotated[list[Any], few(0), BeforeValidator(_no_adapters)]] = None
    include_stop_str_in_output: NoEffect[NoFlag] = None
    do_sample: NoEffect[YesFlag] = None
    add_bos_token: NoEffect[YesFlag] = None
    spaces_between_special_tokens: NoEffect[YesFlag] = None
    grammar_string: NoEffect[Literal[""]] = None
    max_tokens_second: NoEffect[Zero] = None
    # Internals of other servers and how they report them.
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
    # An empty list may be an empty object from a language that cannot tell them apart.
    logit_bias: (
        Annotated[dict[str, Bias], MostEntries(1024), BIASES] | Annotated[list[Any], few(0)] | None
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
        """The given arguments of `SamplingParams`; missing fields of `CHOOSING` are left to the model."""
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
            # an explicit -1 takes precedence over a preset
            "seed": secrets.randbits(63) if seed == -1 else seed,
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
        """The value of a setting with several names, or None if it is not given.

        Raises:
            UsageError: it is given under two names with different values.
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
    # Features of other servers unrelated to the answer, or other ways to generate it.
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
        """Whether the model should think, or None if the request does not say."""
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
