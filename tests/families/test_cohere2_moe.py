"""Command-A-plus and North-Mini-Code: the meaning of the configs, refusals, and GGUF files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy import Engine
from argosy.config import AttentionConfig, ModelConfig, RouterConfig
from argosy.errors import ArgosyError
from argosy.model.families import FAMILIES
from tests.families.published import NORTH_MINI_CODE
from tests.models.gguf_models import one_type, write_gguf_model
from tests.models.numpy_model import NumpyModel, softmax
from tests.models.references import LARGEST_DIFFERENCE, difference
from tests.models.tiny import RawConfig, prompt_ids
from tests.models.tiny_cohere import FULL, SLIDING, cohere2_moe


def parse(raw: RawConfig) -> ModelConfig:
    return FAMILIES["cohere2_moe"].parse_config(raw)


def attentions(config: ModelConfig) -> list[AttentionConfig]:
    mixers = [layer.mixer for layer in config.layers]
    assert all(isinstance(mixer, AttentionConfig) for mixer in mixers)
    return mixers  # type: ignore[return-value]


def test_the_released_config_has_parallel_layers_that_rotate_only_within_windows() -> None:
    config = parse(NORTH_MINI_CODE)
    assert (config.is_parallel, config.norm_kind, config.norm_eps, config.has_post_norms) == (
        True,
        "rms",
        1e-6,
        False,
    )
    first, sliding, full = (attentions(config)[i] for i in (0, 1, 4))
    assert (first.sliding_window, sliding.sliding_window, full.sliding_window) == (0, 4096, 0)
    assert first.rope == sliding.rope
    assert first.rope is not None
    assert (first.rope.is_interleaved, first.rope.theta, full.rope) == (True, 5e4, None)
    assert [i for i, one in enumerate(attentions(config)) if one == full] == list(range(4, 49, 4))
    assert config.router == RouterConfig(score="sigmoid", renormalize=False)
    assert (config.moe_layers, config.dense_width, config.expert_width) == (tuple(range(1, 49)), 3072, 768)
    assert (config.shared_width, config.shared_is_averaged, config.is_embedding_tied) == (0, False, True)


def test_absent_keys_have_the_defaults_of_transformers() -> None:
    config = parse({"model_type": "cohere2_moe"})
    assert (config.num_layers, config.hidden_size, config.vocab_size) == (40, 8192, 256_000)
    assert (config.num_experts, config.experts_per_token, config.expert_width) == (8, 2, 22_528)
    assert (config.norm_kind, config.norm_eps, config.logit_scale) == ("layer", 1e-5, 0.0625)
    assert (config.router, config.eos_ids, config.bos_id) == (RouterConfig(), (255_001,), 5)
    full, sliding = attentions(config)[3], attentions(config)[0]
    assert (full.num_heads, full.num_kv_heads, full.rope, full.sliding_window) == (64, 64, None, 0)
    assert [i for i, one in enumerate(attentions(config)) if one == sliding] == [
        i for i in range(40) if i % 4 != 3
    ]


def test_kinds_of_layers_are_counted_from_the_first_with_experts() -> None:
    kinds = {
        "layer_types": None,
        "num_hidden_layers": 7,
        "first_k_dense_replace": 2,
        "sliding_window_pattern": 3,
    }
    config = parse(cohere2_moe(**kinds, prefix_dense_sliding_window_pattern=2))
    assert [one.sliding_window > 0 for one in attentions(config)] == [
        True,
        False,
        True,
        True,
        False,
        True,
        True,
    ]
    assert [one.rope is not None for one in attentions(config)] == [
        True,
        False,
        True,
        True,
        False,
        True,
        True,
    ]
    config = parse(cohere2_moe(**kinds, prefix_dense_sliding_window_pattern=1))
    assert [one.sliding_window > 0 for one in attentions(config)] == [
        False,
        False,
        True,
        True,
        False,
        True,
        True,
    ]
    assert [one.rope is not None for one in attentions(config)] == [True, True, True, True, False, True, True]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"use_parallel_block": False}, "asks for use_parallel_block false; supported: true"),
        ({"use_qk_norm": True}, "asks for use_qk_norm true; supported: false"),
        ({"rotary_pct": 0.5}, "asks for rotary_pct 0.5"),
        ({"position_embedding_type": "rope"}, "asks for position_embedding_type 'rope'"),
        ({"expert_selection_fn": "tanh"}, "asks for expert_selection_fn 'tanh'; supported: softmax, sigmoid"),
        ({"shared_expert_combination_strategy": "max"}, "asks for shared_expert_combination_strategy 'max'"),
        ({"layer_types": [FULL, SLIDING]}, "layer_types has 2 entries, expected one for each of 4 layers"),
        ({"mlp_layer_types": ["dense"] * 4}, "at least one 'sparse'"),
        ({"sliding_window": None}, "asks for sliding_window null"),
        ({"logit_scale": 0}, "logit_scale is 0"),
        ({"hidden_act": "gelu"}, "asks for hidden_act 'gelu'"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1"),
        ({"router_bias": True}, "sets router_bias to true"),
    ],
)  # fmt: skip
def test_unsupported_features_are_refused_by_name(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ArgosyError) as caught:
        parse(cohere2_moe(**changes))
    assert sentence in str(caught.value)


_WIDE = {"hidden_size": 64, "head_dim": 32, "intermediate_size": 32, "prefix_dense_intermediate_size": 64}


@pytest.mark.parametrize(
    ("type_name", "changes"),
    [
        ("F32", {"layer_types": [SLIDING, FULL, SLIDING, FULL]}),
        ("F32", {"rms_norm_eps": None, "expert_selection_fn": "softmax", "num_shared_experts": 2}),
        ("Q8_0", {"num_shared_experts": 0, "num_experts_per_tok": 5, **_WIDE}),
    ],
)  # fmt: skip
def test_a_gguf_file_answers_as_its_dequantised_weights(
    type_name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    config = cohere2_moe(**{"num_experts_per_tok": 3} | changes)
    directory = write_gguf_model(tmp_path / "model.gguf", config, one_type(type_name), seed=7)
    prompt = prompt_ids(config, 7)
    expected = NumpyModel(directory).logits(prompt)
    with Engine.open(tmp_path / "model.gguf", memory="4GiB", threads=1) as engine:
        logits = engine.logits(prompt)
    if type_name == "F32":
        assert difference(logits, expected) <= LARGEST_DIFFERENCE
    p, q = softmax(expected), softmax(logits.astype(np.float64))
    assert float((p * np.log(p / q)).sum(axis=1).mean()) <= 0.002
