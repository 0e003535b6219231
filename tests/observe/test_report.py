"""A report finds what experts specialise in where they do, and nothing where they do not."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from argosy import _native
from argosy.observe.report import (
    CLASSES,
    DomainRouting,
    RoutingReport,
    class_of,
    information,
    report,
    working_bytes,
)

DOMAINS = ("encyclopedia", "maths", "dialogue", "code")
LAYERS = tuple(range(1, 13))
NUM_EXPERTS, K, TOKENS = 8, 2, 512


def routes_of(
    strength: float = 3.0, seed: int = 0, *, domains: tuple[str, ...] = DOMAINS
) -> list[DomainRouting]:
    """Each domain prefers a pair of experts, the same in all layers; strength 0: none does."""
    rng = np.random.default_rng(seed)
    found = []
    for number, name in enumerate(domains):
        scores = rng.normal(size=(TOKENS, len(LAYERS), NUM_EXPERTS))
        scores[:, :, 2 * number : 2 * number + 2] += strength
        choices = np.argsort(-scores, axis=-1)[..., :K].astype(np.uint16)
        classes = rng.integers(0, len(CLASSES), TOKENS).astype(np.int8)
        found.append(DomainRouting(name, choices, classes, rng.random(TOKENS - 1)))
    return found


def renumbered(domains: list[DomainRouting], seed: int) -> list[DomainRouting]:
    """The routing of a model whose experts were shuffled within each layer, and its router with them."""
    rng = np.random.default_rng(seed)
    numbers = np.stack([rng.permutation(NUM_EXPERTS) for _ in LAYERS]).astype(np.uint16)
    return [
        DomainRouting(
            domain.name,
            np.stack([numbers[i][domain.choices[:, i]] for i in range(len(LAYERS))], axis=1),
            domain.classes,
            domain.losses,
        )
        for domain in domains
    ]


def reported(domains: list[DomainRouting], **more: Any) -> RoutingReport:
    return report(domains, layers=LAYERS, num_experts=NUM_EXPERTS, **more)


def test_experts_that_serve_a_domain_in_all_layers_are_named() -> None:
    found = reported(routes_of())
    assert {domain: sorted(experts) for domain, experts in found.served_by.items()} == {
        "encyclopedia": [0, 1], "maths": [2, 3], "dialogue": [4, 5], "code": [6, 7],
    }  # fmt: skip
    assert found.across_domain is not None
    assert found.across_domain.p == 0.001
    assert all(one.domain is not None and one.domain.is_significant for one in found.per_layer)


@pytest.mark.parametrize("seed", range(5))
def test_in_a_model_with_shuffled_experts_a_number_means_nothing_across_layers(seed: int) -> None:
    found = reported(renumbered(routes_of(), seed))
    assert found.served_by == {}
    assert found.across_domain is not None
    assert not found.across_domain.is_significant
    # The effect on its layers stays visible.
    assert all(one.domain is not None and one.domain.is_significant for one in found.per_layer)


@pytest.mark.parametrize("seed", range(3))
def test_experts_that_do_not_depend_on_the_domain_show_nothing(seed: int) -> None:
    found = reported(routes_of(strength=0.0, seed=seed))
    special = [one.domain for one in found.per_layer if one.domain is not None and one.domain.is_significant]
    assert len(special) <= 1  # of 12, at p <= 0.01
    for one in found.per_layer:
        assert one.domain is not None
        assert one.domain.bits < 3 * one.domain.by_chance
        assert not one.token_class.p < 0.009


def test_experts_that_a_token_chooses_by_its_class_are_found() -> None:
    domains = routes_of(strength=0.0)
    for domain in domains:
        for i, own in enumerate(domain.classes.tolist()):
            domain.choices[i, 3] = (own, own + 2)
    found = reported(domains)
    assert found.per_layer[3].token_class.is_significant
    assert found.per_layer[3].token_class.bits > 1.0
    assert sum(one.token_class.bits for one in found.per_layer) < found.per_layer[3].token_class.bits + 0.1


def test_information_is_that_of_equally_frequent_domains() -> None:
    apart = np.eye(4, 8) * [[1], [10], [100], [1000]]
    assert information(apart) == pytest.approx(2.0)
    assert information(np.ones((4, 8))) == pytest.approx(0.0)
    assert information(np.array([[1.0, 0], [1, 1]])) == pytest.approx(0.75 * np.log2(4 / 3))


def test_one_domain_has_no_specialisation_and_the_rest_of_the_report() -> None:
    found = reported(routes_of(domains=("only",)))
    assert found.across_domain is None
    assert found.served_by == {}
    assert all(one.domain is None for one in found.per_layer)
    json.dumps(found.as_dict())


def test_balance_reuse_and_company_of_choices_made_by_hand() -> None:
    """Layer 1: every token the same two. Layer 2: two pairs in turns. The others: all experts alike."""
    choices: NDArray[np.uint16] = np.zeros((64, 3, 2), np.uint16)
    choices[:, 0] = (5, 2)
    choices[0::2, 1], choices[1::2, 1] = (0, 1), (2, 3)
    choices[:, 2, 0], choices[:, 2, 1] = np.arange(64) % 8, (np.arange(64) + 1) % 8
    found = report(
        [DomainRouting("one", choices, np.zeros(64, np.int8), np.ones(63))], layers=(1, 2, 3), num_experts=8
    )
    first, second, third = found.per_layer
    assert (first.entropy_bits, first.balance, first.reuse, first.pairs) == (1.0, 0.25, 1.0, [])
    assert (second.entropy_bits, second.balance, second.reuse) == (2.0, 0.5, 0.0)
    assert second.reuse_by_chance == pytest.approx(0.5)
    assert [(a, b, share, lift) for a, b, share, lift in second.pairs] == [(0, 1, 0.5, 2.0), (2, 3, 0.5, 2.0)]
    assert (third.entropy_bits, third.balance, third.reuse) == (3.0, 1.0, 0.5)
    assert found.working_set.distinct[:, 0].tolist() == [2, 2, 2]
    assert found.perplexities == (pytest.approx(np.e),)


def test_caches_are_replayed_over_second_halves_at_each_budget_and_the_engine_s_own() -> None:
    domains = routes_of()
    found = reported(domains, num_slots=31)
    assert list(found.caches) == [6, 12, 24, 31, 48, 72]
    trace = np.concatenate(
        [domain.choices[: TOKENS // 2] for domain in domains]
        + [domain.choices[TOKENS // 2 :] for domain in domains]
    )
    lookups, hits = _native.replay(
        trace,
        np.arange(len(trace), dtype=np.int64),
        num_experts=NUM_EXPERTS,
        policy="lru",
        num_slots=31,
        counted_from=len(trace) // 2,
    )
    assert lookups == 4 * TOKENS // 2 * len(LAYERS) * K
    assert found.caches[31]["lru"] == hits / lookups
    for rates in found.caches.values():
        assert max(rates.values()) == rates["optimum"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the", "word part"), (" the", "word"), ("\nthe", "word"), ("42", "number"), (" 7", "number"), ("½", "number"),
        (".", "punctuation"), (" +=", "punctuation"), ("€", "punctuation"), ("\n\n", "white space"),
        (" ", "white space"), ("x1", "other"), ("�", "other"), ("", "other"), (" été", "word"), ("日本", "word part"),
    ],
)  # fmt: skip
def test_the_class_of_a_token_is_read_from_its_text(text: str, expected: str) -> None:
    assert CLASSES[class_of(text)] == expected


def test_a_report_takes_no_more_memory_than_it_says() -> None:
    import tracemalloc

    domains = routes_of()
    said = working_bytes(4 * TOKENS, num_layers=len(LAYERS), num_experts=NUM_EXPERTS, k=K, num_domains=4)
    tracemalloc.start()
    reported(domains)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < said
