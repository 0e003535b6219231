"""An engine with an n-gram table on the drive: equal answers however rows come, and failures only where they are."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy import Engine, SamplingParams, _native
from argosy.checkpoint.files import TableRef
from argosy.checkpoint.pack import pack
from argosy.config import NgramConfig
from argosy.errors import CheckpointError, ReadFailed, UnsupportedModel, UsageError
from argosy.model.families import open_model
from argosy.model.families.recurrent import qwen4_exp_text as qwen4_exp_text_family
from argosy.model.families.recurrent.qwen4_exp_text import parse_config
from argosy.model.ngrams import Ngrams
from tests.helpers.word_tokenizer import write_word_tokenizer
from tests.model.test_ngrams import step_of
from tests.models.safetensors_file import write_checkpoint, write_safetensors
from tests.models.tiny import RawConfig, prompt_ids, random_tensors, write_model
from tests.models.tiny_qwen4 import qwen4_exp, qwen4_exp_text
from tests.native._native_testing import FaultyFileSystem

GREEDY = SamplingParams(max_tokens=9, temperature=0, ignore_eos=True, logprobs=2)
TABLE = "model.layers.0.ple.ple_embedding.ngram_embedding.shard_{}.weight"


def config_of(**changes: Any) -> RawConfig:
    return qwen4_exp_text(**{"max_position_embeddings": 512, "num_experts": 8, "eos_token_id": 5} | changes)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tables"), config_of(), seed=3)


def open_engine(directory: Path, **options: Any) -> Engine:
    return Engine.open(directory, **{"memory": "1GiB", "threads": 1, "readers": 1} | options)


def run(engine: Engine, given: Sequence[list[int]], params: SamplingParams) -> list[Any]:
    """Return the results of prompts that run together, of which some may fail."""
    answers = [engine.submit(prompt, params) for prompt in given]
    while engine.step() or any(answer.result is None for answer in answers):
        pass
    return [answer.result for answer in answers]


def visible(result: Any) -> tuple[Any, ...]:
    return result.token_ids, result.logprobs, result.finish_reason


def prompts() -> list[list[int]]:
    """With ends of text in them, and more than a block of positions."""
    found = [prompt_ids(config_of(), seed, count) for seed, count in ((1, 41), (2, 7), (3, 18))]
    found[0][13:15] = found[2][4:5] = [5, 5]
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"chunk_tokens": 1},
        {"chunk_tokens": 7, "threads": 2},
        {"expert_slots": 4},
        {"max_sequences": 1},
        {"speculate": "lookup"},
        {"memory": "768MiB"},
    ],
    ids=str,
)
def test_answers_are_equal_however_their_tokens_come(model: Path, options: dict[str, Any]) -> None:
    with open_engine(model) as engine:
        expected = [visible(engine.generate(prompt, GREEDY)) for prompt in prompts()]
    with open_engine(model, **options) as engine:
        assert [visible(result) for result in engine.generate_batch(prompts(), GREEDY)] == expected
        again = [engine.generate(prompts()[0], GREEDY) for _ in range(3)]
        assert [visible(result) for result in again] == [expected[0]] * 3
        assert again[-1].usage["cached_tokens"] > 0  # continues at a prefix


def test_any_read_may_fail_once_and_the_answers_are_the_same(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, faults = _native.Store, [FaultyFileSystem(1 << 40, "eio")]
    monkeypatch.setattr(_native, "Store", lambda readers, **rest: plain(readers, faults[-1], **rest))
    with open_engine(model) as engine:
        started = faults[-1].num_reads
        expected = [visible(result) for result in engine.generate_batch(prompts(), GREEDY)]
        num_reads = faults[-1].num_reads - started  # every expert is in memory, so these are rows
    assert num_reads >= 5
    for nth in range(1, num_reads + 1, 2):
        faults.append(FaultyFileSystem(started + nth, "eio"))
        with open_engine(model) as engine:
            assert [visible(result) for result in engine.generate_batch(prompts(), GREEDY)] == expected


def test_rows_that_cannot_be_read_end_only_the_sequences_that_need_them(tmp_path: Path) -> None:
    config = config_of(ple_embed_dim=4 * 4096, hc_count=2, ngram_size=3, split_ngram_parts=1)
    tensors = {name: ("BF16", values) for name, values in random_tensors(config, 3, "BF16").items()}
    table = {TABLE.format(0): tensors.pop(TABLE.format(0))}
    write_safetensors(tmp_path / "model-00001-of-00002.safetensors", tensors)
    write_safetensors(tmp_path / "model-00002-of-00002.safetensors", table)
    names = dict.fromkeys(tensors, "model-00001-of-00002.safetensors") | dict.fromkeys(
        table, "model-00002-of-00002.safetensors"
    )
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (tmp_path / "config.json").write_text(json.dumps(config))
    files = open_model(tmp_path)
    ngrams = files.config.layers[0].ngrams
    assert ngrams is not None
    lost = ngrams.num_rows - 12  # from this row on
    rows = Ngrams(ngrams, config["vocab_size"])
    rng = np.random.default_rng(1)

    def draw(needs: Callable[[Any], bool]) -> list[int]:
        while True:
            prompt = rng.integers(6, config["vocab_size"], 5).tolist()
            if needs(rows.rows(step_of([([], prompt)], 2))):
                return prompt

    well = draw(lambda found: (found < lost - 2).all())  # none of them in a page that ends too early
    ill = draw(lambda found: (found >= lost).any())
    one = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    with open_engine(tmp_path) as engine:
        expected = visible(engine.generate(well, one))
    with open_engine(tmp_path) as engine:
        path = tmp_path / "model-00002-of-00002.safetensors"
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - (files.tables[0].num_rows - lost) * 8192)
        results = run(engine, (ill, well), one)
        assert isinstance(results[0].error, ReadFailed)
        assert "n-gram table" in str(results[0].error)
        assert visible(results[1]) == expected


def test_the_plan_counts_tables_and_the_ledger_their_rows(model: Path) -> None:
    with open_engine(model) as engine:
        assert engine.plan.as_dict()["table_bytes"] > 8 << 20
        first = engine.generate(prompts()[0], GREEDY).ledger
        assert first.rows == 49 * 4
        assert 0 < first.rows_found < first.rows
        assert first.bytes_read > 0
        second = engine.generate(prompts()[0], GREEDY).ledger
        assert second.rows_found == second.rows
        assert second.bytes_read == 0
    with pytest.raises(UsageError, match=r"n-gram tables of .*, which packs do not hold"):
        pack(open_model(model), model / "packed", format="bf16")


def cut(tensors: dict[str, Any]) -> None:
    dtype, values = tensors[TABLE.format(1)]
    tensors[TABLE.format(1)] = dtype, values[:-9]


def narrow(tensors: dict[str, Any]) -> None:
    dtype, values = tensors[TABLE.format(1)]
    tensors[TABLE.format(1)] = dtype, values[:, :-1]


def empty(tensors: dict[str, Any]) -> None:
    dtype, values = tensors[TABLE.format(1)]
    tensors[TABLE.format(1)] = dtype, values[:0]


def as_constants(values: list[int]) -> Callable[[dict[str, Any]], None]:
    name = "model.layers.0.ple.ple_embedding.ngram_heads_vocab_sizes"
    return lambda tensors: tensors.update({name: ("I64", np.array(values))})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, r"has \d+ rows, expected"),
        (narrow, "expected rows of 6"),
        (empty, r"\[0, 6\], expected rows of 6"),
        (
            lambda tensors: tensors.update({TABLE.format(1): ("BF16", np.float32(1))}),
            r"is BF16 \[\], expected",
        ),
        (lambda tensors: tensors.pop(TABLE.format(0)), "is missing from"),
        (lambda tensors: [tensors.pop(TABLE.format(part)) for part in (0, 1)], "is missing from"),
        (as_constants([31, 37, 41, 47]), "holds 31, and 31 follows from the config"),
        (as_constants([31, 37]), r"expected \[4\]"),
    ],
)
def test_tables_that_contradict_the_config_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    write_model(tmp_path, config_of(), seed=3)
    found = {name: ("BF16", values) for name, values in random_tensors(config_of(), 3, "BF16").items()}
    change(found)
    write_checkpoint(tmp_path, found)
    with pytest.raises(CheckpointError, match=message):
        open_model(tmp_path)


@pytest.mark.parametrize("shape", [(1 << 32, 6), (40, 1 << 19)])
def test_tables_beyond_what_native_code_reads_are_refused(model: Path, shape: tuple[int, int]) -> None:
    tensor = replace(open_model(model).tables[0].parts[0].tensors[0], shape=shape)
    with pytest.raises(UnsupportedModel, match="supported are at most 4294967295 rows of 262144"):
        TableRef.of([tensor], 40, shape[1])


E4M3_TABLE = {"ple_embed_dim": 4 * 64, "split_ngram_parts": 2}


def write_e4m3(directory: Path, change: Callable[[dict[str, Any]], None] = lambda tensors: None) -> None:
    """Write a model whose table is E4M3 with a scale for 32 columns, such as DeepSeek-V4.1's."""
    config, rng = config_of(**E4M3_TABLE), np.random.default_rng(8)
    tensors = {name: ("BF16", values) for name, values in random_tensors(config, 3, "BF16").items()}
    for part in (0, 1):
        num_rows, cols = tensors[TABLE.format(part)][1].shape
        codes = (
            rng.integers(0, 0x70, (num_rows, cols), np.uint8)
            | rng.integers(0, 2, (num_rows, cols), np.uint8) << 7
        )
        tensors[TABLE.format(part)] = "F8_E4M3", codes
        name = TABLE.format(part).removesuffix("weight") + "scale"
        tensors[name] = "F8_E8M0", rng.integers(112, 122, (num_rows, cols // 32), np.uint8)
    change(tensors)
    (directory / "config.json").write_text(json.dumps(config))
    write_checkpoint(directory, tensors)


def e4m3_values(codes: Any, scales: Any) -> Any:
    exponent, mantissa = (codes >> 3 & 15).astype(int), codes & 7
    values = np.ldexp(np.where(exponent > 0, mantissa + 8.0, 2.0 * mantissa), exponent - 10)
    values = np.where(codes & 0x80, -values, values)
    return np.ldexp(values, np.repeat(scales.astype(int) - 127, 32, axis=1)).astype(np.float32)


def as_floats(tensors: dict[str, Any]) -> None:
    for part in (0, 1):
        scale = tensors.pop(TABLE.format(part).removesuffix("weight") + "scale")[1]
        tensors[TABLE.format(part)] = "F32", e4m3_values(tensors[TABLE.format(part)][1], scale)


def test_a_table_in_e4m3_gives_the_answers_of_its_values(tmp_path: Path) -> None:
    found = []
    for name, change in (("codes", lambda tensors: None), ("floats", as_floats)):
        (tmp_path / name).mkdir()
        write_e4m3(tmp_path / name, change)
        with open_engine(tmp_path / name) as engine:
            found.append([visible(result) for result in engine.generate_batch(prompts(), GREEDY)])
            assert engine.generate(prompts()[0], GREEDY).ledger.rows == 49 * 4
    assert found[0] == found[1]


SCALE = TABLE.format(1).removesuffix("weight") + "scale"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(SCALE), r"shard_1\.scale is missing"),
        (lambda tensors: tensors.update({SCALE: (tensors[SCALE][0], tensors[SCALE][1][:-1])}), r"scale is"),
        (
            lambda tensors: tensors.update({SCALE: (tensors[SCALE][0], tensors[SCALE][1].repeat(2, 1))}),
            r"scale is",
        ),
        (lambda tensors: tensors.update({SCALE: ("F32", tensors[SCALE][1].astype(np.float32))}), "scale"),
        (
            lambda tensors: tensors.update({TABLE.format(1): ("F8_E4M3", tensors[TABLE.format(1)][1][0])}),
            "scale is",
        ),
    ],
)
def test_scales_of_a_table_that_do_not_fit_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    write_e4m3(tmp_path, change)
    with pytest.raises((CheckpointError, UnsupportedModel), match=message):
        open_model(tmp_path)


def test_a_row_that_is_no_number_ends_only_the_sequences_that_need_it(tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Any]) -> None:
        tensors[SCALE][1][7, 1] = 0xFF

    write_e4m3(tmp_path, spoil)
    files = open_model(tmp_path)
    ngrams = files.config.layers[0].ngrams
    assert ngrams is not None
    rows, bad = Ngrams(ngrams, 64), files.tables[0].parts[0].tensors[0].shape[0] + 7
    rng, chosen = np.random.default_rng(1), {}
    while len(chosen) < 2:
        prompt = rng.integers(6, 64, 5).tolist()
        chosen[bool((rows.rows(step_of([([], prompt)], 2)) == bad).any())] = prompt
    one = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    with open_engine(tmp_path) as engine:
        expected = visible(engine.generate(chosen[False], one))
        ill, well = run(engine, [chosen[True], chosen[False]], one)
    assert isinstance(ill.error, CheckpointError)
    assert "not a finite number" in str(ill.error)
    assert visible(well) == expected


def test_a_family_that_folds_tokens_gets_the_map_of_its_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens that are folded to themselves give the answers of a table that does not fold."""
    write_model(tmp_path, config_of(), seed=3)
    given = [[token for token in prompt if token != 5] for prompt in prompts()]  # no border
    with open_engine(tmp_path) as engine:
        expected = [visible(result) for result in engine.generate_batch(given, GREEDY)]
    own = qwen4_exp_text_family.NgramConfig

    def folding(**fields: Any) -> NgramConfig:
        return own(**fields | {"folded_ids": 64, "border_id": None})

    monkeypatch.setattr(qwen4_exp_text_family, "NgramConfig", folding)
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json, which its n-gram tables need"):
        open_engine(tmp_path)
    write_word_tokenizer(tmp_path, 64)
    with open_engine(tmp_path) as engine:
        assert [visible(result) for result in engine.generate_batch(given, GREEDY)] == expected
    write_word_tokenizer(tmp_path, 63)
    with pytest.raises(CheckpointError, match="fold to 63 ids"):
        open_engine(tmp_path)


def test_constants_that_follow_from_the_config_are_accepted(tmp_path: Path) -> None:
    write_model(tmp_path, config_of(), seed=3)
    found = {name: ("BF16", values) for name, values in random_tensors(config_of(), 3, "BF16").items()}
    as_constants([31, 37, 41, 43])(found)
    write_checkpoint(tmp_path, found)
    assert open_model(tmp_path).tables[0].num_rows >= 31 + 37 + 41 + 43


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (config_of(ple_layer_ids=[2]), "expected linear_attention"),
        (config_of(ple_layer_ids=[4]), "ple_layer_ids"),
        (config_of(ple_embed_dim=25), "expected a multiple of 4"),
        (config_of(eos_token_id=[]), "expected a token"),
        (config_of(ngram_vocab_size_base=1 << 41), "ngram_vocab_size_base"),
        (config_of(heads_per_ngram=0), "heads_per_ngram"),
        (config_of(output_gate_type="tanh"), "supported: silu, sigmoid"),
        (config_of(hc_count=1), "hc_count"),
        (config_of(head_dim=10**9), "250000000 rotating dimensions"),
        (config_of(indexer_kv_heads=2), "indexer_kv_heads"),
        (qwen4_exp(more_streams=True), "does not know this key"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_configs_that_are_not_supported_are_refused(tmp_path: Path, config: RawConfig, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((CheckpointError, UnsupportedModel), match=message):
        open_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"indexer_head_dim": 2}, "2 index dimensions, expected at least 4, which rotate"),
        ({"indexer_compress_ratio": 3}, "3 positions of an index block, expected 2 to 8192, and a divisor"),
        ({"indexer_compress_ratio": 1}, "1 positions of an index block"),
        ({"indexer_budget": 18}, "18 positions that an indexer chooses, expected a multiple of 4"),
        ({"indexer_budget": None}, "indexer_budget"),
    ],
)
def test_indexers_that_cannot_be_run_are_refused(changes: RawConfig, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        qwen4_exp_text_family.parse_config(config_of(**changes))


def test_a_config_without_an_indexer_sees_all_positions() -> None:
    sizes = ("n_heads", "head_dim", "budget", "compress_ratio", "kv_heads")
    config = qwen4_exp_text_family.parse_config(config_of(**{f"indexer_{size}": None for size in sizes}))
    assert config.attention.index is None
    assert config.exact_tokens is None


def test_the_heads_of_many_tables_are_counted_once() -> None:
    kinds = ["linear_attention"] * 255 + ["full_attention"]
    config = config_of(
        num_hidden_layers=256,
        layer_types=kinds,
        ple_layer_ids=list(range(1, 256)),
        ngram_vocab_size_base=1 << 40,
    )
    started = time.perf_counter()
    layers = parse_config(config).layers
    assert time.perf_counter() - started < 8  # 0.3 s on the machine of 2026-12, and 60 s table by table
    primes = [prime for layer in layers if layer.ngrams for prime in layer.ngrams.primes]
    assert sorted(set(primes)) == primes
