"""Bounds on the size, nesting and content of a grammar's text.

    JSON schema   ->  require_schema_bounds
    Lark text     ->  read_lark  ->  lexemes  ->  require_lark_bounds    for any grammar
                                              ->  require_plain          for a caller's grammar

`llguidance` follows rules and schema references by recursion: a long enough chain of references crashes the process,
and none of its limits covers such chains. So this module measures them before llguidance sees the text.

Elsewhere: `constraint.py` compiles grammars and limits their work.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import unquote

from argosy.config import MAX_GRAMMAR_CHARACTERS
from argosy.errors import GrammarError

MAX_CALLERS_CHARACTERS = 1 << 15  # for a caller's grammar; reading it takes up to a tenth of a second
MAX_REGEX_CHARACTERS = 1 << 10  # for a regular expression, also inside a schema or a grammar
MAX_NESTING = 64
# Levels open at once along a chain of rules or schemas. A thread with a 2 MiB stack survived 490 levels, and one
# with the usual 8 MiB survived four times that; beyond it the process crashes.
MAX_LEVELS = 400

# Follows llguidance's lexer; a character that matches nothing else is `other`.
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
    "grammar": "refers to another grammar",
    "other": "is not valid Lark",
}


class Lexeme(NamedTuple):
    """A lexeme of Lark text, other than white space and comments; `schema` is the value after `%json`."""

    kind: str
    text: str
    at: int
    end: int
    schema: object = None


@dataclass(slots=True)
class _Node:
    """A rule or a schema: its own depth, and the nodes it refers to."""

    levels: int = 0
    leads_to: set[str] = field(default_factory=set)


def require_size(text: str, most: int = MAX_GRAMMAR_CHARACTERS) -> None:
    if len(text) > most:
        raise GrammarError(f"the grammar has {len(text)} characters; at most {most} are allowed")


def require_expression(text: str) -> None:
    if len(text) > MAX_REGEX_CHARACTERS:
        raise GrammarError(
            f"a regular expression has {len(text)} characters; at most {MAX_REGEX_CHARACTERS} are allowed"
        )


# ── schemas ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def require_schema_bounds(schema: object) -> None:
    """Refuse deep nesting, long chains of references, and long regular expressions anywhere in the schema.

    Raises:
        GrammarError: the schema contains one of these.
    """
    references: set[str] = set()
    has_base = False  # some subschema resets the base of reference paths
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
            raise GrammarError("a schema with references has a subschema with its own '$id'")
        _require_levels(_schema_nodes(schema, references))


def too_deep() -> GrammarError:
    return GrammarError(f"the schema is nested more than {MAX_NESTING} levels deep")


def _references_of(item: Mapping[str, object]) -> set[str]:
    return {
        found for key in ("$ref", "$dynamicRef", "$recursiveRef") if isinstance(found := item.get(key), str)
    }


def _schema_nodes(schema: object, references: Iterable[str]) -> dict[str, _Node]:
    """Return nodes for the schema and every subschema that a reference names; a node refers to named subschemas inside
    it.
    """
    targets = {"#": schema}
    for reference in references:
        targets[reference] = part_of(schema, reference)
    names = {id(part): name for name, part in targets.items() if isinstance(part, dict | list)}
    nodes = {}
    for name, target in targets.items():
        node = nodes[name] = _Node()
        if (same := names.get(id(target), name)) != name:  # another name for a known subschema
            node.leads_to.add(same)
            continue
        # Definitions are reached only by reference, so they are not on a path through the whole schema.
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
        node.leads_to.discard(name)
    return nodes


def part_of(schema: object, reference: str) -> object:
    """Return the subschema that a reference names, or None if it does not exist.

    Raises:
        GrammarError: the reference is not a path from the root, so its target is unknown here.
    """
    if reference not in ("#", "") and not reference.startswith("#/"):
        raise GrammarError(
            f"a reference in a schema must be a path like '#/$defs/name', found '{reference[:64]}'"
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
    """Split Lark text into lexemes, up to the first invalid character.

    Raises:
        GrammarError: the text after `%json` is not JSON.
    """
    lexemes, at, kind = list[Lexeme](), 0, ""
    # After such a character, each unclosed quote would make the lexer read the rest again.
    while at < len(text) and kind != "other":
        found = _LEXEME.match(text, at)
        assert found is not None  # `other` matches any character
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
    """Refuse long regular expressions, deep nesting, long chains of rules, and characters that are not valid Lark.

    Raises:
        GrammarError: the grammar contains one of these.
    """
    nodes: dict[str, _Node] = {}
    node, depth, is_first = _Node(), 0, True
    for lexeme in lexemes:
        if lexeme.kind == "other":
            raise GrammarError(f"'{lexeme.text}' in the grammar {_FOREIGN['other']}")
        if lexeme.kind == "regex":
            require_expression(_NOT_ANY.sub("_", lexeme.text[1 : lexeme.text.rindex("/")]))
        elif lexeme.text in _OPENS:
            depth += 1
            node.levels = max(node.levels, depth + 1)
        elif lexeme.text in _CLOSES:
            depth -= 1
        elif lexeme.kind == "name":
            name = lexeme.text.lstrip("!?")
            if is_first:  # a rule begins; an embedded grammar may define a rule of the same name
                node = nodes.setdefault(name, _Node())
                node.levels, depth = node.levels + 1, 0
            else:
                node.leads_to.add(name)
        is_first = lexeme.kind == "newline"
    _require_levels(nodes)


def require_plain(text: str) -> None:
    """Refuse constructs that a caller's grammar may not use: it describes text and must not set tokens or options.

    Raises:
        GrammarError: names the construct and its line.
    """
    require_size(text, MAX_CALLERS_CHARACTERS)
    lexemes = read_lark(text)
    depth, has_start = 0, False
    for at, lexeme in enumerate(lexemes):
        before = lexemes[at - 1].kind if at else "newline"
        after = lexemes[at + 1] if at + 1 < len(lexemes) else Lexeme("newline", "", 0, 0)
        depth += (lexeme.text in _OPENS) - (lexeme.text in _CLOSES)
        reason = _FOREIGN.get(lexeme.kind)
        if depth < 0:
            reason = "closes a bracket that is not open"
        # A complement may match bytes that are not text, and therefore a control token.
        elif lexeme.text == "~" and after.kind != "number":
            reason = "may match bytes that are not text: only 'x~2..5' is allowed"
        elif lexeme.text == "::":
            reason = "gives a rule a parameter"
        elif lexeme.kind == "statement" and (
            lexeme.text not in ("%ignore", "%import") or (lexeme.text == "%import" and after.text != "common")
        ):
            reason = "is not allowed here: only %ignore and %import common.NAME are"
        elif lexeme.kind == "name" and before == "newline" and after.text != ":":
            reason = "is followed by options, which rules cannot have: expected ':'"
        if reason is not None:
            line = text.count("\n", 0, lexeme.at) + 1
            raise GrammarError(f"line {line} of the grammar: '{lexeme.text[:40]}' {reason}")
        has_start |= before == "newline" and lexeme.text.lstrip("!?") == "start"
    if depth:
        raise GrammarError("the grammar has an unclosed bracket")
    if not has_start:
        raise GrammarError("the grammar has no rule 'start'")
    require_lark_bounds(lexemes)


# ── chains ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _require_levels(nodes: Mapping[str, _Node]) -> None:
    levels = _most_levels(nodes)
    if levels > MAX_LEVELS:
        raise GrammarError(
            f"references in the grammar go {levels} levels deep; at most {MAX_LEVELS} are allowed"
        )


def _most_levels(nodes: Mapping[str, _Node]) -> int:
    """Return the maximum number of levels open at once along any chain of references; a cycle counts as a whole."""
    backwards: dict[str, list[str]] = {name: [] for name in nodes}
    for name, node in nodes.items():
        for to in node.leads_to & nodes.keys():
            backwards[to].append(name)
    circle: dict[str, int] = {}
    most: list[int] = []  # for each cycle, the most levels on a chain up to and including it
    # Kosaraju: the last remaining name is reachable only from its own cycle or from cycles already numbered.
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
    """Return names in depth-first postorder, computed without recursion."""
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
