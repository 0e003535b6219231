"""A pack keeps the encoders of pictures and sound bit for bit, whatever its format, and through every interruption."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from argosy import Engine, _native
from argosy.checkpoint import pack as pack_module
from argosy.checkpoint import pack_conversion
from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.pack import PACK_FORMATS, PackReport, pack, verify_pack
from argosy.errors import CheckpointError, CorruptRecord, DiskFull, DoesNotFit, UsageError
from argosy.model.encoders.reading import EncoderFiles, Encoders, find_encoders, tensor_names
from argosy.model.families import open_model
from tests.checkpoint.test_manifest import rewrite
from tests.model.encoders.open_tower import finish
from tests.models.safetensors_file import read_safetensors, write_checkpoint
from tests.models.seeing import CONFIGS, REFERENCE

ENCODERS = "encoders.safetensors"
SOURCE = REFERENCE / "qwen3_omni_moe"  # a tower for pictures, and one for sound
WITH_TABLES = {"qwen4_exp"}  # packs hold no n-gram tables


def pack_to(source: Path, destination: Path, format: str = "q4", **options: Any) -> PackReport:
    files = open_model(source)
    return pack(files, destination, format=format, encoder_tensors=names_of(files), **options)


def names_of(files: ModelFiles) -> set[str]:
    return tensor_names(find_encoders(files))


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def bytes_of(files: ModelFiles, name: str) -> bytes:
    ref = files.others[name]
    return ref.path.read_bytes()[ref.offset : ref.offset + ref.nbytes]


@pytest.mark.covering(1)
@pytest.mark.parametrize("family", sorted(CONFIGS.keys() - WITH_TABLES))
@pytest.mark.parametrize("format", PACK_FORMATS)
def test_a_pack_of_any_format_has_the_same_encoders(family: str, format: str, tmp_path: Path) -> None:
    source = open_model(REFERENCE / family)
    pack_to(source.path, tmp_path / "packed", format)
    packed = open_model(tmp_path / "packed")
    assert packed.others.keys() == names_of(source)
    for name, ref in packed.others.items():
        assert (ref.dtype, ref.shape) == (source.others[name].dtype, source.others[name].shape)
        assert bytes_of(packed, name) == bytes_of(source, name)
    before, after = find_encoders(source), find_encoders(packed)
    assert before.keys() == after.keys()
    for kind, tower in after.items():
        expected = before[kind]
        assert isinstance(tower, EncoderFiles)
        assert isinstance(expected, EncoderFiles)
        assert (tower.config, tower.token_id) == (expected.config, expected.token_id)


@pytest.mark.parametrize("family", sorted(WITH_TABLES))
@pytest.mark.parametrize("format", PACK_FORMATS)
def test_a_checkpoint_with_tables_is_not_packed(family: str, format: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"n-gram tables of .*, which packs do not hold"):
        pack_to(REFERENCE / family, tmp_path / "packed", format)
    assert not (tmp_path / "packed").exists()
    with pytest.raises(DoesNotFit) as caught, Engine.open(REFERENCE / family, memory="2MiB"):
        raise AssertionError
    assert "argosy pack" not in str(caught.value.hint)


def test_tensors_that_no_encoder_needs_stay_out_of_a_pack(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(REFERENCE / "qwen3_vl_moe", source)
    tensors = {
        name: ("BF16", array) for name, array in read_safetensors(source / "model.safetensors").items()
    }
    tensors["model.visual.extra.weight"] = ("BF16", tensors["model.visual.pos_embed.weight"][1])
    write_checkpoint(source, tensors)
    assert "model.visual.extra.weight" in open_model(source).others
    pack_to(source, tmp_path / "packed")
    assert "model.visual.extra.weight" not in open_model(tmp_path / "packed").others
    assert names_of(open_model(tmp_path / "packed")) == names_of(open_model(source))


def test_a_pack_of_a_pack_keeps_the_encoders_and_their_processor(tmp_path: Path) -> None:
    pack_to(SOURCE, tmp_path / "first", "bf16")
    pack_to(tmp_path / "first", tmp_path / "second", "q8")
    first, second = contents(tmp_path / "first"), contents(tmp_path / "second")
    for name in (ENCODERS, "preprocessor_config.json"):
        assert first[name] == second[name]
    assert first["preprocessor_config.json"] == (SOURCE / "preprocessor_config.json").read_bytes()


def test_the_files_of_all_processors_are_copied(tmp_path: Path) -> None:
    shutil.copytree(SOURCE, tmp_path / "source")
    names = {"processor_config.json", "video_preprocessor_config.json"}
    for name in names:
        (tmp_path / "source" / name).write_text(json.dumps({"of": name}))
    pack_to(tmp_path / "source", tmp_path / "packed")
    packed = contents(tmp_path / "packed")
    assert {name: packed[name] for name in names} == {
        name: json.dumps({"of": name}).encode() for name in names
    }


def test_sizes_count_the_encoders(tmp_path: Path) -> None:
    files = open_model(SOURCE)
    without = pack(files, tmp_path / "text", format="source")
    report = pack_to(SOURCE, tmp_path / "packed", "source")
    nbytes = sum(files.others[name].nbytes for name in names_of(files))
    assert report.source_bytes - without.source_bytes == nbytes
    assert report.packed_bytes == sum(map(len, contents(tmp_path / "packed").values()))
    assert report.packed_bytes > without.packed_bytes + nbytes


def test_the_check_for_room_counts_the_encoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack_to(SOURCE, tmp_path / "whole")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(pack_module.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    needed = []
    for name, names in (("text", set()), ("packed", names_of(open_model(SOURCE)))):
        with pytest.raises(DiskFull) as caught:
            pack(open_model(SOURCE), tmp_path / name, format="q4", encoder_tensors=names)
        needed.append(caught.value.facts["needed_bytes"])
    assert needed[1] - needed[0] == len(contents(tmp_path / "whole")[ENCODERS])  # type: ignore[operator]


def test_a_large_tensor_is_copied_in_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack_to(SOURCE, tmp_path / "whole")
    files = open_model(SOURCE)
    refs = [files.others[name] for name in names_of(files)]
    real, found = pack_conversion.read_at, []

    def read_at(descriptor: int, nbytes: int, offset: int, path: Path) -> bytes:
        if any(ref.offset <= offset < ref.offset + ref.nbytes for ref in refs) and path == refs[0].path:
            found.append(nbytes)
        return real(descriptor, nbytes, offset, path)

    monkeypatch.setattr(pack_conversion, "_COPY_BYTES", 100)
    monkeypatch.setattr(pack_conversion, "read_at", read_at)
    pack_to(SOURCE, tmp_path / "packed")
    assert max(found) == 100
    assert sum(found) == sum(ref.nbytes for ref in refs)
    assert contents(tmp_path / "packed") == contents(tmp_path / "whole")


# Interruptions


class Killed(BaseException):
    """Ends a pack like a signal."""


@contextmanager
def killed_at(number: int) -> Iterator[list[str]]:
    """End the pack when half of write `number` to the encoders' file is written; the list has the writes before it."""
    real, writes = os.pwrite, list[str]()

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(ENCODERS):
            writes.append(ENCODERS)
            if len(writes) == number:
                real(descriptor, data[: len(data) // 2], offset)
                raise Killed
        return real(descriptor, data, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        yield writes


@pytest.mark.parametrize("step", [36, pytest.param(9, marks=pytest.mark.full)])
def test_a_pack_killed_anywhere_in_its_encoders_resumes(step: int, tmp_path: Path) -> None:
    with killed_at(0) as writes:
        pack_to(SOURCE, tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    before = len(whole["dense.bin"]) + len(whole["experts.bin"])
    resumed = []
    for number in {1, 2, 3, *range(4, len(writes), step), len(writes)}:
        with killed_at(number), pytest.raises(Killed):
            pack_to(SOURCE, tmp_path / "packed")
        report = pack_to(SOURCE, tmp_path / "packed")
        assert report.restarted_because is None
        resumed.append(report.resumed_bytes)
        assert contents(tmp_path / "packed") == whole
        shutil.rmtree(tmp_path / "packed")
    assert min(resumed) == before
    assert before + len(whole[ENCODERS]) // 2 < max(resumed) < before + len(whole[ENCODERS])


def test_encoders_damaged_in_between_are_written_again(tmp_path: Path) -> None:
    pack_to(SOURCE, tmp_path / "whole")
    with killed_at(40), pytest.raises(Killed):
        pack_to(SOURCE, tmp_path / "packed")
    path = tmp_path / "packed.partial" / ENCODERS
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    pack_to(SOURCE, tmp_path / "packed")
    assert contents(tmp_path / "packed") == contents(tmp_path / "whole")


def test_an_unfinished_pack_of_other_encoders_starts_over(tmp_path: Path) -> None:
    pack_to(SOURCE, tmp_path / "whole")
    files = open_model(SOURCE)
    some = {name for name in names_of(files) if name.startswith("thinker.visual.")}
    with killed_at(40), pytest.raises(Killed):
        pack(files, tmp_path / "packed", format="q4", encoder_tensors=some)
    report = pack_to(SOURCE, tmp_path / "packed")
    assert report.restarted_because == "the unfinished pack has other encoders"
    assert contents(tmp_path / "packed") == contents(tmp_path / "whole")


def test_a_pack_of_text_alone_drops_the_encoders_of_an_unfinished_one(tmp_path: Path) -> None:
    with killed_at(40), pytest.raises(Killed):
        pack_to(SOURCE, tmp_path / "packed")
    pack(open_model(SOURCE), tmp_path / "packed", format="q4")
    assert ENCODERS not in contents(tmp_path / "packed")
    verify_pack(tmp_path / "packed")


# Damage


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    pack_to(SOURCE, tmp_path / "packed")
    return tmp_path / "packed"


def test_damaged_encoders_are_named(packed: Path) -> None:
    verify_pack(packed)
    data = bytearray((packed / ENCODERS).read_bytes())
    data[-1] ^= 1
    (packed / ENCODERS).write_bytes(data)
    last = max(open_model(packed).others.values(), key=lambda ref: ref.offset).name
    with pytest.raises(CorruptRecord, match=f"^{ENCODERS}: {last} changed since the pack was written"):
        verify_pack(packed)
    encoders = find_encoders(open_model(packed))
    (kind,) = (kind for kind, one in encoders.items() if last in tensor_names({kind: one}))
    store, runtime = _native.Store(1), _native.Runtime(1)
    towers = {kind: one for kind, one in encoders.items() if isinstance(one, EncoderFiles)}
    with closing(store), pytest.raises(CorruptRecord, match=f"^{ENCODERS}: {last}: "):
        finish(Encoders(towers, store, runtime, open_file=store.open).open(kind))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda c: c["encoders"]["crc32c_wide"].update(a=0),
            f"argosy.json has tensor a, but {ENCODERS} does not",
        ),
        (
            lambda c: c["encoders"]["crc32c_wide"].pop("thinker.visual.pos_embed.weight"),
            f"{ENCODERS} has tensor thinker.visual.pos_embed.weight, but argosy.json does not",
        ),
        (
            lambda c: c["encoders"]["crc32c_wide"].update(a=-1),
            "a is -1, a whole number; expected a 32-bit checksum",
        ),
        (
            lambda c: c["encoders"].update(crc32c_wide=[1]),
            "encoders.crc32c_wide is [1], a list; expected an object",
        ),
        (lambda c: c["encoders"].update(more=1), "expected the keys crc32c_wide"),
        (lambda c: c.update(encoders=None), "encoders is None, null; expected an object"),
        (lambda c: c.pop("encoders"), f"{ENCODERS} has tensor thinker."),
        (lambda c: c["files"].pop(ENCODERS), "argosy.json has tensor thinker."),
    ],
)
def test_a_manifest_and_encoders_that_disagree_are_refused(
    packed: Path, change: Callable[[dict[str, Any]], None], sentence: str
) -> None:
    rewrite(packed, change)
    with pytest.raises(CheckpointError, match=re.escape(sentence)):
        open_model(packed)


def test_a_damaged_header_of_the_encoders_is_named(packed: Path) -> None:
    data = bytearray((packed / ENCODERS).read_bytes())
    data[8] = ord("[")
    (packed / ENCODERS).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"^{ENCODERS}: "):
        open_model(packed)


def test_missing_or_truncated_encoders_are_named(packed: Path) -> None:
    with (packed / ENCODERS).open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(CheckpointError, match=f"{ENCODERS} has 1000 bytes; argosy.json says"):
        open_model(packed)
    (packed / ENCODERS).unlink()
    with pytest.raises(CheckpointError, match=f"{ENCODERS}"):
        open_model(packed)


def test_only_encoders_that_the_manifest_lists_are_read(tmp_path: Path) -> None:
    pack(open_model(SOURCE), tmp_path / "packed", format="q4")
    (tmp_path / "packed" / ENCODERS).write_bytes(b"of another pack")
    assert open_model(tmp_path / "packed").others == {}
    assert find_encoders(open_model(tmp_path / "packed")) == {}
