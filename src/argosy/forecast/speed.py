"""Predict the seconds of a decode step and of a prompt from bytes, operations and a machine's rates.

    Work (what a model reads and computes)  +  Rates  +  WorkingSet  +  slots  ->  Speed

A layer reads its dense weights and the keys and values, then its experts. Missing experts come from the drive while
the others are computed, and the last to land is computed after that. Each miss also costs decisions, the first of a
layer most. A prompt sweeps through the experts once per chunk. Each prediction names the part that takes longest.

    layer = before experts + experts in memory + max(0, latency + misses * record / drive - overlap * hiding)
    hiding = half of the time before experts, in which look-ahead reads, decisions, and all experts but the last

The number of misses in a layer varies from token to token, so the maximum is averaged over a binomial distribution:
the maximum of means would be too optimistic. `overlap` is measured per machine: 1 if it computes and reads
concurrently as fast as it does each alone, 0 if both together take as long as one after the other, because reading
and transcoding cost processor time and memory bandwidth. A prompt's products wait for neither memory nor reads, so
reads take only processor time from them.

Elsewhere: `model/work.py` counts what a model reads; `experts/hit_rate.py` predicts the misses;
`forecast/forecast.py` combines them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from math import comb, expm1
from typing import NamedTuple

from argosy.experts.hit_rate import WorkingSet
from argosy.machine.rates import NUM_TOKENS, Rates
from argosy.model.work import Work

# More than enough for six digits, except near one token, where every rate is almost zero.
_PAGE_BYTES = 4096  # of the drive
_SOLVING_STEPS = 60
_COVERED = 0.9999  # fraction of the distribution of tokens over experts
# Streams on unrelated subjects still share popular experts. The midpoint of the two bounds predicts the hit rates
# of 4 and 8 streams within 1.5 points (docs/internals/planning.md).
_LIKELY_SUBJECT = 0.5


class Range(NamedTuple):
    """A prediction: lowest, likely and highest."""

    low: float
    likely: float
    high: float

    def times(self, factor: float) -> Range:
        return Range(self.low * factor, self.likely * factor, self.high * factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeForecast:
    """A decode step of `streams` sequences. `parts` divides `step_s` by name, in seconds."""

    streams: int
    hit_rate: Range
    tokens_per_s: Range  # over all streams
    parts: Mapping[str, float]  # likely seconds of a step
    bound: str  # the name of the largest part
    drive_bytes_per_token: Range
    memory_bytes_per_token: float

    @property
    def step_s(self) -> Range:
        rates = self.tokens_per_s
        return Range(*(self.streams / rate for rate in (rates.high, rates.likely, rates.low)))


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptForecast:
    """The time to the first token of a prompt."""

    num_tokens: int
    seconds: Range
    bound: str
    drive_bytes: Range


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureForecast:
    """The time to the first token of a short prompt with one picture."""

    width: int
    height: int
    num_positions: int
    seconds: Range
    encoder_s: float  # likely, of `seconds`
    bound: str


class _Case(NamedTuple):
    """The low, likely or high end of a range."""

    rate_factor: float
    hit_points: float  # added to the hit rate
    overlap: float  # how much reading and computing overlap in decode; 0: not at all
    prompt_overlap: float  # the same in prompts
    subject: float  # 0 if streams are on unrelated subjects, 1 if on the same


def _cases(work: Work, rates: Rates, working_set: WorkingSet) -> tuple[_Case, _Case, _Case]:
    points = working_set.error
    overlap = rates.transcoding_overlap if work.is_transcoded else rates.overlap
    return (
        _Case(1 / rates.spread, -points, overlap / 2, 0.5, 0.0),
        _Case(1.0, 0.0, overlap, 1.0, _LIKELY_SUBJECT),
        _Case(rates.spread, points, (1.0 + overlap) / 2, 1.0, 1.0),
    )


def predict_decode(
    work: Work, rates: Rates, working_set: WorkingSet, *, num_slots: int, context: int, streams: int = 1,
    hit_rate: float | None = None,
) -> DecodeForecast:  # fmt: skip
    """Predict decode of sequences with `context` positions each.

    Args:
        num_slots: experts in memory over all layers.
        hit_rate: if it is known; None: the working set predicts it.
    """
    found = [
        _decode_step(
            work, rates.scaled(case.rate_factor), working_set, num_slots, context, streams, case, hit_rate
        )
        for case in _cases(work, rates, working_set)
    ]
    low, likely, high = found
    return DecodeForecast(
        streams=streams,
        hit_rate=Range(low.hit_rate, likely.hit_rate, high.hit_rate),
        tokens_per_s=Range(*(streams / one.seconds for one in found)),
        parts=likely.parts,
        bound=_bound(likely.parts),
        drive_bytes_per_token=Range(*(one.drive_bytes / streams for one in reversed(found))),
        memory_bytes_per_token=likely.memory_bytes / streams,
    )


class _Step(NamedTuple):
    seconds: float
    hit_rate: float
    parts: dict[str, float]
    drive_bytes: float
    memory_bytes: float


def _decode_step(
    work: Work, rates: Rates, working_set: WorkingSet, num_slots: int, context: int, streams: int, case: _Case,
    known: float | None,
) -> _Step:  # fmt: skip
    alike, unrelated = working_set.of_streams(streams)

    def mixed(of_alike: float, of_unrelated: float) -> float:
        return case.subject * of_alike + (1.0 - case.subject) * of_unrelated

    asked = mixed(_asked(work, alike, 1), _asked(work, unrelated, 1))
    is_resident = num_slots >= work.num_moe_layers * work.num_experts
    if is_resident:
        hit_rate = 1.0
    elif known is not None:
        hit_rate = known
    else:
        predicted = mixed(alike.hit_rate(num_slots), unrelated.hit_rate(num_slots))
        hit_rate = min(1.0, max(0.0, predicted + case.hit_points))
    dense_s = _product_s(work.dense, rates, streams) + _product_s(work.head, rates, streams)
    keys_values, operations = work.keys_values(context)
    attention_s = streams * rates.attention_s(work.kv_dtype, keys_values, operations)
    layers = work.num_moe_layers
    tokens = max(1.0, streams * work.experts_per_token / asked)  # per requested expert
    experts_s = asked * _expert_s(work.expert, rates, tokens)
    overhead_s = work.num_layers * rates.layer_s + rates.step_s
    waiting_s = 0.0
    if not is_resident:
        missed = asked * (1.0 - hit_rate)  # per layer
        misses_s = rates.misses_overhead_s(asked, missed, work.record_bytes)
        overhead_s += layers * (rates.streamed_layer_s + misses_s)
        # Look-ahead reads begin half way through what precedes the experts; the last expert to land is computed
        # afterwards.
        hiding_s = (
            (dense_s + attention_s) / layers / 2
            + rates.streamed_layer_s
            + misses_s
            + experts_s * (1.0 - 1.0 / asked)
        )
        record_s = work.record_bytes / rates.drive_rate(work.piece_bytes)
        waiting_s = layers * _mean_wait(
            asked, 1.0 - hit_rate, record_s, rates.drive_latency_s, case.overlap * hiding_s
        )
    table_bytes = streams * work.table_pages * _PAGE_BYTES  # as if no row were in memory, or early
    if table_bytes:
        waiting_s += table_bytes / rates.drive_rate(_PAGE_BYTES)
    parts = {
        "dense weights": dense_s,
        "keys and values": attention_s,
        "experts in memory": layers * experts_s,
        "waiting for the drive": waiting_s,
        "overhead": overhead_s,
    }
    missed = layers * asked * (1.0 - hit_rate) * work.record_bytes + table_bytes
    memory_bytes = work.dense_bytes + streams * keys_values + layers * asked * work.expert_bytes
    return _Step(sum(parts.values()), hit_rate, parts, missed, memory_bytes)


def _product_s(weights: Mapping[str, tuple[float, float]], rates: Rates, tokens: float) -> float:
    return sum(
        rates.product_s(format, nbytes, parameters, tokens)
        for format, (nbytes, parameters) in weights.items()
    )


def _expert_s(expert: Mapping[str, tuple[float, float]], rates: Rates, mean_tokens: float) -> float:
    """Mean seconds of an expert with at least one token, if such experts have `mean_tokens` on average.

    The number of tokens per expert is taken as a zero-truncated Poisson distribution, because the time of a product
    has a kink where arithmetic becomes the bound.
    """
    if mean_tokens <= 1.0 or mean_tokens >= NUM_TOKENS[-1]:
        return _product_s(expert, rates, mean_tokens)
    rate = mean_tokens
    for _ in range(_SOLVING_STEPS):
        rate = mean_tokens * -expm1(-rate)
    chance = rate / max(expm1(rate), 1e-12) if rate > 0 else 1.0
    seconds, covered, tokens = 0.0, 0.0, 1
    while covered < _COVERED and tokens <= 4 * NUM_TOKENS[-1]:
        seconds += chance * _product_s(expert, rates, tokens)
        covered += chance
        tokens += 1
        chance *= rate / tokens
    return seconds / covered


def _mean_wait(asked: float, miss_rate: float, record_s: float, latency_s: float, hidden_s: float) -> float:
    """Mean seconds that a layer waits for reads, of which `hidden_s` are hidden. Misses are binomial."""
    count = max(1, round(asked))
    share = min(1.0, asked * miss_rate / count)
    mean = 0.0
    for misses in range(1, count + 1):
        chance = comb(count, misses) * share**misses * (1.0 - share) ** (count - misses)
        mean += chance * max(0.0, latency_s + misses * record_s - hidden_s)
    return mean


def predict_prompt(
    work: Work, rates: Rates, working_set: WorkingSet, *, num_slots: int, num_tokens: int, chunk_tokens: int
) -> PromptForecast:
    """Predict the time from a prompt to its first token with no other sequence running."""
    found = [
        _prompt(work, rates.scaled(case.rate_factor), working_set, num_slots, num_tokens, chunk_tokens, case)
        for case in _cases(work, rates, working_set)
    ]
    slow, likely, fast = found
    return PromptForecast(
        num_tokens=num_tokens,
        seconds=Range(fast[0], likely[0], slow[0]),
        bound=_bound(likely[1]),
        drive_bytes=Range(fast[2], likely[2], slow[2]),
    )


def predict_chunk(
    work: Work, rates: Rates, working_set: WorkingSet, *, num_slots: int, num_tokens: int, seen: float
) -> Range:
    """Predict the seconds of one chunk whose tokens see `seen` positions each."""
    slow, likely, fast = (
        sum(
            _chunk(work, rates.scaled(case.rate_factor), working_set, num_slots, num_tokens, seen, case)[
                0
            ].values()
        )
        for case in _cases(work, rates, working_set)
    )
    return Range(fast, likely, slow)


def _prompt(
    work: Work,
    rates: Rates,
    working_set: WorkingSet,
    num_slots: int,
    num_tokens: int,
    chunk_tokens: int,
    case: _Case,
) -> tuple[float, dict[str, float], float]:
    parts: dict[str, float] = defaultdict(float)
    drive_bytes = 0.0
    for done in range(0, num_tokens, chunk_tokens):
        tokens = min(chunk_tokens, num_tokens - done)
        seen = done + (tokens + 1) / 2
        for count, share in work.runs(tokens, num_tokens - done - tokens).items():
            of_chunk, missed = _chunk(work, rates, working_set, num_slots, count, seen, case)
            for part, seconds in of_chunk.items():
                parts[part] += share * seconds
            drive_bytes += share * missed
    return sum(parts.values()), parts, drive_bytes


def _chunk(
    work: Work, rates: Rates, working_set: WorkingSet, num_slots: int, tokens: int, seen: float, case: _Case
) -> tuple[dict[str, float], float]:
    """The seconds of a chunk by part, and its bytes from the drive."""
    layers = work.num_moe_layers
    missing = 1.0 - min(1.0, num_slots / max(1, layers * work.num_experts))
    if missing:  # the prediction of misses errs as much as that of a hit rate
        missing = min(1.0, max(0.0, missing - case.hit_points))
    asked = _asked(work, working_set, tokens)
    dense_s = _product_s(work.dense, rates, tokens) + _product_s(work.head, rates, 1)
    attention_s = tokens * rates.prompt_attention_s(work.kv_dtype, work.keys_values(seen)[1])
    of_expert = max(1.0, tokens * work.experts_per_token / asked)
    experts_s = layers * asked * _expert_s(work.expert, rates, of_expert)
    missed = layers * asked * missing * work.record_bytes
    reading_s = missed / rates.drive_rate(work.piece_bytes)
    # All cores compute, so the readers' processor time slows the products down.
    cpu_s = rates.transcode_cpu_s_per_byte if work.is_transcoded else rates.read_cpu_s_per_byte
    lent_s = missed * cpu_s / rates.cores
    # The next layer's experts are read while this layer computes.
    computing_s = experts_s + dense_s + attention_s + lent_s
    alone_s = (1.0 - case.prompt_overlap) * min(reading_s, computing_s)
    overhead_s = work.num_layers * rates.layer_s + rates.step_s + lent_s
    if missing:
        misses_s = rates.misses_overhead_s(asked, asked * missing, work.record_bytes)
        overhead_s += layers * (rates.streamed_layer_s + misses_s)
    parts = {
        "dense weights": dense_s,
        "attention": attention_s,
        "experts": experts_s,
        "waiting for the drive": max(0.0, reading_s - computing_s) + alone_s,
        "overhead": overhead_s,
    }
    return parts, missed


def predict_picture(
    work: Work, rates: Rates, working_set: WorkingSet, *, width: int, height: int, num_positions: int, flop: float,
    num_text_tokens: int, num_slots: int, chunk_tokens: int,
) -> PictureForecast:  # fmt: skip
    """Predict the time from a prompt with a picture to its first token: the picture is encoded, then treated as a
    prompt.

    Args:
        flop: the encoder's floating-point operations.
    """
    num_tokens = num_positions + num_text_tokens
    seconds, likely = [], {}
    for case in _cases(work, rates, working_set):
        scaled = rates.scaled(case.rate_factor)
        encoder_s = flop / scaled.encoder_operations
        prompt_s, parts, _ = _prompt(work, scaled, working_set, num_slots, num_tokens, chunk_tokens, case)
        seconds.append(encoder_s + prompt_s)
        if case.rate_factor == 1.0:
            likely = {"encoder": encoder_s, **parts}
    return PictureForecast(
        width=width,
        height=height,
        num_positions=num_positions,
        seconds=Range(seconds[2], seconds[1], seconds[0]),
        encoder_s=likely["encoder"],
        bound=_bound(likely),
    )


def _asked(work: Work, working_set: WorkingSet, num_tokens: int) -> float:
    """How many distinct experts of a layer `num_tokens` tokens or steps choose; 1 without layers of experts, so that
    nobody divides by 0.
    """
    return float(working_set.distinct_in(num_tokens).mean()) if work.num_moe_layers else 1.0


def _bound(parts: Mapping[str, float]) -> str:
    return max(parts, key=lambda name: parts[name])
