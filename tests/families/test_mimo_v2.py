"""MiMo-V2.5: q, k and v of each rank in one FP8 tensor, towers that are ignored, and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from argosy import Engine
from argosy.checkpoint.landing import MatrixRef, read_landed
from argosy.cli.main import main
from argosy.config import ModelConfig
from argosy.errors import ArgosyError, CheckpointError, UnsupportedModel
from argosy.model.families import FAMILIES, open_model
from tests.families.published_windows import MIMO_V2_5, MIMO_V2_5_PRO
from tests.helpers.mixers import attentions, windows
from tests.models.gguf_models import one_type, write_gguf_model
from tests.models.hub_quantised import E4M3
from tests.models.references import LARGEST_DIFFERENCE, difference
from tests.models.safetensors_file import Array, read_checkpoint, write_checkpoint
from tests.models.tiny import RawConfig, prompt_ids, random_tensors
from tests.models.tiny_gqa import mimo_v2_flash

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}
# Of a rank, queries are whole blocks of 128 rows; keys and values share a block.
SIZES: dict[str, Any] = {
    "head_dim": 64,
    "hidden_size": 160,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.5,
    "v_head_dim": 40,
}


def mimo_v2(**changes: Any) -> RawConfig:
    """A config.json with the keys of MiMo-V2.5's."""
    return mimo_v2_flash(**SIZES) | {
        "architectures": ["MiMoV2ForCausalLM"],
        "attention_projection_layout": "fused_qkv",
        "audio_config": {"audio_channels": 20},
        "model_type": "mimo_v2",
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000000, "partial_rotary_factor": 0.5},
        "vision_config": {"depth": 28},
        **changes,
    }


def parse(raw: RawConfig) -> ModelConfig:
    return FAMILIES[raw["model_type"]].parse_config(raw)


def write(directory: Path, config: RawConfig, tensors: dict[str, tuple[str, Array]]) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    write_checkpoint(directory, tensors)
    return directory


def quantised(
    whole: list[Array], num_ranks: int, rng: np.random.Generator
) -> tuple[Array, Array, list[Array]]:
    """Return the codes of q, k and v rank by rank, their scales, and the three matrices that these mean."""
    ranks = [
        np.concatenate([part[rank] for part in (np.split(one, num_ranks) for one in whole)])
        for rank in range(num_ranks)
    ]
    codes, scales, values = [], [], []
    for rows in ranks:
        size = 1.5 * float(rows.std()) / float(E4M3[np.isfinite(E4M3)].std())
        codes.append(rng.choice(np.delete(np.arange(256, dtype=np.uint8), [0x7F, 0xFF]), rows.shape))
        grid = -(-rows.shape[0] // 128), -(-rows.shape[1] // 128)
        scales.append((size * rng.uniform(0.3, 1.0, grid)).astype(np.float32))
        spread = np.repeat(np.repeat(scales[-1], 128, 0), 128, 1)[: rows.shape[0], : rows.shape[1]]
        values.append(E4M3[codes[-1]] * spread)
    ends = np.cumsum([len(one) // num_ranks for one in whole])
    parts = [np.split(rank, ends[:-1]) for rank in values]
    exact = [np.concatenate([rank[number] for rank in parts]) for number in range(3)]
    return np.concatenate(codes), np.concatenate(scales), exact


def make_pair(root: Path, **changes: Any) -> tuple[Path, Path]:
    """Write a model with one FP8 tensor for q, k and v, and the same with three tensors of floats."""
    plain = mimo_v2_flash(**SIZES | changes)
    tensors = random_tensors(plain, 3, "F32")
    rng = np.random.default_rng(8)
    fused, split = {}, {}
    for name, values in tensors.items():
        if not name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            fused[name] = split[name] = ("F32", values)
        elif name.endswith("q_proj.weight"):
            names = [name.replace("q_proj", f"{part}_proj") for part in "qkv"]
            codes, scales, exact = quantised(
                [tensors[one] for one in names], plain["num_key_value_heads"], rng
            )
            joined = name.replace("q_proj", "qkv_proj")
            fused |= {joined: ("F8_E4M3", codes), f"{joined}_scale_inv": ("F32", scales)}
            split |= {
                one: ("F32", matrix.astype(np.float32)) for one, matrix in zip(names, exact, strict=True)
            }
    towers = {
        f"{of}.weight": ("F32", np.ones((2, 2), np.float32)) for of in ("visual", "audio_encoder.layers.0")
    }
    towers["model.mtp.layers.0.eh_proj.weight"] = ("F32", np.ones((2, 2), np.float32))
    own = {key: value for key, value in plain.items() if key not in ("architectures", "model_type")}
    config = mimo_v2(**own, quantization_config=FP8)
    return write(root / "fused", config, fused | towers), write(root / "split", plain, split)


def values_of(ref: MatrixRef) -> Array:
    """Return the values that a matrix has in memory."""
    raw = ref.path.read_bytes()
    landed = read_landed(ref, lambda piece: raw[piece.offset : piece.offset + piece.nbytes])
    return np.concatenate([rows for _, rows in ref.landing.values(ref, landed, 0, 1 << 20)])


def test_one_tensor_of_each_rank_s_q_k_and_v_is_the_same_model(tmp_path: Path) -> None:
    fused, split = make_pair(tmp_path)
    prompt, logits = prompt_ids(mimo_v2(), 5), []
    for place in (fused, split):
        with Engine.open(place, memory="4GiB", threads=1) as engine:
            logits.append(engine.logits(prompt))
    assert difference(logits[0], logits[1]) <= LARGEST_DIFFERENCE
    found, expected = open_model(fused).config, open_model(split).config
    assert found == replace(expected, family="mimo_v2")


def test_no_weight_of_it_changes(tmp_path: Path) -> None:
    fused, split = make_pair(tmp_path)
    dense, exact = open_model(fused).dense, read_checkpoint(split)
    assert {dense[f"layers.0.{part}"].format for part in "qkv"} == {"f8", "f8_32"}
    for name, ref in dense.items():
        layer, _, last = name.rpartition(".")
        if last not in ("q", "k", "v"):
            continue
        np.testing.assert_array_equal(values_of(ref), exact[f"model.{layer}.self_attn.{last}_proj.weight"])


def test_floats_are_all_queries_then_keys_then_values(tmp_path: Path) -> None:
    plain = mimo_v2_flash(**SIZES)
    tensors = random_tensors(plain, 3, "F32")
    joined = {
        name.replace("q_proj", "qkv_proj"): np.concatenate(
            [tensors[name.replace("q_proj", f"{p}_proj")] for p in "qkv"]
        )
        for name in tensors
        if name.endswith("q_proj.weight")
    }
    rest = {
        name: one
        for name, one in tensors.items()
        if not name.endswith(tuple(f"{p}_proj.weight" for p in "qkv"))
    }
    in_one, split = mimo_v2(), mimo_v2(attention_projection_layout="split")
    places = (
        write(tmp_path / "fused", in_one, {name: ("F32", one) for name, one in (rest | joined).items()}),
        write(tmp_path / "split", split, {name: ("F32", one) for name, one in tensors.items()}),
    )
    logits = []
    for place in places:
        with Engine.open(place, memory="4GiB", threads=1) as engine:
            logits.append(engine.logits(prompt_ids(plain, 5)))
    np.testing.assert_array_equal(*logits)


def drop_scales(codes: Array, scales: Array) -> dict[str, tuple[str, Array]]:
    return {"weight": ("F8_E4M3", codes), "weight_scale_inv": ("F32", scales[:-1])}


def bad_code(codes: Array, scales: Array) -> dict[str, tuple[str, Array]]:
    codes = codes.copy()
    codes[3, 7] = 0x7F
    return {"weight": ("F8_E4M3", codes), "weight_scale_inv": ("F32", scales)}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (drop_scales, r"qkv_proj.weight_scale_inv is \[5, 2\], expected \[6, 2\]"),
        (bad_code, "qkv_proj.weight: f8_codes data holds a code or scale that is not a finite number"),
    ],
)
def test_damaged_tensors_are_refused(change: Callable[..., Any], sentence: str, tmp_path: Path) -> None:
    fused, _ = make_pair(tmp_path)
    codes, scales = (
        np.asarray(read_checkpoint(fused)[f"model.layers.0.self_attn.qkv_proj.weight{end}"])
        for end in ("", "_scale_inv")
    )
    tensors = {
        name: ("F8_E4M3" if one.dtype == np.uint8 else "F32", one)
        for name, one in read_checkpoint(fused).items()
    }
    changed = {
        f"model.layers.0.self_attn.qkv_proj.{name}": one for name, one in change(codes, scales).items()
    }
    place = write(tmp_path / "damaged", mimo_v2(quantization_config=FP8), tensors | changed)
    with pytest.raises(ArgosyError, match=sentence), Engine.open(place, memory="4GiB", threads=1):
        pass


def test_the_released_configs_have_their_sizes() -> None:
    config = parse(MIMO_V2_5_PRO)
    full, sliding = attentions(config)[:2]
    assert (full.num_heads, full.num_kv_heads, sliding.num_kv_heads, full.value_scale) == (128, 8, 8, 0.612)
    assert (full.sliding_window, sliding.sliding_window, sliding.has_sinks) == (0, 129, True)
    assert windows(config).count(0) == 10
    assert full.rope is not None
    assert (full.rope.theta, full.rope.rotary_dim) == (1e7, 64)
    assert attentions(parse(MIMO_V2_5))[1].num_kv_heads == 8


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"attention_projection_layout": "other"},
            "attention_projection_layout 'other'; supported: split, fused_qkv",
        ),
        ({"attention_value_scale": None}, "does not give attention_value_scale"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5000000}},
            "gives rope_type yarn; supported: default",
        ),
        ({"rope_parameters": {"rope_theta": 10000}}, "gives rope_theta 10000; supported: 5000000"),
        ({"n_shared_experts": 1}, "n_shared_experts 1"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"odd": 1}, "sets odd to 1"),
        ({"quantization_config": FP8 | {"store_dtype": "mxfp4"}}, "store_dtype"),
    ],
)
def test_what_a_config_may_not_ask_for(changes: RawConfig, sentence: str) -> None:
    with pytest.raises((CheckpointError, UnsupportedModel)) as refused:
        parse(mimo_v2(**changes))
    assert sentence in str(refused.value)


def joined_gguf(path: Path, made: Path) -> None:
    """Copy a GGUF file in F32, with the rows of q, k and v of a layer in one tensor, as the converter writes them."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(made, "mimo2")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub_type)
    tensors = {one.name: one.data for one in reader.tensors}
    for name, data in tensors.items():
        if name.endswith("attn_q.weight"):
            rows = [tensors[name.replace("attn_q", f"attn_{part}")] for part in "qkv"]
            writer.add_tensor(name.replace("attn_q", "attn_qkv"), np.concatenate(rows))
        elif not name.endswith(("attn_k.weight", "attn_v.weight")):
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_its_gguf_files_have_q_k_and_v_in_one_tensor(tmp_path: Path) -> None:
    config, logits = mimo_v2_flash(**SIZES), []
    write_gguf_model(apart := tmp_path / "apart.gguf", config, one_type("F32"), seed=3)
    joined_gguf(apart, together := tmp_path / "together.gguf")
    for path in (apart, together):
        with Engine.open(path, memory="4GiB", threads=1) as engine:
            logits.append(engine.logits(prompt_ids(config, 5)))
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize(("pack_format", "largest"), [("source", LARGEST_DIFFERENCE), ("bf16", 0.02)])
def test_it_can_be_packed(pack_format: str, largest: float, tmp_path: Path) -> None:
    fused, _ = make_pair(tmp_path)
    packed = tmp_path / "packed"
    assert main(["pack", str(fused), str(packed), "--format", pack_format]) == 0
    logits = []
    for place in (fused, packed):
        with Engine.open(place, memory="4GiB", threads=1) as engine:
            logits.append(engine.logits(prompt_ids(mimo_v2(), 5)))
    assert difference(logits[1], logits[0]) <= largest
