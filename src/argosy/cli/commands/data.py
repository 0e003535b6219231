"""`argosy data`: list what Argosy keeps of people, and erase what belongs to an API key."""

from __future__ import annotations

import json
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

import click

from argosy.config import counted, disk_size
from argosy.directory import Directory
from argosy.errors import UsageError

if TYPE_CHECKING:
    from argosy.guard.stores import Store

_HEADER = ("DATA", "WHERE", "HOW LONG", "OPTION", "ERASED BY", "NOW")
_ERASED = {
    "key": "data erase",
    "revoke": "keys revoke",
    "hand": "by hand",
    "none": "names nobody",
}


@click.group("data")
def data() -> None:
    """List what Argosy stores about users, and erase what belongs to a key.

    \b
    Examples:
      argosy data list --audit ./audit
      argosy data erase --key laptop --url http://127.0.0.1:8080
    """


_KV_DIR = click.option(
    "--kv-dir", type=click.Path(path_type=Path), metavar="DIR", help="Prefix files of a server."
)
_AUDIT = click.option("--audit", type=click.Path(path_type=Path), metavar="DIR", help="Audit of a server.")


@data.command("list")
@_KV_DIR
@_AUDIT
@click.option("--json", "as_json", is_flag=True, help="Print the same facts as JSON.")
def list_stores(kv_dir: Path | None, audit: Path | None, as_json: bool) -> None:
    """List every kind of data that is kept: where, how long, what sets that, and what erases it."""
    from argosy.cli.shared.output import table_lines
    from argosy.guard.stores import STORES

    sizes = {store.name: _size(_place(store, kv_dir, audit)) for store in STORES}
    if as_json:
        print(json.dumps([{**asdict(store), "bytes": sizes[store.name]} for store in STORES]))
        return
    rows = []
    for store in STORES:
        name = store.name if store.by_default else f"{store.name} (off by default)"
        erased, size = _ERASED[store.erased], _told(sizes[store.name])
        rows.append((name, store.place, store.kept_for, store.option, erased, size))
    print(*table_lines(_HEADER, rows), sep="\n")


@data.command("erase")
@click.option(
    "--key", "name", required=True, metavar="NAME", help="The key, by name or id; `local` without keys."
)
@click.option("--url", metavar="URL", help="A running server; needs its admin key.")
@click.option(
    "--key-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File with the admin key; default: ARGOSY_API_KEY.",
)
@click.option(
    "--keys", type=click.Path(path_type=Path), metavar="FILE", help="The keys of a server that is stopped."
)
@_KV_DIR
@_AUDIT
@click.option("--audit-key-file", type=click.Path(path_type=Path), metavar="FILE", help="Key of the audit.")
def erase(
    name: str, url: str | None, key_file: Path | None, keys: Path | None, kv_dir: Path | None, audit: Path | None,
    audit_key_file: Path | None,
) -> None:  # fmt: skip
    """Erase what is stored about a key, and list it.

    With --url the running server erases everything that it keeps, in memory and in files. Without it, the files of a
    server that is stopped are erased: its directories for --kv-dir and --audit.
    """
    if url is not None:
        if (keys, kv_dir, audit, audit_key_file) != (None,) * 4:
            raise UsageError(
                "--url erases everything that the server keeps", hint="give no other place with it"
            )
        _erase_running(name, url, key_file)
        return
    if kv_dir is None and audit is None:
        raise UsageError(
            "nothing says where the data is",
            hint="--url of the running server; or --kv-dir and --audit of one that is stopped",
        )
    key_id = _id_of(name, keys)
    if kv_dir is not None:
        from argosy.kept.prefix_files import erase_files

        print(f"prefix files      {erase_files(kv_dir, key_id)} erased in {kv_dir}")
    if audit is not None:
        print(f"audit contents    {_erase_audit(key_id, audit, audit_key_file)} erased in {audit}")
    _say_what_stays()


def _erase_running(name: str, url: str, key_file: Path | None) -> None:
    from argosy.cli.shared.remote import RemoteServer
    from argosy.cli.shared.settings import api_key

    done = RemoteServer(url, api_key(key_file)).erase(name)
    print(f"key               {done['key']}")
    print(f"stored responses  {done['responses']} erased, with their items")
    print(f"replay            {counted(done['answers'], 'answer')} erased")
    print("prefixes          erased, in memory and in files")
    contents = done["audit_contents"]
    print(f"audit contents    {'the server has no audit' if contents is None else f'{contents} erased'}")
    _say_what_stays()


def _say_what_stays() -> None:
    print(
        "stays             the key, its counts (`argosy keys revoke` removes both); lines of the audit and the log,"
    )
    print("                  which have its id and nothing that anyone said")


def _id_of(name: str, keys: Path | None) -> str:
    """The id of a stopped server's key. A key that is not in the file was revoked and must be named by its id."""
    from argosy.guard.keys import KeyFile, is_key_id

    for key in () if keys is None else KeyFile(keys).read():
        if name in (key.id, key.name):
            return key.id
    if not is_key_id(name):
        where = "" if keys is None else f" in {keys}"
        raise UsageError(
            f"there is no key {name!a}{where}, and it is not a key's id",
            hint="--keys FILE finds a key by its name; name a revoked key by its id, such as key-0123abcd",
        )
    return name


def _erase_audit(key_id: str, directory: Path, key_file: Path | None) -> int:
    from argosy import __version__
    from argosy.cli.commands.audit import read_key
    from argosy.guard.audit import Audit, AuditSettings

    read_key(directory, key_file)  # a mistyped directory must not become a new audit
    settings = AuditSettings(directory=directory, key_file=key_file, keep_s=None, content_keep_s=float("inf"))
    audit = Audit(settings, facts={"version": __version__, "command": "data erase"})
    try:
        return audit.erase(key_id)
    finally:
        audit.close()


def _place(store: Store, kv_dir: Path | None, audit: Path | None) -> Path | None:
    """The file, files or directory of a store, if known."""
    from argosy.guard.sealed import CONTENT

    given = {
        "prefix files": kv_dir,
        "audit": audit,
        "audit contents": None if audit is None else audit / CONTENT,
    }
    if store.name in given:
        return given[store.name]
    return Path(store.place).expanduser() if store.place.startswith("~") else None


def _size(path: Path | None) -> int | None:
    """The size of a file, of files matching a pattern, or of a directory's contents; None if unknown."""
    if path is None:
        return None
    if path.is_file():
        return path.stat().st_size
    pattern, parent = ("*", path) if path.is_dir() else (path.name, path.parent)
    if not parent.is_dir():
        return 0
    with Directory(parent) as directory:
        facts = [directory.stat(name) for name in directory.files() if fnmatch(str(name), pattern)]
    return sum(one.st_size for one in facts if one is not None)


def _told(num_bytes: int | None) -> str:
    return "" if num_bytes is None else disk_size(num_bytes)
