"""Small made-up dense models, each as a safetensors directory and as a GGUF file with the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from tests.models.numpy_model import NumpyModel
from tests.models.safetensors_file import Array, read_checkpoint, write_safetensors

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 48,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


class NumpyDense(NumpyModel):
    """The plain numpy model of the tests, with a dense feed-forward block."""

    def __init__(self, directory: Path) -> None:
        self.family = "qwen3_moe"
        self.config = {**json.loads((directory / "config.json").read_text()), "model_type": self.family}
        self.tensors = {name: t.astype(np.float64) for name, t in read_checkpoint(directory).items()}
        self.is_delta, self.kinds = False, []
        self.windows = [0] * self.config["num_hidden_layers"]

    def feed_forward(self, layer: int, x: Array) -> Array:
        return self.swiglu(f"model.layers.{layer}.mlp.", x)


def made_up_tensors(config: dict[str, Any] = CONFIG, seed: int = 0) -> dict[str, Array]:
    """Every tensor of a dense model, with values that float16 represents exactly."""
    chance = np.random.default_rng(seed)
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]

    def drawn(*shape: int) -> Array:
        return (chance.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float16).astype(np.float32)

    tensors = {"model.embed_tokens.weight": drawn(vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        tensors |= {
            f"{at}.input_layernorm.weight": 1 + drawn(hidden),
            f"{at}.self_attn.q_proj.weight": 2 * drawn(hidden, hidden),
            f"{at}.self_attn.k_proj.weight": 2 * drawn(kv, hidden),
            f"{at}.self_attn.v_proj.weight": drawn(kv, hidden),
            f"{at}.self_attn.o_proj.weight": drawn(hidden, hidden),
            f"{at}.post_attention_layernorm.weight": 1 + drawn(hidden),
            f"{at}.mlp.gate_proj.weight": drawn(ffn, hidden),
            f"{at}.mlp.up_proj.weight": drawn(ffn, hidden),
            f"{at}.mlp.down_proj.weight": drawn(hidden, ffn),
        }
    tensors["model.norm.weight"] = 1 + drawn(hidden)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = drawn(vocab, hidden)
    return {name: tensor.astype(np.float16).astype(np.float32) for name, tensor in tensors.items()}


def write_dense_directory(directory: Path, *, dtype: str = "F32", **changes: Any) -> Path:
    config = {**CONFIG, **changes}
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")
    tensors = {name: (dtype, tensor) for name, tensor in made_up_tensors(config).items()}
    write_safetensors(directory / "model.safetensors", tensors)
    return directory


def write_dense_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    pre_tokenizer: str = "smollm",
    matrices: GGMLQuantizationType = GGMLQuantizationType.F32,
    more: Callable[[GGUFWriter], None] = lambda writer: None,
) -> Path:
    """The same model as llama.cpp stores it: q and k rows in adjacent rotary pairs, and vectors in F32.

    Args:
        more: adds metadata.
    """
    names = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
    }
    heads = {"attn_q": CONFIG["num_attention_heads"], "attn_k": CONFIG["num_key_value_heads"]}
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(CONFIG["num_hidden_layers"])
    writer.add_context_length(CONFIG["max_position_embeddings"])
    writer.add_embedding_length(CONFIG["hidden_size"])
    writer.add_feed_forward_length(CONFIG["intermediate_size"])
    writer.add_head_count(CONFIG["num_attention_heads"])
    writer.add_head_count_kv(CONFIG["num_key_value_heads"])
    writer.add_rope_freq_base(CONFIG["rope_theta"])
    writer.add_layer_norm_rms_eps(CONFIG["rms_norm_eps"])
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*SPECIAL_TOKENS, *letters, *"0123456789", "Ġ", "th", "the"]
    tokens += [f"unused{at}" for at in range(CONFIG["vocab_size"] - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL_TOKENS else 1 for token in tokens])
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    more(writer)
    for name, tensor in made_up_tensors().items():
        part = name.removesuffix(".weight")
        prefix = ""
        if part.startswith("model.layers."):
            layer, part = part.removeprefix("model.layers.").split(".", 1)
            prefix = f"blk.{layer}."
        stored = _to_adjacent_pairs(tensor, heads.get(names[part]))
        kind = matrices if tensor.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(f"{prefix}{names[part]}.weight", quantize(stored, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _to_adjacent_pairs(rows: Array, num_heads: int | None) -> Array:
    """Make rows j and j + half of each head neighbours, as llama.cpp's conversion does."""
    if num_heads is None:
        return rows
    half = rows.shape[0] // num_heads // 2
    order = [
        head * 2 * half + j + part * half for head in range(num_heads) for j in range(half) for part in (0, 1)
    ]
    return np.ascontiguousarray(rows[order])
