"""Questions to guard models, and their answers, as the models' makers document them."""

from __future__ import annotations

import pytest

from argosy.guard.guard_models import GUARD_FORMS, Question
from argosy.guard.verdict import CheckFailed


@pytest.mark.parametrize(
    ("form", "answer", "is_flagged", "categories"),
    [
        ("llama-guard", "\n\nsafe", False, []),
        ("llama-guard", "\n\nunsafe\nS1,S10", True, ["violence", "hate"]),
        ("llama-guard", "unsafe", True, ["unsafe"]),
        ("qwen3guard", "Safety: Safe\nCategories: None", False, []),
        (
            "qwen3guard",
            "Safety: Unsafe\nCategories: Violent, PII\nRefusal: No",
            True,
            ["violence", "privacy"],
        ),
        ("qwen3guard", "Safety: Controversial\nCategories: Unethical Acts", False, []),
        ("qwen3guard", "\n\nSafety: Safe\nCategories: None\nRefusal: Yes\n", False, []),
        ("qwen3guard", "Safety: Unsafe\nCategories: Viol", True, ["unsafe"]),  # cut off
        ("qwen3guard", "Safety: Unsafe", True, ["unsafe"]),
        ("gpt-oss-safeguard", '{"violation": 1, "policy_category": "H2.f"}', True, ["h2.f"]),
        ("gpt-oss-safeguard", '\n{"violation": 1, "policy_category": null}\n', True, ["policy"]),
        ("gpt-oss-safeguard", '{"violation": 0, "policy_category": null}', False, []),
        ("gpt-oss-safeguard", '{"violation": 0, "policy_category": "SP0.a"}', False, []),
        (
            "gpt-oss-safeguard",
            '{"violation": 1, "policy_category": "H2.f", "rule_ids": ["H2.d", "H2.f"], "confidence": "high", '
            '"rationale": "Content compares a protected class to animals."}',
            True,
            ["h2.f"],
        ),
        ("granite-guardian", "Yes", True, ["harm"]),
        ("granite-guardian", "No\n<confidence> High </confidence>", False, []),
        ("granite-guardian", "<score> yes </score>", True, ["harm"]),
        ("granite-guardian", "<think>\n</think>\n<score> no </score>", False, []),
    ],
)
def test_an_answer_is_read(form: str, answer: str, is_flagged: bool, categories: list[str]) -> None:
    verdict = GUARD_FORMS[form].read(answer)
    assert (verdict.is_flagged, verdict.categories) == (is_flagged, categories)


@pytest.mark.parametrize("form", GUARD_FORMS)
@pytest.mark.parametrize(
    "answer", ["", "I cannot help with that.", "unsafe?", "{}", "Safety:", '{"violation": 2}', "[" * 999]
)
def test_an_answer_in_no_known_form_is_a_failure_and_no_pass(form: str, answer: str) -> None:
    with pytest.raises(CheckFailed):
        GUARD_FORMS[form].read(answer)


@pytest.mark.parametrize(
    ("form", "answer"),
    [
        ("qwen3guard", "Safety: Safe\nCategories: Violent"),
        ("qwen3guard", "Safety: Safe\nCategories: None\nSafety: Unsafe\nCategories: Violent"),
        ("qwen3guard", "The text is harmless.\nSafety: Safe\nCategories: None"),
        ("qwen3guard", "Safety: Safe\nCategories: None\nRefusal: No\nThough it is not."),
        ("gpt-oss-safeguard", 'Here: {"violation": 0, "policy_category": null}.'),
        (
            "gpt-oss-safeguard",
            '{"violation": 0, "policy_category": null}{"violation": 1, "policy_category": "a"}',
        ),
        ("gpt-oss-safeguard", '{"violation": false, "policy_category": null}'),
        ("gpt-oss-safeguard", '{"violation": 0.0, "policy_category": null}'),
        ("gpt-oss-safeguard", '{"violation": 0, "policy_category": ["a"]}'),
        ("gpt-oss-safeguard", '{"violation": 0}'),
        ("gpt-oss-safeguard", '{"violation": 0, "policy_category": null, "but": "it is harmful"}'),
        ("gpt-oss-safeguard", '{"violation": 0, "violation": 1, "policy_category": null}'),
        ("gpt-oss-safeguard", '{"violation": 0, "policy_cat'),
        ("granite-guardian", "No, but yes"),
        ("granite-guardian", "<score> no </score> <score> yes </score>"),
        ("granite-guardian", "<think>It is harmful.</think><score> no"),
        ("llama-guard", "safe\nS1"),
        ("llama-guard", "safe or unsafe"),
    ],
)
def test_an_answer_that_contradicts_itself_or_goes_on_is_no_pass(form: str, answer: str) -> None:
    with pytest.raises(CheckFailed):
        GUARD_FORMS[form].read(answer)


def test_questions_are_conversations_that_end_with_what_is_judged() -> None:
    for name, form in GUARD_FORMS.items():
        for role in ("user", "assistant"):
            question = Question(role, "the text {x}", "what {was} asked")  # type: ignore[arg-type]
            messages = form.messages(question, "the {policy}")
            assert messages[-1]["content"] == "the text {x}"
            assert ("the {policy}" in messages[0]["content"]) == form.takes_policy, name
            if not form.takes_policy and role == "assistant":
                assert [message["role"] for message in messages] == ["user", "assistant"]
                assert messages[0]["content"] == "what {was} asked"
