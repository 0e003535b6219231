"""`argosy route` as a process: its keys, its log, and its end."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from argosy.cli.main import main
from argosy.guard.keys import KeyFile
from tests.route.test_hostile import ASKED, faking, whole


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["10.0.0.2:8080"], "begins with http://"),
        (["http://a:1", "http://a:1/"], "http://a:1 is given twice"),
        (["http://a:1", "--host", "0.0.0.0"], "there are no keys"),
        (["http://a:1", "--tls-key", "k.pem"], "--tls-key needs --tls-cert"),
        (["http://a:1", "--keys", "/nowhere/keys.json"], "/nowhere/keys.json"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    args: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["route", *args]) == 2
    assert said in capsys.readouterr().err


def test_settings_may_be_checked_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["route", "http://a:1", "--check"]) == 0
    assert capsys.readouterr().out == "the settings are valid\n"


def test_a_router_passes_keys_on_logs_none_and_ends_on_sigterm(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    _, secret = KeyFile(keys).add("someone", scopes=("infer",))
    with faking(whole("Hello")) as (_, (server,)):
        command = [
            sys.executable, "-m", "argosy", "route", server.url, "--port", "0", "--keys", str(keys), "--log-format",
            "json",
        ]  # fmt: skip
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        lines = [process.stderr.readline()]
        while not lines[-1].startswith("routing "):
            assert lines[-1], "".join(lines)  # it has ended
            lines.append(process.stderr.readline())
        found = re.fullmatch(rf"routing (http://127\.0\.0\.1:\d+) to {server.url}\n", lines[-1])
        assert found, lines
        url = f"{found[1]}/v1/chat/completions"
        assert httpx.post(url, json=ASKED).status_code == 401
        assert httpx.post(url, json=ASKED, headers={"x-api-key": "wrong"}).status_code == 401
        assert httpx.post(url, json=ASKED, headers={"authorization": f"Bearer {secret}"}).status_code == 200
        process.send_signal(signal.SIGTERM)
        log = "".join(lines) + process.communicate(timeout=30)[1]
        assert process.returncode == 0
        assert len(server.bodies) == 1
        assert f"authorization: bearer {secret}".lower().encode() in server.heads[0].lower()
    assert secret not in log
    assert '"route": "/v1/chat/completions", "status": 200' in log
    assert "Hello" not in log
