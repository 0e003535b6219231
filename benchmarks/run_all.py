"""Does every benchmark still run, and does each still meet its bound? Runs them one after another.

    python benchmarks/run_all.py [--short] [SCRIPT ...]

Each is a script for one question and has more options when run alone. If llama.cpp is not installed, Argosy runs alone.
Without `--short`, `table.py` finally prints the results beside their targets. The exit code is 1 if any failed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

SCRIPTS = (
    "agree",
    "resident",
    "prefill",
    "streamed",
    "reads",
    "batch",
    "prefix",
    "load",
    "start",
    "python_share",
    "cluster",
    "cluster_copy",
    "cluster_exchange",
    "cluster_peer",
    "speculation",
    "recording_cost",
    "responsible",
    "guard_cost",
    "watermark",
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
    "beside_encode",
    "attack",
    "kv_formats",
    "long_context",
    "quantisation",
    "drift",
    "demo",
    "bench_command",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--short", action="store_true", help="small models and few repeats: a few minutes in all"
    )
    parser.add_argument(
        "only", nargs="*", metavar="SCRIPT", help=f"of: {', '.join(SCRIPTS)}; none: all of them"
    )
    options = parser.parse_args()
    if unknown := set(options.only) - set(SCRIPTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(SCRIPTS)}")
    failed = []
    for name in options.only or SCRIPTS:
        path = Path(__file__).with_name(f"{name}.py")
        question = path.read_text().split("\n", 1)[0].strip('" ')
        print(f"\n── {name}: {question}", flush=True)
        started = time.perf_counter()
        flags = ["--short"] if options.short else []
        if subprocess.run([sys.executable, str(path), *flags], check=False).returncode:
            failed.append(name)
        print(f"   {time.perf_counter() - started:.0f} s", flush=True)
    if not options.short:
        subprocess.run([sys.executable, str(Path(__file__).with_name("table.py"))], check=False)
    print(f"\nfailed: {', '.join(failed)}" if failed else "\nall good")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
