"""One model for all dialects: requests become prompts, and prompts are queued in its engine.

    dialect  ->  ChatRequest or TextRequest  ->  Service.open  ->  Answers: Progress, Said, Ended  ->  dialect

Prompts are rendered and requests checked in threads that all callers share fairly (`work.py`), and steps run in the
engine's own thread, so the event loop never waits.

Elsewhere: the path from a dialect's handler to here is `respond.py`; requests are `request.py`; answers are
`answers.py`; the engine's thread is `engine/loop.py`.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TypeVar

from argosy.config import Preset, SamplingParams
from argosy.engine.ledger import DecodeSteps
from argosy.engine.loop import EngineLoop
from argosy.errors import PromptTooLong, UsageError
from argosy.forecast.verification import Verification
from argosy.media.parts import Content
from argosy.media.transcript import Transcript, TranscriptOptions
from argosy.observe.live import LiveCache
from argosy.prompt.messages import require_few_values
from argosy.prompt.prompt import Prompt
from argosy.prompt.thinking import Thinking, ThinkingSwitch, switch_of
from argosy.serve.answer.answers import Answers
from argosy.serve.answer.facts import ModelFacts
from argosy.serve.answer.fields import ignored_header
from argosy.serve.answer.kept_items import KeptItems
from argosy.serve.answer.media_hosts import MediaHosts
from argosy.serve.answer.media_parts import Intake
from argosy.serve.answer.request import USER_FIELDS, ChatRequest, MediaTokens, Read, TextRequest, media_tokens
from argosy.serve.answer.tool_use import ToolUse
from argosy.serve.answer.work import Work
from argosy.serve.http.caller import Caller
from argosy.serve.http.failures import Refused
from argosy.serve.http.held import FilesWanted
from argosy.serve.http.work import give_memory_back

if TYPE_CHECKING:
    from starlette.requests import Request

    from argosy.engine.media.ears import Report, Transcriber
    from argosy.prompt.builder import PromptBuilder
    from argosy.prompt.reranking import Reranking
    from argosy.prompt.tokenizer import Tokenizer
    from argosy.serve.guards.screening import Screening

P = ParamSpec("P")
T = TypeVar("T")


ANY_EARS = "whisper-1"  # the name that clients of OpenAI send


Compare = Callable[[DecodeSteps], Verification]  # puts predictions beside recent decode steps


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
        loop: EngineLoop,
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
        answers = Answers(self.loop, self.prompts, self.model.id, caller, asyncio.get_running_loop())
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
        ignored = [name for name in request.ignored if name not in USER_FIELDS]
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
