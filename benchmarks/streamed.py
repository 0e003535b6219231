"""How fast does a model run that does not fit in memory, compared with llama.cpp with mmap under the same memory limit?

    python benchmarks/streamed.py [--formats Q4_0] [--caps 75,50,25,12] [--ask decode,prefill] [--read-ahead 128,8192]
    python benchmarks/streamed.py --geometries large --formats Q4_0,IQ2_XXS --limit 2GiB --read-ahead 128 --ask decode

Each run is a fresh process in a memory cgroup limited to a share of the file's size, with swap forbidden, page cache
charged to the group, and the file's cached pages dropped first. Argosy gets the limit as its budget. Both decode two
documents to warm their caches and then another, which is timed.

    128 KiB     the read-ahead of most distributions; llama.cpp at its best of 1 and 2 threads, passive waiting
    8192 KiB    the machine's default; llama.cpp with its defaults, two threads
    overlap     for Argosy: max(time of a token in memory, missed bytes / drive) over the time of a streamed token
    busy        for Argosy: the share of a token's time in which the drive has something to read
    no look-ahead: Argosy without its guesses, and the limit in that case: attention and router add to
                the reads, because the drive is idle until they are done

The drive's rate changes by a fifth and more from one second to the next. So every fourth token waits for raw reads of
the sizes that Argosy reads, whose time does not count, and their median over the sample is the ceiling.

A run that does not finish within `--timeout` is judged by the tokens it produced, and the table says so. llama.cpp's
quantized weights are not repacked here: its second copy would not fit.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from argosy.config import format_bytes
from argosy.config.units import parse_size
from argosy.model.families import open_model
from cgroup import NoMemoryCap
from common import (
    CannotSet,
    Report,
    Sample,
    alternate,
    drop_page_cache,
    file_bytes,
    read_ahead,
    tidy_up_when_terminated,
)
from engines import (
    ARGOSY,
    LLAMA_CPP,
    PASSIVE,
    Case,
    Job,
    Run,
    engines,
    median,
    parse_cases,
    prompts,
    require_documents,
    run,
)

TUNED_KIB, AS_IT_COMES_KIB = 128, 8192
PROMPT_TOKENS = 8
WARM_UP = 2  # documents
TARGETS = {TUNED_KIB: ">= 3.5", AS_IT_COMES_KIB: ">= 15"}
OVERLAPS = {50: ">= 0.6", 25: ">= 0.85"}  # by the limit, in percent of the file
ROWS = {TUNED_KIB: 5, AS_IT_COMES_KIB: 6}
RAW_READS_EVERY = 4  # tokens
NO_LOOK_AHEAD = f"{ARGOSY} without look-ahead"
# Parts of the ledger before a layer's experts are known.
BEFORE_EXPERTS = ("router", "attention_and_dense")


@dataclass(frozen=True)
class Resident:
    """Seconds per token with every expert in memory, and the part of them spent in experts."""

    token_s: float
    experts_s: float


class Streamed:
    """Runs of one model under one limit; remembers what was checked about them."""

    def __init__(self, case: Case, share: int, options: argparse.Namespace) -> None:
        self.case, self.share, self.options = case, share, options
        self.limit_bytes = options.limit or file_bytes(case.model) * share // 100
        self.told: list[str] = []
        self.notes: list[str] = []

    @property
    def name(self) -> str:
        limit = format_bytes(self.limit_bytes) if self.options.limit else f"{self.share} %"
        return f"{self.case.geometry} {self.case.format} {limit}"

    def run(self, engine: str, job: Job, read_ahead_kib: int, *, passive: bool = False) -> Run:
        drop_page_cache(job.model)
        with read_ahead(job.model, read_ahead_kib):
            done = run(
                engine,
                job,
                limit_bytes=self.limit_bytes,
                timeout_s=self.options.timeout,
                environment=PASSIVE if passive else {},
            )
        if done.ended:
            self.notes.append(f"{engine} at {read_ahead_kib} KiB, {job.threads}T: {done.ended}")
            if engine == ARGOSY:
                done.require()
        else:
            require_documents(done, self.told)
        return done

    def job(self, threads: int, num_new: int, *, look_ahead: bool = True) -> Job:
        return Job(
            model=self.case.model,
            prompts=prompts(WARM_UP + 1, PROMPT_TOKENS),
            warm_up=WARM_UP,
            num_new=num_new,
            threads=threads,
            memory=self.limit_bytes,
            look_ahead=look_ahead,
            raw_reads_every=RAW_READS_EVERY,
            repack=False,
        )

    def decode(
        self, engine: str, threads: int, read_ahead_kib: int, *, look_ahead: bool = True
    ) -> Callable[[], dict[str, float]]:
        """tok/s and MB read per token; for Argosy the drive's rate meanwhile and how long it was busy."""
        tuned = read_ahead_kib == TUNED_KIB
        num_new = (
            self.options.new if tuned or engine == ARGOSY else min(self.options.new, self.options.new_slow)
        )

        def one() -> dict[str, float]:
            job = self.job(threads, num_new, look_ahead=look_ahead)
            done = self.run(engine, job, read_ahead_kib, passive=tuned)
            tokens = max(1, len(done.decode_s))
            values = {
                "decode": done.decode_tok_per_s,
                "tokens": len(done.decode_s),
                "MB/token": done.total("token", "bytes_read") / tokens / 1e6,
                "peak": done.capped.peak_bytes / self.limit_bytes if done.capped else math.nan,
            }
            if engine == ARGOSY:
                values["drive GB/s"] = done.median("token", "raw_bytes_per_s") / 1e9
                values["busy"] = done.total("token", "busy_s") / sum(done.decode_s)
                values["hit"] = done.total("token", "hits") / max(1, done.total("token", "lookups"))
                values["before experts"] = sum(done.part_s(part) for part in BEFORE_EXPERTS)
            return values

        return one

    def prefill(self, engine: str, threads: int, num_tokens: int) -> Callable[[], dict[str, float]]:
        job = Job(
            model=self.case.model,
            prompts=prompts(1, num_tokens),
            num_new=0,
            threads=threads,
            warm_up=0,
            memory=self.limit_bytes,
            repack=False,
        )

        def one() -> dict[str, float]:
            done = self.run(engine, job, TUNED_KIB, passive=True)
            return {"prefill": done.prefill_tok_per_s, "MB": done.total("prefill", "bytes_read") / 1e6}

        return one


def variants(read_ahead_kib: int, threads: int) -> dict[str, tuple[str, int]]:
    """The variants that take turns: a name, the engine and its threads."""
    found = {ARGOSY: (ARGOSY, threads)}
    if LLAMA_CPP in engines(quiet=True):
        counts = (1, 2) if read_ahead_kib == TUNED_KIB else (threads,)
        found |= {f"{LLAMA_CPP} {count}T": (LLAMA_CPP, count) for count in counts}
    return found


def best_peer(samples: dict[str, list[Sample]], key: str) -> float:
    """The best single run of llama.cpp, which flatters it; NaN without one."""
    values = [
        sample.values[key]
        for name, found in samples.items()
        if name.startswith(LLAMA_CPP)
        for sample in found
        if not math.isnan(sample.values[key])
    ]
    return max(values, default=math.nan)


def ask_decode(report: Report, streamed: Streamed, read_ahead_kib: int, resident: Resident) -> float:
    """Returns Argosy's tokens per second."""
    case, name = streamed.case, f"{streamed.name}, {read_ahead_kib} KiB"
    ways = variants(read_ahead_kib, case.threads)
    runs = {way: streamed.decode(engine, threads, read_ahead_kib) for way, (engine, threads) in ways.items()}
    if read_ahead_kib == TUNED_KIB:
        runs[NO_LOOK_AHEAD] = streamed.decode(ARGOSY, case.threads, read_ahead_kib, look_ahead=False)
    samples = alternate(runs, streamed.options.repeats)
    report.correct("; ".join(streamed.told) or "no run came to its end")
    facts = case.facts | {"share": streamed.share, "limit_bytes": streamed.limit_bytes}
    for way, found in samples.items():
        report.figure(f"{name}: {way}", "tok/s", found, "decode", notes=streamed.notes, **facts)
        report.figure(f"{name}: {way} reads", "MB/token", found, "MB/token", **facts)
    report.figure(f"{name}: {ARGOSY} hit rate", "", samples[ARGOSY], "hit", **facts)
    report.figure(f"{name}: {ARGOSY} drive busy", "", samples[ARGOSY], "busy", **facts)
    report.figure(f"{name}: raw reads of the same sizes", "GB/s", samples[ARGOSY], "drive GB/s", **facts)
    report.figure(f"{name}: {ARGOSY} peak over limit", "", samples[ARGOSY], "peak", **facts)
    ours = median([sample.values["decode"] for sample in samples[ARGOSY]])
    theirs = best_peer(samples, "decode")
    if LLAMA_CPP in engines(quiet=True):
        is_asked = streamed.share in (75, 50, 25) or read_ahead_kib == AS_IT_COMES_KIB
        if math.isnan(theirs):
            report.line(
                "peer", f"{name}: llama.cpp made no token of the timed answer in {streamed.options.timeout} s"
            )
            # An upper bound: it made less than one token in that time.
            theirs = 1 / streamed.options.timeout
        report.ratio(
            f"{name}: over {LLAMA_CPP}, best run",
            ours,
            theirs,
            target=TARGETS[read_ahead_kib] if is_asked else "",
            row=ROWS[read_ahead_kib],
            notes=streamed.notes,
            **facts,
        )
    if read_ahead_kib == TUNED_KIB:
        report_roofline(report, name, streamed, samples, resident)
    for note in streamed.notes:
        report.line("note", note)
    report.neighbours([sample for found in samples.values() for sample in found])
    return ours


def ask_gain(report: Report, speeds: Mapping[Case, float], limit_bytes: int) -> None:
    """What the smaller of two files gains under one limit, over what its bytes promise."""
    large, small = sorted(speeds, key=lambda case: file_bytes(case.model), reverse=True)
    promised = file_bytes(large.model) / file_bytes(small.model)
    report.ratio(
        f"{large.geometry}: {small.format} over {large.format} in {format_bytes(limit_bytes)}",
        speeds[small],
        speeds[large],
        target=f">= {0.8 * promised:.2f}",
        promised=promised,
        threads=small.threads,
    )


def report_roofline(
    report: Report, name: str, streamed: Streamed, samples: dict[str, list[Sample]], resident: Resident
) -> None:
    """How close Argosy's samples come to the limits of drive and arithmetic, and those limits, in parts."""
    ours, without = samples[ARGOSY], samples[NO_LOOK_AHEAD]

    def reading_s(one: Sample) -> float:
        return one.values["MB/token"] / 1e3 / one.values["drive GB/s"]

    reading = [reading_s(one) for one in ours]
    before = [one.values["before experts"] for one in without]
    token = [1 / one.values["decode"] for one in ours]
    drive = median([one.values["drive GB/s"] for one in ours])
    read_mb = median([one.values["MB/token"] for one in ours])
    report.line(
        "roofline",
        f"{name}: a token takes {1e3 * median(token):.1f} ms; reads {1e3 * median(reading):.1f}"
        f" ({read_mb:.0f} MB at {drive:.2f} GB/s); in memory {1e3 * resident.token_s:.1f}, its experts"
        f" {1e3 * resident.experts_s:.1f}; attention and router, before experts are known, {1e3 * median(before):.1f}",
    )
    facts = streamed.case.facts | {"share": streamed.share, "resident_s": resident.token_s}
    report.shares(
        f"{name}: overlap",
        [max(resident.token_s, r) / t for r, t in zip(reading, token, strict=True)],
        target=OVERLAPS.get(streamed.share, ""),
        row=7 if streamed.share in OVERLAPS else None,
        reading_s=median(reading),
        **facts,
    )
    report.shares(
        f"{name}: overlap, no look-ahead",
        [
            (one.values["before experts"] + max(resident.experts_s, reading_s(one))) * one.values["decode"]
            for one in without
        ],
        before_experts_s=median(before),
        resident_experts_s=resident.experts_s,
        **facts,
    )


def ask_prefill(report: Report, streamed: Streamed) -> None:
    case, num_tokens = streamed.case, streamed.options.tokens
    name = f"{streamed.name}, prefill of {num_tokens}"
    ways = variants(TUNED_KIB, case.threads)
    runs = {way: streamed.prefill(engine, threads, num_tokens) for way, (engine, threads) in ways.items()}
    samples = alternate(runs, streamed.options.repeats)
    report.correct("; ".join(streamed.told) or "no run came to its end")
    facts = case.facts | {"share": streamed.share, "limit_bytes": streamed.limit_bytes}
    for way, found in samples.items():
        report.figure(f"{name}: {way}", "tok/s", found, "prefill", notes=streamed.notes, **facts)
        report.figure(f"{name}: {way} reads", "MB", found, "MB", **facts)
    if LLAMA_CPP in engines(quiet=True):
        ours = median([sample.values["prefill"] for sample in samples[ARGOSY]])
        report.ratio(
            f"{name}: over {LLAMA_CPP}, best run",
            ours,
            best_peer(samples, "prefill"),
            target=">= 4" if streamed.share == 25 else "",
            row=9 if streamed.share == 25 else None,
            **facts,
        )
    for note in streamed.notes:
        report.line("note", note)


def measure_resident(case: Case, num_new: int) -> Resident:
    done = run(
        ARGOSY,
        Job(model=case.model, prompts=prompts(2, PROMPT_TOKENS), num_new=num_new, threads=case.threads),
    ).require()
    require_documents(done, [])
    return Resident(token_s=1 / done.decode_tok_per_s, experts_s=done.part_s("expert_compute"))


def main() -> int:
    tidy_up_when_terminated()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--caps", default="75,50,25,12", help="limits, in percent of the file")
    parser.add_argument(
        "--limit",
        type=parse_size,
        help="one limit for every file, such as 2GiB; of two formats, compares the speeds",
    )
    parser.add_argument("--ask", default="decode,prefill")
    parser.add_argument("--read-ahead", default=f"{TUNED_KIB},{AS_IT_COMES_KIB}")
    parser.add_argument("--new", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--new-slow", type=int, default=4, help="of llama.cpp as the machine comes")
    parser.add_argument("--tokens", type=int, default=512, help="of the prompt, where prefill is asked")
    parser.add_argument("--timeout", type=float, default=180, help="seconds for one run")
    options, cases = parse_cases(parser, geometries="mid", formats="Q4_0,Q8_0", threads="2", repeats=2)
    caps = [0] if options.limit else [int(cap) for cap in options.caps.split(",")]
    speeds: dict[Case, float] = {}
    if options.short:
        # A tiny model needs less memory than the interpreter, so the limit is larger than the file.
        caps, options.new, options.tokens, options.read_ahead = [165], 8, 64, str(TUNED_KIB)
    report = Report("streamed", state="page cache dropped, caches warmed by two answers; prefill from cold")
    for number, case in enumerate(cases):
        if number == 0:
            report.opening()
        asked = options.ask.split(",")
        files = open_model(case.model)
        report.line(
            "model",
            f"{case.name}: {format_bytes(file_bytes(case.model))}, {len(files.experts)} experts of"
            f" {format_bytes(files.expert_bytes // len(files.experts))}",
        )
        if "decode" in asked:
            resident = measure_resident(case, options.new)
        try:
            for cap in caps:
                if "decode" in asked:
                    for kib in map(int, options.read_ahead.split(",")):
                        speed = ask_decode(report, Streamed(case, cap, options), kib, resident)
                        speeds.setdefault(case, speed)
                if "prefill" in asked and (cap in (0, 25) or options.short):
                    ask_prefill(report, Streamed(case, cap, options))
        except (NoMemoryCap, CannotSet) as reason:
            print(f"skipped: {reason}", file=sys.stderr)
            return 0
    if options.limit and len(speeds) == 2:
        ask_gain(report, speeds, options.limit)
    return 0


if __name__ == "__main__":
    sys.exit(main())
