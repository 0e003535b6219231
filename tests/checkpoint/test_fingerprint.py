"""A fingerprint tells models apart, whatever their directory, and covers the checksums of a pack."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from argosy.checkpoint.fingerprint import fingerprint
from argosy.checkpoint.pack import pack
from argosy.errors import ReadFailed
from argosy.model.families import open_model
from tests.models.tiny import qwen3_moe, write_model

CONFIG = qwen3_moe(num_hidden_layers=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("fingerprint") / "model", CONFIG, seed=1)


def of(directory: Path) -> str:
    return fingerprint(open_model(directory))


def test_copies_have_one_fingerprint_and_other_trainings_and_forms_another(
    model: Path, tmp_path: Path
) -> None:
    own = of(model)
    assert len(own) == 64
    shutil.copytree(model, tmp_path / "copy")
    assert of(tmp_path / "copy") == own
    other = write_model(tmp_path / "other", CONFIG, seed=2)  # names and sizes of all files are the same
    assert {path.name: path.stat().st_size for path in other.iterdir()} == {
        path.name: path.stat().st_size for path in model.iterdir()
    }
    assert of(other) != own
    packed = {}
    for name, source in (("one", model), ("same", model), ("other", other)):
        pack(open_model(source), tmp_path / f"{name}.pack", format="q8")
        packed[name] = of(tmp_path / f"{name}.pack")
    assert packed["one"] == packed["same"] != own
    assert packed["other"] != packed["one"]


def test_every_checksum_of_a_pack_counts(model: Path, tmp_path: Path) -> None:
    pack(open_model(model), tmp_path / "pack", format="q8")
    files = open_model(tmp_path / "pack")
    own = fingerprint(files)
    for name in ("final_norm", "layers.1.router"):
        ref = files.dense[name]
        assert ref.checksum is not None
        changed = {**files.dense, name: replace(ref, checksum=ref.checksum ^ 1)}
        assert fingerprint(replace(files, dense=changed)) != own
    record = files.experts[1, 2]
    assert record.pieces[-1].checksum is not None
    pieces = (*record.pieces[:-1], replace(record.pieces[-1], checksum=record.pieces[-1].checksum ^ 1))
    experts = {**files.experts, (1, 2): replace(record, pieces=pieces)}
    assert fingerprint(replace(files, experts=experts)) != own


def test_a_changed_byte_in_the_middle_of_a_tensor_is_seen(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "changed")
    ref = open_model(tmp_path / "changed").dense["final_norm"]
    with ref.path.open("r+b") as file:
        file.seek(ref.offset + ref.nbytes // 2)
        byte = file.read(1)
        file.seek(ref.offset + ref.nbytes // 2)
        file.write(bytes([byte[0] ^ 1]))
    assert of(tmp_path / "changed") != of(model)


def test_a_file_that_is_gone_is_an_error(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "going")
    files = open_model(tmp_path / "going")
    for path in files.weight_paths:
        path.unlink()
    with pytest.raises(ReadFailed, match="cannot be read"):
        fingerprint(files)
