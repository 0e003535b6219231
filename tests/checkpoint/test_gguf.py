"""The GGUF reader finds everything in a file, and trusts nothing in it."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import gguf
import numpy as np
import pytest

from argosy.checkpoint.block_types import BLOCK_SIZES, SLOT_FORMATS
from argosy.checkpoint.gguf import GgufArray, metadata_only, read_gguf
from argosy.checkpoint.gguf_names import find_gguf
from argosy.checkpoint.landing import in_halves, read_values
from argosy.checkpoint.safetensors import TensorRef
from argosy.config import MEASURED_FORMATS
from argosy.errors import CheckpointError, UnsupportedModel
from tests.checkpoint.raw_gguf import ARRAY, STRING, RawGguf, entry, tensor, text
from tests.models.gguf_models import BLOCK_TYPES, TYPES, add, in_pairs, to_blocks
from tests.native.gguf_blocks import WITHOUT_PACKAGE


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def test_every_key_and_tensor_is_found(path: Path) -> None:
    raw = RawGguf()
    file = read_gguf(raw.write(path))
    start = len(raw.to_bytes()) - len(raw.data)

    assert file.text("general.architecture") == "qwen3moe"
    assert file.integer("a.count") == 7
    assert file.number("a.rate") == 1e-5  # not the nearest float32
    assert file.flag("a.is_on", default=False) is True
    assert file.texts("a.words") == ["one", "", "drei €"]
    assert file.numbers("a.numbers") == [1, -2, 3]
    flags = file.metadata["a.flags"]
    assert isinstance(flags, GgufArray)
    assert flags.values() == [True, False]
    assert list(file.tensors.values()) == [
        TensorRef("x", path, start, 32, "F32", (2, 4)),
        TensorRef("y", path, start + 32, 12, "F32", (3,)),
        TensorRef("z", path, start + 64, 68, "Q8_0", (2, 32)),
    ]


def test_a_key_that_is_missing_or_of_the_wrong_type_is_named(path: Path) -> None:
    file = read_gguf(RawGguf().write(path))
    with pytest.raises(CheckpointError, match=r"model\.gguf has no key a\.size"):
        file.integer("a.size")
    with pytest.raises(
        CheckpointError, match=r"a\.words is an array of 3, expected a whole number from 0 to"
    ):
        file.integer("a.words")
    with pytest.raises(CheckpointError, match=r"a\.is_on is 'True', expected a number above zero"):
        file.number("a.is_on")
    for extreme in (1e39, 1e-46, float("inf"), float("nan")):  # nothing that float32 holds
        with pytest.raises(CheckpointError, match=r"a\.scale is '.*', expected a number above zero"):
            replace(file, metadata={"a.scale": extreme}).number("a.scale")
    with pytest.raises(CheckpointError, match=r"a\.count is '7', expected an array of strings"):
        file.texts("a.count")


def test_tensors_may_be_in_any_order_and_version_2_is_read_too(path: Path) -> None:
    raw = RawGguf(version=2)
    raw.tensors.reverse()
    assert read_gguf(raw.write(path)).tensors["x"].shape == (2, 4)


def test_the_last_tensor_may_be_padded_and_the_alignment_may_differ(path: Path) -> None:
    raw = RawGguf()
    raw.data += bytes(28)
    assert len(read_gguf(raw.write(path)).tensors) == 3
    raw = RawGguf(
        metadata=[entry("general.alignment", 4, 64)],
        tensors=[tensor("x", [4, 2], 0, 0), tensor("y", [3], 0, 64)],
        data=bytes(76),
        alignment=64,
    )
    assert read_gguf(raw.write(path)).tensors["y"].offset % 64 == 0


def test_a_file_of_metadata_only_has_the_same_metadata(path: Path, tmp_path: Path) -> None:
    file = read_gguf(RawGguf().write(path))
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(metadata_only(path))
    again = read_gguf(copy)
    assert again.tensors == {}
    assert list(again.metadata) == list(file.metadata)
    assert copy.read_bytes()[24:] in path.read_bytes()
    assert metadata_only(copy) == copy.read_bytes()
    assert again.texts("a.words") == file.texts("a.words")


def array(item_kind: int, num_items: int, *first: int) -> bytes:
    """An array under the key `a` that claims `num_items` items, and the bytes that follow."""
    return text("a") + struct.pack(f"<IIQ{len(first)}Q", ARRAY, item_kind, num_items, *first)


LIES = {
    "starts with 'GGML'; a GGUF file starts with 'GGUF'": RawGguf(magic=b"GGML"),
    "claims 1099511627776 metadata entries, but the": RawGguf(num_entries=2**40),
    "claims 1099511627776 tensors, but the": RawGguf(num_tensors=2**40),
    "the key a is given twice": RawGguf(metadata=[entry("a", 4, 1), entry("a", 4, 1)]),
    "metadata entry 0 has an empty key": RawGguf(metadata=[entry("", 4, 1), entry("a.long.key", 10, 1)]),
    "a is a bool with value 2, expected 0 or 1": RawGguf(metadata=[text("a") + b"\7\0\0\0\2"]),
    "a has the unknown type 13": RawGguf(metadata=[text("a") + struct.pack("<IQ", 13, 0)]),
    "a is an array of arrays": RawGguf(metadata=[array(ARRAY, 0)]),
    "the items of a have the unknown type 99": RawGguf(metadata=[array(99, 0)]),
    "a claims 4611686018427387904 items of uint64": RawGguf(metadata=[array(10, 2**62)]),
    "a claims 4611686018427387904 items of string": RawGguf(metadata=[array(STRING, 2**62)]),
    "inside its header: a would end at byte": RawGguf(metadata=[array(STRING, 1, 2**63)]),
    "inside its header: the key of metadata entry 0 would end": RawGguf(metadata=[struct.pack("<Q", 60_000)]),
    "the key of metadata entry 0 has 70000 bytes; at most 65535": RawGguf(metadata=[entry("a" * 70_000, 4, 1)]),
    "the key of metadata entry 0 is not UTF-8 text: byte 1": RawGguf(metadata=[entry(b"a\xff", 4, 1)]),
    "general.alignment is 24, expected a power of two from 8": RawGguf(metadata=[entry("general.alignment", 4, 24)]),
    "general.alignment is 0, expected": RawGguf(metadata=[entry("general.alignment", 4, 0)]),
    "the name of a tensor has 65 bytes; at most 64": RawGguf(tensors=[tensor("x" * 65, [4], 0, 0)]),
    "a tensor has an empty name": RawGguf(tensors=[tensor("", [4], 0, 0)]),
    "x has 5 dimensions; at most 4": RawGguf(tensors=[tensor("x", [1] * 5, 0, 0)]),
    "x has rows of 33 values, but Q8_0 stores blocks of 32": RawGguf(tensors=[tensor("x", [33], 8, 0)]),
    "x is F32 [4294967296, 4294967296], more than": RawGguf(tensors=[tensor("x", [2**32, 2**32], 0, 0)]),
    "the tensor x is listed twice": RawGguf(tensors=[tensor("x", [8], 0, 0), tensor("x", [8], 0, 32)]),
    "y overlaps x: it starts at byte": RawGguf(tensors=[tensor("x", [16], 0, 0), tensor("y", [8], 0, 32)]),
    "y leaves a hole after x": RawGguf(tensors=[tensor("x", [8], 0, 0), tensor("y", [8], 0, 64)]),
    "x leaves a hole after the header": RawGguf(tensors=[tensor("x", [8], 0, 32)]),
    "x starts 8 bytes into the data, expected a multiple of 32": RawGguf(tensors=[tensor("x", [8], 0, 8)]),
    "x ends at byte": RawGguf(tensors=[tensor("x", [8, 1000], 0, 0)]),
    "but its tensors end at byte": RawGguf(tensors=[tensor("x", [8], 0, 0)]),
    "but no tensor follows its header": RawGguf(tensors=[]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("lie", "hint"),
    [
        (RawGguf(magic=b"vers"), "git lfs pull"),
        (RawGguf(num_tensors=2**40), "the download may be incomplete"),
        (RawGguf(num_entries=2**40), "the download may be incomplete"),
    ],
)
def test_a_file_that_is_not_all_there_has_a_hint_how_to_get_it(
    tmp_path: Path, lie: RawGguf, hint: str
) -> None:
    with pytest.raises(CheckpointError) as raised:
        read_gguf(lie.write(tmp_path / "x.gguf"))
    assert hint in (raised.value.hint or "")


@pytest.mark.parametrize("sentence", LIES)
def test_a_false_claim_is_refused_by_name(sentence: str, path: Path) -> None:
    with pytest.raises(CheckpointError) as refusal:
        read_gguf(LIES[sentence].write(path))
    assert sentence in refusal.value.message
    assert refusal.value.message.startswith("model.gguf")


def test_another_byte_order_or_version_is_refused_with_a_hint(path: Path) -> None:
    big = b"GGUF" + struct.pack(">IQQ", 3, 1, 1) + bytes(100)
    path.write_bytes(big)
    with pytest.raises(
        UnsupportedModel, match=r"is a big-endian GGUF file; supported: little-endian\n?.*hint"
    ):
        read_gguf(path)
    with pytest.raises(UnsupportedModel, match="is GGUF version 1; supported: 2, 3"):
        read_gguf(RawGguf(version=1).write(path))


def write_parts(directory: Path, stem: str = "model", *, changed: Mapping[int, RawGguf | None] = {}) -> Path:
    """Write a model of five tensors in three parts, the first with the metadata; return the path of the first."""
    tensors = (["a"], ["b", "c"], ["d", "e"])
    for number, names in enumerate(tensors):
        raw = RawGguf(
            metadata=[*split(number), *([entry("a.count", 4, 7)] if number == 0 else [])],
            tensors=[tensor(name, [8], 0, 32 * at) for at, name in enumerate(names)],
            data=bytes([number]) * 32 * len(names),
        )
        raw = changed.get(number, raw)
        if raw is not None:
            raw.write(directory / f"{stem}-{number + 1:05}-of-00003.gguf")
    return directory / f"{stem}-00001-of-00003.gguf"


def split(number: int, count: int = 3, num_tensors: int = 5) -> list[bytes]:
    return [
        entry("split.no", 2, number),
        entry("split.count", 2, count),
        entry("split.tensors.count", 5, num_tensors),
    ]


def test_parts_are_read_as_one_model(tmp_path: Path) -> None:
    first = write_parts(tmp_path)
    file = read_gguf(first)
    assert file.path == first
    assert list(file.tensors) == ["a", "b", "c", "d", "e"]
    assert [int(ref.path.name[6:11]) for ref in file.tensors.values()] == [1, 2, 2, 3, 3]
    assert [read_values(ref).tobytes()[0] for ref in file.tensors.values()] == [0, 1, 1, 2, 2]
    assert file.metadata == {"a.count": 7}
    copy = tmp_path / "metadata.gguf"  # read without its parts
    copy.write_bytes(metadata_only(first))
    assert read_gguf(copy).metadata == {"a.count": 7}


def of_one_tensor(name: str, metadata: list[bytes]) -> RawGguf:
    return RawGguf(metadata=metadata, tensors=[tensor(name, [8], 0, 0)], data=bytes(32))


WRONG_PARTS = {
    "model-00002-of-00003.gguf is missing from": {1: None},
    "model-00003-of-00003.gguf is part 2 of 3 of a model with 5 tensors, expected part 3 of 3": {
        2: of_one_tensor("d", split(1))
    },
    "model-00003-of-00003.gguf is part 3 of 4 of a model with 5 tensors, expected part 3 of 3": {
        2: of_one_tensor("d", split(2, count=4))
    },
    "model-00002-of-00003.gguf is part 2 of 3 of a model with 9 tensors, expected part 2 of 3 of a model with 5": {
        1: of_one_tensor("b", split(1, num_tensors=9))
    },
    "model-00002-of-00003.gguf is not part of a split model, expected part 2": {1: of_one_tensor("b", [])},
    "model-00002-of-00003.gguf: a.count is '8', but in model-00001-of-00003.gguf it is '7'": {
        1: of_one_tensor("b", [*split(1), entry("a.count", 4, 8)])
    },
    "model-00002-of-00003.gguf lists a, which model-00001-of-00003.gguf already contains": {
        1: of_one_tensor("a", split(1))
    },
    "the 3 parts of model-00001-of-00003.gguf hold 4 tensors, expected 5": {1: of_one_tensor("b", split(1))},
    "split.count is -3, expected a whole number of 0 or more": {
        0: of_one_tensor("a", [entry("split.count", 5, -3)])
    },
}  # fmt: skip


@pytest.mark.parametrize("sentence", WRONG_PARTS)
def test_a_part_that_is_missing_or_from_another_model_is_named(sentence: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as refusal:
        read_gguf(write_parts(tmp_path, changed=WRONG_PARTS[sentence]))
    assert sentence in refusal.value.message


def test_a_later_or_renamed_part_is_refused_with_a_hint(tmp_path: Path) -> None:
    first = write_parts(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"part 2 of 3 of a model with 5 tensors; .*\n?.*00001-of-00003"
    ):
        read_gguf(first.with_name("model-00002-of-00003.gguf"))
    renamed = first.rename(tmp_path / "model.gguf")
    with pytest.raises(
        CheckpointError, match=r"model.gguf is part 1 of 3 .* not end in -00001-of-00003.gguf"
    ):
        read_gguf(renamed)


def test_parts_in_a_directory_count_as_one_model(tmp_path: Path) -> None:
    assert find_gguf(tmp_path) is None
    first = write_parts(tmp_path)
    for name in ("mmproj-F16.gguf", "imatrix_unsloth.gguf", "model.imatrix.gguf"):
        (tmp_path / name).touch()
    assert find_gguf(tmp_path) == first
    first.unlink()
    with pytest.raises(CheckpointError, match=r"model-00001-of-00003\.gguf is missing from"):
        read_gguf(find_gguf(tmp_path))
    write_parts(tmp_path, "other")
    with pytest.raises(
        CheckpointError, match=r"holds 2 models as \.gguf files: model-00001-of-00003\.gguf, other-"
    ):
        find_gguf(tmp_path)


def test_a_large_vocabulary_is_skipped_and_a_huge_file_is_not_read(path: Path) -> None:
    """The file is sparse, of 10 GB. Only its header is read, and its long arrays of strings are not decoded."""
    tokens = [f"token{at}" for at in range(100_000)]
    raw = RawGguf(
        metadata=[entry("tokenizer.ggml.tokens", ARRAY, (STRING, tokens))],
        tensors=[tensor("x", [2_500_000, 1000], 0, 0)],
        data=b"",
    )
    raw.write(path)
    with path.open("r+b") as file:
        file.truncate(len(raw.to_bytes()) + 10_000_000_000)
    started = perf_counter()
    found = read_gguf(path)
    seconds = perf_counter() - started
    assert found.tensors["x"].nbytes == 10_000_000_000
    assert found.texts("tokenizer.ggml.tokens")[99_999] == "token99999"
    assert seconds < 2  # about 30 ms on a quiet machine; reading the file would take seconds


def test_block_sizes_are_those_of_the_gguf_package() -> None:
    for name, (values, nbytes) in BLOCK_SIZES.items():
        # Q8_1: two float16 in ggml, which the package counts as float32. The package has no others.
        if name not in ("Q8_1", *WITHOUT_PACKAGE):
            assert (values, nbytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]], name


@pytest.mark.parametrize("type_name", TYPES)
def test_values_equal_those_the_gguf_package_or_an_independent_decoder_reads(
    type_name: str, path: Path
) -> None:
    rng = np.random.default_rng(7)
    blocks, expected = to_blocks(rng.standard_normal((19, 512), np.float32), type_name, rng)
    writer = gguf.GGUFWriter(path, "any")
    add(writer, "x", blocks, type_name)
    add(writer, "y", np.arange(8, dtype=np.float32), "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors = read_gguf(path).tensors
    np.testing.assert_array_equal(read_values(tensors["x"]), expected.reshape(19, 512))
    np.testing.assert_array_equal(read_values(tensors["y"]), np.arange(8))


def test_values_of_a_type_without_a_kernel_are_refused_by_name(path: Path) -> None:
    file = read_gguf(RawGguf(tensors=[tensor("x", [256], 15, 0)], data=bytes(292)).write(path))
    with pytest.raises(UnsupportedModel, match="x is Q8_K; supported: F32, F16, BF16, Q8_0"):
        read_values(file.tensors["x"])


@pytest.mark.parametrize(
    ("kind", "said"), [(4, "4"), (512, "512"), (146, "IQ4_KSS (146), one of ik_llama.cpp's own")]
)
def test_an_unknown_type_is_refused_with_the_supported_types(kind: int, said: str, path: Path) -> None:
    with pytest.raises(UnsupportedModel) as refusal:
        read_gguf(RawGguf(tensors=[tensor("x", [256], kind, 0)], data=bytes(110)).write(path))
    sentence, _, hint = str(refusal.value).partition("\nhint: ")
    before, _, supported = sentence.partition("; supported: ")
    assert before == f"{path.name}: x has type {said}"
    assert set(supported.split(", ")) == set(TYPES)
    assert hint.startswith("get a file of the model named Q4_K_M, ")


def test_a_trellis_type_is_refused_with_the_reason(path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="IQ2_KT \\(153\\)") as refusal:
        read_gguf(RawGguf(tensors=[tensor("x", [256], 153, 0)], data=bytes(110)).write(path))
    assert "hint: KT types compute every weight from a hash, which is slow on a CPU; get " in str(
        refusal.value
    )


def test_slot_formats_include_every_block_type_of_the_tests() -> None:
    assert set(SLOT_FORMATS) == set(BLOCK_TYPES)


def test_the_page_of_formats_has_each_format_and_no_other() -> None:
    page = (Path(__file__).parents[2] / "docs" / "internals" / "formats.md").read_text()
    rows = (line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    grouped = {name for name in named if re.fullmatch(r"(u?int|affine)\d_\d+_b?f16(_act_order)?", name)}
    assert named - grouped == set(MEASURED_FORMATS)


def test_paired_rows_are_restored_to_halves() -> None:
    rows = np.arange(24 * 3).reshape(24, 3)
    np.testing.assert_array_equal(in_halves(in_pairs(rows, 4), 4), rows)
    assert in_halves(np.arange(8).reshape(8, 1), 2).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
