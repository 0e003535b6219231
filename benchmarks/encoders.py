"""How long does a picture or a sound take to encode, beside transformers with torch and llama.cpp's mtmd?

    python benchmarks/encoders.py --torch .venv/bin/python [--threads 2] [--repeats 5] [--short]

Towers have the geometry of real models and random weights (`towers.py`), the same ones on each side: bfloat16 here,
float32 and bfloat16 in torch, float16 in llama.cpp, as people use it. A sample is a fresh process that encodes the
input once to warm up, and then measures. The time begins when the picture is cut into patches, or the sound is mel
features. `--torch` names an interpreter with torch and transformers (`make test-oracle` installs them into `.venv`);
`install_peer.sh` makes the one for llama.cpp. A side that is not there is left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common import REPOSITORY, Report, Sample, alternate
from engines import peer_python
from towers import INPUTS, Input, encoder_of, make, make_mmproj, make_vocabulary

OURS, PEER = "argosy", "llama.cpp"
DTYPES = ("float32", "bfloat16")
# bfloat16 products round to 0.4 % each; an error in the arithmetic changes results altogether.
MOST_DIFFERENCE = 0.05


class Side:
    """One way to encode an input: a command that prints its times as JSON and saves the embeddings."""

    def __init__(self, command: list[str], folder: Path, name: str) -> None:
        self._command = command
        self._out = folder / f"{name}.npy"

    def run(self) -> Mapping[str, float]:
        command = [*self._command, "--repeats", "1", "--out", str(self._out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
        told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        longest = {"longest": told["longest"][0]} if "longest" in told else {}
        return {"seconds": told["seconds"][0], **longest}

    def rows(self, size: int) -> NDArray[np.float32]:
        """The embeddings; what is added to later layers follows in llama.cpp's rows."""
        rows: NDArray[np.float32] = np.load(self._out)[:, :size]
        return rows


def sides_of(at: int, wanted: Input, folder: Path, options: argparse.Namespace) -> dict[str, Side]:
    script, threads = REPOSITORY / "benchmarks", ["--threads", str(options.threads)]
    tower = make(wanted.tower)
    sides = {
        OURS: Side(
            [sys.executable, str(script / "encoders_ours.py"), "--input", str(at), *threads], folder, OURS
        )
    }
    values, grid = wanted.values()
    np.save(folder / "values.npy", values)
    np.save(folder / "media.npy", wanted.media())
    if options.torch:
        # -P: `kernels.py` here must not stand in for a package of that name.
        command = [options.torch, "-P", str(script / "encoders_torch.py"), "--tower", str(tower), *threads]
        command += ["--values", str(folder / "values.npy")]
        command += ["--grid", *map(str, grid)] if grid else []
        for dtype in DTYPES:
            sides[f"torch {dtype}"] = Side([*command, "--dtype", dtype], folder, dtype)
    if peer := peer_python():
        config = encoder_of(wanted.tower)[1]
        size = config.out_size * (1 + len(getattr(config, "deepstack_layers", ())))
        command = [
            str(peer),
            "-P",
            str(script / "encoders_peer.py"),
            "--mmproj",
            str(make_mmproj(wanted.tower)),
        ]
        command += ["--vocabulary", str(make_vocabulary(wanted.tower))]
        command += ["--media", str(folder / "media.npy"), "--size", str(size), *threads]
        sides[PEER] = Side(command, folder, PEER)
    return sides


def check(sides: Mapping[str, Side], size: int) -> str:
    """Compare the embeddings of all sides with ours; returns a sentence about them."""
    ours, found = sides[OURS].rows(size), []
    for name, side in sides.items():
        theirs = side.rows(size)
        if name == PEER and len(theirs) != len(ours):  # it cuts a sound into windows in its own way
            found.append(f"{name} {len(theirs)} positions, not compared")
            continue
        if theirs.shape != ours.shape:
            raise SystemExit(f"{name} made {theirs.shape}, we {ours.shape}")
        difference = float(np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2)))
        if difference > MOST_DIFFERENCE:
            raise SystemExit(
                f"{name} differs by {difference:.1%} (root mean square), more than {MOST_DIFFERENCE:.0%}"
            )
        if name != OURS:
            found.append(f"{name} {difference:.2%}")
    return f"{len(ours)} positions; root mean square difference from " + ", ".join(found or ["nobody"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--torch", help="an interpreter that has torch and transformers")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--short", action="store_true", help="the smallest picture, once")
    options = parser.parse_args()
    report = Report("encoders.py")
    report.opening()
    for at, wanted in enumerate(INPUTS[:1] if options.short else INPUTS):
        with tempfile.TemporaryDirectory() as name:
            sides = sides_of(at, wanted, Path(name), options)
            runs: dict[str, Callable[[], Mapping[str, float]]] = {
                name: side.run for name, side in sides.items()
            }
            samples = alternate(runs, 1 if options.short else options.repeats)
            report.line("compared", f"{wanted.label}: {check(sides, encoder_of(wanted.tower)[1].out_size)}")
        show(report, wanted, samples, options.threads)


def show(report: Report, wanted: Input, samples: Mapping[str, list[Sample]], threads: int) -> None:
    label, facts = f"{wanted.tower} {wanted.label} {threads}T", {"threads": threads}
    medians = {
        name: report.figure(f"{label}, {name}", "s", of_side, "seconds", **facts)
        for name, of_side in samples.items()
    }
    ours = medians[OURS]
    if torch := [median for name, median in medians.items() if name.startswith("torch")]:
        report.ratio(f"{label}, torch's faster over ours", min(torch), ours, target=">= 2", **facts)
    if PEER in medians:
        report.ratio(f"{label}, llama.cpp over ours", medians[PEER], ours, target=">= 10", **facts)
    report.figure(f"{label}, longest piece", "s", samples[OURS], "longest", **facts)
    report.neighbours([sample for of_side in samples.values() for sample in of_side])


if __name__ == "__main__":
    main()
