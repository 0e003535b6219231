"""Write tiny towers and the rows that transformers computes with them (needs torch and transformers).

    python -m tests.models.make_encoders                    # rewrite the committed references
    python -m tests.models.make_encoders --out DIR --seed 7 # other values and sizes

Each directory of `reference_encoders/` holds a config.json, the tower's tensors as on the hub, and `ref.safetensors`:
several pictures or sounds, their shapes, their rows and their rotary positions. transformers loads the files, so names
and shapes are checked as well: a tensor of the tower that it misses or does not know is an error.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
import transformers

from tests.model.encoders.open_tower import PARTS, Part
from tests.models.safetensors_file import Array, read_safetensors, write_safetensors
from tests.models.seeing import write_marks
from tests.models.tiny_encoders import (
    CONFIGS,
    REFERENCE,
    SECONDS_PER_FRAME,
    Sizes,
    random_sizes,
    random_tensors,
)
from tests.models.torch_towers import DeepseekVision, DeepseekVision41, MoonViT2

TORCH_TOWERS: dict[str, Any] = {
    "kimi_k3": MoonViT2,
    "deepseek_v4": DeepseekVision,
    "deepseek_v41": DeepseekVision41,
}


@dataclass(frozen=True, slots=True)
class Answer:
    """The rows that transformers makes of an input, and their rotary positions if the family has its own."""

    embeddings: Array
    additions: tuple[Array, ...] = ()
    angles: Array | None = None
    num_angles: float = 0.0

    def tensors(self) -> dict[str, Array]:
        out = {"embeddings": self.embeddings}
        out |= {f"additions.{i}": addition for i, addition in enumerate(self.additions)}
        if self.angles is not None:
            out |= {"angles": self.angles, "num_angles": np.array([self.num_angles], np.float32)}
        return out


def load(directory: Path, part: Part) -> Any:
    """Load a checkpoint with one tower in float32; the weights of the other parts are random."""
    if part.family in TORCH_TOWERS:
        raw = json.loads((directory / "config.json").read_text())
        text = raw.get("text_config", raw)
        own = TORCH_TOWERS[part.family](raw.get("vision_config", raw), text["hidden_size"])
        named = read_safetensors(directory / "model.safetensors")
        own.load_state_dict({name: torch.tensor(value) for name, value in named.items()})
        return own
    how: dict[str, Any] = {}
    if part.family == "qwen3_omni_moe":
        how["config"] = transformers.AutoConfig.from_pretrained(directory).thinker_config
    if part.family == "qwen2_moe":
        raw = json.loads((directory / "config.json").read_text())
        if part.kind == "picture":
            return load_tower(directory, part, raw["vision_config"])
        text = {"hidden_size": raw["hidden_size"], "num_attention_heads": 1, "num_hidden_layers": 1}
        how["config"] = transformers.VoxtralConfig(
            audio_config=raw["audio_config"], text_config={"model_type": "llama", **text}
        )
    model, info = transformers.AutoModelForMultimodalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **how
    )
    info["missing_keys"] = [name for name in info["missing_keys"] if name.startswith(part.modules)]
    problems = {kind: names for kind, names in info.items() if names}
    if problems:
        raise SystemExit(f"{directory}: {problems}")
    return getattr(model, "model", model).eval()


def load_tower(directory: Path, part: Part, raw: dict[str, Any]) -> Any:
    """Load a tower of Qwen3-VL alone."""
    named = read_safetensors(directory / "model.safetensors")
    family = transformers.models.qwen3_vl
    tower = family.modeling_qwen3_vl.Qwen3VLVisionModel(
        family.configuration_qwen3_vl.Qwen3VLVisionConfig(**raw, attn_implementation="eager")
    )
    tower.load_state_dict(
        {
            name.removeprefix(part.prefix): torch.tensor(value)
            for name, value in named.items()
            if name.startswith(part.prefix)
        }
    )
    return tower.eval()


@torch.no_grad()
def answer(model: Any, part: Part, value: Array, shape: tuple[int, ...]) -> Answer:
    """The rows of a picture or video with the grid `shape`, or of a sound with `shape` mel frames."""
    if part.family in TORCH_TOWERS:
        return Answer(model(value, *shape[1:]))
    if part.family == "qwen2_moe":
        if part.kind == "sound":
            return Answer(windows(model, part, value))
        return Answer(model(torch.tensor(value), grid_thw=torch.tensor([shape])).pooler_output.numpy())
    if part.kind == "sound":
        mask = torch.ones(1, *shape, dtype=torch.long)
        found = model.get_audio_features(torch.tensor(value)[None], feature_attention_mask=mask)
        return Answer(found.last_hidden_state.numpy())
    grid = torch.tensor([shape])
    patches = torch.tensor(value)
    if part.family == "glm4v_moe":  # several frames are several pictures, which see only themselves
        grids = torch.tensor([(1, *shape[1:])] * shape[0])
        return Answer(
            torch.cat(model.get_image_features(patches, grids).pooler_output).numpy(),
            **angles(model, part, grid),
        )
    if part.family == "gemma4":
        places = torch.tensor([[(x, y) for y in range(shape[1]) for x in range(shape[2])]])
        return Answer(model.get_image_features(patches[None], places).pooler_output[0].numpy())
    if part.family == "mistral3":
        return Answer(of_pixtral(model, patches, shape))
    if part.family == "llama4":
        return Answer(of_llama4(model, patches, shape))
    if part.family == "step3p7":
        return Answer(of_step3p7(model, patches, shape))
    if part.family == "internvl":
        vision, merge = model.config.vision_config, round(1 / model.config.downsample_ratio)
        tiles = patches.reshape(
            -1, math.prod(vision.image_size) // math.prod(vision.patch_size), patches.shape[1]
        )
        side = vision.image_size[0] // vision.patch_size[0]
        pictures = torch.stack([picture_of(tile, (1, side, side), merge) for tile in tiles])
        found = model.get_image_features(pictures).pooler_output.flatten(0, 1)
        return Answer(torch.nn.functional.pad(found, (0, 0, 1, 1)).numpy())  # tokens before and after
    if part.family == "unlimited_ocr":
        return Answer(of_tiles_and_whole(model, patches, shape))
    if part.family == "kimi_k25":
        patch_size = model.config.vision_config.patch_size
        patches = patches.reshape(len(patches), 3, patch_size, patch_size)
    found = model.get_image_features(patches, grid)
    [embeddings] = found.pooler_output
    additions = [addition for [addition] in getattr(found, "deepstack_features", None) or []]
    rows = Answer(embeddings.numpy(), tuple(addition.numpy() for addition in additions))
    return replace(rows, **angles(model, part, grid)) if part.angles else rows


def of_pixtral(model: Any, patches: torch.Tensor, shape: tuple[int, ...]) -> Array:
    """The rows of a picture; zeros where a token ends its row of cells."""
    merge = model.config.spatial_merge_size
    picture = picture_of(patches, shape, merge)[None]
    rows, columns = (size // merge for size in shape[1:])
    # As `get_image_features`, which fails for a picture of one cell.
    sizes = torch.tensor([picture.shape[2:]])
    found = model.multi_modal_projector(model.vision_tower(picture, sizes).last_hidden_state[0], sizes)
    padded = torch.zeros(rows, columns + 1, found.shape[-1])
    padded[:, :-1] = found.reshape(rows, columns, -1)
    return padded.flatten(0, 1).numpy()


def of_llama4(model: Any, patches: torch.Tensor, shape: tuple[int, ...]) -> Array:
    """The rows of a picture in tiles; zeros where tokens are."""
    vision = model.config.vision_config
    side, merge = vision.image_size // vision.patch_size, round(1 / vision.pixel_shuffle_ratio)
    tiles = [picture_of(one, (1, side, side), merge) for one in patches.split(side**2)]
    found = model.multi_modal_projector(model.vision_model(torch.stack(tiles)).last_hidden_state)
    mark = torch.zeros(1, found.shape[-1])
    rows, columns = shape[1] // side - 1, shape[2] // side
    parts = [mark]
    if rows:
        parts += [part for tile in found[:-1] for part in (tile, mark)]
        assert len(found) == rows * columns + 1
    return torch.cat([*parts, mark, found[-1], mark]).numpy()


def of_step3p7(model: Any, patches: torch.Tensor, shape: tuple[int, ...]) -> Array:
    """The rows of windows, then of the view; zeros where tokens are."""
    found = model.get_image_features(
        **views_of([patches], [shape], model.config.vision_config)
    ).pooler_output[0]
    mark = torch.zeros(1, found.shape[-1])
    rows, columns = step_windows(shape, model.config.vision_config)
    parts, at = list[torch.Tensor](), 0
    for number in range(1, rows * columns + 1):
        parts += [mark, found[at : at + 4], mark]
        parts += [mark] if number % columns == 0 and number < rows * columns else []
        at += 4
    return torch.cat([*parts, mark, found[at:], mark]).numpy()


def step_windows(shape: tuple[int, ...], vision: Any) -> tuple[int, int]:
    """The rows and columns of windows of 8 x 8 patches; below them, or beside one row, lies the view."""
    side = vision.image_size // vision.patch_size
    if shape[1] == side:
        return int(shape[2] > side), (shape[2] - side) // 8
    return (shape[1] - side) // 8, shape[2] // 8


def views_of(patches: list[torch.Tensor], shapes: list[tuple[int, ...]], vision: Any) -> dict[str, Any]:
    """Pictures as Step-3.7 takes them: views, windows of all, and their numbers."""
    side = vision.image_size // vision.patch_size
    views, windows, counts = [], [], []
    for each, shape in zip(patches, shapes, strict=True):
        counts.append(math.prod(step_windows(shape, vision)))
        parts = each.split([64] * counts[-1] + [side**2])
        windows += [picture_of(part, (1, 8, 8), 1) for part in parts[:-1]]
        views.append(picture_of(parts[-1], (1, side, side), 1))
    local = torch.stack(windows) if windows else None
    return {"pixel_values": torch.stack(views), "pixel_values_local": local, "num_local_patches": counts}


def picture_of(patches: torch.Tensor, grid: tuple[int, ...], merge: int) -> torch.Tensor:
    """The picture [3, height, width] of patches that lie cell by cell."""
    side = math.isqrt(patches.shape[1] // 3)
    cells = patches.reshape(grid[1] // merge, grid[2] // merge, merge, merge, 3, side, side)
    return cells.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, grid[1] * side, grid[2] * side)


def of_tiles_and_whole(model: Any, patches: torch.Tensor, shape: tuple[int, ...]) -> Array:
    """The rows of a picture in tiles of 8 patches on a side, and the whole of it."""
    rows = (shape[1] - 12) // 8
    columns = shape[2] // 8 if rows else 0
    *tiles, whole = (
        picture_of(one, (1, side, side), 1)
        for one, side in zip(
            patches.split([64] * (rows * columns) + [144]), [8] * (rows * columns) + [12], strict=True
        )
    )
    more = {"patches_grid": [[columns, rows]]} if hasattr(model, "image_newline") else {}
    local = torch.stack(tiles) if tiles else None
    found = model.get_image_features(whole[None], local, [len(tiles)], **more)
    rows_of: Array = found.pooler_output[0].numpy()
    return rows_of


def windows(model: Any, part: Part, features: Array) -> Array:
    """Whole windows, the last one filled with silence, whose rows are dropped."""
    config = model.config.audio_config
    size = 2 * config.max_source_positions
    count = -(-features.shape[1] // size)
    padded = np.full((len(features), count * size), features.max() - 2, np.float32)
    padded[:, : features.shape[1]] = features
    parts = padded.reshape(len(features), count, size).swapaxes(0, 1)
    joined = config.intermediate_size // config.hidden_size
    states = [model.audio_tower(torch.tensor(part)[None]).last_hidden_state[0] for part in parts]
    states = [
        state[: len(state) // joined * joined].reshape(-1, config.intermediate_size) for state in states
    ]
    rows = model.multi_modal_projector(torch.cat(states)).numpy()
    last = -(-(features.shape[1] - (count - 1) * size) // (2 * joined)) + 1
    per_window = config.max_source_positions // joined
    return rows[: (count - 1) * per_window + min(last, per_window)]


def angles(model: Any, part: Part, grid: torch.Tensor) -> dict[str, Any]:
    """The rotary positions between three tokens and two, relative to the first."""
    is_omni = part.family == "qwen3_omni_moe"
    is_video = is_omni and int(grid[0, 0]) > 1
    config = model.config
    num_positions = int(grid.prod()) // config.vision_config.spatial_merge_size**2
    token = config.video_token_id if is_video else config.image_token_id
    start = getattr(config, "vision_start_token_id", None) or config.image_start_token_id
    ids = torch.tensor([[1, 2, start, *[token] * num_positions, 3, 4]])
    grids = {"video_grid_thw" if is_video else "image_grid_thw": grid}
    if is_omni:
        grids |= {
            "attention_mask": torch.ones_like(ids),
            "second_per_grids": torch.tensor([SECONDS_PER_FRAME]),
        }
    else:
        grids["mm_token_type_ids"] = (ids == token).int()
    positions = model.get_rope_index(ids, **grids)[0][:, 0].numpy().astype(np.float32)
    after = 3 + num_positions
    return {"angles": positions[:, 3:after] - 3, "num_angles": float(positions[0, after] - 3)}


def make(directory: Path, part: Part, sizes: Sizes, seed: int) -> dict[str, Array]:
    """Write config.json and the tower; return inputs and answers, as `ref.safetensors` holds them."""
    raw = CONFIGS[part.family](sizes)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    write_marks(directory, part.family)
    config = part.read(raw)
    tensors = random_tensors(part.tensors(config), part.prefix, seed)
    write_safetensors(
        directory / "model.safetensors", {name: ("BF16", value) for name, value in tensors.items()}
    )
    model = load(directory, part)
    out = {}
    for case, shape in enumerate(part.shapes(config)):
        value = part.make_input(config, shape, seed + case)
        case_out = {"input": value, "shape": np.array(shape, np.int64)}
        case_out |= answer(model, part, value, shape).tensors()
        out |= {f"{case}.{name}": tensor for name, tensor in case_out.items()}
    return out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default=list(PARTS))
    parser.add_argument("--out", type=Path, default=REFERENCE)
    parser.add_argument("--seed", type=int)
    options = parser.parse_args()
    for name in options.parts:
        seed = options.seed or 0
        sizes = Sizes() if options.seed is None else random_sizes(seed)
        tensors = make(options.out / name, PARTS[name], sizes, seed)
        dtypes = {np.dtype(np.float32): "F32", np.dtype(np.int64): "I64"}
        stored = {key: (dtypes[tensor.dtype], tensor) for key, tensor in tensors.items()}
        write_safetensors(options.out / name / "ref.safetensors", stored)


if __name__ == "__main__":
    main()
