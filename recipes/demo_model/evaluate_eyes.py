"""What does the demo model see? Questions about fresh pictures, by task.

    python evaluate_eyes.py --model MODEL --fonts FONTS

Runs Argosy on a checkpoint that `build_demo` writes. The pictures are made on the spot, with fonts and with pairs of a
colour and a shape that training never had. An answer is right if it is the expected sentence, whatever its case and its
punctuation. `evaluate_ears.py` measures what the senses cost text.
"""

from __future__ import annotations

import argparse
import io
import random
from collections import defaultdict
from pathlib import Path

from evaluate_ears import words_of
from pictures import DRAWN, HELD_OUT_PAIRS, NUMBERS, Picture, use_fonts
from PIL import Image as PillowImage

from argosy import Engine, Image, SamplingParams, Text

KINDS = ("scene", "chart", "sign")


def ask(engine: Engine, picture: Picture, question: str) -> str:
    stream = io.BytesIO()
    PillowImage.fromarray(picture.pixels).save(stream, "PNG")
    parts = [Image(stream.getvalue()), Text(f"\n{question}")]
    request = engine.prompts.build([{"role": "user", "content": parts}])
    return engine.generate(request, SamplingParams(max_tokens=48, temperature=0)).text.strip()


def is_new(picture: Picture) -> bool:
    """Whether it shows a pair of a colour and a shape that training never had."""
    return any(
        (mark.words.get("colour"), mark.words.get("shape")) in HELD_OUT_PAIRS for mark in picture.marks
    )


def task_of(task: str, answer: str) -> str:
    """Counts are told apart by how many there are."""
    if task not in ("count", "total"):
        return task
    number = NUMBERS.index(answer.lower().strip("."))
    return f"{task}, {'1 to 5' if number <= 5 else '6 to 9'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--fonts", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=60, help="of each kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    options = parser.parse_args()
    use_fonts(options.fonts)
    rng = random.Random(2 * 10**6)
    right: dict[str, list[bool]] = defaultdict(list)
    mistakes = []
    with Engine.open(options.model, memory="4GiB", context=1024) as engine:
        for kind in options.kinds:
            for _ in range(options.pictures):
                picture = DRAWN[kind](rng, "test")
                for question in picture.questions:
                    found = ask(engine, picture, question.text)
                    is_right = words_of(found) == words_of(question.answer)
                    right[task_of(question.task, question.answer)].append(is_right)
                    if is_new(picture):
                        right["pictures with unseen pairs"].append(is_right)
                    if not is_right:
                        mistakes.append(f"{question.text} {found!r}, not {question.answer!r}")
    print("| task | questions | right |\n|---|---|---|")
    for task, found in right.items():
        print(f"| {task} | {len(found)} | {sum(found) / len(found):.2f} |")
    rng.shuffle(mistakes)
    print("\n".join(mistakes[:20]))


if __name__ == "__main__":
    main()
