"""Models that share one process and one budget: prepared once, then opened and closed as often as needed.

    headers, tokenizer, grammars, chat template  ─ plan ─>  Ready  ─ open ─>  Engine  ─ close ─>  Ready

A `Ready` stays in memory. So a model that cannot run is refused before anything is served, the memory of the process
is measured before any weights are loaded, and opening a model reads only its weights.

Elsewhere: `planner.plan_share` plans; `budget/shares.py` divides the memory that floors leave;
`serve/models/models.py` opens and closes models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

from argosy import _native
from argosy.budget.allowances import TEMPLATE_WORKER_BYTES
from argosy.budget.footprint import ModelFootprint
from argosy.budget.memory_plan import MemoryPlan
from argosy.budget.planner import most_bytes, plan_share, shared_bytes
from argosy.budget.requirements import require_machine
from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.sampling import declared_sampling
from argosy.config import KIB, MIB, Claim, EngineConfig, ModelConfig
from argosy.engine.engine import Engine
from argosy.engine.options import with_recorder
from argosy.engine.start import ProcessShare, Vocabulary
from argosy.engine.turns import Turns
from argosy.errors import ArgosyError, DoesNotFit
from argosy.experts.recording import OpenRecorder
from argosy.experts.resident import Progress
from argosy.kept.prefix_files import forget_files
from argosy.media.parts import Hearing, Kind
from argosy.model.work import Work, work_of
from argosy.prompt.builder import PromptBuilder
from argosy.prompt.prompt import ToolCalling
from argosy.prompt.tokenizer import Tokenizer

_TOKEN_BYTES = 1 * KIB  # bytes per entry of a vocabulary: tokenizer, grammars and template; 690 measured
_READY_BYTES = 16 * MIB  # headers and plan of a model
_BACKGROUND_SHARE = 0.1  # the share of the cores for reading a model while others run


class Ready:
    """A model without its weights.

    Attributes:
        tool_calling: how the model is told about tools.
        variables: the variables of its chat template that callers may set.
        can_infill: whether it was trained to fill in text between two others.
        sampling: how tokens are chosen if a request does not say.
        work: predictions of its speed start from this.

    Args:
        recorder: opens a recorder of its routing, for which the plan has memory; None: nothing is recorded.
    """

    def __init__(
        self,
        name: str,
        files: ModelFiles,
        config: EngineConfig,
        *,
        turns: Turns,
        foreground: _native.Foreground,
        recorder: OpenRecorder | None,
    ) -> None:
        self.name, self.files = name, files
        config = replace(config, expert_slots=None)  # the others decide how many there are
        self.config, _ = with_recorder(config, files, recorder)
        self.footprint = ModelFootprint(self.files, self.config)
        self.sampling = declared_sampling(self.files).overridden(self.config.sampling)
        self.work: Work = work_of(self.files, self.footprint.kv_dtype, self.config)
        self._turns, self._foreground = turns, foreground
        self._vocabulary = Vocabulary.open(self.files, self.config)
        prompts = PromptBuilder(self._vocabulary.tokenizer, vocab_size=self.files.config.vocab_size)
        self.tool_calling: ToolCalling = prompts.tool_calling
        self.variables = prompts.variables
        self.can_infill = prompts.can_infill
        prompts.close()
        self._plan: MemoryPlan | None = None
        self._process_bytes = 0

    def fit(self, process_bytes: int, *, own_bytes: int = 0) -> None:
        """Plan the model in the budget, in a process that takes `process_bytes` besides its models.

        Args:
            own_bytes: bytes of this `Ready` to count in the floor, if the process does not include them.

        Raises:
            DoesNotFit: the budget is too small for this model alone.
        """
        self._process_bytes = process_bytes
        process_bytes += own_bytes
        tokenizer = self._vocabulary.tokenizer
        if tokenizer is not None and tokenizer.chat_template is not None:
            process_bytes += TEMPLATE_WORKER_BYTES
        try:
            self.footprint, self._plan = plan_share(self.footprint, self.config, process_bytes=process_bytes)
        except DoesNotFit as error:
            raise DoesNotFit(f"{self.name} {error.message}", hint=error.hint, **error.facts) from None

    @property
    def model(self) -> ModelConfig:
        return self.files.config

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._vocabulary.tokenizer

    @property
    def plan(self) -> MemoryPlan:
        """The plan with the fewest expert slots."""
        assert self._plan is not None
        return self._plan

    @property
    def floor_bytes(self) -> int:
        """The model's memory with the fewest expert slots, not counting the process."""
        return self.plan.total_bytes - self._process_bytes

    @cached_property
    def most_bytes(self) -> int:
        """The most bytes that the model can use beyond its floor."""
        return most_bytes(self.footprint, self.plan)

    def budget_bytes(self, share_bytes: int) -> int:
        """Return the budget of an engine with `share_bytes` beyond the floor; its plan also counts the
        whole process.
        """
        return self.plan.total_bytes + share_bytes

    @property
    def media_kinds(self) -> tuple[Kind, ...]:
        """The kinds of media that a prompt may contain."""
        found = self.footprint.processors.items()
        return tuple(kind for kind, processor in found if not isinstance(processor, ArgosyError))

    @property
    def hears(self) -> Hearing:
        return "native" if "sound" in self.media_kinds else "none"

    def open(
        self, share_bytes: int, *, progress: Progress | None = None, recorder: OpenRecorder | None = None
    ) -> Engine:
        """Read the weights; the engine begins with `share_bytes` beyond its floor.

        Raises:
            CheckpointError and related errors: a file is damaged or missing.
        """
        share = ProcessShare(
            footprint=self.footprint,
            turns=self._turns,
            foreground=self._foreground,
            vocabulary=self._vocabulary,
            floor=self.plan,
            budget_bytes=self.budget_bytes(share_bytes),
        )
        return Engine(self.files, self.config, progress=progress, recorder=recorder, share=share)

    def close(self, engine: Engine) -> None:
        """Close an engine from `open`, and free its remaining memory."""
        engine.close()
        self._vocabulary.forget_grammars()

    def forget(self, tenant: str) -> None:
        """Delete a tenant's prefix files, while the model is not open."""
        if self.config.kv_dir is not None:
            forget_files(self.config.kv_dir.path, tenant)


class Making:
    """Prepares models that share one process and take turns to step.

    Args:
        process_bytes: memory of the process without models, if models are prepared one by one while others run.
    """

    def __init__(self, recorder: OpenRecorder | None, *, process_bytes: int | None = None) -> None:
        self._recorder, self._process_bytes = recorder, process_bytes
        self._turns = Turns()
        self._foreground: _native.Foreground | None = None

    def ready(self, name: str, files: ModelFiles, config: EngineConfig) -> Ready:
        """Prepare a model. Raises CheckpointError and related errors, and DoesNotFit if `process_bytes` is known."""
        if self._foreground is None:
            share = _BACKGROUND_SHARE * config.threads / config.readers
            self._foreground = _native.Foreground(min(1.0, share))
        model = Ready(
            name, files, config, turns=self._turns, foreground=self._foreground, recorder=self._recorder
        )
        if self._process_bytes is not None:
            model.fit(self._process_bytes, own_bytes=_READY_BYTES + _TOKEN_BYTES * model.model.vocab_size)
        return model


def make_ready(
    models: Sequence[tuple[str, ModelFiles, EngineConfig]],
    *,
    claims: tuple[Claim, ...],
    recorder: OpenRecorder | None,
) -> tuple[list[Ready], int]:
    """Prepare models that share one budget, and plan each of them.

    Args:
        models: the name, the files and the settings of each.
        claims: claims of the server, and of memory that it keeps for all models together.

    Returns:
        The models, and the memory of the process without their floors.

    Raises:
        DoesNotFit: the budget is too small for one of the models alone, or larger than the machine's memory.
        CheckpointError and related errors: a tokenizer cannot be read.
    """
    making = Making(recorder)
    ready = [making.ready(*model) for model in models]
    process_bytes = shared_bytes([model.footprint for model in ready], claims)
    require_machine(ready[0].config.budget.ram_bytes)
    for model in ready:
        model.fit(process_bytes)
    return ready, process_bytes
