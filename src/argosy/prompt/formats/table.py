"""Finds a model's format.

    tokens and chat template  ->  find_format  ->  Format        a name  ->  named_format  ->  Format

A model's own tokens are the best evidence. Where formats share tokens or have none, the template shows how it writes
calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from argosy.errors import UsageError
from argosy.installed import members
from argosy.prompt.formats.format import Format

if TYPE_CHECKING:
    from argosy.prompt.tokenizer import Tokenizer

# From the most specific to the most common; the first one that fits wins. `plain` fits every model.
_FILES = (
    "harmony", "kimi_k3", "kimi_k2", "deepseek", "gemma4", "pythonic", "glm", "json_list", "solar",
    "minimax_m2", "minimax_m3", "qwen3_coder", "hermes", "mistral", "plain",
)  # fmt: skip
_FOUND = (form for file in members("argosy.prompt.formats", _FILES) for form in file.FORMATS)
FORMATS: dict[str, type[Format]] = {form.name: form for form in _FOUND}


def find_format(tokenizer: Tokenizer, template: str) -> Format:
    """The format for a model with this tokenizer and chat template; `plain` if none that calls tools matches."""
    return next(form for form in FORMATS.values() if form.fits(tokenizer, template))(tokenizer)


def named_format(name: str, tokenizer: Tokenizer) -> Format:
    """Return the format called `name`.

    Raises:
        UsageError: there is no format with that name.
    """
    if name not in FORMATS:
        raise UsageError(f"unknown format '{name}'; known: {', '.join(sorted(FORMATS))}")
    return FORMATS[name](tokenizer)
