"""Finds a model's format.

    tokens and chat template  ->  find_format  ->  Format        a name  ->  named_format  ->  Format

A model's own tokens are the best evidence. Where formats share tokens or have none, the template shows how it writes
calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from argosy.errors import UsageError
from argosy.prompt.formats import (
    deepseek,
    gemma4,
    glm,
    harmony,
    hermes,
    kimi_k2,
    minimax_m2,
    mistral,
    qwen3_coder,
)
from argosy.prompt.formats.format import Format
from argosy.prompt.formats.plain import Plain

if TYPE_CHECKING:
    from argosy.prompt.tokenizer import Tokenizer

_Is = Callable[["Tokenizer", str], bool]


def _has(*tokens: str) -> _Is:
    return lambda tokenizer, template: all(tokenizer.control_id(token) is not None for token in tokens)


def _says(*words: str) -> _Is:
    return lambda tokenizer, template: all(word in template for word in words)


def _both(*conditions: _Is) -> _Is:
    return lambda tokenizer, template: all(condition(tokenizer, template) for condition in conditions)


# From the most specific to the most common; the first match wins.
_TABLE: tuple[tuple[_Is, type[Format]], ...] = (
    (_has(harmony.START, harmony.CHANNEL, harmony.MESSAGE), harmony.Harmony),
    (_has(kimi_k2.ALL_BEGIN, kimi_k2.BEGIN), kimi_k2.KimiK2),
    (_both(_has(deepseek.ALL_BEGIN), _says("```")), deepseek.DeepSeekV3),
    (_has(deepseek.ALL_BEGIN), deepseek.DeepSeekV31),
    (_has(gemma4.CHANNEL, gemma4.CHANNEL_END), gemma4.Gemma4),
    (_says(minimax_m2.OPEN), minimax_m2.MiniMaxM2),
    (_says(f"{glm.KEY_END}{glm.VALUE}"), glm.Glm47),
    (_says(glm.KEY), glm.Glm),
    (_says(qwen3_coder.FUNCTION), qwen3_coder.Qwen3Coder),
    (_says(hermes.OPEN), hermes.Hermes),
    (_says(mistral.CALLS), mistral.Mistral),
)

_ALL: tuple[type[Format], ...] = (*(form for _, form in _TABLE), Plain)
FORMATS = {form.name: form for form in _ALL}


def find_format(tokenizer: Tokenizer, template: str) -> Format:
    """The format for a model with this tokenizer and chat template; `plain` if none that calls tools matches."""
    for fits, form in _TABLE:
        if fits(tokenizer, template):
            return form(tokenizer)
    return Plain(tokenizer)


def named_format(name: str, tokenizer: Tokenizer) -> Format:
    """Return the format called `name`.

    Raises:
        UsageError: there is no format with that name.
    """
    if name not in FORMATS:
        raise UsageError(f"unknown format '{name}'; known: {', '.join(sorted(FORMATS))}")
    return FORMATS[name](tokenizer)
