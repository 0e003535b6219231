"""Items of earlier responses, for clients that name them instead of sending them again.

    response  ->  keep  ->  memory, by tenant        item_reference, previous_response_id  ->  the items again

Only in memory, within a budget: what was kept longest ago and not asked for since is forgotten first. Another tenant
never finds them, a restart or the end of a key forgets them, and a request with `store: false` keeps nothing.

Elsewhere: what an item is, is `openai_responses.py`; the budget is part of that for replay (`run.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from argosy.prompt.replay import TenantMemory
from argosy.serve.fields import MAX_ITEMS
from argosy.serve.gate import Refused

_ENTRY_BYTES = 512  # what Python itself needs for one
_REMEDY = (
    "send the items themselves, as with `store: false`; they are kept in memory only, while there is room"
)

Item = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Kept:
    """An item that was answered, or a response: the items that it was asked with and the names of the others.

    Attributes:
        text: JSON of the item, or of the list of items.
        previous_id: the response that this one goes on from.
        answered_ids: its own items.
    """

    text: bytes
    previous_id: str | None = None
    answered_ids: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return _ENTRY_BYTES + len(self.text) + 128 * len(self.answered_ids)


class KeptItems:
    """Items and responses by tenant and id; with `max_bytes` 0 nothing is kept."""

    def __init__(self, *, max_bytes: int = 16 << 20) -> None:
        self.can_keep = max_bytes > 0
        self._memory: TenantMemory[_Kept] = TenantMemory(max_turns=65_536, max_bytes=max_bytes)
        self._gone: set[str] = set()

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    def keep(
        self,
        tenant: str,
        response_id: str,
        previous_id: str | None,
        asked: Sequence[Item],
        answered: Sequence[Item],
    ) -> None:
        """Keep what a response was asked with, without what `previous_id` stands for, and what it answered."""
        for item in answered:
            self._memory.put(tenant, _item_key(item["id"]), _Kept(_written(item)))
        answered_ids = tuple(item["id"] for item in answered)
        kept = _Kept(_written(asked), previous_id, answered_ids)
        self._memory.put(tenant, _response_key(response_id), kept)
        if tenant in self._gone:  # since this answer was finished
            self._memory.forget(tenant)

    def item(self, tenant: str, item_id: str) -> Item:
        """The item with that id.

        Raises:
            Refused: it is not kept.
        """
        found = self._memory.get(tenant, _item_key(item_id))
        if found is None:
            raise Refused(404, f"Item with id '{item_id}' not found.", hint=_REMEDY, param="input")
        self._memory.touch(tenant, [_item_key(item_id)])
        return _read_item(found)

    def conversation(self, tenant: str, response_id: str) -> list[Item]:
        """All items up to and with those of the response, the first one first.

        Raises:
            Refused: part of it is not kept.
        """
        turns: list[list[Item]] = []
        used: list[bytes] = []
        own_id: str | None = response_id
        while own_id is not None:
            keys = [_response_key(own_id)]
            found = self._memory.get(tenant, keys[0])
            if found is not None:
                keys += map(_item_key, found.answered_ids)
            answered = [self._memory.get(tenant, key) for key in keys[1:]]
            if found is None or None in answered or len(turns) == MAX_ITEMS:
                raise Refused(
                    400, f"Previous response with id '{response_id}' not found.", hint=_REMEDY,
                    param="previous_response_id", code="previous_response_not_found",
                )  # fmt: skip
            turns.append(
                [*json.loads(found.text), *(_read_item(item) for item in answered if item is not None)]
            )
            used += keys
            own_id = found.previous_id
        # All of a conversation is of use only together, so what everything rests on is forgotten last.
        self._memory.touch(tenant, used)
        return [item for turn in reversed(turns) for item in turn]

    def forget(self, tenant: str) -> None:
        """Everything of a tenant, which is gone for good."""
        self._gone.add(tenant)
        self._memory.forget(tenant)


def _item_key(item_id: str) -> bytes:
    return b"item " + item_id.encode()


def _response_key(response_id: str) -> bytes:
    return b"response " + response_id.encode()


def _read_item(kept: _Kept) -> Item:
    item: Item = json.loads(kept.text)
    return item


def _written(value: Item | Sequence[Item]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
