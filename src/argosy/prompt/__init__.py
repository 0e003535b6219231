"""From what a caller says to token ids, and from token ids to text.

    messages -> chat.py -> segments (template's, caller's) -> tokenizer.py -> Prompt
    token id -> tokenizer.py StreamDecoder -> stop.py -> text for the caller

Text from a caller never becomes a control token, whatever it spells.
"""

from argosy.prompt.prompt import Message, Prompt

__all__ = ["Message", "Prompt"]
