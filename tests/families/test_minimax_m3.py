"""MiniMax-M3: what its configs may say about the indexer, and keys of transformers beside those of the hub."""

from __future__ import annotations

import re
from typing import Any

import pytest

from argosy.config import AttentionConfig, BlockIndexConfig, ModelConfig
from argosy.errors import CheckpointError, UnsupportedModel
from argosy.model.families.wrappers.minimax_m3_vl import parse_config
from tests.families.published_sparse import MINIMAX_M3
from tests.models.tiny_minimax_m3 import minimax_m3


def indexes(config: ModelConfig) -> list[BlockIndexConfig | None]:
    return [one.mixer.index for one in config.layers if isinstance(one.mixer, AttentionConfig)]


def test_the_released_model_sees_2048_positions_from_the_fourth_layer_on() -> None:
    found = indexes(parse_config(MINIMAX_M3))
    assert found[:3] == [None] * 3
    assert [index and index.num_positions for index in found[3:]] == [2048] * 57


def test_keys_that_transformers_writes_mean_the_same() -> None:
    config = minimax_m3()
    sparse = config["text_config"].pop("sparse_attention_config")
    config["text_config"] |= {
        "index_block_size": sparse["sparse_block_size"],
        "index_head_dim": sparse["sparse_index_dim"],
        "index_local_blocks": sparse["sparse_local_block"],
        "index_n_heads": sparse["sparse_num_index_heads"],
        "index_topk_blocks": sparse["sparse_topk_blocks"],
        "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
    }
    assert parse_config(config) == parse_config(minimax_m3())


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (
            {"sparse_block_size": 24},
            CheckpointError,
            "24 positions of an index block, expected a multiple of 16",
        ),
        (
            {"sparse_block_size": 8192, "sparse_topk_blocks": (1 << 17) + 1},
            CheckpointError,
            "1073750016 positions in the blocks that an indexer chooses, expected up to 1073741824",
        ),
        ({"sparse_index_dim": 4}, CheckpointError, "4 index dimensions, expected at least 6, which rotate"),
        (
            {"sparse_local_block": 3},
            CheckpointError,
            "3 local blocks, expected at most the 2 that a token sees",
        ),
        ({"sparse_num_index_heads": 6}, UnsupportedModel, "supported: 2, as num_key_value_heads"),
        ({"sparse_init_block": 1}, UnsupportedModel, "sparse_init_block"),
        ({"sparse_score_type": "mean"}, UnsupportedModel, "sparse_score_type"),
        ({"sparse_disable_index_value": [0, 0, 1]}, UnsupportedModel, "1 in every layer with an indexer"),
        (
            {"sparse_attention_freq": [0, 1]},
            CheckpointError,
            "sparse_attention_freq has 2 entries, expected 3",
        ),
        ({"sparse_new_rule": 1}, UnsupportedModel, "sparse_attention_config sets sparse_new_rule"),
    ],
)
def test_an_indexer_of_another_kind_is_refused(
    index: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        parse_config(minimax_m3(index=index))
