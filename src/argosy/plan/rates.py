"""How fast a machine reads memory and its drive, and computes: measured, or guessed from its kind.

    CPU name, cores, drive  ->  guess    ->  Rates, with the factor by which they may be wrong
    `--calibrate`           ->  Rates.from_json

Guesses come from a table of CPU families: memory channels times transfers per second, and the speeds that Argosy's
benchmarks reached on such machines. They are labelled as guesses wherever they are printed.

Elsewhere: `engine/calibration.py` measures; `speed.py` turns rates into seconds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from argosy.config import Format
from argosy.errors import UsageError
from argosy.strict_json import JsonError, parse_json

FLOAT_FORMATS = frozenset({"f32", "f16", "bf16", "f8"})
# How far rates may be off: what they varied by while they were measured, between the first two; or guessed.
MEASURED_SPREAD, MOST_MEASURED_SPREAD, GUESSED_SPREAD = 1.1, 1.4, 1.5
FORMAT = "argosy-rates-5"
_MOST_RATE = 1e15
_OVERLAP = 0.5  # between machines that hide all of it and those that hide nothing
_DRIVE_LATENCY_S = 300e-6  # of a few records at once, beyond what the drive's rate explains


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Bytes and operations per second of a machine with all of its cores; a multiply-add is two operations.

    reads: share of `memory_bytes_per_s` at which a product reads weights for one token, by format.
    operations: of products for many tokens, by format.
    encoder_operations: of towers for pictures, whose weights are bfloat16.
    keys_values_bytes_per_s: at which one token's attention reads the KV cache when memory bounds it.
    attention_operations: when arithmetic bounds it.
    prompt_attention_operations: of attention of many tokens of one sequence.
    drive: (record bytes, bytes per second) in ascending order, read a few at a time.
    overlap: the share of the shorter of reading and computing that the longer hides when both run, 0 to 1.
    layer_s: overhead of a layer beyond its products: thread synchronisation, router, norms.
    streamed_layer_s: further overhead if the layer's experts are streamed.
    missing_layer_s: further overhead if one of them misses: which to evict, and starting reads.
    step_s: overhead of a step beyond its layers.
    spread: a rate may be wrong by this factor, either way.
    source: where the rates come from, in words.
    """

    cores: int
    memory_bytes_per_s: float
    reads: Mapping[str, float]
    operations: Mapping[str, float]
    encoder_operations: float
    keys_values_bytes_per_s: float
    attention_operations: float
    prompt_attention_operations: float
    drive: tuple[tuple[int, float], ...]
    drive_latency_s: float = _DRIVE_LATENCY_S
    overlap: float = _OVERLAP
    layer_s: float
    streamed_layer_s: float
    missing_layer_s: float
    step_s: float
    spread: float
    source: str

    @property
    def is_measured(self) -> bool:
        return self.spread < GUESSED_SPREAD

    def read_s(self, format: str, nbytes: float) -> float:
        """Seconds to read weights of a format for one token."""
        return nbytes / (self.memory_bytes_per_s * self.reads[format])

    def compute_s(self, format: str, operations: float) -> float:
        return operations / self.operations[format]

    def attention_s(self, nbytes: float, operations: float) -> float:
        """Seconds of attention of one token, which reads so many bytes of keys and values."""
        return max(nbytes / self.keys_values_bytes_per_s, operations / self.attention_operations)

    def prompt_attention_s(self, operations: float) -> float:
        """Seconds of attention of many tokens, which share passes over their keys."""
        return operations / self.prompt_attention_operations

    def drive_rate(self, record_bytes: float) -> float:
        """Bytes per second at which records of that size are read."""
        before = self.drive[0]
        if record_bytes <= before[0]:  # smaller records: as many of them in a second
            return before[1] * record_bytes / before[0]
        for at in self.drive[1:]:
            if record_bytes <= at[0]:
                share = (record_bytes - before[0]) / (at[0] - before[0])
                return before[1] + share * (at[1] - before[1])
            before = at
        return before[1]

    def scaled(self, factor: float) -> Rates:
        """The same machine, faster by a factor in everything."""
        return replace(
            self,
            memory_bytes_per_s=self.memory_bytes_per_s * factor,
            operations={name: rate * factor for name, rate in self.operations.items()},
            encoder_operations=self.encoder_operations * factor,
            keys_values_bytes_per_s=self.keys_values_bytes_per_s * factor,
            attention_operations=self.attention_operations * factor,
            prompt_attention_operations=self.prompt_attention_operations * factor,
            drive=tuple((size, rate * factor) for size, rate in self.drive),
            layer_s=self.layer_s / factor,
            streamed_layer_s=self.streamed_layer_s / factor,
            missing_layer_s=self.missing_layer_s / factor,
            step_s=self.step_s / factor,
        )

    def as_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self), "drive": [list(pair) for pair in self.drive]}

    @classmethod
    def from_json(cls, data: bytes) -> Rates:
        """Read what `as_dict` wrote.

        Raises:
            UsageError: it is no such file; says what is wrong.
        """
        try:
            return _checked(parse_json(data))
        except JsonError as error:
            raise UsageError(
                f"the rates of this machine cannot be read: {error}", hint="`--calibrate` measures them again"
            ) from None


def _checked(value: object) -> Rates:
    if not isinstance(value, dict) or value.pop("format", None) != FORMAT:
        raise JsonError(f"is not an object with `format` {FORMAT!r}")
    if value.keys() != set(Rates.__dataclass_fields__):
        raise JsonError("has other keys than those that were written")
    formats = set(get_args(Format))
    for name in ("reads", "operations"):
        found = value[name]
        if not isinstance(found, dict) or found.keys() != formats or not all(map(_is_rate, found.values())):
            raise JsonError(f"has `{name}` that are not a rate for each format")
    drive = value["drive"]
    if not isinstance(drive, list) or not 1 <= len(drive) <= 100:
        raise JsonError("has no list as `drive`")
    pairs = []
    for pair in drive:
        if not isinstance(pair, list) or len(pair) != 2 or not all(map(_is_rate, pair)):
            raise JsonError("has a `drive` that is not pairs of sizes and rates")
        pairs.append((int(pair[0]), float(pair[1])))
    sizes = [size for size, _ in pairs]
    if sizes != sorted(set(sizes)):
        raise JsonError("has a `drive` whose sizes do not rise")
    for name in (
        "cores", "memory_bytes_per_s", "encoder_operations", "keys_values_bytes_per_s", "attention_operations",
        "prompt_attention_operations", "drive_latency_s", "layer_s", "streamed_layer_s", "missing_layer_s", "step_s",
        "spread",
    ):  # fmt: skip
        if not _is_rate(value[name]):
            raise JsonError(f"has `{name}` that is no number above zero")
    overlap = value["overlap"]
    if overlap != 0 and not (_is_rate(overlap) and overlap <= 1):
        raise JsonError("has `overlap` that is no number from 0 to 1")
    if not isinstance(value["source"], str) or len(value["source"]) > 200:
        raise JsonError("has `source` that is no short text")
    return Rates(**{**value, "drive": tuple(pairs)})


def _is_rate(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < _MOST_RATE  # type: ignore[operator]


@dataclass(frozen=True, slots=True)
class CpuFamily:
    """A kind of processor: memory it reads in all and with one core, int8 and float32 operations of a core."""

    name: str
    pattern: str  # of the name in /proc/cpuinfo
    memory_gb_per_s: float  # three quarters of channels times transfers a second times 8 bytes
    core_gb_per_s: float
    core_int8_gops: float
    core_f32_gops: float
    source: str
    has_bf16: bool = False  # vdpbf16ps, which encoders use


# Looked up in order. GB/s of a processor: 0.75 x channels x MT/s x 8 bytes, from its maker's data sheet.
CPU_FAMILIES: tuple[CpuFamily, ...] = (
    CpuFamily("AMD EPYC, Zen 4 or 5", r"EPYC (9|8|4[0-9])|EPYC$|EPYC Processor$", 345, 25, 500, 90,
              "12 x DDR5-4800; cores as in docs/performance.md, 2026-11", has_bf16=True),
    CpuFamily("AMD EPYC, Zen 2 or 3", r"EPYC 7", 154, 20, 200, 45,
              "8 x DDR4-3200; cores as in docs/performance.md, 2026-11"),
    CpuFamily("Intel Xeon, Sapphire Rapids or later", r"Xeon.*(Platinum|Gold|Silver) ?[68][45]\d\d|Xeon.* 6\d{3}",
              230, 12, 450, 80, "8 x DDR5-4800, data sheet, 2026-11", has_bf16=True),
    CpuFamily("Intel Xeon, Ice Lake", r"Xeon.*83\d\d|Xeon.*63\d\d", 154, 12, 350, 70,
              "8 x DDR4-3200, data sheet, 2026-11"),
    CpuFamily("Intel Xeon, older", r"Xeon", 105, 11, 150, 45, "6 x DDR4-2933, data sheet, 2026-11"),
    CpuFamily("AWS Graviton", r"Neoverse|Graviton", 230, 12, 150, 30, "8 x DDR5-4800, data sheet, 2026-11"),
    CpuFamily("AMD Threadripper", r"Threadripper", 154, 30, 350, 80, "4 to 8 channels, data sheet, 2026-11"),
    CpuFamily("AMD Ryzen AI Max", r"Ryzen AI Max", 190, 40, 450, 90, "8 x LPDDR5X-8000, data sheet, 2026-11",
              has_bf16=True),
    CpuFamily("AMD Ryzen 7000 or later", r"Ryzen (AI )?\d \d*[789]\d{3}|Ryzen \d [789]\d{3}", 62, 40, 450, 90,
              "2 x DDR5-5200, data sheet, 2026-11", has_bf16=True),
    CpuFamily("AMD Ryzen, older", r"Ryzen", 38, 25, 180, 45, "2 x DDR4-3200, data sheet, 2026-11"),
    CpuFamily("Intel Core, 12th generation or later", r"1[2-9]th Gen|Core\(TM\) Ultra|Core\(TM\) \d", 62, 35, 200, 50,
              "2 x DDR5-5200, data sheet, 2026-11"),
    CpuFamily("Intel Core, older", r"Core\(TM\)", 34, 20, 150, 40, "2 x DDR4-2933, data sheet, 2026-11"),
)  # fmt: skip
UNKNOWN_CPU = CpuFamily(
    "an unknown processor", "", 34, 12, 100, 30, "2 channels of DDR4, the least likely to flatter"
)
_UNKNOWN_DRIVE_BYTES_PER_S = 2.0e9  # between a SATA drive and a fast NVMe drive
_READ_SHARE = 0.85  # of memory's rate, as benchmarks/resident.py finds on several machines
_F32_SHARE = 0.6
_BF16_SPEED_UP = 3.2  # of encoders, over products of float32: 353 GFLOP/s on two cores of Zen 4
# Of memory's rate, and of products of float32 (benchmarks/attention.py on Zen 4, 2026-11).
_KEYS_VALUES_SHARE, _ATTENTION_SHARE, _PROMPT_ATTENTION_SHARE = 0.5, 1.1, 1.5
_INT8_SHARE = 0.55  # of the instruction's peak, as benchmarks/prefill.py finds
_FULL_RECORD_BYTES = 1 << 20  # smaller records do not reach a drive's rate


def guess(cpu: str, cores: int, *, drive_bytes_per_s: float | None = None) -> Rates:
    """Rates of a machine of which only the processor's name and perhaps the drive's rate are known."""
    family = next((one for one in CPU_FAMILIES if re.search(one.pattern, cpu, re.IGNORECASE)), UNKNOWN_CPU)
    memory = 1e9 * min(family.memory_gb_per_s, cores * family.core_gb_per_s)
    operations = {}
    for name in get_args(Format):
        if name in FLOAT_FORMATS:
            operations[name] = 1e9 * cores * family.core_f32_gops * _F32_SHARE
        else:
            passes = 2 if name == "q8" else 1  # activations of q8 have two bytes
            operations[name] = 1e9 * cores * family.core_int8_gops * _INT8_SHARE / passes
    drive = drive_bytes_per_s or _UNKNOWN_DRIVE_BYTES_PER_S
    told = "" if drive_bytes_per_s else ", drive unknown"
    return Rates(
        cores=cores,
        memory_bytes_per_s=memory,
        reads=dict.fromkeys(get_args(Format), _READ_SHARE),
        operations=operations,
        encoder_operations=operations["f32"] * (_BF16_SPEED_UP if family.has_bf16 else 1.0),
        keys_values_bytes_per_s=memory * _KEYS_VALUES_SHARE,
        attention_operations=operations["f32"] * _ATTENTION_SHARE,
        prompt_attention_operations=operations["f32"] * _PROMPT_ATTENTION_SHARE,
        drive=((_FULL_RECORD_BYTES, drive),),
        layer_s=30e-6,
        streamed_layer_s=50e-6,
        missing_layer_s=300e-6,
        step_s=300e-6,
        spread=GUESSED_SPREAD,
        source=f"guessed: {family.name}, {cores} cores{told} ({family.source})",
    )
