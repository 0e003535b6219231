"""Configurations of Youtu-LLM: latent attention without experts."""

from __future__ import annotations

from tests.models.configuration import Configuration
from tests.models.tiny_latent import yarn_of_all_dimensions, youtu

CONFIGURATIONS = (
    Configuration(name="youtu_plain", config=youtu(tie_word_embeddings=True, vocab_size=60)),
    Configuration(
        name="youtu_halves_yarn_f16",
        config=youtu(
            kv_lora_rank=15,
            num_hidden_layers=2,
            q_lora_rank=None,
            rope_interleave=False,
            rope_scaling=yarn_of_all_dimensions(4.0, 16),
            torch_dtype="float16",
            v_head_dim=9,
        ),
        dtype="F16",
    ),
)
