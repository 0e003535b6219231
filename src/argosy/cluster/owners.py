"""Assign experts to owners, and shards to workers that copy: the hosts are the members and this machine.

Elsewhere: `placement.py` is the algorithm; `group.py` decides when to reassign.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from argosy._native import Owner, Owners
from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.shards import ALL_SHARDS
from argosy.cluster.member import Member
from argosy.cluster.placement import Host, allot, place

AWAY_S = 30.0  # a worker that is away for this long loses its experts


@dataclass(frozen=True, slots=True)
class Here:
    """This machine as an owner."""

    owner: Owner
    host: Host


def plan_owners(members: Sequence[Member], here: Here | None, model: ModelFiles, *, replicas: int) -> Owners:
    """Assign owners to all experts, and note in each member how many it owns."""
    now = time.monotonic()
    usable = [
        (member, member.offer)
        for member in members
        if member.offer is not None
        and not (member.drained or member.refusal or member.owner.is_set_aside)
        and (member.owner.peer is not None or now - member.away_since <= AWAY_S)
    ]
    hosts = [
        Host(
            name=member.name,
            cache_bytes=offer.cache_bytes,
            disk_bytes_per_s=offer.disk_bytes_per_s,
            shards=offer.shards & ALL_SHARDS,
        )
        for member, offer in usable
    ]
    owners = [member.owner for member, _ in usable]
    if here is not None:
        hosts.append(here.host)
        owners.append(here.owner)
    config = model.config
    table = np.full((config.num_layers, config.num_experts, replicas), -1, np.int16)
    if hosts:
        placed = place(
            hosts,
            config.moe_layers,
            num_experts=config.num_experts,
            expert_bytes=model.expert_bytes,
            replicas=replicas,
        )
        for layer, of_layer in placed.items():
            table[layer] = of_layer
    counts = np.bincount(table[table >= 0], minlength=len(owners)).tolist()
    for member in members:
        member.num_owned = 0
    for (member, _), count in zip(usable, counts, strict=False):
        member.num_owned = count
    return Owners(owners, table, here=None if here is None else here.owner)


def shards_to_copy(
    member: Member, members: Sequence[Member], here: Here | None, model: ModelFiles, *, replicas: int
) -> int:
    """Mask of the shards for a worker without files: those that it names, otherwise its allotment."""
    assert member.copy_offer is not None
    if member.copy_offer.shards:
        return member.copy_offer.shards
    members = [one for one in members if not (one.drained or one.refusal)]
    offers = [one.offer or one.copy_offer for one in members]
    known = [offer.cache_bytes for offer in offers if offer is not None]
    hosts = [
        Host(
            name=one.name,
            cache_bytes=sum(known) // len(known) if offer is None else offer.cache_bytes,
            disk_bytes_per_s=0.0 if offer is None else offer.disk_bytes_per_s,
            shards=(offer.shards if offer is not None else 0) or one.copied_shards or ALL_SHARDS,
        )
        for one, offer in zip(members, offers, strict=True)
    ]
    place_of = members.index(member)
    if here is not None:
        hosts.append(here.host)
    masks = allot(hosts, expert_bytes=model.expert_bytes, replicas=replicas)
    return masks[place_of] or 1  # without any shard a worker could not start
