"""Which experts answer? Count, per layer, how often each expert of the demo model is chosen for a prompt.

    python examples/watch_routing.py "Write a Python function that adds two numbers."

The choice of experts can reveal the text. Keep such counts as private as the text itself.
"""

from __future__ import annotations

import sys

import numpy as np

from argosy import Engine, SamplingParams


def main() -> None:
    prompt = sys.argv[1] if len(sys.argv) > 1 else "Why is the sky blue?"
    counts: dict[int, np.ndarray] = {}

    def observe(layer: int, expert_ids: np.ndarray) -> None:
        tally = counts.setdefault(layer, np.zeros(engine.config.num_experts, np.int64))
        np.add.at(tally, expert_ids.reshape(-1), 1)

    with Engine.open("demo", observe_routes=observe) as engine:
        print(engine.generate(prompt, SamplingParams(max_tokens=64)).text)
    print("\nlayer  share of choices by expert, in percent")
    for layer, tally in sorted(counts.items()):
        shares = " ".join(f"{100 * count / tally.sum():4.0f}" for count in tally)
        print(f"{layer:5d}  {shares}")


if __name__ == "__main__":
    main()
