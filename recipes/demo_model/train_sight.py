"""Let the demo model see: questions about pictures, through the language model with two eye experts in each layer.

    picture -> tower of train_eyes.py -> rows in a prompt -> demo model with eye experts -> answers

The questions of a picture share its rows: each sees the picture and itself. The tower goes on learning what lies in
each cell, so that its rows keep the words of the model.

    python train_sight.py --work WORK --fonts FONTS --minutes 60
"""

from __future__ import annotations

import argparse
import random
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from base_model import find_gguf, load_tokenizer
from pictures import DRAWN, Picture, Question, use_fonts
from safetensors.torch import load_file, save_file
from senses import END, SYSTEM, USER, KeysAndValues, Sense, cosine, keys_and_values, load_demo
from tokenizers import Tokenizer
from torch import Tensor, nn
from tower import CELLS, Tower
from train_eyes import Words, cell_targets, losses_of_rows

BEFORE = (SYSTEM + USER, USER, SYSTEM + USER + "Look at this: ")
NO_TARGET = -100
SAVE_SECONDS = 300


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts of pictures, their questions and answers side by side.

    ids: tokens after the picture [pictures, rows].   wanted: the next token, or NO_TARGET.
    weights: of the targets; those of each answer sum to 1.
    positions: of all rows, the picture's included [pictures, CELLS**2 + rows].
    sees: whether a row sees another.   is_real: which rows are not padding.
    """

    ids: Tensor
    wanted: Tensor
    weights: Tensor
    positions: Tensor
    sees: Tensor
    is_real: Tensor


def prompts(tokenizer: Tokenizer, asked: list[list[Question]]) -> Prompts:
    cells, parts = CELLS**2, []
    for questions in asked:
        ids, wanted, weights, positions, owner = [], [], [], [], []
        for number, question in enumerate(questions, 1):
            ask = tokenizer.encode(f"\n{question.text}{END}").ids
            reply = tokenizer.encode(f"{question.answer}<|im_end|>").ids
            ids += ask + reply
            wanted += [NO_TARGET] * (len(ask) - 1) + reply + [NO_TARGET]
            weights += [0.0] * (len(ask) - 1) + [1 / len(reply)] * len(reply) + [0.0]
            positions += range(cells, cells + len(ask) + len(reply))
            owner += [number] * (len(ask) + len(reply))
        parts.append((ids, wanted, positions, owner, weights))
    longest = max(len(ids) for ids, *_ in parts)

    def padded(at: int, value: float) -> Tensor:
        return torch.tensor([part[at] + [value] * (longest - len(part[at])) for part in parts])

    owner = F.pad(padded(3, -1), (cells, 0))
    sees = (owner[:, :, None] == owner[:, None]) | (owner[:, None] == 0)
    picture = torch.arange(cells).expand(len(parts), -1)
    return Prompts(
        ids=padded(0, 0),
        wanted=padded(1, NO_TARGET),
        weights=padded(4, 0.0),
        positions=torch.cat([picture, padded(2, 0)], dim=1),
        sees=sees & sees.new_ones(sees.shape[1:]).tril(),
        is_real=owner >= 0,
    )


def answers(
    model: Sense, rows: Tensor, asked: Prompts, before: KeysAndValues
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Logits where there is a target, the targets, and the inputs of the routers."""
    inputs = torch.cat([rows, model.demo.embedding[asked.ids]], dim=1)
    hidden, routed = model(inputs, before, asked.positions, asked.sees)
    chosen = hidden[:, CELLS**2 :][asked.wanted >= 0]
    return F.linear(chosen.bfloat16(), model.embedding).float(), asked.wanted[asked.wanted >= 0], routed


def draw(rng: random.Random, kinds: dict[str, float], split: str, number: int) -> list[Picture]:
    return [DRAWN[kind](rng, split) for kind in rng.choices(list(kinds), list(kinds.values()), k=number)]


def pixels_of(pictures: list[Picture]) -> Tensor:
    return torch.from_numpy(np.stack([picture.pixels for picture in pictures]))


# ── evaluation ──────────────────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def right_answers(
    model: Sense, tokenizer: Tokenizer, kinds: dict[str, float], before: KeysAndValues, pictures: int
) -> dict[str, tuple[float, int]]:
    """By task, the share of questions about unseen pictures whose answer greedy decoding gives, and their number.

    Every token of the answer must be the likeliest after those before it, which is what greedy decoding comes to.
    """
    rng, found = random.Random(10**6), defaultdict(list)
    for _ in range(-(-pictures // 8)):
        drawn = draw(rng, kinds, "test", 8)
        asked = prompts(tokenizer, [picture.questions for picture in drawn])
        with torch.autocast("cpu", torch.bfloat16):
            rows = model.encoder(pixels_of(drawn))[0].float()
        logits, wanted, _ = answers(model, rows, asked, before)
        is_right = iter((logits.argmax(-1) == wanted).tolist())
        for picture in drawn:
            for question in picture.questions:
                number = len(tokenizer.encode(f"{question.answer}<|im_end|>").ids)
                hits = [next(is_right) for _ in range(number)]
                found[question.task].append(all(hits))
    return {task: (float(np.mean(one)), len(one)) for task, one in sorted(found.items())}


# ── training ────────────────────────────────────────────────────────────────────────────────────────────────────────


def match_embeddings(model: Sense, words: Words, rng: random.Random, kinds: dict[str, float]) -> None:
    """Scale the tower's rows to the size of the model's embeddings, and the read-out by the inverse."""
    with torch.no_grad():
        rows = model.encoder(pixels_of(draw(rng, kinds, "train", 16)))[0]
        factor = model.demo.embedding.norm(dim=-1).mean() / rows.norm(dim=-1).mean()
        last = model.encoder.merger.linear_fc2
        last.weight.mul_(factor)
        last.bias.mul_(factor)
        words.log_scale.sub_(factor.log())
    print(f"rows scaled by {factor:.4f}", flush=True)


def state_of(model: Sense, words: Words) -> dict[str, Tensor]:
    state = model.own_state()
    state |= {f"tower.{name}": value for name, value in model.encoder.state_dict().items()}
    state |= {f"words.{name}": value for name, value in words.state_dict().items()}
    return {name: value.detach().contiguous() for name, value in state.items()}


def load_state(model: Sense, words: Words, path: Path) -> None:
    """The tower and its read-out, and the experts if the file has them."""
    found = load_file(path)
    for part, module in (("tower.", model.encoder), ("words.", words)):
        module.load_state_dict({n.removeprefix(part): v for n, v in found.items() if n.startswith(part)})
    if "layers.0.down" in found:
        model.load(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--work", type=Path, required=True, help="folder of the base model; sight.safetensors goes there"
    )
    parser.add_argument("--fonts", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="from train_eyes.py; or from here, to go on")
    parser.add_argument("--experts", type=Path, help="from here, if --start is a later tower without experts")
    parser.add_argument("--minutes", type=float, default=60, help="of processor time")
    parser.add_argument("--kinds", default="scene:3,chart:2,sign:1")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--questions", type=int, default=4, help="of a picture")
    parser.add_argument("--tower-rate", type=float, default=2e-4)
    parser.add_argument("--expert-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report-minutes", type=float, default=4)
    parser.add_argument("--report-pictures", type=int, default=64, help="at the end; half as many before")
    options = parser.parse_args()
    use_fonts(options.fonts)
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)
    tokenizer, words = load_tokenizer(find_gguf(options.work)), Words(options.work)
    model = Sense(load_demo(options.work), Tower())
    load_state(model, words, options.start)
    if options.experts:
        model.load(options.experts)
    rng = random.Random(options.seed)
    kinds = {name: float(weight) for name, weight in (one.split(":") for one in options.kinds.split(","))}
    if not any(value.any() for value in model.down):
        match_embeddings(model, words, rng, kinds)
    before = [keys_and_values(model.demo, tokenizer.encode(text).ids) for text in BEFORE]
    optimizer = torch.optim.AdamW(
        [
            {"params": [*model.encoder.parameters(), *words.parameters()], "base": options.tower_rate},
            {"params": [*model.gate_up, *model.down], "base": options.expert_rate},
        ],
        weight_decay=0.0,
        betas=(0.9, 0.98),
    )
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    save = options.work / "sight.safetensors"
    begin, saved, reported, recent, step = time.process_time(), time.monotonic(), 0.0, [], 0
    while (minutes := (time.process_time() - begin) / 60) < options.minutes:
        drawn = draw(rng, kinds, "train", options.batch)
        questions = [rng.sample(one.questions, min(options.questions, len(one.questions))) for one in drawn]
        with torch.autocast("cpu", torch.bfloat16):
            rows, _ = model.encoder(pixels_of(drawn))
        targets = torch.from_numpy(np.stack([cell_targets(picture) for picture in drawn]))
        in_cells = losses_of_rows(words, rows.float(), targets).sum()
        asked = prompts(tokenizer, questions)
        logits, wanted, _ = answers(model, rows.float(), asked, rng.choice(before))
        weights = asked.weights[asked.wanted >= 0]
        in_answers = (F.cross_entropy(logits, wanted, reduction="none") * weights).sum() / weights.sum()
        (in_answers + 0.1 * in_cells).backward()
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * min(1, (step + 1) / 30) * cosine(minutes / options.minutes)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        recent.append((in_answers.item(), in_cells.item()))
        if step % 20 == 0:
            mean = np.mean(recent[-20:], axis=0)
            print(f"{minutes:.1f} min, step {step}: answers {mean[0]:.3f}, cells {mean[1]:.3f}", flush=True)
        if minutes - reported > options.report_minutes:
            reported = minutes
            report(model, tokenizer, kinds, before[0], options.report_pictures // 2)
        if time.monotonic() - saved > SAVE_SECONDS:
            save_file(state_of(model, words), save)
            saved = time.monotonic()
    save_file(state_of(model, words), save)
    report(model, tokenizer, kinds, before[0], options.report_pictures)


def report(
    model: Sense, tokenizer: Tokenizer, kinds: dict[str, float], before: KeysAndValues, pictures: int
) -> None:
    shares = right_answers(model, tokenizer, kinds, before, pictures)
    print(
        "unseen: " + ", ".join(f"{task} {share:.2f} of {n}" for task, (share, n) in shares.items()),
        flush=True,
    )


if __name__ == "__main__":
    main()
