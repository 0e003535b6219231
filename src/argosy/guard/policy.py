"""The policy of a server: the checks of its requests' and answers' texts, in one strict TOML file.

    default = "house"               # the policy of unlisted keys; without it, nothing is checked
    [keys]
    research = "lenient"            # by the key's name or id
    [policies.house]
    pii-input = "redact"            # off, detect, redact or block
    input = ["words", "judge"]      # checks of what a client sends
    output = ["words"]              # checks of what the model says
    [checks.words]
    words = "words.txt"             # relative to this file, or an absolute path
    category = "harassment"
    [checks.judge]
    model = "guard"                 # a model of the same server
    form = "qwen3guard"

    FILE  ->  read_policies  ->  Policies: the policy of each key, and a digest of everything read

A misspelt name is an error. The digest covers the file, its lists and its policy texts, so that the record of an
answer can state which rules were in force.

Elsewhere: what a policy does to a text is `screen.py`; docs/guides/responsible-use.md explains the settings.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar, get_args

from argosy.directory import read_named
from argosy.errors import UsageError
from argosy.guard.guard_models import GUARD_FORMS
from argosy.guard.keys import Key
from argosy.guard.pii.entities import ENTITIES
from argosy.guard.pii.finder import REGIONS, Finder
from argosy.guard.word_list import WordList

Mode = Literal["off", "detect", "redact", "block"]
MODES: tuple[Mode, ...] = get_args(Mode)
OnFailure = Literal["block", "pass"]
_MOST_FILE_BYTES = 1 << 20
_MOST_LIST_BYTES = 32 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_URL = re.compile(
    r"https?://(?:[A-Za-z0-9.\-]{1,253}|\[[0-9a-fA-F:]{2,45}\])(?::[0-9]{1,5})?(?:/[A-Za-z0-9._~%/\-]*)?"
)
_MOST_TIMEOUT_S = 60.0
_MOST_USERS = 100_000

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ListCheck:
    """A file of words and phrases."""

    name: str
    words: WordList


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpCheck:
    """Another server with OpenAI's moderation endpoint.

    key_env: the environment variable with its API key; None if it needs none.
    """

    name: str
    url: str
    timeout_s: float = 2.0
    on_failure: OnFailure = "block"
    key_env: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCheck:
    """A model on the same server.

    form: the name in `GUARD_FORMS` of the way to prompt it.
    policy: the operator's policy in words, if the form takes one.
    """

    name: str
    model: str
    form: str
    policy: str = ""
    timeout_s: float = 30.0
    on_failure: OnFailure = "block"


Check = ListCheck | HttpCheck | ModelCheck


@dataclass(frozen=True, slots=True, kw_only=True)
class ContentPolicy:
    """The checks of a key's requests.

    finder: None: personal data is not looked for.
    chunk_characters: asked checks get an answer in parts of this length.
    overlap_characters: this much of a part is held back until the next part has been checked, so a passage of this
        length is never sent in part.
    may_choose: other policies that a request may name.
    requests_per_minute_per_user: the limit for each user that a client names; None: no limit.
    watermark: mark answers, if the server has a watermark key.
    """

    name: str
    finder: Finder | None = None
    pii_input: Mode = "off"
    pii_output: Mode = "off"
    input: tuple[Check, ...] = ()
    output: tuple[Check, ...] = ()
    chunk_characters: int = 600
    overlap_characters: int = 120
    may_choose: frozenset[str] = frozenset()
    requests_per_minute_per_user: int | None = None
    watermark: bool = True

    @property
    def checks_requests(self) -> bool:
        """Whether any check reads requests."""
        return bool(self.input) or self.pii_input != "off"

    @property
    def checks_answers(self) -> bool:
        """Whether any check reads answers."""
        return self.changes_answers or self.pii_output != "off"

    @property
    def changes_answers(self) -> bool:
        """Whether an answer may be held back or changed."""
        return bool(self.output) or self.pii_output in ("redact", "block") or self.pii_input == "redact"


@dataclass(frozen=True, slots=True, kw_only=True)
class Policies:
    """The content of a policy file.

    digest: SHA-256 in hexadecimal of everything read.
    blocked_users: users, as clients name them, whose requests are refused.
    """

    digest: str
    policies: Mapping[str, ContentPolicy]
    default: str | None = None
    keys: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    blocked_users: frozenset[str] = frozenset()

    def of(self, key: Key | None, chosen: str | None = None) -> ContentPolicy | None:
        """The policy of a request; None if nothing is checked.

        Args:
            chosen: the policy that the request names.

        Raises:
            UsageError: the key may not choose that policy.
        """
        name = self.default
        if key is not None:
            name = self.keys.get(key.id, self.keys.get(key.name, name))
        policy = None if name is None else self.policies[name]
        if chosen is None or chosen == name:
            return policy
        allowed = frozenset[str]() if policy is None else policy.may_choose
        if chosen not in allowed:
            known = ", ".join(sorted(allowed)) or "none"
            raise UsageError(
                f"x-argosy-policy: the key may not choose this policy; it may choose: {known}",
                param="x-argosy-policy",
            )
        return self.policies[chosen]

    @property
    def checks(self) -> list[Check]:
        """All checks that any policy uses, each once."""
        found = {
            check.name: check
            for policy in self.policies.values()
            for check in (*policy.input, *policy.output)
        }
        return list(found.values())


def read_policies(path: Path) -> Policies:
    """Read a policy file and the files that it names.

    Raises:
        UsageError: a file cannot be read, or a setting is unknown, missing or invalid.
    """
    reader = _Reader(path)
    try:
        return reader.read()
    except UsageError as error:
        raise UsageError(f"{path}: {error.message}", hint=error.hint) from None


class _Reader:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._digest = hashlib.sha256()

    def read(self) -> Policies:
        data = self._file(self._path, _MOST_FILE_BYTES)
        try:
            given = tomllib.loads(data)
        except (ValueError, RecursionError) as error:  # ValueError: invalid, or a number has too many digits
            raise UsageError(f"it is not TOML: {error}") from None
        known = ("default", "keys", "policies", "checks", "blocked-users")
        _require_known(given, known, "")
        checks = {name: self._check(name, table) for name, table in _tables(given, "checks")}
        policies = {name: _policy(name, table, checks) for name, table in _tables(given, "policies")}
        for policy in policies.values():
            for other in policy.may_choose - policies.keys():
                raise UsageError(f"policies.{policy.name}.may-choose: there is no policy {other[:64]!a}")
        default = given.get("default")
        keys = given.get("keys", {})
        if not isinstance(keys, dict):
            raise UsageError("keys must be a table of names of keys")
        for where, name in (("default", default), *((f"keys.{key}", name) for key, name in keys.items())):
            if name is not None and (not isinstance(name, str) or name not in policies):
                raise UsageError(
                    f"{where[:80]}: there is no such policy; known: {', '.join(policies) or 'none'}"
                )
        users = _texts(given.get("blocked-users", []), "blocked-users", most=_MOST_USERS)
        return Policies(
            digest=self._digest.hexdigest(), policies=MappingProxyType(policies), default=default,
            keys=MappingProxyType(keys), blocked_users=frozenset(users),
        )  # fmt: skip

    def _file(self, path: Path, most_bytes: int) -> str:
        file_name = "the file" if path == self._path else path.name
        try:
            data = read_named(path, most_bytes + 1)
        except OSError as error:
            raise UsageError(f"{file_name} cannot be read: {error.strerror}") from None
        if len(data) > most_bytes:
            raise UsageError(f"{file_name} has more than {most_bytes} bytes, which is the limit")
        self._digest.update(hashlib.sha256(data).digest())
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise UsageError(f"{file_name} is not UTF-8 text: byte {error.start} is invalid") from None

    def _check(self, name: str, given: Mapping[str, Any]) -> Check:
        where = f"checks.{name}"
        kinds = [kind for kind in ("words", "url", "model") if kind in given]
        if len(kinds) != 1:
            raise UsageError(f"{where} needs one of: words (a file), url, model")
        match kinds[0]:
            case "words":
                _require_known(given, ("words", "category"), where)
                path = self._path.parent / _text(given["words"], f"{where}.words")
                category = _text(given.get("category", name), f"{where}.category")
                return ListCheck(
                    name=name,
                    words=WordList(self._file(path, _MOST_LIST_BYTES), path.name, category=category),
                )
            case "url":
                _require_known(given, ("url", "timeout-s", "on-failure", "key-env"), where)
                url = _text(given["url"], f"{where}.url")
                if not _URL.fullmatch(url):
                    raise UsageError(
                        f"{where}.url must have the form https://HOST/PATH, without user and query"
                    )
                env = given.get("key-env")
                return HttpCheck(
                    name=name, url=url, **_failing(given, where),
                    key_env=None if env is None else _text(env, f"{where}.key-env"),
                )  # fmt: skip
        _require_known(given, ("model", "form", "policy", "timeout-s", "on-failure"), where)
        form = _one_of(given.get("form"), tuple(GUARD_FORMS), f"{where}.form")
        takes_policy = GUARD_FORMS[form].takes_policy
        if takes_policy != ("policy" in given):
            needs = "needs policy, a file with the policy in words" if takes_policy else "takes no policy"
            raise UsageError(f"{where}: form {form} {needs}")
        text = ""
        if takes_policy:
            text = self._file(self._path.parent / _text(given["policy"], f"{where}.policy"), _MOST_FILE_BYTES)
        return ModelCheck(
            name=name,
            model=_text(given["model"], f"{where}.model"),
            form=form,
            policy=text,
            **_failing(given, where),
        )


def _policy(name: str, given: Mapping[str, Any], checks: Mapping[str, Check]) -> ContentPolicy:
    where = f"policies.{name}"
    known = (
        "pii-input", "pii-output", "pii-entities", "phone-regions", "input", "output", "chunk-characters",
        "overlap-characters", "may-choose", "requests-per-minute-per-user", "watermark",
    )  # fmt: skip
    _require_known(given, known, where)
    modes = {
        side: _one_of(given.get(f"pii-{side}", "off"), MODES, f"{where}.pii-{side}")
        for side in ("input", "output")
    }

    def named(side: str) -> tuple[Check, ...]:
        names = _texts(given.get(side, []), f"{where}.{side}", most=16)
        for one in names:
            if one not in checks:
                known = ", ".join(checks) or "none"
                raise UsageError(f"{where}.{side}: there is no check {one[:64]!a}; known: {known}")
        return tuple(checks[one] for one in dict.fromkeys(names))

    finder = None
    if any(mode != "off" for mode in modes.values()):
        entities = _texts(
            given.get("pii-entities", list(ENTITIES)), f"{where}.pii-entities", most=len(ENTITIES)
        )
        regions = _texts(given.get("phone-regions", list(REGIONS)), f"{where}.phone-regions", most=32)
        finder = Finder(entities, regions=regions)
    chunk = _number(given.get("chunk-characters", 600), 50, 20_000, f"{where}.chunk-characters")
    overlap = _number(given.get("overlap-characters", 120), 0, 10_000, f"{where}.overlap-characters")
    limit = given.get("requests-per-minute-per-user")
    return ContentPolicy(
        name=name, finder=finder, pii_input=modes["input"], pii_output=modes["output"], input=named("input"),
        output=named("output"), chunk_characters=chunk, overlap_characters=overlap,
        may_choose=frozenset(_texts(given.get("may-choose", []), f"{where}.may-choose", most=64)),
        requests_per_minute_per_user=None if limit is None
        else _number(limit, 1, 1_000_000, f"{where}.requests-per-minute-per-user"),
        watermark=_one_of(given.get("watermark", True), (True, False), f"{where}.watermark"),
    )  # fmt: skip


def _failing(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The failure settings of a check: those that are given."""
    found: dict[str, Any] = {}
    if "timeout-s" in given:
        value = given["timeout-s"]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _MOST_TIMEOUT_S:
            raise UsageError(f"{where}.timeout-s must be a number of seconds up to {_MOST_TIMEOUT_S:g}")
        found["timeout_s"] = float(value)
    if "on-failure" in given:
        found["on_failure"] = _one_of(given["on-failure"], get_args(OnFailure), f"{where}.on-failure")
    return found


def _tables(given: Mapping[str, Any], name: str) -> list[tuple[str, Mapping[str, Any]]]:
    tables = given.get(name, {})
    if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        raise UsageError(f"{name} must be tables, such as [{name}.house]")
    for one in tables:
        if not _NAME.fullmatch(one):
            raise UsageError(f"{name}: a name has letters, digits, dots and dashes, found {one[:64]!a}")
    return list(tables.items())


def _require_known(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for name in given:
        if name not in known:
            raise UsageError(
                f"unknown setting {f'{where}.{name}'.lstrip('.')[:80]!a}; known: {', '.join(known)}"
            )


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise UsageError(f"{where} must be text")
    return value


def _texts(value: object, where: str, *, most: int) -> list[str]:
    if not isinstance(value, list) or len(value) > most or not all(isinstance(one, str) for one in value):
        raise UsageError(f"{where} must be a list of at most {most} texts")
    return value


def _number(value: object, least: int, most: int, where: str) -> int:
    if type(value) is not int or not least <= value <= most:
        raise UsageError(f"{where} must be a whole number from {least} to {most}")
    return value


def _one_of(value: object, known: Sequence[T], where: str) -> T:
    for one in known:
        if value == one:
            return one
    raise UsageError(f"{where} must be one of: {', '.join(map(str, known))}")
