"""Whatever bytes a GGUF file has, reading it gives tensors or an ArgosyError, and takes little memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from argosy.checkpoint.gguf import GgufArray, read_gguf
from argosy.errors import ArgosyError, CheckpointError
from argosy.model.families import open_model
from argosy.prompt.tokenizer import Tokenizer
from tests.checkpoint.raw_gguf import RawGguf
from tests.models.gguf_models import one_type, write_gguf_model
from tests.models.tiny import qwen2_moe

quick = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check(path: Path) -> None:
    """Read a file; check that its tensors lie inside it and that reading took little memory."""
    file_bytes = path.stat().st_size
    sentence = ""
    tracemalloc.start()
    try:
        file = read_gguf(path)
        for ref in file.tensors.values():
            assert 0 <= ref.offset <= ref.offset + ref.nbytes <= file_bytes
        for value in file.metadata.values():
            if isinstance(value, GgufArray):
                value.values()
    except ArgosyError as error:
        sentence = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert len(sentence.encode()) < 2_000
    assert peak < 200_000 + 60 * file_bytes


def test_a_file_truncated_anywhere_is_refused(tmp_path: Path) -> None:
    path, content = tmp_path / "model.gguf", RawGguf().to_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            read_gguf(path)


@pytest.mark.parametrize("has_all", [False, pytest.param(True, marks=pytest.mark.full)])
def test_a_file_with_any_byte_changed_gives_tensors_or_an_error(tmp_path: Path, has_all: bool) -> None:
    path, content = tmp_path / "model.gguf", RawGguf().to_bytes()
    changes = (0x01, 0x80, 0xFF)
    for at in range(len(RawGguf().header())):
        for change in changes if has_all else [changes[at % 3]]:
            changed = bytearray(content)
            changed[at] ^= change
            path.write_bytes(changed)
            check(path)


@quick
@given(content=st.binary(max_size=200), has_magic=st.booleans())
def test_any_bytes_give_tensors_or_an_error(tmp_path: Path, content: bytes, has_magic: bool) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes((b"GGUF\3\0\0\0" if has_magic else b"") + content)
    check(path)


@quick
@given(data=st.data())
def test_a_model_with_changed_header_bytes_opens_or_gives_an_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(_good_model(tmp_path_factory))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 6000))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("changed") / "model.gguf"
    path.write_bytes(content)
    sentence = ""
    try:
        for ref in open_model(path).dense.values():
            assert ref.offset + ref.nbytes <= len(content)
        Tokenizer.open(path)
    except ArgosyError as error:
        sentence = str(error)
    assert len(sentence.encode()) < 4_000
    path.unlink()


_CACHE: list[bytes] = []


def _good_model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    if not _CACHE:
        path = tmp_path_factory.mktemp("good") / "model.gguf"
        config = qwen2_moe(hidden_size=32, moe_intermediate_size=32, shared_expert_intermediate_size=32)
        write_gguf_model(path, config, one_type("Q8_0"), seed=1)
        _CACHE.append(path.read_bytes())
    return _CACHE[0]
