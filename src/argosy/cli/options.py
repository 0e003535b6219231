"""Options shared by several commands, converted to an open engine and sampling parameters."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from argosy.config import MIB, SamplingParams, format_bytes
from argosy.errors import UsageError

if TYPE_CHECKING:
    from argosy.checkpoint.files import ModelFiles
    from argosy.cli.settings import Settings
    from argosy.config import EngineConfig
    from argosy.engine.engine import Engine
    from argosy.experts.recording import OpenRecorder
    from argosy.media.parts import Audio, Image, Video
    from argosy.observe.recorder import Recorder
    from argosy.plan.hit_rate import WorkingSet

Command = TypeVar("Command", bound=Callable[..., Any])

_ENGINE = (
    click.option("--memory", metavar="SIZE", help="Budget of the whole process: 8GiB, 8GB, 75%."),
    click.option(
        "--threads", type=click.IntRange(min=1), metavar="N", help="Compute threads; default: all cores."
    ),
    click.option("--context", type=click.IntRange(min=1), metavar="N", help="Context length in tokens."),
    click.option("--kv", "kv_dtype", type=click.Choice(["f32", "f16"]), help="Format of the KV cache."),
    click.option("--instruction-set", metavar="NAME", help="Use at most plain, avx2 or avx512."),
    click.option("--media/--no-media", default=None, help="Needed, or text only; default: if it fits."),
    click.option("--image-tokens", type=int, metavar="N", help="Most positions of a picture; default 1024."),
    click.option("--video-tokens", type=int, metavar="N", help="Most positions of a video; default 4096."),
    click.option("--mmproj", metavar="FILE", help="Vision tower of a GGUF; default: beside it."),
    click.option("--ears", metavar="PATH", help="Transcribe sound: Whisper model or tiny.en."),
    click.option(
        "--no-record", "record", flag_value=False, default=None, type=bool, help="Keep no counts of routing."
    ),
)
_MEDIA = ("image", "audio", "video")

_SAMPLING = (
    click.option(
        "-n", "--max-tokens", type=int, metavar="N", help="Maximum length of the answer; default 256."
    ),
    click.option(
        "-t", "--temperature", type=float, metavar="X", help="0, the default, picks the likeliest token."
    ),
    click.option("--top-k", type=int, metavar="N", help="Sample from the N likeliest tokens."),
    click.option("--top-p", type=float, metavar="X", help="Sample from the likeliest that sum to X."),
    click.option("--min-p", type=float, metavar="X", help="Drop tokens below X times the likeliest."),
    click.option(
        "--repetition-penalty", type=float, metavar="X", help="Above 1: repeat prompt and answer less."
    ),
    click.option(
        "--presence-penalty", type=float, metavar="X", help="Lower logits of tokens in the answer by X."
    ),
    click.option("--frequency-penalty", type=float, metavar="X", help="The same, once per occurrence."),
    click.option("--seed", type=int, metavar="N", help="Make sampling repeatable."),
    click.option("--stop", multiple=True, metavar="TEXT", help="Stop before TEXT; may be repeated."),
    click.option(
        "--logit-bias", multiple=True, metavar="ID=X", help="Add X to a token's logit; may be repeated."
    ),
    click.option("--logprobs", type=int, metavar="N", help="With --json: N likeliest tokens each step."),
    click.option("--ignore-eos", is_flag=True, hidden=True, help="Continue after the end token."),
)


def engine_options(command: Command) -> Command:
    for option in reversed(_ENGINE):
        command = option(command)
    return command


def sampling_options(command: Command) -> Command:
    for option in reversed(_SAMPLING):
        command = option(command)
    return command


class _MediaOption(click.Option):
    """One of the options for media, which share a line of help."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        if self.name != _MEDIA[0]:
            return None
        return f"--{', --'.join(_MEDIA)} FILE", "Show a file to the model; may be repeated."


class CommandWithMedia(click.Command):
    """A command with --image, --audio and --video, which keep their order: `media_of` has it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += [
            _MediaOption([f"--{kind}"], multiple=True, metavar="FILE", expose_value=False) for kind in _MEDIA
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


def thoughts_option(command: Command) -> Command:
    return click.option(
        "--thoughts/--no-thoughts",
        "thoughts",
        default=None,
        help="Show thoughts on stderr; default: on a tty.",
    )(command)


def split_options(options: dict[str, Any]) -> tuple[Settings, SamplingParams]:
    """Convert the options of a command to settings and sampling parameters.

    Raises:
        UsageError: a value is out of bounds, or an environment variable is invalid.
    """
    from argosy.cli.settings import Settings

    engine = {name: options.pop(name, None) for name in Settings.__dataclass_fields__}
    bias = _logit_bias(options.pop("logit_bias", ()))
    given = {name: value for name, value in options.items() if value is not None and value != ()}
    if bias:
        given["logit_bias"] = bias
    return Settings.read(**engine), SamplingParams.from_mapping(given)


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
    model: str, settings: Settings, *, recording: Recording | None = None, **more: Any
) -> Iterator[Engine]:
    """Open the engine of a command, with a progress bar on a terminal.

    Says which media it cannot take, and why. Counts its routing, unless that is off.

    Args:
        recording: counts; None: one is made.
    """
    from argosy import Engine
    from argosy.cli.output import progress_bar

    if not settings.record:
        recording = None
    elif recording is None:
        recording = Recording()
    with progress_bar() as progress:
        engine = Engine.open(model, progress=progress, recorder=recording, **settings.for_engine(), **more)
    try:
        with engine:
            for fault in dict.fromkeys(engine.media_faults.values()):
                hint = f" ({fault.hint})" if fault.hint else ""
                print(f"note: {fault.message}{hint}", file=sys.stderr)
            if (shortage := _shortage(engine)) is not None:
                print(f"note: {shortage}", file=sys.stderr)
            yield engine
    finally:
        if recording is not None:
            recording.save()


def _shortage(engine: Engine) -> str | None:
    """What to know if the plan takes more memory than is free now."""
    from argosy.plan import machine

    limit, needed = machine.memory_limit(), engine.plan.total_bytes
    if needed <= limit.free_bytes:
        return None
    budget_bytes, _ = machine.default_budget(limit)
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
        self.known: WorkingSet | None = None  # what earlier runs saved
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
