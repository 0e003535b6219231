"""Files -> named tensors: safetensors in place, packs, and the names that everything else uses."""
