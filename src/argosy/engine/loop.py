"""One thread that steps an engine, for callers that must not wait: a server with an event loop.

    submit, cancel: any thread  ->  inbox  ->  the thread: cancel, enqueue, step, deliver  ->  on_event, in that thread

What a request becomes is told by events: how far its prompt is, each token of each answer, and once for each answer its
end, whatever ended it. `on_event` must be quick and must not call back; for asyncio it is

    lambda event: loop.call_soon_threadsafe(queue.put_nowait, event)

Nothing kills the thread: a read that fails ends the answers that need it, anything else that fails ends those that run,
and a listener that fails ends its own request. Where rounds fail one after the other though no request runs, the engine
itself is broken: the loop ends, everybody hears it, and `has_failed` says so.

Elsewhere: what a step does is `engine.py`; who runs in it is `scheduler.py`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from time import monotonic

from argosy.config import SamplingParams
from argosy.engine.engine import Engine, PromptLike
from argosy.engine.facts import EngineFacts
from argosy.engine.ledger import Ledger
from argosy.engine.sequence import Result, Sequence, TokenEvent
from argosy.errors import ArgosyError, Overloaded, Revoked

RATE_SECONDS = 10.0  # rates are means over so much of the past
_FACTS_SECONDS = 0.1  # facts are not gathered more often
_WRITING_SECONDS = 0.005  # how soon to look again for a free hand that writes prompts to files
_RETRY_STOPPING_S = 30
_MOST_IDLE_FAILURES = 8  # rounds in a row that fail while no request runs
_AFTER_FAILURE_S = 0.1  # between two of them


@dataclass(frozen=True, slots=True)
class PromptProgress:
    """So many tokens of the prompt are done; `cached` of them were found computed."""

    answer: int
    processed: int
    total: int
    cached: int


@dataclass(frozen=True, slots=True)
class AnswerToken:
    """The next token of an answer."""

    answer: int
    event: TokenEvent


@dataclass(frozen=True, slots=True)
class AnswerEnd:
    """The last event of an answer, always there; `result.error` says why where it could not be finished."""

    answer: int
    result: Result


Event = PromptProgress | AnswerToken | AnswerEnd


class Request:
    """A prompt and its answers on their way; made by `EngineLoop.submit`."""

    def __init__(self, sequences: list[Sequence], on_event: Callable[[Event], None]) -> None:
        self._sequences = sequences
        self._on_event: Callable[[Event], None] | None = on_event
        self._told = [0] * len(sequences)  # tokens of the prompt that were told to be done
        self._open = set(range(len(sequences)))  # answers whose end was not told
        self._error: ArgosyError | None = None  # why it is cancelled, where that is not its own wish

    @property
    def prompt_ids(self) -> list[int]:
        return self._sequences[0].prompt_ids

    @property
    def seeds(self) -> list[int]:
        """Of each answer."""
        return [sequence.sampler_state.seed for sequence in self._sequences]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopFacts:
    """An engine under a loop, and means over the last RATE_SECONDS."""

    engine: EngineFacts
    num_steps: int
    is_stopping: bool
    has_failed: bool  # nothing will be answered any more
    new_tok_per_s: float
    prompt_tok_per_s: float  # computed, not found
    bytes_read_per_s: float


class EngineLoop:
    """Owns the stepping of `engine` until it is closed; the engine itself is the caller's to close.

    Args:
        report: hears of failures that are nobody's fault but ours, and of listeners that failed.
        clock: seconds, for rates.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        report: Callable[[BaseException], None] = lambda error: None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._engine = engine
        self._report = report
        self._clock = clock
        self._changed = threading.Condition()  # guards what follows
        self._inbox: list[Request] = []
        self._cancelled: list[Request] = []
        self._to_forget: list[str] = []
        self._revoked: set[str] = set()
        self._num_live = 0  # sequences whose end was not told
        self._is_stopping = False
        self._is_closing = False
        self._has_failed = False

        self._live: list[Request] = []  # from here on the thread's own
        self._num_steps = 0
        self._num_idle_failures = 0
        self._facts = engine.facts()
        self._facts_at = clock()
        self._samples: deque[tuple[float, int, int, int]] = (
            deque()
        )  # time, new tokens, tokens run, bytes read
        self._thread = threading.Thread(target=self._run, name="argosy-engine", daemon=True)
        self._thread.start()

    # ── what a caller uses ──────────────────────────────────────────────────────────────────────────────────────

    def submit(
        self,
        prompt: PromptLike,
        params: SamplingParams | None,
        on_event: Callable[[Event], None],
        *,
        num_answers: int = 1,
        tenant: str = "",
    ) -> Request:
        """Check a request and queue it; never waits for a step.

        Raises:
            Overloaded: too many wait already, or the loop is stopping or has failed.
            Revoked: the tenant is gone.
            ArgosyError: as `Engine.prepare`.
        """
        request = Request(
            self._engine.prepare(prompt, params, num_answers=num_answers, tenant=tenant), on_event
        )
        with self._changed:
            if self._has_failed:
                raise _failed()
            if self._is_stopping:
                raise Overloaded("the engine is stopping, and takes no more", retry_after_s=_RETRY_STOPPING_S)
            if tenant in self._revoked:
                raise _revoked()
            self._engine.require_room(num_answers, num_live=self._num_live)
            self._num_live += num_answers
            self._inbox.append(request)
            self._changed.notify_all()
        return request

    def cancel(self, request: Request) -> None:
        """End a request before the next step; harmless when it has ended. Its last events come from the thread."""
        with self._changed:
            self._cancelled.append(request)
            self._changed.notify_all()

    def revoke(self, tenant: str) -> None:
        """A tenant is gone for good: before the next step its requests end, and what was kept of it is forgotten."""
        with self._changed:
            self._revoked.add(tenant)
            self._to_forget.append(tenant)
            self._changed.notify_all()

    def snapshot(self) -> LoopFacts:
        """What runs, as of the last step or so; never waits for one."""
        now = self._clock()
        samples = [sample for sample in list(self._samples) if now - sample[0] <= RATE_SECONDS]
        rates = [0.0, 0.0, 0.0]
        if len(samples) > 1 and now > samples[0][0]:
            first, last = samples[0], samples[-1]
            rates = [
                (after - before) / (now - first[0]) for before, after in zip(first[1:], last[1:], strict=True)
            ]
        return LoopFacts(
            engine=self._facts,
            num_steps=self._num_steps,
            is_stopping=self._is_stopping,
            has_failed=self._has_failed,
            new_tok_per_s=rates[0],
            prompt_tok_per_s=max(0.0, rates[1] - rates[0]),
            bytes_read_per_s=rates[2],
        )

    def drain(self, timeout_s: float) -> bool:
        """Take no more, and wait until all that runs has ended. False: it has not within `timeout_s`."""
        with self._changed:
            self._is_stopping = True
            return self._changed.wait_for(lambda: not self._num_live, timeout_s)

    def close(self) -> None:
        """Cancel what runs and end the thread; harmless the second time."""
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
        """Take, step and deliver once; returns False when the loop is to end. A failure ends the requests that run."""
        error: Exception | None = None
        try:
            if not self._take():
                return False
            if self._engine.has_work:
                self._num_steps += 1
            self._engine.step()
            self._num_idle_failures = 0
        except Exception as raised:
            error = raised
            self._endure(raised)
        self._deliver(error)
        self._gather_facts()
        return True

    def _endure(self, error: Exception) -> None:
        """Go on after a failure outside any one request, unless the loop does nothing but fail."""
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
        """End every request before the thread exits, so that no caller waits for an answer that will not come."""
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
        """Wait for something to do, and let new requests in and cancelled ones out. False: the loop is to end."""
        with self._changed:
            while not (self._inbox or self._cancelled or self._to_forget or self._live or self._is_closing):
                if not self._engine.is_writing:
                    self._changed.wait()
                elif not self._changed.wait(_WRITING_SECONDS):
                    break
            arrived, self._inbox = self._inbox, []
            cancelled, self._cancelled = self._cancelled, []
            to_forget, self._to_forget = self._to_forget, []
            is_closing = self._is_closing
        for request in arrived:
            self._live.append(request)
            try:
                self._engine.enqueue(request._sequences, has_room=True)
            except Exception as error:
                self._report(error)
                request._error = _as_told(error)
                self._cancel(request)
        for request in cancelled:
            self._cancel(request)
        for tenant in to_forget:
            self._forget(tenant)
        return not is_closing

    def _forget(self, tenant: str) -> None:
        for request in self._live:
            if request._sequences[0].tenant == tenant:
                request._error = _revoked()
                self._cancel(request)
        try:
            self._engine.forget(tenant)
        except Exception as error:
            self._report(error)

    def _cancel(self, request: Request) -> None:
        for sequence in request._sequences:
            try:
                self._engine.cancel(sequence)
            except Exception as error:
                self._report(error)

    def _deliver(self, error: Exception | None) -> None:
        """Tell every request what became of it in the last step; `error` is what ended those that ran.

        A sequence that was cancelled and still has no result has none to come: it never got into the engine, or its end
        failed.
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
            processed = total  # of one that has finished nothing is left in memory
        if processed > request._told[answer]:
            request._told[answer] = processed
            self._tell(request, PromptProgress(answer, processed, total, sequence.cached_tokens or 0))

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
            self._facts = self._engine.facts()
        except Exception as error:  # who watches sees what was true before
            self._report(error)
            return
        totals = self._facts.totals
        self._samples.append((now, totals.new_tokens, self._facts.tokens_run, totals.bytes_read))
        while now - self._samples[0][0] > RATE_SECONDS:
            self._samples.popleft()


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
    """The error that callers get: the message of any other exception could quote the prompt."""
    return error if isinstance(error, ArgosyError) else ArgosyError("the step failed")


def _failed() -> Overloaded:
    return Overloaded(
        "the engine has failed, and takes no more",
        retry_after_s=_RETRY_STOPPING_S,
        hint="start the server again",
    )


def _revoked() -> Revoked:
    return Revoked("the key was revoked")
