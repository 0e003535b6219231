"""A speaking model: a real model that answers by script. Only the logits of the next scripted token are raised.

    "#weather" in the conversation  ->  SCRIPTS["#weather"]  ->  its tokens, one by one, as far as a grammar allows

The last key in the conversation counts. Without a key the model babbles, because its weights are random. Grammars,
sampling, stop strings, parsing, scheduling and HTTP do not know about the script. Run as a program, this module is
`argosy` with such a model, made for as many positions as `--context` says:

    python -m tests.serve.speaking serve DIRECTORY --memory 1GiB --port 8080

The variable SPEAKING_TOKENS_PER_S slows the model down and makes it tell the tokens of each step on stderr, unless that
is a terminal. SPEAKING_SCRIPTS may name a JSON file with more scripts. A script that is a list holds one answer for
each turn after its key: for example a call, and then the answer to its result.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

from argosy.engine import answers, requests
from argosy.engine.sampler import Sampler, SamplerState
from argosy.engine.watermark import MarkedAnswer
from argosy.errors import GrammarError
from argosy.model.model import Model
from tests.models.tiny import qwen3_moe, write_model
from tests.prompt.families import FAMILIES
from tests.prompt.tokenizers_for_tests import write_tokenizer

FAMILY = FAMILIES["qwen3"]
CONTEXT_TOKENS = 2048
END = "<|im_end|>"


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


OSLO, ROME = '{"city": "Oslo"}', '{"city": "Rome", "days": 2}'
Script = str | Sequence[str]
SCRIPTS: dict[str, Script] = {
    "#plain": "It is well, thank you.",
    "#think": "<think>\nLet me see.\n</think>\n\nIt is well.",
    "#weather": f"Let me look.\n{call('get_weather', OSLO)}\n{call('get_weather', ROME)}",
    "#interleaved": "First.\n<think>\nHm.\n</think>\n\nSecond.\n<think>\nHm again.\n</think>\n\nThird.",
    "#thoughtful": f"<think>\nTwo cities.\n</think>\n\n{call('get_weather', OSLO)}\n{call('get_weather', ROME)}",
    "#wrong": call("get_weather", '{"town": "Oslo"}'),  # the tool has no parameter of this name
    "#reply": call("Reply", '{"answer": 42}'),
    "#json": '{"answer": 42}',
    "#sunny": "It is sunny in both.",
    "#quote": 'He said "é🙂" and left.',
    "#long": "word " * 400,
    "#empty": "",
    "#fail": "It is",  # then the answer fails
    "#greet": "I wrote to <EMAIL_1> and called <PHONE_1>; <EMAIL_9> is nobody.",
    "#mail": call("get_weather", '{"city": "<EMAIL_1>"}'),
    "#moon": "Tonight there is a Blue  Moon in the sky, they say.",
    "#lunar": "Well.\n" + call("get_weather", '{"city": "blue moon"}'),
    "#own": "Ask ann@example.org or anyone else in the office.",
    "#unsafe": "unsafe\nS1",
    "#safe": "safe",
    "#odd": "I am not sure.",
    "#kind": "Water it every day. #safe",
    "#harm": "Do it like this. #unsafe",
}
# What guard models say of good and bad texts, by their form, and answers to judge.
VERDICTS = {
    "llama-guard": ("safe", "unsafe\nS1"),
    "qwen3guard": ("Safety: Safe\nCategories: None", "Safety: Unsafe\nCategories: Violent"),
    "granite-guardian": ("No", "Yes"),
    "gpt-oss-safeguard": (
        '{"violation": 0, "policy_category": null}',
        '{"violation": 1, "policy_category": "H2.f"}',
    ),
}
for _form, (_good, _bad) in VERDICTS.items():
    SCRIPTS |= {
        f"#good-{_form}": _good,
        f"#bad-{_form}": _bad,
        f"#kind-{_form}": f"Water it. #good-{_form}",
        f"#harm-{_form}": f"Do it like this. #bad-{_form}",
    }

WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "Weather of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
}
ANSWER_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"answer": {"type": "integer"}},
    "required": ["answer"],
    "additionalProperties": False,
}


def write_speaking_model(directory: Path, context_tokens: int = CONTEXT_TOKENS) -> Path:
    config = qwen3_moe(
        vocab_size=512, max_position_embeddings=context_tokens, eos_token_id=FAMILY.tokenizer.eos_ids[0]
    )
    write_model(directory, config, seed=3)
    more: dict[str, object] = {"eos_token": END, "chat_template": FAMILY.template}
    return write_tokenizer(directory, FAMILY.tokenizer._core.to_str(), more)


def _last_key(text: str, scripts: Mapping[str, Script]) -> str | None:
    at, key = max((text.rfind(key), key) for key in scripts)
    return key if at >= 0 else None


def _answer(text: str, scripts: Mapping[str, Script]) -> tuple[str | None, str]:
    """The last key in `text`, and the answer that is due."""
    key = _last_key(text, scripts)
    if key is None:
        return None, ""
    script = scripts[key]
    if isinstance(script, str):
        return key, script
    # The prompt ends with an assistant turn that is still empty.
    num_said = text.count("<|im_start|>assistant", text.rindex(key)) - 1
    return key, script[min(num_said, len(script) - 1)]


def speaking(more: Mapping[str, Script] | None = None) -> ExitStack:
    """While this is entered, engines in this process answer by script; `more` adds scripts to SCRIPTS."""
    tokenizer, stack, scripts = FAMILY.tokenizer, ExitStack(), {**SCRIPTS, **(more or {})}

    class ScriptedState(SamplerState):
        def __init__(
            self, prompt_ids: Sequence[int], seed: int | None = None, mark: MarkedAnswer | None = None
        ) -> None:
            super().__init__(prompt_ids, seed, mark)
            key, answer = _answer(tokenizer.decode(list(prompt_ids), keep_special=True), scripts)
            self.fails = key == "#fail"
            end = "" if self.fails else END
            self.script = tokenizer.encode_segments([(False, answer + end)]) if key else []

    class ScriptedSampler(Sampler):
        def sample(self, logits: Any, params: Any, state: Any, constraint: Any = None) -> Any:
            if state.step < len(state.script):
                # A small push suffices for greedy and keeps log-probabilities below zero; sampling needs more.
                logits = logits.copy()
                logits[state.script[state.step]] = logits.max() + (30.0 if params.temperature > 0 else 2.0)
            elif state.fails:
                raise GrammarError("the grammar cannot be followed")
            return super().sample(logits, params, state, constraint)

    stack.enter_context(mock.patch.object(requests, "SamplerState", ScriptedState))
    stack.enter_context(mock.patch.object(answers, "Sampler", ScriptedSampler))
    if rate := os.environ.get("SPEAKING_TOKENS_PER_S"):
        stack.enter_context(_slowed(float(rate)))
    return stack


def _slowed(tokens_per_s: float) -> Any:
    """While this is entered, a step takes as long as at this rate."""
    forward = Model.forward

    def slowly(self: Model, step: Any, *arguments: Any, **options: Any) -> Any:
        time.sleep(step.num_tokens / tokens_per_s)
        if not sys.stderr.isatty():
            print(f"computed {step.num_tokens} tokens", file=sys.stderr, flush=True)
        return forward(self, step, *arguments, **options)

    return mock.patch.object(Model, "forward", slowly)


if __name__ == "__main__":
    from argosy.cli.main import main

    arguments = sys.argv[1:]
    if arguments[0] == "serve" and not Path(arguments[1]).exists():
        positions = (
            int(arguments[arguments.index("--context") + 1]) if "--context" in arguments else CONTEXT_TOKENS
        )
        write_speaking_model(Path(arguments[1]), positions)
    given = os.environ.get("SPEAKING_SCRIPTS")
    with speaking(json.loads(Path(given).read_text()) if given else None):
        sys.exit(main())
