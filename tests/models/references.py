"""The committed references: tiny checkpoints and the outputs of transformers for them.

    reference/<name>/   config.json, weights, ref.safetensors, reference.json

`make_models.py` writes them, and `make_embeddings.py` the embeddings of some of their prompts; the configurations are
`configurations.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from tests.models.numpy_model import softmax
from tests.models.safetensors_file import Array, read_safetensors

DIRECTORY = Path(__file__).parent / "reference"
ADAPTERS = Path(__file__).parent / "reference_adapters"  # of `make_adapters.py`
EMBEDDINGS = Path(__file__).parent / "embeddings.safetensors"

# On these models, float32 sums in another order differ by a few 1e-6 of the largest logit; one wrong flag changes it by
# more than 1e-2. The bound leaves room for other processors only.
LARGEST_DIFFERENCE = 2e-4


@dataclass(frozen=True)
class Reference:
    """One checkpoint with its prompt, the prompt's logits and the greedy continuation."""

    directory: Path

    @property
    def name(self) -> str:
        return self.directory.name

    @cached_property
    def tensors(self) -> dict[str, Array]:
        return read_safetensors(self.directory / "ref.safetensors")

    @property
    def input_ids(self) -> list[int]:
        return [int(i) for i in self.tensors["input_ids"]]

    @property
    def logits(self) -> Array:
        return self.tensors["logits"]

    @property
    def greedy(self) -> list[int]:
        return [int(i) for i in self.tensors["greedy"]]


# Those with committed embeddings (`make_embeddings.py`): one of each kind of mixer, norm and embedding.
EMBEDDED = (
    "deepseek_v3_plain", "gemma4_plain", "glm4_moe_plain", "gpt_oss_plain", "mixtral_plain", "olmoe_plain",
    "qwen3_moe_plain", "qwen3_next_plain", "qwen3_plain", "gemma3_text_plain",
)  # fmt: skip
REFERENCES = tuple(Reference(directory) for directory in sorted(DIRECTORY.iterdir()))


def difference(found: Array, expected: Array) -> float:
    """Return the largest absolute difference over the largest expected magnitude."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float(abs(found - expected).max() / abs(expected).max())


def mean_divergence(expected: Array, found: Array) -> float:
    """The mean KL divergence of the next-token distributions, in nats."""
    p, q = softmax(expected.astype(np.float64)), softmax(found.astype(np.float64))
    return float((p * np.log(p / q)).sum(axis=1).mean())
