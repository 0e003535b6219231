"""Write llama.cpp's logits of tiny Kimi-K3 models, whose weights follow from a seed (needs `make peer`).

    python -m tests.models.make_k3

transformers has no class for the family, so these logits are its proof in `make test`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.models.gguf_k3 import write_k3_gguf
from tests.models.safetensors_file import write_safetensors
from tests.models.tiny import prompt_ids, random_tensors
from tests.models.tiny_k3 import PEER_BLOCKS, PEER_LOGITS, PEER_SEED, kimi_k3_for_peer
from tests.oracle.test_peer import peer_logits

if __name__ == "__main__":
    found = {}
    for block in PEER_BLOCKS:
        config = kimi_k3_for_peer(block)
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "model.gguf"
            write_k3_gguf(path, config, random_tensors(config, PEER_SEED, "F32"))
            found[f"block_{block}"] = "F32", peer_logits(path, prompt_ids(config, PEER_SEED))
    write_safetensors(PEER_LOGITS, found)
