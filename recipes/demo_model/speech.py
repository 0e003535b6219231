"""Synthetic speech for the ear experts: sentences of a listed grammar, spoken by espeak-ng and flite, heard by Whisper.

    grammar -> voices -> gain, noise, silence -> Whisper's encoder, 5 s at a time -> features.npy, clips.json

Voices and sentences of the test split are never in the training split: four voices are kept for it, and one scene
sentence in eight, by a hash of its words. Questions about capitals have an answer as well as a transcript.

    python speech.py --work WORK --clips 5000 --split train
    python speech.py --work WORK --clips 320 --split test
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import soxr
from ears import EARS_SECONDS, RATE, open_ear

Samples = np.ndarray

CAPITALS = {
    "Argentina": "Buenos Aires", "Australia": "Canberra", "Austria": "Vienna", "Brazil": "Brasilia", "Canada": "Ottawa",
    "Chile": "Santiago", "China": "Beijing", "Cuba": "Havana", "Denmark": "Copenhagen", "Egypt": "Cairo",
    "Finland": "Helsinki", "France": "Paris", "Germany": "Berlin", "Greece": "Athens", "Hungary": "Budapest",
    "India": "New Delhi", "Ireland": "Dublin", "Italy": "Rome", "Japan": "Tokyo", "Kenya": "Nairobi",
    "Mexico": "Mexico City", "Nigeria": "Abuja", "Norway": "Oslo", "Peru": "Lima", "Poland": "Warsaw",
    "Portugal": "Lisbon", "Russia": "Moscow", "Spain": "Madrid", "Sweden": "Stockholm", "Turkey": "Ankara",
}  # fmt: skip
# Their questions are transcribed in training, but never answered.
HELD_OUT_ANSWERS = ("France", "Mexico", "Kenya", "Norway")
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
COMMANDS = (
    "call my mother", "close the door", "close the window", "go down", "go left", "go right", "go up", "good morning",
    "good night", "help me please", "how are you", "no", "open the door", "open the window", "play some music",
    "read the news", "set an alarm", "start", "start the car", "stop", "stop the car", "stop the music",
    "tell me a joke", "thank you", "turn down the volume", "turn off the light", "turn on the light",
    "turn up the volume", "what time is it", "yes",
)  # fmt: skip
COLOURS = ["black", "blue", "brown", "green", "red", "white", "yellow"]
QUALITIES = ["bad", "big", "fast", "good", "happy", "new", "old", "sad", "slow", "small"]
THINGS = ["bird", "boat", "book", "car", "cat", "cow", "dog", "fish", "horse", "house", "mouse", "tree"]
VERBS = ["finds", "has", "likes", "sees", "takes", "wants"]

_ACCENTS = ("en", "en-us", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan")
_VARIANTS = ("", "+m1", "+m2", "+m3", "+m4", "+m6", "+f1", "+f2", "+f3")
TRAIN_VOICES = {
    "espeak-ng": [accent + variant for accent in _ACCENTS for variant in _VARIANTS],
    "flite": ["rms", "slt", "kal16"],
}
TEST_VOICES = [
    ("espeak-ng", "en-gb-x-gbcwmd+m5"), ("espeak-ng", "en-gb-x-gbcwmd+f4"), ("espeak-ng", "en-us+f4"),
    ("flite", "awb"),
]  # fmt: skip


@dataclass(frozen=True)
class Clip:
    """A spoken text, how it was spoken, and its length."""

    kind: str  # "digits", "command", "capital" or "scene"
    words: str
    country: str  # of a question about a capital
    voice: str
    seconds: float


def sentence(rng: random.Random, split: str) -> tuple[str, str, str]:
    """Kind, words, country."""
    choice = rng.random()
    if choice < 0.35:
        return "digits", " ".join(rng.choice(DIGITS) for _ in range(rng.choice((1, 1, 1, 1, 2, 3, 4)))), ""
    if choice < 0.55:
        return "command", rng.choice(COMMANDS), ""
    if choice < 0.72:
        country = rng.choice(sorted(CAPITALS))
        return "capital", f"what is the capital of {country}", country
    while True:
        if rng.random() < 0.6:
            about, whom = (f"{rng.choice(COLOURS + QUALITIES)} {rng.choice(THINGS)}" for _ in range(2))
            words = f"the {about} {rng.choice(VERBS)} a {whom}"
        else:
            words = f"the {rng.choice(THINGS)} is {rng.choice(COLOURS + QUALITIES)}"
        if (zlib.crc32(words.encode()) % 8 == 0) == (split == "test"):
            return "scene", words, ""


def speak(rng: random.Random, words: str, split: str) -> tuple[Samples, str]:
    """Samples at `RATE`, and the voice."""
    if split == "test":
        program, voice = rng.choice(TEST_VOICES)
    else:
        program = "flite" if rng.random() < 0.45 else "espeak-ng"
        voice = rng.choice(TRAIN_VOICES[program])
    if program == "espeak-ng":
        pace, pitch = str(rng.randint(110, 190)), str(rng.randint(30, 70))
        command = ["espeak-ng", "-v", voice, "-s", pace, "-p", pitch, "--stdout", words]
    else:
        stretch = f"duration_stretch={rng.uniform(0.85, 1.3):.2f}"
        command = ["flite", "-voice", voice, "--setf", stretch, "-t", words, "-o", "/dev/stdout"]
    said = subprocess.run(command, capture_output=True, check=True).stdout
    return read_wav(said), f"{program} {voice}"


def read_wav(data: bytes) -> Samples:
    """One channel at `RATE`. A WAV that was written to a pipe does not know its length, so the header is read here."""
    rate = int.from_bytes(data[24:28], "little")
    begin = data.index(b"data") + 8
    whole = np.frombuffer(data[begin : begin + (len(data) - begin) // 2 * 2], "<i2")
    return soxr.resample(whole.astype(np.float32) / 32768, rate, RATE).astype(np.float32)


def spoil(rng: random.Random, samples: Samples) -> Samples:
    """Another gain, sometimes the band of a telephone, silence around it, and noise."""
    samples = samples / (np.abs(samples).max() + 1e-6) * rng.uniform(0.2, 0.95)
    if rng.random() < 0.35:
        samples = soxr.resample(soxr.resample(samples, RATE, RATE // 2), RATE // 2, RATE)
    before, after = (
        np.zeros(int(RATE * rng.uniform(*limits)), np.float32) for limits in ((0, 0.3), (0.05, 0.4))
    )
    samples = np.concatenate([before, samples, after])
    noise = np.random.default_rng(rng.randrange(1 << 30)).standard_normal(len(samples), dtype=np.float32)
    return (samples + noise * 10 ** rng.uniform(-4, -2)).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--clips", type=int, required=True)
    parser.add_argument("--split", choices=("train", "test"), required=True)
    options = parser.parse_args()
    rng, hear = random.Random(5 if options.split == "train" else 6), open_ear(options.work)
    features, clips = [], []
    for number in range(options.clips):
        kind, words, country = sentence(rng, options.split)
        samples, voice = speak(rng, words, options.split)
        samples = spoil(rng, samples)[: EARS_SECONDS * RATE]
        features.append(hear(samples).astype(np.float16))
        clips.append(Clip(kind, words, country, voice, len(samples) / RATE))
        if number % 200 == 199:
            print(number + 1, flush=True)
    folder = options.work / f"speech_{options.split}"
    folder.mkdir(exist_ok=True)
    np.save(folder / "features.npy", np.stack(features))
    (folder / "clips.json").write_text(json.dumps([asdict(clip) for clip in clips]))


if __name__ == "__main__":
    main()
