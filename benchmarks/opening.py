"""How long does it take to open and plan a checkpoint, and how much memory, by the number of its tensors?

    python benchmarks/opening.py [--models kimi_k2,kimi_k3,deepseek_v41] [--tensors 60000,120000,250000,500000]
                                 [--repeats 3] [--short]

Layers and names are a giant's: experts in MXFP4, as its makers or `compressed-tensors` write them, a tensor for the
codes and one for the scales of each matrix, in a shard for every 3,000 tensors. Layers have more experts from size to
size, and everything else is equal. Headers and the index are real; the weights are holes, because neither opening nor
planning reads any. Each repeat is a fresh process, which has imported everything that a process with an engine imports;
seconds are those of its processor, and memory is what it takes in addition at its peak, and still holds at the end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from argosy.checkpoint.geometry import dense_shapes, expert_shapes
from argosy.config import MIB
from argosy.model.families import FAMILIES
from common import Report, alternate, run_inside
from giants import GIANTS, Model

TENSORS_OF_EXPERT = 6
TENSORS_OF_SHARD = 3000
SECONDS, PEAK_MIB, AT = 2.0, 64.0, 60_000  # the target
_QUANTIZATION: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
    "format": "mxfp4-pack-quantized",
    "ignore": [
        "lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
        "re:.*routed_expert_.*",
    ],
    "kv_cache_scheme": None,
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "output_activations": None,
            "weights": {
                "num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True,
                "dynamic": False, "actorder": None, "block_structure": None, "observer": "minmax",
                "observer_kwargs": {},
            },
        }
    },
}  # fmt: skip


def write_checkpoint(directory: Path, model: Model, num_tensors: int) -> int:
    """Write config, headers and holes; return how many tensors they describe."""
    family = FAMILIES[model.raw["model_type"]]
    num_layers = len(family.parse_config(model.raw).moe_layers)
    sizes: dict[str, Any] = {model.experts_key: num_tensors // (num_layers * TENSORS_OF_EXPERT)}
    codes, scales = "weight_packed", "weight_scale"
    if "quantization_config" in model.raw:
        codes, scales = "weight", "scale"
    else:
        sizes["quantization_config"] = _QUANTIZATION
    raw = model.with_sizes(**sizes)
    (directory / "config.json").write_text(json.dumps(raw))
    config, layout = family.parse_config(raw), family.LAYOUTS[0]
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for canonical, shape in dense_shapes(config):
        name = layout.dense_name(canonical)
        stored = shape
        if canonical.endswith("_conv"):
            stored = shape[0], 1, shape[1]  # a convolution has one input channel
        elif canonical.endswith(("ngram_key_norm", "ngram_query_norm")):
            stored = config.num_streams, config.hidden_size
        elif name in tensors:  # two matrices are stored as one
            stored = tensors[name][1][0] + shape[0], shape[1]
        tensors[name] = "BF16", stored
    for layer in config.ngram_layers:
        ngrams = config.layers[layer].ngrams
        assert ngrams is not None
        assert layout.table_names is not None
        name = f"layers.{layer}.{layout.table_names[0]}"
        tensors[name] = "F8_E4M3", (ngrams.num_rows, ngrams.row_dim)
        tensors[name.removesuffix(codes) + scales] = "F8_E8M0", (ngrams.num_rows, ngrams.row_dim // 32)
    for layer in config.moe_layers:
        shapes = expert_shapes(config, layer)
        for expert in range(config.num_experts):
            matrices = zip(layout.names_of_expert(layer, expert), shapes, strict=True)
            for name, (rows, cols) in matrices:
                stem = name.removesuffix("weight")
                tensors[stem + codes] = "U8", (rows, cols // 2)
                tensors[stem + scales] = "U8", (rows, cols // 32)
    names = sorted(tensors)
    num_shards = -(-len(names) // TENSORS_OF_SHARD)
    weight_map = {}
    for number in range(num_shards):
        shard = f"model-{number + 1:05}-of-{num_shards:05}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names[number * TENSORS_OF_SHARD : (number + 1) * TENSORS_OF_SHARD]:
            dtype, shape = tensors[name]
            begin, end = end, end + prod(shape) * (2 if dtype == "BF16" else 1)
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
            weight_map[name] = shard
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (directory / shard).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return len(names)


def _memory_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024 / MIB
    raise SystemExit(f"this kernel tells no {field}")


def inside(directory: Path) -> None:
    """Open and plan in this process, and print the cost as JSON."""
    from argosy.engine import engine  # noqa: F401  so that its imports are not counted
    from argosy.forecast.planning import Subject, find_place, forecaster
    from argosy.open.models import open_files

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before, start = _memory_mib("VmRSS"), time.process_time()
    files = open_files(directory)
    opened = time.process_time()
    subject = Subject(name=str(directory), files=files, place="files")
    found, budget_bytes = forecaster(subject, find_place("box:desktop-64"))
    found.forecast(budget_bytes)
    print(json.dumps({
        "open": opened - start,
        "plan": time.process_time() - opened,
        "peak": _memory_mib("VmHWM") - before,
        "held": _memory_mib("VmRSS") - before,
        "experts": len(files.experts),
    }))  # fmt: skip


def sample(directory: Path) -> dict[str, float]:
    command = run_inside("opening.py", ["--inside", directory])
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join(GIANTS))
    parser.add_argument("--tensors", default="60000,120000,250000,500000")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="60,000 tensors, once")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        inside(options.inside)
        return 0
    sizes = [int(size) for size in options.tensors.split(",")]
    if options.short:
        sizes, options.repeats = [AT], 1
    report = Report("opening", state="headers in the page cache, weights are holes")
    with tempfile.TemporaryDirectory() as folder:
        made = {}
        for model in options.models.split(","):
            for size in sizes:
                directory = Path(folder) / f"{model}-{size}"
                directory.mkdir()
                made[directory] = model, write_checkpoint(directory, GIANTS[model], size)
        counts = {directory: int(sample(directory)["experts"]) for directory in made}
        report.correct(f"{', '.join(f'{count:,}' for count in counts.values())} experts found")
        report.opening()
        for directory, (model, num_tensors) in made.items():
            name = f"{model}, {num_tensors:,} tensors"
            samples = alternate({name: partial(sample, directory)}, options.repeats)[name]
            facts = {"model": model, "tensors": num_tensors, "experts": counts[directory]}
            opened = report.figure(f"{name}: open", "s", samples, "open", **facts)
            planned = report.figure(f"{name}: plan", "s", samples, "plan", **facts)
            peak = report.figure(f"{name}: most memory", "MiB", samples, "peak", **facts)
            report.figure(f"{name}: memory held", "MiB", samples, "held", **facts)
            if num_tensors < 2 * AT:
                report.ratio(f"{name}: seconds", opened + planned, 1.0, target=f"<= {SECONDS:g}", **facts)
                report.ratio(f"{name}: MiB", peak, 1.0, target=f"<= {PEAK_MIB:g}", **facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
