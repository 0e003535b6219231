"""Requests that a plan is made for: lengths that are described or read, random arrivals, and files that lie."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from argosy.errors import UsageError
from argosy.forecast import traffic
from argosy.forecast.traffic import (
    Length,
    Mix,
    RecordedTraffic,
    TrafficRequest,
    parse_traffic,
    requests_of,
    require_rate,
)


def lines(path: Path, *values: object) -> str:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


def request(prompt: object = 8, answer: object = 4, **more: object) -> dict[str, object]:
    return {"prompt_tokens": prompt, "answer_tokens": answer, **more}


# ── lengths ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_plain_length_is_the_same_for_all() -> None:
    found = requests_of(parse_traffic("prompt=800,answer=200"), 2.0, count=100)
    assert {one[1:] for one in found} == {(800, 200)}


def test_two_thirds_of_a_spread_length_lie_within_its_factor() -> None:
    mix = parse_traffic("answer=200~1.5,prompt=800~2")
    assert mix == Mix(Length(800, 2.0), Length(200, 1.5))
    prompts, answers = mix.draw(np.random.default_rng(1), 100_000)
    for found, median, factor in ((prompts, 800, 2.0), (answers, 200, 1.5)):
        assert np.median(found) == pytest.approx(median, rel=0.02)
        within = (found > median / factor) & (found < median * factor)
        assert within.mean() == pytest.approx(0.683, abs=0.01)


@pytest.mark.parametrize(
    "text",
    [
        "prompt=800",
        "prompt=800,answer=0",
        "prompt=800,answer=-5",
        "prompt=800,answer=200,answer=300",
        "prompt=800,answer=200,",
        "prompt=800~0.5,answer=200",
        "prompt=800~nan,answer=200",
        "prompt=800~99,answer=200",
        "prompt=99999999,answer=200",
        "prompt=1e3,answer=200",
        "prompt=8 00,answer=200",
        "prompt=٣,answer=200",
        "prompt=,answer=200",
    ],
)
def test_lengths_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--traffic"):
        parse_traffic(text)


# ── arrivals ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_random_arrivals_have_independent_exponential_gaps() -> None:
    found = requests_of(parse_traffic("prompt=8,answer=4"), 2.5, count=20_000)
    gaps = np.diff([one.at_s for one in found])
    assert gaps.mean() == pytest.approx(1 / 2.5, rel=0.03)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.03)  # as no other distribution with that tail
    assert (gaps > 2 / 2.5).mean() == pytest.approx(math.exp(-2), abs=0.01)
    assert np.corrcoef(gaps[1:], gaps[:-1])[0, 1] == pytest.approx(0.0, abs=0.03)


def test_the_same_requests_come_each_time() -> None:
    source = parse_traffic("prompt=800~2,answer=200~3")
    assert requests_of(source, 0.5, count=500) == requests_of(source, 0.5, count=500)


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf, 1e-9, 1e9])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(UsageError, match="--rate"):
        require_rate(rate)


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_file_with_times_is_replayed_in_order(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "a.jsonl", request(at_s=107.5), request(9, 5, at_s=100), request(7, 1, at_s=104.25)
    )
    source = parse_traffic(path)
    assert requests_of(source, None, count=10) == (
        TrafficRequest(0.0, 9, 5), TrafficRequest(4.25, 7, 1), TrafficRequest(7.5, 8, 4),
    )  # fmt: skip
    assert requests_of(source, None, count=1) == (TrafficRequest(0.0, 9, 5),)


def test_with_a_rate_a_file_gives_pairs_of_lengths(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", request(800, 20), request(10, 300))
    found = requests_of(parse_traffic(path), 3.0, count=1000)
    assert {one[1:] for one in found} == {(800, 20), (10, 300)}
    assert found[-1].at_s == pytest.approx(1000 / 3, rel=0.1)


def test_lengths_alone_say_nothing_about_when(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", request())
    for source in (parse_traffic(path), parse_traffic("prompt=8,answer=4")):
        with pytest.raises(UsageError, match="when requests arrive"):
            requests_of(source, None, count=10)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[1, 2]", "not an object"),
        ("null", "not an object"),
        ('{"prompt_tokens": 8, "answer_tokens": 4, "prompt_tokens": 9}', "duplicate key"),
        ('{"prompt_tokens": 8, "answer_token": 4}', "no other keys"),
        ('{"prompt_tokens": 8}', "answer_tokens must be a whole number from 1 to 10000000, found nothing"),
        ('{"prompt_tokens": 0, "answer_tokens": 4}', "prompt_tokens must be .* found 0"),
        ('{"prompt_tokens": -8, "answer_tokens": 4}', "found -8"),
        ('{"prompt_tokens": true, "answer_tokens": 4}', "found True"),
        ('{"prompt_tokens": 8.5, "answer_tokens": 4}', "found 8.5"),
        ('{"prompt_tokens": "8", "answer_tokens": 4}', "found '8'"),
        ('{"prompt_tokens": 1000000000000, "answer_tokens": 4}', "found 1000000000000"),
        ('{"prompt_tokens": ' + "9" * 400 + ', "answer_tokens": 4}', "too large"),
        ('{"prompt_tokens": 8, "answer_tokens": 4, "at_s": NaN}', "NaN"),
        ('{"prompt_tokens": 8, "answer_tokens": 4, "at_s": -1}', "at_s must be"),
        ('{"prompt_tokens": 8, "answer_tokens": 4, "at_s": 1e300}', "at_s must be"),
        ('{"prompt_tokens": 8, "answer_tokens": 4, "at_s": null}', "at_s must be"),
        ('{"prompt_tokens": 8, "answer_tokens": 4}' + " " * 1000, "more than 1000 bytes"),
        ('{"a":' * 90 + "1" + "}" * 90, "no other keys|nested"),
        ("\xff", "UTF-8|not JSON"),
    ],
)
def test_a_line_that_lies_is_named(line: str, reason: str, tmp_path: Path) -> None:
    good = json.dumps(request())
    path = tmp_path / "a.jsonl"
    path.write_bytes(f"{good}\n\n".encode() + line.encode("latin-1") + b"\n")
    with pytest.raises(UsageError, match=reason) as error:
        parse_traffic(str(path))
    assert "a.jsonl, line 3" in str(error.value)


def test_times_on_some_lines_only_are_refused(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", request(at_s=1), request())
    with pytest.raises(UsageError, match="1 requests with `at_s` and others without"):
        parse_traffic(path)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (
        ("empty.jsonl", "no requests"),
        ("pipe", "no file"),
        (".", "no file"),
        ("absent", "no file"),
    ):
        with pytest.raises(UsageError, match=reason):
            parse_traffic(str(tmp_path / name))
    with pytest.raises(UsageError, match="no file"):
        parse_traffic("prompts=800")


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "huge.jsonl").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UsageError, match="bytes, which is the limit"):
        parse_traffic(str(tmp_path / "huge.jsonl"))


def test_a_file_has_no_more_lines_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "MOST_LINES", 3)
    assert isinstance(parse_traffic(lines(tmp_path / "a.jsonl", *[request()] * 3)), RecordedTraffic)
    with pytest.raises(UsageError, match="more than 3 lines"):
        parse_traffic(lines(tmp_path / "b.jsonl", *[request()] * 4))
