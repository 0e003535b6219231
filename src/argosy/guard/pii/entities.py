"""The kinds of personal data and secrets that patterns can find: the patterns of each, and the check of a match.

    RULES: (pattern, entity, check)  ->  `finder.py`

Patterns are RE2's, so they run in linear time whatever a caller writes. They read the bytes of `spelling.plain`. A
match is only a candidate: its check returns the part that it accepts. Only the pattern of private keys matches
across a line end, and no match spans more than SPACED_BYTES of words separated by spaces, so a stream need not hold
back more (`stream.py`).

Elsewhere: check digits are `check_digits.py`; telephone numbers are `phones.py`.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from argosy.guard.pii import check_digits

Entity = Literal[
    "email", "phone", "iban", "card", "ip_address", "mac_address", "url_login", "secret", "national_id"
]
ENTITIES: tuple[Entity, ...] = get_args(Entity)
SPACED_BYTES = 160


@dataclass(frozen=True, slots=True)
class Candidate:
    """A match of a pattern: `data[start:end]` of the whole text, and its number among the candidates, from 1."""

    data: bytes
    start: int
    end: int
    number: int = 1

    @property
    def text(self) -> str:
        return self.data[self.start : self.end].decode("latin-1")

    @property
    def before(self) -> bytes:
        """The preceding byte; empty at the start."""
        return self.data[max(0, self.start - 1) : self.start]

    @property
    def after(self) -> bytes:
        """The two bytes that follow."""
        return self.data[self.end : self.end + 2]

    def beginning(self, start: int) -> Candidate:
        return replace(self, start=start)

    def ending(self, end: int) -> Candidate:
        return replace(self, end=end)


Check = Callable[[Candidate], Candidate | None]


@dataclass(frozen=True, slots=True)
class Rule:
    """A pattern of an entity.

    group: the group of the pattern that captures the value.
    needs: the pattern cannot match unless the lower-case text contains a member of each of these.
    is_number: if a match is rejected, a value may still begin at a later group of it.
    """

    entity: Entity
    pattern: str
    check: Check
    group: int = 0
    needs: tuple[tuple[bytes, ...], ...] = ()
    is_number: bool = False


def _as_it_is(found: Candidate) -> Candidate:
    return found


# ── addresses ────────────────────────────────────────────────────────────────────────────────────────────────────────

_LOCAL = r"[A-Za-z0-9\xc0-\xff](?:[A-Za-z0-9._%+\-'\xc0-\xff]{0,63})"
_LABEL = r"[A-Za-z0-9\xc0-\xff](?:[A-Za-z0-9\-\xc0-\xff]{0,61}[A-Za-z0-9\xc0-\xff])?"
# Words for @ and . in English, German, French and Spanish, as people write them to avoid being found.
_AT_WORD, _DOT_WORD = r"(?i:at|arroba|arobase|klammeraffe)", r"(?i:dot|punkt|point|punto)"
_OPEN, _CLOSE = r"[(\[{<] ?", r" ?[)\]}>]"
_AT = rf"(?: ?(?:@|%40|&#0?64;|{_OPEN}(?:{_AT_WORD}|@){_CLOSE}) ?)"
_DOT = rf"(?:\.| \. | ?{_OPEN}(?:{_DOT_WORD}|\.){_CLOSE} ?| {_DOT_WORD} )"
# Where only words are used, the address must end in a common domain that is not also a word: "at one point in time"
# is not an address.
_USUAL = (
    r"(?i:com|org|net|edu|gov|mil|info|biz|io|dev|app|eu|de|fr|es|uk|ch|nl|pl|dk|fi|pt|ie|br|mx|ca|au|nz|jp|cn|ru|ua|cz"
    r"|example|test|invalid)"
)
_IPV6 = re.compile(r"[0-9A-Fa-f]{1,4}")


def _email(found: Candidate) -> Candidate | None:
    return found if found.end - found.start <= 320 else None


def _ipv4(found: Candidate) -> Candidate | None:
    is_part = found.before in (b".", b"-") or re.match(rb"\.\d", found.after) is not None
    return found if not is_part and _is_someones(found.text) else None


def _ipv6(found: Candidate) -> Candidate | None:
    groups = _IPV6.findall(found.text)
    is_part = found.before.isalnum() or found.before == b":" or found.after[:1].isalnum()
    # C++ and Rust write `a::b`.
    is_plausible = len(groups) >= 3 and any(character.isdecimal() for character in found.text)
    return found if is_plausible and not is_part and _is_someones(found.text) else None


def _is_someones(text: str) -> bool:
    """Whether an IP address identifies one machine: not a mask, loopback, multicast or documentation address."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return not (address.is_loopback or address.is_unspecified or address.is_multicast or address.is_reserved)


# ── numbers ──────────────────────────────────────────────────────────────────────────────────────────────────────────

_BETWEEN = r"[ .\-/_]{0,3}"  # separators in a number
_GAP = r"[ .\-]?"
_NUMBER = re.compile(r"[0-9A-Za-z]")


def bare(text: str) -> str:
    """A number without separators, in upper case."""
    return "".join(_NUMBER.findall(text)).upper()


def _whole(check: Callable[[str], bool]) -> Check:
    """Wrap the check of a number that must be the whole match and not part of a longer number."""

    def of(found: Candidate) -> Candidate | None:
        if re.match(rb"[.\-]?[0-9]|[A-Za-z_]", found.after) or found.before in (b".", b"-", b"_", b"$"):
            return None
        return found if check(bare(found.text)) else None

    return of


def _iban(found: Candidate) -> Candidate | None:
    """Accept as many characters as the country's numbers have; words may follow in the match."""
    text = found.text
    length = check_digits.IBAN_LENGTHS.get(bare(text)[:2])
    places = [at.start() for at in _NUMBER.finditer(text)]
    if length is None or len(places) < length:
        return None
    number = found.ending(found.start + places[length - 1] + 1)
    is_spaced = number.end - number.start > length
    if number.after[:1].isalnum() or (is_spaced and not number.text.isupper()):
        return None
    return number if check_digits.iban(bare(number.text)) else None


def _iban_countries() -> str:
    """The pattern of country codes; "of 30 dogs" is not a candidate because no country has the code OF."""
    second: dict[str, str] = {}
    for code in sorted(check_digits.IBAN_LENGTHS):
        second[code[0]] = second.get(code[0], "") + code[1]
    return "(?i:" + "|".join(f"{first}{_GAP}[{letters}]" for first, letters in second.items()) + ")"


def _mac(found: Candidate) -> Candidate | None:
    is_part = found.before in (b":", b"-", b".") or re.match(rb"[:\-.][0-9A-Fa-f]", found.after)
    return None if is_part else found


def _card(found: Candidate) -> Candidate | None:
    """Accept the longest beginning that is a card number: a date or a code may follow."""
    text = found.text
    places = [at.start() for at in _NUMBER.finditer(text)]
    for length in (19, 16, 15, 14, 13):
        if len(places) < length:
            continue
        number = found.ending(found.start + places[length - 1] + 1)
        if not number.after[:1].isdigit() and check_digits.card(bare(number.text)):
            return number
    return None


# ── secrets ──────────────────────────────────────────────────────────────────────────────────────────────────────────

_AWS = (b"akia", b"asia", b"aroa", b"aida", b"agpa")
# The formats that issuers document, as in the rules of gitleaks and GitHub's secret scanning.
_TOKENS = "|".join((
    r"ak-[A-Za-z0-9_\-]{43}",  # Argosy's own
    rf"(?:{'|'.join(name.decode().upper() for name in _AWS)})[A-Z2-7]{{16}}",
    r"gh[pousr]_[A-Za-z0-9]{36,255}",
    r"github_pat_[A-Za-z0-9_]{22,255}",
    r"glpat-[A-Za-z0-9_\-]{20,64}",
    r"xox[abeoprs]-[A-Za-z0-9\-]{10,250}",
    r"[rs]k_(?:live|test)_[A-Za-z0-9]{16,247}",
    r"AIza[A-Za-z0-9_\-]{35}",
    r"sk-(?:proj-|svcacct-|ant-[a-z]{2,8}[0-9]{2}-)?[A-Za-z0-9_\-]{20,220}",
    r"hf_[A-Za-z0-9]{30,64}",
    r"npm_[A-Za-z0-9]{36}",
    r"pypi-AgE[A-Za-z0-9_\-]{50,250}",
    r"eyJ[A-Za-z0-9_\-]{8,}\.eyJ[A-Za-z0-9_\-]{8,}\.[A-Za-z0-9_\-]{8,}",
))  # fmt: skip
PRIVATE_KEY_BEGINS = b"-----BEGIN "
PRIVATE_KEY_ENDS = b"-----END "
_PRIVATE_KEY = (
    r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY-----[A-Za-z0-9+/=\s\\:,\-]*?"
    r"(?:-----END (?:[A-Z0-9]+ ){0,3}PRIVATE KEY-----|\z)"
)
SECRET_NAMES = (
    r"(?:password|passwd|passphrase|pwd|passwort|secret|api[_\-]?key|access[_\-]?key|(?:access|auth|bearer)[_\-]?token"
    r"|client[_\-]?secret|private[_\-]?key)"
)
_ASSIGNED = (
    rf"""(?i:{SECRET_NAMES})["']?[ \t]{{0,3}}[:=][ \t]{{0,3}}["']?([^\s"',;()\[\]{{}}<>$`\\]{{8,200}})"""
)
_IN_QUERY = r"[?&](?i:access_token|token|api_?key|key|secret|password|signature|sig|auth)=([A-Za-z0-9_\-.%+/~]{8,512})"
_LEAST_BITS = 2.5  # per character: "password=undefined1" has more, "xxxxxxx1" has less


def _assigned(found: Candidate) -> Candidate | None:
    """Accept a value that looks random: letters and digits without a pattern."""
    text = found.text
    has_both = any(map(str.isalpha, text)) and any(map(str.isdecimal, text))
    counts = Counter(text).values()
    bits = -sum(count / len(text) * math.log2(count / len(text)) for count in counts)
    return found if has_both and bits >= _LEAST_BITS else None


def _number(entity: Entity, pattern: str, check: Callable[[str], bool]) -> Rule:
    return Rule(entity, rf"\b{pattern}\b", _whole(check), is_number=True)


_AT_WORDS = (b" at ", b" arroba ", b" arobase ", b" klammeraffe ")
_DOT_WORDS = (b" dot ", b" punkt ", b" point ", b" punto ")
_COLONS = ((b":",),)

# A value belongs to the first rule that accepts it.
RULES: tuple[Rule, ...] = (
    Rule("secret", _PRIVATE_KEY, _as_it_is, needs=((PRIVATE_KEY_BEGINS.lower(),),)),
    Rule("secret", rf"\b(?:{_TOKENS})", _as_it_is, needs=((b"-", b"_", b"aiza", b"eyj", *_AWS),)),
    Rule(
        "secret", _ASSIGNED, _assigned, group=1, needs=((b"=", b":"), (b"pass", b"pwd", b"key", b"secret", b"token")),
    ),
    Rule("secret", _IN_QUERY, _as_it_is, group=1, needs=((b"?", b"&"), (b"=",))),
    Rule(
        "url_login",
        r"\b[a-zA-Z][a-zA-Z0-9+.\-]{1,15}://[^\s/@:\"'<>]{1,128}:[^\s/@\"'<>]{1,256}@"
        r"(?:[a-zA-Z0-9\-]{1,63}\.){0,8}[a-zA-Z0-9\-]{1,63}(?::[0-9]{1,5})?",
        _as_it_is, needs=((b"://",), (b"@",)),
    ),
    Rule("email", rf"{_LOCAL}@(?:{_LABEL}\.){{1,8}}[A-Za-z]{{2,24}}", _email, needs=((b"@",),)),
    Rule(
        "email", rf"{_LOCAL}(?:{_DOT}{_LOCAL}){{0,3}}{_AT}{_LABEL}(?:{_DOT}{_LABEL}){{0,4}}{_DOT}[A-Za-z]{{2,24}}",
        _email, needs=((b"@", b"at)", b"at]", b"at}", b"at>", b"at )", b"at ]", b"%40", b"&#", b"arroba", b"arobase"),),
    ),
    Rule(
        "email",
        rf"{_LOCAL}(?:{_DOT}{_LOCAL}){{0,3}} {_AT_WORD} {_LABEL}(?: {_DOT_WORD} {_LABEL}){{0,4}}"
        rf" {_DOT_WORD} {_USUAL}\b",
        _email, needs=(_AT_WORDS, _DOT_WORDS),
    ),
    Rule(
        "iban", rf"\b{_iban_countries()}{_GAP}[0-9]{_GAP}[0-9](?:{_GAP}[A-Za-z0-9]){{11,30}}", _iban,
        is_number=True,
    ),
    Rule("card", rf"\b[0-9](?:{_BETWEEN}[0-9]){{12,18}}", _card, is_number=True),
    _number(
        "national_id", rf"[12](?:{_BETWEEN}[0-9]){{4}}{_BETWEEN}(?:[0-9]{{2}}|2[AB])(?:{_BETWEEN}[0-9]){{8}}",
        check_digits.french_nir,
    ),
    _number("national_id", rf"756(?:{_BETWEEN}[0-9]){{10}}", check_digits.swiss_ahv),
    _number("national_id", r"(?:[0-9]{8}|[XYZ][ \-]?[0-9]{7})[ \-]?[A-Z]", check_digits.spanish_dni),
    _number(
        "national_id", r"[A-Z]{6}[0-9LMNP-V]{2}[ABCDEHLMPRST][0-9LMNP-V]{2}[A-Z][0-9LMNP-V]{3}[A-Z]",
        check_digits.italian_tax_code,
    ),
    _number("national_id", r"[0-9]{3}-[0-9]{2}-[0-9]{4}", check_digits.american_ssn),
    _number("national_id", r"[0-9]{3}\.[0-9]{3}\.[0-9]{3}-[0-9]{2}", check_digits.brazilian_cpf),
    _number("national_id", r"[0-9]{2}\.[0-9]{2}\.[0-9]{2}-[0-9]{3}\.[0-9]{2}", check_digits.belgian_register_number),
    _number("national_id", r"(?:[0-9]{2})?[0-9]{6}[\-+][0-9]{4}", check_digits.swedish_number),
    _number("national_id", r"[0-9]{2} ?[0-9]{3} ?[0-9]{3} ?[0-9]{3}", check_digits.german_tax_id),
    _number("national_id", r"[0-9]{11}", check_digits.polish_pesel),
    Rule("ip_address", r"\b[0-9]{1,3}(?:\.[0-9]{1,3}){3}\b", _ipv4, needs=((b".",),)),
    Rule(
        "ip_address", r"(?:[0-9A-Fa-f]{0,4}:){2,7}(?:(?:[0-9]{1,3}\.){3}[0-9]{1,3}|[0-9A-Fa-f]{0,4})", _ipv6,
        needs=_COLONS,
    ),
    Rule("mac_address", r"\b[0-9A-Fa-f]{2}(?:[:\-][0-9A-Fa-f]{2}){5}\b", _mac, needs=((b":", b"-"),)),
    Rule("mac_address", r"\b[0-9A-Fa-f]{4}\.[0-9A-Fa-f]{4}\.[0-9A-Fa-f]{4}\b", _mac, needs=((b".",),)),
)  # fmt: skip
