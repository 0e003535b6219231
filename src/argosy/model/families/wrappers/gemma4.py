"""Gemma-4 (26B-A4B): a model that also sees, with a dense network alongside the experts in every layer.

Five layers with a sliding window are followed by one that sees everything. The two kinds have different heads and
different rotary embeddings; in the second kind, keys serve as values if `attention_k_eq_v` is set. Each block is
normed before and after. In the second half of a layer, the dense network (here the shared expert), the router and the
routed experts read three different norms of the same hidden state; the outputs of the two networks are normed, added,
and normed again. Within an image, positions of sliding layers see each other both ways; full layers stay causal.

`config.json` is a wrapper with the text model in `text_config`; its own keys describe images, video and sound. The
vision tower (`model.vision_tower.`) is `encoders/gemma_vision.py`; a tower for sound is ignored. The dense models of
the family (31B), and those with embeddings for every layer (E2B, E4B), are refused.
"""

from __future__ import annotations

from collections.abc import Mapping

from argosy.config import LayerConfig, ModelConfig
from argosy.errors import CheckpointError
from argosy.model.families.wrappers.gemma import make_config, make_layer
from argosy.model.families.wrappers.gemma4_gguf import GGUF_ARCHITECTURE, open_gguf
from argosy.model.reading.common_config import parse_wrapper
from argosy.model.reading.config_reader import MOST_EXPERTS, MOST_LAYERS, AttentionShape, ConfigReader
from argosy.model.reading.layout import ATTENTION_NAMES, Layout
from argosy.model.reading.rope_config import read_ropes_of_layers

MODEL_TYPE = "gemma4"
__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "open_gguf", "parse_config"]

_SLIDING, _FULL = "sliding_attention", "full_attention"
_DEFAULT_ROPES: Mapping[str, Mapping[str, object]] = {
    _SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    _FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}

LAYOUTS = (
    Layout(
        layer_names={
            **ATTENTION_NAMES,
            "attn_post_norm": "post_attention_layernorm.weight",
            "mlp_norm": "pre_feedforward_layernorm.weight",
            "mlp_post_norm": "post_feedforward_layernorm.weight",
            "layer_scale": "layer_scalar",
            "router_norm": "router.scale",
            "router": "router.proj.weight",
            "expert_scale": "router.per_expert_scale",
            "expert_norm": "pre_feedforward_layernorm_2.weight",
            "expert_post_norm": "post_feedforward_layernorm_2.weight",
            "shared_gate": "mlp.gate_proj.weight",
            "shared_up": "mlp.up_proj.weight",
            "shared_down": "mlp.down_proj.weight",
            "shared_post_norm": "post_feedforward_layernorm_1.weight",
        },
        fused_names=("experts.gate_up_proj", "experts.down_proj"),
        prefix="model.language_model.",
        passed_over=r"model\.(vision_tower|embed_vision|audio_tower|embed_audio)\..*",
    ),
)

# Placeholders of images and sound, and the tower that hears.
_MORE_KEYS = (
    "audio_config", "audio_token_id", "boa_token_id", "boi_token_id", "eoa_token_id", "eoa_token_index", "eoi_token_id",
    "vision_soft_tokens_per_image",
)  # fmt: skip


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read the text part of a `config.json`, as `Gemma4TextConfig` in transformers 5.24 does.

    Raises:
        The same errors as `parse_wrapper`.
    """
    return parse_wrapper(raw, MODEL_TYPE, ("gemma4_text",), _read_text, *_MORE_KEYS)


def _read_text(text: ConfigReader) -> ModelConfig:
    _refuse_siblings(text)
    shape = text.attention_shape(hidden_size=2304, num_heads=8, num_kv_heads=4, head_dim=256)
    num_experts = text.integer("num_experts", default=None, most=MOST_EXPERTS)
    text.one_of("hidden_activation", "gelu_pytorch_tanh", ("gelu_pytorch_tanh",))
    return make_config(
        vocab_size=text.integer("vocab_size", default=262_144),
        hidden_size=shape.hidden_size,
        layers=_read_layers(text, shape),
        norm_eps=text.number("rms_norm_eps", 1e-6),
        context_tokens=text.integer("max_position_embeddings", default=131_072),
        num_experts=num_experts,
        experts_per_token=text.integer("top_k_experts", default=None, most=num_experts),
        expert_width=text.integer("moe_intermediate_size", default=None),
        shared_width=text.integer("intermediate_size", default=9216),
        logit_cap=text.optional_number("final_logit_softcapping") or 0.0,
        is_embedding_tied=text.flag("tie_word_embeddings", True),
        eos_ids=text.token_ids("eos_token_id", 1),
        bos_id=next(iter(text.token_ids("bos_token_id", 2)), None),
    )


def _refuse_siblings(text: ConfigReader) -> None:
    """Refuse the models of the family that have no experts, and switches that only those use."""
    if not text.flag("enable_moe_block", False):
        raise text.unsupported("enable_moe_block", "true")
    if text.integer("hidden_size_per_layer_input", default=256, least=0):
        raise text.unsupported("hidden_size_per_layer_input", "0")
    text.neutral("num_kv_shared_layers", 0)
    text.neutral("attention_bias", False)
    text.passed("vocab_size_per_layer_input", "use_double_wide_mlp")


def _read_layers(text: ConfigReader, shape: AttentionShape) -> tuple[LayerConfig, ...]:
    kinds = _read_kinds(text)
    window = text.integer("sliding_window", default=512)
    is_image_seen = text.optional_one_of("use_bidirectional_attention", ("vision",)) is not None
    keys_are_values = text.flag("attention_k_eq_v", False)
    heads = _read_heads(text, kinds, shape, keys_are_values=keys_are_values)
    ropes = read_ropes_of_layers(
        text, {kind: head_dim for kind, (_, head_dim) in heads.items()}, _DEFAULT_ROPES
    )
    layers = {
        kind: make_layer(
            window=window if kind == _SLIDING else 0,
            num_heads=shape.num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope=ropes[kind],
            is_causal=kind == _FULL or not is_image_seen,
            keys_are_values=keys_are_values and kind == _FULL,
        )
        for kind, (num_kv_heads, head_dim) in heads.items()
    }
    return tuple(layers[kind] for kind in kinds)


def _read_kinds(text: ConfigReader) -> tuple[str, ...]:
    """Return the kind of each layer; the last layer sees everything, whatever `layer_types` says."""
    num_layers = text.integer("num_hidden_layers", default=30, most=MOST_LAYERS)
    kinds = text.layer_types(num_layers, (_SLIDING, _FULL))
    if kinds is None:
        kinds = tuple(_SLIDING if (layer + 1) % 6 else _FULL for layer in range(num_layers))
    return (*kinds[:-1], _FULL)


def _read_heads(
    text: ConfigReader, kinds: tuple[str, ...], shape: AttentionShape, *, keys_are_values: bool
) -> dict[str, tuple[int, int]]:
    """Read the key heads of each kind of layer, and their dimensions.

    The hub has `global_head_dim` and `num_global_key_value_heads`; transformers writes `per_layer_config`, in which the
    number of a layer has the keys that differ there.
    """
    plain = (shape.num_kv_heads, shape.head_dim)
    given = text.numbered("per_layer_config", len(kinds))
    if given is None:
        head_dim = text.integer("global_head_dim", default=512)
        num_kv_heads = text.optional_integer("num_global_key_value_heads")
        if num_kv_heads is None or not keys_are_values:
            num_kv_heads = shape.num_kv_heads
        heads = {kind: (num_kv_heads, head_dim) if kind == _FULL else plain for kind in kinds}
    else:
        for key in ("global_head_dim", "num_global_key_value_heads"):
            if text.has(key):
                raise CheckpointError(
                    f"config.json gives the heads of layers twice, in per_layer_config and in {key}", key=key
                )
        of_layer = [plain] * len(kinds)
        for layer, one in given:
            num_kv_heads = one.integer("num_key_value_heads", default=shape.num_kv_heads)
            of_layer[layer] = num_kv_heads, one.integer("head_dim", default=shape.head_dim)
            one.finish()
        heads = dict(zip(kinds, of_layer, strict=True))
        if [heads[kind] for kind in kinds] != of_layer:
            raise text.unsupported("per_layer_config", "the same heads in all layers of a kind")
    for kind, (num_kv_heads, _) in heads.items():
        if shape.num_heads % num_kv_heads:
            raise CheckpointError(
                f"config.json gives layers with {kind} {num_kv_heads} key heads, expected a divisor of "
                f"num_attention_heads, which is {shape.num_heads}",
                key="num_global_key_value_heads" if given is None else "per_layer_config",
            )
    return heads
