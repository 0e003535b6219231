"""Caches as other programs write them, for tests: the hub's, LM Studio's and Ollama's."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from argosy.library.places import find_models

REFERENCE = Path(__file__).parents[1] / "models" / "reference"
GGUF = Path(__file__).parents[1] / "models" / "reference_seeing" / "qwen3_vl_moe" / "gguf"
TINY = REFERENCE / "mixtral_plain"
REVISION = "b" * 40

WEIGHTS = "application/vnd.ollama.image.model"
PARAMS = "application/vnd.ollama.image.params"
TOWER = "application/vnd.ollama.image.projector"


def add_to_hub(
    root: Path,
    repository: str,
    source: Path,
    *,
    revision: str = REVISION,
    is_main: bool = True,
    folder: str = "",
) -> Path:
    """Add the files of a directory to a hub's cache, as `hf download` would; returns the snapshot."""
    home = root / ("models--" + repository.replace("/", "--"))
    snapshot = home / "snapshots" / revision
    (home / "blobs").mkdir(parents=True, exist_ok=True)
    (snapshot / folder).mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        blob = home / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, blob)
        link = snapshot / folder / path.name
        up = "../" * (len(link.relative_to(home).parts) - 1)
        link.symlink_to(f"{up}blobs/{blob.name}")
    if is_main:
        (home / "refs").mkdir(exist_ok=True)
        (home / "refs" / "main").write_text(revision)
    return snapshot


def add_to_lm_studio(home: Path, name: str, source: Path) -> Path:
    """Copy a file or a directory to where LM Studio keeps its models."""
    folder = home / ".lmstudio" / "models" / name
    folder.mkdir(parents=True, exist_ok=True)
    for path in [source] if source.is_file() else list(source.iterdir()):
        shutil.copy(path, folder)
    return folder


def add_to_ollama(
    root: Path, name: str, files: dict[str, Path], *, host: str = "registry.ollama.ai", owner: str = "library"
) -> Path:
    """Add a model, files by media type, to Ollama's models; returns the manifest."""
    layers = []
    (root / "blobs").mkdir(parents=True, exist_ok=True)
    for kind, path in files.items():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, root / "blobs" / f"sha256-{digest}")
        layers.append({"mediaType": kind, "digest": f"sha256:{digest}", "size": path.stat().st_size})
    return write_manifest(root, name, {"schemaVersion": 2, "layers": layers}, host=host, owner=owner)


def write_manifest(
    root: Path, name: str, content: Any, *, host: str = "registry.ollama.ai", owner: str = "library"
) -> Path:
    model, _, tag = name.partition(":")
    manifest = root / "manifests" / host / owner / model / tag
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(content if isinstance(content, str) else json.dumps(content))
    return manifest


def names() -> list[str]:
    """The names of all models that are found."""
    return [model.name for model in find_models().models]
