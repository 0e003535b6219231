"""`argosy eval drift`: compare a compressed or adapted model with its reference, with intervals and a verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from argosy.cli.commands import completion
from argosy.cli.shared.declared import choices
from argosy.cli.shared.numbers import WholeNumber
from argosy.cli.shared.output import progress_bar, write_file
from argosy.cli.shared.settings import Settings, for_engine, read_settings
from argosy.errors import DoesNotFit

if TYPE_CHECKING:
    from argosy.config.engine import WantedAdapter
    from argosy.evaluate.drift import Drift, GroupDrift, QuestionDrift, TextDrift
    from argosy.evaluate.intervals import Estimate
    from argosy.evaluate.measure import DriftReport

REPORT_FILE = "drift.json"  # its name in a pack
_DEFAULT_QUESTIONS = 1000
_MOST_DECIMALS = 7


@click.group("eval")
def eval_group() -> None:
    """Compare a model with a converted copy of itself, or with an adapter.

    \b
    Examples:
      argosy eval drift ./Qwen3-30B-A3B --lora support=./support
      argosy eval drift ./Qwen3-30B-A3B ./Qwen3-30B-A3B-q4 --bbq Age.jsonl --json
    """


@eval_group.command("drift")
@click.argument("reference", metavar="REFERENCE", shell_complete=completion.models)
@click.argument("candidate", metavar="[CANDIDATE]", required=False, shell_complete=completion.models)
@click.option("--languages", metavar="CODES", help="Languages of the texts; default: en,de,es,fr.")
@click.option(
    "--bbq",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Also ask questions with three answers, in BBQ's form.",
)
@click.option(
    "--bbq-questions",
    type=WholeNumber(1, 10_000),
    default=_DEFAULT_QUESTIONS,
    show_default=True,
    metavar="N",
    help="Questions asked, spread over the file.",
)
@click.option(
    "--candidate-kv",
    type=click.Choice(["f32", "f16", "q8"]),
    help="Format of the candidate's KV cache; default: f32.",
)
@click.option(
    "--save",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Also write the JSON here, for `argosy card`.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the same facts as JSON.")
@choices(
    Settings, "memory", "threads", "loras", "lora_columns", into="flags",
    loras={"cls": click.Option, "help": "Adapter of MODEL:NAME; without CANDIDATE, of REFERENCE."},
)  # fmt: skip
def drift(
    reference: str, candidate: str | None, languages: str | None, bbq: Path | None, bbq_questions: int,
    candidate_kv: str | None, save: Path | None, as_json: bool, flags: Settings,
) -> None:  # fmt: skip
    """Measure how much CANDIDATE differs from REFERENCE: a pack from its checkpoint, or one format from another.
    With --lora and no CANDIDATE: how much REFERENCE differs with that adapter.

    Both read the same texts, one model after the other: KL divergence and perplexity on plain passages, sentences
    that differ only in the group they name, and the user's own questions. This measures what compression or an
    adapter changes, not the bias of REFERENCE.
    """
    from argosy.budget.refusals import in_mib
    from argosy.evaluate.measure import measure_drift
    from argosy.evaluate.questions import read_questions

    settings = read_settings(**flags)
    sides = _sides(reference, candidate, settings.pop("loras", ()), settings.pop("lora_columns", None))
    questions = [] if bbq is None else read_questions(bbq, most=bbq_questions)
    try:
        with progress_bar() as progress:
            report = measure_drift(
                sides[0][0],
                sides[1][0],
                _material(languages),
                questions,
                options=for_engine(settings),
                candidate_settings={} if candidate_kv is None else {"kv_dtype": candidate_kv},
                adapters=[adapter for _, adapter in sides],
                progress=progress,
            )
    except DoesNotFit as refusal:  # its hint may name options that this command lacks
        needed = refusal.facts.get("needed_bytes")
        if not isinstance(needed, int) or "plan" not in refusal.facts:
            raise
        hint = f"`--memory {in_mib(needed)}` works"
        raise DoesNotFit(refusal.message, hint=hint, **refusal.facts) from None
    if save is not None:
        write_report(report, save)
    print(json.dumps(report.as_dict(), ensure_ascii=False) if as_json else "\n".join(lines(report)))


def _sides(
    reference: str, candidate: str | None, loras: Any, columns: Any
) -> tuple[tuple[str, WantedAdapter | None], tuple[str, WantedAdapter | None]]:
    """The two models, each with its adapter."""
    if candidate is not None and not loras and not columns:
        return (reference, None), (candidate, None)
    from argosy.adapters.wanted import compared_adapters  # an installation may be without

    return compared_adapters(reference, candidate, loras, columns)


def _material(languages: str | None) -> Any:
    from argosy.evaluate.material import LANGUAGES, read_material

    if languages is None:
        return read_material(LANGUAGES)
    return read_material([name for one in languages.split(",") if (name := one.strip())])


def write_report(report: DriftReport, path: Path) -> None:
    """Write a report as JSON.

    Raises:
        UsageError: the file cannot be written.
    """
    write_file(path, json.dumps(report.as_dict(), ensure_ascii=False, indent=1) + "\n")


def lines(report: DriftReport) -> list[str]:
    """A report as lines of text: the verdict first."""
    found, shown = report.drift, []
    for label, one in (("reference", report.reference), ("candidate", report.candidate)):
        settings = "".join(f", {name} {value}" for name, value in one.settings.items())
        dense = "+".join(one.dense_formats)
        shown.append(f"{label}  {one.name}, experts {one.expert_format}, rest {dense}{settings}")
    shown.append(f"drift      {found.verdict.level}: {found.verdict.reasons[0]}")
    shown += [f"           {reason}" for reason in found.verdict.reasons[1:]]
    shown += ["", *_text_lines(found.text), "", *_group_lines(found)]
    if found.questions:
        shown += ["", *_question_lines(found.questions)]
    return shown


def _text_lines(text: tuple[TextDrift, ...]) -> list[str]:
    rows: list[tuple[str, ...]] = [
        ("passages", "tokens", "KL, nats a token", "same likeliest token, %", "perplexity", "its rise, %")
    ]
    rows += [
        (
            f"  {one.language}",
            str(one.num_tokens),
            interval(one.kl),
            interval(one.agreement, percent=True),
            f"{one.perplexity_before:.2f} -> {one.perplexity:.2f}",
            interval(one.rise, percent=True),
        )
        for one in text
    ]
    return table(rows)


def _group_lines(found: Drift) -> list[str]:
    gaps = found.gaps
    rows: list[tuple[str, ...]] = [
        ("groups", "", "favoured more, nats", "loss rises more, nats a token", "perplexity")
    ]
    rows += [_group_row(one) for one in found.groups]
    return [
        f"pairs of groups: {gaps.num_pairs} in {gaps.num_templates} templates; a gap is {gaps.size:.2f} nats in the"
        f" reference, and changes by {interval(gaps.change)} nats",
        *table(rows),
        "each group against the mean of its dimension; * an interval without 0; all of a column hold at once",
    ]


def _group_row(one: GroupDrift) -> tuple[str, ...]:
    return (
        f"  {one.group.dimension}",
        one.group.name.replace("_", " "),
        interval(one.shift) + (" *" if one.shift.excludes_zero else ""),
        interval(one.rise) + (" *" if one.rise.excludes_zero else ""),
        f"{one.perplexity_before:.2f} -> {one.perplexity:.2f}",
    )


def _question_lines(questions: tuple[QuestionDrift, ...]) -> list[str]:
    rows: list[tuple[str, ...]] = [
        ("questions", "asked", "accuracy, %", "its change, points", "other answers, %")
    ]
    rows += [
        (
            f"  {one.condition}",
            str(one.num_questions),
            f"{100 * one.accuracy_before:.1f} -> {100 * one.accuracy:.1f}",
            interval(one.change, percent=True),
            interval(one.changed, percent=True),
        )
        for one in questions
    ]
    return table(rows)


def interval(one: Estimate, *, percent: bool = False) -> str:
    """`0.021 (0.018 to 0.024)`, with decimals to match the width of the interval."""
    factor = 100 if percent else 1
    value, low, high = factor * one.value, factor * one.low, factor * one.high
    width = high - low
    decimals = 0
    while decimals < _MOST_DECIMALS and width * 10**decimals < 10 and (width > 0 or decimals < 1):
        decimals += 1
    return f"{_number(value, decimals)} ({_number(low, decimals)} to {_number(high, decimals)})"


def _number(value: float, decimals: int) -> str:
    text = f"{value:.{decimals}f}"
    return text.removeprefix("-") if not float(text) else text  # avoid -0.0


def table(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows of text in columns; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
