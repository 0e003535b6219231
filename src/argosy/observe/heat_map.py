"""Draw how often each expert is chosen, layers x experts per domain, as an SVG. Needs no library.

The colour shows how often an expert is chosen compared with an even share of its layer: white means never, the
darkest shade at least HOTTEST times as often. Cells of one colour form one path, so the file stays small: 60 layers
of 384 experts in four domains take 0.4 to 1.3 MB.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

HOTTEST = 4.0
_COLOURS = (
    "#e8f1f2", "#d0e4e6", "#b5d5d9", "#97c5cb", "#79b3bc", "#5b9fac", "#41899a", "#2d7286", "#1d5b70", "#10445a",
)  # fmt: skip
_WIDEST, _LARGEST_CELL = 640, 16
_LEFT, _TOP, _BETWEEN, _LEGEND = 52, 64, 44, 52
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#222}.title{font-weight:600}.small{font-size:10px;fill:#555}"
)


def draw(shares: NDArray[np.float64], *, domains: Sequence[str], layers: Sequence[int], title: str) -> str:
    """Return the picture as SVG text.

    Args:
        shares: [domains, layers, experts]: each expert's share of its layer's choices; each layer sums to 1.
    """
    _, num_layers, num_experts = shares.shape
    width = max(2, min(_LARGEST_CELL, _WIDEST // num_experts))
    height = max(3, min(_LARGEST_CELL, _WIDEST // num_layers))
    columns = max(1, min(len(domains), 960 // (num_experts * width + _BETWEEN)))
    rows = -(-len(domains) // columns)
    panel_width = num_experts * width + _BETWEEN
    panel_height = num_layers * height + _BETWEEN + 12
    whole_width = max(_LEFT + columns * panel_width, 420)
    whole_height = _TOP + rows * panel_height + _LEGEND
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {whole_width} {whole_height}"'
        f' width="{whole_width}" height="{whole_height}" role="img" aria-label="{escape(title)}">',
        f"<style>{_STYLE}</style>",
        '<rect width="100%" height="100%" fill="#fff"/>',
        f'<text class="title" x="{_LEFT}" y="24">{escape(title)}</text>',
    ]
    for number, domain in enumerate(domains):
        x = _LEFT + number % columns * panel_width
        y = _TOP + number // columns * panel_height
        parts.append(f'<text x="{x}" y="{y - 8}">{escape(domain)}</text>')
        parts += _axes(x, y, width, height, layers, num_experts)
        parts += _cells(shares[number] * num_experts, x, y, width, height)
    parts += _legend(_LEFT, whole_height - _LEGEND + 12)
    return "\n".join([*parts, "</svg>", ""])


def _cells(times_even: NDArray[np.float64], x: int, y: int, width: int, height: int) -> list[str]:
    levels = np.minimum(times_even / HOTTEST * len(_COLOURS), len(_COLOURS) - 1).astype(int)
    levels[times_even == 0] = -1
    paths = []
    for level, colour in enumerate(_COLOURS):
        cells = "".join(
            f"M{x + expert * width} {y + layer * height}h{width}v{height}h-{width}z"
            for layer, expert in np.argwhere(levels == level).tolist()
        )
        if cells:
            paths.append(f'<path fill="{colour}" d="{cells}"/>')
    frame = f'width="{times_even.shape[1] * width}" height="{times_even.shape[0] * height}"'
    return [*paths, f'<rect x="{x}" y="{y}" {frame} fill="none" stroke="#999"/>']


def _axes(x: int, y: int, width: int, height: int, layers: Sequence[int], num_experts: int) -> list[str]:
    bottom, right = y + len(layers) * height, x + num_experts * width
    ends = [
        f'<text class="small" x="{x - 6}" y="{y + height}" text-anchor="end">{layers[0]}</text>',
        f'<text class="small" x="{x - 6}" y="{bottom}" text-anchor="end">{layers[-1]}</text>',
        f'<text class="small" x="{x}" y="{bottom + 14}">expert 0</text>',
        f'<text class="small" x="{right}" y="{bottom + 14}" text-anchor="end">{num_experts - 1}</text>',
    ]
    middle = (y + bottom) // 2
    return [
        *ends,
        f'<text class="small" x="{x - 14}" y="{middle}" text-anchor="middle"'
        f' transform="rotate(-90 {x - 14} {middle})">layer</text>',
    ]


def _legend(x: int, y: int) -> list[str]:
    swatches = [
        f'<rect x="{x + 14 * i}" y="{y}" width="14" height="10" fill="{colour}"/>'
        for i, colour in enumerate(_COLOURS)
    ]
    right = x + 14 * len(_COLOURS)
    return [
        *swatches,
        f'<text class="small" x="{x}" y="{y + 24}">rarely; white: never</text>',
        f'<text class="small" x="{right + 8}" y="{y + 9}">{HOTTEST:g} times an even share, or more</text>',
    ]
