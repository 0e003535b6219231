"""Write what the processors of transformers make of the videos in `video_samples.py`: video_references.npz.

    python -m tests.media.make_video_references      needs transformers and torchvision

Of each result its shape, the indices of the frames, the mean and values at fixed places are kept.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.media.samples import summary
from tests.media.video_samples import CASES, REFERENCES, VIDEO_SETTINGS, VIDEOS, Clip


def video_processor(name: str) -> Any:
    """The reference processor with the settings of a family."""
    import transformers
    from transformers.models.gemma4.video_processing_gemma4 import Gemma4VideoProcessor
    from transformers.models.glm4v.video_processing_glm4v import Glm4vVideoProcessor
    from transformers.models.glm46v.video_processing_glm46v import Glm46VVideoProcessor
    from transformers.models.kimi_k25.video_processing_kimi_k25 import Kimi_K25VideoProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    transformers.logging.set_verbosity_error()
    classes = (
        Qwen2VLVideoProcessor,
        Qwen3VLVideoProcessor,
        Glm4vVideoProcessor,
        Glm46VVideoProcessor,
        Kimi_K25VideoProcessor,
        Gemma4VideoProcessor,
    )
    settings = dict(VIDEO_SETTINGS[name])
    kind = settings.pop("video_processor_type")
    return next(one for one in classes if one.__name__ == kind)(**settings)


def reference_video(
    processor: Any, clip: Clip
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """The reference's patches [patches, values], grids [groups or videos, 3] and indices of frames."""
    from transformers.video_utils import VideoMetadata

    seconds = clip.num_frames / clip.rate
    metadata = VideoMetadata(clip.num_frames, fps=clip.rate, duration=seconds)
    made = processor(
        videos=[clip.frames()], video_metadata=[metadata], return_metadata=True, return_tensors="np"
    )
    patches = np.asarray(made["pixel_values_videos"])
    indices = np.asarray(made["video_metadata"][0].frames_indices)
    if "video_position_ids" in made:  # Gemma pads each frame, and gives columns and rows instead of a grid
        places = np.asarray(made["video_position_ids"])
        columns, rows = places.max(axis=(0, 1)) + 1
        patches = patches[places[..., 0] >= 0]
        return patches, np.array([[1, rows, columns]] * len(places)), indices
    return patches.reshape(len(patches), -1), np.asarray(made["video_grid_thw"]), indices


def main() -> None:
    kept: dict[str, NDArray[Any]] = {}
    for name, case in CASES:
        patches, grids, indices = reference_video(video_processor(name), VIDEOS[case])
        key = f"{name}/{case}"
        kept |= {f"{key}/values": summary(patches), f"{key}/grids": grids, f"{key}/indices": indices}
    np.savez_compressed(REFERENCES, **kept)


if __name__ == "__main__":
    main()
