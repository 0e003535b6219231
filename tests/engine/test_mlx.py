"""Checkpoints that mlx-lm wrote answer as MLX does, in place, at every budget and packed.

Unquantised weights and mxfp8 take float32 activations, so logits match up to the rounding of sums. In other modes
activations are rounded, and every expert is chosen.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from argosy import Engine, SamplingParams
from argosy.checkpoint.manifest import verify_pack
from argosy.checkpoint.pack import pack
from argosy.model.families import open_model
from tests.engine.test_gguf import LARGEST_DIVERGENCE, mean_divergence
from tests.models.mlx_models import DIRECTORY, PLAIN, QUANTISED, MlxModel
from tests.models.references import LARGEST_DIFFERENCE, Reference, difference
from tests.models.safetensors_file import Array, read_header

W = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}  # Mixtral's names on the hub
EXACT = ("mixtral_mxfp8", *(model.name for model in PLAIN))


def is_like_mlx(model: MlxModel, logits: Array) -> bool:
    expected = model.reference.logits
    if model.name in EXACT:
        return difference(logits, expected) <= LARGEST_DIFFERENCE
    return mean_divergence(expected, logits) <= LARGEST_DIVERGENCE


@pytest.mark.parametrize("model", PLAIN + QUANTISED, ids=lambda model: model.name)
def test_answers_are_those_of_mlx_in_place_and_packed(model: MlxModel, tmp_path: Path) -> None:
    reference = model.reference
    pack(open_model(reference.directory), tmp_path / "packed", format="source")
    verify_pack(tmp_path / "packed")
    greedy = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    answers = []
    for directory, expert_slots, chunk_tokens in (
        (reference.directory, None, 256),
        (reference.directory, 3, 5),
        (tmp_path / "packed", 3, 1),
    ):
        with Engine.open(
            directory,
            memory="4GiB",
            kv_dtype="f32",
            threads=2,
            expert_slots=expert_slots,
            chunk_tokens=chunk_tokens,
        ) as engine:
            logits = engine.logits(reference.input_ids)
            answers.append((logits.tobytes(), engine.generate(reference.input_ids, greedy).token_ids))
        assert is_like_mlx(model, logits)
    assert answers == [answers[0]] * len(answers)


def test_experts_one_by_one_as_early_mlx_lm_stored_them_are_the_same(tmp_path: Path) -> None:
    source = DIRECTORY / "mixtral_mxfp8"
    header, begin = read_header(source / "model.safetensors")
    content = (source / "model.safetensors").read_bytes()[begin:]
    entries, parts, end = {}, [], 0
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        pieces = {name: (entry["shape"], content[start:stop])}
        if ".switch_mlp." in name:
            block, _, rest = name.partition("switch_mlp.")
            matrix, _, part = rest.partition(".")
            count, *shape = entry["shape"]
            size = (stop - start) // count
            pieces = {
                f"{block}experts.{expert}.{W[matrix]}.{part}": (
                    shape,
                    content[start + expert * size :][:size],
                )
                for expert in range(count)
            }
        for one, (shape, data) in pieces.items():
            entries[one] = {"dtype": entry["dtype"], "shape": shape, "data_offsets": [end, end + len(data)]}
            parts.append(data)
            end += len(data)
    text = json.dumps(entries).encode()
    (tmp_path / "model.safetensors").write_bytes(b"".join([len(text).to_bytes(8, "little"), text, *parts]))
    shutil.copy(source / "config.json", tmp_path)
    found = []
    for directory in (source, tmp_path):
        with Engine.open(directory, memory="4GiB", threads=1) as engine:
            found.append(engine.logits(Reference(source).input_ids).tobytes())
    assert found[0] == found[1]
