"""The layer with which a checkpoint predicts one more token (DeepSeek-V3, arXiv:2412.19437, section 2.2).

    hidden state of position i ─ norm ─┐
    embedding of token i + 1   ─ norm ─┴─ draft_join ─ layer ─>  state  ─ norm, head ─>  logits of token i + 2

The layer has its own keys and values, in the same blocks as those of the model's layers, and its experts are in the
same cache. It uses the model's embedding and head. Its own state can stand for the next position's hidden state, so it
can draft further tokens, each less certain than the one before.

A draft may be wrong. So if the head has 16 or 32 bits a weight, drafts use a copy of the head in q8, which takes at
most half the bytes: a draft reads little more than its layer and a head.

The hidden state is taken after the model's final norm. `config.DraftForm` says how families differ (vLLM's
`deepseek_mtp.py`, `qwen3_next_mtp.py` and `bailing_moe_mtp.py`).

Elsewhere: `engine/drafts/mtp.py` proposes tokens with it; `decoder.py` runs the layer.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from argosy import _native
from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.formats import is_quantised, matrix_bytes
from argosy.config import Format, ModelConfig
from argosy.experts.runner import ExpertRunner
from argosy.model.clock import PartClock
from argosy.model.decoder import Decoder
from argosy.model.step import Overrides, Step
from argosy.model.weights import DenseWeights

Array = NDArray[np.float32]

MOST_DRAFT_ROWS = 256  # most rows of a run: longer prompts take several, so that working memory is small
MOST_BEHIND = 32  # positions of an answer whose hidden states may wait before they run
_HEAD_FORMAT: Format = "q8"
_COPIED_ROWS = 64  # rows of the head at a time: whole panels


class DraftLayer:
    """Runs the last of `config.layers`.

    Args:
        config: the model's, with its draft layer.
        kv: keys and values of all layers, this layer included.
        max_tokens: most rows of a run.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: DenseWeights,
        experts: ExpertRunner | None,
        kv: _native.KvCache,
        runtime: _native.Runtime,
        max_tokens: int,
        *,
        clock: PartClock,
    ) -> None:
        name = f"layers.{config.num_layers - 1}.draft_"
        self.max_tokens = max_tokens
        self._hidden, self._vocab, self._eps = config.hidden_size, config.vocab_size, config.norm_eps
        self._scale = np.float32(config.embedding_scale)
        self._form = config.draft_form
        self._runtime = runtime
        self._embedding = weights.matrices["embed"]
        head = weights.matrices[config.head_name]
        self._head = head if is_quantised(head.format) else _copied(head, runtime)
        self._token_norm, self._state_norm = (
            weights.vectors[name + "token_norm"],
            weights.vectors[name + "state_norm"],
        )
        self._join, self._final_norm = weights.matrices[name + "join"], weights.vectors[name + "final_norm"]
        self._decoder = Decoder(
            config,
            replace(weights, tables=None),
            experts,
            kv,
            runtime,
            max_tokens,
            clock=clock,
            layers=range(config.num_layers - 1, config.num_layers),
        )

    def run(self, step: Step, states: Array) -> Array:
        """Run at most `max_tokens` rows; return their states: float32 [rows, hidden_size], a new array.

        Args:
            step: `token_ids` are the tokens that follow each row's position; no rows are wanted.
            states: hidden states of the positions, float32 [rows, hidden_size].

        Raises:
            ReadFailed, CheckpointError: an expert cannot be read.
        """
        num_rows = step.num_tokens
        joined = np.empty((num_rows, 2 * self._hidden), np.float32)
        embedded = np.empty((num_rows, self._hidden), np.float32)
        _native.embed(self._runtime, self._embedding, step.token_ids, embedded)
        embedded *= self._scale
        if self._form != "qwen":
            embedded[step.order == 0] = 0.0
        _native.rms_norm(self._runtime, embedded, self._token_norm, self._eps, embedded)
        joined[:, : self._hidden] = embedded
        _native.rms_norm(self._runtime, states, self._state_norm, self._eps, embedded)
        joined[:, self._hidden :] = embedded
        _native.matmul(self._runtime, [self._join], joined, [embedded])
        rows = np.arange(num_rows)
        self._decoder.forward(step._replace(wanted=rows[:0], overrides=Overrides(rows, embedded)))
        return self._decoder.hidden()

    def following(self, states: Array) -> Array:
        """Return the hidden states from which the next draft starts: float32 [rows, hidden_size].

        Args:
            states: from `run`, float32 [rows, hidden_size].
        """
        return states if self._form == "deepseek" else self._normed(states)

    def run_with(self, experts: ExpertRunner) -> None:
        """Use another expert runner from the next run on."""
        self._decoder.run_with(experts)

    def logits(self, states: Array) -> Array:
        """Return logits of the tokens after those of the rows: float32 [rows, vocab_size].

        Args:
            states: from `run`, float32 [rows, hidden_size].
        """
        logits = np.empty((len(states), self._vocab), np.float32)
        _native.matmul(self._runtime, [self._head], self._normed(states), [logits])
        return logits

    def _normed(self, states: Array) -> Array:
        normed = np.empty_like(states)
        _native.rms_norm(self._runtime, states, self._final_norm, self._eps, normed)
        return normed


def _copied(head: _native.Matrix, runtime: _native.Runtime) -> _native.Matrix:
    """Copy the head in `_HEAD_FORMAT`, a few rows at a time, because rows pass through float32."""
    rows, cols = head.rows, head.cols
    arena = _native.Arena(matrix_bytes(_HEAD_FORMAT, rows, cols))
    end = 0
    for first in range(0, rows, _COPIED_ROWS):
        ids = np.arange(first, min(rows, first + _COPIED_ROWS), dtype=np.int32)
        values = np.empty((len(ids), cols), np.float32)
        _native.embed(runtime, head, ids, values)
        begin, end = end, end + matrix_bytes(_HEAD_FORMAT, len(ids), cols)
        _native.quantize(_HEAD_FORMAT, values, arena.array()[begin:end], runtime)
    return _native.Matrix(arena, 0, _HEAD_FORMAT, rows, cols)


def copied_head_bytes(files: ModelFiles) -> int:
    """Return the bytes of a copy of the head for drafts; 0 if there is no draft layer, or it uses the model's head."""
    ref = files.dense[files.config.head_name]
    if not files.num_draft_layers or is_quantised(ref.format):
        return 0
    return matrix_bytes(_HEAD_FORMAT, ref.rows, ref.cols)


def joining_bytes(config: ModelConfig, num_rows: int) -> int:
    """Return the bytes of the arrays that `DraftLayer.run` makes, receives and returns."""
    return 4 * num_rows * config.hidden_size * 6
