"""Does the verdict of `argosy eval drift` separate sound packs of the demo model from broken ones?

    python benchmarks/drift.py [--model DIR] [--memory 1500MiB] [--threads 2] [--languages en,fr] [--short]

The reference is the demo model in its original weights (float16), or another checkpoint without quantised weights, in
one `model.safetensors`. Forms of it are compared with it: the same files, the same files with a 16-bit KV cache, q8 and
q4 packs, a q8 pack that lost an expert of every layer, and one whose experts were rounded to four levels a row. The
limits of the verdict were set with this table; --short reads English alone.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from argosy.checkpoint.pack import pack
from argosy.checkpoint.safetensors import read_header
from argosy.cli.commands.eval import interval, table
from argosy.config import format_bytes, parse_size
from argosy.demo.build import build_demo
from argosy.evaluate.intervals import Estimate
from argosy.evaluate.material import LANGUAGES, read_material
from argosy.evaluate.measure import Report as DriftReport
from argosy.evaluate.measure import measure_drift
from argosy.model.families import open_model
from common import Report, Sample

DTYPES = {"F16": np.float16, "F32": np.float32}
Change = Callable[[str, Any], Any]
# The verdict that each form must get.
EXPECTED = {
    "the same files": ("none",),
    "16-bit KV cache": ("none", "small"),
    "q8": ("small",),
    "q4": ("small",),
    "q8, an expert lost": ("notable", "large"),
    "q8 of 2-bit experts": ("notable", "large"),
}


def lost(name: str, values: Any) -> Any:
    return np.zeros_like(values) if ".experts.0." in name else values


def two_bits(name: str, values: Any) -> Any:
    step = np.abs(values).max(axis=1, keepdims=True).astype(np.float32) / 1.5
    levels = np.clip(np.round(values / np.maximum(step, 1e-12) - 0.5), -2, 1) + 0.5
    return (levels * step).astype(values.dtype)


def changed(source: Path, directory: Path, change: Change) -> Path:
    """A copy of a checkpoint whose experts are changed."""
    shutil.copytree(source, directory)
    for name, ref in read_header(directory / "model.safetensors").items():
        if ".experts." not in name or not name.endswith("_proj.weight"):
            continue
        if ref.dtype not in DTYPES:
            raise SystemExit(f"{name} is {ref.dtype}; supported: {', '.join(DTYPES)}")
        stored = np.memmap(ref.path, DTYPES[ref.dtype], "r+", offset=ref.offset, shape=ref.shape)
        stored[:] = change(name, np.asarray(stored))
        stored.flush()
    return directory


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="unquantised, in one file; default: the demo model")
    parser.add_argument(
        "--wheel", type=Path, help="wheel of the demo model's dense base, if it is here already"
    )
    parser.add_argument("--memory", default="1500MiB")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--languages", default=",".join(LANGUAGES))
    parser.add_argument("--short", action="store_true", help="English alone")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        return measure(options, Path(scratch))


def measure(options: argparse.Namespace, scratch: Path) -> int:
    source = options.model or build_demo(scratch / "demo", wheel=options.wheel)
    material = read_material(["en"] if options.short else options.languages.split(","))
    files = open_model(source)

    def packed(model: Path, format: str) -> Path:
        done = pack(open_model(model), scratch / f"{model.name}-{format}", format=format).directory
        if model.parent == scratch and model != source:
            shutil.rmtree(model)
        return done

    made: dict[str, Callable[[], Path]] = {
        "the same files": lambda: source,
        "16-bit KV cache": lambda: source,
        "q8": lambda: packed(source, "q8"),
        "q4": lambda: packed(source, "q4"),
        "q8, an expert lost": lambda: packed(changed(source, scratch / "lost", lost), "q8"),
        "q8 of 2-bit experts": lambda: packed(changed(source, scratch / "coarse", two_bits), "q8"),
    }
    samples, rows, reasons = (
        [],
        [("", "verdict", "KL, nats", "same token, %", "perplexity, %", "gap, nats", "widest shift")],
        [],
    )
    is_good = True
    for name, make in made.items():
        candidate = make()
        with Sample() as sample:
            started = time.perf_counter()
            found = measure_drift(
                source, candidate, material,
                options={"memory": options.memory, "threads": options.threads},
                candidate_settings={"kv_dtype": "f16"} if name == "16-bit KV cache" else {},
            )  # fmt: skip
            sample.values = {"seconds": time.perf_counter() - started}
        samples.append(sample)
        drift = found.drift
        is_good &= drift.verdict.level in EXPECTED[name]
        whole = drift.text[0]
        rows.append(
            (name, drift.verdict.level, interval(whole.kl), interval(whole.agreement, percent=True),
             interval(whole.rise, percent=True), interval(drift.gaps.change), widest(found))
        )  # fmt: skip
        reasons += [f"{name}: {reason}" for reason in drift.verdict.reasons]
        print(
            f"  {name}: {drift.verdict.level}, {sample.values['seconds']:.0f} s   [{sample}]", file=sys.stderr
        )
        if candidate != source:
            shutil.rmtree(candidate)
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    report = Report(
        "drift", state=f"{len(material.languages)} languages, {len(material.templates)} templates"
    )
    report.correct(
        "the same files: every number is equal" if rows[1][1] == "none" else "WRONG: the same files differ"
    )
    report.opening()
    report.line("reference", f"{source.name}, experts {files.expert_format}, {files.config.family}")
    print(*table(rows), *reasons, sep="\n")
    report.line("memory", f"peak {format_bytes(peak_bytes)}, packing included; budget {options.memory}")
    report.figure("both models, all texts", "s", samples, "seconds")
    report.neighbours(samples)
    return 0 if is_good and peak_bytes <= parse_size(options.memory) else 1


def widest(found: DriftReport) -> str:
    one = max(found.drift.groups, key=lambda group: abs(group.shift.value))
    shift: Estimate = one.shift
    mark = "*" if shift.excludes_zero else ""
    return f"{one.group.name} {interval(shift)}{mark}"


if __name__ == "__main__":
    sys.exit(main())
