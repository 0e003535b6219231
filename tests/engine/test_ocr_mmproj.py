"""DeepSeek-OCR and DeepSeek-OCR-2 from GGUF, with towers as llama.cpp's converter writes them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy import _native
from argosy.checkpoint.gguf import read_gguf
from argosy.checkpoint.pack import pack
from argosy.cli.main import main
from argosy.engine.media.prompt_media import PromptMedia
from argosy.errors import ArgosyError
from argosy.media.parts import Image, RequestMedia
from argosy.media.pictures import read_picture_processor
from argosy.model.encoders.mmproj import TowerInFile, read_towers
from argosy.model.encoders.reading import EncoderFiles, find_encoders, tensor_names
from argosy.model.encoders.table import ENCODERS
from argosy.model.families import FAMILIES, open_model
from argosy.model.reading.config_reader import ConfigReader
from argosy.prompt.media_span import MediaSpan
from argosy.prompt.prompt import Prompt
from tests.checkpoint.raw_gguf import STRING
from tests.engine.test_seeing import GREEDY, opened
from tests.families.published_ocr import DEEPSEEK_OCR, DEEPSEEK_OCR_2
from tests.media.samples import pattern
from tests.models.gguf_models import one_type, write_gguf_model
from tests.models.ocr_mmproj import PLACEHOLDER, PROJECTORS, add_tower, config_of, read_record, write_mmproj
from tests.models.tiny import RawConfig

VISION = "clip.vision."
IMAGE_TOKENS = 700
# DeepSeek-OCR-2 has queries for tiles, which are smaller than this picture.
PICTURE = {"deepseekocr": (300, 500), "deepseekocr2": (800, 400)}
NUM_ROWS = {"deepseekocr": 16 * 17 + 1, "deepseekocr2": 2 * 12**2 + 16**2 + 1}
# Weights are the same, but convolutions are float32 in the file, for which a kernel may add in another order.
LARGEST_DIFFERENCE = 1e-6


@dataclass(frozen=True)
class Text:
    """The text part as GGUF, and a checkpoint with the same weights."""

    model: Path
    checkpoint: Path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    tokens = [f"token {number}" for number in range(64)]
    tokens[PLACEHOLDER] = "<image>"
    model = tmp_path_factory.mktemp("ocr") / "model.gguf"
    metadata: dict[str, int | list[str]] = {"tokenizer.ggml.tokens": tokens}
    config = config_of("deepseekocr2")  # its text part is that of both
    return Text(model, write_gguf_model(model, config, one_type("F32"), seed=3, metadata=metadata))


def beside(text: Text, directory: Path) -> Path:
    """A copy of the model, for towers beside it."""
    return Path(shutil.copy(text.model, directory))


def tower_in(path: Path) -> EncoderFiles:
    found = find_encoders(open_model(path))["picture"]
    assert isinstance(found, EncoderFiles), found
    return found


def towers(projector: str, text: Text, directory: Path) -> tuple[EncoderFiles, EncoderFiles]:
    """Give both forms of the text part the same tower, and return it."""
    model = beside(text, directory)
    write_mmproj(directory / "mmproj.gguf", projector)
    shutil.copytree(text.checkpoint, directory / "checkpoint")
    add_tower(directory / "checkpoint", projector)
    return tower_in(model), tower_in(directory / "checkpoint")


def seen(path: Path, projector: str) -> tuple[Any, list[int]]:
    """The rows of a picture and the answer to it, with products in float32."""
    exact = _native.instruction_sets()[min(2, len(_native.instruction_sets())) - 1]
    with opened(path, image_tokens=IMAGE_TOKENS, instruction_set=exact) as engine:
        assert isinstance(engine.media, PromptMedia)
        content = engine.media.read(Image(pattern(*PICTURE[projector])))
        assert engine.media.placeholder(content) == PLACEHOLDER
        (span,) = engine.media.segments(content, "", RequestMedia())
        assert isinstance(span, MediaSpan)
        answer = engine.generate(Prompt.of([3, 5], span, [6]), GREEDY).token_ids
        (rows,) = [one for kept in engine.media._kept._tenants.values() for one in kept.turns.values()]
        return rows.embeddings, answer


@pytest.mark.parametrize("projector", PROJECTORS)
def test_an_mmproj_means_the_same_as_its_checkpoint(projector: str, text: Text, tmp_path: Path) -> None:
    ours, theirs = towers(projector, text, tmp_path)
    assert ours.config == theirs.config
    assert ours.processor(IMAGE_TOKENS) == theirs.processor(IMAGE_TOKENS)
    sources = {name: source for name, _, _, source in read_record(projector)["tensors"]}
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert {name: sources[ref.name] for name, ref in ours.tensors.items()} == {
        name: ref.name for name, ref in theirs.tensors.items()
    }


@pytest.mark.parametrize("projector", ["deepseekocr", pytest.param("deepseekocr2", marks=pytest.mark.full)])
def test_a_model_sees_by_its_mmproj_as_by_its_checkpoint(projector: str, text: Text, tmp_path: Path) -> None:
    towers(projector, text, tmp_path)
    expected, answer = seen(tmp_path / "checkpoint", projector)
    rows, found = seen(tmp_path / "model.gguf", projector)
    assert len(rows) == NUM_ROWS[projector]
    np.testing.assert_allclose(rows, expected, rtol=0, atol=LARGEST_DIFFERENCE * abs(expected).max())
    assert found == answer


RELEASED: dict[str, tuple[RawConfig, dict[str, int]]] = {
    "deepseekocr": (
        DEEPSEEK_OCR,
        {"embedding_length": 1024, "feed_forward_length": 64, "block_count": 24, "attention.head_count": 16},
    ),
    "deepseekocr2": (
        DEEPSEEK_OCR_2,
        {"embedding_length": 896, "feed_forward_length": 4864, "block_count": 24, "attention.head_count": 14},
    ),
}


@pytest.mark.parametrize("projector", PROJECTORS)
def test_the_released_sizes_mean_the_same(projector: str, tmp_path: Path) -> None:
    raw, sizes = RELEASED[projector]
    sizes = sizes | {
        "projection_dim": 1280, "sam.block_count": 12, "sam.embedding_length": 768, "sam.head_count": 12,
    }  # fmt: skip
    path = write_mmproj(
        tmp_path / "mmproj.gguf", projector, {f"{VISION}{key}": (4, size) for key, size in sizes.items()}
    )
    model = FAMILIES["deepseek_vl_v2"].parse_config(raw)
    tower = read_towers(read_gguf(path), model)["picture"]
    assert isinstance(tower, TowerInFile)
    own = {key: value for key, value in raw["vision_config"].items() if key != "model_type"}
    (hub,) = ENCODERS["deepseek_vl_v2"]
    expected = hub.read(ConfigReader(own, "it"), ConfigReader(raw, "it"), model)
    assert tower.config == expected
    implied = None if tower.encoder.settings is None else tower.encoder.settings(tower.config)
    assert hub.settings is not None
    found = read_picture_processor(tower.settings, implied or {})
    assert found == read_picture_processor(hub.settings(expected))


def test_a_pack_has_the_tower(text: Text, tmp_path: Path) -> None:
    model = beside(text, tmp_path)
    write_mmproj(tmp_path / "mmproj.gguf", "deepseekocr2")
    files = open_model(model)
    names = tensor_names(find_encoders(files))
    pack(files, tmp_path / "pack", format="source", encoder_tensors=names)
    assert tower_in(tmp_path / "pack").config == tower_in(model).config


def test_show_counts_the_tower(text: Text, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = beside(text, tmp_path)
    assert main(["show", str(model), "--memory", "3GiB"]) == 0
    assert "pictures" not in capsys.readouterr().out
    write_mmproj(tmp_path / "mmproj.gguf", "deepseekocr")
    assert main(["show", str(model), "--memory", "3GiB"]) == 0
    assert "  pictures      1.91 M parameters of their encoder" in capsys.readouterr().out


FAULTS: dict[str, tuple[str, dict[str, tuple[int, Any] | None], str]] = {
    "no layers of SAM": (
        "deepseekocr",
        {f"{VISION}sam.block_count": None},
        "has no key clip.vision.sam.block_count",
    ),
    "no width of SAM": (
        "deepseekocr",
        {f"{VISION}sam.embedding_length": None},
        "has no key clip.vision.sam.embedding_length",
    ),
    "no heads of SAM": (
        "deepseekocr2",
        {f"{VISION}sam.head_count": None},
        "has no key clip.vision.sam.head_count",
    ),
    "no heads of keys": (
        "deepseekocr2",
        {f"{VISION}attention.head_count_kv": None},
        "has no key clip.vision.attention.head_count_kv",
    ),
    "no window": ("deepseekocr2", {f"{VISION}window_size": None}, "has no key clip.vision.window_size"),
    "another window": (
        "deepseekocr",
        {f"{VISION}window_size": (4, 16)},
        "asks for clip.vision.window_size 16; supported: 14",
    ),
    "another epsilon": (
        "deepseekocr",
        {f"{VISION}attention.layer_norm_epsilon": (6, 1e-5)},
        "asks for clip.vision.attention.layer_norm_epsilon 1e-05; supported: 1e-06",
    ),
    "another activation": ("deepseekocr2", {"clip.use_gelu": (7, False)}, "asks for clip.use_gelu False"),
    "heads of keys for CLIP": (
        "deepseekocr",
        {f"{VISION}attention.head_count_kv": (4, 2)},
        "sets clip.vision.attention.head_count_kv to '2'",
    ),
    "another scale": (
        "deepseekocr2",
        {f"{VISION}projector.scale_factor": (4, 2)},
        "asks for clip.vision.projector.scale_factor 2; supported: 4",
    ),
    "other patches": (
        "deepseekocr2",
        {f"{VISION}patch_size": (4, 8)},
        "v.sam.patch_embd.weight is [8, 3, 16, 16], expected [8, 3, 8, 8]",
    ),
    "more layers": (
        "deepseekocr",
        {f"{VISION}sam.block_count": (4, 4)},
        "v.sam.blk.3.pre_ln.weight is missing from the 110 tensors",
    ),
    "heads that are no part of it": (
        "deepseekocr2",
        {f"{VISION}attention.head_count": (4, 3)},
        "mmproj.gguf: clip.vision: the second encoder has 3 heads, expected a divisor of 28",
    ),
    "a picture of no patch": (
        "deepseekocr",
        {f"{VISION}image_size": (4, 8)},
        "mmproj.gguf: clip.vision: image_size is below patch_size",
    ),
    "the other projector": (
        "deepseekocr",
        {"clip.projector_type": (STRING, "deepseekocr2")},
        "scale_factor 1; supported: 4",
    ),
}


def fault_of(model: Path) -> ArgosyError:
    found = find_encoders(open_model(model))["picture"]
    assert isinstance(found, ArgosyError)
    return found


@pytest.mark.parametrize("what", FAULTS)
def test_a_file_that_says_something_else_is_refused(what: str, text: Text, tmp_path: Path) -> None:
    projector, metadata, message = FAULTS[what]
    model = beside(text, tmp_path)
    write_mmproj(tmp_path / "mmproj.gguf", projector, metadata)
    assert message in str(fault_of(model))


@pytest.mark.parametrize(
    ("projector", "tensor"),
    [("deepseekocr", "v.image_newline"), ("deepseekocr", "v.class_embd"), ("deepseekocr2", "v.view_seperator"),
     ("deepseekocr2", "v.resample_query_768.weight"), ("deepseekocr2", "v.sam.net_3.weight")],
)  # fmt: skip
def test_a_missing_tensor_is_named(projector: str, tensor: str, text: Text, tmp_path: Path) -> None:
    model = beside(text, tmp_path)
    write_mmproj(tmp_path / "mmproj.gguf", projector, without=tensor)
    assert f"{tensor} is missing" in str(fault_of(model))


def test_the_number_of_tiles_is_the_files(text: Text, tmp_path: Path) -> None:
    key = f"{VISION}preproc_max_tiles"
    model = beside(text, tmp_path)
    found = []
    for most in (9, 32):
        write_mmproj(tmp_path / "mmproj.gguf", "deepseekocr", {key: (4, most)})
        found.append(tower_in(model).processor(20_000).fit.most)  # type: ignore[union-attr]
    assert found == [9, 32]
