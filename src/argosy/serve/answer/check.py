"""What happens to the texts of a request on their way to a model and back: a hook that everything passes unchanged.

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
    """A request as the model gets it, and its texts for checks that ask somebody."""

    request: ModelRequest
    texts: Sequence[str] = ()


class Check(Watch):
    """What happens to the texts of one request on their way to a model and back; here everything passes.

    changes_answers: it may hold back or change what an answer says.
    asks: it asks somebody about the request before a prompt is made.
    """

    changes_answers = False
    asks = False

    def before(
        self, request: ModelRequest, service: Service, caller: Caller, *, counts: bool = True
    ) -> Checked:
        """Check a request, in a worker thread. It may be read and checked again.

        Args:
            counts: note what is found.

        Raises:
            ArgosyError: the request is refused.
        """
        return Checked(request)

    async def require_allowed(self, texts: Sequence[str]) -> None:
        """Ask about the texts of a request. Raises ArgosyError if it is refused."""

    async def passed(
        self, texts: Sequence[Text], service: Service, caller: Caller, *, cuts: bool = False
    ) -> Sequence[Text]:
        """Check texts that a model gets and does not answer; return what it gets. Raises what `Opening.answers` raises.

        Args:
            cuts: of a text that is too long, the model gets the beginning.
        """
        return texts

    def restored(self, text: str) -> str:
        """A text that the model got, as the client sent it."""
        return text

    def during(self, answers: Answers) -> AsyncGenerator[Step, None]:
        """The steps of the answers that may be sent."""
        return answers.own_steps()


_PASS = Check()


def check_of(caller: Caller) -> Check:
    """The check of a request's texts."""
    return next((watch for watch in caller.watches if isinstance(watch, Check)), _PASS)
