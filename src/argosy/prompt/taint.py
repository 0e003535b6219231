"""Strings that remember which of their characters came from a caller.

    caller's text  ->  shadow characters  ->  the template's operations  ->  segments: template's, caller's

Every character of a caller's text is replaced by a shadow: a code point in planes 4 to 13, which Unicode has never
assigned. Whatever a template does to the string (join, slice, repeat), the shadows move with it, so each output
character shows its own origin. `Tainted` answers questions about the string (`in`, `startswith`, `strip`, `split` and
others) as the plain text would. If a template finds a way around that, its output differs from that of the plain text,
and the caller of this module compares the two.

A caller cannot forge a shadow: a shadow in a caller's text is itself replaced by another one.

Elsewhere: `template_worker.py` renders with these strings. Standard library only.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, SupportsIndex

_FIRST, _LAST = 0x40000, 0xDFFFF
_SHADOWS = re.compile(f"[{chr(_FIRST)}-{chr(_LAST)}]")
# A character that Unicode may assign has its shadow at the same place in another plane, so whole texts change
# planes at once. All other characters come only from callers who impersonate a template; they share planes 11 to 13
# in order of arrival.
_UNICODE_PLANES = bytes((0, 1, 2, 3, 14, 15, 16))
_TO_SHADOWS = bytes.maketrans(_UNICODE_PLANES, bytes(range(4, 11)))
_FROM_SHADOWS = bytes.maketrans(bytes(range(4, 11)), _UNICODE_PLANES)
_FIRST_SHARED = 0xB0000
_UTF_32 = codecs.lookup("utf-32-le")  # looked up here, because the worker may open no file later
_SHARED = re.compile(f"[{chr(_FIRST_SHARED)}-{chr(_LAST)}]")
_RUNS = re.compile(f"[{chr(_FIRST)}-{chr(_LAST)}]+|[^{chr(_FIRST)}-{chr(_LAST)}]+")


def has_shadows(text: str) -> bool:
    """Whether any character of `text` is in the range of shadows."""
    return _SHADOWS.search(text) is not None


class TooManyCharacters(ValueError):
    """There are more distinct characters of planes 4 to 13 than shadows for them."""


def _in_planes(text: str, table: bytes) -> str:
    """`text` with each character moved to the plane that `table` gives for its plane."""
    data = bytearray(_UTF_32.encode(text, "surrogatepass")[0])
    data[2::4] = data[2::4].translate(table)
    return _UTF_32.decode(data, "surrogatepass")[0]


class ShadowMap:
    """The shadows for all characters in the texts of one conversation."""

    def __init__(self) -> None:
        self._shared: dict[str, str] = {}  # character of planes 4 to 13 -> shadow
        self._back: dict[str, str] = {}  # shadow -> character

    def _share(self, found: re.Match[str]) -> str:
        character = found[0]
        shadow = self._shared.get(character)
        if shadow is None:
            code = _FIRST_SHARED + len(self._shared)
            if code > _LAST:
                raise TooManyCharacters(
                    f"more than {_LAST - _FIRST_SHARED + 1} different characters that are not in Unicode"
                )
            shadow = self._shared[character] = chr(code)
            self._back[shadow] = character
        return shadow

    def shadow(self, text: str) -> str:
        return _in_planes(_SHADOWS.sub(self._share, text), _TO_SHADOWS)

    def plain(self, data: str) -> str:
        text = _in_planes(data, _FROM_SHADOWS)
        if not self._back:
            return text
        return _SHARED.sub(lambda found: self._back.get(found[0], found[0]), text)

    def taint(self, text: str) -> Tainted:
        """The caller's `text` with every character tainted."""
        return Tainted(self.shadow(text), self)

    def keep(self, value: Any) -> Any:
        """Wrap `value` as `Tainted` again if it is a plain string with shadows."""
        if type(value) is str and has_shadows(value):
            return Tainted(value, self)
        return value

    def segments(self, data: str) -> list[tuple[bool, str]]:
        """Cut `data` into runs of (is the caller's, plain text)."""
        return [(has_shadows(run[0]), self.plain(run)) for run in _RUNS.findall(data)]


def _without_taint(value: Any) -> Any:
    """An argument of a question about the text, without taint."""
    if isinstance(value, Tainted):
        return value._plain
    if isinstance(value, tuple):
        return tuple(_without_taint(item) for item in value)
    return value


class Tainted(str):
    """Text that contains shadows: copies keep them, and questions see the plain text."""

    _shadows: ShadowMap  # the sandbox keeps a template away from names that start with an underscore
    _plain: str

    def __new__(cls, data: str, shadows: ShadowMap) -> Tainted:
        made = super().__new__(cls, data)
        made._shadows = shadows
        made._plain = shadows.plain(data)
        return made

    # Questions about the text.
    def __eq__(self, other: object) -> bool:
        return bool(self._plain == _without_taint(other))

    def __ne__(self, other: object) -> bool:
        return bool(self._plain != _without_taint(other))

    def __lt__(self, other: str) -> bool:
        return bool(self._plain < _without_taint(other))

    def __le__(self, other: str) -> bool:
        return bool(self._plain <= _without_taint(other))

    def __gt__(self, other: str) -> bool:
        return bool(self._plain > _without_taint(other))

    def __ge__(self, other: str) -> bool:
        return bool(self._plain >= _without_taint(other))

    def __hash__(self) -> int:
        return hash(self._plain)

    def __contains__(self, other: object) -> bool:
        return _without_taint(other) in self._plain

    # Parts of the text.
    def _cut(self, start: int, stop: int) -> Tainted:
        return Tainted(str.__getitem__(self, slice(start, stop)), self._shadows)

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        return Tainted(super().__getitem__(key), self._shadows)

    def __iter__(self) -> Iterator[str]:
        return (self._cut(at, at + 1) for at in range(len(self)))

    def lstrip(self, chars: str | None = None) -> str:
        return self._cut(len(self) - len(self._plain.lstrip(_without_taint(chars))), len(self))

    def rstrip(self, chars: str | None = None) -> str:
        return self._cut(0, len(self._plain.rstrip(_without_taint(chars))))

    def strip(self, chars: str | None = None) -> str:
        return self.rstrip(chars).lstrip(chars)

    def removeprefix(self, prefix: str) -> str:
        return self._cut(len(self) - len(self._plain.removeprefix(_without_taint(prefix))), len(self))

    def removesuffix(self, suffix: str) -> str:
        return self._cut(0, len(self._plain.removesuffix(_without_taint(suffix))))

    def _parts(self, parts: Iterable[str]) -> list[str]:
        """Cut this text as its plain text is cut into `parts`, from left to right."""
        cut: list[str] = []
        at = 0
        for part in parts:
            start = self._plain.index(part, at)
            at = start + len(part)
            cut.append(self._cut(start, at))
        return cut

    def partition(self, sep: str) -> tuple[str, str, str]:
        before, found, after = self._parts(self._plain.partition(_without_taint(sep)))
        return before, found, after

    def rpartition(self, sep: str) -> tuple[str, str, str]:
        before, found, _ = self._plain.rpartition(_without_taint(sep))
        start, stop = len(before), len(before) + len(found)
        return self._cut(0, start), self._cut(start, stop), self._cut(stop, len(self))

    def splitlines(self, keepends: bool = False) -> list[str]:
        whole = self._parts(self._plain.splitlines(True))
        if keepends:
            return whole
        return [line[: len(bare)] for line, bare in zip(whole, self._plain.splitlines(), strict=True)]

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._split(self._plain.split(_without_taint(sep), maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._split(self._plain.rsplit(_without_taint(sep), maxsplit), sep)

    def _split(self, parts: list[str], sep: str | None) -> list[str]:
        if sep is None:
            return self._parts(parts)
        cut, at = [], 0
        for part in parts:
            cut.append(self._cut(at, at + len(part)))
            at += len(part) + len(sep)
        return list(cut)

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> str:
        if not old:
            return Tainted(str.replace(self, old, new, count), self._shadows)
        pieces = self._split(self._plain.split(_without_taint(old), count), old)
        return Tainted(str.join(str(new), pieces), self._shadows)

    # New text made from this text.
    def __add__(self, other: str) -> str:
        return Tainted(super().__add__(other), self._shadows)

    def __radd__(self, other: str) -> str:
        return Tainted(str.__add__(other, self), self._shadows)

    def as_json(self, ensure_ascii: bool) -> str:
        """This text as a JSON string, tainted from its first quote to its last."""
        return self._shadows.shadow(json.dumps(self._plain, ensure_ascii=ensure_ascii))

    def __repr__(self) -> str:
        """Python's own spelling, even inside lists and objects that a template prints directly."""
        return self._shadows.shadow(repr(self._plain))

    def join(self, parts: Iterable[str]) -> str:
        return Tainted(super().join(parts), self._shadows)


def _question(name: str) -> Callable[..., Any]:
    def ask(self: Tainted, *args: Any) -> Any:
        return getattr(self._plain, name)(*(_without_taint(arg) for arg in args))

    ask.__name__ = name
    return ask


def _change(name: str) -> Callable[..., Any]:
    def change(self: Tainted) -> Tainted:
        # Changing case may change the length, so the whole result counts as the caller's.
        return self._shadows.taint(getattr(self._plain, name)())

    change.__name__ = name
    return change


for _name in ("startswith", "endswith", "find", "rfind", "index", "rindex", "count"):
    setattr(Tainted, _name, _question(_name))
for _name in ("alnum", "alpha", "ascii", "decimal", "digit", "identifier", "lower", "numeric", "printable"):
    setattr(Tainted, "is" + _name, _question("is" + _name))
for _name in ("isspace", "istitle", "isupper"):
    setattr(Tainted, _name, _question(_name))
for _name in ("upper", "lower", "title", "capitalize", "swapcase", "casefold"):
    setattr(Tainted, _name, _change(_name))
