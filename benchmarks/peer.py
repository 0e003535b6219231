"""Runs llama.cpp on a job, in its own interpreter (`engines.py` starts it; `install_peer.sh` makes it).

Only the C functions of llama-cpp-python are used, through one batch that is filled in place, so a step costs Python a
few microseconds: the figures match those of llama-bench. Nothing of Argosy is imported.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from typing import Any

STARTED = time.monotonic()

import llama_cpp  # noqa: E402
import numpy as np  # noqa: E402
from llama_cpp import llama_cpp as native  # noqa: E402

from child import Work, peak_bytes  # noqa: E402

IMPORTED = time.monotonic()


@native.llama_log_callback  # type: ignore[untyped-decorator]
def _keep_errors(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    if level == 4:  # GGML_LOG_LEVEL_ERROR; 3 is a warning
        sys.stderr.write(text.decode("utf-8", "replace"))


class Model:
    def __init__(self, job: dict[str, Any]) -> None:
        native.llama_log_set(_keep_errors, ctypes.c_void_p(0))
        native.llama_backend_init()
        params = native.llama_model_default_params()
        params.load_mode = native.LLAMA_LOAD_MODE_MMAP
        params.use_extra_bufts = job.get("repack", True)
        self.model = native.llama_model_load_from_file(job["model"].encode(), params)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot open {job['model']}")
        context = native.llama_context_default_params()
        most = max(512, *(len(prompt) for prompt in job["prompts"]))
        most_together = max(job.get("together") or [1])
        most = max(most, sum(len(prompt) for prompt in job["prompts"][:most_together]))
        context.n_seq_max = most_together
        context.n_ctx = job["context"] * most_together
        context.n_batch = most
        context.n_ubatch = 512
        context.n_threads = context.n_threads_batch = job["threads"]
        context.flash_attn_type = int(job.get("flash_attention", True))
        context.no_perf = True
        self.context = native.llama_init_from_model(self.model, context)
        if not self.context:
            raise SystemExit("llama.cpp cannot make a context")
        self.vocab = native.llama_vocab_n_tokens(native.llama_model_get_vocab(self.model))
        self.batch = native.llama_batch_init(most, 0, 1)
        self.num_positions = 0

    def clear(self) -> None:
        native.llama_memory_clear(native.llama_get_memory(self.context), False)
        self.num_positions = 0

    def decode(self, tokens: list[int], *, all_logits: bool = False) -> None:
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = self.num_positions + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = all_logits
        batch.logits[len(tokens) - 1] = True
        if code := native.llama_decode(self.context, batch):
            raise SystemExit(f"llama_decode: {code}")
        self.num_positions += len(tokens)

    def decode_together(self, texts: list[list[int]], position: int) -> list[int]:
        """Feed the next tokens of every sequence, and return the most likely id after each."""
        batch = self.batch
        batch.n_tokens = 0
        last_rows = []
        for sequence, tokens in enumerate(texts):
            for i, token in enumerate(tokens):
                row = batch.n_tokens
                batch.token[row] = token
                batch.pos[row] = position + i
                batch.n_seq_id[row] = 1
                batch.seq_id[row][0] = sequence
                batch.logits[row] = i == len(tokens) - 1
                batch.n_tokens += 1
            last_rows.append(batch.n_tokens - 1)
        if code := native.llama_decode(self.context, batch):
            raise SystemExit(f"llama_decode: {code}")
        return [int(self.logits(row).argmax()) for row in last_rows]

    def logits(self, row: int) -> np.ndarray:
        """float32 [vocab] of an output row; -1 is the last row."""
        return np.ctypeslib.as_array(native.llama_get_logits_ith(self.context, row), (self.vocab,))


def bytes_read() -> int:
    with open("/proc/self/io") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("read_bytes"))


def answer_together(model: Model, prompts: list[list[int]], num_new: int) -> dict[str, Any]:
    """Run prompts of the same length all at once: total seconds, seconds to each first token, and the answers."""
    model.clear()
    begin = time.perf_counter()
    latest = model.decode_together(prompts, 0)
    first_s = [time.perf_counter() - begin] * len(prompts)
    ids = [[token] for token in latest]
    for step in range(num_new - 1):
        latest = model.decode_together([[token] for token in latest], len(prompts[0]) + step)
        for answer, token in zip(ids, latest):  # noqa: B905  equal lengths
            answer.append(token)
    return {"seconds": time.perf_counter() - begin, "first_s": first_s, "ids": ids}


def main() -> None:
    work = Work()
    job, tell = work.job, work.tell
    tell("started", at_start=STARTED, import_s=IMPORTED - STARTED, version=llama_cpp.__version__)
    begin = time.perf_counter()
    model = Model(job)
    tell("loaded", seconds=time.perf_counter() - begin, bytes_read=bytes_read())
    if job.get("logits"):
        (prompt,) = job["prompts"]
        rows = np.empty((len(prompt), model.vocab), np.float32)
        model.decode(prompt, all_logits=True)
        for row in range(len(prompt)):
            rows[row] = model.logits(row)
        np.save(job["logits"], rows)
        tell("done", peak_bytes=peak_bytes())
        return
    if job.get("together"):
        for count in job["together"]:
            tell("together", **answer_together(model, job["prompts"][:count], job["num_new"]))
        tell("done", peak_bytes=peak_bytes())
        return
    given = job.get("given")
    for run, prompt in enumerate(job["prompts"]):
        model.clear()
        before, begin = bytes_read(), time.perf_counter()
        model.decode(prompt)
        token = int(model.logits(-1).argmax())
        seconds = time.perf_counter() - begin
        tell(
            "prefill",
            run=run,
            tokens=len(prompt),
            seconds=seconds,
            id=token,
            bytes_read=bytes_read() - before,
        )
        for number in range(job["num_new"]):
            before = bytes_read()
            fed = given[run][number] if given else token
            begin = time.perf_counter()
            model.decode([fed])
            token = int(model.logits(-1).argmax())
            seconds = time.perf_counter() - begin
            tell("token", run=run, seconds=seconds, id=token, bytes_read=bytes_read() - before)
    tell("done", peak_bytes=peak_bytes())


if __name__ == "__main__":
    main()
    os._exit(0)  # freeing gigabytes page by page would measure nothing
