"""Find personal data and secrets in a text.

    text  ->  spelling.plain  ->  patterns of `entities.py`, each match checked  ->  Found, none within another

The patterns run in RE2 (the package google-re2), and the package phonenumbers reads telephone numbers. Names of
people, places and diseases have no pattern and are not found.

Elsewhere: `placeholders.py` replaces the values; `stream.py` searches a text that is still being written.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from argosy.errors import UsageError
from argosy.guard.pii import phones
from argosy.guard.pii.entities import ENTITIES, RULES, Candidate, Entity, Rule
from argosy.guard.pii.spelling import Plain, plain
from argosy.installed import command_for_extra

REGIONS = ("US", "GB", "DE", "FR", "ES")
SHORTEST = 6  # characters of a value: a@b.co, 1::2:3
_FOUND = b"\n"  # replaces a found value: only the first pattern matches across a line end


@dataclass(frozen=True, slots=True, order=True)
class Found:
    """`text[start:end]` is a value of this entity."""

    start: int
    end: int
    entity: Entity


class Finder:
    """Any thread may use it.

    Args:
        entities: the kinds of personal data to look for.
        regions: countries whose national telephone numbers are found, in addition to numbers with a country code.

    Raises:
        UsageError: a package is missing, or an entity or region is unknown.
    """

    def __init__(self, entities: Collection[str] = ENTITIES, *, regions: Sequence[str] = REGIONS) -> None:
        for name in entities:
            if name not in ENTITIES:
                raise UsageError(f"unknown kind of personal data {name[:32]!a}; known: {', '.join(ENTITIES)}")
        try:
            import phonenumbers  # noqa: F401
            import re2
        except ImportError as error:
            raise UsageError(
                f"looking for personal data needs the package {error.name}, which is not installed",
                hint=f"`{command_for_extra('guard')}`",
            ) from None
        options = re2.Options()
        options.encoding = re2.Options.Encoding.LATIN1
        options.log_errors = False
        self._rules = [
            (rule, re2.compile(rule.pattern.encode("latin-1"), options))
            for rule in RULES
            if rule.entity in entities
        ]
        if "phone" in entities:
            self._rules.append(phones.rule(regions, options))

    def find(self, text: str) -> list[Found]:
        """The values in `text`, in order."""
        return self.find_plain(plain(text))

    def find_plain(self, given: Plain) -> list[Found]:
        """The values in a text that is already in plain spelling, with places in the original."""
        data, low, found = given.data, given.data.lower(), list[Found]()
        if len(data) < SHORTEST:  # a schema may have a hundred thousand such texts
            return found
        for rule, pattern in self._rules:
            if all(any(need in low for need in needs) for needs in rule.needs):
                values = list(_values(rule, pattern, data))
                data = _without(data, values)  # values do not overlap
                found += [Found(*given.span(value.start, value.end), rule.entity) for value in values]
        return sorted(found)


def _values(rule: Rule, pattern: Any, data: bytes) -> Iterator[Candidate]:
    at, num_read = 0, 0
    while (match := pattern.search(data, at)) is not None:
        num_read += 1
        start, end = match.span(rule.group)
        accepted = rule.check(Candidate(data, start, end, num_read))
        if accepted is not None:
            yield accepted
            at = accepted.end
        elif rule.is_number:
            at = match.start() + len(_GROUP.match(match.group())[0])  # type: ignore[index]  # matches any bytes
        else:
            at = match.end()
        at = max(at, match.start() + 1)


_GROUP = re.compile(rb"[^0-9A-Za-z]*[0-9A-Za-z]*")


def _without(data: bytes, values: Sequence[Candidate]) -> bytes:
    if not values:
        return data
    left = bytearray(data)
    for value in values:
        left[value.start : value.end] = _FOUND * (value.end - value.start)
    return bytes(left)
