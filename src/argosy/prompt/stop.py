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
        self._longest = max(map(len, self._stops), default=0)
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
        for held in range(min(self._longest - 1, len(text)), 0, -1):
            if text.endswith(tuple(stop[:held] for stop in self._stops if len(stop) > held)):
                self._held = text[-held:]
                return text[:-held], None
        self._held = ""
        return text, None

    def finish(self) -> str:
        """What is still held back, once it is known that no more text comes."""
        held, self._held = self._held, ""
        return held
