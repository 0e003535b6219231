"""How large, how deep and how free the text of a grammar may be.

    JSON schema   ->  require_schema_bounds
    Lark text     ->  read_lark  ->  lexemes  ->  require_lark_bounds    any grammar
                                              ->  require_plain          one that a caller wrote

`llguidance` goes from rule to rule, and from schema to schema, by calling itself: a long enough chain of references
ends the process, and none of its limits counts them. So they are counted here, before it sees the text.

Elsewhere: what is compiled, and the limits on work, are `constraint.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import unquote

from argosy.errors import GrammarError

MAX_GRAMMAR_CHARACTERS = 1 << 17  # with the schemas of all tools
MAX_CALLERS_CHARACTERS = 1 << 15  # of one that a caller wrote; reading it takes up to a tenth of a second
MAX_REGEX_CHARACTERS = 1 << 10  # of an expression, also inside a schema or a grammar
MAX_NESTING = 64
# Levels that are open at once where one rule or schema leads to the next. A thread whose stack has 2 MiB bore 490, one
# with the usual 8 MiB four times that; then the process ends.
MAX_LEVELS = 400

# As llguidance reads it; a part that fits nowhere is `other`, one character long.
_LEXEME = re.compile(
    r"""
    (?P<newline>(?:\r?\n)+[ \t]*)
  | (?P<space>[ \t]+|(?:\#|//)[^\n]*)
  | (?P<string>"(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2})|[^"\\\x00-\x1f\x7f])*"i?)
  | (?P<regex>/(?:\\.|[^/\\])+/[imslux]*)
  | (?P<token><[^<>\s]+>)
  | (?P<grammar>@[a-zA-Z0-9_-]+)
  | (?P<statement>%[a-z]+)
  | (?P<name>!?[_?]?[a-z][_a-z0-9-]*|_?[A-Z][_A-Z0-9-]*)
  | (?P<number>[+-]?[0-9]+)
  | (?P<sign>->|::|\.\.|[:,.(){}\[\]~&=|+*?])
  | (?P<other>.)
    """,
    re.VERBOSE | re.DOTALL,
)
_NOT_ANY = re.compile(r"\\.", re.DOTALL)
_OPENS, _CLOSES = "([{", ")]}"
_FOREIGN = {
    "token": "names a token",
    "grammar": "asks for a grammar elsewhere",
    "other": "cannot be read",
}


class Lexeme(NamedTuple):
    """A part of Lark text, white space and comments left out; `schema` is the value behind `%json`."""

    kind: str
    text: str
    at: int
    end: int
    schema: object = None


@dataclass(slots=True)
class _Node:
    """A rule or a schema: how deep it is itself, and where it leads."""

    levels: int = 0
    leads_to: set[str] = field(default_factory=set)


def require_size(text: str, most: int = MAX_GRAMMAR_CHARACTERS) -> None:
    if len(text) > most:
        raise GrammarError(f"the grammar has {len(text)} characters, and {most} are allowed")


def require_expression(text: str) -> None:
    if len(text) > MAX_REGEX_CHARACTERS:
        raise GrammarError(
            f"a regular expression has {len(text)} characters, and {MAX_REGEX_CHARACTERS} are allowed"
        )


# ── schemas ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def require_schema_bounds(schema: object) -> None:
    """Refuse deep nesting, long chains of references, and long expressions wherever they stand.

    Raises:
        GrammarError: one of these.
    """
    references: set[str] = set()
    has_base = False  # a part from which paths begin anew
    level: list[object] = [schema]
    for _ in range(MAX_NESTING):
        following: list[object] = []
        for item in level:
            if isinstance(item, dict):
                named = item.get("patternProperties")
                expressions = [item.get("pattern"), *(named if isinstance(named, dict) else ())]
                for expression in expressions:
                    if isinstance(expression, str):
                        require_expression(expression)
                references |= _references_of(item)
                has_base |= item is not schema and any(
                    isinstance(item.get(key), str) for key in ("$id", "id")
                )
                following += item.values()
            elif isinstance(item, list):
                following += item
        if not following:
            break
        level = following
    else:
        raise too_deep()
    if references:
        if has_base:
            raise GrammarError("a schema with references has a part with an '$id' of its own")
        _require_levels(_schema_nodes(schema, references))


def too_deep() -> GrammarError:
    return GrammarError(f"the schema is nested more than {MAX_NESTING} deep")


def _references_of(item: Mapping[str, object]) -> set[str]:
    return {
        found for key in ("$ref", "$dynamicRef", "$recursiveRef") if isinstance(found := item.get(key), str)
    }


def _schema_nodes(schema: object, references: Iterable[str]) -> dict[str, _Node]:
    """The schema, and every part of it that a reference names; a part inside another is where that one leads, too."""
    targets = {"#": schema}
    for reference in references:
        targets[reference] = _part(schema, reference)
    names = {id(part): name for name, part in targets.items() if isinstance(part, dict | list)}
    nodes = {}
    for name, target in targets.items():
        node = nodes[name] = _Node()
        # What only stands ready to be named is no part of a way that leads through the whole.
        parts = (
            {key: part for key, part in target.items() if key not in ("$defs", "definitions")}
            if isinstance(target, dict)
            else target
        )
        level: list[object] = [parts]
        while level:
            node.levels += 1
            following: list[object] = []
            for item in level:
                inner = names.get(id(item))
                if inner is not None and item is not target:
                    node.leads_to.add(inner)
                elif isinstance(item, dict):
                    node.leads_to |= _references_of(item)
                    following += [part for part in item.values() if isinstance(part, dict | list)]
                elif isinstance(item, list):
                    following += [part for part in item if isinstance(part, dict | list)]
            level = following
        # Two names of one part are one place.
        node.leads_to.add(names.get(id(target), name))
        node.leads_to.discard(name)
    return nodes


def _part(schema: object, reference: str) -> object:
    """What a reference names; nothing, if it is not there.

    Raises:
        GrammarError: it is no path from the root, so where it leads is not known here.
    """
    if reference not in ("#", "") and not reference.startswith("#/"):
        raise GrammarError(
            f"a reference in a schema is a path like '#/$defs/name', and one is '{reference[:64]}'"
        )
    found = schema
    for step in reference.split("/")[1:]:
        key = unquote(step).replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict):
            found = found.get(key)
        elif isinstance(found, list) and key.isdecimal() and len(key) < 6 and int(key) < len(found):
            found = found[int(key)]
        else:
            return None
    return found


# ── Lark text ───────────────────────────────────────────────────────────────────────────────────────────────────────


def read_lark(text: str) -> list[Lexeme]:
    """The parts of `text`.

    Raises:
        GrammarError: what follows `%json` is not JSON.
    """
    lexemes, at = list[Lexeme](), 0
    while at < len(text):
        found = _LEXEME.match(text, at)
        assert found is not None  # `other` is any character
        kind, at = str(found.lastgroup), found.end()
        schema: object = None
        if found[0] == "%json":
            begin = re.compile(r"\s*").match(text, at)
            assert begin is not None
            try:
                schema, at = json.JSONDecoder().raw_decode(text, begin.end())
            except ValueError:
                raise GrammarError("a schema in the grammar is not JSON") from None
            except RecursionError:
                raise too_deep() from None
        if kind != "space":
            lexemes.append(Lexeme(kind, found[0], found.start(), at, schema))
    return lexemes


def require_lark_bounds(lexemes: Sequence[Lexeme]) -> None:
    """Refuse long expressions, deep nesting, and long chains of rules.

    Raises:
        GrammarError: one of these.
    """
    nodes: dict[str, _Node] = {}
    node, depth, is_first = _Node(), 0, True
    for lexeme in lexemes:
        if lexeme.kind == "regex":
            require_expression(_NOT_ANY.sub("_", lexeme.text[1 : lexeme.text.rindex("/")]))
        elif lexeme.text in _OPENS:
            depth += 1
            node.levels = max(node.levels, depth + 1)
        elif lexeme.text in _CLOSES:
            depth -= 1
        elif lexeme.kind == "name":
            name = lexeme.text.lstrip("!?")
            if is_first:  # a rule begins; a grammar in a grammar may have one of the same name
                node = nodes.setdefault(name, _Node())
                node.levels, depth = node.levels + 1, 0
            else:
                node.leads_to.add(name)
        is_first = lexeme.kind == "newline"
    _require_levels(nodes)


def require_plain(text: str) -> None:
    """Refuse what a caller's grammar may not hold: it says what text there may be, and nothing of tokens or of options.

    Raises:
        GrammarError: what it holds, and where.
    """
    require_size(text, MAX_CALLERS_CHARACTERS)
    lexemes = read_lark(text)
    require_lark_bounds(lexemes)
    depth, has_start = 0, False
    for at, lexeme in enumerate(lexemes):
        before = lexemes[at - 1].kind if at else "newline"
        after = lexemes[at + 1] if at + 1 < len(lexemes) else Lexeme("newline", "", 0, 0)
        depth += (lexeme.text in _OPENS) - (lexeme.text in _CLOSES)
        reason = _FOREIGN.get(lexeme.kind)
        if depth < 0:
            reason = "closes a bracket that is not open"
        elif (
            lexeme.text == "~" and after.kind != "number"
        ):  # its bytes may be no text, and so a control token
            reason = "lets through what is no text: only 'x~2..5' is allowed"
        elif lexeme.text == "::":
            reason = "gives a rule a parameter"
        elif lexeme.kind == "statement" and (
            lexeme.text not in ("%ignore", "%import") or (lexeme.text == "%import" and after.text != "common")
        ):
            reason = "is no statement for a caller: %ignore and %import common.NAME are"
        elif lexeme.kind == "name" and before == "newline" and after.text != ":":
            reason = "is followed by options, and a rule has none: expected ':'"
        if reason is not None:
            line = text.count("\n", 0, lexeme.at) + 1
            raise GrammarError(f"line {line} of the grammar: '{lexeme.text[:40]}' {reason}")
        has_start |= before == "newline" and lexeme.text.lstrip("!?") == "start"
    if depth:
        raise GrammarError("the grammar has a bracket that nothing closes")
    if not has_start:
        raise GrammarError("the grammar has no rule 'start'")


# ── chains ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _require_levels(nodes: Mapping[str, _Node]) -> None:
    levels = _most_levels(nodes)
    if levels > MAX_LEVELS:
        raise GrammarError(
            f"references of the grammar lead {levels} levels deep, and {MAX_LEVELS} are allowed"
        )


def _most_levels(nodes: Mapping[str, _Node]) -> int:
    """So many levels at most are open at once, however references are followed; a circle counts as a whole."""
    backwards: dict[str, list[str]] = {name: [] for name in nodes}
    for name, node in nodes.items():
        for to in node.leads_to & nodes.keys():
            backwards[to].append(name)
    circle: dict[str, int] = {}
    most: list[int] = []  # of each circle, from where it begins on
    # Kosaraju: what is left last can be reached from nothing outside its circle that is not numbered yet.
    for first in reversed(
        _left_in_order({name: sorted(node.leads_to & nodes.keys()) for name, node in nodes.items()})
    ):
        if first in circle:
            continue
        number, waiting, before, levels = len(most), [first], 0, 0
        circle[first] = number
        while waiting:
            name = waiting.pop()
            levels += nodes[name].levels
            for other in backwards[name]:
                if other not in circle:
                    circle[other] = number
                    waiting.append(other)
                elif circle[other] != number:
                    before = max(before, most[circle[other]])
        most.append(before + levels)
    return max(most, default=0)


def _left_in_order(graph: Mapping[str, Sequence[str]]) -> list[str]:
    """Names in the order in which a walk in depth leaves them, without calling itself."""
    seen, left = set[str](), list[str]()
    for root in graph:
        if root in seen:
            continue
        seen.add(root)
        path = [(root, iter(graph[root]))]
        while path:
            name, rest = path[-1]
            following = next((other for other in rest if other not in seen), None)
            if following is None:
                path.pop()
                left.append(name)
            else:
                seen.add(following)
                path.append((following, iter(graph[following])))
    return left
