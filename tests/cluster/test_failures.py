"""After a failure the text is the same, or an error says what is missing."""

from __future__ import annotations

import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from argosy import _native
from argosy.checkpoint.pack import pack
from argosy.cluster import hello, secure
from argosy.cluster import runner as runner_module
from argosy.cluster import worker as worker_module
from argosy.cluster.group import Group
from argosy.cluster.member import format_host, parse_host
from argosy.cluster.worker import Worker, bind
from argosy.engine.engine import Engine
from argosy.errors import PeerNotUsable, PeerRefused, RunnerFailed, UsageError
from argosy.experts.resident import ResidentRunner
from argosy.model.families import open_model
from tests.cluster.rigs import (
    CONFIG,
    DRIVE,
    GREEDY,
    PROMPT,
    WorkerProcess,
    answers,
    open_engine,
    status_of,
    visible,
    wait_until,
    worker_process,
    worker_thread,
)
from tests.models.tiny import write_model
from tests.serve.test_listen import make_certificate, needs_openssl


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("failures")
    pack(open_model(write_model(root / "bf16", CONFIG, seed=3)), root / "q8", format="q8")
    return root / "q8"


@pytest.fixture(scope="module")
def alone(model: Path) -> list[tuple[Any, ...]]:
    with open_engine(model) as engine:
        return answers(engine)


@pytest.fixture(scope="module")
def processes(model: Path) -> Iterator[tuple[WorkerProcess, WorkerProcess]]:
    """Two workers that tests may kill and stop; each test leaves them as it found them."""
    with worker_process(model) as one, worker_process(model, "--expert-slots", "8") as other:
        yield one, other


def stream_with(engine: Engine, at_token: int, happens: Any) -> tuple[Any, ...]:
    """Answer greedily; something happens once there are `at_token` tokens."""
    result = None
    for num_tokens, event in enumerate(engine.stream(PROMPT, GREEDY), 1):
        if num_tokens == at_token:
            happens()
        result = event.result
    return visible(result)


def test_a_killed_worker_costs_no_request_and_is_used_again_when_it_returns(
    model: Path, alone: list[Any], processes: tuple[WorkerProcess, WorkerProcess]
) -> None:
    victim, other = processes
    with Group([victim.address, other.address], local=False) as group, open_engine(model, group) as engine:
        assert stream_with(engine, 3, lambda: victim.signal(signal.SIGKILL)) == alone[0]
        wait_until(lambda: status_of(group, victim.address)["state"] == "away")
        assert answers(engine) == alone  # the other one has everything meanwhile
        run_before = status_of(group, victim.address)["experts_run"]

        victim.restart()
        wait_until(lambda: status_of(group, victim.address)["state"] == "ready")
        assert answers(engine) == alone
        assert status_of(group, victim.address)["experts_run"] > run_before
        assert status_of(group, victim.address)["connections"] == 2


def test_a_frozen_worker_is_passed_over_and_used_again_when_it_thaws(
    model: Path, alone: list[Any], processes: tuple[WorkerProcess, WorkerProcess]
) -> None:
    victim, other = processes
    with Group([victim.address, other.address], local=False) as group, open_engine(model, group) as engine:
        for _ in range(3):  # until the usual times of a worker are known, it has a second
            assert answers(engine) == alone
        try:
            assert stream_with(engine, 3, lambda: victim.signal(signal.SIGSTOP)) == alone[0]
            found = status_of(group, victim.address)
            assert found["state"] in ("slow", "away")
            assert found["experts_rerouted"] > 0
        finally:
            victim.signal(signal.SIGCONT)
        wait_until(lambda: status_of(group, victim.address)["state"] == "ready")
        assert answers(engine) == alone


def test_python_takes_over_a_layer_whose_worker_is_late_and_asks_another_owner(
    model: Path, alone: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[_native.BegunLayer] = []
    take_over = runner_module._Round.take_over
    monkeypatch.setattr(
        runner_module._Round, "take_over", lambda self, begun: (taken.append(begun), take_over(self, begun))
    )
    with (
        worker_thread(model) as (late, _),
        worker_thread(model) as (other, _),
        Group([late, other], local=False) as group,
        open_engine(model, group) as engine,
    ):
        for _ in range(3):  # until the usual times of a worker are known, it has a second
            assert answers(engine) == alone
        exchange, peer = group._exchange, group._members[late].owner.peer
        assert exchange is not None
        assert peer is not None
        assert stream_with(engine, 3, lambda: exchange.inject(peer, is_stalled=True)) == alone[0]
        # On a busy machine, earlier layers may have taken long, too: the last one is that of the stall.
        owed = [
            (begun.done, experts)
            for begun in taken
            for owner, _, experts, _ in begun.shares
            if owner.name == late and experts
        ]
        done, of_late = owed[-1]
        assert not set(done) & set(of_late)
        assert status_of(group, late)["experts_rerouted"] >= len(of_late)
        exchange.inject(peer)  # from now on it is as it was
        wait_until(lambda: status_of(group, late)["state"] == "ready")
        assert answers(engine) == alone


def test_experts_that_two_late_workers_owe_are_run_here(
    model: Path, alone: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runner_module, "_LONGEST_S", 5.0)
    with (
        worker_thread(model) as (one, _),
        worker_thread(model) as (other, _),
        Group([one, other], disk_bytes_per_s=DRIVE) as group,
        open_engine(model, group, expert_slots=6) as engine,
    ):
        for _ in range(3):  # until the usual times of a worker are known, it has a second
            assert answers(engine) == alone
        exchange = group._exchange
        assert exchange is not None
        peers = [group._members[address].owner.peer for address in (one, other)]

        def stall() -> None:
            for peer in peers:
                assert peer is not None
                exchange.inject(peer, is_stalled=True)

        assert stream_with(engine, 3, stall) == alone[0]
    assert "has not answered" not in caplog.text  # a layer waited for the last owner as long as it may


def test_without_any_owner_an_error_names_the_shard_until_a_worker_is_back(
    model: Path, alone: list[Any], processes: tuple[WorkerProcess, WorkerProcess]
) -> None:
    one, other = processes
    with Group([one.address, other.address], local=False) as group, open_engine(model, group) as engine:
        for worker in processes:
            worker.end()
        with pytest.raises(
            RunnerFailed,
            match=r"shard \d+ cannot be run: no worker can compute layer \d+, expert \d+",
        ) as failed:
            engine.generate(PROMPT, GREEDY)
        assert failed.value.http_status == 503
        assert {"layer", "expert", "shard"} <= failed.value.facts.keys()
        for worker in processes:
            worker.restart()
        wait_until(lambda: all(one["state"] == "ready" for one in group.status()))
        assert answers(engine) == alone


class _Noting:
    """An exchange that notes which experts it was told to drop."""

    def __init__(self, exchange: _native.Exchange) -> None:
        self._exchange = exchange
        self.dropped: list[int] = []

    def drop(self, ticket: int, experts: list[int]) -> None:
        self.dropped += experts
        self._exchange.drop(ticket, experts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._exchange, name)


def test_without_any_owner_this_machine_runs_the_experts_from_its_own_files(
    model: Path, alone: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        worker_process(model) as worker,
        Group([worker.address], replicas=1, disk_bytes_per_s=DRIVE) as group,
        open_engine(model, group, expert_slots=6) as engine,
    ):
        assert group._runner is not None
        noting = _Noting(group._runner.exchange)
        monkeypatch.setattr(group._runner, "exchange", noting)
        assert stream_with(engine, 3, worker.end) == alone[0]
        assert noting.dropped  # so that no late answer can overwrite what this machine computes
        assert answers(engine) == alone


def test_sigterm_drains_a_worker(
    model: Path, alone: list[Any], processes: tuple[WorkerProcess, WorkerProcess]
) -> None:
    victim, other = processes
    with Group([victim.address, other.address], local=False) as group, open_engine(model, group) as engine:
        assert stream_with(engine, 3, lambda: victim.signal(signal.SIGTERM)) == alone[0]
        assert victim.process.wait(30) == 0
    victim.restart()


def test_a_worker_is_drained_and_added_without_a_failed_request(
    model: Path, alone: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        worker_thread(model) as (first, _),
        worker_thread(model, num_slots=8) as (second, _),
        worker_thread(model) as (third, _),
        Group([first, second], local=False) as group,
        open_engine(model, group) as engine,
    ):
        assert stream_with(engine, 2, lambda: group.drain(first)) == alone[0]
        assert status_of(group, first)["experts_owned"] == 0
        run_before = status_of(group, first)["experts_run"]
        assert stream_with(engine, 2, lambda: group.add(third)) == alone[0]
        assert status_of(group, third)["experts_run"] > 0
        assert status_of(group, first)["experts_run"] == run_before
        wait_until(lambda: status_of(group, first)["state"] == "draining" and not _is_connected(group, first))
        assert stream_with(engine, 2, lambda: group.add(first)) == alone[0]
        assert status_of(group, first)["state"] == "ready"
        group.drain(third)
        wait_until(lambda: not _is_connected(group, third))
        monkeypatch.setattr(group._members[third], "address", ("127.0.0.1", 1))
        with pytest.raises(PeerNotUsable, match="does not answer"):
            group.add(third)
        assert status_of(group, third)["state"] == "draining"  # a failed `add` changes nothing
        assert status_of(group, third)["why"] == "drained"
        with pytest.raises(UsageError, match="is not in the group"):
            group.drain("127.0.0.1:1")
        with pytest.raises(PeerNotUsable, match=r"127\.0\.0\.1:1 does not answer"):
            group.add("127.0.0.1:1")
        assert len(group.status()) == 3


def _is_connected(group: Group, address: str) -> bool:
    return group._members[address].owner.peer is not None


# ── who may join ────────────────────────────────────────────────────────────────────────────────────────────────


def refusal(model: Path, address: str, **more: Any) -> PeerRefused:
    with Group([address], **more) as group, pytest.raises(PeerRefused) as refused:
        open_engine(model, group)
    return refused.value


def test_a_worker_with_other_weights_is_refused(model: Path, tmp_path: Path) -> None:
    pack(open_model(write_model(tmp_path / "bf16", CONFIG, seed=4)), tmp_path / "q8", format="q8")
    with worker_thread(tmp_path / "q8") as (address, _):
        error = refusal(model, address)
    assert error.facts["reason"] == "model"
    assert "other weights" in str(error)


@pytest.mark.skipif(_native.instruction_sets() == ["plain"], reason="this processor has one instruction set")
def test_a_worker_with_another_instruction_set_is_refused(model: Path) -> None:
    with worker_thread(model, instruction_set="plain") as (address, _):
        error = refusal(model, address)
    assert error.facts["reason"] == "kernel"
    assert "--instruction-set" in str(error)


def test_a_worker_of_another_version_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "version", lambda name: "9.9")
    with worker_thread(model) as (address, _):
        error = refusal(model, address)
    assert "it is argosy 9.9" in str(error)


def test_a_key_is_needed_on_both_sides(
    model: Path, alone: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    key = b"0123456789abcdef"
    with worker_thread(model, key=key) as (address, _):
        for wrong in (b"", b"0123456789abcdeg"):
            assert refusal(model, address, key=wrong).facts["reason"] == "key"
        with Group([address], key=key, local=False) as group, open_engine(model, group) as engine:
            assert answers(engine) == alone
    assert "a coordinator was refused: it does not have the key" in caplog.text
    assert key.decode() not in caplog.text


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "0"])
def test_every_interface_needs_a_key(host: str) -> None:
    with pytest.raises(UsageError, match="is open to every network of this machine, and there is no key"):
        bind(host, 0, has_key=False)
    bind(host, 0, has_key=True).close()


def test_a_full_worker_refuses_further_coordinators(model: Path) -> None:
    with (
        worker_thread(model, most_coordinators=1) as (address, _),
        Group([address], local=False) as first,
        open_engine(model, first),
    ):
        assert refusal(model, address).facts["reason"] == "busy"
        with (
            worker_thread(model) as (other, _),
            Group([address, other], local=False) as second,
            open_engine(model, second) as engine,
        ):  # a worker that is full today does not keep the others from working
            assert len(engine.generate(PROMPT, GREEDY).token_ids) == 10
            assert status_of(second, address)["state"] == "away"


def test_the_wait_for_workers_says_at_once_who_is_ready_and_who_is_not(model: Path) -> None:
    lines: list[str] = []
    is_told = threading.Event()

    def tell(line: str) -> None:
        lines.append(line)
        if "does not answer" in line:
            is_told.set()

    with worker_thread(model) as (address, _), socket.create_server(("127.0.0.1", 0)) as silent:
        silent_host = f"127.0.0.1:{silent.getsockname()[1]}"

        def refuse() -> None:  # the silent worker ends once the dead one was told of
            accepted, _ = silent.accept()
            is_told.wait(30)
            accepted.close()

        refusing = threading.Thread(target=refuse)
        refusing.start()
        with Group([address, "127.0.0.1:1", silent_host], tell=tell) as group, open_engine(model, group):
            refusing.join()
    assert is_told.is_set()
    assert lines[0] == "waiting for workers: 0 of 3 ready"
    assert any(
        line.endswith("of 3 ready; 127.0.0.1:1 does not answer: Connection refused") for line in lines[1:]
    )
    assert len(lines) == 3


def test_a_group_without_any_worker_says_so(model: Path) -> None:
    with (
        Group(["127.0.0.1:1"]) as group,
        pytest.raises(PeerNotUsable, match="no worker of the group answers"),
    ):
        open_engine(model, group)


@pytest.mark.parametrize("host", ["10.0.0.2", "10.0.0.2:", "10.0.0.2:70700", ":7070", "::1:7070", "h:٣"])
def test_an_address_has_a_host_and_a_port(host: str) -> None:
    with pytest.raises(UsageError, match="is not the address of a worker"):
        Group([host])


def test_a_group_without_an_engine_has_nothing_to_change() -> None:
    with Group(["127.0.0.1:1"]) as group:
        for change in (group.add, group.drain):
            with pytest.raises(UsageError, match="has no engine yet"):
                change("127.0.0.1:1")


def test_addresses_may_be_ipv6() -> None:
    assert parse_host("[::1]:7070") == ("::1", 7070)
    assert format_host("::1", 7070) == "[::1]:7070"  # what a worker prints goes into `--cluster`


def test_a_port_of_thousands_of_digits_is_refused() -> None:
    with pytest.raises(UsageError, match="is not the address of a worker"):
        parse_host("h:" + "9" * 5000)


# ── verification ────────────────────────────────────────────────────────────────────────────────────────────────


def flip_bits(worker: Worker) -> None:
    """A worker whose memory has changed since its experts were read."""
    assert isinstance(worker.runner, ResidentRunner)
    worker.runner._arena.array()[::331] ^= 0x10


@pytest.mark.parametrize("is_first", [False, True])
def test_verification_finds_flipped_bits_and_sets_the_worker_aside(
    is_first: bool, model: Path, alone: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    with (
        worker_thread(model) as (one, first),
        worker_thread(model) as (two, second),
        Group([one, two], verify=1.0, disk_bytes_per_s=DRIVE) as group,
        open_engine(model, group, expert_slots=4) as engine,
    ):
        flip_bits(first if is_first else second)
        bad, good = (one, two) if is_first else (two, one)
        assert answers(engine) == alone  # this machine's outputs were used where they differed
        assert status_of(group, bad)["state"] == "set aside"
        assert status_of(group, bad)["mismatches"] > 0
        assert status_of(group, good)["state"] == "ready"
        assert status_of(group, good)["mismatches"] == 0
        assert status_of(group, good)["verified"] > 0
    assert f"{bad} is set aside" in caplog.text


def test_a_third_worker_decides_between_two_that_disagree(model: Path, alone: list[Any]) -> None:
    with (
        worker_thread(model) as (one, _),
        worker_thread(model) as (two, second),
        worker_thread(model) as (three, _),
        Group([one, two, three], verify=1.0, local=False) as group,
        open_engine(model, group) as engine,
    ):
        flip_bits(second)
        assert answers(engine) == alone
        assert [found["state"] for found in group.status()] == ["ready", "set aside", "ready"]


def test_two_workers_that_disagree_are_both_set_aside(model: Path) -> None:
    with (
        worker_thread(model) as (one, _),
        worker_thread(model) as (two, second),
        Group([one, two], verify=1.0, local=False) as group,
        open_engine(model, group) as engine,
    ):
        flip_bits(second)
        with pytest.raises(RunnerFailed):
            engine.generate(PROMPT, GREEDY)
        assert [found["state"] for found in group.status()] == ["set aside", "set aside"]
        group.add(one)  # a person has found out that this one is right
        assert status_of(group, one)["state"] == "ready"
        assert len(engine.generate(PROMPT, GREEDY).token_ids) == 10


# ── TLS ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@needs_openssl
def test_tls_carries_the_same_bits(
    model: Path, alone: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = make_certificate(tmp_path, "worker", "-nodes")
    other, _ = make_certificate(tmp_path, "other", "-nodes")
    with worker_thread(model, tls=secure.server_context(certificate, key), num_slots=12) as (address, _):
        host = address.replace("127.0.0.1", "localhost")
        with (
            Group([host], tls=secure.client_context(certificate), local=False) as group,
            open_engine(model, group, chunk_tokens=16) as engine,
        ):
            assert answers(engine) == alone
        with (
            Group([host], tls=secure.client_context(other)) as group,
            pytest.raises(PeerNotUsable, match="its certificate is not trusted"),
        ):
            open_engine(model, group)
        monkeypatch.setattr(hello, "HELLO_S", 0.2)  # each side would wait for the other's first bytes
        with Group([host]) as group, pytest.raises(PeerNotUsable):  # plain bytes to a worker that speaks TLS
            open_engine(model, group)


def test_files_of_tls_are_checked(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(UsageError, match="has no certificates"):
        secure.client_context(tmp_path / "empty")
    with pytest.raises(UsageError, match="cannot be used for TLS"):
        secure.server_context(tmp_path / "empty", tmp_path / "none")


def test_a_copy_of_the_model_elsewhere_is_the_same_model(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "elsewhere")
    with (
        worker_thread(tmp_path / "elsewhere") as (address, _),
        Group([address], local=False) as group,
        open_engine(model, group) as engine,
    ):
        assert len(engine.generate(PROMPT, GREEDY).token_ids) == 10


def test_a_group_serves_one_engine(model: Path) -> None:
    with (
        worker_thread(model) as (address, _),
        Group([address]) as group,
        open_engine(model, group),
        pytest.raises(UsageError, match="already has an engine"),
    ):
        open_engine(model, group)
