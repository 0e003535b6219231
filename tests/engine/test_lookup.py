"""The lookup drafter: it proposes what followed the longest and latest earlier match, and only if there is one."""

from __future__ import annotations

import random

import numpy as np
import pytest

from argosy.config import SamplingParams
from argosy.engine.drafts.lookup import SHORTEST, LookupDrafter, find_match
from argosy.engine.sampler import SamplerState
from argosy.engine.sequence import Sequence
from argosy.kept.chain import Chain


def sequence_of(prompt: list[int], answer: list[int]) -> Sequence:
    made = Sequence(
        prompt,
        SamplingParams(),
        number=0,
        max_new_tokens=1000,
        sampler_state=SamplerState(prompt, 0),
        chain=Chain("", bytes(32), b"", 16),
    )
    made.new_ids += answer
    return made


def slowly(ids: list[int]) -> int | None:
    """The definition, place by place."""
    best: tuple[int, int] | None = None
    for end in range(1, len(ids)):
        length = 0
        while length < min(end, 16) and ids[end - 1 - length] == ids[-1 - length]:
            length += 1
        if length >= SHORTEST and (best is None or length >= best[0]):
            best = length, end
    return None if best is None else best[1]


@pytest.mark.parametrize(
    ("prompt", "answer", "proposed"),
    [
        ([1, 2, 3, 4, 5, 6], [9, 1, 2, 3], [4, 5, 6, 9]),
        ([7, 1, 2, 3, 4, 8, 1, 2, 3, 5], [7, 1, 2, 3], [4, 8, 1, 2]),  # four tokens match, later only three
        ([1, 2, 3, 4, 1, 2, 3, 5], [1, 2, 3], [5, 1, 2, 3]),  # equally long: the latest
        ([4, 5, 6], [5, 6], []),  # two tokens match
        ([4, 5, 6, 4, 5, 6], [], [4, 5, 6, 4]),  # a period goes on beyond the end
        ([2, 2, 2], [2], [2, 2, 2, 2]),
        ([1], [], []),
        ([1, 2, 3], [], []),
    ],
)
def test_it_proposes_what_followed_the_longest_and_latest_match(
    prompt: list[int], answer: list[int], proposed: list[int]
) -> None:
    assert LookupDrafter().propose(sequence_of(prompt, answer), 4) == proposed


def test_its_search_agrees_with_the_definition() -> None:
    choose = random.Random(1)
    for _ in range(300):
        ids = choose.choices(range(choose.choice((2, 3, 6))), k=choose.randrange(1, 60))
        assert find_match(np.array(ids, np.int32)) == slowly(ids), ids


def test_it_follows_a_sequence_that_grows_and_comes_again_after_a_preemption() -> None:
    drafter, ids = LookupDrafter(), random.Random(2).choices(range(3), k=700)
    sequence = sequence_of(ids[:4], [])
    for at in range(4, len(ids)):
        fresh = LookupDrafter().propose(sequence, 3) if at % 97 == 0 else None
        proposed = drafter.propose(sequence, 3)
        assert fresh is None or proposed == fresh
        if at == 300:
            drafter.forget(sequence)
        sequence.new_ids.append(ids[at])
    drafter.forget(sequence)
    drafter.forget(sequence)
    assert not drafter._known
