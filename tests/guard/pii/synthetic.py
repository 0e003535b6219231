"""Synthetic texts with personal data, made by rule: no value is that of a person whom anybody knows.

    random values of each entity  ->  sentences in four languages  ->  text, and where the values are

E-mail addresses are at names reserved by RFC 2606, telephone numbers are those that libphonenumber gives as examples,
and every other number is drawn at random and gets its check digits. Sentences without personal data have numbers as
well: orders, dates, prices, versions.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import phonenumbers

from argosy.guard.pii import check_digits
from argosy.guard.pii.entities import Entity

LANGUAGES = ("en", "de", "fr", "es")
REGIONS = {"en": ("US", "GB"), "de": ("DE",), "fr": ("FR",), "es": ("ES",)}

SENTENCES: dict[str, tuple[str, ...]] = {
    "en": (
        "Please send it to {}, thank you.", "My details are {} and nothing else.", "Is {} still right?",
        "({}) is what the form says.", "We noted {}; call us if it changes.", "{} was entered twice.",
    ),
    "de": (
        "Bitte schicken Sie es an {}, danke.", "Meine Angaben: {} und sonst nichts.", "Stimmt {} noch?",
        "Im Formular steht ({}).", "Wir haben {} notiert; melden Sie Änderungen.", "{} wurde doppelt erfasst.",
    ),
    "fr": (
        "Merci de l’envoyer à {}, s’il vous plaît.", "Mes données sont {} et rien d’autre.", "{} est-il encore exact ?",
        "Le formulaire indique ({}).", "Nous avons noté {} ; prévenez-nous.", "{} a été saisi deux fois.",
    ),
    "es": (
        "Por favor, envíelo a {}, gracias.", "Mis datos son {} y nada más.", "¿Sigue siendo {} correcto?",
        "En el formulario pone ({}).", "Hemos anotado {}; avísenos si cambia.", "{} se registró dos veces.",
    ),
}  # fmt: skip
WITHOUT: tuple[str, ...] = (
    "Order {a} of {d} costs {p} and has {n} parts.",
    "Version {v} came out on {d}; the one before was {v}.",
    "Chapter {n}, page {n}: the table lists {p}, {p} and {p}.",
    "Die Rechnung {a} vom {d} über {p} ist bezahlt.",
    "La commande {a} du {d} comprend {n} articles à {p}.",
    "El pedido {a} del {d} tiene {n} piezas por {p}.",
    "if x[{n}] == {n}: return y::z({n}.{n}, {n})  # {t}",
    "At {t} the score was {n}:{n}, and at {t} it was {n}:{n}.",
)


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text, and the spans of its values."""

    text: str
    language: str
    values: tuple[tuple[Entity, int, int], ...]


def digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choices(string.digits, k=count))


def _until(make: Callable[[], str], is_right: Callable[[str], bool]) -> str:
    while not is_right(made := make()):
        pass
    return made


def _groups(text: str, *sizes: int, by: str = " ") -> str:
    parts, at = [], 0
    for size in sizes:
        parts.append(text[at : at + size])
        at += size
    return by.join((*parts, text[at:])).rstrip(by)


def email(rng: random.Random, language: str) -> str:
    local = rng.choice(("info", "j.doe", "kontakt", "a_b", "x+y", "service-7", "maria.91"))
    host = rng.choice(
        ("example.com", "example.org", "mail.example.net", "example.co.test", "my-site.example")
    )
    return f"{local}@{host}"


def phone(rng: random.Random, language: str) -> str:
    region = rng.choice(REGIONS[language])
    kind = rng.choice((phonenumbers.PhoneNumberType.FIXED_LINE, phonenumbers.PhoneNumberType.MOBILE))
    form = rng.choice((phonenumbers.PhoneNumberFormat.INTERNATIONAL, phonenumbers.PhoneNumberFormat.NATIONAL))
    number = phonenumbers.example_number_for_type(region, kind)
    return phonenumbers.format_number(number, form)


def iban(rng: random.Random, language: str) -> str:
    country = rng.choice(
        {"en": ("GB", "IE"), "de": ("DE", "AT"), "fr": ("FR", "BE"), "es": ("ES", "PT")}[language]
    )
    length = check_digits.IBAN_LENGTHS[country]
    bank = "WEST" if country in ("GB", "IE") else ""
    rest = bank + digits(rng, length - 4 - len(bank))
    number = next(
        f"{country}{check:02}{rest}" for check in range(98) if check_digits.iban(f"{country}{check:02}{rest}")
    )
    return _groups(number, *[4] * (length // 4)) if rng.random() < 0.6 else number


def card(rng: random.Random, language: str) -> str:
    start, length = rng.choice((("4", 16), ("52", 16), ("37", 15), ("6011", 16), ("3530", 16)))
    number = _until(lambda: start + digits(rng, length - len(start)), check_digits.card)
    by = rng.choice((" ", "-", ""))
    return _groups(number, 4, 6, 5, by=by) if length == 15 else _groups(number, 4, 4, 4, by=by)


def ip_address(rng: random.Random, language: str) -> str:
    if rng.random() < 0.7:
        return ".".join(str(rng.randrange(1, 200)) for _ in range(4)).replace("127.", "126.")
    return ":".join(("2001", "db8", *(f"{rng.randrange(1 << 16):x}" for _ in range(6))))


def mac_address(rng: random.Random, language: str) -> str:
    return rng.choice(":-").join(f"{rng.randrange(256):02X}" for _ in range(6))


def url_login(rng: random.Random, language: str) -> str:
    return f"https://user{digits(rng, 2)}:{''.join(rng.choices(string.ascii_letters, k=9))}@db.example.com"


def secret(rng: random.Random, language: str) -> str:
    letters = string.ascii_letters + string.digits
    prefix, length = rng.choice(
        (("ghp_", 36), ("sk-proj-", 40), ("AKIA", 16), ("hf_", 34), ("xoxb-", 24), ("ak-", 43))
    )
    return prefix + "".join(
        rng.choices(string.ascii_uppercase + "234567" if prefix == "AKIA" else letters, k=length)
    )


def national_id(rng: random.Random, language: str) -> str:
    match language:
        case "en":
            return _until(
                lambda: f"{digits(rng, 3)}-{digits(rng, 2)}-{digits(rng, 4)}",
                lambda made: check_digits.american_ssn(made.replace("-", "")),
            )
        case "de":
            number = _until(lambda: digits(rng, 11), check_digits.german_tax_id)
            return _groups(number, 2, 3, 3) if rng.random() < 0.5 else number
        case "fr":
            born = f"{rng.choice('12')}{digits(rng, 2)}{rng.randrange(1, 13):02}"
            body = f"{born}{rng.randrange(1, 95):02}{digits(rng, 6)}"
            number = f"{body}{97 - int(body) % 97:02}"
            return _groups(number, 1, 2, 2, 2, 3, 3) if rng.random() < 0.5 else number
    body = digits(rng, 8)
    return body + "TRWAGMYFPDXBNJZSQVHLCKE"[int(body) % 23]


MAKERS: dict[Entity, Callable[[random.Random, str], str]] = {
    "email": email, "phone": phone, "iban": iban, "card": card, "ip_address": ip_address, "mac_address": mac_address,
    "url_login": url_login, "secret": secret, "national_id": national_id,
}  # fmt: skip


def with_values(num_each: int, seed: int = 1) -> Iterator[Labelled]:
    """Sentences with one value, `num_each` for each entity and language."""
    rng = random.Random(seed)
    for language in LANGUAGES:
        for entity, make in MAKERS.items():
            for _ in range(num_each):
                sentence, value = rng.choice(SENTENCES[language]), make(rng, language)
                start = sentence.index("{}")
                yield Labelled(sentence.format(value), language, ((entity, start, start + len(value)),))


def without_values(count: int, seed: int = 2) -> Iterator[str]:
    """Sentences with numbers that are no personal data."""
    rng = random.Random(seed)
    for at in range(count):
        fill = {
            "a": f"{rng.choice(('A', 'R', 'PO'))}-{digits(rng, rng.randrange(4, 8))}",
            "d": f"{rng.randrange(1990, 2030)}-{rng.randrange(1, 13):02}-{rng.randrange(1, 29):02}",
            "p": f"{rng.randrange(1, 99999)}.{digits(rng, 2)} €",
            "n": str(rng.randrange(1, 10 ** rng.randrange(1, 7))),
            "v": f"{rng.randrange(9)}.{rng.randrange(30)}.{rng.randrange(9)}",
            "t": f"{rng.randrange(24):02}:{rng.randrange(60):02}:{rng.randrange(60):02}",
        }
        yield WITHOUT[at % len(WITHOUT)].format(**fill)
