"""Read the settings of a processor key by key, so that no key that changes the mathematics goes unnoticed.

    the object in preprocessor_config.json  ->  Settings.integer("patch_size", 14), ...  ->  finish()

A null key counts as absent, as in the reference processors. An unread key may change what the model sees, so the model
is refused and the error names the key.

Elsewhere: `pictures.py` and `sounds.py` know the keys.
"""

from __future__ import annotations

from collections.abc import Mapping

from argosy.errors import CheckpointError, UnsupportedModel

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")  # the first file that exists counts
VIDEO_FILES = ("video_preprocessor_config.json", *PROCESSOR_FILES)

# Keys of every processor that do not change values: names, layouts and containers of results, and parameters of
# switches that must be off.
_HARMLESS = frozenset({
    "_processor_class", "_valid_processor_keys", "auto_map", "crop_size", "data_format", "default_to_square", "device",
    "disable_grouping", "feature_extractor_type", "image_processor_type", "input_data_format", "pad_size",
    "processor_class", "return_attention_mask", "return_tensors", "transformers_version",
})  # fmt: skip

# Qwen3-Omni keeps the settings of pictures and of sounds in one object, so each reader passes over the other's keys.
PICTURE_KEYS = frozenset({
    "do_convert_rgb", "do_normalize", "do_rescale", "do_resize", "image_mean", "image_std", "max_pixels", "merge_size",
    "min_pixels", "patch_size", "resample", "rescale_factor", "size", "temporal_patch_size",
})  # fmt: skip
SOUND_KEYS = frozenset({
    "chunk_length", "dither", "feature_size", "hop_length", "n_fft", "n_samples", "nb_max_frames", "padding_side",
    "padding_value", "sampling_rate",
})  # fmt: skip


class Settings:
    """One pass over the settings; `where` names their file in errors."""

    def __init__(self, raw: Mapping[str, object], where: str = "preprocessor_config.json") -> None:
        self._raw = {key: value for key, value in raw.items() if value is not None}
        self._where = where
        self._asked: set[str] = set()

    def has(self, name: str) -> bool:
        return name in self._raw

    def integer(self, name: str, default: int | None, *, least: int = 1, most: int = 2**31 - 1) -> int:
        value = self._find(name, default)
        if type(value) is not int or not least <= value <= most:
            raise self._wrong(name, value, f"a whole number from {least} to {most}")
        return value

    def side(self, name: str, default: int, *, most: int) -> int:
        """Read the side of a square: a whole number, or an equal height and width."""
        if not isinstance(self._raw.get(name), dict):
            return self.integer(name, default, most=most)
        return self.square(name, default, most=most)

    def square(self, name: str, default: int, *, most: int = 2**31 - 1) -> int:
        """Read the side of a square from an object with an equal height and width."""
        square = self.nested(name)
        if square is None:
            return default
        side = square.integer("height", None, most=most)
        square.fixed("width", side)
        square.finish()
        return side

    def number(self, name: str, default: float) -> float:
        value = self._find(name, default)
        if not _is_number(value) or not 0 < value < 1e9:  # type: ignore[operator]
            raise self._wrong(name, value, "a number above zero")
        return float(value)  # type: ignore[arg-type]

    def flag(self, name: str, default: bool) -> bool:
        value = self._find(name, default)
        if type(value) is not bool:
            raise self._wrong(name, value, "true or false")
        return value

    def colour(self, name: str, default: tuple[float, float, float]) -> tuple[float, float, float]:
        """Read three numbers, one for each channel."""
        value = self._find(name, list(default))
        if not isinstance(value, list) or len(value) != 3 or not all(map(_is_number, value)):
            raise self._wrong(name, value, "a list of three numbers")
        red, green, blue = map(float, value)
        return red, green, blue

    def nested(self, name: str) -> Settings | None:
        """Return the settings inside `name`, with their own `finish()`, or None if there are none."""
        value = self._find(name, None)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self._wrong(name, value, "an object")
        return Settings(value, f"{self._where}: {name}")

    def fixed(self, name: str, *supported: object) -> None:
        """Accept a key only with a supported value; an absent key is accepted."""
        self._asked.add(name)
        value = self._raw.get(name, supported[0])
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in supported):
            raise UnsupportedModel(
                f"{self._where} asks for {name} {_shown(value)}; supported: {', '.join(map(_shown, supported))}",
                key=name,
                value=value,
                supported=supported,
            )

    def holds(self, name: str, *values: object) -> bool:
        """Whether a key has one of these values, and count it as read."""
        return self._find(name, None) in values

    def passed(self, *names: str) -> None:
        """Accept keys with any value, because they concern something else."""
        self._asked.update(names)

    def finish(self, others: frozenset[str] = frozenset()) -> None:
        """Refuse every unread key, except `others`.

        Raises:
            UnsupportedModel: names the key.
        """
        for key, value in self._raw.items():
            if key not in self._asked | _HARMLESS | others:
                known = ", ".join(sorted(self._asked))
                raise UnsupportedModel(
                    f"{self._where} sets {_shown(key)} to {_shown(value)}, which is not known here; supported: {known}",
                    key=key,
                    value=value,
                    supported=sorted(self._asked),
                )

    def _find(self, name: str, default: object) -> object:
        self._asked.add(name)
        return self._raw.get(name, default)

    def _wrong(self, name: str, value: object, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{self._where}: {name} is {_shown(value)}; expected {expected}", key=name, value=value
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def _shown(value: object) -> str:
    """Format a value for an error, short and on one line."""
    text = (
        {None: "null", True: "true", False: "false"}.get(value)
        if isinstance(value, bool | None)
        else repr(value)
    )
    assert text is not None
    return text if len(text) <= 80 else text[:77] + "..."
