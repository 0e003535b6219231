"""Turn the settings of each quantisation method into rules that give the scheme of a module.

    quant_method         format or algorithm                                                       scheme's storage
    fp8                  weight_block_size [R, C], or null: one scale a matrix                     fp8
    compressed-tensors   pack-quantized, int-quantized, float-quantized, naive-quantized,          pack-quantized,
                         nvfp4-pack-quantized, mxfp4-pack-quantized, mxfp8-quantized,              int-quantized, fp8,
                         mixed-precision: one of these for each group                              nvfp4-divided, ...
    modelopt             FP8, FP8_PER_CHANNEL_PER_TOKEN, FP8_PB_WO, NVFP4, W4A16_NVFP4, MXFP8,     fp8, nvfp4, mxfp8
                         MIXED_PRECISION: one of these for each module
    gptq, auto-round     checkpoint_format gptq or gptq_v2                                         gptq, gptq_v2
    awq, auto-round      version gemm                                                              awq
    auto-round           data_type mx_fp, nv_fp                                                    mxfp4-pack-quantized,
                                                                                                   nvfp4-divided, ...
    mxfp4                gpt-oss                                                                   mxfp4-blocks
    bitsandbytes         load_in_4bit: nf4 and fp4; load_in_8bit                                   bnb-4bit, bnb-8bit

Activations stay as they are: settings that would round them (`input_activations`, `activation_scheme`) change nothing
here, and neither do those of a KV cache. Settings that change weights, such as rotations, are refused.

Sources: `QuantizationConfig` and `match_targets` of compressed-tensors 0.20; `convert_hf_quant_config_format` of
modelopt 0.47; the quantisation configs of transformers 5.24; `packing_format` of auto-round 0.16; `QuantizeConfig` of
gptqmodel 7.7.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import groupby

from argosy.model.reading.schemes import EVERYTHING, Names, Quantization, Rule, Scheme, SettingsReader

GROUPS = (32, 64, 128)  # columns that share an integer scale
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.-]+")

# ── compressed-tensors ──────────────────────────────────────────────────────────────────────────────────────────────

# Format -> type, bits and strategies of the weights; symmetric and not.
_CT_FORMATS: Mapping[str, tuple[str, tuple[int, ...], tuple[str, ...]]] = {
    "pack-quantized": ("int", (4, 8), ("group", "channel")),
    "int-quantized": ("int", (8,), ("group", "channel")),
    "float-quantized": ("float", (8,), ("tensor", "channel", "block")),
    "nvfp4-pack-quantized": ("float", (4,), ("tensor_group",)),
    "mxfp4-pack-quantized": ("float", (4,), ("group",)),
    "mxfp8-quantized": ("float", (8,), ("group",)),
}
_CT_STORAGES = {"float-quantized": "fp8", "nvfp4-pack-quantized": "nvfp4-divided"}
_CT_GROUPS = {"nvfp4-pack-quantized": (16,), "mxfp4-pack-quantized": (32,), "mxfp8-quantized": (32,)}
_EXPERTS = Names(globs=(("", ".experts.", ""),))
_CT_CLASSES = {
    "RoutedExperts": (1, _EXPERTS),
    "Linear": (2, EVERYTHING),
}  # levels, modules; the former is vLLM's
# Values of actorder for which the columns of a group are adjacent, and those for which they may not be.
_ORDERED = (None, False, "weight", "static")
_UNORDERED = ("group", "dynamic", True)


def read_compressed_tensors(reader: SettingsReader) -> Quantization:
    """Read groups of modules and their schemes: exact names come before expressions, and those before classes."""
    config = reader.settings
    _require_dense(reader, config.get("sparsity_config"))
    reader.keys(
        config, reader.key, "quant_method", "format", "config_groups", "ignore", "sparsity_config",
        "global_compression_ratio", "version", "kv_cache_scheme", "provider",
        quantization_status=("compressed", "frozen", None),
        transform_config=(None, {}),
        moe_sparsity_config=(None,),
    )  # fmt: skip
    groups = reader.mapping(config.get("config_groups"), f"{reader.key}.config_groups")
    if not groups:
        raise reader.refused(f"{reader.key}.config_groups", groups, "groups with targets and weights")
    reader.require_few(len(groups), "config_groups", "groups")
    exact: list[Rule] = []
    found: list[tuple[re.Pattern[str], Scheme]] = []
    classes: list[Rule] = []
    for name, group in groups.items():
        where = f"{reader.key}.config_groups.{name}"
        fields = reader.mapping(group, where)
        reader.keys(fields, where, "weights", "targets", "format", "input_activations", "output_activations")
        if fields.get("weights") is None:  # activations, also of modules that have no weights
            continue
        scheme = _ct_scheme(reader, fields, where)
        named = reader.names(fields, "targets")
        of_classes = {target for target in named.exact if "." not in target and target[:1].isupper()}
        if of_classes - _CT_CLASSES.keys():
            known = ", ".join(f'"{one}"' for one in _CT_CLASSES)
            raise reader.refused(
                f"{where}.targets", sorted(of_classes), f'{known}, names and "re:" expressions'
            )
        if named.exact - of_classes:
            exact.append(Rule(Names(named.exact - of_classes), scheme, level=0))
        found += ((expression, scheme) for expression in named.expressions)
        classes += (Rule(_CT_CLASSES[one][1], scheme, _CT_CLASSES[one][0]) for one in of_classes)
    found.sort(key=lambda one: one[0].pattern)  # the order in which its library tries them
    expressions = _in_order(reader, "config_groups", found)
    classes.sort(key=lambda rule: rule.level or 0)
    ignored = Rule(reader.names(config, "ignore"), None)
    return Quantization("compressed-tensors", (ignored, *exact, *expressions, *classes))


def _in_order(
    reader: SettingsReader, key: str, found: Iterable[tuple[re.Pattern[str], Scheme | None]]
) -> list[Rule]:
    """Return the rules of expressions, the first of which that matches decides; neighbours share a rule."""
    rules = [
        Rule(Names(expressions=tuple(expression for expression, _ in same)), scheme)
        for scheme, same in groupby(found, key=lambda one: one[1])
    ]
    reader.require_few_names(key, *(rule.names for rule in rules))
    return rules


def _require_dense(reader: SettingsReader, sparsity: object) -> None:
    """Refuse a config of sparse weights, unless it says that there are none."""
    said = sparsity.get("format", "dense") if isinstance(sparsity, dict) else sparsity
    if said not in (None, "dense"):
        raise reader.refused(f"{reader.key}.sparsity_config", sparsity, 'null and format "dense"')


def _ct_scheme(reader: SettingsReader, group: Mapping[str, object], where: str) -> Scheme:
    where = f"{where}.weights"
    weights = reader.mapping(group["weights"], where)
    given = {"format": group.get("format") or reader.settings.get("format")}
    format = reader.choice(given, reader.key, "format", *_CT_FORMATS, "naive-quantized")
    if format == "naive-quantized":
        format = "int-quantized" if weights.get("type", "int") == "int" else "float-quantized"
    kind, bits, strategies = _CT_FORMATS[format]
    reader.keys(
        weights, where, "num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "actorder",
        "observer", "observer_kwargs", "scale_dtype", "zp_dtype",
        dynamic=(False, None),
    )  # fmt: skip
    reader.choice(weights, where, "type", kind, default="int")
    num_bits = reader.choice(weights, where, "num_bits", *bits, default=8)
    default = "tensor" if weights.get("group_size") is None else "group"
    default = "channel" if weights.get("group_size") == -1 else default
    strategy = reader.choice(weights, where, "strategy", *strategies, default=default)
    symmetries = (True, False) if kind == "int" else (True,)
    is_symmetric = reader.choice(weights, where, "symmetric", *symmetries, default=True)
    orders = (*_ORDERED, *_UNORDERED) if kind == "int" and strategy == "group" else _ORDERED
    is_ordered = reader.choice(weights, where, "actorder", *orders, default=False) in _ORDERED
    block = {"tensor": (0, 0), "channel": (1, 0)}.get(strategy)
    if strategy == "block":
        block = _block(reader, weights.get("block_structure"), f"{where}.block_structure")
    elif block is None:
        block = 1, reader.choice(weights, where, "group_size", *_CT_GROUPS.get(format, GROUPS))
    storage = _CT_STORAGES.get(format, format)
    return Scheme(
        storage=storage, bits=num_bits, block=block, has_zeros=not is_symmetric, is_ordered=is_ordered
    )


def _block(reader: SettingsReader, value: object, where: str) -> tuple[int, int]:
    """Return the rows and columns of a block; compressed-tensors once wrote "128x128"."""
    if isinstance(value, str) and re.fullmatch(r"\d{1,7}x\d{1,7}", value):
        value = [int(size) for size in value.split("x")]
    if not isinstance(value, list) or len(value) != 2:
        raise reader.refused(where, value, "[rows, columns], such as [128, 128]")
    rows, cols = (reader.count(size, where) for size in value)
    return rows, cols


# ── modelopt ────────────────────────────────────────────────────────────────────────────────────────────────────────

_MODELOPT: Mapping[str, Scheme] = {
    "FP8": Scheme(storage="fp8", bits=8, block=(0, 0)),
    "FP8_PER_CHANNEL_PER_TOKEN": Scheme(storage="fp8", bits=8, block=(1, 0)),
    "FP8_PB_WO": Scheme(storage="fp8", bits=8, block=(128, 128)),
    "FP8_BLOCK_SCALES": Scheme(storage="fp8", bits=8, block=(128, 128)),  # TensorRT-LLM's name
    "NVFP4": Scheme(storage="nvfp4", bits=4, block=(1, 16)),
    "W4A16_NVFP4": Scheme(storage="nvfp4", bits=4, block=(1, 16)),
    "MXFP8": Scheme(storage="mxfp8-quantized", bits=8, block=(1, 32)),
}
_MODELOPT_ALGORITHMS = (*_MODELOPT, "MIXED_PRECISION")


def read_modelopt(reader: SettingsReader) -> Quantization:
    """Read one algorithm, or one for each module that `quantized_layers` names; globs exclude modules."""
    config = reader.settings
    reader.keys(
        config, reader.key, "quant_method", "quant_algo", "config_groups", "ignore", "exclude_modules",
        "modules_to_not_convert", "quantized_layers", "group_size", "kv_cache_scheme", "kv_cache_quant_algo",
        "producer", "packed_modules_mapping", "weights", "input_activations",
        has_zero_point=(False, None),
        pre_quant_scale=(False, None),
    )  # fmt: skip
    lists = ("ignore", "exclude_modules", "modules_to_not_convert")
    excluded = Rule(reader.names(config, *lists, match_parts=True, has_globs=True), None)
    algorithm = config.get("quant_algo")
    if algorithm != "MIXED_PRECISION":
        scheme = _modelopt_scheme(reader, config, reader.key)
        return Quantization("modelopt", (excluded, Rule(EVERYTHING, scheme)))
    layers = reader.mapping(config.get("quantized_layers"), f"{reader.key}.quantized_layers")
    by_scheme: dict[Scheme, list[str]] = {}
    for name, layer in layers.items():
        where = f"{reader.key}.quantized_layers.{name}"
        fields = reader.mapping(layer, where)
        reader.keys(
            fields, where, "quant_algo", "group_size", has_zero_point=(False,), pre_quant_scale=(False,)
        )
        by_scheme.setdefault(_modelopt_scheme(reader, fields, where), []).append(name)
    rules = (
        Rule(reader.names({"quantized_layers": names}, "quantized_layers", match_parts=True, has_globs=True), one)
        for one, names in by_scheme.items()
    )  # fmt: skip
    return Quantization("modelopt", (excluded, *(replace(rule, level=0) for rule in rules)))


def _modelopt_scheme(reader: SettingsReader, given: Mapping[str, object], where: str) -> Scheme:
    algorithm = given.get("quant_algo")
    scheme = _MODELOPT.get(algorithm.upper()) if isinstance(algorithm, str) else None
    if scheme is None:
        raise reader.refused(f"{where}.quant_algo", algorithm, ", ".join(_MODELOPT_ALGORITHMS))
    if scheme.storage != "fp8":
        reader.choice(given, where, "group_size", scheme.block[1], default=scheme.block[1])
    return scheme


# ── fp8, mxfp4 ──────────────────────────────────────────────────────────────────────────────────────────────────────


def read_fp8(reader: SettingsReader) -> Quantization:
    """Read E4M3 weights with a scale for each block, or for each matrix."""
    config = reader.settings
    reader.keys(
        config, reader.key, "quant_method", "weight_block_size", "modules_to_not_convert", "ignored_layers",
        "modules_to_convert", "kv_cache_scheme", "expert_dtype",
        activation_scheme=("dynamic", "static", None),
        fmt=("e4m3", "float8_e4m3fn", None),
        scale_fmt=("ue8m0", "float", None),  # the dtype of the scales tells
        dequantize=(False, None),
        is_checkpoint_fp8_serialized=(True, None),
    )  # fmt: skip
    size = config.get("weight_block_size")
    block = (0, 0) if size is None else _block(reader, size, f"{reader.key}.weight_block_size")
    names = reader.names(config, "modules_to_not_convert", "ignored_layers", match_parts=True)
    rules = [Rule(names, None), Rule(EVERYTHING, Scheme(storage="fp8", bits=8, block=block))]
    if reader.choice(config, reader.key, "expert_dtype", "fp8", "fp4", default="fp8") == "fp4":  # DeepSeek-V4
        rules.insert(1, Rule(_EXPERTS, Scheme(storage="mxfp4-pack-quantized", bits=4, block=(1, 32))))
    return Quantization("fp8", tuple(rules))


def read_mxfp4(reader: SettingsReader) -> Quantization:
    """Read MXFP4 as gpt-oss stores it."""
    config = reader.settings
    reader.keys(config, reader.key, "quant_method", "modules_to_not_convert", dequantize=(False, None))
    scheme = Scheme(storage="mxfp4-blocks", bits=4, block=(1, 32))
    names = reader.names(config, "modules_to_not_convert", match_parts=True)
    return Quantization("mxfp4", (Rule(names, None), Rule(EVERYTHING, scheme)))


def read_bitsandbytes(reader: SettingsReader) -> Quantization:
    """Read nf4, fp4 and LLM.int8, whose threshold divides activations at run time and leaves weights alone."""
    config = reader.settings
    reader.keys(
        config, reader.key, "quant_method", "load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit",
        "bnb_4bit_quant_type", "bnb_4bit_compute_dtype", "bnb_4bit_use_double_quant", "llm_int8_threshold",
        "llm_int8_skip_modules", "llm_int8_enable_fp32_cpu_offload",
        llm_int8_has_fp16_weight=(False, None),
        bnb_4bit_quant_storage=("uint8", None),
    )  # fmt: skip
    is_4bit, is_8bit = (
        reader.choice(config, reader.key, f"load_in_{bits}bit", True, False, default=False) for bits in (4, 8)
    )
    if is_4bit == is_8bit:
        raise reader.refused(f"{reader.key}.load_in_4bit", is_4bit, "load_in_4bit or load_in_8bit")
    scheme = Scheme(storage="bnb-8bit", bits=8, block=(1, 0))
    if is_4bit:
        reader.choice(config, reader.key, "bnb_4bit_quant_type", "nf4", "fp4", default="fp4")
        scheme = Scheme(storage="bnb-4bit", bits=4, block=(1, 64))
    # Lists of skipped modules name parts of names in several ways; tensors show what was skipped.
    return Quantization("bitsandbytes", (Rule(EVERYTHING, scheme),))


# ── gptq, awq, auto-round ───────────────────────────────────────────────────────────────────────────────────────────

# Settings of programs that quantise and run, which do not say how weights are stored. Each of these programs writes
# the others' methods as well.
_NOTES = (
    "act_bits", "act_data_type", "act_dynamic", "act_group_aware", "act_group_size", "act_sym", "activation", "amp",
    "autoround_version", "backend", "batch_size", "block_name_to_quantize", "cache_block_outputs",
    "damp_auto_increment", "damp_percent", "dataset", "disable_exllama", "disable_opt_rtn", "do_fuse",
    "enable_alg_ext", "enable_minmax_tuning", "enable_norm_bias_tuning", "enable_quanted_input", "exllama_config",
    "fuse_max_seq_len", "gradient_accumulate_steps", "hyb_act", "iters", "lm_head", "low_gpu_mem_usage", "lr",
    "max_input_length", "meta", "method", "minmax_lr", "model_file_base_name", "model_free", "model_name_or_path",
    "model_seqlen", "module_name_preceding_first_block", "modules_in_block_to_quantize", "modules_to_fuse", "mse",
    "nsamples", "offload_to_disk", "pad_token_id", "provider", "quant_block_list", "quant_lm_head", "quant_method",
    "scale_dtype", "seqlen", "static_attention_dtype", "static_attention_granularity", "static_groups",
    "static_kv_dtype", "static_kv_granularity", "super_bits", "super_group_size", "supported_types",
    "to_quant_block_names", "tokenizer", "true_sequential", "use_cuda_fp16", "use_exllama",
)  # fmt: skip
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "data_type": ("int", None),
    "pack_dtype": ("int32", None),
    "is_marlin_format": (False, None),
    "adapter": (None,),
    "rotation": (None,),
    "rotation_config": (None, {}),
    "rotation_configs": (None, []),
    "regex_config": (None, {}),
}


def read_gptq(reader: SettingsReader) -> Quantization:
    """Read integers in groups of input columns; `dynamic` changes or excludes the modules of an expression."""
    config = reader.settings
    reader.keys(
        config, reader.key, *_NOTES, "bits", "group_size", "desc_act", "sym", "checkpoint_format", "format", "dynamic",
        "modules_to_not_convert", "version", **_NEUTRAL,
    )  # fmt: skip
    spelled = "format" if config.get("checkpoint_format") is None else "checkpoint_format"
    storage = str(reader.choice(config, reader.key, spelled, "gptq", "gptq_v2", default="gptq"))
    excluded = Rule(reader.names(config, "modules_to_not_convert", match_parts=True), None)
    dynamic = config.get("dynamic") or {}
    found: list[tuple[re.Pattern[str], Scheme | None]] = []
    for name, change in reader.mapping(dynamic, f"{reader.key}.dynamic").items():
        sign, _, text = name.partition(":") if name.startswith(("+:", "-:")) else ("+", ":", name)
        where = f"{reader.key}.dynamic.{name}"
        own = {**config, **reader.mapping(change, where)}
        scheme = None if sign == "-" else _grouped(reader, own, where, storage)
        found.append((reader.expression(name, text, "dynamic"), scheme))
    every = Rule(EVERYTHING, _grouped(reader, config, reader.key, storage))
    return Quantization("gptq", (excluded, *_in_order(reader, "dynamic", found), every))


def _grouped(reader: SettingsReader, given: Mapping[str, object], where: str, storage: str) -> Scheme:
    """Return the scheme of integers in groups of input columns."""
    allowed = (4,) if storage == "awq" else (2, 3, 4, 8)
    bits = reader.choice(given, where, "bits", *allowed)
    group = reader.choice(given, where, "group_size", *GROUPS, -1)
    # The files tell which columns are in a group; with static_groups they are neighbours in spite of desc_act.
    has_act_order = reader.choice(given, where, "desc_act", False, True, default=False)
    reader.choice(given, where, "sym", True, False, default=True)  # zero points are stored in any case
    return Scheme(
        storage=storage, bits=bits, block=(1, max(group, 0)), has_zeros=True, is_ordered=not has_act_order
    )


def read_awq(reader: SettingsReader) -> Quantization:
    """Read 4-bit integers in groups of input columns, in the order of AWQ's kernel."""
    config = reader.settings
    reader.keys(
        config, reader.key, *_NOTES, "bits", "w_bit", "group_size", "q_group_size", "version", "format",
        "checkpoint_format", "modules_to_not_convert", "ignore", **_NEUTRAL,
        zero_point=(True, False, None),  # zero points are stored in any case
        desc_act=(False, None),
        sym=(False, True, None),
    )  # fmt: skip
    for key in ("version", "format", "checkpoint_format"):
        said = config.get(key)
        if said is not None and (not isinstance(said, str) or said.lower() != "gemm"):
            raise reader.refused(f"{reader.key}.{key}", said, "gemm")
    sizes = {
        key: config.get(key, config.get(old))
        for key, old in (("bits", "w_bit"), ("group_size", "q_group_size"))
    }
    scheme = _grouped(reader, sizes, reader.key, "awq")
    excluded = reader.names(config, "modules_to_not_convert", "ignore", match_texts=True)
    return Quantization("awq", (Rule(excluded, None), Rule(EVERYTHING, scheme)))


_AUTO_ROUND = {
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
    "auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round:auto_awq": "awq",
    "auto_round:awq": "awq",
    "auto_round:llm_compressor": "",  # the storages of compressed-tensors
}
_AUTO_ROUND_FLOATS = {
    ("mx_fp", 4): Scheme(storage="mxfp4-pack-quantized", bits=4, block=(1, 32)),
    ("mx_fp", 8): Scheme(storage="mxfp8-quantized", bits=8, block=(1, 32)),
    ("nv_fp", 4): Scheme(storage="nvfp4-divided", bits=4, block=(1, 16)),
}


def _packing_of(config: Mapping[str, object]) -> str:
    """Return the packing of files of AutoRound before 0.5, whose backend tells it: "auto_round:gptq:exllamav2"."""
    backend = config.get("backend")
    if not isinstance(backend, str) or not backend.startswith("auto_round:"):
        return "auto_round:auto_gptq"
    return next((f"auto_round:{one}" for one in ("gptq", "awq") if one in backend), "auto_round")


def read_auto_round(reader: SettingsReader) -> Quantization:
    """Read AutoRound's settings, whose `extra_config` has those of single modules."""
    config = reader.settings
    reader.keys(
        config, reader.key, *_NOTES, "bits", "group_size", "sym", "packing_format", "extra_config", "data_type",
        "modules_to_not_convert", **{key: values for key, values in _NEUTRAL.items() if key != "data_type"},
    )  # fmt: skip
    packing = reader.choice(config, reader.key, "packing_format", *_AUTO_ROUND, default=_packing_of(config))
    storage = _AUTO_ROUND[str(packing)]
    rules = [Rule(reader.names(config, "modules_to_not_convert", match_parts=True), None)]
    names: dict[Scheme | None, set[str]] = {}
    found: list[tuple[re.Pattern[str], Scheme | None]] = []
    extra = config.get("extra_config") or {}
    for name, change in reader.mapping(extra, f"{reader.key}.extra_config").items():
        where = f"{reader.key}.extra_config.{name}"
        own = reader.mapping(change, where)
        is_float = own.get("bits") in (16, 32) or own.get("data_type") in ("float", "fp", "bfloat16")
        scheme = None if is_float else _auto_round_scheme(reader, {**config, **own}, where, storage)
        if _PLAIN_NAME.fullmatch(name):
            names.setdefault(scheme, set()).add(name)
        else:
            found.append((reader.expression(name, name, "extra_config"), scheme))
    rules += (Rule(Names(frozenset(exact)), scheme) for scheme, exact in names.items())
    rules += _in_order(reader, "extra_config", found)
    rules.append(Rule(EVERYTHING, _auto_round_scheme(reader, config, reader.key, storage)))
    return Quantization("auto-round", tuple(rules))


def _auto_round_scheme(
    reader: SettingsReader, given: Mapping[str, object], where: str, storage: str
) -> Scheme:
    """Return the scheme of integers in groups, or if `storage` is empty, of FP4 or FP8 codes."""
    if storage:
        reader.choice(given, where, "data_type", "int", default="int")
        return _grouped(reader, given, where, storage)
    said = given.get("data_type")  # such as mx_fp, mx_fp4 and nv_fp4_with_static_gs
    kind = said[:5] if isinstance(said, str) else ""
    bits = [of for name, of in _AUTO_ROUND_FLOATS if name == kind]
    if not bits:
        raise reader.refused(f"{where}.data_type", said, '"mx_fp", "nv_fp"')
    scheme = _AUTO_ROUND_FLOATS[kind, reader.choice(given, where, "bits", *bits)]
    reader.choice(given, where, "group_size", scheme.block[1])
    return scheme


# Raises UnsupportedModel for a setting that it does not know or support, and CheckpointError for a malformed one.
MethodReader = Callable[[SettingsReader], Quantization]
METHODS: Mapping[str, MethodReader] = {
    "fp8": read_fp8,
    "compressed-tensors": read_compressed_tensors,
    "modelopt": read_modelopt,
    "gptq": read_gptq,
    "awq": read_awq,
    "auto-round": read_auto_round,
    "mxfp4": read_mxfp4,
    "bitsandbytes": read_bitsandbytes,
}
ALIASES = {"modelopt_fp4": "modelopt", "modelopt_mixed": "modelopt", "intel/auto-round": "auto-round"}

_GPU_ONLY = "its codes are laid out for GPU kernels; get a GGUF of the same size"
# Methods that are known and not read, with the reason if there is one, and what to get instead.
REFUSED: Mapping[str, str] = {
    "exl2": _GPU_ONLY,
    "exl3": _GPU_ONLY,
    "hqq": "its groups may run along either axis; get a GGUF, or the model quantised with compressed-tensors",
    "aqlm": "its weights are sums of codebook entries; get a GGUF of the same size",
    "vptq": "its weights are entries of codebooks of vectors; get a GGUF of the same size",
    "quip": "its weights are rotated; get a GGUF of the same size",
    "spqr": "its outliers are stored separately; get a GGUF of the same size",
    "higgs": "its weights are rotated; get a GGUF of the same size",
    "fp_quant": "its weights are rotated; get the model as NVFP4 from modelopt or compressed-tensors",
    "quark": "get the model quantised with compressed-tensors or modelopt, or a GGUF",
    "torchao": "get the model quantised with compressed-tensors, or a GGUF",
    "quanto": "get the model quantised with compressed-tensors, or a GGUF",
    "eetq": "its codes are laid out for GPU kernels; get a Q8_0 GGUF",
    "fbgemm_fp8": "get the model quantised with compressed-tensors to float-quantized",
    "bitnet": "get a TQ2_0 GGUF",
    "sinq": "get a GGUF of the same size",
}
