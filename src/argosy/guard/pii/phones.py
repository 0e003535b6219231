"""Telephone numbers: sequences of digits that are valid in the numbering plans of Google's libphonenumber.

A number begins with a country code, or is written as people in one of the given regions write it. Digits without a
separator count as a national number only with the region's leading zero: ten digits in a row may be anything.

Elsewhere: other entities are `entities.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from argosy.errors import UsageError
from argosy.guard.pii.entities import Candidate, Rule

_PATTERN = r"(?:\(?\+ ?|\()?[0-9](?:[ ()./\-]{0,3}[0-9]){6,18}"
_FEWEST_DIGITS, _MOST_DIGITS = 7, 15
_MOST_TRIED = 4  # how many ends of a candidate to try: a price or a date may follow a number
# Parsing a candidate takes some 50 microseconds. A text may have this many parsed, plus one per a number of bytes;
# beyond that, a number with a country code is accepted unparsed, and any other is skipped.
MOST_READ, _BYTES_OF_ANOTHER = 512, 256
_IN_NUMBER = re.compile(rb"[0-9][ .\-/_]?\Z")
_NO_PHONE = re.compile(r"[0-9]+\.[0-9]+|[0-9]{1,4}([./\-])[0-9]{1,2}\1[0-9]{2,4}")  # a decimal, a date
# A date before a time of day or a number.
_DATED = re.compile(r"[12][0-9]{3}([./\-])[01]?[0-9]\1[0-3]?[0-9](?![0-9])[ ./\-]*")
_GROUP_END = re.compile(r"[0-9](?=[^0-9]|$)")


def rule(regions: Sequence[str], options: Any) -> tuple[Rule, Any]:
    """The rule for telephone numbers, and its compiled pattern.

    Args:
        regions: ISO 3166 codes, such as DE, of the regions whose national notation is accepted.
        options: for RE2.

    Raises:
        UsageError: a region is unknown.
    """
    import re2

    made = Rule("phone", _PATTERN, _Phones(regions).read, is_number=True)
    return made, re2.compile(_PATTERN.encode(), options)


class _Phones:
    def __init__(self, regions: Sequence[str]) -> None:
        import phonenumbers

        self._library: Any = phonenumbers
        for region in regions:
            if region not in phonenumbers.SUPPORTED_REGIONS:
                raise UsageError(f"unknown region {region[:8]!a}; expected an ISO code such as DE or US")
        # Each with the prefix of its national numbers, as people write them.
        self._regions = [
            (region, phonenumbers.ndd_prefix_for_region(region, True) or "") for region in regions
        ]

    def read(self, found: Candidate) -> Candidate | None:
        """The telephone number at the beginning of a candidate."""
        if found.text.startswith("(") and ")" not in found.text:
            found = found.beginning(found.start + 1)
        if found.before.isalnum() or found.before in (b".", b"-", b"_", b"/", b"$", b"=", b"+"):
            return None
        is_international = found.text.startswith(("+", "(+", "00"))
        if not is_international and _IN_NUMBER.search(found.data, max(0, found.start - 2), found.start):
            return None  # a later group of a longer sequence
        if _NO_PHONE.fullmatch(found.text):
            return None
        if dated := _DATED.match(found.text):
            found = found.beginning(found.start + dated.end())
        if found.number > MOST_READ + len(found.data) // _BYTES_OF_ANOTHER:
            return found if is_international else None
        ends = [at.end() for at in _GROUP_END.finditer(found.text)]
        for end in ends[: -_MOST_TRIED - 1 : -1]:
            number = found.ending(found.start + end)
            if re.match(rb"[0-9A-Za-z_]|[.\-]?[0-9]", number.after):
                continue
            text = number.text
            num_digits = sum(map(str.isdecimal, text))
            if _FEWEST_DIGITS <= num_digits <= _MOST_DIGITS and self._is_number(
                text, num_digits, is_international
            ):
                return number
        return None

    def _is_number(self, text: str, num_digits: int, is_international: bool) -> bool:
        if is_international:
            return self._is_valid("+" + text[2:] if text.startswith("00") else text.lstrip("("), None)
        for region, prefix in self._regions:
            begins_at_home = prefix == "0" and text.lstrip("(").startswith("0")
            is_separated = prefix != "0" and num_digits < len(text)
            if (begins_at_home or is_separated) and self._is_valid(text, region):
                return True
        return False

    def _is_valid(self, text: str, region: str | None) -> bool:
        try:
            number = self._library.parse(text, region)
        except self._library.NumberParseException:
            return False
        if region is None:
            return bool(self._library.is_valid_number(number))
        return bool(self._library.is_valid_number_for_region(number, region))
