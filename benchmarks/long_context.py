"""How fast are decode and prefill after 8k and 32k tokens, and how far is attention from the machine's limits?

    python benchmarks/long_context.py [--contexts 8192,32768] [--threads 1,2] [--attention GQA MLA]
        [--repeats 3] [--kernels] [--short]

First attention alone. A token that shares keys among 8 heads is compared with the read bandwidth of memory, measured
at the same moment; one over latent vectors, and a chunk of a prompt, with a float32 product of many tokens. Then the
models `long` and `long-latent` (`make_checkpoint.py`), with grouped queries (GQA) and with latent vectors (MLA), beside
llama.cpp with flash attention: decode after the context, and prefill of the first one. There attention's share of
`long` is the time that its chunks take alone. Every sample is a fresh process, A B A B.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np

from argosy import _native
from argosy.config import KvDtype
from common import Report, Sample, alternate, probe_memory
from engines import ARGOSY, LLAMA_CPP, MODELS, Job, engines, prompts, require_documents, run
from kernels import best_rate
from latent_attention import Sequence, product
from make_checkpoint import GEOMETRIES, named_model

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 32, 4, 128, 16
LATENT_HEADS = 64
CHUNK = 512
NEW = 24
MODEL_OF = {"GQA": "long", "MLA": "long-latent"}


class Keys:
    """Keys and values of `context` positions of one layer, and attention of tokens over them."""

    def __init__(self, runtime: _native.Runtime, context: int, dtype: KvDtype) -> None:
        self.runtime, self.context = runtime, context
        shape = _native.KvShape.keys_values(KV_HEADS, HEAD_DIM)
        self.kv = _native.KvCache([shape], context // BLOCK, BLOCK, dtype)
        random = np.random.default_rng(0)
        blocks = random.permutation(context // BLOCK).astype(np.int32)  # as those of a server lie
        self.table = blocks[None]
        for begin in range(0, context, CHUNK):
            keys, values = random.standard_normal((2, CHUNK, KV_HEADS, HEAD_DIM), np.float32)
            at = np.arange(begin, begin + CHUNK)
            slots = blocks[at // BLOCK].astype(np.int64) * BLOCK + at % BLOCK
            _native.kv_write(runtime, self.kv, 0, keys, values, slots)

    def rate(self, tokens: int, seconds: float, *, until: int | None = None) -> tuple[float, float]:
        """Bytes read and operations done in a second by the `tokens` positions before `until`."""
        until = until or self.context
        q = np.random.default_rng(1).standard_normal((tokens, HEADS, HEAD_DIM), np.float32)
        out, zeros = np.empty((tokens, HEADS * HEAD_DIM), np.float32), np.zeros(tokens, np.int32)
        order = np.arange(until - tokens, until, dtype=np.int32)
        nbytes = self.kv.nbytes * until / self.context
        operations = 4 * HEADS * HEAD_DIM * float(order.sum() + tokens)

        def work() -> float:
            _native.attention(self.runtime, self.kv, 0, q, self.table, zeros, order, 0.1, 0, out)
            return 1.0

        calls = best_rate(work, seconds)
        return calls * nbytes, calls * operations


def attend(report: Report, context: int, threads: int, seconds: float) -> None:
    """Print what attention alone reaches at this context."""
    runtime = _native.Runtime(threads)
    wall_of = product(runtime)
    facts: dict[str, Any] = {"context": context, "threads": threads}
    name = f"{context // 1024}k {threads}T"
    for dtype in get_args(KvDtype):
        memory, keys = probe_memory(threads), Keys(runtime, context, dtype)
        read, done = keys.rate(1, seconds)
        share = read / 1e9 / memory
        print(
            f"{name + ' GQA ' + dtype:<22}{read / 1e9:>8.1f} GB/s{share:>7.2f} of memory's"
            f"{done / 1e9:>8.1f} GFLOP/s{1e3 * keys.kv.nbytes / read:>9.2f} ms a layer"
        )
        report.record(f"{name} GQA {dtype}", "GB/s", [read / 1e9], [], memory=memory, **facts)
    for dtype in get_args(KvDtype)[1:]:
        wall, latent = best_rate(wall_of, seconds), Sequence(runtime, LATENT_HEADS, context, dtype)
        rate = latent.rate(1, seconds)
        print(f"{name + ' MLA ' + dtype:<22}{rate / 1e9:>8.1f} GFLOP/s{rate / wall:>7.2f} of a product")
        report.record(f"{name} MLA {dtype}", "GFLOP/s", [rate / 1e9], [], wall=wall / 1e9, **facts)


def prefill_attention_s(context: int, threads: int, seconds: float) -> tuple[float, float]:
    """Seconds that attention of one layer takes for a prompt in chunks, and its rate over a float32 product's."""
    runtime = _native.Runtime(threads)
    keys, total, work = Keys(runtime, context, "f16"), 0.0, 0.0
    for until in range(CHUNK, context + 1, CHUNK):
        _, rate = keys.rate(CHUNK, seconds, until=until)
        operations = 4 * HEADS * HEAD_DIM * (CHUNK * until - CHUNK * (CHUNK - 1) / 2)
        total, work = total + operations / rate, work + operations
    return total, work / total / best_rate(product(runtime), 0.5)


def sample(engine: str, job: Job, told: list[str]) -> Callable[[], Mapping[str, float]]:
    def one() -> dict[str, float]:
        done = run(engine, job).require()
        require_documents(done, told)
        return {"prefill": done.prefill_tok_per_s, "decode": done.decode_tok_per_s}

    return one


def converse(
    report: Report, kind: str, model: Path, context: int, threads: int, repeats: int, *, has_share: bool
) -> list[Sample]:
    """Print prefill and decode of the whole model at this context, beside llama.cpp if it is installed."""
    name = f"{kind} {context // 1024}k {threads}T"
    facts: dict[str, Any] = {"attention": kind, "context": context, "threads": threads}
    job = Job(model=model, prompts=prompts(1, context - 2 * BLOCK), num_new=NEW, threads=threads, warm_up=0)
    told: list[str] = []
    found = alternate({engine: sample(engine, job, told) for engine in engines(quiet=True)}, repeats)
    for figure, target in (("decode", ">= 1.5"), ("prefill", ">= 2.5")):
        ours = report.figure(f"{name} {figure}: {ARGOSY}", "tok/s", found[ARGOSY], figure, **facts)
        if LLAMA_CPP in found:
            theirs = report.figure(
                f"{name} {figure}: {LLAMA_CPP}", "tok/s", found[LLAMA_CPP], figure, **facts
            )
            report.ratio(f"{name} {figure}: over {LLAMA_CPP}", ours, theirs, target=target, **facts)
        if figure == "prefill" and has_share:
            alone_s, of_product = prefill_attention_s(context, threads, 0.05)
            share = int(GEOMETRIES[MODEL_OF[kind]]["layers"]) * alone_s * ours / context
            report.shares(f"{name} prefill: attention's share of it", [share], **facts)
            report.shares(f"{name} prefill: attention over a float32 product", [of_product], **facts)
    report.line("correct", "; ".join(told))
    return [one for samples in found.values() for one in samples]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--contexts", default="8192,32768", help="multiples of 512")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="of a figure of attention alone, the best call counts"
    )
    parser.add_argument(
        "--attention", nargs="+", choices=[*MODEL_OF], default=[*MODEL_OF], help="of the models"
    )
    parser.add_argument("--kernels", action="store_true", help="attention alone")
    parser.add_argument("--models", type=Path, default=MODELS, help="where model files are kept")
    parser.add_argument("--short", action="store_true", help="2,048 tokens, two threads, once")
    options = parser.parse_args()
    if options.short:
        options.contexts, options.threads, options.repeats, options.seconds = "2048", "2", 1, 0.1
        options.attention = ["GQA"]
    contexts, threads = (
        [int(one) for one in given.split(",")] for given in (options.contexts, options.threads)
    )
    report = Report("long_context", state="weights in memory; every prompt computed anew")
    check = Sequence(_native.Runtime(1), 16, CHUNK, "q8")
    check.require_right()
    report.correct("absorbed attention equals plain; answers continue their documents")
    report.opening()
    samples = []
    with Sample() as alone:
        for context in contexts:
            for count in threads:
                attend(report, context, count, options.seconds)
    samples.append(alone)
    if not options.kernels:
        for kind, context, count in itertools.product(options.attention, contexts, threads):
            model = named_model(options.models, MODEL_OF[kind], "Q4_0")
            has_share = kind == "GQA" and context == min(contexts)
            samples += converse(report, kind, model, context, count, options.repeats, has_share=has_share)
    report.neighbours(samples)
    return 0


if __name__ == "__main__":
    sys.exit(main())
