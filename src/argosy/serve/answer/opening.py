"""Turn a request into a prompt and queue it in its model's engine.

    dialect  ->  ChatRequest or TextRequest  ->  Opening.answers  ->  Answers: Progress, Said, Ended  ->  dialect

Prompts are rendered and requests checked in threads that all callers share fairly (`work.py`), and steps run in the
engine's own thread, so the event loop never waits.

Elsewhere: `respond.py` leads from a dialect's handler to here; requests are `request.py`; answers are `answers.py`;
a policy is a `Check` (`check.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from argosy.config import SamplingParams
from argosy.errors import PromptTooLong
from argosy.prompt.prompt import Prompt
from argosy.prompt.thinking import Thinking
from argosy.serve.answer.answers import Answers
from argosy.serve.answer.check import check_of
from argosy.serve.answer.fields import ignored_header
from argosy.serve.answer.request import (
    ChatRequest,
    MediaTokens,
    ModelRequest,
    Read,
    TextRequest,
    media_tokens,
)
from argosy.serve.answer.service import Service
from argosy.serve.answer.tool_use import ToolUse
from argosy.serve.http.caller import Caller


class Opening:
    """One request on its way into a model's engine."""

    def __init__(self, service: Service, caller: Caller) -> None:
        self._service, self._caller, self._check = service, caller, check_of(caller)

    async def answers(self, reads: Sequence[Read]) -> tuple[Answers, dict[str, str]]:
        """Read, render, check and queue the prompts of the request.

        Each prompt is a single job, because every job waits for a thread behind jobs of other keys.

        Returns:
            The answers, and headers that describe how the first prompt was read, and name an adapter without effect.

        Raises:
            ArgosyError: what `Service.run_reading`, `reads`, `Check.before`, `PromptBuilder.build` or
                `EngineLoop.submit` raised. Nothing of the request is left running.
        """
        service, caller, check = self._service, self._caller, self._check
        caller.answered_by(service.model.id, service.digests)
        answers = Answers(
            service.loop, service.prompts, caller, asyncio.get_running_loop(), during=check.during,
            tells_token_ids=not check.changes_answers, adapter=service.adapter,
        )  # fmt: skip
        try:
            for read in (
                reads if check.asks else ()
            ):  # read twice, because asking takes long and a prompt may contain pictures
                texts = partial(self._texts, read)
                await check.require_allowed(await service.run_reading(caller, texts))
            begins = [partial(self._begin, read, answers) for read in reads]
            found = [await service.run_reading(caller, begin) for begin in begins]
        except BaseException:
            answers.cancel()
            raise
        unused = {} if answers.unused_adapter is None else {"x-unused-adapter": answers.unused_adapter}
        return answers, found[0] | unused

    async def tokens(
        self, read: Callable[[], ChatRequest], *, opens_answer: bool = True
    ) -> tuple[Sequence[int], dict[MediaTokens, int]]:
        """The prompt tokens of a conversation, and how many of them are pictures and sounds. Raises what `answers`
        raises.

        Args:
            opens_answer: include the opening of an answer.
        """

        def count() -> tuple[Sequence[int], dict[MediaTokens, int]]:
            with _holding_media(self._caller):
                request = self._read(read)
                assert isinstance(request, ChatRequest)
                use = _tool_use(request)
                prompt = self._build(request, use, is_counted=True, opens_answer=opens_answer)
                return prompt.token_ids or (), media_tokens([prompt])

        return await self._service.run_reading(self._caller, count)

    def _begin(self, read: Read, answers: Answers) -> dict[str, str]:
        caller = self._caller
        with _holding_media(caller):
            request = self._check.before(self._read(read), self._service, caller).request
            prompt, params, use, num_left_out = self._prepared(request)
            params = self._within_context(prompt, params)
            caller.go_on()  # the request may have ended while its prompt was built
            answers.add(prompt, params, use, request.num_answers)
            return self._headers(request, num_left_out)

    def _texts(self, read: Read) -> Sequence[str]:
        with _holding_media(self._caller):
            return self._check.before(self._read(read), self._service, self._caller, counts=False).texts

    def _read(self, read: Read) -> ModelRequest:
        """Read the request with all files that it names and its preset's additions, which the policy also checks."""
        request = self._filled_in(read())
        self._caller.held.files.require_all()
        return request

    def _filled_in(self, request: ModelRequest) -> ModelRequest:
        """Fill in the preset's values for what the request leaves out."""
        preset = self._service.model.preset
        if preset is None:
            return request
        params = preset.fill_in(request.params)
        if isinstance(request, TextRequest):
            return replace(request, params=params)
        request = replace(request, params=params, messages=preset.with_messages(request.messages))
        thinking = Thinking(thinks=preset.thinks, effort=preset.effort)
        is_silent = request.thinks is None and request.effort is None
        if is_silent and thinking.variables(self._service.prompts.variables):
            return replace(request, thinks=thinking.thinks, effort=thinking.effort)
        return request

    def _within_context(self, prompt: Prompt, params: SamplingParams) -> SamplingParams:
        """Limit the sampling parameters so that the answer stays within the preset's context.

        Raises:
            PromptTooLong: the prompt leaves no room for it.
        """
        if self._service.model.preset is None or self._service.model.preset.context is None:
            return params
        num_tokens, available = len(prompt.token_ids or ()), self._service.model.context_tokens
        least = max(1, params.min_tokens)
        if num_tokens + least > available:
            refusal = PromptTooLong.of(num_tokens, available, for_answer=least)
            refusal.hint = "shorten the prompt, or use the model under its own name"
            raise refusal
        left = available - num_tokens
        return replace(params, max_tokens=left if params.max_tokens is None else min(left, params.max_tokens))

    def _build(
        self,
        request: ChatRequest,
        use: ToolUse,
        *,
        is_counted: bool = False,
        opens_answer: bool = True,
    ) -> Prompt:
        return self._service.prompts.build(
            request.messages, tools=use.told, variables=self._variables(request), tenant=self._caller.tenant,
            add_generation_prompt=opens_answer, continues=request.continues, is_counted=is_counted,
            replace_damaged=request.replaced.replace_damaged, check=self._caller.go_on,
        )  # fmt: skip

    def _prepared(self, request: ModelRequest) -> tuple[Prompt, SamplingParams, ToolUse, int]:
        """Build the prompt, its parameters and tools; return them and the number of snippets left out."""
        params = request.params
        if isinstance(request, TextRequest):
            text, suffix, snippets = request.prompt, request.suffix, request.snippets
            # Editors send an empty suffix at the end of a file, whether or not the model can fill in.
            fills = suffix or (
                suffix is not None and (snippets is not None or self._service.prompts.can_infill)
            )
            if isinstance(text, str) and suffix is not None and fills:
                filling = self._service.prompts.infill(
                    text, suffix, snippets=snippets or (), reserved_tokens=request.reserved_tokens
                )
                stops = (*params.stop_token_ids, *filling.end_ids)
                num_left_out = request.num_left_out + filling.num_left_out
                return filling.prompt, replace(params, stop_token_ids=stops), ToolUse(), num_left_out
            prompt = self._service.prompts.build(Prompt.raw(text) if isinstance(text, str) else list(text))
            return prompt, params, ToolUse(), 0
        use = _tool_use(request)
        prompt = self._build(request, use)
        grammar = self._service.prompts.grammar(
            prompt, use.callable, must_call=use.must_call, parallel=use.parallel, form=request.form
        )
        if request.begun_ids:
            prompt = self._service.prompts.build(prompt.answered_by(request.begun_ids))  # this checks the ids
        return prompt, params if grammar is None else replace(params, grammar=grammar), use, 0

    def _headers(self, request: ModelRequest, num_left_out: int) -> dict[str, str]:
        """Headers that name the fields without effect and count the replaced blocks of a request."""
        if isinstance(request, TextRequest):
            return ignored_header([*request.ignored, *(f"input_extra.{at}" for at in range(num_left_out))])
        ignored = list(request.ignored)
        known = self._service.prompts.variables
        if request.effort is not None and not Thinking(effort=request.effort).variables(known):
            ignored.append(request.effort_field)
        if request.thinks is not None and not Thinking(thinks=request.thinks).variables(known):
            ignored += request.thinks_fields
        return ignored_header(ignored) | request.replaced.header()

    def _variables(self, request: ChatRequest) -> dict[str, Any]:
        asked = Thinking(thinks=request.thinks, effort=request.effort)
        return asked.variables(self._service.prompts.variables) | dict(request.variables)


@contextmanager
def _holding_media(caller: Caller) -> Iterator[None]:
    """Release the memory charged for decoded pictures and sounds, which the prompt built inside does not keep."""
    held_before = caller.held.share.num_bytes
    try:
        yield
    finally:
        caller.held.share.shrink(held_before)


def _tool_use(request: ChatRequest) -> ToolUse:
    return ToolUse.of(request.tools, request.tool_choice, parallel=request.parallel)
