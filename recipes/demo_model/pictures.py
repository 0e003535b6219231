"""Draw pictures for the eyes: scenes of shapes, charts and signs, with what is in them and questions about it.

    random numbers -> pixels [192, 192, 3], marks (what lies where), questions with answers

Everything is drawn on the spot, so no picture is seen twice. Some pairs of a colour and a shape, and two families of
fonts, are kept for the test. Titles, labels and signs come from the closed lists below.

    python pictures.py --fonts FONTS --out sheet.png
"""

from __future__ import annotations

import argparse
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from string import ascii_lowercase

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 192
CELL = 24  # the square of pixels that the eye makes one row of
FINE = 2  # pictures are drawn at twice their size, then reduced
COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 150, 60),
    "blue": (35, 85, 205),
    "yellow": (245, 205, 30),
    "orange": (243, 130, 25),
    "purple": (130, 55, 170),
    "pink": (245, 130, 180),
    "brown": (125, 75, 40),
    "black": (20, 20, 20),
    "gray": (135, 135, 135),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "diamond", "ring")
HELD_OUT_PAIRS = {
    ("red", "star"),
    ("blue", "heart"),
    ("green", "ring"),
    ("yellow", "cross"),
    ("purple", "square"),
    ("black", "triangle"),
    ("orange", "circle"),
    ("pink", "diamond"),
}
TITLES = ("Sales", "Traffic", "Growth", "Energy", "Budget", "Prices", "Orders", "Income")
LABELS = (
    ("apples", "lemons", "grapes", "nuts"),
    ("cats", "dogs", "birds", "fish"),
    ("France", "Italy", "Spain", "Japan"),
    ("north", "south", "east", "west"),
    ("tea", "coffee", "milk", "water"),
    ("cars", "buses", "trains", "bikes"),
)
SIGNS = ("stop", "exit", "open", "closed", "push", "pull", "danger", "sale", "hotel", "welcome")
WORDS = (*TITLES, *(label for labels in LABELS for label in labels), *SIGNS)
FONTS = {
    "train": (
        "DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "LiberationSans-Regular", "LiberationSans-Bold",
        "LiberationSerif-Regular", "LiberationSerif-Bold", "LiberationMono-Regular", "Carlito-Regular", "Carlito-Bold",
        "Lato-Regular", "Lato-Bold", "Roboto-Regular", "Roboto-Medium", "Montserrat-Regular", "Quicksand-Medium",
        "FiraCode-Regular",
    ),
    "test": ("OpenSans-Regular", "OpenSans-Semibold", "Caladea-Regular", "Caladea-Bold"),
}  # fmt: skip
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PAIRS = {
    "train": [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in HELD_OUT_PAIRS],
    "test": [(c, s) for c in COLOURS for s in SHAPES],
}

PROPERTIES: dict[str, tuple[str, ...]] = {
    "kind": ("nothing", "shape", "word", "bar", "slice", "point"),
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "row": ("top", "middle", "bottom"),
    "column": ("left", "center", "right"),
    "count": NUMBERS[1:],
    "total": NUMBERS[1:],
    "word": WORDS,
    "chart": ("bar", "pie", "line"),
    "rank": ("other", "largest", "smallest"),
    "letter": tuple(ascii_lowercase),
}
"""The words that marks may have, by property; `total` belongs to the empty ground."""

Colour = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Mark:
    """Something in a picture: its box (left, top, right, bottom) in pixels, and its word for each property.

    text: what is written there, in lower case.   ends: where each of its letters ends.
    """

    box: tuple[float, float, float, float]
    words: dict[str, str]
    text: str = ""
    ends: tuple[float, ...] = ()

    @property
    def centre(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True, slots=True)
class Question:
    task: str
    text: str
    answer: str


@dataclass(frozen=True, slots=True)
class Picture:
    pixels: np.ndarray  # uint8 [SIDE, SIDE, 3]
    marks: list[Mark]
    questions: list[Question]
    total: str = ""  # how many things there are; "" if there is no word for it


def third(position: float, names: Sequence[str]) -> str:
    return names[min(2, int(position / SIDE * 3))]


# ── scenes ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Thing:
    colour: str
    shape: str
    x: float
    y: float
    radius: float

    @property
    def pair(self) -> tuple[str, str]:
        return self.colour, self.shape

    @property
    def mark(self) -> Mark:
        x, y, r = self.x, self.y, self.radius
        return Mark(
            (x - r, y - r, x + r, y + r),
            {
                "kind": "shape",
                "shape": self.shape,
                "colour": self.colour,
                "row": third(y, PROPERTIES["row"]),
                "column": third(x, PROPERTIES["column"]),
            },
        )


def _corners(shape: str) -> list[tuple[float, float]]:
    if shape == "square":
        return [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]
    if shape == "diamond":
        return [(0, -1.1), (0.75, 0), (0, 1.1), (-0.75, 0)]
    if shape == "triangle":
        return [(0, -1), (0.95, 0.75), (-0.95, 0.75)]
    if shape == "star":
        lengths = [1.1 if at % 2 == 0 else 0.45 for at in range(10)]
        return [
            (r * math.sin(at * math.pi / 5), -r * math.cos(at * math.pi / 5)) for at, r in enumerate(lengths)
        ]
    if shape == "cross":
        quarter = [(-0.34, -1.0), (0.34, -1.0), (0.34, -0.34)]
        turns = [(1, 0), (0, 1), (-1, 0), (0, -1)]
        return [(c * x - s * y, s * x + c * y) for c, s in turns for x, y in quarter]
    angles = [at * math.pi / 16 for at in range(32)]
    return [
        (
            math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16,
        )
        for t in angles
    ]  # a heart


CORNERS = {shape: _corners(shape) for shape in SHAPES if shape not in ("circle", "ring")}


def draw_shape(draw: ImageDraw.ImageDraw, thing: Thing, colour: Colour, turn: float, around: Colour) -> None:
    x, y, r = FINE * thing.x, FINE * thing.y, FINE * thing.radius
    if thing.shape in CORNERS:
        c, s = math.cos(turn), math.sin(turn)
        points = [(x + r * (px * c - py * s), y + r * (px * s + py * c)) for px, py in CORNERS[thing.shape]]
        draw.polygon(points, fill=colour)
        return
    draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    if thing.shape == "ring":
        q = 0.55 * r
        draw.ellipse((x - q, y - q, x + q, y + q), fill=around)


def _ground(rng: random.Random) -> Colour:
    kind = rng.randrange(7)
    if kind < 3:
        return 255, 255, 255
    if kind < 6:
        red, green, blue = (rng.randint(205, 255) for _ in range(3))
        return red, green, blue
    dark = rng.randint(20, 60)
    return dark, dark, dark


def _vary(rng: random.Random, colour: Colour) -> Colour:
    red, green, blue = (max(0, min(255, value + rng.randint(-18, 18))) for value in colour)
    return red, green, blue


def _visible(pairs: list[tuple[str, str]], ground: Colour) -> list[tuple[str, str]]:
    return [
        (c, s) for c, s in pairs if sum(abs(a - b) for a, b in zip(COLOURS[c], ground, strict=True)) > 150
    ]


def _place(rng: random.Random, pairs: list[tuple[str, str]], radii: list[float]) -> list[Thing]:
    """Put things where they do not touch, each centre in a cell of its own; those without room are left out."""
    things: list[Thing] = []
    for (colour, shape), radius in zip(pairs, radii, strict=True):
        for _ in range(40):
            x, y = (rng.uniform(radius + 3, SIDE - radius - 3) for _ in range(2))
            if all(math.hypot(x - a.x, y - a.y) > max(35, 1.1 * (radius + a.radius) + 3) for a in things):
                things.append(Thing(colour, shape, x, y, radius))
                break
    return things


def _paint(rng: random.Random, things: list[Thing], ground: Colour) -> np.ndarray:
    image = Image.new("RGB", (SIDE * FINE, SIDE * FINE), ground)
    draw = ImageDraw.Draw(image)
    for thing in things:
        turn = 0.0 if thing.shape == "diamond" else rng.uniform(-0.25, 0.25)
        draw_shape(draw, thing, _vary(rng, COLOURS[thing.colour]), turn, ground)
    return np.asarray(image.reduce(FINE))


def crowd(rng: random.Random, split: str) -> Picture:
    """Many different shapes, to learn from; no questions."""
    ground = _ground(rng)
    pairs = rng.choices(_visible(PAIRS[split], ground), k=rng.randint(8, 20))
    things = _place(
        rng,
        pairs,
        sorted((rng.choice((rng.uniform(11, 20), rng.uniform(11, 32))) for _ in pairs), reverse=True),
    )
    return Picture(_paint(rng, things, ground), [thing.mark for thing in things], [])


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def sentence(words: str) -> str:
    return words[0].upper() + words[1:] + "."


def listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def scene(rng: random.Random, split: str) -> Picture:
    """One to three kinds of things, each once to five times, and questions."""
    ground = _ground(rng)
    known = _visible(PAIRS[split], ground)
    kinds = [rng.choice(known)]
    for _ in range(rng.choice((0, 1, 1, 2))):
        like = rng.random()
        near = [
            pair
            for pair in known
            if pair not in kinds
            and (like > 0.6 or (pair[0] == kinds[0][0] if like < 0.3 else pair[1] == kinds[0][1]))
        ]
        if near:
            kinds.append(rng.choice(near))
    counts = [rng.choice((1, 1, 1, 2, 3, 4, 5)) for _ in kinds]
    sizes = [rng.uniform(12, 32 if sum(counts) < 6 else 20) for _ in kinds]
    order = [at for at, count in enumerate(counts) for _ in range(count)]
    order.sort(key=lambda at: -sizes[at])
    things = _place(rng, [kinds[at] for at in order], [sizes[at] * rng.uniform(0.9, 1.1) for at in order])
    numbers = Counter(thing.pair for thing in things)
    marks = [
        replace(thing.mark, words=thing.mark.words | {"count": NUMBERS[numbers[thing.pair]]})
        for thing in things
    ]
    total = NUMBERS[len(things)] if len(things) < len(NUMBERS) else ""
    return Picture(_paint(rng, things, ground), marks, _scene_questions(rng, things, marks, total), total)


def _scene_questions(
    rng: random.Random, things: list[Thing], marks: list[Mark], total: str
) -> list[Question]:
    counts: dict[tuple[str, str], int] = {}
    for thing in sorted(things, key=lambda one: (int(one.y / CELL), one.x)):  # in the order of reading
        counts[thing.pair] = counts.get(thing.pair, 0) + 1
    told = [
        with_article(f"{c} {s}") if number == 1 else f"{NUMBERS[number]} {c} {plural(s)}"
        for (c, s), number in counts.items()
    ]
    asked = rng.choice(("What is in the picture?", "Describe the picture.", "What do you see?"))
    questions = [Question("describe", asked, sentence(listed(told)))]
    if total:
        questions.append(Question("total", "How many shapes are there?", sentence(total)))
    colour, shape = rng.choice(list(counts))
    number = counts[colour, shape]
    questions.append(
        Question("count", f"How many {colour} {plural(shape)} are there?", sentence(NUMBERS[number]))
    )
    if sum(s == shape for _, s in counts) == 1:
        noun = f"is the {shape}" if number == 1 else f"are the {plural(shape)}"
        questions.append(Question("colour", f"What color {noun}?", sentence(colour)))
    if sum(c == colour for c, _ in counts) == 1:
        noun = f"is the {colour} shape" if number == 1 else f"are the {colour} shapes"
        questions.append(
            Question(
                "shape", f"What {noun}?", sentence(with_article(shape) if number == 1 else plural(shape))
            )
        )
    if single := [mark.words for mark in marks if counts[mark.words["colour"], mark.words["shape"]] == 1]:
        for words in rng.sample(single, min(2, len(single))):
            asked = f"Where is the {words['colour']} {words['shape']}?"
            questions.append(Question("place", asked, sentence(place(words["row"], words["column"]))))
    if rng.random() < 0.5:
        questions.append(Question("yes or no", f"Is there {with_article(f'{colour} {shape}')}?", "Yes."))
    else:
        other = (rng.choice(list(COLOURS)), shape) if rng.random() < 0.5 else (colour, rng.choice(SHAPES))
        answer = "Yes." if other in counts else "No."
        questions.append(Question("yes or no", f"Is there {with_article(' '.join(other))}?", answer))
    return questions


def place(row: str, column: str) -> str:
    return "in the center" if (row, column) == ("middle", "center") else f"in the {row} {column}"


# ── words ───────────────────────────────────────────────────────────────────────────────────────────────────────────

_fonts: dict[str, Path] = {}


def use_fonts(folder: Path) -> None:
    """Find the fonts below `folder`."""
    found = {path.stem: path for path in sorted(folder.rglob("*.[ot]tf"))}
    missing = [name for names in FONTS.values() for name in names if name not in found]
    if missing:
        raise SystemExit(f"fonts missing in {folder}: {', '.join(missing)}; the README lists their packages")
    _fonts.update(found)


@cache
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_fonts[name], size)


class Canvas:
    """A picture at twice its size; positions and sizes are those of the reduced one."""

    def __init__(self, ground: Colour) -> None:
        self.image = Image.new("RGB", (SIDE * FINE, SIDE * FINE), ground)
        self.draw = ImageDraw.Draw(self.image)
        self.marks: list[Mark] = []

    def pixels(self) -> np.ndarray:
        return np.asarray(self.image.reduce(FINE))

    def write(
        self,
        text: str,
        x: float,
        y: float,
        name: str,
        size: float,
        ink: Colour,
        width: float = SIDE,
        word: str = "",
    ) -> Mark:
        """Write `text` around (x, y), no wider than `width`; `word` is how answers spell it, if otherwise."""
        fine = round(size * FINE)
        wide = font(name, fine).getlength(text)
        if wide > width * FINE:
            fine = max(8 * FINE, int(fine * width * FINE / wide))
        self.draw.text((x * FINE, y * FINE), text, font=font(name, fine), fill=ink, anchor="mm")
        half_width, half_height = font(name, fine).getlength(text) / FINE / 2, fine / FINE / 2
        box = (x - half_width, y - half_height, x + half_width, y + half_height)
        ends = tuple(box[0] + font(name, fine).getlength(text[: at + 1]) / FINE for at in range(len(text)))
        name = "letter" if len(text) == 1 else "word"
        return Mark(box, {"kind": "word", name: word or text}, text.lower(), ends)

    def rectangle(self, box: tuple[float, float, float, float], colour: Colour) -> None:
        self.draw.rectangle(tuple(FINE * at for at in box), fill=colour)

    def line(self, points: list[tuple[float, float]], colour: Colour, width: float) -> None:
        fine = [(FINE * x, FINE * y) for x, y in points]
        self.draw.line(fine, fill=colour, width=round(width * FINE))


def _ink(rng: random.Random) -> tuple[Colour, Colour]:
    """A ground and an ink that stands out."""
    light = _vary(rng, (237, 237, 237)) if rng.random() < 0.5 else (255, 255, 255)
    dark = _vary(rng, COLOURS[rng.choice(("black", "black", "blue", "red", "purple", "brown", "green"))])
    return (light, dark) if rng.random() < 0.65 else (dark, light)


def _cased(rng: random.Random, word: str) -> str:
    return rng.choice((word, word.capitalize(), word.capitalize(), word.upper()))


def words(
    rng: random.Random, split: str, sizes: Sequence[int] = (24,), known: Sequence[str] = WORDS
) -> Picture:
    """Many words of `known`, each up to 1.8 times as large as one of `sizes`, to learn from; no questions."""
    ground, ink = _ink(rng)
    canvas = Canvas(ground)
    taken: list[tuple[float, float, float, float]] = []
    least = rng.choice(sizes)
    for _ in range(30):
        word, name = rng.choice(known), rng.choice(FONTS[split])
        text, size = _cased(rng, word), rng.uniform(least, 1.8 * least)
        half = font(name, round(size * FINE)).getlength(text) / FINE / 2
        if 2 * half > SIDE - 8:
            continue
        for _ in range(12):
            x, y = rng.uniform(half + 3, SIDE - half - 3), rng.uniform(size / 2 + 2, SIDE - size / 2 - 2)
            box = (x - half - 3, y - size / 2 - 2, x + half + 3, y + size / 2 + 2)
            if all(box[0] > b[2] or box[2] < b[0] or box[1] > b[3] or box[3] < b[1] for b in taken):
                taken.append(box)
                canvas.marks.append(canvas.write(text, x, y, name, size, ink, word=word))
                break
    return Picture(canvas.pixels(), canvas.marks, [])


def sign(rng: random.Random, split: str) -> Picture:
    """One word of `SIGNS` near the middle, with or without a board."""
    ground, ink = _ink(rng)
    canvas = Canvas(ground)
    word, name, size = rng.choice(SIGNS), rng.choice(FONTS[split]), rng.uniform(24, 36)
    text = _cased(rng, word)
    half = min(SIDE / 2 - 12, font(name, round(size * FINE)).getlength(text) / FINE / 2)
    x, y = (SIDE / 2 + rng.uniform(-8, 8) for _ in range(2))
    if rng.random() < 0.5:
        edge = rng.uniform(5, 9)
        canvas.rectangle((x - half - edge, y - size / 2 - edge, x + half + edge, y + size / 2 + edge), ink)
        ink = ground
    canvas.marks.append(canvas.write(text, x, y, name, size, ink, SIDE - 24, word))
    asked = rng.choice(("What does the sign say?", "What is written here?", "Read the sign."))
    return Picture(canvas.pixels(), canvas.marks, [Question("sign", asked, f"It says {word}.")])


# ── charts ──────────────────────────────────────────────────────────────────────────────────────────────────────────

GREY, INK = (90, 90, 90), (20, 20, 20)
LABEL_Y = SIDE - 10.0  # of labels below an axis
ASKED = {
    "bar": (("tallest bar", "Which bar is the tallest?"), ("shortest bar", "Which bar is the shortest?")),
    "pie": (
        ("largest slice", "Which slice is the largest?"),
        ("smallest slice", "Which slice is the smallest?"),
    ),
    "line": (("highest point", "Where is the line highest?"), ("lowest point", "Where is the line lowest?")),
}
"""For each kind of chart, questions about the largest and the smallest value: the task, and what is asked."""


def chart(rng: random.Random, split: str) -> Picture:
    """A bar, pie or line chart of three or four values, of which one is clearly the largest and one the smallest."""
    kind = rng.choice(tuple(ASKED))
    known = rng.choice(LABELS)
    labels = rng.sample(known, rng.randint(3, len(known)))
    values = _values(rng, len(labels))
    ranks = [
        "largest" if value == max(values) else "smallest" if value == min(values) else "other"
        for value in values
    ]
    ground = (255, 255, 255) if rng.random() < 0.6 else _vary(rng, (238, 238, 238))
    canvas, name, title = Canvas(ground), rng.choice(FONTS[split]), rng.choice(TITLES)
    mark = canvas.write(title, rng.uniform(92, 100), rng.uniform(12, 14), name, rng.uniform(18, 22), INK)
    canvas.marks.append(replace(mark, words=mark.words | {"chart": kind}))
    colours = rng.sample([one for one in COLOURS if one != "black"], len(labels))
    if kind == "pie":
        _pie(rng, canvas, labels, values, ranks, colours, name)
    else:
        if kind == "line" or rng.random() < 0.5:
            colours = [colours[0]] * len(labels)
        _axes(rng, canvas, labels, values, ranks, colours, name, is_line=kind == "line")
    questions = [
        Question("chart kind", "What kind of chart is this?", f"A {kind} chart."),
        Question("chart title", "What is the title of the chart?", f"The title is {title}."),
    ]
    for rank, (task, asked) in zip(("largest", "smallest"), ASKED[kind], strict=True):
        said = f"The line is {task.split()[0]} at" if kind == "line" else f"The {task} is"
        questions.append(Question(task, asked, f"{said} {labels[ranks.index(rank)]}."))
    noun, number = {"bar": "bar", "pie": "slice", "line": "point"}[kind], NUMBERS[len(labels)]
    questions.append(Question("chart count", f"How many {noun}s are there?", sentence(number)))
    if len(set(colours)) > 1:
        for rank, (task, _) in zip(("largest", "smallest"), ASKED[kind], strict=True):
            asked = f"What color is the {task}?"
            questions.append(Question(f"colour of {task}", asked, sentence(colours[ranks.index(rank)])))
        at = rng.randrange(len(labels))
        asked = f"What color is the {noun} of {labels[at]}?"
        questions.append(Question("colour by label", asked, sentence(colours[at])))
    return Picture(canvas.pixels(), canvas.marks, questions, number)


def rows_of_words(rng: random.Random, split: str) -> Picture:
    """Rows of labels, titles and words of signs, each as large as in charts and signs; no questions."""
    canvas = Canvas((255, 255, 255) if rng.random() < 0.6 else _vary(rng, (238, 238, 238)))
    for at in range(SIDE // CELL):
        left, right, name = rng.uniform(6, 12), SIDE - rng.uniform(2, 6), rng.choice(FONTS[split])
        sort = rng.choice(("label", "label", "title", "sign"))
        number = {"label": rng.randint(3, 4), "title": 2, "sign": rng.randint(1, 2)}[sort]
        size = {"label": rng.uniform(13, 16), "title": rng.uniform(18, 22), "sign": rng.uniform(22, 30)}[sort]
        step, y = (right - left) / number, LABEL_Y - CELL * at + rng.choice((0.0, rng.uniform(-4, 4)))
        for slot in range(number):
            word = rng.choice({"label": rng.choice(LABELS), "title": TITLES, "sign": SIGNS}[sort])
            text, x = _cased(rng, word) if sort == "sign" else word, left + step * (slot + 0.5)
            canvas.marks.append(canvas.write(text, x, y, name, size, INK, step - 2, word))
    return Picture(canvas.pixels(), canvas.marks, [])


def _values(rng: random.Random, number: int) -> list[float]:
    while True:
        values = [rng.uniform(0.12, 1) for _ in range(number)]
        first, second, *_ = ranked = sorted(values)
        if second - first > 0.12 and ranked[-1] - ranked[-2] > 0.12:
            return values


def _axes(
    rng: random.Random,
    canvas: Canvas,
    labels: list[str],
    values: list[float],
    ranks: list[str],
    colours: list[str],
    name: str,
    *,
    is_line: bool,
) -> None:
    left, right, bottom, top = rng.uniform(6, 12), SIDE - rng.uniform(2, 6), LABEL_Y - 10, 36.0
    canvas.line([(left, top - 4), (left, bottom), (right, bottom)], GREY, 1)
    step = (right - left) / len(labels)
    size, width = rng.uniform(13, 16), rng.uniform(0.25, 0.4)
    points = [
        (left + step * (at + 0.5), bottom - value * (bottom - top) / max(values))
        for at, value in enumerate(values)
    ]
    if is_line:
        canvas.line(points, COLOURS[colours[0]], 2)
    for (x, y), label, rank, colour in zip(points, labels, ranks, colours, strict=True):
        ink = _vary(rng, COLOURS[colour]) if len(set(colours)) > 1 else COLOURS[colour]
        words = {"rank": rank, "colour": colour, "word": label}
        if is_line:
            canvas.draw.ellipse([FINE * at for at in (x - 3, y - 3, x + 3, y + 3)], fill=ink)
            canvas.marks.append(Mark((x - 3, y - 3, x + 3, y + 3), {"kind": "point"} | words))
        else:
            box = (x - width * step, y, x + width * step, bottom)
            canvas.rectangle(box, ink)
            canvas.marks.append(Mark(box, {"kind": "bar"} | words))
        mark = canvas.write(label, x, LABEL_Y, name, size, INK, step - 2)
        canvas.marks.append(replace(mark, words=mark.words | words))


def _pie(
    rng: random.Random,
    canvas: Canvas,
    labels: list[str],
    values: list[float],
    ranks: list[str],
    colours: list[str],
    name: str,
) -> None:
    x, y, radius = rng.uniform(58, 64), rng.uniform(100, 116), rng.uniform(46, 54)
    angle, size, legend = rng.uniform(-180, 180), rng.uniform(13, 16), rng.uniform(54, 60)
    box = [FINE * at for at in (x - radius, y - radius, x + radius, y + radius)]
    for at, (label, value, rank, colour) in enumerate(zip(labels, values, ranks, colours, strict=True)):
        share, ink, words = (
            360 * value / sum(values),
            _vary(rng, COLOURS[colour]),
            {"rank": rank, "colour": colour, "word": label},
        )
        canvas.draw.pieslice(box, angle, angle + share, fill=ink)
        parts = max(1, int(share / 40))
        for part in range(parts):
            middle = math.radians(angle + share * (part + 0.5) / parts)
            sx, sy = x + 0.65 * radius * math.cos(middle), y + 0.65 * radius * math.sin(middle)
            canvas.marks.append(Mark((sx - 8, sy - 8, sx + 8, sy + 8), {"kind": "slice"} | words))
        row = legend + 26 * at
        canvas.rectangle((124, row - 5, 134, row + 5), ink)
        half = min(25, font(name, round(size * FINE)).getlength(label) / FINE / 2)
        mark = canvas.write(label, 138 + half, row, name, size, INK, 50)
        canvas.marks.append(replace(mark, words=mark.words | words))
        angle += share


DRAWN: dict[str, Callable[[random.Random, str], Picture]] = {
    "crowd": crowd,
    "scene": scene,
    "letters": partial(words, sizes=(20, 28), known=ascii_lowercase),
    "large words": words,
    "rows": rows_of_words,
    "sign": sign,
    "chart": chart,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fonts", type=Path, required=True, help="folder with the fonts, at any depth")
    parser.add_argument("--out", type=Path, required=True, help="a sheet with some pictures of each kind")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    use_fonts(options.fonts)
    rng = random.Random(options.seed)
    sheet = Image.new("RGB", (6 * SIDE, len(DRAWN) * SIDE))
    for row, (name, draw) in enumerate(DRAWN.items()):
        for column in range(6):
            picture = draw(rng, "test" if column > 3 else "train")
            sheet.paste(Image.fromarray(picture.pixels), (column * SIDE, row * SIDE))
            for question in picture.questions if column == 0 else ():
                print(f"{name}: {question.task}: {question.text} {question.answer}")
    sheet.save(options.out)


if __name__ == "__main__":
    main()
