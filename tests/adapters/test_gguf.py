"""GGUF adapters mean what llama.cpp computes with them; what does not fit is refused by name."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from argosy.adapters.reading import open_adapter
from argosy.checkpoint.files import ModelFiles
from argosy.errors import ArgosyError
from argosy.model.families import open_model
from tests.adapters.adapter_files import dense_delta, pair, product, write_gguf_adapter
from tests.models.gguf_models import write_gguf_model
from tests.models.tiny import qwen3_moe

Q = "blk.1.attn_q.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    path = tmp_path_factory.mktemp("base") / "model.gguf"
    write_gguf_model(path, qwen3_moe(), lambda _: "F32", seed=0)
    return open_model(path)


def adapter_of(base: ModelFiles, path: Path, **changes: object) -> Path:
    ref = base.dense["layers.1.q"]
    return write_gguf_adapter(path, {Q: pair(ref.rows, ref.cols)}, architecture="qwen3moe", **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(("alpha", "scale"), [(8.0, 2.0), (-2.0, -0.5), (0.0, 1.0), (-0.0, 1.0), (None, 1.0)])
def test_the_scale_is_alpha_by_rank_or_1_without_alpha(
    alpha: float | None, scale: float, tmp_path: Path, base: ModelFiles
) -> None:
    ref = base.dense["layers.1.q"]
    found = open_adapter(adapter_of(base, tmp_path / "x.gguf", alpha=alpha), base)
    np.testing.assert_array_equal(
        dense_delta(found, base.own_config, "layers.1.q"), product(pair(ref.rows, ref.cols), scale)
    )


REFUSED = {
    "NaN": ({"alpha": math.nan}, "'nan', expected a number"),
    "infinity": ({"alpha": math.inf}, "'inf', expected a number"),
    "words": ({"alpha": "8"}, "'8', expected a number"),
    "truth": ({"alpha": True}, "'True', expected a number"),
    "a token that is missing": ({"tokens": [1, 1 << 20]}, "an array of 2, expected at most 4096 token ids below"),
    "too many tokens": ({"tokens": [1] * 4097}, "an array of 4097, expected at most 4096 token ids below"),
    "no token": ({"tokens": [math.nan]}, "an array of 1, expected at most 4096 token ids below"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_metadata_are_checked(name: str, tmp_path: Path, base: ModelFiles) -> None:
    changes, sentence = REFUSED[name]
    with pytest.raises(ArgosyError, match=sentence):
        open_adapter(adapter_of(base, tmp_path / "x.gguf", **changes), base)


def test_invocation_tokens_are_read(tmp_path: Path, base: ModelFiles) -> None:
    assert open_adapter(adapter_of(base, tmp_path / "x.gguf", tokens=[5, 6]), base).invocation_tokens == (
        5,
        6,
    )
