"""Read the trained routed experts of the demo model.

    experts.gguf  ->  TrainedExperts  ->  router, gate, up, down of a layer

The file is a GGUF: layer by layer, routers in F32 and expert matrices in Q5_0 blocks (5.5 bits per weight); then, in
F16, the projector of the ear and the tower of the eye. It fits only one base file, whose digest it contains.

Elsewhere: `recipes/demo_model/` trained and wrote it; `build.py` combines it with the base.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from argosy.checkpoint.gguf import read_gguf
from argosy.checkpoint.landing import read_values
from argosy.checkpoint.safetensors import TensorRef
from argosy.checkpoint.upcycle import RoutedExperts
from argosy.errors import CheckpointError
from argosy.installed import command_for_experts

ARCHITECTURE = "argosy-demo-experts"
BASE_DIGEST_KEY = f"{ARCHITECTURE}.base_sha256"
EXPERTS_PER_TOKEN_KEY = f"{ARCHITECTURE}.experts_per_token"
TENSOR_OF_PART = {
    "router": "ffn_gate_inp",
    "gate": "ffn_gate_exps",
    "up": "ffn_up_exps",
    "down": "ffn_down_exps",
}
TOWER_PREFIX = "vision."  # prefixes the names of Qwen3-VL
TOWER_HEADS_KEY = f"{ARCHITECTURE}.vision_heads"
TENSOR_OF_PROJECTOR = {"up": "audio.projector.up.weight", "down": "audio.projector.down.weight"}


class TrainedExperts:
    """The opened experts file; a layer is dequantised on request."""

    def __init__(self, path: Path) -> None:
        """Open `path`.

        Raises:
            CheckpointError: the file is missing, or does not contain the experts of a demo model.
        """
        self._path = path
        try:
            file = read_gguf(path)
        except CheckpointError as error:
            raise CheckpointError(
                f"{path.name} cannot be read: {error.message}",
                hint=f"`{command_for_experts()} --force-reinstall` restores it",
                path=path,
            ) from error
        self._tensors = file.tensors
        self.base_sha256 = file.text(BASE_DIGEST_KEY)
        self.experts_per_token = file.integer(EXPERTS_PER_TOKEN_KEY, least=1)
        self.num_experts, self.width, self.hidden_size = self._tensor("blk.0.ffn_gate_exps.weight").shape
        self.tower_shapes = {
            name.removeprefix(TOWER_PREFIX): ref.shape
            for name, ref in self._tensors.items()
            if name.startswith(TOWER_PREFIX)
        }
        self.tower_heads = file.integer(TOWER_HEADS_KEY, least=1) if self.tower_shapes else 0
        self.num_layers = sum(name.endswith(".ffn_gate_inp.weight") for name in self._tensors)

    def layer(self, layer: int) -> RoutedExperts:
        """Return the routed experts of one layer, dequantised to float32."""
        parts = {
            part: read_values(self._tensor(f"blk.{layer}.{name}.weight"))
            for part, name in TENSOR_OF_PART.items()
        }
        return RoutedExperts(**parts)

    @property
    def hears(self) -> bool:
        """Whether the file contains a projector, so that the model gets an ear."""
        return TENSOR_OF_PROJECTOR["up"] in self._tensors

    def projector(self, part: str) -> NDArray[np.float32]:
        """Return the matrix `up` or `down` of the projector between Whisper's encoder and the model."""
        return read_values(self._tensor(TENSOR_OF_PROJECTOR[part]))

    @property
    def sees(self) -> bool:
        """Whether the file contains a tower, so that the model gets an eye."""
        return bool(self.tower_shapes)

    def tower(self, name: str) -> NDArray[np.float32]:
        """Return a tensor of the eye's tower."""
        return read_values(self._tensor(TOWER_PREFIX + name))

    def _tensor(self, name: str) -> TensorRef:
        if name not in self._tensors:
            raise CheckpointError(
                f"{self._path.name}: tensor {name} is missing", path=self._path, tensor=name
            )
        return self._tensors[name]
