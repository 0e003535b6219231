"""The mixers of a layer, which let positions see each other: attention of three kinds, and recurrent networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from argosy.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: dimension pair j at position p turns by p * inverse_frequency(j)."""

    theta: float
    rotary_dim: int  # only the first rotary_dim dimensions of head_dim rotate
    is_interleaved: bool = False  # dimension 2 i turns with 2 i + 1, not with i + rotary_dim / 2
    # Positions in media have axes (time, row, column); the axis of each dimension pair. Empty: 0 for every pair.
    axes: tuple[int, ...] = ()
    kind: Literal["default", "linear", "dynamic", "yarn", "llama3", "proportional"] = "default"
    factor: float = 1.0
    turning_pairs: int | None = None  # proportional: only the first of the pairs turn; None: all of them
    original_context: int = 0  # positions the model was trained on, before scaling
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn: None computes 0.1 ln(factor) + 1
    mscale: float | None = None  # yarn, DeepSeek's variant
    mscale_all_dim: float | None = None
    truncate: bool = True  # yarn: whole-number correction range
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    # Each pair's frequency is divided by its factor, before the rule of `kind` applies.
    frequency_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind == "yarn" and self.theta <= 1:
            raise CheckpointError(
                f"the base of yarn's frequencies is {self.theta}, expected more than 1 (rope_theta)"
            )

    @property
    def num_axes(self) -> int:
        """Axes of a position: time, row and column, or one."""
        return 3 if self.axes else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryScale:
    """Queries are multiplied by 1 + beta * log(1 + (position + offset) // period) (arXiv:2501.19399)."""

    beta: float
    period: int
    offset: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockIndexConfig:
    """An indexer of block-sparse attention. In MiniMax-M3, one head for each KV head chooses the blocks that it sees,
    by their best positions. In Qwen3.8, `joint_heads` choose whole blocks for all KV heads, by the mean key of each; a
    token also sees its unfinished block.
    """

    num_chosen: int  # blocks; a token that could see no more sees all
    block_size: int  # positions
    head_dim: int
    num_local: int = 0  # the token's own block, and those before it that are always chosen
    joint_heads: int = 0  # 0: a head for each KV head

    @property
    def num_positions(self) -> int:
        """The positions that a token sees, an unfinished block aside."""
        return self.num_chosen * self.block_size


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionConfig:
    """Grouped-query attention (arXiv:2305.13245)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig | None  # None: nothing rotates
    value_dim: int = 0  # dimensions of a value; 0: head_dim
    value_scale: float = 1.0  # factor of the values
    sliding_window: int = 0  # 0: full attention
    is_chunked: bool = (
        False  # the window begins at multiples of its size, so that a position sees its own chunk
    )
    is_causal: bool = False  # also in media spans, no position sees a later one
    scale: float = 0.0  # factor of attention scores; 0: 1 / sqrt(head_dim)
    keys_are_values: bool = False  # no v: the keys, before their norm, are the values
    has_qkv_bias: bool = False
    has_o_bias: bool = False
    query_scale: QueryScale | None = None  # a factor of queries that grows with their position
    # RMSNorm: none, over each head, over all heads at once, or over each head without a weight.
    qk_norm: Literal["none", "head", "flat", "unweighted"] = "none"
    is_norm_last: bool = False  # it comes after rotary
    qkv_limit: float = 0.0  # q, k and v are clamped to -limit..limit; 0: not clamped
    has_value_norm: bool = False  # RMSNorm without a weight over each head of v
    has_sinks: bool = False  # a learnt score per head that takes attention weight and adds nothing: `sinks`
    # Each head's output is multiplied by its gate's activation. query: q has rows for both, head by head; heads and
    # elements: `attn_gate` gives one for each head, or for each element.
    output_gate: Literal["none", "query", "heads", "elements"] = "none"
    gate_activation: Literal["sigmoid", "softplus"] = "sigmoid"
    index: BlockIndexConfig | None = None  # a token sees only the best blocks; None: all

    @property
    def width_of_values(self) -> int:
        """The dimensions of a value."""
        return self.value_dim or self.head_dim

    @property
    def pools(self) -> dict[str, tuple[int, int, bool]]:
        """Block size, dimension and overlap of the pool of index keys, if blocks have one each."""
        index = self.index
        if index is None or not index.joint_heads:
            return {}
        return {"index_": (index.block_size, index.head_dim, False)}

    @property
    def has_state(self) -> bool:
        """Whether unfinished blocks are kept per sequence."""
        return bool(self.pools)

    @property
    def gate_rows(self) -> int:
        """The rows of `attn_gate`."""
        match self.output_gate:
            case "heads":
                return self.num_heads
            case "elements":
                return self.num_heads * self.width_of_values
        return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexConfig:
    """The lightning indexer (DeepSeek-V3.2, arXiv:2512.02556): it chooses the positions that a token sees."""

    num_chosen: int  # a token that could see no more sees all
    num_heads: int
    head_dim: int
    is_interleaved: bool  # pairs of its rotary dimensions, whatever the layer's are
    norm_eps: float  # for the LayerNorm of its keys
    rope_begin: int = 0  # the first dimension that rotates
    # Positions of a group that share a key, the mean of theirs by the softmax of `index_gate` (GLM-5.3), and are chosen
    # together; a token also sees its unfinished group. num_chosen is a multiple.
    group_size: int = 1
    # shared: no indexer here, the layer sees what the last one with its own chose. missing: the file has none, so
    # tokens see all positions, which is exact while these are no more than num_chosen.
    kind: Literal["own", "shared", "missing"] = "own"


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values share a compressed vector."""

    num_heads: int
    query_rank: int  # 0: queries are not compressed
    kv_rank: int
    nope_dim: int  # query and key dimensions of a head that do not rotate
    rope_dim: int  # dimensions that rotate; all heads share the key's
    value_dim: int
    norm_eps: float  # for the norms of the compressed vectors
    rope: RopeConfig | None  # None: nothing rotates
    scale: float = 0.0  # factor of attention scores; 0: 1 / sqrt(head_dim)
    query_scale: QueryScale | None = None  # a factor of queries that grows with their position
    # The result of each head, or each of its elements, is multiplied by a sigmoid: `attn_gate`.
    output_gate: Literal["none", "heads", "elements"] = "none"
    has_sinks: bool = False  # a learnt score per head that takes attention weight and adds nothing: `sinks`
    is_up_split: bool = False  # the file holds k_up (transposed head by head) and v_up instead of kv_up
    index: IndexConfig | None = None  # a token sees only the best positions; None: all

    @property
    def head_dim(self) -> int:
        """The dimensions of a query."""
        return self.nope_dim + self.rope_dim

    @property
    def cached_dim(self) -> int:
        """The dimensions that a position keeps: the compressed vector and the rotated key."""
        return self.kv_rank + self.rope_dim

    @property
    def gate_rows(self) -> int:
        """The rows of `attn_gate`."""
        return {"none": 0, "heads": 1, "elements": self.value_dim}[self.output_gate] * self.num_heads

    @property
    def own_index(self) -> IndexConfig | None:
        """The indexer that the layer runs itself."""
        return self.index if self.index is not None and self.index.kind == "own" else None

    @property
    def num_chosen(self) -> int:
        """The most positions that a token sees; 0: all."""
        return 0 if self.index is None or self.index.kind == "missing" else self.index.num_chosen

    @property
    def group_size(self) -> int:
        """The positions that are chosen together."""
        return 1 if self.index is None else self.index.group_size

    @property
    def pools(self) -> dict[str, tuple[int, int, bool]]:
        """Ratio, dimension and overlap of the pool of index keys, if groups share them."""
        index = self.own_index
        return (
            {}
            if index is None or index.group_size == 1
            else {"index_": (index.group_size, index.head_dim, False)}
        )

    @property
    def has_state(self) -> bool:
        """Whether unfinished groups are kept per sequence."""
        return bool(self.pools)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig:
    """Groups of positions become entries: means of their vectors, weighted by a softmax of gates in each dimension."""

    ratio: int  # positions of a group; 1: an entry is a normed vector
    has_overlap: bool = False  # an entry also has a part of the group before, by columns of its own
    has_bias: bool = True  # of the gates, by place in the group
    source: int | None = None  # the earlier layer whose pool's entries are read; None: the layer has a pool


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateConfig:
    """Blocks of entries inside which an indexer chooses (DeepSeek-V4.1)."""

    num_blocks: int  # a token that could see no more entries than these have chooses among all
    block_size: int  # entries
    is_source: bool = False  # the layer finds them: those with the best entries, and the last one

    @property
    def num_entries(self) -> int:
        return self.num_blocks * self.block_size


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryIndexConfig:
    """The lightning indexer over index keys of entries: it chooses the entries that a token sees."""

    num_chosen: int  # a token that could see no more sees all
    num_heads: int
    head_dim: int
    # pool: keys come from a pool of their own. entries: they are made of the layer's entries, before these rotate:
    # `index_k`; layers that read an earlier layer's entries read its keys as well.
    keys: Literal["pool", "entries"] = "pool"
    is_shared: bool = False  # no indexer here: the layer sees what the last one with its own chose
    candidates: CandidateConfig | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedConfig:
    """DeepSeek-V4's attention: a position's one vector is key and value of all heads. A token sees a window of
    positions, and entries that stand for groups of all positions; V4.1's layers may share them.

    The output projection has two factors: `o_down` multiplies each group of heads by a matrix of its own.
    """

    num_heads: int
    head_dim: int
    query_rank: int
    num_groups: int
    output_rank: int  # of each group
    sliding_window: int
    norm_eps: float  # for the norms of the compressed query, of the vector and of each head
    rope: RopeConfig | None  # the last dimensions rotate, and those of the result back; None: nothing rotates
    has_head_norm: bool = False  # RMSNorm without a weight over each head of the query, before rotary
    scale: float = 0.0  # factor of attention scores; 0: 1 / sqrt(head_dim)
    pool: PoolConfig | None = None  # None: a token sees only its window
    index: EntryIndexConfig | None = None  # with a pool; None: a token sees all entries

    @property
    def own_index(self) -> EntryIndexConfig | None:
        """The indexer that the layer runs itself."""
        return None if self.index is None or self.index.is_shared else self.index

    @property
    def makes_keys(self) -> bool:
        """Whether the layer makes index keys of its entries."""
        index = self.own_index
        return bool(self.pools) and index is not None and index.keys == "entries"

    @property
    def pools(self) -> dict[str, tuple[int, int, bool]]:
        """Ratio, dimension and overlap of the layer's pool of entries, then of that of index keys, by the prefix of
        their tensors.
        """
        if self.pool is None or self.pool.source is not None:
            return {}
        dims = {"pool_": self.head_dim}
        if self.own_index is not None and self.own_index.keys == "pool":
            dims["index_pool_"] = self.own_index.head_dim
        return {name: (self.pool.ratio, dim, self.pool.has_overlap) for name, dim in dims.items()}

    @property
    def has_state(self) -> bool:
        """Whether unfinished groups are kept per sequence."""
        return any(ratio > 1 for ratio, _, _ in self.pools.values())

    @property
    def group_dim(self) -> int:
        """The dimensions of the result of a group's heads."""
        return self.num_heads // self.num_groups * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaConfig:
    """A gated delta net (arXiv:2412.06464): a state per sequence instead of keys and values."""

    num_key_heads: int
    num_value_heads: int
    key_dim: int  # per head
    value_dim: int
    conv_width: int  # positions that the causal convolution sees
    has_joined_qkvz: bool = False  # one matrix holds q, k, v and z of each key head in turn
    has_joined_ba: bool = False  # the same for b and a
    # Value head i uses key head i % num_key_heads, not i // (num_value_heads / num_key_heads).
    is_tiled: bool = False
    is_rate_log: bool = True  # the decay rate is stored as log(-rate)
    has_sigmoid_gate: bool = False  # the output is multiplied by sigmoid(z), not by silu(z)

    @property
    def key_channels(self) -> int:
        return self.num_key_heads * self.key_dim

    @property
    def value_channels(self) -> int:
        return self.num_value_heads * self.value_dim

    @property
    def conv_channels(self) -> int:
        """The channels of q, k and v of all heads."""
        return 2 * self.key_channels + self.value_channels

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """The sizes as `_native` expects them."""
        return self.num_key_heads, self.num_value_heads, self.key_dim, self.value_dim, self.conv_width


@dataclass(frozen=True, slots=True, kw_only=True)
class KimiDeltaConfig:
    """Kimi Delta Attention (arXiv:2510.26692): a delta net with a decay for each key dimension of a head."""

    num_heads: int
    head_dim: int
    conv_width: int  # positions that the causal convolutions of q, k and v see
    decay_rank: int = 0  # the projection of the decay has two factors: `kda_decay_down`; 0: one
    gate_rank: int = 0  # the same of the output gate: `kda_gate_down`
    floor: float = 0.0  # the least logarithm of a decay; 0: there is none
    is_rate_log: bool = True  # the decay rate is stored as log(-rate), else with either sign

    @property
    def channels(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """The sizes as `_native` expects them: those of a delta net."""
        return self.num_heads, self.num_heads, self.head_dim, self.head_dim, self.conv_width


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortConvConfig:
    """A gated short convolution (LFM2): C * conv(B * x). Its last inputs are kept per sequence."""

    channels: int  # the hidden size
    conv_width: int  # positions that the causal convolution sees
    has_bias: bool = False  # of both projections and of the convolution


@dataclass(frozen=True, slots=True, kw_only=True)
class MambaConfig:
    """A Mamba-2 mixer (arXiv:2405.21060): a state per sequence instead of keys and values."""

    num_heads: int
    head_dim: int
    state_dim: int
    num_groups: int  # heads of a group share B and C, and are normed together
    conv_width: int  # positions that the causal convolution sees
    has_conv_bias: bool = True
    has_bias: bool = False  # of both projections
    least_dt: float = 0.0  # bounds of a step
    most_dt: float = 0.0  # 0: none
    is_rate_log: bool = True  # the decay rate is stored as log(-rate)

    @property
    def channels(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def conv_channels(self) -> int:
        """The channels of x, B and C."""
        return self.channels + 2 * self.num_groups * self.state_dim

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """The sizes as `_native` expects them."""
        return self.num_heads, self.head_dim, self.state_dim, self.num_groups, self.conv_width


@dataclass(frozen=True, slots=True, kw_only=True)
class LightningConfig:
    """Lightning attention (arXiv:2401.04658): linear attention whose heads forget at fixed rates."""

    slopes: tuple[float, ...]  # of each head: a token's share in the state falls by e^-slope with every token
    head_dim: int
    norm_eps: float  # for the norm of the output
    num_groups: int = (
        1  # parts of equal size of all heads' output, each with its own RMSNorm, before the gate
    )
    rope: RopeConfig | None = None  # None: nothing rotates
    has_qk_norm: bool = False  # RMSNorm over each head of q and k, before rotary
    has_silu: bool = False  # q, k and v become silu of themselves, first
    # One matrix has the rows of q, k and v of each head in turn; without norms and rotary.
    has_joined_qkv: bool = False
    scale: float = 1.0  # multiplies q . k

    @property
    def num_heads(self) -> int:
        return len(self.slopes)

    @property
    def channels(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """The sizes as `_native` expects them: those of a delta net without a convolution."""
        return self.num_heads, self.num_heads, self.head_dim, self.head_dim, 1


RecurrentMixer = DeltaConfig | KimiDeltaConfig | ShortConvConfig | MambaConfig | LightningConfig
WindowedMixer = AttentionConfig | CompressedConfig  # they have `sliding_window`
Mixer = WindowedMixer | LatentConfig | RecurrentMixer
# They have `rope`, which may be None.
RotaryMixer = AttentionConfig | LatentConfig | CompressedConfig | LightningConfig
