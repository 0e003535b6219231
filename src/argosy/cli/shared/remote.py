"""Talk to a running Argosy server over HTTP: its models, its state twice a second, answers.

    --url, --key-file, ARGOSY_API_KEY  ->  RemoteServer  ->  plain dicts, or one ServerNotUsable

Without --url it is the server that `argosy up` runs for this user, by its socket file, or else the port of `argosy
serve`. Requests carry the key, so they go only to the given server: proxies from the environment and redirects are
ignored. Responses are bounded, and `quote` makes their text safe for a terminal.
"""

from __future__ import annotations

import http.client
import json
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote as urlquote
from urllib.parse import urlsplit

import click

from argosy.checkpoint.untrusted_file import quote
from argosy.cli.shared import own_server
from argosy.errors import PromptTooLong, ServerNotUsable, UsageError
from argosy.strict_json import JsonError, parse_json

DEFAULT_URL = "http://127.0.0.1:8080"
TIMEOUT_S = 10.0
_COUNT_S = 600.0  # for counting a conversation's tokens, whose model may have to be loaded again
ANSWER_S = 3600.0  # for the next part of an answer, which is silent while its model is loaded
_REFUSALS = {400, 404, 413, 422}  # statuses of a wrong request
_NO_MODEL = "model_not_found"  # error code; the server had the model when it was chosen
_MOST_LINES = 4  # lines of a server's error
_MOST = 10**18  # an exabyte; a larger number is nonsense
_LONGEST_BYTES = 16_000_000  # 256 layers of 1024 experts with seven digits each are 2 MB

Command = TypeVar("Command", bound=Callable[..., Any])


def server_options(command: Command) -> Command:
    """--url and --key-file."""
    command = click.option(
        "--key-file",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="File with the API key; default: ARGOSY_API_KEY.",
    )(command)
    return click.option(
        "--url", default=default_url, metavar="URL",
        help=f"The server's address; default: that of `argosy up`, or {DEFAULT_URL}.",
    )(command)  # fmt: skip


def whole(value: object) -> int:
    """Return the count that a server sent, or 0 if it is no plausible count."""
    return value if isinstance(value, int) and 0 <= value <= _MOST else 0


def number(value: object) -> float | None:
    """Return the number that a server sent, or None if it is no plausible number."""
    return value if isinstance(value, int | float) and -_MOST <= value <= _MOST else None


def fields(value: object) -> dict[str, Any]:
    """An object from a server; empty if it is anything else."""
    return value if isinstance(value, dict) else {}


def entries(value: object) -> list[dict[str, Any]]:
    """The objects in a list from a server."""
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def default_url() -> str:
    """The socket file of the user's own server if it runs, because nobody else can own it; otherwise DEFAULT_URL."""
    return DEFAULT_URL if own_server.found() is None else own_server.socket_url()


class _FileConnection(http.client.HTTPConnection):
    """A connection to a socket file."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class RemoteCall:
    """A request that another thread or a signal handler can stop.

    Attributes:
        is_stopped: nothing waits for its answer any more.
    """

    def __init__(self) -> None:
        self.is_stopped = False
        self._sock: socket.socket | None = None

    def stop(self) -> None:
        """Close the connection, which stops the server's computation."""
        self.is_stopped = True
        if self._sock is not None:
            with suppress(OSError):  # it has already ended
                self._sock.shutdown(socket.SHUT_RDWR)

    def begin(self, connection: http.client.HTTPConnection) -> None:
        """Connect. Raises OSError."""
        connection.connect()
        self._sock = connection.sock
        if self.is_stopped:
            self.stop()


class RemoteServer:
    """A server, by its address and, if it has one, its base path. The constructor sends no request."""

    def __init__(self, url: str, key: str | None = None, *, timeout_s: float = TIMEOUT_S) -> None:
        """Raises: UsageError: `url` is not the address of a server."""
        from argosy.serve.http.listen import BASE_PATH

        self._timeout_s = timeout_s
        self._key, self._file = key, url.removeprefix("unix:") if url.startswith("unix:") else None
        if self._file is not None:
            self.url, self._base_path = url, ""
            return
        try:
            parts = urlsplit(url)
            self._port = parts.port
            (parts.hostname or "").encode("idna")  # as sockets do: an empty or long label is an error
        except ValueError:
            parts, self._port = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(
                f"--url must be a server's address, found '{quote(url)}'", hint=f"for example {DEFAULT_URL}"
            )
        base_path = parts.path.rstrip("/")
        own_path = re.sub("(/v1)+$", "", base_path)  # addresses for clients of OpenAI's API end with it
        is_path = not base_path or BASE_PATH.fullmatch(base_path) is not None
        has_more = bool(parts.query or parts.fragment) or parts.username is not None
        if own_path != base_path or not is_path or has_more:
            shown = own_path if is_path else ""
            raise UsageError(
                f"--url must be an address, or one with the server's --base-path, found '{quote(url)}'",
                hint=f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{shown}",
            )
        self.url = f"{parts.scheme}://{parts.netloc}{base_path}"
        self._base_path = base_path
        self._host = parts.hostname
        self._is_secure = parts.scheme == "https"

    def models(self) -> list[dict[str, Any]]:
        """Get the entries of /v1/models."""
        answer = self._get_json("/v1/models")
        entries = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(entries, list) or not all(
            isinstance(entry, dict) and isinstance(entry.get("id"), str) for entry in entries
        ):
            raise self._stranger("its list of models cannot be read")
        return entries

    def state(self) -> dict[str, Any]:
        """Get the engine's current state."""
        return self._checked(self._get_json("/v1/engine/state"))

    def is_ready(self) -> bool:
        """Whether it listens and its engines are healthy."""
        try:
            self._read("GET", "/ready")
        except ServerNotUsable:
            return False
        return True

    def unload(self, model: str) -> str:
        """Unload a model; return its name.

        Raises:
            ServerNotUsable: a request uses it, or the server has no such model.
        """
        with self._ask("POST", "/api/generate", {"model": model, "keep_alive": 0}) as response:
            answer = self._parsed(response.read(_LONGEST_BYTES))
        name, done = (
            (answer.get(key) for key in ("model", "done_reason"))
            if isinstance(answer, dict)
            else (None, None)
        )
        if not isinstance(name, str):
            raise self._stranger("it does not say what it unloaded")
        if done != "unload":
            raise ServerNotUsable(
                f"{quote(name)} stays in memory: it answers a request, or it is the server's only model",
                hint="`argosy stop` stops the server",
                url=self.url,
            )
        return quote(name)

    def erase(self, key: str) -> dict[str, Any]:
        """Erase what the server keeps for a key, by name or id; return what was erased."""
        path = f"/v1/engine/data/{urlquote(key, safe='')}"
        answer = self._parsed(self._read("DELETE", path))
        names = {"key", "responses", "answers", "audit_contents"}
        if not isinstance(answer, dict) or not names <= answer.keys():
            raise self._stranger("it does not say what it erased")
        return answer

    def resize(self, size: str) -> dict[str, Any]:
        """Change the server's memory budget; return its uses."""
        with self._ask("POST", "/v1/engine/memory", {"memory": size}) as response:
            answer = self._parsed(response.read(_LONGEST_BYTES))
        lines = answer.get("lines") if isinstance(answer, dict) else None
        if (
            not isinstance(answer, dict)
            or not isinstance(answer.get("budget_bytes"), int)
            or not isinstance(lines, list)
            or not all(_is_line(line) for line in lines)
        ):
            raise self._stranger("its memory cannot be read")
        return answer

    def states(self) -> Iterator[dict[str, Any]]:
        """Yield the engine's state twice a second until the server ends the stream."""
        with self._get("/v1/engine/events") as response:
            for event in self._events(response):
                yield self._checked(self._parsed(event))

    def tokenize(self, body: dict[str, Any], timeout_s: float = _COUNT_S) -> int:
        """Count the tokens of a text or a conversation, as in vLLM's /tokenize; loads its model if necessary.

        Raises:
            UsageError: the server refuses the request.   ServerNotUsable: it does not answer.
        """
        with _refusing(), self._ask("POST", "/tokenize", body, timeout_s=timeout_s) as response:
            answer = self._parsed(response.read(_LONGEST_BYTES))
        count = answer.get("count") if isinstance(answer, dict) else None
        if not isinstance(count, int):
            raise self._stranger("it does not say how many tokens there are")
        return count

    def answers(
        self,
        path: str,
        body: dict[str, Any],
        begin: Callable[[str | None], None] = lambda request_id: None,
        call: RemoteCall | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Yield the chunks of a streamed answer, as in OpenAI's API.

        Args:
            begin: called with the request's id when the stream begins.

        Raises:
            UsageError: the server refuses the request.   ServerNotUsable: the answer does not come or breaks off.
        """
        with _refusing(), self._ask("POST", path, body, timeout_s=ANSWER_S, call=call) as response:
            begin(response.headers.get("x-request-id"))
            for event in self._events(response):
                if event == b"[DONE]":
                    return
                chunk = self._parsed(event)
                if not isinstance(chunk, dict):
                    raise self._stranger("its answer cannot be read")
                if isinstance(error := chunk.get("error"), dict):
                    raise ServerNotUsable(f"{self.url}: {quote(error.get('message'))}", url=self.url)
                yield chunk
        raise ServerNotUsable(
            f"{self.url} ended before its answer did", hint="`argosy logs` may say why", url=self.url
        )

    def _events(self, response: http.client.HTTPResponse) -> Iterator[bytes]:
        """Yield the data of server-sent events."""
        data: list[bytes] = []
        size = 0
        while line := response.readline(_LONGEST_BYTES):
            size += len(line)
            if size > _LONGEST_BYTES:
                raise self._stranger("an event is too long")
            text = line.rstrip(b"\r\n")
            if text.startswith(b"data:"):
                data.append(text[5:].removeprefix(b" "))
            elif not text:
                if data:
                    yield b"\n".join(data)
                data, size = [], 0

    def workers(self) -> list[dict[str, Any]]:
        """Get the workers of the server's group."""
        return self._workers(self._get_json("/v1/cluster"))

    def change_worker(self, what: str, host: str) -> list[dict[str, Any]]:
        """Add or drain a worker; return all of them."""
        with self._ask("POST", f"/v1/cluster/{what}", {"host": host}) as response:
            return self._workers(self._parsed(response.read(_LONGEST_BYTES)))

    def _workers(self, answer: object) -> list[dict[str, Any]]:
        entries = answer.get("workers") if isinstance(answer, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise self._stranger("its workers cannot be read")
        return entries

    def _checked(self, state: object) -> dict[str, Any]:
        if not isinstance(state, dict) or not isinstance(state.get("memory"), dict) or "experts" not in state:
            raise self._stranger("its state cannot be read")
        return state

    def _get_json(self, path: str) -> object:
        return self._parsed(self._read("GET", path))

    def _read(self, method: str, path: str) -> bytes:
        with self._ask(method, path) as response:
            body = response.read(_LONGEST_BYTES + 1)
        if len(body) > _LONGEST_BYTES:
            raise self._stranger(f"its answer to {path} is too long")
        return body

    def _parsed(self, body: bytes) -> object:
        try:
            return parse_json(body)
        except JsonError as error:
            raise self._stranger("its answer is not JSON") from error

    def _get(self, path: str) -> AbstractContextManager[http.client.HTTPResponse]:
        return self._ask("GET", path)

    def _connection(self, timeout_s: float) -> http.client.HTTPConnection:
        if self._file is not None:
            return _FileConnection(self._file, timeout_s)
        kind = http.client.HTTPSConnection if self._is_secure else http.client.HTTPConnection
        return kind(self._host, self._port, timeout=timeout_s)

    @contextmanager
    def _ask(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        timeout_s: float | None = None,
        call: RemoteCall | None = None,
    ) -> Iterator[http.client.HTTPResponse]:
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        connection = self._connection(timeout_s)
        headers = {"Accept": "application/json, text/event-stream"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            if call is not None:
                call.begin(connection)
            if body is None:
                connection.request(method, self._base_path + path, headers=headers)
            else:
                headers["Content-Type"] = "application/json"
                connection.request(method, self._base_path + path, json.dumps(body), headers)
            response = connection.getresponse()
            if response.status != http.HTTPStatus.OK:
                raise self._refusal(response, path)
            yield response
        except http.client.HTTPException as error:
            raise self._stranger("it does not speak HTTP") from error
        except TimeoutError as error:
            raise ServerNotUsable(
                f"{self.url} has not answered for {timeout_s:.0f} s", url=self.url, is_absent=True
            ) from error
        except OSError as error:
            raise ServerNotUsable(
                f"nothing answers at {self.url}: {error.strerror or quote(str(error))}",
                hint="`argosy up` starts a server; `--url` selects another address",
                url=self.url,
                is_absent=True,
            ) from error
        finally:
            connection.close()

    def _refusal(self, response: http.client.HTTPResponse, path: str) -> ServerNotUsable:
        status = response.status
        if status == http.HTTPStatus.UNAUTHORIZED:
            told = "refuses the key" if self._key is not None else "needs a key"
            return ServerNotUsable(
                f"{self.url} {told}",
                hint="set ARGOSY_API_KEY, or use `--key-file FILE`",
                url=self.url,
                status=status,
            )
        code = None
        try:
            error = parse_json(response.read(_LONGEST_BYTES))["error"]  # type: ignore[index]
            code = error.get("code") if isinstance(error, dict) else None
            message = error if path.startswith("/api/") else error["message"]  # Ollama's and OpenAI's shape
        except (JsonError, KeyError, TypeError):
            message = None
        # Other servers also send errors of this shape for routes that only Argosy has.
        is_unknown = (
            status == http.HTTPStatus.NOT_FOUND and not path.startswith("/api/") and code != _NO_MODEL
        )
        if is_unknown or not isinstance(message, str):
            return self._stranger(f"it answers {status} to {path}", status)
        said, _, hint = message.partition("\nhint: ")  # as `str(ArgosyError)` writes it
        lines = [quote(line) for line in said.splitlines()[:_MOST_LINES]]
        return ServerNotUsable(
            f"{self.url} answers {status}: " + "\n".join(lines),
            hint=quote(hint) or None,
            url=self.url,
            status=status,
            code=code,
            said="\n".join(lines),
            **_retry_after(response),
        )

    def _stranger(self, why: str, status: int | None = None) -> ServerNotUsable:
        return ServerNotUsable(
            f"{self.url} is not an Argosy server: {why}",
            hint="another program may listen there; `--url` selects another address",
            url=self.url,
            status=status,
        )


@contextmanager
def _refusing() -> Iterator[None]:
    """Raise a server's refusal as the error that a local engine would raise."""
    try:
        yield
    except ServerNotUsable as error:
        if error.facts.get("status") not in _REFUSALS or error.facts.get("code") == _NO_MODEL:
            raise
        kind = PromptTooLong if error.facts.get("code") == "context_length_exceeded" else UsageError
        raise kind(str(error.facts.get("said") or error.message), hint=error.hint) from None


def _retry_after(response: http.client.HTTPResponse) -> dict[str, int]:
    """Seconds after which to retry a busy server."""
    told = response.headers.get("retry-after") or ""
    is_busy = response.status in (http.HTTPStatus.TOO_MANY_REQUESTS, http.HTTPStatus.SERVICE_UNAVAILABLE)
    return (
        {"retry_after_s": int(told)}
        if is_busy and told.isascii() and told.isdecimal() and len(told) < 6
        else {}
    )


def _is_line(line: object) -> bool:
    """Whether it is a line of a server's memory."""
    kinds = {"name": str, "bytes": int, "note": str}
    return isinstance(line, dict) and all(isinstance(line.get(key), kind) for key, kind in kinds.items())
