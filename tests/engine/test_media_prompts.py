"""Prompts with media spans get the tokens of the numpy model from the engine at every budget, chunk and batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy import Engine, SamplingParams
from argosy.engine.sequence import Result
from argosy.errors import ArgosyError, UsageError
from argosy.prompt.media_span import MediaSpan, SpanRows
from argosy.prompt.prompt import Prompt
from tests.engine.random_drafter import RandomDrafter
from tests.model.media_span import MediaSequence, media_sequence
from tests.models.numpy_model import NumpyModel, Spans
from tests.models.references import REFERENCES
from tests.models.runnable import runnable

NUM_NEW = 6
SMALLEST_MARGIN = 1e-4  # relative; of routing decisions and of the best token
DIRECTORIES = {reference.name: reference.directory for reference in REFERENCES}
# Three axes with alternating pairs, three axes with sections, one axis, a recurrent state, layers that stay causal.
MODELS = ("qwen3_vl_moe_plain", "glm4v_moe_plain", "qwen3_moe_plain", "qwen3_5_moe_plain", "gemma4_plain")


def prompt_of(media: MediaSequence, *, made: list[int] | None = None) -> Prompt:
    """Make a prompt from the segments of a synthetic sequence."""
    segments: list[Sequence[int] | MediaSpan] = []
    at = 0
    for number, place in enumerate(media.spans):
        part = slice(place.start, place.stop)
        segments.append(media.token_ids[at : place.start].tolist())
        at = place.stop
        start = 0.0 if media.angles is None else float(media.angles[0, place.start])
        angles = None if media.angles is None else media.angles[:, part] - np.float32(start)
        sees = media.sees_until
        segments.append(
            MediaSpan(
                kind="picture",
                digest=bytes([number + 1]) * 32,
                num_positions=len(place),
                token_id=int(media.token_ids[place.start]),
                make_rows=lambda place=place, number=number: rows_of(media, place, made, number),  # type: ignore[misc]
                angles=angles,
                num_angles=None if media.angles is None else 1 + float(angles_max(media, place)) - start,
                sees_both_ways=sees is not None and sees[place.start] == place.stop,
            )
        )
    return Prompt.of(*segments, media.token_ids[at:].tolist())


def angles_max(media: MediaSequence, place: range) -> np.float32:
    assert media.angles is not None
    return np.float32(media.angles[:, place.start : place.stop].max())


def rows_of(media: MediaSequence, place: range, made: list[int] | None, number: int) -> SpanRows:
    if made is not None:
        made.append(number)
    own = (media.rows >= place.start) & (media.rows < place.stop)
    additions = {}
    for layer, (rows, vectors) in media.additions.items():
        is_own = (rows >= place.start) & (rows < place.stop)
        if is_own.any():
            additions[layer] = vectors[is_own]
    return SpanRows(media.vectors[own], additions)


def greedy(model: NumpyModel, media: MediaSequence) -> tuple[list[int], float]:
    """Return the numpy model's continuation, and the margin of its closest decision relative to the largest logit."""
    token_ids, spans, closest = media.token_ids.tolist(), media.numpy_spans, np.inf
    for _ in range(NUM_NEW):
        logits = model.logits(token_ids, spans)[-1]
        second, best = np.sort(logits)[-2:]
        closest = min(closest, model.router_margin, float((best - second) / abs(best)))
        token_ids.append(int(logits.argmax()))
        if spans.angles is not None:
            spans = replace(
                spans,
                angles=np.concatenate([spans.angles, spans.angles[:, -1:].max(keepdims=True) + [[1]] * 3], 1),
            )
        if spans.sees_until is not None:
            spans = replace(spans, sees_until=np.append(spans.sees_until, len(token_ids)))
    return token_ids[len(media.token_ids) :], closest


class Case:
    """A model, sequences whose greedy continuation has no near-ties, and those continuations."""

    def __init__(self, name: str, scratch: Path) -> None:
        model = NumpyModel(DIRECTORIES[name])
        config = model.config | {"model_type": model.family}
        both_ways = not name.startswith("qwen3_5")  # a delta net sees no later token
        self.sequences: list[MediaSequence] = []
        self.expected: list[list[int]] = []
        for number, kinds in enumerate((("picture", "picture"), ("sound", "picture"), (), ("picture",))):
            for seed in range(1000 * number, 1000 * number + 100):
                media = media_sequence(
                    config,
                    seed,
                    kinds=kinds,
                    sees_both_ways=both_ways and number != 1,
                    num_text_before=5 + 20 * number,
                )
                tokens, closest = greedy(model, media)
                if closest > SMALLEST_MARGIN:
                    break
            else:
                raise AssertionError(f"{name}: 100 seeds, each with a near tie")
            self.sequences.append(media)
            self.expected.append(tokens)
        self.directory = runnable(DIRECTORIES[name], scratch)

    @cached_property
    def resident(self) -> tuple[int, list[Result]]:
        """How many experts a token has, and the answers to each prompt alone with all experts in memory."""
        with Engine.open(self.directory, memory="2GiB", threads=1) as engine:
            answers = [engine.generate(prompt_of(media), PARAMS) for media in self.sequences]
            return engine.config.experts_per_token, answers


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


PARAMS = SamplingParams(max_tokens=NUM_NEW, ignore_eos=True, logprobs=2)


@pytest.mark.parametrize(
    "options",
    [
        {"threads": 1},
        {"threads": 2, "chunk_tokens": 40},
        {"threads": 1, "chunk_tokens": 40, "expert_slots": "smallest"},
        {"threads": 2, "chunk_tokens": 64, "expert_slots": "smallest", "context": 128},
    ],
    ids=["resident", "chunks", "smallest cache", "preempted"],
)
def test_media_prompts_get_the_tokens_of_the_numpy_model(case: Case, options: dict[str, Any]) -> None:
    """The prompts run alone, together, and again with a prefix hit."""
    settings: dict[str, Any] = {"memory": "2GiB", **options}
    least, expected = case.resident
    prompts = [prompt_of(media) for media in case.sequences]
    if settings.get("expert_slots") == "smallest":
        settings["expert_slots"] = least
    assert [one.token_ids for one in expected] == case.expected
    with Engine.open(case.directory, **settings) as engine:
        for _ in range(2):
            together = engine.generate_batch(prompts, PARAMS)
            assert [one.token_ids for one in together] == case.expected
            assert [one.logprobs for one in together] == [one.logprobs for one in expected]


def test_a_prefix_hit_needs_no_rows_and_keeps_every_bit(case: Case) -> None:
    made: list[int] = []
    prompt = prompt_of(case.sequences[0], made=made)
    with Engine.open(case.directory, memory="2GiB", threads=1) as engine:
        first = engine.generate(prompt, PARAMS)
        assert sorted(made) == [0, 1]
        again = engine.generate(prompt, PARAMS)
        if engine.config.delta is None:  # a short prompt has no snapshot of a recurrent state
            assert again.usage["cached_tokens"] > 0
            assert len(made) < 4  # part of one span may be recomputed, not all spans
        other = replace(
            prompt, spans=tuple((at, replace(span, digest=bytes(32))) for at, span in prompt.spans)
        )
        unknown = engine.generate(other, PARAMS)
    assert again.logprobs == first.logprobs
    assert unknown.usage["cached_tokens"] <= case.sequences[0].spans[0].start
    assert unknown.logprobs == first.logprobs


def test_drafts_change_no_answer_to_a_prompt_with_media(case: Case) -> None:
    prompts = [prompt_of(media) for media in case.sequences]
    known = [
        [*media.token_ids.tolist(), *new] for media, new in zip(case.sequences, case.expected, strict=True)
    ]
    for prompt, whole in zip(prompts, known, strict=True):
        assert prompt.token_ids is not None
        whole[: len(prompt.token_ids)] = prompt.token_ids
    with Engine.open(case.directory, memory="2GiB", threads=1) as engine:
        vocab_size = engine.config.vocab_size
    drafter = RandomDrafter(3, vocab_size, known)
    with Engine.open(case.directory, memory="2GiB", threads=1, drafter=drafter, draft_tokens=3) as engine:
        assert [one.token_ids for one in engine.generate_batch(prompts, PARAMS)] == case.expected
    assert drafter.num_proposed > 0


@pytest.mark.parametrize("options", [{}, {"prefix_reuse": False}], ids=["reuse", "no reuse"])
def test_answers_that_each_compute_the_same_picture_do_not_take_its_rows_from_one_another(
    case: Case, options: dict[str, Any]
) -> None:
    """Two answers run at once, so most of the five find no room to continue from the first, and start by themselves."""
    prompt = prompt_of(case.sequences[0])
    with Engine.open(case.directory, memory="2GiB", threads=1, max_sequences=2, **options) as engine:
        answers = engine.requests.prepare(prompt, PARAMS, num_answers=5)
        engine.enqueue(answers)
        while any(one.result is None for one in answers):
            engine.step()
    assert [one.new_ids for one in answers] == [case.expected[0]] * 5


def test_media_that_cannot_run_are_refused_and_others_continue(case: Case) -> None:
    def fails() -> SpanRows:
        raise ArgosyError("the picture cannot be read")

    good, prompt = prompt_of(case.sequences[0]), prompt_of(case.sequences[3])
    ((at, span),) = prompt.spans
    bad = replace(prompt, spans=((at, replace(span, make_rows=fails, digest=bytes(32))),))
    with Engine.open(case.directory, memory="2GiB", threads=1, chunk_tokens=48) as engine:
        failing, going = engine.submit(bad, PARAMS), engine.submit(good, PARAMS)
        while going.result is None or failing.result is None:
            engine.step()
        assert going.new_ids == case.expected[0]
        assert failing.result.finish_reason == "error"
        assert str(failing.result.error) == "the picture cannot be read"
        long = MediaSpan("picture", bytes(32), 50, 5, fails, sees_both_ways=True)
        with pytest.raises(
            UsageError, match="fills 50 positions that see one another, and a step has at most 48"
        ):
            engine.submit(Prompt.of([1], long, [2]))
        with pytest.raises(UsageError, match="prompt_logprobs needs a prompt of text alone"):
            engine.submit(good, SamplingParams(prompt_logprobs=0))


def test_a_numpy_span_agrees_with_a_media_span() -> None:
    """Both descriptions of the same sequence have the same positions."""
    model = NumpyModel(DIRECTORIES["qwen3_vl_moe_plain"])
    media = media_sequence(model.config | {"model_type": model.family}, 3, kinds=("picture", "sound"))
    assert isinstance(media.numpy_spans, Spans)
    assert [at for at, _ in prompt_of(media).spans] == [place.start for place in media.spans]
