"""Requests and answers in a form common to all dialects; a dialect only renames fields.

    dialect  ->  ChatRequest or TextRequest  ->  Service.open  ->  Answers: Progress, Said, Ended  ->  dialect

Prompts are rendered and requests checked in threads that all callers share fairly (`work.py`), answers are stored for
replay in other threads, and steps run in the engine's own thread, so the event loop never waits. No answer keeps the
event loop for longer than a turn, however many of its tokens are ready. Cancelling an `Answers` before its end makes
the engine free its sequences before the next step.

Elsewhere: the path from a dialect's handler to here is `respond.py`; routes and errors are `app.py` and `gate.py`; the
engine's thread is `engine/loop.py`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, Protocol, TypeVar, cast

from argosy.config import Grammar, SamplingParams
from argosy.engine.loop import AnswerEnd, AnswerToken, Event, LoopFacts, PromptProgress
from argosy.engine.sequence import Result, TokenLogprob
from argosy.errors import ArgosyError
from argosy.media.parts import Content, Hearing, Kind
from argosy.media.transcript import Transcript, TranscriptOptions
from argosy.prompt.formats.events import Event as SaidEvent
from argosy.prompt.formats.events import ToolCallBegin, ToolCallEnd, collect
from argosy.prompt.prompt import Prompt
from argosy.serve.fields import PromptTokens, ReadOfPrompt, ignored_header
from argosy.serve.gate import Caller, Refused
from argosy.serve.kept_items import KeptItems
from argosy.serve.media_hosts import FilesWanted, MediaHosts
from argosy.serve.media_parts import Intake
from argosy.serve.replaced import Replaced
from argosy.serve.tool_use import ToolChoice, ToolUse
from argosy.serve.work import WorkQueue, give_memory_back

if TYPE_CHECKING:
    from argosy.engine.ears import Report, Transcriber
    from argosy.prompt.builder import PromptBuilder
    from argosy.prompt.formats import Parser
    from argosy.prompt.tokenizer import Tokenizer

P = ParamSpec("P")
T = TypeVar("T")

_TURN_S = 0.001  # after this time, an answer whose tokens are ready yields to others

MediaTokens = Literal["image_tokens", "audio_tokens"]
_MEDIA_TOKENS: Mapping[Kind, MediaTokens] = {
    "picture": "image_tokens",
    "video": "image_tokens",
    "sound": "audio_tokens",
}

Finish = Literal["stop", "length", "tool_calls"]
ANY_EARS = "whisper-1"  # the name that clients of OpenAI send
MOST_UNREAD = 4096  # events waiting for the client, per request; some MB with log-probabilities


class Loop(Protocol):
    """The part of `EngineLoop` that the server uses."""

    def submit(
        self, prompt: Prompt, params: SamplingParams | None, on_event: Callable[[Event], None], *,
        num_answers: int = 1, tenant: str = "",
    ) -> Any: ...  # fmt: skip

    def cancel(self, request: Any) -> None: ...

    def revoke(self, tenant: str) -> None: ...

    def snapshot(self) -> LoopFacts: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """Facts about the model that clients can see."""

    id: str
    family: str
    context_tokens: int
    num_layers: int
    num_experts: int
    experts_per_token: int
    vocab_size: int
    media_kinds: tuple[Kind, ...] = ()  # what a prompt may have beside text
    hears: Hearing = "none"  # what becomes of a sound in a prompt
    created: int = field(default_factory=lambda: int(time.time()))


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRequest:
    """A text, or token ids, to be continued.

    ignored: names of fields that were given and have no effect.
    """

    prompt: str | Sequence[int]
    params: SamplingParams
    num_answers: int = 1
    ignored: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """A conversation to be answered.

    form: form of an answer without tool calls; None allows any form.
    effort: reasoning effort, if the model's template supports it.
    effort_field: name of the field that asks for the effort.
    thinks: whether the model thinks at all; None leaves that to `effort`.
    thinks_fields: names of the fields that switch thinking.
    replaced: notes in the messages that replace blocks that the model cannot read.
    ignored: names of fields that were given and have no effect, whatever the model.
    """

    messages: Sequence[Mapping[str, Any]]
    params: SamplingParams
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: ToolChoice = field(default_factory=ToolChoice)
    parallel: bool = True
    form: Grammar | None = None
    effort: str | None = None
    effort_field: str = "reasoning_effort"
    thinks: bool | None = None
    thinks_fields: Sequence[str] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    num_answers: int = 1
    replaced: Replaced = field(default_factory=Replaced)
    ignored: Sequence[str] = ()


Read = Callable[[], ChatRequest | TextRequest]


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of the prefill: see `PromptProgress`."""

    processed: int
    total: int
    cached: int
    encoded: float | None

    def as_dict(self) -> ReadOfPrompt:
        """The form for OpenAI's dialects, with llama.cpp's field names."""
        made: ReadOfPrompt = {"processed": self.processed, "total": self.total, "cache": self.cached}
        return made if self.encoded is None else {**made, "encoded": round(self.encoded, 3)}


@dataclass(frozen=True, slots=True)
class Said:
    """The output of one token: events, sampled text and, if requested, its log-probability."""

    answer: int
    events: tuple[SaidEvent, ...]
    text: str
    logprob: TokenLogprob | None


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of one answer."""

    answer: int
    finish: Finish
    result: Result


Step = Progress | Said | Ended


class Service:
    """One model, for all dialects."""

    def __init__(
        self,
        loop: Loop,
        prompts: PromptBuilder,
        tokenizer: Tokenizer | None,
        model: ModelFacts,
        *,
        keep_billing_line: bool = False,
        kept: KeptItems | None = None,
        any_model: bool = False,
        media_hosts: MediaHosts | None = None,
        ears: Transcriber | None = None,
    ) -> None:
        self.loop = loop
        self.kept = KeptItems() if kept is None else kept
        self.prompts = prompts
        self.tokenizer = tokenizer
        self.model = model
        self.is_draining = False
        self.keep_billing_line = keep_billing_line
        self.ears = ears
        self._any_model = any_model
        self._media_hosts = media_hosts
        self._work = WorkQueue()
        self._large_work = WorkQueue(num_threads=1, is_large=True)
        self._video_work = WorkQueue(num_threads=1, is_large=True)  # pictures do not wait for a film
        self._ears_work = WorkQueue(num_threads=1)  # the transcriber takes one sound at a time

    def require_model(self, name: str | None) -> None:
        """Check that a request names the served model; None leaves the choice to the server.

        Raises:
            Refused: the request names another model, and the server does not accept every name.
        """
        if name not in (None, self.model.id) and not self._any_model:
            raise Refused(
                404,
                f"the model {json.dumps(name)} does not exist; this server has: {self.model.id}",
                hint="`argosy serve --any-model` accepts every model name",
                param="model",
                code="model_not_found",
            )

    @property
    def ears_id(self) -> str:
        """The name under which clients ask for transcripts."""
        return "" if self.ears is None else self.ears.name

    def require_ears(self, name: str | None = None) -> None:
        """Check that this server transcribes, and that a request names its model for that.

        Raises:
            Refused: it does not, or the request names another model.
        """
        if self.ears is None:
            raise Refused(
                404,
                "this server does not transcribe sounds",
                hint="start it with ears: `argosy serve --ears tiny.en`",
            )
        if name not in (None, self.ears_id, ANY_EARS) and not self._any_model:
            raise Refused(
                404,
                f"the model {json.dumps(name)} does not transcribe; this server has: {self.ears_id}",
                hint=f"{ANY_EARS} names it, too; `argosy serve --any-model` accepts every model name",
                param="model",
                code="model_not_found",
            )

    async def transcribe(
        self, caller: Caller, content: Content, options: TranscriptOptions, report: Report
    ) -> Transcript:
        """Transcribe a sound in a thread, beside the steps of the model. Raises what `Transcriber.transcribe` raises.

        Raises:
            TooMany: too many sounds of this caller are already waiting.
        """
        ears = self.ears
        assert ears is not None

        def transcribe() -> Transcript:
            try:
                return ears.transcribe(content, options, report=report)
            finally:
                give_memory_back()

        return await self._ears_work.run(caller.tenant, transcribe)

    @property
    def has_efforts(self) -> bool:
        """Whether the model's template supports a reasoning effort."""
        return bool(self._effort("medium"))

    def intake(self, caller: Caller) -> Intake:
        """What takes the pictures and sounds of a caller's request."""
        files = None if self._media_hosts is None else caller.files
        return Intake(self.model.media_kinds, caller.share, files=files)

    async def run(self, caller: Caller, call: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        """Run the work before the engine in a thread. Raises what `call` raises.

        Raises:
            TooMany: too much work of this caller is already waiting.
        """
        work = self._large_work if caller.takes_long else self._work
        if caller.takes_video:
            work = self._video_work
        return await work.run(caller.tenant, call, *args, **named)

    async def run_reading(self, caller: Caller, call: Callable[[], T]) -> T:
        """Run a call that reads a request. If it needs files from other hosts, fetch them, and run the call again.

        Raises what `call` and `MediaHosts.fetch` raise.
        """
        held_before = caller.share.num_bytes
        try:
            while True:
                try:
                    return await self.run(caller, call)
                except FilesWanted:
                    assert self._media_hosts is not None
                    await self._media_hosts.fetch(caller.files, caller.share, caller.tenant)
        finally:
            caller.files.clear()
            caller.share.shrink(held_before)

    async def open(self, reads: Sequence[Read], caller: Caller) -> tuple[Answers, dict[str, str]]:
        """Read, render, check and queue the prompts of a request.

        All of this is one job for each prompt, because each job waits for a thread behind jobs of other keys.

        Returns:
            The answers, and headers that tell how the first prompt was read.

        Raises:
            ArgosyError: what `run`, `reads`, `PromptBuilder.build` or `EngineLoop.submit` raised. Nothing of the
                request is left running.
        """
        answers = Answers(self, caller, asyncio.get_running_loop())

        def begin(read: Read) -> dict[str, str]:
            with _holding_media(caller):
                request = read()
                caller.files.require_all()
                answers.add(*self._prepared(request, caller.tenant), request.num_answers)
                return self._headers(request)

        try:
            found = [await self.run_reading(caller, partial(begin, read)) for read in reads]
        except BaseException:
            answers.cancel()
            raise
        return answers, found[0]

    async def count_tokens(
        self, read: Callable[[], ChatRequest], caller: Caller
    ) -> tuple[int, dict[MediaTokens, int]]:
        """Count the prompt tokens of a conversation, and those of pictures and sounds. Raises what `open` raises."""

        def count() -> tuple[int, dict[MediaTokens, int]]:
            with _holding_media(caller):
                request = read()
                caller.files.require_all()
                prompt = self._build(request, _tool_use(request), caller.tenant, is_counted=True)
                return len(prompt.token_ids or ()), media_tokens([prompt])

        return await self.run_reading(caller, count)

    def revoke(self, tenant: str) -> None:
        """End all requests of a revoked tenant and delete all of its data."""
        self.loop.revoke(tenant)
        self.prompts.forget(tenant)
        self.kept.forget(tenant)

    def _build(self, request: ChatRequest, use: ToolUse, tenant: str, *, is_counted: bool = False) -> Prompt:
        return self.prompts.build(
            request.messages, tools=use.told, variables=self._variables(request), tenant=tenant, is_counted=is_counted,
            replace_damaged=request.replaced.replace_damaged,
        )  # fmt: skip

    def _prepared(
        self, request: ChatRequest | TextRequest, tenant: str
    ) -> tuple[Prompt, SamplingParams, ToolUse]:
        params = request.params
        if isinstance(request, TextRequest):
            text = request.prompt
            prompt = self.prompts.build(Prompt.raw(text) if isinstance(text, str) else list(text))
            return prompt, params, ToolUse()
        use = _tool_use(request)
        prompt = self._build(request, use, tenant)
        grammar = self.prompts.grammar(
            prompt, use.callable, must_call=use.must_call, parallel=use.parallel, form=request.form
        )
        return prompt, params if grammar is None else replace(params, grammar=grammar), use

    def _headers(self, request: ChatRequest | TextRequest) -> dict[str, str]:
        """Headers that name the fields without effect and count the replaced blocks of a request."""
        if isinstance(request, TextRequest):
            return ignored_header(request.ignored)
        ignored = list(request.ignored)
        if request.effort is not None and not self._effort(request.effort):
            ignored.append(request.effort_field)
        if request.thinks is not None and not self._switches(request.thinks):
            ignored += request.thinks_fields
        return ignored_header(ignored) | request.replaced.header()

    def _variables(self, request: ChatRequest) -> dict[str, Any]:
        return self._effort(request.effort) | self._switches(request.thinks) | dict(request.variables)

    def _effort(self, effort: str | None) -> dict[str, Any]:
        """The template variables for `effort`; empty if the template has none."""
        if effort is None:
            return {}
        is_known = "reasoning_effort" in self.prompts.variables
        said = {"reasoning_effort": effort} if is_known and effort != "none" else {}
        return self._switches(effort != "none") | said

    def _switches(self, thinks: bool | None) -> dict[str, Any]:
        """The template variables that switch thinking; empty if the template has none."""
        if thinks is None:
            return {}
        known = self.prompts.variables
        return {name: thinks for name in ("enable_thinking", "thinking") if name in known}


def media_tokens(prompts: Iterable[Prompt]) -> dict[MediaTokens, int]:
    """Tokens of pictures and of sounds in prompts, by OpenAI's name for them; nothing for kinds that none has."""
    counts: Counter[MediaTokens] = Counter()
    for prompt in prompts:
        for _, span in prompt.spans:
            counts[_MEDIA_TOKENS[span.kind]] += span.num_positions
    return dict(counts)


@contextmanager
def _holding_media(caller: Caller) -> Iterator[None]:
    """Give back what decoded pictures and sounds are charged; the prompt that is built inside keeps none of them."""
    held_before = caller.share.num_bytes
    try:
        yield
    finally:
        caller.share.shrink(held_before)


def _tool_use(request: ChatRequest) -> ToolUse:
    return ToolUse.of(request.tools, request.tool_choice, parallel=request.parallel)


class ReadTooSlowly(ArgosyError):
    """A client reads its answer too slowly to keep the rest for it."""

    http_status = 408


class Answers:
    """The answers of one request, as they are made, numbered from 0 in the order of their prompts.

    At most MOST_UNREAD events for each prompt may wait for the client; with more, the request ends.

    Attributes:
        results: for each answer, None until its end.
    """

    def __init__(self, service: Service, caller: Caller, events: asyncio.AbstractEventLoop) -> None:
        self.prompts: list[Prompt] = []
        self.results: list[Result | None] = []
        self.num_prompt_tokens = 0  # of all prompts, as the following
        self.num_new_tokens = 0
        self.num_reasoning_tokens = 0
        self._service, self._caller, self._events = service, caller, events
        self._requests: list[Any] = []
        self._num_cached: dict[int, int] = {}  # by first answer
        self._parsers: list[Parser | None] = []
        self._said: list[list[SaidEvent]] = []
        self._num_open = 0
        self._use = ToolUse()
        self._arrived: deque[Event] = deque()
        self._some = asyncio.Event()
        self._is_woken = False  # the event loop will look, so it needs no second signal
        self._is_behind = False

    def add(self, prompt: Prompt, params: SamplingParams, use: ToolUse, num_answers: int) -> None:
        """Queue a prompt in the engine; only the one prompt of a conversation has tools.

        Any thread may call this, before `steps` is called. Raises what `EngineLoop.submit` raises.
        """
        first, is_parsed = len(self.results), prompt.text and prompt.trace is not None
        for _ in range(num_answers):
            self._parsers.append(self._service.prompts.parser(prompt, use.callable) if is_parsed else None)
            self._said.append([])
            self.results.append(None)
        self.prompts.append(prompt)
        self._num_cached[first] = 0
        self._use = use

        def deliver(event: Event) -> None:
            if isinstance(event, AnswerToken):  # counted here, because the client may be gone
                self._caller.count(new=1)
            if not self._is_behind and len(self._arrived) >= MOST_UNREAD * len(self.prompts):
                self._is_behind = True
                self._events.call_soon_threadsafe(self.cancel)
            if self._is_behind and not isinstance(event, AnswerEnd):
                return
            self._arrived.append(event if first == 0 else replace(event, answer=first + event.answer))
            if not self._is_woken:
                self._is_woken = True
                self._events.call_soon_threadsafe(self._some.set)

        request = self._service.loop.submit(
            prompt, params, deliver, num_answers=num_answers, tenant=self._caller.tenant
        )
        self._requests.append(request)
        self._num_open += num_answers
        num_tokens = len(prompt.token_ids or ())
        self.num_prompt_tokens += num_tokens
        self._caller.count(prompt=num_tokens)

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens found in the prefix cache."""
        return sum(self._num_cached.values())

    def prompt_tokens(self) -> PromptTokens:
        """The parts of the prompt's tokens, as OpenAI's dialects tell them."""
        return cast(PromptTokens, {"cached_tokens": self.num_cached_tokens, **media_tokens(self.prompts)})

    def cancel(self) -> None:
        """End the answers that have not ended."""
        for request in self._requests if self._num_open else ():
            self._service.loop.cancel(request)

    async def steps(self) -> AsyncGenerator[Step, None]:
        """Yield every step until the last answer has ended.

        Raises:
            ArgosyError: an answer cannot be finished.
        """
        turn_began = time.monotonic()
        while self._num_open:
            if not self._arrived:
                await self._wait()
                turn_began = time.monotonic()
            elif time.monotonic() - turn_began > _TURN_S:
                await asyncio.sleep(0)
                turn_began = time.monotonic()
            event = self._arrived.popleft()
            steps = self._step(event)
            if isinstance(event, AnswerEnd):
                await self._remember(event)
            for step in steps:
                yield step

    async def _wait(self) -> None:
        """Wait for the next event."""
        while True:
            self._some.clear()
            self._is_woken = False
            if self._arrived:  # checked last: an event after this check wakes us
                return
            await self._some.wait()

    async def _remember(self, end: AnswerEnd) -> None:
        """Store the answer before its end is sent, so the next turn finds it; in a thread, as all of it is read."""
        if self._parsers[end.answer] is not None:
            tenant, token_ids, said = (
                self._caller.tenant,
                end.result.token_ids,
                collect(self._said[end.answer]),
            )
            remember = self._service.prompts.remember
            await asyncio.to_thread(remember, tenant, self.prompts[0], token_ids, said, self._use.told)

    def _step(self, event: Event) -> list[Step]:
        match event:
            case PromptProgress():
                if event.answer not in self._num_cached:
                    return []
                self._num_cached[event.answer] = event.cached
                return [Progress(event.processed, event.total, event.cached, event.encoded)]
            case AnswerToken(answer=answer, event=token):
                if self.results[answer] is not None:
                    return []
                self.num_new_tokens += 1
                said = self._parse(answer, token.token_id, token.text)
                return [Said(answer, tuple(said), token.text, token.logprob)]
            case AnswerEnd(answer=answer, result=result):
                return self._end(answer, result)

    def _parse(self, answer: int, token_id: int, text: str) -> list[SaidEvent]:
        parser = self._parsers[answer]
        if parser is None:
            return []
        was_reasoning = parser.is_reasoning
        events = parser.push(token_id, text)
        self.num_reasoning_tokens += was_reasoning or parser.is_reasoning
        return self._keep(answer, events)

    def _keep(self, answer: int, events: list[SaidEvent]) -> list[SaidEvent]:
        if not self._use.parallel:
            # The grammar does not cover a call that began inside thoughts, or a call after it.
            events = [event for event in events if not getattr(event, "index", 0)]
        self._said[answer] += events
        return events

    def _end(self, answer: int, result: Result) -> list[Step]:
        self._num_open -= 1
        self.results[answer] = result
        if result.error is not None:
            raise result.error
        if self._is_behind:
            raise ReadTooSlowly(
                f"the client read the answer too slowly: more than {MOST_UNREAD} events waited",
                hint="read faster, or request fewer answers and no log-probabilities",
            )
        if result.finish_reason == "cancelled":
            raise ArgosyError("the answer was cancelled")
        steps: list[Step] = []
        is_cut, parser = result.finish_reason == "length", self._parsers[answer]
        if parser is not None and (last := self._keep(answer, parser.finish(is_cut=is_cut))):
            steps.append(Said(answer, tuple(last), "", None))
        finish: Finish = "length" if is_cut else "stop"
        num_begun, num_whole = (
            sum(isinstance(event, kind) for event in self._said[answer])
            for kind in (ToolCallBegin, ToolCallEnd)
        )
        if num_whole == num_begun > 0:
            finish = "tool_calls"
        return [*steps, Ended(answer, finish, result)]
