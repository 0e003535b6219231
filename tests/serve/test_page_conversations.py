"""Conversations of the page: kept in the browser, searched, branched, exported, imported, and never on the server."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.media.samples import pattern, png
from tests.serve.fake_server import HOSTILE, MODEL, fake_server
from tests.serve.page_browser import Browser, Keys, open_chromium, seen_on, webdriver

CAT = png(pattern(40, 60))
ROOT = Path(__file__).parents[2]

SHARING = [
    {"id": MODEL, "state": "ready", "memory_bytes": 6 << 30, "running": 2},
    {
        "id": "a-name-that-is-much-too-long-for-the-panel-of-the-engine",
        "state": "loading",
        "memory_bytes": 3 << 30,
        "running": 0,
    },
    {"id": "<b>x</b>", "state": "unloaded", "memory_bytes": 0, "running": 0},
]


def titles(browser: Browser) -> list[str]:
    return browser.script(  # type: ignore[no-any-return]
        "return [...document.querySelectorAll('#chat-list .chat')].map((node) => node.firstChild.textContent)"
    )


def talk(browser: Browser, *texts: str) -> None:
    """Send messages, each after the answer to the one before. The answers come fast."""
    browser.server.token_s, pause_s = 0.0005, browser.server.token_s
    for text in texts:
        turns = len(browser.all(".turn"))
        browser.say(text)
        browser.until(lambda turns=turns: len(browser.all(".turn")) == turns + 2)
        browser.wait_for_the_answer()
        browser.until(lambda: browser.one("#send").is_displayed())
    browser.server.token_s = pause_s


def shown(browser: Browser) -> list[str]:
    """The texts of the shown messages."""
    return browser.script(  # type: ignore[no-any-return]
        "return [...document.querySelectorAll('.turn')].map((turn) =>"
        " turn.querySelector('.said, :scope > .text').textContent)"
    )


def stored(browser: Browser, store: str = "messages") -> list[Any]:
    """The contents of the browser's storage."""
    code = """
    const [name, done] = arguments;
    const opened = indexedDB.open('argosy');
    opened.onsuccess = () => {
      const all = opened.result.transaction(name).objectStore(name).getAll();
      all.onsuccess = () => { opened.result.close(); done(JSON.parse(JSON.stringify(all.result))); };
    };
    """
    return browser.driver.execute_async_script(code, store)  # type: ignore[no-untyped-call, no-any-return]


def start_new(browser: Browser) -> None:
    browser.press_button("New chat")
    assert browser.all(".turn") == []


# Kept


def test_a_conversation_survives_a_restart_of_browser_and_server(tmp_path: Path) -> None:
    def at(port: int, act: Callable[[Browser], None]) -> int:
        with fake_server(port) as server:
            driver = open_chromium(tmp_path / "profile")
            try:
                browser = Browser(driver, server.url)
                browser.server = server
                browser.open()
                act(browser)
                assert browser.complaints() == []
                names = browser.script(
                    "return performance.getEntriesByType('resource').map(({ name }) => name)"
                )
                assert [name for name in names if not name.startswith(server.url)] == []
            finally:
                driver.quit()
            return server.server_port

    def before(browser: Browser) -> None:
        browser.server.inputs = ["text", "image"]
        browser.open()
        browser.until(lambda: browser.one("#files").get_attribute("accept").startswith("image/png"))
        (tmp_path / "cat.png").write_bytes(CAT)
        browser.one("#files").send_keys(str(tmp_path / "cat.png"))
        browser.until(lambda: browser.text("#attachments .facts-line") == "256 tokens")
        talk(browser, "think about the cat")
        browser.until(lambda: titles(browser) == ["think about the cat"])

    def after(browser: Browser) -> None:
        browser.until(lambda: titles(browser) == ["think about the cat"])
        assert browser.all(".turn") == []  # another tab, so nothing is opened by itself
        browser.one("#chat-list .chat").click()
        browser.until(lambda: len(browser.all(".turn")) == 2)
        assert browser.text(".reasoning .text") == "Let me think about it."
        browser.until(lambda: browser.script("return document.querySelector('.turn img').naturalWidth") == 60)
        talk(browser, "and now?")
        (picture, text), answer, now = (message["content"] for message in browser.server.conversations[0])
        assert (picture["type"], text["text"], now) == ("image_url", "think about the cat", "and now?")
        assert answer.startswith("You said: [image_url] think about the cat")

    at(at(0, before), after)


def test_a_reloaded_tab_shows_its_conversation_and_the_address_names_none(browser: Browser) -> None:
    browser.open()
    talk(browser, "hello")
    browser.until(lambda: titles(browser) == ["hello"])
    browser.driver.refresh()
    browser.until(lambda: len(browser.all(".turn")) == 2)
    assert shown(browser) == ["hello", "You said: hello (1 messages, answer 1)"]
    assert browser.driver.current_url == browser.url + "/"
    assert browser.script("return [localStorage.length, sessionStorage.length, document.cookie]") == [
        0,
        0,
        "",
    ]
    start_new(browser)
    browser.driver.refresh()
    browser.until(lambda: titles(browser) == ["hello"])
    assert browser.all(".turn") == []


def test_an_answer_cut_by_a_closed_tab_can_be_continued(browser: Browser) -> None:
    browser.open()
    browser.say("slow")
    browser.until(lambda: [one for one in stored(browser) if one["text"].startswith("word 0")])
    browser.driver.refresh()
    browser.until(lambda: len(browser.all(".turn")) == 2)
    assert browser.text(".note") == "This answer was cut off, or another tab is still writing it."
    kept = browser.answer
    browser.press_button("Continue")
    browser.wait_for_the_answer()
    asked = browser.server.conversations[1]
    assert [message["role"] for message in asked] == ["user", "assistant"]
    assert asked[1]["content"].rstrip() == kept.rstrip()
    assert browser.answer.startswith(kept.rstrip())
    assert len(browser.all(".turn")) == 2


def test_conversations_are_searched_renamed_and_deleted(browser: Browser) -> None:
    browser.open()
    browser.until(lambda: browser.text("#chats-status") == "Your conversations will be listed here.")
    for text in ("the first one", "a second <b>one</b>", "a third"):
        start_new(browser) if browser.all(".turn") else None
        talk(browser, text)
    browser.until(lambda: titles(browser) == ["a third", "a second <b>one</b>", "the first one"])
    browser.one("#search").send_keys("ONE")
    browser.until(lambda: len(titles(browser)) == 2)
    browser.one("#search").clear()
    browser.one("#search").send_keys("said: a third")
    browser.until(lambda: titles(browser) == ["a third"])
    assert "You said: a third" in browser.text("#chat-list small")
    browser.one("#search").send_keys("x")
    browser.until(lambda: browser.text("#chats-status") == "No conversation has these words.")
    browser.one("#search").send_keys(Keys.BACKSPACE * 20)
    browser.until(lambda: len(titles(browser)) == 3)

    browser.one("#title").send_keys(Keys.CONTROL + "a")
    browser.one("#title").send_keys("renamed", Keys.ENTER)
    browser.until(lambda: titles(browser)[0] == "renamed")
    browser.one("#chat-list li:first-child .remove").click()
    browser.until(lambda: titles(browser) == ["a second <b>one</b>", "the first one"])
    assert browser.all(".turn") == []
    assert browser.text("#notice-text") == "\u201crenamed\u201d was deleted."
    assert len(stored(browser)) == 4
    browser.press_button("Undo")
    browser.until(lambda: titles(browser)[0] == "renamed" and len(browser.all(".turn")) == 2)

    browser.press_button("Delete all")
    assert browser.text("#question-text") == "Delete all 3 conversations? This cannot be undone."
    assert browser.focus == "Cancel"
    browser.press(Keys.ENTER)
    assert len(titles(browser)) == 3
    browser.press_button("Delete all")
    browser.one("#question-yes").click()
    browser.until(lambda: titles(browser) == [])
    assert [stored(browser, name) for name in ("conversations", "messages", "media")] == [[], [], []]
    assert browser.all(".turn") == []
    assert browser.complaints() == []


def test_one_switch_keeps_nothing(browser: Browser) -> None:
    browser.open()
    talk(browser, "kept")
    browser.until(lambda: titles(browser) == ["kept"])
    browser.one("#keeping").click()
    browser.until(
        lambda: browser.text("#notice-text") == "New messages are not kept. Earlier ones are still here."
    )
    talk(browser, "not kept")
    start_new(browser)
    talk(browser, "not kept either")
    assert {message["text"] for message in stored(browser) if message["role"] == "user"} == {"kept"}
    browser.driver.refresh()
    browser.until(lambda: browser.text("#chats-status") == "New messages are not kept.")
    assert not browser.one("#keeping").is_selected()
    assert "are gone when you close it" in browser.text("#welcome")
    talk(browser, "turned on again")
    browser.one("#keeping").click()
    browser.until(lambda: titles(browser) == ["turned on again", "kept"])


def test_nothing_of_the_list_reaches_the_server(browser: Browser) -> None:
    browser.open()
    talk(browser, "one secret")
    start_new(browser)
    talk(browser, "another")
    browser.one("#search").send_keys("secret")
    browser.until(lambda: titles(browser) == ["one secret"])
    sent = [(path, body) for path, body in browser.server.requests if body is not None]
    assert [path for path, _ in sent] == ["/v1/chat/completions"] * 2
    assert "secret" not in json.dumps(sent[1])


UNUSABLE = "IDBFactory.prototype.open = () => { throw new DOMException('no', 'SecurityError') }"
# As in a browser whose user allows no site any data.
FORBIDDEN = """
for (const name of ['indexedDB', 'sessionStorage']) {
  Object.defineProperty(window, name, { get() { throw new DOMException('Access is denied', 'SecurityError'); } });
}
"""
FULL = "IDBObjectStore.prototype.put = () => { throw new DOMException('no', 'QuotaExceededError') }"


@pytest.mark.parametrize(
    ("fault", "place", "sentence"),
    [
        (UNUSABLE, "#chats-status", "This browser keeps nothing for this page: a conversation ends with its tab."),
        (FORBIDDEN, "#chats-status", "This browser keeps nothing for this page: a conversation ends with its tab."),
        (
            FULL, "#notice-text",
            "The browser has no room for this conversation: it ends with this tab. Delete or export others.",
        ),
    ],
)  # fmt: skip
def test_without_storage_the_page_works_and_says_so(
    browser: Browser, fault: str, place: str, sentence: str
) -> None:
    injected = browser.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": fault})  # type: ignore[no-untyped-call]
    try:
        browser.open()
        talk(browser, "hello", "again")
        browser.until(lambda: browser.text(place) == sentence)
        assert len(browser.server.conversations[1]) == 3
        assert browser.complaints() == []
    finally:
        browser.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", injected)  # type: ignore[no-untyped-call]


def test_media_beyond_the_bound_of_a_conversation_are_not_kept(browser: Browser) -> None:
    browser.open()
    code = """
    const done = arguments[0];
    import('/page/chats.js').then(({ Chats }) => {
      const told = [];
      const file = (id, mebibytes) => ({ id, name: `${id}.webm`, blob: { size: mebibytes * 2 ** 20 } });
      const record = { media: new Map([['old', 10 * 2 ** 20]]) };
      const messages = [[file('a', 30), file('b', 25)], [file('a', 30), file('c', 24)]].map(
        (attachments) => ({ attachments }));
      const kept = Chats.prototype.newMedia.call({ notify: (kind, text) => told.push(text) }, record, messages);
      done([kept.map(({ id }) => id), told]);
    });
    """
    kept, told = browser.driver.execute_async_script(code)  # type: ignore[no-untyped-call]
    assert kept == ["a", "c"]
    assert told == ["b.webm will not be kept: the files of a conversation may have 67.1 MB together."]


# Two tabs


def other_tab(browser: Browser) -> tuple[str, str]:
    """Open the page in a second tab; return the handles of the first and the second."""
    first = browser.driver.current_window_handle
    browser.driver.switch_to.new_window("tab")
    browser.open()
    return first, browser.driver.current_window_handle


def test_two_tabs_write_in_one_conversation_and_overwrite_nothing(browser: Browser) -> None:
    browser.open()
    talk(browser, "start")
    browser.until(lambda: titles(browser) == ["start"])
    first, second = other_tab(browser)
    try:
        browser.until(lambda: titles(browser) == ["start"])
        browser.one("#chat-list .chat").click()
        browser.until(lambda: len(browser.all(".turn")) == 2)
        talk(browser, "from the second tab")
        browser.driver.switch_to.window(first)
        browser.until(lambda: len(browser.all(".turn")) == 4)  # it follows
        assert shown(browser)[2] == "from the second tab"
        browser.say("slow")
        browser.until(lambda: [one for one in stored(browser) if one["text"].startswith("word 0")])
        # The second tab shows the growing answer, and goes on with it by itself.
        browser.driver.switch_to.window(second)
        browser.until(lambda: "word 0" in browser.answer)
        browser.press_button("Continue")
        browser.until(lambda: "You said: word 0" in browser.text("#conversation"))
        browser.until(lambda: browser.text(".turn:last-child .versions > span") in ("1 of 2", "2 of 2"))
        browser.driver.switch_to.window(first)
        browser.one("#stop").click()
        browser.until(lambda: browser.text(".turn:last-child .versions > span") in ("1 of 2", "2 of 2"))
        answers = [one["text"] for one in stored(browser) if one["text"].startswith("word 0")]
        assert sorted("You said" in answer for answer in answers) == [False, True]
        assert browser.complaints() == []
    finally:
        browser.driver.switch_to.window(second)
        browser.driver.close()
        browser.driver.switch_to.window(first)


def test_a_conversation_deleted_in_another_tab_stays_deleted(browser: Browser) -> None:
    browser.open()
    browser.say("slow")
    browser.until(lambda: titles(browser) == ["slow"])
    first, _ = other_tab(browser)
    try:
        browser.until(lambda: titles(browser) == ["slow"])
        browser.one("#chat-list .remove").click()
        browser.until(lambda: titles(browser) == [])
    finally:
        browser.driver.close()
        browser.driver.switch_to.window(first)
    browser.until(lambda: browser.text("#notice-text") == "This conversation was deleted in another tab.")
    assert browser.all(".turn") == []
    browser.until(lambda: browser.server.disconnects == 1)
    time.sleep(0.3)  # a late write would bring it back
    assert stored(browser) == []


# Branches


def test_edits_and_second_answers_keep_the_other_branch(browser: Browser) -> None:
    browser.open()
    talk(browser, "one", "two")
    browser.one(".turn:nth-child(1) .tools button:last-child").click()
    field = browser.one(".editor textarea")
    field.clear()
    field.send_keys("uno", Keys.ENTER)
    browser.until(lambda: shown(browser)[-1] == "You said: uno (1 messages, answer 3)")
    browser.until(lambda: browser.one("#send").is_displayed())
    assert len(browser.all(".turn")) == 2
    browser.press_button("Regenerate")
    browser.until(lambda: "answer 4" in browser.answer and browser.one("#send").is_displayed())
    assert [node.text for node in browser.all(".versions > span")] == ["2 of 2", "2 of 2"]

    # With the keyboard: back to the first question, whose branch is shown as it was left.
    browser.script("document.querySelector('.turn.user [data-step=\"-1\"]').focus()")
    browser.press(Keys.ENTER)
    assert [text.split(" (")[0] for text in shown(browser)] == [
        "one",
        "You said: one",
        "two",
        "You said: two",
    ]
    assert browser.script("return document.activeElement.ariaLabel") == "Next version"
    talk(browser, "three")
    assert [message["content"] for message in browser.server.conversations[-1]][::2] == [
        "one",
        "two",
        "three",
    ]

    browser.one("[aria-label='Next version']").click()
    browser.one(".turn.assistant [aria-label='Previous version']").click()
    assert shown(browser)[-1] == "You said: uno (1 messages, answer 3)"
    browser.until(lambda: len(stored(browser)) == 9)
    time.sleep(0.2)
    browser.driver.refresh()
    browser.until(lambda: len(browser.all(".turn")) == 2)
    assert shown(browser)[-1] == "You said: uno (1 messages, answer 3)"
    assert browser.complaints() == []


def test_a_stopped_answer_is_continued_in_its_place(browser: Browser) -> None:
    browser.open()
    browser.say("slow")
    browser.until(lambda: "word 9" in browser.answer)
    browser.press(Keys.ESCAPE)
    browser.wait_for_the_answer("stopped")
    kept = browser.answer
    browser.press_button("Continue")
    browser.wait_for_the_answer()
    assert browser.server.conversations[1][-1]["role"] == "assistant"
    assert browser.answer.startswith(kept)
    assert "You said: word 0" in browser.answer
    assert browser.text(".note") == ""
    assert len(browser.all(".turn")) == 2


# Text files


def test_text_files_are_chips_and_are_quoted_in_the_message(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_bytes(b"\xef\xbb\xbf# Notes\r\n```py\nx = 1\n```\n")
    (tmp_path / "<img src=x onerror=alert(1)>.txt").write_bytes("gr\u00fc\u00df".encode())
    (tmp_path / "large.txt").write_bytes(b"x" * (512 * 1024 + 1))
    (tmp_path / "zero.txt").write_bytes(b"a\0b")
    browser.open()
    browser.one("#files").send_keys("\n".join(map(str, sorted(tmp_path.iterdir()))))
    lines = ".attachment .facts-line"
    browser.until(lambda: [node.text for node in browser.all(lines)] == [
        "7 tokens", "A text file may have at most 524 kB, and this one has 524 kB.", "11 tokens",
        "This file is not text: it has zero bytes.",
    ])  # fmt: skip
    for name in ("large.txt", "zero.txt"):
        browser.one(f"[aria-label='Remove {name}']").click()
    talk(browser, "What is in it?")
    quoted = (
        "File <img src=x onerror=alert(1)>.txt:\n\n```txt\ngr\u00fc\u00df\n```\n\n"
        "File notes.md:\n\n````md\n# Notes\n```py\nx = 1\n```\n````\n\nWhat is in it?"
    )
    assert browser.server.conversations[0] == [{"role": "user", "content": quoted}]
    chips = [node.text for node in browser.all(".turn.user .chip summary")]
    assert chips == ["<img src=x onerror=alert(1)>.txt 1 line", "notes.md 4 lines"]
    browser.one(".turn.user li:last-child .chip summary").click()
    browser.until(lambda: browser.text(".turn.user .chip pre").startswith("# Notes"))
    assert browser.all(".turn.user img") == []
    assert browser.complaints() == []


# Settings, models, context


def test_settings_are_sent_and_kept_with_their_conversation(browser: Browser) -> None:
    browser.open()
    browser.server.ignored = "enable_thinking"
    browser.press_button("Settings")
    fields = {
        "top-p": "0.9",
        "top-k": "40",
        "min-p": "0.05",
        "seed": "7",
        "max-tokens": "50",
        "temperature": "0.25",
    }
    for field, value in fields.items():
        browser.one(f"#{field}").send_keys(value)
    browser.one("#thinking").send_keys("Off")
    browser.one("#system").send_keys("Be brief.")
    browser.one("#save-settings").click()
    talk(browser, "hello")
    body = browser.server.requests[-1][1]
    asked = {
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "seed": 7,
        "max_tokens": 50,
        "temperature": 0.25,
        "enable_thinking": False,
    }
    assert {name: body[name] for name in asked} == asked
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    told = "This model has no switch for thinking: that setting had no effect."
    assert browser.text("#notice-text") == told
    browser.driver.refresh()
    browser.until(lambda: len(browser.all(".turn")) == 2)
    assert browser.one("#open-settings").get_attribute("title") == "Settings, 8 changed"
    browser.press_button("Settings")
    assert browser.one("#seed").get_attribute("value") == "7"
    browser.one("#reset-settings").click()
    browser.one("#save-settings").click()
    talk(browser, "again")
    assert not asked.keys() & browser.server.requests[-1][1].keys()


def test_empty_settings_show_the_models_own_and_only_what_it_can(browser: Browser) -> None:
    own = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0}
    browser.server.about = {"default_parameters": own, "supported_parameters": ["temperature"]}
    browser.open()
    browser.until(lambda: browser.text("#model") == MODEL)
    browser.press_button("Settings")
    shown = {name: browser.one(f"#{name.replace('_', '-')}").get_attribute("placeholder") for name in own}
    assert shown == {"temperature": "0.6", "top_p": "0.95", "top_k": "20", "min_p": "0"}
    assert not browser.one("#thinking").is_displayed()
    assert not browser.one("#key").is_displayed()  # the server needs none


def test_news_go_by_themselves_and_warnings_stay(browser: Browser, tmp_path: Path) -> None:
    # The six seconds for which news stay are over at once.
    quick = "const late = setTimeout; window.setTimeout = (act, ms) => late(act, ms === 6000 ? 0 : ms);"
    command = "Page.addScriptToEvaluateOnNewDocument"
    made = browser.driver.execute_cdp_cmd(command, {"source": quick})  # type: ignore[no-untyped-call]
    try:
        browser.open()
        browser.until(lambda: not browser.one("#import-chats").get_attribute("disabled"))
        bring(browser, file_of(conversation(QUESTION)), tmp_path)
        browser.until(lambda: browser.text("#notice-text") == "One conversation was imported.")
        browser.until(lambda: not browser.one("#notice").is_displayed())
        bring(browser, file_of(conversation(leaf=9)), tmp_path)
        browser.until(lambda: browser.text("#notice-text").startswith("Nothing was imported."))
        assert browser.one("#notice").is_displayed()
    finally:
        command = "Page.removeScriptToEvaluateOnNewDocument"
        browser.driver.execute_cdp_cmd(command, made)  # type: ignore[no-untyped-call]


def test_a_conversation_is_renamed_with_a_double_click_and_pinned(browser: Browser) -> None:
    browser.open()
    for text in ("first", "second"):
        talk(browser, text)
        browser.until(lambda text=text: text in titles(browser))
        browser.press_button("New chat")
    assert titles(browser) == ["second", "first"]
    chat = browser.one("#chat-list li:last-child .chat")
    webdriver.ActionChains(browser.driver).double_click(chat).perform()
    browser.until(lambda: browser.focus == "title")
    browser.press("renamed", Keys.ENTER)
    browser.until(lambda: titles(browser) == ["second", "renamed"])
    browser.one("#chat-list li:last-child .pin").click()
    browser.until(lambda: titles(browser) == ["renamed", "second"])
    browser.driver.refresh()
    browser.until(lambda: titles(browser) == ["renamed", "second"])
    assert browser.one("#chat-list .pin").get_attribute("aria-pressed") == "true"


def entry(name: str, **about: Any) -> dict[str, Any]:
    return {"id": name, "context_length": 512, "architecture": {"input_modalities": ["text"]}} | about


def test_a_model_is_chosen_from_a_list_with_states(browser: Browser) -> None:
    ears = entry("whisper", architecture={"input_modalities": ["audio"]})
    browser.server.others = [entry("small", state="loading"), entry("large", state="not_loaded"), ears]
    browser.open()
    browser.until(lambda: browser.one("#models").is_displayed())
    labels = "return [...document.querySelectorAll('#models option')].map((node) => node.textContent)"
    assert browser.script(labels) == [MODEL, "small (loading)", "large (not loaded)"]
    browser.server.others[0]["state"] = "ready"
    browser.until(lambda: browser.script(labels)[1] == "small")  # it is watched while it loads
    browser.one("#models").send_keys("small")
    talk(browser, "hello")
    assert browser.server.requests[-1][1]["model"] == "small"
    browser.until(lambda: titles(browser) == ["hello"])
    start_new(browser)
    browser.driver.refresh()
    browser.until(lambda: titles(browser) == ["hello"])
    browser.one("#chat-list .chat").click()
    browser.until(lambda: browser.one("#models").get_attribute("value") == "small")


@pytest.mark.parametrize(
    ("thinking", "offered"),
    [
        ("none", None),
        ("on-off", ["The model's default", "On", "Off"]),
        ("efforts", ["The model's default", "Little", "Medium", "Much"]),
        ("both", ["The model's default", "On", "Off", "Little", "Medium", "Much"]),
        (None, ["The model's default", "On", "Off"]),  # a model of the library that was not read yet
    ],
)
def test_settings_offer_the_thinking_that_the_model_has(
    browser: Browser, thinking: str | None, offered: list[str] | None
) -> None:
    browser.server.about = {"capabilities": {"thinking": thinking}}
    browser.open()
    browser.until(lambda: browser.text("#model") == MODEL)
    browser.press_button("Settings")
    assert browser.one("#thinking").is_displayed() == (offered is not None)
    if offered is None:
        return
    shown = "return [...document.querySelectorAll('#thinking option:not([hidden])')].map((node) => node.textContent)"
    assert browser.script(shown) == offered
    browser.one("#thinking").send_keys(offered[-1])
    browser.one("#save-settings").click()
    talk(browser, "hello")
    sent = {
        name: browser.server.requests[-1][1].get(name) for name in ("enable_thinking", "reasoning_effort")
    }
    is_effort = offered[-1] == "Much"
    assert sent == {
        "enable_thinking": None if is_effort else False, "reasoning_effort": "high" if is_effort else None
    }  # fmt: skip


def test_presets_are_below_their_model_and_settings_show_their_values(browser: Browser) -> None:
    own = {"temperature": 0.6, "top_k": 20}
    browser.server.about = {"default_parameters": own}
    writer = entry("writer", parent=MODEL, default_parameters={"temperature": 1.2})
    orphan = entry("orphan", parent="gone")
    browser.server.others = [entry("small"), writer, orphan]
    browser.open()
    browser.until(lambda: browser.one("#models").is_displayed())
    labels = "return [...document.querySelectorAll('#models option')].map((node) => node.textContent)"
    assert browser.script(labels) == [MODEL, "\u2003writer", "small", "orphan"]

    def shown() -> list[str | None]:
        browser.press_button("Settings")
        names = ("system", "temperature", "top-k")
        values = [browser.one(f"#{name}").get_attribute("placeholder") for name in names]
        browser.press_button("Cancel")
        return values

    assert shown() == ["none", "0.6", "20"]
    browser.script(
        "const list = document.getElementById('models'); list.value = 'writer'; list.dispatchEvent(new Event('change'))"
    )
    assert shown() == ["that of the preset", "1.2", "model's own"]
    told = f"writer, a preset of {MODEL}, runs on this server: 8 of 128 experts in each layer for a token, "
    browser.until(lambda: browser.text("#welcome-model").startswith(told))
    talk(browser, "hello")
    body = browser.server.requests[-1][1]
    assert body["model"] == "writer"
    assert not {"temperature", "top_k"} & body.keys()


def test_the_context_that_is_left_is_shown_and_a_message_that_is_too_long(browser: Browser) -> None:
    browser.open()
    browser.until(lambda: browser.text("#context") == "Context: 32,768 tokens")
    talk(browser, "hello")
    assert browser.text("#context") == "Context: 43 of 32,768 tokens, 32,725 left"
    field = "const at = document.getElementById('prompt'); at.value = arguments[0];"
    browser.script(field + "at.dispatchEvent(new Event('input'))", "word " * 40_000)
    browser.until(lambda: "32,725 of the context are left" in browser.text("#context"))
    assert browser.text("#context").startswith("This message has about 40,000 tokens")


# Copy, print


def test_messages_and_conversations_are_copied_as_markdown(browser: Browser) -> None:
    browser.open()
    browser.script("navigator.clipboard.writeText = async (text) => { window.copied = text }")
    talk(browser, "hello")
    answer = "You said: hello (1 messages, answer 1)"
    browser.one("[aria-label='Copy the answer']").click()
    assert browser.script("return window.copied") == answer
    browser.press_button("Copy all")
    assert (
        browser.script("return window.copied") == f"# hello\n\n**You**\n\nhello\n\n**{MODEL}**\n\n{answer}\n"
    )


def test_only_the_conversation_is_printed(browser: Browser) -> None:
    browser.open()
    talk(browser, "markdown")
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})  # type: ignore[no-untyped-call]
    try:
        hidden = (".top", ".chats", ".engine", ".composer", ".tools", ".chat-tools")
        assert [name for name in hidden if browser.one(name).is_displayed()] == []
        assert browser.one("#conversation").is_displayed()
        tall = "return document.documentElement.scrollHeight >= document.getElementById('conversation').scrollHeight"
        assert browser.script(tall)
        ink = "return getComputedStyle(document.querySelector('.turn.assistant p')).color"
        assert browser.script(ink) == "rgb(0, 0, 0)"
    finally:
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})  # type: ignore[no-untyped-call]


# Export and import


def download(browser: Browser, button: str, folder: Path) -> dict[str, Any]:
    allowed = {"behavior": "allow", "downloadPath": str(folder)}
    browser.driver.execute_cdp_cmd("Page.setDownloadBehavior", allowed)  # type: ignore[no-untyped-call]
    folder.mkdir()
    browser.press_button(button)
    browser.until(lambda: list(folder.glob("*.json")))
    (path,) = folder.glob("*.json")
    browser.until(lambda: path.read_text().endswith("]}\n"))
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def bring(browser: Browser, facts: object, folder: Path) -> None:
    path = folder / "import.json"
    path.write_text(facts if isinstance(facts, str) else json.dumps(facts))
    browser.one("#import-file").send_keys(str(path))


def test_an_export_is_imported_whole_as_a_copy(browser: Browser, tmp_path: Path) -> None:
    browser.server.inputs = ["text", "image"]
    browser.open()
    browser.until(lambda: browser.one("#files").get_attribute("accept").startswith("image/png"))
    (tmp_path / "cat.png").write_bytes(CAT)
    (tmp_path / "notes.txt").write_text("hello")
    browser.one("#files").send_keys(f"{tmp_path}/cat.png\n{tmp_path}/notes.txt")
    browser.until(lambda: [node.text for node in browser.all(".facts-line")] == ["256 tokens", "5 tokens"])
    talk(browser, "think of it")
    browser.press_button("Regenerate")
    browser.until(lambda: "answer 2" in browser.answer and browser.one("#send").is_displayed())
    browser.until(lambda: len(stored(browser)) == 3 and titles(browser) == ["think of it"])
    one = download(browser, "Export", tmp_path / "one")
    both = download(browser, "Export all", tmp_path / "all")
    assert one == both
    (conversation,) = one["conversations"]
    assert [message["parent"] for message in conversation["messages"]] == [None, 0, 0]

    browser.press_button("Delete all")
    browser.one("#question-yes").click()
    browser.until(lambda: titles(browser) == [])
    for number in (1, 2):
        bring(browser, one, tmp_path)
        browser.until(lambda number=number: titles(browser) == ["think of it"] * number)
    assert browser.text("#notice-text") == "One conversation was imported."
    browser.until(lambda: len(browser.all(".turn")) == 2)
    assert browser.text(".versions > span") == "2 of 2"
    browser.until(lambda: browser.script("return document.querySelector('.turn img').naturalWidth") == 60)
    assert browser.text(".turn .chip summary") == "notes.txt 1 line"
    again = download(browser, "Export", tmp_path / "again")
    assert again["conversations"][0]["messages"] == conversation["messages"]
    assert browser.complaints() == []


QUESTION: dict[str, Any] = {"role": "user", "parent": None, "created": 1, "text": "hi", "attachments": []}
ANSWER: dict[str, Any] = {
    "role": "assistant", "parent": 0, "created": 2, "text": "hello", "attachments": [], "state": "done",
}  # fmt: skip
SETTINGS = dict.fromkeys(("model", "temperature", "topP", "maxTokens", "seed", "thinking")) | {"system": ""}


def conversation(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    whole = {"title": "t", "isNamed": False, "created": 1, "changed": 2, "settings": SETTINGS, "leaf": 0}
    return whole | {"messages": list(messages or (QUESTION, ANSWER))} | more


def file_of(*conversations: Any, **more: Any) -> str:
    whole = {"format": "argosy-conversations", "version": 1, "conversations": list(conversations)}
    return json.dumps(whole | more)


def with_file(**about: Any) -> str:
    whole = {"kind": "picture", "name": "a.png", "format": "image/png", "data": "AAAA"} | about
    return file_of(conversation({**QUESTION, "attachments": [whole]}))


WRONG = {
    "not JSON": "This file is not JSON. Choose a file that this page exported.",
    "[" * 100_000: "This file is not JSON.",
    "null": "This file has no conversations of this page.",
    '{"format": "other"}': "This file has no conversations of this page.",
    file_of(version=2): "file.version: needed 1, found 2",
    file_of(more=1): 'file: unknown field "more"',
    file_of(conversation())[:-1] + ', "__proto__": {"x": 1}}': 'file: unknown field "__proto__"',
    file_of(None): "file.conversations[0]: needed an object, found null",
    file_of([]): "file.conversations[0]: needed an object, found a list",
    file_of({}): "file.conversations[0].title: needed text of at most 200 characters, found nothing",
    file_of(conversation(title=["<b>"])): "[0].title: needed text of at most 200 characters, found a list",
    file_of(conversation(title="x" * 201)): "found text of 201 characters",
    file_of(conversation(title="\ud800")): "[0].title: needed text",
    file_of(conversation(created=-1)): "[0].created: needed a whole number from 0",
    file_of(conversation(changed=1e300)): "[0].changed: needed a whole number",
    file_of(conversation(isNamed=1)): "[0].isNamed: needed true or false, found 1",
    file_of(conversation(leaf=2)): "[0].leaf: needed a message of this conversation, found 2",
    file_of(conversation(messages={})): "[0].messages: needed a list of at most 10,000, found an object",
    file_of(
        conversation(settings=SETTINGS | {"temperature": 9})
    ): "settings.temperature: needed a number from 0 to 2",
    file_of(conversation(settings=SETTINGS | {"seed": 1.5})): "settings.seed: needed a whole number",
    file_of(conversation(settings=SETTINGS | {"key": "sk"})): '[0].settings: unknown field "key"',
    file_of(conversation({**QUESTION, "role": "system"})): ".role: needed user or assistant, found text of 6",
    file_of(
        conversation({**QUESTION, "parent": 0})
    ): "messages[0].parent: needed a message before this one, found 0",
    file_of(
        conversation(QUESTION, {**ANSWER, "parent": 7})
    ): "messages[1].parent: needed a message before this one",
    file_of(
        conversation(QUESTION, {**ANSWER, "parent": None})
    ): "messages[1].parent: needed a question, found null",
    file_of(
        conversation(QUESTION, {**QUESTION, "parent": 0})
    ): "messages[1].parent: needed an answer or null",
    file_of(
        conversation(QUESTION, {**ANSWER, "state": "<b>"})
    ): ".state: needed running or done or stopped or failed",
    file_of(
        conversation(QUESTION, {**ANSWER, "dropped": 1})
    ): "messages[1].dropped: needed fewer than the messages before this one, found 1",
    file_of(
        conversation(QUESTION, {**ANSWER, "attachments": [1]})
    ): ".attachments: needed a list of at most 0",
    file_of(conversation({**QUESTION, "id": "x"})): 'messages[0]: unknown field "id"',
    with_file(kind="constructor"): ".kind: needed text or picture or sound or video",
    with_file(format="image/svg+xml"): ".format: needed image/png or image/jpeg or image/webp or image/gif",
    with_file(format="text/html"): ".format: needed image/png",
    with_file(data="javascript:alert(1)"): ".data: needed base64",
    with_file(data="AAAA=AAA"): ".data: needed base64",
    with_file(name=1): ".name: needed text of at most 255 characters, found 1",
    with_file(url="https://example.org/"): 'unknown field "url"',
}
CHECKED = """
const [texts, done] = arguments;
import('/page/transfer.js').then(async ({ imported }) => done(await Promise.all(texts.map(
  (text) => imported(new Blob([text])).then((made) => `taken: ${made.length}`, (error) => error.message)))));
"""


def test_a_wrong_file_is_refused_with_its_place(browser: Browser, tmp_path: Path) -> None:
    browser.open()
    texts = [*WRONG, file_of(), file_of(conversation()), with_file(), with_file(data=None)]
    told = browser.driver.execute_async_script(CHECKED, texts)  # type: ignore[no-untyped-call]
    assert told[len(WRONG) :] == ["taken: 0", "taken: 1", "taken: 1", "taken: 1"]
    for sentence, found in zip(WRONG.values(), told, strict=False):
        assert sentence in found
    # Nothing is imported if only the last conversation of a file is wrong.
    bring(browser, file_of(conversation(), conversation(leaf=9)), tmp_path)
    start = "Nothing was imported.\nfile.conversations[1].leaf"
    browser.until(lambda: browser.text("#notice-text").startswith(start))
    assert stored(browser) == []
    huge = "const b = new Blob([]); Object.defineProperty(b, 'size', { value: 2 ** 28 }); const done = arguments[0];"
    huge += "import('/page/transfer.js').then(({ imported }) => imported(b).catch((error) => done(error.message)))"
    sentence = "A file may have at most 134 MB, and this one has 268 MB."
    assert browser.driver.execute_async_script(huge) == sentence  # type: ignore[no-untyped-call]


def harm(browser: Browser) -> list[str]:
    """Elements that markup in a text could have made, and requests that left the page's server."""
    return browser.script(  # type: ignore[no-any-return]
        "const made = document.querySelectorAll('.turn :is(script, iframe, svg, style, base, meta, form, input, object,"
        " embed, link), .text img, .chat *:not(small), [onerror], [onload], [onmouseover]');"
        "const links = [...document.querySelectorAll('.turn a')].filter(({ href }) => !/^https:/.test(href));"
        "const left = performance.getEntriesByType('resource').filter(({ name }) => !name.startsWith(location.origin));"
        "return [...[...made, ...links].map((node) => node.outerHTML), ...left.map(({ name }) => name)]"
    )


def test_markup_in_answers_and_imported_files_does_nothing(browser: Browser, tmp_path: Path) -> None:
    browser.open()
    talk(browser, "hostile")
    assert "<script>alert(1)</script>" in browser.answer
    links = {link.get_attribute("href") for link in browser.all(".turn a")}
    assert {link.split("/")[2] for link in links} == {"example.org"}
    assert harm(browser) == []
    question = {**QUESTION, "text": HOSTILE}
    answer = {
        **ANSWER,
        "text": HOSTILE,
        "reasoning": HOSTILE,
        "note": HOSTILE[:2000],
        "ledger": HOSTILE[:500],
    }
    picture = {"kind": "picture", "name": HOSTILE[:99], "format": "image/png", "data": "AAAA"}
    question["attachments"] = [{"kind": "text", "name": HOSTILE[:200], "text": HOSTILE}, picture]
    bring(browser, file_of(conversation(question, answer, title=HOSTILE[:200])), tmp_path)
    browser.until(lambda: titles(browser) == ["hostile", HOSTILE[:200]])
    browser.until(lambda: browser.all(".turn .chip"))
    browser.one(".turn .chip summary").click()
    assert harm(browser) == []
    # The picture's own data, which is not a picture, is the only thing that failed.
    assert browser.complaints() == []


# For everyone

AXE = ROOT / "build" / "page" / "node_modules" / "axe-core" / "axe.min.js"


@pytest.mark.skipif(not AXE.exists(), reason="axe-core is not here: `make test-page` downloads it")
@pytest.mark.parametrize(
    ("width", "scheme"), [(width, scheme) for width in (1440, 768, 390) for scheme in ("light", "dark")]
)
def test_axe_finds_nothing(browser: Browser, width: int, scheme: str) -> None:
    browser.server.inputs = ["text", "image", "audio"]
    browser.server.others = [entry("small", state="loading")]
    browser.server.sharing = SHARING
    with seen_on(browser, width, 800, scheme=scheme):
        browser.open()
        assert violations(browser) == []
        talk(browser, "think in markdown and $$\\frac{1}{x}$$")
        browser.press_button("Regenerate")
        browser.until(lambda: "2 of 2" in browser.text(".versions"))
        browser.until(lambda: browser.one("#send").is_displayed())
        browser.script("document.querySelector('.reasoning').open = true")
        assert violations(browser) == []
        browser.script("document.getElementById('toggle-chats').click()")
        assert violations(browser) == []
        browser.script("document.getElementById('toggle-engine').click()")
        assert violations(browser) == []
        browser.script("document.getElementById('open-settings').click()")
        assert violations(browser) == []


def test_the_panel_has_a_line_for_each_of_several_models(browser: Browser) -> None:
    browser.open()
    browser.until(lambda: "running" in browser.text("#queue"))
    assert not browser.one("#sharing").is_displayed()
    browser.server.sharing = SHARING
    browser.until(lambda: browser.one("#sharing").is_displayed())
    lines = "return [...document.querySelectorAll('#sharing-facts > div')].map((node) => node.innerText)"
    assert browser.script(lines) == [
        f"{MODEL}\nready, 6.0 GiB, 2 running",
        "a-name-that-is-much-too-long-for-the-panel-of-the-engine\nloading, 3.0 GiB",
        "<b>x</b>\nunloaded",
    ]
    assert browser.text("#sharing-total") == "1 of 3 in memory"
    fits = "const panel = document.getElementById('engine'); return panel.scrollWidth <= panel.clientWidth"
    assert browser.script(fits)
    assert browser.complaints() == []


def test_the_settings_link_to_the_servers_api_in_another_tab(browser: Browser) -> None:
    browser.open()
    browser.one("#open-settings").click()
    link = browser.one("#settings a")
    assert (link.text, link.get_attribute("href")) == ("The server's API", f"{browser.server.url}/docs")
    assert link.get_attribute("target") == "_blank"  # a conversation that is not kept stays open


def violations(browser: Browser) -> list[str]:
    code = """
    const done = arguments[0];
    const rules = { 'landmark-one-main': { enabled: false } };  // an open sheet or dialog covers it
    axe.run(document, { resultTypes: ['violations'], rules }).then(({ violations }) => done(violations
      .map(({ id, nodes }) => `${id}: ${nodes.map(({ html }) => html).join(' ').slice(0, 400)}`)));
    """
    browser.script(AXE.read_text(encoding="utf-8"))
    return browser.driver.execute_async_script(code)  # type: ignore[no-untyped-call, no-any-return]
