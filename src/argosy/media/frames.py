"""The frames of a video, wherever they come from: a file, an array, or a list of pictures.

    Content  ->  open_frames  ->  Frames: how many, at what rate  ->  the chosen ones, one by one; the sound

Elsewhere: `videos.py` chooses and scales frames; `ffmpeg.py` decodes files; `decoder.py` decodes pictures.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from argosy.media.decoder import FileDecoder
from argosy.media.ffmpeg import VideoFile
from argosy.media.parts import Content, MediaLimits, RequestMedia

Frame = NDArray[np.uint8]  # [height, width, 3]


@dataclass(frozen=True, slots=True)
class Frames:
    """The frames of one video.

    rate: frames per second.
    read: yields the frames with these indices, ascending and distinct; fewer if some cannot be decoded. Close it.
    sound: returns float32 [samples] at a rate, one channel; None: there is no sound.
    """

    num_frames: int
    rate: float
    read: Callable[[Sequence[int]], Generator[Frame, None, None]]
    sound: Callable[[int], NDArray[np.float32]] | None = None

    def at(self, indices: NDArray[np.int64]) -> Generator[Frame, None, None]:
        """Yield the frames with these ascending indices; some may repeat. Close the generator: it may hold its turn."""
        distinct = sorted(set(indices.tolist()))
        counts = np.bincount(indices)
        with closing(self.read(distinct)) as frames:
            for index in distinct:
                frame = next(frames, None)
                if frame is None:
                    return
                for _ in range(counts[index]):
                    yield frame
                del frame  # its turn ends


@contextlib.contextmanager
def open_frames(
    content: Content,
    decoder: FileDecoder,
    limits: MediaLimits,
    request: RequestMedia | None = None,
    *,
    turn: AbstractContextManager[object] | None = None,
    counts_decoded: bool = False,
) -> Iterator[Frames]:
    """Open a video; its file is closed at the end.

    Args:
        request: counts the time that decoding takes, and ends it; None: the request has no other media.
        turn: the lock held while a frame exists, but not while ffmpeg looks for the next one; None: nothing else
        decodes.
        counts_decoded: see `VideoFile.track`.

    Raises:
        BadMedia: the video is damaged, too large or too long.   UsageError: it is a file, and ffmpeg is missing.
    """
    data, request = content.data, request or RequestMedia(limits)
    if isinstance(data, bytes):
        with VideoFile(data, limits, request) as file:
            track = file.track(counts_decoded=counts_decoded)
            yield Frames(
                track.num_frames,
                track.rate,
                lambda indices: file.frames(indices, track, turn),
                file.sound if track.has_sound else None,
            )
        return
    assert content.rate is not None
    if isinstance(data, tuple):
        pictures = data
        yield Frames(
            len(pictures), content.rate, each_in_turn(lambda at: decoder.picture(pictures[at]), turn, request)
        )
    else:
        array: NDArray[np.uint8] = data
        yield Frames(len(array), content.rate, each_in_turn(lambda at: array[at], turn, request))


def each_in_turn(
    frame_at: Callable[[int], Frame], turn: AbstractContextManager[object] | None, request: RequestMedia
) -> Callable[[Sequence[int]], Generator[Frame, None, None]]:
    def read(indices: Sequence[int]) -> Generator[Frame, None, None]:
        for index in indices:
            with turn or nullcontext():
                with request.work():
                    frame = frame_at(index)
                yield frame
                del frame

    return read
