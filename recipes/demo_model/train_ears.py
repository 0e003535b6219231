"""Teach the demo model to hear: a projector from Whisper's features, and two ear experts in each layer.

    features -> projector -> CTC against the token embeddings, no language model in the loop
                          -> prompt with a sound -> demo model with ear experts -> transcript or answer

The language model and its eight experts stay frozen. From the first position of a sound on, tokens go to the two ear
experts, and the router learns to choose them there and nowhere else: it sees hidden states of text from every domain
beside those of sounds. So text is routed as before, and its answers stay.

    python train_ears.py --work WORK --ctc-minutes 6 --minutes 58

`WORK/train.npz` is what `data.py` writes.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from base_model import find_gguf, load_tokenizer
from safetensors.torch import load_file, save_file
from speech import CAPITALS, HELD_OUT_ANSWERS
from tokenizers import Tokenizer
from torch import Tensor, nn

from argosy.demo.experts import TrainedExperts
from model import NUM_EXPERTS, WIDTH, DemoModel

STACKED = 4  # features of 20 ms that become one position
FEATURE_SIZE = 384
NUM_EARS = 2
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
BEFORE = (
    SYSTEM + USER,
    USER,
    SYSTEM + USER + "Listen: ",
    SYSTEM + USER + "Please write down this recording.\n",
)
TRANSCRIBE = ("\nWrite down what you hear.", "\nWhat do you hear?", "\nTranscribe this.", "\nWhat was said?")
ANSWER = ("", "", "\nAnswer the question.")


class Projector(nn.Module):
    """Joins 4 features, then linear, GELU, linear: Voxtral's projector (arXiv:2507.13264)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.up = nn.Linear(FEATURE_SIZE * STACKED, hidden_size, bias=False)
        self.down = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """[clips, positions, 384] to [clips, positions // 4, hidden_size]."""
        clips, positions, size = features.shape
        joined = features[:, : positions // STACKED * STACKED].reshape(clips, -1, size * STACKED)
        return self.down(F.gelu(self.up(joined)))


class Hearing(nn.Module):
    """The demo model as it runs from the first position of a sound on: every token goes to the ear experts."""

    def __init__(self, demo: DemoModel) -> None:
        super().__init__()
        self.demo = demo
        self.projector = Projector(demo.hidden_size)
        self.weights = [
            {name: (tensor if "norm" in name else tensor.bfloat16()) for name, tensor in layer.items()}
            for layer in demo.layers
        ]
        self.embedding = demo.embedding.bfloat16()
        self.router, self.gate_up, self.down = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        for weights in demo.layers:
            gate, up = weights["gate_up"].chunk(2)
            neurons = torch.randperm(len(gate))[: NUM_EARS * WIDTH].view(NUM_EARS, WIDTH)
            self.gate_up.append(nn.Parameter(torch.cat([gate[neurons], up[neurons]], dim=1).clone()))
            self.down.append(nn.Parameter(torch.zeros(NUM_EARS, demo.hidden_size, WIDTH)))
            self.router.append(nn.Parameter(torch.zeros(NUM_EARS, demo.hidden_size)))

    def forward(self, rows: Tensor, before: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[Tensor]]:
        """Hidden states after the last norm, and the normed inputs of each layer's router.

        Args:
            rows: [clips, positions, hidden_size].
            before: keys and values of each layer for the text before the sound [KV heads, positions, head_dim].
        """
        demo, hidden, routed = self.demo, rows, []
        clips, num_rows, _ = rows.shape
        start = before[0][0].shape[1]
        cos, sin = (table[start:] for table in demo._rotary(start + num_rows))
        sees = torch.ones(num_rows, start + num_rows, dtype=torch.bool).tril(start)
        for layer, weights in enumerate(self.weights):
            normed = F.rms_norm(hidden, (demo.hidden_size,), weights["attention_norm"], demo.eps)
            hidden = hidden + self._attention(normed, weights, cos, sin, before[layer], sees)
            normed = F.rms_norm(hidden, (demo.hidden_size,), weights["ffn_norm"], demo.eps)
            routed.append(normed)
            low = normed.bfloat16()
            gate, up = F.linear(low, weights["gate_up"]).chunk(2, dim=-1)
            out = F.linear(F.silu(gate) * up, weights["down"]).float()
            share = torch.softmax(F.linear(normed, self.router[layer]), dim=-1)
            gate, up = (
                self.gate_up[layer].bfloat16().view(NUM_EARS, 2, WIDTH, -1).transpose(0, 1).flatten(1, 2)
            )
            inner = F.silu(F.linear(low, gate)) * F.linear(low, up)
            inner = inner.view(clips, num_rows, NUM_EARS, WIDTH) * share[..., None].bfloat16()
            down = self.down[layer].bfloat16().transpose(0, 1).flatten(1)
            hidden = hidden + out + F.linear(inner.flatten(2), down).float()
        return F.rms_norm(hidden, (demo.hidden_size,), demo.final_norm, demo.eps), routed

    def _attention(self, normed, weights, cos, sin, before, sees) -> Tensor:
        demo = self.demo
        clips, num_rows, _ = normed.shape
        heads = (
            F.linear(normed.bfloat16(), weights["qkv"])
            .view(clips, num_rows, -1, demo.head_dim)
            .transpose(1, 2)
        )
        query_key, value = heads.split([demo.num_heads + demo.num_kv_heads, demo.num_kv_heads], dim=1)
        first, second = query_key.chunk(2, dim=-1)
        query_key = (query_key * cos + torch.cat([-second, first], dim=-1) * sin).bfloat16()
        query, key = query_key.split([demo.num_heads, demo.num_kv_heads], dim=1)
        key, value = (
            torch.cat([known.bfloat16().expand(clips, -1, -1, -1), new], dim=2)
            for known, new in zip(before, (key, value), strict=True)
        )
        repeats = demo.num_heads // demo.num_kv_heads
        mixed = F.scaled_dot_product_attention(
            query, key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1), attn_mask=sees
        )
        return F.linear(mixed.transpose(1, 2).flatten(2), weights["o"]).float()

    def own_state(self) -> dict[str, Tensor]:
        """What is trained."""
        named = {
            name: value.detach() for name, value in self.projector.state_dict(prefix="projector.").items()
        }
        for kind in ("router", "gate_up", "down"):
            for layer, value in enumerate(getattr(self, kind)):
                named[f"layers.{layer}.{kind}"] = value.detach()
        return named

    def load(self, path: Path) -> None:
        found = load_file(path)
        with torch.no_grad():
            for name, value in self.own_state().items():
                value.copy_(found[name])


@dataclass
class Clips:
    """Features [clips, 250, 384] of one split, and what was said."""

    features: np.ndarray
    said: list[dict]

    @classmethod
    def load(cls, folder: Path) -> Clips:
        return cls(
            np.load(folder / "features.npy", mmap_mode="r"), json.loads((folder / "clips.json").read_text())
        )

    def positions(self, at: int) -> int:
        """How many positions a clip fills after the projector."""
        return num_positions(self.said[at]["seconds"])


def num_positions(seconds: float) -> int:
    return min(250 // STACKED, math.ceil(seconds * 50 / STACKED) + 1)


def transcript(clip: dict) -> str:
    words = clip["words"]
    mark = "?" if clip["kind"] == "capital" or words in ("how are you", "what time is it") else "."
    return words[0].upper() + words[1:] + mark


def answer_to(clip: dict) -> str | None:
    country = clip["country"]
    return f"The capital of {country} is {CAPITALS[country]}." if country else None


# ── the projector alone ─────────────────────────────────────────────────────────────────────────────────────────────


def train_ctc(model: Hearing, tokenizer: Tokenizer, clips: Clips, minutes: float) -> None:
    """Connect features with the embeddings of the words, by CTC over the vocabulary of the grammar."""
    targets = [tokenizer.encode(" " + clip["words"]).ids for clip in clips.said]
    vocabulary = sorted({token for ids in targets for token in ids})
    place = {token: at + 1 for at, token in enumerate(vocabulary)}
    words = model.demo.embedding[vocabulary]
    scale = 4.0 / words.norm(dim=1).mean()
    blank, bias = nn.Parameter(torch.zeros(words.shape[1])), nn.Parameter(torch.zeros(len(vocabulary) + 1))
    parameters = [*model.projector.parameters(), blank, bias]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.02)
    rng, begin, step, losses = random.Random(0), time.monotonic(), 0, []
    while (share := (time.monotonic() - begin) / 60 / minutes) < 1:
        chosen = [rng.randrange(len(targets)) for _ in range(64)]
        rows = model.projector(torch.from_numpy(clips.features[sorted(chosen)].astype(np.float32)))
        chosen.sort()
        logits = torch.cat([rows @ blank[:, None], rows @ words.T], dim=-1) * scale + bias
        wanted = [torch.tensor([place[token] for token in targets[at]]) for at in chosen]
        loss = F.ctc_loss(
            logits.log_softmax(-1).transpose(0, 1),
            torch.cat(wanted),
            torch.tensor([clips.positions(at) for at in chosen]),
            torch.tensor([len(one) for one in wanted]),
            zero_infinity=True,
        )
        loss = loss + 1e-4 * rows.square().sum(-1).mean()
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * min(1, (step + 1) / 50) * cosine(share)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        step += 1
        if step % 50 == 0:
            print(f"ctc {step}: {60 * share * minutes:.0f} s, loss {np.mean(losses[-50:]):.3f}", flush=True)
    with torch.no_grad():  # to about the size of the embeddings
        model.projector.down.weight.mul_(0.25)


def cosine(share: float) -> float:
    return 0.04 + 0.96 * 0.5 * (1 + math.cos(math.pi * min(1, share)))


# ── through the language model ──────────────────────────────────────────────────────────────────────────────────────


class TextBefore:
    """Keys and values of the texts before a sound, from the demo model as it is."""

    def __init__(self, demo: DemoModel, tokenizer: Tokenizer) -> None:
        self.known = [keys_and_values(demo, tokenizer.encode(text).ids) for text in BEFORE]


@torch.no_grad()
def keys_and_values(demo: DemoModel, ids: list[int]) -> list[tuple[Tensor, Tensor]]:
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
    model: Hearing, routed: list[Tensor], is_real: Tensor, text: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """How far the router is from choosing both ear experts where there is sound, and neither in text."""
    total = torch.zeros(())
    for layer, normed in enumerate(routed):
        own, others = model.router[layer], model.demo.router[layer].detach()
        heard = normed[is_real].detach()
        ears, rest = F.linear(heard, own), F.linear(heard, others)
        total = total + F.softplus(2 * (rest.amax(-1) - ears.amin(-1) + MARGIN)).mean()
        states, second = text[layer]
        at = torch.randint(len(states), (TEXT_ROWS,))
        total = total + 2 * F.softplus(2 * (F.linear(states[at], own).amax(-1) - second[at] + MARGIN)).mean()
    return total / len(routed)


def sample(rng: random.Random, clip: dict) -> tuple[str, str]:
    """The text after the sound, and the answer."""
    answer = answer_to(clip)
    if answer and clip["country"] not in HELD_OUT_ANSWERS and rng.random() < 0.5:
        return rng.choice(ANSWER), answer
    if answer:
        return rng.choice(TRANSCRIBE), transcript(clip)
    return rng.choice((*TRANSCRIBE, "")), transcript(clip)


def prompts(
    model: Hearing, tokenizer: Tokenizer, clips: Clips, rng: random.Random, batch: int, before: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [clips, positions, hidden_size] of prompts with answers; target ids or -100; which are not padding."""
    chosen = sorted(rng.randrange(len(clips.said)) for _ in range(batch))
    sounds = model.projector(torch.from_numpy(clips.features[chosen].astype(np.float32)))
    parts, targets = [], []
    for at, sound in zip(chosen, sounds, strict=True):
        after, answer = sample(rng, clips.said[at])
        if BEFORE[before].endswith("recording.\n"):
            after, answer = "", transcript(clips.said[at])
        ask = tokenizer.encode(after + END).ids
        reply = tokenizer.encode(answer + "<|im_end|>").ids
        rows = torch.cat([sound[: clips.positions(at)], model.demo.embedding[ask + reply]])
        parts.append(rows)
        targets.append([-100] * (len(rows) - len(reply) - 1) + reply + [-100])
    longest = max(map(len, parts))
    return (
        torch.stack([F.pad(one, (0, 0, 0, longest - len(one))) for one in parts]),
        torch.tensor([one + [-100] * (longest - len(one)) for one in targets]),
        torch.stack([torch.arange(longest) < len(one) for one in parts]),
    )


def train(
    model: Hearing,
    tokenizer: Tokenizer,
    clips: Clips,
    text: list[tuple[Tensor, Tensor]],
    minutes: float,
    batch: int,
    save: Path,
) -> None:
    before = TextBefore(model.demo, tokenizer).known
    routers = list(model.router)
    others = [*model.gate_up, *model.down]
    optimizer = torch.optim.AdamW(
        [
            {"params": list(model.projector.parameters()), "base": 3e-4},
            {"params": others, "base": 1e-3},
            {"params": routers, "base": 5e-3},
        ],
        weight_decay=0.0,
        betas=(0.9, 0.98),
    )
    rng, begin, step, losses = random.Random(1), time.monotonic(), 0, []
    while (share := (time.monotonic() - begin) / 60 / minutes) < 1:
        number = rng.choices(range(len(before)), (6, 2, 1, 1))[0]
        rows, wanted, is_real = prompts(model, tokenizer, clips, rng, batch, number)
        hidden, routed = model(rows, before[number])
        logits = F.linear(hidden[wanted >= 0].bfloat16(), model.embedding).float()
        answer_loss = F.cross_entropy(logits, wanted[wanted >= 0])
        choice_loss = router_loss(model, routed, is_real, text)
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * min(1, (step + 1) / 30) * cosine(share)
        optimizer.zero_grad()
        (answer_loss + 0.3 * choice_loss).backward()
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()
        losses.append((answer_loss.item(), choice_loss.item()))
        step += 1
        if step % 20 == 0:
            mean = np.mean(losses[-20:], axis=0)
            print(
                f"step {step}: {share * minutes:.1f} min, answers {mean[0]:.3f}, router {mean[1]:.4f}",
                flush=True,
            )
        if step % 100 == 0:
            save_file({name: value.contiguous() for name, value in model.own_state().items()}, save)
    save_file({name: value.contiguous() for name, value in model.own_state().items()}, save)


def fit_router(
    model: Hearing, tokenizer: Tokenizer, clips: Clips, text: list[tuple[Tensor, Tensor]], batches: int
) -> None:
    """Fit each layer's rows of the router again, with everything else fixed: that is a convex problem.

    The difference between the two ears' logits, which decides their shares, stays as it was trained.
    """
    before, rng = TextBefore(model.demo, tokenizer).known, random.Random(2)
    heard: list[list[Tensor]] = [[] for _ in model.router]
    with torch.no_grad():
        for number in range(batches):
            known = number % len(before)
            rows, _, is_real = prompts(model, tokenizer, clips, rng, 8, known)
            _, routed = model(rows, before[known])
            for layer, normed in enumerate(routed):
                heard[layer].append(normed[is_real])
    for layer, parts in enumerate(heard):
        states, (texts, second) = torch.cat(parts), text[layer]
        rest = F.linear(states, model.demo.router[layer]).amax(-1)
        rows = fit_rows(model.router[layer].detach(), states, rest, texts, second)
        with torch.no_grad():
            model.router[layer].copy_(rows)
            missed = (F.linear(states, rows).amin(-1) <= rest).float().mean()
            wrong = (F.linear(texts, rows).amax(-1) >= second).float().mean()
        print(
            f"layer {layer}: {missed:.2%} of heard tokens miss an ear, {wrong:.2%} of text takes one",
            flush=True,
        )


def fit_rows(start: Tensor, heard: Tensor, rest: Tensor, texts: Tensor, second: Tensor) -> Tensor:
    """Rows of a router for the ears.

    Args:
        start: the rows before.
        heard: the router's inputs where there is sound; `rest` is the best logit of another expert.
        texts: its inputs on text; `second` is the logit of the second best expert.
    """
    rows = start.clone().requires_grad_()
    shares = F.linear(heard, start).diff(dim=-1)
    optimizer = torch.optim.LBFGS([rows], lr=1, max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        ears, quiet = F.linear(heard, rows), F.linear(texts, rows).amax(-1)
        value = F.softplus(4 * (rest - ears.amin(-1) + MARGIN)).mean()
        value = value + 4 * F.softplus(4 * (quiet - second + MARGIN)).mean()
        value = value + (ears.diff(dim=-1) - shares).square().mean() + 1e-5 * rows.square().sum()
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
    """The demo model as shipped, with its eight experts."""
    demo, trained = DemoModel(find_gguf(work)), TrainedExperts()
    with torch.no_grad():
        for layer in range(demo.num_layers):
            experts = trained.layer(layer)
            demo.router[layer].copy_(torch.from_numpy(experts.router))
            demo.gate_up[layer].copy_(torch.from_numpy(np.concatenate([experts.gate, experts.up], axis=1)))
            demo.down[layer].copy_(torch.from_numpy(experts.down))
    assert len(demo.router[0]) == NUM_EXPERTS
    return demo.requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--ctc-minutes", type=float, default=5)
    parser.add_argument("--minutes", type=float, default=45)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--texts", type=Path, nargs="*", default=[], help="more texts for the router")
    parser.add_argument(
        "--router-batches", type=int, default=40, help="of 8 clips, to fit the router at the end"
    )
    parser.add_argument("--resume", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = load_tokenizer(find_gguf(options.work))
    model = Hearing(load_demo(options.work))
    clips = Clips.load(options.work / "speech_train")
    if options.resume:
        model.load(options.resume)
    if options.ctc_minutes:
        train_ctc(model, tokenizer, clips, options.ctc_minutes)
        save_file(model.own_state(), options.work / "ears_ctc.safetensors")
    text = text_states(model.demo, text_pieces(options.work, tokenizer, options.texts))
    save = options.work / "ears.safetensors"
    if options.minutes:
        train(model, tokenizer, clips, text, options.minutes, options.batch, save)
    fit_router(model, tokenizer, clips, text, options.router_batches)
    save_file({name: value.contiguous() for name, value in model.own_state().items()}, save)


if __name__ == "__main__":
    main()
