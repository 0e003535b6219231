"""Read a directory of mlx-lm: `adapter_config.json` and `adapters.safetensors`.

y += scale * (x @ lora_a) @ lora_b for `<module>.lora_a` [in, r] and `.lora_b` [r, out], with `scale` as it is. Experts
of a layer have `lora_a` [E, r, in] and `lora_b` [E, out, r]; the embedding table [vocabulary, r] and [r, hidden], which
also changes the head of a model whose head is the table. With DoRA, `.m` has the lengths of rows (`magnitudes.py`).

Source: `tuner` of mlx-lm 0.32.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from argosy.adapters.files import AdapterFiles, PairFormat, Values
from argosy.adapters.names import Dense, Draft, Expert, ModuleNames, Part
from argosy.adapters.pairs import PairCollector
from argosy.adapters.values import MOST_RANK, AdapterTensors
from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.safetensors import TensorRef, read_header
from argosy.checkpoint.untrusted_file import quote, read_object
from argosy.errors import CheckpointError, UnsupportedModel

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapters.safetensors"

_TENSOR = re.compile(r"(?P<module>.{1,200})\.(?P<part>lora_a|lora_b|m)")
_FUSE = "fuse the adapter into its base model with `mlx_lm.fuse`, and open that"


def open_mlx(directory: Path, files: ModelFiles) -> AdapterFiles:
    """Read a directory that mlx-lm has written.

    Raises:
        CheckpointError: it is damaged or incomplete, or was trained for another base.
        UnsupportedModel: it asks for something that is not supported.
    """
    raw = read_object(directory / CONFIG_FILE)
    rank, scale, is_dora = _read_config(raw, directory / CONFIG_FILE)
    path = directory / WEIGHTS_FILE
    tensors = AdapterTensors(path, read_header(path))
    return _MlxReader(tensors, files, rank, scale, raw.get("model"), is_dora=is_dora).read()


def _read_config(raw: Mapping[str, object], path: Path) -> tuple[int, float, bool]:
    """Return the rank and the scale of all pairs, and whether they have magnitudes."""
    kind = raw.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise UnsupportedModel(
            f"{CONFIG_FILE} asks for fine_tune_type {quote(kind)}; supported: lora, dora", hint=_FUSE, path=path,
            key="fine_tune_type", value=kind,
        )  # fmt: skip
    parameters = raw.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise CheckpointError(f"{CONFIG_FILE} has no lora_parameters", path=path)
    rank, scale = parameters.get("rank"), parameters.get("scale")
    if type(rank) is not int or not 1 <= rank <= MOST_RANK:
        raise CheckpointError(
            f"{CONFIG_FILE}: rank is {quote(rank)}, expected a whole number from 1 to {MOST_RANK}", path=path
        )
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) <= 1e6:
        raise CheckpointError(f"{CONFIG_FILE}: scale is {quote(scale)}, expected a number", path=path)
    assert math.isfinite(scale)
    return rank, float(scale), kind == "dora" or bool(raw.get("use_dora"))


class _MlxReader:
    """One directory, tensor by tensor."""

    def __init__(
        self,
        tensors: AdapterTensors,
        files: ModelFiles,
        rank: int,
        scale: float,
        base: object,
        *,
        is_dora: bool,
    ) -> None:
        self._tensors, self._rank, self._scale, self._is_dora = tensors, rank, scale, is_dora
        self._model = files.own_config
        self._names = ModuleNames(files.own_config, is_mlx=True)
        self._collector = PairCollector(tensors, files.own_config, self._names, base)

    def read(self) -> AdapterFiles:
        digest = self._tensors.prove(json.dumps(["mlx", self._rank, self._scale]).encode())
        for name in self._tensors.names:
            found = _TENSOR.fullmatch(name)
            if found is not None and found["part"] == "lora_a":
                self._read_pair(found["module"], name)
            elif found is not None and found["part"] == "m" and not self._is_dora:
                raise self._tensors.refuse(name, f"belongs to DoRA, but {CONFIG_FILE} does not ask for dora")
        return self._collector.finish("mlx", digest)

    def _read_pair(self, module: str, name: str) -> None:
        found = self._names.find(module)
        a, b = self._tensors.take(name), self._tensors.take(f"{module}.lora_b")
        lengths = None
        if self._is_dora and isinstance(found, Dense):
            lengths = self._collector.magnitude(self._tensors.take(f"{module}.m"), found.shape[0])
        match found:
            case Expert() if self._is_dora:
                raise self._tensors.refuse(
                    name,
                    "is a pair of routed experts with DoRA, which is supported for dense matrices",
                    _FUSE,
                )
            case Expert():
                self._require_rank(a, a.shape[1] if len(a.shape) == 3 else 0)
                self._collector.add_expert(found, a, b, self._scale, order="stacked")
            case Dense() if found.parts[0].name == "embed":
                self._require_rank(a, a.shape[-1] if a.shape else 0)
                self._collector.add_embedding(
                    a,
                    b,
                    self._scale,
                    rows_are_turned=False,
                    up_is_turned=False,
                    magnitude=None if lengths is None else lengths.reshape(-1, 1),
                )
                if self._model.is_embedding_tied:  # the table is the head, and mlx-lm changes both
                    format, table, up = self._tensors.read_pair(a, b)
                    self._put(Dense(found.shape, (Part("head"),)), format, up, table.T, name, lengths)
            case Dense():
                rows, columns = found.shape
                self._collector.require_shape(a, (columns, self._rank))
                self._collector.require_shape(b, (self._rank, rows))
                format, down, up = self._tensors.read_pair(a, b)
                self._put(found, format, down.T, up, name, lengths)
            case Draft():
                raise self._tensors.refuse(
                    name, "belongs to a layer that drafts, which runs without adapters"
                )
            case _:
                raise self._collector.no_module(name, module)

    def _put(
        self, module: Dense, format: PairFormat, down: Values, up: Values, name: str, magnitude: Values | None
    ) -> None:
        self._collector.put_dense(
            module, format, np.ascontiguousarray(down), up, self._scale, name, magnitude=magnitude
        )

    def _require_rank(self, ref: TensorRef, rank: int) -> None:
        if rank != self._rank:
            raise CheckpointError(
                f"{ref.path.name}: {quote(ref.name)} is {list(ref.shape)}, a pair of rank {rank}, but {CONFIG_FILE} "
                f"gives {self._rank}",
                path=ref.path,
                tensor=ref.name,
            )
