"""Every family in numpy and float64, slow and plain: an independent implementation of what Argosy must compute.

It shares no code with the engine, and reads config.json and the files itself. `make_models.py` compares it with
transformers; tests compare the engine with it on models made on the fly.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from tests.models import (
    numpy_dense,
    numpy_llama4,
    numpy_mamba,
    numpy_qwen4,
    numpy_recurrent,
    numpy_windows,
    tiny_cohere,
    tiny_delta,
    tiny_dense,
    tiny_flags,
    tiny_gemma,
    tiny_glm5,
    tiny_gqa,
    tiny_hy4,
    tiny_kda,
    tiny_llama4,
    tiny_mamba,
    tiny_minimax,
    tiny_minimax_m3,
    tiny_qwen4,
    tiny_recurrent,
    tiny_step,
    tiny_windows,
    tiny_wrappers,
)
from tests.models.numpy_deepseek_v4 import DeepseekV4
from tests.models.numpy_delta import delta_net
from tests.models.numpy_flags import run_layer
from tests.models.numpy_kda import as_deepseek, kimi_delta_attention
from tests.models.rows import rows
from tests.models.safetensors_file import Array, read_checkpoint
from tests.models.tiny import CHOICE_BIASES, RawConfig, expert_names, head_dim, text_of

DEFAULT_THETA = {"mixtral": 1e6, "qwen2_moe": 1e4, "qwen3_moe": 1e4, "gpt_oss": 1.5e5}
DEFAULT_THETA |= {"glm4_moe": 1e4, "olmoe": 1e4, "minimax_m2": 5e6}
DEFAULT_THETA |= dict.fromkeys((*tiny_delta.FAMILIES, *tiny_qwen4.FAMILIES), 1e4) | {"lfm2_moe": 1e6}

# Families whose positions have three axes, each of which rotates some pairs of a head (m-rope): whether the pairs of
# the axes alternate, and how many pairs each axis has by default. transformers ignores `mrope_interleaved`.
AXES = {
    "qwen3_vl_moe_text": (True, [24, 20, 20]),
    "qwen3_omni_moe_text": (True, [24, 20, 20]),
    "qwen3_5_moe_text": (True, [11, 11, 10]),
    "qwen4_exp_text": (True, [11, 11, 10]),
    "glm4v_moe_text": (False, [8, 12, 12]),
}


TEXT_TYPES = tiny_wrappers.TEXT_TYPES | {"gemma4_text": tiny_gemma.FAMILY, "qwen4_exp": "qwen4_exp_text"}


@dataclass(frozen=True, kw_only=True)
class Spans:
    """The changes that media spans make to a sequence of T tokens. Rows are indices of tokens, each at most once.

    embeddings: rows [R] and vectors [R, hidden], which replace the embeddings of these tokens.
    angles: [axes, T], rotary positions on one axis or three; None: a token's index, on every axis.
    sees_until: [T]; the token at index p sees the indices from max(0, p + 1 - window) up to, not including,
        sees_until[p]. None: p + 1.
    additions: layer -> rows [R] and vectors [R, hidden], which are added to the hidden state after that layer.
    """

    embeddings: tuple[Array, Array] | None = None
    angles: Array | None = None
    sees_until: Array | None = None
    additions: Mapping[int, tuple[Array, Array]] = field(default_factory=dict)


@dataclass(frozen=True)
class Places:
    """Positions of T tokens: angles in radians [T, pairs], factor of cosines and sines, `Spans.sees_until` [T]."""

    angle: Array
    scale: float
    sees_until: Array

    def is_seen(self, window: int = 0) -> Array:
        """Return bool [T, T]: whether a row's token sees a column's token. A window of 0 is full attention."""
        index = np.arange(len(self.angle))
        is_seen: Array = index[None, :] < self.sees_until[:, None]
        return is_seen & (index[None, :] > index[:, None] - window) if window else is_seen


class NumpyModel:
    """A checkpoint's logits, computed in one full pass over all tokens without a cache.

    After `logits`, `router_margin` is the smallest relative distance between the last chosen expert and the first
    one left out, over all tokens and layers: below about 1e-5, float32 may choose differently. `hidden_states` has
    each layer's output, with additions: float64 [tokens, hidden].
    """

    is_delta = False  # some layers have a gated delta net, and norms are zero-centred
    is_gemma = False
    is_gemma3 = False

    def __init__(self, directory: Path) -> None:
        raw: RawConfig = json.loads((directory / "config.json").read_text())
        self.config = text_of(raw)
        self.family = family = self.config["model_type"]
        self.axes = AXES.get(family.removesuffix("_text") + "_text")
        self.config = self.config | {"model_type": TEXT_TYPES.get(family, family)}
        self.is_delta = self.config["model_type"] in (*tiny_delta.FAMILIES, *tiny_qwen4.FAMILIES)
        self.is_gemma = self.config["model_type"] == tiny_gemma.FAMILY
        self.is_gemma3 = self.config["model_type"] in tiny_dense.GEMMA
        self.kinds = tiny_delta.layer_kinds(self.config) if self.is_delta else []
        is_wrapped = self.config.keys() != raw.keys()
        names = (
            {"model.language_model.": "model.", "language_model.": "", "thinker.": ""} if is_wrapped else {}
        )
        self.tensors = {
            next((to + name[len(of) :] for of, to in names.items() if name.startswith(of)), name): t.astype(
                np.float64
            )
            for name, t in read_checkpoint(directory).items()
        }
        if raw["model_type"] == "qwen3_vl_moe":  # it stores experts transposed
            for name in self.tensors:
                if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                    self.tensors[name] = self.tensors[name].swapaxes(1, 2)
        if self.config["model_type"] in tiny_recurrent.FAMILIES:
            self.config = numpy_recurrent.with_common_keys(self.config)
            self.tensors = {numpy_recurrent.respelt(name): t for name, t in self.tensors.items()}
            self.kinds = self.config["layer_types"]
        if family in tiny_mamba.FAMILIES:
            self.config = numpy_mamba.with_common_keys(self.config)
            self.tensors = {numpy_mamba.respelt(name): t for name, t in self.tensors.items()}
        row = rows().get(family) or rows().get(raw["model_type"])
        if row is not None and row.as_known is not None:
            self.config, self.tensors = row.as_known(self.config, self.tensors)
            self.kinds = self.config.get("layer_types") or []
        if self.config["model_type"] in tiny_kda.FAMILIES:
            self.config, self.tensors = as_deepseek(self.config, self.tensors)
        own = next((one for one in (tiny_step, tiny_cohere) if self.family in one.FAMILIES), None)
        self.windows = sliding_windows(self.config) if own is None else own.windows(self.config)
        self.router_margin = math.inf
        self.hidden_states: list[Array] = []

    def logits(self, token_ids: list[int], spans: Spans | None = None) -> Array:
        """Return logits, float64 [tokens, vocab]. Without `spans`, the tokens are text."""
        self.router_margin, self.hidden_states = math.inf, []
        spans = Spans() if spans is None else spans
        if self.config["model_type"] in tiny_qwen4.FAMILIES:
            return numpy_qwen4.logits(
                self, token_ids, self.places(len(token_ids), spans, 0), spans.embeddings
            )
        if self.family == "deepseek_v4":
            model = DeepseekV4(self.config, self.tensors)
            found = model.logits(token_ids)
            self.router_margin = model.margin
            self.hidden_states = [streams.mean(axis=1) for streams in model.states]
            return found
        places = [
            self.places(len(token_ids), spans, layer) for layer in range(self.config["num_hidden_layers"])
        ]
        hidden = self.tensors["model.embed_tokens.weight"][token_ids]
        if self.is_gemma or self.is_gemma3:
            hidden = hidden * math.sqrt(hidden.shape[1])
        hidden = hidden * self.config.get("embedding_multiplier", 1.0)
        if self.config.get("mup_enabled"):
            hidden = hidden * math.sqrt(hidden.shape[1])
        if spans.embeddings is not None:
            rows, vectors = spans.embeddings
            hidden[rows] = vectors
        is_cohere = self.family in tiny_cohere.FAMILIES
        scale = self.config.get("residual_multiplier", 1.0)
        own = next((one for one in (tiny_glm5, tiny_hy4) if self.family in one.FAMILIES), None)
        has_streams = own is not None
        if own is not None:
            hidden = own.run_layers(self, hidden, places)
        for layer in range(0 if has_streams else self.config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            normed = hidden
            if prefix + "input_layernorm.weight" in self.tensors and not is_cohere:
                normed = self.norm(prefix + "input_layernorm", hidden)
            if self.is_gemma3:
                hidden = numpy_dense.run_layer(self, layer, hidden, places[layer])
            elif self.config["model_type"] in tiny_flags.FAMILIES:
                hidden = run_layer(self, layer, hidden, places[layer])
            elif is_cohere:
                hidden = tiny_cohere.run_layer(self, layer, hidden, places[layer])
            elif self.config["model_type"] in tiny_windows.FAMILIES:
                hidden = numpy_windows.run_layer(self, layer, hidden, places[layer])
            elif self.config["model_type"] in tiny_llama4.FAMILIES:
                hidden = numpy_llama4.run_layer(self, layer, hidden, places[layer])
            elif self.config["model_type"] in tiny_minimax.FAMILIES:
                hidden = tiny_minimax.run_layer(self, layer, hidden, places[layer])
            elif self.config["model_type"] in tiny_mamba.FAMILIES:
                hidden = numpy_mamba.run_layer(self, layer, hidden, places[layer])
            elif self.is_gemma:
                mixed = self.attention(layer, normed, places[layer])
                hidden = hidden + self.norm(prefix + "post_attention_layernorm", mixed)
                added = self.gemma_feed_forward(prefix, hidden)
                hidden = hidden + self.norm(prefix + "post_feedforward_layernorm", added)
                hidden = hidden * self.tensors[prefix + "layer_scalar"]
            else:
                if self.kinds and self.kinds[layer] == "linear_attention":
                    hidden = hidden + delta_net(self.config, self.tensors, prefix + "linear_attn.", normed)
                elif prefix + "self_attn.A_log" in self.tensors:
                    mixed = kimi_delta_attention(self.config, self.tensors, prefix + "self_attn.", normed)
                    hidden = hidden + mixed
                elif self.kinds and self.kinds[layer] == "conv":
                    hidden = hidden + numpy_recurrent.short_conv(self.tensors, prefix + "conv.", normed)
                else:
                    hidden = hidden + scale * self.attention(layer, normed, places[layer])
                normed = self.norm(prefix + "post_attention_layernorm", hidden)
                hidden = hidden + scale * self.feed_forward(layer, normed)
            if layer in spans.additions:
                rows, vectors = spans.additions[layer]
                hidden[rows] += vectors
            self.hidden_states.append(hidden)
        is_tied = self.config.get("tie_word_embeddings", False)
        head = self.tensors["model.embed_tokens.weight" if is_tied else "lm_head.weight"]
        normed = (
            tiny_cohere.norm(self, "model.norm", hidden) if is_cohere else self.norm("model.norm", hidden)
        )
        logits: Array = normed @ head.T / self.config.get("logits_scaling", 1.0)
        logits = logits * self.config.get("logit_scale", 1.0)
        cap = self.config.get("final_logit_softcapping")
        return cap * np.tanh(logits / cap) if cap else logits

    def greedy(self, token_ids: list[int], num_tokens: int) -> list[int]:
        """Return the continuation that always takes the best token."""
        known = list(token_ids)
        for _ in range(num_tokens):
            known.append(int(self.logits(known)[-1].argmax()))
        return known[len(token_ids) :]

    def places(self, num_tokens: int, spans: Spans, layer: int) -> Places:
        index = np.arange(num_tokens)
        if self.is_gemma:
            kind, (_, dim) = tiny_gemma.layer_kinds(self.config)[layer], tiny_gemma.heads(self.config, layer)
            frequency, scale = gemma_frequencies(self.config["rope_parameters"][kind], dim), 1.0
            if kind == "full_attention":  # stays causal within media
                spans = replace(spans, sees_until=None)
        elif self.is_gemma3:
            frequency, scale = numpy_dense.frequencies(self.config, self.windows[layer]), 1.0
        elif self.config["model_type"] in tiny_gqa.FAMILIES:
            frequency, scale = tiny_gqa.frequencies(self.config, layer), 1.0
        elif self.config["model_type"] in tiny_windows.FAMILIES:
            frequency, scale = window_frequencies(self.config, layer)
        elif self.family in tiny_cohere.FAMILIES:
            frequency, scale = tiny_cohere.frequencies(self.config, layer), 1.0
        elif self.family in tiny_step.FAMILIES:
            frequency, scale = tiny_step.frequencies(self.config, layer), 1.0
        else:
            frequency, scale = rope_frequencies(self.config)
        if self.config.get("rotates_in_windows") and not self.windows[layer]:
            frequency = 0 * frequency
        positions = index[None] if spans.angles is None else np.asarray(spans.angles, np.float64)
        axis = np.zeros(len(frequency), int) if len(positions) == 1 else self.axis_of_pairs(len(frequency))
        sees_until = index + 1 if spans.sees_until is None else np.asarray(spans.sees_until)
        return Places(positions[axis].T * frequency, scale, sees_until)

    def axis_of_pairs(self, num_pairs: int) -> Array:
        """Return int [pairs]: the axis whose position rotates each pair."""
        assert self.axes is not None, f"positions of {self.config['model_type']} have one axis"
        alternates, sections = self.axes
        rope = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        sections = rope.get("mrope_section", sections)
        if not alternates:
            return np.repeat(np.arange(len(sections)) % 3, sections)
        axis = np.zeros(num_pairs, int)
        for other in (1, 2):
            axis[other : 3 * sections[other] : 3] = other
        return axis

    def norm(self, name: str, x: Array, eps: float | None = None) -> Array:
        """Return x after an RMSNorm with the weight of this name; an empty name stands for no weight."""
        mean_square = (x * x).mean(axis=-1, keepdims=True)
        eps = self.config.get("rms_norm_eps", self.config.get("layernorm_epsilon")) if eps is None else eps
        # Norms are zero-centred in delta families.
        weight = self.tensors[name + ".weight"] + (1 if self.is_delta or self.is_gemma3 else 0) if name else 1
        return weight * x / np.sqrt(mean_square + eps)

    def linear(self, name: str, x: Array) -> Array:
        y = x @ self.tensors[name + ".weight"].T
        return y + self.tensors[name + ".bias"] if name + ".bias" in self.tensors else y

    def attention(self, layer: int, x: Array, places: Places) -> Array:
        if "kv_lora_rank" in self.config:
            return self.latent_attention(f"model.layers.{layer}.self_attn.", x, places)
        prefix, dim = f"model.layers.{layer}.self_attn.", head_dim(self.config)
        if self.is_gemma:
            dim = tiny_gemma.heads(self.config, layer)[1]
        num_tokens = len(x)
        names = "qkv" if prefix + "v_proj.weight" in self.tensors else "qkk"
        q, k, v = (self.linear(f"{prefix}{name}_proj", x) for name in names)
        if is_flat := self.config["model_type"] in ("olmoe", "minimax_m2", "flex_olmo"):
            q, k = self.norm(prefix + "q_norm", q), self.norm(prefix + "k_norm", k)
        if limit := self.config.get("clip_qkv"):
            q, k, v = (np.clip(y, -limit, limit) for y in (q, k, v))
        q, k = (y.reshape(num_tokens, -1, dim) for y in (q, k))
        v = v.reshape(num_tokens, k.shape[1], -1) * (self.config.get("attention_value_scale") or 1.0)
        if self.is_delta:
            q, output_gate = q[:, 0::2], q[:, 1::2]
        has_norms, is_norm_last = (
            prefix + "q_norm.weight" in self.tensors,
            self.config.get("is_norm_last", False),
        )
        if has_norms and not is_flat and not is_norm_last:
            q, k = self.norm(prefix + "q_norm", q), self.norm(prefix + "k_norm", k)
        if self.is_gemma:
            v = self.norm("", v)
        turn = rotate_pairs if self.config["model_type"] in ("ernie4_5_moe", "cohere2_moe") else rotate
        q, k = turn(q, places), turn(k, places)
        if is_norm_last:
            q, k = self.norm(prefix + "q_norm", q), self.norm(prefix + "k_norm", k)
        q = q * self.growth(num_tokens)

        heads_per_kv_head = q.shape[1] // k.shape[1]
        is_seen = places.is_seen(self.windows[layer])
        out = np.empty((*q.shape[:2], v.shape[2]))
        chosen = None
        if prefix + "index_q_proj.weight" in self.tensors:
            chosen = tiny_minimax_m3.sees_blocks(self, prefix, x, places)
        if prefix + "indexer.index_qk_proj.weight" in self.tensors:
            is_seen = tiny_qwen4.sees_blocks(self, prefix + "indexer.", x, places)
        for head in range(q.shape[1]):
            if chosen is not None:
                is_seen = chosen[head // heads_per_kv_head]
            scores = q[:, head] @ k[:, head // heads_per_kv_head].T
            if self.is_gemma3:
                scores = scores * self.config["query_pre_attn_scalar"] ** -0.5
            elif not self.is_gemma:
                scores = scores * self.config.get("attention_multiplier", dim**-0.5)
            scores = np.where(is_seen, scores, -np.inf)
            sinks = self.tensors.get(prefix + "sinks", self.tensors.get(prefix + "attention_sink_bias"))
            if sinks is not None:
                sink = np.full((num_tokens, 1), sinks[head])
                weights = softmax(np.concatenate([scores, sink], axis=1))[:, :-1]
            else:
                weights = softmax(scores)
            out[:, head] = weights @ v[:, head // heads_per_kv_head]
        if self.is_delta:
            out *= sigmoid(output_gate)
        if self.family in tiny_step.FAMILIES:
            out *= sigmoid(self.linear(prefix + "g_proj", x))[:, :, None]
        else:
            out = numpy_windows.gated(self, prefix, x, out)
        return self.linear(prefix + "o_proj", out.reshape(num_tokens, -1))

    def growth(self, num_tokens: int) -> Array:
        """Return [tokens, 1, 1]: the factors of queries, which grow with the position in Mistral's models."""
        rope = self.config.get("rope_parameters") or {}
        if (beta := rope.get("llama_4_scaling_beta")) is None:
            return np.ones((num_tokens, 1, 1))
        periods = np.arange(num_tokens) // rope["original_max_position_embeddings"]
        return (1 + beta * np.log1p(periods))[:, None, None]

    def latent_attention(self, prefix: str, x: Array, places: Places) -> Array:
        """Compute the plain form, which expands the compressed vectors to keys and values for every head."""
        config, num_tokens = self.config, len(x)
        nope, turning, rank = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["kv_lora_rank"]
        eps = config.get("latent_norm_eps", 1e-6)
        if config["q_lora_rank"] is None:
            q = self.linear(prefix + "q_proj", x)
        else:
            compressed = self.norm(prefix + "q_a_layernorm", self.linear(prefix + "q_a_proj", x), eps)
            q = self.linear(prefix + "q_b_proj", compressed)
            if prefix + "indexer.wk.weight" in self.tensors:
                self.chosen = self.choose_positions(prefix + "indexer.", x, compressed, places)
        q = q.reshape(num_tokens, -1, nope + turning)
        latent, shared_key = np.split(self.linear(prefix + "kv_a_proj_with_mqa", x), [rank], axis=-1)
        latent = self.norm(prefix + "kv_a_layernorm", latent, eps)
        turn = rotate_pairs if config.get("rope_interleave", True) else rotate
        q_turned, key_turned = q[..., nope:], shared_key[:, None]
        if not config.get("mla_use_nope"):
            q_turned, key_turned = turn(q_turned, places), turn(key_turned, places)

        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        magnitude = 1.0
        if rope.get("mscale_all_dim") and rope["factor"] > 1:
            magnitude = 0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1
        if config["model_type"] == "mistral4":
            magnitude, growth = 1.0, self.growth(num_tokens)
            q, q_turned = q * growth, q_turned * growth
        scale = magnitude**2 / math.sqrt(nope + turning)
        is_seen = places.is_seen()
        if "index_topk" in config:  # a layer without an indexer sees what the last one with it chose
            is_seen = is_seen & self.chosen
        keys_values = self.linear(prefix + "kv_b_proj", latent).reshape(num_tokens, q.shape[1], -1)
        out = np.empty((num_tokens, q.shape[1], keys_values.shape[2] - nope))
        for head in range(q.shape[1]):
            key, value = np.split(keys_values[:, head], [nope], axis=-1)
            scores = q[:, head, :nope] @ key.T + q_turned[:, head] @ key_turned[:, 0].T
            scores = np.where(is_seen, scale * scores, -np.inf)
            if prefix + "learnable_sink_param" in self.tensors:
                sink = np.full((num_tokens, 1), self.tensors[prefix + "learnable_sink_param"][head])
                scores, value = np.hstack([scores, sink]), np.vstack([value, np.zeros(value.shape[1])])
            out[:, head] = softmax(scores) @ value
        if prefix + "g_proj.weight" in self.tensors:
            out *= sigmoid(self.linear(prefix + "g_proj", x))[:, :, None]
        if prefix + "linear_gate.weight" in self.tensors:
            out *= sigmoid(self.linear(prefix + "linear_gate", x)).reshape(out.shape)
        return self.linear(prefix + "o_proj", out.reshape(num_tokens, -1))

    def choose_positions(self, prefix: str, x: Array, compressed: Array, places: Places) -> Array:
        """Return [token, position], whether an indexer lets a token see a position; of a tie the lower one."""
        config = self.config
        heads, dim, turning = config["index_n_heads"], config["index_head_dim"], config["qk_rope_head_dim"]
        q = (compressed @ self.tensors[prefix + "wq_b.weight"].T).reshape(len(x), heads, dim)
        k = x @ self.tensors[prefix + "wk.weight"].T
        k = k - k.mean(axis=1, keepdims=True)
        is_hy4 = self.family in tiny_hy4.FAMILIES
        eps = config["rms_norm_eps"] if is_hy4 else 1e-6
        k = k / np.sqrt((k * k).mean(axis=1, keepdims=True) + eps) * self.tensors[prefix + "k_norm.weight"]
        k = (k + self.tensors[prefix + "k_norm.bias"])[:, None]
        turn = rotate_pairs if is_hy4 or config["model_type"] == "glm_moe_dsa" else rotate
        first = dim - turning if is_hy4 else 0
        for y in (q, k) if turning else ():
            y[..., first : first + turning] = turn(y[..., first : first + turning], places)
        positions, size = np.arange(len(x)), config.get("index_kpool", 1)
        if size > 1:  # groups share a key
            whole = len(x) // size * size
            gate = x[:whole] @ self.tensors[prefix + "index_kpool_compress_gate"].T
            gate = gate.reshape(-1, size, dim) + self.tensors[prefix + "index_kpool_compress_ape"]
            shares = np.exp(gate) / np.exp(gate).sum(axis=1, keepdims=True)
            k = (shares * k[:whole].reshape(gate.shape)).sum(axis=1)[:, None]
        weights = x @ self.tensors[prefix + "weights_proj.weight"].T
        scores = np.einsum("th,hts->ts", weights, np.maximum(np.einsum("thd,sd->hts", q, k[:, 0]), 0))
        is_whole = places.is_seen()[:, size - 1 :: size]  # a group is seen with its last position
        order = np.argsort(-np.where(is_whole, scores, -np.inf), axis=1, kind="stable")
        is_chosen = np.zeros_like(scores, bool)
        np.put_along_axis(is_chosen, order[:, : config["index_topk"] // size], True, axis=1)
        is_unfinished = positions >= (positions[:, None] + 1) // size * size
        of_groups = np.repeat(is_chosen, size, axis=1)
        return np.pad(of_groups, ((0, 0), (0, len(x) - of_groups.shape[1]))) | (is_unfinished & (size > 1))

    def deepseek_feed_forward(self, prefix: str, x: Array) -> Array:
        config, k = self.config, self.config["num_experts_per_tok"]
        logits = x @ self.tensors[prefix + "gate.weight"].T
        has_bias = prefix + "gate.e_score_correction_bias" in self.tensors
        is_sigmoid = has_bias or config.get("scoring_func") == "sigmoid"
        scores = sigmoid(logits) if is_sigmoid else softmax(logits)
        for_choice = scores + self.tensors[prefix + "gate.e_score_correction_bias"] if has_bias else scores
        num_groups, kept = config["n_group"] or 1, config["topk_group"] or 1
        is_mistral = config["model_type"] == "mistral4"
        if is_sigmoid or is_mistral or config["topk_method"] == "group_limited_greedy":
            grouped = np.sort(for_choice.reshape(len(x), num_groups, -1), axis=2)
            worth = (
                grouped[:, :, -2:].sum(axis=2)
                if (is_sigmoid or is_mistral) and num_groups > 1
                else grouped[:, :, -1]
            )
            best = np.sort(worth, axis=1)[:, ::-1]
            if kept < num_groups:
                self.note_margin(best, kept)
            is_kept = np.repeat(worth >= best[:, kept - 1 : kept], grouped.shape[2], axis=1)
            for_choice = np.where(is_kept, for_choice, -1.0)
        order = np.argsort(-for_choice, axis=1, kind="stable")
        self.note_margin(np.take_along_axis(for_choice, order, axis=1), k)
        out = self.swiglu(prefix + "shared_experts.", x)
        for token, chosen in enumerate(order[:, :k]):
            weights = scores[token, chosen]
            if (is_sigmoid or is_mistral) and config["norm_topk_prob"]:
                weights = weights / weights.sum()
            for expert, weight in zip(chosen, config["routed_scaling_factor"] * weights, strict=True):
                out[token] += weight * self.swiglu(f"{prefix}experts.{expert}.", x[token])
        if config["model_type"] == "axk1":
            return self.norm(prefix.removesuffix("mlp.") + "post_mlp_layernorm", out)
        return out

    def feed_forward(self, layer: int, x: Array) -> Array:
        if f"model.layers.{layer}.mlp.gate_proj.weight" in self.tensors:
            return self.swiglu(f"model.layers.{layer}.mlp.", x)
        if "kv_lora_rank" in self.config:
            return self.deepseek_feed_forward(f"model.layers.{layer}.mlp.", x)
        if self.config["model_type"] == "gpt_oss":
            return self.clamped_experts(f"model.layers.{layer}.mlp.", x)
        block, names = expert_names(self.config, f"model.layers.{layer}.")
        k = self.config["num_experts_per_tok"]

        scores, worth = self.router(block, x)
        order = np.argsort(-worth, axis=1, kind="stable")
        self.note_margin(np.take_along_axis(worth, order, axis=1), k)
        out = np.zeros_like(x)
        for token, chosen in enumerate(order[:, :k]):
            weights = scores[token, chosen]
            if self.config.get("norm_topk_prob", True):  # always true for Mixtral and MiniMax-M2
                weights = weights / weights.sum()
            weights = weights * (self.config.get("routed_scaling_factor") or 1.0)
            for expert, weight in zip(chosen, weights, strict=True):
                out[token] += weight * self.swiglu(f"{block}experts.{expert}.", x[token], names)
        if block + "shared_expert_gate.weight" in self.tensors:
            gate = sigmoid(x @ self.tensors[block + "shared_expert_gate.weight"].T)
            out += gate * self.swiglu(block + "shared_expert.", x)
        if block + "shared_experts.up_proj.weight" in self.tensors:
            out += self.swiglu(block + "shared_experts.", x)
        return out

    def gemma_feed_forward(self, prefix: str, hidden: Array) -> Array:
        """Run the dense network and the experts beside each other; each has its own norms, and so has the router."""
        k = self.config["top_k_experts"]
        gate, up, down = (self.tensors[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        x = self.norm(prefix + "pre_feedforward_layernorm", hidden)
        dense = (gelu(x @ gate.T) * (x @ up.T)) @ down.T

        router_in = self.norm("", hidden) * self.tensors[prefix + "router.scale"] / math.sqrt(hidden.shape[1])
        scores = softmax(router_in @ self.tensors[prefix + "router.proj.weight"].T)
        order = np.argsort(-scores, axis=1, kind="stable")
        self.note_margin(np.take_along_axis(scores, order, axis=1), k)
        x = self.norm(prefix + "pre_feedforward_layernorm_2", hidden)
        routed = np.zeros_like(x)
        for token, chosen in enumerate(order[:, :k]):
            weights = scores[token, chosen] / scores[token, chosen].sum()
            weights = weights * self.tensors[prefix + "router.per_expert_scale"][chosen]
            for expert, weight in zip(chosen, weights, strict=True):
                gate, up = np.split(self.tensors[prefix + "experts.gate_up_proj"][expert], 2)
                inner = gelu(gate @ x[token]) * (up @ x[token])
                routed[token] += weight * (self.tensors[prefix + "experts.down_proj"][expert] @ inner)
        return self.norm(prefix + "post_feedforward_layernorm_1", dense) + self.norm(
            prefix + "post_feedforward_layernorm_2", routed
        )

    def router(self, block: str, x: Array) -> tuple[Array, Array]:
        """Return the scores that weight experts, and those that choose them: minus infinity outside the best groups."""
        logits = x @ self.tensors[block + "gate.weight"].T
        if self.config["model_type"] not in CHOICE_BIASES:
            return softmax(logits), softmax(logits)
        scores = sigmoid(logits)
        worth = scores + self.tensors.get(block + CHOICE_BIASES[self.config["model_type"]], 0)
        num_groups, kept = self.config.get("n_group", 1), self.config.get("topk_group", 1)
        if num_groups == 1:
            return scores, worth
        grouped = worth.reshape(len(x), num_groups, -1)
        groups = np.sort(grouped, axis=2)[:, :, -2:].sum(axis=2)
        order = np.argsort(-groups, axis=1, kind="stable")
        if kept < num_groups:
            self.note_gap(np.take_along_axis(groups, order, axis=1), kept)
        is_kept = np.zeros_like(groups, dtype=bool)
        np.put_along_axis(is_kept, order[:, :kept], True, axis=1)
        return scores, np.where(is_kept[:, :, None], grouped, -np.inf).reshape(worth.shape)

    def clamped_experts(self, block: str, x: Array) -> Array:
        """Run gpt-oss's experts: the softmax covers only the chosen ones, and columns of gate and up alternate."""
        k, limit = self.config["num_experts_per_tok"], self.config.get("swiglu_limit", 7.0)
        alpha = self.config.get("swiglu_alpha", 1.702)
        logits = self.linear(block + "router", x)
        order = np.argsort(-logits, axis=1, kind="stable")
        self.note_margin(softmax(np.take_along_axis(logits, order, axis=1)), k)
        gate_up, down = (self.tensors[f"{block}experts.{name}_proj"] for name in ("gate_up", "down"))
        gate_up_bias, down_bias = (self.tensors[f"{block}experts.{n}_proj_bias"] for n in ("gate_up", "down"))
        out = np.zeros_like(x)
        for token, chosen in enumerate(order[:, :k]):
            for expert, weight in zip(chosen, softmax(logits[token, chosen]), strict=True):
                inner = x[token] @ gate_up[expert] + gate_up_bias[expert]
                gate, up = np.minimum(inner[0::2], limit), np.clip(inner[1::2], -limit, limit)
                neurons = gate * sigmoid(alpha * gate) * (up + 1)
                out[token] += weight * (neurons @ down[expert] + down_bias[expert])
        return out

    def swiglu(
        self, prefix: str, x: Array, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    ) -> Array:
        stack, _, expert = prefix.rstrip(".").rpartition(".")
        if f"{stack}.gate_up_proj" in self.tensors:  # one tensor for all experts of a layer
            gate, up = np.split(self.tensors[f"{stack}.gate_up_proj"][int(expert)], 2)
            down = self.tensors[f"{stack}.down_proj"][int(expert)]
        else:
            gate, up, down = (self.tensors[f"{prefix}{name}.weight"] for name in names)
        if self.config.get("is_clamped"):
            limit, score = self.config["swiglu_limit"], np.minimum(x @ gate.T, self.config["swiglu_limit"])
            glu = score * sigmoid(self.config["swiglu_alpha"] * score)
            return ((np.clip(x @ up.T, -limit, limit) + 1) * glu) @ down.T
        score, limit = x @ gate.T, activation_limit(self.config, prefix)
        is_limited = self.family in tiny_glm5.FAMILIES
        if is_limited or (self.family in tiny_hy4.FAMILIES and ".experts." in prefix):  # before silu
            score, limit = np.minimum(score, self.config["swiglu_limit"]), self.config["swiglu_limit"]
        return (np.minimum(score * sigmoid(score), limit) * np.clip(x @ up.T, -limit, limit)) @ down.T

    def note_margin(self, best_first: Array, k: int) -> None:
        if k < best_first.shape[1]:
            self.note_gap(best_first, k)

    def note_gap(self, best_first: Array, k: int) -> None:
        margins = (best_first[:, k - 1] - best_first[:, k]) / np.abs(best_first[:, k - 1])
        self.router_margin = min(self.router_margin, float(margins.min()))


def activation_limit(config: RawConfig, prefix: str) -> float:
    """Return the limit of silu(gate) and of up in the network whose tensors' names begin with `prefix`."""
    kind = "expert" if ".experts." in prefix else "share_expert"
    limits = config.get(f"{kind}_swiglu_limit_list")
    return (limits[int(prefix.split(".")[2])] if limits else 0) or math.inf


def sliding_windows(config: RawConfig) -> list[int]:
    """Return each layer's window as transformers reads the config; 0 is full attention."""
    num_layers, window = config["num_hidden_layers"], config.get("sliding_window") or 0
    if "kv_lora_rank" in config:
        return [0] * num_layers
    if config["model_type"] == "mixtral":
        return [window] * num_layers
    if config["model_type"] in tiny_windows.FAMILIES:
        return tiny_windows.windows(config)
    if config["model_type"] in tiny_dense.FAMILIES:
        return tiny_dense.windows(config)
    if config["model_type"] in tiny_gqa.FAMILIES:
        return tiny_gqa.windows(config)
    if config["model_type"] == tiny_gemma.FAMILY:
        return [window if kind == "sliding_attention" else 0 for kind in tiny_gemma.layer_kinds(config)]
    if config["model_type"] == "gpt_oss":
        kinds = config.get("layer_types") or ["sliding_attention", "full_attention"] * num_layers
        return [window if kind == "sliding_attention" else 0 for kind in kinds[:num_layers]]
    if not config.get("use_sliding_window", False):
        return [0] * num_layers
    if config["model_type"] == "qwen3_moe":
        return [window] * num_layers
    first_full = config.get("max_window_layers", 28)
    kinds = config.get("layer_types") or [
        "sliding_attention" if i % 2 == 0 and i < first_full else "full_attention" for i in range(num_layers)
    ]
    return [window if kind == "sliding_attention" else 0 for kind in kinds]


def rope_frequencies(config: RawConfig) -> tuple[Array, float]:
    """Return the angle per position of each dimension pair, and the factor on cosine and sine."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = rope.get("rope_type", rope.get("type", "default")).removeprefix("deepseek_")
    theta = rope.get("rope_theta", config.get("rope_theta", DEFAULT_THETA.get(config["model_type"], 1e4)))
    share = rope.get(
        "partial_rotary_factor",
        config.get("partial_rotary_factor", 0.25 if config["model_type"] in tiny_delta.FAMILIES else 1.0),
    )
    dim = config.get("rotary_dim") or config.get("qk_rope_head_dim") or int(head_dim(config) * share)
    frequency = theta ** -(np.arange(0, dim, 2) / dim)
    original = rope.get("original_max_position_embeddings", config["max_position_embeddings"])
    factor = rope.get("factor", 1.0)
    if kind == "linear":
        return frequency / factor, 1.0
    if kind == "llama3":
        turns = original * frequency / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = np.clip((turns - low) / (high - low), 0, 1) if high > low else turns >= low
        return frequency * (kept + (1 - kept) / factor), 1.0
    if kind == "yarn":
        return yarn_frequencies(rope, frequency, theta, original)
    # Dynamic scaling changes nothing up to max_position_embeddings, and no test exceeds it.
    assert kind in ("default", "dynamic"), kind
    return frequency, 1.0


def window_frequencies(config: RawConfig, layer: int) -> tuple[Array, float]:
    """Return the same for a layer of `tiny_windows.FAMILIES`."""
    frequency, rope = tiny_windows.frequencies(config, layer), tiny_windows.rope_of(config, layer)
    if rope.get("rope_type") != "yarn":
        return frequency, 1.0
    return yarn_frequencies(rope, frequency, rope["rope_theta"], rope["original_max_position_embeddings"])


def gemma_frequencies(rope: RawConfig, dim: int) -> Array:
    """Return the angle per position of each pair of a whole head; if proportional, the last ones stand still."""
    frequency: Array = rope["rope_theta"] ** -(np.arange(0, dim, 2) / dim) / rope.get("factor", 1.0)
    frequency[int(rope.get("partial_rotary_factor", 1.0) * dim / 2) :] = 0
    return frequency


def yarn_frequencies(rope: RawConfig, frequency: Array, theta: float, original: int) -> tuple[Array, float]:
    dim, factor = 2 * len(frequency), rope["factor"]

    def dim_that_turns(times: float) -> float:
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dim_that_turns(rope.get("beta_fast") or 32), dim_that_turns(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    stretched = np.clip((np.arange(dim // 2) - low) / (high - low if high != low else 0.001), 0, 1)

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1

    scale = rope.get("attention_factor")
    if scale is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        scale = magnitude(rope["mscale"]) / magnitude(rope["mscale_all_dim"])
    return frequency * (1 - stretched) + frequency / factor * stretched, magnitude(
        1
    ) if scale is None else scale


def rotate(x: Array, places: Places) -> Array:
    """Rotate x [tokens, heads, dim]: of the rotary dimensions, j is paired with j + half; the others are unchanged."""
    angle = places.angle[:, None]
    x, rest = x[..., : 2 * angle.shape[2]], x[..., 2 * angle.shape[2] :]
    cos, sin = places.scale * np.cos(angle), places.scale * np.sin(angle)
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def rotate_pairs(x: Array, places: Places) -> Array:
    """Rotate x [tokens, heads, dim]: dimension 2 j is paired with dimension 2 j + 1."""
    turned = rotate(np.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1), places)
    return np.stack(np.split(turned, 2, axis=-1), axis=-1).reshape(x.shape)


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def gelu(x: Array) -> Array:
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))
