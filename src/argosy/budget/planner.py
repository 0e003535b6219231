"""Divide a memory budget before anything is loaded, and again while an engine runs.

Dense weights have the first claim. Next come the KV cache, the recurrent state and its snapshots, and the claims of
other parts of the process. Then come working buffers and the staging buffers from which readers transcode. Experts get
the rest: equal slots, or packed end to end when all of them fit. The budget covers the whole process, interpreter
included, so the plan starts from what the process holds now. The kernel charges page tables to the process's cgroup,
so they are planned as well. A budget below the floor (one token's experts of one layer in memory) is refused with the
numbers.

The memory for pictures and sounds is reserved, and lent to experts while there are none (`media_memory.py`). So are
empty KV blocks, and buffers for prompts while there are none (`idle_memory.py`).

A running engine may get another budget: `replan` changes what can change then, experts and KV blocks.

Elsewhere: `memory_plan.py` is the result; `allowances.py` holds measured values; `refusals.py` says what would fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from argosy import _native
from argosy.budget.allowances import (
    GRAMMAR_BYTES,
    OTHER_THREADS,
    TRANSCRIPTS_KEPT_BYTES,
    growth_bytes,
    lendable_bytes,
    media_bytes,
)
from argosy.budget.footprint import DEFAULT_CONTEXT, ModelFootprint, kv_blocks
from argosy.budget.memory_plan import SMALLEST_CONTEXT, MemoryPlan, slots_per_state
from argosy.budget.refusals import does_not_fit, in_mib, too_small_now
from argosy.checkpoint.files import ModelFiles
from argosy.config import (
    CLAIMED,
    KV_BLOCK_TOKENS,
    PROCESS,
    Claim,
    EngineConfig,
    ExpertSlots,
    ModelConfig,
    claimed,
    format_bytes,
)
from argosy.errors import DoesNotFit
from argosy.experts.hit_rate import typical_hit_rate
from argosy.kept.kv_windows import WindowSizes, window_sizes
from argosy.kept.prefix_files import buffer_bytes
from argosy.machine.resources import PROCESS_GROWTH_BYTES, THREAD_BYTES, held_bytes, page_table_bytes
from argosy.model.draft_layer import MOST_BEHIND
from argosy.model.tables import cache_bytes

SMALLEST_CHUNK = 16
RESIDENT_CHUNK = 512  # with 8 of 128 experts, 32 tokens each; a longer chunk only enlarges working buffers
PLANNED_PROMPT, PLANNED_ANSWER = 1024, 256  # tokens of the request for which the chunk is chosen


def quarter_of_experts(files: ModelFiles) -> int:
    """Return slots for a quarter of all routed experts, but at least those that a token needs: the demo model's
    default.
    """
    return max(files.config.experts_per_token, len(files.experts) // 4)


def plan_memory(footprint: ModelFootprint, config: EngineConfig, *, process_bytes: int) -> MemoryPlan:
    """Plan an engine's memory.

    The planner chooses the chunk that reads least (`experts_read`), at most `config.chunk_tokens` long; but a picture
    whose positions see one another must run in one step, so no chunk is shorter than the largest such picture. A
    context that was not explicitly requested shrinks to fit. Where layers have a recurrent state, a sixteenth of the
    budget decides how many sequences have one, or fewer if nothing fits otherwise; other sequences wait. The same
    amount again goes to snapshots, at most two per sequence, and none in the smallest plan. `config.expert_slots`
    fixes the number of slots instead of using the rest of the budget.

    Raises:
        DoesNotFit: names the smallest budget that works, and settings with which this one does.
    """
    best, floor = _search(footprint, config, process_bytes)
    if best is None:
        raise does_not_fit(floor, footprint, config, partial(_search, process_bytes=process_bytes))
    return best


def _search(
    footprint: ModelFootprint, config: EngineConfig, process_bytes: int
) -> tuple[MemoryPlan | None, MemoryPlan]:
    """Return the best plan that fits, or None, and the smallest plan."""
    num_experts = footprint.num_experts
    contexts = _contexts(footprint.config, config)
    chunks = [max(chunk, footprint.unbroken_tokens) for chunk in _chunks(config)]

    def plan(context: int, chunk: int, counts: tuple[int, int]) -> MemoryPlan:
        without_experts = _without_experts(footprint, config, process_bytes, context, chunk, counts)
        return _with_experts(footprint, config, without_experts)

    for counts in _state_counts(footprint, config):
        best = None
        for context in contexts:
            plans = [plan(context, chunk, counts) for chunk in dict.fromkeys(min(c, context) for c in chunks)]
            fitting = [p for p in plans if p.total_bytes <= config.budget.ram_bytes]
            if not fitting:
                continue
            candidate = min(
                fitting, key=lambda p: experts_read(footprint.config, p, leaves_out=config.leaves_out_tokens)
            )
            # Keep the first context that fits; a smaller one replaces it only while fewer than a quarter of experts
            # fit.
            if best is None or candidate.slots.own >= 2 * best.slots.own:
                best = candidate
            if best.slots.own * 4 >= num_experts:
                break
        if best is not None:
            return best, best
    return None, plan(contexts[-1], min(*chunks, contexts[-1]), counts)


def _without_experts(
    footprint: ModelFootprint,
    config: EngineConfig,
    process_bytes: int,
    context: int,
    chunk: int,
    counts: tuple[int, int],
) -> MemoryPlan:
    """Plan all parts but experts.

    Args:
        counts: recurrent states, and snapshots of them.
    """
    num_states, num_snapshots = counts
    encoder_bytes = footprint.encoder_bytes
    if footprint.ears_bytes:
        encoder_bytes += footprint.ears_bytes + TRANSCRIPTS_KEPT_BYTES
    if encoder_bytes:
        encoder_bytes += media_bytes(
            takes_pictures=footprint.takes_pictures, takes_video=footprint.takes_video
        )
    takes_media = bool(footprint.encoder_bytes)
    claims = partial(
        claimed,
        config.claims,
        takes_media=takes_media,
        takes_video=takes_media and footprint.takes_video,
    )
    windows = _windows(footprint, config, context, chunk, num_states or config.max_sequences)
    num_window_blocks = None if windows is None else windows.num_window_blocks
    table_cache_bytes = cache_bytes(footprint.files.tables, config.budget.ram_bytes)
    fixed = process_bytes + (GRAMMAR_BYTES if config.grammars else 0) + claims(PROCESS)
    return MemoryPlan(
        budget_bytes=config.budget.ram_bytes,
        process_bytes=fixed + growth_bytes(config, context, has_media=_has_media(footprint)),
        dense_bytes=footprint.dense_bytes,
        adapter_fixed_bytes=footprint.adapter_bytes(chunk + config.decode_tokens),
        encoder_bytes=encoder_bytes,
        kv_bytes=footprint.kv_bytes(context, num_window_blocks),
        kv_layout=footprint.kv_layout(context, num_window_blocks),
        kv_dtype=footprint.kv_dtype,
        windows=windows,
        state_bytes=footprint.state_bytes(num_states * slots_per_state(config)),
        num_states=num_states,
        snapshot_bytes=footprint.state_bytes(num_snapshots),
        num_snapshots=num_snapshots,
        claimed={part: claims(part) for part in CLAIMED},
        working_bytes=_working_bytes(
            footprint,
            config,
            context,
            chunk,
            has_windows=windows is not None,
            records=claims("routing_bytes") > 0,
        ),
        table_bytes=footprint.table_bytes(table_cache_bytes, chunk + config.decode_tokens),
        table_cache_bytes=table_cache_bytes,
        staging_bytes=footprint.staging_bytes,
        bookkeeping_bytes=0,
        resident_bytes=footprint.resident_bytes,
        slots=ExpertSlots(
            num_experts=footprint.num_experts,
            slot_bytes=footprint.slot_bytes,
            part_bytes=footprint.part_bytes,
        ),
        context_tokens=context,
        chunk_tokens=chunk,
        held_bytes=process_bytes,
    )


def _working_bytes(
    footprint: ModelFootprint,
    config: EngineConfig,
    context: int,
    chunk: int,
    *,
    has_windows: bool,
    records: bool,
) -> int:
    """Return the buffers of a step with a whole chunk and every decoding sequence."""
    model, step_tokens = footprint.config, chunk + config.decode_tokens
    working = footprint.working_bytes(step_tokens)
    working += 3 * 4 * model.vocab_size * config.decode_tokens  # logits, and the sampler's copies of them
    if config.speculate == "mtp":  # hidden states that wait, and logits of a draft
        working += 4 * (2 * MOST_BEHIND * config.max_sequences * model.hidden_size + model.vocab_size)
    if records:
        working += footprint.choices_bytes(step_tokens)
    if has_windows:  # native code lists the window blocks of each sequence in a step
        working += 4 * kv_blocks(context) * config.max_sequences + 8 * step_tokens
    if config.kv_dir is not None:
        working += buffer_bytes(footprint.kv_bytes(1), footprint.state_bytes(1))
    return working


def _with_experts(footprint: ModelFootprint, config: EngineConfig, without_experts: MemoryPlan) -> MemoryPlan:
    """Return the plan with all experts, with the most that fit, or with the fewest, which may not fit."""
    num_experts, wanted = footprint.num_experts, config.expert_slots
    with_own = partial(_with_own, footprint, without_experts)
    everything = with_own(num_experts)
    if wanted is None and everything.left_bytes >= 0:
        return everything
    fewest = with_own(min(num_experts, footprint.config.experts_per_token if wanted is None else wanted))
    if wanted is not None or fewest.left_bytes < 0:
        return fewest
    lent = fewest.slots.fitting(lendable_bytes(without_experts.encoder_bytes))
    idle_bytes = _idle_buffer_bytes(footprint, config, without_experts.chunk_tokens)
    lending = partial(with_own, most_lent=lent, idle_buffer_bytes=idle_bytes)
    # Without room even for the records of lent slots, nothing is lent.
    return _fullest(lending, fewest, num_experts) or fewest


def _has_media(footprint: ModelFootprint) -> bool:
    """Whether modules for media are imported, which happens even if the towers are not used."""
    return bool(footprint.encoders or footprint.ears_bytes)


def _with_own(
    footprint: ModelFootprint,
    without_experts: MemoryPlan,
    own: int,
    most_lent: int = 0,
    idle_buffer_bytes: int | None = None,
) -> MemoryPlan:
    """Return a plan with `own` experts in memory, and more while other parts leave memory idle.

    Args:
        idle_buffer_bytes: None: no idle memory is lent.
    """
    slots, idle = without_experts.slots, 0
    if idle_buffer_bytes is not None:
        idle = slots.fitting(idle_buffer_bytes + without_experts.kv_bytes)
    slots = slots.filled(own, lent=most_lent, idle=idle)
    some = replace(
        without_experts,
        slots=slots,
        idle_buffer_bytes=idle_buffer_bytes or 0,
        bookkeeping_bytes=footprint.record_bytes(slots),
    )
    # Lent memory is mapped twice: for its owner, and for experts.
    mapped = some.total_bytes - some.held_bytes + (slots.lent + slots.idle) * slots.slot_bytes
    return replace(some, page_table_bytes=page_table_bytes(mapped))


def _fullest(with_own: Callable[[int], MemoryPlan], fewest: MemoryPlan, most: int) -> MemoryPlan | None:
    """Return the plan with the most slots that fits, or None if even `fewest` do not fit."""
    # Start too high, because a slot also needs records and page tables; then remove slots until it fits.
    slots = fewest.slots
    own = min(most, slots.own + slots.fitting(fewest.left_bytes))
    while (found := with_own(own)).left_bytes < 0:
        own += slots.fitting(found.left_bytes)  # below zero
        if own < slots.own:
            return None
    return found


def _idle_buffer_bytes(footprint: ModelFootprint, config: EngineConfig, chunk: int) -> int:
    """Return the buffers that steps without prompt tokens leave idle; 0 if encoders or a draft layer share them."""
    if _has_media(footprint) or footprint.files.num_draft_layers:
        return 0
    decode = config.decode_tokens
    return footprint.buffer_bytes(chunk + decode) - footprint.buffer_bytes(decode)


def shrunk(
    footprint: ModelFootprint, config: EngineConfig, plan: MemoryPlan, *, lends_media: bool = False
) -> MemoryPlan:
    """Change a plan to slots for the fewest experts; idle memory can then be lent.

    Args:
        lends_media: also lend the memory for pictures and sounds.
    """
    idle_bytes = _idle_buffer_bytes(footprint, config, plan.chunk_tokens)
    fewest = min(footprint.num_experts, footprint.config.experts_per_token)
    some = replace(plan, slots=replace(plan.slots, most=footprint.num_experts))
    lent = plan.slots.fitting(lendable_bytes(plan.encoder_bytes)) if lends_media else 0
    lending = _with_own(footprint, some, fewest, lent, idle_bytes)
    # Without room even for the records of lent slots, nothing is lent.
    return lending if lending.left_bytes >= 0 else _with_own(footprint, some, fewest)


def replan(
    footprint: ModelFootprint,
    plan: MemoryPlan,
    budget_bytes: int,
    *,
    kv_bytes: Callable[[int], int],
    fewest_blocks: int,
    most: int,
) -> MemoryPlan:
    """Plan a running engine for another budget. Experts leave first, then KV blocks; nothing else can change.

    Args:
        plan: the plan that the engine was opened with.
        kv_bytes: returns the size of a number of KV blocks.
        fewest_blocks: the need of running and waiting sequences.
        most: limit of all expert slots together.

    Raises:
        DoesNotFit: names the smallest budget that works now.
    """
    idle_bytes = plan.idle_buffer_bytes if plan.slots.idle else None

    def with_blocks(num_blocks: int) -> MemoryPlan:
        tokens = min(plan.context_tokens, num_blocks * KV_BLOCK_TOKENS)
        return replace(
            plan,
            budget_bytes=budget_bytes,
            kv_bytes=kv_bytes(num_blocks),
            context_tokens=tokens,
            slots=replace(plan.slots, own=0, most=most),
        )

    def with_own(some: MemoryPlan, own: int) -> MemoryPlan:
        return _with_own(footprint, some, own, plan.slots.lent, idle_bytes)

    fewest = min(footprint.num_experts, footprint.config.experts_per_token, most)
    least = with_own(with_blocks(fewest_blocks), fewest)
    if least.left_bytes < 0:
        raise too_small_now(least)
    num_blocks, most_blocks = fewest_blocks, kv_blocks(plan.context_tokens)
    while num_blocks < most_blocks:
        middle = (num_blocks + most_blocks + 1) // 2
        if with_own(with_blocks(middle), fewest).left_bytes < 0:
            most_blocks = middle - 1
        else:
            num_blocks = middle
    some = with_blocks(num_blocks)
    found = with_own(some, fewest)
    return _fullest(partial(with_own, some), found, min(footprint.num_experts, most)) or found


def adapted(footprint: ModelFootprint, config: EngineConfig, plan: MemoryPlan) -> MemoryPlan:
    """Change a plan to the adapters of a footprint; it may not fit."""
    slots = plan.slots
    lent = slots.lent * slots.slot_bytes // max(1, footprint.slot_bytes)
    return replace(
        plan,
        adapter_fixed_bytes=footprint.adapter_bytes(plan.chunk_tokens + config.decode_tokens),
        slots=replace(slots, slot_bytes=footprint.slot_bytes, part_bytes=footprint.part_bytes, lent=lent),
    )


def plan_with_media(
    footprint: ModelFootprint, config: EngineConfig, *, process_bytes: int
) -> tuple[ModelFootprint, MemoryPlan]:
    """Plan with media, or without them if the budget has no room for them and the settings leave that open.

    Returns:
        The planned footprint, and the plan. Without media, the footprint's towers hold the reason.

    Raises:
        DoesNotFit: as `plan_memory`.
    """
    try:
        return footprint, plan_memory(footprint, config, process_bytes=process_bytes)
    except DoesNotFit as error:
        if config.media is not None or config.ears is not None or not footprint.encoder_bytes:
            raise
        needed = error.facts["needed_bytes"]
        assert isinstance(needed, int)
    fault = DoesNotFit(
        "the memory budget has no room for pictures and sound: with them the model needs "
        f"{format_bytes(needed, rounds_up=True)}, and the budget is {format_bytes(config.budget.ram_bytes)}",
        hint=f"`--memory {in_mib(needed)}` works",
        needed_bytes=needed,
        budget_bytes=config.budget.ram_bytes,
    )
    footprint = footprint.without_media(fault)
    return footprint, plan_memory(footprint, config, process_bytes=process_bytes)


def plan_share(
    footprint: ModelFootprint, config: EngineConfig, *, process_bytes: int
) -> tuple[ModelFootprint, MemoryPlan]:
    """Plan the floor of a model that shares the budget with others in its process: the fewest experts with which it
    runs.

    Media, context and chunk are as if the model had the whole budget, so they do not depend on other models.

    Args:
        process_bytes: size of the process with everything that its models share.

    Returns:
        The planned footprint and the plan, as `plan_with_media`.

    Raises:
        DoesNotFit: as `plan_memory`.
    """
    footprint, alone = plan_with_media(footprint, config, process_bytes=process_bytes)
    return footprint, shrunk(footprint, config, alone, lends_media=True)


def grown(footprint: ModelFootprint, floor: MemoryPlan, budget_bytes: int) -> MemoryPlan:
    """Extend the floor from `plan_share` of a model that gets more, before it is opened."""
    return replan(
        footprint,
        floor,
        budget_bytes,
        kv_bytes=lambda num_blocks: floor.kv_bytes,
        fewest_blocks=kv_blocks(floor.context_tokens),
        most=floor.slots.num_experts,
    )


def most_bytes(footprint: ModelFootprint, floor: MemoryPlan) -> int:
    """Return what a model with this floor could use beyond it, with all experts in memory."""
    return _with_own(footprint, floor, floor.slots.num_experts).total_bytes - floor.total_bytes


def shared_bytes(footprints: Sequence[ModelFootprint] | None, claims: tuple[Claim, ...]) -> int:
    """Return the memory of a server with several models, not counting the models.

    Call this when the tokenizers, grammars and headers of all models are in memory, but before any weights.

    Args:
        footprints: footprints of the models; None: not known yet.
        claims: claims of the server, and of memory that it keeps for all models together.
    """
    _native.trim_heap()
    takes_media = footprints is None or any(footprint.encoder_bytes for footprint in footprints)
    takes_video = footprints is None or any(footprint.takes_video for footprint in footprints)
    growth = PROCESS_GROWTH_BYTES + OTHER_THREADS * THREAD_BYTES
    return (
        held_bytes()
        + growth
        + sum(
            claimed(claims, part, takes_media=takes_media, takes_video=takes_video)
            for part in (PROCESS, *CLAIMED)
        )
    )


def _windows(
    footprint: ModelFootprint, config: EngineConfig, context: int, chunk: int, max_sequences: int
) -> WindowSizes | None:
    """Return the blocks of layers with a sliding window; None: these layers keep every position, as with `kv_dir`.

    A draft layer runs positions that no step has reached, so with one every position is needed as well.
    """
    if not footprint.window or config.kv_dir is not None or config.speculate == "mtp":
        return None
    return window_sizes(
        num_blocks=kv_blocks(context),
        block_tokens=KV_BLOCK_TOKENS,
        window=footprint.window,
        max_sequences=max_sequences,
        step_tokens=chunk + config.decode_tokens,
    )


def _state_counts(footprint: ModelFootprint, config: EngineConfig) -> list[tuple[int, int]]:
    """Return candidate numbers of recurrent states and of snapshots, largest first."""
    if not footprint.config.recurrent_layers:
        return [(0, 0)]
    share = config.budget.ram_bytes // 16 // footprint.state_bytes(slots_per_state(config))
    counts = []
    count = config.max_sequences
    while count:
        if count <= max(1, share):
            counts.append((count, min(2 * count, share) if config.prefix_reuse else 0))
        count //= 2
    return [*counts, (1, 0)]


def experts_read(model: ModelConfig, plan: MemoryPlan, *, leaves_out: bool = True) -> float:
    """Estimate the experts that one request reads from the drive; the planner chooses the chunk that minimizes this.

    While reading is the bottleneck, a request takes

        seconds = experts read * bytes per expert / drive bandwidth + arithmetic

    A prompt sweeps through the experts once per chunk, in layers with a reach only near its end, so a chunk twice as
    long halves the prompt's reads; but its working buffers take slots, so the answer misses more. Arithmetic is the
    same for every chunk. The request has a prompt of PLANNED_PROMPT and an answer of PLANNED_ANSWER tokens. A sweep
    needs the experts that a chunk of independent tokens touches, and misses those that are not resident. The answer
    misses as is typical for models of its kind (`experts/hit_rate.py`): recordings of earlier runs do not count, so
    that a model always gets the same plan.
    """
    per_layer, missing = model.num_experts, 1.0 - plan.slots.own / max(1, plan.slots.num_experts)
    if not missing or not per_layer:
        return 0.0
    of_layer = model.reaches if leaves_out else (0,) * model.num_layers
    reaches = (of_layer[layer] or PLANNED_PROMPT for layer in model.moe_layers)
    num_sweeps = sum(-(-min(PLANNED_PROMPT, reach) // plan.chunk_tokens) for reach in reaches)
    tokens = min(PLANNED_PROMPT, plan.chunk_tokens)
    chosen = model.mean_experts_per_token
    touched = per_layer * (1.0 - (1.0 - chosen / per_layer) ** tokens)
    missed = 1.0 - typical_hit_rate(1.0 - missing, num_experts=per_layer)
    asked = chosen * PLANNED_ANSWER
    return num_sweeps * touched * missing + len(model.moe_layers) * asked * missed


def _contexts(model: ModelConfig, config: EngineConfig) -> list[int]:
    """Return the requested context, or all candidates, largest first."""
    if wanted := config.budget.context_tokens:
        return [wanted]
    contexts = [min(model.context_tokens, DEFAULT_CONTEXT)]
    while contexts[-1] > SMALLEST_CONTEXT:
        contexts.append(max(SMALLEST_CONTEXT, contexts[-1] // 2))
    return contexts


def _chunks(config: EngineConfig) -> list[int]:
    """Return candidate chunks: first the resident model's, then smaller, then larger ones; the earlier one
    wins a tie.
    """
    if config.chunk_tokens is None:
        halves = _halves(RESIDENT_CHUNK)
        return [*halves, *(RESIDENT_CHUNK << i for i in range(1, 3))]
    return _halves(config.chunk_tokens)


def _halves(chunk: int) -> list[int]:
    chunks = [chunk]
    while chunks[-1] > SMALLEST_CHUNK:
        chunks.append(max(SMALLEST_CHUNK, chunks[-1] // 2))
    return chunks
