"""`--lora` names an adapter, its path and a factor."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from argosy.adapters.registry import last_appearance
from argosy.adapters.wanted import by_model, chosen_adapter, compared_adapters, wanted_adapters
from argosy.config.engine import WantedAdapter
from argosy.errors import UsageError


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a=./x", ("a", "x", 1.0)),
        ("a=./x:0.5", ("a", "x", 0.5)),
        ("a=x:-1e-1", ("a", "x", -0.1)),
        ("a=x:y", ("a", "x:y", 1.0)),  # a path may contain colons
        ("a=x:y:2", ("a", "x:y", 2.0)),
        ("a=x=y", ("a", "x=y", 1.0)),
        ("a=:2", ("a", ":2", 1.0)),
        ("a=x:", ("a", "x:", 1.0)),
    ],
)
def test_a_factor_is_what_follows_the_last_colon_if_it_is_a_number(
    text: str, wanted: tuple[Any, ...]
) -> None:
    assert wanted_adapters([text]) == (WantedAdapter(wanted[0], Path(wanted[1]), wanted[2]),)


def test_adapters_are_also_given_by_name() -> None:
    assert wanted_adapters({"a": "x", "b": (Path("y"), 0.5)}) == (
        WantedAdapter("a", Path("x")),
        WantedAdapter("b", Path("y"), 0.5),
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["x"], "takes NAME=PATH, found 'x'"),
        (["x="], "takes NAME=PATH"),
        (["=x"], "cannot be named ''"),
        (["a=x", "a=y"], "two adapters are named a"),
        (["a=x:nan"], "must be a finite number"),
        (["a=x:inf"], "must be a finite number"),
        (["a=x:1e9"], "from -10000 to 10000"),
        (["a:b=x"], "cannot be named 'a:b'"),
        ([f"a{at}=x" for at in range(65)], "65 adapters are named"),
        ({"a": ("x", "y")}, "from -10000 to 10000"),
    ],
)
def test_what_is_no_adapter_is_refused(given: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        wanted_adapters(given)


def test_adapters_of_a_server_name_their_model() -> None:
    a, b = WantedAdapter("a", Path("x")), WantedAdapter("b", Path("y"), 2.0)
    assert by_model(["a=x", "m:b=y:2"], ["m"]) == {"m": (a, b)}
    assert by_model(["n:7b:a=x"], ["m", "n:7b"]) == {"m": (), "n:7b": (a,)}
    slowest = a._replace(columns="expert_slowest")
    assert by_model(["n:a=x"], ["m", "n"], "expert_slowest") == {"m": (), "n": (slowest,)}
    with pytest.raises(UsageError, match="a model and an adapter would both be named m:a"):
        by_model(["m:a=x"], ["m", "m:a"])
    with pytest.raises(UsageError, match="names no model, and this server has: m, n"):
        by_model(["a=x"], ["m", "n"])
    with pytest.raises(UsageError, match="names the model o, and this server has: m"):
        by_model(["o:a=x"], ["m"])


def test_one_order_of_columns_is_for_all_adapters() -> None:
    found = wanted_adapters({"a": "x", "b": ("y", 0.5)}, "expert_slowest")
    assert [one.columns for one in found] == ["expert_slowest"] * 2
    for refuses in (partial(wanted_adapters, ()), partial(by_model, (), ["m"])):
        with pytest.raises(UsageError, match="--lora names none"):
            refuses("expert_slowest")


def test_the_only_adapter_answers_unless_another_is_named() -> None:
    assert chosen_adapter("m", []) == ("m", None)
    assert chosen_adapter("m", ["a=x"]) == ("m", "a")
    assert chosen_adapter("m:7b:b", ["a=x", "b=x"]) == ("m:7b", "b")
    with pytest.raises(UsageError, match="several adapters, and one answers: a, b") as refused:
        chosen_adapter("m", ["a=x", "b=x"])
    assert refused.value.hint == "name it behind the model: `m:a`"


def test_an_invocation_begins_where_its_tokens_appear_last() -> None:
    assert last_appearance((), [1, 2]) == 0
    assert last_appearance((1, 2), [1, 2, 1, 2, 1]) == 2
    assert last_appearance((1, 1), [1, 1, 1]) == 1  # appearances may overlap
    assert last_appearance((3,), [1, 2]) is None
    assert last_appearance((1, 2, 3), [1, 2]) is None


def test_two_models_to_compare_have_the_adapters_that_are_named_behind_them() -> None:
    one, two = WantedAdapter("one", Path("a"), 1.0), WantedAdapter("two", Path("b"), 0.5)
    texts = ("one=a", "two=b:0.5")
    for reference, candidate, loras, expected in (
        ("demo", None, texts[:1], (("demo", None), ("demo", one))),
        ("demo:one", None, texts[:1], (("demo", None), ("demo", one))),
        ("demo:one", "demo:two", texts, (("demo", one), ("demo", two))),
        ("./m", "./q4:two", texts[1:], (("./m", None), ("./q4", two))),
        ("qwen:latest", "./q4", (), (("qwen:latest", None), ("./q4", None))),
    ):
        assert compared_adapters(reference, candidate, loras) == expected


def test_an_adapter_that_neither_model_has_is_refused() -> None:
    with pytest.raises(UsageError, match="CANDIDATE is missing"):
        compared_adapters("demo", None, ())
    with pytest.raises(UsageError, match="neither model has the adapter one") as refused:
        compared_adapters("./m", "./q4", ["one=a"])
    assert refused.value.hint is not None
    assert "`./q4:one`" in refused.value.hint
    with pytest.raises(UsageError, match="several adapters"):
        compared_adapters("demo", None, ["one=a", "two=b"])
    with pytest.raises(UsageError, match="neither model has the adapter two"):
        compared_adapters("demo:one", None, ["one=a", "two=b"])
