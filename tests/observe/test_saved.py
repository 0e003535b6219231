"""The kept curve is the owner's, names no expert, and grows with every long enough run."""

from __future__ import annotations

import json
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy.experts.hit_rate import ReuseGaps, WorkingSet
from argosy.model.families import open_model
from argosy.observe import saved
from argosy.observe.recorder import RoutingCounts
from tests.models.tiny import mixtral, write_model


def counts_of(num_tokens: int, seed: int = 0, num_experts: int = 16, k: int = 2) -> RoutingCounts:
    rng = np.random.default_rng(seed)
    gaps = ReuseGaps(2, num_experts)
    scores = rng.normal(size=(num_tokens, 2, num_experts)) + rng.normal(size=(2, num_experts))
    gaps.count(np.argsort(-scores)[..., :k])
    working_set = WorkingSet.of([gaps], layers=(1, 3), num_experts=num_experts, experts_per_token=k)
    none: Any = np.zeros((2, num_experts), np.int64)
    return RoutingCounts((1, 3), 0, num_tokens, none, none, none[:, 0], num_tokens - 1, working_set)


def test_runs_add_up_to_about_what_one_long_run_records(tmp_path: Path) -> None:
    path = tmp_path / "new" / "model.json"
    for seed in (1, 1, 1):
        assert saved.add(path, counts_of(400, seed))
    found, alone = saved.find(path), counts_of(400, 1).working_set
    assert found is not None
    assert alone is not None
    assert found.num_tokens == 1200
    np.testing.assert_allclose(found.distinct, alone.distinct, atol=1e-3)  # the file has four digits
    assert found.resident is not None
    assert alone.resident is not None
    np.testing.assert_allclose(found.resident, alone.resident, atol=1e-3)
    for slots in (4, 8, 16):
        assert found.hit_rate(slots) == pytest.approx(alone.hit_rate(slots), abs=1e-3)


def test_longer_runs_weigh_more_and_curves_still_rise() -> None:
    short, long = counts_of(300, 1).working_set, counts_of(5000, 2).working_set
    assert short is not None
    assert long is not None
    merged = saved.merge(short, long)
    assert merged.windows == long.windows
    assert (np.diff(merged.distinct) >= 0).all()
    assert (
        abs(merged.distinct - long.distinct).mean()
        < 0.2 * abs(short.distinct - long.distinct[:, : len(short.windows)]).mean()
    )
    WorkingSet.from_json(json.dumps(merged.as_dict()).encode())


def test_what_was_saved_never_outweighs_a_million_new_tokens() -> None:
    old, new = counts_of(300, 1).working_set, counts_of(300, 2).working_set
    assert old is not None
    assert new is not None
    from dataclasses import replace

    old, new = replace(old, num_tokens=1 << 40), replace(new, num_tokens=1 << 20)
    np.testing.assert_allclose(saved.merge(old, new).distinct, (old.distinct + new.distinct) / 2, rtol=1e-3)


def test_only_the_owner_can_read_it_and_it_names_no_expert(tmp_path: Path) -> None:
    path = tmp_path / "argosy" / "routing" / "model.json"
    saved.add(path, counts_of(400))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    facts = json.loads(path.read_text())
    assert set(facts) == {"format", "num_experts", "experts_per_token", "tokens", "windows", "ages", "layers"}


def test_a_short_run_adds_nothing(tmp_path: Path) -> None:
    assert not saved.add(tmp_path / "model.json", counts_of(saved.FEWEST_TOKENS - 1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "damaged", [b"", b"{}", b"\xff\xfe", b'{"format": "argosy-working-set-1"}', b"[" * 100_000]
)
def test_a_damaged_file_is_replaced(tmp_path: Path, damaged: bytes) -> None:
    path = tmp_path / "model.json"
    path.write_bytes(damaged)
    assert saved.add(path, counts_of(400))
    found = saved.find(path)
    assert found is not None
    assert found.num_tokens == 400


def test_a_file_of_another_geometry_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    saved.add(path, counts_of(400, num_experts=8))
    saved.add(path, counts_of(500))
    found = saved.find(path)
    assert found is not None
    assert (found.num_experts, found.num_tokens) == (16, 500)


def test_runs_that_end_together_are_all_added(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: saved.add(path, counts_of(300, seed)), range(16)))
    found = saved.find(path)
    assert found is not None
    assert found.num_tokens == 16 * 300


def test_a_model_keeps_its_file_wherever_it_lies_and_another_training_has_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    paths = [
        saved.path_of(open_model(write_model(tmp_path / name, mixtral(), seed=seed)))
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert paths[0] == paths[1] != paths[2]
    assert paths[0].parent == tmp_path / "data" / "argosy" / "routing"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert saved.directory() == tmp_path / "home" / ".local" / "share" / "argosy" / "routing"


def test_a_link_in_the_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "routing").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="it is a symbolic link"):
        saved.add(tmp_path / "routing" / "model.json", counts_of(400))
    assert not list((tmp_path / "victim").iterdir())
