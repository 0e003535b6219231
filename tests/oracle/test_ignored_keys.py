"""Every key of a config that the code of transformers reads is read here, refused, or known to change nothing.

Each key gets other values, as long as the config class of transformers accepts them. Our parser must then return
another config, or raise an error of its own, in at least one of the family's tiny configs.
"""

from __future__ import annotations

import ast
import inspect
from collections import defaultdict
from collections.abc import Iterable, Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from argosy.errors import ArgosyError
from argosy.model.families import FAMILIES
from argosy.model.reading.config_reader import HARMLESS
from tests.models.configurations import CONFIGURATIONS
from tests.models.rows import row_of
from tests.models.tiny import RawConfig, text_of

_CUT = "how a long prompt is cut, not what it means"
_INITIAL = "the values that training begins with"
_NEMOTRON = {
    "chunk_size": _CUT,
    "num_logits_to_keep": "how many positions transformers returns",
    "rescale_prenorm_residual": _INITIAL,
    "time_step_floor": _INITIAL,
    "time_step_max": _INITIAL,
    "time_step_min": _INITIAL,
    "use_mamba_kernels": "which code of transformers runs",
}
# By family, keys that change nothing in what it computes here, and what they are about.
WITHOUT_EFFECT: dict[str, dict[str, str]] = {
    "gemma4": {
        "use_double_wide_mlp": "layers that share keys, which are refused",
        "vocab_size_per_layer_input": "embeddings of each layer, which are refused",
    },
    "granitemoehybrid": {"mamba_chunk_size": _CUT},
    "hy_v3": {"enable_moe_fp32_combine": "sums are always in float32"},
    "hy_v4": {"learnable_sink_init": _INITIAL},
    "kimi_linear": {"head_dim": "the config class overwrites it"},
    "minimax": {"block_size": _CUT},
    "nemotron_h": _NEMOTRON,
    "nemotron_h_puzzle": _NEMOTRON
    | dict.fromkeys(
        ("layers_block_type", "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok"),
        "`block_configs` gives it for each layer",
    ),
}
for _family in ("qwen4_exp", "qwen4_exp_text"):
    WITHOUT_EFFECT[_family] = {
        "make_ngram_vocab_size_divisible_by": "rows that no hash gives, at the end of a table"
    }
FAMILY_CONFIGS: dict[str, list[RawConfig]] = defaultdict(list)
for _one in CONFIGURATIONS:
    FAMILY_CONFIGS[_one.config["model_type"]].append(_one.config)


@pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning")
@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_a_key_that_transformers_reads_is_read_or_refused(family: str) -> None:
    outcomes: dict[str, set[bool]] = defaultdict(set)
    for raw in FAMILY_CONFIGS[family]:
        before = FAMILIES[family].parse_config(raw)
        for key, value in _other_values(raw):
            changed = deepcopy(raw)
            text_of(changed)[key] = value
            try:
                outcomes[key].add(FAMILIES[family].parse_config(changed) != before)
            except ArgosyError:
                outcomes[key].add(True)
    assert len(outcomes) > 10
    ignored = {key for key, had_effect in outcomes.items() if had_effect == {False}}
    assert ignored - HARMLESS == WITHOUT_EFFECT.get(family, {}).keys()


def _other_values(raw: RawConfig) -> Iterator[tuple[str, Any]]:
    """Yield keys that transformers reads, with values that its config class accepts and tells apart."""
    cls, text = _class_of(raw), text_of(raw)
    own = cls(**deepcopy(text)).to_dict()
    for key in sorted(_keys_read(cls)):
        for value in _values_like(text.get(key, own.get(key))):
            try:
                found = cls(**deepcopy(text | {key: value})).to_dict()  # it writes into what it is given
            except Exception:  # of many kinds
                continue
            if found != own:
                yield key, value


def _class_of(raw: RawConfig) -> Any:
    """The config class of a config's text part."""
    loading = row_of(raw).loading
    if loading.config is None:
        cls = CONFIG_MAPPING[text_of(raw).get("model_type", raw["model_type"])]
    else:
        cls = getattr(transformers, loading.config(raw)[0])
    while "text_config" in cls.sub_configs:
        cls = cls.sub_configs["text_config"]
    return cls


@cache
def _keys_read(cls: Any) -> frozenset[str]:
    """The class's fields that the family's modules read, and the further keys that its config class looks for."""
    folder = Path(inspect.getfile(cls)).parent
    fields = {name for base in cls.__mro__ for name in getattr(base, "__annotations__", {}) if name[0] != "_"}
    modules = [*folder.glob("modeling_*.py")]  # none if another family's run the model
    in_modules = _attributes_of_configs(modules) if modules else fields
    of_class = {
        node.args[0].value
        for path in folder.glob("configuration_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args
        if node.func.attr in ("get", "pop", "setdefault") and isinstance(node.args[0], ast.Constant)
        if isinstance(node.args[0].value, str)
    }
    other_names = {name for pair in cls.attribute_map.items() if in_modules & {*pair} for name in pair}
    return frozenset(fields & in_modules | other_names | of_class - {"rope_parameters"})


def _attributes_of_configs(paths: Iterable[Path]) -> set[str]:
    """Names that the modules read from something called a config, or from themselves."""
    found = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
                owner = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
                if "config" in owner or owner == "self":
                    found.add(node.attr)
    return found


def _values_like(value: Any) -> list[Any]:
    match value:
        case bool():
            return [not value]
        case int():
            return [value + 1, 2 * value, max(value - 1, 0), 1]
        case float():
            return [1.5 * value, value + 0.125]
        case str():
            return ["gelu", "other"]
        case None:
            return [True, 3, 0.5, "other"]
        case list() | tuple():
            numbers = [
                not one if isinstance(one, bool) else one + 1 if isinstance(one, int) else one
                for one in value
            ]
            return [value[::-1], value[:-1], numbers]
    return []
