"""`argosy serve`: serve a model to other tools over HTTP."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from argosy.cli.options import Recording, engine_options, open_engine
from argosy.cli.output import short_number
from argosy.config import DEMO, SERVED_AT_ONCE, SERVED_WAITING
from argosy.errors import UsageError

if TYPE_CHECKING:
    from argosy.engine.forecast import Speeds
    from argosy.engine.memory_plan import MemoryPlan

_PROMPT_TOKENS = 1024  # of the prompt whose first token is predicted at the start
_REPLAY_BYTES = 16 << 20  # answers of a thousand tokens take about 20 KB each


@click.command("serve")
@click.argument("model", default=DEMO)
@engine_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    default=8080,
    show_default=True,
    type=click.IntRange(0, 65535),
    help="Port to listen on; 0 takes any free port.",
)
@click.option(
    "--keys", type=click.Path(path_type=Path), metavar="FILE", help="API keys of clients; see `argosy keys`."
)
@click.option("--allow-host", multiple=True, metavar="NAME", help="Also accept requests for this host name.")
@click.option(
    "--media-host",
    multiple=True,
    metavar="NAME",
    help="Fetch media that requests name, from this host.",
)
@click.option("--name", metavar="ID", help="Model name for clients; default: the file name.")
@click.option("--any-model", is_flag=True, help="Accept every model name that clients send.")
@click.option(
    "--drain",
    default=30.0,
    show_default=True,
    type=click.FloatRange(0, 3600),
    metavar="S",
    help="Seconds to finish running requests at the end.",
)
@click.option(
    "--max-sequences",
    default=SERVED_AT_ONCE,
    show_default=True,
    type=click.IntRange(1, 1024),
    metavar="N",
    help="Answers generated at once.",
)
@click.option(
    "--max-waiting",
    default=SERVED_WAITING,
    show_default=True,
    type=click.IntRange(0),
    metavar="N",
    help="Requests that may wait.",
)
@click.option(
    "--max-connections",
    default=512,
    show_default=True,
    type=click.IntRange(1, 65535),
    metavar="N",
    help="Open connections; further clients get 503.",
)
@click.option(
    "--kv-dir", type=click.Path(path_type=Path), metavar="DIR", help="Keep the KV cache of prompts here."
)
@click.option(
    "--keep-billing-line", is_flag=True, help="Keep the billing line in Claude Code's system prompt."
)
def serve(
    model: str, host: str, port: int, keys: Path | None, allow_host: tuple[str, ...],
    media_host: tuple[str, ...], name: str | None,
    drain: float, max_sequences: int, max_waiting: int, max_connections: int, kv_dir: Path | None,
    keep_billing_line: bool, any_model: bool, **options: Any,
) -> None:  # fmt: skip
    """Serve a model over HTTP: the APIs of OpenAI and Anthropic, and a chat page at /.

    \b
    Examples:
      argosy serve ./Qwen3-30B-A3B --memory 16GiB
      argosy serve model.gguf --host 0.0.0.0 --keys keys.json
    """
    # Imported before the engine, because the memory plan counts the memory that the process already uses.
    from argosy.cli.settings import Settings
    from argosy.engine import calibration
    from argosy.engine.forecast import Speeds
    from argosy.engine.memory_plan import REQUEST_BYTES
    from argosy.engine.options import locate_model
    from argosy.guard.keys import KeyFile
    from argosy.observe.live import LiveCache
    from argosy.serve.media_hosts import MediaHosts
    from argosy.serve.run import bind, make_room_for_files, require_keys
    from argosy.serve.run import serve as run

    require_keys(host, keys)
    media_hosts = MediaHosts(media_host) if media_host else None
    if keys is not None:
        KeyFile(keys).read()
    settings = Settings.read(**{name: options.get(name) for name in Settings.__dataclass_fields__})
    more = {
        "grammars": True, "max_sequences": max_sequences, "max_waiting": max_waiting, "kv_dir": kv_dir,
        "replay_bytes": _REPLAY_BYTES, "request_bytes": REQUEST_BYTES,
    }  # fmt: skip
    make_room_for_files(max_connections)
    recording = Recording(keeps_recent=True)
    with (
        bind(host, port) as sockets,
        open_engine(model, settings, recording=recording, **more) as engine,
    ):
        if recording.recorder is not None and not engine.plan.is_resident:
            recent_cache = LiveCache(
                recording.recorder, num_experts=engine.config.num_experts, num_slots=engine.plan.num_slots
            )
        else:
            recent_cache = None
        speeds = expectation = None
        with suppress(UsageError):  # of rates that were kept in a damaged file; `argosy plan` tells
            rates = calibration.rates_here(locate_model(model), threads=engine.settings.threads)
            speeds = Speeds(engine.config, engine.work, rates, recording.known)
            expectation = _expectation(model, speeds, engine.plan)
        run(
            engine, name or Path(model).name.removesuffix(".gguf"), sockets, host=host, keys=keys,
            hosts=allow_host, drain_s=drain, max_connections=max_connections, keep_billing_line=keep_billing_line,
            any_model=any_model, media_hosts=media_hosts, recent_cache=recent_cache,
            speeds=speeds, expectation=expectation,
        )  # fmt: skip


def _expectation(model: str, speeds: Speeds, plan: MemoryPlan) -> str:
    """What to expect of one answer at a time, in a line."""
    decode = speeds.decode(plan, 1)
    prompt = speeds.prompt(plan, min(_PROMPT_TOKENS, plan.context_tokens // 2))
    rates, seconds = map(short_number, decode.tokens_per_s), map(short_number, prompt.seconds)
    (slow, _, fast), (soon, _, late) = rates, seconds
    known = "measured on this machine"
    if not speeds.rates.is_measured:
        known = f"guessed from the kind of processor: `argosy plan {model} --calibrate` measures them"
    return (
        f"expects {slow} to {fast} tok/s for one answer, bound by {decode.bound}; first token of a prompt of "
        f"{prompt.num_tokens} after {soon} to {late} s (rates are {known})"
    )
