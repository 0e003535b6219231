"""Files that attack decoders: each must be refused, quickly, in little memory, and with a sentence of our own.

    python tests/abuse/hostile_media.py DIRECTORY     write them all

Elsewhere: `test_media.py` feeds them to the decoder.
"""

from __future__ import annotations

import io
import random
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.media.samples import FILES, encoded, palette_image, pattern, png, png_chunk, raw_png, wav, wave

Make = Callable[[], bytes]


# ── PNG ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def png_header(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    """A small PNG whose header declares another size than its rows have."""
    return raw_png(width, height, depth, colour, b"\0" + bytes(30))


def png_of_zeros(width: int, height: int) -> bytes:
    """A valid grey PNG that is a thousand times as large when decoded."""
    packer = zlib.compressobj(9)
    row = bytes(1 + width)
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def packed_zeros(num_bytes: int) -> bytes:
    """What zlib makes of whole MiB of zeros, each packed like the first."""
    packer = zlib.compressobj(9, wbits=-15)
    piece = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    checksum = num_bytes % 65_521 << 16 | 1
    return b"\x78\xda" + piece * (num_bytes >> 20) + packer.flush() + struct.pack(">I", checksum)


def png_with(*chunks: bytes) -> bytes:
    """A PNG of 10 x 10 pixels with further chunks before its rows."""
    return raw_png(10, 10, 8, 0, (b"\0" + bytes(10)) * 10, *chunks)


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


_PNG: dict[str, Make] = {
    "png_cut_in_signature": lambda: png(pattern(60, 80))[:6],
    "png_cut_in_header": lambda: png(pattern(60, 80))[:20],
    "png_cut_before_rows": lambda: png(pattern(60, 80))[:33],
    "png_cut_in_rows": lambda: png(pattern(60, 80))[:4000],
    "png_cut_at_the_last_row": lambda: png(pattern(60, 80))[:-40],
    "png_65535x65535": lambda: png_header(65_535, 65_535),
    "png_1x65535": lambda: png_header(1, 65_535),
    "png_65535x1": lambda: png_header(65_535, 1),
    "png_2147483647x2147483647": lambda: png_header(2**31 - 1, 2**31 - 1),
    "png_0x0": lambda: png_header(0, 0),
    "png_0x9": lambda: png_header(0, 9),
    "png_declares_8000x6000": lambda: png_header(8000, 6000),
    "png_declares_16000x3000": lambda: png_header(16_000, 3000, 8, 0),
    "png_50_megapixels_of_zeros": lambda: png_of_zeros(10_000, 5_001),
    "png_64_megapixels_of_zeros": lambda: png_of_zeros(8000, 8000),
    "png_depth_3": lambda: png_header(10, 10, 3),
    "png_colour_9": lambda: png_header(10, 10, 8, 9),
    "png_palette_without_palette": lambda: raw_png(10, 10, 8, 3, (b"\0" + bytes(9)) * 10),
    "png_without_rows": lambda: (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 9, 9, 8, 2, 0, 0, 0))
        + png_chunk(b"IEND", b"")
    ),
    "png_wrong_checksum": lambda: flipped(png(pattern(60, 80)), 30),
    "png_wrong_byte_in_rows": lambda: flipped(png(pattern(60, 80)), 700),
    "png_chunk_of_2_gib": lambda: png(pattern(9, 9))[:33] + b"\x7f\xff\xff\xffIDAT" + bytes(100),
    "png_huge_profile": lambda: png_with(png_chunk(b"iCCP", b"x\0\0" + packed_zeros(200 << 20))),
    "png_huge_text": lambda: png_with(png_chunk(b"zTXt", b"x\0\0" + packed_zeros(200 << 20))),
    "png_huge_international_text": lambda: png_with(
        png_chunk(b"iTXt", b"x\0\1\0\0\0" + packed_zeros(100 << 20))
    ),
    "png_100_large_texts": lambda: png_with(
        *[png_chunk(b"zTXt", b"x%d\0\0" % i + packed_zeros(1 << 20)) for i in range(100)]
    ),
    "png_of_random_bytes": lambda: b"\x89PNG\r\n\x1a\n" + random.Random(1).randbytes(5000),
}


# ── JPEG, WEBP, GIF ─────────────────────────────────────────────────────────────────────────────────────────────────


def jpeg_of(width: int, height: int) -> bytes:
    """A JPEG whose frame header declares another size than it has."""
    content = (FILES / "rgb.jpg").read_bytes()
    at = content.index(b"\xff\xc0")
    return content[: at + 5] + struct.pack(">HH", height, width) + content[at + 9 :]


def jpeg_of_many_scans(num_scans: int) -> bytes:
    """A progressive JPEG of 3000 x 3000 pixels that refines nothing, very often."""
    content = encoded(Image.new("L", (3000, 3000)), "JPEG", progressive=True)
    starts = [at for at in range(len(content) - 1) if content[at : at + 2] == b"\xff\xda"]
    last = content[starts[-1] : -2]
    return content[:-2] + last * num_scans + b"\xff\xd9"


def webp_of(width: int, height: int) -> bytes:
    """A WEBP whose canvas is larger than its frame."""
    still = encoded(Image.fromarray(pattern(8, 8)), "WEBP", lossless=True)[12:]
    canvas = bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + canvas + still
    return b"RIFF" + struct.pack("<I", len(body)) + body


def webp_lossless_header(side: int) -> bytes:
    bits = (side - 1) | (side - 1) << 14
    body = b"WEBPVP8L" + struct.pack("<I", 13) + b"\x2f" + struct.pack("<I", bits) + bytes(8)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def webp_animation(cut: int) -> bytes:
    frames = [Image.fromarray(pattern(64, 48, 3, seed)) for seed in range(3)]
    return encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)[:cut]


def gif_of(width: int, height: int, left: int = 0) -> bytes:
    """A GIF that declares a canvas, with a frame of that size and hardly any data."""
    screen = struct.pack("<HHBBB", min(width, 65_535), min(height, 65_535), 0x80, 0, 0) + bytes(6)
    frame = b"," + struct.pack("<HHHHB", left, 0, min(width, 65_535), min(height, 65_535), 0)
    return b"GIF89a" + screen + frame + b"\x02\x02\x4c\x01\x00;"


def gif_with_frame_outside() -> bytes:
    """A GIF whose first frame reaches far beyond its canvas, which makes the canvas larger."""
    screen = struct.pack("<HHBBB", 10, 10, 0x80, 0, 0) + bytes(6)
    frame = b"," + struct.pack("<HHHHB", 60_000, 60_000, 5_000, 5_000, 0)
    return b"GIF89a" + screen + frame + b"\x02\x02\x4c\x01\x00;"


def jpeg(name: str = "rgb.jpg") -> bytes:
    return (FILES / name).read_bytes()


_OTHERS: dict[str, Make] = {
    "jpeg_cut_in_header": lambda: jpeg()[:100],
    "jpeg_cut_in_rows": lambda: jpeg()[:3000],
    "jpeg_cut_before_the_end": lambda: jpeg()[:-200],
    "jpeg_progressive_cut": lambda: jpeg("progressive.jpg")[:2500],
    "jpeg_65535x65535": lambda: jpeg_of(65_535, 65_535),
    "jpeg_1x65535": lambda: jpeg_of(1, 65_535),
    "jpeg_0x0": lambda: jpeg_of(0, 0),
    "jpeg_declares_9000x5000": lambda: jpeg_of(9000, 5000),
    "jpeg_of_5000_scans": lambda: jpeg_of_many_scans(5000),
    "jpeg_of_random_bytes": lambda: b"\xff\xd8\xff\xe0" + random.Random(2).randbytes(5000),
    "jpeg_segments_without_end": lambda: b"\xff\xd8" + b"\xff\xe1\xff\xff" * 10,
    "mpo_cut": lambda: jpeg("two.mpo")[:2000],
    "webp_cut_in_header": lambda: jpeg("rgb.webp")[:25],
    "webp_cut_in_rows": lambda: jpeg("rgb.webp")[:900],
    "webp_16384x16384": lambda: webp_lossless_header(16_384),
    "webp_canvas_16000000x16000000": lambda: webp_of(16_000_000, 16_000_000),
    "webp_canvas_larger_than_frame": lambda: webp_of(7000, 7000),
    "webp_animation_cut": lambda: webp_animation(3000),
    "webp_of_random_bytes": lambda: b"RIFF\0\1\0\0WEBPVP8 " + random.Random(3).randbytes(5000),
    "gif_65535x65535": lambda: gif_of(65_535, 65_535),
    "gif_1x65535": lambda: gif_of(1, 65_535),
    "gif_16000x3000_of_nothing": lambda: gif_of(16_000, 3000),
    "gif_0x0": lambda: gif_of(0, 0),
    "gif_frame_outside": gif_with_frame_outside,
    "gif_cut_in_header": lambda: encoded(palette_image(60, 80), "GIF")[:9],
    "gif_cut_in_rows": lambda: encoded(palette_image(60, 80), "GIF")[:1500],
    "gif_without_frame": lambda: b"GIF89a" + struct.pack("<HHBBB", 9, 9, 0, 0, 0) + b";",
}


# ── no pictures at all ──────────────────────────────────────────────────────────────────────────────────────────────


def archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("a.png", bytes(1 << 20))
    return file.getvalue()


_NO_PICTURES: dict[str, Make] = {
    "empty": lambda: b"",
    "one_byte": lambda: b"\x89",
    "text": lambda: b"This is a picture of a cat.\n",
    "svg": lambda: (
        b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'><image href='file:///etc/passwd'/></svg>"
    ),
    "html_and_png": lambda: b"<script>alert(1)</script>" + png(pattern(9, 9)),
    "zip": archive,
    "zip_and_png": lambda: archive() + png(pattern(9, 9)),
    "pdf": lambda: b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF",
    "tiff": lambda: encoded(Image.fromarray(pattern(9, 9)), "TIFF"),
    "bmp": lambda: encoded(Image.fromarray(pattern(9, 9)), "BMP"),
    "eps": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n",
    "icon": lambda: encoded(Image.fromarray(pattern(16, 16)), "ICO"),
    "wav_as_picture": lambda: wav(wave(0.1, 8000), 8000),
    "gif_and_script": lambda: b"GIF89a/*" + b"=1;alert(1)//" * 20,
}

PICTURES = _PNG | _OTHERS | _NO_PICTURES


# ── sounds ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def wav_header(channels: int = 1, rate: int = 16_000, bits: int = 16, data_bytes: int | None = None) -> bytes:
    """A WAV with a thousand frames, whatever its header says."""
    frame = channels * bits // 8
    form = struct.pack("<HHIIHH", 1, channels, rate, rate * frame & 0xFFFFFFFF, frame & 0xFFFF, bits)
    content = bytes(2000)
    data = b"data" + struct.pack("<I", len(content) if data_bytes is None else data_bytes) + content
    body = b"WAVEfmt " + struct.pack("<I", 16) + form + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def flac_header(num_samples: int, rate: int = 16_000, channels: int = 1) -> bytes:
    """The first block of a FLAC."""
    packed = rate << 44 | (channels - 1) << 41 | 15 << 36 | num_samples
    return (
        b"fLaC\x80\0\0\x22"
        + struct.pack(">HH", 65_535, 65_535)
        + bytes(6)
        + packed.to_bytes(8, "big")
        + bytes(16)
    )


def crc(data: bytes, polynomial: int, bits: int) -> int:
    value = 0
    for byte in data:
        value ^= byte << bits - 8
        for _ in range(8):
            value = (value << 1 ^ (polynomial if value >> bits - 1 else 0)) & (1 << bits) - 1
    return value


def flac_of_silence(num_frames: int) -> bytes:
    """A FLAC of 65535 silent samples per frame, with the same frame number in each, and without a length."""
    header = b"\xff\xf8\x75\x08\0\xff\xfe"  # 16 bits of size, 16 kHz, one channel, 16 bits
    frame = header + bytes([crc(header, 0x07, 8)]) + b"\0\0\0"
    frame += struct.pack(">H", crc(frame, 0x8005, 16))
    return flac_header(0) + frame * num_frames


def mp3_of_silence(num_bytes: int) -> bytes:
    """An MP3 of the smallest frames: 8 kbit/s at 24 kHz."""
    frame = b"\xff\xf3\x14\xc4" + bytes(20)  # 576 samples in 24 bytes
    return frame * (num_bytes // len(frame))


def ogg(header_rate: int, channels: int = 1) -> bytes:
    content = bytearray((FILES / "tone.ogg").read_bytes())
    at = content.index(b"\x01vorbis")
    content[at + 11] = channels
    content[at + 12 : at + 16] = struct.pack("<I", header_rate)
    # The checksum of the first page, which ends after the 30 bytes of the header packet.
    content[22:26] = bytes(4)
    content[22:26] = struct.pack("<I", crc(bytes(content[: at + 30]), 0x04C11DB7, 32))
    return bytes(content)


def sound(name: str) -> bytes:
    return (FILES / name).read_bytes()


SOUNDS: dict[str, Make] = {
    "empty": lambda: b"",
    "text": lambda: b"la la la\n",
    "zip": archive,
    "png_as_sound": lambda: png(pattern(9, 9)),
    "midi": lambda: b"MThd\0\0\0\6\0\0\0\1\0\x60MTrk\0\0\0\4\0\xff\x2f\0",
    "aiff": lambda: b"FORM\0\0\0\x2eAIFFCOMM\0\0\0\x12" + bytes(36),
    "wav_cut_in_header": lambda: wav_header()[:30],
    "wav_cut_in_data": lambda: wav_header()[:1000],
    "wav_no_data": lambda: wav(np.zeros((0, 1)), 16_000),
    "wav_declares_4_gib": lambda: wav_header(data_bytes=0xFFFFFFFE),
    "wav_declares_10_minutes": lambda: wav_header(data_bytes=2 * 16_000 * 599),
    "wav_declares_twice_as_much": lambda: wav_header(data_bytes=4000),
    "wav_0_channels": lambda: wav_header(channels=0),
    "wav_65535_channels": lambda: wav_header(channels=65_535),
    "wav_250_channels": lambda: wav_header(channels=250),
    "wav_9_channels": lambda: wav_header(channels=9),
    "wav_0_hertz": lambda: wav_header(rate=0),
    "wav_1_hertz": lambda: wav_header(rate=1),
    "wav_4_gigahertz": lambda: wav_header(rate=0xFFFFFFFF),
    "wav_0_bits": lambda: wav_header(bits=0),
    "wav_65528_bits": lambda: wav_header(bits=65_528),
    "wav_of_nan": lambda: wav(np.full((1000, 1), np.nan), 16_000, 32),
    "wav_of_infinity": lambda: wav(np.full((1000, 1), np.inf), 16_000, 32),
    "wav_20_minutes": lambda: wav(np.zeros((20 * 60 * 1_000, 1)), 1_000),
    "wav_of_random_bytes": lambda: b"RIFF\0\1\0\0WAVE" + random.Random(4).randbytes(5000),
    "flac_declares_hours": lambda: flac_header(2**36 - 1) + bytes(100),
    "flac_declares_seconds": lambda: flac_header(160_000) + bytes(100),
    "flac_cut": lambda: sound("tone.flac")[:5000],
    "flac_25_mb_of_silence": lambda: flac_of_silence((25 << 20) // 13),
    "flac_of_random_bytes": lambda: b"fLaC\0\0\0\x22" + random.Random(5).randbytes(5000),
    "mp3_25_mb_of_silence": lambda: mp3_of_silence(25 << 20),
    "mp3_of_random_bytes": lambda: b"ID3\3\0\0\0\0\0\0" + random.Random(6).randbytes(5000),
    "mp3_tag_of_256_mb": lambda: b"ID3\3\0\0\x7f\x7f\x7f\x7f" + bytes(1000),
    "mp3_tag_only": lambda: b"ID3\3\0\0\0\0\0\0",
    "ogg_cut_in_header": lambda: sound("tone.ogg")[:60],
    "ogg_cut_in_tables": lambda: sound("tone.ogg")[:2000],
    "ogg_4_gigahertz": lambda: ogg(0xFFFFFFFF),
    "ogg_0_hertz": lambda: ogg(0),
    "ogg_0_channels": lambda: ogg(16_000, 0),
    "ogg_of_random_bytes": lambda: b"OggS\0\2" + random.Random(7).randbytes(5000),
}


def main() -> None:
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    for kind, files in (("picture", PICTURES), ("sound", SOUNDS)):
        for name, make in files.items():
            (directory / f"{kind}_{name}").write_bytes(make())


if __name__ == "__main__":
    main()
