"""Nothing in a safetensors file is trusted: every false claim gets its own error message."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from argosy.checkpoint.safetensors import HEADER_LIMIT_BYTES, open_tensors, read_header
from argosy.errors import ArgosyError, CheckpointError
from tests.checkpoint.raw_files import entry, write_index, write_raw


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_tensors(directory)
    return str(caught.value)


def test_files_of_the_format_s_own_library_are_read(path: Path) -> None:
    tensors: dict[str, Any] = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(4, dtype=np.float16),
        "none": np.zeros((0, 3), np.float32),
        "scalar": np.array(7, np.int64),
    }
    save_file(tensors, path, metadata={"format": "np"})

    found = open_tensors(path.parent)

    assert found.keys() == tensors.keys()
    for name, ref in found.items():
        assert ref.shape == tensors[name].shape
        stored = path.read_bytes()[ref.offset : ref.offset + ref.nbytes]
        assert stored == tensors[name].tobytes()


def test_a_header_may_be_padded_with_spaces_and_in_any_order(path: Path) -> None:
    header = {"late": entry("F16", [2], 4, 8), "early": entry("F32", [1], 0, 4)}
    write_raw(path, json.dumps(header).encode() + b"     ", b"\0" * 8)

    assert list(open_tensors(path.parent)) == ["early", "late"]


def test_links_are_followed_because_hub_caches_need_them(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    write_raw(tmp_path / "blobs" / "0a1b", {"a": entry("F32", [1], 0, 4)}, b"\0" * 4)
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/0a1b")

    assert open_tensors(tmp_path / "snapshot")["a"].nbytes == 4


GOOD = entry("F32", [1], 0, 4)


@pytest.mark.parametrize(
    ("header", "data", "sentence"),
    [
        ({"a": entry("F32", [2, 3], 0, 20)}, 20, r"a is F32 \[2, 3\] and needs 24 bytes, .* span 20"),
        ({"a": entry("F32", [1], 4, 0)}, 4, r"needs 4 bytes, .* span -4"),
        (
            {"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 2, 6)},
            6,
            r"b overlaps a: .* byte \d+, expected \d+",
        ),
        ({"a": GOOD, "b": GOOD}, 4, r"b overlaps a"),
        (
            {"a": GOOD, "b": entry("F32", [1], 8, 12)},
            12,
            r"b leaves a hole after a: .* byte \d+, expected \d+",
        ),
        ({"a": entry("F32", [1], 4, 8)}, 8, r"a leaves a hole after the header"),
        (
            {"a": GOOD},
            3,
            r"a ends at byte \d+, but the file has \d+ bytes\nhint: the download may be incomplete",
        ),
        ({"a": GOOD}, 5, r"has \d+ bytes, but its tensors end at byte \d+"),
        ({}, 1, r"its tensors end at byte"),
        ({"a": entry("F32", [2**62, 4], 0, 4)}, 4, r"more than 2\^63 - 1 bits"),
        ({"a": entry("F32", [2**62, 4, 0], 0, 0)}, 0, r"more than 2\^63 - 1 bits"),
        ({"a": entry("F32", [2**63], 0, 4)}, 4, r"expected a list of whole numbers from 0 to 2\^63 - 1"),
        ({"a": entry("F32", [1], 0, 2**63)}, 4, r"expected two whole numbers from 0 to 2\^63 - 1"),
        ({"a": entry("F32", [-1], 0, 4)}, 4, r"has shape \[-1\]"),
        ({"a": entry("F32", [True], 0, 4)}, 4, r"has shape \[True\]"),
        ({"a": entry("F32", [1.0], 0, 4)}, 4, r"has shape \[1.0\]"),  # type: ignore[list-item]
        ({"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}, 4, r"has shape 1"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, 4, r"has data_offsets \[0\]"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": {"0": 4}}}, 4, r"has data_offsets"),
        ({"a": entry("F4", [3], 0, 2)}, 2, r"not a whole number of bytes"),
        ({"a": entry("Q9", [1], 0, 4)}, 4, r"a has dtype Q9; known: .*BF16"),
        ({"a": {"dtype": 7, "shape": [1], "data_offsets": [0, 4]}}, 4, r"a has dtype 7"),
        ({"a": {"dtype": "F32", "shape": [1]}}, 4, r"has the fields dtype, shape; expected data_offsets"),
        ({"a": GOOD | {"extra": 1}}, 4, r"has the fields data_offsets, dtype, extra, shape"),
        ({"a": [0, 4]}, 4, r"a is a list in the header, expected an object"),
        ({"__metadata__": {"format": 1}, "a": GOOD}, 4, r"__metadata__ must map strings to strings"),
        ({"__metadata__": [], "a": GOOD}, 4, r"__metadata__ must map strings to strings"),
    ],
)
def test_an_inconsistent_header_is_refused_with_the_numbers(
    path: Path, header: dict[str, Any], data: int, sentence: str
) -> None:
    write_raw(path, header, b"\0" * data)

    found = refusal(path.parent)

    assert re.search(sentence, found), found
    assert found.startswith("model.safetensors")


@pytest.mark.parametrize(
    ("header", "sentence"),
    [
        (b'{"a": 1, "a": 2}', "gives the key 'a' twice"),
        (
            b'{"a": {"dtype": "F32", "dtype": "F16", "shape": [], "data_offsets": [0, 4]}}',
            "gives the key 'dtype' twice",
        ),
        (b'[{"a": 1}]', "the header does not start with '{'"),
        (b' {"a": 1}', "the header does not start with '{'"),
        (b'{"a": NaN}', "holds NaN, which is not JSON"),
        (b'{"a": -Infinity}', "holds -Infinity, which is not JSON"),
        (b'{"a": 1e999}', "holds a number that is too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "holds a number that is too large"),
        (b'{"a": ' + b"[" * 100_000, "is nested deeper than 64 levels"),
        (b'{"a": "\xff"}', "is not UTF-8 text: byte 7 is wrong"),
        (b'{"a": 1', "is not JSON"),
        (b'{"a": 1} x', "is not JSON"),
        (b'{"a\n": 1}', "is not JSON"),
    ],
)
def test_a_header_that_is_not_plain_json_is_refused(path: Path, header: bytes, sentence: str) -> None:
    write_raw(path, header)

    assert sentence in refusal(path.parent)


def test_the_header_s_length_is_checked_before_it_is_read(path: Path) -> None:
    path.write_bytes(b"1234567")
    assert "is 7 bytes long, too short" in refusal(path.parent)

    write_raw(path, b"{}", length=HEADER_LIMIT_BYTES + 1)
    assert f"claims a header of {HEADER_LIMIT_BYTES + 1} bytes; at most {HEADER_LIMIT_BYTES}" in refusal(
        path.parent
    )

    write_raw(path, b"{}", length=2**64 - 1)
    assert f"claims a header of {2**64 - 1} bytes" in refusal(path.parent)

    write_raw(path, b"{}", length=3)
    assert "claims a header of 3 bytes, but the file has only 2 after the length" in refusal(path.parent)


def test_a_truncated_file_is_refused_with_the_first_missing_tensor(path: Path) -> None:
    write_raw(path, {"a": GOOD, "b": entry("BF16", [8, 8], 4, 132)}, b"\0" * 132)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])

    with pytest.raises(CheckpointError) as caught:
        open_tensors(path.parent)

    assert caught.value.facts["tensor"] == "b"
    assert f"b ends at byte {len(whole)}, but the file has {len(whole) - 100} bytes" in str(caught.value)


def test_an_unprintable_name_is_escaped_in_the_error(path: Path) -> None:
    write_raw(path, b'{"\\u200b\\u001b[31m' + b"x" * 500 + b'": 1}')

    found = refusal(path.parent)

    assert found.isprintable()
    assert "\\u200b\\x1b[31mxxx" in found
    assert len(found) < 300


def test_anything_but_a_regular_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    os.mkfifo(path)
    assert refusal(tmp_path) == "model.safetensors is not a regular file"

    path.unlink()
    path.mkdir()
    assert "model.safetensors is not a regular file" in refusal(tmp_path)

    path.rmdir()
    path.symlink_to("../blobs/gone")
    assert refusal(tmp_path) == "model.safetensors is a link to ../blobs/gone, which does not exist"


# Shards


def two_shards(directory: Path) -> dict[str, str]:
    write_raw(directory / "one.safetensors", {"a": GOOD}, b"\0" * 4)
    write_raw(directory / "two.safetensors", {"b": GOOD}, b"\0" * 4)
    return {"a": "one.safetensors", "b": "two.safetensors"}


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    write_index(tmp_path, two_shards(tmp_path), metadata={"total_size": 8})

    found = open_tensors(tmp_path)

    assert {name: ref.path.name for name, ref in found.items()} == {
        "a": "one.safetensors",
        "b": "two.safetensors",
    }


def test_the_index_and_its_shards_must_agree_in_both_directions(tmp_path: Path) -> None:
    weight_map = two_shards(tmp_path)

    write_index(tmp_path, weight_map | {"c": "two.safetensors"})
    assert (
        refusal(tmp_path)
        == "model.safetensors.index.json assigns c to two.safetensors, which does not contain it"
    )

    write_raw(tmp_path / "two.safetensors", {"b": GOOD, "d": entry("F32", [1], 4, 8)}, b"\0" * 8)
    write_index(tmp_path, weight_map)
    assert refusal(tmp_path) == "two.safetensors holds d, but model.safetensors.index.json does not list it"

    write_raw(tmp_path / "two.safetensors", {"b": GOOD, "a": entry("F32", [1], 4, 8)}, b"\0" * 8)
    assert (
        refusal(tmp_path)
        == "two.safetensors holds a, but model.safetensors.index.json assigns it to one.safetensors"
    )


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_index(tmp_path, two_shards(tmp_path))
    (tmp_path / "two.safetensors").unlink()

    assert refusal(tmp_path) == f"two.safetensors is missing from {tmp_path}"


@pytest.mark.parametrize(
    "shard",
    ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "a\\b.safetensors", "..", ".safetensors",
     ".hidden.safetensors", "pytorch_model.bin", "a\0.safetensors", "", "x" * 300 + ".safetensors"],
)  # fmt: skip
def test_a_shard_is_a_plain_name_without_a_folder(tmp_path: Path, shard: str) -> None:
    write_index(tmp_path, {"a": shard})

    assert re.search(
        r"names the shard '.*'; a shard is a plain file name without a folder", refusal(tmp_path)
    )


@pytest.mark.parametrize("weight_map", [None, [], {}, "x", 7])
def test_an_index_without_a_weight_map_is_refused(tmp_path: Path, weight_map: object) -> None:
    write_index(tmp_path, weight_map)

    assert "has no weight_map" in refusal(tmp_path)


def test_an_index_with_invalid_values_or_keys_is_refused(tmp_path: Path) -> None:
    write_index(tmp_path, {"a": 7})
    assert "assigns a to 7, expected a file name" in refusal(tmp_path)

    write_index(tmp_path, two_shards(tmp_path), shards=[])
    assert "has the unknown key 'shards'; known: metadata, weight_map" in refusal(tmp_path)


# Directories


def test_one_file_and_an_index_together_are_ambiguous(tmp_path: Path) -> None:
    write_index(tmp_path, two_shards(tmp_path))
    write_raw(tmp_path / "model.safetensors", {"a": GOOD}, b"\0" * 4)

    assert "holds both model.safetensors and model.safetensors.index.json" in refusal(tmp_path)


def test_metadata_may_be_null(tmp_path: Path) -> None:
    write_raw(tmp_path / "model.safetensors", {"__metadata__": None, "a": GOOD}, b"\0" * 4)
    assert list(open_tensors(tmp_path)) == ["a"]


def test_an_index_of_the_one_file_is_read_as_mlx_writes_it(tmp_path: Path) -> None:
    write_raw(tmp_path / "model.safetensors", {"a": GOOD}, b"\0" * 4)
    write_index(tmp_path, {"a": "model.safetensors"})
    assert open_tensors(tmp_path)["a"].path == tmp_path / "model.safetensors"

    write_index(tmp_path, {"a": "model.safetensors", "b": "model.safetensors"})
    assert "assigns b to model.safetensors, which does not contain it" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_a_format_that_can_run_code_is_never_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04")

    found = refusal(tmp_path)

    assert f"found {name}, a format that can run code" in found
    assert "hint: download the safetensors files" in found


def test_weights_in_another_format_are_named(tmp_path: Path) -> None:
    (tmp_path / "model-q4.gguf").write_bytes(b"GGUF")

    assert "looked for model.safetensors and model.safetensors.index.json, found model-q4.gguf" in refusal(
        tmp_path
    )


def test_errors_carry_their_facts(path: Path) -> None:
    write_raw(path, {"a": entry("F32", [2], 0, 4)}, b"\0" * 4)

    with pytest.raises(ArgosyError) as caught:
        read_header(path)

    assert caught.value.exit_code == 4
    assert caught.value.facts == {"path": path, "tensor": "a"}


@pytest.mark.parametrize("shape", [[2] * 1000, [1] * 1000])  # overflows; disagrees with its offsets
def test_a_shape_of_a_thousand_dimensions_gives_a_short_error(tmp_path: Path, shape: list[int]) -> None:
    write_raw(tmp_path / "x.safetensors", {"a": entry("BF16", shape, 0, 4)}, bytes(4))
    with pytest.raises(CheckpointError) as caught:
        read_header(tmp_path / "x.safetensors")
    assert len(str(caught.value)) < 400
