"""GGUF models with their vision towers, written by llama.cpp's own converter (`tests/models/make_mmproj.py`)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

from argosy import SamplingParams, _native
from argosy.checkpoint.manifest import verify_pack
from argosy.checkpoint.pack import pack
from argosy.cli.main import main
from argosy.engine.media.prompt_media import PromptMedia
from argosy.engine.media.text_only import TextOnly
from argosy.engine.prefix import identify
from argosy.errors import ArgosyError, CheckpointError, UnsupportedModel, UsageError
from argosy.media.parts import Audio, Image
from argosy.media.patches import PictureProcessor
from argosy.media.pictures import read_picture_processor
from argosy.model.encoders.reading import find_encoders, tensor_names
from argosy.model.families import open_model
from argosy.prompt.prompt import Prompt
from tests.checkpoint.raw_gguf import ARRAY, STRING, RawGguf, entry, tensor
from tests.engine.test_seeing import GREEDY, opened, prompt_of, with_reference_pictures
from tests.models.references import difference
from tests.models.safetensors_file import read_safetensors
from tests.models.seeing import MMPROJ_PLACEHOLDERS, RATE, REFERENCE

FAMILIES = sorted(MMPROJ_PLACEHOLDERS)
PACKABLE = [one for one in FAMILIES if one != "qwen4_exp"]  # packs hold no n-gram tables
# Both files hold the same weights, but sums differ: the kernel for a patch is two matrices, or
# pairs are in another order.
LARGEST_DIFFERENCE = 1e-6


def gguf_of(family: str) -> Path:
    return REFERENCE / family / "gguf"


def log_probabilities(
    directory: Path, family: str, reference: dict[str, NDArray[Any]]
) -> tuple[dict[int, float], list[int]]:
    """The 20 best of the token after the reference's prompt, and a greedy answer, with products in float32."""
    exact = min(2, len(_native.instruction_sets())) - 1
    with opened(directory, instruction_set=_native.instruction_sets()[exact]) as engine:
        prompt = prompt_of(with_reference_pictures(engine, family), reference)
        result = engine.generate(prompt, SamplingParams(max_tokens=1, temperature=0, logprobs=20))
        assert result.logprobs is not None
        return dict(result.logprobs[0].top), engine.generate(prompt, GREEDY).token_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_model_answers_as_its_checkpoint_and_as_transformers(family: str) -> None:
    reference = read_safetensors(REFERENCE / family / "ref.safetensors")
    expected, answer = log_probabilities(REFERENCE / family, family, reference)
    found, found_answer = log_probabilities(gguf_of(family), family, reference)
    assert found.keys() == expected.keys()
    assert (
        difference(np.array(list(found.values())), np.array([expected[one] for one in found]))
        <= LARGEST_DIFFERENCE
    )
    assert found_answer == answer == reference["greedy"].tolist()


@pytest.mark.covering(1)
@pytest.mark.parametrize("family", PACKABLE)
@pytest.mark.parametrize("format", ["source", "q8"])
def test_a_pack_of_a_converted_model_sees(family: str, format: str, tmp_path: Path) -> None:
    reference = read_safetensors(REFERENCE / family / "ref.safetensors")
    files = open_model(gguf_of(family))
    pack(files, tmp_path / "pack", format=format, encoder_tensors=tensor_names(find_encoders(files)))
    rows = []
    for directory in (gguf_of(family), tmp_path / "pack"):
        with opened(directory) as engine:
            prompt = prompt_of(with_reference_pictures(engine, family), reference)
            answer = engine.generate(prompt, GREEDY).token_ids
            assert isinstance(engine.media, PromptMedia)
            rows += [one for kept in engine.media._kept._tenants.values() for one in kept.turns.values()]
    if format == "source":
        assert answer == reference["greedy"].tolist()
    half = len(rows) // 2
    assert half == len([name for name in reference if name.startswith(("picture", "sound"))])
    for expected, found in zip(rows[:half], rows[half:], strict=True):
        np.testing.assert_array_equal(found.embeddings, expected.embeddings)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_picture_is_prepared_as_by_the_processor_of_the_released_models(family: str) -> None:
    raw = json.loads((REFERENCE / family / "preprocessor_config.json").read_text())
    side = raw["patch_size"] * raw.get("merge_size", raw.get("pooling_kernel_size", 2))
    limits: dict[str, Any] = {
        # Tokens of 32 x 32 pixels: 65,536 to 16,777,216. Tokens of 28 x 28, in two frames: 12,544 to 9,633,792.
        "qwen3_vl_moe": {"size": {"shortest_edge": 64 * side**2, "longest_edge": 16_384 * side**2}},
        "qwen3_5_moe": {"size": {"shortest_edge": 64 * side**2, "longest_edge": 16_384 * side**2}},
        "qwen4_exp": {"size": {"shortest_edge": 64 * side**2, "longest_edge": 16_384 * side**2}},
        "qwen3_omni_moe": {"size": {"shortest_edge": 3136 // 16, "longest_edge": 12_845_056 // 16}},
        "glm4v_moe": {"size": {"shortest_edge": 2 * 8 * side**2, "longest_edge": 2 * 6144 * side**2}},
        "kimi_k25": {"max_patches": 16_384, "size": {"max_height": 512, "max_width": 512}},
        "minimax_m3_vl": {"size": {"shortest_edge": 4 * side**2, "longest_edge": 576 * side**2}},
        "gemma4": {"max_soft_tokens": 280},
        "llama4": {"max_patches": 16},
        "mistral3": {"size": {"longest_edge": 1540}},
        "internvl": {},
        "step3p7": {"max_image_size": 3024},
    }[family]
    expected = read_picture_processor(raw | limits, most_tokens=20_000)
    tower = find_encoders(open_model(gguf_of(family)))["picture"]
    assert not isinstance(tower, Exception)
    found = tower.processor(20_000)
    assert isinstance(found, PictureProcessor)
    assert found == expected
    np.testing.assert_array_equal(found.levels, expected.levels)


def test_pictures_are_taken_by_a_converted_model_from_end_to_end() -> None:
    reference = read_safetensors(REFERENCE / "qwen3_vl_moe" / "ref.safetensors")
    with opened(gguf_of("qwen3_vl_moe")) as engine:
        assert engine.media.kinds == ("picture",)
        one = {name: reference[name] for name in ("picture.0", "input_ids")}
        before = reference["input_ids"].tolist()
        last = before[: before.index(50) + 3]
        one["input_ids"] = np.array(last)
        prompt = prompt_of(engine, one)
        assert (
            len(prompt.token_ids or ()) == len(last) - 1 + 77
        )  # 18 x 30 pixels become 7 x 11 tokens: 64 or more
        assert len(engine.generate(prompt, GREEDY).token_ids) == 8


# ── which file is taken ─────────────────────────────────────────────────────────────────────────────────────────────


def beside(directory: Path, *names: str, family: str = "qwen3_vl_moe") -> Path:
    """A model with copies of its tower under these names."""
    shutil.copy(gguf_of(family) / "model.gguf", directory)
    for name in names:
        shutil.copy(gguf_of(family) / "mmproj-model.gguf", directory / name)
    return directory / "model.gguf"


def fault_of(model: Path) -> ArgosyError:
    """Why the model takes no pictures; its text runs."""
    with opened(model) as engine:
        assert engine.media.kinds == ()
        assert len(engine.generate(Prompt.of([3, 5, 6]), GREEDY).token_ids) == 8
        assert isinstance(engine.media, PromptMedia)
        with pytest.raises(ArgosyError) as caught:
            engine.media.read(Image(np.zeros((8, 8, 3), np.uint8)))
    return caught.value


def test_of_several_towers_none_is_taken_until_one_is_named(tmp_path: Path) -> None:
    model = beside(tmp_path, "mmproj-BF16.gguf", "mmproj-F32.gguf")
    fault = fault_of(model)
    assert "holds 2 files that may have the vision tower" in fault.message
    assert f"--mmproj {tmp_path / 'mmproj-BF16.gguf'}" in (fault.hint or "")
    with opened(model, mmproj=tmp_path / "mmproj-F32.gguf") as engine:
        assert engine.media.kinds == ("picture",)


def test_a_model_alone_takes_text(tmp_path: Path) -> None:
    model = beside(tmp_path)
    with opened(model) as engine:
        assert isinstance(engine.media, TextOnly)
    with opened(model, mmproj=gguf_of("qwen3_vl_moe") / "mmproj-model.gguf") as engine:
        assert engine.media.kinds == ("picture",)


def test_a_model_in_a_directory_that_cannot_be_listed_takes_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = beside(tmp_path, "mmproj.gguf")

    def refuse(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert open_model(model).mmproj is None


def test_a_tower_is_named_only_for_gguf_models() -> None:
    with pytest.raises(
        UsageError, match=r"is not a GGUF model, so its vision tower is not in a file of its own"
    ):
        opened(REFERENCE / "qwen3_vl_moe", mmproj=gguf_of("qwen3_vl_moe") / "mmproj-model.gguf")


def test_the_tower_of_another_model_is_named(tmp_path: Path) -> None:
    model = beside(tmp_path, family="glm4v_moe")
    shutil.copy(gguf_of("qwen3_vl_moe") / "mmproj-model.gguf", tmp_path)
    assert "a tower of type qwen3vl_merger for pictures, and the model beside it is a glm4_moe" in str(
        fault_of(model)
    )
    with pytest.raises(UnsupportedModel, match="this tower belongs to: qwen3_vl_moe, qwen3_5_moe_text"):
        opened(model, mmproj=tmp_path / "mmproj-model.gguf")


def test_a_tower_for_another_size_of_model_is_named(tmp_path: Path) -> None:
    model = beside(tmp_path, family="qwen3_5_moe")
    shutil.copy(gguf_of("qwen3_vl_moe") / "mmproj-model.gguf", tmp_path)
    assert "makes rows of 36 values for pictures, and the model beside it has a hidden size of 28" in str(
        fault_of(model)
    )


def test_a_model_is_no_tower(tmp_path: Path) -> None:
    model = beside(tmp_path)
    with pytest.raises(
        UnsupportedModel, match="has architecture 'qwen3vlmoe'; a file with a vision tower has 'clip'"
    ):
        opened(model, mmproj=model)


# ── files that say something else ───────────────────────────────────────────────────────────────────────────────────


Changed = tuple[list[int], int, int]  # sizes, columns first, type and bytes of a tensor


def rewritten(
    model: Path,
    changes: dict[str, bytes | None],
    tensors: dict[str, Changed | None],
    family: str = "qwen3_vl_moe",
    contents: Mapping[str, bytes] = MappingProxyType({}),
) -> Path:
    """Write the tower beside a model with other entries, tensors and contents of tensors, or without them."""
    source = GGUFReader(gguf_of(family) / "mmproj-model.gguf")
    entries = {
        name: b"".join(bytes(part) for part in each.parts)
        for name, each in source.fields.items()
        if not name.startswith("GGUF.")
    }
    listed: list[bytes] = []
    data = bytearray()
    for one in source.tensors:
        sizes, kind, values = [int(size) for size in one.shape], int(one.tensor_type), one.data.tobytes()
        values = contents.get(one.name, values)
        if (changed := tensors.get(one.name, (sizes, kind, len(values)))) is None:
            continue
        listed.append(tensor(one.name, changed[0], changed[1], len(data)))
        data += values[: changed[2]].ljust(changed[2] + -changed[2] % 32, b"\0")
    for name, added in tensors.items():
        if added is not None and all(one.name != name for one in source.tensors):
            listed.append(tensor(name, added[0], added[1], len(data)))
            data += bytes(added[2] + -added[2] % 32)
    metadata = [value for value in (entries | changes).values() if value is not None]
    return RawGguf(metadata, listed, bytes(data)).write(model.with_name("mmproj.gguf"))


FAULTS: dict[str, tuple[dict[str, bytes | None], dict[str, Changed | None], str]] = {
    "another projector": (
        {"clip.projector_type": entry("clip.projector_type", STRING, "gemma3")},
        {},
        "asks for clip.projector_type gemma3; supported: qwen3vl_merger, glm4v, gemma4v",
    ),
    "no towers": (
        {"clip.has_vision_encoder": entry("clip.has_vision_encoder", 7, False)},
        {},
        "has neither clip.has_vision_encoder nor clip.has_audio_encoder",
    ),
    "no projector": ({"clip.projector_type": None}, {}, "has no key clip.projector_type"),
    "an unknown key": (
        {"clip.vision.extra": entry("clip.vision.extra", 4, 1)},
        {},
        "sets clip.vision.extra to '1', but clip does not know this key",
    ),
    "no size": ({"clip.vision.embedding_length": None}, {}, "has no key clip.vision.embedding_length"),
    "a patch of nothing": (
        {"clip.vision.patch_size": entry("clip.vision.patch_size", 4, 0)},
        {},
        "clip.vision.patch_size is '0', expected a whole number from 1 to 256",
    ),
    "a size that no tensor has": (
        {"clip.vision.embedding_length": entry("clip.vision.embedding_length", 4, 2**31 - 4)},
        {},
        "hidden_size",
    ),
    "more layers than anything has": (
        {"clip.vision.block_count": entry("clip.vision.block_count", 4, 5000)},
        {},
        "clip.vision.block_count is '5000', expected a whole number from 1 to 4096",
    ),
    "flags for other layers": (
        {
            "clip.vision.is_deepstack_layers": entry(
                "clip.vision.is_deepstack_layers", ARRAY, (7, [True] * 70_000)
            )
        },
        {},
        "clip.vision.is_deepstack_layers is an array of 70000, expected true or false for each of 4 layers",
    ),
    "too many colours": (
        {"clip.vision.image_mean": entry("clip.vision.image_mean", ARRAY, (6, [0.5] * 70_000))},
        {},
        "clip.vision.image_mean is an array of 70000, expected an array of three numbers",
    ),
    "no colours": ({"clip.vision.image_std": None}, {}, "has no key clip.vision.image_std"),
    "a colour that is not a number": (
        {"clip.vision.image_std": entry("clip.vision.image_std", ARRAY, (6, [0.5, float("nan"), 0.5]))},
        {},
        "image_std is",
    ),
    "a quantised matrix": (
        {},
        {"mm.2.weight": ([96, 36], 2, 36 * 3 * 18)},
        "mm.2.weight is Q4_0; supported: F32, F16, BF16, Q8_0",
    ),
    "a quantised bias": (
        {},
        {"mm.0.bias": ([96], 8, 3 * 34)},
        "mm.0.bias is Q8_0, and a norm, a bias or a convolution is not quantised",
    ),
    "a missing tensor": ({}, {"v.post_ln.bias": None}, "v.post_ln.bias is missing from the 75 tensors"),
    "an extra tensor": (
        {},
        {"v.extra.bias": ([24], 0, 96)},
        "v.extra.bias [24]: a qwen3_vl_moe model with the tower that mmproj.gguf describes for pictures has no such",
    ),
    "another shape": (
        {},
        {"v.post_ln.bias": ([4, 6], 0, 96)},
        "v.post_ln.bias is [6, 4], expected [24]",
    ),
}


def quantised(model: Path, family: str, name: str, *, as_floats: bool) -> tuple[Path, int]:
    """Write the tower beside a model with blocks in place of its matrices, where rows are whole blocks, as
    llama.cpp's programs do; or with the values of these blocks. Returns the number of these matrices."""
    source = GGUFReader(gguf_of(family) / "mmproj-model.gguf")
    values: dict[str, bytes] = {}
    changed: dict[str, Changed | None] = {}
    for one in source.tensors:
        sizes = [int(size) for size in one.shape]
        if len(sizes) != 2 or sizes[0] % 32:
            continue
        blocks = quantize(dequantize(one.data, one.tensor_type), GGMLQuantizationType.Q8_0)
        made = dequantize(blocks, GGMLQuantizationType.Q8_0).astype(np.float32) if as_floats else blocks
        values[one.name] = made.tobytes()
        kind = GGMLQuantizationType.F32 if as_floats else GGMLQuantizationType.Q8_0
        changed[one.name] = (sizes, int(kind), made.nbytes)
    return rewritten(model, {}, changed, family, values).rename(model.with_name(name)), len(changed)


@pytest.mark.parametrize(
    "family",
    [
        name
        for name in PACKABLE
        if name not in ("glm4v_moe", "minimax_m3_vl", "gemma4", "mistral3", "internvl", "step3p7")
    ],
)  # their rows are no blocks
def test_a_tower_in_blocks_sees_what_the_values_of_its_blocks_see(family: str, tmp_path: Path) -> None:
    reference = read_safetensors(REFERENCE / family / "ref.safetensors")
    model = beside(tmp_path, family=family)
    towers = [
        quantised(model, family, f"mmproj-{kind}.gguf", as_floats=kind == "F32") for kind in ("F32", "Q8_0")
    ]
    assert towers[0][1] == towers[1][1] > 1
    rows, plans = [], []
    packed = tmp_path / "pack"
    for path, mmproj in ((model, towers[0][0]), (model, towers[1][0]), (packed, None)):
        if path == packed:
            files = open_model(model, mmproj=towers[1][0])
            pack(files, packed, format="source", encoder_tensors=tensor_names(find_encoders(files)))
            verify_pack(packed)
        with opened(path, **({} if mmproj is None else {"mmproj": mmproj})) as engine:
            prompt = prompt_of(with_reference_pictures(engine, family), reference)
            engine.generate(prompt, GREEDY)
            assert isinstance(engine.media, PromptMedia)
            rows.append([one for kept in engine.media._kept._tenants.values() for one in kept.turns.values()])
            plans.append(engine.plan.encoder_bytes)
    for expected, *others in zip(*rows, strict=True):
        for found in others:
            np.testing.assert_array_equal(found.embeddings, expected.embeddings)
    assert plans[0] <= plans[1] <= plans[0] + (1 << 20)


def test_a_block_whose_scale_is_not_a_number_is_found_when_the_tower_is_read(tmp_path: Path) -> None:
    model = beside(tmp_path)
    nan = (np.float16("nan").tobytes() + bytes(32)) * 36 * 3
    rewritten(model, {}, {"mm.2.weight": ([96, 36], 8, len(nan))}, contents={"mm.2.weight": nan})
    reference = read_safetensors(REFERENCE / "qwen3_vl_moe" / "ref.safetensors")
    with opened(model) as engine:
        prompt = prompt_of(with_reference_pictures(engine, "qwen3_vl_moe"), reference)
        with pytest.raises(CheckpointError, match=r"mm\.2\.weight"):
            engine.generate(prompt, GREEDY)
        assert len(engine.generate(Prompt.of([3, 5, 6]), GREEDY).token_ids) == 8


@pytest.mark.parametrize("what", FAULTS)
def test_a_tower_that_says_something_else_is_refused_and_text_runs(what: str, tmp_path: Path) -> None:
    changes, tensors, message = FAULTS[what]
    model = beside(tmp_path)
    rewritten(model, changes, tensors)
    assert message in str(fault_of(model))


def test_a_rewritten_tower_is_whole(tmp_path: Path) -> None:
    model = beside(tmp_path)
    rewritten(model, {}, {})
    with opened(model) as engine:
        assert engine.media.kinds == ("picture",)


def test_a_tower_for_sound_that_is_not_supported_keeps_no_picture_from_being_seen(tmp_path: Path) -> None:
    model = beside(tmp_path, family="qwen3_omni_moe")
    key = "clip.audio.projector_type"
    rewritten(model, {key: entry(key, STRING, "ultravox")}, {}, "qwen3_omni_moe")
    with opened(model) as engine:
        assert engine.media.kinds == ("picture",)
        assert isinstance(engine.media, PromptMedia)
        with pytest.raises(UnsupportedModel, match=r"clip.audio.projector_type ultravox; supported: qwen3a"):
            engine.media.read(Audio(np.zeros(1600, np.float32), rate=RATE))


def test_a_cut_tower_is_refused_at_every_length_and_text_runs(tmp_path: Path) -> None:
    model = beside(tmp_path, "mmproj.gguf")
    whole = (tmp_path / "mmproj.gguf").read_bytes()
    for length in (0, 3, 24, 100, 1000, len(whole) // 2, len(whole) - 64):
        (tmp_path / "mmproj.gguf").write_bytes(whole[:length])
        files = open_model(model)
        found = find_encoders(files)["picture"]
        assert isinstance(found, CheckpointError)
        assert files.others == {}
    (tmp_path / "mmproj.gguf").unlink()
    (tmp_path / "mmproj.gguf").symlink_to("/dev/zero")
    assert "is not a regular file" in str(fault_of(model))


def test_a_model_without_the_placeholder_of_pictures_says_so(tmp_path: Path) -> None:
    model = beside(tmp_path, "mmproj.gguf")
    model.write_bytes(model.read_bytes().replace(b"<|image_pad|>", b"<|other_pad|>"))
    assert "has no token <|image_pad|>, which stands for a picture" in str(fault_of(model))


# ── prefixes on the drive ───────────────────────────────────────────────────────────────────────────────────────────


def test_prefixes_on_the_drive_belong_to_one_tower(tmp_path: Path) -> None:
    model = beside(tmp_path, "mmproj.gguf")
    before = identify(open_model(model), "plain")
    assert identify(open_model(model), "plain") == before
    os.utime(tmp_path / "mmproj.gguf", (1, 1))
    assert identify(open_model(model), "plain") != before


def test_prefixes_on_the_drive_belong_to_one_processor(tmp_path: Path) -> None:
    shutil.copytree(REFERENCE / "glm4v_moe", tmp_path / "model")
    before = identify(open_model(tmp_path / "model"), "plain")
    os.utime(tmp_path / "model" / "preprocessor_config.json", (1, 1))
    assert identify(open_model(tmp_path / "model"), "plain") != before


# ── on the command line ─────────────────────────────────────────────────────────────────────────────────────────────


def test_show_and_pack_take_the_tower_that_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    model = beside(tmp_path / "model")
    tower = str(gguf_of("qwen3_vl_moe") / "mmproj-model.gguf")
    assert main(["show", str(model), "--memory", "3GiB"]) == 0
    assert "pictures" not in capsys.readouterr().out
    assert main(["show", str(model), "--memory", "3GiB", "--mmproj", tower]) == 0
    assert (
        "  pictures      72.7 k parameters of their encoder, 152 KiB in f32+bf16" in capsys.readouterr().out
    )
    packed = tmp_path / "pack"
    assert main(["pack", str(model), str(packed), "--format", "bf16", "--mmproj", tower]) == 0
    capsys.readouterr()
    assert main(["show", str(packed), "--memory", "3GiB"]) == 0
    assert "  pictures      72.7 k parameters of their encoder" in capsys.readouterr().out
    assert main(["show", str(model), "--mmproj", str(model)]) == 4
    assert "has architecture 'qwen3vlmoe'" in capsys.readouterr().err
