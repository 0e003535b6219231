"""Checkpoints in every scheme of the hub hold the exact weights, and answer the same at every budget and packed.

Comparisons with the dequantised weights choose every expert: most quantised matrices take 8-bit activations, and a
rounded score that flips one routing decision would hide the cost of rounding itself.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from argosy import Engine, _native
from argosy.checkpoint.fingerprint import fingerprint
from argosy.checkpoint.landing import MatrixRef, read_landed
from argosy.checkpoint.pack import pack
from argosy.cluster import identity
from argosy.engine.prefix import identify
from argosy.errors import UnsupportedModel
from argosy.model.families import open_model
from tests.engine.test_gguf import LARGEST_DIVERGENCE, require_equal_answers
from tests.helpers.examples import few_of
from tests.models.hub_schemes import KINDS, write_kind
from tests.models.numpy_model import NumpyModel
from tests.models.references import LARGEST_DIFFERENCE, difference, mean_divergence
from tests.models.safetensors_file import Array, read_checkpoint
from tests.models.tiny import RawConfig, prompt_ids, qwen3_moe
from tests.models.tiny_grouped import bailing_moe

FEW = ("ct uint4 group 64", "gptq", "gptq act-order", "fp8 channel", "modelopt mixed")


def config_of(*, experts: int, chosen: int, layers: int = 2) -> RawConfig:
    """Columns of 256 and 128; one group of 128 is a whole row of `down`, and no scale fills a block of rows."""
    return qwen3_moe(
        hidden_size=256, head_dim=32, num_attention_heads=6, num_key_value_heads=2, moe_intermediate_size=128,
        num_hidden_layers=layers, num_experts=experts, num_experts_per_tok=chosen,
    )  # fmt: skip


def values_of(matrix: MatrixRef, directory: Path) -> Array:
    """Return the weights of a matrix of a pack."""
    stored = np.fromfile(matrix.path, np.uint8)[matrix.offset : matrix.offset + matrix.nbytes]
    return _native.dequantize(matrix.format, stored, matrix.rows, matrix.cols)


def require_same(found: Array, expected: Array, rounding: float) -> None:
    """Compare bit for bit, except for a rounding that no order of products avoids."""
    if rounding:
        np.testing.assert_allclose(found, expected, rtol=rounding, atol=0)
    else:
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", KINDS)
def test_a_pack_holds_every_weight(name: str, tmp_path: Path) -> None:
    config = config_of(experts=3, chosen=2, layers=1)
    exact = read_checkpoint(write_kind(tmp_path / "model", config, KINDS[name], seed=6, num_shards=2))
    pack(open_model(tmp_path / "model"), tmp_path / "packed", format="source")
    files = open_model(tmp_path / "packed")
    assert files.expert_format == KINDS[name].format
    layer = "model.layers.0."
    for part in "qkvo":
        found = values_of(files.dense[f"layers.0.{part}"], tmp_path)
        require_same(found, exact[f"{layer}self_attn.{part}_proj.weight"], KINDS[name].rounding)
    for expert in range(3):
        for part in ("gate", "up", "down"):
            found = values_of(files.experts[0, expert].matrix(part, part), tmp_path)
            expected = exact[f"{layer}mlp.experts.{expert}.{part}_proj.weight"]
            require_same(found, expected, KINDS[name].rounding)


# Schemes whose columns come first, or whose blocks go on from row to row.
INSEPARABLE = ("gptq", "awq", "nf4", "fp4")
NAMING_MODULES = {"auto-round", "modelopt mixed"}  # whose settings name modules of Qwen3


@pytest.mark.parametrize(
    "name",
    few_of([name for name in KINDS if name not in NAMING_MODULES], (*FEW, "ct fp8 block", "nf4", "nvfp4")),
)
def test_rows_of_q_k_and_v_in_one_quantised_matrix_are_separated_or_refused(
    name: str, tmp_path: Path
) -> None:
    config = bailing_moe(
        hidden_size=256, head_dim=64, num_attention_heads=4, num_key_value_heads=2, moe_intermediate_size=128,
        moe_shared_expert_intermediate_size=128, num_hidden_layers=2, num_experts=2, intermediate_size=128,
        n_group=1, topk_group=1,
    )  # fmt: skip
    exact = read_checkpoint(write_kind(tmp_path / "model", config, KINDS[name], seed=6))
    if name.startswith(INSEPARABLE):
        with pytest.raises(UnsupportedModel, match=r"query_key_value.*: matrices in separate tensors"):
            open_model(tmp_path / "model")
        return
    pack(open_model(tmp_path / "model"), tmp_path / "packed", format="source")
    files = open_model(tmp_path / "packed")
    found = np.concatenate([values_of(files.dense[f"layers.1.{part}"], tmp_path) for part in "qkv"])
    require_same(found, exact["model.layers.1.attention.query_key_value.weight"], KINDS[name].rounding)


@pytest.mark.covering(1)
@pytest.mark.parametrize("instruction_set", _native.instruction_sets())
@pytest.mark.parametrize("name", few_of(KINDS, FEW))
def test_logits_match_those_of_the_dequantised_weights(
    name: str, instruction_set: str, tmp_path: Path
) -> None:
    config = config_of(experts=3, chosen=3)
    reference = NumpyModel(write_kind(tmp_path / "model", config, KINDS[name], seed=5))
    prompt = prompt_ids(config, 5)
    with Engine.open(tmp_path / "model", memory="4GiB", threads=2, instruction_set=instruction_set) as engine:
        logits = engine.logits(prompt)
    expected = reference.logits(prompt)
    if KINDS[name].has_exact_activations:
        assert difference(logits, expected) <= LARGEST_DIFFERENCE
    else:
        assert mean_divergence(expected, logits) <= LARGEST_DIVERGENCE


@pytest.mark.covering(1)
@pytest.mark.parametrize("instruction_set", _native.instruction_sets())
@pytest.mark.parametrize("name", few_of(KINDS, FEW))
def test_answers_are_equal_at_every_budget_in_place_and_packed(
    name: str, instruction_set: str, tmp_path: Path
) -> None:
    config = config_of(experts=8, chosen=2, layers=1)
    write_kind(tmp_path / "model", config, KINDS[name], seed=4)
    pack(open_model(tmp_path / "model"), tmp_path / "packed", format="source")
    turn = _native.instruction_sets().index(instruction_set)
    places = [tmp_path / "model", tmp_path / "packed"]
    require_equal_answers(places, turn, prompt_ids(config, 4, 19), instruction_set, most_slots=7)


@pytest.mark.parametrize("name", ["ct fp8 block", "fp8 channel", "fp8 block 32 ue8m0", "mxfp8", "ct mxfp4"])
def test_experts_in_one_tensor_are_those_in_separate_ones(name: str, tmp_path: Path) -> None:
    config = config_of(experts=5, chosen=2, layers=1)
    exact = read_checkpoint(
        write_kind(tmp_path / "model", config, KINDS[name], seed=2, num_shards=2, is_stacked=True)
    )
    pack(open_model(tmp_path / "model"), tmp_path / "packed", format="source")
    files = open_model(tmp_path / "packed")
    for expert in range(5):
        for part in ("gate", "up", "down"):
            found = values_of(files.experts[0, expert].matrix(part, part), tmp_path)
            np.testing.assert_array_equal(
                found, exact[f"model.layers.0.mlp.experts.{expert}.{part}_proj.weight"]
            )


def test_a_model_is_another_with_other_settings_of_the_same_bytes(tmp_path: Path) -> None:
    write_kind(tmp_path / "model", config_of(experts=3, chosen=2, layers=1), KINDS["gptq"], seed=2)
    gptq = open_model(tmp_path / "model")
    own = fingerprint(gptq), identity.fingerprint(gptq), identify(gptq, "plain")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"  # zero points are not one less
    path.write_text(json.dumps(config))
    other = open_model(tmp_path / "model")
    assert [ref.format for ref in other.dense.values()] == [ref.format for ref in gptq.dense.values()]
    assert fingerprint(other) != own[0]
    assert identity.fingerprint(other) != own[1]
    assert identify(other, "plain") != own[2]


def test_rows_of_a_matrix_with_act_order_are_its_own(tmp_path: Path) -> None:
    config = config_of(experts=3, chosen=2, layers=1)
    exact = read_checkpoint(write_kind(tmp_path / "model", config, KINDS["gptq act-order"], seed=6))
    ref = open_model(tmp_path / "model").dense["layers.0.o"]
    landed = read_landed(ref, lambda piece: piece.path.read_bytes()[piece.offset :][: piece.nbytes])
    rows = list(ref.landing.values(ref, landed, 0, 48 * ref.cols))
    assert [first for first, _ in rows] == [*range(0, ref.rows, 48)]
    found = np.concatenate([values for _, values in rows])
    np.testing.assert_array_equal(found, exact["model.layers.0.self_attn.o_proj.weight"])


def test_modelopt_s_own_file_describes_a_checkpoint_whose_config_does_not(tmp_path: Path) -> None:
    config = config_of(experts=3, chosen=2, layers=1)
    kind = KINDS["modelopt mixed"]
    write_kind(tmp_path / "model", config, kind, seed=3, settings_file="hf_quant_config.json")
    write_kind(tmp_path / "other", config, kind, seed=3)
    found, expected = (open_model(tmp_path / name) for name in ("model", "other"))
    assert found.experts[0, 1].formats == expected.experts[0, 1].formats
    assert found.dense["layers.0.q"].format == expected.dense["layers.0.q"].format == "f8"
