"""Options shared by several commands, converted to an open engine and sampling parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from argosy.config import SamplingParams
from argosy.errors import UsageError

if TYPE_CHECKING:
    from argosy.cli.settings import Settings
    from argosy.engine.engine import Engine

Command = TypeVar("Command", bound=Callable[..., Any])

_ENGINE = (
    click.option("--memory", metavar="SIZE", help="Budget of the whole process: 8GiB, 8GB, 75%."),
    click.option(
        "--threads", type=click.IntRange(min=1), metavar="N", help="Compute threads; default: all cores."
    ),
    click.option("--context", type=click.IntRange(min=1), metavar="N", help="Context length in tokens."),
    click.option("--kv", "kv_dtype", type=click.Choice(["f32", "f16"]), help="Format of the KV cache."),
    click.option("--instruction-set", metavar="NAME", help="Use at most plain, avx2 or avx512."),
)

_SAMPLING = (
    click.option(
        "-n", "--max-tokens", type=int, metavar="N", help="Maximum length of the answer; default 256."
    ),
    click.option(
        "-t", "--temperature", type=float, metavar="X", help="0, the default, picks the likeliest token."
    ),
    click.option("--top-k", type=int, metavar="N", help="Sample from the N likeliest tokens."),
    click.option("--top-p", type=float, metavar="X", help="Sample from the likeliest that sum to X."),
    click.option("--min-p", type=float, metavar="X", help="Drop tokens under X times the best probability."),
    click.option(
        "--repetition-penalty", type=float, metavar="X", help="Above 1: repeat prompt and answer less."
    ),
    click.option(
        "--presence-penalty", type=float, metavar="X", help="Lower the logit of tokens in the answer by X."
    ),
    click.option("--frequency-penalty", type=float, metavar="X", help="The same, once per occurrence."),
    click.option("--seed", type=int, metavar="N", help="Make sampling repeatable."),
    click.option("--stop", multiple=True, metavar="TEXT", help="Stop before TEXT; may be repeated."),
    click.option(
        "--logit-bias", multiple=True, metavar="ID=X", help="Add X to a token's logit; may be repeated."
    ),
    click.option(
        "--logprobs", type=int, metavar="N", help="With --json: the N likeliest tokens at each step."
    ),
    click.option("--ignore-eos", is_flag=True, help="Continue after the end token."),
)


def engine_options(command: Command) -> Command:
    for option in reversed(_ENGINE):
        command = option(command)
    return command


def sampling_options(command: Command) -> Command:
    for option in reversed(_SAMPLING):
        command = option(command)
    return command


def thoughts_option(command: Command) -> Command:
    return click.option(
        "--thoughts/--no-thoughts",
        "thoughts",
        default=None,
        help="Show thoughts on stderr; default: on a terminal.",
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
def open_engine(model: str, settings: Settings, **more: Any) -> Iterator[Engine]:
    """Open the engine of a command, with a progress bar on a terminal."""
    from argosy import Engine
    from argosy.cli.output import progress_bar

    with progress_bar() as progress:
        engine = Engine.open(model, progress=progress, **settings.for_engine(), **more)
    with engine:
        yield engine
