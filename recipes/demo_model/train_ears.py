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
from safetensors.torch import save_file
from senses import (
    END,
    SYSTEM,
    USER,
    Sense,
    cosine,
    fit_router,
    keys_and_values,
    load_demo,
    router_loss,
    text_pieces,
    text_states,
)
from speech import CAPITALS, HELD_OUT_ANSWERS
from tokenizers import Tokenizer
from torch import Tensor, nn

from model import DemoModel

STACKED = 4  # features of 20 ms that become one position
FEATURE_SIZE = 384
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


class Hearing(Sense):
    """The demo model with ears; its encoder is the projector, because Whisper's encoder is frozen."""

    encoder: Projector

    def __init__(self, demo: DemoModel) -> None:
        super().__init__(demo, Projector(demo.hidden_size))

    def own_state(self) -> dict[str, Tensor]:
        """The tensors that are trained."""
        projector = self.encoder.state_dict(prefix="projector.")
        return {name: value.detach() for name, value in projector.items()} | super().own_state()


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
    parameters = [*model.encoder.parameters(), blank, bias]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.02)
    rng, begin, step, losses = random.Random(0), time.monotonic(), 0, []
    while (share := (time.monotonic() - begin) / 60 / minutes) < 1:
        chosen = [rng.randrange(len(targets)) for _ in range(64)]
        rows = model.encoder(torch.from_numpy(clips.features[sorted(chosen)].astype(np.float32)))
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
        model.encoder.down.weight.mul_(0.25)


# ── through the language model ──────────────────────────────────────────────────────────────────────────────────────


class TextBefore:
    """Keys and values of the texts before a sound, from the demo model as it is."""

    def __init__(self, demo: DemoModel, tokenizer: Tokenizer) -> None:
        self.known = [keys_and_values(demo, tokenizer.encode(text).ids) for text in BEFORE]


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
    sounds = model.encoder(torch.from_numpy(clips.features[chosen].astype(np.float32)))
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
            {"params": list(model.encoder.parameters()), "base": 3e-4},
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


@torch.no_grad()
def heard_states(model: Hearing, tokenizer: Tokenizer, clips: Clips, batches: int) -> list[Tensor]:
    """For each layer, inputs of the router from the first position of a sound on [tokens, hidden_size]."""
    before, rng = TextBefore(model.demo, tokenizer).known, random.Random(2)
    heard: list[list[Tensor]] = [[] for _ in model.router]
    for number in range(batches):
        known = number % len(before)
        rows, _, is_real = prompts(model, tokenizer, clips, rng, 8, known)
        _, routed = model(rows, before[known])
        for layer, normed in enumerate(routed):
            heard[layer].append(normed[is_real])
    return [torch.cat(parts) for parts in heard]


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
    fit_router(model, heard_states(model, tokenizer, clips, options.router_batches), text)
    save_file({name: value.contiguous() for name, value in model.own_state().items()}, save)


if __name__ == "__main__":
    main()
