"""`argosy watermark`: keys, and what it says of a text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from argosy import SamplingParams
from argosy.cli.main import main
from argosy.engine.sampler import Sampler, SamplerState
from argosy.engine.watermark import Watermark
from argosy.prompt.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mark") / "mark.key"
    assert main(["watermark", "key", str(path)]) == 0
    # The same key in every run. With a random one, the p of another key is printed as 1 now and then.
    path.write_bytes(bytes(range(32)))
    return path


@pytest.fixture(scope="module")
def marked(chat_model: Path, key: Path) -> str:
    """Random digits, which this tokenizer reads as they were written."""
    tokenizer = Tokenizer.open(chat_model)
    assert tokenizer is not None
    logits = np.full(512, -np.inf, np.float32)
    logits[[tokenizer.encode(digit)[0] for digit in "0123456789"]] = 0.0
    state = SamplerState([], 3, Watermark.read(key).begin())
    params, sampler = SamplingParams(temperature=1.0), Sampler()
    token_ids = [sampler.sample(logits, params, state).token_id for _ in range(220)]
    text = tokenizer.decode(token_ids)
    assert tokenizer.encode(text) == token_ids
    return text


def detect(key: Path, model: Path, file: Path, *more: str) -> list[str]:
    return ["watermark", "detect", str(file), "--key", str(key), "-m", str(model), *more]


def test_a_marked_text_is_said_to_be_marked_with_its_p_value(
    chat_model: Path, key: Path, marked: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "answer.txt"
    file.write_text(marked, encoding="utf-8")
    assert main(detect(key, chat_model, file, "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["is_marked"]
    assert found["p_value"] == pytest.approx(10 ** found["log10_p"])
    assert found["p_value"] < 1e-4
    assert found["score"] > 0.5
    assert 0 < found["counted"] < found["tokens"]
    assert main(detect(key, chat_model, file)) == 0
    out = capsys.readouterr().out
    assert out.startswith("marked   yes, p = ")
    assert "0.500 without the watermark" in out


def test_the_same_text_shows_nothing_with_another_key_or_a_threshold_beyond_it(
    chat_model: Path, key: Path, marked: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, other = tmp_path / "answer.txt", tmp_path / "other.key"
    file.write_text(marked, encoding="utf-8")
    other.write_bytes(bytes(32))
    other.chmod(0o600)
    assert main(detect(other, chat_model, file)) == 0
    assert capsys.readouterr().out.startswith("marked   not shown, p = 0.")
    assert main(detect(key, chat_model, file, "--false-positives", "1e-200")) == 0
    assert capsys.readouterr().out.startswith("marked   not shown, p = ")


@pytest.mark.parametrize("text", ["", "Hi.", "a" * 2000])
def test_a_text_with_too_little_in_it_shows_nothing(
    chat_model: Path, key: Path, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "short.txt"
    file.write_text(text)
    assert main(detect(key, chat_model, file, "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert not found["is_marked"]
    assert found["counted"] <= 2


def test_what_cannot_be_judged_is_refused(
    chat_model: Path, key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    binary, open_key = tmp_path / "binary", tmp_path / "open.key"
    binary.write_bytes(b"\xff\xfe\xfd")
    open_key.write_bytes(bytes(32))
    open_key.chmod(0o644)
    text = tmp_path / "text"
    text.write_text("Hello, how are you?")
    for arguments, said in (
        (detect(key, chat_model, binary), "not UTF-8"),
        (detect(key, chat_model, tmp_path / "missing"), "cannot be read"),
        (detect(tmp_path / "missing.key", chat_model, text), "argosy watermark key"),
        (detect(open_key, chat_model, text), "can be read by others"),
        (detect(key, chat_model, text, "--false-positives", "0"), "--false-positives"),
        (["watermark", "key", str(key)], "never replaced"),
        *((["watermark", "key", path], "Is a directory") for path in ("", "..", "/")),
        *((detect(Path(path), chat_model, text), "Is a directory") for path in ("", "..", "/")),
    ):
        assert main(arguments) == 2, arguments
        assert said in capsys.readouterr().err


def test_run_and_serve_refuse_a_missing_key_before_they_load_anything(
    chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = str(tmp_path / "missing.key")
    for arguments in (
        ["run", "-m", str(chat_model), "--watermark", missing, "Hello"],
        ["serve", str(chat_model), "--watermark", missing, "--check"],
    ):
        assert main(arguments) == 2
        assert "argosy watermark key" in capsys.readouterr().err


def test_a_configuration_file_names_the_key_beside_it(
    chat_model: Path, key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mark.key").write_bytes(key.read_bytes())
    (tmp_path / "mark.key").chmod(0o600)
    config = tmp_path / "serve.toml"
    config.write_text('watermark = "mark.key"\n')
    assert main(["serve", str(chat_model), "--config", str(config), "--check"]) == 0
    config.write_text('watermark = "other.key"\n')
    assert main(["serve", str(chat_model), "--config", str(config), "--check"]) == 2
    assert "other.key" in capsys.readouterr().err
