"""The facts about a model that clients can see."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from argosy.config import Preset, SamplingDefaults
from argosy.media.parts import Hearing, Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """Facts about the model that clients can see.

    parent: the id of the model, if this is the model with an adapter or a preset; empty otherwise.
    adapters: names of the adapters with which it is opened.
    preset: gives the model's id, and defaults for what requests leave out; None: this is the model under its own
        name.
    """

    id: str
    family: str
    context_tokens: int
    num_layers: int
    num_experts: int
    experts_per_token: int
    vocab_size: int
    num_parameters: int = 0
    weight_bytes: int = 0
    media_kinds: tuple[Kind, ...] = ()  # media that a prompt may contain
    media_faults: Mapping[Kind, str] = field(default_factory=dict)  # why other media are refused; no paths
    hears: Hearing = "none"  # how a sound in a prompt is treated
    hidden_size: int = 0  # dimensions of an embedding
    fingerprint: str = ""  # identifies the model (`checkpoint/fingerprint.py`)
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)  # defaults for requests
    created: int = field(default_factory=lambda: int(time.time()))
    parent: str = ""
    adapters: tuple[str, ...] = ()
    preset: Preset | None = None

    def under(self, preset: Preset) -> ModelFacts:
        """The same model under the name of one of its presets."""
        context_tokens = min(self.context_tokens, preset.context or self.context_tokens)
        sampling = self.sampling.overridden(preset.sampling, f"the preset {preset.name}")
        return replace(
            self,
            id=preset.name,
            context_tokens=context_tokens,
            sampling=sampling,
            preset=preset,
            parent=preset.model,
        )

    def adapted(self, adapter: str) -> ModelFacts:
        """The same model with an adapter."""
        return replace(self, id=f"{self.id}:{adapter}", parent=self.id, adapters=())
