"""Which room may import which: the imports themselves follow the design's table."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "argosy"

EVERYONE = {
    "config",
    "confine",
    "confined_process",
    "directory",
    "errors",
    "installed",
    "private_files",
    "strict_json",
    "user_directories",
}
MAY_IMPORT = {
    "machine": {"_native"},
    "media": set(),
    "guard": set(),
    "checkpoint": {"_native"},
    "experts": {"checkpoint", "_native"},
    "prompt": {"media", "checkpoint"},
    "model": {"media", "checkpoint", "experts", "prompt", "_native"},
    "kept": {"_native"},
    "adapters": {"machine", "checkpoint", "experts", "model", "prompt", "_native"},
    "budget": {"adapters", "machine", "media", "checkpoint", "experts", "prompt", "model", "kept", "_native"},
    "demo": {"checkpoint", "model"},
    "library": {"machine", "checkpoint", "model"},
    "engine": {
        "machine",
        "media",
        "checkpoint",
        "experts",
        "prompt",
        "model",
        "kept",
        "adapters",
        "budget",
        "_native",
    },
    # The one place above the engine where names become files.
    "open": {"checkpoint", "experts", "model", "budget", "demo", "library", "engine"},
    "forecast": {
        "machine",
        "media",
        "checkpoint",
        "experts",
        "prompt",
        "model",
        "budget",
        "engine",
        "open",
        "_native",
    },
    "observe": {"checkpoint", "experts", "_native"},
    "serve": {
        "media",
        "guard",
        "experts",
        "prompt",
        "adapters",
        "budget",
        "library",
        "engine",
        "forecast",
        "observe",
    },
    "route": {"guard", "serve"},
    "batch": {"engine", "open"},
    "evaluate": {
        "adapters",
        "machine",
        "checkpoint",
        "prompt",
        "model",
        "library",
        "engine",
        "open",
        "forecast",
    },
    "cluster": {"machine", "checkpoint", "experts", "model", "_native"},
    "config": {"errors"},
    "confine": set(),
    "confined_process": {"errors"},
    "directory": set(),
    "errors": set(),
    "installed": set(),
    "private_files": {"directory", "errors"},
    "strict_json": set(),
    "user_directories": {"errors"},
}
# The folders of serve/ and its files, from the ground floor up: each imports only those before it.
SERVE = ("http", "claims", "answer", "models", "governance", "guards", "dialects", "admin", "app", "run")
ANY_ROOM = {"cli", "__init__", "__main__"}  # the command line, and the package's public names

# Only `argosy adapt` imports them.
TRAINS_WITH_TORCH = {
    "adapters/making/mixture.py",
    "adapters/making/training.py",
    "cli/commands/adapt.py",
}
NEVER_AT_RUN_TIME = {"torch", "transformers", "pickle", "_pickle", "marshal", "shelve", "dill", "safetensors"}


def test_every_room_has_a_row() -> None:
    assert {room_of(path) for path in modules()} <= MAY_IMPORT.keys() | ANY_ROOM


def test_allowed_imports_never_form_a_circle() -> None:
    TopologicalSorter(MAY_IMPORT).prepare()  # raises CycleError


def test_the_map_lists_the_rooms_by_floor() -> None:
    """A room imports only rooms that stand in a line above its own."""
    text = (SOURCE.parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    lines = text[text.index("| room |") : text.index("| native |")].splitlines()
    floor_of = {
        room: floor
        for floor, line in enumerate(lines)
        if line.startswith("|")
        for room in re.findall(r"`(\w+)/?`", line.split("|")[1])
    }
    assert floor_of.keys() >= MAY_IMPORT.keys() - EVERYONE
    found = [
        f"{room} imports {one}"
        for room in MAY_IMPORT.keys() - EVERYONE
        for one in MAY_IMPORT[room] & floor_of.keys()
        if floor_of[one] >= floor_of[room]
    ]
    assert found == []


def test_nothing_is_allowed_that_no_room_needs() -> None:
    used = {room: set[str]() for room in MAY_IMPORT}
    for path in modules():
        if room_of(path) in used:
            names = [imported for _, imported in imports(path) if imported.startswith("argosy.")]
            used[room_of(path)] |= set(map(target_room, names))
    assert {room: unused for room, allowed in MAY_IMPORT.items() if (unused := allowed - used[room])} == {}


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_a_room_imports_only_what_the_design_allows(room: str) -> None:
    allowed = MAY_IMPORT[room] | {room} | (EVERYONE if room not in EVERYONE else set())
    found = [
        f"{path.relative_to(SOURCE)}:{line} imports {imported}"
        for path in modules()
        if room_of(path) == room
        for line, imported in imports(path)
        if imported.startswith("argosy") and target_room(imported) not in allowed
    ]
    assert found == []


def test_no_folder_is_deeper_than_it_must_be() -> None:
    """A room may have folders, each with at least three modules, and they have none; families are too many for one."""
    found = [
        f"{folder.relative_to(SOURCE)}/ has {num_modules} modules"
        for folder in sorted({path.parent for path in modules()} - {SOURCE})
        if (
            (num_modules := sum(path.stem != "__init__" for path in folder.glob("*.py"))) < 3
            and folder.relative_to(SOURCE).as_posix() not in ("cli", "model/families")  # they have folders
        )
        or len(folder.relative_to(SOURCE).parts) > (3 if folder.parent.name == "families" else 2)
    ]
    assert found == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports inside functions and for type checking count too, because they only hide a circle."""
    names = {module_name(path): path for path in modules()}
    graph = {
        name: {
            target
            for _, imported in imports(path)
            if (target := imported_module(imported, names)) not in (None, name)
        }
        for name, path in names.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_folders_of_serve_import_only_those_below_them() -> None:
    def floor(name: str) -> int:
        return SERVE.index(name.removeprefix("argosy.serve.").partition(".")[0])

    names = {module_name(path): path for path in modules() if room_of(path) == "serve"}
    found = [
        f"{name} imports {imported}"
        for name, path in names.items()
        if name != "argosy.serve"
        for _, imported in imports(path)
        if imported.startswith("argosy.serve.") and floor(imported) > floor(name)
    ]
    assert found == []


def test_no_dialect_imports_another() -> None:
    names = ("anthropic_messages", "ollama", "openai_chat", "openai_completions", "openai_responses")
    dialect_of = {
        path.stem: name
        for path in modules()
        for name in names
        if room_of(path) == "serve" and path.stem in (name, f"{name}_bodies", f"{name}_models")
    }
    assert set(dialect_of.values()) == set(names)
    found = [
        f"{path.stem} imports {imported}"
        for path in modules()
        if path.stem in dialect_of
        for _, imported in imports(path)
        for part in imported.split(".")
        if dialect_of.get(part, dialect_of[path.stem]) != dialect_of[path.stem]
    ]
    assert found == []


def test_nothing_imports_torch_or_reads_a_pickle() -> None:
    found = [
        f"{path.relative_to(SOURCE)}:{line} imports {imported}"
        for path in modules()
        for line, imported in imports(path)
        if imported.partition(".")[0] in NEVER_AT_RUN_TIME
        and not (imported.startswith("torch") and path.relative_to(SOURCE).as_posix() in TRAINS_WITH_TORCH)
    ]
    assert found == []


def test_only_the_command_that_trains_imports_what_imports_torch() -> None:
    trains = {"argosy.adapters.making.mixture", "argosy.adapters.making.training"}
    found = {
        path.relative_to(SOURCE).as_posix()
        for path in modules()
        for _, imported in imports(path)
        if any(imported.startswith(one) for one in trains)
    }
    assert found <= TRAINS_WITH_TORCH


def test_the_check_sees_every_kind_of_import(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text(
        "import argosy.engine.engine as e\n"
        "from argosy import _native, errors\n"
        "from argosy.model import rope\n"
        "def later():\n    import importlib\n    importlib.import_module('argosy.cli.main')\n    __import__('torch')\n"
        "    members('argosy.model.families', ('attention.olmoe', 'no_family'))\n"
    )
    assert [imported for _, imported in imports(module)] == [
        "argosy.engine.engine",
        "argosy._native",
        "argosy.errors",
        "argosy.model.rope",
        "importlib",
        "argosy.cli.main",
        "torch",
        "argosy.model.families.attention.olmoe",
    ]


def module_name(path: Path) -> str:
    return ".".join(("argosy", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")


def imported_module(imported: str, names: Mapping[str, Path]) -> str | None:
    """Return the module of `imported`, the absolute name of a module or of something in it."""
    if imported in names:
        return imported
    module = imported.rpartition(".")[0]
    # The package's own names are re-exported from below, and `argosy._native` has no source here.
    return module if module in names and module != "argosy" else None


@functools.cache
def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def target_room(imported: str) -> str:
    """Return the room of an absolute name; the package itself stands for its public names, which only callers use."""
    parts = imported.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


@functools.cache
def imports(path: Path) -> tuple[tuple[int, str], ...]:
    """Return (line, absolute module name) of each import, including those in functions and under TYPE_CHECKING."""
    nodes = [*ast.walk(ast.parse(path.read_text()))]
    calls: list[Any] = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom | ast.Call)]
    words = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    calls.sort(key=lambda node: (node.lineno, node.col_offset))
    return tuple(found for node in calls for found in _imported(path, node, words))


def _imported(path: Path, node: Any, words: list[str]) -> Iterator[tuple[int, str]]:
    """Yield what one node imports, in a module that has these strings."""
    match node:
        case ast.Import(names=names):
            yield from ((node.lineno, alias.name) for alias in names)
        case ast.ImportFrom(level=0, module=str(module), names=names):
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in names)
        case ast.ImportFrom():
            pytest.fail(f"{path}:{node.lineno}: relative imports are not used here")
        case ast.Call(
            func=ast.Name(id="__import__" | "import_module") | ast.Attribute(attr="import_module"),
            args=[ast.Constant(value=str(name)), *_],
        ):
            yield node.lineno, name
        case ast.Call(func=ast.Name(id="members"), args=[ast.Constant(value=str(package)), *_]):
            folder = SOURCE.joinpath(*package.split(".")[1:])
            members = sorted(
                word
                for word in {*words}
                if all(part.isidentifier() for part in word.split("."))
                and folder.joinpath(*word.split(".")).with_suffix(".py").is_file()
            )
            yield from ((node.lineno, f"{package}.{name}") for name in members)
