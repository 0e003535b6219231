"""Replace values by placeholders, and restore the values in the model's answer.

    "write to joe@example.com"  ─ redact ─>  "write to <EMAIL_1>"  ─ a model ─>  "Sent to <EMAIL_1>."  ─ restore ─>

A conversation has one `Placeholders`. Values are numbered in order of first appearance, so the same conversation,
one turn longer, gets the same placeholders and its prompt begins with the same tokens. A value spelled in two ways
(4111 1111, 4111-1111) has one placeholder, and is restored in its first spelling. If a text already contains
something that looks like a placeholder, its number is not used.

Elsewhere: values are found by `finder.py`; `stream.py` finds them in answers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable

from argosy.guard.pii.entities import Entity, bare
from argosy.guard.pii.finder import Finder
from argosy.guard.pii.spelling import plain
from argosy.guard.pii.stream import parts_of

_PLACEHOLDER = re.compile(r"<([A-Z][A-Z_]{1,15})_([0-9]{1,6})>")
_BEGUN = re.compile(r"<(?:[A-Z][A-Z_]{0,16}[0-9]{0,6})?")
_NUMBERS: frozenset[Entity] = frozenset({"phone", "iban", "card", "national_id", "mac_address"})


class Placeholders:
    """The values of one conversation. One thread at a time may use it."""

    def __init__(self, finder: Finder) -> None:
        self._finder = finder
        self._names: dict[tuple[Entity, str], str] = {}
        self._values: dict[str, str] = {}
        self._numbers: Counter[Entity] = Counter()
        self._literal: set[str] = set()  # placeholders that the caller itself wrote
        self.num_found: Counter[Entity] = Counter()

    def reserve(self, texts: Iterable[str]) -> None:
        """Reserve the placeholders that already occur in these texts; call it before `redact`."""
        for text in texts:
            if "<" in text:
                self._literal.update(match[0] for match in _PLACEHOLDER.finditer(text))

    @property
    def all_names(self) -> str:
        """All placeholders in use, as one text."""
        return " ".join(self._values)

    def redact(self, text: str) -> str:
        """`text` with placeholders for its values."""
        pieces, has_values = [], False
        for part in parts_of(text, self._finder):
            if part.entity is None:
                pieces.append(part.text)
                continue
            pieces.append(self.name(part.entity, part.text))
            self.num_found[part.entity] += 1
            has_values = True
        return "".join(pieces) if has_values else text

    def name(self, entity: Entity, value: str) -> str:
        """The placeholder of a value."""
        key = (entity, _key(entity, value))
        if key not in self._names:
            made = ""
            while not made or made in self._literal:
                self._numbers[entity] += 1
                made = f"<{entity.upper()}_{self._numbers[entity]}>"
            self._names[key], self._values[made] = made, value
        return self._names[key]

    def restore(self, text: str, write: Callable[[str], str] = str) -> str:
        """`text` with its placeholders replaced by their values, as `write` spells them; unknown placeholders stay."""
        if not self._values or "<" not in text:
            return text
        return _PLACEHOLDER.sub(lambda match: self._written(match[0], write), text)

    def _written(self, name: str, write: Callable[[str], str]) -> str:
        value = self._values.get(name)
        return name if value is None else write(value)


def _key(entity: Entity, value: str) -> str:
    text = plain(value).data.decode("latin-1")
    if entity in _NUMBERS:
        return bare(text)
    return text.lower() if entity in ("email", "ip_address") else value


class Restorer:
    """Restores a text that arrives in pieces, holding back an unfinished placeholder."""

    def __init__(self, placeholders: Placeholders, write: Callable[[str], str] = str) -> None:
        self._placeholders, self._write = placeholders, write
        self._held = ""

    def push(self, text: str) -> str:
        text = self._held + text
        start = text.rfind("<")
        is_begun = start >= 0 and _BEGUN.fullmatch(text, start) is not None
        self._held = text[start:] if is_begun else ""
        return self._placeholders.restore(text[:start] if is_begun else text, self._write)

    def finish(self) -> str:
        """Return the rest; another text may follow."""
        held, self._held = self._held, ""
        return held
