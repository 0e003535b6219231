"""Towers that transformers lacks, after the makers' published code, for `make_encoders.py` (needs torch)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.models.safetensors_file import Array


class MoonViT2(nn.Module):
    """Kimi-K3's tower and projector, with the names of the checkpoint (modeling_kimi_k3.py)."""

    def __init__(self, raw: dict[str, Any], hidden_size: int) -> None:
        super().__init__()
        hidden, wide = raw["vt_hidden_size"], raw["vt_intermediate_size"]
        self.heads, self.merge, self.patch = (
            raw["vt_num_attention_heads"],
            *raw["merge_kernel_size"][:1],
            raw["patch_size"],
        )
        self.attention = raw["qkv_hidden_size"]
        cell = hidden * self.merge**2
        side = raw["init_pos_emb_height"]

        def product(rows: int, columns: int) -> nn.Module:
            return nn.Linear(columns, rows, bias=False)

        blocks = [
            nn.ModuleDict(
                {
                    "norm0": nn.RMSNorm(hidden),
                    "norm1": nn.RMSNorm(hidden),
                    "wqkv": product(3 * self.attention, hidden),
                    "wo": product(hidden, self.attention),
                    "mlp": nn.ModuleDict({"fc0": product(wide, hidden), "fc1": product(hidden, wide)}),
                }
            )
            for _ in range(raw["vt_num_hidden_layers"])
        ]
        embed = nn.Module()
        embed.proj = nn.Conv2d(3, hidden, self.patch, self.patch, bias=False)
        embed.pos_emb = nn.Module()
        embed.pos_emb.weight = nn.Parameter(torch.empty(side, side, hidden))
        encoder = nn.ModuleDict({"blocks": nn.ModuleList(blocks), "final_layernorm": nn.RMSNorm(hidden)})
        self.vision_tower = nn.ModuleDict({"patch_embed": embed, "encoder": encoder})
        self.mm_projector = nn.ModuleDict(
            {
                "proj": nn.Sequential(product(cell, cell), nn.GELU(), product(hidden_size, cell)),
                "post_norm": nn.RMSNorm(hidden_size, eps=raw["projector_ln_eps"]),
            }
        )

    def forward(self, values: Array, rows: int, columns: int) -> Array:
        embed, encoder = self.vision_tower["patch_embed"], self.vision_tower["encoder"]
        x = embed.proj(torch.tensor(values).reshape(-1, 3, self.patch, self.patch)).flatten(1)
        table = embed.pos_emb.weight.permute(2, 0, 1)[None]
        if table.shape[2:] != (rows, columns):
            table = functional.interpolate(table, size=(rows, columns), mode="bilinear")
        x = x + table[0].permute(1, 2, 0).flatten(0, 1)
        turns = self.turns(rows, columns, self.attention // self.heads)
        for block in encoder["blocks"]:
            query, key, value = (
                block["wqkv"](block["norm0"](x)).reshape(len(x), 3, self.heads, -1).permute(1, 2, 0, 3)
            )
            attended = functional.scaled_dot_product_attention(
                turned(query, turns), turned(key, turns), value
            )
            x = x + block["wo"](attended.transpose(0, 1).flatten(1))
            wide = functional.gelu(block["mlp"]["fc0"](block["norm1"](x)), approximate="tanh")
            x = x + block["mlp"]["fc1"](wide)
        x = encoder["final_layernorm"](x)
        cells = x.reshape(rows // self.merge, self.merge, columns // self.merge, self.merge, -1).transpose(
            1, 2
        )
        projected = self.mm_projector["proj"](cells.flatten(0, 1).flatten(1))
        return np.asarray(self.mm_projector["post_norm"](projected).detach())

    @staticmethod
    def turns(rows: int, columns: int, head_dim: int) -> Tensor:
        """Complex [patches, head_dim / 2]: column and row by turns."""
        speed = 10_000 ** -(torch.arange(0, head_dim, 4) / head_dim)
        row, column = (
            at.flatten() for at in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        )
        angles = torch.stack([torch.outer(column, speed), torch.outer(row, speed)], dim=-1).flatten(1)
        return torch.polar(torch.ones_like(angles), angles)


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate adjacent pairs of x [heads, patches, head_dim]."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(pairs * turns).flatten(-2)
