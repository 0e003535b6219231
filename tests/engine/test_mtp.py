"""A checkpoint's own draft layer predicts what numpy says, and neither its drafts nor its faults change an answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy import Engine, SamplingParams, _native
from argosy.checkpoint.formats import matrix_bytes
from argosy.engine.drafts.mtp import MtpDrafter
from argosy.engine.sequence import Sequence
from argosy.errors import CheckpointError, ReadFailed, UnsupportedModel, UsageError
from argosy.model.clock import PartClock
from argosy.model.draft_layer import MOST_BEHIND
from argosy.model.families import open_model
from argosy.model.model import ModelReading, ModelSizes
from argosy.model.weights import dense_footprint
from tests.engine.random_drafter import RandomDrafter
from tests.model.open_parts import NUM_SEQUENCES, Run, make_steps
from tests.models.gguf_models import one_type, write_gguf_model
from tests.models.tiny import glm4_moe, prompt_ids, write_model
from tests.models.tiny_delta import qwen3_5_moe_text, qwen3_next
from tests.models.tiny_glm5 import glm5_next
from tests.models.tiny_kda import bailing_hybrid
from tests.models.tiny_latent import deepseek_v3
from tests.models.tiny_mtp import NumpyDraft, write_mtp_model

CONFIGS = {
    "deepseek_v3": deepseek_v3(max_position_embeddings=256),
    "glm4_moe": glm4_moe(max_position_embeddings=256),
    "bailing_hybrid": bailing_hybrid(max_position_embeddings=256, num_hidden_layers=2),
    "qwen3_next": qwen3_next(max_position_embeddings=256),
    "qwen3_5_moe_text": qwen3_5_moe_text(max_position_embeddings=256),
}
SETTINGS: dict[str, Any] = {"memory": "2GiB", "threads": 1, "max_sequences": 2, "chunk_tokens": 16}


@pytest.fixture(scope="module", params=[*CONFIGS, "glm4_moe in GGUF"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mtp")
    if request.param in CONFIGS:
        return write_mtp_model(directory / "model", CONFIGS[request.param], seed=3)
    config = CONFIGS["glm4_moe"] | {"num_nextn_predict_layers": 1}
    write_gguf_model(directory / "model.gguf", config, one_type("F16"), seed=3)
    return directory / "model.gguf"


def in_numpy(model: Path) -> NumpyDraft:
    """The draft layer, with the head in q8 that drafts have."""
    draft = NumpyDraft(model if model.is_dir() else model.with_name(model.name + ".f32"))
    head = draft.layer.tensors["lm_head.weight"]
    in_q8 = np.empty(matrix_bytes("q8", *head.shape), np.uint8)
    _native.quantize("q8", head.astype(np.float32), in_q8)
    draft.layer.tensors["lm_head.weight"] = _native.dequantize("q8", in_q8, *head.shape).astype(head.dtype)
    return draft


def vocab_size(model: Path) -> int:
    return open_model(model).config.vocab_size


def params(temperature: float, max_tokens: int = 40) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=5, ignore_eos=True)


def run(engine: Engine, prompts: list[list[int]], temperature: float) -> list[Sequence]:
    sequences = [engine.submit(prompt, params(temperature)) for prompt in prompts]
    while engine.has_work:
        engine.step()
    return sequences


def propose_others(engine: Engine, others: RandomDrafter) -> MtpDrafter:
    """Have others propose, always; return the engine's own drafter, which goes on following its answers."""
    mtp = engine._drafts.mtp
    assert mtp is not None
    engine._scheduler._drafter = others
    others.forget = mtp.forget  # type: ignore[method-assign]
    engine._scheduler._governor = None
    return mtp


def run_to(engine: Engine, sequence: Sequence, count: int) -> None:
    """Step until an answer has so many tokens, and only the last one was not computed.

    With a recurrent state, a rejected proposal makes the next step compute all of the last step's tokens again.
    """
    while len(sequence.new_ids) < count or sequence.num_computed != sequence.num_tokens - 1:
        engine.step()


def test_it_predicts_what_numpy_says(model: Path) -> None:
    """Prompts of several chunks, with a prefix that another one computed, answers with right and wrong drafts."""
    draft, size = in_numpy(model), vocab_size(model)
    first = prompt_ids({"vocab_size": size}, 1, 40)
    # Two blocks are shared, and the token after them is the same.
    prompts = [first, [*first[:33], *first[:5]]]
    answers = []
    with Engine.open(model, **SETTINGS) as engine:
        answers = [[*one.prompt_ids, *one.new_ids] for one in run(engine, prompts, 0.0)]
    with Engine.open(model, speculate="mtp", **SETTINGS) as engine:
        mtp = propose_others(engine, RandomDrafter(1, size, answers))
        for prompt, answer in zip(prompts, answers, strict=True):
            sequence = engine.submit(prompt, params(0.0))
            run_to(engine, sequence, 25)
            known = [*prompt, *sequence.new_ids]
            assert known == answer[: len(known)]
            # float32 beside float64, over two models of three layers
            drafted = mtp.propose(sequence, 3)
            state = mtp._followed[sequence].state
            assert state is not None
            assert mtp._layer.logits(state)[0] == pytest.approx(draft.logits(known), abs=2e-3)
            room = 16 * len(sequence.blocks) - (len(known) - 1)  # positions that have a KV block
            assert len(drafted) == min(3, room + 1)
            for at, token in enumerate(drafted):
                expected = draft.logits(known, drafted[:at])
                assert expected[token] > expected.max() - 4e-3
            engine.cancel(sequence)
            assert sequence not in mtp._followed
    # Cancelled answers leave positions that did not run, and a recurrent state makes later prompts begin there.
    with Engine.open(model, speculate="mtp", **SETTINGS) as engine:
        mtp = propose_others(engine, RandomDrafter(1, size, answers))
        # Nobody asked for drafts of this answer. What follows it in a conversation finds its draft keys and values.
        whole = engine.submit(first, params(0.0, max_tokens=57))
        behind = []
        while engine.has_work:
            engine.step()
            behind += [one.num_behind for one in mtp._followed.values()]
        assert MOST_BEHIND // 2 < max(behind) < MOST_BEHIND
        known = [*first, *whole.new_ids, 5, 6, 7]
        sequence = engine.submit(known, params(0.0))
        run_to(engine, sequence, 3)
        # A recurrent state is kept at some places only.
        reusable = 64 if engine.config.recurrent_layers else (len(known) - 4) // 16 * 16
        assert sequence.cached_tokens == reusable
        known += sequence.new_ids
        mtp.propose(sequence, 1)
        state = mtp._followed[sequence].state
        assert state is not None
        assert mtp._layer.logits(state)[0] == pytest.approx(draft.logits(known), abs=2e-3)


def test_every_position_of_an_answer_has_run_when_it_ends(tmp_path: Path) -> None:
    """Also if its last proposals were rejected, and a recurrent state returned to where the step began."""
    config, left = qwen3_next(max_position_embeddings=256), []
    prompt = prompt_ids(config, 1, 20)
    with Engine.open(write_mtp_model(tmp_path / "first", config, seed=3), **SETTINGS) as engine:
        answer = list(engine.generate(prompt, params(0.0)).token_ids)
    ends = next(token for token in answer[8:] if answer.count(token) == 1)
    model = write_mtp_model(tmp_path / "second", config | {"eos_token_id": ends}, seed=3)
    for seed in range(4):
        with Engine.open(model, speculate="mtp", **SETTINGS) as engine:
            wrong = RandomDrafter(seed, config["vocab_size"])
            mtp = propose_others(engine, wrong)

            def forget(sequence: Sequence, mtp: MtpDrafter = mtp) -> None:
                left.append(mtp._followed[sequence].num_behind)
                mtp.forget(sequence)

            wrong.forget = forget  # type: ignore[method-assign]
            assert (
                engine.generate(prompt, SamplingParams(max_tokens=40, temperature=0)).finish_reason == "stop"
            )
    assert left == [0] * 4


@pytest.mark.covering(2)
@pytest.mark.parametrize("slots", [None, "fewest"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_text_is_the_same_with_it(model: Path, slots: str | None, temperature: float) -> None:
    size = vocab_size(model)
    prompts = [prompt_ids({"vocab_size": size}, seed, 20 + 9 * seed) for seed in range(2)]
    with Engine.open(model, **SETTINGS) as engine:
        expected = [one.new_ids for one in run(engine, prompts, temperature)]
        experts = engine.plan.slots.num_experts
    more = {} if slots is None else {"expert_slots": open_model(model).config.experts_per_token}
    with Engine.open(model, speculate="mtp", **SETTINGS, **more) as engine:
        assert [one.new_ids for one in run(engine, prompts, temperature)] == expected
        assert [one.new_ids for one in run(engine, prompts, temperature)] == expected
        assert engine.ledger.proposed_tokens > 0
        assert engine.plan.slots.num_experts == experts + open_model(model).config.num_experts
        # Callers see the model, whose layers are those of its config.
        assert engine.config == open_model(model).config


def test_text_is_the_same_when_experts_move_into_slots(model: Path) -> None:
    prompt = prompt_ids({"vocab_size": vocab_size(model)}, 2, 30)
    with Engine.open(model, speculate="mtp", **SETTINGS) as engine:
        expected = engine.generate(prompt, params(0.0)).token_ids
        assert engine.plan.slots.is_packed
        sequence = engine.submit(prompt, params(0.0))
        while len(sequence.new_ids) < len(expected) // 2:
            engine.step()
        assert not engine.resize(engine.plan.total_bytes - 1).slots.is_packed
        while sequence.result is None:
            engine.step()
        assert tuple(sequence.new_ids) == tuple(expected)
        mtp, proposed = engine._drafts.mtp, engine.ledger.proposed_tokens
        assert engine.generate(prompt[::-1], params(0.0)).token_ids  # a new answer tries proposals
        assert engine.ledger.proposed_tokens > proposed
        assert mtp is not None
        assert mtp.fault is None


def test_the_plan_counts_the_layer(model: Path) -> None:
    with Engine.open(model, **SETTINGS) as plain, Engine.open(model, speculate="mtp", **SETTINGS) as engine:
        assert engine.plan.dense_bytes > plain.plan.dense_bytes
        assert engine.plan.kv_bytes > plain.plan.kv_bytes
        more_bytes = engine.plan.working_bytes - plain.plan.working_bytes
        assert engine._started.model.draft is not None
        assert more_bytes >= engine._started.model.draft._decoder._stack.buffer_bytes
        assert engine.plan.resident_bytes > plain.plan.resident_bytes
        assert engine._started.model.weights.nbytes <= engine.plan.dense_bytes


def test_drafts_have_a_head_of_their_own_where_it_is_smaller(tmp_path: Path) -> None:
    config = glm4_moe(
        hidden_size=64, head_dim=32, intermediate_size=32, moe_intermediate_size=32, vocab_size=144
    )
    with Engine.open(
        write_mtp_model(tmp_path / "f32", config, seed=3), speculate="mtp", **SETTINGS
    ) as engine:
        head, draft = engine._started.model.weights.matrices["head"], engine._started.model.draft
        assert draft is not None
        copy, runtime, shape = draft._head, engine._started.model._runtime, (head.rows, head.cols)
        assert (copy.rows, copy.cols, copy.format) == (*shape, "q8")
        every = np.arange(head.rows, dtype=np.int32)
        values, copied = np.empty(shape, np.float32), np.empty(shape, np.float32)
        _native.embed(runtime, head, every, values)
        _native.embed(runtime, copy, every, copied)
        in_q8 = np.empty(matrix_bytes("q8", *shape), np.uint8)
        _native.quantize("q8", values, in_q8)
        assert np.array_equal(copied, _native.dequantize("q8", in_q8, *shape))
        files = open_model(tmp_path / "f32").with_draft_layer()
        assert engine.plan.dense_bytes == dense_footprint(files.dense) + len(in_q8)
    quantised = tmp_path / "model.gguf"
    write_gguf_model(quantised, config | {"num_nextn_predict_layers": 1}, one_type("Q8_0"), seed=3)
    files = open_model(quantised).with_draft_layer()
    with Engine.open(quantised, speculate="mtp", **SETTINGS) as engine:
        assert engine._started.model.draft is not None
        assert engine._started.model.draft._head is engine._started.model.weights.matrices["head"]
        assert engine.plan.dense_bytes == dense_footprint(files.dense)


def test_auto_takes_it_where_it_is(model: Path, tmp_path: Path) -> None:
    with Engine.open(model, speculate="auto", **SETTINGS) as engine:
        assert engine.settings.speculate == "mtp"
    without = write_model(tmp_path / "model", CONFIGS["deepseek_v3"], seed=1)
    with Engine.open(without, speculate="auto", **SETTINGS) as engine:
        assert engine.settings.speculate == "lookup"
    with pytest.raises(UnsupportedModel, match="has no layer for multi-token prediction"):
        Engine.open(without, speculate="mtp", **SETTINGS)


def test_a_damaged_layer_keeps_no_text_from_running(tmp_path: Path) -> None:
    damaged = write_mtp_model(tmp_path / "model", CONFIGS["deepseek_v3"], seed=1, left_out="hnorm.weight")
    with Engine.open(damaged, speculate="auto", **SETTINGS) as engine:
        assert engine.settings.speculate == "lookup"
        assert len(engine.generate([5, 6, 7], params(0.0)).token_ids) == 40
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\.hnorm\.weight is missing"):
        Engine.open(damaged, speculate="mtp", **SETTINGS)


def test_answers_go_on_when_an_expert_of_the_layer_cannot_be_read(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = prompt_ids({"vocab_size": vocab_size(model)}, 1, 40)
    with Engine.open(model, speculate="mtp", **SETTINGS) as engine:
        expected = engine.generate(prompt, params(0.0)).token_ids
        mtp = engine._drafts.mtp
        assert mtp is not None

        def fail(*ignored: object) -> None:
            raise ReadFailed("the drive is gone")

        monkeypatch.setattr(mtp._layer, "run", fail)
        assert engine.generate(prompt, params(0.0)).token_ids == expected
        assert str(mtp.fault) == "the drive is gone"
        assert not mtp._followed


def test_workers_of_a_group_have_no_draft_layer(model: Path) -> None:
    with pytest.raises(UsageError, match="workers of a group do not have the experts"):
        Engine.open(model, speculate="mtp", experts=_Group(), **SETTINGS)


class _Group:
    runs_here, most_rows = True, 1 << 20

    def nbytes(self, files: object) -> int:
        return 0

    def open(self, *ignored: object, **options: object) -> Any:
        raise AssertionError


def test_logits_of_a_prompt_do_not_change(model: Path) -> None:
    prompt = prompt_ids({"vocab_size": vocab_size(model)}, 2, 30)
    with Engine.open(model, **SETTINGS) as plain, Engine.open(model, speculate="mtp", **SETTINGS) as engine:
        assert np.array_equal(plain.logits(prompt), engine.logits(prompt))


def test_entries_of_pools_lie_behind_the_draft_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No family has both yet: the draft layer only has its store, in front of those of the pools."""
    files = open_model(write_model(tmp_path, glm5_next(index_kpool=4, index_topk=8), seed=3))
    draft = replace(files.config.draft_only.layers[-1], is_moe=False)
    with_draft = replace(
        files, config=replace(files.config, layers=(*files.config.layers, draft)), num_draft_layers=1
    )
    monkeypatch.setattr("argosy.model.model.DraftLayer", lambda *_, **__: None)
    found = []
    for one in (files, with_draft):
        store = _native.Store(2)
        reading = ModelReading(one, store)
        reading.wait()
        sizes = ModelSizes(kv_blocks=24, kv_dtype="f32", step_tokens=70, num_states=NUM_SEQUENCES, slots=None)
        model = reading.finish(sizes, _native.Runtime(1), clock=PartClock())
        (step,) = make_steps(files.config, [[Run(0, 70)]])
        found.append(model.forward(step))
        assert model.take_uses().sum() > 0
        store.close()
        model.close()
    np.testing.assert_array_equal(*found)
