"""Read a saved drift report for a card. The file may come from anywhere, so every part of it is checked.

Elsewhere: `measure.py` writes reports.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from argosy.checkpoint.untrusted_file import kind_of, open_regular, parse_object, quote, read_at
from argosy.errors import CheckpointError, UsageError
from argosy.evaluate.drift import REPORT_VERSION

_MOST_BYTES = 1 << 20
_MOST_ITEMS = 256
_MOST_CHARACTERS = 500

_ESTIMATE = {"value": float, "low": float, "high": float}
_SUBJECT = {
    "name": str, "identity": str, "family": str, "dense_formats": [str], "expert_format": str,
}  # fmt: skip
_SHAPE = {
    "argosy": str,
    "reference": _SUBJECT,
    "candidate": _SUBJECT,
    "texts": {"blake3": str, "languages": [str]},
    "verdict": {"level": str, "reasons": [str]},
    "text": [
        {
            "language": str, "num_tokens": int, "kl_nats": _ESTIMATE, "agreement": _ESTIMATE,
            "perplexity_reference": float, "perplexity_candidate": float, "perplexity_rise": _ESTIMATE,
        }
    ],
    "gaps": {"num_templates": int, "num_pairs": int, "reference_nats": float, "change_nats": _ESTIMATE},
    "groups": [
        {
            "dimension": str, "group": str, "shift_nats": _ESTIMATE, "loss_rise_nats": _ESTIMATE,
            "perplexity_reference": float, "perplexity_candidate": float,
        }
    ],
    "questions": [
        {
            "condition": str, "num_questions": int, "accuracy_reference": float, "accuracy_candidate": float,
            "accuracy_change": _ESTIMATE, "answers_changed": _ESTIMATE,
        }
    ],
}  # fmt: skip


def read_report(path: Path, identity: str) -> dict[str, Any]:
    """Read a saved report whose candidate has this identity. Unknown keys are dropped.

    Raises:
        UsageError: it cannot be read, is not a report, or is about another model.
    """
    try:
        with open_regular(path) as (descriptor, nbytes):
            if nbytes > _MOST_BYTES:
                raise UsageError(f"{path} is {nbytes} bytes long; a drift report has at most {_MOST_BYTES}")
            raw = parse_object(read_at(descriptor, nbytes, 0, path), path)
    except CheckpointError as error:
        raise UsageError(error.message) from error
    if raw.get("argosy_drift") != REPORT_VERSION:
        raise UsageError(
            f"{path} is not a drift report of version {REPORT_VERSION}",
            hint="`argosy eval drift REFERENCE CANDIDATE --save FILE` writes one",
        )
    found: dict[str, Any] = _checked(raw, _SHAPE, path, "the report")
    if not found["text"]:
        raise UsageError(f"{path}: the report compares no text")
    if found["candidate"]["identity"] != identity:
        raise UsageError(
            f"{path} is about another model: {quote(found['candidate']['name'])}, {found['candidate']['identity']}, "
            f"and this one is {identity}",
            hint="measure it again, or remove the file",
        )
    return found


def _checked(value: object, shape: Any, path: Path, where: str) -> Any:
    """`value` reduced to what `shape` names: a type, a dict of shapes, or a list of one shape."""

    def wrong(expected: str) -> UsageError:
        return UsageError(f"{path}: {where} is {kind_of(value)}, expected {expected}")

    if isinstance(shape, dict):
        if not isinstance(value, dict):
            raise wrong("an object")
        return {key: _checked(value.get(key), inner, path, key) for key, inner in shape.items()}
    if isinstance(shape, list):
        if not isinstance(value, list) or len(value) > _MOST_ITEMS:
            raise wrong(f"a list of at most {_MOST_ITEMS}")
        return [_checked(item, shape[0], path, where) for item in value]
    if shape is str:
        if not isinstance(value, str) or len(value) > _MOST_CHARACTERS:
            raise wrong(f"a text of at most {_MOST_CHARACTERS} characters")
        return value
    if shape is int:
        if type(value) is not int or not 0 <= value < 1 << 53:
            raise wrong("a count")
        return value
    if type(value) not in (int, float) or not math.isfinite(value):  # type: ignore[arg-type]
        raise wrong("a number")
    return float(value)  # type: ignore[arg-type]
