"""Ring-linear 2.0: the meaning of the config, refusals, and logits against float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from argosy import Engine
from argosy.config import AttentionConfig, LightningConfig, ModelConfig
from argosy.errors import ArgosyError
from argosy.model.families import FAMILIES
from tests.families.hub_ling import RING_MINI_LINEAR_2
from tests.models import tiny_ring
from tests.models.numpy_model import NumpyModel, Places
from tests.models.references import LARGEST_DIFFERENCE, difference
from tests.models.safetensors_file import Array, read_checkpoint
from tests.models.tiny import RawConfig, prompt_ids, write_model
from tests.models.tiny_ring import ring_linear


def parse(raw: RawConfig) -> ModelConfig:
    return FAMILIES["bailing_moe_linear"].parse_config(raw)


def test_the_hub_s_config_is_read() -> None:
    config = parse(RING_MINI_LINEAR_2)
    assert [i for i in range(20) if i not in config.recurrent_layers] == [4, 9, 14, 19]
    rope = config.attention.rope
    assert config.attention == AttentionConfig(
        num_heads=16, num_kv_heads=4, head_dim=128, rope=rope, qk_norm="head"
    )
    first, second = (config.layers[layer].mixer for layer in (0, 1))
    assert isinstance(first, LightningConfig)
    assert isinstance(second, LightningConfig)
    assert second == LightningConfig(
        slopes=second.slopes, head_dim=128, norm_eps=1e-6, num_groups=4, rope=rope, has_qk_norm=True, scale=128**-0.5
    )  # fmt: skip
    assert first.slopes[0] == pytest.approx(2**-0.5 * (1 + 1 / 19 + 1e-5))
    assert second.slopes[15] == pytest.approx(2**-8 * (1 + 1e-5))
    assert config.eos_ids == (156_892,)


def test_layers_behind_the_last_whole_group_have_softmax_attention() -> None:
    config = parse(ring_linear(num_hidden_layers=8, layer_group_size=3))
    assert config.recurrent_layers == (0, 1, 3, 4)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"layer_group_size": None}, "layer_group_size is null"),
        ({"group_norm_size": 5}, "group_norm_size 5; supported: a divisor of 48, the rows of all heads"),
        ({"use_qkv_bias": True}, "asks for use_qkv_bias true; supported: false"),
        ({"linear_rope": False}, "asks for linear_rope false; supported: true"),
        ({"num_kv_heads_for_linear_attn": 2}, "asks for num_kv_heads_for_linear_attn 2; supported: 0"),
        ({"score_function": "softmax"}, "asks for score_function 'softmax'; supported: 'sigmoid'"),
        ({"kv_lora_rank": 512}, "sets kv_lora_rank to 512, but bailing_moe_linear does not know this key"),
    ],
)
def test_unsupported_features_are_refused_by_name(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ArgosyError) as caught:
        parse(ring_linear(**changes))
    assert sentence in str(caught.value)


class RingModel(NumpyModel):
    """Ling in numpy, with lightning attention in the layers that have it."""

    def __init__(self, directory: Path) -> None:
        self.ring: RawConfig = json.loads((directory / "config.json").read_text())
        self.ring_tensors = {name: x.astype(float) for name, x in read_checkpoint(directory).items()}
        (directory / "config.json").write_text(json.dumps(self.ring | {"model_type": "bailing_moe"}))
        super().__init__(directory)
        (directory / "config.json").write_text(json.dumps(self.ring))

    def attention(self, layer: int, x: Array, places: Places) -> Array:
        if not tiny_ring.is_linear(self.ring, layer):
            return super().attention(layer, x, places)
        return tiny_ring.lightning_attention(self.ring, self.ring_tensors, layer, x)


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({}, "BF16"),
        ({"linear_silu": True, "group_norm_size": 1, "num_hidden_layers": 5, "partial_rotary_factor": 1.0}, "F32"),
        ({"layer_group_size": 3, "num_attention_heads": 8, "head_dim": 8, "group_norm_size": 4,
          "num_hidden_layers": 4, "hidden_size": 20, "tie_word_embeddings": True, "rms_norm_eps": 1e-4}, "F32"),
    ],
)  # fmt: skip
def test_logits_are_those_of_float64(changes: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    config = ring_linear(**changes)
    write_model(tmp_path, config, seed=4, dtype=dtype)
    prompt = prompt_ids(config, 4)
    model = RingModel(tmp_path)
    expected = model.logits(prompt)
    assert model.router_margin > 1e-4
    with Engine.open(tmp_path, memory="4GiB", kv_dtype="f32", threads=1) as engine:
        assert difference(engine.logits(prompt), expected) <= LARGEST_DIFFERENCE
