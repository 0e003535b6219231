"""How tokens are chosen, when an answer ends, and the grammar that it must follow."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, Self, get_args

from argosy.config.option import Further, Option
from argosy.config.strict import Strict
from argosy.errors import UsageError

TriggerWord = str | int | tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Trigger:
    """Where an unconstrained answer begins to follow its grammar.

    A word is a text, a token id, or several of both in a row. Text never matches a token that a word names by its id.

    words: the first one to appear in full is the trigger.
    is_part: the grammar begins with the trigger word; otherwise it begins after the word.
    pauses, resumes: from a word in `pauses` to one in `resumes`, trigger words have no effect.
    is_paused: the answer begins paused.
    """

    words: tuple[TriggerWord, ...]
    is_part: bool = False
    pauses: tuple[TriggerWord, ...] = ()
    resumes: tuple[TriggerWord, ...] = ()
    is_paused: bool = False

    def __post_init__(self) -> None:
        if not self.words:
            raise UsageError("a trigger needs a word")
        if any(not word or "" in word for word in map(self.parts_of, self.all_words)):
            raise UsageError("a trigger must hold at least one character, found ''")

    @property
    def all_words(self) -> tuple[TriggerWord, ...]:
        return (*self.words, *self.pauses, *self.resumes)

    @staticmethod
    def parts_of(word: TriggerWord) -> tuple[str | int, ...]:
        return word if isinstance(word, tuple) else (word,)


MAX_GRAMMAR_CHARACTERS = 1 << 17  # including the schemas of all tools
# A schema with this key, inside a Lark grammar, is dropped when it cannot be enforced, as in a lenient grammar.
LENIENT_SCHEMA = "x-argosy-lenient"


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar(Strict):
    """The grammar that an answer must follow.

    With a trigger, the answer is unconstrained until the trigger is complete and follows the grammar from there. A
    special token matches only where a Lark grammar names it, as `<|call|>` or `<[128010]>`.

    is_lenient: schema keywords that cannot be enforced are dropped, and a grammar that takes too much work stops
    constraining its answer. Otherwise both cases are errors.
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
Effort = Literal["low", "medium", "high"]  # of thinking, as the command line and presets spell it
EFFORTS = get_args(Effort)

# Where the options of `SamplingParams` and `Preset` apply.
ENDING = ("max_tokens", *CHOOSING, "seed", "stop")  # run, chat, preset
SAMPLING = (*ENDING, "logit_bias", "logprobs", "ignore_eos")  # run, chat
THINKING = ("thinks", "effort")  # run, chat, preset


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """How a model's tokens are chosen if a request does not say.

    source: the origin of the values; the defaults here are for checkpoints that declare nothing.
    notes: declarations of the checkpoint that have no effect, a sentence each.
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
        """Return the defaults, overridden by an operator's or a preset's values."""
        return replace(self, **given, source=source) if given else self  # type: ignore[arg-type]

    def as_dict(self) -> dict[str, float]:
        """Return the values by field name."""
        return {name: getattr(self, name) for name in CHOOSING}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams(Strict):
    """How the next token is chosen, and when to stop. Zero temperature is greedy: the lowest id wins a tie.

    Parameters built directly are complete, and the same for every model; `asked` leaves the rest to the model.
    """

    # None: to the end of the context; 0: only with prompt_logprobs
    max_tokens: Annotated[
        int | None, Option("-n --max-tokens N", "Most tokens; default: to the context's end.")
    ] = 256
    min_tokens: int = 0  # until this many tokens, no end token, stop token or stop string ends the answer
    temperature: Annotated[float, Option("-t --temperature X", "0 is greedy; default: the model's own.")] = (
        0.0
    )
    # 0: all
    top_k: Annotated[
        int, Option("--top-k", "Sample from the likeliest tokens only.", title="--top-k, --top-p, --min-p N")
    ] = 0
    top_p: Annotated[float, Option("--top-p")] = 1.0
    min_p: Annotated[float, Option("--min-p")] = 0.0
    # Over prompt and answer (CTRL, arXiv:1909.05858).
    repetition_penalty: Annotated[
        float, Further("--repetition-penalty X", "Above 1: repeat less of prompt and answer.")
    ] = 1.0
    # Over the answer, as OpenAI defines them.
    presence_penalty: Annotated[
        float, Further("--presence-penalty X", "Lower logits of tokens in the answer by X.")
    ] = 0.0
    frequency_penalty: Annotated[
        float, Further("--frequency-penalty X", "Lower them by X per occurrence.")
    ] = 0.0
    # None: a random seed, reported in the result.
    seed: Annotated[int | None, Option("--seed N", "Make sampling repeatable.")] = None
    logit_bias: Annotated[
        Mapping[int, float], Further("--logit-bias ID=X", "Add X to the logit of a token.")
    ] = field(default_factory=dict)
    # None: none; n: those of the chosen token and the n best.
    logprobs: Annotated[int | None, Further("--logprobs N", "With --json: N likeliest tokens each step.")] = (
        None
    )
    ignore_eos: Annotated[bool, Further("--ignore-eos", "Continue after the end token.")] = False
    stop: Annotated[Sequence[str], Option("--stop TEXT", "Stop before TEXT; may be repeated.")] = ()
    stop_token_ids: Sequence[int] = ()  # end the answer as an end token does, even with ignore_eos
    # Omit them from the text. The text never includes the token that ends the answer.
    skip_special_tokens: bool = True
    prompt_logprobs: int | None = None  # like logprobs, for every prompt token except the first
    grammar: Grammar | None = None
    watermark: bool = True  # mark sampled tokens, if the engine has a watermark key
    left_to_model: frozenset[str] = (
        frozenset()
    )  # fields, of `CHOOSING`, that get the model's defaults (`fill_in`)

    @classmethod
    def asked(cls, given: Mapping[str, Any]) -> Self:
        """Return parameters with the given fields; other fields of `CHOOSING` are left to the model, and the answer
        may run to the end of the context.

        Raises:
            UsageError: a field is unknown, or its value is out of bounds.
        """
        left = frozenset(CHOOSING) - given.keys()
        return cls.from_mapping({"max_tokens": None, **given, "left_to_model": left})

    def fill_in(self, defaults: SamplingDefaults) -> Self:
        """Return the parameters with the model's defaults for the fields left to it."""
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
    """A model under another name, with defaults for fields that requests leave out.

    model: the full name in the library, `demo` or an absolute path; for a server, the id of its model.
    system: the system message of conversations without one.
    messages: examples that come before every conversation, after its system message: `role` and `content`.
    sampling: fields of `CHOOSING`.
    context: most tokens of prompt and answer together; it never enlarges a context.
    """

    name: str
    model: str
    system: str | None = None
    messages: tuple[Mapping[str, str], ...] = ()
    sampling: Mapping[str, float] = field(default_factory=dict)
    max_tokens: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    context: Annotated[
        int | None,
        Option(
            "--context N", "Most tokens of prompt and answer together.", least=1, completes="context_sizes"
        ),
    ] = None
    thinks: Annotated[
        bool | None, Option("--think/--no-think", "Think first, or not; default: the model's.")
    ] = None
    effort: Annotated[Effort | None, Option("--effort LEVEL", "Think low, medium or high.")] = None

    def __post_init__(self) -> None:
        if self.context is not None and self.context < 1:
            raise UsageError(f"context must be at least 1, found {self.context}")
        if self.thinks is False and self.effort is not None:
            raise UsageError("an effort needs thinking, which is off")
        self.fill_in(SamplingParams.asked({}))  # checks the values

    @property
    def digest(self) -> str:
        """Return the SHA-256 of its effect on requests."""
        return hashlib.sha256(repr(self).encode(errors="surrogatepass")).hexdigest()

    def fill_in(self, params: SamplingParams) -> SamplingParams:
        """Return the parameters of a request, with the preset's values for fields that it does not name."""
        chosen: dict[str, Any] = {
            name: value for name, value in self.sampling.items() if name in params.left_to_model
        }
        left = params.left_to_model - chosen.keys()
        for name in ("max_tokens", "seed", "stop"):
            if getattr(params, name) in (None, ()) and (value := getattr(self, name)) not in (None, ()):
                chosen[name] = value
        return replace(params, **chosen, left_to_model=left) if chosen else params

    def with_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Return a conversation with the preset's examples, and its system message unless the conversation has one."""
        num_first = next(
            (at for at, one in enumerate(messages) if one.get("role") not in _SYSTEM_ROLES), len(messages)
        )
        first = list(messages[:num_first])
        has_own = any(one.get("role") in _SYSTEM_ROLES for one in messages)
        if self.system and not has_own:
            first = [{"role": "system", "content": self.system}]
        return [*first, *self.messages, *messages[num_first:]]


_SYSTEM_ROLES = ("system", "developer")
