"""Personal data is found by its form and its check digits, however it is spelled, and little else is."""

from __future__ import annotations

import builtins
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from argosy.errors import UsageError
from argosy.guard.pii import check_digits
from argosy.guard.pii.entities import ENTITIES
from argosy.guard.pii.finder import Finder
from argosy.guard.pii.spelling import plain
from tests.guard.pii.adversarial import spellings
from tests.guard.pii.synthetic import LANGUAGES, with_values, without_values

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def finder() -> Finder:
    return Finder()


def values(finder: Finder, text: str) -> list[tuple[str, str]]:
    return [(found.entity, text[found.start : found.end]) for found in finder.find(text)]


# Published examples of each number, from the documents that the functions name.
EXAMPLES = {
    check_digits.iban: ("DE89370400440532013000", "GB82WEST12345698765432", "FR1420041010050500013M02606"),
    check_digits.card: ("4111111111111111", "378282246310005", "6011111111111117", "5555555555554444"),
    check_digits.german_tax_id: ("86095742719", "65929970489"),
    check_digits.french_nir: ("185057800608491", "255081416802538"),
    check_digits.spanish_dni: ("12345678Z", "X1234567L", "Z1234567R"),
    check_digits.italian_tax_code: ("RSSMRA85T10A562S",),
    check_digits.belgian_register_number: ("85073003328", "17073003384"),
    check_digits.polish_pesel: ("44051401359",),
    check_digits.swedish_number: ("8112189876",),
    check_digits.swiss_ahv: ("7569217076985",),
    check_digits.brazilian_cpf: ("52998224725",),
    check_digits.american_ssn: ("219099999",),
}


@pytest.mark.parametrize("check", EXAMPLES, ids=lambda check: check.__name__)
def test_a_published_number_passes_and_most_others_do_not(check: Callable[[str], bool]) -> None:
    rng = random.Random(7)
    for number in EXAMPLES[check]:
        assert check(number), number
        if check is check_digits.american_ssn:  # it has no check digit
            assert not check("000" + number[3:])
            continue
        changed = [
            number[:at] + digit + number[at + 1 :]
            for at, old in enumerate(number) if old.isdecimal()
            for digit in rng.sample("0123456789", 3) if digit != old
        ]  # fmt: skip
        assert sum(map(check, changed)) <= len(changed) // 8


FOUND = {
    "write to joe@example.com.": [("email", "joe@example.com")],
    "call +49 30 901820 today": [("phone", "+49 30 901820")],
    "2024-11-27 030 901820, 2024/11/27 212 555 2368": [("phone", "030 901820"), ("phone", "212 555 2368")],
    "card 4111 1111 1111 1111 of 12/28": [("card", "4111 1111 1111 1111")],
    "12 4111-1111-1111-1111": [("card", "4111-1111-1111-1111")],
    "4111 1111 1111 1111 5500 0000 0000 0004": [("card", "4111 1111 1111 1111"), ("card", "5500 0000 0000 0004")],
    "to DE89 3704 0044 0532 0130 00 and then": [("iban", "DE89 3704 0044 0532 0130 00")],
    "8.8.4.4 and 127.0.0.1, 255.255.255.0": [("ip_address", "8.8.4.4")],
    "2001:4860:4860::8888": [("ip_address", "2001:4860:4860::8888")],
    "00:1A:2B:3C:4D:5E": [("mac_address", "00:1A:2B:3C:4D:5E")],
    "https://bob:hunter22@example.com/x": [("url_login", "https://bob:hunter22@example.com")],
    "the key sk-abcdefghijklmnop1234567890": [("secret", "sk-abcdefghijklmnop1234567890")],
    'password = "hunter2xyz"': [("secret", "hunter2xyz")],
    "/x?token=abcdefgh1234&y=1": [("secret", "abcdefgh1234")],
    "-----BEGIN RSA PRIVATE KEY-----\nMIIabc\nxyz=\n-----END RSA PRIVATE KEY----- hi": [
        ("secret", "-----BEGIN RSA PRIVATE KEY-----\nMIIabc\nxyz=\n-----END RSA PRIVATE KEY-----")
    ],
    "Größe: j\u200boe@exa\u200bmple.com – gut": [("email", "j\u200boe@exa\u200bmple.com")],
    "756.9217.0769.85 and 12345678Z": [("national_id", "756.9217.0769.85"), ("national_id", "12345678Z")],
}  # fmt: skip
NOT_FOUND = (
    "look at the dot product", "std::vector<int> a::b", "version 1.2.3.4.5", "at 10:30:15 on 2024-11-27",
    "order 4111 1111 1111 1112", "DE89 3704 0044 0532 0130 01", "password: required", "secret=os.environ",
    "1 2 3 4 5 6", "2024-11-27 10:15:30 GET /", "[2023/12/31 23:59]", "2024.11.27 08:30",
    "the token is optional", "3.14159265358979", "0x7fffffffdeadbeef", "meet @ home. Thanks",
)  # fmt: skip


@pytest.mark.parametrize("text", FOUND)
def test_a_value_is_found_with_its_exact_span(finder: Finder, text: str) -> None:
    assert values(finder, text) == FOUND[text]


@pytest.mark.parametrize("text", NOT_FOUND)
def test_text_that_only_looks_like_a_value_is_not_found(finder: Finder, text: str) -> None:
    assert values(finder, text) == []


def test_recall_and_precision_on_the_synthetic_set(
    finder: Finder, capsys: pytest.CaptureFixture[str]
) -> None:
    hits: Counter[tuple[str, str]] = Counter()
    wrong: Counter[str] = Counter()
    missed: list[str] = []
    num_each = 25
    for labelled in with_values(num_each):
        found = finder.find(labelled.text)
        for entity, start, end in labelled.values:
            if any((one.entity, one.start, one.end) == (entity, start, end) for one in found):
                hits[entity, labelled.language] += 1
            else:
                missed.append(f"{entity} {labelled.text}")
        spans = {(start, end) for _, start, end in labelled.values}
        wrong.update(one.entity for one in found if (one.start, one.end) not in spans)
    for text in without_values(800):
        wrong.update(one.entity for one in finder.find(text))
    with capsys.disabled():
        print(f"\n{'entity':<12}" + "".join(f"{name:>8}" for name in LANGUAGES) + "   precision")
        for entity in ENTITIES:
            recalls = [hits[entity, language] / num_each for language in LANGUAGES]
            right = sum(hits[entity, language] for language in LANGUAGES)
            precision = right / max(1, right + wrong[entity])
            print(f"{entity:<12}" + "".join(f"{recall:8.2f}" for recall in recalls) + f"{precision:12.3f}")
    for entity in ENTITIES:
        right = sum(hits[entity, language] for language in LANGUAGES)
        assert right / (num_each * len(LANGUAGES)) >= 0.98, [one for one in missed if one.startswith(entity)][
            :5
        ]
        assert right / max(1, right + wrong[entity]) >= 0.97, (entity, wrong[entity])


def test_adversarial_spellings_are_found(finder: Finder, capsys: pytest.CaptureFixture[str]) -> None:
    total, missed = 0, []
    for trick, text, entity in spellings():
        total += 1
        hidden = text.removeprefix("I wrote ").removesuffix(" there")
        covered = [one for one in finder.find(text) if one.entity == entity]
        inside = sum(one.end - one.start for one in covered)
        if inside < len(hidden.strip("\u202a\u202c\ufe0f\u0336\u200b")) - 2:
            missed.append((trick, text))
    with capsys.disabled():
        print(
            f"\nadversarial spellings: {total - len(missed)} of {total} found; missed: {sorted({t for t, _ in missed})}"
        )
    assert total >= 200
    assert len(missed) <= 0.02 * total, missed[:5]


def test_source_code_has_few_false_positives(finder: Finder) -> None:
    """The repository's own sources; its examples of values are in files that are left out."""
    text = "\n".join(
        path.read_text()
        for path in sorted((ROOT / "src" / "argosy").rglob("*.py"))[:60]
        if "pii" not in path.parts
    )
    found = values(finder, text)
    assert len(found) <= len(text) / 40_000, found[:20]


def test_a_text_takes_time_in_proportion_to_its_length(finder: Finder) -> None:
    for piece in (
        "1 ",
        "a@",
        "4111 ",
        "+49 ",
        "::",
        "x at y dot ",
        "-----BEGIN ",
        "DE89 3704 ",
        "\u200b1",
        "12345678 ",
    ):
        text = piece * (20_000 // len(piece))
        seconds = []
        for length in (len(text) // 4, len(text)):
            began = time.process_time()
            finder.find(text[:length])
            seconds.append(time.process_time() - began)
        assert seconds[1] < 12 * max(seconds[0], 0.01), (piece, seconds)


def test_places_in_plain_spelling_are_those_of_the_text() -> None:
    given = plain("a\u200b\u0336ｂ Х\u2011")
    assert given.data == b"ab X-"
    assert [given.span(at, at + 1) for at in range(5)] == [(0, 1), (3, 4), (4, 5), (5, 6), (6, 7)]
    assert plain("漢a").data == b"\x01a"


def test_a_missing_package_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def fails(name: str, *more: object, **named: object) -> object:
        if name == "re2":
            raise ImportError(name="re2")
        return real(name, *more, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", fails)
    with pytest.raises(UsageError, match="needs the package re2") as raised:
        Finder()
    assert raised.value.hint is not None
    assert "install 'google-re2" in raised.value.hint


def test_an_unknown_entity_or_region_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown kind of personal data 'names'; known: email, phone"):
        Finder(["names"])
    with pytest.raises(UsageError, match="unknown region 'Germany'"):
        Finder(regions=["Germany"])
