"""Pictures and sounds for tests: made by a fixed formula where their bytes are exact, and committed where they are not.

Files of lossy formats are in `files/`; `make_references.py` wrote them.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FILES = Path(__file__).parent / "files"
REFERENCES = Path(__file__).parent / "references.npz"
TILES = Path(__file__).parent / "tiles.npz"
TILED_SIZES = ((1, 1), (100, 50), (336, 336), (337, 336), (500, 700), (767, 1023), (20, 3000), (2000, 1500))
WINDOWS = Path(__file__).parent / "windows.npz"
# Whole, elongated, very elongated, narrow, with windows partly beyond the picture, and too long.
WINDOWED_SIZES = (
    (1, 1), (168, 168), (100, 160), (70, 168), (20, 90), (30, 160), (150, 400), (400, 300), (225, 140), (40, 500),
    (900, 700), (31, 900),
)  # fmt: skip
RATE = 16_000  # of the sounds that the references are made of
NUM_PLACES = 24


def pattern(height: int, width: int, channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    """uint8 [height, width, channels]: slopes, edges and noise, from whole numbers only."""
    row, column, channel = np.meshgrid(
        np.arange(height, dtype=np.uint32),
        np.arange(width, dtype=np.uint32),
        np.arange(channels, dtype=np.uint32) + np.uint32(seed),
        indexing="ij",
    )
    slope = row * (3 + channel) * 200 // np.uint32(height) + column * (5 - channel % 3) * 90 // np.uint32(
        width
    )
    edges = (row // 16 + column // 24 + channel) % 3 * 40
    noise = (row * 7919 + column * 104_729 + channel * 1_299_709) * 2_654_435_761 >> np.uint32(28)
    return ((slope + edges + noise) % 256).astype(np.uint8)


def encoded(image: Image.Image, name: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, name, **options)
    return file.getvalue()


def png(pixels: NDArray[np.uint8], **options: Any) -> bytes:
    return encoded(Image.fromarray(pixels), "PNG", **options)


def png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def raw_png(width: int, height: int, depth: int, colour: int, rows: bytes, *between: bytes) -> bytes:
    """A PNG of our own: header, further chunks, and rows that each begin with a filter byte."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"".join((
        b"\x89PNG\r\n\x1a\n", png_chunk(b"IHDR", header), *between, png_chunk(b"IDAT", zlib.compress(rows)),
        png_chunk(b"IEND", b""),
    ))  # fmt: skip


def exif(orientation: int) -> bytes:
    """A TIFF header with one entry, the orientation."""
    return b"MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0) + b"\0\0\0\0"


def jpeg_with_exif(jpeg: bytes, orientation: int) -> bytes:
    content = b"Exif\0\0" + exif(orientation)
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content + jpeg[2:]


def palette_image(height: int, width: int, seed: int = 0) -> Image.Image:
    image = Image.fromarray(pattern(height, width, 1, seed)[:, :, 0] % 64).convert("L")
    result = Image.new("P", image.size)
    result.frombytes(image.tobytes())
    result.putpalette(bytes((i * step) % 256 for i in range(256) for step in (37, 91, 13)))
    return result


def file_of(name: str) -> Callable[[], bytes]:
    return (FILES / name).read_bytes


def _sixteen_bits(channels: int) -> bytes:
    values = (
        pattern(40, 60, channels).astype(">u2") * 3 % 700
    )  # Pillow cuts grey at 255 and takes the upper byte of RGB
    rows = b"".join(b"\0" + row.tobytes() for row in values * (1 if channels == 1 else 93))
    return raw_png(60, 40, 16, 0 if channels == 1 else 2, rows)


def _with_late_exif() -> bytes:
    whole = png(pattern(50, 90, seed=4))
    return whole[:-12] + png_chunk(b"eXIf", exif(8)) + whole[-12:]


def _gif() -> bytes:
    frames = [palette_image(60, 80, seed) for seed in (1, 2)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], transparency=5, duration=100)


def _webp_frames() -> bytes:
    frames = [Image.fromarray(pattern(64, 48, 4, seed)) for seed in (1, 2)]
    return encoded(frames[0], "WEBP", lossless=True, save_all=True, append_images=frames[1:], duration=100)


PICTURES: dict[str, Callable[[], bytes]] = {
    "png_1x1": lambda: png(pattern(1, 1)),
    "png_2x1": lambda: png(pattern(1, 2)),
    "png_28x28": lambda: png(pattern(28, 28)),
    "png_29x27": lambda: png(pattern(27, 29)),
    "png_17x100": lambda: png(pattern(100, 17)),
    "png_640x480": lambda: png(pattern(480, 640)),
    "png_767x1023": lambda: png(pattern(1023, 767)),
    "png_4000x3000": lambda: png(np.tile(pattern(300, 400), (10, 10, 1)), compress_level=1),
    "png_3000x20": lambda: png(pattern(20, 3000)),
    "png_20x3000": lambda: png(pattern(3000, 20)),
    "png_grey": lambda: png(pattern(70, 110, 1)[:, :, 0]),
    "png_one_bit": lambda: encoded(Image.fromarray(pattern(64, 65, 1)[:, :, 0] > 120), "PNG"),
    "png_grey_alpha": lambda: png(pattern(70, 110, 2)),
    "png_rgba": lambda: png(pattern(90, 70, 4)),
    "png_palette": lambda: encoded(palette_image(60, 80), "PNG"),
    "png_palette_alpha": lambda: encoded(palette_image(60, 80), "PNG", transparency=bytes(range(0, 256, 4))),
    "png_transparent_colour": lambda: png(
        pattern(50, 60), transparency=tuple(pattern(50, 60)[9, 9].tolist())
    ),
    "png_16_bit_grey": lambda: _sixteen_bits(1),
    "png_16_bit_rgb": lambda: _sixteen_bits(3),
    "png_exif_6": lambda: png(pattern(50, 90), exif=b"Exif\0\0" + exif(6)),
    "png_late_exif_8": _with_late_exif,
    "jpeg": file_of("rgb.jpg"),
    "jpeg_grey": file_of("grey.jpg"),
    "jpeg_cmyk": file_of("cmyk.jpg"),
    "jpeg_progressive": file_of("progressive.jpg"),
    **{
        f"jpeg_exif_{turn}": lambda turn=turn: jpeg_with_exif(file_of("rgb.jpg")(), turn)  # type: ignore[misc]
        for turn in range(2, 9)
    },
    "jpeg_two_pictures": file_of("two.mpo"),
    "webp": file_of("rgb.webp"),
    "webp_lossless_rgba": lambda: encoded(
        Image.fromarray(pattern(64, 48, 4)), "WEBP", lossless=True, exact=True
    ),
    "webp_animated": _webp_frames,
    "gif_animated": _gif,
}


def wave(seconds: float, rate: int, channels: int = 1, seed: int = 0) -> NDArray[np.float64]:
    """float64 [samples, channels], within -1 to 1: rising tones, pauses and noise."""
    count = round(seconds * rate)
    time = np.arange(count)[:, None] / rate
    channel = np.arange(channels)[None, :] + seed
    tones = 0.3 * np.sin(2 * np.pi * (200 + 50 * channel) * time) + 0.2 * np.sin(900 * time * (1 + time % 3))
    noise = (np.arange(count, dtype=np.uint32) * np.uint32(2_654_435_761) >> np.uint32(16))[
        :, None
    ] / 65_536 - 0.5
    return np.asarray((tones + 0.05 * noise) * (np.floor(time * 2) % 4 != 3))


def wav(samples: NDArray[np.float64], rate: int, bits: int = 16) -> bytes:
    """A WAV with whole numbers of 8, 16 or 24 bits, or with 32-bit floats."""
    if bits == 8:
        content = (np.round(samples * 127) + 128).astype(np.uint8).tobytes()
    elif bits == 24:
        whole = np.round(samples * (2**23 - 1)).astype("<i4").ravel()
        content = whole.view(np.uint8).reshape(-1, 4)[:, :3].tobytes()
    elif bits == 32:
        content = samples.astype("<f4").tobytes()
    else:
        content = np.round(samples * 32_767).astype("<i2").tobytes()
    channels = samples.shape[1]
    frame = channels * bits // 8
    form = struct.pack("<HHIIHH", 3 if bits == 32 else 1, channels, rate, rate * frame, frame, bits)
    body = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", len(content)) + content
    return b"RIFF" + struct.pack("<I", len(body)) + body


SOUNDS: dict[str, Callable[[], bytes]] = {
    "wav_8k_0.1s": lambda: wav(wave(0.1, 8_000), 8_000),
    "wav_11k_8_bits": lambda: wav(wave(2.3, 11_025), 11_025, 8),
    "wav_16k": lambda: wav(wave(5.01234, 16_000), 16_000),
    "wav_22k_stereo": lambda: wav(wave(3.7, 22_050, 2), 22_050),
    "wav_24k_24_bits": lambda: wav(wave(1.9, 24_000), 24_000, 24),
    "wav_32k_floats": lambda: wav(wave(1.0, 32_000), 32_000, 32),
    "wav_44k_stereo_60s": lambda: wav(wave(60.0, 44_100, 2), 44_100),
    "wav_48k_six_channels": lambda: wav(wave(0.7, 48_000, 6), 48_000),
    "flac": file_of("tone.flac"),
    "ogg": file_of("tone.ogg"),
    "mp3": file_of("tone.mp3"),
}

# How processors are described by the checkpoints of each family; Kimi's in both of its forms.
PICTURE_SETTINGS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136, "max_pixels": 1003520},
    "qwen3_vl": {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "size": {"longest_edge": 16777216, "shortest_edge": 65536},
        "patch_size": 16,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
    "minimax_m3": {"image_processor_type": "MiniMaxM3VLImageProcessor", "size": [672, 672]},
    "glm4v": {
        "image_processor_type": "Glm4vImageProcessor",
        "size": {"shortest_edge": 12544, "longest_edge": 9633792},
    },
    "glm5": {
        "image_processor_type": "Glm5NextImageProcessor",
        "max_image_tokens": 900,
        "min_image_tokens": 64,
        "size": {"longest_edge": 1},
    },
    "gemma4": {"image_processor_type": "Gemma4ImageProcessor", "max_soft_tokens": 280},
    "kimi_k25": {"image_processor_type": "Kimi_K25ImageProcessor", "max_patches": 4096},
    "internvl": {
        "image_processor_type": "GotOcr2ImageProcessorFast",
        "crop_to_patches": True,
        "max_patches": 12,
        "merge_size": 2,
        "patch_size": 14,
        "size": {"height": 112, "width": 112},
        "tile_size": 112,
    },
    "deepseek_ocr2": {
        "image_processor_type": "DeepseekOcr2ImageProcessor",
        "max_patches": 6,
        "merge_size": 4,
        "patch_size": 4,
        "size": {"height": 128, "width": 128},
        "tile_size": 96,
    },
    "pixtral": {
        "image_processor_type": "PixtralImageProcessorFast",
        "do_pad": True,
        "patch_size": {"height": 14, "width": 14},
        "size": {"longest_edge": 1540},
        "spatial_merge_size": 2,
    },
}
# Of windows half as long in cells as released ones, or less.
WINDOW_SETTINGS: dict[str, Any] = {
    "image_processor_type": "Step3p7ImageProcessor",
    "max_image_size": 672,
    "patch_size": 112,
    "resample": 2,
    "size": {"height": 168, "width": 168},
}
SOUND_SETTINGS: dict[str, dict[str, Any]] = {
    "whisper": {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 80},
    "qwen3_omni": {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": 128,
        "padding_side": "right",
    },
}


def heard(features: NDArray[np.float32], samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """The features without the silence that pads them."""
    return features[:, : samples.size // 160]


def summary(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """The kept part of a result: values at fixed places, the first and the last among them, and the mean."""
    flat = values.ravel()
    places = np.linspace(0, flat.size - 1, NUM_PLACES).astype(np.int64)
    return np.array([*flat[places], flat.mean(dtype=np.float64)])
