"""The table of everything that is kept agrees with the guide, with the defaults in the code, and with the options."""

from __future__ import annotations

import re
from pathlib import Path

import click

from argosy.cli.commands.data import _ERASED
from argosy.cli.main import cli
from argosy.config import KvDir
from argosy.guard.audit import DAY_S, AuditSettings
from argosy.guard.stores import STORES
from argosy.serve.answer.kept_items import KEPT_S

REPOSITORY = Path(__file__).parents[2]
STORE = {store.name: store for store in STORES}


def test_the_guide_has_the_rows_of_the_table() -> None:
    text = (REPOSITORY / "docs" / "guides" / "privacy.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| ") and not line.startswith("| data ")
    ]
    expected = [
        [
            store.name,
            store.place,
            store.kept_for,
            store.option,
            "yes" if store.by_default else "no",
            _ERASED[store.erased],
        ]
        for store in STORES
    ]
    assert rows == expected


def test_the_times_of_the_table_are_the_defaults_of_the_code() -> None:
    settings = AuditSettings(directory=Path("audit"))
    assert settings.keep_s is not None
    kept_s = {
        "prefix files": KvDir(path=Path("kv")).ttl_s,
        "audit": settings.keep_s,
        "audit contents": settings.content_keep_s,
    }
    assert {name: STORE[name].kept_for for name in kept_s} == {
        name: f"{seconds / DAY_S:g} days" for name, seconds in kept_s.items()
    }
    assert STORE["stored responses"].kept_for == f"{KEPT_S / 3600:g} hours after the last use"


def test_the_options_and_modules_of_the_table_exist() -> None:
    context = click.Context(cli, **cli.context_settings)
    known: set[str] = set()
    for name in ("serve", "chat", "run"):
        command = cli.get_command(context, name)
        assert command is not None
        known |= {option for parameter in command.params for option in parameter.opts}
    for store in STORES:
        options = re.findall(r"--[a-z-]+", f"{store.option} {store.place}")
        assert set(options) <= known, store.name
        assert (REPOSITORY / "src" / "argosy" / store.module).exists(), store.module


def test_every_module_that_keeps_something_by_tenant_is_in_the_table() -> None:
    source = REPOSITORY / "src" / "argosy"
    found = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*.py")
        if re.search(r"(?<!class )\bTenantMemory(?:\[[^=]*\])?\(", path.read_text())
    }
    assert (
        {"engine/media/ears.py", "engine/media/prompt_media.py"}
        <= found
        <= {store.module for store in STORES}
    )


def test_nothing_that_reads_texts_of_people_caches_its_arguments() -> None:
    for room in ("guard", "serve"):
        for path in (REPOSITORY / "src" / "argosy" / room).rglob("*.py"):
            assert "lru_cache" not in path.read_text(), path
