"""Train the pairs of a `Mixture` on examples, and say how it goes.

AdamW, a cosine from the peak of the learning rate to a twentieth of it after a short warm-up, gradients clipped to a
norm of 1. The order of rows follows from the seed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from argosy.adapters.making.mixture import Mixture
from argosy.adapters.making.rows import Example
from argosy.errors import ArgosyError

BATCH_ROWS = 8
BATCH_TOKENS = 2048  # a longer row is a batch of its own
_MOST_HELD_OUT = 32  # rows
_WARM_UP_STEPS = 10

Tell = Callable[[int, float, float], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Losses are in nats per learned token; None: no row was held out. `seconds` are those of the steps."""

    held_out_before: float | None
    held_out_after: float | None
    seconds: float


def split(examples: Sequence[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """Return the examples to train on, and a tenth of them, at most 32, that is held out; none of a single row."""
    order = np.random.default_rng(seed).permutation(len(examples))
    count = min(_MOST_HELD_OUT, max(1, len(examples) // 10)) if len(examples) > 1 else 0
    return [examples[at] for at in sorted(order[count:])], [examples[at] for at in sorted(order[:count])]


def train(
    model: Mixture,
    learned: Sequence[Example],
    held_out: Sequence[Example],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    tell: Tell,
) -> Outcome:
    """Train the pairs of the model in place.

    Args:
        tell: called after each step with its number, its mean loss and the seconds since the start.

    Raises:
        ArgosyError: a loss is not a finite number.
    """
    before = mean_loss(model, held_out)
    started = time.monotonic()
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    queue = batches(learned, seed)
    for step in range(1, steps + 1):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * _share(step, steps)
        batch = next(queue)
        loss = _sum_of_losses(model, batch) / sum(int(one.is_learned.sum()) for one in batch)
        if not math.isfinite(value := loss.item()):
            raise ArgosyError(
                f"the loss of step {step} is {value}, so training stopped and nothing was written",
                hint=f"`--learning-rate {learning_rate / 4:.1g}` may work",
            )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        tell(step, value, time.monotonic() - started)
    seconds = time.monotonic() - started
    return Outcome(before, mean_loss(model, held_out), seconds)


def mean_loss(model: Mixture, examples: Sequence[Example]) -> float | None:
    """Return the mean loss of the learned tokens, in nats; None without examples."""
    if not examples:
        return None
    total = 0.0
    with torch.inference_mode():
        for one in examples:
            total += _sum_of_losses(model, [one]).item()
    return total / sum(int(one.is_learned.sum()) for one in examples)


def batches(examples: Sequence[Example], seed: int) -> Iterator[list[Example]]:
    """Yield batches for ever: shuffled passes over the examples."""
    chance = np.random.default_rng(seed)
    batch: list[Example] = []
    while True:
        for at in chance.permutation(len(examples)):
            one = examples[at]
            if batch and (
                len(batch) == BATCH_ROWS or sum(len(row.ids) for row in batch) + len(one.ids) > BATCH_TOKENS
            ):
                yield batch
                batch = []
            batch.append(one)
        if len(examples) <= BATCH_ROWS:  # few rows: a batch has none of them twice
            yield batch
            batch = []


def _share(step: int, steps: int) -> float:
    """The learning rate of a step, as a share of its peak."""
    warm = min(1.0, step / min(_WARM_UP_STEPS, steps))
    return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps)))


def _sum_of_losses(model: Mixture, examples: Sequence[Example]) -> torch.Tensor:
    return model.loss(
        [torch.from_numpy(one.ids) for one in examples],
        [torch.from_numpy(one.is_learned) for one in examples],
    )
