"""An answer's tokens and times, in fields common to several dialects.

Elsewhere: the ledger of an answer is `engine/ledger.py`.
"""

from __future__ import annotations

from typing import NotRequired

from argosy.serve.http.closed import Closed


class PromptTokens(Closed):
    """Breakdown of a prompt's tokens. Counts of pictures and sounds are left out if the prompt has none."""

    cached_tokens: int
    image_tokens: NotRequired[int]
    audio_tokens: NotRequired[int]


class ThoughtTokens(Closed):
    reasoning_tokens: int


class Timings(Closed):
    """The ledger of an answer; null means unknown.

    proposed_tokens, confirmed_tokens: drafts, if the server speculates; confirmed ones are among `new_tokens`.
    won_s: seconds that drafts saved, an estimate; null if the server does not speculate.
    energy_j: joules of processors and their memory, as measured, this answer's share of its steps.
    drive_energy_j: the least and the most of the drive for it, an estimate.
    """

    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    proposed_tokens: int
    confirmed_tokens: int
    won_s: float | None
    wall_s: float
    queue_s: float | None
    time_to_first_token_s: float | None
    prefill_tok_per_s: float | None
    decode_tok_per_s: float | None
    lookups: int
    hits: int
    hit_rate: float | None
    bytes_read: int
    rows: int  # of n-gram tables
    rows_found: int
    rows_late: int
    peak_bytes: int | None
    energy_j: float | None
    drive_energy_j: list[float] | None
    parts: dict[str, float]


class Usage(Closed):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens


class ReadOfPrompt(Closed):
    """Progress of the prefill in tokens, with llama.cpp's field names.

    While a picture, sound or group of frames is encoded, `encoded` is the share of it that is done, 0 to 1.
    """

    processed: int
    total: int
    cache: int
    encoded: NotRequired[float]
