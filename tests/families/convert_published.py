"""Record the GGUF metadata that llama.cpp's converters write for released models, without any weights.

    config.json of `published.py`  ->  the converter of its architecture  ->  gguf_converted.json

    python -m tests.families.convert_published LLAMA_CPP COMMIT [NAME...]      # only these models; all by default

LLAMA_CPP is a checkout of llama.cpp (llama-cpp-python's source distribution has one in `vendor/`), COMMIT its name in
the record. The converters read configs with `transformers`. They need torch only for weights, so torch is stubbed.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import json
import sys
import tempfile
import types
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tests.families.hub_configs import RELEASED, RawConfig
from tests.families.published import PUBLISHED
from tests.models.converter import has_own_spelling, reading_itself
from tests.models.rows import rows

RECORD = Path(__file__).with_name("gguf_converted.json")

# Families without a record, and Sarvam-30B, whose converter does not work with transformers 5.24.
UNKNOWN = ("sarvam_moe", *(name for name, row in rows().items() if row.without_record))
# Models without a converter in a family with one.
WITHOUT_CONVERTER = ("Ling-2.6-flash",)
# The `architectures` class of the hub's config.json, which selects the converter, for configs stored here without it.
CLASSES = {
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "granitemoe": "GraniteMoeForCausalLM",
    "ernie4_5_moe": "Ernie4_5_MoeForCausalLM",
    "minimax_m2": "MiniMaxM2ForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
    "lfm2_moe": "Lfm2MoeForCausalLM",
    "mimo_v2_flash": "MiMoV2FlashForCausalLM",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
}
# tokenizer.ggml.pre, which converters look up by a hash of the tokenizer: `get_vocab_base_pre` of conversion/base.py
# names a repository beside each hash. Mixtral's tokenizer is SentencePiece and has none.
PRE_TOKENIZERS = {
    "deepseek_v2": "deepseek-llm",
    "gemma4": None,  # of a kind of its own
    "deepseek_v3": "deepseek-v3",
    "deepseek_v32": "deepseek-v3",
    "deepseek_vl_v2": "deepseek-v3",
    "glm_moe_dsa": "glm4",
    "kimi_k2": "kimi-k2",
    "kimi_k25": "kimi-k2",
    "kimi_vl": "kimi-k2",
    "joyai_llm_flash": "joyai-llm",
    "glm4_moe": "glm4",
    "glm4_moe_lite": "glm4",
    "glm4v_moe": "glm4",
    "glm5_next": "glm4",
    "gpt_oss": "gpt-4o",
    "cohere2_moe": "cohere2moe",
    "lfm2_moe": "lfm2",
    "llama4": "llama4",
    "minimax_m2": "minimax-m2",
    "minimax_m1": "minimax-m2",
    "minimax_m3_vl": "minimax-m2",
    "mistral3": "tekken",
    "mistral4": "tekken",
    "solar_open": "solar-open",
    "qwen3": "qwen2",
    "llama": "llama-bpe",
    "mistral": None,
    "gemma3_text": None,
    "gemma3": None,
    "dots1": "qwen2",
    "bailing_moe": "bailingmoe2",
    "exaone_moe": "exaone-moe",
    "hunyuan": "hunyuan",
    "youtu": "youtu",
    "hy_v3": "hunyuan-dense",
    "mixtral": None,
    "olmoe": "olmo",
    "granitemoe": "refact",
    "granite": "refact",
    "qwen2": "qwen2",
    "granitemoehybrid": "dbrx",
    "nemotron_h": "pixtral",
    "ernie4_5_moe": None,
    "qwen2_moe": "qwen2",
    "mellum": "mellum2",
    "afmoe": "afmoe",
    "laguna": "laguna",
    "qwen3_moe": "qwen2",
    "internvl": "qwen2",
    "internvl_chat": "qwen2",
    "qwen3_next": "qwen2",
    "qwen3_omni_moe": "qwen2",
    "qwen3_vl_moe": "qwen2",
    "qwen3_5_moe_text": "qwen35",
    "qwen3_5_moe": "qwen35",
    "kimi_linear": "kimi-k2",
    "minimax_text_01": "minimax-m2",
    "step3p5": "deepseek-v3",
    "step3p7": "deepseek-v3",
    "mimo_v2_flash": "qwen2",
    "mimo_v2": "qwen2",
    "bailing_hybrid": "bailingmoe2",
    "hy_v4": "hy_v4",
}
# Multi-token prediction layers that the hub's files contain and config.json does not count.
UNCOUNTED_MTP_LAYERS = 1


class _Stub(types.ModuleType):
    """Stands in for torch: every attribute exists, and nothing is computed."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found: Any = type(name, (), {}) if name[0].isupper() else _Stub(name)
        setattr(self, name, found)
        return found

    def __call__(self, *args: object, **kwargs: object) -> Any:
        return self


def configs() -> dict[str, RawConfig]:
    """The configs of released models by name, each config once."""
    found = {model.name: model.config for model in PUBLISHED}
    found |= {name: config for name, config in RELEASED.items() if config not in found.values()}
    return {
        name: {"architectures": [CLASSES.get(config["model_type"])], **config}
        for name, config in found.items()
        if config["model_type"] not in UNKNOWN and name not in WITHOUT_CONVERTER
    }


def load_converters(checkout: Path) -> Any:
    import transformers  # noqa: F401, before the stub, so that it knows that there is no torch

    torch = _Stub("torch")
    torch.__spec__ = importlib.machinery.ModuleSpec("torch", None)
    sys.modules["torch"] = torch
    sys.path[:0] = [str(checkout), str(checkout / "gguf-py")]
    importlib.import_module("conversion").load_all_models()
    return importlib.import_module("conversion.base")


def convert(base: Any, config: RawConfig) -> dict[str, Any]:
    """The metadata about the architecture, as the converter passes it to its writer."""
    base.ModelBase.index_tensors = lambda self, remote_hf_model_id=None: {}
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        if (
            config.get("scoring_func") == "noaux_tc"
        ):  # refused today; converters from the model's time wrote sigmoid
            config = config | {"scoring_func": "sigmoid"}
        (directory / "config.json").write_text(json.dumps(config))
        architecture = config["architectures"][0]
        if "InternVL" in architecture:  # the text model's converter takes the whole config
            architecture = (config.get("llm_config") or config["text_config"])["architectures"][0]
        kind = base.ModelBase.from_model_architecture(architecture)
        # The converter counts these layers while it indexes the tensors, and there are no tensors here.
        if hasattr(kind, "opt_num_mtp_layers"):

            class Counted(kind):  # type: ignore[misc, valid-type]
                model_arch = kind.model_arch

                def index_tensors(self, remote_hf_model_id: str | None = None) -> dict[str, Any]:
                    found: dict[str, Any] = super().index_tensors(remote_hf_model_id)
                    type(self).opt_num_mtp_layers = UNCOUNTED_MTP_LAYERS
                    return found

            kind = Counted
        if hasattr(kind, "_get_suppress_tokens"):  # it looks for rows of zeros in the embeddings
            kind._get_suppress_tokens = lambda self: None
        with reading_itself() if has_own_spelling(config) else nullcontext():
            model = kind(directory, base.gguf.LlamaFileType.MOSTLY_BF16, directory / "model.gguf")
        model = getattr(model, "impl", model)  # some converters only choose another
        model.set_gguf_parameters()
        entries = model.gguf_writer.kv_data[0].items()
        return {key: _typed(entry) for key, entry in entries if key != "general.file_type"}


def _typed(entry: Any) -> Any:
    """The value, as a float if it is written as one, since converters pass ints for some of these."""
    return float(entry.value) if entry.type.name == "FLOAT32" else entry.value


def main() -> None:
    checkout, commit = Path(sys.argv[1]), sys.argv[2]
    base = load_converters(checkout)
    from importlib.metadata import version

    models = json.loads(RECORD.read_text()) if sys.argv[3:] else {}
    models.pop("made with", None)
    for name, config in configs().items():
        if not sys.argv[3:] or name in sys.argv[3:]:
            pre = PRE_TOKENIZERS[config["model_type"]]
            models[name] = {"tokenizer.ggml.pre": pre, **convert(base, config)}
    made_with = {"llama.cpp": commit, "transformers": version("transformers")}
    lines = [f' "made with": {json.dumps(made_with)}']
    for name, metadata in models.items():
        entries = ",\n  ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in metadata.items())
        lines.append(f" {json.dumps(name)}: {{\n  {entries}\n }}")
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
