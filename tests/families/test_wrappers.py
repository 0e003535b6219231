"""Models that also see or hear: the text part is read, known other parts are ignored, and anything else is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy import Engine
from argosy.checkpoint.pack import pack
from argosy.config import AttentionConfig, LayerConfig, ModelConfig, RouterConfig
from argosy.errors import CheckpointError, UnsupportedModel
from argosy.model.families import FAMILIES, open_model
from argosy.model.reading.quantization import read_quantization
from tests.families.published import GLM_45V, QWEN3_OMNI, qwen3_vl_moe_of
from tests.models.gguf_models import one_type, write_gguf_model
from tests.models.numpy_model import NumpyModel
from tests.models.references import LARGEST_DIFFERENCE, difference
from tests.models.safetensors_file import Array, write_checkpoint
from tests.models.tiny import RawConfig, glm4_moe, prompt_ids, qwen3_moe, random_tensors, text_of
from tests.models.tiny_wrappers import glm4v_moe, qwen3_omni_moe, qwen3_vl_moe

MAKERS = (qwen3_vl_moe, qwen3_omni_moe, glm4v_moe)
every_wrapper = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)


def parse(raw: RawConfig) -> ModelConfig:
    return FAMILIES[raw["model_type"]].parse_config(raw)


def write(directory: Path, config: RawConfig, tensors: dict[str, Array]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    write_checkpoint(directory, {name: ("BF16", tensor) for name, tensor in tensors.items()})
    return directory


# ── config.json ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_config_of_qwen3_vl_is_read() -> None:
    config = parse(qwen3_vl_moe_of())

    assert config.layers == (LayerConfig(mixer=config.attention, is_moe=True),) * 48
    assert config.router == RouterConfig(renormalize=True)
    assert (
        config.hidden_size,
        config.attention.num_heads,
        config.attention.num_kv_heads,
        config.attention.head_dim,
    ) == (2048, 32, 4, 128)
    assert (config.num_experts, config.experts_per_token, config.expert_width) == (128, 8, 768)
    assert (config.attention.rope.theta, config.attention.rope.rotary_dim, config.attention.rope.kind) == (
        5e6,
        128,
        "default",
    )
    assert (config.attention.qk_norm, config.attention.has_qkv_bias, config.is_embedding_tied) == (
        "head",
        False,
        False,
    )
    assert (config.context_tokens, config.vocab_size) == (262_144, 151_936)
    assert (config.eos_ids, config.bos_id) == ((151_645,), 151_643)


def test_the_config_of_qwen3_omni_is_that_of_its_thinker() -> None:
    config = parse(QWEN3_OMNI)

    assert config.layers == (LayerConfig(mixer=config.attention, is_moe=True),) * 48
    assert (config.vocab_size, config.num_experts, config.expert_width) == (152_064, 128, 768)
    assert (
        config.attention.rope.theta,
        config.attention.rope.rotary_dim,
        config.attention.rope.is_interleaved,
    ) == (1e6, 128, False)
    assert config.eos_ids == (151_645,)  # not given, so the end of a turn
    assert parse(QWEN3_OMNI | {"im_end_token_id": 7}).eos_ids == (7,)
    thinker = QWEN3_OMNI["thinker_config"] | {"eos_token_id": [8, 9]}
    assert parse(QWEN3_OMNI | {"thinker_config": thinker}).eos_ids == (8, 9)


def test_the_config_of_glm_4_5v_is_read() -> None:
    config = parse(GLM_45V)

    assert {layer.mixer for layer in config.layers} == {config.attention}
    assert [layer.is_moe for layer in config.layers] == [False] + [True] * 45
    assert config.router == RouterConfig(
        score="sigmoid", has_choice_bias=True, renormalize=True, renormalize_eps=1e-20
    )
    assert (config.attention.rope.theta, config.attention.rope.rotary_dim, config.attention.head_dim) == (
        1e4,
        64,
        128,
    )
    assert (config.attention.has_qkv_bias, config.attention.has_o_bias, config.attention.qk_norm) == (
        True,
        False,
        "none",
    )
    assert (config.dense_width, config.expert_width, config.shared_width) == (10_944, 1408, 1408)
    assert config.eos_ids == (151_329, 151_336, 151_338)


def test_rotary_pairs_are_assigned_to_position_axes_as_in_transformers() -> None:
    """`apply_interleaved_mrope` of Qwen3-VL gives pair 3 i + a to axis a; GLM-4.5V gives an axis consecutive pairs."""
    taking_turns = [*((0, 1, 2) * 20), 0, 0, 0, 0]
    assert (
        parse(qwen3_vl_moe_of()).attention.rope.axes
        == parse(QWEN3_OMNI).attention.rope.axes
        == tuple(taking_turns)
    )
    assert parse(GLM_45V).attention.rope.axes == (0,) * 8 + (1,) * 12 + (2,) * 12

    def axes(make: Callable[..., RawConfig], *sections: int) -> tuple[int, ...]:
        rope = {"rope_type": "default", "mrope_section": list(sections)}
        return parse(make(head_dim=16, partial_rotary_factor=1.0, rope_scaling=rope)).attention.rope.axes

    def without_factor(**changes: Any) -> RawConfig:
        return qwen3_vl_moe(
            **{key: value for key, value in changes.items() if key != "partial_rotary_factor"}
        )

    assert axes(without_factor, 5, 1, 2) == (0, 1, 2, 0, 0, 2, 0, 0)
    assert axes(without_factor, 0, 9, 9) == (0, 1, 2, 0, 1, 2, 0, 1)  # more than the number of pairs
    assert axes(glm4v_moe, 5, 1, 2) == (0, 0, 0, 0, 0, 1, 2, 2)
    assert parse(qwen3_moe()).attention.rope.axes == ()


@every_wrapper
def test_the_wrapper_s_keys_override_the_text_config(make: Callable[..., RawConfig]) -> None:
    config = make(eos_token_id=7, bos_token_id=5)
    assert (parse(config).eos_ids, parse(config).bos_id, parse(config).is_embedding_tied) == ((7,), 5, False)
    said = {"eos_token_id": [8, 9], "bos_token_id": 6, "tie_word_embeddings": True}
    assert (parse(config | said).eos_ids, parse(config | said).bos_id) == ((8, 9), 6)
    assert parse(config | said).is_embedding_tied
    assert parse(config).family == make.__name__


def test_an_absent_key_has_the_default_of_the_config_class() -> None:
    def text(model_type: str, **keys: object) -> RawConfig:
        return {"text_config": {"model_type": model_type + "_text", **keys}}

    vl = parse({"model_type": "qwen3_vl_moe", **text("qwen3_vl_moe")})
    assert (vl.num_layers, vl.attention.num_heads, vl.attention.num_kv_heads, vl.attention.head_dim) == (
        24,
        16,
        16,
        128,
    )
    assert (vl.num_experts, vl.experts_per_token, vl.expert_width, vl.dense_width) == (60, 4, 1408, 5632)
    assert (vl.attention.rope.theta, vl.context_tokens, vl.router.renormalize) == (5e5, 128_000, True)

    thinker = {"model_type": "qwen3_omni_moe_thinker", **text("qwen3_omni_moe", head_dim=64)}
    omni = parse({"model_type": "qwen3_omni_moe", "thinker_config": thinker})
    assert (omni.num_layers, omni.attention.num_heads, omni.attention.num_kv_heads, omni.vocab_size) == (
        28,
        28,
        4,
        3584,
    )
    assert (omni.num_experts, omni.experts_per_token, omni.expert_width, omni.dense_width) == (
        128,
        8,
        768,
        18_944,
    )
    assert (omni.attention.rope.theta, omni.context_tokens, omni.router.renormalize) == (1e6, 32_768, True)
    assert omni.eos_ids == (151_645,)

    glm = parse({"model_type": "glm4v_moe", **text("glm4v_moe", head_dim=44)})
    assert (glm.num_layers, glm.attention.num_heads, glm.attention.num_kv_heads, glm.vocab_size) == (
        46,
        96,
        8,
        151_424,
    )
    assert (glm.attention.rope.theta, glm.attention.rope.rotary_dim, glm.context_tokens) == (1e4, 22, 65_536)
    assert (glm.attention.has_qkv_bias, glm.router.scale, glm.moe_layers[0]) == (True, 1.0, 1)


REFUSED: list[tuple[RawConfig, str]] = [
    (qwen3_vl_moe(norm_topk_prob=False), "text_config asks for norm_topk_prob false; supported: true"),
    (qwen3_vl_moe(layer_types=["sliding_attention"] * 3),
     "text_config asks for layer_types 'sliding_attention'; supported: full_attention"),
    (qwen3_vl_moe(use_sliding_window=True), "text_config asks for use_sliding_window true; supported: false"),
    (qwen3_vl_moe(model_type="qwen3_vl_text"),
     "text_config asks for model_type 'qwen3_vl_text'; supported: qwen3_vl_moe_text"),
    (qwen3_vl_moe(index_topk=4), "text_config sets index_topk to 4, but qwen3_vl_moe does not know this key"),
    (qwen3_vl_moe() | {"audio_config": {}}, "config.json sets audio_config to {}, but qwen3_vl_moe does not know"),
    (qwen3_omni_moe(sliding_window=8), "text_config asks for sliding_window 8; supported: null"),
    (qwen3_omni_moe(shared_expert_intermediate_size=8),
     "text_config asks for shared_expert_intermediate_size 8; supported: 0 or null"),
    (qwen3_omni_moe(use_qk_norm=False), "text_config asks for use_qk_norm false; supported: true"),
    (qwen3_omni_moe() | {"hearing_aid": 1}, "sets hearing_aid to 1, but qwen3_omni_moe does not know this key"),
    (qwen3_omni_moe() | {"thinker_config": None}, "thinker_config is null; expected an object"),
    (glm4v_moe(use_qk_norm=True), "text_config asks for use_qk_norm true; supported: false"),
    (glm4v_moe(scoring_func="softmax"), "text_config asks for scoring_func 'softmax'; supported: sigmoid"),
    (glm4v_moe(rope_scaling={"rope_type": "default", "mrope_sections": [3, 2, 2]}), "rope_scaling sets mrope_sections"),
    (qwen3_moe(rope_scaling={"rope_type": "default", "mrope_section": [3, 2, 2]}), "rope_scaling sets mrope_section"),
    (qwen3_vl_moe(rope_scaling={"rope_type": "default", "mrope_interleaved": False}),
     "rope_scaling asks for mrope_interleaved false; supported: true"),
    (glm4v_moe(rope_scaling={"rope_type": "default", "interleaved": True}),
     "rope_scaling asks for interleaved true; supported: false"),
    (glm4v_moe(rope_scaling={"rope_type": "default", "mrope_section": [3, 2, 3]}),
     "rope_scaling gives mrope_section [3, 2, 3], expected numbers that add up to 7"),
    (qwen3_vl_moe(rope_scaling={"rope_type": "default", "mrope_section": [3, 2]}),
     "rope_scaling gives mrope_section [3, 2], expected three whole numbers from 0"),
    (qwen3_vl_moe(rope_scaling={"rope_type": "default", "mrope_section": [3, 2, -1]}),
     "rope_scaling gives mrope_section [3, 2, -1], expected three whole numbers from 0"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "sentence"), REFUSED)
def test_unsupported_features_are_refused_by_name(config: RawConfig, sentence: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse(config)
    assert sentence in str(caught.value)


def test_quantization_config_is_found_in_every_part_about_text() -> None:
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    for raw in (
        {"quantization_config": fp8},
        {"text_config": {"quantization_config": fp8}},
        {"thinker_config": {"quantization_config": fp8}},
        {"thinker_config": {"text_config": {"quantization_config": fp8}}},
    ):
        found = read_quantization(raw)
        assert found is not None
        assert found.method == "fp8"
    twice = {"quantization_config": fp8, "thinker_config": {"quantization_config": {"quant_method": "mxfp4"}}}
    with pytest.raises(
        CheckpointError, match=r"two different values of quantization_config, one of them in thinker_config"
    ):
        read_quantization(twice)


# ── tensors ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@every_wrapper
def test_only_known_other_parts_are_ignored(make: Callable[..., RawConfig], tmp_path: Path) -> None:
    config = make()
    tensors = random_tensors(config, 3, "BF16")
    files = open_model(write(tmp_path, config, tensors))
    used = {ref.name for ref in files.dense.values()}
    others = [name for name in tensors if name not in used and ".experts." not in name]
    assert others
    assert all(
        name.startswith(("model.visual.", "thinker.visual.", "thinker.audio_tower.", "talker.", "code2wav."))
        for name in others
    )
    alone = open_model(write(tmp_path, config, {n: t for n, t in tensors.items() if n not in others}))
    assert (alone.config, alone.dense.keys()) == (files.config, files.dense.keys())
    assert (alone.dense_bytes, alone.expert_bytes) == (files.dense_bytes, files.expert_bytes)

    for name in ("model.vision.proj.weight", "visual.proj.weight", "speaker.proj.weight"):
        write(tmp_path, config, {**tensors, name: np.ones((4, 4), np.float32)})
        with pytest.raises(
            CheckpointError, match=rf"{name} \[4, 4\]: a {make.__name__} model with this config"
        ):
            open_model(tmp_path)


def test_a_multi_token_prediction_layer_is_ignored(tmp_path: Path) -> None:
    tensors = random_tensors(glm4v_moe(), 3, "BF16")
    extra = {"model.language_model.layers.3.eh_proj.weight": np.ones((4, 4), np.float32)}
    assert open_model(write(tmp_path, glm4v_moe(), tensors | extra)).config.num_mtp_layers == 1


def rows_together(tensors: dict[str, Array]) -> dict[str, Array]:
    """Store experts as transformers writes those of Qwen3-VL-MoE: [experts, 2 * width, hidden]."""
    is_expert = {name: name.endswith(("experts.gate_up_proj", "experts.down_proj")) for name in tensors}
    return {
        name: np.ascontiguousarray(tensor.swapaxes(1, 2)) if is_expert[name] else tensor
        for name, tensor in tensors.items()
    }


def one_by_one(tensors: dict[str, Array]) -> dict[str, Array]:
    """Store one tensor per expert matrix, as other tools may."""
    separate: dict[str, Array] = {}
    for name, tensor in rows_together(tensors).items():
        base, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for expert, (gate, up) in enumerate(np.split(one, 2) for one in tensor):
                separate[f"{base}.{expert}.gate_proj.weight"] = gate
                separate[f"{base}.{expert}.up_proj.weight"] = up
        elif last == "down_proj":
            separate |= {f"{base}.{expert}.down_proj.weight": one for expert, one in enumerate(tensor)}
        else:
            separate[name] = tensor
    return separate


def test_experts_of_qwen3_vl_are_the_same_in_every_layout(tmp_path: Path) -> None:
    config = qwen3_vl_moe()
    tensors = random_tensors(config, 3, "BF16")
    orders = {"hub": tensors, "together": rows_together(tensors), "separate": one_by_one(tensors)}
    packs, strided = [], []
    for name, stored in orders.items():
        files = open_model(write(tmp_path / name, config, stored))
        strided.append(files.has_strided_experts)
        pack(files, tmp_path / f"{name}-packed", format="source")
        packs.append((tmp_path / f"{name}-packed" / "experts.bin").read_bytes())
    assert strided == [True, False, False]
    assert packs == [packs[0]] * 3
    with pytest.raises(
        UnsupportedModel, match=r"keeps its experts transposed.*\n.*argosy pack .* --format source"
    ):
        Engine.open(tmp_path / "hub", memory="2GiB")


def test_experts_whose_shape_fits_both_layouts_are_refused(tmp_path: Path) -> None:
    config = qwen3_vl_moe(hidden_size=24, moe_intermediate_size=12)
    write(tmp_path, config, random_tensors(config, 3, "BF16"))
    with pytest.raises(
        UnsupportedModel,
        match=r"layers\.0\.mlp\.experts\.gate_up_proj is \[7, 24, 24\], which is also its shape transposed",
    ):
        open_model(tmp_path)
    one = one_by_one(random_tensors(config, 3, "BF16"))
    assert not open_model(write(tmp_path / "separate", config, one)).has_strided_experts


def test_experts_that_fit_no_layout_are_refused_with_the_hub_s_shape(tmp_path: Path) -> None:
    tensors = random_tensors(qwen3_vl_moe(), 3, "BF16")
    write(tmp_path, qwen3_vl_moe(moe_intermediate_size=10), tensors)
    with pytest.raises(CheckpointError, match=r"gate_up_proj is \[7, 36, 22\], expected \[7, 36, 20\]"):
        open_model(tmp_path)


def test_a_checkpoint_with_another_family_s_names_is_refused(tmp_path: Path) -> None:
    text = text_of(qwen3_vl_moe()) | {
        "model_type": "qwen3_moe",
        "rope_scaling": None,
        "tie_word_embeddings": False,
    }
    write(tmp_path, qwen3_vl_moe(), random_tensors(text, 3, "BF16"))
    with pytest.raises(CheckpointError, match=r"model\.language_model\.embed_tokens\.weight is missing"):
        open_model(tmp_path)


# ── GGUF ────────────────────────────────────────────────────────────────────────────────────────────────────────────

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "moe_intermediate_size": 32,
}
GGUFS = {
    "qwen3vlmoe": (qwen3_moe(**SIZES), (3, 3, 2), "qwen3_vl_moe"),
    "glm4moe": (glm4_moe(**SIZES, num_nextn_predict_layers=0), (2, 1, 1), "glm4_moe"),
}


# The axes take turns, the third only twice; or each axis has consecutive pairs.
GGUF_AXES = {"qwen3vlmoe": (0, 1, 2, 0, 1, 2, 0, 1), "glm4moe": (0, 0, 1, 2)}


@pytest.mark.parametrize("architecture", GGUFS)
def test_axis_sections_change_nothing_for_text(architecture: str, tmp_path: Path) -> None:
    config, sections, family = GGUFS[architecture]
    path = tmp_path / "model.gguf"
    reference = NumpyModel(write_gguf_model(path, config, one_type("F32"), seed=4, sections=sections))
    plain = tmp_path / "plain.gguf"
    write_gguf_model(plain, config, one_type("F32"), seed=4)
    found, without = open_model(path).config, open_model(plain).config
    assert found.attention.rope.axes == GGUF_AXES[architecture]
    rope = replace(without.attention.rope, axes=found.attention.rope.axes)
    assert found == replace(without.with_mixers(AttentionConfig, rope=rope), family=family)
    prompt = prompt_ids(config, 4)
    with Engine.open(path, memory="2GiB", threads=1) as engine:
        assert difference(engine.logits(prompt), reference.logits(prompt)) <= LARGEST_DIFFERENCE


def test_a_vision_tower_beside_a_gguf_is_not_taken_for_a_model(tmp_path: Path) -> None:
    config, sections, _ = GGUFS["qwen3vlmoe"]
    path = tmp_path / "Qwen3-VL.gguf"
    write_gguf_model(path, config, one_type("F32"), seed=4, sections=sections)
    (tmp_path / "mmproj-F16.gguf").write_bytes(b"GGUF")
    found = open_model(tmp_path)
    assert found.path == path
    assert isinstance(found.mmproj, CheckpointError)  # it ends after its magic
