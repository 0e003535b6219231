"""How guard models are prompted and their answers parsed: one prompt form per family.

    a question, a policy  ─ a form by name ─>  messages for the model's own chat template  ->  its answer  ->  Verdict

The operator names the form, because a model's files do not. An answer that cannot be parsed is a failure, never a
pass. The models find only what they were trained to find: published recall is far from 1
(docs/guides/responsible-use.md).

Elsewhere: `serve/guards/check_by_model.py` runs the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from argosy.guard.verdict import CheckFailed, Verdict
from argosy.strict_json import JsonError, parse_json

Role = Literal["user", "assistant"]
Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Question:
    """A text to judge.

    role: the speaker's.   asked: the text to which an assistant's text replies.
    """

    role: Role
    text: str
    asked: str = ""


@dataclass(frozen=True, slots=True)
class GuardForm:
    """One way of asking.

    messages: builds the model's conversation from a question and a policy. The model answers in a new turn, even if
        the last message is an assistant's.
    read: parses the model's answer. Raises CheckFailed.
    max_tokens: the longest answer.
    takes_policy: the prompt includes the operator's own policy, in words.
    """

    messages: Callable[[Question, str], Sequence[Message]]
    read: Callable[[str], Verdict]
    max_tokens: int
    takes_policy: bool = False


def _as_said(question: Question, policy: str) -> Sequence[Message]:
    """Leave the question to the model's chat template, which asks about the last turn."""
    said = {"role": question.role, "content": question.text}
    return [said] if question.role == "user" else [{"role": "user", "content": question.asked}, said]


# MLCommons' taxonomy, as the model cards of Llama-Guard 3 and 4 list it.
_HAZARDS: Mapping[str, str] = {
    "S1": "violence", "S2": "illicit", "S3": "sexual/crimes", "S4": "sexual/minors", "S5": "defamation",
    "S6": "specialized-advice", "S7": "privacy", "S8": "intellectual-property", "S9": "illicit/violent", "S10": "hate",
    "S11": "self-harm", "S12": "sexual", "S13": "elections", "S14": "code-interpreter-abuse",
}  # fmt: skip


def _read_llama_guard(answer: str) -> Verdict:
    """`safe`, or `unsafe` and a line of categories."""
    lines = answer.split()
    if lines == ["safe"]:
        return Verdict()
    if not lines or lines[0] != "unsafe":
        raise CheckFailed("the guard model answered neither safe nor unsafe")
    named = re.findall(r"\bS[0-9]{1,2}\b", answer)
    return Verdict(True, {_HAZARDS.get(name, name): 1.0 for name in named} or {"unsafe": 1.0})


# The categories of Qwen3Guard's technical report (arXiv:2510.14276).
_OF_QWEN: Mapping[str, str] = {
    "Violent": "violence", "Non-violent Illegal Acts": "illicit", "Sexual Content or Sexual Acts": "sexual",
    "PII": "privacy", "Suicide & Self-Harm": "self-harm", "Unethical Acts": "unethical",
    "Politically Sensitive Topics": "politically-sensitive", "Copyright Violation": "intellectual-property",
    "Jailbreak": "jailbreak",
}  # fmt: skip
# The last line is there for answers alone.
_SAFETY = re.compile(
    r"Safety: (Safe|Unsafe|Controversial)(?:\nCategories: ([^\n]+))?(?:\nRefusal: (?:Yes|No))?"
)


def _read_qwen3guard(answer: str) -> Verdict:
    """`Safety: Unsafe`, then `Categories: Violent, PII`. Controversial content gets a score but no flag."""
    safety = _SAFETY.fullmatch("\n".join(line.rstrip() for line in answer.strip().splitlines()))
    if safety is None:
        raise CheckFailed("the guard model's answer is not a line `Safety: ...` and one of categories")
    names = [name for name in _OF_QWEN if name in (safety[2] or "")]
    if safety[1] == "Safe" and (safety[2] or "None") != "None":
        raise CheckFailed("the guard model's answer names categories of a safe text")
    score = {"Safe": 0.0, "Controversial": 0.4, "Unsafe": 1.0}[safety[1]]
    scores = {_OF_QWEN[name]: score for name in names} if score else {}
    return Verdict(safety[1] == "Unsafe", scores or ({"unsafe": score} if score else {}))


# The answer is the one that OpenAI's guide calls policy-referencing.
_OWN_POLICY = (
    "{policy}\n\nJudge the content by the policy above. If the content violates the policy, return:\n"
    '{{"violation": 1, "policy_category": "<category_or_rule_id>"}}\n\nIf the content does NOT violate the policy, '
    'return:\n{{"violation": 0, "policy_category": null}}'
)
# What a policy may also ask for, as in the guide.
_RATIONALE = frozenset({"rule_ids", "confidence", "rationale"})


def _by_policy(question: Question, policy: str) -> Sequence[Message]:
    """gpt-oss-safeguard reads the policy as its instructions and the content as the user's message (OpenAI's guide)."""
    return [
        {"role": "system", "content": _OWN_POLICY.format(policy=policy)},
        {"role": "user", "content": question.text},
    ]


def _read_safeguard(answer: str) -> Verdict:
    """The JSON alone, with nothing around it."""
    try:
        found = parse_json(answer.strip())
    except JsonError:
        raise CheckFailed("the guard model's answer is not JSON alone") from None
    if not isinstance(found, dict) or found.keys() - _RATIONALE != {"violation", "policy_category"}:
        raise CheckFailed('the guard model\'s answer is not an object with "violation" and "policy_category"')
    violation, category = found["violation"], found["policy_category"]
    if type(violation) is not int or violation not in (0, 1) or not isinstance(category, str | None):
        raise CheckFailed(
            'the guard model\'s answer does not say `"violation": 0` or `1`, or names no category'
        )
    if not violation:
        return Verdict()
    return Verdict(True, {(category or "").strip().lower()[:64] or "policy": 1.0})


# Version 3.2 adds how sure it is; from 3.3 on, thoughts come first and the answer is a score.
_GRANITE = re.compile(
    r"(Yes|No)(?:\n<confidence> (?:High|Low) </confidence>)?|(?:<think>\s*</think>\s*)?<score>\s*(yes|no)\s*</score>"
)


def _read_granite_guardian(answer: str) -> Verdict:
    """`Yes`, there is a risk, or `No`. Without another choice, the template asks about harm in general."""
    found = _GRANITE.fullmatch(answer.strip())
    if found is None:
        raise CheckFailed("the guard model answered neither Yes nor No")
    return Verdict(True, {"harm": 1.0}) if (found[1] or found[2]).lower() == "yes" else Verdict()


GUARD_FORMS: Mapping[str, GuardForm] = {
    "llama-guard": GuardForm(_as_said, _read_llama_guard, max_tokens=64),
    "qwen3guard": GuardForm(_as_said, _read_qwen3guard, max_tokens=128),
    "granite-guardian": GuardForm(_as_said, _read_granite_guardian, max_tokens=1024),
    # The model thinks before it answers.
    "gpt-oss-safeguard": GuardForm(_by_policy, _read_safeguard, max_tokens=2048, takes_policy=True),
}
