"""What tests know about each family: one row for each `model_type`, in the file with its tiny configs.

    tiny*.py with ROWS  ->  rows()  ->  tests that must name every family

A family that has no row fails `test_references.py`, and a row says why something that other families have is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

RawConfig = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

# The reason of families that llama.cpp's converter refuses, which `test_converted.py` checks.
NO_CONVERTER = "llama.cpp has no converter"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """How transformers loads a checkpoint: the class, and for a text model by itself its own config.

    config: the config class and its arguments, from the whole config.json; None: as transformers reads the file.
    prefix: begins names in the file and not in the class.
    """

    model: str = "AutoModelForCausalLM"
    config: Callable[[RawConfig], tuple[str, RawConfig]] | None = None
    prefix: str = ""


# The whole model, if there is no class for the text part alone.
WHOLE = Loading(model="AutoModelForImageTextToText")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A family in tests.

    shapes: names and shapes of every tensor in the hub's checkpoint of a config; None: see `without_references`.
    loading: how transformers loads it.
    has_own_modules: its modules in transformers have other names than `test_oracle.py` reads; logits are compared.
    has_own_experts: `test_open_model.py` does not find each matrix of an expert under the names of `expert_names`.
    has_zero_centred_norms: norms store their weight minus one, except those of delta nets.
    prompt_tokens: of the prompt of a reference.
    as_known: rewrites config and tensors as those of a family that `numpy_model.py` computes.
    gguf: the architecture in which `gguf_models.py` writes it.
    released: rewrites a config that transformers reads as the released files have it, for llama.cpp's converter.
    constants: integers that released files have and no tiny one, by name, which the converter needs.
    has_own_spelling: the converter reads config.json itself, because transformers 5.24 leaves keys out that it needs,
        or renames values.
    chats: the models of `tests/prompt/families.py` whose templates the released models have.
    without_references, without_record, without_converted, without_mlx: why there are no committed references, no
        metadata of llama.cpp's converter (`gguf_converted.json`), no file of it (`converted.py`), or no support of
        MLX's checkpoints (`model/reading/mlx.py`).
    """

    shapes: Callable[[RawConfig], Shapes] | None
    loading: Loading = Loading()
    has_own_modules: bool = False
    has_own_experts: bool = False
    has_zero_centred_norms: bool = False
    prompt_tokens: int = 32
    as_known: Callable[[RawConfig, Mapping[str, Any]], tuple[RawConfig, dict[str, Any]]] | None = None
    gguf: str | None = None
    released: Callable[[RawConfig], RawConfig] | None = None
    constants: Callable[[RawConfig], Mapping[str, list[int]]] | None = None
    has_own_spelling: bool = False
    chats: tuple[str, ...] = ()
    without_references: str = ""
    without_record: str = ""
    without_converted: str = ""
    without_mlx: str = ""


def modules_like(pattern: str) -> Iterator[ModuleType]:
    """Import the modules of this folder whose file names match."""
    for path in sorted(Path(__file__).parent.glob(pattern)):
        yield import_module(f"{__package__}.{path.stem}")


@cache
def rows() -> Mapping[str, Row]:
    """Every row by `model_type`."""
    found: dict[str, Row] = {}
    for module in modules_like("tiny*.py"):
        more: Mapping[str, Row] = getattr(module, "ROWS", {})
        assert not found.keys() & more.keys(), f"{module.__name__} has rows that another file has"
        found |= more
    return found


def row_of(config: RawConfig) -> Row:
    return rows()[config["model_type"]]
