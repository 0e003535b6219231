"""Make adapters in memory for any tiny model, with values large enough to change its tokens.

    random_adapter(config, seed=0, rank=3)                            every matrix, every expert
    random_adapter(config, seed=0, rank=3, targets={"q", "experts"})  the last parts of names, or "experts"
    random_adapter(config, seed=0, replaced={"head", "layers.1.router"})

`delta` and `expert_deltas` are what a merge adds to the weights: scale * B A in float64.
"""

from __future__ import annotations

from collections.abc import Collection
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from argosy.adapters.files import (
    AdapterFiles,
    EmbeddingPair,
    ExpertPart,
    LowRank,
    PairFormat,
    Replacement,
    Values,
)
from argosy.adapters.targets import target_shapes
from argosy.config import ModelConfig
from tests.models.safetensors_file import decode, encode

Doubles = NDArray[np.float64]

GAIN = 0.7  # how large a pair's product is, next to inputs of size one


def random_adapter(
    config: ModelConfig,
    *,
    seed: int,
    rank: int = 3,
    targets: Collection[str] | None = None,
    replaced: Collection[str] = (),
    format: PairFormat = "f32",
    invocation_tokens: tuple[int, ...] = (),
    gain: float = GAIN,
    is_dora: bool = False,
) -> AdapterFiles:
    """Return an adapter whose values are exact in `format`.

    Args:
        config: without draft layers.
        targets: the last parts of the names that have pairs ("q", "router", "embed", "head", ...), and "experts" for
            every routed expert; None: all of them.
        replaced: canonical names of matrices that are replaced; these have no pair.
        is_dora: dense pairs have magnitudes.
    """

    def is_target(name: str) -> bool:
        return name not in replaced and (targets is None or name.rpartition(".")[2] in targets)

    dense: dict[str, tuple[LowRank, ...]] = {}
    embedding = None
    for at, (name, (rows, columns)) in enumerate(target_shapes(config).items()):
        if not is_target(name):
            continue
        rng = np.random.default_rng([seed, at])
        if name == "embed":
            embedding = EmbeddingPair(
                format=format,
                rows=_values(rng, (rows, rank), 0.5, format),
                up=_values(rng, (rank, columns), 0.5 * rank**-0.5, format),
                scale=0.5,
                magnitude=_magnitude(rng, columns).reshape(1, -1) if is_dora else None,
            )
            continue
        # Some matrices have pairs for two stretches of their rows, as files have that cut them.
        cut = rows // 2 if at % 3 == 2 and rows > 1 and not is_dora else 0
        stretches = ((0, cut), (cut, rows - cut)) if cut else ((0, rows),)
        dense[name] = tuple(
            LowRank(
                format=format,
                down=_values(rng, (rank, columns), columns**-0.5, format),
                up=_values(rng, (rank, count), gain / 2 * rank**-0.5, format),
                scale=2.0,
                row_begin=begin,
                magnitude=_magnitude(rng, count) if is_dora else None,
            )
            for begin, count in stretches
        )
    shapes = target_shapes(config)
    matrices = {}
    for at, name in enumerate(sorted(replaced)):
        rng = np.random.default_rng([seed, 1000, at])
        rows, columns = shapes[name]
        size = 1.0 if name == "embed" else 1.5 * columns**-0.5
        matrices[name] = Replacement(format=format, values=_values(rng, (rows, columns), size, format))
    experts = {}
    if config.num_experts and (targets is None or "experts" in targets):
        for layer in config.moe_layers:
            # Ranks differ between matrices, as rank patterns allow.
            ranks = (rank if config.activation.has_gate else 0, rank, rank + 1)
            experts[layer] = ExpertPart(
                format=format,
                ranks=ranks,
                scales=(2.0, 2.0, 1.5),
                hidden=config.expert_hidden,
                width=config.expert_width_in(layer),
            )

    def read_expert(layer: int, expert: int) -> bytes:
        part = experts[layer]
        rng = np.random.default_rng([seed, 2000, layer, expert])
        content = bytearray(part.nbytes)
        for matrix in range(3):
            for at, shape in zip(part.offsets[matrix], part.shapes(matrix), strict=True):
                is_down = at == part.offsets[matrix][0]
                size = shape[1] ** -0.5 if is_down else gain / 2 * max(1, rank) ** -0.5
                values = _values(rng, shape, size, format).tobytes()
                content[at : at + len(values)] = values
        return bytes(content)

    parts = [
        repr((seed, rank, sorted(targets or ()), sorted(replaced), format, invocation_tokens, gain, is_dora))
    ]
    return AdapterFiles(
        path=Path(f"random-{seed}"),
        kind="peft",
        digest=sha256("".join(parts).encode()).digest(),
        dense=dense,
        embedding=embedding,
        replaced=matrices,
        experts=experts,
        read_expert=read_expert if experts else None,
        invocation_tokens=invocation_tokens,
    )


def delta(pairs: tuple[LowRank, ...], rows: int) -> Doubles:
    """What a merge adds to a dense matrix of so many rows."""
    total = np.zeros((rows, pairs[0].down.shape[1]))
    for pair in pairs:
        product = pair.scale * as_doubles(pair.up, pair.format).T @ as_doubles(pair.down, pair.format)
        total[pair.row_begin : pair.row_begin + len(product)] += product
    return total


def embedding_delta(pair: EmbeddingPair) -> Doubles:
    return pair.scale * as_doubles(pair.rows, pair.format) @ as_doubles(pair.up, pair.format)


def expert_deltas(files: AdapterFiles, layer: int, expert: int) -> tuple[Doubles | None, ...]:
    """What a merge adds to gate, up and down of an expert; None: nothing."""
    assert files.read_expert is not None
    part, content = files.experts[layer], files.read_expert(layer, expert)
    deltas: list[Doubles | None] = []
    for matrix in range(3):
        if not part.ranks[matrix]:
            deltas.append(None)
            continue
        down, up = (
            as_doubles(_stored(content, at, shape, part.format), part.format)
            for at, shape in zip(part.offsets[matrix], part.shapes(matrix), strict=True)
        )
        deltas.append(part.scales[matrix] * up.T @ down)
    return tuple(deltas)


def as_doubles(values: Values, format: PairFormat) -> Doubles:
    return decode(format.upper(), values).astype(np.float64)


def _stored(content: bytes, at: int, shape: tuple[int, int], format: PairFormat) -> Values:
    kind: Any = {"f32": "<f4", "f16": "<f2", "bf16": "<u2"}[format]
    return np.frombuffer(content, kind, shape[0] * shape[1], at).reshape(shape)


def _magnitude(rng: np.random.Generator, count: int) -> NDArray[np.float32]:
    lengths = 1 + 0.3 * rng.standard_normal(count)
    lengths[::5] *= -1  # nothing keeps training from it
    return lengths.astype(np.float32)


def _values(rng: np.random.Generator, shape: tuple[int, int], size: float, format: PairFormat) -> Values:
    return encode(format.upper(), size * rng.standard_normal(shape))
