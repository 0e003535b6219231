"""Write tiny models that see and hear, whole, and what transformers answers to prompts with media.

    python -m tests.models.make_seeing                    # rewrite the committed references (needs torch, transformers)
    python -m tests.models.make_seeing --out DIR --seed 7 # other values

Each directory of `reference_seeing/` holds a checkpoint as on the hub with its text model and its towers, the
`preprocessor_config.json`, and `ref.safetensors`: pictures (uint8 [height, width, 3]) and perhaps a sound (float32
samples at 16 kHz), `input_ids` with one placeholder for each, and the logits and greedy answer of transformers.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
import transformers

from argosy.media.parts import Kind
from argosy.media.patches import PictureProcessor
from argosy.media.tiles import InternVLFit, OcrFit, TileProcessor
from argosy.media.windows import StepFit
from argosy.model.encoders.encoder import Shape
from argosy.model.encoders.reading import EncoderFiles, find_encoders
from argosy.model.families import open_model
from tests.model.encoders.open_tower import PARTS
from tests.models.make_encoders import load_tower, picture_of, views_of, windows
from tests.models.safetensors_file import Array, read_safetensors, write_safetensors
from tests.models.seeing import CONFIGS, IMAGE_TOKENS, RATE, REFERENCE, encode_text, prompt_of, write
from tests.models.tiny_llama4 import fused

NEW_TOKENS = 8
MOST_LOGITS = 256  # positions whose logits are kept, from the end


def load(directory: Path, family: str) -> Any:
    how: dict[str, Any] = {}
    if family == "qwen3_omni_moe":
        how["config"] = transformers.AutoConfig.from_pretrained(directory).thinker_config
    if family == "llama4":
        return load_llama4(directory)
    if family == "qwen2_moe":
        return Composed(directory)
    model, info = transformers.AutoModelForMultimodalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
        **how,
    )
    unread = ("talker.", "code2wav.")
    info["unexpected_keys"] = [name for name in info["unexpected_keys"] if not name.startswith(unread)]
    # Constants that transformers computes itself.
    info["missing_keys"] = [name for name in info["missing_keys"] if ".ple.ple_embedding." not in name]
    problems = {kind: names for kind, names in info.items() if names}
    if problems:
        raise SystemExit(f"{directory}: {problems}")
    return model.eval()


def load_llama4(directory: Path) -> Any:
    """Load a checkpoint whose experts have tensors of their own, which transformers does not read."""
    config = transformers.AutoConfig.from_pretrained(directory)
    config._attn_implementation = "eager"
    # transformers 5.24 copies this field, which the text model's output does not have.
    transformers.modeling_outputs.MoeCausalLMOutputWithPast.image_outputs = None
    model = transformers.Llama4ForConditionalGeneration(config).float()
    tensors = fused(read_safetensors(directory / "model.safetensors"))
    model.load_state_dict({name: torch.tensor(value) for name, value in tensors.items()})
    return model.eval()


class Composed(torch.nn.Module):
    """The composition of the demo model from three models of transformers; the towers' rows replace placeholders."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.raw = json.loads((directory / "config.json").read_text())
        self.part = PARTS["qwen2_moe_audio"]
        self.tower = load_tower(directory, PARTS["qwen2_moe"], self.raw["vision_config"])
        text = {"hidden_size": self.raw["hidden_size"], "num_attention_heads": 1, "num_hidden_layers": 1}
        config = transformers.VoxtralConfig(
            audio_config=self.raw["audio_config"], text_config={"model_type": "llama", **text}
        )
        how = {"dtype": torch.float32, "attn_implementation": "eager"}
        self.ears = (
            transformers.AutoModelForMultimodalLM.from_pretrained(
                directory, config=config, ignore_mismatched_sizes=True, **how
            )
            .eval()
            .model
        )
        kept = {key: value for key, value in self.raw.items() if not key.endswith(("_config", "_token_id"))}
        self.text = transformers.Qwen2MoeForCausalLM.from_pretrained(
            directory, config=transformers.Qwen2MoeConfig(**kept), experts_implementation="eager", **how
        ).eval()

    def forward(
        self,
        input_ids: Any,
        attention_mask: Any,
        pixel_values: Any,
        image_grid_thw: Any,
        input_features: Any,
        **_: Any,
    ) -> Any:
        rows = self.text.get_input_embeddings()(input_ids).clone()
        seen = self.tower(pixel_values, grid_thw=image_grid_thw).pooler_output
        heard = torch.tensor(windows(self.ears, self.part, input_features[0].numpy()))
        for key, values in (("image_token_id", seen), ("audio_token_id", heard)):
            rows[0, input_ids[0] == self.raw[key]] = values
        return self.text(inputs_embeds=rows, attention_mask=attention_mask)


def with_places(patches: list[Array], grids: list[tuple[int, int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches of each picture or frame, padded, with their places (column, row), as Gemma takes them."""
    most = max(len(each) for each in patches)
    values = np.zeros((len(patches), most, patches[0].shape[1]), np.float32)
    places = np.full((len(patches), most, 2), -1)
    for number, (each, (_, rows, cols)) in enumerate(zip(patches, grids, strict=True)):
        values[number, : len(each)] = each
        places[number, : len(each)] = np.indices((rows, cols))[::-1].reshape(2, -1).T
    return torch.tensor(values), torch.tensor(places)


def picture_inputs(
    model: Any, processor: PictureProcessor, patches: list[Array], grids: list[tuple[int, int, int]]
) -> dict[str, torch.Tensor]:
    """Pictures as the model takes them: patches of all in a row, or of each with their places, padded."""
    if "image_position_ids" in inspect.signature(model.forward).parameters:
        values, places = with_places(patches, grids)
        return {"pixel_values": values, "image_position_ids": places}
    if isinstance(processor.fit, StepFit):
        return views_of([torch.tensor(each) for each in patches], grids, model.config.vision_config)
    if isinstance(processor.fit, OcrFit):
        fit, side = processor.fit, processor.patch_size
        made: dict[str, list[Any]] = {"whole": [], "local": [], "counts": []}
        for each in map(torch.tensor, patches):
            of_tile, of_whole = ((length // side) ** 2 for length in (fit.side, fit.whole))
            made["whole"].append(picture_of(each[-of_whole:], (1, *[fit.whole // side] * 2), 1))
            tiles = each[:-of_whole].split(of_tile) if len(each) > of_whole else ()
            made["local"] += [picture_of(tile, (1, *[fit.side // side] * 2), 1) for tile in tiles]
            made["counts"].append(len(tiles))
        return {
            "pixel_values": torch.stack(made["whole"]),
            "pixel_values_local": torch.stack(made["local"]),
            "num_local_patches": torch.tensor(made["counts"]),
        }
    if isinstance(processor.fit, InternVLFit):
        grid = (1, *[processor.fit.side // processor.patch_size] * 2)
        tiles = np.concatenate(patches).reshape(-1, math.prod(grid), patches[0].shape[1])
        pictures = [picture_of(torch.tensor(tile), grid, processor.merge_size) for tile in tiles]
        return {"pixel_values": torch.stack(pictures)}
    if "image_sizes" in inspect.signature(model.forward).parameters:  # whole pictures, padded
        merge = processor.merge_size
        pictures = [
            picture_of(torch.tensor(each), grid, merge) for each, grid in zip(patches, grids, strict=True)
        ]
        sizes = torch.tensor([picture.shape[1:] for picture in pictures])
        padded = torch.zeros(len(pictures), 3, *sizes.max(dim=0).values.tolist())
        for out, picture in zip(padded, pictures, strict=True):
            out[:, : picture.shape[1], : picture.shape[2]] = picture
        return {"pixel_values": padded, "image_sizes": sizes}
    if isinstance(processor, TileProcessor):
        side, merge = processor.fit.side // processor.patch_size, processor.merge_size
        tiles = torch.tensor(np.concatenate(patches)).split(side**2)
        return {"pixel_values": torch.stack([picture_of(tile, (1, side, side), merge) for tile in tiles])}
    pixel_values = torch.tensor(np.concatenate(patches))
    if processor.order == "planes":
        side = processor.patch_size
        pixel_values = pixel_values.reshape(len(pixel_values), 3, side, side)
    return {"pixel_values": pixel_values, "image_grid_thw": torch.tensor(grids)}


@torch.no_grad()
def answer(model: Any, directory: Path, family: str, media: dict[str, Array]) -> dict[str, Array]:
    found = find_encoders(open_model(directory))
    processors = {}
    patches, grids, segments = [], [], []
    shape: Shape
    more: dict[str, Any] = {}
    for name, value in media.items():
        kind: Kind = "sound" if name == "sound" else "picture"
        files = found[kind]
        if not isinstance(files, EncoderFiles):
            raise SystemExit(f"{directory}: {files}")
        processor = processors[kind] = files.processor(IMAGE_TOKENS)
        if isinstance(processor, PictureProcessor):
            prepared, shape = processor.prepare(value)
            patches.append(prepared)
            grids.append(shape)
        else:
            features = processor.prepare(value)
            shape = (features.shape[1],)
            more["input_features"] = torch.tensor(features)[None]
            more["feature_attention_mask"] = torch.ones(1, features.shape[1], dtype=torch.long)
        span = [files.token_id] * files.num_positions(shape)
        for at, text in files.written(shape).items():
            (span[at],) = encode_text(text)
        if files.marks is not None:
            span = [files.marks[0], *span, files.marks[1]]
        written = files.encoder.placeholder
        segments.append((files.token_id if written is None else encode_text(written)[0], span))
    pictures, tower = processors["picture"], found["picture"]
    assert isinstance(pictures, PictureProcessor)
    assert isinstance(tower, EncoderFiles)
    more |= picture_inputs(model, pictures, patches, grids)
    prompt = prompt_of(family, [token_id for token_id, _ in segments])
    ids: list[int] = []
    left = list(segments)
    for token_id in prompt:
        is_place = bool(left) and token_id == left[0][0]
        ids += left.pop(0)[1] if is_place else [token_id]

    def run(ids: list[int]) -> Array:
        tokens = torch.tensor([ids])
        own = dict(more, input_ids=tokens, attention_mask=torch.ones_like(tokens))
        if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
            own["mm_token_type_ids"] = (tokens == tower.token_id).int()
        if hasattr(getattr(model, "model", None), "rope_deltas"):
            model.model.rope_deltas = None
        if hasattr(model, "rope_deltas"):
            model.rope_deltas = None
        logits: Array = model(**own).logits[0].float().numpy()
        return logits

    logits, greedy = run(ids), list[int]()
    for _ in range(NEW_TOKENS):
        greedy.append(int(run(ids + greedy)[-1].argmax()))
        if greedy[-1] in dict(segments):
            raise SystemExit(f"{family}: the answer has a placeholder; try another --seed")
    found_of = {"input_ids": np.array(prompt), "logits": logits, "greedy": np.array(greedy)}
    if len(logits) > MOST_LOGITS:
        found_of |= {"logits": logits[-MOST_LOGITS:], "num_tokens": np.array([len(logits)])}
    return found_of


def media_of(family: str, seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    media = {
        f"picture.{i}": rng.integers(0, 256, (*size, 3)).astype(np.uint8)
        for i, size in enumerate(((18, 30), (60, 128) if family == "deepseek_ocr2" else (41, 9)))
    }
    if family in ("qwen2_moe", "qwen3_omni_moe"):
        length = RATE // 2 if family == "qwen2_moe" else RATE * 3 // 2
        media["sound"] = (0.3 * rng.standard_normal(length)).astype(np.float32)
    return media


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("families", nargs="*", default=list(CONFIGS))
    parser.add_argument("--out", type=Path, default=REFERENCE)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for family in options.families:
        directory = options.out / family
        write(directory, family, CONFIGS[family], options.seed)
        media = media_of(family, options.seed)
        found = answer(load(directory, family), directory, family, media)
        best = np.sort(found["logits"][-1])[::-1]
        print(
            f"{family:16} {len(found['logits'])} positions, margin {best[0] - best[1]:.3f}, {found['greedy'].tolist()}"
        )
        dtypes = {np.dtype(np.float32): "F32", np.dtype(np.int64): "I64", np.dtype(np.uint8): "U8"}
        stored = {name: (dtypes[value.dtype], value) for name, value in {**media, **found}.items()}
        write_safetensors(directory / "ref.safetensors", stored)


if __name__ == "__main__":
    main()
