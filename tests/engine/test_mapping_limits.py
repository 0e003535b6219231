"""Under `ulimit -v` and `ulimit -d` a model runs or is refused with the numbers; no library aborts the process."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.tiny_chat_model import write_chat_model

MIB = 1 << 20
RUN = "import sys; from argosy.cli.main import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("limits") / "model"
    write_chat_model(directory)
    return directory


def run(model: Path, command: str, kind: int, limit_bytes: int) -> subprocess.CompletedProcess[str]:
    arguments = {"run": ["run", "-m", str(model), "-n", "4", "hello"], "show": ["show", str(model)]}[command]
    return subprocess.run(
        [sys.executable, "-c", RUN, *arguments, "--memory", "300MiB", "--context", "256"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ,
        preexec_fn=lambda: resource.setrlimit(kind, (limit_bytes, limit_bytes)),
        check=False,
    )


@pytest.mark.covering(1)
@pytest.mark.parametrize("command", ["-v", "-d"])
@pytest.mark.parametrize("subcommand", ["run", "show"])
@pytest.mark.parametrize("limit_mib", [200, 220, 300, 400])  # with less, libraries cannot be mapped
def test_a_limit_that_is_too_low_is_refused_with_the_numbers(
    model: Path, subcommand: str, command: str, limit_mib: int
) -> None:
    kind = {"-v": resource.RLIMIT_AS, "-d": resource.RLIMIT_DATA}[command]
    done = run(model, subcommand, kind, limit_mib * MIB)
    assert done.returncode == 3, done.stderr
    assert f"`ulimit {command}` lets this process map {limit_mib} MiB, it has mapped " in done.stderr
    assert f"hint: `ulimit {command} unlimited` lifts the limit" in done.stderr


@pytest.mark.parametrize("step_mib", [400, pytest.param(200, marks=pytest.mark.full)])
@pytest.mark.parametrize("kind", [resource.RLIMIT_AS, resource.RLIMIT_DATA])
def test_a_limit_that_is_not_refused_is_enough(model: Path, kind: int, step_mib: int) -> None:
    refused = run(model, "run", kind, 400 * MIB)
    assert refused.returncode == 3
    for limit_mib in range(400 + step_mib, 4000, step_mib):
        done = run(model, "run", kind, limit_mib * MIB)
        assert done.returncode in (0, 3), done.stderr
        if done.returncode == 0:
            return
    pytest.fail("no limit is enough")
