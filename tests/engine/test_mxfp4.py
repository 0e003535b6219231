"""MXFP4 experts of gpt-oss answer like their dequantised weights, and the same at every budget and packed.

Comparisons with the dequantised weights choose every expert: quantised matrices take 8-bit activations, and a rounded
score that flips one routing decision would hide the cost of rounding itself.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from argosy import Engine, _native
from argosy.checkpoint.manifest import verify_pack
from argosy.checkpoint.pack import pack
from argosy.errors import CheckpointError
from argosy.model.families import open_model
from tests.engine.test_gguf import LARGEST_DIVERGENCE, require_equal_answers
from tests.models.mxfp4_models import write_mxfp4_model
from tests.models.numpy_model import NumpyModel
from tests.models.references import LARGEST_DIFFERENCE, difference, mean_divergence
from tests.models.safetensors_file import read_checkpoint, write_checkpoint
from tests.models.tiny import RawConfig, gpt_oss, prompt_ids, random_tensors


def config_of(*, num_experts: int, experts_per_token: int, **changes: object) -> RawConfig:
    # The width is not a multiple of twice a panel's 16 rows.
    sizes = {"hidden_size": 256, "intermediate_size": 224, "head_dim": 32, "num_key_value_heads": 2}
    chosen = {"num_local_experts": num_experts, "num_experts_per_tok": experts_per_token}
    return gpt_oss(**(sizes | chosen | changes))


@pytest.mark.covering(1)  # where a tensor lies and how it is multiplied do not depend on each other
@pytest.mark.parametrize("instruction_set", _native.instruction_sets())
@pytest.mark.parametrize("num_shards", [1, 3])
def test_logits_match_those_of_the_dequantised_weights(
    instruction_set: str, num_shards: int, tmp_path: Path
) -> None:
    config = config_of(num_experts=3, experts_per_token=3)
    reference = NumpyModel(write_mxfp4_model(tmp_path / "model", config, seed=5, num_shards=num_shards))
    prompt = prompt_ids(config, 5)
    with Engine.open(tmp_path / "model", memory="4GiB", threads=1, instruction_set=instruction_set) as engine:
        logits = engine.logits(prompt)
    assert mean_divergence(reference.logits(prompt), logits) <= LARGEST_DIVERGENCE


@pytest.mark.parametrize("instruction_set", _native.instruction_sets())
def test_greedy_answers_are_equal_at_every_budget_in_place_and_packed(
    instruction_set: str, tmp_path: Path
) -> None:
    """Budgets take turns in place and packed, so that the instruction sets try them both ways."""
    config = config_of(num_experts=8, experts_per_token=2)
    write_mxfp4_model(tmp_path / "model", config, seed=4)
    pack(open_model(tmp_path / "model"), tmp_path / "packed", format="source")
    verify_pack(tmp_path / "packed")
    places = [tmp_path / "model", tmp_path / "packed"]
    turn = _native.instruction_sets().index(instruction_set)
    require_equal_answers(places, turn, prompt_ids(config, 4, 19), instruction_set, most_slots=16)


def test_a_pack_holds_every_weight_bit_for_bit(tmp_path: Path) -> None:
    config = config_of(num_experts=2, experts_per_token=1, num_hidden_layers=2)
    exact = read_checkpoint(write_mxfp4_model(tmp_path / "model", config, seed=6))
    pack(open_model(tmp_path / "model"), tmp_path / "packed", format="source")
    files = open_model(tmp_path / "packed")
    stored = np.fromfile(tmp_path / "packed" / "experts.bin", np.uint8)
    for (layer, expert), record in files.experts.items():
        experts = f"model.layers.{layer}.mlp.experts."
        gate_up = exact[experts + "gate_up_proj"][expert]
        expected = gate_up[:, 0::2].T, gate_up[:, 1::2].T, exact[experts + "down_proj"][expert].T
        for matrix, values in zip(record.matrices, expected, strict=True):
            start = record.pieces[0].offset + matrix.offset
            nbytes = _native.matrix_bytes("mxfp4", matrix.rows, matrix.cols)
            found = _native.dequantize("mxfp4", stored[start : start + nbytes], matrix.rows, matrix.cols)
            np.testing.assert_array_equal(found, values)


def test_one_read_fetches_gate_and_up_and_no_byte_twice(tmp_path: Path) -> None:
    config = config_of(num_experts=2, experts_per_token=1)
    write_mxfp4_model(tmp_path / "model", config, seed=1)
    files = open_model(tmp_path / "model")
    rows, hidden = 2 * 224, 256
    assert [piece.nbytes for piece in files.experts[0, 1].pieces] == [
        rows * hidden // 2,
        rows * hidden // 32,
        hidden * 224 // 2,
        hidden * 224 // 32,
    ]
    assert files.expert_format == "mxfp4"


@pytest.mark.parametrize("format", ["q8", "q4"])  # not bf16, which keeps the sign of a zero
def test_packing_to_other_formats_starts_from_the_exact_weights(format: str, tmp_path: Path) -> None:
    plain = write_mxfp4_model(tmp_path / "model", config_of(num_experts=2, experts_per_token=1), seed=1)
    pack(open_model(tmp_path / "model"), tmp_path / "packed", format=format)
    pack(open_model(plain), tmp_path / "expected", format=format)
    for name in ("dense.bin", "experts.bin"):
        assert (tmp_path / "packed" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()


def test_blocks_that_contradict_the_config_are_refused(tmp_path: Path) -> None:
    write_mxfp4_model(tmp_path / "model", config_of(num_experts=2, experts_per_token=1), seed=1)
    text = (tmp_path / "model" / "config.json").read_text()
    (tmp_path / "model" / "config.json").write_text(
        text.replace('"intermediate_size": 224', '"intermediate_size": 192')
    )
    with pytest.raises(CheckpointError, match=r"gate_up_proj_\w+ is \[2, 448[^]]*\], expected \[2, 384"):
        open_model(tmp_path / "model")


def test_a_bf16_pack_computes_with_float32_activations(tmp_path: Path) -> None:
    """bf16 holds every value of MXFP4, so only sums are rounded."""
    config = config_of(num_experts=5, experts_per_token=2)
    reference = NumpyModel(write_mxfp4_model(tmp_path / "model", config, seed=7))
    pack(open_model(tmp_path / "model"), tmp_path / "packed", format="bf16")
    prompt = prompt_ids(config, 7)
    expected = reference.logits(prompt)
    assert reference.router_margin > 1e-4
    with Engine.open(tmp_path / "packed", memory="4GiB", threads=1) as engine:
        assert difference(engine.logits(prompt), expected) <= LARGEST_DIFFERENCE


def test_blocks_that_the_config_does_not_mention_are_refused(tmp_path: Path) -> None:
    config = config_of(num_experts=2, experts_per_token=1)
    write_mxfp4_model(tmp_path / "model", config, seed=1)
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"gate_up_proj_blocks is U8, .* has no quantization_config"):
        open_model(tmp_path / "model")
    kept = {"quant_method": "mxfp4", "modules_to_not_convert": ["gate_up_proj"]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"quantization_config": kept}))
    with pytest.raises(CheckpointError, match="says that it is not quantised"):
        open_model(tmp_path / "model")


def test_rows_that_are_not_whole_blocks_are_refused(tmp_path: Path) -> None:
    config = gpt_oss()  # its rows have 28 columns
    tensors = {name: ("BF16", values) for name, values in random_tensors(config, 1, "BF16").items()}
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, _, rows = tensors.pop(name)[1].shape
        tensors[name + "_blocks"] = ("U8", np.zeros((experts, rows, 1, 16), np.uint8))
        tensors[name + "_scales"] = ("U8", np.zeros((experts, rows, 1), np.uint8))
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_checkpoint(tmp_path, tensors)
    with pytest.raises(CheckpointError, match="hidden_size as 28, but MXFP4 rows are blocks of 32"):
        open_model(tmp_path)
