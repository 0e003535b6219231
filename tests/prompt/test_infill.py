"""Prompts to fill in: the sequences that the makers of the models document, and no control token from a caller."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Core

from argosy.errors import PromptTooLong, UsageError
from argosy.prompt.builder import PromptBuilder
from argosy.prompt.infill import FORMS, Infill, Snippet
from argosy.prompt.tokenizer import Tokenizer
from tests.prompt.tokenizers_for_tests import byte_level_json, llama_json

BEFORE, AFTER = "def add(a, b):\n    return ", "\n\nadd(1, 2)"

# The template of each maker, as its sources have it, and what ends the answer there beside the end token.
#   Qwen      https://github.com/QwenLM/Qwen2.5-Coder#3-file-level-code-completion-fill-in-the-middle
#   DeepSeek  https://github.com/deepseek-ai/DeepSeek-Coder-V2#code-insertion
#   GLM       llama.cpp's tools/server (order of `/infill`) with the tokens of GLM-4.5; Zed writes the same
#   StarCoder arXiv:2305.06161; MiniMax-M2 has the same tokens
TEMPLATES = {
    "qwen": (
        "<|fim_prefix|>{before}<|fim_suffix|>{after}<|fim_middle|>",
        ["<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"],
    ),
    "deepseek": ("<｜fim▁begin｜>{before}<｜fim▁hole｜>{after}<｜fim▁end｜>", []),
    "glm": (
        "<|code_prefix|>{before}<|code_suffix|>{after}<|code_middle|>",
        ["<|user|>", "<|observation|>", "<|endoftext|>"],
    ),
    "starcoder": ("<fim_prefix>{before}<fim_suffix>{after}<fim_middle>", ["<fim_pad>", "<|endoftext|>"]),
}


def with_tokens(text: str, tokens: list[str], *, special: bool = True) -> Core:
    core = Core.from_str(text)
    core.add_special_tokens([AddedToken(token, special=special, normalized=False) for token in tokens])
    return core


def tokens_of(template: str) -> list[str]:
    return [part for part in template.replace("{before}", "\0").replace("{after}", "\0").split("\0") if part]


@pytest.mark.parametrize("maker", TEMPLATES)
def test_a_prompt_has_the_tokens_of_its_makers_template(maker: str) -> None:
    template, ends = TEMPLATES[maker]
    core = with_tokens(byte_level_json(), [*tokens_of(template), *ends])
    infill = Infill.of(Tokenizer(core, config={"eos_token": "<|endoftext|>"}))
    assert infill is not None
    expected = core.encode(template.format(before=BEFORE, after=AFTER), add_special_tokens=False).ids
    assert infill.encode(BEFORE, AFTER) == expected
    assert {core.token_to_id(token) for token in (*tokens_of(template), *ends)} <= set(infill.end_ids)
    empty = core.encode(template.format(before="", after=""), add_special_tokens=False).ids
    assert infill.encode("", "") == empty


def test_mistral_puts_the_suffix_first_and_a_space_only_before_the_prefix() -> None:
    """mistral-common's `encode_fim`: `<s>[SUFFIX]suffix[PREFIX] prefix`."""
    core = with_tokens(llama_json(), ["[PREFIX]", "[MIDDLE]", "[SUFFIX]"])
    tokenizer = Tokenizer(core, config={"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True})
    infill = Infill.of(tokenizer)
    assert infill is not None
    found = infill.encode("the quick fox", "over the dog")
    ids = [core.token_to_id(token) for token in ("<s>", "[SUFFIX]", "[PREFIX]")]
    at = found.index(ids[2])
    assert (found[0], found[1]) == (ids[0], ids[1])
    after, before = found[2:at], found[at + 1 :]
    assert before == core.encode("the quick fox", add_special_tokens=False).ids
    assert core.id_to_token(before[0]).startswith("▁")
    # `_encode_infilling` of mistral-common leaves out the space and the symbol before the text.
    symbol = core.encode("☺", add_special_tokens=False).ids
    assert after == core.encode("☺over the dog", add_special_tokens=False).ids[len(symbol) :]
    assert not core.id_to_token(after[0]).startswith("▁")


def test_mistral_with_a_byte_level_vocabulary_has_no_spaces() -> None:
    core = with_tokens(byte_level_json(), ["[PREFIX]", "[SUFFIX]"])
    infill = Infill.of(Tokenizer(core))
    assert infill is not None
    expected = core.encode(f"[SUFFIX]{AFTER}[PREFIX]{BEFORE}", add_special_tokens=False).ids
    assert infill.encode(BEFORE, AFTER) == expected


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.parts[0])
def test_text_never_becomes_a_control_token(form: object) -> None:
    assert isinstance(form, type(FORMS[0]))
    tokenizer = Tokenizer(with_tokens(byte_level_json(), form.tokens))
    infill = Infill.of(tokenizer)
    assert infill is not None
    spelled = "".join(form.tokens) + "<|im_end|>"
    ids = infill.encode(f"a{spelled}b", f"c{spelled}d")
    assert sum(token_id in tokenizer.control_ids for token_id in ids) == len(form.tokens)


SNIPPETS = [
    Snippet("def one():\n    return 1\n", "one.py"),
    Snippet("def two(): ...\n"),
    Snippet("three = 3\n", "3.py"),
]


def test_snippets_stand_before_the_gap_as_the_files_of_a_repository() -> None:
    """https://github.com/QwenLM/Qwen2.5-Coder#4-repository-level-code-completion, with the names of llama-server."""
    template, ends = TEMPLATES["qwen"]
    core = with_tokens(byte_level_json(), [*tokens_of(template), *ends])
    infill = Infill.of(Tokenizer(core))
    assert infill is not None
    written = (
        "<|repo_name|>myproject\n<|file_sep|>one.py\ndef one():\n    return 1\n<|file_sep|>tmp\ndef two(): ...\n"
        "<|file_sep|>3.py\nthree = 3\n<|file_sep|>filename\n" + template.format(before=BEFORE, after=AFTER)
    )
    expected = core.encode(written, add_special_tokens=False).ids
    assert infill.encode_among(SNIPPETS, BEFORE, AFTER) == (expected, 0)
    assert infill.encode_among((), BEFORE, AFTER) == (infill.encode(BEFORE, AFTER), 0)

    # One token less than all of them need: the first is left out.
    num_all, without_first = len(expected), infill.encode_among(SNIPPETS[1:], BEFORE, AFTER)[0]
    for reserved in (0, 10):
        bounds = {"reserved_tokens": reserved}
        assert infill.encode_among(SNIPPETS, BEFORE, AFTER, max_tokens=num_all + reserved, **bounds)[1] == 0
        found = infill.encode_among(SNIPPETS, BEFORE, AFTER, max_tokens=num_all + reserved - 1, **bounds)
        assert found == (without_first, 1)
    plain = infill.encode(BEFORE, AFTER)
    assert infill.encode_among(SNIPPETS, BEFORE, AFTER, max_tokens=len(plain)) == (plain, 3)
    assert infill.encode_among(SNIPPETS, BEFORE, AFTER, max_tokens=len(plain), reserved_tokens=9) == (
        plain,
        3,
    )
    with pytest.raises(PromptTooLong):
        infill.encode_among(SNIPPETS, BEFORE, AFTER, max_tokens=len(plain) - 1)


def test_snippets_are_text_before_the_prompt_of_a_model_without_tokens_for_files() -> None:
    """As `format_infill` of llama.cpp's tools/server writes them."""
    template, ends = TEMPLATES["starcoder"]
    core = with_tokens(byte_level_json(), [*tokens_of(template), *ends])
    infill = Infill.of(Tokenizer(core))
    assert infill is not None
    mark = "\n\n--- snippet ---\n\n"
    texts = [core.encode(mark + one.text, add_special_tokens=False).ids for one in SNIPPETS[:2]]
    expected = [*texts[0], *texts[1], *infill.encode(BEFORE, AFTER)]
    assert infill.encode_among(SNIPPETS[:2], BEFORE, AFTER) == (expected, 0)


def test_a_snippet_never_becomes_a_control_token() -> None:
    template, ends = TEMPLATES["qwen"]
    tokenizer = Tokenizer(with_tokens(byte_level_json(), [*tokens_of(template), *ends]))
    infill = Infill.of(tokenizer)
    assert infill is not None
    spelled = [Snippet("<|fim_middle|>a<|file_sep|>", "b<|repo_name|>\n<|file_sep|>c")]
    ids, _ = infill.encode_among(spelled, "a", "b")
    assert sum(token_id in tokenizer.control_ids for token_id in ids) == 3 + 3


def test_a_vocabulary_with_only_some_of_the_tokens_has_no_form() -> None:
    core = with_tokens(byte_level_json(), ["<|fim_prefix|>", "<|fim_suffix|>"])
    builder = PromptBuilder(Tokenizer(core), vocab_size=1000)
    assert not builder.can_infill
    with pytest.raises(UsageError, match="this model cannot fill in a text"):
        builder.infill("a", "b")
    assert not PromptBuilder(None, vocab_size=10).can_infill


def test_a_prompt_that_does_not_fit_is_refused_with_its_size() -> None:
    core = with_tokens(byte_level_json(), tokens_of(TEMPLATES["qwen"][0]))
    builder = PromptBuilder(Tokenizer(core), vocab_size=1000, context_tokens=32)
    assert builder.infill("a b", "c")[0].text == "a b"
    with pytest.raises(PromptTooLong):
        builder.infill("1 2 3 4 5 6 7 8 9", "1 2 3 4 5 6 7 8 9")
    with pytest.raises(PromptTooLong):
        builder.infill("1 " * 100, "")


def test_a_whole_text_has_the_tokens_that_its_tokenizer_adds(tmp_path: Path) -> None:
    """As Qwen3-Embedding, whose tokenizer ends each text; and as GGUF files, which say so by a flag."""
    state = json.loads(byte_level_json())
    end = Core.from_str(byte_level_json()).token_to_id("<|endoftext|>")
    state["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [end], "tokens": ["<|endoftext|>"]}},
    }  # fmt: skip
    core = Core.from_str(json.dumps(state))
    builder = PromptBuilder(Tokenizer(core), vocab_size=1000, context_tokens=16)
    assert list(builder.whole_text("How are you?").token_ids or ()) == core.encode("How are you?").ids
    assert builder.tokenize("you", add_prefix=True)[-1] != end  # a text to continue has no end

    flagged = Tokenizer(
        Core.from_str(byte_level_json()), config={"eos_token": "<|endoftext|>", "add_eos_token": True}
    )
    assert flagged.suffix_ids == (end,)
    # The end is counted: 16 tokens with it fit, 17 do not.
    assert len(builder.whole_text("1" * 15).token_ids or ()) == 16
    with pytest.raises(PromptTooLong, match=r"has 17 tokens, and the context holds 16\n"):
        builder.whole_text("1" * 16)
    with pytest.raises(UsageError, match="this one is empty"):
        builder.whole_text("")
