"""Does every benchmark still run, and does each still meet its bound? Runs them one after another.

    python benchmarks/run_all.py [--short] [SCRIPT ...]

Each is a script for one question and has more options when run alone. If llama.cpp is not installed, Argosy runs alone.
What a script prints is in build/bench/SCRIPT.txt; here it gets a line, and one for each target that it missed. The
short form takes less than ten minutes, with small models and few samples, so it shows that everything runs, and misses
some targets. It leaves out what takes minutes by itself (SLOW). Without `--short`, `table.py` finally prints the
results beside their targets. The exit code is 1 if a script crashed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

SCRIPTS = (
    "agree",
    "resident",
    "prefill",
    "blocks",
    "streamed",
    "reads",
    "batch",
    "prefix",
    "load",
    "start",
    "opening",
    "scale",
    "trillion",
    "python_share",
    "cluster",
    "cluster_freeze",
    "speculation",
    "responsible",
    "busy",
    "footprint",
    "replay",
    "hit_rate",
    "plan_accuracy",
    "plan_memory",
    "traffic",
    "memory",
    "idle_memory",
    "moving_budget",
    "media_memory",
    "attack",
    "long_context",
)


SLOW = ("media_memory",)
OUTPUT = Path(__file__).parents[1] / "build" / "bench"
_JUDGED = re.compile(r"^(?P<label>.*?)   target (?P<target>[<>]=.*): (?P<verdict>met|missed)$", re.MULTILINE)
_LAST_LINES = 3  # of a script that failed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--short", action="store_true", help="small models and few repeats: less than ten minutes"
    )
    parser.add_argument(
        "only", nargs="*", metavar="SCRIPT", help=f"of: {', '.join(SCRIPTS)}; none: all of them"
    )
    options = parser.parse_args()
    if unknown := set(options.only) - set(SCRIPTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(SCRIPTS)}")
    OUTPUT.mkdir(parents=True, exist_ok=True)
    failed, began = [], time.perf_counter()
    left_out = SLOW if options.short and not options.only else ()
    for name in options.only or [name for name in SCRIPTS if name not in left_out]:
        started = time.perf_counter()
        code, output = _run(name, ["--short"] if options.short else [])
        judged = [found.groupdict() for found in _JUDGED.finditer(output)]
        missed = [found for found in judged if found["verdict"] == "missed"]
        said = f"{len(judged) - len(missed)} met, {len(missed)} missed" if judged else ""
        print(f"{name:<18}{time.perf_counter() - started:>5.0f} s   {said}", flush=True)
        for found in missed:
            print(f"    missed {found['target']}: {' '.join(found['label'].split())}", flush=True)
        if code not in (0, 1) or "Traceback (most recent call last)" in output:
            failed.append(name)
            print(*(f"    {line}" for line in output.splitlines()[-_LAST_LINES:]), sep="\n", flush=True)
    print(f"{'in all':<18}{time.perf_counter() - began:>5.0f} s   all that they printed is in {OUTPUT}")
    if not options.short:
        subprocess.run([sys.executable, str(Path(__file__).with_name("table.py"))], check=False)
    if left_out:
        print(f"left out: {', '.join(left_out)}; name them to run them")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def _run(name: str, flags: list[str]) -> tuple[int, str]:
    """Run a script; what it prints goes into a file of its own. Returns its exit code and its output."""
    path = OUTPUT / f"{name}.txt"
    script = Path(__file__).with_name(f"{name}.py")
    with path.open("w") as file:
        done = subprocess.run(
            [sys.executable, str(script), *flags], stdout=file, stderr=subprocess.STDOUT, check=False
        )
    return done.returncode, path.read_text(errors="replace")


if __name__ == "__main__":
    sys.exit(main())
