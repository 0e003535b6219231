"""Runs Argosy on the same job as `peer.py`, through the public `Engine` (`engines.py` starts both)."""

from __future__ import annotations

import dataclasses
import os
import threading
import time

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
    begin = time.perf_counter()
    engine = Engine.open(
        job["model"],
        memory=job.get("memory"),
        threads=job["threads"],
        context=job["context"],
        max_sequences=1,
        look_ahead=job["look_ahead"],
        **({"ask_ahead": os.environ["ARGOSY_ASK_AHEAD"]} if "ARGOSY_ASK_AHEAD" in os.environ else {}),
        prefix_reuse=False,  # runs repeat their prompts, and each must compute its own
    )
    counters = engine.ledger
    tell(
        "loaded",
        seconds=time.perf_counter() - begin,
        bytes_read=counters.bytes_read,
        plan=[list(line) for line in engine.plan.lines()],
        is_resident=engine.plan.is_resident,
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
        tokens = []
        while not tokens:
            tokens = engine.step()
        seconds, after = time.perf_counter() - begin, engine.ledger
        read = after.bytes_read - before.bytes_read
        tell(
            "prefill", run=run, tokens=len(prompt), seconds=seconds, id=tokens[0].token_id, bytes_read=read,
            hits=after.hits - before.hits, lookups=after.lookups - before.lookups,
        )  # fmt: skip
        while sequence.result is None:
            before, begin = engine.ledger, time.perf_counter()
            (event,) = engine.step()
            seconds, after = time.perf_counter() - begin, engine.ledger
            tell(
                "token", run=run, seconds=seconds, id=event.token_id,
                bytes_read=after.bytes_read - before.bytes_read,
                hits=after.hits - before.hits, lookups=after.lookups - before.lookups,
                parts={part: total - before.parts[part] for part, total in after.parts.items()},
            )  # fmt: skip
    tell("done", peak_bytes=peak_bytes())


if __name__ == "__main__":
    main()
    os._exit(0)  # freeing gigabytes page by page would measure nothing
