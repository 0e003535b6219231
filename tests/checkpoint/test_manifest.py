"""A pack opens only if it is complete and consistent; damage is named by file, layer and expert."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blake3
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from argosy.checkpoint.manifest import open_pack, read_manifest, verify_pack
from argosy.checkpoint.pack import pack
from argosy.errors import ArgosyError, CheckpointError, CorruptRecord
from argosy.model.families import open_model
from tests.models.tiny import qwen2_moe, write_model


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pack")
    config = qwen2_moe(
        mlp_only_layers=[1],
        rope_scaling={"type": "yarn", "factor": 2.0, "attention_factor": 1.1},
        num_experts=4,
    )
    pack(open_model(write_model(directory / "source", config, seed=5)), directory / "packed", format="q4")
    return directory / "packed"


@pytest.fixture
def packed(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "packed"))


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_model(directory)
    return str(caught.value)


def rewrite(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest, and update its own BLAKE3 to match."""
    path = directory / "argosy.json"
    manifest = json.loads(path.read_text())
    change(manifest["contents"])
    canonical = json.dumps(manifest["contents"], sort_keys=True, separators=(",", ":")).encode()
    manifest["blake3"] = blake3.blake3(canonical).hexdigest()
    path.write_text(json.dumps(manifest))


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


def test_a_manifest_round_trips(packed: Path) -> None:
    manifest = read_manifest(packed)

    assert manifest.to_bytes() == (packed / "argosy.json").read_bytes()
    assert manifest.config == open_model(packed.parent / "packed").config
    assert manifest.config.attention.rope.attention_factor == 1.1
    assert manifest.format == "q4"


def test_a_directory_without_a_manifest_is_not_a_pack(packed: Path) -> None:
    (packed / "argosy.json").unlink()

    assert open_pack(packed) is None
    assert "holds no safetensors" in refusal(packed)
    with pytest.raises(CheckpointError, match=r"is not a pack: it has no argosy.json"):
        verify_pack(packed)


def test_an_unfinished_pack_never_opens_even_with_a_manifest(packed: Path) -> None:
    partial = packed.rename(packed.with_name("packed.partial"))

    found = refusal(partial)

    assert found == f"{partial} is an unfinished pack\nhint: `argosy pack SRC packed` continues it"


def test_a_changed_manifest_is_refused(packed: Path) -> None:
    path = packed / "argosy.json"
    path.write_text(path.read_text().replace('"num_experts": 4', '"num_experts": 5'))

    assert refusal(packed) == "argosy.json does not match its own BLAKE3: it was changed or damaged"


@pytest.mark.parametrize("version", [4, 6])
def test_a_manifest_of_another_version_is_refused(packed: Path, version: int) -> None:
    path = packed / "argosy.json"
    path.write_text(path.read_text().replace('"argosy_pack": 5', f'"argosy_pack": {version}'))

    assert f"argosy.json has version {version}; this Argosy reads version 5" in refusal(packed)


def test_a_missing_or_truncated_file_is_named(packed: Path) -> None:
    size = (packed / "experts.bin").stat().st_size
    with (packed / "experts.bin").open("r+b") as file:
        file.truncate(size - 1)
    assert refusal(packed) == f"experts.bin has {size - 1} bytes; argosy.json says {size}"

    (packed / "experts.bin").unlink()
    assert refusal(packed) == f"experts.bin is missing from {packed}"


def test_a_config_that_contradicts_the_manifest_is_refused(packed: Path) -> None:
    path = packed / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 2e-06'))

    assert "argosy.json and config.json" in refusal(packed)
    assert "describe different models" in refusal(packed)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c["dense"].pop("layers.0.q"), "argosy.json does not have tensor layers.0.q"),
        (
            lambda c: c["dense"].update(extra=c["dense"]["embed"]),
            "argosy.json has an unexpected tensor extra",
        ),
        (lambda c: c["dense"]["embed"].update(format="f32"), "dense.bin has"),
        (
            lambda c: c["dense"]["embed"].update(format="q5"),
            "is q5, text; expected one of f32, f16, bf16, f8, f8_row, f8_32, mxfp8, int8_row, bnb4, ",
        ),
        (lambda c: c["dense"]["embed"].update(crc32c_wide=2**32), "expected a 32-bit checksum"),
        (lambda c: c["dense"]["embed"].pop("format"), "expected the keys format, crc32c_wide"),
        (lambda c: c["experts"]["crc32c_wide"].pop(), "argosy.json has checksums for 7 experts, expected 8"),
        (lambda c: c["experts"].update(format="q8"), "experts.bin has"),
        (lambda c: c["experts"].update(crc32c_wide={}), "an object; expected a list"),
        (lambda c: c["files"].pop("dense.bin"), "argosy.json does not list dense.bin"),
        (lambda c: c.update(num_shares=0), "num_shares is 0, a whole number; expected a whole number from 1"),
        (lambda c: c.update(num_shares=65), "num_shares is 65"),
        (lambda c: c.update(num_shares=True), "num_shares is True"),
        (lambda c: c.update(num_shares=None), "num_shares is None"),
        (lambda c: c.update(num_shares=2), "argosy.json does not list experts-1-of-2.bin"),
        (lambda c: c["files"].update({"../x": c["files"]["dense.bin"]}), "expected plain file names"),
        (lambda c: c["files"]["dense.bin"].update(nbytes=-1), "expected a whole number from 0 to 2^63 - 1"),
        (lambda c: c["config"].update(num_experts=-1), "config.num_experts is -1"),
        (
            lambda c: c["config"].update(num_experts=True),
            "config.num_experts is True, true or false; expected int",
        ),
        (
            lambda c: c["config"].update(surprise=1),
            "config is surprise, text; expected one of the keys family",
        ),
        (lambda c: c["config"].pop("hidden_size"), "expected the key hidden_size"),
        (lambda c: c["config"].update(layers=3), "config.layers is 3, a whole number; expected a list"),
        (
            lambda c: c["config"]["layers"][0]["mixer"]["rope"].update(kind="longrope"),
            "config.layers.mixer.rope.kind is longrope, text; expected one of",
        ),
        (
            lambda c: c["config"]["layers"][0].update(mixer="latent"),
            "config.layers.mixer is latent, text; expected an object",
        ),
        (
            lambda c: c["config"]["layers"][0]["mixer"].pop("num_heads"),
            "expected the keys of AttentionConfig or CompressedConfig or LatentConfig",
        ),
        (
            lambda c: c["config"].update(layers=[]),
            "config.layers is [], a list; expected layers with routed experts",
        ),
        (lambda c: c["config"].update(num_experts=0), "expected layers with routed experts"),
        (
            lambda c: c["config"]["layers"][0]["mixer"]["rope"].update(theta="x"),
            "config.layers.mixer.rope.theta is x, text; expected float",
        ),
        (lambda c: c.pop("experts"), "expected the keys format, config, dense, experts, files"),
    ],
)
def test_an_intact_but_inconsistent_manifest_is_refused(
    packed: Path, change: Callable[[dict[str, Any]], None], sentence: str
) -> None:
    rewrite(packed, change)

    assert sentence in refusal(packed)


def test_a_flipped_bit_is_named_by_file_layer_and_expert(packed: Path) -> None:
    piece = open_model(packed).experts[2, 1].pieces[0]
    flip(packed / "experts.bin", piece.offset + piece.nbytes // 2)

    with pytest.raises(CorruptRecord) as caught:
        verify_pack(packed)

    assert str(caught.value) == "experts.bin: expert 1 of layer 2 changed since the pack was written"
    assert caught.value.facts == {"path": packed / "experts.bin", "layer": 2, "expert": 1}


def test_a_flipped_bit_in_a_dense_tensor_is_named(packed: Path) -> None:
    flip(packed / "dense.bin", open_model(packed).dense["layers.1.up"].offset)

    with pytest.raises(CorruptRecord, match=r"dense.bin: layers.1.up changed since the pack was written"):
        verify_pack(packed)


def test_a_change_in_the_padding_is_found(packed: Path) -> None:
    flip(packed / "experts.bin", (packed / "experts.bin").stat().st_size - 1)
    with pytest.raises(
        CheckpointError, match=r"experts.bin changed since the pack was written: its BLAKE3 differs"
    ):
        verify_pack(packed)


def test_verify_reports_its_progress(packed: Path) -> None:
    seen: list[tuple[str, float]] = []
    verify_pack(packed, lambda what, share: seen.append((what, share)))
    assert seen[-1][1] == 1.0
    assert {what for what, _ in seen} == {
        "verifying config.json",
        "verifying dense.bin",
        "verifying experts.bin",
    }


def test_the_number_of_experts_must_match_the_checksums(packed: Path) -> None:
    def change(contents: dict[str, Any]) -> None:
        contents["config"]["num_experts"] = 2**31  # allocating this many would use all memory

    rewrite(packed, change)
    with pytest.raises(CheckpointError, match=r"checksums for \d+ experts, expected \d{10}"):
        open_model(packed)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_to_a_manifest_s_values_is_harmless_or_an_argosy_error(
    original: Path, data: st.DataObject
) -> None:
    manifest = original / "argosy.json"
    whole = manifest.read_text()

    def change(contents: dict[str, Any]) -> None:
        at: Any = contents
        while True:
            key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
            if not isinstance(at[key], dict | list) or not at[key] or data.draw(st.integers(0, 3)) == 0:
                break
            at = at[key]
        at[key] = data.draw(
            st.sampled_from(
                [None, True, -1, 0, 1, 2**31, 2**63, 1.5, "", "q8", "../x", [], {}, [1], {"a": 1}]
            )
        )

    try:
        rewrite(original, change)
        open_model(original)
    except ArgosyError as error:
        str(error).encode()
    finally:
        manifest.write_text(whole)
