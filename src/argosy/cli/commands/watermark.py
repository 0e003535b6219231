"""`argosy watermark`: make a watermark key, and judge whether a text carries its watermark."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from argosy.cli.commands import completion
from argosy.cli.shared.numbers import RealNumber
from argosy.config import DEMO
from argosy.errors import UsageError

if TYPE_CHECKING:
    from argosy.guard.watermark import Evidence

_FALSE_POSITIVES = 1e-4  # at most this fraction of unmarked texts is called marked


@click.group("watermark")
def watermark() -> None:
    """Make a watermark key, and detect its watermark in a text.

    \b
    Examples:
      argosy watermark key mark.key
      argosy watermark detect answer.txt --key mark.key -m ./Qwen3-30B-A3B
    """


@watermark.command("key")
@click.argument("path", metavar="FILE", type=click.Path(path_type=Path))
def make_key(path: Path) -> None:
    """Make a secret key in FILE, which only its owner can read. `argosy serve --watermark FILE` marks texts with it.

    Anyone with the key can recognise marked texts, remove the mark, and write texts that carry it.
    """
    from argosy.engine.watermark import make_key

    make_key(path)
    print(f"made {path}: keep it secret, and keep it as long as its marks are to be recognised")


@watermark.command("detect")
@click.argument("file", metavar="FILE", shell_complete=completion.files)
@click.option(
    "--key",
    "key_file",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Key of the watermark.",
)
@click.option(
    "-m",
    "--model",
    default=DEMO,
    metavar="MODEL",
    shell_complete=completion.models,
    help="Model whose tokenizer made the text; default: the demo.",
)
@click.option(
    "--false-positives",
    default=_FALSE_POSITIVES,
    show_default=True,
    metavar="X",
    type=RealNumber(0, 1, min_open=True, max_open=True),
    help="Call a text marked if fewer unmarked ones score as high.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the same facts as JSON.")
def detect(file: str, key_file: Path, model: str, false_positives: float, as_json: bool) -> None:
    """Judge whether the text in FILE (- for stdin) was sampled with the watermark of a key.

    The p-value is exact: the probability that a text without the watermark scores as high. Short, rewritten or
    predictable texts show no mark, so "not shown" never means that a person wrote it.
    """  # fmt: skip
    from argosy.cli.shared.texts import STDIN, read_file
    from argosy.engine.watermark import Watermark
    from argosy.guard.watermark import first_ngrams, judge
    from argosy.open.models import locate_model
    from argosy.prompt.tokenizer import Tokenizer

    mark = Watermark.read(key_file)
    text = read_file(Path("/dev/stdin" if file == STDIN else file), name="stdin" if file == STDIN else None)
    tokenizer = Tokenizer.open(locate_model(model))
    if tokenizer is None:
        raise UsageError(f"{model} has no tokenizer, and a watermark is in the tokens")
    token_ids = tokenizer.encode(text)
    evidence = judge(mark.words(first_ngrams(token_ids)))
    is_marked = evidence.log10_p < math.log10(false_positives)
    if as_json:
        print(json.dumps(_facts(evidence, is_marked, len(token_ids))))
    else:
        print(*_lines(evidence, is_marked, len(token_ids)), sep="\n")


def _facts(evidence: Evidence, is_marked: bool, num_tokens: int) -> dict[str, object]:
    return {
        "is_marked": is_marked, "p_value": evidence.p_value, "log10_p": evidence.log10_p, "score": evidence.score,
        "tokens": num_tokens, "counted": evidence.num_counted,
    }  # fmt: skip


def _lines(evidence: Evidence, is_marked: bool, num_tokens: int) -> list[str]:
    p_value = f"{evidence.p_value:.2g}" if evidence.log10_p > -300 else f"1e{evidence.log10_p:.0f}"
    verdict = f"{'yes' if is_marked else 'not shown'}, p = {p_value}"
    score = "none" if evidence.score is None else f"{evidence.score:.3f}, 0.500 without the watermark"
    counted = f"{evidence.num_counted} of {num_tokens} counted: each context of words once"
    return [f"marked   {verdict}", f"score    {score}", f"tokens   {counted}"]
