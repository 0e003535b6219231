"""Encodes inputs with the towers of transformers, in a process of its own (`encoders.py` starts it).

Its interpreter needs torch, transformers, safetensors and numpy, and nothing of Argosy.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as omni
from transformers.models.qwen3_vl_moe import modeling_qwen3_vl_moe as vl

parser = argparse.ArgumentParser()
parser.add_argument("--tower", type=Path, required=True, help="a directory that `towers.py` wrote")
parser.add_argument("--values", type=Path, required=True, help="the input, .npy")
parser.add_argument("--grid", type=int, nargs="*", help="of a picture")
parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
parser.add_argument("--threads", type=int, required=True)
parser.add_argument("--repeats", type=int, required=True)
parser.add_argument("--out", type=Path, help="where to save the embeddings")
options = parser.parse_args()

torch.set_num_threads(options.threads)
dtype = getattr(torch, options.dtype)
raw = json.loads((options.tower / "config.json").read_text())
values = torch.tensor(np.load(options.values))
if options.grid:
    model = vl.Qwen3VLMoeVisionModel._from_config(
        vl.Qwen3VLMoeVisionConfig(**raw), dtype=dtype, attn_implementation="sdpa"
    )
    arguments = {"hidden_states": values.to(dtype), "grid_thw": torch.tensor([options.grid])}
else:
    model = omni.Qwen3OmniMoeAudioEncoder._from_config(
        omni.Qwen3OmniMoeAudioEncoderConfig(**raw), dtype=dtype, attn_implementation="sdpa"
    )
    arguments = {"input_features": values.to(dtype), "feature_lens": torch.tensor([values.shape[1]])}
missing = model.load_state_dict(load_file(options.tower / "model.safetensors"), strict=False)
# Tables that follow from the config are not stored.
unexpected = [name for name in missing.missing_keys if "inv_freq" not in name and "positional" not in name]
if missing.unexpected_keys or unexpected:
    raise SystemExit(f"the tower's names differ: {missing}")
model.eval()


@torch.inference_mode()
def encode() -> torch.Tensor:
    made = model(**arguments)
    return made.pooler_output if options.grid else made.last_hidden_state


rows = encode()
seconds = []
for _ in range(options.repeats):
    begin = time.perf_counter()
    encode()
    seconds.append(time.perf_counter() - begin)
if options.out:
    np.save(options.out, rows.float().numpy())
print(json.dumps({"seconds": seconds, "positions": len(rows)}))
