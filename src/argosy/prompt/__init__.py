"""Turns callers' messages into token ids, and token ids into text.

    messages, tools -> messages.py, tools.py -> chat.py -> segments (template's, caller's) -> tokenizer.py -> Prompt
    token id -> stream_decoder.py -> formats/ -> text, thoughts, tool calls; or stop.py -> text
    answer -> replay.py -> the same tokens, when its conversation continues

Text from a caller never becomes a control token, whatever it spells and wherever it stands.

Nothing is imported here: the process that renders templates imports one module of this package, and stays small.
"""
