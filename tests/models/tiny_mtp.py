"""Tiny checkpoints with a layer for multi-token prediction, as DeepSeek-V3, GLM-4.5 and Qwen3-Next have on the hub.

It is one layer more than the model has, with two norms and a matrix before it and a norm after it. DeepSeek and GLM
number it after the model's layers, and add copies of the model's embedding and head; Qwen's is `mtp.layers.0`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.models import tiny_delta
from tests.models.numpy_model import NumpyModel, Spans
from tests.models.safetensors_file import Array, write_checkpoint
from tests.models.tiny import RawConfig, random_tensors

_QWEN_NAMES = {
    "enorm.weight": "mtp.pre_fc_norm_embedding.weight",
    "hnorm.weight": "mtp.pre_fc_norm_hidden.weight",
    "eh_proj.weight": "mtp.fc.weight",
    "shared_head.norm.weight": "mtp.norm.weight",
}


def write_mtp_model(directory: Path, config: RawConfig, *, seed: int, left_out: str | None = None) -> Path:
    """Write a model of this config, and its draft layer without the tensor that is left out; return `directory`."""
    tensors = mtp_tensors(config, seed)
    if left_out is not None:
        del tensors[f"model.layers.{config['num_hidden_layers']}.{left_out}"]
    directory.mkdir(parents=True, exist_ok=True)
    told = {} if config["model_type"] in tiny_delta.FAMILIES else {"num_nextn_predict_layers": 1}
    (directory / "config.json").write_text(json.dumps(config | told) + "\n")
    write_checkpoint(directory, {name: ("F32", tensor) for name, tensor in tensors.items()})
    return directory


def mtp_tensors(config: RawConfig, seed: int) -> dict[str, Array]:
    """Return random weights of a model and of its draft layer."""
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    if config["model_type"] == "bailing_hybrid":  # the shapes of its files have such a layer
        return random_tensors(config | {"num_nextn_predict_layers": 1}, seed, "F32")
    longer = config | {"num_hidden_layers": layers + 1, "num_nextn_predict_layers": 0}
    tensors = {
        name: tensor
        for name, tensor in random_tensors(longer, seed, "F32").items()
        if not name.startswith("mtp.")  # stand-ins for tensors that are not read
    }
    rng, prefix = np.random.default_rng(seed), f"model.layers.{layers}."
    is_qwen = config["model_type"] in tiny_delta.FAMILIES
    for name in ("enorm", "hnorm", "shared_head.norm"):
        weights: NDArray[np.float64] = (0 if is_qwen else 1) + 0.2 * rng.standard_normal(hidden)
        tensors[f"{prefix}{name}.weight"] = weights.astype(np.float32)
    join = rng.standard_normal((hidden, 2 * hidden)) * hidden**-0.5
    tensors[f"{prefix}eh_proj.weight"] = join.astype(np.float32)
    if is_qwen:
        names = {f"{prefix}{of}": to for of, to in _QWEN_NAMES.items()}
        return {
            names.get(name) or name.replace(prefix, "mtp.layers.0."): tensor
            for name, tensor in tensors.items()
        }
    tensors[f"{prefix}embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
    tensors[f"{prefix}shared_head.head.weight"] = tensors["lm_head.weight"]
    return tensors


class NumpyDraft:
    """The draft layer in float64, in one pass over all tokens."""

    def __init__(self, directory: Path) -> None:
        self.model, self.layer = NumpyModel(directory), NumpyModel(directory)
        self.is_qwen = self.model.is_delta
        is_ling = self.model.family == "bailing_hybrid"
        self.is_state_normed = self.is_qwen or is_ling  # from which it drafts again
        prefix = f"model.layers.{self.model.config['num_hidden_layers']}."
        own = self.model.tensors
        if self.is_qwen:
            names = {to: f"{prefix}{of}" for of, to in _QWEN_NAMES.items()}
            own = {names.get(name) or name.replace("mtp.layers.0.", prefix): own[name] for name in own}
            self.layer.kinds = ["full_attention"]
        self.layer.tensors = {
            **{name: own[name] for name in ("model.embed_tokens.weight", "lm_head.weight")},
            **{name.replace(prefix, "model.layers.0."): own[name] for name in own if name.startswith(prefix)},
            "model.norm.weight": own[
                prefix + ("final_layernorm.weight" if is_ling else "shared_head.norm.weight")
            ],
        }
        # The layer has experts, so the first layers that have none are gone with the others.
        self.layer.config = self.layer.config | {"num_hidden_layers": 1, "first_k_dense_replace": 0}
        self.layer.windows = self.layer.windows[:1] or [0]

    def logits(self, token_ids: list[int], drafted: list[int] = []) -> Array:  # noqa: B006
        """Return its logits after `token_ids` and the tokens that it drafted before: float64 [vocab]."""
        self.model.logits(token_ids)
        states = self.model.norm("model.norm", self.model.hidden_states[-1])[:-1]
        known = [*token_ids[1:], *drafted]
        for at in range(len(drafted) + 1):
            logits = self._run(known[: len(states)], states)
            if at < len(drafted):
                after = self.layer.hidden_states[-1][-1:]
                states = np.concatenate(
                    [states, self.layer.norm("model.norm", after) if self.is_state_normed else after]
                )
        return logits[-1]

    def _run(self, following: list[int], states: Array) -> Array:
        embedded = self.layer.tensors["model.embed_tokens.weight"][following].copy()
        if not self.is_qwen:
            embedded[0] = 0.0
        joined = np.concatenate(
            [
                self.layer.norm("model.layers.0.enorm", embedded),
                self.layer.norm("model.layers.0.hnorm", states),
            ],
            axis=1,
        )
        inputs = joined @ self.layer.tensors["model.layers.0.eh_proj.weight"].T
        return self.layer.logits(following, Spans(embeddings=(np.arange(len(inputs)), inputs)))
