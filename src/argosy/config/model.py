"""A checkpoint's geometry and flags, which a family file reads from `config.json`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, get_args

from argosy.config.mixers import (
    AttentionConfig,
    CompressedConfig,
    DeltaConfig,
    LatentConfig,
    Mixer,
    RecurrentMixer,
    RopeConfig,
    RotaryMixer,
)
from argosy.config.ngrams import NgramConfig
from argosy.config.residual import Residual

_MixerT = TypeVar("_MixerT", bound=Mixer)

# How layers for multi-token prediction differ, as vLLM runs them. deepseek: the embedding at position 0 counts as
# zeros, and a draft goes on from its state before the final norm. qwen: neither. ling: only the former.
DraftForm = Literal["deepseek", "qwen", "ling"]
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
class RouterConfig:
    """How experts are chosen: scores, choice, then routing weights (native/kernels/route.h)."""

    score: Literal["softmax", "sigmoid", "sqrt_softplus"] = "softmax"  # the last: sqrt(log(1 + e^logit))
    has_bias: bool = False  # the router's product has a bias: `router_bias`
    has_choice_bias: bool = False  # a bias on scores for the choice, not for the weights: `choice_bias`
    # Tokens of media have another bias on scores, and choose where token ids decide for others: `media_bias`.
    has_media_bias: bool = False
    num_groups: int = 1  # experts form this many groups of equal size
    kept_groups: int = 1  # experts are chosen only from this many best groups
    group_score: Literal["max", "top2"] = "top2"  # a group's score: its best, or the sum of its best two
    renormalize: bool = True  # a token's routing weights sum to one
    renormalize_eps: float = 0.0  # added to the divisor of the renormalization
    renormalize_least: float = 0.0  # the least divisor
    scale: float = 1.0  # multiplies the routing weights, last
    # Each expert has a factor for its routing weight, after `scale`: `expert_scale`.
    has_expert_scale: bool = False
    logit_cap: float = 0.0  # logits become cap * tanh(logit / cap) before they are scored; 0: unchanged
    weighs_input: bool = False  # the weight multiplies the input of a token's only expert, not its output
    # The router reads the hidden state after its own RMSNorm, whose weight is `router_norm` / sqrt(hidden_size).
    has_norm: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationConfig:
    """The activation between an expert's gate and up products and its down product.

    silu: silu(gate) * up.
    clamped (gpt-oss): gate * sigmoid(alpha * gate) * (up + 1), with gate clamped to at most `limit` and up
    to -limit..limit.
    gelu_tanh: gelu(gate) * up, with the tanh approximation of gelu (arXiv:1606.08415).
    silu_limited (DeepSeek-V4): silu(gate) * up, with gate clamped to at most `limit` and up to -limit..limit.
    silu_capped (Step-3.5): silu(gate) clamped to at most `limit`, times up clamped to -limit..limit.
    relu2: max(up, 0)^2, without a gate (arXiv:2109.08668).
    situ (Kimi-K3): alpha * tanh(gate / alpha) * sigmoid(gate) * limit * tanh(up / limit).
    """

    kind: Literal["silu", "clamped", "gelu_tanh", "silu_limited", "silu_capped", "relu2", "situ"] = "silu"
    limit: float = 0.0
    alpha: float = 0.0

    @property
    def has_gate(self) -> bool:
        return self.kind != "relu2"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerConfig:
    """A layer: a mixer, then a feed-forward network, or only one of them. Equal layers share their objects."""

    mixer: Mixer | None
    is_moe: bool  # the network has routed experts
    has_network: bool = True
    # None: the model's. Of the dense network or the routed experts, and of the shared expert.
    activation: ActivationConfig | None = None
    shared_activation: ActivationConfig | None = None
    # None: the model's. Of the routed experts.
    experts_per_token: int | None = None
    expert_width: int | None = None
    ngrams: NgramConfig | None = None  # rows of a table, added before the mixer
    # A token's experts follow from its id, only their weights from the router, which has no choice bias:
    # `token_experts`.
    has_token_experts: bool = False

    @property
    def kept_window(self) -> int:
        """The last positions that the layer sees and keeps; 0: it keeps more, or something else."""
        mixer = self.mixer
        if self.ngrams is not None:
            return 0
        if isinstance(mixer, AttentionConfig):
            return mixer.sliding_window if mixer.index is None else 0
        if isinstance(mixer, CompressedConfig):
            return 0 if mixer.pools else mixer.sliding_window  # without, its entries are an earlier layer's
        return int(mixer is None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A checkpoint's geometry and flags, in Argosy's vocabulary."""

    family: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerConfig, ...]
    norm_eps: float
    context_tokens: int  # the longest sequence the model supports
    num_experts: int = 0  # per layer; 0: no layer has routed experts
    experts_per_token: int = 0  # in layers without their own number; no layer has a larger one
    expert_width: int = 0  # the same
    router: RouterConfig = RouterConfig()
    activation: ActivationConfig = ActivationConfig()  # for feed-forward networks of layers without their own
    dense_width: int = 0  # FFN width of layers without routed experts
    shared_width: int = 0  # FFN width of the always-on shared expert; 0: none
    shared_is_averaged: bool = False  # routed and shared outputs are averaged, not added
    # Routed experts read and write vectors of this size, `latent_down` . x and `latent_up` . sum; 0: hidden_size.
    expert_latent: int = 0
    has_latent_norm: bool = False  # RMSNorm of that sum: `latent_norm`
    shared_is_gated: bool = False  # the shared expert's output is multiplied by sigmoid(shared_score . x)
    has_expert_bias: bool = False  # gate, up and down of routed experts have biases
    norm_kind: Literal["rms", "layer"] = "rms"  # RMSNorm or LayerNorm, for norms of the hidden state
    has_pre_norms: bool = True  # norms before the mixer and before the networks: `attn_norm`, `mlp_norm`
    # The networks read what the mixer reads, after `attn_norm`; there is no `mlp_norm`.
    is_parallel: bool = False
    # RMSNorm of the outputs of the mixer and of the feed-forward networks: `attn_post_norm`, `mlp_post_norm`.
    has_post_norms: bool = False
    has_moe_post_norm: bool = False  # the same, only of what a layer with experts adds: `mlp_post_norm`
    # Routed experts have their own norms before and after, the shared expert has its own after: `expert_norm`,
    # `expert_post_norm`, `shared_post_norm`.
    has_expert_norms: bool = False
    has_layer_scale: bool = False  # a factor of the hidden state after each layer: `layer_scale`
    embedding_scale: float = 1.0  # factor of the embeddings of tokens
    residual_scale: float = 1.0  # factor of what the mixer, or the networks together, add to the hidden state
    residual: Residual | None = None  # streams instead of one hidden state
    # Not 0: they add it to this factor times what they read, after its norm, instead of the hidden state.
    normed_residual: float = 0.0
    logit_scale: float = 1.0  # factor of the logits, before the cap
    logit_cap: float = 0.0  # logits become cap * tanh(logit / cap); 0: unchanged
    norm_offset: float = 0.0  # added to stored norm weights: 1 where they are zero-centred
    is_embedding_tied: bool = False  # the head is the embedding table
    draft_form: DraftForm | None = (
        "deepseek"  # None: layers for multi-token prediction of another kind, passed over
    )
    num_mtp_layers: int = 0  # for multi-token prediction, after `layers` in the files; speculation reads one
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def recurrent_layers(self) -> tuple[int, ...]:
        """The layers with a recurrent state: recurrent mixers, and pools of several positions."""
        return tuple(
            i
            for i, layer in enumerate(self.layers)
            if isinstance(layer.mixer, RecurrentMixer)
            or (
                isinstance(layer.mixer, AttentionConfig | LatentConfig | CompressedConfig)
                and layer.mixer.has_state
            )
        )

    @property
    def reaches(self) -> tuple[int, ...]:
        """By layer, the distance to the end of a prompt at which its networks and all later layers need not run.

        0: they always run. Only the last layers that keep nothing but a window leave tokens out (`kept/tails.py`), and
        the networks of the layer before them. They are at least a quarter of the layers: otherwise the prefixes that
        cannot be reused would cost more than is saved.
        """
        reaches: list[int] = []
        reach, num_limited = 1, 0
        for layer in reversed(self.layers):
            reaches.append(reach)
            if not layer.kept_window:
                break
            reach += layer.kept_window - 1
            num_limited += 1
        if 4 * num_limited < self.num_layers:
            return (0,) * self.num_layers
        return (0,) * (self.num_layers - len(reaches)) + tuple(reversed(reaches))

    @property
    def attention(self) -> AttentionConfig:
        """The first layer's with grouped-query attention.

        Raises:
            LookupError: no layer has it.
        """
        if (attention := self._first(AttentionConfig)) is None:
            raise LookupError(f"no layer of {self.family} has grouped-query attention")
        return attention

    @property
    def latent(self) -> LatentConfig | None:
        """The first layer's with latent attention."""
        return self._first(LatentConfig)

    @property
    def compressed(self) -> CompressedConfig | None:
        """The first layer's with DeepSeek-V4's attention."""
        return self._first(CompressedConfig)

    @property
    def delta(self) -> DeltaConfig | None:
        """The first gated delta net."""
        return self._first(DeltaConfig)

    def _first(self, kind: type[_MixerT]) -> _MixerT | None:
        return next((layer.mixer for layer in self.layers if isinstance(layer.mixer, kind)), None)

    def with_mixers(self, kind: type[Mixer], **changes: Any) -> ModelConfig:
        """Return the config with `changes` in every mixer of this kind."""
        changed = {layer: layer for layer in self.layers}
        for layer in changed:
            if isinstance(layer.mixer, kind):
                changed[layer] = replace(layer, mixer=replace(layer.mixer, **changes))
        return replace(self, layers=tuple(changed[layer] for layer in self.layers))

    @property
    def num_streams(self) -> int:
        """The hidden states of a token."""
        return 1 if self.residual is None else self.residual.num_streams

    @property
    def ngram_layers(self) -> tuple[int, ...]:
        """The layers with an n-gram table."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.ngrams is not None)

    @property
    def folds_tokens(self) -> bool:
        """Whether n-gram tables need the map of `prompt/folding.py`."""
        return any(one.ngrams is not None and one.ngrams.folded_ids for one in self.layers)

    @property
    def num_earlier(self) -> int:
        """The tokens before a token that rows of n-gram tables depend on."""
        return max((one.ngrams.num_earlier for one in self.layers if one.ngrams is not None), default=0)

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """The different rotary embeddings of the layers."""
        ropes = (layer.mixer.rope for layer in self.layers if isinstance(layer.mixer, RotaryMixer))
        return tuple(dict.fromkeys(rope for rope in ropes if rope is not None))

    @property
    def num_axes(self) -> int:
        """Axes of a position: time, row and column, or one."""
        return max((rope.num_axes for rope in self.ropes), default=1)

    @property
    def expert_hidden(self) -> int:
        """The size of the vectors that routed experts read and write."""
        return self.expert_latent or self.hidden_size

    @property
    def head_name(self) -> str:
        """The name of the dense matrix that turns hidden states into logits."""
        return "embed" if self.is_embedding_tied else "head"

    @property
    def exact_tokens(self) -> int | None:
        """The positions up to which results are exact, because indexers are missing; None: all of them."""
        index = self.latent.index if self.latent is not None else None
        return index.num_chosen if index is not None and index.kind == "missing" else None

    @property
    def mtp_layers(self) -> range:
        """The layers for multi-token prediction, which files number after the model's own."""
        return range(self.num_layers, self.num_layers + self.num_mtp_layers)

    @property
    def draft_only(self) -> ModelConfig:
        """The first layer for multi-token prediction, with its number; it is like the model's last layer with
        attention, but sees all positions, and its networks have the model's activation: a draft need not be exact.
        """
        attending = [one for one in self.layers if isinstance(one.mixer, AttentionConfig | LatentConfig)]
        last = ([one for one in attending if one.is_moe] or attending or list(self.layers))[-1]
        if isinstance(last.mixer, AttentionConfig | LatentConfig):
            last = replace(last, mixer=replace(last.mixer, index=None))
        last = replace(last, ngrams=None)
        passed_over = replace(last, is_moe=False, has_network=True, activation=None, shared_activation=None)
        return replace(self, layers=(*(passed_over,) * self.num_layers, replace(passed_over, is_moe=True)))

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(i for i, layer in enumerate(self.layers) if layer.is_moe)

    def chosen_in(self, layer: int) -> int:
        """How many of a layer's routed experts a token chooses."""
        return self.layers[layer].experts_per_token or self.experts_per_token

    def expert_width_in(self, layer: int) -> int:
        return self.layers[layer].expert_width or self.expert_width

    @property
    def mean_experts_per_token(self) -> float:
        """How many routed experts a token chooses in a layer with experts."""
        return sum(map(self.chosen_in, self.moe_layers)) / max(1, len(self.moe_layers))
