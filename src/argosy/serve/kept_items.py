"""Items of earlier responses, for clients that refer to them instead of sending them again.

    response  ->  keep  ->  memory, by tenant        item_reference, previous_response_id  ->  the items again

Items are kept only in memory, within a budget; the least recently used are dropped first. Another tenant never finds
them, a restart or the revocation of the key drops them, and a request with `store: false` keeps nothing.

Elsewhere: items are `openai_responses.py`; their budget is part of the replay memory (`run.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from argosy.prompt.replay import TenantMemory
from argosy.serve.fields import MAX_ITEMS
from argosy.serve.gate import Refused

_ENTRY_BYTES = 512  # Python's own overhead
_REMEDY = (
    "send the items themselves, as with `store: false`; the server keeps them only while memory has room"
)

Item = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Kept:
    """An output item, or a response: its input items and the ids of its output items.

    Attributes:
        text: JSON of the output item, or of the list of input items.
        previous_id: the response that this one continues.
        answered_ids: ids of the response's output items.
        has_video: its input items have a video.
    """

    text: bytes
    previous_id: str | None = None
    answered_ids: tuple[str, ...] = ()
    has_video: bool = False

    @property
    def nbytes(self) -> int:
        return _ENTRY_BYTES + len(self.text) + 128 * len(self.answered_ids)


class KeptItems:
    """Items and responses by tenant and id; a `max_bytes` of 0 keeps nothing."""

    def __init__(self, *, max_bytes: int = 16 << 20) -> None:
        self.can_keep = max_bytes > 0
        self.max_bytes = max_bytes
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
        asked: Sequence[Item] | None,
        answered: Sequence[Item],
        *,
        has_video: bool = False,
    ) -> None:
        """Keep the input items of a response, without those of `previous_id`, and its output items.

        Input items that are larger than all of the memory are not kept: writing them would take three times their size.
        Without input items (`asked` is None) only the output items can be found.
        """
        for item in answered:
            self._memory.put(tenant, _item_key(item["id"]), _Kept(_written(item)))
        if asked is None or _num_characters(asked) > self.max_bytes:
            return
        answered_ids = tuple(item["id"] for item in answered)
        kept = _Kept(_written(asked), previous_id, answered_ids, has_video)
        self._memory.put(tenant, _response_key(response_id), kept)
        if tenant in self._gone:  # revoked after this answer was finished
            self._memory.forget(tenant)

    def item(self, tenant: str, item_id: str) -> Item:
        """The item with this id.

        Raises:
            Refused: the item is not kept.
        """
        found = self._memory.get(tenant, _item_key(item_id))
        if found is None:
            raise Refused(404, f"Item with id '{item_id}' not found.", hint=_REMEDY, param="input")
        self._memory.touch(tenant, [_item_key(item_id)])
        return _read_item(found)

    def conversation(self, tenant: str, response_id: str) -> list[Item]:
        """All items up to and including those of the response, oldest first.

        Raises:
            Refused: part of the conversation is not kept.
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
        # A conversation is useful only as a whole, so the items that all others depend on are dropped last.
        self._memory.touch(tenant, used)
        return [item for turn in reversed(turns) for item in turn]

    def has_video(self, tenant: str, response_id: str) -> bool:
        """Whether the conversation up to a response has a video, as far as it is kept."""
        own_id: str | None = response_id
        for _ in range(MAX_ITEMS):
            if own_id is None or (found := self._memory.get(tenant, _response_key(own_id))) is None:
                return False
            if found.has_video:
                return True
            own_id = found.previous_id
        return False

    def forget(self, tenant: str) -> None:
        """Drop all items of a revoked tenant."""
        self._gone.add(tenant)
        self._memory.forget(tenant)


def _item_key(item_id: str) -> bytes:
    return b"item " + item_id.encode()


def _response_key(response_id: str) -> bytes:
    return b"response " + response_id.encode()


def _read_item(kept: _Kept) -> Item:
    item: Item = json.loads(kept.text)
    return item


def _num_characters(value: object) -> int:
    """Characters in the strings of a value."""
    if isinstance(value, str):
        return len(value)
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, Sequence) else ()
    return sum(map(_num_characters, inside))


def _written(value: Item | Sequence[Item]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
