"""`argosy.Engine`: an engine opened by path or name."""

from __future__ import annotations

from pathlib import Path
from typing import Self, Unpack

from argosy.config import DEMO, EngineOptions
from argosy.engine import engine
from argosy.engine.drafts.drafter import Drafter
from argosy.experts.recording import OpenRecorder
from argosy.experts.resident import Progress
from argosy.experts.runner import ExpertGroup
from argosy.model.decoder import RouteObserver
from argosy.open.models import configure, locate_model, open_files


class Engine(engine.Engine):
    """Runs one model within one memory budget.

        with Engine.open("path/or/demo", memory="8GiB") as engine:
            print(engine.generate("Why is the sky blue?").text)

    `engine.Engine` describes the rest, and the arguments for a program that has the files and settings itself.
    """

    @classmethod
    def open(
        cls,
        model: str | Path = DEMO,
        *,
        drafter: Drafter | None = None,
        progress: Progress | None = None,
        observe_routes: RouteObserver | None = None,
        recorder: OpenRecorder | None = None,
        experts: ExpertGroup | None = None,
        **options: Unpack[EngineOptions],
    ) -> Self:
        """Open a model with the given settings, and defaults for the others.

        Args:
            model: a checkpoint or pack directory, a GGUF file, the name of a model in the library, or `demo` for the
                embedded default model.
            drafter: proposes tokens, at most `draft_tokens` per sequence and step, whether or not that pays;
                `speculate` has drafters of the engine's own, which propose while it does.
            progress: called with the progress of startup.
            observe_routes: called with (layer, expert_ids [tokens, k]) in every step. Routing can reveal text: keep it
                private. Every step stops at every layer to call it; a recorder costs next to nothing.
            recorder: opens a recorder that receives the choices of all steps, several steps at a time; not called for
                a model without routed experts, or whose layers choose different numbers of them. With a recorder, the
                user's cache also keeps the drive's rate.
            experts: other processes that also run experts, such as a `cluster.Group`; it serves only this engine.
            options: see `EngineOptions`.

        Raises:
            UsageError: several models match, or a setting is invalid.
            DoesNotFit, CheckpointError and related errors: see `errors`.
        """
        files = open_files(locate_model(model, progress), mmproj=options.get("mmproj"))
        return cls(
            files,
            configure(model, files, progress, **options),
            drafter=drafter,
            progress=progress,
            observe_routes=observe_routes,
            recorder=recorder,
            experts=experts,
        )
