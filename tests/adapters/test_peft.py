"""PEFT's directories are read under the model's own names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from argosy.adapters.reading import open_adapter
from argosy.checkpoint.files import ModelFiles
from argosy.errors import ArgosyError, CheckpointError, UnsupportedModel
from argosy.model.families import open_model
from tests.adapters.adapter_files import PREFIX, dense_delta, pair, product, values, write_peft
from tests.adapters.random_adapter import as_doubles, expert_deltas
from tests.models.safetensors_file import Array
from tests.models.tiny import qwen3_moe, write_model

MLP = "model.layers.1.mlp"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    directory = tmp_path_factory.mktemp("base")
    write_model(directory, qwen3_moe(), seed=0)
    return open_model(directory)


def sizes(base: ModelFiles) -> tuple[int, int, int]:
    config = base.own_config
    return config.hidden_size, config.expert_width_in(1), config.num_experts


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_pairs_of_linear_modules(tmp_path: Path, base: ModelFiles, dtype: str) -> None:
    hidden = base.own_config.hidden_size
    rows = base.dense["layers.1.q"].rows
    pairs = {
        "model.layers.1.self_attn.q_proj": pair(rows, hidden, seed=1),
        "model.layers.0.self_attn.o_proj": pair(hidden, base.dense["layers.0.o"].cols, seed=2),
        f"{MLP}.gate": pair(base.own_config.num_experts, hidden, seed=3),
        "lm_head": pair(base.own_config.vocab_size, hidden, seed=4),
    }
    adapter = open_adapter(write_peft(tmp_path, pairs, dtype=dtype), base)

    names = ("layers.1.q", "layers.0.o", "layers.1.router", "head")
    assert set(adapter.dense) == set(names)
    for name, both in zip(names, pairs.values(), strict=True):
        assert adapter.dense[name][0].format == dtype.lower()
        np.testing.assert_array_equal(dense_delta(adapter, base.own_config, name), product(both, 2.0))


def test_rank_and_alpha_follow_the_first_pattern_that_matches(tmp_path: Path, base: ModelFiles) -> None:
    hidden, rows = base.own_config.hidden_size, base.dense["layers.0.q"].rows
    pairs = {
        f"model.layers.{layer}.self_attn.q_proj": pair(rows, hidden, rank=rank, seed=layer)
        for layer, rank in ((0, 2), (1, 4))
    }
    adapter = open_adapter(
        write_peft(
            tmp_path,
            pairs,
            rank_pattern={r"layers\.0\..*q_proj": 2, "q_proj": 4},
            alpha_pattern={"layers.1.self_attn.q_proj": 12},
            use_rslora=True,
        ),
        base,
    )

    assert adapter.dense["layers.0.q"][0].scale == 8 / 2**0.5
    assert adapter.dense["layers.1.q"][0].scale == 12 / 2


def test_pairs_of_single_experts(tmp_path: Path, base: ModelFiles) -> None:
    hidden, width, _ = sizes(base)
    pairs = {
        f"{MLP}.experts.0.gate_proj": pair(width, hidden, seed=1),
        f"{MLP}.experts.0.down_proj": pair(hidden, width, seed=2),
        f"{MLP}.experts.3.down_proj": pair(hidden, width, rank=2, seed=3),
    }
    adapter = open_adapter(
        write_peft(
            tmp_path, pairs, rank_pattern={"experts.3.down_proj": 2}, alpha_pattern={"3.down_proj": 1}
        ),
        base,
    )

    assert adapter.experts[1].ranks == (4, 0, 4)
    gate, up, down = expert_deltas(adapter, 1, 0)
    assert up is None
    np.testing.assert_array_equal(gate, product(pairs[f"{MLP}.experts.0.gate_proj"], 2.0))
    np.testing.assert_array_equal(down, product(pairs[f"{MLP}.experts.0.down_proj"], 2.0))
    np.testing.assert_array_equal(
        expert_deltas(adapter, 1, 3)[2], product(pairs[f"{MLP}.experts.3.down_proj"], 0.5)
    )
    assert not np.any(expert_deltas(adapter, 1, 2)[2])


def fused_pairs(base: ModelFiles) -> dict[str, tuple[Array, Array]]:
    hidden, width, experts = sizes(base)
    return {
        f"{MLP}.experts.base_layer": (
            values(4 * experts, hidden, seed=1),
            values(2 * width, 4 * experts, seed=2),
        ),
        f"{MLP}.experts": (values(4 * experts, width, seed=3), values(hidden, 4 * experts, seed=4)),
    }


@pytest.mark.parametrize("columns", ["expert_fastest", "expert_slowest"])
def test_pairs_of_fused_experts(tmp_path: Path, base: ModelFiles, columns: str) -> None:
    _, width, experts = sizes(base)
    pairs = fused_pairs(base)
    adapter = open_adapter(
        write_peft(tmp_path, pairs, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
        base,
        columns=columns,  # type: ignore[arg-type]
    )

    for expert in (3, 0):
        expected = []
        for down, up in pairs.values():
            own_down = np.reshape(down, (experts, 4, -1))[expert]
            if columns == "expert_fastest":
                own_up = np.reshape(up, (-1, 4, experts))[:, :, expert]
            else:
                own_up = np.reshape(up, (-1, experts, 4))[:, expert]
            expected.append(product((own_down, own_up), 2.0))
        gate, up_delta, down_delta = expert_deltas(adapter, 1, expert)
        np.testing.assert_array_equal(gate, expected[0][:width])
        np.testing.assert_array_equal(up_delta, expected[0][width:])
        np.testing.assert_array_equal(down_delta, expected[1])


def test_pairs_of_old_versions_are_swapped(tmp_path: Path, base: ModelFiles) -> None:
    hidden, width, experts = sizes(base)
    down, up = values(4 * experts, hidden, seed=3), values(width, 4 * experts, seed=4)
    path = write_peft(tmp_path, {f"{MLP}.experts": (down, up)}, target_parameters=["experts.down_proj"])
    adapter = open_adapter(path, base)

    own = 2.0 * np.reshape(down, (experts, 4, -1))[2].T @ np.reshape(up, (-1, 4, experts))[:, :, 2].T
    np.testing.assert_array_equal(expert_deltas(adapter, 1, 2)[2], own)


def test_embedding_and_whole_matrices(tmp_path: Path, base: ModelFiles) -> None:
    config = base.own_config
    rows, up = values(4, config.vocab_size, seed=1), values(config.hidden_size, 4, seed=2)
    router = values(config.num_experts, config.hidden_size, seed=3)
    tensors = {
        f"{PREFIX}model.embed_tokens.lora_embedding_A": ("F32", rows),
        f"{PREFIX}model.embed_tokens.lora_embedding_B": ("F32", up),
        f"{PREFIX}model.embed_tokens.base_layer.weight": (
            "F32",
            values(*rows.shape[::-1][:1], config.hidden_size, seed=0),
        ),
        f"{PREFIX}{MLP}.gate.weight": ("BF16", router),
    }
    adapter = open_adapter(write_peft(tmp_path, {}, tensors=tensors, alora_invocation_tokens=[5, 6]), base)

    assert adapter.embedding is not None
    np.testing.assert_array_equal(adapter.embedding.rows, rows.T)
    np.testing.assert_array_equal(adapter.embedding.up, up.T)
    assert adapter.embedding.scale == 2.0
    replaced = adapter.replaced["layers.1.router"]
    np.testing.assert_array_equal(as_doubles(replaced.values, replaced.format), router)
    assert adapter.invocation_tokens == (5, 6)
    with pytest.raises(CheckpointError, match=f"expected token ids below {config.vocab_size}"):
        open_adapter(
            write_peft(tmp_path, {}, tensors=tensors, alora_invocation_tokens=[5, config.vocab_size]), base
        )


def test_a_wrong_base_is_compared_with_the_model(tmp_path: Path, base: ModelFiles) -> None:
    config = base.own_config
    found = (
        f"; this model is a qwen3_moe with {config.num_layers} layers, hidden size {config.hidden_size} and a "
        f"vocabulary of {config.vocab_size}"
    )
    wrong = {
        "rows": {"model.layers.0.self_attn.q_proj": pair(7, config.hidden_size)},
        "module": {"model.layers.0.self_attn.q_a_proj": pair(8, config.hidden_size)},
        "layer": {"model.layers.60.self_attn.q_proj": pair(8, config.hidden_size)},
    }
    for name, pairs in wrong.items():
        with pytest.raises(ArgosyError) as caught:
            open_adapter(write_peft(tmp_path / name, pairs, base_model_name_or_path="a/Base-7B"), base)
        assert caught.value.hint == "the adapter was trained for a/Base-7B" + found
    with pytest.raises(ArgosyError) as caught:
        open_adapter(write_peft(tmp_path / "none", wrong["rows"]), base)
    assert caught.value.hint == "was the adapter trained for another base?" + found


def test_a_note_names_the_option_for_unsloth_s_columns(tmp_path: Path, base: ModelFiles) -> None:
    path = write_peft(
        tmp_path,
        fused_pairs(base),
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        base_model_name_or_path="unsloth/Qwen3-30B-A3B",
    )
    (note,) = open_adapter(path, base).notes
    assert "`--lora-columns expert_slowest`" in note
    assert not open_adapter(path, base, columns="expert_slowest").notes


Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize("spelling", ["lora_magnitude_vector", "lora_magnitude_vector.weight"])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_dora_brings_lengths_of_rows(tmp_path: Path, base: ModelFiles, spelling: str, dtype: str) -> None:
    rows = base.dense["layers.1.q"].rows
    lengths = values(rows, seed=7)
    path = write_peft(
        tmp_path,
        {Q: pair(rows, base.own_config.hidden_size)},
        tensors={f"base_model.model.{Q}.{spelling}": (dtype, lengths)},
        use_dora=True,
    )
    (found,) = open_adapter(path, base).dense["layers.1.q"]
    assert found.magnitude is not None
    assert found.magnitude.dtype == np.float32
    np.testing.assert_array_equal(found.magnitude, lengths)


@pytest.mark.parametrize(
    ("module", "count", "is_dora", "sentence"),
    [
        (Q, None, True, "lora_magnitude_vector'? is missing"),
        (Q, 64, False, "belongs to DoRA, but adapter_config.json does not set use_dora"),
        (Q, 63, True, r"is \[63\], and the model needs \[64\]"),
        ("model.layers.0.self_attn.q_proj", 64, True, "is missing"),
        (f"{MLP}.experts.0.down_proj", 48, True, "pair of routed experts with use_dora"),
    ],
)
def test_dora_that_is_incomplete_or_of_experts_is_refused(
    tmp_path: Path, base: ModelFiles, module: str, count: int | None, is_dora: bool, sentence: str
) -> None:
    hidden, width, _ = sizes(base)
    shape = (hidden, width) if "experts" in module else (base.dense["layers.1.q"].rows, hidden)
    path = write_peft(
        tmp_path,
        {module: pair(*shape)},
        tensors={}
        if count is None
        else {f"base_model.model.{Q}.lora_magnitude_vector": ("F32", np.ones(count))},
        use_dora=is_dora,
    )
    with pytest.raises((CheckpointError, UnsupportedModel), match=sentence):
        open_adapter(path, base)


def test_fused_experts_have_no_dora(tmp_path: Path, base: ModelFiles) -> None:
    path = write_peft(tmp_path, fused_pairs(base), use_dora=True)
    with pytest.raises(UnsupportedModel, match="pair of routed experts with use_dora"):
        open_adapter(path, base)
