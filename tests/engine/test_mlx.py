"""Checkpoints that mlx-lm wrote answer as MLX does, in place, at every budget and packed.

Unquantised weights and mxfp8 take float32 activations, so logits match up to the rounding of sums. In other modes
activations are rounded, and every expert is chosen.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from argosy import Engine, SamplingParams
from argosy.checkpoint.manifest import verify_pack
from argosy.checkpoint.pack import pack
from argosy.model.families import open_model
from tests.engine.test_gguf import LARGEST_DIVERGENCE
from tests.engine.test_hub_schemes import values_of
from tests.models.mlx_models import DIRECTORY, PLAIN, QUANTISED, MlxModel
from tests.models.references import LARGEST_DIFFERENCE, Reference, difference, mean_divergence
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
            expert_slots=expert_slots if open_model(directory).experts else None,
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


def test_nvfp4_weights_may_have_a_factor_for_each_matrix(tmp_path: Path) -> None:
    source, copy = DIRECTORY / "qwen3_next_nvfp4", tmp_path / "model"
    shutil.copytree(source, copy)
    header, begin = read_header(source / "model.safetensors")
    content = (source / "model.safetensors").read_bytes()[begin:]
    factors = {"gate": [0.5, 3.0], "down": [1.0, 0.25]}
    for name, factor in factors.items():
        largest = (2688 * np.array(factor, np.float32)).tobytes()
        header[f"model.layers.0.mlp.switch_mlp.{name}_proj.global_scale"] = {
            "dtype": "F32",
            "shape": [2],
            "data_offsets": [len(content), len(content) + len(largest)],
        }
        content += largest
    text = json.dumps(header).encode()
    (copy / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content)
    (copy / "model.safetensors.index.json").unlink(missing_ok=True)
    for directory, name in ((source, "plain"), (copy, "scaled")):
        pack(open_model(directory), tmp_path / name, format="source")
    plain, scaled = (open_model(tmp_path / name).experts for name in ("plain", "scaled"))
    for expert in range(2):
        for name in ("gate", "up", "down"):
            found, whole = (values_of(one[0, expert].matrix(name, name), tmp_path) for one in (scaled, plain))
            factor = np.float32(factors.get(name, [1.0, 1.0])[expert])
            np.testing.assert_array_equal(found, whole * factor)
