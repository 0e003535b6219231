"""Every way a command can end: a sentence on stderr and a stable exit code."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import click
import pytest

import argosy.open.engine
from argosy import errors
from argosy.cli.commands.chat import chat
from argosy.cli.commands.plan import plan
from argosy.cli.commands.run import run
from argosy.cli.commands.serve import serve
from argosy.cli.main import _COMMANDS, _SUBJECTS, main
from argosy.cli.shared.help_all import Further
from argosy.cli.shared.settings import VARIABLES, for_engine, read_settings, wants_traceback
from argosy.config import SamplingParams
from argosy.errors import UsageError
from argosy.user_directories import data_directory
from tests.cli.fake_engine import FakeEngine
from tests.cli.tiny_chat_model import write_chat_model
from tests.helpers.forks import Forked

Engine = type[FakeEngine]
Captured = pytest.CaptureFixture[str]


def run_module(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "argosy", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("command", ["", *_COMMANDS])
def test_help_fits_40_lines_with_two_examples(command: str, capsys: Captured) -> None:
    assert main([*command.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) <= (40 if command else 70)  # a screen and a half of commands
    assert all(len(line) <= 100 for line in out.splitlines())
    examples = out.split("Examples:")[1].split("\n\n")[0].strip().splitlines()
    assert len(examples) == 2
    assert all(line.strip().startswith("argosy") for line in examples)


def named_options(text: str) -> set[str]:
    """The options that a help has a line for."""
    columns = [line[2:].split("  ")[0] for line in text.splitlines() if line.startswith("  -")]
    return {word.rstrip(",") for column in columns for word in column.split() if word.startswith("-")}


LONG = {"run": run, "chat": chat, "serve": serve, "plan": plan}


@pytest.mark.parametrize("name", LONG)
def test_the_help_of_a_long_command_has_room_and_help_all_shows_every_option(
    name: str, capsys: Captured
) -> None:
    assert main([name, "--help"]) == 0
    common = capsys.readouterr().out
    assert len(common.splitlines()) <= 34
    assert main([name, "--help-all"]) == 0
    text = capsys.readouterr().out
    assert all(len(line) <= 100 for line in text.splitlines())
    options = [option for option in LONG[name].params if isinstance(option, click.Option)]
    further = [option for option in options if isinstance(option, Further)]
    assert f"Also show {len(further)} further options." in common
    for option in options:
        assert option.opts[-1] in named_options(text)
        assert (option.opts[-1] in named_options(common)) != (option in further), option.opts
    first, more = text.split("Further options:\n")
    assert first.rstrip() == common.rstrip()
    assert len(more.splitlines()) >= len(further)


def test_a_command_whose_help_is_long_has_help_all(capsys: Captured) -> None:
    for name in _COMMANDS:
        assert main([name, "--help"]) == 0
        num_lines = len(capsys.readouterr().out.splitlines())
        assert name in LONG or num_lines <= 30, f"{name} has {num_lines} lines: make it a help_all.Command"


def test_every_command_that_offers_further_options_shows_them(capsys: Captured) -> None:
    for name in _COMMANDS:
        assert main([name, "--help"]) == 0
        if "--help-all" in capsys.readouterr().out:
            assert main([name, "--help-all"]) == 0, name
            assert "\nFurther options:\n  -" in capsys.readouterr().out, name


def test_up_shows_the_options_of_the_server_that_it_starts(capsys: Captured) -> None:
    assert main(["up", "--help-all"]) == 0
    assert {"--memory", "--speculate"} <= named_options(capsys.readouterr().out)


@pytest.mark.parametrize("command", ["run", "chat", "serve"])
def test_each_option_of_an_engine_has_a_line_of_help(command: str, capsys: Captured) -> None:
    assert main([command, "--help-all"]) == 0
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  -")]
    for option in (
        "--memory",
        "--instruction-set",
        "--image-tokens",
        "--video-tokens",
        "--mmproj",
        "--ears",
        "--no-record",
        "--no-tune",
    ):
        assert option in shown


def test_the_options_for_media_share_a_line_of_help(capsys: Captured) -> None:
    assert main(["run", "--help"]) == 0
    assert "  --image, --audio, --video FILE  Show a file" in capsys.readouterr().out


def test_the_help_of_serve_shows_the_default_of_every_number(capsys: Captured) -> None:
    assert main(["serve", "--help-all"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    options = [one for one in serve.params if isinstance(one, click.Option)]
    defaults = [option.default for option in options if type(option.default) in (int, float)]
    assert len(defaults) == 6
    assert all(f"[default: {default}" in shown for default in defaults)


@pytest.mark.parametrize("arguments", [[], ["keys"]])
def test_a_command_group_without_a_command_shows_its_help_as_a_usage_error(
    arguments: list[str], capsys: Captured
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("Usage: argosy")
    assert ("Commands:" if arguments else "First steps:") in captured.err
    assert "error" not in captured.err


def test_a_full_output_exits_5_and_is_reported_once() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "argosy", "--help"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (
        5,
        "error: the output cannot be written: No space left on device\n"
        "hint: free some space, and run the same command again\n",
    )


@pytest.mark.parametrize("command", [["run", "Hi", "-m"], ["chat"], ["serve"], ["show"]])
def test_a_hub_name_is_answered_with_how_to_fetch_it(command: list[str], capsys: Captured) -> None:
    assert main([*command, "Qwen/Qwen3-30B-A3B"]) == 4
    said = capsys.readouterr().err
    assert said.startswith("error: no model here is named 'Qwen/Qwen3-30B-A3B'\nhint: ")
    assert "`argosy pull Qwen/Qwen3-30B-A3B` fetches it from the hub" in said


def test_a_path_is_not_taken_for_the_name_of_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for path in ("models/missing", "/nowhere/missing", "missing.gguf", "a/b/c", "../x"):
        assert main(["show", path]) == 4
        assert capsys.readouterr().err == f"error: {path} does not exist\n"


def test_help_lists_every_command_by_subject_and_begins_with_the_five_of_a_first_hour(
    capsys: Captured,
) -> None:
    assert main(["--help"]) == 0
    listed = re.findall(r"(?m)^(?:  )?([a-z]+|[A-Z][a-z ]+:)(?:  .*)?$", capsys.readouterr().out)
    assert listed[listed.index("First steps:") :] == [
        word for subject, rows in _SUBJECTS.items() for word in (f"{subject}:", *rows)
    ]
    assert list(_COMMANDS)[:5] == ["plan", "pull", "run", "chat", "serve"]


@pytest.mark.parametrize("command", [[], ["run"], ["keys"], ["keys", "add"]])
def test_h_and_help_show_what_the_long_option_shows(command: list[str], capsys: Captured) -> None:
    shown = []
    for arguments in ([*command, "--help"], [*command, "-h"], ["help", *command]):
        assert main(arguments) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0].startswith(f"Usage: argosy{''.join(f' {word}' for word in command)} [OPTIONS]")
    assert len(set(shown)) == 1


def test_help_for_an_unknown_command_names_the_nearest(capsys: Captured) -> None:
    assert main(["help", "rnu"]) == 2
    assert capsys.readouterr().err == (
        "error: no such command 'rnu'; did you mean 'run'?\nhint: `argosy --help` lists the commands\n"
    )


# Modules that an engine or only some commands need: each takes long to import.
HEAVY = (
    "argosy._native", "argosy.engine", "argosy.model", "argosy.prompt", "argosy.serve", "asyncio",
    "huggingface_hub", "jinja2", "llguidance", "numpy", "PIL", "prompt_toolkit", "pydantic", "rich", "starlette",
    "tokenizers", "tomlkit", "uvicorn",
)  # fmt: skip
LIGHT = [
    ["--version"],
    ["--help"],
    *([command, "--help"] for command in _COMMANDS),
    ["completion", "zsh"],
    ["list"],
]
FINDS_MODELS = {"numpy"}  # what finding models needs of these: headers of GGUF files are arrays


def test_version_help_and_lists_need_no_heavy_imports() -> None:
    code = (
        "import sys; from argosy.cli.main import main\n"
        "already = set()\n"
        f"for arguments in {LIGHT}:\n"
        "    main(arguments)\n"
        f"    allowed = {FINDS_MODELS} if arguments == ['list'] else set()\n"
        f"    found = sorted(set({HEAVY}) & sys.modules.keys() - already - allowed)\n"
        "    already |= set(found)\n"
        "    for name in found: print(arguments, 'imports', name, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("argosy 0.")


def test_an_engine_without_a_server_holds_no_modules_that_it_does_not_need(tmp_path: Path) -> None:
    """The plan counts what the process holds: experts get the rest of the budget."""
    model = write_chat_model(tmp_path / "model")
    unneeded = {"argosy.prompt.chat", "http.client", "ssl", "tomllib"}
    code = (
        "import sys; from argosy import Engine; Engine\n"
        f"print(sorted({unneeded} & sys.modules.keys()))\n"
        "from argosy.cli.main import main\n"
        f"main(['run', 'hi', '-q', '-n', '1', '--memory', '400MiB', '-m', {str(model)!r}])\n"
        f"print(sorted({unneeded - {'argosy.prompt.chat'}} & sys.modules.keys()))\n"  # this model has a template
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert (lines[0], lines[-1]) == ("[]", "[]")


def test_the_first_output_takes_200_ms_of_a_processor_at_most() -> None:
    def bare() -> None:
        subprocess.run([sys.executable, "-c", ""], check=True, timeout=60)

    def version() -> None:
        assert run_module("--version").returncode == 0

    assert min(_cpu_seconds(version) for _ in range(5)) - min(_cpu_seconds(bare) for _ in range(3)) < 0.2


def _cpu_seconds(run: Callable[[], None]) -> float:
    """Processor time of the processes that `run` starts; the time on the wall would be that of others, too."""
    before = os.times()
    run()
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["rnu"], "no such command 'rnu'; did you mean 'run'?"),
        (["rot"], "no such command 'rot'; did you mean 'route' or 'routes'?"),
        (["xyzzy"], "no such command 'xyzzy'\nhint: `argosy --help` lists the commands"),
        (["run", "--tempretaure", "1"], "--temperature"),
        (["show", "--memroy", "1GB"], "--memory"),
        (["run", "--kv", "f8", "x"], "'f8' is not one of 'f32', 'f16', 'q8'"),
        (["run", "--threads", "0", "x"], "0 is not in the range"),
        (
            ["run", "demo"],
            "'demo' is a model, and `run` takes its prompt here\nhint: `argosy run -m demo PROMPT` asks",
        ),
        (["run", "demo", "Hi"], "'demo' is a model, and `run` takes its prompt here"),
        (
            ["run", "what", "does", "ls", "-l", "print"],
            "lists the options; a prompt with such a word needs quotes",
        ),
        (["run", "--temperature", "-1", "x"], "temperature must be from 0 to 100, found -1.0"),
        (["run", "--top-p", "2", "x"], "top_p must be above 0, at most 1, found 2.0"),
        (["run", "-n", "0", "x"], "max_tokens must be at least 1, found 0"),
        (["run", "--stop", "", "x"], "a stop string must hold at least one character"),
        (["run", "--logit-bias", "7:3", "x"], "--logit-bias takes ID=X, found '7:3'"),
        (["run", "--raw", "--system", "s", "x"], "--raw and --system exclude each other"),
        (["upcycle", "only-one"], "missing argument 'DST'"),
        (["serve", "--name", "a", "--name", "b"], "--name was given 2 times, and there is 1 model\n"),
    ],
)
def test_an_invalid_argument_is_named_and_exits_2(
    arguments: list[str], sentence: str, engine: Engine, capsys: Captured
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert sentence in captured.err
    assert captured.out == ""
    assert engine.opened == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UsageError, 2),
        (errors.PromptTooLong, 2),
        (errors.DoesNotFit, 3),
        (errors.CheckpointError, 4),
        (errors.UnsupportedModel, 4),
        (errors.CorruptRecord, 4),
        (errors.ReadFailed, 4),
        (errors.DiskFull, 5),
        (errors.FetchFailed, 1),
    ],
)
def test_an_argosy_error_prints_its_message_and_exits_with_its_code(
    error: type[errors.ArgosyError], code: int, engine: Engine, capsys: Captured
) -> None:
    def fail() -> None:
        raise error("layer 3 is upside down", hint="turn it over")

    engine.before_open = staticmethod(fail)
    assert main(["run", "-m", "x", "Hi"]) == code
    assert capsys.readouterr().err == "error: layer 3 is upside down\nhint: turn it over\n"


@pytest.mark.parametrize(
    ("error", "what", "limit"),
    [
        (RuntimeError("can't start new thread"), "threads", "pids.max"),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "files", "ulimit -n"),
        (MemoryError(), "memory", "ulimit -v"),
        (ImportError("x.so: failed to map segment from shared object"), "memory", "ulimit -v"),
    ],
)
def test_what_the_system_does_not_give_is_told_with_the_limit_to_raise(
    engine: Engine, capsys: Captured, error: Exception, what: str, limit: str
) -> None:
    def refuse() -> None:
        raise error

    engine.before_open = staticmethod(refuse)
    assert main(["run", "-m", "x", "Hi"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: the system gives this process no more {what}\nhint: ")
    assert limit in said


@pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="numpy starts no thread on one core")
def test_commands_import_numpy_without_threads() -> None:
    code = """
from argosy.cli.main import main
assert main(["--version"]) == 0
import numpy
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("Threads")])
"""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, env=environment
    )
    assert found.stdout.splitlines()[-1] == "['1']"


def test_an_unexpected_error_is_one_line_and_a_hint_to_see_the_traceback(
    engine: Engine, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise ZeroDivisionError("division by zero:\n(nothing) was divided\n" + "x" * 1000)

    engine.before_open = staticmethod(fail)
    assert main(["run", "-m", "x", "Hi"]) == 1
    shown, hint = capsys.readouterr().err.splitlines()
    assert shown.startswith("error: unexpected ZeroDivisionError: division by zero: (nothing) was divided x")
    assert len(shown) < 400
    assert hint == "hint: ARGOSY_TRACEBACK=1 shows the traceback"
    monkeypatch.setenv("ARGOSY_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        main(["run", "-m", "x", "Hi"])


def test_a_drive_that_fails_is_told_as_such(engine: Engine, capsys: Captured) -> None:
    def fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "/a/file")

    engine.before_open = staticmethod(fail)
    assert main(["run", "-m", "x", "Hi"]) == 2
    assert capsys.readouterr().err == (
        f"error: /a/file: {os.strerror(errno.EIO)}\nhint: ARGOSY_TRACEBACK=1 shows the traceback\n"
    )


@pytest.mark.parametrize("at", ["open", "token"])
def test_an_interrupt_anywhere_exits_130_with_a_clean_line(at: str, engine: Engine, capsys: Captured) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    setattr(engine, f"before_{at}", staticmethod(interrupt))
    assert main(["run", "-m", "x", "Hi"]) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def answer_at_length() -> int:
    class Long(FakeEngine):
        opened: ClassVar[list[dict[str, object]]] = []
        asked: ClassVar[list[object]] = []
        params: ClassVar[list[SamplingParams]] = []
        answer = ("word ",) * 200_000

    argosy.open.engine.Engine = Long  # type: ignore[misc, assignment]
    return main(["run", "-m", "x", "Hi"])


def test_a_reader_that_closes_the_pipe_causes_no_error_message() -> None:
    process = Forked[bytes]([answer_at_length], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert (process.wait(timeout=60), said) == (1, b"")


# The environment


def test_flags_override_the_environment_and_only_given_settings_reach_the_engine() -> None:
    environment = {"ARGOSY_MEMORY": "2GiB", "ARGOSY_THREADS": "3", "HOME": "/"}
    settings = read_settings(environment, memory="1GiB", kv_dtype="f16")
    assert for_engine(settings) == {"memory": "1GiB", "threads": 3, "kv_dtype": "f16"}
    assert for_engine(read_settings({})) == {}


def test_the_environment_gives_values_of_the_options_types() -> None:
    environment = {
        "ARGOSY_ASK_AHEAD": "off",
        "ARGOSY_INSTRUCTION_SET": "avx2",
        "ARGOSY_RECORD": "off",
        "ARGOSY_TUNE": "off",
    }
    # `machine/tuning.py` reads ARGOSY_TUNE itself.
    wanted = {"ask_ahead": "off", "instruction_set": "avx2", "record": False}
    assert read_settings(environment) == wanted


def test_the_help_lists_every_variable_that_the_program_reads(capfd: pytest.CaptureFixture[str]) -> None:
    sources = [path.read_text() for path in (Path(__file__).parents[2] / "src" / "argosy").rglob("*.py")]
    read = {name for text in sources for name in re.findall(r"(?<!_)\bARGOSY_[A-Z_]*[A-Z]", text)}
    assert read == set(VARIABLES)
    assert main(["--help"]) == 0
    shown = capfd.readouterr().out
    assert re.findall(r"ARGOSY_[A-Z_]+|NO_COLOR", shown) == [*VARIABLES, "NO_COLOR"]


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"ARGOSY_THREADS": "many"}, "a whole number of at least 1 and at most 1024, found 'many'"),
        ({"ARGOSY_THREADS": "0"}, "at most 1024, found '0'"),
        ({"ARGOSY_MEMORY": "8"}, "ARGOSY_MEMORY: '8' has no unit\nhint: write 8GiB, 8MiB, or 8B for bytes"),
        (
            {"ARGOSY_MEMROY": "1GiB"},
            "unknown environment variable ARGOSY_MEMROY; did you mean ARGOSY_MEMORY?",
        ),
        (
            {"ARGOSY_INSTRUCTION_SET": "sse9"},
            "ARGOSY_INSTRUCTION_SET: unknown instruction set 'sse9'; this processor has: plain",
        ),
        ({"ARGOSY_TUNE": "no"}, "ARGOSY_TUNE must be on or off, found 'no'"),
        (
            {"ARGOSY_ASK_AHEAD": "on"},
            "ARGOSY_ASK_AHEAD must be off or one_level or one_level_far or two_levels, found 'on'",
        ),
    ],
)
def test_an_invalid_environment_variable_is_named(environment: dict[str, str], sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_settings(environment)
    assert sentence in str(caught.value)


def test_tracebacks_are_off_unless_asked_for() -> None:
    assert [wants_traceback({"ARGOSY_TRACEBACK": value}) for value in ("", "0", "1", "yes")] == [
        False,
        False,
        True,
        True,
    ]
    assert not wants_traceback({})


def test_the_module_runs_as_the_command() -> None:
    done = run_module("show", "/nowhere", env={**os.environ})
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr == "error: /nowhere does not exist\n"


def test_commands_under_test_keep_nothing_in_the_home_of_a_developer(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    assert data_directory().is_relative_to(tmp_path_factory.getbasetemp())
