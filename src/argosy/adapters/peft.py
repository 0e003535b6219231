"""Read a PEFT directory: `adapter_config.json` and `adapter_model.safetensors`.

W' = W + s B A for `base_model.model.<module>.lora_A.weight` [r, in] and `.lora_B.weight` [out, r], with s = alpha / r,
or alpha / sqrt(r) if `use_rslora`. A module whose parameters hold all experts (`target_parameters`) has A [r * E, in],
the expert slowest, and B [out, r * E], the expert fastest; a second parameter of the module has its pair under
`.base_layer`.
With `use_dora`, every module has lengths of rows, `.lora_magnitude_vector` [out] (`magnitudes.py`), those of the
embedding table for its columns.
Keys of the config that change the mathematics and are not listed here are refused.

Sources: `tuners/lora` and `utils.save_and_load` of peft 0.18 to 0.21.2.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from argosy.adapters.files import AdapterFiles
from argosy.adapters.names import Dense, Draft, Expert, Fused, ModuleNames
from argosy.adapters.pairs import ExpertOrder, PairCollector, base_hint
from argosy.adapters.patterns import MOST_PATTERNS, PatternError, compile_pattern
from argosy.adapters.targets import is_replaceable
from argosy.adapters.values import MOST_RANK, MOST_TOKENS, AdapterTensors
from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.safetensors import TensorRef, read_header
from argosy.checkpoint.untrusted_file import quote, read_object
from argosy.errors import CheckpointError, UnsupportedModel

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

# Keys that say how the adapter was trained or saved, and change nothing afterwards.
_PASSED = frozenset(
    {
        "base_model_name_or_path", "revision", "inference_mode", "lora_dropout", "target_modules", "exclude_modules",
        "layers_to_transform", "layers_pattern", "task_type", "peft_version", "auto_mapping", "loftq_config",
        "eva_config", "corda_config", "lora_ga_config", "velora_config", "megatron_core", "qalora_group_size",
        "init_lora_weights", "runtime_config", "fan_in_fan_out", "modules_to_save",
    }
)  # fmt: skip
_READ = frozenset(
    {
        "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_parameters",
        "alora_invocation_tokens", "ensure_weight_tying", "bias", "use_dora",
    }
)  # fmt: skip
_WHY = {
    "lora_bias": "biases of pairs",
    "use_qalora": "QALoRA pools the input",
    "layer_replication": "layers used twice",
    "trainable_token_indices": "single trained rows of the embedding",
    "megatron_config": "pairs divided for Megatron",
}
# Ways to begin that subtract the pair from the base's weights, so that the pair alone fits no released base.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

_TENSOR = re.compile(
    r"base_model\.model\.(?P<module>.+?)\.(?P<part>lora_[AB]\.(?:weight|bias)|lora_embedding_[AB]|"
    r"lora_magnitude_vector(?:\.weight)?|base_layer\.weight|weight|bias)"
)


@dataclass(frozen=True)
class _Config:
    """The keys that matter."""

    rank: Callable[[str], int]
    scale: Callable[[str, int], float]
    ties: bool
    is_dora: bool
    target_parameters: tuple[str, ...]
    invocation_tokens: tuple[int, ...]
    version: tuple[int, ...]  # of PEFT
    is_unsloth: bool
    about: bytes  # of the digest


_MERGE = "merge the adapter into its base model, and open that"


def open_peft(directory: Path, files: ModelFiles, columns: ExpertOrder) -> AdapterFiles:
    """Read a directory that PEFT has written.

    Raises:
        CheckpointError: it is damaged or incomplete, or was trained for another base.
        UnsupportedModel: it asks for something that is not supported.
    """
    raw = read_object(directory / CONFIG_FILE)
    config, base = _read_config(raw, directory), raw.get("base_model_name_or_path")
    if any(token >= files.own_config.vocab_size for token in config.invocation_tokens):
        raise CheckpointError(
            f"{CONFIG_FILE}: alora_invocation_tokens has {max(config.invocation_tokens)}, expected token ids below "
            f"{files.own_config.vocab_size}",
            hint=base_hint(base, files.own_config),
            key="alora_invocation_tokens",
        )
    path = directory / WEIGHTS_FILE
    return _PeftReader(AdapterTensors(path, read_header(path)), files, config, columns, base).read()


class _PeftReader:
    """One directory, tensor by tensor."""

    def __init__(
        self,
        tensors: AdapterTensors,
        files: ModelFiles,
        config: _Config,
        columns: ExpertOrder,
        base: object,
    ) -> None:
        self._tensors, self._config, self._columns = tensors, config, columns
        self._model = files.own_config
        self._names = ModuleNames(files.own_config)
        self._collector = PairCollector(tensors, files.own_config, self._names, base)
        self._fused: dict[str, list[str]] = {}
        self._notes: list[str] = []

    def read(self) -> AdapterFiles:
        about = self._config.about + self._columns.encode()
        digest = self._tensors.prove(about)
        for name in self._tensors.names:
            found = _TENSOR.fullmatch(name)
            if found is not None:
                self._read_one(name, found["module"], found["part"])
        for module, nestings in self._fused.items():
            self._read_fused(module, nestings)
        if self._fused and self._config.is_unsloth and self._columns == "expert_fastest":
            self._notes.append(
                "the adapter was made with Unsloth and has pairs for fused experts: if it was trained before "
                "unsloth-zoo of 2026-09-17, its columns are in another order, which `--lora-columns expert_slowest` "
                "reads"
            )
        return self._collector.finish(
            "peft", digest, invocation_tokens=self._config.invocation_tokens, notes=tuple(self._notes)
        )

    def _read_one(self, name: str, module: str, part: str) -> None:
        if part.startswith("lora_magnitude") and not self._config.is_dora:
            raise self._tensors.refuse(name, f"belongs to DoRA, but {CONFIG_FILE} does not set use_dora")
        if part.endswith("bias"):
            raise self._tensors.refuse(name, "is a bias; supported: weights", _MERGE)
        if part in ("weight", "base_layer.weight"):
            self._read_whole(name, module, is_base=part != "weight")
        elif part == "lora_A.weight":
            self._read_pair(module, name)
        elif part == "lora_embedding_A":
            self._read_embedding(module)

    def _find(self, module: str, name: str) -> Dense | Expert | Fused | Draft:
        found = self._names.find(module)
        if found is None:
            raise self._collector.no_module(name, module)
        return found

    def _read_pair(self, module: str, name: str) -> None:
        nested, other = module, f"base_model.model.{module}.lora_B.weight"
        while nested.endswith(".base_layer"):
            nested = nested.removesuffix(".base_layer")
        found = self._find(nested, name)
        if self._config.is_dora and isinstance(found, Expert | Fused):
            raise self._tensors.refuse(
                name,
                "is a pair of routed experts with use_dora; DoRA is supported for dense matrices",
                _MERGE,
            )
        match found:
            case Draft():
                self._tensors.take(name)
                self._tensors.take(other)
                self._magnitude(module)
                self._note_draft()
            case Fused():
                self._fused.setdefault(nested, []).append(module)
            case Dense() | Expert():
                if nested != module:
                    raise self._tensors.refuse(name, "is a second pair for one module")
                down, up = self._tensors.take(name), self._tensors.take(other)
                scale = self._scale(module, name, down.shape[0] if down.shape else 0)
                if isinstance(found, Expert):
                    self._collector.add_expert(found, down, up, scale)
                elif found.parts[0].name == "embed":
                    raise self._tensors.refuse(
                        name, "is a pair of the embedding table; expected lora_embedding_A"
                    )
                else:
                    self._collector.add_dense(
                        found, down, up, scale, up_is_turned=False, magnitude=self._magnitude(module)
                    )

    def _magnitude(self, module: str) -> TensorRef | None:
        """Take the lengths of a module's rows, which files of older versions name `.weight`; None: there is no DoRA."""
        if not self._config.is_dora:
            return None
        name = f"base_model.model.{module}.lora_magnitude_vector"
        return self._tensors.take(f"{name}.weight" if f"{name}.weight" in self._tensors else name)

    def _note_draft(self) -> None:
        note = "its pairs for the layer that drafts are not used: drafts run without adapters"
        if note not in self._notes:
            self._notes.append(note)

    def _read_embedding(self, module: str) -> None:
        prefix = f"base_model.model.{module}.lora_embedding_"
        found = self._find(module, prefix + "A")
        if not isinstance(found, Dense) or found.parts[0].name != "embed":
            raise self._tensors.refuse(
                prefix + "A", f"is a pair of {quote(module)}, which is no embedding table"
            )
        if self._config.ties and self._model.is_embedding_tied:
            raise self._tensors.refuse(
                prefix + "A", "changes the head as well (ensure_weight_tying), which is not supported", _MERGE
            )
        rows, up = self._tensors.take(prefix + "A"), self._tensors.take(prefix + "B")
        scale = self._scale(module, prefix + "A", rows.shape[0] if rows.shape else 0)
        lengths = self._collector.magnitude(self._magnitude(module), found.shape[1])
        self._collector.add_embedding(
            rows,
            up,
            scale,
            rows_are_turned=True,
            up_is_turned=True,
            magnitude=None if lengths is None else lengths.reshape(1, -1),
        )

    def _read_whole(self, name: str, module: str, *, is_base: bool) -> None:
        """Read a matrix of `modules_to_save`, or the base's embedding or head, which PEFT saves with their pairs."""
        found = self._find(module, name)
        canonical = found.parts[0].name if isinstance(found, Dense) and len(found.parts) == 1 else ""
        pair = f"base_model.model.{module}.lora_"
        if is_base and (pair + "A.weight" in self._tensors or pair + "embedding_A" in self._tensors):
            assert isinstance(found, Dense)
            self._collector.require_shape(self._tensors.take(name), found.shape)
            return
        if is_base or not is_replaceable(canonical):
            raise self._tensors.refuse(
                name, "replaces a whole matrix; supported for embedding, head and routers", _MERGE
            )
        ref = self._tensors.take(name)
        self._collector.replace(canonical, ref)
        is_one = canonical == "embed" and self._model.is_embedding_tied and self._config.ties
        if is_one and not any(one.endswith("lm_head.weight") for one in self._tensors.names):
            self._collector.replace("head", ref)

    def _scale(self, module: str, name: str, rank: int) -> float:
        expected = self._config.rank(module)
        if rank != expected:
            raise CheckpointError(
                f"{self._tensors.path.name}: {quote(name)} has rank {rank}, but {CONFIG_FILE} gives {expected} for "
                f"{quote(module)}",
                path=self._tensors.path,
                tensor=name,
            )
        return self._config.scale(module, rank)

    def _read_fused(self, module: str, nestings: Sequence[str]) -> None:
        """Read the pairs of parameters that hold all experts of a layer: an inner pair belongs to an earlier one."""
        found = self._names.find(module)
        assert isinstance(found, Fused)
        inner_first = sorted(nestings, key=len, reverse=True)
        depth = [(len(one) - len(module)) // len(".base_layer") for one in inner_first]
        name = f"base_model.model.{inner_first[0]}.lora_A.weight"
        if depth != list(range(len(depth)))[::-1] or len(depth) > len(found.parameters):
            raise self._tensors.refuse(name, "is nested more deeply than the module has parameters")
        parameters = list(found.parameters)
        if len(depth) < len(parameters):
            parameters = [self._only_parameter(module, found, name)]
        for nesting, parameter in zip(inner_first, parameters, strict=True):
            self._read_parameter(module, nesting, parameter, found)

    def _only_parameter(self, module: str, found: Fused, name: str) -> str:
        """Return the parameter that the only pair of a module belongs to, by what the config targets and by shape."""
        targets = self._config.target_parameters
        candidates = [
            one
            for one in found.parameters
            if any(
                f"{module}.{one}" == target or f"{module}.{one}".endswith("." + target) for target in targets
            )
        ] or list(found.parameters)
        down = self._tensors.take(name)
        up = self._tensors.take(name.removesuffix("A.weight") + "B.weight")
        fitting = [one for one in candidates if self._sides(found.parameters[one], down.shape, up.shape)]
        if len(fitting) != 1:
            if not fitting:
                shapes = " or ".join(str(list(found.parameters[one].shape)) for one in candidates)
                raise self._collector.other_base(down, f"pairs of matrices {shapes}")
            raise self._tensors.refuse(
                name, f"may belong to {' or '.join(fitting)}: expected one of them in target_parameters"
            )
        return fitting[0]

    def _sides(self, expert: Expert, down: tuple[int, ...], up: tuple[int, ...]) -> list[bool]:
        """Return whether a pair may be straight, or swapped, with its first matrix over the rows."""
        if len(down) != 2 or len(up) != 2:
            return [False] if len(down) == len(up) == 3 else []
        rows, columns = expert.shape
        return [
            swapped
            for swapped, sides in ((False, (columns, rows)), (True, (rows, columns)))
            if (down[1], up[0]) == sides
        ]

    def _read_parameter(self, module: str, nesting: str, parameter: str, found: Fused) -> None:
        name = f"base_model.model.{nesting}.lora_A.weight"
        down = self._tensors.take(name)
        up = self._tensors.take(f"base_model.model.{nesting}.lora_B.weight")
        expert = found.parameters[parameter]
        key = f"{module}.{parameter}"
        if len(down.shape) == 3:  # Megatron's: [E, r, in] and [E, out, r]
            scale = self._scale(key, name, down.shape[1])
            self._collector.add_expert(expert, down, up, scale, order="stacked")
            return
        sides = self._sides(expert, down.shape, up.shape)
        if not sides:
            rows, columns = expert.shape
            raise self._collector.other_base(down, f"[rank * {self._model.num_experts}, {columns}] or {rows}")
        is_swapped = sides[0]
        if len(sides) == 2:
            if found.is_transposed is None:
                raise self._tensors.refuse(
                    name,
                    "is a pair of a square matrix, which versions of transformers store both ways",
                    _MERGE,
                )
            # PEFT took the first axis of a parameter for its columns until 0.19, and in 0.19.0 always its rows.
            version = self._config.version
            is_swapped = version == (0, 19, 0) or (version < (0, 19, 0) and not found.is_transposed)
        rank = down.shape[0] // max(1, self._model.num_experts)
        scale = self._scale(key, name, rank)
        self._collector.add_expert(expert, down, up, scale, order=self._columns, is_swapped=is_swapped)


def _read_config(raw: Mapping[str, object], directory: Path) -> _Config:
    def refuse(key: str, supported: str) -> UnsupportedModel:
        why = f" ({_WHY[key]})" if key in _WHY else ""
        return UnsupportedModel(
            f"{CONFIG_FILE} asks for {quote(key)} {quote(raw[key])}{why}; supported: {supported}",
            hint=_MERGE,
            path=directory / CONFIG_FILE,
            key=key,
            value=raw[key],
        )

    if raw.get("peft_type") != "LORA":
        if "peft_type" not in raw:
            raise CheckpointError(f"{CONFIG_FILE} has no peft_type", path=directory / CONFIG_FILE)
        raise refuse("peft_type", "LORA")
    for key, value in raw.items():
        if key not in _PASSED and key not in _READ and value not in (None, False, [], {}):
            raise refuse(key, "only its absence")
    begin = raw.get("init_lora_weights", True)
    if isinstance(begin, str) and begin.startswith(_CHANGED_BASE):
        raise UnsupportedModel(
            f"{CONFIG_FILE}: init_lora_weights is {quote(begin)}, which changed the base's weights before training, so "
            "the pairs do not fit the released base",
            hint="save it with `path_initial_model_for_weight_conversion`, which makes ordinary pairs",
            path=directory / CONFIG_FILE,
            key="init_lora_weights",
        )
    if raw.get("bias", "none") != "none":
        raise refuse("bias", "none")
    rank = _integer(raw, "r", 8, MOST_RANK)
    alpha = _number(raw, "lora_alpha", 8)
    ranks = _patterns(raw, "rank_pattern", lambda value: type(value) is int and 1 <= value <= MOST_RANK)
    alphas = _patterns(raw, "alpha_pattern", _is_number)
    root = _flag(raw, "use_rslora")

    def scale(module: str, rank: int) -> float:
        own = float(alphas(module, alpha))
        return own / math.sqrt(rank) if root else own / rank

    about = {
        key: raw.get(key)
        for key in (
            "r",
            "lora_alpha",
            "rank_pattern",
            "alpha_pattern",
            "use_rslora",
            "alora_invocation_tokens",
        )
    }
    return _Config(
        rank=lambda module: int(ranks(module, rank)),
        scale=scale,
        ties=_flag(raw, "ensure_weight_tying"),
        is_dora=_flag(raw, "use_dora"),
        target_parameters=_texts(raw, "target_parameters"),
        invocation_tokens=_tokens(raw),
        version=_version(raw.get("peft_version")),
        is_unsloth=_is_unsloth(raw, directory),
        about=json.dumps(about, sort_keys=True).encode(),
    )


def _patterns(
    raw: Mapping[str, object], key: str, is_valid: Callable[[object], bool]
) -> Callable[[str, float], float]:
    """Return a function from a module's name and a default to the value of the first pattern that matches it."""
    found = raw.get(key) or {}
    if not isinstance(found, dict) or len(found) > MOST_PATTERNS:
        raise CheckpointError(f"{CONFIG_FILE}: {key} must be an object of at most {MOST_PATTERNS} patterns")
    rules: list[tuple[Callable[[str], bool], float]] = []
    for pattern, value in found.items():
        if not is_valid(value):
            raise CheckpointError(f"{CONFIG_FILE}: {key} gives {quote(value)} for {quote(pattern)}", key=key)
        try:
            rules.append((compile_pattern(pattern), value))
        except PatternError as error:
            raise UnsupportedModel(
                f"{CONFIG_FILE}: pattern {quote(pattern)} in {key} {error}", key=key, value=pattern
            ) from None
    return lambda name, default: next((value for matches, value in rules if matches(name)), default)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e9


def _integer(raw: Mapping[str, object], key: str, default: int, most: int) -> int:
    value = raw.get(key, default)
    if type(value) is not int or not 1 <= value <= most:
        raise CheckpointError(
            f"{CONFIG_FILE}: {key} is {quote(value)}, expected a whole number from 1 to {most}", key=key
        )
    return value


def _number(raw: Mapping[str, object], key: str, default: float) -> float:
    value = raw.get(key, default)
    if not _is_number(value):
        raise CheckpointError(f"{CONFIG_FILE}: {key} is {quote(value)}, expected a number from 0 on", key=key)
    return float(value)  # type: ignore[arg-type]


def _flag(raw: Mapping[str, object], key: str) -> bool:
    value = raw.get(key, False)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{CONFIG_FILE}: {key} is {quote(value)}, expected true or false", key=key)
    return bool(value)


def _texts(raw: Mapping[str, object], key: str) -> tuple[str, ...]:
    value = raw.get(key) or []
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise CheckpointError(f"{CONFIG_FILE}: {key} is {quote(value)}, expected a list of names", key=key)
    return tuple(value)


def _tokens(raw: Mapping[str, object]) -> tuple[int, ...]:
    key = "alora_invocation_tokens"
    value = raw.get(key) or []
    is_valid = isinstance(value, list) and all(type(one) is int and 0 <= one < 2**31 for one in value)
    if not is_valid or len(value) > MOST_TOKENS:  # type: ignore[arg-type]
        raise CheckpointError(
            f"{CONFIG_FILE}: {key} is {quote(value)}, expected a list of token ids", key=key
        )
    return tuple(value)  # type: ignore[arg-type]


def _version(value: object) -> tuple[int, ...]:
    """Return the version of PEFT, which is written since 0.18."""
    found = re.match(r"(\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?", value) if isinstance(value, str) else None
    return (0, 0, 0) if found is None else tuple(int(part or 0) for part in found.groups())


def _is_unsloth(raw: Mapping[str, object], directory: Path) -> bool:
    mapping, base = raw.get("auto_mapping"), raw.get("base_model_name_or_path")
    if isinstance(mapping, dict) and mapping.get("unsloth_fixed"):
        return True
    return isinstance(base, str) and base.lower().startswith("unsloth/")
