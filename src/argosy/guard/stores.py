"""Everything that Argosy keeps about the people who use it, in one table: where, how long, and what removes it.

`argosy data list` prints the table, `argosy data erase` and the server's erasure follow it, and the privacy guide
repeats it; a test compares the two.

Elsewhere: each store removes expired data itself, in the module that `module` names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Erased = Literal["key", "revoke", "hand", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """One kind of stored data.

    Attributes:
        keeps: the data in it.
        place: `memory` of a process, or the file, files or directory.
        kept_for: the longest it is kept.
        option: sets that time or switches the store off; empty if there is none.
        by_default: whether it is kept without any option.
        erased: by `argosy data erase --key` ("key"), only when the key is revoked ("revoke"), by the user ("hand"),
            or not at all, because nothing in it belongs to anyone ("none").
        module: the module that keeps it.
    """

    name: str
    keeps: str
    place: str
    kept_for: str
    option: str
    by_default: bool
    erased: Erased
    module: str


STORES = (
    Store(
        name="request bodies",
        keeps="prompts, pictures, sounds and videos that clients send",
        place="memory",
        kept_for="until the request ends",
        option="",
        by_default=True,
        erased="key",
        module="serve/http/held.py",
    ),
    Store(
        name="prefixes in memory",
        keeps="keys and values of prompts and answers",
        place="memory",
        kept_for="until others need the room",
        option="",
        by_default=True,
        erased="key",
        module="engine/prefix.py",
    ),
    Store(
        name="prefix files",
        keeps="keys and values of prompts and answers, not encrypted",
        place="--kv-dir",
        kept_for="7 days",
        option="--kv-keep",
        by_default=False,
        erased="key",
        module="kept/prefix_files.py",
    ),
    Store(
        name="replay",
        keeps="tokens of answers, until their conversation goes on",
        place="memory",
        kept_for="until others need the room",
        option="",
        by_default=True,
        erased="key",
        module="prompt/replay.py",
    ),
    Store(
        name="encoded media",
        keeps="what a model computed of pictures, sounds and videos, for prompts that repeat them",
        place="memory",
        kept_for="until others need the room",
        option="",
        by_default=True,
        erased="key",
        module="engine/media/prompt_media.py",
    ),
    Store(
        name="transcripts",
        keeps="texts of sounds, for prompts that repeat them",
        place="memory",
        kept_for="until others need the room",
        option="--ears",
        by_default=False,
        erased="key",
        module="engine/media/ears.py",
    ),
    Store(
        name="grammars",
        keeps="schemas, choices and grammars of required forms and tools, compiled",
        place="memory",
        kept_for="until others need the room",
        option="",
        by_default=True,
        erased="key",
        module="engine/grammar/constraint.py",
    ),
    Store(
        name="stored responses",
        keeps="items of the Responses API, with their media",
        place="memory",
        kept_for="24 hours after the last use",
        option="--store-keep, --no-store",
        by_default=True,
        erased="key",
        module="serve/answer/kept_items.py",
    ),
    Store(
        name="marks of a router",
        keeps="keyed digests of beginnings of prompts, and which server has seen them; no text",
        place="memory",
        kept_for="until 65,536 others are newer",
        option="",
        by_default=True,
        erased="none",
        module="route/prefixes.py",
    ),
    Store(
        name="checked texts",
        keeps="keyed digests of conversations that a check let pass; no text",
        place="memory",
        kept_for="until 8,192 others are newer",
        option="--policy",
        by_default=False,
        erased="none",
        module="serve/guards/checks.py",
    ),
    Store(
        name="limits of users",
        keeps="keyed digests of the users that clients name, and how much each may still ask",
        place="memory",
        kept_for="until 65,536 others are newer",
        option="--policy",
        by_default=False,
        erased="none",
        module="guard/users.py",
    ),
    Store(
        name="stops",
        keeps="names of the models, keys and users that the operator has stopped",
        place="beside --policy, .stops",
        kept_for="until they go on",
        option="--policy",
        by_default=False,
        erased="hand",
        module="guard/stops.py",
    ),
    Store(
        name="audit",
        keeps="envelopes of requests: key id, route, model, counts; nothing that anyone said",
        place="--audit",
        kept_for="365 days",
        option="--audit-keep",
        by_default=False,
        erased="hand",
        module="guard/audit.py",
    ),
    Store(
        name="audit contents",
        keeps="what requests said and were answered, encrypted under a key of the tenant",
        place="--audit, in content/",
        kept_for="30 days",
        option="--audit-content-keep",
        by_default=False,
        erased="key",
        module="guard/sealed.py",
    ),
    Store(
        name="usage of keys",
        keeps="requests and tokens counted against limits",
        place="beside --keys, .use",
        kept_for="until the key is revoked",
        option="",
        by_default=True,
        erased="revoke",
        module="guard/limits.py",
    ),
    Store(
        name="keys",
        keeps="names, ids and SHA-256 of API keys",
        place="--keys",
        kept_for="until the key is revoked",
        option="",
        by_default=True,
        erased="revoke",
        module="guard/keys.py",
    ),
    Store(
        name="metrics",
        keeps="counts by route, model and key id",
        place="memory",
        kept_for="until the server ends",
        option="",
        by_default=True,
        erased="none",
        module="serve/admin/answer_metrics.py",
    ),
    Store(
        name="log",
        keeps="a line for each request: route, status, counts; key id and model in JSON",
        place="stderr",
        kept_for="as long as its reader keeps it",
        option="--log-format",
        by_default=True,
        erased="hand",
        module="serve/http/log.py",
    ),
    Store(
        name="routing counts",
        keeps="how many distinct experts a number of tokens needs; no expert, no time",
        place="~/.local/share/argosy/routing",
        kept_for="until removed",
        option="--no-record",
        by_default=True,
        erased="none",
        module="observe/saved.py",
    ),
    Store(
        name="measured rates",
        keeps="speeds of this machine",
        place="~/.cache/argosy/rates-*.json",
        kept_for="until removed",
        option="",
        by_default=False,
        erased="none",
        module="machine/kept_rates.py",
    ),
    Store(
        name="rates of the drive",
        keeps="how fast it was read while models ran",
        place="~/.cache/argosy/drive-*.json",
        kept_for="30 days",
        option="--no-record",
        by_default=True,
        erased="none",
        module="machine/kept_rates.py",
    ),
    Store(
        name="chat history",
        keeps="lines typed in `argosy chat`, at most 1000",
        place="~/.local/share/argosy/chat-history",
        kept_for="until removed",
        option="--history",
        by_default=False,
        erased="hand",
        module="cli/commands/chat_files.py",
    ),
    Store(
        name="conversations of the page",
        keeps="messages and answers",
        place="the user's browser",
        kept_for="until the user removes them",
        option="a switch of the page",
        by_default=True,
        erased="hand",
        module="serve/page/",
    ),
)  # fmt: skip
