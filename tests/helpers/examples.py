"""Tests that try a few examples or values in `make test`, and many in `make test-full`."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from typing import Any

import pytest
from hypothesis import given, settings


def few_of(values: Iterable[Any], few: Container[Any]) -> list[Any]:
    """Mark the values that are not among the `few` as `full`; for `pytest.mark.parametrize`."""
    return [value if value in few else pytest.param(value, marks=pytest.mark.full) for value in values]


def given_few(
    *strategies: Any, few: int, many: int, **named: Any
) -> Callable[[Callable[..., None]], Callable[[int], None]]:
    """Like `hypothesis.given`, with `few` examples, and with `many` in a case that has the marker `full`."""

    def decorate(check: Callable[..., None]) -> Callable[[int], None]:
        def test(num_examples: int) -> None:
            settings(deadline=None, max_examples=num_examples)(given(*strategies, **named)(check))()

        test.__name__, test.__module__, test.__doc__ = check.__name__, check.__module__, check.__doc__
        cases = [few, pytest.param(many, marks=pytest.mark.full)]
        return pytest.mark.parametrize("num_examples", cases)(test)

    return decorate
