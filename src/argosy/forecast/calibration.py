"""Measure the machine's rates that a forecast needs, within a minute, and keep them.

    memory, products, attention, the drive, small models  ->  Rates, in the user's cache

Products of 1 to 64 tokens are timed twice: with weights in a CPU cache, which measures arithmetic, and with weights
that no cache holds, which adds the wait for memory. Each is compared with a probe of int8 arithmetic taken at the
same moment, because a virtual machine's cores run at half speed while a neighbour uses their other thread. The
drive is read at several record sizes, then again while products keep cores and memory busy, with and without
transcoding, which shows how much of one the other hides. The engine runs two tiny models of different depth, which
give the overhead of a layer beyond its products, and two with experts of usual sizes, which give the cost of a
layer's first miss and of each further one.

Elsewhere: `product_rates.py` and `drive_rates.py` time their parts; `machine/kept_rates.py` keeps the result;
`machine/rates.py` defines the rates, and guesses them for machines that were not measured.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from datetime import date
from pathlib import Path
from typing import NamedTuple

import numpy as np

from argosy import _native
from argosy.checkpoint.geometry import dense_shapes, expert_shapes
from argosy.checkpoint.safetensors_write import TensorToWrite, write_safetensors
from argosy.config import MEASURED_FORMATS, SamplingParams
from argosy.experts.resident import Progress
from argosy.forecast.drive_rates import ROUNDS, DriveRates, file_to_read
from argosy.forecast.product_rates import KV_DTYPES, MOST_WAITING, Kernels
from argosy.machine import resources, tuning
from argosy.machine.rates import (
    MEASURED_SPREAD,
    MOST_MEASURED_SPREAD,
    NUM_TOKENS,
    Rates,
)
from argosy.model.families import CONFIG_FILE, FAMILIES
from argosy.open.engine import Engine

_BESIDE = ("router", "sampling", "other")  # parts of a ledger other than arithmetic and waiting
_STEPS, _TURNS = 64, 3  # per small model
_SHARES = (0.75, 0.5, 0.25)  # shares of experts in memory at which misses are measured


def calibrate(
    files: Sequence[Path], *, threads: int | None = None, progress: Progress | None = None
) -> Rates:
    """Measure this machine.

    Args:
        files: the model's files; the drive is measured by reading the largest. If it is small, or there
            are none, a temporary file in the current directory is written and read.
        threads: for products; None: the engine's default.

    Raises:
        DiskFull: there is no room for the temporary file.   UsageError: it cannot be written.
    """
    tell = progress or (lambda what, share: None)
    cores = threads or tuning.measured_threads()
    tell("measuring products and the drive", 0.0)
    choices = tuning.choose(cores, _native.instruction_sets()[-1])
    runtime = _native.Runtime(cores, choices.tunings())
    with closing(runtime), closing(Kernels(runtime, cores)) as kernels, file_to_read(files) as path:
        reads = DriveRates(path)
        # Alternate the two in rounds: a virtual machine's neighbour takes bandwidth for many seconds at a time.
        for number in range(ROUNDS):
            tell("measuring products and the drive", 0.05 + 0.7 * number / ROUNDS)
            kernels.measure()
            reads.measure()
        rates, varied = kernels.rates, kernels.varied
        memory_bytes_per_s = kernels.memory_bytes_per_s
        keys_values = {dtype: kernels.share_of_memory(f"keys and values {dtype}") for dtype in KV_DTYPES}
        waits: dict[str, tuple[float, ...]] = {
            format: tuple(kernels.wait(format, min(tokens, MOST_WAITING)) for tokens in NUM_TOKENS)
            for format in MEASURED_FORMATS
        }
        int8_operations = kernels.int8_operations
        drive = reads.result(cores)
    overheads = _overheads(cores, int8_operations, tell)
    tell("done", 1.0)
    return Rates(
        cores=cores,
        memory_bytes_per_s=memory_bytes_per_s,
        int8_operations=int8_operations,
        operations={
            format: tuple(rates[f"{format} {tokens}"] for tokens in NUM_TOKENS) for format in MEASURED_FORMATS
        },
        waits=waits,
        encoder_operations=rates["encoder"],
        keys_values=keys_values,
        attention_operations={dtype: rates[f"attention {dtype}"] for dtype in KV_DTYPES},
        prompt_attention_operations={dtype: rates[f"prompt attention {dtype}"] for dtype in KV_DTYPES},
        drive=drive.rates,
        drive_spread=drive.spread,
        drive_latency_s=drive.latency_s,
        overlap=drive.overlap,
        transcoding_overlap=drive.transcoding_overlap,
        read_cpu_s_per_byte=drive.read_cpu_s_per_byte,
        transcode_cpu_s_per_byte=drive.transcode_cpu_s_per_byte,
        layer_s=overheads.layer_s,
        streamed_layer_s=overheads.streamed_layer_s,
        missing_layer_s=overheads.missing_layer_s,
        missing_layer_s_per_byte=overheads.missing_layer_s_per_byte,
        miss_s=overheads.miss_s,
        step_s=overheads.step_s,
        spread=min(MOST_MEASURED_SPREAD, max(MEASURED_SPREAD, varied)),
        source=f"measured {date.today().isoformat()}, {resources.cpu_model()[:100]}, {cores} threads",
    )


class _Size(NamedTuple):
    """The size of a test model with random float16 weights."""

    layers: int
    hidden: int
    width: int
    experts: int
    chosen: int

    @property
    def record_bytes(self) -> int:
        return 3 * 2 * self.hidden * self.width


# Two models are as small as the kernels allow. The other two have experts of usual sizes, several of which may miss
# in one layer.
_FEW, _MANY = _Size(4, 256, 64, 16, 4), _Size(20, 256, 64, 16, 4)
_MIDDLING, _LARGE = _Size(4, 512, 256, 16, 8), _Size(3, 1024, 512, 16, 8)


class _Overheads(NamedTuple):
    """Seconds explained by neither products nor reads.

    layer_s: per layer.   streamed_layer_s: extra if the layer's experts are streamed.
    missing_layer_s: extra if any of them misses.   missing_layer_s_per_byte: the same per byte of a record.
    miss_s: for each further expert that misses.   step_s: per step.
    """

    layer_s: float
    streamed_layer_s: float
    missing_layer_s: float
    missing_layer_s_per_byte: float
    miss_s: float
    step_s: float


class _Token(NamedTuple):
    """A decode step of a small model: median seconds, mean seconds outside arithmetic and waiting, and the hit rate."""

    seconds: float
    beside_s: float
    hit_rate: float


def _overheads(cores: int, int8_operations: float, tell: Progress) -> _Overheads:
    """Run the small models; seconds are scaled to that rate of int8 arithmetic."""
    with tempfile.TemporaryDirectory(prefix="argosy-calibration-") as scratch:

        def tokens(size: _Size, *shares: float | None) -> list[_Token]:
            """Run with every expert in memory, then with shares of them; medians of the turns."""
            path = Path(scratch) / f"{size.layers}-{size.hidden}"
            _write_model(path, size)
            most = size.layers * size.experts - 1
            slots = [None if share is None else min(most, int(share * (most + 1))) for share in shares]
            turns = [
                [_token(path, cores, int8_operations, expert_slots=one) for one in slots]
                for _ in range(_TURNS)
            ]
            return [
                _Token(*map(statistics.median, zip(*found, strict=True)))
                for found in zip(*turns, strict=True)
            ]

        tell("running small models", 0.8)
        few, few_streamed = tokens(_FEW, None, 1.0)
        many, many_streamed = tokens(_MANY, None, 1.0)
        tell("running small models", 0.9)
        # (record bytes, seconds of a layer's first miss); seconds of each further one
        first, further = [], []
        for size in (_MIDDLING, _LARGE):
            all_here, *missing = tokens(size, 1.0, *_SHARES)
            layer_s, miss_s = _solved(
                [
                    (
                        size.layers * (1.0 - one.hit_rate**size.chosen),
                        size.layers * size.chosen * (1.0 - one.hit_rate),
                        one.beside_s - all_here.beside_s,
                    )
                    for one in missing
                ]
            )
            first.append((size.record_bytes, layer_s))
            further.append(miss_s)
    missing_layer_s, missing_layer_s_per_byte = _line(*first)
    layers = _MANY.layers - _FEW.layers
    layer_s = max(1e-6, (many.seconds - few.seconds) / layers)
    return _Overheads(
        layer_s=layer_s,
        streamed_layer_s=max(1e-6, (many_streamed.seconds - few_streamed.seconds) / layers - layer_s),
        missing_layer_s=missing_layer_s,
        missing_layer_s_per_byte=missing_layer_s_per_byte,
        miss_s=max(1e-6, statistics.mean(further)),
        step_s=max(1e-6, few.seconds - _FEW.layers * layer_s),
    )


def _solved(samples: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """The best fit for the seconds of a layer's first miss and of each further one, neither below zero.

    Args:
        samples: layers with misses, misses, and the seconds they cost.
    """
    layers, misses, seconds = (np.array(column) for column in zip(*samples, strict=True))
    counts = np.stack([layers, misses - layers], 1)
    found, *_ = np.linalg.lstsq(counts, seconds, rcond=None)
    for one, other in ((0, 1), (1, 0)):
        if found[one] < 0.0:
            alone = counts[:, other]
            found[one], found[other] = 0.0, max(0.0, float(alone @ seconds) / max(1e-9, float(alone @ alone)))
    return float(found[0]), float(found[1])


def _line(first: tuple[float, float], second: tuple[float, float]) -> tuple[float, float]:
    """The line through two points: its value at 0 and its slope. A floor keeps noise from making either negative."""
    slope = max(1e-15, (second[1] - first[1]) / (second[0] - first[0]))
    return max(1e-6, first[1] - slope * first[0]), slope


def _write_model(path: Path, size: _Size) -> None:
    raw = {
        "model_type": "qwen3_moe", "hidden_size": size.hidden, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 64, "num_hidden_layers": size.layers, "num_experts": size.experts,
        "num_experts_per_tok": size.chosen, "moe_intermediate_size": size.width, "intermediate_size": 64,
        "vocab_size": 512, "max_position_embeddings": 512, "norm_topk_prob": True, "rope_theta": 1e6,
        "rms_norm_eps": 1e-6, "hidden_act": "silu", "eos_token_id": 0,
    }  # fmt: skip
    family = FAMILIES["qwen3_moe"]
    config, layout = family.parse_config(raw), family.LAYOUTS[0]
    numbers = np.random.default_rng(0).normal(scale=0.05, size=1 << 20).astype("<f2")

    def tensor(name: str, shape: tuple[int, ...]) -> TensorToWrite:
        places = np.arange(math.prod(shape)) - len(name)
        return name, "F16", shape, numbers.take(places, mode="wrap").tobytes

    tensors = [tensor(layout.dense_name(name), shape) for name, shape in dense_shapes(config)]
    for layer in config.moe_layers:
        for expert in range(config.num_experts):
            names = layout.names_of_expert(layer, expert)
            tensors += [tensor(*pair) for pair in zip(names, expert_shapes(config, layer), strict=True)]
    path.mkdir()
    (path / CONFIG_FILE).write_text(json.dumps(raw))
    write_safetensors(path / "model.safetensors", tensors)


def _token(path: Path, cores: int, int8_operations: float, *, expert_slots: int | None) -> _Token:
    """Run a small model; seconds are scaled to that rate of int8 arithmetic."""
    with Engine.open(
        path,
        memory="2GiB",
        threads=cores,
        context=256,
        max_sequences=1,
        expert_slots=expert_slots,
        media=False,
    ) as engine:
        probes = [_native.int8_probe(cores)]
        sequence = engine.submit([1, 2, 3], SamplingParams(max_tokens=_STEPS, ignore_eos=True))
        times, beside = [], []
        before = engine.ledger
        while sequence.result is None:
            begin, earlier = time.perf_counter(), engine.ledger
            engine.step()
            times.append(time.perf_counter() - begin)
            parts = engine.ledger.parts
            beside.append(sum(parts[part] - earlier.parts[part] for part in _BESIDE))
        probes.append(_native.int8_probe(cores))
        lookups = engine.ledger.lookups - before.lookups
        hit_rate = (engine.ledger.hits - before.hits) / lookups if lookups else 1.0
    warm, factor = _STEPS // 4, statistics.mean(probes) / int8_operations
    # A mean for the rest, because only some steps have misses.
    return _Token(factor * statistics.median(times[warm:]), factor * statistics.mean(beside[warm:]), hit_rate)
