"""The table of families in the docs says what the registries and the tests say."""

from __future__ import annotations

from argosy.model.families import FAMILIES
from tests.families.table import PAGE, page
from tests.models.rows import rows
from tests.prompt.families import EVERY_FAMILY


def test_the_table_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "run `make families`"


def test_every_family_has_a_row_and_every_chat_a_family() -> None:
    table = page()
    assert all(f"`{name}`" in table for name in FAMILIES)
    assert {chat for row in rows().values() for chat in row.chats} <= EVERY_FAMILY.keys()
