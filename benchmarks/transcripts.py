"""Does Whisper hear the same words here as in transformers, and how many of them are right?

    python benchmarks/transcripts.py --speech DIR [--model PATH|tiny.en] [--threads 2]

Needs torch and transformers, which get the same weights in float32. DIR holds recordings of spoken digits, named after
the digit (`7_george_7.wav`), and perhaps `jfk.flac`. Both take the likeliest token, without and with timestamps, and
try no other temperature. The word error rate compares words in lower case, without punctuation, digits written out.
Exit code 1 if a transcript differs.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from argosy import Audio, Transcriber, TranscriptOptions
from argosy.checkpoint.files import BYTES_PER_VALUE
from argosy.media.decoder import Decoder
from argosy.media.parts import PROMPT_LIMITS
from argosy.model.whisper.files import WhisperFiles, whisper_tensors

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
JFK = (
    "and so my fellow americans ask not what your country can do for you ask what you can do for your country"
)
_DTYPES = {"f32": np.float32, "f16": np.float16}


def spoken(path: Path) -> str:
    return JFK if path.stem == "jfk" else DIGITS[int(path.name[0])]


def words(text: str) -> list[str]:
    found = re.findall(r"[a-z']+|\d", text.lower())
    return [DIGITS[int(word)] if word.isdigit() else word for word in found]


def errors(said: list[str], heard: list[str]) -> int:
    """The fewest words to insert, remove or replace."""
    row = list(range(len(heard) + 1))
    for at, word in enumerate(said, start=1):
        diagonal, row[0] = row[0], at
        for column, other in enumerate(heard, start=1):
            diagonal, row[column] = (
                row[column],
                min(row[column] + 1, row[column - 1] + 1, diagonal + (word != other)),
            )
    return row[-1]


def reference(files: WhisperFiles) -> Any:
    """The model of transformers with these weights."""
    config, special = files.config, files.special
    model = transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=config.vocab_size, num_mel_bins=config.num_mels, d_model=config.hidden_size,
            encoder_layers=config.encoder_layers, encoder_attention_heads=config.encoder_heads,
            encoder_ffn_dim=config.encoder_width, decoder_layers=config.decoder_layers,
            decoder_attention_heads=config.decoder_heads, decoder_ffn_dim=config.decoder_width,
            max_source_positions=config.sound_positions, max_target_positions=config.text_positions,
            bos_token_id=special.end, eos_token_id=special.end, pad_token_id=special.end,
            decoder_start_token_id=special.start,
        )
    ).eval()  # fmt: skip
    values = {}
    for canonical, tensor in whisper_tensors(config).items():
        ref = files.tensors[canonical]
        assert ref.nbytes == tensor.rows * tensor.cols * BYTES_PER_VALUE[ref.format]
        stored = np.fromfile(
            ref.path, _DTYPES[ref.format], count=tensor.rows * tensor.cols, offset=ref.offset
        )
        values["model." + tensor.name] = torch.from_numpy(stored.astype(np.float32).reshape(tensor.shape))
    missing, unexpected = model.load_state_dict(values, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"proj_out.weight"}, missing
    model.tie_weights()
    more = {}
    if special.languages:
        more["lang_to_id"] = {f"<|{code}|>": token for code, token in special.languages.items()}
        more["task_to_id"] = {"transcribe": special.transcribe, "translate": special.translate}
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=special.end, eos_token_id=special.end, pad_token_id=special.end,
        decoder_start_token_id=special.start, no_timestamps_token_id=special.no_timestamps,
        prev_sot_token_id=special.previous, max_initial_timestamp_index=special.most_initial_positions,
        suppress_tokens=list(special.suppressed), begin_suppress_tokens=list(special.suppressed_first),
        is_multilingual=bool(special.languages), max_length=config.text_positions, return_timestamps=False,
        **more,
    )  # fmt: skip
    return model


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--speech", type=Path, required=True)
    parser.add_argument("--model", default="tiny.en")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    recordings = sorted(path for path in options.speech.iterdir() if path.suffix in (".wav", ".flac"))
    num_different = 0
    print("timestamps  recordings  equal   words   word error rate          seconds of CPU")
    print("                                        argosy  transformers     argosy  transformers")
    with Transcriber.open(options.model, threads=options.threads) as transcriber:
        files = transcriber.files
        model, decoder = reference(files), Decoder(PROMPT_LIMITS)
        extract = transformers.WhisperFeatureExtractor(feature_size=files.config.num_mels)
        rate = files.processor.rate
        for has_timestamps in (False, True):
            asked = TranscriptOptions(
                has_timestamps=has_timestamps,
                is_conditioned=False,
                compression_ratio_threshold=None,
                logprob_threshold=None,
                no_speech_threshold=None,
            )
            num_words = num_equal = 0
            wrong, seconds = [0, 0], [0.0, 0.0]
            for path in recordings:
                began = time.process_time()
                ours = transcriber.transcribe(Audio(path), asked).text
                middle = time.process_time()
                samples = decoder.sound(Audio(path).read(PROMPT_LIMITS), rate)
                features = extract(samples, sampling_rate=rate, return_tensors="pt").input_features
                task = {"task": "transcribe"} if files.special.languages else {}
                with torch.no_grad():
                    ids = model.generate(features, return_timestamps=has_timestamps, **task)[0].tolist()
                text = files.tokenizer.decode([i for i in ids if i < files.special.end]).strip()
                seconds[0] += middle - began
                seconds[1] += time.process_time() - middle
                said = words(spoken(path))
                num_words += len(said)
                num_equal += ours == text
                for who, heard in enumerate((ours, text)):
                    wrong[who] += errors(said, words(heard))
                if ours != text:
                    print(f"  {path.name}: {ours!r} here, {text!r} in transformers")
            num_different += len(recordings) - num_equal
            print(
                f"{'with' if has_timestamps else 'without':<12}{len(recordings):>10}{num_equal:>7}{num_words:>8}"
                f"{wrong[0] / num_words:>12.3f}{wrong[1] / num_words:>14.3f}{seconds[0]:>11.1f}{seconds[1]:>14.1f}"
            )
        decoder.close()
    return num_different > 0


if __name__ == "__main__":
    raise SystemExit(main())
