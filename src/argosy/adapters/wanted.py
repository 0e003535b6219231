"""The adapters that a user wants: their names, where they are, and factors.

    --lora NAME=PATH[:FACTOR]  or  {"NAME": PATH, "OTHER": (PATH, FACTOR)}  ->  WantedAdapter

A server with several models names the model, too: --lora MODEL:NAME=PATH.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from argosy.config.engine import ExpertColumns, WantedAdapter
from argosy.errors import UsageError

MOST_ADAPTERS = 64  # of one engine
TAKEN = "latest"  # with Ollama, MODEL:latest is the model itself
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HINT = "for example `--lora support=./adapter`, or with half its effect `--lora support=./adapter:0.5`"

Wanted = Iterable[str] | Mapping[str, str | Path | tuple[str | Path, float]]


def wanted_adapters(given: Wanted, columns: ExpertColumns | None = None) -> tuple[WantedAdapter, ...]:
    """Read the options `loras` and `lora_columns`.

    Raises:
        UsageError: a name or a factor is invalid, two adapters have the same name, there are too many, or none for
            `columns`.
    """
    if isinstance(given, str):
        given = (given,)
    if isinstance(given, Mapping):
        found = [_of_pair(name, where) for name, where in given.items()]
    else:
        found = [one if isinstance(one, WantedAdapter) else _of_text(one) for one in given]
    if columns is not None:
        if not found:
            raise UsageError("--lora-columns says how to read adapters, and --lora names none", hint=_HINT)
        found = [one._replace(columns=columns) for one in found]
    names = [one.name for one in found]
    for one in found:
        require_name(one.name)
        require_factor(one.factor)
        if names.count(one.name) > 1:
            raise UsageError(f"two adapters are named {one.name}", hint="give each a name of its own")
    if len(found) > MOST_ADAPTERS:
        raise UsageError(f"{len(found)} adapters are named, and an engine has at most {MOST_ADAPTERS}")
    return tuple(found)


def by_model(
    texts: Sequence[str], models: Iterable[str], columns: ExpertColumns | None = None
) -> dict[str, tuple[WantedAdapter, ...]]:
    """Divide the adapters of `--lora` among the models of a server, by name.

    Raises:
        UsageError: a text names no model although there are several, or one that the server does not have; a model
            has the name by which requests would name an adapter; or what `wanted_adapters` raises.
    """
    if not texts:
        wanted_adapters((), columns)
    divided: dict[str, tuple[str, ...]] = dict.fromkeys(models, ())
    for text in texts:
        key, _, where = text.partition("=")
        model, _, name = key.rpartition(":")
        if not model and len(divided) == 1:
            (model,) = divided
        if model not in divided:
            said = f"names the model {model}" if model else "names no model"
            raise UsageError(
                f"--lora {text[:80]} {said}, and this server has: {', '.join(divided)}",
                hint="`--lora MODEL:NAME=PATH` says for which model it is",
            )
        divided[model] += (f"{name}={where}",)
    wanted = {model: wanted_adapters(found, columns if found else None) for model, found in divided.items()}
    for model, adapters in wanted.items():
        for one in adapters:
            if (name := f"{model}:{one.name}") in divided:
                raise UsageError(
                    f"a model and an adapter would both be named {name}",
                    hint="give one of them another name: `--lora` names adapters, and `--name` models",
                )
    return wanted


def chosen_adapter(model: str, texts: Iterable[str]) -> tuple[str, str | None]:
    """Return the model, and the adapter that answers: the one that MODEL:NAME names, or the only one.

    Raises:
        UsageError: there are several, and none is named.
    """
    names = [one.name for one in wanted_adapters(tuple(texts))]
    base, _, last = model.rpartition(":")
    if base and last in names:
        return base, last
    if len(names) > 1:
        raise UsageError(
            f"there are several adapters, and one answers: {', '.join(names)}",
            hint=f"name it behind the model: `{model}:{names[0]}`",
        )
    return model, names[0] if names else None


def compared_adapters(
    reference: str, candidate: str | None, texts: Iterable[str], columns: ExpertColumns | None = None
) -> tuple[tuple[str, WantedAdapter | None], tuple[str, WantedAdapter | None]]:
    """Return two models to compare, each with its adapter: the one that MODEL:NAME names.

    Without a candidate, it is the reference with the adapter that `chosen_adapter` finds.

    Raises:
        UsageError: there is no candidate and no adapter, or an adapter is on neither side.
    """
    wanted = {one.name: one for one in wanted_adapters(tuple(texts), columns)}
    if candidate is None:
        if not wanted:
            raise UsageError(
                "CANDIDATE is missing",
                hint="name a second model, or an adapter for the same one: `--lora NAME=PATH`",
            )
        base, name = chosen_adapter(reference, texts)
        reference, candidate = base, f"{base}:{name}"

    def side(model: str) -> tuple[str, WantedAdapter | None]:
        base, _, last = model.rpartition(":")
        return (base, wanted[last]) if base and last in wanted else (model, None)

    sides = side(reference), side(candidate)
    unused = [name for name, one in wanted.items() if one not in (sides[0][1], sides[1][1])]
    if unused:
        raise UsageError(
            f"neither model has the adapter {unused[0]}",
            hint=f"name it behind the model that has it: `{candidate}:{unused[0]}`",
        )
    return sides


def require_name(name: str) -> None:
    """Raise UsageError unless this can be the name of an adapter."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name == TAKEN:
        raise UsageError(
            f"an adapter cannot be named {str(name)[:80]!a}: a name has 1 to 64 letters, digits, '.', '_' and '-', "
            f"and is not '{TAKEN}'",
            hint=_HINT,
        )


def require_factor(factor: float) -> None:
    """Raise UsageError unless an adapter can be scaled by this."""
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not abs(factor) <= 1e4:
        raise UsageError(f"the factor of an adapter is a number from -10000 to 10000, found {factor!r:.40}")


def _of_pair(name: str, where: str | Path | tuple[str | Path, float]) -> WantedAdapter:
    path, factor = where if isinstance(where, tuple) else (where, 1.0)
    return WantedAdapter(name, Path(path), factor)


def _of_text(text: str) -> WantedAdapter:
    name, equals, where = text.partition("=")
    if not equals or not where:
        raise UsageError(f"--lora takes NAME=PATH, found '{text[:80]}'", hint=_HINT)
    path, colon, last = where.rpartition(":")
    if colon and path:
        try:
            factor = float(last)
        except ValueError:  # a path may contain colons
            pass
        else:
            if not math.isfinite(factor):
                raise UsageError(f"--lora {text[:80]}: the factor must be a finite number", hint=_HINT)
            return WantedAdapter(name, Path(path), factor)
    return WantedAdapter(name, Path(where))
