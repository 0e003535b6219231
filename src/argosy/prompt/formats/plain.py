"""Models that cannot call tools: text, and thoughts if they have them.

<think>
thoughts
</think>

text

Kimi-VL's thinking models write ◁think▷ and ◁/think▷, which are neither tokens nor in their template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from argosy.errors import UsageError
from argosy.prompt.formats.block_format import BlockFormat
from argosy.prompt.formats.lark import Lark
from argosy.prompt.formats.parser import Reading
from argosy.prompt.tools import Tool


class Plain(BlockFormat):
    name = "plain"
    blocks = {}  # noqa: RUF012 (a ClassVar, declared in the base)

    def read(self, block: Sequence[str], tools: Mapping[str, Tool]) -> Reading:
        return None

    def _calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool) -> str:
        raise UsageError("this model cannot call tools, so tool_choice cannot require a call")


class KimiVl(Plain):
    name = "kimi_vl"
    tokens = ("<|im_middle|>", "<|media_content|>")
    thinking = ("◁think▷", "◁/think▷")
    spells_thoughts = True


FORMATS = (KimiVl, Plain)
