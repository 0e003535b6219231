"""The numpy model agrees with transformers on media spans.

The decoders of transformers get what its multimodal models pass to them: embeddings, positions on three axes, and
vectors that are added after the first layers. A span that sees in both directions becomes a mask.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.gemma4 import modeling_gemma4

from tests.model.media_span import MediaSequence, media_sequence
from tests.models.make_models import decoder_of, load
from tests.models.numpy_model import NumpyModel, sliding_windows
from tests.models.references import REFERENCES, difference
from tests.models.safetensors_file import Array
from tests.models.tiny import text_of

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("one_quiet_thread")]

# float32 is compared with float64, as in `tests/models/test_references.py`.
LARGEST_DIFFERENCE = 1e-5
SMALLEST_MARGIN = 1e-4  # of a routing decision; below about 1e-5, float32 may choose differently

DIRECTORIES = {reference.name: reference.directory for reference in REFERENCES}
DEEPSTACK = [name for name in DIRECTORIES if name.startswith(("qwen3_vl_moe", "qwen3_omni_moe"))]
THREE_AXES = [*DEEPSTACK, *(name for name in DIRECTORIES if name.startswith(("glm4v_moe", "qwen3_5_moe")))]
ONE_AXIS = [
    "kimi_k25_wrapper",
    "deepseek_v2_groups",
    "gpt_oss_plain",
    "gpt_oss_windows_sharded",
    "mixtral_plain",
]
ONE_AXIS += ["mixtral_window_top1", "qwen3_moe_window_top1"]
# Its full layers stay causal. The decoder's logits here lack the cap, so the model must not have one.
GEMMA = "gemma4_respelt_untied_no_cap_f32"
ONE_AXIS += [GEMMA]
SPANS: dict[str, tuple[Any, ...]] = {
    "a_picture": ("picture",),
    "a_sound": ("sound",),
    "two_pictures": ("picture", "picture"),
    "a_sound_and_a_picture": ("sound", "picture"),
}


def decided(name: str, **options: Any) -> tuple[NumpyModel, MediaSequence, Array]:
    """The model, the first sequence in which no routing decision is a near tie, and its logits."""
    model = NumpyModel(DIRECTORIES[name])
    for seed in range(100):
        media = media_sequence(model.config | {"model_type": model.family}, seed, **options)
        logits = model.logits(media.token_ids.tolist(), media.numpy_spans)
        if model.router_margin > SMALLEST_MARGIN:
            return model, media, logits
    raise AssertionError(f"{name}: 100 seeds, each with a near tie")


def mask(media: MediaSequence, window: int, *, is_causal: bool = False) -> torch.Tensor:
    """float32 [1, 1, T, T]: the additive mask that says what `Spans.sees_until` defines."""
    num_tokens = media.num_tokens
    out = torch.full((1, 1, num_tokens, num_tokens), torch.finfo(torch.float32).min)
    for token in range(num_tokens):
        first = max(0, token + 1 - window) if window else 0
        until = token + 1 if media.sees_until is None or is_causal else int(media.sees_until[token])
        out[0, 0, token, first:until] = 0
    return out


@torch.no_grad()
def transformers_answer(model: Any, media: MediaSequence, **more: Any) -> tuple[Array, list[Array]]:
    """Logits, and the inputs of every layer after the first and of the final norm."""
    decoder, inputs = decoder_of(model), []
    takers = [*decoder.layers[1:], decoder.norm]
    handles = [
        taker.register_forward_pre_hook(lambda module, args: inputs.append(args[0][0].numpy().copy()))
        for taker in takers
    ]
    embeddings = decoder.embed_tokens(torch.tensor(media.token_ids.astype(np.int64))[None])
    embeddings[0, media.rows] = torch.tensor(media.vectors)
    if media.angles is not None:
        more["position_ids"] = torch.tensor(media.angles)[:, None]
    if media.additions:
        is_added = torch.zeros(1, media.num_tokens, dtype=torch.bool)
        is_added[0, media.additions[0][0]] = True
        more["visual_pos_masks"] = is_added
        more["deepstack_visual_embeds"] = [torch.tensor(vectors) for _, vectors in media.additions.values()]
    hidden = decoder(inputs_embeds=embeddings, use_cache=False, **more).last_hidden_state
    for handle in handles:
        handle.remove()
    return model.lm_head(hidden)[0].numpy(), inputs


def assert_equal(model: NumpyModel, logits: Array, expected: tuple[Array, list[Array]]) -> None:
    assert difference(logits, expected[0]) <= LARGEST_DIFFERENCE
    assert len(model.hidden_states) == len(expected[1])
    for ours, theirs in zip(model.hidden_states, expected[1], strict=True):
        assert difference(ours, theirs) <= LARGEST_DIFFERENCE


@pytest.mark.parametrize("kinds", SPANS.values(), ids=SPANS)
@pytest.mark.parametrize("name", THREE_AXES)
def test_logits_and_hidden_states_with_spans_equal_transformers(name: str, kinds: Any) -> None:
    num_added = 3 if name in DEEPSTACK else 0
    model, media, logits = decided(name, kinds=kinds, num_added_layers=num_added)
    assert media.angles is not None
    assert bool(media.additions) == (name in DEEPSTACK and "picture" in kinds)
    assert_equal(model, logits, transformers_answer(load(DIRECTORIES[name]), media))


# Delta nets are left out, as they cannot see later tokens.
@pytest.mark.parametrize("name", [n for n in (*THREE_AXES, *ONE_AXIS) if not n.startswith("qwen3_5_moe")])
def test_a_span_that_sees_both_ways_equals_a_mask_in_transformers(name: str) -> None:
    model, media, logits = decided(
        name, kinds=("picture", "picture"), sees_both_ways=True, num_added_layers=0
    )
    windows = set(sliding_windows(model.config))
    masks = {
        "sliding_attention" if window else "full_attention": mask(
            media, window, is_causal=name == GEMMA and not window
        )
        for window in windows
    }
    of_transformers = load(DIRECTORIES[name])
    is_by_kind = text_of(model.config)["model_type"] in ("gpt_oss", "gemma4")
    expected = transformers_answer(
        of_transformers, media, attention_mask=masks if is_by_kind else next(iter(masks.values()))
    )
    assert_equal(model, logits, expected)
    one_way, _ = transformers_answer(of_transformers, media)
    assert difference(logits, one_way) > 100 * LARGEST_DIFFERENCE


def test_gemma_s_full_layers_stay_causal_as_in_transformers() -> None:
    model, media, _ = decided(GEMMA, kinds=("picture", "picture"), sees_both_ways=True, num_added_layers=0)
    span_of_token = torch.full((1, media.num_tokens), -1)
    for number, span in enumerate(media.spans):
        span_of_token[0, span.start : span.stop] = number
    of_transformers = load(DIRECTORIES[GEMMA])
    masks = modeling_gemma4.create_masks_for_vision_model(
        config=of_transformers.config.get_text_config(),
        inputs_embeds=torch.zeros(1, media.num_tokens, 1),
        attention_mask=None,
        cache=None,
        position_ids=None,
        block_sequence_ids=span_of_token,
    )
    window = max(sliding_windows(model.config))
    assert torch.equal(masks["sliding_attention"] == 0, mask(media, window) == 0)
    assert torch.equal(masks["full_attention"] == 0, mask(media, 0, is_causal=True) == 0)
