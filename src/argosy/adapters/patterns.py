r"""Match module names against the patterns of an adapter's config in bounded time.

PEFT matches `(.*\.)?(PATTERN)$` with Python's `re`, whose time a hostile pattern makes exponential. This follows all
paths of a pattern at once, so time grows with the product of the lengths of pattern and name.

Supported: characters, `.`, `\d`, `\w`, `\.`, `[...]`, groups, `|`, `*`, `+`, `?` and both anchors.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass, field

MOST_PATTERNS = 10_000
_LONGEST_PATTERN = 256
_DEEPEST = 8
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")

_Test = Callable[[str], bool]


class PatternError(ValueError):
    """A pattern is malformed or not supported."""


def compile_pattern(pattern: str) -> Callable[[str], bool]:
    """Return a predicate for names that a pattern matches as PEFT does.

    Raises:
        PatternError: the pattern is too long, malformed, or has other syntax.
    """
    if len(pattern) > _LONGEST_PATTERN:
        raise PatternError(f"has {len(pattern)} characters; at most {_LONGEST_PATTERN} are read")
    if set(pattern.replace("\\.", "")) <= _PLAIN:
        plain = pattern.replace("\\.", ".")
        return lambda name: name == plain or name.endswith("." + plain)
    machine = _Machine()
    end = _Parser(pattern, machine).parse(0)

    def matches(name: str) -> bool:
        starts = {0} | {i + 1 for i, char in enumerate(name) if char == "."}
        return machine.run(name, starts, end)

    return matches


@dataclass
class _Machine:
    """States and moves: on one character, or on none where `test` is None; a move may demand an end of the name."""

    moves: list[list[tuple[_Test | None, str, int]]] = field(default_factory=lambda: [[]])

    def add(self) -> int:
        self.moves.append([])
        return len(self.moves) - 1

    def move(self, start: int, end: int, test: _Test | None = None, anchor: str = "") -> None:
        self.moves[start].append((test, anchor, end))

    def run(self, name: str, starts: Set[int], end: int) -> bool:
        states: set[int] = set()
        for at in range(len(name) + 1):
            # An anchor for the start in a pattern holds only where the name begins.
            states = self._closed(states | ({0} if at in starts else set()), at == 0, at == len(name))
            if at < len(name):
                char = name[at]
                states = {
                    to
                    for state in states
                    for test, _, to in self.moves[state]
                    if test is not None and test(char)
                }
        return end in states

    def _closed(self, states: set[int], is_start: bool, is_end: bool) -> set[int]:
        found, waiting = set(states), list(states)
        while waiting:
            for test, anchor, to in self.moves[waiting.pop()]:
                holds = not anchor or (is_start if anchor == "^" else is_end)
                if test is None and holds and to not in found:
                    found.add(to)
                    waiting.append(to)
        return found


class _Parser:
    """A pattern, read from left to right into moves of a machine."""

    def __init__(self, pattern: str, machine: _Machine) -> None:
        self._text, self._at, self._machine, self._depth = pattern, 0, machine, 0

    def parse(self, start: int) -> int:
        end = self._choices(start)
        if self._at < len(self._text):
            raise PatternError(f"has {self._text[self._at]!r} at position {self._at}, which is not supported")
        return end

    def _next(self) -> str:
        return self._text[self._at] if self._at < len(self._text) else ""

    def _choices(self, start: int) -> int:
        end = self._machine.add()
        while True:
            self._machine.move(self._sequence(start), end)
            if self._next() != "|":
                return end
            self._at += 1

    def _sequence(self, start: int) -> int:
        while (char := self._next()) and char not in "|)":
            start = self._repeated(start)
        return start

    def _repeated(self, start: int) -> int:
        # States of its own, so that a repetition does not leak into what comes before it.
        first = self._machine.add()
        self._machine.move(start, first)
        last, end = self._one(first), self._machine.add()
        self._machine.move(last, end)
        if (sign := self._next()) and sign in "*+?":
            self._at += 1
            if sign in "*?":
                self._machine.move(first, end)
            if sign in "*+":
                self._machine.move(last, first)
            if self._next() == "?":  # lazy: the same names match
                self._at += 1
        return end

    def _one(self, start: int) -> int:
        char = self._next()
        self._at += 1
        if char == "(":
            return self._group(start)
        end = self._machine.add()
        if char in "^$":
            self._machine.move(start, end, anchor=char)
        elif char == ".":
            self._machine.move(start, end, lambda _: True)
        elif char == "[":
            self._machine.move(start, end, self._set())
        elif char == "\\":
            self._machine.move(start, end, self._escape())
        elif char in "*+?{}])":
            raise PatternError(f"has {char!r} at position {self._at - 1}, which is not supported")
        else:
            self._machine.move(start, end, lambda other: other == char)
        return end

    def _group(self, start: int) -> int:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise PatternError(f"nests groups more than {_DEEPEST} deep")
        if self._text.startswith("?:", self._at):
            self._at += 2
        elif self._next() == "?":
            raise PatternError("has a group that begins with '?', which is not supported")
        end = self._choices(start)
        if self._next() != ")":
            raise PatternError("has a group without an end")
        self._at += 1
        self._depth -= 1
        return end

    def _escape(self) -> _Test:
        char = self._next()
        self._at += 1
        if char == "d":
            return str.isdecimal
        if char == "w":
            return lambda other: other.isalnum() or other == "_"
        if not char or char.isalnum():
            raise PatternError(f"has '\\{char}', which is not supported")
        return lambda other: other == char

    def _set(self) -> _Test:
        end = self._text.find("]", self._at + 1)
        body = self._text[self._at : end]
        if end < 0 or "\\" in body or "[" in body:
            raise PatternError("has a set of characters that is not supported")
        self._at = end + 1
        is_negated, body = body.startswith("^"), body.removeprefix("^")
        ranges, at = [], 0
        while at < len(body):
            is_range = body[at + 1 : at + 2] == "-" and at + 2 < len(body)
            ranges.append((body[at], body[at + 2] if is_range else body[at]))
            at += 3 if is_range else 1
        return lambda char: any(low <= char <= high for low, high in ranges) != is_negated
