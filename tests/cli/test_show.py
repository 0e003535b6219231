"""`argosy show` and `plan` tell the types in a GGUF file, and what its name hides."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from gguf import GGUFReader

from argosy.checkpoint.block_types import SLOT_FORMATS, may_run, type_in_name
from argosy.cli.main import main
from tests.engine.test_gguf import config_of
from tests.families.published_sparse import DEEPSEEK_V4_1_FLASH
from tests.helpers.hub_server import REPOSITORY, served
from tests.models.gguf_models import mixed_small, write_gguf_model
from tests.models.tiny import write_model
from tests.models.tiny_delta import qwen3_next
from tests.models.tiny_qwen4 import qwen4_exp_text

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts in Q2_K, Q3_K, Q5_1 and IQ4_NL, of which Q2_K and Q5_1 have a third each."""
    path = tmp_path_factory.mktemp("named") / "tiny-UD-IQ2_S.gguf"
    write_gguf_model(path, config_of("qwen3_moe", num_experts=4, experts_per_token=2), mixed_small, seed=1)
    return path


def weights_of(command: str, path: Path, capsys: Captured) -> dict[str, object]:
    assert main([command, str(path), "--memory", "2GiB", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    found: dict[str, object] = facts["weights"] if command == "show" else facts["model"]["weights"]
    return found


@pytest.mark.parametrize("command", ["show", "plan"])
def test_the_share_of_each_type_is_that_of_the_files_tensors(
    command: str, model: Path, capsys: Captured
) -> None:
    tensors = GGUFReader(model).tensors
    counts: Counter[str] = Counter()
    for tensor in tensors:
        counts[SLOT_FORMATS.get(tensor.tensor_type.name, tensor.tensor_type.name.lower())] += int(
            tensor.n_elements
        )
    found = weights_of(command, model, capsys)
    assert found["formats"] == pytest.approx({name: count / counts.total() for name, count in counts.items()})
    nbytes = sum(int(tensor.n_bytes) for tensor in tensors)
    assert found["bits_per_weight"] == pytest.approx(8 * nbytes / counts.total())


def test_a_name_that_hides_the_type_of_the_experts_is_told(model: Path, capsys: Captured) -> None:
    hidden = weights_of("show", model, capsys)["hidden_by_name"]
    assert hidden == {"name": "UD-IQ2_S", "format": "q2_k", "share": pytest.approx(1 / 3)}
    for command in ("show", "plan"):
        assert main([command, str(model), "--memory", "2GiB"]) == 0
        assert "the name says UD-IQ2_S; 33% of its experts are q2_k" in capsys.readouterr().out


def test_formats_of_a_mixture_are_listed_once(model: Path, capsys: Captured) -> None:
    for command, line in (
        ("show", "a GGUF file, experts in 4 formats, rest "),
        ("plan", "active; experts in 4 formats"),
    ):
        assert main([command, str(model), "--memory", "2GiB"]) == 0
        out = capsys.readouterr().out
        assert line in out
        assert out.count("iq4_nl") == 1
        assert ", 1 other below 0.5%" in out


def test_the_header_of_a_remote_file_tells_the_same(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    local = weights_of("plan", model, capsys)
    content = model.read_bytes()
    with served({"UD-IQ2_S/tiny-UD-IQ2_S.gguf": (content, len(content))}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        assert main(["plan", f"{REPOSITORY}:ud-iq2_s", "--memory", "2GiB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["weights"] == local


@pytest.mark.parametrize("name", ["tiny-UD-Q2_K_XL.gguf", "tiny-IQ2_M.gguf", "tiny.gguf"])
def test_a_name_that_hides_nothing_is_not_told(
    name: str, model: Path, tmp_path: Path, capsys: Captured
) -> None:
    (tmp_path / name).hardlink_to(model)
    assert weights_of("show", tmp_path / name, capsys)["hidden_by_name"] is None


@pytest.mark.parametrize(
    ("format", "expected"),
    [
        ("UD-TQ1_0", "TQ1_0"),
        ("Q4_K_M", "Q4_K"),
        ("UD-Q2_K_XL", "Q2_K"),
        ("UD-Q8_K_XL", None),
        ("MXFP4_MOE", "MXFP4"),
        ("IQ2_K_R4", "IQ2_K_R4"),
        ("IQ2_KL", "IQ2_KL"),
        ("IQ2_M", None),
        ("", None),
    ],
)
def test_a_format_is_named_after_a_type_or_after_a_mixture(format: str, expected: str | None) -> None:
    assert type_in_name(format) == expected


def test_tables_on_the_drive_are_shown_with_their_size(tmp_path: Path, capsys: Captured) -> None:
    write_model(tmp_path, qwen4_exp_text(), seed=1)
    assert main(["show", str(tmp_path)]) == 0
    assert " of routed experts, 1.8 KiB of n-gram tables\n" in capsys.readouterr().out
    (tmp_path / "model.safetensors").unlink()
    assert main(["show", str(tmp_path / "config.json")]) == 0
    assert "\n  n-gram tables 912 of these parameters, " in capsys.readouterr().out


def test_keys_and_values_of_a_token_leave_out_layers_with_a_window(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V4_1_FLASH))
    assert main(["show", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    # Entries of 512 values and index keys of 128: three layers keep one for two tokens, and one keeps all.
    assert facts["kv_bytes_per_token"]["f16"] == (3 / 2 + 1) * (512 + 128) * 2
    assert facts["num_table_parameters"] == (384_006_168 + 384_016_682) * 256
    assert main(["show", str(tmp_path)]) == 0
    assert "--kv q8, besides windows\n" in capsys.readouterr().out


def test_a_model_without_attention_is_shown(tmp_path: Path, capsys: Captured) -> None:
    """It runs: all its layers are delta nets."""
    write_model(tmp_path / "model", qwen3_next(num_hidden_layers=2, full_attention_interval=4), seed=1)
    assert main(["show", str(tmp_path / "model"), "--memory", "2GiB"]) == 0
    assert "attention     none; hidden size" in capsys.readouterr().out


def test_types_without_a_kernel_may_not_run() -> None:
    assert not may_run("IQ2_KT")
    assert not may_run("UD-IQ1_KT")
    assert not may_run("IQ2_K_R4")
    assert not may_run("Q8_0_R8")
    assert not may_run("Q4_0_8_8")
    assert may_run("UD-Q8_K_XL")
    assert may_run("UD-Q4_K_XL")
    assert may_run("IQ4_XS")
    assert may_run("")
