"""`argosy top`: watch a running server in the terminal, updated twice a second.

    remote.RemoteServer.states  ->  state_lines (what `--once` prints)  ->  the same lines with bars, redrawn in place

If the server goes away, `top` waits for it and shows the last state with its age.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from argosy.cli.shared.remote import entries, fields, number, server_options, whole
from argosy.config import format_bytes

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.text import Text

    from argosy.cli.shared.remote import RemoteServer

UNKNOWN = "-"
_LONGEST_WAIT_S = 8.0
_COLORS = {
    "process": "bright_black",
    "dense weights": "blue",
    "KV cache": "magenta",
    "recurrent state": "bright_magenta",
    "replay": "bright_magenta",
    "working buffers": "yellow",
    "staging": "green",
    "expert cache": "cyan",
}
_SHADES = " ·░▒▓█"
_FEWEST_ROWS = 6
_MOST_REQUESTS = 8  # lines of running requests
_MOST_LINES = 200  # lines about memory, models or workers
_HOTTEST = 4  # times an equal share of the layer's uses

_RECENT = (("hit rate", "hit_rate"), ("LRU", "lru"), ("best possible", "optimum"))


@click.command("top")
@server_options
@click.option("--once", is_flag=True, help="Print the state once and exit.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print states as JSON, one per line; with --once, only one."
)
def top(url: str, key_file: Path | None, once: bool, as_json: bool) -> None:
    """Watch a running server: memory, speed, experts, queue. ^C quits.

    If the output is not a terminal, the state is printed once.

    \b
    Examples:
      argosy top
      argosy top --url http://10.0.0.7:8080 --key-file key.txt --once --json
    """
    from argosy.cli.shared.remote import RemoteServer
    from argosy.cli.shared.settings import api_key

    server = RemoteServer(url, api_key(key_file))
    if as_json:
        for state in [server.state()] if once else server.states():
            _print_json(state)
    elif once or not sys.stdout.isatty():
        print(*state_lines(server.state(), server.url), sep="\n")
    else:
        watch(server)


def state_lines(state: dict[str, Any], url: str) -> list[str]:
    """The state as lines of text, without colour."""
    model, memory = fields(state.get("model")), fields(state.get("memory"))
    peak = _number(memory.get("peak_bytes"), format_bytes)
    return [
        f"model     {_name(model.get('id'))}, {_name(model.get('family'))}, at {url}",
        f"memory    peak {peak}, limit {_number(memory.get('budget_bytes'), format_bytes)}",
        *(
            f"  {_name(line.get('name')):<20}{_number(line.get('bytes'), format_bytes):>10}"
            f"   {_name(line.get('note'), '')}".rstrip()
            for line in entries(memory.get("lines"))[:_MOST_LINES]
        ),
        *_model_lines(state),
        *_running_lines(state),
    ]


def _model_lines(state: dict[str, Any]) -> list[str]:
    """The state of each model, if there are several: its memory and its share of the limit."""
    models = entries(state.get("models"))
    if len(models) < 2:
        return []
    limit = whole(fields(state.get("memory")).get("budget_bytes"))
    num_ready = sum(model.get("state") == "ready" for model in models)
    lines = [f"models    {num_ready} of {len(models)} in memory"]
    for model in models[:_MOST_LINES]:
        num_bytes, running = whole(model.get("memory_bytes")), whole(model.get("running"))
        facts = [_name(model.get("state"))]
        facts += [f"{100 * num_bytes / limit:.0f} % of the limit"] if num_bytes and limit else []
        facts += [f"{running} running"] if running else []
        held = format_bytes(num_bytes) if num_bytes else UNKNOWN
        lines.append(f"  {_name(model.get('id')):<20}{held:>10}   {', '.join(facts)}")
    return lines


def _running_lines(state: dict[str, Any]) -> list[str]:
    speed, experts, queue, kv, privacy, recent = (
        fields(state.get(key)) for key in ("speed", "experts", "queue", "kv", "privacy", "recent")
    )
    lines = [
        f"speed     {_number(speed.get('decode_tok_per_s'), _rate)} tok/s decode,"
        f" {_number(speed.get('prefill_tok_per_s'), _rate)} tok/s prefill",
        f"experts   hit rate {_number(experts.get('hit_rate'), lambda rate: f'{rate:.2f}')},"
        f" {_number(experts.get('resident'))} of {_number(experts.get('total'))} in memory,"
        f" room for {_number(experts.get('slots'))}",
        f"drive     {_number(experts.get('drive_bytes_per_s'), lambda speed: f'{speed / 1e9:.2f}')} GB/s,"
        f" {_number(experts.get('bytes_read'), lambda count: f'{count / 1e9:.1f}')} GB read",
        f"requests  {_number(queue.get('running'))} running of {_number(queue.get('max_sequences'))} at once,"
        f" {_number(queue.get('waiting'))} waiting",
        *_request_lines(state),
        f"KV        {_number(kv.get('blocks_used'))} of {_number(kv.get('blocks_total'))} blocks in use,"
        f" {_number(kv.get('blocks_cached'))} kept for later",
    ]
    if recent:
        rates = (f"{name} {_number(recent.get(key), '{:.2f}'.format)}" for name, key in _RECENT)
        lines.append(f"cache     over the last {_number(recent.get('tokens'))} tokens: {', '.join(rates)}")
    if (use := _most_uneven(state)) is not None:
        lines.append(f"use       {use}")
    lines += [f"worker    {line}" for line in worker_lines(entries(state.get("workers"))[:_MOST_LINES])]
    said = (
        "prompts and answers are logged" if privacy.get("logging") else "prompts and answers are not logged"
    )
    traces = "on: they can reveal the text" if privacy.get("traces") else "off"
    lines.append(f"privacy   {said}; routing traces are {traces}")
    return lines


def _request_lines(state: dict[str, Any]) -> list[str]:
    """The progress of running requests, and what others wait for; only the first ones, if there are many."""
    from argosy.engine.progress import prompt_line, wait_line

    running, waiting = (entries(state.get(key)) for key in ("running", "waiting"))
    lines = []
    for one in running[:_MOST_REQUESTS]:
        total, done, new = (whole(one.get(key)) for key in ("prompt_tokens", "prompt_done", "answer_tokens"))
        left, rate = number(one.get("seconds_left")), one.get("tok_per_s")
        progress = prompt_line(done, total, left)
        if done >= total:
            progress = f"prompt {total:,} tokens, answer {new:,}"
        speed = "" if rate is None else f", {_number(rate, _rate)} tok/s"
        lines.append(f"  {_name(one.get('id'))}  {progress}{speed}")
    for one in waiting[: max(0, _MOST_REQUESTS - len(running))]:
        why = wait_line(str(one.get("why")), whole(one.get("ahead")), number(one.get("share_done")))
        lines.append(f"  {_name(one.get('id'))}  {why}")
    if (more := len(running) + len(waiting) - len(lines)) > 0:
        lines.append(f"  and {more} more")
    return lines


def worker_lines(workers: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each worker, and one more for its fault, if any."""
    lines: list[str] = []
    for one in workers:
        rate = _number(one.get("hit_rate"), lambda value: f"{100 * value:.0f} %")
        p50, p99 = (_number(one.get(key), lambda us: f"{us / 1e3:.2f}") for key in ("p50_us", "p99_us"))
        sent, received = (_number(one.get(key), format_bytes) for key in ("bytes_out", "bytes_in"))
        lines.append(
            f"{_name(one.get('host')):<22}{_name(one.get('state')):<10} "
            f"{_owned(one)}, hits {rate}, {p50} ms (p99 {p99}), {sent} out, {received} in, "
            f"{_number(one.get('experts_rerouted'))} rerouted"
        )
        if why := one.get("why"):
            lines.append(f"  {_name(why)}")
    return lines


def _owned(worker: dict[str, Any]) -> str:
    """How many experts a worker owns, and how many it has in memory, perhaps including others' experts."""
    owned, resident = whole(worker.get("experts_owned")), whole(worker.get("resident"))
    if not owned:
        return "owns no experts"
    if worker.get("state") in ("away", "refused"):  # it reports nothing
        return f"owns {owned} experts"
    return f"owns {owned} experts, {'all' if resident >= owned else resident} in memory"


def watch(server: RemoteServer) -> None:
    """Redraw in place until ^C. The first state must arrive; after that, wait for a missing server.

    Raises:
        ServerNotUsable: the server cannot be used at all.
    """
    from rich.live import Live

    from argosy.cli.shared.output import quiet_keys
    from argosy.errors import ServerNotUsable

    state = server.state()
    with contextlib.suppress(KeyboardInterrupt), quiet_keys(), Live(screen=True, auto_refresh=False) as live:
        seen, wait_s = time.monotonic(), 0.5
        while True:
            trouble = f"{server.url} has ended the stream"
            try:
                for state in server.states():
                    seen, wait_s = time.monotonic(), 0.5
                    live.update(_Screen(state, server.url), refresh=True)
            except ServerNotUsable as error:
                trouble = error.message
            until = time.monotonic() + wait_s
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
            while (left_s := until - time.monotonic()) > 0:
                age = f"{trouble}; this state is {time.monotonic() - seen:.0f} s old"
                live.update(_Screen(state, server.url, age), refresh=True)
                time.sleep(min(left_s, 0.5))


class _Screen:
    """The lines of `state_lines`, with a memory bar and, if there is room, the use of experts."""

    def __init__(self, state: dict[str, Any], url: str, trouble: str | None = None) -> None:
        self._state = state
        self._url = url
        self._trouble = trouble

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        from rich.text import Text

        width = options.max_width
        height = options.height or console.size.height
        lines = [
            Text(line, no_wrap=True, overflow="ellipsis") for line in state_lines(self._state, self._url)
        ]
        lines.insert(2, memory_bar(fields(self._state.get("memory")), width))
        if self._trouble is not None:
            lines.insert(0, Text(self._trouble, style="yellow", no_wrap=True, overflow="ellipsis"))
        room = height - len(lines) - 1
        if (layers := _layers(self._state)) is not None and room >= _FEWEST_ROWS:
            lines += [Text(row, style="cyan", no_wrap=True) for row in heat_rows(layers, width, room)]
        yield from lines[:height]


def memory_bar(memory: dict[str, Any], width: int) -> Text:
    """The parts of the memory plan in order, at least one cell for each non-empty part; dots are unused memory."""
    from rich.text import Text

    parts = [(_name(line.get("name")), whole(line.get("bytes"))) for line in entries(memory.get("lines"))]
    limit = max(whole(memory.get("budget_bytes")), sum(size for _, size in parts), 1)
    bar = Text(no_wrap=True, overflow="crop")
    reached = 0
    for name, size in parts:
        start = len(bar)
        reached += size
        cells = round(reached * width / limit) - start
        bar.append("█" * (max(cells, 1) if size else 0), style=_COLORS.get(name, "white"))
    bar.append("·" * (width - len(bar)), style="bright_black")
    return bar


def heat_rows(layers: Sequence[Sequence[int]], width: int, height: int) -> list[str]:
    """Draw layers x experts, shaded by use relative to an equal share; neighbours may share a cell."""
    rows = []
    stride = -(-len(layers) // height)
    for first in range(0, len(layers), stride):
        shares = [_shares(uses) for uses in layers[first : first + stride]]
        experts = max(map(len, shares))
        columns = min(width, experts)
        row = ""
        for column in range(columns):
            start, end = column * experts // columns, (column + 1) * experts // columns
            most = max((max(part[start:end], default=0.0) for part in shares), default=0.0)
            row += _SHADES[min(len(_SHADES) - 1, math.ceil(most * (len(_SHADES) - 1)))]
        rows.append(row)
    return rows


def _shares(uses: Sequence[int]) -> list[float]:
    hottest = _HOTTEST * max(1, sum(uses)) / len(uses)
    return [min(1.0, use / hottest) for use in uses]


def _layers(state: dict[str, Any]) -> list[list[int]] | None:
    """Uses per expert, for the layers with experts; None if the server does not report them."""
    return [uses for uses in _uses(state) if uses] or None


def _uses(state: dict[str, Any]) -> list[list[int]]:
    """Uses per expert, for all layers."""
    layers = fields(state.get("heat")).get("layers")
    return [
        [whole(use) for use in uses] if isinstance(uses, list) else []
        for uses in (layers if isinstance(layers, list) else ())
    ]


def _most_uneven(state: dict[str, Any]) -> str | None:
    """A sentence about the layer whose busiest expert has the largest share."""
    used = [(layer, uses) for layer, uses in enumerate(_uses(state)) if uses]
    if not used:
        return None
    share, layer, expert = max(
        ((max(uses) / (sum(uses) or 1), layer, uses.index(max(uses))) for layer, uses in used),
        key=lambda found: found[0],
    )
    return (
        f"over {_number(fields(state['heat']).get('tokens'))} tokens; layer {layer} is the most uneven:"
        f" expert {expert} has {100 * share:.1f} % of its uses"
    )


def _name(value: object, absent: str = UNKNOWN) -> str:
    """Make text from a server safe for a terminal."""
    from argosy.checkpoint.untrusted_file import quote

    return quote(value) if isinstance(value, str) else absent


def _number(value: object, show: Callable[[float], str] = "{:.0f}".format) -> str:
    known = number(value)
    return UNKNOWN if known is None else show(known)


def _rate(tokens_per_s: float) -> str:
    return f"{tokens_per_s:.1f}"


def _print_json(state: dict[str, Any]) -> None:
    import json

    print(json.dumps(state), flush=True)
