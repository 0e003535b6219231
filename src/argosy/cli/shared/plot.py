"""Draw lines over a common axis as an SVG file: each line has a panel with its own scale."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import floor, log10
from typing import NamedTuple

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 640, 220, 70, 30, 40
_COLOURS = ("#1f6feb", "#b35900")


class Line(NamedTuple):
    label: str
    points: Sequence[tuple[float, float]]  # x ascending, y above zero


def draw(lines: Sequence[Line], marks: Sequence[tuple[str, float]], *, x_label: str) -> str:
    """An SVG document with a panel per line, each with a vertical line at each of `marks`."""
    right = max(x for line in lines for x, _ in line.points)
    panels = [
        _panel(
            line, marks, right, x_label, number * (_HEIGHT + _TOP + _BOTTOM), _COLOURS[number % len(_COLOURS)]
        )
        for number, line in enumerate(lines)
    ]
    height = len(lines) * (_HEIGHT + _TOP + _BOTTOM)
    width = _LEFT + _WIDTH + 20
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12" fill="#444"><rect width="100%" height="100%" fill="white"/>'
        + "".join(panels)
        + "</svg>\n"
    )


def _panel(
    line: Line, marks: Sequence[tuple[str, float]], right: float, x_label: str, top: int, colour: str
) -> str:
    highest = max(y for _, y in line.points)

    def place(x: float, y: float) -> tuple[float, float]:
        return round(_LEFT + _WIDTH * x / right, 1), round(top + _TOP + _HEIGHT * (1 - y / highest), 1)

    floor_y = top + _TOP + _HEIGHT
    parts = [
        f'<text x="{_LEFT}" y="{top + 18}" font-weight="bold" fill="{colour}">{escape(line.label)}</text>'
    ]
    for value in _ticks(highest):
        _, y = place(0, value)
        parts.append(f'<line x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{value:g}</text>')
    for value in _ticks(right):
        x, _ = place(value, 0)
        parts.append(f'<text x="{x}" y="{floor_y + 16}" text-anchor="middle">{value:g}</text>')
    parts.append(f'<text x="{_LEFT + _WIDTH}" y="{floor_y + 32}" text-anchor="end">{escape(x_label)}</text>')
    for label, at in marks:
        x, _ = place(at, 0)
        parts.append(
            f'<line x1="{x}" x2="{x}" y1="{top + _TOP}" y2="{floor_y}" stroke="#888" stroke-dasharray="4 3"/>'
        )
        parts.append(f'<text x="{x + 4}" y="{floor_y - 6}">{escape(label)}</text>')
    path = " ".join(f"{x},{y}" for x, y in (place(*point) for point in line.points))
    parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
    return "".join(parts)


def _ticks(highest: float) -> list[float]:
    """Round numbers from 0 to `highest`, four to nine of them."""
    step = 10.0 ** floor(log10(highest / 2))
    if highest / step > 9:
        step *= 5 if highest / step > 18 else 2
    return [round(number * step, 12) for number in range(int(highest / step) + 1)]
