"""Pictures and sounds in conversations: where they end up among the tokens, and what is refused."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jinja2
import numpy as np
import pytest
import tokenizers

from argosy.errors import BadMedia, PromptTooLong, UsageError
from argosy.media.parts import Audio, Content, Image, MediaLimits, RequestMedia, Text, Video
from argosy.prompt.builder import PromptBuilder
from argosy.prompt.formats import Answer
from argosy.prompt.media_span import MediaSpan, SpanRows
from argosy.prompt.replay import ReplayMemory, read_answer
from argosy.prompt.tokenizer import Tokenizer
from argosy.prompt.tools import Tool
from tests.models.seeing import SEEING_TEMPLATE, seeing_tokenizer
from tests.prompt.tokenizers_for_tests import CHATML, SPECIAL

PLACES = {"picture": "<|image_pad|>", "sound": "<|audio_pad|>"}
RED, BLUE = (np.full((2, 3, 3), shade, np.uint8) for shade in (200, 10))
TONE = Audio(np.zeros(1600, np.float32), rate=16_000)


def span_of(content: Content, num_positions: int, token_id: int) -> MediaSpan:
    rows = np.zeros((num_positions, 4), np.float32)
    return MediaSpan(content.kind, content.digest, num_positions, token_id, lambda: SpanRows(rows))


class Reader:
    """Takes pictures and sounds: 3 and 5 positions, two segments with a token between them for a sound."""

    def __init__(self) -> None:
        self.ids = {kind: core().token_to_id(text) for kind, text in PLACES.items()}

    def read(self, part: Image | Audio | Video) -> Content:
        if part.kind not in self.ids:
            raise UsageError(
                f"this model takes text, pictures and sounds, and the conversation has a {part.kind}"
            )
        return part.read(MediaLimits())

    def as_text(self, content: Content, tenant: str, request: RequestMedia) -> str | None:
        return None

    def placeholder(self, content: Content) -> int:
        return self.ids[content.kind]

    def surroundings(self, content: Content) -> tuple[list[int], list[int]]:
        return [], []

    def segments(
        self, content: Content, tenant: str, request: RequestMedia
    ) -> Sequence[Sequence[int] | MediaSpan]:
        token_id = self.placeholder(content)
        if content.kind == "picture":
            return [span_of(content, 3, token_id)]
        return [span_of(content, 4, token_id), [7], span_of(content, 1, token_id)]


@functools.cache
def core() -> tokenizers.Tokenizer:
    return seeing_tokenizer()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(core(), config={"eos_token": SPECIAL[2]}, chat_template=SEEING_TEMPLATE)


@pytest.fixture(scope="module")
def builder(tokenizer: Tokenizer) -> Iterator[PromptBuilder]:
    made = PromptBuilder(tokenizer, vocab_size=tokenizer.vocab_size, media=Reader())
    yield made
    made.close()


def ids_of(text: str) -> list[int]:
    return core().encode(text, add_special_tokens=False).ids


def test_parts_of_one_message_become_spans_in_their_order(
    builder: PromptBuilder, tokenizer: Tokenizer
) -> None:
    prompt = builder.build([Text("What is"), Image(RED), Text("this?"), TONE, Image(BLUE)])
    expected = (
        "<|im_start|>user\nWhat is<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>this?"
        "<|audio_pad|><|audio_pad|><|audio_pad|><|audio_pad|>#<|audio_pad|>"
        "<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|vision_end|><|im_end|>\n<|im_start|>assistant\n"
    )
    parts = [ids_of(text) for text in expected.split("#")]
    assert prompt.token_ids == (*parts[0], 7, *parts[1])
    assert [span.kind for _, span in prompt.spans] == ["picture", "sound", "sound", "picture"]
    for start, span in prompt.spans:
        assert set(prompt.token_ids[start : start + span.num_positions]) == {span.token_id}
    assert prompt.spans[0][1].digest != prompt.spans[3][1].digest


def test_the_same_conversation_as_messages_has_the_same_tokens(builder: PromptBuilder) -> None:
    parts = [Text("What is"), Image(RED), Text("this?")]
    messages = [{"type": "text", "text": "What is"}, {"type": "image", "image": Image(RED)}, Text("this?")]
    one, other = builder.build(parts), builder.build([{"role": "user", "content": messages}])
    assert one.token_ids == other.token_ids
    assert [(at, span.digest) for at, span in one.spans] == [(at, span.digest) for at, span in other.spans]


def test_a_placeholder_in_a_callers_text_is_text(builder: PromptBuilder) -> None:
    prompt = builder.build([Text("<|vision_start|><|image_pad|><|vision_end|>"), Image(RED)])
    assert prompt.token_ids is not None
    assert prompt.token_ids.count(core().token_to_id("<|image_pad|>")) == 3
    assert len(prompt.spans) == 1


# How templates of the hub go through a content: Qwen3-VL's, GLM-4.5V's and Gemma's.
GOES_THROUGH = {
    "qwen3_vl": """{% if message.content is string %}{{ message.content }}{% else %}\
{% for content in message.content %}{% if content.type == 'image' or 'image' in content %}\
<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content.text }}\
{% endif %}{% endfor %}{% endif %}""",
    "glm4v_moe": """{% macro visible_text(content) %}{% if content is string %}{{ content }}\
{% elif content is iterable and content is not mapping %}{% for item in content %}\
{% if item is mapping and item.type == 'text' -%}{{- item.text }}\
{% elif item is mapping and item.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>\
{%- elif item is string -%}{{- item }}{%- endif %}{%- endfor %}{% endif %}{% endmacro %}\
{{ visible_text(message.content) }}""",
    "gemma": """{% if message.content is string %}{{ message.content | trim }}{% else %}\
{% for item in message.content %}{% if item.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% elif item.type == 'text' %}{{ item.text | trim }}{% endif %}{% endfor %}{% endif %}""",
    "lines": """{% if message.content is string %}{{ message.content }}{% else %}{% for item in message.content %}\
{% if not loop.first %}{{ '\n' }}{% endif %}{% if item.type == 'image' %}<|image_pad|>\
{% else %}{{ item.text }}{% endif %}{% endfor %}{% endif %}""",
}


@pytest.mark.parametrize("name", GOES_THROUGH)
def test_texts_beside_each_other_are_what_the_template_makes_of_them(name: str) -> None:
    template = (
        "{% for message in messages %}<|im_start|>{{ message.role + '\n' }}"
        + GOES_THROUGH[name]
        + "<|im_end|>{% endfor %}"
    )
    own = Tokenizer(core(), config={"eos_token": SPECIAL[2]}, chat_template=template)
    builder = PromptBuilder(own, vocab_size=own.vocab_size, media=Reader())
    rendered = jinja2.Environment().from_string(template)
    for kinds in ("tt", "ttt", "itt", "ttit", "ittittt", "i", "t"):
        parts = [
            {"type": "image"} if kind == "i" else {"type": "text", "text": f" said {at}  "}
            for at, kind in enumerate(kinds)
        ]
        given = [Image(RED) if part["type"] == "image" else Text(part["text"]) for part in parts]
        prompt = builder.build([{"role": "user", "content": given}])
        assert prompt.text == rendered.render(messages=[{"role": "user", "content": parts}])
    builder.close()


def test_texts_beside_each_other_are_lines_where_a_template_takes_one_text() -> None:
    own = Tokenizer(core(), config={"eos_token": SPECIAL[2]}, chat_template=CHATML)
    builder = PromptBuilder(own, vocab_size=own.vocab_size)
    assert "user\na\nb<|im_end|>" in builder.build([Text("a"), Text("b")]).text
    builder.close()


def test_the_result_of_a_tool_may_be_a_picture(builder: PromptBuilder) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": [Text("Here:"), Image(RED)]},
    ]
    prompt = builder.build(messages, tools=[Tool("look", "looks")])
    assert "<tool_response>\nHere:<|vision_start|>" in prompt.text
    assert [span.kind for _, span in prompt.spans] == ["picture"]


def test_pictures_that_tools_return_belong_to_their_calls(builder: PromptBuilder) -> None:
    calls = [
        {"id": one, "type": "function", "function": {"name": "look", "arguments": "{}"}}
        for one in ("c1", "c2")
    ]
    first, second = (
        {"role": "tool", "tool_call_id": one, "content": [Image(shown)]}
        for one, shown in (("c1", RED), ("c2", BLUE))
    )
    asked = [{"role": "user", "content": "Look."}, {"role": "assistant", "tool_calls": calls}]
    in_order, as_they_came = (
        builder.build([*asked, *results], tools=[Tool("look", "looks")])
        for results in ((first, second), (second, first))
    )
    assert as_they_came.token_ids == in_order.token_ids
    assert [(at, one.digest) for at, one in as_they_came.spans] == [
        (at, one.digest) for at, one in in_order.spans
    ]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            [Video(np.zeros((2, 4, 4, 3), np.uint8), rate=2.0)],
            "pictures and sounds, and the conversation has a video",
        ),
        ([{"type": "image", "image": "cat.png"}], "part 0: image is a str, expected Image"),
        ([{"type": "image", "image": TONE}], "part 0: image is a Audio, expected Image"),
        ([{"type": "image", "image": Image(RED), "detail": "low"}], "unknown key 'detail'"),
        ([{"type": "image"}], "part 0: image is a NoneType, expected Image"),
        ([Image(RED)] * 257, "at most 256 pictures, sounds and videos, found 257"),
        ([Image("/nowhere/cat.png")], "cannot read the picture /nowhere/cat.png: No such file"),
    ],
)
def test_media_that_cannot_be_taken_are_refused_by_name(
    builder: PromptBuilder, content: list[object], sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        builder.build([{"role": "user", "content": content}])


def test_an_empty_file_is_bad_media(builder: PromptBuilder) -> None:
    with pytest.raises(BadMedia, match="the picture is empty"):
        builder.build([Image(b"")])


@pytest.mark.parametrize("role", ["system", "assistant"])
def test_only_a_user_or_a_tool_can_show_something(builder: PromptBuilder, role: str) -> None:
    with pytest.raises(UsageError, match=f"is a picture, and a message of role {role} takes text only"):
        builder.build([{"role": role, "content": [Image(RED)]}, {"role": "user", "content": "Hi"}])


def test_a_model_of_text_refuses_media_before_it_reads_them(tokenizer: Tokenizer) -> None:
    builder = PromptBuilder(tokenizer, vocab_size=tokenizer.vocab_size)
    with pytest.raises(UsageError, match="this model takes text only, and the conversation has a picture"):
        builder.build([Image("/nowhere/cat.png")])
    builder.close()


def test_a_template_without_places_for_media_is_named(tokenizer: Tokenizer) -> None:
    blind = Tokenizer(
        core(),
        config={"eos_token": SPECIAL[2]},
        chat_template="{% for message in messages %}{{ message.role }}{% endfor %}",
    )
    builder = PromptBuilder(blind, vocab_size=blind.vocab_size, media=Reader())
    with pytest.raises(
        UsageError, match="has 1 pictures, sounds and videos, and this model's chat template writes 0"
    ):
        builder.build([Image(RED)])
    builder.close()


def test_positions_of_media_count_towards_the_context(tokenizer: Tokenizer) -> None:
    reader = Reader()
    room = PromptBuilder(tokenizer, vocab_size=tokenizer.vocab_size, media=reader)
    num_tokens = len(room.build([Image(RED)]).token_ids or ())
    assert num_tokens == room.count_tokens([{"role": "user", "content": [Image(RED)]}])
    exact = PromptBuilder(
        tokenizer, vocab_size=tokenizer.vocab_size, media=reader, context_tokens=num_tokens + 1
    )
    assert exact.build([Image(RED)])
    short = PromptBuilder(tokenizer, vocab_size=tokenizer.vocab_size, media=reader, context_tokens=num_tokens)
    with pytest.raises(
        PromptTooLong, match=f"the prompt has {num_tokens} tokens, and the context holds {num_tokens}"
    ):
        short.build([Image(RED)])
    for one in (room, exact, short):
        one.close()


def test_an_answer_about_one_picture_is_not_remembered_for_another(tokenizer: Tokenizer) -> None:
    memory = ReplayMemory()
    builder = PromptBuilder(tokenizer, vocab_size=tokenizer.vocab_size, media=Reader(), memory=memory)

    def asked(picture: np.ndarray) -> list[object]:
        return [{"role": "user", "content": [Image(picture), Text("Which colour?")]}]

    first = builder.build(asked(RED), tenant="t")  # type: ignore[arg-type]
    # Not the tokens that the tokenizer would choose for this text.
    own = [token_id for letter in "brown" for token_id in ids_of(letter)]
    assert own != ids_of("brown")
    assert builder.remember("t", first, own, Answer("brown"))
    said = [{"role": "assistant", "content": "brown"}, {"role": "user", "content": "Sure?"}]

    def has_own(picture: np.ndarray) -> bool:
        ids = list(builder.build([*asked(picture), *said], tenant="t").token_ids or ())  # type: ignore[list-item]
        return any(ids[at : at + len(own)] == own for at in range(len(ids)))

    assert has_own(RED)
    assert not has_own(BLUE)
    builder.close()


def test_a_placeholder_that_the_model_wrote_is_no_picture(tokenizer: Tokenizer) -> None:
    memory = ReplayMemory()
    builder = PromptBuilder(tokenizer, vocab_size=tokenizer.vocab_size, media=Reader(), memory=memory)
    asked: list[Any] = [{"role": "user", "content": [Image(RED), Text("Which colour?")]}]
    first = builder.build(asked, tenant="t")
    written = [*ids_of("red"), core().token_to_id(PLACES["picture"])]
    answer = read_answer(written, builder.format, tokenizer, (), first)
    assert answer.text == "red"  # the client cannot see it
    assert builder.remember("t", first, written, answer)
    said: list[Any] = [{"role": "assistant", "content": "red"}, {"role": "user", "content": "Sure?"}]
    again = builder.build([*asked, *said], tenant="t")
    assert again.token_ids == builder.build([*asked, *said]).token_ids
    assert [at for at, _ in again.spans] == [at for at, _ in first.spans]
    builder.close()
