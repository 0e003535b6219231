"""The first hour of a new user works as the guides say."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.first_hour import live, new_user


@pytest.mark.full  # eleven commands, each with an interpreter of its own
def test_each_step_of_the_first_hour_shows_what_it_should(tmp_path: Path) -> None:
    with new_user(tmp_path, is_slow=False) as hour:
        live(hour, tmp_path)
    done = [step.what for step in hour.steps]
    assert {"openai", "anthropic", "curl", "the page"} <= {*done}
