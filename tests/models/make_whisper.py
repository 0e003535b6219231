"""Write what transformers hears with tiny Whisper checkpoints (needs torch and transformers).

    python -m tests.models.make_whisper

Each file of `reference_whisper/` holds, for one checkpoint of `tiny_whisper.py`, the encoder's result and the logits
of a few tokens for one window, and the tokens of `generate` for each case in `CASES`.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import tokenizers
import torch
import transformers

from tests.media.samples import RATE
from tests.models.safetensors_file import Array, write_safetensors
from tests.models.tiny_whisper import REFERENCE, SECONDS, TINY, Tiny, sound, write_transformers
from tests.models.whisper_cases import CASES, FED_TOKENS, Case, cases_of

_DTYPES = {"float32": "F32", "int64": "I64"}


@torch.no_grad()
def answers(directory: Path, tiny: Tiny) -> dict[str, Array]:
    """The outputs of the checkpoint in `directory`, by name."""
    model, info = transformers.WhisperForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    if any(info.values()):
        raise SystemExit(f"{directory}: {info}")
    extract = transformers.WhisperFeatureExtractor.from_pretrained(directory)
    features = extract(sound(1.3, 0), sampling_rate=RATE, return_tensors="pt").input_features
    hidden = model.model.encoder(features).last_hidden_state
    fed = torch.tensor([[tiny.id_of("startoftranscript"), *FED_TOKENS]])
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    out = {
        "features": features[0].numpy(),
        "hidden": hidden[0].numpy(),
        "logits": model(encoder_outputs=(hidden,), decoder_input_ids=fed).logits[0].numpy(),
    }
    for name, case in cases_of(tiny).items():
        out |= {
            f"{name}.{key}": value for key, value in _generate(model, extract, tokenizer, tiny, case).items()
        }
    return out


def _generate(
    model: Any, extract: Any, tokenizer: tokenizers.Tokenizer, tiny: Tiny, case: Case
) -> dict[str, Array]:
    samples = sound(case.seconds, case.seed)
    is_long = case.seconds > SECONDS
    features = extract(
        samples,
        sampling_rate=RATE,
        return_tensors="pt",
        **({"truncation": False, "padding": "longest"} if is_long else {}),
    ).input_features
    options: dict[str, Any] = {"return_timestamps": case.has_timestamps}
    if tiny.is_multilingual:
        options |= {"task": case.task, "language": case.language}
    if is_long:
        options["condition_on_prev_tokens"] = case.is_conditioned
    if case.prompt:
        ids = [tiny.id_of("startofprev"), *tokenizer.encode(f" {case.prompt}", add_special_tokens=False).ids]
        options["prompt_ids"] = torch.tensor(ids)
    found = model.generate(features, return_segments=True, **options)
    segments = found["segments"][0]
    return {
        "tokens": np.array([int(i) for one in segments for i in one["tokens"]], np.int64),
        "lengths": np.array([len(one["tokens"]) for one in segments], np.int64),
        "times": np.array([[float(one["start"]), float(one["end"])] for one in segments], np.float32),
    }


def main() -> None:
    REFERENCE.mkdir(exist_ok=True)
    for name, tiny in TINY.items():
        with tempfile.TemporaryDirectory() as scratch:
            write_transformers(Path(scratch), tiny)
            found = answers(Path(scratch), tiny)
        stored = {key: (_DTYPES[value.dtype.name], value) for key, value in found.items()}
        write_safetensors(REFERENCE / f"{name}.safetensors", stored)
        for key in CASES:
            if f"{key}.lengths" in found:
                print(name, key, found[f"{key}.lengths"], found[f"{key}.times"].tolist())


if __name__ == "__main__":
    main()
