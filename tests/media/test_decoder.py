from __future__ import annotations

import io
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PillowImage

from argosy import confined_process
from argosy.errors import ArgosyError, BadMedia
from argosy.media import decoder as decoder_module
from argosy.media.decoder import FileDecoder
from argosy.media.parts import Audio, Content, Image, MediaLimits
from tests.media.samples import FILES, PICTURES, encoded, jpeg_with_exif, pattern, png, wav, wave

LIMITS = MediaLimits()

pytestmark = pytest.mark.usefixtures("as_users_have_them")


def content_of(file: bytes) -> Content:
    return Image(file).read(LIMITS)


def process_of(decoder: FileDecoder) -> int:
    assert decoder._worker is not None
    return decoder._worker._process.pid


def test_pixels_are_those_of_the_file(decoder: FileDecoder) -> None:
    pixels = pattern(300, 2000)  # two pieces
    found = decoder.picture(content_of(png(pixels)))
    assert found.dtype == np.uint8
    assert np.array_equal(found, pixels)


@pytest.mark.parametrize("turn", range(1, 9))
def test_every_orientation_is_applied_to_pictures_of_several_pieces(decoder: FileDecoder, turn: int) -> None:
    file = jpeg_with_exif(encoded(PillowImage.fromarray(pattern(700, 900)), "JPEG"), turn)
    plain = np.asarray(PillowImage.open(io.BytesIO(file)))
    turned = {
        1: plain,
        2: plain[:, ::-1],
        3: plain[::-1, ::-1],
        4: plain[::-1],
        5: plain.transpose(1, 0, 2),
        6: plain.transpose(1, 0, 2)[:, ::-1],
        7: plain[::-1, ::-1].transpose(1, 0, 2),
        8: plain.transpose(1, 0, 2)[::-1],
    }[turn]
    told: list[tuple[int, int]] = []
    assert np.array_equal(decoder.picture(content_of(file), lambda *size: told.append(size)), turned)
    assert told == [turned.shape[:2]]


def test_a_picture_that_its_header_rules_out_is_not_decoded_and_the_process_stays(
    decoder: FileDecoder,
) -> None:
    damaged = png(pattern(40, 50))[:200]  # a whole header, and not all of the pixels

    def refuse(height: int, width: int) -> None:
        raise BadMedia(f"{height} x {width} is too narrow", kind="picture")

    decoder.picture(content_of(png(pattern(4, 5))))
    process = process_of(decoder)
    for _ in range(100):  # the next request comes at once
        with pytest.raises(BadMedia, match="40 x 50 is too narrow"):
            decoder.picture(content_of(damaged), refuse)
    with pytest.raises(BadMedia, match="damaged"):
        decoder.picture(content_of(damaged))
    assert decoder.picture(content_of(png(pattern(4, 5)))).shape == (4, 5, 3)
    assert process_of(decoder) == process


def test_the_bytes_of_a_picture_are_sent_once(decoder: FileDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    write = decoder_module.ConfinedProcess.write
    monkeypatch.setattr(
        decoder_module.ConfinedProcess,
        "write",
        lambda worker, data, deadline: sent.append(len(data)) or write(worker, data, deadline),
    )
    file = png(pattern(40, 50))
    decoder.picture(content_of(file), lambda height, width: None)
    assert sent.count(len(file)) == 1


def test_transparent_pixels_become_white(decoder: FileDecoder) -> None:
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (10, 20, 30, 255)
    found = decoder.picture(content_of(png(pixels)))
    assert found[0, 0].tolist() == [10, 20, 30]
    assert found[1, 1].tolist() == [255, 255, 255]


def test_of_several_frames_the_first_is_taken(decoder: FileDecoder) -> None:
    found = decoder.picture(content_of(PICTURES["webp_animated"]()))
    first = PillowImage.fromarray(pattern(64, 48, 4, 1))
    white = PillowImage.new("RGBA", first.size, "white")
    assert np.array_equal(found, np.asarray(PillowImage.alpha_composite(white, first).convert("RGB")))


def test_an_array_needs_no_process() -> None:
    decoder = FileDecoder()
    grey = pattern(5, 7, 1)[:, :, 0]
    content = Image(grey).read(LIMITS)
    told: list[tuple[int, int]] = []
    decoder.picture(content, lambda *size: told.append(size))
    assert told == [(5, 7)]
    assert np.array_equal(decoder.picture(content), np.stack([grey] * 3, axis=2))
    samples = wave(0.5, 8_000)[:, 0].astype(np.float32)
    found = decoder.sound(Audio(samples, rate=8_000).read(LIMITS), 16_000)
    assert found.size == 8_000
    assert decoder._worker is None


def test_an_array_and_a_file_of_the_same_samples_sound_alike(decoder: FileDecoder) -> None:
    samples = wave(0.5, 22_050)
    file = decoder.sound(Audio(wav(samples, 22_050, 32)).read(LIMITS), 16_000)
    array = decoder.sound(Audio(samples[:, 0].astype(np.float32), rate=22_050).read(LIMITS), 16_000)
    assert np.array_equal(file, array)


@pytest.mark.parametrize("bits", [8, 16, 24, 32])
def test_silence_is_zero_at_every_width(decoder: FileDecoder, bits: int) -> None:
    found = decoder.sound(Audio(wav(np.zeros((1000, 2)), 16_000, bits)).read(LIMITS), 16_000)
    assert found.size == 1000
    assert not found.any()


def test_channels_are_mixed_by_their_mean(decoder: FileDecoder) -> None:
    left, right = np.full(1000, 0.5), np.full(1000, -0.25)
    found = decoder.sound(Audio(wav(np.stack([left, right], 1), 16_000, 32)).read(LIMITS), 16_000)
    assert np.allclose(found, 0.125)


def test_a_wav_from_a_pipe_is_read_to_its_end(decoder: FileDecoder) -> None:
    file = bytearray(wav(wave(0.1, 16_000), 16_000))
    file[40:44] = b"\xff" * 4
    assert decoder.sound(Audio(bytes(file)).read(LIMITS), 16_000).size == 1600


def test_a_worker_that_was_killed_is_replaced(decoder: FileDecoder) -> None:
    content = content_of(png(pattern(9, 9)))
    decoder.picture(content)
    first = process_of(decoder)
    os.kill(first, signal.SIGKILL)
    while "Z (zombie)" not in Path(f"/proc/{first}/status").read_text():
        time.sleep(0.01)
    assert decoder.picture(content).shape == (9, 9, 3)
    assert process_of(decoder) != first


def test_a_worker_that_dies_before_it_has_the_file_is_not_the_files_fault(
    decoder: FileDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = content_of(png(pattern(9, 9)))
    decoder.picture(content)
    worker = decoder._worker
    assert worker is not None
    write = type(worker).write

    def write_to_a_dead_process(self: Any, data: bytes, deadline: float) -> None:
        if self is worker:
            self._process.kill()
            self._process.wait()
        write(self, data, deadline)

    monkeypatch.setattr(type(worker), "write", write_to_a_dead_process)
    assert decoder.picture(content).shape == (9, 9, 3)


def test_a_worker_that_dies_while_it_decodes_is_a_bad_file(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = FileDecoder()
    content = content_of(png(pattern(9, 9)))
    decoder.picture(content)
    worker = decoder._worker
    assert worker is not None
    write = type(worker).write

    def write_and_kill(self: Any, data: bytes, deadline: float) -> None:
        if data == content.data:
            os.kill(self._process.pid, signal.SIGSEGV)
        else:
            write(self, data, deadline)

    monkeypatch.setattr(type(worker), "write", write_and_kill)
    with pytest.raises(BadMedia, match="its decoder failed"):
        decoder.picture(content)
    monkeypatch.undo()
    assert decoder.picture(content).shape == (9, 9, 3)
    decoder.close()


def test_a_worker_that_does_not_answer_is_killed_in_time() -> None:
    decoder = FileDecoder(MediaLimits(wall_s=0.5))
    content = content_of(png(pattern(9, 9)))
    decoder.picture(content)
    process = process_of(decoder)
    os.kill(process, signal.SIGSTOP)
    began = time.monotonic()
    large = Image(b"\x89PNG\r\n\x1a\n" + bytes(4 << 20)).read(LIMITS)  # more than a pipe holds
    with pytest.raises(BadMedia, match=r"takes more than 0\.5 seconds"):
        decoder.picture(large)
    assert time.monotonic() - began < 5
    assert not Path(f"/proc/{process}").exists()
    assert decoder.picture(content).shape == (9, 9, 3)
    decoder.close()


def test_an_idle_worker_ends_and_the_next_file_starts_another(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = FileDecoder()
    content = content_of(png(pattern(9, 9)))
    decoder.picture(content)
    worker = decoder._worker
    assert worker is not None
    assert worker._process.stdin is not None
    worker._process.stdin.close()  # it ends by itself, as after ten seconds
    worker._process.wait(10)
    monkeypatch.setattr(type(worker), "is_alive", property(lambda self: True))  # it seemed alive a moment ago
    read, write = os.pipe()
    os.close(read)
    worker._sink = write
    assert decoder.picture(content).shape == (9, 9, 3)
    os.close(write)
    decoder.close()


def test_the_worker_sees_no_secrets_and_can_open_nothing(
    decoder: FileDecoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "secret")
    fresh = FileDecoder()
    fresh.picture(content_of(png(pattern(9, 9))))
    process = process_of(fresh)
    assert b"secret" not in Path(f"/proc/{process}/environ").read_bytes()
    limits = Path(f"/proc/{process}/limits").read_text()
    rows = {line[:26].strip(): line[26:].split()[0] for line in limits.splitlines()[1:]}
    assert rows["Max open files"] == "3"
    assert rows["Max file size"] == "0"
    assert rows["Max processes"] == "0"
    assert int(rows["Max address space"]) < 1 << 30
    assert len(list(Path(f"/proc/{process}/fd").iterdir())) == 3
    fresh.close()


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("JPEG", (8000, 6240), {}),
        pytest.param("JPEG", (5600, 4200), {"progressive": True, "subsampling": 0}, marks=pytest.mark.full),
        ("WEBP", (3500, 3400), {"lossless": True, "method": 0, "quality": 0}),
    ],
)
def test_a_picture_at_the_limits_is_decoded_in_the_memory_that_is_allowed(
    decoder: FileDecoder, name: str, size: tuple[int, int], options: dict[str, Any]
) -> None:
    """The declared size decides before anything is decoded, so what passes must not run out of memory."""
    width, height = size
    file = encoded(PillowImage.new("RGB", size, (200, 100, 50)), name, **options)
    assert decoder.picture(content_of(file)).shape == (height, width, 3)


@pytest.mark.parametrize(
    ("name", "size", "options", "needed"),
    [("JPEG", (6000, 5000), {"progressive": True}, 302), ("WEBP", (4200, 4000), {"method": 0}, 336)],
)
def test_a_picture_that_needs_too_much_memory_is_refused_by_its_header(
    decoder: FileDecoder, name: str, size: tuple[int, int], options: dict[str, Any], needed: int
) -> None:
    file = encoded(PillowImage.new("RGB", size), name, **options)
    with pytest.raises(
        BadMedia, match=f"at most 256 MiB, and this one of .* pixels needs {needed}"
    ) as refused:
        decoder.picture(content_of(file))
    assert refused.value.facts["found"] > refused.value.facts["needed"] == 256 << 20


def test_memory_that_runs_out_is_a_sentence_and_no_crash() -> None:
    decoder = FileDecoder(MediaLimits(decode_bytes=20 << 20, sound_s=10_000))
    with pytest.raises(BadMedia, match="takes more than 20 MiB"):
        decoder.sound(Audio(wav(np.zeros((9_000_000, 1)), 8_000)).read(LIMITS), 16_000)
    assert decoder.picture(content_of(png(pattern(9, 9)))).shape == (9, 9, 3)
    decoder.close()


def test_threads_take_turns(decoder: FileDecoder) -> None:
    files = [png(pattern(40, 50, seed=seed)) for seed in range(6)]
    found: dict[int, Any] = {}

    def decode(number: int) -> None:
        found[number] = decoder.picture(content_of(files[number]))

    threads = [threading.Thread(target=decode, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(6):
        assert np.array_equal(found[number], pattern(40, 50, seed=number))


@pytest.mark.parametrize(
    "answer",
    [
        b'{"shape": [4, 4, 3]}\n' + bytes(10),
        b'{"shape": [99999, 99999, 3]}\n',
        b'{"shape": [4, 4, 4]}\n' + bytes(48),
        b'{"shape": [4, -4, 3]}\n',
        b'{"shape": [4, true, 3]}\n',
        b'{"shape": [2, 2, 3]}\n' + bytes(13),
        b'{"refused": "anything", "facts": {}}\n',
        b'{"refused": "size", "facts": {"height": "<b>", "width": 1}}\n',
        b'{"refused": "memory", "facts": {}}\n',
        b"[]\n",
        b"no JSON\n",
        b"\xff" * 5000,
        b"",
    ],
)
def test_an_answer_that_breaks_the_protocol_is_a_bad_file(
    answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file may take over its decoder, and then the answer is a stranger's too."""
    code = f"import sys, os; os.write(1, b'ready\\n'); os.read(0, 1 << 20); os.write(1, {answer!r})"
    real = confined_process.subprocess.Popen

    def start(arguments: list[str], **options: Any) -> Any:
        return real([*arguments[:-1], code], **options)

    monkeypatch.setattr(confined_process.subprocess, "Popen", start)
    decoder = FileDecoder(MediaLimits(wall_s=3))
    with pytest.raises((BadMedia, ArgosyError)) as refused:
        decoder.picture(content_of(b"\x89PNG\r\n\x1a\n"))
    assert "<b>" not in str(refused.value)
    assert "anything" not in str(refused.value)
    decoder.close()


def test_what_a_worker_needs_is_reported_if_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_module, "_PACKAGES", ("PIL", "no_such_package"))
    with pytest.raises(ArgosyError, match="need the package no_such_package"):
        FileDecoder().picture(content_of((FILES / "rgb.jpg").read_bytes()))
    monkeypatch.setattr(decoder_module, "_PACKAGES", ("PIL",))
    monkeypatch.setattr(confined_process, "_PASSED", ())
    monkeypatch.setattr(confined_process, "_paths", lambda *_: ["/"])
    with pytest.raises(ArgosyError, match="did not start"):
        FileDecoder().picture(content_of((FILES / "rgb.jpg").read_bytes()))
