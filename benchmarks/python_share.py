"""How much of a decode step is Python?

    python benchmarks/python_share.py [--geometries small] [--formats Q4_0] [--repeats 3] [--short]

Every function and method of `argosy._native` is wrapped to add up the time inside it. The rest of a step is Python,
including numpy and the sampler, plus the wrapping itself: an upper bound. Steps with and without wrapping alternate, so
that its cost shows.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from argosy import Engine, SamplingParams, _native
from common import Report, alternate, file_bytes
from engines import parse_cases
from random_weights import document

PROMPT_TOKENS = 16


class NativeTime:
    """Seconds inside the native module, counting only the outermost call."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            if self._depth:
                return function(*arguments, **named)
            self._depth = 1
            started = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds += time.perf_counter() - started
                self._depth = 0

        return timed

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Wrap the module's functions and its classes' methods, and restore them at the end."""
        originals: list[tuple[Any, str, Any]] = []
        for name, value in list(vars(_native).items()):
            if name.startswith("_"):
                continue
            if isinstance(value, type):
                methods = [(key, method) for key, method in vars(value).items() if not key.startswith("__")]
                originals += [(value, key, method) for key, method in methods if callable(method)]
            elif callable(value):
                originals.append((_native, name, value))
        try:
            for owner, name, value in originals:
                setattr(owner, name, self.wrap(value))
            yield
        finally:
            for owner, name, value in originals:
                setattr(owner, name, value)


def decode(engine: Engine, number: int, num_new: int, native: NativeTime | None = None) -> float:
    """Seconds of the steps after the first token; `native` measures the same steps.

    Raises:
        SystemExit: the answer does not continue the document.
    """
    text = document(number, PROMPT_TOKENS + num_new + 1)
    params = SamplingParams(max_tokens=num_new + 1, ignore_eos=True)
    sequence = engine.submit(text[:PROMPT_TOKENS], params)
    while sequence.first_token_at is None:
        engine.step()
    if native is not None:
        native.seconds = 0.0
    started = time.perf_counter()
    while sequence.result is None:
        engine.step()
    seconds = time.perf_counter() - started
    if list(sequence.new_ids) != text[PROMPT_TOKENS:]:
        raise SystemExit(f"the answer does not continue document {number}")
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--new", type=int, default=64)
    options, cases = parse_cases(parser, geometries="small", formats="Q4_0", threads="2")
    report = Report("python_share", state="weights in memory, warmed by one answer")
    num_new = 8 if options.short else options.new
    for number, case in enumerate(cases):
        memory = 2 * file_bytes(case.model) + (2 << 30)
        with Engine.open(
            case.model, memory=memory, threads=case.threads, context=256, max_sequences=1
        ) as engine:
            decode(engine, 1, num_new)
            report.correct(f"{num_new + 1}/{num_new + 1} tokens continue their document, in every sample too")
            if number == 0:
                report.opening()

            def plain(engine: Engine = engine) -> dict[str, float]:
                return {"step ms": 1e3 * decode(engine, 2, num_new) / num_new}

            def watched(engine: Engine = engine) -> dict[str, float]:
                native = NativeTime()
                with native.watching():
                    seconds = decode(engine, 2, num_new, native)
                return {
                    "step ms": 1e3 * seconds / num_new,
                    "python us": 1e6 * (seconds - native.seconds) / num_new,
                    "share": 1 - native.seconds / seconds,
                }

            samples = alternate({"plain": plain, "watched": watched}, options.repeats)
        report.figure(f"{case.name}: step", "ms", samples["plain"], "step ms", **case.facts)
        report.figure(f"{case.name}: step, watched", "ms", samples["watched"], "step ms", **case.facts)
        report.figure(
            f"{case.name}: outside native code", "us", samples["watched"], "python us", **case.facts
        )
        report.shares(
            f"{case.name}: share of a step",
            [sample.values["share"] for sample in samples["watched"]],
            target="<= 0.1" if case.geometry != "tiny" else "",
            row=12,
            **case.facts,
        )
        report.neighbours([sample for found in samples.values() for sample in found])
    return 0


if __name__ == "__main__":
    sys.exit(main())
