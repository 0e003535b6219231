"""Llama-Guard-4 sees with Llama-4's tower: its answers about pictures are those of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest

from argosy import _native
from tests.engine.test_seeing import opened, prompt_of, require_answer, with_reference_pictures
from tests.models.make_seeing import answer, load, media_of
from tests.models.seeing import with_towers, write
from tests.models.tiny_llama4 import GUARD, OF_GGUF, llama4

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("one_quiet_thread")]


@pytest.mark.parametrize("seed", [11, 12])
def test_a_guard_without_experts_sees_as_in_transformers(seed: int, tmp_path: Path) -> None:
    write(tmp_path, "llama4", with_towers("llama4", llama4(**OF_GGUF | GUARD)), seed)
    media = media_of("llama4", seed)
    found = answer(load(tmp_path, "llama4"), tmp_path, "llama4", media)
    # The largest instruction set multiplies in bfloat16 where it can.
    sets = _native.instruction_sets()
    with opened(tmp_path, instruction_set=sets[min(2, len(sets)) - 1]) as engine:
        with_reference_pictures(engine, "llama4")
        require_answer(engine, prompt_of(engine, media | found), found["logits"][-1], found["greedy"])
