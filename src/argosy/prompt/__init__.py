"""Turns callers' messages into token ids, and token ids into text.

    messages, tools -> messages.py, tools.py -> chat.py -> segments (template's, caller's) -> tokenizer.py -> Prompt
    token id -> stream_decoder.py -> formats/ -> text, thoughts, tool calls; or stop.py -> text
    answer -> replay.py -> the same tokens, when its conversation continues

A caller's text never becomes a control token, whatever it spells and wherever it appears.

This file imports nothing, so that the process that renders templates, which needs one module of the package, stays
small.
"""
