"""Explain why a budget is too small, what fits instead, and which settings make a plan smaller."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple, get_args

from argosy.budget.allowances import PROCESS_VARIES_BYTES
from argosy.budget.footprint import ModelFootprint
from argosy.budget.memory_plan import SMALLEST_CONTEXT, MemoryPlan
from argosy.config import (
    MIB,
    EngineConfig,
    KvDtype,
    format_bytes,
)
from argosy.errors import DoesNotFit

# The best plan in a budget, or None; and the smallest plan.
Search = Callable[[ModelFootprint, EngineConfig], tuple[MemoryPlan | None, MemoryPlan]]


def too_small_now(least: MemoryPlan) -> DoesNotFit:
    parts = "  +  ".join(f"{part.label} {format_bytes(part.nbytes)}" for part in least.parts() if part.nbytes)
    return DoesNotFit(
        f"needs {format_bytes(least.total_bytes, rounds_up=True)} of memory now, and the budget would be "
        f"{format_bytes(least.budget_bytes)}\n  {parts}",
        hint=f"{in_mib(least.total_bytes)} works; KV blocks of answers that run or wait cannot leave",
        needed_bytes=least.total_bytes,
        budget_bytes=least.budget_bytes,
        plan=least.as_dict(),
    )


def does_not_fit(
    floor: MemoryPlan, footprint: ModelFootprint, config: EngineConfig, search: Search
) -> DoesNotFit:
    from argosy.checkpoint.pack_contents import smaller_formats

    needed, budget = floor.total_bytes, config.budget.ram_bytes
    described = [
        f"{'smallest expert cache' if part.key == 'expert_cache_bytes' else part.label} {format_bytes(part.nbytes)}"
        + (f" ({part.note})" if part.key == "kv_bytes" else "")
        for part in floor.parts()
        if part.nbytes
    ]
    parts = "  " + "  +  ".join(described)
    hints = [f"`--memory {in_mib(needed)}` works"]
    if (remedy := _what_helps(footprint, config, search, needed)) is not None:
        hints.append(remedy)
    if smaller := smaller_formats(footprint.files):
        options = " or ".join((f"`argosy pack --format {smaller[0]}`", *smaller[1:]))
        weights = "dense weights and experts" if footprint.files.experts else "the weights"
        hints.append(f"{options} makes {weights} smaller")
    return DoesNotFit(
        f"needs {format_bytes(needed, rounds_up=True)} of memory, and the budget is {format_bytes(budget)}\n{parts}",
        hint="; ".join(hints),
        needed_bytes=needed,
        budget_bytes=budget,
        plan=replace(floor, budget_bytes=budget).as_dict(),
    )


def in_mib(needed_bytes: int) -> str:
    """Format a budget of at least `needed_bytes` as an option's value."""
    return f"{-(-(needed_bytes + PROCESS_VARIES_BYTES) // MIB)}MiB"


class _Remedy(NamedTuple):
    """An option that makes a plan smaller, and its effect."""

    option: str
    apply: Callable[[ModelFootprint, EngineConfig], tuple[ModelFootprint, EngineConfig]]


def _remedies(footprint: ModelFootprint, config: EngineConfig) -> list[list[_Remedy]]:
    """Return options that make a plan smaller, one list for each kind, the gentlest first."""
    kinds: list[list[_Remedy]] = []
    formats = get_args(KvDtype)
    if smaller := formats[formats.index(footprint.kv_dtype) + 1 :]:
        kinds.append([_Remedy(f"--kv {kv_dtype}", partial(_with_kv, kv_dtype)) for kv_dtype in smaller])
    if (context := config.budget.context_tokens or 0) > SMALLEST_CONTEXT:
        shorter = []
        while context > SMALLEST_CONTEXT:
            context = max(SMALLEST_CONTEXT, context // 2)
            shorter.append(_Remedy(f"--context {context}", partial(_with_context, context)))
        kinds.append(shorter)
    if footprint.encoder_bytes:
        fault = DoesNotFit("the memory budget has no room for pictures and sound")
        kinds.append([_Remedy("--no-media", lambda model, config: (model.without_media(fault), config))])
    return kinds


def _with_kv(
    kv_dtype: KvDtype, footprint: ModelFootprint, config: EngineConfig
) -> tuple[ModelFootprint, EngineConfig]:
    return footprint.with_kv(kv_dtype), config


def _with_context(
    context: int, footprint: ModelFootprint, config: EngineConfig
) -> tuple[ModelFootprint, EngineConfig]:
    return footprint, replace(config, budget=replace(config.budget, context_tokens=context))


def _what_helps(
    footprint: ModelFootprint, config: EngineConfig, search: Search, needed_bytes: int
) -> str | None:
    """Return the options with which the budget suffices, or otherwise the smallest budget with all options."""
    kinds = _remedies(footprint, config)
    fitting = []
    for kind in kinds:
        for remedy in kind:
            best, _ = search(*remedy.apply(footprint, config))
            if best is not None:
                fitting.append(f"`{remedy.option}`")
                break
    if fitting:
        return f"this budget is enough with {' or with '.join(fitting)}"
    if not kinds:
        return None
    for kind in kinds:
        footprint, config = kind[-1].apply(footprint, config)
    together = " ".join(kind[-1].option for kind in kinds)
    best, least = search(footprint, config)
    if best is not None:
        return f"this budget is enough with `{together}`"
    smallest = in_mib(least.total_bytes)
    return None if smallest == in_mib(needed_bytes) else f"`--memory {smallest} {together}` is the least"
