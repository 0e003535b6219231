"""Sizes as people write them."""

from __future__ import annotations

import pytest

from argosy.config import parse_size
from argosy.errors import UsageError


@pytest.mark.parametrize(
    "text", ["9" * 310 + "B", "9" * 310 + "TB", "8388608TiB", 1 << 63, "0", "0.0000001KB"]
)
def test_a_size_that_no_machine_has_is_refused(text: str | int) -> None:
    with pytest.raises(UsageError, match="a size must be at least 1 byte and less than 8 EiB, found '"):
        parse_size(text)


def test_a_size_is_a_whole_number_of_bytes() -> None:
    assert [parse_size(text, total_bytes=3) for text in ("1.5KiB", "50%", "7B", 9)] == [1536, 1, 7, 9]


@pytest.mark.parametrize("text", ["100", "1.5", "8589934592"])
def test_a_size_without_a_unit_is_refused_with_the_units_it_may_have(text: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_size(text, total_bytes=1 << 40)
    assert (
        str(refused.value) == f"'{text}' has no unit\nhint: write {text}GiB, {text}MiB, or {text}B for bytes"
    )
