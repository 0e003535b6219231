"""Teach the demo model to see: a vision tower, whose rows say in the model's own words what lies in their cells.

    picture -> tower -> row of each cell -> dot products with the embeddings of words -> what lies there

No language model is in the loop. Beside the rows, linear heads name what each patch shows, so that a picture gives
hundreds of targets instead of a few.

    python train_eyes.py --work WORK --minutes 60
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from pathlib import Path
from string import ascii_lowercase

import numpy as np
import torch
import torch.nn.functional as F
from base_model import find_gguf, load_tokenizer
from pictures import CELL, DRAWN, PROPERTIES, SIDE, Picture, use_fonts
from safetensors.torch import load_file, save_file
from senses import cosine
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from tower import CELLS, GRID, HIDDEN_SIZE, PATCH, Tower, cell_order

from argosy.checkpoint.dense import open_dense

BATCH = 8
SAVE_SECONDS = 300
NOWHERE = -100
INNER, OUTER = 0.7, 1.15  # a patch is on a mark up to this part of its half size, and off it from that on
PATCH_SHARE = 1.0  # of the loss, beside cells
PATCH_PROPERTIES = {name: words for name, words in PROPERTIES.items() if name not in ("row", "column")}

# ── targets ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def cell_of(x: float, y: float) -> int:
    column, row = (min(CELLS - 1, max(0, int(at / CELL))) for at in (x, y))
    return row * CELLS + column


def cell_targets(picture: Picture) -> np.ndarray:
    """For each cell and property, the number of the word of the mark whose centre lies there [cells, properties]."""
    found = np.full((CELLS**2, len(PROPERTIES)), NOWHERE, np.int64)
    found[:, 0] = 0
    for mark in picture.marks:
        cell = cell_of(*mark.centre)
        for at, (name, words) in enumerate(PROPERTIES.items()):
            if name in mark.words:
                found[cell, at] = words.index(mark.words[name])
    return found


def patch_targets(picture: Picture) -> np.ndarray:
    """The same for the mark that each patch lies on, in `cell_order`; at its edge a patch has no target."""
    found = np.full((GRID**2, len(PATCH_PROPERTIES)), NOWHERE, np.int64)
    found[:, 0] = 0
    letter_at = list(PATCH_PROPERTIES).index("letter")
    y, x = PATCH * (cell_order().numpy()[None] // np.array([[GRID], [1]]) % GRID) + PATCH / 2
    for mark in picture.marks:
        left, top, right, bottom = mark.box
        across = np.abs(2 * x - left - right) / max(right - left, PATCH)
        down = np.abs(2 * y - top - bottom) / max(bottom - top, PATCH)
        distance = np.hypot(across, down) if "shape" in mark.words else np.maximum(across, down)
        found[distance < OUTER] = NOWHERE
        for at, (name, words) in enumerate(PATCH_PROPERTIES.items()):
            if name in mark.words:
                found[distance < INNER, at] = words.index(mark.words[name])
        if mark.text:
            on = (top <= y) & (y <= bottom) & (left <= x) & (x < right)
            letters = np.searchsorted(mark.ends, x[on], side="right")
            found[on, letter_at] = [ascii_lowercase.index(mark.text[letter]) for letter in letters]
    return found


class Drawn(IterableDataset):
    """Batches of fresh pictures: pixels, targets of cells, targets of patches."""

    def __init__(self, kinds: dict[str, float], split: str, seed: int, batch: int = BATCH) -> None:
        self.kinds, self.split, self.seed, self.batch = kinds, split, seed, batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        rng = random.Random(self.seed)
        while True:
            names = rng.choices(list(self.kinds), list(self.kinds.values()), k=self.batch)
            drawn = [DRAWN[name](rng, self.split) for name in names]
            parts = ([p.pixels for p in drawn], map(cell_targets, drawn), map(patch_targets, drawn))
            yield tuple(torch.from_numpy(np.stack(list(part))) for part in parts)


# ── words ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Words(nn.Module):
    """Reads rows of cells by the model's embeddings of words, and patches by matrices of their own."""

    def __init__(self, work: Path) -> None:
        super().__init__()
        gguf = find_gguf(work)
        tokenizer = load_tokenizer(gguf)
        embedding = torch.from_numpy(open_dense(gguf).read("model.embed_tokens.weight"))
        mean = embedding.mean(dim=0)
        self.bias, self.patch_heads = nn.ParameterDict(), nn.ModuleDict()
        for name, words in PROPERTIES.items():
            rows = torch.stack([embedding[tokenizer.encode(f" {word}").ids].mean(dim=0) for word in words])
            self.register_buffer(f"words_{name}", F.normalize(rows - mean), persistent=False)
            self.bias[name] = nn.Parameter(torch.zeros(len(words)))
        for name, words in PATCH_PROPERTIES.items():
            self.patch_heads[name] = nn.Linear(HIDDEN_SIZE, len(words))
        self.log_scale = nn.Parameter(torch.tensor(1.0))

    def of_cells(self, rows: Tensor, name: str) -> Tensor:
        return F.linear(rows, self.log_scale.exp() * getattr(self, f"words_{name}"), self.bias[name])

    def of_patches(self, hidden: Tensor, name: str) -> Tensor:
        return self.patch_heads[name](F.layer_norm(hidden, hidden.shape[-1:]))


def losses_of_rows(words: Words, rows: Tensor, cells: Tensor) -> Tensor:
    """The mean loss over cells of each property."""
    found = []
    for at, name in enumerate(PROPERTIES):
        weight = torch.tensor([0.6, *[1.0] * (len(PROPERTIES[name]) - 1)]) if name == "kind" else None
        found.append(cross_entropy(words.of_cells(rows, name), cells[..., at], weight))
    return torch.stack(found)


def losses(tower: Tower, words: Words, pixels: Tensor, cells: Tensor, patches: Tensor) -> Tensor:
    """The mean loss over cells of each property, then over patches."""
    with torch.autocast("cpu", torch.bfloat16):
        rows, hidden = tower(pixels)
    rows, hidden = rows.float(), hidden.float()
    of_patches = [
        cross_entropy(words.of_patches(hidden, name), patches[..., at], None)
        for at, name in enumerate(PATCH_PROPERTIES)
    ]
    return torch.cat([losses_of_rows(words, rows, cells), torch.stack(of_patches)])


def cross_entropy(logits: Tensor, wanted: Tensor, weight: Tensor | None) -> Tensor:
    if not (wanted >= 0).any():
        return logits.sum() * 0
    return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), weight, ignore_index=NOWHERE)


# ── training ────────────────────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def read_out(tower: Tower, words: Words, kind: str, pictures: int) -> dict[str, float]:
    """On unseen pictures: of marks, the share with the right word of each property, and the share found."""
    right: dict[str, list[float]] = {name: [] for name in PROPERTIES}
    found, marks, said = 0, 0, 0
    for pixels, cells, _ in DataLoader(Drawn({kind: 1}, "test", seed=10**6, batch=16), batch_size=None):
        rows = tower(pixels)[0]
        for at, name in enumerate(PROPERTIES):
            guess, wanted = words.of_cells(rows, name).argmax(-1), cells[..., at]
            if name == "kind":
                found += int(((guess > 0) & (wanted > 0)).sum())
                marks, said = marks + int((wanted > 0).sum()), said + int((guess > 0).sum())
            known = (wanted >= 0) & (cells[..., 0] > 0)
            right[name] += (guess == wanted)[known].float().tolist()
        pictures -= len(pixels)
        if pictures <= 0:
            break
    shares = {name: float(np.mean(values)) for name, values in right.items() if values}
    return shares | {"found": found / max(1, marks), "found rightly": found / max(1, said)}


def told(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.3f}" for name, share in shares.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--work", type=Path, required=True, help="folder of the base model; eyes.safetensors goes there"
    )
    parser.add_argument("--fonts", type=Path, required=True, help="folder with the fonts, at any depth")
    parser.add_argument("--minutes", type=float, default=60, help="of processor time")
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--name", default="eyes")
    parser.add_argument(
        "--kinds",
        default="crowd:2,scene:1,words:3,sign:1,chart:3",
        help="pictures to learn from, with weights",
    )
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--report-minutes", type=float, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    use_fonts(options.fonts)
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)
    tower, words = Tower(), Words(options.work)
    model = nn.ModuleDict({"tower": tower, "words": words})
    if options.resume:
        model.load_state_dict(load_file(options.resume), strict=False)
    kinds = {name: float(weight) for name, weight in (one.split(":") for one in options.kinds.split(","))}
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.rate, betas=(0.9, 0.98), weight_decay=0.02, fused=True
    )
    print(
        f"{sum(p.numel() for p in tower.parameters()):,} weights in the tower, pictures of {SIDE} pixels",
        flush=True,
    )
    save = options.work / f"{options.name}.safetensors"
    begin, saved, reported, recent = time.process_time(), time.monotonic(), 0.0, []
    drawn = Drawn(kinds, "train", options.seed, options.batch)
    for step, batch in enumerate(DataLoader(drawn, batch_size=None, num_workers=1, prefetch_factor=8), 1):
        minutes = (time.process_time() - begin) / 60
        if minutes >= options.minutes:
            break
        found = losses(tower, words, *batch)
        weight = torch.tensor([1.0] * len(PROPERTIES) + [PATCH_SHARE] * len(PATCH_PROPERTIES))
        (found * weight).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = options.rate * min(1, step / 100) * cosine(minutes / options.minutes)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(found.detach().numpy())
        if step % 100 == 0:
            mean = np.mean(recent[-100:], axis=0)
            names = [*PROPERTIES, *(f"patch {name}" for name in PATCH_PROPERTIES)]
            print(f"{minutes:.1f} min, step {step}: " + told(dict(zip(names, mean, strict=True))), flush=True)
        if minutes - reported > options.report_minutes:
            reported = minutes
            for kind in kinds:
                print(f"  unseen {kind}: {told(read_out(tower, words, kind, 64))}", flush=True)
        if time.monotonic() - saved > SAVE_SECONDS:
            save_file({name: value.contiguous() for name, value in model.state_dict().items()}, save)
            saved = time.monotonic()
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, save)
    for kind in kinds:
        print(f"unseen {kind}: {told(read_out(tower, words, kind, 512))}", flush=True)


if __name__ == "__main__":
    main()
