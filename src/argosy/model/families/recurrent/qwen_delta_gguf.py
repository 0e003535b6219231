"""The `qwen3next` and `qwen35moe` architectures of GGUF.

Their converter has already applied two steps that the kernels do for other files: norms hold their whole weight, and
the decay rate is not a logarithm. In `qwen35moe`, value heads are in another order: heads that share a key head are
not adjacent, but as far apart as there are key heads. In `qwen3next`, b and a share a matrix, and older files have q,
k, v and z in one, `ssm_in`.
"""

from __future__ import annotations

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import AttentionConfig, DeltaConfig, LayerConfig, ModelConfig, RouterConfig
from argosy.errors import CheckpointError
from argosy.model.reading.gguf_config import GgufConfigReader
from argosy.model.reading.gguf_layout import read_gguf_layout
from argosy.model.reading.rope_config import Axes

DELTA_NAMES = {
    "mlp_norm": "post_attention_norm.weight",
    "delta_qkvz": "ssm_in.weight",
    "delta_qkv": "attn_qkv.weight",
    "delta_z": "attn_gate.weight",
    "delta_ba": "ssm_ba.weight",
    "delta_b": "ssm_beta.weight",
    "delta_a": "ssm_alpha.weight",
    "delta_conv": "ssm_conv1d.weight",
    "delta_rate": "ssm_a",
    "delta_dt_bias": "ssm_dt.bias",
    "delta_norm": "ssm_norm.weight",
    "delta_out": "ssm_out.weight",
}


def open_delta_gguf(
    file: GgufFile, architecture: str, family: str, *, axes: Axes | None = None
) -> ModelFiles:
    """The model in a GGUF file of either architecture; `axes` as for `GgufConfigReader.common`.

    Raises:
        UnsupportedModel: a key, value or tensor type that is not supported.
        CheckpointError: a key or tensor is missing, malformed, or contradicts another.
    """
    reader = GgufConfigReader(file, architecture)
    common = reader.common(has_partial_rope=True, axes=axes)
    # For layers without experts, and all layers have experts.
    reader.integer("feed_forward_length", 0, least=0)
    delta = read_delta(reader)
    attention = AttentionConfig(**common.attention, qk_norm="head", output_gate="query")
    layers = tuple(
        LayerConfig(mixer=delta if is_recurrent else attention, is_moe=True)
        for is_recurrent in recurrent_layers(reader)
    )
    config = ModelConfig(
        family=family,
        layers=layers,
        expert_width=reader.integer("expert_feed_forward_length"),
        router=RouterConfig(renormalize=reader.flag("expert_weights_norm", True)),
        shared_width=reader.integer("expert_shared_feed_forward_length"),
        shared_is_gated=True,
        draft_form="qwen",
        num_mtp_layers=reader.num_mtp_layers(),
        **common.model,
    )
    reader.finish()
    return read_gguf_layout(file, config, is_paired=False, has_rope_freqs=False, names=DELTA_NAMES)


def recurrent_layers(reader: GgufConfigReader) -> tuple[bool, ...]:
    """Whether each layer has a delta net.

    If the file lists the layers, the list decides, as in llama.cpp. Its converter takes the list from `layer_types`,
    and the interval from a key that transformers 5 drops, so the interval is 4 whatever the model has. The list
    includes layers for multi-token prediction. If the tensors contradict the list, they are refused.
    """
    num_layers = reader.num_layers()
    interval = reader.integer("full_attention_interval", 4)
    listed = reader.flags("attention.recurrent_layers", num_layers + reader.num_mtp_layers())
    if listed is not None:
        return listed[:num_layers]
    return tuple((layer + 1) % interval != 0 for layer in range(num_layers))


def read_delta(reader: GgufConfigReader, *, has_sigmoid_gate: bool = False) -> DeltaConfig:
    """Sizes of the delta nets, stored under the key names of another recurrent layer."""
    key_heads, value_heads = reader.integer("ssm.group_count"), reader.integer("ssm.time_step_rank")
    channels = reader.integer("ssm.inner_size")
    if channels % value_heads or value_heads % key_heads:
        raise CheckpointError(
            f"{reader.file.path.name}: {reader.key('ssm.inner_size')} is {channels}, in {value_heads} value heads for "
            f"{key_heads} key heads; expected each to be a multiple of the next",
            path=reader.file.path,
            key=reader.key("ssm.inner_size"),
        )
    tensors = reader.file.tensors
    return DeltaConfig(
        num_key_heads=key_heads,
        num_value_heads=value_heads,
        key_dim=reader.integer("ssm.state_size"),
        value_dim=channels // value_heads,
        conv_width=reader.integer("ssm.conv_kernel", most=64),
        has_joined_qkvz=any(name.endswith(".ssm_in.weight") for name in tensors),
        has_joined_ba=any(name.endswith(".ssm_ba.weight") for name in tensors),
        is_tiled=any(name.endswith(".ssm_alpha.weight") for name in tensors),
        is_rate_log=False,
        has_sigmoid_gate=has_sigmoid_gate,
    )
