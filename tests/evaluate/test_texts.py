"""The texts of the package are complete, and a file of questions may hold anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from argosy.errors import UsageError
from argosy.evaluate import questions
from argosy.evaluate.material import LANGUAGES, Template, read_material
from argosy.evaluate.questions import read_questions


def test_every_language_has_all_groups_and_templates_that_end_in_two_ways() -> None:
    material = read_material()
    assert material.languages == LANGUAGES
    assert len(material.templates) == 60
    assert len({template.start for template in material.templates}) == 60
    for language in LANGUAGES:
        phrases = material.phrases[language]
        assert len(set(phrases)) == len(phrases) == len(material.groups)
        assert all(phrase == phrase.strip() for phrase in phrases)
    for template in material.templates:
        assert template.start.count("{who}") == 1
        assert template.start.startswith("{who} ")  # phrases are in the form that stands first
        for end in (template.better, template.worse):
            assert end.startswith(" ")
            assert end.endswith((".", "!"))
        assert template.better != template.worse
    for number, group in enumerate(material.groups):  # of a dimension one after another, never one alone
        around = [material.groups[i] for i in (number - 1, number + 1) if 0 <= i < len(material.groups)]
        assert group.dimension in [one.dimension for one in around]
    assert len(material.texts()) == 60 * len(material.groups) * 2
    assert all(passage.count("\n\n") == 5 for passage in material.passages)


def test_a_sentence_begins_with_a_capital_and_keeps_the_rest_of_the_phrase() -> None:
    template = Template("fr", "{who} a dit", " oui.", " non.")
    assert template.texts("une personne de Chine") == (
        "Une personne de Chine a dit oui.",
        "Une personne de Chine a dit non.",
    )
    assert template.texts("élève")[0] == "Élève a dit oui."


def test_languages_are_chosen_by_name_and_keep_their_order() -> None:
    assert read_material(["fr", "en", "fr"]).languages == ("en", "fr")
    assert read_material(["en"]).digest != read_material().digest
    with pytest.raises(UsageError, match="no texts in 'xx'; known: en, de, es, fr"):
        read_material(["en", "xx"])
    with pytest.raises(UsageError, match="no language"):
        read_material([])


QUESTION: dict[str, Any] = {
    "context": "Two people met.", "question": "Who was late?", "ans0": "The first", "ans1": "The second",
    "ans2": "Not known", "label": 2, "context_condition": "ambig", "category": "Age", "example_id": 7,
}  # fmt: skip


def write(path: Path, *lines: dict[str, Any] | bytes) -> Path:
    path.write_bytes(
        b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    )
    return path


def test_questions_are_read_and_spread_over_the_file(tmp_path: Path) -> None:
    lines = [QUESTION | {"question": f"{number}?"} for number in range(10)]
    path = write(tmp_path / "q.jsonl", *lines, b"", b"  ")
    found = read_questions(path, most=100)
    assert [one.start for one in found] == [f"Two people met.\n{number}?\nAnswer:" for number in range(10)]
    assert found[0].texts()[2] == "Two people met.\n0?\nAnswer: Not known"
    assert (found[0].label, found[0].condition) == (2, "ambig")
    assert [one.start[16] for one in read_questions(path, most=4)] == ["0", "2", "5", "7"]
    without = {key: value for key, value in QUESTION.items() if key != "context_condition"}
    assert read_questions(write(tmp_path / "q", without), most=1)[0].condition == "unstated"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([b""], "has no question"),
        ([b"\n\n  \n"], "has no question"),
        ([b"nonsense"], "question 1 is not JSON"),
        ([b"[]"], "question 1 is not an object"),
        ([QUESTION, QUESTION | {"label": 3}], "question 2 has the label 3, expected 0, 1 or 2"),
        ([QUESTION | {"label": True}], "has the label True"),
        ([QUESTION | {"label": None}], "has the label None"),
        ([QUESTION | {"ans1": ""}], "has no text 'ans1'"),
        ([QUESTION | {"ans1": ["a"]}], "has no text 'ans1'"),
        ([{"label": 0}], "has no text 'context'"),
        ([QUESTION | {"context": "a" * 4097}], "has 4097 characters in 'context'"),
        ([QUESTION | {"context_condition": 7}], "has no text 'context_condition'"),
        ([QUESTION | {"context_condition": "a" * 65}], "has 65 characters in 'context_condition'"),
        ([b'{"label": 0, "label": 1}'], "has a duplicate key"),
        ([b"\xff"], "is not UTF-8 text"),
        ([b"[" * 100], "is"),
        ([b" " * (1 << 16) + b"x"], "a line is 65537 bytes long"),
    ],
)
def test_questions_of_another_form_are_refused_by_name(
    tmp_path: Path, lines: list[dict[str, Any] | bytes], said: str
) -> None:
    with pytest.raises(UsageError) as refused:
        read_questions(write(tmp_path / "q.jsonl", *lines), most=100)
    assert said in refused.value.message


def test_a_file_that_is_missing_or_no_file_or_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(UsageError):
            read_questions(path, most=1)
    monkeypatch.setattr(questions, "MOST_FILE_BYTES", 10)
    with pytest.raises(UsageError, match="at most 10 are read"):
        read_questions(write(tmp_path / "q.jsonl", QUESTION), most=1)
