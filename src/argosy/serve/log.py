"""What is written of a failure that nobody foresaw: where it was, and never what was being said there.

Elsewhere: what is logged of each request is `gate.py`.
"""

from __future__ import annotations

import traceback


def where_it_failed(error: BaseException) -> str:
    """The types of `error` and of what led to it, and the lines of code they came through.

    Messages stay out: those of Python and of libraries quote what they choked on.
    """
    parts: list[str] = []
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        frames = "".join(traceback.format_tb(found.__traceback__))
        parts.append(f"{type(found).__name__}\n{frames}".rstrip())
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
    return "\nbecause of ".join(parts)
