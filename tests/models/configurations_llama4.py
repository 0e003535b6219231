"""The configurations of Llama-4: as Scout, and as Maverick with each flag in another position."""

from __future__ import annotations

from tests.models.configuration import Configuration
from tests.models.tiny_llama4 import GUARD, llama4, llama4_text

CONFIGURATIONS = (
    Configuration(name="llama4_plain", config=llama4()),
    Configuration(
        name="llama4_guard_f32",
        config=llama4(
            **GUARD,
            head_dim=10,
            hidden_size=18,
            intermediate_size_mlp=13,
            num_attention_heads=3,
            num_key_value_heads=3,
            rope_scaling=None,
            torch_dtype="float32",
        ),
        dtype="F32",
    ),
    Configuration(
        name="llama4_text_every_second_f32",
        config=llama4_text(
            attention_bias=True,
            attention_chunk_size=11,
            floor_scale=3,
            head_dim=8,
            hidden_size=18,
            interleave_moe_layer_step=2,
            intermediate_size=7,
            intermediate_size_mlp=11,
            layer_types=["chunked_attention", "full_attention", "chunked_attention", "full_attention"],
            no_rope_layers=[1, 1, 0, 0],
            num_attention_heads=3,
            num_key_value_heads=1,
            num_local_experts=4,
            rope_scaling=None,
            tie_word_embeddings=True,
            torch_dtype="float32",
            use_qk_norm=False,
            vocab_size=53,
        ),
        dtype="F32",
    ),
)
