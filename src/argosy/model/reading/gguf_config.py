"""Read the metadata of a GGUF file key by key, so that nothing in it goes unnoticed.

    GgufFile  ->  GgufConfigReader.integer("block_count"), ...  ->  finish(): a key that was not read is refused

Keys in the architecture's own namespace (`qwen3moe.` ...) affect the mathematics: each is read, or known and accepted
only with a value that changes nothing, or refused by name. Other namespaces (`general.`, `tokenizer.`, `quantize.` ...)
describe the file. Meanings and defaults are those of llama.cpp's loader.

Elsewhere: a family's file lists its keys; `config_reader.py` reads `config.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from argosy.checkpoint.gguf import GgufArray, GgufFile
from argosy.checkpoint.landing import check_vector, read_values
from argosy.checkpoint.untrusted_file import quote
from argosy.config import RopeConfig
from argosy.errors import CheckpointError, UnsupportedModel
from argosy.model.reading.common_config import Common
from argosy.model.reading.config_reader import LARGEST_SIZE, MOST_EXPERTS, MOST_LAYERS
from argosy.model.reading.rope_config import Axes, axes_of_pairs

# Keys that any writer may add, with values that change nothing.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_gating_func": (0, 1),  # not given, softmax
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_weights_scale": (0.0, 1.0),
    "interleave_moe_layer_step": (0, 1),
    "leading_dense_block_count": (0,),
    "logit_scale": (0.0, 1.0),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "moe_every_n_layers": (0, 1),
    "pooling_type": (0, 1, 2, 3, 4),  # for embeddings; `checkpoint/pooling.py` reads it
    "rope.scale_linear": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    # The name of the row order that q and k always have in GGUF.
    "tensor_data_layout": ("Meta AI original pth",),
    "use_parallel_residual": (False,),
}
RMS_NORM_EPS = "attention.layer_norm_rms_epsilon"
SOFTMAX, SIGMOID = 1, 2  # values of expert_gating_func; 0 means not given

_HARMLESS = frozenset({"rope.scaling.finetuned"})


class GgufConfigReader:
    """One pass over the keys of an architecture: read every key that matters, then `finish()`."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self.file = file
        self._architecture = architecture
        self._asked: set[str] = set()

    def key(self, name: str) -> str:
        """Return the full key of `name`, which then counts as read."""
        self._asked.add(name)
        return f"{self._architecture}.{name}"

    def has(self, name: str) -> bool:
        return f"{self._architecture}.{name}" in self.file.metadata

    def integer(
        self, name: str, default: int | None = None, *, least: int = 1, most: int = LARGEST_SIZE
    ) -> int:
        """Read a whole number, or an array with the same number for each layer."""
        key = self.key(name)
        value = self.file.metadata.get(key)
        if isinstance(value, GgufArray):
            found = set(value.values())
            if len(found) != 1:
                raise self.unsupported(name, sorted(map(str, found)), "the same value in every layer")
            (item,) = found
            if type(item) is not int or not least <= item <= most:
                raise self.file.wrong(key, item, f"whole numbers from {least} to {most}")
            return item
        return self.file.integer(key, default, least=least, most=most)

    def integers(
        self, name: str, num_layers: int, *, default: int | None = None, least: int = 1
    ) -> tuple[int, ...]:
        """Read a whole number for each of `num_layers`; one number counts for all of them."""
        key = self.key(name)
        value = self.file.metadata.get(key)
        if not isinstance(value, GgufArray):
            return (self.integer(name, default, least=least),) * num_layers
        found = value.values()
        if len(found) != num_layers or not all(
            type(item) is int and least <= item <= LARGEST_SIZE for item in found
        ):
            expected = f"a whole number from {least} on for each of {num_layers} layers"
            raise self.file.wrong(key, value, expected)
        return tuple(map(int, found))

    def number(self, name: str, default: float | None = None) -> float:
        return self.file.number(self.key(name), default)

    def flag(self, name: str, default: bool) -> bool:
        return self.file.flag(self.key(name), default)

    def flags(self, name: str, num_layers: int) -> tuple[bool, ...] | None:
        """Read one flag for each of `num_layers`, written as booleans or as 0 and 1; None if the file has no array.

        Flags of multi-token prediction layers may follow.
        """
        key = self.key(name)
        value = self.file.metadata.get(key)
        if value is None:
            return None
        found = value.values() if isinstance(value, GgufArray) and len(value) <= MOST_LAYERS else []
        if len(found) > num_layers == len(found) - self.num_mtp_layers():
            found = found[:num_layers]
        if len(found) != num_layers or not all(item in (0, 1) for item in found):
            raise self.file.wrong(key, value, f"true or false for each of {num_layers} layers")
        return tuple(map(bool, found))

    def limits(self, name: str) -> tuple[float, ...]:
        """Read a number from 0 on for each layer of the model, which 0 does not limit; without an array, 0 for all."""
        key, num_layers = self.key(name), self.num_layers()
        if key not in self.file.metadata:
            return (0.0,) * num_layers
        found, every_layer = self.file.numbers(key), num_layers + self.num_mtp_layers()
        if len(found) != every_layer or not all(0 <= limit < float("inf") for limit in found):
            raise self.file.wrong(key, found, f"a number from 0 on for each of {every_layer} layers")
        return tuple(found[:num_layers])

    def neutral(self, name: str, *accepted: object) -> None:
        """Accept a key if its value changes nothing in this architecture."""
        value = self.file.metadata.get(self.key(name))
        if value is not None and not _is_one_of(value, accepted):
            raise self.unsupported(name, value, " or ".join(map(str, accepted)))

    def unsupported(self, name: str, value: object, supported: str) -> UnsupportedModel:
        """Return the error for a value that is well-formed but not supported."""
        key = self.key(name)
        return UnsupportedModel(
            f"{self.file.path.name} asks for {key} {quote(value)}; supported: {supported}",
            path=self.file.path,
            key=key,
            value=value,
            supported=supported,
        )

    def common(
        self,
        *,
        has_rope: bool = True,
        has_partial_rope: bool = False,
        axes: Axes | None = None,
        num_kv_heads: int | None = None,
        has_experts: bool = True,
        norm_eps: str = RMS_NORM_EPS,
    ) -> Common:
        """Read the part that is the same in every family with keys and values.

        Args:
            has_rope: False: nothing rotates, whatever the file says.
            has_partial_rope: `rope.dimension_count` may be less than a whole head.
            num_kv_heads: the number in layers with attention; None: the file's, the same in every layer.
            axes: how the family distributes pairs of dimensions over the axes of positions in media, if a file gives
                their sections; text has the same position on all axes.
            norm_eps: the key of the norms' epsilon.

        Raises:
            CheckpointError: a key is missing, malformed, or contradicts another or the tensors.
            UnsupportedModel: heads of two widths, or a rotary embedding that is not supported.
        """
        sizes = self.sizes(has_experts=has_experts, norm_eps=norm_eps)
        hidden_size, context_tokens = sizes["hidden_size"], sizes["context_tokens"]
        num_heads = self.integer("attention.head_count")
        num_kv_heads = num_kv_heads or self.integer("attention.head_count_kv", num_heads)
        if num_heads % num_kv_heads:
            raise CheckpointError(
                f"{self.file.path.name}: attention.head_count is {num_heads}, expected a multiple of "
                f"attention.head_count_kv, which is {num_kv_heads}",
                path=self.file.path,
                key=self.key("attention.head_count"),
            )
        head_dim = self.integer("attention.key_length", hidden_size // num_heads)
        if (width := self.integer("attention.value_length", head_dim)) != head_dim:
            raise self.unsupported(
                "attention.value_length", width, f"{head_dim}, the same as attention.key_length"
            )
        if not has_rope:
            rope = None
            self._asked |= {"rope.dimension_count", "rope.freq_base"}
        else:
            rope = self.rope(self._turning(head_dim) if has_partial_rope else head_dim, context_tokens)
        if rope is not None and axes is not None:
            rope = replace(rope, axes=self._axes(axes, rope.rotary_dim // 2))
        heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        return Common(sizes, heads | {"rope": rope})

    def attention_layers(self) -> tuple[int, tuple[bool, ...]]:
        """Return the KV heads of layers with attention, and whether each layer has it; one without has 0 KV heads.

        Raises:
            UnsupportedModel: numbers above 0 differ, or all layers have 0.   CheckpointError: a number is malformed.
        """
        num_layers = self.num_layers()
        every_layer = num_layers + self.num_mtp_layers()
        heads = self.integers("attention.head_count_kv", every_layer, least=0)[:num_layers]
        if len(kinds := set(heads) - {0}) != 1:
            expected = "0 in some layers, and the same number above 0 in the others"
            raise self.unsupported("attention.head_count_kv", sorted(set(heads)), expected)
        return kinds.pop(), tuple(number > 0 for number in heads)

    def _axes(self, axes: Axes, num_pairs: int) -> tuple[int, ...]:
        """Return the axis of each pair; empty if the file has no sections. A fourth axis is for other models, and gets
        no pairs.
        """
        key = self.key("rope.dimension_sections")
        if key not in self.file.metadata:
            return ()
        value = self.file.numbers(key)
        sections = [int(number) for number in value[:3] if 0 <= number <= LARGEST_SIZE]
        found = None
        if len(sections) == 3 and not any(value[3:]):
            found = axes_of_pairs(sections, num_pairs, is_mixed=axes.is_mixed)
        if found is None:
            expected = "three whole numbers from 0" + (
                "" if axes.is_mixed else f" that add up to {num_pairs}, the pairs of dimensions that rotate"
            )
            raise self.file.wrong(key, value, expected)
        return found

    def _turning(self, head_dim: int) -> int:
        return self.integer("rope.dimension_count", head_dim, most=head_dim)

    def sizes(self, *, has_experts: bool = True, norm_eps: str = RMS_NORM_EPS) -> dict[str, Any]:
        """Read the part that is the same in every family, whatever its mixers, as arguments of `ModelConfig`.

        Raises:
            CheckpointError: a key is missing, malformed, or contradicts another or the tensors.
        """
        embedding = self.file.tensors.get("token_embd.weight")
        vocab_size = embedding.shape[0] if embedding is not None and embedding.shape else 1
        if (claimed := self.integer("vocab_size", vocab_size)) != vocab_size:
            raise CheckpointError(
                f"{self.file.path.name}: {self.key('vocab_size')} is {claimed}, but token_embd.weight has "
                f"{vocab_size} rows",
                path=self.file.path,
                key=self.key("vocab_size"),
            )
        experts = {}
        if has_experts:
            num_experts = self.integer("expert_count", most=MOST_EXPERTS)
            experts["num_experts"] = num_experts
            experts["experts_per_token"] = self.integer("expert_used_count", most=num_experts)
        return {
            "vocab_size": vocab_size,
            "hidden_size": self.integer("embedding_length"),
            "norm_eps": self.number(norm_eps),
            "context_tokens": self.integer("context_length"),
            "is_embedding_tied": "output.weight" not in self.file.tensors,
            "eos_ids": tuple(self._token_ids("eos", "eot", "eom")),
            "bos_id": next(iter(self._token_ids("bos")), None),
            **experts,
        }

    def num_layers(self) -> int:
        """Return the model's layers, without those for multi-token prediction, which the file also counts."""
        num_layers, num_mtp_layers = self.integer("block_count", most=MOST_LAYERS), self.num_mtp_layers()
        if num_mtp_layers >= num_layers:
            raise CheckpointError(
                f"{self.file.path.name}: {self.key('nextn_predict_layers')} is {num_mtp_layers} of {num_layers} layers",
                path=self.file.path,
                key=self.key("nextn_predict_layers"),
            )
        return num_layers - num_mtp_layers

    def num_mtp_layers(self) -> int:
        return self.integer("nextn_predict_layers", 0, least=0, most=MOST_LAYERS)

    def finish(self) -> None:
        """Refuse every key of the architecture that was not read.

        Raises:
            UnsupportedModel: names the key, its value and the supported keys.
        """
        prefix = self._architecture + "."
        for key, value in self.file.metadata.items():
            name = key.removeprefix(prefix)
            if not key.startswith(prefix) or name in self._asked or name in _HARMLESS:
                continue
            accepted = _NEUTRAL.get(name)
            if accepted is None:
                known = sorted(self._asked | _NEUTRAL.keys())
                shown = f"an array of {len(value)}" if isinstance(value, GgufArray) else f"'{quote(value)}'"
                raise UnsupportedModel(
                    f"{self.file.path.name} sets {quote(key)} to {shown}, but {self._architecture} does not know "
                    f"this key; supported: {', '.join(known)}",
                    path=self.file.path,
                    key=key,
                    value=value,
                    supported=known,
                )
            if not _is_one_of(value, accepted):
                raise self.unsupported(name, value, " or ".join(map(str, accepted)))

    def rope(self, head_dim: int, context_tokens: int) -> RopeConfig:
        """Read the rotary embedding of all `head_dim` dimensions.

        Raises:
            CheckpointError: `head_dim` is odd, or a key is malformed.
            UnsupportedModel: the embedding is partial, or of another kind.
        """
        if head_dim % 2:
            raise CheckpointError(
                f"{self.file.path.name} gives heads of {head_dim} dimensions (attention.key_length, or "
                "rope.dimension_count), but rotary embedding needs an even number",
                path=self.file.path,
            )
        if (turning := self.integer("rope.dimension_count", head_dim)) != head_dim:
            raise self.unsupported("rope.dimension_count", turning, f"{head_dim}, the whole head")
        theta = self.number("rope.freq_base", 10_000.0)
        kind = self.file.text(
            self.key("rope.scaling.type"), "linear" if self.has("rope.scaling.factor") else "none"
        )
        factor = self.number("rope.scaling.factor", 1.0) if self.is_set("rope.scaling.factor") else 1.0
        original = self.integer("rope.scaling.original_context_length", context_tokens)
        match kind:
            case "none":
                return RopeConfig(theta=theta, rotary_dim=head_dim, original_context=context_tokens)
            case "linear":
                return RopeConfig(
                    theta=theta,
                    rotary_dim=head_dim,
                    kind="linear",
                    factor=factor,
                    original_context=context_tokens,
                )
            case "yarn":
                # The attention factor multiplies the one that yarn computes from its scaling factor.
                attention = self.number("rope.scaling.attn_factor", 1.0)
                computed = 1.0 + 0.1 * float(np.log(max(1.0, factor)))
                return RopeConfig(
                    theta=theta,
                    rotary_dim=head_dim,
                    kind="yarn",
                    factor=factor,
                    original_context=original,
                    beta_fast=self.number("rope.scaling.yarn_beta_fast", 32.0),
                    beta_slow=self.number("rope.scaling.yarn_beta_slow", 1.0),
                    attention_factor=None if attention == 1.0 else attention * computed,
                )
        raise self.unsupported("rope.scaling.type", kind, "none, linear, yarn")

    def is_set(self, name: str) -> bool:
        """Whether a number is given, and is not the 0 that writers use for "none"."""
        return self.file.metadata.get(self.key(name)) not in (None, 0.0)

    def _token_ids(self, *roles: str) -> list[int]:
        found = (self.file.token_id(role) for role in roles)
        return sorted({token_id for token_id in found if token_id is not None})


def _is_one_of(value: object, accepted: tuple[object, ...]) -> bool:
    # True == 1 in Python, but not in a file.
    return any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in accepted)


def frequency_factors(file: GgufFile, head_dim: int) -> tuple[float, ...]:
    """Read the divisors in `rope_freqs.weight` of the frequency of each rotary pair; empty if they change nothing.

    Raises:
        CheckpointError: its shape is not half a head, or it holds a value that cannot be a divisor.
    """
    ref = file.tensors.get("rope_freqs.weight")
    if ref is None:
        return ()
    if ref.shape != (head_dim // 2,):
        raise CheckpointError(
            f"{file.path.name}: rope_freqs.weight is {quote(list(ref.shape))}, expected [{head_dim // 2}]",
            path=file.path,
            tensor=ref.name,
        )
    values = read_values(ref)
    check_vector(ref.name, values, file.path)
    if (values <= 0).any():
        raise CheckpointError(
            f"{file.path.name}: rope_freqs.weight holds {values.min()}, expected numbers above zero",
            path=file.path,
            tensor=ref.name,
        )
    return () if (values == 1.0).all() else tuple(map(float, values))
