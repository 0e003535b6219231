"""Divide a memory budget before anything is loaded.

    budget = process + dense weights + KV cache + working buffers + staging + expert cache

Dense weights have the first claim, then the KV cache, then working buffers and what readers transcode from; experts get
the rest, in equal slots, or one behind the other when all of them fit. The budget is the whole process, interpreter
included, so the plan starts from what the process holds now. Below the floor (one token's experts of one layer in
memory) it is refused with the numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from argosy import _native
from argosy.checkpoint.files import ModelFiles
from argosy.config import MIB, EngineConfig, KvDtype, ModelConfig, format_bytes
from argosy.errors import DoesNotFit
from argosy.experts.source import resident_bytes, slot_bytes
from argosy.model.weights import dense_footprint
from argosy.model.workspace import workspace_bytes
from argosy.plan import machine
from argosy.prompt.tokenizer import Tokenizer

KV_BLOCK_TOKENS = 16
PROCESS_GROWTH_BYTES = 24 * MIB  # allocator slack, thread stacks, page tables of the arenas
TEMPLATE_WORKER_BYTES = 24 * MIB  # the process that renders chat templates, while it lives: 22 MiB measured
SMALLEST_CHUNK, SMALLEST_CONTEXT = 16, 512


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Where the budget goes, in bytes."""

    budget_bytes: int
    process_bytes: int
    dense_bytes: int
    kv_bytes: int
    working_bytes: int
    staging_bytes: int  # what readers transcode from
    slot_bytes: int
    resident_bytes: int  # of all experts, one behind the other
    num_slots: int
    num_experts: int  # routed experts of all layers
    context_tokens: int
    chunk_tokens: int

    @property
    def expert_bytes(self) -> int:
        return self.resident_bytes if self.is_resident else self.num_slots * self.slot_bytes

    @property
    def total_bytes(self) -> int:
        fixed = self.process_bytes + self.dense_bytes + self.kv_bytes + self.working_bytes
        return fixed + self.staging_bytes + self.expert_bytes

    @property
    def is_resident(self) -> bool:
        return self.num_slots >= self.num_experts

    def lines(self) -> list[tuple[str, int, str]]:
        """(what, bytes, note) in the order of their claims."""
        share = 100 * self.num_slots / max(1, self.num_experts)
        return [
            ("process", self.process_bytes, "interpreter, libraries, tokenizer"),
            ("dense weights", self.dense_bytes, ""),
            ("KV cache", self.kv_bytes, f"{self.context_tokens} tokens"),
            ("working buffers", self.working_bytes, f"{self.chunk_tokens} tokens a step"),
            *([("staging", self.staging_bytes, "to transcode from")] if self.staging_bytes else []),
            (
                "expert cache",
                self.expert_bytes,
                f"{self.num_slots} of {self.num_experts} experts ({share:.0f} %)",
            ),
        ]

    def as_dict(self) -> dict[str, int]:
        return {
            "budget_bytes": self.budget_bytes,
            "total_bytes": self.total_bytes,
            "process_bytes": self.process_bytes,
            "dense_bytes": self.dense_bytes,
            "kv_bytes": self.kv_bytes,
            "working_bytes": self.working_bytes,
            "staging_bytes": self.staging_bytes,
            "expert_cache_bytes": self.expert_bytes,
            "expert_slots": self.num_slots,
            "experts": self.num_experts,
            "context_tokens": self.context_tokens,
            "chunk_tokens": self.chunk_tokens,
        }


def process_bytes(tokenizer: Tokenizer | None) -> int:
    """What this process holds now, and the worker it will start where the model has a chat template."""
    has_template = tokenizer is not None and tokenizer.chat_template is not None
    return machine.process_footprint().resident_bytes + (TEMPLATE_WORKER_BYTES if has_template else 0)


def has_blocks(files: ModelFiles) -> bool:
    """Whether readers transcode anything of this model."""
    pieces = (piece for record in files.experts.values() for piece in record.pieces)
    return any(ref.block_type for ref in files.dense.values()) or any(piece.transcode for piece in pieces)


def quarter_of_experts(files: ModelFiles) -> int:
    """Slots for a quarter of all routed experts, and no fewer than a token needs: how the demo model is shown."""
    return max(files.config.experts_per_token, len(files.experts) // 4)


def kv_bytes(config: ModelConfig, num_tokens: int, kv_dtype: KvDtype) -> int:
    """Keys and values of so many positions in all layers, in whole blocks."""
    num_blocks = -(-num_tokens // KV_BLOCK_TOKENS)
    return _native.kv_cache_bytes(
        config.num_layers, num_blocks, KV_BLOCK_TOKENS, config.num_kv_heads, config.head_dim, kv_dtype
    )


def plan_memory(
    files: ModelFiles, config: EngineConfig, *, process_bytes: int, expert_slots: int | None = None
) -> MemoryPlan:
    """Plan an engine.

    Context and chunk are shrunk to fit unless they were asked for by name: first the chunk, then the context. With
    `expert_slots` the number of slots is given instead of what is left.

    Raises:
        DoesNotFit: with the smallest budget that works, and what would shrink it.
    """
    model = files.config
    num_experts = len(files.experts)
    one_slot, all_experts = slot_bytes(files.experts), resident_bytes(files.experts)
    staging = config.readers * _native.STAGING_BYTES if has_blocks(files) else 0
    fewest_slots = min(num_experts, model.experts_per_token) if expert_slots is None else expert_slots
    fixed = process_bytes + PROCESS_GROWTH_BYTES
    dense = dense_footprint(files.dense)

    def plan(context: int, chunk: int) -> MemoryPlan:
        kv = kv_bytes(model, context, config.kv_dtype)
        tokens = chunk + config.max_sequences
        working = workspace_bytes(model, tokens, config.threads, context)
        working += 3 * 4 * model.vocab_size * config.max_sequences  # logits, and the sampler's copies of them
        left = config.budget.ram_bytes - fixed - dense - kv - working - staging
        slots = fewest_slots if expert_slots is not None else max(fewest_slots, left // max(1, one_slot))
        if expert_slots is None and left >= all_experts:
            slots = num_experts
        return MemoryPlan(
            budget_bytes=config.budget.ram_bytes,
            process_bytes=fixed,
            dense_bytes=dense,
            kv_bytes=kv,
            working_bytes=working,
            staging_bytes=staging,
            slot_bytes=one_slot,
            resident_bytes=all_experts,
            num_slots=min(num_experts, slots),
            num_experts=num_experts,
            context_tokens=context,
            chunk_tokens=chunk,
        )

    best = None
    for context, chunk in _sizes(model, config):
        candidate = plan(context, chunk)
        if candidate.total_bytes > config.budget.ram_bytes:
            continue
        # The first that fits at all is kept; a smaller one replaces it only while experts have less than a quarter.
        if best is None:
            best = candidate
        if best.num_slots * 4 >= num_experts:
            break
        if candidate.num_slots >= 2 * best.num_slots:
            best = candidate
    if best is not None:
        return best
    context, chunk = list(_sizes(model, config))[-1]
    raise _does_not_fit(plan(context, chunk), config, model)


def _sizes(model: ModelConfig, config: EngineConfig) -> Iterator[tuple[int, int]]:
    """(context, chunk), the most comfortable first."""
    wanted = config.budget.context_tokens
    contexts = [min(wanted, model.context_tokens)] if wanted else []
    if not wanted:
        context = min(model.context_tokens, 8192)
        contexts = [context]
        while context > SMALLEST_CONTEXT:
            context = max(SMALLEST_CONTEXT, context // 2)
            contexts.append(context)
    for context in contexts:
        chunk = min(config.chunk_tokens, context)
        yield context, chunk
        while chunk > SMALLEST_CHUNK:
            chunk = max(SMALLEST_CHUNK, chunk // 2)
            yield context, chunk


def _does_not_fit(floor: MemoryPlan, config: EngineConfig, model: ModelConfig) -> DoesNotFit:
    needed, budget = floor.total_bytes, config.budget.ram_bytes
    parts = (
        f"  process {format_bytes(floor.process_bytes)}  +  dense weights {format_bytes(floor.dense_bytes)}"
        f"  +  KV cache {format_bytes(floor.kv_bytes)} ({floor.context_tokens} tokens)"
        f"  +  working buffers {format_bytes(floor.working_bytes + floor.staging_bytes)}"
        f"  +  smallest expert cache {format_bytes(floor.expert_bytes)}"
    )
    hints = [f"`--memory {-(-needed // MIB)}MiB` is the smallest budget that works"]
    if floor.context_tokens > SMALLEST_CONTEXT:
        saved = floor.kv_bytes - kv_bytes(model, SMALLEST_CONTEXT, config.kv_dtype)
        hints.append(f"`--context {SMALLEST_CONTEXT}` needs about {format_bytes(needed - saved)}")
    if config.kv_dtype == "f32":
        hints.append(f"`--kv f16` needs about {format_bytes(needed - floor.kv_bytes // 2)}")
    hints.append("`argosy pack --format q8` or q4 makes dense weights and experts smaller")
    return DoesNotFit(
        f"needs {format_bytes(needed)} of memory, and the budget is {format_bytes(budget)}\n{parts}",
        hint="; ".join(hints),
        needed_bytes=needed,
        budget_bytes=budget,
        plan=replace(floor, budget_bytes=budget).as_dict(),
    )
