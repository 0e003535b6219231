"""Pictures of Kimi-K3 through a whole engine: the text around them, every budget, and files of Unsloth's converter."""

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
from argosy.engine.media.prompt_media import PromptMedia
from argosy.errors import UnsupportedModel
from argosy.media.parts import Image, RequestMedia, Text
from argosy.prompt.prompt import Prompt
from tests.models.gguf_k3 import write_k3_gguf
from tests.models.safetensors_file import read_checkpoint, read_safetensors, write_safetensors
from tests.models.tiny import write_model
from tests.models.tiny_encoders import CONFIGS, REFERENCE, Sizes
from tests.models.tiny_k3 import kimi_k3
from tests.prompt.tokenizers_for_tests import byte_level_json, write_tokenizer

TOWER = REFERENCE / "kimi_k3"
CONTROLS = [f"<|{name}|>" for name in (
    "open", "close", "sep", "end_of_msg", "media_begin", "media_content", "media_end", "media_pad",
)]  # fmt: skip
PROCESSOR = {
    "auto_map": {"AutoImageProcessor": "kimi_k3_vision_processing.KimiK3VisionProcessor"},
    "media_proc_cfg": {
        "config_type": "media_proc.processors.moonvit.MoonViTMediaProcessorConfig",
        "fixed_output_tokens": None,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "in_patch_limit": 1024,
        "in_patch_limit_each_frame": 512,
        "merge_kernel_size": 2,
        "patch_limit_on_one_side": 512,
        "patch_size": 4,
        "sample_fps": 8.0,
        "temporal_merge_kernel_size": 4,
        "transparent_bg_config": {"pattern": "chessboard", "chessboard_square_size": 8},
        "transparent_bg_fill_stage": "after_resize",
    },
}
GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
PICTURE = np.random.default_rng(1).integers(0, 256, (30, 41, 3), np.uint8)


@cache
def tokenizer() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer.from_str(byte_level_json())
    made.add_special_tokens(CONTROLS)
    return made


def write(directory: Path) -> Path:
    """A tiny Kimi-K3 with the tower of the reference."""
    core = tokenizer()
    raw = kimi_k3(vocab_size=core.get_vocab_size(), hidden_size=Sizes().out, max_position_embeddings=512)
    raw["media_placeholder_token_id"] = core.token_to_id("<|media_pad|>")
    raw["vision_config"] = CONFIGS["kimi_k3"](Sizes())["vision_config"]
    write_model(directory, raw, seed=5)
    text = {
        name: ("BF16", value)
        for name, value in read_checkpoint(directory).items()
        if name.startswith("language")
    }
    tower = {name: ("BF16", value) for name, value in read_safetensors(TOWER / "model.safetensors").items()}
    write_safetensors(directory / "model.safetensors", text | tower)
    (directory / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return write_tokenizer(directory, core.to_str(), {"eos_token": "<|end_of_msg|>"})


def opened(directory: Path, **options: Any) -> Engine:
    return Engine.open(directory, **{"memory": "3GiB", "threads": 2, "image_tokens": 100} | options)


def asked(engine: Engine, picture: NDArray[np.uint8] = PICTURE) -> Any:
    return engine.prompts.build([Text("What is <|media_pad|> in "), Image(picture), Text("?")])


def test_a_picture_stands_between_the_texts_of_the_published_processor(tmp_path: Path) -> None:
    with opened(write(tmp_path)) as engine:
        prompt = asked(engine)
        ((start, span),) = prompt.spans
        # 41 x 30 pixels are padded to 6 x 4 cells of 8 x 8 pixels.
        assert span.num_positions == 24
        ids = list(prompt.token_ids)
        before, after = ids[:start], ids[start + 24 :]
        label = (
            tokenizer().encode("<|media_begin|>image 41x30<|media_content|>", add_special_tokens=False).ids
        )
        assert before[-len(label) :] == label
        assert after[0] == tokenizer().token_to_id("<|media_end|>")
        assert set(ids[start : start + 24]) == {span.token_id}
        # What a caller wrote is text.
        assert before.count(span.token_id) == 0
        assert len(engine.generate(prompt, GREEDY).token_ids) == 8


def test_answers_about_a_picture_are_equal_at_every_budget_and_chunk(tmp_path: Path) -> None:
    directory, answers = write(tmp_path), []
    for options in ({}, {"expert_slots": 3}, {"chunk_tokens": 7, "threads": 1}):
        with opened(directory, **options) as engine:
            answers.append(engine.generate(asked(engine), GREEDY).token_ids)
            answers.append(engine.generate(asked(engine), GREEDY).token_ids)  # from the prefix
    assert all(answer == answers[0] for answer in answers)
    with opened(directory) as engine:
        assert engine.generate(asked(engine, 255 - PICTURE), GREEDY).token_ids != answers[0]


def write_mmproj(path: Path) -> None:
    """The tower in a file as KimiK3VisionModel of Unsloth's converter writes it."""
    raw = json.loads((TOWER / "config.json").read_text())
    vision, writer = raw["vision_config"], gguf.GGUFWriter(path, "clip")
    heads, side = vision["vt_num_attention_heads"], vision["init_pos_emb_height"]
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "kimik3")
    writer.add_bool("clip.use_gelu", True)
    for key, value in {
        "attention.head_count": heads,
        "attention.head_dim": vision["qkv_hidden_size"] // heads,
        "block_count": vision["vt_num_hidden_layers"],
        "embedding_length": vision["vt_hidden_size"],
        "feed_forward_length": vision["vt_intermediate_size"],
        "image_max_pixels": 1024 * vision["patch_size"] ** 2,
        "image_min_pixels": 8 * vision["patch_size"] ** 2,
        "image_size": side * vision["patch_size"],
        "patch_size": vision["patch_size"],
        "projection_dim": vision["text_hidden_size"],
        "projector.scale_factor": 2,
    }.items():
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", vision["projector_ln_eps"])
    writer.add_array("clip.vision.image_mean", [0.5] * 3)
    writer.add_array("clip.vision.image_std", [0.5] * 3)
    renamed = {
        "vision_tower.patch_embed.proj": "v.patch_embd", "vision_tower.patch_embed.pos_emb": "v.position_embd",
        "vision_tower.encoder.final_layernorm": "v.post_ln", "vision_tower.encoder.blocks": "v.blk",
        "norm0": "ln1", "norm1": "ln2", "wqkv": "attn_qkv", "wo": "attn_out", "mlp.fc0": "ffn_up",
        "mlp.fc1": "ffn_down",
        "mm_projector.proj.0": "mm.1", "mm_projector.proj.2": "mm.2", "mm_projector.post_norm": "mm.post_norm",
    }  # fmt: skip
    for name, value in read_safetensors(TOWER / "model.safetensors").items():
        stored = value.astype(np.float32)
        if "wqkv" in name:
            *turned, kept = np.split(stored, 3)
            parts = [
                one.reshape(heads, -1, 2, 2, one.shape[1]).swapaxes(1, 2).reshape(one.shape) for one in turned
            ]
            stored = np.concatenate([*parts, kept])
        own = name
        for theirs, ours in renamed.items():
            own = own.replace(theirs, ours)
        writer.add_tensor(own, np.ascontiguousarray(stored))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rows_seen(engine: Engine) -> NDArray[np.float32]:
    assert isinstance(engine.media, PromptMedia)
    engine.media._encode_text = lambda text: [len(text)]  # the GGUF has no tokenizer
    segments = engine.media.segments(engine.media.read(Image(PICTURE)), "", RequestMedia())
    assert segments[0] == [len("<|media_begin|>image 41x30<|media_content|>")]
    engine.generate(Prompt.of([3], *segments, [4]), GREEDY)
    (rows,) = (one for kept in engine.media._kept._tenants.values() for one in kept.turns.values())
    return rows.embeddings


def test_a_file_of_unsloth_s_converter_has_the_same_tower(tmp_path: Path) -> None:
    directory = write(tmp_path / "hub")
    # The largest instruction set multiplies in bfloat16 where the weights are.
    exact = _native.instruction_sets()[min(2, len(_native.instruction_sets())) - 1]
    with opened(directory, instruction_set=exact) as engine:
        expected = rows_seen(engine)
        processor = engine.media._processors["picture"]  # type: ignore[attr-defined]
    text = {name: value for name, value in read_checkpoint(directory).items() if name.startswith("language")}
    raw = json.loads((directory / "config.json").read_text())
    tokens = [tokenizer().id_to_token(number) for number in range(raw["text_config"]["vocab_size"])]
    (tmp_path / "gguf").mkdir()
    write_k3_gguf(tmp_path / "gguf" / "model.gguf", raw, text, tokens)
    write_mmproj(tmp_path / "gguf" / "mmproj-F32.gguf")
    with opened(tmp_path / "gguf" / "model.gguf", instruction_set=exact) as engine:
        assert engine.media.kinds == ("picture",)
        found = engine.media._processors["picture"]  # type: ignore[attr-defined]
        assert found == processor
        # Pairs are in another order.
        np.testing.assert_allclose(rows_seen(engine), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm_type": "layernorm"}, "norm_type"),
        ({"mm_projector_type": "patchmerger"}, "mm_projector_type"),
        ({"attn_bias": True}, "attn_bias"),
        ({"pos_emb_interpolation_mode": "bicubic"}, "pos_emb_interpolation_mode"),
        ({"qkv_hidden_size": 30}, "qkv_hidden_size"),
        ({"vt_rope_theta": 5.0}, "vt_rope_theta"),
    ],
)
def test_another_tower_is_refused_and_text_runs(
    changes: dict[str, object], words: str, tmp_path: Path
) -> None:
    directory = write(tmp_path)
    raw = json.loads((directory / "config.json").read_text())
    raw["vision_config"] |= changes
    (directory / "config.json").write_text(json.dumps(raw))
    with opened(directory) as engine:
        assert engine.media.kinds == ()
        with pytest.raises(UnsupportedModel, match=words):
            asked(engine)
        assert len(engine.generate("Hello", GREEDY).token_ids) == 8
