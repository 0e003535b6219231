"""The manifest for Kubernetes: fields that KubeRay knows, a command that exists, and the settings of the guide."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from argosy.cli.main import cli
from argosy.cluster.hello import read_key
from argosy.cluster.ray_control import RESOURCE
from argosy.guard.keys import KeyFile

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
        for container in (*pod.get("initContainers", ()), *pod["containers"]):
            assert container.keys() <= CONTAINER
            assert {mount["name"] for mount in container.get("volumeMounts", ())} <= names
            assert all(isinstance(one["value"], str) for one in container.get("env", ()))
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


def test_the_server_can_read_its_secrets_and_write_beside_its_keys(
    manifest: list[Any], tmp_path: Path
) -> None:
    """Its files are copies of the secrets, made by the image's user with the mode that Argosy demands."""
    pod = manifest[0]["spec"]["headGroupSpec"]["template"]["spec"]
    (user,) = re.findall(r"^USER \d+:(\d+)$", (ROOT / "deploy" / "Containerfile").read_text(), re.MULTILINE)
    assert pod["securityContext"]["fsGroup"] == int(user)
    secrets = {one["name"]: one["secret"] for one in pod["volumes"] if "secret" in one}
    assert {str(one["defaultMode"]).lstrip("0") for one in secrets.values()} == {"440"}
    (copying,) = pod["initContainers"]
    for mount in copying["volumeMounts"]:
        (tmp_path / mount["mountPath"].lstrip("/")).mkdir()
        assert (mount["name"] in secrets) == mount.get("readOnly", False)
    KeyFile(tmp_path / "keys" / "keys.json").add("one")
    (tmp_path / "cluster" / "key").write_text("k" * 64)
    for path in tmp_path.glob("*/*key*"):
        path.chmod(0o440)
    script = re.sub("(?<= )/", f"{tmp_path}/", copying["command"][2])
    subprocess.run([*copying["command"][:2], script], check=True)
    (server,) = [one for one in pod["containers"] if one["name"] == "argosy"]
    options = dict(argument.split("=") for argument in server["command"] if argument.startswith("--"))
    assert manifest[1]["metadata"]["name"] == options["--allow-host"]
    writable = {mount["mountPath"] for mount in server["volumeMounts"] if not mount.get("readOnly")}
    keys, cluster_key = (Path(options[name]) for name in ("--keys", "--cluster-key-file"))
    assert {str(keys.parent), str(cluster_key.parent)} <= writable
    assert KeyFile(tmp_path / keys.relative_to("/")).read()[0].name == "one"
    assert read_key(tmp_path / cluster_key.relative_to("/")) == b"k" * 64


def test_dead_nodes_are_noticed_as_soon_as_the_guide_says(manifest: list[Any]) -> None:
    guide = (ROOT / "docs" / "guides" / "cluster-ray.md").read_text()
    said = dict(re.findall(r"(RAY_health_check_\w+)=(\d+)", guide))
    assert len(said) == 4
    for group in groups(manifest[0]):
        (ray,) = [one for one in group["template"]["spec"]["containers"] if one["name"].startswith("ray-")]
        assert {one["name"]: one["value"] for one in ray["env"]} == said
