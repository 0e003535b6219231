"""Answer several prompts at once: they share every expert that is read, and each answer is the same as alone.

python examples/answer_together.py
"""

from __future__ import annotations

from argosy import Engine, SamplingParams

PROMPTS = ["What is the capital of France?", "What is the capital of Italy?", "What is the capital of Spain?"]


def main() -> None:
    with Engine.open("demo") as engine:
        results = engine.generate_batch(PROMPTS, SamplingParams(max_tokens=32))
        for prompt, result in zip(PROMPTS, results, strict=True):
            print(f"{prompt}  {result.text}")
        total = engine.ledger
        print(f"{total.new_tokens} tokens in {total.wall_s:.1f} s, hit rate {total.hit_rate}")


if __name__ == "__main__":
    main()
