"""Close the objects of a JSON schema, so that an answer contains only the members that the schema names, and can end.

    {"properties": {"name": ...}}  ->  {"properties": {"name": ...}, "additionalProperties": false}
    {"type": "integer"}            ->  the same, with at most 19 digits

JSON Schema allows other members by default, and a small model invents them until the context is full. llama.cpp,
Ollama and xgrammar close objects as well. An object whose schema mentions other members, such as
`additionalProperties: true`, stays as it is; so does an object whose values are listed.

The parts of an `allOf` describe one object, so a part must not forbid the members of the others: only the whole is
closed, over the names in all parts. A definition that serves as a part somewhere stays open; elsewhere a closed copy
replaces it. Digits are bounded for the same reason as members: a small model writes zeros without end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from argosy.config import MAX_GRAMMAR_CHARACTERS
from argosy.engine.grammar.grammar_bounds import part_of
from argosy.errors import GrammarError

_SAYS_MORE = (
    "additionalProperties", "patternProperties", "propertyNames", "unevaluatedProperties", "dependentSchemas", "if",
    "const", "enum",
)  # fmt: skip
_OWN = ("properties", "required", "minProperties", "maxProperties", *_SAYS_MORE)
_CHOICES = ("allOf", "anyOf", "oneOf")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_LIMITS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "enum", "const", "multipleOf")
_LARGEST = 9 * 10**18  # llguidance accepts little more; 64-bit ids fit
_INNER = ("items", "prefixItems", "additionalItems", "contains", "additionalProperties")


def close_objects(schema: object) -> object:
    """Return `schema` with every object closed that names its members and does not mention others.

    The schema must be within the bounds of `require_schema_bounds`.

    Raises:
        GrammarError: the names in the parts of its objects are too long together.
    """
    return _Closing(schema).made() if isinstance(schema, Mapping) else schema


class _Closing:
    def __init__(self, root: Mapping[str, object]) -> None:
        self._root = root
        self._opened = self._find_opened()
        self._copies: dict[int, tuple[str, Mapping[str, object]]] = {}  # by the definition's identity
        # Many objects may share a long part, and each repeats the part's names.
        self._num_left = MAX_GRAMMAR_CHARACTERS

    def made(self) -> dict[str, object]:
        made = self._whole(self._root)
        copied: dict[str, object] = {}
        while len(copied) < len(self._copies):  # a copy may refer to other definitions
            name, definition = list(self._copies.values())[len(copied)]
            copied[name] = self._whole(definition)
        return {**made, "$defs": {**_object(made.get("$defs")), **copied}} if copied else made

    def _find_opened(self) -> set[int]:
        """Return the identities of definitions that serve as a part of an object somewhere."""
        opened, seen = set[int](), set[tuple[int, bool]]()
        waiting: list[tuple[object, bool]] = [(self._root, False)]
        while waiting:
            schema, is_part = waiting.pop()
            if not isinstance(schema, Mapping) or (id(schema), is_part) in seen:
                continue
            seen.add((id(schema), is_part))
            is_part = is_part or _num_parts(schema) > 1
            waiting += [(choice, is_part) for choice in _choices(schema)]
            waiting += [(inner, False) for inner in _inner(schema)]
            if is_part and (target := self._target(schema)) is not None:
                opened.add(id(target))
                waiting.append((target, True))
        return opened

    def _any(self, schema: object, *, is_part: bool = False) -> object:
        if not isinstance(schema, Mapping):
            return schema
        if is_part or id(schema) in self._opened:
            return self._inside(schema, has_parts=True)
        return self._whole(schema)

    def _whole(self, schema: Mapping[str, object]) -> dict[str, object]:
        has_parts = _num_parts(schema) > 1
        made = self._inside(schema, has_parts=has_parts)
        names = self._names(schema) if has_parts or "properties" in schema else None
        if names is not None:
            own = _object(made.get("properties"))
            made["properties"] = {**own, **{name: True for name in names if name not in own}}
            made["additionalProperties"] = False
            made.pop("unevaluatedProperties", None)
        if not has_parts and _is_integer(schema) and not any(key in schema for key in _LIMITS):
            made |= {"minimum": -_LARGEST, "maximum": _LARGEST}
        return made

    def _inside(self, schema: Mapping[str, object], *, has_parts: bool) -> dict[str, object]:
        """Copy `schema` with everything below it closed.

        Args:
            has_parts: the choices and the reference are parts of one object.
        """
        made = dict(schema)
        for key in _NAMED:
            if isinstance(named := schema.get(key), Mapping):
                made[key] = {name: self._any(inner) for name, inner in named.items()}
        for key in _INNER:
            if isinstance(listed := schema.get(key), list):
                made[key] = [self._any(inner) for inner in listed]
            elif key in schema:
                made[key] = self._any(listed)
        for key in _CHOICES:
            if isinstance(choices := schema.get(key), list):
                made[key] = [self._any(choice, is_part=has_parts) for choice in choices]
        target = self._target(schema)
        if target is not None and not has_parts and id(target) in self._opened:
            made["$ref"] = f"#/$defs/{self._copy(target)}"
        return made

    def _copy(self, definition: Mapping[str, object]) -> str:
        """Return the name of a definition's closed copy."""
        if id(definition) not in self._copies:
            name = f"closed-{len(self._copies)}"
            while name in _object(self._root.get("$defs")):
                name += "-"
            self._copies[id(definition)] = name, definition
        return self._copies[id(definition)][0]

    def _names(self, schema: Mapping[str, object]) -> list[str] | None:
        """Return the names of all members of an object, or None if the object must stay as it is."""
        names, seen, fewest, has_names = dict[str, None](), set[int](), 0, False
        waiting: list[object] = [schema]
        while waiting:
            part = waiting.pop()
            if not isinstance(part, Mapping) or id(part) in seen:
                continue
            seen.add(id(part))
            # For a whole object, this means the same as closing it.
            is_closed = part is schema and part.get("unevaluatedProperties") is False
            if any(key in part for key in _SAYS_MORE if not (is_closed and key == "unevaluatedProperties")):
                return None
            has_names |= isinstance(part.get("properties"), Mapping)
            required, least = part.get("required"), part.get("minProperties")
            fewest = max(fewest, least) if isinstance(least, int) else fewest
            found = [*_object(part.get("properties")), *(required if isinstance(required, list) else ())]
            names |= dict.fromkeys(name for name in found if isinstance(name, str))
            waiting += reversed([*_choices(part), self._target(part)])
            self._num_left -= 1 + sum(len(name) for name in found if isinstance(name, str))
            if self._num_left < 0:
                raise GrammarError(
                    f"the names in the parts of a schema's objects take more than {MAX_GRAMMAR_CHARACTERS} characters"
                )
        return list(names) if has_names and len(names) >= fewest else None

    def _target(self, schema: Mapping[str, object]) -> Mapping[str, object] | None:
        """Return the definition that `schema` refers to."""
        reference = schema.get("$ref")
        target = part_of(self._root, reference) if isinstance(reference, str) else None
        return target if isinstance(target, Mapping) else None


def _num_parts(schema: Mapping[str, object]) -> int:
    """Count the parts that describe an object: its own members, each of `allOf`, one per choice, and a definition."""
    every = schema.get("allOf")
    return (
        any(key in schema for key in _OWN)
        + (len(every) if isinstance(every, list) else 0)
        + sum(key in schema for key in ("anyOf", "oneOf", "$ref"))
    )


def _is_integer(schema: Mapping[str, object]) -> bool:
    """Whether a number that follows `schema` must be whole."""
    types = schema.get("type")
    return types == "integer" or (isinstance(types, list) and "integer" in types and "number" not in types)


def _choices(schema: Mapping[str, object]) -> list[object]:
    listed = [schema.get(key) for key in _CHOICES]
    return [choice for choices in listed if isinstance(choices, list) for choice in choices]


def _inner(schema: Mapping[str, object]) -> Iterator[object]:
    """Yield the schemas of members, items and definitions."""
    for key in _NAMED:
        yield from _object(schema.get(key)).values()
    for key in _INNER:
        inner = schema.get(key)
        yield from inner if isinstance(inner, list) else (inner,)


def _object(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}
