"""Requests and answers in a form common to all dialects; a dialect only renames fields.

    dialect  ->  ChatRequest or TextRequest  ->  Service.open  ->  Answers: Progress, Said, Ended  ->  dialect

Prompts are rendered and requests checked in threads that all callers share fairly (`http/work.py`), answers are stored
for replay in other threads, and steps run in the engine's own thread, so the event loop never waits. No answer keeps
the event loop for longer than a turn, however many of its tokens are ready. Cancelling an `Answers` before its end
makes the engine free its sequences before the next step.

Elsewhere: the path from a dialect's handler to here is `respond.py`; routes and errors are `app.py` and
`serve/http/gate.py`; the engine's thread is `engine/loop.py`.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import json
import sys
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, Protocol, Self, TypeVar, cast

from argosy.budget.memory_plan import MemoryPlan
from argosy.config import Grammar, Preset, SamplingDefaults, SamplingParams
from argosy.engine.ledger import DecodeSteps
from argosy.engine.loop import AnswerEnd, AnswerToken, Event, LoopFacts, PromptProgress
from argosy.engine.sequence import Result, TokenLogprob
from argosy.errors import ArgosyError, PromptTooLong, UsageError
from argosy.forecast.verification import Verification
from argosy.guard.view import Shown
from argosy.media.parts import Content, Hearing, Kind
from argosy.media.transcript import Transcript, TranscriptOptions
from argosy.observe.live import LiveCache
from argosy.prompt.formats.events import Event as SaidEvent
from argosy.prompt.formats.events import ToolCallBegin, ToolCallEnd, collect
from argosy.prompt.infill import Snippet
from argosy.prompt.messages import require_few_values
from argosy.prompt.prompt import Prompt
from argosy.prompt.thinking import Thinking, ThinkingSwitch, switch_of
from argosy.serve.admin.answer_metrics import AnswerWatch, Operation
from argosy.serve.answer.fields import PromptTokens, ReadOfPrompt, ignored_header
from argosy.serve.answer.kept_items import KeptItems
from argosy.serve.answer.media_hosts import FilesWanted, MediaHosts
from argosy.serve.answer.media_parts import Intake
from argosy.serve.answer.replaced import Replaced
from argosy.serve.answer.tool_use import ToolChoice, ToolUse
from argosy.serve.http.gate import Caller, Refused
from argosy.serve.http.work import LARGE_JOB_S, WorkQueue, give_memory_back

if TYPE_CHECKING:
    from starlette.requests import Request

    from argosy.engine.media.ears import Report, Transcriber
    from argosy.prompt.builder import PromptBuilder
    from argosy.prompt.formats import Parser
    from argosy.prompt.reranking import Reranking
    from argosy.prompt.tokenizer import Tokenizer
    from argosy.serve.guards.screening import ScreenedAnswer, Screening

P = ParamSpec("P")
T = TypeVar("T")

_TURN_S = 0.001  # after this time, an answer whose tokens are ready yields to others

MediaTokens = Literal["image_tokens", "audio_tokens"]
_MEDIA_TOKENS: Mapping[Kind, MediaTokens] = {
    "picture": "image_tokens",
    "video": "image_tokens",
    "sound": "audio_tokens",
}

Finish = Literal["stop", "length", "tool_calls", "content_filter"]
ANY_EARS = "whisper-1"  # the name that clients of OpenAI send
MOST_UNREAD = 4096  # events waiting for the client, per request; some MB with log-probabilities
_USER_FIELDS = ("safety_identifier", "user")  # name the person behind a request
_SCREENED_AT_ONCE = 64  # steps, if so many have arrived


class Loop(Protocol):
    """The part of `EngineLoop` that the server uses."""

    def submit(
        self, prompt: Prompt, params: SamplingParams | None, on_event: Callable[[Event], None], *,
        num_answers: int = 1, tenant: str = "", name: str = "",
    ) -> Any: ...  # fmt: skip

    def submit_embedding(
        self,
        text: str | Sequence[int],
        on_event: Callable[[Event], None],
        *,
        tenant: str = "",
        name: str = "",
    ) -> Any: ...

    def cancel(self, request: Any) -> None: ...

    def revoke(self, tenant: str) -> None: ...

    def erase(self, tenant: str) -> None: ...

    def resize(self, budget_bytes: int) -> MemoryPlan: ...

    def snapshot(self) -> LoopFacts: ...

    def close(self) -> None: ...


Compare = Callable[[DecodeSteps], Verification]  # puts predictions beside recent decode steps


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """Facts about the model that clients can see.

    preset: names the model's id, and fills in what requests do not say; None: this is the model under its own name.
    """

    id: str
    family: str
    context_tokens: int
    num_layers: int
    num_experts: int
    experts_per_token: int
    vocab_size: int
    num_parameters: int = 0
    weight_bytes: int = 0
    media_kinds: tuple[Kind, ...] = ()  # media that a prompt may contain
    hears: Hearing = "none"  # how a sound in a prompt is treated
    hidden_size: int = 0  # dimensions of an embedding
    fingerprint: str = ""  # says which model it is, as `checkpoint/fingerprint.py` does
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)  # for requests that do not say
    created: int = field(default_factory=lambda: int(time.time()))
    preset: Preset | None = None

    def under(self, preset: Preset) -> ModelFacts:
        """The same model under the name of one of its presets."""
        context_tokens = min(self.context_tokens, preset.context or self.context_tokens)
        sampling = self.sampling.overridden(preset.sampling, f"the preset {preset.name}")
        return replace(self, id=preset.name, context_tokens=context_tokens, sampling=sampling, preset=preset)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRequest:
    """A text, or token ids, to be continued.

    suffix: the text after the gap that the model fills after `prompt`, which is a text; None: there is no gap.
    snippets: parts of other files, for the model to read before it fills the gap; None: if it cannot fill gaps, it
        continues a prompt whose suffix is empty.
    reserved_tokens: room that snippets leave for the answer.
    num_left_out: how many of the first snippets were left out already.
    ignored: names of fields that were given and have no effect.
    """

    prompt: str | Sequence[int]
    params: SamplingParams
    suffix: str | None = None
    snippets: Sequence[Snippet] | None = None
    reserved_tokens: int = 0
    num_left_out: int = 0
    num_answers: int = 1
    ignored: Sequence[str] = ()

    def shown(self, decode: Callable[[Sequence[int]], str]) -> Shown:
        """What the model gets from it."""
        prompt = self.prompt if isinstance(self.prompt, str) else decode(self.prompt)
        after = () if self.suffix is None else (self.suffix,)
        others = (text for one in self.snippets or () for text in (one.file or "", one.text))
        return Shown(texts=[prompt, *after, *others], grammar=self.params.grammar)

    def with_shown(self, given: Shown, made: Shown) -> TextRequest:
        """The request as the policy made it from `given`.

        Raises:
            UsageError: its prompt has values to replace, and is token ids.
        """
        prompt, *others = made.texts
        if not isinstance(self.prompt, str):
            if prompt != given.texts[0]:
                raise UsageError(
                    "the policy of this server replaces values in the prompt, and this one is token ids",
                    param="prompt", hint="send the prompt as text",
                )  # fmt: skip
            return replace(self, params=replace(self.params, grammar=made.grammar))
        suffix = None if self.suffix is None else others.pop(0)
        snippets = None
        if self.snippets is not None:
            snippets = [
                Snippet(text, file or None) for file, text in zip(others[::2], others[1::2], strict=True)
            ]
        params = replace(self.params, grammar=made.grammar)
        return replace(self, prompt=prompt, suffix=suffix, snippets=snippets, params=params)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """A conversation to be answered.

    form: form of an answer without tool calls; None allows any form.
    effort: reasoning effort, if the model's template supports it.
    effort_field: name of the field that asks for the effort.
    thinks: whether the model thinks at all; None leaves that to `effort`.
    thinks_fields: names of the fields that switch thinking.
    continues: whether the answer continues a last message of the assistant; otherwise it is a turn of its own.
    begun_ids: tokens that the answer begins with; the rest comes as if it had not been cut.
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
    continues: bool = True
    begun_ids: Sequence[int] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    num_answers: int = 1
    replaced: Replaced = field(default_factory=Replaced)
    ignored: Sequence[str] = ()

    def shown(self) -> Shown:
        """What the model gets from it. The names in `tool_choice` are names of its tools."""
        return Shown(messages=self.messages, tools=self.tools, variables=self.variables, grammar=self.form)

    def with_shown(self, made: Shown) -> ChatRequest:
        """The request as the policy made it."""
        return replace(
            self, messages=made.messages, tools=made.tools, variables=made.variables, form=made.grammar
        )


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
    """The output of one token: events, sampled text and, if requested, its log-probability.

    token_ids: the token, or those that the answer began with; empty where a policy may change the answer.
    """

    answer: int
    events: tuple[SaidEvent, ...]
    text: str
    logprob: TokenLogprob | None
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of one answer."""

    answer: int
    finish: Finish
    result: Result


Step = Progress | Said | Ended


class Work:
    """The threads for the work before the engines. All models of a server share them: the memory plan counts one long
    text at a time."""

    def __init__(self) -> None:
        self._small = WorkQueue()
        self._large = WorkQueue(num_threads=1, is_large=True)
        self._video = WorkQueue(num_threads=1, is_large=True)  # pictures do not wait for a film
        self.ears = WorkQueue(num_threads=1, job_s=LARGE_JOB_S)  # the transcriber takes one sound at a time

    @property
    def has_stopped(self) -> bool:
        """Whether work waits for a thread that does not come."""
        return any(queue.has_stopped for queue in (self._small, self._large, self._video, self.ears))

    async def run(self, caller: Caller, call: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        """Run the work before the engine in a thread. Raises what `call` raises.

        Raises:
            TooMany: too much work of this caller is already waiting.
        """
        queue = self._large if caller.takes_long else self._small
        if caller.takes_video:
            queue = self._video
        return await queue.run(caller.tenant, caller.work, partial(call, *args, **named))


def service_of(request: Request) -> Service:
    """The service of the model that a request's body names, or else of the first one.

    The model of a body is in memory before its handler runs, if the body needs it. A handler without a body calls
    `models.use_model`, or asks `models_of` for what is known of models that may not be in memory.
    """
    service: Service = request.state.service
    return service


class Service:
    """One model, for all dialects, or one of its presets.

    Args:
        work: threads for the work before the engine; None: its own.
        recent_cache: tells the hit rate of the last minutes; None: nothing is recorded, or every expert is resident.
        compare: None: nothing is predicted.
    """

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
        work: Work | None = None,
        media_hosts: MediaHosts | None = None,
        ears: Transcriber | None = None,
        reranking: Reranking | None = None,
        recent_cache: LiveCache | None = None,
        compare: Compare | None = None,
    ) -> None:
        self.loop = loop
        self.recent_cache, self.compare = recent_cache, compare
        self.kept = KeptItems() if kept is None else kept
        self.prompts = prompts
        self.tokenizer = tokenizer
        self.model = model
        self.keep_billing_line = keep_billing_line
        self.ears = ears
        self.reranking = reranking
        self.any_model = any_model
        self._media_hosts = media_hosts
        self.work = Work() if work is None else work
        self._digests = _digests(model, tokenizer)

    def under(self, preset: Preset) -> Self:
        """The service for a request that names a preset: it shares everything with this one except its facts."""
        made = copy.copy(self)
        made.model = self.model.under(preset)
        made._digests = {**self._digests, "preset_sha256": preset.digest}
        return made

    @property
    def has_stopped(self) -> bool:
        """Whether requests wait for a thread that does not come."""
        hosts = self._media_hosts
        return self.work.has_stopped or (hosts is not None and hosts.has_stopped)

    def resize(self, budget_bytes: int) -> None:
        """Give the engine another memory budget (`Engine.resize`); clients see the context that is left."""
        plan = self.loop.resize(budget_bytes)
        self.model = replace(self.model, context_tokens=plan.context_tokens)
        if self.reranking is not None:
            self.reranking.context_tokens = plan.context_tokens
        if self.recent_cache is not None:
            self.recent_cache.num_slots = plan.usual_slots

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
            raise no_ears()
        if name not in (None, self.ears_id, ANY_EARS) and not self.any_model:
            raise Refused(
                404,
                f"the model {json.dumps(name)} does not transcribe; this server has: {self.ears_id}",
                hint=f"{ANY_EARS} also names it; `argosy serve --any-model` accepts every model name",
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
        caller.answered_by(self.ears_id)

        def transcribe() -> Transcript:
            try:
                return caller.work(partial(ears.transcribe, content, options, report=report))
            finally:
                give_memory_back()

        return await self.work.ears.run(caller.tenant, transcribe)

    @property
    def thinking(self) -> ThinkingSwitch:
        """What its template lets a caller choose about thinking."""
        return switch_of(self.prompts.variables)

    def intake(self, caller: Caller) -> Intake:
        """Create the intake for the pictures and sounds of a caller's request."""
        files = None if self._media_hosts is None else caller.files
        return Intake(self.model.media_kinds, caller.share, files=files)

    async def run(self, caller: Caller, call: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        """Run the work before the engine in a thread. Raises what `call` raises.

        Raises:
            TooMany: too much work of this caller is already waiting.
        """
        return await self.work.run(caller, call, *args, **named)

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
        caller.answered_by(self.model.id, self._digests)
        answers = Answers(self, caller, asyncio.get_running_loop())
        screening = caller.screening

        def begin(read: Read) -> dict[str, str]:
            with _holding_media(caller):
                request = self._filled_in(read())
                caller.files.require_all()
                if screening is not None:
                    request, _ = self._screened(request, screening, caller)
                    if not screening.policy.watermark:
                        request = replace(request, params=replace(request.params, watermark=False))
                prompt, params, use, num_left_out = self._prepared(request, caller)
                params = self._within_context(prompt, params)
                caller.go_on()  # it may have ended while its prompt was made
                answers.add(prompt, params, use, request.num_answers)
                return self._headers(request, num_left_out)

        try:
            if screening is not None and screening.asks_about_input:
                for read in reads:  # read twice: what is asked takes long, and a prompt may have pictures
                    asked = partial(self._asked_texts, read, caller, screening)
                    await screening.require_allowed(await self.run_reading(caller, asked))
            found = [await self.run_reading(caller, partial(begin, read)) for read in reads]
        except BaseException:
            answers.cancel()
            raise
        return answers, found[0]

    def _asked_texts(self, read: Read, caller: Caller, screening: Screening) -> list[str]:
        with _holding_media(caller):
            request = self._filled_in(read())
            caller.files.require_all()
            return self._screened(request, screening, caller, counts=False)[1]

    def _filled_in(self, request: ChatRequest | TextRequest) -> ChatRequest | TextRequest:
        """The request with the preset's values where it does not say; a policy checks those as well."""
        preset = self.model.preset
        if preset is None:
            return request
        params = preset.fill_in(request.params)
        if isinstance(request, TextRequest):
            return replace(request, params=params)
        request = replace(request, params=params, messages=preset.with_messages(request.messages))
        thinking = Thinking(thinks=preset.thinks, effort=preset.effort)
        is_silent = request.thinks is None and request.effort is None
        if is_silent and thinking.variables(self.prompts.variables):
            return replace(request, thinks=thinking.thinks, effort=thinking.effort)
        return request

    def _within_context(self, prompt: Prompt, params: SamplingParams) -> SamplingParams:
        """Sampling parameters that keep an answer within the preset's context.

        Raises:
            PromptTooLong: the prompt leaves no room for it.
        """
        if self.model.preset is None or self.model.preset.context is None:
            return params
        num_tokens, available = len(prompt.token_ids or ()), self.model.context_tokens
        least = max(1, params.min_tokens)
        if num_tokens + least > available:
            refusal = PromptTooLong.of(num_tokens, available, for_answer=least)
            refusal.hint = "shorten the prompt, or use the model under its own name"
            raise refusal
        left = available - num_tokens
        return replace(params, max_tokens=left if params.max_tokens is None else min(left, params.max_tokens))

    def _screened(
        self, request: ChatRequest | TextRequest, screening: Screening, caller: Caller, *, counts: bool = True
    ) -> tuple[ChatRequest | TextRequest, list[str]]:
        """Check a request; return what the model gets, and the texts of it for checks that ask somebody.

        Raises:
            Blocked: the policy does not allow a text.
            UsageError: the request cannot be checked: it asks for log-probabilities of what may be held back, or its
                prompt has values to replace and is token ids.
        """
        screen, params = screening.screen, request.params
        if screening.policy.changes_answers and (
            params.logprobs is not None or params.prompt_logprobs is not None
        ):
            raise UsageError(
                "log-probabilities would show text before it is checked, which the policy of this server does",
                param="logprobs", hint="leave them out",
            )  # fmt: skip
        # They are counted and may be blocked, so they are not without effect.
        ignored = [name for name in request.ignored if name not in _USER_FIELDS]
        if screening.policy.checks_requests:
            if isinstance(request, ChatRequest):
                require_few_values(request.messages)  # the view parses the arguments of calls
            request = self._near(self._heard(request, caller))
        if isinstance(request, ChatRequest):
            shown = request.shown()
            if request.begun_ids:
                shown = replace(shown, texts=[self._decode(request.begun_ids)])
            made, texts = screen.check(shown, counts=counts)
            if list(made.texts) != list(shown.texts):
                raise UsageError(
                    "the policy of this server replaces values in the beginning of the answer, which is token ids",
                    param="continue_token_ids", hint="send it as a last message of the assistant",
                )  # fmt: skip
            caller.share.hold(sum(map(sys.getsizeof, texts)))  # the copy that the prompt is built of
            return replace(request.with_shown(made), ignored=ignored), texts
        given = request.shown(self._decode)
        made, texts = screen.check(given, counts=counts)
        return replace(request.with_shown(given, made), ignored=ignored), texts

    def _heard(self, request: ChatRequest | TextRequest, caller: Caller) -> ChatRequest | TextRequest:
        """The request with the transcripts of sounds that the model gets as text."""
        if not isinstance(request, ChatRequest) or self.model.hears != "transcript":
            return request
        heard = self.prompts.with_transcripts(request.messages, tenant=caller.tenant, check=caller.go_on)
        return replace(request, messages=heard)

    def _near(self, request: ChatRequest | TextRequest) -> ChatRequest | TextRequest:
        """The request without snippets that cannot fit: its texts are searched, which takes longer than counting them.

        Raises:
            PromptTooLong: the rest cannot fit.
        """
        if isinstance(request, ChatRequest):
            self.prompts.require_near(request.shown().all_texts())
            return request
        texts = request.prompt if isinstance(request.prompt, str) else "", request.suffix or ""
        self.prompts.require_near(texts)
        if request.snippets is None:
            return request
        kept = self.prompts.near_snippets(request.snippets)
        return replace(request, snippets=kept, num_left_out=len(request.snippets) - len(kept))

    def _decode(self, token_ids: Sequence[int]) -> str:
        return "" if self.tokenizer is None else self.tokenizer.decode(token_ids, keep_special=True)

    async def screened_texts(
        self, texts: Sequence[str | Sequence[int]], caller: Caller, *, cuts: bool = False
    ) -> list[str | Sequence[int]]:
        """Check texts that a model gets and does not answer; return what it gets. Raises what `open` raises.

        Args:
            cuts: of a text that is too long, the model gets the beginning.
        """
        screening = caller.screening
        if screening is None:
            return list(texts)

        def check() -> list[tuple[ChatRequest | TextRequest, list[str]]]:
            given = (self.prompts.near_start(one) if cuts and isinstance(one, str) else one for one in texts)
            made = (TextRequest(prompt=one, params=SamplingParams()) for one in given)
            return [self._screened(one, screening, caller) for one in made]

        checked = await self.run(caller, check)
        if screening.asks_about_input:
            await screening.require_allowed([text for _, asked in checked for text in asked])
        return [request.prompt for request, _ in checked if isinstance(request, TextRequest)]

    async def count_tokens(
        self, read: Callable[[], ChatRequest], caller: Caller
    ) -> tuple[int, dict[MediaTokens, int]]:
        """Count the prompt tokens of a conversation, and those of pictures and sounds. Raises what `open` raises."""
        token_ids, of_media = await self.tokenize(read, caller)
        return len(token_ids), of_media

    async def tokenize(
        self, read: Callable[[], ChatRequest], caller: Caller, *, opens_answer: bool = True
    ) -> tuple[Sequence[int], dict[MediaTokens, int]]:
        """The prompt tokens of a conversation, and how many pictures and sounds have. Raises what `open` raises.

        Args:
            opens_answer: with the opening of an answer.
        """

        def count() -> tuple[Sequence[int], dict[MediaTokens, int]]:
            with _holding_media(caller):
                request = self._filled_in(read())
                assert isinstance(request, ChatRequest)
                caller.files.require_all()
                use = _tool_use(request)
                prompt = self._build(request, use, caller, is_counted=True, opens_answer=opens_answer)
                return prompt.token_ids or (), media_tokens([prompt])

        return await self.run_reading(caller, count)

    def revoke(self, tenant: str) -> None:
        """End all requests of a revoked tenant and delete all of its data."""
        self.loop.revoke(tenant)
        self.prompts.forget(tenant)
        self.kept.forget(tenant)

    def erase(self, tenant: str) -> int:
        """End the running requests of a tenant, and delete what is kept of it here; it may send more requests.

        Returns:
            The number of answers that were kept for replay. Prefixes go before the engine's next step.
        """
        self.loop.erase(tenant)
        return self.prompts.forget(tenant)

    def _build(
        self,
        request: ChatRequest,
        use: ToolUse,
        caller: Caller,
        *,
        is_counted: bool = False,
        opens_answer: bool = True,
    ) -> Prompt:
        return self.prompts.build(
            request.messages, tools=use.told, variables=self._variables(request), tenant=caller.tenant,
            add_generation_prompt=opens_answer, continues=request.continues, is_counted=is_counted,
            replace_damaged=request.replaced.replace_damaged, check=caller.go_on,
        )  # fmt: skip

    def _prepared(
        self, request: ChatRequest | TextRequest, caller: Caller
    ) -> tuple[Prompt, SamplingParams, ToolUse, int]:
        """The prompt, its parameters and tools, and the number of snippets that were left out."""
        params = request.params
        if isinstance(request, TextRequest):
            text, suffix, snippets = request.prompt, request.suffix, request.snippets
            # Editors send an empty suffix at the end of a file, whatever the model.
            fills = suffix or (suffix is not None and (snippets is not None or self.prompts.can_infill))
            if isinstance(text, str) and suffix is not None and fills:
                filling = self.prompts.infill(
                    text, suffix, snippets=snippets or (), reserved_tokens=request.reserved_tokens
                )
                stops = (*params.stop_token_ids, *filling.end_ids)
                num_left_out = request.num_left_out + filling.num_left_out
                return filling.prompt, replace(params, stop_token_ids=stops), ToolUse(), num_left_out
            prompt = self.prompts.build(Prompt.raw(text) if isinstance(text, str) else list(text))
            return prompt, params, ToolUse(), 0
        use = _tool_use(request)
        prompt = self._build(request, use, caller)
        grammar = self.prompts.grammar(
            prompt, use.callable, must_call=use.must_call, parallel=use.parallel, form=request.form
        )
        if request.begun_ids:
            prompt = self.prompts.build(prompt.answered_by(request.begun_ids))  # checks the ids
        return prompt, params if grammar is None else replace(params, grammar=grammar), use, 0

    def _headers(self, request: ChatRequest | TextRequest, num_left_out: int) -> dict[str, str]:
        """Headers that name the fields without effect and count the replaced blocks of a request."""
        if isinstance(request, TextRequest):
            return ignored_header([*request.ignored, *(f"input_extra.{at}" for at in range(num_left_out))])
        ignored = list(request.ignored)
        known = self.prompts.variables
        if request.effort is not None and not Thinking(effort=request.effort).variables(known):
            ignored.append(request.effort_field)
        if request.thinks is not None and not Thinking(thinks=request.thinks).variables(known):
            ignored += request.thinks_fields
        return ignored_header(ignored) | request.replaced.header()

    def _variables(self, request: ChatRequest) -> dict[str, Any]:
        asked = Thinking(thinks=request.thinks, effort=request.effort)
        return asked.variables(self.prompts.variables) | dict(request.variables)


def _digests(model: ModelFacts, tokenizer: Tokenizer | None) -> dict[str, str]:
    """SHA-256 of what decides the answers of a model, as far as it is known."""
    found = {"model_sha256": model.fingerprint} if model.fingerprint else {}
    if tokenizer is not None and tokenizer.chat_template is not None:
        found["template_sha256"] = hashlib.sha256(tokenizer.chat_template.encode()).hexdigest()
    return found


def no_ears() -> Refused:
    """The refusal of a server that cannot transcribe."""
    return Refused(
        404,
        "this server does not transcribe sounds",
        hint="start it with ears: `argosy serve --ears tiny.en`",
    )


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
        self.num_prompt_tokens = 0  # over all prompts, as the following
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
        self._is_left = False  # what is still queued for it ends at once
        self._screened: list[ScreenedAnswer] = []  # all answers, if there is a policy
        self._begun_ids: tuple[int, ...] = ()  # that every answer began with
        self._begun: list[Step] = []  # and what they said

    @property
    def tells_token_ids(self) -> bool:
        """Whether the client may know the tokens: not if a policy may hold back or change what they say."""
        screening = self._caller.screening
        return screening is None or not screening.policy.changes_answers

    def add(self, prompt: Prompt, params: SamplingParams, use: ToolUse, num_answers: int) -> None:
        """Queue a prompt in the engine; only the one prompt of a conversation has tools.

        Any thread may call this, before `steps` is called. Raises what `EngineLoop.submit` raises.
        """
        first, is_parsed = len(self.results), prompt.text and prompt.trace is not None
        for _ in range(num_answers):
            self._parsers.append(self._service.prompts.parser(prompt, use.callable) if is_parsed else None)
            self._said.append([])
            self.results.append(None)
            if self._caller.screening is not None and self._caller.screening.policy.checks_answers:
                self._screened.append(self._caller.screening.answer())
        self.prompts.append(prompt)
        self._num_cached[first] = 0
        self._use = use
        caller, model = self._caller, self._service.model.id
        watches: list[AnswerWatch] = []
        if caller.metrics is not None:
            operation: Operation = "text_completion" if prompt.trace is None else "chat"
            watches = [caller.metrics.watch(model, operation, caller.began) for _ in range(num_answers)]

        def deliver(event: Event) -> None:
            if isinstance(event, AnswerToken):  # counted here, because the client may be gone
                caller.count(new=1)
                if watches:
                    watches[event.answer].token()
            elif isinstance(event, AnswerEnd):
                caller.finishes.append(event.result.finish_reason)
                caller.num_marked_tokens += event.result.num_marked
                if watches:
                    watches[event.answer].end(event.result)
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
            prompt, params, deliver, num_answers=num_answers, tenant=caller.tenant, name=caller.request_id
        )
        self._requests.append(request)
        self._num_open += num_answers
        if self._is_left:  # while a thread was queueing this prompt
            self._service.loop.cancel(request)
        if prompt.num_answered:
            self._begun_ids = (prompt.token_ids or ())[-prompt.num_answered :]
            keeps_special = not params.skip_special_tokens
            for number in range(first, first + num_answers):
                parser = self._parsers[number]
                assert parser is not None
                said = self._keep(
                    number, self._service.prompts.begun(prompt, parser, keep_special=keeps_special)
                )
                told = self._begun_ids if self.tells_token_ids else ()
                self._begun.append(Said(number, tuple(said), "", None, told))
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
        """End the answers that have not ended, and those that a thread is still queueing."""
        self._is_left = True
        for request in self._requests if self._num_open else ():
            self._service.loop.cancel(request)

    async def steps(self) -> AsyncGenerator[Step, None]:
        """Yield every step until the last answer has ended, as far as the key's policy lets it pass.

        Raises:
            ArgosyError: an answer cannot be finished.
        """
        screening = self._caller.screening
        async with aclosing(self._own_steps()) as steps:
            if not self._screened or screening is None:
                async for step in steps:
                    yield step
                return
            waiting: list[Step] = []
            async for step in steps:
                waiting.append(step)
                if self._arrived and len(waiting) < _SCREENED_AT_ONCE and not isinstance(step, Ended):
                    continue
                passed = [made for one in _joined(waiting) for made in await self._screen(one)]
                for made in passed if screening.policy.changes_answers else waiting:
                    yield made
                waiting = []

    async def _screen(self, step: Step) -> list[Step]:
        """Return the parts of a step that the checks let pass."""
        if isinstance(step, Progress):
            return [step]
        screened, number = self._screened[step.answer], step.answer
        made: list[Step] = []
        events: list[SaidEvent] = []
        is_end, text = isinstance(step, Ended), ""
        if self._parsers[number] is None:
            text = await screened.take_text("" if isinstance(step, Ended) else step.text, is_end=is_end)
        elif isinstance(step, Ended):
            events = await screened.finish()
        else:
            events = await screened.take(step.events)
        if events or text:
            made.append(Said(number, tuple(events), text, None))
        if isinstance(step, Ended):
            return [*made, replace(step, finish="content_filter") if screened.is_blocked else step]
        if screened.is_blocked and all(
            result is not None or other.is_blocked
            for result, other in zip(self.results, self._screened, strict=True)
        ):
            self.cancel()
        return made

    async def _own_steps(self) -> AsyncGenerator[Step, None]:
        for begun in self._begun:
            yield begun
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
        is_blocked = bool(self._screened) and self._screened[end.answer].is_blocked
        if self._parsers[end.answer] is not None and not is_blocked:
            tenant, token_ids, said = (
                self._caller.tenant,
                [*self._begun_ids, *end.result.token_ids],
                collect(self._said[end.answer]),
            )
            remember = self._service.prompts.remember
            await asyncio.to_thread(
                self._caller.work, partial(remember, tenant, self.prompts[0], token_ids, said, self._use.told)
            )

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
                told = (token.token_id,) if self.tells_token_ids else ()
                return [Said(answer, tuple(said), token.text, token.logprob, told)]
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
        if self._screened and self._screened[answer].is_blocked:
            return [Ended(answer, "content_filter", result)]
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


def _joined(steps: Sequence[Step]) -> Iterator[Step]:
    """The steps, with what one answer said in steps that follow each other joined, so that it is checked at once."""
    last: Said | None = None
    for step in steps:
        if isinstance(step, Said) and last is not None and last.answer == step.answer:
            last = Said(step.answer, (*last.events, *step.events), last.text + step.text, None)
            continue
        if last is not None:
            yield last
        last = step if isinstance(step, Said) else None
        if last is None:
            yield step
    if last is not None:
        yield last
