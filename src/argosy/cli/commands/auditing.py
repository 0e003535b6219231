"""Options of `argosy serve` for its audit, and for how long it keeps what clients sent.

    options  ->  Keeping: checked, before anything is opened  ->  ServerSettings, KvDir

Elsewhere: the audit is `guard/audit.py`; commands that read one are `audit.py`; those for all that is kept, `data.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from argosy.cli.shared.help_all import Further
from argosy.config import parse_seconds
from argosy.errors import UsageError

if TYPE_CHECKING:
    from argosy.guard.audit import AuditSettings

Command = TypeVar("Command", bound=Callable[..., Any])

_DIRECTORY = click.Path(path_type=Path)
_NEVER = "never"
# docs/guides/privacy.md explains them.
_OPTIONS = (
    click.option("--audit", type=_DIRECTORY, metavar="DIR", cls=Further, help="Record requests here."),
    click.option(
        "--audit-key-file", type=click.Path(path_type=Path), metavar="FILE", cls=Further,
        help="Key of the audit; default: in its directory.",
    ),
    click.option(
        "--audit-full", type=click.Choice(["stop", "degrade"]), cls=Further,
        help="If the audit cannot be written: refuse requests (the default), or go on and count them.",
    ),
    click.option("--audit-keep", metavar="TIME", cls=Further, help="How long: 365d, the default, or never to end."),
    click.option("--audit-content", is_flag=True, cls=Further, help="Also keep the texts, encrypted."),
    click.option("--audit-content-keep", metavar="TIME", cls=Further, help="How long; default 30d."),
    click.option("--kv-keep", metavar="TIME", cls=Further, help="How long files of --kv-dir stay; default 7d."),
    click.option("--store-keep", metavar="TIME", cls=Further, help="How long responses stay unused; default 24h."),
)  # fmt: skip


def keeping_options(command: Command) -> Command:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@dataclass(frozen=True, slots=True, kw_only=True)
class Keeping:
    """The data that a server keeps, and for how long."""

    audit: AuditSettings | None
    kv_s: float | None  # None: the default of `KvDir`
    store_s: float


def take_keeping(options: dict[str, Any], *, kv_dir: Path | None, store: bool) -> Keeping:
    """Take the options of this module out of those of a command, and check them.

    Raises:
        UsageError: one of them is invalid or needs another.
    """
    from argosy.serve.answer.kept_items import KEPT_S

    names = ("audit", "audit_key_file", "audit_full", "audit_keep", "audit_content", "audit_content_keep")
    given = {name: options.pop(name) for name in names}
    kv_keep, store_keep = options.pop("kv_keep"), options.pop("store_keep")
    for name in names[1:]:
        if given[name] and given["audit"] is None:
            raise UsageError(f"--{name.replace('_', '-')} needs --audit DIR")
    if given["audit_content_keep"] and not given["audit_content"]:
        raise UsageError("--audit-content-keep needs --audit-content")
    if kv_keep and kv_dir is None:
        raise UsageError("--kv-keep needs --kv-dir DIR")
    if store_keep and not store:
        raise UsageError("--store-keep and --no-store exclude each other")
    return Keeping(
        audit=None if given["audit"] is None else _audit(given),
        kv_s=None if kv_keep is None else parse_seconds(kv_keep),
        store_s=KEPT_S if store_keep is None else parse_seconds(store_keep),
    )


def _audit(given: dict[str, Any]) -> AuditSettings:
    from argosy.guard.audit import AuditSettings

    chosen: dict[str, Any] = {"when_full": given["audit_full"]} if given["audit_full"] else {}
    if (keep := given["audit_keep"]) is not None:
        chosen["keep_s"] = None if keep == _NEVER else parse_seconds(keep)
    if given["audit_content_keep"] is not None:
        chosen["content_keep_s"] = parse_seconds(given["audit_content_keep"])
    return AuditSettings(
        directory=given["audit"], key_file=given["audit_key_file"], with_content=given["audit_content"], **chosen
    )  # fmt: skip
