"""A fake engine with the interface that the command line uses; it answers as a test scripts it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace, TracebackType
from typing import Any, ClassVar, Self

from argosy.config import MIB, Grammar, SamplingDefaults, SamplingParams
from argosy.engine.ledger import Ledger
from argosy.engine.media.text_only import TextOnly
from argosy.engine.sequence import Result, TokenEvent
from argosy.model import families as model_families
from argosy.prompt.builder import PromptBuilder
from argosy.prompt.formats import Event, Parser
from argosy.prompt.prompt import Prompt
from tests.families.published import PUBLISHED
from tests.prompt.families import FAMILIES, Family

_QWEN3_30B = next(model.config for model in PUBLISHED if model.name == "Qwen3-30B-A3B")


class FakePlan:
    budget_bytes, total_bytes = 512 * MIB, 300 * MIB
    context_tokens = 256

    def lines(self) -> list[tuple[str, int, str]]:
        return [("dense weights", 200 * MIB, ""), ("expert cache", 100 * MIB, "60 of 240 experts (25 %)")]

    def as_dict(self) -> dict[str, int]:
        return {"budget_bytes": self.budget_bytes, "total_bytes": self.total_bytes}


class FakePrompts:
    """Records each request, then builds and parses as the family's own prompt builder does."""

    takes_messages = True

    def __init__(self, family: Family, asked: list[Any], answer: list[tuple[int, str]]) -> None:
        self.answer = answer  # tokens and their texts
        self._builder: PromptBuilder = family.builder()
        self._asked = asked
        self.built: list[Prompt] = []

    @property
    def tool_calling(self) -> str:
        return self._builder.tool_calling

    def build(self, request: Any, **options: Any) -> Prompt:
        if not options.get("is_counted"):
            self._asked.append([dict(m) for m in request] if isinstance(request, list) else request)
        self.built.append(self._builder.build(request, **options))
        return self.built[-1]

    def grammar(self, prompt: Prompt, *, form: Grammar) -> Grammar | None:
        return self._builder.grammar(prompt, form=form)

    @property
    def variables(self) -> frozenset[str]:
        return self._builder.variables

    def parser(self, prompt: Prompt) -> Parser:
        return self._builder.parser(prompt)

    def remembering(self, memory: object) -> Self:
        return self

    def remember(self, *answer: object) -> None:
        """Each conversation is rendered anew."""

    def begun(self, prompt: Prompt, parser: Parser) -> list[Event]:
        return [event for token in self.answer[: prompt.num_answered] for event in parser.push(*token)]

    def close(self) -> None:
        self._builder.close()


class FakeEngine:
    """Answers every prompt with `answer`, one token per word; `before_token` may raise.

    The model belongs to `family`: a word of `answer` that spells a control token of the family becomes that token.
    """

    answer: Sequence[str] = ("Paris", " is", " it.")
    family: str = "chatml"
    media: Any = TextOnly()
    watch: Any = SimpleNamespace(progress=lambda: None)  # nobody waits for a prompt of this engine
    config = model_families.FAMILIES["qwen3_moe"].parse_config(_QWEN3_30B)
    sampling = SamplingDefaults()
    ends: str = "stop"  # why it stops after `answer`
    before_open: Callable[[], None] = staticmethod(lambda: None)
    before_token: Callable[[int], None] = staticmethod(lambda at: None)
    opened: list[dict[str, Any]]
    recorders: ClassVar[list[Any]] = []
    asked: list[Any]
    params: list[SamplingParams]
    prompts: FakePrompts

    def __init__(
        self, model: object, *, progress: object = None, recorder: object = None, **arguments: Any
    ) -> None:
        self.before_open()
        type(self).recorders.append(recorder)
        type(self).opened.append({"model": model, **arguments})
        self.plan = FakePlan()
        self.prompts = type(self).prompts = FakePrompts(
            FAMILIES[self.family], type(self).asked, list(map(self._token, range(len(self.answer))))
        )
        self.is_open = True

    @classmethod
    def open(cls, model: object, **arguments: Any) -> Self:
        return cls(model, **arguments)

    @property
    def ledger(self) -> Ledger:
        parts = {"router": 0.25, "expert_compute": 0.75}
        return Ledger(prompt_tokens=7, new_tokens=3, wall_s=1.0, time_to_first_token_s=0.5, decode_s=0.5, hits=6,
                      lookups=10, bytes_read=2_500_000_000, peak_bytes=280 * MIB, parts=parts)  # fmt: skip

    def submit(self, prompt: Any, params: SamplingParams, *, adapter: str | None = None) -> SimpleNamespace:
        assert isinstance(prompt, Prompt)
        assert prompt.token_ids
        type(self).params.append(params)
        self.sequence = SimpleNamespace(events=deque(), result=None, at=prompt.num_answered)
        return self.sequence

    def step(self) -> None:
        at = self.sequence.at
        self.before_token(at)
        self.sequence.at += 1
        is_last = self.sequence.at == len(self.answer)
        if is_last:
            self.finish(self.ends)
        token_id, text = self._token(at)
        event = TokenEvent(token_id, text, None, self.ends if is_last else None, self.sequence.result)
        self.sequence.events.append(event)

    def _token(self, at: int) -> tuple[int, str]:
        tokenizer, said = FAMILIES[self.family].tokenizer, self.answer[at]
        control = tokenizer.control_id(said)
        return at if control is None else control, "" if control in tokenizer.hidden_ids else said

    def finish(self, reason: Any) -> None:
        count = self.sequence.at
        usage = {"prompt_tokens": 7, "completion_tokens": count, "total_tokens": 7 + count}
        self.sequence.result = Result(
            "".join(self.answer[:count]), list(range(count)), reason, None, usage, 9, self.ledger
        )

    def cancel(self, sequence: SimpleNamespace) -> None:
        if sequence.result is None:
            self.finish("cancelled")

    def stream(
        self, prompt: Any, params: SamplingParams, *, adapter: str | None = None
    ) -> Iterator[TokenEvent]:
        sequence = self.submit(prompt, params, adapter=adapter)
        while sequence.result is None:
            self.step()
            yield sequence.events.popleft()

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.prompts.close()
        self.is_open = False
