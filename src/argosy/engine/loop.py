"""A thread that steps an engine, for callers that must not block, such as a server with an event loop.

    submit, cancel: any thread  ->  inbox  ->  the thread: cancel, enqueue, step, deliver  ->  on_event, in that thread

Events report a request's progress: how much of its prompt is done, each token of each answer, and exactly one end per
answer, whatever the cause. `on_event` must be quick and must not call back; for asyncio it is

    lambda event: loop.call_soon_threadsafe(queue.put_nowait, event)

The thread sends a heartbeat in every turn, between the layers of a step, and while it waits for requests. So
`LoopFacts.silent_s` shows whether the thread still runs, without waiting for it.

The thread survives failures: a failed read ends the answers that need it, any other failure in a step ends all running
answers, and a listener that raises ends its own request. If rounds keep failing while no request runs, the engine
itself is broken: the loop ends, every caller is told, and `has_failed` is set.

Elsewhere: `throughput.py` averages the work; `engine.py` defines a step; `scheduler.py` chooses its sequences.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from time import monotonic, perf_counter

from argosy.budget.memory_plan import MemoryPlan
from argosy.config import SamplingParams
from argosy.engine.engine import Engine
from argosy.engine.facts import EngineFacts
from argosy.engine.ledger import DecodeSteps, Ledger
from argosy.engine.progress import MOST_WAITS, RequestProgress, RequestWait
from argosy.engine.requests import PromptLike
from argosy.engine.sequence import Result, Sequence, TokenEvent
from argosy.engine.throughput import ThroughputMeter
from argosy.errors import ArgosyError, Overloaded, Revoked, as_exception, refused_by_system

_FACTS_SECONDS = 0.1  # minimum time between two collections of facts
_WRITING_SECONDS = 0.005  # how soon to check again whether the file writer is free
BEAT_S = 1.0  # time between heartbeats of an idle loop
# No layer, and no step of another engine, takes longer: a loop without a heartbeat for this long has stopped.
SILENT_S = 300.0
_RETRY_STOPPING_S = 30
_MOST_IDLE_FAILURES = 8  # consecutive rounds that may fail while no request runs
_AFTER_FAILURE_S = 0.1  # pause after each failed round


@dataclass(frozen=True, slots=True)
class PromptProgress:
    """The number of prompt tokens done; `cached` of them came from the prefix cache.

    encoded: the encoded share of the next picture, sound or group of frames, 0 to 1; None: the prompt waits for none.
    """

    answer: int
    processed: int
    total: int
    cached: int
    encoded: float | None = None


@dataclass(frozen=True, slots=True)
class AnswerToken:
    """The next token of an answer."""

    answer: int
    event: TokenEvent


@dataclass(frozen=True, slots=True)
class AnswerEnd:
    """The last event of every answer; `result.error` gives the reason if the answer could not be finished."""

    answer: int
    result: Result


Event = PromptProgress | AnswerToken | AnswerEnd


class Request:
    """A prompt and its answers in progress; made by `EngineLoop.submit`."""

    def __init__(self, sequences: list[Sequence], on_event: Callable[[Event], None], name: str = "") -> None:
        self._sequences = sequences
        self.name = name
        self._on_event: Callable[[Event], None] | None = on_event
        # Reported for each answer: finished prompt tokens, and the encoded share of a picture.
        self._told: list[tuple[int, float | None]] = [(0, None)] * len(sequences)
        self._open = set(range(len(sequences)))  # answers whose end has not been reported yet
        self._error: ArgosyError | None = None  # why the request is cancelled, unless the caller cancelled it

    @property
    def prompt_ids(self) -> list[int]:
        return self._sequences[0].prompt_ids

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter changes anything."""
        return self._sequences[0].adapter is not None

    @property
    def seeds(self) -> list[int]:
        """The seed of each answer."""
        return [sequence.sampler_state.seed for sequence in self._sequences]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopFacts:
    """Facts of an engine under a loop, with means over the last RATE_SECONDS (`throughput.py`)."""

    engine: EngineFacts
    num_steps: int
    is_stopping: bool
    has_failed: bool  # no further request will be answered
    new_tok_per_s: float
    prompt_tok_per_s: float  # computed tokens only, not prefix-cache hits
    bytes_read_per_s: float
    silent_s: float  # since the last heartbeat
    # Seconds by part, of the steps that ended in the last RATE_SECONDS, or of the last one; `other` includes idle time.
    recent_parts: Mapping[str, float]
    # Steps without prompt tokens in the last DECODE_SECONDS; None: there were none.
    recent_decode: DecodeSteps | None = None
    # In order of arrival: running requests, and the first MOST_WAITS requests that have not run yet.
    requests: tuple[RequestProgress, ...] = ()
    waiting: tuple[RequestWait, ...] = ()


class EngineLoop:
    """Steps `engine` until it is closed; the caller closes the engine itself.

    Args:
        report: called with internal failures and with errors raised by listeners.
        clock: seconds, for rates.

    Attributes:
        engine: for calls that any thread may make while it steps.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        report: Callable[[BaseException], None] = lambda error: None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.engine = engine
        self._report = report
        self._clock = clock
        self._changed = threading.Condition()  # guards the attributes below
        self._inbox: list[Request] = []
        self._cancelled: list[Request] = []
        self._to_forget: list[tuple[str, ArgosyError]] = []  # tenants, and the error that ends their requests
        self._revoked: set[str] = set()
        self._num_live = 0  # sequences whose end has not been reported yet
        self._is_stopping = False
        self._is_closing = False
        self._has_failed = False

        self._live: list[Request] = []  # used by the thread alone, like the attributes below
        self._num_idle_failures = 0
        self._beat_at = monotonic()
        self._facts = engine.facts()
        self._facts_at = clock()
        self._meter = ThroughputMeter(self._facts, self._facts_at)
        self._thread = threading.Thread(target=self._run, name="argosy-engine", daemon=True)
        self._thread.start()

    # ── public calls ────────────────────────────────────────────────────────────────────────────────────────────

    def submit(
        self,
        prompt: PromptLike,
        params: SamplingParams | None,
        on_event: Callable[[Event], None],
        *,
        num_answers: int = 1,
        tenant: str = "",
        name: str = "",
        adapter: str | None = None,
    ) -> Request:
        """Check a request and queue it, without waiting for a step.

        Args:
            name: the request's id, for `LoopFacts.requests`.

        Raises:
            Overloaded: too many sequences are already waiting, or the loop is stopping or has failed.
            Revoked: the tenant was revoked.
            ArgosyError: what `Requests.prepare` raises.
        """
        sequences = self.engine.requests.prepare(
            prompt, params, num_answers=num_answers, tenant=tenant, adapter=adapter
        )
        return self._queue(Request(sequences, on_event, name), tenant)

    def submit_embedding(
        self,
        text: str | SequenceOf[int],
        on_event: Callable[[Event], None],
        *,
        tenant: str = "",
        name: str = "",
        adapter: str | None = None,
    ) -> Request:
        """Check a text and queue it for its embedding, which arrives in `AnswerEnd.result`.

        Raises what `submit` and `Requests.prepare_embedding` raise.
        """
        sequence = self.engine.requests.prepare_embedding(text, tenant=tenant, adapter=adapter)
        return self._queue(Request([sequence], on_event, name), tenant)

    def _queue(self, request: Request, tenant: str) -> Request:
        num_answers = len(request.seeds)
        with self._changed:
            if self._has_failed:
                raise _failed()
            if self._is_stopping:
                raise Overloaded(
                    "the engine is stopping and takes no new requests", retry_after_s=_RETRY_STOPPING_S
                )
            if tenant in self._revoked:
                raise _revoked()
            self.engine.admission.require_room(num_answers, num_live=self._num_live)
            self._num_live += num_answers
            self._inbox.append(request)
            self._changed.notify_all()
        return request

    def cancel(self, request: Request) -> None:
        """End a request before the next step; does nothing once the request has ended. The thread sends its last
        events.
        """
        with self._changed:
            self._cancelled.append(request)
            self._changed.notify_all()

    def revoke(self, tenant: str) -> None:
        """Remove a tenant for good: before the next step, end its requests and forget everything kept for it."""
        with self._changed:
            self._revoked.add(tenant)
            self._to_forget.append((tenant, _revoked()))
            self._changed.notify_all()

    def erase(self, tenant: str) -> None:
        """Before the next step, end a tenant's requests and forget everything kept for it. It may submit more."""
        with self._changed:
            self._to_forget.append((tenant, _erased()))
            self._changed.notify_all()

    def resize(self, budget_bytes: int, *, is_share: bool = False) -> MemoryPlan:
        """Give the engine another memory budget, while requests go on (`Engine.resize`, whose errors it raises)."""
        plan = self.engine.resize(budget_bytes, is_share=is_share)
        # `Engine.facts` would wait for a running step, after which the thread gathers them itself.
        self._facts = self._facts.with_plan(plan) if self._num_live else self.engine.facts()
        return plan

    def snapshot(self) -> LoopFacts:
        """Return facts as of about the last step, without waiting for a step. A request that just arrived counts as
        waiting.
        """
        throughput, step = (
            self._meter.read(self._clock(), self.engine.watch),
            self.engine.watch.running_step,
        )
        requests, waiting = self._requests()
        # The facts date from the end of a step, and the next step may take minutes.
        facts = self._facts
        num_open = max(facts.num_running + facts.num_waiting, self._num_live)
        num_running = max(facts.num_running, 0 if step is None else len(step.scheduled.sequences))
        return LoopFacts(
            engine=replace(facts, num_running=num_running, num_waiting=max(0, num_open - num_running)),
            num_steps=self._meter.num_steps,
            is_stopping=self._is_stopping,
            has_failed=self._has_failed,
            new_tok_per_s=throughput.new_tok_per_s,
            prompt_tok_per_s=throughput.prompt_tok_per_s,
            bytes_read_per_s=throughput.bytes_read_per_s,
            silent_s=max(0.0, monotonic() - max(self._beat_at, self.engine.watch.progressed_at)),
            recent_parts=throughput.parts,
            recent_decode=throughput.decode,
            requests=requests,
            waiting=waiting,
        )

    def _requests(self) -> tuple[tuple[RequestProgress, ...], tuple[RequestWait, ...]]:
        """Return running and waiting requests; a request that the thread is just taking may be missing."""
        running: list[RequestProgress] = []
        waiting: list[RequestWait] = []
        for request in dict.fromkeys([*self._live, *self._inbox]):
            progress = self.engine.watch.progress(request._sequences, request.name)
            if progress is not None:
                running.append(progress)
            elif request._open and len(waiting) < MOST_WAITS:
                waiting.append(
                    RequestWait(
                        name=request.name,
                        why=self.engine.watch.why_waiting(request._sequences[0]),
                        ahead=len(waiting),
                        seconds=perf_counter() - request._sequences[0].started_at,
                    )
                )
        return tuple(running), tuple(waiting)

    def drain(self, timeout_s: float) -> bool:
        """Accept no new requests and wait until all running ones end. Return False if `timeout_s` passes first."""
        with self._changed:
            self._is_stopping = True
            return self._changed.wait_for(lambda: not self._num_live, timeout_s)

    def close(self) -> None:
        """Cancel running requests and end the thread. Closing twice is harmless."""
        with self._changed:
            self._is_stopping = self._is_closing = True
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> EngineLoop:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ── the thread ──────────────────────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        failure: BaseException | None = None
        try:
            while self._turn():
                pass
        except BaseException as error:
            failure = error
        self._end(failure)
        if failure is not None:
            self._report(failure)

    def _turn(self) -> bool:
        """Take, step and deliver once. Return False when the loop should end. A failure ends all running requests."""
        error: Exception | None = None
        self._beat_at = monotonic()
        try:
            if not self._take():
                return False
            if self.engine.has_work:
                self._meter.begin_step(self._clock())
            self.engine.step()
            self._num_idle_failures = 0
        except SystemExit:
            raise
        except BaseException as raised:
            error = as_exception(raised)
            self._endure(error)
        self._deliver(error)
        self._gather_facts()
        self._meter.end_step()
        return True

    def _endure(self, error: Exception) -> None:
        """Continue after a failure outside any one request, unless every idle round fails."""
        self._report(error)
        for request in self._live:
            self._cancel(request)
        if self._live:
            self._num_idle_failures = 0
            return
        self._num_idle_failures += 1
        if self._num_idle_failures >= _MOST_IDLE_FAILURES:
            raise error
        with self._changed:
            self._changed.wait(_AFTER_FAILURE_S)

    def _end(self, failure: BaseException | None) -> None:
        """End every request before the thread exits, so that no caller waits forever."""
        with self._changed:
            self._is_stopping = True
            self._has_failed = failure is not None
            arrived, self._inbox = self._inbox, []
        self._live += arrived
        for request in self._live:
            self._cancel(request)
        self._deliver(None if failure is None else _failed())
        self._gather_facts()

    def _take(self) -> bool:
        """Wait for work, then add new requests and remove cancelled ones. Return False when the loop should end."""
        with self._changed:
            while not (self._inbox or self._cancelled or self._to_forget or self._live or self._is_closing):
                self._beat_at = monotonic()
                if not self.engine.is_writing:
                    self._changed.wait(BEAT_S)
                elif not self._changed.wait(_WRITING_SECONDS):
                    break
            arrived, self._inbox = self._inbox, []
            cancelled, self._cancelled = self._cancelled, []
            to_forget, self._to_forget = self._to_forget, []
            is_closing = self._is_closing
        for request in arrived:
            self._live.append(request)
            try:
                self.engine.enqueue(request._sequences, has_room=True)
            except Exception as error:
                self._report(error)
                request._error = _as_told(error)
                self._cancel(request)
        for request in cancelled:
            self._cancel(request)
        for tenant, reason in to_forget:
            self._forget(tenant, reason)
        return not is_closing

    def _forget(self, tenant: str, reason: ArgosyError) -> None:
        for request in self._live:
            if request._sequences[0].tenant == tenant:
                request._error = reason
                self._cancel(request)
        try:
            self.engine.forget(tenant)
        except Exception as error:
            self._report(error)

    def _cancel(self, request: Request) -> None:
        for sequence in request._sequences:
            try:
                self.engine.cancel(sequence)
            except Exception as error:
                self._report(error)

    def _deliver(self, error: Exception | None) -> None:
        """Report the last step's outcome to every request; `error` is the failure that ended the running requests.

        A cancelled sequence without a result never gets a result: it never entered the engine, or ending it failed.
        """
        num_ended = 0
        for request in self._live:
            for answer in sorted(request._open):
                sequence = request._sequences[answer]
                self._tell_progress(request, answer, sequence)
                while sequence.events:
                    self._tell(request, AnswerToken(answer, sequence.events.popleft()))
                failed = request._error or (None if error is None else _as_told(error))
                if sequence.result is not None or failed is not None:
                    result = sequence.result or _no_result(sequence)
                    if failed is not None and result.finish_reason == "cancelled":
                        result = replace(result, finish_reason="error", error=failed)
                    request._open.remove(answer)
                    num_ended += 1
                    self._tell(request, AnswerEnd(answer, result))
        if num_ended:
            self._live = [request for request in self._live if request._open]
            with self._changed:
                self._num_live -= num_ended
                self._changed.notify_all()

    def _tell_progress(self, request: Request, answer: int, sequence: Sequence) -> None:
        total = len(sequence.prompt_ids)
        processed = min(sequence.num_computed, total)
        if sequence.first_token_at is not None:
            processed = total  # a finished sequence no longer holds its blocks
        encoded = None if sequence.spans is None else sequence.spans.share_made
        told_processed, told_encoded = request._told[answer]
        if processed > told_processed or (encoded is not None and encoded != told_encoded):
            processed = max(processed, told_processed)
            request._told[answer] = processed, encoded
            self._tell(
                request, PromptProgress(answer, processed, total, sequence.cached_tokens or 0, encoded)
            )

    def _tell(self, request: Request, event: Event) -> None:
        if request._on_event is None:
            return
        try:
            request._on_event(event)
        except Exception as error:
            self._report(error)
            request._on_event = None
            self._cancel(request)

    def _gather_facts(self) -> None:
        now = self._clock()
        if self._live and now - self._facts_at < _FACTS_SECONDS:
            return
        self._facts_at = now
        try:
            self._facts = self.engine.facts()
        except Exception as error:  # observers keep the previous facts
            self._report(error)
            return
        self._meter.note(self._facts, now)


def _no_result(sequence: Sequence) -> Result:
    return Result(
        text=sequence.text,
        token_ids=sequence.new_ids,
        finish_reason="cancelled",
        logprobs=sequence.logprobs,
        usage={},
        seed=sequence.sampler_state.seed,
        ledger=Ledger(),
    )


def _as_told(error: Exception) -> ArgosyError:
    """Return the error for callers; the message of any other exception could quote the prompt."""
    if isinstance(error, ArgosyError):
        return error
    return refused_by_system(error) or ArgosyError("the step failed")


def _failed() -> Overloaded:
    return Overloaded(
        "the engine has failed and takes no new requests",
        retry_after_s=_RETRY_STOPPING_S,
        hint="restart the server",
    )


def _revoked() -> Revoked:
    return Revoked("the key was revoked")


def _erased() -> ArgosyError:
    return Overloaded("the data of this key was erased, and with it this request", retry_after_s=1)
