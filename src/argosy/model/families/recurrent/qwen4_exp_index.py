"""The indexer of Qwen3.8's layers with attention (QSA), whose sizes `config.json` and GGUF files name differently."""

from __future__ import annotations

from argosy.config import KV_BLOCK_TOKENS, BlockIndexConfig
from argosy.errors import CheckpointError
from argosy.model.families.latent.deepseek import MOST_CHOSEN

_MOST_RATIO = 8192  # positions of a block


def make_index(
    *, num_heads: int, head_dim: int, budget: int, ratio: int, rotary_dim: int
) -> BlockIndexConfig:
    """Return the indexer of these sizes: `budget` positions in blocks of `ratio`.

    Raises:
        CheckpointError: a size that attention cannot have; the message names it.
    """
    for what, value, is_right, expected in (
        ("index dimensions", head_dim, head_dim >= rotary_dim, f"at least {rotary_dim}, which rotate"),
        (
            "positions of an index block",
            ratio,
            2 <= ratio <= _MOST_RATIO and not (KV_BLOCK_TOKENS % ratio and ratio % KV_BLOCK_TOKENS),
            f"2 to {_MOST_RATIO}, and a divisor or a multiple of {KV_BLOCK_TOKENS}",
        ),
        (
            "positions that an indexer chooses",
            budget,
            0 < budget <= MOST_CHOSEN and budget % max(1, ratio) == 0,
            f"a multiple of {ratio}, the positions of a block, up to {MOST_CHOSEN}",
        ),
    ):
        if not is_right:
            raise CheckpointError(f"the model has {value} {what}, expected {expected}", key="indexer_budget")
    return BlockIndexConfig(
        num_chosen=budget // ratio, block_size=ratio, head_dim=head_dim, joint_heads=num_heads
    )
