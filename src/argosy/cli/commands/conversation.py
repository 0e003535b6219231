"""The turns of `argosy chat`: reading lines, answering, dropping, saving and loading."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from argosy.cli.commands import chat_files, chat_room
from argosy.cli.commands.chat_room import ContextPolicy, Message
from argosy.cli.shared.answer_writer import AnswerWriter
from argosy.cli.shared.chat_models import Models
from argosy.cli.shared.interrupts import Interrupts, SecondInterrupt
from argosy.cli.shared.output import ledger_lines, write_dim, write_text
from argosy.cli.shared.texts import text_or_file
from argosy.config import counted
from argosy.errors import ArgosyError, PromptTooLong, ServerNotUsable, UsageError

if TYPE_CHECKING:
    from argosy.cli.shared.chat_models import ChatModel
    from argosy.cli.shared.server_model import Reply
    from argosy.config import SamplingParams
    from argosy.media.parts import Content, Kind
    from argosy.prompt.thinking import Thinking

HELP = """/help          list the commands
/image FILE    show a picture with the next message
/audio FILE    let the model hear a sound with the next message
/video FILE    show a video with the next message
/system TEXT   set the system message; @FILE reads it from a file, "" removes it, no TEXT shows it
/think [WORD]  let the model think: on, off, low, medium or high; without a word, show what is set
/retry         answer the last message again
/continue      go on with an answer that was cut off or stopped
/trim [N]      drop the oldest turns until N tokens (or N%) of the context are free; without N, half of it
/tokens        show how many tokens the conversation has, and how many are left
/model NAME    go on with another model; no NAME shows the model
/save FILE     write the conversation as JSON
/load FILE     go on with a saved conversation
/reset         forget the conversation
/ledger        show the use of time and memory
/quit          quit; ^D does the same
A line that is only the path of a picture, sound or video also attaches it.
Alt-Enter, or a backslash at the end of a line, starts a new line. ^C stops an answer; pressed twice, it quits."""
_SUMMARY_SHARE = 8  # a summary takes at most an eighth of the context
_LEAST_SUMMARY = 16  # tokens


@dataclass(slots=True)
class _Begun:
    """The last answer, if it can be continued.

    message: the answer so far.
    tokens: its tokens and the seed for the rest. Without them, as after /load, it is continued from its text.
    """

    message: Message
    tokens: Sequence[int] = ()
    seed: int | None = None


class Conversation:
    """The turns of one chat; `talk` reads until the end of its input.

    Args:
        policy: what to do when the conversation no longer fits the context.
        is_quiet: facts about the model and its speed are not shown.
        thinking: whether the model should think; None leaves that to the model.
        models: opens another model, or reopens a lost one.
    """

    def __init__(
        self,
        model: ChatModel,
        params: SamplingParams,
        system: str | None = None,
        *,
        policy: ContextPolicy = "stop",
        is_quiet: bool = False,
        thinking: Thinking | None = None,
        shows_thoughts: bool = False,
        models: Models | None = None,
    ) -> None:
        from argosy.prompt.thinking import WORDS, Thinking

        self._model: ChatModel | None = model
        self._is_lost = False  # whether the model's server was lost
        self._params = params
        self._policy = policy
        self._is_quiet = is_quiet
        self._thinking = Thinking() if thinking is None else thinking
        self._not_thinking = WORDS["off"]
        self._models = models
        self._shows_thoughts = shows_thoughts
        self._start = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[Message] = list(self._start)
        self._attached: list[Content] = []  # media for the next message
        self._refused: Message | None = None  # a message that was refused
        self._begun: _Begun | None = None
        self._last: Reply | None = None
        self._kinds: Sequence[Kind] = model.media_kinds
        self._takes_calls = True  # checked when a conversation comes from elsewhere
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: say(HELP),
            "/image": lambda path: self._attach("image", path),
            "/audio": lambda path: self._attach("audio", path),
            "/video": lambda path: self._attach("video", path),
            "/system": self._set_system,
            "/think": self._set_thinking,
            "/retry": self._retry,
            "/continue": self._continue,
            "/trim": self._trim,
            "/tokens": self._count_tokens,
            "/model": self._change_model,
            "/save": self._save,
            "/load": self._load,
            "/reset": self._reset,
            "/ledger": self._show_ledger,
        }

    def talk(self, read: Callable[[], str]) -> None:
        """Answer each message from `read`, until it raises EOFError or returns /quit.

        Raises:
            KeyboardInterrupt: ^C twice, at the prompt or while an answer was being stopped.
        """
        self._introduce()
        self._note_thinking()
        say("/help lists the commands, ^D quits")
        is_leaving = False
        while True:
            try:
                said = read().strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                if is_leaving:
                    raise
                is_leaving = True
                say("press ^C again to quit")
                continue
            is_leaving = False
            if said.split(maxsplit=1)[:1] == ["/quit"]:
                return
            try:
                self._take(said)
            except ArgosyError as error:
                if self._model is None:
                    raise
                self._is_lost = self._is_lost or isinstance(error, ServerNotUsable)
                say(f"error: {error}")
            except KeyboardInterrupt as error:  # while a model loads or its server counts tokens
                if self._model is None or isinstance(error, SecondInterrupt):
                    raise
                say("(stopped)")

    def _find_again(self) -> None:
        """If the server did not answer, find the model again, on its server or here."""
        if not self._is_lost or self._models is None:
            return
        before, self._model = self._model, self._models.again()
        self._is_lost = False
        if type(self._model) is not type(before):
            if self._begun is not None:
                self._begun = _Begun(self._begun.message)  # the file may be a different one
            self._introduce()
        self._note_unreadable()

    def _take(self, said: str) -> None:
        """Run a command line, or answer a message."""
        if (dropped := _dropped(said)) is not None:
            self._attach(*dropped)
        elif said.startswith("/"):
            name, *rest = said.split(maxsplit=1)
            command = self._commands.get(name)
            if command is None:
                known = " ".join([*self._commands, "/quit"])
                raise UsageError(f"unknown command '{name}'; known: {known}")
            command("".join(rest))
        elif said:
            self._turn(said)

    @property
    def _open_model(self) -> ChatModel:
        assert self._model is not None  # None only while another model is being opened
        return self._model

    def _set_system(self, text: str) -> None:
        from argosy.library.names import preset_of

        if not text:
            preset = preset_of(self._open_model.name)
            of_preset = [preset.system] if preset is not None and preset.system else []
            found = [message["content"] for message in self._start] or of_preset
            say(*found or ["there is no system message"])
            return
        text = "" if text == '""' else text_or_file(text)
        turns = self.messages[len(self._start) :]
        self._start = [{"role": "system", "content": text}] if text else []
        self.messages = [*self._start, *turns]

    def _set_thinking(self, word: str) -> None:
        from argosy.prompt.thinking import WORDS

        if word:
            if word not in WORDS:
                raise UsageError(f"/think takes {', '.join(WORDS)}, found '{word}'")
            self._thinking = WORDS[word]
            if self._note_thinking():
                return
        said = next((name for name, one in WORDS.items() if one == self._thinking), "is left to the model")
        say(f"thinking {said}")

    def _note_thinking(self) -> bool:
        """Print a note if the model cannot think as it should; return whether there is one."""
        if (shortfall := self._open_model.shortfall(self._thinking)) is not None:
            say(f"note: {shortfall}")
        return shortfall is not None

    def _introduce(self) -> None:
        """Introduce the model and what it can do."""
        if self._is_quiet:
            return
        model = self._open_model
        sees = [f"{kind}s" for kind in ("picture", "video") if kind in self._kinds]
        able = [f"sees {' and '.join(sees)}"] if sees else []
        if "sound" in self._kinds:
            able.append("hears sound" if model.hears == "native" else "reads transcripts of sound")
        facts = [*model.facts(), " and ".join(able) or "text only"]
        say(f"{Path(model.name).name}: {', '.join(facts)}")

    def _reset(self, _: str) -> None:
        self.messages = list(self._start)
        self._attached.clear()
        self._refused = self._begun = None
        say("the conversation starts over")

    def _count(self, messages: Sequence[Message]) -> int:
        """The tokens of a conversation, without the opening of an answer."""
        self._find_again()
        return self._open_model.count(self._readable(messages), self._thinking) if messages else 0

    def _readable(self, messages: Sequence[Message]) -> list[Message]:
        """The conversation as this model can take it, with notes in place of what only earlier models took."""
        return chat_room.with_notes(messages, self._kinds, takes_calls=self._takes_calls)[0]

    def _count_tokens(self, _: str) -> None:
        used, context = self._count(self.messages), self._open_model.context_tokens
        say(f"tokens   {used} used, {max(0, context - used)} left of {context}")

    def _trim(self, wanted: str) -> None:
        """Drop the oldest turns, then answer a message that did not fit."""
        num_free = chat_room.wanted_tokens(wanted, self._open_model.context_tokens)
        refused, before = self._refused, self.messages
        if refused is not None:
            self.messages = [*before, refused]
        try:
            if not self._make_room(num_free):
                say(f"nothing is dropped: {self._usage()}, and the last turn stays")
        except BaseException:
            self.messages = before
            raise
        if refused is not None:
            self.messages, refused = self.messages[:-1], self.messages[-1]
            self._send(refused)

    def _make_room(self, num_free: int, *, num_begun: int = 0, summarises: bool = False) -> bool:
        """Drop the oldest turns until `num_free` tokens of the context are free, and say so.

        Args:
            num_begun: tokens of an answer that will follow.
            summarises: let the model summarise what is dropped.

        Returns:
            Whether any turn was dropped. The last one always stays; if it does not fit alone, nothing is dropped.
        """
        context = self._open_model.context_tokens
        num_dropped = chat_room.num_to_drop(self.messages, context - num_free - num_begun, self._count)
        kept = chat_room.without_oldest(self.messages, num_dropped)
        num_kept = self._count(kept)
        if not num_dropped or num_kept + num_begun >= context:
            return False
        num_tokens = self._count(self.messages) - num_kept
        what = f"{counted(num_dropped, 'turn')} ({num_tokens:,} tokens)"
        done = "dropped"
        if summarises:
            # Leave a quarter of the context for what follows.
            most_tokens = context * 3 // 4 - num_begun
            summary = self._summary(num_dropped, what, min(num_tokens, most_tokens - num_kept))
            start, turns = chat_room.split_turns(kept)
            summarised = [*start, *summary, *(message for turn in turns for message in turn)]
            if summary and self._count(summarised) <= most_tokens:
                kept, done = summarised, "summarised"
        self.messages = kept
        say(f"{done} {what} to make room: {self._usage()}")
        return True

    def _usage(self) -> str:
        return f"{self._count(self.messages):,} of {self._open_model.context_tokens:,} tokens are used"

    def _summary(self, num_turns: int, what: str, room_tokens: int) -> list[Message]:
        """A turn of at most `room_tokens` in which the model summarises the oldest turns; empty if it cannot.

        Raises:
            UsageError: ^C stopped it.
        """
        most_tokens = self._open_model.context_tokens // _SUMMARY_SHARE
        question = {"role": "user", "content": chat_room.summary_question(most_tokens)}
        most_tokens = min(most_tokens, room_tokens - self._count([question]))
        if most_tokens < _LEAST_SUMMARY:
            say("note: there is no room for a summary of what is dropped")
            return []
        say(f"summarising {what} to make room; ^C stops")
        try:
            asked = [*chat_room.oldest(self.messages, num_turns), question]
            writer = AnswerWriter(shows_text=False, shows_thoughts=False, most_tokens=most_tokens)
            params = replace(self._params, max_tokens=most_tokens)
            reply = self._ask(asked, params, writer, self._not_thinking)
        except PromptTooLong:
            say("note: the turns are too long to be summarised")
            return []
        if reply.fault is not None:
            raise reply.fault
        if reply.finish_reason == "cancelled":
            raise UsageError("the summary was stopped, so nothing was dropped")
        text = writer.answer.text.strip()
        if not text:
            say(f"note: the model wrote no summary in {most_tokens:,} tokens")
            return []
        write_dim(f"summary: {text}")
        return [question, {"role": "assistant", "content": text}]

    def _change_model(self, name: str) -> None:
        if name and self._models is not None:
            self._model = None  # if the switch fails, there is no model
            self._model, why = self._models.switch(name)
            if why is not None:
                raise why
            self._is_lost, self._last = False, None
            if self._begun is not None:
                self._begun = _Begun(self._begun.message)  # the vocabulary has changed
            self._note_unreadable()
            self._note_thinking()
        say(f"model    {self._open_model.name}")

    def _note_unreadable(self) -> None:
        """Report the parts of the conversation that this model does not take and for which it gets notes."""
        model = self._open_model
        self._kinds, self._takes_calls = model.media_kinds, model.takes_calls
        try:
            self._count(self.messages)
        except ArgosyError:
            # A model may see pictures while its chat template has no place for them.
            if chat_room.with_notes(self.messages, (), takes_calls=True)[1]:
                self._kinds = ()
        _, replaced = chat_room.with_notes(self.messages, self._kinds, takes_calls=self._takes_calls)
        for what in replaced:
            say(
                f"note: this model cannot take the {what} earlier in this conversation, and gets a note instead"
            )

    def _save(self, name: str) -> None:
        path = _path(name, "/save")
        chat_files.save(path, self.messages)
        say(f"{counted(len(self.messages), 'message')} saved in {path}")

    def _load(self, name: str) -> None:
        path = _path(name, "/load")
        self.messages = chat_files.load(path)
        self._start = [one for one in self.messages[:1] if one["role"] == "system"]
        self._attached.clear()
        self._refused = None
        last = self.messages[-1]
        self._begun = _Begun(last) if last["role"] == "assistant" else None
        self._note_unreadable()
        say(f"{counted(len(self.messages), 'message')} loaded from {path}")

    def _show_ledger(self, _: str) -> None:
        if self._last is not None:
            say("last answer", *ledger_lines(self._last.ledger, None, self._last.finish_reason))
        say(*self._open_model.use_lines())

    def _attach(self, kind: str, name: str) -> None:
        """Read a picture, sound or video now, so that the conversation does not depend on the file later."""
        from argosy.media.parts import PROMPT_LIMITS, Audio, Image, Video

        model = self._open_model
        part = {"image": Image, "audio": Audio, "video": Video}[kind](_path(name, f"/{kind}"))
        if part.kind not in self._kinds:
            raise UsageError(model.media_fault(part.kind) or f"this model does not take a {part.kind}")
        self._attached.append(part.read(PROMPT_LIMITS))
        is_read = part.kind == "sound" and model.hears == "transcript"
        how = "; the model does not hear it, but reads its transcript" if is_read else ""
        say(f"({part.kind} attached; it goes with your next message{how})")

    def _turn(self, said: str) -> None:
        content: object = said
        if self._attached:
            content = [*self._attached, {"type": "text", "text": said}]
        self._send({"role": "user", "content": content})

    def _retry(self, _: str) -> None:
        if self._refused is not None:
            self._send(self._refused)
            return
        turns = self.messages[len(self._start) :]
        while turns and turns[-1]["role"] == "assistant":
            turns.pop()
        if not turns:
            raise UsageError("there is no message to answer again")
        params = self._params.fill_in(self._open_model.sampling)
        if params.temperature == 0 or params.seed is not None:
            say("note: the same answer will come: `argosy chat -t 0.7` without --seed makes answers differ")
        before, self.messages = self.messages, [*self._start, *turns[:-1]]
        try:
            self._exchange(turns[-1])
        except BaseException:
            self.messages, self._refused = before, None
            raise

    def _continue(self, _: str) -> None:
        begun, before = self._begun, self.messages
        if begun is None:
            has_ended = before and before[-1]["role"] == "assistant"
            why = "the last answer ended by itself" if has_ended else "there is no answer"
            raise UsageError(f"{why}, so there is nothing to go on with")
        self.messages = before[:-1]
        try:
            self._reply(begun)
        except BaseException as error:
            self.messages = before
            if isinstance(error, PromptTooLong):
                error.hint = self._way_to_continue()
            raise

    def _send(self, message: Message) -> None:
        """Send a message with its attachments."""
        self._exchange(message)
        self._attached.clear()

    def _exchange(self, message: Message) -> None:
        """Send a message and keep it with its answer. A refused message waits for /trim or /retry."""
        before = self.messages
        self.messages, self._refused = [*before, message], None
        try:
            self._reply()
        except BaseException as error:
            self.messages = before
            if isinstance(error, ArgosyError):
                self._refused = message
            if isinstance(error, PromptTooLong):
                error.hint = self._ways_on()
            raise

    def _ways_on(self) -> str:
        if not chat_room.split_turns(self.messages)[1]:
            return "shorten the message, or start `argosy chat` with a larger --context"
        return (
            "nothing is lost: /trim drops the oldest turns and answers; /save FILE keeps all for a chat with a larger "
            "--context; /reset starts over (--context-policy trim or summarise makes room by itself)"
        )

    def _way_to_continue(self) -> str:
        if len(chat_room.split_turns(self.messages)[1]) > 1:
            return "/trim drops the oldest turns, and then /continue goes on"
        return "/save the conversation, and /load it in a chat with a larger --context"

    def _reply(self, begun: _Begun | None = None) -> None:
        """Answer the conversation or continue an answer, and keep the result. Makes room if the policy says so."""
        self._find_again()
        context, has_answered = self._open_model.context_tokens, False
        while True:
            try:
                reply, begun = self._answer(begun)
            except PromptTooLong:
                if self._has_made_room(begun):
                    continue
                if not has_answered:
                    raise
                break
            has_answered, self._last = True, reply
            is_full = reply.finish_reason == "length" and reply.total_tokens >= context
            if not (is_full and self._has_made_room(begun)):
                break
        assert begun is not None
        self.messages.append(begun.message)
        self._begun = None if reply.finish_reason == "stop" else begun
        if reply.fault is not None:
            self._is_lost = True
            say(f"error: {reply.fault}", "(what has come is kept; /continue goes on)")
        elif reply.finish_reason == "cancelled":
            say("(stopped; /continue goes on)")
        elif reply.finish_reason == "length":
            num_tokens = len(reply.token_ids) or reply.ledger.new_tokens
            why = "the limit of -n: /continue goes on"
            if is_full:
                why = f"the context of {context:,} tokens is full: {self._way_to_continue()}"
            what = ""
            if begun.message.get("reasoning_content") and not chat_room.text_of(begun.message).strip():
                what = ", all of them thoughts"
                if self._not_thinking.variables(self._open_model.variables):
                    why += ", /think off skips them"
            say(f"(cut off after {num_tokens:,} token{'s' * (num_tokens != 1)}{what}, {why})")
        self._say_speed(reply)

    def _has_made_room(self, begun: _Begun | None) -> bool:
        """Make room as the policy says, until half of the context is free; return whether that worked."""
        if self._policy == "stop":
            return False
        return self._make_room(
            self._open_model.context_tokens // 2,
            num_begun=0 if begun is None else len(begun.tokens),
            summarises=self._policy == "summarise",
        )

    def _say_speed(self, reply: Reply) -> None:
        if self._is_quiet:
            return
        ledger, used = reply.ledger, reply.total_tokens
        said = [f"{used:,} of {self._open_model.context_tokens:,} tokens of context"]
        if ledger.decode_tok_per_s is not None:
            said.append(f"{ledger.decode_tok_per_s:.1f} tok/s")
        if ledger.time_to_first_token_s is not None:
            said.append(f"first token after {ledger.time_to_first_token_s:.1f} s")
        write_dim(f"[{', '.join(said)}]")

    def _answer(self, begun: _Begun | None) -> tuple[Reply, _Begun]:
        """Show an answer or its continuation; ^C ends it cleanly between two steps."""
        params, said, messages = self._params, "", self.messages
        tokens: Sequence[int] = ()
        if begun is not None and begun.tokens:
            tokens, params = begun.tokens, replace(params, seed=begun.seed)
        elif begun is not None:  # like the API
            said, messages = chat_room.text_of(begun.message), [*messages, begun.message]
        writer = AnswerWriter(shows_thoughts=self._shows_thoughts)
        reply = self._ask(messages, params, writer, self._thinking, tokens)
        write_text("\n")
        # Thoughts are kept apart from the text: the chat template decides whether the model sees them again.
        thought = {"reasoning_content": writer.answer.reasoning} if writer.answer.reasoning else {}
        message = {"role": "assistant", "content": said + writer.answer.text, **thought}
        if begun is not None and not tokens:
            return reply, _Begun({**begun.message, **message})
        return reply, _Begun(message, reply.token_ids, reply.seed)

    def _ask(
        self,
        messages: Sequence[Message],
        params: SamplingParams,
        writer: AnswerWriter,
        thinking: Thinking,
        begun: Sequence[int] = (),
    ) -> Reply:
        with Interrupts.watched() as interrupts:
            return self._open_model.answer(
                self._readable(messages),
                params,
                writer,
                thinking=thinking,
                begun=begun,
                interrupts=interrupts,
            )


def say(*lines: str) -> None:
    write_text("".join(f"{line}\n" for line in lines), sys.stderr)


def _path(name: str, command: str) -> Path:
    """The file named in a command, perhaps in quotes."""
    if not name:
        raise UsageError(f"{command} needs the path of a file: {command} FILE")
    return Path(os.path.expanduser(name.strip("'\"")))


_KINDS = {
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".gif"), "image"),
    **dict.fromkeys((".wav", ".mp3", ".flac", ".ogg"), "audio"),
    **dict.fromkeys((".mp4", ".mov", ".m4v", ".webm", ".mkv", ".avi"), "video"),
}


def _dropped(said: str) -> tuple[str, str] | None:
    """The kind and path of a line that is just the path of a media file, as when a file is dropped on the terminal."""
    path = Path(said.strip("'\"").replace("\\ ", " "))
    kind = _KINDS.get(path.suffix.lower())
    try:
        return (kind, str(path)) if kind is not None and path.is_file() else None
    except (OSError, ValueError):
        return None
