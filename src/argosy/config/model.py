"""A checkpoint's geometry and flags, which a family file reads from `config.json`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

# How layers for multi-token prediction differ, as vLLM runs them. deepseek: the embedding at position 0 counts as
# zeros, and a draft goes on from its state before the final norm. qwen: neither.
DraftForm = Literal["deepseek", "qwen"]
# Storage formats of a weight matrix in memory; native/kernels/formats.h has the layouts.
# Products of grouped formats are not measured: `_native.measured_as` names a format with the same arithmetic.
MeasuredFormat = Literal[
    "f32", "f16", "bf16", "f8", "f8_row", "f8_32", "mxfp8", "int8_row", "bnb4", "bnb4_double",
    "q8", "q4", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k", "q2_k", "q3_k", "iq4_nl", "iq4_xs", "mxfp4", "nvfp4",
    "int4", "tq2_0", "q2_0", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq1_s", "iq1_m", "tq1_0", "q1_0",
    "iq2_k", "iq3_k", "iq4_k", "iq5_k", "iq6_k", "iq2_ks", "iq3_ks", "iq4_ks", "iq5_ks", "iq2_kl",
]  # fmt: skip
GroupedFormat = Literal[
    "int4_32_f16", "int4_32_bf16", "int4_64_f16", "int4_64_bf16", "int4_128_f16", "int4_128_bf16",
    "int8_32_f16", "int8_32_bf16", "int8_64_f16", "int8_64_bf16", "int8_128_f16", "int8_128_bf16",
    "uint2_32_f16", "uint2_32_bf16", "uint2_64_f16", "uint2_64_bf16", "uint2_128_f16", "uint2_128_bf16",
    "uint3_32_f16", "uint3_32_bf16", "uint3_64_f16", "uint3_64_bf16", "uint3_128_f16", "uint3_128_bf16",
    "uint4_32_f16", "uint4_32_bf16", "uint4_64_f16", "uint4_64_bf16", "uint4_128_f16", "uint4_128_bf16",
    "uint8_32_f16", "uint8_32_bf16", "uint8_64_f16", "uint8_64_bf16", "uint8_128_f16", "uint8_128_bf16",
    "affine2_32_f16", "affine2_32_bf16", "affine2_64_f16", "affine2_64_bf16", "affine2_128_f16", "affine2_128_bf16",
    "affine3_32_f16", "affine3_32_bf16", "affine3_64_f16", "affine3_64_bf16", "affine3_128_f16", "affine3_128_bf16",
    "affine4_32_f16", "affine4_32_bf16", "affine4_64_f16", "affine4_64_bf16", "affine4_128_f16", "affine4_128_bf16",
    "affine5_32_f16", "affine5_32_bf16", "affine5_64_f16", "affine5_64_bf16", "affine5_128_f16", "affine5_128_bf16",
    "affine6_32_f16", "affine6_32_bf16", "affine6_64_f16", "affine6_64_bf16", "affine6_128_f16", "affine6_128_bf16",
    "affine8_32_f16", "affine8_32_bf16", "affine8_64_f16", "affine8_64_bf16", "affine8_128_f16", "affine8_128_bf16",
    "int4_32_f16_act_order", "int4_32_bf16_act_order", "int4_64_f16_act_order",
    "int4_64_bf16_act_order", "int4_128_f16_act_order", "int4_128_bf16_act_order",
    "int8_32_f16_act_order", "int8_32_bf16_act_order", "int8_64_f16_act_order",
    "int8_64_bf16_act_order", "int8_128_f16_act_order", "int8_128_bf16_act_order",
    "uint2_32_f16_act_order", "uint2_32_bf16_act_order", "uint2_64_f16_act_order",
    "uint2_64_bf16_act_order", "uint2_128_f16_act_order", "uint2_128_bf16_act_order",
    "uint3_32_f16_act_order", "uint3_32_bf16_act_order", "uint3_64_f16_act_order",
    "uint3_64_bf16_act_order", "uint3_128_f16_act_order", "uint3_128_bf16_act_order",
    "uint4_32_f16_act_order", "uint4_32_bf16_act_order", "uint4_64_f16_act_order",
    "uint4_64_bf16_act_order", "uint4_128_f16_act_order", "uint4_128_bf16_act_order",
    "uint8_32_f16_act_order", "uint8_32_bf16_act_order", "uint8_64_f16_act_order",
    "uint8_64_bf16_act_order", "uint8_128_f16_act_order", "uint8_128_bf16_act_order",
]  # fmt: skip
Format = Literal[MeasuredFormat, GroupedFormat]
MEASURED_FORMATS: tuple[MeasuredFormat, ...] = get_args(MeasuredFormat)
F8_FORMATS: frozenset[Format] = frozenset(
    {"f8", "f8_row", "f8_32", "mxfp8", "int8_row", "bnb4", "bnb4_double"}
)
ACT_ORDER_FORMATS: frozenset[Format] = frozenset(
    format for format in get_args(GroupedFormat) if format.endswith("_act_order")
)
FLOAT_FORMATS: frozenset[Format] = F8_FORMATS.union({"f32", "f16", "bf16"})  # activations stay float32


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: dimension pair j at position p turns by p * inverse_frequency(j)."""

    theta: float
    rotary_dim: int  # only the first rotary_dim dimensions of head_dim rotate
    is_interleaved: bool = False  # dimension 2 i turns with 2 i + 1, not with i + rotary_dim / 2
    # Positions in media have axes (time, row, column); the axis of each dimension pair. Empty: 0 for every pair.
    axes: tuple[int, ...] = ()
    kind: Literal["default", "linear", "dynamic", "yarn", "llama3", "proportional"] = "default"
    factor: float = 1.0
    turning_pairs: int | None = None  # proportional: only the first of the pairs turn; None: all of them
    original_context: int = 0  # positions the model was trained on, before scaling
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn: None computes 0.1 ln(factor) + 1
    mscale: float | None = None  # yarn, DeepSeek's variant
    mscale_all_dim: float | None = None
    truncate: bool = True  # yarn: whole-number correction range
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    # Each pair's frequency is divided by its factor, before the rule of `kind` applies.
    frequency_factors: tuple[float, ...] = ()

    @property
    def num_axes(self) -> int:
        """Axes of a position: time, row and column, or one."""
        return 3 if self.axes else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """How experts are chosen: scores, choice, then routing weights (native/kernels/route.h)."""

    score: Literal["softmax", "sigmoid"] = "softmax"
    has_bias: bool = False  # the router's product has a bias: `router_bias`
    has_choice_bias: bool = False  # a bias on scores for the choice, not for the weights: `choice_bias`
    num_groups: int = 1  # experts form this many groups of equal size
    kept_groups: int = 1  # experts are chosen only from this many best groups
    group_score: Literal["max", "top2"] = "top2"  # a group's score: its best, or the sum of its best two
    renormalize: bool = True  # a token's routing weights sum to one
    renormalize_eps: float = 0.0  # added to the divisor of the renormalization
    scale: float = 1.0  # multiplies the routing weights, last
    # Each expert has a factor for its routing weight, after `scale`: `expert_scale`.
    has_expert_scale: bool = False
    # The router reads the hidden state after its own RMSNorm, whose weight is `router_norm` / sqrt(hidden_size).
    has_norm: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationConfig:
    """The activation between an expert's gate and up products and its down product.

    silu: silu(gate) * up.
    clamped (gpt-oss): gate * sigmoid(alpha * gate) * (up + 1), with gate clamped to at most `limit` and up
    to -limit..limit.
    gelu_tanh: gelu(gate) * up, with the tanh approximation of gelu (arXiv:1606.08415).
    """

    kind: Literal["silu", "clamped", "gelu_tanh"] = "silu"
    limit: float = 0.0
    alpha: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values share a compressed vector."""

    query_rank: int  # 0: queries are not compressed
    kv_rank: int
    nope_dim: int  # query and key dimensions of a head that do not rotate
    rope_dim: int  # dimensions that rotate; all heads share the key's
    value_dim: int
    norm_eps: float  # for the norms of the compressed vectors
    is_up_split: bool = False  # the file holds k_up (transposed head by head) and v_up instead of kv_up


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaConfig:
    """A gated delta net (arXiv:2412.06464): a state per sequence instead of keys and values."""

    num_key_heads: int
    num_value_heads: int
    key_dim: int  # per head
    value_dim: int
    conv_width: int  # positions that the causal convolution sees
    has_joined_qkvz: bool = False  # one matrix holds q, k, v and z of each key head in turn
    has_joined_ba: bool = False  # the same for b and a
    # Value head i uses key head i % num_key_heads, not i // (num_value_heads / num_key_heads).
    is_tiled: bool = False
    is_rate_log: bool = True  # the decay rate is stored as log(-rate)

    @property
    def key_channels(self) -> int:
        return self.num_key_heads * self.key_dim

    @property
    def value_channels(self) -> int:
        return self.num_value_heads * self.value_dim

    @property
    def conv_channels(self) -> int:
        """The channels of q, k and v of all heads."""
        return 2 * self.key_channels + self.value_channels

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """The sizes as `_native` expects them."""
        return self.num_key_heads, self.num_value_heads, self.key_dim, self.value_dim, self.conv_width


MixerKind = Literal["attention", "latent", "delta"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerConfig:
    """The settings that differ from layer to layer."""

    is_moe: bool
    mixer: MixerKind = "attention"
    sliding_window: int = 0  # 0: full attention
    num_kv_heads: int = 0  # 0: the model's
    head_dim: int = 0  # 0: the model's
    rope: RopeConfig | None = None  # None: the model's
    keys_are_values: bool = False  # no v: the keys, before their norm, are the values
    is_causal: bool = False  # also in media spans, no position sees a later one


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A checkpoint's geometry and flags, in Argosy's vocabulary."""

    family: str
    vocab_size: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerConfig, ...]
    rope: RopeConfig
    norm_eps: float
    context_tokens: int  # the longest sequence the model supports
    num_experts: int
    experts_per_token: int
    expert_width: int
    router: RouterConfig
    activation: ActivationConfig = ActivationConfig()  # for all feed-forward networks
    latent: LatentConfig | None = None  # for layers whose mixer is "latent"
    delta: DeltaConfig | None = None  # for layers whose mixer is "delta"
    attention_scale: float = 0.0  # factor of attention scores; 0: 1 / sqrt(head_dim)
    dense_width: int = 0  # FFN width of layers without routed experts
    shared_width: int = 0  # FFN width of the always-on shared expert; 0: none
    shared_is_gated: bool = False  # the shared expert's output is multiplied by sigmoid(shared_score . x)
    has_qkv_bias: bool = False
    has_o_bias: bool = False
    # RMSNorm before rotary: none, over each head, or over all heads at once.
    qk_norm: Literal["none", "head", "flat"] = "none"
    qkv_limit: float = 0.0  # q, k and v are clamped to -limit..limit; 0: not clamped
    has_value_norm: bool = False  # RMSNorm without a weight over each head of v
    has_sinks: bool = False  # a learnt score per head that takes attention weight and adds nothing: `sinks`
    # Each head's output is multiplied by the sigmoid of its gate; q has rows for both, head by head.
    has_output_gate: bool = False
    has_expert_bias: bool = False  # gate, up and down of routed experts have biases
    # RMSNorm of the outputs of the mixer and of the feed-forward networks: `attn_post_norm`, `mlp_post_norm`.
    has_post_norms: bool = False
    # Routed experts have their own norms before and after, the shared expert has its own after: `expert_norm`,
    # `expert_post_norm`, `shared_post_norm`.
    has_expert_norms: bool = False
    has_layer_scale: bool = False  # a factor of the hidden state after each layer: `layer_scale`
    embedding_scale: float = 1.0  # factor of the embeddings of tokens
    logit_cap: float = 0.0  # logits become cap * tanh(logit / cap); 0: unchanged
    norm_offset: float = 0.0  # added to stored norm weights: 1 where they are zero-centred
    is_embedding_tied: bool = False  # the head is the embedding table
    draft_form: DraftForm = "deepseek"
    num_mtp_layers: int = 0  # for multi-token prediction, after `layers` in the files; speculation reads one
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def delta_layers(self) -> tuple[int, ...]:
        """The layers with a recurrent state."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.mixer == "delta")

    def kv_heads_of(self, layer: int) -> int:
        return self.layers[layer].num_kv_heads or self.num_kv_heads

    def head_dim_of(self, layer: int) -> int:
        return self.layers[layer].head_dim or self.head_dim

    def rope_of(self, layer: int) -> RopeConfig:
        return self.layers[layer].rope or self.rope

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """The different rotary embeddings of the layers."""
        return tuple(dict.fromkeys(self.rope_of(layer) for layer in range(self.num_layers)))

    @property
    def head_name(self) -> str:
        """The name of the dense matrix that turns hidden states into logits."""
        return "embed" if self.is_embedding_tied else "head"

    @property
    def mtp_layers(self) -> range:
        """The layers for multi-token prediction, which files number after the model's own."""
        return range(self.num_layers, self.num_layers + self.num_mtp_layers)

    @property
    def draft_only(self) -> ModelConfig:
        """The first layer for multi-token prediction, with its number; it is like the model's last layer with such a
        mixer.
        """
        alike = (one for one in reversed(self.layers) if one.is_moe and one.mixer != "delta")
        layer = next(alike, LayerConfig(is_moe=True))
        return replace(self, layers=(*(LayerConfig(is_moe=False),) * self.num_layers, layer))

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(i for i, layer in enumerate(self.layers) if layer.is_moe)
