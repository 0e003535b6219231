"""Finds stop strings, wherever the token boundaries fall.

    text of a token  ->  push  ->  text that is safe to show, and the stop string if one is complete

The shown text and its end depend only on the text: the stop string completed first wins, and of two that end
together, the longer.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Holds back the longest end of the text that may start a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Take more text.

        Returns:
            emit: text that can no longer be part of a stop string, without the stop string itself.
            hit: the stop string that ended the text, or None. Push no more text after a hit.
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
        """Return the text still held back, once no more comes."""
        held, self._held = self._held, ""
        return held


def longest_start(text: str, words: Sequence[str]) -> int:
    """Length of the longest end of `text` that may start one of `words`; `text` ends with none of them complete."""
    longest = min(max(map(len, words), default=0) - 1, len(text))
    for num in range(longest, 0, -1):
        end = text[-num:]
        if any(word.startswith(end) for word in words):
            return num
    return 0
