"""Upcycling: the mixture at step 0 is the dense model, and its experts are ready to learn."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, RopeScalingType

from argosy.checkpoint.dense import open_dense
from argosy.checkpoint.upcycle import new_directory, upcycle
from argosy.errors import CheckpointError, UnsupportedModel, UsageError
from tests.checkpoint.dense_models import (
    NumpyDense,
    made_up_tensors,
    write_dense_directory,
    write_dense_gguf,
)
from tests.models.numpy_model import NumpyModel
from tests.models.safetensors_file import read_checkpoint, read_header

TOKEN_IDS = [3, 17, 40, 5, 5, 29, 1]
SIZES = {"num_experts": 4, "experts_per_token": 2, "width": 8}


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_at_step_zero_the_mixture_is_the_dense_model(dtype: str, tie: bool, tmp_path: Path):
    dense = write_dense_directory(tmp_path / "dense", dtype=dtype, tie_word_embeddings=tie)
    mixture = upcycle(dense, tmp_path / "mixture", **SIZES)
    expected, found = NumpyDense(dense).logits(TOKEN_IDS), NumpyModel(mixture).logits(TOKEN_IDS)
    # Both run in float64: 2 W x / 2 is W x, and zero experts add zero; only sums may differ in their last bit.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_a_gguf_gives_the_same_mixture_as_the_safetensors_of_the_same_model(tmp_path: Path):
    from_gguf = upcycle(write_dense_gguf(tmp_path / "dense.gguf"), tmp_path / "a", **SIZES)
    from_safetensors = upcycle(
        write_dense_directory(tmp_path / "dense", dtype="F32"), tmp_path / "b", **SIZES
    )
    expected, found = read_checkpoint(from_safetensors), read_checkpoint(from_gguf)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert np.array_equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("kind", "dtype"), [("F32", "F32"), ("F16", "F16"), ("BF16", "BF16"), ("Q8_0", "F32"), ("Q4_0", "F32")]
)
def test_every_value_of_a_gguf_is_kept(kind: str, dtype: str, tmp_path: Path):
    path = write_dense_gguf(tmp_path / "dense.gguf", matrices=GGMLQuantizationType[kind])
    dense, found = open_dense(path), read_checkpoint(upcycle(path, tmp_path / "mixture", **SIZES))
    assert dense.dtype == dtype
    assert json.loads((tmp_path / "mixture/config.json").read_text())["torch_dtype"].endswith(dtype[-2:])
    for name in dense.readers:
        factor = 2 if name.endswith("down_proj.weight") else 1
        place = name.replace(".mlp.", ".mlp.shared_expert.")
        assert np.array_equal(found[place], factor * dense.read(name)), name


def scaled(writer: GGUFWriter) -> None:
    writer.add_rope_scaling_type(RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)


def test_a_dense_model_that_does_not_exist_is_said_to_be_absent(tmp_path: Path):
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'none'} does not exist"):
        upcycle(tmp_path / "none", tmp_path / "mixture")


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (scaled, "llama.rope.scaling.factor is 4.0; supported: 1, 0"),
        (
            lambda writer: writer.add_rope_scaling_type(RopeScalingType.YARN),
            "llama.rope.scaling.type is yarn",
        ),
        (lambda writer: writer.add_float32("llama.rope.scale_linear", 2.0), "llama.rope.scale_linear is 2.0"),
        (lambda writer: writer.add_rope_dimension_count(4), "llama.rope.dimension_count is 4; supported: 8"),
        (lambda writer: writer.add_expert_count(8), "llama.expert_count is 8; supported: 0"),
    ],
)
def test_what_a_plain_llama_does_not_compute_is_refused_by_name(
    more: Callable[[GGUFWriter], None], sentence: str, tmp_path: Path
):
    path = write_dense_gguf(tmp_path / "dense.gguf", more=more)
    with pytest.raises(UnsupportedModel, match=re.escape(sentence)):
        upcycle(path, tmp_path / "mixture", **SIZES)


def test_a_scale_of_one_is_none(tmp_path: Path):
    def plain(writer: GGUFWriter) -> None:
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(1.0)
        writer.add_rope_dimension_count(8)

    assert open_dense(write_dense_gguf(tmp_path / "dense.gguf", more=plain)).config["hidden_size"] == 32


def test_each_expert_copies_dense_neurons_and_no_neuron_is_copied_twice(tmp_path: Path):
    dense = write_dense_directory(tmp_path / "dense")
    tensors = read_checkpoint(
        upcycle(dense, tmp_path / "mixture", num_experts=8, experts_per_token=2, width=8)
    )
    gate, up = (made_up_tensors()[f"model.layers.1.mlp.{part}_proj.weight"] for part in ("gate", "up"))
    copied: list[int] = []
    for expert in range(8):
        at = f"model.layers.1.mlp.experts.{expert}"
        for row, up_row in zip(
            tensors[f"{at}.gate_proj.weight"], tensors[f"{at}.up_proj.weight"], strict=True
        ):
            (neuron,) = np.flatnonzero((gate == row).all(axis=1))
            assert np.array_equal(up[neuron], up_row)
            copied.append(int(neuron))
        assert not tensors[f"{at}.down_proj.weight"].any()
    assert sorted(copied) == list(range(64))


def test_the_seed_decides_which_neurons_are_copied(tmp_path: Path):
    dense = write_dense_directory(tmp_path / "dense")
    name = "model.layers.0.mlp.experts.0.gate_proj.weight"
    same, again, other = (
        read_checkpoint(upcycle(dense, tmp_path / label, seed=seed, **SIZES))[name]
        for label, seed in (("same", 5), ("again", 5), ("other", 6))
    )
    assert np.array_equal(same, again)
    assert not np.array_equal(same, other)


def test_an_expert_s_three_matrices_are_adjacent_in_the_file(tmp_path: Path):
    mixture = upcycle(write_dense_directory(tmp_path / "dense"), tmp_path / "mixture", **SIZES)
    header, _ = read_header(mixture / "model.safetensors")
    names = sorted(header, key=lambda name: header[name]["data_offsets"])
    first = names.index("model.layers.0.mlp.experts.2.gate_proj.weight")
    parts = [name.split(".")[-2] for name in names[first : first + 3]]
    assert parts == ["gate_proj", "up_proj", "down_proj"]
    assert all(".experts.2." in name for name in names[first : first + 3])


def test_the_tokenizer_of_a_directory_is_copied_and_that_of_a_gguf_is_rebuilt(tmp_path: Path):
    from tokenizers import Tokenizer

    copied = upcycle(write_dense_directory(tmp_path / "dense"), tmp_path / "a", **SIZES)
    assert (copied / "tokenizer.json").read_text() == "{}"

    rebuilt = upcycle(write_dense_gguf(tmp_path / "dense.gguf"), tmp_path / "b", **SIZES)
    tokenizer = Tokenizer.from_file(str(rebuilt / "tokenizer.json"))
    encoded = tokenizer.encode("<|im_start|>the cat 12<|im_end|>")
    assert encoded.tokens == ["<|im_start|>", "the", "Ġ", "c", "a", "t", "Ġ", "1", "2", "<|im_end|>"]
    assert tokenizer.decode(encoded.ids) == "the cat 12"
    config = json.loads((rebuilt / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert "message['content']" in config["chat_template"]
    assert json.loads((rebuilt / "generation_config.json").read_text())["eos_token_id"] == 2


def test_progress_rises_from_zero_and_stays_below_one(tmp_path: Path):
    shares: list[float] = []
    dense = write_dense_directory(tmp_path / "dense")
    upcycle(dense, tmp_path / "mixture", **SIZES, progress=lambda _, share: shares.append(share))
    assert shares[0] == 0
    assert shares == sorted(shares)
    assert 0.9 < shares[-1] < 1


def test_an_existing_destination_is_left_unchanged(tmp_path: Path):
    (tmp_path / "mixture").mkdir()
    (tmp_path / "mixture" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="already exists"):
        upcycle(write_dense_directory(tmp_path / "dense"), tmp_path / "mixture", **SIZES)
    assert [path.name for path in (tmp_path / "mixture").iterdir()] == ["notes.txt"]


def test_a_failure_leaves_nothing_behind(tmp_path: Path):
    dense = write_dense_directory(tmp_path / "dense")

    def interrupt(_: str, share: float) -> None:
        if share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upcycle(dense, tmp_path / "out" / "mixture", **SIZES, progress=interrupt)
    assert list((tmp_path / "out").iterdir()) == []


def test_more_neurons_than_the_dense_model_has_are_refused_with_both_numbers(tmp_path: Path):
    dense = write_dense_directory(tmp_path / "dense")
    with pytest.raises(UsageError, match="need 72 distinct neurons, but the dense FFN has 64") as caught:
        upcycle(dense, tmp_path / "mixture", num_experts=9, experts_per_token=2, width=8)
    assert caught.value.hint == "use a width of at most 7"
    with pytest.raises(UsageError, match="5 experts per token is not possible with 4 experts"):
        upcycle(dense, tmp_path / "mixture", num_experts=4, experts_per_token=5, width=8)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "gemma"),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4}),
    ],
)
def test_a_flag_without_a_counterpart_is_refused_by_name(key: str, value: object, tmp_path: Path):
    with pytest.raises(UnsupportedModel, match=key):
        upcycle(write_dense_directory(tmp_path / "dense", **{key: value}), tmp_path / "mixture", **SIZES)


def test_a_gguf_of_another_architecture_or_tokenizer_is_refused_by_name(tmp_path: Path):
    with pytest.raises(UnsupportedModel, match="'gemma'; supported: llama"):
        upcycle(write_dense_gguf(tmp_path / "a.gguf", architecture="gemma"), tmp_path / "mixture", **SIZES)
    with pytest.raises(UnsupportedModel, match="'unheard-of'; supported: gpt-2"):
        upcycle(
            write_dense_gguf(tmp_path / "b.gguf", pre_tokenizer="unheard-of"), tmp_path / "mixture", **SIZES
        )


def test_a_missing_or_misshapen_tensor_is_named(tmp_path: Path):
    dense = write_dense_directory(tmp_path / "dense")
    (dense / "config.json").write_text(
        (dense / "config.json").read_text().replace('"intermediate_size": 64', '"intermediate_size": 60')
    )
    with pytest.raises(CheckpointError, match=r"gate_proj.weight is \[64, 32\], expected \[60, 32\]"):
        open_dense(dense)
    other = write_dense_directory(tmp_path / "other")
    (other / "config.json").write_text(
        (other / "config.json").read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    )
    with pytest.raises(CheckpointError, match=r"tensor model.layers.2.input_layernorm.weight is missing"):
        open_dense(other)


def test_a_file_that_is_not_gguf_is_refused(tmp_path: Path):
    (tmp_path / "dense.gguf").write_bytes(b"not a model at all" * 10)
    with pytest.raises(CheckpointError, match="starts with 'not '; a GGUF file starts with"):
        open_dense(tmp_path / "dense.gguf")


# A directory that appears only when it is complete


def test_leftovers_of_a_killed_process_for_the_same_directory_are_removed(tmp_path: Path):
    left, others = tmp_path / ".mixture.abcdefgh.partial", tmp_path / ".mixture.b.abcdefgh.partial"
    for path in (left, others):
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"half")
    with new_directory(tmp_path / "mixture") as scratch:
        (scratch / "file").write_bytes(b"whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [others.name, "mixture"]


def test_a_directory_that_another_process_is_writing_is_kept(tmp_path: Path):
    with new_directory(tmp_path / "mixture") as first:
        (first / "file").write_bytes(b"first")
        with new_directory(tmp_path / "mixture") as second:
            assert (first / "file").exists()
            (second / "file").write_bytes(b"second")
        shutil.rmtree(tmp_path / "mixture")
    assert (tmp_path / "mixture" / "file").read_bytes() == b"first"


def test_a_scratch_directory_removed_as_abandoned_is_created_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real, removed = fcntl.flock, []

    def flock(descriptor: int, how: int) -> None:
        if not removed:
            removed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
            os.rmdir(removed[0])
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with new_directory(tmp_path / "mixture") as scratch:
        (scratch / "file").write_bytes(b"whole")
    assert len(removed) == 1
    assert (tmp_path / "mixture" / "file").exists()
