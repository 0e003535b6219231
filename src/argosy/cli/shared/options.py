"""Options shared by several commands, converted to an open engine and sampling parameters."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from argosy.cli.commands import completion
from argosy.cli.shared.help_all import Command as CommandWithFurther
from argosy.cli.shared.help_all import Further
from argosy.config import CHOOSING, EFFORTS, MIB, SamplingParams, format_bytes
from argosy.errors import UsageError

if TYPE_CHECKING:
    from argosy.checkpoint.files import ModelFiles
    from argosy.cli.shared.settings import Settings
    from argosy.config import EngineConfig, Preset
    from argosy.engine.engine import Engine
    from argosy.experts.hit_rate import WorkingSet
    from argosy.experts.recording import OpenRecorder
    from argosy.experts.runner import ExpertGroup
    from argosy.library.names import Named
    from argosy.media.parts import Audio, Image, Video
    from argosy.observe.recorder import Recorder
    from argosy.prompt.thinking import Thinking

Command = TypeVar("Command", bound=Callable[..., Any])


class SharedLine(click.Option):
    """An option that shares a line of help with others: `line` of the first one, and None of the others."""

    def __init__(self, *args: Any, line: tuple[str, str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._line = line

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        return self._line


_SIZING = (
    click.option(
        "--memory",
        metavar="SIZE",
        shell_complete=completion.memory_sizes,
        help="Budget of the whole process: 8GiB, 8GB, 75%.",
    ),
    click.option(
        "--threads", type=click.IntRange(min=1), metavar="N", help="Compute threads; default: all cores."
    ),
    click.option(
        "--context",
        type=click.IntRange(min=1),
        metavar="N",
        shell_complete=completion.context_sizes,
        help="Context length in tokens.",
    ),
    click.option(
        "--kv",
        "kv_dtype",
        cls=Further,
        type=click.Choice(["f32", "f16", "q8"]),
        help="Format of the KV cache; default: f16 for most models.",
    ),
    click.option(
        "--instruction-set",
        cls=Further,
        metavar="NAME",
        shell_complete=completion.instruction_sets,
        help="Use plain, avx2, avx512 or amx.",
    ),
)
_ENGINE = (
    *_SIZING,
    click.option("--media/--no-media", default=None, help="Media, or text only; default: if it fits."),
    click.option(
        "--image-tokens",
        cls=Further,
        type=int,
        metavar="N",
        help="Most positions of a picture; default 1024.",
    ),
    click.option(
        "--video-tokens", cls=Further, type=int, metavar="N", help="Most positions of a video; default 4096."
    ),
    click.option(
        "--mmproj",
        cls=Further,
        metavar="FILE",
        shell_complete=completion.files,
        help="Vision tower of a GGUF; default: beside it.",
    ),
    click.option("--ears", metavar="PATH", help="Transcribe sound: Whisper model or tiny.en."),
    click.option(
        "--speculate",
        cls=Further,
        type=click.Choice(["off", "lookup", "mtp", "auto"]),
        help="Propose tokens ahead while it pays; same text.",
    ),
    click.option(
        "--no-tune",
        "tune",
        cls=Further,
        flag_value=False,
        default=None,
        type=bool,
        help="Skip the start-up benchmark of kernels.",
    ),
    click.option(
        "--no-record",
        "record",
        cls=Further,
        flag_value=False,
        default=None,
        type=bool,
        help="Keep no counts of routing.",
    ),
)
_MEDIA = ("image", "audio", "video")

_CHOOSING = (
    click.option(
        "-t", "--temperature", type=float, metavar="X", help="0 is greedy; default: the model's own."
    ),
    click.option(
        "--top-k",
        cls=SharedLine,
        line=("--top-k, --top-p, --min-p N", "Sample from the likeliest tokens only."),
        type=int,
    ),
    click.option("--top-p", cls=SharedLine, type=float),
    click.option("--min-p", cls=SharedLine, type=float),
    click.option(
        "--repetition-penalty", cls=Further, type=float, metavar="X", help="Above 1: repeat less of prompt and answer."
    ),
    click.option(
        "--presence-penalty", cls=Further, type=float, metavar="X", help="Lower logits of tokens in the answer by X."
    ),
    click.option(
        "--frequency-penalty", cls=Further, type=float, metavar="X", help="Lower them by X per occurrence."
    ),
)  # fmt: skip
_THINKING = (
    click.option(
        "--think/--no-think", "thinks", default=None, help="Think first, or not; default: the model's."
    ),
    click.option(
        "--effort", type=click.Choice(EFFORTS), metavar="LEVEL", help="Think low, medium or high."
    ),
)  # fmt: skip
_ENDING = (
    click.option(
        "-n", "--max-tokens", type=int, metavar="N", help="Most tokens; default: to the context's end."
    ),
    *_CHOOSING,
    click.option("--seed", type=int, metavar="N", help="Make sampling repeatable."),
    click.option("--stop", multiple=True, metavar="TEXT", help="Stop before TEXT; may be repeated."),
)  # fmt: skip
_SAMPLING = (
    *_ENDING,
    click.option(
        "--logit-bias", cls=Further, multiple=True, metavar="ID=X", help="Add X to the logit of a token."
    ),
    click.option(
        "--logprobs", cls=Further, type=int, metavar="N", help="With --json: N likeliest tokens each step."
    ),
    click.option("--ignore-eos", cls=Further, is_flag=True, help="Continue after the end token."),
)  # fmt: skip


co2_option = click.option(
    "--co2-grams-per-kwh", type=click.FloatRange(0, 10_000), metavar="G", cls=Further,
    help="CO2 of the electricity here, shown where energy is measured.",
)  # fmt: skip


watermark_option = click.option(
    "--watermark", type=click.Path(path_type=Path), metavar="FILE", cls=Further,
    help="Key of a watermark in sampled text: docs/guides/responsible-use.md.",
)  # fmt: skip


def sizing_options(command: Command) -> Command:
    """The options that decide how fast an engine answers text."""
    for option in reversed(_SIZING):
        command = option(command)
    return command


def engine_options(command: Command) -> Command:
    for option in reversed(_ENGINE):
        command = option(command)
    return command


def choosing_options(command: Command) -> Command:
    """The options that choose a token, for requests that do not say."""
    for option in reversed(_CHOOSING):
        command = option(command)
    return command


def take_choosing(options: dict[str, Any]) -> dict[str, float]:
    """Take the given values of `choosing_options` out of a command's options.

    Raises:
        UsageError: a value is out of bounds.
    """
    chosen = {name: value for name in CHOOSING if (value := options.pop(name, None)) is not None}
    SamplingParams.asked(chosen)
    return chosen


def preset_options(command: Command) -> Command:
    """The options of requests that a preset can set."""
    for option in reversed((*_THINKING, *_ENDING)):
        command = option(command)
    return command


def sampling_options(command: Command) -> Command:
    for option in reversed(_SAMPLING):
        command = option(command)
    return command


class CommandWithMedia(CommandWithFurther):
    """A command with --image, --audio and --video, which keep their order: `media_of` has it."""

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
    """The media that the command line of the current command names, in its order."""
    from argosy.media.parts import Audio, Image, Video

    kinds = dict(zip(_MEDIA, (Image, Audio, Video), strict=True))
    return [kinds[kind](path) for kind, path in click.get_current_context().meta[__name__]]


def thinking_options(command: Command) -> Command:
    """Whether the model thinks, how much, and whether its thoughts are shown."""
    command = click.option(
        "--thoughts/--no-thoughts", "thoughts", default=None, help="Show or hide thoughts; default: on a tty."
    )(command)
    for option in reversed(_THINKING):
        command = option(command)
    return command


def take_thinking(options: dict[str, Any]) -> Thinking:
    """Take what `thinking_options` ask of the model out of a command's options.

    Raises:
        UsageError: they contradict each other.
    """
    from argosy.prompt.thinking import Thinking

    thinks, effort = options.pop("thinks", None), options.pop("effort", None)
    if thinks is False and effort is not None:
        raise UsageError("--no-think and --effort exclude each other")
    return Thinking(thinks=thinks if effort is None else None, effort=effort)


def split_options(options: dict[str, Any]) -> tuple[Settings, SamplingParams]:
    """Convert the options of a command to settings and sampling parameters.

    Raises:
        UsageError: a value is out of bounds, or an environment variable is invalid.
    """
    from argosy.cli.shared.settings import Settings

    engine = {name: options.pop(name, None) for name in Settings.__dataclass_fields__}
    bias = _logit_bias(options.pop("logit_bias", ()))
    given = {name: value for name, value in options.items() if value is not None and value != ()}
    if given.get("max_tokens") == -1:
        given["max_tokens"] = None
    if bias:
        given["logit_bias"] = bias
    return Settings.read(**engine), SamplingParams.asked(given)


def settings_of(preset: Preset | None, settings: Settings) -> Settings:
    """The settings of an engine for a preset: its context, if no other is given and as far as the model's goes.

    Raises:
        What `locate_model` and `open_files` raise.
    """
    from argosy.engine.options import locate_model, open_files

    if preset is None or preset.context is None or settings.context is not None:
        return settings
    longest = open_files(locate_model(preset.model)).config.context_tokens
    return replace(settings, context=min(preset.context, longest))


def thinking_of(preset: Preset | None, thinking: Thinking) -> Thinking:
    """What is asked of the model, or else what a preset asks of it."""
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

    Says which media it cannot take, and why. Counts its routing, unless that is off.

    Args:
        recording: counts; None: one is made.
        group: other processes that run experts, too.
    """
    from argosy import Engine
    from argosy.cli.shared.output import progress_bar
    from argosy.library import kept, names

    if group is not None:
        more["experts"] = group
    text, path, name = names.look_up(model) if isinstance(model, str) else model
    if name is not None and name.lower() != text.lower():
        print(f"note: {text} is {name}", file=sys.stderr)
    if not settings.record:
        recording = None
    elif recording is None:
        recording = Recording()
    with progress_bar() as progress:
        engine = Engine.open(
            path if path is not None and name is not None else text,
            progress=progress,
            recorder=recording,
            **settings.for_engine(),
            **more,
        )
    if name is not None:
        kept.note_use(name)
    try:
        with engine:
            for fault in dict.fromkeys(engine.media.faults.values()):
                hint = f" ({fault.hint})" if fault.hint else ""
                print(f"note: {fault.message}{hint}", file=sys.stderr)
            for note in engine.sampling.notes:
                print(f"note: {note}", file=sys.stderr)
            if (shortage := _shortage(engine)) is not None:
                print(f"note: {shortage}", file=sys.stderr)
            yield engine
    finally:
        if recording is not None:
            recording.save()


def _shortage(engine: Engine) -> str | None:
    """A warning if the plan takes more memory than is free now."""
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
    """Opens the recorder that a command would have, for plans: nothing is saved."""
    if not settings.record:
        return None
    from argosy.observe.recorder import Recorder

    return lambda files, config: Recorder(files.config, config)


class Recording:
    """The recorder of a command: an engine calls this to open it, and the command saves it at its end."""

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
        """Add the counts to those of earlier runs. A failure is said, and does not end the command."""
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
