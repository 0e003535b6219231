"""`argosy top`: the state of a running server, printed once, as JSON or redrawn; an error for an unusable server."""

from __future__ import annotations

import io
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from argosy.cli.commands import background, top
from argosy.cli.main import main
from argosy.cli.shared.remote import RemoteServer
from argosy.errors import ServerNotUsable
from tests.serve.fake_server import FakeServer, fake_server, stranger

Captured = pytest.CaptureFixture[str]

GOLDEN = """\
model     Qwen3-30B-A3B-Q4_K_M, qwen3_moe, at {url}
memory    peak 10.1 GiB, limit 12.0 GiB
  process                150 MiB   interpreter, libraries, tokenizer
  dense weights          1.1 GiB
  KV cache               3.0 GiB   32768 tokens
  working buffers        300 MiB   512 tokens a step
  staging               32.0 MiB   buffers for transcoding
  expert cache           6.9 GiB   2480 of 6144 experts (40 %)
speed     - tok/s decode, 148.0 tok/s prefill
experts   hit rate 0.83, 1500 of 6144 in memory, room for 2480
drive     0.00 GB/s, 11.4 GB read
requests  0 running of 4 at once, 0 waiting
KV        18 of 512 blocks in use, 40 kept for later
cache     over the last 512 tokens: hit rate 0.81, LRU 0.79, best possible 0.90
use       over 300 tokens; layer 12 is the most uneven: expert 5 has 20.9 % of its uses
privacy   prompts and answers are not logged; routing traces are off
"""


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with fake_server() as server:
        yield server


def test_once_prints_the_state_for_a_person(server: FakeServer, capsys: Captured) -> None:
    assert main(["top", "--url", server.url, "--once"]) == 0
    assert capsys.readouterr().out == GOLDEN.format(url=server.url)


@pytest.mark.parametrize("end", ["", "/"])
def test_a_server_may_have_a_base_path(end: str, server: FakeServer, capsys: Captured) -> None:
    server.base_path = "/local/moe"
    assert main(["top", "--url", server.url + end, "--once"]) == 0
    assert capsys.readouterr().out == GOLDEN.format(url=server.url)
    assert main(["top", "--url", server.url.removesuffix("/moe"), "--once"]) == 1
    assert "is not an Argosy server: it answers 404" in capsys.readouterr().err


def test_several_models_have_a_line_each(server: FakeServer, capsys: Captured) -> None:
    server.sharing = [
        {"id": "gpt-oss-20b", "state": "ready", "memory_bytes": 6 << 30, "running": 2},
        {"id": "a\x1b[2J", "state": "loading", "memory_bytes": 3 << 30, "running": 0},
        {"id": "GLM-4.7-Flash", "state": "unloaded", "memory_bytes": 0, "running": 0},
    ]
    assert main(["top", "--url", server.url, "--once"]) == 0
    said = capsys.readouterr().out
    assert (
        said.partition("models ")[2].partition("speed ")[0]
        == """\
   1 of 3 in memory
  gpt-oss-20b            6.0 GiB   ready, 50 % of the limit, 2 running
  a\\x1b[2J               3.0 GiB   loading, 25 % of the limit
  GLM-4.7-Flash                -   unloaded
"""
    )
    server.sharing = server.sharing[:1]
    assert main(["top", "--url", server.url, "--once"]) == 0
    assert capsys.readouterr().out == GOLDEN.format(url=server.url)


def test_a_running_prompt_has_a_line_with_what_is_done_and_the_time_to_go(server: FakeServer) -> None:
    reading = {
        "id": "req_1", "prompt_tokens": 22851, "prompt_done": 9216, "answer_tokens": 0, "tok_per_s": 61.25,
        "seconds_left": 222.6,
    }  # fmt: skip
    answering = {
        "id": "req_2",
        "prompt_tokens": 12,
        "prompt_done": 12,
        "answer_tokens": 1200,
        "tok_per_s": None,
    }
    hostile = {"id": "a\x1b[2J", "prompt_tokens": 10**400, "seconds_left": 10**400, "tok_per_s": "x"}
    server.prompts = [reading, answering, hostile, *[answering] * 3]
    server.waits = [
        {"id": "req_7", "why": "turn", "ahead": 0}, {"id": "req_8", "why": "model", "ahead": 1, "share_done": 0.25},
        {"id": "req_9", "why": "turn"},
    ]  # fmt: skip
    lines = top.state_lines(server.state(), server.url)
    at = next(number for number, line in enumerate(lines) if line.startswith("requests"))
    assert lines[at + 1 : at + 4] == [
        "  req_1  prompt 9,216 of 22,851 tokens (40 %), about 4 min left, 61.2 tok/s",
        "  req_2  prompt 12 tokens, answer 1,200",
        "  a\\x1b[2J  prompt 0 tokens, answer 0, - tok/s",
    ]
    assert lines[at + 7 : at + 10] == [
        "  req_7  waits for its turn",
        "  req_8  waits for the model to load (25 %), 1 before it",
        "  and 1 more",
    ]


@pytest.mark.parametrize(
    ("state", "owned", "resident", "said"),
    [
        ("ready", 253, 360, "owns 253 experts, all in memory"),  # it has files of others, too
        ("ready", 6016, 1570, "owns 6016 experts, 1570 in memory"),
        ("away", 360, 0, "owns 360 experts"),
        ("draining", 0, 360, "owns no experts"),
    ],
)
def test_a_worker_has_the_experts_that_it_owns(state: str, owned: int, resident: int, said: str) -> None:
    worker = {"host": "10.0.0.2:7070", "state": state, "experts_owned": owned, "resident": resident}
    (line,) = top.worker_lines([worker])
    assert line.startswith(f"{'10.0.0.2:7070':<22}{state:<10} {said}, hits -")


def test_where_there_is_no_terminal_it_prints_once(server: FakeServer, capsys: Captured) -> None:
    assert main(["top", "--url", server.url + "/"]) == 0
    assert capsys.readouterr().out == GOLDEN.format(url=server.url)


def test_json_is_the_servers_own_object(server: FakeServer, capsys: Captured) -> None:
    assert main(["top", "--url", server.url, "--once", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == server.state()


def test_the_stream_brings_later_states(server: FakeServer) -> None:
    states = RemoteServer(server.url).states()
    first = next(states)
    server.tokens += 100
    later = (state["heat"]["tokens"] for state in states)
    assert next(tokens for tokens in later if tokens != first["heat"]["tokens"]) == 400


def test_missing_facts_are_dashes_and_escape_sequences_in_a_state_do_not_reach_the_terminal() -> None:
    state = {
        "model": {"id": "a\x1b[2Jb\nc"},
        "memory": {"lines": [{"name": "x"}]},
        "experts": {},
        "heat": None,
    }
    lines = top.state_lines(state, "http://h")
    assert lines[0] == "model     a\\x1b[2Jb\\nc, -, at http://h"
    assert lines[1] == "memory    peak -, limit -"
    assert lines[3] == "speed     - tok/s decode, - tok/s prefill"
    assert not any("\x1b" in line or "\n" in line for line in lines)


HOSTILE = [
    10**400, -(10**400), 10**300, -1, 1e308, float("nan"), float("inf"), "\x1b]0;owned\x07\x1b[2J\u202e" * 1000, None,
    True, [], {}, [[]], [None], ["\x1b[2J"], {"id": "\x1b"}, [[10**400, "x"]],
]  # fmt: skip


def replaced(state: Any, value: object) -> Iterator[Any]:
    """The state, each time with this value in another place."""
    for key in state if isinstance(state, dict) else range(len(state)):
        yield type(state)({**state, key: value} if isinstance(state, dict) else [value])
        if isinstance(state[key], dict | list) and key != "layers":
            for inner in replaced(state[key], value):
                yield {**state, key: inner} if isinstance(state, dict) else [inner]


@pytest.mark.parametrize("value", HOSTILE, ids=range(len(HOSTILE)))
def test_a_state_of_any_form_is_shown_in_printable_lines_of_bounded_length(value: object) -> None:
    entry = {"id": "x", "state": "ready", "memory_bytes": 1, "unloads_in_s": 1.0, "running": 1, "waiting": 1}
    known = {
        "model": {"id": "x", "family": "y"}, "models": [entry, entry],
        "memory": {"budget_bytes": 1, "peak_bytes": 1, "lines": [{"name": "x", "bytes": 1, "note": "y"}]},
        "speed": {"decode_tok_per_s": 1.0, "prefill_tok_per_s": 1.0},
        "experts": {"total": 1, "slots": 1, "resident": 1, "hit_rate": 1.0, "bytes_read": 1, "drive_bytes_per_s": 1.0},
        "recent": {"tokens": 1, "hit_rate": 1.0, "lru": 1.0, "optimum": 1.0},
        "queue": {"running": 1, "waiting": 1, "max_sequences": 1},
        "running": [{
            "id": "x", "prompt_tokens": 2, "prompt_done": 1, "answer_tokens": 1, "tok_per_s": 1.0, "seconds_left": 1.0,
        }],
        "waiting": [{"id": "x", "why": "turn", "ahead": 1, "share_done": 1.0}],
        "kv": {"blocks_total": 1, "blocks_used": 1, "blocks_cached": 1},
        "heat": {"tokens": 1, "layers": [[1, 2]]},
        "workers": [{
            "host": "x", "state": "ready", "why": "y", "experts_owned": 1, "resident": 1, "hit_rate": 1.0, "p50_us": 1,
            "p99_us": 1, "bytes_in": 1, "bytes_out": 1, "experts_rerouted": 1,
        }],
        "privacy": {"logging": False, "traces": False},
    }  # fmt: skip
    console = Console(file=io.StringIO(), width=100, height=40)
    for state in replaced(known, value):
        shown = [*top.state_lines(state, "http://h"), *background._state_lines(state)]
        shown += [
            text.plain for text in top._Screen(state, "http://h").__rich_console__(console, console.options)
        ]
        for line in shown:
            assert line.isprintable()
            assert len(line) < 1000


# Redrawn in place


def test_the_bar_gives_every_nonempty_part_its_share_and_at_least_one_cell() -> None:
    lines = [
        {"name": "process", "bytes": 1},
        {"name": "dense weights", "bytes": 499},
        {"name": "staging", "bytes": 0},
    ]
    bar = top.memory_bar({"budget_bytes": 1000, "lines": lines}, 40)
    assert bar.plain == "█" * 20 + "·" * 20
    assert [(span.start, span.end) for span in bar.spans if span.end > span.start][:2] == [(0, 1), (1, 20)]


def test_the_use_of_experts_is_shaded_by_layer_and_fits_the_screen() -> None:
    assert top.heat_rows([[0, 1, 4, 16], [5, 5, 5, 5]], 80, 10) == [" ··▓", "░░░░"]
    rows = top.heat_rows([[1] * 384] * 60, 100, 20)
    assert len(rows) == 20
    assert {len(row) for row in rows} == {100}


def test_top_waits_for_a_lost_server_and_shows_the_age_of_its_last_state(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, height=40)
    monkeypatch.setattr("rich.live.get_console", lambda: console)
    asked = []

    def states(self: RemoteServer) -> Iterator[dict[str, object]]:
        asked.append(self.url)
        if len(asked) == 3:
            raise KeyboardInterrupt
        if len(asked) == 2:
            raise ServerNotUsable("nothing answers there")
        yield server.state()

    monkeypatch.setattr(RemoteServer, "states", states)
    slept: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + sum(slept), sleep=slept.append)
    monkeypatch.setattr(top, "time", clock)
    top.watch(RemoteServer(server.url))  # ^C ends it silently
    shown = screen.getvalue()
    assert "has ended the stream; this state is 0 s old" in shown
    assert "nothing answers there; this state is " in shown
    assert "expert cache" in shown
    assert len(asked) == 3


# Servers that cannot be used


def test_an_address_where_nothing_listens_is_an_error(capsys: Captured) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert main(["top", "--url", f"http://127.0.0.1:{port}", "--once"]) == 1
    err = capsys.readouterr().err
    assert err.startswith(
        f"error: nothing answers at http://127.0.0.1:{port}: Connection refused\nhint: `argosy up"
    )


def test_a_missing_and_a_wrong_key_are_told_apart(
    server: FakeServer, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = "sk-right"
    assert main(["top", "--url", server.url, "--once"]) == 1
    assert capsys.readouterr().err.startswith(f"error: {server.url} needs a key\nhint: set ARGOSY_API_KEY")
    monkeypatch.setenv("ARGOSY_API_KEY", "sk-wrong")
    assert main(["top", "--url", server.url, "--once"]) == 1
    assert capsys.readouterr().err.startswith(f"error: {server.url} refuses the key\n")
    monkeypatch.setenv("ARGOSY_API_KEY", "sk-right")
    assert main(["top", "--url", server.url, "--once"]) == 0


def test_a_refusal_that_is_not_about_the_key_is_told_in_the_servers_words() -> None:
    said = "the server does not answer to this host name\nhint: start it with --allow-host NAME"
    body = json.dumps({"error": {"message": said}}).encode()
    head = f"HTTP/1.1 403 Forbidden\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    with (
        stranger(head + body) as url,
        pytest.raises(ServerNotUsable, match="answers 403: the server does not"),
    ):
        RemoteServer(url, "ak-x").state()


def test_the_hint_and_the_lines_of_a_servers_error_are_told_as_such() -> None:
    said = "needs 2.0 GiB\n  weights 1.5 GiB\x1b[2J\nhint: ask for more"
    body = json.dumps({"error": {"message": said}}).encode()
    head = f"HTTP/1.1 409 Conflict\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    with stranger(head + body) as url, pytest.raises(ServerNotUsable) as refused:
        RemoteServer(url).resize("1GiB")
    assert str(refused.value) == (
        f"{url} answers 409: needs 2.0 GiB\n  weights 1.5 GiB\\x1b[2J\nhint: ask for more"
    )


def test_a_key_file_overrides_the_environment(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = "sk-right"
    monkeypatch.setenv("ARGOSY_API_KEY", "sk-wrong")
    key_file = tmp_path / "key"
    key_file.write_text("sk-right\n")
    assert main(["top", "--url", server.url, "--once", "--key-file", str(key_file)]) == 0


@pytest.mark.parametrize("text", ["", "two words", "new\r\nX-Header: 1", "schl\u00fcssel"])
def test_an_invalid_key_is_never_sent_as_a_header(
    text: str, server: FakeServer, tmp_path: Path, capsys: Captured
) -> None:
    key_file = tmp_path / "key"
    key_file.write_text(text, encoding="utf-8")
    assert main(["top", "--url", server.url, "--once", "--key-file", str(key_file)]) == 2
    assert "must contain a key" in capsys.readouterr().err
    assert server.requests == []


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", "its answer is not JSON"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "its state cannot be read"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "it answers 404 to /v1/engine/state"),
        (
            b"HTTP/1.1 302 Found\r\nLocation: http://example.org/\r\nContent-Length: 0\r\n\r\n",
            "it answers 302",
        ),
        (
            b'HTTP/1.1 404 Not Found\r\nContent-Length: 32\r\n\r\n{"error":{"message":"no model"}}',
            "it answers 404 to /v1/engine/state",
        ),
        (b"SSH-2.0-OpenSSH_9.9\r\n", "it does not speak HTTP"),
    ],
)
def test_another_program_at_the_address_is_reported_as_not_argosy(
    answer: bytes, sentence: str, capsys: Captured
) -> None:
    with stranger(answer) as url:
        assert main(["top", "--url", url, "--once"]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: {url} is not an Argosy server: {sentence}")
    assert "hint: another program may listen there" in err


def test_a_servers_own_error_message_is_passed_on(capsys: Captured) -> None:
    body = b'{"error":{"message":"the model is still being read"}}'
    with stranger(b"HTTP/1.1 503 Busy\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)) as url:
        assert main(["top", "--url", url, "--once"]) == 1
    assert capsys.readouterr().err == f"error: {url} answers 503: the model is still being read\n"


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("127.0.0.1:8080", "--url must be a server's address, found '127.0.0.1:8080'"),
        ("http://", "must be a server's address"),
        ("http://h:port", "must be a server's address"),
        ("http://foo..bar", "must be a server's address"),
        (f"http://{'a' * 64}.example", "must be a server's address"),
        ("ftp://h", "must be a server's address"),
        (
            "http://h:1/v1",
            "--url must be an address, or one with the server's --base-path, found 'http://h:1/v1'\n"
            "hint: http://h:1\n",
        ),
        ("http://h:1/moe/v1/", "hint: http://h:1/moe\n"),
        ("http://user:secret@h:1/moe", "hint: http://h:1/moe\n"),
        ("http://h/?x=1", "must be an address, or one with"),
        ("http://h/a//b", "must be an address, or one with"),
        ("http://h/a b", "must be an address, or one with"),
        ("http://h/%2e%2e", "must be an address, or one with"),
    ],
)
def test_an_invalid_address_is_refused(url: str, sentence: str, capsys: Captured) -> None:
    assert main(["top", "--url", url]) == 2
    assert sentence in capsys.readouterr().err
