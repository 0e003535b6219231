"""`argosy pack`: its output, and its errors when an argument is missing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from argosy.checkpoint.pack import PACK_FORMATS
from argosy.cli.pack import FORMATS, pack
from argosy.errors import CorruptRecord, UsageError
from argosy.model.families import open_model
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
    assert re.fullmatch(rf"packed   {tmp_path / 'packed'}, q4, in \d+\.\d s", first)
    assert re.fullmatch(r"  before +\d+(\.\d)? KiB", before)
    assert re.fullmatch(r"  after +\d+(\.\d)? KiB   \d+% of the original", after)
    assert result.stderr == ""  # no progress bar without a terminal
    assert open_model(tmp_path / "packed").expert_format == "q4"


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
