"""One engine: requests come, finish, fail or are cut short, and leave nothing behind."""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy import Budget, Engine, SamplingParams
from argosy.engine.facts import ExpertUses
from argosy.errors import Overloaded, PromptTooLong, UsageError
from tests.cli.tiny_chat_model import write_chat_model
from tests.helpers.word_tokenizer import write_word_tokenizer
from tests.models.references import REFERENCES

REFERENCE = next(reference for reference in REFERENCES if reference.name == "qwen3_moe_plain")
PROMPT = REFERENCE.input_ids


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.open(REFERENCE.directory, memory="2GiB", threads=1, expert_slots=4) as engine:
        yield engine


def answer(engine: Engine, max_tokens: int = 8) -> list[int]:
    return engine.generate(PROMPT, SamplingParams(max_tokens=max_tokens, ignore_eos=True)).token_ids


def num_free_blocks(engine: Engine) -> int:
    """Count the blocks that no sequence holds."""
    return engine._started.cache.blocks.num_available


def test_streamed_tokens_equal_those_of_the_whole_answer(engine: Engine) -> None:
    events = list(engine.stream(PROMPT, SamplingParams(max_tokens=8, ignore_eos=True)))

    assert [event.token_id for event in events] == answer(engine)
    assert [event.result is not None for event in events] == [False] * 7 + [True]
    assert events[-1].finish_reason == "length"


def test_a_stream_that_is_closed_early_gives_its_kv_blocks_back(engine: Engine) -> None:
    before = num_free_blocks(engine)
    stream = engine.stream(PROMPT, SamplingParams(max_tokens=50, ignore_eos=True))
    list(islice(stream, 3))
    assert num_free_blocks(engine) < before

    stream.close()  # type: ignore[attr-defined]

    assert num_free_blocks(engine) == before


def test_a_step_that_fails_cancels_running_requests_and_the_engine_continues(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, before = answer(engine), num_free_blocks(engine)
    forward = engine._started.model.forward
    calls = 0

    def interrupted(batch: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return forward(batch)  # type: ignore[arg-type]

    monkeypatch.setattr(engine._started.model, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answer(engine)

    assert num_free_blocks(engine) == before
    assert answer(engine) == expected


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(engine: Engine) -> None:
    available = engine.plan.context_tokens
    with pytest.raises(PromptTooLong, match=f"{available + 5} tokens.*{available}"):
        engine.generate([1] * (available + 5))


def test_an_answer_that_fills_the_context_finishes_with_length(engine: Engine) -> None:
    available = engine.plan.context_tokens
    prompt = [1] * (available - 3)
    result = engine.generate(prompt, SamplingParams(max_tokens=100, ignore_eos=True))
    assert (len(result.token_ids), result.finish_reason) == (3, "length")


def test_an_end_token_stops_the_answer_unless_it_is_ignored(engine: Engine) -> None:
    eos = engine.config.eos_ids[0]
    wants_eos = SamplingParams(max_tokens=5, logit_bias={eos: 100.0})
    stopped = engine.generate(PROMPT, wants_eos)
    assert (stopped.token_ids, stopped.finish_reason) == ([eos], "stop")

    ignored = engine.generate(PROMPT, SamplingParams(max_tokens=5, logit_bias={eos: 100.0}, ignore_eos=True))
    assert (ignored.token_ids, ignored.finish_reason) == ([eos] * 5, "length")


def test_the_ledger_adds_up(engine: Engine) -> None:
    begin = time.perf_counter()
    ledger = engine.generate(PROMPT, SamplingParams(max_tokens=8, ignore_eos=True)).ledger
    seconds = time.perf_counter() - begin  # `time_to_first_token_s` begins before `wall_s` does
    assert ledger.wall_s == pytest.approx(sum(ledger.parts.values()))
    assert (ledger.prompt_tokens, ledger.new_tokens) == (len(PROMPT), 8)
    assert ledger.lookups > ledger.hits > 0
    assert ledger.bytes_read > 0
    assert ledger.time_to_first_token_s is not None
    assert ledger.decode_s is not None
    assert 0 < ledger.wall_s <= seconds
    assert min(ledger.time_to_first_token_s, ledger.decode_s) > 0
    assert ledger.time_to_first_token_s + ledger.decode_s <= seconds
    assert engine.ledger.new_tokens >= 8


def test_building_a_prompt_does_not_count_as_decoding(engine: Engine) -> None:
    (sequence,) = engine.requests.prepare(PROMPT, SamplingParams(max_tokens=8, ignore_eos=True))
    sequence.started_at -= 100.0  # as if its prompt had taken so long
    engine.enqueue([sequence])
    while sequence.result is None:
        engine.step()
    ledger = sequence.result.ledger
    assert ledger.time_to_first_token_s is not None
    assert ledger.time_to_first_token_s > 100
    assert ledger.decode_tok_per_s == pytest.approx(7 / (ledger.decode_s or 0))
    assert (ledger.decode_s or 0) < ledger.wall_s


def test_more_requests_than_can_run_at_once_all_get_an_answer(engine: Engine) -> None:
    expected = answer(engine)
    results = engine.generate_batch([PROMPT] * 11, SamplingParams(max_tokens=8, ignore_eos=True))
    assert [result.token_ids for result in results] == [expected] * 11


def test_settings_that_an_engine_cannot_honour_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown instruction set 'sse9'"):
        Engine.open(REFERENCE.directory, memory="2GiB", instruction_set="sse9")
    with pytest.raises(UsageError, match="expert_slots must be at least experts_per_token"):
        Engine.open(REFERENCE.directory, memory="2GiB", expert_slots=1)
    with pytest.raises(UsageError, match="unknown unit 'Gigs'"):
        Engine.open(REFERENCE.directory, memory="2Gigs")
    with pytest.raises(UsageError, match="a size is text or a whole number of bytes"):
        Engine.open(REFERENCE.directory, memory=1.5)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="context_tokens must be a whole number, found 'long'"):
        Engine.open(REFERENCE.directory, memory="2GiB", context="long")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="a context of 129 tokens was requested"):
        Engine.open(REFERENCE.directory, memory=Budget(ram_bytes=1 << 30), context=129)


def test_a_context_longer_than_the_models_is_refused_with_both_numbers() -> None:
    with Engine.open(REFERENCE.directory, memory="2GiB", threads=1, context=128) as engine:
        assert engine.plan.context_tokens == 128
    said = r"a context of 129 tokens was requested, and the model supports 128\nhint: `--context 128` is the longest"
    with pytest.raises(UsageError, match=said) as refusal:
        Engine.open(REFERENCE.directory, memory="2GiB", context=129)
    assert (refusal.value.facts["needed"], refusal.value.facts["available"]) == (129, 128)
    with pytest.raises(UsageError, match=said):
        Engine.open(REFERENCE.directory, memory=Budget(ram_bytes=1 << 30, context_tokens=129))


def test_a_model_with_dynamic_scaling_is_refused_a_context_that_would_need_it() -> None:
    dynamic = next(
        reference for reference in REFERENCES if reference.name == "qwen3_moe_dynamic_every_second"
    )
    said = "of 4096 tokens was requested, and the model supports 128\n.* dynamic rope scaling, .* is not built in"
    with pytest.raises(UsageError, match=said):
        Engine.open(dynamic.directory, memory="2GiB", context=4096)


def test_a_closed_engine_refuses_requests() -> None:
    engine = Engine.open(REFERENCE.directory, memory=Budget(ram_bytes=1 << 30, context_tokens=64), threads=1)
    assert engine.plan.context_tokens == 64
    engine.close()
    engine.close()
    with pytest.raises(UsageError, match="the engine is closed"):
        engine.generate([1])
    with pytest.raises(UsageError, match="the engine is closed"):
        engine.step()


@pytest.mark.parametrize("call", ["generate", "embed"])
def test_a_request_is_refused_if_another_thread_closes_the_engine_while_its_prompt_is_built(
    call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine.open(REFERENCE.directory, memory="2GiB", threads=1)
    name = {"generate": "build", "embed": "whole_text"}[call]
    build = getattr(engine.prompts, name)

    def close_then_build(*args: Any, **options: Any) -> Any:
        engine.close()
        return build(*args, **options)

    monkeypatch.setattr(engine.prompts, name, close_then_build)
    with pytest.raises(UsageError, match="the engine is closed"):
        getattr(engine, call)([PROMPT] if call == "embed" else PROMPT)


def test_a_misspelt_option_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        UsageError, match=r"unknown option 'contxt' of Engine\.open; known: memory, context, threads"
    ):
        Engine.open(REFERENCE.directory, contxt=64)  # type: ignore[call-arg]


def test_a_closed_engine_releases_its_memory() -> None:
    engine = Engine.open(REFERENCE.directory, memory="2GiB", threads=1)
    engine.generate(PROMPT, SamplingParams(max_tokens=2))
    kv, weights = engine._started.cache._kv, engine._started.model.weights
    assert min(sys.getrefcount(kv), sys.getrefcount(weights)) > 2
    engine.close()
    assert sys.getrefcount(kv) == sys.getrefcount(weights) == 2  # the local name and the argument


@pytest.mark.parametrize("expert_slots", [None, 4])
def test_a_closed_engine_releases_the_memory_of_experts(expert_slots: int | None) -> None:
    engine = Engine.open(REFERENCE.directory, memory="2GiB", threads=1, expert_slots=expert_slots)
    engine.generate(PROMPT, SamplingParams(max_tokens=2))
    runner: Any = engine._started.model.experts
    arena = runner._arena if expert_slots is None else runner.cache._arena
    experts = weakref.ref(runner)
    del runner
    engine.close()
    assert experts() is None
    with pytest.raises(ValueError, match="the arena is closed"):
        arena.array()


class FailingRecorder:
    nbytes = 0

    def record(self, *_: object) -> None:
        raise OSError("no space left")


def test_a_recorder_that_failed_once_receives_later_steps() -> None:
    class FailingOnce(FailingRecorder):
        num_calls = 0

        def record(self, *_: object) -> None:
            self.num_calls += 1
            if self.num_calls == 1:
                raise OSError("no space left")

    recorder = FailingOnce()
    with Engine.open(
        REFERENCE.directory,
        memory="2GiB",
        threads=1,
        chunk_tokens=64,
        prefix_reuse=False,
        recorder=lambda *_: recorder,
    ) as engine:
        num_failed = 0
        for _ in range(12):
            try:
                engine.generate((PROMPT * 60)[:60], SamplingParams(max_tokens=2, ignore_eos=True))
            except OSError:
                num_failed += 1
    assert num_failed == 1
    assert recorder.num_calls > 1


def test_an_engine_whose_recorder_fails_is_closed_nevertheless() -> None:
    engine = Engine.open(
        REFERENCE.directory, memory="2GiB", threads=1, recorder=lambda files, config: FailingRecorder()
    )
    weights = engine._started.model.weights
    sequence = engine.submit(PROMPT)
    with pytest.raises(OSError, match="no space left"):
        engine.close()
    assert sequence.result is not None
    assert sequence.result.finish_reason == "cancelled"
    assert sys.getrefcount(weights) == 2
    engine.close()


def test_the_demo_model_runs_with_its_whole_context_and_a_quarter_of_its_experts_unless_a_budget_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo = write_chat_model(tmp_path / "demo", context_tokens=8192)
    monkeypatch.setattr("argosy.demo.locate.locate", lambda progress=None: demo)
    with Engine.open("demo", threads=1) as engine:
        assert engine.plan.slots.own == engine.plan.slots.num_experts // 4
        assert engine.plan.context_tokens == 8192
    with Engine.open("demo", threads=1, memory="2GiB") as engine:
        assert engine.plan.slots.is_resident


def test_a_step_without_work_does_nothing(engine: Engine) -> None:
    assert engine.step() == []


# ── how an answer ends ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_stop_token_ends_an_answer_even_when_end_tokens_are_ignored(engine: Engine) -> None:
    whole = answer(engine)
    params = SamplingParams(max_tokens=8, ignore_eos=True, stop_token_ids=[whole[3]])
    result = engine.generate(PROMPT, params)
    first = whole.index(whole[3])
    assert result.token_ids == whole[: first + 1]
    assert (result.finish_reason, result.stopped_by) == ("stop", whole[3])
    with pytest.raises(UsageError, match="stop_token_ids names token 9999"):
        engine.generate(PROMPT, SamplingParams(stop_token_ids=[9999]))


def test_a_result_says_what_stopped_it(engine: Engine, tmp_path: Path) -> None:
    eos = engine.config.eos_ids[0]
    assert engine.generate(PROMPT, SamplingParams(logit_bias={eos: 100.0})).stopped_by == eos
    assert engine.generate(PROMPT, SamplingParams(max_tokens=2, ignore_eos=True)).stopped_by is None
    for file in REFERENCE.directory.iterdir():
        (tmp_path / file.name).symlink_to(file)
    write_word_tokenizer(tmp_path, engine.config.vocab_size)
    with Engine.open(tmp_path, memory="2GiB", threads=1) as spelling:
        whole = spelling.generate(PROMPT, SamplingParams(max_tokens=8, ignore_eos=True))
        stop = whole.text[2:5]
        result = spelling.generate(
            PROMPT, SamplingParams(max_tokens=8, ignore_eos=True, stop=["never", stop])
        )
        assert (result.finish_reason, result.stopped_by) == ("stop", stop)
        assert stop not in result.text


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A model with a tokenizer whose end token is special."""
    model = write_chat_model(tmp_path_factory.mktemp("chatting") / "model")
    with Engine.open(model, memory="2GiB", threads=1, grammars=True) as engine:
        yield engine


def test_an_end_token_is_not_drawn_before_min_tokens(chatting: Engine) -> None:
    end = chatting.tokenizer.eos_ids[0] if chatting.tokenizer else 0
    result = chatting.generate([5], SamplingParams(max_tokens=9, min_tokens=4, logit_bias={end: 100.0}))
    assert len(result.token_ids) == 5
    assert (result.token_ids[-1], result.finish_reason, result.stopped_by) == (end, "stop", end)
    assert end not in result.token_ids[:-1]


def test_a_stop_string_has_no_effect_before_min_tokens(chatting: Engine) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=3, ignore_eos=True)
    assert chatting.tokenizer is not None
    word = chatting.tokenizer.encode("you")[0]
    bias = {word: 100.0}
    free = chatting.generate([5], replace(params, logit_bias=bias))
    text = chatting.tokenizer.token_bytes(word).decode()
    assert free.text == text * 12
    stopped = chatting.generate([5], replace(params, logit_bias=bias, stop=[text], min_tokens=3))
    assert len(stopped.token_ids) == 4
    assert (stopped.text, stopped.stopped_by) == (text * 3, text)


def test_min_tokens_beyond_max_tokens_or_the_context_is_refused(chatting: Engine) -> None:
    with pytest.raises(UsageError, match="min_tokens must be at most max_tokens"):
        SamplingParams(max_tokens=3, min_tokens=4)
    with pytest.raises(UsageError, match="min_tokens must be at least 0"):
        SamplingParams(min_tokens=-1)
    available = chatting.plan.context_tokens
    params = SamplingParams(max_tokens=None, min_tokens=available)
    with pytest.raises(
        PromptTooLong, match=f"1 tokens.*{available}, including at least {available}"
    ) as caught:
        chatting.generate([5], params)
    assert caught.value.facts == {
        "needed": available + 1,
        "available": available,
        "for_answer": available,
    }


@pytest.mark.parametrize("cut_at", [1, 5, 11])
def test_an_answer_that_was_cut_goes_on_token_for_token(chatting: Engine, cut_at: int) -> None:
    """Sampled, with penalties over the answer, and with a stop string and a character that the cut divides."""
    params = SamplingParams(
        max_tokens=24, temperature=1.3, seed=5, frequency_penalty=0.7, repetition_penalty=1.2, ignore_eos=True
    )
    prompt = chatting.prompts.build("Hi")
    whole = chatting.generate(prompt, params)
    begun = chatting.generate(prompt, replace(params, max_tokens=cut_at))
    rest = chatting.generate(prompt.answered_by(begun.token_ids), replace(params, max_tokens=24 - cut_at))
    assert begun.token_ids + rest.token_ids == whole.token_ids
    assert rest.text == whole.text[len(whole.text) - len(rest.text) :]

    stop = whole.text.rstrip("\N{REPLACEMENT CHARACTER}")[-3:]
    stopping = replace(params, stop=[stop])
    stopped = chatting.generate(prompt, stopping)
    begun = chatting.generate(prompt, replace(stopping, max_tokens=len(stopped.token_ids) - 1))
    rest = chatting.generate(prompt.answered_by(begun.token_ids), stopping)
    assert (stopped.stopped_by, rest.stopped_by) == (stop, stop)
    assert len(rest.token_ids) == 1


def test_special_tokens_are_in_the_text_only_when_not_skipped(chatting: Engine) -> None:
    assert chatting.tokenizer is not None
    special = chatting.tokenizer.control_id("<|im_start|>")
    assert special is not None
    params = SamplingParams(max_tokens=2, logit_bias={special: 100.0})
    assert chatting.generate([5], params).text == ""
    shown = replace(params, skip_special_tokens=False)
    assert chatting.generate([5], shown).text == "<|im_start|>" * 2
    end = chatting.tokenizer.eos_ids[0]
    assert chatting.generate([5], replace(shown, logit_bias={end: 100.0})).text == ""


def test_an_answer_without_a_limit_continues_to_the_end_of_the_context(engine: Engine) -> None:
    result = engine.generate(PROMPT, SamplingParams(max_tokens=None, ignore_eos=True))
    assert len(PROMPT) + len(result.token_ids) == engine.plan.context_tokens
    assert result.finish_reason == "length"


# ── log-probabilities of the prompt ─────────────────────────────────────────────────────────────────────────────────


def expected_logprobs(engine: Engine, ids: list[int]) -> list[tuple[float, list[int]]]:
    """Return, for each token but the first, its log-probability and the two best tokens."""
    logits = engine.logits(ids).astype(np.float64)[:-1]
    logprobs = (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )
    return [
        (row[token], list(np.argsort(-row, kind="stable")[:2]))
        for row, token in zip(logprobs, ids[1:], strict=True)
    ]


@pytest.mark.parametrize("chunk_tokens", [5, 64])
@pytest.mark.parametrize("max_tokens", [0, 1, 4])
def test_every_token_of_a_prompt_has_its_log_probability(chunk_tokens: int, max_tokens: int) -> None:
    with Engine.open(
        REFERENCE.directory, memory="2GiB", threads=1, chunk_tokens=chunk_tokens, max_sequences=3
    ) as engine:
        expected = expected_logprobs(engine, PROMPT)
        engine.generate(PROMPT, SamplingParams(max_tokens=1))  # leaves a prefix, which must not be used
        rows: list[int] = []
        logits = engine._started.model.logits
        engine._started.model.logits = lambda wanted: rows.append(len(wanted)) or logits(wanted)  # type: ignore[method-assign, func-returns-value]
        params = SamplingParams(max_tokens=max_tokens, prompt_logprobs=2, ignore_eos=True)
        result = engine.generate(PROMPT, params)
        other = engine.generate_batch([PROMPT, PROMPT[:9], PROMPT], params)
    assert max(rows) == 3  # no more than the memory plan has room for
    assert (result.finish_reason, len(result.token_ids)) == ("length", max_tokens)
    assert result.prompt_logprobs is not None
    assert result.prompt_logprobs[0] is None
    assert [entry.token_id for entry in result.prompt_logprobs[1:] if entry] == PROMPT[1:]
    for found, (logprob, best) in zip(result.prompt_logprobs[1:], expected, strict=True):
        assert found is not None
        assert found.logprob == pytest.approx(logprob, abs=1e-5)
        assert [token for token, _ in found.top] == best
    assert [one.prompt_logprobs for one in other] == [
        result.prompt_logprobs,
        result.prompt_logprobs[:9],
        result.prompt_logprobs,
    ]
    assert result.usage["cached_tokens"] == 0


def test_a_preempted_prompt_returns_its_log_probabilities_once() -> None:
    params = SamplingParams(max_tokens=30, prompt_logprobs=1, ignore_eos=True)
    prompts = [PROMPT[:10], PROMPT[1:11], PROMPT[2:12], PROMPT[3:13], PROMPT[4:14]]
    with Engine.open(REFERENCE.directory, memory="2GiB", threads=1, chunk_tokens=8) as engine:
        alone = [engine.generate(prompt, params) for prompt in prompts]
    with Engine.open(REFERENCE.directory, memory="2GiB", threads=1, chunk_tokens=8, context=96) as engine:
        together = engine.generate_batch(prompts, params)
        assert engine.facts().num_preempted > 0
    assert [(r.token_ids, r.prompt_logprobs) for r in together] == [
        (r.token_ids, r.prompt_logprobs) for r in alone
    ]


def test_all_answers_to_one_prompt_have_its_log_probabilities(engine: Engine) -> None:
    sequences = engine.requests.prepare(
        PROMPT, SamplingParams(max_tokens=3, prompt_logprobs=1), num_answers=3
    )
    engine.enqueue(sequences)
    while any(one.result is None for one in sequences):
        engine.step()
    (first, *others) = [one.result.prompt_logprobs for one in sequences if one.result is not None]
    assert first is not None
    assert len(first) == len(PROMPT)
    assert others == [first, first]


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_an_answer_whose_logits_are_nan_ends_alone_with_an_error(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, max_tokens: int
) -> None:
    expected, forward, score = answer(engine), engine._started.model.forward, engine._started.model.logits

    def broken(batch: Any) -> Any:
        logits = forward(batch)
        logits[batch.wanted == batch.num_tokens - 1] = np.nan  # of the youngest sequence
        return logits

    broken_one = SamplingParams(max_tokens=max_tokens, prompt_logprobs=None if max_tokens else 0)
    with monkeypatch.context() as patch:
        if max_tokens:
            patch.setattr(engine._started.model, "forward", broken)
        else:
            patch.setattr(engine._started.model, "logits", lambda rows: score(rows) * np.nan)
        good = engine.submit(PROMPT, SamplingParams(max_tokens=8, ignore_eos=True))
        bad = engine.submit([1, 2, 3], broken_one)
        while bad.result is None:
            engine.step()
    while good.result is None:
        engine.step()
    assert bad.result.finish_reason == "error"
    assert "no usable scores" in str(bad.result.error)
    assert good.result.token_ids == expected


def test_max_tokens_of_zero_needs_prompt_logprobs() -> None:
    with pytest.raises(UsageError, match="max_tokens must be at least 1, found 0"):
        SamplingParams(max_tokens=0)
    with pytest.raises(UsageError, match="prompt_logprobs must be from 0 to 20, found 21"):
        SamplingParams(prompt_logprobs=21)


# ── admission ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_requests_beyond_max_waiting_are_refused_with_a_time_to_retry() -> None:
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    with Engine.open(REFERENCE.directory, memory="2GiB", threads=1, max_sequences=2, max_waiting=1) as engine:
        kept = [engine.submit(PROMPT, params) for _ in range(3)]
        with pytest.raises(
            Overloaded, match=r"the server is busy: 1 request is waiting \(limit 1\)"
        ) as refused:
            engine.submit(PROMPT, params)
        assert refused.value.http_status == 503
        assert 1 <= refused.value.retry_after_s <= 60
        assert refused.value.facts["limit"] == 1
        while any(one.result is None for one in kept):
            engine.step()
        engine.generate(PROMPT, params)
        with pytest.raises(Overloaded):
            engine.enqueue(engine.requests.prepare(PROMPT, params, num_answers=4))
        engine.enqueue(engine.requests.prepare(PROMPT, params, num_answers=3))
        with pytest.raises(UsageError, match="num_answers must be at least 1, found 0"):
            engine.requests.prepare(PROMPT, params, num_answers=0)


def test_older_windows_of_expert_uses_count_half() -> None:
    uses = ExpertUses(lambda: np.full((2, 3), 8, np.int64))
    uses.count(255)
    assert uses.reported is None
    seen = []
    for _ in range(3):
        uses.count(256)
        assert uses.reported is not None
        seen.append((uses.reported, int(uses.reported[0, 0]), uses.reported_tokens))
    assert [(count, tokens) for _, count, tokens in seen] == [(8, 511), (12, 511), (14, 511)]
    assert seen[0][0][0, 0] == 8  # what was handed out stays


def test_facts_count_expert_uses_only_over_many_tokens_at_once(engine: Engine) -> None:
    with Engine.open(REFERENCE.directory, memory="2GiB", threads=1) as fresh:
        assert fresh.facts().expert_uses is None
        for _ in range(3):
            fresh.generate(PROMPT, SamplingParams(max_tokens=90, ignore_eos=True))
            facts = fresh.facts()
            assert (facts.expert_uses is None) == (facts.tokens_run < 256)
        assert facts.expert_uses is not None
        assert facts.expert_uses.shape == (fresh.config.num_layers, fresh.config.num_experts)
        of_a_layer = set(facts.expert_uses.sum(axis=1).tolist())
        assert of_a_layer == {facts.expert_use_tokens * fresh.config.experts_per_token}
        assert 256 <= facts.expert_use_tokens < facts.tokens_run
        assert sum(nbytes for _, nbytes, _ in facts.memory) == fresh.plan.total_bytes
        assert facts.kv_blocks_free + facts.kv_blocks_kept + facts.kv_blocks_held == facts.kv_blocks
        before = facts.expert_uses
        fresh.generate(PROMPT, SamplingParams(max_tokens=9, ignore_eos=True))
        assert fresh.facts().expert_uses is before
