"""Configurations of families without experts."""

from __future__ import annotations

from tests.models.configuration import Configuration, yarn
from tests.models.tiny import respelt
from tests.models.tiny_dense import gemma3, gemma3_text, granite, llama, mistral, qwen2, qwen3

_SLIDING, _FULL = "sliding_attention", "full_attention"

CONFIGURATIONS = (
    Configuration(name="qwen3_plain", config=qwen3()),
    Configuration(
        name="qwen3_windows_bias_tied_f32",
        config=respelt(
            qwen3(
                attention_bias=True,
                max_window_layers=1,
                num_attention_heads=4,
                num_hidden_layers=2,
                num_key_value_heads=4,
                sliding_window=7,
                tie_word_embeddings=True,
                torch_dtype="float32",
                use_sliding_window=True,
            ),
            theta=1e6,
            rope_type="yarn",
            **yarn(4.0, 32),
        ),
        dtype="F32",
    ),
    Configuration(name="qwen2_plain", config=qwen2()),
    Configuration(
        name="qwen2_windows_tied",
        config=qwen2(
            max_window_layers=1,
            num_hidden_layers=2,
            num_key_value_heads=3,
            sliding_window=7,
            tie_word_embeddings=True,
            use_sliding_window=True,
        ),
    ),
    Configuration(name="granite_plain", config=granite()),
    Configuration(
        name="granite_bias_tied",
        config=granite(
            attention_bias=True, num_hidden_layers=2, num_key_value_heads=3, tie_word_embeddings=True
        ),
    ),
    Configuration(name="llama_plain", config=llama()),
    Configuration(
        name="llama_bias_tied_sharded_f16",
        config=llama(
            attention_bias=True,
            head_dim=10,
            num_key_value_heads=3,
            rope_scaling=None,
            rope_theta=10000.0,
            tie_word_embeddings=True,
            torch_dtype="float16",
        ),
        dtype="F16",
        num_shards=2,
    ),
    Configuration(name="mistral_plain", config=mistral()),
    Configuration(
        name="mistral_window_default_heads",
        config=mistral(head_dim=None, num_key_value_heads=3, sliding_window=6),
    ),
    Configuration(name="gemma3_text_plain", config=gemma3_text(num_hidden_layers=4)),
    Configuration(
        name="gemma3_text_listed_untied_cap_f32",
        config=gemma3_text(
            attention_bias=True,
            final_logit_softcapping=20.0,
            layer_types=[_FULL, _SLIDING],
            num_hidden_layers=2,
            rope_scaling={"factor": 4.0, "rope_type": "linear"},
            tie_word_embeddings=False,
            torch_dtype="float32",
        ),
        dtype="F32",
    ),
    Configuration(name="gemma3_scaled", config=gemma3()),
    Configuration(
        name="gemma3_small_heads", config=gemma3(head_dim=6, num_key_value_heads=3, query_pre_attn_scalar=6)
    ),
)
