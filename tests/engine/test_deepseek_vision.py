"""Pictures of DeepSeek-V4-Vision through a whole engine: places of blocks, the answer, every budget, and GGUF files."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
from numpy.typing import NDArray

from argosy import Engine, SamplingParams, _native
from argosy.checkpoint.pack import pack
from argosy.engine.media.prompt_media import PromptMedia
from argosy.media.parts import Image, RequestMedia, Text
from argosy.model.encoders.reading import find_encoders, tensor_names
from argosy.model.families import open_model
from argosy.prompt.media_span import SpanRows
from argosy.prompt.prompt import Prompt
from tests.engine.test_seeing import require_logits
from tests.model.encoders.open_tower import finish
from tests.models.gguf_deepseek_v4 import write_gguf
from tests.models.numpy_deepseek_v4 import DeepseekV4
from tests.models.references import LARGEST_DIFFERENCE
from tests.models.safetensors_file import Array, read_safetensors, write_safetensors
from tests.models.tiny_deepseek_v4 import deepseek_v4, write_deepseek_v4
from tests.models.tiny_encoders import CONFIGS, REFERENCE, Sizes
from tests.prompt.tokenizers_for_tests import byte_level_json, write_tokenizer

TOWER = REFERENCE / "deepseek_v4" / "model.safetensors"
PLACEHOLDER = "<｜deepseek_image｜>"
CONTROLS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", PLACEHOLDER)
GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
PICTURES = [
    np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    for seed, size in enumerate(((21, 30), (9, 40), (33, 8)))
]


@cache
def tokenizer() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer.from_str(byte_level_json())
    made.add_special_tokens(list(CONTROLS))
    return made


def write(directory: Path, seed: int = 5) -> tuple[dict[str, Any], dict[str, Array]]:
    """A tiny model with the tower of the reference; returns its config and the text model's tensors."""
    core = tokenizer()
    vision = {
        key: value for key, value in CONFIGS["deepseek_v4"](Sizes()).items() if key.startswith("vision_")
    }
    config = deepseek_v4(
        **vision | {"vision_min_pixels": 300, "vision_rope_theta": 10_000.0},  # of GGUF files, too
        vocab_size=core.get_vocab_size(),
        hidden_size=Sizes().out,
        num_nextn_predict_layers=1,
        dspark_block_size=5,
        rms_norm_eps=1e-20,
        compress_ratios=[0, 4, 128, 4, 0],
    )
    tensors = write_deepseek_v4(directory, config, seed)
    text = {name: ("I64" if one.dtype == np.int64 else "F32", one) for name, one in tensors.items()}
    tower = {name: ("BF16", value) for name, value in read_safetensors(TOWER).items()}
    write_safetensors(directory / "model.safetensors", text | tower)
    write_tokenizer(directory, core.to_str(), {"bos_token": CONTROLS[0], "eos_token": CONTROLS[1]})
    return config, tensors


def opened(directory: Path, **options: Any) -> Engine:
    return Engine.open(directory, **{"memory": "3GiB", "threads": 2, "image_tokens": 100} | options)


def asked(engine: Engine, pictures: list[NDArray[np.uint8]] = PICTURES) -> Prompt:
    parts: list[Any] = [Text("Which")]
    for number, picture in enumerate(pictures):
        parts += [Image(picture), Text("x" * number)] if number else [Image(picture)]
    return engine.prompts.build([*parts, Text(f"of these {PLACEHOLDER}?")])


def placed_rows(prompt: Prompt) -> dict[int, Array]:
    """The rows of media, by position."""
    rows: dict[int, Array] = {}
    for start, span in prompt.spans:
        made = span.make_rows()
        embeddings = (made if isinstance(made, SpanRows) else finish(made)).embeddings
        rows |= {start + at: row.astype(np.float64) for at, row in enumerate(embeddings)}
    return rows


def test_a_block_begins_where_its_first_square_begins_an_entry(tmp_path: Path) -> None:
    write(tmp_path)
    with opened(tmp_path) as engine:
        places = set()
        for length in range(4):
            prompt = engine.prompts.build([Text("a" * length), *map(Image, PICTURES)])
            ids = list(prompt.token_ids or ())
            blocks = [(start, span) for start, span in prompt.spans if span.sees_both_ways]
            fillers = {start + span.num_positions: span.num_positions for start, span in prompt.spans}
            assert len(blocks) == 3
            for start, span in blocks:
                assert start % 4 == 3
                count = fillers.get(start, 0)
                places.add(count)
                assert ids[start - count : start + span.num_positions] == [span.token_id] * (
                    count + span.num_positions
                )
        assert places == {0, 1, 2, 3}
        # 30 x 21 pixels are padded to 8 x 6 patches: 3 rows of 4 squares, whose last row has fillers beside it.
        assert [span.num_positions for _, span in blocks] == [2 + 4 * 5, 2 + 2 * 6 + 0, 2 + 6 * 2]


def test_the_answer_is_that_of_float64_and_equal_at_every_budget(tmp_path: Path) -> None:
    for seed in range(9):
        config, tensors = write(tmp_path / "model", seed)
        with opened(tmp_path / "model", kv_dtype="f32", threads=1) as engine:
            prompt = asked(engine)
            ids, rows = list(prompt.token_ids or ()), placed_rows(prompt)
            spans = [
                range(start, start + one.num_positions) for start, one in prompt.spans if one.sees_both_ways
            ]
            values = {name: one.astype(np.float64) for name, one in tensors.items()}
            model = DeepseekV4(config, values, rows=rows, spans=spans)
            logits = model.logits(ids)[-1]
            if model.margin <= 1e-5:  # float32 may choose otherwise
                continue
            require_logits(engine, prompt, logits, LARGEST_DIFFERENCE)
            break
    else:
        pytest.fail("no seed has clear choices")
    files = open_model(tmp_path / "model")
    pack(files, tmp_path / "pack", format="source", encoder_tensors=tensor_names(find_encoders(files)))
    answers = []
    for path, options in (
        ("model", {}),
        ("model", {"expert_slots": 2, "threads": 1}),
        ("model", {"chunk_tokens": 27}),
        ("pack", {}),
    ):
        with opened(tmp_path / path, **options) as engine:
            # The second from a prefix.
            answers += [engine.generate(asked(engine), GREEDY).token_ids for _ in range(2)]
    assert all(answer == answers[0] for answer in answers)
    with opened(tmp_path / "model") as engine:
        assert engine.generate(asked(engine, PICTURES[::-1]), GREEDY).token_ids != answers[0]


def write_mmproj(path: Path, config: dict[str, Any]) -> None:
    """The tower in a file as DeepseekV4FlashVisionModel of llama.cpp's converter writes it."""
    writer, vision = (
        gguf.GGUFWriter(path, "clip"),
        {key.removeprefix("vision_"): value for key, value in config.items()},
    )
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "deepseek4v")
    writer.add_bool("clip.use_silu", True)
    for key, value in {
        "attention.head_count": vision["n_heads"],
        "block_count": vision["n_layers"],
        "embedding_length": vision["dim"],
        "feed_forward_length": vision["inter_dim"],
        "image_min_pixels": vision["min_pixels"],
        "image_size": vision["patch_size"] * vision["downsample_ratio"] * 16,
        "patch_size": vision["patch_size"],
        "projection_dim": config["hidden_size"],
        "projector.scale_factor": vision["downsample_ratio"],
    }.items():
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-6)
    writer.add_array("clip.vision.image_mean", [0.5] * 3)
    writer.add_array("clip.vision.image_std", [0.5] * 3)
    renamed = {
        "vision.patch_embed.proj": "v.patch_embd", "vision.norm": "v.post_ln", "vision.blocks": "v.blk",
        "norm1": "ln1", "norm2": "ln2", "attn.wqkv": "attn_qkv", "attn.wo": "attn_out", "mlp.w2": "ffn_down",
        "aligner.w1": "mm.1", "aligner.w2": "mm.2", "image_start": "v.token_embd.img_start",
        "image_end": "v.token_embd.img_end", "image_pad": "v.token_embd.img_pad", "image_newline": "v.image_newline",
    }  # fmt: skip
    side = vision["patch_size"]
    for name, value in read_safetensors(TOWER).items():
        own, stored = name, np.ascontiguousarray(value.astype(np.float32))
        for theirs, ours in renamed.items():
            own = own.replace(theirs, ours)
        if name.endswith("mlp.w1.weight"):
            for part, half in zip(("gate", "up"), np.split(stored, 2), strict=True):
                writer.add_tensor(own.replace("mlp.w1", f"ffn_{part}"), half)
        else:
            is_kernel = name == "vision.patch_embed.proj.weight"
            writer.add_tensor(own, stored.reshape(-1, 3, side, side) if is_kernel else stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rows_seen(engine: Engine) -> NDArray[np.float32]:
    assert isinstance(engine.media, PromptMedia)
    fillers, span = engine.media.segments(engine.media.read(Image(PICTURES[0])), "", RequestMedia())
    assert callable(fillers)
    engine.generate(Prompt.of([3, 4], fillers(2), span, [4]), GREEDY)
    rows = [one for kept in engine.media._kept._tenants.values() for one in kept.turns.values()]
    return max((one.embeddings for one in rows), key=len)


def test_fillers_run_in_the_step_of_their_picture(tmp_path: Path) -> None:
    write(tmp_path)
    with opened(tmp_path) as engine:
        prompt = asked(engine, PICTURES[:1])
        (start, fillers), (after, _) = prompt.spans
        assert after == start + fillers.num_positions
        firsts = []
        forward = engine._forward
        engine._forward = lambda step: firsts.append(int(step.order[0])) or forward(step)  # type: ignore
        engine.generate(prompt, SamplingParams(max_tokens=1, temperature=0))
        assert firsts == [0, start]


def test_a_picture_seen_before_needs_no_tower(tmp_path: Path) -> None:
    write(tmp_path)
    with opened(tmp_path, prefix_reuse=False) as engine:
        answer = engine.generate(asked(engine), GREEDY).token_ids
        assert isinstance(engine.media, PromptMedia)
        engine.media._clear()  # as when its memory is lent
        assert engine.generate(asked(engine), GREEDY).token_ids == answer
        assert not engine.media._encoders._open


def test_files_of_llama_cpp_s_converter_have_the_same_tower(tmp_path: Path) -> None:
    config, tensors = write(tmp_path / "hub")
    # The largest instruction set multiplies in bfloat16 where the weights are.
    exact = _native.instruction_sets()[min(2, len(_native.instruction_sets())) - 1]
    with opened(tmp_path / "hub", instruction_set=exact) as engine:
        expected = rows_seen(engine)
        processor = engine.media._processors["picture"]  # type: ignore[attr-defined]
    tokens = [tokenizer().id_to_token(number) for number in range(config["vocab_size"])]
    (tmp_path / "gguf").mkdir()
    write_gguf(tmp_path / "gguf" / "model.gguf", config, tensors, tokens)
    write_mmproj(tmp_path / "gguf" / "mmproj-F32.gguf", config)
    with opened(tmp_path / "gguf" / "model.gguf", instruction_set=exact) as engine:
        assert engine.media.kinds == ("picture",)
        assert engine.media._processors["picture"] == processor  # type: ignore[attr-defined]
        np.testing.assert_allclose(rows_seen(engine), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vision_n_heads": 5}, "asks for dim 24"),
        ({"vision_downsample_ratio": 17}, "downsample_ratio is 17"),
        ({"vision_max_n_token": 3}, "max_n_token is 3"),
        ({"vision_dim": 12}, "expected"),
    ],
)
def test_a_tower_that_cannot_run_leaves_text(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    config, _ = write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with opened(tmp_path) as engine:
        assert engine.media.kinds == ()
        assert len(engine.generate("Hello", GREEDY).token_ids) == 8
        fault = find_encoders(open_model(tmp_path))["picture"]
        assert words in str(fault)


def test_a_model_without_the_tower_s_tensors_has_none(tmp_path: Path) -> None:
    config = deepseek_v4(num_nextn_predict_layers=1, compress_ratios=[0, 4, 128, 4, 0])
    tensors = write_deepseek_v4(tmp_path, config, 5)
    kinds = {name: "I64" if one.dtype == np.int64 else "F32" for name, one in tensors.items()}
    stored = {name: (kinds[name], one) for name, one in tensors.items()}
    write_safetensors(
        tmp_path / "model.safetensors", stored | {"mtp.0.norm.weight": ("F32", np.ones(40, np.float32))}
    )
    assert find_encoders(open_model(tmp_path)) == {}
