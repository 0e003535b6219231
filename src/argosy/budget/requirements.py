"""Check that the machine allows what an engine needs before it starts: memory, and address space.

Elsewhere: `planner.py` divides the budget; `machine/resources.py` reads the limits.
"""

from __future__ import annotations

from contextlib import suppress

from argosy.budget.allowances import OTHER_THREADS
from argosy.budget.footprint import ModelFootprint
from argosy.budget.planner import plan_with_media
from argosy.config import (
    MIB,
    EngineConfig,
    format_bytes,
)
from argosy.errors import DoesNotFit
from argosy.machine import resources
from argosy.machine.resources import held_bytes
from argosy.prompt.tokenizer import TOKENIZER_FILE

TOKENIZER_ROOM_BYTES = 256 * MIB  # stays free if experts are read before the tokenizer is measured
_TOKENIZER_BYTES_PER_BYTE = 32  # per byte of tokenizer.json while it is read: 20 to 26 measured
_MALLOC_ARENA_BYTES = 64 * MIB  # address space that glibc reserves for each thread that allocates


def require_mappable(footprint: ModelFootprint, config: EngineConfig) -> None:
    """Check that `ulimit` leaves enough address space for the engine before it maps anything.

    Otherwise a failed allocation would end the process silently, inside the library that reads tokenizers.

    Raises:
        DoesNotFit: the address space is too small, or no plan fits.
    """
    limits = (resources.address_space_limit(), resources.data_limit())
    if limits == (None, None):
        return
    held = held_bytes()
    _, plan = plan_with_media(footprint, config, process_bytes=held)
    tokenizer_file = footprint.files.path / TOKENIZER_FILE
    json_bytes = tokenizer_file.stat().st_size if tokenizer_file.is_file() else 0
    stacks = (config.threads + config.readers + OTHER_THREADS) * resources.thread_stack_bytes()
    others = stacks + max(TOKENIZER_ROOM_BYTES, json_bytes * _TOKENIZER_BYTES_PER_BYTE)
    # glibc's reservation counts as address space at once, and as data only when it is used.
    reserved = (config.readers + OTHER_THREADS // 2) * _MALLOC_ARENA_BYTES
    for limit, beside in zip(limits, (others + reserved, others), strict=True):
        if limit is None:
            continue
        left = limit.limit_bytes - limit.mapped_bytes
        needed = plan.total_bytes - held + beside
        if needed <= left:
            continue
        hint = f"`{limit.command} unlimited` lifts the limit"
        if (most := left - beside + held) > plan.total_bytes - plan.expert_bytes:
            hint += f"; or `--memory {most // MIB}MiB` maps less"
        raise DoesNotFit(
            f"`{limit.command}` lets this process map {format_bytes(limit.limit_bytes)}, it has mapped "
            f"{format_bytes(limit.mapped_bytes)}, and needs up to {format_bytes(needed)} more",
            hint=hint,
            needed_bytes=limit.mapped_bytes + needed,
            budget_bytes=limit.limit_bytes,
        )


def require_memory(footprint: ModelFootprint, config: EngineConfig) -> None:
    """Check that the machine has the memory that the plan uses; a larger budget is fine if the model leaves some
    unused.

    Raises:
        DoesNotFit: the machine has less.
    """
    limit = resources.memory_limit()
    if config.budget.ram_bytes <= limit.total_bytes:
        return
    planned = None
    with suppress(DoesNotFit):  # raised with better numbers when the tokenizer has been measured
        _, planned = plan_with_media(footprint, config, process_bytes=held_bytes())
    if planned is not None and planned.total_bytes > limit.total_bytes:
        raise DoesNotFit(
            f"needs {format_bytes(planned.total_bytes)} of the budget of {format_bytes(config.budget.ram_bytes)}, and "
            f"there are {format_bytes(limit.total_bytes)} ({limit.source})",
            hint=f"`--memory {resources.default_budget(limit)[0] // MIB}MiB` is what is free, less a margin",
            needed_bytes=planned.total_bytes,
            budget_bytes=limit.total_bytes,
        )


def machine_bytes() -> int:
    """Return the memory that the machine and the cgroups of this process allow."""
    return resources.memory_limit().total_bytes


def require_budget(budget_bytes: int) -> None:
    """Check that the machine has the memory of the budget.

    Raises:
        DoesNotFit: the machine has less.
    """
    limit = resources.memory_limit()
    if budget_bytes > limit.total_bytes:
        raise DoesNotFit(
            f"the budget is {format_bytes(budget_bytes)}, and there are {format_bytes(limit.total_bytes)} "
            f"({limit.source})",
            hint=f"`--memory {resources.default_budget(limit)[0] // MIB}MiB` is what is free, less a margin",
            needed_bytes=budget_bytes,
            budget_bytes=limit.total_bytes,
        )


def require_machine(budget_bytes: int) -> None:
    """Check that this machine has the budget that several models share.

    Raises:
        DoesNotFit: the machine has less memory, or `ulimit` bounds the address space, of which each model reserves as
            much as it could have alone.
    """
    require_budget(budget_bytes)
    for bound in (resources.address_space_limit(), resources.data_limit()):
        if bound is not None:
            raise DoesNotFit(
                f"several models reserve more address space than they use, and `{bound.command}` lets this process map "
                f"{format_bytes(bound.limit_bytes)}",
                hint=f"`{bound.command} unlimited` lifts the limit",
                needed_bytes=budget_bytes,
                budget_bytes=bound.limit_bytes,
            )
