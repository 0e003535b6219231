"""Fit the rows of the routers for the eyes: chosen from the first position of a picture on, and never in text or sound.

    texts, sounds, pictures -> inputs of each layer's router -> rows of the two eye experts

Run it last, with eyes and ears that are trained; `WORK/train.npz` is what `data.py` writes.

    python fit_sight.py --work WORK --fonts FONTS --eyes WORK/sight.safetensors --ears WORK/ears.safetensors
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from base_model import find_gguf, load_tokenizer
from pictures import use_fonts
from safetensors.torch import save_file
from senses import KeysAndValues, Sense, fit_router, keys_and_values, load_demo, text_pieces, text_states
from tokenizers import Tokenizer
from torch import Tensor
from tower import Tower
from train_ears import Clips, Hearing, heard_states
from train_eyes import Words, draw, see, weighted
from train_sight import BEFORE, answers, load_state, pixels_of, prompts, state_of


@torch.no_grad()
def seen_states(
    model: Sense, tokenizer: Tokenizer, kinds: dict[str, float], before: list[KeysAndValues], batches: int
) -> list[Tensor]:
    """For each layer, inputs of the router from the first position of a picture on [tokens, hidden_size]."""
    rng, seen = random.Random(4), [[] for _ in model.router]
    for number in range(batches):
        drawn = draw(rng, kinds, "train", 4)
        asked = prompts(tokenizer, [rng.sample(one.questions, min(3, len(one.questions))) for one in drawn])
        rows = see(model.encoder, pixels_of(drawn))[0]
        routed = answers(model, rows, asked, before[number % len(before)])[2]
        for layer, normed in enumerate(routed):
            seen[layer].append(normed[asked.is_real])
    return [torch.cat(parts) for parts in seen]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--fonts", type=Path, required=True)
    parser.add_argument("--eyes", type=Path, required=True, help="sight.safetensors; its rows are replaced")
    parser.add_argument("--ears", type=Path, required=True, help="ears.safetensors")
    parser.add_argument("--kinds", default="scene:4,chart:4,sign:1")
    parser.add_argument("--texts", type=Path, nargs="*", default=[], help="more texts")
    parser.add_argument("--batches", type=int, default=24, help="of 4 pictures, and of 8 sounds")
    options = parser.parse_args()
    use_fonts(options.fonts)
    torch.manual_seed(0)
    tokenizer, words, demo = (
        load_tokenizer(find_gguf(options.work)),
        Words(options.work),
        load_demo(options.work),
    )
    ears = Hearing(demo)
    ears.load(options.ears)
    sounds = heard_states(ears, tokenizer, Clips.load(options.work / "speech_train"), options.batches)
    texts = text_states(demo, text_pieces(options.work, tokenizer, options.texts))
    others = [torch.cat([text, ear]).detach() for text, ear in zip(demo.router, ears.router, strict=True)]
    quiet = []
    for (text, second), sound, rows in zip(texts, sounds, others, strict=True):
        second_of_sound = F.linear(sound, rows).topk(2, dim=-1).values[:, 1]
        quiet.append((torch.cat([text, sound]), torch.cat([second, second_of_sound])))
    del ears, texts, sounds
    model = Sense(demo, Tower())
    load_state(model, words, options.eyes)
    kinds = weighted(options.kinds)
    before = [keys_and_values(demo, tokenizer.encode(text).ids) for text in BEFORE]
    fit_router(model, seen_states(model, tokenizer, kinds, before, options.batches), quiet, others)
    save_file(state_of(model, words), options.eyes)


if __name__ == "__main__":
    main()
