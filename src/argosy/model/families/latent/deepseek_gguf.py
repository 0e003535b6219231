"""The `deepseek2` architecture of GGUF: DeepSeek-V2, V3 and R1, Kimi-K2, GLM-4.7-Flash; `mistral4`; and `deepseek32`
and `glm-dsa`, which add an indexer.

Only the router in the metadata shows which model a file contains: DeepSeek-V2 uses softmax, all others use sigmoid.
Files from April 2025 on split `kv_b` into two tensors, `attn_k_b` with each head's part transposed and `attn_v_b`, and
describe one shared head of keys as wide as the cache; the sizes of a head are in keys that end in `_mla`. Older files
contain `attn_kv_b`, and the sizes in keys without the ending.

A file whose queries grow with the position is Mistral's: of architecture `mistral4`, or a Mistral-Large-3. Yarn does
not change its scores, whatever `yarn_log_multiplier` says (`mistral4.py` has the reason); llama.cpp scales them.

Files of DeepSeek-V3 before October 2025 do not declare groups of experts, so the router of these files chooses among
all experts.

Indexers are optional in files of `glm-dsa`. A file without them is read as if every token saw all positions, which is
exact for as many positions as the indexers would choose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import (
    IndexConfig,
    LatentConfig,
    LayerConfig,
    ModelConfig,
    QueryScale,
    RopeConfig,
    RouterConfig,
)
from argosy.errors import CheckpointError
from argosy.model.families.latent.deepseek import (
    INDEX_NORM_EPS,
    LATENT_NORM_EPS,
    MOST_CHOSEN,
    attention_scale,
)
from argosy.model.reading.experts_config import read_dense_layers, read_grouped_router, require_groups
from argosy.model.reading.gguf_config import SIGMOID, SOFTMAX, GgufConfigReader
from argosy.model.reading.gguf_layout import dense_name, read_gguf_layout

GGUF_ARCHITECTURE = "deepseek2"
MISTRAL = "mistral4"  # its architecture, and the family of every file whose queries grow
BETA = 0.1  # of Mistral-Small-4


def open_gguf(file: GgufFile) -> ModelFiles:
    """The model in a GGUF file of architecture `deepseek2` or `mistral4`.

    Raises:
        UnsupportedModel: a key, value or tensor type that is not supported.
        CheckpointError: a key or tensor is missing, malformed, or contradicts another.
    """
    architecture = file.text("general.architecture")
    family = MISTRAL if architecture == MISTRAL else None
    reader = GgufConfigReader(file, architecture)
    return _read_files(reader, _read_config(reader, family, lambda *_: ()))


def open_indexed(
    file: GgufFile,
    architecture: str,
    family: str,
    *,
    is_interleaved: bool,
    is_own: Callable[[int, int], bool] = lambda layer, context_tokens: True,
) -> ModelFiles:
    """The same for an architecture whose layers choose positions.

    Args:
        is_interleaved: how the rotary dimensions of index queries and keys are paired.
        is_own: whether a layer has its own indexer if the file does not say so.
    """
    reader = GgufConfigReader(file, architecture)
    return _read_files(reader, read_indexed(reader, family, is_interleaved=is_interleaved, is_own=is_own))


def _read_files(reader: GgufConfigReader, config: ModelConfig) -> ModelFiles:
    reader.finish()
    return read_gguf_layout(reader.file, config, is_paired=False, has_rope_freqs=False)


def read_indexed(
    reader: GgufConfigReader,
    family: str,
    *,
    is_interleaved: bool,
    is_own: Callable[[int, int], bool] = lambda layer, context_tokens: True,
    adapt: Callable[[GgufConfigReader, IndexConfig], IndexConfig] = lambda reader, index: index,
) -> ModelConfig:
    """Read the config of `open_indexed`, whose indexers `adapt` may change; the caller calls `finish()`."""
    has_indexers = dense_name("layers.0.index_q") in reader.file.tensors

    def read_indexers(reader: GgufConfigReader, num_layers: int) -> tuple[IndexConfig, ...]:
        own = IndexConfig(
            num_chosen=reader.integer("attention.indexer.top_k", most=MOST_CHOSEN),
            num_heads=reader.integer("attention.indexer.head_count"),
            head_dim=reader.integer("attention.indexer.key_length"),
            is_interleaved=is_interleaved,
            norm_eps=INDEX_NORM_EPS,
            kind="own" if has_indexers else "missing",
        )
        own = adapt(reader, own)
        context_tokens = reader.integer("context_length")
        kinds = reader.flags("attention.indexer.types", num_layers)
        if kinds is None:
            kinds = tuple(is_own(layer, context_tokens) for layer in range(num_layers))
        shared = replace(own, kind="shared") if has_indexers else own
        return tuple(own if kind else shared for kind in kinds)

    return _read_config(reader, family, read_indexers)


def _read_config(
    reader: GgufConfigReader,
    family: str | None,
    read_indexers: Callable[[GgufConfigReader, int], Sequence[IndexConfig]],
) -> ModelConfig:
    file = reader.file
    has_experts = reader.has("expert_count")
    sizes = reader.sizes(has_experts=has_experts)
    num_heads = reader.integer("attention.head_count")
    latent = read_latent(reader, num_heads, sizes["context_tokens"])
    num_layers = reader.num_layers()
    expert_width = reader.integer("expert_feed_forward_length")
    if has_experts:
        num_dense = read_dense_layers(reader, num_layers)
        router = _read_router(reader, dense_name(f"layers.{num_dense}.choice_bias") in file.tensors)
        router = require_groups(router, sizes["num_experts"], sizes["experts_per_token"])
        shared_width = reader.integer("expert_shared_count", 0, least=0) * expert_width
    else:
        family, num_dense, router, expert_width, shared_width = "youtu", num_layers, RouterConfig(), 0, 0
        reader.neutral("leading_dense_block_count", num_layers)
    if family in (None, MISTRAL):
        original = sizes["context_tokens"] if latent.rope is None else latent.rope.original_context
        query_scale = _read_query_scale(reader, original, is_known=family == MISTRAL)
        if family == MISTRAL or query_scale is not None:
            family, latent = MISTRAL, replace(latent, scale=0.0, query_scale=query_scale)
            router = replace(router, group_score="top2")
    indexers = read_indexers(reader, num_layers) or (None,) * num_layers
    mixers = {index: replace(latent, index=index) for index in indexers}
    return ModelConfig(
        family=family or ("deepseek_v3" if router.score == "sigmoid" else "deepseek_v2"),
        layers=tuple(
            LayerConfig(mixer=mixers[index], is_moe=layer >= num_dense)
            for layer, index in enumerate(indexers)
        ),
        expert_width=expert_width,
        router=router,
        dense_width=reader.integer("feed_forward_length", least=0 if num_dense == 0 else 1),
        shared_width=shared_width,
        num_mtp_layers=reader.num_mtp_layers(),
        **sizes,
    )


def read_latent(
    reader: GgufConfigReader, num_heads: int, context_tokens: int, *, is_everywhere: bool = True
) -> LatentConfig:
    """Sizes of a head and of the compressed vectors, from the keys of old or new files.

    Args:
        is_everywhere: all layers have latent attention; otherwise KV heads say which have it, and converters leave
            a head's size that has no meaning as that of values.
    """
    kv_rank = reader.integer("attention.kv_lora_rank")
    rope_dim = reader.integer("rope.dimension_count", least=0)
    is_split = reader.has("attention.key_length_mla")
    if is_split:
        head_dim, value_dim = (reader.integer(f"attention.{name}_length_mla") for name in ("key", "value"))
        shared = {"head_count_kv": 1, "key_length": kv_rank + rope_dim, "value_length": kv_rank}
    else:
        head_dim, value_dim = (reader.integer(f"attention.{name}_length") for name in ("key", "value"))
        shared = {"head_count_kv": num_heads}
    if not is_everywhere:
        shared = {"key_length": kv_rank + rope_dim} if is_split else {}
        reader.integer("attention.value_length", value_dim)
    for name, expected in shared.items():
        if (found := reader.integer(f"attention.{name}", expected)) != expected:
            raise CheckpointError(
                f"{reader.file.path.name}: {reader.key(f'attention.{name}')} is {found}, expected {expected}",
                path=reader.file.path,
                key=reader.key(f"attention.{name}"),
            )
    if head_dim <= rope_dim:
        raise CheckpointError(
            f"{reader.file.path.name} gives heads of {head_dim} dimensions, of which {rope_dim} rotate; expected some "
            "that do not",
            path=reader.file.path,
            key=reader.key("rope.dimension_count"),
        )
    rope = _read_rope(reader, rope_dim, context_tokens) if rope_dim else None
    return LatentConfig(
        num_heads=num_heads,
        query_rank=reader.integer("attention.q_lora_rank", 0, least=0),
        kv_rank=kv_rank,
        nope_dim=head_dim - rope_dim,
        rope_dim=rope_dim,
        value_dim=value_dim,
        norm_eps=LATENT_NORM_EPS,
        rope=rope,
        scale=0.0 if rope is None else attention_scale(head_dim, rope),
        is_up_split=is_split,
    )


def _read_rope(reader: GgufConfigReader, rope_dim: int, context_tokens: int) -> RopeConfig:
    """Read an interleaved embedding. Yarn's `mscale_all_dim` magnitude has its own key, times 0.1 and in float32.

    The other magnitude has no key; llama.cpp assumes that both are equal, as in every released model.
    """
    rope = reader.rope(rope_dim, context_tokens)
    magnitude = None
    if rope.kind == "yarn" and reader.is_set("rope.scaling.yarn_log_multiplier"):
        magnitude = round(reader.number("rope.scaling.yarn_log_multiplier") / 0.1, 6)
    return replace(rope, is_interleaved=True, mscale=magnitude, mscale_all_dim=magnitude)


def _read_query_scale(reader: GgufConfigReader, original: int, *, is_known: bool) -> QueryScale | None:
    """Read how queries grow with the position. `is_known`: as in Mistral-Small-4 if its converter left the keys out."""
    name = "attention.temperature_scale"
    is_set = reader.is_set(name)
    if not is_set and (reader.has(name) or not is_known):
        return None
    period = reader.integer("attention.temperature_length", original)
    return QueryScale(beta=reader.number(name) if is_set else BETA, period=period)


def _read_router(reader: GgufConfigReader, has_choice_bias: bool) -> RouterConfig:
    function = reader.integer("expert_gating_func", 0, least=0)
    if function == 0:
        # Either an old file of DeepSeek-V2, or GLM-4.7-Flash: converters write the key from `scoring_func`, which its
        # config.json does not have. A choice bias tells them apart: it came with sigmoid scores (DeepSeek-V3,
        # arXiv:2412.19437), and V2 has none. llama.cpp recognises GLM-4.7-Flash by its size, and reads all other files
        # without the key as softmax, which gives garbage.
        function = SIGMOID if has_choice_bias else SOFTMAX
    if function not in (SOFTMAX, SIGMOID):
        raise reader.unsupported("expert_gating_func", function, "1 (softmax), 2 (sigmoid)")
    return read_grouped_router(reader, is_sigmoid=function == SIGMOID, has_choice_bias=has_choice_bias)
