"""`argosy completion`: what each shell completes, in the shells that are here, and how little that imports."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from argosy.cli.main import _COMMANDS, main
from tests.cli.terminal import on_terminal
from tests.cli.test_main import FINDS_MODELS, HEAVY

Captured = pytest.CaptureFixture[str]


def completed(words: Sequence[str], monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> list[str]:
    """The completions that bash gets for these words; the last one is incomplete."""
    monkeypatch.setenv("_ARGOSY_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "\n".join(["argosy", *words]))
    monkeypatch.setenv("COMP_CWORD", str(len(words)))
    assert main([]) == 0
    return capsys.readouterr().out.splitlines()


def test_commands_options_models_sizes_and_files_are_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    for name in ("HF_HOME", "HF_HUB_CACHE", "OLLAMA_MODELS", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    model = tmp_path / ".lmstudio/models/Somebody/Small-MoE/Small-MoE-Q4_K_M.gguf"
    model.parent.mkdir(parents=True)
    model.write_bytes(b"GGUF")
    assert main(["alias", "deep", str(model)]) == 0
    capsys.readouterr()

    def found(*words: str) -> list[str]:
        return completed(words, monkeypatch, capsys)

    assert {"plain,run", "plain,routes"} <= set(found("r"))
    assert found("comp") == ["plain,completion"]
    assert found("--v") == ["plain,--version"]
    assert found("completion", "") == ["plain,bash", "plain,zsh", "plain,fish"]
    assert {"plain,--memory", "plain,--mmproj"} <= set(found("run", "--m"))
    assert found("chat", "--kv", "f") == ["plain,f32", "plain,f16"]
    assert found("run", "-m", "de") == ["file,de", "plain,demo", "plain,deep"]
    assert found("bench", "Some") == ["file,Some", "plain,Somebody/Small-MoE:Q4_K_M"]
    (tmp_path / ".local/share/argosy/library.json").write_text("{")
    assert found("run", "-m", "de") == ["file,de", "plain,demo"]
    assert found("chat", "./mod") == ["file,./mod"]
    assert found("run", "-f", "x") == found("run", "--json-schema", "x") == ["file,x"]
    assert found("run", "--image", "x") == found("chat", "--history", "x") == ["file,x"]
    assert found("serve", "--memory", "1") == ["plain,16GiB", "plain,128GiB", "plain,1GiB", "plain,1MiB"]
    assert found("serve", "--memory", "9") == ["plain,96GiB", "plain,90%", "plain,9GiB", "plain,9MiB"]
    assert found("bench", "--context", "8") == ["plain,8192"]
    assert found("run", "--instruction-set", "avx") == ["plain,avx2", "plain,avx512"]
    assert found("keys", "") != []


@pytest.mark.parametrize("asked", ["bash_source", "csh_complete", "x", "bash_complete"])
def test_what_no_script_of_ours_asks_gets_no_answer(
    asked: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setenv("_ARGOSY_COMPLETE", asked)
    assert main(["run"]) == 2
    assert capsys.readouterr() == ("", "")


def test_completing_imports_nothing_heavy() -> None:
    code = (
        "import os, sys; from argosy.cli.main import main\n"
        "os.environ['_ARGOSY_COMPLETE'] = 'bash_complete'\n"
        f"for command in {[*_COMMANDS]}:\n"
        "    for words in (['argosy', command[:1]], ['argosy', command, '--'], ['argosy', command, '']):\n"
        "        os.environ['COMP_WORDS'], os.environ['COMP_CWORD'] = ' '.join(words), str(len(words) - 1)\n"
        "        main([])\n"
        f"print(sorted(set({HEAVY}) & sys.modules.keys() - {FINDS_MODELS}), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "[]\n")


# In the shells themselves


def with_script(tmp_path: Path, shell: str) -> dict[str, str]:
    """Write the shell's script; the environment has `argosy` on its PATH."""
    program = tmp_path / "bin" / "argosy"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m argosy "$@"\n')
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["argosy", "completion", shell], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    (tmp_path / "script").write_text(done.stdout)
    return environment


def test_bash_completes_a_command_and_a_size(tmp_path: Path) -> None:
    environment = with_script(tmp_path, "bash")
    with on_terminal(["bash", "--norc", "-i"], environment) as terminal:
        terminal.send(f"PS1='rea''dy> '; source {tmp_path}/script; cd {tmp_path}\r".encode())
        terminal.until(b"ready> ")  # the echo of the line has quotes in it
        terminal.send(b"argosy transc\t")
        terminal.until(b"argosy transcribe ")
        terminal.send(b"\x15argosy run --memory 48G\t")
        terminal.until(b"--memory 48GiB ")
        terminal.send(b"\x15argosy run -f scr\t")
        terminal.until(b"-f script ")
        terminal.send(b"\x15argosy chat de\t")
        terminal.until(b"chat demo ")


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_completes_a_command_and_a_size(tmp_path: Path) -> None:
    environment = with_script(tmp_path, "zsh")
    with on_terminal(["zsh", "-f", "-i"], environment) as terminal:
        terminal.send(
            f"PS1='rea''dy> '; autoload -U compinit; compinit -D -u; source {tmp_path}/script\r".encode()
        )
        terminal.until(b"ready> ")
        terminal.send(b"argosy transc\t")
        terminal.until(b"transcribe")
        terminal.send(b"\x15argosy run --memory 48G\t")
        terminal.until(b"48GiB")


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_completes_a_command_and_a_size(tmp_path: Path) -> None:
    environment = with_script(tmp_path, "fish") | {"HOME": str(tmp_path)}
    for line, item in (
        ("argosy transc", "transcribe\tTranscribe audio files."),
        ("argosy run --memory 48G", "48GiB"),
    ):
        done = subprocess.run(
            ["fish", "--no-config", "-c", f"source {tmp_path}/script; complete -C '{line}'"],
            env=environment, capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        assert item in done.stdout.splitlines()


@pytest.mark.parametrize(("shell", "start"), [("bash", "_argosy_completion()"), ("zsh", "#compdef argosy")])
def test_each_script_asks_argosy_itself(shell: str, start: str, capsys: Captured) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert script.startswith(start)
    assert f"_ARGOSY_COMPLETE={shell}_complete" in script
