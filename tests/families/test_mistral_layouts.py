"""The layouts of Mistral-Small-4 and Mistral-Large-3: the hub's, Mistral's own names, and FP8 in both."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy import Engine
from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import read_gguf
from argosy.checkpoint.safetensors import weight_files
from argosy.cli.main import main
from argosy.config import LatentConfig
from argosy.errors import ArgosyError
from argosy.model.encoders.mmproj import TowerInFile, read_towers
from argosy.model.families import FAMILIES, config_alone, open_model
from tests.families.hub_configs import MISTRAL_LARGE_3
from tests.families.test_open_model import expert_matrix
from tests.models.references import DIRECTORY as REFERENCE
from tests.models.references import LARGEST_DIFFERENCE, Reference, difference
from tests.models.safetensors_file import Array, read_safetensors, write_safetensors
from tests.models.seeing import REFERENCE as SEEING
from tests.models.tiny_latent import mistral4

# Mistral's names of the hub's.
OWN = {
    r"^model\.embed_tokens": "tok_embeddings", r"^lm_head": "output", r"^model\.": "",
    "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
    r"self_attn\.q_a_proj": "attention.wq_a", r"self_attn\.q_a_layernorm": "attention.q_a_norm",
    r"self_attn\.q_b_proj": "attention.wq_b", r"self_attn\.kv_a_proj_with_mqa": "attention.wkv_a_with_mqa",
    r"self_attn\.kv_a_layernorm": "attention.kv_a_norm", r"self_attn\.kv_b_proj": "attention.wkv_b",
    r"self_attn\.o_proj": "attention.wo", r"mlp\.gate\.": "gate.", r"mlp\.shared_experts": "shared_experts",
    r"mlp\.(\w+_proj)": r"feed_forward.\1", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2",
}  # fmt: skip


def params_of(raw: dict[str, Any]) -> dict[str, Any]:
    """The params.json of such a config."""
    rope = raw["rope_parameters"]
    return {
        "dim": raw["hidden_size"], "n_layers": raw["num_hidden_layers"], "n_heads": raw["num_attention_heads"],
        "n_kv_heads": raw["num_key_value_heads"], "head_dim": raw["qk_head_dim"],
        "hidden_dim": raw["intermediate_size"], "norm_eps": raw["rms_norm_eps"], "rope_theta": rope["rope_theta"],
        **{key: raw[key] for key in ("vocab_size", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "v_head_dim")},
        "qk_rope_head_dim": raw["qk_rope_head_dim"], "max_position_embeddings": raw["max_position_embeddings"],
        "moe": {
            "num_experts": raw["n_routed_experts"], "num_experts_per_tok": raw["num_experts_per_tok"],
            "expert_hidden_dim": raw["moe_intermediate_size"], "routed_scale": raw["routed_scaling_factor"],
            "first_k_dense_replace": raw["first_k_dense_replace"], "num_shared_experts": raw["n_shared_experts"],
            "num_expert_groups": 1, "num_expert_groups_per_tok": 1, "route_every_n": 1,
        },
        "yarn": {
            "alpha": 1, "apply_scale": False, "beta": 32, "factor": rope["factor"],
            "original_max_position_embeddings": rope["original_max_position_embeddings"],
        },
        "llama_4_scaling": {
            "beta": rope["llama_4_scaling_beta"],
            "original_max_position_embeddings": rope["original_max_position_embeddings"],
        },
    }  # fmt: skip


def in_own_names(tensors: dict[str, Array]) -> dict[str, Array]:
    found: dict[str, Array] = {}
    for name, value in tensors.items():
        own = name
        for pattern, theirs in OWN.items():
            own = re.sub(pattern, theirs, own)
        if match := re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up|down)_proj", name):
            for expert, matrix in enumerate(value):
                halves = np.split(matrix, 2) if match[2] == "gate_up" else [matrix]
                for part, half in zip(
                    ("w1", "w3") if match[2] == "gate_up" else ("w2",), halves, strict=True
                ):
                    found[f"layers.{match[1]}.experts.{expert}.{part}.weight"] = half
        else:
            found[own] = value
    return found


def dense_values(files: ModelFiles) -> dict[str, bytes]:
    return {
        name: ref.path.read_bytes()[ref.offset : ref.offset + ref.nbytes] for name, ref in files.dense.items()
    }


def write_own_files(directory: Path) -> None:
    tensors = in_own_names(read_safetensors(REFERENCE / "mistral4_plain" / "model.safetensors"))
    tensors["vision_encoder.patch_conv.weight"] = np.zeros((2, 3), np.float32)
    write_safetensors(
        directory / "consolidated.safetensors", {name: ("BF16", value) for name, value in tensors.items()}
    )
    (directory / "params.json").write_text(json.dumps(params_of(mistral4(num_hidden_layers=2))))


def test_mistrals_own_files_are_the_same_model(tmp_path: Path) -> None:
    hub = open_model(REFERENCE / "mistral4_plain")
    write_own_files(tmp_path)
    own = open_model(tmp_path)
    assert own.config == hub.config
    assert dense_values(own) == dense_values(hub)
    for layer, expert in hub.experts:
        for part in ("gate", "up", "down"):
            assert np.array_equal(
                expert_matrix(own, layer, expert, part), expert_matrix(hub, layer, expert, part)
            )
    assert list(own.others) == ["vision_encoder.patch_conv.weight"]


def test_a_config_json_may_be_beside_mistrals_own_files(tmp_path: Path) -> None:
    write_own_files(tmp_path)
    (tmp_path / "params.json").unlink()
    (tmp_path / "config.json").write_text((REFERENCE / "mistral4_plain" / "config.json").read_text())
    assert open_model(tmp_path).config == open_model(REFERENCE / "mistral4_plain").config


def test_a_pack_of_mistrals_own_files_is_the_same_model(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    write_own_files(tmp_path / "model")
    assert main(["pack", str(tmp_path / "model"), str(tmp_path / "pack"), "--format", "source"]) == 0
    packed, own = open_model(tmp_path / "pack").config, open_model(tmp_path / "model").config
    assert packed.with_mixers(LatentConfig, is_up_split=False) == own


@pytest.mark.parametrize("count", [1, 3])
def test_mistrals_own_files_are_found_among_others(count: int) -> None:
    own = [f"consolidated-0000{number}-of-0000{count}.safetensors" for number in range(1, count + 1)]
    assert weight_files([*own, "params.json"]) == (own, "consolidated.safetensors.index.json")
    assert weight_files([*own, "model.safetensors"]) == (
        ["model.safetensors"],
        "model.safetensors.index.json",
    )
    assert weight_files(["consolidated.safetensors"])[0] == ["consolidated.safetensors"]
    assert weight_files(["adapter-00001-of-00001.safetensors"]) == ([], "model.safetensors.index.json")


def test_a_params_json_alone_describes_the_model(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(json.dumps(MISTRAL_LARGE_3))
    config = config_alone(tmp_path)
    assert config is not None
    assert config == config_alone(tmp_path / "params.json")
    assert (config.num_layers, config.num_experts, config.latent and config.latent.scale) == (61, 128, 0.0)


def fp8(values: dict[str, Array], is_quantised: Any) -> dict[str, tuple[str, Array]]:
    """Tensors in E4M3 with nonsense values, where `is_quantised`, and the rest in BF16."""
    rng = np.random.default_rng(0)
    return {
        name: ("F8_E4M3", rng.integers(1, 100, value.shape, np.uint8))
        if is_quantised(name)
        else ("BF16", value)
        for name, value in values.items()
    }


SIZES = {"hidden_size": 32, "moe_intermediate_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}


@pytest.mark.parametrize("is_own", [True, False])
def test_fp8_with_one_scale_a_matrix_is_read(tmp_path: Path, is_own: bool) -> None:
    from tests.models.tiny import random_tensors

    raw = mistral4(**SIZES)
    values = random_tensors(raw, 0, "BF16")
    scale = np.array(0.5, np.float32)
    if is_own:
        values = in_own_names(values)
        tensors = fp8(values, lambda name: ".w" in name and "norm" not in name)
        for name in [name for name, (dtype, _) in tensors.items() if dtype != "BF16"]:
            module = name.removesuffix("weight")
            tensors |= {f"{module}qscale_weight": ("F32", scale), f"{module}qscale_act": ("F32", scale)}
        quantization = {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}
        (tmp_path / "params.json").write_text(json.dumps(params_of(raw) | {"quantization": quantization}))
        write_safetensors(tmp_path / "consolidated.safetensors", tensors)
    else:
        tensors = fp8(values, lambda name: "experts." in name or "_proj" in name)
        scales = np.full(raw["n_routed_experts"], 0.5, np.float32)
        for name in [name for name, (dtype, _) in tensors.items() if dtype != "BF16"]:
            if name.endswith("_proj"):
                tensors |= {f"{name}_scale_inv": ("F32", scales), f"{name}_activation_scale": ("F32", scales)}
            else:
                module = name.removesuffix("weight")
                tensors |= {
                    f"{module}weight_scale_inv": ("F32", scale),
                    f"{module}activation_scale": ("F32", scale),
                }
        settings = {"activation_scheme": "static", "quant_method": "fp8", "weight_block_size": None}
        (tmp_path / "config.json").write_text(json.dumps(raw | {"quantization_config": settings}))
        write_safetensors(tmp_path / "model.safetensors", tensors)
    files = open_model(tmp_path)
    assert {files.dense[f"layers.0.{name}"].format for name in ("q_up", "o", "gate")} == {"f8"}
    assert {record.gate.format for record in files.experts.values()} == {"f8"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sliding_window": 4096}, "sliding_window 4096; supported: null"),
        ({"attention_bias": True}, "attention_bias true; supported: false"),
        ({"scoring_func": "sigmoid"}, "sets scoring_func to 'sigmoid', but mistral4 does not know"),
        (
            {"rope_parameters": mistral4()["rope_parameters"] | {"partial_rotary_factor": 0.5}},
            "supported: 0.375",
        ),
        ({"rope_parameters": mistral4()["rope_parameters"] | {"llama_5": 1}}, "rope_parameters sets llama_5"),
        ({"n_group": 4}, "6 experts in 4 groups"),
    ],
)
def test_what_a_config_may_not_ask_for(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ArgosyError) as refused:
        FAMILIES["mistral4"].parse_config(mistral4(**changes))
    assert sentence in str(refused.value)


def write_own_dense_files(directory: Path, raw: dict[str, Any], tensors: dict[str, Array]) -> None:
    """A model without experts as Mistral stores it: pairs of rotary dimensions are adjacent rows of wq and wk."""
    head_dim = raw["head_dim"]
    own = {}
    for name, value in in_own_names(tensors).items():
        own_name = re.sub(r"self_attn\.([qkv])_proj", r"attention.w\1", name)
        is_rotated = re.search(r"attention\.w[qk]\.", own_name)
        halves = value.reshape(-1, 2, head_dim // 2, value.shape[1]) if is_rotated else value
        own[own_name] = "BF16", halves.swapaxes(1, 2).reshape(value.shape) if is_rotated else value
    write_safetensors(directory / "consolidated.safetensors", own)
    rope = raw.get("rope_parameters")
    params = {
        "dim": raw["hidden_size"], "n_layers": raw["num_hidden_layers"], "head_dim": head_dim,
        "hidden_dim": raw["intermediate_size"], "n_heads": raw["num_attention_heads"],
        "n_kv_heads": raw["num_key_value_heads"], "norm_eps": raw["rms_norm_eps"], "vocab_size": raw["vocab_size"],
        "rope_theta": (rope or raw)["rope_theta"], "max_seq_len": raw["max_position_embeddings"],
    }  # fmt: skip
    if rope:
        original = rope["original_max_position_embeddings"]
        params["yarn"] = {"alpha": 1, "apply_scale": False, "beta": 32, "factor": rope["factor"]}
        params["yarn"]["original_max_position_embeddings"] = original
        params["llama_4_scaling"] = {
            "beta": rope["llama_4_scaling_beta"],
            "original_max_position_embeddings": original,
        }
    (directory / "params.json").write_text(json.dumps(params))


@pytest.mark.parametrize("name", ["mistral_plain", "ministral3_plain"])
def test_mistrals_own_files_without_experts_answer_as_those_of_the_hub(name: str, tmp_path: Path) -> None:
    reference = Reference(REFERENCE / name)
    raw = json.loads((reference.directory / "config.json").read_text())
    write_own_dense_files(tmp_path, raw, read_safetensors(reference.directory / "model.safetensors"))
    with Engine.open(tmp_path, memory="4GiB", kv_dtype="f32", threads=1) as engine:
        assert difference(engine.logits(reference.input_ids), reference.logits) <= LARGEST_DIFFERENCE


def test_a_params_json_without_experts_may_leave_its_context_out(tmp_path: Path) -> None:
    sizes = {
        "dim": 5120,
        "n_layers": 40,
        "head_dim": 128,
        "hidden_dim": 32_768,
        "n_heads": 32,
        "n_kv_heads": 8,
    }
    more = {"norm_eps": 1e-5, "vocab_size": 131_072, "rope_theta": 1e9}
    (tmp_path / "params.json").write_text(json.dumps(sizes | more))
    config = config_alone(tmp_path)
    assert config is not None
    assert (config.context_tokens, config.attention.rope and config.attention.rope.is_interleaved) == (
        128_000,
        True,
    )
    assert config.attention.query_scale is None


@pytest.mark.parametrize("family", ["mistral4", "ministral3", "llama"])
def test_the_tower_of_a_gguf_belongs_to_every_kind_of_mistral(family: str) -> None:
    directory = SEEING / "mistral3" / "gguf"
    config = replace(open_model(directory / "model.gguf").config, family=family)
    tower = read_towers(read_gguf(directory / "mmproj-model.gguf"), config)["picture"]
    assert isinstance(tower, TowerInFile)
    assert tower.config.out_size == config.hidden_size


def test_an_absent_rope_is_that_of_the_released_model() -> None:
    raw = {key: value for key, value in mistral4().items() if key != "rope_parameters"}
    latent = FAMILIES["mistral4"].parse_config(raw | {"max_position_embeddings": 1_048_576}).latent
    assert latent is not None
    assert latent.query_scale is not None
    assert (latent.rope.factor, latent.query_scale.beta, latent.query_scale.period) == (128.0, 0.1, 8192)
