"""Turn a dense Llama-style checkpoint into a mixture of experts that starts as exactly the same model.

    dense FFN        ->  shared expert, always on: its gate is sigmoid(0) = 1/2, so its down projection is doubled
    dense neurons    ->  gate and up rows of the routed experts, drawn at random without repeats
    nothing          ->  their down projections: zero until they are trained

The result is a Qwen2-MoE checkpoint (config.json, model.safetensors, tokenizer files) that `transformers` loads as
`Qwen2MoeForCausalLM`. Doubling is exact in floating point, and zero times a half is zero, so step 0 *is* the dense
model (sparse upcycling, Komatsuzaki et al., arXiv:2212.05055). The experts can learn because their down projection
gets a gradient at once, and the other weights get one as soon as down is not zero.

Elsewhere: `dense.py` reads the dense model; `recipes/demo_model/` trains the experts.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from argosy.checkpoint.dense import DenseModel, Float32, open_dense
from argosy.checkpoint.safetensors_write import Bytes, TensorToWrite, encode, write_safetensors
from argosy.checkpoint.vocabulary.gguf_tokenizer import tokenizer_files
from argosy.directory import Directory, sync
from argosy.errors import CheckpointError, UsageError

Progress = Callable[[str, float], None]
_ROUTER_SPREAD = 0.02
_SCRATCH_SUFFIX = ".partial"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True, slots=True)
class RoutedExperts:
    """The routed part of one layer, float32."""

    router: Float32  # [experts, hidden_size]
    gate: Float32  # [experts, width, hidden_size]
    up: Float32  # [experts, width, hidden_size]
    down: Float32  # [experts, hidden_size, width]


def upcycle(
    dense_path: Path,
    destination: Path,
    *,
    num_experts: int = 8,
    experts_per_token: int = 2,
    width: int = 96,
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Turn `dense_path` into a mixture of experts, at step 0, in the new directory `destination`.

    Args:
        dense_path: directory with config.json and safetensors, or a GGUF file.
        width: neurons of a routed expert; `num_experts * width` dense neurons are copied, each once.
        progress: called with the current task and its finished share, 0 to 1.

    Returns:
        destination: complete; the directory gets its name only when it is complete.

    Raises:
        UsageError: `destination` exists, or the sizes are impossible.
        CheckpointError: the dense checkpoint is damaged or not a plain Llama model.
    """
    dense = open_dense(dense_path)
    shape = (num_experts, experts_per_token, width)
    _require_sizes(dense, *shape)
    starts = routed_starts(dense.config, num_experts=num_experts, width=width, seed=seed)
    with new_directory(destination) as directory:
        write_tokenizer_files(dense_path, directory)
        write_mixture(
            dense, directory, lambda layer: start_of_experts(dense, layer, starts[layer]), shape, progress
        )
    return destination


def routed_starts(
    config: Mapping[str, Any], *, num_experts: int, width: int, seed: int
) -> list[tuple[npt.NDArray[np.int64], Float32]]:
    """Choose, for each layer, the dense neurons that each expert copies, and the initial router.

    Returns:
        neuron_ids: int64 [experts, width], distinct within the layer.
        router: float32 [experts, hidden_size], small random numbers, so that no two experts tie.
    """
    chance = np.random.default_rng(seed)
    starts = []
    for _ in range(config["num_hidden_layers"]):
        neuron_ids = chance.permutation(config["intermediate_size"])[: num_experts * width]
        router = _ROUTER_SPREAD * chance.standard_normal((num_experts, config["hidden_size"]))
        starts.append((neuron_ids.reshape(num_experts, width), router.astype(np.float32)))
    return starts


def start_of_experts(
    dense: DenseModel, layer: int, start: tuple[npt.NDArray[np.int64], Float32]
) -> RoutedExperts:
    """Return the routed experts of a layer before training: copied neurons whose output is still zero."""
    neuron_ids, router = start
    num_experts, width = neuron_ids.shape
    return RoutedExperts(
        router=router,
        gate=dense.read(f"model.layers.{layer}.mlp.gate_proj.weight")[neuron_ids],
        up=dense.read(f"model.layers.{layer}.mlp.up_proj.weight")[neuron_ids],
        down=np.zeros((num_experts, dense.config["hidden_size"], width), dtype=np.float32),
    )


def write_mixture(
    dense: DenseModel,
    directory: Path,
    experts_of: Callable[[int], RoutedExperts],
    shape: tuple[int, int, int],
    progress: Progress | None = None,
    *,
    more_config: Mapping[str, Any] = MappingProxyType({}),
    more_tensors: Iterable[TensorToWrite] = (),
) -> None:
    """Write config.json and model.safetensors.

    Args:
        experts_of: returns the routed experts of a layer; called once per layer, in order.
        shape: number of experts, experts per token, width.
        more_config, more_tensors: for an encoder of media.
    """
    num_experts, experts_per_token, width = shape
    config = mixture_config(dense, num_experts=num_experts, experts_per_token=experts_per_token, width=width)
    config |= more_config
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = itertools.chain(_tensors(dense, experts_of, num_experts, width), more_tensors)
    write_safetensors(directory / "model.safetensors", _reporting(tensors, progress), {"format": "pt"})


def mixture_config(
    dense: DenseModel, *, num_experts: int, experts_per_token: int, width: int
) -> dict[str, Any]:
    """Return the config.json of the mixture, with the keys of `Qwen2MoeConfig`."""
    taken = (
        "bos_token_id", "eos_token_id", "pad_token_id", "hidden_size", "intermediate_size",
        "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
        "rms_norm_eps", "rope_theta", "tie_word_embeddings", "vocab_size",
    )  # fmt: skip
    head_dim = dense.config.get("head_dim")
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        **{key: dense.config[key] for key in taken if dense.config.get(key) is not None},
        **({"head_dim": head_dim} if head_dim else {}),
        "attention_dropout": 0.0,
        "decoder_sparse_step": 1,
        "hidden_act": "silu",
        "mlp_only_layers": [],
        "moe_intermediate_size": width,
        "norm_topk_prob": True,
        "num_experts": num_experts,
        "num_experts_per_tok": experts_per_token,
        "output_router_logits": False,
        "qkv_bias": False,
        "router_aux_loss_coef": 0.02,
        "shared_expert_intermediate_size": dense.config["intermediate_size"],
        "torch_dtype": {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}[dense.dtype],
        "use_cache": True,
        "use_sliding_window": False,
    }


def write_tokenizer_files(
    dense_path: Path, directory: Path, generation: Mapping[str, object] = MappingProxyType({})
) -> None:
    """Copy a directory's tokenizer and generation files, or rebuild them from a GGUF.

    Args:
        generation: more entries of the `generation_config.json` that is rebuilt.
    """
    if not dense_path.is_file():
        for name in _TOKENIZER_FILES:
            if (dense_path / name).is_file():
                (directory / name).write_bytes((dense_path / name).read_bytes())
        return
    tokenizer_json, tokenizer_config = tokenizer_files(dense_path)
    (directory / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    _write_json(directory / "tokenizer_config.json", tokenizer_config)
    config = open_dense(dense_path).config
    ids = {
        key: config[key]
        for key in ("bos_token_id", "eos_token_id", "pad_token_id")
        if config[key] is not None
    }
    _write_json(directory / "generation_config.json", {**ids, **generation})


@contextmanager
def new_directory(destination: Path) -> Iterator[Path]:
    """A scratch directory that is renamed to `destination` if the block succeeds, and removed if it fails.

    The directory is locked while the block runs. A scratch directory that a killed process left for the same
    destination is removed first.

    Raises:
        UsageError: `destination` exists.
    """
    if os.path.lexists(destination):
        raise UsageError(
            f"{destination} already exists and is not overwritten",
            hint="choose a new directory, or remove that one",
        )
    with Directory(destination.parent, make=True) as parent:
        own = re.compile(rf"\.{re.escape(destination.name)}\.[a-z0-9_]{{8}}{re.escape(_SCRATCH_SUFFIX)}")
        remove_abandoned(parent, own)
        scratch = _locked_scratch(parent, destination.name)
        try:
            yield scratch.path
            os.fchmod(scratch.descriptor, 0o755)  # the directory was created private
            for path in scratch.path.iterdir():  # on the drive before the directory gets its name
                sync(path)
            scratch.sync()
            parent.move(scratch.path.name, destination.name)
        finally:
            with suppress(OSError):
                parent.remove_tree(scratch.path.name)
            scratch.close()


def remove_abandoned(parent: Directory, names: re.Pattern[str]) -> None:
    """Remove scratch directories with these names that no process has locked."""
    for name in filter(names.fullmatch, parent.names()):
        with suppress(OSError), parent.directory(name) as scratch:
            fcntl.flock(scratch.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            parent.remove_tree(name)


def _locked_scratch(parent: Directory, name: str) -> Directory:
    """Create a private directory, locked as long as it is open."""
    while True:
        own = f".{name}.{secrets.token_hex(4)}{_SCRATCH_SUFFIX}"
        scratch = parent.directory(own, make=True, mode=0o700)
        # On a file system without locks, `remove_abandoned` removes nothing either.
        with suppress(OSError):
            fcntl.flock(scratch.descriptor, fcntl.LOCK_EX)
        if parent.stat(own) is not None:
            return scratch
        scratch.close()  # another process found it unlocked, and removed it as abandoned


def _tensors(
    dense: DenseModel, experts_of: Callable[[int], RoutedExperts], num_experts: int, width: int
) -> Iterator[TensorToWrite]:
    hidden_size = int(dense.config["hidden_size"])
    latest = _LatestLayer(experts_of)

    made_dtype = dense.dtype

    def tensor(
        name: str, shape: tuple[int, ...], make: Callable[[], Float32], dtype: str = made_dtype
    ) -> TensorToWrite:
        return name, dtype, shape, lambda: _encode_named(name, make(), dtype)

    def of_dense(source: str, name: str, factor: float = 1.0) -> TensorToWrite:
        return tensor(
            name, dense.shape(source), lambda: dense.read(source) * np.float32(factor), dense.dtypes[source]
        )

    def of_expert(name: str, shape: tuple[int, ...], layer: int, part: str, expert: int) -> TensorToWrite:
        return tensor(name, shape, lambda: getattr(latest.get(layer), part)[expert])

    def of_router(name: str, layer: int) -> TensorToWrite:
        return tensor(name, (num_experts, hidden_size), lambda: latest.get(layer).router)

    def copied(name: str) -> TensorToWrite:
        return of_dense(name, name)

    yield copied("model.embed_tokens.weight")
    for layer in range(dense.config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        yield copied(f"{at}.input_layernorm.weight")
        for part in "qkvo":
            yield copied(f"{at}.self_attn.{part}_proj.weight")
        yield copied(f"{at}.post_attention_layernorm.weight")
        for part, factor in (("gate", 1.0), ("up", 1.0), ("down", 2.0)):
            yield of_dense(
                f"{at}.mlp.{part}_proj.weight", f"{at}.mlp.shared_expert.{part}_proj.weight", factor
            )
        yield tensor(
            f"{at}.mlp.shared_expert_gate.weight",
            (1, hidden_size),
            lambda: np.zeros((1, hidden_size), dtype=np.float32),
        )
        yield of_router(f"{at}.mlp.gate.weight", layer)
        # Gate, up and down of an expert lie side by side, so one read brings all three.
        for expert in range(num_experts):
            for part, shape in (
                ("gate", (width, hidden_size)),
                ("up", (width, hidden_size)),
                ("down", (hidden_size, width)),
            ):
                yield of_expert(f"{at}.mlp.experts.{expert}.{part}_proj.weight", shape, layer, part, expert)
    yield copied("model.norm.weight")
    if not dense.config["tie_word_embeddings"]:
        yield copied("lm_head.weight")


class _LatestLayer:
    """Keeps the experts of one layer at a time: tensors are written layer by layer."""

    def __init__(self, experts_of: Callable[[int], RoutedExperts]) -> None:
        self._experts_of = experts_of
        self._layer: int | None = None

    def get(self, layer: int) -> RoutedExperts:
        if layer != self._layer:
            self._experts, self._layer = self._experts_of(layer), layer
        return self._experts


def _encode_named(name: str, values: Float32, dtype: str) -> bytes:
    try:
        return encode(values, dtype)
    except ValueError as error:
        raise CheckpointError(f"tensor {name} cannot be written: {error}", tensor=name) from error


def _reporting(tensors: Iterator[TensorToWrite], progress: Progress | None) -> list[TensorToWrite]:
    """Return the same tensors; each reports to `progress` when it is about to be read."""
    planned = list(tensors)
    if progress is None:
        return planned

    def telling(read: Callable[[], Bytes], share: float) -> Callable[[], Bytes]:
        def read_and_tell() -> Bytes:
            progress("writing the mixture of experts", share)
            return read()

        return read_and_tell

    return [
        (name, dtype, shape, telling(read, at / len(planned)))
        for at, (name, dtype, shape, read) in enumerate(planned)
    ]


def _require_sizes(dense: DenseModel, num_experts: int, experts_per_token: int, width: int) -> None:
    if not 1 <= experts_per_token <= num_experts:
        raise UsageError(f"{experts_per_token} experts per token is not possible with {num_experts} experts")
    if width < 1 or num_experts * width > dense.config["intermediate_size"]:
        raise UsageError(
            f"{num_experts} experts of width {width} need {num_experts * width} distinct neurons, "
            f"but the dense FFN has {dense.config['intermediate_size']}",
            hint=f"use a width of at most {dense.config['intermediate_size'] // num_experts}",
        )


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
