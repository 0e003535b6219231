"""Earlier responses and their items, for clients that refer to them instead of sending them again, or fetch them.

    response  ->  keep  ->  memory, by tenant    item_reference, previous_response_id  ->  the items again
                                                 GET /v1/responses/{id}                ->  the response again

Everything is kept only in memory, within a budget. The least recently used is dropped first, and whatever has not
been used for `kept_s` is dropped anyway: the server calls `drop_expired` every second (`serve/http/server.py`).
Other tenants never find it, a restart or the revocation of the key drops it, and a request with `store: false`
keeps nothing.

Elsewhere: input items are `serve/dialects/openai_responses_bodies.py`, output items
`serve/dialects/openai_responses.py`; their budget is part of the replay memory (`run.py`).
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from argosy.prompt.replay import TenantMemory
from argosy.serve.answer.fields import MAX_ITEMS
from argosy.serve.http.failures import Refused

KEPT_S = 86_400.0
_MOST_DROPPED = 1024  # per sweep, because the event loop waits for it
_ENTRY_BYTES = 512  # Python's own overhead
_REMEDY = (
    "send the items themselves, as with `store: false`; the server keeps those of other requests for {hours:g} hours, "
    "and only while memory has room"
)
_KEEPS_NOTHING = (
    "send the items themselves; this server keeps nothing, because it was started with `--no-store`"
)

Item = Mapping[str, Any]
Charge = Callable[[bytes], object]  # takes memory for parsing a JSON text and for the parsed values


def _uncharged(text: bytes) -> None:
    pass


@dataclass(slots=True, kw_only=True)
class _Kept:
    """An output item, or a response: its input items and the ids of its output items.

    Attributes:
        text: JSON of the output item, or of the list of input items.
        used_at: when it was stored or last used, by the clock of `KeptItems`.
        answer: JSON of the response without its output items.
        previous_id: the response that this one continues.
        answered_ids: ids of the response's output items.
        has_video: its input items contain a video.
    """

    text: bytes
    used_at: float
    answer: bytes = b""
    previous_id: str | None = None
    answered_ids: tuple[str, ...] = ()
    has_video: bool = False

    @property
    def nbytes(self) -> int:
        return _ENTRY_BYTES + len(self.text) + len(self.answer) + 128 * len(self.answered_ids)


class KeptItems:
    """Items and responses by tenant and id; a `max_bytes` of 0 keeps nothing.

    Args:
        kept_s: how long to keep them after their last use.
        clock: seconds.
    """

    def __init__(
        self,
        *,
        max_bytes: int = 16 << 20,
        kept_s: float = KEPT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._kept_s = kept_s
        self.can_keep = max_bytes > 0
        self.max_bytes = max_bytes
        self._clock = clock
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
        answer: Item | None = None,
        has_video: bool = False,
    ) -> None:
        """Keep the input items of a response, without those of `previous_id`, and its output items.

        Input items larger than the whole budget are not kept, because writing them would take three times their
        size. Without input items (`asked` is None) only the output items can be found.

        Args:
            answer: the whole response; None: it cannot be fetched again.
        """
        now = self._clock()
        for item in answered:
            self._memory.put(tenant, _item_key(item["id"]), _Kept(text=_written(item), used_at=now))
        if asked is None or _num_characters(asked) > self.max_bytes:
            return
        kept = _Kept(
            text=_written([_with_id(item) for item in asked]),
            used_at=now,
            answer=b"" if answer is None else _written({**answer, "output": []}),
            previous_id=previous_id,
            answered_ids=tuple(item["id"] for item in answered),
            has_video=has_video,
        )
        self._memory.put(tenant, _response_key(response_id), kept)
        if tenant in self._gone:  # revoked after this answer was finished
            self._memory.forget(tenant)

    def item(self, tenant: str, item_id: str, *, charge: Charge = _uncharged) -> Item:
        """The item with this id; its JSON is passed to `charge` before it is parsed.

        Raises:
            Refused: the item is not kept.
        """
        found = self._get(tenant, _item_key(item_id))
        if found is None:
            raise Refused(404, f"Item with id '{item_id}' not found.", hint=self._remedy, param="input")
        self._touch(tenant, [_item_key(item_id)])
        charge(found.text)
        return _read_item(found)

    def response(self, tenant: str, response_id: str) -> Item:
        """The whole response with this id.

        Raises:
            Refused: it is not kept, or only in part.
        """
        found = self._response(tenant, response_id)
        keys = [*map(_item_key, found.answered_ids), _response_key(response_id)]
        items = [self._get(tenant, key) for key in keys[:-1]]
        if not found.answer or None in items:
            raise self._without(response_id)
        self._touch(tenant, keys)
        answer: Item = json.loads(found.answer)
        return {**answer, "output": [_read_item(item) for item in items if item is not None]}

    def asked(self, tenant: str, response_id: str) -> list[Item]:
        """The input items of a response, oldest first, without those of the response that it continues.

        Raises:
            Refused: it is not kept.
        """
        items: list[Item] = json.loads(self._response(tenant, response_id).text)
        return items

    def delete(self, tenant: str, response_id: str) -> None:
        """Drop a response with its input and output items.

        Raises:
            Refused: it is not kept.
        """
        found = self._response(tenant, response_id)
        self._memory.remove(tenant, [_response_key(response_id), *map(_item_key, found.answered_ids)])

    def conversation(self, tenant: str, response_id: str, *, charge: Charge = _uncharged) -> list[Item]:
        """All items up to and including those of the response, oldest first. Calls `charge` as `item` does.

        Raises:
            Refused: part of the conversation is not kept.
        """
        turns: list[list[Item]] = []
        used: list[bytes] = []
        own_id: str | None = response_id
        while own_id is not None:
            keys = [_response_key(own_id)]
            found = self._get(tenant, keys[0])
            if found is not None:
                keys += map(_item_key, found.answered_ids)
            answered = [self._get(tenant, key) for key in keys[1:]]
            if found is None or None in answered or len(turns) == MAX_ITEMS:
                raise Refused(
                    400, f"Previous response with id '{response_id}' not found.", hint=self._remedy,
                    param="previous_response_id", code="previous_response_not_found",
                )  # fmt: skip
            kept = [found, *(item for item in answered if item is not None)]
            for one in kept:
                charge(one.text)
            turns.append([*json.loads(found.text), *map(_read_item, kept[1:])])
            used += keys
            own_id = found.previous_id
        # A conversation is useful only as a whole, so the items on which all others depend are dropped last.
        self._touch(tenant, used)
        return [item for turn in reversed(turns) for item in turn]

    def has_video(self, tenant: str, response_id: str) -> bool:
        """Whether the kept part of the conversation up to a response contains a video."""
        own_id: str | None = response_id
        for _ in range(MAX_ITEMS):
            if own_id is None or (found := self._get(tenant, _response_key(own_id))) is None:
                return False
            if found.has_video:
                return True
            own_id = found.previous_id
        return False

    def drop_expired(self) -> None:
        """Free some of the expired items, which no request can find any more."""
        self._memory.remove_oldest(self._is_old, most=_MOST_DROPPED)

    def erase(self, tenant: str) -> int:
        """Drop everything of a tenant, which may store more later; return the number of responses and items."""
        return self._memory.forget(tenant)

    def forget(self, tenant: str) -> None:
        """Drop everything of a revoked tenant."""
        self._gone.add(tenant)
        self._memory.forget(tenant)

    @property
    def _remedy(self) -> str:
        return _REMEDY.format(hours=self._kept_s / 3600) if self.can_keep else _KEEPS_NOTHING

    def _response(self, tenant: str, response_id: str) -> _Kept:
        found = self._get(tenant, _response_key(response_id))
        if found is None:
            raise self._without(response_id)
        return found

    def _without(self, response_id: str) -> Refused:
        return Refused(404, f"Response with id '{response_id}' not found.", hint=self._remedy)

    def _get(self, tenant: str, key: bytes) -> _Kept | None:
        found = self._memory.get(tenant, key)
        return None if found is None or self._is_old(found) else found

    def _touch(self, tenant: str, keys: Sequence[bytes]) -> None:
        now = self._clock()
        for key in keys:
            if (found := self._memory.get(tenant, key)) is not None:
                found.used_at = now
        self._memory.touch(tenant, keys)

    def _is_old(self, kept: _Kept) -> bool:
        return self._clock() - kept.used_at > self._kept_s


def _item_key(item_id: str) -> bytes:
    return b"item " + item_id.encode()


def _response_key(response_id: str) -> bytes:
    return b"response " + response_id.encode()


def _with_id(item: Item) -> Item:
    """An input item with an id, from which a listing can continue."""
    return item if item.get("id") else {**item, "id": "in_" + secrets.token_hex(12)}


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
