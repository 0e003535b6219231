"""`argosy serve`: serve one model or several to other tools over HTTP."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import click

from argosy.cli.commands import completion
from argosy.cli.commands.auditing import KeepingOptions, keeping_of, keeping_options
from argosy.cli.commands.listening import ADDRESS, ListeningOptions, listening_of, listening_options
from argosy.cli.shared.declared import choices, options
from argosy.cli.shared.group_options import WantedGroup, group_options
from argosy.cli.shared.help_all import Command
from argosy.cli.shared.options import CO2, Recording, engine_options, open_engine, watermark_option
from argosy.cli.shared.output import short_number
from argosy.cli.shared.settings import Settings, for_engine, read_settings
from argosy.config import (
    CHOOSING,
    DEMO,
    MOST_SEQUENCES,
    SERVED_AT_ONCE,
    SERVED_WAITING,
    Claim,
    KvDir,
    Pooling,
    SamplingParams,
    counted,
    parse_seconds,
)
from argosy.config.option import Further, Option
from argosy.errors import UsageError

if TYPE_CHECKING:
    from argosy.budget.memory_plan import MemoryPlan
    from argosy.config.engine import WantedAdapter
    from argosy.forecast.forecast import Speeds
    from argosy.library.names import Named
    from argosy.serve.guards.guarding import Guarding
    from argosy.serve.http.listen import Listener
    from argosy.serve.models.entry import Offer, Offers
    from argosy.serve.run import ServerSettings

_PROMPT_TOKENS = 1024  # length of the prompt whose first token is predicted at the start


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions(ListeningOptions):
    """Options of `serve` alone."""

    media_host: Annotated[
        tuple[str, ...], Further("--media-host NAME", "Fetch media from this host if requests name it.")
    ] = ()
    names: Annotated[
        tuple[str, ...], Option("--name ID", "Model name for clients; default: the file name.")
    ] = ()
    preload: Annotated[tuple[str, ...], Further("--preload ID", "Load this model at the start.")] = ()
    library: Annotated[bool, Option("--library", "Serve all local models, loaded on request.")] = False
    idle_unload: Annotated[
        str | None, Option("--idle-unload TIME", "Unload a model after 10m (90s, 1h) of no use.")
    ] = None
    any_model: Annotated[bool, Further("--any-model", "Accept every model name that clients send.")] = False
    lora_dir: Annotated[
        Path | None, Further("--lora-dir DIR", "Admins may load adapters from DIR.", completes="files")
    ] = None
    max_sequences: Annotated[
        int, Option("--max-sequences N", "Answers at once.", least=1, most=MOST_SEQUENCES, shows_default=True)
    ] = SERVED_AT_ONCE
    max_waiting: Annotated[
        int, Further("--max-waiting N", "Requests that may wait.", least=0, shows_default=True)
    ] = SERVED_WAITING
    kv_dir: Annotated[Path | None, Option("--kv-dir DIR", "Keep the KV cache of prompts in DIR.")] = None
    pooling: Annotated[
        Pooling | None, Further("--pooling", "Pooling of embeddings; default: the checkpoint's.")
    ] = None
    rerank: Annotated[
        Literal["qwen3"] | None, Further("--rerank", "Rank documents with prompts of this form.")
    ] = None
    no_store: Annotated[bool, Option("--no-store", "Keep no responses for later requests.")] = False
    policy: Annotated[
        Path | None, Further("--policy FILE", "Policy for texts: docs/guides/responsible-use.md.")
    ] = None
    keep_billing_line: Annotated[
        bool, Further("--keep-billing-line", "Keep the billing line of Claude Code.")
    ] = False
    co2_grams_per_kwh: CO2 = None


@click.command("serve", cls=Command)
@click.argument("models", nargs=-1, metavar="[MODEL]...", shell_complete=completion.models)
@engine_options
@choices(SamplingParams, *CHOOSING, into="sampling")
@group_options
@options(
    ServeOptions, *ADDRESS, "media_host", "names", "preload", "library", "idle_unload", "any_model", "lora_dir",
    "drain", "max_sequences", "max_waiting", "max_connections", "kv_dir", "pooling", "rerank", "no_store", "policy",
    "keep_billing_line", into="given",
)  # fmt: skip
@watermark_option
@options(ServeOptions, "co2_grams_per_kwh", into="given")
@keeping_options
@listening_options(ServeOptions)
def serve(
    models: tuple[str, ...], given: ServeOptions, keeps: KeepingOptions, flags: Settings, sampling: dict[str, float],
    group: WantedGroup,
) -> None:  # fmt: skip
    """Serve models over HTTP: APIs of OpenAI, Anthropic and Ollama, and a page.

    \b
    Examples:
      argosy serve Qwen3-30B-A3B --memory 16GiB
      argosy serve model.gguf ./GLM-4.7-Flash --host 0.0.0.0 --keys keys.json
    """
    # Imported before the engine, because the memory plan counts the memory that the process already uses.
    from argosy.cli.commands.served_library import ServedPresets
    from argosy.library.names import preset_of
    from argosy.serve.answer.media_hosts import MediaHosts
    from argosy.serve.http.server import make_room_for_files
    from argosy.serve.http.work import share_one_heap
    from argosy.serve.run import ServerSettings, require_keys, require_keys_behind_proxy

    listening = listening_of(given)
    SamplingParams.asked(sampling)  # checks the values
    keeping = keeping_of(keeps, kv_dir=given.kv_dir, store=not given.no_store)
    require_keys(listening.host, given.keys)
    require_keys_behind_proxy(listening.front, given.keys)
    if given.library:
        _refuse_beside_library(
            models=models, name=given.names, kv_dir=given.kv_dir, policy=given.policy,
            lora=flags.get("loras"), **flags,
        )  # fmt: skip
    presets = {model for model in models if preset_of(model) is not None}
    found = [] if given.library else _look_up(models or (DEMO,), presets)
    ids = _ids(found, given.names)
    idle_unload_s = None if given.idle_unload is None else parse_seconds(given.idle_unload)
    for name in given.preload:
        if name not in ids and not given.library:
            raise UsageError(f"--preload {name}: this server has: {', '.join(ids)}")
    settings = read_settings(**flags)
    loras: Mapping[str, Sequence[WantedAdapter]] = {}
    texts, columns = settings.pop("loras", ()), settings.pop("lora_columns", None)
    if texts or columns:
        from argosy.adapters.wanted import by_model

        loras = by_model([*texts], ids, columns)
    kept = None if given.kv_dir is None else _kv_dir(given.kv_dir, keeping.kv_s)
    server = ServerSettings(
        endpoint=listening.endpoint(given), keep_billing_line=given.keep_billing_line,
        any_model=given.any_model, store=not given.no_store, rerank=given.rerank,
        media_hosts=MediaHosts(given.media_host) if given.media_host else None, audit=keeping.audit,
        co2_grams_per_kwh=given.co2_grams_per_kwh,
        store_s=keeping.store_s, max_sequences=given.max_sequences, idle_unload_s=idle_unload_s, preload=given.preload,
        guarding=_guarding(given.policy), lora_dir=given.lora_dir,
        has_watermark="watermark" in settings,
        prefix_files_s=None if kept is None else kept.ttl_s,
        presets=ServedPresets(None if given.library else dict(zip(ids, found, strict=True))),
        default=next((model for model in models[:1] if model in presets), None),
    )  # fmt: skip
    _check_keys(given.keys, settings.get("watermark"))
    if given.check:
        if "instruction_set" in settings:
            from argosy.engine.options import choose_instruction_set

            choose_instruction_set(settings["instruction_set"])
        print("the settings are valid")
        return
    if keeping.audit is not None:
        from argosy.guard.audit import check_audit

        check_audit(keeping.audit)
    more = {
        "grammars": True, "max_sequences": given.max_sequences, "max_waiting": given.max_waiting,
        "pooling": given.pooling, "kv_dir": kept, "sampling": sampling,
    }  # fmt: skip
    share_one_heap()
    make_room_for_files(given.max_connections)
    with listening.bind() as sockets:
        _serve(found, ids, settings, more, sockets, server, group, loras)


def _look_up(models: Sequence[str], presets: Collection[str]) -> list[Named]:
    """The models, each once: a preset adds its model if no other name does."""
    from argosy.library.names import look_up

    found: list[Named] = []
    for model in sorted(models, key=presets.__contains__):
        named = look_up(model)
        if model not in presets or named.path not in [one.path for one in found]:
            found.append(named)
    return found


def _check_keys(keys: Path | None, watermark: Path | str | None) -> None:
    """Raises UsageError: a file of keys cannot be read."""
    from argosy.engine.watermark import Watermark
    from argosy.guard.keys import KeyFile

    if keys is not None:
        KeyFile(keys).read()
    if watermark is not None:
        Watermark.read(Path(watermark))


def _refuse_beside_library(**options: Any) -> None:
    for name in ("models", "name", "kv_dir", "policy", "mmproj", "ears", "lora", "lora_columns"):
        if options.get(name):
            what = "a MODEL" if name == "models" else f"--{name.replace('_', '-')}"
            raise UsageError(
                f"--library and {what} exclude each other: the library is every local model",
                hint="`argosy serve MODEL... --idle-unload 15m` serves some of them",
            )


def _guarding(policy: Path | None) -> Guarding | None:
    if policy is None:
        return None
    from argosy.serve.guards.guarding import Guarding

    return Guarding(policy)


def _kv_dir(path: Path, kept_s: float | None) -> KvDir:
    return KvDir(path=path) if kept_s is None else KvDir(path=path, ttl_s=kept_s)


def _ids(models: Sequence[Named], names: Sequence[str]) -> list[str]:
    """The names of models for clients.

    Raises:
        UsageError: two models would have the same name, a name is invalid, or there are names for some models only.
    """
    for name in names:
        if not name or not name.isprintable():  # it is logged
            raise UsageError(f"--name must be printable text, found {name[:64]!a}")
    if names and len(names) != len(models):
        raise UsageError(
            f"--name was given {counted(len(names), 'time')}, and there {'is' if len(models) == 1 else 'are'} "
            f"{counted(len(models), 'model')}",
            hint="give it once for each model, in their order, or not at all",
        )
    # A part of a name, or an alias, becomes the whole name.
    ids = list(names) or [Path(one.name or one.text).name.removesuffix(".gguf") for one in models]
    for name in ids:
        if ids.count(name) > 1:
            raise UsageError(
                f"two models are named {name}",
                hint="name each of them yourself: `--name ID` once for each model, in their order",
            )
    return ids


def _serve(
    models: Sequence[Named],
    ids: Sequence[str],
    settings: Settings,
    more: Mapping[str, Any],
    sockets: Sequence[Listener],
    server: ServerSettings,
    wanted: WantedGroup,
    loras: Mapping[str, Sequence[WantedAdapter]],
) -> None:
    """Serve models, or the library if there are none.

    The only model is opened now and stays, with all of the budget, unless it may be unloaded when it is idle. Others
    are loaded when requests name them.
    """
    from argosy.budget.planner import shared_bytes
    from argosy.budget.requirements import require_machine
    from argosy.cli.commands.served_library import ServedLibrary, speeds_of
    from argosy.engine.options import budget_of
    from argosy.library import kept
    from argosy.serve.claims import KEPT_BYTES, REPLAY_BYTES, server_claims
    from argosy.serve.models.entry import Offer
    from argosy.serve.run import serve as run

    is_recorded = settings.get("record", True)
    recording = Recording(keeps_recent=True) if is_recorded else None
    shared = (*server_claims(keeps_content=server.keeps_content), Claim("replay_bytes", KEPT_BYTES))
    own = (Claim("replay_bytes", REPLAY_BYTES - KEPT_BYTES),)
    library_names = {name: found.name for found, name in zip(models, ids, strict=True)}

    def note_use(name: str) -> None:
        if (in_library := library_names.get(name, name)) is not None:
            kept.note_use(in_library)

    offers: Sequence[Offer] | Callable[[], Offers]
    with ExitStack() as opened:
        expectation = None
        if len(models) == 1 and server.idle_unload_s is None:
            group = opened.enter_context(wanted.open(models[0].text))
            server, more = replace(server, workers=group), {**more, "loras": loras.get(ids[0], ())}
            engine = opened.enter_context(
                open_engine(
                    models[0], settings, recording=recording, group=group, claims=(*shared, *own), **more
                )
            )
            speeds = speeds_of(
                engine,
                models[0].path or models[0].text,
                threads=engine.settings.threads,
                uses_counts=is_recorded,
            )
            if speeds is not None:
                expectation = _expectation(models[0].text, speeds, engine.plan)
            recorder = None if recording is None else recording.recorder
            offers = [Offer.of_engine(engine, ids[0], recorder=recorder, speeds=speeds)]
            budget_bytes, process_bytes = engine.plan.budget_bytes, 0
        else:
            _refuse_with_several(wanted, settings)
            budget_bytes = budget_of(settings.get("memory"), None).ram_bytes
            given = {**for_engine(settings), **more, "claims": own, "memory": budget_bytes}
            if models:
                offers, process_bytes = _make_ready(models, ids, {**given, "loras": loras}, shared, recording)
            else:
                require_machine(budget_bytes)
                process_bytes = shared_bytes(None, shared)
                offers = ServedLibrary(given, process_bytes, recording).look
        run(
            offers, sockets, server, budget_bytes=budget_bytes, process_bytes=process_bytes,
            record=(lambda: Recording(keeps_recent=True)) if is_recorded else None, note_use=note_use,
            expectation=expectation,
        )  # fmt: skip


def _refuse_with_several(wanted: WantedGroup, settings: Settings) -> None:
    """Refuse what only a server with one model has, whose model stays in memory."""
    if wanted.hosts:
        raise UsageError(
            "--cluster is for a server with one model that stays loaded",
            hint="start a server for each model, each with workers of its own",
        )
    for option in ("mmproj", "ears"):
        if option in settings:
            raise UsageError(
                f"--{option} is for a server with one model",
                hint="a vision tower beside its GGUF file is found" if option == "mmproj" else None,
            )


def _make_ready(
    models: Sequence[Named],
    ids: Sequence[str],
    given: Mapping[str, Any],
    claims: tuple[Claim, ...],
    recording: Recording | None,
) -> tuple[list[Offer], int]:
    """Make models ready to be loaded. Returns them, and the memory of the process without their floors."""
    from urllib.parse import quote

    from argosy.cli.commands.served_library import speeds_of
    from argosy.cli.shared.output import progress_bar
    from argosy.engine.shared import make_ready
    from argosy.open.models import configure, locate_model, open_files
    from argosy.serve.models.entry import Offer

    found, paths = [], {}
    with progress_bar() as progress:
        for named, name in zip(models, ids, strict=True):
            model, options = named.path or named.text, {**given, "loras": given["loras"].get(name, ())}
            paths[name] = path = locate_model(model, progress)
            files = open_files(path)
            if (kv_dir := given["kv_dir"]) is not None:
                own = kv_dir.path / quote(name, safe="")
                options["kv_dir"] = replace(kv_dir, path=own, max_bytes=kv_dir.max_bytes // len(models))
            found.append((name, files, configure(model, files, **options)))
        ready, process_bytes = make_ready(found, claims=claims, recorder=recording)
    offers = [
        Offer.of_ready(one, speeds_of(one, paths[one.name], threads=one.config.threads)) for one in ready
    ]
    return offers, process_bytes


def _expectation(model: str, speeds: Speeds, plan: MemoryPlan) -> str:
    """The expected speed of one answer at a time, in a line."""
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
