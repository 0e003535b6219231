"""How fast a machine computes and reads its memory and drive: measured, or guessed from its CPU.

    CPU name, cores, drive  ->  guess    ->  Rates, with the factor by which they may be off
    `--calibrate`           ->  Rates.from_value

Guesses come from a table of CPU families: memory channels times transfers per second, and the speeds that Argosy's
benchmarks reached on such machines. They are labelled as guesses wherever they are printed.

Elsewhere: `forecast/calibration.py` measures; `forecast/speed.py` turns rates into seconds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import copysign, log2
from typing import Any, get_args

from argosy import _native
from argosy.config import FLOAT_FORMATS, MEASURED_FORMATS, KvDtype
from argosy.strict_json import JsonError

# How far rates may be off: a measurement's own variation, kept between the first two; or the third for a guess.
MEASURED_SPREAD, MOST_MEASURED_SPREAD, GUESSED_SPREAD = 1.1, 1.4, 1.5
FORMAT = "argosy-rates-10"
NUM_TOKENS = (1, 2, 4, 8, 16, 64)  # larger numbers are as fast as the last
_LEAST_RATE, _MOST_RATE = 1e-18, 1e15
_OVERLAP = 0.5  # between machines that hide all of it and machines that hide nothing
_DRIVE_LATENCY_S = 300e-6  # extra seconds for a few records at once, beyond what the drive's rate explains
# Medians of cores of Zen 4 and 5 (`--calibrate`, 2026-11).
_READ_CPU_S_PER_BYTE, _TRANSCODE_CPU_S_PER_BYTE = 50e-12, 300e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Bytes and operations per second of a machine with all of its cores; a multiply-add is two operations.

    int8_operations: what the int8 arithmetic probe measured when the other rates were measured.
    operations: rates of products with cached weights, by format, for each of NUM_TOKENS: with fewer tokens, unpacking
        the weights costs each token more.
    waits: how much longer products take with weights in memory, by format, for each of NUM_TOKENS: as a share of the
        time in which memory delivers the weights. Time that arithmetic hides is left out.
    encoder_operations: rate of vision towers, whose weights are bfloat16.
    keys_values: share of `memory_bytes_per_s` at which one token's attention reads the KV cache when memory bounds it,
        by format of the cache.
    attention_operations: rate of one token's attention when arithmetic bounds it, by format.
    prompt_attention_operations: rate of attention with many tokens of one sequence, by format.
    drive: (record bytes, bytes per second) in ascending order, read a few at a time.
    drive_spread: the drive's rate may be off by this factor, either way, if it is larger than `spread`.
    drive_source: where the drive's rate comes from and how old it is.
    overlap: the share of the shorter of reading and computing that the longer hides when both run, 0 to 1.
    transcoding_overlap: the same when records are transcoded while they land.
    read_cpu_s_per_byte: time of one core to read a byte of a record, which delays computing when all cores compute.
    transcode_cpu_s_per_byte: the same to read and transcode it.
    layer_s: overhead of a layer beyond its products: thread synchronisation, router, norms.
    streamed_layer_s: further overhead if the layer's experts are streamed.
    missing_layer_s: further overhead if any expert of the layer misses: starting reads, and waking up.
    missing_layer_s_per_byte: further overhead for each byte of a record.
    miss_s: overhead of each further expert that misses: choosing a slot, handing the record over.
    step_s: overhead of a step beyond its layers.
    spread: a rate may be off by this factor, either way.
    source: where the rates come from, as a phrase for people.
    """

    cores: int
    memory_bytes_per_s: float
    int8_operations: float
    operations: Mapping[str, tuple[float, ...]]
    waits: Mapping[str, tuple[float, ...]]
    encoder_operations: float
    keys_values: Mapping[KvDtype, float]
    attention_operations: Mapping[KvDtype, float]
    prompt_attention_operations: Mapping[KvDtype, float]
    drive: tuple[tuple[int, float], ...]
    drive_spread: float = 1.0
    drive_source: str = ""
    drive_latency_s: float = _DRIVE_LATENCY_S
    overlap: float = _OVERLAP
    transcoding_overlap: float = _OVERLAP
    read_cpu_s_per_byte: float = _READ_CPU_S_PER_BYTE
    transcode_cpu_s_per_byte: float = _TRANSCODE_CPU_S_PER_BYTE
    layer_s: float
    streamed_layer_s: float
    missing_layer_s: float
    missing_layer_s_per_byte: float
    miss_s: float
    step_s: float
    spread: float
    source: str

    @property
    def is_measured(self) -> bool:
        return self.spread < GUESSED_SPREAD

    def product_s(self, format: str, nbytes: float, parameters: float, tokens: float) -> float:
        """Return the seconds of products of `tokens` tokens with weights of a format, read once from memory."""
        format = _native.measured_as(format)
        rate = _at(tokens, self.operations[format])
        return (
            2.0 * parameters * tokens / rate
            + _at(tokens, self.waits[format]) * nbytes / self.memory_bytes_per_s
        )

    def attention_s(self, kv_dtype: KvDtype, nbytes: float, operations: float) -> float:
        """Return the seconds of one token's attention, which reads `nbytes` bytes of keys and values."""
        read_s = nbytes / (self.keys_values[kv_dtype] * self.memory_bytes_per_s)
        return max(read_s, operations / self.attention_operations[kv_dtype])

    def prompt_attention_s(self, kv_dtype: KvDtype, operations: float) -> float:
        """Return the seconds of many tokens' attention; the tokens share passes over their keys."""
        return operations / self.prompt_attention_operations[kv_dtype]

    def drive_rate(self, record_bytes: float) -> float:
        """Return the bytes per second at which the drive reads records of that size."""
        smallest, rate = self.drive[0]
        if record_bytes <= smallest:  # the same number of records in a second
            return rate * record_bytes / smallest
        return _interpolated(self.drive, record_bytes)

    def misses_overhead_s(self, asked: float, misses: float, record_bytes: float) -> float:
        """Return the seconds of a layer's overhead, not counting the wait for records.

        Args:
            asked: experts that the layer requests.
            misses: how many of them miss on average. The number varies independently from token to token.
        """
        any_misses: float = 1.0 - max(0.0, 1.0 - misses / asked) ** asked
        first_s = self.missing_layer_s + record_bytes * self.missing_layer_s_per_byte
        return any_misses * first_s + (misses - any_misses) * self.miss_s

    def scaled(self, factor: float) -> Rates:
        """Return the same machine with every rate scaled by a factor; the drive's by more, if it varies more."""
        faster = self.at(self.memory_bytes_per_s * factor, self.int8_operations * factor)
        most = max(abs(log2(factor)), log2(self.drive_spread)) if factor != 1.0 else 0.0
        of_drive: float = 2.0 ** copysign(most, log2(factor))
        return replace(faster, drive=tuple((size, rate * of_drive) for size, rate in self.drive))

    def at(self, memory_bytes_per_s: float, int8_operations: float) -> Rates:
        """Return the same machine at a moment when memory and arithmetic run at other rates."""
        factor = int8_operations / self.int8_operations
        return replace(
            self,
            memory_bytes_per_s=memory_bytes_per_s,
            int8_operations=int8_operations,
            operations={
                name: tuple(rate * factor for rate in found) for name, found in self.operations.items()
            },
            encoder_operations=self.encoder_operations * factor,
            attention_operations={name: rate * factor for name, rate in self.attention_operations.items()},
            prompt_attention_operations={
                name: rate * factor for name, rate in self.prompt_attention_operations.items()
            },
            layer_s=self.layer_s / factor,
            streamed_layer_s=self.streamed_layer_s / factor,
            missing_layer_s=self.missing_layer_s / factor,
            missing_layer_s_per_byte=self.missing_layer_s_per_byte / factor,
            miss_s=self.miss_s / factor,
            read_cpu_s_per_byte=self.read_cpu_s_per_byte / factor,
            transcode_cpu_s_per_byte=self.transcode_cpu_s_per_byte / factor,
            step_s=self.step_s / factor,
        )

    def as_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self), "drive": [list(pair) for pair in self.drive]}

    @classmethod
    def from_value(cls, value: object) -> Rates:
        """Read what `as_dict` made.

        Raises:
            JsonError: the value is something else; the message says what is wrong.
        """
        return _checked(value)


def _interpolated(points: Sequence[tuple[float, float]], x: float) -> float:
    """Interpolate the value at `x` between ascending points; beyond the ends, the nearest point's value counts."""
    before = points[0]
    for at in points:
        if x <= at[0]:
            share = (x - before[0]) / (at[0] - before[0]) if at is not before else 0.0
            return before[1] + max(0.0, share) * (at[1] - before[1])
        before = at
    return before[1]


def _at(tokens: float, by_tokens: Sequence[float]) -> float:
    """Interpolate the value for `tokens` tokens from the values for NUM_TOKENS."""
    return _interpolated(
        [(log2(at), value) for at, value in zip(NUM_TOKENS, by_tokens, strict=True)], log2(tokens)
    )


def _checked(value: object) -> Rates:
    if not isinstance(value, dict) or value.pop("format", None) != FORMAT:
        raise JsonError(f"is not an object with `format` {FORMAT!r}")
    if value.keys() != set(Rates.__dataclass_fields__):
        raise JsonError("has other keys than those that were written")
    formats = set(MEASURED_FORMATS)
    for name in ("operations", "waits"):
        found = value[name]
        if not isinstance(found, dict) or found.keys() != formats or not all(map(_are_rates, found.values())):
            raise JsonError(f"has `{name}` that are not rates for each format")
    for name in ("keys_values", "attention_operations", "prompt_attention_operations"):
        found = value[name]
        dtypes = set(get_args(KvDtype))
        if not isinstance(found, dict) or found.keys() != dtypes or not all(map(_is_rate, found.values())):
            raise JsonError(f"has `{name}` that is not a rate for each format of the KV cache")
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
        "cores", "memory_bytes_per_s", "int8_operations", "encoder_operations", "drive_latency_s",
        "read_cpu_s_per_byte", "transcode_cpu_s_per_byte", "layer_s", "streamed_layer_s", "missing_layer_s",
        "missing_layer_s_per_byte", "miss_s", "step_s", "spread", "drive_spread",
    ):  # fmt: skip
        if not _is_rate(value[name]):
            raise JsonError(f"has `{name}` that is not a number above zero")
    for name in ("overlap", "transcoding_overlap"):
        share = value[name]
        if share != 0 and not (_is_rate(share) and share <= 1):
            raise JsonError(f"has `{name}` that is not a number from 0 to 1")
    for name in ("source", "drive_source"):
        if not isinstance(value[name], str) or len(value[name]) > 200:
            raise JsonError(f"has `{name}` that is not a short text")
    by_tokens = {
        name: {format: tuple(found) for format, found in value[name].items()}
        for name in ("operations", "waits")
    }
    return Rates(**{**value, **by_tokens, "drive": tuple(pairs)})


def _is_rate(value: object) -> bool:
    return type(value) in (int, float) and _LEAST_RATE < value < _MOST_RATE  # type: ignore[operator]


def _are_rates(value: object) -> bool:
    return isinstance(value, list) and len(value) == len(NUM_TOKENS) and all(map(_is_rate, value))


@dataclass(frozen=True, slots=True)
class CpuFamily:
    """A kind of processor: memory it reads in all and with one core, int8 and float32 operations of a core."""

    name: str
    pattern: str  # matches the model name in /proc/cpuinfo
    memory_gb_per_s: float  # three quarters of channels times transfers a second times 8 bytes
    core_gb_per_s: float
    core_int8_gops: float
    core_f32_gops: float
    source: str
    has_bf16: bool = False  # vdpbf16ps, which encoders use


# The first match wins. GB/s of a processor: 0.75 x channels x MT/s x 8 bytes, from its maker's data sheet.
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
_READ_SHARE = 0.85  # share of memory's rate at which weights are read (benchmarks/resident.py)
_F32_SHARE = 0.6
_BF16_SPEED_UP = 3.2  # encoders relative to float32 products: 353 GFLOP/s on two cores of Zen 4
# Shares of the memory rate, and of the rate of float32 products (benchmarks/attention.py on Zen 4, 2026-11).
_KEYS_VALUES_SHARE, _ATTENTION_SHARE, _PROMPT_ATTENTION_SHARE = 0.5, 1.1, 1.5
# Shares of those operations, for NUM_TOKENS: medians of formats on Zen 4 (`--calibrate`, 2026-11).
_FLOAT_SHARES, _INT8_SHARES = (0.57, 0.85, 1.0, 0.96, 1.0, 1.0), (0.42, 0.65, 0.85, 0.88, 0.86, 1.0)
_INT8_SHARE = 0.55  # share of the instruction's peak rate (benchmarks/prefill.py)
_FULL_RECORD_BYTES = 1 << 20  # smaller records do not reach a drive's rate


def unhidden_waits(
    operations: Mapping[str, tuple[float, ...]], memory_bytes_per_s: float
) -> dict[str, tuple[float, ...]]:
    """Return `Rates.waits` for a machine where the longer of arithmetic and memory hides the shorter."""
    waits: dict[str, tuple[float, ...]] = {}
    for name in MEASURED_FORMATS:
        delivered_s = _native.matrix_bytes(name, 1024, 1024) / 1024**2 / memory_bytes_per_s  # a weight
        computed_s = [2.0 * tokens / rate for tokens, rate in zip(NUM_TOKENS, operations[name], strict=True)]
        waits[name] = tuple(max(1e-9, 1.0 / _READ_SHARE - seconds / delivered_s) for seconds in computed_s)
    return waits


def guess(cpu: str, cores: int, *, drive_bytes_per_s: float | None = None) -> Rates:
    """Guess the rates of a machine from its processor's name, and from the drive's rate if that is known."""
    family = next((one for one in CPU_FAMILIES if re.search(one.pattern, cpu, re.IGNORECASE)), UNKNOWN_CPU)
    memory = 1e9 * min(family.memory_gb_per_s, cores * family.core_gb_per_s)
    floats = 1e9 * cores * family.core_f32_gops * _F32_SHARE
    operations: dict[str, tuple[float, ...]] = {}
    for name in MEASURED_FORMATS:
        passes = 2 if name == "q8" else 1  # q8 activations take two bytes
        most = floats if name in FLOAT_FORMATS else 1e9 * cores * family.core_int8_gops * _INT8_SHARE / passes
        shares = _FLOAT_SHARES if name in FLOAT_FORMATS else _INT8_SHARES
        operations[name] = tuple(most * share for share in shares)
    drive = drive_bytes_per_s or _UNKNOWN_DRIVE_BYTES_PER_S
    told = "" if drive_bytes_per_s else ", drive unknown"
    return Rates(
        cores=cores,
        memory_bytes_per_s=memory,
        int8_operations=1e9 * cores * family.core_int8_gops,
        operations=operations,
        waits=unhidden_waits(operations, memory),
        encoder_operations=floats * (_BF16_SPEED_UP if family.has_bf16 else 1.0),
        keys_values=dict.fromkeys(get_args(KvDtype), _KEYS_VALUES_SHARE),
        attention_operations=dict.fromkeys(get_args(KvDtype), floats * _ATTENTION_SHARE),
        prompt_attention_operations=dict.fromkeys(get_args(KvDtype), floats * _PROMPT_ATTENTION_SHARE),
        drive=((_FULL_RECORD_BYTES, drive),),
        layer_s=30e-6,
        streamed_layer_s=50e-6,
        missing_layer_s=100e-6,
        missing_layer_s_per_byte=60e-12,
        miss_s=20e-6,
        step_s=300e-6,
        spread=GUESSED_SPREAD,
        source=f"guessed: {family.name}, {cores} cores{told} ({family.source})",
    )
