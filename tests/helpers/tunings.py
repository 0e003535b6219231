"""Choices of how products run, kept as a probe would keep them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import get_args

import pytest

from argosy import _native
from argosy.config import AskAhead, Format, Tuning
from argosy.machine import tuning


def use_cache(monkeypatch: pytest.MonkeyPatch, directory: Path, *, probe_s: float = 0.001) -> None:
    """Tune as a user's process does, in a cache of its own; so short a probe makes one pass."""
    monkeypatch.delenv("ARGOSY_TUNE", raising=False)
    monkeypatch.setenv("ARGOSY_CACHE", str(directory))
    monkeypatch.setattr(tuning, "PROBE_S", probe_s)
    tuning._chosen.cache_clear()


def keep(tunings: dict[Format, Tuning], threads: int, instruction_set: str) -> None:
    choices = {name: tuning.FormatChoice(each, 1e9, 1.5, 1.0, 1.0) for name, each in tunings.items()}
    tuning._keep(instruction_set, lambda known: known.with_formats(threads, choices))
    tuning._chosen.cache_clear()


def random_tunings(seed: int) -> dict[Format, Tuning]:
    dice = random.Random(seed)
    limits = range(_native.FEWEST_FOR_TWO_PANELS, _native.MOST_FOR_ONE_PANEL + 2)
    ways, amx = get_args(AskAhead), (0, *tuning._AMX_TOKENS)
    return {
        name: Tuning(dice.choice(ways), dice.choice(ways), dice.choice(limits), dice.choice(amx))
        for name in tuning.FORMATS
    }
