"""Read parts of files on the Hugging Face Hub, or on any https server that answers range requests.

    OWNER/NAME, https://...  ->  Source  ->  Hub: the list of files, byte ranges of them, and whole files as streams

No server's answer is trusted. Addresses and redirects must use https, unless the host is this machine; few redirects
are followed, and the token is sent to no other host. A list of files must come from the source's own host, and no name
in it may lead outside the repository. The size of each answer is checked before it is read, and the total of lists and
headers is bounded. Such a request ends after a minute, and all of them together after five, however slowly bytes
arrive; a stream ends if nothing arrives for a minute. HF_ENDPOINT names another hub, which then gets HF_TOKEN; neither
is logged or printed. With HF_HUB_OFFLINE no request is sent.

Elsewhere: `hub_redirects.py` follows redirects; `model/remote.py` reads headers of models, and `library/pull.py`
fetches whole models.
"""

from __future__ import annotations

import http.client
import os
import re
import socket
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import NamedTuple

from argosy.checkpoint.hub_redirects import Redirects, file_name, is_this_machine, origin_of
from argosy.checkpoint.untrusted_file import quote
from argosy.errors import CheckpointError, FetchFailed, UsageError
from argosy.strict_json import JsonError, parse_json

DEFAULT_ENDPOINT = "https://huggingface.co"
_REQUEST_S = 60.0
_ALL_REQUESTS_S = 300.0
_LIST_BYTES = 2 << 20  # for the answer with the names of a repository's files
_LARGEST_FILE = 1 << 50
_MOST_NAMES = 10_000
_READ_BYTES = 1 << 16
_STREAM_BYTES = 1 << 20  # bytes read from a stream at once
_LONGEST_LICENCE = 64
_MOST_LICENCES = 4  # most files of one model

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
# Users of Ollama and llama.cpp write the hub's address before a repository's name.
_HUB_NAME = re.compile(
    rf"(?:(?:hf|huggingface)\.co/)?({_NAME}/{_NAME})(?::((?:{_NAME}/)*[A-Za-z0-9._-]{{1,128}}))?"
)
# The page of a file or folder on the hub, and the file itself.
_HUB_PAGE = re.compile(
    rf"({_NAME}/{_NAME})/(?:blob|resolve|tree)/main/((?:{_NAME}/)*[A-Za-z0-9._-]{{1,128}})"
)
_PATH = re.compile(r"(?:/[A-Za-z0-9._~!$&'()*+,;=:@%-]+)+")
_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")


@dataclass(frozen=True, slots=True)
class Source:
    """A hub, a repository of a hub, or one file.

    url: the hub's address, or the file's, which ends with .gguf.
    part: selects among a repository's GGUF files by a piece of the name, such as Q4_K_M; "": no choice.
    revision: the branch, tag or commit to read; "": the main branch.
    """

    url: str
    repository: str = ""
    part: str = ""
    revision: str = ""

    @property
    def is_file(self) -> bool:
        return not self.repository and self.url.endswith(".gguf")

    @classmethod
    def find(cls, text: str, environment: Mapping[str, str] | None = None) -> Source | None:
        """Return the repository that `text` names; None if it is neither OWNER/NAME nor an address.

        Forms: OWNER/NAME, OWNER/NAME:Q4_K_M, OWNER/NAME:FOLDER/FILE, hf.co/OWNER/NAME:Q4_K_M, https://HUB/OWNER/NAME,
        addresses of pages and files of the hub, https://HOST/PATH.gguf.

        Raises:
            UsageError: the address is not supported.
        """
        environment = os.environ if environment is None else environment
        if found := _HUB_NAME.fullmatch(text):
            return cls(hub_address(environment), found[1], found[2] or "")
        if not re.match(r"https?://", text):
            return None
        url = _checked_address(text, "the address")
        parts = urllib.parse.urlsplit(url)
        hub = hub_address(environment)
        if url.startswith(f"{hub}/") and (page := _HUB_PAGE.fullmatch(url.removeprefix(f"{hub}/"))):
            return cls(hub, page[1], page[2])
        if parts.path.endswith(".gguf"):
            return cls(url)
        if repository := _HUB_NAME.fullmatch(parts.path.strip("/")):
            return cls(f"{parts.scheme}://{parts.netloc}", repository[1], repository[2] or "")
        raise UsageError(
            f"'{quote(text)}' is not the address of a model",
            hint="give https://HUB/OWNER/NAME, or the address of a .gguf file",
        )


def hub_address(environment: Mapping[str, str] | None = None) -> str:
    """Return the address of the hub: HF_ENDPOINT, or Hugging Face's.

    Raises:
        UsageError: HF_ENDPOINT is not an allowed address.
    """
    environment = os.environ if environment is None else environment
    return _checked_address((environment.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/"), "HF_ENDPOINT")


def is_hub_name(text: object) -> bool:
    """Whether a value is the name of a repository: OWNER/NAME."""
    return isinstance(text, str) and re.fullmatch(rf"{_NAME}/{_NAME}", text) is not None


def is_commit(revision: str) -> bool:
    """Whether a revision is a full commit hash, not a branch or tag."""
    return re.fullmatch(r"[0-9a-f]{40,64}", revision) is not None


def _checked_address(url: str, what: str) -> str:
    """Return `url` if it is allowed.

    Raises:
        UsageError: it is not; the message does not repeat parts that may be secret.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        parts, host = urllib.parse.urlsplit(""), None
    if not host or parts.username is not None or parts.query or parts.fragment or not url.isascii():
        raise UsageError(f"{what} must have the form https://HOST/PATH, without user, query or fragment")
    if parts.path and not _PATH.fullmatch(parts.path.rstrip("/") or "/-"):
        raise UsageError(f"{what} has a path with characters that are not allowed")
    if parts.scheme != "https" and not (parts.scheme == "http" and is_this_machine(host)):
        raise UsageError(
            f"{what} must begin with https://, found {quote(parts.scheme)}://",
            hint="http is opened on this machine alone, such as http://127.0.0.1:8000",
        )
    return url


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository. Large files have a `sha256`; others have `git_sha1`, the hash of their git blob."""

    name: str
    nbytes: int | None = None
    sha256: str | None = None
    git_sha1: str | None = None


@dataclass(frozen=True, slots=True)
class Listing:
    """A repository at one revision. `licence` comes from its card, or is ""."""

    revision: str
    files: tuple[RemoteFile, ...]
    licence: str = ""

    @property
    def names(self) -> list[str]:
        return [file.name for file in self.files]


class Range(NamedTuple):
    """Bytes of a file from an offset, and the size of the whole file."""

    data: bytes
    file_bytes: int


class Hub:
    """Reads from one source, at most `most_bytes` in total. Several threads may use it at once.

    Args:
        token: sent only to the source's host; None: HF_TOKEN, or no token.
    """

    def __init__(self, source: Source, *, most_bytes: int, token: str | None = None) -> None:
        self.source = source
        self.bytes_read = 0
        self._most_bytes = most_bytes
        self._until = time.monotonic() + _ALL_REQUESTS_S
        self._lock = Lock()
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            raise FetchFailed(
                f"HF_HUB_OFFLINE is set, so nothing is fetched from {self._what}",
                hint="unset it, or name a model that is here: `argosy list`",
                what=self._what,
                is_absent=True,
            )
        token = os.environ.get("HF_TOKEN", "").strip() if token is None else token
        if not all("!" <= character <= "~" for character in token):
            raise UsageError("HF_TOKEN must be one line of printable characters without spaces")
        # A token belongs to a hub, not to any server from which a file is fetched.
        self._redirects = Redirects(source.url, "" if source.is_file else token)
        self._opener = urllib.request.build_opener(self._redirects)

    def list_files(self) -> Listing:
        """Return the files of the repository.

        Raises:
            FetchFailed: the hub cannot be reached, or refuses.   CheckpointError: its answer is malformed, comes from
                another host, or names a file outside the repository.
        """
        url = f"{self.source.url}/api/models/{self.source.repository}"
        if self.source.revision:
            url += f"/revision/{urllib.parse.quote(self.source.revision, safe='')}"
        answer = self._json(f"{url}?blobs=true", "its list of files", _LIST_BYTES)
        if not isinstance(answer, dict):
            raise self._lie("its list of files is not an object")
        revision, siblings = answer.get("sha"), answer.get("siblings")
        if not isinstance(revision, str) or not is_commit(revision):
            raise self._lie("its list of files has no revision")
        if is_commit(self.source.revision) and self.source.revision != revision:
            raise self._lie(
                f"its list of files is for revision {revision}, but {self.source.revision} was requested"
            )
        if not isinstance(siblings, list) or len(siblings) > _MOST_NAMES:
            raise self._lie(f"its list of files is missing, or has more than {_MOST_NAMES}")
        listed = [self._file(sibling) for sibling in siblings if isinstance(sibling, dict)]
        files = {file.name: file for file in listed if file is not None}
        return Listing(revision, tuple(files.values()), _licence(answer))

    def search(self, query: Sequence[tuple[str, str]], most_bytes: int) -> list[object]:
        """Return the hub's entries of the models that a query finds, unchanged.

        Raises:
            FetchFailed: the hub cannot be reached, or refuses.   CheckpointError: its answer is not a list, or too
            long.
        """
        url = f"{self.source.url}/api/models?{urllib.parse.urlencode(query)}"
        answer = self._json(url, "its list of models", most_bytes)
        if not isinstance(answer, list):
            raise self._lie("its list of models is not a list")
        return answer

    def _json(self, url: str, what: str, most_bytes: int) -> object:
        data, _ = self._fetch(url, None, most_bytes)
        try:
            return parse_json(data)
        except JsonError as error:
            raise self._lie(f"{what} {error.fault}") from error

    def _file(self, sibling: Mapping[str, object]) -> RemoteFile | None:
        """Read an entry of the list; None for a name that cannot be part of an address, which no file of a
        model has.
        """
        name, nbytes, lfs = sibling.get("rfilename"), sibling.get("size"), sibling.get("lfs")
        if not isinstance(name, str):
            return None
        if any(part in ("", ".", "..") for part in re.split(r"[/\\]", name)):
            raise self._lie(f"its list of files has '{quote(name)}', which leads outside the repository")
        if not _PATH.fullmatch("/" + name):
            return None
        if type(nbytes) is not int or not 0 <= nbytes <= _LARGEST_FILE:
            nbytes = None
        sha256 = lfs.get("sha256") if isinstance(lfs, dict) else None
        return RemoteFile(name, nbytes, _hex(sha256, 64), _hex(sibling.get("blobId"), 40))

    def url_of(self, revision: str, name: str) -> str:
        return f"{self.source.url}/{self.source.repository}/resolve/{revision}/{name}"

    def read(self, url: str, start: int, nbytes: int) -> Range:
        """Return `nbytes` bytes of a file from `start` on; fewer only at its end.

        Raises:
            FetchFailed: the file cannot be read.   CheckpointError: the server's answer contradicts itself.
        """
        return self._fetch(url, start, nbytes)

    def read_all(self, url: str, most_bytes: int) -> bytes:
        """Return a whole small file.

        Raises:
            The same errors as `read`, also if the file is larger.
        """
        data, file_bytes = self._fetch(url, 0, most_bytes)
        if len(data) != file_bytes:
            raise self._lie(f"{file_name(url)} is {file_bytes} bytes long; at most {most_bytes} are read")
        return data

    def stream(self, url: str, start: int, file_bytes: int) -> Iterator[bytes]:
        """Yield a file of known size in pieces from `start` to its end. It may take any time, but must not stall.

        Raises:
            FetchFailed: the file cannot be read, or ends early.   CheckpointError: it has another size.
        """
        with self._answer(url, start, file_bytes - start, _REQUEST_S) as response:
            # A server without range requests sends the file from its beginning.
            first = 0 if response.status == http.HTTPStatus.OK else start
            expected, found_bytes = self._announced(response, url, first, file_bytes - first)
            if found_bytes != file_bytes:
                raise self._lie(
                    f"{file_name(url)} is {found_bytes} bytes long, and its list of files says {file_bytes}"
                )
            while expected:
                # Only the bytes that have arrived, so that a kill loses none.
                part = response.read1(min(expected, _STREAM_BYTES))
                if not part:
                    raise self._failed(url, f"the connection ended {expected} bytes early")
                expected -= len(part)
                again = min(start - first, len(part))
                first += again
                if again < len(part):
                    yield part[again:]

    def _fetch(self, url: str, start: int | None, most_bytes: int) -> Range:
        """Fetch bytes of a file from `start` on, or a whole answer if `start` is None."""
        deadline = min(time.monotonic() + _REQUEST_S, self._until)
        timeout_s = deadline - time.monotonic()
        if timeout_s <= 0:
            raise self._failed(url, f"all headers took more than {_ALL_REQUESTS_S:.0f} s")
        with self._answer(url, start, most_bytes, timeout_s) as response:
            # A hub may send a list while generating it, without its length.
            if start is None and "Content-Length" not in response.headers:
                data = self._body(response, url, most_bytes + 1, deadline, may_end=True)
                self._count(len(data))
                if len(data) > most_bytes:
                    raise self._lie(f"its answer is longer than the {most_bytes} bytes that are read")
                return Range(data, len(data))
            expected, file_bytes = self._announced(response, url, start, most_bytes)
            self._count(expected)
            return Range(self._body(response, url, expected, deadline), file_bytes)

    def _count(self, nbytes: int) -> None:
        with self._lock:
            if self.bytes_read + nbytes > self._most_bytes:
                raise self._lie(
                    f"its headers are larger than the {self._most_bytes} bytes that are read of a model"
                )
            self.bytes_read += nbytes

    @contextmanager
    def _answer(
        self, url: str, start: int | None, most_bytes: int, timeout_s: float
    ) -> Iterator[http.client.HTTPResponse]:
        """Open the answer to a request for at most `most_bytes` from `start` on, or for everything if `start` is None.

        Raises:
            FetchFailed, CheckpointError: also for failures while the answer is read.
        """
        request = urllib.request.Request(url, headers={"Accept-Encoding": "identity", "User-Agent": "argosy"})
        if start is not None:
            request.add_header("Range", f"bytes={start}-{start + most_bytes - 1}")
        self._redirects.authorize(request)
        try:
            with self._opener.open(request, timeout=timeout_s) as response:
                if response.headers.get_content_type() == "text/html":
                    raise self._page_instead()
                if start is None and origin_of(response.geturl()) != origin_of(self.source.url):
                    raise self._lie("its list of files comes from another host")
                yield response
        except urllib.error.HTTPError as error:
            error.close()
            raise self._refusal(error, url) from None
        except urllib.error.URLError as error:
            raise self._unreachable(error.reason, timeout_s) from None
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error, timeout_s) from None

    def _announced(
        self, response: http.client.HTTPResponse, url: str, start: int | None, most_bytes: int
    ) -> tuple[int, int]:
        """Return how many bytes of the answer to read, and the size of the file; both are checked."""
        length = response.headers.get("Content-Length", "")
        if not re.fullmatch(r"\d{1,18}", length):
            raise self._lie(f"{file_name(url)} comes without its length")
        if start is None:
            if int(length) > most_bytes:
                raise self._lie(f"its answer is {length} bytes long; at most {most_bytes} are read")
            return int(length), int(length)
        if response.status == http.HTTPStatus.OK:  # the whole file; its beginning is enough
            if start:
                raise self._failed(url, "the server does not answer range requests")
            return min(int(length), most_bytes), int(length)
        found = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if response.status != http.HTTPStatus.PARTIAL_CONTENT or found is None:
            raise self._lie(f"{file_name(url)} comes with status {response.status} and no Content-Range")
        first, last, file_bytes = map(int, found.groups())
        expected = min(most_bytes, file_bytes - start)
        if (
            first != start
            or last != start + expected - 1
            or int(length) != expected
            or file_bytes > _LARGEST_FILE
        ):
            raise self._lie(
                f"{file_name(url)}: bytes {start} to {start + most_bytes - 1} were requested, but {found[0]} of length "
                f"{length} arrive"
            )
        return expected, file_bytes

    def _body(
        self, response: http.client.HTTPResponse, url: str, expected: int, deadline: float, *, may_end: bool = False
    ) -> bytes:  # fmt: skip
        parts: list[bytes] = []
        left = expected
        while left:
            if time.monotonic() > deadline:
                raise self._failed(url, "its bytes come too slowly")
            # Only the bytes that have arrived: waiting for more could outlast the deadline if they trickle in.
            part = response.read1(min(left, _READ_BYTES))
            if not part and may_end:
                break
            if not part:
                raise self._failed(url, f"the connection ended {left} bytes early")
            parts.append(part)
            left -= len(part)
        return b"".join(parts)

    def _refusal(self, error: urllib.error.HTTPError, url: str) -> FetchFailed | CheckpointError:
        what, status, host = self._what, error.code, self._redirects.asked_host
        if error.headers.get("X-Error-Code") == "GatedRepo":
            return FetchFailed(
                f"{what} is gated: its owner must let you read it",
                hint=f"request access at {self.source.url}/{what}, then set HF_TOKEN to a token of that account",
                what=what,
            )
        is_own_host = origin_of(error.geturl()) == origin_of(
            self.source.url
        )  # otherwise a link of the hub has expired
        if is_own_host and status in (http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN):
            if not self.source.repository and not self.source.is_file:  # a search, which names no model
                hint = "unset HF_TOKEN, or set it to a valid token of this hub"
                if not self._redirects.has_token:
                    hint = "set HF_TOKEN to a token of this hub"
                return FetchFailed(f"{host} refuses the search: it answers {status}", hint=hint, what=what)
            hint = "check the spelling; for a private model, set HF_TOKEN to a token that may read it"
            if self._redirects.has_token:
                hint = "check the spelling, and that the token in HF_TOKEN is valid and may read it"
            return FetchFailed(
                f"{what} is not public, or does not exist: {host} answers {status}", hint=hint, what=what
            )
        if status == http.HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
            return self._unreachable(error, 0.0)
        if status == http.HTTPStatus.NETWORK_AUTHENTICATION_REQUIRED:
            return self._page_instead()
        if status == http.HTTPStatus.NOT_FOUND and "/api/models/" in url:
            at = f" at revision {self.source.revision}" if self.source.revision else ""
            hint = (
                f"check the spelling; `argosy search {what.partition('/')[2]}` looks for others of that name"
            )
            return CheckpointError(f"the hub has no model {what}{at}: it answers 404", hint=hint, path=url)
        if status == http.HTTPStatus.NOT_FOUND:
            return CheckpointError(f"{what} has no {file_name(url)}: the server answers 404", path=url)
        if status == http.HTTPStatus.TOO_MANY_REQUESTS:
            wait = error.headers.get("Retry-After", "")
            hint = (
                f"try again in {wait} s" if re.fullmatch(r"\d{1,5}", wait) else "try again in a few minutes"
            )
            if not self._redirects.has_token:
                hint += "; with HF_TOKEN set, the hub allows more"
            return FetchFailed(f"{host} answers 429: too many requests", hint=hint, what=what)
        if status >= http.HTTPStatus.INTERNAL_SERVER_ERROR:
            return FetchFailed(
                f"{host} has an internal fault: it answers {status}",
                hint="try again later; HF_ENDPOINT names a mirror",
                what=what,
            )
        return self._failed(url, f"{host} answers {status}")

    def _unreachable(self, error: object, timeout_s: float) -> FetchFailed:
        """Explain why no answer came and what to do; facts: `is_absent`."""
        host, proxy = self._redirects.asked_host, self._redirects.proxy
        hint = "check the network"
        if not self.source.is_file and os.environ.get("HF_ENDPOINT"):
            hint += " and the address in HF_ENDPOINT"
        elif not self.source.is_file:
            hint += ", or set HF_ENDPOINT to a mirror"
        if isinstance(error, TimeoutError):
            why = f"no answer within {timeout_s:.0f} s"
        elif isinstance(error, socket.gaierror):
            why = "no such host"
        elif isinstance(error, ConnectionRefusedError):
            why = "connection refused"
        elif isinstance(error, ssl.SSLCertVerificationError):
            why = f"its certificate is not trusted: {quote(error.verify_message)}"
            hint = (
                "check this machine's clock; if a proxy or a login page stands between, log in with a browser, or name "
                "the proxy's certificates with SSL_CERT_FILE"
            )
        elif isinstance(error, ssl.SSLError):
            why = f"no TLS connection: {quote(error.strerror or str(error))}"
        elif isinstance(error, ConnectionError | http.client.IncompleteRead):
            why = "the connection ended early"
        elif isinstance(error, http.client.HTTPException):
            why = "it does not speak HTTP"
        elif isinstance(error, urllib.error.HTTPError):
            why = f"the proxy answers {error.code}"
        elif isinstance(error, OSError) and error.strerror:
            why = error.strerror[:1].lower() + error.strerror[1:]
        else:
            why = quote(str(error)) or type(error).__name__
        through = ""
        if proxy:
            through = f" through the proxy {proxy}"
            hint = "check the proxy in HTTPS_PROXY or HTTP_PROXY; NO_PROXY names hosts that need none"
        return FetchFailed(
            f"cannot reach {host}{through} ({why})", hint=hint, what=self._what, is_absent=True
        )

    def _page_instead(self) -> FetchFailed:
        host = self._redirects.asked_host
        return FetchFailed(
            f"{host} answers with a web page instead of data",
            hint="a login page of this network may stand between: log in with a browser, then try again",
            what=self._what,
            is_absent=True,
        )

    @property
    def _what(self) -> str:
        return (
            self.source.repository
            or file_name(self.source.url)
            or urllib.parse.urlsplit(self.source.url).netloc
        )

    def _failed(self, url: str, why: str) -> FetchFailed:
        return FetchFailed(f"{file_name(url)} of {self._what} cannot be fetched: {why}", what=self._what)

    def _lie(self, sentence: str) -> CheckpointError:
        return CheckpointError(f"{self._what}: {sentence}", path=self.source.url)


def _hex(value: object, length: int) -> str | None:
    return value if isinstance(value, str) and re.fullmatch(rf"[0-9a-f]{{{length}}}", value) else None


def _licence(answer: Mapping[str, object]) -> str:
    """Return the licence in a model's card, such as apache-2.0; "" if it names none."""
    card = answer.get("cardData")
    if not isinstance(card, dict):
        return ""
    licence = card.get("license")
    if licence == "other" and isinstance(card.get("license_name"), str):
        licence = card["license_name"]
    several = licence if isinstance(licence, list) else [licence]
    named = [one for one in several[:_MOST_LICENCES] if isinstance(one, str)]
    return quote(", ".join(one[:_LONGEST_LICENCE] for one in named))[:_LONGEST_LICENCE]
