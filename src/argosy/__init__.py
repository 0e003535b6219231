"""Run mixture-of-experts models bigger than your memory.

    with Engine.open("path/or/demo", memory="2GiB") as engine:
        print(engine.generate("Why is the sky blue?").text)
        print(engine.generate([Image("cat.jpg"), Text("What is this?")]).text)  # where the model sees

This module has only public names; `docs/architecture.md` is the map. Names load on first use, so that `argosy --help`
answers at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argosy.config import Budget, Grammar, SamplingParams
    from argosy.media.parts import Audio, Image, Text, Video
    from argosy.media.transcript import Segment, Transcript, TranscriptOptions
    from argosy.open.ears import Transcriber
    from argosy.open.engine import Engine
    from argosy.prompt.prompt import Prompt

__all__ = [
    "Audio", "Budget", "Engine", "Grammar", "Image", "Prompt", "SamplingParams", "Segment", "Text", "Transcriber",
    "Transcript", "TranscriptOptions", "Video", "errors",
]  # fmt: skip
__version__ = "0.1.0"

_HOMES = {
    "Budget": "argosy.config",
    "Grammar": "argosy.config",
    "SamplingParams": "argosy.config",
    "Engine": "argosy.open.engine",
    "Transcriber": "argosy.open.ears",
    "Audio": "argosy.media.parts",
    "Image": "argosy.media.parts",
    "Text": "argosy.media.parts",
    "Video": "argosy.media.parts",
    "Segment": "argosy.media.transcript",
    "Transcript": "argosy.media.transcript",
    "TranscriptOptions": "argosy.media.transcript",
    "Prompt": "argosy.prompt.prompt",
}


def __getattr__(name: str) -> object:
    import importlib

    if name == "errors":
        return importlib.import_module("argosy.errors")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'argosy' has no attribute '{name}'")
