"""The native stack gives the same bits as its operations called one by one, and stops where Python must decide."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from argosy import _native
from argosy.checkpoint.pack import pack
from argosy.config import ModelConfig
from argosy.experts.cache import CachedRunner
from argosy.experts.runner import Rows
from argosy.model.clock import PARTS, PartClock
from argosy.model.decoder import Decoder, RouteObserver
from argosy.model.families import open_model
from argosy.model.layers import kv_shapes, stack_sizes
from argosy.model.step import Addition, Overrides, Step
from tests.helpers.examples import few_of
from tests.model.open_parts import (
    BLOCK_TOKENS,
    BLOCKS_A_SEQUENCE,
    NUM_SEQUENCES,
    Parts,
    Residency,
    Run,
    decode,
    make_steps,
    open_parts,
)
from tests.model.reference_step import Floats, ReferenceDecoder
from tests.models.references import REFERENCES
from tests.models.runnable import runnable
from tests.models.safetensors_file import read_safetensors, write_checkpoint
from tests.models.tiny import (
    RawConfig,
    gpt_oss,
    minimax_m2,
    mixtral,
    qwen2_moe,
    qwen3_moe,
    random_tensors,
    write_model,
)
from tests.models.tiny_delta import qwen3_next
from tests.models.tiny_gemma import gemma4

MAX_TOKENS = 40

# Chunks, one token, a batch, and prompt tokens beside decoding sequences; longer than a block and a sliding window.
STEPS = [
    [Run(0, 7)],
    [Run(0, 21), Run(1, 3)],
    [decode(0), Run(1, 11)],
    [decode(0)],
    [decode(0), decode(1), Run(2, 35)],
    [decode(2), decode(0), decode(1)],
    [Run(3, 1), decode(1)],
]

# Tables have their own tests: test_ngram_layer.py.
CHECKPOINTS = {one.name: one.directory for one in REFERENCES if not one.name.startswith("qwen4_exp")}
PACKED = {
    "mixtral-q8": (mixtral(hidden_size=80, intermediate_size=72), "q8"),
    "minimax_m2-q8": (minimax_m2(num_local_experts=16, num_experts_per_tok=4), "q8"),
    "qwen2_moe-q4": (qwen2_moe(mlp_only_layers=[1], num_hidden_layers=4), "q4"),
    "qwen3_next-q8": (qwen3_next(), "q8"),
    "gpt_oss-q8": (gpt_oss(hidden_size=72, intermediate_size=40, num_experts_per_tok=3), "q8"),
    "gemma4-q8": (gemma4(hidden_size=72, num_experts=16, top_k_experts=4), "q8"),
    "qwen3_moe-q4": (qwen3_moe(num_experts=16, num_experts_per_tok=4, attention_bias=True), "q4"),
}


MODELS = [*CHECKPOINTS, *PACKED]
# Alternating axes, axes in sections, delta nets, latent vectors, sliding windows with sinks, and a q8 model.
SEEING = (
    "qwen3_vl_moe_plain", "glm4v_moe_plain", "qwen3_omni_moe_plain", "qwen3_5_moe_plain", "deepseek_v3_plain",
    "gpt_oss_plain", "mixtral_plain", "qwen3_next-q8",
)  # fmt: skip


# `reference_step.py` has one hidden state and attends to all positions or to chosen ones; residual streams, chosen
# blocks and pooled entries have their own tests: test_residual.py, test_block_index.py, test_mixers.py.
BEYOND_REFERENCE = ("deepseek_v4", "glm5_next", "hy_v4", "kimi_k3", "minimax_m3")
OF_REFERENCE = [name for name in MODELS if not name.startswith(BEYOND_REFERENCE)]

# One of each kind of layers, and the packed ones. `test_logits.py` compares every model with transformers.
IN_SHORT = [
    *PACKED,
    "deepseek_v2_groups",
    *(f"{family}_plain" for family in (
        "bailing_hybrid", "deepseek_v3", "gemma4", "glm4_moe", "gpt_oss", "kimi_linear", "lfm2_moe", "minimax",
        "minimax_m2", "mixtral", "nemotron_h", "olmoe", "qwen3_5_moe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe",
        "qwen3_vl_moe",
    )),
]  # fmt: skip
few_models = pytest.mark.parametrize("directory", few_of(MODELS, IN_SHORT), indirect=True)


@pytest.fixture(scope="module", params=MODELS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param in CHECKPOINTS:
        return runnable(CHECKPOINTS[request.param], tmp_path_factory.mktemp(request.param))
    config, format = PACKED[request.param]
    root = tmp_path_factory.mktemp(request.param)
    pack(open_model(write_model(root / "plain", config, seed=5)), root / "packed", format=format)
    return root / "packed"


@pytest.fixture
def turn(request: pytest.FixtureRequest) -> int:
    """The number of the model."""
    return MODELS.index(request.node.callspec.params["directory"])


def require_experts(directory: Path) -> None:
    if not open_model(directory).experts:
        pytest.skip("there are no experts")


def decoder_of(
    parts: Parts,
    *,
    observe: RouteObserver | None = None,
    clock: PartClock | None = None,
    room_for_choices: Callable[[int], Any] | None = None,
) -> Decoder:
    decoder = Decoder(
        parts.config,
        parts.weights,
        parts.experts,
        parts.kv(),
        parts.runtime,
        MAX_TOKENS,
        clock=clock or PartClock(),
        recurrent=parts.recurrent(),
        observe=observe,
    )
    decoder.room_for_choices = room_for_choices
    return decoder


def room_of(config: ModelConfig) -> Callable[[int], NDArray[np.int32]]:
    if len(set(map(config.chosen_in, config.moe_layers))) > 1:
        pytest.skip("layers choose different numbers of experts; such choices are not kept")
    return lambda tokens: np.full((len(config.moe_layers), tokens, config.experts_per_token), -1, np.int32)


def run(parts: Parts, decoder: Decoder | ReferenceDecoder) -> list[Floats]:
    run_step = decoder.forward if isinstance(decoder, Decoder) else decoder.logits
    return [run_step(step) for step in make_steps(parts.config, STEPS)]


# Experts that are not all resident. What a cache does depends on no instruction set, and a model's layers on no cache.
# So they take turns: each model meets each of them, and each instruction set does.
PARTLY_RESIDENT: tuple[Residency, ...] = ("smallest cache", "guessing cache", "no experts")


@pytest.mark.parametrize(
    "directory",
    few_of(
        OF_REFERENCE,
        [
            *IN_SHORT, "deepseek_v2_lite", "glm4_moe_lite_plain", "mixtral_window_top1", "olmoe_cut_off_renormalised",
            "qwen2_moe_layer_types_yarn", "qwen3_moe_dynamic_every_second",
        ],
    ),
    indirect=True,
)  # fmt: skip
@pytest.mark.covering(1)
@pytest.mark.parametrize("instruction_set", _native.instruction_sets())
@pytest.mark.parametrize("is_resident", [True, False], ids=["resident", "partly resident"])
def test_a_step_has_the_bits_of_its_operations(
    directory: Path, turn: int, is_resident: bool, instruction_set: str
) -> None:
    turn += _native.instruction_sets().index(instruction_set)
    residency = "resident" if is_resident else PARTLY_RESIDENT[turn % len(PARTLY_RESIDENT)]
    require_the_bits_of_the_operations(directory, residency, instruction_set)


@pytest.mark.parametrize("directory", few_of(OF_REFERENCE, SEEING[3:6]), indirect=True)
def test_a_step_with_experts_in_another_process_has_the_bits_of_its_operations(directory: Path) -> None:
    """How rows travel there does not depend on the instruction set."""
    require_the_bits_of_the_operations(directory, "another process", _native.instruction_sets()[-1])


def require_the_bits_of_the_operations(directory: Path, residency: Residency, instruction_set: str) -> None:
    with open_parts(directory, residency, instruction_set=instruction_set) as parts:
        expected = run(
            parts,
            ReferenceDecoder(
                parts.config,
                parts.weights,
                parts.reference_experts(),
                parts.kv(),
                parts.runtime,
                parts.recurrent(),
            ),
        )
        found = run(parts, decoder_of(parts))

    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert np.isfinite(theirs).all()
        np.testing.assert_array_equal(ours, theirs, err_msg=f"step {step}")


@few_models
def test_a_stack_and_its_operations_allocate_what_the_sizes_say(directory: Path) -> None:
    """The memory plan uses the same sizes before anything is loaded."""
    with open_parts(directory, "resident", threads=2) as parts:
        sizes = stack_sizes(parts.config)
        scratch = sizes.scratch_bytes(MAX_TOKENS, 2)
        decoder = decoder_of(parts)
        assert decoder._stack.sizes == sizes
        assert decoder._stack.buffer_bytes == sizes.buffer_bytes(MAX_TOKENS)
        assert parts.runtime.scratch_bytes == scratch
        (step,) = make_steps(parts.config, [[Run(0, MAX_TOKENS)]])
        decoder.forward(step)
        assert parts.runtime.scratch_bytes == scratch


def test_sizes_differ_if_a_layer_differs() -> None:
    def sizes(width: int) -> _native.StackSizes:
        one = _native.StackSizes(64, 8)
        one.add_attention(4, 2, 16, False)
        one.add_routed(8, 2, width, 0)
        return one

    assert sizes(32) == sizes(32)
    assert sizes(32) != sizes(48)
    assert sizes(4800).scratch_bytes(MAX_TOKENS, 1) > sizes(32).scratch_bytes(MAX_TOKENS, 1)
    # Three rows of hidden state, two heads of keys and values, queries and attention, sines, routing, expert outputs.
    row = 3 * 64 + 2 * 32 + 2 * 64 + 2 * 8 + 8 + 2 * 2 + 1 + 2 * 64
    assert sizes(32).buffer_bytes(64) == 64 * 4 * row


def test_layers_that_run_alone_use_their_own_blocks(tmp_path: Path) -> None:
    """The second layer, which sees every position, behind a first one that has window blocks."""
    directory = runnable(CHECKPOINTS["gpt_oss_plain"], tmp_path)
    with open_parts(directory, "resident") as parts:
        num_blocks = NUM_SEQUENCES * BLOCKS_A_SEQUENCE
        found = []
        for window_blocks in (None, 2):
            kv = _native.KvCache(kv_shapes(parts.config), num_blocks, BLOCK_TOKENS, "f32", window_blocks)
            decoder = Decoder(
                parts.config,
                parts.weights,
                parts.experts,
                kv,
                parts.runtime,
                MAX_TOKENS,
                clock=PartClock(),
                layers=range(1, 2),
            )
            found.append(run(parts, decoder))
    for one, other in zip(*found, strict=True):
        assert np.array_equal(one, other)


@few_models
def test_threads_and_observers_change_nothing_and_all_choices_are_observed(directory: Path) -> None:
    heard: list[tuple[int, tuple[int, ...]]] = []

    def observe(layer: int, expert_ids: Any) -> None:
        heard.append((layer, expert_ids.shape))
        assert all(len(set(row)) == len(row) for row in expert_ids.tolist())

    with open_parts(directory, "resident") as parts:
        expected = run(parts, decoder_of(parts))
    with open_parts(directory, "resident", threads=2) as parts:
        found = run(parts, decoder_of(parts, observe=observe))
        config = parts.config

    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    num_tokens = [sum(run.count for run in runs) for runs in STEPS]
    assert heard == [
        (layer, (tokens, config.chosen_in(layer))) for tokens in num_tokens for layer in config.moe_layers
    ]


@few_models
@pytest.mark.covering(1)
@pytest.mark.parametrize("residency", ["resident", "smallest cache"])
def test_uses_count_how_often_tokens_chose_each_expert_since_the_last_call(
    directory: Path, residency: Any
) -> None:
    heard: list[tuple[int, Any]] = []
    with open_parts(directory, "resident") as parts:
        run(parts, decoder_of(parts, observe=lambda layer, ids: heard.append((layer, ids.copy()))))
    with open_parts(directory, residency) as parts:
        decoder = decoder_of(parts)
        run(parts, decoder)
        found, config = decoder.take_uses(), parts.config
        assert not decoder.take_uses().any()
    expected = np.zeros((config.num_layers, config.num_experts), np.int64)
    for layer, ids in heard:
        np.add.at(expected[layer], ids.reshape(-1), 1)
    np.testing.assert_array_equal(found, expected)


def test_a_resident_model_runs_without_python_and_counts_the_same_lookups() -> None:
    reference = REFERENCES[0]
    with open_parts(reference.directory, "resident") as parts:
        assert parts.experts is not None
        run(parts, decoder_of(parts, observe=lambda layer, ids: None))
        observed = parts.experts.stats.lookups

        def no_run(*_: Any) -> Any:
            raise AssertionError("a resident model asked Python to run experts")

        parts.experts.run = no_run  # type: ignore[method-assign]
        run(parts, decoder_of(parts))

    assert observed > 0
    assert parts.experts.stats.lookups == 2 * observed
    assert parts.experts.stats.hits == 2 * observed


class Watched:
    """An expert runner that records the calls it receives."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)

    def run(self, layer: int, dispatch: _native.Dispatch, rows: Rows, out: Rows) -> Any:
        self.calls.append(("run", layer, dispatch))
        return self.runner.run(layer, dispatch, rows, out)

    def guess(self, layer: int, by_rank: Sequence[Sequence[int]], *, is_sweep: bool) -> None:
        self.calls.append(("guess", layer, by_rank, is_sweep))
        self.runner.guess(layer, by_rank, is_sweep=is_sweep)


def watched_calls(
    directory: Path, steps: Sequence[Sequence[Run]], residency: Residency = "smallest cache"
) -> tuple[list[Any], Any]:
    with open_parts(directory, residency) as parts:
        runner = Watched(parts.experts)
        choices: list[Any] = []
        watched = replace(parts, experts=runner)  # type: ignore[arg-type]
        decoder = decoder_of(watched, observe=lambda layer, ids: choices.append(ids.copy()))
        for step in make_steps(parts.config, steps):
            decoder.forward(step)
        return runner.calls, choices


def test_a_dispatch_groups_choices_by_expert_and_lists_experts_of_prompt_tokens_only(
    tmp_path: Path,
) -> None:
    directory = write_model(tmp_path, qwen3_moe(num_experts=16, num_experts_per_tok=2), seed=1)
    calls, choices = watched_calls(directory, [[Run(0, 5)], [decode(0), Run(1, 3)], [decode(0), decode(1)]])
    runs = [call for call in calls if call[0] == "run"]
    num_decoding = [0] * 3 + [1] * 3 + [2] * 3  # these are the first rows of each batch
    assert len(runs) == len(choices) == 9
    for (_, layer, dispatch), ids, decoding in zip(runs, choices, num_decoding, strict=True):
        flat = ids.reshape(-1)
        assert layer in range(3)
        assert (dispatch.num_tokens, dispatch.experts_per_token) == ids.shape
        np.testing.assert_array_equal(dispatch.choices(), ids)
        assert dispatch.experts == sorted(set(flat.tolist()))
        assert dispatch.scan == sorted(set(dispatch.experts) - set(ids[:decoding].reshape(-1).tolist()))
        for expert in dispatch.experts:
            assert dispatch.assignments(expert) == np.flatnonzero(flat == expert).tolist()


# The router of Gemma-4 has its own norm.
ROUTERS = {
    "qwen3_moe": ("post_attention_layernorm.weight", "mlp.gate.weight", "model."),
    "gemma4": ("router.scale", "router.proj.weight", "model.language_model."),
}


@pytest.mark.parametrize(
    "config",
    [qwen3_moe(num_experts=16, num_experts_per_tok=4), gemma4(num_experts=16, top_k_experts=4)],
    ids=lambda config: config["model_type"],
)
def test_look_ahead_returns_the_next_routers_choice_for_the_current_hidden_state(
    config: Any, tmp_path: Path
) -> None:
    directory = write_model(tmp_path, config, seed=3)
    norm_name, router_name, root = ROUTERS[config["model_type"]]
    tensors = read_safetensors(directory / "model.safetensors")
    with open_parts(directory, "smallest cache") as parts:
        config, asked = parts.config, 0

        def observe(layer: int, expert_ids: Any) -> None:
            nonlocal asked
            found = decoder._stack.look_ahead()
            if layer == config.moe_layers[-1]:
                assert found == []
                return
            prefix = f"{root}layers.{layer + 1}."
            hidden = decoder._stack.hidden().astype(np.float64)
            norm = np.sqrt((hidden**2).mean(axis=1, keepdims=True) + config.norm_eps)
            normed = hidden / norm * tensors[prefix + norm_name]
            scores = normed @ tensors[prefix + router_name].T.astype(np.float64)
            ranked = np.argsort(-scores, axis=1)[:, : config.experts_per_token]
            named: set[int] = set()
            for rank, experts in enumerate(found):
                fresh = [e for e in dict.fromkeys(ranked[:, rank].tolist()) if e not in named]
                assert experts == fresh
                named |= set(fresh)
            asked += 1

        decoder = decoder_of(parts, observe=observe)
        for step in make_steps(config, [[Run(0, 5)], [decode(0)]]):
            decoder.forward(step)
        assert asked == 2 * (len(config.moe_layers) - 1)


def test_look_ahead_while_experts_run_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CachedRunner, "elsewhere", None)  # the stack stops at every layer
    directory = write_model(tmp_path, mixtral(num_local_experts=4, num_experts_per_tok=2), seed=1)
    with open_parts(directory, "smallest cache") as parts:
        (step,) = make_steps(parts.config, [[Run(0, 3)]])
        expected = decoder_of(parts).forward(step)
        decoder = decoder_of(parts)
        looked: list[list[list[int]]] = []

        class Stack:
            def __getattr__(self, name: str) -> Any:
                return getattr(stack, name)

            def finish_experts(self, experts: Sequence[int]) -> None:
                stack.finish_experts(experts)
                looked.append(stack.look_ahead())

        stack, decoder._stack = decoder._stack, Stack()  # type: ignore[assignment]
        np.testing.assert_array_equal(decoder.forward(step), expected)
    assert any(looked)


def test_prefill_and_decode_guess_the_experts_of_the_next_layer(tmp_path: Path) -> None:
    directory = write_model(
        tmp_path, mixtral(num_local_experts=4, num_experts_per_tok=2, num_hidden_layers=3), seed=1
    )
    calls, _ = watched_calls(directory, [[Run(0, 40)], [decode(0)]], residency="guessing cache")
    in_order = [(call[0], call[1], call[-1] if call[0] == "guess" else None) for call in calls]
    for step, is_sweep in enumerate((True, False)):
        assert in_order[5 * step : 5 * step + 5] == [
            ("run", 0, None),
            ("guess", 1, is_sweep),
            ("run", 1, None),
            ("guess", 2, is_sweep),
            ("run", 2, None),
        ]


def test_a_failed_read_ends_the_step_and_the_next_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CachedRunner, "elsewhere", None)  # the stack stops at every layer
    directory = write_model(tmp_path, qwen2_moe(), seed=2)
    with open_parts(directory, "smallest cache") as parts:
        runner = Watched(parts.experts)
        decoder = decoder_of(replace(parts, experts=runner))  # type: ignore[arg-type]
        (step,) = make_steps(parts.config, [[Run(0, 9)]])
        expected = decoder.forward(step)
        run, runner.run = runner.run, fail_at_second_call(runner.run)  # type: ignore[method-assign]
        with pytest.raises(InterruptedError):
            decoder.forward(step)
        runner.run = run  # type: ignore[method-assign]
        np.testing.assert_array_equal(decoder.forward(step), expected)


def fail_at_second_call(run: Any) -> Any:
    calls: list[int] = []

    def failing(layer: int, *arguments: Any) -> Any:
        calls.append(layer)
        if len(calls) == 2:
            raise InterruptedError
        return run(layer, *arguments)

    return failing


@pytest.mark.parametrize("residency", ["resident", "smallest cache"])
def test_native_seconds_reach_the_clock_and_the_parts_sum_to_the_total(residency: Any) -> None:
    clock = PartClock()
    with open_parts(REFERENCES[0].directory, residency) as parts:
        decoder = decoder_of(parts, clock=clock)
        clock.mark("other")
        before, last = dict(clock.seconds), clock._last
        run(parts, decoder)
    spent = {part: clock.seconds[part] - before[part] for part in PARTS}
    assert sum(spent.values()) == pytest.approx(clock._last - last)
    assert all(spent[part] > 0 for part in ("router", "attention_and_dense", "expert_compute", "other"))
    assert (spent["waiting_for_reads"] > 0) == (residency == "smallest cache")


def test_logits_of_any_rows_are_those_of_the_step() -> None:
    with open_parts(REFERENCES[0].directory, "resident") as parts:
        decoder = decoder_of(parts)
        (step,) = make_steps(parts.config, [[Run(0, 9)]])
        whole = decoder.forward(step)
        np.testing.assert_array_equal(decoder.logits(np.array([8, 0, 3])), whole[[8, 0, 3]])


# ── arguments that the binding refuses ──────────────────────────────────────────────────────────────────────────


@pytest.fixture
def waiting(tmp_path: Path) -> Iterator[tuple[_native.Stack, int, _native.Dispatch]]:
    """A stack that waits for experts, the layer that waits, and its dispatch."""
    directory = write_model(tmp_path, qwen3_moe(num_experts=8, num_experts_per_tok=3), seed=1)
    with open_parts(directory, "resident") as parts:
        decoder = decoder_of(parts, observe=lambda layer, ids: None)
        (step,) = make_steps(parts.config, [[Run(0, 1)]])
        begin(decoder, step)
        demand = decoder._stack.advance()
        assert demand is not None
        yield decoder._stack, *demand


def begin(decoder: Decoder, step: Step, **changes: Any) -> None:
    arguments = {
        "token_ids": step.token_ids,
        "sequence": step.sequence,
        "slots": step.slots,
        "is_decode": step.is_decode,
        "block_table": step.block_table,
        "order": step.order,
        "wanted": step.wanted,
        "logits": np.empty((len(step.wanted), decoder.config.vocab_size), np.float32),
    }
    decoder._stack.begin(**(arguments | changes))


def test_an_expert_finishes_once_and_only_if_its_layer_waits_for_it(waiting: Any) -> None:
    stack, layer, dispatch = waiting
    wanted = dispatch.experts
    other = next(expert for expert in range(8) if expert not in wanted)

    for wrong in (other, -1, 8):
        with pytest.raises(ValueError, match=f"layer {layer} does not wait for expert {wrong}"):
            stack.finish_experts([wrong])
    stack.finish_experts(wanted[:2])
    with pytest.raises(ValueError, match=f"layer {layer} does not wait for expert {wanted[1]}"):
        stack.finish_experts([wanted[1]])
    with pytest.raises(ValueError, match=f"layer {layer} still waits for 1 experts"):
        stack.advance()
    for call in (stack.rows, stack.expert_out, lambda: stack.finish_experts(wanted[2:])):
        with pytest.raises(ValueError, match="no layer waits for experts"):
            call()


def test_rows_and_outputs_are_views_that_outlive_the_stack(waiting: Any) -> None:
    stack, _, dispatch = waiting
    rows, out = stack.rows(), stack.expert_out()
    assert rows.shape[0] == dispatch.num_tokens
    assert out.shape == (dispatch.num_tokens * dispatch.experts_per_token, rows.shape[1])
    assert not rows.flags.writeable
    out[:] = 7
    assert (stack.expert_out() == 7).all()
    del stack, waiting
    assert (out == 7).all()


def test_a_dispatch_that_is_kept_does_not_change(tmp_path: Path) -> None:
    calls, choices = watched_calls(
        write_model(tmp_path, qwen3_moe(num_experts=16, num_experts_per_tok=2), seed=1), [[Run(0, 5)]]
    )
    kept = [call[2] for call in calls if call[0] == "run"]
    assert len({tuple(dispatch.experts) for dispatch in kept}) > 1
    for dispatch, ids in zip(kept, choices, strict=True):
        np.testing.assert_array_equal(dispatch.choices(), ids)


WRONG_STEPS = {
    "token_ids": (np.array([0, 112], np.int32), r"token_ids\[1\] is 112, expected 0 to 111"),
    "order": (np.array([0, 96], np.int32), r"order\[1\] is 96, expected 0 to 95"),
    "sequence": (np.array([0, 4], np.int32), r"sequence\[1\] is 4, expected 0 to 3"),
    "slots": (np.array([0, 384], np.int64), "a slot is 384, expected 0 to 383"),
    "wanted": (np.array([0, 2], np.int64), "a row is 2, expected 0 to 1"),
    "block_table": (np.full((4, 6), 24, np.int32), r"block_table\[0\] is 24, expected 0 to 23"),
    "is_decode": (np.array([0, 1], np.int32), "is_decode is int32, expected bool"),
    "logits": (np.zeros((1, 112), np.float32), r"logits has shape \[1, 112\], expected \[2, 112\]"),
}


@pytest.mark.parametrize("name", WRONG_STEPS)
def test_a_step_that_does_not_fit_is_refused_with_both_numbers(name: str, tmp_path: Path) -> None:
    value, sentence = WRONG_STEPS[name]
    with open_parts(write_model(tmp_path, mixtral(), seed=1), "resident") as parts:
        decoder = decoder_of(parts)
        (step,) = make_steps(parts.config, [[Run(0, 2)]])
        with pytest.raises(ValueError, match=sentence):
            begin(decoder, step, **{name: value})


def test_a_step_with_more_tokens_than_the_maximum_is_refused(tmp_path: Path) -> None:
    with open_parts(write_model(tmp_path, mixtral(), seed=1), "resident") as parts:
        (step,) = make_steps(parts.config, [[Run(0, MAX_TOKENS + 1)]])
        with pytest.raises(ValueError, match="tokens is 41, expected 1 to 40"):
            decoder_of(parts).forward(step)


# ── media: given embeddings, positions on axes, spans that see later tokens, additions and taps ──────────────────


def with_media(config: ModelConfig, step: Step, *, seed: int) -> Step:
    """Add random media to a step: half of its embeddings, angles on three axes, a span in every run of six tokens."""
    rng = np.random.default_rng(seed)
    num_tokens, hidden = step.num_tokens, config.hidden_size
    sees_until = step.order + 1
    for begin, end in pairwise([0, *(np.flatnonzero(np.diff(step.sequence)) + 1), num_tokens]):
        if end - begin >= 6:
            sees_until[begin + 1 : end - 2] = sees_until[end - 3]

    def some_rows() -> NDArray[np.int64]:
        return rng.permutation(num_tokens)[: (num_tokens + 1) // 2].astype(np.int64)

    def vectors(rows: NDArray[np.int64]) -> Floats:
        return rng.standard_normal((len(rows), hidden), np.float32)

    rows = [some_rows() for _ in range(4)]
    return step._replace(
        angles=rng.uniform(0, 90, (3, num_tokens)).astype(np.float32),
        sees_until=sees_until,
        overrides=Overrides(rows[3], vectors(rows[3])),
        additions=tuple(Addition(layer, rows[layer], vectors(rows[layer])) for layer in range(MEDIA_LAYERS)),
        taps=(config.num_layers - 1, 0),
        wanted=np.arange(num_tokens, dtype=np.int64)[::2].copy(),  # several rows of one sequence
    )


MEDIA_LAYERS = 2


@pytest.mark.covering(2)
@pytest.mark.parametrize("directory", SEEING, indirect=True)
@pytest.mark.parametrize("residency", ["resident", "smallest cache"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("instruction_set", _native.instruction_sets())
def test_a_step_with_media_has_the_bits_of_its_operations(
    directory: Path, residency: Any, threads: int, instruction_set: str
) -> None:
    with open_parts(directory, residency, threads=threads, instruction_set=instruction_set) as parts:
        config = parts.config
        reference = ReferenceDecoder(
            config, parts.weights, parts.reference_experts(), parts.kv(), parts.runtime, parts.recurrent()
        )
        decoder = decoder_of(parts)
        for number, text in enumerate(make_steps(config, STEPS)):
            step = with_media(config, text, seed=number)
            expected = reference.logits(step)
            np.testing.assert_array_equal(
                decoder.forward(step), expected[step.wanted], err_msg=f"step {number}"
            )
            for layer in step.taps:
                np.testing.assert_array_equal(decoder.tapped(layer), reference.tapped[layer])


@pytest.mark.parametrize("directory", SEEING[:3], indirect=True)
def test_each_part_of_media_changes_the_logits_and_its_default_changes_nothing(directory: Path) -> None:
    with open_parts(directory, "resident") as parts:
        (text,) = make_steps(parts.config, [[Run(0, 20)]])
        media = with_media(parts.config, text, seed=0)

        def logits(**fields: Any) -> Floats:
            return decoder_of(parts).forward(text._replace(**fields))

        plain = logits()
        for name in ("angles", "sees_until", "overrides", "additions"):
            assert not np.array_equal(logits(**{name: getattr(media, name)}), plain), name
        none = np.zeros(0, np.int64)
        vectors = np.zeros((0, parts.config.hidden_size), np.float32)
        defaults = {
            "angles": np.tile(text.order.astype(np.float32), (3, 1)),
            "sees_until": text.order + 1,
            "overrides": Overrides(none, vectors),
            "additions": (Addition(0, none, vectors),),
            "taps": (0,),
        }
        np.testing.assert_array_equal(logits(**defaults), plain)


def test_a_layer_that_was_not_tapped_has_no_hidden_state() -> None:
    with open_parts(REFERENCES[0].directory, "resident") as parts:
        decoder = decoder_of(parts)
        (step,) = make_steps(parts.config, [[Run(0, 3)]])
        decoder.forward(step._replace(taps=(1,)))
        assert decoder.tapped(1).shape == (3, parts.config.hidden_size)
        decoder.forward(step)
        with pytest.raises(KeyError):
            decoder.tapped(1)


def longs(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def zeros(*shape: int) -> Floats:
    return np.zeros(shape, np.float32)


WRONG_MEDIA: dict[str, tuple[str, Any, str]] = {
    "sees less": ("sees_until", np.array([1, 1], np.int32), r"sees_until\[1\] is 1, expected 2 to 96"),
    "sees more": ("sees_until", np.array([97, 2], np.int32), r"sees_until\[0\] is 97, expected 1 to 96"),
    "sees int64": ("sees_until", longs(1, 2), "sees_until is int64, expected int32"),
    "axes": ("angles", zeros(9, 2), "axes of angles is 9, expected 1 to 8"),
    "no axes": ("angles", zeros(0, 2), "axes of angles is 0, expected 1 to 8"),
    "angles": ("angles", np.full((1, 2), np.nan, np.float32), "angles hold a number that is not finite"),
    "row": ("overrides", (longs(2), zeros(1, 32)), "a row of overrides is 2, expected 0 to 1"),
    "twice": ("overrides", (longs(1, 1), zeros(2, 32)), "overrides gives row 1 twice"),
    "width": (
        "overrides",
        (longs(1), zeros(1, 31)),
        r"vectors of overrides has shape \[1, 31\], expected \[1, 32\]",
    ),
    "layer": ("additions", [(3, longs(1), zeros(1, 32))], "the layer of an addition is 3, expected 0 to 2"),
    "added row": ("additions", [(0, longs(-1), zeros(1, 32))], "a row of an addition is -1, expected 0 to 1"),
    "tapped layer": ("taps", [(-1, zeros(2, 32))], "the layer of a tap is -1, expected 0 to 2"),
    "tap": ("taps", [(0, zeros(1, 32))], r"a tap has shape \[1, 32\], expected \[2, 32\]"),
}


@pytest.mark.parametrize("case", WRONG_MEDIA)
def test_media_that_do_not_fit_are_refused_with_both_numbers(case: str, tmp_path: Path) -> None:
    name, value, sentence = WRONG_MEDIA[case]
    directory = write_model(tmp_path, mixtral(hidden_size=32, num_hidden_layers=3), seed=1)
    with open_parts(directory, "resident") as parts:
        decoder = decoder_of(parts)
        (step,) = make_steps(parts.config, [[Run(0, 2)]])
        with pytest.raises(ValueError, match=sentence):
            begin(decoder, step, **{name: value})


class Interrupted(Exception):
    pass


def test_a_signal_ends_a_long_step_between_two_layers(tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise Interrupted

    directory = write_model(
        tmp_path, mixtral(hidden_size=256, intermediate_size=512, num_hidden_layers=12), seed=1
    )
    handler = signal.signal(signal.SIGALRM, interrupt)
    try:
        # A layer takes about a tenth of a second.
        with open_parts(directory, "resident", instruction_set="plain") as parts:
            decoder = decoder_of(parts)
            (step,) = make_steps(parts.config, [[Run(sequence, 10) for sequence in range(4)]])
            logits = np.full((step.num_tokens, parts.config.vocab_size), np.nan, np.float32)
            begin(decoder, step, logits=logits)

            def advance() -> None:
                signal.setitimer(signal.ITIMER_REAL, 0.001)
                decoder._stack.advance()

            with pytest.raises(Interrupted):
                advance()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert np.isnan(logits).all()  # the head has not run


@few_models
@pytest.mark.covering(1)
@pytest.mark.parametrize("residency", ["resident", "smallest cache"])
def test_kept_choices_are_those_that_an_observer_hears_and_a_resident_step_does_not_stop_for_them(
    directory: Path, residency: Any
) -> None:
    require_experts(directory)
    heard: list[Any] = []
    with open_parts(directory, residency) as parts:
        expected = run(parts, decoder_of(parts, observe=lambda layer, ids: heard.append(ids.copy())))
    with open_parts(directory, residency) as parts:
        decoder = decoder_of(parts, room_for_choices=room_of(parts.config))
        if residency == "resident":
            decoder._run_experts = None  # type: ignore[method-assign, assignment]
        found, kept = [], []
        for step in make_steps(parts.config, STEPS):
            found.append(decoder.forward(step))
            assert decoder.choices is not None
            kept.append(decoder.choices)
        num_layers = len(parts.config.moe_layers)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for number, choices in enumerate(kept):
        np.testing.assert_array_equal(choices, heard[number * num_layers : (number + 1) * num_layers])


@few_models
def test_no_token_chooses_a_forbidden_expert_until_it_is_allowed_again(directory: Path) -> None:
    require_experts(directory)
    with open_parts(directory, "resident") as parts:
        before = run(parts, decoder_of(parts))
        decoder = decoder_of(parts, room_for_choices=room_of(parts.config))
        *_, last = parts.config.moe_layers
        router = parts.config.router
        size = parts.config.num_experts // router.num_groups
        if size == -(-parts.config.experts_per_token // router.kept_groups):
            with pytest.raises(ValueError, match="too few"):  # every token needs all experts of a group
                decoder.forbid(last, [1])
            return
        decoder.forbid(last, [1])
        chosen = []
        for step in make_steps(parts.config, STEPS):
            decoder.forward(step)
            assert decoder.choices is not None
            chosen.append(decoder.choices)
        assert any((choices[:-1] == 1).any() for choices in chosen) or len(parts.config.moe_layers) == 1
        if not parts.config.layers[
            last
        ].has_token_experts:  # there it stays, with no weight: test_stack_flags.py
            assert not any((choices[-1] == 1).any() for choices in chosen)
        decoder = decoder_of(parts)
        decoder.forbid(last, [1])
        decoder.forbid(last, [])
        for ours, theirs in zip(run(parts, decoder), before, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "config",
    [mixtral(), qwen2_moe(), minimax_m2(), qwen3_moe(norm_topk_prob=True)],
    ids=lambda config: str(config["model_type"]),
)
def test_a_model_without_an_expert_has_the_bits_of_one_that_never_had_it(
    config: RawConfig, tmp_path: Path
) -> None:
    """The last expert is removed, so that the sums of the others keep their order."""
    key = "num_local_experts" if "num_local_experts" in config else "num_experts"
    last = config[key] - 1
    tensors = random_tensors(config, 3, "BF16")
    fewer = {
        name: value[:last] if value.shape[0] == config[key] else value
        for name, value in tensors.items()
        if f".experts.{last}." not in name
    }
    for name, values, count in (("whole", tensors, config[key]), ("fewer", fewer, last)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config | {key: count}))
        write_checkpoint(tmp_path / name, {each: ("BF16", value) for each, value in values.items()})
    with open_parts(tmp_path / "fewer", "resident") as parts:
        expected = run(parts, decoder_of(parts))
    with open_parts(tmp_path / "whole", "resident") as parts:
        with_it = run(parts, decoder_of(parts))
        decoder = decoder_of(parts)
        for layer in parts.config.moe_layers:
            decoder.forbid(layer, [last])
        found = run(parts, decoder)
    assert not np.array_equal(with_it[0], expected[0])
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("layer", "experts", "message"),
    [
        (0, [6], "no expert 6"),
        (0, [-1], "no expert -1"),
        (3, [0], "layer 3 has no routed experts"),
        (-1, [0], "layer -1 has no routed experts"),
        (0, [0, 1, 2, 3, 4], "too few experts"),
    ],
)
def test_forbidding_is_refused_if_it_cannot_be(
    layer: int, experts: list[int], message: str, tmp_path: Path
) -> None:
    with open_parts(write_model(tmp_path, mixtral(), seed=1), "resident") as parts:
        decoder = decoder_of(parts)
        with pytest.raises(ValueError, match=message):
            decoder.forbid(layer, experts)
        decoder.forbid(0, [0, 1, 2, 3, 3])  # leaves two, which a token needs
