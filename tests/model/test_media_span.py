"""Media spans in the decoder match the logits and hidden states of the numpy model, with the same bits however run.

Chunks never cut a span. The numpy model agrees with transformers on the same sequences (`tests/oracle`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy import _native
from argosy.model.clock import PartClock
from argosy.model.decoder import Decoder
from argosy.model.step import Addition, Overrides, Step
from tests.model.media_span import MediaSequence, Pieces, joined, media_sequence
from tests.model.open_parts import (
    BLOCK_TOKENS,
    BLOCKS_A_SEQUENCE,
    NUM_SEQUENCES,
    Parts,
    Residency,
    open_parts,
)
from tests.models.numpy_model import NumpyModel
from tests.models.references import LARGEST_DIFFERENCE, REFERENCES, difference
from tests.models.runnable import runnable
from tests.models.safetensors_file import Array

SMALLEST_MARGIN = 1e-4  # of a routing decision: float32 may choose differently below about 1e-5
NUM_BLOCKS = NUM_SEQUENCES * BLOCKS_A_SEQUENCE
MAX_TOKENS = NUM_BLOCKS * BLOCK_TOKENS
# The numbers of positions that attention processes together, with keys and values and with latent vectors.
STRETCH, SECTION = 64, 256

DIRECTORIES = {reference.name: reference.directory for reference in REFERENCES}
# Three axes with alternating pairs and in sections; latent attention; sinks and sliding windows; delta nets; layers
# that stay causal beside layers that see both ways.
MODELS = (
    "qwen3_vl_moe_plain",
    "qwen3_vl_moe_bias_dense_layer_tied_sharded",
    "qwen3_vl_moe_yarn_f32",
    "qwen3_omni_moe_every_second_not_renormalised_tied_f16",
    "glm4v_moe_plain",
    "glm4v_moe_all_turns_yarn_f32",
    "kimi_k25_wrapper",
    "deepseek_v3_halves_not_renormalised",
    "gpt_oss_windows_sharded",
    "mixtral_window_top1",
    "qwen3_5_moe_plain",
    "qwen4_exp_text_no_table_f32_sharded",
    "qwen3_next_every_second_f16",
    "gemma4_plain",
    "gemma4_respelt_untied_no_cap_f32",
)


@dataclass(frozen=True, eq=False)
class Case:
    """A model, sequences without near-ties in their routing, and the numpy model's outputs for them."""

    directory: Path
    sequences: tuple[MediaSequence, ...]
    logits: tuple[Array, ...]
    hidden_states: tuple[list[Array], ...]


@dataclass(frozen=True)
class Outputs:
    """Logits [tokens, vocab] of a sequence, and the hidden states after each layer [layers, tokens, hidden]."""

    logits: Array
    hidden: Array


def make_case(name: str, options_of: Sequence[dict[str, Any]], scratch: Path) -> Case:
    """Make a sequence for each set of arguments of `media_sequence`."""
    model = NumpyModel(DIRECTORIES[name])
    config = model.config | {"model_type": model.family}
    sequences, logits, hidden_states = [], [], []
    for i, options in enumerate(options_of):
        for seed in range(100 * i, 100 * (i + 1)):
            added = (
                {"num_added_layers": 0} if name.startswith("qwen4") else {}
            )  # its tower gives no layer more
            media = media_sequence(config, seed, **added, **options)
            found = model.logits(media.token_ids.tolist(), media.numpy_spans)
            if model.router_margin > SMALLEST_MARGIN:
                break
        else:
            raise AssertionError(f"{name}: 100 seeds, each with a near tie")
        sequences.append(media)
        logits.append(found)
        hidden_states.append(model.hidden_states)
    directory = runnable(DIRECTORIES[name], scratch)
    return Case(directory, tuple(sequences), tuple(logits), tuple(hidden_states))


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Two pictures that see both ways; a sound and a causal picture; text; a picture across position 64."""
    name = request.param
    both_ways = not name.startswith(("qwen3_5_moe", "qwen3_next", "qwen4"))  # a delta net sees no later token
    return make_case(
        name,
        [
            {"kinds": ("picture", "picture"), "sees_both_ways": both_ways},
            {"kinds": ("sound", "picture")},
            {"kinds": ()},
            {"kinds": ("picture",), "sees_both_ways": both_ways, "num_text_before": STRETCH - 3},
        ],
        tmp_path_factory.mktemp(name),
    )


@pytest.fixture(params=_native.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def step_of(parts: Parts, by_sequence: Mapping[int, Pieces], num_sequences: int) -> Step:
    """Make a step that runs these pieces, by sequence, and returns the logits and hidden states of every token."""
    pieces = joined(list(by_sequence.values()))
    counts = [len(one.token_ids) for one in by_sequence.values()]
    sequence = np.repeat(np.array(list(by_sequence), np.int32), counts)
    # The blocks of different sequences are interleaved, as in the engine.
    blocks = np.random.default_rng(1).permutation(NUM_BLOCKS).astype(np.int32).reshape(num_sequences, -1)
    return Step(
        token_ids=pieces.token_ids,
        sequence=sequence,
        slots=blocks[sequence, pieces.order // BLOCK_TOKENS].astype(np.int64) * BLOCK_TOKENS
        + pieces.order % BLOCK_TOKENS,
        block_table=blocks,
        is_decode=np.repeat([count == 1 for count in counts], counts),
        state_slots=np.roll(np.arange(num_sequences, dtype=np.int32), 1),
        order=pieces.order,
        angles=pieces.angles,
        sees_until=pieces.sees_until,
        overrides=None if pieces.overrides is None else Overrides(*pieces.overrides),
        additions=tuple(Addition(*added) for added in pieces.additions),
        wanted=np.arange(len(sequence), dtype=np.int64),
        taps=tuple(range(parts.config.num_layers)),
    )


def run(
    parts: Parts, steps: Sequence[Mapping[int, range]], sequences: Sequence[MediaSequence]
) -> list[Outputs]:
    """Run steps, each a chunk of some sequences, in a new decoder, and return the outputs of each sequence."""
    decoder = Decoder(
        parts.config,
        parts.weights,
        parts.experts,
        parts.kv(),
        parts.runtime,
        MAX_TOKENS,
        clock=PartClock(),
        recurrent=parts.recurrent(),
    )
    logits: list[list[Array]] = [[] for _ in sequences]
    hidden: list[list[Array]] = [[] for _ in sequences]
    for tokens in steps:
        pieces = {i: sequences[i].pieces(part) for i, part in tokens.items()}
        step = step_of(parts, pieces, len(sequences))
        found = decoder.forward(step)
        for i in tokens:
            rows = np.flatnonzero(step.sequence == i)
            logits[i].append(found[rows])
            hidden[i].append(np.stack([decoder.tapped(layer)[rows] for layer in step.taps]))
    return [
        Outputs(np.concatenate(one), np.concatenate(states, axis=1))
        for one, states in zip(logits, hidden, strict=True)
    ]


def one_by_one(sequences: Sequence[MediaSequence]) -> list[dict[int, range]]:
    """Make steps that run one whole sequence each."""
    return [{i: range(sequence.num_tokens)} for i, sequence in enumerate(sequences)]


def together(sequences: Sequence[MediaSequence], most: int) -> list[dict[int, range]]:
    """Make steps with a chunk of every unfinished sequence; each sequence starts one step after the previous one."""
    chunks = [[None] * i + sequence.chunks(most) for i, sequence in enumerate(sequences)]
    return [
        {i: own[at] for i, own in enumerate(chunks) if at < len(own) and own[at] is not None}
        for at in range(max(map(len, chunks)))
    ]


@cache
def outputs_of_whole_sequences(case: Case, instruction_set: str) -> list[Outputs]:
    with open_parts(case.directory, "resident", instruction_set=instruction_set) as parts:
        return run(parts, one_by_one(case.sequences), case.sequences)


@pytest.mark.covering(1)
def test_whole_sequences_have_the_logits_and_hidden_states_of_the_numpy_model(
    case: Case, instruction_set: str
) -> None:
    assert_near(outputs_of_whole_sequences(case, instruction_set), case)


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    ("most", "residency", "threads"),
    [
        (1, "resident", 1),
        (1, "smallest cache", 2),
        (7, "resident", 2),
        (7, "smallest cache", 1),
        (MAX_TOKENS, "resident", 1),
        (MAX_TOKENS, "smallest cache", 2),
    ],
)
def test_chunks_batches_caches_and_threads_change_no_bit(
    case: Case, most: int, residency: Residency, threads: int, instruction_set: str
) -> None:
    with open_parts(case.directory, residency, threads=threads, instruction_set=instruction_set) as parts:
        found = run(parts, together(case.sequences, most), case.sequences)
    assert_equal(found, outputs_of_whole_sequences(case, instruction_set))


@pytest.mark.parametrize("name", ["kimi_k25_wrapper", "deepseek_v3_halves_not_renormalised"])
def test_a_picture_may_span_sections_of_latent_attention(
    name: str, instruction_set: str, tmp_path: Path
) -> None:
    long = {"kinds": ("picture",), "sees_both_ways": True, "num_text_before": SECTION - 3}
    case = make_case(name, [long], tmp_path)
    (span,) = case.sequences[0].spans
    assert span.start < SECTION < span.stop
    whole = outputs_of_whole_sequences(case, instruction_set)
    assert_near(whole, case)
    with open_parts(case.directory, "smallest cache", threads=2, instruction_set=instruction_set) as parts:
        assert_equal(run(parts, together(case.sequences, 50), case.sequences), whole)


def assert_near(found: Sequence[Outputs], case: Case) -> None:
    for ours, logits, hidden_states in zip(found, case.logits, case.hidden_states, strict=True):
        assert difference(ours.logits, logits) <= LARGEST_DIFFERENCE
        assert difference(ours.hidden, np.stack(hidden_states)) <= LARGEST_DIFFERENCE


def assert_equal(found: Sequence[Outputs], expected: Sequence[Outputs]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours.logits, theirs.logits)
        np.testing.assert_array_equal(ours.hidden, theirs.hidden)
