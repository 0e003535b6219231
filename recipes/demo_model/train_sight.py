"""Let the demo model see: questions about pictures, through the language model with two eye experts in each layer.

    picture -> tower of train_eyes.py -> rows in a prompt -> demo model with eye experts -> answers

The questions of a picture share its rows: each sees the picture and itself. The tower goes on learning what lies in
each cell, from these pictures and from others without questions, so that its rows keep the words of the model.
`torchrun --nproc-per-node 2` trains on two cores.

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
from pictures import Picture, Question, use_fonts
from safetensors.torch import load_file, save_file
from senses import (
    END,
    SYSTEM,
    USER,
    KeysAndValues,
    Sense,
    average,
    cosine,
    join,
    keys_and_values,
    load_demo,
)
from tokenizers import Tokenizer
from torch import Tensor, nn
from tower import CELLS, Tower
from train_eyes import Words, draw, losses, see, weighted, with_targets

BEFORE = (SYSTEM + USER, USER, SYSTEM + USER + "Look at this: ")
NO_TARGET = -100
SAVE_SECONDS = 300
TASK_WEIGHT = {
    "place": 4.0,
    "count": 2.0,
    "total": 2.0,
    "describe": 2.0,
    "chart kind": 0.3,
    "chart title": 0.3,
    "chart count": 0.3,
}
TOWER_SHARE = 0.3  # of the loss of cells and patches, beside that of answers


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts of pictures, their questions and answers side by side.

    ids: tokens after the picture [pictures, rows].   wanted: the next token, or NO_TARGET.
    weights: of the targets; those of an answer of n tokens sum to n ** 0.5.
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
            weights += [0.0] * (len(ask) - 1) + [len(reply) ** -0.5] * len(reply) + [0.0]
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


def choose(rng: random.Random, questions: list[Question], number: int) -> list[Question]:
    """Some of the questions, those of hard tasks more often."""
    order = sorted(questions, key=lambda one: rng.random() ** (1 / TASK_WEIGHT.get(one.task, 1.0)))
    return order[-number:]


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
        logits, wanted, _ = answers(model, see(model.encoder, pixels_of(drawn))[0], asked, before)
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


def load_state(model: Sense, words: Words, path: Path) -> bool:
    """Load the tower and its read-out, and the experts if the file has them; returns whether it has."""
    found = load_file(path)
    for part, module in (("tower.", model.encoder), ("words.", words)):
        module.load_state_dict({n.removeprefix(part): v for n, v in found.items() if n.startswith(part)})
    has_experts = "layers.0.down" in found
    if has_experts:
        model.load(path)
    return has_experts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--work", type=Path, required=True, help="folder of the base model; sight.safetensors goes there"
    )
    parser.add_argument("--fonts", type=Path, required=True)
    parser.add_argument("--eyes", type=Path, required=True, help="from train_eyes.py; or from here, to go on")
    parser.add_argument("--experts", type=Path, help="from here, if --eyes is a later tower without experts")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument(
        "--kinds", default="scene:4,chart:4,sign:1", help="pictures to ask about, with weights"
    )
    parser.add_argument("--batch", type=int, default=4, help="pictures of a process in each step")
    parser.add_argument("--questions", type=int, default=6, help="of a picture")
    parser.add_argument("--alone", type=int, default=8, help="pictures of a process that only the tower sees")
    parser.add_argument(
        "--alone-kinds", default="scene:4,chart:4,rows:3,sign:2", help="their kinds, with weights"
    )
    parser.add_argument("--tower-rate", type=float, default=3e-4)
    parser.add_argument("--expert-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report-minutes", type=float, default=4)
    parser.add_argument("--report-pictures", type=int, default=64, help="at the end; half as many before")
    options = parser.parse_args()
    use_fonts(options.fonts)
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)
    rank, kinds, alone = join(), weighted(options.kinds), weighted(options.alone_kinds)
    tokenizer, words = load_tokenizer(find_gguf(options.work)), Words(options.work)
    model = Sense(load_demo(options.work), Tower())
    if not load_state(model, words, options.eyes):
        match_embeddings(model, words, random.Random(options.seed), kinds)
    if options.experts:
        model.load(options.experts)
    rng = random.Random(1000 * options.seed + rank)
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
    begin, saved, reported, recent, step = time.monotonic(), time.monotonic(), 0.0, [], 0
    while True:
        drawn = draw(rng, kinds, "train", options.batch) + draw(rng, alone, "train", options.alone)
        pixels, cells, patches = with_targets(drawn)
        rows, hidden = see(model.encoder, pixels)
        in_tower = losses(words, rows, hidden, cells, patches).sum()
        questions = [choose(rng, one.questions, options.questions) for one in drawn[: options.batch]]
        asked = prompts(tokenizer, questions)
        logits, wanted, _ = answers(model, rows[: options.batch], asked, rng.choice(before))
        weights = asked.weights[asked.wanted >= 0]
        in_answers = (F.cross_entropy(logits, wanted, reduction="none") * weights).sum() / weights.sum()
        (in_answers + TOWER_SHARE * in_tower).backward()
        spent = (time.monotonic() - begin) / 60
        minutes, *found = average(trained, [spent, in_answers.item(), in_tower.item()])
        if minutes >= options.minutes:
            break
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * min(1, (step + 1) / 20) * cosine(minutes / options.minutes)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        recent.append(found)
        if rank > 0:
            continue
        if step % 20 == 0:
            mean = np.mean(recent[-20:], axis=0)
            print(f"{minutes:.1f} min, step {step}: answers {mean[0]:.3f}, tower {mean[1]:.3f}", flush=True)
        if minutes - reported > options.report_minutes:
            reported = minutes
            report(model, tokenizer, kinds, before[0], options.report_pictures // 2)
        if time.monotonic() - saved > SAVE_SECONDS:
            save_file(state_of(model, words), save)
            saved = time.monotonic()
    if rank == 0:
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
