"""A Ray cluster on this machine: a head without workers, and three raylets that may have one each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray
from ray.cluster_utils import Cluster

from argosy.cluster.ray_control import RESOURCE

# A dead node is noticed after 1.5 seconds; docs/guides/cluster-ray.md has the same values.
HEALTH = {
    "health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 2,
}  # fmt: skip
_STORE_BYTES = 100 << 20


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    # A raylet starts a Python process for each of its CPUs, used or not. Only Ray Data asks for CPUs: two on the head.
    head = {
        "num_cpus": 2, "include_dashboard": False, "object_store_memory": _STORE_BYTES, "_system_config": HEALTH,
    }  # fmt: skip
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(3):
        add_node(cluster, wait=False)  # they start side by side
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, namespace="argosy", log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def add_node(cluster: Cluster, *, wait: bool = True) -> None:
    cluster.add_node(wait=wait, num_cpus=0, resources={RESOURCE: 1}, object_store_memory=_STORE_BYTES)
