"""Remove a model, after saying which files will be deleted, how large they are, and which program owns them.

    name  ->  plan_removal  ->  Removal  ->  remove

Only the model's files are deleted. A file stays if another snapshot in the hub's cache, another model in the folder
or another Ollama manifest uses it. A link is deleted but never followed: a place with a link where a directory
belongs is refused.

Elsewhere: `cli/commands/library.py` asks before it deletes another program's files.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from argosy.checkpoint.untrusted_file import quote
from argosy.directory import Directory
from argosy.errors import CheckpointError, UsageError
from argosy.library import kept
from argosy.library.names import find_exactly
from argosy.library.places import (
    Found,
    Model,
    find_models,
    hub_cache,
    manifest_digests,
    ollama_manifests,
    read_ref,
    repository_folder,
)
from argosy.library.pull import PARTIAL_SUFFIX

_WHOSE = {
    "hub": "another program put it into the hub's cache, which hf and transformers share",
    "LM Studio": "it is LM Studio's",
    "Ollama": "it is Ollama's; `ollama rm` does the same",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """The files to delete for the removal of a model.

    whose: the program that owns these files; None if Argosy pulled them.
    files: to delete, links included.
    top: the directory below which emptied folders are also deleted.
    emptied: directories to delete with all their subdirectories once no file is left.
    num_shared: how many files stay because something else uses them.
    """

    name: str
    whose: str | None
    files: tuple[Path, ...]
    top: Path
    nbytes: int
    num_shared: int = 0
    emptied: tuple[Path, ...] = ()


def plan_removal(name: str) -> Removal:
    """List the files to delete for the model of that name.

    Raises:
        UsageError: no model has that name, it is being fetched, its shared files cannot be determined, or its place
            has a link where a directory belongs.
    """
    try:
        return _plan(name)
    except OSError as error:
        raise UsageError(
            f"{error.filename} cannot be read: {error.strerror}", hint=f"{name} is left as it was"
        ) from error


def _plan(name: str) -> Removal:
    found = find_models()
    model = find_exactly(name, found.models)
    pulled = kept.read().pulled
    if model is None:
        for whole, one in pulled.items():
            if whole.lower() == name.lower():
                return _of_hub(whole, hub_cache(), one.repository, one, found=found)
        raise UsageError(
            f"no model is named '{quote(name)}'",
            hint="`argosy list` shows the names; `argosy alias NAME --remove` forgets an alias",
        )
    match model.place:
        case "hub":
            repository = model.name.partition(":")[0]
            record = pulled.get(model.name)
            return _of_hub(model.name, model.root, repository, record, model=model, found=found)
        case "Ollama":
            return _of_ollama(model, found)
        case "LM Studio":
            return _of_lm_studio(model, found)


def remove(removal: Removal) -> None:
    """Delete the files, the folders that are then empty, and Argosy's records of the model.

    Raises:
        UsageError: a file cannot be deleted; earlier ones are already gone.
    """
    try:
        with suppress(FileNotFoundError), Directory(removal.top) as top:
            names = [path.relative_to(removal.top) for path in removal.files]
            for name in names:
                top.remove(name)
            for path in removal.emptied:
                _remove_empty(top, path.relative_to(removal.top))
            for folder in sorted({parent for name in names for parent in name.parents[:-1]}, reverse=True):
                top.remove_empty(folder)
    except OSError as error:
        raise UsageError(f"{error.filename} cannot be deleted: {error.strerror}") from error
    with kept.changing() as known:
        known.pulled.pop(removal.name, None)
        known.used.pop(removal.name, None)
        for alias in [alias for alias, target in known.aliases.items() if target == removal.name]:
            del known.aliases[alias]


def _remove_empty(top: Directory, name: Path) -> None:
    for entry in top.names(name):
        if top.is_directory(name / entry):
            _remove_empty(top, name / entry)
    top.remove_empty(name)


def _removal(
    name: str,
    whose: str | None,
    files: Iterable[Path],
    top: Path,
    num_shared: int = 0,
    emptied: tuple[Path, ...] = (),
) -> Removal:
    chosen = tuple(dict.fromkeys(files))
    nbytes = 0
    with suppress(FileNotFoundError), Directory(top) as opened:
        facts = [opened.stat(path.relative_to(top)) for path in chosen]
        nbytes = sum(one.st_size for one in facts if one is not None and stat.S_ISREG(one.st_mode))
    return Removal(
        name=name, whose=whose, files=chosen, top=top, nbytes=nbytes, num_shared=num_shared, emptied=emptied
    )


def _of_hub(
    name: str,
    root: Path,
    repository: str,
    pulled: kept.Pulled | None,
    *,
    model: Model | None = None,
    found: Found,
) -> Removal:
    """Plan the removal of a model from the hub's cache, or of an unfinished pull if there is no model yet."""
    folder = root / repository_folder(repository)
    _require_idle(root, folder, name)
    links = [path for path in _walk(root, folder / "snapshots") if path.is_symlink() or path.is_file()]
    # Without a model, a pull or an earlier removal was interrupted; the snapshot may still have links.
    snapshots = folder / "snapshots"
    snapshot = snapshots / ("" if pulled is None else pulled.revision)
    if model is not None:
        snapshot = snapshots / model.path.relative_to(snapshots).parts[0]
    others = [one for one in found.models if one is not model and one.path.is_relative_to(snapshot)]
    going = {link for link in links if link.is_relative_to(snapshot)}
    if model is None and pulled is not None:
        going = {link for link in going if _blob(link).name in pulled.blobs}
    refs = [ref for ref in _walk(root, folder / "refs") if read_ref(ref) == snapshot.name]
    if others:
        going, refs = set(() if model is None else model.files), []
    used = {_blob(link) for link in links if link not in going}
    for other, one in kept.read().pulled.items():
        if other != name and one.repository == repository:  # a half-fetched model has no links yet
            used |= {path for digest in one.blobs for path in _blob_files(folder, digest)}
    blobs = {_blob(link) for link in going}
    if pulled is not None:
        blobs |= {path for digest in pulled.blobs for path in _blob_files(folder, digest)}
    gone = [
        *going,
        *refs,
        *(blob for blob in blobs - used if os.path.lexists(blob) and blob.parent == folder / "blobs"),
    ]
    emptied: tuple[Path, ...] = ()
    if going >= set(links):  # no snapshot stays, so delete references and leftovers as well
        # Without a model, blobs outside our records belong to another program, which may continue them.
        blob_folder = None if model is not None else folder / "blobs"
        gone += [path for path in _walk(root, folder) if path not in used and path.parent != blob_folder]
        gone += _walk(root, root / ".locks" / folder.name)
        emptied = (folder, root / ".locks" / folder.name)
    whose = None if pulled is not None else _WHOSE["hub"]
    num_shared = sum(os.path.lexists(blob) for blob in blobs & used)
    return _removal(name, whose, gone, root, num_shared, emptied)


def _blob_files(folder: Path, digest: str) -> tuple[Path, Path]:
    """A blob, and its partial file during a fetch."""
    blobs = folder / "blobs"
    return blobs / digest, blobs / f"{digest}{PARTIAL_SUFFIX}"


def _blob(link: Path) -> Path:
    """The immediate target of a snapshot's link; the path itself if it is not a link."""
    return Path(os.path.normpath(link.parent / os.readlink(link))) if link.is_symlink() else link


def _require_idle(root: Path, folder: Path, name: str) -> None:
    for path in _walk(root, root / ".locks" / folder.name):
        with suppress(FileNotFoundError), Directory(root) as top:
            lock = top.open(path.relative_to(root), os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"{name} is being fetched now", hint="end that first") from None
            finally:
                os.close(lock)


def _of_lm_studio(model: Model, found: Found) -> Removal:
    folder = model.path if model.path.is_dir() else model.path.parent
    others = [one for one in found.models if one.name != model.name and folder in (one.path, one.path.parent)]
    files = list(model.files) if others else _walk(model.root, folder)
    return _removal(model.name, _WHOSE["LM Studio"], files, model.root, len(others))


def _of_ollama(model: Model, found: Found) -> Removal:
    assert model.manifest is not None
    try:
        mine = {digest for _, digest, _ in manifest_digests(model.manifest)}
        used = {
            digest
            for *_, manifest in ollama_manifests(model.root, found)
            if manifest != model.manifest
            for _, digest, _ in manifest_digests(manifest)
        }
    except CheckpointError as error:
        raise UsageError(
            f"cannot determine which files {model.name} shares with other Ollama models: {error.message}",
            hint=f"`ollama rm {model.name}` removes it",
        ) from error
    blobs = [model.root / "blobs" / f"sha256-{digest}" for digest in sorted(mine - used)]
    files = [model.manifest, *(blob for blob in blobs if os.path.lexists(blob))]
    return _removal(model.name, _WHOSE["Ollama"], files, model.root, len(mine & used))


def _walk(root: Path, directory: Path) -> list[Path]:
    """All files and links below a directory.

    Raises:
        OSError: the directory, or one between it and the root, is a link.
    """
    with suppress(FileNotFoundError), Directory(root) as top:
        return [root / name for name in top.files(directory.relative_to(root))]
    return []
