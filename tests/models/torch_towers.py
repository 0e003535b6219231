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


class DeepseekVision(nn.Module):
    """DeepSeek-V4-Vision's tower, aligner and marks, with the names of the checkpoint (inference/vision.py)."""

    def __init__(self, raw: dict[str, Any], hidden_size: int) -> None:
        super().__init__()
        raw = {key.removeprefix("vision_"): value for key, value in raw.items()}
        hidden, wide, self.patch = raw["dim"], raw["inter_dim"], raw["patch_size"]
        self.heads, self.merge, self.theta = raw["n_heads"], raw["downsample_ratio"], raw["rope_theta"]
        blocks = [
            nn.ModuleDict(
                {
                    "norm1": nn.RMSNorm(hidden, eps=1e-6),
                    "norm2": nn.RMSNorm(hidden, eps=1e-6),
                    "attn": nn.ModuleDict(
                        {"wqkv": nn.Linear(hidden, 3 * hidden), "wo": nn.Linear(hidden, hidden)}
                    ),
                    "mlp": nn.ModuleDict(
                        {
                            "w1": nn.Linear(hidden, 2 * wide, bias=False),
                            "w2": nn.Linear(wide, hidden, bias=False),
                        }
                    ),
                }
            )
            for _ in range(raw["n_layers"])
        ]
        embed = nn.ModuleDict({"proj": nn.Linear(3 * self.patch**2, hidden)})
        self.vision = nn.ModuleDict(
            {"patch_embed": embed, "blocks": nn.ModuleList(blocks), "norm": nn.RMSNorm(hidden, eps=1e-6)}
        )
        self.aligner = nn.ModuleDict(
            {"w1": nn.Linear(hidden * self.merge**2, hidden_size), "w2": nn.Linear(hidden_size, hidden_size)}
        )
        for mark in ("start", "end", "newline", "pad"):
            setattr(self, f"image_{mark}", nn.Parameter(torch.empty(hidden_size)))

    def forward(self, values: Array, rows: int, columns: int) -> Array:
        x = self.vision["patch_embed"]["proj"](torch.tensor(values))
        size = x.shape[1] // self.heads // 2
        speed = self.theta ** -(torch.arange(0, size, 2) / size)
        places = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), dim=-1)
        angles = (places.reshape(-1, 2, 1) * speed).flatten(1)

        def turned(part: Tensor) -> Tensor:
            first, second = part.chunk(2, dim=-1)
            cosine, sine = angles.cos(), angles.sin()
            return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)

        for block in self.vision["blocks"]:
            qkv = block["attn"]["wqkv"](block["norm1"](x)).chunk(3, dim=-1)
            query, key, value = (part.reshape(len(x), self.heads, -1).transpose(0, 1) for part in qkv)
            attended = functional.scaled_dot_product_attention(turned(query), turned(key), value)
            x = x + block["attn"]["wo"](attended.transpose(0, 1).flatten(1))
            gate, up = block["mlp"]["w1"](block["norm2"](x)).chunk(2, dim=-1)
            x = x + block["mlp"]["w2"](functional.silu(gate) * up)
        grid = self.vision["norm"](x).reshape(rows, columns, -1).permute(2, 0, 1)
        grid = functional.pad(grid, (0, -columns % self.merge, 0, -rows % self.merge))
        cells = functional.unfold(grid[None], self.merge, stride=self.merge)[0].T
        made = self.aligner["w2"](functional.gelu(self.aligner["w1"](cells)))
        return np.asarray(self.block(made, -(-rows // self.merge), -(-columns // self.merge)).detach())

    def block(self, made: Tensor, rows: int, columns: int) -> Tensor:
        """The makers' `build_image_block`, without the fillers before it."""
        odd = rows % 2
        width = columns + 1
        fillers = (rows + odd) // 2 * width % 2 * 2
        lines = [[*made[row * columns : (row + 1) * columns], self.image_newline] for row in range(rows)]
        lines += [[self.image_pad] * width] * odd
        pairs = [
            line[at]
            for first in range(0, rows + odd, 2)
            for at in range(width)
            for line in lines[first : first + 2]
        ]
        return torch.stack([self.image_start, *pairs, *[self.image_pad] * fillers, self.image_end])


class DeepseekVision41(DeepseekVision):
    """DeepSeek-V4.1's, which has no fillers, and squares in reading order."""

    def __init__(self, raw: dict[str, Any], hidden_size: int) -> None:
        names = {
            "n_layers": "num_hidden_layers", "dim": "hidden_size", "n_heads": "num_attention_heads",
            "inter_dim": "intermediate_size",
        }  # fmt: skip
        super().__init__(raw | {ours: raw[theirs] for ours, theirs in names.items()}, hidden_size)
        del self.image_pad

    def block(self, made: Tensor, rows: int, columns: int) -> Tensor:
        """The makers' `image_token_types`, and `merge_image_embeddings`."""
        types = ["start", *(["square"] * columns + ["newline"]) * rows, "end"]
        squares = iter(made)
        return torch.stack(
            [next(squares) if one == "square" else getattr(self, f"image_{one}") for one in types]
        )


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate adjacent pairs of x [heads, patches, head_dim]."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(pairs * turns).flatten(-2)
