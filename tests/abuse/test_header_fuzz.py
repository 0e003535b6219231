"""Whatever bytes a checkpoint has, reading it gives tensors or an ArgosyError, and takes little memory."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from argosy.checkpoint.safetensors import DTYPE_BITS, read_header
from argosy.checkpoint.untrusted_file import read_object
from argosy.config import AttentionConfig
from argosy.errors import ArgosyError
from argosy.model.families import FAMILIES
from tests.models.tiny import mixtral, qwen2_moe, qwen3_moe
from tests.models.tiny_gemma import gemma4

sizes = st.one_of(st.integers(-2, 9), st.sampled_from([2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64, 10**30]))
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), sizes, st.floats(), st.text(max_size=4)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
entries = st.one_of(
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(sorted(DTYPE_BITS)) | anything,
            "shape": st.lists(sizes, max_size=4) | anything,
            "data_offsets": st.lists(sizes, min_size=2, max_size=2) | anything,
        }
    ),
    anything,
)
headers = st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), entries, max_size=4)
quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check(path: Path) -> None:
    """Read a file; check that its tensors lie inside it and that reading took little memory."""
    file_bytes = path.stat().st_size
    sentence = ""
    tracemalloc.start()
    try:
        for ref in read_header(path).values():
            assert 0 <= ref.offset <= ref.offset + ref.nbytes <= file_bytes
    except ArgosyError as error:
        sentence = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert len(sentence.encode()) < 2_000
    assert peak < 200_000 + 60 * file_bytes  # a parsed header takes tens of times its text, but no more


@quick
@given(content=st.binary(max_size=200))
@example(content=b"\xff" * 8)
@example(content=(10**8).to_bytes(8, "little") + b"{")
def test_any_bytes_give_tensors_or_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    check(path)


@quick
@given(header=headers, length=st.none() | st.integers(0, 2**64 - 1), data=st.binary(max_size=40))
def test_any_header_gives_tensors_or_an_error(
    tmp_path: Path, header: dict[str, Any], length: int | None, data: bytes
) -> None:
    path = tmp_path / "model.safetensors"
    text = json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    check(path)


@quick
@given(data=st.data())
def test_a_good_file_with_changed_bytes_gives_tensors_or_an_error(
    tmp_path: Path, data: st.DataObject
) -> None:
    header = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
              "b": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [8, 16]}}  # fmt: skip
    text = json.dumps(header).encode()
    content = bytearray(len(text).to_bytes(8, "little") + text + bytes(16))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    check(path)


@quick
@given(content=st.binary(max_size=100) | anything.map(lambda value: json.dumps(value).encode()))
def test_any_config_file_is_read_or_gives_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    try:
        read_object(path)
    except ArgosyError as error:
        str(error).encode()


def in_gemma(text: dict[str, Any]) -> dict[str, Any]:
    return gemma4() | {"text_config": text}


@pytest.mark.parametrize(
    ("config", "wrap"),
    [
        pytest.param(mixtral(), dict, id="mixtral", marks=pytest.mark.full),
        pytest.param(qwen2_moe(), dict, id="qwen2_moe", marks=pytest.mark.full),
        pytest.param(qwen3_moe(), dict, id="qwen3_moe"),
        pytest.param(gemma4()["text_config"], in_gemma, id="gemma4"),
    ],
)
def test_any_value_under_any_config_key_is_valid_or_gives_an_error(
    config: dict[str, Any], wrap: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    family = FAMILIES[wrap(config)["model_type"]]
    keys = [*config, "rope_scaling", "rope_parameters", "layer_types", "head_dim", "num_experts_per_token"]
    keys.append("per_layer_config")
    fields = ["rope_type", "type", "factor", "rope_theta", "original_max_position_embeddings", "beta_fast"]
    kinds = ["yarn", "llama3", "linear", "proportional"]
    ropes = st.dictionaries(st.sampled_from(fields), anything | st.sampled_from(kinds))
    layers = st.dictionaries(
        st.sampled_from(["full_attention", "sliding_attention", "1", "02", "9" * 5000]),
        ropes | st.dictionaries(st.sampled_from(["head_dim", "num_key_value_heads"]), anything, max_size=2),
        max_size=3,
    )

    @quick
    @given(key=st.sampled_from(keys), value=anything | ropes | layers)
    def check_value(key: str, value: object) -> None:
        try:
            parsed = family.parse_config(wrap(config | {key: value}))
        except ArgosyError as error:
            str(error).encode()
        else:
            assert 1 <= parsed.experts_per_token <= parsed.num_experts
            for layer in parsed.layers:
                if isinstance(layer.mixer, AttentionConfig):
                    assert layer.mixer.num_heads % layer.mixer.num_kv_heads == 0

    check_value()
