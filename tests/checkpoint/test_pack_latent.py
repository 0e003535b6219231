"""Packs of models with latent attention store kv_up as the two halves used in memory, with no loss of precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from argosy import Engine, _native
from argosy.checkpoint import pack_contents
from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.pack import pack, verify_pack
from argosy.config import LatentConfig
from argosy.model.families import open_model
from argosy.model.weights import dense_footprint, load_dense
from tests.checkpoint import packed_formats
from tests.checkpoint.test_pack import dense_bytes, dense_values
from tests.models.hub_quantised import write_fp8_model
from tests.models.references import mean_divergence
from tests.models.tiny import RawConfig, prompt_ids, write_model
from tests.models.tiny_latent import deepseek_v3

HEADS = 3
WHOLE_PANELS = deepseek_v3(
    kv_lora_rank=48, qk_nope_head_dim=40, v_head_dim=32, num_attention_heads=HEADS, num_key_value_heads=HEADS
)
PARTS_OF_PANELS = deepseek_v3(
    kv_lora_rank=20, qk_nope_head_dim=12, v_head_dim=32, num_attention_heads=HEADS, num_key_value_heads=HEADS
)
IN_BLOCKS = deepseek_v3(
    kv_lora_rank=128, qk_rope_head_dim=16, qk_nope_head_dim=128, v_head_dim=128, num_attention_heads=2,
    num_key_value_heads=2,
)  # fmt: skip
# Every expert is chosen, as a rounded score that changed a choice would hide what rounding itself costs.
ALL_EXPERTS = deepseek_v3(
    hidden_size=96, kv_lora_rank=64, qk_nope_head_dim=32, v_head_dim=32, n_routed_experts=4, num_experts_per_tok=4,
    n_group=1, topk_group=1,
)  # fmt: skip


def halves(files: ModelFiles, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """The k_up and v_up of a layer, computed from its kv_up."""
    latent = files.config.latent
    assert latent is not None
    whole = dense_values(files, f"layers.{layer}.kv_up").reshape(
        files.config.latent.num_heads, -1, latent.kv_rank
    )
    keys, values = whole[:, : latent.nope_dim], whole[:, latent.nope_dim :]
    return keys.transpose(0, 2, 1).reshape(-1, latent.nope_dim), values.reshape(-1, latent.kv_rank)


def is_split(files: ModelFiles) -> bool:
    assert files.config.latent is not None
    names = {name.rpartition(".")[2] for name in files.dense}
    assert ("k_up" in names and "v_up" in names) == files.config.latent.is_up_split == ("kv_up" not in names)
    return files.config.latent.is_up_split


def packed(source: Path, format: str, name: str = "packed") -> ModelFiles:
    directory = source.parent / f"{name}-{format}"
    pack(open_model(source), directory, format=format)
    verify_pack(directory)
    return open_model(directory)


def logits(model: Path, config: RawConfig, seed: int = 1) -> np.ndarray:
    with Engine.open(model, memory="4GiB", threads=1) as engine:
        return engine.logits(prompt_ids(config, seed, 40))


@pytest.mark.parametrize("config", [WHOLE_PANELS, PARTS_OF_PANELS])
@pytest.mark.parametrize(
    ("format", "dtype"), [("bf16", "BF16"), ("source", "BF16"), ("source", "F32"), ("source", "F16")]
)
def test_float_halves_and_logits_are_bit_identical(
    config: RawConfig, format: str, dtype: str, tmp_path: Path
) -> None:
    source = open_model(write_model(tmp_path / "source", config, seed=1, dtype=dtype))
    files = packed(source.path, format)

    assert is_split(files)
    assert files.config == source.config.with_mixers(LatentConfig, is_up_split=True)
    for layer in range(files.config.num_layers):
        for part, expected in zip(("k_up", "v_up"), halves(source, layer), strict=True):
            ref = files.dense[f"layers.{layer}.{part}"]
            assert ref.format == source.dense[f"layers.{layer}.kv_up"].format
            np.testing.assert_array_equal(dense_values(files, f"layers.{layer}.{part}"), expected)
    np.testing.assert_array_equal(logits(files.path, config), logits(source.path, config))


@pytest.mark.parametrize(("config", "is_cut"), [(IN_BLOCKS, True), (WHOLE_PANELS, False)])
def test_fp8_is_split_only_if_the_halves_are_whole_blocks(
    config: RawConfig, is_cut: bool, tmp_path: Path
) -> None:
    write_fp8_model(tmp_path / "model", config, seed=2)
    files = packed(tmp_path / "model", "source")
    assert is_split(files) == is_cut
    np.testing.assert_array_equal(logits(files.path, config), logits(tmp_path / "model", config))


@pytest.mark.parametrize("format", ["q8", "q4"])
def test_q8_quantises_the_key_half_along_the_columns_of_its_product(format: str, tmp_path: Path) -> None:
    source = open_model(write_model(tmp_path / "source", WHOLE_PANELS, seed=3))
    files = packed(source.path, format)

    assert is_split(files)
    for part, expected in zip(("k_up", "v_up"), halves(source, 0), strict=True):
        ref = files.dense[f"layers.0.{part}"]
        assert ref.format == "q8"
        quants, scales = packed_formats.quants_and_scales("q8", dense_bytes(ref), ref.rows, ref.cols)
        steps = np.repeat(scales, 32, axis=1)[:, : ref.cols]
        assert np.abs(quants * steps - expected).max() <= 0.51 * np.abs(steps).max()
        assert np.all(np.abs(quants * steps - expected) <= 0.51 * np.abs(steps))


def test_the_key_half_of_a_q8_pack_is_loaded_once_and_unchanged(tmp_path: Path) -> None:
    source = open_model(write_model(tmp_path / "source", WHOLE_PANELS, seed=4))
    files = packed(source.path, "q8")
    store = _native.Store(1)
    try:
        weights = load_dense(store, files.dense, open_file=store.open)
    finally:
        store.close()
    assert {weights.matrices[f"layers.0.{part}"].format for part in ("k_up", "v_up")} == {"q8"}
    # No matrix passes through scratch memory.
    assert dense_footprint(files.dense) < files.dense_bytes + 8192 * len(files.dense)


def test_a_q8_pack_stores_the_key_half_as_bf16_if_heads_are_not_whole_panels(tmp_path: Path) -> None:
    source = open_model(write_model(tmp_path / "source", PARTS_OF_PANELS, seed=5))
    files = packed(source.path, "q8")
    assert files.dense["layers.1.k_up"].format == "bf16"
    assert files.dense["layers.1.v_up"].format == "q8"
    np.testing.assert_array_equal(dense_values(files, "layers.1.k_up"), halves(source, 1)[0])
    assert np.isfinite(logits(files.path, PARTS_OF_PANELS)).all()


@pytest.mark.parametrize("config", [WHOLE_PANELS, PARTS_OF_PANELS])
def test_a_pack_of_a_pack_equals_the_pack_of_the_checkpoint(config: RawConfig, tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", config, seed=6)
    straight, between = packed(source, "q8"), packed(source, "bf16")
    pack(between, tmp_path / "again", format="q8")
    for file in ("dense.bin", "experts.bin"):
        assert (tmp_path / "again" / file).read_bytes() == (straight.path / file).read_bytes()


def test_quantising_the_halves_costs_no_more_than_quantising_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier packs quantised the whole, and their key half became float16 when it was loaded."""
    now, before = [], []
    for seed in range(4):
        source = write_model(tmp_path / f"{seed}" / "source", ALL_EXPERTS, seed=seed)
        exact = logits(source, ALL_EXPERTS, seed)
        now.append(mean_divergence(exact, logits(packed(source, "q8").path, ALL_EXPERTS, seed)))
        with monkeypatch.context() as patched:
            patched.setattr(pack_contents, "config_of_pack", lambda files, format: files.config)
            whole = packed(source, "q8", "whole")
        assert not is_split(whole)
        before.append(mean_divergence(exact, logits(whole.path, ALL_EXPERTS, seed)))
    # The ratios of single models lie between 0.94 and 1.09.
    assert sum(now) <= 1.15 * sum(before)
