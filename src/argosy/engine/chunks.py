"""Share the prompt tokens of a step among prompts: how many of each run now.

Elsewhere: `scheduler.py` says which prompts may run; `media/spans.py` says where a prompt with media may be cut.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from argosy.engine.sequence import Sequence


def share_chunk(
    prompts: list[Sequence], *, chunk_tokens: int, block_tokens: int | None, first: int
) -> list[tuple[Sequence, int]]:
    """Number of tokens to run of each prompt: tenants get equal parts, and none gets more than it needs.

    A span of media whose positions see one another runs as a whole. It may need more than its tenant's part, so
    the first prompt gets what it needs before the others share the rest.

    Args:
        chunk_tokens: maximum prompt tokens in a step.
        block_tokens: a part of a prompt ends after a full block of this size, if it reaches one, because a recurrent
            state is found again only there; None: no layer has one.
        first: the tenant, by number, whose turn it is to get the remainder first.
    """
    wanted = {sequence: _chunk_end(sequence) - sequence.num_computed for sequence in prompts}
    reserved: dict[Sequence, int] = {}
    for sequence in prompts[:1]:
        if sequence.spans is not None and sequence.spans.has_both_ways:
            reserved[sequence] = sequence.spans.whole(sequence.num_computed)
    of_tenant = Counter[str]()
    for sequence, count in wanted.items():
        of_tenant[sequence.tenant] += count - reserved.get(sequence, 0)
    left = _equal_parts(of_tenant, chunk_tokens - sum(reserved.values()), first=first)
    shared = []
    for sequence, count in wanted.items():
        least, at = reserved.get(sequence, 0), sequence.num_computed
        given = least + min(count - least, left[sequence.tenant])
        if sequence.spans is not None:
            given = sequence.spans.cut(at, at + given) - at
        if least < given < count:
            given = _whole_blocks(sequence, given, least, block_tokens)
        left[sequence.tenant] -= given - least
        if given:
            shared.append((sequence, given))
    return shared


def _whole_blocks(sequence: Sequence, given: int, least: int, block_tokens: int | None) -> int:
    """End a part of a prompt after a full block, if it reaches one."""
    at, spans = sequence.num_computed, sequence.spans
    if block_tokens is None:
        return given
    end = at + given - (at + given) % block_tokens
    if end <= at + least or (spans is not None and spans.cut(at, end) != end):
        return given
    return end - at


def _chunk_end(sequence: Sequence) -> int:
    """The position up to which a prompt can run in one step, however much room there is."""
    at, spans = sequence.num_computed, sequence.spans
    stops = [stop for stop in sequence.snapshots_at if stop > at]
    if spans is not None:
        stops = [stop for stop in stops if spans.cut(at, stop) == stop]
    stop = min([sequence.prefill_until, *stops])
    return stop if spans is None else spans.has_rows_until(at, stop)


def _equal_parts(wanted: Mapping[str, int], total: int, *, first: int) -> dict[str, int]:
    """Divide `total` so that none gets more than it wants, and the smallest part is as large as possible.

    The remainder goes to the names whose turn it is, by `first`.
    """
    parts: dict[str, int] = {}
    names = sorted(wanted)
    for at, name in enumerate(sorted(names, key=lambda name: wanted[name])):
        parts[name] = min(wanted[name], total // (len(names) - at))
        total -= parts[name]
    for at in range(len(names)):
        name = names[(first + at) % len(names)]
        if total and parts[name] < wanted[name]:
            parts[name] += 1
            total -= 1
    return parts
