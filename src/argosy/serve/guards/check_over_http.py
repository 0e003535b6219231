"""Ask another server whether a text is allowed, through OpenAI's moderation endpoint.

    {"input": text}  ─ POST, to the configured address only ─>  {"results": [{"flagged", "category_scores"}]}

Any server with such an endpoint can answer, including another Argosy. Redirects are not followed, proxies from the
environment not used, and the answer is bounded in size and time. Any fault is a failed check, and the policy
decides what that means.

Elsewhere: `checks.py` calls this; the settings are `guard/policy.py`.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
import time
from urllib.parse import urlsplit

from argosy.guard.policy import HttpCheck
from argosy.guard.verdict import CheckFailed, Verdict
from argosy.serve.http.timed_connection import TimedConnection
from argosy.strict_json import JsonError, parse_json

_MOST_ANSWER_BYTES = 64 << 10
_MOST_CATEGORIES = 64


def judge(check: HttpCheck, text: str) -> Verdict:
    """Ask about a text; blocks the thread until the answer comes.

    Raises:
        CheckFailed: there is no answer in time, or it is malformed.
    """
    try:
        return _verdict(_asked(check, text))
    except TimeoutError:
        raise CheckFailed(f"there was no answer within {check.timeout_s:g} s") from None
    except ssl.SSLError:
        raise CheckFailed("the server's certificate or its TLS is not accepted") from None
    except (OSError, http.client.HTTPException):
        raise CheckFailed("the connection failed") from None


def _asked(check: HttpCheck, text: str) -> bytes:
    url = urlsplit(check.url)
    assert url.hostname is not None
    deadline = time.monotonic() + check.timeout_s
    port = url.port or (443 if url.scheme == "https" else 80)
    connected: socket.socket = socket.create_connection((url.hostname, port), timeout=check.timeout_s)
    try:
        connected.settimeout(max(0.01, deadline - time.monotonic()))
        if url.scheme == "https":
            connected = ssl.create_default_context().wrap_socket(connected, server_hostname=url.hostname)
        connection = http.client.HTTPConnection(url.hostname, port)
        connection.sock = TimedConnection(connected, deadline)
        connection.auto_open = 0
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", "Connection": "close"}
        if check.key_env is not None:
            headers["Authorization"] = f"Bearer {os.environ[check.key_env]}"
        body = json.dumps({"input": text}).encode("utf-8", "replace")
        connection.request("POST", url.path or "/", body, headers)
        with connection.getresponse() as response:
            if response.status != 200:
                raise CheckFailed(f"it answered with status {response.status}")
            data = response.read(_MOST_ANSWER_BYTES + 1)
            if len(data) > _MOST_ANSWER_BYTES:
                raise CheckFailed(f"its answer has more than {_MOST_ANSWER_BYTES} bytes")
            return data
    finally:
        connected.close()


def _verdict(data: bytes) -> Verdict:
    try:
        given = parse_json(data)
    except JsonError:
        raise CheckFailed("its answer is not JSON") from None
    results = given.get("results") if isinstance(given, dict) else None
    if not isinstance(results, list) or len(results) != 1 or not isinstance(results[0], dict):
        raise CheckFailed("its answer has no `results` with one item")
    flagged, scores = results[0].get("flagged"), results[0].get("category_scores", {})
    if not isinstance(flagged, bool):
        raise CheckFailed("its answer does not say whether the text is `flagged`")
    if not isinstance(scores, dict) or len(scores) > _MOST_CATEGORIES:
        raise CheckFailed(f"its `category_scores` are not an object of at most {_MOST_CATEGORIES} numbers")
    known = {
        name: min(1.0, max(0.0, float(score)))
        for name, score in scores.items()
        if len(name) <= 64 and isinstance(score, int | float) and not isinstance(score, bool)
    }
    return Verdict(flagged, known)
