"""An activation without a gate leaves two matrices in an expert, its record and a layer's tensors; latent experts have
another hidden size.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from argosy.checkpoint.files import ExpertRecord
from argosy.checkpoint.formats import matrix_bytes
from argosy.checkpoint.geometry import count_parameters, dense_shapes, expert_shapes
from argosy.checkpoint.landing import MatrixRef, Piece
from argosy.checkpoint.manifest import record_layout
from argosy.config import ActivationConfig, ModelConfig
from argosy.model.families import FAMILIES
from tests.models.tiny_flags import ernie4_5_moe

WITH_GATE: ModelConfig = FAMILIES["ernie4_5_moe"].parse_config(ernie4_5_moe())
WITHOUT = replace(WITH_GATE, activation=ActivationConfig(kind="relu2"))


def test_without_a_gate_experts_and_networks_have_two_matrices() -> None:
    assert expert_shapes(WITH_GATE, 0) == ((12, 32), (12, 32), (32, 12))
    assert expert_shapes(WITHOUT, 0) == ((12, 32), (32, 12))
    gates = {"layers.0.gate", "layers.1.shared_gate"}
    assert dict(dense_shapes(WITH_GATE)).keys() - dict(dense_shapes(WITHOUT)).keys() == gates
    total, active = (
        a - b for a, b in zip(count_parameters(WITH_GATE), count_parameters(WITHOUT), strict=True)
    )
    assert (total, active) == (32 * (24 + 24 + 6 * 12), 32 * (24 + 24 + 2 * 12))


def test_a_record_without_a_gate_is_laid_out_from_two_matrices() -> None:
    layout = record_layout(WITHOUT, 0, ("bf16", "q8"))
    up, down = layout.matrices
    assert [(one.format, one.rows, one.cols) for one in (up, down)] == [("bf16", 12, 32), ("q8", 32, 12)]
    assert layout.nbytes == down.offset + matrix_bytes("q8", 32, 12)

    record = ExpertRecord.laid_out((Piece(Path("experts.bin"), 0, layout.nbytes),), layout.matrices)
    assert (record.gate, record.matrices, record.formats) == (None, (up, down), ("bf16", "q8"))
    refs = (
        MatrixRef("up", Path("x"), 0, 1536, "f32", 12, 32),
        MatrixRef("down", Path("x"), 1536, 1536, "f32", 32, 12),
    )
    apart = ExpertRecord.of(*refs)
    assert (apart.gate, [one.piece for one in apart.matrices]) == (None, [0, 1])


def test_latent_experts_have_another_hidden_size_and_two_projections() -> None:
    latent = replace(WITHOUT, expert_latent=16)
    assert expert_shapes(latent, 0) == ((12, 16), (16, 12))
    shapes = dict(dense_shapes(latent))
    assert (shapes["layers.1.latent_down"], shapes["layers.1.latent_up"]) == ((16, 32), (32, 16))
    assert shapes["layers.1.router"] == (6, 32)
    assert shapes["layers.1.shared_up"] == (24, 32)
