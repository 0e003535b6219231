"""The types of a model's weights and their shares, and what the name of its file hides about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from argosy.checkpoint.files import ModelFiles

_LEAST_SHARE = 0.005  # of a type that is shown with its share
_MOST_NAMED = 3


def weight_facts(files: ModelFiles) -> dict[str, Any]:
    """Bits a weight in the files, the share of the weights in each format, and the type in a GGUF file's name if the
    routed experts have mostly another one.
    """
    from argosy.checkpoint.block_types import SLOT_FORMATS, type_in_name
    from argosy.checkpoint.geometry import expert_shapes
    from argosy.checkpoint.gguf_names import GGUF_SUFFIX, PART_NAME, format_in_name

    experts: Counter[str] = Counter()
    for layer in {layer for layer, _ in files.experts}:
        for kind, shape in zip(files.expert_formats(layer), expert_shapes(files.config, layer), strict=True):
            experts[kind] += files.config.num_experts * prod(shape)
    weights = experts.copy()
    for ref in files.dense.values():
        weights[ref.format] += ref.rows * ref.cols
    nbytes = files.expert_bytes + sum(ref.read_bytes for ref in files.dense.values())
    hidden = None
    if files.header is not None and not files.is_packed and experts:
        part = PART_NAME.fullmatch(files.path.name)
        format = format_in_name(part["stem"] if part else files.path.name.removesuffix(GGUF_SUFFIX))
        named, (most, size) = type_in_name(format), experts.most_common(1)[0]
        if named is not None and SLOT_FORMATS.get(named, named.lower()) != most:
            hidden = {"name": format, "format": most, "share": size / experts.total()}
    return {
        "bits_per_weight": 8 * nbytes / weights.total(),
        "formats": {format: size / weights.total() for format, size in weights.most_common()},
        "hidden_by_name": hidden,
    }


def weight_lines(facts: dict[str, Any]) -> list[str]:
    """The facts of `weight_facts` as sentences."""
    formats: dict[str, float] = facts["formats"]
    shown = [f"{format} {share:.0%}" for format, share in formats.items() if share >= _LEAST_SHARE]
    if left := len(formats) - len(shown):
        shown.append(f"{left} other{'s' * (left > 1)} below {_LEAST_SHARE:.1%}")
    lines = [f"{facts['bits_per_weight']:.2f} bits a weight: {', '.join(shown)}"]
    if (hidden := facts["hidden_by_name"]) is not None:
        lines.append(
            f"the name says {hidden['name']}; {hidden['share']:.0%} of its experts are {hidden['format']}"
        )
    return lines


def formats_in_short(formats: Sequence[str]) -> str:
    """The names of a few formats; of more, only their number: a mixture's are listed by `weight_lines`."""
    return "+".join(formats) if len(formats) <= _MOST_NAMED else f"in {len(formats)} formats"
