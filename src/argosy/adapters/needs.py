"""The memory that adapters need, before they are loaded: what a plan counts."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce

from argosy import _native
from argosy.adapters.files import AdapterFiles
from argosy.adapters.loaded import dense_bytes, network_ranks
from argosy.adapters.parts import experts_by_layer, part_slot_bytes, require_parts_fit
from argosy.adapters.reading import open_adapter
from argosy.checkpoint.files import ModelFiles
from argosy.config import AdapterNeeds
from argosy.config.engine import WantedAdapter

# Of each expert with a part: where it lies (native/ops/expert_adapter.h), and its checksum here and in native code.
_PART_RECORD_BYTES = 128 + 64


def adapter_needs(files: AdapterFiles, model: ModelFiles) -> AdapterNeeds:
    """Return what an adapter needs.

    Raises:
        UnsupportedModel, CheckpointError: it does not fit the model.
    """
    config = model.own_config
    fixed, parts = dense_bytes(files, config), 0
    if files.experts:
        require_parts_fit(files, model)
        experts, slot = experts_by_layer(model), part_slot_bytes(files)
        count = sum(experts[layer] for layer in files.experts)
        parts = count * slot
        in_policy = _native.CachePolicy.bytes(
            num_slots=count, num_layers=len(files.experts), num_experts=max(experts.values())
        )
        fixed += slot + count * _PART_RECORD_BYTES + in_policy
    return AdapterNeeds(fixed, parts, network_ranks(files, config))


def total_needs(needs: Iterable[AdapterNeeds]) -> AdapterNeeds:
    return reduce(AdapterNeeds.joined, needs, AdapterNeeds())


def wanted_needs(wanted: Iterable[WantedAdapter], model: ModelFiles) -> AdapterNeeds:
    """Return what these adapters need together; those with a factor of 0 have no effect and need nothing."""
    return total_needs(
        adapter_needs(open_adapter(one.path, model, columns=one.columns), model)
        for one in wanted
        if one.factor
    )
