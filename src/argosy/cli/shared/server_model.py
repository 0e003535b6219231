"""A model on a server, so that a command need not load it a second time.

    --url, the user's own server  ─ find_model ─>  ServerModel  ─ answer ─>  events for an AnswerWriter, and a Reply

If a command has an option that only a local engine honours, or the server lacks the model, a line says so and the
command loads the model itself; with --url that is an error. A busy server is retried. An answer can be continued
from its tokens, which a server returns (`return_token_ids`) and takes back.

Elsewhere: requests are `remote.py`; `own_server.py` finds the user's server; chats are `cli/commands/chat.py`.
"""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from argosy.checkpoint.untrusted_file import quote
from argosy.cli.shared import own_server
from argosy.cli.shared.interrupts import Interrupts
from argosy.config import CHOOSING, DEMO, SamplingDefaults
from argosy.errors import ServerNotUsable, UsageError

if TYPE_CHECKING:
    from argosy.cli.shared.answer_writer import AnswerWriter
    from argosy.cli.shared.output import Shown
    from argosy.cli.shared.own_server import Process
    from argosy.cli.shared.remote import RemoteCall, RemoteServer
    from argosy.config import SamplingParams
    from argosy.engine.ledger import Ledger
    from argosy.media.parts import Content, Hearing, Kind
    from argosy.prompt.formats import Event
    from argosy.prompt.thinking import Thinking

Command = TypeVar("Command", bound=Callable[..., Any])
T = TypeVar("T")

# Options that a request can express or that only concern the terminal. All others are for an engine.
_SAID = {
    *CHOOSING, "prompt", "model", "files", "system", "json_schema", "raw", "as_json", "quiet", "thoughts", "thinks",
    "effort", "max_tokens", "seed", "stop", "ignore_eos", "logit_bias", "url", "no_server", "history", "context_policy",
}  # fmt: skip
_MEDIA_TYPES = {
    ".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp", ".gif": "image/gif",
    ".mp3": "mp3", ".flac": "flac", ".ogg": "ogg", ".wav": "wav",
    ".mp4": "video/mp4", ".m4v": "video/mp4", ".mov": "video/quicktime", ".webm": "video/webm",
    ".mkv": "video/x-matroska", ".avi": "video/x-msvideo",
}  # fmt: skip
_KINDS: Mapping[str, Kind] = {
    "image": "picture",
    "audio": "sound",
    "video": "video",
}  # keyed by the name in /v1/models
_SWITCHES = {
    "on-off": ["enable_thinking"], "efforts": ["reasoning_effort"], "both": ["enable_thinking", "reasoning_effort"],
}  # fmt: skip
_STATE_S = 2.0  # the longest that showing the first token may wait for a state
_LONGEST_WAIT_S = 60  # the longest wait that a busy server may request
_LOOK_S = 0.1  # how often a wait checks for ^C
_USUAL_TYPES = {"picture": "image/png", "sound": "wav", "video": "video/mp4"}


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer.

    finish_reason: "stop", "length" or "cancelled", as for an engine.
    token_ids: of the whole answer, including those it began with; empty if the server does not return them.
    usage: tokens of the prompt and the answer, as for an engine.
    fault: why a server ended it, which is then "cancelled"; None if it did not.
    """

    finish_reason: str
    token_ids: Sequence[int]
    seed: int
    usage: Mapping[str, int]
    ledger: Ledger
    fault: ServerNotUsable | None = None

    @property
    def total_tokens(self) -> int:
        return self.usage.get("total_tokens", 0)


class Followed:
    """The progress of the last request, from the server's state, which a key without `metrics` may not read."""

    def __init__(self, server: RemoteServer, model: str) -> None:
        self._server, self._model = server, model
        self._is_refused = False
        self._request_id: str | None = (
            None  # None until the server says so; perhaps its model is not in memory
        )

    def begin(self, request_id: str | None) -> None:
        """Note that the server has begun to answer."""
        self._request_id = request_id

    def read(self) -> Shown | None:
        """What to show now."""
        from argosy.cli.shared.output import Shown
        from argosy.cli.shared.remote import entries, number, whole
        from argosy.engine.progress import prompt_count, wait_line

        if self._is_refused:
            return None
        try:
            state = self._server.state()
        except ServerNotUsable as error:
            self._is_refused = "status" in error.facts
            return None
        for one in entries(state.get("running")):
            total, done = (whole(one.get(key)) for key in ("prompt_tokens", "prompt_done"))
            if self._is_it(one) and total:
                return Shown(prompt_count(done, total), done / total, number(one.get("seconds_left")))
        for one in entries(state.get("waiting")):
            if self._is_it(one):
                line = wait_line(str(one.get("why")), whole(one.get("ahead")))
                return Shown(
                    f"{line}, {number(one.get('seconds')) or 0:.0f} s", number(one.get("share_done"))
                )
        return None

    def _is_it(self, one: dict[str, Any]) -> bool:
        if self._request_id is not None:
            return bool(one.get("id") == self._request_id)
        # All requests that wait for the model to load see the same progress.
        return one.get("model") == self._model and one.get("why") in ("model", "room")


@dataclass(slots=True)
class ServerModel:
    """A model on a server, with the methods of `chat_models.ChatModel`.

    Attributes:
        name: as the user gave it.
        entry: of /v1/models.
        address: the server's address for clients.
    """

    server: RemoteServer
    name: str
    entry: Mapping[str, Any]
    address: str
    followed: Followed

    @property
    def line(self) -> str:
        how = "in memory" if self._is_loaded else "loaded now"
        return f"using the server at {self.address}: {quote(self._id)} is {how} (--no-server loads the model here)"

    @property
    def _id(self) -> str:
        """Its name on the server."""
        return str(self.entry["id"])

    @property
    def _is_loaded(self) -> bool:
        return self.entry.get("state") == "ready"

    @property
    def context_tokens(self) -> int:
        context = self.entry.get("context_length")
        return context if isinstance(context, int) else 0

    @property
    def media_kinds(self) -> Sequence[Kind]:
        told = _mapping(self.entry, "architecture").get("input_modalities")
        return [_KINDS[one] for one in told if one in _KINDS] if isinstance(told, list) else []

    @property
    def hears(self) -> Hearing:
        told = _mapping(self.entry, "capabilities").get("sound")
        return "native" if told == "native" else "transcript" if told == "transcript" else "none"

    @property
    def takes_calls(self) -> bool:
        return _mapping(self.entry, "capabilities").get("tools") != "none"

    @property
    def variables(self) -> frozenset[str]:
        told = _mapping(self.entry, "capabilities").get("thinking")
        return frozenset(_SWITCHES.get(told, ()) if isinstance(told, str) else ())

    @property
    def sampling(self) -> SamplingDefaults:
        told = _mapping(self.entry, "default_parameters")
        given = {name: told[name] for name in CHOOSING if isinstance(told.get(name), int | float)}
        return replace(SamplingDefaults(), **given)

    def facts(self) -> list[str]:
        return [f"context of {self.context_tokens:,} tokens"]

    def media_fault(self, kind: Kind) -> str | None:
        return None

    def shortfall(self, thinking: Thinking) -> str | None:
        return thinking.shortfall(self.variables)

    def loaded(self) -> ServerModel:
        """The model once it is in memory, because only then the server knows what it can do.

        Raises:
            ServerNotUsable: it cannot be loaded.
        """
        from argosy.cli.shared.output import Wait
        from argosy.cli.shared.remote import ANSWER_S

        if self._is_loaded:
            return self
        body = {"model": self._id, "content": ""}
        with Wait(self.followed.read):
            list(self._asking(lambda: [self.server.tokenize(body, ANSWER_S)], None))
        entry = next((one for one in self.server.models() if one["id"] == self._id), self.entry)
        return replace(self, entry=entry)

    def count(self, messages: Sequence[Mapping[str, Any]], thinking: Thinking) -> int:
        body = {"model": self._id, "messages": _sent(messages), "add_generation_prompt": False}
        (tokens,) = self._asking(lambda: [self.server.tokenize(body | _thinking(thinking))], None)
        return tokens

    def answer(
        self,
        prompt: str | Sequence[Mapping[str, Any]],
        params: SamplingParams,
        writer: AnswerWriter,
        *,
        form: Mapping[str, Any] | None = None,
        thinking: Thinking | None = None,
        begun: Sequence[int] = (),
        interrupts: Interrupts | None = None,
    ) -> Reply:
        """Show the continuation of a text or the answer to messages, until ^C if `interrupts` watches for it.

        Args:
            begun: tokens that the answer begins with, and that were shown.

        Raises:
            UsageError: the server refuses the request.   ServerNotUsable: it is lost before the answer has begun.
        """
        from argosy.cli.shared.remote import RemoteCall

        seed = int.from_bytes(os.urandom(8)) >> 1 if params.seed is None else params.seed
        body: dict[str, Any] = {
            "model": self._id, **_sampling(params), "seed": seed, "stream": True, "timings": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True}, "return_token_ids": True,
        }  # fmt: skip
        body |= {"prompt": prompt} if isinstance(prompt, str) else {"messages": _sent(prompt)}
        if form is not None:
            schema = {"name": "answer", "schema": form, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        if thinking is not None:
            body |= _thinking(thinking)
        if begun:
            body["continue_token_ids"] = list(begun)
        call = RemoteCall()
        if interrupts is not None:
            interrupts.on_first = call.stop
        taken = _Taken(writer)
        self.followed.begin(None)
        writer.begin(None, self.followed.read)
        path = "/v1/completions" if isinstance(prompt, str) else "/v1/chat/completions"
        fault = None
        with writer:
            try:
                for event in self._asking(
                    lambda: self.server.answers(path, body, self.followed.begin, call), call
                ):
                    taken.take(event)
            except ServerNotUsable as error:
                # Keep what has come, unless nothing waits for the rest.
                if not call.is_stopped and (interrupts is None or not taken.token_ids):
                    raise
                fault = None if call.is_stopped else error
        if call.is_stopped or fault is not None:
            taken.finish = "cancelled"
        token_ids = taken.token_ids or list(begun)
        return Reply(taken.finish, token_ids, seed, taken.usage, taken.ledger(), fault)

    def use_lines(self) -> list[str]:
        return ["`argosy top` shows the server's use of time and memory"]

    def _asking(self, ask: Callable[[], Iterable[T]], call: RemoteCall | None) -> Iterator[T]:
        """Yield what `ask` yields, retrying a busy server after the time that it requests."""
        from argosy.cli.shared.remote import ANSWER_S

        until, has_said = time.monotonic() + ANSWER_S, False
        while True:
            try:
                yield from ask()
                return
            except ServerNotUsable as error:
                wait_s = error.facts.get("retry_after_s")
                if not isinstance(wait_s, int) or wait_s > _LONGEST_WAIT_S or time.monotonic() > until:
                    raise
                if not has_said:
                    click.echo(f"{error.message}; retrying until it is free (^C stops)", err=True)
                has_said = True
            free_at = time.monotonic() + max(1, wait_s)
            while time.monotonic() < free_at and not (call is not None and call.is_stopped):
                time.sleep(_LOOK_S)


class _Taken:
    """The part of an answer that has come.

    Attributes:
        finish: why it ended, as for an engine.
        token_ids: of the whole answer, if the server returns them.
        usage: as for an engine.
    """

    def __init__(self, writer: AnswerWriter) -> None:
        self.finish = "stop"
        self.token_ids: list[int] = []
        self._writer = writer
        self._began = time.monotonic()
        self._first_s: float | None = None
        self.usage: dict[str, int] = {}
        self._timings: object = None

    def take(self, event: Mapping[str, Any]) -> None:
        """Show a chunk."""
        from argosy.prompt.formats import ReasoningDelta, TextDelta

        told = event.get("usage")
        if isinstance(told, dict):
            self.usage = {name: count for name, count in told.items() if isinstance(count, int)}
            cached = _mapping(told, "prompt_tokens_details").get("cached_tokens")
            self.usage["cached_tokens"] = cached if isinstance(cached, int) else 0
        self._timings = event.get("timings") or self._timings
        is_new = self.usage.get("completion_tokens", 1) > 0
        choices = event.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if not isinstance(choice, dict):
                continue
            delta = choice.get("delta")
            delta = delta if isinstance(delta, dict) else choice
            said: list[Event] = []
            for key, kind in (
                ("reasoning_content", ReasoningDelta),
                ("content", TextDelta),
                ("text", TextDelta),
            ):
                if isinstance(text := delta.get(key), str) and text:
                    said.append(kind(text))
            told = choice.get("token_ids")
            ids = [one for one in told if isinstance(one, int)] if isinstance(told, list) else []
            self.token_ids += ids
            if not is_new:  # the given beginning of the answer
                self._writer.replay(said)
                continue
            if said or ids:
                self._first_s = self._first_s or time.monotonic() - self._began
                self._writer.note_token()
            for one in said:
                self._writer.show(one)
            if (finish := choice.get("finish_reason")) is not None:
                self.finish = "length" if finish == "length" else "stop"

    def ledger(self) -> Ledger:
        """The answer's ledger as the server reports it, or what can be measured here."""
        from argosy.engine.ledger import Ledger

        if isinstance(self._timings, dict):
            return _ledger_of(self._timings)
        wall_s, first_s = time.monotonic() - self._began, self._first_s
        return Ledger(
            prompt_tokens=self.usage.get("prompt_tokens", 0), new_tokens=self.usage.get("completion_tokens", 0),
            wall_s=wall_s, time_to_first_token_s=first_s, decode_s=None if first_s is None else wall_s - first_s,
        )  # fmt: skip


def _ledger_of(told: Mapping[str, Any]) -> Ledger:
    """The ledger that a server reports, leaving out anything that is not a number."""
    from argosy.engine.ledger import Ledger
    from argosy.model.clock import PARTS

    numbers = {name: value for name, value in told.items() if isinstance(value, int | float)}
    known = {one.name for one in fields(Ledger)} - {"parts", "drive_energy_j"}
    given: dict[str, Any] = {name: value for name, value in numbers.items() if name in known}
    rate, new = numbers.get("decode_tok_per_s"), numbers.get("new_tokens", 0)
    if rate:
        given["decode_s"] = (new - 1) / rate
    parts = _mapping(told, "parts")
    given["parts"] = {
        name: parts[name] if isinstance(parts.get(name), int | float) else 0.0 for name in PARTS
    }
    match told.get("drive_energy_j"):
        case [int() | float() as low, int() | float() as high]:
            given["drive_energy_j"] = low, high
    return Ledger(**given)


def _mapping(entry: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = entry.get(name)
    return found if isinstance(found, dict) else {}


def _thinking(thinking: Thinking) -> dict[str, Any]:
    """The request fields that control thinking."""
    asked = {"enable_thinking": thinking.thinks, "reasoning_effort": thinking.effort}
    return {name: value for name, value in asked.items() if value is not None}


def _sent(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages with their media as a request carries them."""
    from argosy.media.parts import Content

    return [
        {
            **message,
            "content": [part_of(part) if isinstance(part, Content) else part for part in message["content"]],
        }
        if isinstance(message.get("content"), list)
        else dict(message)
        for message in messages
    ]


def _sampling(params: SamplingParams) -> dict[str, Any]:
    """The request fields for sampling, without those left to the model."""
    chosen = {name: getattr(params, name) for name in CHOOSING if name not in params.left_to_model}
    more = {
        "max_tokens": params.max_tokens, "stop": list(params.stop) or None,
        "ignore_eos": params.ignore_eos or None,
        "logit_bias": {str(one): bias for one, bias in params.logit_bias.items()} or None,
    }  # fmt: skip
    return chosen | {name: value for name, value in more.items() if value is not None}


def find_model(model: str, url: str | None, *, no_server: bool, is_quiet: bool) -> ServerModel | None:
    """The model on a server. None: the command loads it itself, and if the user's server runs, a line says why.

    Raises:
        UsageError, ServerNotUsable: a server was named but cannot answer this command.
    """
    if no_server:
        if url is not None:
            raise UsageError("--url and --no-server exclude each other")
        return None
    process = own_server.found() if url is None else None
    if process is None and url is None:
        return None
    from argosy.cli.shared.remote import RemoteServer  # imports HTTP, which an engine does not need
    from argosy.cli.shared.settings import api_key

    url, key = own_server.socket_url() if url is None else url, api_key()
    server = RemoteServer(url, key)
    address = server.url if process is None else process.address
    try:
        if (option := _option_for_engines()) is not None:
            raise UsageError(
                f"the server at {address} has settings of its own, and {option} is for a model that is loaded here",
                hint="leave out --url, or the option",
            )
        entry = _entry_of(model, lambda: _models_of(server, process, model), address)
    except (UsageError, ServerNotUsable) as error:
        if process is None:
            raise
        click.echo(f"note: {error.message}; {model} is loaded here, in addition to that server", err=True)
        return None
    followed = Followed(RemoteServer(url, key, timeout_s=_STATE_S), entry["id"])
    found = ServerModel(server, model, entry, address, followed)
    if not is_quiet:
        click.echo(found.line, err=True)
    return found


def _models_of(server: RemoteServer, process: Process | None, model: str) -> Sequence[dict[str, Any]]:
    """The models of a server. Waits for a starting server, because loading a model twice takes its memory twice."""
    has_said = False
    while True:
        is_starting = process is not None and own_server.is_starting(process)
        try:
            return server.models()
        except ServerNotUsable:
            if not is_starting:
                raise
            if not has_said:
                click.echo(
                    "waiting for the server of `argosy up`, which is starting "
                    f"(^C stops; --no-server loads {model} here)",
                    err=True,
                )
            has_said = True
        time.sleep(_LOOK_S)


def _option_for_engines() -> str | None:
    """A given option of the current command that only a local engine honours, if any."""
    context = click.get_current_context()
    for param in context.command.params:
        name = param.name or ""
        if (
            param.expose_value
            and name not in _SAID
            and context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        ):
            return max(param.opts, key=len)
    return None


def _entry_of(model: str, entries: Callable[[], Sequence[dict[str, Any]]], address: str) -> dict[str, Any]:
    """The server's entry for `model`. The server is asked only if it may have the model.

    Raises:
        UsageError: there is no such entry, or `model` is a path.
    """
    from argosy.library.names import Named, look_up, preset_of

    found = look_up(model)
    if preset_of(model) is not None:  # its model alone would not be enough
        found = Named(model, None, None)
    if found.name is None and found.path is not None and model != DEMO:
        raise UsageError(f"the server at {address} takes names of models, and {model} is a path")
    whole = found.name or model
    # A server that was given this model by name lists the last part of it; files with equal names may differ.
    wanted = [model] if Path(whole).is_absolute() else [model, whole, Path(whole).name]
    by_name = {str(entry["id"]).lower(): entry for entry in entries()}
    for name in wanted:
        if (entry := by_name.get(name.lower())) is not None:
            return entry
    raise UsageError(
        f"the server at {address} does not have {quote(model)}", hint="`argosy ps --url URL` shows its models"
    )


def part_of(content: Content, source: object = "") -> dict[str, Any]:
    """Encode a picture, sound or video as a part of a message."""
    assert isinstance(content.data, bytes)
    suffix = source.suffix.lower() if isinstance(source, Path) else Path(str(source)).suffix.lower()
    kind = _MEDIA_TYPES.get(suffix, _USUAL_TYPES[content.kind])
    text = base64.b64encode(content.data).decode()
    match content.kind:
        case "sound":
            return {"type": "input_audio", "input_audio": {"data": text, "format": kind}}
        case "picture":
            return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{text}"}}
        case _:
            return {"type": "video_url", "video_url": {"url": f"data:{kind};base64,{text}"}}
