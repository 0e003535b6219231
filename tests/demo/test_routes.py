"""`argosy routes` finds the expert pairs that the demo's card names, and none in a model with shuffled experts."""

from __future__ import annotations

import json
import re
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy.cli.commands import routes
from argosy.demo.locate import locate
from argosy.errors import FetchFailed
from argosy.observe.report import DomainRouting, RoutingReport, report

HELD_OUT = Path(__file__).parents[1] / "oracle" / "held_out"
CARD = Path(__file__).parents[2] / "packages" / "argosy-demo" / "argosy_demo" / "MODEL_CARD.md"
NUM_TOKENS = 512
NUM_EXPERTS = 12  # of a layer; four of them hear and see, and serve no text
pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]


def texts() -> dict[str, str]:
    """Text of the card's four domains, none of which the model was trained on."""
    rows = [json.loads(line) for line in (HELD_OUT / "gsm8k_test_40.jsonl").read_text("utf-8").splitlines()]
    library = Path(sysconfig.get_paths()["stdlib"])
    return {
        "encyclopedia": (Path(__file__).parent / "encyclopedia.txt").read_text("utf-8"),
        "maths": "\n\n".join(f"{row['question']}\n{row['answer']}" for row in rows),
        "dialogue": (HELD_OUT / "shakespeare_last_tenth.txt").read_text("utf-8"),
        "code": (library / "textwrap.py").read_text("utf-8")[:6000],
    }


def card_pairs() -> dict[str, list[int]]:
    """The experts of each domain, from the table of sources in the card."""
    rows = re.findall(r"^\| (\w+) \| (\d), (\d) \|", CARD.read_text("utf-8"), re.MULTILINE)
    return {domain: [int(first), int(second)] for domain, first, second in rows}


@pytest.fixture(scope="module")
def domains() -> list[DomainRouting]:
    try:
        model = locate()
    except FetchFailed as error:
        pytest.skip(str(error))
    with routes._open(str(model), {"memory": "2GiB"}, 4, NUM_TOKENS) as reader:
        return [
            reader.read(domain, reader.tokens_of(domain, [text], NUM_TOKENS), None)
            for domain, text in texts().items()
        ]


def reported(domains: list[DomainRouting]) -> RoutingReport:
    return report(domains, layers=tuple(range(30)), num_experts=NUM_EXPERTS)


def test_the_pairs_are_those_that_the_model_card_names(domains: list[DomainRouting]) -> None:
    assert len(card_pairs()) == 4
    found = reported(domains)
    assert {domain: sorted(experts) for domain, experts in found.served_by.items()} == card_pairs()
    assert found.across_domain is not None
    assert found.across_domain.p == 0.001
    assert found.across_domain.bits > 10 * found.across_domain.by_chance
    shares = found.shares.mean(axis=1)
    for number, pair in enumerate(card_pairs().values()):
        assert (shares[number, pair] > 0.3).all()


@pytest.mark.parametrize("seed", range(3))
def test_with_the_experts_of_each_layer_shuffled_no_pairs_are_found(
    domains: list[DomainRouting], seed: int
) -> None:
    """Experts and the rows of their router change places together: every token's choice gets the new numbers."""
    rng = np.random.default_rng(seed)
    numbers: Any = np.stack([rng.permutation(NUM_EXPERTS) for _ in range(30)]).astype(np.uint16)
    shuffled = [
        DomainRouting(
            one.name,
            np.stack([numbers[i][one.choices[:, i]] for i in range(30)], axis=1),
            one.classes,
            one.losses,
        )
        for one in domains
    ]
    found = reported(shuffled)
    assert found.served_by == {}
    assert found.across_domain is not None
    assert not found.across_domain.is_significant


def test_with_domains_shuffled_no_layer_specialises(domains: list[DomainRouting]) -> None:
    """Stretches of all texts, dealt out to four domains at random."""
    rng = np.random.default_rng(1)
    stretches = [one.choices[at : at + 64] for one in domains for at in range(0, NUM_TOKENS, 64)]
    order = rng.permutation(len(stretches)).reshape(4, -1)
    dealt = [
        DomainRouting(one.name, np.concatenate([stretches[i] for i in own]), one.classes, one.losses)
        for one, own in zip(domains, order, strict=True)
    ]
    special = [
        one for one in reported(dealt).per_layer if one.domain is not None and one.domain.is_significant
    ]
    assert len(special) <= 1
