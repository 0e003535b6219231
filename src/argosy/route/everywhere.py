"""Ask all servers: to act on a request that concerns each of them, or to add up what they have counted.

    a stop, a budget, an erasure, a model to load  ->  ask_everywhere  ->  one answer about all, or an error that says
                                                                           which server has not done it
    a key with tokens per day                      ->  used_everywhere ->  the tokens that all servers have counted

A server that is down counts as one that has not done it, because it may come back in its old state.

Elsewhere: `app.py` handles requests that one server answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse, Response

from argosy.errors import ArgosyError
from argosy.route.asked import Asked
from argosy.route.servers import Fleet, Server
from argosy.route.upstream import RawHeaders, Reply, ServerGone
from argosy.serve.http.gate import TOKENS_LEFT
from argosy.strict_json import JsonError, parse_json

_LONGEST_S = 600.0  # loading a model takes minutes
_MOST_ANSWER_BYTES = 1 << 20
_USE_S = 2.0
_USE_PATH = "/api/ps"  # any cheap path that requires a key; every answer carries the use in its headers
_MOST_WORDS = 200

Hold = Callable[[int], None]
Answer = dict[str, Any]
Together = Callable[[Sequence[Answer]], Answer]


class NotEverywhere(ArgosyError):
    """Only some servers have done what all were asked to do."""

    http_status = 503


def _first(answers: Sequence[Answer]) -> Answer:
    return answers[0]


def _joined(answers: Sequence[Answer]) -> Answer:
    """Merge several answers: numbers are added, lists joined, and a flag is true if it is true in all."""
    return {name: _joined_value([answer.get(name) for answer in answers]) for name in answers[0]}


def _joined_value(values: Sequence[Any]) -> Any:
    told = [value for value in values if value is not None]
    if told and all(isinstance(value, bool) for value in told):
        return all(told)
    if told and all(isinstance(value, int) for value in told):
        return sum(told)
    if told and all(isinstance(value, list) for value in told):
        return list(dict.fromkeys(entry for value in told for entry in value))
    return values[0]


# Routes that all servers answer, and how to merge their answers. An admin route missing here is refused.
EVERYWHERE: Mapping[str, Together] = {
    "/v1/engine/data/{key}": _joined,
    "/v1/engine/stops": _joined,
    "/v1/engine/memory": _first,
    "/v1/load_lora_adapter": _first,
    "/v1/unload_lora_adapter": _first,
}


@dataclass(frozen=True, slots=True)
class _Told:
    """What a server replied: an answer, or why there is none."""

    server: Server
    fault: str = ""
    status: int = 0
    body: bytes = b""

    @property
    def why(self) -> str:
        """Why the server has not done what was asked."""
        if self.fault:
            return self.fault
        try:
            answer: Any = parse_json(self.body)
            error = answer["error"]
            said = error if isinstance(error, str) else error["message"]
        except (JsonError, KeyError, TypeError):
            said = ""
        return f"it answers {self.status}: {str(said)[:_MOST_WORDS]}"


async def ask_everywhere(fleet: Fleet, asked: Asked, together: Together | None, hold: Hold) -> Response:
    """Send a request to every server, and wait for all of them.

    Args:
        together: merges the answers; None: the request loads or unloads a model.
        hold: takes memory for answers.

    Returns:
        The merged answer, with each server's own in `servers`; or the refusal, if all of them refuse.

    Raises:
        NotEverywhere: some servers have not done it.
    """
    told = await asyncio.gather(*(_ask(server, asked, hold) for server in fleet.servers))
    if {one.status for one in told} == {200}:
        answers = [(one, _parsed(one.body)) for one in told]
        found = [answer for _, answer in answers if answer is not None]
        if len(found) == len(told):
            if together is None:  # `load` says that a model is still in memory
                kept = [answer for answer in found if answer.get("done_reason") == "load"]
                return JSONResponse((kept or found)[0])
            servers = [{"server": str(one.server.address), **answer} for one, answer in answers if answer]
            return JSONResponse({**together(found), "servers": servers})
    statuses = {one.status for one in told}
    if len(statuses) == 1 and told[0].status not in (0, 200):
        return Response(told[0].body, told[0].status, media_type="application/json")
    missing = [one for one in told if one.status != 200 or _parsed(one.body) is None]
    names = [
        f"server {one.server.number + 1}" if together is None else str(one.server.address) for one in missing
    ]
    listed = "; ".join(f"{name}: {one.why}" for name, one in zip(names, missing, strict=True))
    raise NotEverywhere(
        f"{len(told) - len(missing)} of {len(told)} servers have done it. Not {listed}",
        hint="send it again when they are up; servers that have done it are unaffected",
    )


def _parsed(body: bytes) -> Answer | None:
    try:
        answer = parse_json(body)
    except JsonError:
        return None
    return answer if isinstance(answer, dict) else None


async def _ask(server: Server, asked: Asked, hold: Hold) -> _Told:
    if server.state == "down":
        return _Told(server, "it is down")
    try:
        async with asyncio.timeout(_LONGEST_S):
            reply = await Reply.connect(server.address)
            server.replies.add(reply)  # closed if the server goes down
            try:
                await reply.ask(asked.method, asked.path, asked.headers, asked.body)
                body = bytearray()
                async for part in reply.parts():
                    hold(2 * len(part))
                    body += part
                    if len(body) > _MOST_ANSWER_BYTES:
                        return _Told(server, "its answer is too long")
            finally:
                server.replies.discard(reply)
                reply.close()
    except ServerGone as error:
        return _Told(server, error.message)
    except TimeoutError:
        return _Told(server, f"it has not answered within {_LONGEST_S:.0f} s")
    return _Told(server, status=reply.status, body=bytes(body))


async def used_everywhere(fleet: Fleet, key_id: str, secret: RawHeaders) -> tuple[int, int] | None:
    """The tokens of a key that all servers have counted, and the seconds until the first of them expire.

    A server that does not answer counts with its last report. None if no server has ever reported.

    Args:
        secret: the headers in which the client presents its key.
    """
    await asyncio.gather(
        *(_learn_use(server, key_id, secret) for server in fleet.servers if server.state != "down")
    )
    now = asyncio.get_running_loop().time()
    uses = [server.used[key_id] for server in fleet.servers if key_id in server.used]
    if not uses:
        return None
    left = [(num_tokens, until - now) for num_tokens, until in uses if until > now and num_tokens]
    return sum(num_tokens for num_tokens, _ in left), int(min((left_s for _, left_s in left), default=0.0))


async def _learn_use(server: Server, key_id: str, secret: RawHeaders) -> None:
    try:
        async with asyncio.timeout(_USE_S):
            reply = await Reply.connect(server.address)
            try:
                await reply.ask("GET", _USE_PATH, secret)
            finally:
                reply.close()
        limit, left, reset = map(reply.header, TOKENS_LEFT)
        used, left_s = int(limit) - int(left), int(reset.removesuffix(b"s"))
    except (ServerGone, TimeoutError, ValueError):
        return
    server.used[key_id] = used, asyncio.get_running_loop().time() + left_s
