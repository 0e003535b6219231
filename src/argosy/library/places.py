"""Find the models that programs on this machine keep, and use them in place.

    hub        HF_HUB_CACHE, HF_HOME/hub        models--OWNER--NAME/snapshots/REVISION/..., links to ../../blobs
    LM Studio  ~/.lmstudio/models, or another   OWNER/NAME/*.gguf
               that its settings.json names
    Ollama     OLLAMA_MODELS, ~/.ollama/models  manifests/HOST/OWNER/NAME/TAG, blobs/sha256-...

Other programs write these files, which may be incomplete or hostile. A directory that cannot be read, a link that
is broken or leads out of its place, a manifest that contradicts itself: each is skipped with a note and never
followed. Only small manifests are opened; `open_model` decides whether a model is sound.

Elsewhere: `names.py` chooses one of the models by its name; `pull.py` adds to the hub's cache.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from argosy.checkpoint.gguf_names import GGUF_SUFFIX, PART_NAME, format_in_name, is_model, is_tower
from argosy.checkpoint.safetensors import SHARD, weight_files
from argosy.checkpoint.untrusted_file import open_regular, parse_object, quote, read_at
from argosy.errors import CheckpointError, UsageError
from argosy.library import kept
from argosy.library.kept import Pulled
from argosy.user_directories import home_directory

Place = Literal["hub", "LM Studio", "Ollama"]

CONFIG_FILE, PARAMS_FILE = "config.json", "params.json"
_MOST_ENTRIES = 20_000  # per directory
_MOST_NOTES = 50
_MANIFEST_BYTES = 1 << 20
_SETTINGS_BYTES = 4 << 20  # LM Studio's settings
_MOST_LAYERS = 100
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_REVISION = re.compile(r"[0-9a-f]{40,64}")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_TOWERS = ("F16", "BF16", "Q8_0", "F32")  # best first: accurate enough, and small
_OLLAMA_HOST, _OLLAMA_OWNER = "registry.ollama.ai", "library"
_WEIGHTS, _TOWER = "application/vnd.ollama.image.model", "application/vnd.ollama.image.projector"
_PARAMS = "application/vnd.ollama.image.params"
_PARAMS_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model on this machine.

    name: OWNER/NAME, OWNER/NAME:Q4_K_M, or Ollama's NAME:TAG.
    path: the path for `open_model`.
    root: the directory of its place. All paths are inside it, even with links resolved.
    files: the weight files, as the place names them.
    tower: the file with its vision tower, unless that lies next to the weights under a recognizable name.
    num_missing: how many of its parts are missing.
    manifest: Ollama's manifest.
    asked: the revision that was pulled, if not the main branch.
    """

    name: str
    place: Place
    root: Path
    path: Path
    files: tuple[Path, ...]
    tower: Path | None = None
    num_missing: int = 0
    manifest: Path | None = None
    asked: str = ""

    @property
    def nbytes(self) -> int:
        """The size of its weights, including its tower."""
        towers = () if self.tower is None else (self.tower,)
        return sum(path.stat().st_size for path in {*self.files, *towers} if path.exists())


@dataclass(frozen=True, slots=True)
class Found:
    """The models in all places, and what was skipped."""

    models: list[Model] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, sentence: str) -> None:
        if len(self.notes) < _MOST_NOTES:
            self.notes.append(sentence)


def find_models(environment: Mapping[str, str] | None = None) -> Found:
    """Find the models in all places: the hub's first, then LM Studio's, then Ollama's, each sorted by name."""
    found = Found()
    models = [
        _hub_models(hub_cache(environment), _pulled(found), found),
        *(_lm_studio_models(root, found) for root in _lm_studio(environment, found)),
        *(_ollama_models(root, found) for root in _ollama(environment)),
    ]
    for of_place in models:
        found.models.extend(sorted(of_place, key=lambda model: model.name.lower()))
    return found


def hub_cache(environment: Mapping[str, str] | None = None) -> Path:
    """The directory of the hub's cache, chosen as the hub's own client does."""
    environment = os.environ if environment is None else environment
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if own := environment.get(name):
            return Path(own).expanduser().absolute()
    home = environment.get("HF_HOME")
    if not home:
        caches = environment.get("XDG_CACHE_HOME") or home_directory(environment) / ".cache"
        home = str(Path(caches) / "huggingface")
    return Path(home).expanduser().absolute() / "hub"


def repository_folder(repository: str) -> str:
    """The directory of a repository in the hub's cache."""
    return "models--" + repository.replace("/", "--")


def tower_of(model: Path) -> Path | None:
    """The vision tower of a GGUF model, if its place keeps it away from the model.

    The hub's repositories put quantisations in subfolders and the tower above them; Ollama's manifests name the
    tower's blob.
    """
    if (root := _ollama_root(model)) is not None:
        towers = {
            one.tower for one in _ollama_models(root, Found()) if one.path == model and one.tower is not None
        }
        return towers.pop() if len(towers) == 1 else None
    snapshot = model.parent.parent
    if snapshot.parent.name != "snapshots" or not _REVISION.fullmatch(snapshot.name):
        return None
    names = [entry.name for entry in _entries(model.parent, Found()) if is_tower(entry.name)]
    if names:
        return None  # next to it, where `open_model` finds it
    root = snapshot.parent.parent.parent
    above = [entry.name for entry in _entries(snapshot, Found()) if is_tower(entry.name)]
    chosen = choose_tower(above)
    return snapshot / chosen if chosen is not None and _lies_in(root, snapshot / chosen) else None


def ollama_params_of(model: Path) -> Mapping[str, object] | CheckpointError:
    """Ollama's parameters for one of its models, or why they cannot be used; empty for any other model."""
    root = _ollama_root(model)
    if root is None:
        return {}
    manifests = [one.manifest for one in _ollama_models(root, Found()) if one.path == model]
    try:
        layers = {
            digest
            for manifest in manifests
            if manifest is not None
            for kind, digest, _ in manifest_digests(manifest)
            if kind == _PARAMS
        }
        if len(layers) > 1:
            raise CheckpointError("several of its models share these weights, and their parameters differ")
        return _read_params(root, layers.pop()) if layers else {}
    except CheckpointError as error:
        return error


def _read_params(root: Path, digest: str) -> Mapping[str, object]:
    blob = root / "blobs" / f"sha256-{digest}"
    if not _lies_in(root, blob):
        raise CheckpointError(f"the blob {blob.name[:19]}... is missing, or is a link that leads outside")
    with open_regular(blob) as (descriptor, nbytes):
        if nbytes > _PARAMS_BYTES:
            raise CheckpointError(f"they are {nbytes} bytes long; at most {_PARAMS_BYTES} are read")
        return parse_object(read_at(descriptor, nbytes, 0, blob), blob)


def choose_tower(names: Sequence[str]) -> str | None:
    """Choose among files with the same vision tower in different formats."""
    towers = [name for name in sorted(names) if is_tower(name.rpartition("/")[2])]

    def rank(name: str) -> int:
        format = format_in_name(name.removesuffix(GGUF_SUFFIX))
        return _TOWERS.index(format) if format in _TOWERS else len(_TOWERS)

    return min(towers, key=rank, default=None)


def gguf_names(repository: str, stems: Sequence[str], pulled: Collection[str] = ()) -> dict[str, str]:
    """The library's name of each GGUF model in a repository, by the stem of its file: OWNER/NAME:FORMAT if that is
    unique, otherwise OWNER/NAME:FILE.

    A model keeps the name under which it was `pulled`: the repository may have more files of its format than are here.
    """
    files = {stem: f"{repository}:{stem.rpartition('/')[2]}" for stem in stems}
    formats = {stem: f"{repository}:{format_in_name(stem)}" for stem in stems if format_in_name(stem)}
    counts = Counter(name for stem, name in formats.items() if files[stem] not in pulled)
    return {
        stem: formats[stem] if counts[formats.get(stem, "")] == 1 and name not in pulled else name
        for stem, name in files.items()
    }


# ── the hub's cache ─────────────────────────────────────────────────────────────────────────────────────────────────


def _pulled(found: Found) -> Mapping[str, Pulled]:
    """What was pulled, by name."""
    try:
        return kept.read().pulled
    except UsageError as error:
        found.note(error.message)
        return {}


def _hub_models(root: Path, pulled: Mapping[str, Pulled], found: Found) -> Iterator[Model]:
    """The models of each repository at its main branch; those pulled at another revision at that one."""
    pinned: dict[str, list[tuple[str, Pulled]]] = {}
    for name, one in pulled.items():
        if one.asked:
            pinned.setdefault(one.repository, []).append((name, one))
    for folder in _entries(root, found):
        kind, _, name = folder.name.partition("--")
        parts = name.split("--")
        if kind != "models" or not 1 <= len(parts) <= 2 or not all(map(_NAME.fullmatch, parts)):
            continue
        if folder.is_symlink():
            found.note(f"{folder} is a link, which Argosy does not follow")
            continue
        repository, snapshots = "/".join(parts), _snapshots(folder, found)

        def models_at(snapshot: Path, repository: str = repository) -> Iterator[Model]:
            files = _files(root, snapshot, found, depth=2)
            return _models_in(snapshot, files, repository, place="hub", root=root, pulled=pulled)

        own = [(name, one) for name, one in pinned.get(repository, ()) if one.revision in snapshots]
        newest = _snapshot(folder, snapshots)
        models = {} if newest is None else {model.name: model for model in models_at(newest)}
        for name, one in own:
            at = {model.name: model for model in models_at(snapshots[one.revision])}
            if name in at:
                models[name] = replace(at[name], asked=one.asked)
        yield from models.values()


def _snapshots(folder: Path, found: Found) -> dict[str, Path]:
    """The snapshots of a repository by their commit."""
    return {
        entry.name: entry
        for entry in _entries(folder / "snapshots", found)
        if _REVISION.fullmatch(entry.name) and not entry.is_symlink()
    }


def _snapshot(folder: Path, snapshots: Mapping[str, Path]) -> Path | None:
    """The revision that `main` points to, otherwise the newest."""
    if (found := snapshots.get(read_ref(folder / "refs" / kept.MAIN))) is not None:
        return found
    return max(snapshots.values(), key=lambda entry: entry.lstat().st_mtime, default=None)


def read_ref(path: Path) -> str:
    """The commit to which a branch or tag in the hub's cache points; "" if unreadable."""
    try:
        with open_regular(path) as (descriptor, nbytes):
            return read_at(descriptor, min(nbytes, 100), 0, path).decode("ascii", "replace").strip()
    except CheckpointError:
        return ""


def _models_in(
    directory: Path,
    files: Mapping[str, Path],
    name: str,
    *,
    place: Place,
    root: Path,
    pulled: Collection[str] = (),
) -> Iterator[Model]:
    """The models in a repository's directory: one in safetensors, or any number of GGUF files."""
    if CONFIG_FILE in files or PARAMS_FILE in files:
        shards, index = weight_files(files)
        if shards or index in files:
            yield Model(
                name=name,
                place=place,
                root=root,
                path=directory,
                files=tuple(files[file] for file in shards),
                num_missing=_num_missing(shards, SHARD),
            )
    models: dict[str, list[str]] = {}
    for file in sorted(files):
        base = file.rpartition("/")[2]
        if is_model(base):
            part = PART_NAME.fullmatch(file)
            models.setdefault(part["stem"] if part else file.removesuffix(GGUF_SUFFIX), []).append(file)
    towers = [file for file in files if is_tower(file.rpartition("/")[2])]
    names = gguf_names(name, list(models), pulled)
    for stem, parts in models.items():
        beside = [tower for tower in towers if tower.rpartition("/")[0] == stem.rpartition("/")[0]]
        above = [tower for tower in towers if "/" not in tower]
        tower = choose_tower(beside or above)
        yield Model(
            name=names[stem],
            place=place,
            root=root,
            path=files[parts[0]],
            files=tuple(files[part] for part in parts),
            tower=None if tower is None else files[tower],
            num_missing=_num_missing(parts, PART_NAME),
        )


def _num_missing(names: Sequence[str], pattern: re.Pattern[str]) -> int:
    parts = [match for name in names if (match := pattern.fullmatch(name))]
    return max(0, max((int(part["count"]) for part in parts), default=1) - len(names))


# ── LM Studio ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _lm_studio(environment: Mapping[str, str] | None, found: Found) -> list[Path]:
    """LM Studio's model folders: the one that its settings name, and the default one."""
    user = home_directory(environment)
    homes = [user / ".lmstudio", user / ".cache" / "lm-studio"]
    pointer = user / ".lmstudio-home-pointer"  # points to its home directory, once it has been started
    try:
        with open_regular(pointer) as (descriptor, nbytes):
            homes.insert(0, Path(os.fsdecode(read_at(descriptor, min(nbytes, 4096), 0, pointer)).strip()))
    except CheckpointError:
        pass
    folders: list[Path] = []
    for home in dict.fromkeys(path for path in homes if path.is_absolute() and "\0" not in str(path)):
        named = _named_folder(home / "settings.json", found)
        folders += [home / "models"] if named is None else [named, home / "models"]
    return list(dict.fromkeys(folders))


def _named_folder(settings: Path, found: Found) -> Path | None:
    """The model folder that LM Studio's settings name, or None."""
    if not os.path.lexists(settings):
        return None
    try:
        with open_regular(settings) as (descriptor, nbytes):
            if nbytes > _SETTINGS_BYTES:
                raise CheckpointError(f"it is {nbytes} bytes long; at most {_SETTINGS_BYTES} are read")
            raw = parse_object(read_at(descriptor, nbytes, 0, settings), settings)
    except CheckpointError as error:
        found.note(f"{settings} is skipped: {error.message}")
        return None
    folder = raw.get("downloadsFolder")
    if folder is None:
        return None
    if not isinstance(folder, str) or not Path(folder).is_absolute() or "\0" in folder:
        found.note(f"{settings} names the folder '{quote(folder)}', which is not an absolute path")
        return None
    return Path(folder)


def _lm_studio_models(root: Path, found: Found) -> Iterator[Model]:
    for owner in _entries(root, found):
        if owner.is_symlink() or not owner.is_dir() or not _NAME.fullmatch(owner.name):
            continue
        for folder in _entries(owner, found):
            if folder.is_symlink() or not folder.is_dir() or not _NAME.fullmatch(folder.name):
                continue
            files = _files(root, folder, found, depth=1)
            name = f"{owner.name}/{folder.name}"
            yield from _models_in(folder, files, name, place="LM Studio", root=root)


# ── Ollama ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _ollama(environment: Mapping[str, str] | None) -> list[Path]:
    environment = os.environ if environment is None else environment
    if own := environment.get("OLLAMA_MODELS"):
        return [Path(own).expanduser().absolute()]
    return [home_directory(environment) / ".ollama" / "models", Path("/usr/share/ollama/.ollama/models")]


def _ollama_models(root: Path, found: Found) -> Iterator[Model]:
    for host, owner, name, manifest in ollama_manifests(root, found):
        try:
            layers = _layers(root, manifest)
            weights = [blob for kind, blob in layers if kind == _WEIGHTS]
            if not weights:
                continue  # an adapter, or a model that runs elsewhere
            if len(weights) > 1:
                raise CheckpointError(
                    f"it has {len(weights)} weight files; only models with one are supported"
                )
            towers = [blob for kind, blob in layers if kind == _TOWER]
        except CheckpointError as error:
            found.note(f"{manifest} is skipped: {error.message}")
            continue
        shown = name if (host, owner) == (_OLLAMA_HOST, _OLLAMA_OWNER) else f"{owner}/{name}"
        shown = shown if host == _OLLAMA_HOST else f"{host}/{shown}"
        yield Model(
            name=f"{shown}:{manifest.name}",
            place="Ollama",
            root=root,
            path=weights[0],
            files=tuple(weights),
            tower=towers[0] if len(towers) == 1 else None,
            manifest=manifest,
        )


def _ollama_root(model: Path) -> Path | None:
    """Ollama's directory, if a model's file is in it."""
    root = model.parent.parent
    return root if model.parent.name == "blobs" and (root / "manifests").is_dir() else None


def ollama_manifests(root: Path, found: Found) -> Iterator[tuple[str, str, str, Path]]:
    """Host, owner, name and manifest of each of Ollama's models."""

    def folders(directory: Path) -> Iterator[Path]:
        for entry in _entries(directory, found):
            if _NAME.fullmatch(entry.name) and not entry.is_symlink() and entry.is_dir():
                yield entry

    for host in folders(root / "manifests"):
        for owner in folders(host):
            for name in folders(owner):
                for manifest in _entries(name, found):
                    if not _NAME.fullmatch(manifest.name):
                        continue
                    if manifest.is_symlink() or not manifest.is_file():
                        found.note(f"{manifest} is not a regular file, and is skipped")
                        continue
                    yield host.name, owner.name, name.name, manifest


def manifest_digests(manifest: Path) -> list[tuple[str, str, int]]:
    """Media type, hex digest and size of each layer of a manifest, including its config.

    Raises:
        CheckpointError: it is malformed.
    """
    with open_regular(manifest) as (descriptor, nbytes):
        if nbytes > _MANIFEST_BYTES:
            raise CheckpointError(f"it is {nbytes} bytes long; at most {_MANIFEST_BYTES} are read")
        raw = parse_object(read_at(descriptor, nbytes, 0, manifest), manifest)
    layers = raw.get("layers")
    if not isinstance(layers, list) or len(layers) > _MOST_LAYERS:
        raise CheckpointError(f"its layers are missing, or more than {_MOST_LAYERS}")
    found = []
    for layer in [*layers, *([raw["config"]] if "config" in raw else [])]:
        fields = layer if isinstance(layer, dict) else {}
        kind, digest, size = fields.get("mediaType"), fields.get("digest"), fields.get("size")
        match = _DIGEST.fullmatch(digest) if isinstance(digest, str) else None
        if not isinstance(kind, str) or match is None or type(size) is not int:
            raise CheckpointError(
                f"it has a layer with digest '{quote(digest)}', expected sha256: and 64 digits"
            )
        found.append((kind, match[1], size))
    return found


def _layers(root: Path, manifest: Path) -> list[tuple[str, Path]]:
    """Media type and blob of the layers with weights."""
    found = []
    for kind, digest, size in manifest_digests(manifest):
        if kind not in (_WEIGHTS, _TOWER):
            continue
        blob = root / "blobs" / f"sha256-{digest}"
        if not _lies_in(root, blob):
            raise CheckpointError(
                f"the blob sha256-{digest[:12]}... is missing, or is a link that leads outside"
            )
        if blob.stat().st_size != size:
            raise CheckpointError(
                f"the blob sha256-{digest[:12]}... is {blob.stat().st_size} bytes long, and it says {size}"
            )
        found.append((kind, blob))
    return found


# ── files of others ─────────────────────────────────────────────────────────────────────────────────────────────────


def _entries(directory: Path, found: Found) -> list[Path]:
    """The entries of a directory, sorted by name; empty, with a note, if it cannot be read."""
    try:
        with os.scandir(directory) as entries:
            listed = [directory / entry.name for _, entry in zip(range(_MOST_ENTRIES), entries, strict=False)]
        os.stat(f"{directory}/.")  # fails if only the names can be read
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        found.note(f"{directory} cannot be read: {error.strerror}")
        return []
    return sorted(listed)


def _files(root: Path, directory: Path, found: Found, *, depth: int) -> dict[str, Path]:
    """The regular files below a directory, by relative name, including links to files in `root`."""
    files: dict[str, Path] = {}
    for entry in _entries(directory, found):
        if not entry.is_symlink() and entry.is_dir():
            if depth > 1:
                below = _files(root, entry, found, depth=depth - 1)
                files |= {f"{entry.name}/{name}": path for name, path in below.items()}
        elif _lies_in(root, entry):
            files[entry.name] = entry
        elif entry.is_symlink():
            found.note(f"{entry} is skipped: it is a link that is broken or leads out of {root}")
    return files


def _lies_in(root: Path, path: Path) -> bool:
    """Whether a path, with links resolved, is a regular file in `root`."""
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):
        return False
    return target.is_relative_to(root.resolve()) and target.is_file()
