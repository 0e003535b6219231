"""Sizes as people write them."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from argosy.config import (
    RUNNING,
    SAMPLING,
    EngineConfig,
    EngineOptions,
    SamplingParams,
    counted,
    disk_size,
    parse_size,
)
from argosy.config.option import declarations
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


def test_one_of_a_kind_is_singular() -> None:
    assert [counted(number, "fault") for number in (0, 1, 2)] == ["0 faults", "1 fault", "2 faults"]
    assert [counted(number, "entry", "entries") for number in (1, 2)] == ["1 entry", "2 entries"]


def test_a_size_on_a_drive_is_never_nothing() -> None:
    assert [disk_size(size) for size in (0, 999, 4000, 280_000_000, 16_400_000_000)] == [
        "0 bytes", "999 bytes", "4 kB", "280 MB", "16.4 GB",
    ]  # fmt: skip


def test_every_choice_of_a_caller_becomes_a_setting_of_the_engine() -> None:
    # `memory` is the budget's; each of `loras` holds `lora_columns`
    choices = set(EngineOptions.__annotations__) - {"memory", "context", "mmproj", "lora_columns"}
    settings = {one.name for one in fields(EngineConfig)} - {"budget"}
    assert choices == settings


def test_a_declaration_has_the_type_words_and_variable_of_its_field() -> None:
    declared = declarations(EngineOptions)
    assert (declared["threads"].kind, declared["threads"].option.variable) == (int, "ARGOSY_THREADS")
    assert declared["speculate"].words == ("off", "lookup", "mtp", "auto")
    assert (declared["memory"].kind, declared["watermark"].kind) == (str, Path)
    assert {*RUNNING, "watermark"} == {name for name, one in declared.items() if one.option.flags}
    sampling = declarations(SamplingParams)
    assert sampling["stop"].is_list
    assert not sampling["seed"].is_list
    assert set(SAMPLING) == set(sampling)
