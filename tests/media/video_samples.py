"""Videos of odd sizes, lengths and rates, and how the checkpoints of each family describe their processors."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tests.media.samples import pattern

REFERENCES = Path(__file__).parent / "video_references.npz"


class Clip(NamedTuple):
    num_frames: int
    height: int
    width: int
    rate: float

    def frames(self) -> NDArray[np.uint8]:
        """uint8 [frames, height, width, 3], each frame another one."""
        return np.stack([pattern(self.height, self.width, seed=seed) for seed in range(self.num_frames)])


@cache
def clip_file(num_frames: int) -> bytes:
    """An MP4 with frames of 48 x 32, 10 a second, and a tone; needs ffmpeg."""
    frames = Clip(num_frames, 32, 48, 10.0).frames()
    tone = ("-f", "lavfi", "-i", f"sine=duration={num_frames / 10}")
    raw = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-video_size", "48x32", "-framerate", "10", "-i", "pipe:0")
    made = ("-c:v", "libx264", "-c:a", "aac", "-movflags", "frag_keyframe+empty_moov", "-f", "mp4", "pipe:1")
    command = ["ffmpeg", "-v", "error", *tone, *raw, *made]
    return subprocess.run(command, input=frames.tobytes(), capture_output=True, check=True).stdout


VIDEOS = {
    "5_frames": Clip(5, 75, 100, 2.0),
    "30_narrow_frames": Clip(30, 33, 70, 10.0),
    "3_frames": Clip(3, 120, 50, 24.0),
    "80_frames": Clip(80, 40, 64, 25.0),
    "2_frames": Clip(2, 48, 48, 2.0),
    "ntsc": Clip(61, 64, 96, 29.97),
    "slow": Clip(9, 203, 77, 0.5),
    "long": Clip(330, 28, 40, 1.0),
}

_HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
VIDEO_SETTINGS: dict[str, dict[str, Any]] = {
    "qwen3_vl": {
        "video_processor_type": "Qwen3VLVideoProcessor",
        "size": {"longest_edge": 786432, "shortest_edge": 4096},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        **_HALF,
    },
    "qwen3_vl_capped": {
        "video_processor_type": "Qwen3VLVideoProcessor",
        "size": {"longest_edge": 196608, "shortest_edge": 4096},
        "cap_pixels_per_frame": True,
        "max_video_tokens": 6,
    },
    "qwen3_omni": {
        "video_processor_type": "Qwen2VLVideoProcessor",
        "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 768 * 32 * 32},
        "patch_size": 16,
        "fps": 2.0,
        "do_sample_frames": True,
        **_HALF,
    },
    "glm4v": {
        "video_processor_type": "Glm4vVideoProcessor",
        "size": {"shortest_edge": 12544, "longest_edge": 1003520},
        "max_duration": 300,
        "fps": 2,
    },
    "glm46v": {
        "video_processor_type": "Glm46VVideoProcessor",
        "size": {"shortest_edge": 12544, "longest_edge": 1003520},
    },
    "kimi_k25": {"video_processor_type": "Kimi_K25VideoProcessor", "max_patches": 60, "fps": 1.5},
    "gemma4": {"video_processor_type": "Gemma4VideoProcessor", "num_frames": 4},
}

# The reference refuses these, and we prepare them: fewer frames than a group has, or than are asked for.
NOT_IN_THE_REFERENCE = {
    ("glm46v", "3_frames"), ("kimi_k25", "slow"), ("kimi_k25", "long"), ("gemma4", "3_frames"), ("gemma4", "2_frames"),
}  # fmt: skip
CASES = [
    (name, case) for name in VIDEO_SETTINGS for case in VIDEOS if (name, case) not in NOT_IN_THE_REFERENCE
]
