"""Families whose layers choose the positions that a token sees: which have an indexer, what is refused, and that
tokens beyond as many positions as are chosen see no others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy import Engine
from argosy.config import IndexConfig, LatentConfig
from argosy.errors import CheckpointError, UnsupportedModel
from argosy.model.families import FAMILIES
from tests.families.hub_configs import DEEPSEEK_V32, GLM_5, GLM_5_2, RawConfig
from tests.models.numpy_model import NumpyModel
from tests.models.tiny import prompt_ids, write_model
from tests.models.tiny_hy4 import hy_v4
from tests.models.tiny_latent import glm_moe_dsa

OF_GLM = IndexConfig(num_chosen=2048, num_heads=32, head_dim=128, is_interleaved=True, norm_eps=1e-6)


def indexers(raw: RawConfig) -> list[IndexConfig | None]:
    config = FAMILIES[raw["model_type"]].parse_config(raw)
    return [layer.mixer.index for layer in config.layers if isinstance(layer.mixer, LatentConfig)]


def kinds(raw: RawConfig) -> str:
    return "".join(index.kind[0] for index in indexers(raw) if index)


def glm(**changes: Any) -> RawConfig:
    unread = ("indexer_types", "index_topk_freq", "index_skip_topk_offset", "index_topk_pattern")
    return {key: value for key, value in GLM_5_2.items() if key not in unread} | changes


def test_released_models_have_an_indexer_in_every_layer_or_in_every_fourth() -> None:
    of_deepseek = IndexConfig(
        num_chosen=2048, num_heads=64, head_dim=128, is_interleaved=False, norm_eps=1e-6
    )
    assert indexers(DEEPSEEK_V32) == [of_deepseek] * 61
    assert indexers(GLM_5) == [OF_GLM] * 78
    assert kinds(GLM_5_2) == "oo" + "osss" * 19
    assert set(indexers(GLM_5_2)) >= {OF_GLM}


def test_types_a_pattern_and_a_schedule_say_the_same() -> None:
    expected = kinds(GLM_5_2)
    assert kinds(glm(index_topk_freq=4, index_skip_topk_offset=3)) == expected
    assert kinds(glm(index_topk_pattern="FF" + "FSSS" * 19)) == expected
    assert kinds(glm(index_topk_freq=4)) == "o" + "osss" * 19 + "o"  # the offset of the class is 2
    # A list may go on for the layers of multi-token prediction.
    assert kinds(glm(indexer_types=[*GLM_5_2["indexer_types"], "full"])) == expected


def test_the_pairs_of_an_indexer_may_be_given() -> None:
    (index,) = set(indexers(DEEPSEEK_V32 | {"indexer_rope_interleave": True}))
    assert index is not None
    assert index.is_interleaved


@pytest.mark.parametrize(
    ("raw", "error", "sentence"),
    [
        (
            DEEPSEEK_V32 | {"q_lora_rank": None},
            CheckpointError,
            "q_lora_rank is null; expected a whole number",
        ),
        (DEEPSEEK_V32 | {"index_topk": 0}, CheckpointError, "index_topk is 0"),
        (
            DEEPSEEK_V32 | {"index_topk": 2**31 - 1},
            CheckpointError,
            "expected a whole number from 1 to 1073741824",
        ),
        (DEEPSEEK_V32 | {"index_head_dim": 32}, CheckpointError, "index_head_dim is 32, less than the 64"),
        (
            DEEPSEEK_V32 | {"rope_interleave": False},
            UnsupportedModel,
            "rope_interleave false; supported: true",
        ),
        (DEEPSEEK_V32 | {"indexer_types": []}, UnsupportedModel, "sets indexer_types to []"),
        (DEEPSEEK_V32 | {"layer_types": ["other"] * 61}, UnsupportedModel, "other"),
        (glm(indexer_types=["shared"] * 78), CheckpointError, "'full' for the first"),
        (glm(indexer_types=["full"] * 77), CheckpointError, "has 77 entries"),
        (glm(index_topk_pattern="FX" * 39), CheckpointError, "expected 'full' or 'shared'"),
        (glm(index_topk_pattern=4), CheckpointError, "index_topk_pattern is 4"),
        (glm(moe_router_dtype="bfloat16"), UnsupportedModel, "moe_router_dtype"),
        (glm(index_kpool=4), UnsupportedModel, "sets index_kpool to 4"),
        *(
            (hy_v4(**{key: value}), UnsupportedModel, key)
            for key, value in (
                ("enable_ihc", False),
                ("gated_mla", False),
                ("gating_type", "headwise"),
                ("learnable_sink", False),
                ("use_dsa", False),
                ("attention_bias", True),
                ("hc_sinkhorn_iters", 20),
                ("layer_types", ["full_attention"] * 3),
            )
        ),
        (hy_v4(hc_mult=1), CheckpointError, "hc_mult is 1"),
        (hy_v4(indexer_types=["shared", "full", "full"]), CheckpointError, "'full' for the first"),
        (glm(head_dim=100), UnsupportedModel, "head_dim 100; supported: 64 or 256 or 576 or 192 or null"),
    ],
)
def test_what_an_indexer_cannot_be_is_refused(raw: RawConfig, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error) as caught:
        indexers(raw)
    assert sentence in str(caught.value)


@pytest.mark.full
@pytest.mark.parametrize("num_tokens", [2049, 4096])
def test_logits_of_long_prompts_are_those_of_attention_masked_to_the_chosen_positions(
    num_tokens: int, tmp_path: Path
) -> None:
    """At 2,049 tokens, one position counts for one token: seeing it too would change its logits by 3e-3. Of 20,000
    positions, `tests/native/test_position_index.py` compares a layer's attention.
    """
    config = glm_moe_dsa(
        index_n_heads=2,
        index_topk=2048,
        indexer_types=["full", "shared"],
        max_position_embeddings=8192,
        num_attention_heads=2,
        num_hidden_layers=2,
        num_key_value_heads=2,
    )
    model, prompt = write_model(tmp_path, config, seed=3), prompt_ids(config, 5, num_tokens)
    with Engine.open(model, memory="4GiB", threads=2, context=num_tokens + 1) as engine:
        logits = engine.logits(prompt)
    expected = NumpyModel(model).logits(prompt)
    differs = np.abs(logits - expected).max(axis=1) > 1e-5 * np.abs(expected).max()
    # Scores near that of the last position chosen may be rounded past it: 6 of 2,048 tokens.
    assert differs.sum() <= (num_tokens - 2048) // 100
