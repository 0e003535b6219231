"""Families, one file each: the meaning of `config.json` or GGUF metadata, and the names of tensors.

    path  ->  open_model  ->  ModelFiles     a pack, safetensors with config.json, or a GGUF file

A new family needs a file with `MODEL_TYPE`, `LAYOUTS`, `parse_config`, `GGUF_ARCHITECTURE` and `open_gguf`, a test, one
line in `FAMILIES`, and a row in `tests/models/tiny_*.py`. If its GGUF files cannot be read, `GGUF_ARCHITECTURE` is
None, and there is no `open_gguf`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol, cast

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile, is_gguf, read_gguf
from argosy.checkpoint.gguf_names import (
    GGUF_METADATA_FILE,
    GGUF_SUFFIX,
    MMPROJ_METADATA_FILE,
    find_gguf,
    find_mmproj,
)
from argosy.checkpoint.manifest import MANIFEST_FILE, open_pack
from argosy.checkpoint.safetensors import TENSOR_FILES, open_tensors
from argosy.checkpoint.sampling import GENERATION_FILE
from argosy.checkpoint.shards import ALL_SHARDS, COPY_FILE
from argosy.checkpoint.untrusted_file import quote, read_object
from argosy.config import LatentConfig, ModelConfig
from argosy.errors import CheckpointError, UnsupportedModel, UsageError
from argosy.installed import members
from argosy.model.families.nearest import find_nearest
from argosy.model.reading.config_reader import ConfigReader
from argosy.model.reading.layout import Layout, read_layout
from argosy.model.reading.mistral_params import CONFIG_FILE, PARAMS_FILE, find_config, read_raw
from argosy.model.reading.mlx import mlx_layouts
from argosy.model.reading.quantization import read_stored

__all__ = [
    "CONFIG_FILE",
    "FAMILIES",
    "PARAMS_FILE",
    "Family",
    "config_alone",
    "gguf_families",
    "open_model",
    "read_config",
]


class Family(Protocol):
    """The interface of a family file."""

    MODEL_TYPE: str  # `OTHER_TYPES`, if there are any, are further names of the same
    LAYOUTS: tuple[Layout, ...]

    GGUF_ARCHITECTURE: str | None  # `OTHER_ARCHITECTURES`, if there are any, are further ones

    def parse_config(self, raw: Mapping[str, object]) -> ModelConfig: ...

    def open_gguf(self, file: GgufFile) -> ModelFiles: ...


FAMILIES: Mapping[str, Family] = {
    name: cast(Family, family)
    for family in members(
        "argosy.model.families",
        (
            # Before those with experts, whose defaults would read a config without any.
            "attention.qwen3", "attention.qwen2", "attention.granite", "attention.llama", "attention.mistral",
            "attention.ministral3", "attention.gemma3_text", "wrappers.gemma3",
            "attention.mixtral", "attention.qwen2_moe", "attention.qwen3_moe", "attention.gpt_oss",
            "latent.deepseek_v2", "latent.deepseek_v3", "latent.kimi_k2", "wrappers.kimi_k25",
            "latent.glm4_moe_lite", "recurrent.qwen3_next", "wrappers.qwen3_5_moe", "recurrent.qwen3_5_moe_text",
            "attention.glm4_moe", "attention.olmoe", "attention.minimax_m2", "windows.mimo_v2_flash",
            "attention.flex_olmo", "windows.mellum", "windows.afmoe", "windows.laguna", "windows.mimo_v2",
            "windows.flint", "recurrent.lara_mini",
            "wrappers.qwen4_exp", "recurrent.qwen4_exp_text",
            "attention.llama4_text", "wrappers.llama4",
            "attention.step3p5", "wrappers.step3p7", "wrappers.minimax_m3_vl", "attention.cohere2_moe",
            "attention.granitemoe", "attention.granitemoeshared", "attention.ernie4_5_moe",
            "recurrent.minimax", "recurrent.bailing_moe_linear",
            "recurrent.lfm2_moe", "recurrent.granitemoehybrid", "recurrent.nemotron_h", "recurrent.nemotron_h_puzzle",
            "recurrent.kimi_linear", "recurrent.kimi_k3", "recurrent.bailing_hybrid", "recurrent.glm5_next",
            "wrappers.qwen3_vl_moe", "wrappers.qwen3_omni_moe", "wrappers.glm4v_moe", "wrappers.gemma4",
            "wrappers.internvl", "wrappers.internvl_chat", "wrappers.deepseek_ocr",
            "latent.axk1", "wrappers.kimi_vl", "latent.deepseek_v32", "latent.deepseek_v4",
            "latent.deepseek_v41",
            "latent.glm_moe_dsa", "latent.mistral4", "wrappers.mistral3",
            "attention.solar_open", "attention.dots1", "attention.bailing_moe", "attention.hy_v3", "latent.hy_v4",
            "attention.exaone_moe", "attention.hunyuan_v1_moe", "latent.youtu",
        ),
    )
    for name in (family.MODEL_TYPE, *getattr(family, "OTHER_TYPES", ()))
}  # fmt: skip


def open_model(
    path: str | Path,
    *,
    mmproj: str | Path | None = None,
    tower: Path | None = None,
    shards: int = ALL_SHARDS,
    is_copy: bool = False,
) -> ModelFiles:
    """Find and check all files of a model; reads headers, but no weights.

    Args:
        path: a pack; a checkpoint as on the hub, `config.json` and safetensors; a GGUF file, the first
            part of a split model, or a directory that holds exactly one model as `.gguf`.
        mmproj: the file with the vision tower of a GGUF model; None: the one beside it, if there is one.
        tower: such a file found elsewhere. Like one in the model's directory, it does not prevent text from running if
            it is damaged.
        shards: the shards whose experts will be read; a pack may lack the files of others (`manifest.open_pack`).
        is_copy: whether it may be a worker's copy, in which everything but the copied shards is a hole.

    Raises:
        CheckpointError: there is no model, or a file is missing, damaged or contradicts itself.
        UnsupportedModel: the model needs mathematics that is not supported.
        UsageError: `mmproj` is given for a model that is not a GGUF file.
    """
    path = Path(path)
    if not is_copy and ((path if path.is_dir() else path.parent) / COPY_FILE).exists():
        raise CheckpointError(
            f"{path} is a worker's copy, which has only the experts that the worker runs",
            hint="open the model that it was copied from; `argosy worker DIR --copy` runs the copy",
            path=path,
        )
    files = _open(path, None if mmproj is None else Path(mmproj), tower, shards)
    if mmproj is not None and files.header is None:
        raise UsageError(
            f"{path} is not a GGUF model, so its vision tower is not in a file of its own",
            hint="leave out `--mmproj`: the tower is found in the model's own files",
        )
    return files


def _open(path: Path, mmproj: Path | None, tower: Path | None, shards: int) -> ModelFiles:
    if not path.exists():
        raise CheckpointError(f"{path} does not exist", path=path)
    if not path.is_dir():
        if path.suffix != GGUF_SUFFIX and not is_gguf(path):
            raise CheckpointError(
                f"{path} is neither a {GGUF_SUFFIX} file nor a directory with {CONFIG_FILE} and safetensors",
                hint=f"try {path.parent}" if (path.parent / CONFIG_FILE).is_file() else None,
                path=path,
            )
        return _open_gguf(path, mmproj, tower)
    packed = open_pack(path, shards=shards)
    if packed is not None:
        if not (path / GGUF_METADATA_FILE).exists():
            _require_same_config(packed)
        if (path / MMPROJ_METADATA_FILE).exists():
            metadata = read_gguf(path / MMPROJ_METADATA_FILE)
            packed = replace(packed, mmproj=replace(metadata, tensors=packed.others))
        return packed
    if not _has_tensors(path) and (gguf := find_gguf(path)) is not None:
        return _open_gguf(gguf, mmproj, tower)
    config_path = find_config(path)
    if not config_path.exists() and not config_path.is_symlink():
        raise _without_config(path)
    family, config = read_config(path)
    quantization = read_stored(*read_raw(path))
    layouts = (*family.LAYOUTS, *mlx_layouts(family.MODEL_TYPE, family.LAYOUTS[0]))
    return read_layout(path, config, layouts, open_tensors(path), quantization)


def config_alone(path: str | Path) -> ModelConfig | None:
    """Read the configuration in a `config.json`, or in a directory with one but no weights; None for anything else.

    Raises:
        UnsupportedModel: a family, key or value that is not supported.   CheckpointError: a file is malformed.
    """
    path = Path(path)
    if path.name in (CONFIG_FILE, PARAMS_FILE) and path.is_file():
        return read_config(path.parent)[1]
    if not find_config(path).is_file():
        return None
    has_weights = (path / MANIFEST_FILE).exists() or _has_tensors(path) or find_gguf(path) is not None
    return None if has_weights else read_config(path)[1]


def _has_tensors(directory: Path) -> bool:
    return any((directory / name).exists() for name in TENSOR_FILES)


# What GGUF files of other types are, and what to do instead.
_OTHER_KINDS: Mapping[str, tuple[str, str]] = {
    "adapter": (
        "changes to a model's weights (LoRA)",
        "give the model that it was trained for, and `--lora NAME=PATH` names the adapter",
    ),
    "imatrix": ("measurements with which a model is quantised", "give one of the model's quantised files"),
    "mmproj": (
        "the part of a model that sees or hears",
        "give the model's own file; a file with mmproj in its name next to it is found, --mmproj names another",
    ),
}


def _open_gguf(path: Path, mmproj: Path | None, tower: Path | None) -> ModelFiles:
    file = read_gguf(path)
    kind = file.text("general.type", "model")
    if kind != "model":
        what = _OTHER_KINDS.get(kind)
        raise UnsupportedModel(
            f"{path.name} is a GGUF of type '{quote(kind)}'{f', {what[0]}' if what else ''}; supported: model",
            hint=what[1] if what else "give the GGUF file of a model",
            path=path,
            key="general.type",
            value=kind,
            supported=("model",),
        )
    architecture = file.text("general.architecture")
    families = gguf_families()
    if architecture not in families:
        raise UnsupportedModel(
            f"{path.name} has architecture '{quote(architecture)}'; supported: {', '.join(families)}",
            path=path,
            key="general.architecture",
            value=architecture,
            supported=list(families),
        )
    if not file.tensors:
        raise CheckpointError(
            f"{path.name} has no tensors: it holds a vocabulary and settings, but no weights",
            hint="give a file of the same model with its weights",
            path=path,
        )
    return _with_mmproj(families[architecture].open_gguf(file), mmproj, tower)


def gguf_families() -> dict[str, Family]:
    """Return the family of each GGUF architecture that is read; families that share one share its reader."""
    return {
        architecture: family
        for family in FAMILIES.values()
        if family.GGUF_ARCHITECTURE is not None
        for architecture in (family.GGUF_ARCHITECTURE, *getattr(family, "OTHER_ARCHITECTURES", ()))
    }


def _with_mmproj(files: ModelFiles, given: Path | None, tower: Path | None) -> ModelFiles:
    """Add the file with the vision tower. If the caller did not name it, a damaged one does not prevent text from
    running.
    """
    try:
        path = given or tower or find_mmproj(files.path)
        if path is None:
            return files
        opened = read_gguf(path)
    except (CheckpointError, UnsupportedModel) as error:
        if given is not None:
            raise
        return replace(files, mmproj=error)
    return replace(files, mmproj=opened, others=opened.tensors)


def read_config(directory: Path) -> tuple[Family, ModelConfig]:
    """Return the family and configuration of a checkpoint.

    If there is a `generation_config.json`, it decides which tokens end an answer.

    Raises:
        UnsupportedModel: a family, key or value that is not supported.   CheckpointError: a file is malformed.
    """
    raw, path = read_raw(directory)
    model_type = raw.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        nearest = find_nearest(raw, ((name, one.parse_config) for name, one in FAMILIES.items()))
        raise UnsupportedModel(
            f"{path.name} asks for model_type '{quote(model_type)}'; supported: {', '.join(FAMILIES)}",
            hint=None if nearest is None else str(nearest),
            path=path,
            key="model_type",
            value=model_type,
            supported=list(FAMILIES),
        )
    config = family.parse_config(raw)
    generation_path = directory / GENERATION_FILE
    if generation_path.exists():
        reader = ConfigReader(read_object(generation_path), family.MODEL_TYPE, generation_path)
        eos_ids = reader.token_ids("eos_token_id")
        if eos_ids:
            config = replace(config, eos_ids=eos_ids)
    return family, config


def _require_same_config(packed: ModelFiles) -> None:
    """Prove that a pack's manifest agrees with its `config.json`."""
    family, config = read_config(packed.path)
    # Only the tensors, not config.json, show whether the head is a separate tensor, whether norms are stored minus one,
    # whether kv_up is split, and, in some families, whether routers have a bias for the choice.
    config = replace(
        config,
        is_embedding_tied=packed.config.is_embedding_tied,
        norm_offset=packed.config.norm_offset,
    )
    if any(layout.has_optional_bias for layout in family.LAYOUTS):
        router = replace(config.router, has_choice_bias=packed.config.router.has_choice_bias)
        config = replace(config, router=router)
    if packed.config.latent is not None:
        config = config.with_mixers(LatentConfig, is_up_split=packed.config.latent.is_up_split)
    if config != packed.config:
        raise CheckpointError(
            f"{MANIFEST_FILE} and {CONFIG_FILE} in {packed.path} describe different models",
            hint="pack the source again",
            path=packed.path,
        )


def _without_config(directory: Path) -> CheckpointError:
    names = sorted(entry.name for entry in directory.iterdir())
    weights = [name for name in names if name.endswith((".safetensors", ".bin", ".pt", ".pth"))]
    looked_for = (
        f"looked for {MANIFEST_FILE} (a pack), for {CONFIG_FILE} with {' or '.join(TENSOR_FILES[:2])}, and for a "
        f"{GGUF_SUFFIX} file"
    )
    found = f", found {quote(weights[0])} without {CONFIG_FILE}" if weights else ""
    return CheckpointError(f"{directory} holds no model: {looked_for}{found}", path=directory)
