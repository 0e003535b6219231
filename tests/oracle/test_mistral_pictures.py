"""Pictures of Mistral-Small-3 and Ministral-3, whose text has no experts, give the answers of transformers.

The committed reference of the same tower has the text of Mistral-Small-4 (`tests/engine/test_seeing.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from argosy import _native
from tests.engine.test_seeing import opened, prompt_of, require_answer
from tests.models import make_seeing, seeing
from tests.models.tiny import RawConfig
from tests.models.tiny_ministral import mistral_small_3, wrapped_ministral3

SEED = 1  # with others, an answer may have a placeholder

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("one_quiet_thread")]


@pytest.mark.parametrize("make", [mistral_small_3, wrapped_ministral3])
def test_answers_about_pictures_equal_those_of_transformers(
    make: Callable[..., RawConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = seeing.with_towers("mistral3", make(vocab_size=72))
    monkeypatch.setitem(seeing.CONFIGS, "mistral3", raw)
    seeing.write(tmp_path, "mistral3", raw, SEED)
    media = make_seeing.media_of("mistral3", SEED)
    found = make_seeing.answer(make_seeing.load(tmp_path, "mistral3"), tmp_path, "mistral3", media)
    exact = min(2, len(_native.instruction_sets())) - 1
    with opened(tmp_path, prefix_reuse=False, instruction_set=_native.instruction_sets()[exact]) as engine:
        prompt = prompt_of(engine, {**media, **found})
        assert len(prompt.token_ids or ()) == len(found["logits"])
        require_answer(engine, prompt, found["logits"][-1], found["greedy"])
