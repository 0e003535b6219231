"""Report how experts are used on texts of several domains: shares, specialisation, balance, reuse, and caches.

    choices and losses of each domain  ->  report  ->  `argosy routes`: text, JSON, picture

Specialisation is the mutual information, in bits, between a token's experts and its domain, all domains weighted
equally: 0 if experts do not depend on the domain, log2(domains) if each expert serves a single one. A small sample
looks specialised by chance, so the report also gives the mean over random labels and how often random labels
reached the same value (a permutation test):

    within each layer  stretches of STRETCH tokens swap their domains
    across layers      experts swap their numbers within each layer: only where an expert's number means the same in
                       all layers does the true numbering score higher than such a shuffle

Elsewhere: `trace.py` keeps the choices; `cli/commands/routes.py` runs the model on texts; `replay.py` simulates
caches.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from argosy.experts.hit_rate import ReuseGaps, WorkingSet
from argosy.observe.recorder import Choices
from argosy.observe.replay import hit_rates, replay_bytes

CLASSES = ("word", "word part", "number", "punctuation", "white space", "other")
STRETCH = 64  # tokens that the test moves together, because neighbours are alike
BUDGETS = (6, 12, 25, 50, 75)  # percent of all experts
_SHUFFLES = 999
_MOST_SHUFFLED = 1 << 32  # numbers that all shuffles together may touch, so larger models get fewer shuffles
_CLASS_SHUFFLES = 100  # the fewest that can show p <= 0.01
_MOST_PAIRS = 3

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


def class_of(text: str) -> int:
    """Classify a token by its text: an index into CLASSES."""
    bare = text.strip()
    if not bare:
        return CLASSES.index("white space" if text else "other")
    if "\N{REPLACEMENT CHARACTER}" in bare:  # a part of a character
        return CLASSES.index("other")
    if bare.isalpha():
        return CLASSES.index("word part" if text[0] == bare[0] else "word")
    if bare.isnumeric():
        return CLASSES.index("number")
    if all(unicodedata.category(character)[0] in "PS" for character in bare):
        return CLASSES.index("punctuation")
    return CLASSES.index("other")


@dataclass(frozen=True, slots=True)
class DomainRouting:
    """The tokens of one domain: choices, classes, and the loss in nats of each token except first ones."""

    name: str
    choices: Choices
    classes: NDArray[np.int8]
    losses: Floats

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.losses.mean())) if len(self.losses) else float("nan")


@dataclass(frozen=True, slots=True)
class Specialisation:
    """Mutual information in bits; `by_chance` and `p` come from random labels."""

    bits: float
    by_chance: float
    p: float

    @property
    def is_significant(self) -> bool:
        return self.p <= 0.01


@dataclass(frozen=True, slots=True)
class LayerReport:
    layer: int
    entropy_bits: float  # over the choices in all domains together
    balance: float  # 2 ** entropy over the number of experts: 1 if all are used equally
    domain: Specialisation | None  # None: one domain
    token_class: Specialisation
    reuse: float  # fraction of a token's experts that the preceding token also chose
    reuse_by_chance: float  # the same for tokens in random order
    # Two experts, the fraction of tokens with both, and its ratio to chance.
    pairs: list[tuple[int, int, float, float]]


@dataclass(frozen=True, slots=True)
class RoutingReport:
    """Everything that `argosy routes` reports, except the effects of removing experts."""

    layers: tuple[int, ...]
    num_experts: int
    experts_per_token: int
    domains: tuple[str, ...]
    num_tokens: tuple[int, ...]
    perplexities: tuple[float, ...]
    uses: Counts  # [domains, layers, experts]
    per_layer: list[LayerReport]
    across_domain: Specialisation | None  # between an expert's number, in all layers at once, and the domain
    served_by: dict[str, list[int]]  # domain -> expert numbers that serve it in all layers
    working_set: WorkingSet
    caches: dict[int, dict[str, float]]  # slots -> policy -> hit rate

    @property
    def shares(self) -> Floats:
        """[domains, layers, experts]: fractions of a layer's choices."""
        return np.asarray(self.uses / np.maximum(1, self.uses.sum(axis=2, keepdims=True)), np.float64)

    def as_dict(self) -> dict[str, Any]:
        return {
            "layers": list(self.layers),
            "num_experts": self.num_experts,
            "experts_per_token": self.experts_per_token,
            "domains": [
                {"name": name, "tokens": tokens, "perplexity": perplexity, "shares": shares}
                for name, tokens, perplexity, shares in zip(
                    self.domains,
                    self.num_tokens,
                    self.perplexities,
                    self.shares.round(5).tolist(),
                    strict=True,
                )
            ],
            "per_layer": [
                {
                    "layer": one.layer,
                    "entropy_bits": one.entropy_bits,
                    "balance": one.balance,
                    "domain": _as_dict(one.domain),
                    "token_class": _as_dict(one.token_class),
                    "next_token_reuse": one.reuse,
                    "next_token_reuse_by_chance": one.reuse_by_chance,
                    "chosen_together": [
                        {"experts": [first, second], "share": share, "times_chance": lift}
                        for first, second, share, lift in one.pairs
                    ],
                }
                for one in self.per_layer
            ],
            "across_layers": None
            if self.across_domain is None
            else {"domain": _as_dict(self.across_domain), "served_by": self.served_by},
            "working_set": self.working_set.as_dict(),
            "caches": [{"slots": slots, **rates} for slots, rates in self.caches.items()],
        }


def working_bytes(num_tokens: int, *, num_layers: int, num_experts: int, k: int, num_domains: int) -> int:
    """The most bytes that a report on `num_tokens` takes, their choices included."""
    choices = num_tokens * num_layers * k
    replay = replay_bytes(num_tokens, num_layers=num_layers, num_experts=num_experts, k=k)
    stretches = (num_tokens // STRETCH + num_domains) * num_layers * num_experts * (8 + 4 + 4)
    of_layer = num_tokens * (k * k + 4 * num_experts + 24 * k) + 40 * num_experts**2
    shuffles = (_SHUFFLES + 40 * num_domains) * 8 * num_layers * max(1, num_experts // 16)
    return 3 * 2 * choices + replay + stretches + of_layer + shuffles


def report(
    domains: Sequence[DomainRouting],
    *,
    layers: tuple[int, ...],
    num_experts: int,
    num_slots: int | None = None,
    seed: int = 0,
) -> RoutingReport:
    """Report on the choices of each domain, which has at least one token.

    Args:
        num_slots: the size of the engine's cache, replayed in addition to BUDGETS; None: every expert is resident.
    """
    rng = np.random.default_rng(seed)
    k = domains[0].choices.shape[2]
    stretches = [_count_stretches(domain.choices, num_experts) for domain in domains]
    uses = np.stack([counts.sum(axis=0) for counts in stretches])
    by_layer, across = None, None
    if len(domains) > 1:
        by_layer = _domain_specialisation(stretches, rng)
        across = _across_layers(uses, rng)
    classes = np.concatenate([domain.classes for domain in domains])
    return RoutingReport(
        layers=layers,
        num_experts=num_experts,
        experts_per_token=k,
        domains=tuple(domain.name for domain in domains),
        num_tokens=tuple(len(domain.choices) for domain in domains),
        perplexities=tuple(domain.perplexity for domain in domains),
        uses=uses,
        per_layer=[
            _layer_report(
                layer,
                [domain.choices[:, i] for domain in domains],
                classes,
                num_experts,
                None if by_layer is None else by_layer[i],
                rng,
            )
            for i, layer in enumerate(layers)
        ],
        across_domain=across,
        served_by=_served_by(uses, [domain.name for domain in domains])
        if across is not None and across.is_significant
        else {},
        working_set=_working_set(domains, layers, num_experts),
        caches=_replay(domains, num_experts, num_slots),
    )


# ── specialisation ──────────────────────────────────────────────────────────────────────────────────────────────────


def _count_stretches(choices: Choices, num_experts: int) -> Counts:
    """Uses in each stretch of tokens: [stretches, layers, experts]."""
    num_tokens, num_layers, _ = choices.shape
    counts: Counts = np.zeros((-(-num_tokens // STRETCH), num_layers, num_experts), np.int64)
    for number in range(len(counts)):
        part = choices[number * STRETCH : (number + 1) * STRETCH]
        for layer in range(num_layers):
            counts[number, layer] = np.bincount(part[:, layer].ravel(), minlength=num_experts)
    return counts


def information(uses: NDArray[Any]) -> Floats:
    """The information that experts carry about equally frequent domains, in bits: [..., domains, experts] -> [...]."""
    given = uses / np.maximum(1, uses.sum(axis=-1, keepdims=True))
    mean = given.mean(axis=-2, keepdims=True)
    ratio = np.divide(given, mean, out=np.ones_like(given), where=given > 0)
    bits: Floats = np.asarray((given * np.log2(ratio)).sum(axis=-1).mean(axis=-1), np.float64)
    return bits


def _domain_specialisation(stretches: Sequence[Counts], rng: np.random.Generator) -> list[Specialisation]:
    """Each layer's information about the domain, compared with shuffled domains of stretches."""
    owners = np.repeat(np.arange(len(stretches)), [len(counts) for counts in stretches])
    counts = np.concatenate(stretches).astype(np.float32)
    num_layers, num_experts = counts.shape[1:]
    flat = counts.reshape(len(counts), -1)

    def bits_of(labels: NDArray[np.int64]) -> Floats:
        one_hot = (labels == np.arange(len(stretches))[:, None]).astype(np.float32)
        uses = (one_hot @ flat).reshape(len(stretches), num_layers, num_experts)
        return information(uses.transpose(1, 0, 2))

    found = bits_of(owners)
    num_shuffles = int(np.clip(_MOST_SHUFFLED // (flat.size * len(stretches)), 99, _SHUFFLES))
    by_chance = np.stack([bits_of(rng.permutation(owners)) for _ in range(num_shuffles)])
    return [_against(found[layer], by_chance[:, layer]) for layer in range(num_layers)]


def _across_layers(uses: Counts, rng: np.random.Generator) -> Specialisation:
    """The information of an expert's number about the domain, compared with numbers shuffled within each layer."""
    shares = uses / np.maximum(1, uses.sum(axis=2, keepdims=True))

    def bits_of(of_layers: Floats) -> float:
        return float(information(of_layers.sum(axis=1)))

    by_chance = [bits_of(shuffle_experts(shares, rng)) for _ in range(_SHUFFLES)]
    return _against(bits_of(shares), np.array(by_chance))


def shuffle_experts(shares: NDArray[Any], rng: np.random.Generator) -> NDArray[Any]:
    """Shuffle the experts of each layer, in the same way for all domains: [domains, layers, experts]."""
    order = rng.permuted(np.tile(np.arange(shares.shape[2]), (shares.shape[1], 1)), axis=1)
    return np.take_along_axis(shares, order[None], axis=2)


def _against(found: float, by_chance: Floats) -> Specialisation:
    as_much = np.count_nonzero(by_chance >= found - 1e-12)
    return Specialisation(float(found), float(by_chance.mean()), (1 + as_much) / (1 + len(by_chance)))


def _served_by(uses: Counts, names: Sequence[str]) -> dict[str, list[int]]:
    """The expert numbers with at least twice an even share of a domain over all layers, and more of it than of any
    other.
    """
    shares = (uses / np.maximum(1, uses.sum(axis=2, keepdims=True))).mean(axis=1)  # [domains, experts]
    even = 1 / shares.shape[1]
    return {
        name: [
            expert
            for expert in np.argsort(-shares[number]).tolist()
            if shares[number, expert] >= 2 * even and shares[:, expert].argmax() == number
        ]
        for number, name in enumerate(names)
    }


def _layer_report(
    layer: int,
    at: Sequence[NDArray[np.uint16]],
    classes: NDArray[np.int8],
    num_experts: int,
    of_domain: Specialisation | None,
    rng: np.random.Generator,
) -> LayerReport:
    """Report on one layer, from its choices [tokens, k] in each domain and the classes of all tokens."""
    chosen = np.concatenate(at)
    uses = np.bincount(chosen.ravel(), minlength=num_experts)
    share = uses[uses > 0] / uses.sum()
    entropy = float(-(share * np.log2(share)).sum())
    reuse, reuse_by_chance = _next_token_reuse(at, num_experts)
    return LayerReport(
        layer=layer,
        entropy_bits=entropy,
        balance=2**entropy / num_experts,
        domain=of_domain,
        token_class=_class_specialisation(chosen, classes, num_experts, rng),
        reuse=reuse,
        reuse_by_chance=reuse_by_chance,
        pairs=_pairs(chosen, num_experts),
    )


def _class_specialisation(
    chosen: NDArray[np.uint16], classes: NDArray[np.int8], num_experts: int, rng: np.random.Generator
) -> Specialisation:
    """An expert's information about its token's class, weighted by frequency; chance is measured with shuffled
    classes.
    """

    def bits_of(labels: NDArray[np.int8]) -> float:
        keys = labels[:, None].astype(np.int64) * num_experts + chosen
        joint = np.bincount(keys.ravel(), minlength=len(CLASSES) * num_experts).reshape(len(CLASSES), -1)
        joint = joint / joint.sum()
        apart = joint.sum(axis=0) * joint.sum(axis=1, keepdims=True)
        both = joint > 0
        return float((joint[both] * np.log2(joint[both] / apart[both])).sum())

    by_chance = [bits_of(rng.permutation(classes)) for _ in range(_CLASS_SHUFFLES)]
    return _against(bits_of(classes), np.array(by_chance))


# ── reuse, company, caches ──────────────────────────────────────────────────────────────────────────────────────────


def _next_token_reuse(at: Sequence[NDArray[np.uint16]], num_experts: int) -> tuple[float, float]:
    """The fraction of a token's experts that its predecessor also chose, and the fraction for tokens in random
    order.
    """
    reused = following = 0
    by_chance = []
    for chosen in at:
        pairs = chosen[1:, :, None] == chosen[:-1, None, :]
        reused += int(np.count_nonzero(pairs))
        following += pairs.shape[0] * pairs.shape[1]
        of_token = np.bincount(chosen.ravel(), minlength=num_experts) / len(chosen)
        by_chance.append(float((of_token**2).sum() / chosen.shape[1]))
    return reused / max(1, following), float(np.mean(by_chance))


def _pairs(chosen: NDArray[np.uint16], num_experts: int) -> list[tuple[int, int, float, float]]:
    """The pairs of experts chosen together far more often than their individual uses explain."""
    has = np.zeros((len(chosen), num_experts), np.float32)
    np.put_along_axis(has, chosen.astype(np.int64), 1, axis=1)
    together = np.triu(has.T @ has, 1) / len(chosen)
    single = has.mean(axis=0)
    apart = np.outer(single, single)
    lift = np.divide(together, apart, out=np.ones_like(together), where=together > 0)
    surprise = together * np.log(lift)
    best = np.argsort(-surprise, axis=None)[:_MOST_PAIRS]
    rows, columns = np.unravel_index(best, surprise.shape)
    return [
        (int(a), int(b), float(together[a, b]), float(lift[a, b]))
        for a, b in zip(rows, columns, strict=True)
        if surprise[a, b] > 0
    ]


def _working_set(domains: Sequence[DomainRouting], layers: tuple[int, ...], num_experts: int) -> WorkingSet:
    timelines = []
    for domain in domains:
        timelines.append(ReuseGaps(len(layers), num_experts))
        timelines[-1].count(domain.choices)
    k = domains[0].choices.shape[2]
    return WorkingSet.of(timelines, layers=layers, num_experts=num_experts, experts_per_token=k)


def _replay(
    domains: Sequence[DomainRouting], num_experts: int, num_slots: int | None
) -> dict[int, dict[str, float]]:
    """Hit rates over the second half of each domain, after the first half has filled the cache."""
    halves = [np.split(domain.choices, [len(domain.choices) // 2]) for domain in domains]
    filled = np.concatenate([first for first, _ in halves])
    trace = np.concatenate([filled, *(second for _, second in halves)])
    _, num_layers, k = trace.shape
    all_experts = num_layers * num_experts
    budgets = {max(k, round(all_experts * percent / 100)) for percent in BUDGETS}
    if num_slots is not None:
        budgets.add(num_slots)
    return {
        slots: hit_rates(trace, num_experts=num_experts, slots=slots, counted_from=len(filled))
        for slots in sorted(budgets)
    }


def _as_dict(found: Specialisation | None) -> dict[str, float] | None:
    return None if found is None else {"bits": found.bits, "by_chance": found.by_chance, "p": found.p}
