"""What locality does a model's routing have, compared with recordings from trained models?

    python benchmarks/routing.py /tmp/mid-Q4_0.gguf [--documents 2] [--tokens 128] [--memory 50%]

The model reads its own documents (`random_weights.py`) and the engine reports which experts ran. For the model and for
each recorded trace this prints: how many of a token's experts the previous token had used (and two, eight, 32 before),
how many experts a layer uses over the whole answer, and the hit rate of a least-recently-used cache per layer,
including first uses. Chance is the result of independent uniform choices. For the model, it also prints how many of a
layer's experts its router names one layer early, from the hidden state before that layer's experts: look-ahead depends
on this.
"""

from __future__ import annotations

import argparse
import sys
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from random_weights import RandomWeights, document

LAGS = (1, 2, 8, 32)
RESIDENCIES = (6, 12, 25, 50, 75)  # percent
TOKENS = 128  # the same number as in the recordings
Choices = NDArray[np.int64]  # [layers, tokens, k]


def overlap(choices: Choices, lag: int) -> float:
    """Share of a token's experts that the token `lag` before it had as well, over all layers."""
    now, before = choices[:, lag:], choices[:, :-lag]
    return float((now[..., :, None] == before[..., None, :]).any(axis=-1).mean())


def lru_hit_rate(choices: Choices, num_slots: int) -> float:
    """Hit rate of one least-recently-used order per layer, from cold."""
    hits = 0
    for layer in choices:
        order: OrderedDict[int, None] = OrderedDict()
        for token in layer.tolist():
            hits += sum(expert in order for expert in token)
            for expert in token:
                order.pop(expert, None)
                order[expert] = None
            while len(order) > num_slots:
                order.popitem(last=False)
    return hits / choices.size


def figures(choices: Choices, num_experts: int) -> dict[str, float]:
    found = {f"overlap {lag}": overlap(choices, lag) for lag in LAGS}
    found["used"] = float(np.mean([len(np.unique(layer)) for layer in choices])) / num_experts
    for percent in RESIDENCIES:
        num_slots = max(1, round(num_experts * percent / 100))
        found[f"LRU {percent} %"] = lru_hit_rate(choices, num_slots)
    return found


def print_table(rows: Sequence[tuple[str, int, int, dict[str, float]]]) -> None:
    columns = list(rows[0][3])
    print(f"{'routing':<26}{'k of E':>9}" + "".join(f"{name:>11}" for name in columns))
    for name, k, num_experts, found in rows:
        cells = "".join(f"{found[column]:>11.2f}" for column in columns)
        print(f"{name:<26}{f'{k}/{num_experts}':>9}{cells}")


def recorded() -> list[tuple[str, int, int, dict[str, float]]]:
    """Figures of the recorded answers, if available."""
    from replay import RECORDED, read_trace

    rows = []
    for path in sorted(RECORDED.glob("*.route.csv")):
        trace = read_trace(path)
        # A row may occur twice in the recording, and a layer may then have fewer experts: take the first k distinct
        # ones.
        k = trace.experts_per_token
        answer = [[list(dict.fromkeys(experts))[:k] for experts in token] for token in trace.answer]
        whole = [token for token in answer if all(len(experts) == k for experts in token)]
        choices = np.array(whole, np.int64).transpose(1, 0, 2)
        rows.append((f"recorded: {trace.name}", k, trace.num_experts, figures(choices, trace.num_experts)))
    return rows


def chance(layers: int, tokens: int, k: int, num_experts: int) -> dict[str, float]:
    random = np.random.default_rng(0)
    order = random.random((layers, tokens, num_experts)).argsort(axis=-1)
    return figures(order[..., :k], num_experts)


def print_locality(weights: RandomWeights, tokens: int = TOKENS) -> None:
    """Print the expected locality from embeddings and routers alone: no layer runs."""
    config = weights.config
    ids = np.array(document(1, tokens, vocab=config.vocab_size))
    print_beside_recorded(f"{weights.routing}, as drawn", weights.chosen(ids), config.num_experts)


def print_beside_recorded(name: str, choices: Choices, num_experts: int) -> dict[str, float]:
    layers, tokens, k = choices.shape
    found = figures(choices, num_experts)
    rows = [
        (name, k, num_experts, found),
        ("chance", k, num_experts, chance(layers, tokens, k, num_experts)),
    ]
    print_table(rows + recorded())
    return found


def observed(
    model: Path, prompt: list[int], num_tokens: int, memory: str
) -> tuple[Choices, list[int], int, float]:
    """The engine's choices during an answer, the answer, the number of experts, and how many were named early."""
    from argosy import Engine, SamplingParams

    steps: list[dict[int, list[int]]] = []
    guess: list[int] = []
    num_right: list[float] = []

    def observe(layer: int, expert_ids: NDArray[np.int32]) -> None:
        if expert_ids.shape[0] != 1:
            return  # the prompt
        if not steps or layer in steps[-1]:
            steps.append({})
        steps[-1][layer] = chosen = expert_ids[0].tolist()
        if guess:
            num_right.append(len(set(guess) & set(chosen)) / len(chosen))
        guess[:] = [expert for rank in engine._started.model.decoder._stack.look_ahead() for expert in rank]

    with Engine.open(
        model, memory=memory, context=len(prompt) + num_tokens + 1, observe_routes=observe
    ) as engine:
        params = SamplingParams(max_tokens=num_tokens + 1, ignore_eos=True)
        answer = engine.generate(prompt, params).token_ids
        layers = engine.config.moe_layers
        choices = np.array([[step[layer] for layer in layers] for step in steps]).transpose(1, 0, 2)
        return choices, answer, engine.config.num_experts, float(np.mean(num_right))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--documents", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--memory", default="70%")
    options = parser.parse_args()
    from common import Report

    report = Report("routing", state="decode, from cold")
    per_document, early, kept, asked = [], [], 0, 0
    for number in range(1, options.documents + 1):
        expected = document(number, 16 + options.tokens + 1)
        choices, answer, num_experts, named_early = observed(
            options.model, expected[:16], options.tokens, options.memory
        )
        early.append(named_early)
        kept += sum(a == b for a, b in zip(answer, expected[16:], strict=True))
        asked += len(answer)
        per_document.append(choices)
    report.correct(f"{kept}/{asked} tokens of the answers continue their documents")
    report.opening()
    together = np.concatenate(per_document, axis=1)
    found = print_beside_recorded(options.model.name, together, num_experts)
    print(f"named one layer early: {np.mean(early):.3f} of the experts")
    for name, value in (found | {"named one layer early": float(np.mean(early))}).items():
        report.record(f"{options.model.name} {name}", "share", [value], [])
    return 0 if kept == asked else 1


if __name__ == "__main__":
    sys.exit(main())
