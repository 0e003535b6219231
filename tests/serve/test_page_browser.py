"""The page in a real browser: headless Chromium, under the page's own content policy.

Most tests use a fake server that answers as a test wants; the last use the real server with a tiny model.
"""

from __future__ import annotations

import base64
import io
import shutil
import subprocess
import time
import wave as wave_file
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from argosy.cli.commands.chat_room import summary_question
from argosy.guard.keys import KeyRing
from argosy.media.parts import PROMPT_LIMITS
from argosy.media.parts import Image as Picture
from argosy.open.engine import Engine
from argosy.serve.app import make_app
from argosy.serve.http.held import MEDIA_BODY_BYTES
from tests.cli.tiny_chat_model import write_chat_model
from tests.media.samples import pattern, png, wav, wave
from tests.serve.conftest import only, serving, start
from tests.serve.fake_server import CONTEXT_TOKENS, fake_server
from tests.serve.page_browser import CONTRAST, Browser, Keys, seen_on, webdriver
from tests.serve.seeing_model import write_seeing_model

# A conversation


def test_a_conversation_streams_and_sends_its_earlier_turns(browser: Browser) -> None:
    browser.open()
    browser.say("hello there")
    browser.wait_for_the_answer()
    assert browser.answer == "You said: hello there (1 messages, answer 1)"
    browser.say("and again")
    browser.until(lambda: "answer 2" in browser.answer)
    assert browser.server.conversations[1] == [
        {"role": "user", "content": "hello there"},
        {"role": "assistant", "content": "You said: hello there (1 messages, answer 1)"},
        {"role": "user", "content": "and again"},
    ]
    body = browser.server.requests[-1][1]
    assert (body["model"], body["stream"], body["return_progress"]) == ("Qwen3-30B-A3B-Q4_K_M", True, True)
    assert body["stream_options"] == {"include_usage": True}
    assert browser.complaints() == []


def test_the_bar_shows_how_much_of_the_prompt_has_been_read(browser: Browser) -> None:
    browser.server.token_s = 0.05
    browser.open()
    browser.say("slow")
    seen = set()

    def read() -> bool:
        seen.add(browser.text(".turn.assistant .progress"))
        return "word 0" in browser.answer

    browser.until(read)
    start = "Reading the prompt: 0 of 400 tokens, 7 from the prefix cache"
    assert f"{start}; the next file is 42 % encoded" in seen
    assert "Reading the prompt: 100 of 400 tokens, 7 from the prefix cache" in seen
    assert "Reading the prompt: 300 of 400 tokens, 7 from the prefix cache" in seen
    assert not browser.one(".turn.assistant .progress").is_displayed()


def test_stop_ends_the_request_and_keeps_the_text_so_far(browser: Browser) -> None:
    browser.open()
    browser.say("slow")
    browser.until(lambda: "word 9" in browser.answer)
    browser.one("#stop").click()
    browser.wait_for_the_answer("stopped")
    browser.until(lambda: browser.server.disconnects == 1)
    kept = browser.answer
    assert "word 9" in kept
    assert browser.text(".turn.assistant .note") == "Stopped."
    assert browser.one("#send").is_displayed()
    assert browser.answer == kept
    browser.say("go on")
    browser.wait_for_the_answer()
    assert browser.server.conversations[1][1]["content"].rstrip() == kept
    assert browser.complaints() == []


def test_regenerate_sends_the_same_request_without_the_old_answer(browser: Browser) -> None:
    browser.open()
    browser.say("one")
    browser.wait_for_the_answer()
    browser.press_button("Regenerate")
    browser.until(lambda: "answer 2" in browser.answer)
    assert browser.server.conversations == [[{"role": "user", "content": "one"}]] * 2
    assert len(browser.all(".turn")) == 2


def test_a_message_can_be_edited_or_left_as_it_is(browser: Browser) -> None:
    browser.open()
    for text in ("first", "secnod"):
        browser.say(text)
        browser.wait_for_the_answer()
        browser.until(lambda text=text: text in browser.answer and browser.one("#send").is_displayed())
    edit = "[aria-label=You]:nth-last-child(2) .tools button:last-child"
    browser.one(edit).click()
    browser.press(Keys.ESCAPE)
    assert [said.text for said in browser.all(".said")] == ["first", "secnod"]
    assert browser.focus == "Edit"
    browser.one(edit).click()
    field = browser.one(".editor textarea")
    field.clear()
    field.send_keys("second")
    browser.press_button("Send again")
    browser.until(lambda: "You said: second" in browser.answer)
    assert [said.text for said in browser.all(".said")] == ["first", "second"]
    assert [message["content"] for message in browser.server.conversations[2]][::2] == ["first", "second"]


def test_reasoning_is_folded_and_not_sent_back_to_the_model(browser: Browser) -> None:
    browser.open()
    browser.say("think")
    browser.wait_for_the_answer()
    assert browser.text(".reasoning .text") == "Let me think about it."
    assert browser.text(".reasoning summary").startswith("Thought for ")
    assert browser.one(".reasoning").get_attribute("open") is None
    browser.one(".reasoning summary").click()
    assert browser.one(".reasoning .text").is_displayed()
    browser.say("next")
    browser.until(lambda: len(browser.server.conversations) == 2)
    assert "Let me think" not in str(browser.server.conversations[1])


def test_an_answer_that_was_all_thoughts_says_so(browser: Browser) -> None:
    browser.open()
    browser.say("think of nothing")
    browser.wait_for_the_answer()
    assert browser.text(".turn.assistant .note") == (
        "All tokens that the answer may have went into thoughts. Allow more in Settings, or turn thinking off."
    )


def test_a_models_text_is_shown_and_never_becomes_html(browser: Browser) -> None:
    browser.open()
    browser.say("markdown")
    browser.wait_for_the_answer()
    counts = {
        "h3 em": 1, "strong": 1, "del": 1, "ul > li": 4, "ul ul > li": 1, "ol[start='3'] > li": 2, "blockquote": 1,
        "td.right": 1, "figure.code": 1, "a": 3, "img": 0, "script": 0,
    }  # fmt: skip
    assert {name: len(browser.all(f".turn.assistant .text {name}")) for name in counts} == counts
    assert browser.text(".turn.assistant pre") == 'def f(x):\n    return "<img src=x onerror=alert(1)>"'
    links = [link.get_attribute("href") for link in browser.all(".turn.assistant .text a")]
    assert links == ["https://example.org/a_(b)", "https://example.org/x", "https://example.org/p.png"]
    assert "[trap](javascript:alert(1))" in browser.answer
    assert "snake_case_name" in browser.answer
    assert "quoted <script>alert(1)</script>" in browser.answer
    assert browser.complaints() == []  # a request for a picture or a script would be in the console


@pytest.mark.parametrize(
    ("text", "state", "sentence"),
    [
        ("fail", "failed", "the drive refused a read"),
        ("busy", "failed", "all places are taken; try again in 2 min 0 s"),
    ],
)
def test_a_failed_answer_shows_its_reason_and_can_be_retried(
    browser: Browser, text: str, state: str, sentence: str
) -> None:
    browser.open()
    browser.say(text)
    browser.wait_for_the_answer(state)
    assert browser.text(".turn.assistant .note") == sentence
    browser.press_button("Try again")
    browser.until(lambda: len(browser.server.conversations) == 2)
    assert browser.server.conversations[0] == browser.server.conversations[1]


def test_a_message_that_does_not_fit_is_refused_in_the_pages_own_words(browser: Browser) -> None:
    browser.open()
    browser.say("too long")
    browser.wait_for_the_answer("failed")
    assert browser.text(".turn.assistant .note") == (
        "The context is full: this message alone does not fit into 32,768 tokens. Shorten it, or start the server "
        "with a larger --context."
    )
    assert [button.text for button in browser.all(".turn.assistant .tools button")] == ["Try again"]


@pytest.mark.parametrize(
    ("text", "note"),
    [("lost", "The connection to the server was lost."), ("break", "the drive refused a read")],
)
def test_an_answer_that_breaks_off_keeps_its_text_and_can_be_continued(
    browser: Browser, text: str, note: str
) -> None:
    browser.open()
    browser.say(text)
    browser.wait_for_the_answer("stopped")
    assert (browser.answer, browser.text(".turn.assistant .note")) == ("Half an", note)
    browser.press_button("Continue")
    browser.until(lambda: len(browser.server.conversations) == 2)
    asked = {"role": "assistant", "content": "Half an "}
    assert browser.server.conversations[1][-1] == asked


def test_a_busy_server_is_asked_again_and_the_page_says_when(browser: Browser) -> None:
    browser.open()
    browser.server.num_busy = 2
    browser.say("hello")
    told = "The server is busy: 2 requests wait. Trying again in 1 s Cancel"
    browser.until(lambda: browser.text(".turn.assistant .progress") == told)
    browser.wait_for_the_answer()
    assert len(browser.server.conversations) == 3
    browser.server.num_busy = 1000
    browser.say("hello")
    browser.until(lambda: browser.text(".turn.assistant:last-child .progress") == told)
    browser.press_button("Cancel")
    browser.wait_for_the_answer("stopped")
    assert browser.one("#send").is_displayed()


def test_an_answer_that_filled_the_context_goes_on_without_the_oldest_turns(browser: Browser) -> None:
    browser.open()
    browser.say("hello")
    browser.until(lambda: browser.one("#send").is_displayed() and "hello" in browser.answer)
    browser.server.fills_context = True
    browser.say("again")
    told = (
        "The context is full: 32,768 tokens are used. Nothing is lost: drop or summarise the oldest turns, and the "
        "answer goes on."
    )
    browser.until(lambda: browser.text(".turn.assistant:last-child .note") == told)
    begun = browser.answer
    browser.server.fills_context = False
    browser.press_button("Drop the oldest turns")
    browser.until(lambda: "(2 messages" in browser.answer and browser.one("#send").is_displayed())
    assert browser.answer.startswith(begun)
    assert [said["content"] for said in browser.server.conversations[-1]] == ["again", begun]


def test_a_conversation_that_does_not_fit_leaves_out_what_the_page_names(browser: Browser) -> None:
    browser.open()
    for turn in ("long one", "long two"):
        browser.say(turn)
        browser.until(lambda turn=turn: turn in browser.answer and browser.one("#send").is_displayed())
    browser.say("long three")
    browser.wait_for_the_answer("failed")
    browser.press_button("Drop the oldest turns")
    browser.wait_for_the_answer()
    sent = browser.server.conversations[-1]
    assert [said["content"] for said in sent if said["role"] == "user"] == ["long two", "long three"]
    told = (
        "To fit the context, the first 2 messages are left out: \u201clong one\u201d and its answer. "
        "The model does not read them."
    )
    assert browser.text(".turn.assistant:last-child .left-out") == told
    browser.say("next")
    browser.until(lambda: "next" in browser.answer)
    assert browser.server.conversations[-1][0]["content"] == "long two"
    browser.driver.refresh()
    browser.until(
        lambda: [node.text for node in browser.all(".left-out")] == [told]
    )  # once, where it changed


def test_a_full_context_is_summarised_in_the_words_of_the_chat_and_the_summary_is_shown(
    browser: Browser,
) -> None:
    question = summary_question(CONTEXT_TOKENS // 8)
    browser.open()
    for turn in ("long one", "long two"):
        browser.say(turn)
        browser.until(lambda turn=turn: turn in browser.answer and browser.one("#send").is_displayed())
    browser.say("long three")
    browser.wait_for_the_answer("failed")
    browser.press_button("Summarise the oldest turns")
    browser.wait_for_the_answer()
    asked = [body for path, body in browser.server.requests if path == "/v1/chat/completions"][-2]
    assert [said["content"] for said in asked["messages"]][::2] == ["long one", question]
    assert (asked["max_tokens"], asked["enable_thinking"]) == (CONTEXT_TOKENS // 8, False)
    summary = f"You said: {question} (3 messages, answer 4)"
    sent = [said["content"] for said in browser.server.conversations[-1]]
    assert (sent[:3], len(sent)) == ([question, summary, "long two"], 5)
    assert browser.text(".left-out p") == (
        "To fit the context, the model reads a summary in place of the first 2 messages: \u201clong one\u201d and its "
        "answer."
    )
    kept = (
        "const [done] = arguments; indexedDB.open('argosy').onsuccess = ({ target: { result: base } }) => {"
        "  base.transaction('messages').objectStore('messages').getAll().onsuccess = ({ target }) => {"
        "    base.close(); done(target.result.map((one) => one.state === 'done' && one.summary).filter(Boolean));"
        "  };"
        "};"
    )
    browser.until(lambda: browser.driver.execute_async_script(kept) == [summary])  # type: ignore[no-untyped-call]
    browser.driver.refresh()
    browser.until(lambda: browser.text(".left-out details p") == summary)
    browser.say("next")
    browser.until(lambda: "next" in browser.answer)
    assert [said["content"] for said in browser.server.conversations[-1]][:3] == sent[:3]


@pytest.mark.parametrize("policy", ["trim", "summarise"])
def test_a_policy_makes_room_by_itself_and_says_so(browser: Browser, policy: str) -> None:
    browser.open()
    browser.press_button("Settings")
    browser.script("document.getElementById('policy').value = arguments[0]", policy)
    browser.one("#save-settings").click()
    for turn in ("long one", "long two", "long three"):
        browser.say(turn)
        browser.until(lambda turn=turn: turn in browser.answer and browser.one("#send").is_displayed())
    browser.until(lambda: len(browser.all(".left-out")) == 1)
    asked = [said["content"] for said in browser.server.conversations[-1] if said["role"] == "user"]
    question = [] if policy == "trim" else [summary_question(CONTEXT_TOKENS // 8)]
    assert asked == [*question, "long two", "long three"]


def test_a_summary_that_is_stopped_drops_nothing(browser: Browser) -> None:
    browser.open()
    for turn in ("long one", "long two", "long three"):
        browser.say(turn)
        browser.until(lambda: browser.one("#send").is_displayed() and len(browser.all(".turn")) % 2 == 0)
    browser.server.num_busy = 1000
    browser.press_button("Summarise the oldest turns")
    browser.until(lambda: "busy" in browser.text(".turn.assistant:last-child .progress"))
    browser.one("#stop").click()
    browser.wait_for_the_answer("failed")
    told = "The context is full. The summary was stopped, so nothing was dropped."
    assert browser.text(".turn.assistant:last-child .note") == told
    assert browser.all(".left-out") == []
    browser.server.num_busy = 0
    browser.press_button("Drop the oldest turns")
    browser.wait_for_the_answer()


def test_the_page_stays_at_the_end_when_an_answer_fails(browser: Browser) -> None:
    browser.open()
    for text, state in (("markdown", "done"), ("markdown again", "done"), ("fail", "failed")):
        turns = len(browser.all(".turn"))
        browser.say(text)
        browser.until(lambda turns=turns: len(browser.all(".turn")) == turns + 2)
        browser.wait_for_the_answer(state)
    below = (
        "const at = document.getElementById('scroll');return at.scrollHeight - at.scrollTop - at.clientHeight"
    )
    browser.until(lambda: browser.script(below) < 2)


def test_a_failed_answer_is_not_sent_back_and_two_questions_in_a_row_are_joined(browser: Browser) -> None:
    browser.open()
    browser.say("think, fail")
    browser.wait_for_the_answer("failed")
    browser.say("hello")
    browser.until(lambda: len(browser.server.conversations) == 2)
    assert browser.server.conversations[1] == [{"role": "user", "content": "think, fail\n\nhello"}]


def test_a_new_chat_without_keeping_forgets_the_conversation_and_can_be_undone(browser: Browser) -> None:
    browser.open()
    browser.one("#keeping").click()
    browser.say("one")
    browser.wait_for_the_answer()
    browser.press_button("New chat")
    assert browser.all(".turn") == []
    browser.press_button("Undo")
    assert len(browser.all(".turn")) == 2
    browser.press_button("New chat")
    browser.say("two")
    browser.wait_for_the_answer()
    assert browser.server.conversations[-1] == [{"role": "user", "content": "two"}]
    assert not browser.one("#notice").is_displayed()


@pytest.mark.parametrize("has_watermark", [False, True])
def test_the_page_says_that_a_machine_writes_and_whether_it_marks_what_it_writes(
    browser: Browser, has_watermark: bool
) -> None:
    browser.server.has_watermark = has_watermark
    browser.open()
    browser.until(lambda: browser.one("#watermark").is_displayed() == has_watermark)
    browser.say("hello")
    browser.wait_for_the_answer()
    notice = browser.one(".by-machine")
    assert notice.is_displayed()
    assert notice.text.startswith("An AI model writes the answers.")
    assert notice.text.endswith("Answers carry a watermark.") == has_watermark


def test_a_new_chat_stops_the_running_answer(browser: Browser) -> None:
    browser.open()
    browser.say("slow")
    browser.until(lambda: "word 2" in browser.answer)
    browser.press_button("New chat")
    browser.until(lambda: browser.server.disconnects == 1)
    assert browser.one("#send").is_displayed()
    browser.until(lambda: browser.all("#chat-list .chat"))
    browser.one("#chat-list .chat").click()
    browser.until(lambda: browser.text(".turn.assistant .note") == "Stopped.")
    assert "word 2" in browser.answer
    assert browser.one("#send").is_displayed()


def test_nothing_moves_when_reduced_motion_is_preferred(browser: Browser) -> None:
    wish = {"features": [{"name": "prefers-reduced-motion", "value": "reduce"}]}
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", wish)  # type: ignore[no-untyped-call]
    try:
        browser.open()
        browser.server.token_s = 0.05
        browser.say("slow")
        browser.until(lambda: browser.all("progress"))
        moving = browser.script(
            "return [...document.querySelectorAll('*')].map((node) => getComputedStyle(node)).filter((style) =>"
            " style.animationName !== 'none' || style.transitionDuration !== '0s').length"
        )
        assert moving == 0
    finally:
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})  # type: ignore[no-untyped-call]


# Code in colours

CODE = {
    "python": (
        "# why\nx = f(1.5, 'a\\'b')\nreturn x",
        {"comment": 1, "number": 1, "string": 1, "keyword": 1, "call": 1},
    ),
    "js": (
        "const a = `b\n${c}`; // d\n/* e\nf */ 0xff",
        {"keyword": 1, "string": 1, "comment": 2, "number": 1},
    ),
    "rust": ("fn f<'a>(x: &'a str) { 'x' }", {"keyword": 1, "string": 1}),
    "diff": ("@@ -1 +1 @@\n-a\n+b\n c", {"comment": 1, "removed": 1, "added": 1}),
    "SQL": ("SELECT 1 FROM t -- all", {"keyword": 2, "number": 1, "comment": 1}),
    "sh": ('echo "$#" # done', {"string": 1, "comment": 1}),
    "json": ('{"a": [1, true]}', {"string": 1, "number": 1, "keyword": 1}),
    "html": ('<!-- x --><a href="/y">it\'s</a>', {"comment": 1, "keyword": 4, "string": 1}),
    "unknown": ("if 1: # no", {}),
    "": ("if 1: # no", {}),
}
HIGHLIGHT = """
const [samples, done] = arguments;
import('/page/highlight.js').then(({ highlight, MOST_SPANS }) => done(samples.map(([language, text]) => {
  const code = document.createElement('code');
  code.append(...highlight(text, language));
  const spans = [...code.children];
  return {
    isSame: code.textContent === text,
    isBounded: spans.length <= MOST_SPANS,
    isPlain: spans.every((span) => span.tagName === 'SPAN' && !span.children.length),
    names: spans.slice(0, 20).map((span) => span.className.replace('code-', '')),
  };
})));
"""


def highlighted(browser: Browser, samples: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return browser.driver.execute_async_script(HIGHLIGHT, samples)  # type: ignore[no-untyped-call, no-any-return]


def test_comments_strings_numbers_and_keywords_are_highlighted(browser: Browser) -> None:
    browser.open()
    found = highlighted(browser, [(language, text) for language, (text, _) in CODE.items()])
    for (language, (_, expected)), one in zip(CODE.items(), found, strict=True):
        assert one["isSame"], language
        assert {name: one["names"].count(name) for name in set(one["names"])} == expected, language
    browser.say("markdown")
    browser.wait_for_the_answer()
    assert browser.text(".turn.assistant pre .code-keyword") == "def"


UNENDING = (
    "/*", "//", '"', "'", "`", '"' * 3, "'" * 3, "\\", "0x", "1e", "a", "1 ", "if ", "<", "<!--", "--[[", "#", " #",
    "$", '"\\', "`\\", "<script>alert(1)</script>",
)  # fmt: skip


def test_long_code_keeps_its_text_and_takes_a_bounded_number_of_nodes(browser: Browser) -> None:
    browser.open()
    languages = ("python", "js", "rust", "go", "sql", "lua", "html", "yaml", "css", "c#")
    samples = [(language, piece * (60_000 // len(piece))) for piece in UNENDING for language in languages]
    for sample, one in zip(samples, highlighted(browser, samples), strict=True):
        assert one["isSame"], (sample[0], sample[1][:10])
        assert one["isBounded"], (sample[0], sample[1][:10])
        assert one["isPlain"], (sample[0], sample[1][:10])
    assert browser.complaints() == []


# The engine


def test_the_memory_bar_follows_the_engine_and_has_a_text_alternative(browser: Browser) -> None:
    browser.open()
    browser.until(lambda: browser.text("#memory-total"))
    assert browser.text("#memory-total").startswith("limit 12.0 GiB, peak so far 10.1 GiB")
    names = [row.text for row in browser.all("#memory-legend .name")]
    assert names == ["dense weights", "KV cache", "expert cache", "unused", "peak so far"]
    rest = [row.text for row in browser.all("#memory-rest .name")]
    assert (browser.text("#memory-more-title"), rest) == ("3 more", [""] * 3)  # folded
    browser.one("#memory-more-title").click()
    rest = [row.text for row in browser.all("#memory-rest .name")]
    assert rest == ["process", "working buffers", "staging"]
    label = browser.one("#memory-bar").get_attribute("aria-label")
    assert "expert cache 6.9 GiB" in label

    fills, peak = drawn(browser)
    browser.say("slow")
    browser.until(lambda: drawn(browser)[0] != fills and drawn(browser)[1] != peak)
    browser.until(lambda: "10.1 GiB" not in browser.text("#memory-total"))
    browser.until(lambda: browser.text("#queue").startswith("1 running of 4"))
    assert browser.text("#decode") == "11.4 tok/s"
    assert browser.text("#drive") == "2.10 GB/s"
    assert browser.text("#hit-rate") == "0.83"
    assert browser.text("#recent") == "0.81; LRU 0.79, best possible 0.90, over 512 tokens"
    label = browser.one("#time-bar").get_attribute("aria-label")
    assert (
        label == "Where the last 10.0 s went: router 0.50 s, expert compute 6.25 s, other, and idle 3.25 s."
    )


def drawn(browser: Browser) -> list[str]:
    """The drawn widths of the parts, and the position of the peak."""
    return browser.script(  # type: ignore[no-any-return]
        "const all = (name) => [...document.querySelectorAll(`#memory-bar ${name}`)];"
        "return [all('.fill').map((node) => node.style.width).join(), all('.peak')[0].style.left]"
    )


def test_unused_memory_is_shown_with_its_reason(browser: Browser) -> None:
    browser.open()
    browser.until(lambda: browser.text("#memory-total"))
    reason = "#memory-legend li:nth-last-child(2) .remark"
    assert browser.text(reason) == "the cache is fixed at 2,480 experts; --memory lets it grow"
    browser.server.expert_slots = 48 * 128
    browser.until(lambda: browser.text(reason) == "every expert is in memory")


def test_each_value_of_the_panel_is_beside_its_label(browser: Browser) -> None:
    browser.open()
    browser.until(lambda: browser.text("#resident"))
    rows = browser.script(
        "const rows = [...document.querySelectorAll('.facts > div:not(#recent-row)')];"
        "return rows.filter((row) => row.checkVisibility()).map((row) =>"
        " [...row.children].map((cell) => [cell.textContent, cell.getBoundingClientRect().top, cell.offsetHeight]))"
    )
    assert len(rows) == 4
    for label, value in rows:
        assert value[1:] == label[1:], value[0]  # each takes one line, and it is the same line


def test_the_heat_map_changes_with_use_and_has_a_text_alternative(browser: Browser) -> None:
    browser.open()
    browser.until(lambda: browser.one("#heat").is_displayed())
    picture = "return document.getElementById('heat-map').toDataURL()"
    before = browser.script(picture)
    assert "48 layers of 128 experts" in browser.one("#heat-map").get_attribute("aria-label")
    browser.say("slow")
    browser.until(lambda: browser.script(picture) != before)
    browser.one("#heat summary").click()
    browser.until(lambda: len(browser.all("#heat-table tbody tr")) == 48)
    browser.script("document.getElementById('heat-map').focus()")
    browser.press(Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    assert browser.text("#heat-reading").startswith("Layer 1, expert 1: ")


def test_without_counts_there_is_no_heat_map(browser: Browser) -> None:
    browser.server.shows_heat = False
    browser.open()
    browser.until(lambda: browser.text("#memory-total"))
    assert not browser.one("#heat").is_displayed()


def test_the_ledger_of_the_last_answer_is_shown(browser: Browser) -> None:
    browser.open()
    assert not browser.one("#answer").is_displayed()
    browser.say("hello")
    browser.wait_for_the_answer()
    assert browser.text(".turn.assistant .ledger") == (
        "3 tokens \u00b7 11.4 tok/s \u00b7 first after 0.42 s \u00b7 hit rate 0.83 \u00b7 1.3 GB read"
    )
    assert "waiting for reads 1.16 s" in browser.one("#answer-bar").get_attribute("aria-label")
    assert "40 prompt, 3 new" in browser.text("#answer-facts")


def test_the_privacy_state_is_shown(browser: Browser) -> None:
    browser.open()
    browser.until(lambda: browser.text("#privacy"))
    assert browser.text("#privacy").startswith("Prompts and answers are not logged. Routing traces are off.")


# Pictures and sounds

CAT = png(pattern(40, 60))
TONE = wav(wave(0.5, 16_000), 16_000)


def data_url(content: bytes, form: str) -> str:
    return f"data:{form};base64,{base64.b64encode(content).decode()}"


def picture_part(content: bytes, form: str = "image/png") -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(content, form)}}


def sound_part(content: bytes, form: str = "wav") -> dict[str, Any]:
    return {
        "type": "input_audio",
        "input_audio": {"data": base64.b64encode(content).decode(), "format": form},
    }


@pytest.fixture
def seeing(browser: Browser) -> Browser:
    """The page of a model that takes pictures and sounds."""
    browser.server.inputs = ["text", "image", "audio"]
    browser.open()
    browser.until(lambda: browser.one("#record").is_displayed())
    return browser


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    made = {"cat.png": CAT, "tone.wav": TONE, "notes.txt": b"hello"}
    for name, content in made.items():
        (tmp_path / name).write_bytes(content)
    return {name: tmp_path / name for name in made}


def choose(browser: Browser, *paths: Path) -> None:
    browser.one("#files").send_keys("\n".join(map(str, paths)))


def facts(browser: Browser) -> list[str]:
    """The texts beside the attachments."""
    return [node.text for node in browser.all("#attachments .facts-line")]


def last_content(browser: Browser) -> Any:
    return browser.server.conversations[-1][-1]["content"]


def test_a_picture_and_a_sound_are_shown_counted_and_sent(seeing: Browser, files: dict[str, Path]) -> None:
    choose(seeing, files["cat.png"], files["tone.wav"])
    seeing.until(lambda: facts(seeing) == ["256 tokens", "13 tokens"])
    image, sound = seeing.one("#attachments img"), seeing.one("#attachments audio")
    assert (image.get_attribute("alt"), sound.get_attribute("aria-label")) == ("cat.png", "tone.wav")
    seeing.until(lambda: seeing.script("return arguments[0].naturalWidth", image) == 60)
    seeing.until(lambda: seeing.script("return arguments[0].duration", sound) == 0.5)
    seeing.one("#prompt").send_keys("What is this?")
    seeing.until(lambda: seeing.text("#attachments-total") == "269 tokens of attachments + 3 of text")
    seeing.press(Keys.ENTER)
    seeing.wait_for_the_answer()
    content = [picture_part(CAT), sound_part(TONE), {"type": "text", "text": "What is this?"}]
    assert last_content(seeing) == content
    assert not seeing.one("#attachments").is_displayed()
    assert seeing.text("#attachments-total") == ""
    assert seeing.one(".turn.user img").get_attribute("alt") == "cat.png"
    assert seeing.one(".turn.user audio").get_attribute("aria-label") == "tone.wav"
    seeing.say("And now?")
    seeing.until(lambda: len(seeing.server.conversations) == 2)
    assert seeing.server.conversations[1][0]["content"] == content
    assert last_content(seeing) == "And now?"
    assert seeing.complaints() == []


GIVEN = """
const [how, name, type, base64] = arguments;
const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
const transfer = new DataTransfer();
transfer.items.add(new File([bytes], name, { type }));
const init = { bubbles: true, cancelable: true };
const target = document.getElementById('prompt');
const event = how === 'paste'
  ? new ClipboardEvent('paste', { ...init, clipboardData: transfer })
  : new DragEvent(how, { ...init, dataTransfer: transfer });
target.dispatchEvent(event);
return event.defaultPrevented;
"""


def give(browser: Browser, how: str, name: str, form: str, content: bytes) -> bool:
    """Paste or drop a file; return whether the page took it."""
    return bool(browser.script(GIVEN, how, name, form, base64.b64encode(content).decode()))


@pytest.mark.parametrize("how", ["paste", "drop"])
def test_files_can_be_pasted_and_dropped(seeing: Browser, how: str) -> None:
    if how == "drop":
        give(seeing, "dragenter", "cat.png", "image/png", CAT)
        assert seeing.all(".composer.dropping")
        assert give(seeing, "dragover", "cat.png", "image/png", CAT)
    assert give(seeing, how, "cat.png", "image/png", CAT)
    assert not seeing.all(".composer.dropping")
    assert give(seeing, how, "tone.flac", "", b"fLaC")  # the system knows no type
    seeing.until(lambda: facts(seeing) == ["256 tokens", "13 tokens"])
    assert seeing.focus == "prompt"
    seeing.press(Keys.ENTER)  # a message needs no text
    seeing.wait_for_the_answer()
    assert last_content(seeing) == [picture_part(CAT), sound_part(b"fLaC", "flac")]
    assert seeing.complaints() == []


needs_ffmpeg = pytest.mark.skipif(
    shutil.which("ffmpeg") is None, reason="needs the program ffmpeg (`apt install ffmpeg`)"
)


def video_part(content: bytes, form: str = "video/webm") -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": data_url(content, form)}}


@pytest.fixture
def watching(browser: Browser) -> Browser:
    """The page of a model that takes pictures, sounds and videos."""
    browser.server.inputs = ["text", "image", "audio", "video"]
    browser.open()
    browser.until(lambda: browser.one("#record").is_displayed())
    return browser


@needs_ffmpeg
def test_a_video_is_played_counted_and_sent(watching: Browser, tmp_path: Path) -> None:
    path = tmp_path / "clip.webm"
    source = ("-f", "lavfi", "-i", "testsrc=size=64x48:rate=10:duration=2")
    subprocess.run(["ffmpeg", "-v", "error", *source, "-c:v", "libvpx", path], check=True)
    clip = path.read_bytes()
    assert "video/mp4" in watching.one("#files").get_attribute("accept").split(",")
    choose(watching, path)
    watching.until(lambda: facts(watching) == ["640 tokens"])  # of its frames and its sound
    player = watching.one("#attachments video")
    assert player.get_attribute("aria-label") == "clip.webm"
    shown = "return [arguments[0].videoWidth, arguments[0].duration]"
    watching.until(lambda: watching.script(shown, player) == [64, 2])
    assert watching.script("return arguments[0].controls", player)
    watching.say("What happens?")
    watching.wait_for_the_answer()
    content = [video_part(clip), {"type": "text", "text": "What happens?"}]
    assert last_content(watching) == content
    assert watching.one(".turn.user video").get_attribute("aria-label") == "clip.webm"
    counted = [body for path, body in watching.server.requests if path == "/v1/responses/input_tokens"]
    assert counted[0]["input"][0]["content"] == [
        {"type": "input_video", "video_url": data_url(clip, "video/webm")}
    ]
    watching.say("And then?")
    watching.until(lambda: len(watching.server.conversations) == 2)
    assert watching.server.conversations[1][0]["content"] == content
    assert watching.complaints() == []


@pytest.mark.parametrize("how", ["paste", "drop"])
@pytest.mark.parametrize(
    ("name", "form", "sent_as"),
    [
        ("a.mkv", "", "video/x-matroska"),  # the system knows no type
        ("b.avi", "video/vnd.avi", "video/x-msvideo"),
        ("c.m4v", "video/x-m4v", "video/mp4"),
        ("d.gif", "image/gif", "image/gif"),
    ],
)
def test_videos_can_be_pasted_and_dropped_whatever_their_type_is_called(
    watching: Browser, how: str, name: str, form: str, sent_as: str
) -> None:
    assert give(watching, how, name, form, b"not played")
    is_picture = sent_as == "image/gif"
    watching.until(lambda: facts(watching) == [f"{256 if is_picture else 640} tokens"])
    watching.press(Keys.ENTER)
    watching.wait_for_the_answer()
    part = picture_part if is_picture else video_part
    assert last_content(watching) == [part(b"not played", sent_as)]


def test_a_video_that_the_browser_cannot_play_is_sent_without_a_player(watching: Browser) -> None:
    give(watching, "drop", "clip.avi", "video/x-msvideo", b"RIFF....AVI ")
    watching.until(lambda: watching.text("#attachments .preview") == "no preview")
    watching.until(lambda: facts(watching) == ["640 tokens"])
    watching.press(Keys.ENTER)
    watching.until(lambda: watching.text(".turn.user .attached") == "no preview")
    assert last_content(watching) == [video_part(b"RIFF....AVI ", "video/x-msvideo")]
    assert watching.script(CONTRAST) == []


def test_a_picture_without_a_type_is_sent_with_the_type_of_its_name(seeing: Browser) -> None:
    assert give(seeing, "drop", "cat.png", "", CAT)
    seeing.until(lambda: facts(seeing) == ["256 tokens"])
    seeing.press(Keys.ENTER)
    seeing.wait_for_the_answer()
    assert last_content(seeing) == [picture_part(CAT)]


def test_pasted_text_stays_text_even_with_a_picture_of_it(seeing: Browser) -> None:
    code = GIVEN.replace("const init", "transfer.setData('text/plain', 'words');\nconst init")
    assert not seeing.script(code, "paste", "words.png", "image/png", base64.b64encode(CAT).decode())
    assert seeing.all("#attachments li") == []


def test_an_attachment_can_be_removed(seeing: Browser, files: dict[str, Path]) -> None:
    choose(seeing, files["cat.png"], files["tone.wav"])
    seeing.until(lambda: len(facts(seeing)) == 2)
    seeing.one("[aria-label='Remove cat.png']").click()
    seeing.until(lambda: facts(seeing) == ["13 tokens"])
    seeing.one("[aria-label='Remove tone.wav']").click()
    assert not seeing.one("#attachments").is_displayed()
    assert seeing.one("#send").get_attribute("aria-disabled") == "true"
    seeing.say("hello")
    seeing.wait_for_the_answer()
    assert last_content(seeing) == "hello"


def test_a_file_that_the_model_cannot_take_is_refused_beside_its_name(
    browser: Browser, files: dict[str, Path], tmp_path: Path
) -> None:
    browser.server.inputs = ["text", "image"]
    browser.open()
    accepted = "image/png,image/jpeg,image/webp,image/gif,text/*,"
    browser.until(lambda: browser.one("#files").get_attribute("accept").startswith(accepted))
    assert not browser.one("#record").is_displayed()
    sentence = "This model takes text files, PNG, JPEG, WEBP and GIF pictures."
    pdf = "PDF files are not read. Paste their text, or attach pictures of the pages."
    unread = {"clip.mp4": b"ftyp", "old.doc": b"\xd0\xcf\x11\xe0", "paper.pdf": b"%PDF-1.7"}
    for name, content in unread.items():
        (tmp_path / name).write_bytes(content)
    choose(browser, files["tone.wav"], *(tmp_path / name for name in unread))
    browser.until(lambda: facts(browser) == [sentence] * 2 + ["This file is not text in UTF-8.", pdf])
    browser.one("#prompt").send_keys("hello", Keys.ENTER)
    assert browser.server.conversations == []
    assert browser.one("#send").get_attribute("title") == "Remove the files that cannot be sent."
    for name in ("tone.wav", *unread):
        browser.one(f"[aria-label='Remove {name}']").click()
    browser.one("#prompt").send_keys(Keys.ENTER)
    browser.wait_for_the_answer()
    assert browser.complaints() == []


def test_a_model_without_eyes_and_ears_takes_text_files_only(browser: Browser) -> None:
    browser.open()
    browser.until(lambda: browser.text("#model"))
    assert browser.one("#files").get_attribute("accept").startswith("text/*,")
    assert not browser.one("#record").is_displayed()
    assert give(browser, "drop", "cat.png", "image/png", CAT)  # otherwise the browser would leave the page
    browser.until(lambda: facts(browser) == ["This model takes text files only."])


def test_a_picture_above_the_servers_limit_is_scaled_down_and_the_page_says_so(
    seeing: Browser, tmp_path: Path
) -> None:
    assert (PROMPT_LIMITS.pixels, PROMPT_LIMITS.side) == (24_000_000, 16_384)
    Image.new("RGB", (6000, 5000), "teal").save(tmp_path / "large.png", compress_level=1)
    choose(seeing, tmp_path / "large.png")
    seeing.until(lambda: facts(seeing) == ["256 tokens, scaled down to 5,366 \u00d7 4,472"])
    seeing.say("?")
    seeing.wait_for_the_answer()
    url = last_content(seeing)[0]["image_url"]["url"]
    sent = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
    assert (sent.size, sent.getpixel((9, 9))[:3]) == ((5366, 4472), (0, 128, 128))  # type: ignore[index]


def test_files_that_are_too_large_are_refused_in_the_page(watching: Browser) -> None:
    assert (PROMPT_LIMITS.file_bytes, MEDIA_BODY_BYTES) == (32 << 20, 48 << 20)
    drop = "const [mebibytes, type] = arguments; const t = new DataTransfer();"
    drop += "t.items.add(new File([new Uint8Array(mebibytes * 2 ** 20)], 'zeros', { type }));"
    drop += "document.dispatchEvent(new DragEvent('drop', { cancelable: true, dataTransfer: t }))"
    watching.script(drop, 33, "audio/wav")
    watching.until(lambda: facts(watching) == ["A file may have at most 33.6 MB, and this one has 34.6 MB."])
    watching.one("[aria-label='Remove zeros']").click()
    watching.script(drop, 35, "video/mp4")
    watching.until(lambda: facts(watching) == ["A file may have at most 36.2 MB, and this one has 36.7 MB."])
    watching.one("[aria-label='Remove zeros']").click()
    watching.script(drop, 25, "audio/wav")
    watching.until(lambda: facts(watching) == ["13 tokens"])
    watching.script(drop, 25, "audio/wav")
    watching.until(lambda: len(facts(watching)) == 2 and "36.2 MB together" in facts(watching)[1])


def test_what_the_server_finds_wrong_is_said_beside_the_file(seeing: Browser, files: dict[str, Path]) -> None:
    seeing.server.refuses_media = 400, "input.0.content.0: the picture is damaged\nhint: save it again"
    choose(seeing, files["cat.png"])
    seeing.until(lambda: facts(seeing) == ["the picture is damaged\nsave it again"])
    assert seeing.one("#attachments [role=alert]")
    assert seeing.one("#send").get_attribute("aria-disabled") == "true"
    seeing.one("[aria-label='Remove cat.png']").click()
    seeing.server.refuses_media = 503, "too many pictures wait"
    choose(seeing, files["cat.png"])
    seeing.until(lambda: facts(seeing) == ["tokens not counted"])
    seeing.press(Keys.ENTER)
    seeing.wait_for_the_answer()
    assert last_content(seeing) == [picture_part(CAT)]


def test_a_message_with_a_picture_can_be_edited_and_answered_again(
    seeing: Browser, files: dict[str, Path]
) -> None:
    choose(seeing, files["cat.png"])
    seeing.say("fail")
    seeing.wait_for_the_answer("failed")
    seeing.press_button("Try again")
    seeing.until(lambda: len(seeing.server.conversations) == 2)
    seeing.wait_for_the_answer("failed")
    assert seeing.server.conversations[0] == seeing.server.conversations[1]
    seeing.press_button("Edit")
    field = seeing.one(".editor textarea")
    field.clear()
    field.send_keys("what", Keys.ENTER)
    seeing.wait_for_the_answer()
    assert last_content(seeing) == [picture_part(CAT), {"type": "text", "text": "what"}]
    assert len(seeing.all(".turn.user img")) == 1


def test_a_message_after_a_failed_answer_is_joined_with_the_pictures_before_it(
    seeing: Browser, files: dict[str, Path]
) -> None:
    choose(seeing, files["cat.png"])
    seeing.say("fail")
    seeing.wait_for_the_answer("failed")
    seeing.say("hello")
    seeing.until(lambda: len(seeing.server.conversations) == 2)
    said = [{"type": "text", "text": "fail"}, {"type": "text", "text": "hello"}]
    assert seeing.server.conversations[1] == [{"role": "user", "content": [picture_part(CAT), *said]}]


def record(browser: Browser, seconds: int) -> None:
    browser.one("#record").click()
    browser.until(lambda: browser.text("#recording").startswith("Recording"))
    assert browser.one("#record").get_attribute("aria-pressed") == "true"
    browser.until(lambda: browser.text("#recording") == f"Recording, {seconds} s")
    assert browser.one("#record").accessible_name == "Stop recording"
    browser.one("#record").click()
    browser.until(lambda: browser.all("[aria-label='Remove recording.wav']"))
    assert browser.text("#recording") == ""


def test_the_microphone_records_a_wav_file_of_16_khz(seeing: Browser) -> None:
    record(seeing, 2)
    seeing.until(lambda: facts(seeing) == ["13 tokens"])
    seeing.say("What do you hear?")
    seeing.wait_for_the_answer()
    sound, text = last_content(seeing)
    assert text["text"] == "What do you hear?"
    assert sound["input_audio"]["format"] == "wav"
    with wave_file.open(io.BytesIO(base64.b64decode(sound["input_audio"]["data"]))) as recorded:
        assert (recorded.getframerate(), recorded.getnchannels(), recorded.getsampwidth()) == (16_000, 1, 2)
        assert 2 * 16_000 <= recorded.getnframes() < 6 * 16_000
        samples = np.frombuffer(recorded.readframes(recorded.getnframes()), "<i2")
    assert np.abs(samples).max() > 1000  # the beeps
    assert seeing.complaints() == []


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        ("NotAllowedError", "The browser does not let this page use the microphone."),
        ("NotFoundError", "There is no microphone to record with."),
    ],
)
def test_a_microphone_that_cannot_be_used_is_explained(seeing: Browser, error: str, sentence: str) -> None:
    seeing.script(
        "navigator.mediaDevices.getUserMedia = async () => { throw new DOMException('no', arguments[0]) }".replace(
            "arguments[0]", f"'{error}'"
        )
    )
    seeing.one("#record").click()
    seeing.until(lambda: seeing.text("#notice-text") == sentence)
    assert seeing.one("#record").get_attribute("aria-pressed") == "false"


def test_files_are_chosen_and_removed_with_the_keyboard_alone(
    seeing: Browser, files: dict[str, Path]
) -> None:
    # No dialog of the operating system can be closed from here.
    seeing.script("window.opened = 0; document.getElementById('files').click = () => { window.opened += 1; }")
    seeing.press_with_shift(Keys.TAB)
    assert seeing.focus == "record"
    seeing.press_with_shift(Keys.TAB)
    assert seeing.focus == "attach"
    seeing.press(Keys.ENTER)
    assert seeing.script("return window.opened") == 1
    choose(seeing, files["cat.png"])
    seeing.until(lambda: facts(seeing) == ["256 tokens"])
    seeing.script("document.getElementById('attach').focus()")
    seeing.press_with_shift(Keys.TAB)
    assert seeing.script("return document.activeElement.ariaLabel") == "Remove cat.png"
    seeing.press(Keys.ENTER)
    assert facts(seeing) == []
    assert seeing.focus == "prompt"


def test_a_phone_shows_attachments_without_scrolling_sideways(
    seeing: Browser, files: dict[str, Path]
) -> None:
    with seen_on(seeing, 320, 740):
        choose(seeing, *(files[name] for name in ("cat.png", "tone.wav", "notes.txt")))
        seeing.until(lambda: [fact[:4] for fact in facts(seeing)] == ["256 ", "13 t", "5 to"])
        assert seeing.script("return document.documentElement.scrollWidth <= window.innerWidth")
        assert seeing.script(CONTRAST) == []


def test_a_real_model_gets_an_attached_picture_and_a_recording(
    driver: webdriver.Chrome, tmp_path: Path, files: dict[str, Path]
) -> None:
    model = write_seeing_model(tmp_path / "model")
    with (
        Engine.open(model, memory="3GiB", threads=1, max_sequences=2, image_tokens=64) as engine,
        serving(engine) as service,
        contextmanager(start)(
            make_app(only(service), KeyRing(None), block_tokens=16, max_sequences=2)
        ) as url,
    ):
        prompts: list[Any] = []
        submit = service.loop.submit

        def spied(prompt: Any, *given: Any, **more: Any) -> Any:
            prompts.append(prompt)
            return submit(prompt, *given, **more)

        service.loop.submit = spied  # type: ignore[method-assign]
        real = Browser(driver, url)
        real.complaints()
        real.open()
        real.until(lambda: real.one("#record").is_displayed())
        real.one("#open-settings").click()
        real.one("#max-tokens").send_keys("8", Keys.ENTER)
        choose(real, files["cat.png"])
        record(real, 1)
        real.until(lambda: all(fact[0].isdigit() for fact in facts(real)))
        told = [int(fact.split()[0]) for fact in facts(real)]
        real.say("What is it?")
        real.wait_for_the_answer()
        (prompt,) = prompts
        cat = service.prompts.build([Picture(CAT)]).spans[0][1]
        (_, seen), (_, heard) = prompt.spans
        assert (seen.kind, heard.kind) == ("picture", "sound")
        assert (seen.digest, [seen.num_positions, heard.num_positions]) == (cat.digest, told)
        assert "What is it?" in prompt.text
        assert real.answer
        # A damaged file is found before anything is sent.
        (tmp_path / "half.png").write_bytes(CAT[:90])
        choose(real, tmp_path / "half.png")
        real.until(lambda: facts(real) and facts(real)[0].startswith("the picture is damaged or incomplete"))
        assert [entry for entry in real.complaints() if "400" not in entry] == []
        driver.get("about:blank")


# The real server


@pytest.fixture
def real(driver: webdriver.Chrome, tmp_path: Path) -> Iterator[Browser]:
    """The page of the real server, with a tiny model and room for only a few of its experts."""
    model = write_chat_model(tmp_path / "model", context_tokens=4096)
    with (
        Engine.open(model, memory="2GiB", threads=1, expert_slots=EXPERT_SLOTS, max_sequences=2) as engine,
        serving(engine) as service,
        contextmanager(start)(
            make_app(only(service), KeyRing(None), block_tokens=16, max_sequences=2)
        ) as url,
    ):
        browser = Browser(driver, url)
        browser.complaints()  # clears the messages of the test before
        yield browser
        driver.get("about:blank")


EXPERT_SLOTS, NUM_EXPERTS = 4, 18


def test_a_conversation_with_the_real_server_changes_its_memory_bar_and_heat_map(real: Browser) -> None:
    real.open()
    real.until(lambda: real.text("#memory-total"))
    assert real.text("#resident") == f"0 of {NUM_EXPERTS}, room for {EXPERT_SLOTS}"
    assert not real.one("#heat").is_displayed()  # the experts of a few tokens would reveal those tokens
    real.one("#open-settings").click()
    real.one("#max-tokens").send_keys("100", Keys.ENTER)
    empty = drawn(real)

    talk(real, "hello there", until=lambda: real.one("#heat").is_displayed())
    real.until(lambda: real.text("#resident") == f"{EXPERT_SLOTS} of {NUM_EXPERTS}, room for {EXPERT_SLOTS}")
    assert drawn(real)[0] != empty[0]
    assert "3 layers of 6 experts" in real.one("#heat-map").get_attribute("aria-label")
    assert real.text("#answer-facts").startswith("Tokens")
    picture = "return document.getElementById('heat-map').toDataURL()"
    before = real.script(picture)
    talk(real, "and again", until=lambda: real.script(picture) != before)
    assert real.complaints() == []


def talk(browser: Browser, text: str, *, until: Callable[[], object]) -> None:
    """Send `text` and wait for the answer, again and again until the condition holds."""
    for _ in range(20):
        turns = len(browser.all(".turn"))
        browser.say(text)
        browser.until(lambda turns=turns: len(browser.all(".turn")) == turns + 2)
        browser.wait_for_the_answer()
        browser.until(lambda: browser.one("#send").is_displayed())
        time.sleep(0.6)  # the page gets the state twice a second
        if until():
            return
    raise AssertionError("twenty answers have changed nothing")


# Keys, keyboard, addresses


def test_the_page_asks_for_a_key_keeps_it_in_the_tab_and_sends_it(browser: Browser) -> None:
    browser.server.key = "sk-right"
    browser.driver.get(browser.server.url)
    browser.until(lambda: browser.text("#notice-text") == "This server needs an API key.")
    browser.press_button("Enter key")
    browser.one("#key").send_keys("sk-right", Keys.ENTER)
    browser.until(lambda: browser.text("#connection") == "connected")
    browser.until(lambda: browser.text("#model") == "Qwen3-30B-A3B-Q4_K_M")
    browser.say("hello")
    browser.wait_for_the_answer()
    assert browser.script("return JSON.stringify({...sessionStorage})") == '{"argosy-key":"sk-right"}'
    assert browser.script("return [localStorage.length, document.cookie]") == [0, ""]


def test_a_page_that_needs_a_key_does_not_show_that_it_is_connecting(browser: Browser) -> None:
    browser.server.key = "sk-right"
    browser.driver.get(browser.server.url)
    browser.until(lambda: browser.text("#connection") == "key needed")
    assert "connecting" not in browser.one(".top").text


def test_only_a_long_message_has_a_scrollbar(browser: Browser) -> None:
    browser.open()
    state = (
        "const at = document.getElementById('prompt');"
        "return [at.scrollHeight > at.clientHeight, getComputedStyle(at).overflowY]"
    )
    assert browser.script(state) == [False, "hidden"]
    field = browser.one("#prompt")
    field.send_keys("two", Keys.SHIFT + Keys.ENTER, "lines")
    assert browser.script(state) == [False, "hidden"]
    field.send_keys(Keys.SHIFT + Keys.ENTER * 40)
    assert browser.script(state) == [True, "auto"]


def test_the_tab_key_reaches_the_send_button_even_without_a_message(browser: Browser) -> None:
    browser.open()
    browser.until(lambda: browser.one("#heat").is_displayed())
    browser.press(Keys.TAB)
    assert browser.focus == "send"
    assert browser.one("#send").get_attribute("aria-disabled") == "true"
    browser.press(Keys.ENTER)
    assert browser.server.conversations == []
    browser.one("#prompt").send_keys("hello")
    assert browser.one("#send").get_attribute("aria-disabled") == "false"
    browser.press(Keys.TAB, Keys.ENTER)
    browser.wait_for_the_answer()


def test_everything_can_be_done_with_the_keyboard_alone(browser: Browser) -> None:
    browser.open()
    assert browser.focus == "prompt"
    browser.press("slow")
    browser.press_with_shift(Keys.ENTER)
    browser.press("please", Keys.ENTER)
    browser.until(lambda: "word 2" in browser.answer)
    browser.press(Keys.ESCAPE)
    browser.wait_for_the_answer("stopped")
    assert browser.server.conversations[0][0]["content"] == "slow\nplease"
    backwards = []
    browser.until(lambda: browser.all("#chat-list .chat"))
    for _ in range(19):
        browser.press_with_shift(Keys.TAB)
        backwards.append(browser.focus)
    turns = ["attach", "Continue", "Regenerate", "Copy", "Edit", "Copy"]
    chat = [
        "print-chat",
        "export-chat",
        "copy-chat",
        "title",
        "delete-all",
        "import-chats",
        "export-all",
        "keeping",
    ]
    items = ["\u2715", "\u2606", browser.text("#chat-list .chat"), "search"]
    assert backwards == [*turns, *chat, *items, "open-settings"]
    browser.script("document.getElementById('open-settings').focus()")
    browser.press(Keys.ENTER)
    assert browser.focus == "system"
    browser.press("Be brief.", Keys.TAB, "0.5", Keys.ENTER)
    assert browser.focus == "open-settings"
    browser.press_button("Regenerate")
    browser.until(lambda: len(browser.server.conversations) == 2)
    assert browser.server.conversations[1][0] == {"role": "system", "content": "Be brief."}
    assert browser.server.requests[-1][1]["temperature"] == 0.5
    assert browser.complaints() == []


def test_an_address_cannot_send_a_prompt(browser: Browser) -> None:
    browser.open("/?q=hello&prompt=hello#hello")
    browser.until(lambda: browser.text("#memory-total"))
    assert browser.one("#prompt").get_attribute("value") == ""
    assert browser.server.conversations == []


def test_the_page_requests_only_its_own_server(browser: Browser) -> None:
    browser.open()
    browser.say("markdown")
    browser.wait_for_the_answer()
    names = browser.script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert f"{browser.server.url}/page/app.js" in names
    assert [name for name in names if not name.startswith(browser.server.url)] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_readable_on_a_phone_in_both_themes(browser: Browser, scheme: str) -> None:
    with seen_on(browser, 360, 740, scheme=scheme):
        browser.open()
        browser.say("markdown")
        browser.wait_for_the_answer()
        assert browser.script("return document.documentElement.scrollWidth <= window.innerWidth")
        assert not browser.one("#engine").is_displayed()
        browser.press_button("Engine")
        assert browser.one("#memory-bar").is_displayed()
        assert browser.one("#toggle-engine").get_attribute("aria-expanded") == "true"
        assert browser.script(CONTRAST) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_code_and_an_idle_send_button_are_readable_in_both_themes(browser: Browser, scheme: str) -> None:
    with seen_on(browser, 1280, 900, scheme=scheme):
        browser.open()
        browser.say("markdown")
        browser.wait_for_the_answer()
        browser.until(lambda: browser.one("#send").is_displayed())
        browser.script(
            "const code = document.querySelector('.turn.assistant pre code');"
            "for (const name of ['comment', 'string', 'number', 'keyword', 'call', 'removed']) {"
            "  const span = document.createElement('span');"
            "  span.className = `code-${name}`;"
            "  span.append(name);"
            "  code.append(span);"
            "}"
        )
        assert browser.script(CONTRAST) == []
        colours = (
            "return new Set([...document.querySelectorAll('[class^=code-]')].map((span) =>"
            " getComputedStyle(span).color)).size"
        )
        assert browser.script(colours) == 6


@pytest.mark.parametrize("width", [320, 390])
def test_on_a_phone_the_header_is_one_row_and_no_placeholder_is_truncated(
    browser: Browser, width: int
) -> None:
    with seen_on(browser, width, 740):
        for key, state in ((None, "connected"), ("sk-right", "key needed")):
            browser.server.key = key
            browser.driver.get(browser.server.url)
            browser.until(lambda state=state: browser.text("#connection") == state)
            assert browser.one(".top").size["height"] < 64
            assert browser.script("return document.documentElement.scrollWidth <= window.innerWidth")
        buttons = browser.all(".top nav button")
        assert [button.accessible_name for button in buttons] == ["New chat", "Settings", "Engine"]
        assert all(min(button.size.values()) >= 36 for button in buttons)  # large enough for a thumb
        browser.one("#open-settings").click()
        assert browser.script(CUT_PLACEHOLDERS) == []


CUT_PLACEHOLDERS = """
const context = document.createElement('canvas').getContext('2d');
return [...document.querySelectorAll('[placeholder]')].filter((field) => field.checkVisibility()).filter((field) => {
  const style = getComputedStyle(field);
  context.font = style.font;
  const room = field.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
  return context.measureText(field.placeholder).width > room;
}).map((field) => field.id);
"""


# Before the first message, and when the server is away


def test_an_empty_page_tells_of_the_model_and_offers_three_prompts(browser: Browser) -> None:
    browser.server.inputs = ["text", "image", "audio"]
    browser.open()
    told = (
        "Qwen3-30B-A3B-Q4_K_M runs on this server: 8 of 128 experts in each layer for a token, "
        "32,768-token context, reads pictures and sound."
    )
    browser.until(lambda: browser.text("#welcome-model") == told)
    assert len(browser.all("#examples button")) == 3
    browser.one("#examples button").click()
    browser.wait_for_the_answer()
    asked = "Explain in one paragraph what a mixture of experts is."
    assert browser.server.conversations == [[{"role": "user", "content": asked}]]


def test_the_panel_shows_how_far_each_prompt_is(browser: Browser) -> None:
    browser.open()
    about = {"prompt_tokens": 22_851, "prompt_done": 9_216, "seconds_left": 245.0}
    browser.server.prompts = [about, about | {"prompt_done": 22_851, "seconds_left": None}]
    browser.until(lambda: browser.all("#prompts-facts dd"))
    told = [node.text for node in browser.all("#prompts-facts dd")]
    assert told == ["9,216 of 22,851 tokens (40 %), about 4 min left"]


def test_a_lost_server_greys_the_panel_and_its_return_is_noticed(driver: webdriver.Chrome) -> None:
    with fake_server() as server:
        browser = Browser(driver, server.url)
        browser.open()
        browser.until(lambda: browser.text("#memory-total"))
        server.is_away = True
        browser.until(lambda: browser.text("#connection") == "not connected")
        assert browser.one("#engine").get_attribute("class") == "engine stale"
        assert browser.text("#stale").startswith("The server has not been heard of since ")
        server.is_away = False
        browser.until(lambda: browser.text("#connection") == "connected")
        assert browser.one("#engine").get_attribute("class") == "engine"
        assert not browser.one("#stale").is_displayed()
        driver.get("about:blank")


def test_what_grows_below_the_conversation_hides_nothing_of_its_end(browser: Browser, tmp_path: Path) -> None:
    browser.open()
    for _ in range(2):
        browser.say("markdown")
        browser.until(lambda: browser.one("#send").is_displayed())
    (tmp_path / "notes.md").write_text("notes")
    browser.one("#files").send_keys(str(tmp_path / "notes.md"))
    browser.until(lambda: browser.all(".attachment"))
    below = "const at = document.getElementById('scroll'); return at.scrollHeight - at.scrollTop - at.clientHeight"
    browser.until(lambda: browser.script(below) < 2)
