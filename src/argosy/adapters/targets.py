"""Which matrices of a model an adapter may change, by canonical name, with the shapes of the matrices themselves.

Elsewhere: `checkpoint/geometry.py` lists all tensors; routed experts are not dense, so they are not listed.
"""

from __future__ import annotations

from argosy.checkpoint.geometry import dense_shapes
from argosy.config import CompressedConfig, LatentConfig, ModelConfig
from argosy.model.weights import is_vector

REPLACEABLE = frozenset(
    {"embed", "head", "router"}
)  # the last part of the names of matrices that may be replaced


def target_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return rows and columns of every matrix that a low-rank pair may change, `embed` and `head` included.

    `k_up` and `v_up` stand for the key and the value rows of all heads of `kv_up`, neither transposed: [heads *
    nope_dim, kv_rank] and [heads * value_dim, kv_rank]. No pairs change the table that gives tokens their experts, the
    mixes of residual streams, n-gram sublayers and the block-diagonal `o_down`.

    Args:
        config: without draft layers, which run without adapters.
    """
    shapes: dict[str, tuple[int, int]] = {}
    for name, shape in dense_shapes(config):
        layer, last = _split(name)
        if len(shape) != 2 or is_vector(name) or "_mix" in last or last.startswith("ngram_"):
            continue
        mixer = config.layers[layer].mixer if layer >= 0 else None
        if last == "token_experts" or (isinstance(mixer, CompressedConfig) and last in ("o_down", "index_k")):
            continue
        if last in ("kv_up", "k_up", "v_up"):
            assert isinstance(mixer, LatentConfig)
            prefix, heads = name.removesuffix(last), mixer.num_heads
            shapes[f"{prefix}k_up"] = (heads * mixer.nope_dim, mixer.kv_rank)
            shapes[f"{prefix}v_up"] = (heads * mixer.value_dim, mixer.kv_rank)
            continue
        shapes[name] = (shape[0], shape[1])
    shapes["head"] = shapes["embed"]
    return shapes


def is_replaceable(name: str) -> bool:
    """Whether a whole matrix may take the place of the base's."""
    return name.rpartition(".")[2] in REPLACEABLE


def _split(name: str) -> tuple[int, str]:
    """Return the layer of a tensor, -1 outside of the layers, and the last part of its name."""
    parts = name.split(".")
    return (int(parts[1]) if parts[0] == "layers" else -1), parts[-1]
