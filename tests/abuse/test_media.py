"""Hostile files are refused in a sentence of ours, within a second of processor time and the memory that is allowed."""

from __future__ import annotations

import random
import re
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from argosy.errors import BadMedia
from argosy.media.decoder import FileDecoder
from argosy.media.parts import Audio, Image, MediaLimits
from tests.abuse import hostile_media
from tests.media.samples import FILES, encoded, palette_image, pattern, png, wav, wave

LIMITS = MediaLimits()
CPU_SECONDS = 1.0
READY_BYTES = 80 << 20  # of the process before it decodes anything

# Every sentence that a file can cause; text of a library would match none.
SENTENCES = [
    r"the (picture|sound) is empty: it has 0 bytes",
    r"unsupported (picture|sound) format; use [A-Z0-9a-z, ]+",
    r"the (picture|sound) is damaged or incomplete",
    r"the (picture|sound) is damaged: its decoder failed",
    r"the picture has no pixels: its size is \d+ x \d+",
    r"a side of a picture may have at most 16,384 pixels, found [\d,]+ x [\d,]+",
    r"a picture may have at most 50 megapixels, found [\d,]+ x [\d,]+ = [\d.]+",
    r"decoding a picture may take at most 256 MiB, and this one of [\d,]+ x [\d,]+ pixels needs \d+",
    r"decoding the (picture|sound) takes more than 256 MiB",
    r"decoding the (picture|sound) takes more processor time than a (picture|sound) of its size may",
    r"a sound may have 1 to 8 channels, found \d+",
    r"the rate of a sound must be 1,000 to 384,000 samples per second, found [\d,]+",
    r"a sound may take at most 600 seconds, found [\d,.]+",
]

MANY_SCANS = "jpeg_of_5000_scans"  # has a test of its own
FILES_OF_KINDS = [
    pytest.param(kind, make, id=f"{kind}-{name}", marks=pytest.mark.full if name == MANY_SCANS else ())
    for kind, files in (("picture", hostile_media.PICTURES), ("sound", hostile_media.SOUNDS))
    for name, make in files.items()
]

pytestmark = pytest.mark.usefixtures("as_users_have_them")


@pytest.fixture(scope="module")
def decoder() -> Iterator[FileDecoder]:
    made = FileDecoder()
    yield made
    made.close()


def decode(decoder: FileDecoder, kind: str, file: bytes) -> None:
    if kind == "picture":
        decoder.picture(Image(file).read(LIMITS))
    else:
        decoder.sound(Audio(file).read(LIMITS), 16_000)


def require_usable(decoder: FileDecoder) -> None:
    assert decoder.picture(Image(png(pattern(4, 5))).read(LIMITS)).shape == (4, 5, 3)


def require_our_sentence(error: BadMedia) -> None:
    assert any(re.fullmatch(sentence, error.message) for sentence in SENTENCES), error.message


def cpu_seconds(decoder: FileDecoder) -> float:
    """Processor time of all workers so far, those that were killed and the one that runs."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert decoder._worker is not None
    fields = Path(f"/proc/{decoder._worker._process.pid}/stat").read_text().rpartition(")")[2].split()
    return ended.ru_utime + ended.ru_stime + (int(fields[11]) + int(fields[12])) / 100


def peak_bytes(decoder: FileDecoder) -> int:
    assert decoder._worker is not None
    status = Path(f"/proc/{decoder._worker._process.pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found
    return int(found[1]) << 10


def test_there_are_at_least_sixty_hostile_files() -> None:
    assert len(FILES_OF_KINDS) >= 60


@pytest.mark.parametrize(("kind", "make"), FILES_OF_KINDS)
def test_a_hostile_file_is_refused_cheaply_and_the_decoder_stays_usable(
    decoder: FileDecoder, kind: str, make: hostile_media.Make
) -> None:
    file = make()
    require_usable(decoder)
    worker, before = decoder._worker, cpu_seconds(decoder)
    with pytest.raises(BadMedia) as refused:
        decode(decoder, kind, file)
    require_our_sentence(refused.value)
    if decoder._worker is worker:
        assert cpu_seconds(decoder) - before < CPU_SECONDS
        assert peak_bytes(decoder) < READY_BYTES + LIMITS.decode_bytes
    require_usable(decoder)
    # A worker that was killed counts as well, with the start of the next one.
    assert cpu_seconds(decoder) - before < CPU_SECONDS + 1.0


def test_the_kernel_ends_a_worker_that_uses_up_its_processor_time(decoder: FileDecoder) -> None:
    file = hostile_media.PICTURES[MANY_SCANS]()
    require_usable(decoder)
    with pytest.raises(BadMedia, match="takes more processor time"):
        decode(decoder, "picture", file)
    require_usable(decoder)


SEEDS = {
    "picture": [
        (FILES / "rgb.jpg").read_bytes(),
        (FILES / "progressive.jpg").read_bytes(),
        (FILES / "two.mpo").read_bytes(),
        (FILES / "rgb.webp").read_bytes(),
        png(pattern(40, 50, 4)),
        encoded(palette_image(40, 50), "PNG"),
        encoded(palette_image(40, 50), "GIF"),
        hostile_media.webp_animation(1 << 20),
    ],
    "sound": [
        *[(FILES / name).read_bytes() for name in ("tone.flac", "tone.ogg", "tone.mp3")],
        wav(wave(0.2, 16_000, 2), 16_000),
        wav(wave(0.2, 8_000), 8_000, 8),
    ],
}


@pytest.mark.parametrize("kind", SEEDS)
def test_damaged_files_are_decoded_or_refused_in_our_words(decoder: FileDecoder, kind: str) -> None:
    rng = random.Random(14)
    num_refused = 0
    for number in range(300):
        file = bytearray(SEEDS[kind][number % len(SEEDS[kind])])
        # Half of the changes hit the header, where they do more.
        for _ in range(rng.randint(1, 8)):
            file[rng.randrange(len(file) if rng.random() < 0.5 else 200)] = rng.randrange(256)
        if rng.random() < 0.2:
            del file[rng.randrange(1, len(file)) :]
        try:
            decode(decoder, kind, bytes(file))
        except BadMedia as error:
            num_refused += 1
            require_our_sentence(error)
    assert num_refused > 30
    require_usable(decoder)
