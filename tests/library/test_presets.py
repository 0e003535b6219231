"""Presets are kept in small files, checked as requests are; a Modelfile of Ollama's becomes one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from argosy.config import Preset, SamplingParams
from argosy.errors import CheckpointError, UsageError
from argosy.library import kept, modelfile, presets
from argosy.library.names import add_alias, base_of, is_name, look_up, preset_of
from tests.library.caches import GGUF, TINY, WEIGHTS, add_to_hub, add_to_ollama

EVERYTHING: dict[str, Any] = {
    "model": "Qwen/Qwen3-30B-A3B", "system": 'Say "\x7f é\n\t\\" 🙂', "temperature": 0.5, "top_k": 3, "top_p": 0.9,
    "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": -1.0, "frequency_penalty": 2.0, "context": 4096,
    "max_tokens": 5, "seed": 7, "stop": ("a\nb", '"'), "effort": "low",
    "messages": ({"role": "user", "content": "x"}, {"role": "assistant", "content": ""}),
}  # fmt: skip


def test_a_preset_is_read_as_it_was_written() -> None:
    preset = presets.made("all", **EVERYTHING)
    presets.save(preset)
    assert presets.find("all") == preset
    assert presets.path_of("all").stat().st_mode & 0o777 == 0o600
    plain = presets.made("plain", model="demo", thinks=False)
    presets.save(plain)
    assert presets.find_all() == ([preset, plain], [])
    presets.remove("all")
    assert presets.names() == ["plain"]
    with pytest.raises(UsageError, match="'all' is not a preset"):
        presets.remove("all")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("temprature = 1", "unknown setting 'temprature'; did you mean 'temperature'"),
        ("model = 1", "model must be text"),
        ("temperature = '1'", "temperature must be a number"),
        ("temperature = true", "temperature must be a number"),
        ("temperature = nan", "temperature must be from 0 to 100"),
        ("temperature = 101", "temperature must be from 0 to 100"),
        ("top-k = 1.5", "top-k must be a whole number"),
        ("top-p = 0", "top_p must be above 0"),
        ("seed = -1", "seed must be from 0"),
        ("context = 0", "context must be from 1"),
        ("max-tokens = -1", "max-tokens must be from 1"),
        ("think = 'yes'", "think must be true or false"),
        ("effort = 'huge'", "effort must be low, medium, high"),
        ("think = false\neffort = 'low'", "an effort needs thinking"),
        ("stop = 'a'", "stop must be a list of texts"),
        ("stop = ['']", "a stop string must hold at least one character"),
        (f"stop = {['a'] * 65}", "stop takes at most 64 texts"),
        (f"stop = ['{'a' * 1025}']", "of at most 1024 characters"),
        ("[[message]]\nrole = 'tool'\ncontent = ''", "message must be tables with a role"),
        ("[message]\nrole = 'user'\ncontent = ''", "message must be tables with a role"),
        ("seed = 1\nseed = 2", "it is not TOML"),
        (f"seed = {'[' * 5000}", "it is not TOML"),
        (f"seed = {'9' * 5000}", "it is not TOML"),
        (f"system = '{'a' * presets.MOST_BYTES}'", "more than 262144 bytes"),
    ],
)
def test_a_damaged_file_is_refused_with_what_is_wrong(text: str, told: str) -> None:
    path = presets.path_of("bad")
    path.parent.mkdir(parents=True)
    path.write_text(("" if text.startswith("model") else "model = 'demo'\n") + text)
    with pytest.raises(UsageError) as refused:
        presets.find("bad")
    assert told in refused.value.message
    assert refused.value.message.startswith(str(path))
    assert presets.find_all() == ([], [refused.value.message])
    presets.remove("bad")  # it can go


def test_no_link_is_followed_and_no_other_file_is_read(tmp_path: Path) -> None:
    place = presets.path_of("link")
    place.parent.mkdir(parents=True)
    (tmp_path / "other.toml").write_text("model = 'demo'\n")
    place.symlink_to(tmp_path / "other.toml")
    with pytest.raises(UsageError, match="symbolic link"):
        presets.find("link")
    presets.remove("link")
    assert (tmp_path / "other.toml").exists()
    presets.path_of("folder").mkdir()
    with pytest.raises(UsageError, match="cannot be read"):
        presets.find("folder")
    for name in ("../other", "a/b", "", ".", "demo", "x" * 65, "\0", "a\n"):
        assert presets.find(name) is None


def test_a_preset_is_found_by_name_and_means_its_model(hub: Path, tmp_path: Path) -> None:
    add_to_hub(hub, "Qwen/Qwen3-30B-A3B", TINY)
    presets.save(presets.made("coder", model="Qwen/Qwen3-30B-A3B", temperature=0.1))
    assert look_up("coder").name == "Qwen/Qwen3-30B-A3B"
    assert is_name("coder")
    assert preset_of("coder") == presets.find("coder")
    assert preset_of("Qwen/Qwen3-30B-A3B") is None
    Path("coder").mkdir()  # a path that exists wins
    assert preset_of("coder") is None
    assert look_up("coder").name is None
    presets.save(presets.made("gone", model="Qwen/away"))
    with pytest.raises(CheckpointError, match="the preset 'gone' stands for Qwen/away, which is not here"):
        look_up("gone")


def test_names_of_presets_models_and_aliases_differ(hub: Path, ollama: Path) -> None:
    add_to_hub(hub, "Qwen/Qwen3-30B-A3B", TINY)
    add_to_ollama(ollama, "qwen3:30b", {WEIGHTS: GGUF / "model.gguf"})
    add_alias("fast", "qwen3:30b")
    for name in ("fast", "qwen3-30b-a3b", "Qwen3-30B-A3B", "demo", "a/b", "", "x" * 65):
        with pytest.raises(UsageError):
            base_of(name, "qwen3:30b")
    assert base_of("coder", "a3b") == "Qwen/Qwen3-30B-A3B"
    assert base_of("coder", "fast") == "qwen3:30b"
    assert (
        base_of("coder", str(look_up("qwen3:30b").path)) == "qwen3:30b"
    )  # the path of a model in the library
    assert base_of("coder", str(GGUF / "model.gguf")) == str((GGUF / "model.gguf").resolve())
    presets.save(presets.made("coder", model="qwen3:30b"))
    with pytest.raises(UsageError, match="'coder' is a preset, and a preset needs a model"):
        base_of("other", "coder")
    with pytest.raises(UsageError, match="'coder' is the name of a preset already"):
        add_alias("coder", "fast")
    assert "coder" not in kept.read().aliases


def test_a_preset_fills_in_what_is_left_open() -> None:
    preset = presets.made("p", model="demo", temperature=0.5, max_tokens=9, seed=3, stop=("x",))
    asked = preset.fill_in(SamplingParams.asked({"temperature": 0, "seed": 0}))
    assert (asked.temperature, asked.seed, asked.max_tokens, asked.stop) == (0, 0, 9, ("x",))
    asked = preset.fill_in(SamplingParams.asked({"max_tokens": 1, "stop": ("y",)}))
    assert (asked.temperature, asked.seed, asked.max_tokens, asked.stop) == (0.5, 3, 1, ("y",))
    assert preset.fill_in(SamplingParams(max_tokens=None)).temperature == 0  # complete but for its limit


# ── Modelfiles ──────────────────────────────────────────────────────────────────────────────────────────────────────

MARIO = """FROM llama3.2
# sets the temperature to 1 [higher is more creative, lower is more coherent]
PARAMETER temperature 1
# sets the context window size to 4096
PARAMETER num_ctx 4096

# sets a custom system message
SYSTEM You are Mario from super mario bros, acting as an assistant.
"""
SHOWN = '''# Modelfile generated by "ollama show"
FROM llama3.2:latest
TEMPLATE """{{ if .System }}<|start_header_id|>system<|end_header_id|>

{{ .System }}<|eot_id|>{{ end }}"""
PARAMETER stop "<|start_header_id|>"
PARAMETER stop "<|eot_id|>"
LICENSE """
a licence
"""
REQUIRES 0.14.0
'''
EXAMPLES = """from llama3.2
message user Is Toronto in Canada?
MESSAGE assistant yes
MESSAGE user Is Sacramento in Canada?
MESSAGE assistant no
"""


def read(text: str, folder: Path | None = None) -> modelfile.Imported:
    return modelfile.read(text.encode(), Path() if folder is None else folder)


def test_modelfiles_of_ollamas_reference_are_read() -> None:
    found = read(MARIO)
    assert (found.model, found.notes) == ("llama3.2", [])
    assert found.fields == {
        "temperature": 1, "context": 4096, "system": "You are Mario from super mario bros, acting as an assistant.",
    }  # fmt: skip
    found = read(SHOWN)
    assert found.fields == {"stop": ("<|start_header_id|>", "<|eot_id|>")}
    assert [note.split()[0] for note in found.notes] == ["TEMPLATE", "LICENSE", "REQUIRES"]
    found = read(EXAMPLES)
    assert [message["content"] for message in found.fields["messages"]][1:3] == [
        "yes",
        "Is Sacramento in Canada?",
    ]


@pytest.mark.parametrize(
    ("line", "fields"),
    [
        ('SYSTEM """\nTwo\n\n  lines "\n"""', {"system": '\nTwo\n\n  lines "\n'}),
        ('SYSTEM "Two\n lines"', {"system": "Two\n lines"}),
        ('SYSTEM """one""" \t', {"system": "one"}),
        ('SYSTEM   say "no"   ', {"system": 'say "no"'}),
        ("SYSTEM a # b", {"system": "a # b"}),
        ('SYSTEM ""', {"system": None}),
        ("sYsTeM x\r\nPARAMETER\ttop_k  5\r", {"system": "x", "top_k": 5}),
        ("PARAMETER top_k -1", {"top_k": 0}),
        ("PARAMETER num_predict 42", {"max_tokens": 42}),
        ("PARAMETER num_predict -1", {"max_tokens": None}),
        ("PARAMETER seed -1", {"seed": None}),
        ("PARAMETER repeat_penalty 1.1", {"repetition_penalty": 1.1}),
        ("PARAMETER repeat_last_n -1", {}),
        ("PARAMETER stop AI assistant:", {"stop": ("AI assistant:",)}),
        ("PARAMETER min_p 0.05", {"min_p": 0.05}),
        ("PARAMETER think high", {"thinks": None, "effort": "high"}),
        ("PARAMETER think false", {"thinks": False, "effort": None}),
    ],
)
def test_an_instruction_is_read_as_ollama_reads_it(line: str, fields: dict[str, Any]) -> None:
    found = read(f"FROM x\n{line}")
    assert (found.fields, found.notes) == (fields, [])


@pytest.mark.parametrize(
    "name", ["num_gpu", "num_thread", "mirostat", "num_keep", "repeat_last_n", "draft_num_predict"]
)
def test_a_parameter_without_effect_is_noted(name: str) -> None:
    found = read(f"FROM x\nPARAMETER {name} 64")
    assert found.fields == {}
    assert found.notes[0].startswith(f"PARAMETER {name} has no effect: ")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "it has no FROM"),
        ("FROM", "line 1: FROM needs a value"),
        ("FROM x\nFROM y", "line 2: a second FROM"),
        ("FROM x\n\nADAPTER ./lora.gguf", "line 3: ADAPTER: adapters are not supported yet"),
        ("FROM x\nSISTEM y", "line 2: unknown instruction 'SISTEM'"),
        (
            "FROM x\nPARAMETER temprature 1",
            "line 2: unknown setting 'temprature'; did you mean 'temperature'",
        ),
        ("FROM x\nPARAMETER temperature hot", "line 2: temperature takes a number, found 'hot'"),
        ("FROM x\nPARAMETER temperature nan", "line 2: temperature takes a number"),
        ("FROM x\nPARAMETER top_k 1.5", "line 2: top_k takes a whole number"),
        (f"FROM x\nPARAMETER seed {'9' * 5000}", "line 2: seed takes a whole number"),
        ("FROM x\nMESSAGE tool hi", "line 2: a message is of system, user, assistant"),
        ('FROM x\nSYSTEM """a\nb', 'line 2: the text that begins with """ has no end'),
        ('FROM x\nSYSTEM """"', 'line 2: the text that begins with """ has no end'),
        ("FROM x\n\udcff", "it is not UTF-8 text"),
        ("x" * (modelfile.MOST_BYTES + 1), "it has more than 1048576 bytes"),
    ],
)
def test_a_modelfile_that_a_preset_cannot_be_is_refused_with_its_line(text: str, told: str) -> None:
    with pytest.raises(UsageError) as refused:
        modelfile.read(text.encode(errors="surrogateescape"), Path())
    assert told in refused.value.message


def test_a_path_is_relative_to_the_modelfile_and_utf_16_is_read(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    assert read("FROM ./model.gguf", tmp_path).model == str(tmp_path / "model.gguf")
    assert read("FROM ./away.gguf", tmp_path).model == "./away.gguf"
    assert read(f"FROM {'x' * 5000}", tmp_path).model == "x" * 5000
    assert modelfile.read("FROM x\r\nSYSTEM é".encode("utf-16"), tmp_path).fields == {"system": "é"}


def test_a_preset_that_is_written_as_a_modelfile_is_read_back() -> None:
    preset = presets.made("all", **EVERYTHING)
    found = read(modelfile.written(preset, preset.model))
    assert presets.made("all", model=found.model, **found.fields) == preset
    thinks = Preset(name="p", model="m", thinks=True)
    assert presets.made("p", model="m", **read(modelfile.written(thinks, "m")).fields) == thinks
    for text in ("", "a", '"', '""', '"""', 'a"""', ' """ b', "# x", " x ", "a\n\nb"):
        assert modelfile.fits(text), text
    for text in ('a"""\nb', '"""\n', "a\r"):
        assert not modelfile.fits(text), text
