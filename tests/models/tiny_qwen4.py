"""Tiny configs of Qwen3.8-Flash-Next, the tensors of their checkpoints, and the choice of blocks in numpy.

Elsewhere: values and files are `tiny.py`; mixers and experts are those of `tiny_delta.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tests.models.rows import Row
from tests.models.safetensors_file import Array
from tests.models.tiny import text_of
from tests.models.tiny_delta import attention_tensors, delta_tensors, moe_tensors

if TYPE_CHECKING:
    from tests.models.numpy_model import NumpyModel, Places

RawConfig = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

FAMILIES = ("qwen4_exp_text", "qwen4_exp")


def qwen4_exp_text(**changes: Any) -> RawConfig:
    """The `text_config` of a config.json with the keys of Qwen3.8-Flash-Next's, as a separate model.

    Four blocks of four positions are chosen, and the prompts are longer.
    """
    return {
        "architectures": ["Qwen4ExpForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "dtype": "bfloat16",
        "eos_token_id": 2,
        "hc_count": 3,
        "hc_lowrank": 6,
        "head_dim": 16,
        "heads_per_ngram": 2,
        "hidden_act": "silu",
        "hidden_size": 20,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "indexer_head_dim": 8,
        "indexer_kv_heads": 1,
        "indexer_n_heads": 5,
        "initializer_range": 0.02,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 10,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 9,
        "make_ngram_vocab_size_divisible_by": 4,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 64,
        "model_type": "qwen4_exp_text",
        "moe_intermediate_size": 8,
        "ngram_size": 3,
        "ngram_vocab_size_base": 31,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "output_gate_type": "sigmoid",
        "ple_conv_kernel_size": 4,
        "ple_embed_dim": 24,
        "ple_layer_ids": [1],
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [1, 1, 0],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
        "router_aux_loss_coef": 0.001,
        "seed": 1234,
        "shared_expert_intermediate_size": 12,
        "split_ngram_parts": 2,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": 64,
    } | changes


def qwen4_exp(**changes: Any) -> RawConfig:
    """A whole config.json; `changes` apply to its text part."""
    text = qwen4_exp_text(**changes)
    del text["architectures"]
    return {
        "architectures": ["Qwen4ExpForConditionalGeneration"],
        "image_token_id": 51,
        "model_type": "qwen4_exp",
        "text_config": text,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "transformers_version": "5.16.0",
        "video_token_id": 52,
        "vision_config": {
            "depth": 1,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 16,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": 8,
            "model_type": "qwen4_exp",
            "num_heads": 2,
            "num_position_embeddings": 16,
            "out_hidden_size": text["hidden_size"],
            "patch_size": 2,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        "vision_end_token_id": 54,
        "vision_start_token_id": 53,
    }


def table_primes(text: RawConfig, table: int) -> list[int]:
    """The rows of each head of a table."""
    heads = (text["ngram_size"] - 1) * text["heads_per_ngram"]
    primes: list[int] = []
    number = text["ngram_vocab_size_base"]
    while len(primes) < (table + 1) * heads:
        if all(number % divisor for divisor in range(2, number)):
            primes.append(number)
        number += 1
    return primes[table * heads :]


def table_multipliers(text: RawConfig, table: int) -> list[int]:
    """The multipliers of a token and of those before it, by SplitMix64."""
    mask, found = (1 << 64) - 1, []
    for index in range(text["ngram_size"]):
        value = (text["seed"] + 10007 * table + 0x9E3779B97F4A7C15 * (index + 2)) & mask
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        found.append(2 * ((value ^ (value >> 31)) % (((1 << 63) - 1) // text["vocab_size"] // 2)) + 1)
    return found


def table_rows(text: RawConfig, table: int) -> int:
    """The rows of a table, padded."""
    divisor: int = text["make_ngram_vocab_size_divisible_by"]
    return -(-sum(table_primes(text, table)) // divisor) * divisor


def qwen4_shapes(config: RawConfig) -> Shapes:
    """Return names and shapes of every tensor in the hub's checkpoint of this config, including some to ignore."""
    text = text_of(config)
    prefix = "model.language_model." if "text_config" in config else "model."
    hidden, vocab, streams = text["hidden_size"], text["vocab_size"], text["hc_count"]
    wide, rank, width = streams * hidden, text["hc_lowrank"], text["ple_embed_dim"]

    def mix(name: str, *, is_head: bool = False) -> Shapes:
        shapes: Shapes = {
            f"{name}.hc_norm.weight": (wide,),
            f"{name}.input_mix_weight_down.weight": (rank, wide),
            f"{name}.input_mix_weight_up.weight": (wide, rank),
        }
        return shapes if is_head else shapes | {f"{name}.block_inject_weight.weight": (streams, wide)}

    shapes: Shapes = {prefix + "embed_tokens.weight": (vocab, hidden)}
    for i, kind in enumerate(text["layer_types"]):
        layer = f"{prefix}layers.{i}."
        mixer = delta_tensors(text) if kind == "linear_attention" else attention_tensors(text) | {
            "self_attn.indexer.index_qk_proj.weight": (
                (text["indexer_n_heads"] + 1) * text["indexer_head_dim"], hidden,
            ),
            "self_attn.indexer.q_layernorm.weight": (text["indexer_head_dim"],),
            "self_attn.indexer.k_layernorm.weight": (text["indexer_head_dim"],),
        }  # fmt: skip
        shapes |= {layer + name: shape for name, shape in mixer.items()}
        shapes |= mix(layer + "attn_hyper_connection") | mix(layer + "mlp_hyper_connection")
        shapes |= moe_tensors(text, layer + "mlp.", True)
        if i + 1 in text["ple_layer_ids"]:
            heads, parts = (text["ngram_size"] - 1) * text["heads_per_ngram"], text["split_ngram_parts"]
            rows = table_rows(text, text["ple_layer_ids"].index(i + 1))
            shapes |= {
                f"{layer}ple.ple_embedding.ngram_embedding.shard_{part}.weight": (
                    rows // parts,
                    width // heads,
                )
                for part in range(parts)
            }
            shapes |= {
                f"{layer}ple.key_proj.weight": (wide, width),
                f"{layer}ple.value_proj.weight": (hidden, width),
                f"{layer}ple.norm_key.weight": (wide,),
                f"{layer}ple.norm_query.weight": (wide,),
                f"{layer}ple.norm_conv.weight": (wide,),
                f"{layer}ple.conv1d.weight": (wide, 1, text["ple_conv_kernel_size"]),
            }
    shapes |= mix(prefix + "hyper_connection_mixer", is_head=True)
    if not text["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    shapes |= {"mtp.fc.weight": (hidden, 2 * hidden), "mtp.layers.0.self_attn.q_proj.weight": (4, hidden)}
    if "text_config" in config:
        shapes |= {"model.visual.patch_embed.proj.bias": (16,), "model.visual.pos_embed.weight": (16, 16)}
    return shapes


def sees_blocks(model: NumpyModel, prefix: str, x: Array, places: Places) -> Array:
    """Return bool [tokens, positions]: whether a token sees a position, by the blocks that it chooses."""
    from tests.models.numpy_model import rotate

    config = model.config
    heads, size = config["indexer_n_heads"], config["indexer_compress_ratio"]
    count, whole, positions = config["indexer_budget"] // size, len(x) // size, np.arange(len(x))
    qk = model.linear(prefix + "index_qk_proj", x).reshape(len(x), heads + 1, -1)
    q = rotate(model.norm(prefix + "q_layernorm", qk[:, :heads]), places)
    means = qk[: whole * size, heads:].reshape(whole, size, qk.shape[2]).mean(axis=1)
    k = np.zeros_like(qk[:, :1])  # a block's key turns as its first position
    k[: whole * size : size, 0] = model.norm(prefix + "k_layernorm", means)
    k = rotate(k, places)[: whole * size : size, 0]
    scores = np.maximum(np.einsum("thd,bd->htb", q, k), 0).sum(axis=0)
    is_whole = (np.arange(whole) + 1) * size <= positions[:, None] + 1
    order = np.argsort(-np.where(is_whole, scores, -np.inf), axis=1, kind="stable")
    is_chosen = np.zeros((len(x), whole + 1), bool)
    np.put_along_axis(is_chosen, order[:, :count], True, axis=1)
    is_unfinished = positions >= (positions[:, None] + 1) // size * size
    return (is_chosen[:, positions // size] | is_unfinished) & places.is_seen()


def constants(config: RawConfig) -> dict[str, list[int]]:
    """Return the constants of tables, as released files store them."""
    text, found = text_of(config), {}
    prefix = "model.language_model." if "text_config" in config else "model."
    for table, layer in enumerate(text["ple_layer_ids"]):
        name = f"{prefix}layers.{layer - 1}.ple.ple_embedding."
        primes = table_primes(text, table)
        found |= {
            name + "layer_multipliers": table_multipliers(text, table),
            name + "ngram_heads_vocab_sizes": primes,
            name + "ngram_heads_offsets": [sum(primes[:head]) for head in range(len(primes))],
        }
    return found


def _row() -> Row:
    return Row(
        shapes=qwen4_shapes,
        has_own_modules=True,
        has_own_experts=True,
        has_zero_centred_norms=True,
        chats=("qwen3_coder",),
        gguf="qwen4exp",
        without_record="its converter reads constants of the checkpoint's tensors",
        constants=constants,
        has_own_spelling=True,
        without_mlx="its tables are not read from MLX's checkpoints",
    )


ROWS = {"qwen4_exp_text": _row(), "qwen4_exp": _row()}
