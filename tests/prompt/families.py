"""The text side of one small model per family: a tokenizer with the family's tokens, and its chat template."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import tokenizers

from argosy.prompt.builder import PromptBuilder
from argosy.prompt.own_templates import KIMI_K3
from argosy.prompt.replay import ReplayMemory
from argosy.prompt.tokenizer import Tokenizer
from tests.prompt import tool_templates as templates
from tests.prompt.tokenizers_for_tests import CHATML, byte_level_json

_DEEPSEEK = (
    [f"<｜tool▁{name}｜>" for name in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep")]
    + [f"<｜tool▁{name}｜>" for name in ("outputs▁begin", "outputs▁end", "output▁begin", "output▁end")]
    + ["<think>", "</think>"]
)
_QWEN = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
_GLM = [*_QWEN, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "/nothink"]


@dataclass(frozen=True)
class Family:
    """`special` tokens are flagged as special; `structural` ones are single tokens like any word."""

    name: str
    template: str
    special: tuple[str, ...]
    structural: tuple[str, ...]
    ends: tuple[str, ...]
    config: dict[str, str] = field(default_factory=dict)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        core = tokenizers.Tokenizer.from_str(byte_level_json(structural=()))
        core.add_special_tokens(list(self.special))
        core.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in self.structural])
        ends = [core.token_to_id(text) for text in self.ends]
        return Tokenizer(
            core,
            config={"eos_token": self.ends[0], **self.config},
            generation_config={"eos_token_id": ends},
            chat_template=self.template,
        )

    @functools.cached_property
    def shared_builder(self) -> PromptBuilder:
        """One builder for all tests, which do not close it: what it found out about the template stays.

        `remembering(memory)` makes a copy for a test with a memory of its own.
        """
        return self.builder()

    def builder(self, memory: ReplayMemory | None = None) -> PromptBuilder:
        return PromptBuilder(self.tokenizer, vocab_size=self.tokenizer.vocab_size, memory=memory)

    @property
    def marks(self) -> tuple[str, ...]:
        return (*self.special, *self.structural)


def _family(
    name: str, template: str, special: list[str], structural: list[str], ends: list[str], **config: str
) -> Family:
    return Family(name, template, tuple(special), tuple(structural), tuple(ends), config)


_KIMI = [f"<|im_{name}|>" for name in ("system", "user", "assistant", "middle", "end")] + [
    f"<|{name}|>"
    for name in (
        "tool_calls_section_begin",
        "tool_calls_section_end",
        "tool_call_begin",
        "tool_call_argument_begin",
        "tool_call_end",
    )
]
_DEEPSEEK_SPECIAL = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"]
_DEEPSEEK_STRUCTURAL = ["<｜User｜>", "<｜Assistant｜>", *_DEEPSEEK]
_GLM_SPECIAL = ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
_HARMONY = [f"<|{name}|>" for name in ("start", "end", "message", "channel", "constrain", "return", "call")]
_MISTRAL = [
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
]
_MISTRAL += ["[TOOL_CALLS]", "<s>", "</s>"]
_MISTRAL_ARGS = [*_MISTRAL, "[ARGS]", "[CALL_ID]", "[TOOL_CONTENT]", "[THINK]", "[/THINK]", "[SYSTEM_PROMPT]"]
_MISTRAL_ARGS += ["[/SYSTEM_PROMPT]"]
_SENTENCE = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
_MINIMAX = ["]~!b[", "]~b]", "[e~["]

_GEMMA = ["<bos>", "<|turn>", "<turn|>", "<|think|>", "<|channel>", "<channel|>", '<|"|>'] + [
    mark for name in ("tool", "tool_call", "tool_response") for mark in (f"<|{name}>", f"<{name}|>")
]

FAMILIES = {
    family.name: family
    for family in (
        _family("qwen2_5", templates.QWEN2_5, [], _QWEN[2:], ["<|im_end|>"]),
        _family("qwen3", templates.QWEN3, [], _QWEN, ["<|im_end|>"]),
        _family("qwen3_coder", templates.QWEN3_CODER, [], _QWEN, ["<|im_end|>"]),
        _family(
            "deepseek_v3",
            templates.DEEPSEEK_R1,
            _DEEPSEEK_SPECIAL,
            _DEEPSEEK_STRUCTURAL,
            ["<｜end▁of▁sentence｜>"],
            **_SENTENCE,
        ),
        _family(
            "deepseek_v31",
            templates.DEEPSEEK_V31,
            _DEEPSEEK_SPECIAL,
            _DEEPSEEK_STRUCTURAL,
            ["<｜end▁of▁sentence｜>"],
            **_SENTENCE,
        ),
        _family("kimi_k2", templates.KIMI_K2, _KIMI, ["<think>", "</think>"], ["<|im_end|>"]),
        _family(
            "glm", templates.GLM_4_6, _GLM_SPECIAL, _GLM, ["<|endoftext|>", "<|user|>", "<|observation|>"]
        ),
        _family(
            "glm47", templates.GLM_4_7, _GLM_SPECIAL, _GLM, ["<|endoftext|>", "<|user|>", "<|observation|>"]
        ),
        _family("harmony", templates.GPT_OSS, _HARMONY, [], ["<|return|>", "<|call|>"]),
        _family("gemma4", templates.GEMMA4, _GEMMA, [], ["<turn|>", "<|tool_response>"], bos_token="<bos>"),
        _family("mistral", templates.MISTRAL, _MISTRAL, [], ["</s>"], bos_token="<s>", eos_token="</s>"),
        _family(
            "mistral_args",
            templates.MISTRAL_ARGS,
            _MISTRAL_ARGS,
            [],
            ["</s>"],
            bos_token="<s>",
            eos_token="</s>",
        ),
        _family(
            "minimax_m2",
            templates.MINIMAX_M2,
            _MINIMAX,
            ["<think>", "</think>", "<minimax:tool_call>", "</minimax:tool_call>"],
            ["[e~["],
        ),
        _family("minimax_spelled", templates.MINIMAX_M2, _MINIMAX, [], ["[e~["]),  # no mark is a token
        _family("chatml", CHATML, [], ["<think>", "</think>"], ["<|im_end|>"]),  # calls no tools
    )
}

_HY4 = [f"<{slash}{name}:6124c78e>" for slash in ("", "/") for name in (
    "think", "tool_calls", "tool_call", "arg_key", "arg_value",
)]  # fmt: skip
_HY3 = [mark.replace("6124c78e", "opensource") for mark in (*_HY4, "<tool_sep:6124c78e>")]
_SOLAR = [f"<|{name}|>" for name in ("begin", "content", "think", "end", "tool_calls", "calls")] + [
    f"<|tool_call:{name}|>" for name in ("begin", "name", "args", "end")
]
_KIMI_K3 = ["<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>"]
_COHERE = [f"<|{end}_{name}|>" for end in ("START", "END") for name in ("THINKING", "TEXT", "ACTION")]

# Families whose templates here are short: they show how calls and thoughts are written, and no more.
SHORT = {
    family.name: family
    for family in (
        _family("kimi_k3", KIMI_K3, _KIMI_K3, [], ["<|end_of_msg|>"]),
        _family("hunyuan", templates.HUNYUAN_A13B, [], [], ["<|im_end|>"]),
        _family("granite", templates.GRANITE_3, ["<|tool_call|>"], [], ["<|im_end|>"]),
        _family("granite4", templates.GRANITE_4, [], ["<tool_call>", "</tool_call>"], ["<|im_end|>"]),
        _family("nemotron3", templates.NEMOTRON_3, [], ["<think>", "</think>"], ["<|im_end|>"]),
        _family("laguna", templates.LAGUNA, [], _GLM, ["<|im_end|>"]),
        _family("laguna_s", templates.LAGUNA_S, [], _GLM, ["<|im_end|>"]),
        _family("ling2", templates.LING_2, [], _QWEN, ["<|im_end|>"]),
        _family("ling3", templates.LING_3, [], _GLM, ["<|im_end|>"]),
        _family("kimi_vl", CHATML, ["<|im_middle|>", "<|media_content|>"], [], ["<|im_end|>"]),
        _family("youtu", templates.YOUTU, [], _QWEN, ["<|im_end|>"]),
        _family("exaone", templates.K_EXAONE, [], _QWEN, ["<|im_end|>"]),
        _family("minimax_m1", templates.MINIMAX_M1, [], [], ["<|im_end|>"]),
        _family("step3", templates.STEP_35, [], _QWEN, ["<|im_end|>"]),
        _family(
            "minimax_m3",
            templates.MINIMAX_M3,
            ["]<]minimax[>["],
            ["<mm:think>", "</mm:think>"],
            ["<|im_end|>"],
        ),
        _family("cohere2", templates.COHERE2_MOE, _COHERE, [], ["<|im_end|>"]),
        _family(
            "lfm2",
            templates.LFM2,
            ["<|tool_call_start|>", "<|tool_call_end|>"],
            ["<think>", "</think>"],
            ["<|im_end|>"],
        ),
        _family("llama4", templates.LLAMA_4, ["<|python_start|>", "<|python_end|>"], [], ["<|im_end|>"]),
        _family(
            "deepseek_v32", templates.DEEPSEEK_V32, ["｜DSML｜"], ["<think>", "</think>"], ["<|im_end|>"]
        ),
        _family("deepseek_v4", templates.DEEPSEEK_V4, [], ["<think>", "</think>"], ["<|im_end|>"]),
        _family(
            "deepseek_v41", templates.DEEPSEEK_V41, ["｜DSML｜"], ["<think>", "</think>"], ["<|im_end|>"]
        ),
        _family("solar", templates.SOLAR_OPEN, _SOLAR, [], ["<|im_end|>", "<|calls|>"]),
        _family("gigachat", templates.GIGACHAT_31, ["<|function_call|>"], [], ["<|im_end|>"]),
        _family("llama3", templates.LLAMA_3, ["<|python_tag|>"], [], ["<|im_end|>"]),
        _family("ernie", templates.ERNIE_45, [], ["<think>", "</think>"], ["<|im_end|>"]),
        _family("hy3", templates.HY_3, _HY3, [], ["<|im_end|>"]),
        _family("hy4", templates.HY_4, _HY4, [], ["<|im_end|>"]),
    )
}

EVERY_FAMILY = FAMILIES | SHORT

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Which city"},
                "days": {"type": "integer"},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                "exact": {"type": "boolean"},
                "places": {"type": "array", "items": {"type": "string"}},
                "more": {"type": "object"},
                "limit": {"type": ["number", "null"]},
            },
            "required": ["city"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "The time"}}
TOOLS = [WEATHER, CLOCK]
