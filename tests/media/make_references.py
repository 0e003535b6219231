"""Write what transformers makes of the pictures and sounds in `samples.py`: files/ and references.npz.

    python tests/media/make_references.py         references.npz; needs transformers, torchvision, soundfile and soxr
    python tests/media/make_references.py files   the files of lossy formats first
    python tests/media/make_references.py tiles   only tiles.npz, of Llama-4's processor
    python tests/media/make_references.py windows only windows.npz, of Step-3.7's processor

Of each result its shape, its sum and values at fixed places are kept.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.media.samples import (
    FILES,
    PICTURE_SETTINGS,
    PICTURES,
    RATE,
    REFERENCES,
    SOUND_SETTINGS,
    SOUNDS,
    TILED_SIZES,
    TILES,
    WINDOW_SETTINGS,
    WINDOWED_SIZES,
    WINDOWS,
    encoded,
    heard,
    pattern,
    summary,
    wave,
)


def picture_processor(name: str) -> Any:
    """The reference processor of a family, on Pillow.

    Kimi's and MiniMax's have only a form on torchvision, whose filter differs by a level in some pixels. The reference
    resizes with Pillow here, as Kimi's own code does.
    """
    import torch
    import transformers
    from transformers.image_processing_backends import TorchvisionBackend
    from transformers.models.deepseek_ocr2.image_processing_pil_deepseek_ocr2 import (
        DeepseekOcr2ImageProcessorPil,
    )
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
    from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
    from transformers.models.glm5_next.image_processing_pil_glm5_next import Glm5NextImageProcessorPil
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
    from transformers.models.kimi_k25.image_processing_kimi_k25 import Kimi_K25ImageProcessor
    from transformers.models.minimax_m3_vl.image_processing_minimax_m3_vl import MiniMaxM3VLImageProcessor
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class OnPillow(TorchvisionBackend):  # type: ignore[misc]
        def resize(self, image: Any, size: Any, resample: Any = None, **_: Any) -> Any:
            assert resample == Image.Resampling.BICUBIC
            (picture,) = image.permute(0, 2, 3, 1).numpy()
            resized = Image.fromarray(picture).resize((size.width, size.height), resample)
            return torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None]

    class KimiProcessorOnPillow(Kimi_K25ImageProcessor):  # type: ignore[misc]
        resize = OnPillow.resize

    class MiniMaxProcessorOnPillow(MiniMaxM3VLImageProcessor, OnPillow):  # type: ignore[misc]
        """Its own `resize` chooses the size."""

    transformers.logging.set_verbosity_error()
    classes = {
        "qwen2_vl": Qwen2VLImageProcessorPil,
        "qwen3_vl": Qwen2VLImageProcessorPil,
        "minimax_m3": MiniMaxProcessorOnPillow,
        "glm4v": Glm4vImageProcessorPil,
        "glm5": Glm5NextImageProcessorPil,
        "gemma4": Gemma4ImageProcessorPil,
        "kimi_k25": KimiProcessorOnPillow,
        "pixtral": PixtralImageProcessorPil,
        "internvl": GotOcr2ImageProcessorPil,
        "deepseek_ocr2": DeepseekOcr2ImageProcessorPil,
    }
    settings = {key: value for key, value in PICTURE_SETTINGS[name].items() if key != "image_processor_type"}
    implied = {
        "internvl": ("merge_size", "patch_size", "tile_size"),
        "deepseek_ocr2": ("merge_size", "patch_size"),
    }
    for key in implied.get(name, ()):
        del settings[key]  # what a tower's config implies
    if "spatial_merge_size" in settings:  # the processor around it multiplies
        side = settings["patch_size"]["height"] * settings.pop("spatial_merge_size")
        settings["patch_size"] = {"height": side, "width": side}
    return classes[name](**settings)


def reference_patches(processor: Any, file: bytes) -> tuple[NDArray[np.float32], tuple[int, int, int]]:
    """The reference's patches and grid.

    Raises:
        ValueError: the reference refuses the picture.
    """
    from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

    image = ImageOps.exif_transpose(Image.open(io.BytesIO(file)))
    made = processor(images=image, return_tensors="np")
    patches = np.asarray(made["pixel_values"])
    if "image_position_ids" in made:  # Gemma pads to the most patches
        positions = np.asarray(made["image_position_ids"])[0]
        grid = (1, int(positions[:, 1].max()) + 1, int(positions[:, 0].max()) + 1)
        return patches[0, : grid[1] * grid[2]], grid
    if "num_local_patches" in made:  # tiles and the whole, with patches of 4 x 4
        whole, tiles = patches[0], np.asarray(made.get("pixel_values_local", np.empty((0, 3, 96, 96))))
        values = [
            square.reshape(3, len(square[0]) // 4, 4, -1, 4).transpose(1, 3, 0, 2, 4).reshape(-1, 48)
            for square in (*tiles, whole)
        ]
        columns, rows = (0, 0)
        if len(tiles):
            columns, rows = get_optimal_tiled_canvas(image.size[::-1], (96, 96), 2, 6)
        return np.concatenate(values), (1, rows * 24 + 32, max(columns * 24, 32))
    if "num_patches" in made:  # tiles, with patches of 14 x 14
        tiles = patches.reshape(len(patches), 3, 4, 2, 14, 4, 2, 14).transpose(0, 2, 5, 3, 6, 1, 4, 7)
        return tiles.reshape(-1, 3 * 14**2), (1, 8 * len(patches), 8)
    if "image_sizes" in made:  # whole pictures
        ((height, width),) = np.asarray(made["image_sizes"]).tolist()
        side = processor.patch_size["height"] // 2
        cells = patches[0].reshape(3, height // side // 2, 2, side, width // side // 2, 2, side)
        return cells.transpose(1, 4, 2, 5, 0, 3, 6).reshape(-1, 3 * side**2), (
            1,
            height // side,
            width // side,
        )
    time, rows, columns = (int(side) for side in np.asarray(made["image_grid_thw"])[0])
    return patches.reshape(rows * columns, -1), (time, rows, columns)


def reference_samples(file: bytes) -> NDArray[np.float32]:
    import base64

    from transformers.audio_utils import load_audio

    return load_audio(base64.b64encode(file).decode(), RATE, backend="soundfile")


def reference_features(name: str, samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """The reference's float32 [bands, frames]."""
    from transformers import WhisperFeatureExtractor

    settings = {key: value for key, value in SOUND_SETTINGS[name].items() if key != "feature_extractor_type"}
    options = {"padding": True, "truncation": False} if name == "qwen3_omni" else {}
    made = WhisperFeatureExtractor(**settings)(samples, sampling_rate=RATE, return_tensors="np", **options)
    return np.asarray(made["input_features"])[0]


def tile_processor() -> Any:
    from transformers.models.llama4.image_processing_llama4 import Llama4ImageProcessor

    return Llama4ImageProcessor()


def reference_tiles(processor: Any, pixels: NDArray[np.uint8]) -> tuple[NDArray[np.float32], list[int]]:
    """The patches of tiles, cell by cell, and the arrangement of the tiles."""
    made = processor(images=Image.fromarray(pixels), return_tensors="pt")
    tiles = made["pixel_values"].float().numpy()
    cells = tiles.reshape(len(tiles), 3, 12, 2, 14, 12, 2, 14).transpose(0, 2, 5, 3, 6, 1, 4, 7)
    return cells.reshape(len(tiles) * 24**2, -1), made["aspect_ratios"][0].tolist()


def write_tiles() -> None:
    """Write what Llama-4's processor makes, and the arrangements and sizes that it chooses for many sizes."""
    import torch
    from transformers.image_utils import SizeDict
    from transformers.models.llama4 import image_processing_llama4 as reference

    processor, kept = tile_processor(), {}
    for height, width in TILED_SIZES:
        patches, arrangement = reference_tiles(processor, pattern(height, width))
        kept[f"{height}x{width}"] = np.array([*arrangement, len(patches), *summary(patches)])
    rng, chosen = np.random.default_rng(1), []
    possible = torch.tensor(reference.find_supported_resolutions(16, SizeDict(height=336, width=336)))
    for _ in range(400):
        size = torch.Size(int(2**power) for power in rng.uniform(0, 12.5, 2))
        target = reference.get_best_fit(size, possible)
        bounded = tuple(min(max(length, 336), most) for length, most in zip(size, target, strict=True))
        scaled = reference.get_max_res_without_distortion(size, bounded)
        chosen.append(
            [*size, *(int(length) // 336 for length in target), *(max(int(one), 1) for one in scaled)]
        )
    np.savez_compressed(TILES, chosen=np.array(chosen, np.int32), **kept)


def window_processor(**settings: Any) -> Any:
    """Step-3.7's processor, which fills windows beyond a picture with black, as the makers' code does."""
    import torch
    from transformers.models.step3p7 import image_processing_step3p7 as reference

    def with_black(image: Any, patch_size: int) -> list[Any]:
        rows, columns = (-(-length // patch_size) for length in image.shape[1:])
        canvas = torch.zeros(3, rows * patch_size, columns * patch_size, dtype=image.dtype)
        canvas[:, : image.shape[1], : image.shape[2]] = image
        return [one for band in canvas.split(patch_size, dim=1) for one in band.split(patch_size, dim=2)]

    reference.divide_to_patches = with_black
    return reference.Step3p7ImageProcessor(
        **{key: value for key, value in settings.items() if key != "image_processor_type"}
    )


def reference_windows(processor: Any, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The patches of windows, then of the view."""
    made = processor(images=Image.fromarray(pixels), return_tensors="np")
    found = []
    for name in ("pixel_values_local", "pixel_values"):
        views = np.asarray(made.get(name, np.zeros((0, 3, 14, 14), np.float32)))
        side = views.shape[2] // 14
        patches = views.reshape(len(views), 3, side, 14, side, 14).transpose(0, 2, 4, 1, 3, 5)
        found.append(patches.reshape(-1, 3 * 14**2))
    return np.concatenate(found)


def write_windows() -> None:
    """Write what Step-3.7's processor makes, and the windows that the released one chooses for many sizes."""
    processor, kept = window_processor(**WINDOW_SETTINGS), {}
    for height, width in WINDOWED_SIZES:
        patches = reference_windows(processor, pattern(height, width))
        kept[f"{height}x{width}"] = np.array([len(patches), *summary(patches)])
    rng, chosen, released = np.random.default_rng(2), [], window_processor()
    while len(chosen) < 400:
        height, width = (int(2**power) for power in rng.uniform(0, 12.5, 2))
        if min(height, width) * 3024 < max(height, width):  # the reference makes nothing of it
            continue
        whole, cut, side, columns, rows, is_square = released._plan_patches(width, height, 728, 504)
        chosen.append([height, width, *whole[::-1], *cut[::-1], side, rows, columns, is_square])
    np.savez_compressed(WINDOWS, chosen=np.array(chosen, np.int32), **kept)


def write_files() -> None:
    import soundfile

    FILES.mkdir(exist_ok=True)
    photo = Image.fromarray(pattern(75, 100)).resize((120, 90), Image.Resampling.BICUBIC)
    other = Image.fromarray(pattern(75, 100, seed=7)).resize((120, 90), Image.Resampling.BICUBIC)
    files = {
        "rgb.jpg": encoded(photo, "JPEG", quality=80),
        "grey.jpg": encoded(photo.convert("L"), "JPEG", quality=80),
        "cmyk.jpg": encoded(photo.convert("CMYK"), "JPEG", quality=80),
        "progressive.jpg": encoded(photo, "JPEG", quality=80, progressive=True),
        "two.mpo": encoded(photo, "MPO", save_all=True, append_images=[other], quality=60),
        "rgb.webp": encoded(photo, "WEBP", quality=70),
    }
    for name, content in files.items():
        (FILES / name).write_bytes(content)
    soundfile.write(FILES / "tone.flac", wave(0.4, 16_000, 2), 16_000)
    soundfile.write(FILES / "tone.ogg", wave(0.8, 22_050), 22_050)
    soundfile.write(FILES / "tone.mp3", wave(0.8, 24_000), 24_000)


def main() -> None:
    if "files" in sys.argv[1:]:
        write_files()
    if sys.argv[1:] == ["tiles"]:
        write_tiles()
        return
    if sys.argv[1:] == ["windows"]:
        write_windows()
        return
    names: list[str] = []
    shapes: list[tuple[int, ...]] = []
    values: list[NDArray[np.float64]] = []

    def keep(name: str, shape: tuple[int, ...], made: NDArray[np.float32]) -> None:
        names.append(name)
        shapes.append(shape)
        values.append(summary(made))

    for name in PICTURE_SETTINGS:
        processor = picture_processor(name)
        for case, make in PICTURES.items():
            patches, grid = reference_patches(processor, make())
            keep(f"{name}/{case}", grid, patches)
    for case, make in SOUNDS.items():
        samples = reference_samples(make())
        for name in SOUND_SETTINGS:
            features = reference_features(name, samples)
            keep(f"{name}/{case}", (*features.shape, samples.size), heard(features, samples))
    np.savez_compressed(REFERENCES, names=np.array(names), shapes=np.array(shapes), values=np.array(values))


if __name__ == "__main__":
    main()
