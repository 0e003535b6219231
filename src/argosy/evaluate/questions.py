"""Read questions with three answers from the user's file, in the format of the BBQ benchmark (arXiv:2110.08193).

    {"context": "...", "question": "...", "ans0": "...", "ans1": "...", "ans2": "...", "label": 2,
     "context_condition": "ambig", "category": "Age"}                  a line each; the last two are optional

Other keys in a line are ignored, because BBQ's files have more. The file may contain anything, so every size is
bounded before parsing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from argosy.checkpoint.untrusted_file import open_regular, quote, read_at
from argosy.errors import CheckpointError, UsageError
from argosy.strict_json import JsonError, parse_json

MOST_FILE_BYTES = 64 << 20
MOST_LINE_BYTES = 1 << 16
MOST_CHARACTERS = 4096  # per context, question or answer
NUM_ANSWERS = 3
_MOST_KIND = 64  # characters of a condition
_HINT = 'lines such as {"context": "...", "question": "...", "ans0": "...", "ans1": "...", "ans2": "...", "label": 0}'


@dataclass(frozen=True, slots=True)
class Question:
    """`label` is the number of the right answer; `condition` says whether the context settles the question."""

    start: str
    answers: tuple[str, ...]
    label: int
    condition: str

    def texts(self) -> list[str]:
        """The question with each of its answers."""
        return [f"{self.start} {answer}" for answer in self.answers]


def read_questions(path: Path, *, most: int) -> list[Question]:
    """Read at most `most` questions, spread evenly over the file.

    Raises:
        UsageError: it cannot be read, is too large, has no questions, or contains a malformed line.
    """
    try:
        with open_regular(path) as (descriptor, nbytes):
            if nbytes > MOST_FILE_BYTES:
                raise UsageError(f"{path} is {nbytes} bytes long; at most {MOST_FILE_BYTES} are read")
            data = read_at(descriptor, nbytes, 0, path)
    except CheckpointError as error:
        raise UsageError(error.message) from error
    # Find lines without an object for each: a file may have millions of empty ones.
    starts, at = [], 0
    while at < len(data):
        end = data.find(b"\n", at)
        end = len(data) if end < 0 else end
        if end - at > MOST_LINE_BYTES:
            raise UsageError(f"{path}: a line is {end - at} bytes long; at most {MOST_LINE_BYTES} are read")
        if data[at:end].strip():
            starts.append((at, end))
        at = end + 1
    if not starts:
        raise UsageError(f"{path} has no question", hint=_HINT)
    count = min(most, len(starts))
    chosen = [number * len(starts) // count for number in range(count)]
    return [_question(data[slice(*starts[number])], path, number + 1) for number in chosen]


def _question(line: bytes, path: Path, number: int) -> Question:
    def wrong(fault: str) -> UsageError:
        return UsageError(f"{path}: question {number} {fault}", hint=_HINT)

    try:
        raw = parse_json(line)
    except JsonError as error:
        raise wrong(error.fault) from error
    if not isinstance(raw, dict):
        raise wrong("is not an object")

    def text(key: str, most: int = MOST_CHARACTERS) -> str:
        value = raw.get(key)
        if not isinstance(value, str) or not value.strip():
            raise wrong(f"has no text '{key}'")
        if len(value) > most:
            raise wrong(f"has {len(value)} characters in '{key}'; at most {most} are read")
        return value.strip()

    label = raw.get("label")
    if type(label) is not int or not 0 <= label < NUM_ANSWERS:
        raise wrong(f"has the label {quote(label)}, expected 0, 1 or 2")
    has_condition = "context_condition" in raw
    condition = quote(text("context_condition", _MOST_KIND)) if has_condition else "unstated"
    start = f"{text('context')}\n{text('question')}\nAnswer:"
    return Question(start, tuple(text(f"ans{i}") for i in range(NUM_ANSWERS)), label, condition)
