"""The configurations of Hy4; those of the older models are in other files."""

from __future__ import annotations

from tests.models.configuration import Configuration
from tests.models.tiny_hy4 import hy_v4

CONFIGURATIONS = (
    Configuration(name="hy_v4_plain", config=hy_v4()),
    Configuration(
        name="hy_v4_two_streams_tied_f32",
        config=hy_v4(
            hc_eps=1e-3,
            hc_magnitude=1.3,
            hc_mult=2,
            index_head_dim=6,
            index_topk=9,
            indexer_types=["full", "shared"],
            layer_types=["indexed_attention"] * 2,
            mlp_layer_types=["sparse", "sparse"],
            n_shared_experts=2,
            norm_topk_prob=False,
            num_experts_per_tok=3,
            num_hidden_layers=2,
            num_nextn_predict_layers=0,
            rope_parameters={
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "rope_theta": 1e4,
                "rope_type": "yarn",
            },
            tie_word_embeddings=True,
        ),
        dtype="F32",
    ),
)
