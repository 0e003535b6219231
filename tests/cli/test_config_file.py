"""`argosy serve --config FILE`: strict, below the command line and above the environment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest

from argosy.cli.commands.serve import serve
from argosy.cli.main import main
from argosy.cli.shared.config_file import read_config
from argosy.config.option import declarations
from argosy.errors import UsageError

Captured = pytest.CaptureFixture[str]


def write(folder: Path, text: str) -> Path:
    path = folder / "serve.toml"
    path.write_text(text)
    return path


def settings(folder: Path, text: str, *arguments: str) -> dict[str, Any]:
    """The parameters of the command, with a file of settings."""
    return serve.make_context("serve", ["--config", str(write(folder, text)), *arguments]).params


def values_for(option: click.Parameter) -> Any:
    """A value that the option takes."""
    kind = option.type
    if isinstance(kind, click.types.BoolParamType):
        value: Any = not option.default
    elif isinstance(kind, click.Choice):
        value = kind.choices[-1]
    elif isinstance(kind, click.types.IntParamType | click.types.FloatParamType):
        value = 7
    else:
        value = "/a"
    return [value] if option.multiple or option.nargs == -1 else value


def as_toml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(as_toml, value))}]"
    return str(value).lower() if isinstance(value, bool | int) else f'"{value}"'


def test_every_option_of_serve_may_be_in_the_file(tmp_path: Path) -> None:
    options = {
        parameter.opts[-1].removeprefix("--no-" if getattr(parameter, "flag_value", None) is False else "--"): parameter
        for parameter in serve.params
        if parameter.name not in ("config", "check")
    }  # fmt: skip
    text = "".join(f"{key} = {as_toml(values_for(option))}\n" for key, option in options.items())
    assert len(options) > 25
    found = settings(tmp_path, text)
    for option in options.values():
        value = values_for(option)
        wanted = tuple(value) if isinstance(value, list) else value
        assert found[str(option.name)] == (
            Path(wanted) if isinstance(found[str(option.name)], Path) else wanted
        )


def test_the_command_line_wins_over_the_file_and_the_file_over_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from argosy.cli.shared.settings import Settings, read_settings

    monkeypatch.setenv("ARGOSY_MEMORY", "1GiB")
    monkeypatch.setenv("ARGOSY_THREADS", "3")
    found = settings(
        tmp_path, 'memory = "2GiB"\nport = 1\nallow-host = ["a"]\nrecord = true\n', "--port", "2"
    )
    assert (found["port"], found["allow_host"]) == (2, ("a",))
    taken = read_settings(**{name: found.get(name) for name in declarations(Settings)})
    assert (taken["memory"], taken["threads"], taken["record"]) == ("2GiB", 3, True)
    assert settings(tmp_path, 'allow-host = ["a"]', "--allow-host", "b")["allow_host"] == ("b",)
    assert settings(tmp_path, "media = true", "--no-media")["media"] is False
    assert settings(tmp_path, 'models = ["x"]', "y")["models"] == ("y",)


def test_relative_paths_begin_at_the_files_folder(tmp_path: Path) -> None:
    text = (
        'models = ["./m", "n"]\nkeys = "k.json"\nmmproj = "p.gguf"\nears = "tiny.en"\nlisten = "unix:s"\n'
        'kv-dir = "/kv"\n'
    )
    found = settings(tmp_path, text)
    assert found["models"] == (str(tmp_path / "m"), "n")
    assert (found["keys"], found["mmproj"]) == (tmp_path / "k.json", str(tmp_path / "p.gguf"))
    assert (found["ears"], found["listen"]) == ("tiny.en", f"unix:{tmp_path}/s")
    assert found["kv_dir"] == Path("/kv")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("prot = 1", "unknown setting 'prot'; did you mean 'port'?"),
        ("zzzz = 1", "unknown setting 'zzzz'; known: "),
        ("config = 'x'", "unknown setting 'config'"),
        ("check = true", "unknown setting 'check'"),
        ("[serve]\nport = 1", "unknown setting 'serve'"),
        ("port = '8080'", "port must be a whole number, found the text '8080'"),
        ("port = true", "port must be a whole number, found true"),
        ("port = 1.0", "port must be a whole number, found 1.0"),
        ("port = 70000", "port: 70000 is not in the range"),
        ("drain = 'x'", "drain must be a number"),
        ("memory = 16", "memory must be a size with its unit, such as \"16GiB\", found 16"),
        (r'kv-dir = "a\u0000b"', "kv-dir contains a null character, which is invalid in paths and names"),
        ("host = 2026-01-01", "host must be text, found a date or time"),
        ("media = 'no'", "media must be true or false, found the text 'no'"),
        ("no-media = true", "unknown setting 'no-media'"),
        ("allow-host = 'a'", "allow-host must be a list, found the text 'a'"),
        ("allow-host = [1]", "allow-host must be text, found 1"),
        ("kv = 'f8'", "kv: 'f8' is not one of"),
        ("port = 1\nport = 2", "is not valid TOML"),
        ("port =", "is not valid TOML"),
        (f"port = {'9' * 5000}", "is not valid TOML"),
        ("a = " + "[" * 20_000, "nested too deeply"),
        ("#" * 70_000, "larger than 65536 bytes"),
    ],
)  # fmt: skip
def test_an_invalid_file_is_refused_with_its_name(tmp_path: Path, text: str, fault: str) -> None:
    with pytest.raises(UsageError) as raised:
        settings(tmp_path, text)
    assert fault in str(raised.value)
    assert str(tmp_path / "serve.toml") in str(raised.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    ctx = click.Context(serve)
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_config(tmp_path / "none.toml", ctx)
    (tmp_path / "bytes.toml").write_bytes(b"name = '\xff'")
    with pytest.raises(UsageError, match="not text in UTF-8: byte 8"):
        read_config(tmp_path / "bytes.toml", ctx)


def test_check_validates_and_opens_nothing(tmp_path: Path, capsys: Captured) -> None:
    path = write(tmp_path, 'models = ["./absent"]\nport = 1\n')
    assert main(["serve", "--config", str(path), "--check"]) == 0
    assert capsys.readouterr().out == "the settings are valid\n"
    for text, fault in (
        ("memory = 100", 'memory must be a size with its unit, such as "16GiB", found 100'),
        ('memory = "100"', "'100' has no unit"),
        ('host = "0.0.0.0"', "there are no keys"),
        ('keys = "k.json"', "k.json cannot be read"),
        ('policy = "p.toml"', "p.toml: the file cannot be read"),
        ('tls-cert = "c.pem"', "--tls-cert needs --tls-key"),
        ('tls-cert = "c.pem"\ntls-key = "k.pem"', "c.pem cannot be read"),
        ('forwarded-from = ["10.0.0.0/8"]', "there are no keys"),
        ('forwarded-from = ["proxy"]', "takes an address, a network or `unix`"),
        ('forwarded-from = ["0.0.0.0/0"]', "would trust every client"),
        ('base-path = "argosy"', "--base-path must begin with /"),
        ('base-path = "/a/"', "--base-path must begin with /"),
        ('listen = "tcp:1"', "--listen takes unix:PATH"),
        ('listen = "unix:/"', "--listen takes unix:PATH, found 'unix:/'"),
        ('listen = "unix:.."', "--listen takes unix:PATH"),
        ('listen = "unix:s"\nsocket-mode = "rw"', "--socket-mode must be three octal digits"),
    ):
        assert main(["serve", "--config", str(write(tmp_path, text)), "--check"]) == 2
        assert fault in capsys.readouterr().err
