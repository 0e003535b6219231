"""Find the `quantization_config` of a `config.json`: how weights are stored, which changes no mathematics.

    raw config  ->  read_quantization  ->  Quantization: the scheme of each module

    the same    ->  read_stored  ->  the same; modelopt may describe it in `hf_quant_config.json` instead

Every key is read, or known to change nothing, or refused by name. The tensors in the files tell which matrices are
quantised (`coded_weights.py`), and `quantization_config` is checked against them. In a multimodal config it may be at
the top level or in the text part. MLX has its settings in `quantization` (`mlx_quantization.py`).

Elsewhere: `quantization_methods.py` reads the settings of each method.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from argosy.checkpoint.untrusted_file import quote, read_object
from argosy.errors import CheckpointError
from argosy.model.reading.mlx_quantization import read_mlx
from argosy.model.reading.quantization_methods import ALIASES, METHODS, REFUSED
from argosy.model.reading.schemes import KEY, Quantization, SettingsReader

__all__ = ["KEY", "KEYS", "MLX_KEY", "MODELOPT_FILE", "read_quantization", "read_stored"]

MLX_KEY = "quantization"
_FORMER_KEY = "compression_config"  # of compressed-tensors until 2024
KEYS = (KEY, MLX_KEY, _FORMER_KEY)
MODELOPT_FILE = "hf_quant_config.json"
_OF_EXPERTS = "expert_dtype"
_DETAILS = "quantization"  # the key of that file
# Its possible places: the top level, or the text parts of a multimodal config.
_PARTS = ((), ("text_config",), ("thinker_config",), ("thinker_config", "text_config"))
SUPPORTED = f"{', '.join(METHODS)}, and unquantised bf16, f16 and f32 tensors; under {MLX_KEY}: MLX's modes"


def read_stored(raw: Mapping[str, object], config: Path) -> Quantization | None:
    """Read how weights are stored, from the `config.json` beside them, or from the file `config` with the same keys.

    Raises:
        UnsupportedModel, CheckpointError: as `read_quantization`; or two files contradict each other.
    """
    path = config.with_name(MODELOPT_FILE)
    found = read_quantization(raw, config)
    if not path.exists() or (found is not None and found.method != "modelopt"):
        return found
    details = read_object(path).get(_DETAILS)
    reader = SettingsReader(details, path, _DETAILS, SUPPORTED)
    own = METHODS["modelopt"](reader)
    if found is None:
        return replace(own, where=path.name)
    said = _said(raw, KEY, config)
    algorithm = said.get("quant_algo") if isinstance(said, Mapping) else None
    if algorithm != reader.settings.get("quant_algo"):
        raise CheckpointError(
            f"{config.name} says quant_algo {quote(algorithm)}, and {path.name} says "
            f"{quote(reader.settings.get('quant_algo'))}",
            hint="the files of two checkpoints may have been mixed; fetch them again",
            path=path,
            key="quant_algo",
        )
    return found


def read_quantization(raw: Mapping[str, object], path: Path = Path("config.json")) -> Quantization | None:
    """Read the quantisation that a config describes, or None.

    Raises:
        UnsupportedModel: the method or its variant is not supported.
        CheckpointError: it is not an object, or appears twice with different values.
    """
    said = _said(raw, KEY, path)
    if (mlx := _said(raw, MLX_KEY, path)) is not None:
        # `quantization_config` repeats them, or describes the checkpoint that MLX converted.
        if said not in (None, mlx) and not (isinstance(said, dict) and "quant_method" in said):
            raise CheckpointError(
                f"{path.name} has {MLX_KEY} and {KEY} with different values, and neither names a quant_method",
                path=path,
                key=KEY,
            )
        return read_mlx(SettingsReader(mlx, path, MLX_KEY, SUPPORTED))
    if said is None:
        return None
    reader = SettingsReader(said, path, KEY, SUPPORTED)
    method = reader.settings.get("quant_method", reader.settings.get("quant_algo", "unknown"))
    if method == "unknown" and {"group_size", "bits"} <= reader.settings.keys():
        return read_mlx(reader)
    if (
        method == "fp8" and raw.get(_OF_EXPERTS) and _OF_EXPERTS not in reader.settings
    ):  # DeepSeek-V4 has it outside
        reader.settings = {**reader.settings, _OF_EXPERTS: raw[_OF_EXPERTS]}
    name = ALIASES.get(method, method) if isinstance(method, str) else ""
    if name not in METHODS:
        raise reader.refused(KEY, method, hint=REFUSED.get(name))
    return METHODS[name](reader)


def _said(raw: Mapping[str, object], key: str, path: Path) -> object:
    """Return the settings under a key of a config or its parts, or None; if there are several, they must agree."""
    said = list(_all_said(raw, key))
    for where, other in said[1:]:
        if other != said[0][1]:
            raise CheckpointError(
                f"{path.name} has two different values of {key}, one of them in {where}", path=path, key=key
            )
    return said[0][1] if said else None


def _all_said(raw: Mapping[str, object], key: str) -> Iterator[tuple[str, object]]:
    """Yield every value of a key, or its former name, in a config and its parts; each with its place."""
    for path in _PARTS:
        part: object = raw
        for name in path:
            part = part.get(name) if isinstance(part, dict) else None
        for one in (key, _FORMER_KEY) if key == KEY else (key,):
            if isinstance(part, Mapping) and part.get(one) is not None:
                yield ".".join(path if one == key else (*path, one)), part[one]
