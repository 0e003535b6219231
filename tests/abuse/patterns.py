"""Find regular expressions that a text can make slow.

    python -m tests.abuse.patterns          every pattern in src/argosy and what makes it slow, if anything does

Python's engine tries one way after another. It is slow if a long text can be divided in many ways among the
repetitions of a pattern, or if a search starts again inside a run that it has read before. Both are the same property
of the pattern's automaton (Weber and Seidl, 1991): two different places p and q, and a text on which p leads to p and
to q, and q to q. A search adds a place before the pattern that any text leads back to.

A repetition of at most 64 characters counts as none: it costs a factor, and no growth.

Elsewhere: `growth.py` measures whole readers; `test_patterns.py` has the patterns that may be slow, with reasons.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from re import _constants as kinds  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

SOURCE = Path(__file__).parents[2] / "src"
_MOST_BOUNDED = 64
_CALLS = frozenset({"compile", "match", "fullmatch", "search", "split", "sub", "subn", "findall", "finditer"})
_ANCHORED = frozenset({"match", "fullmatch"})
_MAY_MATTER = re.compile(rf"\bre\.|\.(?:{'|'.join(_CALLS)})\b")  # in a module that makes or uses patterns
_BEGINNINGS = (kinds.AT_BEGINNING, kinds.AT_BEGINNING_STRING)


@dataclass(frozen=True)
class Pattern:
    """A pattern of the source; `text` is None if it is made from what is known only at run time."""

    place: str
    name: str
    text: str | bytes | None
    flags: int
    is_searched: bool
    is_full: bool


# ── where patterns are ──────────────────────────────────────────────────────────────────────────────────────────────


def patterns() -> Iterator[Pattern]:
    """Every call of `re` in the source."""
    modules = {
        path: [*ast.walk(ast.parse(text))]
        for path in sorted((SOURCE / "argosy").rglob("*.py"))
        if path.stem != "__main__" and _MAY_MATTER.search(text := path.read_text())
    }
    used: dict[str, set[str]] = {}
    for nodes in modules.values():
        for node in nodes:
            if isinstance(node, ast.Attribute) and (name := _name_of(node.value)):
                used.setdefault(name, set()).add(node.attr)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and len(node.args) > 1:
                used.setdefault(_name_of(node.func.value), set()).add(
                    "search"
                )  # a match at one place after another
    for path, nodes in modules.items():
        calls = [node for node in nodes if isinstance(node, ast.Call) and _is_of_re(node.func)]
        if not calls:
            continue
        module = importlib.import_module(
            ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
        )
        names = {
            id(node.value): target
            for node in nodes
            if isinstance(node, ast.Assign | ast.AnnAssign | ast.keyword) and node.value is not None
            if (target := _target_of(node))
        }
        for node in calls:
            assert isinstance(node.func, ast.Attribute)
            name = names.get(id(node), "")
            methods = used.get(name, set()) & _CALLS if node.func.attr == "compile" else {node.func.attr}
            flags = [one.value for one in node.keywords if one.arg == "flags"] + node.args[
                1
                if node.func.attr == "compile"
                else {"sub": 4, "subn": 4, "split": 3}.get(node.func.attr, 2) :
            ]
            yield Pattern(
                f"{path.relative_to(SOURCE / 'argosy')}:{node.lineno}",
                name or ast.unparse(node.args[0])[:60],
                _value(node.args[0], module),
                int(_value(flags[0], module) or 0) if flags else 0,
                not methods <= _ANCHORED or not methods,
                methods == {"fullmatch"},
            )


def _is_of_re(called: ast.expr) -> bool:
    return isinstance(called, ast.Attribute) and _name_of(called.value) == "re" and called.attr in _CALLS


def _name_of(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _target_of(node: ast.Assign | ast.AnnAssign | ast.keyword) -> str:
    if isinstance(node, ast.keyword):
        return node.arg or ""
    return _name_of(node.targets[0] if isinstance(node, ast.Assign) else node.target)


def _value(node: ast.expr, module: Any) -> Any:
    try:
        return eval(compile(ast.Expression(node), "", "eval"), dict(vars(module)))  # noqa: S307 (our own source)
    except NameError:
        return None


# ── the automaton of one ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class _Piece:
    """A part of a pattern: the places where it begins and ends, and whether it may be empty."""

    first: set[int] = field(default_factory=set)
    last: set[int] = field(default_factory=set)
    sure: set[int] = field(default_factory=set)  # of the last ones, those after which no assertion can fail
    is_nullable: bool = True
    is_sure: bool = True  # nothing can fail where it is empty


class Automaton:
    """The places of a pattern, each of which takes one character, and which may follow which."""

    def __init__(self, text: str | bytes, flags: int = 0) -> None:
        tree = parser.parse(text, flags)
        self._flags = tree.state.flags
        self._is_bytes = isinstance(text, bytes)
        self._letters = _letters(tree, self._is_bytes)
        self.takes: list[frozenset[str]] = []
        self.follows: list[set[int]] = []
        self.twice: set[tuple[int, int]] = set()  # pairs that follow each other in two ways
        self._outer: list[frozenset[str]] = []
        self.whole = self._sequence(tree)
        is_line = bool(tree.state.flags & re.MULTILINE)
        self._is_anchored = (
            len(tree) > 0 and tree[0][0] is kinds.AT and not is_line and tree[0][1] in _BEGINNINGS
        )
        # Characters that no place tells apart count once.
        kept = {tuple(letter in one for one in self.takes): letter for letter in sorted(self._letters)}
        self.takes = [one & frozenset(kept.values()) for one in self.takes]
        self._letters = set(kept.values())

    def _sequence(self, items: Any) -> _Piece:
        made = _Piece()
        for kind, value in items:
            made = self._joined(made, self._piece(kind, value))
        return made

    def _piece(self, kind: Any, value: Any) -> _Piece:
        if kind in (kinds.LITERAL, kinds.NOT_LITERAL, kinds.ANY, kinds.IN):
            return self._place(self._matching(kind, value))
        if kind is kinds.BRANCH:
            pieces = [self._sequence(items) for items in value[1]]
            return _Piece(
                set().union(*(one.first for one in pieces)),
                set().union(*(one.last for one in pieces)),
                set().union(*(one.sure for one in pieces)),
                any(one.is_nullable for one in pieces),
                any(one.is_nullable and one.is_sure for one in pieces),
            )
        if kind is kinds.SUBPATTERN:
            _, added, removed, items = value
            outer, self._flags = self._flags, (self._flags | added) & ~removed
            made = self._sequence(items)
            self._flags = outer
            return made
        if kind is kinds.ATOMIC_GROUP:
            return self._sequence(value)
        if kind in (kinds.MAX_REPEAT, kinds.MIN_REPEAT, kinds.POSSESSIVE_REPEAT):
            return self._repeated(*value)
        if kind in (kinds.AT, kinds.ASSERT, kinds.ASSERT_NOT):
            return _Piece(is_sure=False)
        if kind is kinds.GROUPREF:
            return self._place(frozenset(self._letters))
        raise NotImplementedError(str(kind))

    def _place(self, takes: frozenset[str]) -> _Piece:
        self.takes.append(takes)
        self.follows.append(set())
        at = len(self.takes) - 1
        return _Piece({at}, {at}, {at}, False)

    def _repeated(self, least: int, most: int, items: Any) -> _Piece:
        made = self._sequence(items)
        if most > _MOST_BOUNDED:
            self._follow(made.last, made.first)
        if least == 0:
            made.is_nullable = made.is_sure = True
        return made

    def _joined(self, one: _Piece, other: _Piece) -> _Piece:
        self._follow(one.last, other.first)
        return _Piece(
            one.first | (other.first if one.is_nullable else set()),
            other.last | (one.last if other.is_nullable else set()),
            other.sure | (one.sure if other.is_nullable and other.is_sure else set()),
            one.is_nullable and other.is_nullable,
            one.is_sure and other.is_sure,
        )

    def _follow(self, froms: set[int], tos: set[int]) -> None:
        for at in froms:
            self.twice |= {(at, to) for to in tos & self.follows[at]}
            self.follows[at] |= tos

    def _matching(self, kind: Any, value: Any) -> frozenset[str]:
        return frozenset(letter for letter in self._letters if self._takes(kind, value, letter))

    def _takes(self, kind: Any, value: Any, letter: str) -> bool:
        forms = {letter, letter.lower(), letter.upper()} if self._flags & re.IGNORECASE else {letter}
        if kind is kinds.LITERAL:
            return chr(value) in forms
        if kind is kinds.NOT_LITERAL:
            return chr(value) not in forms
        if kind is kinds.ANY:
            return letter != "\n" or bool(self._flags & re.DOTALL)
        is_in = any(self._is_in(item, one) for item in value for one in forms)
        return is_in != (value[0][0] is kinds.NEGATE)

    def _is_in(self, item: tuple[Any, Any], letter: str) -> bool:
        kind, value = item
        if kind is kinds.LITERAL:
            return ord(letter) == value
        if kind is kinds.RANGE:
            return bool(value[0] <= ord(letter) <= value[1])
        if kind is kinds.CATEGORY:
            escape = {"DIGIT": "d", "SPACE": "s", "WORD": "w"}[str(value).rpartition("_")[2]]
            pattern = "\\" + (escape.upper() if "_NOT_" in str(value) else escape)
            if self._is_bytes:
                return re.match(pattern.encode(), letter.encode("latin-1")) is not None
            return re.match(pattern, letter) is not None
        return False  # NEGATE

    def slow(self, *, is_searched: bool, is_full: bool) -> str:
        """What makes the pattern slow, or nothing."""
        follows = [set(one) for one in self.follows]
        takes = list(self.takes)
        if (
            is_searched and not self._is_anchored
        ):  # a place before the pattern, which any character leads back to
            takes.append(frozenset(self._letters))
            follows.append({len(follows), *self.whole.first})
        # Where the pattern may end, a search has succeeded, and goes no other way. So a run that passes such a place
        # again and again does not fail.
        ends = set() if is_full else self.whole.sure
        inside = [set() if at in ends else follows[at] - ends for at in range(len(follows))]
        fails = [at for at in range(len(follows)) if at in _reachable(inside, at)]
        reached = [_reachable(follows, at) for at in range(len(follows))]
        loops = [at for at in range(len(follows)) if at in reached[at]]
        for p, q in self.twice:
            if p in reached[q] and takes[p] and not (p in ends and q in ends):
                return "a repetition inside a repetition"
        for p in loops:
            for q in fails:
                if p != q and q in reached[p] and self._pumps(p, q, takes, follows, reached):
                    if is_searched and p == len(self.takes):
                        return f"a search starts again inside {self._shown(q)}*"
                    return f"{self._shown(p)}* beside {self._shown(q)}*"
        return ""

    @staticmethod
    def _pumps(p: int, q: int, takes: Any, follows: Any, reached: Any) -> bool:
        """Whether one text leads from p to p, from p to q and from q to q."""
        seen, waiting = set(), [(p, p, q)]
        while waiting:
            one, two, three = waiting.pop()
            for a in follows[one]:
                if p not in reached[a] and a != p:
                    continue
                for b in follows[two]:
                    both = takes[a] & takes[b]
                    if not both or (q not in reached[b] and b != q):
                        continue
                    for c in follows[three]:
                        if not both & takes[c] or (q not in reached[c] and c != q):
                            continue
                        if (a, b, c) == (p, q, q):
                            return True
                        if (a, b, c) not in seen:
                            seen.add((a, b, c))
                            waiting.append((a, b, c))
        return False

    def _shown(self, at: int) -> str:
        return "[" + "".join(sorted(self.takes[at]))[:6].encode("unicode_escape").decode() + "…]"


def _reachable(follows: list[set[int]], at: int) -> set[int]:
    seen, waiting = set[int](), list(follows[at])
    while waiting:
        one = waiting.pop()
        if one not in seen:
            seen.add(one)
            waiting += follows[one]
    return seen


def _letters(tree: Any, is_bytes: bool) -> set[str]:
    """Enough characters to tell all sets of the pattern from each other."""
    found = {*map(ord, "aZ5_ \n\t-.\"'<\\"), 0xE9, *(() if is_bytes else (0x200B, 0x4E00, 0x1F600))}

    def walk(items: Any) -> None:
        if isinstance(items, int) and not isinstance(items, bool) and type(items) is int:
            found.update((items - 1, items, items + 1))
        elif isinstance(items, tuple | list | parser.SubPattern):
            for item in items:
                walk(item)

    walk(tree)
    most = 0x100 if is_bytes else 0x110000
    return {chr(code) for code in found if 0 <= code < most and not 0xD800 <= code < 0xE000}


def slow_patterns() -> Iterator[tuple[Pattern, str]]:
    """Every pattern, and what makes it slow, if anything does."""
    for one in patterns():
        if one.text is None:
            yield one, "made at run time"
        else:
            found = Automaton(one.text, one.flags)
            yield one, found.slow(is_searched=one.is_searched, is_full=one.is_full)


if __name__ == "__main__":
    for pattern, fault in slow_patterns():
        print(
            f"{pattern.place:40} {pattern.name:20} {'search' if pattern.is_searched else 'match':6} {fault}"
        )
