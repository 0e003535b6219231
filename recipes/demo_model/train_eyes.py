"""Teach the demo model to see: a vision tower, whose rows say in the model's own words what lies in their cells.

    picture -> tower -> row of each cell -> dot products with the embeddings of words -> what lies there

No language model is in the loop. Beside the rows, linear heads name what each patch shows, so that a picture gives
hundreds of targets instead of a few. `torchrun --nproc-per-node 2` trains on two cores.

    python train_eyes.py --work WORK --fonts FONTS --minutes 60
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from string import ascii_lowercase

import numpy as np
import torch
import torch.nn.functional as F
from base_model import find_gguf, load_tokenizer
from pictures import CELL, DRAWN, NUMBERS, PROPERTIES, SIDE, Mark, Picture, use_fonts
from safetensors.torch import load_file, save_file
from senses import average, cosine, join
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from tower import CELLS, GRID, HIDDEN_SIZE, PATCH, Tower, cell_order

from argosy.checkpoint.dense import open_dense

BATCH = 8
SAVE_SECONDS = 300
NOWHERE = -100
INNER, OUTER = 0.7, 1.15  # a patch is on a mark up to this part of its half size, and off it from that on
LEAST_FILL = 1 / 3  # a word or bar fills cells along its middle that it covers at least so far
WEIGHT = {"word": 2.0, "count": 2.0}  # of the losses of a property; 1 for the others
PATCH_PROPERTIES = {name: words for name, words in PROPERTIES.items() if name not in ("row", "column")}

# ── targets ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def cell_of(x: float, y: float) -> int:
    column, row = (min(CELLS - 1, max(0, int(at / CELL))) for at in (x, y))
    return row * CELLS + column


def filled(mark: Mark) -> dict[int, float]:
    """The cells of a mark, each with the share of its side that it covers there.

    A word fills cells from left to right, a bar from bottom to top; everything else has one cell, that of its centre.
    """
    (x, y), (left, top, right, bottom) = mark.centre, mark.box
    centre = {cell_of(x, y): 1.0}
    if mark.words["kind"] not in ("word", "bar"):
        return centre
    is_word = mark.words["kind"] == "word"
    start, end = (left, right) if is_word else (top, bottom)
    found = {}
    for at in range(CELLS):
        if (share := min(end, CELL * (at + 1)) / CELL - max(start, CELL * at) / CELL) > 0:
            middle = CELL * (at + 0.5)
            found[cell_of(middle, y) if is_word else cell_of(x, middle)] = share
    return found if max(found.values(), default=0) >= LEAST_FILL else centre


def cell_targets(picture: Picture) -> np.ndarray:
    """For each cell and property, the number of the word of the mark that fills it most [cells, properties]."""
    found = np.full((CELLS**2, len(PROPERTIES)), NOWHERE, np.int64)
    found[:, 0] = 0
    shares = np.zeros(CELLS**2)
    for mark in picture.marks:
        for cell, share in filled(mark).items():
            if share <= shares[cell]:
                continue
            shares[cell], found[cell] = share, NOWHERE
            if share >= LEAST_FILL:
                found[cell] = numbers_of(mark.words, PROPERTIES)
    if picture.total:
        found[found[:, 0] == 0, list(PROPERTIES).index("total")] = NUMBERS.index(picture.total) - 1
    return found


def numbers_of(words: dict[str, str], properties: dict[str, tuple[str, ...]]) -> list[int]:
    return [known.index(words[name]) if name in words else NOWHERE for name, known in properties.items()]


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
        found[distance < INNER] = numbers_of(mark.words, PATCH_PROPERTIES)
        if mark.text:
            on = (top <= y) & (y <= bottom) & (left <= x) & (x < right)
            letters = np.searchsorted(mark.ends, x[on], side="right")
            found[on, letter_at] = [ascii_lowercase.index(mark.text[letter]) for letter in letters]
    if picture.total:
        found[found[:, 0] == 0, list(PATCH_PROPERTIES).index("total")] = NUMBERS.index(picture.total) - 1
    return found


class Drawn(IterableDataset):
    """Batches of fresh pictures: pixels, targets of cells, targets of patches."""

    def __init__(self, kinds: dict[str, float], split: str, seed: int, batch: int = BATCH) -> None:
        self.kinds, self.split, self.seed, self.batch = kinds, split, seed, batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        rng = random.Random(self.seed)
        while True:
            yield with_targets(draw(rng, self.kinds, self.split, self.batch))


def draw(rng: random.Random, kinds: dict[str, float], split: str, number: int) -> list[Picture]:
    return [DRAWN[kind](rng, split) for kind in rng.choices(list(kinds), list(kinds.values()), k=number)]


def with_targets(drawn: list[Picture]) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels, targets of cells, targets of patches."""
    parts = ([p.pixels for p in drawn], map(cell_targets, drawn), map(patch_targets, drawn))
    pixels, cells, patches = (torch.from_numpy(np.stack(list(part))) for part in parts)
    return pixels, cells, patches


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


def see(tower: Tower, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of cells and hidden states of patches, computed in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        rows, hidden = tower(pixels)
    return rows.float(), hidden.float()


def losses(words: Words, rows: Tensor, hidden: Tensor, cells: Tensor, patches: Tensor) -> Tensor:
    """The mean loss over cells of each property, then over patches, times its weight."""
    found = []
    for at, name in enumerate(PROPERTIES):
        weight = torch.tensor([0.6, *[1.0] * (len(PROPERTIES[name]) - 1)]) if name == "kind" else None
        found.append(cross_entropy(words.of_cells(rows, name), cells[..., at], weight))
    for at, name in enumerate(PATCH_PROPERTIES):
        found.append(cross_entropy(words.of_patches(hidden, name), patches[..., at], None))
    return torch.stack(found) * torch.tensor(
        [WEIGHT.get(name, 1.0) for name in (*PROPERTIES, *PATCH_PROPERTIES)]
    )


def cross_entropy(logits: Tensor, wanted: Tensor, weight: Tensor | None) -> Tensor:
    if not (wanted >= 0).any():
        return logits.sum() * 0
    return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), weight, ignore_index=NOWHERE)


# ── training ────────────────────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def read_out(tower: Tower, words: Words, kind: str, pictures: int) -> dict[str, float]:
    """On unseen pictures: of cells, the share with the right word of each property; of marks, the share found."""
    right: dict[str, list[float]] = {name: [] for name in PROPERTIES}
    found, marks, said = 0, 0, 0
    for pixels, cells, _ in DataLoader(Drawn({kind: 1}, "test", seed=10**6, batch=16), batch_size=None):
        rows = see(tower, pixels)[0]
        for at, name in enumerate(PROPERTIES):
            guess, wanted = words.of_cells(rows, name).argmax(-1), cells[..., at]
            if name == "kind":
                found += int(((guess > 0) & (wanted > 0)).sum())
                marks, said = marks + int((wanted > 0).sum()), said + int((guess > 0).sum())
            known = wanted > 0 if name == "kind" else wanted >= 0
            right[name] += (guess == wanted)[known].float().tolist()
        pictures -= len(pixels)
        if pictures <= 0:
            break
    shares = {name: float(np.mean(values)) for name, values in right.items() if values}
    return shares | {"found": found / max(1, marks), "found rightly": found / max(1, said)}


def told(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.3f}" for name, share in shares.items())


def weighted(kinds: str) -> dict[str, float]:
    """Kinds of pictures with their weights, from `scene:3,chart:1`."""
    return {name: float(weight) for name, weight in (one.split(":") for one in kinds.split(","))}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--work", type=Path, required=True, help="folder of the base model; eyes.safetensors goes there"
    )
    parser.add_argument("--fonts", type=Path, required=True, help="folder with the fonts, at any depth")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--name", default="eyes")
    parser.add_argument(
        "--kinds",
        default="scene:4,chart:4,rows:3,sign:2",
        help="pictures to learn from, with weights",
    )
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--batch", type=int, default=BATCH, help="pictures of a process in each step")
    parser.add_argument("--report-minutes", type=float, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    use_fonts(options.fonts)
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)
    rank, kinds = join(), weighted(options.kinds)
    tower, words = Tower(), Words(options.work)
    model = nn.ModuleDict({"tower": tower, "words": words})
    if options.resume:
        model.load_state_dict(load_file(options.resume), strict=False)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.rate, betas=(0.9, 0.98), weight_decay=0.02, fused=True
    )
    say = partial(print, flush=True) if rank == 0 else lambda _: None
    say(f"{sum(p.numel() for p in tower.parameters()):,} weights in the tower, pictures of {SIDE} pixels")
    save = options.work / f"{options.name}.safetensors"
    begin, saved, reported, recent = time.monotonic(), time.monotonic(), 0.0, []
    drawn = Drawn(kinds, "train", 1000 * options.seed + rank, options.batch)
    for step, batch in enumerate(DataLoader(drawn, batch_size=None, num_workers=1, prefetch_factor=8), 1):
        pixels, cells, patches = batch
        found = losses(words, *see(tower, pixels), cells, patches)
        found.sum().backward()
        minutes, *found = average(model.parameters(), [(time.monotonic() - begin) / 60, *found.tolist()])
        if minutes >= options.minutes:
            break
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = options.rate * min(1, step / 100) * cosine(minutes / options.minutes)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(found)
        if step % 100 == 0:
            mean = np.mean(recent[-100:], axis=0)
            names = [*PROPERTIES, *(f"patch {name}" for name in PATCH_PROPERTIES)]
            say(f"{minutes:.1f} min, step {step}: " + told(dict(zip(names, mean, strict=True))))
        if rank == 0 and minutes - reported > options.report_minutes:
            reported = minutes
            for kind in kinds:
                say(f"  unseen {kind}: {told(read_out(tower, words, kind, 64))}")
        if rank == 0 and time.monotonic() - saved > SAVE_SECONDS:
            save_file({name: value.contiguous() for name, value in model.state_dict().items()}, save)
            saved = time.monotonic()
    if rank == 0:
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, save)
        for kind in kinds:
            say(f"unseen {kind}: {told(read_out(tower, words, kind, 512))}")


if __name__ == "__main__":
    main()
