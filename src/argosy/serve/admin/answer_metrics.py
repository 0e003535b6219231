"""Histograms of answers, and counts of tokens by model and key, for Prometheus.

    gate: a request arrives  ->  Answers: each token, the end  ->  AnswerMetrics  ->  /metrics

Labels are the answering model, the kind of request, how an answer ended, and the id of a key: never the key itself
or anything that anyone said. Key ids beyond MOST_KEYS share the label `other`, so the number of series is bounded.
Three histograms also appear under the names and labels of OpenTelemetry's conventions for generative AI.

Elsewhere: `state.py` has the engine's metrics and counts requests by route.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import Metric

from argosy.engine.sequence import Result
from argosy.serve.http.access import RouteRule
from argosy.serve.http.caller import Caller, Hook, Watch

Operation = Literal["chat", "text_completion"]  # OpenTelemetry's terms

MOST_KEYS = 256
OTHER_KEYS = "other"
# A model that reads experts from a drive may need minutes where a resident one needs seconds.
_REQUEST_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280)
_FIRST_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10)
_TOKENS = tuple(4**power for power in range(11))  # to 1,048,576
_LABELS = ("model", "operation")
_OPENTELEMETRY = {"model": "gen_ai_response_model", "operation": "gen_ai_operation_name"}


class AnswerMetrics(Hook):
    """The metrics of all answers. Any thread may call it.

    Args:
        clock: in seconds, the same clock as for `Caller.began`.
    """

    def __init__(self, registry: CollectorRegistry, clock: Callable[[], float] = time.monotonic) -> None:
        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, what, _LABELS, buckets=buckets, registry=registry)

        self.clock = clock
        self.queue = histogram(
            "argosy_queue_seconds", "Time from the submission of an answer to its first step", _FIRST_S
        )
        self.first_token = histogram(
            "argosy_first_token_seconds",
            "Time from the arrival of a request to the first token of an answer",
            _FIRST_S,
        )
        self.inter_token = histogram(
            "argosy_inter_token_seconds", "Time between two tokens of an answer", _TOKEN_S
        )
        self.token = histogram(
            "argosy_token_seconds", "Mean time of the tokens of an answer, after the first", _TOKEN_S
        )
        self.duration = histogram(
            "argosy_answer_seconds", "Time from the arrival of a request to the end of an answer", _REQUEST_S
        )
        self.prompt_tokens = histogram("argosy_answer_prompt_tokens", "Prompt tokens of an answer", _TOKENS)
        self.new_tokens = histogram("argosy_answer_new_tokens", "Generated tokens of an answer", _TOKENS)
        self.answers = Counter("argosy_answers", "Ended answers", ["model", "finish"], registry=registry)
        self.marked_tokens = Counter(
            "argosy_marked_tokens", "Tokens chosen with the watermark", ["model"], registry=registry
        )
        self._key_prompt_tokens, self._key_new_tokens = (
            Counter(f"argosy_key_{kind}_tokens", f"{what} tokens by key", ["model", "key"], registry=registry)
            for kind, what in (("prompt", "Prompt"), ("new", "Generated"))
        )
        self._key_requests = Counter(
            "argosy_key_requests",
            "Requests that a model answered, by key",
            ["model", "key"],
            registry=registry,
        )
        self._keys: set[str] = set()
        registry.register(self)

    def arrive(self, caller: Caller, rule: RouteRule, headers: Mapping[str, str]) -> Watch | None:
        return RequestWatch(self, caller)

    def watch(self, model: str, operation: Operation, began: float) -> AnswerWatch:
        """Start watching a request that arrived at `began`."""
        return AnswerWatch(self, model, operation, began)

    def count_request(self, model: str, key: str) -> None:
        self._key_requests.labels(model, self._label_of(key)).inc()

    def count_tokens(self, model: str, key: str, *, prompt: int, new: int) -> None:
        label = self._label_of(key)
        if prompt:
            self._key_prompt_tokens.labels(model, label).inc(prompt)
        if new:
            self._key_new_tokens.labels(model, label).inc(new)

    def _label_of(self, key: str) -> str:
        if key in self._keys:
            return key
        if len(self._keys) >= MOST_KEYS:
            return OTHER_KEYS
        self._keys.add(key)
        return key

    def collect(self) -> Iterator[Metric]:
        """Yield the histograms under OpenTelemetry's names."""
        for name, histogram in (
            ("gen_ai_server_request_duration_seconds", self.duration),
            ("gen_ai_server_time_to_first_token_seconds", self.first_token),
            ("gen_ai_server_time_per_output_token_seconds", self.token),
        ):
            for family in histogram.collect():
                alias = Metric(name, family.documentation, family.type)
                for sample in family.samples:
                    labels = {_OPENTELEMETRY.get(label, label): text for label, text in sample.labels.items()}
                    alias.add_sample(
                        name + sample.name.removeprefix(family.name),
                        {"gen_ai_provider_name": "argosy", **labels},
                        sample.value,
                    )
                yield alias


class RequestWatch(Watch):
    """The answers and tokens of one request."""

    def __init__(self, metrics: AnswerMetrics, caller: Caller) -> None:
        self._metrics, self._caller = metrics, caller
        self._model = ""
        self._answers: list[AnswerWatch] = []

    def answered_by(self, model: str, digests: Mapping[str, str]) -> None:
        if not self._model:
            self._metrics.count_request(model, self._caller.key_id)
        self._model = model

    def count(self, *, prompt: int, new: int) -> None:
        self._metrics.count_tokens(self._model, self._caller.key_id, prompt=prompt, new=new)

    def queued(self, num_answers: int, *, is_chat: bool) -> None:
        operation: Operation = "chat" if is_chat else "text_completion"
        watch = partial(self._metrics.watch, self._model, operation, self._caller.began)
        self._answers += [watch() for _ in range(num_answers)]

    def token(self, answer: int) -> None:
        super().token(answer)
        self._answers[answer].token()

    def ended(self, answer: int, result: Result) -> None:
        self._answers[answer].end(result)


class AnswerWatch:
    """The times of one answer, from events in the engine's thread."""

    def __init__(self, metrics: AnswerMetrics, model: str, operation: Operation, began: float) -> None:
        self._metrics, self._labels, self._began = metrics, (model, operation), began
        self._inter_token = metrics.inter_token.labels(*self._labels)
        self._first_at: float | None = None
        self._last_at = 0.0
        self._num_tokens = 0

    def token(self) -> None:
        """The answer has a new token."""
        now = self._metrics.clock()
        if self._first_at is None:
            self._first_at = now
            self._metrics.first_token.labels(*self._labels).observe(now - self._began)
        else:
            self._inter_token.observe(now - self._last_at)
        self._last_at = now
        self._num_tokens += 1

    def end(self, result: Result) -> None:
        """The answer has ended. Only complete answers count in the histograms of durations and sizes."""
        metrics, labels = self._metrics, self._labels
        metrics.answers.labels(labels[0], result.finish_reason).inc()
        if result.num_marked:
            metrics.marked_tokens.labels(labels[0]).inc(result.num_marked)
        if result.ledger.queue_s is not None:
            metrics.queue.labels(*labels).observe(result.ledger.queue_s)
        if result.finish_reason not in ("stop", "length"):
            return
        metrics.duration.labels(*labels).observe(metrics.clock() - self._began)
        metrics.prompt_tokens.labels(*labels).observe(result.ledger.prompt_tokens)
        metrics.new_tokens.labels(*labels).observe(result.ledger.new_tokens)
        if self._first_at is not None and self._num_tokens > 1:
            mean_s = (self._last_at - self._first_at) / (self._num_tokens - 1)
            metrics.token.labels(*labels).observe(mean_s)
