"""`argosy run` lets a server answer that has the model: the same text, and a line that says who answers."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from argosy.cli import own_server
from argosy.cli.main import main
from argosy.cli.remote import Server
from argosy.cli.server_model import Followed, part_of
from argosy.library import names
from argosy.media.parts import Content, Kind
from argosy.serve.media_parts import media_in
from argosy.serve.openai_chat import ChatBody
from tests.cli.tiny_chat_model import write_chat_model
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
    environment = {**os.environ, **{name: str(home / name) for name in SEEN}}
    command = [sys.executable, "-m", "argosy", "up", "--port", "0", "--memory", "1GiB", "--threads", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
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
        (["--json"], "has settings of its own, and --json is for a model that is loaded here"),
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
        followed = Followed(Server(server.url), "one")
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
    for chunk in Server(address()).answers("/v1/completions", body, ids.append):
        assert chunk["object"] == "text_completion"
    (request_id,) = ids
    assert request_id is not None
    assert request_id.startswith("req_")
