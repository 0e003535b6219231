"""Renders chat templates one after another, in a separate process that may be killed.

    stdin: one JSON request per line  ->  render twice, or read  ->  stdout: one JSON answer per line

A template is part of a model file: data from a stranger. It runs in jinja2's immutable sandbox, and this process
has no files, no network and little memory; the parent process enforces the time limit. The first rendering uses the
callers' plain values, as every other engine does. The second uses tainted values, including object keys, and shows
who wrote each character. If the two differ, the template computes with the text in a way that hides its origin, and
the conversation is refused.

Elsewhere: `chat.py` starts this process, enforces the time limit and reads the answers; `taint.py` explains tainted
text.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import re
import resource
import select
import signal
import sys
from collections.abc import Callable, Iterable
from types import CodeType
from typing import Any

from jinja2 import TemplateError, meta, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from argosy.confine import forbid_files, limit_memory, limit_resource, virtual_bytes
from argosy.prompt.taint import ShadowMap, Tainted, TooManyCharacters, has_shadows

_IDLE_SECONDS = 2.0  # after this the process ends and frees its memory; the next request starts another
_CPU_SECONDS = 60  # a limit even if the parent process is gone
_MEMORY_BYTES = 128 << 20  # on top of the memory of the process when it is ready
_MEMORY_BYTES_PER_CHARACTER = 400  # for two renderings, shadows, and their JSON
_WARM_UP = r"""{% macro one(m) %}{{ 'a\u00e9\n' ~ m.content | trim | upper }}{% endmacro %}
{{ one(messages[0]) }}{{ '%s {}'.format(messages | tojson(indent=2)) }}{{ strftime_now('%d %B %Y') }}{{ 1 // 0 }}"""
# Stands in for a string while the JSON around it is written; strings that contain this character are replaced as
# well.
_HOLD = chr(0)
_HELD = re.compile(r'"\\u0000(\d+)\\u0000"')
_ASKS_WHETHER_SET = ("defined", "undefined", "default", "d")


class Refused(Exception):
    """The conversation cannot be rendered; `kind` says why."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class _Generation(Extension):
    """`{% generation %}` marks text for training; here it just prints its content."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _TaintGenerator(CodeGenerator):
    """`a ~ b` keeps the taint of its parts."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat(map(str, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")))")


class _Environment(ImmutableSandboxedEnvironment):
    """The environment that hub templates are written for; with a shadow map, its strings keep their taint."""

    code_generator_class = _TaintGenerator
    intercepted_binops = frozenset({"+", "*", "%"})

    def __init__(self, shadows: ShadowMap | None, now: datetime.datetime) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.shadows = shadows
        self.keep: Callable[[Any], Any] = shadows.keep if shadows is not None else lambda value: value
        self.concat = self._concat  # type: ignore[method-assign]
        # random differs between renderings; pprint shows a string's internals.
        for name in ("random", "pprint"):
            del self.filters[name]
        del self.globals["lipsum"]
        # These write lists and objects as Python does and then modify the result.
        for name in ("upper", "lower", "capitalize"):
            self.filters[name] = self._of_text(self.filters[name])
        self.filters = {name: self._keeping(made) for name, made in self.filters.items()}
        self.filters["tojson"] = self._to_json
        self.filters["replace"] = self._replace
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = now.strftime

    def _concat(self, parts: Iterable[str]) -> str:
        return self.keep("".join(parts))  # type: ignore[no-any-return]

    def _keeping(self, made: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(made)
        def keeping(*args: Any, **kwargs: Any) -> Any:
            return self.keep(made(*args, **kwargs))

        return keeping

    def _of_text(self, made: Callable[[str], str]) -> Callable[[Any], str]:
        return lambda value: made(value if isinstance(value, str) else self.keep(str(value)))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        return self.keep(super().call_binop(context, operator, left, right))

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        return self.keep(super().call(context, obj, *args, **kwargs))

    def getitem(self, obj: Any, argument: Any) -> Any:
        return self.keep(super().getitem(obj, argument))

    def _replace(self, text: Any, old: str, new: str, count: int = -1) -> str:
        text = text if isinstance(text, str) else str(text)
        return self.keep(text.replace(old, new, count))  # type: ignore[no-any-return]

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """Write JSON in which each tainted string is tainted from its opening to its closing quote."""
        held: list[str] = []

        def hold(inner: Any) -> Any:
            inner = self.keep(inner)
            if isinstance(inner, Tainted):
                held.append(inner.as_json(ensure_ascii))
                return f"{_HOLD}{len(held) - 1}{_HOLD}"
            if isinstance(inner, str) and _HOLD in inner:
                held.append(json.dumps(inner, ensure_ascii=ensure_ascii))
                return f"{_HOLD}{len(held) - 1}{_HOLD}"
            if isinstance(inner, dict):
                # Sorted here, because the stand-in for a key sorts differently.
                items = sorted(inner.items()) if sort_keys else inner.items()
                return {hold(key): hold(item) for key, item in items}
            if isinstance(inner, list | tuple):
                return [hold(item) for item in inner]
            return inner

        text = json.dumps(hold(value), ensure_ascii=ensure_ascii, indent=indent, separators=separators)
        return self.keep(_HELD.sub(lambda found: held[int(found[1])], text))  # type: ignore[no-any-return]


def _raise_exception(message: str) -> None:
    raise Refused("refused", str(message))


def render_segments(
    template: str,
    messages: list[dict[str, Any]],
    *,
    fixed: dict[str, Any],
    variables: dict[str, Any],
    max_characters: int,
    tools: list[dict[str, Any]] | None = None,
    now: datetime.datetime | None = None,
) -> list[tuple[bool, str]]:
    """Render `messages` and report who wrote each part.

    Args:
        template: source of the chat template.
        messages: role, content and more. The role comes from a fixed list; all other text is the caller's. Content
            may be a list of (is the caller's, text) instead.
        fixed: variables from the model's own files, such as `bos_token`; trusted like the template's text.
        variables: variables from the caller, each a string, number or boolean; text is the caller's.
        max_characters: limit on the output.
        tools: tools that the model may call; every string and key in it is the caller's.
        now: the time for `strftime_now`; the current time by default.

    Returns:
        (is the caller's, text) in order; neighbours differ in their origin.

    Raises:
        Refused: kind "refused" (the template rejects the conversation), "template" (it fails), "too_long", or
            "computed" (it computes new text from the callers').
    """
    if has_shadows(template) or has_shadows(json.dumps(fixed, ensure_ascii=False)):
        raise Refused("template", "it holds characters of Unicode planes 4 to 13, which are unassigned")
    now = now or datetime.datetime.now()

    try:
        code = _compile(template)
    except TemplateError as error:
        raise Refused("template", _said(error)) from None

    def render(shadows: ShadowMap | None) -> str:
        taint: Callable[[Any], Any] = _plain if shadows is None else functools.partial(_taint, shadows)
        environment = _Environment(shadows, now)
        compiled = environment.template_class.from_code(environment, code, environment.make_globals(None))
        pieces, length = [], 0
        try:
            conversation = [
                {key: _tainted(shadows, key, value) for key, value in message.items()} for message in messages
            ]
            said = {name: taint(value) for name, value in variables.items()}
            context = {**fixed, **said, "messages": conversation, "tools": taint(tools)}
            for piece in compiled.generate(context):
                pieces.append(piece)
                length += len(piece)
                if length > max_characters:
                    raise Refused("too_long", f"it wrote more than {max_characters} characters")
        except (Refused, RecursionError, MemoryError):
            raise
        except TooManyCharacters as error:
            raise Refused("refused", str(error)) from None
        except Exception as error:  # a template can raise anything that Python can
            raise Refused("template", _said(error)) from None
        return "".join(pieces)

    expected, shadows = render(None), ShadowMap()
    try:
        data = render(shadows)
    except Refused as refusal:
        raise Refused("computed" if refusal.kind == "template" else refusal.kind, str(refusal)) from None
    segments = shadows.segments(data)
    if "".join(text for _, text in segments) != expected:
        raise Refused("computed", "its output depends on the text in a way that hides who wrote what")
    return segments


def _tainted(shadows: ShadowMap | None, key: str, value: Any) -> Any:
    """Taint a value of a message, given its key."""
    if key == "role":
        return value
    if key == "content" and isinstance(value, list):
        if value and isinstance(value[0], dict):
            return [_part(shadows, part) for part in value]
        return _mixed(shadows, value)
    return _plain(value) if shadows is None else _taint(shadows, value)


@functools.lru_cache(maxsize=2)
def _compile(template: str) -> CodeType:
    """Compile a template. Any environment can run the code, because it contains nothing of a rendering."""
    return _Environment(None, datetime.datetime.now()).compile(template)


def _mixed(shadows: ShadowMap | None, pieces: list[tuple[bool, str]]) -> str:
    """A text that is partly the caller's."""
    if shadows is None:
        return "".join(text for _, text in pieces)
    data = "".join(shadows.shadow(text) if is_callers else text for is_callers, text in pieces)
    return shadows.keep(data)  # type: ignore[no-any-return]


def _part(shadows: ShadowMap | None, part: dict[str, Any]) -> dict[str, Any]:
    """Taint a part of a content with media, whose text is in pieces."""
    return {key: _mixed(shadows, value) if key == "text" else value for key, value in part.items()}


def _plain(value: Any) -> Any:
    return value


def _taint(shadows: ShadowMap, value: Any) -> Any:
    """`value` with every string tainted, including keys, which the caller wrote in arguments and schemas."""
    if isinstance(value, str):
        return shadows.taint(value)
    if isinstance(value, dict):
        return {shadows.taint(key): _taint(shadows, item) for key, item in value.items()}
    if isinstance(value, list):
        return [_taint(shadows, item) for item in value]
    return value


def read_template(template: str) -> dict[str, list[str]]:
    """Find the names that a template uses.

    Returns:
        variables: names that it reads from outside, except jinja2's own.
        names: attributes, keys, and all other strings in it.

    Raises:
        Refused: it is not a valid template.
    """
    environment = _Environment(None, datetime.datetime.now())
    try:
        tree = environment.parse(template)
        variables = meta.find_undeclared_variables(environment.parse(template)) - environment.globals.keys()
    except TemplateError as error:
        raise Refused("template", _said(error)) from None
    # A name that the template sets, perhaps in one branch only, is internal unless it tests whether the name is set.
    is_set = {node.name for node in tree.find_all(nodes.Name) if node.ctx == "store"}
    asked = [node for node in tree.find_all((nodes.Test, nodes.Filter)) if node.name in _ASKS_WHETHER_SET]
    variables -= is_set - {node.node.name for node in asked if isinstance(node.node, nodes.Name)}
    names = {node.attr for node in tree.find_all(nodes.Getattr)}
    names |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return {"variables": sorted(variables), "names": sorted(names)}


def _said(error: Exception) -> str:
    line = getattr(error, "lineno", None)
    first = (str(error) or type(error).__name__).splitlines()[0][:300]
    return f"line {line}: {first}" if line else first


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        if request.keys() == {"read"}:
            return read_template(request["read"])
        return {"segments": render_segments(**request)}
    except Refused as refusal:
        return {"kind": refusal.kind, "message": str(refusal)}
    except (RecursionError, MemoryError) as error:
        what = "memory" if isinstance(error, MemoryError) else "depth"
        return {"kind": "template", "message": f"it needs more {what} than a chat template may have"}


def main() -> None:
    """Answer requests until stdin ends or none has come for a while."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C is for the parent, which waits for the answer
    with contextlib.suppress(Refused):  # warm up imports, which cannot open files later
        render_segments(
            _WARM_UP, [{"role": "user", "content": "a"}], fixed={}, variables={}, max_characters=99
        )
    ready_bytes = virtual_bytes()
    forbid_files()
    limit_resource(resource.RLIMIT_CPU, _CPU_SECONDS)
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    sink.write(b"ready\n")
    sink.flush()
    while select.select([source], [], [], _IDLE_SECONDS)[0]:
        line = source.readline()
        if not line:
            return
        limit_memory(ready_bytes + _MEMORY_BYTES + _MEMORY_BYTES_PER_CHARACTER * len(line))
        sink.write(json.dumps(_answer(json.loads(line))).encode("ascii") + b"\n")
        sink.flush()


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:
        os._exit(0)
