"""LoRA adapters that mlx-lm wrote: the same logits as MLX, on the same checkpoint as on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.adapters import open_adapted
from tests.models.make_mlx_adapters import write_adapter
from tests.models.tiny import RawConfig, glm4_moe, mixtral, prompt_ids, qwen3_moe, write_model
from tests.models.tiny_delta import qwen3_next
from tests.models.tiny_latent import glm4_moe_lite

pytestmark = pytest.mark.filterwarnings("default")

LARGEST_ERROR = 3e-4
SEED = 50_000
# Every expert is chosen, so that no near tie is decided otherwise.
ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
SHARED = [f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")]
CASES: dict[str, tuple[RawConfig, dict[str, Any]]] = {
    "qwen3_moe": (qwen3_moe(num_experts_per_tok=6), {"keys": [*ATTENTION, "mlp.gate"]}),
    "mixtral": (mixtral(num_experts_per_tok=6), {"keys": ATTENTION, "rank": 1, "scale": 20.0}),
    "glm4_moe": (
        glm4_moe(num_experts_per_tok=6, num_nextn_predict_layers=0),
        {"keys": [*ATTENTION, *SHARED], "rank": 16},
    ),
    "glm4_moe_lite": (
        glm4_moe_lite(num_experts_per_tok=8),
        {"keys": ["self_attn.q_a_proj", "self_attn.q_b_proj", "self_attn.o_proj", *SHARED]},
    ),
    "qwen3_next": (
        qwen3_next(num_experts_per_tok=5),
        {
            "keys": [
                *ATTENTION, "linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba", "linear_attn.out_proj",
                "mlp.shared_expert.up_proj", "mlp.shared_expert_gate",
            ],
            "num_layers": 3,
        },
    ),
    "tables": (qwen3_moe(num_experts_per_tok=6), {"keys": ["model.embed_tokens", "lm_head"]}),
    "a tied table": (
        qwen3_moe(num_experts_per_tok=6, tie_word_embeddings=True),
        {"keys": ["model.embed_tokens", "self_attn.k_proj"]},
    ),
    "dora": (
        qwen3_moe(num_experts_per_tok=6), {"keys": [*ATTENTION, "mlp.gate", "lm_head"], "kind": "dora"},
    ),
    "dora of a tied table": (
        qwen3_moe(num_experts_per_tok=6, tie_word_embeddings=True),
        {"keys": ["model.embed_tokens", "self_attn.k_proj"], "kind": "dora"},
    ),
    "dora of delta nets": (
        qwen3_next(num_experts_per_tok=5),
        {"keys": [*ATTENTION, "linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba"], "num_layers": 3, "kind": "dora"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_mlx(name: str, tmp_path: Path) -> None:
    config, settings = CASES[name]
    base, prompt = write_model(tmp_path / "base", config, seed=SEED, dtype="F32"), prompt_ids(config, SEED)
    expected = write_adapter(base, tmp_path / "adapter", prompt, seed=SEED, **settings)
    with open_adapted(base, {"own": tmp_path / "adapter"}) as engine:
        assert abs(engine.logits(prompt, adapter="own") - expected).max() <= LARGEST_ERROR
