"""A part of an adapter that cannot be read ends only the answers with that adapter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from argosy import Engine, SamplingParams
from argosy.adapters import needs, registry
from argosy.adapters.files import AdapterFiles
from argosy.checkpoint.files import ModelFiles
from argosy.errors import ReadFailed
from tests.adapters.random_adapter import random_adapter
from tests.models.runnable import runnable
from tests.models.tiny import RawConfig, prompt_ids, qwen3_moe, write_model
from tests.models.tiny_delta import qwen3_next

PARAMS = SamplingParams(max_tokens=10, ignore_eos=True, temperature=0)
CONFIGS: dict[str, RawConfig] = {
    "attention": qwen3_moe(num_experts=12, max_position_embeddings=512),
    "recurrent": qwen3_next(num_experts=12, max_position_embeddings=512),
}
NAMES = [None, "one", "two", "one", None, "two"]


@pytest.fixture(autouse=True)
def _made_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths are seeds of random adapters with parts of experts."""

    def open_adapter(path: str | Path, files: ModelFiles, *, columns: str = "") -> AdapterFiles:
        return random_adapter(files.own_config, seed=int(Path(path).name), rank=2, targets={"experts", "q"})

    for module in (registry, needs):
        monkeypatch.setattr(module, "open_adapter", open_adapter)


@pytest.fixture(scope="module", params=list(CONFIGS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RawConfig]:
    config, root = CONFIGS[request.param], tmp_path_factory.mktemp("model")
    return runnable(write_model(root / "plain", config, seed=4), root), config


def open_engine(directory: Path, **options: Any) -> Engine:
    loras = {"one": "1", "two": "2"}
    return Engine.open(
        directory, **{"memory": "2GiB", "threads": 1, "expert_slots": 4, "loras": loras} | options
    )


def damage(engine: Engine, number: int) -> None:
    """Change every part of the adapter with this number."""
    assert engine.requests.adapters is not None
    file = engine.requests.adapters._part_file
    begin, end = sorted(file._used.items())[number]
    os.pwrite(file._descriptor, b"\xff" * (end - begin), begin)


@pytest.mark.parametrize("chunk_tokens", [64, 2])  # 2: what starts again runs a step that succeeds first
def test_a_damaged_part_ends_only_the_answers_with_its_adapter(
    model: tuple[Path, RawConfig], chunk_tokens: int
) -> None:
    directory, config = model
    prompts = [prompt_ids(config, seed, 5) for seed in range(len(NAMES))]
    with open_engine(directory) as engine:
        expected = [
            engine.generate(*one, adapter=name).token_ids
            for one, name in zip([(prompt, PARAMS) for prompt in prompts], NAMES, strict=True)
        ]
    with open_engine(directory, chunk_tokens=chunk_tokens) as engine:
        damage(engine, 0)
        sequences = [
            engine.submit(prompt, PARAMS, adapter=name) for prompt, name in zip(prompts, NAMES, strict=True)
        ]
        for _ in range(200):
            engine.step()
        assert not engine.has_work
        facts = engine.facts()
        assert (facts.kv_blocks_held, facts.states_held) == (0, 0)
        for name, one, tokens in zip(NAMES, sequences, expected, strict=True):
            assert one.result is not None
            if name != "one":
                assert (one.result.finish_reason, one.result.token_ids) == ("length", tokens)
                continue
            error = one.result.error
            assert isinstance(error, ReadFailed)
            assert "the part of the adapter one cannot be read" in error.message
            assert {"layer", "expert", "adapter"} <= set(error.facts)
        engine.drop_adapter("one")
        engine.load_adapter("one", "1")  # reads its files again
        found = engine.generate_batch(prompts, PARAMS, adapter=NAMES)
        assert [one.token_ids for one in found] == expected
