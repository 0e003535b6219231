"""`argosy transcribe`: write down what is said in sound files."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING

import click

from argosy.cli.shared.declared import choices
from argosy.cli.shared.numbers import RealNumber
from argosy.cli.shared.output import progress_bar, write_text
from argosy.cli.shared.settings import Settings, read_settings

if TYPE_CHECKING:
    from argosy.model.whisper.transcription import Transcription


@click.command("transcribe")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option(
    "-m",
    "--model",
    default="tiny.en",
    metavar="MODEL",
    help="Whisper model, by name or path; default: tiny.en, English only, downloaded once (71 MB).",
)
@click.option("--language", metavar="CODE", help="Spoken language; default: detected.")
@click.option("--translate", is_flag=True, help="Translate into English.")
@click.option("--prompt", default="", metavar="TEXT", help="Earlier text, for names and style.")
@click.option(
    "-t",
    "--temperature",
    type=RealNumber(),
    default=0.0,
    metavar="X",
    help="0, the default, always takes the likeliest word.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "srt", "vtt", "json"]),
    default="text",
    help="Format of the output; default: text.",
)
@choices(Settings, "threads", into="flags")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
def transcribe(
    files: tuple[str, ...],
    model: str,
    language: str | None,
    translate: bool,
    prompt: str,
    temperature: float,
    form: str,
    quiet: bool,
    flags: Settings,
) -> None:
    """Transcribe each FILE (WAV, MP3, FLAC or OGG, at most ten minutes) with Whisper.

    \b
    Examples:
      argosy transcribe talk.mp3
      argosy transcribe --format srt --model ./whisper-small film.flac > film.srt
    """
    from argosy.media.parts import Audio
    from argosy.media.transcript import WRITERS, TranscriptOptions, as_dict
    from argosy.open.ears import Transcriber

    options = TranscriptOptions(
        language=language,
        task="translate" if translate else "transcribe",
        prompt=prompt,
        temperature=temperature,
    )
    settings = read_settings(**flags)
    with progress_bar() as progress:
        transcriber = Transcriber.open(model, threads=settings.get("threads"), progress=progress)
    with transcriber:
        for path in files:
            with nullcontext() if quiet else progress_bar() as tell:

                def report(now: Transcription, path: str = path) -> None:
                    if tell is not None:
                        tell(path, now.done_s / max(now.duration_s, 1e-9))

                transcript = transcriber.transcribe(Audio(path), options, report=report)
            if form == "json":
                print(json.dumps({"file": path, **as_dict(transcript)}, ensure_ascii=False))
                continue
            if len(files) > 1:
                print(f"{path}:", file=sys.stderr)
            write_text(WRITERS[form](transcript))
