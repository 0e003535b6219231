"""The manifest for Kubernetes: fields that KubeRay knows, a command that exists, and the settings of the guide."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from argosy.cli.main import cli
from argosy.cluster.ray_control import RESOURCE

ROOT = Path(__file__).parents[2]
# Fields of ray.io/v1 and of a pod that the manifest may use; KubeRay refuses others.
SPEC = {
    "rayVersion",
    "enableInTreeAutoscaling",
    "autoscalerOptions",
    "headGroupSpec",
    "workerGroupSpecs",
    "suspend",
}
HEAD = {"rayStartParams", "template", "serviceType", "enableIngress"}
WORKERS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template", "numOfHosts"}
POD = {
    "containers",
    "volumes",
    "affinity",
    "nodeSelector",
    "tolerations",
    "initContainers",
    "securityContext",
}
CONTAINER = {
    "name", "image", "command", "args", "env", "ports", "resources", "volumeMounts", "readinessProbe", "lifecycle",
}  # fmt: skip


@pytest.fixture(scope="module")
def manifest() -> list[Any]:
    return list(YAML(typ="safe", pure=True).load_all((ROOT / "deploy" / "kuberay.yaml").read_text()))


def groups(cluster: Any) -> list[Any]:
    return [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]


def test_every_field_is_one_that_kuberay_knows(manifest: list[Any]) -> None:
    cluster, service = manifest
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    assert cluster["spec"].keys() <= SPEC
    assert cluster["spec"]["headGroupSpec"].keys() <= HEAD
    for group in cluster["spec"]["workerGroupSpecs"]:
        assert group.keys() <= WORKERS
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in groups(cluster):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        assert pod.keys() <= POD
        names = {volume["name"] for volume in pod.get("volumes", ())}
        for container in pod["containers"]:
            assert container.keys() <= CONTAINER
            assert {mount["name"] for mount in container.get("volumeMounts", ())} <= names
            assert all(isinstance(one["value"], str) for one in container["env"])
    assert service["spec"]["selector"]["ray.io/cluster"] == cluster["metadata"]["name"]


def test_the_server_s_command_is_one_that_argosy_takes(manifest: list[Any]) -> None:
    (head, *workers) = groups(manifest[0])
    (command,) = [one["command"] for one in head["template"]["spec"]["containers"] if one["name"] == "argosy"]
    program, name, *arguments = command
    assert program == "argosy"
    with cli.make_context("argosy", [name]) as context:
        found = cli.get_command(context, name)
        assert found is not None
        parsed = found.make_context(name, arguments)
    assert parsed.params["cluster"] == "auto"
    assert all(RESOURCE in group["rayStartParams"]["resources"] for group in workers)


def test_dead_nodes_are_noticed_as_soon_as_the_guide_says(manifest: list[Any]) -> None:
    guide = (ROOT / "docs" / "guides" / "cluster-ray.md").read_text()
    said = dict(re.findall(r"(RAY_health_check_\w+)=(\d+)", guide))
    assert len(said) == 4
    for group in groups(manifest[0]):
        (ray,) = [one for one in group["template"]["spec"]["containers"] if one["name"].startswith("ray-")]
        assert {one["name"]: one["value"] for one in ray["env"]} == said
