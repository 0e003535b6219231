"""Flint and Lara-4-Mini: the meaning of their configs, their tensors, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy import Engine
from argosy.checkpoint.geometry import count_parameters
from argosy.checkpoint.pack import pack
from argosy.config import AttentionConfig, DeltaConfig, ModelConfig
from argosy.errors import ArgosyError
from argosy.model.families import FAMILIES, open_model
from tests.models.references import LARGEST_DIFFERENCE, difference
from tests.models.safetensors_file import read_checkpoint, write_checkpoint
from tests.models.tiny import RawConfig, prompt_ids, write_model
from tests.models.tiny_flint import DELTA, FULL, SLIDING, flint, lara_mini


def parse(raw: RawConfig) -> ModelConfig:
    return FAMILIES[raw["model_type"]].parse_config(raw)


def attentions(config: ModelConfig) -> dict[int, AttentionConfig]:
    return {
        at: layer.mixer for at, layer in enumerate(config.layers) if isinstance(layer.mixer, AttentionConfig)
    }


def test_absent_keys_of_flint_are_those_of_the_released_model() -> None:
    config = parse({"model_type": "flint"})
    assert [at for at, one in attentions(config).items() if one.sliding_window == 0] == [
        0, 1, 5, 9, 13, 17, 21, 25, 29, 33, 37, 41, 45, 48,
    ]  # fmt: skip
    for one in attentions(config).values():
        assert (one.rope is None) == (one.sliding_window == 0)
        assert (one.sliding_window, one.has_sinks, one.qk_norm) in ((0, True, "head"), (513, True, "head"))
    assert config.moe_layers == tuple(range(2, 49))
    router = config.router
    assert (router.score, router.has_choice_bias, router.renormalize) == ("sigmoid", False, True)
    assert (config.shared_width, config.shared_is_gated, config.norm_offset) == (1024, False, 0.0)
    # As in the documentation of NVIDIA's NeMo AutoModel.
    assert count_parameters(config)[0] == pytest.approx(39.8e9, rel=0.005)
    assert parse(flint(mlp_only_layers=None)) == parse(flint())
    assert parse(flint(mlp_only_layers=[])).moe_layers == (0, 1, 2, 3, 4)


def test_absent_keys_of_lara_have_the_defaults_of_transformers() -> None:
    config = parse({"model_type": "lara_mini"})
    pattern = [DeltaConfig, 512, DeltaConfig, 0, 512]
    assert [
        layer.mixer.sliding_window if isinstance(layer.mixer, AttentionConfig) else type(layer.mixer)
        for layer in config.layers
    ] == (pattern * 7)[:34]
    for one in attentions(config).values():
        assert (one.rope is None) == (one.sliding_window == 0)
        assert (one.output_gate, one.has_sinks) == ("none", False)
    delta = config.layers[0].mixer
    assert isinstance(delta, DeltaConfig)
    assert delta.sizes == (8, 16, 128, 128, 4)
    assert (config.is_embedding_tied, config.eos_ids, config.norm_offset) == (True, (151_643,), 0.0)
    assert (config.router.score, config.shared_width, config.shared_is_gated) == ("softmax", 512, False)


@pytest.mark.parametrize(
    ("make", "changes", "sentence"),
    [
        (flint, {"layer_types": [DELTA] * 5}, "layer_types 'linear_attention'; supported: full_attention, sliding"),
        (flint, {"layer_types": [FULL]}, "layer_types has 1 entries, expected one for each of 5"),
        (flint, {"mlp_only_layers": [0, 1, 2, 3, 4]}, "leaves none of the 5 layers with routed experts"),
        (flint, {"sliding_window": None}, "sliding_window null; supported: a number"),
        (flint, {"no_rope_layer_indices": [0, 1]}, "no_rope_layer_indices [0, 1]; supported: [0, 1, 4]"),
        (flint, {"qkv_bias": True}, "sets qkv_bias to true, but flint does not know this key"),
        (flint, {"hidden_act": "gelu"}, "hidden_act 'gelu'; supported: silu"),
        (lara_mini, {"layer_types": [SLIDING]}, "layer_types has 1 entries, expected one for each of 5"),
        (lara_mini, {"layer_types": ["conv"] * 5}, "layer_types 'conv'; supported: linear_attention, sliding"),
        (lara_mini, {"linear_num_value_heads": 3}, "linear_num_value_heads is 3, expected a multiple of"),
        (lara_mini, {"sliding_window": None}, "sliding_window null; supported: a number"),
        (lara_mini, {"intermediate_size": 9}, "sets intermediate_size to 9, but lara_mini does not know this key"),
        (lara_mini, {"mlp_only_layers": [0]}, "sets mlp_only_layers to [0]"),
    ],
)  # fmt: skip
def test_what_a_config_may_not_ask_for(
    make: Callable[..., RawConfig], changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ArgosyError) as refused:
        parse(make(**changes))
    assert sentence in str(refused.value)


def test_the_projections_of_a_delta_net_follow_each_other_in_one_tensor(tmp_path: Path) -> None:
    write_model(tmp_path, lara_mini(), seed=1)
    name, dense = "model.layers.0.linear_attn.in_proj.weight", open_model(tmp_path).dense
    rows = read_checkpoint(tmp_path)[name].shape[0]
    parts = [dense[f"layers.0.delta_{part}"] for part in ("qkv", "z", "b", "a")]
    assert {part.name for part in parts} == {name}
    assert sum(part.rows for part in parts) == rows
    starts = [part.offset - parts[0].offset for part in parts]
    assert starts == [0, 76 * 40, 112 * 40, 116 * 40]  # bytes of 20 columns in bfloat16


@pytest.mark.parametrize("make", [flint, lara_mini])
def test_a_pack_answers_as_its_checkpoint(make: Callable[..., RawConfig], tmp_path: Path) -> None:
    config = make(max_position_embeddings=256)
    source, packed = tmp_path / "model", tmp_path / "packed"
    write_model(source, config, seed=2)
    pack(open_model(source), packed, format="source")
    logits = []
    for place in (source, packed):
        with Engine.open(place, memory="4GiB", threads=1, kv_dtype="f32") as engine:
            logits.append(engine.logits(prompt_ids(config, 5)))
    assert difference(logits[1], logits[0]) <= LARGEST_DIFFERENCE


@pytest.mark.parametrize(
    ("make", "extra"), [(flint, "0.self_attn.sinks"), (lara_mini, "0.linear_attn.norm.weight")]
)
def test_a_tensor_under_the_name_in_transformers_is_refused(
    make: Callable[..., RawConfig], extra: str, tmp_path: Path
) -> None:
    write_model(tmp_path, make(), seed=1)
    tensors = read_checkpoint(tmp_path) | {f"model.layers.{extra}": np.ones(4, np.float32)}
    write_checkpoint(tmp_path, {name: ("BF16", values) for name, values in tensors.items()})
    with pytest.raises(ArgosyError, match=extra):
        open_model(tmp_path)
