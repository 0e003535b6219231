"""Print the rooms of src/argosy: each module's lines of code and the first sentence of its docstring. `make map`.

Lines of code have no blank lines, comments and docstrings. `python .ci/map.py --sizes` prints the figures of the whole
house instead, and whatever is larger than the limits below.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST_FILES_OF_FOLDER, MOST_LINES_OF_FILE, MOST_LINES_OF_FUNCTION, MOST_PARAMETERS = 25, 600, 80, 10
MOST_LINES_OF_CORE = 46_400  # docs/decisions/0091-bound-the-core.md
GENERATED = ("families.md",)  # a table, not prose
_WRITTEN = re.compile(r"<!-- (?:results|plan): .*?<!-- end.*?-->", re.DOTALL)
# What the core runs without, below src/argosy; tests/test_core_alone.py deletes it from a copy.
OPTIONAL = {
    "several machines": ("cluster", "route", *(f"cli/commands/{one}.py" for one in ("worker", "cluster", "route"))),
    "studies": (
        "evaluate",
        *(f"observe/{one}.py" for one in ("ablation", "heat_map", "report", "texts", "trace")),
        *(f"cli/commands/{one}.py" for one in ("eval", "card", "routes")),
    ),
    "governance": (
        "serve/guards",
        "guard/pii",
        *(
            f"guard/{one}.py"
            for one in (
                "audit", "chain", "chain_writer", "guard_models", "policy", "screen", "sealed", "stops", "stores",
                "users", "verdict", "view", "watermark", "word_list",
            )
        ),
        *(f"cli/commands/{one}.py" for one in ("audit", "data", "watermark")),
    ),
    "adapters": ("adapters", "cli/commands/adapt.py"),
    "mixtures": ("demo", "checkpoint/dense.py", "checkpoint/upcycle.py", "cli/commands/upcycle.py"),
}  # fmt: skip
# Families, towers, ways to write tool calls, dialects and commands are members of registries: of these folders the core
# has only the named modules. The core also runs without what only other members need.
REGISTRIES = {
    "model/families": ("__init__", "nearest", "qwen3_moe", "qwen_moe"),
    "model/encoders": (
        "__init__",
        "blocks",
        "encoder",
        "mlx_towers",
        "mmproj",
        "projector",
        "reading",
        "table",
    ),
    "prompt/formats": (
        "__init__",
        "block_format",
        "events",
        "format",
        "hermes",
        "json_list",
        "lark",
        "parser",
        "plain",
        "table",
    ),
    "serve/dialects": (
        "__init__",
        "body",
        "openai_chat",
        "openai_chat_bodies",
        "openai_chunks",
        "openai_models",
    ),
    "cli/commands": (
        "__init__",
        "auditing",
        "completion",
        "listening",
        "plan",
        "plan_facts",
        "plan_traffic",
        "run",
        "serve",
        "served_library",
        "show",
    ),
}
ONLY_FOR_MEMBERS = (
    "batch.py", "model/whisper", *(f"media/{one}.py" for one in ("tiles", "transcript", "windows")),
    "engine/media/ears.py", "open/ears.py",
    "checkpoint/ctranslate2.py", "checkpoint/pack.py", "checkpoint/pack_conversion.py", "forecast/bench.py",
    "machine/neighbours.py", "machine/probes.py", "model/reading/experts_config.py",
    *(f"library/{one}.py" for one in ("modelfile", "pull", "remove", "search")),
    *(f"serve/answer/{one}.py" for one in ("embedding", "side_by_side")),
    *(f"cli/shared/{one}.py" for one in ("chat_models", "clients", "edit_file", "user_units")),
)  # fmt: skip
_NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}
_WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def lines_of_code(text: str) -> int:
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, _WITH_DOCSTRING) and ast.get_docstring(node):
            first = node.body[0]
            lines.difference_update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return len(lines)


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    left: list[ast.AST] = [tree]
    for node in left:  # only statements, which are a tenth of the nodes
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        for name in ("body", "orelse", "finalbody", "handlers", "cases"):
            left += getattr(node, name, ())


def num_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Parameters without `self` and `cls`."""
    named = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return sum(one.arg not in ("self", "cls") for one in named)


def too_large(source: Path) -> dict[str, list[tuple[str, int]]]:
    """What is larger than a limit, by limit: places below `source` and their sizes."""
    found: dict[str, list[tuple[str, int]]] = {
        "files in a folder": [],
        "lines of a file": [],
        "lines of a function": [],
        "parameters": [],
    }
    for folder in sorted({path.parent for path in source.rglob("*.py")}):
        modules = [path for path in folder.glob("*.py") if path.stem != "__init__"]
        if (count := len(modules)) > MOST_FILES_OF_FOLDER:
            found["files in a folder"].append((str(folder.relative_to(source)), count))
    for path in sorted(source.rglob("*.py")):
        text, where = path.read_text(), str(path.relative_to(source))
        if (count := text.count("\n")) > MOST_LINES_OF_FILE:
            found["lines of a file"].append((where, count))
        for function in functions(ast.parse(text)):
            count = (function.end_lineno or function.lineno) - function.lineno + 1
            if count > MOST_LINES_OF_FUNCTION:
                found["lines of a function"].append((f"{where}:{function.name}", count))
            if (count := num_parameters(function)) > MOST_PARAMETERS:
                found["parameters"].append((f"{where}:{function.name}", count))
    return found


def attributes(source: Path, class_name: str) -> int:
    """Names that methods of a class assign to `self`, or that its body declares, in whichever file it stands."""
    for path in source.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and node.name == class_name:
                names = {
                    one.attr
                    for one in ast.walk(node)
                    if isinstance(one, ast.Attribute)
                    and isinstance(one.ctx, ast.Store)
                    and isinstance(one.value, ast.Name)
                    and one.value.id == "self"
                }
                return len(names | {one.target.id for one in node.body if _is_field(one)})
    return 0


def _is_field(node: ast.stmt) -> bool:
    return isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)


def optional(source: Path) -> set[Path]:
    """The modules of optional rooms."""
    return {path for parts in OPTIONAL.values() for part in parts for path in _modules(source / part)}


def plug_ins(source: Path) -> set[Path]:
    """The members of registries that the core runs without, and what only they need; none of optional rooms."""
    members = {
        path
        for folder, core in REGISTRIES.items()
        for path in _modules(source / folder)
        if path.stem not in core
    }
    needed = {path for part in ONLY_FOR_MEMBERS for path in _modules(source / part)}
    return (members | needed) - optional(source)


def lines_of_core(source: Path) -> int:
    """Lines of code that every model shares."""
    left_out = optional(source) | plug_ins(source)
    return sum(lines_of_code(path.read_text()) for path in source.rglob("*.py") if path not in left_out)


def _modules(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


def words(paths: Iterator[Path] | list[Path]) -> int:
    """Count the words of pages, without the tables that scripts write into them."""
    return sum(len(_WRITTEN.sub("", path.read_text()).split()) for path in paths)


def print_sizes(root: Path) -> None:
    source = root / "src" / "argosy"
    texts = {path: path.read_text() for path in sorted(source.rglob("*.py"))}
    codes = {path: lines_of_code(text) for path, text in texts.items()}
    public = [
        name
        for text in texts.values()
        for node in ast.parse(text).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        for name in [node.name]
        if not name.startswith("_")
    ]
    slots = set(re.findall(r"\b[a-z_]*slots\b", "\n".join(texts.values())))
    pages = [root / name for name in ("README.md", "CHANGELOG.md", "SECURITY.md", "CONTRIBUTING.md")]
    pages += [page for page in sorted((root / "docs").rglob("*.md")) if page.name not in GENERATED]
    members = sum(codes[path] for path in plug_ins(source))
    rooms = sum(codes[path] for path in optional(source))
    figures = {
        "Python files": len(texts),
        "Python lines": sum(text.count("\n") for text in texts.values()),
        "Python lines of code": sum(codes.values()),
        "  the core, which every model shares": lines_of_core(source),
        "  members of registries that the core runs without": members,
        f"  optional: {', '.join(OPTIONAL)}": rooms,
        "public classes and functions": len(public),
        "names that end in slots": len(slots),
        "attributes of Engine": attributes(source, "Engine"),
        "attributes of Sequence": attributes(source, "Sequence"),
        "native lines": sum(
            path.read_text().count("\n")
            for path in (root / "native").rglob("*.*")
            if path.suffix in (".h", ".cpp") and "tests" not in path.parts
        ),
        "words of prose": words(pages),
        "benchmarks": len(list((root / "benchmarks").glob("*.py"))),
    }
    for name, figure in figures.items():
        print(f"{name:<64}{figure:>7,}")
    for limit, places in too_large(source).items():
        print(f"\n{limit} over the limit: {len(places)}")
        for where, count in sorted(places, key=lambda one: -one[1]):
            print(f"  {where:<64}{count:>6,}")


def print_map(source: Path) -> None:
    total = 0
    for folder in sorted({path.parent for path in source.rglob("*.py")}):
        modules = sorted(folder.glob("*.py"), key=lambda path: (path.stem != "__init__", path.stem))
        counts = {path: lines_of_code(path.read_text()) for path in modules}
        total += sum(counts.values())
        print(
            f"\n{folder.relative_to(source.parent)}/  {len(modules)} files, {sum(counts.values()):,} lines of code"
        )
        for path, count in counts.items():
            sentence = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
            if path.stem != "__init__" or sentence:
                print(f"  {path.stem:<28}{count:>5}  {sentence}")
    print(f"\n{total:,} lines of code in all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--sizes", action="store_true", help="figures of the whole house, and what is too large"
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="another checkout")
    asked = parser.parse_args()
    print_sizes(asked.root) if asked.sizes else print_map(asked.root / "src" / "argosy")


if __name__ == "__main__":
    main()
