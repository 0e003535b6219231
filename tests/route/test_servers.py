"""Which server is next: tokens owed, beginnings known, and what is learnt from answers."""

from __future__ import annotations

import pytest

from argosy.errors import Overloaded, UsageError
from argosy.route.prefixes import MOST_MARKS, Mark, Prefixes, parts_of
from argosy.route.servers import Estimate, Fleet
from argosy.route.upstream import parse_address


def fleet_of(num_servers: int) -> Fleet:
    fleet = Fleet([parse_address(f"http://10.0.0.{number}:8080") for number in range(num_servers)])
    for server in fleet.servers:
        server.state = "up"
    return fleet


def marks(fleet: Fleet, *texts: str, tenant: bytes = b"", model: str = "m") -> list[Mark]:
    return fleet.prefixes.marks(tenant, model, texts)


def test_requests_alternate_between_servers_that_owe_nothing() -> None:
    fleet = fleet_of(3)
    assert [fleet.choose([], 100).number for _ in range(6)] == [0, 1, 2, 0, 1, 2]


def test_the_server_that_owes_fewer_tokens_is_chosen_and_each_token_counts() -> None:
    fleet = fleet_of(2)
    with fleet.owing(fleet.servers[0], 4000, 10) as load:
        assert fleet.servers[0].owed_tokens == 1010
        with fleet.owing(fleet.servers[1], 400, 100):
            assert fleet.choose([], 100).number == 1
            load.say()  # the prompt is computed
            assert fleet.servers[0].owed_tokens == 9
            assert fleet.choose([], 100).number == 0
            for _ in range(50):  # an answer that is longer than expected owes a token
                load.say()
            assert fleet.servers[0].owed_tokens == 1
    assert [server.owed_tokens for server in fleet.servers] == [0, 0]


def test_a_known_beginning_is_worth_the_tokens_that_it_saves() -> None:
    fleet = fleet_of(2)
    asked = marks(fleet, "system", "a" * 4000, "question")
    home = fleet.choose(asked, 4000)
    longer = marks(fleet, "system", "a" * 4000, "question", "answer", "more")
    assert [fleet.choose(longer, 4100).number for _ in range(4)] == [home.number] * 4
    with fleet.owing(home, 400, 100):  # less than the prompt
        assert fleet.choose(longer, 4100) is home
    with fleet.owing(home, 8000, 100):  # more than the prompt: computing it again is faster than waiting
        assert fleet.choose(longer, 4100) is not home


def test_a_server_that_went_down_is_not_chosen_and_its_beginnings_are_forgotten() -> None:
    fleet = fleet_of(2)
    asked = marks(fleet, "a" * 4000)
    home = fleet.choose(asked, 4000)
    fleet.lose(home, "test")
    assert fleet.choose(asked, 4000) is not home
    assert fleet.choose([], 10, without=()) is not home
    assert home.number not in fleet.prefixes.known(asked)
    with pytest.raises(Overloaded, match="1 of 2 are up"):
        fleet.choose([], 10, without=[server for server in fleet.servers if server is not home])


def test_tenants_and_models_share_no_beginnings() -> None:
    fleet = fleet_of(2)
    fleet.prefixes.note(marks(fleet, "a", tenant=b"one"), 1)
    assert fleet.prefixes.known(marks(fleet, "a", "b", tenant=b"one")) == {1: 1}
    assert fleet.prefixes.known(marks(fleet, "a", tenant=b"two")) == {}
    assert fleet.prefixes.known(marks(fleet, "a", tenant=b"one", model="n")) == {}
    assert fleet.prefixes.known(marks(fleet, "", "a", tenant=b"one")) == {}


def test_what_is_known_is_bounded_and_the_oldest_is_forgotten() -> None:
    prefixes = Prefixes(most=4)
    first, second = (prefixes.marks(b"", "m", [name]) for name in ("first", "second"))
    prefixes.note(first, 0)
    prefixes.note(second, 0)
    prefixes.note(first, 0)
    prefixes.note(prefixes.marks(b"", "m", "abc"), 1)
    assert len(prefixes) == 4
    assert prefixes.known(first)
    assert not prefixes.known(second)
    assert len(prefixes.marks(b"", "m", ["x"] * 10_000)) < MOST_MARKS // 100


def test_the_parts_of_a_request_are_in_the_order_in_which_models_read_them() -> None:
    body = {
        "messages": [{"role": "user", "content": "x"}],
        "system": "s",
        "tools": [{"name": "t"}],
        "other": 1,
    }
    assert [part[:9] for part in parts_of(body)] == ['[{"name":', '"s"', '{"content']
    assert [len(part) for part in parts_of({"prompt": "y" * 9000})] == [4096, 4096, 808]
    assert list(parts_of({"prompt": [1, 2], "messages": None})) == ["1", "2"]
    assert list(parts_of({"messages": 7})) == []


def test_usage_corrects_the_estimate() -> None:
    estimate = Estimate()
    assert estimate.tokens(4000, 100) == (1000, 100)
    for _ in range(200):
        estimate.learn(4000, 2000, 40)
    prompt, new = estimate.tokens(4000, None)
    assert prompt == pytest.approx(2000, rel=0.01)
    assert new == pytest.approx(40, rel=0.02)
    estimate.learn(0, 0, None)
    estimate.learn(1 << 40, 1, 1 << 60)  # a server that lies moves it a little
    assert estimate.bytes_per_token < 6
    assert estimate.new_tokens < 100_000


@pytest.mark.parametrize(
    ("url", "shown"),
    [("http://10.0.0.2:8080", "http://10.0.0.2:8080"), ("https://models.example.org/base/", "https://models.example.org:443/base"),
     ("http://[::1]:80", "http://[::1]:80")],
)  # fmt: skip
def test_addresses_of_servers(url: str, shown: str) -> None:
    assert str(parse_address(url)) == shown


@pytest.mark.parametrize(
    "url",
    [
        "",
        "10.0.0.2:8080",
        "ftp://a",
        "http://",
        "http://a:99999",
        "http://a..b",
        "http://u:p@a",
        "http://a/?q",
        "http://a\r\nx",
    ],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="address"):
        parse_address(url)
