"""Show the demo model a picture that is drawn now, and let it hear a spoken question.

    python examples/look_and_listen.py [SEED]

Each line is what was asked, what the model says, and what is right.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
from PIL import Image as Drawing
from PIL import ImageDraw

from argosy import Audio, Engine, Image, SamplingParams, Text

COLOURS = {"red": (214, 40, 40), "green": (40, 150, 60), "blue": (35, 85, 205), "purple": (130, 55, 170)}
CORNERS = {"square": 4, "triangle": 3, "circle": 64}
QUESTION = Path(__file__).with_name("question.flac")  # a voice that training never had


def draw(shapes: list[tuple[str, str]]) -> Drawing.Image:
    """Shapes from left to right, each a colour and a name."""
    picture = Drawing.new("RGB", (384, 384), "white")
    pen = ImageDraw.Draw(picture)
    for at, (colour, shape) in enumerate(shapes):
        centre = (384 * (at + 0.5) / len(shapes), 192, 36)
        pen.regular_polygon(centre, CORNERS[shape], fill=COLOURS[colour])
    return picture


def main() -> None:
    rng = random.Random(int(sys.argv[1]) if len(sys.argv) > 1 else None)
    shapes = list(zip(rng.sample(list(COLOURS), 2), rng.sample(list(CORNERS), 2), strict=True))
    picture = Image(np.asarray(draw(shapes)))
    (colour, shape), (other_colour, other_shape) = shapes
    asked = [
        ("What is in the picture?", f"A {colour} {shape} and a {other_colour} {other_shape}."),
        (f"What color is the {shape}?", f"{colour.capitalize()}."),
        (f"Is there a yellow {shape}?", "No."),
        ("How many shapes are there?", "Two."),
    ]
    with Engine.open("demo") as engine:
        short = SamplingParams(max_tokens=32, temperature=0)
        print(f"a picture of a {colour} {shape} and a {other_colour} {other_shape}")
        for question, right in asked:
            answer = engine.generate([picture, Text(f"\n{question}")], short).text
            print(f"  {question}  {answer}  ({right})")
        print("a voice asks for the capital of France")
        print(f"  {engine.generate([Audio(QUESTION)], short).text}")


if __name__ == "__main__":
    main()
