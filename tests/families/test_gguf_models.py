"""The metadata and tensors of a GGUF mean what they should, and none goes unnoticed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, RopeScalingType

from argosy.checkpoint.gguf import metadata_only
from argosy.checkpoint.landing import AS_STORED, PairedRows, Transcode, Transcoded
from argosy.config import ModelConfig, RopeConfig, RouterConfig
from argosy.errors import CheckpointError, UnsupportedModel
from argosy.model.families import open_model
from argosy.model.rope import inverse_frequency
from tests.models import gguf_models
from tests.models.gguf_models import mixed, one_type, write_gguf_model
from tests.models.tiny import RawConfig, glm4_moe, minimax_m2, mixtral, olmoe, qwen2_moe, qwen3_moe

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2}
CONFIGS: dict[str, RawConfig] = {
    "llama": mixtral(**SIZES, intermediate_size=32),
    "qwen2moe": qwen2_moe(**SIZES, moe_intermediate_size=32, shared_expert_intermediate_size=64),
    "qwen3moe": qwen3_moe(**SIZES, moe_intermediate_size=32),
    "glm4moe": glm4_moe(
        **SIZES,
        moe_intermediate_size=32,
        intermediate_size=64,
        num_nextn_predict_layers=0,
        n_group=3,
        topk_group=2,
        routed_scaling_factor=2.5,
        head_dim=16,
    ),
    "olmoe": olmoe(**SIZES, intermediate_size=32),
    "minimax-m2": minimax_m2(**SIZES, intermediate_size=32, head_dim=16),
}

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a model, with metadata and tensors added or removed by the test."""

    def write(
        architecture: str,
        *,
        extra: Callable[[GGUFWriter], object] = lambda writer: None,
        without: str | None = None,
        tensors: dict[str, np.ndarray[Any, Any]] | None = None,
        type_name: str = "Q8_0",
        **changes: Any,
    ) -> Path:
        plain = gguf_models.add_metadata

        def add_metadata(writer: GGUFWriter, config: RawConfig) -> None:
            plain(writer, config)
            if without is not None:
                del writer.kv_data[0][f"{architecture}.{without}"]
            extra(writer)
            for name, values in (tensors or {}).items():
                writer.add_tensor(name, values)

        monkeypatch.setattr(gguf_models, "add_metadata", add_metadata)
        path = tmp_path / "model.gguf"
        write_gguf_model(path, CONFIGS[architecture] | changes, one_type(type_name), seed=1)
        monkeypatch.setattr(gguf_models, "add_metadata", plain)
        return path

    return write


def hub_config(path: Path) -> ModelConfig:
    """The config of the same model, read from its config.json."""
    return open_model(path.with_name(path.name + ".f32")).config


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("is_tied", [False, True])
def test_metadata_means_the_same_as_config_json(architecture: str, is_tied: bool, write: Write) -> None:
    path = write(architecture, tie_word_embeddings=is_tied)
    # A GGUF keeps no width of layers without routed experts if there are none. It has no key for renormalisation:
    # qwen3moe always renormalises, and qwen2moe never does.
    assert replace(open_model(path).config, dense_width=0) == replace(hub_config(path), dense_width=0)


def test_a_directory_with_one_gguf_opens_as_that_gguf(write: Write, tmp_path: Path) -> None:
    path = write("qwen3moe")
    (tmp_path / "config.json").write_text("{}")  # GGUF repositories have one
    assert open_model(tmp_path) == open_model(path)
    (tmp_path / "other.gguf").write_bytes(path.read_bytes())
    with pytest.raises(
        CheckpointError,
        match=r"holds 2 models as \.gguf files: model\.gguf, other\.gguf\nhint: give one of them",
    ):
        open_model(tmp_path)


def test_experts_are_slices_of_the_stacked_tensors(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    config = qwen3_moe(hidden_size=256, head_dim=64, moe_intermediate_size=256, num_experts=3)
    write_gguf_model(path, config, mixed, seed=1)
    files = open_model(path)
    assert files.expert_formats(0) == ("q4_k", "q4_k", "q6_k")
    assert files.expert_formats(1) == ("q4_k", "q4_k", "q5_0")
    assert files.expert_format == "q4_k+q6_k+q5_0"
    first, second = files.experts[0, 0], files.experts[0, 1]
    assert [piece.transcode for piece in first.pieces] == [
        Transcode("Q4_K", "q4_k", 256, 256), Transcode("Q4_K", "q4_k", 256, 256), Transcode("Q6_K", "q6_k", 256, 256)
    ]  # fmt: skip
    assert [b.offset - a.offset for a, b in zip(first.pieces, second.pieces, strict=True)] == [
        256 * 144, 256 * 144, 256 * 210
    ]  # fmt: skip
    assert files.dense["layers.0.v"].landing == Transcoded("Q6_K")
    assert files.dense["final_norm"].landing is AS_STORED


def test_only_llama_has_paired_rows(write: Write) -> None:
    for architecture in CONFIGS:
        files = open_model(write(architecture))
        config = files.config
        for name, num_heads in (("q", config.attention.num_heads), ("k", config.attention.num_kv_heads)):
            landing = files.dense[f"layers.0.{name}"].landing
            assert isinstance(landing, PairedRows) == (architecture == "llama")
            assert not isinstance(landing, PairedRows) or landing.num_heads == num_heads
        assert not isinstance(files.dense["layers.0.v"].landing, PairedRows)
        files.path.unlink()
        _remove(files.path.with_name(files.path.name + ".f32"))


def _remove(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()


def test_routing_keys_are_read(write: Write) -> None:
    path = write("qwen3moe", extra=lambda writer: writer.add_expert_weights_norm(False))
    assert open_model(path).config.router == RouterConfig(renormalize=False)


def test_an_id_that_means_none_gives_no_token(write: Write) -> None:
    def name_none(writer: GGUFWriter) -> None:
        writer.add_eot_token_id(2**32 - 1)
        writer.kv_data[0]["tokenizer.ggml.bos_token_id"].value = 2**32 - 1

    config = open_model(write("qwen3moe", extra=name_none)).config
    assert (config.eos_ids, config.bos_id) == ((2,), None)


def test_multi_token_prediction_layers_are_counted_and_ignored(write: Write) -> None:
    tensors = {f"blk.2.nextn.{name}.weight": np.ones(4, np.float32) for name in ("eh_proj", "enorm", "hnorm")}
    tensors["blk.2.attn_norm.weight"] = np.ones(32, np.float32)

    def one_more(writer: GGUFWriter) -> None:
        writer.kv_data[0]["glm4moe.block_count"].value = 3
        writer.kv_data[0]["glm4moe.nextn_predict_layers"].value = 1

    files = open_model(write("glm4moe", extra=one_more, tensors=tensors))
    assert (files.config.num_layers, files.config.num_mtp_layers) == (2, 1)
    assert not any(name.startswith("layers.2") for name in files.dense)


def test_tensors_decide_whether_a_glm_has_biases_and_norms(write: Write, tmp_path: Path) -> None:
    for has_bias, has_norm in ((True, False), (False, True)):
        path = write("glm4moe", attention_bias=has_bias, use_qk_norm=has_norm, norm_topk_prob=has_norm)
        config = open_model(path).config
        assert (config.attention.has_qkv_bias, config.attention.qk_norm) == (
            has_bias,
            "head" if has_norm else "none",
        )
        assert config.router == hub_config(path).router
        _again(tmp_path)


ROPES: dict[str, tuple[Callable[[GGUFWriter], object], RopeConfig]] = {
    "linear": (
        lambda w: (w.add_rope_scaling_type(RopeScalingType.LINEAR), w.add_rope_scaling_factor(4.0)),
        RopeConfig(theta=1e6, rotary_dim=16, kind="linear", factor=4.0, original_context=128),
    ),
    "yarn": (
        lambda w: (
            w.add_rope_scaling_type(RopeScalingType.YARN),
            w.add_rope_scaling_factor(2.0),
            w.add_rope_scaling_orig_ctx_len(64),
        ),
        RopeConfig(theta=1e6, rotary_dim=16, kind="yarn", factor=2.0, original_context=64),
    ),
    "none": (
        lambda w: w.add_rope_scaling_type(RopeScalingType.NONE),
        RopeConfig(theta=1e6, rotary_dim=16, original_context=128),
    ),
}


@pytest.mark.parametrize("kind", ROPES)
def test_rope_scaling_is_read(kind: str, write: Write) -> None:
    extra, expected = ROPES[kind]
    path = write("qwen3moe", extra=extra)
    assert open_model(path).config.attention.rope == expected


def test_frequency_factors_divide_the_frequencies(write: Write) -> None:
    factors = np.array([1.0, 2.0, 4.0, 8.0], np.float32)
    config = open_model(write("llama", tensors={"rope_freqs.weight": factors})).config
    assert config.attention.rope.frequency_factors == (1.0, 2.0, 4.0, 8.0)
    plain = inverse_frequency(replace(config.attention.rope, frequency_factors=()))
    np.testing.assert_array_equal(inverse_frequency(config.attention.rope), plain / factors)


REFUSED: dict[str, tuple[str, Callable[[GGUFWriter], object]]] = {
    r"asks for glm4moe\.expert_gating_func 1; supported: 0 or 2": (
        "glm4moe", lambda w: w.kv_data[0]["glm4moe.expert_gating_func"].__setattr__("value", 1)),
    r"asks for minimax-m2\.expert_gating_func 1; supported: 0 or 2": (
        "minimax-m2", lambda w: w.kv_data[0]["minimax-m2.expert_gating_func"].__setattr__("value", 1)),
    r"asks for olmoe\.attention\.clamp_kqv 8\.0; supported: 0\.0": ("olmoe", lambda w: w.add_clamp_kqv(8.0)),
    r"asks for olmoe\.rope\.dimension_count 4; supported: 8, the whole head": (
        "olmoe", lambda w: w.kv_data[0]["olmoe.rope.dimension_count"].__setattr__("value", 4)),
    r"sets qwen3moe\.attention\.clamp_kqv to '8\.0', but qwen3moe does not know this key": (
        "qwen3moe", lambda w: w.add_clamp_kqv(8.0)),
    r"asks for qwen3moe\.expert_gating_func 2; supported: 0 or 1": (
        "qwen3moe", lambda w: w.add_uint32("qwen3moe.expert_gating_func", 2)),
    r"asks for qwen3moe\.expert_weights_scale 2\.5; supported": (
        "qwen3moe", lambda w: w.add_expert_weights_scale(2.5)),
    r"asks for qwen3moe\.expert_weights_scale True; supported: 0\.0 or 1\.0": (
        "qwen3moe", lambda w: w.add_bool("qwen3moe.expert_weights_scale", True)),
    r"asks for qwen3moe\.leading_dense_block_count 1; supported: 0": (
        "qwen3moe", lambda w: w.add_leading_dense_block_count(1)),
    r"asks for qwen3moe\.rope\.scaling\.type longrope; supported: none, linear, yarn": (
        "qwen3moe", lambda w: w.add_string("qwen3moe.rope.scaling.type", "longrope")),
    r"asks for qwen2moe\.attention\.sliding_window 32; supported: 0": (
        "qwen2moe", lambda w: w.add_sliding_window(32)),
    r"is a GGUF of type 'adapter', changes .*; supported: model": ("llama", lambda w: w.add_type("adapter")),
    r"is a GGUF of type 'imatrix', measurements .*; supported: model": ("llama", lambda w: w.add_type("imatrix")),
    r"is a GGUF of type 'mmproj', the part .*; supported: model": ("llama", lambda w: w.add_type("mmproj")),
    r"is a GGUF of type 'other'; supported: model": ("llama", lambda w: w.add_type("other")),
}  # fmt: skip


@pytest.mark.parametrize("sentence", REFUSED)
def test_unsupported_mathematics_is_refused_by_name(sentence: str, write: Write) -> None:
    architecture, extra = REFUSED[sentence]
    with pytest.raises(UnsupportedModel, match=sentence):
        open_model(write(architecture, extra=extra))


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "other.gguf", "jamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(
        UnsupportedModel, match=r"has architecture 'jamba'; supported: qwen3, qwen2, .*gemma3, qwen2moe"
    ):
        open_model(tmp_path / "other.gguf")


def test_a_file_with_a_vocabulary_alone_is_refused(write: Write, tmp_path: Path) -> None:
    bare = tmp_path / "vocabulary.gguf"
    bare.write_bytes(metadata_only(write("qwen3moe")))
    with pytest.raises(CheckpointError, match=r"vocabulary\.gguf has no tensors: it holds a vocabulary"):
        open_model(bare)


def test_a_missing_unexpected_or_misshapen_tensor_is_named(write: Write, tmp_path: Path) -> None:
    odd = {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}
    with pytest.raises(
        CheckpointError, match=r"blk\.0\.attn_sinks\.weight \[4\]: a qwen3_moe model with these"
    ):
        open_model(write("qwen3moe", tensors=odd))
    _again(tmp_path)
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight \[8\]: a qwen3_moe model"):
        open_model(write("qwen3moe", tensors={"rope_freqs.weight": np.ones(8, np.float32)}))
    _again(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"blk\.2\.attn_norm\.weight is missing from the \d+ tensors in"
    ):
        open_model(write("qwen3moe", extra=lambda w: w.kv_data[0].update(_more_layers(w))))
    _again(tmp_path)
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight is \[3\], expected \[4\]"):
        open_model(write("llama", tensors={"rope_freqs.weight": np.ones(3, np.float32)}))


def _again(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").unlink()
    _remove(tmp_path / "model.gguf.f32")


def _more_layers(writer: GGUFWriter) -> dict[str, Any]:
    writer.kv_data[0]["qwen3moe.block_count"].value = 3
    return {}


def test_a_type_without_a_kernel_is_refused_by_name(write: Write) -> None:
    path = write("qwen3moe", type_name="F16")
    raw = path.read_bytes()
    name = b"token_embd.weight"
    at = raw.index(name) + len(name) + 4 + 2 * 8  # behind the number of sizes and two sizes
    assert raw[at : at + 4] == GGMLQuantizationType.F16.to_bytes(4, "little")
    path.write_bytes(raw[:at] + GGMLQuantizationType.I16.to_bytes(4, "little") + raw[at + 4 :])
    with pytest.raises(UnsupportedModel, match=r"token_embd\.weight is I16; supported: F32, F16, BF16, Q8_0"):
        open_model(path)


def test_a_missing_key_is_named(write: Write) -> None:
    with pytest.raises(CheckpointError, match=r"model\.gguf has no key qwen3moe\.expert_feed_forward_length"):
        open_model(write("qwen3moe", without="expert_feed_forward_length"))
