"""Every wait has a deadline with a name, or a reason why it has none: `docs/internals/deadlines.md` lists both."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "internals" / "deadlines.md"
SRC = ROOT / "src" / "argosy"
# Calls that wait for something else for as long as it takes, unless an argument says otherwise.
_WITHOUT_ARGUMENTS = {"wait", "join", "get", "result", "communicate"}
_TIMED = {"timeout", "timeout_s", "timeout_ms", "blocking"}
_SUBPROCESS = {"run", "check_call", "check_output"}
_SEARCHED = {
    *_WITHOUT_ARGUMENTS, *_SUBPROCESS, "flock", "acquire", "open_connection", "select", "poll", "recv", "recv_into",
    "create_connection", "accept", "wait_any",
}  # fmt: skip
_TIMERS = {
    "wait", "wait_for", "join", "get", "put", "result", "acquire", "communicate", "settimeout", "timeout", "select",
    "poll", "create_connection", "run_coroutine_threadsafe", "ask", "wait_for_one", "sleep", "wait_any",
}  # fmt: skip


class _Waits(ast.NodeVisitor):
    """The calls of a module that may wait without end, as (function, call)."""

    def __init__(self, source: str) -> None:
        self.found: set[tuple[str, str]] = set()
        self.timers: set[str] = set()  # names that calls which wait are given
        self._inside: list[str] = []
        self._num_timeouts = 0  # of asyncio, around the call
        self._polls = "select.poll" in source
        self._sets_timeout = "settimeout" in source or "timeout=" in source
        self.tree = ast.parse(source)
        self.visit(self.tree)

    def _visit_named(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
        self._inside.append(node.name)
        self.generic_visit(node)
        self._inside.pop()

    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = _visit_named

    def visit_AsyncWith(self, node: ast.AsyncWith) -> None:
        bounds = sum("asyncio.timeout(" in ast.unparse(item) for item in node.items)
        self._num_timeouts += bounds
        self.generic_visit(node)
        self._num_timeouts -= bounds

    def visit_Call(self, node: ast.Call) -> None:
        if self._is_endless(node) and not self._num_timeouts:
            self.found.add((".".join(self._inside), ast.unparse(node)))
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in _TIMERS:
            for argument in [*node.args, *(one.value for one in node.keywords)]:
                self.timers |= {one.id for one in ast.walk(argument) if isinstance(one, ast.Name)}
        self.generic_visit(node)

    def _is_endless(self, node: ast.Call) -> bool:
        if not isinstance(node.func, ast.Attribute):
            return False
        name = node.func.attr
        if name not in _SEARCHED or {one.arg for one in node.keywords} & _TIMED:
            return False
        of = ast.unparse(node.func.value)
        if name == "flock":
            return "LOCK_NB" not in ast.unparse(node) and "LOCK_UN" not in ast.unparse(node)
        if name == "acquire":
            return not node.args
        if of == "subprocess":
            return name in _SUBPROCESS
        if of == "asyncio":
            return name in ("wait", "open_connection")
        if of == "select":
            return name == "select" and len(node.args) < 4
        if name == "poll":  # a process's never waits
            return self._polls and (
                (not node.args and "process" not in of) or (bool(node.args) and "None" in ast.unparse(node))
            )
        if name in ("recv", "recv_into", "create_connection") or (name == "accept" and not node.args):
            return not self._sets_timeout
        if name == "wait_any":
            return len(node.args) < 2
        return name in _WITHOUT_ARGUMENTS and not node.args


@functools.cache
def modules() -> dict[str, _Waits]:
    return {str(path.relative_to(SRC)): _Waits(path.read_text()) for path in sorted(SRC.rglob("*.py"))}


def rows(title: str) -> list[list[str]]:
    """The rows of the table below a title, as cells without backticks."""
    section = TABLE.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip().strip("`") for cell in line.strip("|").split(" | ")] for line in lines]


def constants(tree: ast.Module) -> dict[str, float]:
    """The numbers that a module gives names, with arithmetic worked out."""
    found: dict[str, float] = {}
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        pairs: list[tuple[ast.expr, ast.expr]] = [(target, node.value) for target in targets]
        if isinstance(targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
            pairs = list(zip(targets[0].elts, node.value.elts, strict=True))
        for target, value in pairs:
            is_number = all(
                isinstance(one, ast.Constant | ast.BinOp | ast.operator | ast.UnaryOp | ast.unaryop)
                for one in ast.walk(value)
            )
            if isinstance(target, ast.Name) and is_number:
                number = eval(compile(ast.Expression(value), "", "eval"))  # noqa: S307
                if isinstance(number, int | float) and number < 1e9:
                    found[target.id] = float(number)
    return found


def test_every_wait_without_a_deadline_has_a_reason_in_the_table_and_every_reason_a_wait() -> None:
    found = {(path, *wait) for path, waits in modules().items() for wait in waits.found}
    exempt = {(path, function, call) for path, function, call, reason in rows("Without a deadline") if reason}
    assert found - exempt == set(), "give it a deadline with a name, or the table a reason"
    assert exempt - found == set(), "the table has waits that are no longer there"


def test_every_deadline_of_the_table_is_in_the_code_with_that_value() -> None:
    by_path = {path: constants(waits.tree) for path, waits in modules().items()}
    for place, value, *_ in [*rows("Deadlines"), *rows("Periods")]:
        path, name = place.split(":")
        number = float(value.split()[0].replace(",", ""))
        if path.startswith("native/"):
            text = (ROOT / path).read_text()
            match = re.search(rf"\b{name}\s*(?:=|\{{)\s*([0-9.']+)", text)
            assert match is not None, f"{place} is not there"
            assert float(match[1].replace("'", "")) == number, place
            continue
        assert name in by_path[path], f"{place} is not there"
        assert by_path[path][name] == number, place


def test_every_constant_that_bounds_a_wait_is_in_the_table() -> None:
    listed = {place for title in ("Deadlines", "Periods") for place, *_ in rows(title)}
    bounding = {
        f"{path}:{name}"
        for path, waits in modules().items()
        for name in waits.timers & constants(waits.tree).keys()
        if re.search(r"_(S|SECONDS|MS)$", name)
    }
    assert bounding - listed == set()


@pytest.mark.parametrize(
    ("code", "is_endless"),
    [
        ("event.wait()", True),
        ("event.wait(1.0)", False),
        ("event.wait(timeout=1.0)", False),
        ("thread.join()", True),
        ("' '.join(words)", False),
        ("jobs.get()", True),
        ("table.get(key)", False),
        ("future.result()", True),
        ("lock.acquire()", True),
        ("lock.acquire(blocking=False)", False),
        ("process.communicate()", True),
        ("subprocess.run(command)", True),
        ("subprocess.run(command, timeout=5)", False),
        ("fcntl.flock(file, fcntl.LOCK_EX)", True),
        ("fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)", False),
        ("connection.recv(1)", True),
        ("connection.settimeout(1); connection.recv(1)", False),
        ("polled = select.poll(); polled.poll(None)", True),
        ("polled = select.poll(); polled.poll(1000)", False),
        ("async def f():\n  await event.wait()", True),
        ("async def f():\n  async with asyncio.timeout(1):\n    await event.wait()", False),
        ("async def f():\n  await asyncio.wait(tasks)", True),
        ("async def f():\n  await asyncio.open_connection(host, port)", True),
    ],
)
def test_the_search_finds_each_kind_of_endless_wait(code: str, is_endless: bool) -> None:
    assert bool(_Waits(code).found) == is_endless
