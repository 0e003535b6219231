"""`argosy run` and `chat` let a server answer that has the model: the same text, and a line that says who answers."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from argosy.cli.main import main
from argosy.cli.shared import own_server, server_model
from argosy.cli.shared.remote import RemoteServer
from argosy.cli.shared.server_model import Followed, ServerModel, part_of
from argosy.cli.shared.server_model import _sent as sent_messages
from argosy.library import names
from argosy.media.parts import Content, Kind
from argosy.serve.answer.media_parts import media_in
from argosy.serve.dialects.openai_chat_bodies import ChatBody
from tests.cli.terminal import on_terminal
from tests.cli.tiny_chat_model import write_chat_model
from tests.helpers.command import run_argosy
from tests.helpers.forks import argosy_command
from tests.library.caches import add_to_hub
from tests.serve.fake_server import fake_server

Captured = pytest.CaptureFixture[str]
SEEN = (
    "HF_HOME",
    "OLLAMA_MODELS",
    "HOME",
    "XDG_CACHE_HOME",
    "XDG_DATA_HOME",
    "XDG_STATE_HOME",
    "ARGOSY_CACHE",
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A user whose server has the library: one model, `Acme/One`."""
    home = tmp_path_factory.mktemp("home")
    add_to_hub(home / "HF_HOME" / "hub", "Acme/One", write_chat_model(home / "files" / "model"))
    command = ["up", "--no-systemd", "--port", "0", "--memory", "1GiB", "--threads", "1"]
    with pytest.MonkeyPatch.context() as patch:
        for name in SEEN:
            patch.setenv(name, str(home / name))
        done = run_argosy(*command, timeout_s=120)
    assert done.returncode == 0, done.stderr
    yield home
    os.kill(int(done.stdout.rpartition(" ")[2]), signal.SIGKILL)


@pytest.fixture(autouse=True)
def user(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SEEN:
        monkeypatch.setenv(name, str(home / name))


def address() -> str:
    process = own_server.running()
    assert process is not None
    return process.address


@pytest.mark.parametrize(
    "options",
    [
        ("-t", "0", "-n", "12", "The sea"),
        ("-t", "0.8", "--top-p", "0.9", "--seed", "7", "-n", "12", "The sea"),
        ("-t", "0", "-n", "12", "--system", "Be brief.", "The sea"),
        ("-t", "0", "-n", "12", "--raw", "The sea"),
        (
            "-t",
            "0",
            "-n",
            "9",
            "--ignore-eos",
            "--repetition-penalty",
            "1.3",
            "--logit-bias",
            "65=5",
            "The sea",
        ),
        ("-t", "0", "The sea"),  # to the end of the context
    ],
)
def test_the_text_is_the_same_with_and_without_the_server(options: tuple[str, ...], capfd: Captured) -> None:
    assert main(["run", "-m", "one", *options]) == 0
    served = capfd.readouterr()
    assert f"using the server at {address()}: Acme/One is " in served.err
    assert main(["run", "-m", "one", "--no-server", "--memory", "1GiB", "--threads", "1", *options]) == 0
    alone = capfd.readouterr()
    assert "server" not in alone.err
    assert served.out == alone.out != ""


def test_a_schema_passes_through_and_a_cut_answer_is_an_error_of_both(
    tmp_path: Path, capfd: Captured
) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(
        json.dumps({"type": "object", "properties": {"a": {"enum": ["yes"]}}, "required": ["a"]})
    )
    question = ["run", "-q", "-m", "one", "-t", "0", "-n", "12", "--json-schema", str(schema), "The sea"]
    said = []
    for options in ([], ["--no-server", "--memory", "1GiB", "--threads", "1"]):
        assert main([*question, *options]) == 2  # a random model writes blanks until the limit
        said.append(capfd.readouterr())
    assert said[0].out == said[1].out
    assert said[0].err == said[1].err.removeprefix("note: one is Acme/One\n")
    assert "12 tokens" in said[0].err


def test_what_a_server_cannot_honour_is_done_here_and_said_and_with_url_it_is_an_error(
    capfd: Captured,
) -> None:
    question = ["run", "-q", "-m", "one", "-t", "0", "-n", "2", "The sea"]
    for options, told in (
        (["--memory", "1GiB"], "has settings of its own, and --memory is for a model that is loaded here"),
        (["--logprobs", "1"], "has settings of its own, and --logprobs is for a model that is loaded here"),
    ):
        assert main([*question, *options]) == 0
        assert f"note: the server at {address()} {told}" in capfd.readouterr().err.replace(
            "--memory is", "--memory is"
        )
        assert main([*question, *options, "--url", address()]) == 2
        assert told in capfd.readouterr().err
    assert main([*question, "--url", address()]) == 0
    assert main([*question, "--url", address(), "--no-server"]) == 2
    assert main(["run", "-q", "-m", "other", "--url", address(), "x"]) == 2
    assert "does not have other" in capfd.readouterr().err
    assert main(["run", "-q", "-m", "one", "--url", "http://127.0.0.1:9", "x"]) == 1


@pytest.mark.parametrize("name", ["a.png", "a.JPG", "a.webp", "a.wav", "a.mp3", "a.mp4", "a.mkv", "a"])
def test_media_are_parts_that_the_server_reads(name: str) -> None:
    data = b"\x00\x01 media"
    kind: Kind = "sound" if name.endswith(("wav", "mp3")) else "video" if "m" in name[2:3] else "picture"
    part = part_of(Content(kind, data, b""), Path(name))
    body = ChatBody.model_validate({"model": "m", "messages": [{"role": "user", "content": [part]}]})
    (found,) = media_in(body)
    assert (found.KIND, base64.b64decode(found.data().text[found.data().start :])) == (kind, data)


def test_a_path_is_loaded_here_and_never_sent(home: Path, capfd: Captured) -> None:
    path = str(home / "files" / "model")
    question = ["-q", "-t", "0", "-n", "2", "The sea"]
    assert main(["run", "-m", path, *question]) == 0
    assert f"takes names of models, and {path} is a path" in capfd.readouterr().err
    names.add_alias("mine", path)  # a name again
    assert main(["run", "-m", "mine", *question]) == 0
    assert "is a path" not in capfd.readouterr().err


def test_a_refused_request_has_the_exit_code_and_the_words_of_a_local_one(capfd: Captured) -> None:
    assert main(["run", "-q", "-m", "one", "long " * 500]) == 2
    error = capfd.readouterr().err
    assert "maximum context length is 256 tokens" in error
    assert "\nhint: shorten the prompt" in error


def test_a_request_at_a_server_is_followed_from_its_wait_to_its_last_token_of_the_prompt() -> None:
    with fake_server() as server:
        followed = Followed(RemoteServer(server.url), "one")
        server.prompts = [{"id": "req_1", "prompt_tokens": 10, "prompt_done": 1}]
        server.waits = [{"id": "req_3", "model": "other", "why": "model"}]
        assert followed.read() is None
        server.waits.append(
            {"id": "req_2", "model": "one", "why": "model", "seconds": 7.4, "ahead": 0, "share_done": 0.5}
        )
        assert followed.read() == ("waits for the model to load, 7 s", 0.5, None)
        followed.begin("req_2")
        server.waits = [{"id": "req_2", "model": "one", "why": "turn", "seconds": 9.0, "ahead": 2}]
        assert followed.read() == ("waits for its turn, 2 before it, 9 s", None, None)
        server.prompts.append({"id": "req_2", "prompt_tokens": 40, "prompt_done": 10, "seconds_left": 90.0})
        assert followed.read() == ("prompt 10 of 40 tokens", 0.25, 90.0)
        server.key = "other"  # from now on, no state
        assert followed.read() is None
        num_requests = len(server.requests)
        assert followed.read() is None
        assert len(server.requests) == num_requests


def test_a_request_learns_its_id_when_its_stream_begins(home: Path) -> None:
    ids: list[str | None] = []
    body = {"model": "Acme/One", "prompt": "hello", "max_tokens": 2, "stream": True}
    for chunk in RemoteServer(address()).answers("/v1/completions", body, ids.append):
        assert chunk["object"] == "text_completion"
    (request_id,) = ids
    assert request_id is not None
    assert request_id.startswith("req_")


# Chats

Typed = Callable[..., tuple[str, str]]
HERE = ("--no-server", "--memory", "1GiB", "--threads", "1")


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch, capfd: Captured) -> Typed:
    """Types lines into a chat with `one`; returns stdout and stderr."""

    def run(*lines: str, options: tuple[str, ...] = ()) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
        assert main(["chat", "one", "-t", "0", *options]) == 0
        captured = capfd.readouterr()
        return captured.out, captured.err

    return run


def facts_of(err: str) -> list[str]:
    """What a chat said, without the lines that tell where its model is and how fast."""
    lines = re.sub(
        r"This model's maximum context length.*|the prompt has \d+ tokens, and the context.*", "too long", err
    ).splitlines()
    return [
        line for line in lines if not re.match(r"note: one is|using the server|\S+: .*context of|\[\d", line)
    ]


def test_a_chat_through_the_server_is_the_chat_with_the_model_itself(chat: Typed, tmp_path: Path) -> None:
    saved, loaded = tmp_path / "talk.json", tmp_path / "loaded.json"
    loaded.write_text(
        json.dumps([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}])
    )
    lines = (
        "Hi", "/continue", "And now?", "/continue", "/tokens", "/think", "/system Be brief.", "/retry", "word " * 400,
        "/trim 90%", f"/save {saved}", "/continue", f"/load {loaded}", "/continue", "/tokens", "/model", "/reset",
        "/continue", "Hi",
    )  # fmt: skip
    options = ("-n", "9", "--ignore-eos", "--repetition-penalty", "1.2")
    served = chat(*lines, options=options)
    talk = json.loads(saved.read_text())
    assert f"using the server at {address()}: Acme/One is in memory" in served[1]
    alone = chat(*lines, options=(*options, *HERE))
    assert served[0] == alone[0]
    assert facts_of(served[1]) == facts_of(alone[1])
    assert json.loads(saved.read_text()) == talk


def test_an_answer_of_the_server_goes_on_token_for_token(chat: Typed, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"

    def talk(*lines: str, options: tuple[str, ...]) -> object:
        chat(*lines, f"/save {saved}", options=("--ignore-eos", *options))
        return json.loads(saved.read_text())

    for sampled in ((), ("-t", "0.9", "--seed", "4")):
        whole = talk("Hi", options=("-n", "24", *sampled))
        assert talk("Hi", "/continue", "/continue", options=("-n", "8", *sampled)) == whole
        assert talk("Hi", options=("-n", "24", *sampled, *HERE)) == whole
        assert talk("Hi", "/continue", options=("-n", "12", *sampled, *HERE)) == whole


@pytest.mark.parametrize("policy", ["trim", "summarise"])
def test_a_full_context_is_handled_at_the_server_as_it_is_here(chat: Typed, policy: str) -> None:
    lines = ("word " * 20, "word " * 20, "word " * 20, "/tokens")
    options = ("-n", "60", "--ignore-eos", "--context-policy", policy)
    served, alone = chat(*lines, options=options), chat(*lines, options=(*options, *HERE))
    assert served[0] == alone[0]
    assert facts_of(served[1]) == facts_of(alone[1])
    assert "to make room" in served[1]


def test_a_picture_of_a_chat_is_sent_as_a_part(chat: Typed, tmp_path: Path) -> None:
    picture = tmp_path / "cat.png"
    picture.write_bytes(b"\x89PNG")
    for options in ((), HERE):
        _, err = chat(f"/image {picture}", options=options)
        assert "error: " in err  # this model is blind
    message = {
        "role": "user",
        "content": [Content("picture", b"\x89PNG", b""), {"type": "text", "text": "What?"}],
    }
    (sent,) = sent_messages([message])
    body = ChatBody.model_validate({"model": "m", "messages": [sent]})
    (found,) = media_in(body)
    assert found.KIND == "picture"


def test_json_comes_from_the_server_with_its_ledger(capfd: Captured) -> None:
    for options in (("The sea",), ("--raw", "The sea")):
        question = ["run", "-q", "-m", "one", "-t", "0", "-n", "7", "--ignore-eos", "--json", *options]
        assert main(question) == 0
        served = json.loads(capfd.readouterr().out)
        assert main([*question, *HERE]) == 0
        alone = json.loads(capfd.readouterr().out)
        assert served.keys() == alone.keys()
        for name in ("text", "reasoning", "token_ids", "finish_reason", "hears"):
            assert served[name] == alone[name]
        assert served["usage"]["total_tokens"] == alone["usage"]["total_tokens"]
        assert served["ledger"].keys() == alone["ledger"].keys()
        assert served["ledger"]["new_tokens"] == 7
        assert served["plan"] is None


# A server that is slow, busy, or lost


class Scripted(ThreadingHTTPServer):
    """A server with the model `one`: each chat request takes the next of `script`, which writes the answer.

    Attributes:
        asked: bodies of chat requests.
        num_listed: how often its models were asked for.
        has_left: a client has closed its connection while its answer was not complete.
    """

    def __init__(self, *script: Callable[[Any], None]) -> None:
        super().__init__(("127.0.0.1", 0), Answering)
        self.script = iter(script)
        self.asked: list[dict[str, Any]] = []
        self.num_listed = 0
        self.has_left = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answering(BaseHTTPRequestHandler):
    server: Scripted

    def do_GET(self) -> None:
        request = {
            "id": "req_1",
            "prompt_tokens": 200,
            "prompt_done": 50,
            "answer_tokens": 0,
            "seconds_left": 20.0,
        }
        entry = {
            "id": "one",
            "state": "ready",
            "context_length": 256,
            "supported_parameters": ["enable_thinking"],
        }
        state = {"memory": {}, "experts": {}, "running": [request]}
        self.server.num_listed += self.path == "/v1/models"
        self.reply({"data": [entry]} if self.path == "/v1/models" else state)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/tokenize":
            self.reply({"count": 40})
            return
        self.server.asked.append(body)
        next(self.server.script)(self)

    def reply(self, answer: object, status: int = 200, **headers: str) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def begin(self) -> None:
        self.send_response(200)
        self.send_header("x-request-id", "req_1")
        self.send_header("connection", "close")
        self.end_headers()

    def say(self, text: str, *token_ids: int, num_new: int = 1, finish: str | None = None) -> None:
        choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish, "token_ids": token_ids}
        usage = {"prompt_tokens": 40, "completion_tokens": num_new, "total_tokens": 40 + num_new}
        self.wfile.write(b"data: " + json.dumps({"choices": [choice], "usage": usage}).encode() + b"\n\n")
        self.wfile.flush()

    def end(self) -> None:
        self.wfile.write(b"data: [DONE]\n\n")

    def wait_until_left(self) -> None:
        if not self.connection.recv(1):
            self.server.has_left.set()

    def log_message(self, *_: object) -> None:
        """Nothing: stderr is the chat's."""


@contextmanager
def scripted(*script: Callable[[Any], None]) -> Iterator[Scripted]:
    with Scripted(*script) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def says_whole(handler: Answering) -> None:
    handler.begin()
    handler.say("Yes", 5)
    handler.say(".", 6, num_new=2, finish="stop")
    handler.end()


def says_a_part_and_waits(handler: Answering) -> None:
    handler.begin()
    handler.say("Yes", 5)
    handler.wait_until_left()


def goes_on(handler: Answering) -> None:
    handler.begin()
    handler.say("Yes", 5, num_new=0)  # what the answer began with
    handler.say(", I do.", 7, finish="stop")
    handler.end()


def test_an_interrupt_leaves_the_server_at_once_and_the_answer_goes_on_from_its_tokens(
    tmp_path: Path,
) -> None:
    saved = tmp_path / "talk.json"
    with scripted(says_a_part_and_waits, goes_on) as server:
        command = [argosy_command, "chat", "one", "--url", server.url]
        with on_terminal(command, {"NO_COLOR": "1"}) as terminal:
            terminal.until(f"using the server at {server.url}: one is in memory".encode())
            terminal.until(b">")
            terminal.send(b"Hi\r")
            terminal.until(b"Yes")
            terminal.send(b"\x03")
            terminal.until(b"(stopped; /continue goes on)")
            assert server.has_left.wait(30)
            terminal.until(b">")
            terminal.send(b"/continue\r")
            terminal.until(b", I do.")
            terminal.until(b"[41 of 256 tokens of context")
            terminal.until(b">")
            terminal.send(f"/save {saved}\r".encode())
            terminal.until(b"2 messages saved")
    assert "continue_token_ids" not in server.asked[0]
    assert server.asked[1]["continue_token_ids"] == [5]
    assert server.asked[1]["seed"] == server.asked[0]["seed"]
    assert [one["content"] for one in json.loads(saved.read_text())] == ["Hi", "Yes, I do."]


@pytest.mark.parametrize(
    "command", [["chat", "one"], pytest.param(["run", "-m", "one", "Hi"], marks=pytest.mark.full)]
)
def test_the_progress_of_a_prompt_at_the_server_is_a_bar(command: list[str]) -> None:
    def reads_long(handler: Answering) -> None:
        handler.begin()
        assert may_answer.wait(60)
        handler.say("Yes", 5, finish="stop")
        handler.end()

    may_answer = threading.Event()
    with scripted(reads_long) as server:
        whole = [argosy_command, *command, "--url", server.url]
        with on_terminal(whole, {"NO_COLOR": "1", "COLUMNS": "120"}) as terminal:
            if command[0] == "chat":
                terminal.until(b">")
                terminal.send(b"Hi\r")
            terminal.until(b"prompt 50 of 200 tokens")
            terminal.until(b"about 20 s left")
            may_answer.set()
            terminal.until(b"Yes")


def test_a_busy_server_is_asked_again_and_a_line_says_so(
    chat: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + sum(slept), sleep=slept.append)
    monkeypatch.setattr(server_model, "time", clock)

    def is_busy(handler: Answering) -> None:
        handler.reply({"error": {"message": "1 waiting, and the limit is 1"}}, 429, retry_after="1")

    with scripted(is_busy, is_busy, says_whole) as server:
        out, err = chat("Hi", options=("--url", server.url))
    assert out == "Yes.\n"
    assert err.count("1 waiting, and the limit is 1; retrying until it is free") == 1
    assert "error" not in err
    assert len(server.asked) == 3
    assert sum(slept) > 1.7  # a second before each


def test_what_came_before_the_server_was_lost_is_kept_and_goes_on(chat: Typed, tmp_path: Path) -> None:
    def is_lost(handler: Answering) -> None:
        handler.begin()
        handler.say("Yes", 5)

    def is_lost_at_once(handler: Answering) -> None:
        handler.begin()

    saved = tmp_path / "talk.json"
    with scripted(is_lost, goes_on, is_lost_at_once, says_whole) as server:
        out, err = chat("Hi", "/continue", "And?", "/retry", f"/save {saved}", options=("--url", server.url))
    assert "ended before its answer did" in err
    assert "(what has come is kept; /continue goes on)" in err
    assert out == "Yes\n, I do.\nYes.\n"
    assert server.asked[1]["continue_token_ids"] == [5]
    talk = json.loads(saved.read_text())
    assert [one["content"] for one in talk] == ["Hi", "Yes, I do.", "And?", "Yes."]


def test_a_conversation_can_be_saved_while_no_server_answers(chat: Typed, tmp_path: Path) -> None:
    def ends(handler: Answering) -> None:
        handler.begin()
        handler.say("Yes", 5)
        handler.server.socket.close()  # nobody listens any more

    saved = tmp_path / "talk.json"
    with scripted(ends) as server:
        _, err = chat("Hi", "And?", "/tokens", f"/save {saved}", options=("--url", server.url))
    assert err.count("nothing answers at") == 2
    assert [one["content"] for one in json.loads(saved.read_text())] == ["Hi", "Yes"]


def test_a_chat_whose_server_has_ended_loads_the_model_itself(
    chat: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_lost(handler: Answering) -> None:
        handler.begin()
        process.clear()

    process = [own_server.Process(1, 1, 0.0, "http://127.0.0.1:8080")]
    with scripted(says_whole, is_lost) as server:
        monkeypatch.setattr(own_server, "found", lambda: process[0] if process else None)
        monkeypatch.setattr(own_server, "socket_url", lambda: server.url)
        _, err = chat("Hi", "And?", "/retry", "/ledger", options=("-n", "4"))
    assert "using the server at http://127.0.0.1:8080: one is in memory" in err
    assert "ended before its answer did" in err
    assert "of memory planned" in err  # said of a model that is loaded here
    assert "4 new, length" in err
    assert "experts" in err.partition("since the start")[2]  # an engine of its own


def test_a_server_may_tell_nothing_useful_and_the_chat_goes_on(chat: Typed) -> None:
    def is_odd(handler: Answering) -> None:
        handler.begin()
        for chunk in (
            {"choices": None, "usage": [], "timings": {"parts": 1, "wall_s": "x", "drive_energy_j": [1]}},
            {
                "choices": [
                    None,
                    {"delta": 5},
                    {"delta": {"content": 3}, "token_ids": "x", "finish_reason": 7},
                ]
            },
            {
                "choices": [{"delta": {"content": "Yes"}, "token_ids": [None, "a"]}],
                "usage": {"total_tokens": "x"},
            },
        ):
            handler.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        handler.end()

    with scripted(is_odd) as server:
        out, err = chat("Hi", "/ledger", "/continue", options=("--url", server.url))
    assert out == "Yes\n"
    assert "the last answer ended by itself" in err


def test_a_model_that_the_server_has_no_more_is_said_and_found_again(chat: Typed) -> None:
    def has_another(handler: Answering) -> None:
        told = 'there is no model "one"; the models of this server: two'
        handler.reply({"error": {"message": told, "code": "model_not_found"}}, 404)

    with scripted(has_another, says_whole) as server:
        out, err = chat("Hi", "/retry", options=("-q", "--url", server.url))
        listed = server.num_listed
    assert 'answers 404: there is no model "one"; the models of this server: two' in err
    assert "not an Argosy server" not in err
    assert (out, listed) == ("Yes.\n", 2)


def test_an_interrupt_ends_what_a_command_asks_the_server_and_not_the_chat(
    chat: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the server loads a model, its tokens of a conversation may take minutes."""
    ask, asked = RemoteServer.tokenize, []

    def interrupted(server: RemoteServer, body: dict[str, Any], *more: Any) -> int:
        asked.append(body)
        if len(asked) < 3:
            signal.raise_signal(signal.SIGINT)
        return ask(server, body, *more)

    monkeypatch.setattr(RemoteServer, "tokenize", interrupted)
    with scripted(says_whole, says_whole) as server:
        out, err = chat("Hi", "/tokens", "/trim", "/tokens", "And?", options=("-q", "--url", server.url))
    assert err.count("(stopped)") == 2
    assert "tokens   40 used" in err
    assert out == "Yes.\nYes.\n"


def test_an_interrupt_while_the_server_loads_another_model_keeps_the_first(
    chat: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(model: ServerModel) -> ServerModel:
        if model.name == "ONE":
            signal.raise_signal(signal.SIGINT)
        return model

    monkeypatch.setattr(ServerModel, "loaded", interrupted)
    with scripted(says_whole) as server:
        out, err = chat("/model ONE", "Hi", options=("-q", "--url", server.url))
    assert "error: ONE was not opened" in err
    assert out == "Yes.\n"
