"""Keep a model's working set from run to run, in a small per-user file that names no expert.

    Recorder.counts()  ->  add  ->  <data>/argosy/routing/MODEL.json  ->  find, find_for  ->  `argosy plan`

For each layer the file keeps how many distinct experts a number of tokens needs, and how old experts are when
reused: no expert numbers, no order, no times. Even so, routing is content: only the owner can read the file, a run
of fewer than FEWEST_TOKENS adds nothing, and `--no-record` (or ARGOSY_RECORD=off) keeps nothing.

Elsewhere: `experts/hit_rate.py` defines the curve and its JSON.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from argosy.checkpoint.files import ModelFiles
from argosy.directory import Directory
from argosy.errors import UsageError
from argosy.experts.hit_rate import MOST_JSON_BYTES, WorkingSet
from argosy.observe.recorder import RoutingCounts
from argosy.user_directories import data_directory

FEWEST_TOKENS = 256  # decode tokens that a run needs to be added
MOST_TOKENS = 1 << 20  # the most weight of saved counts, so that they follow changes in how a model is used
_ROUTER_BYTES = 1 << 16  # read from the first router, which differs between any two trainings


def directory() -> Path:
    """`argosy/routing` in the user's data directory."""
    return data_directory() / "routing"


def path_of(files: ModelFiles) -> Path:
    """The file for a model's working set, wherever the model is stored; another format counts as another model.

    Raises:
        OSError: the model cannot be read.
    """
    config = files.config
    router = files.dense[f"layers.{config.moe_layers[0]}.router"]
    with router.path.open("rb") as file:
        file.seek(router.offset)
        sample = file.read(min(router.nbytes, _ROUTER_BYTES))
    sizes = (
        config.num_layers,
        config.moe_layers,
        config.num_experts,
        config.experts_per_token,
        config.hidden_size,
    )
    return directory() / f"{blake3(repr(sizes).encode() + sample).hexdigest(length=16)}.json"


def find(path: Path) -> WorkingSet | None:
    """The saved working set, or None.

    Raises:
        UsageError: the file is damaged.
        OSError: it cannot be read.
    """
    try:
        with Directory(path.parent.parent) as data:
            return WorkingSet.from_json(data.read(Path(path.parent.name, path.name), MOST_JSON_BYTES))
    except FileNotFoundError:
        return None


def find_for(files: ModelFiles) -> WorkingSet | None:
    """The working set that earlier runs of a model saved on this machine, or None.

    Raises:
        UsageError: the file is damaged, or belongs to another model.
        OSError: the file or the model cannot be read.
    """
    if not files.config.moe_layers:
        return None
    found = find(path_of(files))
    if found is not None:
        found.require_model(files.config)
    return found


def add(path: Path, counts: RoutingCounts) -> bool:
    """Add a run's counts to those saved earlier, replacing a damaged file. Returns False if there is too little to
    add.

    Raises:
        OSError: the file cannot be written.
    """
    new = counts.working_set
    if new is None or new.num_tokens < FEWEST_TOKENS:
        return False
    with (
        Directory(path.parent.parent, make=True, mode=0o700) as data,
        data.directory(path.parent.name, make=True, mode=0o700) as directory,
        directory.replacing(path.name) as write,
    ):
        try:
            old = find(path)
        except UsageError:
            old = None
        merged = new if old is None or not _is_alike(old, new) else merge(old, new)
        write((json.dumps(merged.as_dict()) + "\n").encode())
    return True


def merge(old: WorkingSet, new: WorkingSet) -> WorkingSet:
    """The mean of two working sets of a model, weighted by the number of windows of each length."""
    old = replace(old, num_tokens=min(old.num_tokens, MOST_TOKENS))
    longer = max(old, new, key=lambda one: len(one.windows))
    total: NDArray[np.float64] = np.zeros(longer.distinct.shape)
    weights: NDArray[np.float64] = np.zeros(len(longer.windows))
    for one in (old, new):
        # At least 1: the tokens of several short answers may not fill a window.
        counted = np.maximum(one.num_tokens + 1 - np.array(one.windows, np.float64), 1)
        weights[: len(counted)] += counted
        total[:, : len(counted)] += one.distinct * counted
    resident, found = (_mean(old, new, of_age) for of_age in ("resident", "found"))
    return replace(
        longer,
        num_tokens=old.num_tokens + new.num_tokens,
        # A window length that only one set has may show fewer experts than a shorter one that both have.
        distinct=np.maximum.accumulate(total / weights, axis=1),
        resident=resident,
        found=found,
    )


def _mean(old: WorkingSet, new: WorkingSet, name: str) -> NDArray[np.float64] | None:
    """The mean of a curve by age, weighted by tokens; if only one set has the curve, that curve."""
    curves = [(getattr(one, name), one.num_tokens) for one in (old, new)]
    known = [(curve, tokens) for curve, tokens in curves if curve is not None]
    if not known:
        return None
    total = sum(tokens for _, tokens in known)
    return np.asarray(sum(curve * (tokens / total) for curve, tokens in known), np.float64)


def _is_alike(old: WorkingSet, new: WorkingSet) -> bool:
    return (old.num_experts, old.experts_per_token, old.layers) == (
        new.num_experts,
        new.experts_per_token,
        new.layers,
    )
