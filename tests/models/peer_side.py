"""Quantise GGUF files and compute logits with llama.cpp, in the interpreter that has it (`quantised.py` starts it).

    PEER_PYTHON peer_side.py quantise JOB.json     # source, target, file_type, overrides, importance, may_requantise
    PEER_PYTHON peer_side.py logits JOB.json       # model, token_ids, out
    PEER_PYTHON peer_side.py pool JOB.json         # model, texts (lists of ids), pooling (-1: the file's), out

Only C functions of llama-cpp-python are used, and nothing of Argosy.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

import numpy as np
from llama_cpp import Llama
from llama_cpp import llama_cpp as native


def quantise(job: dict[str, Any]) -> None:
    native.llama_backend_init()
    params = native.llama_model_quantize_default_params()
    params.nthread = 1
    params.ftype = getattr(native, job["file_type"])
    params.allow_requantize = job["may_requantise"]
    kept = []  # arrays that the structures point to
    if job["importance"]:
        with np.load(job["importance"]) as file:
            kept = [(name.encode(), np.ascontiguousarray(file[name], np.float32)) for name in file]
        entries = (native.llama_model_imatrix_data * (len(kept) + 1))()
        for entry, (name, values) in zip(entries, kept):  # noqa: B905  the last entry ends the list
            entry.name, entry.size = name, values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = entries
    if job["overrides"]:
        patterns = (native.llama_model_tensor_override * (len(job["overrides"]) + 1))()
        for pattern, (expression, kind) in zip(patterns, job["overrides"].items()):  # noqa: B905
            pattern.pattern, pattern.type = expression.encode(), kind
        params.tt_overrides = patterns
    if code := native.llama_model_quantize(
        job["source"].encode(), job["target"].encode(), ctypes.byref(params)
    ):
        raise SystemExit(f"llama_model_quantize: {code}")


def logits(job: dict[str, Any]) -> None:
    model = Llama(job["model"], n_ctx=64, logits_all=True, verbose=False, n_threads=1)
    model.eval(job["token_ids"])
    np.save(job["out"], np.array(model.scores[: len(job["token_ids"])]))


def pool(job: dict[str, Any]) -> None:
    """Save the embedding of each text, or a reranker's probabilities of its labels."""
    model = Llama(
        job["model"], n_ctx=512, n_batch=512, n_ubatch=512, embedding=True, pooling_type=job["pooling"],
        verbose=False, n_threads=1,
    )  # fmt: skip
    is_rank = model.pooling_type() == native.LLAMA_POOLING_TYPE_RANK
    size = native.llama_model_n_cls_out(model.model) if is_rank else model.n_embd()
    found = []
    for token_ids in job["texts"]:
        model._ctx.kv_cache_clear()
        model._batch.reset()
        model._batch.add_sequence(token_ids, 0, logits_all=True)
        model._ctx.decode(model._batch)
        found.append(native.llama_get_embeddings_seq(model.ctx, 0)[:size])
    np.save(job["out"], np.array(found, np.float32))


if __name__ == "__main__":
    with open(sys.argv[2]) as file:
        {"quantise": quantise, "logits": logits, "pool": pool}[sys.argv[1]](json.load(file))
