"""Code shared by the MoE families of Qwen: the layers with routed experts, and tensor names."""

from __future__ import annotations

from collections.abc import Mapping

from argosy.errors import CheckpointError
from argosy.model.reading.config_reader import ConfigReader
from argosy.model.reading.layout import ATTENTION_NAMES, Layout, separate_and_fused

_LAYER_NAMES = {
    **ATTENTION_NAMES,
    "router": "mlp.gate.weight",
    "shared_gate": "mlp.shared_expert.gate_proj.weight",
    "shared_up": "mlp.shared_expert.up_proj.weight",
    "shared_down": "mlp.shared_expert.down_proj.weight",
    "shared_score": "mlp.shared_expert_gate.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}


def make_layouts(
    more_names: Mapping[str, str] = {}, passed_over: str | None = None, mtp_prefix: str | None = None
) -> tuple[Layout, ...]:
    """Layouts with separate and fused experts; `more_names` are for a family with mixers other than attention."""
    return separate_and_fused({**_LAYER_NAMES, **more_names}, passed_over, mtp_prefix)


LAYOUTS = make_layouts()


def read_moe_layers(reader: ConfigReader, num_layers: int) -> tuple[bool, ...]:
    """Return whether each layer has routed experts.

    Layer i has routed experts if i + 1 is a multiple of `decoder_sparse_step` and `mlp_only_layers` does not list i
    (Qwen2MoeDecoderLayer and Qwen3MoeDecoderLayer in transformers 5.24).

    Raises:
        CheckpointError: no layer has routed experts.
    """
    dense_layers = reader.integers("mlp_only_layers", least=0, most=num_layers - 1)
    step = reader.integer("decoder_sparse_step", default=1)
    is_moe = tuple(layer not in dense_layers and (layer + 1) % step == 0 for layer in range(num_layers))
    if not any(is_moe):
        raise CheckpointError(
            f"config.json leaves none of the {num_layers} layers with routed experts: mlp_only_layers is "
            f"{list(dense_layers)}, decoder_sparse_step is {step}",
            key="mlp_only_layers",
        )
    return is_moe
