"""A.X-K1: a norm of what layers with experts add, and a bias for the choice that files may lack."""

from __future__ import annotations

from pathlib import Path

import pytest

from argosy.cli.main import main
from argosy.errors import ArgosyError
from argosy.model.families import FAMILIES, open_model
from tests.models.safetensors_file import read_safetensors, write_safetensors
from tests.models.tiny import write_model
from tests.models.tiny_latent import axk1


@pytest.mark.parametrize("method", ["noaux_tc", None])
def test_the_tensors_tell_whether_the_choice_has_a_bias(tmp_path: Path, method: str | None) -> None:
    write_model(tmp_path / "model", axk1(topk_method=method), seed=0)
    config = open_model(tmp_path / "model").config
    assert config.router.has_choice_bias is (method is not None)
    assert main(["pack", str(tmp_path / "model"), str(tmp_path / "pack"), "--format", "source"]) == 0
    packed = open_model(tmp_path / "pack").config
    assert (packed.router, packed.has_moe_post_norm) == (config.router, True)


def test_the_norm_of_a_dense_layer_is_passed_over_and_that_of_another_layer_is_not(tmp_path: Path) -> None:
    write_model(tmp_path, axk1(), seed=0)
    path = tmp_path / "model.safetensors"
    tensors = {name: ("BF16", value) for name, value in read_safetensors(path).items()}
    del tensors["model.layers.0.post_mlp_layernorm.weight"]
    write_safetensors(path, tensors)
    assert open_model(tmp_path).config.has_moe_post_norm
    del tensors["model.layers.1.post_mlp_layernorm.weight"]
    write_safetensors(path, tensors)
    with pytest.raises(ArgosyError, match=r"layers\.1\.post_mlp_layernorm"):
        open_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"topk_method": "greedy"}, "topk_method 'greedy'; supported: noaux_tc"),
        ({"mlp_layer_types": ["dense"] * 3}, "expected 'dense' or 'sparse' for each of 3 layers"),
        ({"index_topk": 4}, "sets index_topk to 4, but axk1 does not know this key"),
    ],
)
def test_what_a_config_may_not_ask_for(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(ArgosyError) as refused:
        FAMILIES["axk1"].parse_config(axk1(**changes))
    assert sentence in str(refused.value)
