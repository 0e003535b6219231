"""What does the demo model hear? Word errors on fresh speech, spoken questions, and what hearing costs text.

    python evaluate_ears.py --model MODEL --before OLD_MODEL --digits RECORDINGS --held-out WORK/heldout.npz

Runs Argosy on the checkpoints that `build_demo` writes: MODEL with ears, OLD_MODEL without. Speech is made on the
spot, with voices and scene sentences that training never had. RECORDINGS is a folder of recorded digits (FSDD,
`7_jackson_3.wav`), which were never trained on. Perplexities are of the held-out streams of `data.py`, in windows of
512 tokens, as in the model card.
"""

from __future__ import annotations

import argparse
import random
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
from ears import EARS_SECONDS, RATE
from speech import CAPITALS, DIGITS, HELD_OUT_ANSWERS, TEST_VOICES, sentence, speak, spoil

from argosy import Audio, Engine, SamplingParams, Text

WINDOW = 512
NUM_EXPERTS, NUM_EARS, NUM_EYES = 8, 2, 2
PLACEHOLDER_ID = 16  # <empty_output>
TRANSCRIBE = "\nWrite down what you hear."


def words_of(text: str) -> list[str]:
    return re.sub(r"[^a-z ]", "", text.lower()).split()


def word_errors(said: list[str], heard: list[str]) -> int:
    """Substitutions, insertions and deletions."""
    row = list(range(len(heard) + 1))
    for at, word in enumerate(said):
        previous, row[0] = row[0], at + 1
        for column, other in enumerate(heard):
            previous, row[column + 1] = (
                row[column + 1],
                min(row[column + 1] + 1, row[column] + 1, previous + (word != other)),
            )
    return row[-1]


def ask(engine: Engine, samples: np.ndarray, question: str) -> str:
    sound = Audio(samples[: EARS_SECONDS * RATE].astype(np.float32), rate=RATE)
    parts = [sound, Text(question)] if question else [sound]
    request = engine.prompts.build([{"role": "user", "content": parts}])
    result = engine.generate(request, SamplingParams(max_tokens=32, temperature=0))
    return result.text.strip()


def hear_speech(engine: Engine, clips: int) -> None:
    rng = random.Random(7)
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])  # clips, exact, words, errors
    examples = []
    for _ in range(clips):
        kind, words, _ = sentence(rng, "test")
        heard = ask(engine, spoil(rng, speak(rng, words, "test")[0]), TRANSCRIBE)
        said, found = words_of(words), words_of(heard)
        errors = word_errors(said, found)
        for name in (kind, "all"):
            counts[name] = [
                a + b for a, b in zip(counts[name], (1, said == found, len(said), errors), strict=True)
            ]
        if errors:
            examples.append(f"{words!r} heard as {heard!r}")
    print("| fresh speech, unseen voices | clips | exact | word error rate |\n|---|---|---|---|")
    for name, (number, exact, num_words, errors) in sorted(counts.items()):
        print(f"| {name} | {number} | {exact / number:.2f} | {errors / num_words:.3f} |")
    print("\n".join(examples[:12]), flush=True)


def hear_digits(engine: Engine, folder: Path) -> None:
    """Recorded digits of real voices."""
    import soundfile
    import soxr

    right, wrong, total = 0, [], 0
    for path in sorted(folder.glob("[0-9]_*_*.wav")):
        samples, rate = soundfile.read(path, dtype="float32")
        samples = soxr.resample(samples, rate, RATE)
        samples = np.concatenate(
            [np.zeros(3200), samples / (np.abs(samples).max() + 1e-6) * 0.6, np.zeros(3200)]
        )
        heard, total = ask(engine, samples, TRANSCRIBE), total + 1
        said = DIGITS[int(path.name[0])]
        if words_of(heard) == [said]:
            right += 1
        else:
            wrong.append(f"{path.name} heard as {heard!r}")
    print(f"| recorded digits, real voices | {total} | {right / max(1, total):.2f} | |")
    print("\n".join(wrong[:12]), flush=True)


def answer_questions(engine: Engine) -> None:
    rng = random.Random(8)
    for country in (*HELD_OUT_ANSWERS, "Italy", "Japan", "Peru"):
        samples = spoil(rng, speak(rng, f"what is the capital of {country}", "test")[0])
        held_out = " (answer never trained on)" if country in HELD_OUT_ANSWERS else ""
        print(f"| {country}{held_out} | {CAPITALS[country]} | {ask(engine, samples, '')} |", flush=True)


class Routes:
    """Counts choices of ear experts and of all, from a position of one request on, over all layers."""

    def __init__(self) -> None:
        self.start = 0
        self._positions: dict[int, int] = defaultdict(int)
        self.chosen = np.zeros(NUM_EXPERTS + NUM_EARS + NUM_EYES, np.int64)

    def begin(self, start: int) -> None:
        self.start = start
        self._positions.clear()

    def observe(self, layer: int, expert_ids: np.ndarray) -> None:
        at = self._positions[layer]
        self._positions[layer] += len(expert_ids)
        counted = expert_ids[max(0, self.start - at) :]
        np.add.at(self.chosen, counted.reshape(-1), 1)

    def share_of_ears(self) -> float:
        return float(self.chosen[NUM_EXPERTS : NUM_EXPERTS + NUM_EARS].sum() / self.chosen.sum())


def show_routes(model: Path, held_out: Path | None) -> None:
    """Which share of choices goes to the ear experts: from the first position of a sound on, and in texts."""
    routes, rng = Routes(), random.Random(9)
    with Engine.open(
        model, memory="4GiB", context=2048, prefix_reuse=False, observe_routes=routes.observe
    ) as engine:
        print("| routing | choices that are ears |\n|---|---|")
        for _ in range(20):
            _, words, _ = sentence(rng, "test")
            samples = spoil(rng, speak(rng, words, "test")[0])[: EARS_SECONDS * RATE]
            parts = [Audio(samples.astype(np.float32), rate=RATE), Text(TRANSCRIBE)]
            prompt = engine.prompts.build([{"role": "user", "content": parts}])
            routes.begin(prompt.token_ids.index(PLACEHOLDER_ID))
            engine.generate(prompt, SamplingParams(max_tokens=32, temperature=0))
        print(f"| speech, and what follows it | {routes.share_of_ears():.2%} |")
        if held_out is None:
            return
        with np.load(held_out) as found:
            for name in sorted(name for name in found if name.endswith("_ids")):
                routes.chosen[:] = 0
                for at in range(0, len(found[name]), WINDOW):
                    routes.begin(0)
                    engine.logits(found[name][at : at + WINDOW].astype(np.int64).tolist())
                print(f"| {name.removesuffix('_ids')} | {routes.share_of_ears():.2%} |", flush=True)


def perplexity(engine: Engine, ids: np.ndarray, is_target: np.ndarray) -> float:
    losses = []
    for at in range(0, len(ids) - 1, WINDOW):
        part, wanted = ids[at : at + WINDOW], is_target[at : at + WINDOW][1:]
        logits = engine.logits(part.tolist()).astype(np.float64)[:-1]
        top = logits.max(axis=1, keepdims=True)
        log_sum = np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0]
        losses.append((log_sum - logits[np.arange(len(logits)), part[1:]])[wanted])
    return float(np.exp(np.concatenate(losses).mean()))


def perplexities(engine: Engine, path: Path) -> dict[str, float]:
    """The perplexity of each stream in `heldout.npz`."""
    with np.load(path) as found:
        names = sorted(name.removesuffix("_ids") for name in found if name.endswith("_ids"))
        return {
            name: perplexity(engine, found[f"{name}_ids"].astype(np.int64), found[f"{name}_targets"])
            for name in names
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--digits", type=Path)
    parser.add_argument("--clips", type=int, default=160)
    parser.add_argument(
        "--held-out", type=Path, help="heldout.npz of data.py: texts that hearing must not cost"
    )
    options = parser.parse_args()
    print(f"voices: {', '.join(' '.join(voice) for voice in TEST_VOICES)}")
    with Engine.open(options.model, memory="4GiB", context=2048) as engine:
        hear_speech(engine, options.clips)
        if options.digits:
            hear_digits(engine, options.digits)
        answer_questions(engine)
        after = perplexities(engine, options.held_out) if options.held_out else {}
    show_routes(options.model, options.held_out)
    if options.before and after:
        with Engine.open(options.before, memory="4GiB", context=2048) as engine:
            before = perplexities(engine, options.held_out)
        print("| text | perplexity before | with ears | |\n|---|---|---|---|")
        for name, value in after.items():
            print(f"| {name} | {before[name]:.3f} | {value:.3f} | {value / before[name] - 1:+.2%} |")


if __name__ == "__main__":
    main()
