"""Pictures and sounds of prompts: checked and measured when a request comes, encoded beside the steps of others.

    Image("cat.png")  ->  read  ->  segments: decoded, prepared, a MediaSpan  ->  make_rows: the tower, piece by piece
                                                                              ->  kept, for the next prompt that has it

What a request costs before its turn is small: of a picture it holds the pixels that the tower will see, one byte each.
`MEDIA_WAITING_BYTES` bounds what all requests hold together.

Elsewhere: `media/` decodes and prepares; `model/encoders/` has the towers; `spans.py` puts rows into steps.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from argosy.engine.memory_plan import MEDIA_KEPT_BYTES, MEDIA_WAITING_BYTES
from argosy.errors import ArgosyError, Overloaded, UsageError
from argosy.media.decoder import Decoder
from argosy.media.parts import PROMPT_LIMITS, Audio, Content, Hearing, Image, Kind, Video
from argosy.media.pictures import PictureProcessor
from argosy.model.encoders.reading import Encoders, Processor
from argosy.model.encoders.table import Shape
from argosy.prompt.media_span import EARS_HINT, MediaSpan, SpanRows
from argosy.prompt.replay import TenantMemory

if TYPE_CHECKING:
    from argosy.engine.ears import Transcriber

_RETRY_S = 5


class PromptMedia:
    """Reads the media of one engine's prompts. Safe from any thread; encoding runs in the engine's own.

    Args:
        processors: what prepares the kinds that the model has an encoder for, or why it cannot take them.
        low_detail: prepares a picture with low detail; None: the model takes no pictures.
        ears: transcribe sounds if the model takes none.
    """

    def __init__(
        self,
        encoders: Encoders,
        processors: Mapping[Kind, Processor | ArgosyError],
        decoder: Decoder,
        low_detail: Processor | None = None,
        ears: Transcriber | None = None,
    ) -> None:
        self._encoders = encoders
        self._low_detail = low_detail
        self._processors: dict[Kind, Processor] = {}
        self._faults: dict[Kind, ArgosyError] = {}
        for kind, one in processors.items():
            if isinstance(one, ArgosyError):
                self._faults[kind] = one
            else:
                self._processors[kind] = one
        self._decoder = decoder
        self._ears = None if "sound" in self._processors else ears
        self._one_decoded = threading.Lock()  # a decoded picture is large, so there is one at a time
        self._waiting = _Room(MEDIA_WAITING_BYTES)
        self._kept: TenantMemory[SpanRows] = TenantMemory(max_bytes=MEDIA_KEPT_BYTES)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What a prompt may have beside text."""
        return (*self._processors, *(() if self._ears is None else ("sound",)))

    @property
    def hears(self) -> Hearing:
        """What becomes of a sound."""
        if "sound" in self._processors:
            return "native"
        return "none" if self._ears is None else "transcript"

    def close(self) -> None:
        self._decoder.close()
        self._encoders.drop()

    def forget(self, tenant: str) -> None:
        """Forget the rows and transcripts kept for a tenant."""
        self._kept.forget(tenant)
        if self._ears is not None:
            self._ears.forget(tenant)

    def read(self, part: Image | Audio | Video) -> Content:
        """See `MediaReader.read`."""
        if part.kind not in self.kinds:
            if part.kind in self._faults:
                raise self._faults[part.kind]
            takes = ["text", *(f"{kind}s" for kind in self.kinds)]
            raise UsageError(
                f"this model takes {' and '.join(takes)}, and the conversation has a {part.kind}",
                hint=EARS_HINT if part.kind == "sound" else None,
            )
        return part.read(PROMPT_LIMITS)

    def as_text(self, content: Content, tenant: str) -> str | None:
        """See `MediaReader.as_text`."""
        if content.kind != "sound" or self._ears is None:
            return None
        return self._ears.text_for(content, tenant)

    def placeholder(self, content: Content) -> int:
        """See `MediaReader.placeholder`."""
        return self._encoders.files[content.kind].token_id

    def segments(self, content: Content, tenant: str) -> Sequence[Sequence[int] | MediaSpan]:
        """See `MediaReader.segments`."""
        values, shape = self._prepare(content)
        files = self._encoders.files[content.kind]
        digest = blake3(content.digest + repr((content.kind, shape)).encode()).digest()
        angles, num_angles = None, None
        if files.encoder.angles is not None:
            angles, num_angles = files.encoder.angles(files.config, shape)
        waiting = _Waiting(values)
        self._waiting.charge(waiting, values.nbytes)

        def make_rows() -> SpanRows | Generator[None, None, SpanRows]:
            if (kept := self._kept.get(tenant, digest)) is not None:
                self._kept.touch(tenant, [digest])
                return kept
            return self._encode(content.kind, waiting.values, shape, tenant, digest)

        span = MediaSpan(
            content.kind,
            digest,
            files.num_positions(shape),
            files.token_id,
            make_rows,
            angles=angles,
            num_angles=num_angles,
            sees_both_ways=files.encoder.sees_both_ways,
        )
        if files.marks is None:
            return [span]
        before, after = files.marks
        return [[before], span, [after]]

    def _prepare(self, content: Content) -> tuple[NDArray[Any], Shape]:
        """Decode a content: pixels [height, width, 3] with their grid, or mel features [bands, frames]."""
        processor = self._processors[content.kind]
        if content.detail == "low":
            assert self._low_detail is not None
            processor = self._low_detail
        with self._one_decoded:
            if isinstance(processor, PictureProcessor):
                if not isinstance(content.data, np.ndarray):
                    processor.grid(*self._decoder.measure(content))  # refuse what its header rules out
                canvas = processor.resize(self._decoder.picture(content))
                rows, cols = (side // processor.patch_size for side in canvas.shape[:2])
                return canvas, (1, rows, cols)
            features = processor.prepare(self._decoder.sound(content, processor.rate))
            return features, (features.shape[1],)

    def _encode(
        self, kind: Kind, values: NDArray[Any], shape: Shape, tenant: str, digest: bytes
    ) -> Generator[None, None, SpanRows]:
        tower, processor = self._encoders.open(kind), self._processors[kind]
        yield
        if isinstance(processor, PictureProcessor):
            patches, grid = processor.patches(values)
            rows = yield from tower.encode(patches, grid)
        else:
            rows = yield from tower.encode(values)
        if rows.nbytes <= MEDIA_KEPT_BYTES:
            self._kept.put(tenant, digest, rows)
        return rows


class _Waiting:
    """Prepared media; their room is free again when nothing can encode them any more."""

    def __init__(self, values: NDArray[Any]) -> None:
        self.values = values


class _Room:
    """Bytes that objects take until they are gone."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._held_bytes = 0
        self._lock = threading.Lock()

    def charge(self, owner: object, nbytes: int) -> None:
        """Charge bytes until `owner` is collected.

        Raises:
            Overloaded: they do not fit now.   UsageError: they never fit.
        """
        if nbytes > self._most_bytes:
            raise UsageError(
                f"a picture or sound may take at most {self._most_bytes} bytes once it is prepared, found {nbytes}",
                hint="make it smaller or shorter",
            )
        with self._lock:
            if self._held_bytes + nbytes > self._most_bytes:
                raise Overloaded("too many pictures and sounds wait to be encoded", retry_after_s=_RETRY_S)
            self._held_bytes += nbytes
        weakref.finalize(owner, self._free, nbytes)

    def _free(self, nbytes: int) -> None:
        with self._lock:
            self._held_bytes -= nbytes
