"""Granite-4 hybrids and Nemotron-3: the meaning of their configs, defaults of absent keys, GGUF, and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy import Engine, SamplingParams
from argosy.checkpoint.files import DraftFiles
from argosy.checkpoint.geometry import count_parameters
from argosy.cli.main import main
from argosy.config import (
    ActivationConfig,
    AttentionConfig,
    LayerConfig,
    MambaConfig,
    ModelConfig,
    RouterConfig,
)
from argosy.errors import ArgosyError, CheckpointError
from argosy.experts.slots import lay_out
from argosy.forecast.assumed import assume_pack
from argosy.model.families import FAMILIES, open_model, read_config
from argosy.model.work import work_of
from tests.families import published_mamba as published
from tests.models.gguf_mamba import write_mamba_gguf
from tests.models.gguf_models import one_type
from tests.models.hub_schemes import KINDS, write_kind
from tests.models.numpy_model import NumpyModel
from tests.models.references import LARGEST_DIFFERENCE, difference, mean_divergence
from tests.models.safetensors_file import read_checkpoint, write_checkpoint
from tests.models.tiny import RawConfig, prompt_ids, write_model
from tests.models.tiny_mamba import granitemoehybrid, nemotron_h, nemotron_h_puzzle


def parse(raw: RawConfig) -> ModelConfig:
    return FAMILIES[raw["model_type"]].parse_config(raw)


def test_granite_4_has_mamba_or_attention_before_experts() -> None:
    config = parse(published.granitemoehybrid())
    mamba = MambaConfig(num_heads=48, head_dim=64, state_dim=128, num_groups=1, conv_width=4)
    attention = AttentionConfig(num_heads=12, num_kv_heads=4, head_dim=128, rope=None, scale=0.0078125)
    assert [i for i in range(40) if i not in config.recurrent_layers] == [5, 15, 25, 35]
    assert config.layers[4] == LayerConfig(mixer=mamba, is_moe=True)
    assert config.layers[5] == LayerConfig(mixer=attention, is_moe=True)
    assert (config.embedding_scale, config.residual_scale, config.logit_scale) == (12.0, 0.22, 1 / 6)
    assert (config.expert_width, config.shared_width, config.router) == (512, 1024, RouterConfig())
    assert config.is_embedding_tied
    assert config.ropes == ()


def test_nemotron_s_layers_have_one_part_each() -> None:
    config = parse(published.nemotron_h())
    mamba = MambaConfig(num_heads=64, head_dim=64, state_dim=128, num_groups=8, conv_width=4)
    attention = AttentionConfig(num_heads=32, num_kv_heads=2, head_dim=128, rope=None)
    assert config.layers[:6] == (
        LayerConfig(mixer=mamba, is_moe=False, has_network=False),
        LayerConfig(mixer=None, is_moe=True),
        LayerConfig(mixer=mamba, is_moe=False, has_network=False),
        LayerConfig(mixer=None, is_moe=True),
        LayerConfig(mixer=mamba, is_moe=False, has_network=False),
        LayerConfig(mixer=attention, is_moe=False, has_network=False),
    )
    assert (len(config.moe_layers), len(config.recurrent_layers)) == (23, 23)
    assert config.router == RouterConfig(
        score="sigmoid", has_choice_bias=True, renormalize_eps=1e-20, scale=2.5
    )
    assert config.activation == ActivationConfig(kind="relu2")
    assert (config.expert_width, config.shared_width, config.expert_latent) == (1856, 3712, 0)
    large = parse(published.nemotron_h(**published.NEMOTRON_3_SUPER))
    assert (large.expert_latent, large.expert_hidden, large.eos_ids) == (1024, 1024, (2, 11))


def test_an_absent_key_has_the_default_of_the_config_class() -> None:
    granite = parse({"model_type": "granitemoehybrid", "layer_types": ["attention"] + ["mamba"] * 31})
    assert granite.layers[1].mixer == MambaConfig(
        num_heads=128, head_dim=64, state_dim=256, num_groups=1, conv_width=4
    )
    assert (granite.vocab_size, granite.num_experts, granite.shared_width) == (32_000, 8, 1024)
    assert granite.attention.rope is None
    nemotron = parse({"model_type": "nemotron_h", "layers_block_type": ["mamba", "moe", "attention", "mlp"]})
    assert nemotron.layers[0].mixer == MambaConfig(
        num_heads=128, head_dim=64, state_dim=128, num_groups=8, conv_width=4
    )
    assert nemotron.layers[3] == LayerConfig(mixer=None, is_moe=False)
    assert (nemotron.dense_width, nemotron.expert_width, nemotron.shared_width) == (21_504, 7688, 7688)
    assert (nemotron.num_experts, nemotron.experts_per_token, nemotron.router.scale) == (8, 2, 1.0)


def test_nemotrons_without_experts_run(tmp_path: Path) -> None:
    """Whether the keys of experts are there, as transformers writes them, or not, as in Nano-9B-v2's config."""
    config = nemotron_h(hybrid_override_pattern="M-*M-", use_bias=True)
    hub = {
        key: value for key, value in config.items() if "expert" not in key and not key.startswith("n_group")
    }
    assert parse(hub | {"n_groups": 2}) == parse(config)
    assert (parse(config).num_experts, parse(config).moe_layers) == (0, ())
    directory, prompt = write_model(tmp_path, config, seed=4), prompt_ids(config, 4)
    with Engine.open(directory, memory="4GiB", threads=1) as engine:
        logits = engine.logits(prompt)
    assert difference(logits, NumpyModel(directory).logits(prompt)) <= LARGEST_DIFFERENCE


def test_the_kinds_of_layers_have_several_spellings() -> None:
    expected = parse(nemotron_h())
    pattern = nemotron_h()
    del pattern["hybrid_override_pattern"]
    for names in (("mamba", "attention"), ("linear_attention", "full_attention")):
        kinds = [{"M": names[0], "*": names[1], "E": "moe"}[letter] for letter in "MEM*E"]
        for key in ("layers_block_type", "layer_types"):
            assert parse(pattern | {key: kinds}) == expected
    renamed = granitemoehybrid(layer_types=["linear_attention", "full_attention", "linear_attention"])
    assert parse(renamed) == parse(granitemoehybrid())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"layer_types": None}, "no layer has attention"),
        ({"layer_types": ["mamba"] * 3}, "no layer has attention"),
        ({"layer_types": ["mamba", "conv", "attention"]}, "asks for layer_types 'conv'; supported: mamba"),
        ({"mamba_n_heads": 6}, "56 channels, 6 heads, 1 groups; expected heads of equal size"),
        ({"mamba_n_groups": 2}, "56 channels, 7 heads, 2 groups; expected heads of equal size"),
        ({"mamba_d_head": 16}, "asks for mamba_d_head 16; supported: 8 or 'auto'"),
        ({"time_step_limit": [0.0, 1.0]}, "asks for time_step_limit [0.0, 1.0]; supported: [0.0, {"),
        ({"position_embedding_type": "alibi"}, "asks for position_embedding_type 'alibi'; supported: nope, rope"),
        ({"normalization_function": "layernorm"}, "asks for normalization_function 'layernorm'"),
        ({"hidden_act": "gelu"}, "asks for hidden_act 'gelu'; supported: silu"),
        ({"num_local_experts": -1}, "num_local_experts is -1"),
        ({"num_local_experts": 0, "shared_intermediate_size": 0}, "shared_intermediate_size is 0"),
    ],
)  # fmt: skip
def test_unsupported_granites_are_refused_by_name(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ArgosyError) as caught:
        parse(granitemoehybrid(**changes))
    assert sentence in str(caught.value)


def test_no_limit_of_dt_has_several_spellings() -> None:
    for limit in ([0.0, {"__float__": "Infinity"}], None):
        for make in (granitemoehybrid, nemotron_h):
            assert parse(make(time_step_limit=limit)) == parse(make())


@pytest.mark.parametrize("make", [granitemoehybrid, nemotron_h])
def test_a_config_may_have_infinity_as_released_files_do(
    make: Callable[..., RawConfig], tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(make(time_step_limit=[0.0, float("inf")])))
    assert "Infinity" in path.read_text()
    assert read_config(tmp_path)[1] == parse(make())
    path.write_text(json.dumps(make(rms_norm_eps=float("inf"), layer_norm_epsilon=float("inf"))))
    with pytest.raises(CheckpointError, match=r"_(eps|epsilon) is .*Infinity"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hybrid_override_pattern": "MEX*E"}, "asks for hybrid_override_pattern 'MEX*E'; supported: for each layer"),
        ({"layer_types": ["mamba", "conv"]}, "asks for layer_types ['mamba', 'conv']; supported: for each layer"),
        ({"hybrid_override_pattern": "MEM-E"}, "its layers are MEM-E"),
        ({"hybrid_override_pattern": "ME*"}, "asks for num_hidden_layers 5; supported: 3"),
        ({"norm_eps": 1e-6}, "asks for norm_eps 1e-06; supported: 1e-05"),
        ({"mlp_hidden_act": "silu"}, "asks for mlp_hidden_act 'silu'; supported: 'relu2'"),
        ({"mamba_hidden_act": "gelu"}, "asks for mamba_hidden_act 'gelu'; supported: 'silu'"),
        ({"attention_bias": True}, "asks for attention_bias true; supported: false"),
        ({"mamba_proj_bias": True}, "asks for mamba_proj_bias true; supported: false"),
        ({"mlp_bias": True}, "asks for mlp_bias true; supported: false"),
        ({"sliding_window": 8}, "asks for sliding_window 8; supported: null"),
        ({"time_step_limit": [0.0, 0.1]}, "asks for time_step_limit [0.0, 0.1]; supported: [0.0, {"),
        ({"n_shared_experts": 2}, "asks for n_shared_experts 2; supported: 1"),
        ({"n_groups": 4}, "36 channels, 6 heads, 4 groups; expected heads of equal size"),
        ({"n_group": 4}, "6 experts in 4 groups"),
        ({"mamba_num_heads": 70_000}, "mamba_num_heads is 70000, a whole number; expected a whole number from 1"),
        ({"block_configs": []}, "sets block_configs to [], but nemotron_h does not know this key"),
    ],
)  # fmt: skip
def test_unsupported_nemotrons_are_refused_by_name(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ArgosyError) as caught:
        parse(nemotron_h(**changes))
    assert sentence in str(caught.value)


def test_layers_have_the_tensors_of_their_part_alone(tmp_path: Path) -> None:
    files = open_model(
        write_model(tmp_path, nemotron_h(hybrid_override_pattern="ME*-", num_hidden_layers=4), seed=1)
    )
    last = {
        i: {name.rpartition(".")[2] for name in files.dense if name.startswith(f"layers.{i}.")}
        for i in range(4)
    }
    assert last[0] == {
        "attn_norm", "mamba_in", "mamba_conv", "mamba_conv_bias", "mamba_rate", "mamba_dt_bias", "mamba_skip",
        "mamba_norm", "mamba_out",
    }  # fmt: skip
    assert last[1] == {"mlp_norm", "router", "choice_bias", "shared_up", "shared_down"}
    assert last[2] == {"attn_norm", "q", "k", "v", "o"}
    assert last[3] == {"mlp_norm", "up", "down"}
    assert files.experts.keys() == {(1, expert) for expert in range(6)}


def test_names_and_experts_of_transformers_are_read(tmp_path: Path) -> None:
    """transformers 5 renames the model and the router, and stacks Granite's experts under other names."""
    hub = write_model(tmp_path / "hub", nemotron_h(num_nextn_predict_layers=1), seed=1)
    tensors = {name.replace("backbone.", "model."): one for name, one in read_checkpoint(hub).items()}
    renamed = write_model(tmp_path / "renamed", nemotron_h(num_nextn_predict_layers=1), seed=1)
    write_checkpoint(renamed, {name: ("BF16", tensor) for name, tensor in tensors.items()})
    one, other = open_model(hub), open_model(renamed)
    assert (one.config, one.dense.keys(), one.experts.keys()) == (
        other.config, other.dense.keys(), other.experts.keys(),
    )  # fmt: skip
    assert one.draft is None


GGUF = {
    "granitemoehybrid": granitemoehybrid(
        hidden_size=64, intermediate_size=32, layer_types=["attention", "mamba", "mamba"], mamba_d_head=32,
        mamba_n_groups=2, mamba_n_heads=4, num_attention_heads=2, num_key_value_heads=1, shared_intermediate_size=64,
        position_embedding_type="nope",
    ),
    "granitemoehybrid without experts": granitemoehybrid(
        hidden_size=64, intermediate_size=96, mamba_d_head=32, mamba_n_heads=4, num_attention_heads=2,
        num_experts_per_tok=0, num_key_value_heads=1, num_local_experts=0, shared_intermediate_size=96,
    ),
    "granitemoehybrid, attention alone": granitemoehybrid(
        hidden_size=64, intermediate_size=96, layer_types=["attention"] * 3, mamba_d_head=32, mamba_n_heads=4,
        num_attention_heads=2, num_experts_per_tok=0, num_key_value_heads=1, num_local_experts=0,
        position_embedding_type="rope", shared_intermediate_size=96,
    ),
    "nemotron_h": nemotron_h(
        hidden_size=64, head_dim=32, num_attention_heads=2, num_key_value_heads=1, mamba_head_dim=16, mamba_num_heads=4,
        moe_intermediate_size=32, moe_shared_expert_intermediate_size=64, moe_latent_size=32,
        num_nextn_predict_layers=1,
    ),
    "nemotron_h without experts": nemotron_h(
        hidden_size=64, head_dim=32, hybrid_override_pattern="M-*-", intermediate_size=96, mamba_head_dim=16,
        mamba_num_heads=4, num_attention_heads=2, num_hidden_layers=4, num_key_value_heads=1,
    ),
    "nemotron_h_puzzle": nemotron_h_puzzle(
        "EM*EE", ((3, 64), (1, 32), (2, 96)), hidden_size=64, head_dim=32, mamba_head_dim=16, mamba_num_heads=4,
        moe_latent_size=32, moe_shared_expert_intermediate_size=64, num_attention_heads=2, num_key_value_heads=1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("type_name", ["F32", "Q8_0"])
@pytest.mark.parametrize("family", GGUF)
def test_logits_of_a_gguf_are_those_of_its_weights(family: str, type_name: str, tmp_path: Path) -> None:
    config, path = GGUF[family], tmp_path / "model.gguf"
    reference = NumpyModel(write_mamba_gguf(path, config, one_type(type_name), seed=3))
    prompt = prompt_ids(config, 3)
    with Engine.open(path, memory="4GiB", threads=1, kv_dtype="f32") as engine:
        logits = engine.logits(prompt)
    expected = reference.logits(prompt)
    if type_name == "F32":
        assert difference(logits, expected) <= LARGEST_DIFFERENCE
    else:
        assert mean_divergence(expected, logits) <= 2e-3


def test_nemotron_s_layer_for_multi_token_prediction_drafts_from_gguf(tmp_path: Path) -> None:
    """There, both of its parts are one layer, with two norms."""
    config, path = GGUF["nemotron_h"], tmp_path / "model.gguf"
    write_mamba_gguf(path, config, one_type("F32"), seed=3)
    files = open_model(path)
    assert isinstance(files.draft, DraftFiles)
    assert files.draft.dense["layers.5.attn_norm"].name == "blk.5.attn_norm.weight"
    assert files.draft.dense["layers.5.mlp_norm"].name == "blk.5.post_attention_norm.weight"
    params, answers = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True), []
    for speculate in ("off", "mtp"):
        with Engine.open(path, memory="4GiB", threads=1, speculate=speculate) as engine:
            answers.append(engine.generate(prompt_ids(config, 3), params).token_ids)
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("family", "metadata", "sentence"),
    [
        ("granitemoehybrid", {"attention.head_count_kv": [0, 0, 0]}, "attention.head_count_kv"),
        ("granitemoehybrid", {"attention.head_count_kv": [1, 0]}, "a whole number from 0 on for each of 3 layers"),
        ("granitemoehybrid without experts", {"expert_shared_feed_forward_length": 64}, "supported: 96"),
        ("granitemoehybrid without experts", {"expert_used_count": 2}, "expert_used_count"),
        ("nemotron_h", {"feed_forward_length": [0, 32]}, "a whole number from 0 on for each of 6 layers"),
        ("nemotron_h", {"feed_forward_length": [0, 0, 0, 0, 0, 32]}, "blk.1.ssm_in.weight is missing"),
        ("nemotron_h", {"moe_every_n_layers": 2}, "moe_every_n_layers"),
        ("nemotron_h without experts", {"feed_forward_length": [0, 96, 0, 64]}, "the same width in every"),
        ("nemotron_h_puzzle", {"expert_used_count": [3, 0, 0, 0, 2]}, "from 1 to 6 in every layer with experts"),
        ("nemotron_h_puzzle", {"expert_used_count": [3, 0, 0, 7, 2]}, "room for the 7 experts of a token"),
        ("nemotron_h_puzzle", {"expert_feed_forward_length": [64, 0, 0, 0, 96]}, "from 1 to 96 in every layer with"),
        ("nemotron_h_puzzle", {"expert_feed_forward_length": [64, 0, 0, 64, 96]}, "blk.3.ffn_up_exps.weight"),
    ],
)  # fmt: skip
def test_odd_metadata_are_refused(
    family: str, metadata: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    write_mamba_gguf(tmp_path / "model.gguf", GGUF[family], one_type("F32"), seed=3, metadata=metadata)
    with pytest.raises(ArgosyError) as caught:
        open_model(tmp_path / "model.gguf")
    assert sentence in str(caught.value)


def test_puzzle_s_layers_have_their_own_numbers_of_experts_and_widths() -> None:
    raw = nemotron_h_puzzle()
    config = parse(raw)
    assert (config.experts_per_token, config.expert_width) == (3, 17)
    assert [(config.chosen_in(i), config.expert_width_in(i)) for i in config.moe_layers] == [(3, 10), (1, 17)]
    assert config.mean_experts_per_token == 2
    everything, active = count_parameters(config)
    assert everything - active == 2 * 12 * ((6 - 3) * 10 + (6 - 1) * 17)
    even = nemotron_h_puzzle(experts=((2, 14), (2, 14)))
    assert parse(even) == replace(parse(nemotron_h(moe_latent_size=12)), family="nemotron_h_puzzle")


def test_puzzle_s_common_sizes_may_be_inside_or_outside_of_its_blocks() -> None:
    """NVIDIA's code drops outside what is inside, and other spellings of the kinds of layers."""
    raw = nemotron_h_puzzle()
    inside = {key: raw.pop(key) for key in ("moe_latent_size", "moe_shared_expert_intermediate_size")}
    raw["block_configs"] = [
        block | inside if block["block_type"] == "moe" else block for block in raw["block_configs"]
    ]
    raw |= {"blockwise_members": sorted(inside), "layers_block_type": None, "moe_latent_size": 99}
    assert parse(raw) == parse(nemotron_h_puzzle())
    raw["block_configs"][1]["moe_latent_size"] = None  # outside, it has another value
    with pytest.raises(ArgosyError, match="block_configs gives moe_latent_size as 99 and 12"):
        parse(raw)


@pytest.mark.parametrize(
    ("number", "changes", "sentence"),
    [
        (0, {"block_type": "gate"}, "block_configs[0] asks for block_type 'gate'; supported: mamba, attention"),
        (0, {"intermediate_size": 4}, "block_configs[0] sets intermediate_size to 4, but nemotron_h_puzzle does not"),
        (1, {"num_experts_per_tok": None}, "block_configs[1]: num_experts_per_tok is null"),
        (1, {"num_experts_per_tok": 7}, "num_experts_per_tok is 7, a whole number; expected a whole number from 1"),
        (1, {"moe_intermediate_size": "8"}, "block_configs[1]: moe_intermediate_size is '8', text"),
        (1, {"n_routed_experts": 5}, "gives n_routed_experts as 5 and 6; supported: layers of one kind differ only in"),
        (2, {"ssm_state_size": 8}, "gives ssm_state_size as 12 and 8; supported: layers of one kind"),
        (3, {"sliding_window": 8}, "asks for sliding_window 8; supported: null"),
        (3, {"q_indexer_top_k": 8}, "block_configs[3] sets q_indexer_top_k to 8"),
    ],
)  # fmt: skip
def test_unsupported_puzzles_are_refused_by_name(number: int, changes: dict[str, Any], sentence: str) -> None:
    raw = nemotron_h_puzzle()
    raw["block_configs"][number] |= changes
    with pytest.raises(ArgosyError) as caught:
        parse(raw)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("blocks", [None, [], {}, [1], "M"])
def test_a_puzzle_needs_its_blocks(blocks: object) -> None:
    with pytest.raises(CheckpointError, match="expected block_configs with an object for each layer"):
        parse(nemotron_h_puzzle() | {"block_configs": blocks})


# As large as Nemotron-Labs-3-Puzzle-75B-A9B, with five widths and seven numbers of experts as there, not in its order.
UNEVEN = (
    (4, 1280), (6, 1280), (8, 1280), (8, 1280), (10, 1280), (10, 1536), (12, 1536), (14, 1792), (14, 2048), (18, 2688),
)  # fmt: skip
LIKE_THE_RELEASED = nemotron_h_puzzle(
    published.NEMOTRON_3_SUPER["hybrid_override_pattern"],
    UNEVEN * 4,
    **published.nemotron_h(**published.NEMOTRON_3_SUPER, model_type="nemotron_h_puzzle", ssm_state_size=96),
)


def test_puzzle_is_planned_and_shown_from_its_config_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LIKE_THE_RELEASED))
    assert main(["show", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "parameters    75 B, 9.33 B active per token" in shown
    assert "512 per layer, 4 to 18 per token, width 1280 to 2688" in shown
    assert main(["plan", str(path), "--json", "--memory", "32GiB"]) == 0
    assert json.loads(capsys.readouterr().out)["curve"][-1]["num_slots"] == 40 * 512


def test_slots_for_experts_of_five_widths_waste_little_memory() -> None:
    """There are at most four kinds of slots; with one, each slot would be 1.68 times as large as a mean expert."""
    files = assume_pack(parse(LIKE_THE_RELEASED), "q4", Path("config.json"))
    layout = lay_out(files.experts, experts_per_token=files.config.experts_per_token)
    sizes = [record.nbytes for record in files.experts.values()]
    mean = sum(sizes) / len(sizes)
    assert len(layout.kinds) == 4
    assert max(sizes) > 1.6 * mean
    assert layout.slot_bytes < 1.05 * mean
    work = work_of(files, "f16")
    chosen = sum(
        files.config.chosen_in(layer) * files.experts[layer, 0].nbytes for layer in files.config.moe_layers
    )
    assert work.routed_token_bytes() == pytest.approx(chosen)


def test_routing_is_recorded_only_if_layers_choose_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> Any:
        raise AssertionError("opened a recorder")

    directory, config = tmp_path / "model", nemotron_h_puzzle()
    write_model(directory, config, seed=1)
    with Engine.open(directory, memory="4GiB", threads=1, recorder=refuse) as engine:
        engine.generate(prompt_ids(config, 1), SamplingParams(max_tokens=3, temperature=0))
    (tmp_path / "text.txt").write_text("a b")
    assert main(["routes", str(directory), str(tmp_path / "text.txt"), "--memory", "2GiB"]) != 0
    assert "recordings need the same number in every layer" in capsys.readouterr().err


def test_a_damaged_decay_rate_is_refused(tmp_path: Path) -> None:
    directory = write_model(tmp_path, nemotron_h(), seed=1)
    tensors = read_checkpoint(directory)
    tensors["backbone.layers.0.mixer.A_log"][2] = np.float32(200)
    write_checkpoint(directory, {name: ("F32", tensor) for name, tensor in tensors.items()})
    with (
        pytest.raises(ArgosyError, match=r"layers\.0\.mamba_rate gives head 2"),
        Engine.open(directory, memory="4GiB", threads=1),
    ):
        pass


@pytest.mark.parametrize("kind", ["fp8 tensor", "nvfp4"])
def test_nvidia_s_quantised_nemotrons_run(kind: str, tmp_path: Path) -> None:
    config = GGUF["nemotron_h"] | {"num_nextn_predict_layers": 0}
    reference = NumpyModel(write_kind(tmp_path / "model", config, KINDS[kind], seed=1))
    prompt = prompt_ids(config, 1)
    with Engine.open(tmp_path / "model", memory="4GiB", threads=1) as engine:
        logits = engine.logits(prompt)
    assert mean_divergence(reference.logits(prompt), logits) <= 2e-3
