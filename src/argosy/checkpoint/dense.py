"""Read a dense Llama-style checkpoint, one float32 tensor at a time.

    safetensors directory  or  GGUF file   ->   DenseModel: config + tensors under one set of names

Names and row order are always those of `LlamaForCausalLM`: a GGUF keeps q and k rows in the order of its
rotary kernel (adjacent pairs), so they are put back into halves here. Quantised GGUF blocks are dequantised to
float32; bfloat16 and float16 widen exactly.

Elsewhere: `vocabulary/gguf_tokenizer.py` reads the tokenizer of a GGUF; `upcycle.py` makes a mixture of a dense model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from argosy.checkpoint.gguf import GgufFile, read_gguf
from argosy.checkpoint.landing import in_halves, read_values
from argosy.checkpoint.safetensors import TensorRef, open_tensors
from argosy.checkpoint.untrusted_file import open_regular, quote, read_at, read_object
from argosy.errors import CheckpointError, UnsupportedModel

Float32 = npt.NDArray[np.float32]

_EXACT_DTYPES = ("F32", "F16", "BF16")  # dtypes in which a tensor is stored unchanged

_GGUF_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_MODEL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


@dataclass(frozen=True)
class DenseModel:
    """A dense model: config with the keys of `LlamaConfig`, and tensors by name, read on demand."""

    path: Path
    config: Mapping[str, Any]
    dtypes: Mapping[str, str]  # by tensor: a dtype that holds its values exactly
    readers: Mapping[str, Callable[[], Float32]]

    @property
    def dtype(self) -> str:
        """The dtype of all matrices; F32 if they differ."""
        shapes = expected_shapes(self.config)
        found = {self.dtypes[name] for name, shape in shapes.items() if len(shape) == 2}
        return found.pop() if len(found) == 1 else "F32"

    def rounded_to(self, dtype: str) -> DenseModel:
        """Return the same model, for a copy that stores every tensor in `dtype`, even if it rounds."""
        return replace(self, dtypes=dict.fromkeys(self.dtypes, dtype))

    def read(self, name: str) -> Float32:
        """Return the tensor `name` as float32, rows first. Each call reads it again; nothing is cached."""
        return self.readers[name]()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape that the config gives `name`."""
        return expected_shapes(self.config)[name]


def open_dense(path: Path) -> DenseModel:
    """Open a GGUF file, or a directory of config.json and safetensors.

    Raises:
        CheckpointError: `path` is neither, a tensor is missing, or a tensor has the wrong shape.
        UnsupportedModel: the architecture is another one, or a flag has no counterpart.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist", path=path)
    model = _open_gguf(path) if path.is_file() else _open_safetensors(path)
    for name in expected_shapes(model.config):
        if name not in model.readers:
            raise CheckpointError(f"{path.name}: tensor {name} is missing", path=path, tensor=name)
    return model


def expected_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return every tensor of a dense Llama model with its shape."""
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    num_heads, num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or hidden // num_heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.self_attn.q_proj.weight": (num_heads * head_dim, hidden),
            f"{at}.self_attn.k_proj.weight": (num_kv_heads * head_dim, hidden),
            f"{at}.self_attn.v_proj.weight": (num_kv_heads * head_dim, hidden),
            f"{at}.self_attn.o_proj.weight": (hidden, num_heads * head_dim),
            f"{at}.post_attention_layernorm.weight": (hidden,),
            f"{at}.mlp.gate_proj.weight": (ffn, hidden),
            f"{at}.mlp.up_proj.weight": (ffn, hidden),
            f"{at}.mlp.down_proj.weight": (hidden, ffn),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def _require_shape(
    path: Path, name: str, found: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    if name in shapes and found != shapes[name]:
        raise CheckpointError(
            f"{path.name}: {name} is {list(found)}, expected {list(shapes[name])}", path=path, tensor=name
        )


def _open_gguf(path: Path) -> DenseModel:
    file = read_gguf(path)
    architecture = file.text("general.architecture")
    if architecture != "llama":
        raise UnsupportedModel(
            f"{path.name} has architecture {architecture!r}; supported: llama",
            key="general.architecture",
            value=architecture,
            supported=("llama",),
        )
    num_heads = file.integer("llama.attention.head_count", least=1)
    num_kv_heads = file.integer("llama.attention.head_count_kv", num_heads, least=1)
    hidden_size = file.integer("llama.embedding_length", least=1)
    _require_plain_gguf(file, hidden_size // num_heads)
    embedding = file.tensors.get("token_embd.weight")
    config = {
        "hidden_size": hidden_size,
        "intermediate_size": file.integer("llama.feed_forward_length", least=1),
        "num_hidden_layers": file.integer("llama.block_count", least=1),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "vocab_size": embedding.shape[0] if embedding is not None and embedding.shape else 0,
        "max_position_embeddings": file.integer("llama.context_length", least=1),
        "rms_norm_eps": file.number("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": file.number("llama.rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **{
            f"{name}_token_id": file.metadata.get(f"tokenizer.ggml.{role}_token_id")
            for name, role in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        },
    }
    shapes = expected_shapes(config)
    permuted_heads = {"attn_q": num_heads, "attn_k": num_kv_heads}

    def reader_of(ref: TensorRef, heads: int) -> Callable[[], Float32]:
        return lambda: in_halves(read_values(ref), heads) if heads else read_values(ref)

    readers: dict[str, Callable[[], Float32]] = {}
    dtypes: dict[str, str] = {}
    for gguf_name, ref in file.tensors.items():
        prefix, *rest = gguf_name.split(".")
        if gguf_name in _GGUF_MODEL_NAMES:
            name, part = _GGUF_MODEL_NAMES[gguf_name], ""
        elif prefix == "blk" and len(rest) == 3 and rest[1] in _GGUF_LAYER_NAMES and rest[2] == "weight":
            name, part = f"model.layers.{rest[0]}.{_GGUF_LAYER_NAMES[rest[1]]}.weight", rest[1]
        else:
            raise UnsupportedModel(
                f"{path.name}: tensor {gguf_name} has no place in a plain Llama model",
                key="tensor",
                value=gguf_name,
                supported=tuple(_GGUF_LAYER_NAMES),
            )
        _require_shape(path, name, ref.shape, shapes)
        readers[name] = reader_of(ref, permuted_heads.get(part, 0))
        dtypes[name] = ref.dtype if ref.dtype in _EXACT_DTYPES else "F32"
    return DenseModel(path=path, config=config, dtypes=dtypes, readers=readers)


def _require_plain_gguf(file: GgufFile, head_dim: int) -> None:
    """Refuse keys that change the mathematics of a plain Llama model.

    Raises:
        UnsupportedModel: names the key.
    """
    plain: dict[str, tuple[object, ...]] = {
        "llama.rope.scaling.type": ("none", "linear"),
        "llama.rope.dimension_count": (head_dim,),
        "llama.attention.key_length": (head_dim,),
        "llama.attention.value_length": (head_dim,),
        "llama.expert_count": (0,),
    }
    if file.metadata.get("llama.rope.scaling.type") != "none":
        plain |= dict.fromkeys(("llama.rope.scaling.factor", "llama.rope.scale_linear"), (1, 0))
    for key, supported in plain.items():
        value = file.metadata.get(key, supported[0])
        if value not in supported:
            raise UnsupportedModel(
                f"{file.path.name}: {key} is {quote(value)}; supported: {', '.join(map(str, supported))}",
                key=key,
                value=value,
                supported=supported,
            )


def _open_safetensors(directory: Path) -> DenseModel:
    config: dict[str, Any] = dict(read_object(directory / "config.json"))
    _require_plain_llama(config, directory)
    rope: dict[str, Any] = config.get("rope_parameters") or {}
    config.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
    config.setdefault("rms_norm_eps", 1e-6)
    config.setdefault("tie_word_embeddings", False)
    if config.get("num_key_value_heads") is None:
        config["num_key_value_heads"] = config["num_attention_heads"]
    shapes = expected_shapes(config)
    refs = {name: ref for name, ref in open_tensors(directory).items() if name in shapes}
    for ref in refs.values():
        _require_shape(ref.path, ref.name, ref.shape, shapes)
        if ref.dtype not in _EXACT_DTYPES:
            raise UnsupportedModel(
                f"{ref.path.name}: {ref.name} has dtype {ref.dtype}; supported: {', '.join(_EXACT_DTYPES)}",
                key="dtype",
                value=ref.dtype,
                supported=_EXACT_DTYPES,
            )
    return DenseModel(
        path=directory,
        config=config,
        dtypes={name: ref.dtype for name, ref in refs.items()},
        readers={name: _reader_of(ref) for name, ref in refs.items()},
    )


def _require_plain_llama(config: Mapping[str, Any], directory: Path) -> None:
    def refuse(key: str, value: object, *supported: object) -> UnsupportedModel:
        names = ", ".join(map(repr, supported))
        return UnsupportedModel(
            f"{directory.name}/config.json asks for {key} {value!r}; supported: {names}",
            key=key,
            value=value,
            supported=supported,
        )

    for key, supported in _supported_values():
        if config.get(key, supported[0]) not in supported:
            raise refuse(key, config[key], *supported)
    rope = config.get("rope_parameters") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
        raise refuse("rope_parameters", rope, {"rope_type": "default"})
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        if not isinstance(config.get(key), int):
            raise CheckpointError(
                f"{directory.name}/config.json: {key} is missing or not a whole number", path=directory
            )


def _supported_values() -> Iterator[tuple[str, tuple[object, ...]]]:
    """Return flags that change the mathematics, with their values in a plain Llama model; the first is the default."""
    yield "model_type", ("llama",)
    yield "hidden_act", ("silu",)
    yield "attention_bias", (False, None)
    yield "mlp_bias", (False, None)
    yield "rope_scaling", (None,)


def _reader_of(ref: TensorRef) -> Callable[[], Float32]:
    def read() -> Float32:
        with open_regular(ref.path) as (descriptor, _):
            raw = read_at(descriptor, ref.nbytes, ref.offset, ref.path)
        return _widen(raw, ref.dtype).reshape(ref.shape)

    return read


def _widen(raw: bytes, dtype: str) -> Float32:
    if dtype == "BF16":
        return (np.frombuffer(raw, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, dtype={"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32)
