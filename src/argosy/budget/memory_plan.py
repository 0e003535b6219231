"""The division of a memory budget: `planner.py` decides it; tables, JSON and errors show it.

    budget = process + dense weights + adapters + KV cache + recurrent state + replay + requests + routing + group
             + n-gram tables + working buffers + staging + expert records + page tables + expert cache

`MemoryPlan.parts` is the one list of what the budget pays for: totals, tables and JSON all come from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from argosy.budget.footprint import KvLayout, kv_blocks
from argosy.config import (
    CLAIMED,
    KV_BLOCK_TOKENS,
    EngineConfig,
    ExpertSlots,
    KvDtype,
)
from argosy.kept.kv_windows import WindowSizes
from argosy.model.model import ModelSizes

KV_PARTS = 32  # idle memory of the KV cache is lent and returned in this many parts
SMALLEST_CONTEXT = 512


class Part(NamedTuple):
    """One part of the budget."""

    key: str  # name in JSON
    label: str
    nbytes: int
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """How the budget is divided, in bytes."""

    budget_bytes: int
    process_bytes: int
    dense_bytes: int
    adapter_fixed_bytes: int = 0  # of adapters, without the parts in slots of experts
    encoder_bytes: int = 0  # towers and ears, one encode each, and the processes that decode files
    kv_bytes: int
    kv_layout: KvLayout
    kv_dtype: KvDtype
    windows: WindowSizes | None = None  # blocks of layers with a sliding window; None: as for others
    state_bytes: int = 0  # recurrent state for num_states sequences
    num_states: int = 0
    snapshot_bytes: int = 0  # recurrent states kept at the end of prefixes
    num_snapshots: int = 0
    claimed: Mapping[str, int] = field(default_factory=dict)  # bytes by part of `CLAIMED`
    table_bytes: int = 0  # cached rows of n-gram tables, and rows that land
    table_cache_bytes: int = 0  # the part of each table's that is cached rows
    working_bytes: int
    staging_bytes: int  # buffers that readers transcode from
    bookkeeping_bytes: int  # the place and last use of each expert
    page_table_bytes: int = 0  # kernel page tables for everything mapped after the plan
    resident_bytes: int  # all experts, packed end to end
    slots: ExpertSlots
    idle_buffer_bytes: int = 0  # the part of `working_bytes` that steps without prompt tokens leave idle
    context_tokens: int
    chunk_tokens: int
    held_bytes: int = 0  # the part of `process_bytes` that was already in memory

    @property
    def expert_bytes(self) -> int:
        slots = self.slots
        return self.resident_bytes if slots.is_packed else slots.own * (slots.slot_bytes - slots.part_bytes)

    @property
    def adapter_bytes(self) -> int:
        return self.adapter_fixed_bytes + self.slots.own * self.slots.part_bytes

    @property
    def total_bytes(self) -> int:
        return sum(self._sizes().values())

    @property
    def left_bytes(self) -> int:
        """The rest of the budget after all parts; below zero if the plan does not fit."""
        return self.budget_bytes - self.total_bytes

    def slots_in_decode(self, num_tokens: int | None = None) -> int:
        """Return the likely number of expert slots during decode, while sequences hold `num_tokens` in all.

        Args:
            num_tokens: None: half of the context.
        """
        if num_tokens is None:
            num_tokens = self.context_tokens // 2
        part = -(-kv_blocks(self.context_tokens) // KV_PARTS) * KV_BLOCK_TOKENS
        used_tokens = min(self.context_tokens, -(-num_tokens // part) * part)
        layout = self.kv_layout
        idle_bytes = self.idle_buffer_bytes
        idle_bytes += max(0, layout.free_bytes(used_tokens) - layout.free_bytes(self.context_tokens))
        return self.slots.without_media + min(self.slots.idle, self.slots.fitting(idle_bytes))

    def model_sizes(self, config: EngineConfig, *, most_experts: int = 0) -> ModelSizes:
        """The model's share of this plan, with addresses for `most_experts` in memory."""
        return ModelSizes(
            kv_blocks=kv_blocks(self.context_tokens),
            kv_dtype=self.kv_dtype,
            step_tokens=self.chunk_tokens + config.decode_tokens,
            num_states=self.num_states * slots_per_state(config) + self.num_snapshots,
            window_blocks=None if self.windows is None else self.windows.num_window_blocks,
            slots=None if self.slots.is_packed else self.slots,
            most_experts=most_experts,
            table_cache_bytes=self.table_cache_bytes,
        )

    def _sizes(self) -> dict[str, int]:
        """The bytes of all parts, by their names in JSON, in the order of their claims; plans are compared often."""
        return {
            "process_bytes": self.process_bytes,
            "dense_bytes": self.dense_bytes,
            "adapter_bytes": self.adapter_bytes,
            "encoder_bytes": self.encoder_bytes,
            "kv_bytes": self.kv_bytes,
            "recurrent_state_bytes": self.state_bytes,
            "snapshot_bytes": self.snapshot_bytes,
            **{key: self.claimed.get(key, 0) for key in CLAIMED},
            "table_bytes": self.table_bytes,
            "working_bytes": self.working_bytes,
            "staging_bytes": self.staging_bytes,
            "expert_record_bytes": self.bookkeeping_bytes,
            "page_table_bytes": self.page_table_bytes,
            "expert_cache_bytes": self.expert_bytes,
        }

    def parts(self) -> list[Part]:
        """All parts of the budget, in the order of their claims."""
        slots = self.slots
        experts = f"{slots.own} of {slots.num_experts} experts ({slots.own_percent:.0f} %)"
        if slots.lent:
            experts += f", {slots.without_media} while there are no pictures or sounds"
        if slots.idle:
            experts += f", up to {slots.reachable} in idle memory"
        context = f"{self.context_tokens} tokens in {self.kv_dtype}"
        if self.windows is not None:
            context += f", {self.windows.num_window_blocks * KV_BLOCK_TOKENS} in layers with a window"
        texts = {
            "process_bytes": ("process", "interpreter, libraries, tokenizer"),
            "dense_bytes": ("dense weights", ""),
            "adapter_bytes": ("adapters", "pairs, and parts of the experts in memory"),
            "encoder_bytes": ("pictures, sound", "encoders, and decoding of files"),
            "kv_bytes": ("KV cache", context),
            "recurrent_state_bytes": ("recurrent state", f"{self.num_states} sequences at once"),
            "snapshot_bytes": ("state snapshots", f"{self.num_snapshots} prompt prefixes"),
            **CLAIMED,
            "table_bytes": (
                "n-gram tables",
                "rows in memory, and rows that land; the others stay on the drive",
            ),
            "working_bytes": ("working buffers", f"{self.chunk_tokens} tokens a step"),
            "staging_bytes": ("staging", "buffers for transcoding"),
            "expert_record_bytes": ("expert records", "location and uses of each expert"),
            "page_table_bytes": ("page tables", "1/512 of mapped memory, in the kernel"),
            "expert_cache_bytes": ("expert cache", experts),
        }
        return [Part(key, texts[key][0], nbytes, texts[key][1]) for key, nbytes in self._sizes().items()]

    def lines(self) -> list[tuple[str, int, str]]:
        """(label, bytes, note) of every part that is not empty, in the order of their claims."""
        shown = (
            part
            for part in self.parts()
            if part.nbytes or (part.key == "expert_cache_bytes" and self.slots.num_experts)
        )
        return [(part.label, part.nbytes, part.note) for part in shown]

    def as_dict(self) -> dict[str, int]:
        return {
            "budget_bytes": self.budget_bytes,
            "total_bytes": self.total_bytes,
            **{part.key: part.nbytes for part in self.parts()},
            "expert_slots": self.slots.own,
            "lent_expert_slots": self.slots.lent,
            "idle_expert_slots": self.slots.idle,
            "experts": self.slots.num_experts,
            "context_tokens": self.context_tokens,
            "chunk_tokens": self.chunk_tokens,
        }


def slots_per_state(config: EngineConfig) -> int:
    """Return the slots of the recurrent state per sequence: with proposals, a second slot restores a rejected one."""
    return 2 if config.draft_tokens else 1
