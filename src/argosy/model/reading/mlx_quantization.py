"""Read MLX's `quantization`: codes, scales and biases in groups along a row, in one of four modes.

    mode     bits of a code      columns of a group   scales      value
    affine   2, 3, 4, 5, 6, 8    32, 64, 128          f16, bf16   scale * code + bias
    mxfp4    4                   32                   E8M0        E2M1 code * scale
    nvfp4    4                   16                   E4M3        E2M1 code * scale
    mxfp8    8                   32                   E8M0        E4M3 code * scale

Settings of single modules stand under their paths. A module without its own settings is described by its tensors, as
`infer_quant_config` of mlx-lm reads it: the settings for all are often those of most modules only. Modules that do not
exist may have settings, because mlx-vlm also writes those of towers.

Sources: `load_model` of mlx-lm 0.32; `quantize` of mlx 0.32.
"""

from __future__ import annotations

from collections.abc import Mapping

from argosy.checkpoint.safetensors import TensorRef
from argosy.checkpoint.untrusted_file import quote
from argosy.errors import CheckpointError
from argosy.model.reading.schemes import EVERYTHING, Names, Quantization, Rule, Scheme, SettingsReader

_AFFINE_BITS = (2, 3, 4, 5, 6, 8)
_AFFINE_GROUPS = (32, 64, 128)
# The only bits and group of each other mode.
_FLOAT_MODES: Mapping[str, tuple[int, int]] = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}
_DEFAULTS = {"affine": (4, 64), **_FLOAT_MODES}
AS_ITS_TENSORS = "mlx"  # the storage of modules without settings of their own


def storage_of(mode: str) -> str:
    """Return the storage of a mode, a key of `STORAGES` in `coded_weights.py`."""
    return f"mlx-{mode}"


def read_mlx(reader: SettingsReader) -> Quantization:
    """Read the settings for all modules, and those of single ones: an object, or whether the module is quantised.

    Raises:
        UnsupportedModel: a setting is unknown or not supported.
    """
    _scheme(reader, {key: reader.settings[key] for key in _KEYS if key in reader.settings}, reader.key)
    names: dict[Scheme | None, set[str]] = {}
    for path, given in reader.settings.items():
        if path in _KEYS or given is True:
            continue
        scheme = None
        if given is not False:
            fields = reader.mapping(given, f"{reader.key}.{path}")
            reader.keys(fields, f"{reader.key}.{path}", *_KEYS)
            scheme = _scheme(reader, fields, f"{reader.key}.{path}")
        names.setdefault(scheme, set()).add(path)
    rules = (Rule(Names(exact=frozenset(exact)), scheme) for scheme, exact in names.items())
    every = Rule(EVERYTHING, Scheme(storage=AS_ITS_TENSORS, bits=0, block=(1, 0)))
    return Quantization("mlx", (*rules, every), where="the quantization of config.json")


_KEYS = ("group_size", "bits", "mode")


def _scheme(reader: SettingsReader, given: Mapping[str, object], where: str) -> Scheme:
    mode = str(reader.choice(given, where, "mode", *_DEFAULTS, default="affine"))
    bits, group = _DEFAULTS[mode]
    is_affine = mode == "affine"
    found_bits = reader.choice(given, where, "bits", *(_AFFINE_BITS if is_affine else (bits,)), default=bits)
    found_group = reader.choice(
        given, where, "group_size", *(_AFFINE_GROUPS if is_affine else (group,)), default=group
    )
    assert isinstance(found_bits, int)
    assert isinstance(found_group, int)
    return Scheme(storage=storage_of(mode), bits=found_bits, block=(1, found_group))


def scheme_of_tensors(codes: TensorRef, scales: TensorRef | None, cols: int) -> Scheme:
    """Return the scheme that the shapes of codes and scales [..., rows, columns] show.

    Raises:
        CheckpointError: there are no scales, or they fit no mode.
    """
    if scales is None:
        raise CheckpointError(
            f"{codes.path.name}: {quote(codes.name)} is {codes.dtype}, MLX's codes, but its scales are missing",
            hint="fetch the model's files again",
            path=codes.path,
            tensor=codes.name,
        )
    bits, rest = divmod(codes.shape[-1] * 32, cols)
    group, left = divmod(cols, scales.shape[-1]) if scales.shape and scales.shape[-1] else (0, 1)
    mode = "affine"
    if scales.dtype == "U8":
        mode = next((mode for mode, size in _FLOAT_MODES.items() if size == (bits, group)), "")
    is_known = bits in _AFFINE_BITS and group in _AFFINE_GROUPS if mode == "affine" else bool(mode)
    if rest or left or not is_known:
        raise CheckpointError(
            f"{codes.path.name}: {quote(codes.name)} {list(codes.shape)} with scales {scales.dtype} "
            f"{list(scales.shape)} fits no mode of MLX for {cols} columns",
            path=codes.path,
            tensor=codes.name,
        )
    return Scheme(storage=storage_of(mode), bits=bits, block=(1, group))
