"""Rows go to workers and outputs come back: the bits of `ExpertTable.run`, whatever the other end does."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest

from argosy import _native
from argosy.config import MEASURED_FORMATS, Format

HIDDEN, WIDTH, NUM_EXPERTS, LAYER = 256, 256, 8, 1
LIMITS: dict[str, Any] = {
    "hidden": HIDDEN,
    "num_experts": [0, NUM_EXPERTS],
    "most_rows": 700,
    "most_assignments": 1500,
}
LONG_US = 20_000_000
QUANTISED = ("f32", "f16", "bf16", "q8", "q4")  # those that `quantize` knows
RUNTIME = _native.Runtime(1)


class Experts:
    """Eight experts of random weights, and a table of them."""

    def __init__(self, format: Format = "q4") -> None:
        rng = np.random.default_rng(5)
        shapes = [(WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)]
        sizes = [_native.matrix_bytes(format, *shape) for shape in shapes]
        self.arena = _native.Arena(NUM_EXPERTS * sum(sizes))
        memory, at = self.arena.array(), 0
        for _ in range(NUM_EXPERTS):
            for size, shape in zip(sizes, shapes, strict=True):
                if format not in QUANTISED:  # only read from files: codes and scales of small numbers
                    memory[at : at + size] = rng.integers(0, 0x40, size, np.uint8)
                else:
                    _native.quantize(format, rng.standard_normal(shape, np.float32), memory[at : at + size])
                at += size
        self.table = _native.ExpertTable(self.arena, hidden=HIDDEN, activation=("silu", 0.0, 0.0))
        starts = np.tile(np.cumsum([0, *sizes[:-1]], dtype=np.int64), (NUM_EXPERTS, 1))
        self.table.add_layer(LAYER, formats=(format,) * 3, width=WIDTH, starts=starts)
        self.place(range(NUM_EXPERTS))

    def place(self, experts: Sequence[int]) -> None:
        of_one = self.arena.nbytes // NUM_EXPERTS
        self.table.place([((LAYER, expert), expert * of_one) for expert in experts])


EXPERTS = Experts()


class Step:
    """Rows of a layer, which experts they chose, and the outputs of all of them."""

    def __init__(self, num_tokens: int, experts: Experts = EXPERTS, seed: int = 0, k: int = 2) -> None:
        rng = np.random.default_rng(seed)
        choices = rng.permuted(np.tile(np.arange(NUM_EXPERTS, dtype=np.int32), (num_tokens, 1)), axis=1)[
            :, :k
        ]
        is_decode = np.arange(num_tokens) % 3 == 0
        self.dispatch = _native.Dispatch(np.ascontiguousarray(choices), is_decode, NUM_EXPERTS)
        self.rows = rng.standard_normal((num_tokens, HIDDEN), np.float32)
        self.out = np.full((num_tokens * k, HIDDEN), np.nan, np.float32)
        self.expected = np.empty_like(self.out)
        experts.table.run(RUNTIME, LAYER, self.dispatch.experts, self.dispatch, self.rows, self.expected)

    def assert_has(self, experts: Sequence[int]) -> None:
        """These experts have their outputs, and the others' rows were left alone."""
        is_written = np.zeros(len(self.out), np.bool_)
        for expert in experts:
            is_written[self.dispatch.assignments(expert)] = True
        np.testing.assert_array_equal(
            self.out[is_written].view(np.int32), self.expected[is_written].view(np.int32)
        )
        assert np.isnan(self.out[~is_written]).all()


def pair(kind: str = "unix") -> tuple[socket.socket, socket.socket]:
    if kind == "unix":
        return socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        return ours, server.accept()[0]


def make_link(theirs: socket.socket) -> _native.WorkerLink:
    return _native.WorkerLink(theirs.detach(), **LIMITS)


@contextmanager
def exchange_of(
    num_peers: int, kind: str = "unix"
) -> Iterator[tuple[_native.Exchange, list[int], list[_native.WorkerLink]]]:
    """An exchange, its peers, and their links, which nobody serves."""
    exchange = _native.Exchange(**LIMITS)
    peers, links = [], []
    for _ in range(num_peers):
        ours, theirs = pair(kind)
        peers.append(exchange.add(ours.detach()))
        links.append(make_link(theirs))
    try:
        yield exchange, peers, links
    finally:
        exchange.close()
        for link in links:
            link.close()


@contextmanager
def serving(link: _native.WorkerLink, body: Callable[[_native.WorkerLink], Any]) -> Iterator[list[Any]]:
    """Serve a link in a thread; its result, or the exception, is in the list afterwards."""
    results: list[Any] = []

    def serve() -> None:
        try:
            results.append(body(link))
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield results
    finally:
        link.close()
        thread.join(20)
        assert not thread.is_alive()


def resident(experts: Experts) -> Callable[[_native.WorkerLink], bool]:
    runtime = _native.Runtime(1)
    return lambda link: link.serve_resident(runtime, experts.table)


def collect(exchange: _native.Exchange, ticket: int, num_experts: int) -> list[_native.ExchangeEvent]:
    """Events until so many experts were named."""
    events: list[_native.ExchangeEvent] = []
    while sum(len(event.experts) for event in events) < num_experts:
        latest = exchange.receive(ticket, LONG_US)
        assert latest, f"nothing came but {[(e.peer, e.experts, e.failure) for e in events]}"
        events += latest
    return events


def halves(step: Step, peers: Sequence[int]) -> dict[int, list[int]]:
    shares: dict[int, list[int]] = {peer: [] for peer in peers}
    for i, expert in enumerate(step.dispatch.experts):
        shares[peers[i % len(peers)]].append(expert)
    return shares


def compute(request: _native.WorkerRequest, experts: Sequence[int]) -> None:
    EXPERTS.table.run(RUNTIME, request.layer, experts, request.dispatch, request.rows, request.out)


def next_request(link: _native.WorkerLink) -> _native.WorkerRequest:
    request = link.next(20_000)
    assert isinstance(request, _native.WorkerRequest)
    return request


# ── the same bits ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["unix", "tcp"])
@pytest.mark.parametrize("format", [*MEASURED_FORMATS, "uint4_128_f16", "affine5_64_bf16"])
def test_workers_give_the_bits_of_the_table_for_every_format(format: Format, kind: str) -> None:
    experts = Experts(format)
    with exchange_of(2, kind) as (exchange, peers, links), ExitStack() as stack:
        for link in links:
            stack.enter_context(serving(link, resident(experts)))
        for num_tokens in (1, 3, 40):
            step = Step(num_tokens, experts, seed=num_tokens)
            ticket = exchange.send(LAYER, step.dispatch, step.rows, step.out, halves(step, peers))
            events = collect(exchange, ticket, len(step.dispatch.experts))
            exchange.forget(ticket)
            assert {event.failure for event in events} == {None}
            step.assert_has(step.dispatch.experts)


def test_a_prompt_of_several_frames_arrives_whole() -> None:
    step = Step(700)
    with exchange_of(2) as (exchange, peers, links), ExitStack() as stack:
        for link in links:
            stack.enter_context(serving(link, resident(EXPERTS)))
        ticket = exchange.send(LAYER, step.dispatch, step.rows, step.out, halves(step, peers))
        collect(exchange, ticket, NUM_EXPERTS)
        exchange.forget(ticket)
        step.assert_has(range(NUM_EXPERTS))
        stats = exchange.stats(peers[0])
        assert stats.few_rows.count == 0
        assert stats.many_rows.count == 1
        num_rows = sum(len(step.dispatch.assignments(expert)) for expert in halves(step, peers)[peers[0]])
        assert stats.bytes_in > 4 * HIDDEN * num_rows
        assert 0 < stats.many_rows.p50_us <= stats.many_rows.p99_us


def test_a_worker_sees_only_its_experts_and_the_rows_that_chose_them() -> None:
    step = Step(9)
    scan = step.dispatch.scan[0]  # only prompt tokens chose it
    experts = sorted(
        [scan, next(expert for expert in step.dispatch.experts if expert not in step.dispatch.scan)]
    )
    tokens = sorted({a // 2 for expert in experts for a in step.dispatch.assignments(expert)})
    with exchange_of(1) as (exchange, peers, links):
        ticket = exchange.send(LAYER, step.dispatch, step.rows, step.out, {peers[0]: experts[::-1]})
        request = next_request(links[0])
        assert request.layer == LAYER
        assert request.dispatch.experts == experts
        assert request.dispatch.scan == [scan]
        np.testing.assert_array_equal(request.rows, step.rows[tokens])
        assert request.out.shape == (request.dispatch.num_assignments, HIDDEN)
        with pytest.raises(ValueError, match="no experts per token"):
            _ = request.dispatch.experts_per_token
        compute(request, request.dispatch.experts)
        links[0].answer(request.dispatch.experts)
        collect(exchange, ticket, 2)
        step.assert_has(experts)


def test_each_answer_is_told_when_it_is_there() -> None:
    step = Step(5)
    experts = step.dispatch.experts
    with exchange_of(1) as (exchange, peers, links):
        ticket = exchange.send(LAYER, step.dispatch, step.rows, step.out, {peers[0]: experts})
        request = next_request(links[0])
        for i, expert in enumerate(experts):
            assert exchange.receive(ticket, 0) == []
            compute(request, [expert])
            links[0].answer([expert])
            assert [event.experts for event in collect(exchange, ticket, 1)] == [[expert]]
            step.assert_has(experts[: i + 1])
        assert exchange.receive(ticket, LONG_US) == []  # nothing is outstanding, so it does not wait
        with pytest.raises(ValueError, match="waits for no answer"):
            links[0].answer([experts[0]])


# ── what goes wrong ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_worker_that_dies_is_told_with_what_it_still_owed_and_a_second_owner_gives_the_same_bits() -> None:
    step = Step(20)
    first, *rest = step.dispatch.experts
    with exchange_of(2) as (exchange, peers, links):
        ticket = exchange.send(LAYER, step.dispatch, step.rows, step.out, {peers[0]: [first, *rest]})
        request = next_request(links[0])
        compute(request, [first])
        links[0].answer([first])
        links[0].close()
        done, failed = collect(exchange, ticket, 1 + len(rest))
        assert (done.experts, done.failure) == ([first], None)
        assert (failed.peer, failed.experts, failed.failure) == (peers[0], rest, "ended")
        assert exchange.peers == peers[1:]
        assert "closed" in exchange.stats(peers[0]).failure

        exchange.resend(ticket, {peers[1]: [first, *rest]})  # `first` is there, so it is not asked for again
        request = next_request(links[1])
        assert request.dispatch.experts == rest
        compute(request, rest)
        links[1].answer(rest)
        collect(exchange, ticket, len(rest))
        step.assert_has(step.dispatch.experts)
        exchange.resend(ticket, {peers[0]: rest})
        assert exchange.receive(ticket, LONG_US) == []
        exchange.forget(ticket)
        ticket = exchange.send(LAYER, step.dispatch, step.rows, step.out, {peers[0]: rest})
        assert [event.failure for event in exchange.receive(ticket, LONG_US)] == ["ended"]


def test_a_refusal_names_the_experts_that_were_not_answered_and_the_connection_lives() -> None:
    step = Step(20)
    first, *rest = step.dispatch.experts
    with exchange_of(1) as (exchange, peers, links):
        for _ in range(2):
            ticket = exchange.send(LAYER, step.dispatch, step.rows, step.out, {peers[0]: [first, *rest]})
            request = next_request(links[0])
            compute(request, [first])
            links[0].answer([first])
            links[0].refuse(7, "the drive failed")
            events = collect(exchange, ticket, 1 + len(rest))
            assert [(event.experts, event.failure) for event in events] == [
                ([first], None),
                (rest, "refused"),
            ]
            assert (events[1].code, events[1].message) == (7, "the drive failed")
            exchange.forget(ticket)


def test_a_late_answer_is_dropped_and_the_next_request_is_not_disturbed() -> None:
    late, step = Step(20, seed=1), Step(20, seed=2)
    with exchange_of(1) as (exchange, peers, links):
        ticket = exchange.send(LAYER, late.dispatch, late.rows, late.out, {peers[0]: late.dispatch.experts})
        request = next_request(links[0])
        assert exchange.receive(ticket, 0) == []
        exchange.forget(ticket)
        compute(request, request.dispatch.experts)
        links[0].answer(request.dispatch.experts)

        ticket = exchange.send(LAYER, step.dispatch, step.rows, step.out, {peers[0]: step.dispatch.experts})
        request = next_request(links[0])
        compute(request, request.dispatch.experts)
        links[0].answer(request.dispatch.experts)
        collect(exchange, ticket, len(step.dispatch.experts))
        step.assert_has(step.dispatch.experts)
        late.assert_has([])
        assert exchange.stats(peers[0]).num_late == len(late.dispatch.experts)
        assert exchange.stats(peers[0]).num_outstanding == 0


def test_a_worker_learns_that_its_request_was_cancelled() -> None:
    step = Step(20)
    with exchange_of(1) as (exchange, peers, links):
        ticket = exchange.send(LAYER, step.dispatch, step.rows, step.out, {peers[0]: step.dispatch.experts})
        next_request(links[0])
        assert not links[0].is_cancelled
        exchange.forget(ticket)
        assert links[0].is_cancelled
        links[0].answer(step.dispatch.experts)  # does nothing
        links[0].refuse(1, "neither does this")
        assert links[0].next(0) == "idle"
        exchange.tend(LONG_US)
        assert exchange.stats(peers[0]).num_outstanding == 0


def test_a_peer_that_takes_nothing_keeps_no_other_waiting_and_a_forgotten_request_ends_in_its_frame() -> None:
    big, step = Step(700, seed=1), Step(20, seed=2)
    with exchange_of(2) as (exchange, peers, links):
        # More than a socket takes: the request stays in the queue, somewhere inside a frame.
        tickets = [
            exchange.send(LAYER, big.dispatch, big.rows, big.out, {peers[0]: big.dispatch.experts})
            for _ in range(8)
        ]
        assert exchange.stats(peers[0]).queued_bytes > 100_000
        with serving(links[1], resident(EXPERTS)):
            ticket = exchange.send(
                LAYER, step.dispatch, step.rows, step.out, {peers[1]: step.dispatch.experts}
            )
            collect(exchange, ticket, len(step.dispatch.experts))
            step.assert_has(step.dispatch.experts)
            exchange.forget(ticket)
        for ticket in tickets:
            exchange.forget(ticket)
        assert exchange.stats(peers[0]).queued_bytes <= 256 * HIDDEN * 4 + 9 * 64
        big.rows[:] = 0  # nobody reads them any more
        with serving(links[0], resident(EXPERTS)):
            step.out[:] = np.nan
            ticket = exchange.send(
                LAYER, step.dispatch, step.rows, step.out, {peers[0]: step.dispatch.experts}
            )
            collect(exchange, ticket, len(step.dispatch.experts))
            step.assert_has(step.dispatch.experts)
        big.assert_has([])


def test_a_full_peer_is_told_and_is_asked_again_later() -> None:
    step = Step(2)
    shares = {1: step.dispatch.experts}
    with exchange_of(1) as (exchange, _, links):
        tickets = [exchange.send(LAYER, step.dispatch, step.rows, step.out, shares) for _ in range(17)]
        events = exchange.receive(tickets[16], LONG_US)
        assert [(event.experts, event.failure) for event in events] == [(step.dispatch.experts, "full")]
        with serving(links[0], resident(EXPERTS)):
            for ticket in tickets[:16]:
                collect(exchange, ticket, len(step.dispatch.experts))
            exchange.resend(tickets[16], shares)
            assert exchange.receive(tickets[16], LONG_US)[0].failure is None


def test_the_first_of_two_owners_wins_and_the_other_is_late() -> None:
    step = Step(20)
    experts = step.dispatch.experts
    with exchange_of(2) as (exchange, peers, links):
        ticket = exchange.send(
            LAYER, step.dispatch, step.rows, step.out, {peers[0]: experts, peers[1]: experts}
        )
        requests = [next_request(link) for link in links]
        compute(requests[1], experts)
        links[1].answer(experts)
        assert {event.peer for event in collect(exchange, ticket, len(experts))} == {peers[1]}
        requests[0].out[:] = 0.5  # other bits than the first answer
        links[0].answer(experts)
        assert exchange.receive(ticket, LONG_US) == []
        step.assert_has(experts)
        assert exchange.stats(peers[0]).num_late == len(experts)


def test_what_the_caller_writes_itself_no_late_answer_overwrites() -> None:
    step = Step(20)
    mine, other, *_ = step.dispatch.experts
    with exchange_of(1) as (exchange, peers, links):
        ticket = exchange.send(LAYER, step.dispatch, step.rows, step.out, {peers[0]: [mine, other]})
        request = next_request(links[0])
        with pytest.raises(ValueError, match="chose expert 99"):
            exchange.drop(ticket, [mine, 99])
        exchange.drop(ticket, [mine])
        EXPERTS.table.run(RUNTIME, LAYER, [mine], step.dispatch, step.rows, step.out)
        compute(request, [other])
        request.out[: len(step.dispatch.assignments(mine))] = 0.5  # other bits than ours
        links[0].answer([mine, other])
        assert [event.experts for event in collect(exchange, ticket, 1)] == [[other]]
        step.assert_has([mine, other])
        assert exchange.stats(peers[0]).num_late == 1
        exchange.resend(ticket, {peers[0]: [mine]})  # it is there, so nobody is asked
        assert exchange.receive(ticket, LONG_US) == []


def test_a_dropped_expert_is_not_written_from_the_middle_of_its_frame_either() -> None:
    step = Step(40)
    (mine,) = step.dispatch.experts[:1]
    ours, theirs = pair()
    exchange = _native.Exchange(**LIMITS)
    with theirs:
        peer = exchange.add(ours.detach())
        ticket = exchange.send(LAYER, step.dispatch, step.rows, step.out, {peer: [mine]})
        count = len(step.dispatch.assignments(mine))
        row = np.full(HIDDEN, 0.5, np.float32).tobytes()
        frame = struct.pack(
            "<IBBHIIIIQII", 0x46475241, 1, 6, LAYER, 1, 1, count, 0, 8 + count * len(row), mine, count
        )
        theirs.sendall(frame + row * (count - 1))  # the last row is missing
        assert exchange.receive(ticket, 0) == []
        assert (step.out[step.dispatch.assignments(mine)[0]] == 0.5).all()
        exchange.drop(ticket, [mine])
        EXPERTS.table.run(RUNTIME, LAYER, [mine], step.dispatch, step.rows, step.out)
        theirs.sendall(row)
        assert exchange.receive(ticket, LONG_US) == []
        step.assert_has([mine])
        exchange.close()


def test_an_idle_peer_is_pinged_and_one_that_is_silent_is_given_up() -> None:
    with exchange_of(2) as (exchange, peers, links):
        links[0].status = b"\x00 ready"
        with serving(links[0], resident(EXPERTS)):
            assert exchange.status(peers[0]) == b""
            until = time.monotonic() + 20
            while exchange.status(peers[0]) != b"\x00 ready" and time.monotonic() < until:
                assert exchange.tend(LONG_US) == []
            assert exchange.status(peers[0]) == b"\x00 ready"
            exchange.tend(LONG_US)
            failed = exchange.tend(0)
            assert peers[1] in [peer for peer, _ in failed]
            assert ["nothing was received for" in why for _, why in failed] == [True] * len(failed)
    with pytest.raises(ValueError, match="a status has 4097 bytes, expected at most 4096"):
        links[0].status = bytes(4097)


def test_a_request_whose_expert_has_no_place_comes_back_to_python() -> None:
    experts = Experts()
    partial = _native.ExpertTable(experts.arena, hidden=HIDDEN, activation=("silu", 0.0, 0.0))
    step = Step(20)
    with exchange_of(1) as (exchange, peers, links):
        ticket = exchange.send(LAYER, step.dispatch, step.rows, step.out, {peers[0]: step.dispatch.experts})
        assert links[0].serve_resident(RUNTIME, partial) is True
        request = next_request(links[0])
        compute(request, request.dispatch.experts)
        links[0].answer(request.dispatch.experts)
        collect(exchange, ticket, len(step.dispatch.experts))
        step.assert_has(step.dispatch.experts)


def test_an_interrupt_and_the_end_wake_a_worker_that_waits() -> None:
    with exchange_of(1) as (exchange, _, links):
        links[0].interrupt()
        assert links[0].serve_resident(RUNTIME, EXPERTS.table) is True
        with serving(links[0], lambda link: [link.next(), link.next()]) as results:
            links[0].interrupt()
            exchange.close()
        assert results == [["interrupted", None]]


def test_guesses_arrive_by_rank() -> None:
    with exchange_of(1) as (exchange, peers, links):
        exchange.guess(peers[0], LAYER, [[3, 1], [], [5]], is_sweep=True)
        guess = links[0].next(20_000)
        assert isinstance(guess, _native.WorkerGuess)
        assert (guess.layer, guess.by_rank, guess.is_sweep) == (LAYER, [[3, 1], [], [5]], True)
        with pytest.raises(ValueError, match="names expert 8"):
            exchange.guess(peers[0], LAYER, [[8]], is_sweep=False)
        with pytest.raises(ValueError, match="names expert 2"):
            exchange.guess(peers[0], LAYER, [[2], [2]], is_sweep=False)


def test_a_request_must_be_answered_before_the_next() -> None:
    step = Step(2)
    with exchange_of(1) as (exchange, peers, links):
        exchange.send(LAYER, step.dispatch, step.rows, step.out, {peers[0]: step.dispatch.experts})
        next_request(links[0])
        with pytest.raises(ValueError, match="experts without an answer; answer or refuse it first"):
            links[0].next(0)


def test_a_coordinator_that_breaks_the_protocol_is_named_and_its_connection_closed() -> None:
    ours, theirs = pair()
    link = make_link(theirs)
    ours.sendall(b"GET / HTTP/1.1\r\nHost: worker\r\n\r\n" + bytes(32))
    with pytest.raises(_native.LinkError, match="the coordinator sent something that is not a frame"):
        link.next(20_000)
    assert ours.recv(1) == b""
    assert issubclass(_native.LinkError, ConnectionError)
    ours.close()


def test_a_worker_that_breaks_the_protocol_is_named_and_its_connection_closed() -> None:
    step = Step(2)
    exchange = _native.Exchange(**LIMITS)
    ours, theirs = pair()
    peer = exchange.add(ours.detach())
    ticket = exchange.send(LAYER, step.dispatch, step.rows, step.out, {peer: step.dispatch.experts})
    theirs.sendall(bytes(64))
    (event,) = exchange.receive(ticket, LONG_US)
    assert (event.failure, event.message) == ("protocol", "the worker sent something that is not a frame")
    assert event.experts == step.dispatch.experts
    step.assert_has([])
    exchange.close()
    theirs.close()


@pytest.mark.parametrize(
    ("layer", "shares", "sentence"),
    [
        (0, {1: [0]}, "layer 0 has no routed experts"),
        (2, {1: [0]}, "layer 2 has no routed experts"),
        (LAYER, {2: []}, "no peer has the id 2"),
        (LAYER, {1: [NUM_EXPERTS]}, "no token of layer 1 chose expert 8"),
        (LAYER, {1: [3, 3]}, "expert 3 is named twice for peer 1"),
    ],
)
def test_a_request_that_cannot_be_sent_is_refused_and_nothing_is_sent(
    layer: int, shares: dict[int, list[int]], sentence: str
) -> None:
    step = Step(20)
    with exchange_of(1) as (exchange, peers, _):
        with pytest.raises(ValueError, match=sentence):
            exchange.send(layer, step.dispatch, step.rows, step.out, {peers[0]: [], **shares})
        assert exchange.stats(peers[0]).bytes_out == 0


def test_limits_hold_at_the_coordinator() -> None:
    step = Step(701)
    with exchange_of(1) as (exchange, peers, _):
        with pytest.raises(ValueError, match="701 rows and 1402 assignments, expected at most 700 and 1500"):
            exchange.send(LAYER, step.dispatch, step.rows, step.out, {peers[0]: list(range(NUM_EXPERTS))})
        assert exchange.buffer_bytes <= _native.exchange_bytes(**LIMITS, num_peers=1)
    with pytest.raises(ValueError, match="hidden is 0, expected 1 to"):
        _native.Exchange(**{**LIMITS, "hidden": 0})
    with pytest.raises(ValueError, match="is not a stream socket"):
        exchange.add(0)


# ── faults that are injected ────────────────────────────────────────────────────────────────────────────────


def exchange_times(faults: dict[str, Any], num_rounds: int) -> tuple[float, list[str | None]]:
    """The least seconds of a round with one faulty worker, and the failures."""
    step, seconds, failures = Step(20), [], []
    with exchange_of(1) as (exchange, peers, links), serving(links[0], resident(EXPERTS)):
        exchange.inject(peers[0], **faults)
        for _ in range(num_rounds):
            began = time.monotonic()
            ticket = exchange.send(
                LAYER, step.dispatch, step.rows, step.out, {peers[0]: step.dispatch.experts}
            )
            failures += [event.failure for event in exchange.receive(ticket, 50_000)]
            exchange.forget(ticket)
            seconds.append(time.monotonic() - began)
    return min(seconds), failures


def test_faults_delay_limit_stall_and_end_a_connection() -> None:
    assert exchange_times({"delay_us": 20_000}, 2)[0] >= 0.02
    nbytes = 20 * HIDDEN * 4  # the rows
    assert exchange_times({"bytes_per_s": nbytes * 50}, 2)[0] >= 0.02
    assert exchange_times({"is_stalled": True}, 1)[1] == []
    assert exchange_times({"bytes_to_live": nbytes // 2}, 1)[1] == ["ended"]


# ── dispatches ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_dispatch_of_some_experts_keeps_the_numbers_of_their_assignments() -> None:
    step = Step(20)
    experts = step.dispatch.experts
    part = step.dispatch.only(experts[2:0:-1])
    assert part.experts == experts[1:3]
    assert part.scan == [expert for expert in part.experts if expert in step.dispatch.scan]
    assert [part.assignments(expert) for expert in part.experts] == [
        step.dispatch.assignments(expert) for expert in part.experts
    ]
    EXPERTS.table.run(RUNTIME, LAYER, part.experts, part, step.rows, step.out)
    step.assert_has(part.experts)
    with pytest.raises(ValueError, match="no token chose expert 0"):
        part.only([0])
    with pytest.raises(ValueError, match="is named twice"):
        step.dispatch.only([experts[0]] * 2)
    with pytest.raises(ValueError, match="some experts of its tokens only"):
        part.choices()
