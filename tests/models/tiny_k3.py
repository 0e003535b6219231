"""Tiny configs of Kimi-K3, the tensors of their checkpoints, and the model in numpy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.models.numpy_kda import kimi_delta_attention
from tests.models.rows import Row
from tests.models.safetensors_file import Array

RawConfig = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

FAMILY = "kimi_k3"
PREFIX = "language_model.model."

# Of the models whose logits `make_k3.py` keeps.
PEER_BLOCKS, PEER_SEED = (2, 5), 7
PEER_LOGITS = Path(__file__).parent / "k3_logits.safetensors"


def kimi_k3(**changes: Any) -> RawConfig:
    """A config.json with the keys of Kimi-K3's; `changes` are those of `text_config`."""
    text = {
        "activation_situ_beta": 4.0,
        "activation_situ_linear_beta": 25.0,
        "attn_res_block_size": 2,
        "bos_token_id": 1,
        "dtype": "bfloat16",
        "eos_token_id": 2,
        "first_k_dense_replace": 1,
        "head_dim": 9,
        "hidden_act": "situ",
        "hidden_size": 28,
        "initializer_range": 0.02,
        "intermediate_size": 26,
        "kv_lora_rank": 18,
        "latent_moe_use_norm": True,
        "linear_attn_config": {
            "full_attn_layers": [2, 5],
            "gate_lower_bound": -5.0,
            "head_dim": 10,
            "kda_layers": [1, 3, 4],
            "num_heads": 3,
            "short_conv_kernel_size": 4,
            "use_full_rank_gate": True,
        },
        "max_position_embeddings": 128,
        "mla_use_nope": True,
        "mla_use_output_gate": True,
        "model_type": "kimi_linear",
        "moe_intermediate_size": 9,
        "moe_layer_freq": 1,
        "moe_renormalize": True,
        "moe_router_activation_func": "sigmoid",
        "num_attention_heads": 3,
        "num_expert_group": 1,
        "num_experts": 6,
        "num_experts_per_token": 2,
        "num_hidden_layers": 5,
        "num_key_value_heads": 3,
        "num_nextn_predict_layers": 0,
        "num_shared_experts": 2,
        "pad_token_id": 0,
        "q_lora_rank": 14,
        "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 6,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "routed_expert_hidden_size": 20,
        "routed_scaling_factor": 1.0,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "use_cache": True,
        "use_grouped_topk": True,
        "v_head_dim": 12,
        "vocab_size": 80,
    } | changes
    return {
        "architectures": ["KimiK3ForConditionalGeneration"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "ignore_index": -100,
        "media_placeholder_token_id": 70,
        "model_type": FAMILY,
        "text_config": text,
        "tie_word_embeddings": False,
        "transformers_version": "4.56.2",
        "vision_config": {"vt_hidden_size": 8},
    }


def kimi_k3_for_peer(block: int) -> RawConfig:
    """Return a config whose sizes llama.cpp can run."""
    return kimi_k3(
        attn_res_block_size=block, hidden_size=128, intermediate_size=64, kv_lora_rank=64, head_dim=32,
        linear_attn_config=kimi_k3()["text_config"]["linear_attn_config"] | {"head_dim": 64, "num_heads": 4},
        moe_intermediate_size=64, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=32, qk_nope_head_dim=32,
        qk_rope_head_dim=32, routed_expert_hidden_size=64, v_head_dim=64,
    )  # fmt: skip


def tensor_shapes(raw: RawConfig) -> Shapes:
    """Return names and shapes of the text model's tensors in the hub's checkpoint of this config."""
    config = raw["text_config"]
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    shapes: Shapes = {PREFIX + "embed_tokens.weight": (vocab, hidden)}
    for i in range(config["num_hidden_layers"]):
        is_delta = i + 1 in config["linear_attn_config"]["kda_layers"]
        of_layer: Shapes = {f"{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        mixer = _delta_shapes(config) if is_delta else _latent_shapes(config)
        of_layer |= {"self_attn." + name: shape for name, shape in mixer.items()}
        if config["attn_res_block_size"] is not None:
            for part in ("self_attention_res", "mlp_res"):
                of_layer |= {f"{part}_norm.weight": (hidden,), f"{part}_proj.weight": (1, hidden)}
        if i < config["first_k_dense_replace"]:
            of_layer |= _network("mlp.", hidden, config["intermediate_size"])
        else:
            of_layer |= {"block_sparse_moe." + name: shape for name, shape in _routed(config).items()}
        shapes |= {f"{PREFIX}layers.{i}.{name}": shape for name, shape in of_layer.items()}
    if config["attn_res_block_size"] is not None:
        shapes[PREFIX + "output_attn_res_norm.weight"] = (hidden,)
        shapes[PREFIX + "output_attn_res_proj.weight"] = (1, hidden)
    shapes[PREFIX + "norm.weight"] = (hidden,)
    shapes["language_model.lm_head.weight"] = (vocab, hidden)
    return shapes


def _delta_shapes(config: RawConfig) -> Shapes:
    hidden, linear = config["hidden_size"], config["linear_attn_config"]
    heads, dim = linear["num_heads"], linear["head_dim"]
    rows = heads * dim
    return {
        **{f"{name}_proj.weight": (rows, hidden) for name in ("q", "k", "v", "g")},
        **{f"{name}_conv1d.weight": (rows, 1, linear["short_conv_kernel_size"]) for name in "qkv"},
        "f_a_proj.weight": (dim, hidden), "f_b_proj.weight": (rows, dim), "b_proj.weight": (heads, hidden),
        "A_log": (128,), "dt_bias": (rows,), "o_norm.weight": (dim,), "o_proj.weight": (hidden, rows),
    }  # fmt: skip


def _latent_shapes(config: RawConfig) -> Shapes:
    hidden, heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    query = config["q_lora_rank"]
    shapes: Shapes = {
        "q_a_proj.weight": (query, hidden), "q_a_layernorm.weight": (query,),
        "q_b_proj.weight": (heads * (nope + rope), query), "kv_a_proj_with_mqa.weight": (rank + rope, hidden),
        "kv_a_layernorm.weight": (rank,), "kv_b_proj.weight": (heads * (nope + value), rank),
        "o_proj.weight": (hidden, heads * value),
    }  # fmt: skip
    return shapes | ({"g_proj.weight": (heads * value, hidden)} if config["mla_use_output_gate"] else {})


def _routed(config: RawConfig) -> Shapes:
    hidden, experts, width = config["hidden_size"], config["num_experts"], config["moe_intermediate_size"]
    latent = config["routed_expert_hidden_size"]
    shapes: Shapes = {"gate.weight": (experts, hidden), "gate.e_score_correction_bias": (experts,)}
    if latent is not None:
        shapes["routed_expert_down_proj.weight"] = (latent, hidden)
        shapes["routed_expert_up_proj.weight"] = (hidden, latent)
        if config["latent_moe_use_norm"]:
            shapes["routed_expert_norm.weight"] = (latent,)
    for expert in range(experts):
        shapes |= _network(f"experts.{expert}.", latent or hidden, width, ("w1", "w3", "w2"))
    return shapes | _network("shared_experts.", hidden, width * config["num_shared_experts"])


def _network(
    prefix: str, hidden: int, width: int, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> Shapes:
    gate, up, down = names
    return {
        f"{prefix}{gate}.weight": (width, hidden),
        f"{prefix}{up}.weight": (width, hidden),
        f"{prefix}{down}.weight": (hidden, width),
    }


class NumpyK3:
    """The model in float64, from the formulas of arXiv:2607.24653."""

    def __init__(self, raw: RawConfig, tensors: Mapping[str, Array], *, latent_eps: float = 1e-6) -> None:
        self.config, self.latent_eps = raw["text_config"], latent_eps
        self.tensors = {
            name.removeprefix("language_model."): value.astype(float) for name, value in tensors.items()
        }
        self.router_margin = np.inf

    def logits(self, ids: list[int]) -> Array:
        """Return the logits [tokens, vocabulary] of a prompt."""
        config, state = self.config, self.tensors["model.embed_tokens.weight"][ids]
        bank: list[Array] = []
        for layer in range(config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            read = self._mix(bank, state, prefix + "self_attention_res")
            if (block := config["attn_res_block_size"]) is not None and layer % block == 0:
                bank, state = [*bank, state], np.zeros_like(state)
            state = state + self._mixer(layer, self._norm(read, prefix + "input_layernorm"))
            read = self._mix(bank, state, prefix + "mlp_res")
            state = state + self._feed_forward(layer, self._norm(read, prefix + "post_attention_layernorm"))
        last = self._norm(self._mix(bank, state, "model.output_attn_res"), "model.norm")
        logits: Array = last @ self.tensors["lm_head.weight"].T
        return logits

    def _mix(self, bank: list[Array], state: Array, name: str) -> Array:
        if not bank:
            return state
        states = np.stack([*bank, state])
        weight = self.tensors[name + "_proj.weight"].reshape(-1)
        scores = np.stack([self._norm(one, name + "_norm") @ weight for one in states])
        shares = np.exp(scores - scores.max(axis=0))
        mixed: Array = ((shares / shares.sum(axis=0))[..., None] * states).sum(axis=0)
        return mixed

    def _norm(self, x: Array, name: str, eps: float | None = None) -> Array:
        eps = self.config["rms_norm_eps"] if eps is None else eps
        scale: Array = np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)
        return self.tensors[name + ".weight"] * x / scale

    def _linear(self, name: str, x: Array) -> Array:
        y: Array = x @ self.tensors[name + ".weight"].T
        return y

    def _mixer(self, layer: int, x: Array) -> Array:
        prefix, linear = f"model.layers.{layer}.self_attn.", self.config["linear_attn_config"]
        if layer + 1 not in linear["kda_layers"]:
            return self._latent_attention(prefix, x)
        safe = {"kda_safe_gate": True, "kda_lower_bound": linear["gate_lower_bound"]}
        rates = {prefix + "A_log": self.tensors[prefix + "A_log"][: linear["num_heads"]]}
        return kimi_delta_attention(self.config | safe, self.tensors | rates, prefix, x)

    def _latent_attention(self, prefix: str, x: Array) -> Array:
        config, count = self.config, len(x)
        heads, nope, rank = config["num_attention_heads"], config["qk_nope_head_dim"], config["kv_lora_rank"]
        down = self._norm(self._linear(prefix + "q_a_proj", x), prefix + "q_a_layernorm", self.latent_eps)
        q = self._linear(prefix + "q_b_proj", down).reshape(count, heads, -1)
        joined = self._linear(prefix + "kv_a_proj_with_mqa", x)
        latent = self._norm(joined[:, :rank], prefix + "kv_a_layernorm", self.latent_eps)
        both = self._linear(prefix + "kv_b_proj", latent).reshape(count, heads, -1)
        scores = np.einsum("qhd,khd->hqk", q[..., :nope], both[..., :nope])
        scores = (scores + np.einsum("qhd,kd->hqk", q[..., nope:], joined[:, rank:])) / np.sqrt(q.shape[-1])
        scores = np.where(np.tri(count, dtype=bool), scores, -np.inf)
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        shares /= shares.sum(axis=-1, keepdims=True)
        out = np.einsum("hqk,khd->qhd", shares, both[..., nope:]).reshape(count, -1)
        if config["mla_use_output_gate"]:
            out = out / (1 + np.exp(-self._linear(prefix + "g_proj", x)))
        return self._linear(prefix + "o_proj", out)

    def _network(self, prefix: str, x: Array, names: tuple[str, str, str]) -> Array:
        gate, up, down = names
        g, u = self._linear(prefix + gate, x), self._linear(prefix + up, x)
        beta, linear_beta = (self.config[f"activation_situ_{name}"] for name in ("beta", "linear_beta"))
        activated = beta * np.tanh(g / beta) / (1 + np.exp(-g)) * linear_beta * np.tanh(u / linear_beta)
        return self._linear(prefix + down, activated)

    def _feed_forward(self, layer: int, x: Array) -> Array:
        config, plain = self.config, ("gate_proj", "up_proj", "down_proj")
        if layer < config["first_k_dense_replace"]:
            return self._network(f"model.layers.{layer}.mlp.", x, plain)
        prefix, k = f"model.layers.{layer}.block_sparse_moe.", config["num_experts_per_token"]
        scores = 1 / (1 + np.exp(-self._linear(prefix + "gate", x)))
        ranked = scores + self.tensors[prefix + "gate.e_score_correction_bias"]
        chosen = np.argsort(-ranked, axis=1, kind="stable")[:, :k]
        in_order = np.sort(ranked, axis=1)[:, ::-1]
        self.router_margin = min(self.router_margin, float((in_order[:, k - 1] - in_order[:, k]).min()))
        has_latent = config["routed_expert_hidden_size"] is not None
        read = self._linear(prefix + "routed_expert_down_proj", x) if has_latent else x
        out = np.zeros_like(read)
        for token, experts in enumerate(chosen):
            weights = scores[token, experts]
            weights = weights / (weights.sum() + 1e-20) * config["routed_scaling_factor"]
            for expert, weight in zip(experts, weights, strict=True):
                one = self._network(f"{prefix}experts.{expert}.", read[token : token + 1], ("w1", "w3", "w2"))
                out[token] += weight * one[0]
        if has_latent and config["latent_moe_use_norm"]:
            out = self._norm(out, prefix + "routed_expert_norm")
        if has_latent:
            out = self._linear(prefix + "routed_expert_up_proj", out)
        return out + self._network(prefix + "shared_experts.", x, plain)


ROWS = {
    FAMILY: Row(
        shapes=tensor_shapes,
        has_own_experts=True,
        without_references="transformers has no class; `test_kimi_k3.py` compares with numpy and llama.cpp",
        without_record="llama.cpp's converter needs the released tokenizer",
        without_mlx="MLX's layout joins q, k and v",
    )
}
