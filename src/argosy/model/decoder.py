"""Step -> logits: embedding, layers, head.

    native stack  ─ dispatch, rows ─>  expert runner  ─ groups of outputs ─>  native stack

The layers run in native code. A step is one native call if every expert is in memory, or if workers run the experts
and nothing goes wrong. Otherwise the stack stops at each layer with routed experts, and an expert runner starts to run
them (it issues reads, for instance). Meanwhile Python runs the shared expert, then takes each group of outputs as it
finishes. One decoder runs every family; `ModelConfig` holds their differences, and a family's file maps its checkpoint
to it. All sums have one fixed order, so a token's logits depend neither on its step nor on which expert finishes
first.

Elsewhere: native/ops/stack.cpp runs a layer; `layers.py` describes a model's layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from argosy import _native
from argosy.config import ModelConfig
from argosy.experts.runner import ExpertRunner
from argosy.model.clock import PartClock
from argosy.model.layers import describe_activation, describe_layers, describe_residual
from argosy.model.rope import rotary
from argosy.model.step import Step
from argosy.model.weights import DenseWeights

Array = NDArray[np.float32]
RouteObserver = Callable[[int, NDArray[np.int32]], None]  # layer, expert_ids [tokens, k]


class Decoder:
    """A decoder-only transformer with mixture-of-experts layers; one step at a time.

    Attributes:
        between_layers: called by a step between two of its layers, about every 50 ms if all experts are in memory, and
            otherwise after each layer; experts may leave memory then. None: nothing is called.
        room_for_choices: given a step's number of tokens, returns an array int32 [routed layers, tokens, experts per
            token] for its choices, best first, -1 in layers that leave a token out; `choices` is the last step's array.
            Unlike `observe`, this keeps a step one native call. None: choices are not kept.

    Args:
        experts: runs the routed experts; None leaves them out of every sum.
        kv: keys and values of all layers.
        max_tokens: most tokens of a step; the working memory is allocated for them.
        recurrent: the recurrent state of the layers that have one.
        clock: receives the time of each part of a step.
        observe: receives the experts that each token of each layer chose; the array is valid during the call.
        layers: the layers to run, one after another; None: all of them.
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
        recurrent: _native.RecurrentState | None = None,
        observe: RouteObserver | None = None,
        layers: range | None = None,
    ) -> None:
        self.config = config
        self.room_for_choices: Callable[[int], NDArray[np.int32]] | None = None
        self.choices: NDArray[np.int32] | None = None
        self.between_layers: Callable[[], None] | None = None
        self.progressed_at = 0.0  # monotonic seconds at which a step was last between two layers
        self._experts = experts
        self._clock = clock
        self._observe = observe
        self._tapped: dict[int, Array] = {}
        self._tables = tables = weights.tables
        self._layers = layers = range(config.num_layers) if layers is None else layers
        self._reaches = config.reaches
        routed = [layer for layer in config.moe_layers if layer in layers]
        self._next_moe_layer = dict(pairwise(routed))
        self._stack = _native.Stack(
            runtime,
            kv,
            embedding=weights.matrices["embed"],
            head=weights.matrices[config.head_name],
            final_norm=weights.vectors.get("final_norm"),
            norm_eps=config.norm_eps,
            rotaries=[rotary(rope) for rope in config.ropes],
            activation=describe_activation(config.activation),
            layers=describe_layers(config, weights, layers, {} if tables is None else tables.rows),
            max_tokens=max_tokens,
            experts_off=experts is None,
            recurrent=recurrent,
            embedding_scale=config.embedding_scale,
            logit_scale=config.logit_scale,
            logit_cap=config.logit_cap,
            norm_kind=config.norm_kind,
            first_layer=layers.start,
            residual=describe_residual(config, weights),
        )

    def forward(self, step: Step) -> Array:
        """Run all layers; return the logits of `step.wanted`: float32 [rows, vocab_size], a new array.

        Raises:
            ValueError: a field of the step has a wrong type or shape, or a number that is out of range.
            ReadFailed, CheckpointError: rows of an n-gram table are missing.
        """
        logits = np.empty((len(step.wanted), self.config.vocab_size), np.float32)
        self._tapped = {}
        for layer in step.taps:
            self._tapped[layer] = np.empty((step.num_tokens, self.config.hidden_size), np.float32)
        self._use_experts()
        if self._tables is not None:
            self._tables.begin(step)
        if self.room_for_choices is not None:
            self.choices = self.room_for_choices(step.num_tokens)
        self._stack.begin(
            step.token_ids,
            step.sequence,
            step.slots,
            step.is_decode,
            step.block_table,
            step.order,
            step.wanted,
            logits,
            step.state_slots,
            step.angles,
            step.sees_until,
            step.overrides,
            step.additions,
            tuple(self._tapped.items()),
            self.choices,
            step.window_blocks,
            None if self._needs_all(step) else step.to_end,
            step.adapters,
        )
        while (demand := self._stack.advance(self._pause)) is not None:
            self._run_experts(*demand)
            self._pause()
        self._clock.mark_native(self._stack.take_seconds())
        return logits

    def _needs_all(self, step: Step) -> bool:
        """Whether something reads a token of the last layers that the answer does not need."""
        reaches = self._reaches
        return self._observe is not None or any(
            reaches[layer] for layer in (*step.taps, *(addition.layer for addition in step.additions))
        )

    @property
    def share_done(self) -> float:
        """The share of layers that the running step has finished; 0 once it is done. Any thread may call this."""
        return self._stack.layers_done / len(self._layers)

    def _use_experts(self) -> None:
        # An observer receives every layer's choice, so steps stop at every layer, as when they wait for reads.
        if self._experts is not None and self._observe is None:
            self._stack.use_experts(self._experts.resident or self._experts.elsewhere)

    def _pause(self) -> None:
        self.progressed_at = monotonic()
        if self._tables is not None:
            self._tables.check()
        if (pause := self.between_layers) is not None:
            pause()
            self._use_experts()

    def run_with(self, experts: ExpertRunner) -> None:
        """Use another expert runner from the next step on."""
        self._experts = experts
        self._stack.use_experts(None)  # forgets the last runner's table

    def resize(self, max_tokens: int) -> None:
        """Resize the memory to steps of at most `max_tokens` tokens, no more than at first.

        The rest of the memory goes back to the system. The last step's results are lost.
        """
        self._stack.resize(max_tokens)

    def forbid(self, layer: int, experts: Sequence[int]) -> None:
        """From the next step on, prevent tokens from choosing these experts of a layer; an empty set allows all again.

        Raises:
            ValueError: the layer lacks such experts, or would keep too few.
        """
        self._stack.forbid(layer, experts)

    def set_adapter(self, number: int, adapter: _native.StackAdapter | None) -> None:
        """From the next step on, tokens with this number in `Step.adapters` have this adapter; None: none may have it.

        Raises:
            ValueError: a step runs with tokens of this number.
        """
        self._stack.set_adapter(number, adapter)

    def tapped(self, layer: int) -> Array:
        """Return the hidden state after a layer in `taps` of the last step: float32 [tokens, hidden_size], a new array.

        Raises:
            KeyError: the step did not tap this layer.
        """
        return self._tapped[layer]

    def hidden(self) -> Array:
        """Return the hidden state after the last layer of the last step: float32 [tokens, hidden_size], a new array."""
        return self._stack.hidden().copy()

    def final_states(self, rows: NDArray[np.int64]) -> Array:
        """Return hidden states after the final norm, of rows of the last step: float32 [rows, hidden_size].

        Raises:
            ValueError: a layer left out one of these rows.
        """
        states = np.empty((len(rows), self.config.hidden_size), np.float32)
        self._stack.final_states(rows, states)
        return states

    def logits(self, rows: NDArray[np.int64]) -> Array:
        """Return logits of rows of the last step: float32 [rows, vocab_size], a new array.

        Raises:
            ValueError: a layer left out one of these rows.
        """
        logits = np.empty((len(rows), self.config.vocab_size), np.float32)
        self._stack.logits(rows, logits)
        self._clock.mark_native(self._stack.take_seconds())
        return logits

    def take_uses(self) -> NDArray[np.int64]:
        """Return how often tokens chose each expert since the last call: int64 [layers, experts].

        Which experts ran can reveal the text, so add up many tokens before showing these counts.
        """
        uses = np.empty((len(self._layers), self.config.num_experts), np.int64)
        self._stack.take_uses(uses)
        return uses

    def rows_of(self, expert: int) -> NDArray[np.int64]:
        """Return the tokens of the last step that chose `expert` in the layer at which the step last stopped."""
        rows = np.flatnonzero((self._stack.expert_ids() == expert).any(axis=1))
        left = self._stack.left
        return rows if left is None else np.array(left)[rows]

    def _run_experts(self, layer: int, dispatch: _native.Dispatch) -> None:
        """Run the experts for which a layer waits, and take each group of outputs as it finishes."""
        experts, stack, clock = self._experts, self._stack, self._clock
        assert experts is not None
        if self._observe is not None:
            self._observe(layer, stack.expert_ids())
        with experts.run(layer, dispatch, stack.rows(), stack.expert_out()) as groups:
            following, is_sweep = self._next_moe_layer.get(layer), bool(dispatch.scan)
            if following is not None and experts.wants_guess(is_sweep=is_sweep):
                experts.guess(following, stack.look_ahead(), is_sweep=is_sweep)
            stack.run_shared()  # while the first reads run
            clock.mark_native(stack.take_seconds())
            before = experts.stats.compute_s
            for group in groups:
                stack.finish_experts(group)
        clock.mark_run(experts.stats.compute_s - before)
