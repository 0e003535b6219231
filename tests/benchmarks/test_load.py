"""The load test asks questions whose answers can be checked, and times what it says it times."""

from __future__ import annotations

import asyncio
from pathlib import Path

import h11
import pytest

from argosy.checkpoint.files import ModelFiles
from argosy.model.families import open_model
from argosy.prompt.tokenizer import Tokenizer
from load import Load, Measured, Questions, Reply, is_one_token, nearest_rank, put_load
from make_checkpoint import make_model, raw_config, vocabulary

RAW = raw_config(
    hidden=64, layers=1, experts=4, experts_per_token=2, width=32, heads=1, kv_heads=1, vocab=32_000
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelFiles]:
    path = make_model(tmp_path_factory.mktemp("load") / "model.gguf", RAW, format="F16")
    return path, open_model(path)


def test_the_last_word_of_a_question_is_the_token_before_its_answer(files: tuple[Path, ModelFiles]) -> None:
    tokenizer = Tokenizer.open(files[0], files[1].header)
    assert tokenizer is not None
    tokens, _ = vocabulary(32_000)
    questions = Questions(num_new=12).take(300)
    assert len({question.text for question in questions}) == 300
    for question in questions:
        ids = tokenizer.encode(question.text)
        assert len(ids) == 15  # words and the spaces between them
        assert question.answer == "".join(tokens[ids[-1] + 1 : ids[-1] + 13])


def test_a_word_is_one_token_if_the_rule_says_so(files: tuple[Path, ModelFiles]) -> None:
    tokenizer = Tokenizer.open(files[0], files[1].header)
    assert tokenizer is not None
    for word in ("abc", "aab", "aaa", "cab", "bab", "zzz", "zza", "mno", "nml"):
        assert (len(tokenizer.encode(word)) == 1) == is_one_token(word), word


def events(*texts: str) -> bytes:
    body = "".join(f'data: {{"choices": [{{"text": "{text}"}}]}}\r\n\r\n' for text in texts).encode()
    return b"%x\r\n%s\r\n" % (len(body), body)


HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n"


def reply(*parts: tuple[float, bytes]) -> Reply:
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="POST", target="/", headers=[("host", "h"), ("connection", "close")]))
    connection.send(h11.EndOfMessage())
    return Reply(connection, 0.0, list(parts))


def test_a_text_arrives_with_the_last_byte_of_its_event() -> None:
    second = events("b")
    got = reply(
        (1.0, HEAD), (2.0, events("", "a")), (3.0, second[:9]), (4.0, second[9:]), (5.0, b"0\r\n\r\n")
    )
    assert got.texts() == [(2.0, "a"), (4.0, "b")]


def test_a_refused_request_ends_the_measurement() -> None:
    with pytest.raises(SystemExit, match="429"):
        reply((1.0, HEAD.replace(b"200 OK", b"429 Too Many"))).texts()


async def load_of(said: str, num_clients: int, num_requests: int) -> tuple[Load, int]:
    """The load on a server that takes 10 ms to answer `said`, and the most requests it had at once."""
    now = most = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await reader.readuntil(b"}")
        await asyncio.sleep(0.01)
        writer.write(HEAD + events(*said) + b"0\r\n\r\n")
        await writer.drain()
        now -= 1
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        questions = Questions(num_new=3).take(num_clients * num_requests)
        questions = [type(question)(question.text, "abc") for question in questions]
        asked = [questions[at::num_clients] for at in range(num_clients)]
        load = await put_load(port, lambda text: {"prompt": text}, asked, 3)
    assert len(load.first_s) == num_clients * num_requests
    assert min(load.first_s) >= 0.01
    return load, most


def test_every_client_has_one_request_in_flight_at_any_time() -> None:
    load, most = asyncio.run(load_of("abc", 3, 4))
    assert (most, load.num_right) == (3, 12)
    assert 0 < load.tok_per_s <= 3 * 3 / 0.01


def test_answers_that_do_not_continue_their_documents_end_the_measurement() -> None:
    load, _ = asyncio.run(load_of("abd", 1, 2))
    assert load.num_right == 0
    measured = object.__new__(Measured)
    measured.texts = {"one": [90, 100], "other": [100, 100]}
    assert measured.correct() == "one: 90 of 100, other: 100 of 100 texts continue their documents"
    measured.texts["one"] = [89, 100]
    with pytest.raises(SystemExit, match="one: 89 of 100"):
        measured.correct()


def test_a_percentile_is_a_measured_value() -> None:
    values = [3.0, 1.0, 2.0, 4.0]
    assert [nearest_rank(values, share) for share in (0.5, 0.51, 0.99)] == [2.0, 3.0, 4.0]
    assert nearest_rank([7.0], 0.5) == 7.0
