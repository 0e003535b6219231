"""`argosy bench`: a model's speed on this machine, in lines for a bug report.

Elsewhere: `forecast/bench.py` does the measuring.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from argosy.cli.commands import completion
from argosy.cli.shared.declared import choices
from argosy.cli.shared.output import short_number
from argosy.cli.shared.settings import Settings, for_engine, read_settings
from argosy.config import DEMO, MIB, SIZING, format_bytes

if TYPE_CHECKING:
    from argosy.checkpoint.files import ModelFiles

_SMALLEST_FILE_BYTES = 64 * MIB  # the smallest file whose reads can measure the drive


@click.command("bench")
@click.argument("model", default=DEMO, shell_complete=completion.models)
@choices(Settings, *SIZING, into="flags")
@click.option("--json", "as_json", is_flag=True, help="Print the same facts as JSON.")
def bench(model: str, as_json: bool, flags: Settings) -> None:
    """Measure the speed of MODEL at the budget, and again with half as many experts in memory.

    Takes about a minute, and two on a slow machine. The lines say what else kept the machine busy meanwhile. Their
    figures: time to the first token of a short prompt, tokens per second after it, the share of experts that were
    found in memory, bytes read from the drive, and tokens per second of a long prompt.

    \b
    Examples:
      argosy bench
      argosy bench ./Qwen3-30B-A3B --memory 16GiB --json
    """
    from argosy.cli.shared.output import progress_bar
    from argosy.forecast.bench import CONTEXT_TOKENS
    from argosy.machine.neighbours import Neighbours
    from argosy.open.models import locate_model, open_files

    with progress_bar() as progress:
        files = open_files(locate_model(model, progress))
    context = min(flags.get("context") or CONTEXT_TOKENS, files.config.context_tokens)
    settings: Settings = {**read_settings(**flags), "context": context, "media": False, "record": False}
    with Neighbours() as others:
        rates = _rates(files, settings)
        fewest = max(1, files.config.experts_per_token)
        speeds = _speeds(model, settings, fewest, rates["drive_bytes_per_s"])
    facts = {
        **_machine_facts(settings),
        **_model_facts(model, files),
        **rates,
        "budgets": speeds,
        "load": others.load,
        "other_cores": others.other_cores,
        "others": others.others,
    }
    if as_json:
        import json

        print(json.dumps(facts, ensure_ascii=False))
    else:
        print(*_lines(facts, str(others)), sep="\n")


def _speeds(model: str, settings: Settings, fewest: int, drive: float | None) -> list[dict[str, Any]]:
    """Measure at the budget, then with half the experts that fit it, if that still holds a token's experts."""
    from argosy.cli.shared.output import progress_bar
    from argosy.forecast.bench import measure_alone

    def measured(**more: int) -> dict[str, Any]:
        with progress_bar() as progress:
            options = {**for_engine(settings), **more}
            return measure_alone(model, options, drive_bytes_per_s=drive, progress=progress)

    speeds = [measured()]
    plan = speeds[0]["plan"]
    half = plan["expert_slots"] // 2
    if half >= fewest:
        speeds.append(measured(expert_slots=half, chunk_tokens=plan["chunk_tokens"]))
    return speeds


def _machine_facts(settings: Settings) -> dict[str, Any]:
    from argosy import __version__, _native
    from argosy.machine import resources, tuning

    return {
        "version": __version__,
        "commit": _commit(),
        "cpu": resources.cpu_model(),
        "cores": resources.usable_cores(),
        "threads": settings.get("threads") or tuning.known_threads(settings.get("instruction_set")),
        "instruction_set": settings.get("instruction_set") or _native.instruction_sets()[-1],
        "total_bytes": resources.memory_limit().total_bytes,
    }


def _model_facts(model: str, files: ModelFiles) -> dict[str, Any]:
    return {
        "model": Path(model).name,  # the full path may reveal more than its owner wants to publish
        "family": files.config.family,
        "dense_formats": list(dict.fromkeys(ref.format for ref in files.dense.values())),
        "expert_format": files.expert_format if files.experts else None,
        "bytes": files.dense_bytes + files.expert_bytes,
        "experts_per_token": files.config.experts_per_token,
        "experts_per_layer": files.config.num_experts,
        "layers": files.config.num_layers,
    }


def _rates(files: ModelFiles, settings: Settings) -> dict[str, Any]:
    """The rates of memory and of the drive with the model's largest file; None where they cannot be measured."""
    from argosy.machine import probes, resources, tuning

    memory = None
    if resources.memory_limit().free_bytes > 2 * probes.MEMORY_BYTES:
        known = tuning.known_threads(settings.get("instruction_set"))
        memory = probes.memory_rate(settings.get("threads") or known)
    record_bytes = max((run.record.nbytes for run in files.records.runs()), default=MIB)
    paths = {ref.path for ref in files.dense.values()}
    paths |= set(files.records.paths)
    largest = max(paths, key=lambda path: path.stat().st_size)
    drive, why_not = None, None
    if largest.stat().st_size < _SMALLEST_FILE_BYTES:
        why_not = f"the model's largest file has less than {format_bytes(_SMALLEST_FILE_BYTES)}"
    else:
        try:
            drive = probes.drive_rate(largest, record_bytes)
        except RuntimeError:
            why_not = "the file system has no direct reads"
    return {
        "memory_bytes_per_s": memory,
        "drive_bytes_per_s": drive,
        "drive_record_bytes": record_bytes,
        "why_drive_not_measured": why_not,
    }


def _commit() -> str | None:
    """The commit of the checkout from which this package runs; None if it is installed, or without git."""
    package = Path(__file__).resolve().parents[1]
    git = ["git", "-C", str(package)]
    try:
        found = subprocess.run(
            [*git, "rev-parse", "--show-toplevel", "--short", "HEAD"],
            capture_output=True, text=True, check=True, timeout=10,
        ).stdout.split("\n")  # fmt: skip
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True, text=True, check=True, timeout=10,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    if package != Path(found[0]).resolve() / "src" / "argosy":
        return None
    return found[1] + ("+" if changed else "")


def _lines(facts: dict[str, Any], others: str) -> list[str]:
    commit = f" ({facts['commit']})" if facts["commit"] else ""
    experts = (
        f"{facts['expert_format']} experts, {facts['experts_per_token']} of {facts['experts_per_layer']} a token"
        if facts["expert_format"]
        else "no routed experts"
    )
    memory = facts["memory_bytes_per_s"]
    drive = facts["drive_bytes_per_s"]
    return [
        f"argosy {facts['version']}{commit}, {facts['threads']} threads on {facts['cores']} cores of {facts['cpu']},"
        f" {facts['instruction_set']}, {format_bytes(facts['total_bytes'])}",
        f"{facts['model']}: {facts['family']}, {format_bytes(facts['bytes'])}, {experts}",
        f"memory {'not measured' if memory is None else f'{memory / 1e9:.1f} GB/s'}, drive "
        + (
            f"not measured: {facts['why_drive_not_measured']}"
            if drive is None
            else f"{drive / 1e9:.2f} GB/s in direct reads of {format_bytes(facts['drive_record_bytes'])}"
        ),
        *map(_speed_line, facts["budgets"]),
        others,
    ]


def _speed_line(speed: dict[str, Any]) -> str:
    plan = speed["plan"]
    share = (
        f"{100 * plan['expert_slots'] / plan['experts']:.0f} % of experts"
        if plan["experts"]
        else "no experts"
    )
    return (
        f"{format_bytes(plan['total_bytes'])}, {share}: decode {short_number(speed['decode_tok_per_s'], 3)} tok/s,"
        f" hit rate {speed['hit_rate']:.2f}, {speed['bytes_read_per_token'] / 1e6:.1f} MB read a token; prefill"
        f" {short_number(speed['prefill_tok_per_s'], 3)} tok/s of {speed['prefill_prompt_tokens']};"
        f" first token {speed['first_token_s']:.3f} s after {speed['first_token_prompt_tokens']}"
    )
