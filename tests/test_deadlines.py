"""Every wait has a deadline, which `docs/internals/deadlines.md` lists, or a reason below why it has none."""

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
# Most modules have none of these, nor a name of a deadline, and are not searched.
_MAY_WAIT = re.compile(
    rf"\b({'|'.join(sorted((_SEARCHED | _TIMERS) - {'join', 'get'}))})\(|\b(join|get)\(\s*(\)|\w+=)|_(S|SECONDS|MS)\b"
)

# How often something looks, beats or tries again: these constants bound no wait for anything.
PERIODS = {
    "engine/loop.py:BEAT_S": "an idle engine beats",
    "engine/loop.py:_WRITING_SECONDS": "an idle engine looks at the writer of prefixes",
    "engine/loop.py:_AFTER_FAILURE_S": "an engine tries again after a failure",
    "kept/prefix_files.py:_SWEEP_SECONDS": "files that are too old are looked for",
    "forecast/drive_rates.py:_DRIVE_S": "a drive is measured",
    "serve/admin/engine.py:_STATE_S": "states of the engine are sent",
    "cli/shared/output.py:LINE_S": "a command without a terminal reports its progress",
    "cli/shared/output.py:_REDRAW_S": "a bar is drawn again",
    "serve/models/entry.py:LOADING_SAID_S": "the log reports a model that is loading",
    "serve/admin/state.py:PROMPT_SAID_S": "the log reports long prompts",
    "serve/admin/key_watch.py:LOOK_S": "revoked keys are looked for",
    "serve/admin/memory.py:LOOK_S": "limits of memory are read",
    "serve/models/loading.py:LOOK_S": "idle models are looked for",
    "serve/http/running.py:_LOOK_S": "an erasure looks whether requests have ended",
    "serve/http/server.py:_LOOK_S": "a second signal is looked for",
    "serve/guards/checks.py:_SAID_EVERY_S": "a failing check is logged",
    "guard/audit.py:_RETRY_S": "a full drive is tried again",
    "route/servers.py:_LOOK_S": "a stream without a server looks for one",
    "cluster/member.py:LOOK_S": "connections are tended",
    "cluster/worker.py:_TICK_S": "a worker's figures are refreshed",
    "cluster/door.py:_AGAIN_S": "a door tries again where the system has no room",
    "cluster/ray_control.py:SAID_S": "a wait for workers is reported",
    "cluster/ray_control.py:_LOOK_S": "the workers that Ray started are checked",
    "cli/shared/server_model.py:_LOOK_S": "a wait for a busy server looks for ^C",
    "cli/commands/background.py:_LOOK_S": "a server that starts or ends, and its log, are checked",
    "cli/commands/background.py:_SAY_S": "a command says what it waits for",
    "cli/commands/background.py:_SAID_S": "it says that it still waits",
    "directory.py:_LOOK_S": "a lock with a deadline is tried",
    "library/pull.py:_TICK_S": "progress is shown",
}
# Waits without a deadline, by module and reason: (function, call).
ENDLESS: dict[tuple[str, str], list[tuple[str, str]]] = {
    ("checkpoint/upcycle.py", "another command makes the same model; ^C ends it"): [
        ("_locked_scratch", "fcntl.flock(scratch.descriptor, fcntl.LOCK_EX)"),
    ],
    ("cluster/door.py", "a door is open until a worker drains, and shut by the thread that waits for that"): [
        ("admit", "listener.accept()"),
        ("admit.shut", "is_over.wait()"),
    ],
    ("cluster/group.py", "the keeper wakes every `_LOOK_S`, and waits for nothing itself"): [
        ("Group.close", "self._keeper.join()"),
    ],
    ("cluster/ray_control.py", "a process that was told to end; waiting is this thread's work"): [
        ("WorkerKeeper._keep", "worker.wait()"),
        ("launch", "worker.wait()"),
    ],
    ("cluster/secure.py", "the thread lives as long as its connection, which TCP ends"): [
        ("_carry", "poll.poll(0 if is_ready else 1000 * LAST_S if has_hung_up else None)"),
    ],
    ("cluster/worker.py", "a worker drains; TCP and a second signal end it"): [
        ("Worker.serve", "threads[0].join()"),
        ("Worker.serve", "ticker.join()"),
    ],
    ("demo/wheel.py", "pip has deadlines of its own, and ^C ends it"): [
        (
            "fetch_wheel",
            "subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)",
        ),
    ],
    ("directory.py", "another command does the same; ^C ends the wait"): [
        ("_wait_for", "fcntl.flock(lock, fcntl.LOCK_EX)"),
    ],
    ("forecast/drive_rates.py", "measures the drive; ^C ends it"): [
        ("DriveRates._transcode", "store.wait_any(list(in_flight))"),
        ("_Products.stop", "self._thread.join()"),
    ],
    ("engine/loop.py", "the thread ends with its step; a server ends on a second signal"): [
        ("EngineLoop.close", "self._thread.join()"),
    ],
    ("kept/prefix_files.py", "the read has ended: `wait` with `DRIVE_S` comes first"): [
        ("PrefixFiles.read", "future.result()"),
    ],
    ("engine/start.py", "a model is read from its drive; ^C ends it"): [
        ("_read", "reading.wait()"),
    ],
    ("engine/turns.py", "a step or a call of an engine; `SILENT_S` tells if it hangs"): [
        ("Turns.__enter__", "self.acquire()"),
        ("Turns.acquire", "gate.acquire()"),
    ],
    ("experts/cache.py", "the store closes, or another model's step ends"): [
        ("ExpertCache.close", "thread.join()"),
        ("_wait", "cores.acquire()"),
    ],
    ("experts/resident.py", "a model is read from its drive; ^C ends it"): [
        ("ResidentReading.wait", "self._store.wait_any(watched)"),
    ],
    ("serve/answer/answers.py", "every answer gets an end; `/ready` asks for the engine's beats"): [
        ("Answers._wait", "self._some.wait()"),
    ],
    ("serve/admin/key_watch.py", "the thread wakes every `LOOK_S`"): [
        ("KeyWatch.__exit__", "self._thread.join()"),
    ],
    ("serve/http/log.py", "the log's own thread; nobody waits for it longer than `_CLOSE_S`"): [
        ("LogWriter._run", "self._lines.get()"),
        ("LogWriter._write", "ready.poll()"),
    ],
    ("serve/http/log.py", "the handler's own lock, held for a count"): [
        ("LogWriter._drop", "self.acquire()"),
        ("LogWriter._take_dropped", "self.acquire()"),
    ],
    (
        "serve/models/loading.py",
        "another model is read; the client may leave, and the server's end ends it",
    ): [
        ("Loader._open", "asyncio.wait(reading, return_when=asyncio.FIRST_COMPLETED)"),
    ],
    (
        "serve/dialects/openai_audio.py",
        "a transcript in its thread: it always reports an end, and the client may leave",
    ): [
        ("_Work.next_event", "self._events.get()"),
    ],
    ("serve/http/server.py", "a server runs until it is told to end"): [
        ("WokenServer.main_loop", "self._told.wait()"),
    ],
    ("serve/http/server.py", "the load has been told to stop, or has ended"): [
        ("Server._load_first", "asyncio.wait([loading])"),
        ("Server._load_first", "loading.result()"),
    ],
    ("serve/answer/side_by_side.py", "waits for the engine, as an answer does"): [
        ("run_parts.take_turns", "_Part(service, caller, partial(submit, number)).result()"),
    ],
    ("serve/http/streams.py", "the answer has ended: `wait` with `WHOLE_S` comes first"): [
        ("answer_whole", "answering.result()"),
    ],
}


class _Waits(ast.NodeVisitor):
    """The calls of a module that may wait without end, as (function, call)."""

    def __init__(self, source: str) -> None:
        self.found: set[tuple[str, str]] = set()
        self.timers: set[str] = set()  # names that calls which wait are given
        self._inside: list[str] = []
        self._num_timeouts = 0  # of asyncio, around the call
        self._polls = "select.poll" in source
        self._sets_timeout = "settimeout" in source or "timeout=" in source
        tree = ast.parse(source)
        self.constants = constants(tree)
        if _MAY_WAIT.search(source):
            self.visit(tree)

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
        if node.args and name in ("join", "get"):  # most of them: of a text, of a mapping
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


def rows() -> list[list[str]]:
    """The rows of the table, as cells without backticks."""
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("|")][2:]
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


def test_every_wait_without_a_deadline_has_a_reason_and_every_reason_a_wait() -> None:
    found = {(path, *wait) for path, waits in modules().items() for wait in waits.found}
    exempt = {(path, *call) for (path, reason), calls in ENDLESS.items() if reason for call in calls}
    assert found - exempt == set(), "give it a deadline with a name, or ENDLESS a reason"
    assert exempt - found == set(), "ENDLESS has waits that are no longer there"


def test_every_deadline_of_the_table_is_in_the_code_with_that_value() -> None:
    by_path = {path: waits.constants for path, waits in modules().items()}
    assert [place for place in PERIODS if place.split(":")[1] not in by_path[place.split(":")[0]]] == []
    for place, value, *_ in rows():
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
    listed = {place for place, *_ in rows()} | PERIODS.keys()
    bounding = {
        f"{path}:{name}"
        for path, waits in modules().items()
        for name in waits.timers & waits.constants.keys()
        if re.search(r"_(S|SECONDS|MS)$", name)
    }
    assert bounding - listed == set(), "the table of deadlines or PERIODS names each"


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
