"""The tiny checkpoints that mlx-lm wrote, and MLX's logits for them: `make_mlx.py` writes both.

    reference_mlx/<name>/   config.json, weights, ref.safetensors

`make_mlx.py` needs MLX; this module does not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.models.references import Reference
from tests.models.tiny import RawConfig, gpt_oss, minimax_m2, mixtral, qwen3_moe
from tests.models.tiny_delta import qwen3_next
from tests.models.tiny_dense import gemma3_text, qwen3
from tests.models.tiny_gemma import gemma4
from tests.models.tiny_grouped import bailing_moe
from tests.models.tiny_latent import deepseek_v3, glm4_moe_lite
from tests.models.tiny_ling import ling_2_5
from tests.models.tiny_mamba import granitemoehybrid, nemotron_h
from tests.models.tiny_ring import ring_linear
from tests.models.tiny_step import step3p5

DIRECTORY = Path(__file__).parent / "reference_mlx"
MLX_TOWERS = Path(__file__).parent / "mlx_towers.json"  # by `make_mlx_towers.py`


@dataclass(frozen=True, slots=True, kw_only=True)
class MlxModel:
    """A config as on the hub, and how mlx-lm quantises it; without `bits` it keeps what the hub's files have."""

    name: str
    config: RawConfig
    seed: int = 0
    mode: str = "affine"
    bits: int | None = None
    group: int = 32
    # Settings of single modules, by the end of their paths; they take precedence.
    modules: dict[str, Any] = field(default_factory=dict)
    has_mxfp4_experts: bool = False  # on the hub

    @property
    def reference(self) -> Reference:
        """Its committed files."""
        return Reference(DIRECTORY / self.name)


_SMALL = {"num_hidden_layers": 2, "vocab_size": 48}

# Of these families, mlx-lm changes more than names: norms and axes, the halves of kv_b_proj.
PLAIN = (
    MlxModel(name="qwen3_next", config=qwen3_next(**_SMALL)),
    MlxModel(name="deepseek_v3", config=deepseek_v3(**_SMALL)),
    # mlx-lm rounds a fraction of a pair up, transformers down: a quarter of 16 dimensions is whole pairs.
    MlxModel(name="gemma4", config=gemma4(**_SMALL, global_head_dim=16, num_experts=3)),
    MlxModel(name="minimax_m2", config=minimax_m2(**_SMALL)),
    MlxModel(name="step3p5", config=step3p5(vocab_size=48)),
    MlxModel(name="nemotron_h", config=nemotron_h(vocab_size=48)),
    MlxModel(name="granitemoehybrid", config=granitemoehybrid(vocab_size=48)),
    # Two layers of lightning attention, then latent attention, of the last group and behind it.
    MlxModel(
        name="ling_2_5",
        config=ling_2_5(vocab_size=48, hidden_size=20, layer_group_size=3, num_experts=4, n_group=2),
    ),
    MlxModel(
        name="ring_linear",
        config=ring_linear(
            **_SMALL | {"num_hidden_layers": 3},
            hidden_size=24,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_experts=4,
        ),
    ),
    # MLX keeps its norms minus one, and rounds the factor of embeddings to BF16: the root of 16 is exact.
    MlxModel(name="gemma3_text", config=gemma3_text(vocab_size=48, hidden_size=16)),
)


# A rounded score that picks another expert would hide the cost of rounding, so every expert is chosen.
_OF_TWO = {"num_experts": 2, "num_experts_per_tok": 2, **_SMALL}
_OF_TWO_LOCAL = {"num_local_experts": 2, "num_experts_per_tok": 2, **_SMALL}


def _affine(bits: int, group: int) -> dict[str, int]:
    return {"bits": bits, "group_size": group}


QUANTISED = (
    # Every number of bits and every size of a group; one module keeps its floats.
    MlxModel(
        name="qwen3_moe_affine",
        config=qwen3_moe(**_OF_TWO, hidden_size=128, moe_intermediate_size=32, head_dim=32),
        bits=4,
        modules={
            "embed_tokens": _affine(6, 64),
            "lm_head": _affine(8, 32),
            "0.self_attn.k_proj": False,
            "q_proj": _affine(5, 128),
            "v_proj": _affine(3, 32),
            "o_proj": _affine(2, 64),
            "0.mlp.switch_mlp.gate_proj": _affine(4, 64),
            "1.mlp.switch_mlp.gate_proj": _affine(3, 128),
            "1.mlp.switch_mlp.up_proj": _affine(6, 32),
            "1.mlp.switch_mlp.down_proj": _affine(5, 32),
            "0.mlp.switch_mlp.down_proj": _affine(2, 32),
            "mlp.gate": _affine(8, 64),
        },
    ),
    MlxModel(  # q, k and v are the rows of one matrix
        name="ling_affine",
        config=bailing_moe(
            **_OF_TWO, first_k_dense_replace=1, n_group=1, topk_group=1, hidden_size=64, intermediate_size=32,
            moe_intermediate_size=32, moe_shared_expert_intermediate_size=32, head_dim=16,
        ),
        bits=4,
    ),
    MlxModel(  # no experts
        name="qwen3_affine",
        config=qwen3(**_SMALL, hidden_size=64, intermediate_size=32, head_dim=32, num_attention_heads=2),
        bits=4,
    ),
    # The halves of kv_b_proj are quantised head by head; scales are F16.
    MlxModel(
        name="glm4_moe_lite_affine",
        config=glm4_moe_lite(
            **_SMALL, n_routed_experts=2, num_experts_per_tok=2, n_group=1, topk_group=1, hidden_size=64,
            moe_intermediate_size=32, intermediate_size=32, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=32,
            qk_rope_head_dim=16, v_head_dim=32, num_attention_heads=2, num_key_value_heads=2,
            num_nextn_predict_layers=0, torch_dtype="float16",
        ),
        bits=4,
    ),
    MlxModel(
        name="gpt_oss_mxfp4",
        config=gpt_oss(
            **_OF_TWO_LOCAL, experts_per_token=2, hidden_size=64, intermediate_size=32, head_dim=16
        ),
        bits=8,
        has_mxfp4_experts=True,
    ),
    MlxModel(
        name="qwen3_next_nvfp4",
        config=qwen3_next(
            **_OF_TWO, hidden_size=64, moe_intermediate_size=32, shared_expert_intermediate_size=32,
            linear_key_head_dim=16, linear_value_head_dim=16,
        ),
        mode="nvfp4",
        bits=4,
        group=16,
        modules={"mlp.gate": _affine(8, 32), "shared_expert_gate": _affine(8, 32)},
    ),
    MlxModel(
        name="mixtral_mxfp8",
        config=mixtral(**_OF_TWO_LOCAL, hidden_size=64, intermediate_size=32),
        mode="mxfp8",
        bits=8,
    ),
)  # fmt: skip
MODELS = PLAIN + QUANTISED
