"""The hook for a request's texts on their way to a model and back; this base class passes everything unchanged.

    `opening.py`: Check.before -> Check.require_allowed -> prompt -> engine -> Check.during  ->  dialect

Elsewhere: other hooks are `serve/http/caller.py`; a server's policies are `serve/guards/screening.py`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import NamedTuple

from argosy.serve.answer.answers import Answers, Step
from argosy.serve.answer.request import ModelRequest
from argosy.serve.answer.service import Service
from argosy.serve.http.caller import Caller, Watch

Text = str | Sequence[int]


class Checked(NamedTuple):
    """A request as the model gets it, and the texts that a model or server still has to check."""

    request: ModelRequest
    texts: Sequence[str] = ()


class Check(Watch):
    """Checks the texts of one request on their way to a model and back; here everything passes.

    changes_answers: it may withhold or change an answer's text.
    asks: it asks a model or a server about the request before a prompt is made.
    """

    changes_answers = False
    asks = False

    def before(
        self, request: ModelRequest, service: Service, caller: Caller, *, counts: bool = True
    ) -> Checked:
        """Check a request in a worker thread. It may be read and checked again.

        Args:
            counts: record the findings.

        Raises:
            ArgosyError: the request is refused.
        """
        return Checked(request)

    async def require_allowed(self, texts: Sequence[str]) -> None:
        """Ask about a request's texts. Raises ArgosyError if it is refused."""

    async def passed(
        self, texts: Sequence[Text], service: Service, caller: Caller, *, cuts: bool = False
    ) -> Sequence[Text]:
        """Check texts that get no answer, such as those to embed; return what the model gets. Raises what
        `Opening.answers` raises.

        Args:
            cuts: cut a text that is too long to its beginning.
        """
        return texts

    def restored(self, text: str) -> str:
        """Restore a text that the model got to what the client sent."""
        return text

    def during(self, answers: Answers) -> AsyncGenerator[Step, None]:
        """Yield the steps of the answers that may be sent."""
        return answers.own_steps()


_PASS = Check()


def check_of(caller: Caller) -> Check:
    """The check of a request's texts."""
    return next((watch for watch in caller.watches if isinstance(watch, Check)), _PASS)
