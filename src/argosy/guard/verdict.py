"""The verdict of a check about a text, and the names of categories.

Categories are OpenAI's where they fit (`/v1/moderations`), and otherwise the check's own.

Elsewhere: checks are `word_list.py`, `guard_models.py` and, over HTTP, `serve/guards/check_over_http.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from argosy.errors import UsageError

# The categories of OpenAI's moderation endpoint, in its order.
CATEGORIES = (
    "harassment", "harassment/threatening", "hate", "hate/threatening", "illicit", "illicit/violent", "self-harm",
    "self-harm/instructions", "self-harm/intent", "sexual", "sexual/minors", "violence", "violence/graphic",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check found in a text.

    is_flagged: the text is disallowed.
    scores: category -> 0 to 1; categories unknown to the check are left out.
    """

    is_flagged: bool = False
    scores: Mapping[str, float] = field(default_factory=dict)

    @property
    def categories(self) -> list[str]:
        """The categories that were found."""
        return [name for name, score in self.scores.items() if score >= 0.5] if self.is_flagged else []


def together(verdicts: Iterable[Verdict]) -> Verdict:
    """Combine verdicts: flagged if any is, with the highest score in each category."""
    scores: dict[str, float] = {}
    is_flagged = False
    for verdict in verdicts:
        is_flagged |= verdict.is_flagged
        for name, score in verdict.scores.items():
            scores[name] = max(score, scores.get(name, 0.0))
    return Verdict(is_flagged, scores)


class Blocked(UsageError):
    """A policy disallows a text. The message quotes none of it."""

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(
            f"{what} is not allowed by the policy of this server ({reason})", code="content_filter"
        )


class CheckFailed(Exception):
    """A check gave no verdict; `str()` says why, without any content."""
