"""GGUF files of llama.cpp's own converter: the same answers as the checkpoint, as transformers and as llama.cpp.

`ARGOSY_LLAMA_CPP` names a directory with `convert_hf_to_gguf.py`; without it these tests are skipped, and without
llama.cpp itself (`test_peer.py`) the comparison with its logits.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from argosy import Engine, SamplingParams
from argosy.checkpoint.gguf import read_gguf
from argosy.model.families import FAMILIES, open_model
from tests.models.configurations import CONFIGURATIONS
from tests.models.converted import CONVERTED, LLAMA_CPP_DIFFERS
from tests.models.converter import LLAMA_CPP, convert_all
from tests.models.make_models import load
from tests.models.references import LARGEST_DIFFERENCE, difference, mean_divergence
from tests.models.rows import NO_CONVERTER, row_of, rows
from tests.models.runnable import runnable
from tests.models.safetensors_file import Array
from tests.models.tiny import RawConfig, prompt_ids, write_model
from tests.oracle.test_peer import PEER, peer_logits

pytestmark = [
    pytest.mark.skipif(not LLAMA_CPP.exists(), reason=f"no llama.cpp: {LLAMA_CPP} does not exist"),
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("one_quiet_thread"),
]

# Mean KL in nats. llama.cpp looks gelu up in a table of 16 bits, which costs 2e-5; a wrong flag costs more than 1e-3.
LARGEST_DIVERGENCE = 1e-4


SEED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """A checkpoint as the hub has it, its GGUF file, a prompt, and what transformers answers to it."""

    checkpoint: Path
    gguf: Path
    prompt: list[int]
    expected: Array


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Converted]:
    root = tmp_path_factory.mktemp("converted")
    found = {name: _made(root / name, config) for name, (_, config) in CONVERTED.items()}
    convert_all([(one.checkpoint, one.gguf) for one in found.values()])
    return found


def _made(directory: Path, config: RawConfig) -> Converted:
    """Write a checkpoint, which is not converted yet."""
    write_model(directory, config, seed=SEED)
    model, prompt = load(directory), prompt_ids(config, SEED)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([prompt])).logits[0].numpy()
    if (constants := row_of(config).constants) is not None:
        path = directory / "model.safetensors"
        whole = load_file(path) | {name: torch.tensor(values) for name, values in constants(config).items()}
        save_file(whole, path)
    released = row_of(config).released
    config = {"architectures": [type(model).__name__], **(released(config) if released else config)}
    (directory / "config.json").write_text(json.dumps(config))
    return Converted(
        checkpoint=directory, gguf=directory.with_suffix(".gguf"), prompt=prompt, expected=expected
    )


@pytest.mark.parametrize("name", CONVERTED)
def test_a_converted_model_answers_as_its_checkpoint_as_transformers_and_as_llama_cpp(
    name: str, converted: dict[str, Converted], tmp_path: Path
) -> None:
    one, architecture = converted[name], CONVERTED[name][0]
    assert read_gguf(one.gguf).text("general.architecture") == architecture
    greedy = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    logits, answers = [], []
    for place in (runnable(one.checkpoint, tmp_path), one.gguf):
        with Engine.open(place, memory="4GiB", kv_dtype="f32", threads=1) as engine:
            logits.append(engine.logits(one.prompt))
            answers.append(engine.generate(one.prompt, greedy).token_ids)
    assert difference(logits[1], one.expected) <= LARGEST_DIFFERENCE
    assert difference(logits[1], logits[0]) <= LARGEST_DIFFERENCE
    assert answers[0] == answers[1]
    assert open_model(one.gguf).config.num_layers == open_model(one.checkpoint).config.num_layers
    if PEER.exists():
        # Negative bounds of yarn are those of the file; the class has its own otherwise.
        peer = peer_logits(one.gguf, one.prompt, yarn_beta_fast=-1.0, yarn_beta_slow=-1.0)
        is_equal = mean_divergence(peer, logits[1]) <= LARGEST_DIVERGENCE
        assert is_equal == (name not in LLAMA_CPP_DIFFERS), LLAMA_CPP_DIFFERS.get(name, "")


def test_every_family_has_a_file_or_says_why_not(tmp_path: Path) -> None:
    written = {FAMILIES[config["model_type"]].MODEL_TYPE for _, config in CONVERTED.values()}
    for family in {family.MODEL_TYPE for family in FAMILIES.values()} - written:
        row = rows()[family]
        if row.without_references or row.without_converted:
            continue
        assert row.without_record == NO_CONVERTER, family
        config = next(one.config for one in CONFIGURATIONS if one.config["model_type"] == family)
        write_model(tmp_path / family, config, seed=SEED)
        with pytest.raises(RuntimeError, match="not supported"):
            convert_all([(tmp_path / family, tmp_path / f"{family}.gguf")])
