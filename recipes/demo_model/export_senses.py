"""Add ear and eye experts, their rows of the routers, the projector and the tower to the file that argosy-demo ships.

    python export_senses.py --ears WORK/ears.safetensors --eyes WORK/sight.safetensors \\
        --out ../../packages/argosy-demo/argosy_demo/experts.gguf

The eight experts of text stay as they are, bit for bit. The others become Q5_0 blocks like them; the projector and the
tower float16.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import numpy as np
from q5_0 import quantise_q5_0
from safetensors.numpy import load_file
from tower import NUM_HEADS

from argosy.demo.base import BASE_GGUF_SHA256
from argosy.demo.experts import (
    ARCHITECTURE,
    BASE_DIGEST_KEY,
    EXPERTS_PER_TOKEN_KEY,
    TENSOR_OF_PART,
    TENSOR_OF_PROJECTOR,
    TOWER_HEADS_KEY,
    TOWER_PREFIX,
)
from argosy.demo.package import find_experts
from model import EXPERTS_PER_TOKEN, NUM_EXPERTS, WIDTH

SIZE_LIMIT_BYTES = 53_000_000  # 28 MB of text, 25 MB of ears and eyes
Q5_0 = gguf.GGMLQuantizationType.Q5_0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ears", type=Path, required=True, help="ears.safetensors")
    parser.add_argument("--eyes", type=Path, help="sight.safetensors; without it the model only hears")
    parser.add_argument("--text", type=Path, default=find_experts(), help="the file with the experts of text")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    senses = [load_file(path) for path in (options.ears, options.eyes) if path]
    text = {tensor.name: tensor for tensor in gguf.GGUFReader(options.text).tensors}
    num_layers = sum(name.startswith("layers.") for name in senses[0]) // 3
    partial = options.out.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, ARCHITECTURE)
    writer.add_name("Argosy demo model: routed experts, routers, projector of the ear, tower of the eye")
    writer.add_license("apache-2.0")
    writer.add_string(BASE_DIGEST_KEY, BASE_GGUF_SHA256)
    num_own = sum(len(sense["layers.0.router"]) for sense in senses)
    writer.add_uint32(f"{ARCHITECTURE}.num_experts", NUM_EXPERTS + num_own)
    writer.add_uint32(EXPERTS_PER_TOKEN_KEY, EXPERTS_PER_TOKEN)
    writer.add_uint32(f"{ARCHITECTURE}.width", WIDTH)
    for layer in range(num_layers):
        router, gate_up, down = (
            np.concatenate([sense[f"layers.{layer}.{part}"] for sense in senses])
            for part in ("router", "gate_up", "down")
        )
        gate, up = np.split(gate_up, 2, axis=1)
        for part, own in {"gate": gate, "up": up, "down": down}.items():
            name = f"blk.{layer}.{TENSOR_OF_PART[part]}.weight"
            known = text[name].data[:NUM_EXPERTS]
            blocks = np.concatenate([known, quantise_q5_0(own).reshape(num_own, *known.shape[1:])])
            writer.add_tensor(name, blocks, raw_dtype=Q5_0)
        name = f"blk.{layer}.{TENSOR_OF_PART['router']}.weight"
        writer.add_tensor(name, np.concatenate([text[name].data[:NUM_EXPERTS], router]))
    for part, name in TENSOR_OF_PROJECTOR.items():
        writer.add_tensor(name, senses[0][f"projector.{part}.weight"].astype(np.float16))
    if options.eyes:
        writer.add_uint32(TOWER_HEADS_KEY, NUM_HEADS)
        for name, value in senses[1].items():
            if name.startswith("tower."):
                writer.add_tensor(TOWER_PREFIX + name.removeprefix("tower."), value.astype(np.float16))
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
