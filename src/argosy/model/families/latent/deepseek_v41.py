"""DeepSeek-V4.1 (`deepseek_v41`): V4's streams and attention, with caches that layers share.

`compress_ratios` say how many positions an entry stands for, in layers that see entries and their window. Only those of
`kv_source_layer_ids` have a pool and index keys, which later layers read; those of `index_source_layer_ids` have an
indexer, and later layers see its choice. From `candidate_source_layer_id` on, indexers choose inside the blocks that
this layer found best. A sublayer's weights for reading the streams are for the next one. Layers of `engram_layer_ids`
first add rows of a table of hashed n-grams of folded tokens (Engram, arXiv:2601.07372), which stays on the drive.

With a vision tower, positions of pictures choose experts by a bias of their own, and no n-gram reaches across them.
`config.json` is a wrapper with the text model in `text_config`; transformers 5.24 has no class for it. DSpark's draft
layers (`mtp`) are passed over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace

from argosy.checkpoint.files import MatrixRef
from argosy.checkpoint.untrusted_file import quote
from argosy.config import (
    ActivationConfig,
    CandidateConfig,
    CompressedConfig,
    LayerConfig,
    ModelConfig,
    NgramConfig,
    PoolConfig,
)
from argosy.errors import CheckpointError
from argosy.model.families.latent import deepseek_v4
from argosy.model.ngrams import pcg_multipliers, primes_from
from argosy.model.reading.coded_weights import WeightAccounts
from argosy.model.reading.common_config import Common, MoeDefaults, parse_wrapper, read_sizes
from argosy.model.reading.config_reader import MOST_LAYERS, ConfigReader

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "parse_config"]

MODEL_TYPE = "deepseek_v41"
GGUF_ARCHITECTURE = None

_DEFAULTS = MoeDefaults(
    vocab_size=129_280,
    hidden_size=5120,
    num_layers=40,
    num_heads=64,
    num_kv_heads=1,
    head_dim=512,
    rope_theta=10_000.0,
    norm_eps=1e-20,
    context_tokens=1_048_576,
    num_experts=384,
    experts_per_token=6,
    dense_width=0,
    expert_width=2304,
    num_shared_experts=1,
    eos_id=1,
    bos_id=0,
)
_DRAFT_KEYS = (
    "dspark_block_size", "dspark_noise_token_id", "dspark_target_layer_ids", "dspark_markov_rank",
    "dspark_n_routed_experts", "dspark_num_experts_per_tok",
)  # fmt: skip
_KV_SOURCES, _INDEX_SOURCES = "kv_source_layer_ids", "index_source_layer_ids"
_MOST_RATIO = 128
_NGRAM_NORMS = {"ngram_key_norm": "engram.k_weight", "ngram_query_norm": "engram.q_weight"}


def _take_own(accounts: WeightAccounts, config: ModelConfig, layer: int, last: str) -> MatrixRef | None:
    """Take a norm of an n-gram sublayer, which has a row for each stream."""
    if last not in _NGRAM_NORMS:
        return None
    shape = config.num_streams, config.hidden_size
    matrix = accounts.weight(f"layers.{layer}.{_NGRAM_NORMS[last]}", shape)
    return replace(matrix, rows=1, cols=shape[0] * shape[1])


LAYOUTS = tuple(
    replace(
        layout,
        layer_names={
            **{name: in_file for name, in_file in layout.layer_names.items() if "index_pool" not in name},
            "index_k": "attn.indexer.wk.weight",
            "index_k_norm": "attn.indexer.k_norm.weight",
            "ngram_key": "engram.wkv.weight",
            "ngram_value": "engram.wkv.weight",
            **_NGRAM_NORMS,
        },
        model_names={},
        joined=("ngram_key", "ngram_value"),
        take_own=_take_own,
        table_names=("engram.embed.weight", "engram.embed.shard_{}.weight"),
        passed_over=r"(mtp|vision|aligner)\..+|image_(start|end|newline)|layers\.\d+\.ffn\.gate\.bias_vl",
    )
    for layout in deepseek_v4.LAYOUTS
)


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read the text part of a `config.json`; an absent key gets the released model's value.

    Raises:
        The same errors as `parse_wrapper`.
    """
    image_id, vision = raw.get("image_token_id"), ConfigReader(raw, MODEL_TYPE).mapping("vision_config")
    sees = vision is not None and (
        ConfigReader(vision, MODEL_TYPE, within="vision_config").integer(
            "num_hidden_layers", default=32, least=0, most=MOST_LAYERS
        )
        > 0
    )
    return parse_wrapper(
        raw, MODEL_TYPE, (MODEL_TYPE, "deepseek_v41_text"), lambda text: _read_text(text, image_id, sees=sees)
    )


def _read_text(reader: ConfigReader, border_id: object, *, sees: bool) -> ModelConfig:
    sizes = read_sizes(reader, _DEFAULTS)
    mixers = _read_mixers(reader, sizes)
    tables = _read_tables(reader, sizes.model["vocab_size"], len(mixers), border_id)
    expert_width = reader.integer("moe_intermediate_size", default=_DEFAULTS.expert_width)
    # One expert keeps its own score.
    has_norm = reader.flag("norm_topk_prob", True) and sizes.model["experts_per_token"] > 1
    config = ModelConfig(
        family=MODEL_TYPE,
        layers=tuple(
            LayerConfig(mixer=mixer, is_moe=True, ngrams=tables.get(layer))
            for layer, mixer in enumerate(mixers)
        ),
        expert_width=expert_width,
        shared_width=expert_width * reader.integer("n_shared_experts", default=1),
        router=replace(deepseek_v4.read_router(reader), renormalize=has_norm, has_media_bias=sees),
        activation=ActivationConfig(kind="silu_limited", limit=reader.number("swiglu_limit", 10.0)),
        residual=replace(deepseek_v4.read_residual(reader), is_lagged=True, head="carried"),
        draft_form=None,
        **sizes.model,
    )
    reader.neutral("attention_bias", False, None)
    reader.neutral("num_hash_layers", 0, None)
    reader.passed(*_DRAFT_KEYS)
    return config


def _read_mixers(reader: ConfigReader, sizes: Common) -> list[CompressedConfig]:
    """Read what each layer sees beside its window, and which layer keeps it."""
    num_layers = reader.integer("num_hidden_layers", default=_DEFAULTS.num_layers, most=MOST_LAYERS)
    base = deepseek_v4.read_attention(reader, sizes, query_rank=1280)
    window, compressed = deepseek_v4.read_ropes(reader, base.head_dim, sizes.model["context_tokens"])
    index = replace(deepseek_v4.read_index(reader, compressed, num_heads=32), keys="entries")
    candidates, candidate_source = _read_candidates(reader, index.num_chosen, num_layers)
    keeps, chooses = (
        set(reader.integers(key, least=0, most=num_layers - 1)) for key in (_KV_SOURCES, _INDEX_SOURCES)
    )
    ratios = _read_ratios(reader, num_layers)
    sources = _sources(ratios, keeps, chooses, candidate_source)
    mixers = []
    for layer, (ratio, source) in enumerate(zip(ratios, sources, strict=True)):
        if not ratio:
            mixers.append(replace(base, rope=window))
            continue
        inside = None
        if layer in chooses and 0 <= candidate_source <= layer:
            inside = replace(candidates, is_source=layer == candidate_source)
        mixers.append(
            replace(
                base,
                rope=compressed,
                pool=PoolConfig(ratio=ratio, has_bias=False, source=None if source == layer else source),
                index=replace(index, is_shared=layer not in chooses, candidates=inside),
            )
        )
    return mixers


def _read_ratios(reader: ConfigReader, num_layers: int) -> tuple[int, ...]:
    """Read how many positions an entry of each layer stands for; 0: the layer sees only its window."""
    drafts = reader.integer("num_nextn_predict_layers", default=3, least=0, most=MOST_LAYERS)
    ratios = reader.integers("compress_ratios", least=0, most=_MOST_RATIO)
    if not num_layers <= len(ratios) <= num_layers + max(drafts, 1):
        raise _wrong(
            "compress_ratios", f"has {len(ratios)} entries, expected one for each of {num_layers} layers"
        )
    if odd := {ratio for ratio in ratios if ratio & (ratio - 1)}:
        raise reader.unsupported(
            "compress_ratios", f"0 and powers of two up to {_MOST_RATIO}, not {min(odd)}"
        )
    return ratios[:num_layers]


def _sources(
    ratios: Sequence[int], keeps: Set[int], chooses: Set[int], candidate_source: int
) -> Iterator[int | None]:
    """Yield, for each layer, the layer whose entries it sees."""
    source = None
    for layer, ratio in enumerate(ratios):
        if layer in keeps:
            source = layer
            if layer not in chooses:
                raise _wrong(_KV_SOURCES, f"has layer {layer}, and {_INDEX_SOURCES} does not")
            if 0 <= candidate_source < layer:
                raise _wrong(
                    "candidate_source_layer_id", f"is {candidate_source}, and layer {layer} keeps new entries"
                )
        if ratio and (source is None or ratios[source] != ratio):
            raise _wrong(
                "compress_ratios",
                f"gives layer {layer} the ratio {ratio}, and no layer of {_KV_SOURCES} before it has it",
            )
        if not ratio and layer in chooses:
            raise _wrong(_INDEX_SOURCES, f"has layer {layer}, whose compress_ratios is 0")
        yield source if ratio else None
    if candidate_source >= 0 and candidate_source not in chooses:
        raise _wrong(
            "candidate_source_layer_id", f"is {candidate_source}, and {_INDEX_SOURCES} does not have it"
        )


def _read_candidates(reader: ConfigReader, num_chosen: int, num_layers: int) -> tuple[CandidateConfig, int]:
    """Return the blocks inside which indexers choose, and the layer that finds them; -1: there is none."""
    source = reader.integer("candidate_source_layer_id", default=-1, least=-1, most=num_layers - 1)
    found = CandidateConfig(
        num_blocks=reader.integer("candidate_topk_blocks", default=2048, most=1 << 20),
        block_size=reader.integer("candidate_block_size", default=8, most=8192),
    )
    # The last block may have one entry.
    if source >= 0 and num_chosen > (least := found.num_entries - found.block_size + 1):
        raise _wrong(
            "index_topk", f"is {num_chosen}, and candidate_topk_blocks may have only {least} entries"
        )
    return found, source


def _read_tables(
    reader: ConfigReader, vocab_size: int, num_layers: int, border_id: object
) -> dict[int, NgramConfig]:
    """Return the n-gram tables by layer."""
    layers = reader.integers("engram_layer_ids", least=0, most=num_layers - 1)
    size = reader.integer("engram_max_ngram_size", default=4, least=2, most=16)
    num_heads = (size - 1) * reader.integer("engram_n_heads", default=8, most=256)
    base = reader.integer("engram_vocab_size", default=16_000_000, least=2, most=1 << 40)
    ids = reader.integer("engram_compressed_vocab_size", default=99_092)
    row_dim = reader.integer("engram_head_dim", default=256)
    blank_id = reader.integer("engram_pad_token_id", default=2, least=0, most=vocab_size - 1)
    given = reader.integers("engram_num_embeddings", least=1, most=1 << 50)
    if border_id is not None and not (type(border_id) is int and 0 <= border_id < vocab_size):
        raise _wrong("image_token_id", f"is {quote(border_id)}, expected a token id below {vocab_size}")
    primes = primes_from(base, 0, len(layers) * num_heads)
    tables = {
        layer: NgramConfig(
            primes=primes[table * num_heads : (table + 1) * num_heads],
            multipliers=pcg_multipliers(layer, ids, size),
            row_dim=row_dim,
            blank_id=blank_id,
            border_id=border_id,
            folded_ids=ids,
        )
        for table, layer in enumerate(layers)
    }
    if len(tables) < len(layers):
        raise _wrong("engram_layer_ids", f"has a layer twice: {list(layers)}")
    rows = [table.num_rows for table in tables.values()]
    if given and list(given) != rows:
        raise _wrong("engram_num_embeddings", f"is {list(given)}, and {rows} follow from engram_vocab_size")
    return tables


def _wrong(key: str, what: str) -> CheckpointError:
    return CheckpointError(f"config.json: {key} {what}", key=key)
