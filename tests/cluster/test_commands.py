"""`argosy run` and `serve` with workers, and `argosy cluster`: as processes, over HTTP, and what they refuse."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from argosy import Engine, SamplingParams
from argosy.checkpoint.shards import ALL_SHARDS
from argosy.cli.commands.worker import shards_of
from argosy.cli.main import main
from argosy.cli.shared.group_options import parse_percent
from argosy.cluster.group import Group
from argosy.errors import UsageError
from tests.cli.tiny_chat_model import write_chat_model
from tests.cluster.rigs import wait_until, worker_process
from tests.helpers.command import run_argosy
from tests.serve.test_run import end, served

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("commands") / "model")


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("key") / "key"
    path.write_text("0123456789abcdef0123456789abcdef\n")
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def workers(model: Path, key_file: Path) -> Iterator[list[str]]:
    options = ["--key-file", str(key_file)]
    with (
        worker_process(model, *options) as one,
        worker_process(model, *options, "--share", "1/2", is_fork=False) as other,
    ):
        yield [one.address, other.address]


@pytest.fixture(scope="module")
def url(model: Path, key_file: Path, workers: list[str]) -> Iterator[str]:
    options = ["--cluster", ",".join(workers), "--cluster-key-file", str(key_file), "--no-local-experts"]
    with served(model, *options) as (url, process):
        yield url
        process.terminate()
        assert "Traceback" not in end(process)


def answer(url: str) -> str:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 12, "temperature": 0}
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["message"]["content"]
    return text


def test_run_answers_the_same_with_workers(model: Path, key_file: Path, workers: list[str]) -> None:
    command = ["run", "Hi", "-m", str(model), "--memory", "1GiB", "-n", "12", "-t", "0", "--quiet"]
    alone = run_argosy(*command)
    together = run_argosy(
        *command, "--cluster", ",".join(workers), "--cluster-key-file", str(key_file), "--verify", "50%"
    )
    assert together.returncode == 0, together.stderr
    assert together.stdout == alone.stdout != ""


def test_a_server_shows_drains_and_adds_workers_between_answers(
    url: str, workers: list[str], capsys: Captured
) -> None:
    before = answer(url)

    assert main(["cluster", "status", "--url", url]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [[worker, "ready"] for worker in workers]

    assert main(["cluster", "drain", workers[1], "--url", url]) == 0
    assert f"{workers[1]:<22}draining" in capsys.readouterr().out
    assert answer(url) == before

    assert main(["cluster", "add", workers[1], "--url", url]) == 0
    assert f"{workers[1]:<22}ready" in capsys.readouterr().out
    assert answer(url) == before

    assert main(["cluster", "drain", "127.0.0.1:1", "--url", url]) == 1
    assert "127.0.0.1:1 is not in the group" in capsys.readouterr().err
    assert main(["cluster", "add", "127.0.0.1:1", "--url", url]) == 1
    assert "127.0.0.1:1 does not answer" in capsys.readouterr().err


def test_the_state_metrics_and_top_have_the_workers(url: str, workers: list[str], capsys: Captured) -> None:
    answer(url)

    def state() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = httpx.get(f"{url}/v1/engine/state").json()["workers"]
        return found

    wait_until(lambda: all(worker["budget_bytes"] == 1 << 30 for worker in state()))  # pongs tell it
    assert [worker["host"] for worker in state()] == workers
    assert all(worker["bytes_out"] > 0 for worker in state())

    metrics = httpx.get(f"{url}/metrics").text
    for host in workers:
        assert f'argosy_worker_state{{host="{host}",state="ready"}} 1.0' in metrics
        assert f'argosy_worker_sent_bytes_total{{host="{host}"}}' in metrics

    assert main(["top", "--url", url, "--once"]) == 0
    assert sum(line.startswith("worker    127.0.0.1:") for line in capsys.readouterr().out.splitlines()) == 2


def test_status_as_json_is_what_the_server_says(url: str, workers: list[str], capsys: Captured) -> None:
    assert main(["cluster", "status", "--url", url, "--json"]) == 0
    assert [worker["host"] for worker in json.loads(capsys.readouterr().out)] == workers


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "Hi", "--cluster", "nonsense"], "'nonsense' is not the address of a worker"),
        (["serve", "--check", "--cluster", "h:1,nonsense"], "'nonsense' is not the address of a worker"),
        (["run", "Hi", "--cluster", ","], "--cluster names no worker"),
        (["run", "Hi", "--verify", "1%"], "--verify needs --cluster"),
        (["run", "Hi", "--cluster-key-file", "f"], "--cluster-key-file needs --cluster"),
        (["run", "Hi", "--cluster", "h:1", "--verify", "200%"], "--verify takes a percentage"),
        (
            ["run", "Hi", "--cluster", "h:1", "--cluster-key-file", "/none"],
            "the key file /none cannot be read",
        ),
        (["serve", "a", "b", "--cluster", "h:1", "--port", "0"], "--cluster is for a server with one model"),
        (["worker", "demo", "--bind", "0.0.0.0:0"], "there is no key"),
        (["worker", "demo", "--bind", "10.0.0.2"], "is not the address of a worker"),
        (["worker", "demo", "--bind", "127.0.0.1:0", "--share", "3/2"], "--share takes K/N"),
        (["worker", "demo", "--bind", "127.0.0.1:0", "--tls-cert", "f"], "belong together"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], says: str, capsys: Captured) -> None:
    assert main(arguments) == 2
    assert says in capsys.readouterr().err


def test_a_worker_whose_budget_is_too_small_says_what_works(model: Path, capsys: Captured) -> None:
    assert (
        main(["worker", str(model), "--bind", "127.0.0.1:0", "--memory", "5MiB", "--disk-rate", "1GB"]) == 3
    )
    said = capsys.readouterr().err
    assert "this worker needs" in said
    assert "the budget is 5.0 MiB" in said
    assert "hint: `--memory " in said


def test_the_smallest_budget_that_works_is_named_and_kept(model: Path, capsys: Captured) -> None:
    options = ["--expert-slots", "9", "--disk-rate", "1GB"]
    assert main(["worker", str(model), "--bind", "127.0.0.1:0", "--memory", "5MiB", *options]) == 3
    (hint,) = re.findall(r"`--memory (\d+)MiB` works", capsys.readouterr().err)
    with (
        worker_process(model, *options, "--memory", f"{hint}MiB") as worker,
        Group([worker.address], local=False) as group,
        Engine.open(model, memory="1GiB", threads=1, experts=group) as engine,
    ):
        engine.generate(list(range(3, 40)), SamplingParams(max_tokens=8, ignore_eos=True))
        wait_until(lambda: group.status()[0]["peak_bytes"] > 0)
        assert group.status()[0]["peak_bytes"] <= int(hint) << 20


def test_shares_of_all_parts_are_everything() -> None:
    assert shards_of(()) == ALL_SHARDS
    assert sum(shards_of([f"{part}/4"]) for part in range(1, 5)) == ALL_SHARDS
    assert shards_of(["1/4", "2/4"]) == shards_of(["1/4"]) | shards_of(["2/4"])


@pytest.mark.parametrize("text", ["1/" + "9" * 5000, "9" * 5000 + "/3", "2/1", "0/1", "1/x", ""])
def test_other_texts_are_no_share(text: str) -> None:
    with pytest.raises(UsageError, match="--share takes K/N"):
        shards_of([text])


@pytest.mark.parametrize("text", ["1%", "1", " 1 %"])
def test_a_percentage_needs_no_sign(text: str) -> None:
    assert parse_percent(text) == 0.01


@pytest.mark.parametrize("text", ["", "x%", "-1%", "101%", "nan"])
def test_other_texts_are_no_percentage(text: str) -> None:
    with pytest.raises(UsageError, match="--verify takes a percentage"):
        parse_percent(text)
