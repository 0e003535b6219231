"""DeepSeek-V4-Vision: pictures' own choice of experts, and spans whose positions see one another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy import Engine, SamplingParams
from argosy.checkpoint.pack import pack
from argosy.model.families import open_model
from argosy.prompt.media_span import MediaSpan, SpanRows
from argosy.prompt.prompt import Prompt
from tests.models.gguf_deepseek_v4 import write_gguf
from tests.models.numpy_deepseek_v4 import DeepseekV4
from tests.models.references import LARGEST_DIFFERENCE, difference
from tests.models.safetensors_file import Array
from tests.models.tiny_deepseek_v4 import deepseek_v4, write_deepseek_v4

VISION: dict[str, Any] = {
    "vision_n_layers": 2, "vision_dim": 16, "vision_n_heads": 2, "vision_inter_dim": 24, "vision_patch_size": 2,
    "vision_rope_theta": 10000.0, "vision_downsample_ratio": 3, "vision_max_n_token": 384, "vision_min_pixels": 36,
    "vision_max_wh_ratio": 8,
}  # fmt: skip
# Lengths of text, of positions that see what precedes them, and of spans.
PARTS = (9, 2, 23, 11, 7, 10)


def prompted(config: dict[str, Any], seed: int) -> tuple[Prompt, list[int], dict[int, Array], list[range]]:
    """A prompt with two pictures: its parts, token ids, rows and spans. The second picture is shorter than a window."""
    rng = np.random.default_rng(seed)
    segments: list[Any] = []
    token_ids: list[int] = []
    rows: dict[int, Array] = {}
    spans: list[range] = []

    def show(count: int, *, sees_both_ways: bool) -> None:
        made = rng.standard_normal((count, config["hidden_size"])).astype(np.float32)
        start = len(token_ids)
        rows.update({start + at: row.astype(np.float64) for at, row in enumerate(made)})
        if sees_both_ways:
            spans.append(range(start, start + count))
        digest = bytes([start]) * 32
        segments.append(
            MediaSpan("picture", digest, count, 5, lambda: SpanRows(made), sees_both_ways=sees_both_ways)
        )
        token_ids.extend([5] * count)

    def write(count: int) -> None:
        ids = rng.integers(3, config["vocab_size"], count).tolist()
        segments.append(ids)
        token_ids.extend(ids)

    before, pad, picture, text, other, after = PARTS
    write(before)
    show(pad, sees_both_ways=False)
    show(picture, sees_both_ways=True)
    write(text)
    show(other, sees_both_ways=True)
    write(after)
    return Prompt.of(*segments), token_ids, rows, spans


def top(engine: Engine, prompt: Prompt) -> dict[int, float]:
    found = engine.generate(prompt, SamplingParams(max_tokens=1, temperature=0, logprobs=20))
    assert found.logprobs is not None
    return dict(found.logprobs[0].top)


@pytest.mark.parametrize(
    "changes", [{}, {"num_hash_layers": 0, "sliding_window": 40}, {"compress_ratios": [0] * 4}]
)
def test_answers_about_pictures_are_those_of_float64(changes: dict[str, Any], tmp_path: Path) -> None:
    config = deepseek_v4(**VISION, **changes)
    for seed in range(9):
        tensors = write_deepseek_v4(tmp_path, config, seed)
        prompt, token_ids, rows, spans = prompted(config, seed)
        values = {name: one.astype(np.float64) for name, one in tensors.items()}
        model = DeepseekV4(config, values, rows=rows, spans=spans)
        logits = model.logits(token_ids)[-1]
        if model.margin > 1e-5:  # else float32 may choose otherwise
            break
    else:
        pytest.fail("no seed has clear choices")
    expected = logits - logits.max()
    expected -= np.log(np.exp(expected).sum())
    with Engine.open(tmp_path, memory="4GiB", kv_dtype="f32", threads=1) as engine:
        best = top(engine, prompt)
    assert difference(np.array(list(best.values())), expected[list(best)]) <= LARGEST_DIFFERENCE
    for other in (
        DeepseekV4(config, values, rows=rows),
        DeepseekV4(config, values | zero_biases(values), rows=rows, spans=spans),
    ):
        assert np.abs(other.logits(token_ids)[-1] - logits).max() > 0.01


def zero_biases(values: dict[str, Array]) -> dict[str, Array]:
    return {name: 0 * value for name, value in values.items() if name.endswith("bias_vl")}


def test_no_budget_chunk_thread_prefix_or_pack_changes_an_answer_about_a_picture(tmp_path: Path) -> None:
    config = deepseek_v4(**VISION)
    tensors = write_deepseek_v4(tmp_path, config, 5)
    prompt, *_ = prompted(config, 6)
    greedy = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=3)
    packed = tmp_path / "packed"
    pack(open_model(tmp_path), packed, format="source")
    write_gguf(tmp_path / "model.gguf", config, tensors)
    found = []
    for path, settings in (
        (tmp_path, {"threads": 1}),
        (tmp_path, {"threads": 3, "chunk_tokens": 25, "expert_slots": 2}),
        (tmp_path, {"threads": 2, "chunk_tokens": 31, "prefix_reuse": False}),
        (packed, {"threads": 2}),
        (tmp_path / "model.gguf", {"threads": 2}),
    ):
        with Engine.open(path, memory="4GiB", **settings) as engine:
            for _ in range(2):  # the second prompt may begin with a prefix
                answer = engine.generate(prompt, greedy)
                found.append((list(answer.token_ids), answer.logprobs))
    assert all(one == found[0] for one in found)
