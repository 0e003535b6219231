"""Read the configuration of a checkpoint: `config.json`, or Mistral's own `params.json` under the keys of the former.

    directory  ->  read_raw  ->  raw config, and the file that it comes from

Mixtures with latent attention are translated to a config.json of `mistral4`, models without experts to one of
`ministral3`, as vLLM 0.30 reads them (`transformers_utils/configs/mistral`): Mistral-Large-3, and Mistral-Small-3 and 4
and Ministral-3, which have both files. Keys that are not translated stay as they are, so that the family refuses those
that it does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from argosy.checkpoint.untrusted_file import quote, read_object
from argosy.errors import UnsupportedModel

CONFIG_FILE = "config.json"
PARAMS_FILE = "params.json"

_KEYS = {
    "dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads", "hidden_dim": "intermediate_size", "norm_eps": "rms_norm_eps",
    "tied_embeddings": "tie_word_embeddings", "activation": "hidden_act", "vision_encoder": "vision_config",
    "max_seq_len": "max_position_embeddings",
}  # fmt: skip
_LATENT_KEYS = _KEYS | {"head_dim": "qk_head_dim"}
_CONTEXT_TOKENS = 128_000  # of a model without experts whose file does not say
_MOE_KEYS = {
    "num_experts": "n_routed_experts", "num_experts_per_tok": "num_experts_per_tok",
    "expert_hidden_dim": "moe_intermediate_size", "first_k_dense_replace": "first_k_dense_replace",
    "num_shared_experts": "n_shared_experts", "routed_scale": "routed_scaling_factor", "num_expert_groups": "n_group",
    "num_expert_groups_per_tok": "topk_group", "route_every_n": "moe_layer_freq",
}  # fmt: skip
_YARN_KEYS = {
    "factor": "factor", "beta": "beta_fast", "alpha": "beta_slow",
    "original_max_position_embeddings": "original_max_position_embeddings",
}  # fmt: skip
# How it was trained, and switches that are off.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "moe.expert_parallel": (1,),
    "moe.expert_model_parallel": (1,),
    "moe.renorm_strategy": ("WEIGHTS",),
    "moe.use_load_balancing_bias": (False,),
    "sliding_window": (None,),
    "model_type": ("transformer",),
}
_FP8 = {"qformat_weight": ("fp8_e4m3",), "qscheme_act": ("TENSOR", "NO_SCALES", None)}


def read_raw(directory: Path) -> tuple[dict[str, object], Path]:
    """Return the configuration of the checkpoint in a directory as a config.json has it, and the path of its file.

    Raises:
        UnsupportedModel: a params.json of another kind of model.   CheckpointError: the file is missing or malformed.
    """
    path = find_config(directory)
    raw = read_object(path, spells_constants=True)
    return (_as_config(raw, path) if path.name == PARAMS_FILE else raw), path


def find_config(directory: Path) -> Path:
    """Return the path of a directory's params.json if it has no config.json, and otherwise of its config.json."""
    path, params = directory / CONFIG_FILE, directory / PARAMS_FILE
    return params if not path.exists() and not path.is_symlink() and params.exists() else path


def _as_config(params: Mapping[str, object], path: Path) -> dict[str, object]:
    has_experts, is_latent = isinstance(params.get("moe"), dict), params.get("kv_lora_rank") is not None
    if has_experts != is_latent:
        raise UnsupportedModel(
            f"{path.name} describes a model with {'experts' if has_experts else 'latent attention'} alone; supported: "
            "Mistral's mixtures with latent attention, which have moe and kv_lora_rank, and models with neither",
            hint=f"get the model with a {CONFIG_FILE}, or as a GGUF",
            path=path,
            key="kv_lora_rank",
        )
    keys = _LATENT_KEYS if is_latent else _KEYS
    raw: dict[str, object] = {}
    for key, value in params.items():
        if key == "moe":
            for name, one in _object(value, key, path).items():
                _keep(raw, _MOE_KEYS.get(name, f"{key}.{name}"), one)
        elif key == "quantization":
            raw["quantization_config"] = _quantization(_object(value, key, path), path)
        elif key not in ("yarn", "llama_4_scaling", "rope_theta"):
            _keep(raw, keys.get(key, key), value)
    vision = raw.get("vision_config")
    if isinstance(vision, dict) and "image_token_id" in vision:
        raw["image_token_id"] = vision["image_token_id"]  # where a config.json has it
    theta = {"rope_theta": params["rope_theta"]} if "rope_theta" in params else {}
    raw["rope_parameters"] = _rope(params, path) | theta
    if is_latent:
        return raw | {"model_type": "mistral4"}
    return (
        {"max_position_embeddings": _CONTEXT_TOKENS}
        | raw
        | {"model_type": "ministral3", "rope_interleave": True}
    )


def _keep(raw: dict[str, object], key: str, value: object) -> None:
    if not any(
        value == one and isinstance(value, bool) == isinstance(one, bool) for one in _NEUTRAL.get(key, ())
    ):
        raw[key] = value


def _rope(params: Mapping[str, object], path: Path) -> dict[str, object]:
    """Return the rotary embedding. Yarn stretches it without its magnitude: neither angles nor scores get a factor."""
    rope: dict[str, object] = {"rope_type": "default"}
    if params.get("yarn") is not None:
        yarn = dict(_object(params["yarn"], "yarn", path))
        apply_scale = yarn.pop("apply_scale", True)
        if apply_scale is not False:
            raise _refused("yarn.apply_scale", apply_scale, "false", path)
        rope = {_YARN_KEYS.get(name, name): value for name, value in yarn.items()}
        rope |= {"rope_type": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0}
    if params.get("llama_4_scaling") is not None:
        scaling = dict(_object(params["llama_4_scaling"], "llama_4_scaling", path))
        rope["llama_4_scaling_beta"] = scaling.pop("beta", None)
        period = scaling.pop("original_max_position_embeddings", None)
        if rope.setdefault("original_max_position_embeddings", period) != period:
            raise _refused("llama_4_scaling.original_max_position_embeddings", period, "that of yarn", path)
        rope |= {f"llama_4_scaling.{name}": value for name, value in scaling.items()}
    return rope


def _quantization(given: Mapping[str, object], path: Path) -> Mapping[str, object]:
    """Return the settings of the checkpoint's own E4M3, one scale a matrix, or those of another method."""
    if "quant_method" in given:
        return given
    for key, value in given.items():
        if value not in _FP8.get(key, ()):
            raise _refused(
                f"quantization.{key}", value, "qformat_weight fp8_e4m3 with qscheme_act TENSOR", path
            )
    return {"quant_method": "fp8"}


def _object(value: object, key: str, path: Path) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise _refused(key, value, "an object", path)
    return value


def _refused(key: str, value: object, supported: str, path: Path) -> UnsupportedModel:
    return UnsupportedModel(
        f"{path.name} asks for {key} {quote(value)}; supported: {supported}",
        path=path,
        key=key,
        value=value,
        supported=supported,
    )
