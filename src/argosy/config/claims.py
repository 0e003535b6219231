"""Claims on the memory budget by parts of a process other than the model; the plan adds them up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from argosy.errors import UsageError

# Parts of the budget that take claims, in the plan's order: name in JSON -> (label, note).
CLAIMED = {
    "replay_bytes": ("replay", "answers, kept until their conversations continue"),
    "request_bytes": ("requests", "request bodies and long texts"),
    "routing_bytes": ("routing", "counts of the experts that tokens choose"),
    "group_bytes": ("group", "connections to workers, and what they keep"),
}
# The process's own memory, which its owners may let grow.
PROCESS = "process_bytes"


@dataclass(frozen=True, slots=True)
class Claim:
    """The bytes that one owner needs. Claims on the same part of the budget are added up.

    Args:
        part: a key of `CLAIMED`, or `PROCESS`.
        when: claimed only if the model takes media of this kind.
    """

    part: str
    nbytes: int
    when: Literal["always", "media", "video"] = "always"

    def __post_init__(self) -> None:
        if self.part not in CLAIMED and self.part != PROCESS:
            raise UsageError(f"no part of the budget is named {self.part}; known: {', '.join(CLAIMED)}")
        if self.nbytes < 0:
            raise UsageError(f"{self.part} must be at least 0, found {self.nbytes}")


def claimed(
    claims: tuple[Claim, ...], part: str, *, takes_media: bool = False, takes_video: bool = False
) -> int:
    """Return the total bytes of claims on a part, for a model that takes these media."""
    holds = {"always": True, "media": takes_media, "video": takes_video}
    return sum(claim.nbytes for claim in claims if claim.part == part and holds[claim.when])
