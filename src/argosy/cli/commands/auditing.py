"""Options of `argosy serve` for its audit, and for how long it keeps what clients sent.

    options  ->  Keeping: checked before anything is opened  ->  ServerSettings, KvDir

Elsewhere: the audit is `guard/audit.py`; the commands that read it are `audit.py`, and those for all kept data
`data.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from argosy.cli.shared.declared import options
from argosy.config import parse_seconds
from argosy.config.option import Further
from argosy.errors import UsageError

if TYPE_CHECKING:
    from argosy.guard.audit import AuditSettings

_NEVER = "never"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepingOptions:
    """Options for what `serve` keeps of requests, explained in docs/guides/privacy.md."""

    audit: Annotated[Path | None, Further("--audit DIR", "Record requests here.")] = None
    audit_key_file: Annotated[
        Path | None, Further("--audit-key-file FILE", "Key of the audit; default: in its directory.")
    ] = None
    audit_full: Annotated[
        Literal["stop", "degrade"] | None,
        Further(
            "--audit-full",
            "If the audit cannot be written: refuse requests (the default), or go on and count them.",
        ),
    ] = None
    audit_keep: Annotated[
        str | None, Further("--audit-keep TIME", "How long: 365d, the default, or never to end.")
    ] = None
    audit_content: Annotated[bool, Further("--audit-content", "Also keep the texts, encrypted.")] = False
    audit_content_keep: Annotated[
        str | None, Further("--audit-content-keep TIME", "How long; default 30d.")
    ] = None
    kv_keep: Annotated[
        str | None, Further("--kv-keep TIME", "How long files of --kv-dir stay; default 7d.")
    ] = None
    store_keep: Annotated[
        str | None, Further("--store-keep TIME", "How long responses stay unused; default 24h.")
    ] = None


keeping_options = options(KeepingOptions, into="keeps")


@dataclass(frozen=True, slots=True, kw_only=True)
class Keeping:
    """What a server keeps, and for how long."""

    audit: AuditSettings | None
    kv_s: float | None  # None: the default of `KvDir`
    store_s: float


def keeping_of(given: KeepingOptions, *, kv_dir: Path | None, store: bool) -> Keeping:
    """Check options.

    Raises:
        UsageError: an option is invalid or needs another.
    """
    from argosy.serve.answer.kept_items import KEPT_S

    for name in ("audit_key_file", "audit_full", "audit_keep", "audit_content", "audit_content_keep"):
        if getattr(given, name) and given.audit is None:
            raise UsageError(f"--{name.replace('_', '-')} needs --audit DIR")
    if given.audit_content_keep and not given.audit_content:
        raise UsageError("--audit-content-keep needs --audit-content")
    if given.kv_keep and kv_dir is None:
        raise UsageError("--kv-keep needs --kv-dir DIR")
    if given.store_keep and not store:
        raise UsageError("--store-keep and --no-store exclude each other")
    return Keeping(
        audit=None if given.audit is None else _audit(given.audit, given),
        kv_s=None if given.kv_keep is None else parse_seconds(given.kv_keep),
        store_s=KEPT_S if given.store_keep is None else parse_seconds(given.store_keep),
    )


def _audit(directory: Path, given: KeepingOptions) -> AuditSettings:
    from argosy.guard.audit import AuditSettings

    chosen: dict[str, Any] = {"when_full": given.audit_full} if given.audit_full else {}
    if given.audit_keep is not None:
        chosen["keep_s"] = None if given.audit_keep == _NEVER else parse_seconds(given.audit_keep)
    if given.audit_content_keep is not None:
        chosen["content_keep_s"] = parse_seconds(given.audit_content_keep)
    return AuditSettings(
        directory=directory, key_file=given.audit_key_file, with_content=given.audit_content, **chosen
    )
