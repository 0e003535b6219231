"""Forecast from headers and a machine's rates whether a model fits a budget, how fast it runs and what limits it.

    ModelFiles + EngineConfig  ->  memory plan at any budget   (budget/planner.py)
    memory plan + WorkingSet + Rates  ->  decode, prompts, the knee   (forecast/speed.py)

Elsewhere: `cli/commands/plan_facts.py` prints it; `forecast/money.py` prices it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from argosy.budget.footprint import ModelFootprint
from argosy.budget.memory_plan import MemoryPlan
from argosy.budget.planner import plan_memory, plan_with_media
from argosy.checkpoint.files import ModelFiles
from argosy.config import KV_BLOCK_TOKENS, Budget, EngineConfig, ModelConfig
from argosy.errors import ArgosyError, BadMedia, DoesNotFit
from argosy.experts.hit_rate import WorkingSet
from argosy.forecast.group import GroupForecast, Network, predict_group
from argosy.forecast.simulation import SimulatedServer
from argosy.forecast.speed import (
    DecodeForecast,
    PictureForecast,
    PromptForecast,
    predict_decode,
    predict_picture,
    predict_prompt,
)
from argosy.forecast.step_times import StepTimes, tabulate
from argosy.machine.rates import Rates
from argosy.machine.resources import PROCESS_GROWTH_BYTES, page_table_bytes
from argosy.media.parts import Kind
from argosy.model.work import Work, work_of

Verdict = Literal["no", "thrashes", "streams", "resident"]

PROMPT_TOKENS = (64, 1024, 16_384)  # a question, a page or two, a long document
PICTURE_WIDTH, PICTURE_HEIGHT = 1024, 768  # the picture for which the first token is predicted
_PICTURE_TEXT_TOKENS = 32  # the question that goes with it
_NEAR_ALL = 0.9  # the knee: this fraction of the speed with every expert in memory
_NUM_BUDGETS = 16  # on a curve
# What a process holds before it loads a model and its tokenizer: interpreter, libraries, chat templates.
BARE_PROCESS_BYTES = 60 << 20
_TOKENIZER_BYTES_PER_BYTE = 16  # in memory once a tokenizer.json is read; 20 was measured with a small one
_JSON_BYTES_PER_TOKEN = 70  # a vocabulary and its merges


@dataclass(frozen=True, slots=True)
class Point:
    """Decode speed of one sequence at one budget."""

    budget_bytes: int
    num_slots: int
    tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """How a model fits a budget on a machine, and how fast it runs.

    plan: None if it does not fit; then `refusal` says why, and the fields below it are unknown.
    smallest_bytes: the smallest budget that works, with the requested context or, failing that, a short one.
    longer_prompts: requested prompt lengths that exceed the context, in tokens.
    picture: None if the model takes no pictures, the budget has no room for them, or their processor is unknown.
    knee_bytes: the smallest budget with nine tenths of the speed with all experts in memory.
    expert_slots: experts in memory, if the settings fix their number regardless of the budget.
    is_text_only: it takes pictures or sound, but the budget has no room for them.
    """

    verdict: Verdict
    plan: MemoryPlan | None
    refusal: DoesNotFit | None
    smallest_bytes: int
    resident_bytes: int  # the smallest budget with every expert in memory, at the same context
    work: Work
    rates: Rates
    working_set: WorkingSet
    decode: tuple[DecodeForecast, ...] = ()
    prompts: tuple[PromptForecast, ...] = ()
    longer_prompts: tuple[int, ...] = ()
    picture: PictureForecast | None = None
    curve: tuple[Point, ...] = ()
    knee_bytes: int | None = None
    expert_slots: int | None = None
    is_text_only: bool = False


class Speeds:
    """Predicts one model's decode and prompts on one machine, for any memory plan.

    Args:
        working_set: None: one typical of such models.
    """

    def __init__(
        self, model: ModelConfig, work: Work, rates: Rates, working_set: WorkingSet | None = None
    ) -> None:
        self.work, self.rates = work, rates
        self.working_set = working_set or WorkingSet.prior(
            model.moe_layers,
            num_experts=max(1, model.num_experts),
            experts_per_token=max(1, round(model.mean_experts_per_token)),
        )

    def decode(
        self, plan: MemoryPlan, streams: int, *, context: int | None = None, hit_rate: float | None = None
    ) -> DecodeForecast:
        """Predict decode for a plan.

        Args:
            context: positions of each sequence; None: half of an equal share of the KV cache.
            hit_rate: a measured one; None: the working set predicts it.
        """
        each = plan.context_tokens // streams // 2 if context is None else context
        return predict_decode(
            self.work,
            self.rates,
            self.working_set,
            num_slots=plan.slots_in_decode(streams * each),
            context=each,
            streams=streams,
            hit_rate=hit_rate,
        )

    def prompt(self, plan: MemoryPlan, num_tokens: int) -> PromptForecast:
        return predict_prompt(
            self.work,
            self.rates,
            self.working_set,
            num_slots=plan.slots.without_media,
            num_tokens=num_tokens,
            chunk_tokens=plan.chunk_tokens,
        )


class Forecaster(Speeds):
    """Forecasts one model on one machine. It sums over experts only once, so use one for all budgets.

    Args:
        config: the engine's settings; the budget is replaced. Settings that fix the number of experts in memory
            apply to the requested budget but not to those it is compared with.
        process_bytes: the size of the process that will run it, before weights.
    """

    def __init__(
        self,
        files: ModelFiles,
        config: EngineConfig,
        rates: Rates,
        *,
        working_set: WorkingSet | None = None,
        process_bytes: int,
    ) -> None:
        self._footprint = ModelFootprint(files, config)
        super().__init__(files.config, work_of(files, self._footprint.kv_dtype, config), rates, working_set)
        self.config = config
        self._flexible = replace(config, expert_slots=None)
        self._process_bytes = process_bytes
        self._model = files.config

    @property
    def media_kinds(self) -> list[Kind]:
        """The media that a prompt may contain."""
        return [kind for kind, one in self._footprint.processors.items() if not isinstance(one, ArgosyError)]

    def plan(self, budget_bytes: int) -> MemoryPlan:
        """The memory plan of a budget.

        Raises:
            DoesNotFit: it is below the floor.
        """
        return self._plan(self.config, budget_bytes)

    def engine_options(self, plan: MemoryPlan) -> dict[str, Any]:
        """Options of `Engine.open` with which an engine makes the same plan."""
        return {
            "memory": plan.budget_bytes,
            "context": plan.context_tokens,
            "expert_slots": self.config.expert_slots,
            "chunk_tokens": self.config.chunk_tokens,
        }

    def _plan(self, config: EngineConfig, budget_bytes: int) -> MemoryPlan:
        config = replace(config, budget=replace(config.budget, ram_bytes=budget_bytes))
        _, plan = plan_with_media(self._footprint, config, process_bytes=self._process_bytes)
        return plan

    def forecast(
        self,
        budget_bytes: int,
        *,
        streams: Sequence[int] = (1,),
        prompts: Sequence[int] = PROMPT_TOKENS,
        with_curve: bool = True,
    ) -> Forecast:
        """Forecast everything for one budget. Decode is predicted at half the context, the average over a long
        conversation.
        """
        smallest = self._smallest_bytes()
        plan, refusal = None, None
        try:
            plan = self.plan(budget_bytes)
        except DoesNotFit as error:
            refusal = error
        resident = self._resident_bytes(plan)
        found = Forecast(
            verdict="no",
            plan=plan,
            refusal=refusal,
            smallest_bytes=smallest,
            resident_bytes=resident,
            work=self.work,
            rates=self.rates,
            working_set=self.working_set,
            expert_slots=self.config.expert_slots,
        )
        if with_curve:
            curve = tuple(self._curve(smallest, resident))
            enough = _NEAR_ALL * curve[-1].tokens_per_s
            knee = next(point.budget_bytes for point in curve if point.tokens_per_s >= enough)
            found = replace(found, curve=curve, knee_bytes=knee)
        if plan is None:
            return found
        return replace(
            found,
            verdict=verdict_of(plan, self._model),
            is_text_only=bool(self._footprint.encoder_bytes) and not plan.encoder_bytes,
            decode=tuple(self.decode(plan, count) for count in streams),
            prompts=tuple(self.prompt(plan, length) for length in prompts if length < plan.context_tokens),
            longer_prompts=tuple(length for length in prompts if length >= plan.context_tokens),
            picture=self.picture(plan),
        )

    def picture(
        self, plan: MemoryPlan, *, width: int = PICTURE_WIDTH, height: int = PICTURE_HEIGHT
    ) -> PictureForecast | None:
        """Predict a short question about one picture; None if the plan takes no pictures."""
        if not plan.encoder_bytes:
            return None
        try:
            found = self._footprint.picture_work(height, width)
        except BadMedia:
            return None
        if found is None or found[0] + _PICTURE_TEXT_TOKENS >= plan.context_tokens:
            return None
        num_positions, flop = found
        return predict_picture(
            self.work,
            self.rates,
            self.working_set,
            width=width,
            height=height,
            num_positions=num_positions,
            flop=flop,
            num_text_tokens=_PICTURE_TEXT_TOKENS,
            num_slots=plan.slots.own,
            chunk_tokens=plan.chunk_tokens,
        )

    def group(self, plan: MemoryPlan, num_machines: int, network: Network) -> GroupForecast:
        """Predict decode of one sequence by equal machines: one as planned, the others with experts only."""
        others = plan.budget_bytes - BARE_PROCESS_BYTES - PROCESS_GROWTH_BYTES - plan.staging_bytes
        others -= page_table_bytes(others)
        num_slots = plan.slots.own + (num_machines - 1) * max(0, plan.slots.fitting(others))
        return predict_group(
            self.work,
            self.rates,
            self.working_set,
            num_machines=num_machines,
            num_slots=min(num_slots, plan.slots.num_experts),
            hidden_size=self._model.expert_hidden,
            network=network,
            context=plan.context_tokens // 2,
        )

    def servers(self, plan: MemoryPlan) -> tuple[SimulatedServer, SimulatedServer, SimulatedServer]:
        """A fast, a likely and a slow server with that plan."""
        at_once, num_slots = self.config.max_sequences, plan.slots_in_decode()
        if plan.num_states:
            at_once = min(at_once, plan.num_states)
        fast, likely, slow = tabulate(
            self.work, self.rates, self.working_set, num_slots=num_slots, most_streams=at_once,
            chunk_tokens=plan.chunk_tokens, context_tokens=plan.context_tokens,
        )  # fmt: skip

        def server(times: StepTimes) -> SimulatedServer:
            return SimulatedServer(
                step_times=times,
                chunk_tokens=plan.chunk_tokens,
                max_sequences=at_once,
                max_waiting=self.config.max_waiting,
                context_tokens=plan.context_tokens,
                block_tokens=KV_BLOCK_TOKENS,
            )

        return server(fast), server(likely), server(slow)

    def _smallest_bytes(self) -> int:
        needed = 1
        while True:  # a larger budget keeps more rows of tables, a small part of it
            try:
                self._plan(self._flexible, needed)
            except DoesNotFit as refusal:
                more = refusal.facts["needed_bytes"]
                assert isinstance(more, int)
                needed = more
            else:
                return needed

    def _resident_bytes(self, plan: MemoryPlan | None) -> int:
        """The bytes that the model takes with every expert in memory and the context of `plan`."""
        context = self.config.budget.context_tokens or (plan.context_tokens if plan else None)

        def total(budget_bytes: int) -> int:
            budget = Budget(ram_bytes=budget_bytes, context_tokens=context)
            everything = replace(self._flexible, budget=budget)
            return plan_memory(self._footprint, everything, process_bytes=self._process_bytes).total_bytes

        found = total(1 << 60)
        while self._footprint.files.tables and (less := total(found)) < found:  # with fewer rows of tables
            found = less
        return found

    def _curve(self, smallest: int, resident: int) -> list[Point]:
        points = []
        between = (
            round(smallest * (resident / smallest) ** (number / _NUM_BUDGETS))
            for number in range(1, _NUM_BUDGETS)
        )
        for budget in (smallest, *between, resident):
            plan = self._plan(self._flexible, budget)
            speed = self.decode(plan, 1, context=min(1024, plan.context_tokens // 2)).tokens_per_s.likely
            points.append(Point(budget, plan.slots.own, speed))
        return points


def verdict_of(plan: MemoryPlan, model: ModelConfig) -> Verdict:
    """How a model runs in a plan; `thrashes` means that one token's experts are evicted before the next token."""
    if plan.slots.is_resident:
        return "resident"
    one_token = sum(map(model.chosen_in, model.moe_layers))
    return "streams" if plan.slots.without_media >= one_token else "thrashes"


def tokenizer_bytes(json_bytes: int, vocab_size: int) -> int:
    """The likely memory of an absent tokenizer, from the size of its file, or otherwise of its vocabulary."""
    return _TOKENIZER_BYTES_PER_BYTE * (json_bytes or _JSON_BYTES_PER_TOKEN * vocab_size)
