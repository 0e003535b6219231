"""Give an engine more or less memory while it runs; steps continue meanwhile, and no token changes.

    another budget  ->  plan  ->  experts leave or arrive, KV blocks go or return  ->  the plan that holds from now on

Before each step, memory that the step needs is taken back from experts. A model that is being loaded while others run
lends them the cores.

Elsewhere: `budget/planner.py` plans; `budget/expert_memory.py` sets the slots; `budget/idle_memory.py` lends memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from time import perf_counter

from argosy import _native
from argosy.budget.expert_memory import OWN, ExpertMemory
from argosy.budget.footprint import kv_blocks
from argosy.budget.idle_memory import KV
from argosy.budget.memory_plan import MemoryPlan
from argosy.budget.planner import adapted, replan, shrunk
from argosy.budget.refusals import too_small_now
from argosy.budget.requirements import require_budget
from argosy.config import MIB, AdapterNeeds, EngineConfig, format_bytes
from argosy.engine.requests import Requests
from argosy.engine.scheduler import Scheduler
from argosy.engine.start import Started, idle_memory, most_experts
from argosy.errors import ArgosyError, DoesNotFit, UsageError
from argosy.model.step import Step


class Resizer:
    """The memory of one engine over time.

    Attributes:
        foreground: held for each step.

    Args:
        before_moving: called before experts move, with the lock.
    """

    def __init__(
        self,
        started: Started,
        config: EngineConfig,
        scheduler: Scheduler,
        requests: Requests,
        *,
        before_moving: Callable[[], None],
    ) -> None:
        self._started, self._config = started, config
        self._scheduler, self._requests = scheduler, requests
        self._before_moving = before_moving
        self._first_plan = self._opened_with = started.first_plan
        self._one_at_a_time = threading.Lock()
        # Applies until no expert slot is free for the first time; None: that time is over, or there are no other
        # engines.
        self._loading = started.foreground
        self.foreground: AbstractContextManager[object] = nullcontext()

    @contextmanager
    def during(self, step: Step) -> Iterator[None]:
        """Context in which the layers of a step run."""
        started = self._started
        if started.idle is not None:
            started.idle.before_step(step.num_tokens, has_prompts=not step.is_decode.all())
        began = perf_counter()
        try:
            with nullcontext() if self._loading is None else self._giving_way(self._loading, step):
                yield
        finally:
            if started.experts is not None:
                started.experts.step_s = perf_counter() - began

    @contextmanager
    def _giving_way(self, loading: _native.Foreground, step: Step) -> Iterator[None]:
        """Lend the cores to other models while prompts wait for reads.

        The first prompts of a model that is loaded while others run read most of its experts. Once no slot is free,
        the model is like any other, and models that are being loaded give way to it.
        """
        if (cache := self._started.model.cache) is not None:
            cache.lent = None if step.is_decode.all() else self._started.turns
        yield
        if cache is None or cache.slots.is_full:
            if cache is not None:
                cache.lent = None
            self._loading, self.foreground = None, loading
            self._started.store.leave_background()

    def resize(self, budget_bytes: int, *, is_share: bool = False) -> MemoryPlan:
        """Change the memory budget. Safe from any thread; steps continue meanwhile.

        Experts leave first, then KV blocks along with the prefixes kept in them. A running answer may have to be
        recomputed, and stays the same. With fewer blocks, new requests have a shorter context. When this returns, the
        system has all memory that the plan gave up. A larger budget brings experts and blocks back. If all experts
        were in memory end to end, the first budget too small for that evicts all of them; they are read again when
        tokens choose them.

        Args:
            is_share: the budget is a share that the caller has divided and compared with the machine's memory. The
                running step is then not interrupted: experts leave after it, a few between two steps.

        Returns:
            The plan for the budget.

        Raises:
            DoesNotFit: the budget is less than the engine needs now, or more than the machine has; nothing changed.
            UsageError: the engine has a fixed number of experts.
        """
        started = self._started
        if self._config.expert_slots is not None:
            raise UsageError("the number of experts in memory is fixed", hint="leave out `expert_slots`")
        if not is_share:
            require_budget(budget_bytes)
        with self._one_at_a_time, nullcontext() if is_share else self._shrinking_early(budget_bytes):
            with started.lock:
                started.require_open()
                try:
                    plan = self._replan(budget_bytes)
                except DoesNotFit:
                    self._undo_shrinking()
                    raise
                self._unpack(plan)
                experts, idle = started.experts, started.idle
                if experts is not None and idle is not None:
                    self._requests.context_tokens = plan.context_tokens
                    self._scheduler.resize_kv(kv_blocks(plan.context_tokens))
                    idle.forget_blocks()
                    experts.slot_bytes = max(1, plan.slots.slot_bytes)
                    experts.most = max(plan.slots.reachable, experts.most)
            if experts is not None and idle is not None:
                experts.allow_between_steps(lambda: {KV: idle.idle_kv_bytes(), OWN: plan.slots.own_bytes})
                experts.most = plan.slots.reachable
            started.plan = plan
            return plan

    def make_room(self, needs: AdapterNeeds) -> None:
        """Have room for these adapters. Safe from any thread: experts leave between two steps.

        Raises:
            DoesNotFit: names the smallest budget that works; nothing changed.
        """
        earlier = self._started.footprint, self._opened_with
        self._adapt(needs)
        try:
            if self._config.expert_slots is None:
                self.resize(self._started.plan.budget_bytes, is_share=True)
            elif (plan := self._opened_with).left_bytes < 0:
                raise too_small_now(plan)
        except BaseException:
            self._started.footprint, self._opened_with = earlier
            raise

    def give_back(self, needs: AdapterNeeds) -> None:
        """Give experts the memory that fewer adapters leave. Call it with the lock, between two steps."""
        self._adapt(needs)
        started = self._started
        if self._config.expert_slots is None:
            started.plan = plan = self._replan(started.plan.budget_bytes)
            if started.experts is not None:
                started.experts.slot_bytes = max(1, plan.slots.slot_bytes)
                started.experts.most = plan.slots.reachable
                started.experts.allow(OWN, plan.slots.own_bytes)

    def _adapt(self, needs: AdapterNeeds) -> None:
        started = self._started
        started.footprint = started.footprint.with_adapters(needs)
        # From the first plan: a plan adapted again and again would lose a slot to rounding each time.
        self._opened_with = adapted(started.footprint, self._config, self._first_plan)

    def _undo_shrinking(self) -> None:
        """Return to experts the memory that the plan gives them: during a step, some may have left or all moved to
        slots.
        """
        started = self._started
        if started.experts is not None:
            if started.plan.slots.is_packed:
                started.plan = self._replan(started.plan.budget_bytes)
            started.experts.allow(OWN, started.plan.slots.own_bytes)

    @contextmanager
    def _shrinking_early(self, budget_bytes: int) -> Iterator[None]:
        """Context in which a running step lets experts leave between two of its layers.

        A prompt's step may take seconds, and a lowered limit does not wait for it.
        """
        started = self._started
        started.require_open()
        decoder = started.model.decoder

        def shrink() -> None:
            decoder.between_layers = None
            with suppress(ArgosyError, MemoryError):  # `resize` raises it, and answers continue
                plan = self._replan(budget_bytes)
                self._unpack(plan)
                if started.experts is not None:
                    started.experts.shrink(OWN, plan.slots.own_bytes)

        decoder.between_layers = shrink
        try:
            yield
        finally:
            decoder.between_layers = None

    def _replan(self, budget_bytes: int) -> MemoryPlan:
        opened, model = self._opened_with, self._started.model
        if model.cache is None:
            if budget_bytes >= opened.total_bytes:
                return replace(opened, budget_bytes=budget_bytes)
            if not model.is_packed:
                raise DoesNotFit(
                    f"needs {format_bytes(opened.total_bytes, rounds_up=True)} of memory, and the budget would be "
                    f"{format_bytes(budget_bytes)}: nothing of it can leave while it runs",
                    hint=f"start again with `--memory {budget_bytes // MIB}MiB`",
                    needed_bytes=opened.total_bytes,
                    budget_bytes=budget_bytes,
                )
        if opened.slots.is_packed:
            opened = shrunk(self._started.footprint, self._config, opened)
        return replan(
            self._started.footprint,
            opened,
            budget_bytes,
            kv_bytes=model.kv.held_bytes,
            fewest_blocks=max(1, self._scheduler.num_blocks_needed),
            most=opened.slots.num_experts if model.cache is None else model.cache.most,
        )

    def _unpack(self, plan: MemoryPlan) -> None:
        """If the experts lie end to end and the plan uses slots, move them to slots. KV blocks stay as they are.

        Call it with the lock, between two steps or layers.
        """
        started = self._started
        model = started.model
        if not model.is_packed or plan.slots.is_packed:
            return
        self._before_moving()
        cache = model.unpack(
            started.store,
            plan.slots,
            most=most_experts(plan.slots),
            look_ahead=self._config.look_ahead,
        )
        started.experts = ExpertMemory(cache, plan.slots, lock=started.lock)
        started.idle = idle_memory(
            started.experts, model, started.cache, started.footprint, self._config, plan
        )
