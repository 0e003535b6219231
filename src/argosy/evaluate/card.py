"""Make a model card: the known facts as JSON and as Markdown. Missing facts are shown as unknown.

    headers, manifest, library, drift report, policy  ->  gather  ->  facts  ->  markdown

Nothing is guessed, and nothing is computed from weights except hashes, on request. Names and licences come from
files and hubs and may contain anything, so Markdown shows them with every special character escaped.

Elsewhere: `reports.py` reads drift reports; `cli/commands/card.py` prints.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blake3

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.geometry import count_parameters
from argosy.checkpoint.manifest import Manifest, read_manifest
from argosy.checkpoint.pack_contents import goes_with_weights, is_licence
from argosy.checkpoint.untrusted_file import open_regular, quote
from argosy.config import format_bytes
from argosy.errors import ArgosyError, CheckpointError
from argosy.evaluate.measure import identity_of
from argosy.forecast.planning import Summary
from argosy.library.kept import Pulled
from argosy.model.encoders.reading import find_encoders

CARD_VERSION = 1
_READ_BYTES = 1 << 20
_BLOB = re.compile(r"(?:sha256-)?([0-9a-f]{64})|([0-9a-f]{40})")
_HEX = re.compile(r"[0-9a-f]{64}")
# Characters that Markdown treats specially: anywhere in a line, in addresses that become links, and at a text's
# start.
_INLINE = re.compile(r"[\\`*_\[\]<>|~&]|(?<=:)//|(?i:(?<=www)\.)")
_START = re.compile(r"^(\d*)([.)#+=-])")
_UNKNOWN = "unknown"

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """The policy file that a server of the model would use."""

    digest: str
    default: str | None
    policies: tuple[str, ...]


def gather(
    name: str,
    files: ModelFiles,
    *,
    budget: Summary,
    pulled: Pulled | None = None,
    licence: str | None = None,
    drift: Mapping[str, Any] | None = None,
    guard: Guard | None = None,
    hashes: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Gather all facts of a card as plain JSON values; None means unknown.

    Args:
        pulled: the library's record of the pull that brought the model here.
        licence: the licence of a model shipped with Argosy.
        drift: from `reports.read_report`.
        hashes: read and hash the files whose hash is not known.

    Raises:
        CheckpointError: a file cannot be read.
    """
    config = files.config
    everything, active = count_parameters(config)
    manifest = read_manifest(files.path) if files.is_packed else None
    listed = _files(files, manifest, hashes=hashes, progress=progress)
    licensed = _licence(files, pulled, licence, listed)
    return {
        "argosy_card": CARD_VERSION,
        "model": {
            "name": name,
            "identity": identity_of(files),
            "family": config.family,
            "num_parameters": everything,
            "num_parameters_per_token": active,
            "num_layers": config.num_layers,
            "num_experts": config.num_experts,
            "experts_per_token": config.experts_per_token,
            "vocab_size": config.vocab_size,
            "context_tokens": config.context_tokens,
        },
        "source": None if pulled is None else {"repository": pulled.repository, "revision": pulled.revision},
        "licence": licensed,
        "files": listed,
        "conversion": _conversion(files, manifest, drift),
        "drift": None if drift is None else dict(drift),
        "memory": {"smallest_bytes": budget.smallest_bytes, "resident_bytes": budget.resident_bytes},
        "guard": None
        if guard is None
        else {"policy_sha256": guard.digest, "default": guard.default, "policies": list(guard.policies)},
        "limits": _limits(files, bool(licensed["name"]), drift, listed),
    }


def _files(
    files: ModelFiles, manifest: Manifest | None, *, hashes: bool, progress: Progress | None
) -> list[dict[str, Any]]:
    if manifest is not None:
        return [
            {
                "name": name,
                "nbytes": nbytes,
                # a pack with any other digest opens but fails --verify
                "blake3": digest if _HEX.fullmatch(digest) else None,
                "sha256": None,
            }
            for name, (nbytes, digest) in sorted(manifest.files.items())
        ]
    paths = list(files.weight_paths)
    directory = files.path if files.path.is_dir() else files.path.parent
    belongs = goes_with_weights if files.path.is_dir() else is_licence
    paths += sorted(path for path in directory.iterdir() if belongs(path.name) and path.is_file())
    sizes = [path.stat().st_size for path in paths]
    total, done = sum(sizes), 0
    listed: list[dict[str, Any]] = []
    for path, nbytes in zip(paths, sizes, strict=True):
        # A hub's cache names large files by their SHA-256, which the pull has verified.
        blob = _BLOB.fullmatch(path.resolve().name)
        sha256 = None if blob is None else blob[1]
        digest = None
        if hashes and sha256 is None:

            def note(count: int, before: int = done) -> None:
                if progress is not None:
                    progress("hashing", (before + count) / max(1, total))

            digest = _blake3(path, note)
        done += nbytes
        listed.append({"name": path.name, "nbytes": nbytes, "blake3": digest, "sha256": sha256})
    return listed


def _blake3(path: Path, note: Callable[[int], None]) -> str:
    hasher, done = blake3.blake3(), 0
    with open_regular(path) as (descriptor, _), open(descriptor, "rb", buffering=0, closefd=False) as file:
        while part := file.read(_READ_BYTES):
            hasher.update(part)
            done += len(part)
            note(done)
    return hasher.hexdigest()


def _licence(
    files: ModelFiles, pulled: Pulled | None, own: str | None, listed: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    name, origin = None, None
    if own is not None:
        name, origin = own, "Argosy"
    elif pulled is not None and pulled.licence:
        name, origin = pulled.licence, "the hub's card"
    elif files.header is not None:
        try:
            if stated := files.header.text("general.license", ""):
                name, origin = quote(stated), "general.license of the GGUF"
        except CheckpointError:
            pass  # a value that is not text says nothing
    accepted = None
    if pulled is not None and pulled.accepted_at:
        accepted = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(pulled.accepted_at))
    return {
        "name": name,
        "origin": origin,
        "accepted_at": accepted,
        "files": [one["name"] for one in listed if is_licence(one["name"])],
    }


def _conversion(
    files: ModelFiles, manifest: Manifest | None, drift: Mapping[str, Any] | None
) -> dict[str, Any]:
    return {
        "is_packed": files.is_packed,
        "asked_format": None if manifest is None else manifest.format,
        "dense_formats": list(dict.fromkeys(ref.format for ref in files.dense.values())),
        "expert_format": files.expert_format if files.experts else None,
        "dense_bytes": files.dense_bytes,
        "expert_bytes": files.expert_bytes,
        "reference": None
        if drift is None
        else {key: drift["reference"][key] for key in ("name", "identity")},
    }


def _limits(
    files: ModelFiles,
    has_licence: bool,
    drift: Mapping[str, Any] | None,
    listed: Iterable[Mapping[str, Any]],
) -> list[str]:
    """Sentences about what the card does not prove and what the model cannot do here."""
    limits = []
    if drift is None:
        limits.append("What conversion changed has not been measured; argosy eval drift measures it.")
    else:
        languages = ", ".join(drift["texts"]["languages"])
        limits.append(
            f"Drift was measured on Argosy's own texts ({languages}) against the reference; the bias of the reference "
            "was not."
        )
    if not has_licence:
        limits.append("The licence is not known: ask the publisher of the model.")
    if any(one["sha256"] is None and one["blake3"] is None for one in listed):
        limits.append("Files without a hash were not read; --hash reads them.")
    encoders = find_encoders(files)
    for kind, found in encoders.items():
        if isinstance(found, ArgosyError):
            limits.append(f"It takes no {kind}s here: {found.message}")
    if not encoders:
        limits.append("It takes text only.")
    limits.append("No claim is made about safety, or about what the model was trained on.")
    return limits


# ── Markdown ────────────────────────────────────────────────────────────────────────────────────────────────────────


def markdown(facts: Mapping[str, Any]) -> str:
    """Render the card as Markdown."""
    model, licence, source = facts["model"], facts["licence"], facts["source"]
    lines = [
        f"# {_escape(model['name'])}",
        "",
        f"- identity: `{model['identity']}`",
        f"- family: {_escape(model['family'])}, {_count(model['num_parameters'])} parameters,"
        f" {_count(model['num_parameters_per_token'])} active per token",
        f"- experts: {model['num_experts']} per layer, {model['experts_per_token']} per token;"
        f" context {model['context_tokens']} tokens",
        "- source: "
        + (_UNKNOWN if source is None else _escape(f"{source['repository']} at {source['revision']}")),
        "",
        "## Licence",
        "",
        "- "
        + (_UNKNOWN if licence["name"] is None else f"{_escape(licence['name'])}, says {licence['origin']}"),
        f"- accepted here: {licence['accepted_at'] or _UNKNOWN}",
        f"- its text: {', '.join(map(_escape, licence['files'])) or 'not with the model'}",
        "",
        "## Conversion",
        "",
        *_conversion_lines(facts["conversion"]),
        "",
        "## Drift",
        "",
        *_drift_lines(facts["drift"]),
        "",
        "## Memory",
        "",
        f"- smallest budget: {format_bytes(facts['memory']['smallest_bytes'])}",
        f"- every expert in memory: {format_bytes(facts['memory']['resident_bytes'])}",
        "",
        "## Guard",
        "",
        *_guard_lines(facts["guard"]),
        "",
        "## Known limits",
        "",
        *(f"- {_escape(limit)}" for limit in facts["limits"]),
        "",
        "## Files",
        "",
        "| file | bytes | hash |",
        "|---|---:|---|",
        *(f"| {_escape(one['name'])} | {one['nbytes']} | {_hash(one)} |" for one in facts["files"]),
    ]
    return "\n".join(lines) + "\n"


def _conversion_lines(facts: Mapping[str, Any]) -> list[str]:
    kind = (
        f"a pack, asked for as {_escape(facts['asked_format'])}"
        if facts["is_packed"]
        else "files as they came"
    )
    reference = facts["reference"]
    came_from = _UNKNOWN
    if reference is not None:
        came_from = f"{_escape(reference['name'])}, {_escape(reference['identity'])}"
    return [
        f"- form: {kind}",
        f"- experts: {facts['expert_format'] or 'none'}, {format_bytes(facts['expert_bytes'])}",
        f"- other weights: {'+'.join(facts['dense_formats'])}, {format_bytes(facts['dense_bytes'])}",
        f"- compared with: {came_from}",
    ]


def _drift_lines(drift: Mapping[str, Any] | None) -> list[str]:
    if drift is None:
        return ["Not measured."]
    rows = [
        f"| {_escape(one['language'])} | {_interval(one['kl_nats'], 4)} | {_interval(one['agreement'], 1, 100)} |"
        f" {_interval(one['perplexity_rise'], 1, 100)} |"
        for one in drift["text"]
    ]
    widest = max(drift["groups"], key=lambda one: abs(one["shift_nats"]["value"]), default=None)
    lines = [
        f"**{_escape(drift['verdict']['level'])}**: {_escape('; '.join(drift['verdict']['reasons']))}",
        "",
        "| passages | KL, nats a token | same likeliest token, % | rise of perplexity, % |",
        "|---|---|---|---|",
        *rows,
        "",
        f"- a gap between two groups changes by {_interval(drift['gaps']['change_nats'], 3)} nats; the reference's mean"
        f" gap is {drift['gaps']['reference_nats']:.3f}",
    ]
    if widest is not None:
        lines.append(
            f"- largest shift of a group: {_escape(widest['dimension'])}, {_escape(widest['group'])},"
            f" {_interval(widest['shift_nats'], 3)} nats"
        )
    lines += [
        f"- {one['num_questions']} questions ({_escape(one['condition'])}): accuracy"
        f" {100 * one['accuracy_reference']:.1f} % before, {100 * one['accuracy_candidate']:.1f} % after"
        for one in drift["questions"]
    ]
    return [*lines, "", "Intervals in parentheses: 95 %."]


def _guard_lines(guard: Mapping[str, Any] | None) -> list[str]:
    if guard is None:
        return ["No policy file was named. A server without `--policy` checks no text."]
    return [
        f"- policy file: SHA-256 `{guard['policy_sha256']}`",
        f"- policies: {', '.join(map(_escape, guard['policies'])) or 'none'}; of keys without one:"
        f" {_escape(guard['default'] or 'none')}",
    ]


def _interval(estimate: Mapping[str, float], decimals: int, factor: int = 1) -> str:
    value, low, high = (f"{factor * estimate[key]:.{decimals}f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _hash(one: Mapping[str, Any]) -> str:
    for kind in ("blake3", "sha256"):
        if one[kind] is not None:
            return f"{kind} `{one[kind]}`"
    return _UNKNOWN


def _count(number: int) -> str:
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _escape(text: str) -> str:
    """`text` on one line, as Markdown that shows it literally."""
    line = "".join(char if char.isprintable() else " " for char in text)
    return _START.sub(r"\1\\\2", _INLINE.sub(lambda found: "\\" + found[0], line))
