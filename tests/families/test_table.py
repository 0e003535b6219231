"""The table of families in the docs says what the registries and the tests say."""

from __future__ import annotations

from argosy.model.families import FAMILIES
from tests.families.table import CHATS, PAGE, page
from tests.prompt.families import EVERY_FAMILY


def test_the_table_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "run `make families`"


def test_every_family_has_a_row_and_every_chat_a_family() -> None:
    rows = page()
    assert all(f"`{name}`" in rows for name in FAMILIES)
    assert CHATS.keys() <= FAMILIES.keys()
    assert {chat for chats in CHATS.values() for chat in chats} <= EVERY_FAMILY.keys()
