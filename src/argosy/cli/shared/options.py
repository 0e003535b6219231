"""Options shared by several commands, converted to an open engine and sampling parameters."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import click

from argosy.cli.commands import completion
from argosy.cli.shared.declared import SharedLine, choices, options
from argosy.cli.shared.help_all import Command as CommandWithFurther
from argosy.cli.shared.settings import Settings, for_engine
from argosy.config import MIB, RUNNING, SAMPLING, THINKING, Preset, SamplingParams, format_bytes
from argosy.config.option import Further, Option
from argosy.errors import UsageError

if TYPE_CHECKING:
    from argosy.checkpoint.files import ModelFiles
    from argosy.config import EngineConfig
    from argosy.experts.hit_rate import WorkingSet
    from argosy.experts.recording import OpenRecorder
    from argosy.experts.runner import ExpertGroup
    from argosy.library.names import Named
    from argosy.media.parts import Audio, Image, Video
    from argosy.observe.recorder import Recorder
    from argosy.open.engine import Engine
    from argosy.prompt.thinking import Thinking

Command = TypeVar("Command", bound=Callable[..., Any])


_MEDIA = ("image", "audio", "video")

CO2 = Annotated[
    float | None,
    Further(
        "--co2-grams-per-kwh G",
        "CO2 of the electricity here, shown where energy is measured.",
        least=0,
        most=10_000,
    ),
]
watermark_option = choices(Settings, "watermark", into="flags")
engine_options = choices(Settings, *RUNNING, "record", into="flags")
sampling_options = choices(SamplingParams, *SAMPLING, into="sampling")


class CommandWithMedia(CommandWithFurther):
    """A command with --image, --audio and --video, whose order `media_of` preserves."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += [
            SharedLine(
                [f"--{kind}"],
                line=(f"--{', --'.join(_MEDIA)} FILE", "Show a file to the model; may be repeated.")
                if kind == _MEDIA[0]
                else None,
                multiple=True,
                expose_value=False,
                shell_complete=completion.files,
            )
            for kind in _MEDIA
        ]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        values, _, order = self.make_parser(ctx).parse_args(list(args))
        files = {kind: iter(values.get(kind) or ()) for kind in _MEDIA}
        ctx.meta[__name__] = [(one.name, next(files[one.name])) for one in order if one.name in files]
        return super().parse_args(ctx, args)


def media_of() -> list[Image | Audio | Video]:
    """The media named on the current command line, in order."""
    from argosy.media.parts import Audio, Image, Video

    kinds = dict(zip(_MEDIA, (Image, Audio, Video), strict=True))
    return [kinds[kind](path) for kind, path in click.get_current_context().meta[__name__]]


@dataclass(frozen=True, slots=True, kw_only=True)
class AskingOptions:
    """Options common to `run` and `chat`: what answers, and what is shown."""

    url: Annotated[
        str | None, Further("--url URL", "Let this server answer; default: that of `argosy up`.")
    ] = None
    no_server: Annotated[
        bool, Further("--no-server", "Load the model here, also if the server of `argosy up` has it.")
    ] = False
    thoughts: Annotated[
        bool | None, Option("--thoughts/--no-thoughts", "Show or hide thoughts; default: on a tty.")
    ] = None


def asking_options(owner: type[AskingOptions], *more: str) -> Callable[[Command], Command]:
    """Add the options of a command that asks a model; the command gets `owner` as its argument `given`.

    Args:
        more: further fields of `owner`.
    """
    added = (
        options(owner, "url", "no_server", *more, into="given"),
        choices(Settings, "watermark", into="flags"),
        choices(Preset, *THINKING, into="thinking"),
        options(owner, "thoughts", into="given"),
        engine_options,
    )

    def add(command: Command) -> Command:
        for one in reversed(added):
            command = one(command)
        return command

    return add


def asked_thinking(thinks: bool | None = None, effort: str | None = None) -> Thinking:
    """The request that `--think`, `--no-think` and `--effort` make.

    Raises:
        UsageError: they contradict each other.
    """
    from argosy.prompt.thinking import Thinking

    if thinks is False and effort is not None:
        raise UsageError("--no-think and --effort exclude each other")
    return Thinking(thinks=thinks if effort is None else None, effort=effort)


def asked_sampling(given: Mapping[str, Any]) -> SamplingParams:
    """Convert sampling options to the parameters of a request.

    Raises:
        UsageError: a value is out of bounds.
    """
    given = dict(given)
    if given.get("max_tokens") == -1:
        given["max_tokens"] = None
    if "logit_bias" in given:
        given["logit_bias"] = _logit_bias(given["logit_bias"])
    return SamplingParams.asked(given)


def settings_of(preset: Preset | None, settings: Settings) -> Settings:
    """The engine settings for a preset: its context, unless another is given, within the model's limit.

    Raises:
        What `locate_model` and `open_files` raise.
    """
    from argosy.open.models import locate_model, open_files

    if preset is None or preset.context is None or "context" in settings:
        return settings
    longest = open_files(locate_model(preset.model)).config.context_tokens
    return {**settings, "context": min(preset.context, longest)}


def adapter_of(model: str, settings: Settings) -> tuple[str, str | None]:
    """The model, and the adapter of `--lora` that answers: the one that MODEL:NAME names, or the only one."""
    if not (loras := settings.get("loras")):
        return model, None
    from argosy.adapters.wanted import chosen_adapter

    return chosen_adapter(model, loras)


def thinking_of(preset: Preset | None, thinking: Thinking) -> Thinking:
    """The requested thinking, or otherwise the preset's."""
    if preset is None or thinking.is_asked:
        return thinking
    return replace(thinking, thinks=preset.thinks, effort=preset.effort)


def _logit_bias(pairs: Sequence[str]) -> dict[int, float]:
    result = {}
    for pair in pairs:
        token_id, _, value = pair.partition("=")
        try:
            result[int(token_id)] = float(value)
        except ValueError:
            raise UsageError(
                f"--logit-bias takes ID=X, found '{pair}'", hint="for example --logit-bias 1234=-100"
            ) from None
    return result


@contextmanager
def open_engine(
    model: str | Named,
    settings: Settings,
    *,
    recording: Recording | None = None,
    group: ExpertGroup | None = None,
    **more: Any,
) -> Iterator[Engine]:
    """Open the engine of a command, with a progress bar on a terminal.

    Reports the media it cannot take, and why. Counts routing, unless that is off.

    Args:
        recording: counts the routing; None: one is created.
        group: other processes that also run experts.
    """
    from argosy import Engine
    from argosy.cli.shared.output import progress_bar
    from argosy.library import kept, names

    if group is not None:
        more["experts"] = group
    text, path, name = names.look_up(model) if isinstance(model, str) else model
    if name is not None and name.lower() != text.lower():
        print(f"note: {text} is {name}", file=sys.stderr)
    if not settings.get("record", True):
        recording = None
    elif recording is None:
        recording = Recording()
    with progress_bar() as progress:
        engine = Engine.open(
            path if path is not None and name is not None else text,
            progress=progress,
            recorder=recording,
            **for_engine(settings),
            **more,
        )
    if name is not None:
        kept.note_use(name)
    try:
        with engine:
            for fault in dict.fromkeys(engine.media.faults.values()):
                hint = f" ({fault.hint})" if fault.hint else ""
                print(f"note: {fault.message}{hint}", file=sys.stderr)
            adapters = engine.adapters if settings.get("loras") or more.get("loras") else ()
            notes = (f"{one.name}: {note}" for one in adapters for note in one.notes)
            for note in (*engine.sampling.notes, *notes):
                print(f"note: {note}", file=sys.stderr)
            if (exact := engine.config.exact_tokens) is not None:
                print(
                    f"note: the file lacks the indexers that choose the positions a token sees: answers are the "
                    f"model's own up to {exact} tokens, and approximate beyond",
                    file=sys.stderr,
                )
            if (shortage := _shortage(engine)) is not None:
                print(f"note: {shortage}", file=sys.stderr)
            yield engine
    finally:
        if recording is not None:
            recording.save()


def _shortage(engine: Engine) -> str | None:
    """A warning if the plan takes more memory than is free."""
    from argosy.machine import resources

    limit, needed = resources.memory_limit(), engine.plan.total_bytes
    if needed <= limit.free_bytes:
        return None
    budget_bytes, _ = resources.default_budget(limit)
    return (
        f"the memory plan takes {format_bytes(needed)}, and there are {limit}: the system may swap, or end a program; "
        f"`--memory {budget_bytes // MIB}MiB` is what is free, less a margin"
    )


def recorder_of(settings: Settings) -> OpenRecorder | None:
    """Opens the recorder that a command would have, for planning only: nothing is saved."""
    if not settings.get("record", True):
        return None
    from argosy.observe.recorder import Recorder

    return lambda files, config: Recorder(files.config, config)


class Recording:
    """A command's recorder: an engine calls this to open it, and the command saves it at the end."""

    def __init__(self, *, keeps_recent: bool = False) -> None:
        self._keeps_recent = keeps_recent
        self.recorder: Recorder | None = None
        self.known: WorkingSet | None = None  # recorded by earlier runs
        self._path: Path | None = None

    def __call__(self, files: ModelFiles, config: EngineConfig) -> Recorder:
        from argosy.observe import saved
        from argosy.observe.recorder import Recorder

        self._path = saved.path_of(files)
        with suppress(OSError, UsageError):  # `save` replaces a damaged file
            self.known = saved.find_for(files)
        self.recorder = Recorder(files.config, config, keeps_recent=self._keeps_recent)
        return self.recorder

    def save(self) -> None:
        """Add the counts to those of earlier runs. A failure is reported but does not end the command."""
        from argosy.observe import saved

        if self.recorder is None or self._path is None:
            return
        try:
            saved.add(self._path, self.recorder.counts())
        except OSError as error:
            print(
                f"note: the counts of routing cannot be saved in {self._path}: {error.strerror}; "
                "--no-record keeps none",
                file=sys.stderr,
            )
