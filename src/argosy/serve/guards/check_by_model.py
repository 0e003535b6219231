"""Ask a model on this server whether a text is allowed.

    Question  ─ a form of `guard/guard_models.py` ─>  a conversation  ─ the model's template ─>  answer  ->  Verdict

The question runs like any request of the same key, so nothing is shared between tenants. Its tokens are not
counted, unless the key itself requests the verdict (`serve/guards/moderations.py`). The model is loaded if it is
not in memory, like any model of the server.

Elsewhere: `checks.py` calls this, within the check's time limit.
"""

from __future__ import annotations

from contextlib import ExitStack, aclosing

from argosy.config import SamplingParams
from argosy.guard.guard_models import GUARD_FORMS, Question
from argosy.guard.keys import Key
from argosy.guard.policy import ModelCheck
from argosy.guard.verdict import Verdict
from argosy.prompt.formats.events import TextDelta
from argosy.serve.answer.answers import Said
from argosy.serve.answer.opening import Opening
from argosy.serve.answer.request import ChatRequest
from argosy.serve.guards.checks import CountTokens
from argosy.serve.http.caller import Caller
from argosy.serve.http.running import Running
from argosy.serve.models.models import Models


class ModelJudge:
    """Asks the models of a server."""

    def __init__(self, models: Models, running: Running) -> None:
        self._models, self._running = models, running

    async def __call__(
        self, check: ModelCheck, question: Question, key: Key | None, count: CountTokens | None
    ) -> Verdict:
        """Return a model's verdict on a text.

        Args:
            count: counts the tokens of the question and its answer for the key; None: they are not counted.

        Raises:
            CheckFailed: the answer cannot be parsed.
            ArgosyError: the model cannot be loaded, or has no room for the question.
        """
        form = GUARD_FORMS[check.form]
        request = ChatRequest(
            messages=form.messages(question, check.policy),
            params=SamplingParams(max_tokens=form.max_tokens, temperature=0.0),
            continues=False,
        )
        with ExitStack() as until:
            caller = Caller(key=key, uses=(self._models.id_of(check.model),), running=self._running)
            caller.go_on()
            service = await self._models.use(check.model, until)
            answers, _ = await Opening(service, caller).answers([lambda: request])
            said: list[str] = []
            try:
                async with aclosing(answers.steps()) as steps:
                    async for step in steps:
                        if isinstance(step, Said):
                            said += [event.text for event in step.events if isinstance(event, TextDelta)]
            finally:
                answers.cancel()
                if count is not None:
                    count(check.model, answers.num_prompt_tokens, answers.num_new_tokens)
        return form.read("".join(said))
