from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from argosy.checkpoint.ctranslate2 import read_model_bin
from argosy.errors import CheckpointError, UnsupportedModel
from tests.models.tiny_whisper import TINY, bin_variables, model_bin

TINY_BIN = model_bin(TINY["english"])
FIRST = b"decoder/activation\0"


def written(directory: Path, content: bytes) -> Path:
    path = directory / "model.bin"
    path.write_bytes(content)
    return path


def test_every_variable_is_found_where_it_lies(tmp_path: Path) -> None:
    path = written(tmp_path, TINY_BIN)
    model = read_model_bin(path)
    assert (model.name, model.revision) == ("WhisperSpec", 3)
    assert model.aliases == {"decoder/projection/weight": "decoder/embeddings/weight"}
    for name, value in bin_variables(TINY["english"]).items():
        if value.ndim == 0:
            assert model.scalars[name] == value
            continue
        ref = model.tensors[name]
        stored = np.frombuffer(TINY_BIN[ref.offset :][: ref.nbytes], np.float16).reshape(ref.shape)
        assert ref.dtype == "F16"
        assert (stored == value).all()


def test_a_file_that_is_cut_anywhere_is_refused(tmp_path: Path) -> None:
    for length in (*range(60), *range(60, len(TINY_BIN), 997), len(TINY_BIN) - 1):
        with pytest.raises(CheckpointError, match="ends at byte"):
            read_model_bin(written(tmp_path, TINY_BIN[:length]))


def _lie(before: bytes, after: bytes) -> bytes:
    assert TINY_BIN.count(before) == 1
    return TINY_BIN.replace(before, after)


EMBEDDINGS = bin_variables(TINY["english"])["decoder/embeddings/weight"]
SHAPE = b"decoder/embeddings/weight\0\2" + struct.pack("<II", *EMBEDDINGS.shape)

LIES = {
    "version": (struct.pack("<I", 5) + TINY_BIN[4:], UnsupportedModel, "version 5"),
    "num_variables": (
        _lie(
            struct.pack("<I", len(bin_variables(TINY["english"]))) + struct.pack("<H", len(FIRST)) + FIRST,
            struct.pack("<IH", 2**32 - 1, len(FIRST)) + FIRST,
        ),
        CheckpointError,
        "4294967295 variables",
    ),
    "shape": (
        _lie(SHAPE, SHAPE[:-8] + struct.pack("<II", 2**32 - 1, 2**32 - 1)),
        CheckpointError,
        r"F16 \[4294967295, 4294967295\] has",
    ),
    "axes": (_lie(SHAPE, SHAPE[:-9] + b"\xff" + SHAPE[-8:]), CheckpointError, "255 axes"),
    "type": (
        _lie(SHAPE + b"\4", SHAPE + b"\7"),
        CheckpointError,
        "the type 7",
    ),
    "length": (
        _lie(SHAPE + b"\4" + struct.pack("<I", EMBEDDINGS.nbytes), SHAPE + b"\4" + struct.pack("<I", 2**31)),
        CheckpointError,
        "2147483648 bytes",
    ),
    "name": (_lie(FIRST, b"\xc3\xa9coder/activation\0"), CheckpointError, "not ASCII"),
    "more": (TINY_BIN + b"\0", CheckpointError, "1 bytes after its end"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused_before_anything_is_read(lie: str, tmp_path: Path) -> None:
    content, error, message = LIES[lie]
    with pytest.raises(error, match=message):
        read_model_bin(written(tmp_path, content))


def test_a_variable_that_comes_twice_is_refused(tmp_path: Path) -> None:
    one = struct.pack("<H", len(FIRST)) + FIRST + struct.pack("<BBIb", 0, 1, 1, 3)
    assert TINY_BIN.count(one) == 1
    count = struct.pack("<I", len(bin_variables(TINY["english"])))
    content = TINY_BIN.replace(count + one, struct.pack("<I", struct.unpack("<I", count)[0] + 1) + one + one)
    with pytest.raises(CheckpointError, match="decoder/activation twice"):
        read_model_bin(written(tmp_path, content))
