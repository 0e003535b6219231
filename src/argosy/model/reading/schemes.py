"""Say how each module of a checkpoint stores its weight, and read the settings that describe it.

    settings  ->  SettingsReader  ->  rules  ->  Quantization.scheme_of(module)  ->  Scheme, or None: floats

A rule gives the scheme of modules that it names; the first rule that matches a module decides.

Elsewhere: `quantization.py` finds the settings; `quantization_methods.py` makes rules of them; `coded_weights.py` knows
the tensors of each scheme.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from time import perf_counter
from typing import TypeVar

from argosy.checkpoint.untrusted_file import quote
from argosy.errors import CheckpointError, UnsupportedModel

KEY = "quantization_config"
_LONGEST_EXPRESSION = 1024
_MOST_REPETITIONS = 3  # in an expression that names modules
_MOST_ALTERNATIVES = 256  # the product of those of all groups
_MOST_GROUPS = 64  # Python compiles groups within groups recursively
_MOST_EXPRESSIONS = 256  # in one list; each is tried with every module
_MOST_MATCHING_S = 20.0  # those of real files take milliseconds
_MOST_TEXTS = 2048  # that a name may contain; looking for one is a tenth of the work
_CONTAINS = re.compile(r"\.\*((?:[\w-]|\\[._-])+)(?:\.\*)?")  # the expression ".*text.*"
_LARGEST_COUNT = 1 << 20
_Value = TypeVar("_Value")
_HINT = "get the checkpoint in one of these forms, or a GGUF of the model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How the weight of a module is stored.

    storage: the names and layouts of its tensors, a key of `STORAGES` in `coded_weights.py`.
    block: the rows and columns that share a scale, 0 for all: (1, 32) is a group, (1, 0) a row, (0, 0) the matrix.
    has_zeros: whether integer zero points are stored.
    is_ordered: whether the columns of a group are neighbours; if not, a tensor tells the group of each column.
    """

    storage: str
    bits: int
    block: tuple[int, int]
    has_zeros: bool = False
    is_ordered: bool = True

    def __str__(self) -> str:
        rows, cols = self.block
        shared = {(0, 0): "one scale a matrix", (1, 0): "one scale a row"}.get(
            self.block, f"groups of {cols}" if rows == 1 else f"blocks of {rows} x {cols}"
        )
        zeros = "with zero points" if self.has_zeros else "symmetric"
        order = "" if self.is_ordered else ", act-order"
        return f"{self.storage}, {self.bits} bits, {zeros}, {shared}{order}"


@dataclass(frozen=True, slots=True)
class Names:
    """A set of modules, such as "model.layers.0.self_attn.q_proj".

    exact: their names.
    parts: names that also match everything inside them, and every module whose path ends in them.
    expressions: regular expressions that match the beginning of a module's name.
    globs: texts around `*`, each of which stands for any characters; they match whole names.
    """

    exact: frozenset[str] = frozenset()
    parts: frozenset[str] = frozenset()
    expressions: tuple[re.Pattern[str], ...] = ()
    globs: tuple[tuple[str, ...], ...] = ()
    is_everything: bool = False
    # The numbers of steps in the paths of `parts`.
    _lengths: tuple[int, ...] = field(init=False, repr=False, compare=False, default=())
    # Globs of the form "text*" are most. There may be thousands, so they are looked up, by their lengths.
    _beginnings: frozenset[str] = field(init=False, repr=False, compare=False, default=frozenset())
    _sizes: tuple[int, ...] = field(init=False, repr=False, compare=False, default=())
    # There may be many globs "*text*" and expressions ".*text.*" as well.
    _texts: tuple[str, ...] = field(init=False, repr=False, compare=False, default=())
    _tried: tuple[re.Pattern[str], ...] = field(init=False, repr=False, compare=False, default=())
    _others: tuple[tuple[str, ...], ...] = field(init=False, repr=False, compare=False, default=())

    def __post_init__(self) -> None:
        beginnings: set[str] = set()
        inside: set[str] = set()
        tried: list[re.Pattern[str]] = []
        others: list[tuple[str, ...]] = []
        for texts in self.globs:
            if len(texts) == 2 and not texts[1]:
                beginnings.add(texts[0])
            elif len(texts) == 3 and not texts[0] and not texts[2]:
                inside.add(texts[1])
            else:
                others.append(texts)
        for expression in self.expressions:
            if found := _CONTAINS.fullmatch(expression.pattern):
                inside.add(found[1].replace("\\", ""))
            else:
                tried.append(expression)
        object.__setattr__(self, "_lengths", tuple(sorted({name.count(".") + 1 for name in self.parts})))
        object.__setattr__(self, "_beginnings", frozenset(beginnings))
        object.__setattr__(self, "_sizes", tuple(sorted(set(map(len, beginnings)))))
        object.__setattr__(self, "_texts", tuple(sorted(inside)))
        object.__setattr__(self, "_tried", tuple(tried))
        object.__setattr__(self, "_others", tuple(others))

    def __bool__(self) -> bool:
        return bool(self.exact or self.parts or self.expressions or self.globs or self.is_everything)

    def match(self, module: str, spend: Callable[[float], None] = lambda seconds: None) -> bool:
        """Whether a module is one of them. `spend` learns what each expression took, and may raise an error."""
        if self.is_everything or module in self.exact:
            return True
        sizes = takewhile(lambda size: size <= len(module), self._sizes)
        if any(module[:size] in self._beginnings for size in sizes):
            return True
        if self.parts:
            steps = module.split(".")
            for count in takewhile(lambda count: count <= len(steps), self._lengths):
                if ".".join(steps[:count]) in self.parts or ".".join(steps[-count:]) in self.parts:
                    return True
        if any(text in module for text in self._texts):
            return True
        for expression in self._tried:
            start = perf_counter()
            is_one = expression.match(module) is not None
            spend(perf_counter() - start)
            if is_one:
                return True
        return any(_matches_glob(texts, module) for texts in self._others)


EVERYTHING = Names(is_everything=True)


def _matches_glob(texts: tuple[str, ...], module: str) -> bool:
    first, *middle, last = texts
    start, end = len(first), len(module) - len(last)
    if start > end or not module.startswith(first) or not module.endswith(last):
        return False
    for text in middle:
        found = module.find(text, start, end)
        if found < 0:
            return False
        start = found + len(text)
    return True


@dataclass(frozen=True, slots=True)
class Rule:
    """The scheme of some modules; None: they are not quantised. Rules of one level must agree about a module."""

    names: Names
    scheme: Scheme | None
    level: int | None = None


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a checkpoint's weights are stored. `where` names the settings in errors."""

    method: str
    rules: tuple[Rule, ...]
    where: str = "the quantization_config of config.json"
    # One number: how long expressions have been compared with modules.
    _spent_s: list[float] = field(init=False, repr=False, compare=False, default_factory=lambda: [0.0])

    def scheme_of(self, module: str) -> Scheme | None:
        """Return the scheme of a module, such as "model.layers.0.self_attn.q_proj"; None: it is not quantised.

        Raises:
            CheckpointError: rules contradict each other, or their expressions take too long.
        """
        rule = next((rule for rule in self.rules if rule.names.match(module, self._spend)), None)
        if rule is None:
            return None
        for other in self.rules if rule.level is not None else ():
            is_other = other.level == rule.level and other.scheme != rule.scheme
            if is_other and other.names.match(module, self._spend):
                raise CheckpointError(
                    f"{self.where} describes {quote(module)} in two ways: {rule.scheme} and {other.scheme}",
                    key=KEY,
                )
        return rule.scheme

    def _spend(self, seconds: float) -> None:
        self._spent_s[0] += seconds
        if self._spent_s[0] > _MOST_MATCHING_S:
            raise CheckpointError(
                f"{self.where} has regular expressions that take more than {_MOST_MATCHING_S:g} s to compare with "
                "the names of modules",
                hint="replace them by the names of the modules",
                key=KEY,
            )


class SettingsReader:
    """Reads a `quantization_config` strictly: methods raise UnsupportedModel or CheckpointError for what they refuse.

    Args:
        given: the settings.
        key: their key in the file `path`.
        supported: what errors list if a setting has no list of its own.
    """

    def __init__(self, given: object, path: Path, key: str, supported: str) -> None:
        self.path = path
        self.key = key
        self._supported = supported
        self.settings = self.mapping(given, key)

    def keys(
        self, given: Mapping[str, object], where: str, *read: str, **neutral: tuple[object, ...]
    ) -> None:
        """Refuse a key that is neither read nor neutral, and a neutral key whose value would change something."""
        for key, value in given.items():
            if key in read:
                continue
            if key not in neutral:
                raise UnsupportedModel(
                    f"{self.path.name} asks for {quote(f'{where}.{key}')} {_shown(value)}, which is not known and may "
                    "change weights",
                    hint="get another quantisation of the model, or a GGUF",
                    path=self.path,
                    key=KEY,
                    value=value,
                )
            if value not in neutral[key] or (value == 0 and value is not False):
                shown = ", ".join(json.dumps(one) for one in neutral[key])
                raise self.refused(f"{where}.{key}", value, shown)

    def choice(
        self,
        given: Mapping[str, object],
        where: str,
        key: str,
        *allowed: _Value,
        default: _Value | None = None,
    ) -> _Value:
        """Return a setting that has one of the allowed values; an absent or null one counts as `default`."""
        value = default if given.get(key) is None else given[key]
        for one in allowed:
            if one == value and isinstance(one, bool) == isinstance(value, bool):
                return one
        shown = ", ".join("null" if one is None else json.dumps(one) for one in allowed)
        raise self.refused(f"{where}.{key}", given.get(key), shown)

    def count(self, value: object, where: str) -> int:
        """Return a setting that is a positive whole number."""
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _LARGEST_COUNT:
            raise self.refused(where, value, f"a whole number from 1 to {_LARGEST_COUNT}")
        return value

    def names(
        self,
        config: Mapping[str, object],
        *keys: str,
        match_parts: bool = False,
        match_texts: bool = False,
        has_globs: bool = False,
    ) -> Names:
        """Return the modules that some lists name; "re:" starts an expression.

        Args:
            match_parts: whether a name also matches what is inside it, and paths that end in it.
            match_texts: whether it matches every name that contains it.
            has_globs: whether `*` in a name stands for any characters.
        """
        exact: set[str] = set()
        parts: set[str] = set()
        expressions: list[re.Pattern[str]] = []
        globs: list[tuple[str, ...]] = []
        for key in keys:
            for name in self._listed(config, key):
                if name.startswith("re:"):
                    expressions.append(self.expression(name, name[3:], key))
                elif has_globs and "*" in name:
                    if len(name) > _LONGEST_EXPRESSION:
                        raise self._costly(
                            key, f"an expression of {len(name)} characters", _LONGEST_EXPRESSION
                        )
                    globs.append(tuple(name.split("*")))
                elif match_texts:
                    globs.append(("", name, ""))
                else:
                    (parts if match_parts else exact).add(name)
        found = Names(frozenset(exact), frozenset(parts), tuple(expressions), tuple(globs))
        self.require_few_names(", ".join(keys), found)
        return found

    def require_few_names(self, where: str, *names: Names) -> None:
        """Prove that there are few expressions, globs and texts, because each is tried with every module."""
        self.require_few(sum(len(one._tried) + len(one._others) for one in names), where)
        self.require_few(sum(len(one._texts) for one in names), where, "texts to find in names", _MOST_TEXTS)

    def require_few(
        self, count: int, where: str, what: str = "expressions", most: int = _MOST_EXPRESSIONS
    ) -> None:
        """Prove that a config has few of what is tried with every module."""
        if count > most:
            raise self._costly(where, f"{count} {what}", most)

    def _costly(self, where: str, found: str, most: int) -> CheckpointError:
        return CheckpointError(
            f"{self.path.name}: {self.key}.{where} has {found}; at most {most} are read",
            path=self.path,
            key=KEY,
        )

    def expression(self, name: str, expression: str, key: str) -> re.Pattern[str]:
        """Compile an expression, which `name` is or contains."""
        if fault := _fault_of_expression(expression):
            raise CheckpointError(
                f"{self.path.name}: {self.key}.{key} has '{quote(name)}', which {fault}",
                path=self.path,
                key=KEY,
            )
        return _compile(expression)

    def _listed(self, config: Mapping[str, object], key: str) -> list[str]:
        names = config.get(key)
        if names is None:
            return []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise CheckpointError(
                f"{self.path.name}: {self.key}.{key} is {quote(names)}; expected a list of strings or null",
                path=self.path,
                key=KEY,
            )
        return names

    def mapping(self, value: object, where: str) -> Mapping[str, object]:
        """Return a setting that is an object."""
        if not isinstance(value, dict):
            raise self.refused(where, value)
        return value

    def refused(
        self, where: str, value: object, supported: str | None = None, hint: str | None = None
    ) -> UnsupportedModel:
        """Return the error for a setting with a value that is not supported."""
        supported = supported or self._supported
        return UnsupportedModel(
            f"{self.path.name} asks for {quote(where)} {_shown(value)}; supported: {supported}",
            hint=hint or _HINT,
            path=self.path,
            key=KEY,
            value=value,
            supported=supported,
        )


def _shown(value: object) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return f"'{quote(value)}'" if isinstance(value, str) else quote(value)


def _fault_of_expression(expression: str) -> str | None:
    """Return why a checkpoint's regular expression is refused, or None if it is accepted.

    Matching backtracks over repetitions and alternatives, so a hostile file could make it take hours. With few of them
    and no nesting it takes seconds at most, as a module's name has a hundred characters; `Quantization` limits the sum.
    """
    if len(expression) > _LONGEST_EXPRESSION:
        return f"has {len(expression)} characters; at most {_LONGEST_EXPRESSION} are read"
    # The expression without [sets] and \escapes; a set that stays open takes the rest.
    plain = re.sub(r"\\.|\[\^?\]?(?:\\.|[^]\\])*\]?", "x", expression, flags=re.DOTALL)
    plain = re.sub(r"\(\?[:=!]", "(", plain)
    plain = re.sub(r"\)\?(?![*+?{])", "|)", plain)  # a group that may be absent
    if "(?" in plain or re.search(r"\)[*+?{]", plain):
        return "repeats a group, or opens one with (? other than (?:, (?= and (?!"
    ways = math.prod(1 + text.count("|") for text in re.split(r"[()]", plain))
    if len(re.findall(r"[*+?{]", plain)) > _MOST_REPETITIONS or ways > _MOST_ALTERNATIVES:
        return f"has more than {_MOST_REPETITIONS} repetitions or {_MOST_ALTERNATIVES} alternatives"
    if plain.count("(") > _MOST_GROUPS:
        return f"has more than {_MOST_GROUPS} groups"
    try:
        _compile(expression)
    except (re.error, OverflowError) as error:
        return f"is not a valid regular expression: {quote(str(error))}"
    return None


def _compile(expression: str) -> re.Pattern[str]:
    """Compile an expression without Python's warnings, which would be about a file that the user did not write."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return re.compile(expression)
