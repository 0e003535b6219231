"""Does a trillion-parameter model decode in 16 GiB, and how close is that to the drive's limit?

    python benchmarks/trillion.py [--directory DIR] [--memory 16GiB] [--experts-gib 30] [--new 16] [--short]

The geometry is Kimi-K2's: 61 layers, hidden 7168, 384 experts of width 2048, 8 per token and a shared one, 1026 B
parameters. The index and the weights that every token needs have their real size (q8; their file takes 12 GB). Of the
routed experts (int4 in groups of 32, 571 GB) only as many records exist as fit in `--experts-gib`: **many logical
experts share the bytes of one record**. This gives no advantage: the cache is keyed by the logical expert, and reads
bypass the page cache, so each miss reads a whole record from the drive. Weights are random, with the routing of
recorded traces (`random_weights.py`); a document's continuation is still the one right answer.

The run is a fresh process in a memory cgroup limited to the budget, with swap forbidden and page cache charged to it.
It is compared with the planner's equations: per layer, the misses of an LRU cache by Denning's working-set function of
the same routing, and max(their reads, arithmetic) after attention and router.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from argosy import Engine, SamplingParams, _native
from argosy.checkpoint.files import ExpertMatrix, ExpertRecord, ModelFiles
from argosy.checkpoint.formats import PANEL_ROWS, matrix_bytes, round_up
from argosy.checkpoint.geometry import (
    count_parameters,
    dense_shapes,
    expert_shapes,
    packed_config,
    packed_format,
)
from argosy.checkpoint.landing import MatrixRef, Piece
from argosy.checkpoint.manifest import MATRIX_ALIGNMENT
from argosy.config import Format, ModelConfig, format_bytes, parse_size
from argosy.model.families import FAMILIES
from argosy.open import engine as engine_module
from cgroup import NoMemoryCap, run_capped
from common import Report, Sample, drop_page_cache, look_at_drive, print_parts, print_plan, run_inside
from engines import MODELS
from random_weights import DOCUMENT_TOKENS, Exact, Normal, RandomWeights, document, num_continued
from routing import overlap

Bytes = NDArray[np.uint8]

DENSE_FILE, EXPERTS_FILE, MADE_FILE = "dense.bin", "experts.bin", "made.json"
PAGE = 4096
# Rows of quantized noise.
POOL_ROWS = 1024
# Rows of the embedding and the head that are made and quantized at once.
STRIPE_ROWS = 16_384
PROMPT_TOKENS = 8
LAYER_SHARE = 0.5  # a layer's output is scaled by this, over the root of the number of layers
SPREAD = 7919  # a prime: neighbours in the router's order are not adjacent in the file
WAITING = "waiting_for_reads"


def raw_config(*, short: bool) -> dict[str, Any]:
    """Kimi-K2's config.json, or a small model of the same family."""
    sizes = {
        "vocab_size": 163_840,
        "hidden_size": 7168,
        "intermediate_size": 18_432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "n_routed_experts": 384,
        "num_experts_per_tok": 8,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    }
    if short:
        sizes |= {
            "vocab_size": 16_384,
            "hidden_size": 768,
            "intermediate_size": 1024,
            "moe_intermediate_size": 256,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "n_routed_experts": 64,
            "q_lora_rank": 256,
        }
    return sizes | {
        "model_type": "kimi_k2",
        "architectures": ["DeepseekV3ForCausalLM"],
        "attention_bias": False,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "max_position_embeddings": 131_072,
        "moe_layer_freq": 1,
        "n_group": 1,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {
            "beta_fast": 1.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 50_000.0,
        "routed_scaling_factor": 2.827,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
    }


# ── the checkpoint ──────────────────────────────────────────────────────────────────────────────────────────────────


def _quantised(format: Format, weights: NDArray[np.float32]) -> Bytes:
    """Quantize [rows, cols] to a slot format. int4 is q4 with bfloat16 scales."""
    rows, cols = weights.shape
    if format != "int4":
        out = np.empty(matrix_bytes(format, rows, cols), np.uint8)
        _native.quantize(format, np.ascontiguousarray(weights), out)
        return out
    panels = _quantised("q4", weights).reshape(-(-rows // 16), -1).copy()
    groups = -(-cols // 32)
    scales = panels[:, groups * 256 : groups * (256 + 32)]
    exact = scales.copy().view(np.float16).astype(np.float32)
    scales[:] = (exact.view(np.uint32) >> 16).astype(np.uint16).reshape(len(panels), -1).view(np.uint8)
    return panels.reshape(-1)


class Noise:
    """Quantized noise: panels from a pool for each format, width and deviation, drawn again for each matrix.

    The same matrix in every layer would add the same to the hidden state every time, and drown out the token in it.
    """

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._pools: dict[tuple[Format, int, float], Bytes] = {}

    def matrix(self, format: Format, recipe: Normal) -> Bytes:
        """[rows, cols] in a slot format; `silent_rows` are zeros."""
        rows, cols = recipe.shape
        silent = min(recipe.silent_rows, rows)
        parts = [self._rows(format, silent, cols, 0.0)] if silent else []
        parts.append(self._rows(format, rows - silent, cols, recipe.deviation))
        return np.concatenate(parts)

    def _rows(self, format: Format, rows: int, cols: int, deviation: float) -> Bytes:
        key = (format, cols, deviation)
        if key not in self._pools:
            values = self._random.standard_normal((POOL_ROWS, cols), np.float32) * np.float32(deviation)
            self._pools[key] = _quantised(format, values).reshape(POOL_ROWS // PANEL_ROWS, -1)
        pool = self._pools[key]
        return pool[self._random.integers(len(pool), size=-(-rows // PANEL_ROWS))].reshape(-1)


@dataclass(frozen=True)
class Trillion:
    """The layout of the files in a directory."""

    directory: Path
    config: ModelConfig
    num_records: int

    @property
    def _matrices(self) -> list[tuple[int, int, int]]:
        """(offset in a record, rows, cols) for gate, up and down."""
        placed, end = [], 0
        for rows, cols in expert_shapes(self.config, self.config.moe_layers[0]):
            placed.append((end, rows, cols))
            end += round_up(matrix_bytes("int4", rows, cols), MATRIX_ALIGNMENT)
        return placed

    @property
    def record_bytes(self) -> int:
        offset, rows, cols = self._matrices[-1]
        return round_up(offset + matrix_bytes("int4", rows, cols), PAGE)

    def files(self) -> ModelFiles:
        """The model as the engine opens it."""
        made = json.loads((self.directory / MADE_FILE).read_text())
        dense, end = {}, 0
        for name, shape in dense_shapes(self.config):
            rows, cols = shape if len(shape) == 2 else (1, shape[0])
            format = packed_format(name, "q4", self.config)
            nbytes = matrix_bytes(format, rows, cols)
            path = self.directory / DENSE_FILE
            dense[name] = MatrixRef(name, path, end, nbytes, format, rows, cols)
            end += -(-nbytes // PAGE) * PAGE
        gate, up, down = (ExpertMatrix(0, *place) for place in self._places())
        path, experts = self.directory / EXPERTS_FILE, {}
        for number, layer in enumerate(self.config.moe_layers):
            for expert in range(self.config.num_experts):
                record = (number * self.config.num_experts + expert) * SPREAD % self.num_records
                piece = Piece(path, record * self.record_bytes, self.record_bytes, made["checksums"][record])
                experts[layer, expert] = ExpertRecord((piece,), gate, up, down)
        return ModelFiles(self.directory, self.config, dense, experts)

    def _places(self) -> list[tuple[int, Format, int, int]]:
        return [(offset, "int4", rows, cols) for offset, rows, cols in self._matrices]

    def make(self) -> None:
        """Write the files, unless they exist."""
        wanted = {
            "records": self.num_records,
            "record_bytes": self.record_bytes,
            "layers": self.config.num_layers,
            "layer_share": LAYER_SHARE,
            "panels": "drawn",
            "kv_up": "in two",
        }
        made = self.directory / MADE_FILE
        if made.exists() and json.loads(made.read_text())["made"] == wanted:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        made.unlink(missing_ok=True)
        noise = Noise(seed=1)
        with (self.directory / DENSE_FILE).open("wb") as file:
            self._write_dense(noise, file.write)
        checksums = []
        with (self.directory / EXPERTS_FILE).open("wb") as file:
            recipe_of = self._recipes()
            recipes = [recipe_of(f"expert.{part}") for part in ("gate", "up", "down")]
            record = np.zeros(self.record_bytes, np.uint8)
            for _ in range(self.num_records):
                for (offset, format, _, _), recipe in zip(self._places(), recipes, strict=True):
                    assert isinstance(recipe, Normal)
                    data = noise.matrix(format, recipe)
                    record[offset : offset + len(data)] = data
                checksums.append(int(_native.crc32c_wide(record)))
                file.write(record)  # type: ignore[arg-type]
        made.write_text(json.dumps({"made": wanted, "checksums": checksums}))

    def _recipes(self) -> Callable[[str], Normal | Exact]:
        """The recipe of each tensor. Layers write little, so that the head still sees the token at this depth."""
        weights = RandomWeights(self.config, routing="recorded")

        def recipe(name: str) -> Normal | Exact:
            found = weights[name]
            if isinstance(found, Normal) and name.rpartition(".")[2] in ("o", "down", "shared_down"):
                return replace(
                    found, deviation=found.deviation * LAYER_SHARE / math.sqrt(self.config.num_layers)
                )
            return found

        return recipe

    def _write_dense(self, noise: Noise, write: Callable[[Any], object]) -> None:
        recipe_of = self._recipes()
        for name, shape in dense_shapes(self.config):
            recipe, format = recipe_of(name), packed_format(name, "q4", self.config)
            if isinstance(recipe, Normal) and format != "f32":
                parts = [noise.matrix(format, recipe)]
            else:
                values = (
                    recipe.read()
                    if isinstance(recipe, Exact)
                    else np.random.default_rng(2).standard_normal(shape, np.float32)
                    * np.float32(recipe.deviation)
                )
                values = values.reshape(-1, shape[-1])
                stripes = range(0, len(values), STRIPE_ROWS)
                parts = [
                    np.ascontiguousarray(values[i : i + STRIPE_ROWS]).view(np.uint8).reshape(-1)
                    if format == "f32"
                    else _quantised(format, values[i : i + STRIPE_ROWS])
                    for i in stripes
                ]
            nbytes = sum(len(part) for part in parts)
            for part in parts:
                write(part)
            write(bytes(-nbytes % PAGE))


# ── the run ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def inside(trillion: Trillion, options: argparse.Namespace) -> None:
    """Run in the cgroup: decode two documents, and print the cost as JSON."""
    engine_module.open_files = lambda path, mmproj=None: trillion.files()  # type: ignore[misc]
    answers, tokens, parts = [], [], dict[str, float]()
    first_s, start = 0.0, time.perf_counter()
    with Engine.open(
        trillion.directory,
        memory=options.memory,
        threads=options.threads,
        context=PROMPT_TOKENS + options.new + 16,
        max_sequences=1,
        kv_dtype="f16",
    ) as engine:
        open_s = time.perf_counter() - start
        for number in (0, 1):
            start = time.perf_counter()
            sequence = engine.submit(
                document(number, PROMPT_TOKENS, vocab=trillion.config.vocab_size),
                SamplingParams(max_tokens=options.new + 1, ignore_eos=True),
            )
            while not engine.step():
                pass
            first_s = first_s or time.perf_counter() - start
            while sequence.result is None:
                before = engine.ledger
                engine.step()
                after = engine.ledger
                if number == 0:
                    continue  # only fills the cache
                tokens.append(
                    {
                        "seconds": after.wall_s - before.wall_s,
                        "bytes_read": after.bytes_read - before.bytes_read,
                        "hits": after.hits - before.hits,
                        "lookups": after.lookups - before.lookups,
                    }
                )
                for part, total in after.parts.items():
                    parts[part] = parts.get(part, 0.0) + total - before.parts[part]
            answers.append(sequence.result.token_ids)
        print(
            json.dumps(
                {
                    "answers": answers,
                    "tokens": tokens,
                    "parts": parts,
                    "open_s": open_s,
                    "first_s": first_s,  # with an empty cache
                    "plan": engine.plan.lines(),
                    "budget_bytes": engine.plan.budget_bytes,
                    "slots": engine.plan.slots.own,
                    "kv_bytes_per_token": engine.plan.kv_bytes // engine.plan.context_tokens,
                }
            )
        )


def predicted_hit_rate(choices: NDArray[np.int64], slots: int) -> float:
    """Hit rate of one LRU order over all layers, from the routing's working-set function (Denning, 1968).

    W(T) = distinct experts of T tokens, summed over layers; with W(T) = slots, 1 - (W(T + 1) - W(T)) / (layers * k).
    """
    layers, num_tokens, k = choices.shape

    def working_set(window: int) -> float:
        starts = range(0, num_tokens - window + 1)
        return sum(
            statistics.fmean(len(np.unique(layer[start : start + window])) for start in starts)
            for layer in choices
        )

    smaller, window = 0.0, 0
    for window in range(1, num_tokens):
        larger = working_set(window)
        if larger >= slots:
            # The curve is taken as straight between two whole windows.
            return 0.0 if window == 1 else 1 - (larger - smaller) / (layers * k)
        smaller = larger
    return float(1 - (working_set(num_tokens) - smaller) / (layers * k))


def report_run(
    report: Report, trillion: Trillion, found: Mapping[str, Any], sample: Sample, drive: float
) -> None:
    """Report the measured figures beside the predicted ones."""
    config, tokens = trillion.config, found["tokens"]
    count, parts = len(tokens), found["parts"]
    token_s = statistics.median(token["seconds"] for token in tokens)
    read_bytes = statistics.fmean(token["bytes_read"] for token in tokens)
    hit = sum(token["hits"] for token in tokens) / sum(token["lookups"] for token in tokens)
    before_s = (parts["router"] + parts["attention_and_dense"]) / count
    compute_s = before_s + parts["expert_compute"] / count
    reading_s = read_bytes / 1e9 / drive
    facts = {"slots": found["slots"], "record_bytes": trillion.record_bytes}
    sample.values |= {"tok/s": 1 / token_s, "GB": read_bytes / 1e9, "hit": hit, "drive": drive}
    report.figure("decode", "tok/s", [sample], "tok/s", **facts)
    report.figure("reads", "GB/token", [sample], "GB", **facts)
    report.figure("hit rate", "", [sample], "hit", **facts)
    report.figure("drive", "GB/s", [sample], "drive", **facts)
    report.line(
        "roofline",
        f"a token takes {token_s:.2f} s; its reads {reading_s:.2f} s at {drive:.2f} GB/s; attention, router and"
        f" what every token needs {before_s:.2f} s, its experts {parts['expert_compute'] / count:.2f} s",
    )
    report.shares(
        "overlap: max(compute, reads) over a token",
        [max(compute_s, reading_s) / token_s],
        target=">= 0.85",
        **facts,
    )
    choices = RandomWeights(config, routing="recorded").chosen(
        np.array(document(0, 2 * DOCUMENT_TOKENS // 8, vocab=config.vocab_size))
    )
    guess = predicted_hit_rate(choices, found["slots"])
    missed = (1 - guess) * config.experts_per_token * len(config.moe_layers) * trillion.record_bytes
    expert_s = parts["expert_compute"] / count
    guess_s = before_s + max(expert_s, missed / 1e9 / drive)
    report.line(
        "predicted",
        f"hit rate {guess:.2f}, {missed / 1e9:.2f} GB a token, {1 / guess_s:.3f} tok/s (LRU of {found['slots']} slots;"
        f" next-token overlap of this routing {overlap(choices, 1):.2f})",
    )
    print_parts({part: seconds / count for part, seconds in parts.items()}, sum(parts.values()) / count)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--directory", type=Path, default=MODELS / "trillion")
    parser.add_argument("--memory", default="16GiB")
    parser.add_argument("--experts-gib", type=float, default=30.0)
    parser.add_argument("--new", type=int, default=16, help="tokens of an answer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--short", action="store_true", help="a small model of the same family")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.short:
        options.directory, options.experts_gib = options.directory.with_name("trillion-short"), 0.06
        options.memory = "180MiB"
    raw = raw_config(short=options.short)
    config = packed_config(FAMILIES[raw["model_type"]].parse_config(raw))
    trillion = Trillion(options.directory, config, 1)
    trillion = Trillion(options.directory, config, int(options.experts_gib * 2**30) // trillion.record_bytes)
    if options.inside:
        inside(trillion, options)
        return 0

    report = Report("trillion", state="page cache dropped; experts cached by one answer")
    report.opening()
    everything, active = count_parameters(config)
    num_experts = len(config.moe_layers) * config.num_experts
    report.line(
        "model",
        f"{everything / 1e9:.1f} B parameters, {active / 1e9:.1f} B for a token; {num_experts} experts of"
        f" {format_bytes(trillion.record_bytes)}, {format_bytes(num_experts * trillion.record_bytes)} in all",
    )
    report.line(
        "bytes",
        f"{trillion.num_records} expert records exist, and {num_experts / trillion.num_records:.1f} logical experts"
        " share each; the cache keys on the logical expert and reads pass the page cache: nothing is won",
    )
    trillion.make()
    for path in options.directory.iterdir():
        drop_page_cache(path)
    memory = parse_size(options.memory)
    command = ["--inside", "--directory", options.directory, "--memory", f"{memory}B", "--new", options.new]
    command += ["--threads", options.threads, "--experts-gib", options.experts_gib]
    experts = options.directory / EXPERTS_FILE
    looks = look_at_drive(experts)
    try:
        with Sample() as sample:
            run = run_capped(
                run_inside("trillion.py", [*command, *(["--short"] if options.short else [])]),
                limit_bytes=memory,
                timeout_s=1800,
            )
    except NoMemoryCap as reason:
        print(f"skipped: {reason}", file=sys.stderr)
        return 0
    if run.returncode:
        raise SystemExit(
            f"the run in {format_bytes(memory)} ended with {run.returncode}, {run.num_oom_kills} killed for memory:\n"
            f"{run.stderr[-2000:]}"
        )
    looks += look_at_drive(experts)
    found = json.loads(run.stdout)
    right = asked = 0
    for number, answer in enumerate(found["answers"]):
        right += num_continued(number, PROMPT_TOKENS, answer, vocab=config.vocab_size)
        asked += len(answer)
    if right != asked:
        raise SystemExit(f"{right} of {asked} tokens continue their documents")
    report.correct(f"{right} of {asked} tokens continue their documents")
    print_plan(report, found["plan"], found["budget_bytes"])
    report.line("KV cache", f"{found['kv_bytes_per_token'] / 1000:.1f} KB a token")
    report_run(report, trillion, found, sample, statistics.median(looks))
    report.ratio("peak over budget", run.peak_bytes, memory, target="<= 1.0")
    report.neighbours([sample])
    return 0


if __name__ == "__main__":
    sys.exit(main())
