"""The configurations of Qwen3.8-Flash-Next."""

from __future__ import annotations

from tests.models.configuration import Configuration
from tests.models.tiny_qwen4 import qwen4_exp, qwen4_exp_text

_DELTA, _FULL = "linear_attention", "full_attention"

CONFIGURATIONS = (
    Configuration(name="qwen4_exp_text_plain", config=qwen4_exp_text()),
    Configuration(
        name="qwen4_exp_text_tied_bias_two_tables",
        config=qwen4_exp_text(
            attention_bias=True,
            hc_count=2,
            hc_lowrank=3,
            heads_per_ngram=1,
            hidden_size=16,
            head_dim=8,
            indexer_budget=14,
            indexer_compress_ratio=2,
            indexer_head_dim=6,
            layer_types=[_DELTA, _DELTA, _FULL, _DELTA],
            moe_intermediate_size=5,
            ngram_size=4,
            num_experts=3,
            norm_topk_prob=False,
            num_hidden_layers=4,
            output_gate_type="silu",
            ple_conv_kernel_size=2,
            ple_embed_dim=15,
            ple_layer_ids=[2, 4],
            split_ngram_parts=1,
            tie_word_embeddings=True,
        ),
        dtype="F16",
    ),
    Configuration(
        name="qwen4_exp_text_no_table_f32_sharded",
        config=qwen4_exp_text(
            hc_count=4,
            head_dim=8,
            indexer_budget=16,
            indexer_compress_ratio=8,
            indexer_n_heads=2,
            layer_types=[_FULL, _DELTA],
            linear_num_key_heads=1,
            linear_num_value_heads=3,
            num_experts=3,
            num_experts_per_tok=1,
            num_hidden_layers=2,
            ple_layer_ids=[],
            rope_parameters={"factor": 2.0, "rope_theta": 1e4, "rope_type": "linear"},
        ),
        dtype="F32",
        num_shards=2,
    ),
    Configuration(
        name="qwen4_exp_text_wide_hash",
        config=qwen4_exp_text(
            heads_per_ngram=3, ngram_vocab_size_base=20, seed=7, split_ngram_parts=4, vocab_size=61
        ),
    ),
    Configuration(name="qwen4_exp_plain", config=qwen4_exp()),
    Configuration(
        name="qwen4_exp_tied",
        config=qwen4_exp(ngram_size=2, num_experts=7, tie_word_embeddings=True, ple_embed_dim=14),
    ),
)
