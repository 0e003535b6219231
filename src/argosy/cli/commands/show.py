"""`argosy show`: describe a model and whether it fits, from the headers of its files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

import click

from argosy.cli.commands import completion
from argosy.cli.shared.help_all import Command
from argosy.cli.shared.options import engine_options, settings_of
from argosy.cli.shared.output import parameter_count, print_facts
from argosy.cli.shared.settings import Settings, for_engine, read_settings
from argosy.cli.shared.weights import formats_in_short, weight_facts, weight_lines
from argosy.config import DEMO, format_bytes
from argosy.errors import DoesNotFit

if TYPE_CHECKING:
    from argosy.budget.memory_plan import MemoryPlan
    from argosy.checkpoint.files import ModelFiles
    from argosy.config import ModelConfig


@click.command("show", cls=Command)
@click.argument("model", default=DEMO, shell_complete=completion.models)
@engine_options
@click.option("--json", "as_json", is_flag=True, help="Print the same facts as JSON.")
def show(model: str, as_json: bool, flags: Settings) -> None:
    """Describe MODEL: family, geometry, memory plan. Reads headers, not weights.

    Exit code 3 means that it does not fit the budget. For a config.json without weights, sizes are calculated.

    \b
    Examples:
      argosy show ./Qwen3-30B-A3B --memory 16GiB
      argosy show ./mixtral.Q4_K_M.gguf --memory 75% --context 32768 --json
    """
    from argosy.cli.shared.output import progress_bar
    from argosy.engine.options import require_context
    from argosy.library import names, presets
    from argosy.model.families import config_alone
    from argosy.open.models import locate_model, open_files

    settings = read_settings(**flags)
    with progress_bar() as progress:
        name, path, preset = names.name_of(model), locate_model(model, progress), names.preset_of(model)
    if (config := config_alone(path)) is not None:
        require_context(config, settings.get("context"))
        facts = {"name": name, "path": str(path), **geometry_facts(config), **_hypothetical_sizes(config)}
        if as_json:
            _print_json(facts)
        else:
            print_facts(config_lines(facts))
        return
    files = open_files(path, mmproj=settings.get("mmproj"))
    facts = {"name": name, **model_facts(files)}
    if preset is not None:
        facts["preset"] = {**presets.facts_of(preset), "messages": preset.messages}
        facts["sampling"] |= preset.sampling
        facts["sampling_source"] = (
            f"the preset {preset.name}" if preset.sampling else facts["sampling_source"]
        )
        settings = settings_of(preset, settings)
    if not as_json:
        if preset is not None:
            from argosy.cli.commands.preset import lines as preset_lines

            print_facts([f"preset    {line}" for line in preset_lines([preset])])
        print_facts(fact_lines(facts))
    try:
        plan = _plan(model, files, settings)
    except DoesNotFit as refusal:
        if as_json:
            _print_json({**facts, "fits": False, "plan": refusal.facts.get("plan"), "why": refusal.message})
        else:
            print("fits      no")
        raise
    if as_json:
        _print_json({**facts, "fits": True, "plan": plan.as_dict()})
        return
    from argosy.cli.shared.output import plan_lines

    print(f"fits      yes, {format_bytes(plan.total_bytes)} of {format_bytes(plan.budget_bytes)}")
    print_facts(plan_lines(plan))


def geometry_facts(config: ModelConfig) -> dict[str, Any]:
    """Family, geometry and parameters, by name."""
    from argosy.budget.footprint import state_bytes
    from argosy.checkpoint.geometry import count_parameters

    everything, active = count_parameters(config)
    num_heads, num_kv_heads, head_dim = _heads(config)
    return {
        "family": config.family,
        "num_layers": config.num_layers,
        "num_moe_layers": len(config.moe_layers),
        "num_recurrent_layers": len(config.recurrent_layers),
        "recurrent_state_bytes_per_sequence": state_bytes(config, 1),
        "hidden_size": config.hidden_size,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "num_experts": config.num_experts,
        "experts_per_token": config.experts_per_token,
        "expert_width": config.expert_width,
        "least_experts_per_token": min(map(config.chosen_in, config.moe_layers), default=0),
        "least_expert_width": min(map(config.expert_width_in, config.moe_layers), default=0),
        "shared_width": config.shared_width,
        "vocab_size": config.vocab_size,
        "context_tokens": config.context_tokens,
        "num_parameters": everything,
        "num_parameters_per_token": active,
    }


def _heads(config: ModelConfig) -> tuple[int, int, int]:
    """Heads, KV heads and head size of the first layer with attention; zeros if none has it."""
    if (latent := config.latent) is not None:
        return latent.num_heads, latent.num_heads, latent.head_dim
    if (compressed := config.compressed) is not None:
        return compressed.num_heads, 1, compressed.head_dim
    try:
        attention = config.attention
    except LookupError:
        return 0, 0, 0
    return attention.num_heads, attention.num_kv_heads, attention.head_dim


def model_facts(files: ModelFiles) -> dict[str, Any]:
    """The same, plus the content of the files."""
    return {
        "path": str(files.path),
        **geometry_facts(files.config),
        "is_packed": files.is_packed,
        "is_gguf": files.path.is_file(),
        "dense_formats": list(dict.fromkeys(ref.format for ref in files.dense.values())),
        "expert_format": files.expert_format if files.experts else None,
        "dense_bytes": files.dense_bytes,
        "expert_bytes": files.expert_bytes,
        "table_bytes": files.table_bytes,
        "weights": weight_facts(files),
        "exact_tokens": files.config.exact_tokens,
        "encoders": _encoder_facts(files),
        **_sampling_facts(files),
    }


def _sampling_facts(files: ModelFiles) -> dict[str, Any]:
    """The default sampling, its source, and the parts that are not supported."""
    from argosy.checkpoint.sampling import declared_sampling

    defaults = declared_sampling(files)
    return {
        "sampling": defaults.as_dict(),
        "sampling_source": defaults.source,
        "sampling_notes": list(defaults.notes),
    }


def _encoder_facts(files: ModelFiles) -> list[dict[str, Any]]:
    """The encoders for pictures and sound, or why they cannot run."""
    from argosy.model.encoders.reading import EncoderFiles, find_encoders

    facts: list[dict[str, Any]] = []
    for kind, found in find_encoders(files).items():
        if not isinstance(found, EncoderFiles):
            facts.append({"kind": kind, "fault": found.message})
            continue
        refs = found.tensors.values()
        facts.append(
            {
                "kind": kind,
                "num_parameters": sum(ref.rows * ref.cols for ref in refs),
                "nbytes": sum(ref.nbytes for ref in refs),
                "formats": list(dict.fromkeys(ref.format for ref in refs)),
            }
        )
    return facts


def _hypothetical_sizes(config: ModelConfig) -> dict[str, Any]:
    """The bytes of a model as a checkpoint and as packs, and of its KV cache."""
    from argosy.budget.footprint import kv_bytes
    from argosy.checkpoint.formats import matrix_bytes
    from argosy.checkpoint.geometry import (
        dense_shapes,
        expert_shapes,
        num_table_parameters,
        packed_config,
        packed_format,
    )
    from argosy.config import Format, KvDtype
    from argosy.model.layers import kv_shapes

    def dense_bytes(format: Format) -> int:
        return sum(
            matrix_bytes(packed_format(name, format, config), *(shape if len(shape) == 2 else (1, *shape)))
            for name, shape in dense_shapes(packed_config(config))
        )

    def expert_bytes(format: Format) -> int:
        shapes = (shape for layer in config.moe_layers for shape in expert_shapes(config, layer))
        return config.num_experts * sum(matrix_bytes(format, *shape) for shape in shapes)

    is_windowed = {shape.is_windowed for shape in kv_shapes(config)}
    # Layers with a window keep a fixed number of positions, unless all have one.
    windows = 1 if False in is_windowed else None

    def kv_per_token(kind: KvDtype) -> int:
        first, both = (kv_bytes(config, tokens, kind, window_blocks=windows) for tokens in (1024, 2048))
        return (both - first) // 1024

    formats: tuple[Format, ...] = ("bf16", "q8", "q4")
    return {
        "bytes": {
            format: {"dense_bytes": dense_bytes(format), "expert_bytes": expert_bytes(format)}
            for format in formats
        },
        "num_table_parameters": num_table_parameters(config),
        "kv_bytes_per_token": {kind: kv_per_token(kind) for kind in get_args(KvDtype)},
        "has_kv_windows": len(is_windowed) > 1,
    }


def fact_lines(facts: dict[str, Any]) -> list[str]:
    """The facts of `model_facts` as lines of text."""
    kind = "a pack" if facts["is_packed"] else "a GGUF file" if facts["is_gguf"] else "safetensors files"
    experts = formats_in_short((facts["expert_format"] or "none").split("+"))
    dense = formats_in_short(facts["dense_formats"])
    return [
        f"model     {facts['name']}",
        f"  path          {facts['path']}",
        f"  family        {facts['family']}, {kind}, experts {experts}, rest {dense}",
        *_geometry_lines(facts),
        f"  on disk       {format_bytes(facts['dense_bytes'])} used by every token,"
        f" {format_bytes(facts['expert_bytes'])} of routed experts"
        + (f", {format_bytes(facts['table_bytes'])} of n-gram tables" if facts["table_bytes"] else ""),
        *(
            f"{label:<16}{line}"
            for label, line in zip(("  weights", ""), weight_lines(facts["weights"]), strict=False)
        ),
        *(_encoder_line(encoder) for encoder in facts["encoders"]),
        *_exactness_lines(facts["exact_tokens"]),
        *_sampling_lines(facts),
    ]


def _exactness_lines(exact_tokens: int | None) -> list[str]:
    if exact_tokens is None:
        return []
    return [f"  indexers      missing: approximate beyond {exact_tokens:,} tokens"]


def _sampling_lines(facts: dict[str, Any]) -> list[str]:
    """The temperature and the other settings that have an effect."""
    values, off = facts["sampling"], {"top_p": 1, "repetition_penalty": 1}
    if values["temperature"] == 0:
        said = "temperature 0: always the likeliest token"
    else:
        said = ", ".join(
            f"{name.replace('_', '-')} {value:g}"
            for name, value in values.items()
            if name == "temperature" or value != off.get(name, 0)
        )
    notes = (f"                {note}" for note in facts["sampling_notes"])
    return [f"  sampling      {said} (from {facts['sampling_source']})", *notes]


def _encoder_line(encoder: dict[str, Any]) -> str:
    label = f"  {encoder['kind'] + 's':<14}"
    if "fault" in encoder:
        return f"{label}cannot be encoded: {encoder['fault']}"
    return (
        f"{label}{parameter_count(encoder['num_parameters'])} parameters of their encoder,"
        f" {format_bytes(encoder['nbytes'])} in {'+'.join(encoder['formats'])}"
    )


def config_lines(facts: dict[str, Any]) -> list[str]:
    """The facts of a config.json as lines of text."""
    sizes = (
        f"{format} {format_bytes(parts['dense_bytes'])} + {format_bytes(parts['expert_bytes'])}"
        for format, parts in facts["bytes"].items()
    )
    per_token = facts["kv_bytes_per_token"]
    return [
        f"model     {facts['name']}, without weights",
        f"  path          {facts['path']}",
        f"  family        {facts['family']}",
        *_geometry_lines(facts),
        f"  would take    {', '.join(sizes)} (used by every token + routed experts)",
        *(
            [
                f"  n-gram tables {parameter_count(tables)} of these parameters, in the format of the checkpoint"
            ]
            if (tables := facts["num_table_parameters"])
            else []
        ),
        f"  KV cache      {format_bytes(per_token['f16'])} per token, {format_bytes(per_token['f32'])} with --kv f32,"
        f" {format_bytes(per_token['q8'])} with --kv q8{', besides windows' if facts['has_kv_windows'] else ''}",
    ]


def _geometry_lines(facts: dict[str, Any]) -> list[str]:
    shared = f", and a shared expert of width {facts['shared_width']}" if facts["shared_width"] else ""
    everything, active = facts["num_parameters"], facts["num_parameters_per_token"]
    state = format_bytes(facts["recurrent_state_bytes_per_sequence"])
    recurrent = f", {facts['num_recurrent_layers']} with a recurrent state: {state} per sequence"
    heads = f"{facts['num_heads']} heads, {facts['num_kv_heads']} KV heads, head size {facts['head_dim']}"
    return [
        f"  parameters    {parameter_count(everything)}, {parameter_count(active)} active per token",
        f"  layers        {facts['num_layers']}, {facts['num_moe_layers'] or 'none'} with routed experts"
        + (recurrent if facts["num_recurrent_layers"] else ""),
        f"  experts       {facts['num_experts']} per layer, {_span(facts, 'experts_per_token')} per token,"
        f" width {_span(facts, 'expert_width')}{shared}"
        if facts["num_experts"]
        else "  experts       none: all weights stay in memory",
        f"  attention     {heads if facts['num_heads'] else 'none'}; hidden size {facts['hidden_size']}",
        f"  vocabulary    {facts['vocab_size']} tokens; context {facts['context_tokens']} tokens",
    ]


def _span(facts: dict[str, Any], name: str) -> str:
    """Write a number that may differ between layers."""
    least, most = facts[f"least_{name}"], facts[name]
    return str(most) if least == most else f"{least} to {most}"


def _plan(model: str, files: ModelFiles, settings: Settings) -> MemoryPlan:
    """The plan that `Engine` would make in a process with the same memory in use."""
    from argosy.budget.allowances import process_bytes
    from argosy.budget.footprint import ModelFootprint
    from argosy.budget.planner import plan_with_media
    from argosy.budget.requirements import require_mappable, require_memory
    from argosy.cli.shared.options import recorder_of
    from argosy.engine.options import with_recorder
    from argosy.open.models import configure
    from argosy.prompt.tokenizer import Tokenizer

    config = configure(model, files, **for_engine(settings))
    config, _ = with_recorder(config, files, recorder_of(settings))
    footprint = ModelFootprint(files, config)
    # Kept open while the process is measured, as in the engine; ears also have a tokenizer.
    tokenizer, _ears = Tokenizer.open(files.path, files.header), footprint.ears
    require_mappable(footprint, config)
    require_memory(footprint, config)
    _, plan = plan_with_media(footprint, config, process_bytes=process_bytes(tokenizer))
    return plan


def _print_json(facts: dict[str, Any]) -> None:
    import json

    print(json.dumps(facts, ensure_ascii=False))
