"""Read `config.json` key by key, so that nothing in it goes unnoticed.

    raw dict  ->  ConfigReader.integer("hidden_size"), ...  ->  finish(): a key that was not read is refused
                  ConfigReader.nested("text_config"), the text part of a multimodal config

A key is read (it affects the mathematics), neutral (known, and accepted only with a value that changes nothing),
harmless (training, generation or bookkeeping) or unknown. An unknown key may change the mathematics, so the model
is refused, naming the key. An absent key gets the default of the family's `transformers` 5 config class.

Elsewhere: a family's file lists its keys; `rope_config.py` reads rope.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from argosy.checkpoint.untrusted_file import kind_of, quote
from argosy.errors import CheckpointError, UnsupportedModel
from argosy.model.reading.quantization import KEY, KEYS, read_quantization

# Models have about a hundred layers and a few hundred experts; larger values mean a damaged file.
MOST_LAYERS = 4096
MOST_EXPERTS = 65_536
LARGEST_SIZE = 2**31 - 1

# Training, generation and bookkeeping: none of these keys changes what the weights compute.
HARMLESS = frozenset({
    "architectures", "auto_map", "model_type", "transformers_version", "_name_or_path", "name_or_path",
    "_commit_hash", "torch_dtype", "dtype", "initializer_range", "use_cache", "use_return_dict",
    "return_dict", "output_attentions", "output_hidden_states", "output_router_logits",
    "router_aux_loss_coef", "router_jitter_noise", "attention_dropout", "hidden_dropout", "embd_pdrop",
    "resid_pdrop", "attn_implementation", "_attn_implementation", "_attn_implementation_autoset",
    "experts_implementation", "pad_token_id", "tokenizer_class", "id2label", "label2id", "num_labels",
    "problem_type", "finetuning_task", "task_specific_params", "chunk_size_feed_forward",
    "gradient_checkpointing", "torchscript", "tie_encoder_decoder", "language", "license", "do_sample",
    "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty",
    "max_length", "min_length", "max_new_tokens", "no_repeat_ngram_size", "num_beams", "num_beam_groups",
    "num_return_sequences", "early_stopping", "diversity_penalty", "bad_words_ids", "suppress_tokens",
    "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id",
    "exponential_decay_length_penalty", "encoder_no_repeat_ngram_size", "remove_invalid_values",
    "return_dict_in_generate", "output_scores", "prefix", "unsloth_version", "unsloth_fixed",
    "aux_loss_alpha", "seq_aux", "ep_size", "sep_token_id", "decoder_start_token_id",
})  # fmt: skip

# Known switches of other models: accepted while they are off.
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "pretraining_tp": (1, None),
    "is_encoder_decoder": (False,),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": (None, {}),
    "per_layer_config": (None,),
    "tie_last_hidden_states": (None,),
    "use_bfloat16": (False, True),
    "tf_legacy_loss": (False,),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (False, None),
}


class AttentionShape(NamedTuple):
    """The hidden size and heads of a model."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


class ConfigReader:
    """One pass over a config: read every key that matters, then call `finish()`."""

    def __init__(
        self,
        raw: Mapping[str, object],
        family: str,
        path: Path = Path("config.json"),
        *,
        within: str | None = None,
        aliases: Mapping[str, str] = {},
    ) -> None:
        """Args:
        aliases: a family's other names of keys, and the names under which they are read.
        """
        self._aliases = {name: alias for alias, name in aliases.items() if alias in raw}
        for name, alias in self._aliases.items():
            if name in raw and not _is_same(raw[name], raw[alias]):
                raise CheckpointError(
                    f"{path.name} gives {alias} as {_as_json(raw[alias])} and {name}, its other name, as "
                    f"{_as_json(raw[name])}",
                    path=path,
                    key=alias,
                )
        self._raw = {aliases.get(key, key): value for key, value in raw.items()}
        self._family = family
        self._path = path
        self.where = path.name if within is None else f"{path.name}: {within}"
        self._asked: set[str] = set()

    def integer(self, *names: str, default: int | None, least: int = 1, most: int = LARGEST_SIZE) -> int:
        """Read a whole number under any of its `names`."""
        name, value = self._find(*names, default=default)
        if type(value) is not int or not least <= value <= most:
            raise self._wrong(name, value, f"a whole number from {least} to {most}")
        return value

    def optional_integer(self, name: str, default: int | None = None, least: int = 1) -> int | None:
        """Read a whole number, or None if it is null or absent."""
        if self._raw.get(name, default) is None:
            self._asked.add(name)
            return None
        return self.integer(name, default=default, least=least)

    def number(self, name: str, default: float) -> float:
        """Read a number above zero that fits a float32."""
        _, value = self._find(name, default=default)
        if not is_positive_number(value):
            raise self._wrong(name, value, "a number above zero")
        return float(value)  # type: ignore[arg-type]

    def negative_number(self, name: str, default: float) -> float:
        """Read a number below zero."""
        _, value = self._find(name, default=default)
        if not isinstance(value, int | float) or not is_positive_number(-value):
            raise self._wrong(name, value, "a number below zero")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        """Read a number above zero, or None if it is null or absent."""
        if self._raw.get(name) is None:
            self._asked.add(name)
            return None
        return self.number(name, 1.0)

    def flag(self, name: str, default: bool, *, also_true: int | None = None) -> bool:
        """Read true or false; `also_true` is a number that old files have for true."""
        _, value = self._find(name, default=default)
        if type(value) is int and value == also_true:
            return True
        if type(value) is not bool:
            raise self._wrong(name, value, "true or false")
        return value

    def one_of(self, name: str, default: str, supported: tuple[str, ...]) -> str:
        """Read a string, which must be one of `supported`."""
        _, value = self._find(name, default=default)
        if not isinstance(value, str) or value not in supported:
            raise self._unsupported(name, value, ", ".join(supported))
        return value

    def optional_text(self, name: str) -> str | None:
        """Read a string, or None if it is null or absent."""
        value = self._raw.get(name)
        self._asked.add(name)
        if value is not None and not isinstance(value, str):
            raise self._wrong(name, value, "a string or null")
        return value

    def optional_one_of(self, name: str, supported: tuple[str, ...]) -> str | None:
        """Read the same, or None if it is null or absent."""
        self._asked.add(name)
        return None if self._raw.get(name) is None else self.one_of(name, supported[0], supported)

    def is_list(self, name: str) -> bool:
        return isinstance(self._raw.get(name), list)

    def integers(self, name: str, *, least: int, most: int) -> tuple[int, ...]:
        """Read a list of whole numbers; empty if it is null or absent."""
        value = self._raw.get(name)
        self._asked.add(name)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(
            type(item) is int and least <= item <= most for item in value
        ):
            raise self._wrong(name, value, f"a list of whole numbers from {least} to {most}")
        return tuple(value)

    def numbers_of_layers(
        self, name: str, num_layers: int, num_mtp_layers: int, default: float = 0.0
    ) -> tuple[float, ...]:
        """Read a number of at least 0 for each layer, from a list (null means 0) or from one number for all layers.
        A list may go on with layers for multi-token prediction, which are ignored.
        """
        value = self._raw.get(name)
        self._asked.add(name)
        if value is None or is_positive_number(value):
            return (default if value is None else float(value),) * num_layers  # type: ignore[arg-type]
        if (
            not isinstance(value, list)
            or not num_layers <= len(value) <= num_layers + num_mtp_layers
            or not all(item is None or _is_same(item, 0) or is_positive_number(item) for item in value)
        ):
            raise self._wrong(name, value, f"a number from 0 on for each of {num_layers} layers")
        return tuple(float(item or 0) for item in value[:num_layers])

    def token_ids(self, name: str, default: int | None = None) -> tuple[int, ...]:
        """Read one token id, a list of token ids, or null."""
        value = self._raw.get(name, default)
        self._asked.add(name)
        items = value if isinstance(value, list) else [] if value is None else [value]
        token_ids = []
        for item in items:
            if type(item) is not int or not -1 <= item <= LARGEST_SIZE:
                raise self._wrong(name, value, "a token id, a list of them, or null")
            if item >= 0:  # some configs write -1 for "none"
                token_ids.append(item)
        return tuple(token_ids)

    def mapping(self, name: str) -> dict[str, object] | None:
        """Read an object, or None if it is null or absent."""
        value = self._raw.get(name)
        self._asked.add(name)
        if value is not None and not isinstance(value, dict):
            raise self._wrong(name, value, "an object or null")
        return value

    def nested(self, name: str, *model_types: str) -> ConfigReader:
        """Return a reader of the config inside this one, such as `text_config`, with its own `finish()`.

        Args:
            model_types: the family's model types; the inner config may name any of them.

        Raises:
            CheckpointError: it is missing, or not an object.   UnsupportedModel: it names another model_type.
        """
        inner = self.mapping(name)
        if inner is None:
            raise self._wrong(name, inner, "an object")
        reader = ConfigReader(inner, self._family, self._path, within=name)
        reader.one_of("model_type", model_types[0], model_types)
        return reader

    def numbered(self, name: str, end: int) -> list[tuple[int, ConfigReader]] | None:
        """Return readers of the configs under numbers from 0 to end - 1, each with its own `finish()`; None if null or
        absent.
        """
        configs = self.mapping(name)
        if configs is None:
            return None
        found = []
        for key, inner in configs.items():
            if not key.isdecimal() or len(key) > 9 or int(key) >= end:
                raise self._wrong(name, key, f"a number from 0 to {end - 1} as a key")
            if not isinstance(inner, dict):
                raise self._wrong(name, inner, "an object under each number")
            reader = ConfigReader(inner, self._family, self._path, within=f"{name}.{key}")
            found.append((int(key), reader))
        return found

    def texts(self, name: str) -> tuple[str, ...] | None:
        """Read a list of strings, or None if it is null or absent."""
        value = self._raw.get(name)
        self._asked.add(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(name, value, "a list of strings or null")
        return tuple(value)

    def attention_shape(
        self, *, hidden_size: int, num_heads: int, num_kv_heads: int | None, head_dim: int | None = None
    ) -> AttentionShape:
        """Read hidden size and heads; the arguments are the family's defaults. Null key heads means one per head.

        Raises:
            CheckpointError: a size is missing or malformed, or query heads are not a multiple of key heads.
        """
        hidden_size = self.integer("hidden_size", default=hidden_size)
        num_heads = self.integer("num_attention_heads", default=num_heads)
        num_kv_heads = self.optional_integer("num_key_value_heads", default=num_kv_heads) or num_heads
        if num_heads % num_kv_heads:
            raise CheckpointError(
                f"{self.where}: num_attention_heads is {num_heads}, expected a multiple of "
                f"num_key_value_heads, which is {num_kv_heads}",
                path=self._path,
                key="num_key_value_heads",
            )
        head_dim = self.optional_integer("head_dim", head_dim) or hidden_size // num_heads
        if head_dim == 0:
            raise CheckpointError(
                f"{self.where}: hidden_size {hidden_size} leaves nothing for each of {num_heads} heads",
                path=self._path,
                key="head_dim",
            )
        return AttentionShape(hidden_size, num_heads, num_kv_heads, head_dim)

    def layer_types(
        self,
        num_layers: int,
        supported: tuple[str, ...] = ("full_attention", "sliding_attention"),
        *,
        name: str = "layer_types",
        num_mtp_layers: int = 0,
    ) -> tuple[str, ...] | None:
        """Read a list with a supported kind for each layer, or None if it is absent. It may go on with kinds of layers
        for multi-token prediction, which are ignored.
        """
        kinds = self.texts(name)
        if kinds is None:
            return None
        for kind in kinds:
            if kind not in supported:
                raise self._unsupported(name, kind, ", ".join(supported))
        if not num_layers <= len(kinds) <= num_layers + num_mtp_layers:
            raise CheckpointError(
                f"{self.where}: {name} has {len(kinds)} entries, expected one for each of {num_layers} layers",
                path=self._path,
                key=name,
            )
        return kinds[:num_layers]

    def has(self, name: str) -> bool:
        return name in self._raw

    def lift(self, name: str, *keys: str, default: Mapping[str, object]) -> None:
        """Make keys of the object `name`, which is `default` if it is null or absent, keys "name.key" of their own."""
        inner = self.mapping(name) or default
        lifted = {f"{name}.{key}": value for key, value in inner.items() if key in keys}
        self._raw = {
            **self._raw,
            name: {key: value for key, value in inner.items() if key not in keys},
            **lifted,
        }

    def beginning_with(self, prefix: str) -> dict[str, object]:
        """Return the keys with this prefix, without it."""
        return {
            name.removeprefix(prefix): value for name, value in self._raw.items() if name.startswith(prefix)
        }

    def neutral(self, name: str, *accepted: object) -> None:
        """Accept a key of other models if its value changes nothing."""
        self._asked.add(name)
        if name in self._raw and not any(_is_same(self._raw[name], value) for value in accepted):
            raise self._unsupported(name, self._raw[name], " or ".join(_as_json(value) for value in accepted))

    def passed(self, *names: str) -> None:
        """Accept keys with any value, because they describe another part of the model."""
        self._asked.update(names)

    def unsupported(self, name: str, supported: str) -> UnsupportedModel:
        """Return the error for a value that is well-formed but not supported."""
        return self._unsupported(name, self._raw.get(name), supported)

    def finish(self) -> None:
        """Refuse every key that was not read.

        Raises:
            UnsupportedModel: names the key, its value and the supported keys.
        """
        if KEY not in self._asked:
            read_quantization(self._raw, self._path)
        self._asked.update(KEYS)
        for name, accepted in NEUTRAL.items():
            if name not in self._asked:
                self.neutral(name, *accepted)
        for key, value in self._raw.items():
            if key not in self._asked and key not in HARMLESS:
                raise UnsupportedModel(
                    f"{self.where} sets {quote(key)} to {_as_json(value)}, but {self._family} does not "
                    f"know this key; supported: {', '.join(sorted(self._asked - NEUTRAL.keys()))}",
                    key=key,
                    value=value,
                    supported=sorted(self._asked - NEUTRAL.keys()),
                )

    def _find(self, *names: str, default: object) -> tuple[str, object]:
        """Find the value under any of its names; if several are given, they must agree."""
        self._asked.update(names)
        given = [name for name in names if name in self._raw]
        if not given:
            return names[0], default
        for other in given[1:]:
            if not _is_same(self._raw[other], self._raw[given[0]]):
                raise CheckpointError(
                    f"{self.where} gives {given[0]} as {_as_json(self._raw[given[0]])} and {other}, "
                    f"its other name, as {_as_json(self._raw[other])}",
                    path=self._path,
                    key=other,
                )
        return given[0], self._raw[given[0]]

    def _wrong(self, name: str, value: object, expected: str) -> CheckpointError:
        found = (
            _as_json(value)
            if value is None or isinstance(value, bool)
            else f"{_as_json(value)}, {kind_of(value)}"
        )
        return CheckpointError(
            f"{self.where}: {self._aliases.get(name, name)} is {found}; expected {expected}",
            path=self._path,
            key=name,
            value=value,
        )

    def _unsupported(self, name: str, value: object, supported: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"{self.where} asks for {self._aliases.get(name, name)} {_as_json(value)}; supported: {supported}",
            path=self._path,
            key=name,
            value=value,
            supported=supported,
        )


def is_positive_number(value: object) -> bool:
    # Products are in float32, where larger numbers are infinite, and smaller ones zero.
    return isinstance(value, int | float) and not isinstance(value, bool) and 1e-37 < value < 1e38


def _is_same(one: object, other: object) -> bool:
    # True == 1 in Python, but not in JSON.
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _as_json(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"'{quote(value)}'" if isinstance(value, str) else quote(value)
