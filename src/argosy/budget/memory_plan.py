"""Divide a memory budget before anything is loaded.

    budget = process + dense weights + KV cache + recurrent state + replay + requests + routing + group
             + working buffers + staging + expert records + page tables + expert cache

Dense weights have the first claim. Next come the KV cache, the recurrent state and its snapshots, the answers that a
server keeps for the next turn, and its memory for requests. Then come working buffers and the staging buffers that
readers transcode from. Experts get the rest: equal slots, or packed end to end when all of them fit. The budget covers
the whole process, interpreter included, so the plan starts from what the process holds now. The kernel charges page
tables to the process's cgroup, so they are planned as well. A budget below the floor (one token's experts of one layer
in memory) is refused with the numbers.

What pictures and sounds take is reserved, and lent to experts while there are none (`media_memory.py`). So are KV
blocks that hold nothing, and buffers for prompts while there are none (`idle_memory.py`).

A running engine may get another budget: `replan` changes what can change then, experts and KV blocks.

`MemoryPlan.parts` is the one list of what the budget pays for: totals, tables and JSON all come from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple, get_args

from argosy import _native
from argosy.budget.footprint import DEFAULT_CONTEXT, KvLayout, ModelFootprint, kv_blocks
from argosy.checkpoint.files import ModelFiles
from argosy.config import (
    CLAIMED,
    DRAFTED_AT_ONCE,
    KIB,
    KV_BLOCK_TOKENS,
    MIB,
    PROCESS,
    Claim,
    EngineConfig,
    KvDtype,
    ModelConfig,
    claimed,
    format_bytes,
)
from argosy.errors import DoesNotFit
from argosy.experts.hit_rate import typical_hit_rate
from argosy.kept.kv_windows import WindowSizes, window_sizes
from argosy.kept.prefix_files import buffer_bytes
from argosy.machine import resources
from argosy.machine.resources import PROCESS_GROWTH_BYTES, THREAD_BYTES, held_bytes, page_table_bytes
from argosy.media.parts import FFMPEG_BYTES, PROMPT_LIMITS
from argosy.model.draft_layer import MOST_BEHIND
from argosy.model.model import ModelSizes
from argosy.prompt.chat import TEMPLATE_WORKER_BYTES
from argosy.prompt.tokenizer import TOKENIZER_FILE, Tokenizer

_DECODED_PIXEL_BYTES = 3 + 4  # as it is, and while Pillow scales it
MEDIA_WAITING_BYTES = 64 * MIB  # prepared pictures, sounds and frames of requests whose encode has not begun
MEDIA_KEPT_BYTES = 64 * MIB  # rows kept for prompts that repeat a picture
TRANSCRIPTS_KEPT_BYTES = 1 * MIB  # transcripts kept for prompts that repeat a sound
_DECODER_BYTES = 96 * MIB  # the process that decodes files, beyond what one file may take
_HIGHEST_MEDIA_RATE = 48_000  # samples per second that a model wants
# Growth of a process after the plan that no part of the plan covers: allowances, above the measured values.
MEDIA_GROWTH_BYTES = 18 * MIB  # libraries for media, which are imported when the model is opened
TOKEN_OBJECT_BYTES = 160  # ids as Python objects, and an entry in the index of prefixes: about 100
# Contexts of an answer with a watermark, as `watermark.MarkedAnswer` keeps them.
MARKED_ANSWER_BYTES = 12 * KIB
# A lookup drafter takes this per token of a sequence: its id, room to grow, a copy while that grows, and a search.
LOOKUP_TOKEN_BYTES = 20
KV_PARTS = 32  # idle memory of the KV cache is lent and returned in this many parts
PROCESS_VARIES_BYTES = 2 * MIB  # process size differs by this much from one start to the next
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
    kv_layout: KvLayout
    kv_dtype: KvDtype
    windows: WindowSizes | None = None  # blocks of layers with a sliding window; None: as many as the others
    state_bytes: int = 0  # recurrent state for num_states sequences
    num_states: int = 0
    snapshot_bytes: int = 0  # recurrent states kept at the end of prefixes
    num_snapshots: int = 0
    claimed: Mapping[str, int] = field(default_factory=dict)  # bytes by part of `CLAIMED`
    working_bytes: int
    staging_bytes: int  # buffers that readers transcode from
    bookkeeping_bytes: int  # where each expert lies, and when it was last used
    page_table_bytes: int = 0  # kernel page tables for everything mapped after the plan
    slot_bytes: int
    resident_bytes: int  # all experts, packed end to end
    num_slots: int
    lent_slots: int = 0  # more slots, in the memory for pictures and sounds while there are none
    idle_slots: int = 0  # more slots at most, in idle memory of prompts and the KV cache
    idle_buffer_bytes: int = 0  # the part of `working_bytes` that steps without prompt tokens leave idle
    most_slots: int = 0  # slots at most, if `num_slots` has changed or may change; 0: neither
    num_experts: int  # routed experts in all layers
    context_tokens: int
    chunk_tokens: int
    held_bytes: int = 0  # the part of `process_bytes` that was in memory already

    @property
    def expert_bytes(self) -> int:
        return self.resident_bytes if self.is_packed else self.num_slots * self.slot_bytes

    @property
    def total_bytes(self) -> int:
        return sum(part.nbytes for part in self.parts())

    @property
    def left_bytes(self) -> int:
        """The rest of the budget after all parts; below zero in a plan that does not fit."""
        return self.budget_bytes - self.total_bytes

    @property
    def is_resident(self) -> bool:
        return self.num_slots >= self.num_experts

    @property
    def is_packed(self) -> bool:
        """Whether all experts are stored end to end, and not in slots."""
        return self.is_resident and not self.most_slots

    @property
    def reachable_slots(self) -> int:
        """Expert slots while everything that may be lent is lent."""
        return self.num_slots + self.lent_slots + self.idle_slots

    def decode_slots(self, num_tokens: int) -> int:
        """Likely expert slots while text is generated and sequences hold `num_tokens` in all."""
        part = -(-kv_blocks(self.context_tokens) // KV_PARTS) * KV_BLOCK_TOKENS
        used_tokens = min(self.context_tokens, -(-num_tokens // part) * part)
        layout = self.kv_layout
        idle_bytes = self.idle_buffer_bytes
        idle_bytes += max(0, layout.free_bytes(used_tokens) - layout.free_bytes(self.context_tokens))
        idle_slots = min(self.idle_slots, idle_bytes // max(1, self.slot_bytes))
        return self.num_slots + self.lent_slots + idle_slots

    @property
    def usual_slots(self) -> int:
        """The likely number of expert slots during decode, with sequences that fill half of the context."""
        return self.decode_slots(self.context_tokens // 2)

    def model_sizes(self, config: EngineConfig) -> ModelSizes:
        """The model's share of this plan."""
        return ModelSizes(
            kv_blocks=kv_blocks(self.context_tokens),
            kv_dtype=self.kv_dtype,
            step_tokens=self.chunk_tokens + config.decode_tokens,
            num_states=self.num_states * _slots_per_state(config) + self.num_snapshots,
            window_blocks=None if self.windows is None else self.windows.num_window_blocks,
            expert_slots=None if self.is_packed else self.reachable_slots,
            first_slots=self.num_slots,
            reads_all=bool(self.most_slots),
        )

    def parts(self) -> list[Part]:
        """All parts of the budget, in the order of their claims."""
        share = 100 * self.num_slots / max(1, self.num_experts)
        experts = f"{self.num_slots} of {self.num_experts} experts ({share:.0f} %)"
        if self.lent_slots:
            experts += f", {self.num_slots + self.lent_slots} while there are no pictures or sounds"
        if self.idle_slots:
            experts += f", up to {self.reachable_slots} in idle memory"
        states, snapshots = (
            f"{self.num_states} sequences at once",
            f"{self.num_snapshots} prompt prefixes",
        )
        context = f"{self.context_tokens} tokens in {self.kv_dtype}"
        if self.windows is not None:
            context += f", {self.windows.num_window_blocks * KV_BLOCK_TOKENS} in layers with a window"
        return [
            Part("process_bytes", "process", self.process_bytes, "interpreter, libraries, tokenizer"),
            Part("dense_bytes", "dense weights", self.dense_bytes),
            Part("encoder_bytes", "pictures, sound", self.encoder_bytes, "encoders, and decoding of files"),
            Part("kv_bytes", "KV cache", self.kv_bytes, context),
            Part("recurrent_state_bytes", "recurrent state", self.state_bytes, states),
            Part("snapshot_bytes", "state snapshots", self.snapshot_bytes, snapshots),
            *(Part(key, label, self.claimed.get(key, 0), note) for key, (label, note) in CLAIMED.items()),
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
            "idle_expert_slots": self.idle_slots,
            "experts": self.num_experts,
            "context_tokens": self.context_tokens,
            "chunk_tokens": self.chunk_tokens,
        }


def process_bytes(tokenizer: Tokenizer | None) -> int:
    """Bytes that this process holds now, plus the worker it will start if the model has a chat template.

    What was freed while files were read is returned to the system first: the engine needs that memory again, and its
    own parts count it.
    """
    _native.trim_heap()
    has_template = tokenizer is not None and tokenizer.chat_template is not None
    return held_bytes() + (TEMPLATE_WORKER_BYTES if has_template else 0)


def growth_bytes(config: EngineConfig, context_tokens: int, *, has_media: bool) -> int:
    """Growth of a process after the plan that no part of the plan covers."""
    threads = config.threads + config.readers + _OTHER_THREADS
    nbytes = PROCESS_GROWTH_BYTES + threads * THREAD_BYTES + context_tokens * TOKEN_OBJECT_BYTES
    if config.watermark is not None:
        nbytes += (config.max_sequences + (config.max_waiting or 0)) * MARKED_ANSWER_BYTES
    if config.speculate == "lookup":
        nbytes += DRAFTED_AT_ONCE * context_tokens * LOOKUP_TOKEN_BYTES
    return nbytes + (MEDIA_GROWTH_BYTES if has_media else 0)


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
    claims = partial(
        claimed,
        config.claims,
        takes_media=bool(footprint.encoder_bytes),
        takes_video=bool(footprint.encoder_bytes) and footprint.takes_video,
    )
    fixed += claims(PROCESS)

    def plan(context: int, chunk: int, num_states: int, num_snapshots: int) -> MemoryPlan:
        working = footprint.working_bytes(chunk + config.decode_tokens)
        working += 3 * 4 * model.vocab_size * config.decode_tokens  # logits, and the sampler's copies of them
        if config.speculate == "mtp":  # hidden states that wait, and logits of a draft
            working += 4 * (2 * MOST_BEHIND * config.max_sequences * model.hidden_size + model.vocab_size)
        if claims("routing_bytes"):
            working += footprint.choices_bytes(chunk + config.decode_tokens)
        windows = _windows(footprint, config, context, chunk)
        if windows is not None:  # native code lists the window blocks of each sequence in a step
            working += 4 * kv_blocks(context) * config.max_sequences + 8 * (chunk + config.decode_tokens)
        if config.kv_dir is not None:
            working += buffer_bytes(footprint.kv_bytes(1), footprint.state_bytes(1))
        without_experts = MemoryPlan(
            budget_bytes=config.budget.ram_bytes,
            process_bytes=fixed + growth_bytes(config, context, has_media=has_media),
            dense_bytes=footprint.dense_bytes,
            encoder_bytes=encoder_bytes
            and encoder_bytes
            + media_bytes(takes_pictures=footprint.takes_pictures, takes_video=footprint.takes_video),
            kv_bytes=footprint.kv_bytes(context, None if windows is None else windows.num_window_blocks),
            kv_layout=footprint.kv_layout(context, None if windows is None else windows.num_window_blocks),
            kv_dtype=footprint.kv_dtype,
            windows=windows,
            state_bytes=footprint.state_bytes(num_states * _slots_per_state(config)),
            num_states=num_states,
            snapshot_bytes=footprint.state_bytes(num_snapshots),
            num_snapshots=num_snapshots,
            claimed={part: claims(part) for part in CLAIMED},
            working_bytes=working,
            staging_bytes=footprint.staging_bytes,
            bookkeeping_bytes=0,
            slot_bytes=footprint.slot_bytes,
            resident_bytes=footprint.resident_bytes,
            num_slots=0,
            num_experts=num_experts,
            context_tokens=context,
            chunk_tokens=chunk,
            held_bytes=process_bytes,
        )
        with_slots = partial(_with_slots, footprint, without_experts)
        everything = with_slots(num_experts)
        if expert_slots is None and everything.total_bytes <= config.budget.ram_bytes:
            return everything
        fewest = with_slots(min(num_experts, fewest_slots))
        if expert_slots is not None or fewest.total_bytes > config.budget.ram_bytes:
            return fewest
        lent = lendable_bytes(without_experts.encoder_bytes) // max(1, fewest.slot_bytes)
        idle_bytes = _idle_buffer_bytes(footprint, config, chunk, has_media=has_media)
        lending = partial(with_slots, most_lent=lent, idle_buffer_bytes=idle_bytes)
        # Without room even for the records of lent slots, nothing is lent.
        return _most_slots(lending, fewest, num_experts) or fewest

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


def _with_slots(
    footprint: ModelFootprint,
    without_experts: MemoryPlan,
    num_slots: int,
    most_lent: int = 0,
    idle_buffer_bytes: int | None = None,
) -> MemoryPlan:
    """A plan with `num_slots` experts in memory, and more while others leave memory idle.

    Args:
        idle_buffer_bytes: None: no idle memory is lent.
    """
    most_slots = without_experts.most_slots or footprint.num_experts
    lent_slots = min(most_lent, most_slots - num_slots)
    idle_slots = 0
    if idle_buffer_bytes is not None:
        idle_slots = (idle_buffer_bytes + without_experts.kv_bytes) // max(1, without_experts.slot_bytes)
        idle_slots = min(idle_slots, most_slots - num_slots - lent_slots)
    some = replace(
        without_experts,
        num_slots=num_slots,
        lent_slots=lent_slots,
        idle_slots=idle_slots,
        idle_buffer_bytes=idle_buffer_bytes or 0,
        bookkeeping_bytes=footprint.cache_record_bytes(num_slots + lent_slots + idle_slots)
        if without_experts.most_slots
        else footprint.record_bytes(num_slots, lent_slots + idle_slots),
    )
    # Lent memory is mapped twice: for whoever lends it, and for experts.
    mapped = some.total_bytes - some.held_bytes + (lent_slots + idle_slots) * some.slot_bytes
    return replace(some, page_table_bytes=page_table_bytes(mapped))


def _most_slots(
    with_slots: Callable[[int], MemoryPlan], fewest: MemoryPlan, most_slots: int
) -> MemoryPlan | None:
    """The plan with the most slots that fits; None: not even one with as few as `fewest` has."""
    # Start too high, because a slot also needs records and page tables; then remove slots until it fits.
    slot_bytes = max(1, fewest.slot_bytes)
    slots = min(most_slots, fewest.num_slots + fewest.left_bytes // slot_bytes)
    while (found := with_slots(slots)).left_bytes < 0:
        slots -= -(found.left_bytes // slot_bytes)
        if slots < fewest.num_slots:
            return None
    return found


def _idle_buffer_bytes(
    footprint: ModelFootprint, config: EngineConfig, chunk: int, *, has_media: bool
) -> int:
    """Buffers that steps without prompt tokens leave idle; none if encoders or a draft layer share them."""
    if has_media or footprint.files.num_draft_layers:
        return 0
    decode = config.decode_tokens
    return footprint.buffer_bytes(chunk + decode) - footprint.buffer_bytes(decode)


def in_slots(
    footprint: ModelFootprint, config: EngineConfig, plan: MemoryPlan, *, lends_media: bool = False
) -> MemoryPlan:
    """A plan changed to slots for the fewest experts; what is idle then can be lent.

    Args:
        lends_media: so is the memory for pictures and sounds, which otherwise stays with them.
    """
    has_media = bool(footprint.encoders or footprint.ears_bytes)
    idle_bytes = _idle_buffer_bytes(footprint, config, plan.chunk_tokens, has_media=has_media)
    fewest = min(footprint.num_experts, footprint.config.experts_per_token)
    some = replace(plan, most_slots=footprint.num_experts)
    lent = lendable_bytes(plan.encoder_bytes) // max(1, plan.slot_bytes) if lends_media else 0
    lending = _with_slots(footprint, some, fewest, lent, idle_bytes)
    # Without room even for the records of lent slots, nothing is lent.
    return lending if lending.left_bytes >= 0 else _with_slots(footprint, some, fewest)


def replan(
    footprint: ModelFootprint,
    plan: MemoryPlan,
    budget_bytes: int,
    *,
    kv_bytes: Callable[[int], int],
    fewest_blocks: int,
    most_slots: int,
) -> MemoryPlan:
    """The plan of a running engine in another budget. Experts leave first, then KV blocks; nothing else can change.

    Args:
        plan: the plan that the engine was opened with.
        kv_bytes: gives the size of so many KV blocks.
        fewest_blocks: the need of running and waiting sequences.
        most_slots: limit of all expert slots together.

    Raises:
        DoesNotFit: names the smallest budget that works now.
    """
    idle_bytes = plan.idle_buffer_bytes if plan.idle_slots else None

    def with_blocks(num_blocks: int) -> MemoryPlan:
        tokens = min(plan.context_tokens, num_blocks * KV_BLOCK_TOKENS)
        return replace(
            plan,
            budget_bytes=budget_bytes,
            kv_bytes=kv_bytes(num_blocks),
            context_tokens=tokens,
            most_slots=most_slots,
            num_slots=0,
        )

    def with_slots(some: MemoryPlan, num_slots: int) -> MemoryPlan:
        return _with_slots(footprint, some, num_slots, plan.lent_slots, idle_bytes)

    fewest = min(footprint.num_experts, footprint.config.experts_per_token, most_slots)
    least = with_slots(with_blocks(fewest_blocks), fewest)
    if least.left_bytes < 0:
        raise _too_small_now(least)
    num_blocks, most = fewest_blocks, kv_blocks(plan.context_tokens)
    while num_blocks < most:
        middle = (num_blocks + most + 1) // 2
        if with_slots(with_blocks(middle), fewest).left_bytes < 0:
            most = middle - 1
        else:
            num_blocks = middle
    some = with_blocks(num_blocks)
    found = with_slots(some, fewest)
    return _most_slots(partial(with_slots, some), found, min(footprint.num_experts, most_slots)) or found


def _too_small_now(least: MemoryPlan) -> DoesNotFit:
    parts = "  +  ".join(f"{part.label} {format_bytes(part.nbytes)}" for part in least.parts() if part.nbytes)
    return DoesNotFit(
        f"needs {format_bytes(least.total_bytes)} of memory now, and the budget would be "
        f"{format_bytes(least.budget_bytes)}\n  {parts}",
        hint=f"{_in_mib(least.total_bytes)} works; KV blocks of answers that run or wait cannot leave",
        needed_bytes=least.total_bytes,
        budget_bytes=least.budget_bytes,
        plan=least.as_dict(),
    )


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


def plan_share(
    footprint: ModelFootprint, config: EngineConfig, *, process_bytes: int
) -> tuple[ModelFootprint, MemoryPlan]:
    """Plan a model that shares the budget with others of its process: its floor, with the fewest experts that run.

    Media, context and chunk are those of the model alone in the budget, so they do not depend on other models.

    Args:
        process_bytes: size of the process with everything that its models share.

    Returns:
        The footprint that the plan is for, as `plan_with_media`.

    Raises:
        DoesNotFit: as `plan_memory`.
    """
    footprint, alone = plan_with_media(footprint, config, process_bytes=process_bytes)
    return footprint, in_slots(footprint, config, alone, lends_media=True)


def grown(footprint: ModelFootprint, floor: MemoryPlan, budget_bytes: int) -> MemoryPlan:
    """The plan of a model that gets more than its floor from `plan_share`, before it is opened."""
    return replan(
        footprint,
        floor,
        budget_bytes,
        kv_bytes=lambda num_blocks: floor.kv_bytes,
        fewest_blocks=kv_blocks(floor.context_tokens),
        most_slots=floor.num_experts,
    )


def most_bytes(footprint: ModelFootprint, floor: MemoryPlan) -> int:
    """What a model with this floor could use beyond it: with all experts in memory."""
    return _with_slots(footprint, floor, floor.num_experts).total_bytes - floor.total_bytes


def shared_bytes(footprints: Sequence[ModelFootprint] | None, claims: tuple[Claim, ...]) -> int:
    """The memory of a server with several models, without the models.

    Call it when tokenizers, grammars and headers of all of them are in memory, and before any weights are.

    Args:
        footprints: of the models; None: they are not known yet, and may take anything.
        claims: of the server, and of what it keeps for all models together.
    """
    _native.trim_heap()
    takes_media = footprints is None or any(footprint.encoder_bytes for footprint in footprints)
    takes_video = footprints is None or any(footprint.takes_video for footprint in footprints)
    growth = PROCESS_GROWTH_BYTES + _OTHER_THREADS * THREAD_BYTES
    return (
        held_bytes()
        + growth
        + sum(
            claimed(claims, part, takes_media=takes_media, takes_video=takes_video)
            for part in (PROCESS, *CLAIMED)
        )
    )


def _windows(footprint: ModelFootprint, config: EngineConfig, context: int, chunk: int) -> WindowSizes | None:
    """Blocks of layers with a sliding window; None: they keep every position, as they also do for `kv_dir`.

    A draft layer runs positions that no step has reached, so it also needs every position.
    """
    if not footprint.window or config.kv_dir is not None or config.speculate == "mtp":
        return None
    return window_sizes(
        num_blocks=kv_blocks(context),
        block_tokens=KV_BLOCK_TOKENS,
        window=footprint.window,
        max_sequences=config.max_sequences,
        step_tokens=chunk + config.decode_tokens,
    )


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
    its kind (`experts/hit_rate.py`): what runs recorded has no say, so that a model always has the same plan.
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
    contexts = [min(model.context_tokens, DEFAULT_CONTEXT)]
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
    limits = (resources.address_space_limit(), resources.data_limit())
    if limits == (None, None):
        return
    held = held_bytes()
    _, plan = plan_with_media(footprint, config, process_bytes=held)
    tokenizer_file = footprint.files.path / TOKENIZER_FILE
    json_bytes = tokenizer_file.stat().st_size if tokenizer_file.is_file() else 0
    stacks = (config.threads + config.readers + _OTHER_THREADS) * resources.thread_stack_bytes()
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
    """The memory that the machine and the cgroups of this process allow."""
    return resources.memory_limit().total_bytes


def require_budget(budget_bytes: int) -> None:
    """Check that the machine has the memory.

    Raises:
        DoesNotFit: it has less.
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
    """Check that models that share a budget find it on this machine.

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


def _does_not_fit(
    floor: MemoryPlan, footprint: ModelFootprint, config: EngineConfig, process_bytes: int
) -> DoesNotFit:
    from argosy.checkpoint.pack import quantised_formats

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
    if not quantised_formats(footprint.files):
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


def _remedies(footprint: ModelFootprint, config: EngineConfig) -> list[list[_Remedy]]:
    """Options that make a plan smaller, one list for each kind, the gentlest first."""
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
    footprint: ModelFootprint, config: EngineConfig, process_bytes: int, needed_bytes: int
) -> str | None:
    """The options with which a budget is enough; or else the smallest budget with all of them, if it needs less."""
    kinds = _remedies(footprint, config)
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
