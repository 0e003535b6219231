"""`argosy run`: answer one prompt."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from argosy.cli.options import (
    CommandWithMedia,
    engine_options,
    media_of,
    open_engine,
    sampling_options,
    split_options,
    thoughts_option,
)
from argosy.cli.output import AnswerWriter, ledger_lines, write_text
from argosy.config import DEMO
from argosy.errors import UsageError

if TYPE_CHECKING:
    from argosy.engine.engine import Engine
    from argosy.engine.requests import PromptLike
    from argosy.engine.sequence import Result
    from argosy.media.parts import Audio, Image, Video
    from argosy.prompt.formats import Answer
    from argosy.prompt.messages import Message


@click.command("run", cls=CommandWithMedia)
@click.argument("prompt", required=False)
@click.option(
    "-m",
    "--model",
    default=DEMO,
    metavar="MODEL",
    help="Model directory or GGUF; default: the demo.",
)
@click.option("--system", metavar="TEXT", help="System message before the prompt.")
@click.option("--raw", is_flag=True, help="Continue the text without a chat template.")
@click.option("--json", "as_json", is_flag=True, help="Print the answer and its ledger as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print no ledger.")
@thoughts_option
@engine_options
@sampling_options
def run(
    prompt: str | None,
    model: str,
    system: str | None,
    raw: bool,
    as_json: bool,
    quiet: bool,
    thoughts: bool | None,
    **options: Any,
) -> None:
    """Answer PROMPT, media or stdin. The ledger goes to stderr.

    \b
    Examples:
      argosy run "Why is the sky blue?"
      argosy run -m ./Qwen3.6-35B-A3B --memory 16GiB "What is this?" --image cat.jpg
    """
    settings, params = split_options(options)
    text = "" if prompt is None and media_of() else _read_prompt(prompt)
    request = _request(text, media_of(), system, raw)
    if settings.media is None and settings.ears is None:
        # Without media, experts make better use of their memory; with them, too little memory is said at once.
        settings = replace(settings, media=bool(media_of()))
    if thoughts is None:
        thoughts = sys.stderr.isatty() and not as_json
    with open_engine(model, settings) as engine:
        parses = engine.prompts.takes_messages and not raw
        result, answer = _answer(
            engine, request, params, parses=parses, shows_text=not as_json, shows_thoughts=thoughts
        )
        if as_json:
            print(_as_json(result, answer, engine))
        elif not quiet:
            lines = ledger_lines(result.ledger, engine.plan, result.finish_reason)
            print(*lines, *_ears_lines(engine), sep="\n", file=sys.stderr)


def _ears_lines(engine: Engine) -> list[str]:
    from argosy.media.parts import Audio

    num_sounds = sum(isinstance(one, Audio) for one in media_of())
    if not num_sounds or engine.hears != "transcript":
        return []
    sounds = "1 sound" if num_sounds == 1 else f"{num_sounds} sounds"
    return [f"ears     {sounds} transcribed: the model read the text, and did not hear it"]


def _read_prompt(prompt: str | None) -> str:
    if prompt is not None and prompt != "-":
        return prompt
    if prompt is None and sys.stdin.isatty():
        raise UsageError(
            "run needs a prompt", hint='`argosy run "Why is the sky blue?"`, or pass text on stdin'
        )
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UsageError(f"the text on stdin is not UTF-8: {error.reason} at byte {error.start}") from None
    text = text.removesuffix("\n")
    if not text:
        raise UsageError("run needs a prompt, and stdin is empty")
    return text


def _request(text: str, media: Sequence[Image | Audio | Video], system: str | None, raw: bool) -> PromptLike:
    from argosy.media.parts import Text
    from argosy.prompt.prompt import Prompt

    if raw and system is not None:
        raise UsageError("--raw and --system exclude each other: raw text has no system message")
    if raw and media:
        raise UsageError(
            "--raw and media exclude each other: raw text has no place for a picture, sound or video"
        )
    if raw:
        return Prompt.raw(text)
    if system is None and not media:
        return text
    parts = [*media, Text(text)] if text else [*media]
    question: Message = {"role": "user", "content": parts if media else text}
    return [question] if system is None else [{"role": "system", "content": system}, question]


def _answer(
    engine: Engine, request: PromptLike, params: Any, *, parses: bool, shows_text: bool, shows_thoughts: bool
) -> tuple[Result, Answer]:
    prompt = engine.prompts.build(request)
    parser = engine.prompts.parser(prompt) if parses else None
    result = None
    with AnswerWriter(parser, shows_text=shows_text, shows_thoughts=shows_thoughts) as writer:
        for event in engine.stream(prompt, params):
            writer.push(event)
            result = event.result
    assert result is not None  # the last event carries it
    answer = writer.answer
    if shows_text and not answer.text.endswith("\n"):
        write_text("\n")
    return result, answer


def _as_json(result: Result, answer: Answer, engine: Engine) -> str:
    import json

    facts: dict[str, Any] = {
        "text": answer.text,
        "reasoning": answer.reasoning,
        "token_ids": list(result.token_ids),
        "finish_reason": result.finish_reason,
        "usage": result.usage,
        "seed": result.seed,
        "hears": engine.hears,
        "ledger": result.ledger.as_dict(),
        "plan": engine.plan.as_dict(),
    }
    if result.logprobs is not None:
        facts["logprobs"] = [
            {
                "token_id": entry.token_id,
                "logprob": entry.logprob,
                "top": [{"token_id": token_id, "logprob": value} for token_id, value in entry.top],
            }
            for entry in result.logprobs
        ]
    return json.dumps(facts, ensure_ascii=False)
