"""How tokens are chosen where a request does not say: the checkpoint's own word, read strictly."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufArray, read_gguf
from argosy.checkpoint.pack import pack
from argosy.checkpoint.sampling import declared_sampling
from argosy.config import CHOOSING, SamplingDefaults, SamplingParams
from argosy.errors import CheckpointError, UsageError
from argosy.model.families import open_model
from tests.library.caches import GGUF
from tests.models.tiny import qwen3_moe, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("sampling") / "model", qwen3_moe(), seed=1)


def says(files: ModelFiles, directory: Path, content: dict[str, Any] | str) -> SamplingDefaults:
    """What the model declares with this `generation_config.json`."""
    text = content if isinstance(content, str) else json.dumps(content)
    (directory / "generation_config.json").write_text(text)
    return declared_sampling(replace(files, path=directory))


def differing(found: SamplingDefaults) -> dict[str, float]:
    """The values that have an effect."""
    off = {"temperature": 1, "top_p": 1, "repetition_penalty": 1}
    return {name: value for name, value in found.as_dict().items() if value != off.get(name, 0)}


def test_a_checkpoint_that_says_nothing_gets_argosys_defaults(model: Path, tmp_path: Path) -> None:
    files = open_model(model)
    for found in (declared_sampling(files), says(files, tmp_path, {"eos_token_id": 2, "max_length": 20})):
        assert found == SamplingDefaults()
    assert SamplingDefaults().temperature == 0.8


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"temperature": 0.6, "top_k": 20, "top_p": 0.95}, {"temperature": 0.6, "top_k": 20, "top_p": 0.95}),
        ({"do_sample": True}, {}),  # the makers' values are those that have no effect
        ({"do_sample": False}, {"temperature": 0}),
        ({"do_sample": False, "temperature": 0.9}, {"temperature": 0}),
        ({"repetition_penalty": 1.05}, {"repetition_penalty": 1.05}),
        ({"temperature": 1, "top_k": -1, "min_p": None, "num_beams": 1}, {}),
        ({"top_k": 40.0, "temperature": 0}, {"top_k": 40, "temperature": 0}),
        ({"top_k": 2**60}, {}),
    ],
)
def test_generation_config_is_taken_at_its_word_and_kept_by_packs(
    model: Path, tmp_path: Path, content: dict[str, Any], expected: dict[str, float]
) -> None:
    found = says(open_model(model), tmp_path, content)
    assert differing(found) == expected
    assert (found.source, found.notes) == ("generation_config.json", ())


def test_a_pack_declares_what_its_source_declares(model: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file in model.iterdir():
        (source / file.name).symlink_to(file)
    (source / "generation_config.json").write_text('{"temperature": 0.3}')
    pack(open_model(source), tmp_path / "pack", format="source")
    assert declared_sampling(open_model(tmp_path / "pack")).temperature == 0.3


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("temperature", "hot", "hot and has no effect: it must be a number"),
        ("temperature", True, "True and has no effect: it must be a number"),
        ("temperature", -1, "must be from 0 to 100"),
        ("temperature", [0.5] * 1000, "a list and has no effect"),
        ("top_p", 0, "must be above 0, at most 1"),
        ("top_k", 1.5, "it must be a whole number"),
        ("do_sample", "yes", "it must be true or false"),
        ("num_beams", 4, "4, which is not supported and has no effect"),
    ],
)
def test_a_wrong_or_unsupported_value_is_noted_and_has_no_effect(
    model: Path, tmp_path: Path, name: str, value: object, why: str
) -> None:
    found = says(open_model(model), tmp_path, {name: value, "min_p": 0.1})
    assert differing(found) == {"min_p": 0.1}
    assert len(found.notes) == 1
    assert found.notes[0].startswith(f"generation_config.json: {name} is ")
    assert why in found.notes[0]
    assert len(found.notes[0]) < 250


@pytest.mark.parametrize(
    "content", ["[]", '{"temperature": NaN}', '{"top_k": 1, "top_k": 2}', '{"min_p": 1e999}', "{"]
)
def test_json_that_two_readers_read_differently_is_refused(model: Path, tmp_path: Path, content: str) -> None:
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        says(open_model(model), tmp_path, content)


def test_the_keys_of_llama_cpp_are_read_in_a_gguf() -> None:
    header = read_gguf(GGUF / "model.gguf")
    array = GgufArray(header.path, "general.sampling.min_p", 6, 1, bytes(4))
    said = {
        "general.sampling.temp": 0.6000000238418579, "general.sampling.top_k": 20,
        "general.sampling.top_p": 0.949999988079071,
        "general.sampling.penalty_repeat": 1.0499999523162842, "general.sampling.mirostat": 0,
        "general.sampling.sequence": "top_k;temp", "general.sampling.min_p": array,
    }  # fmt: skip
    files = open_model(GGUF / "model.gguf")
    assert declared_sampling(files) == SamplingDefaults()
    found = declared_sampling(replace(files, header=replace(header, metadata={**header.metadata, **said})))
    assert differing(found) == {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05}
    assert found.notes == ()


def test_a_request_goes_before_an_operator_and_an_operator_before_the_checkpoint() -> None:
    checkpoint = SamplingDefaults(temperature=0.6, top_k=20, top_p=0.9)
    params = SamplingParams.asked({"top_p": 0.5}).fill_in(checkpoint.overridden({"top_k": 7, "top_p": 0.8}))
    assert (params.temperature, params.top_k, params.top_p) == (0.6, 7, 0.5)
    assert params.max_tokens is None
    assert not params.left_to_model


def test_parameters_that_a_program_gives_are_complete() -> None:
    assert SamplingParams().fill_in(SamplingDefaults(temperature=0.9)) == SamplingParams()
    assert set(CHOOSING) <= set(SamplingParams.__dataclass_fields__)
    with pytest.raises(UsageError, match="unknown setting 'heat'"):
        SamplingParams.asked({"heat": 1})
