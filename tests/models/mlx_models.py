"""The tiny checkpoints that mlx-lm wrote, and MLX's logits for them: `make_mlx.py` writes both.

    reference_mlx/<name>/   config.json, weights, ref.safetensors

`make_mlx.py` needs MLX; this module does not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.models.references import Reference
from tests.models.tiny import RawConfig, minimax_m2
from tests.models.tiny_delta import qwen3_next
from tests.models.tiny_gemma import gemma4
from tests.models.tiny_latent import deepseek_v3

DIRECTORY = Path(__file__).parent / "reference_mlx"
MLX_TOWERS = Path(__file__).parent / "mlx_towers.json"  # by `make_mlx_towers.py`


@dataclass(frozen=True, slots=True, kw_only=True)
class MlxModel:
    """A config as on the hub, and how mlx-lm quantises it; without `bits` it only renames."""

    name: str
    config: RawConfig
    seed: int = 0
    mode: str = "affine"
    bits: int | None = None
    group: int = 32
    # Settings of single modules, by the end of their paths; they take precedence.
    modules: dict[str, Any] = field(default_factory=dict)

    @property
    def reference(self) -> Reference:
        """Its committed files."""
        return Reference(DIRECTORY / self.name)


# Of these families, mlx-lm changes more than names: norms and axes, the halves of kv_b_proj.
PLAIN = (
    MlxModel(name="qwen3_next", config=qwen3_next(num_hidden_layers=2, vocab_size=48)),
    MlxModel(name="deepseek_v3", config=deepseek_v3(num_hidden_layers=2, vocab_size=48)),
    # mlx-lm rounds a fraction of a pair up, transformers down: a quarter of 16 dimensions is whole pairs.
    MlxModel(name="gemma4", config=gemma4(global_head_dim=16, num_experts=4)),
    MlxModel(name="minimax_m2", config=minimax_m2(num_hidden_layers=2, vocab_size=48)),
)
MODELS = PLAIN
