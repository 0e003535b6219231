"""The scripts here reproduce the committed references, and two implementations agree on them."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from argosy.model.families import FAMILIES
from tests.models.configurations import CONFIGURATIONS, Configuration
from tests.models.numpy_model import NumpyModel
from tests.models.references import DIRECTORY, REFERENCES, Reference, difference
from tests.models.rows import rows
from tests.models.safetensors_file import read_checkpoint
from tests.models.tiny import prompt_ids, random_tensors, text_of


def test_every_family_has_a_row() -> None:
    """Lists of families in tests are read from the rows, so a missing one would leave its family out of them all."""
    assert {family.MODEL_TYPE for family in FAMILIES.values()} <= rows().keys() <= FAMILIES.keys()
    for name, row in rows().items():
        assert row.gguf in (None, FAMILIES[name].GGUF_ARCHITECTURE), name


def test_every_configuration_has_a_reference() -> None:
    assert {reference.name for reference in REFERENCES} == {c.name for c in CONFIGURATIONS}


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda configuration: configuration.name)
def test_config_weights_and_prompt_follow_from_the_seed(configuration: Configuration) -> None:
    reference = Reference(DIRECTORY / configuration.name)
    seed = json.loads((reference.directory / "reference.json").read_text())["seed"]
    assert json.loads((reference.directory / "config.json").read_text()) == configuration.config
    assert reference.input_ids == prompt_ids(configuration.config, seed)
    stored = read_checkpoint(reference.directory)
    expected = random_tensors(configuration.config, seed, configuration.dtype)
    assert stored.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(stored[name], tensor, err_msg=name)


each_reference = pytest.mark.parametrize("reference", REFERENCES, ids=lambda reference: reference.name)


@each_reference
def test_the_numpy_model_agrees_with_transformers(reference: Reference) -> None:
    """In one pass over the prompt and its continuation, whose tokens are the best after those before them."""
    model, num_prompt = NumpyModel(reference.directory), len(reference.input_ids)
    logits = model.logits([*reference.input_ids, *reference.greedy[:-1]])
    assert logits[num_prompt - 1 :].argmax(axis=-1).tolist() == reference.greedy
    assert difference(logits[:num_prompt], reference.logits) < 1e-5


@pytest.mark.full
@each_reference
def test_the_numpy_model_generates_what_transformers_does(reference: Reference) -> None:
    model = NumpyModel(reference.directory)
    assert difference(model.logits(reference.input_ids), reference.logits) < 1e-5
    assert model.greedy(reference.input_ids, len(reference.greedy)) == reference.greedy


def test_no_reference_depends_on_a_near_tie() -> None:
    for reference in REFERENCES:
        facts = json.loads((reference.directory / "reference.json").read_text())
        assert facts["smallest_router_margin"] > 1e-4, reference.name
        assert facts["smallest_greedy_margin"] > 1e-3, reference.name


def test_the_references_cover_every_flag() -> None:
    configs = [
        text_of(configuration.config) | {"model_type": configuration.config["model_type"]}
        for configuration in CONFIGURATIONS
    ]
    ropes = [config.get("rope_parameters") or config.get("rope_scaling") or {} for config in configs]
    kinds = {rope.get("rope_type", rope.get("type")) for rope in ropes}

    assert len(REFERENCES) >= 14
    families = Counter(config["model_type"] for config in configs)
    assert families.keys() == {name for name, row in rows().items() if not row.without_references}
    assert families["qwen3_next"] >= 4
    assert families["qwen3_5_moe"] + families["qwen3_5_moe_text"] >= 4
    assert kinds >= {"default", "linear", "dynamic", "yarn", "llama3"}
    assert {"rope_parameters" in config for config in configs} == {True, False}
    for flag in (
        "tie_word_embeddings",
        "norm_topk_prob",
        "use_sliding_window",
        "attention_bias",
        "rope_interleave",
    ):
        assert {config[flag] for config in configs if flag in config} == {True, False}, flag
    assert {configuration.dtype for configuration in CONFIGURATIONS} == {"BF16", "F16", "F32"}
    assert max(configuration.num_shards for configuration in CONFIGURATIONS) > 1
