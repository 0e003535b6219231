"""Check digits of the numbers of people, accounts and cards.

Each function takes a number without separators, in upper case, and returns whether it can exist. A number that
passes need not be in use; a random number seldom passes. Each docstring cites the source of its rule.
"""

from __future__ import annotations

from collections.abc import Mapping

# Lengths of the SWIFT IBAN Registry, release 99.
IBAN_LENGTHS: Mapping[str, int] = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BR": 29, "BY": 28,
    "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "DO": 28, "EE": 20, "EG": 29, "ES": 24, "FI": 18,
    "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28, "HR": 21, "HU": 28, "IE": 22,
    "IL": 23, "IQ": 23, "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LC": 32, "LI": 21, "LT": 20,
    "LU": 20, "LV": 21, "LY": 25, "MC": 27, "MD": 24, "ME": 22, "MK": 19, "MR": 27, "MT": 31, "MU": 30, "NL": 18,
    "NO": 15, "PK": 24, "PL": 28, "PS": 29, "PT": 25, "QA": 29, "RO": 24, "RS": 22, "SA": 24, "SC": 31, "SE": 24,
    "SI": 19, "SK": 24, "SM": 27, "ST": 25, "SV": 28, "TL": 23, "TN": 24, "TR": 26, "UA": 29, "VA": 22, "VG": 24,
    "XK": 20,
}  # fmt: skip


def luhn(digits: str) -> bool:
    """ISO/IEC 7812-1, annex B."""
    total = 0
    for at, digit in enumerate(map(int, reversed(digits))):
        total += digit if at % 2 == 0 else (2 * digit - 9 if digit > 4 else 2 * digit)
    return total % 10 == 0


def card(digits: str) -> bool:
    """Luhn's digit, and a length that the network named by the first digits issues (ISO/IEC 7812)."""
    first, two, three, four = (int(digits[:count]) for count in (1, 2, 3, 4))
    length = len(digits)
    is_issued = (
        (first == 4 and length in (13, 16, 19))
        or ((51 <= two <= 55 or 2221 <= four <= 2720) and length == 16)
        or (two in (34, 37) and length == 15)
        or ((four == 6011 or two in (62, 65) or 644 <= three <= 649) and 16 <= length <= 19)
        or (3528 <= four <= 3589 and 16 <= length <= 19)
        or ((300 <= three <= 305 or two in (36, 38, 39)) and length == 14)
    )
    return is_issued and luhn(digits) and len(set(digits)) > 1


def iban(number: str) -> bool:
    """ISO 13616 with the check of ISO/IEC 7064, MOD 97-10; the length is that of the country."""
    return IBAN_LENGTHS.get(number[:2]) == len(number) and _rest_97(number[4:] + number[:4]) == 1


def _rest_97(number: str) -> int:
    return int("".join(str(int(character, 36)) for character in number)) % 97


def german_tax_id(digits: str) -> bool:
    """Steuer-Identifikationsnummer, § 139b AO: ISO/IEC 7064, MOD 11,10; one of the ten digits occurs two or three
    times.
    """
    if len(digits) != 11 or digits[0] == "0":
        return False
    repeated = [digits[:10].count(digit) for digit in set(digits[:10]) if digits[:10].count(digit) > 1]
    if repeated not in ([2], [3]):
        return False
    product = 10
    for digit in map(int, digits[:10]):
        product = ((digit + product) % 10 or 10) * 2 % 11
    return (11 - product) % 10 == int(digits[10])


def french_nir(number: str) -> bool:
    """Numéro d'inscription au répertoire, INSEE: 97 less the rest of the first 13 digits; Corsica has 2A and 2B."""
    if len(number) != 15 or number[0] not in "12":
        return False
    month = number[3:5]
    if not month.isdecimal() or not (1 <= int(month) <= 12 or 20 <= int(month) <= 42 or int(month) >= 50):
        return False
    body = number[:13].replace("2A", "19").replace("2B", "18")
    return (body + number[13:]).isdecimal() and 97 - int(body) % 97 == int(number[13:])


def spanish_dni(number: str) -> bool:
    """Documento nacional de identidad and NIE, Real Decreto 1553/2005: the letter follows from the rest by 23."""
    if len(number) != 9:
        return False
    body = number[:8].translate(str.maketrans("XYZ", "012")) if number[0] in "XYZ" else number[:8]
    return body.isdecimal() and "TRWAGMYFPDXBNJZSQVHLCKE"[int(body) % 23] == number[8]


_ODD = dict(zip("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", [
    1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10,
    22, 25, 24, 23,
], strict=True))  # fmt: skip


def italian_tax_code(number: str) -> bool:
    """Codice fiscale, Decreto ministeriale 23 dicembre 1976: values of the odd and even places, by 26."""
    even = {character: int(character, 36) - (0 if character.isdecimal() else 10) for character in _ODD}
    total = sum((even if at % 2 else _ODD)[character] for at, character in enumerate(number[:15]))
    return len(number) == 16 and chr(ord("A") + total % 26) == number[15]


def belgian_register_number(digits: str) -> bool:
    """Rijksregisternummer: 97 less the rest of nine digits, with a 2 before them for those born since 2000."""
    if len(digits) != 11 or not 1 <= int(digits[4:6]) <= 31 or int(digits[2:4]) % 20 > 12:
        return False
    return int(digits[9:]) in (97 - int(digits[:9]) % 97, 97 - int("2" + digits[:9]) % 97)


def polish_pesel(digits: str) -> bool:
    """PESEL: weights 1, 3, 7, 9; the month has 20, 40, 60 or 80 added by century."""
    if len(digits) != 11 or not 1 <= int(digits[2:4]) % 20 <= 12 or not 1 <= int(digits[4:6]) <= 31:
        return False
    weights = (1, 3, 7, 9, 1, 3, 7, 9, 1, 3)
    total = sum(int(digit) * weight for digit, weight in zip(digits[:10], weights, strict=True))
    return (10 - total % 10) % 10 == int(digits[10])


def swedish_number(digits: str) -> bool:
    """Personnummer: Luhn's digit over ten digits, six of them a date; coordination numbers add 60 to the day."""
    digits = digits[-10:]
    is_date = 1 <= int(digits[2:4]) <= 12 and 1 <= int(digits[4:6]) % 60 <= 31
    return len(digits) == 10 and is_date and luhn(digits)


def swiss_ahv(digits: str) -> bool:
    """AHV number: the country code 756 and the check digit of EAN-13."""
    total = sum(int(digit) * (3 if at % 2 else 1) for at, digit in enumerate(digits[:12]))
    return len(digits) == 13 and digits.startswith("756") and (10 - total % 10) % 10 == int(digits[12])


def brazilian_cpf(digits: str) -> bool:
    """CPF: two digits by weights from 10 and from 11 down."""
    if len(digits) != 11 or len(set(digits)) == 1:
        return False
    for length in (9, 10):
        total = sum(int(digit) * (length + 1 - at) for at, digit in enumerate(digits[:length]))
        if total * 10 % 11 % 10 != int(digits[length]):
            return False
    return True


def american_ssn(digits: str) -> bool:
    """Social security number: there is no check digit, so only ranges that are never issued are excluded (SSA)."""
    area, group, serial = digits[:3], digits[3:5], digits[5:]
    return (
        len(digits) == 9
        and area not in ("000", "666")
        and area < "900"
        and group != "00"
        and serial != "0000"
    )
