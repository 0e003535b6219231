"""The demo model's eye as the trainer runs it: the arithmetic of Qwen3-VL's vision tower, for one size of picture.

    pixels [192, 192, 3] -> 16 x 16 patches -> 6 layers -> 8 x 8 cells of 2 x 2 patches -> rows [64, 576]

Names and shapes of the weights are those of `Qwen3VLVisionModel`, so `state_dict` is its checkpoint, but for the matrix
of patches: Qwen3-VL has one for each of two frames, and the frames of a picture are equal. `whole_state` writes halves.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pictures import CELL, SIDE
from torch import Tensor, nn

MERGE = 2
PATCH = CELL // MERGE
GRID = SIDE // PATCH  # patches on a side
CELLS = GRID // MERGE  # cells on a side
HIDDEN_SIZE, MLP_WIDTH, NUM_HEADS, NUM_LAYERS = 192, 768, 3, 6
EPS = 1e-6


def cell_order(side: int = GRID) -> Tensor:
    """Where the patches of a row-major grid go: cell by cell, row-major within a cell."""
    cells = side // MERGE
    grid = torch.arange(side * side).view(cells, MERGE, cells, MERGE)
    return grid.transpose(1, 2).flatten()


def patches(pixels: Tensor) -> Tensor:
    """Values of patches from -1 to 1 [pictures, GRID**2, 3 * PATCH**2], in `cell_order`, channel by channel.

    Args:
        pixels: uint8 [pictures, SIDE, SIDE, 3].
    """
    values = pixels.view(-1, GRID, PATCH, GRID, PATCH, 3).permute(0, 1, 3, 5, 2, 4)
    return values.reshape(-1, GRID**2, 3 * PATCH**2)[:, cell_order()].float() / 127.5 - 1


def vision_config(out_size: int) -> dict[str, Any]:
    """`vision_config` of the checkpoint."""
    return {
        "deepstack_visual_indexes": [],
        "depth": NUM_LAYERS,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": HIDDEN_SIZE,
        "in_channels": 3,
        "intermediate_size": MLP_WIDTH,
        "num_heads": NUM_HEADS,
        "num_position_embeddings": GRID**2,
        "out_hidden_size": out_size,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
    }


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HIDDEN_SIZE, 3 * HIDDEN_SIZE)
        self.proj = nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE)

    def forward(self, normed: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        pictures, patches, _ = normed.shape
        heads = self.qkv(normed).view(pictures, patches, 3, NUM_HEADS, -1).permute(2, 0, 3, 1, 4)
        query_key, value = heads[:2], heads[2]
        first, second = query_key.chunk(2, dim=-1)
        query, key = query_key * cos + torch.cat([-second, first], dim=-1) * sin
        # Written out: on a CPU the backward pass of scaled_dot_product_attention takes more than twice the time.
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        return self.proj((torch.softmax(scores, dim=-1).to(value.dtype) @ value).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(HIDDEN_SIZE, MLP_WIDTH)
        self.linear_fc2 = nn.Linear(MLP_WIDTH, HIDDEN_SIZE)

    def forward(self, normed: Tensor) -> Tensor:
        return self.linear_fc2(F.gelu(self.linear_fc1(normed), approximate="tanh"))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(HIDDEN_SIZE, eps=EPS) for _ in range(2))
        self.attn, self.mlp = Attention(), Mlp()

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        hidden = hidden + self.attn(self.norm1(hidden), cos, sin)
        return hidden + self.mlp(self.norm2(hidden))


class Merger(nn.Module):
    def __init__(self, out_size: int) -> None:
        super().__init__()
        size = HIDDEN_SIZE * MERGE**2
        self.norm = nn.LayerNorm(HIDDEN_SIZE, eps=EPS)
        self.linear_fc1 = nn.Linear(size, size)
        self.linear_fc2 = nn.Linear(size, out_size)

    def forward(self, hidden: Tensor) -> Tensor:
        cells = self.norm(hidden).unflatten(1, (-1, MERGE**2)).flatten(2)
        return self.linear_fc2(F.gelu(self.linear_fc1(cells)))


class Tower(nn.Module):
    def __init__(self, out_size: int = 576) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Linear(3 * PATCH**2, HIDDEN_SIZE)})
        self.pos_embed = nn.Embedding(GRID**2, HIDDEN_SIZE)
        self.blocks = nn.ModuleList(Block() for _ in range(NUM_LAYERS))
        self.merger = Merger(out_size)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.pos_embed.weight)
        with torch.no_grad():
            for block in self.blocks:
                block.attn.proj.weight.mul_((2 * NUM_LAYERS) ** -0.5)
                block.mlp.linear_fc2.weight.mul_((2 * NUM_LAYERS) ** -0.5)
        order, quarter = cell_order(), HIDDEN_SIZE // NUM_HEADS // 4
        places = torch.stack([order // GRID, order % GRID], dim=1)
        speeds = 10000.0 ** (-torch.arange(quarter) / quarter)
        angles = (places[..., None] * speeds).flatten(1).repeat(1, 2)
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of cells, and what the last layer says of each patch.

        Args:
            pixels: uint8 [pictures, SIDE, SIDE, 3].

        Returns:
            rows: [pictures, CELLS**2, out_size], row-major.
            hidden: [pictures, GRID**2, HIDDEN_SIZE], in `cell_order`.
        """
        hidden = self.patch_embed["proj"](patches(pixels)) + self.pos_embed.weight[self.order]
        for block in self.blocks:
            hidden = block(hidden, self.cos, self.sin)
        return self.merger(hidden), hidden

    def whole_state(self) -> dict[str, Tensor]:
        """The weights as `Qwen3VLVisionModel` has them."""
        state = {name: value.detach() for name, value in self.state_dict().items()}
        half = state["patch_embed.proj.weight"].view(HIDDEN_SIZE, 3, 1, PATCH, PATCH) / 2
        state["patch_embed.proj.weight"] = half.repeat(1, 1, 2, 1, 1)
        return state
