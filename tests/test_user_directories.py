"""A user's directories are found, or the error says which variable names them."""

from __future__ import annotations

import pwd

import pytest

from argosy.errors import UsageError
from argosy.library.places import find_models
from argosy.user_directories import cache_directory, data_directory


def test_a_user_without_a_home_directory_is_told_to_name_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def has_no_entry(number: int) -> pwd.struct_passwd:
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", has_no_entry)
    for name in ("HOME", "ARGOSY_CACHE", "XDG_CACHE_HOME", "XDG_DATA_HOME", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for find in (cache_directory, data_directory, find_models):
        with pytest.raises(UsageError, match="this user has no home directory, and HOME is not set"):
            find()
