"""Measure how removing an expert changes the loss of each domain, on the same tokens with and without it.

The router chooses among the remaining experts (`Engine.forbid_experts`), so the change shows how well they replace
the removed one. That understates the expert's contribution, because a similar one takes over most of its work.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from argosy.errors import UsageError

_EXPERT = re.compile(r"(\*|\d{1,6}):(\d{1,6})")
_HINT = "LAYER:EXPERT,... removes each alone, *:EXPERT removes it in all layers at once, and `all` every expert alone"


@dataclass(frozen=True, slots=True)
class Removal:
    """Experts removed together, by layer; `name` is LAYER:EXPERT, or *:EXPERT for all layers."""

    name: str
    experts: dict[int, tuple[int, ...]]


def parse_removals(text: str, *, layers: tuple[int, ...], num_experts: int) -> list[Removal]:
    """Parse the argument of `--ablate`.

    Raises:
        UsageError: it is malformed, or names a layer or expert that the model does not have.
    """
    if text == "all":
        return [Removal(f"{layer}:{e}", {layer: (e,)}) for layer in layers for e in range(num_experts)]
    found: dict[str, Removal] = {}
    for name in text.split(","):
        match = _EXPERT.fullmatch(name.strip())
        if match is None:
            raise UsageError(f"--ablate cannot be read at '{name[:40]}'", hint=_HINT)
        where, expert = match[1], int(match[2])
        if expert >= num_experts:
            raise UsageError(f"--ablate names expert {expert}, and a layer has 0 to {num_experts - 1}")
        if where != "*" and int(where) not in layers:
            raise UsageError(
                f"--ablate names layer {int(where)}; layers {layers[0]} to {layers[-1]} have routed experts",
                hint=_HINT,
            )
        chosen = layers if where == "*" else (int(where),)
        found[name.strip()] = Removal(name.strip(), dict.fromkeys(chosen, (expert,)))
    return list(found.values())


@dataclass(frozen=True, slots=True)
class Change:
    """The effect of a removal on a domain. Beyond 4 standard errors it is not chance."""

    removal: str
    domain: str
    perplexity: float  # without the expert
    rise: float  # relative rise of the perplexity; below 0 if it falls
    standard_errors: float  # the mean rise of the loss per token, divided by its standard error

    def as_dict(self) -> dict[str, Any]:
        return {
            "removed": self.removal,
            "domain": self.domain,
            "perplexity": self.perplexity,
            "rise": self.rise,
            "standard_errors": self.standard_errors,
        }


def compare(removal: str, domain: str, before: NDArray[np.float64], after: NDArray[np.float64]) -> Change:
    """Compare the losses of the same tokens, at least two, in nats."""
    worse = after - before
    mean, error = float(worse.mean()), float(worse.std(ddof=1)) / math.sqrt(len(worse))
    return Change(
        removal,
        domain,
        perplexity=float(np.exp(after.mean())),
        rise=math.expm1(mean),
        standard_errors=mean / error if error else 0.0,
    )
