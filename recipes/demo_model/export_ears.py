"""Add the ear experts, their rows of the routers, and the projector to the file that Argosy ships.

    python export_ears.py --work WORK --out ../../src/argosy/demo/experts.gguf

The eight experts of text stay as they are, bit for bit. Ear experts become Q5_0 blocks like them, and the projector
float16.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import numpy as np
from q5_0 import quantise_q5_0
from safetensors.numpy import load_file

from argosy.demo.base import BASE_GGUF_SHA256
from argosy.demo.experts import (
    ARCHITECTURE,
    BASE_DIGEST_KEY,
    EXPERTS_FILE,
    EXPERTS_PER_TOKEN_KEY,
    TENSOR_OF_PART,
    TENSOR_OF_PROJECTOR,
)
from model import EXPERTS_PER_TOKEN, NUM_EXPERTS, WIDTH

SIZE_LIMIT_BYTES = 40_000_000
Q5_0 = gguf.GGMLQuantizationType.Q5_0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder with ears.safetensors")
    parser.add_argument("--text", type=Path, default=EXPERTS_FILE, help="the file with the experts of text")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    trained = load_file(options.work / "ears.safetensors")
    text = {tensor.name: tensor for tensor in gguf.GGUFReader(options.text).tensors}
    num_layers = sum(name.startswith("layers.") for name in trained) // 3
    partial = options.out.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, ARCHITECTURE)
    writer.add_name("Argosy demo model: routed experts, routers and the projector of the ear")
    writer.add_license("apache-2.0")
    writer.add_string(BASE_DIGEST_KEY, BASE_GGUF_SHA256)
    num_ears = len(trained["layers.0.router"])
    writer.add_uint32(f"{ARCHITECTURE}.num_experts", NUM_EXPERTS + num_ears)
    writer.add_uint32(EXPERTS_PER_TOKEN_KEY, EXPERTS_PER_TOKEN)
    writer.add_uint32(f"{ARCHITECTURE}.width", WIDTH)
    for layer in range(num_layers):
        gate, up = np.split(trained[f"layers.{layer}.gate_up"], 2, axis=1)
        parts = {"gate": gate, "up": up, "down": trained[f"layers.{layer}.down"]}
        for part, ears in parts.items():
            name = f"blk.{layer}.{TENSOR_OF_PART[part]}.weight"
            known = text[name].data[:NUM_EXPERTS]
            blocks = np.concatenate([known, quantise_q5_0(ears).reshape(num_ears, *known.shape[1:])])
            writer.add_tensor(name, blocks, raw_dtype=Q5_0)
        name = f"blk.{layer}.{TENSOR_OF_PART['router']}.weight"
        writer.add_tensor(
            name, np.concatenate([text[name].data[:NUM_EXPERTS], trained[f"layers.{layer}.router"]])
        )
    for part, name in TENSOR_OF_PROJECTOR.items():
        writer.add_tensor(name, trained[f"projector.{part}.weight"].astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if (size := partial.stat().st_size) > SIZE_LIMIT_BYTES:
        raise SystemExit(f"{partial} is {size} bytes, more than {SIZE_LIMIT_BYTES}")
    partial.rename(options.out)
    print(f"{options.out}: {size} bytes")


if __name__ == "__main__":
    main()
