"""Write the trained experts as the one small file that Argosy ships.

    python export.py --work WORK --out packages/argosy-demo/argosy_demo/experts.gguf

Routers stay float32; gate, up and down become Q5_0 blocks of 32 weights, 5 bits each, with one float16 scale, see
`q5_0.py`. The encyclopedia experts overshoot on other text, so they are first scaled towards the dense model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, dequantize
from q5_0 import quantise_q5_0
from safetensors.numpy import load_file

from argosy.demo.base import BASE_GGUF_SHA256
from argosy.demo.experts import ARCHITECTURE, BASE_DIGEST_KEY, EXPERTS_PER_TOKEN_KEY, TENSOR_OF_PART
from model import EXPERTS_PER_TOKEN, NUM_EXPERTS, WIDTH

ENCYCLOPEDIA_EXPERTS = (0, 1)
SIZE_LIMIT_BYTES = 30_000_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder with trained.safetensors")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--shrink",
        type=float,
        default=0.75,
        help="factor on the down projections of the encyclopedia's experts, chosen on the wikitext validation split",
    )
    asked = parser.parse_args()
    trained = load_file(asked.work / "trained.safetensors")
    num_layers = len(trained) // 3
    partial = asked.out.with_suffix(".partial")
    writer = GGUFWriter(partial, ARCHITECTURE)
    writer.add_name("Argosy demo model: routed experts and routers")
    writer.add_license("apache-2.0")
    writer.add_string(BASE_DIGEST_KEY, BASE_GGUF_SHA256)
    writer.add_uint32(f"{ARCHITECTURE}.num_experts", NUM_EXPERTS)
    writer.add_uint32(EXPERTS_PER_TOKEN_KEY, EXPERTS_PER_TOKEN)
    writer.add_uint32(f"{ARCHITECTURE}.width", WIDTH)
    squared_error = squared_size = 0.0
    for layer in range(num_layers):
        gate, up = np.split(trained[f"layers.{layer}.gate_up"], 2, axis=1)
        writer.add_tensor(f"blk.{layer}.{TENSOR_OF_PART['router']}.weight", trained[f"layers.{layer}.router"])
        down = trained[f"layers.{layer}.down"]
        down[list(ENCYCLOPEDIA_EXPERTS)] *= asked.shrink
        for part, weights in (("gate", gate), ("up", up), ("down", down)):
            blocks = quantise_q5_0(weights)
            difference = dequantize(blocks, GGMLQuantizationType.Q5_0) - weights
            squared_error += float(np.square(difference).sum())
            squared_size += float(np.square(weights).sum())
            name = f"blk.{layer}.{TENSOR_OF_PART[part]}.weight"
            writer.add_tensor(name, blocks, raw_dtype=GGMLQuantizationType.Q5_0)
        print(f"layer {layer}: relative error so far {(squared_error / squared_size) ** 0.5:.4f}", flush=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    size = partial.stat().st_size
    if size > SIZE_LIMIT_BYTES:
        raise SystemExit(f"{partial} is {size} bytes, more than {SIZE_LIMIT_BYTES}")
    partial.rename(asked.out)
    print(f"{asked.out}: {size} bytes")


if __name__ == "__main__":
    main()
