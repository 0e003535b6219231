"""How one engine runs: the caller's options, and the complete settings that they become.

Each option is declared once, in `EngineOptions`: its type, its flag, its help and its environment variable. Its
default is that of `EngineConfig`, the complete settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypedDict, get_args

from argosy.config.claims import Claim
from argosy.config.option import Further, Option
from argosy.config.sampling import CHOOSING, SamplingParams
from argosy.config.strict import Strict, require_whole
from argosy.config.units import GIB
from argosy.errors import UsageError

KV_BLOCK_TOKENS = 16  # positions of a KV block
# A server's defaults: sequences in one step, and sequences that may wait.
SERVED_AT_ONCE, SERVED_WAITING = 16, 64
# A watermark prefers tokens by the key and the tokens before them, in a tournament: number of tokens, and of rounds.
WATERMARK_CONTEXT, WATERMARK_DEPTH = 4, 30
DRAFTED_AT_ONCE = 2  # while more sequences run, the engine's own drafters propose nothing
DRAFT_TOKENS = 3  # default limit of proposals per sequence and step
MOST_DRAFT_TOKENS = 64  # beyond this, a step that confirms proposals counts as a prompt
TINY_EN = "tiny.en"  # a Whisper checkpoint that is fetched when it is first used
DEMO = "demo"  # selects the embedded default model; write `./demo` for a directory of that name

# Formats of keys, values and latent vectors. q8: bytes, and a scale for 32 dimensions of a position (kv_layer.h).
KvDtype = Literal["f32", "f16", "q8"]
INSTRUCTION_SETS = ("plain", "avx2", "avx512", "amx")  # in increasing capability
AskAhead = Literal["off", "one_level", "one_level_far", "two_levels"]
Pooling = Literal["mean", "last"]  # how hidden states become the embedding of a text
# The drafter (`engine/drafts/drafter.py`): n-grams of the text, or the checkpoint's layer for multi-token prediction.
Speculate = Literal["off", "lookup", "mtp"]
# How the columns of fused experts' pairs follow each other; slowest: as Unsloth wrote them before 2026-09-17.
ExpertColumns = Literal["expert_fastest", "expert_slowest"]


class Tuning(NamedTuple):
    """How products with the weights of one format run; no result depends on it.

    ask_ahead: how far ahead a product with one token prefetches weights.
    few_ask_ahead: the same for a product with a few tokens; off: it prefetches the next rows as a whole.
    two_panels_from: with AVX-512, the number of tokens from which a tile takes two panels of 16 rows at once, 2 to 9.
    amx_from: the number of tokens from which a product runs on AMX tiles; 0: never.
    """

    ask_ahead: AskAhead
    few_ask_ahead: AskAhead
    two_panels_from: int
    amx_from: int


class WantedAdapter(NamedTuple):
    """An adapter to load. `factor` multiplies its scale; with 0 it has no effect."""

    name: str
    path: Path
    factor: float = 1.0
    columns: ExpertColumns = "expert_fastest"


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget(Strict):
    """The memory that one process may use, interpreter included. The planner adds no hidden margin."""

    ram_bytes: int
    context_tokens: int | None = None  # None: the model's context length, or the most that the budget allows

    def __post_init__(self) -> None:
        require_whole("ram_bytes", self.ram_bytes, 1)
        if self.context_tokens is not None:
            require_whole("context_tokens", self.context_tokens, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class KvDir(Strict):
    """Directory that keeps prompts' keys and values across restarts. They reveal the text: keep it private."""

    path: Path
    ttl_s: float = 7 * 86_400.0  # older files are removed
    max_bytes: int = 16 * GIB  # total of all files; the least recently used are removed first

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        if not self.ttl_s > 0:
            raise UsageError(f"ttl_s must be above zero, found {self.ttl_s}")
        if self.max_bytes < 1:
            raise UsageError(f"max_bytes must be at least 1, found {self.max_bytes}")


FEWEST_IMAGE_TOKENS = 16  # fewer would distort pictures
FEWEST_VIDEO_TOKENS = 16
IMAGE_TOKENS, VIDEO_TOKENS = 1024, 4096  # defaults
MOST_THREADS = 1024  # as native code has it: a higher count is a mistake
MOST_SEQUENCES = 1024


class EngineOptions(TypedDict, total=False):
    """Every option of an engine; `EngineConfig` describes those that are not described here.

    memory: the budget of the whole process: bytes, `8GiB`, `8GB`, `75%`, or a `Budget`. None: free memory less a
        margin (`machine.resources.default_budget`).
    context: positions of the KV cache, shared by all sequences, at most the model's context length; None: the most
        that the budget allows.
    threads: compute threads; None: the fastest number according to `machine.tuning`, at most this process's cores.
    expert_slots: None: what the budget leaves, or a quarter of the demo model's experts if `memory` is also None.
    ears: directory of a Whisper checkpoint, or `tiny.en`, which is fetched once; a model without a tower for sound
        then gets the transcript of a sound.
    kv_dir: a path, or a `KvDir` with its bounds.
    watermark: the file with the watermark's key, from `argosy watermark key`.
    sampling: fields of `config.CHOOSING`, such as `temperature`, that override the checkpoint's.
    loras: adapters by name, each a path or (path, factor); or the texts of `--lora` (`adapters/wanted.py`).
    lora_columns: of all `loras`; `expert_slowest` for those that Unsloth wrote before 2026-09-17.
    mmproj: the file with the vision tower of a GGUF model; None: the only such file in its directory, if there is one.
    speculate: `auto` is `mtp` if the checkpoint has a layer for it, otherwise `lookup`.
    """

    memory: Annotated[
        str | int | Budget | None,
        Option(
            "--memory SIZE",
            "Budget of the whole process: 8GiB, 8GB, 75%.",
            completes="memory_sizes",
            variable="ARGOSY_MEMORY",
        ),
    ]
    context: Annotated[
        int | None, Option("--context N", "Context length in tokens.", least=1, completes="context_sizes")
    ]
    threads: Annotated[
        int | None,
        Option(
            "--threads N",
            "Threads; default: all cores.",
            least=1,
            most=MOST_THREADS,
            variable="ARGOSY_THREADS",
        ),
    ]
    kv_dtype: Annotated[
        KvDtype | None, Further("--kv", "Format of the KV cache; default: f16 for most models.")
    ]
    instruction_set: Annotated[
        str | None,
        Further(
            "--instruction-set NAME",
            "Use plain, avx2, avx512 or amx.",
            completes="instruction_sets",
            variable="ARGOSY_INSTRUCTION_SET",
        ),
    ]
    ask_ahead: Annotated[AskAhead | None, Option(variable="ARGOSY_ASK_AHEAD")]
    tune: Annotated[
        bool, Further("--no-tune", "Skip the start-up benchmark of kernels.", variable="ARGOSY_TUNE")
    ]
    chunk_tokens: int | None
    expert_slots: int | None
    max_sequences: int
    media: Annotated[bool | None, Option("--media/--no-media", "Media, or text only; default: if it fits.")]
    image_tokens: Annotated[
        int, Further("--image-tokens N", f"Most positions of a picture; default {IMAGE_TOKENS}.")
    ]
    video_tokens: Annotated[
        int, Further("--video-tokens N", f"Most positions of a video; default {VIDEO_TOKENS}.")
    ]
    mmproj: Annotated[
        str | Path | None,
        Further("--mmproj FILE", "Vision tower of a GGUF; default: beside it.", completes="files"),
    ]
    ears: Annotated[str | Path | None, Option("--ears PATH", "Transcribe sound: Whisper model or tiny.en.")]
    speculate: Annotated[
        Speculate | Literal["auto"], Further("--speculate", "Propose tokens ahead while it pays; same text.")
    ]
    loras: Annotated[
        Mapping[str, Any], Further("--lora NAME=PATH", "Adapter for requests to name; PATH:0.5 halves it.")
    ]
    lora_columns: Annotated[
        ExpertColumns | None,
        Further("--lora-columns", "Order in fused experts; slowest: Unsloth's before 2026-09-17."),
    ]
    draft_tokens: int
    readers: int
    look_ahead: bool
    experts_off: bool
    max_waiting: int | None
    pooling: Pooling | None
    prefix_reuse: bool
    kv_dir: str | Path | KvDir | None
    watermark: Annotated[
        Path | str | None,
        Further("--watermark FILE", "Key of a watermark in sampled text: docs/guides/responsible-use.md."),
    ]
    sampling: Mapping[str, float]
    grammars: bool
    claims: tuple[Claim, ...]


# Where they apply. Commands that need fewer name them.
SIZING = ("memory", "threads", "context", "kv_dtype", "instruction_set")  # any engine that answers text
RUNNING = (
    *SIZING, "media", "image_tokens", "video_tokens", "mmproj", "ears", "loras", "lora_columns", "speculate", "tune",
)  # fmt: skip


# The least and the most of each; None: no limit but the memory.
_BOUNDS: dict[str, tuple[int, int | None]] = {
    "threads": (1, MOST_THREADS), "chunk_tokens": (1, None), "max_sequences": (1, MOST_SEQUENCES), "readers": (1, None),
    "max_waiting": (0, None), "draft_tokens": (0, MOST_DRAFT_TOKENS), "expert_slots": (0, None),
    "image_tokens": (FEWEST_IMAGE_TOKENS, None), "video_tokens": (FEWEST_VIDEO_TOKENS, None),
}  # fmt: skip
_MAY_BE_NONE = ("chunk_tokens", "max_waiting", "expert_slots")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig(Strict):
    """How one engine runs. Only `kv_dtype`, `instruction_set` and `watermark` can change which tokens come out, and
    `sampling` where a request leaves that to the model.
    """

    budget: Budget
    threads: int
    kv_dtype: KvDtype | None = None  # None: the model's default (`ModelFootprint.kv_dtype`)
    instruction_set: str | None = None  # the most capable one to use; None: the best this processor has
    ask_ahead: AskAhead | None = None  # how products prefetch weights; None: as measured for each format
    tune: bool = True  # run products as measured once on this machine; False: by the defaults
    # Maximum prompt tokens in one step; None: the memory plan decides. Raised to the largest picture for models
    # whose pictures must run in one step.
    chunk_tokens: int | None = None
    expert_slots: int | None = None  # size of the expert cache; None: what the budget leaves
    max_sequences: int = 8  # maximum sequences in one step
    readers: int = 4  # threads that read experts
    # Prefetch guesses of the next layer's experts while the drive is idle and the guesses are right.
    look_ahead: bool = True
    experts_off: bool = False  # leave routed experts out of every sum, only for comparison with a dense base
    # Take pictures, sounds and videos if the model has encoders for them. None: if the budget also has room for that.
    media: bool | None = None
    # Maximum positions of a picture or a group of frames; larger ones are scaled down.
    image_tokens: int = IMAGE_TOKENS
    video_tokens: int = (
        VIDEO_TOKENS  # maximum positions of a video, all frames together; larger ones are scaled down
    )
    ears: Path | None = None  # a Whisper checkpoint that transcribes sound for a model that cannot hear
    speculate: Speculate = "off"  # propose tokens, to confirm several in one step; no answer changes
    draft_tokens: int = 0  # most tokens proposed per sequence and step
    max_waiting: int | None = None  # maximum sequences waiting to run; None: no limit
    pooling: Pooling | None = None  # of embeddings; None: as the checkpoint declares, or the last token
    prefix_reuse: bool = True  # reuse the keys and values of an already computed prefix
    kv_dir: KvDir | None = None  # keep those keys and values here across restarts
    watermark: Path | None = None  # the file with the key of a watermark in sampled text; None: no watermark
    loras: tuple[WantedAdapter, ...] = ()  # adapters that requests may name
    grammars: bool = False  # support grammar-constrained answers; takes memory for the vocabulary
    # Memory of other parts of the process: a server, a recorder of routing, a group.
    claims: tuple[Claim, ...] = ()
    # Fields of `CHOOSING` for requests that leave them to the model: they override the checkpoint's.
    sampling: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, (least, most) in _BOUNDS.items():
            if (value := getattr(self, name)) is not None or name not in _MAY_BE_NONE:
                hint = (
                    "media=False (`--no-media`) takes no pictures at all" if name == "image_tokens" else None
                )
                require_whole(name, value, least, most, hint=hint)
        for name, words in (("speculate", get_args(Speculate)), ("ask_ahead", (None, *get_args(AskAhead)))):
            if (value := getattr(self, name)) not in words:
                raise UsageError(f"unknown {name} '{value}'; known: {', '.join(filter(None, words))}")
        for name, words, said in (
            ("pooling", get_args(Pooling), "mean or last"),
            ("kv_dtype", get_args(KvDtype), "f32, f16 or q8"),
        ):
            if (value := getattr(self, name)) not in (None, *words):
                raise UsageError(f"{name} must be {said}, found '{value}'")
        for name in self.sampling:
            if name not in CHOOSING:
                raise UsageError(f"unknown sampling '{name}'; known: {', '.join(CHOOSING)}")
        SamplingParams.asked(self.sampling)  # checks the values
        if self.speculate != "off" and not self.draft_tokens:
            raise UsageError("draft_tokens must be at least 1 to speculate, found 0")
        if self.kv_dir is not None and not self.prefix_reuse:
            raise UsageError("kv_dir keeps prefixes for reuse, and prefix_reuse is off")

    @property
    def leaves_out_tokens(self) -> bool:
        """Whether the last layers of a model may leave out tokens of prompts (`ModelConfig.reaches`): not with a draft
        layer, which reads the hidden states of all, nor with files, whose blocks any prompt may use.
        """
        return self.kv_dir is None and self.speculate != "mtp"

    @property
    def decode_tokens(self) -> int:
        """The most tokens of decoding sequences in a step: one each, plus proposals."""
        drafted = self.max_sequences
        if self.speculate != "off":
            drafted = min(drafted, DRAFTED_AT_ONCE)
        return self.max_sequences + drafted * self.draft_tokens
