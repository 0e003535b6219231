"""Tiny configurations of the families with latent attention, and the names and shapes of their tensors on the hub.

A Kimi-K2.5 has its text model under the prefix `language_model.`, beside some tensors of a vision tower. If a config
has layers for multi-token prediction, the checkpoint has them: whole layers with their own embedding, head and three
norms.

Elsewhere: values and files are `tiny.py`.
"""

from __future__ import annotations

from typing import Any

from tests.models.rows import NO_CONVERTER, Loading, Row
from tests.models.tiny import text_of
from tests.models.tiny_dense import dense_shapes

RawConfig = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

INDEXED_FAMILIES = ("deepseek_v32", "glm_moe_dsa")
_COUNTS = (("routed", "num_experts"), ("shared", "num_shared_experts"))
MISTRAL_FAMILIES = ("mistral4", "mistral3")
LATENT_FAMILIES = (
    "deepseek_v2",
    "deepseek_v3",
    "kimi_k2",
    "kimi_k25",
    "glm4_moe_lite",
    "axk1",
    "kimi_vl",
    "sarvam_mla",
    "youtu",
    *INDEXED_FAMILIES,
    *MISTRAL_FAMILIES,
)


def deepseek_v2(**changes: Any) -> RawConfig:
    """A config.json with the keys of DeepSeek-V2-Lite's."""
    return {
        "architectures": ["DeepseekV2ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "aux_loss_alpha": 0.001,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 28,
        "kv_lora_rank": 20,
        "max_position_embeddings": 128,
        "model_type": "deepseek_v2",
        "moe_intermediate_size": 10,
        "moe_layer_freq": 1,
        "n_group": 1,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "num_attention_heads": 4,
        "num_experts_per_tok": 3,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "pretraining_tp": 1,
        "q_lora_rank": None,
        "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 6,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000,
        "routed_scaling_factor": 1.0,
        "scoring_func": "softmax",
        "seq_aux": True,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "topk_method": "greedy",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.33.1",
        "use_cache": True,
        "v_head_dim": 12,
        "vocab_size": 80,
    } | changes


def deepseek_v3(**changes: Any) -> RawConfig:
    """A config.json with the keys of DeepSeek-V3's."""
    return (
        deepseek_v2(
            architectures=["DeepseekV3ForCausalLM"],
            ep_size=1,
            model_type="deepseek_v3",
            n_group=4,
            n_shared_experts=1,
            norm_topk_prob=True,
            num_nextn_predict_layers=0,
            q_lora_rank=22,
            rope_scaling=yarn_of_all_dimensions(40.0, 16),
            routed_scaling_factor=2.5,
            scoring_func="sigmoid",
            topk_group=2,
            topk_method="noaux_tc",
        )
        | changes
    )


def kimi_k2(**changes: Any) -> RawConfig:
    """A config.json with the keys of Kimi-K2-Instruct's."""
    scaling = yarn_of_all_dimensions(32.0, 16) | {"beta_fast": 1.0}
    kimi = {"n_group": 1, "topk_group": 1, "rope_theta": 50000.0, "routed_scaling_factor": 2.827}
    return deepseek_v3(model_type="kimi_k2", rope_scaling=scaling, **kimi) | changes


def kimi_k25(*, model_type: str = "kimi_k2", **changes: Any) -> RawConfig:
    """A config.json with the keys of Kimi-K2.5's; `changes` apply to the text model."""
    return {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "bos_token_id": 1,
        "dtype": "bfloat16",
        "eos_token_id": 2,
        "ignore_index": -100,
        "media_placeholder_token_id": 7,
        "model_type": "kimi_k25",
        "pad_token_id": 3,
        "text_config": kimi_k2(model_type=model_type, **changes),
        "tie_word_embeddings": changes.get("tie_word_embeddings", False),
        "transformers_version": "4.56.2",
        "use_unified_vision_chunk": True,
        "vision_config": {"hidden_size": 8, "num_hidden_layers": 1, "patch_size": 2},
    }


def moonlight(**changes: Any) -> RawConfig:
    """A config.json with the keys of Moonlight-16B-A3B's."""
    own = {
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": None,
        "rope_scaling": None,
        "routed_scaling_factor": 2.446,
    }
    return deepseek_v3(n_shared_experts=2, rms_norm_eps=1e-5, rope_theta=50000.0, **own) | changes


def sarvam_mla(**changes: Any) -> RawConfig:
    """A config.json with the keys of Sarvam-105B's, where they differ from DeepSeek-V3's."""
    raw = moonlight(
        architectures=["SarvamMLAForCausalLM"],
        head_dim=26,
        model_type="sarvam_mla",
        q_head_dim=16,
        rope_scaling=yarn_of_all_dimensions(40.0, 16) | {"type": "deepseek_yarn"},
    )
    names = {"n_routed_experts": "num_experts", "n_shared_experts": "num_shared_experts"}
    return {names.get(key, key): value for key, value in (raw | changes).items()}


def kimi_vl(**changes: Any) -> RawConfig:
    """A config.json with the keys of Kimi-VL-A3B-Instruct's; `changes` apply to the text model."""
    return {
        "architectures": ["KimiVLForConditionalGeneration"],
        "ignore_index": -100,
        "media_placeholder_token_id": 7,
        "model_type": "kimi_vl",
        "pad_token_id": 3,
        "text_config": moonlight(rope_theta=800000.0, **changes),
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.3",
        "vision_config": {"hidden_size": 8, "model_type": "moonvit", "num_hidden_layers": 1, "patch_size": 2},
        "vocab_size": 80,
    }


def axk1(**changes: Any) -> RawConfig:
    """A config.json with the keys of A.X-K1's."""
    own = {
        "architectures": ["AXK1ForCausalLM"],
        "model_type": "axk1",
        "topk_method": None,
        "rope_scaling": None,
    }
    return deepseek_v3(**own) | changes


def mistral4(**changes: Any) -> RawConfig:
    """A config.json with the keys of Mistral-Small-4's text part. Queries grow four times within a prompt."""
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": 26,
        "initializer_range": 0.02,
        "intermediate_size": 22,
        "kv_lora_rank": 14,
        "max_position_embeddings": 128,
        "model_type": "mistral4",
        "moe_intermediate_size": 9,
        "n_group": 1,
        "n_routed_experts": 6,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 3,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "num_key_value_heads": 3,
        "pad_token_id": 11,
        "q_lora_rank": 12,
        "qk_head_dim": 16,
        "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 6,
        "rms_norm_eps": 1e-06,
        "rope_interleave": True,
        "rope_parameters": yarn_of_all_dimensions(16.0, 8)
        | {
            "llama_4_scaling_beta": 0.3,
            "max_position_embeddings": 128,
            "rope_theta": 10000.0,
            "rope_type": "yarn",
        },
        "routed_scaling_factor": 1.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "v_head_dim": 8,
        "vocab_size": 72,
    } | changes


def mistral3(**changes: Any) -> RawConfig:
    """A config.json with the keys of Mistral-Small-4's; `changes` apply to the text model."""
    return {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "dtype": "bfloat16",
        "image_token_index": 10,
        "model_type": "mistral3",
        "multimodal_projector_bias": False,
        "projector_hidden_act": "gelu",
        "spatial_merge_size": 2,
        "text_config": mistral4(**changes),
        "transformers_version": "5.3.0",
        "vision_config": {"hidden_size": 8, "model_type": "pixtral", "num_hidden_layers": 1, "patch_size": 2},
        "vision_feature_layer": -1,
    }


def glm4_moe_lite(**changes: Any) -> RawConfig:
    """A config.json with the keys of GLM-4.7-Flash's."""
    unknown = ("aux_loss_alpha", "bos_token_id", "ep_size", "moe_layer_freq", "scoring_func", "seq_aux")
    plain = deepseek_v3(
        architectures=["Glm4MoeLiteForCausalLM"],
        eos_token_id=[2, 4],
        model_type="glm4_moe_lite",
        moe_intermediate_size=9,
        n_group=1,
        pad_token_id=2,
        partial_rotary_factor=1.0,
        rms_norm_eps=1e-05,
        rope_scaling=None,
        rope_theta=1000000,
        routed_scaling_factor=1.8,
        topk_group=1,
        v_head_dim=20,
    )
    return {key: value for key, value in plain.items() if key not in unknown} | changes


def deepseek_v32(**changes: Any) -> RawConfig:
    """A config.json with the keys of DeepSeek-V3.2's."""
    index = {"index_head_dim": 10, "index_n_heads": 5, "index_topk": 7}
    unknown = ("aux_loss_alpha", "pretraining_tp", "seq_aux")
    plain = deepseek_v3(architectures=["DeepseekV32ForCausalLM"], model_type="deepseek_v32", **index)
    return {key: value for key, value in plain.items() if key not in unknown} | changes


def glm_moe_dsa(**changes: Any) -> RawConfig:
    """A config.json with the keys of GLM-5.2's."""
    unknown = ("partial_rotary_factor", "rope_scaling", "rope_theta")
    plain = glm4_moe_lite(
        architectures=["GlmMoeDsaForCausalLM"],
        head_dim=10,
        index_head_dim=8,
        index_n_heads=6,
        index_share_for_mtp_iteration=True,
        index_skip_topk_offset=3,
        index_topk=6,
        index_topk_freq=4,
        indexer_rope_interleave=True,
        model_type="glm_moe_dsa",
        moe_router_dtype="float32",
        qk_head_dim=16,
        rope_interleave=True,
        rope_parameters={"rope_theta": 8000000, "rope_type": "default"},
        routed_scaling_factor=2.5,
        scoring_func="sigmoid",
    )
    return {key: value for key, value in plain.items() if key not in unknown} | changes


def has_indexer(config: RawConfig, layer: int) -> bool:
    """Whether a layer chooses positions itself; layers for multi-token prediction do."""
    if config["model_type"] not in INDEXED_FAMILIES:
        return False
    kinds = config.get("indexer_types") or config.get("index_topk_pattern")
    if layer >= config["num_hidden_layers"]:
        return True
    if kinds:
        return kinds[layer] in ("full", "F")
    spacing, first = config.get("index_topk_freq", 1), config.get("index_skip_topk_offset", 2)
    return max(layer - first + 1, 0) % spacing == 0


def indexer_shapes(config: RawConfig, layer: str) -> Shapes:
    heads, dim = config["index_n_heads"], config["index_head_dim"]
    return {
        f"{layer}self_attn.indexer.wq_b.weight": (heads * dim, config["q_lora_rank"]),
        f"{layer}self_attn.indexer.wk.weight": (dim, config["hidden_size"]),
        f"{layer}self_attn.indexer.k_norm.weight": (dim,),
        f"{layer}self_attn.indexer.k_norm.bias": (dim,),
        f"{layer}self_attn.indexer.weights_proj.weight": (heads, config["hidden_size"]),
    }


def yarn_of_all_dimensions(factor: float, original: int, mscale: float = 1.0) -> dict[str, Any]:
    """DeepSeek's `rope_scaling`."""
    return {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": factor,
        "mscale": mscale,
        "mscale_all_dim": mscale,
        "original_max_position_embeddings": original,
        "type": "yarn",
    }


def youtu(**changes: Any) -> RawConfig:
    """A config.json with the keys of Youtu-LLM-2B's."""
    plain = deepseek_v3(architectures=["YoutuForCausalLM"], model_type="youtu", rope_scaling=None)
    of_experts = (
        *(
            "n_routed_experts",
            "n_shared_experts",
            "num_experts_per_tok",
            "moe_intermediate_size",
            "n_group",
            "topk_group",
        ),
        *(
            "topk_method",
            "scoring_func",
            "norm_topk_prob",
            "routed_scaling_factor",
            "first_k_dense_replace",
            "ep_size",
        ),
        *("num_nextn_predict_layers", "moe_layer_freq", "aux_loss_alpha", "seq_aux"),
    )
    return {key: value for key, value in plain.items() if key not in of_experts} | changes


def is_moe(config: RawConfig, layer: int) -> bool:
    if config["model_type"] == "youtu":
        return False
    kinds = config.get("mlp_layer_types")
    return kinds[layer] == "sparse" if kinds else layer >= config.get("first_k_dense_replace", 1)


def latent_shapes(raw: RawConfig) -> Shapes:
    """Return names and shapes of every tensor in the hub's checkpoint of such a config."""
    config = raw.get("text_config", raw)
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    prefix = "language_model." if "text_config" in raw else ""
    shapes: Shapes = {f"{prefix}model.embed_tokens.weight": (vocab, hidden)}
    if config["model_type"] in ("mistral", "ministral3"):  # in Mistral's wrapper
        shapes |= {prefix + name: shape for name, shape in dense_shapes(config).items()}
        return shapes | _tower_shapes(raw, hidden)
    for layer in range(config["num_hidden_layers"]):
        layer_prefix = f"{prefix}model.layers.{layer}."
        shapes |= layer_shapes(config, layer_prefix, is_moe=is_moe(config, layer))
        if has_indexer(config, layer):
            shapes |= indexer_shapes(config, layer_prefix)
    shapes[f"{prefix}model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes[f"{prefix}lm_head.weight"] = (vocab, hidden)
    for mtp in range(config.get("num_nextn_predict_layers", 0)):
        layer_prefix = f"{prefix}model.layers.{config['num_hidden_layers'] + mtp}."
        shapes |= layer_shapes(config, layer_prefix, is_moe=True)
        if has_indexer(config, config["num_hidden_layers"]):
            shapes |= indexer_shapes(config, layer_prefix)
        shapes |= {
            f"{layer_prefix}embed_tokens.weight": (vocab, hidden),
            f"{layer_prefix}eh_proj.weight": (hidden, 2 * hidden),
            f"{layer_prefix}enorm.weight": (hidden,),
            f"{layer_prefix}hnorm.weight": (hidden,),
            f"{layer_prefix}shared_head.head.weight": (vocab, hidden),
            f"{layer_prefix}shared_head.norm.weight": (hidden,),
        }
    return shapes | _tower_shapes(raw, hidden)


def _tower_shapes(raw: RawConfig, hidden: int) -> Shapes:
    if "vision_config" not in raw:
        return {}
    width = raw["vision_config"]["hidden_size"]
    is_kimi_k25 = raw["model_type"] == "kimi_k25"
    projector = "mm_projector.proj.0" if is_kimi_k25 else "multi_modal_projector.linear_1"
    return {
        "vision_tower.patch_embed.proj.weight": (width, 3, 2, 2),
        "vision_tower.encoder.blocks.0.norm0.weight": (width,),
        f"{projector}.weight": (hidden, width),
    }


def layer_shapes(config: RawConfig, layer: str, *, is_moe: bool) -> Shapes:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    experts, shared = (config.get(f"n_{name}_experts", config.get(other)) for name, other in _COUNTS)
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    query_rank, kv_rank = config["q_lora_rank"], config["kv_lora_rank"]
    attention, mlp = layer + "self_attn.", layer + "mlp."
    shapes: Shapes = {layer + "input_layernorm.weight": (hidden,)}
    if query_rank is None:
        shapes[attention + "q_proj.weight"] = (heads * (nope + rope), hidden)
    else:
        shapes[attention + "q_a_proj.weight"] = (query_rank, hidden)
        shapes[attention + "q_a_layernorm.weight"] = (query_rank,)
        shapes[attention + "q_b_proj.weight"] = (heads * (nope + rope), query_rank)
    shapes[attention + "kv_a_proj_with_mqa.weight"] = (kv_rank + rope, hidden)
    shapes[attention + "kv_a_layernorm.weight"] = (kv_rank,)
    shapes[attention + "kv_b_proj.weight"] = (heads * (nope + value), kv_rank)
    shapes[attention + "o_proj.weight"] = (hidden, heads * value)
    shapes[layer + "post_attention_layernorm.weight"] = (hidden,)
    if config["model_type"] == "axk1":
        shapes[layer + "post_mlp_layernorm.weight"] = (hidden,)  # dense layers do not use it
    if not is_moe:
        return shapes | swiglu(mlp, hidden, config["intermediate_size"])
    width = config["moe_intermediate_size"]
    shapes[mlp + "gate.weight"] = (experts, hidden)
    if config["model_type"] in ("mistral4", "hy_v4"):
        if config["model_type"] == "hy_v4":
            shapes[mlp + "gate.e_score_correction_bias"] = (experts,)
        shapes[mlp + "experts.gate_up_proj"] = (experts, 2 * width, hidden)
        shapes[mlp + "experts.down_proj"] = (experts, hidden, width)
        return shapes | swiglu(mlp + "shared_experts.", hidden, width * shared)
    if config["model_type"] != "deepseek_v2" and config["topk_method"] is not None:
        shapes[mlp + "gate.e_score_correction_bias"] = (experts,)
    for expert in range(experts):
        shapes |= swiglu(f"{mlp}experts.{expert}.", hidden, width)
    return shapes | swiglu(mlp + "shared_experts.", hidden, width * shared)


def swiglu(prefix: str, hidden: int, width: int) -> Shapes:
    return {
        f"{prefix}gate_proj.weight": (width, hidden),
        f"{prefix}up_proj.weight": (width, hidden),
        f"{prefix}down_proj.weight": (hidden, width),
    }


def _as_deepseek(config: RawConfig) -> tuple[str, RawConfig]:
    """transformers has no class for Kimi's text model alone; inside Kimi-K2.5 it uses a DeepSeek-V3."""
    return "DeepseekV3Config", text_of(config) | {"model_type": "deepseek_v3"}


def _text_of_mistral(config: RawConfig) -> tuple[str, RawConfig]:
    text = text_of(config)
    return _MISTRAL_CLASSES[text["model_type"]], text


_KIMI = Loading(config=_as_deepseek, prefix="language_model.")
_MISTRAL_CLASSES = {
    "mistral": "MistralConfig",
    "ministral3": "Ministral3Config",
    "mistral4": "Mistral4Config",
}
_MISTRAL = Loading(config=_text_of_mistral, prefix="language_model.")
ROWS = {
    "deepseek_v2": Row(shapes=latent_shapes, has_own_modules=True, gguf="deepseek2"),
    "deepseek_v3": Row(
        shapes=latent_shapes,
        has_own_modules=True,
        gguf="deepseek2",
        chats=("deepseek_v3", "deepseek_v31", "gigachat"),
    ),
    "deepseek_v32": Row(
        shapes=latent_shapes, has_own_modules=True, gguf="deepseek32", chats=("deepseek_v32",)
    ),
    "glm_moe_dsa": Row(shapes=latent_shapes, has_own_modules=True, gguf="glm-dsa", chats=("glm47",)),
    "kimi_k2": Row(
        shapes=latent_shapes, loading=_KIMI, has_own_modules=True, gguf="deepseek2", chats=("kimi_k2",)
    ),
    "kimi_k25": Row(
        shapes=latent_shapes, loading=_KIMI, has_own_modules=True, gguf="deepseek2", chats=("kimi_k2",)
    ),
    "kimi_vl": Row(
        shapes=latent_shapes, loading=_KIMI, has_own_modules=True, gguf="deepseek2", chats=("kimi_vl",)
    ),
    "glm4_moe_lite": Row(shapes=latent_shapes, has_own_modules=True, gguf="deepseek2", chats=("glm47",)),
    "axk1": Row(
        shapes=latent_shapes,
        has_own_modules=True,
        without_record=NO_CONVERTER,
        without_mlx="MLX does not know it",
    ),
    "sarvam_mla": Row(
        shapes=latent_shapes,
        has_own_modules=True,
        gguf="deepseek2",
        without_record=NO_CONVERTER,
    ),
    "youtu": Row(shapes=latent_shapes, has_own_modules=True, gguf="deepseek2", chats=("youtu",)),
    "mistral4": Row(
        shapes=latent_shapes,
        loading=_MISTRAL,
        has_own_modules=True,
        has_own_experts=True,
        gguf="mistral4",
        chats=("mistral_args",),
        without_record="the released config is mistral3's",
        without_converted="the converter knows it inside Mistral3ForConditionalGeneration alone",
    ),
    "mistral3": Row(
        shapes=latent_shapes,
        loading=_MISTRAL,
        has_own_modules=True,
        has_own_experts=True,
        gguf="mistral4",
        chats=("mistral_args",),
    ),
}
