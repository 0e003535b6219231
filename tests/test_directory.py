"""Files are changed below an open directory only: no link there is followed, whenever it was planted.

No other module removes, renames or replaces a file, or creates one by its path.
"""

from __future__ import annotations

import ast
import errno
import inspect
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from argosy.directory import Directory, replacing

Action = Callable[[Directory], object]


def write_to(root: Directory) -> None:
    with root.replacing("sub/file") as write:
        write(b"new")


# Every method, on the name sub/file.
ACTIONS: dict[str, Action] = {
    "open": lambda root: os.close(root.open("sub/file", os.O_RDWR | os.O_CREAT)),
    "read": lambda root: root.read("sub/file", 100),
    "put": lambda root: root.put("sub/file", b"new"),
    "put_link": lambda root: root.put_link("sub/file", "elsewhere"),
    "move": lambda root: root.move("sub/file", "moved"),
    "remove": lambda root: root.remove("sub/file"),
    "remove_empty": lambda root: root.remove_empty("sub/file"),
    "remove_tree": lambda root: root.remove_tree("sub/file"),
    "directory": lambda root: root.directory("sub/file", make=True).close(),
    "names": lambda root: root.names("sub"),
    "files": lambda root: root.files("sub"),
    "lock": lambda root: os.close(root.lock("sub/file")),
    "replacing": write_to,
}
REFUSES = {"open", "read", "lock", "directory", "remove_tree"}  # a link in the place of the file


@pytest.fixture
def root(tmp_path: Path) -> Directory:
    (tmp_path / "root").mkdir()
    return Directory(tmp_path / "root")


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A directory that is another's; its file has the name of ours."""
    (tmp_path / "victim" / "inner").mkdir(parents=True)
    (tmp_path / "victim" / "file").write_bytes(b"keep")
    (tmp_path / "victim" / "inner" / "file").write_bytes(b"keep")
    os.utime(tmp_path / "victim", ns=(1, 1))
    return tmp_path / "victim"


def facts(top: Path) -> dict[str, tuple[int, int, int, bytes]]:
    found = {}
    for path in (top, *sorted(top.rglob("*"))):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        found[str(path)] = status.st_mtime_ns, status.st_mode, status.st_ino, content
    return found


@pytest.mark.parametrize("name", ACTIONS)
def test_a_link_on_the_way_is_refused_by_name(name: str, root: Directory, victim: Path) -> None:
    (root.path / "sub").symlink_to(victim)
    before = facts(victim)
    if name == "remove_empty":  # it removes only what it may
        ACTIONS[name](root)
    else:
        with pytest.raises(OSError, match="it is a symbolic link, and none is followed here") as refusal:
            ACTIONS[name](root)
        assert refusal.value.filename == str(root.path / "sub")
    assert facts(victim) == before


@pytest.mark.parametrize("target", ["file", "inner", "missing"])
@pytest.mark.parametrize("name", ACTIONS)
def test_a_link_in_the_place_of_a_file_leads_nowhere(
    name: str, target: str, root: Directory, victim: Path
) -> None:
    (root.path / "sub").mkdir()
    (root.path / "sub" / "file").symlink_to(victim / target)
    before = facts(victim)
    if name in REFUSES:
        with pytest.raises(OSError, match="it is a symbolic link, and none is followed here") as refusal:
            ACTIONS[name](root)
        assert refusal.value.filename == str(root.path / "sub" / "file")
    else:
        ACTIONS[name](root)
    assert facts(victim) == before
    assert (root.path / "sub" / "file").is_symlink() == (name not in ("put", "replacing", "move", "remove"))


def test_a_tree_goes_with_its_links_and_without_their_targets(root: Directory, victim: Path) -> None:
    (root.path / "tree" / "inner" / "deep").mkdir(parents=True)
    (root.path / "tree" / "inner" / "file").write_bytes(b"")
    (root.path / "tree" / "inner" / "link").symlink_to(victim)
    (root.path / "tree" / "dangling").symlink_to("nowhere")
    before = facts(victim)
    root.remove_tree("tree")
    root.remove_tree("tree")  # it is gone
    assert root.names() == []
    assert facts(victim) == before


def test_a_tree_that_cannot_go_whole_loses_the_rest(root: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    (root.path / "tree").mkdir()
    for name in "abc":
        (root.path / "tree" / name).write_bytes(b"")
    real = os.unlink

    def unlink(name: str, *, dir_fd: int) -> None:
        if name == "a":
            raise OSError(errno.EPERM, "no")
        real(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", unlink)
    with pytest.raises(PermissionError):
        root.remove_tree("tree")
    assert root.names("tree") == ["a"]


def test_a_tree_deeper_than_the_stack_is_listed(root: Directory) -> None:
    deep = Path("d/" * 200)
    (root.path / deep).mkdir(parents=True)
    (root.path / deep / "file").write_bytes(b"")
    (root.path / "beside").write_bytes(b"")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 100)
    try:
        found = root.files()
    finally:
        sys.setrecursionlimit(limit)
    assert sorted(found) == [Path("beside"), deep / "file"]


def test_a_tree_ends_where_another_file_system_begins(root: Directory) -> None:
    mounted = root.path / "tree" / "mounted"
    mounted.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(mounted)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("a tmpfs cannot be mounted here: no permission")
    try:
        (mounted / "file").write_bytes(b"keep")
        with pytest.raises(OSError, match="it is another file system"):
            root.remove_tree("tree")
        assert (mounted / "file").read_bytes() == b"keep"
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


@pytest.mark.parametrize("name", ["../out", "a/../../out", "/tmp/out"])
def test_a_name_that_leads_out_is_our_own_mistake(name: str, root: Directory) -> None:
    with pytest.raises(ValueError, match="leads out of its directory"):
        root.put(name, b"")


def test_what_was_opened_stays_that_directory(root: Directory, victim: Path) -> None:
    """A link that takes the directory's place afterwards changes nothing."""
    before = facts(victim)
    root.path.rename(root.path.with_name("moved"))
    root.path.symlink_to(victim)
    root.put("file", b"new")
    root.remove_tree("inner")
    assert (root.path.with_name("moved") / "file").read_bytes() == b"new"
    assert facts(victim) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes links of others")
def test_a_directory_may_be_a_link_of_its_user_and_not_of_another(tmp_path: Path, victim: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(victim)
    Directory(link).close()
    os.chown(link, 1234, 1234, follow_symlinks=False)
    with pytest.raises(OSError, match="it is a symbolic link of another user"):
        Directory(link, make=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes links of others")
@pytest.mark.parametrize(("num_opened", "is_refused"), [(0, True), (1, True), (2, False), (3, False)])
def test_a_link_of_another_user_that_comes_at_any_moment_leads_nowhere(
    num_opened: int, is_refused: bool, tmp_path: Path, victim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, link, real, calls = tmp_path / "ours", tmp_path / "link", os.open, iter(range(9))
    ours.mkdir()
    link.symlink_to(ours)

    def open_late(path: Path, flags: int) -> int:
        if next(calls) == num_opened:
            link.unlink()
            link.symlink_to(victim)
            os.chown(link, 1234, 1234, follow_symlinks=False)
        return real(path, flags)

    monkeypatch.setattr(os, "open", open_late)
    if is_refused:
        with pytest.raises(OSError, match="it is a symbolic link of another user"):
            Directory(link)
        return
    with Directory(link) as opened:  # from then on our own link is read
        assert os.path.samestat(os.fstat(opened.descriptor), ours.stat())


def test_a_file_that_the_user_linked_is_replaced_where_it_is(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_bytes(b"old")
    link.symlink_to(real)
    with replacing(link) as write:
        write(b"new")
    assert link.is_symlink()
    assert real.read_bytes() == b"new"


@pytest.mark.parametrize("kind", ["pipe", "directory"])
def test_only_regular_files_are_opened_and_a_pipe_is_not_waited_for(kind: str, root: Directory) -> None:
    if kind == "pipe":
        os.mkfifo(root.path / "file")
    else:
        (root.path / "file").mkdir()
    with pytest.raises(OSError, match="it is not a regular file"):
        root.read("file", 10)


def test_a_file_is_read_whole_or_not_at_all(root: Directory) -> None:
    root.put("file", b"12345")
    assert root.read("file", 5) == b"12345"
    with pytest.raises(OSError, match="it has more than 4 bytes"):
        root.read("file", 4)


def test_a_file_keeps_its_mode(root: Directory) -> None:
    root.put("file", b"", 0o644)
    (root.path / "file").chmod(0o640)
    root.put("file", b"x", 0o600)
    assert (root.path / "file").stat().st_mode & 0o7777 == 0o640


def test_a_lock_excludes_others_and_leaves_no_file(root: Directory) -> None:
    with root.locked("lock"), pytest.raises(TimeoutError), root.locked("lock", wait_s=0.0):
        pass
    assert root.names() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_the_owner_of_a_directory_gets_a_new_lock_and_no_file_of_ours(root: Directory) -> None:
    os.chown(root.path, 1234, 1234)
    os.close(root.lock("new"))
    assert (root.path / "new").stat().st_uid == 1234
    victim = root.path.with_name("victim")
    victim.touch()
    os.link(victim, root.path / "planted")
    os.close(root.lock("planted"))
    assert victim.stat().st_uid == 0


def test_an_owner_that_this_system_cannot_name_is_not_needed(
    root: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a user namespace, the owner of a directory from outside may have no number that `fchown` accepts."""

    def refuse(descriptor: int, user: int, group: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fchown", refuse)
    for data in (b"old", b"new"):
        with root.replacing("file") as write:
            write(data)
    assert root.read("file", 10) == b"new"
    assert root.names() == ["file"]


@pytest.mark.parametrize("name", ["put", "put_link"])
def test_what_cannot_replace_a_directory_leaves_nothing_beside_it(name: str, root: Directory) -> None:
    (root.path / "sub" / "file").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        ACTIONS[name](root)
    assert root.names("sub") == ["file"]


def test_changes_under_a_lock_never_meet(root: Directory) -> None:
    def add() -> None:
        for _ in range(20):
            with root.replacing("count") as write:
                write(str(int(root.read("count", 10)) + 1).encode())

    root.put("count", b"0")
    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert root.read("count", 10) == b"80"
    assert root.names() == ["count"]


# ── the sources ─────────────────────────────────────────────────────────────────────────────────────────────────────

SOURCE = Path(__file__).parents[1] / "src" / "argosy"
# They write new files into a directory that they have just made for themselves, a file that the user names, or one of
# the kernel.
WRITES_BY_PATH = {
    "checkpoint/safetensors_write.py",
    "adapters/making/peft_files.py",
    "checkpoint/upcycle.py",
    "cli/shared/output.py",
    "demo/build.py",
    "demo/parts.py",
    "demo/wheel.py",
    "forecast/calibration.py",
    "model/remote.py",
    "machine/resources.py",  # a file of the kernel
}
OF_ANY_PATH = {
    "unlink",
    "rmdir",
    "rename",
    "symlink_to",
    "hardlink_to",
    "rmtree",
    "copytree",
    "copyfile",
    "removedirs",
}
OF_MODULES = {
    "os": {"remove", "replace", "walk", "fwalk", "truncate", "link", "symlink", "chown", "chmod", "renames"},
    "shutil": {"move", "copy", "copy2", "chown"},
}
MODES = {"w", "a", "x", "wb", "ab", "xb", "r+", "r+b", "w+b", "wt", "at"}


def changes(tree: ast.AST) -> Iterator[tuple[int, str, bool]]:
    """Yield (line, call, whether it only creates or writes) of each call that changes what a path leads to."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id=("os" | "shutil") as of), attr=name)) if (
                name in OF_MODULES[of]
            ):
                yield node.lineno, f"{of}.{name}", False
            case ast.Call(func=ast.Attribute(value=ast.Name(id="os"), attr="open")):
                if "O_CREAT" in ast.dump(node):
                    yield node.lineno, "os.open to create", True
            case ast.Call(func=ast.Attribute(attr=name)) if name in OF_ANY_PATH:
                yield node.lineno, name, False
            case ast.Call(
                func=ast.Attribute(attr="replace"), args=[_], keywords=[]
            ):  # text has two arguments
                yield node.lineno, "Path.replace", False
            case ast.Call(func=ast.Attribute(attr="write_text" | "write_bytes")):
                yield node.lineno, "a write by path", True
            case ast.Call(func=ast.Name(id="open") | ast.Attribute(attr="open"), args=args):
                is_open = bool(args) and isinstance(args[0], ast.Name) and args[0].id == "descriptor"
                if not is_open and any(isinstance(one, ast.Constant) and one.value in MODES for one in args):
                    yield node.lineno, "open to write", True


# Most modules have none of these, and are not parsed.
MAY_CHANGE = re.compile(
    rf"\bos\.({'|'.join(OF_MODULES['os'])})\b|\bshutil\b|\bopen\(|\.write_(text|bytes)\(|\.({'|'.join(OF_ANY_PATH)}|replace)\("
)


def test_nothing_else_in_the_sources_changes_files_by_their_paths() -> None:
    found = [
        f"{path.relative_to(SOURCE)}:{line} calls {call}"
        for path in sorted(SOURCE.rglob("*.py"))
        if path.name != "directory.py" and MAY_CHANGE.search(source := path.read_text())
        for line, call, only_writes in changes(ast.parse(source))
        if not (only_writes and str(path.relative_to(SOURCE)) in WRITES_BY_PATH)
    ]
    assert found == []


def test_the_check_sees_every_kind_of_change() -> None:
    code = (
        "os.replace(a, b)\na.replace(b)\n'text'.replace('a', 'b')\nreplace(a, b=1)\na.unlink()\nshutil.rmtree(a)\n"
        "os.walk(a)\nos.ftruncate(1, 2)\nopen(a, 'w')\nopen(a, 'rb')\na.open('ab')\nopen(descriptor, 'wb')\n"
        "os.open(a, os.O_CREAT)\na.write_text('')\na.rename(b)\n"
    )
    found = {line for line, _, _ in changes(ast.parse(code))}
    assert sorted(found) == [1, 2, 5, 6, 7, 9, 11, 13, 14, 15]
    assert all(MAY_CHANGE.search(code.splitlines()[line - 1]) for line in found)
