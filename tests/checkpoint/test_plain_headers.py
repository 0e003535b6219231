"""The fast reader of headers and indexes agrees with the reader of all JSON, or leaves the text to it."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from argosy.checkpoint import safetensors
from argosy.checkpoint.files import ExpertMatrix, ExpertRecord, ExpertRecords
from argosy.checkpoint.landing import Piece
from argosy.checkpoint.plain_headers import plain_entries, plain_weight_map
from argosy.checkpoint.safetensors import DTYPE_BITS, open_tensors, read_header
from argosy.errors import CheckpointError
from tests.checkpoint.raw_files import entry, write_index, write_raw

HEADER = {
    "__metadata__": {"format": "pt"},
    "a.0.weight": entry("F32", [2, 3], 0, 24),
    "a.1.weight": entry("F8_E4M3", [7], 24, 31),
    "none": entry("I64", [0, 3], 31, 31),
    "scalar": entry("U8", [], 31, 32),
}
DATA_BYTES = 32


def compact(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def read(path: Path) -> Any:
    try:
        return list(read_header(path).items())
    except CheckpointError as error:
        return str(error)


def test_what_the_usual_writer_writes_is_read_fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    write_raw(path, compact(HEADER) + b"   ", bytes(DATA_BYTES))
    fast = read(path)
    monkeypatch.setattr(safetensors, "plain_entries", lambda *_: None)

    assert plain_entries(compact(HEADER), DATA_BYTES, DTYPE_BITS) is not None
    assert fast == read(path)
    assert [name for name, _ in fast] == ["a.0.weight", "a.1.weight", "none", "scalar"]


ODD: dict[str, bytes] = {
    "an overlap": compact(HEADER | {"none": entry("U8", [1], 30, 31)}),
    "a hole": compact({"a": entry("U8", [31], 1, 32)}),
    "a missing end": compact({"a": entry("U8", [31], 0, 31)}),
    "a tensor twice": compact({"a": entry("U8", [16], 0, 16)})[:-1]
    + b","
    + compact({"a": entry("U8", [16], 16, 32)})[1:],
    "metadata among tensors": compact(
        {"a": entry("U8", [32], 0, 32), "__metadata__": entry("U8", [0], 32, 32)}
    ),
    "metadata of numbers": compact(HEADER | {"__metadata__": {"a": 1}}),
    "metadata that are cut": b'{"__metadata__":{"a":"}' + compact(HEADER)[1:],
    "an escape": compact({"a\n": entry("U8", [32], 0, 32)}),
    "a name in Greek": compact({"α": entry("U8", [32], 0, 32)}),
    "a long name": compact({"a" * 257: entry("U8", [32], 0, 32)}),
    "a leading zero": compact(HEADER).replace(b"[2,3]", b"[02,3]"),
    "an end too early": compact(HEADER).replace(b',"none"', b'},"none"'),
    "something between": compact(HEADER).replace(b',"none"', b', "none"'),
    "other keys": compact(HEADER | {"none": {"dtype": "U8", "shape": [0]}}),
    "an unknown dtype": compact(HEADER).replace(b"I64", b"I63"),
    "half a byte": compact(HEADER | {"scalar": entry("F4", [1], 31, 32)}),
    "a size that overflows": compact(HEADER | {"none": entry("U8", [2**40, 2**40], 31, 31)}),
    "no tensors": b"{}",
    "a newline behind it": compact(HEADER) + b"\n",
}


@pytest.mark.parametrize("name", ODD)
def test_odd_headers_are_left_to_the_other_reader(name: str) -> None:
    assert plain_entries(ODD[name], DATA_BYTES, DTYPE_BITS) is None


def test_damaged_headers_get_the_same_answer_from_both_readers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, whole, draw = tmp_path / "model.safetensors", compact(HEADER), random.Random(1)
    texts = list(ODD.values())
    for _ in range(300):
        text = bytearray(whole)
        for _ in range(draw.randint(1, 2)):
            at = draw.randrange(len(text))
            text[at : at + draw.randint(0, 2)] = bytes(
                draw.choice(b'"{}[],:0123 aU\\') for _ in range(draw.randint(0, 2))
            )
        texts.append(bytes(text))
    num_fast = 0
    for text in texts:
        write_raw(path, text, bytes(DATA_BYTES))
        fast = read(path)
        with monkeypatch.context() as without:
            without.setattr(safetensors, "plain_entries", lambda *_: None)
            assert fast == read(path), text
        num_fast += not isinstance(fast, str)
    assert num_fast > 5


def test_an_index_is_read_alike_in_any_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}
    whole = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    for text in (json.dumps(whole, indent=2), json.dumps(whole), json.dumps({"weight_map": weight_map})):
        found = plain_weight_map(text.encode())
        assert found is not None
        rows, shards, shard_of = found
        assert {name: shards[shard_of[row]] for name, row in rows.items()} == weight_map
    last = json.dumps({"weight_map": weight_map, "metadata": {}})
    assert plain_weight_map(last.encode()) is not None
    damaged = (
        last.replace('"c"', '"b"'), last.replace("{}", "{} x"), last.replace("{}", "{,}"), last + "x",
        last.replace('"a": ', '"a" '), last.replace('"b"', '"\\u0062"'), last.replace("},", "}},"),
        json.dumps({"weight_map": {}}), json.dumps(whole | {"other": 1}), last.replace(" ", "\f"),
    )  # fmt: skip
    for text in damaged:
        assert plain_weight_map(text.encode()) is None, text


def test_a_tensor_takes_a_few_hundred_bytes_however_many_there_are(tmp_path: Path) -> None:
    def peak_bytes(num_tensors: int) -> float:
        header = {f"model.layers.{i}.weight": entry("F32", [1], 4 * i, 4 * i + 4) for i in range(num_tensors)}
        folder = tmp_path / str(num_tensors)
        folder.mkdir()
        write_raw(folder / "model-1.safetensors", compact(header), bytes(4 * num_tensors))
        write_index(folder, dict.fromkeys(header, "model-1.safetensors"))
        del header
        tracemalloc.start()
        kept = open_tensors(folder)
        assert len(kept) == num_tensors
        held, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert held < 300 * num_tensors
        return peak / num_tensors

    assert peak_bytes(8000) < 1.3 * peak_bytes(2000) < 2000


def test_records_in_columns_are_those_that_were_added() -> None:
    matrices = [
        ExpertMatrix(0, 0, "f32", 2, 8),
        ExpertMatrix(0, 64, "f32", 2, 8),
        ExpertMatrix(1, 0, "f32", 8, 2),
    ]
    records = {
        (layer, expert): ExpertRecord(
            (
                Piece(
                    Path(f"{layer % 2}"), 4096 * (expert // 2), 128, checksum=expert if layer == 3 else None
                ),
                Piece(Path("down"), 1 << 20, 64 if layer < 3 else 128),
            ),
            *matrices,
        )
        for layer in (1, 2, 3)
        for expert in (0, 1, 5, 6)
    }

    found = ExpertRecords.of(records)

    assert dict(found) == records
    assert len(found) == len(records)
    assert found.paths == [Path("1"), Path("down"), Path("0")]
    assert (1, 2) not in found
    assert (4, 0) not in found
    assert sum(run.num_experts for run in found.runs()) == len(records)
    assert all(run.record == records[run.layer, run.expert] for run in found.runs())
    numbers = [(run.layer, run.expert + i) for run in found.runs() for i in range(run.num_experts)]
    assert numbers == list(records)


def test_stacked_records_go_on_from_the_second() -> None:
    matrix = ExpertMatrix(0, 0, "f32", 4, 16384)

    def record(offset: int) -> ExpertRecord:
        return ExpertRecord((Piece(Path("x"), offset, 1 << 18),), matrix, matrix, matrix)

    found = ExpertRecords()
    found.add_stacked(0, 3, record(100), record(100 + (1 << 18)))

    assert dict(found) == {(0, expert): record(100 + (expert << 18)) for expert in range(3)}
    (run,) = found.runs()
    assert (run.layer, run.expert, run.num_experts) == (0, 0, 3)
