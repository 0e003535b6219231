"""Read the texts on which two models are compared: passages, and sentences that differ only in the person they
name.

    texts/LANGUAGE.json    passages  |  templates x phrases  |  two endings, the better one first
    texts/dimensions.json  which groups are compared with each other

The texts are Argosy's own, under Apache-2.0. The passages say the same in every language. The templates differ
between languages, so that all are independent samples. A template first names a person, then ends well or badly:
`scoring.py` measures how a model divides its probability between the two endings, and how that depends on the
person.

Elsewhere: `questions.py` reads the user's own questions.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import blake3

from argosy.errors import UsageError

LANGUAGES = ("en", "de", "es", "fr")
_FOLDER = Path(__file__).with_name("texts")
_SLOT = "{who}"


@dataclass(frozen=True, slots=True)
class PeopleGroup:
    """A group of people and the dimension in which it is compared with others."""

    dimension: str
    name: str


@dataclass(frozen=True, slots=True)
class Template:
    """A sentence about somebody; `better` and `worse` are its two endings."""

    language: str
    start: str
    better: str
    worse: str

    def texts(self, phrase: str) -> tuple[str, str]:
        """The sentence about `phrase`, with its better and its worse ending."""
        named = self.start.replace(_SLOT, phrase)
        named = named[0].upper() + named[1:]
        return named + self.better, named + self.worse


@dataclass(frozen=True, slots=True)
class Material:
    """The texts of some languages.

    passages: one text for each language.
    groups: ordered by dimension.
    phrases: by language and group, as written at the start of a sentence.
    digest: BLAKE3 of the files; reports with the same digest used the same texts.
    """

    languages: tuple[str, ...]
    passages: tuple[str, ...]
    groups: tuple[PeopleGroup, ...]
    templates: tuple[Template, ...]
    phrases: dict[str, tuple[str, ...]]
    digest: str

    def texts(self) -> list[str]:
        """All sentences: template by template, group by group, the better ending before the worse."""
        return [
            text
            for template in self.templates
            for phrase in self.phrases[template.language]
            for text in template.texts(phrase)
        ]


def read_material(languages: Sequence[str] = LANGUAGES) -> Material:
    """The texts of these languages, in the order of `LANGUAGES`.

    Raises:
        UsageError: a language has no texts, or no language is named.
    """
    for language in languages:
        if language not in LANGUAGES:
            raise UsageError(f"there are no texts in '{language[:40]}'; known: {', '.join(LANGUAGES)}")
    if not languages:
        raise UsageError(f"no language is named; known: {', '.join(LANGUAGES)}")
    return _read(tuple(one for one in LANGUAGES if one in languages))


@functools.cache
def _read(languages: tuple[str, ...]) -> Material:
    hasher = blake3.blake3()
    passages: list[str] = []
    templates: list[Template] = []
    phrases: dict[str, tuple[str, ...]] = {}
    data = (_FOLDER / "dimensions.json").read_bytes()
    hasher.update(data)
    groups = tuple(
        PeopleGroup(dimension, name)
        for dimension, names in json.loads(data)["dimensions"].items()
        for name in names
    )
    for language in languages:
        data = (_FOLDER / f"{language}.json").read_bytes()
        hasher.update(data)
        read = json.loads(data)
        passages.append("\n\n".join(read["passages"]))
        templates += [Template(language, *parts) for parts in read["templates"]]
        phrases[language] = tuple(read["groups"][group.name] for group in groups)
    return Material(languages, tuple(passages), groups, tuple(templates), phrases, hasher.hexdigest())
