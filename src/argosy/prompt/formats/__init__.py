"""How each family of models writes thoughts and tool calls: one file per format.

format.py   defines a format          block_format.py   formats whose calls are between two marks
parser.py   turns an answer's tokens into events
table.py    finds a model's format    lark.py           builds grammars for answers that have to call a tool
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
