"""A model that a server answers with, so that a command need not load it beside the server.

    --url, the user's own server  ─ find_model ─>  ServerModel  ─ answer ─>  events for an AnswerWriter

A server answers what its API can say. If a command has an option that only an engine of its own honours, or the server
lacks the model, a line says so and the command loads the model itself. With --url that is an error.

Elsewhere: requests are `remote.py`; which process the user's server is, `own_server.py`.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from argosy.checkpoint.untrusted_file import quote
from argosy.cli import own_server
from argosy.cli.help_all import Further
from argosy.config import CHOOSING, DEMO
from argosy.errors import ServerNotUsable, UsageError

if TYPE_CHECKING:
    from argosy.cli.output import AnswerWriter, Shown
    from argosy.cli.remote import Server
    from argosy.config import SamplingParams
    from argosy.media.parts import Content
    from argosy.prompt.thinking import Thinking

Command = TypeVar("Command", bound=Callable[..., Any])

# Options of commands that a request says, or that concern the terminal alone. All others are for an engine.
_SAID = {
    *CHOOSING, "prompt", "model", "files", "system", "json_schema", "raw", "quiet", "thoughts", "thinks", "effort",
    "max_tokens", "seed", "stop", "ignore_eos", "logit_bias", "url", "no_server",
}  # fmt: skip
_MEDIA_TYPES = {
    ".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp", ".gif": "image/gif",
    ".mp3": "mp3", ".flac": "flac", ".ogg": "ogg", ".wav": "wav",
    ".mp4": "video/mp4", ".m4v": "video/mp4", ".mov": "video/quicktime", ".webm": "video/webm",
    ".mkv": "video/x-matroska", ".avi": "video/x-msvideo",
}  # fmt: skip
_STATE_S = 2.0  # the longest that the first token may wait for a state
_LEAST_S = 0.1  # a rate over less says nothing
_USUAL_TYPES = {"picture": "image/png", "sound": "wav", "video": "video/mp4"}


def server_model_options(command: Command) -> Command:
    """--url and --no-server."""
    command = click.option(
        "--no-server",
        is_flag=True,
        cls=Further,
        help="Load the model here, also if the server of `argosy up` has it.",
    )(command)
    return click.option(
        "--url", metavar="URL", cls=Further, help="Let this server answer; default: that of `argosy up`."
    )(command)


@dataclass(frozen=True, slots=True)
class Said:
    """An answer of a server.

    finish_reason: "stop" or "length", as an engine has it.
    """

    finish_reason: str
    prompt_tokens: int
    new_tokens: int
    first_s: float
    wall_s: float

    def lines(self) -> list[str]:
        """What a command says of it."""
        decode_s = self.wall_s - self.first_s
        rate = f"{(self.new_tokens - 1) / decode_s:.1f} tok/s, " if decode_s > _LEAST_S else ""
        return [
            f"tokens   {self.prompt_tokens} prompt, {self.new_tokens} new",
            f"time     {self.wall_s:.1f} s, {rate}first token after {self.first_s:.1f} s",
        ]


class Followed:
    """The last request for a model of a server, by the server's state, which a key without `metrics` may not read."""

    def __init__(self, server: Server, model: str) -> None:
        self._server, self._model = server, model
        self._is_refused = False
        self._request_id: str | None = (
            None  # None: the server has not said it; its model is not in memory, perhaps
        )

    def begin(self, request_id: str | None) -> None:
        """The server has begun to answer."""
        self._request_id = request_id

    def read(self) -> Shown | None:
        """What to show of it now."""
        from argosy.cli.output import Shown
        from argosy.cli.remote import entries, number, whole
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
        # All who wait for the model to load see the same.
        return one.get("model") == self._model and one.get("why") in ("model", "room")


@dataclass(frozen=True, slots=True)
class ServerModel:
    """A model of a server, by its name there."""

    server: Server
    name: str
    address: str
    is_loaded: bool
    context_tokens: int
    followed: Followed

    @property
    def line(self) -> str:
        how = "in memory" if self.is_loaded else "loaded now"
        return f"using the server at {self.address}: {quote(self.name)} is {how} (--no-server loads the model here)"

    def answer(
        self,
        prompt: str | Sequence[Mapping[str, Any]],
        params: SamplingParams,
        writer: AnswerWriter,
        *,
        form: Mapping[str, Any] | None = None,
        thinking: Thinking | None = None,
    ) -> Said:
        """Show the answer to a text that is continued, or to messages.

        Raises:
            UsageError: the server refuses the request.   ServerNotUsable: it ends before the answer does.
        """
        from argosy.prompt.formats import ReasoningDelta, TextDelta

        path = "/v1/completions" if isinstance(prompt, str) else "/v1/chat/completions"
        body = {
            "model": self.name,
            **_sampling(params),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        body |= {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}
        if form is not None:
            schema = {"name": "answer", "schema": form, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        if thinking is not None:
            asked = {"enable_thinking": thinking.thinks, "reasoning_effort": thinking.effort}
            body |= {name: value for name, value in asked.items() if value is not None}
        began = time.monotonic()
        first_s: float | None = None
        finish = "stop"
        usage: dict[str, Any] = {}
        with writer:
            for event in self.server.answers(path, body, self.followed.begin):
                usage = event.get("usage") or usage
                for choice in event.get("choices") or ():
                    delta = choice.get("delta") or choice
                    for key, kind in (
                        ("reasoning_content", ReasoningDelta),
                        ("content", TextDelta),
                        ("text", TextDelta),
                    ):
                        if isinstance(text := delta.get(key), str) and text:
                            first_s = time.monotonic() - began if first_s is None else first_s
                            writer.show(kind(text))
                    finish = choice.get("finish_reason") or finish
        wall_s = time.monotonic() - began
        counts = (usage.get(key) for key in ("prompt_tokens", "completion_tokens"))
        num_prompt, num_new = (count if isinstance(count, int) else 0 for count in counts)
        return Said(str(finish), num_prompt, num_new, wall_s if first_s is None else first_s, wall_s)


def _sampling(params: SamplingParams) -> dict[str, Any]:
    """The fields of a request; what is left to the model is left out."""
    chosen = {name: getattr(params, name) for name in CHOOSING if name not in params.left_to_model}
    more = {
        "max_tokens": params.max_tokens, "seed": params.seed, "stop": list(params.stop) or None,
        "ignore_eos": params.ignore_eos or None,
        "logit_bias": {str(one): bias for one, bias in params.logit_bias.items()} or None,
    }  # fmt: skip
    return chosen | {name: value for name, value in more.items() if value is not None}


def find_model(model: str, url: str | None, *, no_server: bool, is_quiet: bool) -> ServerModel | None:
    """The model at a server; None: the command loads it itself, and a line says why if a server of the user runs.

    Raises:
        UsageError, ServerNotUsable: a server was named, and cannot answer this command.
    """
    from argosy.cli.remote import Server
    from argosy.cli.settings import api_key

    if no_server:
        if url is not None:
            raise UsageError("--url and --no-server exclude each other")
        return None
    process = own_server.found() if url is None else None
    if process is None and url is None:
        return None
    url, key = own_server.socket_url() if url is None else url, api_key()
    server = Server(url, key)
    address = server.url if process is None else process.address
    try:
        if (option := _option_for_engines()) is not None:
            raise UsageError(
                f"the server at {address} has settings of its own, and {option} is for a model that is loaded here",
                hint="leave out --url, or the option",
            )
        entry = _entry_of(model, server.models(), address)
    except (UsageError, ServerNotUsable) as error:
        if process is None:
            raise
        click.echo(f"note: {error.message}; {model} is loaded here, beside that server", err=True)
        return None
    context = entry.get("context_length")
    found = ServerModel(
        server,
        entry["id"],
        address,
        entry.get("state") == "ready",
        context if isinstance(context, int) else 0,
        Followed(Server(url, key, timeout_s=_STATE_S), entry["id"]),
    )
    if not is_quiet:
        click.echo(found.line, err=True)
    return found


def _option_for_engines() -> str | None:
    """A given option of the current command that only an engine of its own honours."""
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


def _entry_of(model: str, entries: Sequence[dict[str, Any]], address: str) -> dict[str, Any]:
    """The server's entry for what the user calls `model`.

    Raises:
        UsageError: there is none, or `model` is a path.
    """
    from argosy.library.names import Named, look_up, preset_of

    found = look_up(model)
    if preset_of(model) is not None:  # its model alone would not do
        found = Named(model, None, None)
    if found.name is None and found.path is not None and model != DEMO:
        raise UsageError(f"the server at {address} takes names of models, and {model} is a path")
    whole = found.name or model
    # A server that was given this model by its name has the last part of it; files of one name may differ.
    wanted = [model] if Path(whole).is_absolute() else [model, whole, Path(whole).name]
    by_name = {str(entry["id"]).lower(): entry for entry in entries}
    for name in wanted:
        if (entry := by_name.get(name.lower())) is not None:
            return entry
    raise UsageError(
        f"the server at {address} does not have {quote(model)}", hint="`argosy ps --url URL` shows its models"
    )


def part_of(content: Content, source: object) -> dict[str, Any]:
    """A picture, sound or video as a part of a message."""
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
