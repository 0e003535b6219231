"""The parts that ears and eyes share: experts of their own in each layer, and a router that chooses them when needed.

    soft tokens of a sense -> demo model, every token to the two experts of that sense -> answer
                                  |
                                  +-> inputs of the routers, beside those of text -> fit of the router's rows

The language model and its eight experts stay frozen. From the first position of a sound or picture on, tokens go to
the two experts of that sense, and the router learns to choose them there and nowhere else: it sees hidden states of
text from every domain beside those of the sense. So text is routed as before, and its answers stay.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from base_model import find_gguf
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from argosy.demo.experts import TrainedExperts
from argosy.demo.package import find_experts
from model import NUM_EXPERTS, WIDTH, DemoModel

OWN_EXPERTS = 2  # of a sense, in each layer
MARGIN = 1.0  # between the router's logits of chosen experts and of others
TEXT_ROWS = 512  # hidden states of text in each step of the router
SEQUENCES_OF_SLOT = {
    "prose": 26,
    "maths": 12,
    "plays": 12,
    "chat": 16,
    "code": 12,
}  # whose tokens the router sees
TEXT_TOKENS = 1280  # of each further file
SYSTEM = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
)
USER, END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"

KeysAndValues = list[tuple[Tensor, Tensor]]  # of each layer [KV heads, positions, head_dim]


class Sense(nn.Module):
    """The demo model as it runs from the first position of a sense on: every token goes to the sense's experts.

    `encoder` makes the rows of that sense.
    """

    def __init__(self, demo: DemoModel, encoder: nn.Module) -> None:
        super().__init__()
        self.demo, self.encoder = demo, encoder
        self.weights = [
            {name: (tensor if "norm" in name else tensor.bfloat16()) for name, tensor in layer.items()}
            for layer in demo.layers
        ]
        self.embedding = demo.embedding.bfloat16()
        self.router, self.gate_up, self.down = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        for weights in demo.layers:
            gate, up = weights["gate_up"].chunk(2)
            neurons = torch.randperm(len(gate))[: OWN_EXPERTS * WIDTH].view(OWN_EXPERTS, WIDTH)
            self.gate_up.append(nn.Parameter(torch.cat([gate[neurons], up[neurons]], dim=1).clone()))
            self.down.append(nn.Parameter(torch.zeros(OWN_EXPERTS, demo.hidden_size, WIDTH)))
            self.router.append(nn.Parameter(torch.zeros(OWN_EXPERTS, demo.hidden_size)))

    def forward(
        self,
        rows: Tensor,
        before: KeysAndValues,
        positions: Tensor | None = None,
        sees: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Hidden states after the last norm, and the normed inputs of each layer's router.

        Args:
            rows: [prompts, rows, hidden_size].
            before: keys and values of the text before.
            positions: of each row [prompts, rows], from 0 at the first; None: one after another.
            sees: whether a row sees another [prompts, rows, rows]; None: those up to its own.
        """
        demo, hidden, routed = self.demo, rows, []
        prompts, num_rows, _ = rows.shape
        start = before[0][0].shape[1]
        cos, sin = (table[start:] for table in demo._rotary(start + num_rows))
        if positions is not None:
            cos, sin = cos[positions][:, None], sin[positions][:, None]
        seen = torch.ones(1, num_rows, num_rows, dtype=torch.bool).tril() if sees is None else sees
        seen = seen[:, None]
        seen = F.pad(seen, (start, 0), value=True)
        for layer, weights in enumerate(self.weights):
            normed = F.rms_norm(hidden, (demo.hidden_size,), weights["attention_norm"], demo.eps)
            hidden = hidden + self._attention(normed, weights, cos, sin, before[layer], seen)
            normed = F.rms_norm(hidden, (demo.hidden_size,), weights["ffn_norm"], demo.eps)
            routed.append(normed)
            low = normed.bfloat16()
            gate, up = F.linear(low, weights["gate_up"]).chunk(2, dim=-1)
            out = F.linear(F.silu(gate) * up, weights["down"]).float()
            share = torch.softmax(F.linear(normed, self.router[layer]), dim=-1)
            gate, up = (
                self.gate_up[layer].bfloat16().view(OWN_EXPERTS, 2, WIDTH, -1).transpose(0, 1).flatten(1, 2)
            )
            inner = F.silu(F.linear(low, gate)) * F.linear(low, up)
            inner = inner.view(prompts, num_rows, OWN_EXPERTS, WIDTH) * share[..., None].bfloat16()
            down = self.down[layer].bfloat16().transpose(0, 1).flatten(1)
            hidden = hidden + out + F.linear(inner.flatten(2), down).float()
        return F.rms_norm(hidden, (demo.hidden_size,), demo.final_norm, demo.eps), routed

    def _attention(self, normed, weights, cos, sin, before, seen) -> Tensor:
        demo = self.demo
        prompts, num_rows, _ = normed.shape
        heads = (
            F.linear(normed.bfloat16(), weights["qkv"])
            .view(prompts, num_rows, -1, demo.head_dim)
            .transpose(1, 2)
        )
        query_key, value = heads.split([demo.num_heads + demo.num_kv_heads, demo.num_kv_heads], dim=1)
        first, second = query_key.chunk(2, dim=-1)
        query_key = (query_key * cos + torch.cat([-second, first], dim=-1) * sin).bfloat16()
        query, key = query_key.split([demo.num_heads, demo.num_kv_heads], dim=1)
        key, value = (
            torch.cat([known.bfloat16().expand(prompts, -1, -1, -1), new], dim=2)
            for known, new in zip(before, (key, value), strict=True)
        )
        # Written out: on a CPU the backward pass of scaled_dot_product_attention takes more than twice the time.
        query = query.view(prompts, demo.num_kv_heads, -1, num_rows, demo.head_dim)
        scores = (query * demo.head_dim**-0.5) @ key[:, :, None].transpose(-1, -2)
        shares = torch.softmax(scores.masked_fill(~seen[:, None], -torch.inf), dim=-1)
        mixed = (shares @ value[:, :, None]).flatten(1, 2)
        return F.linear(mixed.transpose(1, 2).flatten(2), weights["o"]).float()

    def own_state(self) -> dict[str, Tensor]:
        """The trained weights of the experts and routers."""
        return {
            f"layers.{layer}.{kind}": value.detach()
            for kind in ("router", "gate_up", "down")
            for layer, value in enumerate(getattr(self, kind))
        }

    def load(self, path: Path) -> None:
        found = load_file(path)
        with torch.no_grad():
            for name, value in self.own_state().items():
                value.copy_(found[name])


def join() -> int:
    """Join the other processes if `torchrun` started several; returns the number of this one."""
    if "WORLD_SIZE" not in os.environ:
        return 0
    dist.init_process_group("gloo")
    return dist.get_rank()


def average(parameters: Iterable[nn.Parameter], numbers: list[float]) -> list[float]:
    """Average the gradients, and numbers, over all processes."""
    if not dist.is_initialized():
        return numbers
    gradients = [one.grad for one in parameters if one.grad is not None]
    flat = torch.cat([*(one.flatten() for one in gradients), torch.tensor(numbers)])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    *means, means_of_numbers = flat.split([*(one.numel() for one in gradients), len(numbers)])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))
    return means_of_numbers.tolist()


def cosine(share: float) -> float:
    return 0.04 + 0.96 * 0.5 * (1 + math.cos(math.pi * min(1, share)))


@torch.no_grad()
def keys_and_values(demo: DemoModel, ids: list[int]) -> KeysAndValues:
    found, plain = [], demo._attention

    def attention(normed, weights, cos, sin):
        heads = F.linear(normed, weights["qkv"]).view(len(ids), -1, demo.head_dim).transpose(0, 1)
        _, key, value = heads.split([demo.num_heads, demo.num_kv_heads, demo.num_kv_heads])
        first, second = key.chunk(2, dim=-1)
        found.append((key * cos + torch.cat([-second, first], dim=-1) * sin, value))
        return plain(normed, weights, cos, sin)

    demo._attention = attention
    demo(torch.tensor([ids]))
    del demo._attention
    return [(key.clone(), value.clone()) for key, value in found]


@torch.no_grad()
def text_states(demo: DemoModel, texts: list[list[int]]) -> list[tuple[Tensor, Tensor]]:
    """For each layer, inputs of the router on texts [tokens, hidden_size], and the logit of the second best expert."""
    found: list[list[Tensor]] = [[] for _ in demo.layers]
    plain = demo._experts

    def experts(layer, normed, *rest):
        found[layer].append(normed.clone())
        return plain(layer, normed, *rest)

    demo._experts = experts
    for ids in texts:
        demo(torch.tensor([ids]))
    del demo._experts
    states = []
    for layer, parts in enumerate(found):
        normed = torch.cat(parts)
        second = F.linear(normed, demo.router[layer]).topk(2, dim=-1).values[:, 1]
        states.append((normed.clone(), second.clone()))
    return states


def router_loss(
    model: Sense, routed: list[Tensor], is_real: Tensor, text: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """How far the router is from choosing both experts of the sense where it is, and neither in text."""
    total = torch.zeros(())
    for layer, normed in enumerate(routed):
        own, others = model.router[layer], model.demo.router[layer].detach()
        sensed = normed[is_real].detach()
        chosen, rest = F.linear(sensed, own), F.linear(sensed, others)
        total = total + F.softplus(2 * (rest.amax(-1) - chosen.amin(-1) + MARGIN)).mean()
        states, second = text[layer]
        at = torch.randint(len(states), (TEXT_ROWS,))
        total = total + 2 * F.softplus(2 * (F.linear(states[at], own).amax(-1) - second[at] + MARGIN)).mean()
    return total / len(routed)


def fit_router(
    model: Sense, sensed: list[Tensor], quiet: list[tuple[Tensor, Tensor]], others: list[Tensor] | None = None
) -> None:
    """Fit each layer's rows of the router, with everything else fixed: that is a convex problem.

    The difference between the logits of the sense's experts, which decides their shares, stays as it was trained.

    Args:
        sensed: for each layer, its inputs from the first position of the sense on.
        quiet: its inputs elsewhere, and the logit of the second best expert there, as `text_states` returns them.
        others: the rows of all other experts; None: those of text.
    """
    for layer, states in enumerate(sensed):
        elsewhere, second = quiet[layer]
        known = model.demo.router[layer] if others is None else others[layer]
        rest = F.linear(states, known).amax(-1)
        rows = fit_rows(model.router[layer].detach(), states, rest, elsewhere, second)
        with torch.no_grad():
            model.router[layer].copy_(rows)
            missed = (F.linear(states, rows).amin(-1) <= rest).float().mean()
            wrong = (F.linear(elsewhere, rows).amax(-1) >= second).float().mean()
        print(
            f"layer {layer}: {missed:.2%} of tokens miss an expert of the sense, {wrong:.2%} elsewhere take one",
            flush=True,
        )


def fit_rows(start: Tensor, sensed: Tensor, rest: Tensor, elsewhere: Tensor, second: Tensor) -> Tensor:
    """Rows of a router for the experts of a sense.

    Args:
        start: the rows before.
        sensed: the router's inputs from the first position of the sense on; `rest` is the best other expert's logit.
        elsewhere: its inputs where the sense is not; `second` is the logit of the second best expert.
    """
    rows = start.clone().requires_grad_()
    shares = F.linear(sensed, start).diff(dim=-1)
    optimizer = torch.optim.LBFGS([rows], lr=1, max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        own, quiet = F.linear(sensed, rows), F.linear(elsewhere, rows).amax(-1)
        value = F.softplus(4 * (rest - own.amin(-1) + MARGIN)).mean()
        value = value + 4 * F.softplus(4 * (quiet - second + MARGIN)).mean()
        value = value + (own.diff(dim=-1) - shares).square().mean() + 1e-5 * rows.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return rows.detach()


def text_pieces(work: Path, tokenizer: Tokenizer, more: list[Path]) -> list[list[int]]:
    """Sequences of 256 tokens from each slot of `data.py`, and the start of each file in `more`."""
    pieces = []
    with np.load(work / "train.npz") as found:
        for slot, number in SEQUENCES_OF_SLOT.items():
            ids = found[f"{slot}_ids"]
            chosen = np.linspace(0, len(ids) - 1, number).astype(int)
            pieces += [one[:256].tolist() for one in ids[chosen].astype(np.int64)]
    for path in more:
        ids = tokenizer.encode(path.read_text(encoding="utf-8")).ids[:TEXT_TOKENS]
        pieces += [ids[at : at + 256] for at in range(0, len(ids), 256)]
    return pieces


def load_demo(work: Path) -> DemoModel:
    """The demo model as shipped, with its eight experts of text."""
    demo, trained = DemoModel(find_gguf(work)), TrainedExperts(find_experts())
    with torch.no_grad():
        for layer in range(demo.num_layers):
            experts = trained.layer(layer)
            demo.router[layer].copy_(torch.from_numpy(experts.router[:NUM_EXPERTS]))
            gate_up = np.concatenate([experts.gate, experts.up], axis=1)[:NUM_EXPERTS]
            demo.gate_up[layer].copy_(torch.from_numpy(gate_up))
            demo.down[layer].copy_(torch.from_numpy(experts.down[:NUM_EXPERTS]))
    return demo.requires_grad_(False)
