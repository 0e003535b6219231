"""Write GGUF files byte by byte: the tests' own writer, which can lie about anything."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

STRING, ARRAY = 8, 9
LAYOUTS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def text(value: str | bytes) -> bytes:
    encoded = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(encoded)) + encoded


def entry(key: str | bytes, kind: int, value: object) -> bytes:
    """A metadata entry; an array is (item type, items)."""
    return text(key) + struct.pack("<I", kind) + _value(kind, value)


def _value(kind: int, value: object) -> bytes:
    if kind == STRING:
        return text(value)  # type: ignore[arg-type]
    if kind == ARRAY:
        item_kind, items = value  # type: ignore[misc]
        return struct.pack("<IQ", item_kind, len(items)) + b"".join(_value(item_kind, item) for item in items)
    return struct.pack("<" + LAYOUTS[kind], value)


def tensor(name: str | bytes, sizes: list[int], kind: int, offset: int) -> bytes:
    """An entry of the tensor list; `sizes` has columns first, as in the file."""
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


@dataclass
class RawGguf:
    """A small, valid file; a test changes the parts that should be wrong."""

    metadata: list[bytes] = field(
        default_factory=lambda: [
            entry("general.architecture", STRING, "qwen3moe"),
            entry("a.count", 4, 7),
            entry("a.rate", 6, 1e-5),
            entry("a.is_on", 7, True),
            entry("a.words", ARRAY, (STRING, ["one", "", "drei €"])),
            entry("a.numbers", ARRAY, (5, [1, -2, 3])),
            entry("a.flags", ARRAY, (7, [True, False])),
        ]
    )
    # 4 x 2 float32 (32 bytes), 3 float32 (12, padded to 32), 2 x 32 Q8_0 (68)
    tensors: list[bytes] = field(
        default_factory=lambda: [
            tensor("x", [4, 2], 0, 0),
            tensor("y", [3], 0, 32),
            tensor("z", [32, 2], 8, 64),
        ]
    )
    data: bytes = bytes(range(64)) + bytes(68)
    magic: bytes = b"GGUF"
    version: int = 3
    num_tensors: int | None = None
    num_entries: int | None = None
    alignment: int = 32

    def header(self) -> bytes:
        counts = (
            len(self.tensors) if self.num_tensors is None else self.num_tensors,
            len(self.metadata) if self.num_entries is None else self.num_entries,
        )
        start = self.magic + struct.pack("<IQQ", self.version, *counts)
        return start + b"".join(self.metadata) + b"".join(self.tensors)

    def to_bytes(self) -> bytes:
        header = self.header()
        return header + bytes(-len(header) % self.alignment) + self.data

    def write(self, path: Path) -> Path:
        path.write_bytes(self.to_bytes())
        return path
