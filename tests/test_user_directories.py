"""A user's directories are found, or the error says which variable names them."""

from __future__ import annotations

import pwd
import re
from pathlib import Path

import pytest

from argosy.errors import UsageError
from argosy.library.places import find_models, hub_cache
from argosy.user_directories import cache_directory, data_directory, measurement_file, state_directory


def test_a_user_without_a_home_directory_is_told_to_name_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def has_no_entry(number: int) -> pwd.struct_passwd:
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", has_no_entry)
    for name in ("HOME", "ARGOSY_CACHE", "XDG_CACHE_HOME", "XDG_DATA_HOME", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for find in (cache_directory, data_directory, find_models):
        with pytest.raises(UsageError, match="this user has no home directory, and HOME is not set"):
            find()


@pytest.fixture(scope="module")
def of_a_module() -> list[Path]:
    """Where what the tests of a module share would be written."""
    return [data_directory(), state_directory(), hub_cache()]


def test_what_tests_share_is_not_written_into_the_developers_home(
    of_a_module: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = tmp_path_factory.getbasetemp()
    assert [place for place in of_a_module if not place.is_relative_to(base)] == []


def test_the_guide_says_which_directory_has_what_is_measured_and_what_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for variable in ("ARGOSY_CACHE", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    guide = (Path(__file__).parents[1] / "docs" / "guides" / "installing.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `~/([^`]+)`.*? \| (.*) \|$", guide, flags=re.MULTILINE))
    rows = {tmp_path / place: contents for place, contents in rows.items()}
    assert rows.keys() == {cache_directory(), data_directory(), state_directory()}
    for place, contents in rows.items():
        assert ("rates of this machine" in contents) == (measurement_file("rates", ()).parent == place)
