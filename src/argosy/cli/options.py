"""Options that several commands share, and what they become: an open engine, and sampling parameters."""

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

DEMO = "demo"

Command = TypeVar("Command", bound=Callable[..., Any])

_ENGINE = (
    click.option("--memory", metavar="SIZE", help="Budget of the whole process: 8GiB, 8GB, 75%."),
    click.option(
        "--threads", type=click.IntRange(min=1), metavar="N", help="Compute threads; default: all cores."
    ),
    click.option("--context", type=click.IntRange(min=1), metavar="N", help="Tokens of the KV cache."),
    click.option("--kv", "kv_dtype", type=click.Choice(["f32", "f16"]), help="Format of the KV cache."),
    click.option("--instruction-set", metavar="NAME", help="Cap: plain, avx2 or avx512."),
)

_SAMPLING = (
    click.option("-n", "--max-tokens", type=int, metavar="N", help="Longest answer; default 256."),
    click.option(
        "-t", "--temperature", type=float, metavar="X", help="0, the default, takes the likeliest token."
    ),
    click.option("--top-k", type=int, metavar="N", help="Keep the N likeliest tokens."),
    click.option("--top-p", type=float, metavar="X", help="Keep the likeliest that sum to X."),
    click.option("--min-p", type=float, metavar="X", help="Keep those X times as likely as the best."),
    click.option(
        "--repetition-penalty", type=float, metavar="X", help="Above 1: repeat prompt and answer less."
    ),
    click.option("--presence-penalty", type=float, metavar="X", help="Off a token the answer has."),
    click.option("--frequency-penalty", type=float, metavar="X", help="The same, for each time."),
    click.option("--seed", type=int, metavar="N", help="Makes a draw repeatable."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End before TEXT; may be repeated."),
    click.option(
        "--logit-bias", multiple=True, metavar="ID=X", help="Add X to a token's logit; may be repeated."
    ),
    click.option("--logprobs", type=int, metavar="N", help="With --json: the N best of each token."),
    click.option("--ignore-eos", is_flag=True, help="Go on after the end token."),
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
        help="Show what the model thinks, on stderr; default: on a terminal.",
    )(command)


def split_options(options: dict[str, Any]) -> tuple[Settings, SamplingParams]:
    """The options of a command as what they mean.

    Raises:
        UsageError: a value out of bounds, or an environment variable that cannot be meant.
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
                f"--logit-bias takes ID=X, found '{pair}'", hint="--logit-bias 1234=-100"
            ) from None
    return result


@contextmanager
def open_engine(model: str, settings: Settings, **more: Any) -> Iterator[Engine]:
    """The engine of a command, opened with a progress bar on a terminal."""
    from argosy import Engine
    from argosy.cli.output import progress_bar

    with progress_bar() as progress:
        engine = Engine(model, progress=progress, **settings.for_engine(), **more)
    with engine:
        yield engine
