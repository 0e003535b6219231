"""Weights that bitsandbytes quantised have its own values, with its names of tensors."""

from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch

from argosy import Engine, _native
from tests.models.hub_schemes import bitsandbytes
from tests.models.numpy_model import NumpyModel
from tests.models.references import LARGEST_DIFFERENCE, difference
from tests.models.safetensors_file import Array, write_checkpoint
from tests.models.tiny import prompt_ids, qwen3_moe, random_tensors
from tests.native.test_transcode_bnb import as_bytes, block_type

pytestmark = pytest.mark.filterwarnings("default")
ROUNDING = 2**-20  # relative; the halves of a scale are added in float32 in both


def quantised(weights: torch.Tensor, kind: str) -> tuple[dict[str, Array], Array]:
    """Return the tensors that transformers saves, by the ends of their names, and their values."""
    if kind == "int8":
        codes, largest, _ = bnb.int8_vectorwise_quant(weights.half())
        values = bnb.int8_vectorwise_dequant(codes, largest)
        parts = {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    else:
        name, _, double = kind.partition(" ")
        codes, state = bnb.quantize_4bit(
            weights, quant_type=name, blocksize=64, compress_statistics=bool(double)
        )
        values = bnb.dequantize_4bit(codes, state)
        parts = {"weight": codes} | {
            f"weight.{end}": part for end, part in state.as_dict(packed=True).items()
        }
    return {end: part.numpy() for end, part in parts.items()}, values.numpy()


FORMATS = {
    "nf4": "bnb4", "nf4 double": "bnb4_double", "fp4": "bnb4", "fp4 double": "bnb4_double", "int8": "int8_row",
}  # fmt: skip


@pytest.mark.parametrize("shape", [(40, 64), (768, 2048), (33, 2880)])
@pytest.mark.parametrize("kind", FORMATS)
def test_weights_are_those_of_bitsandbytes(kind: str, shape: tuple[int, int]) -> None:
    format = FORMATS[kind]
    # Columns of very different sizes, so that scales are, too.
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * torch.logspace(-5, 1, shape[1])
    parts, values = quantised(weights, kind)
    matrix = np.zeros(_native.matrix_bytes(format, *shape), np.uint8)
    for name, part in parts.items():
        data = as_bytes(part)
        _native.transcode(block_type(format, name, data.size), data, *shape, out=matrix)
    found = _native.dequantize(format, matrix, *shape)
    if format == "bnb4":
        np.testing.assert_array_equal(found, values)
    else:
        np.testing.assert_allclose(found, values, rtol=ROUNDING, atol=np.abs(values).max() * 2**-24)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_model_answers_as_with_the_values_of_bitsandbytes(kind: str, tmp_path: Path) -> None:
    config = qwen3_moe(
        hidden_size=256, head_dim=32, num_attention_heads=4, num_key_value_heads=2, moe_intermediate_size=128,
        num_hidden_layers=2, num_experts=3, num_experts_per_tok=3,
    )  # fmt: skip
    stored, exact = {}, {}
    for name, given in random_tensors(config, 3, "BF16").items():
        stored[name], exact[name] = ("BF16", given), ("F32", given)
        if name.endswith("_proj.weight"):
            parts, values = quantised(torch.from_numpy(given), kind)
            del stored[name]
            dtypes = {np.uint8: "U8", np.int8: "I8", np.float32: "F32"}
            stored |= {
                name.removesuffix("weight") + end: (dtypes[part.dtype.type], part)
                for end, part in parts.items()
            }
            exact[name] = "F32", values
    settings = bitsandbytes(8 if kind == "int8" else 4, bnb_4bit_quant_type=kind.partition(" ")[0])
    if kind == "int8":
        settings["bnb_4bit_quant_type"] = "fp4"
    for directory, tensors, own in (
        ("model", stored, {"quantization_config": settings}),
        ("exact", exact, {"torch_dtype": "float32"}),
    ):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "config.json").write_text(json.dumps(config | own))
        write_checkpoint(tmp_path / directory, tensors)
    prompt = prompt_ids(config, 5)
    with Engine.open(tmp_path / "model", memory="4GiB", threads=2) as engine:
        logits = engine.logits(prompt)
    assert difference(logits, NumpyModel(tmp_path / "exact").logits(prompt)) <= LARGEST_DIFFERENCE
