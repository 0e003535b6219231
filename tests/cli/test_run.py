"""`argosy run`, `show` and `upcycle`: what reaches the engine, and what goes to stdout and stderr."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO
from unittest.mock import ANY

import pytest

from argosy.cli.main import main
from argosy.cli.shared import answer_writer
from argosy.cli.shared.output import FencedCode, write_file, write_text
from argosy.config import CHOOSING, SamplingParams
from argosy.errors import UsageError
from argosy.machine.resources import MemoryLimit
from argosy.prompt.prompt import Prompt
from tests.cli.fake_engine import FakeEngine
from tests.helpers.forks import Forked

Engine = type[FakeEngine]
Captured = pytest.CaptureFixture[str]


def test_the_answer_goes_to_stdout_and_its_ledger_to_stderr(engine: Engine, capsys: Captured) -> None:
    assert main(["run", "-m", "model", "Capital of France?"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "Paris is it.\n"
    assert captured.err == (
        "tokens   7 prompt, 3 new, stop\n"
        "speed    4.0 tok/s decode, 14.0 tok/s prefill, first token after 0.50 s\n"
        "experts  hit rate 0.60 (6 of 10), 2.50 GB read\n"
        "memory   peak 280 MiB, planned 300 MiB\n"
        "  dense weights          200 MiB\n"
        "  expert cache           100 MiB   60 of 240 experts (25 %)\n"
        "time     1.000 s\n"
        "  router                   0.250 s\n"
        "  expert compute           0.750 s\n"
    )


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (["Why", "is", "the", "sky", "blue?"], "Why is the sky blue?"),
        (["-m", "model", "Why", "is", "-n", "5", "it", "-q", "so?"], "Why is it so?"),
        (["two  spaces", "stay"], "two  spaces stay"),
        (["--", "what", "does", "ls", "-l", "print?"], "what does ls -l print?"),
        (["-m", "demo", "demo"], "demo"),
        (["demo mode"], "demo mode"),
        (["compare", "demo", "-", "and", "others"], "compare demo - and others"),
    ],
)
def test_the_words_of_a_prompt_need_no_quotes(arguments: list[str], asked: str, engine: Engine) -> None:
    assert main(["run", *arguments]) == 0
    assert engine.asked == [asked]


def test_a_word_that_is_a_file_is_said_to_be_text(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("cat.jpg", "notes"):
        (tmp_path / name).touch()
    assert main(["run", "-q", "describe", "cat.jpg", "and", "notes", "and", "dog.jpg"]) == 0
    assert capsys.readouterr().err == (
        "note: the model sees the name cat.jpg, not the file; -f, --image, --audio or --video shows a file\n"
    )


def test_quiet_prints_the_answer_alone(engine: Engine, capsys: Captured) -> None:
    assert main(["run", "-m", "model", "-q", "Hi"]) == 0
    assert capsys.readouterr().err == ""


def test_text_is_shown_as_it_comes(engine: Engine, capsys: Captured) -> None:
    seen = []
    engine.before_token = staticmethod(lambda at: seen.append(capsys.readouterr().out))
    main(["run", "-m", "model", "Hi"])
    assert seen == ["", "Paris", " is"]


def test_json_has_text_ids_reason_usage_seed_and_ledger(engine: Engine, capsys: Captured) -> None:
    assert main(["run", "-m", "model", "--json", "Hi"]) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert captured.err == ""
    assert facts["text"] == "Paris is it."
    assert facts["token_ids"] == [0, 1, 2]
    assert facts["finish_reason"] == "stop"
    assert facts["usage"] == {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    assert facts["seed"] == 9
    assert facts["hears"] == "none"
    assert facts["ledger"]["hit_rate"] == 0.6
    assert facts["plan"]["total_bytes"] == 300 << 20


def test_options_reach_the_engine_and_the_sampler(
    engine: Engine, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARGOSY_THREADS", "2")
    engine_words = "--memory 1GiB --context 64 --kv f16 --instruction-set avx2"
    truncation = "-n 9 -t 0.5 --top-k 3 --top-p 0.9 --min-p 0.1 --seed 0 --stop a --logprobs 0 --ignore-eos"
    penalties = "--repetition-penalty 1.1 --presence-penalty 0.2 --frequency-penalty -0.3 --logit-bias 5=-100"
    words = f"run -m model {engine_words} {truncation} {penalties}".split()
    assert main([*words, "--stop", " b", "Hi"]) == 0
    assert engine.opened == [
        {
            "model": "model",
            "memory": "1GiB",
            "threads": 2,
            "context": 64,
            "kv_dtype": "f16",
            "instruction_set": "avx2",
            "media": False,
        }
    ]
    assert engine.params == [
        SamplingParams(
            max_tokens=9, temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.1, presence_penalty=0.2,
            frequency_penalty=-0.3, seed=0, stop=("a", " b"), logit_bias={5: -100.0}, logprobs=0, ignore_eos=True,
        )
    ]  # fmt: skip


def test_without_options_the_model_decides_and_the_answer_may_fill_the_context(
    engine: Engine, capsys: Captured
) -> None:
    main(["run", "-m", "model", "Hi"])
    assert engine.opened == [{"model": "model", "media": False}]  # no memory for media that are not there
    assert engine.params == [SamplingParams(max_tokens=None, left_to_model=frozenset(CHOOSING))]
    assert engine.asked == ["Hi"]


def test_a_plan_beyond_the_free_memory_is_said_and_run(
    engine: Engine, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    for free_mib, is_said in ((200, True), (400, False)):
        limit = MemoryLimit(1 << 30, free_mib << 20, "a test")
        monkeypatch.setattr("argosy.machine.resources.memory_limit", lambda limit=limit: limit)
        assert main(["run", "-q", "-m", "model", "Hi"]) == 0
        printed = capsys.readouterr()
        assert printed.out == "Paris is it.\n"
        assert ("note: the memory plan takes 300 MiB, and there are 200 MiB free" in printed.err) == is_said
        assert ("`--memory 175MiB` is what is free, less a margin" in printed.err) == is_said


def test_raw_text_and_a_system_message_reach_the_engine_as_such(engine: Engine, capsys: Captured) -> None:
    main(["run", "-m", "model", "--raw", "Once"])
    main(["run", "-m", "model", "--system", "Be brief.", "Hi"])
    assert engine.asked == [
        Prompt.raw("Once"),
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    ]


@pytest.mark.parametrize(
    ("text", "prompt"), [("Hello\n", "Hello"), ("two\nlines\n\n", "two\nlines\n"), ("no end", "no end")]
)
def test_the_prompt_may_come_on_stdin(
    text: str, prompt: str, engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    for arguments in ([], ["-"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        assert main(["run", "-m", "model", *arguments]) == 0
    assert engine.asked == [prompt, prompt]


def test_a_missing_or_unreadable_prompt_is_an_error(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(["run", "-m", "model"]) == 2
    assert "stdin is empty" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff"), encoding="utf-8"))
    assert main(["run", "-m", "model"]) == 2
    assert "not UTF-8" in capsys.readouterr().err
    terminal = io.StringIO("")
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", terminal)
    assert main(["run", "-m", "model"]) == 2
    assert "run needs a prompt" in capsys.readouterr().err
    assert engine.opened == []


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes], None]]:
    """Put bytes on stdin, as a pipe does."""
    opened: list[TextIO] = []

    def put(data: bytes) -> None:
        end, start = os.pipe()
        os.write(start, data)
        os.close(start)
        opened.append(os.fdopen(end, encoding="utf-8"))
        monkeypatch.setattr(sys, "stdin", opened[-1])

    yield put
    for file in opened:
        file.close()


Pipe = Callable[[bytes], None]


def test_files_and_stdin_come_before_the_prompt(
    engine: Engine, pipe: Pipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.py").write_bytes(b"\xef\xbb\xbfx = 1\r\ny = 2\r\n")
    Path("b.txt").write_text("two\n")
    files = ["-f", "a.py", "--file", "b.txt"]
    for data, arguments, prompt in (
        (b"one\n", ["Sum up."], "one\n\nSum up."),
        (b"", ["Sum up."], "Sum up."),
        (b"", [*files, "Sum up."], "a.py:\nx = 1\ny = 2\n\nb.txt:\ntwo\n\nSum up."),
        (b"one\n", [*files, "Sum up."], "one\n\na.py:\nx = 1\ny = 2\n\nb.txt:\ntwo\n\nSum up."),
        (b"one\n", ["-f", "b.txt", "-f", "-", "Sum up."], "b.txt:\ntwo\n\none\n\nSum up."),
        (b"Sum up.\n", ["-f", "b.txt"], "b.txt:\ntwo\n\nSum up."),
        (b"Sum up.\n", ["-f", "b.txt", "-"], "b.txt:\ntwo\n\nSum up."),
        (b"", ["-f", "b.txt"], "two"),
    ):
        pipe(data)
        assert main(["run", "-m", "model", *arguments]) == 0
        assert engine.asked.pop() == prompt
    pipe(b"")
    assert main(["run", "-m", "model", "--raw", "-f", "a.py", "-f", "b.txt", "z"]) == 0
    assert engine.asked.pop() == Prompt.raw("x = 1\ny = 2\ntwo\nz")


def test_a_program_that_keeps_its_pipe_open_is_told_what_is_waited_for(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr("argosy.cli.shared.texts._PATIENCE_S", 0.01)
    end, start = os.pipe()
    said: list[str] = []

    def close_later() -> None:
        deadline = time.monotonic() + 10
        while (not said or not said[-1].endswith("\n")) and time.monotonic() < deadline:
            time.sleep(0.01)
            said.append("".join(said[-1:]) + capsys.readouterr().err)
        os.close(start)

    closing = threading.Thread(target=close_later)
    with os.fdopen(end) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        closing.start()
        assert main(["run", "-q", "-m", "model", "Hi"]) == 0
        closing.join()
    assert said[-1] == "note: waiting for text on stdin; `< /dev/null` answers without it\n"
    assert engine.asked == ["Hi"]


@pytest.mark.parametrize("name", ["/dev/null", "closed"])
def test_nothing_on_stdin_is_no_text(name: str, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(os.devnull) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin if name == "/dev/null" else None)
        assert main(["run", "-m", "model", "Hi"]) == 0
    assert engine.asked == ["Hi"]


def test_a_text_that_cannot_be_read_is_named_before_a_model_opens(
    engine: Engine, pipe: Pipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("argosy.cli.shared.texts.MOST_BYTES", 20)
    Path("large.txt").write_text("x" * 12)
    Path("binary").write_bytes(b"ab\xff")
    for arguments, sentence in (
        (["-f", "nowhere.txt", "Hi"], "nowhere.txt cannot be read: No such file or directory"),
        (["-f", ".", "Hi"], ". cannot be read: Is a directory"),
        (["-f", "binary", "Hi"], "binary is not UTF-8 text: invalid start byte at byte 2"),
        (
            ["-f", "/dev/zero", "Hi"],
            "/dev/zero is too long: the texts of a prompt may have 20 bytes together",
        ),
        (["-f", "large.txt", "-f", "large.txt", "Hi"], "it has more than the 8 that are left"),
        (["-f", "/dev/null"], "run needs a prompt, and what it was given is empty"),
        ([""], "run needs a prompt, and what it was given is empty"),
        (["-f", "-", "-"], "stdin can be read only once, but - occurs 2 times"),
        (["--system", "@nowhere.txt", "Hi"], "nowhere.txt cannot be read"),
    ):
        pipe(b"")
        assert main(["run", "-m", "model", *arguments]) == 2
        assert sentence in capsys.readouterr().err
    pipe(b"x" * 21)
    assert main(["run", "-m", "model", "Hi"]) == 2
    assert "the text on stdin is too long" in capsys.readouterr().err
    assert engine.opened == []


def test_a_system_message_may_come_from_a_file(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "system.txt").write_text("Be brief.\n")
    assert main(["run", "-m", "model", "--system", f"@{tmp_path}/system.txt", "Hi"]) == 0
    assert engine.asked[0][0] == {"role": "system", "content": "Be brief."}


# JSON


SCHEMA = {
    "type": "object",
    "description": "left out of the grammar",
    "properties": {"name": {"type": "string"}},
    "required": ["name"],
}


def test_a_schema_reaches_the_sampler_as_the_grammar_of_the_answer(
    engine: Engine, tmp_path: Path, capsys: Captured
) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    assert main(["run", "-m", "model", "--json-schema", str(schema), "Hi"]) == 0
    assert engine.opened[0]["grammars"] is True
    grammar = engine.params[0].grammar
    assert grammar is not None
    assert '"required": ["name"]' in grammar.text
    assert "left out" not in grammar.text
    assert not grammar.is_lenient
    assert main(["run", "-m", "model", "Hi"]) == 0
    assert engine.params[1].grammar is None


def test_a_schema_may_come_on_stdin_which_is_read_only_once(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(SCHEMA)))
    assert main(["run", "-m", "model", "--json-schema", "-", "Hi"]) == 0
    grammar = engine.params[0].grammar
    assert grammar is not None
    assert '"required": ["name"]' in grammar.text
    for more in (["-f", "-", "Hi"], ["-"]):
        assert main(["run", "-m", "model", "--json-schema", "-", *more]) == 2
        assert "stdin can be read only once" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.StringIO("[]"))
    assert main(["run", "-m", "model", "--json-schema", "-", "Hi"]) == 2
    assert "-: a JSON schema is an object, found list" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"{", "is not JSON"),
        (b"[]", "a JSON schema is an object, found list"),
        (b'{"type": "string", "type": "number"}', "duplicate key"),
        (b'{"a": ' * 100_000, "JSON"),
        (
            b'{"type": "string", "pattern": "' + b"a" * 2000 + b'"}',
            "a regular expression has 2000 characters",
        ),
        (b'{"enum": ["' + b"a" * 200_000 + b'"]}', "the grammar has 200014 characters"),
        (b" " * (1 << 21), "is too long"),
    ],
)
def test_a_hostile_schema_is_refused_before_a_model_opens(
    content: bytes, sentence: str, engine: Engine, tmp_path: Path, capsys: Captured
) -> None:
    schema = tmp_path / "schema.json"
    schema.write_bytes(content)
    assert main(["run", "-m", "model", "--json-schema", str(schema), "Hi"]) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert captured.out == ""
    assert engine.opened == []


@pytest.mark.parametrize("raw", [[], ["--raw"]])
def test_a_real_answer_follows_its_schema_or_says_that_it_was_cut_off(
    raw: list[str], chat_model: Path, tmp_path: Path, capsys: Captured
) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "array", "items": {"enum": [1, 22]}, "minItems": 2, "maxItems": 3}')
    command = ["run", "-m", str(chat_model), "--threads", "1", "--json-schema", str(schema), "-t", "0"]
    command += [*raw, "Count."]
    assert main([*command, "-n", "200"]) == 0
    assert set(json.loads(capsys.readouterr().out)) <= {1, 22}
    assert main([*command, "-n", "2"]) == 2
    captured = capsys.readouterr()
    assert "the answer was cut off after 2 tokens, before its JSON was complete\nhint: allow" in captured.err
    with pytest.raises(json.JSONDecodeError):
        json.loads(captured.out)


def test_a_keyword_that_cannot_be_enforced_is_an_error(
    chat_model: Path, tmp_path: Path, capsys: Captured
) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "array", "uniqueItems": true}')
    assert main(["run", "-m", str(chat_model), "--threads", "1", "--json-schema", str(schema), "Hi"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "uniqueItems" in captured.err


def test_code_between_fences_has_a_colour_and_fences_are_dim() -> None:
    text = "Use\n```py\nx = `1`\n``` no\n   ````\nand ``` here\n~~~\ny\n```\n~~~"
    dim, plain, code, text_again = "\x1b[2m", "\x1b[22m", "\x1b[36m", "\x1b[39m"
    marked = (
        f"Use\n{dim}```py\n{plain}{code}x = `1`\n``` no\n{text_again}{dim}   ````\n{plain}and ``` here\n"
        f"{dim}~~~\n{plain}{code}y\n```\n{text_again}{dim}~~~{plain}"
    )
    for size in (1, 2, 5, len(text)):
        fences = FencedCode()
        pieces = [fences.push(text[at : at + size]) for at in range(0, len(text), size)]
        assert "".join(pieces) + fences.finish() == marked
    cut = FencedCode()
    assert cut.push("```\nx") + cut.finish() == f"{dim}```\n{plain}{code}x{text_again}"
    assert FencedCode().push("plain") == "plain"  # nothing waits that is no fence


def test_without_a_model_the_demo_model_answers(engine: Engine) -> None:
    for arguments in ([], ["-m", "demo"]):
        assert main(["run", *arguments, "Hi"]) == 0
        assert engine.opened.pop() == {"model": "demo", "media": False}


def test_a_models_text_cannot_send_escape_sequences_to_a_terminal() -> None:
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        write_text("a\x1b[2J\x9bb\tc\n\r\u202ed\u2066", stream)
    assert terminal.getvalue() == "a\ufffd[2J\ufffdb\tc\n\ufffd\ufffdd\ufffd"
    assert file.getvalue() == "a\x1b[2J\x9bb\tc\n\r\u202ed\u2066"


HARMONY = ("<|channel|>", "analysis", "<|message|>", "User says", " hi", "<|end|>", "<|start|>", "assistant",
           "<|channel|>", "final", "<|message|>", "Hello", "!", "<|return|>")  # fmt: skip


def test_thoughts_and_control_tokens_are_not_part_of_the_answer(engine: Engine, capsys: Captured) -> None:
    engine.family, engine.answer = "harmony", HARMONY
    assert main(["run", "-m", "model", "-q", "Hi"]) == 0
    assert capsys.readouterr() == ("Hello!\n", "")

    assert main(["run", "-m", "model", "-q", "--thoughts", "Hi"]) == 0
    assert capsys.readouterr() == ("Hello!\n", "thinking: User says hi\n\n")

    assert main(["run", "-m", "model", "--json", "Hi"]) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert (facts["text"], facts["reasoning"]) == ("Hello!", "User says hi")
    assert captured.err == ""


def test_an_answer_that_ends_while_thinking_shows_only_its_thoughts(engine: Engine, capsys: Captured) -> None:
    engine.family, engine.answer = "qwen3", ("<think>", "Let me ", "see")
    assert main(["run", "-m", "model", "-q", "--thoughts", "Hi"]) == 0
    assert capsys.readouterr() == ("\n", "thinking: Let me see\n\n")


@pytest.mark.parametrize(
    ("family", "options", "ending"),
    [
        ("qwen3", ["--no-think"], "<think>\n\n</think>\n\n"),
        ("qwen3", ["--think"], "<|im_start|>assistant\n"),
        ("deepseek_v31", ["--think"], "<think>"),
        ("deepseek_v31", ["--no-think"], "</think>"),
    ],
)
def test_the_model_is_told_whether_to_think(
    engine: Engine, capsys: Captured, family: str, options: list[str], ending: str
) -> None:
    engine.family = family
    assert main(["run", "-m", "model", "-q", *options, "Hi"]) == 0
    assert engine.prompts.built[-1].text.endswith(ending)
    assert capsys.readouterr().err == ""


def test_the_model_is_told_how_much_to_think(engine: Engine, capsys: Captured) -> None:
    engine.family, engine.answer = "harmony", HARMONY
    assert main(["run", "-m", "model", "-q", "--effort", "high", "Hi"]) == 0
    assert "Reasoning: high" in engine.prompts.built[-1].text
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("family", "option", "why"),
    [
        (
            "chatml",
            ["--no-think"],
            "cannot be told whether to think: its chat template has no switch for that",
        ),
        ("harmony", ["--no-think"], "can be told how much to think (--effort low), but not whether to"),
        ("glm", ["--effort", "low"], "knows no effort, so 'low' only tells it to think"),
    ],
)
def test_a_model_that_cannot_be_told_says_so_and_answers(
    engine: Engine, capsys: Captured, family: str, option: list[str], why: str
) -> None:
    engine.family = family
    assert main(["run", "-m", "model", "-q", *option, "Hi"]) == 0
    assert capsys.readouterr().err == f"note: this model {why}\n"


@pytest.mark.parametrize(
    "options", [["--raw", "--think"], ["--raw", "--effort", "low"], ["--no-think", "--effort", "low"]]
)
def test_options_of_thinking_that_contradict_others_are_refused(
    engine: Engine, capsys: Captured, options: list[str]
) -> None:
    assert main(["run", "-m", "model", *options, "Hi"]) == 2
    assert "exclude" in capsys.readouterr().err
    assert engine.opened == []


def test_an_answer_that_a_limit_cuts_is_noted(engine: Engine, capsys: Captured) -> None:
    engine.ends = "length"
    assert main(["run", "-m", "model", "-q", "-n", "3", "Hi"]) == 0
    assert capsys.readouterr() == (
        "Paris is it.\n", "note: the answer was cut off after 3 tokens; allow more with -n\n"
    )  # fmt: skip
    engine.answer = ["word "] * 249
    assert main(["run", "-m", "model", "-q", "Hi"]) == 0
    assert "the context of 256 tokens is full: a larger --context allows more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "way"),
    [("qwen3", "allow more with -n, or use --no-think"), ("minimax_m2", "allow more with -n\n")],
)
def test_a_limit_that_cuts_thoughts_before_any_answer_is_an_error(
    engine: Engine, capsys: Captured, family: str, way: str
) -> None:
    engine.family, engine.answer, engine.ends = family, ("<think>", "Let me ", "see"), "length"
    assert main(["run", "-m", "model", "-q", "-n", "3", "Hi"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "\n"
    assert "error: all 3 tokens went into thoughts, so there is no answer\nhint: " + way in captured.err


def test_minus_one_is_no_limit_as_in_other_programs(engine: Engine, capsys: Captured) -> None:
    assert main(["run", "-m", "model", "-n", "-1", "Hi"]) == 0
    assert engine.params[0].max_tokens is None


def test_the_continuation_of_raw_text_is_shown_unparsed(engine: Engine, capsys: Captured) -> None:
    engine.family, engine.answer = "qwen3", ("<think>", " is a", "</think>", " mark")
    assert main(["run", "-m", "model", "-q", "--raw", "The tag"]) == 0
    assert capsys.readouterr().out == "<think> is a</think> mark\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("no_color", "shown"),
    [
        ("", "\x1b[2mthinking: User says hi\x1b[22m\n\n"),
        ("1", "thinking: User says hi\n\n"),
    ],
)
def test_thoughts_are_dim_on_a_terminal(
    no_color: str, shown: str, engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    engine.family, engine.answer = "harmony", HARMONY
    monkeypatch.setenv("NO_COLOR", no_color)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr("argosy.cli.shared.output.progress_bar", contextlib.nullcontext)
    assert main(["run", "-m", "model", "-q", "Hi"]) == 0
    assert terminal.getvalue() == shown
    assert main(["run", "-m", "model", "-q", "--no-thoughts", "Hi"]) == 0
    assert terminal.getvalue() == shown
    assert capsys.readouterr().out == "Hello!\nHello!\n"


def test_an_interrupted_thought_leaves_the_terminal_as_it_was(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(at: int) -> None:
        if at == 4:
            raise KeyboardInterrupt

    engine.family, engine.answer, engine.before_token = "harmony", HARMONY, staticmethod(interrupt)
    monkeypatch.setattr("argosy.cli.shared.output.progress_bar", contextlib.nullcontext)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(["run", "-m", "model", "Hi"]) == 130
    assert terminal.getvalue() == "\x1b[2mthinking: User says\x1b[22m\n\n\ninterrupted\n"


# With a real engine


def test_a_real_model_answers_the_same_streamed_and_as_json(chat_model: Path, capsys: Captured) -> None:
    common = ["-m", str(chat_model), "--threads", "1", "-n", "12", "-t", "0", "Hello <|im_end|>"]
    assert main(["run", *common]) == 0
    streamed = capsys.readouterr()
    assert main(["run", "--json", *common]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert streamed.out.removesuffix("\n") == facts["text"].removesuffix("\n")
    assert facts["usage"]["completion_tokens"] == len(facts["token_ids"]) <= 12
    assert sum(facts["ledger"]["parts"].values()) == pytest.approx(
        facts["ledger"]["wall_s"], rel=0.02, abs=1e-3
    )
    assert "expert cache" in streamed.err
    assert "attention and dense" in streamed.err
    assert "encoding" not in streamed.err  # a text has nothing to encode


@pytest.mark.parametrize(
    ("said", "explicit"),
    [({"do_sample": False}, ["-t", "0"]), ({"temperature": 1.4, "top_k": 9}, ["-t", "1.4", "--top-k", "9"])],
)
def test_a_checkpoints_own_sampling_is_that_of_an_answer(
    said: dict[str, object], explicit: list[str], chat_model: Path, tmp_path: Path, capsys: Captured
) -> None:
    texts = []
    for name, content in (("own", said), ("other", {"temperature": 0.5, "top_k": 0, "do_sample": True})):
        model = tmp_path / name
        model.mkdir()
        for file in chat_model.iterdir():
            (model / file.name).symlink_to(file)
        (model / "generation_config.json").write_text(json.dumps(content))
        options = ["--threads", "1", "-n", "12", "--seed", "3", "-q", *(explicit if name == "other" else ())]
        assert main(["run", "-m", str(model), *options, "Hi"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_logprobs_are_in_the_json(chat_model: Path, capsys: Captured) -> None:
    command = [
        "run",
        "-m",
        str(chat_model),
        "--threads",
        "1",
        "-n",
        "2",
        "-t",
        "0",
        "--logprobs",
        "3",
        "--json",
    ]
    assert main([*command, "Hi"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [entry["token_id"] for entry in facts["logprobs"]] == facts["token_ids"]
    assert all(entry["top"][0]["token_id"] == entry["token_id"] for entry in facts["logprobs"])  # greedy
    assert all(len(entry["top"]) == 3 for entry in facts["logprobs"])


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(
    chat_model: Path, capsys: Captured
) -> None:
    assert main(["run", "-m", str(chat_model), "--context", "64", "word " * 100]) == 2
    assert "and the context holds 64" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "chat", "serve", "show"])
def test_a_context_longer_than_the_models_is_refused_with_both_numbers(
    command: str, chat_model: Path, capsys: Captured
) -> None:
    model = ["-m", str(chat_model), "Hi"] if command == "run" else [str(chat_model)]
    assert main([command, *model, "--context", "100000"]) == 2
    said = capsys.readouterr().err
    assert "a context of 100000 tokens was requested, and the model supports 256" in said
    assert "hint: `--context 256` is the longest" in said


def test_show_also_refuses_too_long_a_context_for_a_config_without_weights(
    chat_model: Path, tmp_path: Path, capsys: Captured
) -> None:
    config = tmp_path / "config.json"
    config.write_bytes((chat_model / "config.json").read_bytes())
    assert main(["show", str(config), "--context", "256"]) == 0
    assert main(["show", str(config), "--context", "257"]) == 2
    assert "a context of 257 tokens was requested, and the model supports 256" in capsys.readouterr().err


def answer_slowly(*arguments: str) -> int:
    """Pause after each write, so that the answer does not end before a signal arrives."""
    write = answer_writer.write_text

    def slowly(*given: Any, **more: Any) -> None:
        write(*given, **more)
        time.sleep(0.2)

    answer_writer.write_text = slowly
    return main(["run", *arguments])


def test_interrupting_a_process_exits_130(chat_model: Path) -> None:
    process = Forked[bytes](
        [answer_slowly, "-m", chat_model, "--threads", "1", "-n", "200", "--ignore-eos", "Hi"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == b"\ninterrupted\n"


# show


def test_show_prints_family_geometry_and_plan(chat_model: Path, capsys: Captured) -> None:
    assert main(["show", str(chat_model), "--memory", "4GiB"]) == 0
    out = capsys.readouterr().out
    assert "qwen3_moe, safetensors files, experts bf16" in out
    assert "6 per layer, 2 per token, width 24" in out
    assert "fits      yes, " in out
    assert " of 4.0 GiB" in out
    assert "18 of 18 experts (100 %)" in out
    assert main(["show", str(chat_model), "--memory", "4GiB", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["fits"] is True
    assert facts["plan"]["budget_bytes"] == 4 << 30
    assert facts["num_parameters"] > facts["num_parameters_per_token"]
    assert facts["num_experts"] == 6


def test_showing_a_model_that_does_not_fit_exits_3_and_names_a_budget_that_works(
    chat_model: Path, capsys: Captured
) -> None:
    assert main(["show", str(chat_model), "--memory", "2MiB"]) == 3
    captured = capsys.readouterr()
    assert captured.out.endswith("fits      no\n")
    assert "MiB` works" in captured.err
    assert main(["show", str(chat_model), "--memory", "2MiB", "--json"]) == 3
    facts = json.loads(capsys.readouterr().out)
    assert facts["fits"] is False
    assert facts["plan"]["total_bytes"] > 2 << 20


def test_showing_a_directory_without_a_model_exits_4(tmp_path: Path, capsys: Captured) -> None:
    assert main(["show", str(tmp_path)]) == 4
    assert "holds no model" in capsys.readouterr().err


# upcycle


def test_upcycle_passes_its_options_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    asked: list[object] = []

    def upcycle(dense: Path, destination: Path, **options: object) -> Path:
        asked.append((dense, destination, options))
        return destination

    monkeypatch.setattr("argosy.checkpoint.upcycle.upcycle", upcycle)
    monkeypatch.chdir(tmp_path)
    Path("dense").mkdir()
    assert (
        main(["upcycle", "dense", "dst", "--experts", "4", "--experts-per-token", "1", "--width", "32"]) == 0
    )
    expected = {"num_experts": 4, "experts_per_token": 1, "width": 32, "seed": 0, "progress": ANY}
    assert asked == [(Path("dense"), Path("dst"), expected)]
    assert capsys.readouterr().out == "dst\n"


QWEN3_30B = {
    "model_type": "qwen3_moe",
    "head_dim": 128,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40_960,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rope_theta": 1e6,
    "vocab_size": 151_936,
}


def test_showing_a_config_without_weights_estimates_their_size(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B))
    for path in (tmp_path, tmp_path / "config.json"):
        assert main(["show", str(path)]) == 0
        printed = capsys.readouterr().out
        for words in (
            "without weights",
            "30.5 B, 3.35 B active per token",
            "bf16 2.9 GiB + 54.0 GiB",
            "KV cache      96.0 KiB per token, 192 KiB with --kv f32, 51.0 KiB with --kv q8",
        ):
            assert words in printed
    assert main(["show", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["bytes"]["bf16"]["expert_bytes"] == 48 * 128 * 3 * 2048 * 768 * 2
    per_token = 48 * 2 * 4 * 128
    assert facts["kv_bytes_per_token"] == {
        "f32": 4 * per_token,
        "f16": 2 * per_token,
        "q8": per_token * 34 // 32,
    }

    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B | {"model_type": "qwen9"}))
    assert main(["show", str(tmp_path)]) == 4
    assert "asks for model_type 'qwen9'; supported: qwen3, " in capsys.readouterr().err

    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B | {"vocab_size": 2**31 - 1}))
    assert main(["show", str(tmp_path)]) == 4
    assert "a matrix of 2147483647 x 2048 is too large" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_an_error_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"picture\.svg cannot be written: No such file or directory"):
        write_file(tmp_path / "nowhere" / "picture.svg", "<svg/>")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="pipe cannot be written: nothing reads this pipe"):
        write_file(tmp_path / "pipe", "<svg/>")
    write_file(tmp_path / "picture.svg", "<svg/>")
    assert (tmp_path / "picture.svg").read_text("utf-8") == "<svg/>"
