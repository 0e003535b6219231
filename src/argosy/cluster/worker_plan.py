"""Divide a worker's budget: experts get what the process and the connections leave over.

    budget = process + biases + connections + working buffers + staging + expert records + page tables + expert cache

A worker has no tokenizer, no KV cache, and no dense weights except its experts' biases. As in an engine, experts
lie end to end if the whole share fits, and otherwise in equal slots.

Elsewhere: `budget/planner.py` divides an engine's budget; `worker.py` follows this plan.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass

from argosy import _native
from argosy.checkpoint.files import ExpertRecord, ModelFiles
from argosy.checkpoint.landing import MatrixRef
from argosy.checkpoint.shards import ALL_SHARDS, shard_of
from argosy.cluster.hello import MOST_ROWS
from argosy.cluster.secure import BUFFER_BYTES
from argosy.config import ACT_ORDER_FORMATS, AskAhead, ModelConfig, format_bytes
from argosy.errors import DoesNotFit, UsageError
from argosy.experts.files import Key, bookkeeping_bytes, resident_bookkeeping_bytes, resident_bytes
from argosy.experts.slots import lay_out
from argosy.machine.resources import PROCESS_GROWTH_BYTES, THREAD_BYTES, held_bytes, page_table_bytes
from argosy.model.weights import dense_footprint

_OTHER_THREADS = 8  # for accepting, introductions, the ticker and connections


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerPlan:
    """The division of a worker's budget, in bytes. `num_slots` is None if its whole share is resident."""

    budget_bytes: int
    process_bytes: int
    bias_bytes: int
    connection_bytes: int
    working_bytes: int
    staging_bytes: int
    bookkeeping_bytes: int
    page_table_bytes: int
    expert_bytes: int
    slot_bytes: int
    num_slots: int | None
    num_experts: int  # in the share

    @property
    def total_bytes(self) -> int:
        return sum(nbytes for _, nbytes in self.parts())

    def parts(self) -> list[tuple[str, int]]:
        """(label, bytes) of all parts of the budget."""
        return [
            ("process", self.process_bytes),
            ("biases", self.bias_bytes),
            ("connections", self.connection_bytes),
            ("working buffers", self.working_bytes),
            ("staging", self.staging_bytes),
            ("expert records", self.bookkeeping_bytes),
            ("page tables", self.page_table_bytes),
            ("expert cache", self.expert_bytes),
        ]


def share_of(files: ModelFiles, shards: int) -> dict[Key, ExpertRecord]:
    """The experts in a set of shards.

    Raises:
        UsageError: there are none.
    """
    share = {key: record for key, record in files.experts.items() if shards >> shard_of(*key) & 1}
    if not share:
        raise UsageError(
            f"{files.path} has no routed experts in these shards" if files.experts
            else f"{files.path} has no routed experts, so there is nothing for a worker to run"
        )  # fmt: skip
    return share


def num_experts_by_layer(config: ModelConfig) -> list[int]:
    """The number of routed experts in each layer; 0 for a layer without any."""
    routed = set(config.moe_layers)
    return [config.num_experts if layer in routed else 0 for layer in range(config.num_layers)]


def biases_of(files: ModelFiles) -> Mapping[str, MatrixRef]:
    """The dense tensors that experts need, which are their biases."""
    parts = ("gate", "up", "down")
    names = {f"layers.{layer}.expert_{part}_bias" for layer in files.config.moe_layers for part in parts}
    return {name: ref for name, ref in files.dense.items() if name in names}


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """How one worker runs.

    budget_bytes: for the whole process.
    shards: the shards whose experts it runs; bit i stands for shard i.
    num_slots: the size of the expert cache; None: as large as the budget allows.
    disk_bytes_per_s: the rate of the drive, which placement uses; None: measure it at the start.
    most_disk_bytes_per_s: a limit for reads; None for no limit.
    """

    budget_bytes: int
    threads: int | None = None
    readers: int = 4
    instruction_set: str | None = None
    ask_ahead: AskAhead | None = None
    shards: int = ALL_SHARDS
    num_slots: int | None = None
    most_coordinators: int = 2
    disk_bytes_per_s: float | None = None
    most_disk_bytes_per_s: float | None = None
    key: bytes = b""
    tls: ssl.SSLContext | None = None


def instruction_set_of(settings: WorkerSettings) -> str:
    """The instruction set that a worker with these settings uses."""
    return settings.instruction_set or _native.instruction_sets()[-1]


def plan_worker(
    files: ModelFiles, share: Mapping[Key, ExpertRecord], settings: WorkerSettings, threads: int
) -> WorkerPlan:
    """Plan a worker's memory, starting from what the process already holds with the model's headers open.

    Raises:
        DoesNotFit: the budget cannot hold the experts of one token in one layer.
    """
    budget_bytes, process_bytes, num_slots = settings.budget_bytes, held_bytes(), settings.num_slots
    readers, most_coordinators, most_rows = settings.readers, settings.most_coordinators, MOST_ROWS
    config = files.config
    link = _native.worker_link_bytes(
        hidden=config.expert_hidden,
        num_experts=num_experts_by_layer(config),
        most_rows=most_rows,
        most_assignments=most_rows * config.experts_per_token,
    )
    sizes = _native.StackSizes(config.expert_hidden, 0)
    for layer in config.moe_layers:
        sizes.add_routed(config.num_experts, config.chosen_in(layer), config.expert_width_in(layer), 0)
    is_transcoded = any(piece.transcode for record in share.values() for piece in record.pieces)
    has_act_order = any(not ACT_ORDER_FORMATS.isdisjoint(record.formats) for record in share.values())
    biases = biases_of(files)
    growth = PROCESS_GROWTH_BYTES + (threads + readers + _OTHER_THREADS + most_coordinators) * THREAD_BYTES
    layout = lay_out(share, experts_per_token=config.experts_per_token)

    def plan(slots: int | None) -> WorkerPlan:
        if slots is None:
            records, experts = resident_bookkeeping_bytes(share), resident_bytes(share)
        else:
            records = bookkeeping_bytes(share)
            records += layout.bookkeeping_bytes(slots, num_experts=config.num_experts)
            experts = slots * layout.slot_bytes
        parts = {
            "bias_bytes": dense_footprint(biases) if biases else 0,
            "connection_bytes": most_coordinators * (link + (BUFFER_BYTES if settings.tls else 0)),
            "working_bytes": sizes.scratch_bytes(most_rows, threads, has_act_order=has_act_order)
            + sizes.dispatch_bytes(most_rows)
            + _native.product_scratch_bytes(threads, settings.instruction_set),
            "staging_bytes": readers * _native.STAGING_BYTES if is_transcoded else 0,
            "bookkeeping_bytes": records,
            "expert_bytes": experts,
        }
        return WorkerPlan(
            budget_bytes=budget_bytes,
            process_bytes=process_bytes + growth,
            page_table_bytes=page_table_bytes(sum(parts.values())),
            slot_bytes=layout.slot_bytes,
            num_slots=slots,
            num_experts=len(share),
            **parts,
        )

    if num_slots is None and (everything := plan(None)).total_bytes <= budget_bytes:
        return everything
    fewest = min(len(share), config.experts_per_token)
    if num_slots is not None:
        if num_slots < fewest:
            raise UsageError(f"a worker needs at least {fewest} expert slots, found {num_slots}")
        return _fitting(plan(min(num_slots, len(share))))
    least = _fitting(plan(fewest))
    # Start too high, because a slot also needs records and page tables, then remove slots until the plan fits.
    slots = min(len(share), fewest + (budget_bytes - least.total_bytes) // max(1, layout.slot_bytes))
    while slots > fewest and (beyond := plan(slots).total_bytes - budget_bytes) > 0:
        slots = max(fewest, slots - -(-beyond // layout.slot_bytes))
    return plan(slots)


def _fitting(plan: WorkerPlan) -> WorkerPlan:
    if plan.total_bytes <= plan.budget_bytes:
        return plan
    parts = "  +  ".join(f"{label} {format_bytes(nbytes)}" for label, nbytes in plan.parts() if nbytes)
    raise DoesNotFit(
        f"this worker needs {format_bytes(plan.total_bytes, rounds_up=True)} of memory, and the budget is "
        f"{format_bytes(plan.budget_bytes)}\n  {parts}",
        hint=f"`--memory {-(-plan.total_bytes // (1 << 20)) + 2}MiB` works",
        needed_bytes=plan.total_bytes,
        budget_bytes=plan.budget_bytes,
    )
