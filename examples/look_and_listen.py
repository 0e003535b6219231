"""Show the demo model pictures that are drawn now, and let it hear a spoken question.

    python examples/look_and_listen.py [SEED]

Each line is what was asked, what the model says, and what is right.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
from PIL import Image as Drawing
from PIL import ImageDraw, ImageFont

from argosy import Audio, Engine, Image, SamplingParams, Text

SIDE = 384
COLOURS = {"red": (214, 40, 40), "green": (40, 150, 60), "blue": (35, 85, 205), "purple": (130, 55, 170)}
CORNERS = {"square": 4, "triangle": 3, "circle": 64}
TITLES = ("Sales", "Prices", "Energy")
LABELS = ("tea", "coffee", "milk", "water")
QUESTION = Path(__file__).with_name("question.flac")  # a voice that training never had


def draw_shapes(shapes: list[tuple[str, str]]) -> Drawing.Image:
    """Shapes from left to right, each a colour and a name."""
    picture = Drawing.new("RGB", (SIDE, SIDE), "white")
    pen = ImageDraw.Draw(picture)
    for at, (colour, shape) in enumerate(shapes):
        centre = (SIDE * (at + 0.5) / len(shapes), 192, 36)
        pen.regular_polygon(centre, CORNERS[shape], fill=COLOURS[colour])
    return picture


def draw_bars(title: str, bars: dict[str, tuple[float, str]]) -> Drawing.Image:
    """A bar chart in a font that training never had; each bar has a height up to 1 and a colour."""
    picture = Drawing.new("RGB", (SIDE, SIDE), "white")
    pen = ImageDraw.Draw(picture)
    left, right, bottom, top = 18, 376, 344, 72
    pen.text((192, 26), title, "black", ImageFont.load_default(40), anchor="mm")
    pen.line([(left, top), (left, bottom), (right, bottom)], "gray", 2)
    width = (right - left) / len(bars)
    for at, (label, (height, colour)) in enumerate(bars.items()):
        x = left + width * (at + 0.5)
        box = (x - 0.3 * width, bottom - height * (bottom - top), x + 0.3 * width, bottom)
        pen.rectangle(box, fill=COLOURS[colour])
        pen.text((x, 364), label, "black", ImageFont.load_default(28), anchor="mm")
    return picture


def main() -> None:
    rng = random.Random(int(sys.argv[1]) if len(sys.argv) > 1 else None)
    shapes = list(zip(rng.sample(list(COLOURS), 2), rng.sample(list(CORNERS), 2), strict=True))
    (colour, shape), (other_colour, other_shape) = shapes
    about_shapes = [
        ("What is in the picture?", f"A {colour} {shape} and a {other_colour} {other_shape}."),
        (f"What color is the {shape}?", f"{colour.capitalize()}."),
        (f"Where is the {other_colour} {other_shape}?", "In the middle right."),
        (f"Is there a yellow {shape}?", "No."),
        ("How many shapes are there?", "Two."),
    ]
    title, (tall, *others), colours = rng.choice(TITLES), rng.sample(LABELS, 3), rng.sample(list(COLOURS), 3)
    bars = dict(zip((tall, *others), zip((1.0, 0.7, 0.4), colours, strict=True), strict=True))
    bars = {label: bars[label] for label in rng.sample(list(bars), 3)}
    about_bars = [
        ("What kind of chart is this?", "A bar chart."),
        ("What is the title of the chart?", f"The title is {title}."),
        ("Which bar is the tallest?", f"The tallest bar is {tall}."),
        ("What color is the tallest bar?", f"{colours[0].capitalize()}."),
    ]
    with Engine.open("demo") as engine:
        short = SamplingParams(max_tokens=32, temperature=0)
        for told, drawn, asked in (
            (
                f"a picture of a {colour} {shape} and a {other_colour} {other_shape}",
                draw_shapes(shapes),
                about_shapes,
            ),
            (f"a bar chart of {', '.join(bars)}", draw_bars(title, bars), about_bars),
        ):
            print(told)
            picture = Image(np.asarray(drawn))
            for question, right in asked:
                answer = engine.generate([picture, Text(f"\n{question}")], short).text
                print(f"  {question}  {answer}  ({right})")
        print("a voice asks for the capital of France")
        print(f"  {engine.generate([Audio(QUESTION)], short).text}")


if __name__ == "__main__":
    main()
