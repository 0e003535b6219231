"""Resident experts, threads and other sequences in the batch change how fast a token comes, never which token.

Every comparison is exact to the bit: logits, tokens and log-probabilities. It holds within one instruction set, for
weights in place and packed, whatever instruction sets other engines in the process use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np
import pytest

from argosy import Engine, SamplingParams, _native
from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.pack import pack
from argosy.config import AskAhead
from argosy.machine import tuning
from argosy.model.families import open_model
from tests.experts.process_runner import ProcessRunner
from tests.helpers.examples import few_of
from tests.helpers.tunings import keep, random_tunings, use_cache
from tests.models.hub_quantised import write_fp8_model, write_int4_model
from tests.models.mxfp4_models import write_mxfp4_model
from tests.models.safetensors_file import Array
from tests.models.tiny import (
    RawConfig,
    glm4_moe,
    gpt_oss,
    mixtral,
    olmoe,
    prompt_ids,
    qwen2_moe,
    qwen3_moe,
    write_model,
)
from tests.models.tiny_cohere import cohere2_moe
from tests.models.tiny_deepseek_v4 import deepseek_v4
from tests.models.tiny_delta import qwen3_5_moe_text, qwen3_next
from tests.models.tiny_dense import gemma3_text
from tests.models.tiny_flint import flint, lara_mini
from tests.models.tiny_gemma import gemma4
from tests.models.tiny_glm5 import glm5_next
from tests.models.tiny_gqa import mimo_v2_flash
from tests.models.tiny_hy4 import hy_v4
from tests.models.tiny_k3 import kimi_k3
from tests.models.tiny_kda import bailing_hybrid, kimi_linear
from tests.models.tiny_latent import deepseek_v3, glm_moe_dsa, kimi_k2, mistral4
from tests.models.tiny_ling import ling_2_5
from tests.models.tiny_llama4 import llama4_text
from tests.models.tiny_mamba import nemotron_h_puzzle
from tests.models.tiny_minimax import minimax
from tests.models.tiny_minimax_m3 import minimax_m3
from tests.models.tiny_qwen4 import qwen4_exp_text
from tests.models.tiny_recurrent import lfm2_moe
from tests.models.tiny_ring import ring_linear
from tests.models.tiny_step import FULL, SLIDING, step3p5
from tests.models.tiny_windows import laguna

Value = TypeVar("Value")

NUM_NEW = 12
GREEDY = SamplingParams(max_tokens=NUM_NEW, temperature=0, ignore_eos=True, logprobs=3)
SAMPLED = SamplingParams(max_tokens=NUM_NEW, temperature=0.8, top_p=0.9, seed=11, ignore_eos=True, logprobs=3)

# The context fits eight sequences at once.
CONFIGS = {
    "mixtral": mixtral(max_position_embeddings=1024, hidden_size=80, intermediate_size=72),
    "qwen2_moe": qwen2_moe(
        max_position_embeddings=1024,
        use_sliding_window=True,
        sliding_window=9,
        num_experts=7,
        num_experts_per_tok=3,
        mlp_only_layers=[1],
        num_hidden_layers=4,
    ),
    "qwen3_moe": qwen3_moe(
        max_position_embeddings=1024,
        num_experts=16,
        num_experts_per_tok=4,
        hidden_size=72,
        attention_bias=True,
        rope_scaling={"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16},
    ),
    "qwen3_next": qwen3_next(
        max_position_embeddings=1024,
        num_experts=16,
        num_experts_per_tok=4,
        hidden_size=44,
        linear_key_head_dim=34,
        linear_value_head_dim=70,
    ),
    "qwen3_5_moe_text": qwen3_5_moe_text(max_position_embeddings=1024, num_experts=12),
    "deepseek_v3": deepseek_v3(  # latent attention, expert groups, a router bias, a dense layer
        max_position_embeddings=1024,
        n_routed_experts=12,
        num_attention_heads=17,
        num_key_value_heads=17,
        qk_nope_head_dim=16,
        v_head_dim=16,
    ),
    "glm_moe_dsa": glm_moe_dsa(  # an indexer that chooses positions, and layers that share its choice
        max_position_embeddings=1024,
        index_topk=19,
        indexer_types=["full", "shared", "full", "shared"],
        n_routed_experts=12,
        num_attention_heads=17,
        num_hidden_layers=4,
        num_key_value_heads=17,
        v_head_dim=16,
    ),
    "hy_v4": hy_v4(  # streams that are not mixed, sinks, shared choices
        max_position_embeddings=1024,
        n_routed_experts=12,
        num_attention_heads=17,
        v_head_dim=16,
        vocab_size=112,
    ),
    "glm4_moe": glm4_moe(  # partial rotation of the head, expert groups, a router bias
        max_position_embeddings=1024,
        hidden_size=72,
        n_routed_experts=15,
        n_group=3,
        topk_group=2,
        num_experts_per_tok=4,
        use_qk_norm=True,
        routed_scaling_factor=1.5,
    ),
    "olmoe": olmoe(max_position_embeddings=1024, clip_qkv=0.8, num_experts=9, num_experts_per_tok=3),
    "lfm2_moe": lfm2_moe(  # short convolutions, a dense layer, a router bias
        max_position_embeddings=1024,
        hidden_size=72,
        num_attention_heads=6,
        num_key_value_heads=3,
        num_experts=9,
    ),
    # Layers with a mixer or a network alone, Mamba-2, latent experts without a gate, their number and width by layer.
    "nemotron_h_puzzle": nemotron_h_puzzle(
        "ME*E-ME",
        ((3, 14), (1, 41), (2, 9)),
        max_position_embeddings=1024,
        hidden_size=72,
        mamba_num_heads=10,
        moe_latent_size=40,
        n_routed_experts=9,
    ),
    "bailing_hybrid": bailing_hybrid(  # Kimi Delta Attention, latent attention with gates of heads
        max_position_embeddings=1024, hidden_size=72, num_experts=9, num_experts_per_tok=3
    ),
    "kimi_linear": kimi_linear(  # Kimi Delta Attention with factors of decay and gate, latents without rotary
        model_max_length=1024, hidden_size=72, num_experts=9, num_experts_per_token=3
    ),
    "glm5_next": glm5_next(  # residual streams, chosen pools
        index_kpool=4,
        index_topk=8,
        index_n_heads=8,
        max_position_embeddings=1024,
        hidden_size=72,
        n_routed_experts=9,
        num_experts_per_tok=3,
    ),
    "deepseek_v4": deepseek_v4(  # streams, pools beside windows, experts by token and by choice
        hidden_size=72, n_routed_experts=9, num_experts_per_tok=3
    ),
    "kimi_k3": kimi_k3(  # a bank of hidden states, latent experts with a norm, gates of elements
        max_position_embeddings=1024, hidden_size=72, num_experts=9, num_experts_per_token=3
    ),
    "mistral4": mistral4(  # queries that grow with their position
        max_position_embeddings=1024,
        hidden_size=72,
        n_routed_experts=9,
        num_experts_per_tok=3,
        rope_parameters=mistral4()["rope_parameters"] | {"max_position_embeddings": 1024},
    ),
    "minimax": minimax(  # lightning attention with q, k and v in one matrix, blocks that add to what they read
        max_position_embeddings=1024, head_dim=18, hidden_size=72, num_local_experts=9, num_experts_per_tok=3
    ),
    "minimax_m3_vl": minimax_m3(  # blocks of positions that an indexer chooses for each KV head
        max_position_embeddings=1024,
        hidden_size=72,
        num_local_experts=9,
        num_experts_per_tok=3,
    ),
    "qwen4_exp_text": qwen4_exp_text(  # small blocks of positions that an indexer chooses for all KV heads
        max_position_embeddings=1024,
        hidden_size=72,
        head_dim=40,
        indexer_head_dim=12,
        num_experts=9,
        num_experts_per_tok=3,
    ),
    "ling_2_5": ling_2_5(  # lightning attention beside latent attention
        max_position_embeddings=1024,
        hidden_size=72,
        head_dim=40,
        partial_rotary_factor=0.4,
        rotary_dim=16,
        group_norm_size=3,
        num_experts=9,
        num_experts_per_tok=3,
    ),
    "bailing_moe_linear": ring_linear(  # lightning attention with norms and rotary, groups of its output's norm
        max_position_embeddings=1024,
        hidden_size=72,
        head_dim=40,
        partial_rotary_factor=0.4,
        num_attention_heads=6,
        num_key_value_heads=3,
        group_norm_size=3,
        num_experts=10,
        num_experts_per_tok=3,
    ),
    "gemma4": gemma4(  # heads and rotary embedding by layer, a dense network beside the experts, norms after blocks
        max_position_embeddings=1024, hidden_size=72, num_experts=9, top_k_experts=3, vocab_size=112
    ),
    "cohere2_moe": cohere2_moe(  # attention and networks beside each other, LayerNorm, layers that rotate nothing
        hidden_size=72, max_position_embeddings=1024, num_experts=9, num_experts_per_tok=3, rms_norm_eps=None
    ),
    "step3p5": step3p5(  # heads by layer with gates, activations with limits of their own
        hidden_size=72,
        max_position_embeddings=1024,
        moe_num_experts=9,
        moe_top_k=3,
        num_nextn_predict_layers=0,
        swiglu_limits=[0, 0.1, 0, 0.2],
        swiglu_limits_shared=None,
        layer_types=[FULL, SLIDING, SLIDING, FULL],
        partial_rotary_factors=[0.5, 1.0, 1.0, 0.5],
        rope_theta=1e4,
    ),
    "gemma3_text": gemma3_text(  # no experts, norms after blocks, rotary embedding by layer
        max_position_embeddings=1024, hidden_size=72, num_hidden_layers=4, vocab_size=112
    ),
    "mimo_v2_flash": mimo_v2_flash(  # values of another width than keys, KV heads by layer, sinks in windows
        max_position_embeddings=1024,
        hidden_size=72,
        moe_intermediate_size=40,
        num_key_value_heads=2,
        n_routed_experts=9,
        num_experts_per_tok=3,
        vocab_size=112,
    ),
    "laguna": laguna(  # heads and rotary embedding by layer, gates of heads, a shared expert
        max_position_embeddings=1024,
        hidden_size=72,
        moe_intermediate_size=40,
        num_experts=9,
        num_experts_per_tok=3,
        vocab_size=112,
    ),
    "flint": flint(  # sinks, rotary embedding only in windows, sigmoid scores without a bias
        max_position_embeddings=1024, hidden_size=72, moe_intermediate_size=40, num_experts=9, vocab_size=112
    ),
    "lara_mini": lara_mini(  # delta nets, windows and full attention; projections in one tensor
        max_position_embeddings=1024, hidden_size=72, moe_intermediate_size=40, num_experts=9, vocab_size=112
    ),
}
GPT_OSS = gpt_oss(  # sinks, alternating windows, expert biases
    max_position_embeddings=1024,
    hidden_size=96,
    intermediate_size=64,
    num_local_experts=9,
    num_experts_per_tok=3,
    initial_context_length=1024,
    rope_scaling={"rope_type": "yarn", "factor": 8.0},
)
CASES = [
    *((family, "in place") for family in CONFIGS),
    *(("qwen3_moe", format) for format in ("bf16", "q8", "q4")),
    ("deepseek_v3", "q8"),
    ("glm_moe_dsa", "q8"),
    ("qwen3_5_moe_text", "q8"),
    ("lara_mini", "q8"),
    ("gemma4", "q8"),
    ("nemotron_h_puzzle", "q8"),
    ("gemma3_text", "q4"),
]
CASES += [("gpt_oss", "source"), ("gpt_oss", "mxfp4"), ("llama4_text", "source"), ("llama4_text", "q8")]
CONFIGS["gpt_oss"] = GPT_OSS
CONFIGS["llama4_text"] = llama4_text(  # chunks, queries that grow, weighted inputs, dense layers between
    max_position_embeddings=1024,
    hidden_size=72,
    intermediate_size=40,
    interleave_moe_layer_step=2,
    num_local_experts=9,
    vocab_size=112,
)
CASES += [("qwen3_moe_blocks", "fp8"), ("kimi_k2", "int4")]
# One of each kind of layers in place, and one of each format.
IN_SHORT = [
    *(
        (family, "in place")
        for family in (
            "qwen2_moe",
            "qwen3_moe",
            "qwen3_next",
            "lfm2_moe",
            "nemotron_h_puzzle",
            "bailing_hybrid",
            "minimax",
            "deepseek_v3",
            "glm_moe_dsa",
            "deepseek_v4",
            "kimi_k3",
            "qwen4_exp_text",
            "minimax_m3_vl",
            "glm5_next",
            "gemma4",
            "gemma3_text",
        )
    ),
    *(("qwen3_moe", format) for format in ("q8", "q4")),
    ("gpt_oss", "mxfp4"),
    ("llama4_text", "source"),
    ("qwen3_moe_blocks", "fp8"),
    ("kimi_k2", "int4"),
]
QUANTISED = {
    "qwen3_moe_blocks": qwen3_moe(  # one whole block of 128 and a partial one, in rows and columns
        max_position_embeddings=1024,
        hidden_size=140,
        moe_intermediate_size=136,
        num_experts=9,
        num_experts_per_tok=3,
    ),
    "kimi_k2": kimi_k2(
        max_position_embeddings=1024,
        hidden_size=96,
        moe_intermediate_size=64,
        n_routed_experts=9,
        num_experts_per_tok=3,
    ),
}


@cache
def files_of(directory: Path) -> ModelFiles:
    return open_model(directory)


@dataclass(frozen=True)
class Case:
    """A model on disk and the instruction set to run it with."""

    directory: Path
    config: RawConfig
    instruction_set: str
    turn: int = 0

    def in_turn(self, ways: Sequence[Value]) -> Value:
        """The way that it is this case's turn to try.

        Models and instruction sets take turns, so that every pair of a model and a way, and of an instruction set and
        a way, is tried where there are as many instruction sets as ways. What a way does depends on neither.
        """
        return ways[self.turn % len(ways)]

    @property
    def prompt(self) -> list[int]:
        return prompt_ids(self.config, 5, 37)

    @property
    def num_experts(self) -> int:
        return len(files_of(self.directory).experts)

    @property
    def experts_per_token(self) -> int:
        return files_of(self.directory).config.experts_per_token

    def engine(self, **options: Any) -> Engine:
        settings = {"memory": "4GiB", "threads": 1, "instruction_set": self.instruction_set} | options
        if not self.num_experts:
            settings.pop("expert_slots", None)
        settings.setdefault("prefix_reuse", False)  # `test_prefix.py` tests prefix hits
        return Engine.open(self.directory, **settings)


@dataclass(frozen=True)
class Answers:
    """Everything a caller can see of a model's arithmetic."""

    logits: Array
    greedy: Any
    sampled: Any

    @classmethod
    def of(cls, engine: Engine, prompt: list[int]) -> Answers:
        return cls(
            engine.logits(prompt),
            visible(engine.generate(prompt, GREEDY)),
            visible(engine.generate(prompt, SAMPLED)),
        )

    def assert_equal(self, other: Answers) -> None:
        np.testing.assert_array_equal(self.logits, other.logits)
        assert self.greedy == other.greedy
        assert self.sampled == other.sampled


def visible(result: Any) -> tuple[Any, ...]:
    return result.token_ids, result.logprobs, result.finish_reason


class Directories(dict[tuple[str, str], Path]):
    """Where the models of cases are; each is written when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __missing__(self, case: tuple[str, str]) -> Path:
        family, format = case
        path = self[case] = self.root / f"{family}-{format}"
        if format == "in place":
            write_model(path, CONFIGS[family], seed=3)
        elif format == "fp8":
            write_fp8_model(path, QUANTISED[family], seed=3)
        elif format == "int4":
            write_int4_model(path, QUANTISED[family], seed=3)
        elif format == "mxfp4":
            write_mxfp4_model(path, CONFIGS[family], seed=3)
        else:
            pack(open_model(self[family, "in place"]), path, format=format)
        return path


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Directories:
    return Directories(tmp_path_factory.mktemp("identity"))


@pytest.fixture(params=_native.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(
    params=few_of(CASES, IN_SHORT),
    ids=lambda case: f"{case[0]}-{case[1]}".replace(" ", "-"),
)
def case(request: pytest.FixtureRequest, directories: Directories, instruction_set: str) -> Iterator[Case]:
    config = (CONFIGS | QUANTISED)[request.param[0]]
    turn = CASES.index(request.param) + _native.instruction_sets().index(instruction_set)
    return Case(directories[request.param], config, instruction_set, turn)


@cache
def answers_of_resident(directory: Path, instruction_set: str, prompt: tuple[int, ...]) -> Answers:
    with Engine.open(directory, memory="4GiB", threads=1, instruction_set=instruction_set) as engine:
        assert engine.plan.slots.is_resident
        return Answers.of(engine, list(prompt))


def resident(case: Case) -> Answers:
    return answers_of_resident(case.directory, case.instruction_set, tuple(case.prompt))


@pytest.mark.covering(1)
@pytest.mark.parametrize("size", ["floor", "share"])
def test_a_small_expert_cache_changes_nothing(case: Case, size: str) -> None:
    if not case.num_experts:
        pytest.skip("there are no experts")
    share = case.in_turn([0.25, 0.5]) if size == "share" else 0
    num_slots = max(case.experts_per_token, int(share * case.num_experts))
    with case.engine(expert_slots=num_slots) as engine:
        assert engine.plan.slots.own == num_slots
        assert not engine.plan.slots.is_resident
        Answers.of(engine, case.prompt).assert_equal(resident(case))


@pytest.mark.full  # with the smallest cache as well, each model runs in `make test`
def test_two_threads_change_nothing(case: Case) -> None:
    with case.engine(threads=2) as engine:
        Answers.of(engine, case.prompt).assert_equal(resident(case))


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    use_cache(monkeypatch, tmp_path_factory.getbasetemp() / "tuned")
    yield
    tuning._chosen.cache_clear()


@pytest.mark.covering(1)
def test_how_products_are_tuned_changes_nothing(case: Case, tuned: None) -> None:
    # Without tuning, as all other engines here run, and with it: as measured, at random, and fixed by the caller.
    way = case.in_turn(["measured", "random", "fixed"])
    threads = {"measured": 2, "random": 3, "fixed": 2}[way]
    options: dict[str, Any] = {"ask_ahead": case.in_turn(get_args(AskAhead))} if way == "fixed" else {}
    expected = random_tunings(case.turn)
    if way == "random":
        keep(expected, threads, case.instruction_set)
    with case.engine(threads=threads, **options) as engine:
        found = engine._started.runtime.tunings
        assert way != "random" or found == expected
        assert way != "fixed" or {each for one, few, *_ in found.values() for each in (one, few)} == {
            options["ask_ahead"]
        }
        Answers.of(engine, case.prompt).assert_equal(resident(case))


@pytest.mark.covering(1)
def test_two_threads_and_the_smallest_cache_change_nothing(case: Case) -> None:
    with case.engine(threads=2, expert_slots=case.experts_per_token, readers=1) as engine:
        Answers.of(engine, case.prompt).assert_equal(resident(case))


@pytest.mark.covering(1)
def test_prompt_chunks_change_nothing(case: Case) -> None:
    with case.engine(chunk_tokens=case.in_turn([1, 3]), expert_slots=case.num_experts // 2) as engine:
        Answers.of(engine, case.prompt).assert_equal(resident(case))


@pytest.mark.covering(1)
def test_a_warm_cache_changes_nothing(case: Case) -> None:
    with case.engine(expert_slots=case.num_experts // 2) as engine:
        cold = Answers.of(engine, case.prompt)
        engine.generate(prompt_ids(case.config, 99, 50), GREEDY)
        warm = Answers.of(engine, case.prompt)
    cold.assert_equal(resident(case))
    warm.assert_equal(resident(case))


@pytest.mark.covering(1)
def test_rounded_keys_and_values_change_little_and_the_same_everywhere(case: Case) -> None:
    # f16 has 11 bits, q8 eight; one wrong expert or position would move logits by a third of their size or more.
    kv_dtype, change = case.in_turn((("f16", 0.01), ("q8", 0.04)))
    with case.engine(kv_dtype=kv_dtype) as engine:
        rounded = Answers.of(engine, case.prompt)
    with case.engine(
        kv_dtype=kv_dtype, chunk_tokens=3, threads=2, expert_slots=case.experts_per_token
    ) as engine:
        Answers.of(engine, case.prompt).assert_equal(rounded)
    assert not np.array_equal(rounded.logits, resident(case).logits)
    assert np.median(abs(rounded.logits - resident(case).logits)) < change * abs(resident(case).logits).max()


@pytest.mark.skipif(_native.instruction_sets() == ["plain"], reason="this processor has one instruction set")
@pytest.mark.parametrize(
    "model",
    [
        ("qwen3_moe", "q8"),
        ("deepseek_v3", "in place"),
        ("qwen3_5_moe_text", "in place"),
        ("gpt_oss", "mxfp4"),
    ],
    ids=lambda model: f"{model[0]}-{model[1]}".replace(" ", "-"),
)
def test_engines_with_different_instruction_sets_step_in_turn_and_each_keeps_its_bits(
    model: tuple[str, str], directories: Directories
) -> None:
    names = _native.instruction_sets()
    cases = [Case(directories[model], CONFIGS[model[0]], name) for name in names]
    alone = [resident(case) for case in cases]
    for name, (one, other) in zip(names, pairwise(alone), strict=False):
        # With few heads for a KV head, `amx` computes what `avx512` does, which follows it.
        assert name == "amx" or not np.array_equal(one.logits, other.logits)

    with ExitStack() as stack:
        engines = [stack.enter_context(case.engine(chunk_tokens=8)) for case in cases]
        sequences = [engine.submit(case.prompt, GREEDY) for engine, case in zip(engines, cases, strict=True)]
        while any(sequence.result is None for sequence in sequences):
            for engine in engines:
                engine.step()
        found = [
            Answers(
                engine.logits(case.prompt),
                visible(sequence.result),
                visible(engine.generate(case.prompt, SAMPLED)),
            )
            for engine, case, sequence in zip(engines, cases, sequences, strict=True)
        ]

    for together, by_itself in zip(found, alone, strict=True):
        together.assert_equal(by_itself)


@pytest.mark.covering(1)
def test_a_batch_of_eight_changes_nothing(case: Case) -> None:
    prompts = [case.prompt] + [prompt_ids(case.config, seed, 1 + 6 * seed) for seed in range(7)]
    params = [GREEDY, SAMPLED] * 4
    with case.engine() as engine:
        alone = [visible(engine.generate(prompt, own)) for prompt, own in zip(prompts, params, strict=True)]
    for num_slots in (case.experts_per_token, None):
        with case.engine(expert_slots=num_slots, chunk_tokens=16, threads=2) as engine:
            together = [visible(result) for result in engine.generate_batch(prompts, params)]
        assert together == alone
    assert alone[0] == resident(case).greedy


# How rows and outputs travel depends neither on the instruction set nor on how a model keeps its experts, so one model
# tries all sets, and experts that are shared, in groups and with biases are enough.
BY_SOCKET = [
    *((case, _native.instruction_sets()[-1]) for case in CASES),
    *((("qwen3_moe", "in place"), name) for name in _native.instruction_sets()[:-1]),
]
BY_SOCKET_IN_SHORT = [
    (("qwen2_moe", "in place"), _native.instruction_sets()[-1]),
    (("deepseek_v3", "in place"), _native.instruction_sets()[-1]),
    (("gpt_oss", "mxfp4"), _native.instruction_sets()[-1]),
    (("qwen3_moe", "in place"), _native.instruction_sets()[0]),
]


@pytest.mark.parametrize(
    ("case", "instruction_set"),
    [
        each if each in BY_SOCKET_IN_SHORT else pytest.param(*each, marks=pytest.mark.full)
        for each in BY_SOCKET
    ],
    indirect=True,
    ids=str,
)
def test_experts_in_another_process_change_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket carries rows there and outputs back, in an order other than the router's."""
    if not case.num_experts:
        pytest.skip("there are no experts")
    runner = ProcessRunner(
        case.directory,
        "smallest cache",
        num_experts=open_model(case.directory).config.num_experts,
        instruction_set=case.instruction_set,
    )
    monkeypatch.setattr("argosy.model.model.CachedRunner", lambda runtime, cache: runner)
    prompts = [case.prompt] + [prompt_ids(case.config, seed, 1 + 6 * seed) for seed in range(7)]
    params = [GREEDY, SAMPLED] * 4
    few = case.experts_per_token
    try:
        for options in ({"chunk_tokens": 1}, {"chunk_tokens": 3, "threads": 2}):
            with case.engine(expert_slots=few, **options) as engine:
                Answers.of(engine, case.prompt).assert_equal(resident(case))
        with case.engine(expert_slots=few, chunk_tokens=16, threads=2) as engine:
            together = [visible(result) for result in engine.generate_batch(prompts, params)]
        assert runner.stats.lookups > 0
    finally:
        runner.close()
    with case.engine() as engine:
        assert together == [
            visible(engine.generate(prompt, own)) for prompt, own in zip(prompts, params, strict=True)
        ]


def test_a_budget_that_holds_some_experts_changes_nothing(tmp_path: Path) -> None:
    """The budget is in bytes, as a user gives it; the experts are large enough to outweigh the process's growth."""
    config = qwen3_moe(hidden_size=128, moe_intermediate_size=256, num_experts=16, num_hidden_layers=5)
    write_model(tmp_path, config, seed=1)
    prompt = prompt_ids(config, 1, 40)
    for _ in range(2):  # by the second plan, the process has released what earlier tests left
        with Engine.open(tmp_path, memory="4GiB", threads=1, context=128) as engine:
            plan, expected = engine.plan, Answers.of(engine, prompt)
    without_experts = plan.total_bytes - plan.expert_bytes
    with Engine.open(
        tmp_path, memory=without_experts + plan.expert_bytes // 2, threads=1, context=128
    ) as engine:
        assert plan.slots.is_resident
        assert engine.config.experts_per_token <= engine.plan.slots.own < engine.plan.slots.num_experts
        Answers.of(engine, prompt).assert_equal(expected)


@pytest.mark.parametrize(
    "config",
    [qwen3_moe(num_key_value_heads=1), qwen2_moe(use_sliding_window=True, sliding_window=1100)],
    ids=["qwen3_moe", "qwen2_moe"],
)
def test_threads_that_share_the_positions_of_a_long_context_change_nothing(
    config: RawConfig, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "model", config | {"max_position_embeddings": 4096}, seed=3)
    prompt = prompt_ids(config, 5, 2300)

    def answer(threads: int, chunk: int) -> tuple[Sequence[int], Any]:
        with Engine.open(model, memory="2GiB", threads=threads, context=3072, chunk_tokens=chunk) as engine:
            found = engine.generate(prompt, GREEDY)
            return found.token_ids, found.logprobs

    expected = answer(1, 512)
    assert answer(3, 512) == expected
    assert answer(5, 97) == expected


@pytest.mark.full
@pytest.mark.parametrize(
    "family",
    [
        "minimax",
        "bailing_moe_linear",
        "qwen3_next",
        "lfm2_moe",
        "kimi_linear",
        "bailing_hybrid",
        "qwen4_exp_text",
        "deepseek_v4",
        "kimi_k3",
        "glm5_next",
    ],
)
def test_long_prompts_of_recurrent_layers_are_equal_in_every_chunk(family: str, tmp_path: Path) -> None:
    length = {"model_max_length" if family == "kimi_linear" else "max_position_embeddings": 8192}
    config, is_nested = CONFIGS[family], "text_config" in CONFIGS[family]
    config = config | ({"text_config": config["text_config"] | length} if is_nested else length)
    model, prompt = write_model(tmp_path / "model", config, seed=3), prompt_ids(config, 5, 4096)

    def logits(chunk: int) -> Array:
        with Engine.open(model, memory="2GiB", threads=2, context=4608, chunk_tokens=chunk) as engine:
            return engine.logits(prompt)

    expected = logits(4096)
    for chunk in (1, 7, 256):
        np.testing.assert_array_equal(logits(chunk), expected)
