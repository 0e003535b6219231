"""How families of models write thoughts and tool calls: one file each.

format.py   what a format is        parser.py   an answer's tokens to events
table.py    which one a model has   lark.py     grammars for answers that have to call a tool
"""

from argosy.prompt.formats.events import (
    Answer,
    AnsweredCall,
    Event,
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallBegin,
    ToolCallEnd,
    collect,
)
from argosy.prompt.formats.format import Format
from argosy.prompt.formats.parser import Parser
from argosy.prompt.formats.table import FORMATS, find_format, named_format

__all__ = [
    "FORMATS",
    "Answer",
    "AnsweredCall",
    "Event",
    "Format",
    "Parser",
    "ReasoningDelta",
    "TextDelta",
    "ToolCallArguments",
    "ToolCallBegin",
    "ToolCallEnd",
    "collect",
    "find_format",
    "named_format",
]
