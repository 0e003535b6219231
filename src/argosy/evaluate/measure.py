"""Measure drift: open the reference, score the texts, close it, then do the same with the candidate.

The two are never in memory together, so each gets the whole budget: any model that runs in production also fits
here.

Elsewhere: `scoring.py` reads, `drift.py` compares, `cli/commands/eval.py` prints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import blake3

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.fingerprint import fingerprint
from argosy.checkpoint.manifest import MANIFEST_FILE
from argosy.config import DEMO
from argosy.config.engine import WantedAdapter
from argosy.engine.engine import Engine
from argosy.errors import UsageError
from argosy.evaluate.drift import Drift, compare
from argosy.evaluate.material import Material
from argosy.evaluate.questions import Question
from argosy.evaluate.row_file import RowFile
from argosy.evaluate.scoring import Progress, Scores, Tokens, engine_options, score, tokens_of
from argosy.open.models import configure, locate_model, open_files
from argosy.prompt.tokenizer import Tokenizer
from argosy.user_directories import cache_directory


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter of one of the two, and the digest of its files."""

    wanted: WantedAdapter
    digest: bytes

    @property
    def identity(self) -> str:
        """Follows that of the model, so that a report about both is not one about the model."""
        return f"+lora:{self.digest.hex()}*{self.wanted.factor!r}"

    @classmethod
    def of(cls, wanted: WantedAdapter, files: ModelFiles) -> Adapter:
        """Read the adapter before any text is read.

        Raises:
            UsageError: it changes nothing in these texts.   And what `open_adapter` raises.
        """
        from argosy.adapters.reading import open_adapter  # an installation may be without

        found = open_adapter(wanted.path, files, columns=wanted.columns)
        if found.invocation_tokens:
            raise UsageError(
                f"{wanted.path} is an activated adapter: it changes a text only from its invocation tokens on, which "
                "the texts that are compared do not have"
            )
        return cls(wanted, found.digest)


@dataclass(frozen=True, slots=True)
class Subject:
    """The reference or the candidate. The same files have the same `identity`; `settings` may change which tokens
    come. An adapter is part of the name and of the identity.
    """

    name: str
    identity: str
    family: str
    dense_formats: tuple[str, ...]
    expert_format: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, name: str, files: ModelFiles, settings: Mapping[str, Any], used: Adapter | None = None
    ) -> Subject:
        wanted = None if used is None else used.wanted
        return cls(
            name if wanted is None else f"{name}:{wanted.name}",
            identity_of(files) + ("" if used is None else used.identity),
            files.config.family,
            tuple(dict.fromkeys(ref.format for ref in files.dense.values())),
            files.expert_format if files.experts else "none",
            {**settings, **({} if wanted is None or wanted.factor == 1 else {"lora_scale": wanted.factor})},
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "identity": self.identity,
            "family": self.family,
            "dense_formats": list(self.dense_formats),
            "expert_format": self.expert_format,
            "settings": dict(self.settings),
        }


@dataclass(frozen=True, slots=True)
class DriftReport:
    """The two models and the result of their comparison."""

    reference: Subject
    candidate: Subject
    drift: Drift

    def as_dict(self) -> dict[str, Any]:
        facts = self.drift.as_dict()
        return {
            "argosy_drift": facts.pop("argosy_drift"),
            "argosy": metadata.version("argosy"),
            "reference": self.reference.as_dict(),
            "candidate": self.candidate.as_dict(),
            **facts,
        }


def identity_of(files: ModelFiles) -> str:
    """The identity of a model in reports and on cards.

    A pack's identity is the BLAKE3 of its manifest, which covers every byte. Other files are identified by their
    fingerprint, which covers the place and format of every tensor, plus samples.
    """
    if files.is_packed:
        return f"blake3:{blake3.blake3((files.path / MANIFEST_FILE).read_bytes()).hexdigest()}"
    return f"samples:{fingerprint(files)}"


def measure_drift(
    reference: str | Path,
    candidate: str | Path,
    material: Material,
    questions: Sequence[Question] = (),
    *,
    options: Mapping[str, Any],
    candidate_settings: Mapping[str, Any],
    adapters: Sequence[WantedAdapter | None] = (None, None),
    progress: Progress | None = None,
) -> DriftReport:
    """Compare two models, or a model with itself under other settings or with an adapter.

    Args:
        options: for `Engine.open`, the same for both.
        candidate_settings: options only for the candidate, which may change its tokens.
        adapters: of the reference and of the candidate.

    Raises:
        UsageError: their tokenizers differ, or an adapter changes nothing in these texts.
        DiskFull: there is no room for the logits.
        And what `Engine.open` raises.
    """
    names = [str(reference), str(candidate)]
    files = [open_files(locate_model(model, progress)) for model in (reference, candidate)]
    used = [
        None if wanted is None else Adapter.of(wanted, one)
        for wanted, one in zip(adapters, files, strict=True)
    ]
    sizes = [one.config.vocab_size for one in files]
    if sizes[0] != sizes[1]:
        raise _other_tokens(names, f"their vocabularies have {sizes[0]} and {sizes[1]} tokens")
    context_tokens = min(one.config.context_tokens for one in files)
    tokens, theirs = (
        _tokens_of(name, one, material, questions, context_tokens)
        for name, one in zip(names, files, strict=True)
    )
    if not tokens.equals(theirs):
        raise _other_tokens(names, "their tokenizers split the same text in different ways")
    del theirs
    settings: list[Mapping[str, Any]] = [{}, candidate_settings]
    scores: list[Scores] = []
    with RowFile(cache_directory(), tokens.num_rows, sizes[0]) as rows:
        for number, one in enumerate(files):
            wanted = adapters[number]
            given = {**options, **engine_options(tokens, one.config), **settings[number]}
            given["loras"] = () if wanted is None else (wanted,)
            with Engine(one, configure(names[number], one, **given), progress=progress) as engine:
                adapter = None if wanted is None else wanted.name
                scores.append(
                    score(engine, tokens, rows, is_reference=number == 0, adapter=adapter, progress=progress)
                )
    first, second = (
        Subject.of(_shown_name(name), one, own, adapter)
        for name, one, own, adapter in zip(names, files, settings, used, strict=True)
    )
    return DriftReport(first, second, compare(material, questions, *scores))


def _tokens_of(
    name: str, files: ModelFiles, material: Material, questions: Sequence[Question], context_tokens: int
) -> Tokens:
    tokenizer = Tokenizer.open(files.path, files.header)
    if tokenizer is None:
        raise UsageError(f"{name} has no tokenizer, so no text can be compared")
    return tokens_of(material, questions, tokenizer, context_tokens=context_tokens)


def _other_tokens(names: Sequence[str], why: str) -> UsageError:
    return UsageError(
        f"{names[0]} and {names[1]} cannot be compared token by token: {why}",
        hint="drift is what compression changes: compare a checkpoint with a pack of it, or with another format",
    )


def _shown_name(model: str) -> str:
    """A name for the report, which people share: for a path, only its last part."""
    return model if model == DEMO else Path(model).name or model
