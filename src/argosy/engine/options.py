"""From the keywords of `Engine.open` to the complete settings for one model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from argosy import _native
from argosy.budget.planner import RESIDENT_CHUNK, SMALLEST_CHUNK
from argosy.checkpoint.files import ModelFiles
from argosy.config import (
    DRAFT_TOKENS,
    Budget,
    Claim,
    EngineConfig,
    EngineOptions,
    KvDir,
    ModelConfig,
    parse_size,
)
from argosy.errors import ArgosyError, UsageError
from argosy.experts.recording import OpenRecorder, RoutingRecorder
from argosy.experts.runner import ExpertGroup
from argosy.machine import resources, tuning


def configure(files: ModelFiles, **options: Unpack[EngineOptions]) -> EngineConfig:
    """Fill in the settings that were left out, for one model; `Engine` runs with them, and `argosy show` plans with
    them.

    Raises:
        UsageError: a setting is invalid, or the requested context is longer than the model supports.
    """
    given: dict[str, Any] = dict(options)
    for name in given:
        if name not in EngineOptions.__annotations__:
            known = ", ".join(EngineOptions.__annotations__)
            raise UsageError(f"unknown option '{name}' of Engine.open; known: {known}")
    memory, context = given.pop("memory", None), given.pop("context", None)
    given.pop("mmproj", None)  # the file belongs to the model, whose files are open
    if (kv_dir := given.get("kv_dir")) is not None and not isinstance(kv_dir, KvDir):
        given["kv_dir"] = KvDir(path=Path(kv_dir))
    columns = given.pop("lora_columns", None)
    if (loras := given.get("loras", ())) or columns:
        from argosy.adapters.wanted import wanted_adapters

        given["loras"] = wanted_adapters(loras, columns)
    if (ears := given.get("ears")) is not None:
        given["ears"] = Path(ears)
    if (watermark := given.get("watermark")) is not None:
        given["watermark"] = Path(watermark)
    given["threads"] = given.get("threads") or tuning.measured_threads(
        given.get("instruction_set"), tune=given.get("tune", True)
    )
    if given.get("speculate") == "auto":
        given["speculate"] = (
            "lookup" if files.draft is None or isinstance(files.draft, ArgosyError) else "mtp"
        )
    if given.get("speculate", "off") != "off":
        given.setdefault("draft_tokens", DRAFT_TOKENS)
    config = EngineConfig.from_mapping({**given, "budget": budget_of(memory, context)})
    require_context(files.config, config.budget.context_tokens)
    least = files.config.experts_per_token
    if config.expert_slots is not None and not files.experts:
        raise UsageError(f"{files.path} has no routed experts, so expert_slots has no meaning")
    if config.expert_slots is not None and config.expert_slots < least:
        raise UsageError(
            f"expert_slots must be at least experts_per_token = {least}, found {config.expert_slots}"
        )
    return config


def with_recorder(
    config: EngineConfig, files: ModelFiles, recorder: OpenRecorder | None
) -> tuple[EngineConfig, RoutingRecorder | None]:
    """Open a recorder of routing, if there is one and the model has something to record, and give it memory.

    Recordings have the same number of choices in every layer, so models whose layers differ have none.
    """
    model = files.config
    is_even = len(set(map(model.chosen_in, model.moe_layers))) == 1
    if recorder is None or not is_even or config.experts_off:
        return config, None
    opened = recorder(files, config)
    return replace(config, claims=(*config.claims, Claim("routing_bytes", opened.nbytes))), opened


def with_group(config: EngineConfig, files: ModelFiles, group: ExpertGroup | None) -> EngineConfig:
    """Give a group of other processes memory, if there is one.

    Raises:
        UsageError: the group has nothing to run.
    """
    if group is None:
        return config
    if not files.experts or config.experts_off:
        raise UsageError(
            f"{files.path} runs without routed experts, so there is nothing for a group of workers to run"
        )
    if config.speculate == "mtp":
        raise UsageError(
            "workers of a group do not have the experts of the layer for multi-token prediction",
            hint="`--speculate lookup` works with a group",
        )
    most_chunk = group.most_rows - config.decode_tokens
    if most_chunk < SMALLEST_CHUNK:
        raise UsageError(
            f"{config.decode_tokens} tokens may decode in a step, and workers take {group.most_rows} at once",
            hint="fewer sequences at once (max_sequences) leave room for prompts",
        )
    chunk_tokens = min(config.chunk_tokens or RESIDENT_CHUNK, most_chunk)
    claims = (*config.claims, Claim("group_bytes", group.nbytes(files)))
    config = replace(config, claims=claims, chunk_tokens=chunk_tokens)
    # An engine that runs no experts here needs no memory for them.
    return config if group.runs_here else replace(config, expert_slots=files.config.experts_per_token)


def require_context(model: ModelConfig, context_tokens: int | None) -> None:
    """Check that the model supports an explicitly requested context.

    Raises:
        UsageError: the model has fewer positions.
    """
    if context_tokens is None or context_tokens <= model.context_tokens:
        return
    beyond = "a longer one needs rope scaling, and max_position_embeddings (context_length in a GGUF) that includes it"
    if any(rope.kind == "dynamic" for rope in model.ropes):
        beyond = "longer ones would need this model's dynamic rope scaling, which is not built in"
    raise UsageError(
        f"a context of {context_tokens} tokens was requested, and the model supports {model.context_tokens}",
        hint=f"`--context {model.context_tokens}` is the longest; {beyond}",
        needed=context_tokens,
        available=model.context_tokens,
    )


def choose_instruction_set(cap: str | None) -> str:
    """Choose the instruction set of a runtime: the best of this processor, or at most `cap`.

    Raises:
        UsageError: this processor does not support it.
    """
    available = _native.instruction_sets()
    if cap is None:
        return available[-1]
    if cap not in available:
        raise UsageError(f"unknown instruction set '{cap}'; this processor has: {', '.join(available)}")
    return cap


def budget_of(memory: str | int | Budget | None, context: int | None) -> Budget:
    """Return the budget for these options; if `memory` is None, free memory less a margin.

    `context` overrides the context of a `Budget`.
    """
    if isinstance(memory, Budget):
        return memory if context is None else replace(memory, context_tokens=context)
    limit = resources.memory_limit()
    if memory is None:
        ram_bytes, _ = resources.default_budget(limit)
    else:
        ram_bytes = parse_size(memory, total_bytes=limit.total_bytes)
    return Budget(ram_bytes=ram_bytes, context_tokens=context)
