"""GGUF files of llama.cpp's own converter: the same answers as the checkpoint, as transformers and as llama.cpp.

`ARGOSY_LLAMA_CPP` names a directory with `convert_hf_to_gguf.py`; without it these tests are skipped, and without
llama.cpp itself (`test_peer.py`) the comparison with its logits.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from argosy import Engine, SamplingParams
from argosy.checkpoint.gguf import read_gguf
from argosy.model.families import open_model
from tests.models.converted import CONVERTED
from tests.models.converter import LLAMA_CPP, convert_all
from tests.models.make_models import load
from tests.models.references import LARGEST_DIFFERENCE, difference, mean_divergence
from tests.models.runnable import runnable
from tests.models.tiny import prompt_ids, write_model
from tests.oracle.test_peer import PEER, peer_logits

pytestmark = [
    pytest.mark.skipif(not LLAMA_CPP.exists(), reason=f"no llama.cpp: {LLAMA_CPP} does not exist"),
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("one_quiet_thread"),
]

# Mean KL in nats. llama.cpp looks gelu up in a table of 16 bits, which costs 2e-5; a wrong flag costs more than 1e-3.
LARGEST_DIVERGENCE = 1e-4


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """By name, a checkpoint and its GGUF file."""
    root = tmp_path_factory.mktemp("converted")
    pairs = {name: (root / name, root / f"{name}.gguf") for name in CONVERTED}
    for name, (directory, _) in pairs.items():
        config = dict(CONVERTED[name][1])
        directory.mkdir()
        write_model(directory, config, seed=5)
        if "architectures" not in config:
            config["architectures"] = [type(load(directory)).__name__]
            (directory / "config.json").write_text(json.dumps(config))
    convert_all(list(pairs.values()))
    return pairs


@pytest.mark.parametrize("name", CONVERTED)
def test_a_converted_model_answers_as_its_checkpoint_as_transformers_and_as_llama_cpp(
    name: str, converted: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    directory, path = converted[name]
    architecture, config = CONVERTED[name]
    assert read_gguf(path).text("general.architecture") == architecture
    prompt = prompt_ids(config, 5)
    greedy = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    logits, answers = [], []
    for place in (runnable(directory, tmp_path), path):
        with Engine.open(place, memory="4GiB", kv_dtype="f32", threads=1) as engine:
            logits.append(engine.logits(prompt))
            answers.append(engine.generate(prompt, greedy).token_ids)
    with torch.no_grad():
        expected = load(directory)(input_ids=torch.tensor([prompt])).logits[0].numpy()
    assert difference(logits[1], expected) <= LARGEST_DIFFERENCE
    assert difference(logits[1], logits[0]) <= LARGEST_DIFFERENCE
    assert answers[0] == answers[1]
    np.testing.assert_equal(open_model(path).config.num_layers, open_model(directory).config.num_layers)
    if PEER.exists():
        assert mean_divergence(peer_logits(path, prompt), logits[1]) <= LARGEST_DIVERGENCE
