"""Read how a checkpoint's makers want tokens to be chosen, if its files say so.

    Ollama's params layer    temperature, top_k, repeat_penalty ...            ──┐
    generation_config.json   do_sample, temperature, repetition_penalty ...    ──┼──>  SamplingDefaults
    GGUF metadata            general.sampling.temp, .top_k, .penalty_repeat    ──┘

If a checkpoint declares anything, its declaration is complete: samplers that it leaves out are off. An invalid or
unsupported value leaves a note and does not affect answers, so a careless file still runs.

Elsewhere: a request's own parameters come first, and an operator's options second (`config.SamplingParams.fill_in`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from argosy.checkpoint.gguf import GgufArray, GgufFile, read_gguf
from argosy.checkpoint.gguf_names import GGUF_METADATA_FILE
from argosy.checkpoint.untrusted_file import kind_of, quote, read_object
from argosy.config import CHOOSING, SamplingDefaults, SamplingParams
from argosy.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from argosy.checkpoint.files import ModelFiles

GENERATION_FILE = "generation_config.json"

_PREFIX = "general.sampling."
_NEUTRAL = SamplingDefaults(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
_MOST_NOTES = 8
# Each spelling of a field, here and in GGUF files and Ollama's parameters.
_NAMES = {
    **{name: name for name in CHOOSING},
    "temp": "temperature",
    "penalty_repeat": "repetition_penalty",
    "repeat_penalty": "repetition_penalty",
    "penalty_present": "presence_penalty",
    "penalty_freq": "frequency_penalty",
}
# Samplers that Argosy lacks -> the values that turn them off. Other fields do not choose tokens.
_LACKING: Mapping[str, tuple[float, ...]] = {
    "num_beams": (1,), "num_beam_groups": (1,), "penalty_alpha": (0,), "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,), "typical_p": (1,), "typ_p": (1,), "tfs_z": (1,), "epsilon_cutoff": (0,),
    "eta_cutoff": (0,), "encoder_repetition_penalty": (1,), "top_h": (), "mirostat": (0,), "xtc_probability": (0,),
}  # fmt: skip


def declared_sampling(files: ModelFiles) -> SamplingDefaults:
    """Return the defaults that a checkpoint declares, or Argosy's own if it declares none.

    Raises:
        CheckpointError: a file is malformed.
    """
    where, said = _said(files)
    values: dict[str, float] = {}
    notes: list[str] = []
    if isinstance(files.ollama_params, CheckpointError):
        notes.append(f"Ollama's parameters have no effect: {files.ollama_params.message}")
    elif files.ollama_params:
        where, said = "Ollama's parameters", {**said, **files.ollama_params}
    for name, value in said.items():
        if value is None:
            continue
        if name in _NAMES:
            field = _NAMES[name]
            try:
                values[field] = _checked(field, value)
            except UsageError as error:
                notes.append(f"{where}: {name} is {_shown(value)} and has no effect: {error.message}")
        elif name in _LACKING and value is not False and value not in _LACKING[name]:
            notes.append(f"{where}: {name} is {_shown(value)}, which is not supported and has no effect")
    samples = said.get("do_sample")
    if samples is False:
        values["temperature"] = 0.0
    elif samples not in (True, None):
        notes.append(f"{where}: do_sample is {_shown(samples)} and has no effect: it must be true or false")
    if not values and samples is not True:
        return SamplingDefaults(notes=tuple(notes[:_MOST_NOTES]))
    return SamplingDefaults(
        **{**_NEUTRAL.as_dict(), **values},  # type: ignore[arg-type]
        source=where,
        notes=tuple(notes[:_MOST_NOTES]),
    )


def _said(files: ModelFiles) -> tuple[str, dict[str, object]]:
    """Return the name of the source, and its fields."""
    path = files.path
    if path.is_dir():
        if (path / GENERATION_FILE).is_file():
            return GENERATION_FILE, read_object(path / GENERATION_FILE)
        if (path / GGUF_METADATA_FILE).is_file():
            return _of_gguf(read_gguf(path / GGUF_METADATA_FILE))
    return ("", {}) if files.header is None else _of_gguf(files.header)


def _of_gguf(file: GgufFile) -> tuple[str, dict[str, object]]:
    found: dict[str, object] = {
        # A float32 becomes the shortest decimal that rounds to it: 0.6, not 0.6000000238.
        key.removeprefix(_PREFIX): float(str(np.float32(value))) if isinstance(value, float) else value
        for key, value in file.metadata.items()
        if key.startswith(_PREFIX) and not isinstance(value, GgufArray)
    }
    return "the GGUF's metadata", found


def _checked(name: str, value: object) -> float:
    """Check the value of a field.

    Raises:
        UsageError: the value is not a number, or out of bounds.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError("it must be a number")
    if name == "top_k":
        if value != int(value):
            raise UsageError("it must be a whole number")
        value = int(value) if 0 < value < 2**31 else 0  # -1, or a number above any vocabulary: all tokens
    SamplingParams.asked({name: value})  # checks the bounds
    return value


def _shown(value: object) -> str:
    return quote(value) if isinstance(value, int | float | str) else kind_of(value)
