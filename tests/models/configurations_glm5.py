"""The configurations of GLM-5.3-Flash that have committed references."""

from __future__ import annotations

from tests.models.configuration import Configuration
from tests.models.tiny_glm5 import glm5_next

_DELTA, _LATENT = "linear_attention", "indexed_attention"

CONFIGURATIONS = (
    Configuration(name="glm5_next_plain", config=glm5_next()),
    Configuration(
        name="glm5_next_chosen_pools",
        config=glm5_next(
            index_kpool=4, index_topk=8, index_n_heads=8, index_head_dim=7, num_hidden_layers=4,
            layer_types=[_LATENT, _LATENT, _DELTA, _LATENT], indexer_types=["full", "shared", "full", "full"],
            mlp_layer_types=["dense", "dense", "dense", "sparse"], first_k_dense_replace=3, hc_mult=2,
        ),
    ),
    Configuration(
        name="glm5_next_two_streams_tied",
        config=glm5_next(
            first_k_dense_replace=0, hc_mult=2, hc_sinkhorn_iters=3, hc_eps=1e-3, layer_types=[_LATENT, _DELTA],
            linear_head_dim=7, linear_num_heads=4,
            mlp_layer_types=["sparse", "sparse"], n_group=1, n_routed_experts=3,
            num_hidden_layers=2, rms_norm_eps=1e-3, swiglu_limit=0.3, tie_word_embeddings=True,
            routed_scaling_factor=1.0, norm_topk_prob=False, linear_conv_kernel_dim=3, linear_lower_bound=-3.0,
        ),
    ),
)  # fmt: skip
