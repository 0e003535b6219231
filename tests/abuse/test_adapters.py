"""A stranger's adapter is refused with a sentence, or what it gives is finite and fits the model."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy.adapters.files import AdapterFiles
from argosy.adapters.reading import open_adapter
from argosy.adapters.targets import target_shapes
from argosy.checkpoint.files import ModelFiles
from argosy.errors import ArgosyError
from argosy.model.families import open_model
from tests.models.references import ADAPTERS, DIRECTORY
from tests.models.safetensors_file import edit_header, read_safetensors, write_safetensors

NAMES = ("deepseek_v3_plain", "gpt_oss_plain", "qwen3_moe_plain")
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
ODD_VALUES = (
    None, True, False, -1, 0, 1, 3, 1e300, 1 << 70, 0.5, "", "4", "q_proj", [], [1, -2], [1 << 40], {}, {"((": 3},
    {"q_proj": 16}, {"(a|a)*(a|a)*b": 2}, [["x"]],
)  # fmt: skip


def require_sound(files: AdapterFiles, model: ModelFiles) -> None:
    """Everything that computing would read has its size, and is finite."""
    shapes = target_shapes(model.own_config)
    for name, pairs in files.dense.items():
        for pair in pairs:
            assert pair.down.shape[1] == shapes[name][1]
            assert pair.up.shape[0] == pair.down.shape[0] == pair.rank > 0
            assert 0 <= pair.row_begin <= pair.row_begin + pair.up.shape[1] <= shapes[name][0]
            assert np.isfinite(pair.scale)
            assert is_finite(pair.down, pair.format)
            assert is_finite(pair.up, pair.format)
    for layer, part in files.experts.items():
        assert files.read_expert is not None
        for expert in range(model.own_config.num_experts):
            content = files.read_expert(layer, expert)
            assert len(content) == part.nbytes
            assert is_finite(np.frombuffer(content, "<f4" if part.format == "f32" else "<u2"), part.format)


def is_finite(values: Any, format: str) -> bool:
    bits = np.ascontiguousarray(values).view("<u4" if format == "f32" else "<u2")
    exponent = {"f32": 0x7F800000, "bf16": 0x7F80, "f16": 0x7C00}[format]
    return not ((bits & exponent) == exponent).any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("count", "seed"), [(90, 1), pytest.param(3000, 2, marks=pytest.mark.full)])
def test_changed_adapters_are_refused_or_sound(name: str, count: int, seed: int, tmp_path: Path) -> None:
    model, rng = open_model(DIRECTORY / name), random.Random(seed)
    weights = (ADAPTERS / name / WEIGHTS).read_bytes()
    settings = json.loads((ADAPTERS / name / SETTINGS).read_text())
    outcomes: Counter[str] = Counter()
    for _ in range(count):
        kind = rng.choice(("header", "data", "size", "settings"))
        changed, config = bytearray(weights), dict(settings)
        header_bytes = 8 + int.from_bytes(weights[:8], "little")
        match kind:
            case "header":
                for _ in range(rng.randint(1, 3)):
                    at = rng.randrange(header_bytes)
                    changed[at] = rng.choice((*b'0123456789,:"[]{}', changed[at] ^ 1 << rng.randrange(8)))
            case "data":
                at = rng.randrange(header_bytes, len(changed) - 4)
                changed[at : at + 4] = rng.choice((b"\0\0\xc0\x7f", b"\xff\xff\xff\xff", rng.randbytes(4)))
            case "size":
                changed = (
                    (changed + b"\0" * 64) if rng.random() < 0.2 else changed[: rng.randrange(len(changed))]
                )
            case _:
                config[rng.choice(sorted(config))] = rng.choice(ODD_VALUES)
        (tmp_path / WEIGHTS).write_bytes(changed)
        (tmp_path / SETTINGS).write_text(json.dumps(config))
        try:
            require_sound(open_adapter(tmp_path, model), model)
        except ArgosyError:
            outcomes[f"{kind} refused"] += 1
        else:
            outcomes[f"{kind} runs"] += 1
    assert {one.partition(" ")[2] for one in outcomes} == {"refused", "runs"}


Damage = Callable[[Path], Any]


def settings(**changes: Any) -> Damage:
    def change(place: Path) -> None:
        path = place / SETTINGS
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def tensors(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Damage:
    def rewrite(place: Path) -> None:
        changed = change(read_safetensors(place / WEIGHTS))
        write_safetensors(place / WEIGHTS, {name: ("BF16", values) for name, values in changed.items()})

    return rewrite


def header(change: Callable[[dict[str, Any]], Any]) -> Damage:
    return lambda place: edit_header(place / WEIGHTS, change)


Q = "base_model.model.model.layers.0.self_attn.q_proj."
DAMAGES: dict[str, tuple[Damage, str]] = {
    "a tensor without its partner": (
        tensors(lambda all: {name: one for name, one in all.items() if name != f"{Q}lora_B.weight"}),
        "lora_B.weight is missing",
    ),
    "NaN": (tensors(lambda all: all | {f"{Q}lora_A.weight": np.full((4, 32), np.nan)}), "NaN"),
    "no rank": (tensors(lambda all: all | {f"{Q}lora_A.weight": np.zeros((0, 32))}), "rank 0"),
    "another rank than the config's": (settings(r=8), "rank 4, but"),
    "a rank of zero": (settings(r=0), "r is 0"),
    "a layer beyond the last": (
        tensors(lambda all: {name.replace("layers.2.", "layers.7."): one for name, one in all.items()}),
        "layers.7",
    ),
    "columns of another base": (
        tensors(lambda all: all | {f"{Q}lora_A.weight": np.zeros((4, 48))}),
        "48.*needs.*32",
    ),
    "four gigabytes in a header": (
        header(lambda all: all[f"{Q}lora_A.weight"].update(shape=[4, 1 << 28], data_offsets=[0, 1 << 31])),
        "needs|ends at byte|overlaps",
    ),
    "a header of four gigabytes": (
        lambda place: (place / WEIGHTS).write_bytes((4 << 30).to_bytes(8, "little") + b"{}"),
        "4294967296",
    ),
    "a cut file": (
        lambda place: (place / WEIGHTS).write_bytes((place / WEIGHTS).read_bytes()[:-1]),
        "incomplete",
    ),
    "a pickle": (lambda place: (place / WEIGHTS).rename(place / "adapter_model.bin"), "pickle"),
    "a method that is not LoRA": (settings(peft_type="LOHA"), "LOHA"),
    "a base that training began by changing": (settings(init_lora_weights="pissa"), "pissa"),
    "a key of tomorrow": (settings(use_more=True), "use_more"),
    "a norm": (
        tensors(lambda all: all | {"base_model.model.model.norm.weight": np.ones(32)}),
        "model.norm",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(name: str, tmp_path: Path) -> None:
    damage, sentence = DAMAGES[name]
    place = Path(shutil.copytree(ADAPTERS / "qwen3_moe_plain", tmp_path / "adapter"))
    damage(place)
    with pytest.raises(ArgosyError, match=sentence):
        open_adapter(place, open_model(DIRECTORY / "qwen3_moe_plain"))


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_of_another_base_is_refused(name: str) -> None:
    for other in NAMES:
        if other != name:
            with pytest.raises(ArgosyError):
                open_adapter(ADAPTERS / other, open_model(DIRECTORY / name))
