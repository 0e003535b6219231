"""Runs Argosy on the same job as `peer.py`, through the public `Engine` (`engines.py` starts both)."""

from __future__ import annotations

import dataclasses
import mmap
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

STARTED = time.monotonic()

from typing import Any  # noqa: E402

from argosy import Engine, SamplingParams  # noqa: E402
from child import Work, peak_bytes  # noqa: E402

IMPORTED = time.monotonic()


class GivenTokens:
    """Stands in for the engine's sampler: samples as usual, and then returns the given token."""

    def __init__(self, sampler: Any, token_ids: list[int]) -> None:
        self._sampler, self._token_ids, self.chosen = sampler, iter(token_ids), list[int]()

    def sample(self, *arguments: Any) -> Any:
        sampled = self._sampler.sample(*arguments)
        self.chosen.append(sampled.token_id)
        return dataclasses.replace(sampled, token_id=next(self._token_ids))


RAW_READERS, RAW_READS_S = 4, 0.1


def raw_reads(engine: Any, path: Path) -> float:
    """Bytes per second of raw reads of the size that the engine's store has read so far: what the drive can do now.

    It takes a few MB, because this process may have no more than the engine's budget.
    """
    stats = engine._started.store.stats()
    if not stats["reads"]:
        return float("nan")
    size = max(4096, int(stats["bytes_read"] / stats["reads"]) // 4096 * 4096)
    nbytes, file = max((one.stat().st_size, one) for one in ([path] if path.is_file() else path.iterdir()))
    descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    end = time.perf_counter() + RAW_READS_S

    def read(number: int) -> int:
        places, done = random.Random(number), 0
        with mmap.mmap(-1, size) as room:
            while time.perf_counter() < end:
                done += os.preadv(descriptor, [room], places.randrange(nbytes // size) * size)
        return done

    begin = time.perf_counter()
    try:
        with ThreadPoolExecutor(RAW_READERS) as readers:
            return sum(readers.map(read, range(RAW_READERS))) / (time.perf_counter() - begin)
    finally:
        os.close(descriptor)


def commit_memory() -> None:
    """Wait until the pages of all slots exist: the thread that commits them takes a core for seconds.

    The thread is found by its name, because `versions.py` measures older versions with this script, too.
    """
    for thread in threading.enumerate():
        if thread.name == "argosy-populate":
            thread.join()


def main() -> None:
    work = Work()
    job, tell = work.job, work.tell
    tell("started", at_start=STARTED, import_s=IMPORTED - STARTED)
    chosen: dict[str, Any] = {}
    if "ARGOSY_ASK_AHEAD" in os.environ:
        chosen["ask_ahead"] = os.environ["ARGOSY_ASK_AHEAD"]
    begin = time.perf_counter()
    engine = Engine.open(
        job["model"],
        memory=job.get("memory"),
        threads=job["threads"],
        context=job["context"],
        max_sequences=1,
        look_ahead=job["look_ahead"],
        **chosen,
        prefix_reuse=False,  # runs repeat their prompts, and each must compute its own
    )
    counters = engine.ledger
    tell(
        "loaded",
        seconds=time.perf_counter() - begin,
        bytes_read=counters.bytes_read,
        plan=[list(line) for line in engine.plan.lines()],
        is_resident=engine.plan.slots.is_resident,
    )
    if job.get("logits"):
        import numpy as np

        (prompt,) = job["prompts"]
        np.save(job["logits"], engine.logits(prompt))
        tell("done", peak_bytes=peak_bytes())
        return
    given, sampler = job.get("given"), engine._answers.sampler
    params = SamplingParams(max_tokens=job["num_new"] + 1, ignore_eos=True)
    for run, prompt in enumerate(job["prompts"]):
        if run and run == job["warm_up"]:
            commit_memory()
        if given:
            engine._answers.sampler = GivenTokens(sampler, [*given[run], 0])  # type: ignore[assignment]
        before, begin = engine.ledger, time.perf_counter()
        sequence = engine.submit(prompt, params)
        tokens: list[Any] = []
        while not tokens:
            tokens = engine.step()
        seconds, after = time.perf_counter() - begin, engine.ledger
        read = after.bytes_read - before.bytes_read
        tell(
            "prefill", run=run, tokens=len(prompt), seconds=seconds, id=tokens[0].token_id, bytes_read=read,
            hits=after.hits - before.hits, lookups=after.lookups - before.lookups,
        )  # fmt: skip
        num_tokens = 0
        while sequence.result is None:
            raw: dict[str, float] = {}
            if (every := job.get("raw_reads_every")) and num_tokens % every == 0:
                raw = {"raw_bytes_per_s": raw_reads(engine, Path(job["model"]))}
            num_tokens += 1
            busy_s = engine._started.store.stats()["busy_seconds"] if every else 0.0
            before, begin = engine.ledger, time.perf_counter()
            (event,) = engine.step()
            seconds, after = time.perf_counter() - begin, engine.ledger
            tell(
                "token", run=run, seconds=seconds, id=event.token_id,
                bytes_read=after.bytes_read - before.bytes_read,
                hits=after.hits - before.hits, lookups=after.lookups - before.lookups,
                parts={part: total - before.parts[part] for part, total in after.parts.items()},
                busy_s=engine._started.store.stats()["busy_seconds"] - busy_s if every else 0.0, **raw,
            )  # fmt: skip
    tell("done", peak_bytes=peak_bytes())


if __name__ == "__main__":
    main()
    os._exit(0)  # freeing gigabytes page by page would measure nothing
