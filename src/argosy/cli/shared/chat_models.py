"""The model behind a chat: loaded in this process, or running on a server.

    Models.open, switch, again  ─>  ChatModel: LocalModel, or server_model.ServerModel  ─ answer ─>  AnswerWriter, Reply

Both answer the same conversation with the same text, and can continue an answer from its tokens.

Elsewhere: the conversation is `cli/commands/chat.py`; `server_model.py` gets a server's answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

from argosy.cli.shared.answer_writer import AnswerWriter
from argosy.cli.shared.interrupts import Interrupts
from argosy.cli.shared.options import adapter_of, open_engine, settings_of, thinking_of
from argosy.cli.shared.output import ledger_lines, parameter_count, prompt_shown
from argosy.cli.shared.server_model import Reply, find_model
from argosy.cli.shared.settings import Settings
from argosy.config import format_bytes
from argosy.errors import ArgosyError, UsageError

if TYPE_CHECKING:
    from argosy.config import Preset, SamplingDefaults, SamplingParams
    from argosy.engine.engine import Engine
    from argosy.media.parts import Hearing, Kind
    from argosy.prompt.prompt import Prompt
    from argosy.prompt.thinking import Thinking

_KEPT_BYTES = 8 << 20  # for the tokens of earlier answers, 1.4 KB each


class ChatModel(Protocol):
    """A model that answers conversations.

    Attributes:
        name: as the user gave it.
        variables: the variables of its chat template that control thinking.
        sampling: its defaults.
    """

    name: str

    @property
    def context_tokens(self) -> int: ...

    @property
    def media_kinds(self) -> Sequence[Kind]: ...

    @property
    def hears(self) -> Hearing: ...

    @property
    def takes_calls(self) -> bool: ...

    @property
    def variables(self) -> frozenset[str]: ...

    @property
    def sampling(self) -> SamplingDefaults: ...

    def facts(self) -> list[str]:
        """Facts about the model for people."""
        ...

    def media_fault(self, kind: Kind) -> str | None:
        """Why it does not take a kind of media, if known."""
        ...

    def shortfall(self, thinking: Thinking) -> str | None:
        """A sentence about the part of `thinking` that the model cannot honour, or None."""
        ...

    def count(self, messages: Sequence[dict[str, Any]], thinking: Thinking) -> int:
        """The number of tokens in a conversation, without the opening of an answer."""
        ...

    def answer(
        self,
        messages: Sequence[dict[str, Any]],
        params: SamplingParams,
        writer: AnswerWriter,
        *,
        thinking: Thinking,
        begun: Sequence[int] = (),
        interrupts: Interrupts,
    ) -> Reply:
        """Show the answer to a conversation, until ^C.

        Args:
            begun: the answer's first tokens, which were already shown.

        Raises:
            PromptTooLong: there is no room for an answer.   ArgosyError: the answer failed.
        """
        ...

    def use_lines(self) -> list[str]:
        """Lines about its use of time and memory so far."""
        ...


class LocalModel:
    """A model in this process."""

    def __init__(
        self, engine: Engine, name: str = "", preset: Preset | None = None, adapter: str | None = None
    ) -> None:
        from argosy.prompt.replay import ReplayMemory

        self.name = name
        self._preset, self._adapter = preset, adapter
        self._engine = engine
        # As in a server, an answer keeps its tokens, so the prefix cache finds them in the next turn.
        self._prompts = engine.prompts.remembering(ReplayMemory(max_bytes=_KEPT_BYTES))

    @property
    def context_tokens(self) -> int:
        return self._engine.plan.context_tokens

    @property
    def media_kinds(self) -> Sequence[Kind]:
        return self._engine.media.kinds

    @property
    def hears(self) -> Hearing:
        return self._engine.media.hears

    @property
    def takes_calls(self) -> bool:
        return self._prompts.tool_calling != "none"

    @property
    def variables(self) -> frozenset[str]:
        return self._prompts.variables

    @property
    def sampling(self) -> SamplingDefaults:
        sampling, preset = self._engine.sampling, self._preset
        return sampling if preset is None else sampling.overridden(preset.sampling)

    def facts(self) -> list[str]:
        from argosy.checkpoint.geometry import count_parameters

        engine = self._engine
        return [
            f"{parameter_count(count_parameters(engine.config)[0])} parameters",
            f"context of {engine.plan.context_tokens:,} tokens",
            f"{format_bytes(engine.plan.total_bytes)} of memory planned",
        ]

    def media_fault(self, kind: Kind) -> str | None:
        fault = self._engine.media.faults.get(kind)
        return None if fault is None else fault.message

    def shortfall(self, thinking: Thinking) -> str | None:
        return thinking_of(self._preset, thinking).shortfall(self.variables)

    def count(self, messages: Sequence[dict[str, Any]], thinking: Thinking) -> int:
        prompt = self._build(messages, thinking, add_generation_prompt=False, is_counted=True)
        return len(prompt.token_ids or ())

    def _build(self, messages: Sequence[dict[str, Any]], thinking: Thinking, **options: Any) -> Prompt:
        variables = thinking_of(self._preset, thinking).variables(self.variables)
        if self._preset is not None:
            messages = [dict(one) for one in self._preset.with_messages(messages)]
        return self._prompts.build(messages, variables=variables, tenant="", **options)

    def answer(
        self,
        messages: Sequence[dict[str, Any]],
        params: SamplingParams,
        writer: AnswerWriter,
        *,
        thinking: Thinking,
        begun: Sequence[int] = (),
        interrupts: Interrupts,
    ) -> Reply:
        engine, prompts = self._engine, self._prompts
        conversation = self._build(messages, thinking)
        params = params if self._preset is None else self._preset.fill_in(params)
        parser = prompts.parser(conversation)
        prompt = conversation.answered_by(begun)
        writer.begin(parser, prompt_shown(engine), said=prompts.begun(prompt, parser) if begun else ())
        token_ids = list(begun)
        interrupts.on_first = writer.say_stopping
        sequence = engine.submit(prompt, params, adapter=self._adapter)
        try:
            with writer:
                while sequence.result is None and not interrupts.count:
                    engine.step()
                    while sequence.events:
                        event = sequence.events.popleft()
                        token_ids.append(event.token_id)
                        writer.push(event)
        finally:
            engine.cancel(sequence)
        assert sequence.result is not None  # finished or just cancelled
        result = sequence.result.require()
        if result.finish_reason != "cancelled":
            prompts.remember("", conversation, token_ids, writer.answer)
        return Reply(result.finish_reason, token_ids, result.seed, result.usage, result.ledger)

    def use_lines(self) -> list[str]:
        return ["since the start", *ledger_lines(self._engine.ledger, self._engine.plan)]


@dataclass(slots=True)
class Models:
    """Opens one model at a time, because the budget has room for only one.

    Attributes:
        url, no_server, is_quiet: for `find_model`.
    """

    settings: Settings
    url: str | None
    no_server: bool
    is_quiet: bool
    _opened: ExitStack
    _model: ChatModel | None = None

    @classmethod
    @contextmanager
    def opening(
        cls, settings: Settings, url: str | None, *, no_server: bool, is_quiet: bool
    ) -> Iterator[Self]:
        with ExitStack() as opened:
            yield cls(settings, url, no_server, is_quiet, opened)

    def open(self, name: str) -> ChatModel:
        """Open a model on the server, or here."""
        self._model = self._at_server(name) or self._here(name)
        return self._model

    def again(self) -> ChatModel:
        """Find the model again after its server was lost.

        Raises:
            ArgosyError: the given server does not answer, or the model cannot be opened here.
        """
        assert self._model is not None
        return self.open(self._model.name)

    def switch(self, name: str) -> tuple[ChatModel, ArgosyError | None]:
        """Close the model and open another. Returns the model to go on with and, if it is not the requested one,
        why.

        Raises:
            ArgosyError: neither model can be opened.
        """
        from argosy.open.models import locate_model, open_files

        before, settings = self._model, self.settings
        assert before is not None
        try:
            if (found := self._at_server(name)) is None:
                open_files(locate_model(name))
        except (ArgosyError, KeyboardInterrupt) as error:
            return before, _why_not(name, error)
        self._model = found
        self._opened.close()
        if found is not None:
            return found, None
        self.settings = {**settings, "mmproj": None}  # it belonged to the first model
        try:
            self._model = self._here(name)
            return self._model, None
        except (ArgosyError, KeyboardInterrupt) as error:
            self.settings = settings
            return self.open(before.name), _why_not(name, error)

    def _at_server(self, name: str) -> ChatModel | None:
        found = find_model(name, self.url, no_server=self.no_server, is_quiet=self.is_quiet)
        return None if found is None else found.loaded()

    def _here(self, name: str) -> LocalModel:
        from argosy.library.names import preset_of

        model, adapter = adapter_of(name, self.settings)
        preset = preset_of(model)
        engine = self._opened.enter_context(open_engine(model, settings_of(preset, self.settings)))
        return LocalModel(engine, name, preset, adapter)


def _why_not(name: str, error: ArgosyError | KeyboardInterrupt) -> ArgosyError:
    return error if isinstance(error, ArgosyError) else UsageError(f"{name} was not opened")
