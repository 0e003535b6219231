"""Pictures and sounds through a whole engine: the answers of transformers, from pixels and samples."""

from __future__ import annotations

import gc
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from argosy import Engine, SamplingParams, _native
from argosy.checkpoint.pack import pack
from argosy.engine.media import prompt_media
from argosy.engine.media.prompt_media import PromptMedia
from argosy.errors import BadMedia, CheckpointError, Overloaded, UnsupportedModel, UsageError
from argosy.media.parts import Audio, Image, MediaLimits, RequestMedia
from argosy.media.pictures import read_picture_processor
from argosy.model.encoders.reading import find_encoders, tensor_names
from argosy.model.families import open_model
from argosy.prompt.conversation_media import ConversationMedia
from argosy.prompt.media_span import MediaSpan
from argosy.prompt.prompt import Prompt
from tests.models.references import difference
from tests.models.renamed import RENAMED
from tests.models.safetensors_file import read_safetensors, write_checkpoint
from tests.models.seeing import CONFIGS, IMAGE_TOKENS, RATE, REFERENCE, encode_text

FAMILIES = sorted(CONFIGS)
# Squares of DeepSeek-OCR-2 have one size, that of the released model in patches, which takes seconds.
SMALL = [pytest.param(one, marks=[pytest.mark.full] * (one == "deepseek_ocr2")) for one in FAMILIES]
PACKABLE = [one for one in SMALL if one.values != ("qwen4_exp",)]  # packs hold no n-gram tables
LARGEST_DIFFERENCE = 3e-4
GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)


def opened(directory: Path, **options: Any) -> Engine:
    engine = Engine.open(
        directory, **{"memory": "3GiB", "threads": 2, "image_tokens": IMAGE_TOKENS} | options
    )
    if isinstance(engine.media, PromptMedia):
        engine.media._encode_text = encode_text  # these models have no tokenizer
    return engine


def with_reference_pictures(engine: Engine, family: str) -> Engine:
    """Prepare pictures as the checkpoint's own processor does, so that spans are those of the reference."""
    raw = json.loads((REFERENCE / family / "preprocessor_config.json").read_text())
    assert isinstance(engine.media, PromptMedia)
    engine.media._processors["picture"] = read_picture_processor(raw, most_tokens=IMAGE_TOKENS)
    return engine


def require_logits(engine: Engine, prompt: Prompt, logits: NDArray[Any], bound: float) -> None:
    """Require the log-probabilities of these logits, within a bound, for the token after the prompt."""
    result = engine.generate(prompt, SamplingParams(max_tokens=1, temperature=0, logprobs=20))
    assert result.logprobs is not None
    best = dict(result.logprobs[0].top)
    expected = logits - logits.max()
    expected -= np.log(np.exp(expected).sum())
    assert difference(np.array(list(best.values())), expected[list(best)]) <= bound


def require_answer(engine: Engine, prompt: Prompt, logits: NDArray[Any], greedy: NDArray[Any]) -> None:
    """Require the log-probabilities of these logits for the token after the prompt, and this greedy answer."""
    require_logits(engine, prompt, logits, LARGEST_DIFFERENCE)
    assert engine.generate(prompt, GREEDY).token_ids[: len(greedy)] == greedy.tolist()


def prompt_of(engine: Engine, reference: dict[str, NDArray[Any]], tenant: str = "") -> Prompt:
    """The reference's prompt, with spans instead of placeholders."""
    assert isinstance(engine.media, PromptMedia)
    parts: list[Image | Audio] = [
        Image(reference[name]) for name in sorted(reference) if name.startswith("picture")
    ]
    if "sound" in reference:
        parts.append(Audio(reference["sound"], rate=RATE))
    contents = [engine.media.read(part) for part in parts]
    segments: list[Any] = []
    for token_id in reference["input_ids"].tolist():
        if contents and token_id == engine.media.placeholder(contents[0]):
            segments += engine.media.segments(contents.pop(0), tenant, RequestMedia())
        else:
            segments.append([token_id])
    assert not contents
    return Prompt.of(*segments)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_answers_equal_those_of_transformers(family: str) -> None:
    reference = read_safetensors(REFERENCE / family / "ref.safetensors")
    # The largest instruction set multiplies in bfloat16 where it can (decision 31).
    exact = min(2, len(_native.instruction_sets())) - 1
    with opened(
        REFERENCE / family, prefix_reuse=False, instruction_set=_native.instruction_sets()[exact]
    ) as engine:
        prompt = prompt_of(engine, reference)
        assert len(prompt.token_ids or ()) == reference.get("num_tokens", [len(reference["logits"])])[0]
        require_answer(engine, prompt, reference["logits"][-1], reference["greedy"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_picture_of_a_hostile_size_is_refused_or_takes_no_more_than_the_cap(family: str) -> None:
    with opened(REFERENCE / family) as engine:
        assert isinstance(engine.media, PromptMedia)
        refusals = []
        for size in ((1, 1), (2, 3), (1, 10_000), (10_000, 1)):
            content = engine.media.read(Image(np.zeros((*size, 3), np.uint8)))
            try:
                segments = engine.media.segments(content, "", RequestMedia())
            except BadMedia as refusal:
                refusals.append((max(size), refusal.message))
                continue
            (span,) = (one for one in segments if isinstance(one, MediaSpan))
            assert 1 <= span.num_positions - len(span.tokens) <= IMAGE_TOKENS
        for longest, message in refusals:
            assert longest == 10_000
            assert "200 times as long" in message or "so narrow" in message
        with pytest.raises(BadMedia, match="at most 24 megapixels, found 8,000 x 8,000"):
            engine.media.read(Image(np.broadcast_to(np.uint8(0), (8000, 8000, 3))))


@pytest.mark.parametrize("family", RENAMED)
def test_the_same_weights_in_another_familys_layout_give_the_answers_of_transformers(
    family: str, tmp_path: Path
) -> None:
    source, write_renamed = RENAMED[family]
    reference = read_safetensors(REFERENCE / source / "ref.safetensors")
    exact = min(2, len(_native.instruction_sets())) - 1
    with opened(
        write_renamed(tmp_path), prefix_reuse=False, instruction_set=_native.instruction_sets()[exact]
    ) as engine:
        assert engine.files.config.family == family
        if family != "kimi_vl":  # the layout of others says or implies another size or other colours
            with_reference_pictures(engine, source)
        prompt = prompt_of(engine, reference)
        require_answer(engine, prompt, reference["logits"][-1], reference["greedy"])


@pytest.mark.covering(1)
@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("options", [{"chunk_tokens": 16, "threads": 1}, {"expert_slots": 4}], ids=str)
def test_no_setting_changes_an_answer(family: str, options: dict[str, Any]) -> None:
    reference = read_safetensors(REFERENCE / family / "ref.safetensors")
    with opened(REFERENCE / family, **options) as engine:
        for _ in range(2):  # the second finds the prefix
            assert (
                engine.generate(prompt_of(engine, reference), GREEDY).token_ids
                == reference["greedy"].tolist()
            )


def packed(source: Path, destination: Path, format: str) -> Path:
    files = open_model(source)
    pack(files, destination, format=format, encoder_tensors=tensor_names(find_encoders(files)))
    return destination


@pytest.mark.parametrize("family", PACKABLE)
def test_a_pack_in_the_formats_of_its_source_gives_the_same_answer(family: str, tmp_path: Path) -> None:
    reference = read_safetensors(REFERENCE / family / "ref.safetensors")
    with opened(packed(REFERENCE / family, tmp_path / "packed", "source")) as engine:
        answer = engine.generate(prompt_of(engine, reference), GREEDY).token_ids
    assert answer == reference["greedy"].tolist()


@pytest.mark.parametrize("family", PACKABLE)
def test_a_quantised_pack_sees_with_the_exact_encoders(family: str, tmp_path: Path) -> None:
    reference = read_safetensors(REFERENCE / family / "ref.safetensors")
    rows = []
    for directory in (REFERENCE / family, packed(REFERENCE / family, tmp_path / "packed", "q8")):
        with opened(directory) as engine:
            prompt = prompt_of(engine, reference)
            assert len(engine.generate(prompt, GREEDY).token_ids) == 8
            assert isinstance(engine.media, PromptMedia)
            rows.append([one for kept in engine.media._kept._tenants.values() for one in kept.turns.values()])
    assert len(rows[0]) == len([name for name in reference if name.startswith(("picture", "sound"))])
    for expected, found in zip(*rows, strict=True):
        np.testing.assert_array_equal(found.embeddings, expected.embeddings)
        assert found.additions.keys() == expected.additions.keys()
        for layer, addition in found.additions.items():
            np.testing.assert_array_equal(addition, expected.additions[layer])


def test_a_model_whose_experts_are_transposed_sees_from_a_pack(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(REFERENCE / "qwen3_vl_moe", source)
    tensors = {
        name: ("BF16", tensor.swapaxes(1, 2) if ".mlp.experts." in name else tensor)
        for name, tensor in read_safetensors(source / "model.safetensors").items()
    }
    write_checkpoint(source, tensors)
    with pytest.raises(UnsupportedModel, match="keeps its experts transposed"):
        opened(source)
    reference = read_safetensors(source / "ref.safetensors")
    with opened(packed(source, tmp_path / "packed", "source")) as engine:
        answer = engine.generate(prompt_of(engine, reference), GREEDY).token_ids
    assert answer == reference["greedy"].tolist()


def test_a_repeated_picture_is_encoded_once_for_each_tenant(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = read_safetensors(REFERENCE / "qwen3_vl_moe" / "ref.safetensors")
    with opened(REFERENCE / "qwen3_vl_moe", prefix_reuse=False) as engine:
        assert isinstance(engine.media, PromptMedia)
        encoded = []
        made = engine.media._made
        monkeypatch.setattr(engine.media, "_made", lambda *given: encoded.append(given[0]) or made(*given))
        for tenant in ("a", "a", "b"):
            engine.submit(prompt_of(engine, reference, tenant), GREEDY, tenant=tenant)
            while engine.has_work:
                engine.step()
        assert encoded == ["a", "a", "b", "b"]  # two pictures each
        engine.forget("a")
        engine.generate(prompt_of(engine, reference, "a"), GREEDY)
        assert encoded == ["a", "a", "b", "b", "a", "a"]


def test_prepared_media_give_their_room_back() -> None:
    reference = read_safetensors(REFERENCE / "qwen3_vl_moe" / "ref.safetensors")
    with opened(REFERENCE / "qwen3_vl_moe") as engine:
        assert isinstance(engine.media, PromptMedia)
        prompt = prompt_of(engine, reference)
        assert engine.media._waiting.held_bytes > 0
        engine.generate(prompt, GREEDY)
        del prompt
        assert engine.media._waiting.held_bytes == 0


def test_media_that_are_collected_while_others_are_refused_give_their_room_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    room = prompt_media._Room(100)

    class Cyclic:
        def __init__(self) -> None:
            self.itself = self

    def charge(nbytes: int, *, keeps: list[object]) -> bool:
        keeps.append(Cyclic())
        try:
            room.charge(keeps[-1], nbytes)
        except Overloaded:
            return False
        return True

    def refusal(*args: Any, **named: Any) -> Overloaded:
        gc.collect()  # as the collector may, wherever an object is made
        return Overloaded(*args, **named)

    monkeypatch.setattr(prompt_media, "Overloaded", refusal)
    assert charge(60, keeps=[])  # garbage from here on
    outcome: list[bool] = []
    thread = threading.Thread(target=lambda: outcome.append(charge(60, keeps=[])), daemon=True)
    thread.start()
    thread.join(10)
    assert outcome == [False]
    assert room.held_bytes == 0
    assert charge(60, keeps=[])


def test_the_largest_picture_is_the_most_tokens_that_are_allowed() -> None:
    with opened(REFERENCE / "qwen3_vl_moe", image_tokens=16) as engine:
        assert isinstance(engine.media, PromptMedia)
        large = engine.media.read(Image(np.zeros((300, 400, 3), np.uint8)))
        (span,) = engine.media.segments(large, "", RequestMedia())
        assert not isinstance(span, list)
        assert span.num_positions <= 16  # type: ignore[union-attr]


def test_a_picture_whose_positions_see_one_another_fits_every_chunk() -> None:
    largest = json.loads((REFERENCE / "gemma4" / "preprocessor_config.json").read_text())["max_soft_tokens"]
    with opened(REFERENCE / "gemma4", chunk_tokens=16) as engine:
        assert engine.plan.chunk_tokens == largest
        assert isinstance(engine.media, PromptMedia)
        picture = engine.media.read(Image(np.zeros((8, largest, 3), np.uint8)))
        before, span, after = engine.media.segments(picture, "", RequestMedia())
        assert isinstance(span, MediaSpan)
        assert 16 < span.num_positions <= largest
        prompt = Prompt.of([3, 5], before, span, after, [6])
        assert len(engine.generate(prompt, GREEDY).token_ids) == 8
    with opened(REFERENCE / "gemma4", chunk_tokens=16, media=False) as engine:
        assert engine.plan.chunk_tokens == 16


def test_the_plan_counts_the_largest_picture_that_the_processor_makes() -> None:
    with opened(REFERENCE / "gemma4", image_tokens=70) as engine:
        needed = engine.plan.encoder_bytes
    with opened(REFERENCE / "gemma4", image_tokens=4096) as engine:
        assert engine.plan.encoder_bytes == needed


def test_a_cap_below_what_a_processor_can_make_is_told_for_the_first_picture() -> None:
    with opened(REFERENCE / "gemma4", image_tokens=69) as engine:
        assert isinstance(engine.media, PromptMedia)
        assert engine.media.kinds == ("video",)  # whose frames may be smaller
        with pytest.raises(UsageError, match="must be at least 70 for this model, found 69"):
            engine.media.read(Image(np.zeros((4, 4, 3), np.uint8)))


def test_media_cost_memory_only_where_the_model_takes_them() -> None:
    with opened(REFERENCE / "qwen3_vl_moe") as engine:
        assert engine.media.kinds == ("picture", "video")
        assert engine.plan.encoder_bytes > MediaLimits().decode_bytes
    with opened(REFERENCE / "qwen3_vl_moe", media=False) as engine:
        assert engine.media.kinds == ()
        assert engine.plan.encoder_bytes == 0
        with pytest.raises(UsageError, match="takes text only"):
            ConversationMedia(engine.prompts._media, RequestMedia()).read(_turn())


def _turn() -> Any:
    from argosy.prompt.messages import Turn

    return Turn("user", "", pieces=(Image(np.zeros((4, 4, 3), np.uint8)),))


def test_a_kind_that_the_model_cannot_take_is_named() -> None:
    with opened(REFERENCE / "qwen3_vl_moe") as engine:
        assert isinstance(engine.media, PromptMedia)
        with pytest.raises(
            UsageError, match="takes text, pictures and videos, and the conversation has a sound"
        ):
            engine.media.read(Audio(np.zeros(1600, np.float32), rate=RATE))


def test_a_checkpoint_without_its_processor_says_so_for_the_first_picture(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(REFERENCE / "qwen3_vl_moe" / name)
    with opened(tmp_path) as engine:
        assert engine.media.kinds == ()
        assert isinstance(engine.media, PromptMedia)
        with pytest.raises(CheckpointError, match=r"has no preprocessor_config.json"):
            engine.media.read(Image(np.zeros((4, 4, 3), np.uint8)))


@pytest.mark.parametrize(
    ("family", "key", "value", "message"),
    [
        ("qwen3_vl_moe", "patch_size", 8, "patch_size 8, and the encoder of pictures takes 4"),
        ("qwen3_vl_moe", "merge_size", 1, "merge_size 1, and the encoder of pictures takes 2"),
        ("glm4v_moe", "temporal_patch_size", 1, "temporal_patch_size 1, and the encoder of pictures takes 2"),
        ("kimi_k25", "patch_size", 2, "patch_size 2, and the encoder of pictures takes 4"),
        ("gemma4", "pooling_kernel_size", 1, "merge_size 1, and the encoder of pictures takes 3"),
        ("qwen3_omni_moe", "feature_size", 128, "feature_size 128, and the encoder of sounds takes 20"),
    ],
)
def test_a_processor_for_another_encoder_is_named(
    family: str, key: str, value: int, message: str, tmp_path: Path
) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(REFERENCE / family / name)
    raw = json.loads((REFERENCE / family / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(raw | {key: value}))
    part = (
        Audio(np.zeros(1600, np.float32), rate=RATE)
        if "sound" in message
        else Image(np.zeros((8, 8, 3), np.uint8))
    )
    with opened(tmp_path) as engine:
        assert isinstance(engine.media, PromptMedia)
        with pytest.raises(CheckpointError, match=message):
            engine.media.read(part)


@pytest.mark.parametrize(
    ("family", "side", "sentence"),
    [
        ("internvl", 16, "has size 16, and the encoder of pictures takes 24"),
        ("internvl", 48, "has size 48, and the encoder of pictures takes 24"),
        ("internvl", 4, "tiles have 4 pixels on a side; supported: a multiple of 8"),
        ("llama4", 8, "has size 8, and the encoder of pictures takes 16"),
        ("llama4", 32, "has size 32, and the encoder of pictures takes 16"),
    ],
)
def test_tiles_of_another_size_than_the_tower_s_are_refused(
    family: str, side: int, sentence: str, tmp_path: Path
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(REFERENCE / family, directory)
    path = directory / "preprocessor_config.json"
    raw = json.loads(path.read_text())
    tile = {name: side for name in ("tile_size",) if name in raw}
    path.write_text(json.dumps(raw | tile | {"size": {"height": side, "width": side}}))
    with opened(directory) as engine:
        assert isinstance(engine.media, PromptMedia)
        with pytest.raises(CheckpointError, match=sentence):
            engine.media.read(Image(np.zeros((8, 8, 3), np.uint8)))
