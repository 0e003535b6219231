"""Stop strings end the text wherever the token boundaries fall."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from argosy.prompt.stop import StopStrings

letters = st.text("abc", max_size=12)
stops = st.lists(st.text("abc", min_size=1, max_size=4), max_size=4)


def stopped(text: str, stop_list: list[str]) -> tuple[str, str | None]:
    """Plain reference: scan the text one character at a time."""
    for end in range(1, len(text) + 1):
        done = [stop for stop in stop_list if text[:end].endswith(stop)]
        if done:
            longest = max(done, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(parts=st.lists(letters), stop_list=stops)
def test_the_emitted_text_does_not_depend_on_token_boundaries(parts: list[str], stop_list: list[str]) -> None:
    machine = StopStrings(stop_list)
    shown, hit = "", None
    for part in parts:
        emit, hit = machine.push(part)
        shown += emit
        if hit:
            break
    assert (shown + machine.finish(), hit) == stopped("".join(parts), stop_list)


@given(text=letters, stop_list=stops)
def test_only_text_that_may_begin_a_stop_string_is_held_back(text: str, stop_list: list[str]) -> None:
    machine = StopStrings(stop_list)
    emit, hit = machine.push(text)
    held = machine.finish()
    if hit is None:
        assert emit + held == text
        ends = [text[len(text) - size :] for size in range(1, len(text) + 1)]
        longest = max(
            (len(end) for end in ends if any(stop.startswith(end) and stop != end for stop in stop_list)),
            default=0,
        )
        assert len(held) == longest


def test_without_stop_strings_text_passes_unchanged() -> None:
    assert StopStrings(()).push("anything") == ("anything", None)


def test_a_stop_string_that_spans_three_tokens_is_not_emitted() -> None:
    machine = StopStrings(["###"])
    assert [machine.push(part) for part in ("Paris.", "#", "#", "# more")] == [
        ("Paris.", None),
        ("", None),
        ("", None),
        ("", "###"),
    ]
