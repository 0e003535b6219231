"""`--cluster auto`: workers of a Ray cluster, from the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from argosy.cli.main import main
from tests.cli.tiny_chat_model import write_chat_model


def argosy(*arguments: str, address: str = "") -> str:
    """Return the output of a command."""
    done = subprocess.run(
        [sys.executable, "-m", "argosy", *arguments], env={**os.environ, "RAY_ADDRESS": address}, check=False,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_command_runs_experts_on_the_nodes_of_a_ray_cluster(cluster: Cluster, tmp_path: Path) -> None:
    model, key = write_chat_model(tmp_path / "model"), tmp_path / "key"
    key.write_text("0123456789abcdef" * 4)
    key.chmod(0o600)
    asked = (
        "run", "--model", str(model), "Tell me", "--memory", "1GiB", "--temperature", "0", "--max-tokens", "24",
        "--threads", "1",
    )  # fmt: skip
    auto = (
        "--cluster", "auto", "--workers", "2", "--worker-memory", "1GiB", "--cluster-key-file", str(key),
        "--no-local-experts",
    )  # fmt: skip
    assert argosy(*asked, *auto, address=cluster.address) == argosy(*asked)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--workers", "2"], "--workers needs --cluster auto"),
        (["--cluster", "a:1", "--worker-memory", "1GiB"], "--worker-memory needs --cluster auto"),
        (["--cluster", "auto", "--cluster-ca", "ca.pem"], "without TLS"),
    ],
)
def test_options_that_do_not_belong_together_are_refused(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--model", "demo", "Hello", *options]) == 2
    assert said in capsys.readouterr().err
