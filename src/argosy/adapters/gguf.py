"""Read a GGUF adapter, as llama.cpp's converter writes it, for a base model in GGUF.

y += s B A x for `NAME.lora_a` [r, in] and `NAME.lora_b` [out, r], where NAME is the base's tensor, and s = alpha / r,
or 1 if alpha is 0. Experts of a layer are stacked: [E, r, in] and [E, out, r]. The pair of `token_embd.weight` is
turned: [vocabulary, r] and [hidden, r]. The rows of a matrix are in the order of the base's file, so the base tells
where each lies; another form of the base may have another order, and is refused.

Source: llama.cpp's converter and loader of adapters.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

from argosy.adapters.files import AdapterFiles
from argosy.adapters.names import Dense, ModuleNames, Part
from argosy.adapters.pairs import PairCollector, base_hint
from argosy.adapters.values import MOST_TOKENS, AdapterTensors
from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufArray, GgufFile, read_gguf
from argosy.checkpoint.landing import AS_STORED, PairedRows, Transcoded, in_halves
from argosy.checkpoint.untrusted_file import quote
from argosy.errors import CheckpointError, UnsupportedModel

_TENSOR = re.compile(r"(?P<base>.{1,200})\.lora_a")
_EXPERTS = re.compile(r"blk\.(?P<layer>0|[1-9][0-9]{0,4})\.ffn_(?P<matrix>gate|up|down|gate_up)_exps\.weight")
_MATRICES = {"gate": (0,), "up": (1,), "down": (2,), "gate_up": (0, 1)}
_ALPHA, _TOKENS = "adapter.lora.alpha", "adapter.alora.invocation_tokens"
_BASE = "general.base_model.0.name"
_LARGEST_ALPHA = 10**9
_PEFT = "use the directory of PEFT that it was converted from"


def open_gguf_adapter(path: Path, files: ModelFiles) -> AdapterFiles:
    """Read a GGUF file with `general.type` adapter.

    Raises:
        CheckpointError: it is damaged or incomplete, or was trained for another base.
        UnsupportedModel: it asks for something that is not supported, or the base model is not a GGUF file.
    """
    file = read_gguf(path)
    kind, method = file.text("general.type", ""), file.text("adapter.type", "")
    if (kind, method) != ("adapter", "lora"):
        raise CheckpointError(
            f"{path.name} is no LoRA adapter: general.type is {quote(kind)}, adapter.type {quote(method)}",
            path=path,
        )
    if files.header is None:
        raise UnsupportedModel(
            f"{path.name} is a GGUF adapter, and its base model is no GGUF file", hint=_PEFT, path=path
        )
    own, needed = file.text("general.architecture"), files.header.text("general.architecture")
    if own != needed:
        raise CheckpointError(
            f"{path.name} was trained for the architecture {quote(own)}, and the model is {quote(needed)}",
            hint=base_hint(file.metadata.get(_BASE), files.own_config),
            path=path,
        )
    return _GgufReader(file, files, _alpha(file)).read()


def _alpha(file: GgufFile) -> float:
    """Return alpha; 0, as without the key, leaves pairs unscaled."""
    alpha = file.metadata.get(_ALPHA, 0.0)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= _LARGEST_ALPHA:
        raise file.wrong(_ALPHA, alpha, f"a number from -{_LARGEST_ALPHA} to {_LARGEST_ALPHA}")
    return float(alpha)


class _GgufReader:
    """One file, tensor by tensor."""

    def __init__(self, file: GgufFile, files: ModelFiles, alpha: float) -> None:
        self._file, self._model, self._alpha = file, files.own_config, alpha
        self._tensors = AdapterTensors(file.path, file.tensors)
        self._names = ModuleNames(files.own_config)
        self._collector = PairCollector(
            self._tensors, files.own_config, self._names, file.metadata.get(_BASE)
        )
        self._dense = self._by_name(files)

    def _by_name(self, files: ModelFiles) -> dict[str, Dense]:
        """Return the matrices of the base by the names of their tensors, with the order of their rows."""
        found: dict[str, Dense] = {}
        for canonical, shape in self._names.shapes.items():
            ref = files.dense.get(canonical)
            if ref is None or (ref.rows, ref.cols) != shape or canonical.endswith((".k_up", ".v_up")):
                continue
            if isinstance(ref.landing, PairedRows):
                rows = in_halves(np.arange(shape[0])[:, None], ref.landing.num_heads).reshape(-1)
                found[ref.name] = Dense(shape, (Part(canonical, rows),))
            elif ref.landing == AS_STORED or isinstance(ref.landing, Transcoded):
                found[ref.name] = Dense(shape, (Part(canonical),))
        return found

    def read(self) -> AdapterFiles:
        tokens = self._invocation_tokens()
        digest = self._tensors.prove(json.dumps(["gguf", self._alpha, tokens]).encode())
        for name in self._tensors.names:
            if (found := _TENSOR.fullmatch(name)) is not None:
                self._read_pair(found["base"], name)
        return self._collector.finish("gguf", digest, invocation_tokens=tokens)

    def _invocation_tokens(self) -> tuple[int, ...]:
        tokens = self._file.metadata.get(_TOKENS)
        if tokens is None:
            return ()
        ids = tokens.values() if isinstance(tokens, GgufArray) and len(tokens) <= MOST_TOKENS else [-1]
        if not all(type(one) is int and 0 <= one < self._model.vocab_size for one in ids):
            raise self._file.wrong(
                _TOKENS, tokens, f"at most {MOST_TOKENS} token ids below {self._model.vocab_size}"
            )
        return tuple(int(one) for one in ids)

    def _read_pair(self, base: str, name: str) -> None:
        a, b = self._tensors.take(name), self._tensors.take(f"{base}.lora_b")
        rank = b.shape[-1] if b.shape else 0
        scale = self._alpha / rank if self._alpha and rank else 1.0
        experts = _EXPERTS.fullmatch(base)
        dense = self._dense.get(base)
        if experts is not None and int(experts["layer"]) in self._model.moe_layers:
            module = self._names.expert(int(experts["layer"]), None, *_MATRICES[experts["matrix"]])
            self._collector.add_expert(module, a, b, scale, order="stacked")
        elif dense is None:
            raise self._collector.no_module(name, base)
        elif dense.parts[0].name != "embed":
            self._collector.add_dense(dense, a, b, scale, up_is_turned=False)
        elif self._model.is_embedding_tied:
            raise self._tensors.refuse(
                name, "changes a table that is also the head, which is not supported", _PEFT
            )
        else:
            self._collector.add_embedding(a, b, scale, rows_are_turned=False, up_is_turned=True)
