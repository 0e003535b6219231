"""Find the matrices of a model that a module of `transformers` or MLX stands for, whatever files the model came from.

    `model.language_model.layers.3.self_attn.q_proj`  ->  `layers.3.q`
    `model.layers.3.mlp.experts.17.up_proj`           ->  up of expert 17 in layer 3

The names come from the layouts of the model's family, which read checkpoints: a module's name is its weight's name
without `.weight`. `_SPELT` has the modules that transformers 5 names otherwise. If the model's matrices hold the rows
of a module in another order, or several matrices share them, a `Part` says where each row is.

Elsewhere: `model/reading/layout.py` has the layouts; `targets.py` the matrices that may change.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from argosy.adapters.targets import target_shapes
from argosy.config import DeltaConfig, LatentConfig, ModelConfig
from argosy.model.families import FAMILIES
from argosy.model.reading.mlx import mlx_layouts

Rows = NDArray[np.intp]

_WRAPPERS = frozenset({"model", "language_model", "text_model", "thinker", "backbone", "llm", "decoder"})
_LAYER = re.compile(r"(?P<before>[A-Za-z_.]{0,64}?)layers\.(?P<layer>0|[1-9][0-9]{0,4})\.(?P<local>.+)")
_HEADS = ("lm_head",)
_EMBEDDINGS = ("embed_tokens",)


@dataclass(frozen=True)
class Part:
    """A matrix that has rows of a module.

    name: canonical.
    rows: the module's row of each row of the matrix; None: the same.
    columns: the module's column of each column of the matrix; None: the same.
    """

    name: str
    rows: Rows | None = None
    columns: Rows | None = None


@dataclass(frozen=True)
class Dense:
    """A module with a matrix [rows, columns], which parts of it share."""

    shape: tuple[int, int]
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Expert:
    """Matrices of one routed expert, or of all experts of a layer (`expert` is None): gate 0, up 1, down 2.

    rows: the module's rows of each of its matrices.
    """

    layer: int
    expert: int | None
    shape: tuple[int, int]
    rows: Mapping[int, slice]


@dataclass(frozen=True)
class Fused:
    """A module whose parameters hold all routed experts of a layer, in the order in which it has them.

    is_transposed: they are stored [experts, columns, rows]; None: some versions of transformers do.
    """

    layer: int
    parameters: Mapping[str, Expert]
    is_transposed: bool | None


@dataclass(frozen=True)
class Draft:
    """A module of a layer that only drafts, which runs without adapters."""


Module = Dense | Expert | Fused | Draft


class ModuleNames:
    """The modules of a model."""

    def __init__(self, config: ModelConfig, *, is_mlx: bool = False) -> None:
        self._config = config
        self._shapes = target_shapes(config)
        family = FAMILIES[config.family]
        own = family.LAYOUTS
        self._layouts = (*mlx_layouts(config.family, own[0]), *own) if is_mlx else own
        self._of_layer = cache(self._read_layer)

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """Rows and columns of every matrix that may change."""
        return self._shapes

    def find(self, path: str) -> Module | None:
        """Return what a module stands for, or None if that is nothing an adapter may change."""
        if any(layout.mtp_prefix and path.startswith(layout.mtp_prefix) for layout in self._layouts):
            return Draft()
        found = _LAYER.fullmatch(path)
        if found is None:
            return self._outside(path)
        if not self._is_wrapper(found["before"]):
            return None
        layer = int(found["layer"])
        if layer >= self._config.num_layers:
            return Draft() if layer in self._config.mtp_layers else None
        return self._of_layer(layer).get(found["local"]) or self._single_expert(layer, found["local"])

    def expert(self, layer: int, expert: int | None, *matrices: int, has_turns: bool = False) -> Expert:
        """Return gate (0), up (1) or down (2) of a routed expert, or of all if `expert` is None; or the module that has
        the rows of several, one matrix after another or, with `has_turns`, by turns.
        """
        config = self._config
        width, hidden = config.expert_width_in(layer), config.expert_hidden
        if matrices == (2,):
            return Expert(layer, expert, (hidden, width), {2: slice(0, hidden)})
        count = len(matrices)
        rows = {
            matrix: slice(at, None, count) if has_turns else slice(at * width, (at + 1) * width)
            for at, matrix in enumerate(matrices)
        }
        return Expert(layer, expert, (count * width, hidden), rows)

    def _is_wrapper(self, before: str) -> bool:
        return set(filter(None, before.split("."))) <= _WRAPPERS or any(
            layout.prefix == before for layout in self._layouts
        )

    def _outside(self, path: str) -> Dense | None:
        heads = {layout.head_name.removesuffix(".weight").rpartition(".")[2] for layout in self._layouts}
        embeddings = {layout.embed_name.removesuffix(".weight") for layout in self._layouts}
        before, _, last = path.rpartition(".")
        if not self._is_wrapper(before):
            return None
        for name, known in (("head", {*heads, *_HEADS}), ("embed", {*embeddings, *_EMBEDDINGS})):
            if last in known:
                return Dense(self._shapes[name], (Part(name),))
        return None

    def _read_layer(self, layer: int) -> dict[str, Module]:
        """Return the modules of a layer by the rest of their names; single experts are not listed."""
        wholes, found = _wholes(self._config, layer, self._shapes), dict[str, Module]()
        for layout in self._layouts:
            by_name: dict[str, list[str]] = {}
            for last in wholes:
                if (name := layout.layer_names.get(last, "")).endswith(".weight"):
                    by_name.setdefault(name.removesuffix(".weight"), []).append(last)
            for name, lasts in by_name.items():
                if len(lasts) == 1:
                    module: Module = wholes[lasts[0]]
                elif set(lasts) <= set(layout.joined):
                    module = _joined([wholes[last] for last in sorted(lasts, key=layout.joined.index)])
                else:
                    continue
                found.setdefault(name, module)
        if layer in self._config.moe_layers:
            for name, fused in self._fused(layer):
                found.setdefault(name, fused)
        for name, spelt in _SPELT:
            lasts = spelt.split("+")
            if all(last in wholes for last in lasts):
                found.setdefault(name, _joined([wholes[last] for last in lasts]))
        return found

    def _matrices(self, names: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Return the matrices that each of the names of an expert's tensors has."""
        if len(names) == 3:
            return (0,), (1,), (2,)
        return (((0, 1) if self._config.activation.has_gate else (1,)), (2,))

    def _fused(self, layer: int) -> Iterator[tuple[str, Module]]:
        has_gate = self._config.activation.has_gate
        has_turns = any(layout.has_turns for layout in self._layouts)
        first = (0, 1) if has_gate else (1,)
        parameters = {
            "gate_up_proj" if has_gate else "up_proj": self.expert(layer, None, *first, has_turns=has_turns),
            "down_proj": self.expert(layer, None, 2),
        }
        transposed = {
            layout.transposed_names is not None or layout.mxfp4_names is not None
            for layout in self._layouts
            if layout.fused_names or layout.transposed_names or layout.mxfp4_names
        }
        is_transposed = transposed.pop() if len(transposed) == 1 else None if transposed else False
        fused = Fused(layer, parameters, is_transposed)
        for layout in self._layouts:
            if layout.stacked_names is not None:
                for name, matrices in zip(
                    layout.stacked_names, self._matrices(layout.stacked_names), strict=True
                ):
                    yield name.removesuffix(".weight"), self.expert(layer, None, *matrices)
            names = layout.fused_names or layout.transposed_names
            if names is not None and names[0].endswith(".weight"):  # each parameter in a module of its own
                for name, (key, expert) in zip(names, parameters.items(), strict=True):
                    yield name.removesuffix(".weight"), Fused(layer, {key: expert}, is_transposed)
            elif names is not None:
                yield names[0].rpartition(".")[0], fused
            elif layout.mxfp4_names is not None:
                yield layout.mxfp4_names[0].rpartition(".")[0], fused
            elif layout.expert_names is not None:
                yield layout.expert_names[0].partition(".{expert}")[0], fused
        yield "mlp.experts", fused

    def _single_expert(self, layer: int, local: str) -> Expert | None:
        for layout in self._layouts if layer in self._config.moe_layers else ():
            if layout.expert_names is None:
                continue
            for name, matrices in zip(layout.expert_names, self._matrices(layout.expert_names), strict=True):
                before, _, after = name.removesuffix(".weight").partition("{expert}")
                number = local.removeprefix(before).removesuffix(after)
                if (
                    local == before + number + after
                    and number.isdecimal()
                    and number.isascii()
                    and len(number) < 8
                ):
                    expert = int(number)
                    if expert < self._config.num_experts and str(expert) == number:
                        return self.expert(layer, expert, *matrices)
        return None


def _wholes(config: ModelConfig, layer: int, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Dense]:
    """Return the matrices of a layer as modules have them, by the last part of their names."""
    prefix = f"layers.{layer}."
    wholes = {
        name.removeprefix(prefix): Dense(shape, (Part(name),))
        for name, shape in shapes.items()
        if name.startswith(prefix)
    }
    match config.layers[layer].mixer:
        case LatentConfig() as latent if "k_up" in wholes:
            wholes["kv_up"] = _key_value_rows(latent, prefix)
            # k_up and v_up have names in files of MLX and GGUF, but are not modules with pairs.
            del wholes["k_up"], wholes["v_up"]
        case DeltaConfig() as delta:
            wholes |= _delta_rows(delta, prefix, wholes)
    return wholes


def _joined(modules: Sequence[Dense]) -> Dense:
    """Return the module that has the rows of several one after another."""
    if len(modules) == 1:
        return modules[0]
    parts, first = [], 0
    for module in modules:
        for part in module.parts:
            rows = np.arange(module.shape[0]) if part.rows is None else part.rows
            parts.append(Part(part.name, first + rows, part.columns))
        first += module.shape[0]
    return Dense((first, modules[0].shape[1]), tuple(parts))


def _key_value_rows(latent: LatentConfig, prefix: str) -> Dense:
    """Rows of `kv_b_proj`: head by head, the key's, then the value's."""
    key, value = latent.nope_dim, latent.value_dim
    heads = np.arange(latent.num_heads * (key + value)).reshape(latent.num_heads, -1)
    return Dense(
        (heads.size, latent.kv_rank),
        (
            Part(f"{prefix}k_up", heads[:, :key].reshape(-1)),
            Part(f"{prefix}v_up", heads[:, key:].reshape(-1)),
        ),
    )


def _delta_rows(delta: DeltaConfig, prefix: str, wholes: Mapping[str, Dense]) -> dict[str, Dense]:
    """Rows and columns of a gated delta net as files regroup them (`model/families/recurrent/qwen_delta_gguf.py`).

    Modules have value heads in the order of their key heads, and `in_proj_qkvz` and `in_proj_ba` have all rows of a key
    head together.
    """
    keys, values = delta.num_key_heads, delta.num_value_heads
    shared = values // keys
    # The head at each place of the model's matrices.
    order = np.arange(values).reshape(keys, shared).T.reshape(-1) if delta.is_tiled else np.arange(values)
    hidden = wholes["delta_out"].shape[0]
    q_rows, value_rows = keys * delta.key_dim, values * delta.value_dim
    v_of_head = np.arange(value_rows).reshape(values, -1)
    found: dict[str, Dense] = {}

    def heads(name: str, rows: Rows) -> None:
        if name in wholes:
            found[name] = Dense(wholes[name].shape, (Part(prefix + name, rows),))

    if not delta.has_joined_qkvz:
        channels = np.arange(2 * q_rows)
        # Key head by key head: query, key, its values, their z.
        group = np.arange(2 * q_rows + 2 * value_rows).reshape(keys, -1)
        dk, dv = delta.key_dim, shared * delta.value_dim
        query, key = group[:, :dk].reshape(-1), group[:, dk : 2 * dk].reshape(-1)
        v, z = (
            group[:, start : start + dv].reshape(values, -1)[order].reshape(-1)
            for start in (2 * dk, 2 * dk + dv)
        )
        found["delta_qkvz"] = Dense(
            (group.size, hidden),
            (Part(f"{prefix}delta_qkv", np.concatenate((query, key, v))), Part(f"{prefix}delta_z", z)),
        )
        if delta.is_tiled:
            tiled = v_of_head[order].reshape(-1)
            heads("delta_qkv", np.concatenate((channels, 2 * q_rows + tiled)))
            heads("delta_z", tiled)
    if not delta.has_joined_ba:
        pairs = np.arange(2 * values).reshape(keys, 2, shared)
        b, a = (pairs[:, at].reshape(-1)[order] for at in (0, 1))
        found["delta_ba"] = Dense(
            (2 * values, hidden), (Part(f"{prefix}delta_b", b), Part(f"{prefix}delta_a", a))
        )
        if delta.is_tiled:
            heads("delta_b", order)
            heads("delta_a", order)
    if delta.is_tiled and "delta_out" in wholes:
        columns = v_of_head[order].reshape(-1)
        found["delta_out"] = Dense(wholes["delta_out"].shape, (Part(f"{prefix}delta_out", None, columns),))
    return found


# Names of modules in transformers 5 that files of some families spell otherwise, and the matrices that they stand for,
# by the last parts of their names; the first whose matrices a layer has counts.
_SPELT: tuple[tuple[str, str], ...] = (
    ("self_attn.q_proj", "q"),
    ("self_attn.q_proj", "kda_q"),
    ("self_attn.k_proj", "k"),
    ("self_attn.k_proj", "kda_k"),
    ("self_attn.v_proj", "v"),
    ("self_attn.v_proj", "kda_v"),
    ("self_attn.o_proj", "kda_out"),
    ("self_attn.o_proj", "o"),
    ("self_attn.b_proj", "kda_beta"),
    ("self_attn.g_proj", "kda_gate"),
    ("self_attn.g_proj", "attn_gate"),
    ("self_attn.gate_proj", "attn_gate"),
    ("self_attn.forget_gate.f_proj", "kda_decay"),
    ("self_attn.forget_gate.f_a_proj", "kda_decay_down"),
    ("self_attn.forget_gate.f_b_proj", "kda_decay"),
    ("self_attn.q_a_proj", "q_down"),
    ("self_attn.q_b_proj", "q_up"),
    ("self_attn.kv_a_proj_with_mqa", "kv_down"),
    ("self_attn.kv_b_proj", "kv_up"),
    ("self_attn.kv_proj", "kv"),
    ("self_attn.o_b_proj", "o"),
    ("self_attn.compressor.kv_proj", "pool_vectors"),
    ("self_attn.compressor.gate_proj", "pool_gates"),
    ("self_attn.compressor.indexer.kv_proj", "index_pool_vectors"),
    ("self_attn.compressor.indexer.gate_proj", "index_pool_gates"),
    ("self_attn.compressor.indexer.q_b_proj", "index_q"),
    ("self_attn.compressor.indexer.scorer.weights_proj", "index_weights"),
    ("self_attn.indexer.q_proj", "index_q"),
    ("self_attn.indexer.k_proj", "index_k"),
    ("linear_attn.in_proj_qkv", "delta_qkv"),
    ("linear_attn.in_proj_z", "delta_z"),
    ("linear_attn.in_proj_b", "delta_b"),
    ("linear_attn.in_proj_a", "delta_a"),
    ("mlp.gate", "router"),
    ("mlp.gate_up_proj", "gate+up"),
    ("mlp.shared_experts.gate_up_proj", "shared_gate+shared_up"),
    ("mlp.shared_experts.gate_proj", "shared_gate"),
    ("mlp.shared_experts.up_proj", "shared_up"),
    ("mlp.shared_experts.down_proj", "shared_down"),
)
