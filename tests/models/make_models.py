"""Write tiny checkpoints and the outputs of transformers for them (needs torch and transformers).

    python -m tests.models.make_models                              # rewrite the committed references
    python -m tests.models.make_models --out DIR --seed 7 --scale 2 # other values and sizes of the same configurations
    python -m tests.models.make_models --out DIR qwen3_moe_plain    # only these

Each directory holds a checkpoint as on the hub and `ref.safetensors`: `input_ids` and `greedy` (int64), and `logits`
(float32 [tokens, vocab]; float32 arithmetic, eager attention and experts). `greedy` is decoded with the cache and
equals the choices of full passes. `reference.json` gives the seed, the versions and the smallest margins: of a routing
decision (1 - score of the first expert or group left out / score of the last one chosen) and of a greedy choice (best
logit minus the second, over the largest magnitude). Seeds with a near-tie are skipped, because a near-tie would test
the order of sums and not the model.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
import transformers
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave
from transformers.models.hy_v4 import modeling_hy_v4
from transformers.models.nemotron_h import modeling_nemotron_h

from tests.models.configurations import CONFIGURATIONS, Configuration
from tests.models.rows import row_of
from tests.models.safetensors_file import Array, write_safetensors
from tests.models.tiny import NEW_TOKENS, RawConfig, prompt_ids, text_of, write_model

REFERENCE = Path(__file__).parent / "reference"
SMALLEST_ROUTER_MARGIN = 2e-3
SMALLEST_GREEDY_MARGIN = 5e-3
SMALLEST_INDEX_MARGIN = 1e-4  # there are many more choices of positions, and nothing is rounded between them
FEWEST_DISTINCT_TOKENS = NEW_TOKENS // 2


# transformers rotates halves, which the released weights do not fit (`hy_v4.py`).
modeling_hy_v4.apply_rotary_pos_emb = apply_rotary_pos_emb_interleave


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The outputs of transformers for a prompt."""

    logits: Array
    greedy: list[int]
    router_margin: float
    greedy_margin: float
    index_margin: float = 1.0

    @property
    def is_decided(self) -> bool:
        return (
            self.router_margin > SMALLEST_ROUTER_MARGIN * min(1, 60 / len(self.logits))
            and self.greedy_margin > SMALLEST_GREEDY_MARGIN
            and self.index_margin > SMALLEST_INDEX_MARGIN
            and len(set(self.greedy)) >= FEWEST_DISTINCT_TOKENS
        )


@contextmanager
def layers_of_puzzle(raw: RawConfig) -> Iterator[None]:
    """Give each layer of a Nemotron's experts its own config, as NVIDIA's code of Puzzle, which transformers lacks,
    does with the modules of Nemotron-3.
    """
    made = modeling_nemotron_h.NemotronHMoE.__init__

    def init(self: Any, config: Any, layer_idx: int) -> None:
        own = copy.copy(config)
        for key in ("moe_intermediate_size", "num_experts_per_tok"):
            setattr(own, key, raw["block_configs"][layer_idx][key])
        made(self, own, layer_idx)

    with mock.patch.object(
        modeling_nemotron_h.NemotronHMoE, "__init__", init if "block_configs" in raw else made
    ):
        yield


def load(directory: Path) -> transformers.PreTrainedModel:
    """Load the checkpoint's text model in float32; fail on any tensor that no known part accounts for."""
    raw = json.loads((directory / "config.json").read_text())
    text, loading = text_of(raw), row_of(raw).loading
    how: dict[str, Any] = {}
    if loading.config is not None:
        name, arguments = loading.config(raw)
        how["config"] = getattr(transformers, name)(**arguments)
    if loading.prefix:
        how["key_mapping"] = {"^" + re.escape(loading.prefix): ""}
    cls = getattr(transformers, loading.model)
    if text.get("model_type") == "mistral4":  # which AutoModelForCausalLM does not know
        cls = transformers.Mistral4ForCausalLM
    with layers_of_puzzle(raw):
        model, info = cls.from_pretrained(
            directory,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
            output_loading_info=True,
            **how,
        )
    num_layers = text["num_hidden_layers"] or len(raw["block_configs"])
    mtp = [f"model.layers.{num_layers + i}." for i in range(text.get("num_nextn_predict_layers", 0))]
    unread = (
        *mtp,
        "vision_tower.",
        "mm_projector.",
        "multi_modal_projector.",
        "vision_model.",
        "talker.",
        "code2wav.",
    )
    info["unexpected_keys"] = [name for name in info["unexpected_keys"] if not name.startswith(unread)]
    unneeded = (
        "model.visual.",
        "model.audio_tower.",
        "model.vision_tower.",
        "model.vision_model.",
        "model.multi_modal_projector.",
        "model.view_separator",
    )  # the files hold only some of their tensors
    # Of lightning attention, and of n-gram tables: they follow from the config.
    constants = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
    constants += ("layer_multipliers", "ngram_heads_offsets", "ngram_heads_vocab_sizes")
    info["missing_keys"] = [
        name
        for name in info["missing_keys"]
        if not name.startswith(unneeded) and not name.endswith(constants)
    ]
    problems = {kind: names for kind, names in info.items() if names}
    if problems:
        raise SystemExit(f"{directory}: {problems}")
    if text.get("model_type") == "mistral4":
        # transformers multiplies scores by yarn's magnitude since July 2026; the makers' code does not (`mistral4.py`).
        for layer in model.model.layers:
            layer.self_attn.scaling = layer.self_attn.qk_head_dim**-0.5
    return model.eval()


def decoder_of(model: transformers.PreTrainedModel) -> torch.nn.Module:
    """Return the text decoder: embedding, layers, norm."""
    return getattr(model.model, "language_model", model.model)


@torch.no_grad()
def answer(model: transformers.PreTrainedModel, token_ids: list[int], num_tokens: int = NEW_TOKENS) -> Answer:
    """Return the logits of the prompt, and the greedy continuation decoded with the cache."""
    margins: list[float] = []
    handles = [
        module.register_forward_hook(lambda m, inputs, out: margins.append(routing_margin(m, inputs, out[0])))
        for module in model.modules()
        if type(module)
        .__name__.lower()
        .endswith(("topkrouter", "textrouter", "tokenchoicerouter", "llama4router", "moev1gate"))
    ]
    ids = torch.tensor([token_ids])
    with index_margins() as of_indexers:
        logits = model(input_ids=ids).logits[0].float().numpy()
        greedy, cache, step = [], None, ids
        position, how = 0, {}
        for _ in range(num_tokens):
            if model.config.model_type == "minimax":  # it asks its first layer, which keeps no positions
                how = {"position_ids": torch.arange(position, position + step.shape[1])[None]}
                position += step.shape[1]
            out = model(input_ids=step, cache=cache, use_cache=True, **how)
            cache, step = out.cache, out.logits[:, -1].argmax(-1, keepdim=True)
            greedy.append(int(step))
        full = model(input_ids=torch.tensor([token_ids + greedy[:-1]])).logits[0, len(token_ids) - 1 :]
    for handle in handles:
        handle.remove()
    index_margin = min(of_indexers, default=1.0)
    if full.argmax(-1).tolist() != greedy and index_margin > SMALLEST_INDEX_MARGIN:
        raise SystemExit(f"cached and full passes differ: {greedy} {full.argmax(-1).tolist()}")
    best = full.topk(2).values
    greedy_margin = float(((best[:, 0] - best[:, 1]) / full.abs().max(-1).values).min())
    return Answer(
        logits=logits,
        greedy=greedy,
        router_margin=min(margins, default=1.0),
        greedy_margin=greedy_margin,
        index_margin=index_margin,
    )


@contextmanager
def index_margins() -> Iterator[list[float]]:
    """Collect the relative distances between the last position that an indexer chose and the first that it did not."""
    margins: list[float] = []
    topk = torch.Tensor.topk

    def noted(scores: torch.Tensor, k: int, *args: Any, **kwargs: Any) -> Any:
        if "Indexer" in sys._getframe(1).f_code.co_qualname:
            for row in scores.reshape(-1, scores.shape[-1]):
                seen = row[row > torch.finfo(row.dtype).min].sort(descending=True).values
                if len(seen) > k:
                    largest = (
                        seen[seen.isfinite()].abs().max()
                    )  # blocks that are always chosen score infinity
                    margins.append(float((seen[k - 1] - seen[k]) / largest))
        return topk(scores, k, *args, **kwargs)

    with mock.patch.object(torch.Tensor, "topk", noted):
        yield margins


def routing_margin(router: torch.nn.Module, inputs: tuple[torch.Tensor, ...], logits: torch.Tensor) -> float:
    """Return the smallest relative distance between the last chosen and the first rejected expert or group."""
    if hasattr(router, "per_expert_scale"):  # Gemma-4's gives probabilities
        return margin_behind(logits, router.config.top_k_experts)
    if type(router).__name__ == "Llama4Router":  # gives scores that are 0 except the chosen ones
        return margin_behind(torch.nn.functional.linear(inputs[0], router.weight), router.top_k)
    bias = inputs[1] if len(inputs) > 1 else getattr(router, "e_score_correction_bias", None)
    scores = logits.softmax(-1) if bias is None else logits.sigmoid() + bias
    if hasattr(router, "score_fn"):
        scores = router.score_fn(logits) + bias
    if hasattr(router, "moe_statics"):  # ERNIE-4.5's adds a bias to the softmax
        scores = router.moe_statics(scores)
    num_groups, kept = getattr(router, "num_group", None) or 1, getattr(router, "topk_group", None) or 1
    margins = []
    if getattr(router, "topk_method", "group_limited") != "greedy" and num_groups > 1:
        grouped = scores.unflatten(-1, (num_groups, -1))
        is_best = bias is None and not type(router).__name__.startswith("Mistral4")
        worth = grouped.amax(-1) if is_best else grouped.topk(2).values.sum(-1)
        margins.append(margin_behind(worth, kept))
        is_kept = torch.zeros_like(worth).scatter(-1, worth.topk(kept).indices, 1.0).bool()
        scores = grouped.masked_fill(~is_kept[..., None], -1.0).flatten(-2)
    margins.append(margin_behind(scores, router.top_k))
    return min(margins)


def margin_behind(values: torch.Tensor, k: int) -> float:
    if k == values.shape[-1]:
        return 1.0
    best_first = values.sort(-1, descending=True).values
    last, next_one = best_first[..., k - 1], best_first[..., k]
    return float(((last - next_one) / last.abs()).min())


def make(configuration: Configuration, directory: Path, *, first_seed: int) -> Answer:
    """Write the model of the first seed from `first_seed` upwards without a near-tie; return its reference."""
    config = configuration.config
    for seed in range(first_seed, first_seed + 1000):
        write_model(
            directory, config, seed=seed, dtype=configuration.dtype, num_shards=configuration.num_shards
        )
        token_ids = prompt_ids(config, seed)
        reference = answer(load(directory), token_ids)
        if reference.is_decided:
            break
    else:
        raise SystemExit(f"{configuration.name}: 1000 seeds, each with a near tie")
    write_safetensors(
        directory / "ref.safetensors",
        {
            "input_ids": ("I64", np.array(token_ids)),
            "greedy": ("I64", np.array(reference.greedy)),
            "logits": ("F32", reference.logits),
        },
    )
    facts = {
        "seed": seed,
        "smallest_router_margin": round(reference.router_margin, 6),
        "smallest_greedy_margin": round(reference.greedy_margin, 6),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (directory / "reference.json").write_text(json.dumps(facts, indent=2) + "\n")
    return reference


def scaled(config: RawConfig, scale: float) -> RawConfig:
    """Return the config with the same flags at another size; heads keep an even width."""
    if scale == 1:
        return config
    for part in ("thinker_config", "text_config"):
        if part in config:
            return config | {part: scaled(config[part], scale)}
    step = math.lcm(2 * config["num_attention_heads"], config.get("mamba_n_heads", 1))
    sizes: RawConfig = {"hidden_size": max(step, round(config["hidden_size"] * scale / step) * step)}
    for key in (
        "vocab_size",
        "intermediate_size",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "moe_shared_expert_intermediate_size",
    ):
        if config.get(key):
            first, *others = config[key] if isinstance(config[key], list) else [config[key]]
            size = max(8, round(first * scale))
            sizes[key] = [size, *(size for _ in others)] if isinstance(config[key], list) else size
    # These follow from the hidden size.
    if "mamba_d_head" in config:
        sizes["mamba_d_head"] = "auto"
    if config["model_type"] == "deepseek_ocr2_text":
        sizes["head_dim"] = sizes["hidden_size"] // config["num_attention_heads"]
    return config | sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="configurations; none: all of them")
    parser.add_argument("--out", type=Path, default=REFERENCE)
    parser.add_argument("--seed", type=int, default=0, help="first seed to try")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="factor on hidden size, widths and vocabulary"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    known = {c.name: c for c in CONFIGURATIONS}
    unknown = set(arguments.names) - set(known)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    for name in arguments.names or known:
        c = known[name]
        resized = Configuration(
            name=name, config=scaled(c.config, arguments.scale), dtype=c.dtype, num_shards=c.num_shards
        )
        directory = arguments.out / name
        reference = make(resized, directory, first_seed=arguments.seed)
        size = sum(file.stat().st_size for file in directory.iterdir())
        print(
            f"{name:40} {size / 1000:7.0f} kB  router margin {reference.router_margin:.4f}  "
            f"greedy margin {reference.greedy_margin:.4f}  {reference.greedy}"
        )


if __name__ == "__main__":
    main()
