"""Print the rooms of src/argosy: each module's lines of code and the first sentence of its docstring. `make map`.

Lines of code have no blank lines, comments and docstrings.
"""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "argosy"
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
            lines.difference_update(range(first.lineno, first.end_lineno + 1))
    return len(lines)


def main() -> None:
    total = 0
    for folder in sorted({path.parent for path in SOURCE.rglob("*.py")}):
        modules = sorted(folder.glob("*.py"), key=lambda path: (path.stem != "__init__", path.stem))
        counts = {path: lines_of_code(path.read_text()) for path in modules}
        total += sum(counts.values())
        print(
            f"\n{folder.relative_to(SOURCE.parent)}/  {len(modules)} files, {sum(counts.values()):,} lines of code"
        )
        for path, count in counts.items():
            sentence = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
            if path.stem != "__init__" or sentence:
                print(f"  {path.stem:<28}{count:>5}  {sentence}")
    print(f"\n{total:,} lines of code in all")


if __name__ == "__main__":
    main()
