"""Encodes a picture or sound with llama.cpp's mtmd, in a process of its own (`encoders.py` starts it).

Its interpreter is the one that `install_peer.sh` makes. Only the encode is timed, after mtmd has prepared the picture
or sound.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time
from pathlib import Path

import llama_cpp
import numpy as np
from llama_cpp import mtmd_cpp as mtmd

parser = argparse.ArgumentParser()
parser.add_argument("--mmproj", type=Path, required=True)
parser.add_argument(
    "--vocabulary", type=Path, required=True, help="a model of text; its weights are not read"
)
parser.add_argument(
    "--media", type=Path, required=True, help="uint8 [height, width, 3] or float32 [samples], .npy"
)
parser.add_argument("--size", type=int, required=True, help="of an embedding, those for deepstack included")
parser.add_argument("--threads", type=int, required=True)
parser.add_argument("--repeats", type=int, required=True)
parser.add_argument("--out", type=Path, help="where to save the embeddings")
options = parser.parse_args()


@llama_cpp.llama_log_callback
def _keep_quiet(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    pass


llama_cpp.llama_log_set(_keep_quiet, ctypes.c_void_p(0))
mtmd.mtmd_log_set(_keep_quiet, ctypes.c_void_p(0))
llama_cpp.llama_backend_init()
text_params = llama_cpp.llama_model_default_params()
text_params.vocab_only = True
text = llama_cpp.llama_model_load_from_file(str(options.vocabulary).encode(), text_params)
if not text:
    raise SystemExit(f"llama.cpp cannot open {options.vocabulary}")
params = mtmd.mtmd_context_params_default()
params.use_gpu = params.print_timings = params.warmup = False
params.n_threads = options.threads
context = mtmd.mtmd_init_from_file(str(options.mmproj).encode(), text, params)
if not context:
    raise SystemExit(f"mtmd cannot open {options.mmproj}")
media = np.load(options.media)
if media.dtype == np.uint8:
    height, width, _ = media.shape
    data = media.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    bitmap = mtmd.mtmd_bitmap_init(width, height, data)
else:
    bitmap = mtmd.mtmd_bitmap_init_from_audio(
        len(media), media.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    )
part = mtmd.mtmd_input_part(text=None, bitmap=bitmap)
parts = (ctypes.POINTER(mtmd.mtmd_input_part) * 1)(ctypes.pointer(part))
chunks = mtmd.mtmd_input_chunks_init()
if code := mtmd.mtmd_tokenize_from_parts(context, chunks, parts, 1, False):
    raise SystemExit(f"mtmd cannot prepare the input: {code}")
ours = [mtmd.mtmd_input_chunks_get(chunks, at) for at in range(mtmd.mtmd_input_chunks_size(chunks))]
ours = [chunk for chunk in ours if mtmd.mtmd_input_chunk_get_type(chunk) != mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT]


def encode() -> np.ndarray:
    """Embeddings [positions, size]."""
    rows = []
    for chunk in ours:
        if code := mtmd.mtmd_encode_chunk(context, chunk):
            raise SystemExit(f"mtmd_encode_chunk: {code}")
        count = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
        made = np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(context), (count, options.size))
        rows.append(made.copy())
    return np.concatenate(rows)


rows = encode()
seconds = []
for _ in range(options.repeats):
    begin = time.perf_counter()
    encode()
    seconds.append(time.perf_counter() - begin)
if options.out:
    np.save(options.out, rows)
print(json.dumps({"seconds": seconds, "positions": len(rows)}))
