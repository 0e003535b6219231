"""MiniMax-M3: calls as elements named after parameters, with a control token before every tag.

    ]<]minimax[>[<tool_call>
    ]<]minimax[>[<invoke name="get_weather">]<]minimax[>[<city>Oslo]<]minimax[>[</city>]<]minimax[>[</invoke>
    ]<]minimax[>[</tool_call>

Objects have an element for each key, arrays an element `item` for each of theirs. A model that does not think may begin
with the mark that ends thoughts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from argosy.prompt.formats.block_format import BlockFormat, inside_of
from argosy.prompt.formats.lark import Lark
from argosy.prompt.formats.parser import CutCall, FoundCall, Reading
from argosy.prompt.json_text import write_json
from argosy.prompt.tools import Tool, schema_of, types_of, value_of

_MARK = "]<]minimax[>["
OPEN, CLOSE = f"{_MARK}<tool_call>", f"{_MARK}</tool_call>"
_THINK, _THOUGHT = "<mm:think>", "</mm:think>"
_TAG = re.compile(rf"{re.escape(_MARK)}<(/?)([^<>\n]{{1,256}})>")
_INVOKE = re.compile(r'invoke name="([^"\n]+)"')
_MOST_DEEP = 32  # elements within each other


class MiniMaxM3(BlockFormat):
    name = "minimax_m3"
    words = (_MARK,)
    pieces = (_MARK,)
    thinking = (_THINK, _THOUGHT)
    wrapping = ((_THOUGHT, _THOUGHT),)
    blocks = {OPEN: CLOSE}  # noqa: RUF012 (a ClassVar, declared in the base)

    def read(self, block: Sequence[str], tools: Mapping[str, Tool]) -> Reading:
        calls = list(_read("".join(inside_of(block, CLOSE)), tools))
        return [one for one in calls if isinstance(one, FoundCall)] if calls and None not in calls else None

    def read_cut(self, block: Sequence[str], tools: Mapping[str, Tool]) -> Sequence[FoundCall | CutCall]:
        return [one for one in _read("".join(inside_of(block, CLOSE)), tools, is_cut=True) if one is not None]

    def _calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool) -> str:
        end = lark.literal(f"{_MARK}</invoke>")
        bodies = " | ".join(
            lark.rule(
                " ".join(
                    [
                        lark.literal(f'{_MARK}<invoke name="{tool.name}">'),
                        *_elements(lark, tool, tool.parameters),
                        end,
                    ]
                )
                + ' "\\n"'
            )
            for tool in tools
        )
        return f'{lark.mark(OPEN)} "\\n" ({bodies}){"+" if parallel else ""} {lark.mark(CLOSE)}'


def _read(
    text: str, tools: Mapping[str, Tool], *, is_cut: bool = False
) -> Iterator[FoundCall | CutCall | None]:
    """Yield the calls in `text`; None, and no more, where it is none."""
    at, end = 0, len(text.rstrip())
    while at < end:
        opening = _tag_at(text, at)
        invoke = _INVOKE.fullmatch(opening[2]) if opening is not None and not opening[1] else None
        tool = tools.get(invoke[1]) if invoke is not None else None
        if opening is None or tool is None:
            yield None
            return
        arguments: dict[str, object] = {}
        at = opening.end()
        while (tag := _tag_at(text, at)) is not None and not tag[1]:
            schema = tool.properties.get(tag[2])
            found = None if tag[2] in arguments else _value(text, tag, schema, tool.parameters)
            if found is None:
                break
            arguments[tag[2]], at = found
        if tag is None or tag[2] != "invoke" or not tag[1]:
            yield CutCall(tool.name, write_json(arguments)[:-1]) if is_cut else None
            return
        at = tag.end()
        yield FoundCall(tool.name, arguments)


def _tag_at(text: str, at: int) -> re.Match[str] | None:
    while at < len(text) and text[at].isspace():
        at += 1
    return _TAG.match(text, at)


def _value(
    text: str, opening: re.Match[str], schema: object, root: Mapping[str, object], depth: int = 0
) -> tuple[object, int] | None:
    """Read the element that `opening` begins; return its value and where it ends, or None if it does not."""
    tag = _TAG.search(text, opening.end())
    if tag is None or depth > _MOST_DEEP:
        return None
    if tag[1]:
        if tag[2] != opening[2]:
            return None
        bare, types = text[opening.end() : tag.start()], types_of(schema, root)
        if not bare.strip() and "string" not in types and types & {"object", "array"}:
            return ([] if "array" in types else {}), tag.end()
        return value_of(bare, schema, root), tag.end()
    if text[opening.end() : tag.start()].strip():
        return None
    children: list[tuple[str, object]] = []
    while not tag[1]:
        found = _value(text, tag, schema_of(schema, tag[2], root), root, depth + 1)
        following = None if found is None else _tag_at(text, found[1])
        if found is None or following is None:
            return None
        children.append((tag[2], found[0]))
        tag = following
    if tag[2] != opening[2]:
        return None
    types = types_of(schema, root)
    is_list = "array" in types or ("object" not in types and all(name == "item" for name, _ in children))
    if is_list:
        return [value for _, value in children], tag.end()
    return dict(children), tag.end()


def _elements(lark: Lark, tool: Tool, schema: Mapping[str, object], depth: int = 0) -> list[str]:
    """The elements of an object's properties, in their order."""
    properties, required = schema.get("properties"), schema.get("required")
    parts = []
    for name, inner in properties.items() if isinstance(properties, Mapping) else ():
        part = f"{lark.literal(f'{_MARK}<{name}>')} {_content(lark, tool, inner, name, depth)}"
        parts.append(part if isinstance(required, list) and name in required else f"({part})?")
    return parts


def _content(lark: Lark, tool: Tool, schema: object, name: str, depth: int) -> str:
    """A value and the tag that ends it."""
    end = f"{_MARK}</{name}>"
    types = types_of(schema, tool.parameters)
    if isinstance(schema, Mapping) and depth < _MOST_DEEP:
        choices = schema.get("enum")
        if isinstance(choices, list) and choices and all(isinstance(choice, str) for choice in choices):
            return f"({' | '.join(map(lark.literal, choices))}) {lark.literal(end)}"
        if types == {"object"} and schema.get("properties"):
            return " ".join([*_elements(lark, tool, schema, depth + 1), lark.literal(end)])
        if types == {"array"} and isinstance(schema.get("items"), Mapping):
            item = lark.rule(
                f"{lark.literal(f'{_MARK}<item>')} {_content(lark, tool, schema['items'], 'item', depth + 1)}"
            )
            return f"{item}* {lark.literal(end)}"
    if not types or "string" in types:
        return lark.text_until(end)
    assert isinstance(schema, Mapping)  # it has types
    whole = {key: tool.parameters[key] for key in ("$defs", "definitions") if key in tool.parameters}
    return f"{lark.json({**whole, **schema}, tool)} {lark.literal(end)}"


FORMATS = (MiniMaxM3,)
