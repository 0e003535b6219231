"""Chat templates: the template's text and the caller's text stay apart, and rendering is bounded."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import jinja2
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from argosy.errors import CheckpointError, UsageError
from argosy.prompt.builder import PromptBuilder
from argosy.prompt.chat import ChatTemplate, Worker
from argosy.prompt.messages import Turn, check_messages
from argosy.prompt.prompt import Prompt
from argosy.prompt.taint import ShadowMap
from argosy.prompt.template_worker import Refused, _Generation, render_segments
from argosy.prompt.tokenizer import Tokenizer, text_of
from tests.prompt.templates_for_tests import ALL, LLAMA2, MIXTRAL, QWEN3, TRICKS
from tests.prompt.tokenizers_for_tests import CHATML, SPECIAL, STRUCTURAL, byte_level_json, llama_json

pytestmark = pytest.mark.usefixtures("as_users_have_them")
NOW = datetime.datetime(2026, 1, 2, 3, 4, 5)
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

Messages = list[dict[str, str]]
BYTE_LEVEL = Tokenizer(tokenizers.Tokenizer.from_str(byte_level_json()), config={"eos_token": "<|im_end|>"})
HI: Messages = [{"role": "user", "content": "Hi"}]
HI_TURNS = check_messages(HI)


def segments_of(template: str, messages: Messages, **variables: object) -> list[tuple[bool, str]]:
    fixed = {**SPECIAL_TOKENS, "add_generation_prompt": True}
    return render_segments(
        template, messages, fixed=fixed, variables=variables, max_characters=1 << 20, now=NOW
    )


@cache
def plain_template(source: str) -> jinja2.Template:
    """Compile as the hub does: with plain jinja2 and none of our code."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.globals["strftime_now"] = NOW.strftime
    return environment.from_string(source)


def plainly(template: str, messages: Messages, **variables: object) -> str:
    context = {**SPECIAL_TOKENS, "add_generation_prompt": True, **variables, "messages": messages}
    return plain_template(template).render(**context)


WORDS = """<|im_end|> <think> </think> <tool_response> </tool_response> [/INST] Hello cat é🙂 " \\ {{ 1 }} %s {} ß İ"""
words = st.sampled_from([*WORDS.split(" "), " ", "\n", "  x", "\n</think>\n", "\U00050000"])
contents = st.one_of(
    st.lists(words, max_size=8).map("".join), st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
)
turns = st.lists(contents, min_size=1, max_size=5)


@settings(deadline=None, max_examples=60)
@given(said=turns)
@pytest.mark.parametrize("name", ALL)
def test_templates_render_as_in_plain_jinja_and_show_who_wrote_what(name: str, said: list[str]) -> None:
    roles = ["user", "assistant"] * 3
    messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]
    segments = segments_of(ALL[name], messages)
    assert "".join(text for _, text in segments) == plainly(ALL[name], messages)

    # No caller's text is among the template's own text, which is the same whatever the messages say.
    if name in ("chatml", "llama2"):
        assert "".join(text for is_callers, text in segments if not is_callers) == plainly(
            ALL[name], [{**message, "content": ""} for message in messages]
        )


def test_caller_text_is_marked_wherever_the_template_puts_it() -> None:
    segments = segments_of(TRICKS, [{"role": "user", "content": "  CAT\nSAT "}])
    template_wrote = "".join(text for is_callers, text in segments if not is_callers)
    assert "CAT" not in template_wrote
    assert "SAT" not in template_wrote
    assert "cat" not in template_wrote
    callers = [text for is_callers, text in segments if is_callers]
    assert callers[0] == "CAT\nSAT"
    assert '"  CAT\\nSAT "' in callers


def test_trimmed_text_is_still_marked() -> None:
    messages = [{"role": "user", "content": "  hello \n"}]
    assert segments_of(LLAMA2, messages) == [(False, "<s>[INST] "), (True, "hello"), (False, " [/INST]")]


def test_thoughts_of_earlier_turns_are_removed_as_the_model_expects() -> None:
    messages = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "<think>\nfour\n</think>\n\n4"},
        {"role": "user", "content": "<think>no</think>"},
    ]
    segments = segments_of(QWEN3, messages, enable_thinking=False)
    assert [text for is_callers, text in segments if is_callers] == ["2+2?", "4", "<think>no</think>"]
    assert segments[-1] == (False, "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content | escape }}{% endfor %}",
        "{{ messages[0].content | urlencode }}",
        "{{ messages[0].content | wordwrap(3) }}",
        "{{ messages[0].content.split()[2] | int }}",
        "{{ messages[0].content.encode() }}",
    ],
)
def test_a_template_that_computes_new_text_from_the_callers_text_is_refused(template: str) -> None:
    messages = [{"role": "user", "content": "<b> x&y 42 words"}]
    with pytest.raises(Refused) as caught:
        segments_of(template, messages)
    assert caught.value.kind == "computed"


def test_caller_text_is_marked_inside_printed_lists_and_objects() -> None:
    said = "'<|im_end|>\n\"é"
    messages = [{"role": "user", "content": said, "more": {said: [said, None]}}]
    segments = segments_of(
        "{{ [messages[0].content] }}{{ messages[0].more | string }}{{ '%r' % 1 }}", messages
    )
    assert "".join(text for _, text in segments) == f"{[said]}{ {said: [said, None]} }1"
    assert "".join(text for is_callers, text in segments if not is_callers) == "[]{: [, None]}1"


def test_callers_cannot_forge_shadow_characters() -> None:
    said = "".join(map(chr, (0x40000, 0x40001, 0xDFFFF, 0x10FFFF))) + "<|im_end|>"
    segments = segments_of(CHATML, [{"role": "system", "content": said}, {"role": "user", "content": said}])
    assert [text for is_callers, text in segments if is_callers] == [said, said]
    with pytest.raises(Refused, match="planes 4 to 13"):
        segments_of(chr(0x40000), HI)


def test_every_character_has_its_own_shadow_and_is_restored() -> None:
    shadows = ShadowMap()
    unicode = "".join(map(chr, [*range(0x40000), *range(0xE0000, 0x110000)]))
    shared = "".join(map(chr, range(0xDFFFF, 0xDFFFF - 3 * 65_536, -1)))
    shadow = shadows.shadow(unicode + shared)
    assert len(set(shadow)) == len(shadow) == len(unicode + shared)
    assert min(shadow) == "\U00040000"
    assert max(shadow) == "\U000dffff"
    assert shadows.plain(shadow) == unicode + shared
    with pytest.raises(Refused, match="more than 196608 different characters that are not in Unicode"):
        segments_of(CHATML, [{"role": "user", "content": shared + chr(0x40000)}])


@pytest.mark.parametrize("marker", [*SPECIAL, *STRUCTURAL])
@pytest.mark.parametrize("role", ["system", "user", "tool"])
def test_no_marker_from_a_caller_becomes_a_control_token(marker: str, role: str) -> None:
    for template in (CHATML, QWEN3):
        counts = []
        for said in ("x", f"x{marker}y", marker, f"{marker[:3]}{marker}{marker[3:]}", f"end|>{marker}<|im_"):
            messages = [{"role": role, "content": said}, {"role": "user", "content": "ok"}]
            ids = BYTE_LEVEL.encode_segments(segments_of(template, messages))
            counts.append([i for i in ids if i in BYTE_LEVEL.control_ids])
        assert all(count == counts[0] for count in counts)


def test_variables_from_a_caller_are_marked_as_caller_text() -> None:
    segments = segments_of("{{ documents_title }}{{ messages[0].content }}", HI, documents_title="<|im_end|>")
    assert segments == [(True, "<|im_end|>Hi")]


def test_lists_are_written_and_changed_as_in_plain_jinja() -> None:
    for name in ("upper", "lower", "capitalize"):
        source = f"{{{{ [messages[0].content, 'b'] | {name} }}}}"
        segments = segments_of(source, HI)
        assert text_of(segments) == plainly(source, HI)
        assert segments[0][0]


# The process


@pytest.fixture
def chatml() -> Iterator[ChatTemplate]:
    template = ChatTemplate(CHATML)
    yield template
    template.close()


def test_rendered_segments_have_the_ids_of_the_whole_text(chatml: ChatTemplate) -> None:
    segments = chatml.segments(HI_TURNS)
    text = text_of(segments)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert BYTE_LEVEL.encode_segments(segments) == BYTE_LEVEL._core.encode(text, add_special_tokens=False).ids
    shorter = text_of(chatml.segments(HI_TURNS, add_generation_prompt=False))
    assert text.startswith(shorter)
    assert shorter.endswith("Hi<|im_end|>\n")


def test_one_process_is_reused_and_replaced_when_it_dies(chatml: ChatTemplate) -> None:
    first = chatml.segments(HI_TURNS)
    (worker,) = chatml._idle
    assert chatml.segments(HI_TURNS) == first
    assert chatml._idle == [worker]
    process = worker._process._process
    process.kill()
    process.wait()
    assert chatml.segments(HI_TURNS) == first


def test_a_process_that_takes_no_request_is_not_waited_for() -> None:
    worker, told = Worker(), []

    def ask() -> None:
        with pytest.raises(CheckpointError, match=r"did not finish within 0\.2 seconds"):
            worker.ask(b"a" * (1 << 22), 0.2)  # more than a pipe holds
        told.append(True)

    try:
        worker.ask(b'{"read": ""}', 30)
        worker._process._process.send_signal(signal.SIGSTOP)
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(20)
        assert told
    finally:
        worker.stop()


def test_a_slow_conversation_does_not_delay_the_next_one(
    chatml: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_slow, may_end, ask = threading.Event(), threading.Event(), Worker.ask

    def slowly(worker: Worker, request: bytes, seconds: float) -> dict[str, object]:
        if b"slow" in request:
            is_slow.set()
            assert may_end.wait(60)
        return ask(worker, request, seconds)

    monkeypatch.setattr(Worker, "ask", slowly)
    slow = threading.Thread(target=chatml.segments, args=[check_messages([HI[0] | {"content": "slow"}])])
    slow.start()
    try:
        assert is_slow.wait(60)
        quick = threading.Thread(target=chatml.segments, args=[HI_TURNS], daemon=True)
        quick.start()
        quick.join(20)
        assert not quick.is_alive()
    finally:
        may_end.set()
        slow.join()
    assert len(chatml._idle) == 2


def test_a_process_started_before_the_template_is_known_renders_it(chatml: ChatTemplate) -> None:
    worker = Worker()
    early = ChatTemplate(chatml.source, chatml._special_tokens, worker=worker)
    assert early.segments(HI_TURNS) == chatml.segments(HI_TURNS)
    assert early._idle == [worker]
    early.close()
    assert not worker.is_alive


def test_the_process_inherits_what_the_loader_needs_and_no_secret(
    chatml: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/python/lib")
    monkeypatch.setenv("TZ", "Pacific/Auckland")
    monkeypatch.setenv("ARGOSY_API_KEY", "ak-secret")
    monkeypatch.setenv("HF_TOKEN", "hf-secret")
    worker = Worker()
    try:
        worker.ask(json.dumps({"read": ""}).encode(), 5)
        found = Path(f"/proc/{worker._process._process.pid}/environ").read_bytes().split(b"\0")
    finally:
        worker.stop()
    names = {entry.partition(b"=")[0].decode() for entry in found if entry}
    assert names - {"NIX_LD", "NIX_LD_LIBRARY_PATH"} == {"LD_LIBRARY_PATH", "TZ"}
    assert b"LD_LIBRARY_PATH=/opt/python/lib" in found


def test_an_idle_process_exits_by_itself(chatml: ChatTemplate) -> None:
    chatml.segments(HI_TURNS)
    (worker,) = chatml._idle
    assert worker._process._process.wait(timeout=20) == 0
    assert chatml.segments(HI_TURNS)


def test_a_template_that_runs_too_long_is_stopped() -> None:
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    template = ChatTemplate(loops, render_seconds=0.5)
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=r"did not finish within 0\.5 seconds"):
        template.segments(HI_TURNS)
    assert time.monotonic() - start < 20
    assert not template._idle


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (
            "{% for a in range(99999) %}xxxxxxxxxxxxxxxxxxxxxxxxxxxxxx{% endfor %}",
            r"more than 1048\d{3} characters",
        ),
        ("{{ 'x' * 9999999 }}", r"more than 1048\d{3} characters"),
        ("{{ ('x' * 999999999) | length }}", "more memory"),
        (
            "{% set n = namespace(x='x') %}{% for a in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "more memory",
        ),
        ("{% if %}", "line 1"),
        ("{{ messages[0].content.nothing.here }}", "no attribute 'nothing'"),
        ("{{ nothing.here }}", "'nothing' is undefined"),
        ("{% include 'secrets' %}", "loader"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "unsafe"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ " + "(" * 5000 + "}}", "line|depth"),
        ("{{ " + "[" * 90 + "]" * 90 + "(1) }}", "line|depth|callable"),
    ],
)
def test_a_bad_template_fails_with_its_reason(source: str, sentence: str) -> None:
    template = ChatTemplate(source)
    with pytest.raises(CheckpointError, match=sentence):
        template.segments(HI_TURNS)
    template.close()


def test_a_format_string_cannot_reach_python_internals() -> None:
    assert segments_of("{{ '{0.__class__}x'.format(1) }}", HI) == [(False, "x")]


def test_a_template_s_own_refusal_is_quoted() -> None:
    template = ChatTemplate(MIXTRAL, SPECIAL_TOKENS)
    with pytest.raises(UsageError, match="refuses this conversation: Conversation roles must alternate"):
        template.segments([*HI_TURNS, *HI_TURNS])
    with pytest.raises(UsageError, match="does not support tool calls and their results"):
        template.segments([*HI_TURNS, Turn("tool", "4")])
    template.close()


def test_a_template_that_hides_who_wrote_its_text_is_refused_with_a_way_out() -> None:
    template = ChatTemplate("{{ messages[0].content | e }}")
    with pytest.raises(CheckpointError, match="cannot be used safely") as caught:
        template.segments(check_messages([{"role": "user", "content": "a < b"}]))
    assert "--raw" in str(caught.value.hint)
    template.close()


def test_the_process_needs_jinja2_alone() -> None:
    """It is started from the folder of jinja2, and its memory is planned without numpy."""
    code = (
        "import sys\n"
        "import argosy.prompt.template_worker\n"
        "print(*sorted({'numpy', 'blake3', 'tokenizers', 'pydantic'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60)
    assert done.stdout == b"\n"


def test_the_process_cannot_open_files() -> None:
    code = (
        "import sys; sys.path[:0] = %r\n"
        "from argosy.prompt import template_worker as w\n"
        "def answer(request):\n"
        "    try:\n"
        "        open('/etc/passwd')\n"
        "    except OSError as error:\n"
        "        return {'kind': 'x', 'message': str(error)}\n"
        "w._answer = answer\n"
        "w.main()\n"
    )
    paths = [
        str(Path(render_segments.__code__.co_filename).parents[2]),
        str(Path(jinja2.__file__).parents[1]),
    ]
    command = [sys.executable, "-I", "-S", "-c", code % paths]
    done = subprocess.run(command, input=b"{}\n", capture_output=True, check=True, timeout=60)
    assert b"Too many open files" in done.stdout


def test_a_long_message_is_rendered_in_time(chatml: ChatTemplate) -> None:
    said = "The quick brown fox é <|im_end|>\n" * 30_000
    segments = chatml.segments(check_messages([{"role": "user", "content": said}]))
    assert [text for is_callers, text in segments if is_callers] == [said]


# Variables


def test_reserved_and_structured_variables_are_refused(chatml: ChatTemplate) -> None:
    with pytest.raises(UsageError, match="variable 'messages' cannot be set"):
        chatml.segments(HI_TURNS, variables={"messages": None})
    with pytest.raises(UsageError, match="'tree' is a dict, expected text, a number or a boolean"):
        chatml.segments(HI_TURNS, variables={"tree": {"<|im_end|>": 1}})  # type: ignore[dict-item]


def test_only_variables_that_the_template_reads_can_be_set(chatml: ChatTemplate) -> None:
    with pytest.raises(UsageError, match="does not read the variable 'enable_thinking'; it reads: none"):
        chatml.segments(HI_TURNS, variables={"enable_thinking": False})
    template = ChatTemplate(QWEN3)
    text = text_of(template.segments(HI_TURNS, variables={"enable_thinking": False}))
    assert text.endswith("<think>\n\n</think>\n\n")
    with pytest.raises(UsageError, match="'range'; it reads: enable_thinking"):
        template.segments(HI_TURNS, variables={"range": 1})
    template.close()


# Every kind of prompt


def llama_tokenizer(template: str | None) -> Tokenizer:
    core = tokenizers.Tokenizer.from_str(llama_json())
    return Tokenizer(core, config=SPECIAL_TOKENS, chat_template=template)


def test_a_string_is_one_user_message_when_there_is_a_template() -> None:
    builder = PromptBuilder(llama_tokenizer(MIXTRAL), vocab_size=600)
    prompt = builder.build("Hi")
    assert prompt.text == "<s> [INST] Hi [/INST]"
    assert prompt == builder.build(HI)
    assert prompt.token_ids is not None
    assert prompt.token_ids.count(1) == 1
    builder.close()


def test_raw_text_gets_bos_and_no_template() -> None:
    for template in (MIXTRAL, None):
        tokenizer = llama_tokenizer(template)
        builder = PromptBuilder(tokenizer, vocab_size=600)
        assert builder.build(Prompt.raw("Hi <s>")).token_ids == (1, *tokenizer.encode("Hi <s>"))
    assert builder.build("Hi") == builder.build(Prompt.raw("Hi"))


def test_token_ids_are_used_as_they_are() -> None:
    import numpy as np

    builder = PromptBuilder(None, vocab_size=10)
    assert builder.build([1, 2, 9]).token_ids == (1, 2, 9)
    assert builder.build(np.array([1, 2])).token_ids == (1, 2)  # type: ignore[arg-type]
    assert builder.build(Prompt((3,))).token_ids == (3,)


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        ([], "at least one token"),
        ([10], "token id 10 is not in the vocabulary, 0 to 9"),
        ([-1], "token id -1"),
        ([1, "a"], "found a mixture"),
        ([1.5], "found a mixture"),
        ([True], "found a mixture"),
        ("text", "no tokenizer.json, so it cannot take text"),
        (HI, "no tokenizer.json, so it cannot take messages"),
        (Prompt.raw("x"), "no tokenizer.json"),
    ],
)
def test_an_invalid_prompt_is_refused_with_the_reason(request_: object, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        PromptBuilder(None, vocab_size=10).build(request_)  # type: ignore[arg-type]


def test_messages_to_a_model_without_a_template_are_refused_with_a_way_out() -> None:
    with pytest.raises(UsageError, match="no chat template") as caught:
        PromptBuilder(llama_tokenizer(None), vocab_size=600).build(HI)
    assert "Prompt.raw" in str(caught.value.hint)


def test_a_template_is_rendered_while_a_thousand_files_are_open(chatml: ChatTemplate) -> None:
    """A server with many connections has file descriptors too large for `select`."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(2048, before[1]), before[1]))
    try:
        with contextlib.ExitStack() as stack:
            for _ in range(1100):
                stack.enter_context(Path(os.devnull).open("rb"))
            late = ChatTemplate(chatml.source, chatml._special_tokens, worker=Worker())
            stack.callback(late.close)
            assert late._idle[0]._process._process.stdout is not None
            assert late._idle[0]._process._process.stdout.fileno() > 1023
            assert late.segments(HI_TURNS) == chatml.segments(HI_TURNS)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
