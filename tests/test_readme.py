"""The commands of README and guides exist as written; the README's have an order that works, and its Python runs.

What a guide shows of an output is compared with what the command prints: all of it where numbers are known beforehand,
and otherwise its names, headings and sentences.
"""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from argosy.cli.main import cli, main
from tests.cli.tiny_chat_model import write_chat_model
from tests.helpers.guides import shown_after
from tests.helpers.hub_server import directory_files, served
from tests.library.caches import GGUF
from tests.serve.speaking import speaking, write_speaking_model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ALL_COMMANDS = re.findall(r"^\$ (.*)$", README, flags=re.MULTILINE)
COMMANDS = re.findall(r"^\$ argosy (.*)$", README, flags=re.MULTILINE)
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs" / "guides").glob("*.md"))]
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_readme_shows_commands_and_python() -> None:
    assert len(COMMANDS) >= 5
    assert len(PYTHON) == 1


def test_every_command_of_the_readme_is_known_to_this_file() -> None:
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for line in ALL_COMMANDS:
        words = line.split("#")[0].split()
        match words:
            case ["argosy", *_]:
                pass  # a test below parses these
            case ["make", target]:
                assert target in targets, line
            case ["source", ".venv/bin/activate"]:
                pass
            case _:
                pytest.fail(f"nobody checks `{line}`")


def test_argosy_is_on_the_path_before_its_first_command() -> None:
    activates = ALL_COMMANDS.index("source .venv/bin/activate")
    assert ALL_COMMANDS.index("make demo") < activates
    assert not any(line.startswith("argosy") for line in ALL_COMMANDS[:activates])


@pytest.mark.parametrize("name", ["README.md", "SECURITY.md", "CONTRIBUTING.md"])
def test_no_section_is_empty_and_no_placeholder_is_left(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not re.search(r"^#[^\n]*\n\s*(^#|\Z)", text.split("\n", 1)[1], flags=re.MULTILINE)
    assert "REPOSITORY" not in text
    assert "TODO" not in text


def parse(words: list[str]) -> None:
    """Parse a command line of `argosy` without running it."""
    context = click.Context(cli, **cli.context_settings)
    name, *arguments = words
    command = cli.get_command(context, name)
    while isinstance(command, click.Group) and arguments:
        name, *arguments = arguments
        command = command.get_command(context, name)
    assert command is not None, f"there is no command {name}"
    command.make_context(name, arguments, parent=context)


def argosy_commands(lines: list[str]) -> Iterator[list[str]]:
    """The words of each `argosy` command in lines of a shell, between pipes and without redirections."""
    for line in lines:
        whole = re.sub(r"\s#\s.*", "", line.replace("\\\n", " "))
        for part in re.split(r"\s[|&]+\s?|<\(|\$\(", whole):
            command = re.split(r"\s[<>]|\)$", part)[0].strip()
            if command.startswith("argosy "):
                yield shlex.split(command)[1:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_argosy_command_of_a_page_parses(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "serve.toml").touch()
    for words in argosy_commands(
        re.findall(r"^\$ (.*(?:\\\n.*)*)$", page.read_text("utf-8"), flags=re.MULTILINE)
    ):
        try:
            parse(words)
        except click.UsageError as error:
            pytest.fail(f"argosy {shlex.join(words)}: {error.message}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_that_a_page_mentions_has_the_options_it_names(page: Path) -> None:
    """A mention may leave out arguments and values, and have names in capitals for them."""
    for words in argosy_commands(re.findall(r"`(argosy [^`\n]+)`", page.read_text("utf-8"))):
        if words[0] == "COMMAND" or words[0].startswith("-"):
            continue
        try:
            parse(words)
        except (click.MissingParameter, click.exceptions.Exit, click.exceptions.NoArgsIsHelpError):
            pass
        except click.UsageError as error:
            if not (
                error.message.endswith("requires an argument.") or re.search("'[A-Z]+' is not", error.message)
            ):
                pytest.fail(f"argosy {shlex.join(words)}: {error.message}")


# What the guide to the terminal asks the demo model, and what the model that stands for it says.
SAID = {
    "Why is the sky blue?": "<think>\nLight scatters.\n</think>\n\nBlue light scatters most.",
    "What do these disagree about?": "The report says ten, the notes eleven.",
    "Review this change.": "It is fine.",
    "Ada Lovelace, born 1815 in London.": '{"name": "Ada Lovelace", "born": 1815}',
}


def test_the_first_commands_of_the_guide_to_the_terminal_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    guide = (ROOT / "docs" / "guides" / "terminal.md").read_text("utf-8")
    lines = re.findall(r"^\$ (.*argosy run .*)$", guide, flags=re.MULTILINE)
    model = write_speaking_model(tmp_path / "demo")
    monkeypatch.setattr("argosy.demo.locate.locate", lambda progress=None: model)
    monkeypatch.chdir(tmp_path)
    for name, text in (("report.md", "Ten."), ("notes.txt", "Eleven."), ("reviewer.txt", "You review code.")):
        (tmp_path / name).write_text(text)
    person = {"type": "object", "properties": {"name": {"type": "string"}, "born": {"type": "integer"}}}
    (tmp_path / "person.json").write_text(json.dumps({**person, "required": ["name", "born"]}))
    answers = []
    with speaking(SAID):
        for line, words in zip(lines, argosy_commands(lines), strict=True):
            monkeypatch.setattr("sys.stdin", io.StringIO("diff\n" if line.startswith("git diff |") else ""))
            assert main(words) == 0, line
            answers.append(capsys.readouterr().out.strip())
    assert answers[:3] == [said.split("\n")[-1] for said in list(SAID.values())[:3]]
    assert lines[3].endswith("| jq .name")
    assert json.loads(answers[3])["name"] == "Ada Lovelace"


def test_the_readmes_breakdown_has_the_lines_that_are_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def labels(text: str) -> set[str]:
        return set(re.findall(r"^ {0,2}([A-Za-z]+(?: [A-Za-z]+)*?)(?=  |\t)", text, flags=re.MULTILINE))

    monkeypatch.setattr(
        "argosy.demo.locate.locate", lambda progress=None: write_speaking_model(tmp_path / "demo")
    )
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with speaking():
        assert main(["run", "#plain"]) == 0
    shown = re.findall(r"```text\n(The capital of France.*?)```", README, flags=re.DOTALL)[0]
    assert {"tokens", "memory", "KV cache", "expert compute"} <= labels(shown)
    assert labels(capsys.readouterr().err) <= {*labels(shown), "energy"}  # where it is measured


@pytest.fixture
def new_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("HF_HOME", "HF_HUB_CACHE", "HF_TOKEN", "HF_HUB_OFFLINE", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_a_search_prints_what_the_guide_shows(
    new_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models: list[dict[str, Any]] = [
        {"id": "Qwen/Qwen3-30B-A3B", "downloads": 1234567, "safetensors": {"total": 30532122624}}
        | {"tags": ["safetensors", "qwen3_moe", "license:apache-2.0"]},
        {"id": "unsloth/Qwen3-30B-A3B-GGUF", "downloads": 123456, "tags": ["gguf", "license:apache-2.0"]}
        | {"gguf": {"total": 30532122624, "architecture": "qwen3moe"}},
        *({"id": f"others/{at}", "tags": ["safetensors", "phi3"]} for at in range(61)),
    ]
    with served({}, models=models) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        assert main(["search", "qwen3", "30b"]) == 0
    said = capsys.readouterr()
    assert (said.out + said.err).splitlines() == shown_after("getting-a-model.md", "argosy search qwen3 30b")


def test_a_pull_prints_what_the_guide_shows(
    new_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "unsloth/Qwen3-30B-A3B-GGUF"
    beginning, size = directory_files(GGUF)["model.gguf"]
    sizes = {"UD-IQ2_XXS": 10.3, "Q2_K": 11.3, "Q3_K_M": 14.7, "Q8_0": 32.5}
    files = {f"m-{format}.gguf": (beginning, int(gb * 1e9)) for format, gb in sizes.items()}
    files |= {f"m-BF16-0000{part}-of-00002.gguf": (beginning, int(61.1e9 / 2)) for part in (1, 2)}
    files["m-Q4_K_M.gguf"] = beginning, size
    with served(files, repository=name) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        assert main(["pull", name, "--formats"]) == 0
        table = capsys.readouterr().out.splitlines()
        assert main(["pull", f"{name}:Q4_K_M", "--yes"]) == 0
        plan = capsys.readouterr().out.splitlines()

    def cells(lines: list[str]) -> list[list[str]]:
        return [re.split(r"  +", line) for line in lines]

    *shown, last = shown_after("getting-a-model.md", f"argosy pull {name} --formats")
    assert cells(table)[0] == cells(shown)[0]
    of_a_format = {row[0]: row[1:3] for row in cells(table)}
    for format, *row in cells(shown)[1:]:
        assert format in of_a_format
        if format != "Q4_K_M":  # it has its true size here
            assert of_a_format[format][0] == row[0]
    assert re.sub(r":\w+`", ":`", table[-1]) == re.sub(r":\w+`", ":`", last)

    *shown, question = shown_after("getting-a-model.md", f"argosy pull {name}:Q4_K_M")
    assert question == "Fetch it, under the licence apache-2.0? [y/N]:"
    printed = {line.partition(" ")[0]: line for line in plan}
    assert {line.partition(" ")[0] for line in shown} <= {*printed}
    assert printed["licence"].replace(hub.url, "https://huggingface.co") == shown[1]
    revision = re.compile("revision [0-9a-f]{12}")
    assert revision.sub("", printed["model"]) == revision.sub("", shown[0])


def test_the_python_of_the_readme_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_chat_model(tmp_path / "model")
    exec(PYTHON[0].replace('"demo"', repr(str(tmp_path / "model"))), {})
    assert capsys.readouterr().out
