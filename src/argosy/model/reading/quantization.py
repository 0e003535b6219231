"""Read the `quantization_config` of a `config.json`: how weights are stored, which changes no mathematics.

    raw config  ->  read_quantization  ->  Quantization: the method, and which modules keep their floats

    quant_method         required settings                                     the tensors of a matrix
    fp8                  weight_block_size [128, 128]                          weight, weight_scale_inv
    compressed-tensors   format pack-quantized: int4, symmetric, groups of 32  weight_packed, weight_scale, weight_shape
    mxfp4                -                                                     *_blocks, *_scales

Every key is read, or known to change nothing, or refused by name. The tensors in the files tell which matrices are
quantised (`layout.py`), and `quantization_config` is checked against them. In a multimodal config it may be at the
top level or in the text part.

Sources: `FineGrainedFP8Config` and `Mxfp4Config` of transformers 5.24; `QuantizationConfig` and `QuantizationArgs` of
compressed-tensors 0.12.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from argosy.checkpoint.untrusted_file import quote
from argosy.errors import CheckpointError, UnsupportedModel

QuantizationMethod = Literal["fp8", "int4", "mxfp4"]

KEY = "quantization_config"
# Its possible places: the top level, or the text parts of a multimodal config.
_PARTS = ((), ("text_config",), ("thinker_config",), ("thinker_config", "text_config"))
FP8_BLOCK = 128
INT4_GROUP = 32
MXFP4_GROUP = 32
_LONGEST_EXPRESSION = 1024
_MOST_REPETITIONS = 3  # in an expression that names modules
_MOST_ALTERNATIVES = 8
_MOST_GROUPS = 64  # Python compiles groups within groups recursively

SUPPORTED = (
    f"fp8 with weight_block_size [{FP8_BLOCK}, {FP8_BLOCK}], "
    f"compressed-tensors pack-quantized with symmetric int4 in groups of {INT4_GROUP}, mxfp4, "
    "and unquantised bf16, f16 and f32 tensors"
)


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a checkpoint's quantised weights are stored, and which modules are declared unquantised."""

    method: QuantizationMethod
    # Names of modules; "re:" starts a regular expression. `excludes` says what they match.
    excluded: tuple[str, ...] = ()

    def excludes(self, module: str) -> bool:
        """Whether a module, such as "model.layers.0.self_attn.q_proj", is declared unquantised.

        In compressed-tensors, a name matches only itself, and an expression matches a prefix of a module's name
        (`_match_name` in its `utils/match.py`). In the other methods, a name also matches everything inside it, and
        every module whose path ends in it (`should_convert_module` of transformers).
        """
        has_parts = self.method != "int4"
        return any(
            re.match(name[3:], module) is not None
            if name.startswith("re:")
            else module == name
            or (has_parts and (module.startswith(name + ".") or module.endswith("." + name)))
            for name in self.excluded
        )


def _fault_of_expression(expression: str) -> str | None:
    """Return why a checkpoint's regular expression is refused, or None if it is accepted.

    Matching backtracks over repetitions and alternatives, so a hostile file could make it take hours. With few of them
    and no nesting it cannot: a module's name has a hundred characters.
    """
    if len(expression) > _LONGEST_EXPRESSION:
        return f"has {len(expression)} characters; at most {_LONGEST_EXPRESSION} are read"
    # The expression without [sets] and \escapes; a set that stays open takes the rest.
    plain = re.sub(r"\\.|\[\^?\]?(?:\\.|[^]\\])*\]?", "x", expression, flags=re.DOTALL)
    plain = re.sub(r"\(\?[:=!]", "(", plain)
    if "(?" in plain or re.search(r"\)[*+?{]", plain):
        return "repeats a group, or opens one with (? other than (?:, (?= and (?!"
    if len(re.findall(r"[*+?{]", plain)) > _MOST_REPETITIONS or plain.count("|") > _MOST_ALTERNATIVES:
        return f"has more than {_MOST_REPETITIONS} repetitions or {_MOST_ALTERNATIVES} alternatives"
    if plain.count("(") > _MOST_GROUPS:
        return f"has more than {_MOST_GROUPS} groups"
    try:
        re.compile(expression)
    except (re.error, OverflowError) as error:
        return f"is not a valid regular expression: {error}"
    return None


def read_quantization(raw: Mapping[str, object], path: Path = Path("config.json")) -> Quantization | None:
    """Read the quantisation that a config describes, or None.

    Raises:
        UnsupportedModel: the method or its variant is not supported.
        CheckpointError: it is not an object, or appears twice with different values.
    """
    said = list(_all_said(raw))
    if not said:
        return None
    _, given = said[0]
    for where, other in said[1:]:
        if other != given:
            raise CheckpointError(
                f"{path.name} has two different values of {KEY}, one of them in {where}", path=path, key=KEY
            )
    return _Reader(given, path).read()


def _all_said(raw: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Yield every `quantization_config` of a config and its parts, each with the name of its part."""
    for path in _PARTS:
        part: object = raw
        for name in path:
            part = part.get(name) if isinstance(part, dict) else None
        if isinstance(part, Mapping) and part.get(KEY) is not None:
            yield ".".join(path), part[KEY]


class _Reader:
    """One pass over a `quantization_config`; an unread key is refused."""

    def __init__(self, given: object, path: Path) -> None:
        self._path = path
        self._config = given
        if not isinstance(given, dict):
            raise self._refused(KEY, given)

    def read(self) -> Quantization:
        config = self._mapping(self._config, KEY)
        match method := config.get("quant_method", config.get("quant_algo", "unknown")):
            case "fp8":
                return self._fp8(config)
            case "compressed-tensors":
                return self._int4(config)
            case "mxfp4":
                self._keys(config, KEY, "quant_method", "modules_to_not_convert", dequantize=(False, None))
                return Quantization("mxfp4", self._names(config, "modules_to_not_convert"))
            case _:
                raise self._refused(KEY, method)

    def _fp8(self, config: Mapping[str, object]) -> Quantization:
        if config.get("weight_block_size") != [FP8_BLOCK, FP8_BLOCK]:
            raise self._refused(f"{KEY}.weight_block_size", config.get("weight_block_size"))
        self._keys(
            config, KEY, "quant_method", "weight_block_size", "modules_to_not_convert", "ignored_layers",
            activation_scheme=("dynamic",),
            fmt=("e4m3", "float8_e4m3fn", None),
            scale_fmt=("ue8m0", "float", None),  # the scales are float32 or bf16 in any case
            dequantize=(False, None),
            kv_cache_scheme=(None,),
        )  # fmt: skip
        names = self._names(config, "modules_to_not_convert") + self._names(config, "ignored_layers")
        return Quantization("fp8", names)

    def _int4(self, config: Mapping[str, object]) -> Quantization:
        if config.get("format") != "pack-quantized":
            raise self._refused(f"{KEY}.format", config.get("format"))
        self._keys(
            config, KEY, "quant_method", "format", "config_groups", "ignore",
            "global_compression_ratio", "version",
            quantization_status=("compressed", "frozen", None),
            kv_cache_scheme=(None,),
            sparsity_config=(None, {}),
            transform_config=(None, {}),
        )  # fmt: skip
        groups = self._mapping(config.get("config_groups"), f"{KEY}.config_groups")
        if not groups:
            raise self._refused(f"{KEY}.config_groups", groups)
        for name, group in groups.items():
            where = f"{KEY}.config_groups.{name}"
            fields = self._mapping(group, where)
            self._keys(
                fields, where, "weights",
                targets=(["Linear"],),
                input_activations=(None,),
                output_activations=(None,),
                format=("pack-quantized", None),
            )  # fmt: skip
            self._int4_weights(self._mapping(fields.get("weights"), f"{where}.weights"), f"{where}.weights")
        return Quantization("int4", self._names(config, "ignore"))

    def _int4_weights(self, weights: Mapping[str, object], where: str) -> None:
        wanted = {
            "num_bits": 4,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": INT4_GROUP,
        }
        for key, value in wanted.items():
            if (
                key not in weights
                or weights[key] != value
                or isinstance(weights[key], bool) != isinstance(value, bool)
            ):
                raise self._refused(f"{where}.{key}", weights.get(key))
        self._keys(
            weights, where, *wanted, "observer", "observer_kwargs",
            dynamic=(False,),
            actorder=(None,),
            block_structure=(None,),
            scale_dtype=(None, "torch.bfloat16", "bfloat16"),
            zp_dtype=(None, "torch.int8", "int8"),
        )  # fmt: skip

    def _keys(
        self, given: Mapping[str, object], where: str, *read: str, **neutral: tuple[object, ...]
    ) -> None:
        """Refuse a key that is neither read nor neutral, and a neutral key whose value would change something."""
        for key, value in given.items():
            if key in read:
                continue
            if key not in neutral or value not in neutral[key] or (value == 0 and value is not False):
                raise self._refused(f"{where}.{key}", value)

    def _names(self, config: Mapping[str, object], key: str) -> tuple[str, ...]:
        names = config.get(key)
        if names is None:
            return ()
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise CheckpointError(
                f"{self._path.name}: {KEY}.{key} is {quote(names)}; expected a list of strings or null",
                path=self._path,
                key=KEY,
            )
        for name in names:
            if name.startswith("re:") and (fault := _fault_of_expression(name[3:])):
                raise CheckpointError(
                    f"{self._path.name}: {KEY}.{key} has '{quote(name)}', which {fault}",
                    path=self._path,
                    key=KEY,
                )
        return tuple(names)

    def _mapping(self, value: object, where: str) -> Mapping[str, object]:
        if not isinstance(value, dict):
            raise self._refused(where, value)
        return value

    def _refused(self, where: str, value: object) -> UnsupportedModel:
        named = value is None or isinstance(value, bool)
        said = json.dumps(value) if named else f"'{quote(value)}'" if isinstance(value, str) else quote(value)
        return UnsupportedModel(
            f"{self._path.name} asks for {where} {said}; supported: {SUPPORTED}",
            hint="get the checkpoint in one of these forms; `argosy pack --format q8` or `q4` then makes it smaller",
            path=self._path,
            key=KEY,
            value=value,
            supported=SUPPORTED,
        )
