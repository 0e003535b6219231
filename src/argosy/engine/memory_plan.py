"""Divide a memory budget before anything is loaded.

    budget = process + dense weights + KV cache + recurrent state + replay + requests + routing + working buffers
             + staging + expert records + page tables + expert cache

Dense weights have the first claim. Next come the KV cache, the recurrent state and its snapshots, the answers that a
server keeps for the next turn, and its memory for requests. Then come working buffers and the staging buffers that
readers transcode from. Experts get the rest: equal slots, or packed end to end when all of them fit. The budget covers
the whole process, interpreter included, so the plan starts from what the process holds now. The kernel charges page
tables to the process's cgroup, so they are planned as well. A budget below the floor (one token's experts of one layer
in memory) is refused with the numbers.

What pictures and sounds take is reserved, and lent to experts while there are none (`media_memory.py`).

`MemoryPlan.parts` is the one list of what the budget pays for: totals, tables and JSON all come from it.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from argosy import _native
from argosy.checkpoint.files import ModelFiles
from argosy.config import KIB, MIB, EngineConfig, ModelConfig, format_bytes
from argosy.engine.prefix_files import buffer_bytes
from argosy.errors import DoesNotFit
from argosy.media.parts import FFMPEG_BYTES, PROMPT_LIMITS
from argosy.model.footprint import ModelFootprint, kv_blocks
from argosy.model.model import ModelSizes
from argosy.plan import machine
from argosy.plan.hit_rate import typical_hit_rate
from argosy.prompt.tokenizer import TOKENIZER_FILE, Tokenizer

_DECODED_PIXEL_BYTES = 3 + 4  # as it is, and while Pillow scales it
MEDIA_WAITING_BYTES = 64 * MIB  # prepared pictures, sounds and frames of requests whose encode has not begun
MEDIA_KEPT_BYTES = 64 * MIB  # rows kept for prompts that repeat a picture
TRANSCRIPTS_KEPT_BYTES = 1 * MIB  # transcripts kept for prompts that repeat a sound
_DECODER_BYTES = 96 * MIB  # the process that decodes files, beyond what one file may take
_HIGHEST_MEDIA_RATE = 48_000  # samples per second that a model wants
# What a process grows by after the plan, beside the parts of the plan: allowances, above what was measured.
PROCESS_GROWTH_BYTES = 4 * MIB  # first use of code and libraries, objects of the engine, the allocator: 3 MiB
SERVER_GROWTH_BYTES = 18 * MIB  # a server's connections and threads, each with an allocator of its own
MEDIA_GROWTH_BYTES = 18 * MIB  # libraries for media, which are imported when the model is opened
THREAD_BYTES = 32 * KIB  # of the stacks of a thread: 12 KiB of its own, and 16 KiB in the kernel
TOKEN_OBJECT_BYTES = 160  # ids as Python objects, and an entry in the index of prefixes: about 100
PROCESS_VARIES_BYTES = 2 * MIB  # process size differs by this much from one start to the next
TEMPLATE_WORKER_BYTES = 24 * MIB  # the process that renders chat templates: 22 MiB measured
BODY_BYTES = 48 * MIB  # request bodies, and the values parsed from them (`serve/held.py`)
MEDIA_BODY_BYTES = (
    48 * MIB
)  # the largest body with pictures and sounds: a file of 32 MiB takes 43 MiB as base64
# Added to BODY_BYTES if the model takes media: the largest body, and the text or the files made from it.
MEDIA_BODIES_BYTES = 2 * MEDIA_BODY_BYTES
TEXT_BYTES = 48 * MIB  # one long conversation, rendered and then encoded piece by piece
REQUEST_BYTES = BODY_BYTES + TEXT_BYTES
TOKENIZER_ROOM_BYTES = 256 * MIB  # kept free when experts are read before the tokenizer is built and measured
_TOKENIZER_BYTES_PER_BYTE = 32  # per byte of tokenizer.json while it is read: 20 to 26 measured
_OTHER_THREADS = 8  # threads of the interpreter, the engine and the server, beside compute and reader threads
_MALLOC_ARENA_BYTES = 64 * MIB  # address space that glibc reserves for each thread that allocates
GRAMMAR_BYTES = 64 * MIB  # compiled grammars, and the state they build up while answers follow them
SMALLEST_CHUNK, SMALLEST_CONTEXT = 16, 512
RESIDENT_CHUNK = 512  # with 8 of 128 experts, 32 tokens each; a longer chunk only enlarges working buffers
PLANNED_PROMPT, PLANNED_ANSWER = 1024, 256  # tokens of the request that the chunk is chosen for


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
    encoder_bytes: int = 0  # towers and ears, an encode of each, and the processes that decode files
    kv_bytes: int
    state_bytes: int = 0  # recurrent state for num_states sequences
    num_states: int = 0
    snapshot_bytes: int = 0  # recurrent states kept at the end of prefixes
    num_snapshots: int = 0
    replay_bytes: int = 0  # answers whose tokens are kept until their conversation continues
    request_bytes: int = 0  # request bodies and the data made from them before the engine
    routing_bytes: int = 0  # counts of what routers choose
    working_bytes: int
    staging_bytes: int  # buffers that readers transcode from
    bookkeeping_bytes: int  # where each expert lies, and when it was last used
    page_table_bytes: int = 0  # kernel page tables for everything mapped after the plan
    slot_bytes: int
    resident_bytes: int  # all experts, packed end to end
    num_slots: int
    lent_slots: int = 0  # more slots, in the memory for pictures and sounds while there are none
    num_experts: int  # routed experts in all layers
    context_tokens: int
    chunk_tokens: int

    @property
    def expert_bytes(self) -> int:
        return self.resident_bytes if self.is_resident else self.num_slots * self.slot_bytes

    @property
    def total_bytes(self) -> int:
        return sum(part.nbytes for part in self.parts())

    @property
    def left_bytes(self) -> int:
        """What the parts leave of the budget; below zero in a plan that does not fit."""
        return self.budget_bytes - self.total_bytes

    @property
    def is_resident(self) -> bool:
        return self.num_slots >= self.num_experts

    def model_sizes(self, config: EngineConfig) -> ModelSizes:
        """The model's share of this plan."""
        return ModelSizes(
            kv_blocks=kv_blocks(self.context_tokens),
            kv_dtype=config.kv_dtype,
            step_tokens=self.chunk_tokens + config.decode_tokens,
            num_states=self.num_states * _slots_per_state(config) + self.num_snapshots,
            expert_slots=None if self.is_resident else self.num_slots + self.lent_slots,
            fewest_slots=self.num_slots,
        )

    def parts(self) -> list[Part]:
        """All parts of the budget, in the order of their claims."""
        share = 100 * self.num_slots / max(1, self.num_experts)
        experts = f"{self.num_slots} of {self.num_experts} experts ({share:.0f} %)"
        if self.lent_slots:
            experts += f", {self.num_slots + self.lent_slots} while there are no pictures or sounds"
        states, snapshots = (
            f"{self.num_states} sequences at once",
            f"{self.num_snapshots} prompt prefixes",
        )
        return [
            Part("process_bytes", "process", self.process_bytes, "interpreter, libraries, tokenizer"),
            Part("dense_bytes", "dense weights", self.dense_bytes),
            Part("encoder_bytes", "pictures, sound", self.encoder_bytes, "encoders, and decoding of files"),
            Part("kv_bytes", "KV cache", self.kv_bytes, f"{self.context_tokens} tokens"),
            Part("recurrent_state_bytes", "recurrent state", self.state_bytes, states),
            Part("snapshot_bytes", "state snapshots", self.snapshot_bytes, snapshots),
            Part(
                "replay_bytes",
                "replay",
                self.replay_bytes,
                "answers, kept until their conversations continue",
            ),
            Part("request_bytes", "requests", self.request_bytes, "request bodies and long texts"),
            Part("routing_bytes", "routing", self.routing_bytes, "counts of the experts that tokens choose"),
            Part(
                "working_bytes", "working buffers", self.working_bytes, f"{self.chunk_tokens} tokens a step"
            ),
            Part("staging_bytes", "staging", self.staging_bytes, "buffers for transcoding"),
            Part(
                "expert_record_bytes",
                "expert records",
                self.bookkeeping_bytes,
                "location and uses of each expert",
            ),
            Part(
                "page_table_bytes",
                "page tables",
                self.page_table_bytes,
                "1/512 of mapped memory, in the kernel",
            ),
            Part("expert_cache_bytes", "expert cache", self.expert_bytes, experts),
        ]

    def lines(self) -> list[tuple[str, int, str]]:
        """(label, bytes, note) of every part that is not empty, in the order of their claims."""
        shown = (part for part in self.parts() if part.nbytes or part.key == "expert_cache_bytes")
        return [(part.label, part.nbytes, part.note) for part in shown]

    def as_dict(self) -> dict[str, int]:
        return {
            "budget_bytes": self.budget_bytes,
            "total_bytes": self.total_bytes,
            **{part.key: part.nbytes for part in self.parts()},
            "expert_slots": self.num_slots,
            "lent_expert_slots": self.lent_slots,
            "experts": self.num_experts,
            "context_tokens": self.context_tokens,
            "chunk_tokens": self.chunk_tokens,
        }


def held_bytes() -> int:
    """Bytes that this process holds now, page tables included."""
    footprint = machine.process_footprint()
    return footprint.resident_bytes + footprint.page_table_bytes


def process_bytes(tokenizer: Tokenizer | None) -> int:
    """Bytes that this process holds now, plus the worker it will start if the model has a chat template.

    What was freed while files were read is returned to the system first: the engine needs that memory again, and its
    own parts count it.
    """
    _native.trim_heap()
    has_template = tokenizer is not None and tokenizer.chat_template is not None
    return held_bytes() + (TEMPLATE_WORKER_BYTES if has_template else 0)


def growth_bytes(config: EngineConfig, context_tokens: int, *, has_media: bool) -> int:
    """What a process grows by after the plan, beside the parts of the plan."""
    threads = config.threads + config.readers + _OTHER_THREADS
    nbytes = PROCESS_GROWTH_BYTES + threads * THREAD_BYTES + context_tokens * TOKEN_OBJECT_BYTES
    if config.request_bytes:
        nbytes += SERVER_GROWTH_BYTES
    return nbytes + (MEDIA_GROWTH_BYTES if has_media else 0)


def page_table_bytes(mapped_bytes: int, num_mappings: int = 16) -> int:
    """Upper bound on page-table bytes for `mapped_bytes` in `num_mappings` places of the address space.

    A table is a page, and an entry takes 8 bytes: 1/512 of memory mapped in 4 KiB pages. Huge pages save nothing: the
    kernel keeps a table beside each one, in case it has to split that page (measured on Linux 6.18). A mapping may
    begin and end within a table of each level.
    """
    entries = mmap.PAGESIZE // 8
    nbytes, span = 0, mmap.PAGESIZE
    while span < max(mapped_bytes, mmap.PAGESIZE) * entries:
        span *= entries  # one table of this level maps this much
        nbytes += (-(-mapped_bytes // span) + num_mappings) * mmap.PAGESIZE
    return nbytes


def media_bytes(*, takes_pictures: bool, takes_video: bool) -> int:
    """Memory for media beside their encoders: a file that is decoded, requests that wait, rows kept."""
    sound_bytes = round(4 * PROMPT_LIMITS.sound_s * _HIGHEST_MEDIA_RATE)
    decoded = max(_DECODED_PIXEL_BYTES * PROMPT_LIMITS.pixels if takes_pictures else 0, sound_bytes)
    # Pictures are decoded beside a video: ffmpeg needs memory of its own.
    ffmpeg_bytes = FFMPEG_BYTES + PROMPT_LIMITS.decode_bytes
    video = ffmpeg_bytes + PROMPT_LIMITS.video_bytes + sound_bytes if takes_video else 0
    return (
        _DECODER_BYTES + PROMPT_LIMITS.decode_bytes + decoded + video + MEDIA_WAITING_BYTES + MEDIA_KEPT_BYTES
    )


def lendable_bytes(encoder_bytes: int) -> int:
    """The part of `MemoryPlan.encoder_bytes` that is unused while nothing is decoded, encoded or transcribed."""
    return max(0, encoder_bytes - MEDIA_WAITING_BYTES - MEDIA_KEPT_BYTES - TRANSCRIPTS_KEPT_BYTES)


def quarter_of_experts(files: ModelFiles) -> int:
    """Slots for a quarter of all routed experts, but at least what a token needs: the demo model's default."""
    return max(files.config.experts_per_token, len(files.experts) // 4)


def plan_memory(footprint: ModelFootprint, config: EngineConfig, *, process_bytes: int) -> MemoryPlan:
    """Plan an engine's memory.

    The chunk is the one that reads least (`experts_read`), at most `config.chunk_tokens` long; but a picture whose
    positions see one another has to run in one step, so no chunk is shorter than the largest. A context that was not
    explicitly requested shrinks to fit. Where layers have a recurrent state, a sixteenth of the budget decides how many
    sequences have one, or fewer if nothing fits otherwise; other sequences wait. The same amount again goes to
    snapshots, at most two per sequence, and none in the smallest plan. `config.expert_slots` fixes the number of slots
    instead of using the rest of the budget.

    Raises:
        DoesNotFit: names the smallest budget that works, and settings with which this one does.
    """
    best, floor = _search(footprint, config, process_bytes)
    if best is None:
        raise _does_not_fit(floor, footprint, config, process_bytes)
    return best


def _search(
    footprint: ModelFootprint, config: EngineConfig, process_bytes: int
) -> tuple[MemoryPlan | None, MemoryPlan]:
    """The best plan that fits; or None, and the smallest plan."""
    model, num_experts, expert_slots = footprint.config, footprint.num_experts, config.expert_slots
    fewest_slots = min(num_experts, model.experts_per_token) if expert_slots is None else expert_slots
    encoder_bytes = footprint.encoder_bytes
    if footprint.ears_bytes:
        encoder_bytes += footprint.ears_bytes + TRANSCRIPTS_KEPT_BYTES
    # Modules for media are imported even if the towers are not used.
    has_media = bool(footprint.encoders or footprint.ears_bytes)
    fixed = process_bytes + (GRAMMAR_BYTES if config.grammars else 0)
    request_bytes = config.request_bytes
    if request_bytes and footprint.encoder_bytes:
        request_bytes += MEDIA_BODIES_BYTES
        if footprint.takes_video:
            request_bytes += TEXT_BYTES  # of a conversation with a video, beside another long one

    def plan(context: int, chunk: int, num_states: int, num_snapshots: int) -> MemoryPlan:
        working = footprint.working_bytes(chunk + config.decode_tokens)
        working += 3 * 4 * model.vocab_size * config.decode_tokens  # logits, and the sampler's copies of them
        if config.record_bytes:
            working += footprint.choices_bytes(chunk + config.decode_tokens)
        if config.kv_dir is not None:
            working += buffer_bytes(footprint.kv_bytes(1), footprint.state_bytes(1))
        without_experts = MemoryPlan(
            budget_bytes=config.budget.ram_bytes,
            process_bytes=fixed + growth_bytes(config, context, has_media=has_media),
            dense_bytes=footprint.dense_bytes,
            encoder_bytes=encoder_bytes
            and encoder_bytes
            + media_bytes(takes_pictures=footprint.takes_pictures, takes_video=footprint.takes_video),
            kv_bytes=footprint.kv_bytes(context),
            state_bytes=footprint.state_bytes(num_states * _slots_per_state(config)),
            num_states=num_states,
            snapshot_bytes=footprint.state_bytes(num_snapshots),
            num_snapshots=num_snapshots,
            replay_bytes=config.replay_bytes,
            request_bytes=request_bytes,
            routing_bytes=config.record_bytes,
            working_bytes=working,
            staging_bytes=footprint.staging_bytes,
            bookkeeping_bytes=0,
            slot_bytes=footprint.slot_bytes,
            resident_bytes=footprint.resident_bytes,
            num_slots=0,
            num_experts=num_experts,
            context_tokens=context,
            chunk_tokens=chunk,
        )

        def with_slots(num_slots: int, most_lent: int = 0) -> MemoryPlan:
            """The same plan with `num_slots` experts in memory, and more while there are no pictures or sounds."""
            num_lent = min(most_lent, num_experts - num_slots)
            some = replace(
                without_experts,
                num_slots=num_slots,
                lent_slots=num_lent,
                bookkeeping_bytes=footprint.record_bytes(num_slots, num_lent),
            )
            # What is lent is mapped twice: for encoders, and for experts.
            mapped = some.total_bytes - process_bytes + num_lent * some.slot_bytes
            return replace(some, page_table_bytes=page_table_bytes(mapped))

        everything = with_slots(num_experts)
        if expert_slots is None and everything.total_bytes <= config.budget.ram_bytes:
            return everything
        fewest = with_slots(min(num_experts, fewest_slots))
        if expert_slots is not None or fewest.total_bytes > config.budget.ram_bytes:
            return fewest
        # Start too high, because a slot also needs records and page tables; then remove slots until it fits.
        slots = min(
            num_experts,
            fewest.num_slots + (fewest.budget_bytes - fewest.total_bytes) // max(1, fewest.slot_bytes),
        )
        lent = lendable_bytes(without_experts.encoder_bytes) // max(1, fewest.slot_bytes)
        while (found := with_slots(slots, lent)).total_bytes > config.budget.ram_bytes:
            slots -= -(-(found.total_bytes - found.budget_bytes) // found.slot_bytes)
            if slots < fewest.num_slots:
                return fewest  # no room even for the records of what would be lent
        return found

    contexts = _contexts(model, config)
    chunks = [max(chunk, footprint.unbroken_tokens) for chunk in _chunks(config)]
    for counts in _state_counts(footprint, config):
        best = None
        for context in contexts:
            plans = [
                plan(context, chunk, *counts) for chunk in dict.fromkeys(min(c, context) for c in chunks)
            ]
            fitting = [p for p in plans if p.total_bytes <= config.budget.ram_bytes]
            if not fitting:
                continue
            candidate = min(fitting, key=lambda p: experts_read(model, p))
            # Keep the first context that fits; a smaller one replaces it only while experts have less than a quarter.
            if best is None or candidate.num_slots >= 2 * best.num_slots:
                best = candidate
            if best.num_slots * 4 >= num_experts:
                break
        if best is not None:
            return best, best
    return None, plan(contexts[-1], min(*chunks, contexts[-1]), *counts)


def plan_with_media(
    footprint: ModelFootprint, config: EngineConfig, *, process_bytes: int
) -> tuple[ModelFootprint, MemoryPlan]:
    """Plan with media, or without them if the budget has no room for them and the settings leave that open.

    Returns:
        The footprint that the plan is for, and the plan. Without media, the footprint's towers hold the reason.

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
        f"the memory budget has no room for pictures and sound: with them the model needs {format_bytes(needed)}, "
        f"and the budget is {format_bytes(config.budget.ram_bytes)}",
        hint=f"`--memory {_in_mib(needed)}` works",
        needed_bytes=needed,
        budget_bytes=config.budget.ram_bytes,
    )
    footprint = footprint.without_media(fault)
    return footprint, plan_memory(footprint, config, process_bytes=process_bytes)


def _slots_per_state(config: EngineConfig) -> int:
    """Slots of the recurrent state per sequence: a second one to return to if a proposal is rejected."""
    return 2 if config.draft_tokens else 1


def _state_counts(footprint: ModelFootprint, config: EngineConfig) -> list[tuple[int, int]]:
    """Candidate numbers of recurrent states and of snapshots, largest first."""
    if not footprint.config.delta_layers:
        return [(0, 0)]
    share = config.budget.ram_bytes // 16 // footprint.state_bytes(_slots_per_state(config))
    counts = []
    count = config.max_sequences
    while count:
        if count <= max(1, share):
            counts.append((count, min(2 * count, share) if config.prefix_reuse else 0))
        count //= 2
    return [*counts, (1, 0)]


def experts_read(model: ModelConfig, plan: MemoryPlan) -> float:
    """Experts that one request reads from the drive; the chunk minimizes this.

    While reading is the bottleneck, a request takes

        seconds = experts read * bytes of one / drive bandwidth + arithmetic

    A prompt sweeps through the experts once per chunk, so a chunk twice as long halves the prompt's reads; but its
    working buffers take slots, so the answer misses more. Arithmetic is the same for every chunk. The request has a
    prompt of PLANNED_PROMPT and an answer of PLANNED_ANSWER tokens. A sweep needs the experts that a chunk of
    independent tokens touches, and misses those that are not resident. The answer misses what is typical of models of
    its kind (`plan/hit_rate.py`): what runs recorded has no say, so that a model always has the same plan.
    """
    per_layer, missing = model.num_experts, 1.0 - plan.num_slots / max(1, plan.num_experts)
    if not missing or not per_layer:
        return 0.0
    num_sweeps = -(-PLANNED_PROMPT // plan.chunk_tokens)
    tokens = min(PLANNED_PROMPT, plan.chunk_tokens)
    touched = per_layer * (1.0 - (1.0 - model.experts_per_token / per_layer) ** tokens)
    missed = 1.0 - typical_hit_rate(1.0 - missing, num_experts=per_layer)
    asked = model.experts_per_token * PLANNED_ANSWER
    return len(model.moe_layers) * (num_sweeps * touched * missing + asked * missed)


def _contexts(model: ModelConfig, config: EngineConfig) -> list[int]:
    """The requested context, or all candidates, largest first."""
    if wanted := config.budget.context_tokens:
        return [wanted]
    contexts = [min(model.context_tokens, 8192)]
    while contexts[-1] > SMALLEST_CONTEXT:
        contexts.append(max(SMALLEST_CONTEXT, contexts[-1] // 2))
    return contexts


def _chunks(config: EngineConfig) -> list[int]:
    """Candidate chunks, the earlier one winning a tie: first the resident model's, then smaller, then larger ones."""
    if config.chunk_tokens is None:
        halves = _halves(RESIDENT_CHUNK)
        return [*halves, *(RESIDENT_CHUNK << i for i in range(1, 3))]
    return _halves(config.chunk_tokens)


def _halves(chunk: int) -> list[int]:
    chunks = [chunk]
    while chunks[-1] > SMALLEST_CHUNK:
        chunks.append(max(SMALLEST_CHUNK, chunks[-1] // 2))
    return chunks


def require_mappable(footprint: ModelFootprint, config: EngineConfig) -> None:
    """Check that `ulimit` leaves enough address space for the engine before it maps anything.

    Otherwise a failed allocation would end the process silently, inside the library that reads tokenizers.

    Raises:
        DoesNotFit: the address space is too small, or no plan fits.
    """
    limits = (machine.address_space_limit(), machine.data_limit())
    if limits == (None, None):
        return
    held = held_bytes()
    _, plan = plan_with_media(footprint, config, process_bytes=held)
    tokenizer_file = footprint.files.path / TOKENIZER_FILE
    json_bytes = tokenizer_file.stat().st_size if tokenizer_file.is_file() else 0
    stacks = (config.threads + config.readers + _OTHER_THREADS) * machine.thread_stack_bytes()
    others = stacks + max(TOKENIZER_ROOM_BYTES, json_bytes * _TOKENIZER_BYTES_PER_BYTE)
    # glibc's reservation counts as address space at once, and as data only when it is used.
    reserved = (config.readers + _OTHER_THREADS // 2) * _MALLOC_ARENA_BYTES
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
    """Check that the machine has the memory that the plan takes: a larger budget is fine for a model that leaves some.

    Raises:
        DoesNotFit: it has less.
    """
    limit = machine.memory_limit()
    if config.budget.ram_bytes <= limit.total_bytes:
        return
    planned = None
    with suppress(DoesNotFit):  # raised with better numbers when the tokenizer has been measured
        _, planned = plan_with_media(footprint, config, process_bytes=held_bytes())
    if planned is not None and planned.total_bytes > limit.total_bytes:
        raise DoesNotFit(
            f"needs {format_bytes(planned.total_bytes)} of the budget of {format_bytes(config.budget.ram_bytes)}, and "
            f"there are {format_bytes(limit.total_bytes)} ({limit.source})",
            hint=f"`--memory {machine.default_budget(limit)[0] // MIB}MiB` is what is free, less a margin",
            needed_bytes=planned.total_bytes,
            budget_bytes=limit.total_bytes,
        )


def _does_not_fit(
    floor: MemoryPlan, footprint: ModelFootprint, config: EngineConfig, process_bytes: int
) -> DoesNotFit:
    needed, budget = floor.total_bytes, config.budget.ram_bytes
    described = [
        f"{'smallest expert cache' if part.key == 'expert_cache_bytes' else part.label} {format_bytes(part.nbytes)}"
        + (f" ({part.note})" if part.key == "kv_bytes" else "")
        for part in floor.parts()
        if part.nbytes
    ]
    parts = "  " + "  +  ".join(described)
    hints = [f"`--memory {_in_mib(needed)}` works"]
    if (remedy := _what_helps(footprint, config, process_bytes, needed)) is not None:
        hints.append(remedy)
    hints.append("`argosy pack --format q8` or q4 makes dense weights and experts smaller")
    return DoesNotFit(
        f"needs {format_bytes(needed)} of memory, and the budget is {format_bytes(budget)}\n{parts}",
        hint="; ".join(hints),
        needed_bytes=needed,
        budget_bytes=budget,
        plan=replace(floor, budget_bytes=budget).as_dict(),
    )


def _in_mib(needed_bytes: int) -> str:
    """A budget of at least `needed_bytes`, as an option has it."""
    return f"{-(-(needed_bytes + PROCESS_VARIES_BYTES) // MIB)}MiB"


class _Remedy(NamedTuple):
    """An option that makes a plan smaller, and what it changes."""

    option: str
    apply: Callable[[ModelFootprint, EngineConfig], tuple[ModelFootprint, EngineConfig]]


def _remedies(config: EngineConfig, *, has_media: bool) -> list[list[_Remedy]]:
    """Options that make a plan smaller, one list for each kind, the gentlest first."""
    kinds: list[list[_Remedy]] = []
    if config.kv_dtype == "f32":
        kinds.append(
            [
                _Remedy(
                    "--kv f16", lambda model, config: (model.with_kv("f16"), replace(config, kv_dtype="f16"))
                )
            ]
        )
    if (context := config.budget.context_tokens or 0) > SMALLEST_CONTEXT:
        shorter = []
        while context > SMALLEST_CONTEXT:
            context = max(SMALLEST_CONTEXT, context // 2)
            shorter.append(_Remedy(f"--context {context}", partial(_with_context, context)))
        kinds.append(shorter)
    if has_media:
        fault = DoesNotFit("the memory budget has no room for pictures and sound")
        kinds.append([_Remedy("--no-media", lambda model, config: (model.without_media(fault), config))])
    return kinds


def _with_context(
    context: int, footprint: ModelFootprint, config: EngineConfig
) -> tuple[ModelFootprint, EngineConfig]:
    return footprint, replace(config, budget=replace(config.budget, context_tokens=context))


def _what_helps(
    footprint: ModelFootprint, config: EngineConfig, process_bytes: int, needed_bytes: int
) -> str | None:
    """The options with which a budget is enough; or else the smallest budget with all of them, if it needs less."""
    kinds = _remedies(config, has_media=bool(footprint.encoder_bytes))
    fitting = []
    for kind in kinds:
        for remedy in kind:
            best, _ = _search(*remedy.apply(footprint, config), process_bytes)
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
    best, least = _search(footprint, config, process_bytes)
    if best is not None:
        return f"this budget is enough with `{together}`"
    smallest = _in_mib(least.total_bytes)
    return None if smallest == _in_mib(needed_bytes) else f"`--memory {smallest} {together}` is the least"
