"""The library of a server with `--library`: every model that runs here, by the names that users give it.

    files of all programs  ─ look ─>  Offers: facts from headers, other names, faults  ─ make ─>  Ready

A request may name a model in the library, an alias or a preset, but never a path.

Elsewhere: which model is in memory is `serve/models/models.py`; the library is `library/`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from argosy.config import DEMO, Preset, SamplingDefaults
from argosy.errors import ArgosyError, UsageError

if TYPE_CHECKING:
    from argosy.cli.shared.options import Recording
    from argosy.engine.engine import Engine
    from argosy.engine.shared import Ready
    from argosy.forecast.forecast import Speeds
    from argosy.library.names import Named
    from argosy.serve.answer.facts import ModelFacts
    from argosy.serve.models.entry import Offer, Offers


class ServedLibrary:
    """Finds the models in the library and prepares them for one process and one budget.

    Args:
        given: options for every engine; `memory` is their common budget at the start.
        process_bytes: the memory of the process without models.
        recording: counts routing; None: it is not counted.
    """

    def __init__(self, given: Mapping[str, Any], process_bytes: int, recording: Recording | None) -> None:
        from argosy.engine.shared import Making

        self._given = given
        self._making = Making(recording, process_bytes=process_bytes)
        self._since = int(time.time())
        self._summaries: dict[object, dict[str, Any]] = {}  # for models outside the library, by their key

    def look(self) -> Offers:
        """Find the models that are here now, reading the headers of new ones."""
        from argosy.cli.commands.library import model_facts
        from argosy.library import kept, names
        from argosy.library.facts import key_of
        from argosy.library.places import find_models
        from argosy.serve.models.entry import Offers

        offers: dict[str, Offer] = {}
        faults: dict[str, str] = {}
        found = find_models()
        for model, facts in model_facts(found.models):
            if model.name in offers or model.name in faults:  # the first place wins
                continue
            if "fault" in facts:
                faults[model.name] = facts["fault"]
            else:
                offers[model.name] = self._offer(model.name, facts, model.path, key_of(model))
        try:
            aliases = kept.read().aliases
            others = names.other_names([model.name for model in found.models], aliases)
        except UsageError:  # a damaged file of aliases; `argosy list` reports it
            aliases, others = {}, names.other_names([model.name for model in found.models], {})
        for alias, target in aliases.items():
            if (path := Path(target)).is_absolute():
                self._offer_path(alias, path, offers, faults)
        self._offer_demo(offers, faults)
        return Offers(offers=list(offers.values()), others=others, faults=faults)

    def _offer_demo(self, offers: dict[str, Offer], faults: dict[str, str]) -> None:
        from argosy.demo.locate import find_made

        try:
            path = find_made()
        except ArgosyError as error:
            faults[DEMO] = error.message
            return
        if path is not None:
            self._offer_path(DEMO, path, offers, faults)

    def _offer_path(self, name: str, path: Path, offers: dict[str, Offer], faults: dict[str, str]) -> None:
        from argosy.forecast.planning import summarise

        try:
            key = (path, path.stat().st_mtime_ns)
            if key not in self._summaries:
                self._summaries[key] = asdict(summarise(path))
            offers[name] = self._offer(name, self._summaries[key], path, key)
        except ArgosyError as error:
            faults[name] = error.message
        except OSError as error:
            faults[name] = str(error.strerror)

    def _offer(self, name: str, facts: Mapping[str, Any], path: Path, key: object) -> Offer:
        from argosy.serve.models.entry import Offer

        return Offer(facts=self._facts_of(name, facts), key=key, make=partial(self._make, name, path))

    def _facts_of(self, name: str, facts: Mapping[str, Any]) -> ModelFacts:
        from argosy.serve.answer.facts import ModelFacts

        kinds = () if self._given.get("media") is False else tuple(facts["media_kinds"])
        return ModelFacts(
            id=name, family=facts["family"], context_tokens=facts["context_tokens"], num_layers=facts["num_layers"],
            num_experts=facts["num_experts"], experts_per_token=facts["experts_per_token"],
            vocab_size=facts["vocab_size"], num_parameters=facts["num_parameters"],
            weight_bytes=facts["weight_bytes"], created=self._since,
            media_kinds=kinds, hears="native" if "sound" in kinds else "none",
            sampling=SamplingDefaults(**facts["sampling"]).overridden(self._given.get("sampling", {})),
        )  # fmt: skip

    def _make(self, name: str, path: Path, budget_bytes: int | None) -> tuple[Ready, Speeds | None]:
        """Prepare a model; raises CheckpointError and related errors, and DoesNotFit."""
        from argosy.open.models import configure, open_files

        files, given = open_files(path), dict(self._given)
        if budget_bytes is not None:
            given["memory"] = budget_bytes
        ready = self._making.ready(name, files, configure(name, files, **given))
        return ready, speeds_of(ready, path, threads=ready.config.threads)


class ServedPresets:
    """The presets of a server's models; see `models.Presets`. Files are read each time, so a change takes effect at
    once.

    Args:
        models: the server's models by id; None: it serves the library.
    """

    def __init__(self, models: Mapping[str, Named] | None) -> None:
        self._models = models

    @cached_property
    def _own_ids(self) -> Mapping[str, str]:
        """The ids of the server's models, by the names that presets use."""
        from argosy.library.names import whole_name

        found: dict[str, str] = {}
        for name, model in (self._models or {}).items():
            with suppress(ArgosyError):  # it is not here; the server reports that when it opens the model
                is_whole = model.name is not None and not Path(model.name).is_absolute()
                found[model.name if model.name and is_whole else whole_name(model.text)] = name
        return found

    def _ids(self) -> Mapping[str, str]:
        if self._models is not None:
            return self._own_ids
        from argosy.library import kept

        try:  # a model outside the library is served by its alias
            return {
                target: alias for alias, target in kept.read().aliases.items() if Path(target).is_absolute()
            }
        except UsageError:  # a damaged file of aliases; `argosy list` reports it
            return {}

    def find(self, name: str) -> Preset | None:
        from argosy.library import presets

        preset = presets.find(name)
        return None if preset is None else self._served(preset, self._ids())

    def all(self) -> list[Preset]:
        from argosy.library import presets

        ids = self._ids()
        found = (self._served(preset, ids) for preset in presets.find_all()[0])
        return [preset for preset in found if preset is not None]

    def _served(self, preset: Preset, ids: Mapping[str, str]) -> Preset | None:
        model = ids.get(preset.model, preset.model if self._models is None else None)
        return None if model is None else replace(preset, model=model)


def speeds_of(
    model: Ready | Engine, path: str | Path, *, threads: int, uses_counts: bool = True
) -> Speeds | None:
    """Predicts a model's speed; None if the kept rates cannot be read, which `argosy plan` reports.

    Args:
        uses_counts: predict from the experts that earlier runs chose.
    """
    from argosy.forecast.forecast import Speeds
    from argosy.machine import kept_rates
    from argosy.observe import saved
    from argosy.open.models import locate_model

    try:
        rates = kept_rates.rates_here(locate_model(path), threads=threads)
    except UsageError:
        return None
    known = None
    if uses_counts:
        with suppress(OSError, UsageError):
            known = saved.find_for(model.files)
    return Speeds(model.files.config, model.work, rates, known)
