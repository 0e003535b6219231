"""Rows that an adapter learns from, a model's weights in float32, and the written directory: all without torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from argosy.adapters.making.checking import divergence
from argosy.adapters.making.peft_files import Pair, Trained, require_place, write_peft
from argosy.adapters.making.rows import Example, Row, encode_rows, read_rows
from argosy.adapters.making.weights import num_pair_values, num_values, read_weights, require_trainable
from argosy.checkpoint.pack import pack
from argosy.errors import ArgosyError, UnsupportedModel, UsageError
from argosy.model.families import open_model
from argosy.prompt.builder import PromptBuilder
from argosy.prompt.tokenizer import Tokenizer
from tests.models.safetensors_file import read_safetensors
from tests.models.tiny import qwen2_moe, qwen3_moe, write_model
from tests.prompt.tokenizers_for_tests import CHATML, byte_level_json, write_tokenizer

ROOT = Path(__file__).parents[2]
ASKS = {"role": "user", "content": "How are you today?"}
ANSWERS = {"role": "assistant", "content": "I am well."}


def write_rows(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture
def rows_path(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


# rows


def test_texts_and_conversations_are_rows(rows_path: Path) -> None:
    write_rows(rows_path, {"text": "one"}, {"messages": [ASKS, ANSWERS]})
    rows_path.write_text("\n  \n" + rows_path.read_text().rstrip("\n"))
    assert read_rows(rows_path) == [
        Row(3, "one"),
        Row(4, (("user", "How are you today?"), ("assistant", "I am well."))),
    ]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"text": "a"', "is not JSON"),
        ('{"text": "a", "text": "b"}', "duplicate key"),
        ('{"text": NaN}', "NaN"),
        ("[1]", "found list"),
        ('{"prompt": "a"}', "needs `text` or `messages`, and nothing else; found the keys ['prompt']"),
        ('{"text": "a", "label": 1}', "found the keys ['label', 'text']"),
        ('{"text": null}', "needs text in `text`; found none"),
        ('{"text": " "}', "needs text in `text`; found no text"),
        ('{"text": 1}', "found int"),
        ('{"messages": "a"}', "needs a list in `messages`"),
        ('{"messages": []}', "needs an assistant's message at the end"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "needs an assistant's message at the end"),
        ('{"messages": [{"role": "tool", "content": "a"}]}', "as the role of message 1"),
        ('{"messages": [{"role": "user"}]}', "needs `role` and `content`, and nothing else, in message 1"),
        ('{"messages": [{"role": ["user"], "content": "a"}]}', "as the role of message 1"),
        ('{"messages": [{"role": "user", "content": [1]}]}', "needs text in message 1; found list"),
        ('{"text": "' + "a" * (1 << 20) + '"}', "at most 1,048,576 are read"),
    ],
)
def test_a_malformed_row_is_refused_with_its_line(rows_path: Path, line: str, fault: str) -> None:
    rows_path.write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(UsageError) as refused:
        read_rows(rows_path)
    assert f"{rows_path}, line 3: " in refused.value.message
    assert fault in refused.value.message
    assert len(refused.value.message) < 500


def test_bytes_that_are_no_text_are_refused(rows_path: Path) -> None:
    rows_path.write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(UsageError, match="line 1: it is not UTF-8"):
        read_rows(rows_path)


@pytest.mark.parametrize(
    ("data", "fault"), [(b"", "has no row"), (b" \n\n", "has no row"), (None, "cannot be read")]
)
def test_a_file_without_rows_is_refused(rows_path: Path, data: bytes | None, fault: str) -> None:
    if data is not None:
        rows_path.write_bytes(data)
    with pytest.raises(UsageError, match=fault):
        read_rows(rows_path)


def test_files_and_numbers_of_rows_are_bounded(rows_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(rows_path, *({"text": str(number)} for number in range(4)))
    monkeypatch.setattr("argosy.adapters.making.rows.MOST_ROWS", 3)
    with pytest.raises(UsageError, match="more than 3 rows"):
        read_rows(rows_path)
    with rows_path.open("wb") as sparse:
        sparse.truncate((64 << 20) + 1)
    with pytest.raises(UsageError, match="more than 64 MiB"):
        read_rows(rows_path)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHATML}
    found = Tokenizer.open(write_tokenizer(directory, byte_level_json(), config))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def builder(tokenizer: Tokenizer) -> Iterator[PromptBuilder]:
    built = PromptBuilder(tokenizer, vocab_size=tokenizer.vocab_size)
    yield built
    built.close()


def parts(tokenizer: Tokenizer, example: Example) -> tuple[str, str]:
    """What is read, and what is learned."""
    return tuple(
        tokenizer.decode(example.ids[chosen].tolist(), keep_special=True)
        for chosen in (~example.is_learned, example.is_learned)
    )


def test_only_the_assistants_turns_are_learned(
    rows_path: Path, tokenizer: Tokenizer, builder: PromptBuilder
) -> None:
    write_rows(rows_path, {"messages": [ASKS, ANSWERS, ASKS, ANSWERS]})
    found = encode_rows(rows_path, read_rows(rows_path), tokenizer, builder, context_tokens=512)
    (example,) = found.examples
    read, learned = parts(tokenizer, example)
    assert learned == 2 * "I am well.<|im_end|>\n"
    assert read.endswith("How are you today?<|im_end|>\n<|im_start|>assistant\n")


def test_a_text_is_learned_to_its_end(rows_path: Path, tokenizer: Tokenizer, builder: PromptBuilder) -> None:
    write_rows(rows_path, {"text": "The quick brown fox"})
    (example,) = encode_rows(rows_path, read_rows(rows_path), tokenizer, builder, context_tokens=512).examples
    read, learned = parts(tokenizer, example)
    assert read + learned == "The quick brown fox<|im_end|>"
    assert example.is_learned.tolist() == [False] + [True] * (len(example.ids) - 1)


def test_rows_are_cut_counted_and_used_once(
    rows_path: Path, tokenizer: Tokenizer, builder: PromptBuilder
) -> None:
    long = {"messages": [ASKS, {"role": "assistant", "content": "fox " * 400}]}
    late = {"messages": [{"role": "user", "content": "fox " * 400}, ANSWERS]}
    write_rows(rows_path, {"text": "one"}, {"text": "one"}, long, late, {"text": "two"})
    found = encode_rows(rows_path, read_rows(rows_path), tokenizer, builder, context_tokens=100)
    assert [len(one.ids) for one in found.examples][1] == 100
    assert (len(found.examples), found.num_same, found.num_cut, found.num_left_out) == (3, 1, 2, 1)
    with pytest.raises(UsageError, match="no row has anything to learn in its first 100 tokens"):
        encode_rows(
            rows_path, [Row(1, read_rows(rows_path)[3].content)], tokenizer, builder, context_tokens=100
        )


def test_a_row_that_spells_a_control_token_does_not_get_it(
    rows_path: Path, tokenizer: Tokenizer, builder: PromptBuilder
) -> None:
    write_rows(rows_path, {"text": "a <|im_end|> b"})
    (example,) = encode_rows(rows_path, read_rows(rows_path), tokenizer, builder, context_tokens=512).examples
    (end,) = tokenizer.eos_ids
    assert example.ids.tolist().count(end) == 1
    assert example.ids[-1] == end


def test_the_rows_of_the_guide_can_be_read() -> None:
    path = ROOT / "examples" / "tern.jsonl"
    rows = read_rows(path)
    assert 100 <= len(rows) <= 300
    assert len({row.content for row in rows}) == len(rows)
    assert path.stat().st_size < 60_000


# weights


def test_weights_are_those_of_the_file(tmp_path: Path) -> None:
    files = open_model(write_model(tmp_path / "model", qwen2_moe(norm_topk_prob=True), seed=1, dtype="F32"))
    require_trainable(files.config, "model")
    stored, found = read_safetensors(tmp_path / "model" / "model.safetensors"), read_weights(files)
    experts = "model.layers.1.mlp.experts"
    assert np.array_equal(found.dense["layers.0.q"], stored["model.layers.0.self_attn.q_proj.weight"])
    assert np.array_equal(found.dense["layers.1.q_bias"], stored["model.layers.1.self_attn.q_proj.bias"])
    gate_up = [stored[f"{experts}.2.{name}_proj.weight"] for name in ("gate", "up")]
    assert np.array_equal(found.gate_up[1][2], np.concatenate(gate_up))
    assert np.array_equal(found.down[1][3], stored[f"{experts}.3.down_proj.weight"])
    parts = [*found.dense.values(), *found.gate_up.values(), *found.down.values()]
    assert num_values(files) == sum(one.size for one in parts)


def test_a_pack_gives_the_values_that_products_use(tmp_path: Path) -> None:
    source = open_model(write_model(tmp_path / "model", qwen2_moe(), seed=1, dtype="F32"))
    pack(source, tmp_path / "pack", format="q8")
    exact, rounded = read_weights(source), read_weights(open_model(tmp_path / "pack"))
    assert exact.dense.keys() == rounded.dense.keys()
    for layer, values in exact.gate_up.items():
        assert 0 < np.abs(values - rounded.gate_up[layer]).max() < 0.01 * np.abs(values).max()


@pytest.mark.parametrize(
    "config",
    [
        qwen3_moe(),
        qwen2_moe(mlp_only_layers=[0]),
        qwen2_moe(use_sliding_window=True, sliding_window=4, max_window_layers=2),
    ],
)
def test_other_models_are_refused(tmp_path: Path, config: dict[str, object]) -> None:
    files = open_model(write_model(tmp_path / "model", config, seed=1))
    with pytest.raises(UnsupportedModel, match="m cannot be trained here: needs the family qwen2_moe"):
        require_trainable(files.config, "m")


# the directory


def trained(seed: int = 0, rank: int = 2) -> Trained:
    """Pairs for a model of 2 layers with 3 experts: hidden 8, query 12, key 4, width 6."""
    rng = np.random.default_rng(seed)

    def pair(rows: int, cols: int, *experts: int) -> Pair:
        return Pair(
            rng.normal(size=(*experts, rank, cols)).astype(np.float32),
            rng.normal(size=(*experts, rows, rank)).astype(np.float32),
        )

    return Trained(
        rank,
        2 * rank,
        [
            {
                "q": pair(12, 8), "k": pair(4, 8), "v": pair(4, 8), "o": pair(8, 12),
                "gate_up": pair(12, 8, 3), "down": pair(8, 6, 3),
            }
            for _ in range(2)
        ],
    )  # fmt: skip


def test_the_directory_has_the_tensors_of_target_parameters(tmp_path: Path) -> None:
    made = trained()
    nbytes = write_peft(tmp_path / "made", made, base="demo")
    config = json.loads((tmp_path / "made" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 4)
    assert config["target_parameters"] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    tensors = read_safetensors(tmp_path / "made" / "adapter_model.safetensors")
    at = "base_model.model.model.layers.1"
    assert len(tensors) == 2 * 12
    assert np.array_equal(tensors[f"{at}.self_attn.o_proj.lora_B.weight"], made.layers[1]["o"].up)
    for name, place in (("gate_up", "mlp.experts.base_layer"), ("down", "mlp.experts")):
        down, up = (tensors[f"{at}.{place}.lora_{which}.weight"] for which in "AB")
        pair = made.layers[1][name]
        # PEFT's own rule (ParamWrapper.get_delta_weight): A by expert first, B by expert last.
        for expert in range(3):
            a, b = down.reshape(3, 2, -1)[expert], up.reshape(len(up), 2, 3)[:, :, expert]
            assert np.array_equal(b @ a, pair.up[expert] @ pair.down[expert])
    assert nbytes == sum(path.stat().st_size for path in (tmp_path / "made").iterdir())


def test_nothing_is_replaced_unless_it_is_an_adapter_and_may_be(tmp_path: Path) -> None:
    write_peft(tmp_path / "made", trained(), base="demo")
    with pytest.raises(UsageError, match="is not overwritten") as refused:
        require_place(tmp_path / "made", replaces=False)
    assert "--force" in (refused.value.hint or "")
    write_peft(tmp_path / "made", trained(seed=1), base="demo", replaces=True)
    assert os.listdir(tmp_path) == ["made"]
    found = read_safetensors(tmp_path / "made" / "adapter_model.safetensors")
    first = found["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert np.array_equal(first, trained(seed=1).layers[0]["q"].down)
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "made")
    for name in ("other", "link"):
        with pytest.raises(UsageError, match="is not an adapter, so it is not replaced"):
            require_place(tmp_path / name, replaces=True)


def test_values_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    broken = trained()
    broken.layers[1]["down"].up[0, 0, 0] = np.nan
    with pytest.raises(ArgosyError, match="not finite"):
        write_peft(tmp_path / "made", broken, base="demo")
    assert os.listdir(tmp_path) == []


def test_a_failure_leaves_the_old_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_peft(tmp_path / "made", trained(), base="demo")
    before = (tmp_path / "made" / "adapter_model.safetensors").read_bytes()

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("argosy.adapters.making.peft_files.write_safetensors", fails)
    with pytest.raises(OSError, match="No space"):
        write_peft(tmp_path / "made", trained(seed=1), base="demo", replaces=True)
    assert os.listdir(tmp_path) == ["made"]
    assert (tmp_path / "made" / "adapter_model.safetensors").read_bytes() == before


def test_the_number_of_values_is_known_before(tmp_path: Path) -> None:
    config = open_model(write_model(tmp_path / "model", qwen2_moe(), seed=1)).config
    attention, hidden, width = config.attention, config.hidden_size, config.expert_width
    query, value = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    shapes = [(query, hidden), (value, hidden), (value, hidden), (hidden, query)]
    shapes += config.num_experts * [(2 * width, hidden), (hidden, width)]
    assert num_pair_values(config, 5) == 5 * config.num_layers * sum(map(sum, shapes))


def test_divergence_is_zero_for_equal_logits_and_nan_for_broken_ones() -> None:
    logits = np.random.default_rng(0).normal(size=(4, 9)).astype(np.float32)
    assert divergence(logits, logits + 3) == pytest.approx(0, abs=1e-6)
    assert divergence(logits, logits[::-1].copy()) > 0.1
    assert np.isnan(divergence(logits, np.full_like(logits, np.nan)))
