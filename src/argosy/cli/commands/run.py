"""`argosy run`: answer one prompt. The answer alone goes to stdout.

Elsewhere: `cli/shared/texts.py` reads files and stdin.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from argosy.cli.commands import completion
from argosy.cli.shared.group_options import WantedGroup, group_options
from argosy.cli.shared.options import (
    CommandWithMedia,
    asked_sampling,
    asked_thinking,
    co2_option,
    engine_options,
    media_of,
    open_engine,
    sampling_options,
    settings_of,
    thinking_of,
    thinking_options,
    watermark_option,
)
from argosy.cli.shared.output import AnswerWriter, ledger_lines, prompt_shown, write_text
from argosy.cli.shared.server_model import Reply, ServerModel, find_model, server_model_options
from argosy.cli.shared.settings import Settings, read_settings
from argosy.cli.shared.texts import STDIN, prompt_of, prompt_text, read_file, read_stdin, text_or_file
from argosy.config import DEMO, SamplingParams, counted
from argosy.errors import UsageError

if TYPE_CHECKING:
    from argosy.budget.memory_plan import MemoryPlan
    from argosy.config import Grammar, Preset, SamplingParams
    from argosy.engine.engine import Engine
    from argosy.engine.requests import PromptLike
    from argosy.engine.sequence import Result, TokenLogprob
    from argosy.media.parts import Audio, Hearing, Image, Video
    from argosy.prompt.formats import Answer
    from argosy.prompt.messages import Message
    from argosy.prompt.thinking import Thinking

_SCHEMA_BYTES = 1 << 20  # per file; its schema, without annotations, may have 128 Ki characters


@click.command("run", cls=CommandWithMedia)
@click.argument("prompt", nargs=-1, metavar="[PROMPT]...")
@click.option(
    "-m",
    "--model",
    default=DEMO,
    metavar="MODEL",
    shell_complete=completion.models,
    help="Model: a name or path; default: the demo.",
)
@click.option(
    "-f",
    "--file",
    "files",
    multiple=True,
    metavar="FILE",
    shell_complete=completion.files,
    help="Text before the prompt; may be repeated.",
)
@click.option("--system", metavar="TEXT", help="System message; @FILE reads it from a file.")
@click.option(
    "--json-schema",
    metavar="FILE",
    shell_complete=completion.files,
    help="The answer is JSON that follows this schema.",
)
@click.option("--raw", is_flag=True, help="Continue the text without a chat template.")
@click.option("--json", "as_json", is_flag=True, help="Print the answer and its ledger as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print no ledger.")
@server_model_options
@co2_option
@watermark_option
@thinking_options
@engine_options
@group_options
@sampling_options
def run(
    prompt: tuple[str, ...],
    model: str,
    files: tuple[str, ...],
    system: str | None,
    json_schema: str | None,
    raw: bool,
    as_json: bool,
    quiet: bool,
    co2_grams_per_kwh: float | None,
    thoughts: bool | None,
    url: str | None,
    no_server: bool,
    thinking: Any,
    sampling: Any,
    flags: Settings,
    group: WantedGroup,
) -> None:
    """Answer one prompt. Files, pictures, sound and stdin can come with it; statistics go to stderr.

    \b
    Examples:
      argosy run -f notes.txt "Summarise this."
      argosy run -m ./Qwen3.6-35B-A3B --memory 16GiB "What is this?" --image cat.jpg
    """
    from argosy.library.names import preset_of

    thinking, params = asked_thinking(**thinking), asked_sampling(sampling)
    settings = read_settings(**flags)
    if raw and system is not None:
        raise UsageError("--raw and --system exclude each other: raw text has no system message")
    if raw and thinking.is_asked:
        raise UsageError("--raw excludes --think, --no-think and --effort: raw text has no chat template")
    if json_schema == STDIN and STDIN in (*prompt, *files):
        raise UsageError("stdin can be read only once, and --json-schema - reads it")
    form = None if json_schema is None else _read_schema(json_schema)
    system = None if system is None else text_or_file(system)
    text = prompt_text(
        prompt_of(prompt, may_name_model=not _is_given("model")),
        files,
        has_media=bool(media_of()),
        is_raw=raw,
    )
    if thoughts is None:
        thoughts = sys.stderr.isatty() and not as_json
    if (at := find_model(model, url, no_server=no_server, is_quiet=quiet)) is not None:
        _ask(
            at, text, system, form, params, thinking,
            raw=raw, quiet=quiet, shows_thoughts=thoughts, as_json=as_json, co2_grams_per_kwh=co2_grams_per_kwh,
        )  # fmt: skip
        return
    if (preset := preset_of(model)) is not None:
        params, thinking = preset.fill_in(params), thinking_of(preset, thinking)
        settings = settings_of(preset, settings)
    request = _request(text, media_of(), system, raw, preset)
    if "media" not in settings and "ears" not in settings:
        # Without media, experts make better use of their memory; with them, too little memory is said at once.
        settings = {**settings, "media": bool(media_of())}
    more: dict[str, Any] = {} if form is None else {"grammars": True}
    with group.open(model) as opened, open_engine(model, settings, group=opened, **more) as engine:
        parses = engine.prompts.takes_messages and not raw
        if (shortfall := thinking.shortfall(engine.prompts.variables)) is not None:
            print(f"note: {shortfall}", file=sys.stderr)
        result, answer = _answer(
            engine,
            request,
            params,
            form,
            thinking,
            parses=parses,
            shows_text=not as_json,
            shows_thoughts=thoughts,
        )
        if as_json:
            reply = Reply(
                result.finish_reason,
                result.token_ids,
                result.seed,
                result.usage,
                result.ledger,
            )
            print(
                _as_json(answer, reply, engine.media.hears, engine.plan, co2_grams_per_kwh, result.logprobs)
            )
        elif not quiet:
            lines = ledger_lines(
                result.ledger, engine.plan, result.finish_reason, co2_grams_per_kwh=co2_grams_per_kwh
            )
            print(*lines, *_ears_lines(engine), sep="\n", file=sys.stderr)
        if result.finish_reason == "length":
            from argosy.prompt.thinking import Thinking

            context = engine.plan.context_tokens
            _say_cut(
                answer,
                len(result.token_ids),
                context if result.usage["total_tokens"] >= context else None,
                has_switch=bool(Thinking(thinks=False).variables(engine.prompts.variables)),
                has_form=form is not None,
            )


def _say_cut(
    answer: Answer, num_tokens: int, full_context: int | None, *, has_switch: bool, has_form: bool
) -> None:
    """Say that a limit cut the answer, and what allows more.

    Args:
        full_context: its tokens, if that was the limit.
        has_switch: the model can be told not to think.

    Raises:
        UsageError: nothing of use came.
    """
    more = "allow more with -n"
    if full_context is not None:
        more = f"the context of {full_context:,} tokens is full: a larger --context allows more"
    if answer.reasoning and not answer.text.strip():
        if has_switch:
            more += ", or use --no-think"
        raise UsageError(f"all {num_tokens:,} tokens went into thoughts, so there is no answer", hint=more)
    if has_form:
        raise UsageError(
            f"the answer was cut off after {num_tokens:,} tokens, before its JSON was complete", hint=more
        )
    print(f"note: the answer was cut off after {num_tokens:,} tokens; {more}", file=sys.stderr)


def _ask(
    at: ServerModel,
    text: str,
    system: str | None,
    form: Grammar | None,
    params: SamplingParams,
    thinking: Thinking,
    *,
    raw: bool,
    quiet: bool,
    shows_thoughts: bool,
    as_json: bool,
    co2_grams_per_kwh: float | None,
) -> None:
    """Let a server answer."""
    from argosy.cli.shared.server_model import part_of
    from argosy.media.parts import PROMPT_LIMITS

    _request(text, media_of(), system, raw)  # checks that they go together
    parts = [part_of(one.read(PROMPT_LIMITS), one.source) for one in media_of()]
    content: object = [*parts, *([{"type": "text", "text": text}] if text else [])] if parts else text
    messages = [{"role": "user", "content": content}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    writer = AnswerWriter(shows_text=not as_json, shows_thoughts=shows_thoughts)
    reply = at.answer(
        text if raw else messages,
        params,
        writer,
        form=None if form is None else json.loads(form.text),
        thinking=thinking,
    )
    ledger = reply.ledger
    if as_json:
        print(_as_json(writer.answer, reply, at.hears, None, co2_grams_per_kwh))
    elif not writer.answer.text.endswith("\n"):
        write_text("\n")
    if not quiet and not as_json:
        lines = ledger_lines(ledger, None, reply.finish_reason, co2_grams_per_kwh=co2_grams_per_kwh)
        print(*lines, sep="\n", file=sys.stderr)
    if reply.finish_reason == "length":
        is_full = reply.total_tokens >= at.context_tokens
        _say_cut(
            writer.answer,
            ledger.new_tokens,
            at.context_tokens if is_full else None,
            has_switch="enable_thinking" in at.variables,
            has_form=form is not None,
        )


def _is_given(parameter: str) -> bool:
    from click.core import ParameterSource

    return click.get_current_context().get_parameter_source(parameter) is not ParameterSource.DEFAULT


def _ears_lines(engine: Engine) -> list[str]:
    from argosy.media.parts import Audio

    num_sounds = sum(isinstance(one, Audio) for one in media_of())
    if not num_sounds or engine.media.hears != "transcript":
        return []
    return [
        f"ears     {counted(num_sounds, 'sound')} transcribed: the model read the text, and did not hear it"
    ]


def _read_schema(name: str) -> Grammar:
    """The form of answers that follow the JSON schema in a file; "-" is stdin.

    Raises:
        UsageError: the file cannot be read, or holds no schema.   GrammarError: the schema exceeds a bound.
    """
    from argosy.config import Grammar
    from argosy.engine.grammar.grammar_bounds import require_schema_bounds, require_size
    from argosy.prompt.formats.lark import without_annotations
    from argosy.strict_json import JsonError, parse_json

    try:
        text = (
            read_stdin(_SCHEMA_BYTES, is_needed=False)
            if name == STDIN
            else read_file(Path(name), _SCHEMA_BYTES)
        )
        schema = parse_json(text)
    except JsonError as error:
        raise UsageError(f"{name}: {error}", hint="--json-schema takes a file with one JSON schema") from None
    if not isinstance(schema, dict):
        raise UsageError(f"{name}: a JSON schema is an object, found {type(schema).__name__}")
    plain = without_annotations(schema)
    require_schema_bounds(plain)
    text = json.dumps(plain)
    require_size(text)
    return Grammar(kind="json_schema", text=text)


def _request(
    text: str,
    media: Sequence[Image | Audio | Video],
    system: str | None,
    raw: bool,
    preset: Preset | None = None,
) -> PromptLike:
    from argosy.media.parts import Text
    from argosy.prompt.prompt import Prompt

    if raw and media:
        raise UsageError(
            "--raw and media exclude each other: raw text has no place for a picture, sound or video"
        )
    if raw:
        return Prompt.raw(text)
    if system is None and not media and preset is None:
        return text
    parts = [*media, Text(text)] if text else [*media]
    question: Message = {"role": "user", "content": parts if media else text}
    messages = [question] if system is None else [{"role": "system", "content": system}, question]
    return messages if preset is None else preset.with_messages(messages)


def _answer(
    engine: Engine,
    request: PromptLike,
    params: SamplingParams,
    form: Grammar | None,
    thinking: Thinking,
    *,
    parses: bool,
    shows_text: bool,
    shows_thoughts: bool,
) -> tuple[Result, Answer]:
    prompt = engine.prompts.build(request, variables=thinking.variables(engine.prompts.variables))
    if form is not None:
        params = replace(params, grammar=engine.prompts.grammar(prompt, form=form) if parses else form)
    parser = engine.prompts.parser(prompt) if parses else None
    result = None
    with AnswerWriter(
        parser, shows_text=shows_text, shows_thoughts=shows_thoughts, progress=prompt_shown(engine)
    ) as writer:
        for event in engine.stream(prompt, params):
            writer.push(event)
            result = event.result
    assert result is not None  # the last event carries it
    answer = writer.answer
    if shows_text and not answer.text.endswith("\n"):
        write_text("\n")
    return result, answer


def _as_json(
    answer: Answer,
    reply: Reply,
    hears: Hearing,
    plan: MemoryPlan | None,
    co2_grams_per_kwh: float | None,
    logprobs: Sequence[TokenLogprob] | None = None,
) -> str:
    """The answer and its ledger; without a plan, a server gave it."""
    from argosy.engine.energy import co2_grams

    ledger = reply.ledger
    facts: dict[str, Any] = {
        "text": answer.text,
        "reasoning": answer.reasoning,
        "token_ids": list(reply.token_ids),
        "finish_reason": reply.finish_reason,
        "usage": {
            "prompt_tokens": ledger.prompt_tokens,
            "completion_tokens": ledger.new_tokens,
            "total_tokens": reply.total_tokens,
        },
        "seed": reply.seed,
        "hears": hears,
        "ledger": ledger.as_dict(),
        "plan": None if plan is None else plan.as_dict(),
    }
    if co2_grams_per_kwh is not None and (joules := ledger.total_energy_j) is not None:
        facts["co2_grams"] = list(co2_grams(joules, co2_grams_per_kwh))
    if logprobs is not None:
        facts["logprobs"] = [
            {
                "token_id": entry.token_id,
                "logprob": entry.logprob,
                "top": [{"token_id": token_id, "logprob": value} for token_id, value in entry.top],
            }
            for entry in logprobs
        ]
    return json.dumps(facts, ensure_ascii=False)
