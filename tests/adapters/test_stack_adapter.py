"""A model with an adapter computes what the model with merged weights computes, and equal bits in every batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from argosy import _native
from argosy.adapters.files import AdapterFiles, LowRank, PairFormat
from argosy.adapters.loaded import dense_bytes, load_adapter, network_ranks
from argosy.adapters.targets import target_shapes
from argosy.config import ModelConfig
from argosy.errors import CheckpointError, UnsupportedModel
from argosy.model.clock import PartClock
from argosy.model.decoder import Decoder
from argosy.model.step import Step
from argosy.model.weights import DenseWeights
from tests.adapters.merged import merge_dense
from tests.adapters.random_adapter import random_adapter
from tests.model.open_parts import Parts, Run, decode, make_steps, open_parts
from tests.models.runnable import runnable
from tests.models.tiny import RawConfig, gpt_oss, qwen2_moe, qwen3_moe, write_model
from tests.models.tiny_delta import qwen3_5_moe, qwen3_next
from tests.models.tiny_gemma import gemma4
from tests.models.tiny_kda import bailing_hybrid, kimi_linear
from tests.models.tiny_latent import deepseek_v3, glm4_moe_lite
from tests.models.tiny_mamba import nemotron_h
from tests.models.tiny_recurrent import lfm2_moe

Floats = NDArray[np.float32]

MAX_TOKENS = 40
STEPS = [[Run(0, 7)], [Run(0, 9), Run(1, 3)], [decode(0), decode(1)]]
FAMILIES = (
    qwen3_moe, qwen2_moe, gpt_oss, gemma4, deepseek_v3, glm4_moe_lite, qwen3_next, qwen3_5_moe, kimi_linear,
    bailing_hybrid, lfm2_moe, nemotron_h,
)  # fmt: skip
# Sums in another order, in float32, over a few layers.
MOST_DIFFERENCE = 1e-4


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda make: make.__name__)
def parts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    with parts_of(request.param(), tmp_path_factory) as opened:
        yield opened


def parts_of(config: RawConfig, scratch: pytest.TempPathFactory, *, threads: int = 1) -> Any:
    directory = write_model(scratch.mktemp("model"), config, seed=0, dtype="F32")
    return open_parts(runnable(directory, scratch.mktemp("pack")), "resident", threads=threads)


def decoder_of(
    parts: Parts,
    config: ModelConfig | None = None,
    weights: DenseWeights | None = None,
    **adapters: AdapterFiles,
) -> Decoder:
    """A decoder with adapters by number: `n5=files`."""
    decoder = Decoder(
        config or parts.config,
        weights or parts.weights,
        parts.experts,
        parts.kv(),
        parts.runtime,
        MAX_TOKENS,
        clock=PartClock(),
        recurrent=parts.recurrent(),
    )
    for number, files in adapters.items():
        decoder.set_adapter(int(number[1:]), load_adapter(files, parts.config, parts.weights).stack)
    return decoder


def logits_of(
    parts: Parts, decoder: Decoder, number: int | None, steps: Sequence[Sequence[Run]] = STEPS
) -> Floats:
    return np.concatenate([
        decoder.forward(
            step if number is None else step._replace(adapters=np.full(step.num_tokens, number, np.int32))
        )
        for step in make_steps(parts.config, steps)
    ])  # fmt: skip


def require_merged(parts: Parts, files: AdapterFiles) -> None:
    """The adapter changes logits, as its merged weights do."""
    found = logits_of(parts, decoder_of(parts, n5=files), 5)
    merged = logits_of(parts, decoder_of(parts, *merge_dense(parts.config, parts.weights, files)), None)
    assert np.abs(found - logits_of(parts, decoder_of(parts), None)).max() > 0.05
    assert np.abs(found - merged).max() < MOST_DIFFERENCE


def dense_targets(config: ModelConfig) -> set[str]:
    return {name.rpartition(".")[2] for name in target_shapes(config)}


def test_every_matrix_with_a_pair_computes_what_the_merged_matrix_computes(parts: Parts) -> None:
    for target in sorted(dense_targets(parts.config)):
        require_merged(parts, random_adapter(parts.config, seed=1, targets={target}))


def test_pairs_of_all_matrices_work_together(parts: Parts) -> None:
    require_merged(parts, random_adapter(parts.config, seed=2, targets=dense_targets(parts.config), gain=0.3))


def test_rows_get_the_lengths_that_dora_gives_them(parts: Parts) -> None:
    targets = dense_targets(parts.config)
    require_merged(parts, random_adapter(parts.config, seed=4, targets=targets, gain=0.3, is_dora=True))


@pytest.mark.parametrize("format", ["f16", "bf16"])
def test_pairs_in_16_bits_are_used_as_they_are(
    format: PairFormat, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with parts_of(qwen3_next(), tmp_path_factory) as parts:
        targets = dense_targets(parts.config)
        require_merged(parts, random_adapter(parts.config, seed=3, targets=targets, format=format, gain=0.3))


@pytest.mark.parametrize("is_tied", [False, True])
def test_replaced_matrices_and_tied_heads(is_tied: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    with parts_of(qwen3_moe(tie_word_embeddings=is_tied), tmp_path_factory) as parts:
        for replaced in ({"embed"}, {"head"}, {"embed", "head", "layers.1.router"}):
            files = random_adapter(parts.config, seed=4, targets={"q", "embed", "head"}, replaced=replaced)
            require_merged(parts, files)
        # A pair of the head leaves the embedding as it is, and the other way round, even if they share memory.
        for target in ("embed", "head"):
            require_merged(parts, random_adapter(parts.config, seed=5, targets={target}))


def mixed(step: Step) -> Step:
    """The step with adapter 5 for sequence 0, none for sequence 1, and 6 for the others."""
    return step._replace(adapters=np.array([5, -1, 6, 6], np.int32)[step.sequence])


def by_sequence(
    parts: Parts, decoder: Decoder, steps: Sequence[Sequence[Run]], change: Callable[[Step], Step]
) -> list[Floats]:
    rows: list[list[Floats]] = [[], [], [], []]
    lengths, tokens = [0] * 4, tokens_of(parts)
    for step in make_steps(parts.config, steps):
        ids = step.token_ids.copy()
        for at, sequence in enumerate(step.sequence):
            ids[at] = tokens[sequence, lengths[sequence]]
            lengths[sequence] += 1
        found = decoder.forward(change(step._replace(token_ids=ids)))
        for row, sequence in zip(found, step.sequence, strict=True):
            rows[sequence].append(row)
    return [np.array(each) for each in rows]


def tokens_of(parts: Parts) -> NDArray[np.int32]:
    return np.random.default_rng(9).integers(0, parts.config.vocab_size, (4, MAX_TOKENS), dtype=np.int32)


TOGETHER = [
    [Run(0, 5), Run(1, 6), Run(2, 4)],
    [decode(0), Run(1, 3), Run(2, 7), Run(3, 9)],
    [decode(0), decode(1), decode(2)],
]
ALONE = [
    [Run(0, 3)],
    [Run(1, 9)],
    [Run(0, 4)],
    [Run(2, 11)],
    [Run(3, 2)],
    [Run(3, 7)],
    [decode(1)],
    [decode(2)],
]


def test_bits_depend_neither_on_the_batch_nor_on_chunks_nor_on_threads(parts: Parts, tmp_path: Path) -> None:
    config, targets = parts.config, dense_targets(parts.config)
    adapters = {
        "n5": random_adapter(config, seed=1, targets=targets, rank=5, gain=0.3, is_dora=True),
        "n6": random_adapter(config, seed=2, targets=targets, format="bf16", gain=0.3, replaced={"head"}),
    }
    together = by_sequence(parts, decoder_of(parts, **adapters), TOGETHER, mixed)
    alone = by_sequence(parts, decoder_of(parts, **adapters), ALONE, mixed)
    base = by_sequence(parts, decoder_of(parts), TOGETHER, lambda step: step)

    assert all(np.array_equal(one, other) for one, other in zip(together, alone, strict=True))
    assert np.array_equal(together[1], base[1])  # has no adapter
    assert all(not np.array_equal(together[at], base[at]) for at in (0, 2, 3))


def test_two_threads_give_the_bits_of_one(tmp_path_factory: pytest.TempPathFactory) -> None:
    found = []
    for threads in (1, 2):
        # Wide enough for loops that threads share.
        with parts_of(
            deepseek_v3(hidden_size=256, vocab_size=600), tmp_path_factory, threads=threads
        ) as parts:
            files = random_adapter(
                parts.config, seed=1, targets=dense_targets(parts.config), rank=40, gain=0.2, is_dora=True
            )
            found.append(logits_of(parts, decoder_of(parts, n0=files), 0, [[Run(0, 38)], [decode(0)]]))
    assert np.array_equal(*found)


def test_steps_take_the_scratch_memory_that_the_sizes_say(tmp_path_factory: pytest.TempPathFactory) -> None:
    with parts_of(deepseek_v3(), tmp_path_factory) as parts:
        files = random_adapter(parts.config, seed=1, rank=400, gain=0.01)
        decoder = decoder_of(parts, n0=files)
        ranks = network_ranks(files, parts.config)
        assert ranks == 1600  # of networks: two pairs change stretches of the rows of one matrix
        sizes = decoder._stack.sizes
        expected = max(sizes.scratch_bytes(MAX_TOKENS, 1, ranks=ranks), _native.StackAdapter.scratch_bytes)
        assert parts.runtime.scratch_bytes == expected > sizes.scratch_bytes(MAX_TOKENS, 1)
        logits_of(parts, decoder, 0, [[Run(0, MAX_TOKENS)]])
        assert parts.runtime.scratch_bytes == expected


def test_a_model_without_its_adapter_is_the_base_again(tmp_path_factory: pytest.TempPathFactory) -> None:
    with parts_of(qwen3_moe(), tmp_path_factory) as parts:
        base = logits_of(parts, decoder_of(parts), None)
        decoder = decoder_of(parts, n0=random_adapter(parts.config, seed=1))
        assert np.array_equal(logits_of(parts, decoder, -1), base)
        assert not np.array_equal(logits_of(parts, decoder, 0), base)
        decoder.set_adapter(0, None)
        assert np.array_equal(logits_of(parts, decoder, None), base)
        with pytest.raises(ValueError, match="adapter 0, which is not set"):
            logits_of(parts, decoder, 0)


def test_logits_of_any_rows_have_the_adapters_of_their_tokens(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with parts_of(qwen3_moe(), tmp_path_factory) as parts:
        decoder = decoder_of(
            parts, n5=random_adapter(parts.config, seed=1), n6=random_adapter(parts.config, seed=2)
        )
        step = mixed(next(make_steps(parts.config, [[Run(0, 3), Run(1, 2), Run(2, 4)]])))
        all_rows = decoder.forward(step)
        rows = np.array([7, 0, 4, 7, 2])
        assert np.array_equal(decoder.logits(rows), all_rows[rows])


def test_what_an_adapter_cannot_change_is_refused_by_name(tmp_path_factory: pytest.TempPathFactory) -> None:
    with parts_of(qwen3_moe(), tmp_path_factory) as parts:
        files = random_adapter(parts.config, seed=1, targets={"q"})
        wrong = {"layers.0.q_norm": files.dense["layers.0.q"]}
        with pytest.raises(
            UnsupportedModel, match=r"has a pair for layers\.0\.q_norm, which no adapter can change"
        ):
            load_adapter(replace(files, dense=wrong), parts.config, parts.weights)
        one = random_adapter(parts.config, seed=1, targets=(), replaced={"head"}).replaced["head"]
        with pytest.raises(UnsupportedModel, match=r"replaces layers\.0\.q, which"):
            load_adapter(replace(files, dense={}, replaced={"layers.0.q": one}), parts.config, parts.weights)
        swapped = {"layers.0.k": files.dense["layers.0.q"]}
        with pytest.raises(CheckpointError, match=r"layers\.0\.k"):
            load_adapter(replace(files, dense=swapped), parts.config, parts.weights)


def test_the_bytes_of_an_adapter_are_known_before_it_is_loaded(parts: Parts) -> None:
    targets = dense_targets(parts.config)
    for is_dora in (False, True):
        files = random_adapter(
            parts.config, seed=1, targets=targets, format="bf16", replaced={"head"}, is_dora=is_dora
        )
        loaded = load_adapter(files, parts.config, parts.weights)
        assert loaded.nbytes == dense_bytes(files, parts.config)


def test_rows_that_dora_cannot_scale_are_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    with parts_of(qwen3_moe(), tmp_path_factory) as parts:
        files = random_adapter(parts.config, seed=1, targets={"q"}, is_dora=True)
        (pair,) = files.dense["layers.1.q"]
        assert pair.magnitude is not None

        def load(*pairs: LowRank) -> None:
            load_adapter(
                replace(files, dense={**files.dense, "layers.1.q": pairs}), parts.config, parts.weights
            )

        load(replace(pair, magnitude=-pair.magnitude))
        with pytest.raises(CheckpointError, match=r"for layers\.1\.q is \[63\], expected \[64\]"):
            load(replace(pair, magnitude=pair.magnitude[1:]))
        with pytest.raises(UnsupportedModel, match=r"layers\.1\.q and 2 pairs; DoRA has one"):
            load(pair, pair)
        with pytest.raises(CheckpointError, match=r"row 0 of layers\.1\.q has length .* scale it to inf"):
            load(replace(pair, magnitude=np.full_like(pair.magnitude, np.inf)))
        arena = _native.Arena(1 << 16)
        zero = {
            **parts.weights.matrices,
            "layers.1.q": _native.Matrix(arena, 0, "f32", pair.up.shape[1], pair.down.shape[1]),
        }
        none = replace(pair, up=np.zeros_like(pair.up))
        with pytest.raises(CheckpointError, match=r"row 0 of layers\.1\.q has length 0 with its pair"):
            load_adapter(
                replace(files, dense={"layers.1.q": (none,)}),
                parts.config,
                replace(parts.weights, matrices=zero),
            )
