"""Read which layers have routed experts, and how their routers choose, for the families that use DeepSeek's keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from argosy.config import ActivationConfig, ModelConfig, RouterConfig
from argosy.errors import CheckpointError
from argosy.model.reading.config_reader import MOST_EXPERTS, MOST_LAYERS, ConfigReader
from argosy.model.reading.gguf_config import GgufConfigReader

RENORMALIZE_EPS = 1e-20

ReadRouter = Callable[[ConfigReader, int, int], RouterConfig]  # reader, experts, experts per token


def read_sigmoid_router(
    scale: float,
    num_groups: int,
    kept_groups: int,
    *,
    renormalize: bool = True,
    may_lack_method: bool = False,
    names: tuple[str, ...] = ("sigmoid",),
) -> ReadRouter:
    """The router of DeepSeek-V3 (arXiv:2412.19437): sigmoid scores, and a bias that only affects the choice.

    The arguments are the family's defaults, whether `topk_method` may be null, and what the scores may be called.
    """

    def read(reader: ConfigReader, num_experts: int, experts_per_token: int) -> RouterConfig:
        reader.one_of("scoring_func", names[0], names)
        if not may_lack_method or reader.optional_one_of("topk_method", ("noaux_tc",)) is not None:
            reader.one_of("topk_method", "noaux_tc", ("noaux_tc",))
        is_renormalized = reader.flag("norm_topk_prob", renormalize)
        groups = reader.optional_integer("n_group", default=num_groups) or 1
        router = RouterConfig(
            score="sigmoid",
            has_choice_bias=True,
            num_groups=groups,
            kept_groups=read_kept_groups(reader, groups, kept_groups),
            group_score="top2",
            renormalize=is_renormalized,
            renormalize_eps=RENORMALIZE_EPS if is_renormalized else 0.0,
            scale=reader.number("routed_scaling_factor", scale),
        )
        return require_groups(router, num_experts, experts_per_token)

    return read


def read_kept_groups(reader: ConfigReader, num_groups: int, default: int | None) -> int:
    """`topk_group`, which may be null only if there are no groups to choose from."""
    if num_groups == 1:
        return reader.optional_integer("topk_group", default=default) or 1
    return reader.integer("topk_group", default=default)


def read_mtp_layers(reader: ConfigReader, default: int) -> int:
    """Count the layers for multi-token prediction, which follow the model's own layers in the files."""
    return reader.integer(
        "num_nextn_predict_layers", "num_mtp_layers", default=default, least=0, most=MOST_LAYERS
    )


def require_groups(router: RouterConfig, num_experts: int, experts_per_token: int) -> RouterConfig:
    """Return the router if its groups divide the experts evenly and the kept groups have enough experts.

    Raises:
        CheckpointError: they do not.
    """
    groups, kept = router.num_groups, router.kept_groups
    found = f"{num_experts} experts in {groups} groups, {kept} of them kept"
    if groups > MOST_EXPERTS or num_experts % groups:
        raise CheckpointError(
            f"the router has {found}; expected groups of equal size (n_group, or expert_group_count)",
            key="n_group",
        )
    size = num_experts // groups
    if kept > groups or kept * size < experts_per_token:
        raise CheckpointError(
            f"the router has {found}; expected no more than all groups, and room for the {experts_per_token} experts "
            f"of a token in the kept ones",
            key="topk_group",
        )
    if groups > 1 and router.group_score == "top2" and size < 2:
        raise CheckpointError(
            f"the router has {found}; a group is scored by its best two experts, so it needs at least two",
            key="n_group",
        )
    return router


def read_kinds(
    reader: ConfigReader, name: str, numbers: str, kinds: tuple[str, str], default: Sequence[int]
) -> tuple[str, ...]:
    """Read the kind of each layer by its name, or by its number under another key; `default` has the numbers."""
    found = reader.integers(numbers, least=0, most=1) or default
    chosen = reader.texts(name) or tuple(kinds[number] for number in found)
    if len(chosen) != len(default) or not set(chosen) <= set(kinds):
        raise CheckpointError(
            f"config.json: {name} or {numbers} gives {len(chosen)} layers, expected {len(default)}, each "
            f"{' or '.join(kinds)}",
            key=name,
        )
    return chosen


def layers_behind_the_dense(default: int) -> Callable[[ConfigReader, int], Sequence[bool]]:
    """Return a reader of `first_k_dense_replace`, the first layer with experts; `default` is the family's default."""

    def read(reader: ConfigReader, num_layers: int) -> Sequence[bool]:
        first = reader.optional_integer("first_k_dense_replace", default=default, least=0) or 0
        if first >= num_layers:
            raise CheckpointError(
                f"config.json leaves none of the {num_layers} layers with routed experts: first_k_dense_replace is "
                f"{first}",
                key="first_k_dense_replace",
            )
        return [layer >= first for layer in range(num_layers)]

    return read


def layers_by_type(default: int) -> Callable[[ConfigReader, int], Sequence[bool]]:
    """Return a reader of `mlp_layer_types`, or else of `first_k_dense_replace`, as `layers_behind_the_dense`."""
    behind_the_dense = layers_behind_the_dense(default)

    def read(reader: ConfigReader, num_layers: int) -> Sequence[bool]:
        kinds = reader.texts("mlp_layer_types")
        if kinds is None:
            return behind_the_dense(reader, num_layers)
        if len(kinds) != num_layers or not set(kinds) <= {"dense", "sparse"} or "sparse" not in kinds:
            raise CheckpointError(
                f"config.json: mlp_layer_types has {len(kinds)} entries, expected 'dense' or 'sparse' for each of "
                f"{num_layers} layers, and at least one 'sparse'",
                key="mlp_layer_types",
            )
        is_moe = [kind == "sparse" for kind in kinds]
        if reader.has("first_k_dense_replace") and list(behind_the_dense(reader, num_layers)) != is_moe:
            raise CheckpointError(
                "config.json gives the dense layers twice, in first_k_dense_replace and in mlp_layer_types, and they "
                "differ",
                key="mlp_layer_types",
            )
        return is_moe

    return read


def with_limits(
    config: ModelConfig,
    routed: Sequence[float],
    shared: Sequence[float],
    *,
    kind: Literal["silu_capped", "silu_limited"] = "silu_capped",
) -> ModelConfig:
    """Return the config with the limits of each layer's routed experts, and of its shared expert or dense network; 0
    means that there is none.
    """

    def capped(limit: float) -> ActivationConfig | None:
        return ActivationConfig(kind=kind, limit=limit) if limit else None

    layers = [
        replace(layer, activation=capped(of_experts), shared_activation=capped(of_shared))
        if layer.is_moe
        else replace(layer, activation=capped(of_shared))
        for layer, of_experts, of_shared in zip(config.layers, routed, shared, strict=True)
    ]
    return replace(config, layers=tuple(layers))


def read_dense_layers(reader: GgufConfigReader, num_layers: int) -> int:
    """Return how many of the first layers have no routed experts.

    Raises:
        CheckpointError: no layer has routed experts.
    """
    num_dense = reader.integer("leading_dense_block_count", 0, least=0)
    if num_dense >= num_layers:
        raise CheckpointError(
            f"{reader.file.path.name}: {reader.key('leading_dense_block_count')} is {num_dense} of {num_layers} "
            "layers, which leaves none with routed experts",
            path=reader.file.path,
            key=reader.key("leading_dense_block_count"),
        )
    return num_dense


def read_grouped_router(reader: GgufConfigReader, *, is_sigmoid: bool, has_choice_bias: bool) -> RouterConfig:
    """Read groups, weights and scale of a router: sigmoid scores as in DeepSeek-V3, or softmax as in V2."""
    renormalize = reader.flag("expert_weights_norm", False)
    groups = reader.integer("expert_group_count", 0, least=0) or 1
    kept = reader.integer("expert_group_used_count", 0, least=0) or 1
    if kept > groups:
        raise reader.unsupported("expert_group_used_count", kept, f"at most expert_group_count, {groups}")
    return RouterConfig(
        score="sigmoid" if is_sigmoid else "softmax",
        has_choice_bias=has_choice_bias,
        num_groups=groups,
        kept_groups=kept,
        group_score="top2" if is_sigmoid else "max",
        renormalize=renormalize,
        renormalize_eps=RENORMALIZE_EPS if renormalize else 0.0,
        scale=reader.number("expert_weights_scale") if reader.is_set("expert_weights_scale") else 1.0,
    )
