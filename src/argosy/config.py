"""What a user sets and what a checkpoint is, as frozen and strict values.

The command line and the environment are read in one place and become an `EngineConfig`; a family file turns
`config.json` into a `ModelConfig`. Everything below receives these objects and reads nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, Self, get_args

from argosy.errors import UsageError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

_UNITS = {"": 1, "b": 1, "kib": KIB, "mib": MIB, "gib": GIB, "tib": 1 << 40}
_UNITS |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "k": KIB, "m": MIB, "g": GIB, "t": 1 << 40}

KvDtype = Literal["f32", "f16"]
AskAhead = Literal["off", "one_level", "two_levels"]
# How the weights of a matrix lie in memory; native/kernels/formats.h has the layouts.
Format = Literal[
    "f32", "f16", "bf16", "f8",
    "q8", "q4", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k", "q2_k", "q3_k", "iq4_nl", "iq4_xs", "mxfp4",
    "int4",
]  # fmt: skip


def parse_size(text: str | int, *, total_bytes: int | None = None) -> int:
    """Turn `8GiB`, `8GB`, `512M`, `75%` or a plain number of bytes into bytes.

    A percentage is of `total_bytes`: what the machine or its cgroup allows.

    Raises:
        UsageError: not a size, not above zero, or a percentage without a total.
    """
    if isinstance(text, int):
        size = text
    elif match := re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(%|[a-zA-Z]*)\s*", text):
        number, unit = float(match[1]), match[2].lower()
        if unit == "%":
            if total_bytes is None:
                raise UsageError(f"'{text}' is a share, and there is no total here to take it of")
            if number > 100:
                raise UsageError(f"'{text}' is more than all of the memory; the largest share is 100%")
            size = int(total_bytes * number / 100)
        elif unit in _UNITS:
            size = int(number * _UNITS[unit])
        else:
            raise UsageError(f"unknown unit '{match[2]}' in '{text}'; known: KiB MiB GiB TiB KB MB GB TB %")
    else:
        raise UsageError(f"'{text}' is not a size", hint="write 8GiB, 8GB or 75%")
    if size <= 0:
        raise UsageError(f"a size must be above zero, found '{text}'")
    return size


def format_bytes(count: float) -> str:
    """Memory for a person: `16.5 GiB`, `310 MiB`, `12 KiB`, `0 B`."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(count) >= size:
            value = count / size
            return f"{value:.1f} {unit}" if value < 100 else f"{value:.0f} {unit}"
    return f"{count:.0f} B"


class _Strict:
    """`from_mapping` for dataclasses: a misspelt key gets an answer."""

    @classmethod
    def from_mapping(cls, values: Mapping[str, object]) -> Self:
        known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        for key in values:
            if key not in known:
                raise UsageError(f"unknown setting '{key}'; known: {', '.join(known)}")
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget(_Strict):
    """What one process may use: all of it, interpreter included. The planner adds no hidden margin."""

    ram_bytes: int
    context_tokens: int | None = None  # None: the model's own, as far as the budget carries it

    def __post_init__(self) -> None:
        if self.ram_bytes <= 0:
            raise UsageError(f"ram_bytes must be above zero, found {self.ram_bytes}")
        if self.context_tokens is not None and self.context_tokens < 1:
            raise UsageError(f"context_tokens must be at least 1, found {self.context_tokens}")


@dataclass(frozen=True, slots=True, kw_only=True)
class KvDir(_Strict):
    """Where keys and values of prompts outlive the process. They tell what was said: keep the directory private."""

    path: Path
    ttl_s: float = 7 * 86_400.0  # files older than this are removed
    max_bytes: int = 16 * GIB  # of all files; those not used for longest leave first

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        if not self.ttl_s > 0:
            raise UsageError(f"ttl_s must be above zero, found {self.ttl_s}")
        if self.max_bytes < 1:
            raise UsageError(f"max_bytes must be at least 1, found {self.max_bytes}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig(_Strict):
    """How one engine runs. Which tokens come out depends on none of these but `kv_dtype` and `instruction_set`."""

    budget: Budget
    threads: int
    kv_dtype: KvDtype = "f32"
    instruction_set: str | None = None  # None: the best this processor has; a name caps the choice
    ask_ahead: AskAhead | None = None  # how products prefetch weights; None: a short measurement chooses
    chunk_tokens: int | None = None  # most prompt tokens in one step; None: what the memory plan finds best
    max_sequences: int = 8  # most sequences in one step
    readers: int = 4  # threads that read experts
    look_ahead: bool = (
        True  # read guesses of the next layer's experts while the drive is idle and they are right
    )
    experts_off: bool = False  # leave routed experts out of every sum: only for comparing with a dense base
    max_waiting: int | None = None  # most sequences that wait for their turn; None: any number
    prefix_reuse: bool = True  # keys and values of a beginning that was computed before are used again
    kv_dir: KvDir | None = None  # and outlive the process there
    grammars: bool = False  # answers can be made to follow a grammar; takes memory for the vocabulary
    replay_bytes: int = 0  # for answers that are kept until their conversation comes back; 0: none are
    request_bytes: int = 0  # for what a server reads and renders before the engine; 0: there is no server

    def __post_init__(self) -> None:
        if self.max_waiting is not None and self.max_waiting < 0:
            raise UsageError(f"max_waiting must be at least 0, found {self.max_waiting}")
        for name in ("replay_bytes", "request_bytes"):
            if (found := getattr(self, name)) < 0:
                raise UsageError(f"{name} must be at least 0, found {found}")
        if self.kv_dir is not None and not self.prefix_reuse:
            raise UsageError("kv_dir keeps prompts for reuse, and prefix_reuse is off")
        for name in ("threads", "chunk_tokens", "max_sequences", "readers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, found {value}")
        if self.ask_ahead not in (None, *get_args(AskAhead)):
            known = ", ".join(get_args(AskAhead))
            raise UsageError(f"unknown ask_ahead '{self.ask_ahead}'; known: {known}")
        if self.kv_dtype not in ("f32", "f16"):
            raise UsageError(f"kv_dtype must be f32 or f16, found '{self.kv_dtype}'")


@dataclass(frozen=True, slots=True)
class Trigger:
    """Where an answer that was free begins to follow its grammar. Words are texts, or token ids.

    words: the first of them to be complete is it.
    is_part: the grammar begins with that word; otherwise behind it.
    pauses, resumes: from a word of the first to one of the second nothing is a trigger.
    is_paused: the answer begins inside of such a stretch.
    """

    words: tuple[str | int, ...]
    is_part: bool = False
    pauses: tuple[str | int, ...] = ()
    resumes: tuple[str | int, ...] = ()
    is_paused: bool = False

    def __post_init__(self) -> None:
        if not self.words:
            raise UsageError("a trigger needs a word")
        if "" in self.all_words:
            raise UsageError("a trigger must hold at least one character, found ''")

    @property
    def all_words(self) -> tuple[str | int, ...]:
        return (*self.words, *self.pauses, *self.resumes)


# A schema inside a Lark grammar that has this key may be left out, where it cannot be followed, as in a lenient one.
LENIENT_SCHEMA = "x-argosy-lenient"


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar(_Strict):
    """What an answer has to look like.

    With a trigger the answer is free until the trigger is complete, and follows the grammar from there on. Special
    tokens count in a Lark grammar where it names them, `<|call|>` or `<[128010]>`, and nowhere else.

    is_lenient: what a schema asks for and cannot be held to is left out, and a grammar that takes too much work lets go
    of its answer; otherwise both are errors.
    """

    kind: Literal["json_object", "json_schema", "regex", "lark"]
    text: str = ""  # the schema as JSON, the expression, or the grammar with a rule `start`
    trigger: Trigger | None = None
    is_lenient: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("json_object", "json_schema", "regex", "lark"):
            raise UsageError(
                f"unknown kind of grammar '{self.kind}'; known: json_object, json_schema, regex, lark"
            )
        if (self.kind == "json_object") != (not self.text):
            raise UsageError(f"a grammar of kind '{self.kind}' needs {'no' if self.text else 'a'} text")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams(_Strict):
    """How the next token is chosen, and when to stop. Zero temperature is greedy: the lowest id wins a tie."""

    max_tokens: int | None = 256  # None: to the end of the context; 0: only with prompt_logprobs
    min_tokens: int = 0  # before so many, no end token, stop token or stop string ends the answer
    temperature: float = 0.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and answer (CTRL, arXiv:1909.05858)
    presence_penalty: float = 0.0  # over the answer, as OpenAI defines it
    frequency_penalty: float = 0.0
    seed: int | None = None  # None: a fresh one, reported in the result
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None  # None: none; n: the chosen token's and the n best
    ignore_eos: bool = False
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()  # end the answer as an end token does, even with ignore_eos
    skip_special_tokens: bool = True  # the text leaves them out; the token that ends an answer is never in it
    prompt_logprobs: int | None = None  # as logprobs, of each token of the prompt but the first
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        least = 1 if self.prompt_logprobs is None else 0
        checks = (
            ("max_tokens", self.max_tokens is None or self.max_tokens >= least, f"at least {least}"),
            ("min_tokens", self.min_tokens >= 0, "at least 0"),
            ("temperature", 0 <= self.temperature <= 100, "from 0 to 100"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty <= 100, "above 0, at most 100"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "from -2 to 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "from -2 to 2"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= 20, "from 0 to 20"),
            (
                "prompt_logprobs",
                self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= 20,
                "from 0 to 20",
            ),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "from 0 to 2^63 - 1"),
        )
        for name, holds, wanted in checks:
            if not holds:
                raise UsageError(f"{name} must be {wanted}, found {getattr(self, name)}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise UsageError(
                f"min_tokens must be at most max_tokens, and {self.min_tokens} is more than {self.max_tokens}"
            )
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if any(not stop for stop in self.stop):
            raise UsageError("a stop string must hold at least one character, found ''")
        if self.grammar is not None and self.ignore_eos:
            raise UsageError("ignore_eos has no meaning with a grammar, which says when the answer ends")
        for token_id, bias in self.logit_bias.items():
            if not -100 <= bias <= 100:
                raise UsageError(f"logit_bias must be from -100 to 100, found {bias} for token {token_id}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: angle of dimension pair j at position p is p * inverse_frequency(j)."""

    theta: float
    rotary_dim: int  # of head_dim, the first so many dimensions turn
    is_interleaved: bool = False  # dimension 2 i turns with 2 i + 1, not with i + rotary_dim / 2
    kind: Literal["default", "linear", "dynamic", "yarn", "llama3"] = "default"
    factor: float = 1.0
    original_context: int = 0  # positions the model was trained on, before scaling
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn: None computes 0.1 ln(factor) + 1
    mscale: float | None = None  # yarn, DeepSeek's variant
    mscale_all_dim: float | None = None
    truncate: bool = True  # yarn: whole-number correction range
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    frequency_factors: tuple[
        float, ...
    ] = ()  # each pair's frequency is divided by its factor, before the kind's rule


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """How experts are chosen: score, choice, then the routing weights (native/kernels/route.h)."""

    score: Literal["softmax", "sigmoid"] = "softmax"
    has_bias: bool = False  # of the router's product: `router_bias`
    has_choice_bias: bool = False  # added to scores for the choice, not for the weights: `choice_bias`
    num_groups: int = 1  # experts lie in so many groups of equal size,
    kept_groups: int = 1  # and only those of the best groups can be chosen
    group_score: Literal["max", "top2"] = (
        "top2"  # what a group is worth: its best, or the sum of its best two
    )
    renormalize: bool = True  # routing weights of a token sum to one
    renormalize_eps: float = 0.0  # added to the sum they are divided by
    scale: float = 1.0  # of the routing weights, last


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationConfig:
    """What lies between the gate and up products of an expert and its down product.

    silu: silu(gate) * up.   clamped: with gate cut off above at `limit` and up at both signs of it,
    gate * sigmoid(alpha * gate) * (up + 1), as gpt-oss has it.
    """

    kind: Literal["silu", "clamped"] = "silu"
    limit: float = 0.0
    alpha: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values share a compressed vector."""

    query_rank: int  # 0: queries are not compressed
    kv_rank: int
    nope_dim: int  # of a head, the dimensions of query and key that do not turn
    rope_dim: int  # and those that do; the key's are shared by all heads
    value_dim: int
    norm_eps: float  # of the norms of the compressed vectors
    is_up_split: bool = False  # the file holds k_up, transposed head by head, and v_up instead of kv_up


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaConfig:
    """A gated delta net (arXiv:2412.06464): a state per sequence instead of keys and values."""

    num_key_heads: int
    num_value_heads: int
    key_dim: int  # of a head
    value_dim: int
    conv_width: int  # positions that the causal convolution sees
    has_joined_qkvz: bool = False  # one matrix holds q, k, v and z of a key head, then those of the next
    has_joined_ba: bool = False  # the same of b and a
    is_tiled: bool = (
        False  # value head i goes with key head i % num_key_heads, not with i // value heads of each
    )
    is_rate_log: bool = True  # the rate of decay is kept as log(-rate)

    @property
    def key_channels(self) -> int:
        return self.num_key_heads * self.key_dim

    @property
    def value_channels(self) -> int:
        return self.num_value_heads * self.value_dim

    @property
    def conv_channels(self) -> int:
        """q, k and v of all heads."""
        return 2 * self.key_channels + self.value_channels

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """As `_native` takes them."""
        return self.num_key_heads, self.num_value_heads, self.key_dim, self.value_dim, self.conv_width


MixerKind = Literal["attention", "latent", "delta"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerConfig:
    """What differs from layer to layer."""

    is_moe: bool
    mixer: MixerKind = "attention"
    sliding_window: int = 0  # 0: full attention


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A checkpoint's geometry and flags, in Argosy's words."""

    family: str
    vocab_size: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerConfig, ...]
    rope: RopeConfig
    norm_eps: float
    context_tokens: int  # the longest sequence the model was made for
    num_experts: int
    experts_per_token: int
    expert_width: int
    router: RouterConfig
    activation: ActivationConfig = ActivationConfig()  # of all feed-forward networks
    latent: LatentConfig | None = None  # of the layers whose mixer is "latent"
    delta: DeltaConfig | None = None  # of those whose mixer is "delta"
    attention_scale: float = 0.0  # of the scores; 0: 1 / sqrt(head_dim)
    dense_width: int = 0  # FFN of layers without routed experts
    shared_width: int = 0  # always-on shared expert; 0: none
    shared_is_gated: bool = False  # its output times sigmoid(shared_score . x)
    has_qkv_bias: bool = False
    has_o_bias: bool = False
    qk_norm: Literal["none", "head", "flat"] = (
        "none"  # RMSNorm before rotary: of each head, or of all at once
    )
    qkv_limit: float = 0.0  # q, k and v are cut off at both signs of it; 0: not
    has_sinks: bool = False  # a learnt score per head that takes weight and adds nothing: `sinks`
    has_output_gate: bool = (
        False  # each head's output times sigmoid of its gate; q has rows for both, head by head
    )
    has_expert_bias: bool = False  # gate, up and down of routed experts
    norm_offset: float = 0.0  # norms hold their weight less this: 1 where they are zero-centred
    is_embedding_tied: bool = False  # the head is the embedding table
    num_mtp_layers: int = 0  # of multi-token prediction: behind `layers` in the files, never in memory
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def delta_layers(self) -> tuple[int, ...]:
        """Layers with a recurrent state."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.mixer == "delta")

    @property
    def mtp_layers(self) -> range:
        """Layers for multi-token prediction, which files number on from the model's own."""
        return range(self.num_layers, self.num_layers + self.num_mtp_layers)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(i for i, layer in enumerate(self.layers) if layer.is_moe)
