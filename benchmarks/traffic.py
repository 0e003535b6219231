"""Does `argosy plan --rate` predict how long clients wait? Predictions are on the drive before each run.

    python benchmarks/traffic.py [--geometry mid] [--format Q4_0] [--seconds 190] [--calibrate] [--short]

Requests come at random at three rates, which are shares of what one server can do by prediction; as many at each rate.
First the steps of the model are measured, as by `argosy plan --rate --verify`. The same requests are simulated with
those, and with steps that were forecast from the rates of this machine. Both predictions are appended to
`results/traffic_predictions.jsonl` and flushed to the drive. Then a server on loopback gets these requests at these
times. Answers are greedy and streamed. Prompts are parts of documents, no two alike, and every answer is checked
against the rest of its document.

Times begin with the first byte of a request. Targets: p50 within 15 %, p99 within 30 %, with measured steps.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from argosy.config import SERVED_AT_ONCE, SERVED_WAITING
from argosy.forecast import calibration
from argosy.forecast.planning import HERE, find_place, forecaster, open_subject
from argosy.forecast.simulation import SimulatedServer, Times, requests_per_s, simulate
from argosy.forecast.step_probe import measured_servers
from argosy.forecast.traffic import TrafficRequest, parse_traffic, requests_of
from argosy.machine import kept_rates
from argosy.serve.claims import server_claims
from common import RESULTS, Report, Sample, file_bytes, tidy_up_when_terminated
from engines import ARGOSY, MODELS
from load import FEWEST_RIGHT, Reply, Way, ask, running
from make_checkpoint import named_model, vocabulary
from random_weights import DOCUMENT_TOKENS

PREDICTIONS = RESULTS / "traffic_predictions.jsonl"
LOADS = (0.3, 0.6, 0.85)  # shares of one server's capacity
CONTEXT_TOKENS = 4096
TRAFFIC = "prompt=64~1.6,answer=16~1.6"
TARGETS = {"p50": 0.15, "p99": 0.30}
MEASURED, FORECAST = "measured steps", "forecast steps"
_DOCUMENTS = range(1, 49)  # their token ids stand for words, not for control tokens
_START_TOKENS = 8  # the first word of a prompt is one of every eighth


@dataclass(frozen=True)
class Load:
    """Requests at one rate, and their times in seconds by kind: what is predicted by each kind of steps."""

    share: float
    rate_per_s: float
    requests: tuple[TrafficRequest, ...]
    predicted: Mapping[str, Mapping[str, Times]]


# ── predictions ─────────────────────────────────────────────────────────────────────────────────────────────────────


def servers_of(model: Path, memory: int, threads: int) -> tuple[dict[str, SimulatedServer], str]:
    """A server with the limits of `argosy serve`, by where the times of its steps come from; and the rates in words."""
    options: dict[str, Any] = {
        "max_sequences": SERVED_AT_ONCE, "max_waiting": SERVED_WAITING, "context": CONTEXT_TOKENS,
        "threads": threads, "grammars": True, "claims": server_claims(keeps_content=False),
    }  # fmt: skip
    with open_subject(str(model)) as subject:
        place = find_place(HERE, model, threads=threads)
        found, budget_bytes = forecaster(subject, place, memory=memory, **options)
        plan = found.plan(budget_bytes)
        forecast = found.servers(plan)[1]
    _, measured, _ = measured_servers(str(model), plan, forecast, options | found.engine_options(plan))
    return {MEASURED: measured, FORECAST: forecast}, place.rates.source


def predict(share: float, capacity: float, count: int, servers: Mapping[str, SimulatedServer]) -> Load:
    rate = share * capacity
    requests = requests_of(parse_traffic(TRAFFIC), rate, count=count)
    room = DOCUMENT_TOKENS // 2
    requests = tuple(
        one._replace(prompt_tokens=min(one.prompt_tokens, room), answer_tokens=min(one.answer_tokens, room))
        for one in requests
    )
    predicted = {}
    for name, server in servers.items():
        outcome = simulate(requests, server)
        predicted[name] = {"first token": outcome.first_token_s, "request": outcome.request_s}
    return Load(share, rate, requests, predicted)


def write_down(load: Load) -> None:
    """Append a prediction, and return when it is on the drive."""
    RESULTS.mkdir(exist_ok=True)
    with PREDICTIONS.open("a") as file:
        file.write(json.dumps({"time": time.time(), **asdict(load)}) + "\n")
        file.flush()
        os.fsync(file.fileno())


# ── the server ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Texts:
    """Prompts of any length, no two alike, and what a model says after them."""

    def __init__(self) -> None:
        self._tokens, _ = vocabulary(32_000)
        self._num_taken = 0

    def take(self, request: TrafficRequest) -> tuple[list[int], str]:
        document = _DOCUMENTS[self._num_taken % len(_DOCUMENTS)]
        begin = document * DOCUMENT_TOKENS + _START_TOKENS * (self._num_taken // len(_DOCUMENTS))
        self._num_taken += 1
        end = begin + request.prompt_tokens
        rest = range(end, end + request.answer_tokens)
        return list(range(begin, end)), "".join(self._tokens[token] for token in rest)


async def put(port: int, requests: Sequence[TrafficRequest], texts: Texts) -> list[tuple[Reply, str, float]]:
    """Send each request at its time: replies, what they should say, and how much too late each was sent."""
    began = time.perf_counter() + 0.2

    async def one(request: TrafficRequest, prompt: list[int], answer: str) -> tuple[Reply, str, float]:
        body = {
            "prompt": prompt, "max_tokens": request.answer_tokens, "temperature": 0, "stream": True, "ignore_eos": True,
        }  # fmt: skip
        await asyncio.sleep(began + request.at_s - time.perf_counter())
        late_s = time.perf_counter() - began - request.at_s
        return await ask(port, body), answer, late_s

    return await asyncio.gather(*(one(request, *texts.take(request)) for request in requests))


def measured_times(
    replies: Sequence[tuple[Reply, str, float]],
) -> tuple[dict[str, Times], int]:
    """Times in seconds by kind, and how many answers are right."""
    first, whole, num_right = [], [], 0
    for reply, answer, _ in replies:
        texts = reply.texts()
        num_right += "".join(text for _, text in texts) == answer
        first.append(texts[0][0] - reply.sent_at)
        whole.append(texts[-1][0] - reply.sent_at)
    return {"first token": Times.of(first), "request": Times.of(whole)}, num_right


# ── both ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def show(load: Load, found: Mapping[str, Times], report: Report, sample: Sample) -> bool:
    """Print predicted beside measured; whether the targets are met."""
    is_met = True
    for kind, times in found.items():
        for point, target in TARGETS.items():
            measured = float(getattr(times, point))
            line = f"{load.share:<6.2f}{load.rate_per_s:<10.2f}{kind:<14}{point:<6}{measured:>10.3f}"
            for name in (MEASURED, FORECAST):
                predicted = float(getattr(load.predicted[name][kind], point))
                error = predicted / measured - 1.0
                line += f"{predicted:>12.3f}{error:>+8.0%}"
                is_judged = name == MEASURED
                report.record(
                    f"{kind} {point} at {load.share}, {name}", "predicted over measured", [predicted / measured],
                    [sample],
                    target=f"within {target:.0%}" if is_judged else "", rate_per_s=load.rate_per_s,
                    num_requests=len(load.requests), measured_s=measured, predicted_s=predicted,
                )  # fmt: skip
                if is_judged:
                    line += "  met   " if abs(error) <= target else "  missed"
                    is_met = is_met and abs(error) <= target
            print(line, flush=True)
    return is_met


def main() -> int:
    tidy_up_when_terminated()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--geometry", default="mid")
    parser.add_argument("--format", default="Q4_0")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--seconds", type=float, default=190.0, help="in which requests come, all rates together"
    )
    parser.add_argument("--loads", default=",".join(map(str, LOADS)), help="shares of what one server can do")
    parser.add_argument("--calibrate", action="store_true", help="measure the rates of this machine first")
    parser.add_argument("--models", type=Path, default=MODELS, help="where model files are kept")
    parser.add_argument(
        "--short", action="store_true", help="a tiny model for half a minute, without a verdict"
    )
    options = parser.parse_args()
    if options.short:
        options.geometry, options.seconds = "tiny", 20.0
    report = Report("traffic", state="loopback; one server for all rates, warmed by 8 requests")
    model = named_model(options.models, options.geometry, options.format)
    if options.calibrate:
        with open_subject(str(model)) as subject:
            kept_rates.save(calibration.calibrate(subject.weights, threads=options.threads), model)
    way = Way(engine=ARGOSY, threads=options.threads, limit_bytes=None)
    memory = 2 * file_bytes(model) + (2 << 30)
    servers, source = servers_of(model, memory, options.threads)
    lengths = requests_of(parse_traffic(TRAFFIC), 1.0, count=2000)
    capacity = requests_per_s(lengths, servers[MEASURED])
    is_met, texts, num_right, num_asked = True, Texts(), 0, 0
    with running(way, model, context=CONTEXT_TOKENS, clients=1) as port:
        warm = [one._replace(at_s=0.0) for one in lengths[:8]]
        _, right = measured_times(asyncio.run(put(port, warm, texts)))
        report.correct(f"{right}/{len(warm)} answers are the rest of their documents")
        report.opening()
        report.line("rates", source)
        report.line(
            "capacity",
            f"{capacity:.2f} requests/s with {MEASURED}, {requests_per_s(lengths, servers[FORECAST]):.2f} with "
            f"{FORECAST}; {TRAFFIC}",
        )
        print(f"{'load':<6}{'per s':<10}{'seconds':<20}{'measured':>10}{MEASURED:>20}{FORECAST:>28}")
        shares = [float(share) for share in options.loads.split(",")]
        count = max(8, round(options.seconds * capacity / sum(1 / share for share in shares)))
        for share in shares:
            load = predict(share, capacity, count, servers)
            write_down(load)
            with Sample() as sample:
                replies = asyncio.run(put(port, load.requests, texts))
            found, right = measured_times(replies)
            num_right, num_asked = num_right + right, num_asked + len(replies)
            is_met = show(load, found, report, sample) and is_met
            late_s = max(late for _, _, late in replies)
            print(
                f"      {len(replies)} requests, sent at most {late_s:.3f} s late; {sample}",
                flush=True,
            )
    print(f"right      {num_right}/{num_asked} answers")
    is_judged = (
        not options.short
    )  # the server, the client and the model of the short form are all of one size
    return int((is_judged and not is_met) or num_right < FEWEST_RIGHT * num_asked)


if __name__ == "__main__":
    sys.exit(main())
