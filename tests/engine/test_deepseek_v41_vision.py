"""Pictures of DeepSeek-V4.1 through a whole engine: the answer, every budget, and prompts whose last layers run for
their ends.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy import Engine, SamplingParams
from argosy.engine import steps
from argosy.errors import UsageError
from argosy.media.parts import Image, Text
from argosy.model.encoders.reading import find_encoders
from argosy.model.families import open_model
from argosy.prompt.folding import fold_tokens
from argosy.prompt.prompt import Prompt
from tests.engine.test_deepseek_vision import (
    CONTROLS,
    GREEDY,
    PICTURES,
    PLACEHOLDER,
    asked,
    opened,
    placed_rows,
    tokenizer,
)
from tests.engine.test_seeing import require_logits
from tests.models.numpy_deepseek_v41 import DeepseekV41
from tests.models.references import LARGEST_DIFFERENCE
from tests.models.safetensors_file import Array, read_safetensors, write_safetensors
from tests.models.tiny_deepseek_v41 import deepseek_v41, write_deepseek_v41
from tests.models.tiny_encoders import CONFIGS, REFERENCE, Sizes
from tests.prompt.tokenizers_for_tests import write_tokenizer

TOWER = REFERENCE / "deepseek_v41" / "model.safetensors"
TEXTS = "", "of these?" + " x" * 40  # after the pictures


def write(directory: Path, seed: int = 5, **changes: Any) -> tuple[dict[str, Any], dict[str, Array]]:
    """A tiny model with the tower of the reference; returns its config and the text model's tensors.

    Its last four layers see entries of earlier layers and their windows.
    """
    core = tokenizer()
    config = deepseek_v41(
        num_hidden_layers=7,
        compress_ratios=[0, 2, 2, 1, 1, 0, 1],
        kv_source_layer_ids=[1, 3],
        index_source_layer_ids=[1, 3, 6],
        engram_layer_ids=[1],
        vocab_size=core.get_vocab_size(),
        hidden_size=Sizes().out,
        engram_compressed_vocab_size=int(fold_tokens(core).max()) + 1,
        **changes,
    )
    config |= {
        "image_token_id": core.token_to_id(PLACEHOLDER),
        "vision_config": CONFIGS["deepseek_v41"](Sizes())["vision_config"] | {"min_pixels": 300},
    }
    tensors = write_deepseek_v41(directory, config, seed)
    tower = {name: ("BF16", value) for name, value in read_safetensors(TOWER).items()}
    stored = {name: ("F32", one) for name, one in tensors.items()}
    write_safetensors(directory / "model.safetensors", stored | tower)
    write_tokenizer(directory, core.to_str(), {"bos_token": CONTROLS[0], "eos_token": CONTROLS[1]})
    return config, tensors


def test_a_picture_is_one_span_in_reading_order(tmp_path: Path) -> None:
    config, _ = write(tmp_path)
    with opened(tmp_path) as engine:
        prompt = asked(engine)
        spans = [span for _, span in prompt.spans]
        assert not any(span.sees_both_ways for span in spans)
        assert {span.token_id for span in spans} == {config["image_token_id"]}
        # 30 x 21 pixels are padded to 8 x 6 patches: 3 rows of 4 squares.
        assert [span.num_positions for span in spans] == [2 + 3 * 5, 2 + 2 * 6, 2 + 5 * 2]
        rows, tower = placed_rows(prompt), read_safetensors(TOWER)
        start = prompt.spans[0][0]
        for at, mark in ((0, "start"), (5, "newline"), (10, "newline"), (15, "newline"), (16, "end")):
            np.testing.assert_array_equal(rows[start + at], tower[f"image_{mark}"])


def shown(engine: Engine, after: str = "", pictures: list[Any] = PICTURES) -> Prompt:
    """A prompt whose last picture is followed by `after`; without it, the last layers run for a part of the picture."""
    return engine.prompts.build([Text("Which"), *map(Image, pictures), *([Text(after)] if after else [])])


@pytest.mark.parametrize("after", TEXTS)
def test_the_answer_is_that_of_float64(after: str, tmp_path: Path) -> None:
    folded = fold_tokens(tokenizer())
    for seed in range(20):
        config, tensors = write(tmp_path, seed)
        with opened(tmp_path, kv_dtype="f32", threads=1) as engine:
            assert max(open_model(tmp_path).config.reaches) == 13
            prompt = shown(engine, after)
            start, last = prompt.spans[-1]
            left = len(prompt.token_ids or ()) - start - last.num_positions
            assert (left < 13) == (not after)
            ids, rows = list(prompt.token_ids or ()), placed_rows(prompt)
            values = {name: one.astype(np.float64) for name, one in tensors.items()}
            model = DeepseekV41(config["text_config"], values, rows=rows)
            logits = model.logits(ids, folded[ids].tolist())[-1]
            if model.margin <= 3e-6:  # float32 may choose otherwise
                continue
            require_logits(engine, prompt, logits, LARGEST_DIFFERENCE)
            break
    else:
        pytest.fail("no seed has clear choices")
    # Each of these counts: which experts pictures choose, and what n-grams do at them.
    without_bias = {name: 0 * one for name, one in values.items() if name.endswith("bias_vl")}
    for other in (
        DeepseekV41(config["text_config"], values | without_bias, rows=rows),
        WithGrams(config["text_config"], values, rows=rows),
    ):
        assert np.abs(other.logits(ids, folded[ids].tolist())[-1] - logits).max() > 0.01


class WithGrams(DeepseekV41):
    """Its pictures get rows of n-grams."""

    def engram(self, layer: int, streams: Array, rows: Array) -> Array:
        given, self.rows = self.rows, {}
        streams = super().engram(layer, streams, rows)
        self.rows = given
        return streams


def test_no_budget_chunk_prefix_or_bound_changes_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    greedy = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, logprobs=3)

    def answer(engine: Engine, prompt: Prompt) -> Any:
        found = engine.generate(prompt, greedy)
        return list(found.token_ids), found.logprobs

    with monkeypatch.context() as patch:
        patch.setattr(steps, "_to_end", lambda *_: None)  # every layer runs for every token
        with opened(tmp_path, prefix_reuse=False) as engine:
            expected = [answer(engine, shown(engine, after)) for after in TEXTS]
    for options in (
        {},
        {"expert_slots": 2, "threads": 1},
        {"chunk_tokens": 5},
        {"chunk_tokens": 27, "expert_slots": 3},
        {"chunk_tokens": 1, "prefix_reuse": False},
    ):
        with opened(tmp_path, **options) as engine:
            for _ in range(2):  # the second from a prefix
                assert [answer(engine, shown(engine, after)) for after in TEXTS] == expected, options
            prompts = [shown(engine, "", PICTURES[1:]), *(shown(engine, after) for after in TEXTS), [3, 4, 5]]
            batch = engine.generate_batch(prompts, greedy)
            assert [(list(one.token_ids), one.logprobs) for one in batch[1:3]] == expected, options
    with opened(tmp_path) as engine:
        assert answer(engine, shown(engine, TEXTS[1], PICTURES[::-1])) != expected[1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 5}, "asks for hidden_size 24"),
        ({"downsample_ratio": 17}, "downsample_ratio is 17"),
        ({"max_image_tokens": 3}, "max_image_tokens is 3"),
        ({"max_wh_ratio": 2.5}, "max_wh_ratio is 2.5"),
        ({"hidden_size": 12}, "expected"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps"),
    ],
)
def test_a_tower_that_cannot_run_leaves_text(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    config, _ = write(tmp_path)
    vision = config["vision_config"] | changes
    (tmp_path / "config.json").write_text(json.dumps(config | {"vision_config": vision}))
    with opened(tmp_path) as engine:
        assert engine.media.kinds == ()
        assert len(engine.generate("Hello", GREEDY).token_ids) == 8
        assert words in str(find_encoders(open_model(tmp_path))["picture"])


def test_a_checkpoint_without_the_tower_refuses_pictures(tmp_path: Path) -> None:
    config, tensors = write(tmp_path)
    write_safetensors(tmp_path / "model.safetensors", {name: ("F32", one) for name, one in tensors.items()})
    with opened(tmp_path) as engine, pytest.raises(UsageError, match="takes text only"):
        engine.prompts.build([Image(PICTURES[0])])
    # A text model alone has no biases of pictures either.
    del config["vision_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with opened(tmp_path) as engine:
        assert len(engine.generate("Hello", GREEDY).token_ids) == 8
