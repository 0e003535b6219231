"""A pack holds the same model: exact where that is promised, and within half a step where it is quantised."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import pytest

from argosy import Engine
from argosy.checkpoint import pack_conversion
from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.formats import matrix_bytes
from argosy.checkpoint.landing import MatrixRef
from argosy.checkpoint.manifest import expert_file
from argosy.checkpoint.pack import PACK_FORMATS, PackReport, open_pack, pack, verify_pack
from argosy.checkpoint.pack_contents import smaller_formats
from argosy.checkpoint.pack_conversion import round_to_bf16
from argosy.checkpoint.shards import ALL_SHARDS, shard_of, shards_of_share
from argosy.errors import CheckpointError, CorruptRecord, DoesNotFit, UsageError
from argosy.model.families import open_model
from tests.checkpoint import packed_formats
from tests.models.hub_schemes import KINDS, write_kind
from tests.models.mxfp4_models import write_mxfp4_model
from tests.models.safetensors_file import Array, read_checkpoint, write_checkpoint
from tests.models.tiny import RawConfig, gpt_oss, mixtral, qwen2_moe, qwen3_moe, random_tensors, write_model

every_format = pytest.mark.parametrize("format", PACK_FORMATS)


def packed(
    tmp_path: Path, config: RawConfig, format: str, dtype: str = "BF16"
) -> tuple[ModelFiles, ModelFiles]:
    """A tiny model and its pack, both opened."""
    source = open_model(write_model(tmp_path / "source", config, seed=5, dtype=dtype))
    pack(source, tmp_path / "packed", format=format)
    return source, open_model(tmp_path / "packed")


def dense_values(files: ModelFiles, name: str) -> Array:
    ref = files.dense[name]
    return packed_formats.decode(ref.format, dense_bytes(ref), ref.rows, ref.cols)


def dense_bytes(ref: MatrixRef) -> bytes:
    return ref.path.read_bytes()[ref.offset : ref.offset + ref.nbytes]


def expert_bytes(files: ModelFiles, key: tuple[int, int], name: str) -> bytes:
    record = files.experts[key]
    matrix = getattr(record, name)
    piece = record.pieces[matrix.piece]
    start = piece.offset + matrix.offset
    return piece.path.read_bytes()[
        start : start + packed_formats.nbytes(matrix.format, matrix.rows, matrix.cols)
    ]


def expert_values(files: ModelFiles, key: tuple[int, int], name: str) -> Array:
    matrix = getattr(files.experts[key], name)
    return packed_formats.decode(matrix.format, expert_bytes(files, key, name), matrix.rows, matrix.cols)


def is_kept_exact(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last in ("router", "shared_score") or last.endswith(("norm", "bias"))


@every_format
@pytest.mark.parametrize("make", [mixtral, qwen2_moe, qwen3_moe], ids=lambda make: make.__name__)
def test_formats_are_as_documented_and_exact_parts_are_exact(tmp_path: Path, make: Any, format: str) -> None:
    changes = {} if make is mixtral else {"mlp_only_layers": [1]}
    source, files = packed(tmp_path, make(**changes), format, "F16" if format == "source" else "BF16")

    assert files.is_packed
    assert files.config == source.config
    assert files.dense.keys() == source.dense.keys()
    assert list(files.experts) == list(source.experts)
    expected = {"bf16": ("bf16", "bf16"), "q8": ("q8", "q8"), "q4": ("q8", "q4"), "source": ("f16", "f16")}[
        format
    ]
    assert files.expert_format == expected[1]
    for name, ref in files.dense.items():
        kept = is_kept_exact(name) and format != "source"
        assert ref.format == ("f32" if kept else expected[0])
        if kept or format in ("bf16", "source"):
            assert np.array_equal(dense_values(files, name), dense_values(source, name))
    for key in files.experts:
        for name in ("gate", "up", "down"):
            if format in ("bf16", "source"):
                assert expert_bytes(files, key, name) == expert_bytes(source, key, name)


@pytest.mark.parametrize(("format", "most_steps"), [("q8", 127), ("q4", 8)])
def test_quantised_weights_are_within_a_step_of_the_source(
    tmp_path: Path, format: str, most_steps: int
) -> None:
    source, files = packed(tmp_path, qwen2_moe(hidden_size=72, moe_intermediate_size=37), format)

    for key in list(files.experts)[::5]:
        for name in ("gate", "up", "down"):
            matrix = getattr(files.experts[key], name)
            stored = expert_bytes(files, key, name)
            quants, scales = packed_formats.quants_and_scales(format, stored, matrix.rows, matrix.cols)
            wanted = expert_values(source, key, name)
            step = np.repeat(np.abs(scales), 32, axis=1)[:, : matrix.cols]
            error = np.abs(quants * step * np.sign(np.repeat(scales, 32, axis=1)[:, : matrix.cols]) - wanted)
            assert np.abs(quants).max() <= most_steps
            # Rounding is off by up to half a step; q4 may also clip its largest values if the whole group gains by it.
            assert (error <= step * (0.51 if format == "q8" else 1.5)).all()
            assert (error**2).mean() ** 0.5 <= 0.6 * step.mean()


def test_records_are_aligned_for_unbuffered_reads(tmp_path: Path) -> None:
    _, files = packed(tmp_path, qwen3_moe(), "q4")

    stride = files.experts[0, 1].pieces[0].offset
    assert stride % 4096 == 0
    for index, record in enumerate(files.experts.values()):
        (piece,) = record.pieces
        assert piece.offset == index * stride
        assert piece.path == tmp_path / "packed" / "experts.bin"
        end = 0
        for matrix in record.matrices:
            assert matrix.piece == 0
            assert matrix.offset % 64 == 0
            assert matrix.offset >= end
            end = matrix.offset + packed_formats.nbytes("q4", matrix.rows, matrix.cols)
        assert piece.nbytes == end <= stride
    assert (tmp_path / "packed" / "experts.bin").stat().st_size == stride * len(files.experts)
    assert all(ref.offset % 4096 == 0 for ref in files.dense.values())


@every_format
def test_checksums_match_the_bytes(tmp_path: Path, format: str) -> None:
    _, files = packed(tmp_path, qwen2_moe(num_experts=3, num_hidden_layers=2), format)

    for ref in files.dense.values():
        assert ref.checksum == packed_formats.crc32c_wide(dense_bytes(ref))
    content = (tmp_path / "packed" / "experts.bin").read_bytes()
    for record in files.experts.values():
        (piece,) = record.pieces
        assert piece.checksum == packed_formats.crc32c_wide(
            content[piece.offset : piece.offset + piece.nbytes]
        )
    named = json.loads((tmp_path / "packed" / "argosy.json").read_text())["contents"]["files"]
    assert named.keys() == {path.name for path in (tmp_path / "packed").iterdir()} - {"argosy.json"}
    for name, facts in named.items():
        data = (tmp_path / "packed" / name).read_bytes()
        assert facts == {"nbytes": len(data), "blake3": blake3.blake3(data).hexdigest()}


def test_config_tokenizer_and_licence_are_copied(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "source", mixtral(), seed=5)
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "LICENSE",
        "README.md",
        "x.bin",
    ):
        (directory / name).write_text(f"content of {name}")
    (directory / "generation_config.json").write_text('{"eos_token_id": [2, 9]}')

    pack(open_model(directory), tmp_path / "packed", format="q8")

    assert {path.name for path in (tmp_path / "packed").iterdir()} == {
        "argosy.json", "dense.bin", "experts.bin", "config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "LICENSE", "generation_config.json",
    }  # fmt: skip
    assert (tmp_path / "packed" / "chat_template.jinja").read_text() == "content of chat_template.jinja"
    assert open_model(tmp_path / "packed").config.eos_ids == (2, 9)


def test_a_licence_whose_name_no_manifest_can_hold_is_refused_first(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "source", mixtral(), seed=5)
    (directory / os.fsdecode(b"LICENCE-fran\xe7aise")).write_text("")
    with pytest.raises(CheckpointError, match=r"LICENCE-fran.udce7aise: its name is not UTF-8 text"):
        pack(open_model(directory), tmp_path / "packed", format="q8")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_float32_rounds_to_the_nearest_bf16_ties_to_even(tmp_path: Path) -> None:
    values = np.array([1.0, 1.00390625, 1.01171875, -3.14159274, 1e-40, 0.0, -0.0], np.float32)
    bits = round_to_bf16(values)
    assert bits.tolist() == [0x3F80, 0x3F80, 0x3F82, 0xC049, 0x0001, 0x0000, 0x8000]

    source, files = packed(tmp_path, mixtral(), "bf16", "F32")
    for name in ("layers.1.q", "embed"):
        wanted = round_to_bf16(np.asarray(dense_values(source, name), np.float32))
        assert dense_bytes(files.dense[name]) == wanted.tobytes()


def test_a_packed_model_can_be_packed_again_unless_it_is_quantised(tmp_path: Path) -> None:
    source, files = packed(tmp_path, qwen3_moe(), "bf16")
    pack(files, tmp_path / "again", format="q4")
    pack(source, tmp_path / "direct", format="q4")
    for name in ("dense.bin", "experts.bin"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "direct" / name).read_bytes()

    with pytest.raises(UsageError, match=r"is already q4, which is not quantised again"):
        pack(open_model(tmp_path / "again"), tmp_path / "third", format="q8")


@pytest.mark.parametrize(
    ("kind", "smaller"), [(None, ["q8", "q4"]), ("fp8 channel", ["q4"]), ("nvfp4", []), ("gptq", [])]
)
def test_formats_are_offered_only_if_they_make_a_model_smaller(
    tmp_path: Path, kind: str | None, smaller: list[str]
) -> None:
    config = qwen3_moe(hidden_size=128, moe_intermediate_size=128, num_hidden_layers=1, num_experts=2)
    if kind is None:
        write_model(tmp_path / "model", config, seed=1)
    else:
        write_kind(tmp_path / "model", config, KINDS[kind], seed=1)
    files = open_model(tmp_path / "model")
    assert smaller_formats(files) == smaller
    for format in smaller:
        pack(files, tmp_path / format, format=format)
    with pytest.raises(DoesNotFit) as caught, Engine.open(tmp_path / "model", memory="2MiB"):
        raise AssertionError
    assert ("argosy pack" in str(caught.value.hint)) == bool(smaller)


@every_format
def test_packing_in_slices_changes_no_byte(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_model(write_model(tmp_path / "source", qwen2_moe(hidden_size=72), seed=5, dtype="F32"))
    pack(source, tmp_path / "whole", format=format)
    monkeypatch.setattr(pack_conversion, "_SLICE_VALUES", 1)  # 16 rows at a time
    pack(source, tmp_path / "sliced", format=format)

    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "sliced" / path.name).read_bytes()


def test_memory_is_bounded_by_slices_and_one_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = mixtral(vocab_size=40_000, hidden_size=256, num_hidden_layers=1, tie_word_embeddings=True)
    source = open_model(write_model(tmp_path / "source", config, seed=5, dtype="F32"))
    monkeypatch.setattr(pack_conversion, "_SLICE_VALUES", 64 << 10)
    assert source.dense["embed"].nbytes > 40_000_000

    tracemalloc.start()
    pack(source, tmp_path / "packed", format="q8")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 6_000_000


def test_the_report_gives_sizes_and_seconds(tmp_path: Path) -> None:
    source = open_model(write_model(tmp_path / "source", mixtral(), seed=5))
    seen: list[tuple[str, float]] = []

    report = pack(
        source, tmp_path / "packed", format="q8", progress=lambda what, share: seen.append((what, share))
    )

    assert isinstance(report, PackReport)
    assert report.source_bytes == source.dense_bytes + source.expert_bytes
    assert report.packed_bytes == sum(path.stat().st_size for path in (tmp_path / "packed").iterdir())
    assert 0 < report.seconds < 60
    assert (report.resumed_bytes, report.restarted_because) == (0, None)
    assert [share for _, share in seen] == sorted(share for _, share in seen)
    assert seen[-1] == ("packing q8", 1.0)
    assert not (tmp_path / "packed.partial").exists()


# Refusals


@pytest.mark.parametrize("format", ["bf16", "q8", "q4"])
def test_a_weight_that_is_not_a_number_is_refused_by_name(tmp_path: Path, format: str) -> None:
    config = qwen3_moe()
    tensors = random_tensors(config, 5, "F32")
    tensors["model.layers.1.mlp.experts.3.up_proj.weight"][2, 1] = np.nan
    source = write_tensors(tmp_path / "source", config, tensors)

    with pytest.raises(
        CheckpointError, match=r"up of expert 3 in layer 1 holds a value that is not a finite number"
    ):
        pack(open_model(source), tmp_path / "packed", format=format)
    assert not (tmp_path / "packed").exists()


def test_a_weight_too_large_for_bf16_is_refused(tmp_path: Path) -> None:
    config = mixtral()
    tensors = random_tensors(config, 5, "F32")
    tensors["lm_head.weight"][0, 0] = np.finfo(np.float32).max
    source = write_tensors(tmp_path / "source", config, tensors)

    with pytest.raises(CheckpointError, match=r"lm_head.weight holds 3.40282347e\+38, too large for bf16"):
        pack(open_model(source), tmp_path / "packed", format="bf16")


def write_tensors(directory: Path, config: RawConfig, tensors: dict[str, Array]) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    write_checkpoint(directory, {name: ("F32", tensor) for name, tensor in tensors.items()})
    return directory


def test_an_unsuitable_destination_or_format_is_refused(tmp_path: Path) -> None:
    source = open_model(write_model(tmp_path / "source", mixtral(), seed=5))

    def refusal(destination: Path, format: str = "q8") -> str:
        with pytest.raises(UsageError) as caught:
            pack(source, destination, format=format)
        return str(caught.value)

    assert "unknown format 'q5'; known: bf16, q8, q4, source" in refusal(tmp_path / "packed", "q5")
    assert "exists and is not empty" in refusal(tmp_path / "source")
    (tmp_path / "file").write_text("")
    assert "exists and is not a directory" in refusal(tmp_path / "file")
    (tmp_path / "link").symlink_to("gone")
    assert "exists and is not a directory" in refusal(tmp_path / "link")
    assert "does not exist" in refusal(tmp_path / "no" / "such" / "place")
    (tmp_path / "letter").touch()
    assert f"{tmp_path / 'letter'} is not a directory" in refusal(tmp_path / "letter" / "pack")
    assert "cannot be written: File name too long" in refusal(tmp_path / ("x" * 300))
    assert "cannot be the name of a pack" in refusal(tmp_path / "a.partial")

    (tmp_path / "empty").mkdir()
    pack(source, tmp_path / "empty", format="q8")
    assert open_pack(tmp_path / "empty") is not None


def test_matrix_sizes_are_those_of_the_kernels(tmp_path: Path) -> None:
    from argosy import _native

    for format in ("f32", "f16", "bf16", "q8", "q4"):
        for rows, cols in ((1, 1), (15, 31), (16, 32), (17, 33), (40, 96)):
            expected = packed_formats.nbytes(format, rows, cols)
            assert matrix_bytes(format, rows, cols) == expected == _native.matrix_bytes(format, rows, cols)


def test_verify_reads_every_byte_of_an_intact_pack(tmp_path: Path) -> None:
    packed(tmp_path, mixtral(), "q4")
    total = sum(p.stat().st_size for p in (tmp_path / "packed").iterdir() if p.name != "argosy.json")

    report = verify_pack(tmp_path / "packed")

    assert (report.num_files, report.nbytes) == (3, total)
    assert read_checkpoint(tmp_path / "source")  # the source is untouched


# ── divided for workers ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def divided(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pack, and the same in three shards."""
    root = tmp_path_factory.mktemp("divided")
    source = open_model(write_model(root / "source", qwen3_moe(), seed=5))
    pack(source, root / "whole", format="q4")
    pack(source, root / "divided", format="q4", num_shares=3)
    return root / "whole", root / "divided"


def test_a_divided_pack_has_the_same_records_in_a_file_for_each_share(divided: tuple[Path, Path]) -> None:
    whole, parts = (open_model(path) for path in divided)
    assert parts.config == whole.config
    assert list(parts.experts) == list(whole.experts)
    ends: dict[Path, int] = {}
    for key, record in parts.experts.items():
        (piece,) = record.pieces
        assert piece.path.name == expert_file(1 + shard_of(*key) % 3, 3)
        assert piece.offset == ends.get(piece.path, 0)  # one after the other, without gaps
        ends[piece.path] = piece.offset + -(-piece.nbytes // 4096) * 4096
        for name in ("gate", "up", "down"):
            assert expert_bytes(parts, key, name) == expert_bytes(whole, key, name)
    assert {path: path.stat().st_size for path in ends} == ends
    assert verify_pack(divided[1]).num_files == verify_pack(divided[0]).num_files + 2


def test_a_part_of_a_divided_pack_is_opened_for_its_shards_and_for_no_others(
    divided: tuple[Path, Path], tmp_path: Path
) -> None:
    for name in ("argosy.json", "config.json", expert_file(2, 3)):
        (tmp_path / name).write_bytes((divided[1] / name).read_bytes())
    second = shards_of_share(2, 3)
    files = open_model(tmp_path, shards=second)
    assert files.experts.keys() == open_model(divided[1]).experts.keys()
    for shards in (ALL_SHARDS, shards_of_share(1, 3), second | shards_of_share(3, 3)):
        with pytest.raises(CheckpointError, match=r"is missing from"):
            open_model(tmp_path, shards=shards)
    for share in (1, 3):
        (tmp_path / expert_file(share, 3)).write_bytes((divided[1] / expert_file(share, 3)).read_bytes())
    with pytest.raises(CheckpointError, match=r"dense\.bin is missing"):
        open_model(tmp_path)
    (tmp_path / expert_file(2, 3)).write_bytes(b"cut")
    with pytest.raises(CheckpointError, match=r"has 3 bytes; argosy\.json says"):
        open_model(tmp_path, shards=second)


def test_a_part_needs_the_dense_file_if_experts_have_biases(tmp_path: Path) -> None:
    source = write_mxfp4_model(
        tmp_path / "source", gpt_oss(hidden_size=64, intermediate_size=32, num_local_experts=4), seed=5
    )
    pack(open_model(source), tmp_path / "packed", format="source", num_shares=2)
    (tmp_path / "packed" / expert_file(2, 2)).unlink()
    open_model(tmp_path / "packed", shards=shards_of_share(1, 2))
    (tmp_path / "packed" / "dense.bin").unlink()
    with pytest.raises(CheckpointError, match=r"dense\.bin is missing"):
        open_model(tmp_path / "packed", shards=shards_of_share(1, 2))


def test_damage_in_one_of_the_files_is_found_and_named(divided: tuple[Path, Path], tmp_path: Path) -> None:
    for path in divided[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (piece,) = open_model(tmp_path).experts[1, 3].pieces
    with piece.path.open("r+b") as file:
        file.seek(piece.offset + 5)
        file.write(b"\xff\xfe")
    with pytest.raises(CorruptRecord, match=rf"{piece.path.name}: expert 3 of layer 1 changed"):
        verify_pack(tmp_path)


@pytest.mark.parametrize("num_shares", [0, 65])
def test_a_pack_has_1_to_64_shards(num_shares: int, divided: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="1 to 64 shards"):
        pack(open_model(divided[0]), tmp_path / "packed", format="source", num_shares=num_shares)


def test_more_shards_than_experts_leave_empty_files(divided: tuple[Path, Path], tmp_path: Path) -> None:
    pack(open_model(divided[0]), tmp_path / "packed", format="source", num_shares=64)
    files = open_model(tmp_path / "packed")
    sizes = [(tmp_path / "packed" / expert_file(share, 64)).stat().st_size for share in range(1, 65)]
    assert sizes.count(0) == 64 - len({shard_of(*key) for key in files.experts})
    assert expert_bytes(files, (1, 3), "up") == expert_bytes(open_model(divided[0]), (1, 3), "up")
