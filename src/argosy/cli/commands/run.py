"""`argosy run`: answer one prompt. Only the answer goes to stdout.

Elsewhere: `cli/shared/texts.py` reads files and stdin.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click

from argosy.cli.shared.answer_writer import AnswerWriter
from argosy.cli.shared.declared import options
from argosy.cli.shared.group_options import WantedGroup, group_options
from argosy.cli.shared.options import (
    CO2,
    AskingOptions,
    CommandWithMedia,
    adapter_of,
    asked_sampling,
    asked_thinking,
    asking_options,
    media_of,
    open_engine,
    sampling_options,
    settings_of,
    thinking_of,
)
from argosy.cli.shared.output import ledger_lines, prompt_shown, write_text
from argosy.cli.shared.server_model import Reply, ServerModel, find_model
from argosy.cli.shared.settings import Settings, read_settings
from argosy.cli.shared.texts import STDIN, prompt_of, prompt_text, read_file, read_stdin, text_or_file
from argosy.config import DEMO, counted
from argosy.config.option import Option
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

_SCHEMA_BYTES = 1 << 20  # per file; a schema without annotations may have 128 Ki characters


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions(AskingOptions):
    """Options only for `run`."""

    model: Annotated[
        str, Option("-m --model MODEL", "Model: a name or path; default: the demo.", completes="models")
    ] = DEMO
    files: Annotated[
        tuple[str, ...],
        Option("-f --file FILE", "Text before the prompt; may be repeated.", completes="files"),
    ] = ()
    system: Annotated[str | None, Option("--system TEXT", "System message; @FILE reads it from a file.")] = (
        None
    )
    json_schema: Annotated[
        str | None,
        Option("--json-schema FILE", "The answer is JSON that follows this schema.", completes="files"),
    ] = None
    raw: Annotated[bool, Option("--raw", "Continue the text without a chat template.")] = False
    as_json: Annotated[bool, Option("--json", "Print the answer and its ledger as JSON.")] = False
    quiet: Annotated[bool, Option("-q --quiet", "Print no ledger.")] = False
    co2_grams_per_kwh: CO2 = None

    @property
    def shows_thoughts(self) -> bool:
        return sys.stderr.isatty() and not self.as_json if self.thoughts is None else self.thoughts


@dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    """A prompt after reading and checks; `form` is the required form of the answer."""

    text: str
    system: str | None
    form: Grammar | None
    params: SamplingParams
    thinking: Thinking
    given: RunOptions
    adapter: str | None = None


@click.command("run", cls=CommandWithMedia)
@click.argument("prompt", nargs=-1, metavar="[PROMPT]...")
@options(RunOptions, "model", "files", "system", "json_schema", "raw", "as_json", "quiet", into="given")
@asking_options(RunOptions, "co2_grams_per_kwh")
@group_options
@sampling_options
def run(
    prompt: tuple[str, ...], given: RunOptions, thinking: dict[str, Any], sampling: dict[str, Any], flags: Settings,
    group: WantedGroup,
) -> None:  # fmt: skip
    """Answer one prompt. Files, pictures, sound and stdin can come with it; statistics go to stderr.

    \b
    Examples:
      argosy run -f notes.txt "Summarise this."
      argosy run -m ./Qwen3.6-35B-A3B --memory 16GiB "What is this?" --image cat.jpg
    """
    asked, params = asked_thinking(**thinking), asked_sampling(sampling)
    settings = read_settings(**flags)
    question = _read(prompt, given, params, asked)
    if (
        at := find_model(given.model, given.url, no_server=given.no_server, is_quiet=given.quiet)
    ) is not None:
        _ask_server(at, question)
    else:
        _ask_here(question, settings, group)


def _read(
    prompt: tuple[str, ...], given: RunOptions, params: SamplingParams, thinking: Thinking
) -> _Question:
    """Read the files of a question.

    Raises:
        UsageError: options exclude each other, or a file cannot be read.
    """
    if given.raw and given.system is not None:
        raise UsageError("--raw and --system exclude each other: raw text has no system message")
    if given.raw and thinking.is_asked:
        raise UsageError("--raw excludes --think, --no-think and --effort: raw text has no chat template")
    if given.json_schema == STDIN and STDIN in (*prompt, *given.files):
        raise UsageError("stdin can be read only once, but --json-schema - reads it")
    form = None if given.json_schema is None else _read_schema(given.json_schema)
    system = None if given.system is None else text_or_file(given.system)
    text = prompt_text(
        prompt_of(prompt, may_name_model=not _is_given("model")),
        given.files,
        has_media=bool(media_of()),
        is_raw=given.raw,
    )
    return _Question(text=text, system=system, form=form, params=params, thinking=thinking, given=given)


def _ask_here(question: _Question, settings: Settings, group: WantedGroup) -> None:
    """Load the model and let it answer."""
    from argosy.library.names import preset_of
    from argosy.prompt.thinking import Thinking

    given, form = question.given, question.form
    model, adapter = adapter_of(given.model, settings)
    question = replace(question, adapter=adapter)
    if (preset := preset_of(model)) is not None:
        question = replace(
            question,
            params=preset.fill_in(question.params),
            thinking=thinking_of(preset, question.thinking),
        )
        settings = settings_of(preset, settings)
    request = _request(question.text, media_of(), question.system, given.raw, preset)
    if "media" not in settings and "ears" not in settings:
        # Without media, experts make better use of the memory; with media, a shortage is reported at once.
        settings = {**settings, "media": bool(media_of())}
    more: dict[str, Any] = {} if form is None else {"grammars": True}
    with (
        group.open(model) as opened,
        open_engine(model, settings, group=opened, **more) as engine,
    ):
        if (shortfall := question.thinking.shortfall(engine.prompts.variables)) is not None:
            print(f"note: {shortfall}", file=sys.stderr)
        result, answer = _answer(engine, request, question)
        co2 = given.co2_grams_per_kwh
        if given.as_json:
            reply = Reply(result.finish_reason, result.token_ids, result.seed, result.usage, result.ledger)
            print(_as_json(answer, reply, engine.media.hears, engine.plan, co2, result.logprobs))
        elif not given.quiet:
            lines = ledger_lines(result.ledger, engine.plan, result.finish_reason, co2_grams_per_kwh=co2)
            print(*lines, *_ears_lines(engine), sep="\n", file=sys.stderr)
        if result.finish_reason == "length":
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
    """Report that a limit cut the answer, and how to allow more.

    Args:
        full_context: the context's tokens, if that was the limit.
        has_switch: the model can be told not to think.

    Raises:
        UsageError: nothing useful came.
    """
    more, tokens = "allow more with -n", f"{num_tokens:,} token{'s' * (num_tokens != 1)}"
    if full_context is not None:
        more = f"the context of {full_context:,} tokens is full: a larger --context allows more"
    if answer.reasoning and not answer.text.strip():
        if has_switch:
            more += ", or use --no-think"
        raise UsageError(f"all {num_tokens:,} tokens went into thoughts, so there is no answer", hint=more)
    if has_form:
        raise UsageError(f"the answer was cut off after {tokens}, before its JSON was complete", hint=more)
    print(f"note: the answer was cut off after {tokens}; {more}", file=sys.stderr)


def _ask_server(at: ServerModel, question: _Question) -> None:
    """Let a server answer."""
    from argosy.cli.shared.server_model import part_of
    from argosy.media.parts import PROMPT_LIMITS

    given, text, form = question.given, question.text, question.form
    _request(text, media_of(), question.system, given.raw)  # checks that they are compatible
    parts = [part_of(one.read(PROMPT_LIMITS), one.source) for one in media_of()]
    content: object = [*parts, *([{"type": "text", "text": text}] if text else [])] if parts else text
    messages = [{"role": "user", "content": content}]
    if question.system is not None:
        messages.insert(0, {"role": "system", "content": question.system})
    writer = AnswerWriter(shows_text=not given.as_json, shows_thoughts=given.shows_thoughts)
    reply = at.answer(
        text if given.raw else messages,
        question.params,
        writer,
        form=None if form is None else json.loads(form.text),
        thinking=question.thinking,
    )
    ledger, co2 = reply.ledger, given.co2_grams_per_kwh
    if given.as_json:
        print(_as_json(writer.answer, reply, at.hears, None, co2))
    elif not writer.answer.text.endswith("\n"):
        write_text("\n")
    if not given.quiet and not given.as_json:
        print(
            *ledger_lines(ledger, None, reply.finish_reason, co2_grams_per_kwh=co2), sep="\n", file=sys.stderr
        )
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
    """Read the form of answers from a JSON schema in a file; "-" is stdin.

    Raises:
        UsageError: the file cannot be read, or contains no schema.   GrammarError: the schema exceeds a bound.
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


def _answer(engine: Engine, request: PromptLike, question: _Question) -> tuple[Result, Answer]:
    given, params, form = question.given, question.params, question.form
    parses = engine.prompts.takes_messages and not given.raw
    prompt = engine.prompts.build(request, variables=question.thinking.variables(engine.prompts.variables))
    if form is not None:
        params = replace(params, grammar=engine.prompts.grammar(prompt, form=form) if parses else form)
    parser = engine.prompts.parser(prompt) if parses else None
    result = None
    with AnswerWriter(
        parser,
        shows_text=not given.as_json,
        shows_thoughts=given.shows_thoughts,
        progress=prompt_shown(engine),
    ) as writer:
        for event in engine.stream(prompt, params, adapter=question.adapter):
            writer.push(event)
            result = event.result
    assert result is not None  # the last event contains it
    answer = writer.answer
    if not given.as_json and not answer.text.endswith("\n"):
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
    """The answer and its ledger; without a plan, they came from a server."""
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
