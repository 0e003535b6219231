"""Names -> files: `demo`, paths, aliases and names in the library; and the settings of an engine for them.

Elsewhere: `library/names.py` finds a name; `demo/` makes the embedded model; `model/families/` opens its files.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Unpack

from argosy.budget.planner import quarter_of_experts
from argosy.checkpoint.files import ModelFiles
from argosy.config import DEMO, TINY_EN, EngineConfig, EngineOptions
from argosy.engine import options as engine_options
from argosy.errors import ArgosyError
from argosy.experts.resident import Progress
from argosy.library import names
from argosy.library.places import ollama_params_of, tower_of
from argosy.model.families import open_model

DEMO_CHUNK = 256  # default tokens of a step of the demo model


def locate_model(model: str | Path, progress: Progress | None = None) -> Path:
    """Locate a model: `demo`, which is built on first use; a path; an alias; a name in the library, or a part of one.

    A path that exists wins over a name. A `Path` is never a name.

    Raises:
        UsageError: several models match.   CheckpointError: no model has that name, or it is incomplete.
    """
    if str(model) == DEMO:
        from argosy.demo.locate import locate

        return locate(progress=progress)
    return model if isinstance(model, Path) else names.locate(model)


def is_here(model: str) -> bool:
    """Whether `model` is the name or path of something on this machine, or `demo`."""
    return names.find(model) is not None


def open_files(path: Path, *, mmproj: str | Path | None = None) -> ModelFiles:
    """Find and check all files of a model: `open_model`, and the vision tower in the caller's file, or in the place
    where the program that installed the model keeps it.

    Raises:
        The same errors as `open_model`, also if the tower in that file cannot be used.
    """
    files = open_model(path, mmproj=mmproj, tower=None if mmproj is not None else tower_of(path))
    files = replace(files, ollama_params=ollama_params_of(path))
    if mmproj is not None:
        from argosy.model.encoders.reading import find_encoders  # imports every tower

        for found in find_encoders(files).values():
            if isinstance(found, ArgosyError):
                raise found
    return files


def locate_ears(ears: str | Path, progress: Progress | None = None) -> Path:
    """Locate a Whisper checkpoint like any model; `tiny.en` is fetched on first use."""
    if str(ears) == TINY_EN:
        from argosy.demo.ears import locate

        return locate(progress=progress)
    return locate_model(ears)


def configure(
    model: str | Path, files: ModelFiles, progress: Progress | None = None, **options: Unpack[EngineOptions]
) -> EngineConfig:
    """Fill in the settings that were left out, for a model by the caller's name for it.

    Raises:
        UsageError: a setting is invalid, or the requested context is longer than the model supports.
        The errors of `locate_ears`.
    """
    if (ears := options.get("ears")) is not None:
        options["ears"] = locate_ears(ears, progress)
    if str(model) == DEMO and options.get("memory") is None and options.get("expert_slots") is None:
        options["expert_slots"] = quarter_of_experts(files)
        options["chunk_tokens"] = options.get("chunk_tokens") or DEMO_CHUNK
    return engine_options.configure(files, **options)
