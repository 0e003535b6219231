"""Stop strings, wherever the token boundaries fall.

    text of a token  ->  push  ->  text that is safe to show, and the stop string if one is complete

What is shown, and where it stops, is a function of the text alone: the stop string that is complete first wins, and
of two that end together the longer one.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Holds back the longest end of the text that may be the start of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Take more text.

        Returns:
            emit: text that no stop string can reach any more, without the stop string itself.
            hit: the stop string that ended the text, or None. After a hit there is nothing more to push.
        """
        if not self._stops:
            return text, None
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            _, at, stop = min(found)
            self._held = ""
            return text[:at], stop
        num_safe = len(text) - longest_start(text, self._stops)
        self._held = text[num_safe:]
        return text[:num_safe], None

    def finish(self) -> str:
        """What is still held back, once it is known that no more text comes."""
        held, self._held = self._held, ""
        return held


def longest_start(text: str, words: Sequence[str]) -> int:
    """How many characters at the end of `text`, which ends with no whole one of `words`, may be the start of one."""
    longest = min(max(map(len, words), default=0) - 1, len(text))
    for num in range(longest, 0, -1):
        end = text[-num:]
        if any(word.startswith(end) for word in words):
            return num
    return 0
