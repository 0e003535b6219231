"""Random weights by tensor name, with the routing and answers that a benchmark needs.

    RandomWeights(config, routing="recorded")["layers.3.router"]   ->  Normal(...) | Exact(...)

    plain      every matrix is noise
    uniform    each token of a document chooses new experts: the worst case for a cache
    recorded   the hierarchical Gaussian generator fitted to recorded traces (next-token overlap and LRU curve)

With `uniform` and `recorded`, token ids form documents of `DOCUMENT_TOKENS` consecutive ids, and the greedy answer to
the beginning of a document is its rest. Any engine's arithmetic can be checked that way, and routing follows the text
instead of a loop. This uses `RESERVED` channels of the residual stream, which embeddings fill and no layer writes (rows
of zeros in `o` and `down`), so that routers and head see them unchanged:

    0            one                            -> an expert's popularity                          G_e    share v_g
    1 to 63      the document's latent          -> the subject of the document                     Doc_e  share v_d
    64 to 159    the token's latent, AR(1)      -> the part kept from one token to the next        u_te   share g
    160 to 255   the token's code               -> the head's row of the following id
    the rest     noise, and the layers' output  -> new in every token and layer                    eps    the remainder

    score of expert e for token t = sqrt(v_g) G_e + sqrt(v_d) Doc_e + sqrt(g) u_te + sqrt(1 - v_g - v_d - g) eps
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from argosy.checkpoint.geometry import dense_shapes, draft_shapes, expert_shapes
from argosy.config import BankResidual, ModelConfig

Floats: TypeAlias = NDArray[np.float32]
Routing = Literal["plain", "uniform", "recorded"]
ROUTINGS: tuple[Routing, ...] = ("plain", "uniform", "recorded")

WEIGHTS_VERSION = 3  # increases with any change of the values: models of another version are made again
DOCUMENT_TOKENS = 640
RESERVED = 256
_ONE, _DOCUMENT, _TOKEN, _CODE = slice(0, 1), slice(1, 64), slice(64, 160), slice(160, RESERVED)
# Fitted to recorded routing; the static share v_g + v_d rises with depth by 2 x 0.15 in total.
V_GLOBAL, V_DOCUMENT, V_TOKEN, RHO = 0.15, 0.40, 0.30, 0.5
_DEPTH_SPREAD = 0.15
_ATTENTION_SHARE = 0.25
# Networks write so much that a router evaluated one layer early names 0.88 of the experts (routing.py): trained models
# were measured at 0.81 to 0.89. Otherwise look-ahead would be right more often here than anywhere.
_NETWORK_SHARE = 1.5
# The matrices with which mixers, rows of tables and networks write the hidden state.
_MIXERS_WRITE = frozenset({"o", "kda_out", "ngram_value"})
_NETWORKS_WRITE = frozenset({"down", "shared_down", "latent_up"})
# The logit of a document's next token before layers have added to the norm; it is about 13 afterwards. The others have
# a deviation near 1.8, so the largest of 32000 stays below 8.
_NEXT_LOGIT = 18.0


@dataclass(frozen=True, slots=True)
class Normal:
    """Independent normal numbers; the first `silent_rows` rows are zero."""

    shape: tuple[int, ...]
    deviation: float
    silent_rows: int = 0


@dataclass(frozen=True, slots=True)
class Exact:
    """float32 values that matter individually: `read()` returns them in `shape`."""

    shape: tuple[int, ...]
    read: Callable[[], Floats]


Recipe: TypeAlias = Normal | Exact


class RandomWeights:
    """The contents of every tensor of a geometry, by canonical name; an expert's are `expert.gate`, `.up`, `.down`.

    A draft layer, if the last layer is one, passes on the embedding of its token: with `uniform` and `recorded`, its
    drafts continue the document, too.

    Raises:
        ValueError: hidden_size leaves no room beside the reserved channels.
    """

    def __init__(self, config: ModelConfig, *, routing: Routing = "plain", seed: int = 0) -> None:
        if routing != "plain" and config.hidden_size < 2 * RESERVED:
            raise ValueError(
                f"{routing} routing reserves {RESERVED} channels, and hidden_size is {config.hidden_size};"
                f" the least is {2 * RESERVED}"
            )
        self.config, self.routing, self._seed = config, routing, seed
        self.shapes: dict[str, tuple[int, ...]] = dict(dense_shapes(config))
        shapes = expert_shapes(config, (config.moe_layers or (0,))[0])
        self.shapes |= dict(draft_shapes(config))
        names = ("expert.gate", "expert.up", "expert.down")[-len(shapes) :]
        self.shapes |= dict(zip(names, shapes, strict=True))

    def __getitem__(self, name: str) -> Recipe:
        shape, kind = self.shapes[name], name.rpartition(".")[2]
        if kind.endswith("norm"):
            return Exact(shape, lambda: np.ones(shape, np.float32))
        if kind.endswith("bias"):
            return Exact(shape, lambda: np.zeros(shape, np.float32))
        if kind == "draft_join":
            return Exact(shape, lambda: np.eye(*shape, dtype=np.float32))
        if self.routing != "plain":
            if kind == "embed":
                return Exact(shape, self.embedding)
            if kind == "head":
                return Exact(shape, self._head)
            if kind == "router":
                return Exact(shape, lambda: self.router(int(name.split(".")[1])))
            if kind.endswith("_mix_scale") and isinstance(self.config.residual, BankResidual):
                return Exact(shape, lambda: self._bank_scale(list(self.shapes).index(name)))
        deviation = 1.0 if kind == "embed" else shape[-1] ** -0.5
        # Experts that read and write a narrower vector do not write the hidden state: `latent_up` does.
        is_inner = name == "expert.down" and self.config.expert_latent > 0
        if self.routing == "plain" or kind not in _MIXERS_WRITE | _NETWORKS_WRITE or is_inner:
            return Normal(shape, deviation)
        # Attention pulls the tokens of a text towards each other; at full size, a few layers of it leave nothing else.
        return Normal(
            shape,
            deviation * (_ATTENTION_SHARE if kind in _MIXERS_WRITE else self._network_share(kind)),
            silent_rows=RESERVED,
        )

    def _network_share(self, kind: str) -> float:
        """The factor of the matrix with which an expert writes.

        A token's experts write a mean, so a shared expert, which is not one of them, would drown them. Scaled as the
        square root of their number, it writes as much as they do together, and both as much as experts alone.
        """
        if not self.config.shared_width:
            return _NETWORK_SHARE
        of_mean = 1.0 if kind == "down" else self.config.experts_per_token**-0.5
        return _NETWORK_SHARE * of_mean / math.sqrt(2)

    def _random(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, *purpose])

    def _codes(self) -> Floats:
        """[vocab, code channels], all of the same length, so that no id is favoured over another."""
        width = _CODE.stop - _CODE.start
        codes = self._random(1).standard_normal((self.config.vocab_size, width), np.float32)
        return codes * (math.sqrt(width) / np.linalg.norm(codes, axis=1, keepdims=True))  # type: ignore[no-any-return]

    def embedding(self) -> Floats:
        """float32 [vocab, hidden]."""
        vocab, hidden = self.config.vocab_size, self.config.hidden_size
        table = self._random(2).standard_normal((vocab, hidden), np.float32)
        documents = np.arange(vocab) // DOCUMENT_TOKENS
        latents = self._random(3).standard_normal((documents[-1] + 1, _DOCUMENT.stop - _DOCUMENT.start))
        table[:, _ONE] = 1.0
        table[:, _DOCUMENT] = latents[documents]
        token = table[:, _TOKEN]
        for number in range(1, vocab):
            if documents[number] == documents[number - 1]:
                token[number] = RHO * token[number - 1] + math.sqrt(1 - RHO * RHO) * token[number]
        table[:, _CODE] = self._codes()
        return table

    def _head(self) -> Floats:
        vocab, hidden = self.config.vocab_size, self.config.hidden_size
        table = self._random(4).standard_normal((vocab, hidden), np.float32)
        table *= (hidden - RESERVED) ** -0.5
        table[:, :RESERVED] = 0.0
        width = _CODE.stop - _CODE.start
        table[:, _CODE] = np.roll(self._codes(), 1, axis=0) * (_NEXT_LOGIT / width)
        return table

    def _bank_scale(self, number: int) -> Floats:
        """float32 [hidden], which scores the states of a bank: the embedding most, since only it has the channels that
        routers and head need.
        """
        hidden = self.config.hidden_size
        scale = self._random(6, number).standard_normal(hidden, np.float32) * (0.5 * hidden**-0.5)
        scale[_ONE] = 2.0
        return scale  # type: ignore[no-any-return]

    def shares(self, layer: int) -> tuple[float, float, float, float]:
        """v_g, v_d, g and the remainder at this depth; they sum to 1."""
        if self.routing == "uniform":
            return 0.0, 0.0, 0.0, 1.0
        depth = layer / max(1, self.config.num_layers - 1)
        static = V_GLOBAL + V_DOCUMENT + _DEPTH_SPREAD * (2 * depth - 1)
        of_static = V_GLOBAL / (V_GLOBAL + V_DOCUMENT)
        of_rest = V_TOKEN / (1 - V_GLOBAL - V_DOCUMENT)
        rest = 1 - static
        return static * of_static, static * (1 - of_static), rest * of_rest, rest * (1 - of_rest)

    def router(self, layer: int) -> Floats:
        """float32 [experts, hidden] for a layer."""
        shape = self.shapes[f"layers.{layer}.router"]
        rows = self._random(5, layer).standard_normal(shape, np.float32)
        v_global, v_document, v_token, rest = self.shares(layer)
        rows[:, _CODE] = 0.0
        for channels, share in (
            (_ONE, v_global),
            (_DOCUMENT, v_document),
            (_TOKEN, v_token),
            (slice(RESERVED, shape[1]), rest),
        ):
            rows[:, channels] *= math.sqrt(share / (channels.stop - channels.start))
        return rows

    def chosen(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Experts [layers, tokens, k] that the routers choose before layers have added anything to the embedding.

        Later contributions of layers are noise to the routers of `uniform` and `recorded`; `routing.py` measures
        reality.
        """
        embedding = self.embedding()[tokens]
        k = self.config.experts_per_token
        return np.stack(
            [
                np.argpartition(embedding @ -self.router(layer).T, k - 1, axis=1)[:, :k]
                for layer in self.config.moe_layers
            ]
        )


def num_continued(number: int, prompt_tokens: int, answer: Sequence[int], *, vocab: int = 32_000) -> int:
    """Number of answer tokens, after `prompt_tokens` ids of a document, that are the document's own next ones."""
    expected = document(number, prompt_tokens + len(answer), vocab=vocab)[prompt_tokens:]
    return sum(a == b for a, b in zip(answer, expected, strict=True))


def document(number: int, num_tokens: int = DOCUMENT_TOKENS, *, vocab: int = 32_000) -> list[int]:
    """The first ids of a document; a longer text continues into the next one."""
    begin = number * DOCUMENT_TOKENS
    return [(begin + position) % vocab for position in range(num_tokens)]
