"""Run a job on Argosy or on llama.cpp: one child process per run, driven the same way, each timing itself.

    run(ARGOSY, Job(model, prompts=[...], num_new=64, threads=2))   ->  Run: load, prefill and decode seconds, memory
    run(LLAMA_CPP, job, limit_bytes=2 << 30, timeout_s=300)         ->  in a memory cgroup, with partial results

A child reads the job as JSON from stdin (`ours.py`, `peer.py`) and appends an event to a file for every step it takes,
so that a stopped run still shows how far it got. Each prompt is one run: prefill, then `num_new` steps of one token
each, greedy, in a cleared KV cache. The first `warm_up` runs do not count, and Argosy has committed all of its memory
before the others begin. Both sides time from the call with the tokens to the id of the most likely next one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from argosy import Engine
from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.formats import is_quantised
from argosy.checkpoint.geometry import dense_shapes, expert_shapes
from argosy.engine.sequence import Sequence as EngineSequence
from cgroup import CappedRun, run_capped
from common import REPOSITORY
from make_checkpoint import named_model
from random_weights import document, num_continued

ARGOSY, LLAMA_CPP = "argosy", "llama.cpp"
# llama.cpp's threads spin at barriers. Told to sleep, they are faster where they wait for a drive or a neighbour.
PASSIVE = {"OMP_WAIT_POLICY": "passive"}
FIRST_DOCUMENT = 1  # number of the first prompt's document


@dataclass(frozen=True, kw_only=True)
class Job:
    """Work for an engine. `memory` and `look_ahead` apply to Argosy, the fields after them to llama.cpp."""

    model: Path
    prompts: Sequence[Sequence[int]]
    num_new: int
    threads: int = 2
    warm_up: int = 1  # runs at the beginning that do not count
    given: Sequence[Sequence[int]] | None = None  # the input of each step, instead of the most likely token
    memory: int | None = None
    look_ahead: bool = True
    raw_reads_every: int = 0  # tokens of Argosy between raw reads of the sizes that it reads; 0: none
    repack: bool = True
    flash_attention: bool = True
    # Instead of one prompt after another: runs with this many prompts in one batch, in turn.
    together: Sequence[int] = ()

    @property
    def context(self) -> int:
        longest = max(len(prompt) for prompt in self.prompts) + self.num_new + 1
        return -(-longest // 256) * 256  # llama.cpp rounds its context up to a multiple of 256


@dataclass
class Run:
    """The events of a child, and how it ended."""

    engine: str
    job: Job
    events: list[dict[str, Any]]
    ended: str  # "" after success, otherwise the reason
    started_at: float  # monotonic, before the process is created
    capped: CappedRun | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    def _of(self, kind: str) -> list[dict[str, Any]]:
        first = self.job.warm_up
        return [event for event in self.events if event["event"] == kind and event.get("run", first) >= first]

    def _one(self, kind: str) -> dict[str, Any]:
        found = self._of(kind)
        return found[0] if found else {}

    def require(self) -> Run:
        """Returns this run if it succeeded.

        Raises:
            SystemExit: it failed; shows its last output.
        """
        if self.ended:
            raise SystemExit(f"{self.engine}: {self.ended}")
        return self

    @property
    def load_s(self) -> float:
        return float(self._one("loaded").get("seconds", float("nan")))

    @property
    def peak_bytes(self) -> int:
        return int(self._one("done").get("peak_bytes", 0))

    @property
    def prefill_tok_per_s(self) -> float:
        """Median over the runs; NaN if none finished."""
        return median([event["tokens"] / event["seconds"] for event in self._of("prefill")])

    @property
    def decode_s(self) -> list[float]:
        return [event["seconds"] for event in self._of("token")]

    @property
    def decode_tok_per_s(self) -> float:
        """Tokens per second over all runs; NaN without a token."""
        return len(self.decode_s) / sum(self.decode_s) if self.decode_s else float("nan")

    def total(self, kind: str, key: str) -> float:
        """Sum of a counter over all prefills or all tokens."""
        return sum(float(event.get(key, 0)) for event in self._of(kind))

    def median(self, kind: str, key: str) -> float:
        """The median of a figure over the prefills or tokens that have it; NaN without one."""
        return median([event[key] for event in self._of(kind) if key in event])

    def part_s(self, part: str) -> float:
        """Mean seconds per token that Argosy's ledger assigns to a part; NaN without a token."""
        tokens = self._of("token")
        return sum(event["parts"][part] for event in tokens) / len(tokens) if tokens else float("nan")

    def answers(self) -> list[list[int]]:
        """Ids of each run, including warm-ups: the prefill's, then those of the steps."""
        ids: dict[int, list[int]] = {}
        for event in self.events:
            if "id" in event:
                ids.setdefault(event["run"], []).append(event["id"])
        return [ids[run] for run in sorted(ids)]


def median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else float("nan")


def peer_python() -> Path | None:
    """The interpreter with llama.cpp: `ARGOSY_PEER_PYTHON`, or the one that `install_peer.sh` makes, or None."""
    named = os.environ.get("ARGOSY_PEER_PYTHON")
    path = Path(named) if named else REPOSITORY / "build" / "peer-venv" / "bin" / "python"
    return path if path.exists() else None


def engines(*, quiet: bool = False) -> list[str]:
    """Argosy, and llama.cpp if it is installed; otherwise a message says that it is not."""
    if peer_python():
        return [ARGOSY, LLAMA_CPP]
    if not quiet:
        print("llama.cpp is not installed: Argosy alone (benchmarks/install_peer.sh)", file=sys.stderr)
    return [ARGOSY]


def run(
    engine: str,
    job: Job,
    *,
    limit_bytes: int | None = None,
    timeout_s: float = 900,
    environment: Mapping[str, str] | None = None,
    prefix: Sequence[str] = (),
    checkout: Path = REPOSITORY,
) -> Run:
    """Run a job in a fresh process; a failure is in `Run.ended`, along with the events before it.

    Args:
        checkout: another version of Argosy, built in its own `.venv`.

    Raises:
        NoMemoryCap: `limit_bytes` is set, and no memory cgroup can be made here.
    """
    with tempfile.TemporaryDirectory() as scratch:
        return _run(
            engine, job, Path(scratch), None, limit_bytes, timeout_s, environment or {}, prefix, checkout
        )


def logits(engine: str, job: Job) -> NDArray[np.float32]:
    """Logits [tokens, vocab] at every position of the job's only prompt."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "logits.npy"
        _run(engine, job, Path(scratch), path, None, 900, {}, (), REPOSITORY).require()
        found: NDArray[np.float32] = np.load(path)
        return found


def _run(
    engine: str,
    job: Job,
    scratch: Path,
    logits_path: Path | None,
    limit_bytes: int | None,
    timeout_s: float,
    environment: Mapping[str, str],
    prefix: Sequence[str],
    checkout: Path,
) -> Run:
    events_path = scratch / "events.jsonl"
    events_path.touch()
    described = asdict(job) | {
        "model": str(job.model),
        "context": job.context,
        "events": str(events_path),
        "logits": None if logits_path is None else str(logits_path),
    }
    job_path = scratch / "job.json"
    job_path.write_text(json.dumps(described))
    env = os.environ | environment
    interpreter = sys.executable if checkout == REPOSITORY else str(checkout / ".venv/bin/python")
    if engine == LLAMA_CPP:
        peer = peer_python()
        assert peer is not None
        interpreter = str(peer)
        env.pop("PYTHONPATH", None)
    script = checkout / "benchmarks" / ("peer.py" if engine == LLAMA_CPP else "ours.py")
    # Through a shell, so that the job is stdin inside the cgroup too.
    command = [*prefix, "/bin/sh", "-c", 'exec "$1" "$2" < "$3"', "sh", interpreter, script, job_path]
    started_at, capped, ended = time.monotonic(), None, ""
    try:
        if limit_bytes is not None:
            capped = run_capped(
                list(map(str, command)), limit_bytes=limit_bytes, timeout_s=timeout_s, env=env
            )
            code, stderr = capped.returncode, capped.stderr
            if capped.num_oom_kills:
                ended = "killed: the limit is too small for it"
        else:
            done = subprocess.run(
                list(map(str, command)),
                capture_output=True,
                text=True,
                check=False,
                timeout=timeout_s,
                env=env,
            )
            code, stderr = done.returncode, done.stderr
        if code and not ended:
            ended = f"exit code {code}: {stderr.strip()[-600:]}"
    except (TimeoutError, subprocess.TimeoutExpired):
        ended = f"stopped after {timeout_s:.0f} s"
    lines = events_path.read_text().splitlines()
    events = [json.loads(line) for line in lines if line.endswith("}")]
    return Run(engine, job, events, ended, started_at, capped, dict(environment))


def require_documents(run: Run, told: list[str]) -> None:
    """Check that the answers continue the documents of `prompts`; `told` gets a sentence about it, once.

    Raises:
        SystemExit: they do not.
    """
    right = asked = 0
    for number, answer in enumerate(run.answers()):
        right += num_continued(FIRST_DOCUMENT + number, len(run.job.prompts[number]), answer)
        asked += len(answer)
    if right != asked:
        raise SystemExit(f"{run.engine}: {right}/{asked} tokens of the answers continue their documents")
    sentence = f"{run.engine}: {right}/{asked} tokens continue their documents"
    if sentence not in told:
        told.append(sentence)


def decode_all(engine: Engine, sequences: Sequence[EngineSequence]) -> tuple[float, int]:
    """Run sequences to their ends; return the seconds of the steps in which all of them decode, and their tokens."""
    while any(sequence.first_token_at is None for sequence in sequences):
        engine.step()
    before = sum(len(sequence.new_ids) for sequence in sequences)
    started = time.perf_counter()
    while not all(sequence.result for sequence in sequences):
        engine.step()
    seconds = time.perf_counter() - started
    return seconds, sum(len(sequence.new_ids) for sequence in sequences) - before


def prompts(count: int, length: int) -> list[list[int]]:
    """The beginnings of `count` documents of `random_weights.py`."""
    return [document(FIRST_DOCUMENT + number, length) for number in range(count)]


# ── cases ───────────────────────────────────────────────────────────────────────────────────────────────────────────

MODELS = Path(os.environ.get("ARGOSY_BENCH_MODELS", REPOSITORY / "build" / "models"))


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line of a table: a model and a number of threads."""

    geometry: str
    format: str
    threads: int
    model: Path

    @property
    def name(self) -> str:
        return f"{self.geometry} {self.format} {self.threads}T"

    @property
    def facts(self) -> dict[str, Any]:
        return {"geometry": self.geometry, "format": self.format, "threads": self.threads}


def parse_cases(
    parser: argparse.ArgumentParser,
    *,
    geometries: str = "small,mid",
    formats: str = "Q4_0,Q4_K_M,Q8_0",
    threads: str = "1,2",
    repeats: int = 3,
) -> tuple[argparse.Namespace, list[Case]]:
    """Add the options that all scripts share, parse, and make any missing models."""
    parser.add_argument("--geometries", default=geometries)
    parser.add_argument("--formats", default=formats)
    parser.add_argument("--threads", default=threads)
    parser.add_argument("--routing", choices=["recorded", "uniform"], default="recorded")
    parser.add_argument("--models", type=Path, default=MODELS, help="where model files are kept")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--short", action="store_true", help="the tiny model, Q4_0, two threads, once")
    options = parser.parse_args()
    if options.short:
        options.geometries, options.formats, options.threads, options.repeats = "tiny", "Q4_0", "2", 1
    cases: list[Case] = []
    for geometry in options.geometries.split(","):
        for format in options.formats.split(","):
            model = named_model(options.models, geometry, format, routing=options.routing)
            counts = map(int, options.threads.split(","))
            cases += [Case(geometry=geometry, format=format, threads=count, model=model) for count in counts]
    return options, cases


def token_bytes(files: ModelFiles) -> int:
    """Bytes of weights that one token needs, as stored: dense ones without the embedding table, and its experts."""
    config = files.config
    dense = files.dense_bytes
    if not config.is_embedding_tied:
        dense -= files.dense["embed"].nbytes
    return dense + files.expert_bytes // config.num_experts * config.experts_per_token


@dataclass(frozen=True)
class Operations:
    """int8 operations of one prompt token's matrix products, two per multiply-add.

    `useful` counts each product once. `executed` counts products with q8 weights twice, because their activations have
    16 bits and both bytes are multiplied (docs/decisions/0006). Neither includes the head, which only one token of a
    prompt needs, the router, or float weights.
    """

    useful: int
    executed: int


def token_operations(files: ModelFiles) -> Operations:
    config = files.config
    products = [
        (files.dense[name].format, math.prod(shape))
        for name, shape in dense_shapes(config)
        if len(shape) == 2 and name not in ("embed", "head") and not name.endswith("router")
    ]
    for layer in config.moe_layers:
        for format, shape in zip(files.expert_formats(layer), expert_shapes(config, layer), strict=True):
            products.append((format, config.chosen_in(layer) * math.prod(shape)))
    quantised = [(format, 2 * count) for format, count in products if is_quantised(format)]
    return Operations(
        useful=sum(count for _, count in quantised),
        executed=sum(count * passes(format) for format, count in quantised),
    )


def passes(format: str) -> int:
    """How many times a weight format's int8 products run: once per byte of an activation."""
    return 2 if format == "q8" else 1
