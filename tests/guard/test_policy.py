"""The policy file: strict, complete, and hashed with everything that it names."""

from __future__ import annotations

from pathlib import Path

import pytest

from argosy.errors import UsageError
from argosy.guard.keys import Key
from argosy.guard.policy import HttpCheck, ListCheck, ModelCheck, read_policies

WHOLE = """
default = "house"
blocked-users = ["u-1"]
[keys]
research = "lenient"
key-2 = "lenient"
[policies.house]
pii-input = "redact"
pii-output = "detect"
pii-entities = ["email", "phone"]
phone-regions = ["DE"]
input = ["words", "remote", "judge"]
output = ["words"]
chunk-characters = 200
overlap-characters = 40
may-choose = ["lenient"]
requests-per-minute-per-user = 5
[policies.lenient]
[checks.words]
words = "words.txt"
category = "harassment"
[checks.remote]
url = "http://127.0.0.1:9/v1/moderations"
timeout-s = 1.5
on-failure = "pass"
key-env = "THE_KEY"
[checks.judge]
model = "guard"
form = "gpt-oss-safeguard"
policy = "policy.md"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "words.txt").write_text("blue moon\n")
    (tmp_path / "policy.md").write_text("No moons.")
    path = tmp_path / "policy.toml"
    path.write_text(WHOLE)
    return path


def key(name: str, id: str = "key-1") -> Key:
    return Key(id=id, name=name, sha256="0" * 64)


def test_a_whole_file_is_read(file: Path) -> None:
    policies = read_policies(file)
    house = policies.of(None)
    assert house is not None
    assert (house.pii_input, house.pii_output, house.chunk_characters) == ("redact", "detect", 200)
    assert (house.overlap_characters, house.requests_per_minute_per_user) == (40, 5)
    words, remote, judge = house.input
    assert isinstance(words, ListCheck)
    assert isinstance(remote, HttpCheck)
    assert isinstance(judge, ModelCheck)
    assert (remote.timeout_s, remote.on_failure, remote.key_env) == (1.5, "pass", "THE_KEY")
    assert (judge.model, judge.policy, judge.on_failure) == ("guard", "No moons.", "block")
    assert house.checks_answers
    assert house.changes_answers
    assert policies.blocked_users == {"u-1"}


def test_a_key_has_the_policy_that_lists_its_name_or_id_and_may_choose_another(file: Path) -> None:
    policies = read_policies(file)
    for one, name in ((key("x"), "house"), (key("research"), "lenient"), (key("y", "key-2"), "lenient")):
        found = policies.of(one)
        assert found is not None
        assert found.name == name
    chosen = policies.of(key("x"), "lenient")
    assert chosen is not None
    assert chosen.name == "lenient"
    for other in ("house", "nobody"):
        with pytest.raises(UsageError, match="may not choose this policy; it may choose: none"):
            policies.of(key("research"), other)


def test_without_a_default_nothing_is_checked_for_other_keys(file: Path) -> None:
    file.write_text(WHOLE.replace('default = "house"\n', ""))
    policies = read_policies(file)
    assert policies.of(key("x")) is None
    assert policies.of(None) is None


def test_the_digest_covers_the_file_and_all_that_it_names(file: Path) -> None:
    digests = {read_policies(file).digest}
    for name in ("policy.toml", "words.txt", "policy.md"):
        path = file.with_name(name)
        path.write_text(path.read_text() + "\n# another\n")
        digests.add(read_policies(file).digest)
    assert len(digests) == 4
    assert all(len(digest) == 64 for digest in digests)


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("pii-input", "pii-inptu", "unknown setting 'policies.house.pii-inptu'; known: pii-input, "),
        ('default = "house"', 'default = "home"', "default: there is no such policy; known: house, lenient"),
        ('"redact"', '"hide"', "policies.house.pii-input must be one of: off, detect, redact, block"),
        (
            '["words"]',
            '["wrods"]',
            "policies.house.output: there is no check 'wrods'; known: words, remote, judge",
        ),
        ('"words.txt"', '"none.txt"', "none.txt cannot be read: No such file"),
        ("http://127.0.0.1:9/v1/moderations", "file:///etc/passwd", "must have the form https://HOST/PATH"),
        ("http://127.0.0.1:9/v1/moderations", "https://user:pass@x/", "without user and query"),
        ("timeout-s = 1.5", "timeout-s = 0", "timeout-s must be a number of seconds up to 60"),
        ("timeout-s = 1.5", "timeout-s = nan", "timeout-s must be a number of seconds up to 60"),
        ('"gpt-oss-safeguard"', '"llama-guard"', "form llama-guard takes no policy"),
        ('policy = "policy.md"\n', "", "form gpt-oss-safeguard needs policy"),
        ("chunk-characters = 200", "chunk-characters = 1", "must be a whole number from 50 to 20000"),
        ('["DE"]', '["Germany"]', "unknown region 'Germany'"),
        ('may-choose = ["lenient"]', 'may-choose = ["none"]', "may-choose: there is no policy 'none'"),
        ("[checks.words]", "[checks.words]\nurl = 'http://x/'", "needs one of: words"),
        ("[policies.lenient]", "[policies.'a b']", "a name has letters, digits, dots and dashes"),
        ('blocked-users = ["u-1"]', "blocked-users = [1]", "blocked-users must be a list of at most"),
        ('default = "house"', "default = ", "it is not TOML"),
        ('default = "house"', f"default = {'9' * 5000}", "it is not TOML"),
    ],
)
def test_a_mistake_is_named(file: Path, old: str, new: str, fault: str) -> None:
    file.write_text(WHOLE.replace(old, new, 1))
    with pytest.raises(UsageError) as raised:
        read_policies(file)
    assert fault in str(raised.value)
    assert str(file) in str(raised.value)


def test_a_file_that_is_too_large_is_not_read_whole(file: Path) -> None:
    file.write_text("#" * (1 << 20) + "\n")
    with pytest.raises(UsageError, match="more than 1048576 bytes"):
        read_policies(file)
