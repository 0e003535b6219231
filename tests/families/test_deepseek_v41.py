"""DeepSeek-V4.1: the meaning of the config, refusals, logits against float64, and equal bits in every setting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy import Engine, SamplingParams, _native
from argosy.checkpoint.pack import pack
from argosy.config import CandidateConfig, CompressedConfig, ModelConfig, SinkhornResidual
from argosy.errors import ArgosyError, ReadFailed
from argosy.model.encoders.table import ENCODERS
from argosy.model.families import FAMILIES, open_model
from argosy.model.layers import kv_shapes, state_shapes
from argosy.model.reading.config_reader import ConfigReader
from tests.engine.test_gguf import LARGEST_DIVERGENCE
from tests.families.published_sparse import DEEPSEEK_V4_1_FLASH
from tests.models.numpy_deepseek_v41 import DeepseekV41, engram_rows
from tests.models.references import LARGEST_DIFFERENCE, difference, mean_divergence
from tests.models.safetensors_file import Array, read_header, write_safetensors
from tests.models.tiny_deepseek_v41 import deepseek_v41, folded, write_deepseek_v41

# Codes have scales for 32 columns.
WHOLE_GROUPS: dict[str, Any] = {
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "head_dim": 32,
    "q_lora_rank": 32,
    "o_lora_rank": 16,
    "engram_head_dim": 32,
    "index_n_heads": 7,
}
NO_TABLES: dict[str, Any] = {"engram_layer_ids": []}
# Ratios 4 and 1, an indexer without keys of its own, and layers that see only their window between those that share.
MIXED: dict[str, Any] = {
    "num_hidden_layers": 7,
    "compress_ratios": [0, 4, 0, 4, 1, 0, 1],
    "kv_source_layer_ids": [1, 4],
    "index_source_layer_ids": [1, 3, 4, 6],
    "candidate_source_layer_id": 4,
    "index_topk": 3,
    "norm_topk_prob": False,
    "swiglu_limit": 0.5,
    "hc_mult": 3,
    "engram_layer_ids": [2],
}


def parse(**changes: Any) -> ModelConfig:
    return FAMILIES["deepseek_v41"].parse_config(deepseek_v41(**changes))


def mixers(config: ModelConfig) -> list[CompressedConfig]:
    return [layer.mixer for layer in config.layers if isinstance(layer.mixer, CompressedConfig)]


def test_the_config_is_read() -> None:
    config = parse()
    assert config.residual == SinkhornResidual(
        num_streams=4, iterations=20, eps=1e-6, is_lagged=True, head="carried"
    )
    assert (config.router.score, config.router.scale, config.router.renormalize) == (
        "sqrt_softplus",
        1.5,
        True,
    )
    assert not any(one.has_head_norm for one in mixers(config))
    assert [one.pool and (one.pool.ratio, one.pool.source) for one in mixers(config)] == [
        None, (2, None), (2, 1), (1, None), (1, 3), (1, 3)
    ]  # fmt: skip
    assert [one.index and one.index.is_shared for one in mixers(config)] == [
        None,
        False,
        True,
        False,
        False,
        True,
    ]
    inside = CandidateConfig(num_blocks=4, block_size=2)
    assert [one.index and one.index.candidates for one in mixers(config)] == [
        None, None, None, replace(inside, is_source=True), inside, None
    ]  # fmt: skip
    assert config.ngram_layers == (1, 4)
    window, compressed = config.ropes
    assert (window.theta, window.kind, window.is_interleaved) == (10_000.0, "default", True)
    assert (compressed.theta, compressed.kind, compressed.attention_factor) == (160_000.0, "yarn", 1.0)


def test_a_shared_cache_exists_once() -> None:
    config = parse()
    further = kv_shapes(config)[config.num_layers :]
    assert [one.positions_per_entry for one in further] == [2, 2, 1, 1]
    entries = [_native.kv_cache_bytes([one], 1, 16, "f32") // 4 for one in further]
    assert entries == [8 * 20, 8 * 12, 16 * 20, 16 * 12]
    assert config.recurrent_layers == (1,)  # ratio 1 gathers nothing
    assert len(state_shapes(config)) == 1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"compress_ratios": [0] * 5}, "compress_ratios has 5 entries, expected one for each of 6 layers"),
        ({"compress_ratios": [0, 3, 3, 1, 1, 1]}, "supported: 0 and powers of two up to 128, not 3"),
        ({"compress_ratios": [2, 2, 2, 1, 1, 1]}, "gives layer 0 the ratio 2, and no layer of kv_source_layer_ids"),
        ({"compress_ratios": [0, 2, 2, 1, 2, 1]}, "gives layer 4 the ratio 2, and no layer of kv_source_layer_ids"),
        ({"compress_ratios": [0, 2, 2, 1, 0, 1]}, "index_source_layer_ids has layer 4, whose compress_ratios is 0"),
        ({"kv_source_layer_ids": [1, 2, 3]}, "kv_source_layer_ids has layer 2, and index_source_layer_ids does not"),
        ({"kv_source_layer_ids": [1, 6]}, "kv_source_layer_ids"),
        ({"candidate_source_layer_id": 1}, "candidate_source_layer_id is 1, and layer 3 keeps new entries"),
        ({"candidate_source_layer_id": 5}, "is 5, and index_source_layer_ids does not have it"),
        ({"index_topk": 8}, "index_topk is 8, and candidate_topk_blocks may have only 7 entries"),
        ({"candidate_block_size": 8193}, "candidate_block_size"),
        ({"candidate_topk_blocks": 1 << 21}, "candidate_topk_blocks"),
        ({"index_head_dim": 6}, "index_head_dim is 6, less than the 8 dimensions that rotate"),
        ({"engram_layer_ids": [1, 1]}, "engram_layer_ids has a layer twice"),
        ({"engram_num_embeddings": [1, 2]}, "follow from engram_vocab_size"),
        ({"scoring_func": "sigmoid"}, "asks for scoring_func 'sigmoid'; supported: sqrtsoftplus"),
        ({"num_hash_layers": 3}, "asks for num_hash_layers 3"),
        ({"n_group": 8}, "asks for n_group 8"),
        ({"num_key_value_heads": 2}, "asks for num_key_value_heads 2; supported: 1"),
        ({"gate_temp": 2.0}, "sets gate_temp"),
    ],
)  # fmt: skip
def test_other_configs_are_refused_by_name(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ArgosyError) as caught:
        parse(**changes)
    assert sentence in str(caught.value)


def test_each_key_of_the_released_config_counts_or_is_refused() -> None:
    released = FAMILIES["deepseek_v41"].parse_config(DEEPSEEK_V4_1_FLASH)
    other: dict[type, Callable[[Any], Any]] = {
        bool: lambda value: not value,
        int: lambda value: 2 * value + 1,
        float: lambda value: value / 2,
        str: lambda value: f"{value}_2",
        list: lambda value: [*value[:-1], value[-1] - 1],
        dict: lambda value: value | {"factor": 8},
    }
    same = []
    for key, value in DEEPSEEK_V4_1_FLASH["text_config"].items():
        text = DEEPSEEK_V4_1_FLASH["text_config"] | {key: other[type(value)](value)}
        try:
            read = FAMILIES["deepseek_v41"].parse_config(DEEPSEEK_V4_1_FLASH | {"text_config": text})
        except ArgosyError:
            continue
        same += [key] if read == released else []
    assert [key for key in same if not key.startswith("dspark_")] == ["num_nextn_predict_layers"]


def test_each_key_of_the_released_tower_counts() -> None:
    (tower,), model = ENCODERS["deepseek_v41"], FAMILIES["deepseek_v41"].parse_config(DEEPSEEK_V4_1_FLASH)
    assert model.router.has_media_bias
    given = {key: value for key, value in DEEPSEEK_V4_1_FLASH["vision_config"].items() if key != "model_type"}

    def read(**changes: Any) -> Any:
        reader = ConfigReader(given | changes, "deepseek_v41")
        return tower.read(reader, reader, model)

    released = read()
    assert (released.most_tokens, released.least_pixels, released.most_ratio) == (1024, 544**2, 0)
    assert tower.read(ConfigReader({}, ""), ConfigReader({}, ""), model) == released
    for key, value in given.items():
        assert read(**{key: 8 if value is None else 2 * value}) != released, key


@pytest.mark.parametrize("token", [99, -1, 2.0, "<image>", True])
def test_the_token_of_pictures_must_be_one(token: object) -> None:
    with pytest.raises(ArgosyError, match="expected a token id below 99"):
        FAMILIES["deepseek_v41"].parse_config(deepseek_v41() | {"image_token_id": token})


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        ({}, 110),
        (MIXED, 90),
        ({"compress_ratios": [0] * 6, "kv_source_layer_ids": [], "index_source_layer_ids": [],
          "candidate_source_layer_id": -1, "o_groups": 1, "sliding_window": 17}, 40),
        ({"candidate_source_layer_id": -1, "index_topk": 40, **NO_TABLES}, 60),
        ({"candidate_topk_blocks": 7, "candidate_block_size": 3, "index_topk": 5}, 60),
    ],
    ids=["every kind", "ratio 4", "windows", "no candidates", "more blocks"],
)  # fmt: skip
def test_logits_are_those_of_float64(changes: dict[str, Any], length: int, tmp_path: Path) -> None:
    check_logits(tmp_path, changes, length)


# Every expert and entry is chosen: experts in FP4 take activations of 8 bits, which change choices.
ALL: dict[str, Any] = {"index_topk": 80, "candidate_topk_blocks": 50, "num_experts_per_tok": 8}


def test_logits_of_fp8_are_those_of_float64(tmp_path: Path) -> None:
    check_logits(tmp_path, WHOLE_GROUPS, 60, experts="fp8")


def test_logits_of_the_released_types_are_near_those_of_float64(tmp_path: Path) -> None:
    found, expected = both_logits(tmp_path, WHOLE_GROUPS | ALL, 60, experts="fp4")
    assert mean_divergence(expected, found) <= LARGEST_DIVERGENCE


def check_logits(tmp_path: Path, changes: dict[str, Any], length: int, **storage: Any) -> None:
    assert difference(*both_logits(tmp_path, changes, length, **storage)) <= LARGEST_DIFFERENCE


def both_logits(tmp_path: Path, changes: dict[str, Any], length: int, **storage: Any) -> tuple[Array, Array]:
    """Return the engine's logits, and those of float64."""
    config = deepseek_v41(**changes)
    text = config["text_config"]
    for seed in range(40):
        tensors = write_deepseek_v41(tmp_path, config, seed, **storage)
        tokens = np.random.default_rng(seed).integers(3, text["vocab_size"], length).tolist()
        model = DeepseekV41(text, {name: one.astype(np.float64) for name, one in tensors.items()})
        expected = model.logits(tokens, folded(text)[tokens].tolist())
        if model.margin > 3e-6:  # else float32 may choose otherwise
            break
    else:
        pytest.fail("no seed has clear choices")
    with Engine.open(tmp_path, memory="4GiB", kv_dtype="f32", threads=1) as engine:
        return engine.logits(tokens), expected


def test_drafts_and_the_tower_are_passed_over(tmp_path: Path) -> None:
    tensors = write_deepseek_v41(tmp_path, deepseek_v41(), 5)
    more = ("mtp.0.main_proj.weight", "vision.blocks.0.attn.qkv.weight", "aligner.weight", "image_start")
    others = dict.fromkeys((*more, "layers.0.ffn.gate.bias_vl"), np.ones(3, np.float32))
    stored = {name: ("F32", one) for name, one in (tensors | others).items()}
    write_safetensors(tmp_path / "model.safetensors", stored)
    assert open_model(tmp_path).config.num_layers == 6
    stored["layers.6.attn_norm.weight"] = stored["image_start"]
    write_safetensors(tmp_path / "model.safetensors", stored)
    with pytest.raises(ArgosyError, match=r"layers\.6\.attn_norm"):
        open_model(tmp_path)


def test_a_table_that_is_cut_ends_only_the_sequences_that_need_its_end(tmp_path: Path) -> None:
    config = deepseek_v41(**WHOLE_GROUPS, engram_vocab_size=1009)
    text, codes = config["text_config"], "layers.4.engram.embed.weight"
    write_deepseek_v41(tmp_path, config, 3, experts="fp4", last=codes)
    path = tmp_path / "model.safetensors"
    header, begin = read_header(path)
    first, end = header[codes]["data_offsets"]
    assert end == max(one["data_offsets"][1] for one in header.values())
    lost = (end - first) // 32 - 4 * 4096 // 32  # from this row on
    rng = np.random.default_rng(1)

    def draw(*, needs: bool) -> list[int]:
        while True:
            prompt: list[int] = rng.integers(3, 99, 5).tolist()
            rows = engram_rows(text, folded(text)[prompt].tolist())[4]
            if (
                (rows >= lost).any() if needs else (rows < lost - 128).all()
            ):  # not in the page that ends too early
                return prompt

    prompts = draw(needs=True), draw(needs=False)
    one = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    found = []
    for cut_bytes in (0, end - first - 32 * lost):
        with Engine.open(tmp_path, memory="4GiB", threads=1) as engine:
            with path.open("r+b") as file:
                file.truncate(begin + end - cut_bytes)
            answers = [engine.submit(prompt, one) for prompt in prompts]
            while any(answer.result is None for answer in answers):
                engine.step()
            found.append([answer.result for answer in answers])
    (whole, before), (cut, after) = found
    assert whole.error is None
    assert isinstance(cut.error, ReadFailed)
    assert "n-gram table" in str(cut.error)
    assert (after.token_ids, after.logprobs) == (before.token_ids, before.logprobs)


@pytest.mark.parametrize(
    ("changes", "kv_dtype"),
    [({}, "q8"), (MIXED | NO_TABLES, "f16")],
    ids=["every kind", "ratio 4"],
)
def test_no_budget_chunk_thread_prefix_or_pack_changes_a_bit(
    changes: dict[str, Any], kv_dtype: Any, tmp_path: Path
) -> None:
    config = deepseek_v41(**changes)
    write_deepseek_v41(tmp_path, config, 5)
    tokens = np.random.default_rng(6).integers(3, config["text_config"]["vocab_size"], 150).tolist()
    greedy = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=3)
    runs: list[tuple[Path, dict[str, Any]]] = [
        (tmp_path, {"threads": 1}),
        (tmp_path, {"threads": 3, "chunk_tokens": 7, "expert_slots": 2}),
        (tmp_path, {"threads": 2, "chunk_tokens": 16, "prefix_reuse": False}),
        (tmp_path, {"threads": 2, "chunk_tokens": 1, "expert_slots": 3}),
    ]
    if not config["text_config"]["engram_layer_ids"]:  # packs hold no tables
        pack(open_model(tmp_path), tmp_path / "packed", format="source")
        runs.append((tmp_path / "packed", {"threads": 2}))
    found = []
    for path, settings in runs:
        with Engine.open(path, memory="4GiB", kv_dtype=kv_dtype, **settings) as engine:
            for _ in range(2):  # the second prompt may begin with a prefix
                answer = engine.generate(tokens, greedy)
                found.append((list(answer.token_ids), answer.logprobs))
            batch = engine.generate_batch([tokens[:70], tokens, tokens[50:]], greedy)
            found.append((list(batch[1].token_ids), batch[1].logprobs))
    assert all(one == found[0] for one in found)
