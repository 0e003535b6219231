"""Numbers on the command line: a whole number fits 64 bits and a real one is finite, whatever else bounds them."""

from __future__ import annotations

import math
from typing import Any

import click

_MOST = 1 << 63
_MOST_DIGITS = 20


class WholeNumber(click.IntRange):
    """A whole number within bounds."""

    def __init__(self, least: int | None = None, most: int | None = None) -> None:
        super().__init__(least, most)
        self.name = "integer" if least is most is None else "integer range"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx) if len(str(value)) <= _MOST_DIGITS else _MOST
        if not -_MOST <= number < _MOST:
            self.fail(
                f"a whole number has at most 19 digits, found '{str(value)[:_MOST_DIGITS]}'.", param, ctx
            )
        return number

    def _describe_range(self) -> str:
        return "" if self.min is self.max is None else super()._describe_range()


class RealNumber(click.FloatRange):
    """A finite number within bounds."""

    def __init__(self, least: float | None = None, most: float | None = None, **more: Any) -> None:
        super().__init__(least, most, **more)
        self.name = "float" if least is most is None else "float range"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"'{str(value)[:_MOST_DIGITS]}' is not a finite number.", param, ctx)
        return number

    def _describe_range(self) -> str:
        return "" if self.min is self.max is None else super()._describe_range()
