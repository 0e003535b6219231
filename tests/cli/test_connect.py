"""`argosy connect`: golden settings for each client, hidden keys, and edits that keep the rest of a file."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from argosy.cli.commands.connect import CLIENTS
from argosy.cli.main import main
from tests.serve.fake_server import FakeServer, fake_server, stranger

Captured = pytest.CaptureFixture[str]

GOLDEN = Path(__file__).with_name("golden")
KEY = "sk-argosy-0123456789"
FILES = {
    "claude-code": ".claude/settings.json",
    "codex": ".codex/config.toml",
    "opencode": ".config/opencode/opencode.json",
    "openwebui": "open-webui.env",
    "ollama": "ollama.env",
    "continue": ".continue/config.yaml",
    "zed": ".config/zed/settings.json",
    "aider": "aider.env",
    "llm": ".config/io.datasette.llm/extra-openai-models.yaml",
}
FORMS = ("cline", "roo", "jan")


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with fake_server() as server:
        yield server


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in (
        "CLAUDE_CONFIG_DIR",
        "CODEX_HOME",
        "XDG_CONFIG_HOME",
        "CONTINUE_GLOBAL_DIR",
        "LLM_USER_PATH",
    ):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.parametrize("client", CLIENTS)
def test_the_printed_settings_of_each_client_match_its_golden_file(
    client: str, server: FakeServer, home: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = KEY
    monkeypatch.setenv("ARGOSY_API_KEY", KEY)
    assert main(["connect", client, "--url", server.url]) == 0
    said = capsys.readouterr()
    text = said.out + "\nstderr:\n" + said.err
    assert KEY not in text
    text = text.replace(server.url, "http://127.0.0.1:8080").replace(str(home), "/home/someone")
    text = text.replace(f"docker.internal:{server.url.rpartition(':')[2]}", "docker.internal:8080")
    golden = GOLDEN / f"connect-{client}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")


@pytest.mark.parametrize("client", ["claude-code", "openwebui", "ollama", "aider"])
def test_a_shell_can_run_the_settings_meant_for_a_shell(
    client: str, server: FakeServer, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARGOSY_API_KEY", KEY)
    assert main(["connect", client, "--url", server.url]) == 0
    script = f"{capsys.readouterr().out}\nenv"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert f"={KEY}\n" in done.stdout
    assert re.search(rf"(OLLAMA_HOST|BASE(_URL)?)={server.url}", done.stdout)


@pytest.mark.parametrize("client", CLIENTS)
def test_a_key_is_printed_only_when_asked_for(
    client: str, server: FakeServer, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARGOSY_API_KEY", KEY)
    assert main(["connect", client, "--url", server.url, "--show-key"]) == 0
    # These always read it from the variable.
    assert (KEY in capsys.readouterr().out) == (client not in ("codex", "zed", "llm"))


@pytest.mark.parametrize("client", FILES)
def test_written_files_hold_the_settings_and_writing_again_changes_nothing(
    client: str, server: FakeServer, home: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARGOSY_API_KEY", KEY)
    assert main(["connect", client, "--url", server.url, "--write"]) == 0
    path = home / FILES[client]
    said = capsys.readouterr()
    assert said.out == ""
    assert f"{FILES[client]}: written" in said.err
    assert KEY not in said.err
    assert path.stat().st_mode & 0o777 == 0o600
    first = path.read_text()
    assert server.url in first
    if client in ("claude-code", "openwebui", "ollama", "aider"):
        assert KEY in first  # these clients cannot refer to a variable
    else:
        assert KEY not in first
    assert main(["connect", client, "--url", server.url, "--write"]) == 0
    assert "already up to date" in capsys.readouterr().err
    assert path.read_text() == first
    assert [other.name for other in path.parent.iterdir() if "before-argosy" in other.name] == []


@pytest.mark.parametrize("client", FORMS)
def test_a_client_with_a_form_has_no_file_to_write(
    client: str, server: FakeServer, home: Path, capsys: Captured
) -> None:
    assert main(["connect", client, "--url", server.url, "--write"]) == 2
    captured = capsys.readouterr()
    assert "where no other program can change them\nhint: leave out --write" in captured.err
    assert main(["connect", client, "--url", server.url, "--file", "x.json"]) == 2
    assert "--file names a settings file" in capsys.readouterr().err
    assert list(home.iterdir()) == []


def test_a_container_is_told_the_port_of_the_server(server: FakeServer, capsys: Captured) -> None:
    assert main(["connect", "openwebui", "--url", server.url]) == 0
    port = server.url.rpartition(":")[2]
    assert f"--url http://host.docker.internal:{port}`" in capsys.readouterr().err


def test_an_unknown_client_is_refused_with_one_list_of_the_known_ones(capsys: Captured) -> None:
    assert main(["connect", "foo"]) == 2
    assert capsys.readouterr().err.count("opencode") == 1
    assert main(["connect", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(client in said for client in CLIENTS)


def test_every_client_is_tested_with_its_file_or_its_form() -> None:
    assert {*FILES, *FORMS} == set(CLIENTS)


def test_codex_finds_its_catalogue_where_the_settings_point(server: FakeServer, home: Path) -> None:
    assert main(["connect", "codex", "--url", server.url, "--write"]) == 0
    settings = tomllib.loads((home / ".codex/config.toml").read_text())
    catalogue = json.loads(Path(settings["model_catalog_json"]).read_text())
    (entry,) = catalogue["models"]
    assert entry["slug"] == settings["model"]
    assert entry["context_window"] == settings["model_context_window"] == 32_768
    # No key was given, so Codex must not look for one.
    assert "env_key" not in settings["model_providers"]["argosy"]


def test_files_are_written_where_the_clients_own_variables_point(
    server: FakeServer, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CODEX_HOME", str(home / "elsewhere"))
    assert main(["connect", "codex", "--url", server.url, "--write"]) == 0
    assert (home / "elsewhere/config.toml").is_file()
    assert (
        main(["connect", "opencode", "--url", server.url, "--write", "--file", str(home / "mine.json")]) == 0
    )
    assert (home / "mine.json").is_file()


def test_settings_have_the_base_path_of_the_server(server: FakeServer, home: Path, capsys: Captured) -> None:
    server.base_path = "/local/moe"
    for client in CLIENTS:
        assert main(["connect", client, "--url", f"{server.url}/"]) == 0
        said = capsys.readouterr().out
        assert server.url in said
        assert f"{server.url}//" not in said


# Facts from the server


@pytest.mark.parametrize(
    ("tools", "note"), [("native", ""), ("generic", "generic prompt"), ("none", "cannot call")]
)
def test_settings_say_whether_the_model_calls_tools_and_which_inputs_it_reads(
    server: FakeServer, capsys: Captured, tools: str, note: str
) -> None:
    server.tools, server.inputs = tools, ["text", "image"]
    assert main(["connect", "opencode", "--url", server.url]) == 0
    said = capsys.readouterr()
    (model,) = json.loads(said.out)["provider"]["argosy"]["models"].values()
    assert model["tool_call"] == (tools != "none")
    assert model["modalities"]["input"] == ["text", "image"]
    assert note in said.err
    assert ("tools" in said.err) == bool(note)
    assert main(["connect", "continue", "--url", server.url]) == 0
    assert ("tool_use" in capsys.readouterr().out) == (tools != "none")


@pytest.mark.parametrize("said", [[], ["--write"], ["--model", "mine"], ["--context", "8192"]])
def test_without_a_server_there_are_no_settings_but_a_hint_to_start_one(
    said: list[str], home: Path, capsys: Captured
) -> None:
    assert main(["connect", "opencode", "--url", "http://127.0.0.1:9", *said]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: nothing answers at http://127.0.0.1:9")
    assert "`argosy serve`" in captured.err
    assert list(home.iterdir()) == []


def test_without_a_server_a_model_and_a_context_on_the_command_line_are_enough(
    home: Path, capsys: Captured
) -> None:
    said = ["--model", "mine", "--context", "8192"]
    assert main(["connect", "opencode", "--url", "http://127.0.0.1:9", "--write", *said]) == 0
    written = json.loads((home / FILES["opencode"]).read_text())
    limit = written["provider"]["argosy"]["models"]["mine"]["limit"]
    assert limit == {"context": 8192, "output": 2048}


def test_a_refused_key_and_an_unknown_model_are_errors(
    server: FakeServer, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["connect", "codex", "--url", server.url, "--model", "other"]) == 2
    assert "serves no model other\nhint: it serves: Qwen3-30B-A3B-Q4_K_M" in capsys.readouterr().err
    server.key = KEY
    monkeypatch.setenv("ARGOSY_API_KEY", "sk-wrong")
    assert main(["connect", "codex", "--url", server.url]) == 1
    assert f"{server.url} refuses the key" in capsys.readouterr().err


def test_another_program_at_the_address_is_an_error_not_a_placeholder(capsys: Captured) -> None:
    with stranger(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}") as url:
        assert main(["connect", "codex", "--url", url]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"error: {url} is not an Argosy server: its list of models cannot be read\n")


# Existing files


def put(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return text


def only_backup(path: Path) -> Path:
    (backup,) = [
        other for other in path.parent.iterdir() if other.name.startswith(f"{path.name}.before-argosy-")
    ]
    return backup


def test_other_settings_in_a_json_file_are_kept_and_the_old_file_is_backed_up(
    server: FakeServer, home: Path
) -> None:
    path = home / FILES["claude-code"]
    old = put(
        path,
        '{\n    "model": "opus",\n    "env": {"EDITOR": "vi", "ANTHROPIC_BASE_URL": "x"},\n    "n": 1e3\n}\n',
    )
    path.chmod(0o640)
    assert main(["connect", "claude-code", "--url", server.url, "--write"]) == 0
    new = json.loads(path.read_text())
    assert new["model"] == "opus"
    assert new["n"] == 1000
    assert new["env"]["EDITOR"] == "vi"
    assert new["env"]["ANTHROPIC_BASE_URL"] == server.url
    assert path.read_text().startswith('{\n    "model"')  # indented as it was
    assert path.stat().st_mode & 0o777 == 0o640
    assert only_backup(path).read_text() == old
    assert only_backup(path).stat().st_mode & 0o777 == 0o600


def test_other_settings_and_comments_of_codex_are_kept(server: FakeServer, home: Path) -> None:
    path = home / FILES["codex"]
    put(
        path,
        '# mine\nmodel = "gpt"  # the old one\nnotify = [\n  "a",\n]\n\n[model_providers.argosy]\nbase_url = "old"\n\n'
        '[model_providers.argosy.http_headers]\nX = "1"\n\n[mcp_servers.x]  # keep\ncommand = "y"\n',
    )
    assert main(["connect", "codex", "--url", server.url, "--write"]) == 0
    text = path.read_text()
    new = tomllib.loads(text)
    assert new["notify"] == ["a"]
    assert new["mcp_servers"] == {"x": {"command": "y"}}
    assert new["model_providers"]["argosy"]["http_headers"] == {"X": "1"}
    assert new["model_providers"]["argosy"]["base_url"] == f"{server.url}/v1"
    assert new["model"] == "Qwen3-30B-A3B-Q4_K_M"
    assert "# mine\n" in text
    assert "[mcp_servers.x]  # keep\n" in text


CONTINUE = """\
name: Mine
version: 1.0.0
schema: v1
models:
    # the small one
    - name: small
      provider: ollama
      model: qwen
rules:
    - Be brief
"""


def test_other_models_of_continue_are_kept_and_ours_is_replaced(server: FakeServer, home: Path) -> None:
    path = home / FILES["continue"]
    put(path, CONTINUE)
    assert main(["connect", "continue", "--url", server.url, "--write"]) == 0
    text = path.read_text()
    ours = text[text.index('    - name: "Argosy Qwen') : text.index("    # the small one")]
    assert f'\n      apiBase: "{server.url}/v1"\n' in ours
    assert text.replace(ours, "") == CONTINUE
    put(path, text.replace(server.url, "http://old:1").replace("Qwen3-30B-A3B-Q4_K_M", "Old"))
    assert main(["connect", "continue", "--url", server.url, "--write"]) == 0
    assert path.read_text() == text


OURS_LAST = """\
models:
- name: x  # not ours
  model: Argosy x
- name: Argosy old
  provider: openai
  model: old
  roles: [chat,
    edit]
"""


@pytest.mark.parametrize(
    ("text", "added_after", "removed"),
    [
        ("models:\nrules: []\n", "models:\n", ""),
        ("name: Mine\nrules: []", "rules: []\nmodels:\n", ""),
        ("# mine\n\n", "schema: v1\nmodels:\n", ""),
        ('models:\n- name: a\n  text: |\n    b\n\n# of rules\nrules: ["x"]\n', "models:\n", ""),
        ("x: &x {a: 1}\nmodels:\n  - name: a\n    <<: *x\n", "models:\n", ""),
        (OURS_LAST, "model: Argosy x\n", OURS_LAST[OURS_LAST.index("- name: Argosy") :]),
        (f"{OURS_LAST}\n# of rules\nrules: []\n", "Argosy x\n", OURS_LAST[OURS_LAST.index("- name: A") :]),
        (
            "models:\n  # argosy: begin\n  - name: Argosy m\n    model: m\n  # argosy: end\n  - name: b\n",
            "# argosy: begin\n",
            "  - name: Argosy m\n    model: m\n",
        ),
    ],
)
def test_every_other_line_of_continue_is_kept(
    text: str, added_after: str, removed: str, server: FakeServer, home: Path
) -> None:
    path = home / FILES["continue"]
    put(path, text)
    assert main(["connect", "continue", "--url", server.url, "--write"]) == 0
    new = path.read_text()
    ours = re.search(r' *- name: "Argosy Qwen(.|\n)*maxTokens: \d+\n', new)
    assert ours is not None
    assert new[: ours.start()].endswith(added_after)
    rest = new.replace(ours[0], "")
    kept = text.replace(removed, "").rstrip()
    assert [line for line in rest.splitlines() if line in kept.splitlines()] == kept.splitlines()
    assert YAML(typ="safe", pure=True).load(new)["models"]
    assert main(["connect", "continue", "--url", server.url, "--write"]) == 0
    assert path.read_text() == new


LLM = """\
# my models

# the small one
- model_id: small
  model_name: qwen  # of the laptop
  api_base: http://localhost:1234/v1

# with headers
- model_id: gateway
  model_name: big
  headers:
    x-team: a
"""


@pytest.mark.parametrize("end", ["", "\n\n", "# the end\n"])
def test_other_models_of_llm_and_their_comments_are_kept_and_ours_is_replaced(
    end: str, server: FakeServer, home: Path
) -> None:
    path = home / FILES["llm"]
    put(path, LLM + end)
    assert main(["connect", "llm", "--url", server.url, "--write"]) == 0
    text = path.read_text()
    ours = text[text.index('- model_id: "argosy/') :]
    assert text.removesuffix(ours).rstrip() == (LLM + end).rstrip()
    assert f'  api_base: "{server.url}/v1"\n' in ours
    made = YAML(typ="safe", pure=True).load(text)
    assert [one["model_name"] for one in made] == ["qwen", "big", "Qwen3-30B-A3B-Q4_K_M"]
    put(path, text.replace(server.url, "http://old:1").replace("Qwen3-30B-A3B-Q4_K_M", "Old"))
    assert main(["connect", "llm", "--url", server.url, "--write"]) == 0
    assert path.read_text() == text


@pytest.mark.parametrize("before", ["", "# mine\n\n", "---\n"])
def test_a_file_of_llm_without_models_gets_one(before: str, server: FakeServer, home: Path) -> None:
    path = home / FILES["llm"]
    put(path, before)
    assert main(["connect", "llm", "--url", server.url, "--write"]) == 0
    text = path.read_text()
    assert text.startswith(before.rstrip())
    assert [one["aliases"] for one in YAML(typ="safe", pure=True).load(text)] == [["argosy"]]


def test_an_entry_of_llm_that_stands_between_others_is_replaced_in_its_place(
    server: FakeServer, home: Path
) -> None:
    ours = "  - model_name: old\n    model_id: argosy/old\n    headers: {a: b,\n      c: d}\n"
    first, last = (
        "  # a\n  - model_id: a\n    model_name: argosy/a\n",
        "  # b\n  - model_id: b\n    model_name: b\n",
    )
    put(home / FILES["llm"], first + ours + last)
    assert main(["connect", "llm", "--url", server.url, "--write"]) == 0
    text = (home / FILES["llm"]).read_text()
    assert text.startswith(first)
    assert text.endswith(last)
    assert [one["model_id"] for one in YAML(typ="safe", pure=True).load(text)] == [
        "a", "argosy/Qwen3-30B-A3B-Q4_K_M", "b",
    ]  # fmt: skip


def test_llm_gets_the_name_of_a_key_and_the_directory_of_its_own_variable(
    server: FakeServer, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLM_USER_PATH", str(home / "elsewhere"))
    server.inputs, server.tools = ["text", "image", "audio"], "none"
    assert main(["connect", "llm", "--url", server.url, "--write"]) == 0
    path = home / "elsewhere/extra-openai-models.yaml"
    (entry,) = YAML(typ="safe", pure=True).load(path.read_text())
    assert (entry["vision"], entry["audio"]) == (True, True)
    assert not {"api_key_name", "supports_tools"} & entry.keys()
    monkeypatch.setenv("ARGOSY_API_KEY", KEY)
    assert main(["connect", "llm", "--url", server.url, "--write"]) == 0
    (entry,) = YAML(typ="safe", pure=True).load(path.read_text())
    assert entry["api_key_name"] == "argosy"


@pytest.mark.parametrize(
    "text",
    [
        'model_providers.argosy.name = "x"  # dotted\nmodel_providers.argosy.env_key = "OLD"\n',
        'model_providers = {argosy = {name = "x"}, other = {name = "y"}}  # inline\n',
        'x = """\nmodel = "inside"\n[model_providers.argosy]\n"""\n',
        "# about a\n[a]\nb = 1\n\n# about c\n[[c]]\nd = 2\n",
        "[model_providers]\n[model_providers.other]\na = 1\n# about b\n[b]\nc = 2",
        "[model_providers.argosy]\nenv_key = 'OLD'\n# stays\nname = 'x'  # too\n[b]\n[model_providers.other]\n",
    ],
)
def test_every_other_setting_and_comment_of_codex_is_kept(text: str, server: FakeServer, home: Path) -> None:
    path = home / FILES["codex"]
    put(path, text)
    assert main(["connect", "codex", "--url", server.url, "--write"]) == 0
    new = path.read_text()
    old_settings, settings = tomllib.loads(text), tomllib.loads(new)
    ours = settings["model_providers"].pop("argosy")
    assert ours["base_url"] == f"{server.url}/v1"
    assert "env_key" not in ours
    others = old_settings.pop("model_providers", {})
    others.pop("argosy", None)
    assert settings.pop("model_providers") == others
    assert {key: settings[key] for key in old_settings} == old_settings
    assert settings.keys() - old_settings.keys() == {
        "model", "model_provider", "model_context_window", "model_catalog_json", "web_search",
    }  # fmt: skip
    for comment, subject in re.findall(r"(# about .)\n(.*)", text):
        assert f"{comment}\n{subject}" in new
    for comment in re.findall("# .*", text):
        assert comment in new
    assert main(["connect", "codex", "--url", server.url, "--write"]) == 0
    assert path.read_text() == new


def test_lines_of_an_environment_file_are_replaced_in_place(server: FakeServer, home: Path) -> None:
    put(
        home / "open-webui.env",
        "# mine\n\nPORT=3000\n\nOPENAI_API_KEY=old\nexport ENABLE_OLLAMA_API=True\nA='\nOPENAI_API_KEY=x'",
    )
    assert main(["connect", "openwebui", "--url", server.url, "--write"]) == 0
    assert (home / "open-webui.env").read_text() == (
        "# mine\n\nPORT=3000\n\nOPENAI_API_KEY=none\nENABLE_OLLAMA_API=False\nA='\nOPENAI_API_KEY=x'\n"
        f"OPENAI_API_BASE_URL={server.url}/v1\nAIOHTTP_CLIENT_TIMEOUT=3600\n"
    )


@pytest.mark.parametrize(
    ("client", "text", "why"),
    [
        ("opencode", '{"theme": "x", // dark\n}', "it is not JSON: Expecting property name"),
        ("opencode", '{"a": 1, "a": 2}', "it has a duplicate key"),
        ("opencode", '{"a": NaN}', "it holds NaN, which is not JSON"),
        ("opencode", '{"a": 1e999}', "it holds a number that is too large"),
        ("opencode", "[]", "it is not a JSON object"),
        ("opencode", '{"provider": {"argosy": []}}', "its provider.argosy is not an object"),
        ("opencode", "[" * 100_000, "it is nested deeper than 64 levels"),
        ("claude-code", '{"env": "x"}', "its env is not an object"),
        ("codex", "model = ", "it is not TOML"),
        ("codex", "a = 1\na = 2", "it is not TOML (Cannot overwrite a value"),
        ("codex", "model_providers = 1", "its model_providers or its model_providers.argosy is not a table"),
        ("codex", "[model_providers]\nargosy = 1", "is not a table"),
        ("codex", "model_providers = {}", "it is written in a way that cannot be changed"),
        ("codex", "a = " + "[" * 100_000, "it is not TOML"),
        ("codex", "a = " + "9" * 5000, "it is not TOML"),
        ("codex", "[model_providers.b]\n[[c]]\n[model_providers.argosy]\n", "it is written in a way"),
        ("continue", "<<: {models: [1]}\n", "it is written in a way that cannot be changed"),
        ("continue", "x: &x [{name: a}]\nmodels: *x\n", "it is written in a way that cannot be changed"),
        ("continue", "models:\n  -\n    name: Argosy m\n    model: m\n", "it is written in a way"),
        ("continue", "models: [{name: x}]\n", "it is written in a way that cannot be changed"),
        ("continue", "{models: []}\n", "it is written in a way that cannot be changed"),
        ("continue", "{name: x}\n", "it is not plain YAML"),
        ("continue", "models:\n  name: x\n", "its models are not a list"),
        ("continue", "- models\n", "its models are not a list"),
        ("continue", "a: 1\n---\nb: 2\n", "it is not plain YAML (but found another document)"),
        ("continue", "a: 1\na: 2\n", 'it is not plain YAML (found duplicate key "a"'),
        ("continue", "a: !x 1\n", "it is not plain YAML"),
        ("continue", "[" * 100_000, "it is not plain YAML"),
        ("llm", "models:\n- a\n", "it is not a list"),
        ("llm", "text\n", "it is not a list"),
        ("llm", "[{model_id: a}]\n", "it is written in a way that cannot be changed"),
        ("llm", "- model_id: a\n...\n", "it is written in a way that cannot be changed"),
        ("llm", "- model_id: a\n  model_id: b\n", "it is not plain YAML (found duplicate key"),
        ("openwebui", "PORT 3000\n", "the line 'PORT 3000' is not an assignment"),
        ("openwebui", "A='1\n", "the line 'A='1' is not an assignment"),
    ],
)
def test_a_file_that_cannot_be_read_for_certain_is_left_unchanged(
    client: str, text: str, why: str, server: FakeServer, home: Path, capsys: Captured
) -> None:
    path = home / FILES[client]
    put(path, text)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(500)  # a parser of YAML takes two seconds to get a thousand calls deep
    try:
        assert main(["connect", client, "--url", server.url, "--write"]) == 2
    finally:
        sys.setrecursionlimit(limit)
    err = capsys.readouterr().err
    assert f"{path.name} is left unchanged: " in err
    assert why in err
    assert path.read_text() == text
    assert [other.name for other in path.parent.iterdir() if path.name in other.name] == [path.name]


def test_a_symlink_is_kept_and_its_target_is_changed(server: FakeServer, home: Path) -> None:
    put(home / "dotfiles/settings.json", "{}")
    (home / ".claude").mkdir()
    (home / FILES["claude-code"]).symlink_to(home / "dotfiles/settings.json")
    assert main(["connect", "claude-code", "--url", server.url, "--write"]) == 0
    assert (home / FILES["claude-code"]).is_symlink()
    assert server.url in (home / "dotfiles/settings.json").read_text()


def test_the_backup_is_the_only_file_left_beside_a_changed_file(server: FakeServer, home: Path) -> None:
    put(home / FILES["claude-code"], "{}")
    assert main(["connect", "claude-code", "--url", server.url, "--write"]) == 0
    names = sorted(path.name for path in (home / ".claude").iterdir())
    assert names == ["settings.json", "settings.json.before-argosy-1"]


def test_a_file_that_another_program_changes_meanwhile_is_not_overwritten(
    server: FakeServer, home: Path, capsys: Captured
) -> None:
    from argosy.cli.shared import edit_file

    path = home / "settings.json"
    put(path, "{}")

    def change(text: str | None) -> str:
        path.write_text('{"somebody": "else"}')
        return edit_file.merge_json(text, {"a": 1})

    with pytest.raises(Exception, match="another program has just changed it"):
        edit_file.edit_file(path, change)
    assert path.read_text() == '{"somebody": "else"}'


def test_settings_parsers_are_imported_only_when_settings_are_written(server: FakeServer) -> None:
    parsers = {"tomlkit", "ruamel.yaml", "dotenv"}
    code = (
        "import sys; from argosy.cli.main import main\n"
        f"for client in {[*CLIENTS]!r}:\n"
        f"    assert main(['connect', client, '--url', {server.url!r}]) == 0\n"
        f"    assert not {parsers!r} & sys.modules.keys(), client"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_a_model_name_with_shell_syntax_is_quoted(capsys: Captured) -> None:
    name = "a'; touch pwned; '$(touch pwned)"
    arguments = [
        "connect",
        "claude-code",
        "--url",
        "http://127.0.0.1:9",
        "--model",
        name,
        "--context",
        "8192",
    ]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert shlex.split(lines[2])[1] == f"ANTHROPIC_DEFAULT_OPUS_MODEL={name}"
