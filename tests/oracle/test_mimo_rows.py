"""MiMo-V2.5's FP8 tensors of q, k and v: the weights are those that llama.cpp's converter reads from them.

`ARGOSY_LLAMA_CPP` names a directory with llama.cpp's sources; without it the test is skipped.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from argosy.model.families import open_model
from tests.families.test_mimo_v2 import make_pair, values_of
from tests.models.converter import LLAMA_CPP
from tests.models.safetensors_file import read_checkpoint

pytestmark = pytest.mark.skipif(not LLAMA_CPP.exists(), reason=f"no llama.cpp: {LLAMA_CPP} does not exist")

# The converter brings a `gguf` package of its own, so it needs an interpreter of its own.
SCRIPT = """
import sys
sys.path[:0] = [sys.argv[1] + "/gguf-py", sys.argv[1]]
import numpy as np
import torch
from conversion.mimo import MimoV2Model
given = np.load(sys.argv[2])
codes = torch.from_numpy(given["codes"]).view(torch.float8_e4m3fn)
read = MimoV2Model._tp_aware_qkv_dequant(codes, torch.from_numpy(given["scales"]), *map(int, given["sizes"]))
np.save(sys.argv[3], read.numpy())
"""


@pytest.mark.parametrize(("num_ranks", "num_heads", "swa_heads"), [(4, 16, 8), (8, 16, 8)])
def test_the_weights_are_those_of_llama_cpp_s_converter(
    num_ranks: int, num_heads: int, swa_heads: int, tmp_path: Path
) -> None:
    changes = {
        "head_dim": 192,
        "hidden_size": 160,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_ranks,
        "v_head_dim": 128,
        "swa_num_key_value_heads": swa_heads,
    }
    fused, _ = make_pair(tmp_path, **changes)
    files, stored = open_model(fused), read_checkpoint(fused)
    for layer, kv_heads in ((0, num_ranks), (1, swa_heads)):
        name = f"model.layers.{layer}.self_attn.qkv_proj.weight"
        sizes = np.array([num_heads, kv_heads, 192, 128])
        np.savez(tmp_path / "given.npz", codes=stored[name], scales=stored[f"{name}_scale_inv"], sizes=sizes)
        paths = [str(LLAMA_CPP), str(tmp_path / "given.npz"), str(tmp_path / "read.npy")]
        subprocess.run([sys.executable, "-c", SCRIPT, *paths], check=True, capture_output=True, timeout=300)
        found = [values_of(files.dense[f"layers.{layer}.{part}"]) for part in "qkv"]
        np.testing.assert_array_equal(np.concatenate(found), np.load(tmp_path / "read.npy"))
