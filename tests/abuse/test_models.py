"""Broken models, budgets and prompts: each gets a clear error, from the Python API and from the command line.

`tests/checkpoint/` tests the reader's own errors; here the errors must reach the user.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy import Engine, SamplingParams
from argosy.checkpoint.pack import pack
from argosy.errors import (
    ArgosyError,
    CheckpointError,
    CorruptRecord,
    DoesNotFit,
    PromptTooLong,
    UnsupportedModel,
    UsageError,
)
from argosy.model.families import open_model
from tests.helpers.command import run_argosy
from tests.helpers.word_tokenizer import write_word_tokenizer
from tests.models.safetensors_file import Array, edit_header, read_header, write_checkpoint
from tests.models.tiny import mixtral, qwen3_moe, random_tensors, write_model

CONFIG = qwen3_moe()
FIRST_SHARD, SECOND_SHARD = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
GREEDY = SamplingParams(max_tokens=4, ignore_eos=True)
PROMPT = "w3 w4 w5"
EVERY_EXPERT = [[token_id] for token_id in range(3, 60)]  # enough prompts to use every expert


def truncate_a_shard(directory: Path) -> None:
    shard = directory / SECOND_SHARD
    shard.write_bytes(shard.read_bytes()[:-100])


def promise_more_than_the_file_has(directory: Path) -> None:
    def edit(header: dict[str, Any]) -> None:
        last = max(header.values(), key=lambda entry: entry["data_offsets"][1])
        last["data_offsets"][1] += 2 * math.prod(last["shape"][1:])
        last["shape"][0] += 1

    edit_header(directory / FIRST_SHARD, edit)


def let_tensors_overlap(directory: Path) -> None:
    def edit(header: dict[str, Any]) -> None:
        first, second = list(header.values())[:2]
        length = second["data_offsets"][1] - second["data_offsets"][0]
        begin = first["data_offsets"][0]
        second["data_offsets"] = [begin, begin + length]

    edit_header(directory / FIRST_SHARD, edit)


def rewritten(change: Callable[[dict[str, Array]], None]) -> Callable[[Path], None]:
    def rewrite(directory: Path) -> None:
        tensors = random_tensors(CONFIG, 1, "BF16")
        change(tensors)
        write_checkpoint(directory, {name: ("BF16", t) for name, t in tensors.items()}, num_shards=2)

    return rewrite


def drop_an_expert_matrix(tensors: dict[str, Array]) -> None:
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]


def cut_an_expert_matrix(tensors: dict[str, Array]) -> None:
    name = "model.layers.2.mlp.experts.4.down_proj.weight"
    tensors[name] = tensors[name][:, :-1]


def put_nan_into_a_norm(tensors: dict[str, Array]) -> None:
    tensors["model.layers.1.post_attention_layernorm.weight"][7] = np.nan


def add_a_stranger(tensors: dict[str, Array]) -> None:
    tensors["model.layers.0.self_attn.sinks"] = np.ones(4, np.float32)


def set_config(**changes: Any) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        (directory / "config.json").write_text(json.dumps(CONFIG | changes))

    return edit


def remove_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def empty(directory: Path) -> None:
    for file in directory.iterdir():
        file.unlink()


@dataclass(frozen=True)
class Broken:
    """How a checkpoint is broken, and the words that the error must contain."""

    name: str
    damage: Callable[[Path], None]
    error: type[ArgosyError]
    says: tuple[str, ...]


BROKEN = (
    Broken("a truncated shard", truncate_a_shard, CheckpointError, (SECOND_SHARD, "bytes")),
    Broken(
        "a header that lies", promise_more_than_the_file_has, CheckpointError, (FIRST_SHARD, "ends at byte")
    ),
    Broken("overlapping tensors", let_tensors_overlap, CheckpointError, (FIRST_SHARD, "overlaps")),
    Broken(
        "a missing tensor",
        rewritten(drop_an_expert_matrix),
        CheckpointError,
        ("model.layers.1.mlp.experts.3.up_proj.weight", "missing"),
    ),
    Broken(
        "a wrong shape",
        rewritten(cut_an_expert_matrix),
        CheckpointError,
        ("model.layers.2.mlp.experts.4.down_proj.weight", "[32, 23]", "[32, 24]"),
    ),
    Broken(
        "NaN in a norm",
        rewritten(put_nan_into_a_norm),
        CheckpointError,
        ("model.layers.1.post_attention_layernorm.weight", "nan", "7"),
    ),
    Broken(
        "a tensor nobody reads",
        rewritten(add_a_stranger),
        CheckpointError,
        ("model.layers.0.self_attn.sinks",),
    ),
    Broken(
        "an unknown flag",
        set_config(attention_temperature=0.7),
        UnsupportedModel,
        ("attention_temperature", "0.7"),
    ),
    Broken(
        "an unknown family", set_config(model_type="qwen9_moe"), UnsupportedModel, ("qwen9_moe", "mixtral")
    ),
    Broken(
        "other activations", set_config(hidden_act="gelu"), UnsupportedModel, ("hidden_act", "gelu", "silu")
    ),
    Broken("no config", remove_config, CheckpointError, ("config.json", FIRST_SHARD)),
    Broken("an empty directory", empty, CheckpointError, ("no model", "config.json", "argosy.json")),
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = write_model(tmp_path / "model", CONFIG, seed=1, num_shards=2)
    write_word_tokenizer(directory, CONFIG["vocab_size"])
    return directory


@pytest.fixture
def packed(checkpoint: Path, tmp_path: Path) -> Path:
    pack(open_model(checkpoint), tmp_path / "packed", format="q8")
    return tmp_path / "packed"


def open_engine(directory: Path, **options: Any) -> Engine:
    return Engine.open(directory, **({"memory": "4GiB", "threads": 1} | options))


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name.replace(" ", "-"))
def test_a_broken_checkpoint_is_refused_with_its_facts(broken: Broken, checkpoint: Path) -> None:
    shutil.copytree(checkpoint, checkpoint.with_name("whole"))
    broken.damage(checkpoint)

    with pytest.raises(broken.error) as caught:
        open_engine(checkpoint)
    for words in broken.says:
        assert words in str(caught.value)
    open_engine(checkpoint.with_name("whole")).close()


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name.replace(" ", "-"))
def test_the_command_prints_the_same_facts_and_exits_with_four(broken: Broken, checkpoint: Path) -> None:
    broken.damage(checkpoint)
    done = run_argosy("run", "-m", checkpoint, PROMPT)

    assert done.returncode == 4
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    for words in broken.says:
        assert words in done.stderr


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        open_engine(tmp_path / "nowhere")
    done = run_argosy("run", "-m", tmp_path / "nowhere", PROMPT)
    assert (done.returncode, done.stdout) == (4, "")
    assert "nowhere" in done.stderr


def answer_each(engine: Engine, prompts: list[list[int]]) -> None:
    for prompt in prompts:
        engine.generate(prompt, GREEDY)


def flip_a_bit(directory: Path, layer: int, expert: int) -> str:
    """Flip one bit in the middle of a packed expert; return the file's name."""
    piece = open_model(directory).experts[layer, expert].pieces[0]
    with piece.path.open("r+b") as file:
        file.seek(piece.offset + piece.nbytes // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 0x10]))
    return piece.path.name


@pytest.mark.parametrize("expert_slots", [None, 2], ids=["resident", "smallest-cache"])
def test_an_error_about_a_flipped_bit_names_file_layer_and_expert(
    packed: Path, expert_slots: int | None
) -> None:
    file_name = flip_a_bit(packed, layer=1, expert=3)
    with pytest.raises(CorruptRecord) as caught, open_engine(packed, expert_slots=expert_slots) as engine:
        answer_each(engine, EVERY_EXPERT)

    assert (caught.value.facts["layer"], caught.value.facts["expert"]) == (1, 3)
    assert Path(str(caught.value.facts["path"])).name == file_name
    assert f"{file_name}: layer 1, expert 3" in str(caught.value)


def test_an_engine_with_a_flipped_bit_still_answers_prompts_that_do_not_need_it(packed: Path) -> None:
    one_token = SamplingParams(max_tokens=1)
    with open_engine(packed) as engine:
        whole = [engine.generate(prompt, one_token).token_ids for prompt in EVERY_EXPERT]
    flip_a_bit(packed, layer=1, expert=3)

    num_refused = 0
    with open_engine(packed, expert_slots=2) as engine:
        for prompt, expected in zip(EVERY_EXPERT, whole, strict=True):
            try:
                assert engine.generate(prompt, one_token).token_ids == expected
            except CorruptRecord:
                num_refused += 1
    assert 0 < num_refused < len(EVERY_EXPERT)


def test_the_command_names_a_flipped_bit_and_exits_with_four(packed: Path) -> None:
    flip_a_bit(packed, layer=0, expert=5)
    done = run_argosy("run", "-m", packed, "-t", "0", PROMPT)

    assert (done.returncode, done.stdout) == (4, "")
    assert "experts.bin: layer 0, expert 5" in done.stderr


def test_too_small_a_budget_is_refused_with_the_needed_bytes_by_use(checkpoint: Path) -> None:
    with pytest.raises(DoesNotFit) as caught:
        open_engine(checkpoint, memory="20MiB")

    assert caught.value.facts["budget_bytes"] == 20 << 20
    assert int(str(caught.value.facts["needed_bytes"])) > 20 << 20
    for words in ("budget is 20.0 MiB", "dense weights", "KV cache", "smallest expert cache", "--memory"):
        assert words in str(caught.value)


def test_the_command_exits_with_three_and_names_a_budget_that_works(checkpoint: Path) -> None:
    refused = run_argosy("run", "-m", checkpoint, "--memory", "20MiB", PROMPT)
    assert (refused.returncode, refused.stdout) == (3, "")
    named = re.search(r"--memory (\d+MiB)", refused.stderr)
    assert named is not None

    done = run_argosy("run", "-m", checkpoint, "--memory", named[1], "--max-tokens", "2", PROMPT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("num_tokens", [64, 65, 1000])
def test_a_prompt_that_fills_the_context_is_refused_with_both_numbers(
    checkpoint: Path, num_tokens: int
) -> None:
    with open_engine(checkpoint, context=64) as engine:
        with pytest.raises(PromptTooLong) as caught:
            engine.generate([5] * num_tokens, GREEDY)
        assert caught.value.facts == {"needed": num_tokens + 1, "available": 64}
        assert f"{num_tokens} tokens" in str(caught.value)
        with pytest.raises(PromptTooLong):
            engine.logits([5] * num_tokens)
        assert len(engine.generate([5] * 63, GREEDY).token_ids) == 1


def test_a_prompt_beyond_the_models_own_context_is_refused(checkpoint: Path) -> None:
    """The model has 128 positions; it was never trained on positions past max_position_embeddings."""
    with open_engine(checkpoint, context=128) as engine, pytest.raises(PromptTooLong, match="200"):
        engine.generate([5] * 200, GREEDY)


def test_the_command_refuses_too_long_a_prompt(checkpoint: Path) -> None:
    done = run_argosy("run", "-m", checkpoint, stdin=" ".join(f"w{i % 90}" for i in range(300)))
    assert (done.returncode, done.stdout) == (2, "")
    assert "300 tokens" in done.stderr
    assert "128" in done.stderr


@pytest.mark.parametrize(
    ("prompt", "says"),
    [([], "empty"), ([112], "112"), ([-1], "-1"), (["w3"], "")],
    ids=["empty", "past-the-vocabulary", "negative", "not-a-number"],
)
def test_an_invalid_prompt_is_refused(checkpoint: Path, prompt: list[Any], says: str) -> None:
    with open_engine(checkpoint) as engine:
        with pytest.raises(UsageError) as caught:
            engine.generate(prompt, GREEDY)
        assert says in str(caught.value)
        assert len(engine.generate([3, 4], GREEDY).token_ids) == 4


def test_text_needs_a_tokenizer(tmp_path: Path) -> None:
    write_model(tmp_path, mixtral(), seed=1)
    with open_engine(tmp_path) as engine, pytest.raises(UsageError, match=r"tokenizer\.json"):
        engine.generate("w3 w4", GREEDY)


def test_an_expert_cache_too_small_for_one_token_is_refused(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="at least experts_per_token = 2, found 1"):
        open_engine(checkpoint, expert_slots=1)


def test_a_shard_that_shrinks_while_the_engine_runs_causes_an_error_not_a_wrong_answer(
    checkpoint: Path,
) -> None:
    with open_engine(checkpoint, expert_slots=2) as engine:
        engine.generate([3, 4, 5], GREEDY)
        for shard in (FIRST_SHARD, SECOND_SHARD):
            _, begin = read_header(checkpoint / shard)
            with (checkpoint / shard).open("r+b") as file:
                file.truncate(begin)
        with pytest.raises(ArgosyError, match="layer"):
            answer_each(engine, EVERY_EXPERT)
