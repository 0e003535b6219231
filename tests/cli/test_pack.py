"""`argosy pack`: its output, and its errors when an argument is missing."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from argosy.checkpoint.pack import PACK_FORMATS
from argosy.cli.commands.pack import FORMATS, pack
from argosy.cli.main import main
from argosy.errors import CorruptRecord, UsageError
from argosy.model.families import open_model
from tests.models.seeing import REFERENCE
from tests.models.tiny import qwen3_moe, write_model


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_model(tmp_path / "source", qwen3_moe(num_experts=4), seed=5)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(pack, [str(argument) for argument in arguments])


def test_it_packs_and_reports_sizes_and_seconds(source: Path, tmp_path: Path) -> None:
    result = run(source, tmp_path / "packed", "--format", "q4")

    assert result.exit_code == 0, result.output
    first, before, after = result.stdout.rstrip("\n").split("\n")
    assert re.fullmatch(rf"packed   {tmp_path / 'packed'} as q4 in \d+\.\d s", first)
    assert re.fullmatch(r"  before +\d+(\.\d)? KiB", before)
    assert re.fullmatch(r"  after +\d+(\.\d)? KiB   \d+% of the original", after)
    assert result.stderr == ""  # no progress bar without a terminal
    assert open_model(tmp_path / "packed").expert_format == "q4"


def test_a_budget_that_is_too_small_advises_a_pack_only_of_weights_that_can_be_packed(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(source, tmp_path / "packed", "--format", "q8")
    for path, is_advised in ((source, True), (tmp_path / "packed", False)):
        assert main(["show", str(path), "--memory", "100B"]) == 3
        said = capsys.readouterr().err
        assert "\nhint: `--memory " in said
        assert ("argosy pack" in said) == is_advised


def test_json_gives_the_same_facts(source: Path, tmp_path: Path) -> None:
    facts = json.loads(run(source, tmp_path / "packed", "--format", "source", "--json").stdout)

    assert facts["directory"] == str(tmp_path / "packed")
    assert facts["format"] == "source"
    assert facts["packed_bytes"] == sum(path.stat().st_size for path in (tmp_path / "packed").iterdir())
    assert facts["resumed_bytes"] == 0


def test_verify_confirms_an_intact_pack_and_fails_on_a_corrupt_one(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "packed", "--format", "q8")

    result = run("--verify", tmp_path / "packed")
    assert result.exit_code == 0
    assert re.match(rf"intact   {tmp_path / 'packed'}: 3 files, .*, every BLAKE3 hash matches", result.stdout)
    assert json.loads(run("--verify", tmp_path / "packed", "--json").stdout)["num_files"] == 3

    path = tmp_path / "packed" / "experts.bin"
    path.write_bytes(b"\xff" + path.read_bytes()[1:])
    assert isinstance(run("--verify", tmp_path / "packed").exception, CorruptRecord)


def test_a_pack_is_divided_for_workers(source: Path, tmp_path: Path) -> None:
    result = run(source, tmp_path / "packed", "--format", "q4", "--shards", 2)
    assert result.exit_code == 0, result.output
    assert "\n  shards   experts-K-of-2.bin, for `argosy worker --share K/2`\n" in result.stdout
    assert sorted(path.name for path in (tmp_path / "packed").glob("experts*")) == [
        "experts-1-of-2.bin",
        "experts-2-of-2.bin",
    ]
    assert json.loads(run("--verify", tmp_path / "packed", "--json").stdout)["num_files"] == 4
    assert isinstance(run("--verify", "x", "--shards", 2).exception, UsageError)
    assert "0 is not in the range" in run(source, "x", "--format", "q4", "--shards", 0).output


def test_it_packs_the_encoders_and_shows_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(REFERENCE / "qwen3_omni_moe", tmp_path / "packed", "--format", "q8")

    assert result.stderr == ""
    for path in (REFERENCE / "qwen3_omni_moe", tmp_path / "packed"):
        assert main(["show", str(path), "--memory", "2GiB"]) == 0
        shown = capsys.readouterr().out
        assert "\n  pictures      72.7 k parameters of their encoder, 142 KiB in bf16\n" in shown
        assert "\n  sounds        11.7 k parameters of their encoder, 22.8 KiB in bf16\n" in shown
        assert "\n  pictures, sound " in shown


def test_an_encoder_that_cannot_be_run_is_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(REFERENCE / "qwen3_vl_moe", tmp_path / "source")
    config = tmp_path / "source" / "config.json"
    raw = json.loads(config.read_text())
    raw["vision_config"]["hidden_act"] = "relu6"
    config.write_text(json.dumps(raw))

    result = run(tmp_path / "source", tmp_path / "packed", "--format", "q8")

    assert result.exit_code == 0
    assert result.stderr.startswith("the pack will not take pictures: ")
    assert "hidden_act 'relu6'" in result.stderr
    assert open_model(tmp_path / "packed").others == {}
    assert main(["show", str(tmp_path / "source"), "--memory", "2GiB", "--json"]) == 0
    (encoder,) = json.loads(capsys.readouterr().out)["encoders"]
    assert encoder["kind"] == "picture"
    assert "hidden_act 'relu6'" in encoder["fault"]


def test_it_names_the_missing_arguments(source: Path) -> None:
    for arguments in ((), (source,), (source, "x"), (source, "--format", "q4")):
        error = run(*arguments).exception
        assert isinstance(error, UsageError)
        assert "pack needs SRC, DST and --format" in str(error)
    assert isinstance(run(source, "--verify", "x").exception, UsageError)
    assert "'q5' is not one of" in run(source, "x", "--format", "q5").output
    assert FORMATS == PACK_FORMATS


def test_help_is_short_and_has_two_examples() -> None:
    output = run("--help").output

    assert len(output.splitlines()) < 40
    assert output.count("  argosy pack ") == 2
