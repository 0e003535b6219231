"""The metadata that llama.cpp's converters write for every announced model means the same as its config.json.

The record is `gguf_converted.json`; `convert_published.py` makes it, by running the converters of llama.cpp.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import pytest
from gguf import GGUFWriter

from argosy.checkpoint.geometry import dense_shapes
from argosy.checkpoint.gguf import GgufFile, read_gguf
from argosy.checkpoint.safetensors import TensorRef
from argosy.checkpoint.vocabulary.byte_level import WORDS
from argosy.config import (
    AttentionConfig,
    DeltaConfig,
    KimiDeltaConfig,
    LatentConfig,
    MambaConfig,
    ModelConfig,
)
from argosy.errors import CheckpointError
from argosy.model.families import FAMILIES, gguf_families
from argosy.model.families.wrappers import gemma4_gguf
from tests.families.convert_published import RECORD, configs
from tests.helpers.mixers import in_float32
from tests.models.rows import rows

Metadata = dict[str, Any]

CONVERTED: dict[str, Metadata] = json.loads(RECORD.read_text())
MADE_WITH = CONVERTED.pop("made with")
CONFIGS = configs()
# The first of each, which for `llama` is a mixture.
ARCHITECTURES = {CONVERTED[name]["general.architecture"]: name for name in reversed(CONVERTED)}
# Keys that the recorded commit of llama.cpp writes and the `gguf` package on PyPI does not know yet.
NEWER_THAN_THE_PACKAGE = {
    "attention.indexer.block_size", "attention.indexer.local_blocks", "attention.indexer.types",
    "attention.recurrent_layers", "attention.value_scale", "kda.gate_lower_bound", "kda.safe_gate",
    "attention.indexer.kpool", "attention.indexer.kpool_select_tail", "hyper_connection.count",
    "hyper_connection.epsilon", "hyper_connection.magnitude", "hyper_connection.sinkhorn_iterations",
}  # fmt: skip

LAYOUT_OF_DELTA = ("has_joined_qkvz", "has_joined_ba", "is_tiled", "is_rate_log")

each_model = pytest.mark.parametrize("name", CONVERTED)


@pytest.fixture(autouse=True)
def without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make readers stop after the metadata: they return the config and look for no tensors."""
    for name, module in list(sys.modules.items()):
        if name.startswith("argosy.model.families.") and hasattr(module, "read_gguf_layout"):
            monkeypatch.setattr(module, "read_gguf_layout", lambda file, config, **_: config)
    turning = (1.0,) * 64 + (1e30,) * 192  # what Gemma-4's `rope_freqs.weight` holds
    monkeypatch.setattr(gemma4_gguf, "frequency_factors", lambda file, head_dim: turning)


def hub_config(name: str) -> ModelConfig:
    config = CONFIGS[name]
    if name == "Hunyuan-A13B":  # the converter writes the context that alpha was chosen for
        config = config | {"max_position_embeddings": 262_144}
    return FAMILIES[config["model_type"]].parse_config(config)


def deciding_tensors(config: ModelConfig, architecture: str) -> dict[str, tuple[int, ...]]:
    """The tensors that tell readers what the metadata does not."""
    shapes = {"token_embd.weight": (config.vocab_size, config.hidden_size)}
    needed = {name for name, _ in dense_shapes(config)}
    probe = next(iter(config.moe_layers), 0)
    present = {
        "output.weight": not config.is_embedding_tied,
        "blk.0.attn_q.bias": "layers.0.q_bias" in needed,
        "blk.0.attn_q_norm.weight": "layers.0.q_norm" in needed,
        f"blk.{probe}.exp_probs_b.bias": config.router.has_choice_bias,
        "blk.0.indexer.attn_q_b.weight": "layers.0.index_q" in needed,
        f"blk.{probe}.exp_probs_b": architecture == "hy_v3",
        f"blk.{probe}.ffn_gate_inp.weight": architecture == "hy_v3",
        "blk.0.ssm_ba.weight": architecture == "qwen3next",
        "blk.0.ssm_alpha.weight": architecture == "qwen35moe",
        "rope_freqs.weight": architecture == "gemma4",
        "blk.0.ffn_down_exps.scale": config.router.has_expert_scale,
        "blk.0.ssm_conv1d.bias": "layers.0.mamba_conv_bias" in needed,
    }
    if architecture in ("mimo2", "step35"):  # a layer's own tensors decide
        present |= {f"blk.{i}.ffn_gate_inp.weight": True for i in config.moe_layers}
        present |= {
            f"blk.{i}.attn_sinks.weight": isinstance(layer.mixer, AttentionConfig) and layer.mixer.has_sinks
            for i, layer in enumerate(config.layers)
        }
    return shapes | {name: (1,) for name, is_there in present.items() if is_there}


def write_converted(
    name: str, path: Path, more: Mapping[str, Any] = MappingProxyType({})
) -> tuple[GgufFile, str]:
    """A file with the metadata of `name`, updated by `more`, and its architecture."""
    metadata = {**CONVERTED[name], **more}
    architecture = metadata["general.architecture"]
    writer = GGUFWriter(path, architecture)
    for key, value in metadata.items():
        add(writer, key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    tensors = {
        tensor: TensorRef(tensor, path, 0, 0, "F32", shape)
        for tensor, shape in deciding_tensors(hub_config(name), architecture).items()
    }
    return replace(read_gguf(path), tensors=tensors), architecture


def read_converted(file: GgufFile, architecture: str) -> ModelConfig:
    found: Any = gguf_families()[architecture].open_gguf(file)
    assert isinstance(found, ModelConfig)
    return found


def open_converted(name: str, path: Path, more: Mapping[str, Any] = MappingProxyType({})) -> ModelConfig:
    """The config that Argosy reads from a file with the metadata of `name`, updated by `more`."""
    return read_converted(*write_converted(name, path, more))


def add(writer: GGUFWriter, key: str, value: Any) -> None:
    match value:
        case None:
            pass
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            if key != "general.architecture":  # the writer adds this key itself
                writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def test_every_family_is_recorded_or_says_why_not() -> None:
    recorded = {CONFIGS[name]["model_type"] for name in CONVERTED}
    names: dict[str, set[str]] = {}
    for name, family in FAMILIES.items():
        names.setdefault(family.MODEL_TYPE, set()).add(name)
    without = {family for family, of_family in names.items() if not of_family & recorded}
    assert without == {family for family in names if rows()[family].without_record}
    # Of an architecture, one family is enough.
    of_them = {one for one, family in gguf_families().items() if family.MODEL_TYPE not in without}
    assert of_them <= {*ARCHITECTURES}


def with_frequencies_in_a_tensor(config: ModelConfig) -> ModelConfig:
    """Return the config with rotary embeddings that llama3's rule does not scale: `rope_freqs.weight` does."""
    layers = []
    for layer in config.layers:
        assert isinstance(layer.mixer, AttentionConfig)
        rope = layer.mixer.rope and replace(
            layer.mixer.rope, kind="default", factor=1.0, original_context=config.context_tokens,
            high_freq_factor=4.0,
        )  # fmt: skip
        layers.append(replace(layer, mixer=replace(layer.mixer, rope=rope)))
    return replace(config, layers=tuple(layers))


def with_plain_spellings(config: ModelConfig) -> ModelConfig:
    """Return the config with one spelling of what means the same: a head's own scale, a context that scales nothing."""
    layers = []
    for layer in config.layers:
        mixer = layer.mixer
        if isinstance(mixer, AttentionConfig | LatentConfig):
            rope = mixer.rope
            if rope is not None and rope.kind == "default":
                rope = replace(rope, original_context=0)
            scale = 0.0 if mixer.scale == pytest.approx(mixer.head_dim**-0.5) else mixer.scale
            mixer = replace(mixer, rope=rope, scale=scale)
        layers.append(replace(layer, mixer=mixer))
    router = config.router
    if router.renormalize_eps <= 1e-20:
        router = replace(router, renormalize_eps=0.0)
    return replace(config, layers=tuple(layers), router=router)


@each_model
def test_converted_metadata_means_the_same_as_config_json(name: str, tmp_path: Path) -> None:
    found, expected = open_converted(name, tmp_path / "model.gguf"), hub_config(name)
    expected = expected.with_mixers(LatentConfig, is_up_split=True).with_mixers(
        KimiDeltaConfig, is_rate_log=False
    )
    if expected.family in ("llama4", "step3p5", "step3p7"):
        expected = with_frequencies_in_a_tensor(expected)
    if found.delta is not None and expected.delta is not None:
        assert found.delta.sizes == expected.delta.sizes
        layout = {name: getattr(found.delta, name) for name in LAYOUT_OF_DELTA}
        expected = expected.with_mixers(DeltaConfig, **layout)
    expected = in_float32(expected)
    if (
        expected.latent is None and expected.ropes and expected.ropes[0].kind == "llama3"
    ):  # the tensor rope_freqs.weight scales
        assert found.ropes[0].theta == expected.ropes[0].theta
        expected = expected.with_mixers(AttentionConfig, rope=found.ropes[0])
    mambas = [layer.mixer for layer in expected.layers if isinstance(layer.mixer, MambaConfig)]
    if mambas:  # rates are stored as they are, and the length of the context is not
        expected = expected.with_mixers(MambaConfig, is_rate_log=False)
        expected = replace(expected, context_tokens=2**20)
    found, expected = with_plain_spellings(found), with_plain_spellings(expected)
    # These fields differ: a GGUF decides them by tensors, which are not here, or the conversion has changed them.
    assert found == replace(
        expected,
        family=found.family,
        eos_ids=found.eos_ids,
        bos_id=found.bos_id,
        dense_width=found.dense_width
        if all(layer.is_moe or not layer.has_network for layer in expected.layers)
        else expected.dense_width,
        num_mtp_layers=found.num_mtp_layers,
        normed_residual=float(f"{expected.normed_residual:.8g}"),  # a float32
        norm_offset=found.norm_offset,
    )


@each_model
def test_its_tokenizer_is_known(name: str) -> None:
    pre = CONVERTED[name]["tokenizer.ggml.pre"]
    assert (
        pre in WORDS
        if pre is not None
        else CONFIGS[name]["model_type"]
        in ("mixtral", "mistral", "gemma3", "gemma3_text", "gemma4", "ernie4_5_moe")
    )


def templates(keys: type = gguf.Keys) -> Iterator[str]:
    """Every key that the installed `gguf` package has for an architecture, without its namespace."""
    for value in vars(keys).values():
        if isinstance(value, type):
            yield from templates(value)
        elif isinstance(value, str) and value.startswith("{arch}."):
            yield value.removeprefix("{arch}.")


@each_model
def test_the_recorded_keys_are_those_of_the_gguf_package(name: str) -> None:
    prefix = CONVERTED[name]["general.architecture"] + "."
    written = {key.removeprefix(prefix) for key in CONVERTED[name] if key.startswith(prefix)}
    assert written - set(templates()) <= NEWER_THAN_THE_PACKAGE


# Keys that may have any value: they concern vision, training, or a scaling or layers that the model does not have.
HARMLESS = {
    "feed_forward_length",
    "n_deepstack_layers",
    "rope.dimension_sections",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
}
DEFAULTS = {
    ("attention.causal", True),
    ("expert_weights_norm", True),
    ("pooling_type", 3),
}  # the same as an absent key


@pytest.mark.parametrize("values", [(3,), pytest.param((3.5, True, "odd"), marks=pytest.mark.full)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_any_other_key_changes_the_model_or_is_refused_by_name(
    architecture: str, values: tuple[Any, ...], tmp_path: Path
) -> None:
    name = ARCHITECTURES[architecture]
    file, _ = write_converted(name, tmp_path / "model.gguf")
    plain = read_converted(file, architecture)
    others = [
        key for key in sorted(set(templates()) - HARMLESS) if f"{architecture}.{key}" not in CONVERTED[name]
    ]
    assert len(others) > 50
    # llama.cpp does not scale if the type is "none", whatever the factor, and there may be nothing to scale.
    scales = plain.ropes and CONVERTED[name].get(f"{architecture}.rope.scaling.type") != "none"
    unnoticed = []
    for key in others:
        for value in values:
            odd = replace(file, metadata={**file.metadata, f"{architecture}.{key}": value})
            try:
                config = read_converted(odd, architecture)
            except CheckpointError as refusal:
                is_noticed = key in str(refusal)
            else:
                is_noticed = config != plain or (key, value) in DEFAULTS
            if key == "rope.scaling.factor" and not scales:
                is_noticed = True
            if not is_noticed:
                unnoticed.append((key, value))
    assert not unnoticed


def test_glm_5_3_scores_with_a_sigmoid_if_the_file_does_not_say(tmp_path: Path) -> None:
    """The converter leaves the key out if config.json does, and llama.cpp takes the sigmoid then."""
    file, _ = write_converted(ARCHITECTURES["glm5-next"], tmp_path / "model.gguf")
    silent = {key: value for key, value in file.metadata.items() if key != "glm5-next.expert_gating_func"}
    assert len(silent) == len(file.metadata) - 1
    found = [read_converted(one, "glm5-next") for one in (file, replace(file, metadata=silent))]
    assert found[0] == found[1]


@pytest.mark.parametrize("number", [float("inf"), float("nan"), -1.0, 1e10])
def test_sections_that_are_no_whole_numbers_are_refused(number: float, tmp_path: Path) -> None:
    key = "qwen35moe.rope.dimension_sections"
    with pytest.raises(CheckpointError, match=rf"{key} is .*, expected three whole numbers from 0"):
        open_converted("Qwen3.6-35B-A3B", tmp_path / "odd.gguf", {key: [number] * 3 + [0.0]})
