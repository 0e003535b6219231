"""User settings and checkpoint geometry, as frozen and strict values.

The command line and the environment are read in one place and become an `EngineConfig`. A family file turns
`config.json` into a `ModelConfig`. Everything below receives these objects and reads no other configuration.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

from argosy.errors import UsageError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

KV_BLOCK_TOKENS = 16  # positions of a KV block
# A server's defaults: sequences in one step, and others that may wait.
SERVED_AT_ONCE, SERVED_WAITING = 16, 64
# A watermark prefers tokens by the key and this many tokens before them, in a tournament of so many rounds.
WATERMARK_CONTEXT, WATERMARK_DEPTH = 4, 30
DRAFTED_AT_ONCE = 2  # while more sequences run, the engine's own drafters propose nothing
DRAFT_TOKENS = 3  # default limit of proposals per sequence and step
MOST_DRAFT_TOKENS = 64  # beyond this, a step that confirms proposals is a prompt
DEMO = "demo"  # selects the embedded default model; a directory of that name is `./demo`

_MOST_BYTES = 1 << 63
_UNITS = {"": 1, "b": 1, "kib": KIB, "mib": MIB, "gib": GIB, "tib": 1 << 40}
_UNITS |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "k": KIB, "m": MIB, "g": GIB, "t": 1 << 40}

# Formats of keys, values and latent vectors. q8: bytes, and a scale for 32 dimensions of a position (kernel_table.h).
KvDtype = Literal["f32", "f16", "q8"]
AskAhead = Literal["off", "one_level", "one_level_far", "two_levels"]
# How layers for multi-token prediction differ, as vLLM runs them. deepseek: the embedding at position 0 counts as
# zeros, and a draft goes on from its state before the final norm. qwen: neither.
DraftForm = Literal["deepseek", "qwen"]
Pooling = Literal["mean", "last"]  # how hidden states become the embedding of a text
# The drafter (`engine/drafts/drafter.py`): n-grams of the text, or the checkpoint's layer for multi-token prediction.
Speculate = Literal["off", "lookup", "mtp"]
# Storage formats of a weight matrix in memory; native/kernels/formats.h has the layouts.
Format = Literal[
    "f32", "f16", "bf16", "f8",
    "q8", "q4", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k", "q2_k", "q3_k", "iq4_nl", "iq4_xs", "mxfp4",
    "int4",
]  # fmt: skip
FLOAT_FORMATS: frozenset[Format] = frozenset({"f32", "f16", "bf16", "f8"})  # activations stay float32


class Tuning(NamedTuple):
    """How products with the weights of one format run; no result depends on it.

    ask_ahead: how far ahead a product with one token prefetches weights.
    few_ask_ahead: the same of one with a few tokens; off: it prefetches the next rows as a whole.
    two_panels_from: with AVX-512, the tokens from which a tile takes two panels of 16 rows at once, from 2 to 9.
    amx_from: with AMX, the tokens from which a product runs on its tiles; 0: never.
    """

    ask_ahead: AskAhead
    few_ask_ahead: AskAhead
    two_panels_from: int
    amx_from: int


def parse_size(text: str | int, *, total_bytes: int | None = None) -> int:
    """Turn `8GiB`, `8GB`, `512M`, `4096B`, `75%` or an integer number of bytes into bytes.

    A percentage is relative to `total_bytes`, the memory that the machine or its cgroup allows.

    Raises:
        UsageError: `text` is not a size, is not above zero, is 8 EiB or more, has no unit, or is a percentage and there
            is no total.
    """
    size: float
    if isinstance(text, int):
        size = text
    elif match := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(%|[a-zA-Z]*)", text.strip()):
        number, unit = float(match[1]), match[2].lower()
        if unit == "%":
            if total_bytes is None:
                raise UsageError(f"'{text}' is a percentage, and the total is unknown here")
            if number > 100:
                raise UsageError(f"'{text}' is more than all of the memory; the maximum is 100%")
            size = total_bytes * number / 100
        elif not unit and number:
            shown = match[1][:40]
            raise UsageError(
                f"'{shown}' has no unit", hint=f"write {shown}GiB, {shown}MiB, or {shown}B for bytes"
            )
        elif unit in _UNITS:
            size = number * _UNITS[unit]
        else:
            raise UsageError(f"unknown unit '{match[2]}' in '{text}'; known: KiB MiB GiB TiB KB MB GB TB %")
    else:
        raise UsageError(f"'{text}' is not a size", hint="write 8GiB, 8GB or 75%")
    if not 1 <= size < _MOST_BYTES:
        shown = str(text)[:40]
        raise UsageError(f"a size must be at least 1 byte and less than 8 EiB, found '{shown}'")
    return int(size)


def parse_seconds(text: str) -> float:
    """Turn `90s`, `10m`, `1.5h`, `30d` or a plain number of seconds into seconds.

    Raises:
        UsageError: `text` is not a time, or is not above zero.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([smhd]?)", text.strip())
    units = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}
    seconds = 0.0 if match is None else float(match[1]) * units[match[2]]
    if not 0 < seconds < float("inf"):
        raise UsageError(f"'{text}' is not a time above zero", hint="write 90s, 10m, 1h or 30d")
    return seconds


def format_bytes(count: float) -> str:
    """Format a memory size for people: `16.5 GiB`, `310 MiB`, `12 KiB`, `0 B`."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(count) >= size:
            value = count / size
            return f"{value:.1f} {unit}" if value < 100 else f"{value:.0f} {unit}"
    return f"{count:.0f} B"


def disk_size(nbytes: int) -> str:
    """Bytes on a drive or a line, in its own units: `18.6 GB`, `271 MB`, `4 kB`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            value = nbytes / size
            return f"{value:.1f} {unit}" if unit == "GB" and value < 1000 else f"{value:.0f} {unit}"
    return f"{nbytes} bytes"


def counted(number: int, noun: str, nouns: str | None = None) -> str:
    """A number with its noun: `1 expert`, `3 experts`. `nouns` is a plural that does not end in an s alone."""
    return f"{number} {noun}" if number == 1 else f"{number} {nouns or noun + 's'}"


class _Strict:
    """Adds `from_mapping` to a dataclass; it rejects misspelt keys."""

    @classmethod
    def from_mapping(cls, values: Mapping[str, object]) -> Self:
        known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        for key in values:
            if key not in known:
                raise UsageError(f"unknown setting '{key}'; known: {', '.join(known)}")
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget(_Strict):
    """Memory that one process may use, interpreter included. The planner adds no hidden margin."""

    ram_bytes: int
    context_tokens: int | None = None  # None: the model's context length, or as much as the budget allows

    def __post_init__(self) -> None:
        if self.ram_bytes <= 0:
            raise UsageError(f"ram_bytes must be above zero, found {self.ram_bytes}")
        if self.context_tokens is not None and self.context_tokens < 1:
            raise UsageError(f"context_tokens must be at least 1, found {self.context_tokens}")


@dataclass(frozen=True, slots=True, kw_only=True)
class KvDir(_Strict):
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


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig(_Strict):
    """How one engine runs. Only `kv_dtype`, `instruction_set` and `watermark` can change which tokens come out, and
    `sampling` where a request leaves that to the model.
    """

    budget: Budget
    threads: int
    kv_dtype: KvDtype | None = None  # None: what suits the model (`ModelFootprint.kv_dtype`)
    instruction_set: str | None = None  # the most capable one to use; None: the best this processor has
    ask_ahead: AskAhead | None = None  # how products prefetch weights; None: as measured for each format
    tune: bool = True  # run products as measured on this machine, once; False: as the defaults say
    # Maximum prompt tokens in one step; None: the memory plan decides. It is raised for models whose pictures have to
    # run in one step, to the largest picture.
    chunk_tokens: int | None = None
    expert_slots: int | None = None  # size of the expert cache; None: what the budget leaves
    max_sequences: int = 8  # maximum sequences in one step
    readers: int = 4  # threads that read experts
    # Prefetch guesses of the next layer's experts while the drive is idle and the guesses are right.
    look_ahead: bool = True
    experts_off: bool = False  # leave routed experts out of every sum, only to compare with a dense base
    # Take pictures, sounds and videos if the model has encoders for them. None: if the budget has room for that, too.
    media: bool | None = None
    # Maximum positions of a picture or a group of frames; larger ones are scaled down.
    image_tokens: int = 1024
    video_tokens: int = 4096  # maximum positions of a video, all frames together; larger ones are scaled down
    ears: Path | None = None  # a Whisper checkpoint, which transcribes sound for a model that takes none
    speculate: Speculate = "off"  # propose tokens, to confirm several in one step; no answer changes
    draft_tokens: int = 0  # most tokens that are proposed per sequence and step
    max_waiting: int | None = None  # maximum sequences waiting to run; None: no limit
    pooling: Pooling | None = None  # for embeddings; None: as the checkpoint declares, or else the last token
    prefix_reuse: bool = True  # reuse the keys and values of a prefix that was computed before
    kv_dir: KvDir | None = None  # keep those keys and values here across restarts
    watermark: Path | None = None  # the file with the key of a watermark in sampled text; None: there is none
    grammars: bool = False  # support grammar-constrained answers; takes memory for the vocabulary
    replay_bytes: int = 0  # memory for answers kept until their conversation continues; 0: keep none
    request_bytes: int = 0  # memory for requests that a server reads and renders; 0: there is no server
    record_bytes: int = 0  # memory for counts of routing; 0: nothing is recorded
    group_bytes: int = 0  # memory for connections to workers that run experts; 0: there are none
    # Fields of `CHOOSING`, for requests that leave them to the model: they replace what the checkpoint says.
    sampling: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_waiting is not None and self.max_waiting < 0:
            raise UsageError(f"max_waiting must be at least 0, found {self.max_waiting}")
        for name in ("replay_bytes", "request_bytes", "record_bytes", "group_bytes", "draft_tokens"):
            if (found := getattr(self, name)) < 0:
                raise UsageError(f"{name} must be at least 0, found {found}")
        for name in self.sampling:
            if name not in CHOOSING:
                raise UsageError(f"unknown sampling '{name}'; known: {', '.join(CHOOSING)}")
        SamplingParams.asked(self.sampling)  # checks the values
        if self.image_tokens < FEWEST_IMAGE_TOKENS:
            raise UsageError(
                f"image_tokens must be at least {FEWEST_IMAGE_TOKENS}, found {self.image_tokens}",
                hint="media=False (`--no-media`) takes no pictures at all",
            )
        if self.video_tokens < FEWEST_VIDEO_TOKENS:
            raise UsageError(
                f"video_tokens must be at least {FEWEST_VIDEO_TOKENS}, found {self.video_tokens}"
            )
        if self.speculate not in get_args(Speculate):
            known = ", ".join(get_args(Speculate))
            raise UsageError(f"unknown speculate '{self.speculate}'; known: {known}")
        if self.speculate != "off" and not self.draft_tokens:
            raise UsageError("draft_tokens must be at least 1 to speculate, found 0")
        if self.draft_tokens > MOST_DRAFT_TOKENS:
            raise UsageError(f"draft_tokens must be at most {MOST_DRAFT_TOKENS}, found {self.draft_tokens}")
        if self.pooling not in (None, *get_args(Pooling)):
            raise UsageError(f"pooling must be mean or last, found '{self.pooling}'")
        if self.kv_dir is not None and not self.prefix_reuse:
            raise UsageError("kv_dir keeps prefixes for reuse, and prefix_reuse is off")
        for name in ("threads", "chunk_tokens", "max_sequences", "readers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, found {value}")
        if self.ask_ahead not in (None, *get_args(AskAhead)):
            known = ", ".join(get_args(AskAhead))
            raise UsageError(f"unknown ask_ahead '{self.ask_ahead}'; known: {known}")
        if self.kv_dtype not in (None, *get_args(KvDtype)):
            raise UsageError(f"kv_dtype must be f32, f16 or q8, found '{self.kv_dtype}'")

    @property
    def decode_tokens(self) -> int:
        """Most tokens of decoding sequences in a step: one each, and the proposals after it."""
        drafted = self.max_sequences
        if self.speculate != "off":
            drafted = min(drafted, DRAFTED_AT_ONCE)
        return self.max_sequences + drafted * self.draft_tokens


@dataclass(frozen=True, slots=True)
class Trigger:
    """Where an unconstrained answer begins to follow its grammar. A word is a text or a token id.

    words: the first one to appear in full is the trigger.
    is_part: the grammar begins with the trigger word; otherwise it begins after the word.
    pauses, resumes: from a word in `pauses` to one in `resumes`, trigger words have no effect.
    is_paused: the answer begins paused.
    """

    words: tuple[str | int, ...]
    is_part: bool = False
    pauses: tuple[str | int, ...] = ()
    resumes: tuple[str | int, ...] = ()
    is_paused: bool = False

    def __post_init__(self) -> None:
        if not self.words:
            raise UsageError("a trigger needs a word")
        if "" in self.all_words:
            raise UsageError("a trigger must hold at least one character, found ''")

    @property
    def all_words(self) -> tuple[str | int, ...]:
        return (*self.words, *self.pauses, *self.resumes)


MAX_GRAMMAR_CHARACTERS = 1 << 17  # including the schemas of all tools
# A schema with this key, inside a Lark grammar, is dropped when it cannot be enforced, as in a lenient grammar.
LENIENT_SCHEMA = "x-argosy-lenient"


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar(_Strict):
    """The form that an answer must have.

    With a trigger, the answer is unconstrained until the trigger is complete and follows the grammar from there. A
    special token matches only where a Lark grammar names it, as `<|call|>` or `<[128010]>`.

    is_lenient: schema keywords that cannot be enforced are dropped, and a grammar that takes too much work stops
    constraining its answer. Otherwise both are errors.
    """

    kind: Literal["json_object", "json_schema", "regex", "lark"]
    text: str = ""  # the schema as JSON, the regular expression, or the Lark grammar with a rule `start`
    trigger: Trigger | None = None
    is_lenient: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("json_object", "json_schema", "regex", "lark"):
            raise UsageError(
                f"unknown kind of grammar '{self.kind}'; known: json_object, json_schema, regex, lark"
            )
        if (self.kind == "json_object") != (not self.text):
            raise UsageError(f"a grammar of kind '{self.kind}' needs {'no' if self.text else 'a'} text")


# The fields that choose a token: a checkpoint has defaults for them, an operator may set others, a request decides.
CHOOSING = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip
EFFORTS = ("low", "medium", "high")  # of thinking, in the words of the command line and of presets


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """How a model's tokens are chosen where a request does not say.

    source: where the values are from; those here are for checkpoints that say nothing.
    notes: what the checkpoint asks for and does not get, a sentence each.
    """

    # llama.cpp's defaults, which suit most chat models (docs/decisions/0088).
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    source: str = "Argosy: the checkpoint says nothing"
    notes: tuple[str, ...] = ()

    def overridden(
        self, given: Mapping[str, float], source: str = "this server's options"
    ) -> SamplingDefaults:
        """The defaults with the values of an operator or a preset."""
        return replace(self, **given, source=source) if given else self  # type: ignore[arg-type]

    def as_dict(self) -> dict[str, float]:
        """The values, by the name of their field."""
        return {name: getattr(self, name) for name in CHOOSING}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams(_Strict):
    """How the next token is chosen, and when to stop. Zero temperature is greedy: the lowest id wins a tie.

    Built directly, it is complete, and the same for every model; `asked` leaves the rest to the model.
    """

    max_tokens: int | None = 256  # None: to the end of the context; 0: only with prompt_logprobs
    min_tokens: int = 0  # until this many tokens, no end token, stop token or stop string ends the answer
    temperature: float = 0.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and answer (CTRL, arXiv:1909.05858)
    presence_penalty: float = 0.0  # over the answer, as OpenAI defines it
    frequency_penalty: float = 0.0
    seed: int | None = None  # None: a random seed, reported in the result
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None  # None: none; n: those of the chosen token and the n best
    ignore_eos: bool = False
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()  # end the answer as an end token does, even with ignore_eos
    # Omit them from the text. The text never includes the token that ends the answer.
    skip_special_tokens: bool = True
    prompt_logprobs: int | None = None  # like logprobs, for every prompt token except the first
    grammar: Grammar | None = None
    watermark: bool = True  # mark what is sampled, if the engine has a key for that
    left_to_model: frozenset[str] = (
        frozenset()
    )  # fields, of `CHOOSING`, that get the model's defaults (`fill_in`)

    @classmethod
    def asked(cls, given: Mapping[str, Any]) -> Self:
        """Parameters with the given fields; `CHOOSING` is left to the model where they do not say, and the answer goes
        on to the end of the context.

        Raises:
            UsageError: a field is unknown, or its value is out of bounds.
        """
        left = frozenset(CHOOSING) - given.keys()
        return cls.from_mapping({"max_tokens": None, **given, "left_to_model": left})

    def fill_in(self, defaults: SamplingDefaults) -> Self:
        """The parameters with the model's defaults for what was left to it."""
        if not self.left_to_model:
            return self
        chosen = {name: getattr(defaults, name) for name in self.left_to_model}
        return replace(self, **chosen, left_to_model=frozenset())

    def __post_init__(self) -> None:
        least = 1 if self.prompt_logprobs is None else 0
        checks = (
            ("max_tokens", self.max_tokens is None or self.max_tokens >= least, f"at least {least}"),
            ("min_tokens", self.min_tokens >= 0, "at least 0"),
            ("temperature", 0 <= self.temperature <= 100, "from 0 to 100"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty <= 100, "above 0, at most 100"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "from -2 to 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "from -2 to 2"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= 20, "from 0 to 20"),
            (
                "prompt_logprobs",
                self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= 20,
                "from 0 to 20",
            ),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "from 0 to 2^63 - 1"),
        )
        for name, holds, wanted in checks:
            if not holds:
                raise UsageError(f"{name} must be {wanted}, found {getattr(self, name)}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise UsageError(
                f"min_tokens must be at most max_tokens; {self.min_tokens} is more than {self.max_tokens}"
            )
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if any(not stop for stop in self.stop):
            raise UsageError("a stop string must hold at least one character, found ''")
        if self.grammar is not None and self.ignore_eos:
            raise UsageError(
                "ignore_eos cannot be used with a grammar: the grammar decides when the answer ends"
            )
        for token_id, bias in self.logit_bias.items():
            if not -100 <= bias <= 100:
                raise UsageError(f"logit_bias must be from -100 to 100, found {bias} for token {token_id}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A model under another name, with defaults for requests that do not say.

    model: the whole name in the library, `demo` or an absolute path; for a server, the id of its model.
    system: for conversations without a system message of their own.
    messages: examples that come before every conversation, after its system message: `role` and `content`.
    sampling: fields of `CHOOSING`.
    context: most tokens of prompt and answer together; it makes no context larger.
    """

    name: str
    model: str
    system: str | None = None
    messages: tuple[Mapping[str, str], ...] = ()
    sampling: Mapping[str, float] = field(default_factory=dict)
    max_tokens: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    context: int | None = None
    thinks: bool | None = None
    effort: str | None = None

    def __post_init__(self) -> None:
        if self.context is not None and self.context < 1:
            raise UsageError(f"context must be at least 1, found {self.context}")
        if self.thinks is False and self.effort is not None:
            raise UsageError("an effort needs thinking, which is off")
        self.fill_in(SamplingParams.asked({}))  # checks the values

    @property
    def digest(self) -> str:
        """SHA-256 of what it does to requests."""
        return hashlib.sha256(repr(self).encode(errors="surrogatepass")).hexdigest()

    def fill_in(self, params: SamplingParams) -> SamplingParams:
        """The parameters of a request, with the preset's for those that it does not name."""
        chosen: dict[str, Any] = {
            name: value for name, value in self.sampling.items() if name in params.left_to_model
        }
        left = params.left_to_model - chosen.keys()
        for name in ("max_tokens", "seed", "stop"):
            if getattr(params, name) in (None, ()) and (value := getattr(self, name)) not in (None, ()):
                chosen[name] = value
        return replace(params, **chosen, left_to_model=left) if chosen else params

    def with_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """A conversation with the preset's system message, unless it has one, and examples."""
        num_first = next(
            (at for at, one in enumerate(messages) if one.get("role") not in _SYSTEM_ROLES), len(messages)
        )
        first = list(messages[:num_first])
        has_own = any(one.get("role") in _SYSTEM_ROLES for one in messages)
        if self.system and not has_own:
            first = [{"role": "system", "content": self.system}]
        return [*first, *self.messages, *messages[num_first:]]


_SYSTEM_ROLES = ("system", "developer")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: dimension pair j at position p turns by p * inverse_frequency(j)."""

    theta: float
    rotary_dim: int  # only the first rotary_dim dimensions of head_dim rotate
    is_interleaved: bool = False  # dimension 2 i turns with 2 i + 1, not with i + rotary_dim / 2
    # Positions in media have axes (time, row, column); the axis of each dimension pair. Empty: 0 for every pair.
    axes: tuple[int, ...] = ()
    kind: Literal["default", "linear", "dynamic", "yarn", "llama3", "proportional"] = "default"
    factor: float = 1.0
    turning_pairs: int | None = None  # proportional: only the first of the pairs turn; None: all of them
    original_context: int = 0  # positions the model was trained on, before scaling
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn: None computes 0.1 ln(factor) + 1
    mscale: float | None = None  # yarn, DeepSeek's variant
    mscale_all_dim: float | None = None
    truncate: bool = True  # yarn: whole-number correction range
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    # Each pair's frequency is divided by its factor, before the rule of `kind` applies.
    frequency_factors: tuple[float, ...] = ()

    @property
    def num_axes(self) -> int:
        """Axes of a position: time, row and column, or one."""
        return 3 if self.axes else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """How experts are chosen: scores, choice, then routing weights (native/kernels/route.h)."""

    score: Literal["softmax", "sigmoid"] = "softmax"
    has_bias: bool = False  # the router's product has a bias: `router_bias`
    has_choice_bias: bool = False  # a bias on scores for the choice, not for the weights: `choice_bias`
    num_groups: int = 1  # experts form this many groups of equal size
    kept_groups: int = 1  # experts are chosen only from this many best groups
    group_score: Literal["max", "top2"] = "top2"  # a group's score: its best, or the sum of its best two
    renormalize: bool = True  # a token's routing weights sum to one
    renormalize_eps: float = 0.0  # added to the divisor of the renormalization
    scale: float = 1.0  # multiplies the routing weights, last
    # Each expert has a factor for its routing weight, after `scale`: `expert_scale`.
    has_expert_scale: bool = False
    # The router reads the hidden state after its own RMSNorm, whose weight is `router_norm` / sqrt(hidden_size).
    has_norm: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationConfig:
    """The activation between an expert's gate and up products and its down product.

    silu: silu(gate) * up.
    clamped (gpt-oss): gate * sigmoid(alpha * gate) * (up + 1), with gate clamped to at most `limit` and up
    to -limit..limit.
    gelu_tanh: gelu(gate) * up, with gelu in its form with tanh (arXiv:1606.08415).
    """

    kind: Literal["silu", "clamped", "gelu_tanh"] = "silu"
    limit: float = 0.0
    alpha: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values share a compressed vector."""

    query_rank: int  # 0: queries are not compressed
    kv_rank: int
    nope_dim: int  # query and key dimensions of a head that do not rotate
    rope_dim: int  # those that rotate; all heads share the key's
    value_dim: int
    norm_eps: float  # for the norms of the compressed vectors
    is_up_split: bool = False  # the file holds k_up (transposed head by head) and v_up instead of kv_up


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaConfig:
    """A gated delta net (arXiv:2412.06464): a state per sequence instead of keys and values."""

    num_key_heads: int
    num_value_heads: int
    key_dim: int  # per head
    value_dim: int
    conv_width: int  # positions that the causal convolution sees
    has_joined_qkvz: bool = False  # one matrix holds q, k, v and z of each key head in turn
    has_joined_ba: bool = False  # the same for b and a
    # Value head i uses key head i % num_key_heads, not i // (num_value_heads / num_key_heads).
    is_tiled: bool = False
    is_rate_log: bool = True  # the decay rate is stored as log(-rate)

    @property
    def key_channels(self) -> int:
        return self.num_key_heads * self.key_dim

    @property
    def value_channels(self) -> int:
        return self.num_value_heads * self.value_dim

    @property
    def conv_channels(self) -> int:
        """q, k and v of all heads."""
        return 2 * self.key_channels + self.value_channels

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """The tuple that `_native` takes."""
        return self.num_key_heads, self.num_value_heads, self.key_dim, self.value_dim, self.conv_width


MixerKind = Literal["attention", "latent", "delta"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerConfig:
    """The settings that differ from layer to layer."""

    is_moe: bool
    mixer: MixerKind = "attention"
    sliding_window: int = 0  # 0: full attention
    num_kv_heads: int = 0  # 0: the model's
    head_dim: int = 0  # 0: the model's
    rope: RopeConfig | None = None  # None: the model's
    keys_are_values: bool = False  # there is no v: the keys, before their norm, are the values
    is_causal: bool = False  # also in media spans, no position sees a later one


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A checkpoint's geometry and flags, in Argosy's vocabulary."""

    family: str
    vocab_size: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerConfig, ...]
    rope: RopeConfig
    norm_eps: float
    context_tokens: int  # the longest sequence the model supports
    num_experts: int
    experts_per_token: int
    expert_width: int
    router: RouterConfig
    activation: ActivationConfig = ActivationConfig()  # for all feed-forward networks
    latent: LatentConfig | None = None  # for layers whose mixer is "latent"
    delta: DeltaConfig | None = None  # for layers whose mixer is "delta"
    attention_scale: float = 0.0  # factor of attention scores; 0: 1 / sqrt(head_dim)
    dense_width: int = 0  # FFN width of layers without routed experts
    shared_width: int = 0  # FFN width of the always-on shared expert; 0: none
    shared_is_gated: bool = False  # the shared expert's output is multiplied by sigmoid(shared_score . x)
    has_qkv_bias: bool = False
    has_o_bias: bool = False
    # RMSNorm before rotary: none, over each head, or over all heads at once.
    qk_norm: Literal["none", "head", "flat"] = "none"
    qkv_limit: float = 0.0  # q, k and v are clamped to -limit..limit; 0: not clamped
    has_value_norm: bool = False  # RMSNorm without a weight over each head of v
    has_sinks: bool = False  # a learnt score per head that takes attention weight and adds nothing: `sinks`
    # Each head's output is multiplied by the sigmoid of its gate; q has rows for both, head by head.
    has_output_gate: bool = False
    has_expert_bias: bool = False  # gate, up and down of routed experts have biases
    # RMSNorm of what the mixer, and what the feed-forward networks, add: `attn_post_norm`, `mlp_post_norm`.
    has_post_norms: bool = False
    # Routed experts have their own norms before and after, the shared expert has its own after: `expert_norm`,
    # `expert_post_norm`, `shared_post_norm`.
    has_expert_norms: bool = False
    has_layer_scale: bool = False  # a factor of the hidden state after each layer: `layer_scale`
    embedding_scale: float = 1.0  # factor of the embeddings of tokens
    logit_cap: float = 0.0  # logits become cap * tanh(logit / cap); 0: they stay
    norm_offset: float = 0.0  # added to stored norm weights: 1 where they are zero-centred
    is_embedding_tied: bool = False  # the head is the embedding table
    draft_form: DraftForm = "deepseek"
    num_mtp_layers: int = 0  # for multi-token prediction, after `layers` in the files; speculation reads one
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def delta_layers(self) -> tuple[int, ...]:
        """Layers with a recurrent state."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.mixer == "delta")

    def kv_heads_of(self, layer: int) -> int:
        return self.layers[layer].num_kv_heads or self.num_kv_heads

    def head_dim_of(self, layer: int) -> int:
        return self.layers[layer].head_dim or self.head_dim

    def rope_of(self, layer: int) -> RopeConfig:
        return self.layers[layer].rope or self.rope

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """The different rotary embeddings of the layers."""
        return tuple(dict.fromkeys(self.rope_of(layer) for layer in range(self.num_layers)))

    @property
    def head_name(self) -> str:
        """The dense matrix that turns hidden states into logits."""
        return "embed" if self.is_embedding_tied else "head"

    @property
    def mtp_layers(self) -> range:
        """Layers for multi-token prediction, which files number after the model's own."""
        return range(self.num_layers, self.num_layers + self.num_mtp_layers)

    @property
    def draft_only(self) -> ModelConfig:
        """The first layer for multi-token prediction, with its number: it is like the last one with such a mixer."""
        alike = (one for one in reversed(self.layers) if one.is_moe and one.mixer != "delta")
        layer = next(alike, LayerConfig(is_moe=True))
        return replace(self, layers=(*(LayerConfig(is_moe=False),) * self.num_layers, layer))

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(i for i, layer in enumerate(self.layers) if layer.is_moe)
