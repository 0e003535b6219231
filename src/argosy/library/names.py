"""Find a model by what a caller writes: `demo`, a path, an alias or preset, a name, or an unambiguous part of one.

A path that exists always wins, so that a command that names a file never changes its meaning. A name like
OWNER/NAME is complete: it never matches as part of a longer one.

Elsewhere: `places.py` finds the models; `open/models.py` has `locate_model`, which every command calls.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from argosy.checkpoint.gguf_names import GGUF_SUFFIX, PART_NAME
from argosy.checkpoint.untrusted_file import quote
from argosy.config import DEMO, Preset
from argosy.errors import ArgosyError, CheckpointError, UsageError
from argosy.library import kept, presets
from argosy.library.places import Found, Model, find_models

_MOST_SHOWN = 12


def find(text: str) -> Model | Path | None:
    """Find a model: `demo`, a path that exists or is an alias's target, or a model in the library; None if there is
    none.

    Raises:
        UsageError: several models match.   CheckpointError: parts of the model are missing.
    """
    if text == DEMO or _exists(text):
        return Path(text)
    return _find(text, find_models())


class Named(NamedTuple):
    """The result of looking up a text.

    path: None if it names nothing here.
    name: the full name of the model, or the path for which the text is an alias; None for `demo` and paths.
    """

    text: str
    path: Path | None
    name: str | None


def look_up(text: str) -> Named:
    """Look a text up, reading the library once.

    Raises:
        UsageError: several models match.   CheckpointError: parts of the model are missing.
    """
    if text == DEMO or _exists(text):
        return Named(text, Path(text), None)
    model = find(text)
    if model is None:
        return Named(text, None, None)
    return Named(text, model, str(model)) if isinstance(model, Path) else Named(text, model.path, model.name)


def name_of(text: str) -> str:
    """The name to show for `text`: the model's full name in the library, or the last part of its path.

    Raises:
        UsageError: several models match.   CheckpointError: parts of the model are missing.
    """
    named = look_up(text)
    if named.path is None or str(named.path) == DEMO:
        return named.name or text
    path = named.path.resolve()
    known = (model.name for model in find_models().models if model.path.resolve() == path)
    return next(known, path.name)


def is_name(text: str) -> bool:
    """Whether `text` is a complete name: `demo`, a model's path, an alias, or a name with or without owner and
    format. A part of a name is not enough.
    """
    if text == DEMO:
        return True
    if _exists(text):
        return Path(text).suffix == GGUF_SUFFIX or _exists(f"{text}/config.json")
    try:
        known = (*kept.read().aliases, *presets.names())
        return text in known or find_exactly(text, find_models().models) is not None
    except (ArgosyError, OSError):  # the command reports these when it opens the model
        return False


def find_exactly(text: str, models: Sequence[Model]) -> Model | None:
    """Find the model with that name, even if files are missing; a part of a name is not enough.

    Raises:
        UsageError: several models match.
    """
    return _named(text, models, allow_part=False)


def locate(text: str) -> Path:
    """The path of the model that `text` names. A text that can only be a path is returned even if it does not
    exist.

    Raises:
        UsageError: several models match.   CheckpointError: none matches, or parts of it are missing.
    """
    if text == DEMO or _exists(text):
        return Path(text)
    found = find_models()
    model = _find(text, found)
    if model is None and _is_path(text):
        return Path(text)
    if model is None:
        raise _unknown(text, found)
    return model if isinstance(model, Path) else model.path


def other_names(models: Sequence[str], aliases: Mapping[str, str]) -> dict[str, str]:
    """Further names in lower case, with the full names that they stand for: models' aliases, and unambiguous names
    without owner or format.
    """
    short: dict[str, set[str]] = {}
    for name in models:
        whole, _, format = name.lower().partition(":")
        last = whole.rpartition("/")[2]
        for form in (name.lower(), whole, last, f"{last}:{format}"):
            short.setdefault(form, set()).add(name)
    return {form: next(iter(names)) for form, names in short.items() if len(names) == 1} | {
        alias.lower(): target for alias, target in aliases.items() if not Path(target).is_absolute()
    }


def add_alias(alias: str, target: str) -> str:
    """Make `alias` stand for a model, by its full name, or for a path; return which.

    Raises:
        UsageError: it cannot be an alias, or several models match the target.   CheckpointError: no such target.
    """
    if not kept.is_alias(alias):
        raise UsageError(
            f"'{quote(alias)}' cannot be an alias",
            hint=f"an alias has at most 64 letters, digits, '.', '_' and '-', and is not '{DEMO}'",
        )
    found = find_models()
    if any(model.name == alias for model in found.models):
        raise UsageError(f"'{alias}' is the name of a model already")
    if alias in presets.names():
        raise UsageError(
            f"'{alias}' is the name of a preset already", hint=f"`argosy preset {alias} --remove` forgets it"
        )
    whole = _stands_for(target, found)
    with kept.changing() as known:
        known.aliases[alias] = whole
    return whole


def _stands_for(target: str, found: Found) -> str:
    """`demo`, the absolute path of a file or directory, or a model's full name. Raises what `locate` raises."""
    if target == DEMO:
        return DEMO
    if _exists(target):
        return str(Path(target).resolve())
    model = _find(target, found)
    if model is None:
        raise _unknown(target, found)
    return str(model) if isinstance(model, Path) else model.name


def preset_of(text: str) -> Preset | None:
    """The preset that `text` names; None if it names none, or if a path or an alias takes precedence.

    Raises:
        UsageError: its file, or that of the aliases, is damaged.
    """
    if text == DEMO or _exists(text) or text in kept.read().aliases:
        return None
    return presets.find(text)


def base_of(name: str, target: str) -> str:
    """The model of a new preset: `target` by its name in the library, even if a path is given.

    Raises:
        UsageError: the preset cannot have that name, or several models match the target.
    """
    if not kept.is_alias(name):
        raise UsageError(
            f"'{quote(name)}' cannot be the name of a preset",
            hint=f"a name has at most 64 letters, digits, '.', '_' and '-', and is not '{DEMO}'",
        )
    found = find_models()
    if find_exactly(name, found.models) is not None:
        raise UsageError(f"'{name}' is the name of a model already")
    if name in kept.read().aliases:
        raise UsageError(f"'{name}' is an alias already", hint=f"`argosy alias {name} --remove` forgets it")
    if (other := preset_of(target)) is not None:
        raise UsageError(
            f"'{target}' is a preset, and a preset needs a model", hint=f"its model is {quote(other.model)}"
        )
    return whole_name(target)


def whole_name(target: str) -> str:
    """The canonical name of `target`: its name in the library, even if a path is given; `demo`; or its absolute
    path.

    Raises:
        UsageError: several models match.   CheckpointError: the target does not exist.
    """
    found = find_models()
    whole = _stands_for(target, found)
    path = Path(whole)
    return next(
        (one.name for one in found.models if path.is_absolute() and one.path.resolve() == path), whole
    )


def remove_alias(alias: str) -> str:
    """Forget an alias; return what it stood for.

    Raises:
        UsageError: there is no such alias.
    """
    with kept.changing() as known:
        if alias not in known.aliases:
            raise UsageError(
                f"'{quote(alias)}' is not an alias",
                hint="`argosy alias` lists them",
            )
        return known.aliases.pop(alias)


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except OSError:  # no name of a file is as long as that
        return False


def _find(text: str, found: Found) -> Model | Path | None:
    target, what = kept.read().aliases.get(text), "alias"
    if target is None and (preset := presets.find(text)) is not None:
        target, what = preset.model, "preset"
    if target is not None:
        if target == DEMO:
            return Path(DEMO)
        if Path(target).is_absolute():
            if not _exists(target):
                raise CheckpointError(f"the {what} '{text}' stands for {quote(target)}, which does not exist")
            return Path(target)
        if (model := _named(target, found.models, allow_part=False)) is None:
            raise CheckpointError(
                f"the {what} '{text}' stands for {quote(target)}, which is not here",
                hint=f"`argosy {what} {text} --remove` forgets it",
            )
    elif (model := _named(text, found.models, allow_part=True)) is None:
        return None
    if model.num_missing:
        at = f" --revision {model.asked}" if model.asked else ""
        raise CheckpointError(
            f"{model.name} is incomplete: {model.num_missing} of its files are missing from {model.path}",
            hint=f"`argosy pull {model.name}{at}` fetches them" if model.place == "hub" else None,
        )
    return model


def _named(text: str, models: Sequence[Model], *, allow_part: bool) -> Model | None:
    """The model with that name; otherwise the one whose name without owner or format it is, or that has the file or
    folder which it names instead of the format; otherwise the one whose name contains it.
    """
    wanted = text.lower()
    repository, _, part = wanted.partition(":")
    part = part.rpartition("/")[2].removesuffix(GGUF_SUFFIX)

    def file_of(model: Model) -> str:
        """The name of its GGUF file without suffix and number of the part; "" for others, and files named by digest."""
        split = PART_NAME.fullmatch(model.path.name)
        name = split["stem"] if split else model.path.name
        return name.removesuffix(GGUF_SUFFIX).lower() if model.path.suffix == GGUF_SUFFIX else ""

    def is_short_form(model: Model) -> bool:
        whole, _, format = model.name.lower().partition(":")
        short = whole.rpartition("/")[2]
        stored = file_of(model), model.path.parent.name.lower()
        return repository in (whole, short) and part in ("", format, *stored)

    def is_part(model: Model) -> bool:
        whole, _, format = model.name.lower().partition(":")
        if "/" in repository:
            return repository == whole and (part in format or part in file_of(model))
        return wanted in model.name.lower() or (bool(part) and repository in whole and part in format)

    for matches in (
        lambda model: model.name.lower() == wanted,
        is_short_form,
        *([is_part] if allow_part else []),
    ):
        # The same name in two places is one model, taken from the first place.
        matching = {model.name: model for model in reversed(models) if matches(model)}
        if len(matching) > 1:
            names = sorted(matching)
            more = f" and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
            raise UsageError(
                f"'{quote(text)}' matches {len(names)} models: {', '.join(names[:_MOST_SHOWN])}{more}",
                hint="give one of the full names, or `argosy alias NAME TARGET`",
            )
        if matching:
            return next(iter(matching.values()))
    return None


def _unknown(text: str, found: Found) -> CheckpointError:
    """The error for an unknown name: it lists similar names, and how to get the model."""
    if _is_path(text):
        return CheckpointError(f"{quote(text)} does not exist", path=Path(text))
    from argosy.checkpoint.hub import Source  # imports HTTP, which an engine does not need

    names = [*(model.name for model in found.models), *kept.read().aliases, *presets.names()]
    short = {name.rpartition("/")[2].lower(): name for name in names}
    near = difflib.get_close_matches(text.rpartition("/")[2].lower(), short, n=3, cutoff=0.6)
    said = f"; near: {', '.join(short[name] for name in near)}" if near else ""
    if "/" in text and Source.find(text, {}) is not None:
        hint = f"`argosy pull {text}` fetches it from the hub, and `argosy plan {text}` says first whether it fits"
    else:
        hint = "`argosy list` shows the models that are here; `argosy search WORDS` finds others to pull"
    return CheckpointError(f"no model here is named '{quote(text)}'{said}", hint=hint, path=Path(text))


def _is_path(text: str) -> bool:
    """Whether a text that neither exists nor names a model can only be a path."""
    path = Path(text)
    parts = len(path.parts)
    is_below = parts > 1 and _exists(str(path.parent))
    return text.startswith(("/", ".", "~")) or is_below or path.suffix == GGUF_SUFFIX or parts > 2
