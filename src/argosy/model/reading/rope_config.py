"""Read the rotary embedding, in either of the spellings that configs use.

    rope_theta + rope_scaling {"type" or "rope_type": ...}     hub files of 2023 to 2025
    rope_parameters {"rope_theta": ..., "rope_type": ...}      written by transformers 5
    rope_parameters {"full_attention": {...}, ...}             one for each kind of layer: `read_ropes_of_layers`

Kinds, their fields and their defaults are those of `modeling_rope_utils.py` in transformers 5.24. A field that the
kind does not use is refused by name, because it was set for a reason.

Elsewhere: `model/rope.py` computes the angles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from argosy.checkpoint.untrusted_file import quote
from argosy.config import RopeConfig
from argosy.errors import CheckpointError, UnsupportedModel
from argosy.model.reading.config_reader import LARGEST_SIZE, ConfigReader, is_positive_number

Kind = Literal["default", "linear", "dynamic", "yarn", "llama3", "proportional"]
_MOST_PAIRS = 1 << 16  # each has an axis of its own in a config
_KINDS_OF_MODELS: tuple[Kind, ...] = ("default", "linear", "dynamic", "yarn", "llama3")
_KINDS_OF_LAYERS: tuple[Kind, ...] = ("default", "linear", "proportional")

_SECTIONS = "mrope_section"
_IS_MIXED = ("mrope_interleaved", "interleaved")  # two names of one flag
_COMMON = {"type", "rope_type", "rope_theta", "partial_rotary_factor"}
_FIELDS: dict[Kind, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "yarn": {
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate",
    },
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "proportional": {"factor"},
}  # fmt: skip


class Axes(NamedTuple):
    """How a family distributes the pairs of dimensions over the three axes of positions in media (m-rope).

    mixed: the axes take turns, pair 3 i + a on axis a, until an axis has all its pairs; axis 0 gets the rest
    (Qwen3-VL). Otherwise each axis has consecutive pairs (Qwen2-VL, arXiv:2409.12191).
    sections: pairs of each axis, if a config does not give them.
    """

    is_mixed: bool
    sections: tuple[int, int, int]


def axes_of_pairs(sections: Sequence[int], num_pairs: int, *, is_mixed: bool) -> tuple[int, ...] | None:
    """Return the axis of each pair, as transformers 5.24 chooses it; None if the sections do not add up to
    the pairs.
    """
    if is_mixed:
        axes = [0] * num_pairs
        for axis in range(1, len(sections)):
            for pair in range(axis, min(num_pairs, 3 * sections[axis]), 3):
                axes[pair] = axis
        return tuple(axes)
    if sum(sections) != num_pairs:
        return None
    return tuple(axis for axis, section in enumerate(sections) for _ in range(section))


def read_rope(
    reader: ConfigReader,
    *,
    head_dim: int,
    context_tokens: int,
    default_theta: float,
    default_partial: float | None = None,
    axes: Axes | None = None,
) -> RopeConfig:
    """Read the rotary embedding that a config describes.

    Args:
        reader: the config.
        head_dim: dimensions of a head; in some families only the share `partial_rotary_factor` of them rotates.
        context_tokens: max_position_embeddings.
        default_theta: the family's default theta.
        default_partial: the family's default partial_rotary_factor; None means that the family does not have this key,
            and the whole head rotates.
        axes: how the family distributes pairs over the axes of positions in media; None means that it has no axes, and
            fields for them are refused. Text has the same position on all axes.

    Raises:
        UnsupportedModel: a kind or field is not supported; the error names it.
        CheckpointError: a field is missing, malformed, or given twice with different values.
    """
    parameters, name = _one_mapping(reader)
    fields = _Fields(parameters, name)
    kind = _kind(fields, _KINDS_OF_MODELS)
    fields.refuse_unknown(kind, frozenset() if axes is None else frozenset({_SECTIONS, *_IS_MIXED}))
    if head_dim % 2:
        raise CheckpointError(
            f"config.json gives heads of {head_dim} dimensions, but rotary embedding needs an even number"
        )
    rotary_dim = _rotary_dim(reader, fields, head_dim, default_partial)
    theta = _theta(reader, fields, default_theta)
    original = context_tokens
    if kind in ("yarn", "llama3"):
        original = fields.integer("original_max_position_embeddings", context_tokens)
        # If the file also gives it outside, that value wins (transformers' standardize_rope_params).
        original = reader.optional_integer("original_max_position_embeddings") or original
    else:
        reader.neutral("original_max_position_embeddings", context_tokens, None)
    return _scaled(
        fields,
        kind,
        context_tokens,
        original,
        theta=theta,
        rotary_dim=rotary_dim,
        axes=() if axes is None else _read_axes(fields, axes, rotary_dim // 2),
    )


def _scaled(
    fields: _Fields,
    kind: Kind,
    context_tokens: int,
    original: int,
    *,
    theta: float,
    rotary_dim: int,
    axes: tuple[int, ...] = (),
) -> RopeConfig:
    """Read the fields of a kind; `original` is the context that the model was trained on before scaling."""
    factor = 1.0
    if kind != "default":
        # yarn with "factor": null means the ratio of the two contexts.
        default_factor = context_tokens / original if kind == "yarn" and fields.is_null("factor") else None
        factor = fields.number("factor", default_factor)
    rope = RopeConfig(
        theta=theta,
        rotary_dim=rotary_dim,
        axes=axes,
        kind=kind,
        factor=factor,
        original_context=original,
        beta_fast=fields.number("beta_fast", 32.0),
        beta_slow=fields.number("beta_slow", 1.0),
        attention_factor=fields.optional_number("attention_factor"),
        mscale=fields.optional_number("mscale"),
        mscale_all_dim=fields.optional_number("mscale_all_dim"),
        truncate=fields.flag("truncate", True),
        low_freq_factor=fields.number("low_freq_factor", None if kind == "llama3" else 1.0),
        high_freq_factor=fields.number("high_freq_factor", None if kind == "llama3" else 4.0),
    )
    if kind == "llama3" and rope.high_freq_factor < rope.low_freq_factor:
        raise CheckpointError(
            f"config.json: {fields.name} gives high_freq_factor {rope.high_freq_factor}, expected at least "
            f"low_freq_factor {rope.low_freq_factor}",
            key="high_freq_factor",
        )
    return rope


def _theta(reader: ConfigReader, fields: _Fields, default: float) -> float:
    """Read the base of the frequencies, which a file may give inside, outside, or in both places."""
    theta = reader.number("rope_theta", default)
    if "rope_theta" not in fields.values:
        return theta
    inner = fields.number("rope_theta", None)
    if reader.has("rope_theta") and inner != theta:
        raise CheckpointError(
            f"config.json gives rope_theta as {theta} and, in {fields.name}, as {inner}", key="rope_theta"
        )
    return inner


def read_ropes_of_layers(
    reader: ConfigReader,
    head_dims: Mapping[str, int],
    defaults: Mapping[str, Mapping[str, object]],
    *,
    default_partial: float | None = None,
    context_tokens: int = 0,
) -> dict[str, RopeConfig]:
    """Read the rotary embedding of each kind of layer from `rope_parameters`.

    With kind "proportional", frequencies are those of a whole head, and only the first `partial_rotary_factor` of the
    pairs turn (transformers 5.24, `_compute_proportional_rope_parameters`).

    Args:
        head_dims: dimensions of a head of each kind of layer that the model has.
        defaults: every kind of layer that `rope_parameters` may have, with its value where that is absent.
        default_partial: as for `read_rope`.
        context_tokens: max_position_embeddings, in families whose layers may have yarn; 0: in others.

    Raises:
        UnsupportedModel: a kind or field is not supported; the error names it.
        CheckpointError: a kind of layer, or a field, is missing or malformed.
    """
    given = reader.mapping("rope_parameters")
    parameters: Mapping[str, object] = defaults if given is None else given
    for kind_of_layer in parameters:
        if kind_of_layer not in defaults:
            raise UnsupportedModel(
                f"config.json: rope_parameters sets {quote(kind_of_layer)}; supported: {', '.join(defaults)}",
                key=kind_of_layer,
                supported=list(defaults),
            )
    return {
        kind: _rope_of_layers(parameters.get(kind), kind, dim, default_partial, context_tokens)
        for kind, dim in head_dims.items()
    }


def _rope_of_layers(
    values: object, kind_of_layer: str, head_dim: int, default_partial: float | None, context_tokens: int
) -> RopeConfig:
    name = f"rope_parameters.{kind_of_layer}"
    if not isinstance(values, Mapping):
        raise CheckpointError(
            f"config.json: {name} is {quote(values)}, expected an object", key="rope_parameters"
        )
    fields = _Fields(dict(values), name)
    kind = _kind(fields, (*_KINDS_OF_LAYERS, "yarn") if context_tokens else _KINDS_OF_LAYERS)
    fields.refuse_unknown(kind, frozenset())
    if head_dim % 2:
        raise CheckpointError(
            f"config.json gives heads of {head_dim} dimensions, but rotary embedding needs an even number"
        )
    share = fields.number("partial_rotary_factor", default_partial or 1.0)
    if kind == "yarn" or (kind == "default" and default_partial is not None):
        return _scaled(
            fields,
            kind,
            context_tokens,
            fields.integer("original_max_position_embeddings", context_tokens)
            if kind == "yarn"
            else context_tokens,
            theta=fields.number("rope_theta", None),
            rotary_dim=_part_of_head(head_dim, share),
        )
    if kind != "proportional" and share != 1.0:
        raise fields.unsupported("partial_rotary_factor", f"1.0 for kind '{kind}'")
    turning_pairs = int(share * head_dim // 2) if share <= 1 else 0
    if turning_pairs == 0:
        raise CheckpointError(
            f"config.json: {name} gives partial_rotary_factor {share} of {head_dim} dimensions, expected at least one "
            "pair and at most all of them",
            key="partial_rotary_factor",
        )
    return RopeConfig(
        theta=fields.number("rope_theta", None),
        rotary_dim=head_dim,
        kind=kind,
        factor=fields.number("factor", None if kind == "linear" else 1.0),
        turning_pairs=turning_pairs if kind == "proportional" else None,
    )


def _read_axes(fields: _Fields, axes: Axes, num_pairs: int) -> tuple[int, ...]:
    for key in _IS_MIXED:
        if (is_mixed := fields.flag(key, axes.is_mixed)) != axes.is_mixed:
            raise UnsupportedModel(
                f"config.json: {fields.name} asks for {key} {str(is_mixed).lower()}; supported: "
                f"{str(axes.is_mixed).lower()}",
                key=key,
                value=is_mixed,
                supported=str(axes.is_mixed).lower(),
            )
    if num_pairs > _MOST_PAIRS:
        raise UnsupportedModel(
            f"config.json asks for {2 * num_pairs} rotating dimensions; supported: up to {2 * _MOST_PAIRS}",
            key="head_dim",
        )
    given = fields.values.get(_SECTIONS)
    sections = fields.sections(_SECTIONS) if given is not None else axes.sections
    found = axes_of_pairs(sections, num_pairs, is_mixed=axes.is_mixed)
    if found is None and given is not None:
        raise CheckpointError(
            f"config.json: {fields.name} gives {_SECTIONS} {quote(given)}, expected numbers that add up to "
            f"{num_pairs}, the pairs of dimensions that rotate",
            key=_SECTIONS,
        )
    return found or ()


def _rotary_dim(reader: ConfigReader, fields: _Fields, head_dim: int, default_partial: float | None) -> int:
    """Return the number of dimensions of a head that rotate."""
    key = "partial_rotary_factor"
    if default_partial is None:
        if fields.number(key, 1.0) != 1.0:
            raise fields.unsupported(key, "1.0")
        return head_dim
    outer = reader.number(key, default_partial)
    factor = fields.number(key, outer)
    if reader.has(key) and factor != outer:
        raise CheckpointError(
            f"config.json gives {key} as {outer} and, in {fields.name}, as {factor}", key=key
        )
    return _part_of_head(head_dim, factor)


def _part_of_head(head_dim: int, factor: float) -> int:
    key = "partial_rotary_factor"
    rotary_dim = int(head_dim * factor) if factor <= 1 else 0
    if rotary_dim < 2 or rotary_dim % 2:
        raise CheckpointError(
            f"config.json gives {key} as {factor} of {head_dim} dimensions, expected an even number from 2 "
            "to all of them",
            key=key,
        )
    return rotary_dim


def _one_mapping(reader: ConfigReader) -> tuple[dict[str, object], str]:
    scaling, parameters = reader.mapping("rope_scaling"), reader.mapping("rope_parameters")
    if scaling and parameters and scaling != parameters:
        raise CheckpointError(
            "config.json gives both rope_scaling and rope_parameters, and they differ", key="rope_scaling"
        )
    if scaling:
        return scaling, "rope_scaling"
    return parameters or {}, "rope_parameters"


def _kind(fields: _Fields, supported: tuple[Kind, ...]) -> Kind:
    given = [name for name in ("rope_type", "type") if name in fields.values]
    if len(given) == 2 and fields.values["rope_type"] != fields.values["type"]:
        raise CheckpointError(
            f"config.json: {fields.name} gives rope_type {quote(fields.values['rope_type'])} "
            f"and type {quote(fields.values['type'])}",
            key="rope_type",
        )
    value = fields.values[given[0]] if given else "default"
    for kind in supported:
        if value in (kind, f"deepseek_{kind}"):
            return kind
    raise fields.unsupported(given[0], ", ".join(supported))


class _Fields:
    """The values of rope_scaling or rope_parameters, with errors that name which of the two it is."""

    def __init__(self, values: dict[str, object], name: str) -> None:
        self.values, self.name = values, name

    def refuse_unknown(self, kind: Kind, also_known: frozenset[str]) -> None:
        known = _COMMON | _FIELDS[kind] | also_known
        for key in self.values:
            if key not in known:
                raise UnsupportedModel(
                    f"config.json: {self.name} sets {quote(key)} to {quote(self.values[key])}, but "
                    f"kind '{kind}' does not know this key; supported: {', '.join(sorted(known))}",
                    key=key,
                    value=self.values[key],
                    supported=sorted(known),
                )

    def is_null(self, key: str) -> bool:
        return key in self.values and self.values[key] is None

    def number(self, key: str, default: float | None) -> float:
        """Read a number above zero. Null or absent selects the default; without a default, the key is required."""
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise CheckpointError(f"config.json: {self.name} does not give {key}", key=key)
            return default
        if not is_positive_number(value):
            raise CheckpointError(
                f"config.json: {self.name} gives {key} {quote(value)}, expected a number above 0", key=key
            )
        return float(value)  # type: ignore[arg-type]

    def optional_number(self, key: str) -> float | None:
        return None if self.values.get(key) is None else self.number(key, None)

    def integer(self, key: str, default: int) -> int:
        value = self.values.get(key)
        if value is None:
            return default
        if type(value) is not int or not 1 <= value <= LARGEST_SIZE:
            raise CheckpointError(
                f"config.json: {self.name} gives {key} {quote(value)}, expected a whole number from 1",
                key=key,
            )
        return value

    def sections(self, key: str) -> tuple[int, ...]:
        """Read three whole numbers from 0 on."""
        value = self.values[key]
        if (
            not isinstance(value, list)
            or len(value) != 3
            or not all(type(item) is int and 0 <= item <= LARGEST_SIZE for item in value)
        ):
            raise CheckpointError(
                f"config.json: {self.name} gives {key} {quote(value)}, expected three whole numbers from 0",
                key=key,
            )
        return tuple(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if type(value) is not bool:
            raise CheckpointError(
                f"config.json: {self.name} gives {key} {quote(value)}, expected true or false", key=key
            )
        return value

    def unsupported(self, key: str, supported: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"config.json: {self.name} asks for {key} {quote(self.values.get(key))}; supported: {supported}",
            key=key,
            value=self.values.get(key),
            supported=supported,
        )
